"""The states of the decay engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DecayState(NamedTuple):
    """``S`` ``[N, H, K, V]``, and with a normaliser ``z`` ``[N, H, K]`` (else None); fp32, one row a sequence."""

    S: Tensor
    z: Tensor | None = None


class MLSTMState(NamedTuple):
    """Stabilised mLSTM state: the cell's ``C = S exp(m)`` ``[N, H, K, V]`` and normaliser ``n = z exp(m)``
    ``[N, H, K]``, with the log-scale ``m`` ``[N, H]``. Only the products mean anything; no gradient goes through
    ``m``."""

    S: Tensor
    z: Tensor
    m: Tensor
