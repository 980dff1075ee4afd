"""DeltaNet (Yang et al. 2024): linear attention that overwrites what it stored under a key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer
from .delta_rule import DeltaRule, Strengths


def _is_one_triangular_solve(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m = random_mixer(generator, "deltanet", 16, num_heads=2, conv_size=0)
    x = inputs(generator, 16)
    q, k, v = (parts.heads(F.silu(p(x)), 2).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = torch.sigmoid(m.b_proj(x)).transpose(1, 2)[..., None]
    T = (beta * k @ k.transpose(-1, -2)).tril(-1) + torch.eye(x.shape[1])
    o = (q @ k.transpose(-1, -2)).tril() @ torch.linalg.solve(T, beta * v) * k.shape[-1] ** -0.5
    return m(x)[0], m.o_proj(m.norm(o.transpose(1, 2)).flatten(2))


@register_mixer(
    "deltanet",
    Card(
        paper="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
        " (arXiv 2406.06484); negative eigenvalues: Grazzi et al. 2024 (2411.12537)",
        recurrence="S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, b_t = sigmoid(W x_t), |k_t| = 1;"
        " o_t = K^-1/2 S_t^T q_t",
        state="H·K·V (+ (W-1)·(2·H·K + H·V) with a convolution of W taps)",
        engine="delta",
        expressivity="beyond TC0 with negative eigenvalues (parity, swaps): one generalised Householder matrix a token",
        examples=(
            {"d_model": 16, "num_heads": 2},
            {
                "d_model": 16,
                "num_heads": 2,
                "head_dim": 4,
                "expand_v": 2.0,
                "conv_size": 0,
                "neg_eigval": True,
                "output_gate": True,
            },
        ),
        identities=(
            Identity("is tril(Q K^T) (I + tril(b K K^T, -1))^-1 b V, one triangular solve", _is_one_triangular_solve),
        ),
        notes=("Queries and keys go through SiLU and the L2 norm, the features the paper settles on.",),
    ),
)
class DeltaNet(DeltaRule):
    """The delta rule with a write strength per head.

    Args:
        d_model: width.
        num_heads: heads H.
        head_dim: K channels of a query and key head; d_model / H when None.
        expand_v: V = expand_v * K channels of a value head.
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
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        neg_eigval: bool = False,
        output_gate: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ):
        head_dim = parts.check_divisor("num_heads", num_heads, d_model, "d_model") if head_dim is None else head_dim
        options = {"neg_eigval": neg_eigval, "conv_size": conv_size, "norm_eps": norm_eps}
        super().__init__(d_model, num_heads, head_dim, expand_v, **options)
        self.b_proj = parts.GateLinear(d_model, num_heads, bias=False)
        if output_gate:
            self.g_proj = nn.Linear(d_model, self.values, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal matrices of standard deviation 0.02, as in the released code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def strengths(self, x: Tensor) -> Strengths:
        return Strengths(self.reach * torch.sigmoid(self.b_proj(x)))
