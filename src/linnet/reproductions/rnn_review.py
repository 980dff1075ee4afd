"""Recurrent networks from the textbook: gates carry what a plain network forgets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.models import GRU, RNN

from .base import Bar, Experiment, Outcome, register_reproduction

LENGTH, WIDTH = 50, 64


def _rows(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1] with two marks, one in each half; the sum of the marked numbers."""
    numbers, marks = torch.rand(rows, LENGTH, generator=generator), torch.zeros(rows, LENGTH)
    for start in (0, LENGTH // 2):
        marks[torch.arange(rows), start + torch.randint(LENGTH // 2, (rows,), generator=generator)] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1)


def _curve(kind: type[nn.Module], steps: int) -> list[tuple[float, float]]:
    """(step, squared error on 512 fresh rows) while training."""
    torch.manual_seed(0)
    layer, head = kind(2, WIDTH, batch_first=True), nn.Linear(WIDTH, 1)
    weights = [*layer.parameters(), *head.parameters()]
    optimizer, generator, points = torch.optim.Adam(weights, lr=3e-3), torch.Generator().manual_seed(1), []
    fresh = _rows(512, torch.Generator().manual_seed(2))
    for step in range(1, steps + 1):
        x, y = _rows(64, generator)
        loss = (head(layer(x)[0][:, -1])[:, 0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % max(1, steps // 12) == 0:
            with torch.no_grad():
                points.append((float(step), float((head(layer(fresh[0])[0][:, -1])[:, 0] - fresh[1]).square().mean())))
    return points


@register_reproduction(
    "rnn_review",
    title="Gated and plain recurrent networks: the adding problem",
    paper="Lipton, Berkowitz & Elkan 2015, A Critical Review of Recurrent Neural Networks for Sequence Learning (arXiv"
    " 1506.00019); the task is that of Hochreiter & Schmidhuber 1997",
    claim="A gated network learns to carry numbers over tens of steps, where the gradients of a plain one vanish.",
    published="A survey, in words only: the gradients of plain networks vanish over long gaps, gated cells avoid it.",
    setup="Two marked numbers among 50, one in each half; their sum at the end. One layer of 64 units, Adam at 0.003,"
    " 600 steps of 64 rows; squared error on 512 fresh rows. Who always answers 1 has an error of 0.167.",
    needs=("gru", "elman"),
)
def run(experiment: Experiment) -> Outcome:
    steps = 24 if experiment.quick else 600
    curves = {name: _curve(kind, steps) for name, kind in (("GRU", GRU), ("plain, tanh", RNN))}
    gated, plain = (points[-1][1] for points in curves.values())
    bars = [
        Bar("squared error of the GRU", gated, at_most=0.01, published="learns"),
        Bar("squared error of the plain network", plain, at_least=0.1, published="does not"),
    ]
    return Outcome(bars, curves, x="steps", y="squared error", limits=(0, 0.3))
