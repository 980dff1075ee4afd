"""Launching the kernels of the M2RNN."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .kernels_m2rnn import m2rnn_backward_kernel, m2rnn_forward_kernel
from .launch import numerics
from .m2rnn import KEEP, kept_states


def launch_settings(K: int, V: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of a state and the warps that share it: alone, a warp waits for nobody. In fp32 there are no matrix
    units, and a product is written out: so many warps that its share of one stays short."""
    BK, BV = (max(16, triton.next_power_of_2(n)) for n in (K, V))
    warps = 1 if BK * BV <= 1024 else 4
    if dtype == torch.float32:
        warps = min(16, max(warps, BK * BV * BV // (32 * 1024)))
    return {"BK": BK, "BV": BV, "KEEP": KEEP, "num_warps": warps, "num_stages": 1}


def _call(q: Tensor, v: Tensor, cu_host: Tensor | None) -> tuple[int, Tensor | None, Tensor | None, dict[str, Any]]:
    settings = launch_settings(q.shape[3], v.shape[3], q.dtype) | numerics(q) | {"PACKED": cu_host is not None}
    if cu_host is None:
        return q.shape[0], None, None, settings
    counts = -(-cu_host.diff() // KEEP)
    return len(counts), cu_host.to(q.device), (counts.cumsum(0) - counts).int().to(q.device), settings


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, W: Tensor, S: Tensor, cu_host: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Reading, final state and, in training, the states the backward pass starts from."""
    q, k, v, g, W, S = (x.contiguous() for x in (q, k, v, g, W, S))
    (B, T, H, V), (HQ, K) = v.shape, q.shape[2:]
    rows, cu, pieces, settings = _call(q, v, cu_host)
    y, last = torch.empty_like(v), torch.empty_like(S)
    kept = S.new_empty(kept_states(B, T, cu_host) if training else 0, H, K, V)
    m2rnn_forward_kernel[(rows * H,)](
        q, k, v, g, W, S, y, kept, last, cu, pieces, T, H, HQ, K, V, SAVE=training, **settings
    )  # fmt: skip
    return y, last, kept


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
    rows, cu, pieces, settings = _call(q, v, cu_host)
    dq, dk, dv = v.new_empty(B, T, H, K), v.new_empty(B, T, H, K), torch.empty_like(v)
    dg, dW, dS0 = dS.new_empty(B, T, H), dS.new_empty(rows, *W.shape), torch.empty_like(dS)
    scratch = v.new_empty(rows * H, KEEP, settings["BK"], settings["BV"])
    m2rnn_backward_kernel[(rows * H,)](
        q, k, v, g, W, kept, dy, dS, scratch, dq, dk, dv, dg, dW, dS0, cu, pieces,
        float("inf") if clip is None else clip, T, H, HQ, K, V, CLIP=clip is not None, **settings,
    )  # fmt: skip
    if HQ != H:
        dq, dk = (x.unflatten(2, (HQ, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg.to(g.dtype), dW.sum(0).to(W.dtype), dS0
