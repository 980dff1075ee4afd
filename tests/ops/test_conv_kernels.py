"""The kernels of the short convolution compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from ahead_of_time import BLACKWELL, HOPPER, MI300, SHARED_MEMORY, Launch, build, launches
from torch import Tensor

from linnet.ops.conv import TAPS, launch

CALLS = {
    "as in a layer": {},
    "with everything": {"bias": True, "state": True},
    "packed": {"state": True, "packed": True},
    "fp32": {"dtype": torch.float32, "bias": True},
    "widest": {"W": max(TAPS)},
    "narrowest, odd": {"W": min(TAPS), "D": 37, "T": 5},
}


def recorded(
    monkeypatch: pytest.MonkeyPatch,
    *,
    W: int = 4,
    T: int = 4096,
    D: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    state: bool = False,
    packed: bool = False,
    taps: bool = True,
) -> list[Launch]:
    """What forward, backward and a step of a call launch on a GPU."""
    tile, length, gpu = launch.tile, launch.length, torch.device("cuda")
    monkeypatch.setattr(launch, "tile", lambda W, D, device, **how: tile(W, D, gpu, **how))
    monkeypatch.setattr(launch, "length", lambda tokens, columns, device, **how: length(tokens, columns, gpu, **how))
    x, weight = torch.empty(1, T, D, dtype=dtype), torch.empty(D, W, dtype=dtype)
    offset = torch.empty(D, dtype=dtype) if bias else None
    tail = torch.empty(1, W - 1, D) if state else None
    cu, ids = torch.tensor([0, T], dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
    where: tuple[Tensor | None, ...] = (cu, ids) if packed else (None, None)

    def call() -> None:
        launch.forward(x, weight, offset, tail, *where, True, True)
        launch.backward(x, weight, offset, tail, *where, True, x, tail, taps, state)
        if tail is not None:
            launch.step(x[:, :1], weight, offset, tail, True)

    return launches(call)


def spilled(ptx: str) -> int:
    """Bytes of stack of a kernel, before its registers are assigned."""
    return sum(int(n) for n in re.findall(r"\.local .*\[(\d+)\]", ptx))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_hopper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, **CALLS[name]):
        built = build(one, HOPPER)
        assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
        assert not spilled(built.asm["ptx"])
        if one.kernel.__name__ != "sum_kernel":  # a thread keeps its channels
            assert "convert_layout" not in built.asm["ttgir"]


@pytest.mark.parametrize("target", [BLACKWELL, MI300], ids=["blackwell", "mi300"])
def test_compiles_for_other_hardware(target, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, **CALLS["with everything"]):
        assert build(one, target).metadata.shared <= SHARED_MEMORY[target]


def test_no_length_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths, and with them other runs, find the kernels that there are."""
    general = {"T", "L", "runs", "units"}
    for one in recorded(monkeypatch):
        assert {p.name for p in one.kernel.params if p.do_not_specialize} == general & set(one.kernel.arg_names)
    short, long = (recorded(monkeypatch, T=T) for T in (64, 2**17))
    assert [one.arguments["L"] for one in short[:2]] != [one.arguments["L"] for one in long[:2]]


def test_parts_of_wider_tokens_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, weight = torch.empty(2, 9, 48), torch.empty(16, 4)
    x = wide[..., 16:32]
    (one,) = launches(lambda: launch.forward(x, weight, None, None, None, None, False))
    assert one.arguments["x_ptr"].data_ptr() == x.data_ptr()
    assert (one.arguments["x_row"], one.arguments["x_step"]) == (9 * 48, 48)


def test_whole_words_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the number of channels is a multiple of 4, though not of the 16 that Triton notices by itself."""
    for one in recorded(monkeypatch, D=1000)[:2]:
        moved = re.findall(r"ld\.global\S*", build(one, HOPPER).asm["ptx"])
        assert "ld.global.v2.b32" in moved


def test_frozen_taps_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.kernel.__name__ for one in recorded(monkeypatch, taps=False)] == ["forward_kernel", "backward_kernel"]
