from __future__ import annotations

import json
import os
import re
import signal

import pytest

from linnet.models import Compressor, Decoder
from linnet.tasks import TaskData
from linnet.training import Comparison, compare, load_comparison
from linnet.training.report import summarise, write_report

SMALL = {
    "mixers": ["gla(num_heads=2)", "attention(num_heads=2) + gla(num_heads=2)"],
    "sizes": [16],
    "seeds": 1,
    "length": 8,
    "tests": {"8": ("parity", 8), "20": ("parity", 20)},
    "training": {"steps": 4, "save_every": 2, "device": "cpu"},
    "batch_size": 4,
    "test_rows": 8,
}


def small(task="parity", **changes) -> Comparison:
    return Comparison(task, **{**SMALL, **changes})


def test_trains_tests_and_reports(tmp_path):
    comparison = small()
    out = tmp_path / "out"
    reports = []
    cells = compare(comparison, out=out, on_cell=lambda done: reports.append(write_report(out, comparison, done)))
    assert cells is not None
    assert [len(rows) for rows in reports] == [1, 2]  # what is finished can be looked at while the rest is trained
    assert [c.mixer for c in cells] == comparison.mixers
    for cell in cells:
        assert set(cell.scores) == {"8", "20"}
        assert 0 <= cell.scores["20"]["answers"] <= 1
        assert cell.tokens_per_s > 0
        assert cell.curve[-1][0] == 4
    gla, hybrid = cells
    assert gla.state_bytes["8"] == gla.state_bytes["20"]  # a recurrent state does not grow, a cache does
    assert hybrid.state_bytes["8"] < hybrid.state_bytes["20"]
    pattern = Decoder(comparison.config(hybrid.mixer, 16))
    assert [type(layer.mixer).__name__ for layer in pattern.layers] == ["Attention", "GLA"]
    assert hybrid.parameters == pattern.num_parameters()

    rows = write_report(out, comparison, cells)
    assert rows == summarise(comparison, cells)
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs nothing beside it
    assert "attention(num_heads=2) + gla(num_heads=2)" in page
    assert json.loads((out / "results.json").read_text())["rows"][0]["label"] == "gla(num_heads=2)"
    with pytest.raises(FileExistsError, match="is not empty and nothing in it is overwritten"):
        compare(comparison, out=out)
    assert compare(comparison, out=out, resume=True) == cells
    again, found = load_comparison(out)
    assert again == comparison
    assert sorted(c.mixer for c in found) == sorted(comparison.mixers)


def test_answers_drawn_by_chance(tmp_path):
    task = "selectivbench(letters=3, target='symbol')"
    comparison = small(task, length=6, tests={"6": (task, 6)}, mixers=["gla(num_heads=2)"])
    cells = compare(comparison, out=tmp_path / "out")
    assert cells is not None
    assert cells[0].scores["6"]["divergence"] == pytest.approx(cells[0].curve[-1][1], rel=1e-5)
    write_report(tmp_path / "out", comparison, cells)
    assert "Divergence in nats" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(ValueError, match="tests: expected a score in divergence in nats, got 'parity'"):
        small(task, length=6)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    comparison, real, calls = small(), TaskData.batch, []

    def batch(self, step, *rest):
        calls.append(step)
        if len(calls) == 10:  # a run makes 1 to check, 4 to train and 2 to test: this is in the middle of the second
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, *rest)

    monkeypatch.setattr(TaskData, "batch", batch)
    out = tmp_path / "out"
    assert compare(comparison, out=out) is None
    assert len(load_comparison(out)[1]) == 1
    with pytest.raises(ValueError, match=r"other settings \(batch_size\)"):
        compare(small(batch_size=2), out=out, resume=True)
    cells = compare(comparison, out=out, resume=True)
    whole = compare(comparison, out=tmp_path / "whole")
    assert cells is not None
    assert whole is not None
    for cell, other in zip(cells, whole, strict=True):
        assert (cell.scores, cell.loss, cell.curve[-1]) == (other.scores, other.loss, other.curve[-1])


def test_stopped_before_or_while_it_was_tested(tmp_path, monkeypatch):
    comparison = small(mixers=["gla(num_heads=2)"])

    def cut(*_: object) -> None:
        raise RuntimeError("power cut")

    for function in ("_test", "train"):
        with monkeypatch.context() as patch:
            patch.setattr(f"linnet.training.comparison.{function}", lambda *_, **__: cut())
            with pytest.raises(RuntimeError, match="power cut"):
                compare(comparison, out=tmp_path / function)
        cells = compare(comparison, out=tmp_path / function, resume=True)
        assert cells is not None
        assert cells[0].seconds > 0


def test_compression_is_read_from_the_last_output(tmp_path):
    comparison = Comparison("mad_compression", **{**SMALL, "mixers": ["gla(num_heads=2)"], "tests": {}, "length": 8})
    assert comparison.frame is Compressor
    assert compare(comparison, out=tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": []}, "mixers: expected at least one, none twice"),
        ({"mixers": ["gla", "gla"]}, "mixers: expected at least one, none twice"),
        ({"mixers": ["nope"]}, "mixer: expected one of"),
        ({"seeds": 0}, "seeds: expected at least 1"),
        ({"sizes": [15]}, "num_heads"),
        ({"tests": {"x": ("mqar", 4)}}, "length: expected at least 16"),
        ({"training": {"stepps": 3}}, "unknown setting 'stepps'"),
        ({"model": {"mpl": 3}}, "unknown field 'mpl'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="no comparison in"):
        compare(small(), out=tmp_path, resume=True)


def test_text(tmp_path):
    """A text in place of a task: bits per byte, which must fall, over the position; and one number of parameters."""
    file = tmp_path / "text"
    file.write_bytes(b"the same line again\n" * 200)
    text = f"text(data={str(file)!r}, held_out=0.2)"
    comparison = small(
        task=text,
        mixers=["gla(num_heads=2)", "gla(num_heads=2) + gla(num_heads=2) + attention(num_heads=2)"],
        layers=3,
        length=32,
        tests={"32": (text, 32), "64": (text, 64)},
        parameters=60_000,
        training={"steps": 12, "save_every": 12, "evaluate_every": 3, "precision": "bf16", "device": "cpu"},
    )
    cells = compare(comparison, out=tmp_path / "out")
    assert cells is not None
    step = 3 * 3 * 64 * 16  # MLPs are as wide as multiples of 64
    for cell in cells:
        assert abs(cell.parameters - 60_000) <= step / 2
        assert cell.curve[0][1] > cell.curve[-1][1] > 0
        for name, scores in cell.scores.items():
            assert [place for place, _ in scores["by_position"]][-1] == int(name)
            assert scores["bits_per_byte"] < 8.1
    rows = write_report(tmp_path / "out", comparison, cells)
    assert rows[1].label == "2 x gla(num_heads=2) + attention(num_heads=2)"
    assert "bits per byte 64" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "text(datum='x')"}, "task 'text': unknown option 'datum'"),
        ({"task": "text(held_out='0.1')"}, "task 'text': option held_out: expected float, got '0.1'"),
        ({"task": "text(max_bytes=50000)", "length": [8, 16]}, "length: expected one number of tokens for a text"),
        (
            {"task": "text(max_bytes=50000)", "tests": {"x": ("text(max_bytes=50000)", 50_000)}},
            "tokens of held-out text",
        ),
        ({"tests": {"x": ("text(max_bytes=50000)", 16)}}, "tests: expected a score in accuracy"),
        ({"parameters": 100}, r"parameters: expected at least \d+ with the mixers gla"),
        ({"parameters": 10_000, "model": {"mlp": "none"}}, "parameters: expected None where no layer has an MLP"),
    ],
)
def test_bad_text_and_parameters(changes, message):
    if "text" in changes.get("task", ""):
        changes = {"tests": {"8": (changes["task"], 8)}} | changes
    with pytest.raises(ValueError, match=message):
        Comparison(**{"task": "parity", **SMALL, **changes})
