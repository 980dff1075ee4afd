"""`linnet inspect`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from linnet.cli import app, main
from linnet.cli.inspect import describe
from linnet.mixers import build_mixer, mixers

runner = CliRunner()


@pytest.mark.parametrize("name", mixers())
def test_every_mixer_can_be_inspected(name: str) -> None:
    """The card, a meaning for every option, and a size that is that of the module."""
    facts = describe(name, 128)
    assert facts["summary"]
    assert facts["paper"] == mixers()[name].card.paper
    for option in facts["options"]:
        assert option["meaning"], f"{name}: the docstring does not say what {option['option']} is"
    parameters = sum(p.numel() for p in build_mixer(name, 128).parameters())
    assert facts["example"]["parameters"] == parameters
    first, later = facts["example"]["state_bytes"].values()
    assert 0 <= first <= later
    assert first == later or not facts["constant_state"]


def test_text() -> None:
    found = runner.invoke(app, ["inspect", "gla", "--d-model", "64"])
    assert found.exit_code == 0
    card = mixers()["gla"].card
    for part in (card.paper, card.identities[0].claim, "gate_low_rank_dim", "At d_model = 64:", "whatever the length"):
        assert part in found.output


def test_json() -> None:
    found = runner.invoke(app, ["inspect", "gla(num_heads=2)", "--d-model", "64", "--json"])
    facts = json.loads(found.output)
    assert facts["name"] == "gla"
    assert facts["example"]["spec"] == "gla(num_heads=2)"
    assert facts["example"]["state_bytes"]["1024"] == 4 * 2 * 16 * 32
    option = facts["options"][0]
    assert (option["option"], option["type"], option["default"]) == ("num_heads", "int", 4)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("glaa", ("Error: mixer:", "glaa", *mixers())),
        ("gla(num_head=2)", ("Error: mixer 'gla'", "num_head", "num_heads")),
        ("gla(num_heads=7)", ("Error:", "num_heads", "7")),
        ("gla(", ("Error: mixer spec:",)),
    ],
)
def test_bad_names_and_options(capsys: pytest.CaptureFixture[str], spec: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["inspect", spec])
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert all(part in err for part in parts)
