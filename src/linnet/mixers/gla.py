"""Gated linear attention (Yang et al. 2023): a data-dependent forget gate for every key channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer, share
from .simple_gla import SimpleGLA


def _is_simple_gla(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gla = random_mixer(generator, "gla", 16, num_heads=2, gate_low_rank_dim=4)
    simple = random_mixer(generator, "simple_gla", 16, num_heads=2)
    share(gla, simple, "q_proj", "k_proj", "v_proj", "g_proj", "norm", "o_proj")
    down, up = gla.gate
    one = up.weight[:: gla.head_k].detach().clone(), up.bias[:: gla.head_k].detach().clone()  # a row for each head
    parts.assign(up.weight, one[0].repeat_interleave(gla.head_k, 0))
    parts.assign(up.bias, one[1].repeat_interleave(gla.head_k, 0))
    parts.assign(simple.gate.weight, one[0] @ down.weight)
    parts.assign(simple.gate.bias, one[1])
    x = inputs(generator, 16)
    return gla(x)[0], simple(x)[0]


@register_mixer(
    "gla",
    Card(
        paper="Yang et al. 2023, Gated Linear Attention Transformers with Hardware-Efficient Training"
        " (arXiv 2312.06635)",
        recurrence="S_t = diag(a_t) S_{t-1} + k_t v_t^T, a_t = sigmoid(W2 W1 x_t + b)^(1/tau); o_t = K^-1/2 S_t^T q_t",
        state="H·K·V (+ (W-1)·(2·H·K + H·V) with a convolution of W taps)",
        engine="decay",
        expressivity="TC0: diagonal transition, a data-dependent factor per key channel",
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 2, "conv_size": 4, "gate_logit_normalizer": 1.0, "gate_low_rank_dim": 4},
            {"d_model": 16, "num_heads": 2, "num_kv_heads": 1, "expand_k": 1.0, "expand_v": 2.0},
        ),
        identities=(
            Identity("is simple_gla when the gate is constant over the key channels of a head", _is_simple_gla),
        ),
        notes=(
            "The per-head norm is an RMSNorm and the output gate has no bias, as in the released code; the text has a"
            " LayerNorm and a bias.",
            "With num_kv_heads < num_heads the shared memories are stored once per query head.",
        ),
    ),
)
class GLA(SimpleGLA):
    """Gated linear attention: a vector forget gate, per-head RMSNorm and SiLU output gate.

    Args:
        d_model: width.
        num_heads: query heads H.
        num_kv_heads: heads of keys, values and gates, each shared by H / num_kv_heads query heads; H when None.
        expand_k: K = expand_k * d_model / H channels of a query and key head.
        expand_v: V = expand_v * d_model / H channels of a value head.
        gate_logit_normalizer: tau; the gate is sigmoid(.)^(1/tau), so a large tau starts with a long memory.
        gate_low_rank_dim: rank of the gate's projection.
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
        gate_low_rank_dim: int = 16,
        conv_size: int = 0,
        norm_eps: float = 1e-5,
    ):
        parts.check_count(gate_low_rank_dim=gate_low_rank_dim)
        self.gate_low_rank_dim = gate_low_rank_dim
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            expand_k=expand_k,
            expand_v=expand_v,
            gate_logit_normalizer=gate_logit_normalizer,
            conv_size=conv_size,
            norm_eps=norm_eps,
        )

    def build_gate(self) -> nn.Module:
        up = parts.GateLinear(self.gate_low_rank_dim, self.num_kv_heads * self.head_k)
        return nn.Sequential(nn.Linear(self.d_model, self.gate_low_rank_dim, bias=False), up)

    def log_decay(self, x: Tensor) -> Tensor:
        """``[B, T, num_kv_heads, K]`` in fp32."""
        return parts.heads(super().log_decay(x), self.num_kv_heads)
