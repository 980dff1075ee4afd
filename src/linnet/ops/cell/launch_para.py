"""Launching the kernels of the ParaGRU and ParaLSTM."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..core import uploaded
from .kernels_para import (
    para_backward_kernel,
    para_forward_kernel,
    para_tile_backward_kernel,
    para_tile_forward_kernel,
)
from .launch import numerics

SEQUENTIAL = {"BD": 64, "num_warps": 1, "num_stages": 1}  # two channels a thread: the least that loads in advance
SHORT = 16  # tokens up to which one after the other is sooner done
GRU_MANY, LSTM_MANY = 8192, 4096  # channels, of all sequences, with which one after the other is sooner done too
TOLERANCE, STEPS = 1e-5, 12  # of Newton's method: the step after this residual is exact to rounding


def tile_settings(length: int, channels: int) -> dict[str, int]:
    """Tokens and channels of a tile. The fewer channels there are, the fewer a program takes and the more tokens."""
    few = channels <= 1024
    tile = {"BT": 64} if length <= 64 else {"BT": 256 if few else 128}
    return tile | {"BD": 4 if few else 8, "num_warps": 4, "num_stages": 1}


def _call(x: Tensor, C: Tensor | None, cu_host: Tensor | None) -> tuple[tuple[int, ...], Tensor | None, dict[str, Any]]:
    rows, length = (x.shape[0], x.shape[1]) if cu_host is None else (len(cu_host) - 1, int(cu_host.diff().max()))
    how, channels = numerics(x), rows * x.shape[3]
    flags = {"LSTM": C is not None, "PACKED": cu_host is not None, "EXACT": how["EXACT"], "FAST": how["FAST"]}
    many = GRU_MANY if C is None else LSTM_MANY
    settings = SEQUENTIAL if length <= SHORT or channels > many else tile_settings(length, channels)
    grid = (triton.cdiv(x.shape[3], settings["BD"]), rows)
    return grid, None if cu_host is None else uploaded(cu_host, x.device), flags | settings


def forward(x: Tensor, A: Tensor, C: Tensor | None, s: Tensor, cu_host: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``h`` of every token, the states after the last ones, the states after every token."""
    x, A, C, s = x.contiguous(), A.contiguous(), None if C is None else C.contiguous(), s.contiguous()
    grid, cu, flags = _call(x, C, cu_host)
    y, states = x.new_empty(*x.shape[:2], x.shape[3]), s.new_empty(*x.shape[:2], *s.shape[1:])
    last = torch.empty_like(s)
    tensors = x, A, C, s, y, states, last, cu
    if "BT" in flags:
        para_tile_forward_kernel[grid](*tensors, TOLERANCE, STEPS, x.shape[1], x.shape[3], **flags)
    else:
        para_forward_kernel[grid](*tensors, x.shape[1], x.shape[3], **flags)
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
    x, A, s, dy, dlast = (t.contiguous() for t in (x, A, s, dy, dlast))
    C = None if C is None else C.contiguous()
    grid, cu, flags = _call(x, C, cu_host)
    dx, ds = torch.empty_like(x), torch.empty_like(dlast)
    sums = s.new_empty(grid[1], 5, x.shape[3])
    kernel = para_tile_backward_kernel if "BT" in flags else para_backward_kernel
    kernel[grid](x, A, C, s, states, dy, dlast, dx, sums, ds, cu, x.shape[1], x.shape[3], **flags)
    total = sums.sum(0)
    return dx, total[:3].clone(), s.new_empty(0) if C is None else total[3:].clone(), ds
