"""LSSL and S4: a continuous-time layer follows a change of the sampling rate by a change of its step."""

from __future__ import annotations

from linnet.evaluation import accuracy
from linnet.models import Decoder
from linnet.tasks import build_task

from .base import Bar, Experiment, Outcome, register_reproduction

LENGTH, STRIDES = 256, (1, 2, 4)
LABELS = {"zoh": "zero-order hold", "bilinear": "bilinear"}


def spec(rule: str, rate: float = 1.0) -> str:
    """The mixer, at a multiple of the step it was trained with."""
    return f"s4d(state_size=64, discretization='{rule}', rate={rate})"


@register_reproduction(
    "lssl_s4",
    title="LSSL and S4: another sampling rate without training",
    paper="Gu et al. 2021, Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space"
    " Layers (arXiv 2110.13985); Gu et al. 2022, S4D (arXiv 2206.11893)",
    claim="A state space layer is a continuous-time system, so a trained one reads data of another sampling rate when"
    " its step is scaled, without further training.",
    published="Speech Commands, raw audio: LSSL 95.87 %, and 88.66 % at half of the rate with the step doubled; CKConv"
    " 71.66 and 65.96 %.",
    setup="Eight frequencies of a noisy sine in rows of 256 samples; two S4D layers of width 32 without MLP, 250 steps"
    " of 32 rows. Then every second and every fourth sample only, with the step left alone and with the step scaled,"
    " for both rules of discretisation.",
    needs=("s4d",),
)
def run(experiment: Experiment) -> Outcome:
    cells = experiment.compare(
        "frequency",
        task="frequency",
        mixers=[spec(rule) for rule in LABELS],
        sizes=[32],
        seeds=1,
        length=LENGTH,
        tests={"1": ("frequency", LENGTH)},
        model={"mlp": "none"},
        training={"steps": 250, "lr": 1e-2},
    )
    rows = 16 if experiment.quick else 256
    scaled, left = {}, {}
    for rule in LABELS:
        (folder,) = (experiment.folder / "frequency" / "cells").glob(f"*{rule}*")
        weights = Decoder.load(folder / "model")
        for stride in STRIDES:
            task = build_task(f"frequency(stride={stride})")
            for found, rate in ((scaled, float(stride)), (left, 1.0)):
                config = weights.config.to_dict() | {"mixers": [spec(rule, rate)]}
                model = Decoder(type(weights.config).from_dict(config)).eval()
                model.load_state_dict(weights.state_dict())
                found[rule, stride] = accuracy(model, task, LENGTH // stride, rows=rows).answers
    assert len(cells) == len(LABELS)
    bars = [
        Bar("at the rate of training, zero-order hold", scaled["zoh", 1], 0.99, published="95.87 %"),
        Bar("half the rate, step doubled, zero-order hold", scaled["zoh", 2], 0.99, published="88.66 %"),
        Bar("a quarter of the rate, step times 4, zero-order hold", scaled["zoh", 4], 0.99),
        Bar("half the rate, step left alone, zero-order hold", left["zoh", 2], at_most=0.2, published="fails"),
        Bar("half the rate, step doubled, bilinear", scaled["bilinear", 2], 0.95),
        Bar("a quarter of the rate, step times 4, bilinear (it bends high frequencies)", scaled["bilinear", 4]),
    ]
    curves = {}
    for rule, label in LABELS.items():
        curves[f"{label}, step scaled"] = [(float(s), scaled[rule, s]) for s in STRIDES]
        curves[f"{label}, step left alone"] = [(float(s), left[rule, s]) for s in STRIDES]
    return Outcome(bars, curves, x="every n-th sample (trained with all)", y="accuracy", log_x=True)
