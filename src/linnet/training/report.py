"""The report of a comparison: rows of a table, plots, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

import linnet
from linnet.evaluation import plot_curves
from linnet.mixers import split_specs

from .comparison import Cell, Comparison

__all__ = ["Row", "summarise", "write_report"]

PLOT, PROGRESS, PAGE, RESULTS = "scores.png", "training.png", "index.html", "results.json"
_CONTEXT = 16  # the first positions of a text have little to go by: alike for all, and far above the rest of the plot
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } .note { color: #66727f }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.best { font-weight: 600 } img { max-width: 100% }
code { font-size: .9em } pre { background: #f5f7fa; padding: .8rem; overflow-x: auto }
"""


class Row(NamedTuple):
    """One mixer at one width, over its initialisations.

    Attributes:
        label: spec, with neighbours that are alike counted, and width where there are several.
        scores: test to (mean, lowest, highest) score that counts.
        parameters: number of parameters.
        state_bytes: of a row after the training length and after the longest test.
        tokens_per_s: mean training throughput.
        seeds: initialisations.
    """

    label: str
    scores: dict[str, tuple[float, float, float]]
    parameters: int
    state_bytes: tuple[int, int]
    tokens_per_s: float
    seeds: int


def summarise(comparison: Comparison, cells: Sequence[Cell]) -> list[Row]:
    """The rows of the table, in the order of the comparison; mixers without a finished cell are left out."""
    rows = []
    for size in comparison.sizes:
        for mixer in comparison.mixers:
            own = [c for c in cells if (c.mixer, c.d_model) == (mixer, size)]
            if not own:
                continue
            score = comparison.exercise.score
            reached = {name: [c.scores[name][score] for c in own] for name in comparison.tests}
            held = list(own[0].state_bytes.values())
            rows.append(
                Row(
                    _label(comparison, mixer, size),
                    {name: (fmean(x), min(x), max(x)) for name, x in reached.items()},
                    own[0].parameters,
                    (held[0], max(held)),
                    fmean(c.tokens_per_s for c in own),
                    len(own),
                )
            )
    return rows


def write_report(out: str | Path, comparison: Comparison, cells: Sequence[Cell]) -> list[Row]:
    """Write ``results.json``, ``scores.png``, ``training.png`` and ``index.html`` into ``out`` (replacing them).

    Returns:
        The rows of the table.
    """
    out, rows = Path(out), summarise(comparison, cells)
    draw(comparison, cells, out / PLOT, out / PROGRESS)
    content = {
        "comparison": comparison.to_dict(),
        "rows": [row._asdict() for row in rows],
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if comparison.on_gpu else f"{platform.machine()} CPU",
        "source": comparison.exercise.source,
        "date": datetime.now(UTC).date().isoformat(),
    }
    (out / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / PAGE).write_text(_page(out, comparison, cells, rows), encoding="utf-8")
    return rows


def draw(comparison: Comparison, cells: Sequence[Cell], scores: Path, training: Path) -> None:
    """Write two PNG files: the score over the length of a test or, of a text, over the position in the longest one; and
    the score in training."""
    exercise = comparison.exercise
    own: dict[str, list[Cell]] = {}
    for cell in cells:
        own.setdefault(_label(comparison, cell.mixer, cell.d_model), []).append(cell)
    curves, bands = {}, {}
    for label, same in own.items():
        profiles = [_profile(comparison, cell) for cell in same]
        at = [x for x, _ in profiles[0]]
        values = [[y for _, y in points] for points in zip(*profiles, strict=True)]
        curves[label] = [(x, fmean(y)) for x, y in zip(at, values, strict=True)]
        bands[label] = [(min(y), max(y)) for y in values]
    plot_curves(
        scores,
        curves,
        x="positions of a test row",
        y=exercise.names[0],
        title=comparison.task + (": mean and range over initialisations" if comparison.seeds > 1 else ""),
        bands=bands,
        levels=exercise.levels,
        log_x=any(len(curve) > 1 for curve in curves.values()),
        limits=exercise.limits,
    )
    first = next(iter(comparison.tests))
    plot_curves(
        training,
        {label: [(step, value) for step, value in same[0].curve] for label, same in own.items()},
        x="optimiser step",
        y=exercise.names[0],
        title=f"{comparison.task}: {'first initialisation ' * (comparison.seeds > 1)}during training, test {first}",
        limits=exercise.limits,
    )


def _profile(comparison: Comparison, cell: Cell) -> list[tuple[float, float]]:
    """(positions, score) of a cell."""
    name, (_, _) = max(comparison.tests.items(), key=lambda test: test[1][1])
    if "by_position" in cell.scores[name]:
        profile = [(float(place), value) for place, value in cell.scores[name]["by_position"]]
        return [point for point in profile if point[0] >= _CONTEXT] or profile
    score = comparison.exercise.score
    return [(float(n), cell.scores[name][score]) for name, (_, n) in comparison.tests.items()]


def _label(comparison: Comparison, mixer: str, size: int) -> str:
    runs = [(spec, len(list(same))) for spec, same in groupby(split_specs(mixer, "+"))]
    name = " + ".join(spec if count == 1 else f"{count} x {spec}" for spec, count in runs)
    return name if len(comparison.sizes) == 1 else f"{name}, d={size}"


def _page(out: Path, comparison: Comparison, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    exercise = comparison.exercise
    what, also = exercise.names
    tests = list(comparison.tests)
    head = ["mixer", *(f"{what} {name}" for name in tests), "parameters", "state (B)", "at longest", "tokens/s"]
    top = max if exercise.rising else min
    best = {name: top((r.scores[name][0] for r in rows), default=0.0) for name in tests}
    body = []
    for r in rows:
        line = [_cell(r.label)]
        for name, (mean, low, high) in r.scores.items():
            spread = f" <span class=note>{low:.3f}–{high:.3f}</span>" if r.seeds > 1 else ""
            line.append(f"<td{' class=best' if mean == best[name] else ''}>{mean:.3f}{spread}</td>")
        numbers = (r.parameters, *r.state_bytes, round(r.tokens_per_s))
        body.append("<tr>" + "".join([*line, *(_cell(f"{n:,}") for n in numbers)]) + "</tr>")
    each = ["mixer", "width", "seed", *(f"{name}, {also}" for name in tests), "last loss", "seconds"]
    details = [
        "<tr>"
        + "".join(
            _cell(value)
            for value in (
                c.mixer,
                c.d_model,
                c.seed,
                *(f"{c.scores[name][exercise.also]:.3f}" for name in tests),
                f"{c.loss:.4g}",
                f"{c.seconds:.1f}",
            )
        )
        + "</tr>"
        for c in cells
    ]
    settings = json.dumps({**comparison.to_dict(), "trained with": _training(comparison)}, indent=2)
    versions = ", ".join(f"{name} {value}" for name, value in _versions().items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(comparison.task)}</title><style>{_STYLE}</style>
<h1>{html.escape(comparison.task)}</h1>
<p>{html.escape(exercise.summary)} <span class="note">{html.escape(exercise.source)}.</span></p>
<p>{_several(comparison.layers, "layer")}, {_several(comparison.seeds, "initialisation")} of each,
{_several(_training(comparison)["steps"], "step")} of {comparison.batch_size} rows of
{html.escape(str(comparison.length))} positions, {comparison.test_rows} test
rows.{"".join(f" {name.capitalize()} reaches {level:.3f}." for name, level in exercise.levels.items())}</p>
<h2>{what.capitalize()}</h2>
{_table(head, body)}
<p class="note">{"Mean over the initialisations, lowest and highest behind it. " * (comparison.seeds > 1)}State: what a
row carries after a row of the first and of the longest test.</p>
{_image(out / PLOT, f"{what} over the positions of a test row")}
<h2>Training</h2>
{_image(out / PROGRESS, f"{what} during training")}
<h2>Every run</h2>
{_table(each, details)}
<h2>Settings</h2>
<pre>{html.escape(settings)}</pre>
<p class="note">{html.escape(versions)}</p>
</html>
"""


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _training(comparison: Comparison) -> Mapping[str, Any]:
    return comparison.training_config(0).to_dict()


def _cell(value: object) -> str:
    return f"<td>{html.escape(str(value))}</td>"


def _table(head: Sequence[str], body: Sequence[str]) -> str:
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<div class=scroll><table><tr>{titles}</tr>\n" + "\n".join(body) + "\n</table></div>"


def _image(file: Path, alt: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _versions() -> dict[str, str]:
    return {"linnet": linnet.__version__, "torch": torch.__version__}
