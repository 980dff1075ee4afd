"""DeltaProduct (Siems et al. 2025): several delta-rule steps a token, a product of Householder matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer, share
from .delta_rule import DeltaRule, Strengths

SHARED = ("q_proj", "k_proj", "v_proj", "conv", "b_proj", "g_proj", "norm", "o_proj")


def _is_gated_deltanet(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    options = {"num_heads": 2, "head_dim": 8, "expand_v": 1.0}
    product = random_mixer(generator, "deltaproduct", 16, num_steps=1, gate=True, output_gate=True, **options)
    gdn = random_mixer(generator, "gated_deltanet", 16, neg_eigval=True, **options)
    share(product, gdn, *SHARED, "a_proj")
    parts.assign(gdn.A_log, product.A_log)
    parts.assign(gdn.dt_bias, product.dt_bias)
    x = inputs(generator, 16)
    return product(x)[0], gdn(x)[0]


def _is_deltanet(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    product = random_mixer(generator, "deltaproduct", 16, num_heads=2, num_steps=1, output_gate=True)
    plain = random_mixer(generator, "deltanet", 16, num_heads=2, neg_eigval=True, output_gate=True)
    share(product, plain, *SHARED)
    x = inputs(generator, 16)
    return product(x)[0], plain(x)[0]


@register_mixer(
    "deltaproduct",
    Card(
        paper="Siems et al. 2025, DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products"
        " (arXiv 2502.10297)",
        recurrence="S_t0 = a_t S_{t-1}; S_tj = (I - b_tj k_tj k_tj^T) S_t(j-1) + b_tj k_tj v_tj^T, j = 1..n;"
        " o_t = K^-1/2 S_tn^T q_t",
        state="H·K·V (+ (W-1)·(H·K + n·H·K + n·H·V) with a convolution of W taps), H the value heads in H·V and in the"
        " memory",
        engine="delta",
        expressivity="beyond TC0: n Householder matrices a token track any permutation of n + 1 elements",
        examples=(
            {"d_model": 16, "num_heads": 2, "num_steps": 3},
            {"d_model": 16, "num_heads": 2, "head_dim": 6, "gate": True, "neg_eigval": False, "output_gate": True},
            {"d_model": 16, "num_heads": 1, "num_v_heads": 2, "head_dim": 4, "gate": True},
        ),
        identities=(
            Identity("is gated_deltanet with one step and a gate", _is_gated_deltanet),
            Identity("is deltanet with one step and no gate", _is_deltanet),
        ),
        notes=("The forget gate acts once a token, before its first step.",),
    ),
)
class DeltaProduct(DeltaRule):
    """Several steps of the delta rule a token, with a forget gate on request.

    Args:
        d_model: width.
        num_heads: heads H of queries and keys.
        num_steps: n, keys, values and strengths of a token.
        head_dim: K channels of a query and key head; d_model / H when None.
        expand_v: V = expand_v * K channels of a value head.
        num_v_heads: heads of values, each with a memory and strengths of its own; num_v_heads / H of them share a query
            and key head. H when None.
        gate: forget by a data-dependent factor per head (Gated DeltaProduct).
        neg_eigval: strengths in (0, 2) in place of (0, 1), so that a step can reflect.
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
        num_heads: int = 4,
        num_steps: int = 2,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        num_v_heads: int | None = None,
        gate: bool = False,
        neg_eigval: bool = True,
        output_gate: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        parts.check_count(num_steps=num_steps)
        head_dim = parts.check_divisor("num_heads", num_heads, d_model, "d_model") if head_dim is None else head_dim
        options = {"neg_eigval": neg_eigval, "conv_size": conv_size, "norm_eps": norm_eps}
        super().__init__(d_model, num_heads, head_dim, expand_v, num_v_heads=num_v_heads, substeps=num_steps, **options)
        self.b_proj = parts.GateLinear(d_model, num_steps * self.num_v_heads, bias=False)
        self.gate = gate
        if gate:
            self.a_proj = parts.GateLinear(d_model, self.num_v_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
            self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        if output_gate:
            self.g_proj = nn.Linear(d_model, self.values, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """exp(A) uniform in (0, 16]; the rest as in the family."""
        super().reset_parameters()
        if self.gate:
            parts.reset_softplus_decay(self.A_log, self.dt_bias, lowest=0.0)

    def strengths(self, x: Tensor) -> Strengths:
        beta = self.reach * torch.sigmoid(self.rows(self.b_proj(x), self.num_v_heads)[..., 0])
        return Strengths(beta, parts.softplus_decay(self.a_proj(x), self.A_log, self.dt_bias) if self.gate else None)
