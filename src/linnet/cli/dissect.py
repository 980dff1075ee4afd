"""`linnet dissect NAME`: a mixer as the linear system it is."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .show import console, number

if TYPE_CHECKING:
    from linnet.evaluation import Dissection, LinearPart

_TASKS = {
    "flip-flop": "flipflop(p_read=0.3)",
    "parity": "group(group='Z2', start=True)",
    "product in S3": "group(group='S3', generators='two', start=True)",
}
_TRAIN, _TESTS = [2, 4, 8, 16], (16, 32, 64)
_WIDTH = 32  # at least, of the layers that are trained


def dissect(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help='A mixer with options, "gla(num_heads=2)", or without: then in the smallest example of its card.',
            show_default=False,
        ),
    ],
    d_model: Annotated[
        int | None,
        typer.Option(
            "--d-model", min=1, help="Width. Default: that of the example, 16 with options.", show_default=False
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, max=64, help="Tokens of the random input it is dissected on.")] = 16,
    steps: Annotated[int, typer.Option(min=0, help="Training steps for each state-tracking task; 0: none.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the initial parameters and the input.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG file for the plot, replaced if it exists. Default: dissect-NAME.png.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take one mixer apart: its exact linear form, its memory, and what its state can track.

    With its gates, keys and queries frozen, a layer is a linear system that changes from token to token. This reads
    that system off a freshly initialised layer, in float64, and checks it against the layer itself. Beside what the
    card says about expressivity stands what one such layer learns to track, trained on up to 16 tokens, tested on 64.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise ValueError(f"out: expected a file that ends in .png, got {out}")
    spec, width = _spec(name, d_model)
    found, facts = examine(spec, width, length, seed)
    target = out or Path(f"dissect-{facts['name']}.png")
    linear = [part for part in facts["parts"] if part["ranks"]]
    if linear:
        from linnet.evaluation import plot_dissection

        target.parent.mkdir(parents=True, exist_ok=True)
        plot_dissection(target, linear, title=f"{spec}, d_model = {width}, {length} tokens")
    facts["plot"] = str(target) if linear else None
    if as_json:
        typer.echo(json.dumps({**facts, "tracking": track(spec, width, steps)}, indent=2, ensure_ascii=False))
        return
    screen = console()
    _print(screen, found, facts)
    if steps:
        with screen.status("training on state-tracking tasks"):
            tracking = track(spec, width, steps)
        _print_tracking(screen, facts["expressivity"], tracking, steps)
    screen.print(f"Plot: {target}" if linear else "No plot: there is no linear form to draw.", markup=False)


def _spec(name: str, d_model: int | None) -> tuple[str, int]:
    """A spec and a width that are small enough to take apart."""
    from linnet.mixers import get_mixer, parse_spec

    mixer, options = parse_spec(name)
    example = dict(get_mixer(mixer).card.examples[0])
    width = example.pop("d_model")
    if options:
        return name.strip(), d_model or 16
    return f"{mixer}({', '.join(f'{key}={value!r}' for key, value in example.items())})", d_model or width


def examine(spec: str, d_model: int, length: int, seed: int) -> tuple[Dissection, dict[str, Any]]:
    """The dissection of a freshly initialised mixer, and all of it with its card as plain data."""
    import torch

    from linnet.evaluation import dissect as take_apart
    from linnet.mixers import build_mixer

    torch.manual_seed(seed)
    mixer = build_mixer(spec, d_model)
    found = take_apart(mixer, torch.randn(1, length, d_model))
    card = {field: getattr(mixer.card, field) for field in ("recurrence", "state", "expressivity")}
    return found, {"spec": spec, "d_model": d_model, **card, **found.to_dict()}


def track(spec: str, d_model: int, steps: int) -> dict[str, dict[str, Any]]:
    """What one layer learns to track: for every task the accuracy at each length, at the last tenth of the positions,
    that of guessing, and in a word whether it "generalizes", "fits" the trained length only, or "fails"."""
    from linnet.tasks import build_task
    from linnet.training import Comparison, compare

    results: dict[str, dict[str, Any]] = {}
    for name, task in _TASKS.items() if steps else ():
        comparison = Comparison(
            task=task,
            mixers=[spec],
            sizes=[d_model * -(-_WIDTH // d_model)],
            seeds=1,
            length=_TRAIN,
            tests={str(n): (task, n) for n in _TESTS},
            layers=1,
            training={"steps": steps, "lr": 1e-2, "weight_decay": 0.0, "evaluate_every": steps, "device": "cpu"},
        )
        with TemporaryDirectory() as folder:
            cells = compare(comparison, out=Path(folder, "run"))
        if cells is None:  # Ctrl-C
            raise KeyboardInterrupt
        late = {n: values["late"] for n, values in cells[0].scores.items()}
        near, far = late[str(_TESTS[0])], late[str(_TESTS[-1])]
        verdict = "generalizes" if far > 0.99 else "fits" if near > 0.99 else "fails"
        results[name] = {"accuracy": late, "chance": build_task(task).chance, "verdict": verdict}
    return results


def _print(screen: Any, found: Dissection, facts: dict[str, Any]) -> None:
    screen.print(f"[bold]{escape(facts['spec'])}[/bold], d_model = {facts['d_model']}, {found.length} random tokens\n")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    grid.add_row("recurrence", escape(facts["recurrence"]))
    held = "grows with the sequence" if found.memory is None else f"{number(found.memory)} numbers"
    grid.add_row("memory", f"{held} (card: {escape(facts['state'])})")
    error = found.affine_error
    update = (
        "not linear in the state" if error is None else f"v -> A_t v + b_t, to {error:.0e} of one call over all tokens"
    )
    grid.add_row("update", update)
    screen.print(grid)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("linear form", style="cyan", no_wrap=True)
    for part in found.parts:
        table.add_column(part.engine)
    cells = [_cells(part) for part in found.parts]
    for row in cells[0] if cells else ():
        table.add_row(row, *(escape(column[row]) for column in cells))
    screen.print(table)


def _cells(part: LinearPart) -> dict[str, str]:
    """One column of the table."""
    if not part.linear:
        names = ("values -> readings", "form", "state", "numbers carried", "token mixings", "transition", "changes",
                 "eigenvalues", "half-life", "mean distance")  # fmt: skip
        answer = {"form": f"none: not linear in its values (off by {part.nonlinearity:.0e})"}
        return {name: answer.get(name, "") for name in names}
    full = max(part.full)
    sizes = [abs(complex(*z)) for z in part.eigenvalues]
    return {
        "values -> readings": f"{part.values} -> {part.readings} a token",
        "form": f"exact to {part.error:.0e}",
        "state": "grows" if part.state is None else f"{number(part.state)} numbers that values reach",
        "numbers carried": f"{max(part.ranks)} exactly, {max(part.used)} above 1%, of {full} that fit a cut",
        "token mixings": str(part.mixings),
        "transition": part.transition,
        "changes": "" if part.state is None else _changes(part),
        "eigenvalues": _eigenvalues(part, sizes),
        "half-life": ""
        if part.half_lives is None
        else " / ".join(_tokens(x) for x in part.half_lives) + " tokens (shortest, median, longest)",
        "mean distance": f"{part.reach:.1f} tokens",
    }


def _changes(part: LinearPart) -> str:
    if part.constant:
        return "no: the same at every token"
    return "with the token; transitions " + ("commute" if part.commutes else "do not commute")


def _eigenvalues(part: LinearPart, sizes: list[float]) -> str:
    if not sizes:
        return ""
    real, turn = [z[0] for z in part.eigenvalues], max(abs(z[1]) for z in part.eigenvalues)
    if turn > 1e-9:
        return f"complex, modulus {min(sizes):.3g} to {max(sizes):.3g}"
    return f"real, {min(real):.3g} to {max(real):.3g}"


def _tokens(life: float) -> str:
    return "∞" if life == float("inf") else f"{life:.3g}"


def _print_tracking(screen: Any, expressivity: str, tracking: dict[str, dict[str, Any]], steps: int) -> None:
    screen.print(f"[cyan]expressivity[/cyan]  {escape(expressivity)}  (card)")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measured state tracking", style="cyan")
    for n in _TESTS:
        table.add_column(f"{n} tokens", justify="right")
    table.add_column("guessing", justify="right")
    table.add_column("")
    for name, result in tracking.items():
        cells = (f"{value:.3f}" for value in (*result["accuracy"].values(), result["chance"]))
        table.add_row(name, *cells, result["verdict"])
    screen.print(table)
    screen.print(
        f"One layer of width {_WIDTH} or a little more, {steps} steps on rows of 2 to 16 tokens; accuracy in the last "
        "tenth of a row. Not learned does not mean not representable.\n",
        style="dim",
    )
