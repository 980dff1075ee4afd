"""minGRU (Feng et al. 2024): a gated recurrent unit whose gates see only the input, and therefore a scan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops import Segments, scan
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading


def positive(x: Tensor) -> Tensor:
    """The paper's g: x + 1/2 where x >= 0, sigmoid(x) below; positive and continuous."""
    return torch.where(x >= 0, x.clamp(min=0) + 0.5, torch.sigmoid(x))


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "mingru", 8, expand=2)
    x = inputs(generator, 8)
    z, new = torch.sigmoid(mixer.gate_proj(x)), positive(mixer.h_proj(x))
    h, states = x.new_zeros(x.shape[0], 16), []
    for t in range(x.shape[1]):
        h = (1 - z[:, t]) * h + z[:, t] * new[:, t]
        states.append(h)
    return reading(mixer, x, "o_proj"), torch.stack(states, 1)


@register_mixer(
    "mingru",
    Card(
        paper="Feng et al. 2024, Were RNNs All We Needed? (arXiv 2410.01201)",
        recurrence="h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t), z_t = sigmoid(W_z x_t + b)",
        state="expand·d_model (+ (W-1)·d_model with a convolution of W taps)",
        engine="scan",
        expressivity="TC0: diagonal transition, a data-dependent factor in (0, 1) per channel",
        examples=({"d_model": 8}, {"d_model": 8, "expand": 2, "positive": False, "conv_size": 3}),
        identities=(Identity("is the loop h = (1 - z) h + z g(W_h x)", _is_loop),),
        notes=(
            "The gate is applied as a factor, exact at 0 and 1; the paper's scan adds logarithms.",
            "The convolution, where there is one, has a SiLU behind it.",
        ),
    ),
)
class MinGRU(Mixer):
    """minGRU with an output projection.

    Args:
        d_model: width.
        expand: channels of the state = expand * d_model.
        positive: pass candidates through g (x + 1/2 above 0, sigmoid below), as in the paper's experiments; else they
            are linear in the input.
        conv_size: taps of a short convolution with SiLU in front; 0 for none.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    gates = 1

    def __init__(self, d_model: int, *, expand: int = 1, positive: bool = True, conv_size: int = 0):
        super().__init__()
        parts.check_count(expand=expand)
        parts.check_conv_size(conv_size)
        self.d_model, self.positive, self.width = d_model, positive, expand * d_model
        self.conv = parts.ShortConv(d_model, conv_size, bias=True) if conv_size else None
        self.gate_proj = parts.GateLinear(d_model, self.gates * self.width)
        self.h_proj = nn.Linear(d_model, self.width)
        self.o_proj = nn.Linear(self.width, d_model, bias=False)

    def keep(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """What stays of the state and what comes in, from the gates' pre-activations."""
        return torch.sigmoid(-gates), torch.sigmoid(gates)

    def forward(
        self, x: Tensor, state: parts.ScanConvState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, parts.ScanConvState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, parts.ScanConvState)
        if self.conv is not None:
            (x,), tail = self.conv(x, state=tail, segments=segments)
        a, write = self.keep(self.gate_proj(x))
        new = self.h_proj(x)
        if self.positive:
            new = positive(parts.fp32(new))
        h, memory = scan(a, (write * new).to(x.dtype), state=memory, segments=segments)
        return self.o_proj(h), parts.ScanConvState(memory, tail)

    def init_state(self, rows: int) -> parts.ScanConvState:
        tail = None if self.conv is None else self.conv.init_state(rows)
        return parts.ScanConvState(parts.scan_state(self.o_proj.weight, rows, self.width), tail)
