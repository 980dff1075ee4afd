"""What a reproduction is, the registry, and how one is run and recorded."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

import linnet
from linnet.evaluation import plot_curves
from linnet.mixers import mixers
from linnet.ops.core import check_choice, import_modules
from linnet.training import Cell, Comparison, compare

__all__ = ["Bar", "Experiment", "Outcome", "Reproduction", "register_reproduction", "reproduce", "reproductions"]

_reproductions: dict[str, Reproduction] = {}


@dataclass(frozen=True)
class Bar:
    """One measured figure and what it must be.

    Attributes:
        what: what is measured.
        measured: the value.
        at_least, at_most: the bar; None is open.
        published: the paper's figure or statement for it, with its scale.
    """

    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None
    published: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bar is met; never by a value that is not a number."""
        low, high = self.at_least, self.at_most
        return (low is None or self.measured >= low) and (high is None or self.measured <= high) and self.known

    @property
    def known(self) -> bool:
        """Whether the value is a number."""
        return self.measured == self.measured

    def bar(self) -> str:
        """The bar in words."""
        parts = [f"≥ {self.at_least:g}" if self.at_least is not None else ""]
        parts.append(f"≤ {self.at_most:g}" if self.at_most is not None else "")
        return ", ".join(p for p in parts if p) or "none, for information"


@dataclass(frozen=True)
class Outcome:
    """What came of a reproduction.

    Attributes:
        bars: the figures.
        curves: label to (x, y) points, for the plot.
        x, y: what the axes show.
        log_x: logarithmic x axis.
        limits: lowest and highest y shown; None: what the curves need.
        tried: where something does not reproduce, what was tried.
    """

    bars: Sequence[Bar]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    x: str
    y: str
    log_x: bool = False
    limits: tuple[float, float] | None = (-0.02, 1.03)
    tried: Sequence[str] = ()


@dataclass
class Experiment:
    """What a reproduction is given to run with.

    Attributes:
        folder: for its files.
        budget: "cpu" (at most about three minutes of one core) or "gpu" (ten minutes of one GPU).
        quick: run just enough to see that everything works; bars then mean nothing.
        console: for progress.
        settings: what it set, for the record.
    """

    folder: Path
    budget: str = "cpu"
    quick: bool = False
    console: Console = field(default_factory=lambda: Console(quiet=True))
    settings: dict[str, Any] = field(default_factory=dict)

    def compare(self, name: str, /, **options: Any) -> list[Cell]:
        """Train and test mixers as :func:`linnet.training.compare` does; quick: one seed, 4 steps, 8 rows each,
        and 8 test rows."""
        if self.quick:
            training = {**options.get("training", {}), "steps": 4, "warmup_steps": 2, "evaluate_every": 4}
            options = {**options, "seeds": 1, "batch_size": min(8, options.get("batch_size", 8)), "test_rows": 8}
            options["training"] = training
        comparison = Comparison(**options)
        self.settings[name] = comparison.to_dict()
        cells = compare(comparison, out=self.folder / name, console=self.console)
        if cells is None:
            raise KeyboardInterrupt
        return cells

    def has(self, *names: str) -> bool:
        """Whether these mixers are registered."""
        return set(names) <= set(mixers())


@dataclass(frozen=True)
class Reproduction:
    """A paper's claim and the experiment that tests it.

    Attributes:
        name: in the registry.
        title: short name for people.
        paper: authors, year, title, arXiv id.
        claim: in one sentence.
        published: where and at what scale the paper shows it.
        setup: the experiment in a few sentences.
        run: the experiment.
        needs: mixers it cannot do without.
        budgets: the budgets it has a version for.
    """

    name: str
    title: str
    paper: str
    claim: str
    published: str
    setup: str
    run: Callable[[Experiment], Outcome]
    needs: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ("cpu",)


def register_reproduction(
    name: str, **about: Any
) -> Callable[[Callable[[Experiment], Outcome]], Callable[[Experiment], Outcome]]:
    """Decorator of the experiment: registers it under ``name`` with the fields of :class:`Reproduction`."""

    def add(run: Callable[[Experiment], Outcome]) -> Callable[[Experiment], Outcome]:
        if name in _reproductions:
            raise ValueError(f"reproduction {name!r} is already registered")
        _reproductions[name] = Reproduction(name=name, run=run, **about)
        return run

    return add


def reproductions(*, missing: bool = False) -> dict[str, Reproduction]:
    """All reproductions by name whose mixers are registered; with ``missing`` the others too."""
    import_modules("linnet.reproductions")
    known = set(mixers())
    return {name: r for name, r in sorted(_reproductions.items()) if missing or set(r.needs) <= known}


def reproduce(
    name: str,
    *,
    folder: str | Path,
    budget: str | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run one reproduction.

    Args:
        name: which one.
        folder: for its files: ``result.json``, ``plot.png`` and the runs. New or empty.
        budget: "cpu" or "gpu"; by default the smallest that it has a version for.
        quick: a run of seconds that only shows that everything works.
        console: for progress.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: an unknown name, or a budget that it has no version for.
        FileExistsError: the folder holds something.
    """
    known = reproductions()
    check_choice("name", name, known)
    about = known[name]
    budget = about.budgets[0] if budget is None else budget
    if budget not in about.budgets:
        raise ValueError(f"budget: expected {' or '.join(about.budgets)} for {name}, got {budget!r}")
    if budget == "gpu" and not torch.cuda.is_available():
        other = "use cpu" if "cpu" in about.budgets else "there is no version for cpu"
        raise ValueError(f"budget: {name} on gpu needs a GPU that PyTorch sees, and there is none; {other}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: {folder} is not empty and nothing in it is overwritten; choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(folder, budget, quick, console or Console(quiet=True))
    wall, work = time.monotonic(), time.process_time()
    outcome = about.run(experiment)
    bars = [
        {
            "what": b.what,
            "published": b.published,
            "measured": round(b.measured, 4) if b.known else None,
            "bar": b.bar(),
            "passed": b.passed,
        }
        for b in outcome.bars
    ]
    result = {
        "name": name,
        "title": about.title,
        "paper": about.paper,
        "claim": about.claim,
        "published": about.published,
        "setup": about.setup,
        "budget": budget,
        "quick": quick,
        "passed": all(b.passed for b in outcome.bars),
        "measured": bars,
        "tried": list(outcome.tried),
        "plot": {
            "x": outcome.x,
            "y": outcome.y,
            "log_x": outcome.log_x,
            "limits": None if outcome.limits is None else list(outcome.limits),
            "curves": {k: [[float(x), round(float(y), 4)] for x, y in v] for k, v in outcome.curves.items()},
        },
        "hardware": hardware(budget),
        "versions": {"linnet": linnet.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - work, 1),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(experiment.settings, indent=2) + "\n", encoding="utf-8")
    draw(folder / "plot.png", result)
    return result


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw the plot of a result."""
    plot = result["plot"]
    limits = plot["limits"]
    plot_curves(
        path,
        plot["curves"],
        x=plot["x"],
        y=plot["y"],
        title=result["title"],
        log_x=plot["log_x"],
        limits=None if limits is None else (limits[0], limits[1]),
    )


def hardware(budget: str) -> str:
    """The machine, in words."""
    if budget == "gpu":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}"


def mean_accuracy(cells: Sequence[Cell], mixer: str, test: str, kind: str = "answers") -> float:
    """Mean over the initialisations of a mixer; ``kind`` is a field of :class:`linnet.evaluation.Accuracy`."""
    return fmean(cell.scores[test][kind] for cell in cells if cell.mixer == mixer)


def by_test(
    cells: Sequence[Cell], labels: Mapping[str, str], tests: Mapping[str, float], kind: str = "answers"
) -> dict[str, list[tuple[float, float]]]:
    """Curves of the mean accuracy: mixers (``labels`` maps spec to label) over tests (name to place on the x axis)."""
    return {
        label: [(x, mean_accuracy(cells, mixer, test, kind)) for test, x in tests.items()]
        for mixer, label in labels.items()
    }
