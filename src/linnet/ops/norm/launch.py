"""Launching the kernels of the gated norm."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..core.compiling import Kernel
from ..core.tiles import multiprocessors
from . import kernels
from .chunked import SMALL

__all__ = ["backward", "forward"]

forward_kernel, backward_kernel = Kernel(kernels.forward_kernel), Kernel(kernels.backward_kernel)
SIDE = 64  # warps of the backward pass for a multiprocessor: more than it holds, so that no long one is left at the end


def launch_settings(W: int) -> dict[str, int]:
    """Tokens R of a program, whose threads have eight neighbouring channels each, four warps where heads are small."""
    BW = triton.next_power_of_2(W)
    R = max(1, 1024 // BW)
    return {"R": R, "BW": BW, "num_warps": R * BW // 256}


def _rows(x: Tensor | None) -> Tensor | None:
    """Tokens at one distance of each other, whose channels are neighbours."""
    if x is None:
        return None
    B, T, _ = x.stride()
    return x if x.stride(2) == 1 and (x.shape[0] == 1 or T * x.shape[1] == B) else x.contiguous()


def _arguments(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    skip: Tensor | None,
    groups: int,
    norm_first: bool,
    activation: str,
    center: bool,
    eps: float,
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """What both kernels take: tensors as they read them, numbers, and the mode."""
    B, T, D = gate.shape
    rows = [_rows(x) for x in (y, gate, v)]
    weight, bias, skip = (None if p is None else p.contiguous() for p in (weight, bias, skip))
    strides = [0 if x is None else x.stride(1) for x in rows]
    shared = {len(p) for p in (weight, bias) if p is not None} <= {D // groups}
    mode = {"NORM_FIRST": norm_first, "ACTIVATION": activation, "CENTER": center, "SHARED": shared}
    numbers = [*strides, SMALL, eps * SMALL**2, B * T, groups, D // groups]
    return [rows[0], rows[1], weight, bias, rows[2], skip], numbers, mode


def forward(y: Tensor, gate: Tensor, *others: Any) -> Tensor:
    """The gated norm ``[B, T, D]`` in the gate's dtype; arguments as of :func:`linnet.ops.gated_norm`, in the order of
    :func:`_arguments`."""
    tensors, numbers, mode = _arguments(y, gate, *others)
    *_, tokens, groups, W = numbers
    settings, out = launch_settings(W), gate.new_empty(gate.shape)
    forward_kernel[(triton.cdiv(tokens, settings["R"]) * groups,)](*tensors, out, *numbers, **mode, **settings)
    return out


def backward(y: Tensor, gate: Tensor, *others: Any) -> list[Tensor | None]:
    """Gradients of y, gate, weight, bias, v and skip, None of what is None; arguments as of :func:`forward`, then the
    output's gradient."""
    *others, dout = others  # type: ignore[assignment]
    tensors, numbers, mode = _arguments(y, gate, *others)
    *_, tokens, groups, W = numbers
    settings = launch_settings(W)
    fill = multiprocessors(gate.device, 1) * SIDE // (settings["num_warps"] * groups)
    side = max(1, min(fill, triton.cdiv(tokens, settings["R"])))
    dy, dgate, dv = (None if x is None else x.new_empty(x.shape) for x in (y, gate, tensors[4]))
    sums = [None if p is None else p.new_empty(side * groups, W, dtype=torch.float32) for p in (tensors[2], tensors[3])]
    sums.append(None if tensors[5] is None else gate.new_empty(side * groups, W, dtype=torch.float32))
    backward_kernel[(side * groups,)](*tensors, dout.contiguous(), dy, dgate, dv, *sums, *numbers, **mode, **settings)
    dweight, dbias, dskip = (
        None if p is None else part.view(-1, len(p)).sum(0).to(p.dtype)
        for p, part in zip((tensors[2], tensors[3], tensors[5]), sums, strict=True)
    )
    return [dy, dgate, dweight, dbias, dv, dskip]
