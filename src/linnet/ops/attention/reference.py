"""Softmax attention with every score written out: the definition."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Segments
from .state import AttentionState

__all__ = ["attention_reference"]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    state: AttentionState | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, AttentionState]:
    """Shapes as in :func:`linnet.ops.attention`; returns ``(o, lse, state)``, computed in the input dtype."""
    if segments is None:
        rows = [slice(n, n + 1) for n in range(q.shape[0])]
        parts = [(q[n], k[n], v[n]) for n in rows]
    else:
        bounds = segments.cu_seqlens_host.tolist()
        parts = [(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairwise(bounds)]
    results = []
    for n, (qn, kn, vn) in enumerate(parts):
        seen = 0
        if state is not None:
            seen = int(state.length[n])
            first = max(state.k.shape[1] - seen, 0)
            kn = torch.cat([state.k[n : n + 1, first:], kn], 1)
            vn = torch.cat([state.v[n : n + 1, first:], vn], 1)
        results.append((*_one(qn, kn, vn, window, scale), kn, vn, seen + qn.shape[1]))
    axis = 0 if segments is None else 1
    o = torch.cat([r[0] for r in results], axis)
    lse = torch.cat([r[1] for r in results], axis)

    longest = (0 if state is None else state.k.shape[1]) + (q.shape[1] if segments is None else segments.max_len)
    slots = longest if window is None else min(longest, window - 1)

    def aligned(x: Tensor) -> Tensor:
        x = x[:, max(x.shape[1] - slots, 0) :]
        return F.pad(x, (0, 0, 0, 0, slots - x.shape[1], 0))

    cache = AttentionState(
        torch.cat([aligned(r[2]) for r in results]),
        torch.cat([aligned(r[3]) for r in results]),
        torch.tensor([r[4] for r in results], dtype=torch.int64, device=q.device),
    )
    return o, lse, cache


def _one(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """One row: the queries are the last ``T`` of the ``S`` positions that ``k`` and ``v`` hold."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    at = torch.arange(k.shape[1], device=q.device)
    age = at[k.shape[1] - q.shape[1] :, None] - at
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    scores = torch.einsum("bthk,bshk->bths", q, k) * scale
    scores = scores.masked_fill(hidden[None, :, None], -torch.inf)
    o = torch.einsum("bths,bshv->bthv", scores.softmax(-1), v)
    return o, scores.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
