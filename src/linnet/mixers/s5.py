"""S5 (Smith et al. 2022): one diagonal state space for all channels, run by a parallel scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ScanState, Segments, scan
from linnet.ops.core import Identity
from linnet.ops.lti import nplr, zoh

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer
from .state_space import StateSpace, check_even


def _is_s4d(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    s5 = random_mixer(generator, "s5", 1, state_size=8, num_blocks=1)
    s4d = random_mixer(generator, "s4d", 1, state_size=8)
    for name in ("log_decay", "frequency"):
        parts.assign(getattr(s4d, name), getattr(s5, name)[None])
    parts.assign(s5.log_dt, s4d.log_dt.expand(4))
    B, C = torch.view_as_complex(s5.B.detach()), torch.view_as_complex(s5.C.detach())
    parts.assign(s4d.C, torch.view_as_real(B.T * C))
    x = inputs(generator, 1)
    return s5.respond(x, None, None)[0], s4d.respond(x, None, None)[0]


def _holds_its_input(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer, x = random_mixer(generator, "s5", 6, state_size=8, num_blocks=2), inputs(generator, 6)
    fine = mixer(x.repeat_interleave(4, 1))[0]
    mixer.rate = 4.0
    return mixer(x)[0], fine[:, 3::4]


@register_mixer(
    "s5",
    Card(
        paper="Smith, Warrington, Linderman 2022, Simplified State Space Layers for Sequence Modeling"
        " (arXiv 2208.04933)",
        recurrence="x' = A x + B u with one diagonal complex A for all channels u, a step dt for each state;"
        " y_t = 2 Re(C x_t) + D u_t",
        state="N",
        engine="scan",
        expressivity="TC0: constant diagonal transition, complex with modulus below 1",
        examples=(
            {"d_model": 6, "state_size": 8, "num_blocks": 2},
            {"d_model": 4, "state_size": 4, "num_blocks": 1, "rate": 2.0},
        ),
        identities=(
            Identity("with one channel and one step size, is s4d with C B for C", _is_s4d),
            Identity("at rate 4 equals itself on inputs held for four steps", _holds_its_input),
        ),
        notes=(
            "Causal only: the bidirectional form is two layers, one of them on the reversed sequence.",
            "As published, log_dt, log_decay, frequency and B learn at 1e-3 at most, without weight decay.",
        ),
    ),
)
class S5(StateSpace):
    """One diagonal state space that reads and writes all channels, with a gated output projection.

    Args:
        d_model: width.
        state_size: N real numbers of state in all, N/2 complex ones.
        num_blocks: J; the poles start as J copies of those of a HiPPO matrix of size N/J.
        dt_min, dt_max: initial steps are log-uniform between these; a sequence of L samples wants 1/L within.
        rate: multiplies every step: r for inputs sampled r times more coarsely than those trained on.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    no_weight_decay = ("B",)
    max_learning_rate = dict.fromkeys(("log_dt", "log_decay", "frequency", "B"), 1e-3)

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int = 256,
        num_blocks: int = 8,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        rate: float = 1.0,
    ):
        pairs = check_even("state_size", state_size)
        super().__init__(d_model, steps=pairs, dt_min=dt_min, dt_max=dt_max, rate=rate)
        check_even("state_size / num_blocks", parts.check_divisor("num_blocks", num_blocks, state_size, "state_size"))
        self.blocks = num_blocks
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(pairs)) for _ in range(2))
        self.B = nn.Parameter(torch.empty(pairs, d_model, 2))
        self.C = nn.Parameter(torch.empty(d_model, pairs, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """HiPPO poles; B and C random with variance 1 / fan-in, turned into the basis of the poles."""
        super().reset_parameters()
        size = 2 * len(self.log_decay) // self.blocks
        poles, _, _, V = nplr("legs", size)
        parts.assign(self.log_decay, (-poles.real).log().repeat(self.blocks))
        parts.assign(self.frequency, poles.imag.repeat(self.blocks))
        B = torch.randn(self.blocks, size, self.d_model, dtype=V.real.dtype) * self.d_model**-0.5
        C = torch.randn(self.d_model, self.blocks, size, dtype=V.real.dtype) * (self.blocks * size) ** -0.5
        parts.assign(self.B, torch.view_as_real(V.mH @ B.to(V.dtype)).flatten(0, 1))
        parts.assign(self.C, torch.view_as_real(C.to(V.dtype) @ V).flatten(1, 2))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Factors ``[P, 2]``, input map ``[P, D, 2]`` and output map ``[D, P, 2]``, of which the real part is read."""
        poles = torch.stack([-parts.fp32(self.log_decay).exp(), parts.fp32(self.frequency)], -1)
        g, theta, B = zoh(poles[:, None], parts.fp32(self.B), self.steps()[:, None])
        a = torch.stack([g.exp() * theta.cos(), g.exp() * theta.sin()], -1)[:, 0]
        return a, B, 2 * parts.fp32(self.C)

    def run(
        self, x: Tensor, system: tuple[Tensor, ...], state: ScanState | None, segments: Segments | None
    ) -> tuple[Tensor, ScanState]:
        a, B, C = system
        u = F.linear(x, B.transpose(1, 2).flatten(0, 1).to(x.dtype)).unflatten(-1, (-1, 2))
        h, state = scan(a, u, state=state, segments=segments)
        read = C * C.new_tensor([1.0, -1.0])  # Re(c h)
        return F.linear(h.flatten(2), read.flatten(1).to(h.dtype)), state

    def init_state(self, rows: int) -> ScanState:
        return ScanState(parts.fp32(self.C).new_zeros(rows, len(self.log_decay), 2))
