"""The kernels of the cell engine compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os
from importlib import import_module
from unittest import mock

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch

from linnet.ops import Segments, cell, m2rnn, paralstm
from linnet.ops.cell.cells import CELLS

from .ahead_of_time import BLACKWELL, HOPPER, MI300, SHARED_MEMORY, build, launches

launch, launch_m2rnn, launch_para = (
    import_module(f"linnet.ops.cell.{n}") for n in ("launch", "launch_m2rnn", "launch_para")
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def call_cell(kind: str, D: int, dtype: torch.dtype, packed: bool = False, peepholes: bool = False):
    G, peeps = CELLS[kind].gates, len(CELLS[kind].peepholes)
    x, R, b = empty(1, 40, 2, G * D, dtype=dtype), empty(2, D, G * D, dtype=dtype), empty(2, G * D, dtype=torch.float32)
    p = empty(2, peeps * D, dtype=torch.float32) if peepholes else None
    segments = Segments.from_lengths([30, 0, 10]) if packed else None
    return cell(x, R, b, p, kind=kind, segments=segments, backend="triton")


def call_m2rnn(K: int, V: int, dtype: torch.dtype):
    q, v, g = empty(1, 40, 1, K, dtype=dtype), empty(1, 40, 2, V, dtype=dtype), empty(1, 40, 2, dtype=torch.float32)
    return m2rnn(q, q, v, g, empty(2, V, V, dtype=dtype), clip=1.0, backend="triton")


def call_paralstm(length: int, dtype: torch.dtype):
    A, C = empty(3, 64, dtype=torch.float32), empty(2, 64, dtype=torch.float32)
    return paralstm(empty(1, length, 3, 64, dtype=dtype), A, C, backend="triton")


BF16, FP32 = torch.bfloat16, torch.float32
CALLS = {
    "lstm": lambda: call_cell("lstm", 64, BF16),
    "slstm": lambda: call_cell("slstm", 128, BF16),
    "cifg": lambda: call_cell("cifg", 32, BF16, packed=True, peepholes=True),
    "fp32": lambda: call_cell("gru", 64, FP32),
    "wide": lambda: call_cell("lstm", 768, BF16),
    "paralstm": lambda: call_paralstm(10, BF16),
    "paralstm tiles": lambda: call_paralstm(40, FP32),
    "m2rnn": lambda: call_m2rnn(64, 16, BF16),
    "m2rnn wide": lambda: call_m2rnn(128, 128, BF16),
    "m2rnn wider": lambda: call_m2rnn(64, 256, BF16),
}


@pytest.mark.parametrize(
    ("target", "name"),
    [(HOPPER, name) for name in CALLS if name != "lstm"]
    + [(target, name) for target in (BLACKWELL, MI300) for name in ("lstm", "m2rnn wide")]
    + [(MI300, "m2rnn")],
    ids=lambda x: x if isinstance(x, str) else str(x.arch),
)
def test_compiles(target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("linnet.ops.core.registry"), "runs_kernels", lambda x: True)

    def numerics(x: torch.Tensor) -> dict[str, bool | str]:
        """As for a tensor that is on this GPU."""
        on_gpu = mock.Mock(dtype=x.dtype, **{"device.type": "cuda"})
        with mock.patch.object(torch.version, "hip", None if target.backend == "cuda" else "7"):
            return launch_numerics(on_gpu)

    launch_numerics = launch.numerics
    for module in (launch, launch_m2rnn, launch_para):
        monkeypatch.setattr(module, "numerics", numerics)
    monkeypatch.setattr(launch, "multiprocessors", lambda *given: 132)
    found = launches(lambda: CALLS[name]()[0].sum().backward())
    assert len(found) == 2, "one launch forward, one backward"
    for one in found:
        assert build(one, target).metadata.shared <= SHARED_MEMORY[target]


def test_last_programs_leave_no_gpu_idle() -> None:
    """192 programs of which 132 run at a time take 3 rounds of half a sequence each, not 2 of a whole one."""
    assert [launch_m2rnn.stretches(n, 132) for n in (96, 132, 165, 192, 264, 6000)] == [1, 1, 4, 2, 1, 1]
