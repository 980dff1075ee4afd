"""The state of the cell engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import uploaded


class CellState(NamedTuple):
    """``h`` ``[N, H, D]``, with a memory cell ``c`` ``[N, H, D]``, for the sLSTM also its normaliser ``n`` and its
    log-scale ``m`` (the cell is ``c exp(m)``, its normaliser ``n exp(m)``; no gradient goes through ``m``); parts a
    kind does not have are None. fp32, one row a sequence."""

    h: Tensor
    c: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None


def before(h: Tensor, h0: Tensor, cu_host: Tensor | None) -> Tensor:
    """What every token finds: the ``h`` ``[B, T, ...]`` of the token before it, at the first of a sequence its row of
    ``h0`` ``[N, ...]``."""
    if cu_host is None:
        return torch.cat([h0[:, None].to(h.dtype), h[:, :-1]], 1)
    full = (cu_host.diff() > 0).nonzero().flatten()  # sequences that have a first token
    firsts, rows = _indices(cu_host[full], h), h0.index_select(0, _indices(full, h)).to(h.dtype)
    return h[0].roll(1, 0).index_copy(0, firsts, rows)[None]


def after_last(h: Tensor, h0: Tensor, cu_host: Tensor | None) -> Tensor:
    """The ``h`` of the last token of every sequence, its row of ``h0`` where it has none."""
    if cu_host is None:
        return h[:, -1].clone()
    full = (cu_host.diff() > 0).nonzero().flatten()
    lasts = _indices(cu_host[full + 1] - 1, h)
    return h0.index_copy(0, _indices(full, h), h[0].index_select(0, lasts).to(h0.dtype))


def at_first(g: Tensor, like: Tensor, cu_host: Tensor | None) -> Tensor:
    """The values ``[B, T, ...]`` at the first token of every sequence as rows ``[N, ...]``; 0 where there is none."""
    if cu_host is None:
        return g[:, 0].clone()
    full = (cu_host.diff() > 0).nonzero().flatten()
    firsts = _indices(cu_host[full], g)
    return torch.zeros_like(like).index_copy(0, _indices(full, g), g[0].index_select(0, firsts).to(like.dtype))


def add_at_last(g: Tensor, rows: Tensor, cu_host: Tensor | None) -> tuple[Tensor, Tensor]:
    """``g`` ``[B, T, ...]`` with ``rows`` ``[N, ...]`` added at the last token of every sequence, and what is left of
    ``rows``: those of sequences that have none."""
    g = g.clone()
    if cu_host is None:
        g[:, -1] += rows
        return g, torch.zeros_like(rows)
    full = (cu_host.diff() > 0).nonzero().flatten()
    lasts, which = _indices(cu_host[full + 1] - 1, g), _indices(full, g)
    g[0] = g[0].index_add(0, lasts, rows.index_select(0, which).to(g.dtype))
    return g, rows.index_fill(0, which, 0)


def _indices(host: Tensor, like: Tensor) -> Tensor:
    return uploaded(host, like.device).long()
