"""The training loop: next-token loss, AdamW, a schedule, evaluation, checkpoints. On one device or many.

A step is: its micro-batches (a pure function of the step number), forward and backward of each, one clipped update.
The loss is the mean over all scored tokens of the step, whatever way they are spread over micro-batches and processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
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
from .processes import any_process, make_accelerator, release, stop_signals, summed
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
    latest one, on a CPU with bitwise the same losses.

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
    accelerator = make_accelerator(model, precision=config.precision, device=config.device)
    main, parts = accelerator.is_main_process, accelerator.num_processes * config.accumulate
    data.batch(0, 0, parts)  # complains before anything is written if the batch cannot be divided

    torch.manual_seed(config.seed)
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        allow_graphs(len(model.layers))
        for layer in model.layers:
            layer.compile()
    groups = parameter_groups(model, config.weight_decay, lr=config.lr)
    shares = [group["lr"] / config.lr for group in groups]  # not from the optimiser: resuming fills in other rates
    betas = config.beta1, config.beta2
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, fused=True)
    objective, wrapped = accelerator.prepare(Objective(model), optimizer)

    step, seconds, tokens = 0, 0.0, 0
    if resume:
        trainer = load_checkpoint(checkpoints(out)[-1], accelerator, objective, wrapped.optimizer)
        step, seconds, tokens = trainer["step"], trainer["seconds"], trainer["tokens"]
        if step >= config.steps and (out / "model").is_dir():
            raise ValueError(f"resume: the run in {out} has already finished its {config.steps} steps")
    new = not out.exists()
    if main and not resume:
        out.mkdir(parents=True, exist_ok=True)
        content = {"training": config.to_dict(), "model": model.config.to_dict(), **(settings or {})}
        (out / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    monitor = Monitor(out, steps=config.steps, start=step, console=console) if main else None
    began, saved_at = time.monotonic(), step if resume else None

    def result() -> TrainingResult:
        records = [] if monitor is None else monitor.records
        spent = seconds + time.monotonic() - began
        return TrainingResult(out, step, step >= config.steps, spent, tokens, records, main)

    def save() -> None:
        nonlocal saved_at
        if saved_at == step:
            return
        state = {"step": step, "seconds": result().seconds, "tokens": tokens, "position": data.position(step)}
        folder = out / "checkpoints" / f"step-{step:08d}"
        save_checkpoint(folder, accelerator, objective, wrapped.optimizer, model.config.to_dict(), state, extras)
        saved_at = step
        if main:
            prune(out, config.keep_last)

    def measure(final: bool) -> None:
        if evaluate is None:
            return
        objective.eval()
        with torch.no_grad():
            shares = evaluate(objective, final=final, part=accelerator.process_index, parts=accelerator.num_processes)
        objective.train()
        values = torch.tensor(list(shares.values()), device=accelerator.device)
        sums = dict(zip(shares, summed(accelerator, values).tolist(), strict=True))
        if monitor is not None:
            monitor.record(step, {f"held_out/{name}": value for name, value in sums.items()}, final=final)
            shown = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in sums.items())
            monitor.say(f"step {step}/{config.steps}  held out: {shown}")

    def draw() -> None:
        if monitor is not None and on_save is not None:
            on_save(out, monitor.records)

    try:
        stop = False
        window = _Window(accelerator)
        with stop_signals() as received:
            while step < config.steps and not stop:
                rate = learning_rate(step, config)
                rates = [rate * share for share in shares]
                loss, norm, read = _step(step, data, accelerator, objective, wrapped, rates, config)
                window.add(loss, norm, read)
                step += 1

                evaluating, saving = (step % config.every(f"{x}_every") == 0 for x in ("evaluate", "save"))
                due = step % config.log_every == 0 or step == config.steps or evaluating or saving
                if due or accelerator.num_processes == 1:
                    late = config.minutes is not None and time.monotonic() - began > 60 * config.minutes
                    stop = any_process(accelerator, bool(received) or late)
                if accelerator.device.type == "cpu" or due or stop:
                    _check_finite(loss, norm, step, accelerator, saved_at, out)
                if not (due or stop):
                    continue
                metrics, done = window.close()
                tokens += done
                if monitor is not None:
                    _log(monitor, step, {**metrics, "train/lr": rate}, tokens, model, data)
                if step < config.steps and not stop:
                    if evaluating:
                        measure(final=False)
                    if saving:
                        try:
                            save()
                        except OSError as error:  # costs this checkpoint, not the run: the old one is still there
                            if monitor is not None:
                                monitor.say(f"[bold red]checkpoint not saved[/]: {error}")
                        draw()
                window = _Window(accelerator)
        save()
        if step >= config.steps:
            save_model(out / "model", accelerator, objective, model.config.to_dict(), extras)
            measure(final=True)
        draw()
        return result()
    finally:
        if monitor is not None:
            monitor.close()
        release(accelerator)
        if main and step == 0:  # no step came to its end: the same call, mended, finds its folder free
            _take_back(out, new)


def _take_back(out: Path, new: bool) -> None:
    """Remove what a run writes before its first step, and the folder if the run made it."""
    for name in (RUN_FILE, "metrics.jsonl"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    if new:
        with suppress(OSError):
            out.rmdir()


def _step(
    step: int,
    data: Batches,
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: Any,
    rates: Sequence[float],
    config: TrainingConfig,
) -> tuple[Tensor, Tensor, int]:
    """One update. Returns this process's part of the mean loss, the gradient norm before clipping, and this process's
    number of tokens, scored or not."""
    first, parts = accelerator.process_index * config.accumulate, accelerator.num_processes * config.accumulate
    batches = [data.batch(step, first + i, parts) for i in range(config.accumulate)]
    own = sum(batch.count for batch in batches)
    total = summed(accelerator, torch.tensor(own, device=accelerator.device))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    mean = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        batch = batch.to(accelerator.device)
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(objective):
            # Each micro-batch gives a mean over its own tokens; weighted like this they add up to the mean over all.
            # Gradients are averaged over processes, hence the factor.
            loss = objective(batch.tokens, batch.targets, batch.segments) * (batch.count / total)
            accelerator.backward(loss * accelerator.num_processes)
        mean += loss.detach()
    norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip or math.inf)
    assert norm is not None
    optimizer.step()
    optimizer.zero_grad()
    for module in objective.modules():
        if isinstance(module, MixtureOfExperts):
            module.balance()
    return mean, norm, sum(batch.targets.numel() for batch in batches)


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


def _log(monitor: Monitor, step: int, metrics: dict[str, float], tokens: int, model: Decoder, data: Batches) -> None:
    if data.bytes_per_token is not None:
        metrics["train/bits_per_byte"] = metrics["train/loss"] / math.log(2) / data.bytes_per_token
    metrics |= {f"router/{name}": value for name, value in model.router_statistics().items()}
    monitor.record(step, metrics, tokens=tokens)
    monitor.show(step, metrics)


def _check_finite(
    loss: Tensor, norm: Tensor, step: int, accelerator: Accelerator, saved_at: int | None, out: Path
) -> None:
    # With loss scaling an infinite gradient is part of the game: the scaler skips that update.
    bad = not math.isfinite(float(loss)) or (accelerator.scaler is None and not math.isfinite(float(norm)))
    if any_process(accelerator, bad):
        kept = "there is no checkpoint yet" if saved_at is None else f"the checkpoint of step {saved_at} is in {out}"
        raise TrainingDiverged(
            f"training diverged: loss {float(loss):g}, gradient norm {float(norm):g} at step {step}; {kept}. "
            "Try a lower learning rate, a longer warm-up or tighter clipping"
        )


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
