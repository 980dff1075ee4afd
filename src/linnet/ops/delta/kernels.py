"""Triton kernels of the delta engine: what is local to a chunk, and the serial pass over the chunks.

With ``S0`` the state that enters a chunk of ``C`` rows and ``G`` the log-decays summed from its first row on, the
recurrence ``S_t = (I - w_t e_t^T) D_t S_{t-1} + w_t z_t^T`` reads

    T[r, s] = sum_c e_r[c] w_s[c] exp(G_r[c] - G_s[c]),  s < r          P likewise from q, s <= r, times scale
    R = (I + T)^-1 (Z - (exp(G) E) S0)                                  what each row writes under its key
    O = scale (exp(G) Q) S0 + P R                                       S1 = exp(G_C) S0 + (exp(G_C - G) W)^T R

A scalar beta belongs to the key a row writes under: ``w = beta k``, ``e = k``, ``z = v`` is the same recurrence as
``w = k``, ``e = beta k``, ``z = beta v``, and leaves erasing and values as they are. ``local_kernel`` makes
``A = (I + T)^-1`` and ``P`` of every chunk in parallel, ``state_kernel`` walks the chunks with the state on chip,
transposed: ``S^T`` and everything it is multiplied into stay in registers as the left operands of the tensor cores, and
the right operands are tiles as they lie in memory.

A decay that is the same for all channels of a key scales rows, so the pass reads q and k themselves, with eight numbers
a row (``rows``). Else (``VECTOR``) the operands are written out by ``prepare_kernel``, with their decays in them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Log-decays are cut at -104, where fp32 has nothing left of their exponential: a reset.


@triton.jit
def _span(chunk, cu_ptr, table_ptr, T, CT, PACKED: tl.constexpr):
    """First token of a chunk, counted over the whole batch, and how many tokens it has."""
    if PACKED:
        n = tl.load(table_ptr + 2 * chunk)
        first = tl.load(cu_ptr + n) + tl.load(table_ptr + 2 * chunk + 1) * CT
        end = tl.load(cu_ptr + n + 1)
    else:
        per_row = tl.cdiv(T, CT)
        first = chunk // per_row * T + chunk % per_row * CT
        end = (chunk // per_row + 1) * T
    return first, tl.minimum(end - first, CT)


@triton.jit
def tile_at(ptr, start, head, heads, width, row, col):
    """Addresses of one head of a tensor ``[rows, heads, width]``, at ``row`` counted from ``start``: 32 bits a tile."""
    return ptr + (start.to(tl.int64) * heads + head) * width + (row * (heads * width) + col)


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """``index < SIZE``, known beforehand when blocks fill the size."""
    if SIZE % BLOCK == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < SIZE


@triton.jit
def over_length(squares):
    """One over a vector's length, from its summed squares, rounded right. A GPU's own ``rsqrt`` is off by up to three
    units in the last place: with equal keys and beta 2 the same in every row, so that reflections let a state grow."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares + 1e-6))


@triton.jit
def right_lengths(T, beta, r_k):
    """Scores of keys against each other, each row by what ``beta |k|^2`` on the diagonal should be over what it is. A
    key that comes back has the same rounding error in every row, which reflections add up."""
    r = tl.arange(0, T.shape[0])
    found = tl.sum(tl.where(r[:, None] == r[None, :], T, 0.0), 1)
    missing = ((beta - found) - beta * r_k * r_k * 1e-6) / beta  # |k|^2 is 1 - 1e-6 / (sum of squares + 1e-6)
    return tl.fma(T, tl.where(r_k > 0.0, missing, 0.0)[:, None], T)  # no length: squares beyond fp32


@triton.jit
def nearest(x):
    """Numbers of 11 bits, the nearest. Tensor cores cut off the others: 2 less a rounding error, which reflections are
    made of, would become 1.998."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, EXACT: tl.constexpr, FINE: tl.constexpr):
    """``a @ b`` of fp32 matrices: in fp32 with EXACT, else on the tensor cores with 11 bits, or 21 with FINE."""
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    elif FINE:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(nearest(a), nearest(b), input_precision="tf32")


@triton.jit
def quarters(X):
    """Upper left, lower left and lower right quarters of matrices ``[n, c, c]``."""
    n: tl.constexpr = X.shape[0]
    half: tl.constexpr = X.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(X, [n, 2, half, 2, half]), (0, 2, 4, 1, 3)))
    a, b = tl.split(left)
    _, d = tl.split(right)
    return a, b, d


@triton.jit
def halves(X):
    """The two matrices of each pair ``[2 n, c, c]``."""
    n: tl.constexpr = X.shape[0] // 2
    c: tl.constexpr = X.shape[1]
    return tl.split(tl.permute(tl.reshape(X, [n, 2, c, c]), (0, 2, 3, 1)))


@triton.jit
def paired(a, d):
    """The inverse of :func:`halves`."""
    n: tl.constexpr = a.shape[0]
    c: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, d), (0, 3, 1, 2)), [2 * n, c, c])


@triton.jit
def merged(X, below, EXACT: tl.constexpr, FINE: tl.constexpr):
    """Inverses of unit lower triangular matrices ``[n, 2 c, 2 c]``, from those of their diagonal blocks ``[2 n, c, c]``
    and the blocks below the diagonal."""
    n: tl.constexpr = X.shape[0] // 2
    c: tl.constexpr = X.shape[1]
    a, d = halves(X)
    b = -product(d, product(below, a, EXACT, FINE), EXACT, FINE)
    left, right = tl.join(a, b), tl.join(tl.zeros([n, c, c], dtype=tl.float32), d)
    return tl.reshape(tl.permute(tl.join(left, right), (0, 3, 1, 4, 2)), [n, 2 * c, 2 * c])


@triton.jit
def inverse(T, EXACT: tl.constexpr, FINE: tl.constexpr):
    """``(I + T)^-1`` of a strictly lower triangular ``T``, from the inverses of ever larger diagonal blocks."""
    C: tl.constexpr = T.shape[0]
    T = tl.reshape(T, [1, C, C])
    if C > 32:
        a, below_32, d = quarters(T)
        T = paired(a, d)
    if C > 16:
        a, below_16, d = quarters(T)
        T = paired(a, d)
    r, c = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    X = tl.where(r == c, 1.0, tl.where((r == c + 1) & (r % 2 == 1), -T, 0.0))
    for level in tl.static_range(1, 4):
        below = ((r >> level) == (c >> level) + 1) & ((r >> level) % 2 == 1)
        corner = product(tl.where(below, T, 0.0), X, EXACT, FINE)
        X -= product(X, corner, EXACT, FINE)
    if C > 16:
        X = merged(X, below_16, EXACT, FINE)
    if C > 32:
        X = merged(X, below_32, EXACT, FINE)
    return tl.reshape(X, [C, C])


@triton.jit
def row_gates(g_ptr, t0, h, H, r, valid, SUB: tl.constexpr):
    """log2-decay of each row; the substeps of a token share the one before its first."""
    at = tile_at(g_ptr, t0, h, H, 1, r // SUB, 0)
    g = tl.load(at, mask=valid & (r % SUB == 0), other=0.0).to(tl.float32)
    return tl.maximum(g, -104.0) * 1.4426950408889634


@triton.jit
def gate_parts(g):
    """Log2-decays as multiples of 2^-10 and of 2^-28, which fp32 adds without error: rests of a chunk stay below 1/16,
    and what is cut off is below what an exponential shows."""
    coarse = (g + 12288.0) - 12288.0  # rounded: fp32 numbers of this size are such multiples
    return coarse, ((g - coarse) + 0.046875) - 0.046875


@triton.jit
def gate_sums(g):
    """Sums of log2-decays over the rows up to each, in two parts. A difference of sums is what adding only the rows
    between would be, bit for bit."""
    coarse, fine = gate_parts(g)
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0)


@triton.jit
def after(sums, C: tl.constexpr):
    """Decay of the rows after each row, from one part of :func:`gate_sums`."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, sums, 0.0), 0) - sums


@triton.jit
def between(coarse, fine, C: tl.constexpr):
    """Decay from after row s to row r, ``[r, s]``, zero above the diagonal."""
    r = tl.arange(0, C)
    pair = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.exp2(tl.where(r[:, None] >= r[None, :], pair, float("-inf")))


@triton.jit
def channel_gates(g_ptr, t0, h, H, K: tl.constexpr, r, valid, cols, wide, SUB: tl.constexpr, GATE: tl.constexpr):
    """log2-decay of each row and channel."""
    row, col, mask = (r // SUB)[:, None], cols[None, :], (valid & (r % SUB == 0))[:, None] & wide
    if GATE == 2:
        g = tl.load(tile_at(g_ptr, t0, h, H, K, row, col), mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(tile_at(g_ptr, t0, h, H, 1, row, col * 0), mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(g, -104.0) * 1.4426950408889634


@triton.jit
def power_of_2(n):
    """``2 ** n`` of whole numbers -126 .. 127, without error."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def moved(ptr, sequence, row, column, R: tl.constexpr, W: tl.constexpr):
    """Tile ``[R, W]`` of a descriptor ``[sequences, rows, columns]``: zero behind the end of the sequence."""
    return tl.reshape(ptr.load([sequence, row, column]), [R, W])


@triton.jit
def payload(ptr, t0, h, H, V: tl.constexpr, r, values, valid, has, SUB: tl.constexpr, UNTIED: tl.constexpr):
    """Tile ``[C, BV]`` of what is written: v by row, or, UNTIED, on the last row of each token."""
    mask = valid[:, None] & tl.trans(has)
    if UNTIED:
        at = tile_at(ptr, t0, h, H, V, (r // SUB)[:, None], values[None, :])
        return tl.load(at, mask=mask & (r % SUB == SUB - 1)[:, None], other=0.0)
    else:
        return tl.load(tile_at(ptr, t0.to(tl.int64) * SUB, h, H, V, r[:, None], values[None, :]), mask=mask, other=0.0)


# ROWS: of each row of a chunk, in fp32: decay from the chunk's start over the key's length, decay to the chunk's end
# over the key's length times beta, scale times decay over the query's length, beta (1 when it has channels), 1/|k|,
# 1/|q| (1 without norm), log2 of the decay from the start, decay of the whole chunk. Of VECTOR only the middle three.
#
# DECAYS (VECTOR): of each channel of a chunk, in fp32, INTO: by what the entering state is multiplied before it is
# read, FADE: by what it is multiplied before it is written to, LIFT: factor of the keys written under when they meet
# rows of the chunk itself, 0 when the channel forgets too much for one factor a row (see prepare_kernel).


@triton.jit
def reading(r, SUB: tl.constexpr):
    """Rows of a chunk that read: the last of each token. ``prepare_kernel`` writes out no others."""
    return r % SUB == SUB - 1


@triton.jit
def erasing(r, UNTIED: tl.constexpr):
    """Rows of a chunk that erase: all, or, UNTIED, the first of each token. ``prepare_kernel`` writes out no others."""
    if UNTIED:
        return r % 2 == 0
    else:
        return tl.full(r.shape, True, tl.int1)


@triton.jit
def key_tile(
    ptr, slot, start, sequence, rows, head, heads, row, k0, mask, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    VECTOR: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile ``[C, BK]`` from key ``k0`` on: rows of a tensor ``[rows, heads, K]``, or, VECTOR, what ``prepare_kernel``
    wrote out. TMA takes rows that are not asked for too, but for those behind the end of a sequence of so many rows."""
    cols = k0 + tl.arange(0, BK)[None, :]
    wide = within(cols, K, BK)
    if TMA and VECTOR:
        return ptr.load([slot.to(tl.int32) * C, k0])
    elif TMA:
        return moved(ptr, sequence, (start - sequence.to(tl.int64) * rows).to(tl.int32), head * K + k0, C, BK)
    elif VECTOR:
        at = ptr + slot * C * K + (tl.arange(0, C)[:, None] * K + cols)
        return tl.load(at, mask=mask[:, None] & wide, other=0.0)
    else:
        return tl.load(tile_at(ptr, start, head, heads, K, row[:, None], cols), mask=mask[:, None] & wide, other=0.0)


@triton.jit
def matrix_tile(ptr, slot, WHICH: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """A (0) or P (1) of a chunk."""
    if TMA:
        return ptr.load([(slot.to(tl.int32) * 2 + WHICH) * C, 0])
    else:
        r = tl.arange(0, C)
        return tl.load(ptr + slot * (2 * C * C) + WHICH * C * C + (r[:, None] * C + r[None, :]))


@triton.jit
def keep_matrix(ptr, slot, WHICH: tl.constexpr, x, C: tl.constexpr, TMA: tl.constexpr):
    """Store A (0) or P (1) of a chunk."""
    if TMA:
        ptr.store([(slot.to(tl.int32) * 2 + WHICH) * C, 0], x.to(ptr.dtype))
    else:
        r = tl.arange(0, C)
        at = ptr + slot * (2 * C * C) + WHICH * C * C + (r[:, None] * C + r[None, :])
        tl.store(at, x.to(ptr.dtype.element_ty))


@triton.jit
def lifted(w, decays_ptr, k0, K: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, GATE: tl.constexpr):
    """Keys written under as rows of their own chunk meet them, and how many channels hard_kernel takes instead."""
    hard = 0
    if VECTOR and GATE != 0:
        cols = k0 + tl.arange(0, BK)
        lift = tl.load(decays_ptr + 2 * K + cols, mask=within(cols, K, BK), other=1.0)
        hard = tl.sum((lift == 0.0).to(tl.int32), 0)
        w = (w.to(tl.float32) * lift[None, :]).to(w.dtype)
    return w, hard


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def local_kernel(
    beta_ptr,
    g_ptr,
    rows_ptr,  # [chunks, H, 8, C], see ROWS
    decays_ptr,  # [chunks, H, 3, K], see DECAYS
    matrices_ptr,  # A and P, [chunks, H, 2, C, C]
    erase_ptr,  # k and q from the second on, or the operands written out by prepare_kernel, [chunks, H, C, K]
    write_ptr,
    read_ptr,
    cu_ptr,
    table_ptr,
    scale,
    least,  # least beta
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a scalar per token, 2 one per channel
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FINE: tl.constexpr,
    APART: tl.constexpr,  # A is made before P is begun, in two walks over the keys
    TMA: tl.constexpr,  # tiles come through descriptors, but for tokens that several rows share
):
    pid = tl.program_id(0)
    h = pid % H
    chunk = pid // H
    hq = h // (H // HQ)
    slot = pid.to(tl.int64)
    t0, tokens = _span(chunk, cu_ptr, table_ptr, T, CT, PACKED)
    sequence = chunk if PACKED else chunk // tl.cdiv(T, CT)
    r = tl.arange(0, C)
    rows_ptr += slot * (8 * C)
    row, col = r[:, None], r[None, :]

    valid = r < tokens * SUB
    s0 = t0.to(tl.int64) * SUB
    all_rows = tl.full([C], True, tl.int1)
    written = all_rows if VECTOR else valid
    asked = all_rows if UNTIED else reading(r, SUB) if VECTOR else valid & reading(r, SUB)
    COPIED: tl.constexpr = TMA and (UNTIED or SUB == 1)
    T_ = tl.zeros([C, C], dtype=tl.float32)
    P = tl.zeros([C, C], dtype=tl.float32)
    q2 = tl.zeros([C], dtype=tl.float32)
    hard = 0
    if VECTOR and GATE != 0:
        decays_ptr += slot * (3 * K)
    if not VECTOR:  # on their way while keys are multiplied
        beta = tl.load(tile_at(beta_ptr, s0, h, H, 1, r, 0), mask=valid, other=1.0).to(tl.float32)
        if GATE != 0:
            g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
    for k0 in range(0, K, BK):
        w = key_tile(write_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, k0, written, K, C, BK, VECTOR, TMA)
        w, few = lifted(w, decays_ptr, k0, K, BK, VECTOR, GATE)
        hard += few
        if not APART:
            q = key_tile(read_ptr, slot, t0, sequence, T, hq, HQ, r // SUB, k0, asked, K, C, BK, VECTOR, COPIED)
            if NORM and not VECTOR:
                q2 += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            P = tl.dot(q, tl.trans(w), P, input_precision="ieee")
        if not UNTIED:
            e = w
            if VECTOR:
                e = key_tile(erase_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, k0, all_rows, K, C, BK, VECTOR, TMA)
            T_ = tl.dot(e, tl.trans(w), T_, input_precision="ieee")
    if UNTIED:  # a row erases or reads, and both are one product
        T_ = tl.where(erasing(r, UNTIED)[:, None], P, 0.0)
        P = tl.where(reading(r, SUB)[:, None], P, 0.0)
    if not VECTOR:
        rows_ptr += r
        beta = tl.where(tl.abs(beta) < least, least, beta)
        r_k = tl.zeros([C], dtype=tl.float32) + 1.0
        if NORM:  # a key's square as the products of equal keys are rounded, so that those have length one
            r_k = over_length(tl.sum(tl.where(row == col, T_, 0.0), 1))
        seen = tl.zeros([C], dtype=tl.float32)
        left = seen
        if GATE != 0:
            coarse, fine = gate_sums(g)
            seen, left = coarse + fine, after(coarse, C) + after(fine, C)
            steep = True
            if not EXACT:
                # A factor for either row of a pair, unless half the chunk forgets more than fp32 numbers hold.
                middle = 0.5 * tl.min(coarse, 0)
                steep = middle < -60.0
                middle = tl.where(steep, 0.0, middle)
                rise = tl.where(steep, 1.0, tl.exp2((coarse - middle) + fine))
                fall = tl.where(steep, 1.0, tl.exp2((middle - coarse) - fine))
            tl.store(rows_ptr + 6 * C, seen)
            tl.store(rows_ptr + 7 * C, tl.exp2(seen + left))
        tl.store(rows_ptr, r_k * tl.exp2(seen))
        tl.store(rows_ptr + C, r_k * beta * tl.exp2(left))
        tl.store(rows_ptr + 3 * C, beta)
        tl.store(rows_ptr + 4 * C, r_k)
        erase, write = r_k, r_k * beta
        if GATE != 0 and not EXACT:
            erase, write = erase * rise, write * fall
    for turn in tl.static_range(2):
        if (turn == 0) == APART:
            if VECTOR:
                if GATE != 0:
                    if hard > 0:  # what hard_kernel has left
                        T_ += matrix_tile(matrices_ptr, slot, 0, C, TMA).to(tl.float32)
            else:
                if GATE != 0:
                    if steep:
                        T_ = T_ * between(coarse, fine, C)
                T_ = T_ * erase[:, None] * write[None, :]
                if EXACT and NORM:
                    T_ = right_lengths(T_, beta, r_k)
            A = inverse(tl.where(row > col, T_, 0.0), EXACT, FINE)
            keep_matrix(matrices_ptr, slot, 0, A, C, TMA)
        else:
            for k0 in range(0, K if APART else 0, BK):
                w = key_tile(write_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, k0, written, K, C, BK, VECTOR, TMA)
                w, _ = lifted(w, decays_ptr, k0, K, BK, VECTOR, GATE)
                q = key_tile(read_ptr, slot, t0, sequence, T, hq, HQ, r // SUB, k0, asked, K, C, BK, VECTOR, COPIED)
                if NORM and not VECTOR:
                    q2 += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
                P = tl.dot(q, tl.trans(w), P, input_precision="ieee")
            if VECTOR:
                if GATE != 0:
                    if hard > 0:
                        P += matrix_tile(matrices_ptr, slot, 1, C, TMA).to(tl.float32)
            else:
                if GATE != 0:
                    if steep:
                        P = P * between(coarse, fine, C)
                r_q = tl.zeros([C], dtype=tl.float32) + 1.0
                if NORM:
                    r_q = over_length(q2)
                tl.store(rows_ptr + 2 * C, r_q * scale * tl.exp2(seen))
                tl.store(rows_ptr + 5 * C, r_q)
                read = r_q * scale
                if GATE != 0 and not EXACT:
                    read = read * rise
                P = P * read[:, None] * write[None, :]
            keep_matrix(matrices_ptr, slot, 1, tl.where(row >= col, P, 0.0), C, TMA)


@triton.jit
def stretch(n, cu_ptr, first_ptr, T, CT, LENGTH, PACKED: tl.constexpr):
    """First token of a sequence, or of ``LENGTH`` tokens of one, the one after its last, and its first chunk."""
    if PACKED:
        return tl.load(cu_ptr + n), tl.load(cu_ptr + n + 1), tl.load(first_ptr + n)
    else:
        parts = tl.cdiv(T, LENGTH)
        first = n // parts * T + n % parts * LENGTH
        end = tl.minimum(first + LENGTH, (n // parts + 1) * T)
        return first, end, n // parts * tl.cdiv(T, CT) + n % parts * (LENGTH // CT)


@triton.jit
def factors(
    rows_ptr, decays_ptr, chunk, n_chunks, h, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    VECTOR: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What a serial pass fetches a chunk ahead by hand, as the compiler does so only for what enters a product: by what
    the state is multiplied before it is written to and before it is read, and the rows' factors of reading."""
    slot = chunk.to(tl.int64) * H + h
    fade, into, read = 1.0, 1.0, tl.zeros([C], dtype=tl.float32)
    if VECTOR:
        if GATE != 0:
            keys = tl.arange(0, BK)
            inside = within(keys, K, BK) & (n_chunks > 0)
            into = tl.load(decays_ptr + slot * (3 * K) + keys, mask=inside, other=1.0)
            fade = tl.load(decays_ptr + slot * (3 * K) + K + keys, mask=inside, other=1.0)
    else:
        if GATE != 0:
            fade = tl.load(rows_ptr + slot * (8 * C) + 7 * C, mask=n_chunks > 0, other=1.0)
        read = tl.load(rows_ptr + slot * (8 * C) + 2 * C + tl.arange(0, C), mask=n_chunks > 0, other=0.0)
    return fade, into, read


@triton.jit(do_not_specialize=["T", "CT", "LENGTH", "H", "HQ"])
def state_kernel(
    erase_ptr,  # k and q themselves, from the second on, or the operands written out by prepare_kernel
    write_ptr,
    read_ptr,
    v_ptr,
    w_ptr,
    rows_ptr,
    decays_ptr,
    matrices_ptr,
    start_ptr,  # [N, H, K, V]
    last_ptr,
    o_ptr,
    S_ptr,  # KEEP: the state that each chunk reads, [chunks, H, V, K], and R^T, [chunks, H, V, C]
    R_ptr,
    cu_ptr,
    first_ptr,  # [N + 1] chunks before each sequence (PACKED)
    scale,
    T,
    CT,
    LENGTH,  # tokens of a stretch that is walked by itself
    H,
    HQ,
    K: tl.constexpr,
    V: tl.constexpr,  # columns of the state that is walked
    WIDTH: tl.constexpr,  # of the values
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    OUTPUT: tl.constexpr,
    KEEP: tl.constexpr,
    LAST: tl.constexpr,
    MOVES: tl.constexpr,  # start from [0, I] instead: what a stretch adds to a state, and by what it multiplies it
    PACKED: tl.constexpr,
    TMA: tl.constexpr,  # tiles come through descriptors, but for tokens that several rows share and values in MOVES
):
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    h = (pid // blocks) % H
    n = pid // (blocks * H)
    hq = h // (H // HQ)
    first, end, chunk0 = stretch(n, cu_ptr, first_ptr, T, CT, LENGTH, PACKED)
    sequence = n if PACKED else n // tl.cdiv(T, LENGTH)
    r = tl.arange(0, C)
    value = pid % blocks * BV
    values = value + tl.arange(0, BV)
    has = within(values, V, BV)[:, None]
    keys = tl.arange(0, BK)
    state = (n.to(tl.int64) * H + h) * K * V + (keys[None, :] * V + values[:, None])
    inside = has & within(keys, K, BK)[None, :]
    given = has
    if MOVES:
        given = (values < WIDTH)[:, None]
        S = tl.where(keys[None, :] == values[:, None] - WIDTH, 1.0, 0.0)
    else:
        S = tl.load(start_ptr + state, mask=inside, other=0.0)

    n_chunks = tl.cdiv(end - first, CT)
    fade, into, read = factors(rows_ptr, decays_ptr, chunk0, n_chunks, h, H, K, C, BK, VECTOR, GATE)
    # Through descriptors, what is written is fetched ahead in memory; else, where w takes part, in registers by hand.
    COPIED: tl.constexpr = TMA and not UNTIED and not MOVES
    if W and not COPIED:
        early = r < tl.minimum(end - first, CT) * SUB
        v = payload(v_ptr, first, h, H, WIDTH, r, values, early, given, SUB, UNTIED)
        w = payload(w_ptr, first, h, H, WIDTH, r, values, early, given, SUB, UNTIED)
    for it in range(0, n_chunks):
        t0 = first + it * CT
        slot = (chunk0 + it).to(tl.int64) * H + h
        ahead = tl.minimum(it + 1, n_chunks - 1)
        next_fade, next_into, next_read = factors(
            rows_ptr, decays_ptr, chunk0 + ahead, n_chunks, h, H, K, C, BK, VECTOR, GATE
        )
        if W and not COPIED:
            t1 = first + ahead * CT
            early = r < tl.minimum(end - t1, CT) * SUB
            next_v = payload(v_ptr, t1, h, H, WIDTH, r, values, early, given, SUB, UNTIED)
            next_w = payload(w_ptr, t1, h, H, WIDTH, r, values, early, given, SUB, UNTIED)
        valid = r < tl.minimum(end - t0, CT) * SUB
        all_rows = tl.full([C], True, tl.int1)
        reads = valid & reading(r, SUB)
        s0 = t0.to(tl.int64) * SUB
        rows = rows_ptr + slot * (8 * C) + r

        if VECTOR:
            if GATE != 0:
                S = S * into[None, :]
        if KEEP:
            at = S_ptr + slot * K * V + (values[:, None] * K + keys[None, :])
            tl.store(at, S.to(S_ptr.dtype.element_ty), mask=inside)
        k = key_tile(
            write_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, 0, all_rows if VECTOR else valid, K, C, BK, VECTOR, TMA
        )
        if VECTOR:
            e = key_tile(
                erase_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, 0, erasing(r, UNTIED), K, C, BK, VECTOR, TMA
            )
        else:
            e = k
        Sb = S.to(k.dtype)
        X = tl.dot(Sb, tl.trans(e), input_precision="ieee")
        if not VECTOR:
            X = X * tl.load(rows)[None, :]
        if TMA and UNTIED:
            X = tl.where(erasing(r, UNTIED)[None, :], X, 0.0)
        A = matrix_tile(matrices_ptr, slot, 0, C, TMA)
        # v goes to the tensor cores as it lies in memory
        if COPIED:
            row = (t0 - sequence * T) * SUB
            z = moved(v_ptr, sequence, row, h * V + value, C, BV)
            if W:
                w = moved(w_ptr, sequence, row, h * V + value, C, BV)
                z = (z.to(tl.float32) * w.to(tl.float32)).to(k.dtype)
        elif W:
            z = (v.to(tl.float32) * w.to(tl.float32)).to(k.dtype)
            v, w = next_v, next_w
        else:
            z = payload(v_ptr, t0, h, H, WIDTH, r, values, valid, given, SUB, UNTIED)
        if k.dtype == tl.float32:  # one sum of small terms: X alone is a row of large ones that cancel
            R = tl.dot(tl.trans(z) - X, tl.trans(A), input_precision="ieee")
        else:
            R = tl.dot(tl.trans(z), tl.trans(A), input_precision="ieee")
            R = tl.dot((-X).to(k.dtype), tl.trans(A), R, input_precision="ieee")
        Rb = R.to(k.dtype)
        if KEEP:
            at = R_ptr + slot * C * V + (values[:, None] * C + r[None, :])
            tl.store(at, Rb, mask=has & tl.full([1, C], True, tl.int1))
        if OUTPUT:
            asked = reading(r, SUB) if VECTOR else reads
            q = key_tile(
                read_ptr,
                slot,
                t0,
                sequence,
                T,
                hq,
                HQ,
                r // SUB,
                0,
                asked,
                K,
                C,
                BK,
                VECTOR,
                TMA and (UNTIED or SUB == 1),
            )
            o = tl.dot(Sb, tl.trans(q), input_precision="ieee")
            if not VECTOR:
                o = o * read[None, :]
            P = matrix_tile(matrices_ptr, slot, 1, C, TMA)
            o = tl.dot(Rb, tl.trans(P), o, input_precision="ieee")
            if TMA and SUB == 1:
                o = tl.reshape(tl.trans(o.to(k.dtype)), [1, C, BV])
                o_ptr.store([sequence, t0 - sequence * T, h * V + value], o)
            else:
                at = tile_at(o_ptr, t0, h, H, V, (r // SUB)[None, :], values[:, None])
                tl.store(at, o.to(o_ptr.dtype.element_ty), mask=has & reads[None, :])
        if not VECTOR:
            Rb = (R * tl.load(rows + C)[None, :]).to(k.dtype)
        if GATE != 0:
            if VECTOR:
                S = S * fade[None, :]
            else:
                S = S * fade
        S = tl.dot(Rb, k, S, input_precision="ieee")
        fade, into, read = next_fade, next_into, next_read

    if LAST:
        tl.store(last_ptr + state, S, mask=inside)
