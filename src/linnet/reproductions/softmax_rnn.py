"""Softmax attention as a recurrence: every Taylor order of the exponential adds to what linear attention can tell
apart."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, mean_accuracy, register_reproduction

ORDERS = (1, 2, 3)
HEADS = "num_heads=8, rope=False"
TAYLOR = {n: f"softmax_taylor({HEADS}, order={n}, normalizer='rms')" for n in ORDERS}
SUM = f"softmax_taylor({HEADS}, order=2)"
SOFTMAX = f"attention({HEADS})"


@register_reproduction(
    "softmax_rnn",
    title="Softmax attention as a recurrence: Taylor orders",
    paper="Mongaras & Larson 2025, On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective"
    " (arXiv 2507.23632)",
    claim="Softmax attention is a sum of recurrences, one for each power of the scores: with more of them, a recurrent"
    " model approaches it, and a norm of the output can take the place of the division.",
    published="Loss curves only: the loss falls towards that of softmax attention with every Taylor order, and a norm"
    " in place of the denominator matches it.",
    setup="Recall of 48 pairs (keys and values of 64 each, a pair in one token) by 16 questions: one layer of width 64"
    " with 8 heads of 8 channels, no MLP, no positions, 300 steps of 32 rows. Orders 1 to 3 with an RMSNorm of the"
    " output, order 2 also with the division.",
    needs=("attention", "softmax_taylor"),
)
def run(experiment: Experiment) -> Outcome:
    task = "recall(keys=64, values=64, queries=16, unique=True, separate=True)"
    cells = experiment.compare(
        "recall",
        task=task,
        mixers=[*TAYLOR.values(), SUM, SOFTMAX],
        seeds=1,
        layers=1,
        length=64,
        tests={"recall": (task, 64)},
        model={"mlp": "none"},
        batch_size=32,
        training={"steps": 300, "lr": 1e-2, "warmup_steps": 20, "weight_decay": 0.0},
    )
    reached = {n: mean_accuracy(cells, mixer, "recall") for n, mixer in TAYLOR.items()}
    softmax, divided = mean_accuracy(cells, SOFTMAX, "recall"), mean_accuracy(cells, SUM, "recall")
    bars = [
        Bar("softmax attention", softmax, 0.99, published="the limit"),
        Bar("gain of order 2 over order 1", reached[2] - reached[1], 0.1, published="more than 0"),
        # More than three standard errors of the 4,096 answers, and then less left than order 2 leaves.
        Bar("gain of order 3 over order 2", reached[3] - reached[2], 0.005, published="more than 0"),
        Bar(
            "what is left between order 3 and softmax attention", softmax - reached[3], at_most=0.01, published="closes"
        ),
        Bar("order 2, norm less division", reached[2] - divided, at_least=-0.05, published="the norm matches"),
    ]
    curves = {
        "Taylor orders, RMSNorm": [(float(n), value) for n, value in reached.items()],
        "softmax attention": [(float(n), softmax) for n in ORDERS],
    }
    tried = (
        "With 4 heads of 16 channels, order 1 reached 0.889 and order 2 1.000; order 3, whose state is six times as"
        " large there, did not end within four minutes of CPU time.",
    )
    return Outcome(bars, curves, x="highest order", y="recall", tried=tried)
