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
import torch.nn.functional as F
from torch import Tensor

from ..core import chunk_table
from .reference import accumulate_dtype


class _Plan(NamedTuple):
    """How ``[B, T]`` is cut into chunks: where tokens go, and which chunk follows which in the scan over the state."""

    batch: int
    length: int
    chunk: int
    gather: Tensor | None  # packed rows: [chunks * C] token of each slot (``length`` = padding)
    scatter: Tensor | None  # packed rows: [T] slot of each token
    steps: list[tuple[Tensor, Tensor]]  # per step of the scan: (state rows, their chunks)


def _make_plan(batch: int, length: int, chunk: int, cu_host: Tensor | None, device: torch.device) -> _Plan:
    if cu_host is None:
        count = -(-length // chunk)
        rows = torch.arange(batch, device=device)
        return _Plan(batch, length, chunk, None, None, [(rows, rows * count + c) for c in range(count)])
    table = chunk_table(cu_host, chunk, "cpu").long()
    start = cu_host.long()[table[:, 0]] + table[:, 1] * chunk
    slots = start[:, None] + torch.arange(chunk)
    gather = torch.where(slots < cu_host.long()[table[:, 0] + 1][:, None], slots, length).flatten()
    scatter = torch.empty(length, dtype=torch.long)
    used = gather < length
    scatter[gather[used]] = used.nonzero().flatten()
    steps = []
    for c in range(int(table[:, 1].max()) + 1):
        chunks = (table[:, 1] == c).nonzero().flatten()
        steps.append((table[chunks, 0].to(device), chunks.to(device)))
    return _Plan(batch, length, chunk, gather.to(device), scatter.to(device), steps)


def _cut(x: Tensor, plan: _Plan, acc: torch.dtype) -> Tensor:
    """``[B, T, H, D] -> [chunks, H, C, D]``, padded with zeros."""
    C = plan.chunk
    if plan.gather is not None:
        x = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, plan.gather)
        x = x.unflatten(0, (-1, C))
    else:
        x = F.pad(x, (0, 0, 0, 0, 0, -plan.length % C)).reshape(-1, C, *x.shape[2:])
    return x.transpose(1, 2).to(acc).contiguous()


def _join(x: Tensor, plan: _Plan) -> Tensor:
    """``[chunks, H, C, D] -> [B, T, H, D]``: the inverse of :func:`_cut`."""
    x = x.transpose(1, 2)
    if plan.scatter is not None:
        return x.flatten(0, 1).index_select(0, plan.scatter)[None]
    return x.reshape(plan.batch, -1, *x.shape[2:])[:, : plan.length]


class _Factors(NamedTuple):
    """What a log-gate ``[N, H, C, D]`` (D = 1 for a scalar) contributes to a chunk."""

    prefix: Tensor  # [N, H, C, D] product over the gates a reader has seen since the chunk began
    suffix: Tensor  # [N, H, C, D] product over the gates after a writer
    total: Tensor  # [N, H, D]
    levels: list[tuple[Tensor, Tensor]]  # halving level: (reader [N, H, blocks, w, D], writer [N, H, blocks, w, D])


def _scalar_factors(g: Tensor, exclusive: bool) -> _Factors:
    zero = torch.zeros_like(g[:, :, :1])
    reads = torch.cat([zero, g[:, :, :-1]], 2) if exclusive else g
    after = torch.cat([g[:, :, 1:], zero], 2).flip(2).cumsum(2).flip(2)
    return _Factors(reads.cumsum(2).exp(), after.exp(), g.sum(2).exp(), [])


def _tree_factors(g: Tensor, exclusive: bool) -> _Factors:
    n, h, C, d = g.shape
    total = g.exp().unsqueeze(3)
    read, write = (torch.ones_like(total) if exclusive else total), torch.ones_like(total)
    levels, w = [], 1
    while w < C:
        (r0, r1), (w0, w1), (t0, t1) = (x.reshape(n, h, C // (2 * w), 2, -1, d).unbind(3) for x in (read, write, total))
        levels.append((r1, w0))
        read, write, total = torch.cat([r0, r1 * t0], 3), torch.cat([w0 * t1, w1], 3), t0 * t1
        w *= 2
    return _Factors(read[:, :, 0], write[:, :, 0], total[:, :, 0, 0], levels)


def _segment_decay(g: Tensor, exclusive: bool) -> Tensor:
    """``[N, H, C, 1] -> [N, H, C, C]``: product of the scalar gates between writer j and reader i, 0 where i does not
    read j. Each entry is a sum of its own gates, never a difference of cumulative sums, so -inf is exact."""
    C = g.shape[2]
    below = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    sums = torch.where(below, g, 0.0).cumsum(2)
    if exclusive:
        sums = torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], 2)
        return torch.where(below, sums.exp(), 0.0)
    return torch.where(below, sums, torch.where(torch.eye(C, dtype=torch.bool, device=g.device), 0.0, -torch.inf)).exp()


def _tokens_up_to(x: Tensor, exclusive: bool) -> Tensor:
    """Along axis -2, collect for each gate t the readers i it reaches: i >= t, or i > t when reading is exclusive."""
    w = x.shape[-2]
    return torch.ones(w, w, dtype=x.dtype, device=x.device).triu(int(exclusive)) @ x


def _tokens_after(x: Tensor) -> Tensor:
    """Along axis -2, collect for each gate t the writers j < t."""
    w = x.shape[-2]
    return torch.ones(w, w, dtype=x.dtype, device=x.device).tril(-1) @ x


def _like_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Sum the last axis away where the gate is a scalar."""
    return x if gate.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)


class _Chunks(NamedTuple):
    """The inputs of one call cut into chunks, with their gate factors."""

    plan: _Plan
    q: Tensor
    k: Tensor  # write weight applied
    v: Tensor
    key: _Factors | None
    value: _Factors | None
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
    plan = _make_plan(q.shape[0], q.shape[1], chunk, cu_host, q.device)
    groups = v.shape[2] // q.shape[2]
    q, k = (_cut(x, plan, acc).repeat_interleave(groups, 1) for x in (q, k))
    if w is not None:
        k = k * _cut(w[..., None], plan, acc)
    exclusive, key, value, decay = u is not None, None, None, None
    if g is not None:
        g = _cut(g.reshape(*g.shape[:3], -1), plan, acc)
        if g.shape[-1] == 1 and gv is None:
            key, decay = _scalar_factors(g, exclusive), _segment_decay(g, exclusive)
        else:
            key = _tree_factors(g, exclusive)
    if gv is not None:
        value = _tree_factors(_cut(gv, plan, acc), exclusive)
    if key is None and value is None:
        decay = torch.ones(chunk, chunk, dtype=acc, device=q.device).tril(-int(exclusive))
    return _Chunks(plan, q, k, _cut(v, plan, acc), key, value, decay, None if u is None else u.to(acc)[:, None])


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _halves(x: Tensor, w: int) -> tuple[Tensor, Tensor]:
    left, right = x.unflatten(2, (-1, 2, w)).unbind(3)
    return left, right


def _levels(c: _Chunks):
    """Per halving level: (w, key reader, key writer, value reader, value writer), None where there is no gate."""
    depth = len((c.key or c.value).levels)  # type: ignore[union-attr]
    for i in range(depth):
        key = c.key.levels[i] if c.key is not None else (None, None)
        value = c.value.levels[i] if c.value is not None else (None, None)
        yield 1 << i, *key, *value


def _scan(c: _Chunks, S: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """State before every chunk, and after the last."""
    k = _times(c.k, c.key and c.key.suffix)
    U = k.transpose(-1, -2) @ _times(c.v, c.value and c.value.suffix)
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
    read = _times(c.q, c.key and c.key.prefix)
    o = _times(read @ S_in, c.value and c.value.prefix)
    x = None if z_in is None else (read @ z_in[..., None])[..., 0]
    if c.decay is not None:
        A = (c.q @ c.k.transpose(-1, -2)) * c.decay
        o = o + A @ c.v
        x = None if x is None else x + A.sum(-1)
    else:
        for width, kr, kw, vr, vw in _levels(c):
            A = _times(_halves(c.q, width)[1], kr) @ _times(_halves(c.k, width)[0], kw).transpose(-1, -2)
            _halves(o, width)[1].add_(_times(A @ _times(_halves(c.v, width)[0], vw), vr))
            if x is not None:
                _halves(x[..., None], width)[1][..., 0].add_(A.sum(-1))
    if c.u is not None or c.decay is None:  # the token's own write
        own = (c.q * _times(c.k, c.u)).sum(-1)
        o = o + own[..., None] * c.v
        x = None if x is None else x + own
    return (
        _join(o * scale, c.plan).contiguous(),
        None if x is None else _join(x[..., None] * scale, c.plan)[..., 0].contiguous(),
        S,
        z,
    )


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
    exclusive = u is not None
    S_in, z_in, _, _ = _scan(c, S, z)
    do = _cut(do, c.plan, acc) * scale
    dx = None if dx is None or z is None else _cut(dx[..., None], c.plan, acc)[..., 0] * scale

    # Between chunks: reading the state, then the reverse scan over it, then writing it.
    read = _times(c.q, c.key and c.key.prefix)
    do_read = _times(do, c.value and c.value.prefix)
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
    k_suffix, v_suffix = _times(c.k, c.key and c.key.suffix), _times(c.v, c.value and c.value.suffix)
    dk_suffix = v_suffix @ dS_out.transpose(-1, -2) + dz_out[:, :, None]
    dv_suffix = k_suffix @ dS_out
    dq, dk = _times(d_read, c.key and c.key.prefix), _times(dk_suffix, c.key and c.key.suffix)
    dv = _times(dv_suffix, c.value and c.value.suffix)
    dg = dgv = None
    if c.key is not None:
        through = (S_in * dS_out * (c.value.total[..., None, :] if c.value is not None else 1)).sum(-1)
        if z_in is not None:
            through = through + z_in * dz_out
        gate = c.key.prefix
        dg = _tokens_up_to(_like_gate(read * d_read, gate), exclusive) + _tokens_after(
            _like_gate(k_suffix * dk_suffix, gate)
        )
        dg = dg + _like_gate(through * c.key.total, gate[:, :, 0])[:, :, None]
    if c.value is not None:
        through = (S_in * dS_out * (c.key.total[..., None] if c.key is not None else 1)).sum(-2) * c.value.total
        dgv = _tokens_up_to(do_read * (read @ S_in), exclusive) + _tokens_after(v_suffix * dv_suffix)
        dgv = dgv + through[:, :, None]

    # Within chunks.
    if c.decay is not None:
        G = c.q @ c.k.transpose(-1, -2)
        dA = do @ c.v.transpose(-1, -2)
        if dx is not None:
            dA = dA + dx[..., None]
        dG = dA * c.decay
        dv = dv + (G * c.decay).transpose(-1, -2) @ do
        dq, dk = dq + dG @ c.k, dk + dG.transpose(-1, -2) @ c.q
        if dg is not None:  # gate t lies between every writer j < t and reader i >= t (i > t when exclusive)
            reach = _tokens_up_to(dG * G, exclusive)
            dg = dg + reach.tril(-1).sum(-1, keepdim=True)
    else:
        for width, kr, kw, vr, vw in _levels(c):
            qr, kl = _times(_halves(c.q, width)[1], kr), _times(_halves(c.k, width)[0], kw)
            vl, dor = _times(_halves(c.v, width)[0], vw), _times(_halves(do, width)[1], vr)
            A, dA = qr @ kl.transpose(-1, -2), dor @ vl.transpose(-1, -2)
            if dx is not None:
                dA = dA + _halves(dx[..., None], width)[1]
            dqr, dkl, dvl = dA @ kl, dA.transpose(-1, -2) @ qr, A.transpose(-1, -2) @ dor
            _halves(dq, width)[1].add_(_times(dqr, kr))
            _halves(dk, width)[0].add_(_times(dkl, kw))
            _halves(dv, width)[0].add_(_times(dvl, vw))
            if dg is not None and kr is not None:
                _halves(dg, width)[1].add_(_tokens_up_to(_like_gate(qr * dqr, kr), exclusive))
                _halves(dg, width)[0].add_(_tokens_after(_like_gate(kl * dkl, kr)))
            if dgv is not None:
                _halves(dgv, width)[1].add_(_tokens_up_to(dor * (A @ vl), exclusive))
                _halves(dgv, width)[0].add_(_tokens_after(vl * dvl))
    grads: dict[str, Tensor] = {}
    if c.u is not None or c.decay is None:
        d_own = (do * c.v).sum(-1, keepdim=True)
        if dx is not None:
            d_own = d_own + dx[..., None]
        uk = _times(c.k, c.u)
        dv = dv + (c.q * uk).sum(-1, keepdim=True) * do
        dq, dk = dq + d_own * uk, dk + d_own * _times(c.q, c.u)
        if c.u is not None and u is not None:
            grads["u"] = (d_own * c.q * c.k).sum((0, 2)).to(u.dtype)

    heads = q.shape[2]
    if w is not None:
        weight = _cut(w[..., None], c.plan, acc)
        k_plain = _cut(k, c.plan, acc).repeat_interleave(v.shape[2] // heads, 1)
        grads["w"] = _join((dk * k_plain).sum(-1, keepdim=True), c.plan)[..., 0].to(w.dtype)
        dk = dk * weight
    dq, dk = (x.unflatten(1, (heads, -1)).sum(2) for x in (dq, dk))
    grads["q"], grads["k"], grads["v"] = (_join(x, c.plan).to(q.dtype) for x in (dq, dk, dv))
    if g is not None and dg is not None:
        grads["g"] = _join(dg, c.plan).reshape(g.shape).to(g.dtype)
    if gv is not None and dgv is not None:
        grads["gv"] = _join(dgv, c.plan).to(gv.dtype)
    grads["S"] = dS
    if dz is not None:
        grads["z"] = dz
    return grads
