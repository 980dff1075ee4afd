"""Launching the kernels of the M2RNN."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..core import uploaded
from ..core.tiles import multiprocessors
from .kernels_m2rnn import m2rnn_backward_kernel, m2rnn_backward_turned_kernel, m2rnn_forward_kernel
from .launch import numerics
from .m2rnn import KEEP, kept_states

NARROW = 128  # columns up to which a program has room for the weights, their transpose and their gradient at once
STRIP = 64  # beyond, rows of that gradient at a time


def turned(K: int, V: int, dtype: torch.dtype, packed: bool, backward: bool) -> bool:
    """Whether a kernel has its states transposed. From 64 columns on that is faster in 16 bits, in the backward pass
    at 128; these are the cases in which a GPU has so far computed it right."""
    columns, rows = ((128,), 128) if backward else ((64, 128), 32)
    return dtype == torch.bfloat16 and V in columns and K % rows == 0 and not packed


def stretches(units: int, at_once: int) -> int:
    """Into how many launches a backward pass of ``units`` programs, ``at_once`` of which run at a time, cuts its
    sequences: two or four where the last programs to run would else leave a good part of the GPU idle."""

    def rounds(cuts: int) -> float:
        return -(-units * cuts // at_once) / cuts

    return min((1, 2, 4), key=rounds) if units > at_once and rounds(1) > 1.1 * units / at_once else 1


def _residents(settings: dict[str, Any]) -> int:
    """Programs that a multiprocessor has registers for."""
    return max(1, (64 << 10) // (settings.get("maxnreg", 256) * 32 * settings["num_warps"]))


def launch_settings(K: int, V: int, dtype: torch.dtype, backward: bool, transposed: bool) -> dict[str, int]:
    """Rows of a program and the warps that share them; a program has all columns. Measured on Hopper: few rows where
    columns are many, but in the backward pass, which has more to do for each program, no fewer than 64 or 32. In fp32
    there are no matrix units, and a product is written out: so many warps that its share of one stays short. Keys are
    loaded a token before where that was faster."""
    BV = max(16, triton.next_power_of_2(V))
    if transposed and backward:
        return {"BK": 64, "BV": BV, "KEEP": KEEP, "num_warps": 8, "num_stages": 1}
    if transposed:  # no more registers than leave room for three programs
        few = {"maxnreg": 168} if BV == 128 else {}
        return {"BK": 32, "BV": BV, "KEEP": KEEP, "AHEAD": 1, "EARLY": True, "num_warps": 4, "num_stages": 1} | few
    if V > NARROW:
        warps = 8 if backward else 16
        return {"BK": 32, "BV": BV, "KEEP": KEEP, "AHEAD": 1, "EARLY": False, "num_warps": warps, "num_stages": 1}
    widest = 64 if backward else 32  # columns that 64 rows go with
    few = backward and BV == 16 and dtype != torch.float32  # of 64 rows one warp would be alone on its scheduler
    BK = min(64 if widest >= BV and not few else 32, max(16, triton.next_power_of_2(K)))
    warps = 1 if BK * BV <= 1024 else 8 if backward and BV > 64 else 4
    if dtype == torch.float32:
        BK = min(BK, max(16, (256 << 10) // BV**2))
        warps = min(16, max(warps, BK * BV**2 // (32 << 10 if BV <= 64 else 16 << 10)))
    early = backward or warps > 1
    return {"BK": BK, "BV": BV, "KEEP": KEEP, "AHEAD": 3, "EARLY": early, "num_warps": warps, "num_stages": 1}


def _call(
    q: Tensor, v: Tensor, cu_host: Tensor | None, backward: bool, transposed: bool
) -> tuple[int, Tensor | None, Tensor | None, dict[str, Any]]:
    sizes, packed = (q.shape[3], v.shape[3], q.dtype), cu_host is not None
    settings = launch_settings(*sizes, backward, transposed) | numerics(q) | {"PACKED": packed}
    if not backward:
        settings["TURNED"] = transposed
    if not settings["FAST"]:
        settings.pop("maxnreg", None)  # NVIDIA's alone
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
    transposed = turned(K, V, q.dtype, cu_host is not None, False)
    rows, cu, pieces, settings = _call(q, v, cu_host, False, transposed)
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
    transposed = turned(K, V, q.dtype, cu_host is not None, True)
    rows, cu, pieces, settings = _call(q, v, cu_host, True, transposed)
    parts = triton.cdiv(K, settings["BK"])
    units, wide = rows * H * parts, V > NARROW
    dq, dk, dv = v.new_empty(B, T, H, K), v.new_empty(B, T, H, K), _partial(v, parts)
    dg, dS = dS.new_empty(parts, B, T, H), dS.clone()
    slots = multiprocessors(q.device, 1) * _residents(settings)
    cuts = stretches(units, slots) if transposed else 1
    at_once = units if cuts == 1 else slots
    dW = dS.new_empty(cuts * parts, rows, *W.shape)
    scratch = v.new_empty(at_once, KEEP, settings["BK"], settings["BV"])
    flags = settings | {"CLIP": clip is not None}
    bound, shape = float("inf") if clip is None else clip, (B * T, rows, T, H, HQ, K, V)
    if transposed:
        sums = dS.new_empty(at_once, KEEP, settings["BV"])
        for begin in range(0, cuts * units, at_once):
            m2rnn_backward_turned_kernel[(min(at_once, cuts * units - begin),)](
                q, k, v, g, W, kept, dy, scratch, sums, dq, dk, dv, dg, dW, dS, cu, pieces,
                bound, begin, *shape, STRETCHES=cuts, **flags,
            )  # fmt: skip
    else:
        inside = torch.empty_like(scratch, dtype=torch.float32) if wide else None
        dX = torch.empty_like(scratch) if wide else None
        m2rnn_backward_kernel[(units,)](
            q, k, v, g, W, kept, dy, scratch, inside, dX, dq, dk, dv, dg, dW, dS, cu, pieces,
            bound, *shape, STRIP=STRIP, WIDE=wide, **flags,
        )  # fmt: skip
    if HQ != H:
        dq, dk = (x.unflatten(2, (HQ, -1)).sum(3) for x in (dq, dk))
    return dq, dk, _total(dv, v.dtype), _total(dg, g.dtype), dW.sum((0, 1)).to(W.dtype), dS
