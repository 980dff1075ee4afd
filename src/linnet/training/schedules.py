"""Learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

import math

from .config import TrainingConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of optimiser step ``step``, counted from 0.

    All schedules grow linearly from 0 over ``warmup_steps``. Then "constant" stays; "cosine" falls along half a cosine
    to ``final_lr`` of the peak at the last step (Loshchilov & Hutter 2016, arXiv 1608.03983); "wsd" stays and falls
    linearly to it over the last ``decay_share`` of the steps (Hu et al. 2024, arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.steps - round(config.decay_share * config.steps))
    progress = min(1.0, max(0, step - start) / max(1, config.steps - 1 - start))
    share = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr + (1 - config.final_lr) * share)
