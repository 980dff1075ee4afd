"""HGRN-2 (Qin et al. 2024): gated linear attention whose key is one minus its forget gate, bounded below by depth."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import DecayState, Segments, decay
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


def _is_hgrn(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "hgrn2", 8, head_dim=1, depth=(2, 4))
    x = inputs(generator, 8)
    bound = torch.sigmoid(mixer.lower_bound)
    f = bound + (1 - bound) * torch.sigmoid(mixer.f_proj(x))
    h, outputs = x.new_zeros(x.shape[0], 8), []
    for t in range(x.shape[1]):
        h = f[:, t] * h + (1 - f[:, t]) * mixer.v_proj(x)[:, t]
        outputs.append(F.silu(mixer.q_proj(x))[:, t] * h)
    return mixer(x)[0], mixer.o_proj(mixer.norm(torch.stack(outputs, 1)))


@register_mixer(
    "hgrn2",
    Card(
        paper="Qin et al. 2024, HGRN2: Gated Linear RNNs with State Expansion (arXiv 2404.07904)",
        recurrence="S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, f_t = lb_l + (1 - lb_l) sigmoid(W x_t);"
        " o_t = K^-1/2 S_t^T silu(q_t)",
        state="H·K·K = d_model·K",
        engine="decay",
        expressivity="TC0: diagonal transition, a data-dependent factor per key channel",
        examples=(
            {"d_model": 32, "head_dim": 16},
            {"d_model": 16, "head_dim": 4, "layer": 2, "num_layers": 4},
        ),
        identities=(Identity("with one channel per head, is HGRN: h_t = f_t h_{t-1} + (1 - f_t) v_t", _is_hgrn),),
        notes=(
            "The published lower bounds share one softmax over the layers (a table [L, d_model] outside the layer);"
            " here layer l learns its own, sigmoid(lower_bound), which starts at the same value l / L. Layer 0 has"
            " none.",
            "The reading is scaled by K^-1/2, which the norm undoes up to its eps.",
        ),
    ),
)
class HGRN2(Mixer):
    """HGRN-2: tied key and forget gate, SiLU queries, RMSNorm over the full width, no output gate.

    Args:
        d_model: width.
        head_dim: K = V channels of a head (the paper's expand ratio); H = d_model / K heads.
        norm_eps: of the RMSNorm.
        layer: index of this layer, from 0; its gates start bounded below by layer / num_layers.
        num_layers: depth of the model.

    Raises:
        ValueError: naming the option, for sizes that do not divide or a layer out of range.
    """

    def __init__(
        self, d_model: int, *, head_dim: int = 128, norm_eps: float = 1e-5, layer: int = 0, num_layers: int = 1
    ):
        super().__init__()
        parts.check_depth(layer, num_layers)
        self.d_model, self.head_dim, self.layer, self.num_layers = d_model, head_dim, layer, num_layers
        self.num_heads = parts.check_divisor("head_dim", head_dim, d_model, "d_model")
        self.q_proj, self.f_proj, self.v_proj = parts.projections(d_model, d_model, d_model, d_model)
        self.lower_bound = nn.Parameter(torch.empty(d_model)) if layer else None
        self.norm = parts.Norm(d_model, norm_eps)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Lower bound layer / num_layers, stored as its logit."""
        if self.lower_bound is not None:
            nn.init.constant_(self.lower_bound, math.log(self.layer / (self.num_layers - self.layer)))

    def log_decay(self, x: Tensor) -> Tensor:
        """log f ``[B, T, H * K]`` in fp32, never formed from f itself: f close to 1 would round to 1."""
        g = F.logsigmoid(parts.fp32(self.f_proj(x)))
        if self.lower_bound is not None:
            bound = parts.fp32(self.lower_bound)
            g = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + g)
        return g.clamp(max=0)  # the sum of two rounded logarithms may reach 1e-8

    def forward(
        self, x: Tensor, state: DecayState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, DecayState]:
        parts.check_input(x, self.d_model, segments)
        g = self.log_decay(x)
        v = self.v_proj(x)
        q, k = F.silu(self.q_proj(x)), -torch.expm1(g).to(v.dtype)
        q, k, v, g = (parts.heads(y, self.num_heads) for y in (q, k, v, g))
        o, state = decay(q, k, v, g, state=state, segments=segments)
        return self.o_proj(self.norm(o.flatten(2))), state

    def init_state(self, rows: int) -> DecayState:
        return parts.decay_state(self.o_proj.weight, rows, self.num_heads, self.head_dim, self.head_dim)
