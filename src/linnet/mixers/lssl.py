"""LSSL (Gu et al. 2021): the linear state-space layer, a dense HiPPO system for every channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import LTIState, Segments, conv, lti, scan
from linnet.ops.core import Identity
from linnet.ops.lti import bilinear, hippo, hippo_core, krylov_kernel

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer
from .state_space import StateSpace

MEASURES = ("legs", "legt", "lagt")


def _is_a_convolution(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer, x = random_mixer(generator, "lssl", 6, state_size=5), inputs(generator, 6, length=70)
    return mixer.respond(x, None, None)[0][..., 0], conv(x, krylov_kernel(*mixer.system(), length=70)[:, 0].flip(-1))[0]


def _is_a_gated_average(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "lssl", 6, state_size=1, learn=False, alpha=1.0)
    x, gate = inputs(generator, 6), torch.sigmoid(mixer.log_dt)
    return mixer.respond(x, None, None)[0][..., 0], scan(1 - gate, gate * x)[0] * mixer.C[:, 0, 0]


def _learns_from_hippo(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "lssl", 4, state_size=6, measure="legt")
    mixer.reset_parameters()
    return mixer.transition(), hippo("legt", 6)[0]


@register_mixer(
    "lssl",
    Card(
        paper="Gu et al. 2021, Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space"
        " Layers (arXiv 2110.13985)",
        recurrence="x' = A x + B u, A a HiPPO matrix that all channels share, in steps of dt; y_t = C x_t + D u_t",
        state="d_model·N",
        engine="lti",
        expressivity="TC0: constant dense transition",
        examples=(
            {"d_model": 6, "state_size": 5},
            {"d_model": 4, "state_size": 4, "outputs": 2, "measure": "legt", "learn": False, "alpha": 1.0},
        ),
        identities=(
            Identity("is the convolution with its Krylov kernel C A^j B", _is_a_convolution),
            Identity("with one state and alpha=1, is an average gated by sigmoid(log dt)", _is_a_gated_average),
            Identity("starts from the HiPPO matrix of its measure", _learns_from_hippo),
        ),
        notes=(
            "Every call discretises anew, O(d_model·N^3); s4 and s4d are the fast members of the family.",
            "As published, A learns at 1e-4 at most, log_dt at 1e-3 at most, both without weight decay.",
            "A at another rate: the released code rescales the step of A only, here B follows as it must.",
        ),
    ),
)
class LSSL(StateSpace):
    """Linear state-space layer.

    Args:
        d_model: width.
        state_size: N numbers of state a channel.
        outputs: M readings of each channel's state, mixed by the output projection.
        measure: HiPPO matrix to start from: "legs", "legt" (a sliding window) or "lagt".
        learn: learn the step sizes, and A within its class; False is LSSL-f, which learns neither.
        alpha: of the generalised bilinear transform: 0 forward Euler, 1/2 bilinear, 1 backward Euler.
        dt_min, dt_max: initial steps are log-uniform between these; a sequence of L samples wants 1/L within.
        rate: multiplies every step: r for inputs sampled r times more coarsely than those trained on.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    max_learning_rate = dict.fromkeys(("p", "d", "q", "middle", "below", "above"), 1e-4) | {"log_dt": 1e-3}

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int = 64,
        outputs: int = 1,
        measure: str = "legs",
        learn: bool = True,
        alpha: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        super().__init__(d_model, steps=d_model, dt_min=dt_min, dt_max=dt_max, rate=rate)
        parts.check_choice("measure", measure, MEASURES)
        parts.check_count(state_size=state_size, outputs=outputs)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        self.size, self.measure, self.learn, self.alpha = state_size, measure, learn, alpha
        self.C = nn.Parameter(torch.empty(d_model, outputs, state_size))
        self.skip = nn.Parameter(torch.empty(d_model, outputs))
        self.out_proj = nn.Linear(d_model * outputs, d_model)
        if learn:  # A = -diag(p) (diag(d) + T^-1) diag(q) with T tridiagonal
            self.p, self.d, self.q, self.middle = (nn.Parameter(torch.empty(state_size)) for _ in range(4))
            self.below, self.above = (nn.Parameter(torch.empty(state_size - 1)) for _ in range(2))
        else:
            del self.log_dt
            self.register_buffer("log_dt", torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        parts.assign(self.C, torch.randn_like(self.C))
        if self.learn:
            *vectors, T = hippo_core(self.measure, self.size)
            vectors += [T.diagonal(k) for k in (0, -1, 1)]
            for name, value in zip(("p", "d", "q", "middle", "below", "above"), vectors, strict=True):
                parts.assign(getattr(self, name), value)

    def transition(self) -> Tensor:
        """The continuous A ``[N, N]``."""
        if not self.learn:
            return hippo(self.measure, self.size)[0].to(parts.fp32(self.C))
        p, d, q, *bands = (parts.fp32(x) for x in (self.p, self.d, self.q, self.middle, self.below, self.above))
        T = sum(torch.diag(band, k) for band, k in zip(bands, (0, -1, 1), strict=True))
        return -p[:, None] * (torch.diag(d) + torch.linalg.inv(T)) * q

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A, B, C`` of the discrete system at the present rate, as `linnet.lti` takes them."""
        C = parts.fp32(self.C)
        return *bilinear(self.transition(), hippo(self.measure, self.size)[1].to(C), self.steps(), self.alpha), C

    def run(
        self, x: Tensor, system: tuple[Tensor, ...], state: LTIState | None, segments: Segments | None
    ) -> tuple[Tensor, LTIState]:
        A, B, C = system
        return lti(x, A, B, C, state=state, segments=segments)

    def mix(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(F.gelu(y + self.skip * x[..., None]).flatten(2))

    def init_state(self, rows: int) -> LTIState:
        return LTIState(parts.fp32(self.C).new_zeros(rows, self.d_model, self.size))
