"""Sample inputs of the delta engine, one case a mode: registering them is what tests every backend in that mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import Case, Identity, Op, register_op
from ..decay import decay
from . import BACKENDS, cost, delta, dplr
from .dplr import BACKENDS as UNTIED_BACKENDS
from .dplr import cost as untied_cost
from .kept import kernels_cover
from .reference import normalized
from .state import DeltaState

H, K, V = 2, 8, 6

Extra = Callable[[torch.Generator, int, int], dict[str, Any]]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def _log_decay(generator: torch.Generator, *shape: int) -> Tensor:
    """Log-decays from about -1e-3 to about -8, as layers produce them."""
    return -torch.exp(2 * _normal(generator, *shape) - 2)


def _given(generator: torch.Generator, B: int, T: int, heads: int = H, substeps: int = 1) -> dict[str, Any]:
    """Keys of length one and a scalar beta in (0, 1)."""
    R = T * substeps
    return {
        "q": _normal(generator, B, T, heads, K),
        "k": normalized(_normal(generator, B, R, heads, K)),
        "v": _normal(generator, B, R, H, V),
        "beta": _uniform(generator, B, R, H),
    }


def _state(generator: torch.Generator, rows: int) -> DeltaState:
    return DeltaState(_normal(generator, rows, H, K, V))


def _gate(*tail: int) -> Extra:
    return lambda r, B, T: {"g": _log_decay(r, B, T, H, *tail)}


def _hostile_gate(*tail: int) -> Extra:
    """Tokens that keep everything, forget mildly, fully and exactly (-inf), mixed over tokens, heads and channels."""
    palette = torch.tensor([0.0, -1e-4, -1.0, -20.0, -200.0, -1e4, -torch.inf], dtype=torch.float64)
    return lambda r, B, T: {"g": palette[torch.randint(len(palette), (B, T, H, *tail), generator=r)]}


def _channelwise(substeps: int = 1) -> Extra:
    def make(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
        R = T * substeps
        return {"beta": _uniform(r, B, R, H, K), "w": _uniform(r, B, R, H, V)}

    return make


def _reflections(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """Every token has the same key and the largest beta there is: the state along it changes sign at each."""
    return {
        "k": _normal(r, 1, 1, H, K).expand(B, T, H, K).clone(),
        "beta": torch.full((B, T, H), 2.0, dtype=torch.float64),
    }


def _large(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """Queries and keys before their norm: of 1e4, and in places zero."""
    alive = (_uniform(r, B, T, 1, 1) > 0.2).double()
    return {"q": 1e4 * alive * _normal(r, B, T, H, K), "k": 1e4 * alive.flip(1) * _normal(r, B, T, H, K)}


def _case(name: str, *extras: Extra, heads: int = H, **options) -> Case:
    """A case from q, k, v, beta and further arguments; ``options`` are constant keyword arguments of the op."""
    hostile = options.pop("hostile", False)

    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = _given(generator, B, T, heads, options.get("substeps", 1)) | options
        for extra in extras:
            given |= extra(generator, B, T)
        return given

    time = ("q", "k", "v", "beta", "g", "w")
    sample = make(torch.Generator(), 1, 1)
    backends = BACKENDS if kernels_cover(sample["q"].float(), options.get("substeps", 1)) else BACKENDS[:2]
    return Case(name, make, time, _state, keep_fp32=("beta", "g", "w"), hostile=hostile, backends=backends)


def _untied(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """As RWKV-7 makes them: ``a`` a unit vector, ``b`` the same scaled per channel, with the opposite sign."""
    a = normalized(_normal(r, B, T, H, K))
    return {
        "q": _normal(r, B, T, H, K),
        "k": _normal(r, B, T, H, K),
        "v": _normal(r, B, T, H, V),
        "a": -a,
        "b": a * _uniform(r, B, T, H, K),
    }


def _untied_case(name: str, *extras: Extra, hostile: bool = False) -> Case:
    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = _untied(generator, B, T)
        for extra in extras:
            given |= extra(generator, B, T)
        return given

    return Case(name, make, ("q", "k", "v", "a", "b", "g"), _state, keep_fp32=("g",), hostile=hostile)


def _independent(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"a": 0.3 * _normal(r, B, T, H, K), "b": 0.3 * _normal(r, B, T, H, K)}


# Identities


def _zero_gate_is_no_gate(r: torch.Generator):
    given = _given(r, 2, 37)
    return delta(**given, g=torch.zeros(2, 37, H, K, dtype=torch.float64)), delta(**given)


def _constant_vector_is_scalar(r: torch.Generator):
    given, g = _given(r, 2, 37), _log_decay(r, 2, 37, H)
    return delta(**given, g=g[..., None].expand(-1, -1, -1, K)), delta(**given, g=g)


def _equal_channels_are_scalar(r: torch.Generator):
    given, g = _given(r, 2, 37), _log_decay(r, 2, 37, H, K)
    beta = given["beta"][..., None]
    wide = given | {"beta": beta.expand(-1, -1, -1, K), "w": beta.expand(-1, -1, -1, V)}
    return delta(**wide, g=g), delta(**given, g=g)


def _no_erase_is_decay(r: torch.Generator):
    given, g = _given(r, 2, 37), _log_decay(r, 2, 37, H, K)
    w = _uniform(r, 2, 37, H, V)
    given["beta"] = torch.zeros_like(given["beta"])
    o, S = delta(**given, g=g, w=w)
    want, S_want = decay(given["q"], given["k"], w * given["v"], g)
    return (o, S.S), (want, S_want.S)


def _idle_substeps(r: torch.Generator):
    given, g = _given(r, 2, 37, substeps=3), _log_decay(r, 2, 37, H)
    beta = given["beta"].unflatten(1, (37, 3))
    beta[:, :, 1:] = 0
    one: dict[str, Any] = {name: x if name == "q" else x[:, ::3] for name, x in given.items()}
    return delta(**given, g=g, substeps=3), delta(**one, g=g)


def _substeps_are_tokens(r: torch.Generator):
    given, g = _given(r, 2, 19, substeps=2), _log_decay(r, 2, 19, H)
    long: dict[str, Any] = given | {
        "q": given["q"].repeat_interleave(2, 1),
        "g": torch.stack([g, torch.zeros_like(g)], 2).flatten(1, 2),
    }
    o, S = delta(**long)
    return (o[:, 1::2], S), delta(**given, g=g, substeps=2)


def _two_equal_reflections(r: torch.Generator):
    k, state = _normal(r, 2, 1, H, K).repeat_interleave(2, 1), _state(r, 2)
    beta = 2 / k.square().sum(-1)
    return delta(k[:, :1], k, torch.zeros_like(k[..., :V]), beta, substeps=2, state=state)[1], state


def _exact_overwrite(r: torch.Generator):
    keys = torch.linalg.qr(_normal(r, K, K))[0]
    order = torch.cat([torch.arange(K), torch.randint(K, (29,), generator=r)])  # every key at least once
    k, v = keys[order][None, :, None], _normal(r, 1, 37, 1, V)
    latest = torch.stack([v[0, (order == i).nonzero().max(), 0] for i in range(K)])
    return keys @ delta(k, k, v, torch.ones_like(k[..., 0]))[1].S[0, 0], latest


def _tied_is_untied(r: torch.Generator):
    given, g = _given(r, 2, 37), _log_decay(r, 2, 37, H, K)
    beta = given.pop("beta")[..., None]
    untied = given | {"a": -beta * given["k"] * g.exp(), "b": given["k"], "v": beta * given["v"]}
    return dplr(**untied, g=g), delta(**given, beta=beta[..., 0], g=g, scale=1.0)


def _untied_in_two_substeps(r: torch.Generator):
    given, g = _untied(r, 2, 19), _log_decay(r, 2, 19, H, K)
    zero = torch.zeros_like(given["v"])

    def pairs(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], 2).flatten(1, 2)

    k = pairs(given["b"], given["k"])
    erase = pairs(-given["a"] * (-g).exp() / given["b"], torch.zeros_like(g))
    v, w = pairs(zero, given["v"]), torch.ones(2, 38, H, V, dtype=torch.float64)
    return dplr(**given, g=g), delta(given["q"], k, v, erase, g, w, scale=1.0, substeps=2)


def _nothing_to_erase_is_decay(r: torch.Generator):
    given, g = _untied(r, 2, 37), _log_decay(r, 2, 37, H, K)
    given["a"] = torch.zeros_like(given["a"])
    o, S = dplr(**given, g=g)
    want, S_want = decay(given["q"], given["k"], given["v"], g, scale=1.0)
    return (o, S.S), (want, S_want.S)


register_op(
    Op(
        "delta",
        delta,
        BACKENDS,
        (
            _case("no decay", l2norm=True),
            _case("scalar", _gate(), l2norm=True),
            _case("vector", _gate(K), l2norm=True),
            _case("channel-wise", _gate(K), _channelwise(), l2norm=True),
            _case("shared heads", _gate(), heads=1, l2norm=True),
            _case("shared heads, channel-wise", _gate(K), _channelwise(), heads=1),
            _case("substeps", _gate(), substeps=3, l2norm=True),
            _case("substeps, channel-wise", _gate(K), _channelwise(2), substeps=2),
            _case("hostile scalar", _hostile_gate(), hostile=True, l2norm=True),
            _case("hostile vector", _hostile_gate(K), _channelwise(), hostile=True, l2norm=True),
            _case("reflections", _reflections, hostile=True, l2norm=True),
            _case("large", _gate(), _large, hostile=True, l2norm=True),
        ),
        cost,
        identities=(
            Identity("is DeltaNet when g = 0", _zero_gate_is_no_gate),
            Identity("a vector gate constant over K is the scalar gate", _constant_vector_is_scalar),
            Identity("equal channels of beta and w are a scalar beta", _equal_channels_are_scalar),
            Identity("without erasing it is the decay engine", _no_erase_is_decay),
            Identity("substeps that neither erase nor write do nothing", _idle_substeps),
            Identity("substeps are tokens of which the first decays and the last is read", _substeps_are_tokens),
            Identity("two equal reflections in one token leave the state as it was", _two_equal_reflections),
            Identity("orthonormal keys and beta = 1 hold the latest value of every key", _exact_overwrite),
        ),
    )
)

register_op(
    Op(
        "dplr",
        dplr,
        UNTIED_BACKENDS,
        (
            _untied_case("vector", _gate(K)),
            _untied_case("scalar", _gate(), _independent),
            _untied_case("hostile vector", _hostile_gate(K), hostile=True),
            _untied_case("hostile scalar", _hostile_gate(), hostile=True),
        ),
        untied_cost,
        identities=(
            Identity("is delta when a = -beta k exp(g), b = k, v = beta v", _tied_is_untied),
            Identity("is delta with a step that erases and one that writes", _untied_in_two_substeps),
            Identity("is the decay engine when a = 0", _nothing_to_erase_is_decay),
        ),
    )
)
