"""Teams of programs that share columns of channels: on a GPU as they are, in Triton's interpreter a team of one."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from interpreted import INTERPRETED, run_interpreted, starts_the_interpreter
from linnet.ops import ScanState, Segments, minmax_scan, scan


@pytest.mark.slow
@starts_the_interpreter
def test_a_team_of_one_in_the_interpreter(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the kernels run for real in this session")
    run_interpreted(__file__)


def inputs(algebra: str, T: int, D: int, rows: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    if algebra in ("complex", "block"):
        factors, values = ((2,), (2,)) if algebra == "complex" else ((2, 2), (2,))
        a, b = torch.rand(1, T, D, *factors, generator=g) - 0.5, torch.randn(1, T, D, *values, generator=g)
    else:
        a, b, values = torch.rand(1, T, D, generator=g), torch.randn(1, T, D, generator=g), ()
        a, b = (a + b, b) if algebra == "minmax" else (a, b)
    return [a, b, torch.randn(rows, D, *values, generator=g)]


def run(algebra: str, given: list[Tensor], segments: Segments | None, reverse: bool, backend: str) -> list[Tensor]:
    """States, last states and gradients."""
    a, b, start = given = [x.detach().requires_grad_() for x in given]
    if algebra == "minmax":
        h, state = minmax_scan(a, b, state=ScanState(start), segments=segments, backend=backend)
    else:
        h, state = scan(a, b, state=ScanState(start), segments=segments, reverse=reverse, backend=backend)
    weights = [torch.arange(x.numel(), device=x.device).view(x.shape).remainder(7).to(x.dtype) for x in (h, state.h)]
    return [h, state.h, *torch.autograd.grad((h, state.h), given, weights)]


@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
@pytest.mark.parametrize("algebra", ["real", "complex", "block", "minmax"])
def test_teams(algebra: str, packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED and device.type != "cuda":
        pytest.skip("needs a GPU or the interpreter")
    launch, T, D = import_module("linnet.ops.scan.launch"), 9000, 2000
    if INTERPRETED:
        T, D = 25, 6
        alone = {"TEAM": 1, "W": 2, "L": 4, "BD": 8, "V": 1, "num_warps": 2}
        monkeypatch.setattr(launch, "team", lambda *what, **how: alone)
    else:
        shared = launch.team("real", 1, T, D, device, half=True, packed=False)
        if shared is None:
            pytest.skip("this device has no teams")
        shared |= {"L": 8 if packed else shared["L"]}
        if algebra in ("complex", "block"):  # of these a thread has one channel, and room for fewer tokens
            shared |= {"L": 4 if algebra == "block" else 8, "V": 1, "BD": 32, "TEAM": 4}
        monkeypatch.setattr(launch, "team", lambda *what, **how: shared)
    lengths = [T // 3, 0, 1, T - T // 3 - 1] if packed else [T]
    segments = Segments.from_lengths(lengths, device) if packed else None
    reverse = not packed and algebra in ("real", "block")
    tolerances = {torch.float32: 1e-4} | ({} if INTERPRETED else {torch.bfloat16: 2e-2})
    for dtype, tolerance in tolerances.items():
        given = [x.to(device) for x in inputs(algebra, T, D, len(lengths))]
        given[:2] = [x.to(dtype) for x in given[:2]]
        want = run(algebra, [x.double() for x in given], segments, reverse, "chunked")
        for x, y in zip(run(algebra, given, segments, reverse, "triton"), want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item())
