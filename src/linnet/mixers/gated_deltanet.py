"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024): the delta rule on a memory that each head can also forget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer, share
from .delta_rule import DeltaRule, Strengths


def _is_deltanet(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gated = random_mixer(generator, "gated_deltanet", 16, num_heads=2, head_dim=8, expand_v=1.0)
    plain = random_mixer(generator, "deltanet", 16, num_heads=2, output_gate=True)
    share(gated, plain, "q_proj", "k_proj", "v_proj", "conv", "b_proj", "g_proj", "norm", "o_proj")
    parts.assign(gated.A_log, torch.full((2,), -200.0))
    x = inputs(generator, 16)
    return gated(x)[0], plain(x)[0]


@register_mixer(
    "gated_deltanet",
    Card(
        paper="Yang, Kautz & Hatamizadeh 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule"
        " (arXiv 2412.06464)",
        recurrence="S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,"
        " a_t = exp(-exp(A) softplus(W x_t + c)); o_t = K^-1/2 S_t^T q_t",
        state="H·K·V + (W-1)·(2·H·K + H·V), H the value heads in H·V and in the memory",
        engine="delta",
        expressivity="beyond TC0 with negative eigenvalues (parity, swaps): one generalised Householder matrix a token",
        examples=(
            {"d_model": 16, "num_heads": 2, "head_dim": 8},
            {
                "d_model": 16,
                "num_heads": 1,
                "num_v_heads": 2,
                "head_dim": 6,
                "expand_v": 1.0,
                "neg_eigval": True,
                "output_gate": False,
            },
        ),
        identities=(Identity("is deltanet with an output gate when exp(A) = 0", _is_deltanet),),
        notes=("With neg_eigval erasing and writing double together, as in the released code.",),
    ),
)
class GatedDeltaNet(DeltaRule):
    """The gated delta rule: a write strength and a forget gate per head.

    Args:
        d_model: width.
        num_heads: heads H of queries and keys.
        head_dim: K channels of a query and key head; H * K need not be the width.
        expand_v: V = expand_v * K channels of a value head.
        num_v_heads: heads of values, each with a memory and gates of its own; num_v_heads / H of them share a query
            and key head. H when None.
        neg_eigval: strengths in (0, 2) in place of (0, 1), so that a transition can reflect.
        output_gate: multiply the normalised reading by SiLU(W x).
        conv_size: taps of the short convolution over queries, keys and values; 0 for none (SiLU alone).
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 6,
        head_dim: int = 256,
        expand_v: float = 2.0,
        num_v_heads: int | None = None,
        neg_eigval: bool = False,
        output_gate: bool = True,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        options = {"neg_eigval": neg_eigval, "conv_size": conv_size, "norm_eps": norm_eps}
        super().__init__(d_model, num_heads, head_dim, expand_v, num_v_heads=num_v_heads, **options)
        self.b_proj = parts.GateLinear(d_model, self.num_v_heads, bias=False)
        self.a_proj = parts.GateLinear(d_model, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        if output_gate:
            self.g_proj = nn.Linear(d_model, self.values, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """exp(A) uniform in (0, 16]; the rest as in the family."""
        super().reset_parameters()
        parts.reset_softplus_decay(self.A_log, self.dt_bias, lowest=0.0)

    def strengths(self, x: Tensor) -> Strengths:
        beta = self.reach * torch.sigmoid(self.b_proj(x))
        return Strengths(beta, parts.softplus_decay(self.a_proj(x), self.A_log, self.dt_bias))
