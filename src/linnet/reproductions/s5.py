"""DeltaProduct on S5: four reflections a token track the permutations of five elements, three do not."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, by_test, register_reproduction

REFLECTIONS = (4, 3, 2)
LABELS = {f"deltaproduct(num_heads=8, head_dim=32, conv_size=0, num_steps={n})": n for n in REFLECTIONS}
TASK = "group(group='S5', start=True)"
LENGTH = 128
TESTS = {str(n): n for n in (32, 64, 128, 200, 256, 512)}


@register_reproduction(
    "s5",
    title="DeltaProduct: four reflections for S5",
    paper="Siems et al. 2025, DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products"
    " (arXiv 2502.10297)",
    claim="One layer with four Householder reflections a token tracks the group S5 beyond the length it was trained"
    " on; with three it does not.",
    published="Figure: trained on 128 tokens, 4 reflections have every product right up to about 200 tokens, half of"
    " the rows near 330 and none near 500; with 3 the rows right fall to none within 40 tokens, with 1 and 2 almost at"
    " once.",
    setup="As in the paper's code: one layer of width 128, 8 heads of K = V = 32, no convolution, no gate, a start"
    " token, rows of 128 tokens, 4,900 steps of 2,048 rows, a peak learning rate of 0.001, bf16. Share of rows in which"
    " every product up to a length is right; one initialisation.",
    needs=("deltaproduct",),
    budgets=("gpu",),
    recorded=False,
)
def run(experiment: Experiment) -> Outcome:
    cells = experiment.compare(
        "s5",
        task=TASK,
        mixers=list(LABELS),
        sizes=[128],
        layers=1,
        seeds=1,
        length=LENGTH,
        tests={name: (TASK, n) for name, n in TESTS.items()},
        batch_size=2048,
        training={"steps": 4900, "lr": 1e-3, "weight_decay": 1e-6, "beta2": 0.999, "precision": "bf16"},
    )
    right = {LABELS[cell.mixer]: {test: score["rows"] for test, score in cell.scores.items()} for cell in cells}
    bars = [
        Bar("4 reflections, 128 tokens", right[4]["128"], 0.95, published="1.0"),
        Bar("4 reflections, 200 tokens", right[4]["200"], 0.9, published="1.0"),
        Bar("4 reflections, 512 tokens", right[4]["512"], published="about 0"),
        Bar("3 reflections, 64 tokens", right[3]["64"], at_most=0.05, published="0 from about 40 tokens on"),
        Bar("2 reflections, 64 tokens", right[2]["64"], at_most=0.05, published="0"),
    ]
    curves = by_test(cells, {mixer: f"{n} reflections" for mixer, n in LABELS.items()}, TESTS, "rows")
    return Outcome(bars, curves, x="tokens (trained with 128)", y="rows without an error", log_x=True)
