"""MQAR in its hardest setting: the delta rule recalls 64 pairs over 512 tokens."""

from __future__ import annotations

from linnet.training import Cell

from .base import Bar, Experiment, Outcome, mean_accuracy, register_reproduction

FIRST = "mingru(conv_size=4)"  # joins a value to its key, alike for every mixer
DELTA, GATED, CHANNEL = (
    f"{FIRST} + {name}(num_heads=2, head_dim=64, conv_size=0{more})"
    for name, more in (("deltanet", ""), ("gated_deltanet", ", expand_v=1.0"), ("kda", ""))
)
GLA = f"{FIRST} + gla(num_heads=2, expand_k=1.0)"
LINEAR = f"{FIRST} + linear_attention(num_heads=2)"
LABELS = {DELTA: "deltanet", GATED: "gated_deltanet", GLA: "gla", LINEAR: "linear attention"}


def recall(experiment: Experiment, mixers: list[str]) -> list[Cell]:
    """Train and test on 64 pairs in 512 tokens."""
    task = "mqar(pairs=64, vocab_size=1024, fill=False)"
    return experiment.compare(
        "mqar",
        task=task,
        mixers=mixers,
        sizes=[128],
        seeds=1,
        length=512,
        tests={"mqar": (task, 512)},
        batch_size=128,
        training={"steps": 3000, "lr": 3e-3, "evaluate_every": 100},
    )


def progress(cells: list[Cell], labels: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Curves of the accuracy in training."""
    return {labels[cell.mixer]: [(step, value) for step, value in cell.curve] for cell in cells}


@register_reproduction(
    "mqar",
    title="DeltaNet: 64 pairs in 512 tokens",
    paper="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv"
    " 2406.06484), on a task of Arora et al. 2023 (arXiv 2312.04927)",
    claim="The delta rule recalls 64 pairs of a key and a value over 512 tokens, the hardest setting of multi-query"
    " associative recall, with a state in which linear attention and GLA blur them.",
    published="Curves: DeltaNet solves length 512 with 64 pairs at every width, Mamba and GLA only at larger ones.",
    setup="64 pairs, then the keys in any order among blanks, rows of 512 tokens over 1,024 ids. Two layers of width"
    " 128: a minGRU with a convolution of four taps, which can join a value to the key before it, then the mixer with"
    " 2 heads of K = V = 64 and no convolution. 3,000 steps of 128 rows.",
    needs=("deltanet", "gated_deltanet", "gla", "linear_attention", "mingru"),
    budgets=("gpu",),
)
def run(experiment: Experiment) -> Outcome:
    cells = recall(experiment, list(LABELS))
    bars = []
    for mixer, label in LABELS.items():
        low, published = (0.99, "solved") if mixer in (DELTA, GATED) else (None, "")
        bars.append(Bar(f"recall of 64 pairs, {label}", mean_accuracy(cells, mixer, "mqar"), low, published=published))
    return Outcome(bars, progress(cells, LABELS), x="steps of 128 rows", y="recall")
