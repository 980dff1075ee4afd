"""DeltaProduct on S5: four reflections a token track the permutations of five elements, three do not."""

from __future__ import annotations

from statistics import median

from linnet.training import Cell

from .base import Bar, Experiment, Outcome, by_test, register_reproduction

REFLECTIONS = (4, 3, 2)
LABELS = {f"deltaproduct(num_heads=8, head_dim=32, conv_size=0, num_steps={n})": n for n in REFLECTIONS}
TASK = "group(group='S5', generators='two', start=True)"
LENGTHS = (8, 16, 32)
TESTS = {str(n): n for n in (16, 32, 48, 64, 128, 256)}


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
    setup="One layer of width 128, 8 heads of K = V = 32, no convolution, no gate, a start token, as in the paper's"
    " code. Its elements are drawn from the whole group; these are the two generators, a swap (one reflection) and the"
    " rotation of all five (four). Rows of 8, 16 and 32 tokens in turn, 1,500 steps of 1,024 rows, a peak learning rate"
    " of 0.001, three initialisations, of which the median counts. Share of rows in which every product is right.",
    needs=("deltaproduct",),
    budgets=("gpu",),
)
def run(experiment: Experiment) -> Outcome:
    cells = experiment.compare(
        "s5",
        task=TASK,
        mixers=list(LABELS),
        sizes=[128],
        layers=1,
        seeds=3,
        length=list(LENGTHS),
        tests={name: (TASK, n) for name, n in TESTS.items()},
        batch_size=1024,
        training={"steps": 1500, "lr": 1e-3, "weight_decay": 1e-6, "beta2": 0.999},
    )

    def right(reflections: int, test: str) -> float:
        return median(rows(cell, test) for cell in cells if LABELS[cell.mixer] == reflections)

    bars = [
        Bar("4 reflections, 32 tokens, the longest trained with", right(4, "32"), 0.95, published="1.0"),
        Bar("4 reflections, 48 tokens", right(4, "48"), 0.9, published="1.0 at 1.5 times the length"),
        Bar("4 reflections, 128 tokens", right(4, "128"), published="about 0 at 4 times the length"),
        Bar("3 reflections, 64 tokens", right(3, "64"), at_most=0.3, published="0 at half the length"),
        Bar("2 reflections, 64 tokens", right(2, "64"), at_most=0.05, published="0 almost at once"),
    ]
    curves = by_test(cells, {mixer: f"{n} reflections" for mixer, n in LABELS.items()}, TESTS, "rows")
    tried = (
        "Elements of the whole group, 4,900 steps of 2,048 rows of 128 tokens as in the paper, and 2,500 steps of"
        " shorter rows at three learning rates: the loss stays where only the first products of a row are right.",
    )
    return Outcome(bars, curves, x="tokens (trained with up to 32)", y="rows without an error", log_x=True, tried=tried)


def rows(cell: Cell, test: str) -> float:
    """Share of rows in which every product is right."""
    return cell.scores[test]["rows"]
