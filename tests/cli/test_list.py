"""`linnet list`."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from linnet.cli import app
from linnet.cli.list import cite
from linnet.cli.show import print_in_full
from linnet.mixers import mixers
from linnet.ops import ops

runner = CliRunner()


def test_every_mixer_is_listed() -> None:
    found = runner.invoke(app, ["list"])
    assert found.exit_code == 0
    for name, cls in mixers().items():
        assert name in found.output
        assert cls.card.engine in found.output


@pytest.mark.parametrize("option", [[], ["--ops"]])
def test_nothing_is_cut_on_80_columns(option: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Console(width=80, highlight=False)
    monkeypatch.setattr("linnet.cli.list.console", lambda: narrow)
    with narrow.capture() as shown:
        runner.invoke(app, ["list", *option])
    assert len(shown.get()) > 1000
    assert "…" not in shown.get()


def test_figures_are_printed_in_full() -> None:
    table = Table("one", "two", "three")
    table.add_row("123456.789", "123456.789", "123456.789")
    narrow = Console(width=20)
    with narrow.capture() as shown:
        print_in_full(narrow, table)
    assert shown.get().count("123456.789") == 3
    assert narrow.width == 20


def test_json_of_mixers() -> None:
    rows = json.loads(runner.invoke(app, ["list", "--json"]).output)
    assert [row["name"] for row in rows] == [*mixers()]
    assert all(set(row) == {"name", "paper", "engine", "state", "expressivity"} for row in rows)
    assert all(row["paper"] == mixers()[row["name"]].card.paper for row in rows)


def test_every_op_is_listed() -> None:
    found = runner.invoke(app, ["list", "--ops"])
    assert found.exit_code == 0
    assert all(name in found.output for name in ops())
    assert "chunked" in found.output


def test_json_of_ops() -> None:
    rows = json.loads(runner.invoke(app, ["list", "--ops", "--json"]).output)
    assert [row["name"] for row in rows] == sorted(ops())
    for row in rows:
        assert row["backends"] == [*ops()[row["name"]].backends]
        assert row["summary"]
        assert not set(row["summary"]) & set("`\n")


def test_short_citation() -> None:
    assert cite("Dao & Gu 2024, A Title: with, commas (arXiv 2405.21060)") == "Dao & Gu 2024, arXiv 2405.21060"
    assert cite("Two et al. 1997, Old Paper") == "Two et al. 1997, Old Paper"
    assert all(len(cite(cls.card.paper)) < 60 for cls in mixers().values())
