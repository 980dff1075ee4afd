"""Probes of a trained language model: loss over the position, copying, questions about a text, variables that are
swapped.

All of them start from an empty state and need no data but a text. A model of a few million parameters answers no
question in words; copying and loss over the position tell such models apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.models import Decoder, generate
from linnet.tasks import Tokenizer, seeded
from linnet.tasks.ruler import GENERATED, make_question, string_match

__all__ = ["Bucket", "by_position", "copy_bits", "question_score", "swap_accuracy"]

_POSITIONS = 1 << 13  # of a call
_NAMES = "abc"


class Bucket(NamedTuple):
    """Loss of the tokens at positions ``first`` … ``last`` of a window that began with an empty state.

    Attributes:
        first, last: positions, counted from 1.
        bits_per_byte: with the mean size of a token of the text.
        perplexity: per token.
        tokens: how many were scored.
    """

    first: int
    last: int
    bits_per_byte: float
    perplexity: float
    tokens: int


@torch.no_grad()
def _nats(model: Decoder, tokens: Tensor) -> Tensor:
    """Loss of each token but the first, ``[B, T - 1]``."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


def _windows(tokens: np.ndarray, length: int, rows: int) -> Tensor:
    """So many windows of ``length`` tokens at even places of a text, as they fit."""
    last = len(tokens) - length
    if last < 0:
        raise ValueError(f"length: expected at most {len(tokens)} tokens, as many as the text has, got {length}")
    places = np.unique(np.linspace(0, last, rows).astype(int))
    return torch.from_numpy(np.stack([tokens[at : at + length] for at in places]).astype(np.int64))


def by_position(model: Decoder, tokens: np.ndarray, num_bytes: int, *, length: int, rows: int = 16) -> list[Bucket]:
    """Loss over the position in windows of ``length`` tokens: how much a longer context helps, and whether the model
    holds beyond the one it was trained with.

    Args:
        model: the decoder, in evaluation mode.
        tokens: ids ``[N]`` of the text.
        num_bytes: size of the text.
        length: tokens of a window.
        rows: windows.

    Returns:
        Buckets that double: positions 1, 2, 3-4, 5-8, … up to ``length``.

    Raises:
        ValueError: a text shorter than a window.
    """
    windows = _windows(tokens, length + 1, rows)
    nats = torch.cat([_nats(model, part) for part in windows.split(max(1, _POSITIONS // length))]).double()
    size, buckets, low = num_bytes / len(tokens), [], 0
    while low < length:
        high = min(length, max(1, 2 * low))
        mean = float(nats[:, low:high].mean())
        buckets.append(Bucket(low + 1, high, mean / math.log(2) / size, math.exp(mean), nats[:, low:high].numel()))
        low = high
    return buckets


def copy_bits(model: Decoder, tokens: np.ndarray, *, length: int, rows: int = 16) -> tuple[float, float]:
    """Bits per token of a piece of text, and of the same piece read a second time right behind it.

    Args:
        model: the decoder, in evaluation mode.
        tokens: ids ``[N]`` of a text.
        length: tokens of a piece.
        rows: pieces.

    Raises:
        ValueError: a text shorter than a piece.
    """
    pieces = _windows(tokens, length, rows)
    twice = torch.cat([pieces, pieces], 1)
    nats = torch.cat([_nats(model, part) for part in twice.split(max(1, _POSITIONS // (2 * length)))]).double()
    nats /= math.log(2)
    return float(nats[:, : length - 1].mean()), float(nats[:, length:].mean())


def question_score(
    model: Decoder, tokenizer: Tokenizer, family: str, *, budget: int, questions: int = 16, seed: int = 0
) -> float:
    """Score of greedy answers to RULER's questions (:func:`linnet.tasks.ruler.make_question`), 0 to 1.

    Args:
        model: the decoder, in evaluation mode.
        tokenizer: its tokenizer.
        family: such as "niah_single_1".
        budget: most tokens of prompt and answer.
        questions: how many.
        seed: which ones.

    Raises:
        ValueError: an unknown family, or a budget that holds no question.
    """

    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text.encode())]

    reserve = min(GENERATED.get(family.split("_")[0], 0), budget // 4)
    score = 0.0
    for n in range(questions):
        question = make_question(family, budget, seeded(seed, n), lambda text: len(ids(text)), reserve)
        prompt = [tokenizer.begin, *ids(question.prompt)]
        made = generate(model, [prompt], max_new_tokens=reserve, temperature=0, stop=tokenizer.ends)
        text = tokenizer.decode([int(i) for i in made.tokens[0, : int(made.lengths[0])]]).decode(errors="replace")
        score += string_match(text, question.answers)
    return score / questions


def swap_accuracy(
    model: Decoder, tokenizer: Tokenizer, *, swaps: Sequence[int] = (0, 1, 2, 4, 8), questions: int = 32, seed: int = 0
) -> dict[int, float]:
    """State tracking in Python: three variables, lines that swap two of them, and the value of one: the share of
    questions in which the right one of the three values is the likeliest. Chance is 1/3.

    Args:
        model: the decoder, in evaluation mode.
        tokenizer: its tokenizer.
        swaps: numbers of swaps.
        questions: of each number.
        seed: which ones.
    """
    found = {}
    for count in swaps:
        right = 0
        for n in range(questions):
            generator = seeded(seed, count, n)
            values = torch.randperm(10, generator=generator)[:3].tolist()
            held = dict(zip(_NAMES, values, strict=True))
            lines = [f"{name} = {value}" for name, value in held.items()]
            for pair in torch.randint(3, (count,), generator=generator).tolist():
                x, y = (name for i, name in enumerate(_NAMES) if i != pair)
                held[x], held[y] = held[y], held[x]
                lines.append(f"{x}, {y} = {y}, {x}")
            name = _NAMES[int(torch.randint(3, (), generator=generator))]
            prompt = "\n".join([*lines, f"assert {name} == "])
            scores = [_log_probability(model, tokenizer, prompt, str(value)) for value in values]
            right += values[scores.index(max(scores))] == held[name]
        found[count] = right / questions
    return found


def _log_probability(model: Decoder, tokenizer: Tokenizer, prompt: str, answer: str) -> float:
    """Of ``answer`` after ``prompt``; a token that spans both counts to the answer."""
    both = [tokenizer.begin, *(int(i) for i in tokenizer.encode((prompt + answer).encode()))]
    given = [tokenizer.begin, *(int(i) for i in tokenizer.encode(prompt.encode()))]
    shared = next((i for i, (a, b) in enumerate(zip(given, both, strict=False)) if a != b), min(len(given), len(both)))
    return -float(_nats(model, torch.tensor([both]))[0, shared - 1 :].sum())
