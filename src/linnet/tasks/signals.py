"""Real-valued signals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task

__all__ = ["Frequency"]


@register_task(
    "frequency", "a noisy sine, in the manner of the sampling-rate transfer of Gu et al. 2021, LSSL (arXiv 2110.13985)"
)
class Frequency(Task):
    """How often does a noisy sine of random phase go round in a row: 3, 5, 7, … times? Due in the last quarter, which
    answers together.

    Inputs are two channels: the sample, and 1.

    Args:
        classes: frequencies.
        noise: standard deviation; the sine has amplitude 1.
        stride: keep every stride-th sample only, so that a row of T positions spans ``stride · T`` samples.
    """

    lengths = (256,)
    examples = ({}, {"stride": 4, "noise": 0.1})
    causal = False

    def __init__(self, *, classes: int = 8, noise: float = 0.5, stride: int = 1):
        self.expect(classes >= 2 and stride >= 1, "classes, stride", "at least 2 and 1", (classes, stride))
        self.expect(noise >= 0, "noise", "0 or more", noise)
        self.classes, self.noise, self.stride = classes, noise, stride
        self.vocab_size, self.chance = classes, 1 / classes

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        least = 4 * (self.classes + 1)
        self.expect(length > least, "length", f"more than {least}, twice the highest frequency", length)
        answer = torch.randint(self.classes, (rows, 1), generator=generator)
        phase = torch.rand(rows, 1, generator=generator)
        time = torch.arange(length) / length
        x = torch.sin(2 * math.pi * ((3 + 2 * answer) * time + phase))
        x = x + self.noise * torch.randn(rows, length, generator=generator)
        late = torch.arange(length) >= length - length // 4
        targets = torch.where(late, answer, IGNORE)
        return Sample(torch.stack([x, torch.ones_like(x)], 2), targets, late.long().expand(rows, -1))

    def solve(self, tokens: Tensor) -> Tensor:
        power = torch.fft.rfft(tokens[..., 0]).abs()[:, 3 : 3 + 2 * self.classes : 2]
        return power.argmax(1, keepdim=True).expand(tokens.shape[:2])
