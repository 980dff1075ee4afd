"""`gated_norm`: what stands between the reading of a memory and the output projection, in one pass over memory.

In PyTorch that is up to a dozen passes in fp32, each kept for the backward pass, which cost as much as the memory
itself where heads are small. Here the backward pass has the inputs alone and computes the rest again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import Shapes, check_choice, check_floating, check_number, differentiable, no_autocast, resolve_backend
from ..core.registry import KERNEL_DTYPES
from .chunked import gated_norm_chunked

__all__ = ["gated_norm"]

BACKENDS = ("reference", "chunked", "triton")
WIDEST = 4096  # channels of a norm that a program can have and keep in registers
ACTIVATIONS = ("silu", "sigmoid", "identity")


def gated_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    skip: Tensor | None = None,
    groups: int = 1,
    norm_first: bool = True,
    activation: str = "silu",
    center: bool = False,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """The reading of a memory, normalised and gated (with ``norm_first``), or gated and normalised::

        out = open(norm(y))     or     out = norm(open(y))

        open(x) = (x + skip * v) * activation(gate)
        norm(x) = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias,     m = mean(x) with ``center``, else 0

    with means over the channels of a head. Attention-like layers normalise first (RetNet, GLA, Gated DeltaNet, mLSTM);
    Mamba-2 and M2RNN gate first.

    Args:
        y: reading ``[B, T, D]``.
        gate: pre-activations of the gate ``[B, T, D]``.
        weight, bias: both ``[D]``, or both ``[D / groups]`` for all heads alike; None for 1 and 0.
        v: what goes past the memory ``[B, T, D]``, with
        skip: its factors ``[D]``; both or neither.
        groups: heads, spans of ``D / groups`` channels that each have a norm of their own.
        norm_first: whether the gate follows the norm.
        activation: "silu", "sigmoid" or "identity", of the gate.
        center: subtract the mean (LayerNorm) rather than not (RMSNorm).
        eps: added to the mean square; above 0.
        backend: "auto", "chunked" (PyTorch; "reference" is the same here) or "triton" (heads of up to 4096 channels; y,
            gate and v may be parts of wider tokens).

    Returns:
        ``[B, T, D]`` in the gate's dtype. The kernels compute in fp32 and round once; PyTorch rounds after the norm too
        where that is first. What is normalised may be as large as 2^84. Differentiable in every tensor, with "triton"
        once.

    Raises:
        ValueError: on shapes, dtypes, devices, options out of range, or one of v and skip without the other; the
            message names the argument.

    Source: norms of heads before the gate are from RetNet (Sun et al. 2023, arXiv 2307.08621), a norm after it from
    Mamba-2 (Dao & Gu 2024, arXiv 2405.21060).
    """
    shapes = Shapes()
    shapes("gate", gate, "B T D")
    check_floating("gate", gate, gate.device)
    D = shapes["D"]
    if not isinstance(groups, int) or groups < 1 or D % groups:
        raise ValueError(f"groups: expected a divisor of the {D} channels, got {groups!r}")
    if (v is None) != (skip is None):
        raise ValueError(f"v, skip: expected both or neither, got {'skip' if v is None else 'v'} alone")
    shapes.sizes["W"] = D // groups
    rows, vectors = {"y": y, "v": v}, {"skip": skip, "weight": weight, "bias": bias}
    for name, x in (rows | vectors).items():
        if x is not None:
            layouts = ("B T D",) if name in rows else ("D",) if name == "skip" else ("D", "W")
            shapes(name, x, *layouts)
            check_floating(name, x, gate.device)
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(f"bias: expected shape {list(weight.shape)} like weight, got {list(bias.shape)}")
    check_choice("activation", activation, ACTIVATIONS)
    eps = check_number("eps", eps, 0.0)
    if not eps:
        raise ValueError("eps: expected a number above 0, got 0")
    tensors = y, gate, weight, bias, v, skip
    covered = all(x is None or x.dtype in KERNEL_DTYPES for x in tensors) and D // groups <= WIDEST
    run = resolve_backend(backend, BACKENDS if covered else BACKENDS[:2], gate)
    if run == "triton":
        return _gated_norm(*tensors, groups, norm_first, activation, center, eps)
    with no_autocast(gate):
        return gated_norm_chunked(*tensors, groups, norm_first, activation, center, eps)


# The registered op.


def _forward(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    skip: Tensor | None,
    groups: int,
    norm_first: bool,
    activation: str,
    center: bool,
    eps: float,
) -> Tensor:
    from . import launch

    return launch.forward(y, gate, weight, bias, v, skip, groups, norm_first, activation, center, eps)


def _forward_fake(y, gate, *_):
    return gate.new_empty(gate.shape)


def _backward(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor | None,
    skip: Tensor | None,
    groups: int,
    norm_first: bool,
    activation: str,
    center: bool,
    eps: float,
    dout: Tensor,
) -> list[Tensor]:
    from . import launch

    grads = launch.backward(y, gate, weight, bias, v, skip, groups, norm_first, activation, center, eps, dout)
    return [y.new_empty(0) if d is None else d for d in grads]


def _backward_fake(y, gate, weight, bias, v, skip, *_):
    return [y.new_empty(0) if x is None else x.new_empty(x.shape) for x in (y, gate, weight, bias, v, skip)]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _gradients(run, ctx, dout) -> Any:
    grads = run(*ctx.saved_tensors, *ctx.options, dout)
    wanted = zip(grads, ctx.needs_input_grad[:6], strict=True)
    return *(d if needed else None for d, needed in wanted), *(None for _ in ctx.options)


_gated_norm = differentiable(
    "gated_norm",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)
