"""Engine `delta`: a matrix state per head that a write edits instead of only adding to it (the delta rule).

Serves DeltaNet, Gated DeltaNet, KDA, Gated DeltaNet-2 and DeltaProduct through :func:`delta`, RWKV-7 through the untied
:func:`dplr`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_floating,
    check_log_decay,
    check_number,
    check_segments,
    common_dtype,
    concrete,
    differentiable,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype, chunk_length
from . import chunked, reference
from .dplr import dplr
from .kept import kept, kernels_cover
from .state import DeltaState, initial_state

__all__ = ["DeltaState", "cost", "delta", "delta_transition", "dplr"]

BACKENDS = ("reference", "chunked", "triton")


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    w: Tensor | None = None,
    *,
    scale: float | None = None,
    l2norm: bool = False,
    substeps: int = 1,
    state: DeltaState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, DeltaState]:
    """Linear attention with the gated delta rule. Per head, with ``S`` a matrix ``[K, V]``::

        S_t = (I - k_t e_t^T) diag(exp g_t) S_{t-1} + k_t z_t^T,    e_t = beta_t * k_t,  z_t = w_t * v_t
        o_t = scale * S_t^T q_t

    Before ``z_t`` is written under ``k_t``, what ``e_t`` reads from the decayed state is taken away. With unit keys and
    a scalar ``beta`` in [0, 2] no transition expands the state; otherwise (longer keys, channel-wise ``beta``) it can
    grow. With ``substeps`` = n a token is decayed once, then edited n times, then read.

    Args:
        q: ``[B, T, Hq, K]``; ``H`` must be a multiple of ``Hq`` (consecutive value heads share a query/key head).
        k: ``[B, T * n, Hq, K]``, substep j of token t in row ``t * n + j``, as for v, beta and w.
        v: ``[B, T * n, H, V]``.
        beta: erase strength, scalar ``[B, T * n, H]`` or per key channel ``[B, T * n, H, K]``. fp32 is advised.
        g: natural log of the decay, <= 0 (-inf is a hard reset): None, constant ``[H]``, scalar ``[B, T, H]`` or a
            vector over the key channels ``[B, T, H, K]``. fp32 is advised whatever q's dtype.
        w: write strength per value channel ``[B, T * n, H, V]``; the scalar ``beta`` when None. A channel-wise
            ``beta`` needs it.
        scale: factor of the reading; ``K ** -0.5`` when None.
        l2norm: use ``x / sqrt(sum x^2 + 1e-6)`` in place of q and k, computed in fp32.
        substeps: n, edits a token.
        state: state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs, counted in tokens.
        chunk_size: tokens processed together, a power of two; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton" where it is covered.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and ``DeltaState(S [N, H, K, V])`` in fp32 (float64 for float64 inputs).
        Differentiable in every floating argument and through the returned state.

    Raises:
        ValueError: on shapes, dtypes, devices or a positive log-decay; the message names the argument.

    Source: DeltaNet (arXiv 2406.06484) eq. 4; Gated DeltaNet (2412.06464) eq. 10; vector decay: Kimi Linear
    (2510.26692) eq. 1; channel-wise erase and write: Gated DeltaNet-2 (2605.22791); substeps: DeltaProduct
    (2502.10297).
    """
    q, k, v, beta, g, w, S, scale = _check(q, k, v, beta, g, w, scale, substeps, state, segments)
    name = resolve_backend(backend, BACKENDS if kernels_cover(q, substeps) else BACKENDS[:2], q)
    size = chunk_length(chunk_size, chunked.default_chunk(substeps), q.shape[1], name)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, w, S))
    if name == "triton" and q.shape[1] == 1 and segments is None and not training and concrete(q):
        from . import launch

        o, S = launch.step(q, k, v, beta, g, w, S, scale, l2norm, substeps)
        return o, DeltaState(S)
    if name == "reference" or (q.shape[1] == 1 and segments is None and backend == "auto"):
        # One token is one step of the recurrence: nothing to chunk, and no registration overhead on the decode path.
        bounds = None if segments is None else segments.cu_seqlens_host.tolist()
        o, S = reference.recurrent(q, k, v, beta, g, w, S, bounds, scale, l2norm, substeps)
        return o, DeltaState(S)
    host = None if segments is None else segments.cu_seqlens_host
    o, S, *_ = _delta(q, k, v, beta, g, w, S, host, scale, l2norm, substeps, size, name, training)
    return o, DeltaState(S)


def delta_transition(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    w: Tensor | None = None,
    *,
    l2norm: bool = False,
    substeps: int = 1,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a stretch of tokens does to any state that enters it: ``S_out = M S_in + H``.

    With it one long sequence is split over several devices: each computes the ``(M, H)`` of its stretch, a short scan
    over them gives every stretch its initial state, and :func:`delta` then runs on all of them at once. ``M`` costs as
    much as K more value channels.

    Args:
        k, v, beta, g, w, l2norm, substeps, segments, chunk_size, backend: as in :func:`delta`.

    Returns:
        ``M`` ``[N, H, K, K]`` and ``H`` ``[N, H, K, V]`` in fp32 (float64 for float64 inputs), a row a sequence, or a
        segment. Differentiable.

    Raises:
        ValueError: as :func:`delta`.

    Source: the chunk transition of DeltaNet (arXiv 2406.06484), sections 3.2 and 3.3.
    """
    K = k.shape[-1]
    rows, H = (k.shape[0] if segments is None else len(segments)), v.shape[2]
    acc = accumulate_dtype(k)
    zeros = torch.zeros(rows, H, K, v.shape[-1], dtype=acc, device=k.device)
    eye = torch.eye(K, dtype=acc, device=k.device).expand(rows, H, K, K)
    wide = torch.cat([v, v.new_zeros(*v.shape[:3], K)], -1)
    if w is not None:
        w = torch.cat([w, w.new_zeros(*v.shape[:3], K)], -1)
    _, after = delta(
        torch.zeros_like(k[:, ::substeps]),
        k,
        wide,
        beta,
        g,
        w,
        l2norm=l2norm,
        substeps=substeps,
        state=DeltaState(torch.cat([zeros, eye], -1)),
        segments=segments,
        chunk_size=chunk_size,
        backend=backend,
    )
    return after.S[..., v.shape[-1] :], after.S[..., : v.shape[-1]]


def _check(q, k, v, beta, g, w, scale, substeps, state, segments):
    """Shapes, dtypes, signs; broadcasts a constant decay and makes the initial state."""
    if not isinstance(substeps, int) or isinstance(substeps, bool) or substeps < 1:
        raise ValueError(f"substeps: expected an integer >= 1, got {substeps!r}")
    shapes = Shapes()
    shapes("q", q, "B T Hq K")
    shapes.sizes["R"] = shapes["T"] * substeps
    shapes("k", k, "B R Hq K")
    shapes("v", v, "B R H V")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v: expected a multiple of q's {q.shape[2]} heads, got {v.shape[2]}")
    q, k, v = common_dtype(q=q, k=k, v=v)
    rows = check_segments(segments, q)
    shapes("beta", beta, "B R H", "B R H K")
    check_floating("beta", beta, q.device)
    for name, x, layouts in (("g", g, ("H", "B T H", "B T H K")), ("w", w, ("B R H V",))):
        if x is not None:
            shapes(name, x, *layouts)
            check_floating(name, x, q.device)
    if w is None and beta.dim() == 4:
        raise ValueError(f"w: expected [B={q.shape[0]}, R={shapes['R']}, H, V] with a channel-wise beta, got None")
    if g is not None:
        check_log_decay("g", g)
        if g.dim() == 1:
            g = g.expand(q.shape[0], q.shape[1], -1)
    S = initial_state(state, rows, v.shape[2], q.shape[3], v.shape[3], q)
    return q, k, v, beta, g, w, S, check_number("scale", q.shape[3] ** -0.5 if scale is None else scale)


# The registered op. `matrices` and `rows` are what the kernels keep of every chunk for the backward pass; the chunked
# form recomputes everything and returns them empty.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    chunk: int,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrices = rows = None
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from . import launch

            given = (q, k, v, beta, g, w, S, cu_host, scale, l2norm, substeps)
            o, S_out, matrices, rows = launch.forward(*given, training)
        else:
            o, S_out = chunked.forward(q, k, v, beta, g, w, S, cu_host, scale, l2norm, substeps, chunk)
    return o, S_out, *(S.new_empty(0) if y is None else y for y in (matrices, rows))  # type: ignore[return-value]


def _forward_fake(q, k, v, beta, g, w, S, cu_host, scale, l2norm, substeps, chunk, backend, training):
    o = v.new_empty(*q.shape[:2], *v.shape[2:])
    if backend != "triton" or not training:
        return o, S.new_empty(S.shape), S.new_empty(0), S.new_empty(0)
    matrices, rows = kept(q, v, substeps, cu_host)
    return o, S.new_empty(S.shape), q.new_empty(matrices), S.new_empty(rows)


_GRADS = ("q", "k", "v", "beta", "g", "w", "S")


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    chunk: int,
    backend: str,
    matrices: Tensor,
    rows: Tensor,
    do: Tensor,
    dS: Tensor,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from . import launch

            grads = launch.backward(q, k, v, beta, g, w, S, matrices, rows, cu_host, scale, l2norm, substeps, do, dS)
        else:
            grads = chunked.backward(q, k, v, beta, g, w, S, cu_host, scale, l2norm, substeps, chunk, do, dS)
    none = S.new_empty(0)
    return [grads[name].contiguous() if name in grads else none.clone() for name in _GRADS]


def _backward_fake(q, k, v, beta, g, w, S, cu_host, scale, l2norm, substeps, chunk, backend, matrices, rows, do, dS):
    given = (q, k, v, beta, g, w, S)
    return [S.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _setup(ctx, inputs, output):
    *tensors, scale, l2norm, substeps, chunk, backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.options = scale, l2norm, substeps, chunk, backend
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, do, dS, *_):
    *given, cu_host, matrices, rows = ctx.saved_tensors
    q, v, S = given[0], given[2], given[6]
    do = v.new_zeros(*q.shape[:2], *v.shape[2:]) if do is None else do.contiguous()
    dS = torch.zeros_like(S) if dS is None else dS.contiguous()
    grads = run(*given, cu_host, *ctx.options, matrices, rows, do, dS)
    wanted = zip(grads, given, ctx.needs_input_grad[: len(given)], strict=True)
    return *(d if needed and x is not None else None for d, x, needed in wanted), *[None] * 7


_delta = differentiable(
    "delta",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    gate: str = "none",
    channelwise: bool = False,
    substeps: int = 1,
    query_heads: int | None = None,
    itemsize: int = 2,
    chunk: int = 64,
    backward: bool = False,
) -> Cost:
    """Floor of one call: each input read once, each output written once, the state kept on chip.

    ``gate`` is "none", "constant", "scalar" or "vector" (fp32 scalar, ``itemsize`` vector); ``channelwise`` has beta
    and w per channel in ``itemsize`` bytes, else beta is an fp32 scalar; ``itemsize`` the bytes of q, k, v. With
    ``backward``, of forward and backward together: the inputs and the output's gradient are read again and the
    gradients written (2.9 times the forward's arithmetic for the backward, states recomputed).
    """
    Hq, n = H if query_heads is None else query_heads, substeps
    gates = {"none": 0, "constant": 0, "scalar": 4 * H, "vector": itemsize * H * K}
    if gate not in gates:
        raise ValueError(f"gate: expected one of {sorted(gates)}, got {gate!r}")
    strengths = n * H * (itemsize * (K + V) if channelwise else 4)
    inputs = (1 + n) * Hq * K * itemsize + n * H * V * itemsize + gates[gate] + strengths
    output = H * V * itemsize
    moved = inputs + output
    if backward:
        moved += 2 * inputs + output
    rows = n * chunk  # products: scores of keys and queries, the solve, its use and the reading, three with the state
    macs = n * rows * (K + V + rows // 3) + rows * (K + V) + (2 * n + 1) * K * V
    state = B * H * K * V * 4
    return Cost(int(2 * B * T * H * macs * (3.9 if backward else 1)), B * T * moved + 2 * state, state)


from . import cases as _cases  # noqa: E402,F401  (registers the ops and their sample inputs)
