"""ParaRNN: nonlinear recurrences in a few Newton steps, and what the clip that makes it possible costs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import newton, paragru

from .base import Bar, Experiment, Outcome, register_reproduction

LENGTHS = (64, 512, 4096)  # of Newton's method
TESTS = (40, 100, 400)  # of parity


def _gru(h: Tensor, x: Tensor, A: Tensor) -> Tensor:
    """ParaGRU as a plain function of one token."""
    x_z, x_r, x_n = x.unbind(-2)
    z, r = torch.sigmoid(A[0] * h + x_z), torch.sigmoid(A[1] * h + x_r)
    return (1 - z) * h + z * torch.tanh(A[2] * r * h + x_n)


def _steps(length: int, clip: float) -> int:
    """Newton steps to a residual of 1e-5 in fp32, all recurrent weights at the clip (the worst case)."""
    generator = torch.Generator().manual_seed(length)
    A = clip * torch.sign(torch.randn(3, 16, generator=generator))
    x = 2 * torch.randn(2, length, 3, 16, generator=generator)
    return newton(_gru, x, torch.zeros(2, 16), (A,), tolerance=1e-5).iterations


def _difference(length: int) -> float:
    """Largest difference of Newton's and the token-by-token solution in fp32, weights up to 0.5."""
    generator = torch.Generator().manual_seed(length)
    A = torch.randn(3, 16, generator=generator).clamp(-0.5, 0.5)
    x = 2 * torch.randn(2, length, 3, 16, generator=generator)
    parallel, exact = (paragru(x, A, backend=backend)[0] for backend in ("chunked", "reference"))
    return float((parallel - exact).abs().max())


class _Parity(nn.Module):
    """Nothing but the cell between an embedding and a linear map, its recurrent weights clipped or not."""

    def __init__(self, clip: float | None, width: int = 64):
        super().__init__()
        self.clip, self.embed, self.norm = clip, nn.Embedding(2, width), nn.RMSNorm(width)
        self.gates, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 2)
        self.A = nn.Parameter(torch.randn(3, width) * width**-0.5)

    def forward(self, bits: Tensor) -> Tensor:
        A = self.A
        if self.clip is not None:
            A = A + (A.clamp(-self.clip, self.clip) - A).detach()
        x = self.gates(self.norm(self.embed(bits))).unflatten(-1, (3, -1))
        return self.head(paragru(x, A, backend="reference")[0])


def _parity(clip: float | None, steps: int) -> dict[int, float]:
    """Train on the parity of all bits so far, of rows that grow to 40 bits; right answers at the lengths of TESTS."""
    torch.manual_seed(0)
    model = _Parity(clip)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        longest = 3 + int(37 * min(1.0, step / (0.8 * steps)))
        bits = torch.randint(2, (256, int(torch.randint(2, longest + 1, ()))))
        loss = F.cross_entropy(model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        rows = {n: torch.randint(2, (64, n)) for n in TESTS}
        return {n: float((model(b).argmax(-1) == b.cumsum(1) % 2).double().mean()) for n, b in rows.items()}


@register_reproduction(
    "pararnn",
    title="ParaRNN: Newton's method over the sequence",
    paper="Danieli et al. 2025, ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models (arXiv"
    " 2510.21450)",
    claim="A GRU with diagonal recurrent weights is solved by Newton's method in a number of steps that does not grow"
    " with the length, as long as these weights are small. One layer of it solves parity, with larger ones.",
    published="Three Newton steps are enough in training at 2048 tokens, weights clipped to 0.5; one layer solves"
    " parity (length 100), for which the clip is taken off.",
    setup="Newton steps to a residual of 1e-5 in fp32 at lengths 64, 512 and 4096, weights at ±0.5 and ±0.9, inputs"
    " N(0, 4). Parity: the cell alone, width 64, between an embedding and a linear map, 250 steps of 256 rows that grow"
    " from 3 to 40 bits, tested at 40, 100 and 400; share of right answers over all positions.",
    needs=("paragru",),
)
def run(experiment: Experiment) -> Outcome:
    steps = {clip: [_steps(n, clip) for n in LENGTHS] for clip in (0.5, 0.9)}
    free, clipped = (_parity(clip, 10 if experiment.quick else 250) for clip in (None, 0.5))
    bars = [
        Bar("Newton steps at 4096 tokens, weights ±0.5", steps[0.5][-1], at_most=4, published="3 in training"),
        Bar("Newton steps at 4096 tokens, weights ±0.9", steps[0.9][-1], at_most=6),
        Bar("more steps at 4096 tokens than at 64, weights ±0.5", steps[0.5][-1] - steps[0.5][0], at_most=1),
        Bar("difference from token by token there, in millionths", 1e6 * _difference(LENGTHS[-1]), at_most=10),
        Bar("parity of 400 bits, no clip", free[400], 0.99, published="100% at length 100"),
        Bar("parity of 400 bits, weights clipped to 0.5", clipped[400], at_most=0.6),
    ]
    curves = {
        label: [(float(n), value) for n, value in found.items()]
        for label, found in (("no clip", free), ("weights clipped to 0.5", clipped))
    }
    return Outcome(bars, curves, x="bits (trained with up to 40)", y="right answers on parity", log_x=True)
