"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the attention over each of them::

        lse = log sum_i exp lse_i,    o = sum_i exp(lse_i - lse) o_i

    Args:
        outs: the outputs ``[B, T, H, V]`` of the parts, one dtype.
        lses: log-sum-exp of the scores of each part ``[B, T, H]``; -inf where a part has no key for a query (what
            its output holds there does not matter if it is finite).

    Returns:
        ``(o, lse)`` of the union, o in the dtype of the parts; ``o = 0, lse = -inf`` where no part has a key.
        Differentiable in every argument.

    Raises:
        ValueError: when the numbers of parts or their shapes disagree.

    Source: the blockwise softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867).
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lses: expected one log-sum-exp for each of the {len(outs)} outs, at least one; got {len(lses)}"
        )
    for i, (o, lse) in enumerate(zip(outs, lses, strict=True)):
        if o.shape != outs[0].shape:
            raise ValueError(f"outs[{i}]: expected shape {list(outs[0].shape)} like outs[0], got {list(o.shape)}")
        if lse.shape != o.shape[:-1]:
            raise ValueError(f"lses[{i}]: expected shape {list(o.shape[:-1])}, got {list(lse.shape)}")
    stacked = torch.stack(list(lses))
    top = stacked.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    weights = (stacked - top).exp()
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1, total)
    o = reduce(torch.add, (w[..., None] * x for w, x in zip(weights / safe, outs, strict=True)))
    return o.to(outs[0].dtype), torch.where(empty, -torch.inf, safe.log() + top)
