"""Engine `conv`: the short causal depthwise convolution that nearly every recurrent layer puts before its gates, and
the long one that some layers are.

The PyTorch forms are plain and traceable: torch.compile fuses them, and they can be differentiated again. The kernels
are a registered op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_floating,
    check_segments,
    common_dtype,
    concrete,
    differentiable,
    no_autocast,
    resolve_backend,
)
from ..core.registry import KERNEL_DTYPES
from .chunked import conv_chunked
from .reference import conv_reference
from .state import ConvState

__all__ = ["ConvState", "conv", "cost"]

BACKENDS = ("reference", "chunked", "triton")
TAPS = range(2, 9)  # that the kernels have: they keep what those reach in registers


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
        backend: "auto", "reference" (tap by tap, row by row), "chunked" (vectorised PyTorch) or, for 2 to 8 taps,
            "triton", whose channels may be a part of wider tokens: slices are read where they are.

    Returns:
        ``y`` ``[B, T, D]`` in x's dtype (accumulated in fp32 by all but "reference"), and ``ConvState(tail [N, W-1,
        D])`` in fp32 (float64 for float64 inputs). Differentiable in x, weight, bias and the tail, and through the
        returned tail; with "triton" once.

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
    name = resolve_backend(backend, backends(x, shapes["W"]), x)
    if name == "triton":
        return _run_kernels(x, weight, bias, activation == "silu", tail, segments)
    run = conv_reference if name == "reference" else conv_chunked
    with no_autocast(x):
        y, after = run(x, weight, bias, activation, tail, segments)
    return y, ConvState(after)


def backends(x: Tensor, taps: int) -> tuple[str, ...]:
    """Those that have this dtype and so many taps."""
    return BACKENDS if x.dtype in KERNEL_DTYPES and taps in TAPS else BACKENDS[:2]


def _run_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    tail: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, ConvState]:
    training = torch.is_grad_enabled() and any(
        given is not None and given.requires_grad for given in (x, weight, bias, tail)
    )
    alone = x.shape[1] == 1 and segments is None and tail is not None
    if alone and not training and concrete(x):
        from . import launch

        y, after = launch.step(x, weight, bias, tail, silu)  # type: ignore[arg-type]
        return y, ConvState(after)
    where = (None, None) if segments is None else (segments.cu_seqlens, segments.ids)
    y, after = _conv(x, weight, bias, tail, *where, silu, training)
    return y, ConvState(after)


# The registered op. Optional tensors cannot be returned, so an absent one is an empty tensor.


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu: Tensor | None,
    ids: Tensor | None,
    silu: bool,
    training: bool,
) -> tuple[Tensor, Tensor]:
    from . import launch

    return launch.forward(x, weight, bias, tail, cu, ids, silu, training)


def _forward_fake(x, weight, bias, tail, cu, ids, silu, training):
    rows = x.shape[0] if cu is None else cu.shape[0] - 1
    after = x.new_empty(rows, weight.shape[1] - 1, weight.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), after


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu: Tensor | None,
    ids: Tensor | None,
    silu: bool,
    dy: Tensor,
    dafter: Tensor | None,
    taps: bool,
    before: bool,
) -> list[Tensor]:
    from . import launch

    grads = launch.backward(x, weight, bias, tail, cu, ids, silu, dy, dafter, taps, before)
    return [x.new_empty(0) if d is None else d for d in grads]


def _backward_fake(x, weight, bias, tail, cu, ids, silu, dy, dafter, taps, before):
    wanted = zip((x, weight, bias, tail), (True, taps, taps, before), strict=True)
    return [like.new_empty(like.shape) if there and like is not None else x.new_empty(0) for like, there in wanted]


def _setup(ctx, inputs, output):
    *tensors, silu, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, dy, dafter):
    x, *others = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dy = x.new_zeros(x.shape) if dy is None else dy
    grads = run(x, *others, ctx.silu, dy, dafter, wanted[1] or wanted[2], wanted[3])
    return *(d if needed else None for d, needed in zip(grads, wanted[:4], strict=True)), *(None,) * 4


_conv = differentiable(
    "conv",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


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
