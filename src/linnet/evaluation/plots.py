"""Curves as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_loss_curve", "plot_speed"]

_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e7eb"
_TRAIN, _HELD_OUT = "#7fb0d6", "#d1495b"
_OURS, _PEERS = "#d1495b", ("#3b76a8", "#6c7a3f", "#7d5ba6", "#c98a2b", "#3c8c84")
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


def plot_speed(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the times of `linnet bench`: a panel an op and pass, shapes along x, milliseconds on a log axis, one
    colour an implementation, and the hardware limit as a line.

    Args:
        path: the PNG file to write (replaced if it exists).
        rows: lines of the CSV file, as text or numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    timed = [row for row in rows if row["ms"]]
    panels = list(dict.fromkeys((row["op"], row["pass"]) for row in timed))
    ops, passes = (list(dict.fromkeys(panel[i] for panel in panels)) for i in (0, 1))
    impls = sorted(dict.fromkeys(row["impl"] for row in timed), key=lambda name: name != "linnet")
    colors = {name: _OURS if name == "linnet" else _PEERS[i % len(_PEERS)] for i, name in enumerate(impls)}
    figure = Figure(
        figsize=(1.2 + 3.2 * max(1, len(ops)), 1.4 + 2.7 * max(1, len(passes))), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, len(passes)), max(1, len(ops)), squeeze=False)
    for i, name in enumerate(passes):
        for j, op in enumerate(ops):
            axes = grid[i][j]
            mine = [row for row in timed if row["op"] == op and row["pass"] == name]
            places = {shape: x for x, shape in enumerate(dict.fromkeys(_shape(row) for row in mine))}
            for impl in impls:
                at = [(places[_shape(row)], float(row["ms"])) for row in mine if row["impl"] == impl]
                if at:
                    bold = {"zorder": 3, "s": 34} if impl == "linnet" else {"s": 18}
                    axes.scatter(*zip(*at, strict=True), color=colors[impl], label=impl, **bold)
            floor = sorted({(places[_shape(row)], float(row["limit_ms"])) for row in mine if row["limit_ms"]})
            if floor:
                axes.plot(*zip(*floor, strict=True), "_", color=_INK, markersize=9, label="limit")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{op}, {name}", loc="left", color=_INK, fontsize=9, fontweight="bold")
            few = len(places) <= 8
            axes.set_xticks(
                range(len(places)) if few else [], list(places) if few else [], fontsize=6, rotation=30, ha="right"
            )
            axes.grid(axis="y", color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(_GRID)
            axes.tick_params(colors=_MUTED, which="both", length=0, labelsize=7)
            axes.margins(x=0.08, y=0.1)
            if j == 0:
                axes.set_ylabel("ms", color=_MUTED)
    named = {}
    for axes in grid.flat:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        style = {"frameon": False, "labelcolor": _INK, "fontsize": 8}
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=8, **style)
    figure.savefig(path)


def _shape(row: Mapping[str, Any]) -> str:
    sizes = "×".join(str(row[name]) for name in ("B", "T", "H", "K", "V") if str(row[name]))
    return f"{sizes} in {row['segments']}" if row["segments"] else sizes


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about a thirtieth of the curve, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    mean = weight = 0.0
    smoothed = []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed
