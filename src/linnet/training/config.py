"""The settings of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linnet.ops.core import check_choice, check_names, check_type

__all__ = ["TrainingConfig"]

PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; what to train on is the data's business. Fields that make no sense, or are of another type, raise a
    ValueError.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate. Parameters that their mixer has learn at a lower one (``max_learning_rate``: steps and
            poles of state-space layers) follow the same schedule up to that.
        schedule: "cosine", "wsd" (warm-up, stable, decay) or "constant"; see :func:`linnet.training.learning_rate`.
        warmup_steps: steps over which the rate grows linearly from 0. A shorter run ends below the peak.
        final_lr: rate at the last step, as a share of the peak.
        decay_share: share of the steps over which "wsd" decays.
        weight_decay: of AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), on matrices only.
        beta1, beta2, adam_eps: moments of AdamW.
        clip: gradients are scaled down to this global norm; 0 leaves them.
        accumulate: micro-batches of one step in each process; the step's result does not depend on it, but for what
            balances experts, which looks at one micro-batch of a process.
        precision: "no" (fp32), "bf16" or "fp16" (autocast, with loss scaling; GPUs only). Weights stay fp32.
        compile: run each layer through torch.compile.
        gradient_checkpointing: recompute each layer in the backward pass to save memory.
        seed: of everything random in the loop.
        device: "auto" (the GPU of this process if there is one) or "cpu".
        log_every: steps between two lines of metrics.
        evaluate_every, save_every: steps between evaluations and between checkpoints; 0 is a tenth of the run. Both
            are also done after the last step, so that more than ``steps`` is once, at the end.
        keep_last: checkpoints to keep.
        minutes: stop, as on Ctrl-C, when the run has taken this long (in one sitting).
    """

    steps: int
    lr: float = 3e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    final_lr: float = 0.1
    decay_share: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    minutes: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field.name, field.type, getattr(self, field.name))
        for name in ("steps", "accumulate", "log_every", "keep_last"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "clip", "evaluate_every", "save_every", "seed"):
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "adam_eps"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in ("final_lr", "decay_share"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            self._expect(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        self._expect("minutes", self.minutes is None or self.minutes > 0, "more than 0")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        self._expect("device", self.device in ("auto", "cpu"), "'auto' or 'cpu'")

    def _expect(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {what}, got {getattr(self, name)!r}")

    def every(self, name: str) -> int:
        """``evaluate_every`` or ``save_every``, with 0 resolved."""
        return getattr(self, name) or max(1, self.steps // 10)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` restores them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The settings with these fields; an unknown one raises a ValueError that lists the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_names("training", "setting", values, known)
        return cls(**values)
