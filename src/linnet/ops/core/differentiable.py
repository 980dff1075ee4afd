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

    generate_vmap_rule = True

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


def _transformable(name: str, **methods: Callable[..., Any]) -> Callable[..., Any]:
    """An ``autograd.Function`` of these methods for ``torch.func``, whose ``vmap`` takes one slice after the other: an
    implementation that adds in place, or a kernel, cannot take all of them at once."""

    def part(x: Any, dim: Any, i: int) -> Any:
        if isinstance(x, (list, tuple)):
            return [part(one, where, i) for one, where in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = [function.apply(*part(args, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    named = {key: staticmethod(method) for key, method in {**methods, "vmap": vmap}.items()}
    function: Any = type(name, (torch.autograd.Function,), named)
    return function.apply


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
            run = functional_backward if torch._C._are_functorch_transforms_active() else backward
            return once(name, ctx, lambda: gradients(run, ctx, *grads))

    # What `torch.func` wants to see. An op of `torch.library` has no gradient there, and under its jvp none of the
    # tangents, silently.
    functional = _transformable(name, forward=forward, setup_context=setup, backward=Eager.backward)
    functional_backward = _transformable(
        f"{name}_backward", forward=lambda *args: tuple(backward(*args)), setup_context=lambda ctx, inputs, output: None
    )

    def call(x: Tensor, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return functional(x, *args)
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta" or _recorded():
            return op(x, *args)
        return Eager.apply(x, *args)

    return call
