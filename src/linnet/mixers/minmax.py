"""The neuron of MinMax recurrent neural cascades (Ronca 2026): cells held exactly between two bounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from linnet.ops import ConvState, ScanState, Segments, minmax_scan
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


class MinMaxState(NamedTuple):
    """Cells and the previous input (None without mixing)."""

    scan: ScanState
    previous: ConvState | None = None


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "minmax", 8, state_dim=5)
    x = inputs(generator, 8)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    gate = torch.sigmoid(mixer.mix)
    u = gate * before + (1 - gate) * x
    r, s = mixer.r_proj(u), mixer.s_proj(u)
    h, cells = x.new_zeros(x.shape[0], 5), []
    for t in range(x.shape[1]):
        h = torch.maximum(torch.minimum(h, r[:, t]), s[:, t])
        cells.append(h)
    return mixer(x)[0], mixer.o_proj(torch.stack(cells, 1) * torch.sigmoid(mixer.g_proj(u)))


def _holds(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "minmax", 8, state_dim=5)
    for p, bound in ((mixer.r_proj, 1e3), (mixer.s_proj, -1e3)):  # wide bounds let nothing in
        nn.init.zeros_(p.weight)
        nn.init.constant_(p.bias, bound)
    x, start = inputs(generator, 8), torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return mixer(x, MinMaxState(ScanState(start), mixer.init_state(2).previous))[1].scan.h, start


@register_mixer(
    "minmax",
    Card(
        paper="Ronca 2026, MinMax Recurrent Neural Cascades (arXiv 2605.06384)",
        recurrence="h_t = max(min(h_{t-1}, r_t), s_t), r_t, s_t = W u_t + b; y_t = W_o (h_t sigmoid(W_g u_t)),"
        " u_t a mix of x_t and x_{t-1}",
        state="state_dim + d_model",
        engine="minmax_scan",
        expressivity="group-free regular languages in cascades: cells keep or overwrite (flip-flops), exactly",
        linear_state=False,
        examples=(
            {"d_model": 8, "state_dim": 12},
            {"d_model": 8, "mix": "linear", "output_gate": False},
        ),
        identities=(
            Identity("is the loop h = max(min(h, r), s)", _is_loop),
            Identity("holds its cells exactly while they lie between the bounds", _holds),
        ),
        notes=(
            "The published layer has a feed-forward net between mixing and neuron, each with a norm of its own; in a"
            " decoder the MLP behind the mixer takes its place. `minmax_block` is the published layer.",
            "The lower bound's bias starts at 1 (the paper's asymmetric option): where 0 lies between the bounds, a"
            " cell that starts at 0 is never written.",
        ),
    ),
)
class MinMax(Mixer):
    """Cells of the (max, min) algebra behind a two-token mix, read through an output gate.

    Args:
        d_model: width.
        state_dim: cells; d_model when None.
        mix: how an input meets the one before it: "gated" (a learned convex combination a channel), "linear" (a matrix
            of both) or "none".
        output_gate: scale the cells by a sigmoid gate.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    def __init__(self, d_model: int, *, state_dim: int | None = None, mix: str = "gated", output_gate: bool = True):
        super().__init__()
        self.d_model, self.state_dim = d_model, d_model if state_dim is None else state_dim
        parts.check_count(state_dim=self.state_dim)
        parts.check_choice("mix", mix, ("gated", "linear", "none"))
        self.mix = nn.Parameter(torch.empty(d_model)) if mix == "gated" else None
        self.mix_proj = nn.Linear(2 * d_model, d_model) if mix == "linear" else None
        self.r_proj, self.s_proj = (nn.Linear(d_model, self.state_dim) for _ in range(2))
        self.g_proj = nn.Linear(d_model, self.state_dim) if output_gate else None
        self.o_proj = nn.Linear(self.state_dim, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Half of each token in the mix; lower bounds around 1, upper ones around 0."""
        if self.mix is not None:
            nn.init.zeros_(self.mix)
        for proj, bound in ((self.r_proj, 0.0), (self.s_proj, 1.0)):
            nn.init.constant_(proj.bias, bound)

    def forward(
        self, x: Tensor, state: MinMaxState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, MinMaxState]:
        parts.check_input(x, self.d_model, segments)
        memory, previous = parts.unpack(state, MinMaxState)
        x, previous = self.blend(x, previous, segments)
        y, memory = self.cells(x, memory, segments)
        return y, MinMaxState(memory, previous)

    def blend(
        self, x: Tensor, previous: ConvState | None, segments: Segments | None
    ) -> tuple[Tensor, ConvState | None]:
        """The mix of each token with the one before it."""
        if self.mix_proj is None and self.mix is None:
            return x, previous
        before, previous = parts.token_shift(x, previous, segments)
        if self.mix_proj is not None:
            return self.mix_proj(torch.cat([before, x], -1)), previous
        assert self.mix is not None
        return x + torch.sigmoid(self.mix).to(x.dtype) * (before - x), previous

    def cells(self, x: Tensor, memory: ScanState | None, segments: Segments | None) -> tuple[Tensor, ScanState]:
        """What the cells hold after each token, read through gate and output projection."""
        h, memory = minmax_scan(self.r_proj(x), self.s_proj(x), state=memory, segments=segments)
        if self.g_proj is not None:
            h = h * torch.sigmoid(self.g_proj(x))
        return self.o_proj(h), memory

    def init_state(self, rows: int) -> MinMaxState:
        like, previous = self.o_proj.weight, None
        if self.mix is not None or self.mix_proj is not None:
            previous = ConvState(like.new_zeros(rows, 1, self.d_model, dtype=parts.state_dtype(like)))
        return MinMaxState(parts.scan_state(like, rows, self.state_dim), previous)
