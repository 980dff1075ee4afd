"""`linnet eval RUN`: what a trained language model can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .options import pick_device
from .show import console, number

if TYPE_CHECKING:
    from linnet.models import Decoder
    from linnet.tasks import Tokenizer


def eval(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run of `linnet train`, finished or not.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(help="Another text, as in `linnet train`. Default: what the run held out.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longest context, in tokens. Default: eight times that of the training, if the text has it."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Windows and pieces of text that are read.")] = 16,
    questions: Annotated[int, typer.Option(min=0, help="Questions of each kind; 0 leaves them out.")] = 8,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, ... or `auto`.")] = "auto",
) -> None:
    """Measure a trained language model: loss by context length, copying, recall and state tracking.

    The figures go to RUN/evaluation, which is replaced.
    """
    from linnet.evaluation import plot_curves
    from linnet.models import Decoder
    from linnet.tasks import load_corpus, load_tokenizer
    from linnet.training import find_model

    device = pick_device(device)
    folder = find_model(run)
    options = _options(run)
    if data is None and "data" not in options:
        raise ValueError(f"data: {run} does not say what it was trained on; name a text with --data")
    text = load_corpus(
        data or options["data"], held_out=options.get("held_out", 0.05), max_bytes=options.get("max_bytes")
    )
    model, tokenizer = Decoder.load(folder, device=device), load_tokenizer(folder)
    trained = int(options.get("context", 256))
    results = _measure(model, tokenizer, text.held_out, trained, context, rows, questions)
    results["text"], results["model"] = text.name, str(folder)

    out = run / "evaluation"
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    points = [(float(b["last"]), b["bits_per_byte"]) for b in results["by_position"]]
    plot_curves(
        out / "context.png",
        {run.name: points},
        x=f"tokens read before (trained with {trained})",
        y="bits per byte",
        title=f"{run.name}: loss by context length on {text.name}",
        log_x=True,
    )
    _show(results, trained)
    console().print(f"Saved in [bold]{escape(str(out))}[/bold]: results.json, context.png")


def _options(run: Path) -> dict[str, Any]:
    file = run / "run.json"
    return json.loads(file.read_text(encoding="utf-8")).get("options", {}) if file.is_file() else {}


def _measure(
    model: Decoder,
    tokenizer: Tokenizer,
    held_out: list[bytes],
    trained: int,
    context: int | None,
    rows: int,
    questions: int,
) -> dict[str, Any]:
    import numpy as np

    from linnet.evaluation.language import by_position, copy_bits, question_score, swap_accuracy
    from linnet.tasks.ruler import FAMILIES

    ids = np.concatenate([np.array([tokenizer.begin, *tokenizer.encode(text)], dtype=np.int64) for text in held_out])
    size = sum(map(len, held_out))
    if context is None:
        context = min(8 * trained, len(ids) - 1)
    elif context >= len(ids):
        raise ValueError(f"context: expected at most the {len(ids) - 1} tokens of the text, got {context}")
    results: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "trained_context": trained,
        "by_position": [b._asdict() for b in by_position(model, ids, size, length=context, rows=rows)],
        "copying": [],
        "questions": {},
        "swaps": {},
    }
    length = 8
    while 2 * length <= context:
        first, again = copy_bits(model, ids, length=length, rows=rows)
        results["copying"].append({"tokens": length, "first": first, "again": again})
        length *= 4
    if questions:
        results["swaps"] = swap_accuracy(model, tokenizer, questions=4 * questions)
        for family in FAMILIES:
            try:
                score = question_score(model, tokenizer, family, budget=context, questions=questions)
            except ValueError:
                score = None  # no question of this family is that short
            results["questions"][family] = score
    return results


def _show(results: dict[str, Any], trained: int) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("tokens read before", "bits per byte", "perplexity of a token"):
        table.add_column(name, justify="right")
    for b in results["by_position"]:
        beyond = " [dim]beyond training[/dim]" if b["first"] > trained else ""
        first, last = number(b["first"] - 1), number(b["last"] - 1)
        places = first if first == last else f"{first}-{last}"
        table.add_row(f"{places}{beyond}", f"{b['bits_per_byte']:.3f}", f"{b['perplexity']:.2f}")
    _print(f"held-out text of {results['text']}", table)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("tokens", "bits per token", "again"):
        table.add_column(name, justify="right")
    for c in results["copying"]:
        table.add_row(number(c["tokens"]), f"{c['first']:.2f}", f"{c['again']:.2f}")
    if results["copying"]:
        _print("copying: a piece of text, and the same again", table)
    if results["swaps"]:
        table = Table(box=box.SIMPLE_HEAD)
        for count in results["swaps"]:
            table.add_column("1 swap" if int(count) == 1 else f"{count} swaps", justify="right")
        table.add_row(*(f"{value:.3f}" for value in results["swaps"].values()))
        _print("variables and swaps (guessing: 0.333)", table)
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("family")
        table.add_column("answered", justify="right")
        for family, score in results["questions"].items():
            table.add_row(family, "needs a longer context" if score is None else f"{score:.3f}")
        _print("questions about a text (RULER, made up here)", table)


def _print(title: str, table: Table) -> None:
    """A table under a title, which a title of the table's own would break where the table is narrow."""
    console().print(f"[bold]{escape(title)}[/bold]", table, sep="")
