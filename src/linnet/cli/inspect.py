"""`linnet inspect NAME`: everything about one mixer."""

from __future__ import annotations

import inspect as _inspect
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .show import console, number, size

if TYPE_CHECKING:
    from linnet.mixers import Mixer

_TOKENS = 1024


def inspect(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help='A mixer, or one with options: "attention(window=256)".', show_default=False
        ),
    ],
    d_model: Annotated[
        int, typer.Option("--d-model", min=1, help="Width at which to count parameters and state.")
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one mixer: paper, recurrence, options, size and identities."""
    facts = describe(name, d_model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return
    out = console()
    out.print(f"[bold]{facts['name']}[/bold]  {escape(facts['summary'])}\n")
    card = Table.grid(padding=(0, 2))
    card.add_column(style="cyan", no_wrap=True)
    card.add_column()
    for field in ("paper", "recurrence", "state", "engine", "expressivity"):
        card.add_row(field, escape(facts[field]))
    for field in ("identities", "notes"):
        for i, line in enumerate(facts[field]):
            card.add_row("" if i else field, escape(line))
    out.print(card)
    options = Table(box=box.SIMPLE_HEAD)
    for column in ("option", "type", "default", "meaning"):
        style = "bold" if column == "option" else ""
        options.add_column(column, no_wrap=column == "option", style=style, overflow="fold")
    for option in facts["options"]:
        options.add_row(*(escape(str(cell)) for cell in option.values()))
    out.print(options)
    example = facts["example"]
    first, later = example["state_bytes"]["1"], example["state_bytes"][str(_TOKENS)]
    grown = "whatever the length" if first == later else f"after {number(_TOKENS)} tokens, {size(first)} after one"
    out.print(
        f"At d_model = {number(d_model)}: {number(example['parameters'])} parameters a layer, "
        f"{size(later)} of state a sequence {grown} (fp32)."
    )


def describe(spec: str, d_model: int) -> dict[str, Any]:
    """What is known about the mixer that ``spec`` describes, as plain data."""
    import torch

    from linnet.mixers import build_mixer
    from linnet.ops.core import state_bytes

    with torch.device("meta"):  # sizes alone
        mixer = build_mixer(spec, d_model)
    card = mixer.card
    held = dict.fromkeys(("1", str(_TOKENS)), state_bytes(mixer.init_state(1)))
    if not card.constant_state:
        mixer = build_mixer(spec, d_model)
        with torch.no_grad():
            held = {T: state_bytes(mixer(torch.zeros(1, int(T), d_model))[1]) for T in held}
    return {
        "name": mixer.name,
        "summary": (_inspect.getdoc(type(mixer)) or "").split("\n\n")[0].replace("\n", " "),
        "paper": card.paper,
        "recurrence": card.recurrence,
        "state": card.state,
        "engine": card.engine,
        "expressivity": card.expressivity,
        "linear_state": card.linear_state,
        "constant_state": card.constant_state,
        "identities": [identity.claim for identity in card.identities],
        "notes": [*card.notes],
        "options": _options(type(mixer)),
        "example": {
            "spec": spec,
            "d_model": d_model,
            "parameters": sum(p.numel() for p in mixer.parameters()),
            "state_bytes": held,
        },
    }


def _options(cls: type[Mixer]) -> list[dict[str, Any]]:
    """The constructor's keyword-only options with the meanings its docstring gives them."""
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", _inspect.getdoc(cls) or "", re.MULTILINE)
    meaning: dict[str, str] = {}
    for names, text in re.findall(
        r"^ {4}([\w, ]+): ((?:.*\n?)(?: {5,}.*\n?)*)", block[1] if block else "", re.MULTILINE
    ):
        meaning |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    parameters = _inspect.signature(cls.__init__).parameters.values()
    return [
        {
            "option": p.name,
            "type": str(p.annotation),
            "default": None if p.default is p.empty else p.default,
            "meaning": meaning.get(p.name, ""),
        }
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("layer", "num_layers")
    ]
