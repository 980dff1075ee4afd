"""DSS (Gupta et al. 2022): diagonal state spaces as effective as structured ones, the predecessor of S4D."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.core import Identity
from linnet.ops.lti import zoh

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer
from .s4d import S4D

KERNELS = ("exp", "softmax")


def _is_s4d(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    dss = random_mixer(generator, "dss", 6, state_size=8)
    s4d = random_mixer(generator, "s4d", 6, state_size=8, init="legs")
    s4d.load_state_dict(dss.state_dict())
    parts.assign(s4d.C, dss.C / 2)
    x = inputs(generator, 6)
    return dss(x)[0], s4d(x)[0]


def _softmax_rows_sum_to_one(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "dss", 6, state_size=8, kernel="softmax", kernel_length=50)
    g, theta, _, C = mixer.system()
    steps = torch.arange(50, dtype=torch.float64)[:, None, None]
    rows = torch.polar((steps * g).exp(), steps * theta)
    read = torch.view_as_complex(C[:, 0].contiguous()) * (rows * torch.view_as_complex(mixer.system()[2])).sum(0)
    poles = torch.view_as_complex(mixer.poles())
    want = torch.view_as_complex(mixer.C) * poles.conj() / (poles.abs().square() + 1e-7)
    return torch.view_as_real(read), torch.view_as_real(want).detach()


@register_mixer(
    "dss",
    Card(
        paper="Gupta et al. 2022, Diagonal State Spaces are as Effective as Structured State Spaces (arXiv 2203.14343)",
        recurrence="x_t = exp(dt A) x_{t-1} + b u_t with a diagonal complex A; y_t = Re(W x_t) + D u_t,"
        " b = (exp(dt A) - 1) / A, or in place of it what makes each mode's kernel a softmax over time",
        state="d_model·N",
        engine="lti",
        expressivity="TC0: constant diagonal transition, complex with modulus below 1",
        examples=(
            {"d_model": 8, "state_size": 8},
            {"d_model": 6, "state_size": 4, "kernel": "softmax", "kernel_length": 16},
        ),
        identities=(
            Identity("with the exp kernel, is s4d (zoh) with C = W / 2", _is_s4d),
            Identity("with the softmax kernel, each mode's weights over time sum to W / A", _softmax_rows_sum_to_one),
        ),
        notes=(
            "Real parts stay negative for both kernels, so that the recurrence never grows; published with softmax they"
            " are free, and the kernel is then normalised from its other end.",
            "One step size a channel, as in the paper; the released code has two, for real and imaginary parts.",
            "As published, log_dt, log_decay and frequency learn at 1e-3 at most, without weight decay.",
        ),
    ),
)
class DSS(S4D):
    """Diagonal state spaces that start from the spectrum of S4, without the conjugate halves.

    Args:
        d_model: width.
        state_size: N real numbers of state a channel, N/2 complex ones.
        kernel: "exp", the zero-order hold, or "softmax", whose kernels are normalised over ``kernel_length`` steps.
        kernel_length: number of steps L over which "softmax" normalises; inputs may be of any length.
        dt_min, dt_max: initial steps are log-uniform between these.
        rate: multiplies every step: r for inputs sampled r times more coarsely than those trained on.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int = 64,
        kernel: str = "exp",
        kernel_length: int = 1024,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        parts.check_choice("kernel", kernel, KERNELS)
        parts.check_count(kernel_length=kernel_length)
        self.kernel, self.kernel_length = kernel, kernel_length
        super().__init__(d_model, state_size=state_size, init="legs", dt_min=dt_min, dt_max=dt_max, rate=rate)

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A, W = self.poles(), parts.fp32(self.C)[:, None]
        one = torch.stack([torch.ones_like(A[..., 0]), torch.zeros_like(A[..., 0])], -1)
        g, theta, B = zoh(A, one, self.steps()[:, None])
        if self.kernel == "softmax":  # over kernel_length steps the weights of a mode sum to 1 / A
            poles, step = torch.view_as_complex(A), torch.complex(g, theta)
            total = torch.expm1(step) / torch.expm1(step * (self.kernel_length / self.rate))
            B = torch.view_as_real(total * poles.conj() / (poles.abs().square() + 1e-7))
        return g, theta, B, W
