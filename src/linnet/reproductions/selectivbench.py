"""SelectivBench: gates and fast forgetting help to follow a hidden state."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, by_test, mean_accuracy, register_reproduction

SHAPE = "num_heads=4, expand_k=1.0, conv_size=4"
GATED = f"simple_gla({SHAPE}, gate_logit_normalizer=1.0)"
OPEN = f"simple_gla({SHAPE}, gate_logit_normalizer=1e9)"  # sigmoid(.)^(1/tau) is 1: nothing is forgotten
SOFTMAX = "attention(num_heads=4)"
LABELS = {
    GATED: "linear attention, a gate per head",
    OPEN: "the same without a gate",
    SOFTMAX: "softmax attention, no convolution",
}


@register_reproduction(
    "selectivbench",
    title="SelectivBench: gating against none",
    paper="Bouhadjar et al. 2026, Dissecting Linear Recurrent Models (arXiv 2601.12598)",
    claim="Gating and rapid forgetting make linear recurrent models better at following a hidden state between blanks.",
    published="Abstract only (no table was at hand): gating and rapid forgetting facilitate recall; softmax attention"
    " remains dominant overall at 8 layers and 200,000 sequences.",
    setup="Task 1 in small: one grammar of 10 letters (101 classes), 64 elements with one blank after each, two layers"
    " of width 64 with convolutions of 4 taps in the linear ones, 200 steps of 32 rows, fresh test rows. A predictor"
    " that sees only the last m symbols reaches .487, .779, .913 for m = 2, 3, 4. How fast gates forget is not varied.",
    needs=("attention", "simple_gla"),
    budgets=("cpu", "gpu"),
)
def run(experiment: Experiment) -> Outcome:
    gpu = experiment.budget == "gpu"
    letters, elements, size, layers = (20, 200, 256, 8) if gpu else (10, 64, 64, 2)
    gaps = {"1": 1, "2": 2, "4": 4} if gpu else {"1": 1, "2": 2}
    spec = f"selectivbench(letters={letters}, gap='{{}}')"
    cells = experiment.compare(
        "complexity",
        task=spec.format(1),
        mixers=list(LABELS),
        sizes=[size],
        layers=layers,
        seeds=1,
        length=elements,
        tests={gap: (spec.format(gap), elements) for gap in gaps},
        batch_size=64 if gpu else 32,
        training={"steps": 3125 if gpu else 200, "lr": 2e-3, "weight_decay": 0.0},
        test_rows=200,
    )
    reached = {mixer: mean_accuracy(cells, mixer, "1") for mixer in LABELS}
    bars = [
        Bar("accuracy with a gate", reached[GATED], at_least=0.79, published="gating facilitates recall"),
        Bar("with a gate less without", reached[GATED] - reached[OPEN], at_least=0.03, published="more than 0"),
        Bar("accuracy without a gate", reached[OPEN], published="below the gated models"),
        Bar("accuracy of softmax attention", reached[SOFTMAX], published="dominant overall, at full size"),
    ]
    curves = by_test(cells, LABELS, {name: float(gap) for name, gap in gaps.items()})
    return Outcome(bars, curves, x="blanks after each element (trained with 1)", y="accuracy of an element")
