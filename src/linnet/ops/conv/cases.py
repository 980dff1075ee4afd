"""Sample inputs of the convolution, one case a mode: registering them is what tests every backend in that mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Case, Identity, Op, Segments, register_op
from . import BACKENDS, TAPS, conv, cost
from .state import ConvState

D = 6


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _case(name: str, width: int, *, bias: bool = False, size: float = 1.0, hostile: bool = False, **options) -> Case:
    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = {"x": size * _normal(generator, B, T, D), "weight": _normal(generator, D, width)} | options
        return given | {"bias": _normal(generator, D)} if bias else given

    def state(generator: torch.Generator, rows: int) -> ConvState:
        return ConvState(size * _normal(generator, rows, width - 1, D))

    backends = None if width in TAPS else BACKENDS[:2]
    return Case(name, make, ("x",), state, hostile=hostile, backends=backends)


def _width_one(r: torch.Generator):
    x, weight, bias = _normal(r, 2, 37, D), _normal(r, D, 1), _normal(r, D)
    return conv(x, weight, bias)[0], x * weight[:, 0] + bias


def _last_tap_only(r: torch.Generator):
    x, weight = _normal(r, 2, 37, D), torch.zeros(D, 4, dtype=torch.float64)
    weight[:, 0] = 1.0
    return conv(x, weight)[0], F.pad(x, (0, 0, 3, 0))[:, :37]


def _torch_conv(r: torch.Generator):
    x, weight, bias = _normal(r, 2, 37, D), _normal(r, D, 4), _normal(r, D)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=D)).transpose(1, 2)
    return conv(x, weight, bias, activation="silu")[0], expected


def _one_segment(r: torch.Generator):
    x, weight = _normal(r, 1, 37, D), _normal(r, D, 4)
    y, after = conv(x, weight, segments=Segments.from_lengths([37, 0]))
    return (y, after.tail[:1], after.tail[1:]), (*conv(x, weight), torch.zeros(1, 3, D, dtype=torch.float64))


register_op(
    Op(
        name="conv",
        function=conv,
        backends=BACKENDS,
        cases=(
            _case("plain", 4),
            _case("bias and silu", 4, bias=True, activation="silu"),
            _case("width one", 1, bias=True),
            _case("width two, silu", 2, activation="silu"),
            _case("wide", 7, bias=True),
            _case("long", 150, bias=True, activation="silu"),
            _case("large inputs", 4, size=1e4, bias=True, activation="silu", hostile=True),
        ),
        cost=cost,
        chunk=8,
        identities=(
            Identity("a width of one scales each channel", _width_one),
            Identity("with only the oldest tap it delays", _last_tap_only),
            Identity("equals torch.nn.functional.conv1d on left-padded input", _torch_conv),
            Identity("one segment is no segments", _one_segment),
        ),
    )
)
