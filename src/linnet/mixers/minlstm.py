"""minLSTM (Feng et al. 2024): forget and input gates that see only the input, normalised to sum to one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.core import Identity

from .base import Card, register_mixer
from .claims import inputs, random_mixer, reading
from .mingru import MinGRU, positive


def _is_loop(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "minlstm", 8)
    x = inputs(generator, 8)
    f, i = torch.sigmoid(mixer.gate_proj(x)).chunk(2, -1)
    new = positive(mixer.h_proj(x))
    h, states = x.new_zeros(x.shape[0], 8), []
    for t in range(x.shape[1]):
        h = (f[:, t] * h + i[:, t] * new[:, t]) / (f[:, t] + i[:, t])
        states.append(h)
    return reading(mixer, x, "o_proj"), torch.stack(states, 1)


def _is_mingru(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lstm, gru = (random_mixer(generator, name, 8) for name in ("minlstm", "mingru"))
    for name in ("h_proj", "o_proj"):
        getattr(gru, name).load_state_dict(getattr(lstm, name).state_dict())
    with torch.no_grad():  # f = 1 - i
        for p, q in zip(lstm.gate_proj.parameters(), gru.gate_proj.parameters(), strict=True):
            p.copy_(torch.cat([-q, q]))
    x = inputs(generator, 8)
    return lstm(x)[0], gru(x)[0]


@register_mixer(
    "minlstm",
    Card(
        paper="Feng et al. 2024, Were RNNs All We Needed? (arXiv 2410.01201)",
        recurrence="h_t = (f_t h_{t-1} + i_t g(W_h x_t)) / (f_t + i_t), f_t, i_t = sigmoid(W x_t + b)",
        state="expand·d_model (+ (W-1)·d_model with a convolution of W taps)",
        engine="scan",
        expressivity="TC0: diagonal transition, a data-dependent factor in (0, 1) per channel",
        examples=({"d_model": 8}, {"d_model": 8, "expand": 2, "positive": False, "conv_size": 3}),
        identities=(
            Identity("is the loop h = (f h + i g(W_h x)) / (f + i)", _is_loop),
            Identity("is minGRU when f = 1 - i", _is_mingru),
        ),
        notes=(
            "The gates are applied as factors, exact at 0 and 1; the paper's scan adds logarithms.",
            "The convolution, where there is one, has a SiLU behind it.",
        ),
    ),
)
class MinLSTM(MinGRU):
    """minLSTM with an output projection: minGRU with two gates, divided by their sum.

    Args:
        d_model: width.
        expand: channels of the state = expand * d_model.
        positive: pass candidates through g (x + 1/2 above 0, sigmoid below), as in the paper's experiments; else they
            are linear in the input.
        conv_size: taps of a short convolution with SiLU in front; 0 for none.

    Raises:
        ValueError: naming the option, when it is out of range.
    """

    gates = 2

    def keep(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """f / (f + i) and i / (f + i), from logarithms: two gates that are both closed still share one token."""
        f, i = F.logsigmoid(gates).chunk(2, -1)
        return torch.sigmoid(f - i), torch.sigmoid(i - f)
