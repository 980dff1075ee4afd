"""The states of the scan engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ScanState", "SoftmaxScanState"]


class ScanState(NamedTuple):
    """``h`` in fp32 (float64 for float64 inputs), one row a sequence: ``[N, D]``, pairs ``[N, D, 2]`` of a complex or
    2x2-block scan, ``[N, D, S]`` of a selective scan with S channels a feature."""

    h: Tensor


class SoftmaxScanState(NamedTuple):
    """A running softmax average in fp32, one row a sequence: ``w / u`` with ``u = sum_i exp(s_i - m)`` and
    ``w = sum_i exp(s_i - m) v_i``. Only ``exp(m) u`` and ``exp(m) w`` mean anything, so no gradient goes through ``m``.

    Attributes:
        m: largest score so far ``[N, H]``, -inf before the first token.
        u: ``[N, H]``, 0 before the first token.
        w: ``[N, H, V]``.
    """

    m: Tensor
    u: Tensor
    w: Tensor
