"""What every synthetic task shares: samples as a pure function of a seed, an exact solver, the registry, batches.

A task gives rows of tokens and, at the scored positions, what a model must answer after reading up to there. Nothing is
downloaded and nothing is stored: a row is drawn when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from linnet.mixers import parse_spec
from linnet.ops.core import check_choice, check_options, import_modules

from .text import Batch

__all__ = ["IGNORE", "Sample", "Task", "TaskData", "build_task", "get_task", "register_task", "seeded", "tasks"]

IGNORE = -100
"""The target of a position that no loss and no score counts."""

T = TypeVar("T", bound="Task")
_tasks: dict[str, type[Task]] = {}


class Sample(NamedTuple):
    """Rows of a task.

    Attributes:
        tokens: int64 ``[B, T]``; or floating ``[B, T, W]``, each position a mixture of the first W tokens (several at
            once, noise, nothing).
        targets: int64 ``[B, T]``: the answer after reading the position; -100 is not scored.
        elements: int64 ``[B, T]`` or None: positions of a row with the same number give one answer together, by the
            sum of their probabilities. None: every position answers for itself.
        probabilities: float ``[B, T, V]`` or None: how likely each answer was, where ``targets`` were drawn by chance.
    """

    tokens: Tensor
    targets: Tensor
    elements: Tensor | None = None
    probabilities: Tensor | None = None


class Task:
    """A synthetic task. Subclasses take keyword-only options and are registered by name.

    Attributes:
        name: in the registry.
        source: paper and definition.
        lengths: tokens of a row in training, then lengths to test at (ascending).
        vocab_size: token ids and answers are below it.
        chance: accuracy of the best guess that has not read the row.
        compressed: whether the answers at all positions are read out of the output at the last one, by a
            :class:`linnet.models.Compressor`.
        causal: whether what was read up to a scored position settles its answer (what follows does not matter).
        drawn: whether answers are drawn by chance, with the ``probabilities`` that samples then hold: a model is judged
            by its divergence from those in place of its accuracy.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    lengths: tuple[int, ...] = (64, 128, 256)
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    compressed: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    drawn: bool = False
    vocab_size: int
    chance: float

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        """Draw rows of exactly ``length`` positions; all randomness comes from ``generator``.

        Raises:
            ValueError: the task has no rows of that length.
        """
        raise NotImplementedError

    def solve(self, tokens: Tensor) -> Tensor:
        """The right answer at every scored position of a sample's ``tokens``, int64 ``[B, T]`` (anything elsewhere)."""
        raise NotImplementedError

    def expect(self, holds: bool, name: str, what: str, value: Any) -> None:
        """Raise the ValueError of an option or length that does not fit."""
        if not holds:
            raise ValueError(f"{name}: expected {what} for the task {self.name!r}, got {value!r}")


def register_task(name: str, source: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: register a task under ``name``; the tests then run its solver on its own samples.

    Args:
        source: where the definition comes from.
    """

    def add(cls: type[T]) -> type[T]:
        if name in _tasks:
            raise ValueError(f"task {name!r} is already registered")
        cls.name, cls.source = name, source
        _tasks[name] = cls
        return cls

    return add


def tasks() -> dict[str, type[Task]]:
    """All registered tasks by name."""
    import_modules("linnet.tasks")
    return dict(sorted(_tasks.items()))


def get_task(name: str) -> type[Task]:
    """The task class called ``name``; ValueError with the known names otherwise."""
    table = tasks()
    check_choice("task", name, table)
    return table[name]


def build_task(spec: str | Mapping[str, Any]) -> Task:
    """The task that a spec describes: a name, a name with options (``"mqar(pairs=4)"``) or a mapping with a ``name``.

    Raises:
        ValueError: unknown names and options, with the known ones; an option of another type than annotated.
    """
    name, options = parse_spec(spec, "task")
    cls = get_task(name)
    check_options(f"task {name!r}", cls, options)
    return cls(**options)


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all the numbers; different numbers give independent streams."""
    state = np.random.SeedSequence([*numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


class TaskData:
    """Batches of a task for the training loop and for tests; each is a pure function of its step.

    Args:
        task: what to draw.
        length: positions of a row; a list is gone through again and again, a length a step.
        batch_size: rows of a batch.
        seed: which rows.
        split: "train" or "test": streams that have nothing to do with each other.

    Raises:
        ValueError: an argument outside its range, or rows that the task does not have.
    """

    bytes_per_token: float | None = None

    def __init__(
        self, task: Task, *, length: int | Sequence[int], batch_size: int = 32, seed: int = 0, split: str = "train"
    ):
        self.lengths = [length] if isinstance(length, int) else list(length)
        if not self.lengths or min(self.lengths) < 1 or batch_size < 1:
            raise ValueError(f"length, batch_size: expected at least 1, got {length}, {batch_size}")
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        self.task, self.batch_size, self.seed, self.split = task, batch_size, seed, split

    def position(self, step: int) -> tuple[int, int]:
        """(0, step): the data never repeats."""
        return 0, step

    def sample(self, step: int) -> Sample:
        """All rows of a step."""
        generator = seeded(self.seed, int(self.split == "test"), step)
        return self.task.sample(self.batch_size, self.lengths[step % len(self.lengths)], generator)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Micro-batch ``part`` of ``parts`` of a step.

        Raises:
            ValueError: the batch cannot be divided into that many parts.
        """
        if self.batch_size % parts:
            raise ValueError(f"batch_size: {self.batch_size} rows cannot be divided into {parts} micro-batches")
        rows = slice(part * self.batch_size // parts, (part + 1) * self.batch_size // parts)
        tokens, targets, *_ = self.sample(step)
        tokens, targets = tokens[rows], targets[rows]
        return Batch(tokens, targets, None, int((targets != IGNORE).sum()))
