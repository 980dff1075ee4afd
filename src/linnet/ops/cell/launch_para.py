"""Launching the kernels of the ParaGRU and ParaLSTM."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .kernels_para import para_backward_kernel, para_forward_kernel
from .launch import numerics
from .state import before

SETTINGS = {"BD": 64, "num_warps": 1, "num_stages": 1}  # two channels a thread: the least that loads in advance


def _call(x: Tensor, C: Tensor | None, cu_host: Tensor | None) -> tuple[tuple[int, ...], Tensor | None, dict[str, Any]]:
    rows = x.shape[0] if cu_host is None else len(cu_host) - 1
    how = numerics(x)
    flags = {"LSTM": C is not None, "PACKED": cu_host is not None, "EXACT": how["EXACT"], "FAST": how["FAST"]}
    grid = (triton.cdiv(x.shape[3], SETTINGS["BD"]), rows)
    return grid, None if cu_host is None else cu_host.to(x.device), flags | SETTINGS


def forward(x: Tensor, A: Tensor, C: Tensor | None, s: Tensor, cu_host: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``h`` of every token, the states after the last ones, the states after every token."""
    x, A, C, s = x.contiguous(), A.contiguous(), None if C is None else C.contiguous(), s.contiguous()
    grid, cu, flags = _call(x, C, cu_host)
    y, states = x.new_empty(*x.shape[:2], x.shape[3]), s.new_empty(*x.shape[:2], *s.shape[1:])
    last = torch.empty_like(s)
    para_forward_kernel[grid](x, A, C, s, y, states, last, cu, x.shape[1], x.shape[3], **flags)
    return y, last, states


def backward(
    x: Tensor,
    A: Tensor,
    C: Tensor | None,
    s: Tensor,
    cu_host: Tensor | None,
    states: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, C (empty without) and the initial states."""
    x, A, dy, dlast = x.contiguous(), A.contiguous(), dy.contiguous(), dlast.contiguous()
    C = None if C is None else C.contiguous()
    grid, cu, flags = _call(x, C, cu_host)
    dx, ds = torch.empty_like(x), torch.empty_like(dlast)
    sums = s.new_empty(grid[1], 5, x.shape[3])
    past = before(states, s, cu_host).contiguous()
    para_backward_kernel[grid](x, A, C, past, dy, dlast, dx, sums, ds, cu, x.shape[1], x.shape[3], **flags)
    total = sums.sum(0)
    return dx, total[:3].clone(), s.new_empty(0) if C is None else total[3:].clone(), ds
