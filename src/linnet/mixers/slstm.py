"""The sLSTM layer of xLSTM (Beck et al. 2024): scalar memories with exponential gates and memory mixing in heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from linnet.ops import CellState, ConvState, Segments, cell, cell_state
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading
from .elman import EXPRESSIVITY


class SLSTMState(NamedTuple):
    """The cell's state and the tail of the convolution (None without one)."""

    cell: CellState | None = None
    conv: ConvState | None = None


def _is_unstabilised_cell(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "slstm", 8, num_heads=2, conv_size=0)
    x = inputs(generator, 8)
    a = torch.einsum("bthd,hde->bthe", parts.heads(x, 2), torch.cat([mixer.if_proj, mixer.zo_proj], 2))
    h = c = n = x.new_zeros(2, 2, 4)
    outputs = []
    for t in range(x.shape[1]):
        i, f, z, o = (a[:, t] + torch.einsum("nhd,hde->nhe", h, mixer.R) + mixer.bias).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return reading(mixer, x), torch.stack(outputs, 1)


@register_mixer(
    "slstm",
    Card(
        paper="Beck et al. 2024, xLSTM: Extended Long Short-Term Memory (arXiv 2405.04517);"
        " kernels: Pöppel et al. 2024, FlashRNN (arXiv 2412.07752)",
        recurrence="c_t = σ(f_t) c_{t-1} + exp(i_t) tanh(z_t), n_t = σ(f_t) n_{t-1} + exp(i_t), h_t = σ(o_t) c_t / n_t;"
        " (i, f, z, o)_t = W x_t + h_{t-1} R + b",
        state="4·d_model (+ (W-1)·d_model with a convolution of W taps)",
        engine="cell",
        expressivity=EXPRESSIVITY,
        linear_state=False,
        examples=({"d_model": 16, "num_heads": 2}, {"d_model": 8, "num_heads": 2, "conv_size": 0}),
        identities=(Identity("without convolution, is the cell without its stabiliser", _is_unstabilised_cell),),
        notes=(
            "The layer inside the residual block, without an output projection; in a decoder the MLP follows, as in"
            " the paper. xLSTM[a:b] is a decoder whose pattern has a times mlstm and b times slstm.",
        ),
    ),
)
class SLSTM(Mixer):
    """The sLSTM: convolution with SiLU in front of the input and forget gates, headwise projections, LayerNorm.

    Args:
        d_model: width.
        num_heads: heads H of D = d_model / H units; units see each other's past within a head.
        conv_size: taps W of the short convolution, 0 for none.
        norm_eps: of the LayerNorm of a head (a weight per channel, no bias).

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    no_weight_decay = ("bias",)

    def __init__(self, d_model: int, *, num_heads: int = 4, conv_size: int = 4, norm_eps: float = 1e-5):
        super().__init__()
        parts.check_conv_size(conv_size)
        self.d_model, self.num_heads = d_model, num_heads
        D = self.head = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        self.conv = parts.ShortConv(d_model, conv_size, bias=True) if conv_size else None
        self.if_proj = nn.Parameter(torch.empty(num_heads, D, 2 * D))  # from the convolution
        self.zo_proj = nn.Parameter(torch.empty(num_heads, D, 2 * D))  # from the input itself
        self.R = nn.Parameter(torch.empty(num_heads, D, 4 * D))
        self.bias = nn.Parameter(torch.empty(num_heads, 4 * D))
        self.norm = parts.Norm(D, norm_eps, num_heads=num_heads, center=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal projections, no memory mixing at first; forget gates open, biases spread over 3 .. 6."""
        for weight in (self.if_proj, self.zo_proj):
            nn.init.normal_(weight, std=(2 / (5 * self.head)) ** 0.5)
        nn.init.zeros_(self.R)
        gates = torch.zeros(4, self.head, device=self.bias.device)
        gates[1] = torch.linspace(3, 6, self.head, device=gates.device)
        parts.assign(self.bias, gates.flatten().expand_as(self.bias))

    def forward(
        self, x: Tensor, state: SLSTMState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, SLSTMState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, SLSTMState)
        u = x
        if self.conv is not None:
            (u,), tail = self.conv(x, state=tail, segments=segments)
        pairs = ((u, self.if_proj), (x, self.zo_proj))
        a = torch.cat([torch.einsum("bthd,hde->bthe", parts.heads(y, self.num_heads), w) for y, w in pairs], -1)
        h, memory = cell(a, self.R.to(a.dtype), self.bias, kind="slstm", state=memory, segments=segments)
        return self.norm(h).flatten(2), SLSTMState(memory, tail)

    def init_state(self, rows: int) -> SLSTMState:
        dtype = parts.state_dtype(self.R)
        memory = cell_state("slstm", rows, self.num_heads, self.head, dtype=dtype, device=self.R.device)
        return SLSTMState(memory, None if self.conv is None else self.conv.init_state(rows))
