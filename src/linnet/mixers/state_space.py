"""The frame that the state-space layers of the S4 family share: step sizes, skip connection, mixing of channels.

A layer is a system in continuous time and a step size for each of its channels. Steps are what a layer knows of the
sampling rate: ``layer.rate = r`` runs a trained layer on every r-th sample of what it was trained on.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments
from linnet.ops.core import no_autocast
from linnet.ops.lti import nplr

from . import parts
from .base import Mixer

__all__ = ["StateSpace", "check_even", "log_uniform", "spectrum"]


def check_even(name: str, value: int) -> int:
    """Half of ``value``; ValueError when option ``name`` is not an even number of states."""
    parts.check_count(**{name: value})
    if value % 2:
        raise ValueError(f"{name}: expected an even number (complex states come in conjugate pairs), got {value}")
    return value // 2


def log_uniform(like: Tensor, low: float, high: float) -> Tensor:
    """Logarithms of numbers between ``low`` and ``high``, uniform, of the shape of ``like``."""
    return torch.empty_like(like).uniform_(math.log(low), math.log(high))


def spectrum(init: str, pairs: int) -> Tensor:
    """Initial poles ``[pairs, 2]`` (real and imaginary parts, float64), one of each conjugate pair: "lin", "inv" and
    "legs" of S4D (arXiv 2206.11893, section 4), and "real", which does not oscillate."""
    n = torch.arange(pairs, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    if init == "legs":
        return torch.view_as_real(nplr("legs", 2 * pairs)[0])
    if init == "real":
        return torch.stack([-(n + 1), 0 * n], -1)
    frequency = torch.pi * n if init == "lin" else 2 * pairs / torch.pi * (2 * pairs / (2 * n + 1) - 1)
    return torch.stack([half, frequency], -1)


class StateSpace(Mixer):
    """``GLU(W GELU(y + D x))`` around ``y = respond(x)``, a linear system: subclasses have a ``system`` and ``run`` it.

    Args:
        d_model: width.
        steps: how many step sizes there are.
        dt_min, dt_max: initial steps are log-uniform between these.
        rate: multiplies every step; r for inputs sampled r times more coarsely than those trained on.
    """

    max_learning_rate: ClassVar = {"log_dt": 1e-3}

    def __init__(self, d_model: int, *, steps: int, dt_min: float, dt_max: float, rate: float):
        super().__init__()
        parts.check_positive(dt_min=dt_min, dt_max=dt_max, rate=rate)
        if dt_min > dt_max:
            raise ValueError(f"dt_min: expected at most dt_max = {dt_max}, got {dt_min}")
        self.d_model, self.rate, self.dt_range = d_model, rate, (dt_min, dt_max)
        self.log_dt = nn.Parameter(torch.empty(steps))
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def reset_parameters(self) -> None:
        """Log-uniform steps and a skip from N(0, 1); subclasses add theirs."""
        parts.assign(self.log_dt, log_uniform(self.log_dt, *self.dt_range))
        parts.assign(self.skip, torch.randn_like(self.skip))

    def steps(self) -> Tensor:
        """The step of each channel (or state), at the sampling rate of the input."""
        return self.rate * parts.fp32(self.log_dt).exp()

    def system(self) -> tuple[Tensor, ...]:
        """The discrete system at the present rate, in fp32, as the layer's engine takes it."""
        raise NotImplementedError

    def run(self, x: Tensor, system: tuple[Tensor, ...], state: Any, segments: Segments | None) -> tuple[Tensor, Any]:
        """What ``system`` makes of ``x [B, T, D]``, and its state."""
        raise NotImplementedError

    def respond(self, x: Tensor, state: Any, segments: Segments | None) -> tuple[Tensor, Any]:
        """:meth:`run` at the present rate."""
        with no_autocast(x):  # with its matrices in half precision it would be another system
            system = self.system()
        return self.run(x, system, state, segments)

    def mix(self, y: Tensor, x: Tensor) -> Tensor:
        """The output of the layer, from that of the system and the input."""
        return F.glu(self.out_proj(F.gelu(y + self.skip * x)), -1)

    def forward(self, x: Tensor, state: Any = None, segments: Segments | None = None) -> tuple[Tensor, Any]:
        parts.check_input(x, self.d_model, segments)
        y, state = self.respond(x, state, segments)
        return self.mix(y, x), state
