"""Ops with a hand-written backward: one node in a compiled graph, a direct call in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["differentiable", "once"]


class _Once(torch.autograd.Function):
    """``count`` gradients as they are; what they depend on follows, and no derivative goes there."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: this form can be differentiated once; for a second derivative take the plain recurrence "
            "(backend='reference'; unroll for newton)"
        )


def once(name: str, ctx: Any, find: Callable[[], Sequence[Tensor | None]]) -> Any:
    """The gradients that the hand-written backward of ``name`` finds, for it to return. With ``create_graph`` a second
    backward pass through them raises. Behind PyTorch's ``once_differentiable`` it passes, and takes them for constants,
    where the gradient that comes in is one, as that of a sum."""
    if not torch.is_grad_enabled():
        return find()
    with torch.no_grad():
        grads = find()
    return _Once.apply(name, len(grads), *grads, *ctx.saved_tensors)


def _recorded() -> bool:
    """Whether selective checkpointing is recording or replaying: it keeps results by their operators, and has to see
    one op, not the steps of an implementation that adds to its intermediate results in place."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Register ``linnet::name`` and ``linnet::name_backward`` and return what calls them.

    ``torch.library`` dispatches every call through Python layers that cost more than a small kernel takes; only graph
    capture, fake tensors, tensor subclasses and selective checkpointing need them. Any other call runs ``forward``
    itself inside an ``autograd.Function``.

    Args:
        forward, backward: typed as ``torch.library.custom_op`` wants them; the first positional argument is a tensor.
        forward_fake, backward_fake: their results for fake tensors.
        setup: ``setup(ctx, inputs, output)`` keeps what the backward needs.
        gradients: ``gradients(run, ctx, *output_gradients)`` returns a gradient for every input of ``forward``, where
            ``run`` takes the arguments of ``backward``.
    """
    op: Any = torch.library.custom_op(f"linnet::{name}", forward, mutates_args=())
    op.register_fake(forward_fake)
    op_backward: Any = torch.library.custom_op(f"linnet::{name}_backward", backward, mutates_args=())
    op_backward.register_fake(backward_fake)
    op.register_autograd(lambda ctx, *grads: gradients(op_backward, ctx, *grads), setup_context=setup)

    class Eager(torch.autograd.Function):
        # One method for both: with a `setup_context` of its own, torch inspects the signature in every call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return once(name, ctx, lambda: gradients(backward, ctx, *grads))

    # What `torch.func` wants to see. An op of `torch.library` has no gradient there, and under its jvp none of the
    # tangents, silently.
    functional = {"forward": staticmethod(forward), "setup_context": staticmethod(setup), "backward": Eager.backward}
    Functional: Any = type(name, (torch.autograd.Function,), functional)

    def call(x: Tensor, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return Functional.apply(x, *args)
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta" or _recorded():
            return op(x, *args)
        return Eager.apply(x, *args)

    return call
