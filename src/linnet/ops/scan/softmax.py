"""Softmax attention with a query that does not depend on the token, as a scan: running averages of a stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_chunk_size,
    check_floating,
    check_segments,
    common_dtype,
    no_autocast,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype
from . import reference
from .recurrence import backends, is_step, minmax_scan, scan
from .state import ScanState, SoftmaxScanState

__all__ = ["cost", "softmax_scan"]


def softmax_scan(
    s: Tensor,
    v: Tensor,
    *,
    state: SoftmaxScanState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SoftmaxScanState]:
    """Averages of all values so far, weighted by the softmax of their scores::

        o_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i)

    the attention of one query to every prefix, at constant memory a token. Runs on the engine's two scans: the running
    maximum ``m`` of the scores, then numerator and denominator with ``exp(m_{t-1} - m_t)`` as the factor.

    Args:
        s: scores ``[B, T, H]``, any floating dtype (fp32 is advised); -inf leaves a token out.
        v: values ``[B, T, H, V]``.
        state: what the tokens before have left; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        chunk_size: tokens of a chunk of the PyTorch form; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton".

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, zeros as long as every score was -inf, and the state after the last token.
        Differentiable in s, v and the state (its ``m`` apart), and through the returned state.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: Attention as an RNN (arXiv 2405.13956).
    """
    shapes = Shapes()
    shapes("v", v, "B T H V")
    shapes("s", s, "B T H")
    (v,) = common_dtype(v=v)
    check_floating("s", s, v.device)
    rows = check_segments(segments, v)
    acc = accumulate_dtype(v)
    check_chunk_size(chunk_size, 0, power_of_two=False)
    m, u, w = _state(state, rows, v, acc)
    with no_autocast(v):
        if resolve_backend(backend, backends(v), v) == "reference" or is_step(v, segments, backend):
            o, m, u, w = reference.softmax(s, v, m, u, w, segments)
            return o, SoftmaxScanState(m, u, w)
        s = s.to(acc)
        options = {"segments": segments, "chunk_size": chunk_size, "backend": backend}
        with torch.no_grad():
            every = s.new_full((1,), torch.inf).expand(s.shape)
            top, last = minmax_scan(every, s.detach(), state=ScanState(m.detach()), **options)
            before = _shift(top, m, segments)
            keep = torch.where(before == top, 1.0, (before - top).exp())
            low = torch.where(top == -torch.inf, 0.0, top)
        weight = (s - low).exp()[..., None]
        width = v.shape[3] + 1
        b = torch.cat([weight * v.to(acc), weight], -1).flatten(2)
        sums = ScanState(torch.cat([w, u[..., None]], -1).flatten(1))
        h, sums = scan(keep.repeat_interleave(width, 2), b, state=sums, **options)
        h, after = h.unflatten(2, (-1, width)), sums.h.unflatten(1, (-1, width))
        total = h[..., -1:]
        o = torch.where(total > 0, h[..., :-1] / torch.where(total > 0, total, 1.0), 0.0)
    return o.to(v.dtype), SoftmaxScanState(last.h, after[..., -1], after[..., :-1])


def _shift(x: Tensor, first: Tensor, segments: Segments | None) -> Tensor:
    """The entries before every token, ``first`` before the first one of a row."""
    if segments is None:
        return torch.cat([first[:, None], x[:, :-1]], 1)
    begins = segments.positions == 0
    return torch.where(begins[:, None], first[segments.ids], torch.cat([x[:, :1], x[:, :-1]], 1))


def _state(state: SoftmaxScanState | None, rows: int, v: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    H, V = v.shape[2:]
    if state is None:
        u = v.new_zeros(rows, H, dtype=acc)
        return torch.full_like(u, -torch.inf), u, v.new_zeros(rows, H, V, dtype=acc)
    if not isinstance(state, SoftmaxScanState):
        raise ValueError(f"state: expected a SoftmaxScanState, got {type(state).__name__}")
    shapes = Shapes(N=rows, H=H, V=V)
    for name, layout in (("m", "N H"), ("u", "N H"), ("w", "N H V")):
        part = getattr(state, name)
        shapes(f"state.{name}", part, layout)
        check_floating(f"state.{name}", part, v.device)
    return state.m.to(acc), state.u.to(acc), state.w.to(acc)


def cost(B: int, T: int, H: int, V: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Floor of one call: fp32 scores and values read once, averages written once. With ``backward``, of forward and
    backward together: scores, values and the output's gradient are read again, two gradients written."""
    scores, values = 4 * H, itemsize * H * V
    moved = (3 * scores + 5 * values) if backward else (scores + 2 * values)
    state = 4 * B * H * (V + 2)
    return Cost(B * T * H * (3 * V + 6) * (3 if backward else 1), B * T * moved + 2 * state, state)
