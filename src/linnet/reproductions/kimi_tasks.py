"""Kimi Linear on its own synthetic tasks: palindromes, recall of pairs, and stacks."""

from __future__ import annotations

from statistics import fmean, median

from linnet.training import Cell

from .base import Bar, Experiment, Outcome, register_reproduction

SHAPE = "num_heads=2, head_dim=128"
KDA, GDN = f"kda({SHAPE})", f"gated_deltanet({SHAPE}, expand_v=1.0)"
LABELS = {KDA: "kda", GDN: "gated_deltanet"}
TASKS = {
    "palindrome": "palindrome",
    "MQAR": "mqar(tokens_per_pair=8, vocab_size=512, fill=False)",
    "stacks": "stacks",
}
FASTER = ("palindrome", "MQAR")  # where the paper sees it learn sooner
LENGTH = 256


@register_reproduction(
    "kimi_tasks",
    title="Kimi Linear: palindromes, pairs and stacks",
    paper="Kimi Team 2025, Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692)",
    claim="With a forget gate for every key channel the gated delta rule is at least as accurate as with one for a head"
    " on palindromes, recall of pairs and stacks, and learns the first two sooner.",
    published="Curves: 2 layers, 2 heads of 128, 256 to 2,048 tokens, up to 20,000 steps, best of four rates: KDA at"
    " least as accurate as Gated DeltaNet at all lengths of all three, and faster on palindrome and MQAR at 1,024.",
    setup="Rows of 256 tokens: 128 tokens and their reverse (32 ids), 32 pairs (512 ids), 64 stacks (32 elements). Two"
    " layers of width 256, 2 heads of K = V = 128 with a convolution of four taps. 800 steps of 64 rows at one rate,"
    " three initialisations, the median counts; how soon is the mean accuracy over the course of training.",
    needs=("gated_deltanet", "kda"),
    budgets=("gpu",),
)
def run(experiment: Experiment) -> Outcome:
    bars, curves = [], {}
    for name, task in TASKS.items():
        cells = experiment.compare(
            name,
            task=task,
            mixers=list(LABELS),
            sizes=[256],
            seeds=3,
            length=LENGTH,
            tests={str(LENGTH): (task, LENGTH)},
            batch_size=64,
            training={"steps": 800, "lr": 1e-3, "evaluate_every": 100, "precision": "bf16"},
        )
        channel, head = ([c for c in cells if c.mixer == mixer] for mixer in LABELS)
        reached = median(map(answers, channel))
        bars += [
            Bar(f"{name}, kda", reached, 0.9, published="curves only"),
            Bar(f"{name}, kda less gated_deltanet", reached - median(map(answers, head)), -0.01, published="≥ 0"),
        ]
        if name in FASTER:
            sooner = median(map(course, channel)) - median(map(course, head))
            bars.append(Bar(f"{name}, mean over training, kda less gated_deltanet", sooner, 0.0, published="faster"))
        bars += [
            Bar(f"{name}, kda, its worst initialisation", min(map(answers, channel))),
            Bar(f"{name}, gated_deltanet, its best initialisation", max(map(answers, head))),
        ]
        for mixer, some in ((KDA, channel), (GDN, head)):
            steps = zip(*(cell.curve for cell in some), strict=True)
            curves[f"{name}, {LABELS[mixer]}"] = [(at[0][0], median(score for _, score in at)) for at in steps]
    return Outcome(bars, curves, x="optimiser step", y="accuracy, median of the initialisations")


def answers(cell: Cell) -> float:
    """Share of right answers after training."""
    return cell.scores[str(LENGTH)]["answers"]


def course(cell: Cell) -> float:
    """Mean accuracy over the course of training: the sooner it learns, the higher."""
    return fmean(score for _, score in cell.curve)
