"""M2RNN: a nonlinear matrix recurrence tracks states at lengths never seen."""

from __future__ import annotations

from .base import Bar, Experiment, Outcome, by_test, register_reproduction

TRACK = "m2rnn(num_heads=8, head_k=4, head_v=16, conv_size=0, w_init='random', f_init=0.22)"
LINEAR = "gated_deltanet(num_heads=4, head_dim=16, expand_v=1.0)"
TESTS = (16, 64, 256)


@register_reproduction(
    "m2rnn",
    title="M2RNN: state tracking beyond the trained length",
    paper="Mishra et al. 2026, M2RNN: Non-Linear RNNs with Matrix-Valued States for Scalable Language Modeling (arXiv"
    " 2603.14360)",
    claim="One layer with a nonlinear matrix state tracks the group S3 and parity at lengths never seen in training,"
    " where a gated linear recurrence is near chance.",
    published="S3, trained at length 128 and tested up to 512: M2RNN above 99.5%, Gated DeltaNet fails.",
    setup="One layer of width 64 with an MLP of 128, trained on rows of 16 elements and tested on 16, 64 and 256; S3"
    " from two generators; share of right answers over all positions. M2RNN has 8 heads of 4 by 16, no convolution,"
    " random recurrent weights and forget gates that start at 0.22; 700 steps of 64 rows (parity: 200).",
    needs=("m2rnn", "gated_deltanet"),
)
def run(experiment: Experiment) -> Outcome:
    cells = {}
    for name, task, steps in (("S3", "group(generators='two')", 700), ("parity", "parity", 200)):
        found = experiment.compare(
            name.lower(),
            task=task,
            mixers=[TRACK, LINEAR],
            sizes=[64],
            seeds=1,
            layers=1,
            length=16,
            batch_size=64,
            model={"mlp_hidden": 128},
            tests={str(n): (task, n) for n in TESTS},
            training={"steps": steps, "lr": 1e-2, "weight_decay": 0.01, "beta2": 0.95},
        )
        cells |= {(name, cell.mixer): cell for cell in found}
    bars, curves, places = [], {}, {str(n): float(n) for n in TESTS}
    for name, chance in (("S3", 1 / 6), ("parity", 1 / 2)):
        track, linear = (cells[name, mixer].scores for mixer in (TRACK, LINEAR))
        bars += [
            Bar(f"{name}, M2RNN at 16 times the trained length", track["256"]["answers"], 0.995, published="> 99.5%"),
            Bar(f"{name}, Gated DeltaNet there", linear["256"]["answers"], at_most=chance + 0.1, published="fails"),
            Bar(f"{name}, Gated DeltaNet at the trained length", linear["16"]["answers"]),
        ]
        for mixer, label in ((TRACK, "M2RNN"), (LINEAR, "Gated DeltaNet")):
            curves |= by_test([cells[name, mixer]], {mixer: f"{name}, {label}"}, places, "answers")
    return Outcome(bars, curves, x="elements (trained with 16)", y="right answers", log_x=True)
