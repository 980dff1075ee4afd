"""The scan kernels compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from ahead_of_time import BLACKWELL, HOPPER, MI300, SHARED_MEMORY, Launch, build, launches

from linnet.ops.scan import launch, launch_selective
from linnet.ops.scan.kernels_selective import carry_kernel

CALLS = {
    "real": ("real", torch.bfloat16, 4096, 2048, False),
    "real, many channels": ("real", torch.bfloat16, 4096, 8192, False),
    "real, two rounds of programs too many": ("real", torch.float32, 4096, 4096, False),
    "teams": ("real", torch.bfloat16, 32768, 1024, False),
    "packed, few programs": ("minmax", torch.bfloat16, 4096, 2048, True),
    "one channel": ("real", torch.float32, 2**20, 1, False),
    "packed": ("real", torch.bfloat16, 4096, 48, True),
    "packed channel": ("minmax", torch.float32, 4096, 1, True),
    "complex": ("complex", torch.float32, 4096, 64, False),
    "block": ("block", torch.float32, 4096, 64, False),
    "minmax": ("minmax", torch.bfloat16, 4096, 2048, False),
    "constant": ("real", torch.bfloat16, 4096, 2048, False, True),
    "constant, few channels": ("real", torch.float32, 17, 6, False, True),
    "constant, complex": ("complex", torch.float32, 100, 64, False, True),
    "constant, block": ("block", torch.float32, 100, 64, False, True),
    "constant, packed": ("real", torch.bfloat16, 4096, 48, True, True),
}


def recorded(
    monkeypatch: pytest.MonkeyPatch,
    algebra: str,
    dtype: torch.dtype,
    T: int,
    D: int,
    packed: bool,
    constant: bool = False,
) -> list[Launch]:
    """What forward and backward of a call launch on a GPU; ``constant``: with one factor for all tokens."""
    tile, team, gpu = launch.tile, launch.team, torch.device("cuda")
    monkeypatch.setattr(launch, "tile", lambda algebra, rows, D, device, **how: tile(algebra, rows, D, gpu, **how))
    monkeypatch.setattr(
        launch, "team", lambda algebra, rows, T, D, device, **how: team(algebra, rows, T, D, gpu, **how)
    )
    monkeypatch.setattr(launch, "multiprocessors", lambda *given: 132)
    factors, tail = {"complex": ((2,), (2,)), "block": ((2, 2), (2,))}.get(algebra, ((), ()))
    a, b = torch.empty(1, T, D, *factors, dtype=dtype), torch.empty(1, T, D, *tail, dtype=dtype)
    if constant:
        a = a[:, :1].expand_as(a)
    ids, h = torch.zeros(T, dtype=torch.int32) if packed else None, torch.empty(1, D, *tail)

    def call() -> None:
        y, last, taken = launch.forward(algebra, a, b, h, ids, False, True)
        launch.backward(algebra, a, y if taken is None else taken, h, ids, False, y, last, True)

    return launches(call)


def layouts(ttgir: str) -> set[str]:
    """Of what is scanned: how it lies in threads."""
    named = dict(re.findall(r"^(#blocked\d*) = (.*)$", ttgir, re.MULTILINE))
    scans = re.findall(r"tt\.scan.*?\}\) : \(tensor<[^>]*?, (#blocked\d*)>", ttgir, re.DOTALL)
    return {named[name] for name in scans}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_hopper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, *CALLS[name]):
        built = build(one, HOPPER)
        assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
        # A thread has V neighbouring channels and all tokens of its run; anything else gives wrong results.
        V, threads, warps = one.arguments["V"], one.arguments["BD"] // one.arguments["V"], one.options["num_warps"]
        spread = f"[1, 1, {V}], threadsPerWarp = [{32 // threads}, 1, {threads}], warpsPerCTA = [{warps}, 1, 1]"
        found = layouts(built.asm["ttgir"])
        assert found and all(spread in layout for layout in found)


@pytest.mark.parametrize("packed", [False, True])
def test_selective_scan_compiles_for_hopper(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_selective, "multiprocessors", lambda *given: 132)
    D, S, T = 96, 16, 200
    x, B, A, h = torch.empty(1, T, D), torch.empty(1, T, 1, S), torch.empty(D, S), torch.empty(1, D, S)
    ids = torch.zeros(T, dtype=torch.int32) if packed else None

    def call() -> None:
        _, last, edges = launch_selective.forward(x, x, A, B, B, x[0, 0], h, ids, 64)
        launch_selective.backward(x, x, A, B, B, x[0, 0], h, edges, ids, 64, x, last)

    found = launches(call)
    assert len(found) == 6, "three launches each way"
    for one in found[2:] if packed else found:
        built = build(one, HOPPER)
        assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
        # No tile of states changes hands, and a thread has neighbouring channels of one in four: few steps to a sum.
        assert not re.findall(r"convert_layout.*tensor<16x\d+xf32", built.asm["ttgir"])
        if one.kernel is not carry_kernel:
            assert "sizePerThread = [1, 4], threadsPerWarp = [" in built.asm["ttgir"]


@pytest.mark.parametrize("target", [BLACKWELL, MI300], ids=["blackwell", "mi300"])
def test_compiles_for_other_hardware(target, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, *CALLS["real"])[-1:]:
        assert build(one, target).metadata.shared <= SHARED_MEMORY[target]


def test_narrow_long_inputs_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = recorded(monkeypatch, *CALLS["one channel"])
    assert [one.arguments["TOTALS"] for one in narrow] == [True, False, False] * 2
    assert narrow[0].arguments["BD"] == 1 and narrow[0].arguments["W"] == 256
    wide = recorded(monkeypatch, "real", torch.bfloat16, 4096, 8192, False)
    assert [one.arguments["TOTALS"] for one in wide] == [False, False]


def test_few_columns_are_shared_by_teams(monkeypatch: pytest.MonkeyPatch) -> None:
    few = recorded(monkeypatch, "real", torch.bfloat16, 32768, 1024, False)
    assert [one.arguments["TEAM"] for one in few] == [16, 16]
    assert all(one.options["launch_cooperative_grid"] for one in few), "its programs wait for each other"
    short = recorded(monkeypatch, "real", torch.bfloat16, 512, 1024, False)
    assert not any("TEAM" in one.arguments for one in short)
