"""A decoder whose sequences are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linnet.models import Decoder, DecoderOutput
from linnet.ops.core import join_rows

from .exchange import receive, send

__all__ = ["ContextParallel", "shard", "sum_gradients"]


def shard(x: Tensor, group: Any = None) -> Tensor:
    """This process's slice ``[B, T / R, ...]`` of ``[B, T, ...]``; the first processes take one more where T does not
    divide.

    Raises:
        ValueError: fewer tokens than processes.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if x.shape[1] < size:
        raise ValueError(f"x: expected at least {size} tokens for {size} processes, got {x.shape[1]}")
    return x.tensor_split(size, 1)[rank]


def sum_gradients(model: nn.Module, group: Any = None) -> None:
    """Add up the gradients of all processes, after the backward pass; a parameter without one counts as zero."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad, group=group)


class ContextParallel(nn.Module):
    """A decoder on one slice of its sequences; the processes of a group hold the slices, in the order of their ranks.

    Each layer starts from the state that the process before has reached in that layer, and sends its own on: states of
    constant size, windows, or the whole cache of full attention. Process r is then r layers behind the first one: of L
    layers on R processes, L / (L + R - 1) of the time is worked. With ``split_rows`` the rows of a batch of B follow
    each other, which makes it B L / (B L + R - 1).

    >>> model = ContextParallel(decoder)
    >>> loss = model.loss(shard(tokens), shard(targets))
    >>> loss.backward()
    >>> sum_gradients(decoder)

    While it exists the decoder serves it alone; :meth:`remove` gives the decoder back.

    Args:
        decoder: the same weights in every process.
        group: the processes; all when None.
        split_rows: work on one row of the batch after the other.

    Raises:
        ValueError: the decoder recomputes layers in the backward pass, which would send their states twice.
    """

    def __init__(self, decoder: Decoder, group: Any = None, *, split_rows: bool = False):
        super().__init__()
        if decoder.gradient_checkpointing:
            raise ValueError("decoder: expected gradient_checkpointing = False, got True")
        self.decoder, self.group, self.split_rows = decoder, group, split_rows
        self._pending: list[Any] = []
        self._hooks = []
        for layer in decoder.layers:
            self._hooks += [layer.register_forward_pre_hook(self._enter), layer.register_forward_hook(self._leave)]
        self._hooks.append(decoder.layers[-1].register_forward_hook(self._wait))

    def remove(self) -> None:
        """Undo what the constructor did to the decoder."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, segments = args
        if state is not None or segments is not None:
            raise ValueError("state, segments: expected None, the states come from the process before")
        if dist.get_rank(self.group) > 0:
            state = receive(layer.mixer.init_state(x.shape[0]), x, self.group)
        return x, state, None

    def _leave(self, layer: Any, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, aux = output
        if dist.get_rank(self.group) < dist.get_world_size(self.group) - 1:
            x = send(x, state, self.group, self._pending)
        return x, state, aux

    def _wait(self, *_: Any) -> None:
        for message, _buffer in self._pending:
            message.wait()
        self._pending.clear()

    def forward(self, tokens: Tensor) -> DecoderOutput:
        """Logits of the slice, and the state after it (after the whole sequence in the last process).

        Args:
            tokens: this process's slice, int64 ``[B, T]``; the same B everywhere.

        Raises:
            ValueError: as the decoder.
        """
        outputs = [self.decoder(part) for part in self._parts(tokens)]
        if len(outputs) == 1:
            return outputs[0]
        state = join_rows([out.state for out in outputs])
        aux = torch.stack([out.aux_loss for out in outputs]).mean()
        return DecoderOutput(torch.cat([out.logits for out in outputs]), state, aux)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """This process's share of :meth:`linnet.Decoder.loss`: the shares add up to it, and so do their gradients. Of
        the auxiliary losses, which are means over tokens, it is the mean over the slices, weighted by how many targets
        of each count.

        Args:
            tokens: the slice.
            targets: int64, like ``tokens``: the id each position has to predict, -100 is not counted.
        """
        count = (targets != -100).sum()
        dist.all_reduce(count, group=self.group)
        losses = [
            # Also without targets of its own a slice takes part, for the processes after it.
            self.decoder.loss(part, goals) * (goals != -100).sum()
            for part, goals in zip(self._parts(tokens), self._parts(targets), strict=True)
        ]
        return torch.stack(losses).sum() / count.clamp(min=1)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(1) if self.split_rows else (x,)
