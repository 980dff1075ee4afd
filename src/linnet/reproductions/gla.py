"""Gated linear attention: forgetting must depend on the data."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, by_test, mean_accuracy, register_reproduction

SHAPE = "num_heads=2, expand_k=0.5, expand_v=1.0"
OPEN = "linear_attention(num_heads=2, expand_k=0.5, expand_v=1.0, feature_map='identity', normalize=False)"
FIXED = f"retnet({SHAPE}, rope=False)"
SCALAR = f"simple_gla({SHAPE}, gate_logit_normalizer=1.0)"
VECTOR = f"gla({SHAPE}, gate_logit_normalizer=1.0)"
SLOW = f"gla({SHAPE}, gate_logit_normalizer=16.0)"
LABELS = {
    OPEN: "no decay",
    FIXED: "constant decay (RetNet)",
    SCALAR: "data-dependent, one a head",
    VECTOR: "data-dependent, one a key channel (GLA)",
    SLOW: "GLA with tau = 16, as published",
}
FLIPFLOP = {"layers": 1, "sizes": [32], "model": {"mlp_hidden": 64, "norm_eps": 1e-5}}
RECIPE = {"steps": 250, "lr": 1e-2, "warmup_steps": 20, "beta2": 0.999}
TESTS = {"64": ("flipflop", 64), "256, far": ("flipflop(p_write=0.02, min_distance=64)", 256)}
PUBLISHED = "training perplexity, 340M / 7B tokens"


@register_reproduction(
    "gla",
    title="GLA: data-dependent forgetting",
    paper="Yang et al. 2023, Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635)",
    claim="A linear recurrence whose decay depends on the data models sequences that one with a constant decay, or"
    " none, does not.",
    published="Gate ablation, 340M parameters, 7B tokens, training perplexity: no gate 23.21, constant decay 16.55,"
    " data-dependent scalar 15.56, GLA 14.77.",
    setup="Flip-flop: remember the last written bit among distractors (a tenth of the tokens write, a tenth read). One"
    " layer of width 32 with 2 heads of K = 8, V = 16, rows of 64 tokens, 250 steps of 32 rows, two initialisations;"
    " accuracy at reads on 64 tokens, and on 256 tokens with rare writes at reads at least 64 tokens after the write.",
    needs=("gla", "linear_attention", "retnet", "simple_gla"),
)
def run(experiment: Experiment) -> Outcome:
    cells = experiment.compare(
        "flipflop", task="flipflop", mixers=list(LABELS), length=64, tests=TESTS, training=RECIPE, **FLIPFLOP
    )
    figures = {"23.21": OPEN, "16.55": FIXED, "15.56": SCALAR, "14.77": VECTOR}
    bars = []
    for published, mixer in figures.items():
        gated = mixer in (SCALAR, VECTOR)
        bars.append(
            Bar(
                f"accuracy at 64 tokens, {LABELS[mixer]}",
                mean_accuracy(cells, mixer, "64"),
                at_least=0.99 if gated else None,
                at_most=None if gated else 0.95,
                published=f"{PUBLISHED}: {published}",
            )
        )
    for mixer in (VECTOR, SLOW):
        far = mean_accuracy(cells, mixer, "256, far")
        bars.append(Bar(f"accuracy at 256 tokens, 64 or more after the write, {LABELS[mixer]}", far, at_least=0.9))
    return Outcome(
        bars, by_test(cells, LABELS, {"64": 64, "256, far": 256}), x="tokens of a row", y="accuracy at reads"
    )
