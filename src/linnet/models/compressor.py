"""A decoder that reads everything out of its last output: what can one state hold?"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments

from .decoder import Decoder, DecoderConfig

__all__ = ["Compressor", "sinusoids"]


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Position codes ``[length, width]``: sines, then cosines, of wavelengths from 2π to 20,000π (Vaswani et al.
    2017)."""
    half = -(-width // 2)
    rate = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / half))
    angle = torch.arange(length, device=device).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


class Compressor(Decoder):
    """A :class:`Decoder` whose logits at position t come from its last output plus the code of position t, through an
    MLP of two layers: the auto-encoder of MAD's compression task (Poli et al. 2024, arXiv 2403.17844).

    Not causal: it reads whole rows, without ``segments``.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.read_in = nn.Linear(config.d_model, config.hidden)
        self.read_out = nn.Linear(config.hidden, config.d_model)

    def _hidden(
        self, tokens: Tensor, state: tuple[Any, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        if segments is not None:
            raise ValueError("segments: expected None, a Compressor reads whole rows")
        x, new_state, aux = super()._hidden(tokens, state, None)
        x = x[:, -1:] + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        return self.read_out(F.gelu(self.read_in(x))), new_state, aux

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.read_in.reset_parameters()
        self.read_out.reset_parameters()
