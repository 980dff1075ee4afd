"""Stored pairs of the decay engine, in Triton's interpreter. Wide heads in 16 bits have them, which the interpreter
does not multiply: here all do, in fp32 treated like 16 bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreted import in_the_interpreter, run_interpreted, starts_the_interpreter
from linnet.ops import DecayState, MLSTMState, Segments, decay, mlstm

PIECE = 32  # two chunks


@pytest.mark.slow
@starts_the_interpreter
def test_stored_pairs_in_the_interpreter() -> None:
    run_interpreted(__file__)


def inputs(mode: str, lengths: list[int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    T, H, K, V, rows = sum(lengths), 2, 20, 36, len(lengths)
    heads = 1 if mode == "constant" else H
    given = {"q": torch.randn(1, T, heads, K), "k": torch.randn(1, T, heads, K), "v": torch.randn(1, T, H, V)}
    if mode == "mlstm":
        given |= {"i": torch.randn(1, T, H), "f": torch.randn(1, T, H) + 2, "z": torch.rand(rows, H, K)}
    if mode == "scalar":
        given |= {"g": -torch.rand(1, T, H), "w": torch.rand(1, T, H)}
        given["g"][:, 5] = -200.0  # a reset
    if mode == "constant":
        given["g"] = -torch.rand(H)
    return given | {"S": torch.randn(rows, H, K, V)}


def run(mode: str, lengths: list[int], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Reading, final state and gradients."""
    given = {name: x.to(dtype).requires_grad_() for name, x in inputs(mode, lengths).items()}
    arguments: dict[str, Any] = {name: x for name, x in given.items() if name not in ("S", "z")}
    segments = Segments.from_lengths(lengths) if len(lengths) > 1 else None
    arguments |= {"segments": segments, "backend": backend}
    if mode == "mlstm":
        state: Any = MLSTMState(given["S"], given["z"], torch.zeros(len(lengths), 2, dtype=dtype))
        o, state = mlstm(**arguments, eps=1e-3, state=state)
    else:
        o, state = decay(**arguments, state=DecayState(given["S"]))
    found = {"o": o, "last S": state.S}
    weights = [torch.arange(x.numel(), dtype=dtype).view(x.shape).cos() for x in found.values()]
    gradients = torch.autograd.grad(list(found.values()), list(given.values()), weights)
    return found | dict(zip(given, gradients, strict=True))


@in_the_interpreter
@pytest.mark.parametrize(
    ("mode", "lengths"), [("none", [20]), ("constant", [20]), ("scalar", [37]), ("mlstm", [34, 0, 1])]
)
def test_stored_pairs(mode: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("launch", "launch_walks"):
        monkeypatch.setattr(import_module(f"linnet.ops.decay.{name}"), "EXACT", None)
    monkeypatch.setattr(import_module("linnet.ops.decay.launch_walks"), "pairs_stored", lambda *_: True)
    pieces = -(-lengths[0] // PIECE) if len(lengths) == 1 else sum(lengths) // PIECE + len(lengths)
    monkeypatch.setattr(import_module("linnet.ops.decay"), "_pieces", lambda *_: (PIECE, pieces))
    found, exact = run(mode, lengths, "triton", torch.float32), run(mode, lengths, "reference", torch.float64)
    for name, x in exact.items():
        error = float(((found[name] - x).abs().max() / x.abs().max()).detach())
        assert error < 1e-5, f"{name}: {error}"
