"""Encoders: stacks of mixers that may read a sequence from both ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linnet.mixers import Mixer, build_mixer
from linnet.ops import Segments
from linnet.ops.core import check_segments

from .decoder import DecoderConfig, DecoderLayer, check_ids, shrink_outputs

__all__ = ["Bidirectional", "Encoder", "EncoderOutput", "reverse"]


def reverse(x: Tensor, segments: Segments | None = None) -> Tensor:
    """Every sequence of ``[B, T, ...]``, or packed ``[1, total, ...]``, from its own last token to its first."""
    if segments is None:
        return x.flip(1)
    ends = segments.cu_seqlens[1:].long()[segments.ids.long()] - 1
    return x.index_select(1, ends - segments.positions)


class Bidirectional(nn.Module):
    """Two mixers over a sequence, one from its beginning and one from its end; the sum of their outputs. Each has an
    output projection of its own, so this is both readings side by side through one map (Schuster & Paliwal 1997).

    ``y, None = layer(x, None, segments)``; there is no state and no step form, since every output depends on all
    inputs.
    """

    def __init__(self, forward: Mixer, backward: Mixer):
        super().__init__()
        self.ahead, self.back = forward, backward

    def forward(self, x: Tensor, state: None = None, segments: Segments | None = None) -> tuple[Tensor, None]:
        if state is not None:
            raise ValueError(f"state: expected None, both ends are read at once, got {type(state).__name__}")
        y, _ = self.ahead(x, None, segments)
        z, _ = self.back(reverse(x, segments), None, segments)
        return y + reverse(z, segments), None


class EncoderOutput(NamedTuple):
    """What an :class:`Encoder` returns.

    Attributes:
        hidden: ``[B, T, d_model]`` after the last norm.
        state: one state a layer after the last token; None for each that reads both ways.
        aux_loss: fp32 scalar, sum of the auxiliary losses of the layers.
    """

    hidden: Tensor
    state: tuple[Any, ...]
    aux_loss: Tensor


class Encoder(nn.Module):
    """Representations of every token: the layers of a :class:`~linnet.models.Decoder` without its head, by default
    reading both ways.

    Args:
        config: as of a decoder; the fields about the head and the loss mean nothing here.
        bidirectional: give every layer a second mixer that reads from the end.

    >>> config = DecoderConfig(vocab_size=256, d_model=64, num_layers=2, mixers=["lstm"])
    >>> Encoder(config)(torch.randint(256, (2, 16))).hidden.shape
    torch.Size([2, 16, 64])
    """

    def __init__(self, config: DecoderConfig, *, bidirectional: bool = True):
        super().__init__()
        self.config, self.bidirectional = config, bidirectional
        width, count = config.d_model, config.num_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(count))
        if bidirectional:
            for i, layer in enumerate(self.layers):
                second = build_mixer(config.mixer_spec(i), width, layer=i, num_layers=count)
                layer.mixer = Bidirectional(layer.mixer, second)  # type: ignore[arg-type]
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        shrink_outputs(self.layers, config)
        nn.init.normal_(self.embed_tokens.weight, std=config.init_std)

    def forward(
        self, tokens: Tensor, state: tuple[Any, ...] | None = None, segments: Segments | None = None
    ) -> EncoderOutput:
        """The representations.

        Args:
            tokens: int64 ``[B, T]``, or features ``[B, T, d_model]`` in place of embeddings; packed ``[1, total]`` with
                ``segments``.
            state: what an earlier call returned; None, or None a layer, where both ends are read.
            segments: boundaries of packed sequences.

        Raises:
            ValueError: ``tokens`` has another shape or (on the CPU) ids outside the vocabulary, or ``state`` or
                ``segments`` do not fit.
        """
        ids = not tokens.is_floating_point()
        if (
            tokens.dim() != (2 if ids else 3)
            or 0 in tokens.shape[:2]
            or not (ids or tokens.shape[2] == self.norm.weight.shape[0])
        ):
            wanted = f"int64 [B >= 1, T >= 1] or [B >= 1, T >= 1, {self.norm.weight.shape[0]}]"
            raise ValueError(f"tokens: expected {wanted}, got {tokens.dtype} of shape {list(tokens.shape)}")
        if ids:
            check_ids("tokens", tokens, self.config.vocab_size)
        check_segments(segments, tokens)
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state: expected {len(self.layers)} layer states, got {len(state)}")
        x = self.embed_tokens(tokens) * self.config.embed_scale if ids else tokens
        states, losses = [], [torch.zeros((), device=x.device)]
        for i, layer in enumerate(self.layers):
            x, new, aux = layer(x, None if state is None else state[i], segments)
            states.append(new)
            losses += [] if aux is None else [aux]
        return EncoderOutput(self.norm(x), tuple(states), torch.stack(losses).sum())
