"""Curves as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_loss_curve"]

_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e7eb"
_TRAIN, _HELD_OUT = "#7fb0d6", "#d1495b"
_BASELINES = ("#6c7a3f", "#7d5ba6", "#c98a2b", "#3c8c84")


def plot_loss_curve(
    path: str | Path,
    records: Sequence[Mapping[str, Any]],
    *,
    baselines: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Draw the training and held-out curves of a run, with baselines as horizontal lines.

    Args:
        path: the PNG file to write (replaced if it exists).
        records: lines of ``metrics.jsonl``: ``step`` with ``train/bits_per_byte`` (or ``train/loss``) and
            ``held_out/bits_per_byte`` (or ``held_out/loss``).
        baselines: name to value, in the unit of the curve.
        title: shown above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    unit = "bits_per_byte" if any("train/bits_per_byte" in r for r in records) else "loss"
    train = [(r["step"], r[f"train/{unit}"]) for r in records if f"train/{unit}" in r]
    held_out = [(r["step"], r[f"held_out/{unit}"]) for r in records if f"held_out/{unit}" in r]

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=0.8, alpha=0.55)
        axes.plot(*zip(*_smooth(train), strict=True), color=_TRAIN, linewidth=2.0, label="training")
    if held_out:
        style = {"color": _HELD_OUT, "linewidth": 2.0, "marker": "o", "markersize": 4}
        axes.plot(*zip(*held_out, strict=True), label="held out", **style)
        step, value = held_out[-1]
        axes.annotate(
            f"{value:.3f}", (step, value), xytext=(0, 9), textcoords="offset points", ha="right", color=_HELD_OUT,
            fontsize=9, fontweight="bold",
        )  # fmt: skip
    for (name, value), color in zip((baselines or {}).items(), _BASELINES * 8, strict=False):
        axes.axhline(value, color=color, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate(  # on the left, where the curves are still far above
            f"{name}  {value:.2f}", (0, value), xycoords=axes.get_yaxis_transform(), xytext=(4, 3),
            textcoords="offset points", ha="left", va="bottom", fontsize=8.5, color=color,
        )  # fmt: skip
    # The first steps fall steeply from the uniform guess; the axis follows what comes after them.
    late = [v for _, v in (_smooth(train)[len(train) // 20 :] + held_out)] + list((baselines or {}).values())
    if late:
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.08 * (high - low) - 0.02, high + 0.06 * (high - low) + 0.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser step", color=_MUTED)
    axes.set_ylabel("bits per byte" if unit == "bits_per_byte" else "loss (nats per token)", color=_MUTED)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_MUTED, length=0)
    if train or held_out:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right", ncols=2)
    figure.savefig(path)


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about a thirtieth of the curve, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    mean = weight = 0.0
    smoothed = []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed
