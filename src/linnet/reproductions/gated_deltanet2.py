"""Gated DeltaNet-2: erasing and writing with gates of their own."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, mean_accuracy, register_reproduction
from .deltanet import LINEAR, overwriting

SHAPE = "num_heads=2, head_dim=16, conv_size=0"
LABELS = {
    LINEAR: "linear attention",
    f"kda({SHAPE})": "kda",
    f"gated_deltanet2({SHAPE})": "gated_deltanet2",
}


@register_reproduction(
    "gated_deltanet2",
    title="Gated DeltaNet-2: separate gates to erase and to write",
    paper="Hatamizadeh, Choi & Kautz 2026, Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention (arXiv"
    " 2605.22791)",
    claim="A delta rule whose gates for erasing and for writing are separate overwrites what is stored under a key as"
    " well as one that ties them.",
    published="At 1.3B, Gated DeltaNet-2 against KDA: perplexity 15.90 and 16.81 on WikiText, S-NIAH-3 at 2k 89.8 and"
    " 63.2, MK-NIAH-1 at 4k 37.8 and 28.0. Nothing for this task.",
    setup="The overwriting task of `deltanet` with 200 steps of 64 rows: 32 writes of a value (of 16) to one of 12"
    " keys, then 8 questions for the latest value. One layer of width 64, K = V = 16, no convolution, no MLP.",
    needs=("gated_deltanet2", "kda", "linear_attention"),
)
def run(experiment: Experiment) -> Outcome:
    cells, curves = overwriting(experiment, LABELS, steps=200)
    linear, tied, separate = (mean_accuracy(cells, mixer, "32") for mixer in LABELS)
    bars = [
        Bar("recall after 32 writes, separate gates", separate, 0.99, published="as KDA or better"),
        Bar("separate gates less tied ones (KDA)", separate - tied, -0.01, published="at least 0"),
        Bar("recall after 32 writes, linear attention", linear, at_most=0.5),
    ]
    return Outcome(bars, curves, x="writes (trained with 32)", y="recall of the latest value")
