"""Pairs of tokens in the decay engine, in Triton's interpreter: stored ones, and what they bring to gates.

In bfloat16 passes differ from those in fp32, and wide heads store pairs. The interpreter does not multiply that: here
fp32 is treated like it.
"""

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
def test_pairs_in_the_interpreter() -> None:
    run_interpreted(__file__)


def inputs(mode: str, lengths: list[int], V: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    T, H, K, rows = sum(lengths), 2, 20, len(lengths)
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


def run(
    mode: str, lengths: list[int], backend: str, dtype: torch.dtype, V: int = 36, learned: bool = True
) -> dict[str, Tensor]:
    """Reading, final state and gradients."""
    given = {name: x.to(dtype).requires_grad_(learned or name != "g") for name, x in inputs(mode, lengths, V).items()}
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
    wanted = {name: x for name, x in given.items() if x.requires_grad}
    gradients = torch.autograd.grad(list(found.values()), list(wanted.values()), weights)
    return found | dict(zip(wanted, gradients, strict=True))


def close(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, x in exact.items():
        error = float(((found[name] - x).abs().max() / x.abs().max()).detach())
        assert error < 1e-5, f"{name}: {error}"


@in_the_interpreter
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("mode", "lengths"), [("none", [32]), ("constant", [20]), ("scalar", [37]), ("mlstm", [34, 0, 1])]
)
def test_pairs_in_16_bits(mode: str, lengths: list[int], stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored, as for wide heads, or made by each pass; states backward in time without their scale."""
    for name in ("launch", "launch_walks"):
        monkeypatch.setattr(import_module(f"linnet.ops.decay.{name}"), "EXACT", None)
    monkeypatch.setattr(import_module("linnet.ops.decay.launch_walks"), "pairs_stored", lambda *_: stored)
    monkeypatch.setattr(import_module("linnet.ops.decay.launch_walks"), "scale_apart", lambda _: True)
    pieces = -(-lengths[0] // PIECE) if len(lengths) == 1 else sum(lengths) // PIECE + len(lengths)
    monkeypatch.setattr(import_module("linnet.ops.decay"), "_pieces", lambda *_: (PIECE, pieces))
    close(run(mode, lengths, "triton", torch.float32), run(mode, lengths, "reference", torch.float64))


@in_the_interpreter
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("mode", "lengths"), [("none", [30]), ("none", [37]), ("constant", [32]), ("constant", [34, 0, 1])]
)
def test_gradients_of_keys_and_values_in_one_walk(
    mode: str, lengths: list[int], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over whole sequences and in pieces, with states that have their scale or lack it."""
    asked = []
    monkeypatch.setattr(import_module("linnet.ops.decay.launch"), "gradients_together", lambda *x: not asked.append(x))
    monkeypatch.setattr(import_module("linnet.ops.decay.launch_walks"), "scale_apart", lambda _: apart)
    pieces = -(-lengths[0] // PIECE) if len(lengths) == 1 else sum(lengths) // PIECE + len(lengths)
    monkeypatch.setattr(import_module("linnet.ops.decay"), "_pieces", lambda *_: (PIECE, pieces))
    given: dict[str, Any] = {"V": 20, "learned": False}
    exact = run(mode, lengths, "reference", torch.float64, **given)
    close(run(mode, lengths, "triton", torch.float32, **given), exact)
    assert asked


@in_the_interpreter
@pytest.mark.parametrize("mode", ["key vector", "value vector", "bonus"])
def test_gates_that_nothing_is_read_behind(mode: str) -> None:
    """Their gradient is what earlier tokens wrote less what they read, which is nothing, however those were rounded."""
    torch.manual_seed(0)
    B, T, H, K = 1, 4, 2, 8  # of the tokens one writes, the next reads, the others do neither
    V = 1 if mode == "value vector" else K
    q, k = torch.zeros(2, B, T, H, K, dtype=torch.float16)
    v, do = torch.zeros(2, B, T, H, V, dtype=torch.float16)
    q[:, 1], k[:, 0], v[:, 0, :, 0], do[:, 1, :, 0] = torch.randn(B, H, K), torch.randn(B, H, K), 1.0, 1.0
    if mode == "value vector":  # the product of the others is 1 then, so only what is multiplied gets rounded
        q[:, 1], k[:, 0] = torch.eye(K)[0], torch.eye(K)[0]
        v[:, 0], do[:, 1] = torch.randn(B, H, V), torch.randn(B, H, V)
    g, S = -torch.rand(B, T, H, V if mode == "value vector" else K) / 4, torch.zeros(B, H, K, V)
    gate = {"gv" if mode == "value vector" else "g": g.requires_grad_()}
    u = torch.zeros(H, K) if mode == "bonus" else None
    o, _ = decay(q, k, v, **gate, u=u, scale=1.0, state=DecayState(S), backend="triton")
    (dg,) = torch.autograd.grad(o, g, do)
    assert dg[:, :2].any() or mode == "bonus"
    assert dg[:, 2:].abs().max() < 1e-6


@in_the_interpreter
def test_a_gate_before_a_large_pair() -> None:
    """What the state before it brings to the first gate is not lost beside what its token writes."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 2, 8).unbind()
    S, dS = torch.randn(2, 1, 2, 8, 8).unbind()
    g = (-torch.rand(1, 1, 2, 8)).requires_grad_()
    _, last = decay(q, 1e6 * k, v, g, state=DecayState(S), backend="triton")
    (dg,) = torch.autograd.grad(last.S, g, dS)
    expected = g.exp() * (S * dS).sum(-1)[:, None]
    torch.testing.assert_close(dg, expected, rtol=1e-5, atol=1e-5)


@in_the_interpreter
@pytest.mark.parametrize("bonus", [False, True])
def test_gates_that_forget_all_have_no_gradient(bonus: bool) -> None:
    torch.manual_seed(0)
    q, k, v, S = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4), torch.randn(1, 2, 4, 4)
    g = -torch.rand(1, 9, 2, 4)
    g[torch.rand(g.shape) < 0.3] = -torch.inf
    u = torch.randn(2, 4) if bonus else None
    o, _ = decay(q, k, v, g.requires_grad_(), u=u, state=DecayState(S), backend="triton")
    (dg,) = torch.autograd.grad(o.sum(), g)
    assert (dg[g == -torch.inf] == 0).all() and dg[g > -torch.inf].any()


@in_the_interpreter
@pytest.mark.parametrize("lengths", [[70], [80, 0, 45]])
def test_rounding_errors_do_not_outlast_what_is_forgotten(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What <S, dS> at a piece's ends says of a gate's gradient, and not only what rounded terms add up to."""
    monkeypatch.setattr(import_module("linnet.ops.decay"), "_pieces", lambda *_: (64, 2 + 2 * (len(lengths) > 1)))
    torch.manual_seed(0)
    T, H, K = sum(lengths), 2, 16
    q, k, v, do = torch.randn(4, 1, T, H, K).half()
    S = DecayState(torch.randn(len(lengths), H, K, K))
    segments = Segments.from_lengths(lengths) if len(lengths) > 1 else None
    g = torch.full((1, T, H), -0.7, requires_grad=True)
    o, _ = decay(q, 0 * k, v, g, state=S, segments=segments, backend="triton")
    (dg,) = torch.autograd.grad(o, g, do)
    assert dg[:, :3].abs().max() > 1
    assert dg[:, 30:64].abs().max() < 1e-6


@in_the_interpreter
def test_value_gates_do_not_gather_the_rounding_of_dv() -> None:
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 4, 64, 2, 16).half()
    gv = (-torch.rand(4, 64, 2, 16) / 50).requires_grad_()
    (found,) = torch.autograd.grad(decay(q, k, v, gv=gv, backend="triton")[0], gv, do)
    exact = decay(q.double(), k.double(), v.double(), gv=gv.double(), backend="reference")[0]
    (want,) = torch.autograd.grad(exact, gv, do.double())
    assert (found - want).square().mean().sqrt() < 4.6e-4 * want.square().mean().sqrt()


def test_tiles_of_tensors_that_lie_anywhere() -> None:
    x = torch.randn(1 + 20 * 2 * 16).half()[1:].view(1, 20, 2, 16)  # not at a multiple of 16 bytes
    call = import_module("linnet.ops.decay.launch_walks").Call(x, x, None, None, None, None, 1.0, 64)
    tile = call.tile(x, 16, True)
    assert tile.base.data_ptr() % 16 == 0
    assert torch.equal(tile.base, x.view(20, 32))
