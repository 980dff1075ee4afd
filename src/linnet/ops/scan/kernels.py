"""Triton kernel of the scans, forward and backward.

One kernel walks a sequence, or a piece of one, tile by tile. A tile is W runs of L tokens: a thread has its own run and
channels and composes the maps of its L tokens in registers, one scan over the runs gives each of them the state it
starts from, and the composed maps, applied to that, are the states. A run is a warp's, or with few channels a part of
one's. Everything is read once and written once, and the next tile is on its way meanwhile. Where sequences are few,
they are cut into pieces: a first launch composes the maps of whole pieces (`TOTALS`), the same kernel scans those, and
a last launch walks every piece from its own state.

The backward pass is the same walk in the other direction of time, over the transposed factors of the next token.
Channels are numbers, pairs (complex numbers, blocks) or bounds; what differs is in `_apply` and `_compose`.

Tiles are ``[W, L, BD]``. The hints about `V`, and `_tokens`, make the compiler give a thread V neighbouring channels
and all L tokens. That is more than speed: where it spreads L over threads, Triton 3.6 compiles the scan over W wrong.
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


@triton.jit
def _after_real(a1, b1, a, b):
    return _compose((a,), (a1,), REAL) + _apply((a,), (b,), (b1,), REAL)


@triton.jit
def _after_minmax(a1, b1, a, b):
    return _compose((a,), (a1,), MINMAX) + _apply((a,), (b,), (b1,), MINMAX)


@triton.jit
def _after_complex(a10, a11, b10, b11, a0, a1, b0, b1):
    return _compose((a0, a1), (a10, a11), COMPLEX) + _apply((a0, a1), (b0, b1), (b10, b11), COMPLEX)


@triton.jit
def _after_block(a10, a11, a12, a13, b10, b11, a0, a1, a2, a3, b0, b1):
    a = (a0, a1, a2, a3)
    return _compose(a, (a10, a11, a12, a13), BLOCK) + _apply(a, (b0, b1), (b10, b11), BLOCK)


@triton.jit
def _over_tokens(a, b, ALGEBRA: tl.constexpr):
    """Maps from the start of a run to each of its tokens, and to the last one."""
    if ALGEBRA == REAL:
        i, j = tl.associative_scan((a[0], b[0]), 1, _after_real)
        k, m = tl.reduce((a[0], b[0]), 1, _after_real, keep_dims=True)
        out = (i,), (j,), (k,), (m,)
    elif ALGEBRA == MINMAX:
        i, j = tl.associative_scan((a[0], b[0]), 1, _after_minmax)
        k, m = tl.reduce((a[0], b[0]), 1, _after_minmax, keep_dims=True)
        out = (i,), (j,), (k,), (m,)
    elif ALGEBRA == COMPLEX:
        i0, i1, j0, j1 = tl.associative_scan((a[0], a[1], b[0], b[1]), 1, _after_complex)
        k0, k1, m0, m1 = tl.reduce((a[0], a[1], b[0], b[1]), 1, _after_complex, keep_dims=True)
        out = (i0, i1), (j0, j1), (k0, k1), (m0, m1)
    else:
        maps = (a[0], a[1], a[2], a[3], b[0], b[1])
        i0, i1, i2, i3, j0, j1 = tl.associative_scan(maps, 1, _after_block)
        k0, k1, k2, k3, m0, m1 = tl.reduce(maps, 1, _after_block, keep_dims=True)
        out = (i0, i1, i2, i3), (j0, j1), (k0, k1, k2, k3), (m0, m1)
    return out


# Combining two runs of maps (the earlier first). A run carries the map of all of it and that of all but its last
# member, so one scan tells every one both what it leads to and what it starts from.


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
def _over_runs(a, b, ALGEBRA: tl.constexpr):
    """Maps from the start of a tile to the end of each run, and to its start."""
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


# Reading and writing the numbers of one token for every channel. Pairs are moved as one word. What is masked is the map
# that changes nothing.


@triton.jit
def _split(word, like, BITS: tl.constexpr):
    """The two numbers of an integer of twice their width, the first in its low half."""
    half: tl.constexpr = tl.int32 if BITS == 32 else tl.int16
    return word.to(half).to(like, bitcast=True), (word >> BITS).to(half).to(like, bitcast=True)


@triton.jit
def _words(ptr):
    """Where pairs of numbers are, as where one integer of twice their width is."""
    return ptr.to(tl.pointer_type(tl.int64 if ptr.dtype.element_ty.primitive_bitwidth == 32 else tl.int32))


@triton.jit
def _load_pair(ptr, base, at, hop, mask):
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    return _split(tl.load(_words(ptr) + base + at + hop, mask=mask, other=0), ptr.dtype.element_ty, BITS)


@triton.jit
def _join(x, y, BITS: tl.constexpr):
    half: tl.constexpr = tl.int32 if BITS == 32 else tl.int16
    word: tl.constexpr = tl.int64 if BITS == 32 else tl.int32
    low = x.to(half, bitcast=True).to(word) & ((1 << BITS) - 1)
    return low | (y.to(half, bitcast=True).to(word) << BITS)


@triton.jit
def _factors(ptr, base, at, hop, mask, ALGEBRA: tl.constexpr):
    if ALGEBRA == REAL:
        out = (tl.load(ptr + base + at + hop, mask=mask, other=1.0),)
    elif ALGEBRA == MINMAX:
        out = (tl.load(ptr + base + at + hop, mask=mask, other=float("inf")),)
    elif ALGEBRA == COMPLEX:
        x, y = _load_pair(ptr, base, at, hop, mask)
        out = (tl.where(mask, x, 1.0).to(x.dtype), y)
    else:
        x, y = _load_pair(ptr, 2 * base, 2 * at, 2 * hop, mask)
        u, v = _load_pair(ptr, 2 * base + 1, 2 * at, 2 * hop, mask)
        out = (tl.where(mask, x, 1.0).to(x.dtype), y, u, tl.where(mask, v, 1.0).to(v.dtype))
    return out


@triton.jit
def _wide(w, l, begin, tokens, STEP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Offsets of the rows of the tile's 2x2 blocks, in words of one, and which of them are there. The two of a block
    are neighbours, and a thread moves them at once."""
    L: tl.constexpr = l.shape[1]
    col = 2 * begin + tl.arange(0, 2 * BD)[None, None, :]
    at = tl.multiple_of(w * (2 * L * STEP * D) + col, (1, 1, 2))
    return at, l * (2 * STEP * D), tokens & tl.max_constancy(col < 2 * D, (1, 1, 2))


@triton.jit
def _load_blocks(ptr, base, wide):
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    at, hop, mask = wide
    rows = tl.load(_words(ptr) + tl.multiple_of(2 * base, 2) + at + hop, mask=mask, other=0)
    first, second = tl.split(rows.reshape(rows.shape[0], rows.shape[1], rows.shape[2] // 2, 2))
    return _split(first, ptr.dtype.element_ty, BITS) + _split(second, ptr.dtype.element_ty, BITS)


@triton.jit
def _write_blocks(ptr, base, wide, x):
    to: tl.constexpr = ptr.dtype.element_ty
    BITS: tl.constexpr = to.primitive_bitwidth
    at, hop, mask = wide
    rows = tl.join(_join(x[0].to(to), x[1].to(to), BITS), _join(x[2].to(to), x[3].to(to), BITS))
    rows = rows.reshape(rows.shape[0], rows.shape[1], 2 * rows.shape[2])
    tl.store(_words(ptr) + tl.multiple_of(2 * base, 2) + at + hop, rows, mask=mask)


@triton.jit
def _own(ptr, base, at, hop, mask, CONSTANT: tl.constexpr, col, D: tl.constexpr, ALGEBRA: tl.constexpr):
    """Factors of these tokens, or the one factor of all. That one is loaded once and masked in registers: a load for
    all tokens would set the layout of the scan, and another layout gives wrong results on Hopper (see the tests)."""
    if CONSTANT:
        one = _factors(ptr, 0, col, 0, col < D, ALGEBRA)
        unity = (1.0,)
        if ALGEBRA == MINMAX:
            unity = (float("inf"),)
        elif ALGEBRA == COMPLEX:
            unity = (1.0, 0.0)
        elif ALGEBRA == BLOCK:
            unity = (1.0, 0.0, 0.0, 1.0)
        out = _where(mask, one, unity)
    else:
        out = _factors(ptr, base, at, hop, mask, ALGEBRA)
    return out


@triton.jit
def _vector(ptr, base, at, hop, mask, ALGEBRA: tl.constexpr, other: tl.constexpr):
    if ALGEBRA == REAL or ALGEBRA == MINMAX:  # noqa: SIM109
        out = (tl.load(ptr + base + at + hop, mask=mask, other=other),)
    else:
        out = _load_pair(ptr, base, at, hop, mask)
    return out


@triton.jit
def _write(ptr, base, at, hop, x, mask):
    """Store the components of ``x`` side by side."""
    n: tl.constexpr = len(x)
    to: tl.constexpr = ptr.dtype.element_ty
    if n == 1:
        tl.store(ptr + base + at + hop, x[0].to(to), mask=mask)
    else:
        BITS: tl.constexpr = to.primitive_bitwidth
        words = _words(ptr) + base * (n // 2)
        at = at * (n // 2)
        hop = hop * (n // 2)
        tl.store(words + at + hop, _join(x[0].to(to), x[1].to(to), BITS), mask=mask)
        if n == 4:
            tl.store(words + 1 + at + hop, _join(x[2].to(to), x[3].to(to), BITS), mask=mask)


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
def _zeros(x):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (tl.zeros_like(x[c]),)
    return out


@triton.jit
def _last_run(x, w, W: tl.constexpr):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (tl.sum(tl.where(w == W - 1, x[c], 0.0), 0, keep_dims=True),)
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
def _outer(g, h, ALGEBRA: tl.constexpr):
    """Gradient of the factor from that of the state it led to and the state before."""
    if ALGEBRA == REAL:
        out = (g[0] * h[0],)
    elif ALGEBRA == COMPLEX:
        out = (g[0] * h[0] + g[1] * h[1], g[1] * h[0] - g[0] * h[1])
    else:
        out = (g[0] * h[0], g[0] * h[1], g[1] * h[0], g[1] * h[1])
    return out


@triton.jit
def _taken(a, b, h):
    """What a cell took to come to ``h``: 0 its state, 1 the upper or 2 the lower bound; on a tie the last of these."""
    return tl.where(h[0] == b[0], 2, tl.where(h[0] == a[0], 1, 0)).to(tl.uint8)


@triton.jit
def _tokens(L: tl.constexpr, T, D: tl.constexpr):
    """The numbers of a run's tokens. The compiler must not see that tokens of one channel are neighbours in memory."""
    l = tl.arange(0, L)[None, :, None]
    if D == 1:
        l *= tl.where(T > 0, 1, 0)
    return l


@triton.jit
def _sequence(ids_ptr, row, there, STEP: tl.constexpr, near):
    """The sequence of a packed token, and whether it is another one a step away (where there is one)."""
    seq = tl.load(ids_ptr + row, mask=there, other=-1)
    return seq, seq != tl.load(ids_ptr + row + STEP, mask=there & near, other=-1)


@triton.jit
def _tile(
    a_ptr,
    b_ptr,
    h_ptr,
    code_ptr,
    start_ptr,
    ids_ptr,
    p0,
    w,
    l,
    col,
    begin,
    within,
    origin,
    end,
    T,
    D: tl.constexpr,
    CONSTANT: tl.constexpr,
    ALGEBRA: tl.constexpr,
    KIND: tl.constexpr,
    V: tl.constexpr,
    STEP: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_A: tl.constexpr,
    CODE: tl.constexpr,
    TOTALS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What the tile from token ``p0`` on needs of memory: factors, values, and what the gradients need."""
    IDLE: tl.constexpr = float("-inf") if KIND == MINMAX else 0.0
    L: tl.constexpr = l.shape[1]
    lane = w * L + l
    token = lane < end - p0
    ok = within & token
    first_row = origin + p0 * STEP
    base = tl.multiple_of(first_row * D, V)
    at = tl.multiple_of(w * (L * STEP * D) + col, (1, 1, V))
    hop = l * (STEP * D)
    back = tl.multiple_of(base - STEP * D, V)
    ahead = tl.multiple_of(base + STEP * D, V)
    if PACKED:
        p = p0 + lane
        row = first_row.to(tl.int32) + lane * STEP
        seq, first = _sequence(ids_ptr, row, p < T, -STEP, p > 0)
    else:
        first = lane + p0 == 0
    known = ok & first
    if KIND == BLOCK and not CONSTANT:
        leads = token & (first == 0) if GRAD else token
        x, y, u, v = _load_blocks(a_ptr, back if GRAD else base, _wide(w, l, begin, leads, STEP, D, col.shape[2]))
        leads = within & leads
        a = (tl.where(leads, x, 1.0).to(x.dtype), y, u, tl.where(leads, v, 1.0).to(v.dtype))
    elif GRAD:
        # The factor that led on from this token; nothing leads on from the last one of a sequence.
        led = ok & (known == 0)
        if ALGEBRA == MINMAX:
            a = ((tl.load(code_ptr + back + at + hop, mask=led, other=0) == 0).to(tl.float32),)
        else:
            a = _own(a_ptr, back, at, hop, led, CONSTANT, col, D, KIND)
    else:
        a = _own(a_ptr, base, at, hop, ok, CONSTANT, col, D, KIND)
    b = _vector(b_ptr, base, at, hop, ok, KIND, IDLE)
    extra = (known,)
    if GRAD and ALGEBRA == MINMAX and not TOTALS:
        extra = (tl.load(code_ptr + base + at + hop, mask=ok, other=0),)
    if GRAD_A:  # the state before the last token of the walk is not among the states
        if PACKED:
            _, final = _sequence(ids_ptr, row, p < T, STEP, p + 1 < T)
            lasting = ok & (final == 0)
        else:
            lasting = ok & (lane + p0 + 1 < T)
        extra = _vector(h_ptr, ahead, at, hop, lasting, KIND, 0.0)
    if PACKED:
        entering = _fp32(_vector(start_ptr, 0, tl.multiple_of(seq * D + col, (1, 1, V)), 0, known, KIND, 0.0))
        a = _factor(a, KIND, GRAD)
        b = _fp32(b)
        fixed = _apply(a, b, entering, KIND)
        if CODE:
            extra = (tl.where(known, _taken(a, b, fixed), 3).to(tl.uint8),)
        b = _where(known, fixed, b)
        a = _where(known, _constant(fixed, KIND), a)
    return a, b, extra


@triton.jit
def _leave(
    a_ptr,
    y_ptr,
    da_ptr,
    code_ptr,
    init_ptr,
    last_ptr,
    ids_ptr,
    a,
    b,
    extra,
    h,
    p0,
    w,
    l,
    col,
    begin,
    within,
    origin,
    end,
    T,
    D: tl.constexpr,
    CONSTANT: tl.constexpr,
    ALGEBRA: tl.constexpr,
    KIND: tl.constexpr,
    V: tl.constexpr,
    STEP: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_A: tl.constexpr,
    CODE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write what the states ``h`` of the tile from token ``p0`` on give."""
    L: tl.constexpr = l.shape[1]
    lane = w * L + l
    ok = within & (lane < end - p0)
    base = tl.multiple_of((origin + p0 * STEP) * D, V)
    at = tl.multiple_of(w * (L * STEP * D) + col, (1, 1, V))
    hop = l * (STEP * D)
    if CODE:
        code = _taken(a, b, h)
        if PACKED:
            code = tl.where(extra[0] == 3, code, extra[0])
        tl.store(code_ptr + base + at + hop, code, mask=ok)
    if GRAD and ALGEBRA == MINMAX:
        _write(da_ptr, base, at, hop, (tl.where(extra[0] == 1, h[0], 0.0),), ok)
        _write(y_ptr, base, at, hop, (tl.where(extra[0] == 2, h[0], 0.0),), ok)
    else:
        _write(y_ptr, base, at, hop, h, ok)
    if PACKED:
        p = p0 + lane
        row = (origin + p0 * STEP).to(tl.int32) + lane * STEP
        seq, final = _sequence(ids_ptr, row, p < T, STEP, p + 1 < T)
        ended = ok & final
        state = tl.multiple_of(seq * D + col, (1, 1, V))
        if GRAD_A:
            earliest = _fp32(_vector(init_ptr, 0, state, 0, ended, KIND, 0.0))
            da = _outer(h, _where(ended, earliest, _fp32(extra)), KIND)
            if KIND == BLOCK:
                _write_blocks(da_ptr, base, _wide(w, l, begin, lane < end - p0, STEP, D, col.shape[2]), da)
            else:
                _write(da_ptr, base, at, hop, da, ok)
        if GRAD and ALGEBRA == MINMAX:
            _write(last_ptr, 0, state, 0, (tl.where(extra[0] == 0, h[0], 0.0),), ended)
        elif GRAD:
            own = _own(a_ptr, base, at, hop, ended, CONSTANT, col, D, KIND)
            _write(last_ptr, 0, state, 0, _apply(_factor(own, KIND, True), _zeros(h), h, KIND), ended)
        else:
            _write(last_ptr, 0, state, 0, h, ended)
    elif GRAD_A:  # the last token of the walk is for `_leave_last`
        inner = (lane < end - p0) & (lane + p0 + 1 < T)
        if KIND == BLOCK:
            _write_blocks(da_ptr, base, _wide(w, l, begin, inner, STEP, D, col.shape[2]), _outer(h, _fp32(extra), KIND))
        else:
            _write(da_ptr, base, at, hop, _outer(h, _fp32(extra), KIND), within & inner)


@triton.jit
def _leave_last(
    a_ptr,
    y_ptr,
    da_ptr,
    code_ptr,
    init_ptr,
    last_ptr,
    carry,
    n,
    col,
    within,
    origin,
    T,
    D: tl.constexpr,
    CONSTANT: tl.constexpr,
    ALGEBRA: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_A: tl.constexpr,
):
    """Write what the last state ``carry`` of sequence ``n`` gives."""
    final = origin + (T - 1) * STEP
    if GRAD_A:
        earliest = _fp32(_vector(init_ptr, n * D, col, 0, within, KIND, 0.0))
        _write(da_ptr, final * D, col, 0, _outer(carry, earliest, KIND), within)
    if GRAD:
        if ALGEBRA == MINMAX:
            own = ((tl.load(code_ptr + final * D + col, mask=within, other=0) == 0).to(tl.float32),)
        else:
            own = _factor(_own(a_ptr, final * D, col, 0, within, CONSTANT, col, D, KIND), KIND, True)
        _write(last_ptr, n * D, col, 0, _apply(own, _zeros(carry), carry, KIND), within)
    else:
        _write(last_ptr, n * D, col, 0, carry, within)


@triton.jit(do_not_specialize=["PIECE"])
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
    PIECE,
    D: tl.constexpr,  # offsets then are part of the instructions
    CONSTANT: tl.constexpr,  # one factor for all tokens
    ALGEBRA: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles on their way
    REVERSE: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_A: tl.constexpr,
    CODE: tl.constexpr,
    SPLIT: tl.constexpr,
    TOTALS: tl.constexpr,
    PACKED: tl.constexpr,
):
    # Tokens are counted in the order of the walk, p = 0 ... T - 1; rows are counted in memory.
    STEP: tl.constexpr = -1 if REVERSE else 1
    KIND: tl.constexpr = REAL if GRAD and ALGEBRA == MINMAX else ALGEBRA
    FLIP: tl.constexpr = GRAD and not PACKED  # packed factors are transposed as they are loaded
    blocks: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    unit = pid // blocks
    pieces = tl.cdiv(T, PIECE)
    n = (unit // pieces).to(tl.int64)
    piece = unit % pieces
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, T)
    origin = n * T
    if REVERSE:
        origin += T - 1
    w = tl.arange(0, W)[:, None, None]
    l = _tokens(L, T, D)
    left = (pid % blocks) * BD
    cols = left + tl.arange(0, BD)
    col = cols[None, None, :]
    within = tl.max_constancy(cols < D, V)[None, None, :]

    if TOTALS:  # the map of the piece so far
        nothing = tl.zeros([1, 1, BD], tl.float32)
        unity = nothing + (float("inf") if KIND == MINMAX else 1.0)
        carry = (nothing + (float("-inf") if KIND == MINMAX else 0.0),)
        total = (unity,)
        if KIND == COMPLEX:
            carry = (nothing, nothing)
            total = (unity, nothing)
        if KIND == BLOCK:
            carry = (nothing, nothing)
            total = (unity, nothing, nothing, unity)
    else:
        # A packed row starts with a map that is constant, whatever comes in.
        fresh = within & (piece == 0)
        carry = _vector(start_ptr, n * D, col, 0, fresh & (not PACKED), KIND, 0.0)
        if SPLIT:
            edge = _vector(edge_ptr, (unit.to(tl.int64) - 1) * D, col, 0, within & (piece > 0), KIND, 0.0)
            carry = _where(fresh, carry, edge)

    here = _tile(
        a_ptr, b_ptr, h_ptr, code_ptr, start_ptr, ids_ptr, begin, w, l, col, left, within, origin, end, T, D,
        CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, TOTALS, PACKED,
    )  # fmt: skip
    coming = here
    if AHEAD == 2:
        coming = _tile(
            a_ptr, b_ptr, h_ptr, code_ptr, start_ptr, ids_ptr, begin + W * L, w, l, col, left, within, origin, end,
            T, D, CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, TOTALS, PACKED,
        )  # fmt: skip
    for start_of_round in range(begin, end, AHEAD * W * L):
        for i in tl.static_range(AHEAD):
            p0 = start_of_round + i * W * L
            factors, values, extra = here
            a = _factor(factors, KIND, FLIP)
            b = _fp32(values)
            later = _tile(
                a_ptr, b_ptr, h_ptr, code_ptr, start_ptr, ids_ptr, p0 + AHEAD * W * L, w, l, col, left, within, origin,
                end, T, D, CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, TOTALS, PACKED,
            )  # fmt: skip
            to_a, to_b, k, m = _over_tokens(a, b, KIND)
            k, m, e, f = _over_runs(k, m, KIND)
            if TOTALS:
                k = _last_run(k, w, W)
                carry = _apply(k, _last_run(m, w, W), carry, KIND)
                total = _compose(k, total, KIND)
            else:
                start = _apply(e, f, carry, KIND)
                h = _apply(to_a, to_b, start, KIND)
                carry = _last_run(_apply(k, m, carry, KIND), w, W)
                _leave(
                    a_ptr, y_ptr, da_ptr, code_ptr, init_ptr, last_ptr, ids_ptr, a, b, extra, h, p0, w, l, col, left,
                    within, origin, end, T, D, CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, PACKED,
                )  # fmt: skip
            if AHEAD == 2:
                here = coming
                coming = later
            else:
                here = later

    if TOTALS:
        at = unit.to(tl.int64) * D
        _write(da_ptr, at, col, 0, total, within)
        _write(y_ptr, at, col, 0, carry, within)
    elif not PACKED:
        if end == T:
            _leave_last(
                a_ptr, y_ptr, da_ptr, code_ptr, init_ptr, last_ptr, carry, n, col, within, origin, T, D, CONSTANT,
                ALGEBRA, KIND, STEP, GRAD, GRAD_A,
            )  # fmt: skip
