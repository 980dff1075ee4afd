"""`linnet reproduce`: the central claims of papers, published beside measured."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .options import given
from .show import console


def reproduce(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="Which one; without it they are listed.", show_default=False)
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Run every one of the budget.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            help="`cpu`: about three minutes of one core. `gpu`: larger. Default: `cpu`, or `gpu` where that is all.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only see that everything works, in seconds; the bars mean nothing.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Also write NAME.json here, replacing it.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the runs and the plot in OUT/NAME, which must be new.", show_default=False)
    ] = None,
) -> None:
    """Run the small version of a paper's central experiment and hold the measured figures against bars.

    Without a name: the list.
    """
    from linnet.reproductions import reproduce as run
    from linnet.reproductions import reproductions

    known, screen = reproductions(), console()
    if name is None and not all:
        if flags := given(ctx):
            raise ValueError(f"name: expected a name or --all with {next(iter(flags.values()))}, got none")
        _list(known)
        return
    if name is not None and all:
        raise ValueError("name: expected a name or --all, got both")
    chosen = [str(name)] if name is not None else [n for n, r in known.items() if (budget or "cpu") in r.budgets]
    if not chosen:
        raise ValueError(f"budget: expected cpu or gpu, got {budget!r}")
    done: list[dict[str, Any]] = []
    for one in chosen:
        if one in known:
            screen.print(f"\n[bold]{escape(known[one].title)}[/bold]\n{escape(known[one].claim)}")
        folder = Path(tempfile.mkdtemp(prefix="linnet-")) / one if out is None else out / one
        try:
            result = run(one, folder=folder, budget=budget, quick=quick, console=screen)
            if results is not None and not quick:
                results.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / "result.json", results / f"{one}.json")
        finally:
            if out is None:
                shutil.rmtree(folder.parent, ignore_errors=True)
        done.append(result)
        screen.print(_table(result))
    if len(done) > 1 and not quick:
        screen.print(f"{sum(r['passed'] for r in done)} of {len(done)} reproduce.")
    if not quick and not all and not done[0]["passed"]:
        raise typer.Exit(1)


def _list(known: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(known)} reproductions", title_justify="left")
    for column in ("name", "claim", "budgets"):
        table.add_column(column, style="bold" if column == "name" else "", no_wrap=column != "claim")
    for name, about in known.items():
        table.add_row(name, escape(about.claim), ", ".join(about.budgets))
    console().print(table)


def _table(result: dict[str, Any]) -> Table:
    verdict = "quick run, no verdict" if result["quick"] else "reproduces" if result["passed"] else "does not reproduce"
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{result['name']}: {verdict}, {result['seconds']:.0f} s", title_justify="left"
    )
    for column in ("figure", "published", "measured", "bar", ""):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for row in result["measured"]:
        measured = "-" if row["measured"] is None else f"{row['measured']:.4g}"
        counts = not result["quick"] and not row["bar"].startswith("none")
        mark = "" if not counts else "[green]met[/]" if row["passed"] else "[red]missed[/]"
        table.add_row(escape(row["what"]), escape(row["published"]), measured, row["bar"], mark)
    for line in result["tried"]:
        table.add_row(escape(f"tried: {line}"))
    return table
