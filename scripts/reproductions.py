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

from linnet.mixers import get_mixer, parse_spec
from linnet.reproductions import reproductions
from linnet.reproductions.base import draw
from linnet.training import Cell, Comparison
from linnet.training.report import draw as draw_comparison

ROOT = Path(__file__).parents[1]
TRACKING = ROOT / "reproductions" / "state_tracking.json"
LANGUAGE = ROOT / "reproductions" / "language.json"
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
    held = [row["passed"] for row in result["measured"] if not row["bar"].startswith("none")]
    return "reproduces" if result["passed"] else f"misses {held.count(False)} of {len(held)} bars"


def spent(result: dict[str, Any]) -> str:
    """What the run took: a GPU is waited for, a CPU core is shared."""
    gpu = result["budget"] == "gpu"
    return f"{result['seconds']:.0f} seconds" if gpu else f"{result['cpu_seconds']:.0f} CPU seconds"


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
        f" {result['versions']['linnet']}, {spent(result)}",
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
        " of a paper as an experiment of about three minutes on one CPU core, or on a GPU where it says so. The figures"
        " are not those of the paper: the published ones stand beside them for the direction they point in. Bars were"
        " set before the run; a missed bar stays missed here, and what was tried is said. `linnet reproduce` lists"
        " them, `linnet reproduce NAME` runs one."
    )
    table = ["| | claim | result |", "|---|---|---|"]
    table += [f"| [{cell(r['title'])}](#{anchor(r['title'])}) | {cell(r['claim'])} | {verdict(r)} |" for r in results]
    last = [tracking()] if TRACKING.is_file() else []
    last += [language(json.loads(LANGUAGE.read_text(encoding="utf-8")))] if LANGUAGE.is_file() else []
    return "\n\n".join([head, "\n".join(table), *map(entry, results), *last]) + "\n"


def tracking() -> str:
    """What mixers learned to track beside the classes on their cards."""
    found = json.loads(TRACKING.read_text(encoding="utf-8"))
    tasks = list(dict.fromkeys(row["task"] for row in found["rows"]))
    lines = [
        "## What layers learn to track",
        "",
        f"One layer of each, trained on rows of 4, 8 and 16 elements, tested on 64: share of right answers over all"
        f" positions, and in brackets in the last tenth of the row. One initialisation, {found['hardware']},"
        f" {found['date']}; a dash: not finished in the time. A5 and S5 by their two generators: of elements drawn from"
        f" all 60 or 120 none of these learned more than the first products in so few steps, which is also what keeps"
        f" figures low under Z60.",
        "",
        "What a layer can track is not what it learns here: a low figure does not contradict the card, a high one in"
        " the last tenth has to agree with it, and all do. A5, whose products no fixed depth of diagonal transitions or"
        " of softmax attention computes (unless TC0 is NC1), is tracked to four times the length by several reflections"
        " a token and by nonlinear recurrences (GRU, M2RNN), and by no other. The rotation of five that S5 is made of"
        " takes four reflections: with four the rows hold longest, and with twice the width to four times the length"
        f" ([DeltaProduct](#{anchor('DeltaProduct: four reflections for S5')})). Parity asks for a negative eigenvalue"
        " or a nonlinearity; of those that have one, rwkv7, the LSTM, Gated DeltaNet-2 and two reflections did not"
        " learn it to this length.",
        "",
        f"    {found['command']}",
        "",
        " | ".join(["| mixer", *(f"`{task}`" for task in tasks), "on its card |"]),
        "|---|" + "---|" * (len(tasks) + 1),
    ]
    for mixer in dict.fromkeys(row["mixer"] for row in found["rows"]):
        reached = {
            row["task"]: f"{row['64']:.2f} ({row['late']:.2f})" for row in found["rows"] if row["mixer"] == mixer
        }
        card = get_mixer(parse_spec(mixer)[0]).card.expressivity
        lines.append(" | ".join([f"| `{mixer}`", *(reached.get(task, "-") for task in tasks), f"{cell(card)} |"]))
    return "\n".join(lines)


def language(found: dict[str, Any]) -> str:
    """Language models of one size beside each other: what `linnet compare` left in results.json."""
    setting, cells = found["comparison"], found["cells"]
    training = setting["training"]
    tests = sorted(setting["tests"], key=lambda name: setting["tests"][name][1])
    read = training["steps"] * setting["batch_size"] * setting["length"]
    lines = [
        f"## Language models of {setting['parameters'] / 1e6:.0f}M parameters",
        "",
        f"Each reads {read / 1e6:.1f} million bytes of {found['source']}, {training['steps']} steps of"
        f" {setting['batch_size']} rows of {setting['length']:,} bytes at a peak learning rate of {training['lr']:g},"
        f" {training['precision']}, {setting['layers']} layers of width {setting['sizes'][0]}; the MLPs are as wide as"
        " the number of parameters leaves room for. One initialisation and one learning rate for all: differences of a"
        f" hundredth mean nothing. {found['device']}, {found['date']}, PyTorch {found['versions']['torch']}. Bits per"
        f" byte of held-out text from an empty state, over windows of {' and '.join(tests)} bytes and over the last"
        " half of the longest; the training throughput is the median, evaluations left out.",
        "",
        *(f"- {note}" for note in found["notes"]),
        "",
        f"    {found['command']}",
        "",
        " | ".join(
            ["| mixer", *(f"bits per byte, {name}" for name in tests), "last half", "parameters", "state", "tokens/s |"]
        ),
        "|---|" + "---:|" * (len(tests) + 4),
    ]
    for row, cell_ in zip(found["rows"], cells, strict=True):
        scores = cell_["scores"]
        values = [f"{scores[name]['bits_per_byte']:.3f}" for name in tests]
        values += [f"{scores[tests[-1]]['late']:.3f}", f"{cell_['parameters'] / 1e6:.1f}M"]
        values += [f"{cell_['state_bytes'][tests[-1]] / 2**20:.1f} MiB", f"{cell_['tokens_per_s']:,.0f}"]
        lines.append(" | ".join([f"| `{cell(row['label'])}`", *values]) + " |")
    lines += ["", "![bits per byte over the position](reproductions/language.png)"]
    lines += ["", "![bits per byte during training](reproductions/language-training.png)"]
    return "\n".join(lines)


def anchor(title: str) -> str:
    """The fragment that Markdown renderers give to a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def main() -> None:
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    known = reproductions(missing=True)
    unknown = [r["name"] for r in results if r["name"] not in known]
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
    if LANGUAGE.is_file():
        found = json.loads(LANGUAGE.read_text(encoding="utf-8"))
        cells = [Cell(**values) for values in found["cells"]]
        places = PLOTS / "language.png", PLOTS / "language-training.png"
        draw_comparison(Comparison(**found["comparison"]), cells, *places)
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(plots)} plots")


if __name__ == "__main__":
    main()
