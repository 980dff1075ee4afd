"""The rows on disk, and what is read out of them."""

from __future__ import annotations

import csv

import pytest

from linnet.benchmarks.results import COLUMNS, Results, key, overview, read, summary


def row(impl="linnet", ms=2.0, **more):
    shape = {"B": 1, "T": 8, "H": 2, "K": 4, "V": 4, "dtype": "float32", "segments": None}
    return {"op": "gla", "impl": impl, "pass": "fwd", **shape, "ms": ms, "limit_ms": 0.5, "peak_bytes": 100, **more}


def test_the_columns_that_others_rely_on():
    first = "date gpu torch triton op impl pass B T H K V dtype ms peak_bytes first_call_s"
    assert COLUMNS[:16] == tuple(first.split())


def test_rows_survive_the_disk(tmp_path):
    file = tmp_path / "new" / "x.csv"
    results = Results(file)
    results.add(row(ms=1 / 3))
    results.add(row("fla", None, note='out of memory, "7 GiB"'))
    with file.open(newline="") as f:
        assert tuple(next(csv.reader(f))) == COLUMNS
    assert read(file) == results.rows and results.rows[0]["ms"] == "0.333333" and results.rows[1]["ms"] == ""
    again = Results(file, "keep")
    assert again.done == {key(row()), key(row("fla"))} == results.done
    again.add(row("other"))
    assert len(read(file)) == 3


def test_nothing_is_overwritten_unasked(tmp_path):
    file = tmp_path / "x.csv"
    Results(file).add(row())
    with pytest.raises(FileExistsError, match="--resume"):
        Results(file)
    assert len(read(file)) == 1
    assert Results(file, "replace").rows == [] and read(file) == []
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns"):
        Results(file, "keep")


def test_summary():
    rows = [row("slow", 9.0), row(), row("fast", 3.0, peak_bytes=50), row("broken", None, note="no"), row(T=16)]
    one, other = summary(rows)
    assert (one["ms"], one["peer"], one["peer_ms"], one["ratio"], one["share"]) == (2.0, "fast", 3.0, 1.5, 0.25)
    assert (one["peak_bytes"], one["peer_bytes"], one["failed"]) == (100, 50, ["broken: no"])
    assert other["peer"] is None and other["ratio"] is None
    alone = summary([row("fast", 3.0, limit_ms=None), row(ms=None, note="failed")])[0]
    assert alone["ms"] is None and alone["ratio"] is None and alone["share"] is None and alone["peer_ms"] == 3.0


def test_overview():
    rows = [row(ms=1.0), row("fla", 4.0), row(T=16, ms=2.0), row("fla", 1.0, T=16, peak_bytes=50), row(T=32)]
    (entry,) = overview(summary([*rows, row(op="alone")]))
    assert (entry["op"], entry["pass"], entry["shapes"], entry["rated"], entry["slower"]) == ("gla", "fwd", 3, 2, 1)
    assert (entry["least"]["ratio"], entry["least"]["T"], entry["greatest"]["ratio"]) == (0.5, 16, 4.0)
    assert (entry["median"], entry["memory"]) == (2.25, 2.0)
