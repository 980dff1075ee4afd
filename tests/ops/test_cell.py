"""What the contract suite does not reach: pieces of long sequences, accuracy of the sLSTM, heads shared by programs."""

from __future__ import annotations

import pytest
import torch

from linnet.ops import CellState, Segments, cell, m2rnn
from linnet.ops.core import state_tensors


@pytest.mark.parametrize("lengths", [None, [70, 0, 33, 1]], ids=["batch", "packed"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_m2rnn_over_several_pieces(lengths, clip):
    torch.manual_seed(0)
    B, T = (2, 75) if lengths is None else (1, sum(lengths))
    segments = None if lengths is None else Segments.from_lengths(lengths)
    q, k = torch.randn(2, B, T, 1, 3, dtype=torch.float64)
    v, g = torch.randn(B, T, 2, 2, dtype=torch.float64), -torch.rand(B, T, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v, g, torch.randn(2, 2, 2, dtype=torch.float64))]
    results = []
    for backend in ("chunked", "reference"):
        y, (S,) = m2rnn(*leaves, clip=clip, segments=segments, backend=backend)
        results.append((y, S, *torch.autograd.grad((y * y.sin()).sum() + S.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("K", "V", "low", "bound"),
    [
        (72, 16, torch.float32, 1e-5),
        (200, 64, torch.float32, 1e-5),
        (72, 100, torch.float32, 1e-5),
        (72, 256, torch.bfloat16, 2e-2),
        (200, 64, torch.bfloat16, 2e-2),
        (72, 100, torch.float16, 1e-2),
        (64, 64, torch.bfloat16, 2e-2),
        (64, 128, torch.bfloat16, 2e-2),
        (128, 128, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_m2rnn_in_several_programs_a_state(device, K, V, low, bound, packed):
    """The tiles that a GPU takes for states of these sizes."""
    if device.type != "cuda":
        pytest.skip("sizes for a GPU")
    lengths = [9, 0, 37, 1, 70] if packed else None
    B, T, segments = (1, 117, Segments.from_lengths(lengths, device)) if lengths else (3, 75, None)
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    given = [draw(B, T, 1, K) / 8, draw(B, T, 1, K) / 2, draw(B, T, 3, V), -draw(B, T, 3).exp(), draw(3, V, V) / V**0.5]
    given = [x.to(low) for x in given]
    results = []
    for backend, dtype in (("triton", low), ("chunked", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        y, (S,) = m2rnn(*leaves, clip=1.0, segments=segments, backend=backend)
        grads = torch.autograd.grad(y.sin().sum() + S.square().sum(), leaves)
        results.append([x.detach() for x in (y, S, *grads)])
    for got, want in zip(*results, strict=True):
        assert float((got - want).norm() / want.norm()) < bound


def test_slstm_starts_from_its_first_write():
    """With nothing written yet the first write sets the scale, however small it is, and is all there is to read."""
    x = torch.zeros(1, 2, 1, 12, dtype=torch.float64)
    x[..., :3] = torch.tensor([-1e4, 0.0, 1e4])  # input gates
    x[..., 6:9] = torch.tensor([0.3, -0.2, 1.0])
    R = torch.zeros(1, 3, 12, dtype=torch.float64)
    h, state = cell(x, R, kind="slstm")
    torch.testing.assert_close(h[0, 0, 0], 0.5 * torch.tanh(x[0, 0, 0, 6:9]))
    assert state.n is not None and float(state.n.min()) >= 1
    assert all(s.isfinite().all() for s in state_tensors(state))


def test_gates_may_be_infinitely_shut():
    x = torch.randn(2, 4, 1, 12, dtype=torch.float64)
    x[:, 2, :, 3:6] = -torch.inf  # forget
    R = torch.randn(1, 3, 12, dtype=torch.float64, requires_grad=True)
    for kind in ("lstm", "slstm"):
        for backend in ("chunked", "reference"):
            y, state = cell(x.requires_grad_(), R, kind=kind, backend=backend)
            grads = torch.autograd.grad(y.sum() + state.c.sum(), (x, R))
            assert all(t.isfinite().all() for t in (y, *state_tensors(state), *grads))


def test_state_of_another_kind_is_refused():
    x, R, zeros = torch.zeros(1, 1, 1, 8), torch.zeros(1, 2, 8), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"^state.c: expected a tensor for kind='lstm', got None"):
        cell(x, R, state=CellState(zeros))
    with pytest.raises(ValueError, match=r"^kind: expected one of tanh, .* got 'rnn'"):
        cell(x, R, kind="rnn")
    with pytest.raises(ValueError, match=r"^R: expected \[H, D, 3 \* D\]"):
        cell(x, R, kind="gru")
