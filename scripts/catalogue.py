#!/usr/bin/env python3
"""Write what the mixers' cards say into docs/mixers.md and into the table of the README, and the committed benchmark
results into docs/benchmarks.md.

scripts/catalogue.py           write them
scripts/catalogue.py --check   write nothing; name what is out of date, with exit code 1
"""

from __future__ import annotations

import sys
from pathlib import Path

from linnet.benchmarks.results import read, summary
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
        "# Mixers\n\nMade from the cards in `src/linnet/mixers` by `scripts/catalogue.py`; edit those. `linnet list`"
        " and `linnet inspect NAME` print the same. H: heads, K and V: channels of a key and a value head, W: taps of a"
        " short convolution."
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
    """A table for each file of benchmarks/results: linnet beside the best peer, or each model."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        rows = read(path)
        about = rows[0]
        told = (
            f"`{path.name}`: one {about['gpu']}, PyTorch {about['torch']}, Triton {about['triton']}, {about['date']}."
        )
        notes = sorted({row["note"] for row in rows if row["note"] and row["ms"]})
        lines = [f"### {path.stem}", "", " ".join([told, *(f"{note}." for note in notes)]), ""]
        if about["op"] in ("decode", "train"):
            lines += ["| model | batch | context | ms | tokens/s | memory |", "|---|---|---|---|---|---|"]
            for row in rows:
                figures = (
                    (f"{float(row['ms']):.2f}", f"{float(row['tokens_per_s']):,.0f}", size(int(row["peak_bytes"])))
                    if row["ms"]
                    else (cell(row["note"]), "", "")
                )
                lines.append(f"| {' | '.join([row['impl'], row['B'], row['T'], *figures])} |")
        else:
            lines += [
                "| op | pass | B, T, H, K, V | linnet ms | of limit | best peer | peer ms | linnet is |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for entry in summary(rows):
                shape = ", ".join(str(entry[name]) for name in ("B", "T", "H", "K", "V") if entry[name])
                figures = [
                    "" if entry["ms"] is None else f"{entry['ms']:.3f}",
                    "" if entry["share"] is None else f"{entry['share']:.0%}",
                    entry["peer"] or "",
                    "" if entry["peer_ms"] is None else f"{entry['peer_ms']:.3f}",
                    "" if entry["ratio"] is None else f"{entry['ratio']:.2f}x",
                ]
                lines.append(f"| {' | '.join([entry['op'], entry['pass'], shape, *figures])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


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
