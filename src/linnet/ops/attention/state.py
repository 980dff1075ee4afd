"""The key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Segments

__all__ = ["AttentionState", "append"]


class AttentionState(NamedTuple):
    """The keys and values seen so far, aligned to the right: slot ``S - 1`` holds the newest token of every row.

    Rows of different length share one rectangle without an index per row: slot ``s`` of row ``n`` holds the token at
    position ``length[n] - S + s`` of its sequence and is padding (zeros) where that is negative. Appending is then a
    concatenation, and cutting to a window a slice. The cache keeps the dtype of the inputs; fp32 would take twice the
    memory and hold nothing more.

    Attributes:
        k: ``[N, S, Hkv, K]``.
        v: ``[N, S, Hkv, V]``.
        length: int64 ``[N]``, tokens seen so far by each row, those a window has cut off included.
    """

    k: Tensor
    v: Tensor
    length: Tensor


def append(
    state: AttentionState | None, k: Tensor, v: Tensor, window: int | None, segments: Segments | None
) -> AttentionState:
    """The cache after the tokens ``k, v [B, T, ...]`` (or packed ``[1, total, ...]``), cut to ``window - 1`` slots."""
    held = 0 if state is None else state.k.shape[1]
    added = k.shape[1] if segments is None else segments.max_len
    slots = held + added if window is None else min(held + added, window - 1)
    if segments is None:
        rows = k.shape[0]
        seen = torch.full((rows,), added, dtype=torch.int64, device=k.device)
        if state is None:
            return AttentionState(_newest(k, slots), _newest(v, slots), seen)
        return AttentionState(
            _newest(_concat(state.k, k, slots), slots), _newest(_concat(state.v, v, slots), slots), state.length + seen
        )

    # Slot s lies `age` tokens before the newest of its row: among the new tokens, or else in the old cache.
    bounds = segments.cu_seqlens.long()
    lengths = bounds.diff()
    age = torch.arange(slots, device=k.device).flip(0)
    fresh = age < lengths[:, None]
    token = (bounds[1:, None] - 1 - age).clamp(min=0)
    old = held - 1 - age + lengths[:, None]
    kept = ~fresh & (old >= 0)

    def gather(cache: Tensor | None, x: Tensor) -> Tensor:
        result = torch.where(fresh[..., None, None], x[0][token], 0)
        if cache is None or held == 0:
            return result
        slot = old.clamp(0, held - 1)[..., None, None].expand(-1, -1, *cache.shape[2:])
        return torch.where(kept[..., None, None], cache.gather(1, slot), result)

    if state is None:
        return AttentionState(gather(None, k), gather(None, v), lengths)
    return AttentionState(gather(state.k, k), gather(state.v, v), state.length + lengths)


def _concat(cache: Tensor, x: Tensor, slots: int) -> Tensor:
    return x if x.shape[1] >= slots else torch.cat([cache, x], 1)


def _newest(x: Tensor, slots: int) -> Tensor:
    # A copy when cut: a view would keep the whole prompt alive for the sake of a window.
    return x if x.shape[1] == slots else x[:, x.shape[1] - slots :].clone()
