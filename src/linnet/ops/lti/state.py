"""The state of a linear time-invariant system."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LTIState"]


class LTIState(NamedTuple):
    """What a system has kept of its inputs, zeros before the first token.

    Attributes:
        x: ``[N, D, S]`` of a dense system, ``[N, D, P, 2]`` (real and imaginary parts) of a diagonal one; fp32 (float64
            for float64 inputs).
    """

    x: Tensor
