"""RWKV-7 "Goose" time mixing (Peng et al. 2025): the delta rule with a learning rate a channel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, Segments, dplr
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer

FASTEST = -math.exp(-0.5)  # the lowest log-decay: no channel keeps less than 0.545 of itself a token


def _is_token_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m = random_mixer(generator, "rwkv7", 8, head_dim=4, decay_rank=2, rate_rank=3, gate_rank=2, depth=(1, 3))
    x = inputs(generator, 8)
    last, S, outputs = torch.zeros_like(x[:, 0]), x.new_zeros(2, 2, 4, 4), []
    for now in x.unbind(1):
        r, w, k, v, a, g = (now + (last - now) * mu for mu in m.mix)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(m.w_proj[1](torch.tanh(m.w_proj[0](w)))))
        a, k = torch.sigmoid(m.a_proj(a)), m.k_proj(k)
        r, w, kk, k, v, a = (
            y.unflatten(-1, (2, 4)) for y in (m.r_proj(r), w, k * m.k_k, k * (1 + (a - 1) * m.k_a), m.v_proj(v), a)
        )
        kk = F.normalize(kk, dim=-1)
        move = torch.diag_embed(w) - (kk * a)[..., :, None] * kk[..., None, :]
        S, last = move @ S + k[..., :, None] * v[..., None, :], now
        o = F.group_norm((r[..., None, :] @ S).flatten(1), 2, m.norm.weight, m.norm.bias, m.norm.eps)
        o = o + ((r * k * m.r_k).sum(-1, keepdim=True) * v).flatten(1)
        outputs.append(m.o_proj(o * m.g_proj[1](torch.sigmoid(m.g_proj[0](g)))))
    return m(x)[0], torch.stack(outputs, 1)


@register_mixer(
    "rwkv7",
    Card(
        paper='Peng et al. 2025, RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456)',
        recurrence="S_t = (diag(w_t) - (a_t * u_t) u_t^T) S_{t-1} + k_t v_t^T, u_t = unit vector of k_t * c,"
        " w_t = exp(-e^-1/2 sigmoid(.)), a_t = sigmoid(.); o_t = S_t^T r_t",
        state="H·K·K + d_model = d_model·(K + 1)",
        engine="delta",
        expressivity="beyond TC0: diagonal plus rank one, with negative eigenvalues where a_t > w_t",
        examples=(
            {"d_model": 16, "head_dim": 8, "decay_rank": 4, "rate_rank": 4, "gate_rank": 4},
            {"d_model": 16, "head_dim": 4, "layer": 2, "num_layers": 3},
        ),
        identities=(Identity("is its recurrence written token by token, token shift included", _is_token_loop),),
        notes=(
            "Time mixing only; the channel mixing is the model's MLP.",
            "Without the mixing of the first layer's values into those of later layers: a mixer sees its own layer.",
        ),
    ),
)
class RWKV7(Mixer):
    """RWKV-7 time mixing with per-head group norm, bonus for the own token and low-rank output gate.

    Args:
        d_model: width.
        head_dim: K = V channels of a head; H = d_model / K heads.
        decay_rank, rate_rank, gate_rank: ranks of the maps to the decay, the learning rate and the output gate; about
            2.5, 2.5 and 5 times the root of the width, in multiples of 32, when None.
        norm_eps: of the group norm.
        layer: index of this layer, from 0; initial shifts and decays depend on it.
        num_layers: depth of the model.

    Raises:
        ValueError: naming the option, for sizes that do not divide or a layer out of range.
    """

    no_weight_decay = ("mix", "r_k")

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 64,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 64e-5,
        layer: int = 0,
        num_layers: int = 1,
    ):
        super().__init__()
        parts.check_depth(layer, num_layers)
        self.d_model, self.head_dim, self.layer, self.num_layers = d_model, head_dim, layer, num_layers
        self.num_heads = parts.check_divisor("head_dim", head_dim, d_model, "d_model")
        narrow, wide = (max(32, 32 * round(factor * d_model**0.5 / 32)) for factor in (2.5, 5.0))
        decay_rank, rate_rank = (narrow if rank is None else rank for rank in (decay_rank, rate_rank))
        gate_rank = wide if gate_rank is None else gate_rank
        parts.check_count(decay_rank=decay_rank, rate_rank=rate_rank, gate_rank=gate_rank)
        self.mix = nn.Parameter(torch.empty(6, d_model))  # r, w, k, v, a, g
        self.w_proj = parts.low_rank(d_model, decay_rank, d_model, bias=True, gate=True)
        self.a_proj = parts.low_rank(d_model, rate_rank, d_model, bias=True, gate=True)
        self.g_proj = parts.low_rank(d_model, gate_rank, d_model)
        self.r_proj, self.k_proj, self.v_proj = parts.projections(d_model, *[d_model] * 3)
        self.k_k, self.k_a = nn.Parameter(torch.empty(d_model)), nn.Parameter(torch.empty(d_model))
        self.r_k = nn.Parameter(torch.empty(self.num_heads, head_dim))
        self.norm = parts.Norm(head_dim, norm_eps, num_heads=self.num_heads, center=True, bias=True)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Shifts, decays and rates graded over channels and depth; low-rank parts and output start at zero."""
        new = {"device": self.mix.device, "dtype": parts.state_dtype(self.mix)}
        depth, rest = self.layer / max(self.num_layers - 1, 1), 1 - self.layer / self.num_layers
        channel = torch.arange(self.d_model, **new)
        powers = rest * torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], **new)
        parts.assign(self.mix, 1 - (channel / self.d_model) ** powers[:, None])
        ramp = channel / max(self.d_model - 1, 1)
        zigzag = 2 * (channel % self.head_dim) / max(self.head_dim - 1, 1) - 1
        zigzag = zigzag * zigzag.abs()
        decay, rate = 6 * ramp ** (1 + depth**0.3) - 5.5 + 2.5 * zigzag, 0.4 * (ramp - 0.5) - 0.19 + 0.3 * zigzag
        parts.assign(self.k_k, 0.71 - 0.1 * (ramp - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for (down, up), bias in ((self.w_proj, decay), (self.a_proj, rate), (self.g_proj, None)):
            nn.init.zeros_(down.weight)  # type: ignore[arg-type]
            start = torch.empty(up.weight.shape, **new)  # type: ignore[arg-type]
            tall = start.shape[1] / start.shape[0]
            parts.assign(up.weight, nn.init.orthogonal_(start, gain=0.1 * max(1.0, tall**0.5)))  # type: ignore[arg-type]
            if bias is not None:
                parts.assign(up.bias, bias)  # type: ignore[arg-type]
        for proj, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(proj.weight, -bound * self.d_model**-0.5, bound * self.d_model**-0.5)
        nn.init.zeros_(self.o_proj.weight)

    def forward(
        self, x: Tensor, state: parts.DeltaConvState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, parts.DeltaConvState]:
        parts.check_input(x, self.d_model, segments)
        memory, shift = parts.unpack(state, parts.DeltaConvState)
        previous, shift = parts.token_shift(x, shift, segments)
        r, w, k, v, rate, gate = (x + (previous - x) * self.mix[:, None, None].to(x.dtype)).unbind(0)
        g = FASTEST * torch.sigmoid(self.w_proj[1](torch.tanh(self.w_proj[0](w))))
        rate, k = torch.sigmoid(self.a_proj(rate)), parts.fp32(self.k_proj(k))
        unit, k = k * parts.fp32(self.k_k), k * (1 + (rate - 1) * parts.fp32(self.k_a))
        r, v = parts.heads(self.r_proj(r), self.num_heads), parts.heads(self.v_proj(v), self.num_heads)
        g, unit, k, rate = (parts.heads(y, self.num_heads) for y in (g, unit, k, rate))
        unit = F.normalize(unit, dim=-1)
        a, b, k = (y.to(v.dtype) for y in (-unit, unit * rate, k))
        o, memory = dplr(r, k, v, a, b, g, state=memory, segments=segments)
        bonus = (parts.fp32(r) * parts.fp32(k) * parts.fp32(self.r_k)).sum(-1, keepdim=True)
        o = (self.norm(o) + (bonus * parts.fp32(v)).to(o.dtype)).flatten(2)
        o = o * self.g_proj[1](torch.sigmoid(self.g_proj[0](gate)))
        return self.o_proj(o), parts.DeltaConvState(memory, shift)

    def init_state(self, rows: int) -> parts.DeltaConvState:
        like = self.o_proj.weight
        last = torch.zeros(rows, 1, self.d_model, device=like.device, dtype=parts.state_dtype(like))
        return parts.DeltaConvState(
            parts.delta_state(like, rows, self.num_heads, self.head_dim, self.head_dim), ConvState(last)
        )
