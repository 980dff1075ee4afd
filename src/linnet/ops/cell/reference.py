"""The recurrence of the cells token by token: the definition every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..core.chunks import accumulate_dtype
from .cells import CELLS, Tensors, preactivations, split_peepholes


def _run(x: Tensor, R: Tensor, b: Tensor | None, p: Tensors, state: Tensors, kind: str) -> tuple[list[Tensor], Tensors]:
    outputs = []
    for t in range(x.shape[1]):
        product = torch.einsum("nhd,hde->nhe", state[0], R)
        state = CELLS[kind].step(preactivations(kind, x[:, t], product if b is None else product + b), state, p)
        outputs.append(state[0])
    return outputs, state


def recurrent(
    x: Tensor, R: Tensor, b: Tensor | None, p: Tensor | None, state: Tensors, bounds: list[int] | None, kind: str
) -> tuple[Tensor, Tensors]:
    """``h`` of every token ``[B, T, H, D]`` in x's dtype and the state after the last, of a batch or of a packed row
    cut at ``bounds``."""
    acc, dtype = accumulate_dtype(x), x.dtype
    x, R = x.to(acc), R.to(acc)
    b, p = (None if y is None else y.to(acc) for y in (b, p))
    weights = R, b, split_peepholes(kind, p)
    if bounds is None:
        outputs, state = _run(x, *weights, state, kind)
        return torch.stack(outputs, 1).to(dtype), state
    outputs, rows = [], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        h, row = _run(x[:, begin:end], *weights, tuple(s[n : n + 1] for s in state), kind)
        outputs += h
        rows.append(row)
    return torch.stack(outputs, 1).to(dtype), tuple(torch.cat(part) for part in zip(*rows, strict=True))
