"""Olmo Hybrid: attention and a delta rule with negative eigenvalues do together what neither does alone."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, by_test, mean_accuracy, register_reproduction

FULL = "attention(num_heads=2, head_dim=16, rope=False)"
DELTA = "deltanet(num_heads=2, head_dim=16, conv_size=0, neg_eigval={})"
HYBRID, POSITIVE, PURE = f"{FULL} + {DELTA.format(True)}", f"{FULL} + {DELTA.format(False)}", f"{FULL} + {FULL}"
LABELS = {
    HYBRID: "attention, DeltaNet with eigenvalues in [-1, 1]",
    POSITIVE: "attention, DeltaNet with eigenvalues in [0, 1]",
    PURE: "attention, attention",
}
TASK, HEAD = "state_recall", 19  # tokens in front of the swaps: 16 bits and 3 pointers
SWAPS = (16, 32)


@register_reproduction(
    "olmo_hybrid",
    title="Olmo Hybrid: recall by a tracked pointer",
    paper="Merrill et al. 2026, Olmo Hybrid: From Theory to Practice and Back (arXiv 2604.03444)",
    claim="A hybrid of attention and a linear recurrence with negative eigenvalues solves recall by a tracked pointer,"
    " which neither attention nor a hybrid without negative eigenvalues does.",
    published="State-based recall with 4, 8, 16, 32, 64 and 128 bits, 4 layers: transformer .82 .75 .74 .74 .63 .54,"
    " hybrid with eigenvalues in [0, 1] .86 .99 .94 .69 .61 .57, in [-1, 1] 1.0 everywhere.",
    setup="16 bits, 3 pointers to them, then swaps of two pointers; after each the bit under the first pointer. Two"
    " blocks of width 64 with 2 heads of 16 channels, 800 steps of 64 rows with 2, 4, 8 and 16 swaps in turn; tested"
    " with 16 and 32, accuracy in the last tenth of the row. Majority of the three bits: about 0.7.",
    needs=("attention", "deltanet"),
)
def run(experiment: Experiment) -> Outcome:
    cells = experiment.compare(
        "pointers",
        task=TASK,
        mixers=list(LABELS),
        seeds=1,
        length=[HEAD + n for n in (2, 4, 8, 16)],
        tests={str(n): (TASK, HEAD + n) for n in SWAPS},
        batch_size=64,
        training={"steps": 800, "lr": 5e-3, "warmup_steps": 80, "weight_decay": 0.0},
    )
    hybrid, positive, pure = (mean_accuracy(cells, mixer, "16", "late") for mixer in LABELS)
    bars = [
        Bar("16 swaps, hybrid with eigenvalues in [-1, 1]", hybrid, 0.98, published="1.0 at 16 bits"),
        Bar("16 swaps, hybrid with eigenvalues in [0, 1]", positive, at_most=0.85, published=".94 at 16 bits"),
        Bar("16 swaps, attention alone", pure, at_most=0.85, published=".74 at 16 bits"),
    ]
    curves = by_test(cells, LABELS, {str(n): float(n) for n in SWAPS}, "late")
    return Outcome(bars, curves, x="swaps (trained with up to 16)", y="accuracy in the last tenth")
