"""The M2RNN's kernels for states of many columns, on few of them in Triton's interpreter: of so many that the weights
and their gradient do not fit together, and of those that are transposed."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from interpreted import in_the_interpreter, run_interpreted, starts_the_interpreter
from linnet.ops import M2RNNState, Segments, m2rnn


@pytest.mark.slow
@starts_the_interpreter
def test_many_columns_in_the_interpreter() -> None:
    run_interpreted(__file__)


@in_the_interpreter
@pytest.mark.parametrize("turned", [False, True])
def test_many_columns(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = import_module("linnet.ops.cell.launch_m2rnn")
    monkeypatch.setattr(launch, "NARROW", 16)
    monkeypatch.setattr(launch, "STRIP", 16)
    monkeypatch.setattr(launch, "turned", lambda *given: turned)
    monkeypatch.setattr(launch, "stretches", lambda *given: 2)
    torch.manual_seed(0)
    lengths, H, K, V = [34, 0, 1], 2, 70 if turned else 5, 20
    T, segments = sum(lengths), Segments.from_lengths(lengths)
    given = [x / max(1, K / 35) ** 0.5 for x in (torch.randn(1, T, 1, K), torch.randn(1, T, 1, K))]
    given += [torch.randn(1, T, H, V), -torch.rand(1, T, H)]
    given += [torch.randn(H, V, V) / 4, torch.randn(len(lengths), H, K, V)]
    results = []
    for dtype, backend in ((torch.float64, "chunked"), (torch.float32, "triton")):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        y, (S,) = m2rnn(*leaves[:5], clip=0.5, state=M2RNNState(leaves[5]), segments=segments, backend=backend)
        results.append((y, S, *torch.autograd.grad(y.sin().sum() + S.square().sum(), leaves)))
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
