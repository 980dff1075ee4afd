"""Launching the kernels of the selective scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels_selective import backward_kernel, forward_kernel
from .selective import tile_length

__all__ = ["backward", "forward"]


def _tile(x: Tensor, groups: int, chunk: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the tile, the same in both directions: they share the states between tiles."""
    rows, _, D = x.shape
    W, BD = (8, 32) if x.is_cuda else (2, 8)
    sizes = {"D": D, "G": groups, "W": W, "L": tile_length(chunk) // W, "BD": BD, "num_warps": W}
    return (rows * groups * -(-(D // groups) // BD),), sizes


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor,
    ids: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reading, the last states ``[N, D, S]`` and the states between tiles. ``ids`` are the sequences of packed
    tokens."""
    x, delta, B, C = (y.contiguous() for y in (x, delta, B, C))
    grid, tile = _tile(x, B.shape[2], chunk)
    rows, T, _ = x.shape
    start, S = h0.mT.contiguous(), h0.shape[2]
    tiles = -(-T // (tile["W"] * tile["L"]))
    edges = start.new_empty(tiles + 1, rows, *start.shape[1:])
    y, packed = torch.empty_like(x), ids is not None
    last = start.clone() if packed else None
    edges[0].copy_(start) if not packed else edges[0].zero_()
    given = (x, delta, A.float().mT.contiguous(), B, C, D, start if packed else None, edges, last, y, ids)
    forward_kernel[grid](*given, T, S, rows, PACKED=packed, **tile)
    return y, (edges[-1] if last is None else last).mT.clone(memory_format=torch.contiguous_format), edges


def backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor,
    edges: Tensor,
    ids: Tensor | None,
    chunk: int,
    dy: Tensor,
    dlast: Tensor,
) -> dict[str, Tensor]:
    """Gradients by input name."""
    x, delta, B, C, dy = (y.contiguous() for y in (x, delta, B, C, dy))
    grid, tile = _tile(x, B.shape[2], chunk)
    rows, T, _ = x.shape
    tiles, S = len(edges) - 1, h0.shape[2]
    packed, ends, factors = ids is not None, dlast.mT.contiguous(), A.float().mT.contiguous()
    carry = edges.new_zeros(2, *edges.shape[1:])
    if not packed:
        carry[0] = ends
    dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
    dA, dskip = torch.empty_like(edges[1:]), None if D is None else edges.new_empty(tiles, rows, x.shape[2])
    blocks = grid[0] // (rows * B.shape[2])
    dB, dC = (edges.new_empty(*B.shape, blocks) for _ in range(2))
    start, dstart = (h0.mT.contiguous(), ends.clone()) if packed else (None, None)
    given: tuple[Any, ...] = (x, delta, factors, B, C, D, start, edges, ids, dy, ends if packed else None, carry)
    found: tuple[Any, ...] = (dx, ddelta, dA, dB, dC, dskip, dstart)
    backward_kernel[grid](*given, *found, T, S, rows, PACKED=packed, **tile)
    if dstart is None:  # the first token's factor is left to do
        dstart = carry[tiles % 2] * torch.exp(delta[:, :1].to(factors.dtype) * factors)
    grads = {
        "x": dx,
        "delta": ddelta,
        "A": dA.sum((0, 1)).mT.to(A.dtype),
        "B": dB.sum(-1).to(B.dtype),
        "C": dC.sum(-1).to(C.dtype),
        "h": dstart.mT,
    }
    return grads if D is None or dskip is None else grads | {"D": dskip.sum((0, 1)).to(D.dtype)}
