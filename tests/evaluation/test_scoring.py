from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from linnet.evaluation import accuracy
from linnet.tasks import build_task


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


def test_errors():
    task = build_task("flipflop(min_distance=500)")
    with pytest.raises(ValueError, match="hold no answer"):
        accuracy(solving(task), task, 16, rows=4, device="cpu")
    with pytest.raises(ValueError, match="rows: expected at least 1"):
        accuracy(solving(task), task, 16, rows=0, device="cpu")
