"""The decay kernels compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from ahead_of_time import BLACKWELL, HOPPER, MI300, SHARED_MEMORY, Launch, build, launches, specialized
from triton.backends.compiler import GPUTarget

from linnet.ops.decay import launch, launch_step, launch_walks

CALLS: dict[str, dict[str, Any]] = {
    "scalar": {"gate": "scalar"},
    "constant": {"gate": "constant"},
    "packed": {"gate": "scalar", "lengths": [100, 3000]},
    "vector and bonus": {"gate": "vector", "bonus": True},
    "none, small heads": {"gate": "none", "H": 32, "K": 64, "V": 64},
    "value": {"gate": "none", "value_gate": True},
    "mlstm": {"gate": "scalar", "write": True, "floor": True},
}


def recorded(
    monkeypatch: pytest.MonkeyPatch,
    target: GPUTarget,
    K: int = 128,
    V: int = 128,
    *,
    gate: str,
    dtype: torch.dtype = torch.bfloat16,
    value_gate: bool = False,
    bonus: bool = False,
    write: bool = False,
    floor: bool = False,
    lengths: list[int] | None = None,
    learned: bool = True,
    H: int = 16,
    beforehand: bool = False,
) -> list[Launch]:
    """What forward and backward of a call launch on such a GPU, or what is compiled before its first call."""
    monkeypatch.setattr(launch_walks, "has_tma", lambda device: target.backend == "cuda")
    monkeypatch.setattr(launch_walks, "has_tensor_memory", lambda device: target == BLACKWELL)
    B, T, piece = (4, 4096, 512) if lengths is None else (1, sum(lengths), 512)
    rows = B if lengths is None else len(lengths)
    cu = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pieces = B * -(-T // piece) if lengths is None else T // piece + rows
    q, k, v = (torch.empty(B, T, H, width, dtype=dtype) for width in (K, K, V))
    gates = {
        "none": None,
        "constant": torch.empty(H).expand(B, T, H),
        "scalar": torch.empty(B, T, H),
        "vector": torch.empty(B, T, H, K),
    }
    gv = torch.empty(B, T, H, V) if value_gate else None
    u = torch.empty(H, K) if bonus else None
    w, low = (torch.empty(B, T, H) if given else None for given in (write, floor))
    state = launch.State(torch.empty(rows, H, K, V), torch.empty(rows, H, K) if floor else None)
    given = (q, k, v, gates[gate], gv, u, w)

    def call() -> None:
        if beforehand:
            launch._compile(given, state, low, cu, 1.0, 0.0, piece, pieces, True)
            return
        o, x, last, bounds = launch.forward(*given, state, low, cu, 1.0, 0.0, piece, pieces, True)
        assert bounds is not None
        launch.backward(*given, low, cu, 1.0, 0.0, piece, o, x, bounds, torch.empty_like(v), last, learned)

    return launches(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CALLS)
def test_a_first_call_compiles_what_it_launches(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compile_together", lambda call: call())
    monkeypatch.setattr(launch, "_compiled", set())
    kinds = [
        {(one.kernel.__name__, repr(specialized(one)), repr(one.options)) for one in found}
        for found in (
            recorded(monkeypatch, HOPPER, dtype=dtype, beforehand=beforehand, **CALLS[name])
            for beforehand in (True, False)
        )
    ]
    assert kinds[0] == kinds[1]


def test_compiling_beforehand_imports_nothing() -> None:
    """Some operators on tensors without memory import PyTorch's compiler, for seconds of a first call."""
    code = (
        "import sys, pytest\n"
        "import test_decay_kernels as tests\n"
        "patch = pytest.MonkeyPatch()\n"
        "patch.setattr(tests.launch, 'compile_together', lambda call: call())\n"
        "for name in ('scalar', 'mlstm'):\n"
        "    assert tests.recorded(patch, tests.HOPPER, beforehand=True, **tests.CALLS[name])\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=surroundings)


@pytest.mark.parametrize(
    "call",
    [*CALLS.values(), {"gate": "constant", "H": 32, "K": 64, "V": 64, "learned": False}],
    ids=[*CALLS, "not learned"],
)
def test_compiles_for_hopper(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, HOPPER, **call):
        built = build(one, HOPPER)
        assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
        if one.kernel.__name__ == "pass_kernel":
            assert "wgmma.mma_async" in built.asm["ptx"] and "cp.async.bulk.tensor" in built.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "name"),
    [(BLACKWELL, "scalar"), (BLACKWELL, "none, small heads"), (MI300, "scalar"), (MI300, "vector and bonus")],
    ids=["sm_100-scalar", "sm_100-none", "gfx942-scalar", "gfx942-vector"],
)
def test_compiles_for_other_gpus(target: GPUTarget, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, target, **CALLS[name]):
        assert build(one, target).metadata.shared <= SHARED_MEMORY[target]


@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    [(96, 80, torch.bfloat16), (256, 512, torch.bfloat16), (128, 128, torch.float32)],
)
def test_passes_of_every_size_fit(K: int, V: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in recorded(monkeypatch, HOPPER, K, V, gate="scalar", dtype=dtype):
        if one.kernel.__name__ in ("pass_kernel", "pairs_kernel"):
            assert build(one, HOPPER).metadata.shared <= SHARED_MEMORY[HOPPER]


def test_tiles_of_one_width_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tile of the payload is as wide as one of the keys, but only the keys' lies within its channels."""
    passes = [one for one in recorded(monkeypatch, HOPPER, 64, 80, gate="scalar") if "TMA" in one.arguments]
    one = next(one for one in passes if one.arguments["FULL_R"] and not one.arguments["FULL_P"])
    assert build(one, HOPPER).asm


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
def test_gradients_of_keys_and_values_in_one_walk(
    gate: str, learned: bool, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recorded(monkeypatch, HOPPER, K, K, gate=gate, learned=learned)
    passes = [one.arguments for one in found if one.kernel.__name__ == "pass_kernel"]
    passes = [one for one in passes if one["REVERSE"] and not one["STATE_ONLY"]]
    one_walk = K == 64 and (gate == "none" or (gate == "constant" and not learned))
    assert [one["BOTH"] for one in passes] == ([True] if one_walk else [False, False])


@pytest.mark.parametrize("target", [HOPPER, BLACKWELL, MI300], ids=["sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gates_of_the_mlstm_compile(target: GPUTarget, packed: bool) -> None:
    B, T, H = (1 if packed else 2), 300, 6
    cu, ids = (
        (torch.tensor([0, 100, T], dtype=torch.int32), torch.zeros(T, dtype=torch.int32)) if packed else (None,) * 2
    )
    i, m = torch.empty(B, T, H), torch.empty(2, H)
    found = launches(lambda: launch_step.stabilizer(i, i, m, cu, ids, -1e4))
    assert len(found) == 2, "what blocks do to a stabiliser, then the stabiliser"
    for one in found:
        assert build(one, target).metadata.shared <= SHARED_MEMORY[target]
