"""S4D (Gu et al. 2022): a state space with a diagonal complex transition for every channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops import LTIState, Segments, conv, lti_diagonal
from linnet.ops.core import Identity
from linnet.ops.lti import bilinear_diagonal, vandermonde_kernel, zoh

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer
from .state_space import StateSpace, check_even, spectrum

INITS = ("lin", "inv", "legs", "real")
RULES = {"zoh": zoh, "bilinear": bilinear_diagonal}


def _is_a_convolution(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer, x = random_mixer(generator, "s4d", 6, state_size=8), inputs(generator, 6, length=70)
    kernel = vandermonde_kernel(*mixer.system(), length=70)[:, 0]
    return mixer.respond(x, None, None)[0], conv(x, kernel.flip(-1))[0]


def _sums_over_a_longer_step(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "s4d", 6, state_size=8)
    fine = vandermonde_kernel(*mixer.system(), length=60)
    mixer.rate = 3.0
    return vandermonde_kernel(*mixer.system(), length=20), fine.unflatten(-1, (20, 3)).sum(-1)


def _holds_its_input(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer, x = random_mixer(generator, "s4d", 6, state_size=8), inputs(generator, 6)
    fine = mixer(x.repeat_interleave(4, 1))[0]
    mixer.rate = 4.0
    return mixer(x)[0], fine[:, 3::4]


@register_mixer(
    "s4d",
    Card(
        paper="Gu et al. 2022, On the Parameterization and Initialization of Diagonal State Space Models"
        " (arXiv 2206.11893)",
        recurrence="x' = A x + u with a diagonal complex A, per channel, in steps of dt; y_t = 2 Re(C x_t) + D u_t",
        state="d_model·N",
        engine="lti",
        expressivity="TC0: constant diagonal transition, complex with modulus below 1",
        examples=(
            {"d_model": 8, "state_size": 8},
            {"d_model": 6, "state_size": 4, "init": "inv", "discretization": "bilinear", "rate": 2.0},
        ),
        identities=(
            Identity("is the convolution with its Vandermonde kernel", _is_a_convolution),
            Identity("three times the step (zoh) adds up the kernel in threes", _sums_over_a_longer_step),
            Identity("at rate 4 (zoh) equals itself on inputs held for four steps", _holds_its_input),
        ),
        notes=(
            "B is 1: only its product with C matters. C starts from N(0, 1) for every init.",
            "As published, log_dt, log_decay and frequency learn at 1e-3 at most, without weight decay.",
        ),
    ),
)
class S4D(StateSpace):
    """Diagonal state spaces, one a channel, with a gated output projection.

    Args:
        d_model: width.
        state_size: N real numbers of state a channel, N/2 complex ones.
        init: poles at the start: "lin", "inv", "legs" (those of S4) or "real" (no oscillation).
        discretization: "zoh", exact for inputs held over a step, or "bilinear".
        dt_min, dt_max: initial steps are log-uniform between these; a sequence of L samples wants 1/L within.
        rate: multiplies every step: r for inputs sampled r times more coarsely than those trained on.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    no_weight_decay = ("log_decay", "frequency")
    max_learning_rate = dict.fromkeys(("log_dt", "log_decay", "frequency"), 1e-3)

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        super().__init__(d_model, steps=d_model, dt_min=dt_min, dt_max=dt_max, rate=rate)
        parts.check_choice("init", init, INITS)
        parts.check_choice("discretization", discretization, RULES)
        self.pairs, self.init, self.rule = check_even("state_size", state_size), init, discretization
        self.log_decay = nn.Parameter(torch.empty(d_model, self.pairs))  # the real parts are -exp of this
        self.frequency = nn.Parameter(torch.empty(d_model, self.pairs))
        self.C = nn.Parameter(torch.empty(d_model, self.pairs, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        poles = spectrum(self.init, self.pairs)
        parts.assign(self.log_decay, (-poles[:, 0]).log().expand_as(self.log_decay))
        parts.assign(self.frequency, poles[:, 1].expand_as(self.frequency))
        parts.assign(self.C, torch.randn_like(self.C) * 0.5**0.5)

    def poles(self) -> Tensor:
        """The eigenvalues of A ``[D, N/2, 2]``."""
        return torch.stack([-parts.fp32(self.log_decay).exp(), parts.fp32(self.frequency)], -1)

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``g, theta, B, C`` of the discrete system at the present rate, as `linnet.lti_diagonal` takes them."""
        A = self.poles()
        one = torch.stack([torch.ones_like(A[..., 0]), torch.zeros_like(A[..., 0])], -1)
        return *RULES[self.rule](A, one, self.steps()[:, None]), 2 * parts.fp32(self.C)[:, None]

    def run(
        self, x: Tensor, system: tuple[Tensor, ...], state: LTIState | None, segments: Segments | None
    ) -> tuple[Tensor, LTIState]:
        g, theta, B, C = system
        y, state = lti_diagonal(x, g, theta, B, C, state=state, segments=segments)
        return y[..., 0], state

    def init_state(self, rows: int) -> LTIState:
        like = parts.fp32(self.C)
        return LTIState(like.new_zeros(rows, *like.shape))
