"""The diagonal-decay recurrence chunk by chunk: vectorised PyTorch, forward and hand-written backward, any device.

Within a chunk every token reads every earlier one directly; between chunks only the state travels. With ``P`` the
product of the gates from the chunk's start up to a token and ``Q`` from after the token to the chunk's end,

    O     = scale * (Q . P) S_in + A V            S_out = total . S_in + (K . Q)^T V

Scalar gates enter ``A`` as a matrix of segment sums. Vector gates cannot, so ``A`` is built by hierarchical halving
(GLA, arXiv 2312.06635, section 4.3 is the two-level ancestor): at half-width w = 1, 2, 4, ... the right half of each
block of 2w rows reads its left half, the gates split at the border into a factor of the reader and one of the writer.
Both are products of gates, so they lie in [0, 1] whatever the decay, and a hard reset (log-decay -inf) is exact.

The gradient of a log-gate is collected from the factors it is part of, level by level. The shorter identity
``dg = revcumsum(q.dq - k.dk)`` gives the same number as a difference of large sums and loses it under strong decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.chunks import (
    Factors,
    Plan,
    accumulate_dtype,
    cut,
    halves,
    join,
    like_gate,
    make_plan,
    scalar_factors,
    segment_decay,
    times,
    tokens_after,
    tokens_up_to,
    tree_factors,
)


class _Chunks(NamedTuple):
    """The inputs of one call cut into chunks, with their gate factors."""

    plan: Plan
    q: Tensor
    k: Tensor  # write weight applied
    v: Tensor
    key: Factors | None
    value: Factors | None
    decay: Tensor | None  # [N, H, C, C], scalar gates without value gates
    u: Tensor | None


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    cu_host: Tensor | None,
    chunk: int,
) -> _Chunks:
    acc = accumulate_dtype(q)
    plan = make_plan(q.shape[0], q.shape[1], chunk, cu_host, q.device)
    groups = v.shape[2] // q.shape[2]
    q, k = (cut(x, plan, acc).repeat_interleave(groups, 1) for x in (q, k))
    if w is not None:
        k = k * cut(w[..., None], plan, acc)
    exclusive, key, value, decay = u is not None, None, None, None
    if g is not None:
        g = cut(g.reshape(*g.shape[:3], -1), plan, acc)
        if g.shape[-1] == 1 and gv is None:
            key, decay = scalar_factors(g, exclusive), segment_decay(g, exclusive)
        else:
            key = tree_factors(g, exclusive)
    if gv is not None:
        value = tree_factors(cut(gv, plan, acc), exclusive)
    if key is None and value is None:
        decay = torch.ones(chunk, chunk, dtype=acc, device=q.device).tril(-int(exclusive))
    return _Chunks(plan, q, k, cut(v, plan, acc), key, value, decay, None if u is None else u.to(acc)[:, None])


def _levels(c: _Chunks):
    """Per halving level: (w, key reader, key writer, value reader, value writer), None where there is no gate."""
    depth = len((c.key or c.value).levels)  # type: ignore[union-attr]
    for i in range(depth):
        key = c.key.levels[i] if c.key is not None else (None, None)
        value = c.value.levels[i] if c.value is not None else (None, None)
        yield 1 << i, *key, *value


def _scan(c: _Chunks, S: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """State before every chunk, and after the last."""
    k = times(c.k, c.key and c.key.suffix)
    U = k.transpose(-1, -2) @ times(c.v, c.value and c.value.suffix)
    S_in = torch.empty_like(U)
    z_in = None if z is None else torch.empty_like(U[..., 0])
    Z = k.sum(2)
    for rows, chunks in c.plan.steps:
        now = S.index_select(0, rows)
        S_in[chunks] = now
        if c.key is not None:
            now = now * c.key.total.index_select(0, chunks)[..., None]
        if c.value is not None:
            now = now * c.value.total.index_select(0, chunks)[..., None, :]
        S = S.index_copy(0, rows, now + U.index_select(0, chunks))
        if z is not None and z_in is not None:
            norm = z.index_select(0, rows)
            z_in[chunks] = norm
            if c.key is not None:
                norm = norm * c.key.total.index_select(0, chunks)
            z = z.index_copy(0, rows, norm + Z.index_select(0, chunks))
    return S_in, z_in, S, z


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Arguments and results as in :func:`linnet.ops.decay.reference.recurrent`, the reading not yet rounded."""
    c = _prepare(q, k, v, g, gv, u, w, cu_host, chunk)
    S_in, z_in, S, z = _scan(c, S, z)
    read = times(c.q, c.key and c.key.prefix)
    o = times(read @ S_in, c.value and c.value.prefix)
    x = None if z_in is None else (read @ z_in[..., None])[..., 0]
    if c.decay is not None:
        A = (c.q @ c.k.transpose(-1, -2)) * c.decay
        o = o + A @ c.v
        x = None if x is None else x + A.sum(-1)
    else:
        for width, kr, kw, vr, vw in _levels(c):
            A = times(halves(c.q, width)[1], kr) @ times(halves(c.k, width)[0], kw).transpose(-1, -2)
            halves(o, width)[1].add_(times(A @ times(halves(c.v, width)[0], vw), vr))
            if x is not None:
                halves(x[..., None], width)[1][..., 0].add_(A.sum(-1))
    if c.u is not None or c.decay is None:  # the token's own write
        own = (c.q * times(c.k, c.u)).sum(-1)
        o = o + own[..., None] * c.v
        x = None if x is None else x + own
    return (
        join(o * scale, c.plan).contiguous(),
        None if x is None else join(x[..., None] * scale, c.plan)[..., 0].contiguous(),
        S,
        z,
    )


class _Grads(NamedTuple):
    """Gradients in the layouts of :class:`_Chunks`; ``q`` and ``k`` of repeated heads, ``k`` of the weighted keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    gv: Tensor | None


def _between_backward(
    c: _Chunks, S: Tensor, z: Tensor | None, do: Tensor, dx: Tensor | None, dS: Tensor, dz: Tensor | None
) -> tuple[_Grads, Tensor, Tensor | None]:
    """What goes through the states between chunks, and the gradients of the initial state."""
    exclusive = c.u is not None
    S_in, z_in, _, _ = _scan(c, S, z)
    read = times(c.q, c.key and c.key.prefix)
    do_read = times(do, c.value and c.value.prefix)
    d_read = do_read @ S_in.transpose(-1, -2)
    if dx is not None and z_in is not None:
        d_read = d_read + dx[..., None] * z_in[:, :, None]
    W = read.transpose(-1, -2) @ do_read
    Wz = None if dx is None else (dx[..., None] * read).sum(2)
    dS_out, dz_out = torch.empty_like(W), torch.zeros_like(W[..., 0])
    for rows, chunks in reversed(c.plan.steps):
        now = dS.index_select(0, rows)
        dS_out[chunks] = now
        if c.key is not None:
            now = now * c.key.total.index_select(0, chunks)[..., None]
        if c.value is not None:
            now = now * c.value.total.index_select(0, chunks)[..., None, :]
        dS = dS.index_copy(0, rows, now + W.index_select(0, chunks))
        if dz is not None:
            norm = dz.index_select(0, rows)
            dz_out[chunks] = norm
            if c.key is not None:
                norm = norm * c.key.total.index_select(0, chunks)
            dz = dz.index_copy(0, rows, norm if Wz is None else norm + Wz.index_select(0, chunks))
    k_suffix, v_suffix = times(c.k, c.key and c.key.suffix), times(c.v, c.value and c.value.suffix)
    dk_suffix = v_suffix @ dS_out.transpose(-1, -2) + dz_out[:, :, None]
    dv_suffix = k_suffix @ dS_out
    dg = dgv = None
    if c.key is not None:
        through = (S_in * dS_out * (c.value.total[..., None, :] if c.value is not None else 1)).sum(-1)
        if z_in is not None:
            through = through + z_in * dz_out
        gate = c.key.prefix
        dg = tokens_up_to(like_gate(read * d_read, gate), exclusive) + tokens_after(
            like_gate(k_suffix * dk_suffix, gate)
        )
        dg = dg + like_gate(through * c.key.total, gate[:, :, 0])[:, :, None]
    if c.value is not None:
        through = (S_in * dS_out * (c.key.total[..., None] if c.key is not None else 1)).sum(-2) * c.value.total
        dgv = tokens_up_to(do_read * (read @ S_in), exclusive) + tokens_after(v_suffix * dv_suffix)
        dgv = dgv + through[:, :, None]
    dq, dk = times(d_read, c.key and c.key.prefix), times(dk_suffix, c.key and c.key.suffix)
    return _Grads(dq, dk, times(dv_suffix, c.value and c.value.suffix), dg, dgv), dS, dz


def _within_backward(c: _Chunks, d: _Grads, do: Tensor, dx: Tensor | None) -> _Grads:
    """``d``, which this may overwrite, and what goes through the scores within chunks."""
    exclusive = c.u is not None
    dq, dk, dv, dg, dgv = d
    if c.decay is not None:
        G = c.q @ c.k.transpose(-1, -2)
        dA = do @ c.v.transpose(-1, -2)
        if dx is not None:
            dA = dA + dx[..., None]
        dG = dA * c.decay
        dv = dv + (G * c.decay).transpose(-1, -2) @ do
        dq, dk = dq + dG @ c.k, dk + dG.transpose(-1, -2) @ c.q
        if dg is not None:  # gate t lies between every writer j < t and reader i >= t (i > t when exclusive)
            reach = tokens_up_to(dG * G, exclusive)
            dg = dg + reach.tril(-1).sum(-1, keepdim=True)
        return _Grads(dq, dk, dv, dg, dgv)
    for width, kr, kw, vr, vw in _levels(c):
        qr, kl = times(halves(c.q, width)[1], kr), times(halves(c.k, width)[0], kw)
        vl, dor = times(halves(c.v, width)[0], vw), times(halves(do, width)[1], vr)
        A, dA = qr @ kl.transpose(-1, -2), dor @ vl.transpose(-1, -2)
        if dx is not None:
            dA = dA + halves(dx[..., None], width)[1]
        dqr, dkl, dvl = dA @ kl, dA.transpose(-1, -2) @ qr, A.transpose(-1, -2) @ dor
        halves(dq, width)[1].add_(times(dqr, kr))
        halves(dk, width)[0].add_(times(dkl, kw))
        halves(dv, width)[0].add_(times(dvl, vw))
        if dg is not None and kr is not None:
            halves(dg, width)[1].add_(tokens_up_to(like_gate(qr * dqr, kr), exclusive))
            halves(dg, width)[0].add_(tokens_after(like_gate(kl * dkl, kr)))
        if dgv is not None:
            halves(dgv, width)[1].add_(tokens_up_to(dor * (A @ vl), exclusive))
            halves(dgv, width)[0].add_(tokens_after(vl * dvl))
    return d


def _own_backward(c: _Chunks, d: _Grads, do: Tensor, dx: Tensor | None) -> tuple[_Grads, Tensor | None]:
    """``d`` and what goes through the token's own write, where the scores do not hold it; the gradient of ``u``."""
    if c.u is None and c.decay is not None:
        return d, None
    d_own = (do * c.v).sum(-1, keepdim=True)
    if dx is not None:
        d_own = d_own + dx[..., None]
    uk = times(c.k, c.u)
    dv = d.v + (c.q * uk).sum(-1, keepdim=True) * do
    dq, dk = d.q + d_own * uk, d.k + d_own * times(c.q, c.u)
    return _Grads(dq, dk, dv, d.g, d.gv), None if c.u is None else (d_own * c.q * c.k).sum((0, 2))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    chunk: int,
    do: Tensor,
    dx: Tensor | None,
    dS: Tensor,
    dz: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients by input name, given those of the reading, the normaliser and the final state."""
    acc = accumulate_dtype(q)
    c = _prepare(q, k, v, g, gv, u, w, cu_host, chunk)
    do = cut(do, c.plan, acc) * scale
    dx = None if dx is None or z is None else cut(dx[..., None], c.plan, acc)[..., 0] * scale
    d, dS, dz = _between_backward(c, S, z, do, dx, dS, dz)
    d, du = _own_backward(c, _within_backward(c, d, do, dx), do, dx)
    grads: dict[str, Tensor] = {}
    if u is not None and du is not None:
        grads["u"] = du.to(u.dtype)
    heads, dk = q.shape[2], d.k
    if w is not None:
        weight = cut(w[..., None], c.plan, acc)
        k_plain = cut(k, c.plan, acc).repeat_interleave(v.shape[2] // heads, 1)
        grads["w"] = join((dk * k_plain).sum(-1, keepdim=True), c.plan)[..., 0].to(w.dtype)
        dk = dk * weight
    dq, dk = (x.unflatten(1, (heads, -1)).sum(2) for x in (d.q, dk))
    grads["q"], grads["k"], grads["v"] = (join(x, c.plan).to(q.dtype) for x in (dq, dk, d.v))
    if g is not None and d.g is not None:
        grads["g"] = join(d.g, c.plan).reshape(g.shape).to(g.dtype)
    if gv is not None and d.gv is not None:
        grads["gv"] = join(d.gv, c.plan).to(gv.dtype)
    grads["S"] = dS
    if dz is not None:
        grads["z"] = dz
    return grads
