"""Launching the kernels of the selective scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.tiles import multiprocessors
from .kernels_selective import backward_kernel, backward_local_kernel, carry_kernel, forward_kernel
from .selective import tile_length

__all__ = ["backward", "forward"]

RESIDENT = 12  # warps of the backward pass that a multiprocessor has room for


def settings(S: int, backward: bool, nvidia: bool) -> dict[str, int]:
    """Channels of a program, tokens that are loaded together, and warps: a thread has 32 numbers of a tile of states,
    16 in the backward pass, which has many such tiles. Registers are held to what leaves room for enough programs; both
    measured on Hopper."""
    BS = max(2, 1 << (S - 1).bit_length())
    found = {"BS": BS, "BD": 32 if backward or BS > 128 else 64, "SUB": 2, "num_warps": min(8, max(1, BS // 16))}
    return found | ({"maxnreg": 168 if backward else 128} if nvidia and BS <= 128 else {})


class _Call:
    """Sizes and settings of a call."""

    def __init__(self, x: Tensor, B: Tensor, S: int, chunk: int, ids: Tensor | None):
        self.rows, self.T, self.D = x.shape
        self.S, self.G = S, B.shape[2]
        length = tile_length(chunk)
        self.chunks = -(-self.T // length)
        self.packed = {"CHUNK": length, "PACKED": ids is not None}
        self.walk, self.back = (self.packed | settings(S, back, torch.version.hip is None) for back in (False, True))
        self.sizes = self.T, self.chunks, self.rows, S, self.D

    def blocks(self, settings: dict[str, int]) -> int:
        """Programs that share the channels of a group."""
        return -(-(self.D // self.G) // settings["BD"])

    def units(self, settings: dict[str, int], local: bool = False) -> int:
        """Programs of a walk over every chunk, or over all but one for what they pass on by themselves."""
        return self.rows * (self.chunks - local) * self.G * self.blocks(settings)

    def carry(self, A: Tensor, edges: Tensor, reach: Tensor, ids: Tensor | None, back: bool) -> None:
        """Through all chunks; with two there is nothing between."""
        if self.chunks > 2:
            grid = (self.rows * self.S * -(-self.D // 32),)
            carry_kernel[grid](A, edges, reach, ids, *self.sizes, BD=32, BACK=back, num_warps=1, **self.packed)

    def edges(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for what is carried from chunk to chunk, and for the steps' sums."""
        shape = self.chunks, self.rows, self.S, self.D
        return like.new_empty(shape), like.new_empty(self.chunks, self.rows, self.D)


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
    """The reading, the last states ``[N, D, S]`` and the states before every chunk. ``ids`` are the sequences of
    packed tokens."""
    x, delta, B, C, D = (None if y is None else y.contiguous() for y in (x, delta, B, C, D))
    A, h0 = (y.mT.contiguous() for y in (A, h0))
    call = _Call(x, B, len(A), chunk, ids)
    edges, reach = call.edges(h0)
    y, last = torch.empty_like(x), torch.empty_like(h0) if ids is None else h0.clone()
    given = (x, delta, A, B, C, D, h0, edges, reach, last, y, ids, *call.sizes, call.G)
    if call.chunks > 1:
        forward_kernel[(call.units(call.walk, local=True),)](*given, LOCAL=True, **call.walk)
        call.carry(A, edges, reach, ids, False)
    forward_kernel[(call.units(call.walk),)](*given, LOCAL=False, **call.walk)
    return y, last.mT.contiguous(), edges


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
    x, delta, B, C, D, dy = (None if y is None else y.contiguous() for y in (x, delta, B, C, D, dy))
    A, h0, dlast = (y.mT.contiguous() for y in (A, h0, dlast))
    call = _Call(x, B, len(A), chunk, ids)
    dedges, reach = call.edges(h0)
    if call.chunks > 1:
        backward_local_kernel[(call.units(call.walk, local=True),)](
            delta, A, C, dy, dlast, dedges, reach, ids, *call.sizes, call.G, **call.walk
        )
        call.carry(A, dedges, reach, ids, True)
    dx, ddelta, dA = torch.empty_like(x), torch.empty_like(delta), torch.empty_like(edges)
    dB, dC = (edges.new_empty(call.blocks(call.back), *B.shape) for _ in range(2))
    dskip = None if D is None else torch.empty_like(reach)
    dstart = torch.empty_like(dlast) if ids is None else dlast.clone()
    resident = RESIDENT // call.back["num_warps"] * multiprocessors(x.device, 16)
    programs = min(call.units(call.back), resident)
    kept = call.back["CHUNK"] // call.back["SUB"]
    scratch = edges.new_empty(programs, kept, call.back["BS"], call.back["BD"])
    given: tuple[Any, ...] = (x, delta, A, B, C, D, h0, edges, dy, dlast, dedges, scratch)
    found: tuple[Any, ...] = (dx, ddelta, dA, dB, dC, dskip, dstart, ids)
    backward_kernel[(programs,)](*given, *found, *call.sizes, call.G, **call.back)
    grads = {
        "x": dx,
        "delta": ddelta,
        "A": dA.sum((0, 1)).mT.to(A.dtype),
        "B": dB.sum(0).to(B.dtype),
        "C": dC.sum(0).to(C.dtype),
        "h": dstart.mT,
    }
    return grads if D is None or dskip is None else grads | {"D": dskip.sum((0, 1)).to(D.dtype)}
