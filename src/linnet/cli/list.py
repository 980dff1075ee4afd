"""`linnet list`: what is registered."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .show import console


def list(
    ops: Annotated[bool, typer.Option("--ops", help="List the ops (engines) in place of the mixers.")] = False,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the synthetic tasks of `linnet compare`.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the mixers, the ops they run on, or the synthetic tasks.

    `linnet inspect NAME` says everything about one mixer.
    """
    if ops and tasks:
        raise ValueError("list: expected --ops or --tasks, got both")
    kind = "ops" if ops else "tasks" if tasks else "mixers"
    rows = _rows(kind)
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(rows)} {kind}", title_justify="left")
    for column in rows[0] if rows else ():
        style = "bold" if column == "name" else ""
        table.add_column(column, no_wrap=column in ("name", "engine"), style=style, overflow="fold")
    for row in rows:
        cells = {**row, "paper": cite(row["paper"])} if kind == "mixers" else row
        table.add_row(*(escape("; ".join(cell) if isinstance(cell, tuple) else cell) for cell in cells.values()))
    console().print(table)


def cite(paper: str) -> str:
    """The authors, year and arXiv id of a card's paper: enough to find it, short enough for a table."""
    found = re.match(r"(.{,60}?\b\d{4}),.*?\b(arXiv [\d.]+\d)", paper)
    return f"{found[1]}, {found[2]}" if found else paper


def _first_sentence(text: str) -> str:
    return " ".join(re.split(r"\.\s|::|\n\n", text)[0].replace("`", "").split()).rstrip(".")


def _rows(kind: str) -> tuple[dict[str, Any], ...]:
    return {"mixers": _mixers, "ops": _ops, "tasks": _tasks}[kind]()


def _mixers() -> tuple[dict[str, Any], ...]:
    from linnet.mixers import mixers

    fields = ("paper", "engine", "state", "expressivity")
    return tuple(
        {"name": name, **{field: getattr(cls.card, field) for field in fields}} for name, cls in mixers().items()
    )


def _ops() -> tuple[dict[str, Any], ...]:
    from linnet.ops import ops

    return tuple(
        {
            "name": op.name,
            "summary": _first_sentence(op.function.__doc__ or ""),
            "backends": op.backends,
            "modes": tuple(case.name for case in op.cases if not case.hostile),
            "identities": tuple(identity.claim for identity in op.identities),
        }
        for _, op in sorted(ops().items())
    )


def _tasks() -> tuple[dict[str, Any], ...]:
    import inspect

    from linnet.tasks import tasks

    def options(cls: type) -> str:
        known = inspect.signature(cls).parameters.values()
        return ", ".join(f"{p.name}={p.default!r}" for p in known if p.kind is p.KEYWORD_ONLY)

    return tuple(
        {
            "name": name,
            "summary": _first_sentence(cls.__doc__ or ""),
            "options": options(cls),
            "lengths": ", ".join(map(str, cls.lengths)),
            "source": cls.source,
        }
        for name, cls in tasks().items()
    )
