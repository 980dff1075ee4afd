"""The state of the cell engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CellState(NamedTuple):
    """``h`` ``[N, H, D]``, with a memory cell ``c`` ``[N, H, D]``, for the sLSTM also its normaliser ``n`` and its
    log-scale ``m`` (the cell is ``c exp(m)``, its normaliser ``n exp(m)``; no gradient goes through ``m``); parts a
    kind does not have are None. fp32, one row a sequence."""

    h: Tensor
    c: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None
