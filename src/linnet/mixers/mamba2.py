"""Mamba-2 (Dao & Gu 2024): the state space dual, a scalar decay per head tied to the step size of its write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments, decay
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


def _is_ssd(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "mamba2", 8, head_dim=4, state_dim=3, num_groups=2)
    x = inputs(generator, 8)
    z, xbc, dt = mixer.in_proj(x).split([16, 16 + 2 * 6, 4], -1)
    xbc = F.conv1d(F.pad(xbc.transpose(1, 2), (3, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=28)
    v, B, C = F.silu(xbc).transpose(1, 2).split([16, 6, 6], -1)
    v, B, C = parts.heads(v, 4), parts.heads(B, 2).repeat_interleave(2, 2), parts.heads(C, 2).repeat_interleave(2, 2)
    dt = F.softplus(dt + mixer.dt_bias)
    a = (-mixer.A_log.exp() * dt).transpose(1, 2)  # [B, H, T]
    T = x.shape[1]
    steps = a[..., None].expand(-1, -1, T, T).masked_fill(~torch.ones(T, T).tril(-1).bool(), 0).cumsum(-2)
    L = steps.exp().tril()  # exp of segment sums: the 1-semiseparable matrix
    y = torch.einsum("bthn,bshn,bhts,bsh,bshp->bthp", C, B, L, dt, v) + mixer.D[:, None] * v
    y = mixer.norm((y.flatten(2) * F.silu(z)).unflatten(-1, (2, 8))).flatten(2)
    return mixer(x)[0], mixer.out_proj(y)


@register_mixer(
    "mamba2",
    Card(
        paper="Dao & Gu 2024, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured"
        " State Space Duality (arXiv 2405.21060)",
        recurrence="S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x_t^T; y_t = S_t^T C_t + D x_t, dt_t = softplus(W u_t + b)",
        state="H·N·P + (W-1)·(H·P + 2·G·N), with H·P = expand·d_model",
        engine="decay",
        expressivity="TC0: diagonal transition, one data-dependent factor per head",
        examples=(
            {"d_model": 16, "head_dim": 8, "state_dim": 16},
            {"d_model": 8, "head_dim": 4, "state_dim": 3, "num_groups": 2, "conv_size": 2},
        ),
        identities=(Identity("is the SSD matrix form: (L * C B^T) dt x with L = exp(segsum(-A dt))", _is_ssd),),
        notes=("The output projection is rescaled by depth as published when the model has scale_residual_init.",),
    ),
)
class Mamba2(Mixer):
    """The Mamba-2 block: one input projection, short convolution, selective state space, gated RMSNorm.

    Args:
        d_model: width.
        expand: inner width = expand * d_model.
        head_dim: channels P of a head; H = inner width / P heads.
        state_dim: N, channels of B and C.
        num_groups: G, groups of heads that share B and C, and spans of the norm.
        conv_size: taps W of the short convolution over x, B and C.
        norm_eps: of the gated RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_count(expand=expand, state_dim=state_dim, conv_size=conv_size)
        parts.check_conv_size(conv_size)
        self.d_model, self.head_dim, self.state_dim, self.num_groups = d_model, head_dim, state_dim, num_groups
        self.inner = expand * d_model
        self.num_heads = parts.check_divisor("head_dim", head_dim, self.inner, "expand * d_model")
        parts.check_divisor("num_groups", num_groups, self.num_heads, "the number of heads")
        self.split = self.inner, self.inner + 2 * num_groups * state_dim, self.num_heads  # z, x B C, dt
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=False)
        self.conv = parts.ShortConv(self.split[1], conv_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = parts.Norm(self.inner // num_groups, norm_eps, num_heads=num_groups)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [1, 16]; dt log-uniform in [1e-3, 0.1], stored as its inverse softplus; D = 1."""
        parts.reset_softplus_decay(self.A_log, self.dt_bias)
        nn.init.ones_(self.D)

    def forward(
        self, x: Tensor, state: parts.DecayConvState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, parts.DecayConvState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, parts.DecayConvState)
        z, xbc, dt = self.in_proj(x).split(self.split, -1)
        (xbc,), tail = self.conv(xbc, state=tail, segments=segments)
        bc = self.num_groups * self.state_dim
        v, B, C = xbc.split([self.inner, bc, bc], -1)
        v, B, C = parts.heads(v, self.num_heads), parts.heads(B, self.num_groups), parts.heads(C, self.num_groups)
        dt = F.softplus(parts.fp32(dt) + parts.fp32(self.dt_bias))
        g = -parts.fp32(self.A_log).exp() * dt
        y, memory = decay(C, B, v, g, w=dt, scale=1.0, state=memory, segments=segments)
        y = self.norm(y, z, norm_first=False, v=v.flatten(2), skip=parts.fp32(self.D).repeat_interleave(self.head_dim))
        return self.out_proj(y), parts.DecayConvState(memory, tail)

    def init_state(self, rows: int) -> parts.DecayConvState:
        memory = parts.decay_state(self.out_proj.weight, rows, self.num_heads, self.state_dim, self.head_dim)
        return parts.DecayConvState(memory, self.conv.init_state(rows))
