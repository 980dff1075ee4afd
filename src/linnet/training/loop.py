"""The training loop: next-token loss, AdamW, a schedule, evaluation, checkpoints. On one device or many.

A step is: its micro-batches (a pure function of the step number), forward and backward of each, one clipped update.
The loss is the mean over all scored tokens of the step, whatever way they are spread over micro-batches and processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from linnet.models import Decoder, MixtureOfExperts, parameter_groups
from linnet.tasks import Batch

from .checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint, save_model
from .compiling import allow_graphs
from .config import TrainingConfig
from .monitor import Monitor
from .processes import accelerated, any_process, stop_signals, summed
from .schedules import learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainingDiverged", "TrainingResult", "check_run_folder", "train"]

RUN_FILE = "run.json"


class TrainingDiverged(ValueError):
    """The loss or the gradient is no longer a finite number."""


class Batches(Protocol):
    """What the loop asks of its data; :class:`linnet.tasks.TextData` is one.

    Attributes:
        bytes_per_token: turns the loss into bits per byte; None where that means nothing.
    """

    bytes_per_token: float | None

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Micro-batch ``part`` of ``parts`` of a step; the same arguments must give the same batch."""
        ...

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, index in the epoch) before a step, for the record."""
        ...


# evaluate(model, final=..., part=..., parts=...) -> this part's share of each metric; the shares add up.
Evaluate = Callable[..., dict[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        run: its folder.
        step: optimiser steps done.
        finished: all of them; False after Ctrl-C, SIGTERM or the end of its minutes.
        seconds: time in the loop, over all sittings.
        tokens: tokens trained on.
        records: all metrics, as in ``metrics.jsonl``.
        is_main: whether this is the process that speaks.
    """

    run: Path
    step: int
    finished: bool
    seconds: float
    tokens: int
    records: list[dict[str, Any]]
    is_main: bool = True

    def last(self, metric: str) -> float | None:
        """The latest value of a metric."""
        return next((r[metric] for r in reversed(self.records) if metric in r), None)


class Objective(nn.Module):
    """The module that Accelerate prepares: with targets the loss, without them the decoder's own output. Everything
    goes through its forward, because that is where gradients are synchronised and sharded weights gathered."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor | None = None, segments: Any = None, state: Any = None) -> Any:
        if targets is not None:
            return self.model.loss(tokens, targets, segments)
        return self.model(tokens, state, segments)


def train(
    model: Decoder,
    data: Batches,
    config: TrainingConfig,
    *,
    out: str | Path,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    extras: Callable[[Path], None] | None = None,
    on_save: Callable[[Path, Sequence[dict[str, Any]]], None] | None = None,
    settings: dict[str, Any] | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train ``model`` in place and keep everything about the run in a folder.

    The folder holds ``run.json`` (settings), ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and, at the end,
    ``model/``. On Ctrl-C or SIGTERM a checkpoint is written after the current step; ``resume=True`` goes on from the
    latest one, on a CPU with bitwise the same losses. A note is printed for settings that cannot do what they say, as a
    warm-up longer than the run.

    Run under `accelerate launch` it uses all its processes, with weights replicated or, with
    `--use_fsdp --fsdp_version 2`, sharded.

    Args:
        model: the decoder; every process must have built the same one.
        data: batches by step.
        config: the settings.
        out: the run folder.
        resume: go on with the run in ``out``.
        evaluate: called as ``evaluate(model, final=bool, part=int, parts=int)`` in every process with something that is
            called like the decoder; returns this part's share of each held-out metric, e.g. ``{"bits_per_byte": 0.7}``.
        extras: called with a folder to add files to every saved model (the tokenizer).
        on_save: called with the run folder and all records in the main process after each checkpoint (for plots).
        settings: what else to write into ``run.json``.
        console: where to print.

    Raises:
        FileExistsError: ``out`` holds something and ``resume`` is false.
        FileNotFoundError: ``resume`` is true and there is no checkpoint.
        TrainingDiverged: a loss or gradient that is not finite; the last checkpoint is from before.
        OSError: the final model could not be saved; the checkpoints before are unchanged.
    """
    out = Path(out)
    check_run_folder(out, resume)
    with accelerated(model, precision=config.precision, device=config.device) as accelerator:
        main = accelerator.is_main_process
        data.batch(0, 0, accelerator.num_processes * config.accumulate)  # complains before anything is written
        run = _Run(model, data, config, out, accelerator, evaluate, extras, on_save)
        if resume:
            run.resume()
        new = not out.exists()
        if main and not resume:
            out.mkdir(parents=True, exist_ok=True)
            content = {"training": config.to_dict(), "model": model.config.to_dict(), **(settings or {})}
            (out / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if main:
            run.monitor = Monitor(out, steps=config.steps, start=run.step, console=console)
            for doubt in _doubts(config, data):
                run.monitor.say(f"[yellow]Note:[/] {doubt}")
        try:
            run.go()
            return run.result()
        finally:
            if run.monitor is not None:
                run.monitor.close()
            if main and run.step == 0:  # no step came to its end: the same call, mended, finds its folder free
                _take_back(out, new)


def _doubts(config: TrainingConfig, data: Batches) -> Iterator[str]:
    """Settings that do not do what they say, though a run with them may be wanted."""
    if config.warmup_steps > config.steps:
        reached = learning_rate(config.steps - 1, config) / config.lr
        yield (
            f"warmup_steps (--warmup): {config.warmup_steps} are more than the {config.steps} steps of the run, "
            f"whose rate ends at {reached:.0%} of its peak"
        )
    if data.position(1) > (1, 0):
        yield (
            "data: the batch of one step is larger than the training data, so that it holds some of it more than once; "
            "use smaller batches (--batch-size) or more data"
        )


class _Run:
    """A run under way: what trains, what it trains on, and how far it is. See :func:`train` for the arguments."""

    def __init__(
        self,
        model: Decoder,
        data: Batches,
        config: TrainingConfig,
        out: Path,
        accelerator: Accelerator,
        evaluate: Evaluate | None,
        extras: Callable[[Path], None] | None,
        on_save: Callable[[Path, Sequence[dict[str, Any]]], None] | None,
    ):
        self.model, self.data, self.config, self.out, self.accelerator = model, data, config, out, accelerator
        self.evaluate, self.extras, self.on_save = evaluate, extras, on_save
        self.monitor: Monitor | None = None  # of the main process
        self.step, self.tokens = 0, 0
        self.before, self.began = 0.0, time.monotonic()  # seconds of earlier sittings, start of this one
        self.saved_at: int | None = None  # step of the latest checkpoint

        torch.manual_seed(config.seed)
        model.train()
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            allow_graphs(len(model.layers))
            for layer in model.layers:
                layer.compile()
        groups = parameter_groups(model, config.weight_decay, lr=config.lr)
        self.shares = [group["lr"] / config.lr for group in groups]  # not kept by the optimiser: resuming overwrites it
        betas = config.beta1, config.beta2
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, fused=True)
        self.objective, self.optimizer = accelerator.prepare(Objective(model), optimizer)

    def resume(self) -> None:
        """Take up the latest checkpoint."""
        latest = checkpoints(self.out)[-1]
        trainer = load_checkpoint(latest, self.accelerator, self.objective, self.optimizer.optimizer)
        self.step, self.before, self.tokens = trainer["step"], trainer["seconds"], trainer["tokens"]
        self.saved_at = self.step
        if self.step >= self.config.steps and (self.out / "model").is_dir():
            raise ValueError(f"resume: the run in {self.out} has already finished its {self.config.steps} steps")

    def go(self) -> None:
        """Train to the last step, or until stopped, and save."""
        config, accelerator, stop = self.config, self.accelerator, False
        self.began = time.monotonic()
        window = _Window(accelerator)
        with stop_signals() as received:
            while self.step < config.steps and not stop:
                rate = learning_rate(self.step, config)
                loss, norm, read = self.update(rate)
                window.add(loss, norm, read)

                evaluating, saving = (self.step % config.every(f"{x}_every") == 0 for x in ("evaluate", "save"))
                due = self.step % config.log_every == 0 or self.step == config.steps or evaluating or saving
                if due or accelerator.num_processes == 1:
                    late = config.minutes is not None and time.monotonic() - self.began > 60 * config.minutes
                    stop = any_process(accelerator, bool(received) or late)
                if accelerator.device.type == "cpu" or due or stop:
                    self.check_finite(loss, norm)
                if not (due or stop):
                    continue
                self.log(window, rate)
                if self.step < config.steps and not stop:
                    if evaluating:
                        self.measure(final=False)
                    if saving:
                        try:
                            self.save()
                        except OSError as error:  # costs this checkpoint, not the run: the old one is still there
                            if self.monitor is not None:
                                self.monitor.say(f"[bold red]checkpoint not saved[/]: {error}")
                        self.draw()
                window = _Window(accelerator)
        self.save()
        if self.step >= config.steps:
            save_model(self.out / "model", accelerator, self.objective, self.model.config.to_dict(), self.extras)
            self.measure(final=True)
        self.draw()

    def update(self, rate: float) -> tuple[Tensor, Tensor, int]:
        """One step at the rate ``rate``. Returns this process's part of the mean loss, the gradient norm before
        clipping, and this process's number of tokens, scored or not."""
        config, accelerator, objective = self.config, self.accelerator, self.objective
        first, parts = accelerator.process_index * config.accumulate, accelerator.num_processes * config.accumulate
        batches = [self.data.batch(self.step, first + i, parts) for i in range(config.accumulate)]
        own = sum(batch.count for batch in batches)
        total = summed(accelerator, torch.tensor(own, device=accelerator.device))
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = rate * share
        mean = torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(batches):
            batch = batch.to(accelerator.device)
            last = i == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(objective):
                # Each micro-batch gives a mean over its own tokens; weighted like this they add up to the mean over
                # all. Gradients are averaged over processes, hence the factor.
                loss = objective(batch.tokens, batch.targets, batch.segments) * (batch.count / total)
                accelerator.backward(loss * accelerator.num_processes)
            mean += loss.detach()
        norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip or math.inf)
        assert norm is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for module in objective.modules():
            if isinstance(module, MixtureOfExperts):
                module.balance()
        self.step += 1
        return mean, norm, sum(batch.targets.numel() for batch in batches)

    def check_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Raise :class:`TrainingDiverged` in every process where one of them has a loss that is not finite."""
        # With loss scaling an infinite gradient is part of the game: the scaler skips that update.
        scaled = self.accelerator.scaler is not None
        bad = not math.isfinite(float(loss)) or not (scaled or math.isfinite(float(norm)))
        if any_process(self.accelerator, bad):
            kept = f"the checkpoint of step {self.saved_at} is in {self.out}"
            raise TrainingDiverged(
                f"training diverged: loss {float(loss):g}, gradient norm {float(norm):g} at step {self.step}; "
                f"{'there is no checkpoint yet' if self.saved_at is None else kept}. "
                "Try a lower learning rate, a longer warm-up or tighter clipping"
            )

    def log(self, window: _Window, rate: float) -> None:
        """Record and show the metrics of the steps in ``window``."""
        metrics, tokens = window.close()
        self.tokens += tokens
        if self.monitor is None:
            return
        metrics["train/lr"] = rate
        if self.data.bytes_per_token is not None:
            metrics["train/bits_per_byte"] = metrics["train/loss"] / math.log(2) / self.data.bytes_per_token
        metrics |= {f"router/{name}": value for name, value in self.model.router_statistics().items()}
        self.monitor.record(self.step, metrics, tokens=self.tokens)
        self.monitor.show(self.step, metrics)

    def measure(self, final: bool) -> None:
        """Record the held-out metrics."""
        if self.evaluate is None:
            return
        accelerator = self.accelerator
        part, parts = accelerator.process_index, accelerator.num_processes
        self.objective.eval()
        with torch.no_grad():
            shares = self.evaluate(self.objective, final=final, part=part, parts=parts)
        self.objective.train()
        values = torch.tensor(list(shares.values()), device=accelerator.device)
        sums = dict(zip(shares, summed(accelerator, values).tolist(), strict=True))
        if self.monitor is not None:
            self.monitor.record(self.step, {f"held_out/{name}": value for name, value in sums.items()}, final=final)
            shown = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in sums.items())
            self.monitor.say(f"step {self.step}/{self.config.steps}  held out: {shown}")

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is there."""
        if self.saved_at == self.step:
            return
        position = self.data.position(self.step)
        state = {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "position": position}
        folder, config = self.out / "checkpoints" / f"step-{self.step:08d}", self.model.config.to_dict()
        save_checkpoint(folder, self.accelerator, self.objective, self.optimizer.optimizer, config, state, self.extras)
        self.saved_at = self.step
        if self.accelerator.is_main_process:
            prune(self.out, self.config.keep_last)

    def draw(self) -> None:
        if self.monitor is not None and self.on_save is not None:
            self.on_save(self.out, self.monitor.records)

    @property
    def seconds(self) -> float:
        """Time in the loop, over all sittings."""
        return self.before + time.monotonic() - self.began

    def result(self) -> TrainingResult:
        finished, records = self.step >= self.config.steps, [] if self.monitor is None else self.monitor.records
        main = self.accelerator.is_main_process
        return TrainingResult(self.out, self.step, finished, self.seconds, self.tokens, records, main)


def _take_back(out: Path, new: bool) -> None:
    """Remove what a run writes before its first step, and the folder if the run made it."""
    for name in (RUN_FILE, "metrics.jsonl"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    if new:
        with suppress(OSError):
            out.rmdir()


class _Window:
    """Sums metrics between two lines of the log on the device, so that only a line synchronises."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.began = accelerator, time.monotonic()
        self.loss = torch.zeros((), device=accelerator.device)
        self.norm = torch.zeros((), device=accelerator.device)
        self.steps = self.tokens = 0

    def add(self, loss: Tensor, norm: Tensor, tokens: int) -> None:
        self.loss += loss
        self.norm = norm
        self.steps += 1
        self.tokens += tokens

    def close(self) -> tuple[dict[str, float], int]:
        """Means over the window and its number of tokens, over all processes."""
        sums = torch.stack([self.loss.double(), torch.tensor(float(self.tokens), device=self.loss.device).double()])
        loss, tokens = summed(self.accelerator, sums).tolist()
        metrics = {
            "train/loss": loss / self.steps,
            "train/grad_norm": float(self.norm),
            "perf/tokens_per_s": tokens / (time.monotonic() - self.began),
        }
        if self.accelerator.device.type == "cuda":
            metrics["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics, int(tokens)


def check_run_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something, or to resume where there is no checkpoint.

    Raises:
        FileExistsError, FileNotFoundError: says what to do.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder for the run, but {out} is a file")
    if resume and not checkpoints(out):
        raise FileNotFoundError(f"resume: no checkpoint in {out} to go on from")
    if not resume and out.is_dir() and any(out.iterdir()):
        what = "go on with its run (--resume), or " if checkpoints(out) else ""
        raise FileExistsError(
            f"out: {out} is not empty and nothing in it is overwritten; {what}choose another folder (--out)"
        )
