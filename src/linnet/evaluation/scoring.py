"""Accuracy of a model on a synthetic task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.tasks import IGNORE, Sample, Task, TaskData

__all__ = ["Accuracy", "accuracy", "count_right"]

_POSITIONS = 1 << 14  # of a batch
_LOGITS = 1 << 24


class Accuracy(NamedTuple):
    """How often a model is right.

    Attributes:
        answers: share of the scored answers.
        rows: share of the rows in which every answer is right ("sequence accuracy").
        late: share of the answers in the last tenth of each row, counted back from its last answer.
        scored: number of answers.
    """

    answers: float
    rows: float
    late: float
    scored: int


def count_right(logits: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Which answers are right and which positions hold one: two bool ``[B, T]``.

    Where a sample has ``elements``, the positions of an element answer together, by the sum of their probabilities, and
    its first one holds the answer.
    """
    scored = sample.targets != IGNORE
    if sample.elements is None:
        return (logits.argmax(-1) == sample.targets) & scored, scored
    B, T, V = logits.shape
    index = sample.elements + torch.arange(B, device=logits.device).unsqueeze(1) * T
    votes = logits.new_zeros(B * T, V, dtype=torch.float32)
    votes.index_add_(0, index.flatten(), (logits.float().softmax(-1) * scored.unsqueeze(-1)).flatten(0, 1))
    answer = votes.argmax(-1)[index]
    first = torch.ones_like(scored)
    first[:, 1:] = sample.elements[:, 1:] != sample.elements[:, :-1]
    return (answer == sample.targets) & first & scored, first & scored


@torch.no_grad()
def accuracy(
    model: Callable[..., Any], task: Task, length: int, *, rows: int = 256, seed: int = 0, device: Any = None
) -> Accuracy:
    """Accuracy on rows of the task's test stream.

    Args:
        model: a :class:`linnet.Decoder` in evaluation mode, or anything called like it.
        task: the task.
        length: positions of a row.
        rows: how many.
        seed: which ones.
        device: where the model takes its inputs (default: where its parameters are).

    Raises:
        ValueError: no rows, or rows without an answer.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    if device is None:
        device = next(model.parameters()).device  # type: ignore[union-attr]
    size = max(1, min(rows, _POSITIONS // length, _LOGITS // (length * task.vocab_size)))
    data = TaskData(task, length=length, batch_size=size, seed=seed, split="test")
    right, whole, late, answers, ends = 0, 0, 0, 0, 0
    seen = 0
    for step in range(-(-rows // size)):
        tokens, targets, elements = data.sample(step)
        take = slice(rows - seen)
        elements = None if elements is None else elements[take].to(device)
        sample = Sample(tokens[take].to(device), targets[take].to(device), elements)
        seen += sample.targets.shape[0]
        good, scored = count_right(model(sample.tokens).logits, sample)
        right += int(good.sum())
        answers += int(scored.sum())
        whole += int((good == scored).all(1).sum())
        last = scored.shape[1] - 1 - scored.flip(1).int().argmax(1, keepdim=True)
        end = scored & (torch.arange(scored.shape[1], device=device) > last - max(1, scored.shape[1] // 10))
        late += int((good & end).sum())
        ends += int(end.sum())
    if answers == 0:
        raise ValueError(f"length: rows of {length} positions of the task {task.name!r} hold no answer")
    return Accuracy(right / answers, whole / seen, late / ends, answers)
