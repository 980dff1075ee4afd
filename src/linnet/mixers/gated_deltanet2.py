"""Gated DeltaNet-2 (Hatamizadeh, Choi & Kautz 2026): erasing and writing gated channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer, reading, share
from .delta_rule import ChannelDecay, Strengths


def _reads_what_kda_reads(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gdn2 = random_mixer(generator, "gated_deltanet2", 16, num_heads=2, head_dim=4)
    kda = random_mixer(generator, "kda", 16, num_heads=2, head_dim=4)
    share(gdn2, kda, "q_proj", "k_proj", "v_proj", "conv", "f_proj")
    for gate in (gdn2.b_proj, gdn2.w_proj):
        parts.assign(gate.weight, kda.b_proj.weight.repeat_interleave(4, 0))
    parts.assign(kda.A_log, gdn2.A_log)
    parts.assign(kda.dt_bias, gdn2.dt_bias)
    x = inputs(generator, 16)
    return reading(gdn2, x), reading(kda, x)


@register_mixer(
    "gated_deltanet2",
    Card(
        paper="Hatamizadeh, Choi & Kautz 2026, Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention"
        " (arXiv 2605.22791)",
        recurrence="S_t = (I - k_t (b_t * k_t)^T) diag(a_t) S_{t-1} + k_t (w_t * v_t)^T, b_t, w_t sigmoid gates per key"
        " and value channel; o_t = K^-1/2 S_t^T q_t",
        state="H·K·V + (W-1)·(2·H·K + H·V), H the value heads in H·V and in the memory",
        engine="delta",
        expressivity="beyond TC0 with negative eigenvalues (parity, swaps): diagonal plus rank one",
        examples=(
            {"d_model": 16, "num_heads": 2, "head_dim": 8},
            {"d_model": 16, "num_heads": 2, "head_dim": 4, "neg_eigval": True, "gate_activation": "sigmoid"},
            {"d_model": 16, "num_heads": 1, "num_v_heads": 2, "head_dim": 6, "gate_bound": 5.0, "least_decay": 0.15},
        ),
        identities=(
            Identity("reads what kda reads when the two gates are one scalar per head", _reads_what_kda_reads),
        ),
        notes=(
            "The map to the forget gate has the rank of a head, as in the released code; the paper writes a full one.",
            "The transition is no contraction: its norm reaches 1.155, and 1.414 with neg_eigval. The paper has"
            " neither least_decay, which can make it one, nor gate_bound.",
        ),
    ),
)
class GatedDeltaNet2(ChannelDecay):
    """The delta rule with an erase gate and a forget gate per key channel and a write gate per value channel.

    Args:
        d_model: width.
        num_heads: heads H of queries and keys, which also have the erase and the forget gates.
        head_dim: K = V channels of a head, and the rank of the maps to the forget and the output gate.
        num_v_heads: heads of values, each with a memory and a write gate of its own; num_v_heads / H of them share what
            a query and key head has. H when None.
        neg_eigval: erase strengths in (0, 2) in place of (0, 1), so that a transition can reflect.
        gate_bound: keep log-decays in an interval of this length, by a sigmoid in place of the softplus, as in `kda`;
            unbounded when None.
        least_decay: what every channel forgets at each token, as a log-decay; from 0.144 on (with neg_eigval 0.347) no
            transition makes a state larger.
        gate_activation: of the output gate, "silu" as in the paper or "sigmoid".
        conv_size: taps of the short convolution over queries, keys and values; 0 for none (SiLU alone).
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide, or values out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 16,
        head_dim: int = 128,
        num_v_heads: int | None = None,
        neg_eigval: bool = False,
        gate_bound: float | None = None,
        least_decay: float = 0.0,
        gate_activation: str = "silu",
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        parts.check_choice("gate_activation", gate_activation, ("silu", "sigmoid"))
        if not 0 <= least_decay < float("inf"):
            raise ValueError(f"least_decay: expected a number of at least 0, got {least_decay}")
        options = {"neg_eigval": neg_eigval, "conv_size": conv_size, "norm_eps": norm_eps}
        super().__init__(d_model, num_heads, head_dim, 1.0, num_v_heads=num_v_heads, **options)
        self.gate_activation, self.least_decay = gate_activation, least_decay
        self.b_proj = parts.GateLinear(d_model, num_heads * head_dim, bias=False)
        self.w_proj = parts.GateLinear(d_model, self.values, bias=False)
        self.add_gates(num_heads, gate_bound)
        self.reset_parameters()

    def strengths(self, x: Tensor) -> Strengths:
        erase = self.reach * torch.sigmoid(parts.heads(self.b_proj(x), self.num_heads))
        g = self.log_decay(x)
        if self.least_decay:
            g = g - self.least_decay
        if self.num_v_heads > self.num_heads:
            erase, g = (y.repeat_interleave(self.num_v_heads // self.num_heads, 2) for y in (erase, g))
        return Strengths(erase, g, torch.sigmoid(parts.heads(self.w_proj(x), self.num_v_heads)))
