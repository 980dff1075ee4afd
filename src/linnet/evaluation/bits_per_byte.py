"""Bits per byte: how many bits the model needs to tell the text, divided by its size. It compares models with
different tokenizers with each other, and with compressors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linnet.mixers import Mixer
from linnet.ops.core import state_bytes

__all__ = ["bits_per_byte"]

Model = Callable[..., Any]


@torch.no_grad()
def bits_per_byte(
    model: Model,
    tokens: np.ndarray,
    num_bytes: int,
    *,
    context: int = 512,
    batch_size: int = 16,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    part: int = 0,
    parts: int = 1,
) -> float:
    """Bits per byte of a language model on a text.

    The text is laid out as ``batch_size`` strips that are read side by side in windows of ``context`` tokens. A model
    whose state is bounded (recurrent layers, attention in a window) carries it from window to window, so that each
    strip is one long reading; a growing state (full attention) is dropped at each window, where the context then
    begins anew.

    Args:
        model: a :class:`linnet.Decoder` in evaluation mode, or anything called like it.
        tokens: ids ``[N]`` of the text with its end-of-document marks, which are part of the cost. The first one is
            only given, not scored.
        num_bytes: size of the text.
        context: tokens of a window.
        batch_size: strips.
        max_tokens: read only the beginning of every strip, about this many tokens in all: a sample of the text.
        device: where the model takes its inputs (default: where its parameters are).
        part: which share of the strips to read, of ``parts`` processes. Each returns its share of the result, to be
            added up, and makes the same number of calls.

    Raises:
        ValueError: fewer than two tokens, or a size below 1.
    """
    pairs = len(tokens) - 1
    if pairs < 1 or num_bytes < 1:
        raise ValueError(f"tokens: expected at least two tokens of at least one byte, got {len(tokens)} of {num_bytes}")
    if min(context, batch_size, max_tokens or 1) < 1:
        raise ValueError(f"context, batch_size, max_tokens: expected at least 1, got {context, batch_size, max_tokens}")
    if device is None:
        device = next(model.parameters()).device  # type: ignore[union-attr]
    rows = -(-max(1, min(batch_size, pairs // context)) // parts) * parts
    windows = -(-pairs // (rows * context))
    length = windows * context
    inputs, targets = np.zeros(rows * length, np.int64), np.full(rows * length, -100, np.int64)
    inputs[:pairs], targets[:pairs] = tokens[:-1], tokens[1:]
    inputs, targets = inputs.reshape(rows, length), targets.reshape(rows, length)
    if max_tokens is not None:
        length = min(windows, max(1, max_tokens // (rows * context))) * context
    scored = int((targets[:, :length] >= 0).sum())
    strips = slice(part * rows // parts, (part + 1) * rows // parts)
    x = torch.from_numpy(inputs[strips, :length]).to(device)
    y = torch.from_numpy(targets[strips, :length]).to(device)

    nats, state, carry = torch.zeros((), dtype=torch.float64, device=device), None, None
    for at in range(0, length, context):
        window = slice(at, at + context)
        out = model(x[:, window], state=state)
        nats += F.cross_entropy(out.logits.flatten(0, 1).float(), y[:, window].flatten(), reduction="sum")
        if carry is None and at + context < length:
            carry = not _grows(model, x[:, at + context : at + context + 1], out.state)
        state = out.state if carry else None
    return float(nats) / math.log(2) / (num_bytes * scored / pairs)


def _grows(model: Model, token: Tensor, state: Any) -> bool:
    """Whether the state grows with every token for ever; a window that is not full yet does not."""
    mixers = [m for m in model.modules() if isinstance(m, Mixer)] if isinstance(model, nn.Module) else []
    if mixers:
        return any(not m.card.constant_state and getattr(m, "window", None) is None for m in mixers)
    return state_bytes(model(token, state=state).state) > state_bytes(state)
