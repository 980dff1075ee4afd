#!/usr/bin/env python3
"""Write the recorded results of `linnet reproduce` into docs/reproductions.md, with their plots.

scripts/reproductions.py           write the page and the plots
scripts/reproductions.py --check   write nothing; name what is out of date, with exit code 1

Results are recorded by `linnet reproduce NAME --results reproductions/results`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from linnet.reproductions import reproductions
from linnet.reproductions.base import draw

ROOT = Path(__file__).parents[1]
RESULTS, PLOTS, PAGE = (
    ROOT / "reproductions" / "results",
    ROOT / "docs" / "reproductions",
    ROOT / "docs" / "reproductions.md",
)


def cell(text: object) -> str:
    """Text that stays in one cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def verdict(result: dict[str, Any]) -> str:
    """Whether the claim reproduces, in a word or two."""
    missed = sum(not row["passed"] for row in result["measured"])
    return "reproduces" if result["passed"] else f"misses {missed} of {len(result['measured'])} bars"


def entry(result: dict[str, Any]) -> str:
    """The section of one reproduction."""
    lines = [
        f"## {result['title']}",
        "",
        f"`linnet reproduce {result['name']}`: **{verdict(result)}**.",
        "",
        f"- **Paper**: {result['paper']}",
        f"- **Claim**: {result['claim']}",
        f"- **Published**: {result['published']}",
        f"- **Here**: {result['setup']}",
        f"- **Run**: {result['date']}, {result['hardware']}, PyTorch {result['versions']['torch']}, linnet"
        f" {result['versions']['linnet']}, {result['cpu_seconds']:.0f} CPU seconds",
        *(f"- **Tried**: {line}" for line in result["tried"]),
        "",
        "| figure | published | measured | bar | |",
        "|---|---|---|---|---|",
    ]
    for row in result["measured"]:
        measured = "not a number" if row["measured"] is None else f"{row['measured']:.4g}"
        met = "" if row["bar"].startswith("none") else "met" if row["passed"] else "**missed**"
        lines.append(
            "| " + " | ".join(cell(x) for x in (row["what"], row["published"], measured, row["bar"], met)) + " |"
        )
    lines += ["", f"![{result['title']}](reproductions/{result['name']}.png)"]
    return "\n".join(lines)


def page(results: list[dict[str, Any]]) -> str:
    """docs/reproductions.md."""
    head = (
        "# Reproductions\n\nMade from `reproductions/results` by `scripts/reproductions.py`. Each is the central claim"
        " of a paper as an experiment of about three minutes on one CPU core, so the figures are not those of the"
        " paper: the published ones stand beside them for the direction they point in. Bars were set before the run; a"
        " missed bar stays missed here. `linnet reproduce` lists them, `linnet reproduce NAME` runs one."
    )
    table = ["| | claim | result |", "|---|---|---|"]
    table += [f"| [{cell(r['title'])}](#{anchor(r['title'])}) | {cell(r['claim'])} | {verdict(r)} |" for r in results]
    return "\n\n".join([head, "\n".join(table), *map(entry, results)]) + "\n"


def anchor(title: str) -> str:
    """The fragment that Markdown renderers give to a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def main() -> None:
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    unknown = [r["name"] for r in results if r["name"] not in reproductions(missing=True)]
    if unknown:
        sys.exit(f"reproductions/results: no such reproduction: {', '.join(unknown)}")
    text = page(results)
    plots = [PLOTS / f"{r['name']}.png" for r in results]
    if "--check" in sys.argv[1:]:
        stale = [] if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text else [PAGE]
        stale += [plot for plot in plots if not plot.is_file()]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"out of date: {names}; run scripts/reproductions.py")
        return
    PLOTS.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    for plot, result in zip(plots, results, strict=True):
        draw(plot, result)
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(plots)} plots")


if __name__ == "__main__":
    main()
