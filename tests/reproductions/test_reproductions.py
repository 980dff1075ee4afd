"""Every reproduction runs; what is recorded holds together; one is run for real."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from linnet.reproductions import Bar, Experiment, kimi_tasks, reproduce, reproductions, s5, selectivbench_models
from linnet.reproductions.tfla import expected_half_gain, gains, half_gain
from linnet.training import Cell

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "reproductions" / "results").glob("*.json"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, about in reproductions().items() if "cpu" in about.budgets])
def test_quick(name: str, tmp_path: Path) -> None:
    result = reproduce(name, folder=tmp_path / name, quick=True)
    assert result["quick"]
    assert json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8")) == result
    assert (tmp_path / name / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert all(row["measured"] is not None for row in result["measured"])
    assert all(len(points) > 1 for points in result["plot"]["curves"].values())
    with pytest.raises(FileExistsError, match="nothing in it is overwritten"):
        reproduce(name, folder=tmp_path / name, quick=True)


class Smaller(Experiment):
    """Two rows a step, in fp32."""

    def compare(self, name: str, /, **options: Any) -> list[Cell]:
        training = {**options["training"], "precision": "no"}
        return super().compare(name, **{**options, "batch_size": 2, "training": training})


@pytest.mark.slow
def test_quick_on_a_cpu_what_is_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few tokens in place of 256: the tasks fit, figures and curves come out."""
    monkeypatch.setattr(kimi_tasks, "LENGTH", 24)
    outcome = kimi_tasks.run(Smaller(tmp_path, "gpu", quick=True))
    assert all(bar.known for bar in outcome.bars)
    assert {bar.bar() for bar in outcome.bars} == {"≥ 0.9", "≥ -0.01", "≥ 0", "none, for information"}
    assert set(outcome.curves) == {
        f"{task}, {mixer}" for task in kimi_tasks.TASKS for mixer in ("kda", "gated_deltanet")
    }


@pytest.mark.slow
def test_s5_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s5, "LENGTHS", (2, 3))
    monkeypatch.setattr(s5, "TESTS", {name: n // 8 for name, n in s5.TESTS.items()})
    outcome = s5.run(Smaller(tmp_path, "gpu", quick=True))
    assert [bar.measured for bar in outcome.bars] == [0.0] * 5
    assert list(outcome.curves) == ["4 reflections", "3 reflections", "2 reflections"]


@pytest.mark.slow
def test_selectivbench_models_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectivbench_models, "ELEMENTS", 3)
    monkeypatch.setattr(selectivbench_models, "GAPS", {"10": 10, "100": 20})
    outcome = selectivbench_models.run(Smaller(tmp_path, "gpu", quick=True))
    assert all(bar.known for bar in outcome.bars)
    assert [bar.bar() for bar in outcome.bars[:4]] == ["≥ 0.03", "≥ -0.05", "≥ 0", "none, for information"]
    assert len(outcome.bars) == 4 + 3 * len(outcome.curves) == 4 + 3 * 13


def test_all_are_recorded() -> None:
    assert sorted(reproductions(missing=True)) == [file.stem for file in RESULTS]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_recorded(file: Path) -> None:
    """A recorded result belongs to a reproduction as it is now, was not a quick one, and judges itself correctly."""
    result = json.loads(file.read_text(encoding="utf-8"))
    about = reproductions(missing=True)[file.stem]
    assert result["name"] == file.stem
    for field in ("title", "paper", "claim", "published", "setup"):
        assert result[field] == getattr(about, field), field
    assert not result["quick"]
    assert result["budget"] in about.budgets
    assert result["passed"] == all(row["passed"] for row in result["measured"])
    assert any(not row["bar"].startswith("none") for row in result["measured"])
    assert result["passed"] or result["tried"], "a miss says what was tried"
    if result["budget"] == "cpu":
        assert result["cpu_seconds"] < 240


def test_page_is_up_to_date() -> None:
    """docs/reproductions.md says what the results say; `scripts/reproductions.py` renews it."""
    found = subprocess.run(
        [sys.executable, "scripts/reproductions.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_bars() -> None:
    assert Bar("x", 0.5, at_least=0.5).passed
    assert Bar("x", 0.5, at_most=0.5).passed
    assert not Bar("x", 0.4, at_least=0.5).passed
    assert not Bar("x", 0.6, 0.1, 0.5).passed
    assert not Bar("x", math.nan).passed
    assert Bar("x", 0.6, 0.1, 0.9).bar() == "≥ 0.1, ≤ 0.9"
    assert Bar("x", 0.6).bar().startswith("none")


def test_transfer_behaviour() -> None:
    """The claim of TFLA that needs no training: after the norm both gates pass the same, and the epsilon shifts
    where."""
    fine, coarse = gains(1e-6, 64), gains(1e-2, 64)
    for found in (fine, coarse):
        for a, b in zip(*found.values(), strict=True):
            assert a == pytest.approx(b, abs=0.03)
    assert half_gain(fine["exponential gate"]) == pytest.approx(expected_half_gain(1e-6), abs=0.3)
    shift = half_gain(coarse["sigmoid gate"]) - half_gain(fine["sigmoid gate"])
    assert shift == pytest.approx(math.log(100), rel=0.1)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: expected one of"):
        reproduce("nope", folder=tmp_path / "x")
    with pytest.raises(ValueError, match="budget: expected cpu for gla, got 'tpu'"):
        reproduce("gla", folder=tmp_path / "x", budget="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"budget: mqar on gpu needs a GPU .* there is no version for cpu"):
            reproduce("mqar", folder=tmp_path / "x")
