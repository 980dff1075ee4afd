"""`linnet bench`: how fast the ops are beside other libraries, and whole models."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .show import console, print_in_full, size

_WHAT, _HOW, _FILE = "What", "How", "Results"


def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="`decay`, `mlstm`, `delta`, `scan`, `conv`, `cell`, `attention`: ops beside their peers. `length`: "
            "ops beside softmax attention. `decode`, `train`: whole models, recurrent beside softmax attention.",
            rich_help_panel=_WHAT,
        ),
    ] = "decay",
    grid: Annotated[
        str | None,
        typer.Option(
            help="Shapes, with commas: `main`, `near`, `wide`, `heads`, `sizes`, `packed`, `length`, `cell`, `tiny`. "
            "Default: `main`, on a CPU `tiny`.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="B,T,H,K,V;...", help="Shapes of your own in place of a grid.", rich_help_panel=_WHAT),
    ] = None,
    ops: Annotated[
        str | None, typer.Option(help="Of the suite, only these: `gla,rwkv6`.", rich_help_panel=_WHAT)
    ] = None,
    impls: Annotated[
        str | None,
        typer.Option(help="Only these implementations: `linnet,fla`. Default: all.", rich_help_panel=_WHAT),
    ] = None,
    forward: Annotated[bool, typer.Option("--forward", help="Only the forward pass.", rich_help_panel=_WHAT)] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.", rich_help_panel=_HOW)
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of linnet's ops: `auto`, `chunked`, `triton` or `reference`.", rich_help_panel=_HOW)
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="`auto` (a GPU if there is one) or `cpu`.", rich_help_panel=_HOW)
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each implementation.", rich_help_panel=_HOW)] = 10,
    first_call: Annotated[
        str | None,
        typer.Option(
            help="Of these implementations also time the first call in a fresh process with empty kernel caches "
            "(peers: up to minutes each).",
            rich_help_panel=_HOW,
        ),
    ] = None,
    ahead: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that compile and tune, side by side, before anything is timed. What they make is kept in "
            "the caches on disk. One on a large shape may take 5 GB of the GPU.",
            rich_help_panel=_HOW,
        ),
    ] = 0,
    patience: Annotated[
        float,
        typer.Option(min=1, help="Seconds for `--ahead`; what is not ready then is given up.", rich_help_panel=_HOW),
    ] = 600,
    timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which a silent implementation is given up.", rich_help_panel=_HOW),
    ] = 600,
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write, with a PNG beside it.", rich_help_panel=_FILE)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the file in --out.", rich_help_panel=_FILE)
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file in --out.", rich_help_panel=_FILE)] = False,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Measure nothing: print this file's results and renew the PNG beside it.", rich_help_panel=_FILE
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_FILE)] = False,
) -> None:
    """Time the ops beside other libraries, or whole models.

    All implementations of a line take turns on the same inputs, with a cold L2 cache; the median counts. What is not
    installed or fails is listed with the reason. The limit is what the op's operations and bytes would take at the
    speed of a plain copy and a plain matrix product, measured in the same run.
    """
    from linnet.benchmarks import results

    if show is not None:
        rows = results.read(show)
        _report(rows, as_json)
        _plot(rows, show, as_json)
        return
    if out is not None and out.suffix.lower() == ".png":
        raise ValueError(f"--out: expected a CSV file, which gets a PNG beside it, got {out}")
    if out is not None and out.with_suffix(".png").exists() and not (resume or force or out.exists()):
        raise FileExistsError(f"{out.with_suffix('.png')} exists: choose another --out, or replace it by --force")
    if resume and force:
        raise ValueError("--resume: expected without --force, got both")
    job = _job(suite, grid, shapes, ops, impls, forward, dtype, backend, device, rounds, first_call)
    kept = results.Results(out, "keep" if resume else "replace" if force else "refuse")
    from linnet.benchmarks.worker import run

    with Console(stderr=True).status("starting") as status:

        def say(line: str) -> None:
            status.update(escape(line))

        run(job, kept, say, timeout=timeout, ahead=ahead, patience=patience)
    _report(kept.rows, as_json)
    if out is not None:
        _plot(kept.rows, out, as_json)


def _job(
    suite: str,
    grid: str | None,
    shapes: str | None,
    ops: str | None,
    impls: str | None,
    forward: bool,
    dtype: str | None,
    backend: str,
    device: str,
    rounds: int,
    first_call: str | None,
) -> dict[str, Any]:
    """The options, checked, as plain data for the measuring process."""
    import torch

    from linnet.benchmarks import workloads
    from linnet.benchmarks.models import MODEL_SUITES, cells
    from linnet.benchmarks.peers import peers
    from linnet.ops.core import check_choice
    from linnet.ops.core.registry import check_backend

    where = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and where == "cpu"):
        raise ValueError(f"--device: expected auto, cpu or, with a GPU, cuda, got {device!r}")
    where = where if device == "auto" else device
    grid = grid or ("tiny" if where == "cpu" and shapes is None else "main")
    dtype = dtype or ("float32" if where == "cpu" else "bfloat16")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    job = {"suite": suite, "dtype": dtype, "device": where, "rounds": rounds}
    check_choice("--suite", suite, (*workloads.SUITES, *MODEL_SUITES))
    if suite in MODEL_SUITES:
        job["shapes"] = cells(suite, grid) if shapes is None else _sizes(shapes, "B,T")
        return job | {"impls": _chosen("--impls", impls, MODEL_SUITES[suite]), "small": grid == "tiny"}
    known = [workload.name for workload in workloads.suite(suite)]
    impl = ["linnet", *(peer.name for name in known for peer in peers(name))]
    return job | {
        "ops": _chosen("--ops", ops, known) or known,
        "shapes": [list(shape) for shape in workloads.grid(grid)] if shapes is None else _sizes(shapes, "B,T,H,K,V"),
        "passes": ["fwd"] if forward else ["fwd", "fwdbwd"],
        "impls": _chosen("--impls", impls, impl),
        "backend": check_backend(backend),
        "first_call": _chosen("--first-call", first_call, impl) or [],
    }


def _sizes(text: str, letters: str) -> list[list[int]]:
    found = []
    for part in text.split(";"):
        sizes = [int(n) if n.strip().isdigit() else 0 for n in part.split(",")]
        if len(sizes) != letters.count(",") + 1 or min(sizes) < 1:
            raise ValueError(f"--shapes: expected sizes {letters}, got {part!r}")
        found.append(sizes)
    return found


def _chosen(option: str, text: str | None, known: Collection[str]) -> list[str] | None:
    from linnet.ops.core import hint

    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            raise ValueError(
                f"{option}: expected some of {', '.join(dict.fromkeys(known))}; got {name!r}{hint(name, known)}"
            )
    return names


def _report(rows: list[dict[str, Any]], as_json: bool) -> None:
    from linnet.benchmarks.results import summary

    entries = summary(rows)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "summary": entries}, indent=2))
        return
    out = console()
    if rows:
        about = rows[-1]
        copy, matmul = (f"{float(about[name]):.3g}" if about[name] else "?" for name in ("copy_tbs", "matmul_tflops"))
        out.print(
            f"[bold]{escape(about['gpu'])}[/bold], torch {about['torch']}, triton {about['triton']}: "
            f"a copy moves {copy} TB/s, a matrix product reaches {matmul} TFLOP/s"
        )
    whole = [row for row in rows if row["op"] in ("decode", "train")]
    if whole:
        print_in_full(out, _models_table(whole))
    else:
        ops = list(dict.fromkeys(entry["op"] for entry in entries))
        print_in_full(out, _ops_table(sorted(entries, key=lambda entry: ops.index(entry["op"]))))
    seen = dict.fromkeys(f"{row['op']}: {row['impl']}: {row['note']}" for row in rows if row["note"])
    for line in seen:
        out.print(f"note: {line}", style="yellow", markup=False)


def _ops_table(entries: list[dict[str, Any]]) -> Table:
    names = ("op", "pass", "B", "T", "H", "K", "V", "packed", "linnet ms", "of limit")
    names += ("best peer", "peer ms", "linnet is", "memory")
    rows = [_cells(entry) for entry in entries]
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]  # no columns for peers where there are none
    table = Table(box=box.SIMPLE_HEAD)
    for name in (names[i] for i in kept):
        table.add_column(name, justify="left" if name in ("op", "pass", "best peer") else "right")
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


def _models_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("model", "batch", "context", "ms", "tokens/s", "of limit", "of matrix peak", "memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in sorted(rows, key=lambda row: (int(row["T"]), int(row["B"]))):
        ms, limit = row["ms"], row["limit_ms"]
        table.add_row(
            row["impl"],
            row["B"],
            row["T"],
            f"{float(ms):.2f}" if ms else "",
            f"{float(row['tokens_per_s']):,.0f}" if ms else "",
            f"{float(limit) / float(ms):.0%}" if ms and limit else "",
            f"{float(row['mfu']):.0%}" if row["mfu"] else "",
            size(int(row["peak_bytes"])) if row["peak_bytes"] else "",
        )
    return table


def _cells(entry: Mapping[str, Any]) -> list[str]:
    def figure(name: str, form: str) -> str:
        return "" if entry[name] is None else format(entry[name], form)

    ratio = entry["ratio"]
    faster = "" if ratio is None else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}x[/]"
    memory = "" if entry["peak_bytes"] is None else size(entry["peak_bytes"])
    if entry["peer_bytes"] is not None:
        memory += f" ({size(entry['peer_bytes'])})"
    return [
        *(str(entry[name]) for name in ("op", "pass", "B", "T", "H", "K", "V", "segments")),
        figure("ms", ".3f"),
        figure("share", ".0%"),
        entry["peer"] or "",
        figure("peer_ms", ".3f"),
        faster,
        memory,
    ]


def _plot(rows: list[dict[str, Any]], path: Path, quiet: bool) -> None:
    from linnet.evaluation import plot_speed

    target = path.with_suffix(".png")
    plot_speed(target, rows)
    if not quiet:
        console().print(f"plot: {target}", markup=False)
