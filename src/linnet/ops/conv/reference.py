"""Short causal depthwise convolution, tap by tap: the definition."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Segments

__all__ = ["conv_reference"]


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tail: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_i weight[:, i] x_{t - (W-1) + i}`` with the inputs before a row's start read from its tail.

    Shapes as in :func:`linnet.ops.conv`; returns ``(y [B, T, D], tail [N, W-1, D])``.
    """
    if segments is not None:
        bounds = segments.cu_seqlens_host.tolist()
        parts = [
            conv_reference(x[:, a:b], weight, bias, activation, None if tail is None else tail[n : n + 1], None)
            for n, (a, b) in enumerate(pairwise(bounds))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([end for _, end in parts], 0)
    rows, length, channels = x.shape
    width = weight.shape[1]
    keep = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(rows, width - 1, channels, dtype=keep) if tail is None else tail
    history = torch.cat([before.to(x.dtype), x], 1)
    y = x.new_zeros(rows, length, channels)
    for i in range(width):
        y = y + weight[:, i] * history[:, i : i + length]
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    # Cut from the unrounded tail: tokens that merely wait in the state keep their fp32 value.
    return y, torch.cat([before, x.to(keep)], 1)[:, length:]
