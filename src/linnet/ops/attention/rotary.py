"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary"]


def rotary(x: Tensor, positions: Tensor, *, base: float = 10000.0) -> Tensor:
    """Rotate each pair ``(x_i, x_{i + K/2})`` of a head by ``position * base^(-2i/K)``, so that the product of a
    rotated query and key depends on their distance only (Su et al. 2021, arXiv 2104.09864; the "rotate half" pairing).

    Args:
        x: ``[B, T, H, K]`` with even ``K``, any floating dtype.
        positions: ``[T]`` or ``[B, T]``, tokens since the start of the sequence.
        base: the slowest pair turns once in about ``2 pi base`` tokens.

    Returns:
        Same shape and dtype as ``x``; angles and rotation are computed in fp32 (float64 for float64).

    Raises:
        ValueError: for another shape, an odd ``K`` or an integer ``x``.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a floating tensor [B, T, H, K] with even K, got {got}")
    if not isinstance(positions, Tensor) or list(positions.shape) not in ([x.shape[1]], list(x.shape[:2])):
        got = f"{list(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"positions: expected shape [T={x.shape[1]}] or {list(x.shape[:2])}, got {got}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = positions.to(dtype)[..., None, None] * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(dtype).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
