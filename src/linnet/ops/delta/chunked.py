"""The diagonal-plus-low-rank recurrence chunk by chunk: vectorised PyTorch, hand-written backward, any device.

Both members of the family are one chunk algorithm over *erase readers* ``e`` and *writers* ``b``. A reader's residual

    rho_r = z_r - (what e_r reads from the state)         is written along b_r,

and the untied form has further writers ``k`` of values known beforehand. With ``gamma`` the product of the gates from
the chunk's start up to a reader, ``tail`` from after a writer to the chunk's end, ``T`` and ``X`` the gated scores of
the readers against the writers before them, and ``P`` those of the queries,

    (I + T) rho = z - X v - (gamma e) S_in                O = (gamma q) S_in + P [rho; v]
    S_out = total . S_in + (tail [b; k])^T [rho; v]

(compact WY form: DeltaNet, arXiv 2406.06484, section 3; gates: Gated DeltaNet, 2412.06464, section 3.3). The gates
enter as products by hierarchical halving, as in the decay engine, so that no quotient of them ever appears.

The backward pass is the adjoint of the triangular solve: with ``Lam = (I + T)^-T d_rho``, ``dT = -tril(Lam rho^T)``,
so that neither the inverse nor its gradient is formed. A token may have several substeps; rows are then ``[C, n]``
pairs, and only tokens are gated.
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
    tokens_after,
    tokens_up_to,
    tree_factors,
)
from .reference import NORM_EPS


def default_chunk(substeps: int) -> int:
    """Tokens of a chunk: a power of two, so many that it has at most 64 rows, but at least 16."""
    return max(64 >> (substeps - 1).bit_length(), 16)


class _Gate(NamedTuple):
    """The gates between writers and one kind of readers (queries, or erase readers)."""

    factors: Factors | None
    decay: Tensor | None  # [N, H, C, C] products for scalar gates, [C, C] ones without; None for vector gates
    exclusive: bool  # the reader does not see the gate of its own token


class _Chunks(NamedTuple):
    """The inputs of one call cut into chunks."""

    plan: Plan
    q: Tensor  # [N, H, C, 1, K], scale applied
    e: Tensor  # [N, H, C, n, K]
    b: Tensor  # [N, H, C, m, K], m >= n: writers of residuals, then of known values
    z: Tensor | None  # [N, H, C, n, V]
    v: Tensor | None  # [N, H, C, m - n, V]
    read: _Gate
    erase: _Gate
    own: tuple[Tensor, Tensor] | None  # l2 norms: what e is to read of its own b, as a difference, [N, H, C, n, 1]


def _make_gate(g: Tensor | None, C: int, exclusive: bool, like: Tensor) -> _Gate:
    if g is None:
        return _Gate(None, torch.ones(C, C, dtype=like.dtype, device=like.device).tril(), False)
    if g.shape[-1] == 1:
        return _Gate(scalar_factors(g, exclusive), segment_decay(g, exclusive), exclusive)
    return _Gate(tree_factors(g, exclusive), None, exclusive)


def _flat(x: Tensor) -> Tensor:
    """``[N, H, C, n, D] -> [N, H, C * n, D]``."""
    return x.flatten(2, 3)


def _times_token(x: Tensor, factor: Tensor | None) -> Tensor:
    """``[N, H, C, n, D]`` times a factor of its token ``[N, H, C, 1|D]``."""
    return x if factor is None else x * factor[..., None, :]


def _same_token(n: int, m: int, earlier: bool, like: Tensor) -> Tensor:
    """``[n, m]``: which writers of its own token a reader sees: all of them, or those of earlier substeps."""
    ones = torch.ones(n, m, dtype=like.dtype, device=like.device)
    return ones.tril(-1) if earlier else ones


def _mask(decay: Tensor, n: int, m: int, earlier: bool) -> Tensor:
    """The products of scalar gates ``[..., C, C]`` between rows ``[..., C * n, C * m]``."""
    if n == m == 1:
        return decay.tril(-1) if earlier else decay
    D = decay[..., :, None, :, None].expand(*decay.shape[:-1], n, decay.shape[-1], m).clone()
    own = D.diagonal(dim1=-4, dim2=-2)  # [..., n, m, C]
    own.mul_(_same_token(n, m, earlier, decay)[..., None])
    return D.flatten(-4, -3).flatten(-2, -1)


def _blocks(M: Tensor, w: int, n: int, m: int) -> Tensor:
    """View of ``[N, H, C * n, C * m]`` on the blocks of halving level ``w``, right half by left half:
    ``[N, H, w * n, w * m, blocks]``."""
    view = M.unflatten(2, (-1, 2, w * n)).unflatten(5, (-1, 2, w * m))
    return view[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)


def _own(M: Tensor, n: int, m: int) -> Tensor:
    """View of ``[N, H, C * n, C * m]`` on the blocks of a token with itself: ``[N, H, n, m, C]``."""
    return M.unflatten(2, (-1, n)).unflatten(4, (-1, m)).diagonal(dim1=2, dim2=4)


def _levels(x: Tensor, y: Tensor, gate: _Gate):
    """Per halving level: (width, readers of the right halves, writers of the left halves, their factors), gates
    applied; ``[N, H, blocks, w, n, D]``."""
    for i, (reader, writer) in enumerate(gate.factors.levels):  # type: ignore[union-attr]
        right, left = halves(x, 1 << i)[1], halves(y, 1 << i)[0]
        yield 1 << i, right * reader[..., None, :], left * writer[..., None, :], reader, writer


def _right_lengths(M: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
    """Scores ``[N, H, R, R]`` of keys against each other, each row by what ``own`` says of its diagonal over what is
    there. A key that comes back has the same rounding error in every row, which reflections add up."""
    beta, less = (_flat(x) for x in own)
    found = M.diagonal(dim1=-2, dim2=-1)[..., None]
    return M.addcmul_(M, torch.where(beta == 0, 0.0, ((beta - found) - less) / beta))


def _scores(x: Tensor, y: Tensor, gate: _Gate, earlier: bool, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Gated scores ``[N, H, C * n, C * m]`` of readers ``x [N, H, C, n, K]`` against writers ``y [N, H, C, m, K]``."""
    n, m = x.shape[3], y.shape[3]
    if gate.decay is not None:
        M = _flat(x) @ _flat(y).transpose(-1, -2)
        return (M if own is None else _right_lengths(M, own)) * _mask(gate.decay, n, m, earlier)
    M = x.new_zeros(*x.shape[:2], x.shape[2] * n, y.shape[2] * m)
    for w, right, left, _, _ in _levels(x, y, gate):
        A = right.flatten(3, 4) @ left.flatten(3, 4).transpose(-1, -2)
        _blocks(M, w, n, m).copy_(A.movedim(2, -1))
    if not gate.exclusive:
        same = (x @ y.transpose(-1, -2)) * _same_token(n, m, earlier, x)
        _own(M, n, m).copy_(same.movedim(2, -1))
    return M


def _scores_backward(
    dM: Tensor, M: Tensor, x: Tensor, y: Tensor, gate: _Gate, earlier: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the readers, the writers and the log-gate ``[N, H, C, D]``."""
    n, m = x.shape[3], y.shape[3]
    if gate.decay is not None:
        dG = dM * _mask(gate.decay, n, m, earlier)
        dx, dy = dG @ _flat(y), dG.transpose(-1, -2) @ _flat(x)
        dg = None
        if gate.factors is not None:  # gate t lies between every writer's token before it and every reader's from it on
            pairs = (dM * M).unflatten(2, (-1, n)).unflatten(4, (-1, m)).sum((3, 5))
            dg = tokens_up_to(pairs, gate.exclusive).tril(-1).sum(-1, keepdim=True)
        return dx.unflatten(2, (-1, n)), dy.unflatten(2, (-1, m)), dg
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    dg = x.new_zeros(*x.shape[:3], x.shape[-1])
    for w, right, left, reader, writer in _levels(x, y, gate):
        dA = _blocks(dM, w, n, m).movedim(-1, 2)
        d_right = (dA @ left.flatten(3, 4)).view_as(right)
        d_left = (dA.transpose(-1, -2) @ right.flatten(3, 4)).view_as(left)
        halves(dx, w)[1].add_(d_right * reader[..., None, :])
        halves(dy, w)[0].add_(d_left * writer[..., None, :])
        halves(dg, w)[1].add_(tokens_up_to((right * d_right).sum(-2), gate.exclusive))
        halves(dg, w)[0].add_(tokens_after((left * d_left).sum(-2)))
    if not gate.exclusive:
        own = _own(dM, n, m).movedim(-1, 2) * _same_token(n, m, earlier, x)
        dx, dy = dx + own @ y, dy + own.transpose(-1, -2) @ x
    return dx, dy, dg


class _Solved(NamedTuple):
    """A chunk's scores, and the residuals as an affine function of the state that enters it."""

    T: Tensor  # [N, H, C * n, C * n]
    X: Tensor | None  # [N, H, C * n, C * (m - n)]
    M: Tensor  # [N, H, C * n, C * m], both of them interleaved
    P: Tensor  # [N, H, C, C * m]
    eg: Tensor  # [N, H, C * n, K] erase readers under the gates since the chunk's start
    qg: Tensor  # [N, H, C, K]
    tail: Tensor  # [N, H, C, m, K] writers under the gates until the chunk's end
    S_in: Tensor  # [N, H, K, V]
    values: Tensor  # [N, H, C, m, V] residuals, then known values


def _split(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Axis -2 of ``[N, H, C, m, D]`` into the first n substeps and the rest, each with flat rows."""
    return _flat(x[..., :n, :]), _flat(x[..., n:, :])


def _solve(c: _Chunks, S: Tensor) -> tuple[_Solved, Tensor]:
    """Everything about the chunks, and the state after the last one."""
    n, m = c.e.shape[3], c.b.shape[3]
    K = c.e.shape[-1]
    M, P = _scores(c.e, c.b, c.erase, True, c.own), _scores(c.q, c.b, c.read, False)
    by_writer = M.unflatten(3, (-1, m))
    T = by_writer[..., :n].flatten(3)
    X = by_writer[..., n:].flatten(3) if m > n else None
    read, erase = c.read.factors, c.erase.factors
    qg = _flat(_times_token(c.q, read and read.prefix))
    eg = _flat(_times_token(c.e, erase and erase.prefix))
    tail = _times_token(c.b, read and read.suffix)
    bt, kt = _split(tail, n)
    known = _flat(c.z) if c.z is not None else -(X @ _flat(c.v))  # type: ignore[operator, arg-type]
    solved = torch.linalg.solve_triangular(T, torch.cat([known, eg], -1), upper=False, unitriangular=True)
    U, Y = solved[..., :-K].contiguous(), solved[..., -K:].contiguous()
    S_in = S.new_empty(T.shape[0], *S.shape[1:])
    bt_T = bt.transpose(-1, -2).contiguous()
    direct = None if c.v is None else kt.transpose(-1, -2) @ _flat(c.v)
    for rows, chunks in c.plan.steps:
        now = S.index_select(0, rows)
        S_in[chunks] = now
        residual = U.index_select(0, chunks) - Y.index_select(0, chunks) @ now
        if read is not None:
            now = now * read.total.index_select(0, chunks)[..., None]
        now = now + bt_T.index_select(0, chunks) @ residual
        S = S.index_copy(0, rows, now if direct is None else now + direct.index_select(0, chunks))
    values = (U - Y @ S_in).unflatten(2, (-1, n))
    if c.v is not None:
        values = torch.cat([values, c.v], 3)
    return _Solved(T, X, M, P, eg, qg, tail, S_in, values), S


def _forward(c: _Chunks, S: Tensor) -> tuple[Tensor, Tensor]:
    """``O [N, H, C, V]`` and the final state."""
    s, S = _solve(c, S)
    return s.qg @ s.S_in + s.P @ _flat(s.values), S


class _Grads(NamedTuple):
    """Gradients in the layouts of :class:`_Chunks`; ``q`` includes the scale."""

    q: Tensor
    e: Tensor
    b: Tensor
    z: Tensor | None
    v: Tensor | None
    g: Tensor | None
    S: Tensor


def _backward(c: _Chunks, S: Tensor, do: Tensor, dS: Tensor) -> _Grads:
    """``do [N, H, C, V]``, ``dS`` of the final state."""
    s, _ = _solve(c, S)
    n, K = c.e.shape[3], c.e.shape[-1]
    read, erase = c.read.factors, c.erase.factors
    bt, kt = _split(s.tail, n)
    d_residual, dv = _split((s.P.transpose(-1, -2) @ do).unflatten(2, (-1, c.b.shape[3])), n)
    solved = torch.linalg.solve_triangular(
        s.T.transpose(-1, -2), torch.cat([d_residual, bt], -1), upper=True, unitriangular=True
    )
    L, Lt = solved[..., :-K].contiguous(), solved[..., -K:].contiguous()

    # Between chunks: the reverse scan over the gradient of the state.
    dS_out = torch.empty_like(s.S_in)
    from_query, eg_T = s.qg.transpose(-1, -2) @ do, s.eg.transpose(-1, -2).contiguous()
    for rows, chunks in reversed(c.plan.steps):
        now = dS.index_select(0, rows)
        dS_out[chunks] = now
        lam = L.index_select(0, chunks) + Lt.index_select(0, chunks) @ now
        if read is not None:
            now = now * read.total.index_select(0, chunks)[..., None]
        now = now + from_query.index_select(0, chunks) - eg_T.index_select(0, chunks) @ lam
        dS = dS.index_copy(0, rows, now)

    lam = L + Lt @ dS_out
    values = _flat(s.values)
    d_qg, d_eg = do @ s.S_in.transpose(-1, -2), -(lam @ s.S_in.transpose(-1, -2))
    d_tail = (values @ dS_out.transpose(-1, -2)).view_as(s.tail)
    dM, dP = -(lam @ values.transpose(-1, -2)), do @ values.transpose(-1, -2)
    if s.X is not None:
        dv = dv + kt @ dS_out - s.X.transpose(-1, -2) @ lam
    dq_in, db_q, dg_q = _scores_backward(dP, s.P, c.q, c.b, c.read, False)
    de_in, db_e, dg_e = _scores_backward(dM, s.M, c.e, c.b, c.erase, True)
    d_qg, d_eg = d_qg.view_as(c.q), d_eg.view_as(c.e)
    dq = dq_in + _times_token(d_qg, read and read.prefix)
    de = de_in + _times_token(d_eg, erase and erase.prefix)
    db = db_q + db_e + _times_token(d_tail, read and read.suffix)
    dg = None
    if read is not None and dg_q is not None and dg_e is not None:
        gate = read.prefix
        seen_q = like_gate((s.qg.view_as(c.q) * d_qg).sum(3), gate)
        seen_e = like_gate((s.eg.view_as(c.e) * d_eg).sum(3), gate)
        kept = like_gate((s.S_in * dS_out).sum(-1) * read.total, gate[:, :, 0])
        dg = dg_q + dg_e + tokens_up_to(seen_q, False) + tokens_up_to(seen_e, c.erase.exclusive)
        dg = dg + tokens_after(like_gate((s.tail * d_tail).sum(3), gate)) + kept[:, :, None]
    return _Grads(
        dq,
        de,
        db,
        None if c.z is None else lam.view_as(c.z),
        None if c.v is None else dv.view_as(c.v),
        dg,
        dS,
    )


# From and to the public layouts


def _cut_rows(x: Tensor, n: int, plan: Plan, acc: torch.dtype) -> Tensor:
    """``[B, T * n, H, D] -> [N, H, C, n, D]``."""
    x = x.unflatten(1, (-1, n)).transpose(2, 3)
    return cut(x.flatten(3), plan, acc).unflatten(-1, x.shape[3:])


def _join_rows(x: Tensor, plan: Plan) -> Tensor:
    """The inverse of :func:`_cut_rows`."""
    y = join(x.flatten(3), plan).unflatten(-1, x.shape[3:])
    return y.transpose(2, 3).flatten(1, 2)


def _cut_gate(g: Tensor | None, plan: Plan, acc: torch.dtype) -> Tensor | None:
    return None if g is None else cut(g.reshape(*g.shape[:3], -1), plan, acc)


def _normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vectors of ``x`` and the factor that made them, rounded right: a GPU's ``rsqrt`` is not."""
    factor = (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt().reciprocal()
    return x * factor, factor


def _normalize_backward(dy: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    return factor * (dy - y * (y * dy).sum(-1, keepdim=True))


class _Tied(NamedTuple):
    """Arguments of the tied form in chunks, heads of q and k not yet repeated."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    w: Tensor | None
    factors: tuple[Tensor, Tensor] | None  # of the l2 norms of q and k
    chunks: _Chunks


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    chunk: int,
) -> _Tied:
    acc, groups = accumulate_dtype(q), v.shape[2] // q.shape[2]
    plan = make_plan(q.shape[0], q.shape[1], chunk, cu_host, q.device)
    q = _cut_rows(q, 1, plan, acc)
    k, v, beta = (_cut_rows(x.reshape(*x.shape[:3], -1), substeps, plan, acc) for x in (k, v, beta))
    w = None if w is None else _cut_rows(w, substeps, plan, acc)
    factors = own = None
    if l2norm:
        (q, fq), (k, fk) = _normalize(q), _normalize(k)
        factors = fq, fk
        if beta.shape[-1] == 1:
            own = beta, beta * (NORM_EPS * fk.square()).repeat_interleave(groups, 1)
    keys = k.repeat_interleave(groups, 1)
    gate = _make_gate(_cut_gate(g, plan, acc), chunk, False, q)
    z = v * (beta if w is None else w)
    queries = (scale * q).repeat_interleave(groups, 1)
    return _Tied(q, k, v, beta, w, factors, _Chunks(plan, queries, beta * keys, keys, z, None, gate, gate, own))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """:func:`linnet.ops.delta` on checked inputs: reading ``[B, T, H, V]`` and final ``S``."""
    x = _prepare(q, k, v, beta, g, w, cu_host, scale, l2norm, substeps, chunk)
    o, S = _forward(x.chunks, S)
    return join(o, x.chunks.plan).to(v.dtype).contiguous(), S


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    chunk: int,
    do: Tensor,
    dS: Tensor,
) -> dict[str, Tensor]:
    """Gradients by input name, given those of the reading and the final state."""
    x = _prepare(q, k, v, beta, g, w, cu_host, scale, l2norm, substeps, chunk)
    plan = x.chunks.plan
    d = _backward(x.chunks, S, cut(do, plan, x.q.dtype), dS)
    assert d.z is not None
    heads = q.shape[2]
    dbeta = d.e * x.chunks.b
    if x.beta.shape[-1] == 1:
        dbeta = dbeta.sum(-1, keepdim=True)
    if x.w is None:
        dbeta = dbeta + (d.z * x.v).sum(-1, keepdim=True)
    dq, dk = ((y.unflatten(1, (heads, -1)).sum(2)) for y in (scale * d.q, d.b + x.beta * d.e))
    if x.factors is not None:
        dq, dk = _normalize_backward(dq, x.q, x.factors[0]), _normalize_backward(dk, x.k, x.factors[1])
    grads = {
        "q": _join_rows(dq, plan).to(q.dtype),
        "k": _join_rows(dk, plan).to(k.dtype),
        "v": _join_rows(d.z * (x.beta if x.w is None else x.w), plan).to(v.dtype),
        "beta": _join_rows(dbeta, plan).reshape(beta.shape).to(beta.dtype),
        "S": d.S,
    }
    if g is not None and d.g is not None:
        grads["g"] = join(d.g, plan).reshape(g.shape).to(g.dtype)
    if w is not None:
        grads["w"] = _join_rows(d.z * x.v, plan).to(w.dtype)
    return grads


def _prepare_untied(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    cu_host: Tensor | None,
    scale: float,
    chunk: int,
) -> _Chunks:
    acc = accumulate_dtype(q)
    plan = make_plan(q.shape[0], q.shape[1], chunk, cu_host, q.device)
    q, k, v, a, b = (_cut_rows(x, 1, plan, acc) for x in (q, k, v, a, b))
    gate = _cut_gate(g, plan, acc)
    read, erase = (_make_gate(gate, chunk, exclusive, q) for exclusive in (False, True))
    return _Chunks(plan, scale * q, -a, torch.cat([b, k], 3), None, v, read, erase, None)


def forward_untied(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """:func:`linnet.ops.dplr` on checked inputs."""
    c = _prepare_untied(q, k, v, a, b, g, cu_host, scale, chunk)
    o, S = _forward(c, S)
    return join(o, c.plan).to(v.dtype).contiguous(), S


def backward_untied(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    chunk: int,
    do: Tensor,
    dS: Tensor,
) -> dict[str, Tensor]:
    """Gradients by input name, given those of the reading and the final state."""
    c = _prepare_untied(q, k, v, a, b, g, cu_host, scale, chunk)
    d = _backward(c, S, cut(do, c.plan, c.q.dtype), dS)
    assert d.v is not None and d.g is not None
    parts = {"q": scale * d.q, "k": d.b[..., 1:, :], "v": d.v, "a": -d.e, "b": d.b[..., :1, :]}
    grads = {name: _join_rows(x, c.plan).to(q.dtype) for name, x in parts.items()}
    return grads | {"g": join(d.g, c.plan).reshape(g.shape).to(g.dtype), "S": d.S}
