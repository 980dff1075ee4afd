"""The key-value cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["AttentionState"]


class AttentionState(NamedTuple):
    """The keys and values seen so far, aligned to the right: slot ``S - 1`` holds the newest token of every row.

    Rows of different length share one rectangle without an index per row: slot ``s`` of row ``n`` holds the token at
    position ``length[n] - S + s`` of its sequence and is padding (zeros) where that is negative. Appending is then a
    concatenation and cutting to a window a slice. The cache keeps the dtype of the inputs; in fp32 it would take twice
    the memory and gain nothing.

    Attributes:
        k: ``[N, S, Hkv, K]``.
        v: ``[N, S, Hkv, V]``.
        length: int64 ``[N]``, tokens seen so far by each row, those cut off by a window included.
    """

    k: Tensor
    v: Tensor
    length: Tensor
