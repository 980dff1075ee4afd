"""Small decoders the model tests run."""

from __future__ import annotations

import torch

from linnet.models import Decoder, DecoderConfig

VOCAB = 37


def config(**options) -> DecoderConfig:
    """Three recurrent layers of two kinds and one of sliding attention, of width 16."""
    mixers = ["gla(num_heads=2)", {"name": "mamba2", "head_dim": 8, "state_dim": 8}, "attention(num_heads=2, window=5)"]
    defaults = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 4, "mixers": mixers, "init_std": 0.2}
    return DecoderConfig(**{**defaults, **options})


def decoder(**options) -> Decoder:
    """Such a decoder in float64 and evaluation mode."""
    torch.manual_seed(0)
    return Decoder(config(**options)).double().eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))
