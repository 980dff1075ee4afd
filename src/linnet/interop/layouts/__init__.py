"""Public checkpoint layouts: how their configurations and tensors map to those of a decoder, one table each.

A table is three functions: ``read`` (their ``config.json`` to a :class:`~linnet.DecoderConfig`), ``write`` (the way
back) and ``rules`` (which of their tensors are which of ours). Names are those of the files that were published; where
`transformers` writes another one, it follows after a bar: ``"mlp.up_proj.weight|block_sparse_moe.up_proj.weight"``.
"""

from __future__ import annotations

from . import fla, kimi_linear, mamba, olmo_hybrid, qwen3_next, recurrent_gemma, transformer, xlstm
from .base import Fields, Layout, Rule, Shape

__all__ = ["LAYOUTS", "Fields", "Layout", "Rule", "Shape"]

_FAMILIES = (transformer, qwen3_next, olmo_hybrid, kimi_linear, mamba, xlstm, recurrent_gemma, fla)

LAYOUTS: dict[str, Layout] = {name: layout for family in _FAMILIES for name, layout in family.LAYOUTS.items()}
