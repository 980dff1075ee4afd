"""The Elman network (Elman 1990) as a layer, its heads independent networks; the base of the LSTM's and the GRU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linnet.ops import CellState, Segments, cell, cell_state
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading


def same_as_torch(module: Any, name: str) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """The claim that a layer with one head runs the recurrence of a module of ``torch.nn``."""

    def check(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mixer = random_mixer(generator, name, 6, num_heads=1)
        x = inputs(generator, 6)
        theirs = module(6, 6, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            theirs.weight_ih_l0.copy_(mixer.in_proj.weight)
            theirs.weight_hh_l0.copy_(mixer.R[0].T)
            theirs.bias_ih_l0.zero_()
            theirs.bias_hh_l0.copy_(mixer.bias[0])
            return reading(mixer, x).flatten(2), theirs(x)[0]

    return check


EXPRESSIVITY = "all regular languages at finite precision: nonlinear recurrence, sequential in time"


@register_mixer(
    "elman",
    Card(
        paper="Elman 1990, Finding Structure in Time; block-diagonal in heads: Pöppel et al. 2024, FlashRNN (arXiv"
        " 2412.07752); ReLU from the identity: Le et al. 2015 (arXiv 1504.00941)",
        recurrence="h_t = tanh(W x_t + h_{t-1} R + b), or relu",
        state="H·D = d_model",
        engine="cell",
        expressivity=EXPRESSIVITY,
        linear_state=False,
        examples=({"d_model": 16, "num_heads": 2}, {"d_model": 8, "num_heads": 2, "activation": "relu"}),
        identities=(Identity("with one head, runs the recurrence of torch.nn.RNN", same_as_torch(nn.RNN, "elman")),),
        notes=("What is around the recurrence (norm per head, SiLU gate, output projection) is linnet's.",),
    ),
)
class Elman(Mixer):
    """The Elman network with an RMSNorm per head, a SiLU gate and an output projection.

    Args:
        d_model: width.
        num_heads: heads H, independent networks of D = d_model / H units; 1 is the dense network.
        activation: "tanh", or "relu", which starts from the identity as recurrent weights.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    no_weight_decay = ("bias",)
    gates = 1

    def __init__(self, d_model: int, *, num_heads: int = 4, activation: str = "tanh", norm_eps: float = 1e-5):
        parts.check_choice("activation", activation, ("tanh", "relu"))
        super().__init__()
        self.build(d_model, num_heads, norm_eps, activation)

    def build(self, d_model: int, num_heads: int, norm_eps: float, kind: str) -> None:
        """Everything around a recurrence of ``kind``."""
        self.d_model, self.num_heads, self.kind = d_model, num_heads, kind
        self.head = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        self.in_proj, self.g_proj, self.o_proj = parts.projections(d_model, self.gates * d_model, d_model, d_model)
        self.R = nn.Parameter(torch.empty(num_heads, self.head, self.gates * self.head))
        self.bias = nn.Parameter(torch.empty(num_heads, self.gates * self.head))
        self.norm = parts.Norm(self.head, norm_eps, num_heads=num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal recurrent weights for every head and gate, the identity for ReLU; biases 0."""
        D = self.head
        if self.kind == "relu":
            blocks = torch.eye(D, device=self.R.device).expand(self.num_heads, self.gates, D, D)
        else:
            new = {"dtype": parts.state_dtype(self.R), "device": self.R.device}  # no QR in half precision
            blocks = torch.linalg.qr(torch.randn(self.num_heads, self.gates, D, D, **new))[0]
        parts.assign(self.R, blocks.transpose(1, 2).flatten(2))
        nn.init.zeros_(self.bias)

    def peepholes(self) -> Tensor | None:
        """Weights from the memory cell to the gates, if the kind has any."""
        return None

    def forward(
        self, x: Tensor, state: CellState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, CellState]:
        parts.check_input(x, self.d_model, segments)
        a = parts.heads(self.in_proj(x), self.num_heads)
        R = self.R.to(a.dtype)
        h, state = cell(a, R, self.bias, self.peepholes(), kind=self.kind, state=state, segments=segments)
        return self.o_proj(self.norm(h, self.g_proj(x))), state

    def init_state(self, rows: int) -> CellState:
        dtype = parts.state_dtype(self.R)
        return cell_state(self.kind, rows, self.num_heads, self.head, dtype=dtype, device=self.R.device)
