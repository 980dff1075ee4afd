#!/usr/bin/env python3
"""Write what the mixers' cards say into docs/mixers.md and into the table of the README, and the committed benchmark
results into docs/benchmarks.md.

scripts/catalogue.py           write them
scripts/catalogue.py --check   write nothing; name what is out of date, with exit code 1
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import shorten

from linnet.benchmarks.results import overview, read, summary
from linnet.benchmarks.workloads import GRIDS
from linnet.cli.inspect import describe
from linnet.cli.list import cite
from linnet.cli.show import number, size
from linnet.mixers import mixers

ROOT = Path(__file__).parents[1]
START, END = "<!-- mixers: made by scripts/catalogue.py -->", "<!-- end of mixers -->"
TIMES, TIMES_END = "<!-- results: made by scripts/catalogue.py -->", "<!-- end of results -->"
WIDTH = 1024


def cell(text: object) -> str:
    """Text that stays in one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def entry(name: str) -> str:
    """The section of one mixer."""
    facts = describe(name, WIDTH)
    held = facts["example"]["state_bytes"]
    (first, early), (last, late) = held.items()
    grown = (
        size(late) if early == late else f"{size(early)} after {first} token, {size(late)} after {number(int(last))}"
    )
    lines = [
        f"## {name}",
        "",
        facts["summary"],
        "",
        f"- **Paper**: {facts['paper']}",
        f"- **Recurrence**: `{facts['recurrence']}`",
        f"- **State per layer**: {facts['state']}",
        f"- **Engine**: `{facts['engine']}`",
        f"- **Expressivity**: {facts['expressivity']}",
        f"- **Size at d_model = {number(WIDTH)}**: {number(facts['example']['parameters'])} parameters,"
        f" {grown} of fp32 state",
        *(f"- **Identity**, run by the tests: {claim}" for claim in facts["identities"]),
        *(f"- **Note**: {note}" for note in facts["notes"]),
        "",
        "| option | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for option in facts["options"]:
        kind, default = cell(option["type"]), cell(repr(option["default"]))
        lines.append(f"| `{option['option']}` | `{kind}` | `{default}` | {cell(option['meaning'])} |")
    return "\n".join(lines)


def catalogue() -> str:
    """docs/mixers.md."""
    head = (
        "# Mixers\n\nThe layers, under the names that `linnet.build_mixer`, decoders and the command line take, with"
        " any of their options: `gla(num_heads=8)`. `linnet list` and `linnet inspect NAME` print the same. (Made from"
        " the cards in `src/linnet/mixers` by `scripts/catalogue.py`; edit those.)\n\nH: heads (Hq of queries, Hkv of"
        " keys and values), K and V: channels of a key and a value head, T: tokens read, W: taps of a short"
        " convolution, or the window of `attention`.\n\n"
        "The last column bounds what a layer can express. TC0 is what circuits of constant depth that count can"
        " compute, and softmax attention is in it; to follow permutations of five elements is believed to lie beyond"
        " it. What layers do learn to follow is [measured](reproductions.md#what-layers-learn-to-track)."
    )
    listed = '<div class="filter" markdown>\n\n' + table("") + "\n\n</div>"
    return "\n\n".join([head, listed, *(entry(name) for name in mixers())]) + "\n"


def table(page: str) -> str:
    """One row a mixer, with links into ``page``."""
    lines = ["| mixer | paper | engine | state of a layer | transition |", "|---|---|---|---|---|"]
    for name, cls in mixers().items():
        card = cls.card
        cells = (cite(card.paper), card.engine, card.state, card.expressivity)
        lines.append(" | ".join([f"| [`{name}`]({page}#{name})", *map(cell, cells)]) + " |")
    return "\n".join(lines)


def times() -> str:
    """The section of each file of benchmarks/results."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        rows = read(path)
        about = rows[0]
        told = (
            f"`{path.name}`: one {about['gpu']}, PyTorch {about['torch']}, Triton {about['triton']}, {about['date']}."
        )
        notes = sorted({row["note"] for row in rows if row["note"] and row["ms"]})
        lines = [f"### {path.stem}", "", " ".join([told, *(f"{note}." for note in notes)]), ""]
        ops = {row["op"] for row in rows}
        if about["op"] in ("decode", "train"):
            lines += models(rows)
        elif "attention" in ops and len(ops) > 1:
            lines += lengths(rows)
        else:
            lines += beside_peers(rows)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def grid(heads: tuple[str, ...], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *body)]


def models(rows: list[dict[str, str]]) -> list[str]:
    """Whole models: tokens a second."""
    body = []
    for row in rows:
        figures = (
            (f"{float(row['ms']):.2f}", f"{float(row['tokens_per_s']):,.0f}", size(int(row["peak_bytes"])))
            if row["ms"]
            else (cell(row["note"]), "", "")
        )
        body.append([row["impl"], row["B"], row["T"], *figures])
    return grid(("model", "batch", "context", "ms", "tokens/s", "memory"), body)


def lengths(rows: list[dict[str, str]]) -> list[str]:
    """Milliseconds of softmax attention, as PyTorch has it, and of linnet's ops, over the length."""
    lines = []
    ops = [op for op in dict.fromkeys(row["op"] for row in rows) if op != "attention"]
    for p in dict.fromkeys(row["pass"] for row in rows):
        ms: dict[int, dict[str, float]] = {}
        for row in rows:
            name = row["op"] if row["impl"] == "linnet" else row["impl"]
            if row["pass"] == p and row["ms"] and name != "attention":
                ms.setdefault(int(row["T"]), {})[name] = float(row["ms"])
        peers = list(dict.fromkeys(name for times in ms.values() for name in times if name not in ops))
        body = []
        for T, found in sorted(ms.items()):
            softmax = min((found[name] for name in peers if name in found), default=0.0)
            figures = [f"{found[name]:.3f}" if name in found else "" for name in peers]
            for op in ops:
                shown = f"{found[op]:.3f}" if op in found else ""
                figures.append(f"**{shown}**" if shown and found[op] < softmax else shown)
            body.append([number(T), *figures])
        shape = ", ".join(rows[0][name] for name in ("H", "K", "V"))
        tokens = int(rows[0]["B"]) * int(rows[0]["T"])
        lines += [
            f"{'Forward' if p == 'fwd' else 'Forward and backward'}, milliseconds for {number(tokens)} tokens in rows"
            f" of T, H, K, V = {shape}; in bold what is faster than softmax attention:",
            "",
            *grid(("T", *peers, *ops), body),
            "",
        ]
    return lines[:-1]


USUAL = (*GRIDS["main"][:1], *GRIDS["main"][-1:], *GRIDS["cell"])
NAMES = ("B", "T", "H", "K", "V")


def beside_peers(rows: list[dict[str, str]]) -> list[str]:
    """Ops beside the best peer: the usual shapes one by one, all of them in short."""
    entries = summary(rows)
    shapes = {tuple(entry[name] for name in (*NAMES, "segments")) for entry in entries}
    usual = {tuple(map(str, shape[:5])) for shape in USUAL}
    few = len(shapes) <= 8
    shown = [e for e in entries if few or (tuple(e[name] for name in NAMES) in usual and not e["segments"])]
    ops = list(dict.fromkeys(entry["op"] for entry in entries))
    shown.sort(key=lambda entry: ops.index(entry["op"]))
    heads = ("op", "pass", ", ".join(NAMES), "linnet ms", "of limit", "best peer", "peer ms", "linnet is", "memory")
    first = any(entry["first_call_s"] for entry in shown)
    body = []
    for entry in shown:
        memory = "" if entry["peak_bytes"] is None else size(entry["peak_bytes"])
        body.append(
            [
                entry["op"],
                entry["pass"],
                shape_of(entry),
                "" if entry["ms"] is None else f"{entry['ms']:.3f}",
                "" if entry["share"] is None else f"{entry['share']:.0%}",
                entry["peer"] or "",
                "" if entry["peer_ms"] is None else f"{entry['peer_ms']:.3f}",
                "" if entry["ratio"] is None else f"{entry['ratio']:.2f}x",
                memory + (f" ({size(entry['peer_bytes'])})" if entry["peer_bytes"] else ""),
                *([f"{entry['first_call_s']:.1f} s" if entry["first_call_s"] else ""] if first else []),
            ]
        )
    lines = grid((*heads, *(["first call"] if first else [])), body)
    failed = dict.fromkeys(
        f"{e['op']}, {e['pass']}: {shorten(cell(why), 150, placeholder=' …')}" for e in shown for why in e["failed"]
    )
    if failed:
        lines += ["", "Without a time there:", "", *(f"- {line}" for line in failed)]
    if not few:
        body = []
        for entry in overview(entries):
            least = entry["least"]
            body.append(
                [
                    entry["op"],
                    entry["pass"],
                    str(entry["rated"]),
                    f"{least['ratio']:.2f}x",
                    f"{shape_of(least)}, {least['peer']}",
                    f"{entry['median']:.2f}x",
                    f"{entry['greatest']['ratio']:.2f}x",
                    str(entry["slower"]),
                    "" if entry["memory"] is None else f"{entry['memory']:.0%}",
                ]
            )
        heads = ("op", "pass", "shapes", "least", "at", "median", "greatest", "slower", "memory, at most")
        lines += [
            "",
            f"Over all {len(shapes)} shapes, those beside a peer: how many times as fast linnet is, on how many it is"
            " slower, and its memory relative to the peer that takes least:",
            "",
            *grid(heads, body),
        ]
    return lines


def shape_of(entry: dict[str, object]) -> str:
    """Sizes, and how many sequences are packed."""
    sizes = ", ".join(str(entry[name]) for name in NAMES if entry[name])
    return f"{sizes} in {entry['segments']}" if entry["segments"] else sizes


def between(path: Path, start: str, end: str, text: str) -> str:
    """The file with ``text`` between two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{path.relative_to(ROOT)}: expected the lines '{start}' and '{end}'")
    return f"{before}{start}\n{text}\n{end}{after}"


def main() -> None:
    readme, bench = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    wanted = {
        readme: between(readme, START, END, table("docs/mixers.md")),
        ROOT / "docs" / "mixers.md": catalogue(),
        bench: between(bench, TIMES, TIMES_END, times()),
    }
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"out of date: {names}; run scripts/catalogue.py")
        return
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
