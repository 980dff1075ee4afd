"""The diagonal-decay recurrence token by token: the definition every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..core.chunks import accumulate_dtype


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    scale: float,
    S: Tensor,
    z: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One batch ``[B, T, ...]`` in the accumulation dtype, q/k heads already repeated, ``g`` as ``[B, T, H, 1|K]``."""
    reads, norms = [], []
    for t in range(q.shape[1]):
        keep = None if g is None else g[:, t].exp()
        k_t, v_t, q_t = k[:, t], v[:, t], scale * q[:, t]
        write = k_t[..., :, None] * v_t[..., None, :]
        if u is not None:  # exclusive reading: the query sees S_{t-1} and, through the bonus, its own token
            reads.append((q_t[..., None] * (S + u[..., None] * write)).sum(-2))
            if z is not None:
                norms.append((q_t * (z + u * k_t)).sum(-1))
        if keep is not None:
            S = S * keep[..., None]
            z = None if z is None else z * keep
        if gv is not None:
            S = S * gv[:, t].exp()[..., None, :]
        S = S + write
        z = None if z is None else z + k_t
        if u is None:
            reads.append((q_t[..., None] * S).sum(-2))
            if z is not None:
                norms.append((q_t * z).sum(-1))
    return torch.stack(reads, 1), torch.stack(norms, 1) if norms else None, S, z


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    scale: float,
    S: Tensor,
    z: Tensor | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The recurrence on ``[B, T, H, ...]`` (``bounds`` None) or on a packed row cut at ``bounds``.

    Returns the un-normalised reading ``[B, T, H, V]`` in the input dtype, the normaliser ``scale * q.z`` as
    ``[B, T, H]`` in the accumulation dtype (None without ``z``), and the final ``S`` and ``z``.
    """
    acc = accumulate_dtype(q)
    dtype, groups = v.dtype, v.shape[2] // q.shape[2]
    q, k = (x.to(acc).repeat_interleave(groups, 2) for x in (q, k))
    v, S = v.to(acc), S.to(acc)
    if w is not None:
        k = k * w.to(acc)[..., None]
    if g is not None:
        g = g.to(acc).reshape(*g.shape[:3], -1)
    gv, u, z = (None if x is None else x.to(acc) for x in (gv, u, z))
    if bounds is None:
        o, x, S, z = _run(q, k, v, g, gv, u, scale, S, z)
        return o.to(dtype), x, S, z
    parts: list[list[Tensor]] = [[], [], [], []]
    for n, (a, b) in enumerate(pairwise(bounds)):
        S_n, z_n = S[n : n + 1], None if z is None else z[n : n + 1]
        if b > a:
            cut = [None if i is None else i[:, a:b] for i in (q, k, v, g, gv)]
            o, x, S_n, z_n = _run(*cut, u, scale, S_n, z_n)  # type: ignore[arg-type]
            parts[0].append(o)
            if x is not None:
                parts[1].append(x)
        parts[2].append(S_n)
        if z_n is not None:
            parts[3].append(z_n)
    o, x, states, sums = (torch.cat(p, 1 if i < 2 else 0) if p else None for i, p in enumerate(parts))
    return o.to(dtype), x, states, sums  # type: ignore[union-attr,return-value]
