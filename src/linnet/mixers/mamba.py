"""Mamba (Gu & Dao 2023): a selective state space a channel, whose step size and maps depend on the token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments, selective_scan
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "mamba", 8, state_dim=3)
    x = inputs(generator, 8)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv.weight[:, None], mixer.conv.bias, groups=16).mT)
    dt, B, C = mixer.x_proj(u).split([1, 3, 3], -1)
    dt = F.softplus(mixer.dt_proj(dt))
    h, outputs = x.new_zeros(x.shape[0], 16, 3), []
    for t in range(x.shape[1]):
        h = torch.exp(-mixer.A_log.exp() * dt[:, t, :, None]) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + mixer.D * u[:, t])
    return mixer(x)[0], mixer.out_proj(torch.stack(outputs, 1) * F.silu(z))


@register_mixer(
    "mamba",
    Card(
        paper="Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv 2312.00752)",
        recurrence="h_t = exp(-A dt_t) h_{t-1} + dt_t u_t B_t; y_t = h_t C_t + D u_t, dt_t = softplus(W u_t + b)",
        state="inner·N + (W-1)·inner, with inner = expand·d_model",
        engine="selective_scan",
        expressivity="TC0: diagonal transition, a data-dependent factor per channel and state",
        examples=(
            {"d_model": 8, "state_dim": 4},
            {"d_model": 8, "expand": 1, "state_dim": 3, "dt_rank": 2, "normalize": True, "conv_size": 2},
        ),
        identities=(Identity("is the loop h = exp(-A dt) h + dt u B, y = h C + D u", _is_loop),),
        notes=("The output projection is rescaled by depth as published when the model has scale_residual_init.",),
    ),
)
class Mamba(Mixer):
    """The Mamba block: one input projection, short convolution, selective state space, output gate.

    Args:
        d_model: width.
        expand: inner width = expand * d_model.
        state_dim: N, states of a channel.
        dt_rank: rank of the map to the step sizes; d_model / 16, rounded up, when None.
        normalize: RMSNorms on the step sizes' low-rank input, B and C, as in Jamba (arXiv 2403.19887).
        conv_size: taps W of the short convolution.
        norm_eps: of these norms.

    Raises:
        ValueError: naming the option, for sizes that are out of range.
    """

    no_weight_decay = ("A_log",)

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 2,
        state_dim: int = 16,
        dt_rank: int | None = None,
        normalize: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        dt_rank = -(-d_model // 16) if dt_rank is None else dt_rank
        parts.check_count(expand=expand, state_dim=state_dim, dt_rank=dt_rank, conv_size=conv_size)
        parts.check_conv_size(conv_size)
        parts.check_positive(norm_eps=norm_eps)
        self.d_model, self.inner, self.state_dim = d_model, expand * d_model, state_dim
        self.split = dt_rank, state_dim, state_dim
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=False)
        self.conv = parts.ShortConv(self.inner, conv_size, bias=True)
        self.x_proj = nn.Linear(self.inner, sum(self.split), bias=False)
        self.norms = nn.ModuleList(parts.Norm(size, norm_eps) for size in self.split) if normalize else None
        self.dt_proj = parts.GateLinear(dt_rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, state_dim))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A = 1 ... N in every channel; dt log-uniform in [1e-3, 0.1], its bias the inverse softplus and its weight
        uniform within dt_rank^-1/2; D = 1."""
        rows = torch.arange(1, self.state_dim + 1, dtype=torch.float32, device=self.A_log.device).log()
        parts.assign(self.A_log, rows.expand(self.inner, -1))
        bound = self.split[0] ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = self.dt_proj.bias.uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
        dt.add_(torch.log(-torch.expm1(-dt)))
        self.D.fill_(1)

    def forward(
        self, x: Tensor, state: parts.ScanConvState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, parts.ScanConvState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, parts.ScanConvState)
        u, z = self.in_proj(x).chunk(2, -1)
        (u,), tail = self.conv(u, state=tail, segments=segments)
        maps = self.x_proj(u).split(self.split, -1)
        if self.norms is not None:
            maps = [norm(y) for norm, y in zip(self.norms, maps, strict=True)]
        dt, B, C = maps
        delta, A = F.softplus(self.dt_proj(dt)), -parts.fp32(self.A_log).exp()
        y, memory = selective_scan(u, delta, A, B, C, parts.fp32(self.D), state=memory, segments=segments)
        return self.out_proj(y * F.silu(z)), parts.ScanConvState(memory, tail)

    def init_state(self, rows: int) -> parts.ScanConvState:
        memory = parts.scan_state(self.A_log, rows, self.inner, self.state_dim)
        return parts.ScanConvState(memory, self.conv.init_state(rows))
