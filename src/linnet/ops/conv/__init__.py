"""Short causal depthwise convolution with state."""

from __future__ import annotations

from torch import Tensor

from ..core import Segments
from .reference import conv_reference
from .state import ConvState

__all__ = ["ConvState", "conv"]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: ConvState | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ConvState]:
    """Causal depthwise convolution."""
    y, tail = conv_reference(x, weight, bias, activation, None if state is None else state.tail, segments)
    return y, ConvState(tail)
