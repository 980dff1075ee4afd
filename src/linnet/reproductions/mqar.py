"""Multi-query associative recall: how many pairs a state of one size keeps apart."""

from __future__ import annotations

from typing import Any

from linnet.training import Cell

from .base import Bar, Experiment, Outcome, mean_accuracy, register_reproduction

SOLVED = ("deltanet", "gated_deltanet")
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "vocab": 256,
        "width": 64,
        "lengths": [16, 32, 64],
        "batch_size": 64,
        "training": {"steps": 400, "evaluate_every": 50},
    },
    "gpu": {
        "vocab": 8192,
        "width": 128,
        "lengths": [64, 128, 256, 512],
        "batch_size": 64,
        "training": {"steps": 2000, "evaluate_every": 100, "precision": "bf16"},
    },
}


def labels(width: int) -> dict[str, str]:
    """The mixers at one state of 2 heads with K = V = width / 2, all with a convolution of four taps."""
    gla = "gla(num_heads=2, expand_k=1.0, conv_size=4"
    return {
        "deltanet(num_heads=2)": "deltanet",
        f"gated_deltanet(num_heads=2, head_dim={width // 2}, expand_v=1.0)": "gated_deltanet",
        f"kda(num_heads=2, head_dim={width // 2})": "kda",
        f"{gla})": "gla",
        f"{gla}, gate_logit_normalizer=1e9)": "linear attention",  # the gate, sigmoid(.)^(1/1e9), stays open
    }


def progress(cells: list[Cell], names: dict[str, str], chance: float) -> dict[str, list[tuple[float, float]]]:
    """Curves of the recall during training, from a guess on."""
    return {names[cell.mixer]: [(0, chance), *((step, value) for step, value in cell.curve)] for cell in cells}


@register_reproduction(
    "mqar",
    title="DeltaNet: 64 pairs in 512 tokens",
    paper="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv"
    " 2406.06484), on a task of Arora et al. 2023 (arXiv 2312.04927)",
    claim="The delta rule recalls 64 pairs of a key and a value over 512 tokens, the hardest setting of multi-query"
    " associative recall.",
    published="Curves: DeltaNet solves 64 pairs in 512 tokens at every width from 64, GLA and Mamba only at larger"
    " ones.",
    setup="Pairs, then every key again at power-law distances; two layers without MLP, 2 heads, a state of one size for"
    " all. As in the code of the task's authors, the head shares the weight of the embedding, weights begin at a"
    " standard deviation of 0.02, weight decay is 0.1 and training rows of several lengths take turns, a pair to 8"
    " tokens: 64 to 512 tokens over 8,192 ids, width 128, 2,000 steps of 64 rows on a GPU; 16 to 64 tokens over 256"
    " ids, width 64, 400 steps on a CPU. Tested on the longest.",
    needs=("deltanet", "gated_deltanet", "gla", "kda"),
    budgets=("cpu", "gpu"),
)
def run(experiment: Experiment) -> Outcome:
    size = BUDGETS[experiment.budget]
    task, longest = f"mqar(tokens_per_pair=8, vocab_size={size['vocab']}, fill=False)", size["lengths"][-1]
    names = labels(size["width"])
    cells = experiment.compare(
        "mqar",
        task=task,
        mixers=list(names),
        sizes=[size["width"]],
        seeds=1,
        length=size["lengths"],
        tests={"mqar": (task, longest)},
        batch_size=size["batch_size"],
        model={"mlp": "none", "tie_embeddings": True, "init_std": 0.02},
        training={"lr": 3e-3, "weight_decay": 0.1, **size["training"]},
    )
    bars = []
    for mixer, name in names.items():
        low, published = (0.99, "solved") if name in SOLVED else (None, "")
        reached = mean_accuracy(cells, mixer, "mqar")
        bars.append(Bar(f"recall of {longest // 8} pairs, {name}", reached, low, published=published))
    return Outcome(bars, progress(cells, names, 2 / size["vocab"]), x="optimiser step", y="recall")
