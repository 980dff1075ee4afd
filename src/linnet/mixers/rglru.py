"""The recurrent block of Griffin (De et al. 2024): convolution, a real-gated linear recurrence, and a gated branch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, ScanState, Segments, scan
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading

POWER = 8.0  # the paper's c: gates act on the eighth power of the learned decay


class RGLRUState(NamedTuple):
    """The memory, the convolution's inputs, and with ``plain_start`` how many tokens each row has seen (int64)."""

    scan: ScanState
    conv: ConvState
    position: Tensor | None = None


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "rglru", 8, num_heads=2)
    x = inputs(generator, 8)
    u = mixer.x_proj(x)
    u = F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=8).mT
    r, i = (torch.sigmoid(torch.einsum("bthi,hij->bthj", parts.heads(u, 2), w).flatten(2) + b)
            for w, b in ((mixer.r_weight, mixer.r_bias), (mixer.i_weight, mixer.i_bias)))  # fmt: skip
    h, states = x.new_zeros(x.shape[0], 8), []
    for t in range(x.shape[1]):
        a = torch.sigmoid(-mixer.decay) ** (POWER * r[:, t])
        h = a * h + (1 - a**2).sqrt() * i[:, t] * u[:, t]
        states.append(h)
    return reading(mixer, x, "o_proj"), torch.stack(states, 1) * F.gelu(mixer.y_proj(x), approximate="tanh")


@register_mixer(
    "rglru",
    Card(
        paper="De et al. 2024, Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language"
        " Models (arXiv 2402.19427)",
        recurrence="h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t, a_t = sigmoid(-decay)^(8 r_t),"
        " r_t, i_t = sigmoid(W u_t + b), u = conv(W_x x); y_t = W_o (h_t gelu(W_y x_t))",
        state="width + (W-1)·width",
        engine="scan",
        expressivity="TC0: diagonal transition, a data-dependent factor in (0, 1) per channel",
        examples=(
            {"d_model": 8, "num_heads": 2},
            {"d_model": 8, "num_heads": 3, "width": 12, "conv_size": 2, "plain_start": True},
        ),
        identities=(Identity("is the loop h = a h + sqrt(1 - a^2) i u", _is_loop),),
        notes=(
            "The released code leaves out the factor sqrt(1 - a^2) on the first token of a sequence, as plain_start"
            " does; in the paper, and by default, every token has it.",
        ),
    ),
)
class RGLRU(Mixer):
    """Griffin's recurrent block around the real-gated linear recurrent unit.

    Args:
        d_model: width.
        width: channels of the recurrence; d_model when None (the paper has about 4/3 of it).
        num_heads: blocks of the block-diagonal gate matrices.
        conv_size: taps W of the short convolution.
        plain_start: leave the factor sqrt(1 - a^2) out on the first token of a sequence.

    Raises:
        ValueError: naming the option, for sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        width: int | None = None,
        num_heads: int = 8,
        conv_size: int = 4,
        plain_start: bool = False,
    ):
        super().__init__()
        width = d_model if width is None else width
        parts.check_count(width=width, conv_size=conv_size)
        parts.check_conv_size(conv_size)
        self.d_model, self.width, self.num_heads, self.plain_start = d_model, width, num_heads, plain_start
        head = parts.check_divisor("num_heads", num_heads, width, "width")
        self.x_proj, self.y_proj = nn.Linear(d_model, width), nn.Linear(d_model, width)
        self.conv = parts.ShortConv(width, conv_size, bias=True, activation=None)
        self.r_weight, self.i_weight = (nn.Parameter(torch.empty(num_heads, head, head)) for _ in range(2))
        self.r_bias, self.i_bias, self.decay = (nn.Parameter(torch.empty(width)) for _ in range(3))
        self.o_proj = nn.Linear(width, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays sigmoid(-decay) uniform in area between the radii 0.9 and 0.999; gates of variance 1 / fan-in."""
        for p in (self.r_weight, self.i_weight):
            p.normal_(std=p.shape[-1] ** -0.5)
        nn.init.zeros_(self.r_bias)
        nn.init.zeros_(self.i_bias)
        log_radius = self.decay.uniform_(0.9**2, 0.999**2).log_().mul_(0.5)
        log_radius.neg_().expm1_().log_()  # softplus(decay) = -log radius

    def forward(
        self, x: Tensor, state: RGLRUState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, RGLRUState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail, seen = parts.unpack(state, RGLRUState)
        (u,), tail = self.conv(self.x_proj(x), state=tail, segments=segments)
        r, i = self._gate(u, self.r_weight, self.r_bias), self._gate(u, self.i_weight, self.i_bias)
        log_a = -POWER * r * F.softplus(parts.fp32(self.decay))
        # The root has no derivative at a = 1, where nothing comes in anyway.
        scale = (-torch.expm1(2 * log_a)).clamp(min=1e-10).sqrt()
        if self.plain_start:
            positions, seen = parts.count_positions(x, seen, segments)
            scale = torch.where(positions[..., None] == 0, 1.0, scale)
        h, memory = scan(log_a.exp(), (scale * i * u).to(u.dtype), state=memory, segments=segments)
        y = h * F.gelu(self.y_proj(x), approximate="tanh")
        return self.o_proj(y), RGLRUState(memory, tail, seen)

    def _gate(self, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.einsum("bthi,hij->bthj", parts.heads(u, self.num_heads), weight.to(u.dtype))
        return torch.sigmoid(parts.fp32(y.flatten(2)) + parts.fp32(bias))

    def init_state(self, rows: int) -> RGLRUState:
        seen = torch.zeros(rows, dtype=torch.int64, device=self.decay.device) if self.plain_start else None
        return RGLRUState(parts.scan_state(self.decay, rows, self.width), self.conv.init_state(rows), seen)
