"""`linnet env` and its self-test."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import linnet
from linnet.cli import app
from linnet.cli.env import self_test
from linnet.ops.core import Case, Cost, Op, ops

runner = CliRunner()


def wrong_in_chunks(x: torch.Tensor, *, state=None, backend: str = "auto"):
    """A sum over time whose second backend loses the first token, or raises."""
    start = 0 if backend == "reference" else 1
    return x[:, start:].cumsum(1)[:, -1], None


def register(monkeypatch: pytest.MonkeyPatch, function) -> None:
    case = Case("plain", lambda r, B, T: {"x": torch.randn(B, T, 4, dtype=torch.float64, generator=r)}, ("x",))
    op = Op("wrong", function, ("reference", "chunked"), (case,), lambda: Cost(0, 0, 0))
    monkeypatch.setattr("linnet.ops.ops", lambda: {"wrong": op})


def test_every_backend_passes_here() -> None:
    found = runner.invoke(app, ["env"])
    assert found.exit_code == 0, found.output
    assert f"linnet       {linnet.__version__}" in found.output
    assert "FAIL" not in found.output
    table = found.output.partition("self-test")[2]
    assert max(map(len, table.splitlines())) <= 80
    assert found.output.count("PASS") >= 2 * len(ops())


def test_json() -> None:
    facts = json.loads(runner.invoke(app, ["env", "--json"]).output)
    assert facts["versions"]["linnet"] == linnet.__version__
    assert facts["versions"]["torch"].startswith(torch.__version__)
    assert facts["machine"]["threads"] == torch.get_num_threads()
    tested = {(result["op"], result["backend"]) for result in facts["self_test"] if result["device"] == "cpu"}
    assert tested == {(op.name, backend) for op in ops().values() for backend in op.backends if backend != "triton"}
    assert all(0 <= result["error"] <= result["bound"] for result in facts["self_test"])


def test_a_wrong_backend_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, wrong_in_chunks)
    reference, chunked = self_test()[:2]
    assert reference["status"] == "PASS"
    assert chunked["status"] == "FAIL"
    assert "plain: relative error" in chunked["message"]
    found = runner.invoke(app, ["env"])
    assert found.exit_code == 1
    assert "FAIL wrong (chunked, cpu): plain: relative error" in " ".join(found.output.split())


def test_a_backend_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor, *, state=None, backend: str = "auto"):
        if backend == "chunked":
            raise RuntimeError("no such instruction [sm_90]")
        return x, None

    register(monkeypatch, broken)
    found = runner.invoke(app, ["env", "--json"])
    assert found.exit_code == 1
    result = json.loads(found.output)["self_test"][1]
    assert result["status"] == "FAIL"
    assert result["message"] == "plain: RuntimeError: no such instruction [sm_90]"
