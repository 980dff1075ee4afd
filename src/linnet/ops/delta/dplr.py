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
    check_segments,
    common_dtype,
    resolve_backend,
)
from . import chunked, reference
from .state import DeltaState, initial_state

BACKENDS = ("reference", "chunked")


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
        backend: "auto", "reference" (token by token) or "chunked" (vectorised PyTorch).

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and ``DeltaState(S [N, H, K, V])`` in fp32 (float64 for float64 inputs).
        Differentiable in every floating argument and through the returned state.

    Raises:
        ValueError: on shapes, dtypes, devices or a positive log-decay; the message names the argument.

    Source: RWKV-7 (arXiv 2503.14456) eqs. 15-17; the name and the general form: DeltaNet (2406.06484), section 5.1.
    """
    q, k, v, a, b, S = _check(q, k, v, a, b, g, state, segments)
    name = resolve_backend(backend, BACKENDS, q)
    if name == "reference" or (q.shape[1] == 1 and segments is None and backend == "auto"):
        bounds = None if segments is None else segments.cu_seqlens_host.tolist()
        o, S = reference.recurrent_untied(q, k, v, a, b, g, S, bounds, float(scale))
    else:
        size = chunked.chunk_length(chunk_size, q.shape[1], 1, name)
        host = None if segments is None else segments.cu_seqlens_host
        o, S = _dplr(q, k, v, a, b, g, S, host, float(scale), size)
    return o, DeltaState(S)


def _check(q, k, v, a, b, g, state, segments):
    shapes = Shapes()
    for name, x in {"q": q, "k": k, "a": a, "b": b}.items():
        shapes(name, x, "B T H K")
    shapes("v", v, "B T H V")
    shapes("g", g, "B T H", "B T H K")
    if q.shape[1] < 1:
        raise ValueError(f"q: expected at least one token, got shape {list(q.shape)}")
    q, k, v, a, b = common_dtype(q=q, k=k, v=v, a=a, b=b)
    rows = check_segments(segments, q.shape[0], q.shape[1])
    check_floating("g", g, q.device)
    check_log_decay("g", g)
    return q, k, v, a, b, initial_state(state, rows, q.shape[2], q.shape[3], v.shape[3], q)


@torch.library.custom_op("linnet::dplr", mutates_args=())
def _dplr(
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
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return chunked.forward_untied(q, k, v, a, b, g, S, cu_host, scale, chunk)


@_dplr.register_fake
def _(q, k, v, a, b, g, S, cu_host, scale, chunk):
    return torch.empty_like(v, memory_format=torch.contiguous_format), S.new_empty(S.shape)


_GRADS = ("q", "k", "v", "a", "b", "g", "S")


@torch.library.custom_op("linnet::dplr_backward", mutates_args=())
def _dplr_backward(
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
    do: Tensor,
    dS: Tensor,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = chunked.backward_untied(q, k, v, a, b, g, S, cu_host, scale, chunk, do, dS)
    return [grads[name].contiguous() for name in _GRADS]


@_dplr_backward.register_fake
def _(q, k, v, a, b, g, S, cu_host, scale, chunk, do, dS):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, a, b, g, S)]


def _setup(ctx, inputs, output):
    *tensors, scale, chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, chunk
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dS):
    v, S = ctx.saved_tensors[2], ctx.saved_tensors[6]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dS = torch.zeros_like(S) if dS is None else dS.contiguous()
    grads = _dplr_backward(*ctx.saved_tensors, *ctx.options, do, dS)
    return *(d if needed else None for d, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


_dplr.register_autograd(_backward, setup_context=_setup)


def cost(B: int, T: int, H: int, K: int, V: int, *, itemsize: int = 2, chunk: int = 64, backward: bool = False) -> Cost:
    """Floor of one call with a vector decay: each input read once, each output written once, the state kept on chip.
    With ``backward``, of forward and backward together, as for :func:`linnet.ops.delta.cost`."""
    inputs, output = H * (5 * K + V) * itemsize, H * V * itemsize
    moved = inputs + output + (2 * inputs + output if backward else 0)
    macs = chunk * (4 * K + 3 * V + chunk // 3) + 4 * K * V
    state = B * H * K * V * 4
    return Cost(int(2 * B * T * H * macs * (3.9 if backward else 1)), B * T * moved + 2 * state, state)
