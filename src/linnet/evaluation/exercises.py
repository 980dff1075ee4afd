"""What models are compared on: rows to train with, and a test of what was learned. A synthetic task is one, a text is
another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from linnet.mixers import parse_spec
from linnet.ops.core import check_options
from linnet.tasks import (
    Corpus,
    Task,
    TaskData,
    TextData,
    Tokenizer,
    build_task,
    load_corpus,
    make_tokenizer,
)

from .language import by_position
from .scoring import accuracy, divergence

__all__ = ["DrawnExercise", "Exercise", "TaskExercise", "TextExercise", "build_exercise"]


class Exercise(ABC):
    """What models are trained and tested on.

    Attributes:
        summary, source: what it is and where its definition comes from, for people.
        lengths: positions of a row in training, then lengths to test at.
        vocab_size: ids and answers are below it.
        compressed: the models are :class:`linnet.models.Compressor`.
        score: the score of a test that counts: a key of what :meth:`test` returns.
        also: a second one.
        names: what the two are called.
        rising: whether a higher score is the better one.
        levels: name to score, for a line in the plots.
        limits: lowest and highest score shown in plots; None: what the curves need.
    """

    summary: str
    source: str
    lengths: Sequence[int]
    vocab_size: int
    compressed: bool
    score: str
    also: str
    names: tuple[str, str]
    rising: bool
    levels: Mapping[str, float] = MappingProxyType({})
    limits: tuple[float, float] | None = None

    @abstractmethod
    def batches(self, length: int | Sequence[int], batch_size: int, seed: int) -> Any:
        """The training rows: what :func:`linnet.training.train` takes as data."""

    @abstractmethod
    def check(self, length: int) -> None:
        """Raise the ValueError of a length that cannot be tested at."""

    @abstractmethod
    def test(self, model: Any, length: int, rows: int) -> dict[str, Any]:
        """Scores of a model in evaluation mode on rows it was not trained on."""


class TaskExercise(Exercise):
    """A synthetic task; the score is the accuracy. ``test`` returns the fields of
    :class:`linnet.evaluation.Accuracy`."""

    score, also, names, rising = "answers", "rows", ("accuracy", "whole rows"), True
    limits = (-0.02, 1.03)

    def __init__(self, task: Task):
        self.task, self.source, self.lengths = task, task.source, task.lengths
        self.summary = (task.__doc__ or "").strip().split("\n\n")[0].replace("``", "").replace("\n", " ")
        self.vocab_size, self.compressed, self.levels = task.vocab_size, task.compressed, {"guessing": task.chance}

    def batches(self, length: int | Sequence[int], batch_size: int, seed: int) -> TaskData:
        return TaskData(self.task, length=length, batch_size=batch_size, seed=seed)

    def check(self, length: int) -> None:
        self.batches(length, 1, 0).sample(0)

    def test(self, model: Any, length: int, rows: int) -> dict[str, Any]:
        return accuracy(model, self.task, length, rows=rows)._asdict()


class DrawnExercise(TaskExercise):
    """A synthetic task whose answers are drawn by chance; the score is the divergence from their probabilities.
    ``test`` returns the fields of :class:`linnet.evaluation.Divergence`."""

    score, also, names, rising = "divergence", "late", ("divergence in nats", "last tenth"), False
    limits = None

    def __init__(self, task: Task):
        super().__init__(task)
        self.levels = {}

    def test(self, model: Any, length: int, rows: int) -> dict[str, Any]:
        return divergence(model, self.task, length, rows=rows)._asdict()


class TextExercise(Exercise):
    """Next-token prediction on a text; the score is bits per byte of its held-out part, in windows that begin with an
    empty state. ``test`` returns their mean as ``bits_per_byte``, that of the last half of a window as ``late``, and
    ``by_position``: [tokens up to here, bits per byte] for stretches of a window that double.

    Args:
        data: as in :func:`linnet.tasks.load_corpus`.
        tokenizer: as in :func:`linnet.tasks.make_tokenizer`; learned on the text where it is learned.
        held_out: share of the documents that is held out.
        max_bytes: most bytes read.
    """

    summary = "Next-token prediction on a text; bits per byte of its held-out part, from an empty state."
    compressed = False
    score, also, names, rising = "bits_per_byte", "late", ("bits per byte", "last half"), False
    lengths = (256, 512, 1024, 2048)

    def __init__(
        self,
        *,
        data: str = "stdlib",
        tokenizer: str = "byte",
        held_out: float = 0.05,
        max_bytes: int | None = None,
    ):
        self.corpus, self.tokenizer = _read(data, tokenizer, held_out, max_bytes)
        self.source, self.vocab_size = self.corpus.name, self.tokenizer.vocab_size
        whole = 1 << 30  # no document is longer
        self.ids = TextData(
            self.corpus, self.tokenizer, context=whole, batch_tokens=whole, packing="documents"
        ).held_out

    def batches(self, length: int | Sequence[int], batch_size: int, seed: int) -> TextData:
        if not isinstance(length, int):
            raise ValueError(f"length: expected one number of tokens for a text, got {list(length)}")
        size = batch_size * length
        return TextData(self.corpus, self.tokenizer, context=length, batch_tokens=size, seed=seed)

    def check(self, length: int) -> None:
        if not 2 <= length < len(self.ids):
            raise ValueError(f"length: expected 2 to {len(self.ids) - 1} tokens of held-out text, got {length}")

    def test(self, model: Any, length: int, rows: int) -> dict[str, Any]:
        found = by_position(model, self.ids, self.corpus.held_out_bytes, length=length, rows=rows)
        mean = sum(b.bits_per_byte * b.tokens for b in found) / sum(b.tokens for b in found)
        places = [[b.last, round(b.bits_per_byte, 5)] for b in found]
        return {"bits_per_byte": mean, "late": found[-1].bits_per_byte, "by_position": places}


@cache
def _read(data: str, tokenizer: str, held_out: float, max_bytes: int | None) -> tuple[Corpus, Tokenizer]:
    corpus = load_corpus(data, held_out=held_out, max_bytes=max_bytes)
    return corpus, make_tokenizer(tokenizer, corpus.train)


def build_exercise(spec: str) -> Exercise:
    """The exercise that a spec describes: ``"text"``, with options as :class:`TextExercise` takes them
    (``"text(data='notes.txt', tokenizer='bpe:4096')"``), or a task.

    Raises:
        ValueError: an unknown task or option.
        FileNotFoundError: there is no such text.
    """
    name, options = parse_spec(spec, "task")
    if name != "text":
        task = build_task(spec)
        return DrawnExercise(task) if task.drawn else TaskExercise(task)
    check_options("task 'text'", TextExercise, options)
    return TextExercise(**options)
