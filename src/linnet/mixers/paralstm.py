"""The ParaLSTM block of ParaRNN (Danieli et al. 2025): as the ParaGRU's, with a memory cell and peepholes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops import ParaState, Segments, paralstm
from linnet.ops.core import Identity

from .base import Card, register_mixer
from .claims import inputs, random_mixer, reading
from .paragru import EXPRESSIVITY, NOTES, PAPER, ParaGRU


def _token_by_token(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "paralstm", 8, num_heads=2, conv_size=0, clip=None)
    x = inputs(generator, 8)
    x_f, x_o, x_z = mixer.gates(F.silu(mixer.in_proj(x)[..., :8])).unbind(2)
    A, C, outputs = mixer.A, mixer.C, []
    h = c = torch.zeros(2, 8, dtype=torch.float64)
    for t in range(x.shape[1]):
        f = torch.sigmoid(A[0] * h + C[0] * c + x_f[:, t])
        c = f * c + (1 - f) * torch.tanh(A[2] * h + x_z[:, t])
        h = torch.sigmoid(A[1] * h + C[1] * c + x_o[:, t]) * torch.tanh(c)
        outputs.append(h)
    return reading(mixer, x), torch.stack(outputs, 1)


@register_mixer(
    "paralstm",
    Card(
        paper=f"{PAPER} 2510.21450)",
        recurrence="c_t = f_t c_{t-1} + (1 - f_t) tanh(A_z h_{t-1} + W_z u_t), h_t = o_t tanh(c_t);"
        " f = σ(A_f h_{t-1} + C_f c_{t-1} + W_f u_t), o = σ(A_o h_{t-1} + C_o c_t + W_o u_t), A and C diagonal",
        state="2·d_model (+ (W-1)·d_model with a convolution of W taps)",
        engine="paralstm",
        expressivity=EXPRESSIVITY,
        linear_state=False,
        examples=({"d_model": 16, "num_heads": 2}, {"d_model": 8, "num_heads": 2, "conv_size": 0, "clip": None}),
        identities=(Identity("is the recurrence written out token by token", _token_by_token),),
        notes=NOTES,
    ),
)
class ParaLSTM(ParaGRU):
    """Short convolution with SiLU, the cell, RMSNorm times a SiLU gate, output projection, a scale for the branch.

    Args:
        d_model: width.
        num_heads: blocks of the block-diagonal projection to the gates; the recurrence itself has no heads.
        conv_size: taps W of the short convolution, 0 for none.
        clip: bound of the recurrent weights used, which keeps Newton's method at three or four steps; None for none.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    no_weight_decay = ("A", "bias", "C")
    peepholes = 2

    def run(self, x: Tensor, state: ParaState | None, segments: Segments | None) -> tuple[Tensor, ParaState]:
        return paralstm(x, self.clipped(self.A), self.clipped(self.C), state=state, segments=segments)  # type: ignore[arg-type]
