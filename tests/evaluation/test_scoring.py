from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from linnet.evaluation import accuracy, build_exercise, divergence
from linnet.tasks import IGNORE, TaskData, build_task


def solving(task, wrong=None):
    """A model that is always right, but for positions where ``wrong`` holds."""

    def model(tokens):
        answers = task.solve(tokens)
        if wrong is not None:
            answers = torch.where(wrong(tokens), (answers + 1) % task.vocab_size, answers)
        return SimpleNamespace(logits=F.one_hot(answers, task.vocab_size).float())

    return model


@pytest.mark.parametrize("spec", ["parity", "recall", "flipflop", "selectivbench(grammar_seed=5)"])
def test_a_perfect_model(spec):
    task = build_task(spec)
    found = accuracy(solving(task), task, 40, rows=20, device="cpu")
    assert found[:3] == (1.0, 1.0, 1.0)
    assert found.scored > 0


def test_shares():
    task = build_task("parity")
    half = accuracy(solving(task, lambda x: torch.arange(x.shape[1]) % 2 == 0), task, 40, rows=10, device="cpu")
    assert half.answers == 0.5
    assert half.rows == 0
    assert half.scored == 400
    late = accuracy(solving(task, lambda x: torch.arange(x.shape[1]) < 36), task, 40, rows=10, device="cpu")
    assert late.late == 1
    assert late.answers == pytest.approx(0.1)


def test_as_many_rows_as_asked_for(monkeypatch):
    monkeypatch.setattr("linnet.evaluation.scoring._POSITIONS", 100)
    task = build_task("parity(dense=False)")
    assert accuracy(solving(task), task, 40, rows=7, device="cpu").scored == 7


@pytest.mark.parametrize("options", ["gap='1-3', noise=0.2", "gap='0', distractors=0.3, quiet=5"])
def test_divergence(options):
    """0 for the true odds, what is left to the widest entropy for none; the targets cost the entropy of the odds."""
    exercise = build_exercise(f"selectivbench(letters=6, target='symbol', {options})")
    task = exercise.task
    rows = iter([TaskData(task, length=40, batch_size=20, split="test").sample(0)] * 3)

    def knowing(tokens):
        sample = next(rows)
        assert torch.equal(sample.tokens, tokens)
        return SimpleNamespace(logits=F.pad((sample.probabilities + 1e-30).log(), (0, 3), value=-70.0))  # more ids

    def blind(tokens):
        return SimpleNamespace(logits=torch.zeros(*tokens.shape[:2], 7))

    best, worst = (divergence(model, task, 40, rows=20, device="cpu") for model in (knowing, blind))
    assert best.divergence == pytest.approx(0, abs=1e-6)
    assert best.late == pytest.approx(0, abs=1e-6)
    assert best[2:] == worst[2:]
    assert worst.divergence == pytest.approx(math.log(7) - worst.entropy, rel=1e-5)
    sample = next(rows)
    scored = sample.targets != IGNORE
    assert best.scored == int(scored.sum())
    cost = F.cross_entropy(knowing(sample.tokens).logits[scored], sample.targets[scored])
    assert cost == pytest.approx(best.entropy, rel=0.1)
    assert (exercise.score, exercise.rising, exercise.levels, exercise.vocab_size) == ("divergence", False, {}, 7)
    with pytest.raises(ValueError, match="task: expected one whose answers are drawn by chance, got 'parity'"):
        divergence(blind, build_task("parity"), 40, rows=20, device="cpu")


def test_errors():
    task = build_task("flipflop(min_distance=500)")
    with pytest.raises(ValueError, match="hold no answer"):
        accuracy(solving(task), task, 16, rows=4, device="cpu")
    with pytest.raises(ValueError, match="rows: expected at least 1"):
        accuracy(solving(task), task, 16, rows=0, device="cpu")
