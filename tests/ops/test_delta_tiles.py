"""The delta engine's kernels compute the same, to the last bit, however their tiles come, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interpreted import in_the_interpreter, run_interpreted, starts_the_interpreter

MODES: dict[str, dict[str, Any]] = {
    "scalar": {},
    "scalar, several tiles of keys and values": {"width": 64},
    "no gate, parts": {"gate": None, "length": 1},
    "vector": {"gate": "vector"},
    "erase and write, parts": {"gate": "vector", "channelwise": True, "length": 1},
    "erase and write, several tiles of keys and values": {"gate": None, "channelwise": True, "width": 64},
    "substeps": {"substeps": 2},
    "substeps that leave rows of a chunk": {"substeps": 3},
    "vector, substeps": {"gate": "vector", "substeps": 2},
    "untied": {"gate": "vector", "untied": True, "substeps": 2},
    "256 keys": {"keys": 256, "width": 64},
}


@pytest.mark.slow
@starts_the_interpreter
def test_tiles_in_the_interpreter() -> None:
    run_interpreted(__file__)


def results(
    gate: str | None = "scalar",
    channelwise: bool = False,
    untied: bool = False,
    substeps: int = 1,
    length: int = 9,
    width: int = 32,  # no fewer than the rows of a chunk
    keys: int | None = None,  # as many as values unless given
) -> list[Tensor]:
    """What a call and its backward pass compute; the last chunk of a sequence is not full."""
    from linnet.ops.delta import launch

    generator = torch.Generator().manual_seed(0)
    B, T, H, K, V = 2, 37, 2, keys or width, width
    R, heads = (T, H) if untied else (T * substeps, 1)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) - 0.5

    q, k, v = random(B, T, heads, K), random(B, R, heads, K), random(B, R, H, V)
    g = None if gate is None else random(B, T, H, K)[..., 0 if gate == "scalar" else slice(None)] - 0.5
    beta = None if untied else random(B, R, H, K) + 0.5 if channelwise else random(B, R, H) + 0.5
    w = random(B, R, H, V) if channelwise else None
    ab = (random(B, T, H, K), random(B, T, H, K)) if untied else None
    given, options = (q, k, v, beta, g, w, random(B, H, K, V)), (None, 1.0, not untied, substeps)
    o, last, matrices, rows = launch.forward(*given, *options, True, ab, length)
    assert matrices is not None and rows is not None
    grads = launch.backward(*given, matrices, rows, *options, random(*o.shape), random(*last.shape), ab, length)
    return [o, last, *grads.values()]


@in_the_interpreter
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_tiles_come_either_way(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from linnet.ops.delta import launch

    settings = launch.launch_settings  # tiles as large either way
    monkeypatch.setattr(launch, "launch_settings", lambda *given: settings(*given[:5], True))
    by_address = results(**mode)
    monkeypatch.setattr(launch, "_copied", lambda *given: True)
    for one, other in zip(by_address, results(**mode), strict=True):
        assert bool(one.isfinite().all()) and torch.equal(one, other)
