"""`linnet bench` from the command line, on a CPU."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from linnet.benchmarks.results import COLUMNS, read
from linnet.cli import app, main
from linnet.cli.bench import _job

runner = CliRunner()


def test_measures_and_shows(tmp_path):
    file = tmp_path / "speed.csv"
    options = ["--shapes", "1,16,2,4,4", "--ops", "simple_gla", "--rounds", "1", "--device", "cpu"]
    options += ["--first-call", "linnet", "--ahead", "1"]
    found = runner.invoke(app, ["bench", *options, "--out", str(file)], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    rows = read(file)
    assert list(rows[0]) == list(COLUMNS) and {r["impl"] for r in rows} == {"linnet", "fla", "fla-fused"}
    ours = [r for r in rows if r["impl"] == "linnet"]
    assert [r["pass"] for r in ours] == ["fwd", "fwdbwd"]
    assert all(float(r["ms"]) > 0 and float(r["limit_ms"]) > 0 and float(r["first_call_s"]) > 0 for r in ours)
    assert all(r["note"] == "runs on GPUs only" for r in rows if r["impl"] != "linnet")
    assert "simple_gla" in found.output and "fla: runs on GPUs only" in found.output
    image = file.with_suffix(".png")
    assert image.read_bytes().startswith(b"\x89PNG")
    image.unlink()
    shown = runner.invoke(app, ["bench", "--show", str(file), "--json"])
    assert json.loads(shown.output)["rows"] == rows and image.exists()
    assert len(json.loads(shown.output)["summary"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--suite", "dacay"],
            "--suite: expected one of decay, mlstm, delta, scan, conv, cell, attention, length, decode, train",
        ),
        (["--grid", "huge"], "grid: expected one of"),
        (["--suite", "decode", "--grid", "wide"], "grid of the suite 'decode': expected one of main, tiny"),
        (["--ops", "kda"], "--ops: expected some of linear_attn"),
        (["--impls", "triton"], "--impls: expected some of linnet, fla"),
        (["--dtype", "int8"], "--dtype: expected"),
        (["--device", "tpu"], "--device: expected"),
        (["--shapes", "1,2,3,4"], "--shapes: expected sizes B,T,H,K,V"),
        (["--suite", "train", "--shapes", "1,0"], "--shapes: expected sizes B,T,"),
        (["--backend", "cuda"], "backend: expected"),
        (["--resume", "--force"], "--resume: expected without --force"),
        (["--out", "speed.png"], "--out: expected a CSV file"),
        (["--timeout", "0"], "--timeout"),
        (["--patience", "-1"], "--patience"),
    ],
)
def test_bad_options_are_named(capsys, options, message):
    with pytest.raises(SystemExit) as left:
        main(["bench", *options])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_cpu_has_small_shapes_by_default():
    options = (None, None, None, False, None, "auto", "cpu", 1, None)
    assert _job("decay", None, *options)["shapes"] == _job("decay", "tiny", *options)["shapes"]
    assert _job("decode", None, *options)["small"]


def test_an_existing_file_is_kept(tmp_path, capsys):
    file = tmp_path / "speed.csv"
    picture = tmp_path / "speed.png"
    picture.write_text("mine")
    with pytest.raises(SystemExit):
        main(["bench", "--out", str(file)])
    assert "speed.png exists" in capsys.readouterr().err and picture.read_text() == "mine" and not file.exists()
    file.write_text("mine")
    with pytest.raises(SystemExit):
        main(["bench", "--out", str(file)])
    assert "--resume" in capsys.readouterr().err and file.read_text() == "mine"
