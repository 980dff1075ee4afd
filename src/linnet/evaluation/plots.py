"""Curves as PNG files, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

__all__ = ["plot_curves", "plot_dissection", "plot_loss_curve", "plot_speed"]

_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e7eb"
_TRAIN, _HELD_OUT = "#7fb0d6", "#d1495b"
_OURS, _PEERS = "#d1495b", ("#3b76a8", "#6c7a3f", "#7d5ba6", "#c98a2b", "#3c8c84")
_BASELINES = ("#6c7a3f", "#7d5ba6", "#c98a2b", "#3c8c84")
_CURVES = ("#1f77b4", "#d1495b", "#3c8c84", "#c98a2b", "#7d5ba6", "#6c7a3f", "#8c5a3c", "#5b6770", "#b0569b", "#2f9e44")


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
    from matplotlib.ticker import EngFormatter, MaxNLocator

    unit = "bits_per_byte" if any("train/bits_per_byte" in r for r in records) else "loss"
    train = [(r["step"], r[f"train/{unit}"]) for r in records if f"train/{unit}" in r]
    held_out = [(r["step"], r[f"held_out/{unit}"]) for r in records if f"held_out/{unit}" in r]

    figure, axes = _canvas(
        "optimiser step", "bits per byte" if unit == "bits_per_byte" else "loss (nats per token)", title
    )
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
    for i, ((name, value), color) in enumerate(zip((baselines or {}).items(), _BASELINES * 8, strict=False)):
        axes.axhline(value, color=color, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate(  # on the left, where the curves are still far above, side by side: values may be close
            f"{name}  {value:.2f}", (0.15 * i, value), xycoords=axes.get_yaxis_transform(), xytext=(4, 3),
            textcoords="offset points", ha="left", va="bottom", fontsize=8.5, color=color,
        )  # fmt: skip
    # The first steps fall steeply from the uniform guess; the axis follows what comes after them.
    late = [v for _, v in (_smooth(train)[len(train) // 20 :] + held_out)] + list((baselines or {}).values())
    if late:
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.08 * (high - low) - 0.02, high + 0.06 * (high - low) + 0.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if train or held_out:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right", ncols=2)
    figure.savefig(path)


def plot_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw labelled curves.

    Args:
        path: the PNG file to write (replaced if it exists).
        curves: label to (x, y) points.
        x, y: what the axes show.
        title: shown above.
        bands: label to the (lowest, highest) y at each point of its curve.
        levels: label to a height, drawn as a dashed line.
        log_x: logarithmic x axis, base 2, with a tick at every point; a linear one has them where points are few.
        limits: lowest and highest y shown (default: what the curves need).
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas(x, y, title)
    styles = cycle(product(("-", "--", ":"), zip(_CURVES, "osD^vP*X<>", strict=True)))
    for (label, points), (line, (color, marker)) in zip(curves.items(), styles, strict=False):
        at = [point[0] for point in points]
        style = {"color": color, "linestyle": line, "linewidth": 1.8, "marker": marker, "markersize": 4.5}
        axes.plot(at, [p[1] for p in points], label=label, **style)
        if bands and label in bands:
            low, high = zip(*bands[label], strict=True)
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    for label, value in (levels or {}).items():
        axes.axhline(value, color=_MUTED, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate(
            label, (1, value), xycoords=axes.get_yaxis_transform(), xytext=(-2, 3), textcoords="offset points",
            ha="right", va="bottom", fontsize=8.5, color=_MUTED,
        )  # fmt: skip
    ticks = sorted({point[0] for points in curves.values() for point in points})
    if log_x and ticks:
        axes.set_xscale("log", base=2)
    if ticks and (log_x or _apart(ticks)):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    elif all(float(point[0]).is_integer() for points in curves.values() for point in points):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if limits is not None:
        axes.set_ylim(*limits)
    if curves:
        columns = 2 if max(map(len, curves)) <= 50 else 1
        figure.set_figheight(figure.get_figheight() + 0.2 * max(0, len(curves) // columns - 4))
        room = 3.0 if len(curves) > len(_CURVES) else None  # dashes beside a marker need it
        layout = {"loc": "outside lower left", "ncols": columns, "handlelength": room}
        figure.legend(frameon=False, labelcolor=_INK, fontsize=8.5, **layout)
    figure.savefig(path)


def _apart(places: list[float]) -> bool:
    """Whether the labels of all places find room on a linear axis."""
    return min((b - a for a, b in pairwise(places)), default=0) * 12 >= places[-1] - places[0] > 0


def plot_dissection(path: str | Path, parts: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Draw what :func:`linnet.evaluation.dissect` found: a row an engine call, with who reads whom, how far back, how
    much of the past is carried over each cut, and the eigenvalues of the transitions.

    Args:
        path: the PNG file to write (replaced if it exists).
        parts: the linear ones, as ``LinearPart`` turned into a mapping.
        title: shown above.

    Raises:
        ValueError: no parts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    if not parts:
        raise ValueError("parts: expected at least one linear engine call, got none")
    figure = Figure(figsize=(13, 0.5 + 3.1 * len(parts)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=11, fontweight="bold")
    for part, (mixing, lags, cuts, plane) in zip(parts, figure.subplots(len(parts), 4, squeeze=False), strict=True):
        mixing.imshow(part["mixing"], cmap="Blues", interpolation="nearest")
        _label(mixing, "token read", "token reading", f"{part['engine']}: who reads whom")
        lags.set_yscale("log")
        lags.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        lags.yaxis.set_major_formatter("{x:g}")
        lags.yaxis.set_minor_formatter(NullFormatter())
        lags.plot(part["lags"], color=_HELD_OUT, linewidth=1.8, marker="o", markersize=3)
        _label(lags, "tokens ago", "|Phi|", f"memory: {part['reach']:.1f} tokens on average")
        at = range(1, len(part["ranks"]) + 1)
        cuts.plot(at, part["full"], color=_MUTED, linewidth=1.1, linestyle=(0, (5, 3)), label="possible")
        cuts.plot(at, part["ranks"], color=_TRAIN, linewidth=1.8, marker="o", markersize=3, label="exact")
        cuts.plot(at, part["used"], color=_HELD_OUT, linewidth=1.8, marker="s", markersize=3, label="above 1%")
        cuts.legend(frameon=False, labelcolor=_INK, fontsize=8)
        _label(cuts, "cut before token", "rank", "numbers carried over a cut")
        turn = [2 * math.pi * i / 180 for i in range(181)]
        plane.plot([math.cos(a) for a in turn], [math.sin(a) for a in turn], color=_GRID, linewidth=1.2)
        plane.axhline(0, color=_GRID, linewidth=0.8)
        plane.axvline(0, color=_GRID, linewidth=0.8)
        plane.scatter(*zip(*part["eigenvalues"] or [(math.nan, math.nan)], strict=True), s=9, color=_TRAIN, alpha=0.6)
        plane.set_aspect("equal")
        plane.set_xticks([-1, 0, 1])
        plane.set_yticks([-1, 0, 1])
        _label(plane, "real", "imaginary", "eigenvalues of the transitions")
    figure.savefig(path)


def _label(axes: Any, x: str, y: str, title: str) -> None:
    """Names and colours of one of several panels."""
    axes.set_xlabel(x, color=_MUTED, fontsize=8)
    axes.set_ylabel(y, color=_MUTED, fontsize=8)
    axes.set_title(title, loc="left", color=_INK, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", colors=_MUTED, length=0, labelsize=7)


def _canvas(x: str, y: str, title: str) -> tuple[Any, Any]:
    """A figure and its axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=_MUTED)
    axes.set_ylabel(y, color=_MUTED)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_MUTED, length=0)
    return figure, axes


def plot_speed(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the times of `linnet bench`: a panel an op and pass, shapes along x, milliseconds on a log axis, one
    colour an implementation, and the hardware limit as a line. Of many shapes, how many times as fast as the fastest
    peer linnet is, over the length. Of softmax attention among other ops, a panel a pass with a line an op, over the
    length.

    Args:
        path: the PNG file to write (replaced if it exists).
        rows: lines of the CSV file, as text or numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["ms"]]
    ops, passes = (list(dict.fromkeys(row[name] for row in timed)) for name in ("op", "pass"))
    if len(ops) > 1 and "attention" in ops:
        ops, draw = ["ops"], _draw_lengths
    elif max((len({_shape(row) for row in timed if row["op"] == op}) for op in ops), default=0) > _FEW:
        draw = _draw_ratios
    else:
        draw = _draw_times
    panel = (4.6, 3.6) if draw is _draw_lengths else (3.2, 2.7)
    wide, high = (max(1, len(names)) for names in (ops, passes))
    if draw is _draw_lengths:
        wide, high = high, wide
    figure = Figure(figsize=(1.2 + panel[0] * wide, 1.4 + panel[1] * high), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(high, wide, squeeze=False)
    for i, name in enumerate(passes):
        for j, op in enumerate(ops):
            axes = grid[j][i] if draw is _draw_lengths else grid[i][j]
            axes.set_yscale("log")
            mine = [row for row in timed if row["pass"] == name and op in (row["op"], "ops")]
            unit = draw(axes, mine, timed)
            axes.set_title(
                name if draw is _draw_lengths else f"{op}, {name}",
                loc="left",
                color=_INK,
                fontsize=9,
                fontweight="bold",
            )
            axes.grid(axis="y", color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(_GRID)
            axes.tick_params(colors=_MUTED, which="both", length=0, labelsize=7)
            axes.margins(x=0.08, y=0.1)
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel(unit, color=_MUTED)
    named = {}
    for axes in grid.flat:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        columns = max(1, min(8, int(figure.get_figwidth() // 2)))  # two inches hold the longest name
        style = {"frameon": False, "labelcolor": _INK, "fontsize": 8, "ncols": columns}
        figure.legend(named.values(), named.keys(), loc="outside lower center", **style)
    figure.savefig(path)


_FEW = 8  # shapes that can be named along an axis


def _draw_times(axes: Any, mine: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]]) -> str:
    impls = sorted(dict.fromkeys(row["impl"] for row in timed), key=lambda name: name != "linnet")
    colors = {name: _OURS if name == "linnet" else _PEERS[i % len(_PEERS)] for i, name in enumerate(impls)}
    places = {shape: x for x, shape in enumerate(dict.fromkeys(_shape(row) for row in mine))}
    for impl in impls:
        at = [(places[_shape(row)], float(row["ms"])) for row in mine if row["impl"] == impl]
        if at:
            bold = {"zorder": 3, "s": 34} if impl == "linnet" else {"s": 18}
            axes.scatter(*zip(*at, strict=True), color=colors[impl], label=impl, **bold)
    floor = sorted({(places[_shape(row)], float(row["limit_ms"])) for row in mine if row["limit_ms"]})
    if floor:
        axes.plot(*zip(*floor, strict=True), "_", color=_INK, markersize=9, label="limit")
    _plain_log(axes)
    axes.set_xticks(range(len(places)), list(places), fontsize=6, rotation=30, ha="right")
    return "ms"


def _draw_ratios(axes: Any, mine: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]]) -> str:
    def place(row: Mapping[str, Any]) -> str:
        return "packed" if row["segments"] else f"{int(row['T']) / 1024:g}k"

    def sizes(row: Mapping[str, Any]) -> str:
        return f"K, V = {row['K']}, {row['V']}"

    lengths = sorted({int(row["T"]) for row in timed if not row["segments"]})
    places = {f"{T / 1024:g}k": x for x, T in enumerate(lengths)} | {"packed": len(lengths)}
    kinds = sorted({sizes(row) for row in timed}, key=lambda name: [int(n) for n in name[7:].split(", ")])
    shapes: dict[str, list[Mapping[str, Any]]] = {}
    for row in mine:
        shapes.setdefault(_shape(row), []).append(row)
    for kind, color in zip(kinds, _CURVES * 9, strict=False):
        points = []
        for rivals in shapes.values():
            own = [float(row["ms"]) for row in rivals if row["impl"] == "linnet"]
            theirs = [float(row["ms"]) for row in rivals if row["impl"] != "linnet"]
            if own and theirs and sizes(rivals[0]) == kind:
                heads = math.log2(int(rivals[0]["H"])) / 8 - 0.45  # few heads on the left
                points.append((places[place(rivals[0])] + heads, min(theirs) / own[0]))
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, s=16, label=kind)
    axes.axhline(1, color=_INK, linewidth=1)
    _plain_log(axes, (1, 1.5, 2, 3, 5))
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xlim(-0.6, len(places) - 0.4)
    return "times as fast as the fastest peer"


def _draw_lengths(axes: Any, mine: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]]) -> str:
    colors = dict(zip(dict.fromkeys(row["op"] for row in timed if row["op"] != "attention"), _CURVES * 9, strict=False))
    for op in dict.fromkeys(row["op"] for row in mine):
        best: dict[int, float] = {}
        for row in mine:
            if row["op"] == op and (row["impl"] != "linnet") == (op == "attention"):
                best[int(row["T"])] = min(float(row["ms"]), best.get(int(row["T"]), math.inf))
        softmax = {"color": _INK, "linestyle": "--", "label": "softmax attention, the fastest of PyTorch"}
        style = softmax if op == "attention" else {"color": colors[op], "label": op}
        axes.plot(*zip(*sorted(best.items()), strict=True), marker="o", markersize=3, linewidth=1.6, **style)
    _plain_log(axes)
    axes.set_xscale("log", base=2)
    lengths = sorted({int(row["T"]) for row in mine})
    axes.set_xticks(lengths, [f"{T / 1024:g}k" for T in lengths])
    axes.minorticks_off()
    return "ms"


def _plain_log(axes: Any, subs: Sequence[float] = (1, 2, 5)) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


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
