"""Triton kernel of the scans, forward and backward.

One kernel walks a sequence, or a piece of one, tile by tile: W warps take L tokens each, every thread its own channels.
A thread first composes the maps of its L tokens, one scan over the W warps gives each the state it starts from, and a
second walk over the same registers gives the states: everything is read once and written once. Where sequences are
few, they are cut into pieces: a first launch composes the maps of whole pieces (`TOTALS`), the same kernel scans those,
and a last launch walks every piece from its own state.

The backward pass is the same walk in the other direction of time, over the transposed factors of the next token.
Channels are numbers, pairs (complex numbers, blocks) or bounds; what differs is in `_apply` and `_compose`.
"""
# ruff: noqa: RUF005 (Triton's language has no unpacking into tuples)

from __future__ import annotations

import triton
import triton.language as tl

REAL, COMPLEX, BLOCK, MINMAX = (tl.constexpr(i) for i in range(4))


@triton.jit
def _min(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _apply(a, b, h, ALGEBRA: tl.constexpr):
    """The map (a, b) on a state."""
    if ALGEBRA == REAL:
        out = (a[0] * h[0] + b[0],)
    elif ALGEBRA == COMPLEX:
        out = (a[0] * h[0] - a[1] * h[1] + b[0], a[0] * h[1] + a[1] * h[0] + b[1])
    elif ALGEBRA == BLOCK:
        out = (a[0] * h[0] + a[1] * h[1] + b[0], a[2] * h[0] + a[3] * h[1] + b[1])
    else:
        out = (_max(_min(h[0], a[0]), b[0]),)
    return out


@triton.jit
def _compose(a, a1, ALGEBRA: tl.constexpr):
    """The factor of the map with factor a after the one with factor a1."""
    if ALGEBRA == REAL:
        out = (a[0] * a1[0],)
    elif ALGEBRA == COMPLEX:
        out = (a[0] * a1[0] - a[1] * a1[1], a[0] * a1[1] + a[1] * a1[0])
    elif ALGEBRA == BLOCK:
        out = (
            a[0] * a1[0] + a[1] * a1[2],
            a[0] * a1[1] + a[1] * a1[3],
            a[2] * a1[0] + a[3] * a1[2],
            a[2] * a1[1] + a[3] * a1[3],
        )
    else:
        out = (_min(a[0], a1[0]),)
    return out


# Combining two runs of maps (the earlier first). A run carries the map of all of it and that of all but its last
# member, so one scan tells every warp both what it leads to and what it starts from.


@triton.jit
def _combine(a1, b1, a, b, e, f, ALGEBRA: tl.constexpr):
    return _compose(a, a1, ALGEBRA) + _apply(a, b, b1, ALGEBRA) + _compose(e, a1, ALGEBRA) + _apply(e, f, b1, ALGEBRA)


@triton.jit
def _combine_real(a1, b1, e1, f1, a, b, e, f):
    return _combine((a1,), (b1,), (a,), (b,), (e,), (f,), REAL)


@triton.jit
def _combine_minmax(a1, b1, e1, f1, a, b, e, f):
    return _combine((a1,), (b1,), (a,), (b,), (e,), (f,), MINMAX)


@triton.jit
def _combine_complex(a10, a11, b10, b11, e10, e11, f10, f11, a0, a1, b0, b1, e0, e1, f0, f1):
    return _combine((a10, a11), (b10, b11), (a0, a1), (b0, b1), (e0, e1), (f0, f1), COMPLEX)


@triton.jit
def _combine_block(
    a10, a11, a12, a13, b10, b11, e10, e11, e12, e13, f10, f11, a0, a1, a2, a3, b0, b1, e0, e1, e2, e3, f0, f1
):
    before = (a10, a11, a12, a13)
    return _combine(before, (b10, b11), (a0, a1, a2, a3), (b0, b1), (e0, e1, e2, e3), (f0, f1), BLOCK)


@triton.jit
def _over_warps(a, b, ALGEBRA: tl.constexpr):
    """Inclusive and exclusive maps ``(a, b, e, f)`` over axis 0."""
    zero = tl.zeros_like(b[0])
    one = zero + 1.0
    if ALGEBRA == REAL:
        i, j, e, f = tl.associative_scan((a[0], b[0], one, zero), 0, _combine_real)
        out = (i,), (j,), (e,), (f,)
    elif ALGEBRA == MINMAX:
        inf = zero + float("inf")
        i, j, e, f = tl.associative_scan((a[0], b[0], inf, -inf), 0, _combine_minmax)
        out = (i,), (j,), (e,), (f,)
    elif ALGEBRA == COMPLEX:
        leaves = (a[0], a[1], b[0], b[1], one, zero, zero, zero)
        i0, i1, j0, j1, e0, e1, f0, f1 = tl.associative_scan(leaves, 0, _combine_complex)
        out = (i0, i1), (j0, j1), (e0, e1), (f0, f1)
    else:
        leaves = (a[0], a[1], a[2], a[3], b[0], b[1], one, zero, zero, one, zero, zero)
        i0, i1, i2, i3, j0, j1, e0, e1, e2, e3, f0, f1 = tl.associative_scan(leaves, 0, _combine_block)
        out = (i0, i1, i2, i3), (j0, j1), (e0, e1, e2, e3), (f0, f1)
    return out


# Reading and writing the numbers of one token for every channel. What is masked is the map that changes nothing.


@triton.jit
def _factors(ptr, at, mask, ALGEBRA: tl.constexpr):
    if ALGEBRA == REAL:
        out = (tl.load(ptr + at, mask=mask, other=1.0),)
    elif ALGEBRA == MINMAX:
        out = (tl.load(ptr + at, mask=mask, other=float("inf")),)
    elif ALGEBRA == COMPLEX:
        out = (tl.load(ptr + 2 * at, mask=mask, other=1.0), tl.load(ptr + 2 * at + 1, mask=mask, other=0.0))
    else:
        out = (
            tl.load(ptr + 4 * at, mask=mask, other=1.0),
            tl.load(ptr + 4 * at + 1, mask=mask, other=0.0),
            tl.load(ptr + 4 * at + 2, mask=mask, other=0.0),
            tl.load(ptr + 4 * at + 3, mask=mask, other=1.0),
        )
    return out


@triton.jit
def _vector(ptr, at, mask, ALGEBRA: tl.constexpr, other: tl.constexpr):
    if ALGEBRA == REAL or ALGEBRA == MINMAX:  # noqa: SIM109
        out = (tl.load(ptr + at, mask=mask, other=other),)
    else:
        out = (tl.load(ptr + 2 * at, mask=mask, other=other), tl.load(ptr + 2 * at + 1, mask=mask, other=other))
    return out


@triton.jit
def _write(ptr, at, x, mask):
    """Store the components of ``x`` side by side."""
    n: tl.constexpr = len(x)
    for c in tl.static_range(n):
        tl.store(ptr + n * at + c, x[c].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fp32(x):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (x[c].to(tl.float32),)
    return out


@triton.jit
def _factor(x, ALGEBRA: tl.constexpr, GRAD: tl.constexpr):
    """A loaded factor in fp32, transposed (conjugated) on the way back."""
    x = _fp32(x)
    if GRAD and ALGEBRA == COMPLEX:
        x = (x[0], -x[1])
    if GRAD and ALGEBRA == BLOCK:
        x = (x[0], x[2], x[1], x[3])
    return x


@triton.jit
def _where(mask, x, y):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (tl.where(mask, x[c], y[c]),)
    return out


@triton.jit
def _constant(value, ALGEBRA: tl.constexpr):
    """The factor of a constant map."""
    zero = tl.zeros_like(value[0])
    if ALGEBRA == BLOCK:
        out = (zero, zero, zero, zero)
    elif ALGEBRA == COMPLEX:
        out = (zero, zero)
    elif ALGEBRA == MINMAX:
        out = value
    else:
        out = (zero,)
    return out


@triton.jit
def _zeros(x):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (tl.zeros_like(x[c]),)
    return out


@triton.jit
def _row(x):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (x[c][None, :],)
    return out


@triton.jit
def scan_kernel(
    a_ptr,
    b_ptr,  # GRAD: gradient of the states
    y_ptr,  # GRAD: gradient of b
    da_ptr,
    h_ptr,  # GRAD: the states of the forward pass
    code_ptr,  # minmax: which of state, r and s a token takes, uint8
    start_ptr,  # states the sequences start from (GRAD: gradients of their last states)
    edge_ptr,  # SPLIT: states after every piece
    init_ptr,  # GRAD: states the forward pass started from
    last_ptr,  # states the sequences end with (GRAD: gradients of the first ones)
    ids_ptr,
    T,
    D,
    a_stride,  # channels from one token's factors to the next's: D, or 0 when they are constant
    PIECE,
    ALGEBRA: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    REVERSE: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_A: tl.constexpr,
    CODE: tl.constexpr,
    SPLIT: tl.constexpr,
    TOTALS: tl.constexpr,
    PACKED: tl.constexpr,
):
    # Tokens are counted in the order of the walk, p = 0 ... T - 1, of which `place` is the row in memory.
    STEP: tl.constexpr = -1 if REVERSE else 1
    KIND: tl.constexpr = REAL if GRAD and ALGEBRA == MINMAX else ALGEBRA
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BD + tl.arange(0, BD)
    unit = pid // blocks
    pieces = tl.cdiv(T, PIECE)
    n = unit // pieces
    piece = unit % pieces
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, T)
    origin = n.to(tl.int64) * T
    if REVERSE:
        origin += T - 1
    inside = cols < D
    w = tl.arange(0, W)[:, None]
    col = cols[None, :]
    within = inside[None, :]
    idle: tl.constexpr = float("-inf") if KIND == MINMAX else 0.0

    if TOTALS:
        # (factor, value) of the map of the piece so far
        nothing = tl.zeros([BD], tl.float32)
        unity = nothing + (float("inf") if KIND == MINMAX else 1.0)
        value = (nothing + idle,)
        total = (unity,)
        if KIND == COMPLEX:
            value = (nothing, nothing)
            total = (unity, nothing)
        if KIND == BLOCK:
            value = (nothing, nothing)
            total = (unity, nothing, nothing, unity)
    else:
        # A packed row starts with a map that is constant, whatever comes in.
        fresh = inside & (piece == 0)
        carry = _vector(start_ptr, n.to(tl.int64) * D + cols, fresh & (not PACKED), KIND, 0.0)
        if SPLIT:
            edge = _vector(edge_ptr, (unit.to(tl.int64) - 1) * D + cols, inside & (piece > 0), KIND, 0.0)
            carry = _where(fresh, carry, edge)

    for p0 in range(begin, end, W * L):
        factors = ()
        values = ()
        befores = ()
        for i in tl.static_range(L):
            p = p0 + w * L + i
            row = origin + p * STEP
            ok = within & (p < end)
            at = row * D + col
            if PACKED:
                seq = tl.load(ids_ptr + row, mask=p < T, other=-1)
                first = seq != tl.load(ids_ptr + row - STEP, mask=(p > 0) & (p < T), other=-1)
                final = seq != tl.load(ids_ptr + row + STEP, mask=p + 1 < T, other=-1)
                known = ok & first
                ended = ok & final
                state_at = seq.to(tl.int64) * D + col
            else:
                known = ok & (p == 0)
                ended = ok & (p == T - 1)
                state_at = n.to(tl.int64) * D + col + w * 0
            if GRAD:
                # The factor that led on from this token; nothing leads on from the last one of a sequence.
                led = ok & (~known)
                if ALGEBRA == MINMAX:
                    code = tl.load(code_ptr + at - STEP * D, mask=led, other=0)
                    a = ((code == 0).to(tl.float32),)
                else:
                    a = _factors(a_ptr, (row - STEP) * a_stride + col, led, KIND)
            else:
                a = _factors(a_ptr, row * a_stride + col, ok, KIND)
            b = _vector(b_ptr, at, ok, KIND, idle)
            if PACKED:
                entering = _fp32(_vector(start_ptr, state_at, known, KIND, 0.0))
                a = _factor(a, KIND, GRAD)
                b = _fp32(b)
                if CODE:
                    code = _taken(a, b, entering)
                fixed = _apply(a, b, entering, KIND)
                b = _where(known, fixed, b)
                a = _where(known, _constant(fixed, KIND), a)
            factors = factors + (a,)
            values = values + (b,)
            if GRAD and ALGEBRA == MINMAX and not TOTALS:
                befores = befores + ((tl.load(code_ptr + at, mask=ok, other=0),),)
            elif GRAD_A:
                befores = befores + (_vector(h_ptr, at + STEP * D, ok & (~ended), KIND, 0.0),)
            elif CODE and PACKED:
                befores = befores + ((tl.where(known, code, -1),),)

        FLIP: tl.constexpr = GRAD and not PACKED
        a = _factor(factors[0], KIND, FLIP)
        b = _fp32(values[0])
        for i in tl.static_range(1, L):
            a2 = _factor(factors[i], KIND, FLIP)
            b = _apply(a2, _fp32(values[i]), b, KIND)
            a = _compose(a2, a, KIND)
        a, b, e, f = _over_warps(a, b, KIND)
        if TOTALS:
            a = _last_warp(a, w, W)
            b = _last_warp(b, w, W)
            value = _apply(a, b, value, KIND)
            total = _compose(a, total, KIND)
        else:
            h = _apply(e, f, _row(carry), KIND)
            carry = _last_warp(_apply(a, b, _row(carry), KIND), w, W)
            for i in tl.static_range(L):
                p = p0 + w * L + i
                row = origin + p * STEP
                ok = within & (p < end)
                at = row * D + col
                a = _factor(factors[i], KIND, FLIP)
                b = _fp32(values[i])
                if CODE:
                    code = _taken(a, b, h)
                    if PACKED:
                        code = tl.where(befores[i][0] < 0, code, befores[i][0])
                    tl.store(code_ptr + at, code.to(tl.uint8), mask=ok)
                h = _apply(a, b, h, KIND)
                if GRAD and ALGEBRA == MINMAX:
                    _write(da_ptr, at, (tl.where(befores[i][0] == 1, h[0], 0.0),), ok)
                    _write(y_ptr, at, (tl.where(befores[i][0] == 2, h[0], 0.0),), ok)
                else:
                    _write(y_ptr, at, h, ok)
                if PACKED:
                    seq = tl.load(ids_ptr + row, mask=p < T, other=-1)
                    final = seq != tl.load(ids_ptr + row + STEP, mask=p + 1 < T, other=-1)
                    ended = ok & final
                    state_at = seq.to(tl.int64) * D + col
                else:
                    ended = ok & (p == T - 1)
                    state_at = n.to(tl.int64) * D + col + w * 0
                if GRAD_A:
                    earliest = _fp32(_vector(init_ptr, state_at, ended, KIND, 0.0))
                    before = _where(ended, earliest, _fp32(befores[i]))
                    _write(da_ptr, at, _outer(h, before, KIND), ok)
                if PACKED:
                    if GRAD:
                        if ALGEBRA == MINMAX:
                            own = ((befores[i][0] == 0).to(tl.float32),)
                        else:
                            own = _factor(_factors(a_ptr, row * a_stride + col, ended, KIND), KIND, True)
                        _write(last_ptr, state_at, _apply(own, _zeros(h), h, KIND), ended)
                    else:
                        _write(last_ptr, state_at, h, ended)

    if TOTALS:
        at = unit.to(tl.int64) * D + cols
        _write(da_ptr, at, total, inside)
        _write(y_ptr, at, value, inside)
    elif not PACKED:
        if end == T:
            state = n.to(tl.int64) * D + cols
            if GRAD:
                row = origin + (T - 1) * STEP
                if ALGEBRA == MINMAX:
                    code = tl.load(code_ptr + row * D + cols, mask=inside, other=0)
                    own = ((code == 0).to(tl.float32),)
                else:
                    own = _factor(_factors(a_ptr, row * a_stride + cols, inside, KIND), KIND, True)
                _write(last_ptr, state, _apply(own, _zeros(carry), carry, KIND), inside)
            else:
                _write(last_ptr, state, carry, inside)


@triton.jit
def _taken(a, b, h):
    """What a cell takes: 0 its state, 1 the upper and 2 the lower bound."""
    return tl.where(b[0] > _min(h[0], a[0]), 2, tl.where(h[0] > a[0], 1, 0))


@triton.jit
def _last_warp(x, w, W: tl.constexpr):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (tl.sum(tl.where(w == W - 1, x[c], 0.0), 0),)
    return out


@triton.jit
def _outer(g, h, ALGEBRA: tl.constexpr):
    """Gradient of the factor from that of the state it led to and the state before."""
    if ALGEBRA == REAL:
        out = (g[0] * h[0],)
    elif ALGEBRA == COMPLEX:
        out = (g[0] * h[0] + g[1] * h[1], g[1] * h[0] - g[0] * h[1])
    else:
        out = (g[0] * h[0], g[0] * h[1], g[1] * h[0], g[1] * h[1])
    return out
