"""Kimi Linear: a forget gate for every key channel learns to overwrite at least as fast."""

from __future__ import annotations

from statistics import fmean

from .base import Bar, Experiment, Outcome, by_test, register_reproduction

SHAPE = "num_heads=2, head_dim=128"  # and a convolution of four taps, as published
KDA, GDN = f"kda({SHAPE})", f"gated_deltanet({SHAPE}, expand_v=1.0)"
LABELS = {KDA: "kda", GDN: "gated_deltanet"}


@register_reproduction(
    "kimi_linear",
    title="Kimi Linear: a gate for every channel",
    paper="Kimi Team 2025, Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692)",
    claim="With a forget gate for every key channel the gated delta rule learns recall at least as fast as with one"
    " for a head.",
    published="Palindrome, MQAR and stack, 2 layers, 256 to 2,048 tokens: KDA at least as accurate as Gated DeltaNet at"
    " all lengths, and faster on palindrome and MQAR (curves only).",
    setup="The overwriting task of `deltanet`, stopped early, after 100 steps of 64 rows, mean of two"
    " initialisations: 32 writes of a value (of 16) to one of 12 keys, 8 questions. One layer of width 64 without MLP,"
    " its two heads of K = V = 128 with a convolution of four taps as published. The hybrid of the paper, three such"
    " layers to one of attention, is not tested.",
    needs=("gated_deltanet", "kda"),
)
def run(experiment: Experiment) -> Outcome:
    lengths = {"16": 24, "32": 40, "64": 72}
    cells = experiment.compare(
        "overwrite",
        task="recall",
        mixers=list(LABELS),
        seeds=2,
        layers=1,
        length=40,
        tests={name: ("recall", length) for name, length in lengths.items()},
        model={"mlp": "none"},
        batch_size=64,
        training={"steps": 100, "lr": 5e-3, "warmup_steps": 20, "evaluate_every": 100},
    )
    channel, head = (sorted(c.scores["32"]["answers"] for c in cells if c.mixer == mixer) for mixer in LABELS)
    bars = [
        Bar(
            "recall after 100 steps, a gate for every channel",
            fmean(channel),
            0.95,
            published="at least that of Gated DeltaNet",
        ),
        Bar("less that with a gate for a head", fmean(channel) - fmean(head), -0.01, published="at least 0"),
        Bar("the worst initialisation, a gate for every channel", channel[0]),
        Bar("the worst initialisation, a gate for a head", head[0]),
    ]
    places = {name: float(name) for name in lengths}
    tried = (
        "In an earlier run of three initialisations, which took twice the time that there is for one, a gate for every"
        " channel was ahead at each: medians of 0.61 and 0.38. The bar of 0.95 was set for the smaller heads below and"
        " was not moved; more than 100 steps of these were not tried.",
        "Heads of 16 channels without a convolution missed both bars: after 100 steps the medians of five"
        " initialisations were 0.76 with a gate for every channel and 0.997 with one for a head; 300 steps solve the"
        " task with either.",
        "What delays it there is the released initialisation, whose channels forget up to 1.6 nats a token: with the"
        " bounded gate of later models (`gate_bound=5.0`), which begins near open, two initialisations reached 1.00 and"
        " 0.94 in 100 steps.",
    )
    curves = by_test(cells, LABELS, places)
    return Outcome(bars, curves, x="writes (trained with 32)", y="recall of the latest value", tried=tried)
