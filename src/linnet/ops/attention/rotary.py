"""Rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["rotary"]

SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotary(
    x: Tensor, positions: Tensor, *, base: float = 10000.0, scaling: Mapping[str, float] | None = None
) -> Tensor:
    """Rotate each pair ``(x_i, x_{i + K/2})`` of a head by ``position * base^(-2i/K)``, so that the product of a
    rotated query and key depends on their distance only (Su et al. 2021, arXiv 2104.09864; the "rotate half" pairing).

    Args:
        x: ``[B, T, H, K]`` with even ``K``, any floating dtype.
        positions: ``[T]`` or ``[B, T]``, tokens since the start of the sequence.
        base: the slowest pair turns once in about ``2 pi base`` tokens.
        scaling: slow down pairs of long wavelengths as Llama 3.1 does to reach further than it was trained ("The Llama
            3 Herd of Models", 2024, arXiv 2407.21783; formula in the published code). With n turns in
            ``original_max_position_embeddings`` tokens, the rate is divided by ``factor`` below ``low_freq_factor``
            turns, is what it was above ``high_freq_factor``, and interpolates in n in between.

    Returns:
        Same shape and dtype as ``x``; angles and rotation are computed in fp32 (float64 for float64).

    Raises:
        ValueError: for another shape, an odd ``K``, an integer ``x``, or a ``scaling`` without these four numbers.
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
    if scaling is not None:
        factor, low, high, length = check_scaling("scaling", scaling)
        kept = ((length / (2 * math.pi) * rates - low) / (high - low)).clamp(0, 1)
        rates = rates * (kept + (1 - kept) / factor)
    angles = positions.to(dtype)[..., None, None] * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(dtype).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def check_scaling(name: str, scaling: Mapping[str, float] | None) -> tuple[float, ...]:
    """The four numbers of a scaling, none for None; ValueError where they are not what they should be."""
    if scaling is None:
        return ()
    values = [scaling.get(key) for key in SCALING] if isinstance(scaling, Mapping) and len(scaling) == 4 else []
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and v > 0]
    if len(numbers) != 4 or numbers[1] >= numbers[2]:
        raise ValueError(
            f"{name}: expected numbers above 0 for {', '.join(SCALING)}, the second below the third, got {scaling!r}"
        )
    return tuple(numbers)
