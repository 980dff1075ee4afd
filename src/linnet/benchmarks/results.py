"""Measurements as rows of a CSV file, and what they say."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "Results", "key", "overview", "summary"]

COLUMNS = (
    "date",
    "gpu",
    "torch",
    "triton",
    "op",
    "impl",
    "pass",
    "B",
    "T",
    "H",
    "K",
    "V",
    "dtype",
    "ms",
    "peak_bytes",
    "first_call_s",
    # beyond the common ones
    "segments",  # packed sequences in the row; empty: none
    "limit_ms",  # least time by the op's cost and the measured ceilings
    "copy_tbs",
    "matmul_tflops",
    "ms_low",  # tenth and ninetieth percentile
    "ms_high",
    "samples",
    "difference",  # of the output from linnet's, relative
    "tokens_per_s",
    "mfu",  # share of the matrix ceiling that the model's operations reach
    "version",  # of the implementation's package
    "note",  # why there is no time, or what is particular to how it was taken
)
_KEY = ("op", "impl", "pass", "B", "T", "H", "K", "V", "dtype", "segments")

Row = Mapping[str, Any]


def key(row: Row) -> tuple[str, ...]:
    """What makes a row the same measurement as another."""
    return tuple("" if row.get(name) is None else str(row.get(name)) for name in _KEY)


class Results:
    """The rows of a file, added to as they come.

    Args:
        path: the CSV file; None keeps the rows in memory.
        existing: what to do with a file that is there: "keep" its rows and go on, "replace" it, or "refuse".

    Raises:
        FileExistsError: the file exists and ``existing`` is "refuse".
        ValueError: a kept file has other columns.
    """

    def __init__(self, path: Path | None, existing: str = "refuse"):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        if path.exists() and existing == "keep":
            self.rows = read(path)
            return
        if path.exists() and existing != "replace":
            raise FileExistsError(f"{path} exists: go on with it by --resume, or replace it by --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)

    def add(self, row: Row) -> None:
        """Append a row, on disk before this returns."""
        cells = {name: _cell(row.get(name)) for name in COLUMNS}
        self.rows.append(cells)
        if self.path is not None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(cells.values())
                file.flush()
                os.fsync(file.fileno())

    @property
    def done(self) -> set[tuple[str, ...]]:
        """Keys of all rows, those of failures included."""
        return {key(row) for row in self.rows}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that this module wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns of `linnet bench`, got {reader.fieldnames}")
        return list(reader)


def summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry a measured op, pass and shape: linnet's time, the best peer's, their ratio (above 1: linnet is faster),
    linnet's share of the hardware limit and memory, and the least memory of a peer; a missing figure is None."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        ours = key(row)
        groups.setdefault((ours[0], *ours[2:]), []).append(row)
    entries = []
    for group in groups.values():
        own = [row for row in group if row["impl"] == "linnet"]
        timed = [row for row in group if row["impl"] != "linnet" and row["ms"]]
        best = min(timed, key=lambda row: float(row["ms"]), default=None)
        ms = float(own[0]["ms"]) if own and own[0]["ms"] else None
        limit = float(group[0]["limit_ms"]) if group[0]["limit_ms"] else None
        entries.append(
            {
                **{name: group[0][name] for name in ("op", "pass", "B", "T", "H", "K", "V", "dtype", "segments")},
                "ms": ms,
                "peer": best["impl"] if best else None,
                "peer_ms": float(best["ms"]) if best else None,
                "ratio": float(best["ms"]) / ms if best and ms else None,
                "share": limit / ms if limit and ms else None,
                "peak_bytes": int(own[0]["peak_bytes"]) if own and own[0]["peak_bytes"] else None,
                "peer_bytes": min((int(row["peak_bytes"]) for row in timed if row["peak_bytes"]), default=None),
                "first_call_s": float(own[0]["first_call_s"]) if own and own[0].get("first_call_s") else None,
                "failed": [f"{row['impl']}: {row['note']}" for row in group if not row["ms"]],
            }
        )
    return entries


def overview(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a :func:`summary` says of each op and pass over all shapes: how many, on how many of them beside a peer, the
    entries with the least and the greatest ratio, the median ratio, how often linnet is slower, and the most memory
    relative to the peer that takes least. Ops without a peer have no entry."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["op"], entry["pass"]), []).append(entry)
    found = []
    for (op, p), group in groups.items():
        rated = sorted((entry for entry in group if entry["ratio"] is not None), key=lambda entry: entry["ratio"])
        memory = [e["peak_bytes"] / e["peer_bytes"] for e in rated if e["peak_bytes"] and e["peer_bytes"]]
        if rated:
            found.append(
                {
                    "op": op,
                    "pass": p,
                    "shapes": len(group),
                    "rated": len(rated),
                    "least": rated[0],
                    "greatest": rated[-1],
                    "median": statistics.median(entry["ratio"] for entry in rated),
                    "slower": sum(entry["ratio"] < 1 for entry in rated),
                    "memory": max(memory, default=None),
                }
            )
    return found


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
