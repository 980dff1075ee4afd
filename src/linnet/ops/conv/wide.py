"""Long causal depthwise convolution by FFT, in which no output depends on a later input, not even by a rounding error.

One FFT over the whole sequence costs least and mixes the rounding errors of all tokens, so that a large input changes
outputs long before it. Here the sequence is halved again and again: the right half of each block of 2s tokens reads
its left half through an FFT of that size, at every s, and blocks of 64 tokens read themselves directly. From the size
on that the kernel fits into, each block reads only the one before it. That makes about log2(W / 64) FFTs in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv_wide", "toeplitz"]

_BLOCK = 64


def conv_wide(x: Tensor, kernel: Tensor) -> Tensor:
    """``y_t = sum_j kernel[:, j] x_{t-j}`` over the tokens there are; ``x [B, T, D]``, ``kernel [D, W]``, fp32 or more.

    Source of the halving: relaxed multiplication (van der Hoeven 2002), as for convolution layers in Flash Inference
    (arXiv 2410.12982).
    """
    length, taps = x.shape[1], kernel.shape[1]
    total = _BLOCK
    while total < length:
        total *= 2
    x = F.pad(x, (0, 0, 0, total - length)).permute(2, 0, 1)  # [D, B, total]
    first = F.pad(kernel[:, :_BLOCK], (0, max(_BLOCK - taps, 0)))
    y = (x.unflatten(-1, (-1, _BLOCK)).flatten(1, 2) @ toeplitz(first).transpose(1, 2)).view(x.shape)
    size = _BLOCK
    while size < total:
        blocks = x.unflatten(-1, (-1, size))  # [D, B, blocks, size]
        enough = taps <= size + 1
        left = blocks[:, :, :-1] if enough else blocks[:, :, ::2]
        spectrum = torch.fft.rfft(kernel[:, : 2 * size], n=2 * size)
        read = torch.fft.irfft(torch.fft.rfft(left, n=2 * size) * spectrum[:, None, None], n=2 * size)[..., size:]
        if enough:
            y = y + F.pad(read, (0, 0, 1, 0)).flatten(-2)
            break
        y = y + F.pad(read, (size, 0)).flatten(-2)
        size *= 2
    return y[..., :length].permute(1, 2, 0)


def toeplitz(kernel: Tensor) -> Tensor:
    """``[..., C] -> [..., C, C]`` with ``kernel[i - j]`` at ``(i, j)`` and zeros above the diagonal."""
    size = kernel.shape[-1]
    return F.pad(kernel, (size - 1, 0)).unfold(-1, size, 1).flip(-1)
