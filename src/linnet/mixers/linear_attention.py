"""Linear attention (Katharopoulos et al. 2020): softmax replaced by a feature map, so that the past is one matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import DecayState, Segments, decay
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading, share

FEATURE_MAPS = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}
POSITIVE = ("elu", "relu")


def _is_quadratic_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "linear_attention", 16, num_heads=2)
    x = inputs(generator, 16)
    q, k, v = (parts.heads(p(x), 2).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)).tril() * q.shape[-1] ** -0.5
    o = (weights / (weights.sum(-1, keepdim=True) + 1e-10)) @ v
    return mixer(x)[0], mixer.o_proj(o.transpose(1, 2).flatten(2))


def _is_open_gla(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    plain = random_mixer(generator, "linear_attention", 16, num_heads=2, feature_map="identity", normalize=False)
    gla = random_mixer(generator, "gla", 16, num_heads=2, expand_k=1.0)
    share(plain, gla, "q_proj", "k_proj", "v_proj")
    nn.init.zeros_(gla.gate[1].weight)
    nn.init.constant_(gla.gate[1].bias, 1e3)  # logsigmoid(1000) is 0
    x = inputs(generator, 16)
    return reading(plain, x), reading(gla, x)


@register_mixer(
    "linear_attention",
    Card(
        paper="Katharopoulos et al. 2020, Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention"
        " (arXiv 2006.16236)",
        recurrence="S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t); o_t = S_t^T phi(q_t) / (z_t.phi(q_t))",
        state="H·K·V (+ H·K with the normaliser)",
        engine="decay",
        expressivity="TC0: identity transition, nothing is ever forgotten",
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 2, "feature_map": "relu", "expand_v": 2.0},
            {"d_model": 16, "num_heads": 2, "feature_map": "silu", "normalize": False, "expand_k": 0.5},
            {"d_model": 16, "num_heads": 2, "feature_map": "identity", "normalize": False},
        ),
        identities=(
            Identity(
                "is masked quadratic attention with weights phi(q).phi(k), normalised by row", _is_quadratic_attention
            ),
            Identity("reads what gla reads when its gate stays open (g = 0)", _is_open_gla),
        ),
        notes=(
            "normalize=False is not of the paper: it drops the division and applies a per-head RMSNorm instead, which"
            " signed features (silu, identity) need.",
        ),
    ),
)
class LinearAttention(Mixer):
    """Causal linear attention.

    Args:
        d_model: width.
        num_heads: heads H.
        expand_k: K = expand_k * d_model / H channels of a query and key head.
        expand_v: V = expand_v * d_model / H channels of a value head.
        feature_map: "elu" (elu(x) + 1), "relu", "silu" or "identity".
        normalize: divide by the sum of the weights, as published; False normalises each head's output by its RMS.
        norm_eps: of that RMSNorm.

    Raises:
        ValueError: for sizes that do not divide, or ``normalize`` with a feature map that is not positive.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "elu",
        normalize: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_positive(norm_eps=norm_eps)
        parts.check_choice("feature_map", feature_map, FEATURE_MAPS)
        if normalize and feature_map not in POSITIVE:
            raise ValueError(
                f"normalize: expected False with feature_map={feature_map!r} (its sum can cross zero), got True"
            )
        self.d_model, self.num_heads, self.normalize, self.feature_map = d_model, num_heads, normalize, feature_map
        self.head_k = parts.head_size("expand_k", d_model, expand_k, num_heads)
        self.head_v = parts.head_size("expand_v", d_model, expand_v, num_heads)
        keys, values = num_heads * self.head_k, num_heads * self.head_v
        self.q_proj, self.k_proj, self.v_proj = parts.projections(d_model, keys, keys, values)
        self.norm = None if normalize else parts.Norm(self.head_v, norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self, x: Tensor, state: DecayState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, DecayState]:
        parts.check_input(x, self.d_model, segments)
        phi = FEATURE_MAPS[self.feature_map]
        q, k, v = (parts.heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        o, state = decay(phi(q), phi(k), v, normalize=self.normalize, state=state, segments=segments)
        if self.norm is not None:
            o = self.norm(o)
        return self.o_proj(o.flatten(2)), state

    def init_state(self, rows: int) -> DecayState:
        return parts.decay_state(self.o_proj.weight, rows, self.num_heads, self.head_k, self.head_v, self.normalize)
