"""MinMax recurrent neural cascades: what is latched stays, however long, and so does every star-free language."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, by_test, mean_accuracy, register_reproduction

LABELS = {"minmax(state_dim=40)": "MinMax cascade", "gla(num_heads=4)": "GLA", "mingru": "minGRU"}
TESTS = {"96": 96, "1024": 1024, "8192": 8192}
# Regular languages beside latching: task, name, steps, and what the cascade must reach at 64 times the training length.
LANGUAGES = (
    ("flipflop", "flip-flop", 200, {"at_least": 0.999, "published": "1.0 (star-free)"}),
    ("ordered_events", "two events in order", 600, {"at_least": 0.99, "published": "1.0 (star-free)"}),
    ("parity", "parity", 150, {"at_most": 0.6, "published": "not expressible (not star-free)"}),
)


@register_reproduction(
    "minmax_rnc",
    title="MinMax cascades: latching for 8,192 steps, star-free languages for 4,096",
    paper="Ronca 2026, MinMax Recurrent Neural Cascades (arXiv 2605.06384)",
    claim="A recurrence of minima and maxima neither fades nor explodes, so a cascade trained on short rows keeps a"
    " symbol for any length, where decaying recurrences lose it. Its scalar cells recognise the star-free regular"
    " languages, and no others.",
    published="Abstract: all synthetic tasks solved perfectly, trained on 256 to 511 tokens and evaluated on 1,024,000,"
    " ahead of the recurrent baselines tested.",
    setup="Latching: the first token (one of 4) at every position, among 20 tokens. Two layers of width 64, 300 steps"
    " of 64 rows of 32 to 96 tokens; 32 test rows of 96, 1,024 and 8,192 tokens; accuracy in the last tenth."
    " The cascade alone also learns three regular languages from rows of 32 to 64 tokens, tested with 16 rows of 4,096:"
    " flip-flop, events in order (the paper's 'sequences', two of two events each), and parity, which counts.",
    needs=("gla", "mingru", "minmax"),
)
def run(experiment: Experiment) -> Outcome:
    cells = experiment.compare(
        "latching",
        task="latching",
        mixers=list(LABELS),
        seeds=1,
        length=[32, 48, 64, 96],
        tests={name: ("latching", min(n, 128) if experiment.quick else n) for name, n in TESTS.items()},
        batch_size=64,
        training={"steps": 300, "lr": 1e-3, "weight_decay": 0.0, "beta2": 0.999},
        test_rows=32,
    )
    minmax, *others = LABELS
    bars = [
        Bar(f"MinMax cascade, {name} tokens", mean_accuracy(cells, minmax, name, "late"), 0.999, published="1.0")
        for name in TESTS
    ]
    bars += [
        Bar(f"{LABELS[m]}, 8192 tokens", mean_accuracy(cells, m, "8192", "late"), published="below the cascade")
        for m in others
    ]
    best = max(mean_accuracy(cells, m, "8192", "late") for m in others)
    ahead = mean_accuracy(cells, minmax, "8192", "late") - best
    bars.append(Bar("cascade less the best of the others, 8192 tokens", ahead, 0.02, published="more than 0"))
    for task, name, steps, bar in LANGUAGES:
        length = 128 if experiment.quick else 4096
        learnt = experiment.compare(
            task,
            task=task,
            mixers=[minmax],
            seeds=1,
            length=[32, 48, 64],
            tests={"long": (task, length)},
            batch_size=32,
            training={"steps": steps, "lr": 3e-3, "weight_decay": 0.0, "beta2": 0.999},
            test_rows=16,
        )
        bars.append(Bar(f"MinMax cascade, {name}, 4096 tokens", mean_accuracy(learnt, minmax, "long", "late"), **bar))
    places = {name: float(n) for name, n in TESTS.items()}
    curves = by_test(cells, LABELS, places, "late")
    return Outcome(bars, curves, x="tokens (trained with 32 to 96)", y="accuracy in the last tenth", log_x=True)
