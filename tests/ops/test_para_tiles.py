"""The ParaGRU and ParaLSTM tile by tile, in Triton's interpreter; the contract suite there has shorter sequences.

The interpreter has to be chosen before Triton is imported, hence a process of its own, which runs this file again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from linnet.ops import ParaState, Segments, paragru, paralstm
from linnet.ops.core.registry import has_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not has_triton(), reason="needs Triton; this is the process that it starts")
def test_tiles_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-1000:]}"


@pytest.mark.skipif(not INTERPRETED, reason="started by the test above")
@pytest.mark.parametrize(
    ("op", "lengths", "steps"),
    [(paragru, [17, 0, 1, 20], 12), (paragru, [18], 1), (paralstm, [18], 12)],
    ids=["paragru", "paragru, token by token after one step", "paralstm"],
)
def test_tiles(op, lengths: list[int], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = import_module("linnet.ops.cell.launch_para")
    monkeypatch.setattr(launch, "tile_settings", lambda length, channels: {"BT": 16, "BD": 2})
    monkeypatch.setattr(launch, "STEPS", steps)
    torch.manual_seed(0)
    D, rows, lstm = 3, len(lengths), op is paralstm
    given = [torch.randn(1, sum(lengths), 3, D), 2 * torch.randn(3, D), *([torch.randn(2, D)] if lstm else [])]
    given += [torch.randn(rows, D) for _ in range(1 + lstm)]
    w, results = torch.randn(1, sum(lengths), D, dtype=torch.float64), []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        state = ParaState(*leaves[2 + lstm :])
        y, last = op(*leaves[: 2 + lstm], state=state, segments=Segments.from_lengths(lengths), backend=backend)
        loss = (y * w).sum() + sum(s.square().sum() for s in last if s is not None)
        results.append([y, *(s for s in last if s is not None), *torch.autograd.grad(loss, leaves)])
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
