"""What is particular to the short convolution; the rest is checked by the contract suite."""

from __future__ import annotations

import pytest
import torch

from linnet.ops import ConvState, Segments, conv


def test_worked_example() -> None:
    x = torch.tensor([[[1.0], [2.0], [3.0]]], dtype=torch.float64)
    weight = torch.tensor([[0.0, 10.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([0.5], dtype=torch.float64)
    y, state = conv(x, weight, bias)
    assert y.flatten().tolist() == [1.5, 12.5, 23.5]
    assert state.tail.flatten().tolist() == [2.0, 3.0]
    y, state = conv(x[:, :1], weight, bias, state=state)
    assert y.flatten().tolist() == [31.5] and state.tail.flatten().tolist() == [3.0, 1.0]


def test_segments_shorter_than_the_convolution() -> None:
    x, weight = torch.arange(1.0, 5.0, dtype=torch.float64)[None, :, None], torch.ones(1, 4, dtype=torch.float64)
    before = ConvState(torch.tensor([[[10.0], [20.0], [30.0]]] * 3, dtype=torch.float64))
    y, state = conv(x, weight, state=before, segments=Segments.from_lengths([1, 0, 3]))
    assert y.flatten().tolist() == [61.0, 62.0, 55.0, 39.0]
    assert state.tail[..., 0].tolist() == [[20.0, 30.0, 1.0], [10.0, 20.0, 30.0], [2.0, 3.0, 4.0]]


def test_tail_does_not_keep_the_input_alive() -> None:
    x, weight = torch.randn(1, 1000, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    tail = conv(x, weight)[1].tail
    assert tail.untyped_storage().nbytes() == tail.numel() * 8


def test_waiting_inputs_keep_their_precision() -> None:
    """An fp32 tail handed to a bfloat16 call leaves it unrounded, packed or not, while it waits."""
    tail = torch.full((2, 3, 1), 1 + 2**-12)
    x, weight = torch.zeros(2, 1, 1, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.bfloat16)
    for backend in ("reference", "chunked"):
        batch = conv(x, weight, state=ConvState(tail), backend=backend)[1].tail
        packed = conv(
            x.view(1, 2, 1), weight, state=ConvState(tail), segments=Segments.from_lengths([1, 1]), backend=backend
        )[1].tail
        assert torch.equal(batch[:, :2], tail[:, 1:]) and torch.equal(packed, batch)


def test_low_precision_accumulates_in_fp32() -> None:
    """With taps that cancel, an accumulator of the input's dtype would lose the small ones."""
    x = torch.tensor([[[1.0], [256.0], [-256.0]]], dtype=torch.bfloat16)
    weight = torch.ones(1, 3, dtype=torch.bfloat16)
    assert conv(x, weight)[0][0, 2, 0] == 1.0


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"^activation: expected None or 'silu', got 'relu'"):
        conv(torch.zeros(1, 2, 3), torch.zeros(3, 4), activation="relu")


def test_refuses_a_width_of_zero() -> None:
    with pytest.raises(ValueError, match=r"^weight: expected at least one tap"):
        conv(torch.zeros(1, 2, 3), torch.zeros(3, 0))
