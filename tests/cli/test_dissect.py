"""`linnet dissect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linnet.cli import app, main

runner = CliRunner()


def test_text(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "gla.png"
    line = ["dissect", "gla(num_heads=2)", "--d-model", "8", "--length", "6", "--steps", "0", "--out", str(file)]
    found = runner.invoke(app, line)
    assert found.exit_code == 0, found.output
    for part in (
        "gla(num_heads=2), d_model = 8",
        "16 numbers",
        "diagonal, 4 different factors",
        "half-life",
        "gla.png",
    ):
        assert part in found.output
    assert "measured state tracking" not in found.output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_json_and_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name alone takes the first example of its card; the plot goes to a file of its name."""
    monkeypatch.chdir(tmp_path)
    found = runner.invoke(app, ["dissect", "s4d", "--length", "5", "--steps", "2", "--json"])
    facts = json.loads(found.output)
    assert (facts["spec"], facts["d_model"], facts["memory"]) == ("s4d(state_size=8)", 8, 64)
    assert facts["plot"] == "dissect-s4d.png" and Path("dissect-s4d.png").is_file()
    assert facts["parts"][0]["constant"] is True and facts["expressivity"].startswith("TC0")
    assert list(facts["tracking"]) == ["flip-flop", "parity", "product in S3"]
    assert facts["tracking"]["parity"].keys() == {"accuracy", "chance", "verdict"}
    assert list(facts["tracking"]["parity"]["accuracy"]) == ["16", "32", "64"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["glaa"], ("Error: mixer:", "glaa")),
        (["gla(num_head=2)"], ("Error: mixer 'gla'", "num_head")),
        (["gla", "--out", "plot.pdf"], ("Error: out:", ".png", "plot.pdf")),
        (["gla(expand_k=1.0, num_heads=1)", "--d-model", "64"], ("Error: mixer:", "1,024", "4,096")),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], line: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["dissect", *line])
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and err.count("\n") == 1
    assert all(part in err for part in parts)
