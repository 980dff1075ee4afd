"""Softmax attention with a growing cache."""

from __future__ import annotations

from torch import Tensor

from ..core import Segments
from .reference import attention_reference
from .rotary import rotary
from .state import AttentionState

__all__ = ["AttentionState", "attention", "rotary"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    segments: Segments | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | tuple[Tensor, Tensor], AttentionState]:
    """Causal softmax attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, lse, cache = attention_reference(q, k, v, window, scale, state, segments)
    return ((o, lse) if return_lse else o), cache
