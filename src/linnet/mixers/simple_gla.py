"""Simple GLA, or gated retention: linear attention with one data-dependent forget gate per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments, decay
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


def _is_masked_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "simple_gla", 16, num_heads=2, gate_logit_normalizer=1.0)
    x = inputs(generator, 16)
    q, k, v = (parts.heads(p(x), 2).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    b = F.logsigmoid(mixer.gate(x)).cumsum(1).transpose(1, 2)
    mask = (b[..., :, None] - b[..., None, :]).exp().tril()
    o = (q @ k.transpose(-1, -2)) * mask @ v * q.shape[-1] ** -0.5
    o = mixer.norm(o.transpose(1, 2)).flatten(2) * F.silu(mixer.g_proj(x))
    return mixer(x)[0], mixer.o_proj(o)


@register_mixer(
    "simple_gla",
    Card(
        paper="Yang et al. 2023, Gated Linear Attention Transformers with Hardware-Efficient Training"
        " (arXiv 2312.06635),"
        " scalar gate; as gated retention in Sun et al. 2024 (arXiv 2405.05254)",
        recurrence="S_t = a_t S_{t-1} + k_t v_t^T, a_t = sigmoid(W x_t + b)^(1/tau); o_t = K^-1/2 S_t^T q_t",
        state="H·K·V (+ (W-1)·(2·H·K + H·V) with a convolution of W taps)",
        engine="decay",
        expressivity="TC0: diagonal transition, one data-dependent factor per head",
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 2, "num_kv_heads": 1, "conv_size": 3, "gate_logit_normalizer": 1.0},
        ),
        identities=(
            Identity("is linear attention under the mask exp(b_i - b_j), b = cumsum(log a)", _is_masked_attention),
        ),
        notes=("The per-head norm is an RMSNorm and the output gate has no bias, as in the released code.",),
    ),
)
class SimpleGLA(Mixer):
    """Linear attention with a scalar forget gate per head, per-head RMSNorm and SiLU output gate.

    Args:
        d_model: width.
        num_heads: query heads H.
        num_kv_heads: heads of keys, values and gates, each shared by H / num_kv_heads query heads; H when None.
        expand_k: K = expand_k * d_model / H channels of a query and key head.
        expand_v: V = expand_v * d_model / H channels of a value head.
        gate_logit_normalizer: tau; the gate is sigmoid(.)^(1/tau), so a large tau starts with a long memory.
        conv_size: taps of a short convolution with SiLU over queries, keys and values; 0 for none.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_logit_normalizer: float = 16.0,
        conv_size: int = 0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_positive(gate_logit_normalizer=gate_logit_normalizer)
        parts.check_conv_size(conv_size)
        self.d_model, self.num_heads, self.gate_logit_normalizer = d_model, num_heads, gate_logit_normalizer
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_k = parts.head_size("expand_k", d_model, expand_k, num_heads)
        self.head_v = parts.head_size("expand_v", d_model, expand_v, num_heads)
        self.groups = parts.check_divisor("num_kv_heads", self.num_kv_heads, num_heads, "num_heads")
        streams = num_heads * self.head_k, self.num_kv_heads * self.head_k, self.num_kv_heads * self.head_v
        self.q_proj, self.k_proj, self.v_proj = parts.projections(d_model, *streams)
        self.conv = parts.ShortConv(sum(streams), conv_size) if conv_size else None
        self.gate = self.build_gate()
        self.g_proj = nn.Linear(d_model, num_heads * self.head_v, bias=False)
        self.norm = parts.Norm(self.head_v, norm_eps)
        self.o_proj = nn.Linear(num_heads * self.head_v, d_model, bias=False)

    def build_gate(self) -> nn.Module:
        """The map from ``x`` to gate pre-activations, in fp32."""
        return parts.GateLinear(self.d_model, self.num_kv_heads)

    def log_decay(self, x: Tensor) -> Tensor:
        """``[B, T, num_kv_heads]`` in fp32."""
        return F.logsigmoid(parts.fp32(self.gate(x))) / self.gate_logit_normalizer

    def reset_parameters(self) -> None:
        for module in self.gate.modules():
            if isinstance(module, parts.GateLinear):
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: parts.DecayConvState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, parts.DecayConvState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, parts.DecayConvState)
        q, k, v, g = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.log_decay(x)
        if self.conv is not None:
            (q, k, v), tail = self.conv(q, k, v, state=tail, segments=segments)
        q, k, v = parts.heads(q, self.num_heads), parts.heads(k, self.num_kv_heads), parts.heads(v, self.num_kv_heads)
        if self.groups > 1:
            k, v, g = (y.repeat_interleave(self.groups, 2) for y in (k, v, g))
        o, memory = decay(q, k, v, g, state=memory, segments=segments)
        return self.o_proj(self.norm(o, self.g_proj(x))), parts.DecayConvState(memory, tail)

    def init_state(self, rows: int) -> parts.DecayConvState:
        memory = parts.decay_state(self.o_proj.weight, rows, self.num_heads, self.head_k, self.head_v)
        return parts.DecayConvState(memory, None if self.conv is None else self.conv.init_state(rows))
