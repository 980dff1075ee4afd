"""Sample inputs of the attention engine, one case a mode: registering them is what tests every backend in that mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import Case, Identity, Op, Segments, register_op
from . import BACKENDS, attention, cost, merge
from .state import AttentionState

H, HKV, K, V = 4, 2, 8, 6


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _qkv(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {
        "q": _normal(generator, B, T, H, K),
        "k": _normal(generator, B, T, HKV, K),
        "v": _normal(generator, B, T, HKV, V),
    }


def _cache(slots: int, beyond: int = 0) -> Callable[[torch.Generator, int], AttentionState]:
    """A cache whose rows hold different numbers of tokens, one of them none at all; ``beyond`` tokens were cut off the
    fullest."""

    def make(generator: torch.Generator, rows: int) -> AttentionState:
        length = (slots + beyond) - torch.arange(rows) * max((slots + beyond) // max(rows - 1, 1), 1)
        length = length.clamp(min=0)
        real = torch.arange(slots) >= slots - length[:, None]
        k, v = _normal(generator, rows, slots, HKV, K), _normal(generator, rows, slots, HKV, V)
        return AttentionState(k * real[..., None, None], v * real[..., None, None], length)

    return make


def _case(
    name: str, slots: int, *extras: Callable[..., dict[str, Any]], beyond: int = 0, hostile: bool = False, **options
) -> Case:
    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        given = _qkv(generator, B, T) | options
        for extra in extras:
            given |= extra(generator, B, T)
        return given

    return Case(name, make, ("q", "k", "v"), _cache(slots, beyond), hostile=hostile)


def _single_key_head(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"q": _normal(r, B, T, HKV, K)}


def _sharp(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"q": 1e2 * _normal(r, B, T, H, K), "k": 1e2 * _normal(r, B, T, HKV, K)}


def _large_values(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"v": 1e4 * _normal(r, B, T, HKV, V)}


def _same_keys(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"k": _normal(r, 1, 1, HKV, K).expand(B, T, HKV, K).clone()}


def _no_keys(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    return {"k": torch.zeros(B, T, HKV, K, dtype=torch.float64)}


def _far_below(r: torch.Generator, B: int, T: int) -> dict[str, Any]:
    """Scores near -1e4 throughout: the softmax must not underflow to nothing."""
    return {"q": 1e2 + _normal(r, B, T, H, K), "k": -40 + _normal(r, B, T, HKV, K)}


def _wide_window(r: torch.Generator):
    given, state = _qkv(r, 2, 37), _cache(9)(r, 2)
    return attention(**given, window=46, state=state)[0], attention(**given, state=state)[0]


def _window_of_one(r: torch.Generator):
    given = _qkv(r, 2, 37)
    return attention(**given, window=1)[0], given["v"].repeat_interleave(H // HKV, 2)


def _shared_heads(r: torch.Generator):
    given = _qkv(r, 2, 37)
    repeated = {name: given[name].repeat_interleave(H // HKV, 2) for name in ("k", "v")}
    return attention(**given)[0], attention(given["q"], **repeated)[0]


def _merged_parts(r: torch.Generator):
    given, state = _qkv(r, 1, 37), _cache(9)(r, 1)
    new, _ = attention(**given, return_lse=True)
    whole, _ = attention(**given, state=state, return_lse=True)
    # What the cache alone contributes: the last query of a sequence sees everything, whatever the causal mask.
    seen = [
        attention(given["q"][:, t : t + 1].expand(-1, 9, -1, -1), state.k, state.v, return_lse=True)[0]
        for t in range(37)
    ]
    old = [torch.cat([x[:, -1:] for x in parts], 1) for parts in zip(*seen, strict=True)]
    return merge([old[0], new[0]], [old[1], new[1]]), whole


def _zero_queries(r: torch.Generator):
    given: dict[str, Any] = {**_qkv(r, 2, 37), "q": torch.zeros(2, 37, H, K, dtype=torch.float64)}
    count = torch.arange(1, 38, dtype=torch.float64)[:, None, None]
    mean = given["v"].cumsum(1) / count
    (o, lse), _ = attention(**given, return_lse=True)
    return (o, lse), (mean.repeat_interleave(H // HKV, 2), count[None, :, :, 0].log().expand(2, -1, H))


def _one_segment(r: torch.Generator):
    given = _qkv(r, 1, 37)
    return attention(**given, segments=Segments.from_lengths([37, 0]))[0], attention(**given)[0]


register_op(
    Op(
        name="attention",
        function=attention,
        backends=BACKENDS,
        cases=(
            _case("full", 9),
            _case("full, equal heads", 9, _single_key_head),
            _case("full with log-sum-exp", 9, return_lse=True),
            _case("window", 4, window=5, beyond=6),
            _case("window with log-sum-exp", 4, window=5, return_lse=True),
            _case("window wider than a block", 39, window=40, beyond=3),
            _case("window of one", 0, window=1, scale=0.7, beyond=3),
            _case("sharp", 9, _sharp, hostile=True),
            _case("sharp, windowed", 4, _sharp, window=5, hostile=True),
            _case("large values", 9, _large_values, hostile=True, return_lse=True),
            _case("identical keys", 9, _same_keys, hostile=True),
            _case("zero keys", 9, _no_keys, hostile=True, return_lse=True),
            _case("all scores far below zero", 0, _far_below, hostile=True, return_lse=True),
        ),
        cost=cost,
        chunk=32,
        fixed_state=False,
        identities=(
            Identity("a window of at least all tokens is full attention", _wide_window),
            Identity("a window of one returns the values", _window_of_one),
            Identity("shared key heads are repeated key heads", _shared_heads),
            Identity("merging the parts of a split key set gives the whole", _merged_parts),
            Identity("zero queries average the values", _zero_queries),
            Identity("one segment is no segments", _one_segment),
        ),
    )
)
