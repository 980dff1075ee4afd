"""Kimi delta attention (Kimi Team 2025): the delta rule on a memory whose every key channel forgets on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer, reading, share
from .delta_rule import ChannelDecay, Strengths


def _reads_what_gated_deltanet_reads(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    kda = random_mixer(generator, "kda", 16, num_heads=2, head_dim=4)
    gdn = random_mixer(generator, "gated_deltanet", 16, num_heads=2, head_dim=4, expand_v=1.0)
    share(kda, gdn, "q_proj", "k_proj", "v_proj", "conv", "b_proj")
    down, up = kda.f_proj
    one = up.weight[::4].detach().clone()  # a row for each head
    parts.assign(up.weight, one.repeat_interleave(4, 0))
    parts.assign(kda.dt_bias, kda.dt_bias[::4].detach().repeat_interleave(4))
    parts.assign(gdn.a_proj.weight, one @ down.weight)
    parts.assign(gdn.A_log, kda.A_log)
    parts.assign(gdn.dt_bias, kda.dt_bias[::4])
    x = inputs(generator, 16)
    return reading(kda, x), reading(gdn, x)


@register_mixer(
    "kda",
    Card(
        paper="Kimi Team 2025, Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692)",
        recurrence="S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,"
        " a_t = exp(-exp(A) softplus(W2 W1 x_t + c)) per key channel; o_t = K^-1/2 S_t^T q_t",
        state="H·K·V + (W-1)·(2·H·K + H·V), H the value heads in H·V and in the memory",
        engine="delta",
        expressivity="beyond TC0 with negative eigenvalues (parity, swaps): diagonal plus rank one",
        examples=(
            {"d_model": 16, "num_heads": 2, "head_dim": 8},
            {"d_model": 16, "num_heads": 2, "head_dim": 4, "neg_eigval": True, "gate_bound": 5.0},
            {"d_model": 16, "num_heads": 1, "num_v_heads": 2, "head_dim": 6},
        ),
        identities=(
            Identity(
                "reads what gated_deltanet reads when the gate is constant over the key channels of a head",
                _reads_what_gated_deltanet_reads,
            ),
        ),
        notes=("The second map of the output gate has a bias, as in the released code.",),
    ),
)
class KDA(ChannelDecay):
    """The delta rule with a write strength per head, a forget gate per key channel, and a sigmoid output gate.

    Args:
        d_model: width.
        num_heads: heads H of queries and keys.
        head_dim: K = V channels of a head, and the rank of the maps to the forget and the output gate.
        num_v_heads: heads of values, each with a memory, a strength and forget gates of its own; num_v_heads / H of
            them share a query and key head. H when None.
        neg_eigval: strengths in (0, 2) in place of (0, 1), so that a transition can reflect.
        gate_bound: keep log-decays in (-gate_bound, 0), by a sigmoid in place of the softplus (5 in later Kimi models);
            unbounded when None.
        conv_size: taps of the short convolution over queries, keys and values; 0 for none (SiLU alone).
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide, or sizes or a bound out of range.
    """

    gate_activation = "sigmoid"

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        head_dim: int = 128,
        num_v_heads: int | None = None,
        neg_eigval: bool = False,
        gate_bound: float | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        options = {"neg_eigval": neg_eigval, "conv_size": conv_size, "norm_eps": norm_eps}
        super().__init__(d_model, num_heads, head_dim, 1.0, num_v_heads=num_v_heads, **options)
        self.b_proj = parts.GateLinear(d_model, self.num_v_heads, bias=False)
        self.add_gates(self.num_v_heads, gate_bound)
        self.reset_parameters()

    def strengths(self, x: Tensor) -> Strengths:
        return Strengths(self.reach * torch.sigmoid(self.b_proj(x)), self.log_decay(x))
