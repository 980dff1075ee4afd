"""Engine `conv`: the short causal depthwise convolution that nearly every recurrent layer puts before its gates, and
the long one that some layers are.

It is plain traceable PyTorch, not a registered torch.library op: torch.compile fuses it without a graph break.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Cost, Segments, Shapes, check_floating, check_segments, common_dtype, no_autocast, resolve_backend
from .chunked import conv_chunked
from .reference import conv_reference
from .state import ConvState

__all__ = ["ConvState", "conv", "cost"]

BACKENDS = ("reference", "chunked")


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: ConvState | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ConvState]:
    """Causal depthwise convolution of width ``W``::

        y_t = activation(bias + sum_{i < W} weight[:, i] * x_{t - (W-1) + i})

    where inputs before the first token of a row come from its state (zeros when None). A kernel as long as the sequence
    is legal: beyond 64 taps the sum is taken by FFTs, in blocks, so that no output depends on later inputs, not even by
    rounding. Its memory is then as long; a kernel that a state space makes (`linnet.ops.lti`) needs less.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, W]``; ``weight[:, W-1]`` multiplies the current token, as in `torch.nn.Conv1d`.
        bias: ``[D]``, none when None.
        activation: None or "silu".
        state: the ``W - 1`` inputs before the first token, one row a sequence, or a segment.
        segments: packing of ``[1, total, D]`` inputs; segments may be shorter than the convolution.
        backend: "auto", "reference" (tap by tap, row by row) or "chunked" (vectorised PyTorch).

    Returns:
        ``y`` ``[B, T, D]`` in x's dtype (accumulated in fp32 by "chunked"), and ``ConvState(tail [N, W-1, D])`` in fp32
        (float64 for float64 inputs). Differentiable in x, weight, bias and the tail, and through the returned tail.

    Raises:
        ValueError: on shapes, dtypes, devices or an unknown activation; the message names the argument.
    """
    shapes = Shapes()
    shapes("x", x, "B T D")
    shapes("weight", weight, "D W")
    if bias is not None:
        shapes("bias", bias, "D")
    if shapes["W"] < 1:
        raise ValueError(f"weight: expected at least one tap, got shape {list(weight.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    x, weight, bias = common_dtype(x=x, weight=weight, bias=bias)  # type: ignore[assignment]
    rows = check_segments(segments, x)
    tail = None
    if state is not None:
        if not isinstance(state, ConvState):
            raise ValueError(f"state: expected a ConvState, got {type(state).__name__}")
        Shapes(N=rows, R=shapes["W"] - 1, D=shapes["D"])("state.tail", state.tail, "N R D")
        check_floating("state.tail", state.tail, x.device)
        tail = state.tail.to(torch.promote_types(x.dtype, torch.float32))
    run = conv_reference if resolve_backend(backend, BACKENDS, x) == "reference" else conv_chunked
    with no_autocast(x):
        y, after = run(x, weight, bias, activation, tail, segments)
    return y, ConvState(after)


def cost(B: int, T: int, D: int, W: int = 4, *, bias: bool = False, itemsize: int = 2, backward: bool = False) -> Cost:
    """Floor of one call: x read once, y written once; ``itemsize`` is the bytes of an element. With ``backward``, of
    forward and backward together: x and the output's gradient are read again and the gradient of x written. Beyond 64
    taps the arithmetic is that of 64 and of an FFT to and fro at every doubling of the block."""
    taps = min(W, 64)
    each = 2 * taps + sum(5 * (7 + level) for level in range((-(-W // 64) - 1).bit_length()))
    flops = B * T * D * each * (3 if backward else 1) + B * T * D * bias
    state = B * (W - 1) * D * 4
    elements = B * T * D * (5 if backward else 2) + D * (W + bias) * (3 if backward else 1)
    return Cost(flops, elements * itemsize + 2 * state, state)


from . import cases as _cases  # noqa: E402,F401  (registers the op and its sample inputs)
