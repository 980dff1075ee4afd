"""A decoding loop that owns its state lets the kernels of single tokens write over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import linnet
from interpreted import INTERPRETED, run_interpreted, starts_the_interpreter
from linnet.ops import ConvState, DecayState, DeltaState, MLSTMState, conv, decay, delta, dplr, mlstm
from linnet.ops.core import map_state, overwriting_states, state_tensors

B, H, K, V = 2, 2, 8, 80  # two blocks of values


@pytest.mark.slow
@starts_the_interpreter
def test_overwriting_in_the_interpreter() -> None:
    run_interpreted(__file__)


def given(generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    def draw(*tail: int) -> Tensor:
        return torch.randn(B, 1, H, *tail, generator=generator).to(device)

    keys = {name: draw(K) for name in ("q", "k", "a", "b", "vector")}
    return keys | {
        "taps": draw(V, 4)[0, 0].flatten(0, 1),
        "v": draw(V),
        "scalar": F.logsigmoid(draw()),
        "i": draw(),
        "f": draw(),
    }


def step(name: str, x: dict[str, Tensor], state: Any) -> tuple[Tensor, Any]:
    qkv = x["q"], x["k"], x["v"]
    if name == "delta":
        return delta(*qkv, x["i"].sigmoid(), x["scalar"], state=state)
    if name == "dplr":
        return dplr(*qkv, x["a"] / 8, x["b"] / 8, F.logsigmoid(x["vector"]), state=state)
    if name == "conv":
        return conv(x["v"].flatten(2), x["taps"], activation="silu", state=state)
    if name == "mlstm":
        return mlstm(*qkv, x["i"], x["f"], state=state)
    return decay(*qkv, x["scalar"], normalize=name == "normalised decay", state=state)


def start(name: str, device: torch.device) -> Any:
    S, z = torch.zeros(B, H, K, V, device=device), torch.zeros(B, H, K, device=device)
    states: dict[str, Callable[[], Any]] = {
        "conv": lambda: ConvState(torch.zeros(B, 3, H * V, device=device)),
        "decay": lambda: DecayState(S),
        "normalised decay": lambda: DecayState(S, z),
        "mlstm": lambda: MLSTMState(S, z, torch.zeros(B, H, device=device)),
    }
    return states.get(name, lambda: DeltaState(S))()


@pytest.mark.parametrize("name", ["decay", "normalised decay", "mlstm", "delta", "dplr", "conv"])
def test_the_same_in_the_same_memory(name: str, device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("started by the test above")
    kept = start(name, device)
    over = map_state(torch.clone, kept)
    memory = over[0].data_ptr()
    generator = torch.Generator().manual_seed(0)
    with linnet.backend("triton"), torch.no_grad():
        for _ in range(3):
            x = given(generator, device)
            before = [y.clone() for y in state_tensors(kept)]
            o, new = step(name, x, kept)
            assert all(torch.equal(a, b) for a, b in zip(state_tensors(kept), before, strict=True))
            with overwriting_states():
                o_over, over = step(name, x, over)
            assert torch.equal(o, o_over) and over[0].data_ptr() == memory
            assert all(torch.equal(a, b) for a, b in zip(state_tensors(new), state_tensors(over), strict=True))
            kept = new
