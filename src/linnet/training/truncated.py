"""Truncated back-propagation through time: a long sequence in windows, its state carried, its gradient cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from linnet.models import Decoder
from linnet.models.mlp import at_least_fp32
from linnet.ops.core import detach

__all__ = ["Window", "windows"]


class Window(NamedTuple):
    """One window of :func:`windows`.

    Attributes:
        loss: mean cross entropy in nats of its counted targets, in training mode plus the auxiliary losses, to call
            ``backward`` on.
        state: the state after it, cut from the graph: where the next stretch of the same rows goes on.
    """

    loss: Tensor
    state: tuple[Any, ...]


def windows(
    model: Decoder, tokens: Tensor, targets: Tensor, size: int, state: tuple[Any, ...] | None = None
) -> Iterator[Window]:
    """The losses of a batch of long rows, ``size`` tokens at a time. A window starts from the state in which the one
    before ended, but no gradient goes back there (Williams & Zipser 1989; Werbos 1990)::

        for window in windows(model, tokens, targets, 128, state):
            optimizer.zero_grad()
            window.loss.backward()
            optimizer.step()
        state = window.state                       # for the next batch, when its rows continue these

    What is carried is the state under the weights before the step, as is usual. Memory is that of one window.

    Args:
        model: the decoder.
        tokens, targets: int64 ``[B, T]``; -100 among the targets is not counted.
        size: tokens of a window; the last may be shorter.
        state: where the rows start from; None for their beginning.

    Raises:
        ValueError: ``size`` is below 1 or the shapes differ.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if targets.shape != tokens.shape:
        raise ValueError(f"targets: expected shape {list(tokens.shape)} like tokens, got {list(targets.shape)}")
    return _windows(model, tokens, targets, size, state)


def _windows(model: Decoder, tokens: Tensor, targets: Tensor, size: int, state: Any) -> Iterator[Window]:
    for part, wanted in zip(tokens.split(size, 1), targets.split(size, 1), strict=True):
        out = model(part, state)
        logits, wanted = out.logits.flatten(0, 1), wanted.flatten()
        logits = at_least_fp32(logits)
        total = F.cross_entropy(logits, wanted, reduction="sum")
        if model.training and model.config.z_loss:
            total = total + model.z_loss(logits, wanted)
        state = detach(out.state)
        loss = total / (wanted != -100).sum().clamp(min=1)
        yield Window(loss + out.aux_loss if model.training else loss, state)
