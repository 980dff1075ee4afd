"""Passes of the decay engine compute the same, to the last bit, however their tiles come, in the interpreter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreted import in_the_interpreter, run_interpreted, starts_the_interpreter
from linnet.ops import DecayState, MLSTMState, Segments, decay, mlstm

T, H = 128, 2
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "none, heads of 64": {"K": 64},
    "constant, heads of 64": {"gate": "constant", "K": 64, "learned": False, "heads": 1},
    "constant, heads of 64, packed": {"gate": "constant", "K": 64, "learned": False, "lengths": [64, 0, 70, 58]},
    "constant, grouped": {"gate": "constant", "heads": 1},
    "scalar": {"gate": "scalar", "write": True},
    "scalar, chunks that are not full": {"gate": "scalar", "write": True, "T": 100},
    "scalar, packed": {"gate": "scalar", "lengths": [64, 0, 70, 58]},
    "scalar, exclusive": {"gate": "scalar", "bonus": True},
    "vector": {"gate": "vector"},
    "bonus, normalised": {"gate": "vector", "bonus": True, "normalize": True},
    "mlstm": {"gate": "mlstm"},
    "mlstm, packed": {"gate": "mlstm", "lengths": [64, 0, 70, 58]},
}


@pytest.mark.slow
@starts_the_interpreter
def test_tiles_in_the_interpreter() -> None:
    run_interpreted(__file__)


def results(
    gate: str | None = None,
    heads: int = H,
    write: bool = False,
    bonus: bool = False,
    normalize: bool = False,
    K: int = 16,
    learned: bool = True,
    T: int = T,
    lengths: list[int] | None = None,
) -> list[Tensor]:
    """What a call and its backward pass compute. In fp16: in fp32 no tiles are moved by descriptors."""
    torch.manual_seed(0)
    rows, batch, tokens = (1, 1, T) if lengths is None else (len(lengths), 1, sum(lengths))
    q, k = (torch.rand(batch, tokens, heads, K).half() - 0.25 for _ in range(2))
    given: dict[str, Tensor] = {"q": q, "k": k, "v": torch.randn(batch, tokens, H, K).half()}
    options: dict[str, Any] = {"backend": "triton"}
    if lengths is not None:
        options["segments"] = Segments.from_lengths(lengths)
    S, z = 0.1 * torch.randn(rows, H, K, K), 0.1 * torch.rand(rows, H, K)
    if gate == "mlstm":
        given |= {"i": torch.randn(batch, tokens, H), "f": torch.randn(batch, tokens, H) + 2}
        leaves = [x.requires_grad_() for x in (*given.values(), S, z)]
        o, last = mlstm(**given, **options, state=MLSTMState(S, z, torch.zeros(rows, H)))
    else:
        sizes = {"constant": (H,), "scalar": (batch, tokens, H), "vector": (batch, tokens, H, K)}
        if gate is not None:
            given["g"] = -torch.rand(sizes[gate]) / 20
            if gate != "constant":
                given["g"][:, 70] = -200.0  # a reset, with vector gates in a chunk that is walked token by token
        if write:
            given["w"] = torch.rand(batch, tokens, H)
        if bonus:
            given["u"] = torch.rand(H, K)
        wanted = [x for name, x in given.items() if learned or name != "g"]
        leaves = [x.requires_grad_() for x in (*wanted, S, *([z] if normalize else []))]
        o, last = decay(**given, **options, normalize=normalize, state=DecayState(S, z if normalize else None))
    loss = (o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() + last.S.square().sum()
    return [o, last.S, *torch.autograd.grad(loss, leaves)]


@in_the_interpreter
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_tiles_come_either_way(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    walks = import_module("linnet.ops.decay.launch_walks")
    pieces = 2 if "lengths" not in mode else 7
    monkeypatch.setattr(import_module("linnet.ops.decay"), "_pieces", lambda *_: (64, pieces))
    by_address = results(**mode)
    moved = []
    monkeypatch.setattr(walks, "has_tma", lambda device: True)
    monkeypatch.setattr(
        walks.TensorDescriptor, "from_tensor", staticmethod(described(walks.TensorDescriptor.from_tensor, moved))
    )
    for one, other in zip(by_address, results(**mode), strict=True):
        assert bool(one.isfinite().all()) and torch.equal(one, other)
    assert moved


def described(make: Any, moved: list[Any]) -> Any:
    """As ``make``, and what was asked for is noted."""

    def from_tensor(t: Tensor, block: list[int]) -> Any:
        moved.append(block)
        return make(t, block)

    return from_tensor
