"""Sampling from a decoder: one packed or batched prefill, then one step a token through the same forward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.ops import Segments
from linnet.ops.core import state_tensors

from .decoder import Decoder, DecoderOutput

__all__ = ["Generation", "GenerationStep", "generate", "sample", "stream"]

Prompt = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


class GenerationStep(NamedTuple):
    """One step of :func:`stream`.

    Attributes:
        tokens: int64 ``[B]``, the token each row got. A finished row repeats its stop token.
        finished: bool ``[B]``, rows that have emitted a stop token (now or before).
        state: recurrent state after everything before these tokens; to go on later, pass it together with the tokens
            as the prompt.
    """

    tokens: Tensor
    finished: Tensor
    state: tuple[Any, ...]


class Generation(NamedTuple):
    """What :func:`generate` returns.

    Attributes:
        tokens: int64 ``[B, N]``, the new tokens. A row that finished early repeats its stop token.
        lengths: int64 ``[B]``, number of new tokens of each row, its stop token included.
        state: recurrent state after everything but the last column; to go on, pass it with the prompt
            ``tokens[:, -1:]`` (meaningful for rows that have not finished).
    """

    tokens: Tensor
    lengths: Tensor
    state: tuple[Any, ...]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of ``logits``: ``[B, V]`` -> int64 ``[B]``.

    The logits are divided by ``temperature``; then only the ``top_k`` largest stay, and of these the fewest whose
    probabilities add up to at least ``top_p`` (nucleus sampling, arXiv 1904.09751). Temperature 0 takes the largest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
    elif top_p is not None:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    probabilities = values.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p
        keep[..., 0] = True  # rounding must not leave a row without a candidate
        probabilities = probabilities.where(keep, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, choice).squeeze(-1)


def stream(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
    state: tuple[Any, ...] | None = None,
) -> Iterator[GenerationStep]:
    """Generate token by token; see :func:`generate` for the arguments. Ends when every row has finished.

    >>> for step in stream(model, prompt, max_new_tokens=100, stop=[0]):
    ...     print(step.tokens.tolist())
    """
    _check_options(model, max_new_tokens, temperature, top_k, top_p, stop)
    tokens, segments = _pack(prompt, model.embed_tokens.weight.device)
    rows = tokens.shape[0] if segments is None else len(segments)
    if state is not None and any(x.shape[0] != rows for x in state_tensors(state)):
        found = sorted({x.shape[0] for x in state_tensors(state)})
        raise ValueError(f"state: expected {rows} rows like the prompt, got {', '.join(map(str, found))}")

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    out = _forward(model, tokens, state, segments)
    return _steps(model, out, max_new_tokens, stop, options)


def generate(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
    state: tuple[Any, ...] | None = None,
) -> Generation:
    """Continue prompts by sampling, in inference mode.

    Args:
        model: the decoder.
        prompt: int64 ``[B, T]`` (or ``[T]`` for one row), or a list of B token sequences of any lengths >= 1, which
            are packed without padding.
        max_new_tokens: most tokens to add to a row, >= 1.
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities add up to ``top_p`` in (0, 1] only.
        stop: token ids that finish a row; each row finishes on its own.
        generator: source of randomness on the model's device; the same seed gives the same tokens.
        state: recurrent state to continue from, one row a prompt.

    Raises:
        ValueError: an argument is out of range, a prompt is empty, or ``state`` has another number of rows.
    """
    steps = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        generator=generator,
        state=state,
    )
    columns: list[Tensor] = []
    running: list[Tensor] = []
    for step in steps:  # holds on to the newest state only
        columns.append(step.tokens)
        running.append(~step.finished)
        state = step.state
    count = len(columns)
    lengths = (torch.stack(running, 1).sum(1) + 1).clamp(max=count)
    return Generation(torch.stack(columns, 1), lengths, state or ())


@torch.inference_mode()
def _forward(
    model: Decoder, tokens: Tensor, state: tuple[Any, ...] | None, segments: Segments | None = None
) -> DecoderOutput:
    return model(tokens, state, segments, last_only=True)


@torch.inference_mode()
def _steps(
    model: Decoder, out: DecoderOutput, max_new_tokens: int, stop: Sequence[int], options: dict[str, Any]
) -> Iterator[GenerationStep]:
    stops = torch.tensor(list(stop), dtype=torch.int64, device=out.logits.device)
    tokens: Tensor | None = None
    finished = torch.zeros(out.logits.shape[0], dtype=torch.bool, device=out.logits.device)
    for step in range(max_new_tokens):
        drawn = sample(out.logits[:, -1], **options)
        tokens = drawn if tokens is None else torch.where(finished, tokens, drawn)
        finished = finished | torch.isin(tokens, stops)
        yield GenerationStep(tokens, finished, out.state)
        if step + 1 == max_new_tokens or (stop and bool(finished.all())):
            return
        out = _forward(model, tokens.unsqueeze(1), out.state)


def _check_options(
    model: Decoder,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Sequence[int],
) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens!r}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a number >= 0 (0 is greedy), got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected an integer >= 1 or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1] or None, got {top_p!r}")
    vocab = model.config.vocab_size
    if isinstance(stop, (int, str)) or not all(isinstance(t, int) and 0 <= t < vocab for t in stop):
        raise ValueError(f"stop: expected a list of token ids from 0 to {vocab - 1}, got {stop!r}")


def _pack(prompt: Prompt, device: torch.device) -> tuple[Tensor, Segments | None]:
    """The prompt as ``[B, T]``, or as one packed row with its segments when the lengths differ."""
    if isinstance(prompt, Tensor):
        rows = prompt.to(device)
        rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
    else:
        parts = [torch.as_tensor(part, device=device) for part in prompt]
        if not parts or any(part.dim() != 1 or part.numel() == 0 for part in parts):
            raise ValueError(
                "prompt: expected at least one sequence, each a non-empty list or 1-D tensor of token ids, got shapes "
                f"{[list(part.shape) for part in parts[:8]]}"
            )
        lengths = [part.numel() for part in parts]
        if len(set(lengths)) > 1:
            return _ids(torch.cat(parts).unsqueeze(0)), Segments.from_lengths(lengths, device)
        rows = torch.stack(parts)
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(f"prompt: expected shape [B, T] or [T], not empty, got {list(rows.shape)}")
    return _ids(rows), None


def _ids(tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"prompt: expected integer token ids, got {tokens.dtype}")
    return tokens.long()
