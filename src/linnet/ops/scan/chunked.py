"""The scans as vectorised PyTorch, exact for gates of zero: maps of whole chunks, a scan of those, every chunk again.

All chunks are walked side by side: a scan of T tokens takes 3 sqrt(T) steps or so and about twice the work of the
recurrence. The maps of a chunk are composed by products, never by quotients. The first token of a sequence, with the
state before it known, is a constant map: nothing that comes earlier in the row gets past it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.chunks import accumulate_dtype
from .reference import apply

__all__ = ["backward", "forward", "selective_backward", "selective_forward"]


class _Rows(NamedTuple):
    """The sequences that are not empty: row of the batch, first and last token, row of the state."""

    batch: Tensor
    first: Tensor
    last: Tensor
    row: Tensor

    @classmethod
    def of(cls, x: Tensor, cu_host: Tensor | None) -> _Rows:
        if cu_host is None:
            every = torch.arange(x.shape[0], device=x.device)
            return cls(every, torch.zeros_like(every), torch.full_like(every, x.shape[1] - 1), every)
        row = cu_host.diff().nonzero()[:, 0]
        first, last = cu_host[:-1].long()[row], cu_host[1:].long()[row] - 1
        return cls(*(y.to(x.device) for y in (torch.zeros_like(row), first, last, row)))

    def within(self, start: int, stop: int) -> tuple[_Rows, _Rows]:
        """Those that begin in this span of tokens and those that end in it, counted from its start."""
        begins, ends = (((x >= start) & (x < stop)).nonzero()[:, 0] for x in (self.first, self.last))
        moved = self._replace(first=self.first - start, last=self.last - start)
        return _Rows(*(x[begins] for x in moved)), _Rows(*(x[ends] for x in moved))


def _compose(algebra: str, a: Tensor, b: Tensor, a1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """The map (a, b) after the map (a1, b1)."""
    if algebra == "minmax":
        both = torch.minimum(a, a1)
    elif algebra == "block":
        both = a[..., :1] * a1[..., :1, :] + a[..., 1:] * a1[..., 1:, :]
    else:
        both = a * a1
    return both, apply(algebra, a, b, b1)


def _inclusive(algebra: str, a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """All states ``[B, T, *]`` when the first token of every row is a constant map."""
    T = b.shape[1]
    chunk = chunk or max(1, math.isqrt(T))
    chunks = -(-T // chunk)
    if chunks * chunk > T:
        a, b = (torch.cat([x, x.new_zeros(x.shape[0], chunks * chunk - T, *x.shape[2:])], 1) for x in (a, b))
    a, b = a.unflatten(1, (chunks, chunk)), b.unflatten(1, (chunks, chunk))
    h = torch.zeros_like(b[:, :, 0])
    if chunks > 1:
        whole = a[:, :-1, 0], b[:, :-1, 0]
        for t in range(1, chunk):
            whole = _compose(algebra, a[:, :-1, t], b[:, :-1, t], *whole)
        for i in range(1, chunks):
            h[:, i] = apply(algebra, whole[0][:, i - 1], whole[1][:, i - 1], h[:, i - 1])
    out = torch.empty_like(b)
    for t in range(chunk):
        h = out[:, :, t] = apply(algebra, a[:, :, t], b[:, :, t], h)
    return out.flatten(1, 2)[:, :T]


def _enter(algebra: str, a: Tensor, b: Tensor, batch: Tensor, time: Tensor, h: Tensor) -> None:
    """Make the maps at these places constant, with the states before them known; in place."""
    value = apply(algebra, a[batch, time], b[batch, time], h)
    a[batch, time] = value if algebra == "minmax" else 0
    b[batch, time] = value


def _before(h: Tensor, h0: Tensor, rows: _Rows) -> Tensor:
    """The state before every token."""
    prev = torch.cat([h[:, :1], h[:, :-1]], 1)
    prev[rows.batch, rows.first] = h0[rows.row]
    return prev


def _prepare(algebra: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of sums; complex numbers as such."""
    acc = accumulate_dtype(tensors[0])
    wide = (x.to(acc, memory_format=torch.contiguous_format) for x in tensors)
    return tuple(torch.view_as_complex(x.contiguous()) if algebra == "complex" else x for x in wide)


def _states(algebra: str, a: Tensor, b: Tensor, h0: Tensor, rows: _Rows, chunk: int) -> Tensor:
    a, b = a.clone(), b.clone()
    _enter(algebra, a, b, rows.batch, rows.first, h0[rows.row])
    return _inclusive(algebra, a, b, chunk)


def _mirrored(cu_host: Tensor | None, tokens: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Everything in the opposite order of time: bounds, tensors ``[B, T, *]``, and tensors with one row a sequence."""
    tokens = tuple(x.flip(1) for x in tokens)
    if cu_host is None:
        return None, *tokens, *rows
    return (cu_host[-1] - cu_host).flip(0), *tokens, *(x.flip(0) for x in rows)


def forward(
    algebra: str, a: Tensor, b: Tensor, h0: Tensor, cu_host: Tensor | None, reverse: bool, chunk: int
) -> tuple[Tensor, Tensor]:
    """States after every token in b's dtype and after the last token of every sequence; a chunk of 0 is chosen here."""
    if reverse:
        mirror, a, b, h0 = _mirrored(cu_host, (a, b), (h0,))
        return _mirrored(mirror, *((x,) for x in forward(algebra, a, b, h0, mirror, False, chunk)))[1:]  # type: ignore[return-value]
    dtype, rows = b.dtype, _Rows.of(b, cu_host)
    b, a, h0 = _prepare(algebra, b, a, h0)
    h = _states(algebra, a, b, h0, rows, chunk)
    last = h0.clone()
    last[rows.row] = h[rows.batch, rows.last]
    if algebra == "complex":
        h, last = torch.view_as_real(h), torch.view_as_real(last)
    return h.to(dtype).contiguous(), last


def backward(
    algebra: str,
    a: Tensor,
    b: Tensor,
    h0: Tensor,
    cu_host: Tensor | None,
    reverse: bool,
    chunk: int,
    dh: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial states from those of the states and the last ones: with G the gradient of a
    state by all that follows, ``G_t = dh_t + a_{t+1}^T G_{t+1}``, ``db_t = G_t``, ``da_t = G_t h_{t-1}^T``."""
    if reverse:
        mirror, a, b, dh, h0, dlast = _mirrored(cu_host, (a, b, dh), (h0, dlast))
        da, db, dh0 = backward(algebra, a, b, h0, mirror, False, chunk, dh, dlast)
        return _mirrored(mirror, (da, db), (dh0,))[1:]  # type: ignore[return-value]
    dtypes, rows = (a.dtype, b.dtype), _Rows.of(b, cu_host)
    b, a, h0, dh, dlast = _prepare(algebra, b, a, h0, dh, dlast)
    prev = _before(_states(algebra, a, b, h0, rows, chunk), h0, rows)
    if algebra == "minmax":
        lower = b >= torch.minimum(a, prev)
        upper = (a <= prev) & ~lower
        keep = (~lower & ~upper).to(b.dtype)
    else:
        lower = upper = None
        keep = a.transpose(-1, -2) if algebra == "block" else a.conj()
    linear = "real" if algebra == "minmax" else algebra
    coming = torch.cat([keep[:, 1:], keep[:, :1]], 1)
    coming[rows.batch, rows.last] = 0
    dh = dh.clone()
    dh[rows.batch, rows.last] += dlast[rows.row]
    G = _inclusive(linear, coming.flip(1), dh.flip(1), chunk).flip(1)
    dh0 = dlast.clone()
    at = rows.batch, rows.first
    dh0[rows.row] = apply(linear, keep[at], torch.zeros_like(G[at]), G[at])
    if lower is not None and upper is not None:
        da, db = G * upper, G * lower
    elif algebra == "block":
        da, db = G[..., :, None] * prev[..., None, :], G
    else:
        da, db = G * prev.conj(), G
    if algebra == "complex":
        da, db, dh0 = (torch.view_as_real(x.resolve_conj()) for x in (da, db, dh0))
    return da.to(dtypes[0]), db.to(dtypes[1]), dh0


class _Block(NamedTuple):
    """A span of tokens of a selective scan: gates, states, states before, all ``[B, L, D, S]``."""

    gates: Tensor
    states: Tensor
    before: Tensor


def _spread(x: Tensor, channels: int) -> Tensor:
    """``[B, L, G, S] -> [B, L, D, S]``: a group serves D / G consecutive channels."""
    return x.repeat_interleave(channels // x.shape[2], 2)


def _block(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, h0: Tensor, carry: Tensor, begins: _Rows) -> _Block:
    a = (delta[..., None] * A).exp()
    b = (delta * x)[..., None] * _spread(B, x.shape[2])
    maps = a.clone(), b
    _enter("real", *maps, begins.batch, begins.first, h0[begins.row])
    every = torch.arange(x.shape[0], device=x.device)
    _enter("real", *maps, every, torch.zeros_like(every), carry)
    h = _inclusive("real", *maps, 0)
    prev = torch.cat([carry[:, None], h[:, :-1]], 1)
    prev[begins.batch, begins.first] = h0[begins.row]
    return _Block(a, h, prev)


def selective_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor,
    cu_host: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reading in x's dtype, the last states, and the states before every block ``[blocks, B, D, S]``: the states of
    only one block of tokens exist at a time."""
    dtype, rows = x.dtype, _Rows.of(x, cu_host)
    x, delta, A, B, C, h0 = _prepare("real", x, delta, A, B, C, h0)
    carry = h0.new_zeros(x.shape[0], *h0.shape[1:])
    last, out, edges = h0.clone(), [], []
    for s in range(0, x.shape[1], block):
        edges.append(carry)
        at = slice(s, s + block)
        begins, ends = rows.within(s, s + block)
        h = _block(x[:, at], delta[:, at], A, B[:, at], h0, carry, begins).states
        out.append((h * _spread(C[:, at], x.shape[2])).sum(-1))
        last[ends.row] = h[ends.batch, ends.last]
        carry = h[:, -1]
    y = torch.cat(out, 1)
    if D is not None:
        y = y + D.to(y.dtype) * x
    return y.to(dtype), last, torch.stack(edges)


def selective_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor,
    edges: Tensor,
    cu_host: Tensor | None,
    block: int,
    dy: Tensor,
    dlast: Tensor,
) -> dict[str, Tensor]:
    """Gradients by input name, block by block from the last to the first, each from the states before it."""
    given = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "h": h0}
    rows = _Rows.of(x, cu_host)
    x, delta, A, B, C, h0, dy, dlast = _prepare("real", x, delta, A, B, C, h0, dy, dlast)
    groups = B.shape[2]
    dx, ddelta, dB, dC = (torch.empty_like(y) for y in (x, delta, B, C))
    dA, dh0, coming = torch.zeros_like(A), dlast.clone(), torch.zeros_like(edges[0])
    for i in reversed(range(len(edges))):
        at = slice(i * block, (i + 1) * block)
        x_i, delta_i, dy_i = x[:, at], delta[:, at], dy[:, at]
        begins, ends = rows.within(at.start, at.stop)
        a, h, prev = _block(x_i, delta_i, A, B[:, at], h0, edges[i], begins)
        dh = dy_i[..., None] * _spread(C[:, at], x.shape[2])
        dh[:, -1] += coming
        dh[ends.batch, ends.last] += dlast[ends.row]
        keep = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        keep[ends.batch, ends.last] = 0
        G = _inclusive("real", keep.flip(1), dh.flip(1), 0).flip(1)
        back = a[:, 0] * G[:, 0]
        firsts = begins.batch, begins.first
        dh0[begins.row] = a[firsts] * G[firsts]
        coming = back.index_put((begins.batch[begins.first == 0],), back.new_zeros(()))
        decays = G * prev * a
        writes = (G * _spread(B[:, at], x.shape[2])).sum(-1)
        dx[:, at] = delta_i * writes
        ddelta[:, at] = x_i * writes + (decays * A).sum(-1)
        dA += (delta_i[..., None] * decays).sum((0, 1))
        dB[:, at] = (G * (delta_i * x_i)[..., None]).unflatten(2, (groups, -1)).sum(3)
        dC[:, at] = (h * dy_i[..., None]).unflatten(2, (groups, -1)).sum(3)
    grads = {"x": dx, "delta": ddelta, "A": dA, "B": dB, "C": dC, "h": dh0}
    if D is not None:
        grads["x"] = dx + D.to(dx.dtype) * dy
        grads["D"] = (dy * x).sum((0, 1))
    return {name: y.to(given[name].dtype) for name, y in grads.items()}  # type: ignore[union-attr]
