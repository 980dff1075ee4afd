"""S4 (Gu et al. 2021): a state space with a normal-plus-low-rank transition, the structure of the HiPPO matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops import LTIState, Segments, conv, lti
from linnet.ops.core import Identity
from linnet.ops.lti import bilinear, cauchy_kernel, dplr, nplr

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer
from .state_space import StateSpace, check_even

MEASURES = ("legs", "legt", "lagt")


def _is_a_convolution(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer, x = random_mixer(generator, "s4", 6, state_size=8, measure="legt"), inputs(generator, 6, length=51)
    kernel = cauchy_kernel(*mixer.structure(), dt=mixer.steps(), length=51)[:, 0]
    return mixer.respond(x, None, None)[0], conv(x, kernel.flip(-1))[0]


def _is_lssl(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    s4 = random_mixer(generator, "s4", 6, state_size=8)
    lssl = random_mixer(generator, "lssl", 6, state_size=8, learn=False)
    s4.reset_parameters()
    parts.assign(lssl.log_dt, s4.log_dt)
    V = nplr("legs", 8)[3]
    parts.assign(lssl.C, 2 * (torch.view_as_complex(s4.C.detach()) @ V.mH).real[:, None])
    x = inputs(generator, 6)
    return s4.respond(x, None, None)[0], lssl.respond(x, None, None)[0][..., 0]


def _is_s4d(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    s4 = random_mixer(generator, "s4", 6, state_size=8)
    s4d = random_mixer(generator, "s4d", 6, state_size=8, discretization="bilinear")
    s4d.load_state_dict({name: x for name, x in s4.state_dict().items() if name not in ("P", "B")})
    parts.assign(s4.P, torch.zeros_like(s4.P))
    weight = torch.view_as_complex(s4.B.detach()) * torch.view_as_complex(s4.C.detach())
    parts.assign(s4d.C, torch.view_as_real(weight))
    x = inputs(generator, 6)
    return s4(x)[0], s4d(x)[0]


@register_mixer(
    "s4",
    Card(
        paper="Gu, Goel, Ré 2021, Efficiently Modeling Long Sequences with Structured State Spaces (arXiv 2111.00396)",
        recurrence="x' = A x + B u, A = diag(lambda) - P P*, per channel, bilinear in steps of dt; y_t = C x_t + D u_t",
        state="d_model·N",
        engine="lti",
        expressivity="TC0: constant transition, normal plus low rank",
        examples=(
            {"d_model": 6, "state_size": 8},
            {"d_model": 4, "state_size": 4, "measure": "legt"},
        ),
        identities=(
            Identity("is the convolution with its Cauchy kernel", _is_a_convolution),
            Identity("at initialisation, is lssl with learn=False in another basis", _is_lssl),
            Identity("with P = 0, is s4d (bilinear) with C B for C", _is_s4d),
        ),
        notes=(
            "Every call runs in chunks with the dense transition of each channel; cauchy_kernel is the published"
            " algorithm, and an identity.",
            "lambda, P and B are learned for every channel; later releases of the code may share them.",
            "As published, log_dt, log_decay, frequency, P and B learn at 1e-3 at most, without weight decay.",
        ),
    ),
)
class S4(StateSpace):
    """Structured state spaces, one a channel, with a gated output projection.

    Args:
        d_model: width.
        state_size: N real numbers of state a channel.
        measure: HiPPO matrix to start from: "legs" (rank 1), "legt" (rank 2, a sliding window) or "lagt" (rank 1).
        dt_min, dt_max: initial steps are log-uniform between these; a sequence of L samples wants 1/L within.
        rate: multiplies every step: r for inputs sampled r times more coarsely than those trained on.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    no_weight_decay = ("log_decay", "frequency", "P", "B")
    max_learning_rate = dict.fromkeys(("log_dt", "log_decay", "frequency", "P", "B"), 1e-3)

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int = 64,
        measure: str = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        super().__init__(d_model, steps=d_model, dt_min=dt_min, dt_max=dt_max, rate=rate)
        parts.check_choice("measure", measure, MEASURES)
        self.pairs, self.measure = check_even("state_size", state_size), measure
        self.log_decay = nn.Parameter(torch.empty(d_model, self.pairs))  # the real parts are -exp of this
        self.frequency = nn.Parameter(torch.empty(d_model, self.pairs))
        self.P = nn.Parameter(torch.empty(d_model, 2 if measure == "legt" else 1, self.pairs, 2))
        self.B = nn.Parameter(torch.empty(d_model, self.pairs, 2))
        self.C = nn.Parameter(torch.empty(d_model, self.pairs, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        poles, P, B, _ = nplr(self.measure, 2 * self.pairs)
        # A real part of zero ("legt", "lagt") has no logarithm; what P adds keeps these stable.
        parts.assign(self.log_decay, (-poles.real).clamp(min=1e-4).log().expand_as(self.log_decay))
        parts.assign(self.frequency, poles.imag.expand_as(self.frequency))
        parts.assign(self.P, torch.view_as_real(P).expand_as(self.P))
        parts.assign(self.B, torch.view_as_real(B).expand_as(self.B))
        parts.assign(self.C, torch.randn_like(self.C) * 0.5**0.5)

    def structure(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``lambda, P, B, C``, complex, of the continuous system."""
        P, B, C = (torch.view_as_complex(parts.fp32(p).contiguous()) for p in (self.P, self.B, self.C))
        return torch.complex(-parts.fp32(self.log_decay).exp(), parts.fp32(self.frequency)), P, B, C[:, None]

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A, B, C`` of the discrete system at the present rate, as `linnet.lti` takes them."""
        A, B, C = dplr(*self.structure())
        return *bilinear(A, B, self.steps()), C

    def run(
        self, x: Tensor, system: tuple[Tensor, ...], state: LTIState | None, segments: Segments | None
    ) -> tuple[Tensor, LTIState]:
        A, B, C = system
        y, state = lti(x, A, B, C, state=state, segments=segments)
        return y[..., 0], state

    def init_state(self, rows: int) -> LTIState:
        like = parts.fp32(self.C).flatten(1)
        return LTIState(like.new_zeros(rows, *like.shape))
