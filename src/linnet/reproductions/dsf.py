"""The dynamical systems framework: linear attention lacks state, not expressivity."""

from __future__ import annotations

from itertools import pairwise

from .base import Bar, Experiment, Outcome, mean_accuracy, register_reproduction

WIDTH = 64
SIZES = (4, 8, 16, 32)
LINEAR = {n: f"linear_attention(num_heads=1, expand_k={n / WIDTH})" for n in SIZES}
GATED = {n: f"simple_gla(num_heads=1, expand_k={n / WIDTH}, gate_logit_normalizer=16.0)" for n in SIZES}
SOFTMAX = "attention(num_heads=1, rope=False)"


@register_reproduction(
    "dsf",
    title="DSF: the size of the state",
    paper="Sieber et al. 2024, Understanding the differences in Foundation Models: Attention, State Space Models, and"
    " Recurrent Neural Networks (arXiv 2405.15731)",
    claim="Written as dynamical systems, linear and softmax attention differ in the size of their state, and linear"
    " attention approaches softmax attention as its state grows; a better normalisation closes part of the gap.",
    published="Figures only (MQAR, width 512): linear attention approaches softmax attention as the state dimension"
    " grows from 32 to 256; at 64 pairs and n = 128, normalised attention is clearly above linear attention and close"
    " to SSD.",
    setup="Recall of 16 pairs (keys and values of 64 each, a pair in one token) by 16 questions, one layer of width 64"
    " without MLP or positions, one head, 500 steps of 64 rows. n is the width of queries and keys. Normalised"
    " attention is stood for by gated linear attention with an RMSNorm in place of the division by the sum of the"
    " weights.",
    needs=("attention", "linear_attention", "simple_gla"),
)
def run(experiment: Experiment) -> Outcome:
    task = "recall(keys=64, values=64, queries=16, unique=True, separate=True)"
    cells = experiment.compare(
        "recall",
        task=task,
        mixers=[*LINEAR.values(), *GATED.values(), SOFTMAX],
        sizes=[WIDTH],
        seeds=1,
        layers=1,
        length=32,
        tests={"recall": (task, 32)},
        model={"mlp": "none"},
        batch_size=64,
        training={"steps": 500, "lr": 1e-2, "warmup_steps": 20, "weight_decay": 0.0},
    )
    linear = {n: mean_accuracy(cells, mixer, "recall") for n, mixer in LINEAR.items()}
    gated = {n: mean_accuracy(cells, mixer, "recall") for n, mixer in GATED.items()}
    softmax = mean_accuracy(cells, SOFTMAX, "recall")
    steps = [linear[b] - linear[a] for a, b in pairwise(SIZES)]
    bars = [
        Bar("softmax attention", softmax, at_least=0.99, published="solves it at every width"),
        Bar("linear attention, n = 4", linear[4], at_most=0.6, published="far below softmax attention"),
        Bar("linear attention, n = 32", linear[32], at_least=0.97, published="approaches softmax attention"),
        Bar("least gain of linear attention when n doubles", min(steps), at_least=0.0, published="grows with n"),
        Bar(
            "what RMSNorm and a gate add to linear attention at n = 8",
            gated[8] - linear[8],
            at_least=0.1,
            published="normalised attention clearly above linear attention",
        ),
    ]
    curves = {
        "softmax attention": [(float(n), softmax) for n in SIZES],
        "linear attention": [(float(n), value) for n, value in linear.items()],
        "gated, normalised": [(float(n), value) for n, value in gated.items()],
    }
    return Outcome(bars, curves, x="width n of queries and keys", y="recall", log_x=True)
