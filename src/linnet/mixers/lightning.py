"""Lightning attention, the mixer of TransNormerLLM (Qin et al. 2023): a fixed decay by head that fades with depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import DecayState, Segments, decay, gated_norm
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading, share


def _is_masked_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "lightning", 16, num_heads=4, depth=(1, 3))
    x = inputs(generator, 16)
    time = torch.arange(x.shape[1])
    q, k, v = (parts.heads(p(x), 4).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    rate = 8 / 4 * (1 - 1 / 3) * torch.arange(4, dtype=x.dtype)[:, None, None]
    mask = torch.exp(-rate * (time[:, None] - time).clamp(min=0)).tril()
    o = ((F.silu(q) @ F.silu(k).transpose(-1, -2)) * mask @ v * q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
    return mixer(x)[0], mixer.o_proj(parts.rms_norm(o, mixer.norm_eps) * mixer.g_proj(x))


def _first_head_is_linear_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lightning = random_mixer(generator, "lightning", 8, num_heads=1)
    plain = random_mixer(generator, "linear_attention", 8, num_heads=1, feature_map="silu", normalize=False)
    share(lightning, plain, "q_proj", "k_proj", "v_proj")
    x = inputs(generator, 8)
    return reading(lightning, x, "o_proj"), parts.rms_norm(reading(plain, x), 1e-5).flatten(2) * lightning.g_proj(x)


@register_mixer(
    "lightning",
    Card(
        paper="Qin et al. 2023, TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer"
        " (arXiv 2307.14995); Lightning Attention-2 (arXiv 2401.04658)",
        recurrence="S_t = exp(-(8 h / H) (1 - l / L)) S_{t-1} + silu(k_t) v_t^T; o_t = K^-1/2 S_t^T silu(q_t)",
        state="H·K·V",
        engine="decay",
        expressivity="TC0: constant diagonal transition",
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 4, "layer": 2, "num_layers": 3},
        ),
        identities=(
            Identity("is linear attention under the mask exp(-rate (i - j))", _is_masked_attention),
            Identity(
                "its head 0, which never decays, is linear_attention with SiLU features",
                _first_head_is_linear_attention,
            ),
        ),
        notes=(
            "Rates follow the formula of the paper, with heads h and layers l counted from 0; the original repository"
            " uses ALiBi slopes scaled by (1 - l / (L-1) + 1e-5).",
            "No LRPE positions in the first layer. The norm spans the full width and has no weight, and the gate no"
            " activation, as published.",
        ),
    ),
)
class Lightning(Mixer):
    """Linear attention with SiLU features, a constant decay per head and layer, RMS norm and a linear gate.

    Args:
        d_model: width.
        num_heads: heads H, each of d_model / H channels.
        norm_eps: of the RMS norm over the full width.
        layer: index of this layer, from 0; the rate of head h is (8 h / H) (1 - layer / num_layers) per token.
        num_layers: depth of the model.

    Raises:
        ValueError: naming the option, for sizes that do not divide or a layer out of range.
    """

    def __init__(
        self, d_model: int, *, num_heads: int = 8, norm_eps: float = 1e-5, layer: int = 0, num_layers: int = 1
    ):
        super().__init__()
        parts.check_positive(norm_eps=norm_eps)
        parts.check_depth(layer, num_layers)
        self.d_model, self.num_heads, self.norm_eps = d_model, num_heads, norm_eps
        self.head_dim = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        self.rate = 8 / num_heads * (1 - layer / num_layers)
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = parts.projections(d_model, *[d_model] * 4)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: DecayState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, DecayState]:
        parts.check_input(x, self.d_model, segments)
        q, k, v = (parts.heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        g = -self.rate * torch.arange(self.num_heads, device=x.device, dtype=parts.state_dtype(x))
        o, state = decay(F.silu(q), F.silu(k), v, g, state=state, segments=segments)
        o = gated_norm(o.flatten(2), self.g_proj(x), activation="identity", eps=self.norm_eps)
        return self.o_proj(o), state

    def init_state(self, rows: int) -> DecayState:
        return parts.decay_state(self.o_proj.weight, rows, self.num_heads, self.head_dim, self.head_dim)
