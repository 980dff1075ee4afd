"""Sequence to sequence: an encoder whose last state is where a decoder begins (Sutskever, Vinyals & Le 2014)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linnet.ops import Segments
from linnet.ops.core import repeat_rows, select_rows

from .decoder import Decoder, DecoderConfig, DecoderOutput
from .encoder import Encoder, reverse
from .generation import Generation, generate
from .mlp import at_least_fp32

__all__ = ["Seq2Seq", "beam_search"]


class _WithContext(Decoder):
    """A decoder whose state ends in a vector ``[B, d_model]`` that is added to every embedding."""

    def _hidden(
        self, tokens: Tensor, state: tuple[Any, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        if not state:
            raise ValueError(f"state: expected what the source left, got {state}")
        *states, context = state
        self._check(tokens, tuple(states), segments)
        everywhere = context[:, None] if segments is None else context.index_select(0, segments.ids)[None]
        x, new, aux = self._through(self._embed(tokens) + everywhere, tuple(states), segments)
        return x, (*new, context), aux


class Seq2Seq(nn.Module):
    """An encoder and a decoder of one shape, with weights of their own; layer by layer the decoder starts from the
    state in which the encoder ends. Any mixers will do, attention included, whose cache is then what is handed over.

    Args:
        config: of both.
        reverse_source: let the encoder read every source from its end, which brings its beginning close to that of the
            target.
        context: also give the decoder ``W tanh(V h)`` at every step, h the encoder's last output (Cho et al. 2014,
            arXiv 1406.1078), so that it need not remember the source.

    >>> model = Seq2Seq(DecoderConfig(vocab_size=16, d_model=64, num_layers=1, mixers=["gru"]))
    >>> loss = model.loss(source, inputs, targets)     # inputs: a start token, then the target
    >>> model.generate(source, start=0, max_new_tokens=20).tokens
    """

    def __init__(self, config: DecoderConfig, *, reverse_source: bool = False, context: bool = False):
        super().__init__()
        self.config, self.reverse_source = config, reverse_source
        self.encoder = Encoder(config, bidirectional=False)
        self.decoder, self.context = (_WithContext if context else Decoder)(config), None
        if context:
            width = config.d_model
            self.context = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width, bias=False))

    def encode(self, source: Tensor, segments: Segments | None = None) -> tuple[Any, ...]:
        """The state after the sources ``[B, T]``, or packed ``[1, total]`` with ``segments``, where their lengths
        differ: a row each."""
        return self._encode(source, segments)[0]

    def _encode(self, source: Tensor, segments: Segments | None) -> tuple[tuple[Any, ...], Tensor]:
        source = reverse(source, segments) if self.reverse_source else source
        hidden, state, aux = self.encoder(source, None, segments)
        if self.context is None:
            return state, aux
        if segments is not None and min(segments.lengths) == 0:
            raise ValueError("segments: expected sources of at least one token, there is no context of an empty one")
        last = hidden[:, -1] if segments is None else hidden[0].index_select(0, segments.cu_seqlens[1:] - 1)
        return (*state, self.context(last)), aux

    def forward(
        self, source: Tensor, inputs: Tensor, source_segments: Segments | None = None, segments: Segments | None = None
    ) -> DecoderOutput:
        """Logits of the target after every token of ``inputs`` ``[B, T]``. Sources and targets may each be packed;
        both have one row a sequence."""
        return self.decoder(inputs, self.encode(source, source_segments), segments)

    def loss(
        self,
        source: Tensor,
        inputs: Tensor,
        targets: Tensor,
        source_segments: Segments | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Mean cross entropy in nats per counted target (-100 is not counted), with teacher forcing: ``inputs`` are a
        start token and the targets before. Padding at the end of targets is not counted and changes nothing else. In
        training mode plus the auxiliary losses of both, as in :meth:`Decoder.loss <linnet.models.Decoder.loss>`."""
        state, aux = self._encode(source, source_segments)
        loss = self.decoder.loss(inputs, targets, segments, state=state)
        return loss + aux if self.training else loss

    def generate(self, source: Tensor, *, start: int, segments: Segments | None = None, **options: Any) -> Generation:
        """Targets for sources, sampled as :func:`~linnet.models.generate` does with these ``options``; ``start`` is
        the token that begins every target."""
        prompt, state = self._begin(source, start, segments)
        return generate(self.decoder, prompt, state=state, **options)

    def beam_search(
        self, source: Tensor, *, start: int, segments: Segments | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The most probable targets that :func:`beam_search` finds with these ``options``."""
        prompt, state = self._begin(source, start, segments)
        return beam_search(self.decoder, prompt, state=state, **options)

    @torch.inference_mode()
    def _begin(self, source: Tensor, start: int, segments: Segments | None) -> tuple[Tensor, tuple[Any, ...]]:
        """The prompt ``[rows, 1]`` of nothing but ``start``, and the state after the sources."""
        rows = source.shape[0] if segments is None else len(segments)
        return torch.full((rows, 1), start, device=source.device), self.encode(source, segments)


@torch.inference_mode()
def beam_search(
    model: Decoder,
    prompt: Tensor,
    *,
    width: int,
    max_new_tokens: int,
    stop: int,
    length_penalty: float = 0.0,
    state: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """The continuations with the highest probability among ``width`` that are kept at every step.

    Args:
        model: the decoder.
        prompt: int64 ``[B, T]``.
        width: continuations kept a row.
        max_new_tokens: most tokens to add.
        stop: the token that ends a continuation.
        length_penalty: a in the divisor ``((5 + n) / 6)^a`` of the log-probability of n tokens (Wu et al. 2016).
        state: recurrent state to continue from, one row a prompt.

    Returns:
        Tokens ``[B, width, n]``, best first, finished ones filled with ``stop``; and their scores ``[B, width]``.

    Raises:
        ValueError: ``width`` or ``max_new_tokens`` below 1, ``stop`` outside the vocabulary, or as the model's forward.
    """
    for name, value in (("width", width), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value!r}")
    if not isinstance(stop, int) or not 0 <= stop < model.config.vocab_size:
        raise ValueError(f"stop: expected a token id from 0 to {model.config.vocab_size - 1}, got {stop!r}")
    out = model(prompt, state, last_only=True)
    rows, device = prompt.shape[0], prompt.device
    state = repeat_rows(out.state, width)
    logits = out.logits[:, -1].repeat_interleave(width, 0)
    total = torch.full((rows, width), -torch.inf, device=device)
    total[:, 0] = 0.0  # all beams are the same prompt at first: only one of them counts
    tokens = torch.empty(rows, width, 0, dtype=torch.int64, device=device)
    done = torch.zeros(rows, width, dtype=torch.bool, device=device)
    lengths = torch.zeros(rows, width, device=device)
    for n in range(max_new_tokens):
        gain = at_least_fp32(logits).log_softmax(-1).view(rows, width, -1)
        frozen = torch.full_like(gain, -torch.inf)
        frozen[..., stop] = 0.0  # a finished continuation goes on with stops that cost nothing
        gain = torch.where(done[..., None], frozen, gain)
        longer = (lengths + ~done)[..., None]
        score = ((total[..., None] + gain) / ((5 + longer) / 6) ** length_penalty).flatten(1)
        picked = score.topk(width, 1).indices
        beam, token = picked // gain.shape[-1], picked % gain.shape[-1]
        total = (total[..., None] + gain).flatten(1).gather(1, picked)
        lengths, done = longer[..., 0].gather(1, beam), done.gather(1, beam) | (token == stop)
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, n)), token[..., None]], -1)
        if done.all() or n + 1 == max_new_tokens:
            break
        flat = (beam + torch.arange(rows, device=device)[:, None] * width).flatten()
        out = model(token.view(-1, 1), select_rows(state, flat))
        state, logits = out.state, out.logits[:, -1]
    return tokens, total / ((5 + lengths) / 6) ** length_penalty
