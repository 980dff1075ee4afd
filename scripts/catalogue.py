#!/usr/bin/env python3
"""Write what the mixers' cards say into docs/mixers.md and into the table of the README.

scripts/catalogue.py           write both
scripts/catalogue.py --check   write nothing; name what is out of date, with exit code 1
"""

from __future__ import annotations

import sys
from pathlib import Path

from linnet.cli.inspect import describe
from linnet.cli.list import cite
from linnet.cli.show import number, size
from linnet.mixers import mixers

ROOT = Path(__file__).parents[1]
START, END = "<!-- mixers: made by scripts/catalogue.py -->", "<!-- end of mixers -->"
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


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"README.md: expected the lines '{START}' and '{END}'")
    wanted = {
        ROOT / "README.md": f"{before}{START}\n{table('docs/mixers.md')}\n{END}{after}",
        ROOT / "docs" / "mixers.md": catalogue(),
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
