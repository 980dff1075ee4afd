"""The ParaGRU and ParaLSTM tile by tile, in Triton's interpreter; the contract suite there has shorter sequences."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from interpreted import in_the_interpreter, run_interpreted, starts_the_interpreter
from linnet.ops import ParaState, Segments, paragru, paralstm


@pytest.mark.slow
@starts_the_interpreter
def test_tiles_in_the_interpreter() -> None:
    run_interpreted(__file__)


@in_the_interpreter
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
