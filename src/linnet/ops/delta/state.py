"""The state of the delta engine, and its check."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Shapes, check_floating
from ..core.chunks import accumulate_dtype


class DeltaState(NamedTuple):
    """``S`` ``[N, H, K, V]`` in fp32 (float64 for float64 inputs), one row a sequence."""

    S: Tensor


def initial_state(state: DeltaState | None, rows: int, H: int, K: int, V: int, like: Tensor) -> Tensor:
    """The checked ``S`` of ``state`` for inputs such as ``like``, zeros when it is None."""
    acc = accumulate_dtype(like)
    if state is None:
        return torch.zeros(rows, H, K, V, dtype=acc, device=like.device)
    if not isinstance(state, DeltaState):
        raise ValueError(f"state: expected a DeltaState, got {type(state).__name__}")
    Shapes(N=rows, H=H, K=K, V=V)("state.S", state.S, "N H K V")
    check_floating("state.S", state.S, like.device)
    return state.S.to(acc)
