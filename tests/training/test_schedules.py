from __future__ import annotations

from itertools import pairwise

import pytest

from linnet.training import TrainingConfig, learning_rate


def rates(**options):
    config = TrainingConfig(**{"steps": 100, "lr": 1.0, "warmup_steps": 10, "final_lr": 0.1, **options})
    return [learning_rate(step, config) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warms_up_and_peaks(schedule):
    r = rates(schedule=schedule)
    assert r[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(r) == r[10] == 1.0


def test_cosine():
    r = rates()
    assert r[10:] == sorted(r[10:], reverse=True)
    assert r[-1] == pytest.approx(0.1)
    assert r[10 + 89 // 2] == pytest.approx(0.55, abs=0.02)


def test_wsd():
    r = rates(schedule="wsd", decay_share=0.25)
    assert r[10:76] == [1.0] * 66
    assert r[-1] == pytest.approx(0.1)
    steps = [a - b for a, b in pairwise(r[75:])]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_constant():
    assert rates(schedule="constant")[10:] == [1.0] * 90


def test_edges():
    assert rates(warmup_steps=0)[0] == 1.0
    assert learning_rate(0, TrainingConfig(steps=1, lr=1.0, warmup_steps=0)) == 1.0
    assert max(rates(warmup_steps=1000)) == pytest.approx(0.1)  # a run shorter than its warm-up


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected more than 0"),
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"final_lr": 1.5}, "final_lr: expected between 0 and 1"),
        ({"beta2": 1.0}, "beta2"),
        ({"minutes": 0.0}, "minutes"),
        ({"device": "gpu"}, "device"),
        ({"clip": float("nan")}, "clip"),
        ({"lr": "1e-3"}, "^lr: expected float, got '1e-3'"),
        ({"steps": 10.0}, "^steps: expected int, got 10.0"),
        ({"compile": "no"}, "^compile: expected bool, got 'no'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 10, **options})


def test_round_trip():
    config = TrainingConfig(steps=10, lr=1e-4, minutes=2.0)
    assert TrainingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown setting 'learning_rate'"):
        TrainingConfig.from_dict({"steps": 10, "learning_rate": 1.0})
