"""The ParaGRU block of ParaRNN (Danieli et al. 2025): a nonlinear cell with diagonal recurrence, parallel by Newton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, ParaState, Segments, paragru
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading


class ParaMixerState(NamedTuple):
    """The cell's state and the tail of the convolution (None without one)."""

    cell: ParaState | None = None
    conv: ConvState | None = None


def _token_by_token(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "paragru", 8, num_heads=2, conv_size=0, clip=0.3)
    x = inputs(generator, 8)
    (x_z, x_r, x_n), A = mixer.gates(F.silu(mixer.in_proj(x)[..., :8])).unbind(2), mixer.A.clamp(-0.3, 0.3)
    h, outputs = torch.zeros(2, 8, dtype=torch.float64), []
    for t in range(x.shape[1]):
        z, r = torch.sigmoid(A[0] * h + x_z[:, t]), torch.sigmoid(A[1] * h + x_r[:, t])
        h = (1 - z) * h + z * torch.tanh(A[2] * r * h + x_n[:, t])
        outputs.append(h)
    return reading(mixer, x), torch.stack(outputs, 1)


PAPER = "Danieli et al. 2025, ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models (arXiv"
NOTES = (
    "The clip acts on the values used, with the gradient passed straight through; the paper does not say how it clips.",
    "The order norm, then gate, and the scale of the branch follow the paper's figure of the block.",
)
EXPRESSIVITY = "all regular languages at finite precision: nonlinear recurrence (within the clip contractive: less)"


@register_mixer(
    "paragru",
    Card(
        paper=f"{PAPER} 2510.21450)",
        recurrence="h_t = (1 - z_t) h_{t-1} + z_t tanh(A_n r_t h_{t-1} + W_n u_t), z, r = σ(A h_{t-1} + W u_t),"
        " A diagonal",
        state="d_model (+ (W-1)·d_model with a convolution of W taps)",
        engine="paragru",
        expressivity=EXPRESSIVITY,
        linear_state=False,
        examples=({"d_model": 16, "num_heads": 2}, {"d_model": 8, "num_heads": 2, "conv_size": 0, "clip": None}),
        identities=(Identity("is the recurrence written out token by token", _token_by_token),),
        notes=NOTES,
    ),
)
class ParaGRU(Mixer):
    """Short convolution with SiLU, the cell, RMSNorm times a SiLU gate, output projection, a scale for the branch.

    Args:
        d_model: width.
        num_heads: blocks of the block-diagonal projection to the gates; the recurrence itself has no heads.
        conv_size: taps W of the short convolution, 0 for none.
        clip: bound of the recurrent weights used, which keeps Newton's method at three or four steps; None for none.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    no_weight_decay = ("A", "bias")
    peepholes = 0

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        conv_size: int = 4,
        clip: float | None = 0.5,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_conv_size(conv_size)
        if clip is not None:
            parts.check_positive(clip=clip)
        self.d_model, self.num_heads, self.clip = d_model, num_heads, clip
        head = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.conv = parts.ShortConv(d_model, conv_size) if conv_size else None
        self.W = nn.Parameter(torch.empty(num_heads, head, 3 * head))
        self.bias = nn.Parameter(torch.empty(3, d_model))
        self.A = nn.Parameter(torch.empty(3, d_model))
        self.C = nn.Parameter(torch.empty(self.peepholes, d_model)) if self.peepholes else None
        self.norm = parts.Norm(d_model, norm_eps)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform projections to the gates; recurrent weights N(0, 1/d_model); biases 0, scale 1."""
        nn.init.uniform_(self.W, -((3 / self.W.shape[1]) ** 0.5), (3 / self.W.shape[1]) ** 0.5)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.scale)
        for weight in (self.A, self.C):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=self.d_model**-0.5, a=-0.9, b=0.9)

    def gates(self, u: Tensor) -> Tensor:
        """Inputs of the gates ``[B, T, 3, d_model]`` in fp32."""
        y = torch.einsum("bthd,hde->bthe", parts.heads(u, self.num_heads), self.W).unflatten(-1, (3, -1))
        return parts.fp32(y.transpose(2, 3).flatten(3)) + parts.fp32(self.bias)

    def clipped(self, weight: Tensor) -> Tensor:
        """The weights used; the gradient goes straight through the clip."""
        if self.clip is None:
            return weight
        return weight + (weight.clamp(-self.clip, self.clip) - weight).detach()

    def run(self, x: Tensor, state: ParaState | None, segments: Segments | None) -> tuple[Tensor, ParaState]:
        """The cell."""
        return paragru(x, self.clipped(self.A), state=state, segments=segments)

    def forward(
        self, x: Tensor, state: ParaMixerState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, ParaMixerState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, ParaMixerState)
        u, gate = self.in_proj(x).chunk(2, -1)
        if self.conv is None:
            u = F.silu(u)
        else:
            (u,), tail = self.conv(u, state=tail, segments=segments)
        h, memory = self.run(self.gates(u), memory, segments)
        y = self.o_proj(self.norm(h, gate))
        return y * self.scale.to(y.dtype), ParaMixerState(memory, tail)

    def init_state(self, rows: int) -> ParaMixerState:
        zeros = torch.zeros(rows, 2, self.d_model, dtype=parts.state_dtype(self.W), device=self.W.device).unbind(1)
        memory = ParaState(zeros[0], zeros[1] if self.peepholes else None)
        return ParaMixerState(memory, None if self.conv is None else self.conv.init_state(rows))
