"""Every registered task: its solver is right on its own rows, which are what they say they are."""

from __future__ import annotations

import pytest
import torch

from linnet.evaluation.scoring import count_right
from linnet.tasks import IGNORE, Task, TaskData, build_task, register_task, tasks

CASES = [(name, options) for name, cls in tasks().items() for options in cls.examples]
IDS = [f"{name}-{i}" for name, cls in tasks().items() for i in range(len(cls.examples))]
ROWS = 6


def build(name: str, options: dict) -> Task:
    return build_task({"name": name, **options})


@pytest.fixture(params=CASES, ids=IDS)
def task(request: pytest.FixtureRequest) -> Task:
    return build(*request.param)


def length_of(task: Task) -> int:
    return task.lengths[0]


def test_solver_is_always_right(task: Task) -> None:
    sample = TaskData(task, length=length_of(task), batch_size=ROWS, seed=1).sample(0)
    answers = task.solve(sample.tokens)
    right, scored = count_right(torch.nn.functional.one_hot(answers, task.vocab_size).float(), sample)
    assert scored.any()
    assert torch.equal(right, scored)
    assert torch.equal(torch.where(sample.targets != IGNORE, answers, IGNORE), sample.targets)


def test_rows_are_well_formed(task: Task) -> None:
    tokens, targets, elements, _ = TaskData(task, length=length_of(task), batch_size=ROWS).sample(3)
    assert targets.dtype == torch.int64
    assert targets.shape == tokens.shape[:2]
    assert targets.max() < task.vocab_size
    assert targets[targets != IGNORE].min() >= 0
    if tokens.is_floating_point():
        assert tokens.shape[2] <= task.vocab_size
    else:
        assert tokens.dtype == torch.int64
        assert tokens.min() >= 0
        assert tokens.max() < task.vocab_size
    if elements is None:
        assert tokens.shape[1] == length_of(task)
    assert 0 < task.chance <= 1
    assert list(task.lengths) == sorted(task.lengths)


def test_streams(task: Task) -> None:
    """The same numbers give the same rows; steps, seeds and the test stream give others."""
    length = length_of(task)
    data = TaskData(task, length=length, batch_size=ROWS, seed=1)
    again = build(task.name, {}) if not task.examples[0] else None
    first = data.sample(5)
    assert torch.equal(first.tokens, TaskData(task, length=length, batch_size=ROWS, seed=1).sample(5).tokens)
    assert again is None or again.name == task.name
    others = [
        data.sample(6),
        TaskData(task, length=length, batch_size=ROWS, seed=2).sample(5),
        TaskData(task, length=length, batch_size=ROWS, seed=1, split="test").sample(5),
    ]
    for other in others:
        assert other.tokens.shape != first.tokens.shape or not torch.equal(other.tokens, first.tokens)
    parts = [data.batch(5, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([p.targets for p in parts]), first.targets)
    assert sum(p.count for p in parts) == int((first.targets != IGNORE).sum())


def test_what_follows_does_not_matter(task: Task) -> None:
    """Answers are due: a prefix settles them, so the label of a position never stands on what comes later."""
    if not task.causal:
        return
    sample = TaskData(task, length=length_of(task), batch_size=ROWS).sample(0)
    half = length_of(task) * 3 // 4
    scored = sample.targets[:, :half] != IGNORE
    if not scored.any():
        return
    answers = task.solve(sample.tokens[:, :half])
    assert torch.equal(answers[scored], sample.targets[:, :half][scored])


def test_guessing_is_at_chance(task: Task) -> None:
    """No constant answer beats chance by much."""
    data = TaskData(task, length=length_of(task), batch_size=64)
    targets = torch.cat([data.sample(i).targets.flatten() for i in range(2)])
    targets = targets[targets != IGNORE]
    best = int(targets.bincount().max()) / len(targets)
    assert best <= task.chance + 5 * (task.chance / len(targets)) ** 0.5 + 0.06


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "task: expected one of"),
        ("group(grup='S3')", "unknown option 'grup'; it takes group, generators"),
        ("mqar(pairs='4')", "task 'mqar': option pairs: expected int, got '4'"),
        ("mqar(fill='no')", "task 'mqar': option fill: expected bool, got 'no'"),
        ("group(group='Q8')", "group: expected Zn"),
        ("group(group='Z4', generators='swaps')", "generators: expected"),
        ("flipflop(p_write=0.7, p_read=0.4)", "p_write, p_read: expected probabilities"),
        ("mqar(vocab_size=8)", "vocab_size: expected an even number above 8"),
        ("mqar(tokens_per_pair=2)", "tokens_per_pair: expected at least 4"),
        ("palindrome(vocab_size=2)", "vocab_size: expected at least 3"),
        ("stacks(stacks=0)", "stacks: expected at least 1"),
        ("stacks(elements=1)", "elements: expected at least 2"),
        ("selectivbench(target='class')", "target: expected 'state' or 'symbol'"),
        ("selectivbench(gap='x')", "gap: expected a number of blanks"),
        ("selectivbench(distractors=0.1)", "distractors: expected gap='0'"),
        ("group(", "task spec: expected"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_task(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length, batch_size: expected at least 1"),
        ({"length": 8, "split": "dev"}, "split: expected"),
        ({"length": 8, "batch_size": 0}, "expected at least 1"),
    ],
)
def test_bad_data(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskData(build_task("parity"), **options)


def test_batches() -> None:
    task = build_task("parity")
    with pytest.raises(ValueError, match="cannot be divided into 3"):
        TaskData(task, length=8, batch_size=8).batch(0, 0, 3)
    data = TaskData(task, length=[4, 8], batch_size=2)
    assert [data.batch(i).tokens.shape[1] for i in range(4)] == [4, 8, 4, 8]


@pytest.mark.parametrize(
    ("spec", "length", "message"),
    [
        ("mqar", 8, "length: expected at least 16"),
        ("palindrome", 9, "length: expected an even number"),
        ("stacks", 4, "length: expected at least 5"),
    ],
)
def test_lengths_that_a_task_has_no_rows_of(spec: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskData(build_task(spec), length=length).sample(0)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_task("parity", "again")(Task)
