"""The untied form: diagonal plus low rank with erase and write directions of their own."""

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
from ..core.chunks import chunk_length
from . import chunked, reference
from .kept import kept, kernels_cover
from .state import DeltaState, initial_state

BACKENDS = ("reference", "chunked", "triton")


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float = 1.0,
    state: DeltaState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, DeltaState]:
    """Linear attention with a diagonal plus low-rank transition. Per head, with ``S`` a matrix ``[K, V]``::

        S_t = (diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    ``a_t`` reads the state before its decay; in :func:`linnet.ops.delta` the erase reads it after.

    Args:
        q, k, a, b: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        g: natural log of the decay, <= 0 (-inf is a hard reset): scalar ``[B, T, H]`` or a vector over the key channels
            ``[B, T, H, K]``. fp32 is advised whatever q's dtype.
        scale: factor of the reading; 1 as in RWKV-7 unless given.
        state: state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        chunk_size: tokens processed together, a power of two; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton" where it is covered.

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and ``DeltaState(S [N, H, K, V])`` in fp32 (float64 for float64 inputs).
        Differentiable in every floating argument and through the returned state.

    Raises:
        ValueError: on shapes, dtypes, devices or a positive log-decay; the message names the argument.

    Source: RWKV-7 (arXiv 2503.14456) eqs. 15-17; the name and the general form: DeltaNet (2406.06484), section 5.1.
    """
    q, k, v, a, b, S = _check(q, k, v, a, b, g, state, segments)
    scale = check_number("scale", scale)
    name = resolve_backend(backend, BACKENDS if kernels_cover(q) else BACKENDS[:2], q)
    size = chunk_length(chunk_size, chunked.default_chunk(1), q.shape[1], name)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, a, b, g, S))
    if name == "triton" and q.shape[1] == 1 and segments is None and not training and concrete(q):
        from . import launch

        o, S = launch.step(q, k, v, None, g, None, S, scale, False, 1, (a, b))
        return o, DeltaState(S)
    if name == "reference" or (q.shape[1] == 1 and segments is None and backend == "auto"):
        bounds = None if segments is None else segments.cu_seqlens_host.tolist()
        o, S = reference.recurrent_untied(q, k, v, a, b, g, S, bounds, scale)
    else:
        host = None if segments is None else segments.cu_seqlens_host
        o, S, *_ = _dplr(q, k, v, a, b, g, S, host, scale, size, name, training)
    return o, DeltaState(S)


def _check(q, k, v, a, b, g, state, segments):
    shapes = Shapes()
    for name, x in {"q": q, "k": k, "a": a, "b": b}.items():
        shapes(name, x, "B T H K")
    shapes("v", v, "B T H V")
    shapes("g", g, "B T H", "B T H K")
    q, k, v, a, b = common_dtype(q=q, k=k, v=v, a=a, b=b)
    rows = check_segments(segments, q)
    check_floating("g", g, q.device)
    check_log_decay("g", g)
    return q, k, v, a, b, initial_state(state, rows, q.shape[2], q.shape[3], v.shape[3], q)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    chunk: int,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrices = rows = None
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from . import launch

            args = q, k, v, None, g, None, S, cu_host, scale, False, 2, training, (a, b)
            o, S_out, matrices, rows = launch.forward(*args)
        else:
            o, S_out = chunked.forward_untied(q, k, v, a, b, g, S, cu_host, scale, chunk)
    return o, S_out, *(S.new_empty(0) if y is None else y for y in (matrices, rows))  # type: ignore[return-value]


def _forward_fake(q, k, v, a, b, g, S, cu_host, scale, chunk, backend, training):
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if backend != "triton" or not training:
        return o, S.new_empty(S.shape), S.new_empty(0), S.new_empty(0)
    matrices, rows = kept(q, v, 2, cu_host)
    return o, S.new_empty(S.shape), q.new_empty(matrices), S.new_empty(rows)


_GRADS = ("q", "k", "v", "a", "b", "g", "S")


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
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

            args = q, k, v, None, g, None, S, matrices, rows, cu_host, scale, False, 2, do, dS, (a, b)
            grads = launch.backward(*args)
        else:
            grads = chunked.backward_untied(q, k, v, a, b, g, S, cu_host, scale, chunk, do, dS)
    return [grads[name].contiguous() for name in _GRADS]


def _backward_fake(q, k, v, a, b, g, S, cu_host, scale, chunk, backend, matrices, rows, do, dS):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, a, b, g, S)]


def _setup(ctx, inputs, output):
    *tensors, scale, chunk, backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.options = scale, chunk, backend
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, do, dS, *_):
    *given, matrices, rows = ctx.saved_tensors
    v, S = given[2], given[6]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dS = torch.zeros_like(S) if dS is None else dS.contiguous()
    grads = run(*given, *ctx.options, matrices, rows, do, dS)
    return *(d if needed else None for d, needed in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 5


_dplr = differentiable(
    "dplr",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(B: int, T: int, H: int, K: int, V: int, *, itemsize: int = 2, chunk: int = 64, backward: bool = False) -> Cost:
    """Floor of one call with a vector decay: each input read once, each output written once, the state kept on chip.
    With ``backward``, of forward and backward together, as for :func:`linnet.ops.delta.cost`."""
    inputs, output = H * (5 * K + V) * itemsize, H * V * itemsize
    moved = inputs + output + (2 * inputs + output if backward else 0)
    macs = chunk * (4 * K + 3 * V + chunk // 3) + 4 * K * V
    state = B * H * K * V * 4
    return Cost(int(2 * B * T * H * macs * (3.9 if backward else 1)), B * T * moved + 2 * state, state)
