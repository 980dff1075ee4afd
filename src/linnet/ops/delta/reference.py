"""The diagonal-plus-low-rank recurrence token by token: the definition every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..core.chunks import accumulate_dtype

NORM_EPS = 1e-6


def normalized(x: Tensor) -> Tensor:
    """``x / sqrt(sum x^2 + 1e-6)`` over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _read(x: Tensor, S: Tensor) -> Tensor:
    """``S^T x`` for ``x [B, H, K]``, ``S [B, H, K, V]``."""
    return (x[..., None] * S).sum(-2)


def _write(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return S + k[..., :, None] * v[..., None, :]


def _tied(q: Tensor, k: Tensor, e: Tensor, z: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """``q, g [B, T, H, ...]``, ``k, e, z [B, T, n, H, ...]``, everything in the accumulation dtype."""
    reads = []
    for t in range(q.shape[1]):
        if g is not None:
            S = S * g[:, t].exp()[..., None]
        for j in range(k.shape[2]):
            S = _write(S, k[:, t, j], z[:, t, j] - _read(e[:, t, j], S))
        reads.append(_read(q[:, t], S))
    return torch.stack(reads, 1), S


def _untied(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """All ``[B, T, H, ...]`` in the accumulation dtype."""
    reads = []
    for t in range(q.shape[1]):
        seen = _read(a[:, t], S)
        S = _write(_write(S * g[:, t].exp()[..., None], b[:, t], seen), k[:, t], v[:, t])
        reads.append(_read(q[:, t], S))
    return torch.stack(reads, 1), S


def _over_segments(run, inputs: tuple[Tensor | None, ...], S: Tensor, bounds: list[int] | None):
    """``run(*inputs, S)`` on a batch (``bounds`` None), or on each sequence of a packed row from its own state."""
    if bounds is None:
        return run(*inputs, S)
    reads, states = [], []
    for n, (a, b) in enumerate(pairwise(bounds)):
        S_n = S[n : n + 1]
        if b > a:
            o, S_n = run(*(None if x is None else x[:, a:b] for x in inputs), S_n)
            reads.append(o)
        states.append(S_n)
    return torch.cat(reads, 1), torch.cat(states)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    bounds: list[int] | None,
    scale: float,
    l2norm: bool,
    substeps: int,
) -> tuple[Tensor, Tensor]:
    """:func:`linnet.ops.delta` on checked inputs, packed at ``bounds``: reading ``[B, T, H, V]`` and final ``S``."""
    acc, groups = accumulate_dtype(q), v.shape[2] // q.shape[2]
    dtype = v.dtype
    q, k, v, beta = (x.to(acc) for x in (q, k, v, beta))
    if l2norm:
        q, k = normalized(q), normalized(k)
    q, k = (x.repeat_interleave(groups, 2) for x in (scale * q, k))
    beta = beta.reshape(*beta.shape[:3], -1)
    k, e, z = (x.unflatten(1, (-1, substeps)) for x in (k, beta * k, v * (beta if w is None else w.to(acc))))
    g = None if g is None else g.to(acc).reshape(*g.shape[:3], -1)
    o, S = _over_segments(_tied, (q, k, e, z, g), S.to(acc), bounds)
    return o.to(dtype), S


def recurrent_untied(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    S: Tensor,
    bounds: list[int] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`linnet.ops.dplr` on checked inputs, packed at ``bounds``."""
    acc, dtype = accumulate_dtype(q), v.dtype
    q, k, v, a, b, g = (x.to(acc) for x in (q, k, v, a, b, g.reshape(*g.shape[:3], -1)))
    o, S = _over_segments(_untied, (scale * q, k, v, a, b, g), S.to(acc), bounds)
    return o.to(dtype), S
