"""Launching the kernels of the short convolution."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core import following
from ..core.compiling import Kernel, compile_together, compiling
from . import kernels

__all__ = ["backward", "forward", "step"]

forward_kernel, backward_kernel = Kernel(kernels.forward_kernel), Kernel(kernels.backward_kernel)
sum_kernel = Kernel(kernels.sum_kernel)


def tile(W: int, D: int, device: torch.device, *, grad: bool) -> dict[str, int]:
    """Channels BD of a program, a warp, and tokens U on their way at a time. A thread has four neighbouring channels,
    of wide kernels two: their inputs, sums and taps fill its registers."""
    if device.type == "cpu":  # the interpreter: tiles that a short sequence fills more than once
        return {"BD": 4, "U": 2, "num_warps": 1}
    most = 64 if W > 4 else 128
    return {"BD": min(most, max(32, 1 << (D - 1).bit_length())), "U": 2 if grad else 4, "num_warps": 1}


def length(tokens: int, columns: int, device: torch.device, *, grad: bool) -> int:
    """Tokens of a run, where there are so many in all and so many programs side by side: long runs read fewer twice,
    short ones are more. Of no consequence for what is compiled. Measured on an H100 with 4 taps: forward it is better
    to have many programs; backward, where runs also write what they add to the taps, long runs matter more."""
    if device.type == "cpu":
        return 4
    longest, programs = (256, 1024) if grad else (64, 8192)
    run = 16
    while run < longest and tokens * columns >= 2 * run * programs:
        run *= 2
    return run


def _rows(x: Tensor) -> Tensor:
    """Tokens whose channels are neighbours; the tokens may lie apart."""
    return x if x.stride(2) == 1 else x.contiguous()


def _aligned(x: Tensor, *others: Tensor) -> int:
    """What channels and strides are multiples of: Triton itself notices only 16."""
    return math.gcd(16, x.shape[2], *(n for y in (x, *others) for n in y.stride()[:2]))


def _dense(*given: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in given]


def _shares(x: Tensor, W: int, grad: bool) -> tuple[dict[str, int], int, tuple[int, ...]]:
    """Settings, blocks of channels, and the sizes that kernels take: tokens, those of a run, runs of a row and of all,
    channels."""
    B, T, D = x.shape
    sizes = tile(W, D, x.device, grad=grad)
    blocks = -(-D // sizes["BD"])
    L = length(B * T, blocks, x.device, grad=grad)
    runs = -(-T // L)
    return sizes, blocks, (T, L, runs, B * runs, D)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu: Tensor | None,
    ids: Tensor | None,
    silu: bool,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and the state after the last tokens. ``ids`` are the sequences of packed tokens, ``cu`` their bounds."""
    x, (weight, bias, tail) = _rows(x), _dense(weight, bias, tail)
    D, W = weight.shape
    if training and x.is_cuda and not compiling():
        _compile(x.device, x.dtype, D, W, bias is not None, tail is not None, ids is not None, silu)
    rows = x.shape[0] if cu is None else cu.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = torch.empty(rows, W - 1, D, dtype=torch.float32, device=x.device)
    sizes, blocks, shape = _shares(x, W, False)
    forward_kernel[((shape[3] + rows) * blocks,)](
        x, weight, bias, tail, y, after, cu, ids, *shape, x.stride(0), x.stride(1),
        W=W, ALIGNED=_aligned(x), SILU=silu, PACKED=ids is not None, **sizes,
    )  # fmt: skip
    return y, after


@cache
def _compile(
    device: torch.device, dtype: torch.dtype, D: int, W: int, biased: bool, started: bool, packed: bool, silu: bool
) -> None:
    """Compile the kernels of a call and of its backward pass together."""
    x, weight = torch.empty(1, 1, D, dtype=dtype, device=device), torch.empty(D, W, dtype=dtype, device=device)
    bias = weight[:, 0].contiguous() if biased else None
    tail = torch.empty(1, W - 1, D, device=device) if started else None
    cu, ids = (torch.empty(n, dtype=torch.int32, device=device) if packed else None for n in (2, 1))

    def call() -> None:
        y, _ = forward(x, weight, bias, tail, cu, ids, silu)
        backward(x, weight, bias, tail, cu, ids, silu, y, None, True, False)

    compile_together(call)


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu: Tensor | None,
    ids: Tensor | None,
    silu: bool,
    dy: Tensor,
    dafter: Tensor | None,
    taps: bool,
    before: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of weight and bias (with ``taps``) and of the tail (with ``before``)."""
    x, dy, (weight, bias, tail, dafter) = _rows(x), _rows(dy), _dense(weight, bias, tail, dafter)
    D, W = weight.shape
    sizes, blocks, shape = _shares(x, W, True)
    rows = (x.shape[0] if cu is None else cu.shape[0] - 1) if before else 0
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    part = torch.empty(shape[3], W + 1, D, **new) if taps else None
    dtail = torch.empty(rows, W - 1, D, **new) if before else None
    backward_kernel[((shape[3] + rows) * blocks,)](
        x, weight, bias, tail, dy, dafter, dx, part, dtail, cu, ids, *shape,
        x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
        W=W, ALIGNED=_aligned(x, dy), SILU=silu, PACKED=ids is not None, **sizes,
    )  # fmt: skip
    if part is None:
        return dx, None, None, dtail
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    BD, BU = (4, 2) if x.device.type == "cpu" else (32, 32)
    sum_kernel[(-(-D // BD), W + 1)](part, dweight, dbias, shape[3], D, W=W, BD=BD, BU=BU, num_warps=4)
    return dx, dweight, dbias, dtail


def step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """One token for every row, without gradients: output and the new state."""
    x, (weight, bias, tail) = _rows(x), _dense(weight, bias, tail)
    B, D, W = x.shape[0], *weight.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = following(tail)
    BD = 4 if x.device.type == "cpu" else 128
    kernels.step_kernel[(B * -(-D // BD),)](
        x, weight, bias, tail, y, after, D, x.stride(0), W=W, BD=BD, SILU=silu, num_warps=1
    )
    return y, after
