"""HGRN (Qin et al. 2023): a gated linear recurrence whose forget gates are bounded below by depth."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ScanState, Segments, scan
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "hgrn", 8, depth=(2, 4))
    x = inputs(generator, 8)
    bound = torch.sigmoid(mixer.lower_bound)
    f = bound + (1 - bound) * torch.sigmoid(mixer.f_proj(x))
    c = torch.complex(*F.silu(mixer.c_proj(x)).chunk(2, -1))
    h, states = torch.zeros_like(c[:, 0]), []
    for t in range(x.shape[1]):
        h = f[:, t] * torch.exp(1j * mixer.theta) * h + (1 - f[:, t]) * c[:, t]
        states.append(h)
    h = torch.stack(states, 1)
    return reading(mixer, x), torch.cat([h.real, h.imag], -1)


def _no_rotation(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    turning, real = random_mixer(generator, "hgrn", 8), random_mixer(generator, "hgrn", 8, rotate=False)
    nn.init.zeros_(turning.theta)
    real.f_proj.load_state_dict(turning.f_proj.state_dict())
    parts.assign(real.c_proj.weight, turning.c_proj.weight[:8])
    x = inputs(generator, 8)
    return reading(turning, x)[..., :8], reading(real, x)


@register_mixer(
    "hgrn",
    Card(
        paper="Qin et al. 2023, Hierarchically Gated Recurrent Neural Network for Sequence Modeling (arXiv 2311.04823)",
        recurrence="h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) silu(W_c x_t), f_t = lb_l + (1 - lb_l) sigmoid(W_f x_t);"
        " o_t = norm(Re h_t, Im h_t) silu(W_g x_t)",
        state="2·d_model; d_model without rotation",
        engine="scan",
        expressivity="TC0: diagonal transition, a data-dependent factor per channel, turned by a constant angle",
        examples=({"d_model": 8}, {"d_model": 8, "rotate": False, "layer": 2, "num_layers": 4}),
        identities=(
            Identity("is the loop h = f exp(i theta) h + (1 - f) c", _is_loop),
            Identity("the real part is the layer without rotation when theta = 0", _no_rotation),
        ),
        notes=(
            "The published lower bounds share one softmax over the layers (a table [L, d_model] outside the layer);"
            " here layer l learns its own, sigmoid(lower_bound), which starts at the same value l / L. Layer 0 has"
            " none.",
            "The norm is an RMSNorm and its gate a SiLU, as in later releases of the layer.",
        ),
    ),
)
class HGRN(Mixer):
    """HGRN: complex states that decay by a data-dependent factor and turn by a learned constant angle.

    Args:
        d_model: width, and channels of the state.
        rotate: complex states; without it they are real, and the layer has half the size behind its gates.
        norm_eps: of the RMSNorm.
        layer: index of this layer, from 0; its gates start bounded below by layer / num_layers.
        num_layers: depth of the model.

    Raises:
        ValueError: naming the option, for a layer out of range.
    """

    def __init__(
        self, d_model: int, *, rotate: bool = True, norm_eps: float = 1e-5, layer: int = 0, num_layers: int = 1
    ):
        super().__init__()
        parts.check_depth(layer, num_layers)
        self.d_model, self.layer, self.num_layers = d_model, layer, num_layers
        width = 2 * d_model if rotate else d_model
        self.f_proj, self.c_proj, self.g_proj = parts.projections(d_model, d_model, width, width)
        self.theta = nn.Parameter(torch.empty(d_model)) if rotate else None
        self.lower_bound = nn.Parameter(torch.empty(d_model)) if layer else None
        self.norm = parts.Norm(width, norm_eps)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Angles of rotary embeddings, 10000^(-j / d_model); lower bound layer / num_layers, stored as its logit."""
        if self.theta is not None:
            exponent = torch.arange(self.d_model, device=self.theta.device) / self.d_model
            parts.assign(self.theta, 10000.0**-exponent)
        if self.lower_bound is not None:
            nn.init.constant_(self.lower_bound, math.log(self.layer / (self.num_layers - self.layer)))

    def forward(
        self, x: Tensor, state: ScanState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, ScanState]:
        parts.check_input(x, self.d_model, segments)
        forget = parts.fp32(self.f_proj(x))
        a, write = torch.sigmoid(forget), torch.sigmoid(-forget)
        if self.lower_bound is not None:
            bound = parts.fp32(self.lower_bound)
            write = torch.sigmoid(-bound) * write
            a = torch.sigmoid(bound) + torch.sigmoid(-bound) * a
        c = F.silu(self.c_proj(x))
        if self.theta is None:
            h, state = scan(a, (write * c).to(c.dtype), state=state, segments=segments)
        else:
            theta = parts.fp32(self.theta)
            turn = torch.stack([theta.cos(), theta.sin()], -1)
            pairs = c.unflatten(-1, (2, -1)).transpose(-1, -2)  # [B, T, D, 2]
            h, state = scan(a[..., None] * turn, (write[..., None] * pairs).to(c.dtype), state=state, segments=segments)
            h = h.transpose(-1, -2).flatten(2)
        return self.o_proj(self.norm(h, self.g_proj(x))), state

    def init_state(self, rows: int) -> ScanState:
        tail = (self.d_model,) if self.theta is None else (self.d_model, 2)
        return parts.scan_state(self.o_proj.weight, rows, *tail)
