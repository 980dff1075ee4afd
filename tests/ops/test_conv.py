"""What is particular to the short convolution; the rest is checked by the contract suite."""

from __future__ import annotations

import pytest
import torch

from interpreted import INTERPRETED, run_interpreted, starts_the_interpreter
from linnet.ops import ConvState, Segments, conv
from linnet.ops.conv import TAPS, backends
from linnet.ops.core.registry import has_triton


@pytest.mark.slow
@starts_the_interpreter
def test_kernels_in_the_interpreter(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the kernels run for real in this session")
    run_interpreted(__file__, "-k", "triton")


@pytest.fixture(params=["reference", "chunked", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "triton" and not (has_triton() and (INTERPRETED or device.type == "cuda")):
        pytest.skip("needs a GPU or the interpreter")
    return request.param


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


def test_waiting_inputs_keep_their_precision(backend: str, device: torch.device) -> None:
    """An fp32 tail handed to a bfloat16 call leaves it unrounded, packed or not, while it waits."""
    tail = torch.full((2, 3, 1), 1 + 2**-12, device=device)
    x, weight = (torch.full(shape, 0.5, dtype=torch.bfloat16, device=device) for shape in ((2, 1, 1), (1, 4)))
    batch = conv(x, weight, state=ConvState(tail), backend=backend)[1].tail
    segments = Segments.from_lengths([1, 1], device)
    packed = conv(x.view(1, 2, 1), weight, state=ConvState(tail), segments=segments, backend=backend)[1].tail
    assert torch.equal(batch[:, :2], tail[:, 1:]) and torch.equal(packed, batch)
    with torch.enable_grad():  # one token without gradients has a kernel of its own
        trained = conv(x, weight.requires_grad_(), state=ConvState(tail), backend=backend)[1].tail
    assert torch.equal(trained, batch)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_steps_without_gradients(backend: str, width: int, device: torch.device) -> None:
    """Token by token they give what one call gives, to the bit where the state is."""
    generator = torch.Generator().manual_seed(width)
    x, weight, bias, tail = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((2, 5, 6), (6, width), (6,), (2, width - 1, 6))
    )
    expected, after = conv(x, weight, bias, activation="silu", state=ConvState(tail), backend="reference")
    state, ys = ConvState(tail), []
    for token in x.unbind(1):
        y, state = conv(token[:, None], weight, bias, activation="silu", state=state, backend=backend)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), expected)
    assert torch.equal(state.tail, after.tail)


def test_low_precision_accumulates_in_fp32(backend: str, device: torch.device) -> None:
    """With taps that cancel, an accumulator of the input's dtype would lose the small ones."""
    if backend == "reference":
        pytest.skip("accumulates in the dtype of its inputs")
    x = torch.tensor([[[1.0], [256.0], [-256.0]]], dtype=torch.bfloat16, device=device)
    weight = torch.ones(1, 3, dtype=torch.bfloat16, device=device)
    assert conv(x, weight, backend=backend)[0][0, 2, 0] == 1.0


def test_parts_of_wider_tokens(backend: str, device: torch.device) -> None:
    """Slices give what their copies give, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    wide, weight = torch.randn(2, 9, 24, generator=generator).to(device), torch.randn(8, 4, generator=generator)
    weight = weight.to(device)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, w = x.requires_grad_(), weight.clone().requires_grad_()
        y, _ = conv(x, w, activation="silu", backend=backend)
        return y, *torch.autograd.grad(y, (x, w), wide[..., 16:])

    for part, copy in zip(run(wide[..., 8:16]), run(wide[..., 8:16].clone()), strict=True):
        assert torch.equal(part, copy)


def test_wide_kernels_and_float64_have_no_triton_backend() -> None:
    assert "triton" in backends(torch.zeros(1), max(TAPS))
    assert "triton" not in backends(torch.zeros(1), max(TAPS) + 1)
    assert "triton" not in backends(torch.zeros(1, dtype=torch.float64), 4)
    with pytest.raises(ValueError, match=r"^backend: this call supports \('reference', 'chunked'\), got 'triton'"):
        conv(torch.zeros(1, 2, 3), torch.zeros(3, max(TAPS) + 1), backend="triton")


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"^activation: expected None or 'silu', got 'relu'"):
        conv(torch.zeros(1, 2, 3), torch.zeros(3, 4), activation="relu")


def test_refuses_a_width_of_zero() -> None:
    with pytest.raises(ValueError, match=r"^weight: expected at least one tap"):
        conv(torch.zeros(1, 2, 3), torch.zeros(3, 0))
