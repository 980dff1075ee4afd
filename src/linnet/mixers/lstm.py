"""Long short-term memory (Hochreiter & Schmidhuber 1997) as a layer, its heads independent networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops.core import Identity

from . import parts
from .base import Card, register_mixer
from .claims import inputs, random_mixer, reading, share
from .elman import EXPRESSIVITY, Elman, same_as_torch


def _closed_peepholes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    plain = random_mixer(generator, "lstm", 8, num_heads=2)
    looking = random_mixer(generator, "lstm", 8, num_heads=2, peephole=True)
    share(plain, looking, "in_proj")
    for name in ("R", "bias"):
        parts.assign(getattr(looking, name), getattr(plain, name))
    nn.init.zeros_(looking.p)
    x = inputs(generator, 8)
    return reading(looking, x), reading(plain, x)


@register_mixer(
    "lstm",
    Card(
        paper="Hochreiter & Schmidhuber 1997, Long Short-Term Memory; variants: Greff et al. 2015, LSTM: A Search Space"
        " Odyssey (arXiv 1503.04069); block-diagonal in heads: Pöppel et al. 2024, FlashRNN (arXiv 2412.07752);"
        " initial memories: Tallec & Ollivier 2018 (arXiv 1804.11188)",
        recurrence="c_t = f_t c_{t-1} + i_t tanh(z_t), h_t = o_t tanh(c_t); (i, f, z, o)_t = W x_t + h_{t-1} R + b,"
        " i, f, o through σ",
        state="2·H·D = 2·d_model",
        engine="cell",
        expressivity=EXPRESSIVITY,
        linear_state=False,
        examples=(
            {"d_model": 16, "num_heads": 2},
            {"d_model": 8, "num_heads": 2, "peephole": True, "coupled": True, "memory": 50},
        ),
        identities=(
            Identity("with one head, runs the recurrence of torch.nn.LSTM", same_as_torch(nn.LSTM, "lstm")),
            Identity("peephole: with weights of 0 is the plain LSTM", _closed_peepholes),
        ),
    ),
)
class LSTM(Elman):
    """The LSTM with an RMSNorm per head, a SiLU gate and an output projection.

    Args:
        d_model: width.
        num_heads: heads H, independent networks of D = d_model / H units; 1 is the dense network.
        peephole: let the gates look at the memory cell.
        coupled: tie the input gate to the forget gate, i = 1 - f.
        memory: tokens of the longest dependency expected; units then start with memories spread evenly up to it, and
            input gates as far shut as forget gates are open. None starts all forget gates at a bias of 1.
        norm_eps: of the RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        peephole: bool = False,
        coupled: bool = False,
        memory: int | None = None,
        norm_eps: float = 1e-5,
    ):
        nn.Module.__init__(self)
        if memory is not None and memory < 3:
            raise ValueError(f"memory: expected at least 3 tokens or None, got {memory}")
        self.memory = memory
        head = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        self.gates = 3 if coupled else 4
        self.p = nn.Parameter(torch.empty(num_heads, (self.gates - 1) * head)) if peephole else None
        self.build(d_model, num_heads, norm_eps, "cifg" if coupled else "lstm")

    no_weight_decay = ("bias", "p")

    def reset_parameters(self) -> None:
        """Orthogonal recurrent weights for every head and gate; forget gates open (bias 1), the rest 0. With ``memory``
        T the biases of forget gates are logarithms of numbers uniform in [1, T - 1], of input gates their negatives."""
        super().reset_parameters()
        gates = torch.zeros(self.num_heads, self.gates, self.head, device=self.bias.device)
        gates[:, -3] = 1
        if self.memory is not None:
            gates[:, -3].uniform_(1, self.memory - 1).log_()
            if self.gates == 4:
                gates[:, 0] = -gates[:, 1]
        parts.assign(self.bias, gates.flatten(1))
        if self.p is not None:
            nn.init.zeros_(self.p)

    def peepholes(self) -> Tensor | None:
        return self.p
