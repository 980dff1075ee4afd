"""The FlexAttention route: one compiled kernel for windows, segments, caches and the log-sum-exp on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

try:
    from torch.nn.attention.flex_attention import AuxRequest
except ImportError:  # before torch 2.9
    AuxRequest = None

from ..core import Segments
from ..core.registry import has_triton
from .state import AttentionState

__all__ = ["flex_attend", "flex_usable"]

BLOCK = 128


def flex_usable(q: Tensor, v: Tensor) -> bool:
    """Whether FlexAttention can and should run: a GPU with Triton, heads its tiles can hold, and at least a block of
    queries (a few queries on a long cache are faster with a dense mask)."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.shape[1] >= BLOCK
        and min(q.shape[3], v.shape[3]) >= 16
        and max(q.shape[3], v.shape[3]) <= 256
        and has_triton()
    )


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_call)


def _call(
    q: Tensor, k: Tensor, v: Tensor, lowest: Tensor, highest: Tensor, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    mask = block_mask(lowest, highest, k.shape[2])
    grouped = q.shape[1] != k.shape[1]
    if not want_lse:
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped), None
    if AuxRequest is None:
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_lse=True)
    o, aux = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return o, aux.lse


def flex_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    cache: AttentionState | None,
    segments: Segments | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in :func:`linnet.ops.attention`; returns ``(o, lse or None)``."""
    k, v, lowest, highest = key_ranges(k, v, cache, segments)
    if window is not None:
        lowest = torch.maximum(lowest, highest - (window - 1))
    call = _call if torch.compiler.is_compiling() else _compiled()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = call(q, k, v, lowest, highest, scale, want_lse)
    return o.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


def key_ranges(
    k: Tensor, v: Tensor, cache: AttentionState | None, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values with the cache put in, and the first and last key that each query sees (int32 ``[B, T]``).

    Packed rows get each segment's cache in front of its tokens, so that ranges stay contiguous.
    """
    length = k.shape[1]
    at = torch.arange(length, device=k.device)
    held = 0 if cache is None else cache.k.shape[1]
    if segments is None:
        if cache is None:
            lowest = torch.zeros_like(at)
        else:
            k, v = torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1)
            lowest = (held - cache.length).clamp(min=0)[:, None]
        highest = at + held
    else:
        starts, ids = segments.cu_seqlens[:-1].long(), segments.ids.long()
        lowest = starts.index_select(0, ids)
        highest = at + (ids + 1) * held
        if cache is not None:
            slots = torch.arange(len(segments), device=k.device) * held + starts
            placed = torch.cat([(slots[:, None] + torch.arange(held, device=k.device)).flatten(), highest])
            source = torch.empty_like(placed).scatter_(0, placed, torch.arange(placed.shape[0], device=k.device))
            k = torch.cat([cache.k.flatten(0, 1), k[0]]).index_select(0, source)[None]
            v = torch.cat([cache.v.flatten(0, 1), v[0]]).index_select(0, source)[None]
            lowest = lowest + ids * held + (held - cache.length).clamp(min=0).index_select(0, ids)
    shape = (k.shape[0], length)
    return k, v, lowest.expand(shape).int().contiguous(), highest.expand(shape).int().contiguous()


def block_mask(lowest: Tensor, highest: Tensor, keys: int) -> BlockMask:
    """The block mask of the ranges ``[lowest, highest]``, both of which never fall along a row, without ever writing
    out the ``[T, keys]`` mask. Blocks inside all ranges of their queries skip the mask altogether."""
    length = lowest.shape[1]
    columns = (keys + BLOCK - 1) // BLOCK
    heads = torch.arange(0, length, BLOCK, device=lowest.device)
    tails = (heads + BLOCK - 1).clamp(max=length - 1)
    begin, end = lowest[:, heads] // BLOCK, highest[:, tails] // BLOCK + 1
    full_begin = ((lowest[:, tails] + BLOCK - 1) // BLOCK).clamp(max=end)
    full_end = torch.maximum((highest[:, heads] + 1) // BLOCK, full_begin)
    order = torch.arange(columns, device=lowest.device)
    before = (full_begin - begin)[..., None]
    partial = torch.where(order < before, begin[..., None] + order, full_end[..., None] + order - before)
    full = full_begin[..., None] + order

    def listed(x: Tensor) -> Tensor:
        return x.clamp(0, columns - 1).int()[:, None].contiguous()

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= lowest[b, q]) & (kv <= highest[b, q])

    return BlockMask.from_kv_blocks(
        (before[..., 0] + end - full_end).int()[:, None],
        listed(partial),
        (full_end - full_begin).int()[:, None],
        listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, keys),
    )
