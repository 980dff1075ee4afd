"""RWKV-6 "Finch" time mixing (Peng et al. 2024): data-dependent token shift, vector decay, bonus for the own token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, DecayState, Segments, decay
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer

STREAMS = 5  # decay w, key k, value v, receptance r, gate g, in this order


class RWKV6State(NamedTuple):
    """The memory, and the last token of each row for the token shift."""

    decay: DecayState
    shift: ConvState


def _is_token_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m = random_mixer(generator, "rwkv6", 8, head_dim=4, mix_low_rank_dim=3, decay_low_rank_dim=2, depth=(1, 3))
    x = inputs(generator, 8)
    last, S, outputs = torch.zeros_like(x[:, 0]), x.new_zeros(2, 2, 4, 4), []
    for now in x.unbind(1):
        low = torch.tanh((now + (last - now) * m.mix_x) @ m.mix_down.weight.T).chunk(STREAMS, -1)
        w, k, v, r, g = (now + (last - now) * (mu + y @ up) for mu, y, up in zip(m.mix, low, m.mix_up, strict=True))
        w = m.decay_up.bias + torch.tanh(w @ m.decay_down.weight.T) @ m.decay_up.weight.T
        w, k, v, r = (y.unflatten(-1, (2, 4)) for y in (w, m.k_proj(k), m.v_proj(v), m.r_proj(r)))
        write = k[..., :, None] * v[..., None, :]
        o = (r[..., None] * (S + m.bonus[..., None] * write)).sum(-2)
        S, last = torch.exp(-torch.exp(w))[..., None] * S + write, now
        o = F.group_norm(o.flatten(1), 2, m.norm.weight, m.norm.bias, m.norm.eps)
        outputs.append(m.o_proj(o * F.silu(m.g_proj(g))))
    return m(x)[0], torch.stack(outputs, 1)


@register_mixer(
    "rwkv6",
    Card(
        paper="Peng et al. 2024, Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence"
        " (arXiv 2404.05892)",
        recurrence="o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t; S_t = diag(exp(-exp w_t)) S_{t-1} + k_t v_t^T",
        state="H·K·K + d_model = d_model·(K + 1)",
        engine="decay",
        expressivity="TC0: diagonal transition, a data-dependent factor per key channel",
        examples=(
            {"d_model": 32, "head_dim": 16, "mix_low_rank_dim": 4, "decay_low_rank_dim": 8},
            {"d_model": 16, "head_dim": 8, "layer": 2, "num_layers": 3},
        ),
        identities=(Identity("is its recurrence written token by token, token shift included", _is_token_loop),),
        notes=(
            "Time mixing only; the channel mixing is the model's MLP.",
            "The special initial weights of the r, k, v, g and output projections are left to the model.",
        ),
    ),
)
class RWKV6(Mixer):
    """RWKV-6 time mixing with per-head group norm and SiLU output gate.

    Args:
        d_model: width.
        head_dim: K = V channels of a head; H = d_model / K heads.
        mix_low_rank_dim: rank of the data-dependent part of the token shift, per stream.
        decay_low_rank_dim: rank of the data-dependent part of the decay.
        norm_eps: of the group norm.
        layer: index of this layer, from 0; initial shifts, decays and bonuses depend on it.
        num_layers: depth of the model.

    Raises:
        ValueError: naming the option, for sizes that do not divide or a layer out of range.
    """

    no_weight_decay = ("mix", "bonus")

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 64,
        mix_low_rank_dim: int = 32,
        decay_low_rank_dim: int = 64,
        norm_eps: float = 64e-5,
        layer: int = 0,
        num_layers: int = 1,
    ):
        super().__init__()
        parts.check_depth(layer, num_layers)
        parts.check_count(mix_low_rank_dim=mix_low_rank_dim, decay_low_rank_dim=decay_low_rank_dim)
        self.d_model, self.head_dim, self.layer, self.num_layers = d_model, head_dim, layer, num_layers
        self.num_heads = parts.check_divisor("head_dim", head_dim, d_model, "d_model")
        self.mix_x = nn.Parameter(torch.empty(d_model))
        self.mix = nn.Parameter(torch.empty(STREAMS, d_model))
        self.mix_down = nn.Linear(d_model, STREAMS * mix_low_rank_dim, bias=False)
        self.mix_up = nn.Parameter(torch.empty(STREAMS, mix_low_rank_dim, d_model))
        self.decay_down = nn.Linear(d_model, decay_low_rank_dim, bias=False)
        self.decay_up = parts.GateLinear(decay_low_rank_dim, d_model)
        self.bonus = nn.Parameter(torch.empty(self.num_heads, head_dim))
        self.r_proj, self.k_proj, self.v_proj, self.g_proj = parts.projections(d_model, *[d_model] * 4)
        self.norm = parts.Norm(head_dim, norm_eps, num_heads=self.num_heads, center=True, bias=True)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Shifts, decays and bonuses graded over channels and depth; low-rank parts start at zero output."""
        new = {"device": self.mix_x.device, "dtype": parts.state_dtype(self.mix_x)}
        depth, rest = self.layer / max(self.num_layers - 1, 1), 1 - self.layer / self.num_layers
        channel = torch.arange(self.d_model, **new)
        shared, ramp = (channel / self.d_model) ** rest, channel / max(self.d_model - 1, 1)
        fast = 1 - (channel / self.d_model) ** (rest / 2)
        parts.assign(self.mix_x, 1 - shared)
        parts.assign(self.mix, torch.stack([1 - shared, 1 - shared, 1 - shared - 0.3 * depth, fast, fast]))
        parts.assign(self.decay_up.bias, 5 * ramp ** (0.7 + 1.3 * depth) - 6)
        bonus = depth * (1 - ramp) + 0.1 * ((channel + 1) % 3 - 1)
        parts.assign(self.bonus, bonus.view(self.num_heads, self.head_dim))
        for down, up in ((self.mix_down.weight, self.mix_up), (self.decay_down.weight, self.decay_up.weight)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01)

    def forward(
        self, x: Tensor, state: RWKV6State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, RWKV6State]:
        parts.check_input(x, self.d_model, segments)
        memory, shift = parts.unpack(state, RWKV6State)
        previous, shift = parts.token_shift(x, shift, segments)
        delta = previous - x
        low = parts.heads(torch.tanh(self.mix_down(x + delta * self.mix_x)), STREAMS)
        mix = torch.einsum("btsr,srd->sbtd", low, self.mix_up) + self.mix[:, None, None]
        w, k, v, r, g = (x + delta * mix).unbind(0)
        w = -torch.exp(self.decay_up(torch.tanh(self.decay_down(w))))
        w, k, v, r = (parts.heads(y, self.num_heads) for y in (w, self.k_proj(k), self.v_proj(v), self.r_proj(r)))
        o, memory = decay(r, k, v, w, u=self.bonus, scale=1.0, state=memory, segments=segments)
        return self.o_proj(self.norm(o, self.g_proj(g))), RWKV6State(memory, shift)

    def init_state(self, rows: int) -> RWKV6State:
        like = self.o_proj.weight
        last = torch.zeros(rows, 1, self.d_model, device=like.device, dtype=parts.state_dtype(like))
        return RWKV6State(parts.decay_state(like, rows, self.num_heads, self.head_dim, self.head_dim), ConvState(last))
