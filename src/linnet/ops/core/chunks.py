"""What the chunkwise engines share: cutting sequences into chunks, and the products of gates inside a chunk.

Every factor is a product of gates, never a quotient, so it lies in [0, 1] whatever the decay, and a hard reset
(log-decay -inf) is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_chunk_size
from .segments import chunk_table

__all__ = [
    "Factors",
    "Plan",
    "accumulate_dtype",
    "chunk_length",
    "cut",
    "halves",
    "join",
    "like_gate",
    "make_plan",
    "scalar_factors",
    "segment_decay",
    "times",
    "tokens_after",
    "tokens_up_to",
    "tree_factors",
]


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """States and sums are fp32, or float64 when the inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_length(chunk_size: int | None, default: int, length: int, backend: str) -> int:
    """Tokens of a chunk, a power of two: ``default`` when ``chunk_size`` is None; in the chunked form no more than hold
    ``length`` tokens."""
    size = check_chunk_size(chunk_size, default)
    if backend == "chunked" and not torch.compiler.is_compiling():  # there T may be a symbol, which this would fix
        size = min(size, 1 << (length - 1).bit_length())
    return size


class Plan(NamedTuple):
    """How ``[B, T]`` is cut into chunks: where tokens go, and which chunk follows which in the scan over the state."""

    batch: int
    length: int
    chunk: int
    gather: Tensor | None  # packed rows: [chunks * C] token of each slot (``length`` = padding)
    scatter: Tensor | None  # packed rows: [T] slot of each token
    steps: list[tuple[Tensor, Tensor]]  # per step of the scan: (state rows, their chunks)


def make_plan(batch: int, length: int, chunk: int, cu_host: Tensor | None, device: torch.device) -> Plan:
    """The plan for rows of ``length`` tokens, or for one packed row whose sequences begin at ``cu_host``."""
    if cu_host is None:
        count = -(-length // chunk)
        rows = torch.arange(batch, device=device)
        return Plan(batch, length, chunk, None, None, [(rows, rows * count + c) for c in range(count)])
    table = chunk_table(cu_host, chunk, "cpu").long()
    start = cu_host.long()[table[:, 0]] + table[:, 1] * chunk
    slots = start[:, None] + torch.arange(chunk, device="cpu")
    gather = torch.where(slots < cu_host.long()[table[:, 0] + 1][:, None], slots, length).flatten()
    scatter = torch.empty(length, dtype=torch.long, device="cpu")
    used = gather < length
    scatter[gather[used]] = used.nonzero().flatten()
    steps = []
    for c in range(int(table[:, 1].max()) + 1):
        chunks = (table[:, 1] == c).nonzero().flatten()
        steps.append((table[chunks, 0].to(device), chunks.to(device)))
    return Plan(batch, length, chunk, gather.to(device), scatter.to(device), steps)


def cut(x: Tensor, plan: Plan, acc: torch.dtype) -> Tensor:
    """``[B, T, H, D] -> [chunks, H, C, D]``, padded with zeros."""
    C = plan.chunk
    if plan.gather is not None:
        x = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, plan.gather)
        x = x.unflatten(0, (-1, C))
    else:
        x = F.pad(x, (0, 0, 0, 0, 0, -plan.length % C)).reshape(-1, C, *x.shape[2:])
    return x.transpose(1, 2).to(acc).contiguous()


def join(x: Tensor, plan: Plan) -> Tensor:
    """``[chunks, H, C, D] -> [B, T, H, D]``: the inverse of :func:`cut`."""
    x = x.transpose(1, 2)
    if plan.scatter is not None:
        return x.flatten(0, 1).index_select(0, plan.scatter)[None]
    return x.reshape(plan.batch, -1, *x.shape[2:])[:, : plan.length]


class Factors(NamedTuple):
    """What a log-gate ``[N, H, C, D]`` (D = 1 for a scalar) contributes to a chunk."""

    prefix: Tensor  # [N, H, C, D] product over the gates a reader has seen since the chunk began
    suffix: Tensor  # [N, H, C, D] product over the gates after a writer
    total: Tensor  # [N, H, D]
    levels: list[tuple[Tensor, Tensor]]  # halving level: (reader [N, H, blocks, w, D], writer [N, H, blocks, w, D])


def scalar_factors(g: Tensor, exclusive: bool) -> Factors:
    """The factors of scalar gates ``[N, H, C, 1]``, without levels (see :func:`segment_decay`). With ``exclusive`` a
    reader has not seen the gate of its own token."""
    zero = torch.zeros_like(g[:, :, :1])
    reads = torch.cat([zero, g[:, :, :-1]], 2) if exclusive else g
    after = torch.cat([g[:, :, 1:], zero], 2).flip(2).cumsum(2).flip(2)
    return Factors(reads.cumsum(2).exp(), after.exp(), g.sum(2).exp(), [])


def tree_factors(g: Tensor, exclusive: bool) -> Factors:
    """The factors of vector gates ``[N, H, C, D]``, with those of every halving level."""
    n, h, C, d = g.shape
    total = g.exp().unsqueeze(3)
    read, write = (torch.ones_like(total) if exclusive else total), torch.ones_like(total)
    levels, w = [], 1
    while w < C:
        (r0, r1), (w0, w1), (t0, t1) = (x.reshape(n, h, C // (2 * w), 2, -1, d).unbind(3) for x in (read, write, total))
        levels.append((r1, w0))
        read, write, total = torch.cat([r0, r1 * t0], 3), torch.cat([w0 * t1, w1], 3), t0 * t1
        w *= 2
    return Factors(read[:, :, 0], write[:, :, 0], total[:, :, 0, 0], levels)


def segment_decay(g: Tensor, exclusive: bool) -> Tensor:
    """``[N, H, C, 1] -> [N, H, C, C]``: product of the scalar gates between writer j and reader i, 0 where i does not
    read j. Each entry is a sum of its own gates, never a difference of cumulative sums, so -inf is exact."""
    C = g.shape[2]
    below = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    sums = torch.where(below, g, 0.0).cumsum(2)
    if exclusive:
        sums = torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], 2)
        return torch.where(below, sums.exp(), 0.0)
    own = torch.eye(C, dtype=torch.bool, device=g.device)
    return torch.where(below, sums, -torch.inf).masked_fill(own, 0.0).exp()


def tokens_up_to(x: Tensor, exclusive: bool) -> Tensor:
    """Along axis -2, collect for each gate t the readers i it reaches: i >= t, or i > t when reading is exclusive."""
    w = x.shape[-2]
    return torch.ones(w, w, dtype=x.dtype, device=x.device).triu(int(exclusive)) @ x


def tokens_after(x: Tensor) -> Tensor:
    """Along axis -2, collect for each gate t the writers j < t."""
    w = x.shape[-2]
    return torch.ones(w, w, dtype=x.dtype, device=x.device).tril(-1) @ x


def like_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Sum the last axis away where the gate is a scalar."""
    return x if gate.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor``, where None is 1."""
    return x if factor is None else x * factor


def halves(x: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Views ``[N, H, blocks, w, ...]`` of the left and the right halves of blocks of ``2 w`` tokens."""
    left, right = x.unflatten(2, (-1, 2, w)).unbind(3)
    return left, right
