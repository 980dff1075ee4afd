"""`linnet compare`, `linnet reproduce` and `linnet eval`, from the command line to the files they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from linnet.cli import app
from linnet.reproductions import reproductions
from linnet.tasks import tasks

runner = CliRunner()

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*line: object) -> Result:
    return runner.invoke(app, [str(word) for word in line], env={"COLUMNS": "160"})


class TestCompare:
    LINE = ("--mixers", "gla(num_heads=2)", "--sizes", "16", "--seeds", 1, "--steps", 3, "--length", "4, 8")
    LINE += ("--test-lengths", "8,16", "--batch-size", 4, "--test-rows", 8, "--device", "cpu")

    def test_compares(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        found = call("compare", "--task", "group(group='Z5')", *self.LINE, "--out", out)
        assert found.exit_code == 0, found.output
        assert "gla(num_heads=2)" in found.output
        assert {p.name for p in out.iterdir()} == {
            "comparison.json", "results.json", "index.html", "scores.png", "training.png", "cells",
        }  # fmt: skip
        assert json.loads((out / "comparison.json").read_text())["length"] == [4, 8]
        again = call("compare", "--resume", "--out", out)
        assert again.exit_code == 0
        assert "1/1" in again.output
        same = call("compare", "--resume", "--task", "group(group='Z5')", *self.LINE, "--out", out)
        assert same.exit_code == 0, same.output
        for flag, value in {"--steps": 9, "--task": "parity", "--sizes": 32, "--test-lengths": "8, 32"}.items():
            refused = call("compare", "--resume", "--out", out, flag, value)
            assert f"{flag}: this comparison was started with" in str(refused.exception)
        refused = call("compare", "--task", "parity", *self.LINE, "--out", out).exception
        assert isinstance(refused, FileExistsError)
        assert "go on with its comparison (--resume)" in str(refused)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["--task", "nope"], "task: expected one of"),
            (["--mixers", "gla,"], "mixers: expected specs"),
            (["--sizes", "x"], "sizes: expected whole numbers"),
            (["--sizes", "0"], "sizes: expected widths of at least 1, got [0]"),
            (["--parameters", "many"], "parameters: expected a number such as"),
            (["--resume"], "no comparison in"),
        ],
    )
    def test_errors_leave_nothing(self, tmp_path: Path, line: list[str], message: str) -> None:
        out = tmp_path / "out"
        assert message in str(call("compare", *line, "--out", out).exception)
        assert not out.exists()


class TestReproduce:
    def test_lists(self) -> None:
        found = call("reproduce")
        assert found.exit_code == 0
        assert all(name in found.output for name in reproductions())

    def test_runs(self, tmp_path: Path) -> None:
        found = call("reproduce", "tfla", "--quick", "--out", tmp_path, "--results", tmp_path / "results")
        assert found.exit_code == 0, found.output
        assert "quick run, no verdict" in found.output
        assert (tmp_path / "tfla" / "plot.png").is_file()
        assert not (tmp_path / "results").exists()  # quick runs are not recorded

    def test_errors(self) -> None:
        assert "name: expected one of" in str(call("reproduce", "nope").exception)
        assert "got both" in str(call("reproduce", "gla", "--all").exception)
        assert "expected a name or --all with --quick" in str(call("reproduce", "--quick").exception)
        assert "budget: expected cpu for gla" in str(call("reproduce", "gla", "--budget", "moon").exception)
        assert "budget: expected cpu or gpu" in str(call("reproduce", "--all", "--budget", "moon").exception)


class TestEval:
    def test_measures_a_run(self, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.mkdir()
        for i in range(20):
            (text / f"{i}.txt").write_text(f"Once upon a time, for the {i}th time, there was a fox.\n" * 20)
        run = tmp_path / "run"
        line = [
            "--mixers",
            "gla(num_heads=2)",
            "--d-model",
            16,
            "--layers",
            1,
            "--set",
            "mlp_hidden=16",
            "--context",
            16,
        ]
        line += ["--batch-size", 64, "--steps", 2, "--device", "cpu", "--data", text, "--out", run, "--held-out", 0.2]
        assert call("train", *line).exit_code == 0
        found = call("eval", run, "--rows", 2, "--questions", 1, "--context", 600)
        assert found.exit_code == 0, found.output
        assert "beyond training" in found.output
        results = json.loads((run / "evaluation" / "results.json").read_text())
        assert [b["last"] for b in results["by_position"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600]
        assert results["questions"]["cwe"] is None
        assert results["questions"]["niah_single_1"] is not None
        assert (run / "evaluation" / "context.png").is_file()
        assert call("eval", run, "--rows", 2, "--questions", 0).exit_code == 0
        assert "context: expected at most the " in str(call("eval", run, "--context", 10**6).exception)
        (run / "run.json").unlink()
        assert "name a text with --data" in str(call("eval", run).exception)


def test_tasks_are_listed() -> None:
    found = call("list", "--tasks", "--json")
    assert {row["name"] for row in json.loads(found.output)} == set(tasks())
    assert "got both" in str(call("list", "--tasks", "--ops").exception)
