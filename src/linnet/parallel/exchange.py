"""Differentiable communication between the processes that hold the slices of a sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.ops.core import map_state, state_tensors

__all__ = ["gather", "receive", "send"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_AXES = 6


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts), x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return None, grad[dist.get_rank(ctx.group)]


def gather(tensors: list[Tensor], group: Any) -> tuple[list[list[Tensor]], Tensor]:
    """What every process has of each tensor: a list by process of lists by tensor; and a zero.

    The tensors have the same shapes in every process. The zero has to be added to something that the loss of every
    process depends on: the backward pass communicates as well, and waits for all.
    """
    flat = torch.cat([x.flatten() for x in tensors])
    rows, zero = _Gather.apply(group, flat)  # type: ignore[misc]
    sizes = [x.numel() for x in tensors]
    return [[part.view_as(x) for part, x in zip(row.split(sizes), tensors, strict=True)] for row in rows], zero


def _peer(group: Any, step: int) -> int:
    return dist.get_global_rank(group or dist.group.WORLD, dist.get_rank(group) + step)  # type: ignore[arg-type]


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, pending: list[Any], x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.group, ctx.like = group, [t.detach() for t in tensors]
        to = _peer(group, 1)
        shapes = [[_DTYPES.index(t.dtype), t.dim(), *t.shape, *[0] * (_AXES - t.dim())] for t in ctx.like]
        for message in (torch.tensor(shapes, device=x.device), *[t.contiguous() for t in ctx.like]):
            if message.numel():
                pending.append((dist.isend(message, to, group=group), message))  # kept until it has arrived
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grads = []
        for t in ctx.like:
            g = torch.empty_like(t, memory_format=torch.contiguous_format) if t.is_floating_point() else None
            if g is not None and g.numel():
                dist.recv(g, _peer(ctx.group, 1), group=ctx.group)
            grads.append(g)
        return None, None, grad, *grads


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, count: int, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        source, found = _peer(group, -1), []
        shapes = torch.empty(count, 2 + _AXES, dtype=torch.int64, device=anchor.device)
        if count:
            dist.recv(shapes, source, group=group)
        for kind, axes, *shape in shapes.tolist():  # the host waits once a layer
            x = torch.empty(shape[:axes], dtype=_DTYPES[kind], device=anchor.device)
            if x.numel():
                dist.recv(x, source, group=group)
            found.append(x)
        ctx.mark_non_differentiable(*[x for x in found if not x.is_floating_point()])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        for g in grads:
            if g is not None and g.is_floating_point() and g.numel():
                dist.send(g.contiguous(), _peer(ctx.group, -1), group=ctx.group)
        return None, None, None


def send(x: Tensor, state: Any, group: Any, pending: list[Any]) -> Tensor:
    """Send a state to the next process; ``x`` comes back, and the gradients of the state come from there when the
    backward pass reaches it. ``pending`` collects the messages on their way, to be waited for."""
    return _Send.apply(group, pending, x, *state_tensors(state))  # type: ignore[return-value]


def receive(template: Any, like: Tensor, group: Any) -> Any:
    """A state of the structure of ``template`` from the previous process, on the device of ``like``."""
    anchor = torch.zeros((), device=like.device, requires_grad=torch.is_grad_enabled())
    tensors = iter(_Receive.apply(group, len(state_tensors(template)), anchor))  # type: ignore[arg-type]
    return map_state(lambda _: next(tensors), template)
