"""RetNet's multi-scale retention (Sun et al. 2023): rotated queries and keys, one fixed decay per head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import DecayState, Segments, decay, rotary
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, share


class RetNetState(NamedTuple):
    """The memory, and how many tokens each row has seen (int64 ``[N]``), which the rotation of the next one needs."""

    decay: DecayState
    position: Tensor


def log_gamma(num_heads: int, like: Tensor) -> Tensor:
    """``log(1 - 2^(-5-h))`` for the heads h = 0 .. H-1, in fp32."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(num_heads, device=like.device, dtype=parts.state_dtype(like))))


def _is_simple_gla(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    options = {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0}
    retnet = random_mixer(generator, "retnet", 16, rope=False, **options)
    simple = random_mixer(generator, "simple_gla", 16, gate_logit_normalizer=1.0, **options)
    share(retnet, simple, "q_proj", "k_proj", "v_proj", "g_proj", "norm", "o_proj")
    nn.init.zeros_(simple.gate.weight)
    parts.assign(simple.gate.bias, torch.logit(log_gamma(2, simple.gate.bias).exp()))
    x = inputs(generator, 16)
    return retnet(x)[0], simple(x)[0]


def _is_masked_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "retnet", 16, num_heads=2)
    x = inputs(generator, 16)
    time = torch.arange(x.shape[1])
    q, k, v = (parts.heads(p(x), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, v = rotary(q, time).transpose(1, 2), rotary(k, time).transpose(1, 2), v.transpose(1, 2)
    gamma = log_gamma(2, x).exp()[:, None, None]
    mask = (gamma ** (time[:, None] - time).clamp(min=0)).tril()
    o = ((q @ k.transpose(-1, -2)) * mask @ v * q.shape[-1] ** -0.5).transpose(1, 2)
    return mixer(x)[0], mixer.o_proj(mixer.norm(o).flatten(2) * F.silu(mixer.g_proj(x)))


@register_mixer(
    "retnet",
    Card(
        paper="Sun et al. 2023, Retentive Network: A Successor to Transformer for Large Language Models"
        " (arXiv 2307.08621)",
        recurrence="S_t = gamma_h S_{t-1} + k_t v_t^T, gamma_h = 1 - 2^(-5-h); o_t = K^-1/2 S_t^T q_t (q, k rotated)",
        state="H·K·V + 1 position",
        engine="decay",
        expressivity="TC0: constant diagonal transition",
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 2, "rope": False, "expand_k": 0.5, "expand_v": 1.0},
        ),
        identities=(
            Identity("without rotation, is simple_gla with its gate fixed at gamma", _is_simple_gla),
            Identity("is rotated linear attention under the mask gamma^(i-j)", _is_masked_attention),
        ),
        notes=(
            "Queries and keys are rotated without the growing factors of xPos, which the decay makes redundant.",
            "Each head is normalised by its RMS with a learned weight shared by the heads (the paper: group norm), as"
            " in the public re-implementations.",
        ),
    ),
)
class RetNet(Mixer):
    """Multi-scale retention with rotary positions, per-head RMSNorm and SiLU output gate.

    Args:
        d_model: width.
        num_heads: heads H; head h forgets by a factor 1 - 2^(-5-h) per token.
        expand_k: K = expand_k * d_model / H channels of a query and key head.
        expand_v: V = expand_v * d_model / H channels of a value head.
        rope: rotate queries and keys by their position.
        rope_base: base of the rotation's frequencies.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide, or an odd K with ``rope``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 8,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope: bool = True,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.d_model, self.num_heads, self.rope, self.rope_base = d_model, num_heads, rope, rope_base
        parts.check_positive(rope_base=rope_base)
        self.head_k = parts.head_size("expand_k", d_model, expand_k, num_heads)
        self.head_v = parts.head_size("expand_v", d_model, expand_v, num_heads)
        if rope and self.head_k % 2:
            raise ValueError(f"rope: expected an even number of channels per query head, got {self.head_k}")
        keys, values = num_heads * self.head_k, num_heads * self.head_v
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = parts.projections(d_model, keys, keys, values, values)
        self.norm = parts.Norm(self.head_v, norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RetNetState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, RetNetState]:
        parts.check_input(x, self.d_model, segments)
        memory, seen = parts.unpack(state, RetNetState)
        positions, seen = parts.count_positions(x, seen, segments)
        q, k, v = (parts.heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope:
            q, k = (rotary(y, positions, base=self.rope_base) for y in (q, k))
        o, memory = decay(q, k, v, log_gamma(self.num_heads, x), state=memory, segments=segments)
        return self.o_proj(self.norm(o, self.g_proj(x))), RetNetState(memory, seen)

    def init_state(self, rows: int) -> RetNetState:
        like = self.o_proj.weight
        memory = parts.decay_state(like, rows, self.num_heads, self.head_k, self.head_v)
        return RetNetState(memory, torch.zeros(rows, dtype=torch.int64, device=like.device))
