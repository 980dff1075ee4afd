"""Sample inputs of the decay engine, one case a mode: registering them is what tests every backend in that mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import Case, Identity, Op, register_op
from . import BACKENDS, cost, decay, mlstm
from .state import DecayState, MLSTMState

H, K, V = 2, 8, 6


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _log_decay(generator: torch.Generator, *shape: int) -> Tensor:
    """Log-decays from about -1e-3 to about -8, as layers produce them."""
    return -torch.exp(2 * _normal(generator, *shape) - 2)


def _qkv(generator: torch.Generator, B: int, T: int, heads: int = H) -> dict[str, Any]:
    return {
        "q": _normal(generator, B, T, heads, K),
        "k": _normal(generator, B, T, heads, K),
        "v": _normal(generator, B, T, H, V),
    }


def _state(generator: torch.Generator, rows: int) -> DecayState:
    return DecayState(_normal(generator, rows, H, K, V))


def _positive_state(generator: torch.Generator, rows: int) -> DecayState:
    return DecayState(_normal(generator, rows, H, K, V), _normal(generator, rows, H, K).abs())


def _gate(name: str, *tail: int) -> Callable[[torch.Generator, int, int], dict[str, Any]]:
    return lambda r, B, T: {name: _log_decay(r, B, T, H, *tail)}


def _case(name: str, *extras: Callable[[torch.Generator, int, int], dict[str, Any]], heads: int = H, **options) -> Case:
    """A case from q, k, v and further arguments; ``options`` are constant keyword arguments of the op."""
    state = _positive_state if options.get("normalize") else _state
    hostile = options.pop("hostile", False)

    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = _qkv(generator, B, T, heads) | options
        if options.get("normalize"):  # a normaliser needs positive features
            given["q"], given["k"] = given["q"].abs(), given["k"].abs()
        for extra in extras:
            given |= extra(generator, B, T)
        return given

    time = ("q", "k", "v", "g", "gv", "w")
    return Case(name, make, time, state, keep_fp32=("g", "gv", "w"), hostile=hostile)


def _bonus(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"u": _normal(r, H, K)}


def _weight(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"w": torch.rand(B, T, H, dtype=torch.float64, generator=r)}


def _hostile_gate(name: str, *tail: int) -> Callable[[torch.Generator, int, int], dict[str, Any]]:
    """Tokens that keep everything, forget mildly, fully and exactly (-inf), mixed over tokens, heads and channels."""
    palette = torch.tensor([0.0, -1e-4, -1.0, -20.0, -100.0, -1e3, -1e5, -torch.inf], dtype=torch.float64)

    def make(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
        return {name: palette[torch.randint(len(palette), (B, T, H, *tail), generator=r)]}

    return make


def _large(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"q": 1e2 * _normal(r, B, T, H, K), "k": 1e4 * _normal(r, B, T, H, K)}


def _no_keys(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"k": torch.zeros(B, T, H, K, dtype=torch.float64)}


def _same_keys(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"k": _normal(r, 1, 1, H, K).expand(B, T, H, K).clone()}


def _gates(scale: float, shift: float = 0.0) -> Callable[[torch.Generator, int, int], dict[str, Any]]:
    return lambda r, B, T: {"i": scale * _normal(r, B, T, H) + shift, "f": scale * _normal(r, B, T, H) + 2}


def _hostile_gates(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    def draw(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (B, T, H), generator=r)]

    return {"i": draw(-1e4, -100.0, -15.0, 0.0, 15.0, 100.0), "f": draw(-1e3, -100.0, -15.0, 0.0, 15.0, 100.0)}


def _mlstm_case(name: str, *extras: Callable[[torch.Generator, int, int], dict[str, Any]], **options) -> Case:
    hostile = options.pop("hostile", False)

    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = _qkv(generator, B, T) | options
        for extra in extras:
            given |= extra(generator, B, T)
        return given

    def state(generator: torch.Generator, rows: int) -> MLSTMState:
        return MLSTMState(*_positive_state(generator, rows), _normal(generator, rows, H))  # type: ignore[arg-type]

    return Case(name, make, ("q", "k", "v", "i", "f"), state, keep_fp32=("i", "f"), hostile=hostile)


def _zero_gate_is_no_gate(r: torch.Generator):
    given = _qkv(r, 2, 37)
    return decay(**given, g=torch.zeros(2, 37, H, K, dtype=torch.float64)), decay(**given)


def _constant_vector_is_scalar(r: torch.Generator):
    given, g = _qkv(r, 2, 37), _log_decay(r, 2, 37, H)
    return decay(**given, g=g[..., None].expand(-1, -1, -1, K)), decay(**given, g=g)


def _constant_gate_is_retention(r: torch.Generator):
    given, g = _qkv(r, 2, 37), _log_decay(r, H)
    return decay(**given, g=g), decay(**given, g=g.expand(2, 37, H))


def _ones_column_is_normaliser(r: torch.Generator):
    given, g = _qkv(r, 2, 37), _log_decay(r, 2, 37, H)
    given["q"], given["k"] = given["q"].abs(), given["k"].abs()
    wide: dict[str, Any] = {**given, "v": torch.cat([given["v"], torch.ones(2, 37, H, 1, dtype=torch.float64)], -1)}
    o = decay(**wide, g=g)[0]
    return o[..., :V] / o[..., V:], decay(**given, g=g, normalize=True, eps=0.0)[0]


def _exclusive_from_inclusive(r: torch.Generator):
    given, g = _qkv(r, 2, 37), _log_decay(r, 2, 37, H, K)
    own = K**-0.5 * (given["q"] * given["k"]).sum(-1, keepdim=True) * given["v"]
    shifted = given | {"q": given["q"] * g.exp()}
    u = torch.zeros(H, K, dtype=torch.float64)
    return decay(**given, g=g)[0] - own, decay(**shifted, g=g, u=u)[0]


def _bonus_is_own_token(r: torch.Generator):
    given, g, u = _qkv(r, 2, 37), _log_decay(r, 2, 37, H, K), _normal(r, H, K)
    own = K**-0.5 * (given["q"] * u * given["k"]).sum(-1, keepdim=True) * given["v"]
    return decay(**given, g=g, u=u)[0] - decay(**given, g=g, u=torch.zeros_like(u))[0], own


def _full_forgetting_reads_own_token(r: torch.Generator):
    given = _qkv(r, 2, 37)
    g = torch.full((2, 37, H, K), -torch.inf, dtype=torch.float64)
    return decay(**given, g=g)[0], K**-0.5 * (given["q"] * given["k"]).sum(-1, keepdim=True) * given["v"]


def _one_channel_is_a_gated_average(r: torch.Generator):
    f, i = torch.rand(2, 37, H, dtype=torch.float64, generator=r), _normal(r, 2, 37, H, V)
    one = torch.ones(2, 37, H, 1, dtype=torch.float64)
    h, states = torch.zeros(2, H, V, dtype=torch.float64), []
    for t in range(37):
        h = f[:, t, :, None] * h + (1 - f[:, t, :, None]) * i[:, t]
        states.append(h)
    return decay(one, (1 - f)[..., None], i, g=f.log(), scale=1.0)[0], torch.stack(states, 1)


def _weight_scales_keys(r: torch.Generator):
    given, g, w = _qkv(r, 2, 37), _log_decay(r, 2, 37, H, K), _weight(r, 2, 37)["w"]
    return decay(**given, g=g, w=w), decay(**(given | {"k": given["k"] * w[..., None]}), g=g)


def _shift_of_stabilizer(r: torch.Generator):
    given = _qkv(r, 2, 37) | _gates(2.0)(r, 2, 37)
    zeros = torch.zeros(2, H, K, V, dtype=torch.float64)
    shifted = MLSTMState(zeros, zeros[..., 0], torch.full((2, H), 7.0, dtype=torch.float64))
    return mlstm(**given)[0], mlstm(**given, state=shifted)[0]


register_op(
    Op(
        "decay",
        decay,
        BACKENDS,
        (
            _case("no decay"),
            _case("constant", lambda r, B, T: {"g": _log_decay(r, H)}),
            _case("scalar", _gate("g")),
            _case("key vector", _gate("g", K)),
            _case("value vector", _gate("gv", V)),
            _case("scalar key, vector value", _gate("g"), _gate("gv", V)),
            _case("key and value vector", _gate("g", K), _gate("gv", V)),
            _case("bonus", _gate("g", K), _bonus),
            _case("scalar bonus", _gate("g"), _bonus),
            _case("value bonus", _gate("gv", V), _bonus),
            _case("no decay, bonus", _bonus),
            _case("normaliser", normalize=True),
            _case("scalar normaliser", _gate("g"), normalize=True),
            _case("vector normaliser", _gate("g", K), normalize=True),
            _case("bonus normaliser", _gate("g", K), lambda r, B, T: {"u": _normal(r, H, K).abs()}, normalize=True),
            _case("write weight", _gate("g"), _weight),
            _case("vector write weight", _gate("g", K), _weight),
            _case("shared heads", _gate("g"), heads=1),
            _case("shared heads, vector", _gate("g", K), _weight, heads=1),
            _case("hostile scalar", _hostile_gate("g"), hostile=True),
            _case("hostile key vector", _hostile_gate("g", K), hostile=True),
            _case("hostile value vector", _hostile_gate("gv", V), hostile=True),
            _case("hostile bonus", _hostile_gate("g", K), _bonus, hostile=True),
            _case("large", _gate("g"), _large, hostile=True),
            _case("large, vector", _gate("g", K), _large, hostile=True),
            _case("zero keys", _gate("g"), _no_keys, hostile=True),
            _case("zero keys, normaliser", _gate("g"), _no_keys, normalize=True, eps=1e-6, hostile=True),
            _case("identical keys", _gate("g", K), _same_keys, hostile=True),
        ),
        cost,
        identities=(
            Identity("reduces to linear attention when g = 0", _zero_gate_is_no_gate),
            Identity("a vector gate constant over K is the scalar gate", _constant_vector_is_scalar),
            Identity("a gate constant over time is retention", _constant_gate_is_retention),
            Identity("the normaliser is a column of ones in v", _ones_column_is_normaliser),
            Identity("exclusive(q exp g, u = 0) is inclusive without the own token", _exclusive_from_inclusive),
            Identity("the bonus adds scale (q.u.k) v", _bonus_is_own_token),
            Identity("g = -inf everywhere reads only the own token", _full_forgetting_reads_own_token),
            Identity("HGRN: K = 1 is a gated moving average", _one_channel_is_a_gated_average),
            Identity("the write weight scales the keys", _weight_scales_keys),
        ),
    )
)

register_op(
    Op(
        "mlstm",
        mlstm,
        BACKENDS,
        (
            _mlstm_case("gates", _gates(2.0)),
            _mlstm_case("closed gates", _gates(1.0, -10.0)),
            _mlstm_case("eps", _gates(2.0), eps=1e-6),
            _mlstm_case("hostile gates", _hostile_gates, hostile=True),
            _mlstm_case("large gates", _gates(8.0), hostile=True),
            _mlstm_case("zero keys", _gates(2.0), _no_keys, hostile=True),
        ),
        cost,
        constants=("m",),
        identities=(Identity("the output does not depend on the stabiliser", _shift_of_stabilizer),),
    )
)
