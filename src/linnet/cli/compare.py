"""`linnet compare`: mixers on one synthetic task or text, on equal terms."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .options import given
from .show import console, number, print_in_full, size

if TYPE_CHECKING:
    from linnet.training import Cell, Comparison
    from linnet.training.report import Row

_WHAT, _BUDGET, _RUN = "What", "Budget", "Run"
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def compare(
    ctx: typer.Context,
    task: Annotated[
        str,
        typer.Option(
            help="Task: `parity`, \"group(group='S3')\", …; `linnet list --tasks`. Or, for language models, a text: "
            "`text` (the source of Python's standard library), \"text(data='notes.txt', tokenizer='bpe:4096')\".",
            rich_help_panel=_WHAT,
        ),
    ] = "flipflop",
    mixers: Annotated[
        str,
        typer.Option(
            help='Mixers: "gla, mamba2, retnet + attention(window=32)"; `+` alternates over the layers.',
            rich_help_panel=_WHAT,
        ),
    ] = "gla, mamba2, retnet, attention",
    sizes: Annotated[str, typer.Option(help='Widths: "32, 64".', rich_help_panel=_WHAT)] = "64",
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.", rich_help_panel=_WHAT)] = 2,
    parameters: Annotated[
        str | None,
        typer.Option(
            help="Parameters of every model, reached by the width of its MLPs: `100M`. Default: MLPs of one width.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(help='Positions of a training row; several take turns: "8, 16, 32".', rich_help_panel=_WHAT),
    ] = None,
    test_lengths: Annotated[
        str | None, typer.Option(help='Lengths to test at: "64, 256". Default: the task\'s.', rich_help_panel=_WHAT)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations of each.", rich_help_panel=_BUDGET)] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.", rich_help_panel=_BUDGET)] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.", rich_help_panel=_BUDGET)] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_BUDGET)] = 3e-3,
    test_rows: Annotated[int, typer.Option(min=1, help="Rows of a test.", rich_help_panel=_BUDGET)] = 256,
    precision: Annotated[str, typer.Option(help="`no` (fp32), `bf16` or `fp16`.", rich_help_panel=_BUDGET)] = "no",
    device: Annotated[
        str, typer.Option(help="`auto` (a GPU if there is one) or `cpu`.", rich_help_panel=_RUN)
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder. Default: runs/compare- and the task.", rich_help_panel=_RUN, show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the comparison in --out, with its settings.", rich_help_panel=_RUN),
    ] = False,
) -> None:
    """Train mixers on a synthetic task or a text in the same decoder and compare them by length.

    On a task their accuracy is compared, on a text their bits per byte.

    Ends with a table, plots and a page to open in a browser, which hold what is finished at any time. Ctrl-C saves and
    stops; `--resume` goes on.
    """
    from linnet.mixers import parse_spec, split_specs
    from linnet.training import Comparison, load_comparison
    from linnet.training import compare as run_comparison
    from linnet.training.report import summarise, write_report

    folder = out or Path("runs", f"compare-{parse_spec(task, 'task')[0]}")
    screen = console()
    tests = [] if test_lengths is None else _numbers("test_lengths", test_lengths)
    rows = None if length is None else _numbers("length", length)
    settings: dict[str, Any] = {
        "task": task,
        "mixers": split_specs(mixers),
        "sizes": _numbers("sizes", sizes),
        "seeds": seeds,
        "length": rows if rows is None or len(rows) > 1 else rows[0],
        "layers": layers,
        "parameters": None if parameters is None else _amount("parameters", parameters),
        "batch_size": batch_size,
        "test_rows": test_rows,
    }
    training = {"steps": steps, "lr": lr, "device": device, "precision": precision}
    if resume:
        comparison = load_comparison(folder)[0]
        _check_unchanged(comparison, {**settings, **training, "test_lengths": tests}, given(ctx))
        if "device" in given(ctx):
            comparison = dataclasses.replace(comparison, training={**comparison.training, "device": device})
    else:
        comparison = Comparison(**settings, tests={str(n): (task, n) for n in tests}, training=training)
    count = len(list(comparison.cells()))
    runs = "1 run" if count == 1 else f"{count} runs"
    screen.print(f"{runs} on {escape(comparison.task)}. Ctrl-C saves and stops.")

    def report(finished: list[Cell]) -> None:
        write_report(folder, comparison, finished)

    cells = run_comparison(comparison, out=folder, resume=resume, on_cell=report, console=screen)
    if cells is None:
        again = f"linnet compare --resume --out {escape(shlex.quote(str(folder)))}"
        screen.print(f"\nStopped; everything is saved. Go on:  [bold]{again}[/bold]", soft_wrap=True)
        return
    print_in_full(screen, _table(comparison, summarise(comparison, cells)))
    files = "index.html (all of it), scores.png, training.png, results.json, cells/"
    screen.print(f"Saved in [bold]{escape(str(folder))}[/bold]: {files}")


def _check_unchanged(comparison: Comparison, settings: dict[str, Any], flags: dict[str, str]) -> None:
    """A comparison that goes on keeps its settings, all but the device: refuse an option that says otherwise."""
    lengths = [n for _, n in comparison.tests.values()]
    stored = {**comparison.to_dict(), **comparison.training, "test_lengths": lengths}
    for name, flag in flags.items():
        if name in settings and name != "device" and settings[name] != stored[name]:
            raise ValueError(
                f"{flag}: this comparison was started with {stored[name]!r} and goes on with it; leave the option out, "
                "or start a new one in another --out"
            )


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected whole numbers separated by commas, got {text!r}") from None


def _amount(name: str, text: str) -> int:
    number, factor = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    try:
        return round(float(number) * factor)
    except ValueError:
        raise ValueError(f"{name}: expected a number such as 3000000, 3M or 1.5B, got {text!r}") from None


def _table(comparison: Comparison, rows: list[Row]) -> Table:
    caption = f"{comparison.exercise.names[0]}: "
    caption += "one initialisation" if comparison.seeds == 1 else "mean, and the range over initialisations"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("mixer", style="bold")
    for name in comparison.tests:
        table.add_column(name, justify="right")
    for name in ("parameters", "state", "at longest", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        reached = [_reached(values, row.seeds) for values in row.scores.values()]
        held = [size(n) for n in row.state_bytes]
        cells: list[Any] = [escape(row.label), *reached, number(row.parameters), *held, number(round(row.tokens_per_s))]
        table.add_row(*cells)
    return table


def _reached(values: tuple[float, float, float], seeds: int) -> str:
    mean, low, high = values
    return f"{mean:.3f}" if seeds == 1 else f"{mean:.3f} [dim]{low:.2f}-{high:.2f}[/dim]"
