"""What a run shows and records: live progress, plain lines, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["Monitor"]

_SECONDS_BETWEEN_LINES = 10.0


class Monitor:
    """Records metrics of a run in its folder and shows its progress.

    On a terminal one live line shows step, loss, bits per byte, tokens/s and the time left; elsewhere a plain line
    appears every ten seconds. Each record goes to ``metrics.jsonl`` at once and to ``tensorboard/``.

    Args:
        run: the run folder.
        steps: of the whole run.
        start: first step of this sitting; later records of an earlier one are dropped.
        console: where to write.
    """

    def __init__(self, run: Path, *, steps: int, start: int = 0, console: Console | None = None):
        self.console = console or Console()
        self.steps, self.start, self.records = steps, start, _read(run / "metrics.jsonl", start)
        self._began = self._shown = time.monotonic()
        self._failed = False
        _replace(run / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.records))
        self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = _tensorboard(run / "tensorboard", start, self.console)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            columns = ["{task.description}", "loss {task.fields[loss]}", "{task.fields[bits]}", "{task.fields[speed]}"]
            progress = self._progress = Progress(
                BarColumn(bar_width=24),
                *(TextColumn(c) for c in columns),
                TextColumn("{task.fields[left]} left"),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = progress.add_task(
                f"step {start}/{steps}", total=steps, completed=start, loss="-", bits="", speed="", left="?"
            )
            progress.start()

    def record(self, step: int, metrics: Mapping[str, float], **extra: Any) -> None:
        """Write down metrics after ``step`` steps."""
        record = {"step": step, **metrics, "time": round(time.time(), 3), **extra}
        self.records.append(record)
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in metrics.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:  # a full disk must not end the run
            if not self._failed:
                self.say(f"[bold red]metrics not written[/]: {error}")
            self._failed = True

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show training progress; ``metrics`` as recorded."""
        bits = f"{metrics['train/bits_per_byte']:.3f} bits/byte" if "train/bits_per_byte" in metrics else ""
        speed = f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
        left = _duration(self.seconds_left(step))
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=step,
                description=f"step {step}/{self.steps}",
                loss=f"{metrics['train/loss']:.3f}",
                bits=bits,
                speed=speed,
                left=left,
            )
        elif time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES or step == self.steps:
            self._shown = time.monotonic()
            parts = [f"step {step}/{self.steps}", f"loss {metrics['train/loss']:.3f}", bits, speed, f"{left} left"]
            self.say("  ".join(p for p in parts if p))

    def say(self, message: str) -> None:
        """Print a line above the progress."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def seconds_left(self, step: int) -> float:
        """Estimated from the pace of this sitting, evaluations and checkpoints included."""
        done = step - self.start
        return (time.monotonic() - self._began) / done * (self.steps - step) if done else float("inf")

    def close(self) -> None:
        """End the progress and close the files."""
        if self._progress is not None:
            self._progress.stop()
        with suppress(OSError):  # what a full disk leaves unwritten has been reported
            if self._board is not None:
                self._board.close()
            self._file.close()


def _read(file: Path, before: int) -> list[dict[str, Any]]:
    """Records up to and including step ``before``; a line cut off by a crash ends them."""
    records: list[dict[str, Any]] = []
    if before == 0 or not file.exists():
        return records
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= before:
            records.append(record)
    return records


def _replace(file: Path, content: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, file)


def _tensorboard(folder: Path, start: int, console: Console) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("TensorBoard is not installed; the metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
