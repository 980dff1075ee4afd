"""Launching the kernels of the M2RNN."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..core import uploaded
from .kernels_m2rnn import m2rnn_backward_kernel, m2rnn_forward_kernel
from .launch import numerics
from .m2rnn import KEEP, kept_states

NARROW = 128  # columns up to which a program has room for the weights, their transpose and their gradient at once
STRIP = 64  # beyond, rows of that gradient at a time


def turned(K: int, V: int, dtype: torch.dtype, packed: bool) -> bool:
    """Whether the forward kernel has its states transposed. From 64 columns on that is faster in 16 bits; these are the
    cases in which a GPU has so far computed it right."""
    return dtype == torch.bfloat16 and V in (64, 128) and K % 32 == 0 and not packed


def launch_settings(K: int, V: int, dtype: torch.dtype, backward: bool, transposed: bool = False) -> dict[str, int]:
    """Rows of a program and the warps that share them; a program has all columns. Measured on Hopper: few rows where
    columns are many, but in the backward pass, which has more to do for each program, no fewer than 64 or 32. In fp32
    there are no matrix units, and a product is written out: so many warps that its share of one stays short. Keys are
    loaded a token before where that was faster."""
    BV = max(16, triton.next_power_of_2(V))
    if transposed:
        return {"BK": 32, "BV": BV, "KEEP": KEEP, "AHEAD": 1, "EARLY": True, "num_warps": 4, "num_stages": 1}
    if V > NARROW:
        warps = 8 if backward else 16
        return {"BK": 32, "BV": BV, "KEEP": KEEP, "AHEAD": 1, "EARLY": False, "num_warps": warps, "num_stages": 1}
    widest = 64 if backward else 32  # columns that 64 rows go with
    BK = min(64 if widest >= BV else 32, max(16, triton.next_power_of_2(K)))
    warps = 1 if BK * BV <= 1024 else 8 if backward and BV > 64 else 4
    if dtype == torch.float32:
        BK = min(BK, max(16, (256 << 10) // BV**2))
        warps = min(16, max(warps, BK * BV**2 // (32 << 10 if BV <= 64 else 16 << 10)))
    early = backward or warps > 1
    return {"BK": BK, "BV": BV, "KEEP": KEEP, "AHEAD": 3, "EARLY": early, "num_warps": warps, "num_stages": 1}


def _call(
    q: Tensor, v: Tensor, cu_host: Tensor | None, backward: bool
) -> tuple[int, Tensor | None, Tensor | None, dict[str, Any]]:
    sizes, packed = (q.shape[3], v.shape[3], q.dtype), cu_host is not None
    transposed = not backward and turned(*sizes, packed)
    settings = launch_settings(*sizes, backward, transposed) | numerics(q) | {"PACKED": packed}
    if not backward:
        settings["TURNED"] = transposed
    if cu_host is None:
        return q.shape[0], None, None, settings
    counts = -(-cu_host.diff() // KEEP)
    return len(counts), uploaded(cu_host, q.device), uploaded(counts.cumsum(0) - counts, q.device), settings


def _partial(like: Tensor, parts: int) -> Tensor:
    """Room for what the programs of a state add up to, in fp32 if that is a sum."""
    return torch.empty_like(like)[None] if parts == 1 else like.new_empty(parts, *like.shape, dtype=torch.float32)


def _total(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, W: Tensor, S: Tensor, cu_host: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Reading, final state and, in training, the states the backward pass starts from."""
    q, k, v, g, W, S = (x.contiguous() for x in (q, k, v, g, W, S))
    (B, T, H, V), (HQ, K) = v.shape, q.shape[2:]
    rows, cu, pieces, settings = _call(q, v, cu_host, False)
    parts = triton.cdiv(K, settings["BK"])
    y, last = _partial(v, parts), torch.empty_like(S)
    kept = S.new_empty(kept_states(B, T, cu_host) if training else 0, H, K, V)
    m2rnn_forward_kernel[(rows * H * parts,)](
        q, k, v, g, W, S, y, kept, last, cu, pieces, B * T, T, H, HQ, K, V, SAVE=training, **settings
    )  # fmt: skip
    return _total(y, v.dtype), last, kept


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    W: Tensor,
    cu_host: Tensor | None,
    clip: float | None,
    kept: Tensor,
    dy: Tensor,
    dS: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, W and the initial state."""
    q, k, v, g, W, dy, dS = (x.contiguous() for x in (q, k, v, g, W, dy, dS))
    (B, T, H, V), (HQ, K) = v.shape, q.shape[2:]
    rows, cu, pieces, settings = _call(q, v, cu_host, True)
    parts = triton.cdiv(K, settings["BK"])
    dq, dk, dv = v.new_empty(B, T, H, K), v.new_empty(B, T, H, K), _partial(v, parts)
    dg, dW, dS0 = dS.new_empty(parts, B, T, H), dS.new_empty(parts, rows, *W.shape), torch.empty_like(dS)
    wide = V > NARROW
    scratch = v.new_empty(rows * H * parts, KEEP, settings["BK"], settings["BV"])
    inside = torch.empty_like(scratch, dtype=torch.float32) if wide else None
    dX = torch.empty_like(scratch) if wide else None
    m2rnn_backward_kernel[(rows * H * parts,)](
        q, k, v, g, W, kept, dy, dS, scratch, inside, dX, dq, dk, dv, dg, dW, dS0, cu, pieces,
        float("inf") if clip is None else clip, B * T, rows, T, H, HQ, K, V, STRIP=STRIP,
        CLIP=clip is not None, WIDE=wide, **settings,
    )  # fmt: skip
    if HQ != H:
        dq, dk = (x.unflatten(2, (HQ, -1)).sum(3) for x in (dq, dk))
    return dq, dk, _total(dv, v.dtype), _total(dg, g.dtype), dW.sum((0, 1)).to(W.dtype), dS0
