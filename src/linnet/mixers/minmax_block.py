"""The layer of MinMax recurrent neural cascades (Ronca 2026): a mix of neighbours, a feed-forward net, the neuron."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer
from .minmax import MinMax, MinMaxState


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    block = random_mixer(generator, "minmax_block", 8, state_dim=5)
    u, cell = inputs(generator, 8), block.neuron
    first, second, third = (
        lambda x, norm=norm: F.layer_norm(x, [8], norm.weight, norm.bias, norm.eps) for norm in block.norms
    )
    h, before, gate, outputs = u.new_zeros(2, 5), u.new_zeros(2, 8), torch.sigmoid(cell.mix), []
    for now in u.unbind(1):
        mixed = gate * before + (1 - gate) * first(now)
        gates, values = block.up(second(now + mixed)).chunk(2, -1)
        x = third(now + block.down(F.relu(gates) * values))
        h, before = torch.maximum(torch.minimum(h, cell.r_proj(x)), cell.s_proj(x)), first(now)
        outputs.append(cell.o_proj(h * torch.sigmoid(cell.g_proj(x))))
    return block(u)[0], torch.stack(outputs, 1)


def _is_minmax(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    block = random_mixer(generator, "minmax_block", 8, state_dim=5)
    neuron = random_mixer(generator, "minmax", 8, state_dim=5, mix="none")
    for p in block.down.parameters():
        nn.init.zeros_(p)
    for name in ("r_proj", "s_proj", "g_proj", "o_proj"):
        neuron.get_submodule(name).load_state_dict(block.neuron.get_submodule(name).state_dict())
    x = inputs(generator, 8)
    return block(x)[0], neuron(block.norms[2](x))[0]


@register_mixer(
    "minmax_block",
    Card(
        paper="Ronca 2026, MinMax Recurrent Neural Cascades (arXiv 2605.06384)",
        recurrence="c_t = mix of norm(u_t), norm(u_{t-1}); f_t = W_2 (relu(a_t) b_t), a_t, b_t = W_1 norm(u_t + c_t);"
        " h_t = max(min(h_{t-1}, r_t), s_t), r_t, s_t = W norm(u_t + f_t) + b; y_t = W_o (h_t sigmoid(W_g x_t))",
        state="state_dim + d_model",
        engine="minmax_scan",
        expressivity="group-free regular languages in cascades: cells keep or overwrite (flip-flops), exactly",
        linear_state=False,
        examples=(
            {"d_model": 8, "state_dim": 12, "layer": 1, "num_layers": 2},
            {"d_model": 6, "mix": "linear", "output_gate": False, "asymmetric": False},
        ),
        identities=(
            Identity("is its equations written token by token", _is_loop),
            Identity("is minmax without a mix, behind a LayerNorm, when the feed-forward net is 0", _is_minmax),
        ),
        notes=(
            "The whole residual block with its norms: for a decoder with norm_position='none' and without an MLP.",
            "No dropout. A decoder's last norm is an RMSNorm, where the released model has a LayerNorm.",
        ),
    ),
)
class MinMaxBlock(Mixer):
    """What a layer of a MinMax cascade adds to its input ``u``: only the neuron's reading, of what the mix with the
    token before and the feed-forward net make of ``u``.

    Args:
        d_model: width.
        state_dim: cells; d_model when None.
        mix: how an input meets the one before it, as in `minmax`.
        output_gate: scale the cells by a sigmoid gate.
        asymmetric: start with lower bounds around 1 and upper ones around 0; False starts both around 0, as released,
            where a cell that holds 0 is not written while 0 lies between its bounds.
        ffn_ratio: inner width of the feed-forward net relative to ``d_model``, rounded up to an even number.
        norm_eps: of the three LayerNorms.
        layer: index of this layer, from 0.
        num_layers: depth L of the model: output weights start at 2 / (L sqrt(inputs)).

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        state_dim: int | None = None,
        mix: str = "gated",
        output_gate: bool = True,
        asymmetric: bool = True,
        ffn_ratio: float = 1.3,
        norm_eps: float = 1e-5,
        layer: int = 0,
        num_layers: int = 1,
    ):
        super().__init__()
        parts.check_positive(ffn_ratio=ffn_ratio)
        parts.check_depth(layer, num_layers)
        self.d_model, self.asymmetric, self.num_layers = d_model, asymmetric, num_layers
        width = 2 * math.ceil(round(ffn_ratio * d_model, 6) / 2)
        self.norms = nn.ModuleList(parts.Norm(d_model, norm_eps, center=True, bias=True) for _ in range(3))
        self.up, self.down = nn.Linear(d_model, 2 * width), nn.Linear(width, d_model)
        self.neuron = MinMax(d_model, state_dim=state_dim, mix=mix, output_gate=output_gate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights: variance 2 / (5 d_model) of what reads, 4 / (L^2 inputs) of what writes; biases 0. With
        ``asymmetric`` lower bounds of variance 2 / d_model around 1."""
        cell = self.neuron
        small, outer = (2 / (5 * self.d_model)) ** 0.5, 2 / self.num_layers
        into = [proj for proj in (cell.r_proj, cell.s_proj, cell.g_proj, self.up) if proj is not None]
        stds = [(proj, small) for proj in into]
        stds += [(self.down, outer * self.d_model**-0.5), (cell.o_proj, outer * cell.state_dim**-0.5)]
        for proj, std in stds:
            nn.init.normal_(proj.weight, std=std)
            nn.init.zeros_(proj.bias)
        if self.asymmetric:
            nn.init.normal_(cell.s_proj.weight, std=(2 / self.d_model) ** 0.5)
            nn.init.ones_(cell.s_proj.bias)

    def forward(
        self, x: Tensor, state: MinMaxState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, MinMaxState]:
        parts.check_input(x, self.d_model, segments)
        memory, previous = parts.unpack(state, MinMaxState)
        mixed, previous = self.neuron.blend(self.norms[0](x), previous, segments)
        gate, value = self.up(self.norms[1](x + mixed)).chunk(2, -1)
        inner = self.norms[2](x + self.down(F.relu(gate) * value))
        y, memory = self.neuron.cells(inner, memory, segments)
        return y, MinMaxState(memory, previous)

    def init_state(self, rows: int) -> MinMaxState:
        return self.neuron.init_state(rows)
