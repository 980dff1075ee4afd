"""What vLLM asks a configuration before there is a model."""

from __future__ import annotations

from typing import Any

import torch

from linnet.interop.transformers import LinnetConfig
from linnet.mixers import Mixer, build_mixer
from linnet.mixers.attention import Attention
from linnet.models import DecoderConfig

__all__ = ["ServedConfig", "served_mixers"]


def served_mixers(config: DecoderConfig) -> list[Mixer]:
    """The mixers of a decoder without memory, one a spec; layer i has that of i modulo their number.

    Raises:
        ValueError: a mixer whose state grows and that is not ``attention``, or attention layers whose caches differ in
            the size of a token; names them.
    """
    with torch.device("meta"):
        mixers = [
            build_mixer(spec, config.d_model, layer=i, num_layers=config.num_layers)
            for i, spec in enumerate(config.mixers)
        ]
    for mixer in mixers:
        if not (mixer.card.constant_state or isinstance(mixer, Attention)):
            raise ValueError(f"mixers: expected states of constant size, or attention; the state of {mixer.name} grows")
    tokens = {(m.num_kv_heads, m.head_dim) for m in mixers if isinstance(m, Attention)}
    if len(tokens) > 1:
        raise ValueError(f"mixers: expected one (num_kv_heads, head_dim) in all attention layers, got {sorted(tokens)}")
    return mixers


class ServedConfig(LinnetConfig):
    """The configuration of a decoder, with what vLLM's cache wants to know of the layers."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("layer_types", "num_attention_heads", "num_key_value_heads", "head_dim"):
            kwargs.pop(name, None)
        if self.config is not None:
            shape = self.decoder_config()
            mixers = served_mixers(shape)
            paged = [m for m in mixers if isinstance(m, Attention)]
            kinds = ["full_attention" if m in paged else "linear_attention" for m in mixers]
            self.layer_types = [kinds[i % len(kinds)] for i in range(shape.num_layers)]
            self.num_attention_heads = paged[0].num_heads if paged else 1
            self.num_key_value_heads = paged[0].num_kv_heads if paged else 1
            self.head_dim = paged[0].head_dim if paged else shape.d_model
        super().__post_init__(**kwargs)
