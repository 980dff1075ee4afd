"""The gated recurrent unit (Cho et al. 2014) as a layer, its heads independent networks."""

from __future__ import annotations

from torch import nn

from linnet.ops.core import Identity

from .base import Card, register_mixer
from .elman import EXPRESSIVITY, Elman, same_as_torch


@register_mixer(
    "gru",
    Card(
        paper="Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder (arXiv 1406.1078);"
        " block-diagonal in heads: Pöppel et al. 2024, FlashRNN (arXiv 2412.07752)",
        recurrence="h_t = z_t h_{t-1} + (1 - z_t) tanh(W x_t + r_t (h_{t-1} R + b)), r, z = σ(W x_t + h_{t-1} R + b)",
        state="H·D = d_model",
        engine="cell",
        expressivity=EXPRESSIVITY,
        linear_state=False,
        examples=({"d_model": 16, "num_heads": 2},),
        identities=(Identity("with one head, runs the recurrence of torch.nn.GRU", same_as_torch(nn.GRU, "gru")),),
        notes=(
            "The reset gate scales the recurrent product, as in cuDNN and PyTorch; in the paper it scales h before it.",
            "z keeps the old state, as there.",
        ),
    ),
)
class GRU(Elman):
    """The GRU with an RMSNorm per head, a SiLU gate and an output projection.

    Args:
        d_model: width.
        num_heads: heads H, independent networks of D = d_model / H units; 1 is the dense network.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    gates = 3

    def __init__(self, d_model: int, *, num_heads: int = 4, norm_eps: float = 1e-5):
        nn.Module.__init__(self)
        self.build(d_model, num_heads, norm_eps, "gru")
