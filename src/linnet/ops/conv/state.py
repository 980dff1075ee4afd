"""The state of the short convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ConvState"]


class ConvState(NamedTuple):
    """The last ``W - 1`` inputs of each row, oldest first (zeros before the first token).

    Attributes:
        tail: ``[N, W - 1, D]``, fp32 (float64 for float64 inputs).
    """

    tail: Tensor
