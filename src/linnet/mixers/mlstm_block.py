"""The mLSTM block of the first xLSTM (Beck et al. 2024): projected up in front of the cell, down behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, MLSTMState, Segments, mlstm
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


class MLSTMBlockState(NamedTuple):
    """The memory and the tail of the convolution."""

    memory: MLSTMState | None = None
    conv: ConvState | None = None


def _is_unstabilised_cell(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "mlstm_block", 8, num_heads=2, block_size=2)
    mixer.eps = 0.0
    x = inputs(generator, 8)
    u, z = mixer.up_proj(x).chunk(2, -1)
    past = F.pad(u, (0, 0, 3, 0))
    a = F.silu(sum(past[:, i : i + 11] * mixer.conv.weight[:, i] for i in range(4)) + mixer.conv.bias)
    q, k, v = (torch.einsum("btni,nij->btnj", y.unflatten(-1, (-1, 2)), w).flatten(2)
               for y, w in zip((a, a, u), mixer.qkv, strict=True))  # fmt: skip
    i, f = mixer.gates(torch.cat([q, k, v], -1)).chunk(2, -1)
    q, k, v = (parts.heads(y, 2) for y in (q / 8**0.5, k, v))
    C, n, outputs = x.new_zeros(2, 2, 8, 8), x.new_zeros(2, 2, 8), []
    for t in range(11):
        keep, write = torch.sigmoid(f[:, t])[..., None], torch.exp(i[:, t])[..., None] * k[:, t]
        C, n = keep[..., None] * C + write[..., :, None] * v[:, t, :, None], keep * n + write
        outputs.append((q[:, t, :, :, None] * C).sum(-2) / (q[:, t] * n).sum(-1).abs().clamp(min=1)[..., None])
    h = mixer.norm(torch.stack(outputs, 1)).flatten(2) + mixer.skip * a
    return mixer(x)[0], mixer.down_proj(h * F.silu(z))


@register_mixer(
    "mlstm_block",
    Card(
        paper="Beck et al. 2024, xLSTM: Extended Long Short-Term Memory (arXiv 2405.04517), pre up-projection block",
        recurrence="C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T, n_t likewise with k_t;"
        " h_t = C_t^T q_t / max(|n_t.q_t|, 1); q, k from a convolution, i, f from q, k and v",
        state="H·(K·K + K + 1) + 3·e·d_model, K = e·d_model / H",
        engine="decay",
        expressivity="TC0: diagonal transition, one data-dependent factor per head",
        examples=({"d_model": 16, "num_heads": 2},),
        identities=(Identity("is the unstabilised cell written out token by token", _is_unstabilised_cell),),
        notes=(
            "The whole residual block: in a decoder without an MLP. With `slstm` and an MLP in some layers it makes the"
            " stacks xLSTM[a:b] of the paper.",
            "Gradients go through the denominator in full; the published kernels treat it as a constant.",
        ),
    ),
)
class MLSTMBlock(Mixer):
    """Up-projection, convolution, block-diagonal queries, keys and values, mLSTM, skip, SiLU gate, down-projection.

    Args:
        d_model: width.
        num_heads: heads H of K = expand * d_model / H channels.
        expand: e, the inner width relative to ``d_model``.
        conv_size: taps of the short convolution.
        block_size: channels that the maps to queries, keys and values mix.
        norm_eps: of the LayerNorm of a head (a weight per channel, no bias).

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    eps = 1e-6  # added to the stabilised denominator, as published

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand: float = 2.0,
        conv_size: int = 4,
        block_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.d_model, self.num_heads, self.block_size = d_model, num_heads, block_size
        self.head = parts.head_size("expand", d_model, expand, num_heads)
        parts.check_positive(conv_size=conv_size)
        inner = num_heads * self.head
        blocks = parts.check_divisor("block_size", block_size, inner, "expand * d_model")
        self.up_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv = parts.ShortConv(inner, conv_size, bias=True)
        self.qkv = nn.Parameter(torch.empty(3, blocks, block_size, block_size))
        self.gates = parts.GateLinear(3 * inner, 2 * num_heads)  # input, forget
        self.norm = parts.Norm(self.head, norm_eps, num_heads=num_heads, center=True)
        self.skip = nn.Parameter(torch.empty(inner))
        self.down_proj = nn.Linear(inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal projections; gates of their biases alone at first, forget gates open (spread over 3 .. 6)."""
        for weight in (self.up_proj.weight, self.qkv):
            nn.init.normal_(weight, std=(2 / (5 * self.d_model)) ** 0.5)
        nn.init.zeros_(self.gates.weight)
        nn.init.normal_(self.gates.bias, std=0.1)
        forget = torch.linspace(3, 6, self.num_heads, device=self.skip.device)
        parts.assign(self.gates.bias, torch.cat([self.gates.bias.detach()[: self.num_heads], forget]))
        nn.init.ones_(self.skip)

    def forward(
        self, x: Tensor, state: MLSTMBlockState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, MLSTMBlockState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, MLSTMBlockState)
        u, z = self.up_proj(x).chunk(2, -1)
        (a,), tail = self.conv(u, state=tail, segments=segments)
        q, k, v = (
            torch.einsum("btni,nij->btnj", y.unflatten(-1, (-1, self.block_size)), w).flatten(2)
            for y, w in zip((a, a, u), self.qkv.to(a.dtype), strict=True)
        )
        i, f = self.gates(torch.cat([q, k, v], -1)).chunk(2, -1)
        q, k, v = (parts.heads(y, self.num_heads) for y in (q, k, v))
        h, memory = mlstm(q, k, v, i, f, eps=self.eps, state=memory, segments=segments)
        return self.down_proj(self.norm(h, z, v=a, skip=self.skip)), MLSTMBlockState(memory, tail)

    def init_state(self, rows: int) -> MLSTMBlockState:
        S = parts.decay_state(self.skip, rows, self.num_heads, self.head, self.head).S
        return MLSTMBlockState(
            MLSTMState(S, S.new_zeros(S.shape[:3]), S.new_zeros(S.shape[:2])), self.conv.init_state(rows)
        )
