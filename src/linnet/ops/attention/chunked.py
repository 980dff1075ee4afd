"""Attention on PyTorch's own kernels.

What every mode has in common: after the cached keys are put before the new ones, a query sees one contiguous range of
keys. It ends at the query itself and begins at the latest of: the first slot of the cache that is not padding, the
start of the segment, the edge of the window. Which route computes it:

* nothing but causal: `scaled_dot_product_attention(is_causal=True)`;
* on a GPU, from one block of queries on: FlexAttention with a block mask made from the ranges (`flex.py`);
* windowed: blocks of queries against the slice of keys they can reach, `O(T * window)` on any device. Packed rows are
  windowed by their longest segment, so that no call pays for the square of the packed length;
* else (short queries on a long cache, decoding): one dense mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Segments
from .flex import flex_attend, flex_usable
from .state import AttentionState, append

__all__ = ["attention_chunked"]


def attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    state: AttentionState | None,
    segments: Segments | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None, AttentionState]:
    """Shapes as in :func:`linnet.ops.attention`; returns ``(o, lse or None, state)``."""
    after = append(state, k, v, window, segments)
    cache = state
    if cache is not None and window is not None and cache.k.shape[1] >= window:
        cut = cache.k.shape[1] - (window - 1)
        cache = AttentionState(cache.k[:, cut:], cache.v[:, cut:], cache.length)
    if cache is not None and cache.k.shape[1] == 0:
        cache = None
    if segments is not None and len(segments) == 1:
        segments = None
    if segments is None and cache is None and not want_lse and (window is None or window >= q.shape[1]):
        return _causal(q, k, v, scale), None, after
    if flex_usable(q, v):
        return *flex_attend(q, k, v, window, scale, cache, segments, want_lse), after
    if segments is None:
        return *_rows(q, k, v, window, scale, cache, want_lse), after
    if cache is not None:
        return *_unpacked(q, k, v, window, scale, cache, segments, want_lse), after
    reach = segments.max_len if window is None else min(window, segments.max_len)
    first = segments.cu_seqlens[:-1].index_select(0, segments.ids)[None]
    return *_masked(q, k, v, reach, scale, first, want_lse), after


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, cache: AttentionState | None, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """A batch whose rows each continue their own cache."""
    if cache is None:
        return _masked(q, k, v, window, scale, None, want_lse)
    first = (cache.k.shape[1] - cache.length).clamp(min=0)[:, None]
    return _masked(q, torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1), window, scale, first, want_lse)


def _unpacked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    cache: AttentionState,
    segments: Segments,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Packed rows that continue a cache: one row a segment, filled up on the right. The filling comes after every real
    token, so none of them sees it, and what it computes is not gathered back."""
    longest, ids = segments.max_len, segments.ids
    at = segments.cu_seqlens[:-1, None] + torch.arange(longest, device=q.device)
    at = at.clamp(max=segments.total - 1).flatten()
    q, k, v = (x[0].index_select(0, at).unflatten(0, (len(segments), longest)) for x in (q, k, v))
    back = ids * longest + segments.positions
    o, lse = _rows(q, k, v, window, scale, cache, want_lse)
    return o.flatten(0, 1)[back][None], None if lse is None else lse.flatten(0, 1)[back][None]


def _masked(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, first: Tensor | None, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Queries ``[R, T, H, K]`` are the last ``T`` of the ``L`` positions of ``k, v``; query t of row r sees no key
    before ``first[r, t]`` (``[R or 1, T or 1]``, None for 0) nor before the window."""
    length, keys = q.shape[1], k.shape[1]
    held = keys - length
    block = 32 if window is not None and window <= 32 else 64  # fastest of 32..256 on a CPU for windows of 64 to 256
    if window is not None and length > block and held + length > window:
        return _blocked(q, k, v, window, scale, first, want_lse, block)
    at = torch.arange(keys, device=q.device)
    own = at[held:, None]
    visible = at <= own
    if window is not None:
        visible = visible & (at > own - window)
    visible = visible[None]
    if first is not None:
        visible = visible & (at >= first[..., None])
    return _softmax(q, k, v, visible, scale, want_lse)


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    first: Tensor | None,
    want_lse: bool,
    block: int,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries, each against the ``block + window - 1`` keys it can reach."""
    rows, length = q.shape[:2]
    held = k.shape[1] - length
    count = (length + block - 1) // block
    filling, reach = count * block - length, block + window - 1
    missing = window - 1 - held  # keys to put in front, so that block b begins at key b * block

    def slices(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, missing, filling))
        return x.unfold(1, reach, block).permute(0, 1, 4, 2, 3).flatten(0, 1)

    own = torch.arange(block, device=q.device)[:, None]
    at = torch.arange(reach, device=q.device)
    near = (at >= own) & (at < own + window)
    start = torch.arange(count, device=q.device)[:, None, None] * block
    if first is None:
        begin: Tensor | int = missing
    elif first.shape[1] == 1:
        begin = (first + missing)[..., None, None]
    else:  # a filled-up query still sees itself: no row of the softmax is empty
        begin = F.pad(first + missing, (0, filling)).unflatten(1, (count, block))[..., None]
    visible = near & (start + at >= begin)
    if visible.dim() == 3:
        visible = visible[None]
    visible = visible.expand(rows, -1, -1, -1).flatten(0, 1)
    q = F.pad(q, (0, 0, 0, 0, 0, filling)).unflatten(1, (count, block)).flatten(0, 1)
    o, lse = _softmax(q, slices(k), slices(v), visible, scale, want_lse)

    def joined(x: Tensor) -> Tensor:
        return x.unflatten(0, (rows, count)).flatten(1, 2)[:, :length]

    return joined(o), None if lse is None else joined(lse)


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``q [R, C, H, K]``, ``k, v [R, L, Hkv, ...]``, ``visible [R or 1, C, L]``; every query sees at least one key."""
    queries, heads = k.shape[2], q.shape[2]
    group = heads // queries
    # Heads that share keys become further queries of one head: the keys are never repeated.
    q = q.unflatten(2, (queries, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    visible = visible.repeat(1, group, 1)[:, None] if group > 1 else visible[:, None]
    lse = None
    if want_lse:
        # PyTorch's fused kernels keep the log-sum-exp to themselves on a CPU.
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale
        scores = scores.masked_fill(~visible, -torch.inf)
        # Not exp(scores - lse): that weighs a lone key by 1 + rounding, and large values show it in the gradient.
        o = (scores.softmax(-1) @ v.to(dtype)).to(v.dtype)
        lse = scores.logsumexp(-1).unflatten(2, (group, -1)).permute(0, 3, 1, 2).flatten(2)
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return o.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3), lse
