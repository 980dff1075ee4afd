"""TFLA: the mLSTM with a sigmoid input gate needs no normaliser and behaves like the one with an exponential gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from linnet.ops import decay, mlstm

from .base import Bar, Experiment, Outcome, mean_accuracy, register_reproduction
from .gla import FLIPFLOP, RECIPE, TESTS

FORGET = 3.0
GATES = (-14.0, -12.0, -10.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -2.0, 0.0)
EXP, SIGMOID = "mlstm(num_heads=2, gate='exp')", "mlstm(num_heads=2, gate='sigmoid')"


def gains(eps: float, length: int = 256) -> dict[str, list[float]]:
    """max|h| / max|v| after the RMSNorm, for each input gate in GATES; forget gate FORGET, random q, k, v."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, 4, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, length, 4, 128, generator=generator, dtype=torch.float64)
    f = torch.full((1, length, 4), FORGET, dtype=torch.float64)
    found: dict[str, list[float]] = {"exponential gate": [], "sigmoid gate": []}
    for gate in GATES:
        i = torch.full_like(f, gate)
        outputs = mlstm(q, k, v, i, f, eps=1e-6)[0], decay(q, k, v, F.logsigmoid(f), w=torch.sigmoid(i))[0]
        for gain, h in zip(found.values(), outputs, strict=True):
            normed = F.rms_norm(h, (h.shape[-1],), eps=eps)
            gain.append(float(normed.abs().max() / v.abs().max()))
    return found


def half_gain(gain: list[float]) -> float:
    """The input gate at which half of the largest gain is reached, by interpolation."""
    half = max(gain) / 2
    for (a, low), (b, high) in zip(zip(GATES, gain, strict=True), zip(GATES[1:], gain[1:], strict=True), strict=False):
        if low < half <= high:
            return a + (half - low) / (high - low) * (b - a)
    return math.nan


def expected_half_gain(eps: float) -> float:
    """The input gate of half the gain in theory: a norm halves what is sqrt(eps / 3) in size, and of q, k, v with unit
    variance a memory that keeps gamma = sigmoid(FORGET) a token gives exp(i) / sqrt(1 - gamma^2)."""
    gamma = 1 / (1 + math.exp(-FORGET))
    return math.log(eps / 3) / 2 + math.log(1 - gamma**2) / 2


@register_reproduction(
    "tfla",
    title="TFLA: exponential and sigmoid input gates",
    paper="Beck et al. 2025, Tiled Flash Linear Attention (arXiv 2503.14376)",
    claim="With a norm behind it, the mLSTM with a sigmoid input gate and no normaliser transfers its input like the"
    " one with an exponential gate, and learns as well.",
    published="Transfer behaviour: the gain over the gates is the same after the norm, whose epsilon shifts the"
    " threshold. Validation perplexity at 160M: exp 21.03, sigmoid 21.06; at 1.4B 13.20 and 13.22.",
    setup="Transfer: random q, k, v of 256 tokens, K = 64, V = 128, forget gate 3, constant input gate from -14 to 0;"
    " largest output after an RMSNorm over the largest value. Learning: flip-flop as in `gla`, both gates, two"
    " initialisations.",
    needs=("mlstm",),
)
def run(experiment: Experiment) -> Outcome:
    fine, coarse = gains(1e-6), gains(1e-2)
    exp, sigmoid = fine.values()
    apart = max(abs(a - b) for found in (fine, coarse) for a, b in zip(*found.values(), strict=True))
    cells = experiment.compare(
        "flipflop", task="flipflop", mixers=[EXP, SIGMOID], length=64, tests=TESTS, training=RECIPE, **FLIPFLOP
    )
    learned = [mean_accuracy(cells, mixer, "64") for mixer in (EXP, SIGMOID)]
    shift = half_gain(list(coarse["sigmoid gate"])) - half_gain(sigmoid)
    bars = [
        Bar("largest distance between the two gains after the norm", apart, at_most=0.02, published="none visible"),
        Bar(
            "gate at half of the gain, norm epsilon 1e-6, less ln √(eps (1 - γ²) / 3) = -8.65",
            half_gain(exp) - expected_half_gain(1e-6),
            at_least=-0.3,
            at_most=0.3,
            published="near ln √eps",
        ),
        Bar(
            "shift of the threshold, in ln √eps, when the epsilon grows from 1e-6 to 1e-2",
            shift / math.log(1e2),
            at_least=0.9,
            at_most=1.1,
            published="the epsilon shifts the threshold",
        ),
        Bar("flip-flop, exponential gate", learned[0], at_least=0.99, published="perplexity 21.03 at 160M"),
        Bar("flip-flop, sigmoid gate", learned[1], at_least=0.99, published="perplexity 21.06 at 160M"),
    ]
    curves = {
        f"{name}, norm epsilon {eps}": list(zip(GATES, gain, strict=True))
        for eps, found in (("1e-6", fine), ("1e-2", coarse))
        for name, gain in found.items()
    }
    return Outcome(bars, curves, x="input gate, before its nonlinearity", y="gain after the norm")
