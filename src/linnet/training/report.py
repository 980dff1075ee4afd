"""The report of a comparison: rows of a table, plots, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

import linnet
from linnet.evaluation import plot_curves
from linnet.tasks import build_task

from .comparison import Cell, Comparison

__all__ = ["Row", "summarise", "write_report"]

PLOT, PROGRESS, PAGE, RESULTS = "accuracy.png", "training.png", "index.html", "results.json"
_SHARES = (-0.02, 1.03)
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
        label: spec, and width where there are several.
        accuracy: test to (mean, lowest, highest) share of right answers.
        parameters: number of parameters.
        state_bytes: of a row after the training length and after the longest test.
        tokens_per_s: mean training throughput.
        seeds: initialisations.
    """

    label: str
    accuracy: dict[str, tuple[float, float, float]]
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
            reached = {name: [c.accuracy[name]["answers"] for c in own] for name in comparison.tests}
            held = list(own[0].state_bytes.values())
            rows.append(
                Row(
                    mixer if len(comparison.sizes) == 1 else f"{mixer}, d={size}",
                    {name: (fmean(x), min(x), max(x)) for name, x in reached.items()},
                    own[0].parameters,
                    (held[0], max(held)),
                    fmean(c.tokens_per_s for c in own),
                    len(own),
                )
            )
    return rows


def write_report(out: str | Path, comparison: Comparison, cells: Sequence[Cell]) -> list[Row]:
    """Write ``results.json``, ``accuracy.png``, ``training.png`` and ``index.html`` into ``out`` (replacing them).

    Returns:
        The rows of the table.
    """
    out, rows = Path(out), summarise(comparison, cells)
    places = {name: float(n) for name, (_, n) in comparison.tests.items()}
    task = build_task(comparison.task)
    curves = {r.label: [(places[name], mean) for name, (mean, _, _) in r.accuracy.items()] for r in rows}
    bands = {r.label: [(low, high) for _, low, high in r.accuracy.values()] for r in rows}
    plot_curves(
        out / PLOT,
        curves,
        x="positions of a test row",
        y="accuracy",
        title=f"{comparison.task}: mean over initialisations, band from the lowest to the highest",
        bands=bands,
        levels={"guessing": task.chance},
        log_x=len(set(places.values())) > 1,
        limits=_SHARES,
    )
    progress = {}
    for cell in cells:
        label = f"{cell.mixer}, d={cell.d_model}" if len(comparison.sizes) > 1 else cell.mixer
        progress.setdefault(label, [(step, value) for step, value in cell.curve])
    first = next(iter(comparison.tests))
    title = f"{comparison.task}: first initialisation during training, test {first}"
    plot_curves(out / PROGRESS, progress, x="optimiser step", y="accuracy", title=title, limits=_SHARES)
    content = {"comparison": comparison.to_dict(), "rows": [row._asdict() for row in rows], "versions": _versions()}
    (out / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / PAGE).write_text(_page(out, comparison, cells, rows), encoding="utf-8")
    return rows


def _page(out: Path, comparison: Comparison, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    task = build_task(comparison.task)
    summary = (task.__doc__ or "").strip().split("\n\n")[0].replace("``", "").replace("\n", " ")
    tests = list(comparison.tests)
    head = ["mixer", *(f"accuracy {name}" for name in tests), "parameters", "state (B)", "at longest", "tokens/s"]
    best = {name: max((r.accuracy[name][0] for r in rows), default=0.0) for name in tests}
    body = []
    for r in rows:
        line = [_cell(r.label)]
        for name, (mean, low, high) in r.accuracy.items():
            spread = f" <span class=note>{low:.3f}–{high:.3f}</span>" if r.seeds > 1 else ""
            line.append(f"<td{' class=best' if mean == best[name] else ''}>{mean:.3f}{spread}</td>")
        numbers = (r.parameters, *r.state_bytes, round(r.tokens_per_s))
        body.append("<tr>" + "".join([*line, *(_cell(f"{n:,}") for n in numbers)]) + "</tr>")
    each = ["mixer", "width", "seed", *(f"{name}, whole rows" for name in tests), "last loss", "seconds"]
    details = [
        "<tr>"
        + "".join(
            _cell(value)
            for value in (
                c.mixer,
                c.d_model,
                c.seed,
                *(f"{c.accuracy[name]['rows']:.3f}" for name in tests),
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
<p>{html.escape(summary)} <span class="note">{html.escape(task.source)}.</span></p>
<p>{comparison.layers} layers, {comparison.seeds} initialisation(s) of each, {_training(comparison)["steps"]} steps of
{comparison.batch_size} rows of {html.escape(str(comparison.length))} positions, {comparison.test_rows} test rows.
Guessing reaches {task.chance:.3f}.</p>
<h2>Accuracy</h2>
{_table(head, body)}
<p class="note">Mean over the initialisations, lowest and highest behind it. State: what a row carries after a row of
the first and of the longest test.</p>
{_image(out / PLOT, "accuracy over the length of a test row")}
<h2>Training</h2>
{_image(out / PROGRESS, "accuracy during training")}
<h2>Every run</h2>
{_table(each, details)}
<h2>Settings</h2>
<pre>{html.escape(settings)}</pre>
<p class="note">{html.escape(versions)}</p>
</html>
"""


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
