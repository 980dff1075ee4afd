"""DeltaNet: a memory that can be overwritten."""

from __future__ import annotations

from collections.abc import Mapping

from linnet.training import Cell

from .base import Bar, Experiment, Outcome, by_test, mean_accuracy, register_reproduction

HEAD = "num_heads=2, head_dim=16, conv_size=0"
LINEAR = "linear_attention(num_heads=2, expand_k=0.5, expand_v=0.5, feature_map='silu', normalize=False)"
GATE = "gla(num_heads=2, expand_k=0.5, expand_v=0.5)"
DELTA = f"deltanet({HEAD})"
FAMILY = {
    "gated_deltanet": f"gated_deltanet({HEAD}, expand_v=1.0)",
    "kda": f"kda({HEAD})",
}


def overwriting(
    experiment: Experiment, labels: Mapping[str, str], steps: int
) -> tuple[list[Cell], dict[str, list[tuple[float, float]]]]:
    """Recall of the latest of several values under a key, learned with 32 writes and tested with 16, 32 and 64: the
    cells and, by label, the curves over the writes."""
    lengths = {"16": 24, "32": 40, "64": 72}
    cells = experiment.compare(
        "overwrite",
        task="recall",
        mixers=list(labels),
        seeds=1,
        layers=1,
        length=40,
        tests={name: ("recall", length) for name, length in lengths.items()},
        model={"mlp": "none"},
        batch_size=64,
        training={"steps": steps, "lr": 5e-3},
    )
    return cells, by_test(cells, labels, {name: float(name) for name in lengths})


@register_reproduction(
    "deltanet",
    title="DeltaNet: overwriting what is stored under a key",
    paper="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv"
    " 2406.06484)",
    claim="The delta rule replaces the value stored under a key where linear attention adds to it, so it recalls what"
    " linear attention blurs.",
    published="MAD, accuracy in %: in-context recall DeltaNet 100, linear attention 91.0, GLA 80.8; noisy recall 100,"
    " 75.6, 81.6. DeltaNet solves the hardest MQAR setting without convolution.",
    setup="32 writes of a value (of 16) to one of 12 keys, so that keys are overwritten, then 8 questions for the"
    " latest value. One layer of width 64 without MLP, 2 heads of K = V = 16, no convolution, 300 steps of 64 rows.",
    needs=("deltanet", "gla", "linear_attention"),
)
def run(experiment: Experiment) -> Outcome:
    labels = {LINEAR: "linear attention", DELTA: "deltanet", GATE: "gla"}
    labels |= {spec: name for name, spec in FAMILY.items() if experiment.has(name)}
    cells, curves = overwriting(experiment, labels, steps=300)
    scale = "MAD in-context recall"
    known = {LINEAR: f"{scale} 91.0 %", DELTA: f"{scale} 100 %", GATE: f"{scale} 80.8 %"}
    bars = []
    for mixer, label in labels.items():
        low, high = (None, 0.5) if mixer == LINEAR else (None, None) if mixer == GATE else (0.99, None)
        reached = mean_accuracy(cells, mixer, "32")
        bars.append(Bar(f"recall after 32 writes, {label}", reached, low, high, published=known.get(mixer, "")))
    return Outcome(bars, curves, x="writes (trained with 32)", y="recall of the latest value")
