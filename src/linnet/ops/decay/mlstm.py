"""The mLSTM with exponential input gate, reduced to the scalar-decay recurrence.

The stabilised cell (xLSTM, arXiv 2405.04517, eqs. 19-27) scales its memory by ``exp(-m_t)`` with
``m_t = max(lf_t + m_{t-1}, i_t)``. Given m, that *is* a scalar decay ``lf_t + m_{t-1} - m_t <= 0`` with a write weight
``exp(i_t - m_t) <= 1``, so the decay engine runs it. The output does not depend on m, which makes m a constant of
differentiation and gives the full gradient of the denominator (the published kernels drop it: TFLA, arXiv 2503.14376,
appendix).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import (
    Segments,
    Shapes,
    check_floating,
    check_number,
    check_segments,
    common_dtype,
    differentiable,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype
from .state import DecayState, MLSTMState

_FLOOR = -1e4  # for m alone: exp of anything lower is 0 next to the denominator's 1


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    eps: float = 0.0,
    state: MLSTMState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """The mLSTM cell with exponential input gate and matrix memory. Per head::

        C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T          n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
        h_t = scale * C_t^T q_t / (max(|scale * n_t.q_t|, 1) + eps exp(m_t))

    evaluated in the stabilised form, so ``i`` may be of any size. The variant with a sigmoid input gate has no
    normaliser: it is ``decay(q, k, v, g=logsigmoid(f), w=sigmoid(i))``.

    Args:
        q, k: ``[B, T, Hq, K]``; v: ``[B, T, H, V]`` with ``H`` a multiple of ``Hq``.
        i, f: pre-activations of the input and forget gate ``[B, T, H]``, fp32 advised.
        scale: factor of the reading; ``K ** -0.5`` when None.
        eps: added to the stabilised denominator (the published layers use 1e-6; 0 is the exact cell).
        state: ``MLSTMState`` before the first token; zeros when None.
        segments, chunk_size, backend: as in :func:`linnet.ops.decay.decay`.

    Returns:
        ``h`` ``[B, T, H, V]`` in v's dtype and the ``MLSTMState`` after the last token.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: xLSTM (arXiv 2405.04517), TFLA (arXiv 2503.14376) section 2.
    """
    from . import BACKENDS, _check, kernels_cover, run

    shapes = Shapes()
    shapes("q", q, "B T Hq K")
    shapes("v", v, "B T H V")
    shapes("i", i, "B T H")
    shapes("f", f, "B T H")
    for name, x in (("i", i), ("f", f)):
        check_floating(name, x, q.device)
    rows = check_segments(segments, q)
    acc = accumulate_dtype(common_dtype(q=q)[0])  # type: ignore[arg-type]
    if state is None:
        H, K, V = v.shape[2], q.shape[3], v.shape[3]
        zeros = torch.zeros(rows * H * (K * V + K + 1), dtype=acc, device=q.device)
        S, z, m = zeros.split([rows * H * n for n in (K * V, K, 1)])
        state = MLSTMState(S.view(rows, H, K, V), z.view(rows, H, K), m.view(rows, H))
    elif not isinstance(state, MLSTMState):
        raise ValueError(f"state: expected an MLSTMState, got {type(state).__name__}")
    Shapes(N=rows, H=v.shape[2])("state.m", state.m, "N H")
    check_floating("state.m", state.m, q.device)
    kernel = resolve_backend(backend, BACKENDS if kernels_cover(q, v, True) else BACKENDS[:2], q) == "triton"
    packing = (None,) * 3 if segments is None else (segments.cu_seqlens, segments.ids, segments.cu_seqlens_host)
    g, w, floor, m = _gates(i.to(acc), f.to(acc), state.m.detach().to(acc), *packing, kernel)
    inner, eps = DecayState(state.S, state.z), check_number("eps", eps, 0.0)
    q, k, v, g, _, _, w, S, z, scale = _check(q, k, v, g, None, None, w, scale, True, inner, segments)
    h, S, z = run(q, k, v, g, None, None, w, S, z, floor, segments, scale, eps, chunk_size, backend)
    return h, MLSTMState(S, z, m)  # type: ignore[arg-type]


def _stabilizer(
    lf: Tensor, i: Tensor, m0: Tensor, cu_seqlens: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """m before and after every token, ``m_t = max(lf_t + m_{t-1}, i_t)``, as a running maximum of ``i_j - b_j`` with
    ``b`` the cumulative log-forget gate. float64, because b grows with T while m does not."""
    lf, i, m0 = (x.double().clamp(min=_FLOOR) for x in (lf, i, m0))
    b = lf.cumsum(1)
    relative = i - b
    if cu_seqlens is None or ids is None:
        m = b + torch.maximum(relative.cummax(1).values, m0[:, None])
        return torch.cat([m0[:, None], m[:, :-1]], 1), m
    ids, starts = ids.long(), cu_seqlens[:-1].long()
    start = torch.cat([torch.zeros_like(b[:, :1]), b], 1).index_select(1, starts)[0]
    relative = torch.maximum(relative, (m0 - start)[ids][None])  # start: b before each segment's first token
    lift = ids[None, :, None] * (2 * (relative.abs().amax() + 1))  # so that no maximum reaches across a boundary
    m = b + (relative + lift).cummax(1).values - lift
    first = (torch.arange(len(ids), device=ids.device) == starts[ids])[None, :, None]
    return torch.where(first, m0[ids][None], torch.cat([m0[ids[:1]][None], m[:, :-1]], 1)), m


# The gates as one op: log-decay, write weight, least denominator, and the stabiliser after the last token. That is a
# constant of differentiation, so the gradients are those of logsigmoid and exp.


def _forward(
    i: Tensor,
    f: Tensor,
    m0: Tensor,
    cu_seqlens: Tensor | None,
    ids: Tensor | None,
    cu_host: Tensor | None,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kernel:
        from .launch_step import stabilizer

        return stabilizer(i, f, m0, cu_seqlens, ids, _FLOOR)
    lf = F.logsigmoid(f)
    before, m = _stabilizer(lf, i, m0, cu_seqlens, ids)
    g = (lf + (before - m).to(lf.dtype)).clamp(max=0)  # above 0 by rounding
    m_t = m.to(lf.dtype)
    last = m_t[:, -1].clone()
    if cu_seqlens is not None:  # an empty segment has no last token: its row passes through
        last = torch.where((cu_seqlens.diff() > 0)[:, None], m_t[0, cu_seqlens[1:].long() - 1], m0)
    # exp(-m) is the cell's 1; below -80 it would leave fp32, and a larger floor changes nothing next to |x|.
    return g, (i - m_t).exp(), (-m_t).clamp(min=-80).exp(), last


def _forward_fake(i, f, m0, cu_seqlens, ids, cu_host, kernel):
    g, w, floor = (torch.empty_like(i, memory_format=torch.contiguous_format) for _ in range(3))
    if kernel:  # a walk reads along a head
        w, floor = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (w, floor))
    return g, w, floor, torch.empty_like(m0)


def _backward(f: Tensor, w: Tensor, dg: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    return (dw * w).contiguous(), dg * torch.sigmoid(-f)


def _backward_fake(f, w, dg, dw):
    return torch.empty_like(dw), torch.empty_like(dg)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], output[1])


def _gradients(run, ctx, dg, dw, _floor, _last):
    f, w = ctx.saved_tensors
    return *run(f, w, dg.contiguous(), dw.contiguous()), *(None,) * 5


_gates = differentiable(
    "mlstm_gates",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)
