"""Gated slot attention (Zhang et al. 2024): a softmax over M memory slots between two gated linear attentions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import DecayState, Segments, decay
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading


class GSAState(NamedTuple):
    """The keys ``[N, H, K, M]`` and the values ``[N, H, M, V]`` held in the slots."""

    keys: DecayState
    values: DecayState


def _is_two_passes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "gsa", 8, num_heads=2, num_slots=3, gate_logit_normalizer=2.0)
    x = inputs(generator, 8)
    q, k, v = (F.silu(parts.heads(p(x), 2)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    a = torch.sigmoid(parts.heads(mixer.f_proj(x), 2)).sqrt()[..., None]
    keys, values, outputs = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), []
    for t in range(x.shape[1]):  # [B, H, M, .]: every slot keeps a gated average of keys and of values
        keys = a[:, t] * keys + (1 - a[:, t]) * k[:, t, :, None]
        values = a[:, t] * values + (1 - a[:, t]) * v[:, t, :, None]
        p = torch.softmax((keys * q[:, t, :, None]).sum(-1), -1)
        outputs.append((p[..., None] * values).sum(-2))
    return mixer(x)[0], mixer.o_proj(mixer.norm(F.silu(torch.stack(outputs, 1)).flatten(2)))


def _one_slot_is_an_average(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "gsa", 8, num_heads=2, num_slots=1, gate_logit_normalizer=1.0)
    x = inputs(generator, 8)
    a, v = torch.sigmoid(mixer.f_proj(x))[..., None], F.silu(parts.heads(mixer.v_proj(x), 2))
    h, outputs = torch.zeros_like(v[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + (1 - a[:, t]) * v[:, t]
        outputs.append(h)
    return reading(mixer, x), F.silu(torch.stack(outputs, 1)).flatten(2)


@register_mixer(
    "gsa",
    Card(
        paper="Zhang et al. 2024, Gated Slot Attention for Efficient Linear-Time Sequence Modeling (arXiv 2409.07146)",
        recurrence="A_t = diag(a_t) A_{t-1} + (1 - a_t) k_t^T, B_t likewise with v_t; o_t = B_t^T softmax(A_t q_t)",
        state="H·(K·M + M·V)",
        engine="decay",
        expressivity="TC0: diagonal transition, a data-dependent factor per slot",
        examples=(
            {"d_model": 32, "num_heads": 2, "num_slots": 8},
            {"d_model": 16, "num_heads": 2, "num_slots": 3, "expand_k": 0.5, "gate_logit_normalizer": 1.0},
        ),
        identities=(
            Identity("is two gated averages per slot with a softmax over the slots between them", _is_two_passes),
            Identity(
                "with one slot, reads h_t = a_t h_{t-1} + (1 - a_t) v_t whatever the query", _one_slot_is_an_average
            ),
        ),
        notes=("SiLU on queries, keys, values and output, and a scale of 1 in both passes, as in the released layer.",),
    ),
)
class GSA(Mixer):
    """Gated slot attention: bounded-memory attention whose M slots forget by a data-dependent gate.

    Args:
        d_model: width.
        num_heads: heads H.
        num_slots: memory slots M per head.
        expand_k: K = expand_k * d_model / H channels of a query and key head.
        expand_v: V = expand_v * d_model / H channels of a value head.
        gate_logit_normalizer: tau; the gate is sigmoid(.)^(1/tau), so a large tau starts with a long memory.
        norm_eps: of the RMSNorm over the heads together.

    Raises:
        ValueError: naming the option, for sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_slots: int = 64,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        gate_logit_normalizer: float = 8.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_count(num_slots=num_slots)
        parts.check_positive(gate_logit_normalizer=gate_logit_normalizer)
        self.d_model, self.num_heads, self.num_slots = d_model, num_heads, num_slots
        self.gate_logit_normalizer = gate_logit_normalizer
        self.head_k = parts.head_size("expand_k", d_model, expand_k, num_heads)
        self.head_v = parts.head_size("expand_v", d_model, expand_v, num_heads)
        keys, values = num_heads * self.head_k, num_heads * self.head_v
        self.q_proj, self.k_proj, self.v_proj = parts.projections(d_model, keys, keys, values)
        self.f_proj = nn.Linear(d_model, num_heads * num_slots, bias=False)
        self.norm = parts.Norm(values, norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self, x: Tensor, state: GSAState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, GSAState]:
        parts.check_input(x, self.d_model, segments)
        keys, values = parts.unpack(state, GSAState)
        q, k, v = (F.silu(parts.heads(proj(x), self.num_heads)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        g = F.logsigmoid(parts.fp32(parts.heads(self.f_proj(x), self.num_heads))) / self.gate_logit_normalizer
        s = -torch.expm1(g).to(v.dtype)
        scores, keys = decay(q, k, s, gv=g, scale=1.0, state=keys, segments=segments)
        p = torch.softmax(parts.fp32(scores), -1).to(v.dtype)
        o, values = decay(p, s, v, g, scale=1.0, state=values, segments=segments)
        return self.o_proj(self.norm(F.silu(o).flatten(2))), GSAState(keys, values)

    def init_state(self, rows: int) -> GSAState:
        like = self.o_proj.weight
        return GSAState(
            parts.decay_state(like, rows, self.num_heads, self.head_k, self.num_slots),
            parts.decay_state(like, rows, self.num_heads, self.num_slots, self.head_v),
        )
