from __future__ import annotations

import math

import pytest

from linnet.evaluation import plot_curves, plot_loss_curve, plot_speed, plots


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


def timed(impl, ms, **more):
    shape = {"B": 1, "T": 8, "H": 2, "K": 4, "V": 4, "segments": ""}
    return {"op": "gla", "pass": "fwd", "impl": impl, "ms": ms, "limit_ms": 0.5, **shape, **more}


@pytest.mark.parametrize(
    "rows",
    [
        [timed("linnet", "1.5"), timed("fla", 3.0), timed("fla", "", T=9), timed("linnet", 2.0, segments="3")],
        [timed("linnet", T + 1.0, T=T, **{"pass": p}) for T in range(12) for p in ("fwd", "fwdbwd")],
        [timed(impl, T + 1.0, T=T, segments=T // 9) for T in range(1, 12) for impl in ("linnet", "fla", "other")],
        [timed("linnet", 1.0, T=4), *(timed("torch", T, op="attention", T=T) for T in (1, 4))],
        [timed("gla-1.3b", 4.0, op="decode", H="", K="", V="", limit_ms="")],
        [timed("linnet", None)],
        [],
    ],
)
def test_draws_times(tmp_path, rows):
    plot_speed(tmp_path / "speed.png", rows)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def watch(monkeypatch):
    """A list in which the axes of plots will be."""
    shown = []
    canvas = plots._canvas

    def kept(*words):
        shown.append(canvas(*words)[1])
        return shown[0].figure, shown[0]

    monkeypatch.setattr(plots, "_canvas", kept)
    return shown


@pytest.mark.parametrize(
    ("at", "labels"), [([1, 2, 3], "1 2 3"), ([16, 48, 32], "16 32 48"), ([1, 2, 100], None), ([7], None)]
)
def test_few_points_have_the_ticks(tmp_path, monkeypatch, at, labels):
    """A tick at every point where there is room, as on a logarithmic axis; else the usual ones."""
    shown = watch(monkeypatch)
    plot_curves(tmp_path / "curves.png", {"a": [(x, 0.5) for x in at]}, x="x", y="y")
    found = " ".join(label.get_text() for label in shown[0].get_xticklabels())
    assert (found == labels) == (labels is not None)


def test_no_two_curves_look_the_same(tmp_path, monkeypatch):
    """Beyond the colours of the palette the lines are dashed, so that a plot of many mixers can be read."""
    shown = watch(monkeypatch)
    plot_curves(tmp_path / "curves.png", {str(i): [(1, i), (2, i)] for i in range(25)}, x="x", y="y")
    assert len({(line.get_color(), line.get_linestyle()) for line in shown[0].get_lines()}) == 25
