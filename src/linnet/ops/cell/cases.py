"""Sample inputs of the cell engine, one case a kind: registering them is what tests every backend in that mode."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Case, Identity, Op, register_op
from ..scan import scan
from . import BACKENDS, cell, cost
from .cells import CELLS
from .m2rnn import BACKENDS as M2RNN_BACKENDS
from .m2rnn import M2RNNState, m2rnn
from .m2rnn import cost as m2rnn_cost
from .newton import newton
from .para import _STEPS, ParaState, paragru, paralstm
from .para import BACKENDS as PARA_BACKENDS
from .para import cost as para_cost
from .state import CellState

H, D = 2, 4


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _inputs(r: torch.Generator, B: int, T: int, kind: str, *, bias: bool = True, heads: int = H) -> dict[str, Any]:
    gates = CELLS[kind].gates
    given = {
        "x": _normal(r, B, T, heads, gates * D),
        "R": _normal(r, heads, D, gates * D) * D**-0.5,
        "kind": kind,
    }
    return given | ({"b": _normal(r, heads, gates * D)} if bias else {})


def _state(kind: str):
    def make(r: torch.Generator, rows: int) -> CellState:
        parts = {name: _normal(r, rows, H, D) for name in CELLS[kind].states}
        if kind == "slstm":  # the normaliser is a sum of positive weights
            parts["n"] = parts["n"].abs() + 0.1
        return CellState(**parts)

    return make


def _case(name: str, kind: str, **options: Any) -> Case:
    peepholes, hostile = options.pop("peepholes", False), options.pop("hostile", None)

    def make(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = _inputs(r, B, T, kind, **options)
        if peepholes:
            given["p"] = _normal(r, H, len(CELLS[kind].peepholes) * D)
        if hostile is not None:
            palette = torch.tensor(hostile, dtype=torch.float64)
            given["x"] = palette[torch.randint(len(palette), given["x"].shape, generator=r)]
        return given

    return Case(name, make, ("x",), _state(kind), keep_fp32=("b", "p"), hostile=hostile is not None)


EXTREME = (-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4)


def _one_head_is_torch(kind: str, module: Any):
    def check(r: torch.Generator):
        given = _inputs(r, 2, 9, kind, heads=1)
        net = module(3, D, batch_first=True, dtype=torch.float64)
        x = _normal(r, 2, 9, 3)
        with torch.no_grad():
            net.weight_hh_l0.copy_(given["R"][0].T)
            net.bias_hh_l0.copy_(given["b"][0])
            given["x"] = nn.functional.linear(x, net.weight_ih_l0, net.bias_ih_l0)[:, :, None]
            theirs, last = net(x)
        ours, state = cell(**given)
        last = last if isinstance(last, tuple) else (last,)
        return (ours[:, :, 0], *(s[:, 0] for s in state if s is not None)), (theirs, *(s[0] for s in last))

    return check


def _heads_are_independent(r: torch.Generator):
    given = _inputs(r, 2, 9, "slstm")
    alone = [cell(given["x"][:, :, h : h + 1], given["R"][h : h + 1], given["b"][h : h + 1], kind="slstm")
             for h in range(H)]  # fmt: skip
    return cell(**given), (torch.cat([y for y, _ in alone], 2),
                           *(torch.cat(parts, 1) for parts in zip(*(s for _, s in alone), strict=True)))  # fmt: skip


def _slstm_unstabilised(r: torch.Generator):
    given = _inputs(r, 2, 9, "slstm", bias=False)
    h = c = n = torch.zeros(2, H, D, dtype=torch.float64)
    outputs = []
    for t in range(9):
        a = given["x"][:, t] + torch.einsum("nhd,hde->nhe", h, given["R"])
        i, f, z, o = a.split(D, -1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    y, state = cell(**given)
    return (y, state.c * state.m.exp(), state.n * state.m.exp()), (torch.stack(outputs, 1), c, n)  # type: ignore[operator,union-attr]


def _no_peepholes(r: torch.Generator):
    given = _inputs(r, 2, 9, "lstm")
    return cell(**given, p=torch.zeros(H, 3 * D, dtype=torch.float64)), cell(**given)


def _tied_gates(r: torch.Generator):
    """cifg is an LSTM whose input gate has the forget gate's weights, negated."""
    given = _inputs(r, 2, 9, "cifg")

    def tied(w: Tensor) -> Tensor:
        f, z, o = w.unflatten(-1, (3, D)).unbind(-2)
        return torch.cat([-f, f, z, o], -1)

    return cell(tied(given["x"]), tied(given["R"]), tied(given["b"]), kind="lstm"), cell(**given)


register_op(
    Op(
        "cell",
        cell,
        BACKENDS,
        (
            _case("elman", "tanh"),
            _case("relu", "relu", bias=False),
            _case("lstm", "lstm"),
            _case("lstm peepholes", "lstm", peepholes=True, bias=False),
            _case("cifg", "cifg", peepholes=True),
            _case("gru", "gru"),
            _case("slstm", "slstm"),
            _case("lstm hostile", "lstm", hostile=EXTREME),
            _case("slstm hostile", "slstm", hostile=EXTREME),
        ),
        cost,
        chunk=5,
        constants=("m",),
        identities=(
            Identity("lstm with one head is torch.nn.LSTM", _one_head_is_torch("lstm", nn.LSTM)),
            Identity("gru with one head is torch.nn.GRU", _one_head_is_torch("gru", nn.GRU)),
            Identity("tanh with one head is torch.nn.RNN", _one_head_is_torch("tanh", nn.RNN)),
            Identity("heads are independent networks", _heads_are_independent),
            Identity("slstm is the cell without a stabiliser", _slstm_unstabilised),
            Identity("lstm with peepholes of 0 is lstm", _no_peepholes),
            Identity("cifg is lstm with a tied input gate", _tied_gates),
        ),
    )
)


def _para_case(name: str, kind: str, size: float = 0.5, **options: Any) -> Case:
    hostile = options.get("hostile")
    layers = 3

    def make(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
        x = _normal(r, B, T, layers, D)
        if hostile is not None:
            palette = torch.tensor(hostile, dtype=torch.float64)
            x = palette[torch.randint(len(palette), x.shape, generator=r)]
        given = {"x": x, "A": size * _normal(r, layers, D).clamp(-1, 1)}
        return given if kind == "paragru" else given | {"C": size * _normal(r, 2, D).clamp(-1, 1)}

    def state(r: torch.Generator, rows: int) -> ParaState:
        h = torch.tanh(_normal(r, rows, D))
        return ParaState(h, None if kind == "paragru" else torch.tanh(_normal(r, rows, D)))

    return Case(name, make, ("x",), state, keep_fp32=("A", "C"), hostile=hostile is not None)


def _para_is_step(kind: str, backend: str):
    """Both against the plain function through `newton`, which differentiates it automatically."""

    def check(r: torch.Generator):
        given = _para_case("", kind, 1.0).make(r, 2, 30)
        weights = tuple(given[name] for name in ("A", "C") if name in given)
        state = torch.zeros(2, D, dtype=torch.float64) if kind == "paragru" else torch.zeros(2, D, 2).double()
        jacobian = "diagonal" if kind == "paragru" else "block"
        h = newton(_STEPS[kind], given["x"], state, weights, jacobian=jacobian).h
        op = paragru if kind == "paragru" else paralstm
        return op(**given, backend=backend)[0], h if kind == "paragru" else h[..., 1]

    return check


def _no_recurrence(r: torch.Generator):
    given = _para_case("", "paragru").make(r, 2, 30)
    z, _, n = given["x"].unbind(2)
    h = scan(torch.sigmoid(-z), torch.sigmoid(z) * torch.tanh(n))[0]
    return paragru(given["x"], torch.zeros(3, D, dtype=torch.float64))[0], h


register_op(
    Op(
        "paragru",
        paragru,
        PARA_BACKENDS,
        (
            _para_case("clipped", "paragru"),
            _para_case("expansive", "paragru", 3.0),
            _para_case("hostile", "paragru", hostile=EXTREME),
        ),
        para_cost,
        chunk=5,
        identities=(
            Identity("is the plain step function solved by newton", _para_is_step("paragru", "chunked")),
            Identity("without recurrent weights is a linear scan", _no_recurrence),
        ),
    )
)

register_op(
    Op(
        "paralstm",
        paralstm,
        PARA_BACKENDS,
        (_para_case("clipped", "paralstm"), _para_case("hostile", "paralstm", hostile=EXTREME)),
        partial(para_cost, kind="paralstm"),
        chunk=5,
        identities=(Identity("is the plain step function solved by newton", _para_is_step("paralstm", "reference")),),
    )
)


def _m2rnn_case(name: str, *, heads: int = 2, **options: Any) -> Case:
    hostile = options.pop("hostile", False)

    def make(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = {
            "q": _normal(r, B, T, heads, 5),
            "k": _normal(r, B, T, heads, 5),
            "v": _normal(r, B, T, 2, 3),
            "g": -torch.exp(_normal(r, B, T, 2) - 1),
            "W": _normal(r, 2, 3, 3) * 3**-0.5,
        }
        if hostile:  # half of the writes saturated, gates that keep all, forget all, forget exactly
            given["k"] = given["k"] * torch.where(torch.rand(B, T, heads, 5, generator=r) < 0.5, 1e4, 1.0)
            palette = torch.tensor([0.0, -1e-4, -20.0, -1e3, -torch.inf], dtype=torch.float64)
            given["g"] = palette[torch.randint(len(palette), (B, T, 2), generator=r)]
        return given | options

    def state(r: torch.Generator, rows: int) -> M2RNNState:
        return M2RNNState(torch.tanh(_normal(r, rows, 2, 5, 3)))

    # A clipped gradient is not what finite differences see, which hostile cases are spared.
    return Case(name, make, ("q", "k", "v", "g"), state, keep_fp32=("g",), hostile=hostile or "clip" in options)


def _m2rnn_inputs(r: torch.Generator) -> dict[str, Any]:
    return _m2rnn_case("").make(r, 2, 9)


def _rows_are_elman(r: torch.Generator):
    """With K = 1 and nothing kept, a head is an Elman network that reads k v and is read by q."""
    given = {name: x[..., :1] if name in ("q", "k") else x for name, x in _m2rnn_inputs(r).items()}
    given["g"] = torch.full_like(given["g"], -torch.inf)
    h, _ = cell(given["k"] * given["v"], given["W"], kind="tanh")
    return m2rnn(**given)[0], given["q"] * h


def _no_transition(r: torch.Generator):
    """Without recurrent weights it is a gated sum of tanh(k v^T)."""
    given = _m2rnn_inputs(r)
    given["W"] = torch.zeros_like(given["W"])
    q, k, v, g = (given[name] for name in ("q", "k", "v", "g"))
    write = -torch.expm1(g)[..., None, None] * torch.tanh(k[..., :, None] * v[..., None, :])
    S = scan(g[..., None, None].exp().expand_as(write).flatten(2), write.flatten(2))[0].view_as(write)
    return m2rnn(**given)[0], (S * q[..., None]).sum(-2)


def _no_clip(r: torch.Generator):
    given = {name: x.requires_grad_() for name, x in _m2rnn_inputs(r).items()}
    free, clipped = (m2rnn(**given, clip=bound)[0].sum() for bound in (None, 1e9))
    return torch.autograd.grad(free, tuple(given.values())), torch.autograd.grad(clipped, tuple(given.values()))


register_op(
    Op(
        "m2rnn",
        m2rnn,
        M2RNN_BACKENDS,
        (
            _m2rnn_case("shared keys", heads=1),
            _m2rnn_case("clip", clip=0.5),
            _m2rnn_case("hostile", hostile=True),
        ),
        m2rnn_cost,
        chunk=5,
        identities=(
            Identity("with one row and nothing kept is an Elman network", _rows_are_elman),
            Identity("without recurrent weights is a gated sum", _no_transition),
            Identity("a clip that is never reached is none", _no_clip),
        ),
    )
)
