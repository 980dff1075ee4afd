"""Mamba's selective scan: a diagonal state space a channel whose step, input and output maps depend on the token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_chunk_size,
    check_floating,
    check_log_decay,
    check_not_negative,
    check_segments,
    common_dtype,
    differentiable,
    no_autocast,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype
from . import chunked, reference
from .recurrence import backends, check_state, is_step
from .state import ScanState

__all__ = ["cost", "selective_scan"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: ScanState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ScanState]:
    """A state space of S channels for every feature d, discretised by its own step size::

        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t          h in R^S, elementwise
        y_t = C_t . h_t + D x_t

    The states of the tokens are never stored: the backward pass computes them again from one in every ``chunk_size``.

    Args:
        x: ``[B, T, D]``.
        delta: step sizes ``[B, T, D]``, >= 0; any floating dtype (fp32 is advised).
        A: log-decay of a unit step ``[D, S]``, <= 0; any floating dtype.
        B, C: input and output maps ``[B, T, S]``, or ``[B, T, G, S]`` where each of G groups serves D / G consecutive
            features.
        D: weight of the skip connection ``[D]``, none when None.
        state: ``ScanState(h [N, D, S])`` before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        chunk_size: tokens between two states kept for the backward pass, in the kernels at most 64; never changes the
            result beyond rounding.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton".

    Returns:
        ``y`` ``[B, T, D]`` in x's dtype and ``ScanState(h [N, D, S])`` in fp32 (float64 for float64 inputs).
        Differentiable in every tensor, and through the returned state.

    Raises:
        ValueError: on shapes, dtypes, devices or signs; the message names the argument.

    Source: Mamba (arXiv 2312.00752), algorithm 2 with B discretised as ``delta B``.
    """
    shapes = Shapes()
    shapes("x", x, "B T D")
    shapes("delta", delta, "B T D")
    shapes("A", A, "D S")
    grouped = shapes("B", B, "B T S", "B T G S") == "B T G S"
    shapes("C", C, "B T G S" if grouped else "B T S")
    if D is not None:
        shapes("D", D, "D")
    if not grouped:
        B, C = B[:, :, None], C[:, :, None]
    elif shapes["D"] % shapes["G"]:
        raise ValueError(f"B: expected groups that divide x's {shapes['D']} features, got {shapes['G']}")
    x, B, C = common_dtype(x=x, B=B, C=C)
    for name, y in (("delta", delta), ("A", A), ("D", D)):
        if y is not None:
            check_floating(name, y, x.device)
    check_log_decay("A", A)
    check_not_negative("delta", delta)
    rows = check_segments(segments, x)
    acc = accumulate_dtype(x)
    tail = (shapes["D"], shapes["S"])
    h = x.new_zeros(rows, *tail, dtype=acc) if state is None else check_state(state, rows, tail, x.device).to(acc)
    name = resolve_backend(backend, backends(x), x)
    size = check_chunk_size(chunk_size, 64, power_of_two=False)
    if name == "reference" or is_step(x, segments, backend):
        with no_autocast(x):
            y, h = reference.selective(x, delta, A, B, C, D, h, segments)
        return y, ScanState(h)
    where = (None, None) if segments is None else (segments.cu_seqlens_host, segments.ids)
    y, h, _ = _selective(x, delta, A, B, C, D, h, *where, size, name)
    return y, ScanState(h)


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h: Tensor,
    cu_host: Tensor | None,
    ids: Tensor | None,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from .launch_selective import forward

        return forward(x, delta, A, B, C, D, h, ids, chunk)
    with torch.autocast(x.device.type, enabled=False):
        return chunked.selective_forward(x, delta, A, B, C, D, h, cu_host, chunk)


def tile_length(chunk: int) -> int:
    """Tokens of a tile of the kernels: a power of two that registers can hold."""
    return min(max(8, 1 << (chunk - 1).bit_length()), 64)


def _forward_fake(x, delta, A, B, C, skip, h, cu_host, ids, chunk, backend):
    rows, T, D = x.shape
    edges = h.new_empty(-(-T // chunk), rows, D, h.shape[2])
    if backend == "triton":
        edges = h.new_empty(-(-T // tile_length(chunk)), rows, h.shape[2], D)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h.new_empty(h.shape), edges


_GRADS = ("x", "delta", "A", "B", "C", "D", "h")


def _backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h: Tensor,
    edges: Tensor,
    cu_host: Tensor | None,
    ids: Tensor | None,
    chunk: int,
    backend: str,
    dy: Tensor,
    dh: Tensor,
) -> list[Tensor]:
    if backend == "triton":
        from .launch_selective import backward

        grads = backward(x, delta, A, B, C, D, h, edges, ids, chunk, dy, dh)
    else:
        with torch.autocast(x.device.type, enabled=False):
            grads = chunked.selective_backward(x, delta, A, B, C, D, h, edges, cu_host, chunk, dy, dh)
    return [grads[name] if name in grads else h.new_empty(0) for name in _GRADS]


def _backward_fake(x, delta, A, B, C, D, h, edges, cu_host, ids, chunk, backend, dy, dh):
    given = (x, delta, A, B, C, D, h)
    return [h.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format) for y in given]


def _setup(ctx, inputs, output):
    *tensors, chunk, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = chunk, backend
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, dy, dh, _):
    *given, cu_host, ids, edges = ctx.saved_tensors
    dy = torch.zeros_like(given[0]) if dy is None else dy
    dh = torch.zeros_like(given[-1]) if dh is None else dh
    grads = run(*given, edges, cu_host, ids, *ctx.options, dy, dh)
    return *(None if y is None else d for d, y in zip(grads, given, strict=True)), *(None,) * 4


_selective = differentiable(
    "selective_scan",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(B: int, T: int, D: int, N: int, *, itemsize: int = 2, groups: int = 1, backward: bool = False) -> Cost:
    """Floor of one call with N state channels and fp32 step sizes: inputs read once, the output written once, no state
    of a token in memory. With ``backward``, of forward and backward together: all of it is read again with the
    output's gradient and four gradients are written. An exponential counts as one operation."""
    maps = 2 * groups * N * itemsize
    moved = 2 * D * itemsize + 4 * D + maps
    if backward:
        moved += 3 * D * itemsize + 8 * D + 2 * maps
    state = 4 * B * D * N
    return Cost(B * T * D * (7 * N + 3) * (3 if backward else 1), B * T * moved + 2 * state + 4 * D * N, state)
