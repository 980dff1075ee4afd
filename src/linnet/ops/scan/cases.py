"""Sample inputs of the scan engine, one case a mode: registering them is what tests every backend in that mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import Case, Identity, Op, register_op
from ..decay import decay
from . import selective as _selective
from . import softmax as _softmax
from .recurrence import BACKENDS, cost, minmax_scan, scan
from .selective import selective_scan
from .softmax import softmax_scan
from .state import ScanState, SoftmaxScanState

D, H, V, S = 6, 2, 3, 4
Make = Callable[[torch.Generator, int, int], dict[str, Any]]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _draw(generator: torch.Generator, values: list[float], *shape: int) -> Tensor:
    palette = torch.tensor(values, dtype=torch.float64)
    return palette[torch.randint(len(values), shape, generator=generator)]


def _state(*tail: int) -> Callable[[torch.Generator, int], ScanState]:
    return lambda generator, rows: ScanState(_normal(generator, rows, *tail))


def _case(name: str, make: Make, *tail: int, hostile: bool = False) -> Case:
    return Case(name, make, ("a", "b"), _state(D, *tail), keep_fp32=("a",), hostile=hostile)


def _gates(r: torch.Generator, *shape: int) -> Tensor:
    """Factors on both sides of zero, many close to one."""
    return torch.tanh(2 * _normal(r, *shape) + 1)


def _real(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"a": _gates(r, B, T, D), "b": _normal(r, B, T, D)}


def _constant(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"a": _gates(r, D), "b": _normal(r, B, T, D)}


def _rotations(r: torch.Generator, *shape: int) -> Tensor:
    """Complex factors inside the unit circle, as pairs."""
    return torch.view_as_real(torch.polar(torch.rand(*shape, dtype=torch.float64, generator=r), _normal(r, *shape)))


def _complex(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"a": _rotations(r, B, T, D), "b": _normal(r, B, T, D, 2)}


def _block(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"a": 0.6 * _normal(r, B, T, D, 2, 2), "b": _normal(r, B, T, D, 2)}


def _exact_gates(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """Factors that keep, forget and flip exactly, and some that all but do, among large inputs."""
    gates = _draw(r, [0.0, 0.0, 1.0, -1.0, 1e-30, 1 - 2.0**-20, 0.5], B, T, D)
    return {"a": gates, "b": _draw(r, [0.0, 1.0, 1e4], B, T, D) * _normal(r, B, T, D)}


def _bounds(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"r": _normal(r, B, T, D) + 1, "s": _normal(r, B, T, D) - 1}


def _hostile_bounds(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """Cells that hold (infinite bounds), are written (crossed bounds), and sizes far apart."""
    size = _draw(r, [1e-4, 1.0, 1e4], B, T, D)
    upper, lower = (size * _normal(r, B, T, D) for _ in range(2))
    hold = torch.rand(B, T, D, generator=r) < 0.5
    return {"r": upper.masked_fill(hold, torch.inf), "s": lower.masked_fill(hold, -torch.inf)}


def _minmax_case(name: str, make: Make, hostile: bool = False) -> Case:
    return Case(name, make, ("r", "s"), _state(D), hostile=hostile)


def _scores(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"s": 2 * _normal(r, B, T, H), "v": _normal(r, B, T, H, V)}


def _hostile_scores(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return _scores(r, B, T) | {"s": _draw(r, [-1e4, -50.0, 0.0, 0.0, 3.0, 100.0, -torch.inf], B, T, H)}


def _masked_scores(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return _scores(r, B, T) | {"s": torch.full((B, T, H), -torch.inf, dtype=torch.float64)}


def _softmax_case(name: str, make: Make, hostile: bool = False) -> Case:
    def state(generator: torch.Generator, rows: int) -> SoftmaxScanState:
        m, u, w = _normal(generator, rows, H), _normal(generator, rows, H).abs(), _normal(generator, rows, H, V)
        return SoftmaxScanState(m, u, w)

    return Case(name, make, ("s", "v"), state, keep_fp32=("s",), hostile=hostile)


def _mamba(groups: int | None, skip: bool = True) -> Make:
    def make(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
        shape = (B, T, S) if groups is None else (B, T, groups, S)
        given: dict[str, Any] = {
            "x": _normal(r, B, T, D),
            "delta": torch.exp(_normal(r, B, T, D) - 1),
            "A": -torch.exp(_normal(r, D, S)),
            "B": _normal(r, *shape),
            "C": _normal(r, *shape),
        }
        return given | {"D": _normal(r, D)} if skip else given

    return make


def _hostile_steps(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """Steps that change nothing, forget everything, and everything between, on large inputs."""
    given = _mamba(None)(r, B, T)
    steps = _draw(r, [0.0, 1e-6, 0.1, 10.0, 1e4], B, T, D)
    return given | {"delta": steps, "x": 1e2 * given["x"]}


def _selective_case(name: str, make: Make, hostile: bool = False) -> Case:
    time = ("x", "delta", "B", "C")
    return Case(name, make, time, _state(D, S), keep_fp32=("delta", "A", "D"), hostile=hostile)


# Identities


def _is_decay(r: torch.Generator):
    a, b = torch.rand(2, 37, D, dtype=torch.float64, generator=r), _normal(r, 2, 37, D)
    one = torch.ones(2, 37, 1, 1, dtype=torch.float64)
    o, state = decay(one, one, b[:, :, None], gv=a.log()[:, :, None], scale=1.0)
    return scan(a, b), (o[:, :, 0], state.S[:, 0, 0])


def _reverse_is_flipped(r: torch.Generator):
    given = _block(r, 2, 37)
    return scan(**given, reverse=True)[0], scan(given["a"].flip(1), given["b"].flip(1))[0].flip(1)


def _complex_is_block(r: torch.Generator):
    given = _complex(r, 2, 37)
    x, y = given["a"].unbind(-1)
    block = torch.stack([torch.stack([x, -y], -1), torch.stack([y, x], -1)], -2)
    return scan(**given), scan(block, given["b"])


def _complex_tensors(r: torch.Generator):
    given = _complex(r, 2, 37)
    h, state = scan(*(torch.view_as_complex(x) for x in given.values()))
    return (torch.view_as_real(h), torch.view_as_real(state.h)), scan(**given)


def _zero_gate_reads_input(r: torch.Generator):
    b = _normal(r, 2, 37, D)
    return scan(torch.zeros(D, dtype=torch.float64), b), (b, b[:, -1])


def _ones_are_cumsum(r: torch.Generator):
    b = _normal(r, 2, 37, D)
    return scan(torch.ones(D, dtype=torch.float64), b)[0], b.cumsum(1)


def _closed_form(r: torch.Generator):
    given = _bounds(r, 2, 13)
    upper, lower, x0 = given["r"], given["s"], _normal(r, 2, D)
    x = []
    for t in range(13):  # the state is x0 or an s_j, capped by every later r
        rest = [upper[:, j + 1 : t + 1].amin(1) if j < t else torch.inf for j in range(-1, t + 1)]
        seen = [x0, *lower[:, : t + 1].unbind(1)]
        x.append(torch.stack([torch.as_tensor(a).clamp(max=b) for a, b in zip(seen, rest, strict=True)]).amax(0))
    return minmax_scan(**given, state=ScanState(x0))[0], torch.stack(x, 1)


def _holds(r: torch.Generator):
    given, x0 = _hostile_bounds(r, 2, 37), _normal(r, 2, D)
    free: dict[str, Any] = {"r": torch.full_like(given["r"], torch.inf), "s": torch.full_like(given["s"], -torch.inf)}
    return minmax_scan(**free, state=ScanState(x0))[0], x0[:, None].expand(2, 37, D)


def _crossed_bounds_write(r: torch.Generator):
    s = _normal(r, 2, 37, D)
    return minmax_scan(s - 1, s)[0], s


def _is_running_maximum(r: torch.Generator):
    s = _normal(r, 2, 37, D)
    top = torch.full_like(s, torch.inf)
    return minmax_scan(top, s, state=ScanState(s[:, 0]))[0], s.cummax(1).values


def _is_prefix_attention(r: torch.Generator):
    given = _scores(r, 2, 37)
    seen = torch.ones(37, 37, dtype=torch.bool).tril()
    weights = given["s"].mT[:, :, None].expand(-1, -1, 37, -1).masked_fill(~seen, -torch.inf).softmax(-1)
    return softmax_scan(**given)[0], torch.einsum("bhts,bshv->bthv", weights, given["v"])


def _flat_scores_average(r: torch.Generator):
    v = _normal(r, 2, 37, H, V)
    counts = torch.arange(1, 38, dtype=torch.float64)[:, None, None]
    return softmax_scan(torch.zeros(2, 37, H, dtype=torch.float64), v)[0], v.cumsum(1) / counts


def _scores_may_move(r: torch.Generator):
    given = _scores(r, 2, 37)
    return softmax_scan(given["s"] + 1e3, given["v"])[0], softmax_scan(**given)[0]


def _is_mamba2(r: torch.Generator):
    given: dict[str, Any] = _mamba(None)(r, 2, 37)
    a = -torch.rand(D, dtype=torch.float64, generator=r)
    y, state = selective_scan(**{**given, "A": a[:, None].expand(D, S)})
    q, k = given["C"][:, :, None], given["B"][:, :, None]
    o, memory = decay(q, k, given["x"][..., None], a * given["delta"], w=given["delta"], scale=1.0)
    return (y, state.h), (o[..., 0] + given["D"] * given["x"], memory.S[..., 0])


def _constant_maps_are_a_convolution(r: torch.Generator):
    given: dict[str, Any] = _mamba(None)(r, 2, 37)
    B, C, dt = _normal(r, S), _normal(r, S), _normal(r, D).exp()
    steps = torch.arange(37, dtype=torch.float64)[:, None, None]
    kernel = (C * B * dt[:, None] * (steps * dt[:, None] * given["A"]).exp()).sum(-1)  # [37, D]
    lag = torch.arange(37)[:, None] - torch.arange(37)
    taps = kernel[lag.clamp(min=0)] * (lag >= 0)[..., None]
    given |= {"B": B.expand(2, 37, S), "C": C.expand(2, 37, S), "delta": dt.expand(2, 37, D)}
    return selective_scan(**given)[0], torch.einsum("tsd,bsd->btd", taps, given["x"]) + given["D"] * given["x"]


register_op(
    Op(
        "scan",
        scan,
        BACKENDS,
        (
            _case("real", _real),
            _case("constant", _constant),
            _case("complex", _complex, 2),
            _case("block", _block, 2),
            _case("exact gates", _exact_gates, hostile=True),
        ),
        cost,
        identities=(
            Identity("is the decay engine with one key channel and a value-side decay (HGRN)", _is_decay),
            Identity("reversed, is the scan of the sequence from its end", _reverse_is_flipped),
            Identity("a complex factor is a rotation and scaling block", _complex_is_block),
            Identity("complex tensors are their pairs", _complex_tensors),
            Identity("a = 0 reads the input", _zero_gate_reads_input),
            Identity("a = 1 is a cumulative sum", _ones_are_cumsum),
        ),
    )
)

register_op(
    Op(
        "minmax_scan",
        minmax_scan,
        BACKENDS,
        (_minmax_case("bounds", _bounds), _minmax_case("hostile bounds", _hostile_bounds, hostile=True)),
        cost,
        identities=(
            Identity("a state is x_0 or an s_j, capped by every later r", _closed_form),
            Identity("infinite bounds hold", _holds),
            Identity("crossed bounds write s", _crossed_bounds_write),
            Identity("without upper bounds it is the running maximum", _is_running_maximum),
        ),
    )
)

register_op(
    Op(
        "softmax_scan",
        softmax_scan,
        BACKENDS,
        (
            _softmax_case("scores", _scores),
            _softmax_case("hostile scores", _hostile_scores, hostile=True),
            _softmax_case("all masked", _masked_scores, hostile=True),
        ),
        _softmax.cost,
        constants=("m",),
        identities=(
            Identity("is softmax attention of one query to every prefix", _is_prefix_attention),
            Identity("equal scores give the running mean", _flat_scores_average),
            Identity("a constant added to all scores changes nothing", _scores_may_move),
        ),
    )
)

register_op(
    Op(
        "selective_scan",
        selective_scan,
        BACKENDS,
        (
            _selective_case("plain", _mamba(None)),
            _selective_case("groups, no skip", _mamba(2, skip=False)),
            _selective_case("hostile steps", _hostile_steps, hostile=True),
        ),
        _selective.cost,
        identities=(
            Identity("with one decay a feature, is the scalar-gated decay engine (Mamba-2)", _is_mamba2),
            Identity(
                "with constant maps and steps, is a convolution with an S4D-Real kernel",
                _constant_maps_are_a_convolution,
            ),
        ),
    )
)
