"""Norms and the gate around them in PyTorch: norms in fp32, a product after one in the gate's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.chunks import accumulate_dtype

__all__ = ["SMALL", "gated_norm_chunked", "normalised", "rms_norm"]

SMALL = 2.0**-20  # makes room: fp32 squares up to 1.8e19, and a memory gives more. A power of two rounds nothing.


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis in fp32, for x up to 2^84."""
    x, eps = x.to(accumulate_dtype(x)) * SMALL, eps * SMALL**2
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # Elsewhere that is made of 1 / sqrt, in whose gradient fp32 has no room for the third power of what is below 2^-42.
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, center: bool, eps: float) -> Tensor:
    """RMSNorm, or with ``center`` LayerNorm, over the last axis of ``[..., H, W]``, in fp32 (float64 of float64);
    weight and bias are ``[W]`` or ``[H * W]``."""
    acc = accumulate_dtype(x)
    weight, bias = (p if p is None else p.to(acc) for p in (weight, bias))
    if center:
        y = F.layer_norm(x.to(acc) * SMALL, x.shape[-1:], eps=eps * SMALL**2)
    elif weight is None or weight.shape[0] == x.shape[-1]:
        y, weight = rms_norm(x, eps, weight), None
    else:
        y = rms_norm(x, eps)
    if weight is not None:
        y = y * _per_head(weight, x)
    return y if bias is None else y + _per_head(bias, x)


def _per_head(p: Tensor, x: Tensor) -> Tensor:
    return p if p.shape[0] == x.shape[-1] else p.unflatten(0, (-1, x.shape[-1]))


def gated_norm_chunked(
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
) -> Tensor:
    """:func:`linnet.ops.gated_norm`, its arguments checked."""

    def norm(x: Tensor) -> Tensor:
        return normalised(x.unflatten(2, (groups, -1)), weight, bias, center, eps).flatten(2)

    def opened(x: Tensor, gate: Tensor) -> Tensor:
        if v is not None and skip is not None:
            x = x + skip.to(x.dtype) * v.to(x.dtype)
        return x * {"silu": F.silu, "sigmoid": torch.sigmoid, "identity": lambda g: g}[activation](gate)

    if norm_first:
        return opened(norm(y).to(gate.dtype), gate)
    acc = accumulate_dtype(gate)
    return norm(opened(y.to(acc), gate.to(acc))).to(gate.dtype)
