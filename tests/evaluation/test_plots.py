from __future__ import annotations

import math

import pytest

from linnet.evaluation import plot_loss_curve


def records(unit):
    lines = [{"step": i, f"train/{unit}": 8 * math.exp(-i / 20) + 2} for i in range(1, 101)]
    return lines + [{"step": i, f"held_out/{unit}": 8 * math.exp(-i / 20) + 2.1} for i in range(20, 101, 20)]


@pytest.mark.parametrize(
    ("lines", "baselines"),
    [
        (records("bits_per_byte"), {"gzip -9": 2.0, "xz -9e": 1.8, "3-gram": 2.6}),
        (records("loss"), None),
        (records("bits_per_byte")[:1], {}),
        ([], {"gzip -9": 2.0}),
        ([], None),
    ],
)
def test_draws(tmp_path, lines, baselines):
    file = tmp_path / "loss.png"
    plot_loss_curve(file, lines, baselines=baselines, title="a run")
    assert file.read_bytes().startswith(b"\x89PNG")
    plot_loss_curve(file, lines)  # replaces
