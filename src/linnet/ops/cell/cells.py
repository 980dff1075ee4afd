"""The cells: what happens in one channel at one token, once the input and the recurrent product have been added.

Each is two plain functions. ``step`` takes pre-activations and the state before the token to the state after it; it is
the definition. ``slope`` gives its derivatives, channel by channel a small matrix with a row for every part of the
state after the token and a column for every pre-activation, then for every part of the state before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = tuple[Tensor, ...]


def _tanh(a: Tensors, s: Tensors, p: Tensors) -> Tensors:
    return (torch.tanh(a[0]),)


def _tanh_slope(a: Tensors, s: Tensors, p: Tensors) -> Tensor:
    return _matrix([[1 - torch.tanh(a[0]).square(), 0]])


def _relu(a: Tensors, s: Tensors, p: Tensors) -> Tensors:
    return (torch.relu(a[0]),)


def _relu_slope(a: Tensors, s: Tensors, p: Tensors) -> Tensor:
    return _matrix([[(a[0] > 0).to(a[0].dtype), 0]])


def _lstm(a: Tensors, s: Tensors, p: Tensors) -> Tensors:
    i, f, z, o = a
    c = s[1]
    if p:
        i, f = i + p[0] * c, f + p[1] * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o + p[2] * c if p else o) * torch.tanh(c), c


def _lstm_slope(a: Tensors, s: Tensors, p: Tensors) -> Tensor:
    i, f, z, o = a
    _, c = _lstm(a, s, p)
    if p:
        i, f, o = i + p[0] * s[1], f + p[1] * s[1], o + p[2] * c
    (i, di), (f, df), (o, do), z, y = _sigmoid(i), _sigmoid(f), _sigmoid(o), torch.tanh(z), torch.tanh(c)
    row = [z * di, s[1] * df, i * (1 - z.square()), 0, 0, f]
    through = o * (1 - y.square())  # of h over c
    if p:
        row[5] = f + p[0] * row[0] + p[1] * row[1]
        through = through + p[2] * y * do
    return _matrix([[through * row[0], through * row[1], through * row[2], y * do, 0, through * row[5]], row])


def _cifg(a: Tensors, s: Tensors, p: Tensors) -> Tensors:
    f, z, o = a
    c = s[1]
    if p:
        f = f + p[0] * c
    c = torch.sigmoid(f) * c + torch.sigmoid(-f) * torch.tanh(z)
    return torch.sigmoid(o + p[1] * c if p else o) * torch.tanh(c), c


def _cifg_slope(a: Tensors, s: Tensors, p: Tensors) -> Tensor:
    f, z, o = a
    _, c = _cifg(a, s, p)
    if p:
        f, o = f + p[0] * s[1], o + p[1] * c
    i = torch.sigmoid(-f)
    (f, df), (o, do), z, y = _sigmoid(f), _sigmoid(o), torch.tanh(z), torch.tanh(c)
    row = [(s[1] - z) * df, i * (1 - z.square()), 0, 0, f]
    through = o * (1 - y.square())
    if p:
        row[4] = f + p[0] * row[0]
        through = through + p[1] * y * do
    return _matrix([[through * row[0], through * row[1], y * do, 0, through * row[4]], row])


def _gru(a: Tensors, s: Tensors, p: Tensors) -> Tensors:
    r, z, n, g = a  # g is the recurrent product of the candidate, which the reset gate scales
    n = torch.tanh(n + torch.sigmoid(r) * g)
    return (torch.sigmoid(z) * s[0] + torch.sigmoid(-z) * n,)


def _gru_slope(a: Tensors, s: Tensors, p: Tensors) -> Tensor:
    r, z, n, g = a
    (r, dr), (keep, dz) = _sigmoid(r), _sigmoid(z)
    n = torch.tanh(n + r * g)
    dn = torch.sigmoid(-z) * (1 - n.square())
    return _matrix([[dn * g * dr, (s[0] - n) * dz, dn, dn * r, keep]])


def _weights(i: Tensor, f: Tensor, n: Tensor, m: Tensor) -> Tensors:
    """What the sLSTM keeps and writes next to the new scale ``exp(m)``, and that m."""
    i, lf = i.clamp(min=-1e30), F.logsigmoid(f.clamp(min=-1e30))  # of -inf a difference would be NaN
    fixed_i, fixed_f = i.detach(), lf.detach()
    empty = n.detach() == 0  # nothing written yet: the first write sets the scale, whatever it was
    ahead = torch.where(empty, torch.inf, fixed_i - m - fixed_f)  # log of what is written over what is kept
    keep, write = -ahead.clamp(min=0), ahead.clamp(max=0)  # one of them is 0; what is added is their derivative
    keep, write = (keep + (lf - fixed_f)).exp(), (write + (i - fixed_i)).exp()
    return keep, write, torch.where(ahead > 0, fixed_i, fixed_f + m)


def _slstm(a: Tensors, s: Tensors, p: Tensors) -> Tensors:
    i, f, z, o = a
    keep, write, m = _weights(i, f, s[2], s[3])
    c, n = keep * s[1] + write * torch.tanh(z), keep * s[2] + write
    return torch.sigmoid(o) * c / n, c, n, m


def _slstm_slope(a: Tensors, s: Tensors, p: Tensors) -> Tensor:
    i, f, z, o = a
    keep, write, _ = _weights(i, f, s[2], s[3])
    z = torch.tanh(z)
    c, n = keep * s[1] + write * z, keep * s[2] + write
    o, do = _sigmoid(o)
    lost = keep * torch.sigmoid(-f)
    row_c, row_n = (write * z, lost * s[1], write * (1 - z.square())), (write, lost * s[2])
    over_c, over_n = o / n, -o * c / n.square()
    row_h = [over_c * row_c[0] + over_n * row_n[0], over_c * row_c[1] + over_n * row_n[1], over_c * row_c[2],
             c / n * do, 0, over_c * keep, over_n * keep]  # fmt: skip
    return _matrix([row_h, [*row_c, 0, 0, keep, 0], [*row_n, 0, 0, 0, 0, keep]])


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """The logistic function and its derivative."""
    return torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)


def _matrix(rows: list[list[Any]]) -> Tensor:
    """``[rows, columns, ...]`` from tensors and zeros."""
    zero = torch.zeros_like(next(y for y in rows[0] if isinstance(y, Tensor)))
    return torch.stack([torch.stack([y if isinstance(y, Tensor) else zero for y in row]) for row in rows])


class Cell(NamedTuple):
    """A kind of cell.

    Attributes:
        gates: pre-activations of a channel, G.
        step: ``step(a, s, p)`` -> the state after the token, from pre-activations (tensors ``[..., D]``, see
            :func:`preactivations`), the state before it and the peephole weights. The first state is the output, the
            only one that the recurrent weights see.
        slope: its derivatives, from the same arguments: a row for each differentiable part of the state.
        differentiable: parts of the state that gradients go through, the first so many.
        states: names of the parts of the state.
        peepholes: (gate, whether it looks at the new c) of every peephole weight the kind may have.
    """

    gates: int
    step: Callable[[Tensors, Tensors, Tensors], Tensors]
    slope: Callable[[Tensors, Tensors, Tensors], Tensor]
    states: tuple[str, ...] = ("h",)
    differentiable: int = 1
    peepholes: tuple[tuple[int, bool], ...] = ()


CELLS = {
    "tanh": Cell(1, _tanh, _tanh_slope),
    "relu": Cell(1, _relu, _relu_slope),
    "lstm": Cell(4, _lstm, _lstm_slope, ("h", "c"), 2, ((0, False), (1, False), (3, True))),
    "cifg": Cell(3, _cifg, _cifg_slope, ("h", "c"), 2, ((0, False), (2, True))),
    "gru": Cell(3, _gru, _gru_slope),
    "slstm": Cell(4, _slstm, _slstm_slope, ("h", "c", "n", "m"), 3),
}


def preactivations(kind: str, x: Tensor, product: Tensor) -> Tensors:
    """The inputs of a cell from those of the gates ``[..., G * D]`` and their recurrent product: sums, but the GRU's
    candidate has both on their own."""
    gates = CELLS[kind].gates
    x_gates, r_gates = x.unflatten(-1, (gates, -1)).unbind(-2), product.unflatten(-1, (gates, -1)).unbind(-2)
    if kind == "gru":
        return x_gates[0] + r_gates[0], x_gates[1] + r_gates[1], x_gates[2], r_gates[2]
    return tuple(a + b for a, b in zip(x_gates, r_gates, strict=True))


def gate_slots(kind: str) -> tuple[list[int], list[int]]:
    """Which pre-activations the gates of the input and those of the recurrent product are."""
    own = list(range(CELLS[kind].gates))
    return own, [0, 1, 3] if kind == "gru" else own


def split_peepholes(kind: str, p: Tensor | None) -> Tensors:
    """``[H, P * D]`` -> P tensors ``[H, D]``; none without peepholes."""
    return () if p is None else p.unflatten(-1, (len(CELLS[kind].peepholes), -1)).unbind(-2)
