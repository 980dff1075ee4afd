"""Training several mixers on one task or text, in the same decoder with the same budget, and testing them at lengths.

A *cell* is one mixer at one width from one initialisation. Each cell is an ordinary run of
:func:`linnet.training.train` in a folder of its own, so that a comparison that was interrupted goes on in the middle
of a cell.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from linnet.evaluation import Exercise, build_exercise
from linnet.mixers import split_specs
from linnet.models import Compressor, Decoder, DecoderConfig
from linnet.ops.core import state_bytes

from .checkpoint import checkpoints
from .config import TrainingConfig
from .loop import train

__all__ = ["Cell", "Comparison", "compare", "load_comparison"]

SETTINGS_FILE, CELL_FILE = "comparison.json", "cell.json"


@dataclass(frozen=True)
class Cell:
    """What one trained model reached.

    Attributes:
        mixer: its spec; a pattern over the layers is joined by "+".
        d_model: width.
        seed: of weights and training rows.
        parameters: number of parameters.
        state_bytes: fp32 state of a row after each tested length (growing caches grow).
        tokens_per_s: training throughput, median.
        seconds: of training.
        loss: of the last training step.
        scores: for every test what :meth:`linnet.evaluation.Exercise.test` returns.
        curve: [step, score at the first test] during training.
    """

    mixer: str
    d_model: int
    seed: int
    parameters: int
    state_bytes: dict[str, int]
    tokens_per_s: float
    seconds: float
    loss: float
    scores: dict[str, dict[str, Any]]
    curve: list[list[float]]


@dataclass(frozen=True)
class Comparison:
    """What is compared. Fields that make no sense raise a ValueError.

    Attributes:
        task: spec of the task to train on, or of a text: "text(data='notes.txt')"; see
            :func:`linnet.evaluation.build_exercise`.
        mixers: mixer specs; "gla + attention" repeats the two over the layers.
        sizes: widths.
        seeds: initialisations of each, counted from 0.
        length: positions of a training row; several are gone through in turn.
        tests: name to (task spec, length); by default the task at its own lengths. The first is followed in training.
        layers: number of layers.
        parameters: the inner width of the MLPs is chosen, as a multiple of 64, so that every model has about so many
            parameters; None leaves it alike for all.
        model: further fields of :class:`linnet.DecoderConfig`.
        training: fields of :class:`linnet.training.TrainingConfig`.
        batch_size: rows of a step.
        test_rows: rows of a test.
    """

    task: str
    mixers: Sequence[str]
    sizes: Sequence[int] = (64,)
    seeds: int = 2
    length: int | Sequence[int] | None = None
    tests: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    layers: int = 2
    parameters: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    test_rows: int = 256

    def __post_init__(self) -> None:
        for name in ("mixers", "sizes"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected at least one, none twice, got {values}")
            object.__setattr__(self, name, values)
        if min(self.sizes) < 1:
            raise ValueError(f"sizes: expected widths of at least 1, got {self.sizes}")
        for name in ("seeds", "batch_size", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.length is None:
            object.__setattr__(self, "length", self.exercise.lengths[0])
        elif not isinstance(self.length, int):
            object.__setattr__(self, "length", list(self.length))
        tests = self.tests or {str(n): (self.task, n) for n in self.exercise.lengths}
        object.__setattr__(self, "tests", {name: (spec, n) for name, (spec, n) in tests.items()})
        for spec, n in self.tests.values():  # complain before anything is trained
            exercise = build_exercise(spec)
            if exercise.score != self.exercise.score:
                raise ValueError(f"tests: expected a score in {self.exercise.names[0]}, got {spec!r}")
            exercise.check(n)
        self.data(0).batch(0)
        assert self.vocab_size  # its grammars are built outside of the meta device
        with torch.device("meta"):
            for mixer, size, _ in self.cells():
                self.frame(self.config(mixer, size))
        self.training_config(0)

    def cells(self) -> Iterator[tuple[str, int, int]]:
        """(mixer, width, seed) in the order of training: every mixer once before any is repeated."""
        for seed in range(self.seeds):
            for size in self.sizes:
                for mixer in self.mixers:
                    yield mixer, size, seed

    def config(self, mixer: str, size: int) -> DecoderConfig:
        """The decoder of a cell."""
        defaults = {"init_std": size**-0.5, "mlp_hidden": 2 * size}
        shape = {"vocab_size": self.vocab_size, "d_model": size, "num_layers": self.layers}
        values = {**defaults, **self.model, **shape, "mixers": split_specs(mixer, "+")}
        if self.parameters is not None:
            values["mlp_hidden"] = self._hidden(values, self.parameters)
        return DecoderConfig.from_dict(values)

    def _hidden(self, values: dict[str, Any], parameters: int) -> int:
        """The inner width of the MLPs that brings a decoder nearest to so many parameters."""
        with torch.device("meta"):
            one, two = (
                self.frame(DecoderConfig.from_dict(values | {"mlp_hidden": hidden})).num_parameters()
                for hidden in (64, 128)
            )
        if two == one:
            raise ValueError("parameters: expected None where no layer has an MLP whose width could be chosen")
        if parameters < one:
            least = f"at least {one} with the mixers {', '.join(values['mixers'])}"
            raise ValueError(f"parameters: expected {least}, got {parameters}")
        return 64 * (1 + round((parameters - one) / (two - one)))

    @cached_property
    def exercise(self) -> Exercise:
        """What is trained on."""
        return build_exercise(self.task)

    @property
    def frame(self) -> type[Decoder]:
        """The class of the models."""
        return Compressor if self.exercise.compressed else Decoder

    @cached_property
    def vocab_size(self) -> int:
        """Of the task and its tests."""
        tests = (build_exercise(spec) for spec, _ in self.tests.values())
        return max(exercise.vocab_size for exercise in (self.exercise, *tests))

    def data(self, seed: int) -> Any:
        """The training rows."""
        assert self.length is not None
        return self.exercise.batches(self.length, self.batch_size, seed)

    def training_config(self, seed: int) -> TrainingConfig:
        """The settings of a run."""
        steps = self.training.get("steps", 400)
        defaults = {"steps": steps, "lr": 3e-3, "warmup_steps": steps // 10, "weight_decay": 0.01, "final_lr": 0.0}
        defaults |= {"log_every": max(1, steps // 20), "keep_last": 1, "save_every": max(1, steps // 2)}
        return TrainingConfig.from_dict({**defaults, **self.training, "seed": seed})

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a CUDA GPU here."""
        return self.training_config(0).device != "cpu" and torch.cuda.is_available()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``Comparison(**values)`` restores them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def compare(
    comparison: Comparison,
    *,
    out: str | Path,
    resume: bool = False,
    on_cell: Callable[[list[Cell]], object] | None = None,
    console: Console | None = None,
) -> list[Cell] | None:
    """Train and test every cell, in ``out/cells``.

    Args:
        comparison: what to compare.
        out: folder, which must be new or empty unless ``resume`` is set.
        resume: go on with the same comparison in ``out``: finished cells are read, the others trained to their end.
        on_cell: called with the cells so far after each of them (for a report of what is finished).
        console: where a line about each cell goes.

    Returns:
        The cells in order; None when a run was stopped (Ctrl-C, or its minutes), to be resumed.

    Raises:
        FileExistsError: ``out`` holds something and ``resume`` is false.
        FileNotFoundError: ``resume`` is true and there is no comparison in ``out``.
        ValueError: ``resume`` with other settings.
    """
    out, console = Path(out), console or Console(quiet=True)
    wanted = comparison.to_dict()
    if resume:
        stored = load_comparison(out)[0].to_dict()
        if _fixed(stored) != _fixed(wanted):
            changed = sorted(k for k in wanted if _fixed(wanted).get(k) != _fixed(stored).get(k))
            raise ValueError(f"resume: the comparison in {out} has other settings ({', '.join(changed)})")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "go on with its comparison (--resume), or " if (out / SETTINGS_FILE).is_file() else ""
        raise FileExistsError(
            f"out: {out} is not empty and nothing in it is overwritten; {what}choose another folder (--out)"
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS_FILE).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

    found: list[Cell] = []
    every = list(comparison.cells())
    for number, (mixer, size, seed) in enumerate(every, start=1):
        folder = out / "cells" / f"{_slug(mixer)}-{comparison.mixers.index(mixer)}-d{size}-seed{seed}"
        cell = _read_cell(folder)
        if cell is None:
            cell = _run_cell(comparison, mixer, size, seed, folder)
        if cell is None:
            return None
        found.append(cell)
        score = comparison.exercise.score
        reached = "  ".join(f"{name}: {values[score]:.3f}" for name, values in cell.scores.items())
        console.print(
            f"{number}/{len(every)}  {mixer}  d={size}  seed {seed}  {cell.seconds:.0f} s  {reached}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        if on_cell is not None:
            on_cell(found)
    return found


def load_comparison(out: str | Path) -> tuple[Comparison, list[Cell]]:
    """What lies in the folder of a comparison: its settings and the cells that are finished.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(out, SETTINGS_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"out: no comparison in {out} ({SETTINGS_FILE} is missing)")
    comparison = Comparison(**json.loads(file.read_text(encoding="utf-8")))
    folders = sorted(Path(out, "cells").glob("*")) if Path(out, "cells").is_dir() else []
    return comparison, [cell for cell in map(_read_cell, folders) if cell is not None]


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """What a resumed comparison has in common with its beginning: all but where and how long it runs."""
    free = {"device", "minutes", "log_every"}
    return settings | {"training": {k: v for k, v in settings["training"].items() if k not in free}}


def _slug(mixer: str) -> str:
    return re.sub(r"\W+", "-", mixer).strip("-")[:60]


def _read_cell(folder: Path) -> Cell | None:
    file = folder / CELL_FILE
    return Cell(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _run_cell(comparison: Comparison, mixer: str, size: int, seed: int, folder: Path) -> Cell | None:
    going_on = bool(checkpoints(folder))
    if folder.exists() and not going_on:  # stopped before its first checkpoint
        shutil.rmtree(folder)
    torch.manual_seed(seed)
    model = comparison.frame(comparison.config(mixer, size))
    tests = {name: (build_exercise(spec), n) for name, (spec, n) in comparison.tests.items()}
    first, length = next(iter(tests.values()))
    training = comparison.training_config(seed)

    def follow(model: Any, *, part: int, parts: int, **_: Any) -> dict[str, float]:
        return {"score": first.test(model, length, min(64, comparison.test_rows))[first.score] / parts}

    if (folder / "model").is_dir():  # trained, and stopped while it was tested
        model = comparison.frame.load(folder / "model")
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        seconds = json.loads((checkpoints(folder)[-1] / "trainer.json").read_text(encoding="utf-8"))["seconds"]
    else:
        result = train(
            model,
            comparison.data(seed),
            training,
            out=folder,
            resume=going_on,
            evaluate=follow,
            console=Console(quiet=True),
        )
        if not result.finished:
            return None
        records, seconds = result.records, result.seconds
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision)
    with torch.autocast(model.embed_tokens.weight.device.type, dtype, enabled=dtype is not None):
        cell = _test(model.eval(), tests, comparison.test_rows, records, seconds, (mixer, size, seed))
    partial = folder / f".{CELL_FILE}.partial"
    partial.write_text(json.dumps(dataclasses.asdict(cell), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CELL_FILE)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nothing goes on from them
    return cell


def _test(
    model: Decoder,
    tests: Mapping[str, tuple[Exercise, int]],
    rows: int,
    records: Sequence[Mapping[str, Any]],
    seconds: float,
    key: tuple[str, int, int],
) -> Cell:
    held, reached = {}, {}
    device = model.embed_tokens.weight.device
    for name, (exercise, length) in tests.items():
        with torch.no_grad():
            one = exercise.batches(length, 1, 0).batch(0).tokens.to(device)
            held[name] = state_bytes(model(one).state)
        reached[name] = exercise.test(model, length, rows)
    speeds = [r["perf/tokens_per_s"] for r in records if "perf/tokens_per_s" in r]
    curve = [[r["step"], r["held_out/score"]] for r in records if "held_out/score" in r]
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    return Cell(
        *key,
        parameters=model.num_parameters(),
        state_bytes=held,
        tokens_per_s=round(statistics.median(speeds), 1),
        seconds=round(seconds, 2),
        loss=round(losses[-1], 5),
        scores=reached,
        curve=curve,
    )
