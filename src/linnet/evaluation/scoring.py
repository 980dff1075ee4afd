"""Accuracy of a model on a synthetic task, or its divergence from the probabilities of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.tasks import IGNORE, Sample, Task, TaskData

__all__ = ["Accuracy", "Divergence", "accuracy", "count_right", "divergence"]

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


class Divergence(NamedTuple):
    """How far the probabilities of a model are from the true ones, in nats.

    Attributes:
        divergence: Kullback-Leibler divergence of the model's distribution from the true one, mean over the scored
            positions; 0 for the true one.
        late: that in the last tenth of each row, counted back from its last scored position.
        entropy: mean entropy of the true distribution, which is the loss of a perfect model.
        scored: number of positions.
    """

    divergence: float
    late: float
    entropy: float
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
    right, whole, late, answers, ends = 0, 0, 0, 0, 0
    for logits, sample in _read(model, task, length, rows, seed, device):
        good, scored = count_right(logits, sample)
        right += int(good.sum())
        answers += int(scored.sum())
        whole += int((good == scored).all(1).sum())
        end = _end(scored)
        late += int((good & end).sum())
        ends += int(end.sum())
    if answers == 0:
        raise ValueError(f"length: rows of {length} positions of the task {task.name!r} hold no answer")
    return Accuracy(right / answers, whole / rows, late / ends, answers)


@torch.no_grad()
def divergence(
    model: Callable[..., Any], task: Task, length: int, *, rows: int = 256, seed: int = 0, device: Any = None
) -> Divergence:
    """Divergence from the true probabilities of the answers, on rows of the test stream of a task whose answers are
    drawn by chance (``task.drawn``).

    Args:
        model, task, length, rows, seed, device: as in :func:`accuracy`.

    Raises:
        ValueError: a task whose answers are not drawn, no rows, or rows without an answer.
    """
    if not task.drawn:
        raise ValueError(f"task: expected one whose answers are drawn by chance, got {task.name!r}; it has an accuracy")
    total, late, entropy, answers, ends = 0.0, 0.0, 0.0, 0, 0
    for logits, sample in _read(model, task, length, rows, seed, device):
        assert sample.probabilities is not None
        true, scored = sample.probabilities.float(), sample.targets != IGNORE
        own = logits.float().log_softmax(-1)[..., : true.shape[-1]]
        apart = F.kl_div(own, true, reduction="none").sum(-1)
        total += float(apart[scored].double().sum())
        entropy += float(torch.special.entr(true).sum(-1)[scored].double().sum())
        answers += int(scored.sum())
        end = _end(scored)
        late += float(apart[end].double().sum())
        ends += int(end.sum())
    if answers == 0:
        raise ValueError(f"length: rows of {length} positions of the task {task.name!r} hold no answer")
    return Divergence(total / answers, late / ends, entropy / answers, answers)


def _read(
    model: Callable[..., Any], task: Task, length: int, rows: int, seed: int, device: Any
) -> Iterator[tuple[Tensor, Sample]]:
    """Logits on the first ``rows`` rows of the test stream, a batch at a time, and the batch, both on ``device``."""
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    if device is None:
        device = next(model.parameters()).device  # type: ignore[union-attr]
    size = max(1, min(rows, _POSITIONS // length, _LOGITS // (length * task.vocab_size)))
    data = TaskData(task, length=length, batch_size=size, seed=seed, split="test")
    for step in range(-(-rows // size)):
        parts = (None if part is None else part[: rows - step * size].to(device) for part in data.sample(step))
        sample = Sample(*parts)  # type: ignore[arg-type]
        yield model(sample.tokens).logits, sample


def _end(scored: Tensor) -> Tensor:
    """The scored positions in the last tenth of each row."""
    last = scored.shape[1] - 1 - scored.flip(1).int().argmax(1, keepdim=True)
    return scored & (torch.arange(scored.shape[1], device=scored.device) > last - max(1, scored.shape[1] // 10))
