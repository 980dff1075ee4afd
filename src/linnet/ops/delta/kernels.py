"""Triton kernels of the delta engine: what is local to a chunk, and the serial pass over the chunks.

With ``S0`` the state that enters a chunk of ``C`` rows and ``G`` the log-decays summed from its first row on, the
recurrence ``S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T`` reads

    T[r, s] = sum_c e_r[c] k_s[c] exp(G_r[c] - G_s[c]),  s < r          P likewise from q, s <= r, times scale
    R = (I + T)^-1 (Z - (exp(G) E) S0)                                  what each row writes under its key
    O = scale (exp(G) Q) S0 + P R                                       S1 = exp(G_C) S0 + (exp(G_C - G) K)^T R

``local_kernel`` makes ``A = (I + T)^-1`` and ``P`` of every chunk in parallel, ``state_kernel`` walks the chunks with
the state on chip, transposed: ``S^T`` and everything it is multiplied into stay in registers as the left operands of
the tensor cores, and the right operands are tiles as they lie in memory.

A decay that is the same for all channels of a key scales rows, so the pass reads q and k themselves, with eight numbers
a row (``rows``). A decay by channel (``VECTOR``) has its operands ``exp(G) E``, ``scale exp(G) Q``, ``exp(G_C - G) K``
written out by ``local_kernel``.

Only sums of log-decays over the rows between two rows are ever exponentiated, and they are summed as they are, never
taken as differences of longer sums (scalar decays in 16-bit dtypes excepted, where the difference is exact enough): a
reset anywhere costs nothing elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Log-decays are cut at -80: exp of it is 2e-35, a reset.


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
def inverse(T, table_ptr, C: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """``(I + T)^-1`` of a strictly lower triangular ``T``, from the inverses of ever larger diagonal blocks."""
    r, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    X = tl.where(r == c, 1.0, 0.0) - T * chosen(table_ptr, 0, 2, C).to(tl.float32)
    for level in range(1, LEVELS):
        corner = product(T * chosen(table_ptr, level, 2, C).to(tl.float32), X, EXACT)
        X -= product(X, corner, EXACT)
    return X


@triton.jit
def row_gates(g_ptr, t0, h, H, r, valid, SUB: tl.constexpr):
    """log2-decay of each row; the substeps of a token share the one before its first."""
    at = tile_at(g_ptr, t0, h, H, 1, r // SUB, 0)
    g = tl.load(at, mask=valid & (r % SUB == 0), other=0.0).to(tl.float32)
    return tl.maximum(g, -80.0) * 1.4426950408889634


@triton.jit
def after(g, r, C: tl.constexpr, EXACT: tl.constexpr):
    """Decay of the rows after each row."""
    if EXACT:
        return tl.sum(tl.where(r[:, None] < r[None, :], g[None, :], 0.0), 1)
    else:
        return tl.cumsum(g, 0, reverse=True) - g


@triton.jit
def between(g, seen, C: tl.constexpr, EXACT: tl.constexpr):
    """Decay from after row s to row r, ``[r, s]``, zero above the diagonal."""
    r = tl.arange(0, C)
    if EXACT:
        pair = tl.cumsum(tl.where(r[:, None] > r[None, :], g[:, None], 0.0), 0)
    else:
        pair = seen[:, None] - seen[None, :]
    return tl.exp2(tl.where(r[:, None] >= r[None, :], pair, float("-inf")))


@triton.jit
def channel_gates(g_ptr, t0, h, H, K: tl.constexpr, r, valid, cols, wide, SUB: tl.constexpr, GATE: tl.constexpr):
    """log2-decay of each row and channel."""
    row, col, mask = (r // SUB)[:, None], cols[None, :], (valid & (r % SUB == 0))[:, None] & wide
    if GATE == 2:
        g = tl.load(tile_at(g_ptr, t0, h, H, K, row, col), mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(tile_at(g_ptr, t0, h, H, 1, row, col * 0), mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(g, -80.0) * 1.4426950408889634


@triton.jit
def split(x, EXACT: tl.constexpr):
    """``x`` as two bfloat16 terms, for sums of it on the tensor cores that keep 16 bits; fp32 as it is with EXACT."""
    if EXACT:
        return x, x
    else:
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def sums(selected, high, low, EXACT: tl.constexpr):
    """Sums over the rows selected, ``selected @ x``, of an ``x`` taken apart by :func:`split`."""
    if EXACT:
        return tl.dot(selected, high, input_precision="ieee")
    else:
        return tl.dot(selected, high, tl.dot(selected, low))


@triton.jit
def product(a, b, EXACT: tl.constexpr):
    """``a @ b`` of fp32 matrices, to 16 bits unless EXACT."""
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        a_high, a_low = split(a, EXACT)
        b_high, b_low = split(b, EXACT)
        return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


# Pairs (r, s) of rows, s before r, have the decay between them taken apart at a row in the middle, one factor for r and
# one for s. Step ``level`` has the pairs of the two halves of each block of 2 << level rows, parted where the halves meet:
# no exponent is positive. Where decays are mild all pairs inside larger blocks go first and at once (step ``start - 1``),
# parted at the first row of the block, with the inverse decay as the factor of s.


@triton.jit
def block_level(g, C: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr):
    """log2 of the rows over which no channel decays by more than ``2 ** -64``, so that the inverse of a decay is a number
    of good size, in a dtype with the exponents of fp32 (WIDE)."""
    if WIDE:
        whole = tl.min(tl.sum(g, 0), 0)
        quarter = tl.min(tl.min(tl.sum(tl.reshape(g, [C // 16, 16, g.shape[1]]), 1), 1), 0)
        return tl.where(whole >= -64.0, LEVELS, tl.where(quarter >= -64.0, 4, 0))
    else:
        return 0


@triton.jit
def chosen(table_ptr, step, which, C: tl.constexpr):
    """Matrix ``which`` of a step from the table that ``launch.selections`` makes."""
    r = tl.arange(0, C)
    return tl.load(table_ptr + (step * 3 + which) * (C * C) + (r[:, None] * C + r[None, :]))


@triton.jit
def step_number(level, start):
    """Where a step is in the table: steps by level, then those of whole blocks, of a chunk, of 16 rows and of one."""
    return tl.where(level >= start, level, tl.where(start == 0, 8, tl.where(start == 4, 7, 6)))


@triton.jit
def write_keys(
    k_ptr, b_ptr, t0, head, heads, K: tl.constexpr, r, valid, cols, wide, SUB: tl.constexpr, UNTIED: tl.constexpr
):
    """Tile ``[C, BK]`` of the keys written under: k by row, or, UNTIED, b and k of each token in turn."""
    if UNTIED:
        row, second = (r // 2)[:, None], (r % 2 == 1)[:, None]
        mask = valid[:, None] & wide
        b = tl.load(tile_at(b_ptr, t0, head, heads, K, row, cols[None, :]), mask=mask & (second == 0), other=0.0)
        return b + tl.load(tile_at(k_ptr, t0, head, heads, K, row, cols[None, :]), mask=mask & second, other=0.0)
    else:
        at = tile_at(k_ptr, t0.to(tl.int64) * SUB, head, heads, K, r[:, None], cols[None, :])
        return tl.load(at, mask=valid[:, None] & wide, other=0.0)


@triton.jit
def erase_keys(a_ptr, t0, h, H, K: tl.constexpr, r, valid, cols, wide):
    """UNTIED: the first substep erases with -a, the second nothing."""
    mask = (valid & (r % 2 == 0))[:, None] & wide
    return -tl.load(tile_at(a_ptr, t0, h, H, K, (r // 2)[:, None], cols[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def payload(ptr, t0, h, H, V: tl.constexpr, r, values, valid, has, SUB: tl.constexpr, UNTIED: tl.constexpr):
    """Tile ``[C, BV]`` of what is written: v by row, or, UNTIED, on the last row of each token."""
    mask = valid[:, None] & tl.trans(has)
    if UNTIED:
        at = tile_at(ptr, t0, h, H, V, (r // SUB)[:, None], values[None, :])
        return tl.load(at, mask=mask & (r % SUB == SUB - 1)[:, None], other=0.0)
    else:
        return tl.load(tile_at(ptr, t0.to(tl.int64) * SUB, h, H, V, r[:, None], values[None, :]), mask=mask, other=0.0)


@triton.jit
def payload_at(ptr, t0, h, H, V: tl.constexpr, r, values, valid, SUB: tl.constexpr, UNTIED: tl.constexpr):
    """Addresses ``[BV, C]`` of what is written, and which rows have it: UNTIED, the last of each token."""
    if UNTIED:
        return tile_at(ptr, t0, h, H, V, (r // SUB)[None, :], values[:, None]), valid & (r % SUB == SUB - 1)
    else:
        return tile_at(ptr, t0.to(tl.int64) * SUB, h, H, V, r[None, :], values[:, None]), valid


# ROWS: of each row of a chunk, in fp32: decay from the chunk's start (scalar decays) over the key's length, decay to the
# chunk's end over the key's length, scale times decay over the query's length, beta (1 when it has channels), 1/|k|, 1/|q|
# (1 without norm), log2 of the decay from the start, decay of the whole chunk. The first three are of scalar decays.


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def local_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    a_ptr,  # UNTIED, with b in place of k on the first substep
    b_ptr,
    g_ptr,
    rows_ptr,  # [chunks, H, 8, C], see ROWS
    fade_ptr,  # VECTOR: decay of the whole chunk by channel, [chunks, H, K]
    matrices_ptr,  # A, P and, without channel-wise w, A diag(beta), [chunks, H, 3 or 2, C, C]
    erase_ptr,  # VECTOR: exp(G) E, scale exp(G) Q and exp(G_C - G) K, [chunks, H, C, K]
    read_ptr,
    write_ptr,
    select_ptr,  # see launch.selections
    cu_ptr,
    table_ptr,
    scale,
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,  # log2 C
    BK: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a scalar per token, 2 one per channel
    ERASE: tl.constexpr,  # whether beta has channels
    W: tl.constexpr,  # whether what is written has strengths of its own, by channel
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    SCORES: tl.constexpr,  # whether A and P are wanted
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    chunk = pid // H
    hq = h // (H // HQ)
    slot = pid.to(tl.int64)
    t0, tokens = _span(chunk, cu_ptr, table_ptr, T, CT, PACKED)
    r = tl.arange(0, C)
    valid = r < tokens * SUB
    reads = valid & (r % SUB == SUB - 1)
    token, line = (r // SUB)[:, None], r[:, None]
    s0 = t0.to(tl.int64) * SUB
    rows_ptr += slot * (8 * C) + r
    r_k = tl.zeros([C], dtype=tl.float32) + 1.0
    r_q = tl.zeros([C], dtype=tl.float32) + 1.0
    lower = r[:, None] > r[None, :]

    if not VECTOR:
        cols = tl.arange(0, BK)
        wide = within(cols, K, BK)[None, :]
        k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, line, cols[None, :]), mask=valid[:, None] & wide, other=0.0)
        q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, cols[None, :]), mask=reads[:, None] & wide, other=0.0)
        if NORM:
            r_k = tl.rsqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1) + 1e-6)
            r_q = tl.rsqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) + 1e-6)
        T_ = tl.dot(k, tl.trans(k), input_precision="ieee")
        P = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = tl.zeros([C], dtype=tl.float32)
        left = seen
        if GATE != 0:
            g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
            seen = tl.cumsum(g, 0)
            left = after(g, r, C, EXACT)
            decay = between(g, seen, C, EXACT)
            T_ = T_ * decay
            P = P * decay
            tl.store(rows_ptr + 6 * C, seen)
            tl.store(rows_ptr + 7 * C, tl.exp2(seen + left))
        tl.store(rows_ptr, r_k * tl.exp2(seen))
        tl.store(rows_ptr + C, r_k * tl.exp2(left))
        tl.store(rows_ptr + 2 * C, r_q * scale * tl.exp2(seen))
        T_ = T_ * r_k[:, None] * r_k[None, :]
        P = P * (r_q * scale)[:, None] * r_k[None, :]
    else:
        erase_ptr += slot * C * K
        read_ptr += slot * C * K
        write_ptr += slot * C * K
        T_ = tl.zeros([C, C], dtype=tl.float32)
        P = tl.zeros([C, C], dtype=tl.float32)
        if NORM:
            k2, q2 = tl.zeros([C], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
            for k0 in range(0, K, BK):
                cols = k0 + tl.arange(0, BK)
                wide = within(cols, K, BK)[None, :]
                k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, line, cols[None, :]), mask=valid[:, None] & wide, other=0.0)
                q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, cols[None, :]), mask=reads[:, None] & wide, other=0.0)
                k2 += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
                q2 += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            r_k, r_q = tl.rsqrt(k2 + 1e-6), tl.rsqrt(q2 + 1e-6)
        for k0 in range(0, K, BK):
            cols = k0 + tl.arange(0, BK)
            wide = within(cols, K, BK)[None, :]
            inside = valid[:, None] & wide
            k = write_keys(k_ptr, b_ptr, t0, hq, HQ, K, r, valid, cols, wide, SUB, UNTIED).to(tl.float32)
            q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, cols[None, :]), mask=reads[:, None] & wide, other=0.0)
            dtype = q.dtype
            k, q = k * r_k[:, None], q.to(tl.float32) * (r_q * scale)[:, None]
            if UNTIED:
                e = erase_keys(a_ptr, t0, h, H, K, r, valid, cols, wide)
            elif ERASE:
                e = k * tl.load(tile_at(beta_ptr, s0, h, H, K, line, cols[None, :]), mask=inside, other=0.0)
            else:
                e = k
            out = r[:, None] * K + cols[None, :]
            fits = tl.full([C, 1], True, tl.int1) & wide
            if GATE == 0:
                if SCORES:
                    T_ += tl.dot(e.to(dtype), tl.trans(k.to(dtype)), input_precision="ieee")
                    P += tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision="ieee")
                tl.store(erase_ptr + out, e.to(dtype), mask=fits)
                tl.store(read_ptr + out, q.to(dtype), mask=fits)
                tl.store(write_ptr + out, k.to(dtype), mask=fits)
            else:
                g = channel_gates(g_ptr, t0, h, H, K, r, valid, cols, wide, SUB, GATE)
                high, low = split(g, EXACT)
                if SCORES:
                    start = block_level(g, C, LEVELS, dtype == tl.bfloat16)
                    for level in range(start - 1, LEVELS):
                        step = step_number(level, start)
                        x = sums(chosen(select_ptr, step, 0, C), high, low, EXACT)
                        kx = tl.trans((k * tl.exp2(tl.where(level < start, -x, x))).to(dtype))
                        x = tl.exp2(x)
                        pairs = chosen(select_ptr, step, 2, C).to(tl.float32)
                        P += pairs * tl.dot((q * x).to(dtype), kx, input_precision="ieee")
                        if UNTIED:
                            x = tl.exp2(sums(chosen(select_ptr, step, 1, C), high, low, EXACT))
                        T_ += pairs * tl.dot((e * x).to(dtype), kx, input_precision="ieee")
                seen = tl.exp2(sums(chosen(select_ptr, 9, 0, C), high, low, EXACT))
                tl.store(read_ptr + out, (q * seen).to(dtype), mask=fits)
                if UNTIED:
                    seen = tl.exp2(sums(chosen(select_ptr, 9, 1, C), high, low, EXACT))
                tl.store(erase_ptr + out, (e * seen).to(dtype), mask=fits)
                left = tl.exp2(sums(chosen(select_ptr, 9, 2, C), high, low, EXACT))
                tl.store(write_ptr + out, (k * left).to(dtype), mask=fits)
                tl.store(fade_ptr + slot * K + cols, tl.exp2(tl.sum(g, 0)), mask=within(cols, K, BK))
    tl.store(rows_ptr + 4 * C, r_k)
    tl.store(rows_ptr + 5 * C, r_q)
    beta = tl.zeros([C], dtype=tl.float32) + 1.0
    if not (UNTIED or ERASE):
        beta = tl.load(tile_at(beta_ptr, s0, h, H, 1, r, 0), mask=valid, other=0.0).to(tl.float32)
    tl.store(rows_ptr + 3 * C, beta)
    if SCORES:
        A = inverse(tl.where(lower, T_ * beta[:, None], 0.0), select_ptr, C, LEVELS, EXACT)
        dtype = matrices_ptr.dtype.element_ty
        matrices_ptr += slot * ((2 if W else 3) * C * C) + (r[:, None] * C + r[None, :])
        tl.store(matrices_ptr, A.to(dtype))
        tl.store(matrices_ptr + C * C, tl.where(r[:, None] >= r[None, :], P, 0.0).to(dtype))
        if not W:
            tl.store(matrices_ptr + 2 * C * C, (A * beta[None, :]).to(dtype))


@triton.jit
def sequence(n, cu_ptr, first_ptr, T, CT, PACKED: tl.constexpr):
    """First token of a sequence, the one after its last, and its first chunk."""
    if PACKED:
        return tl.load(cu_ptr + n), tl.load(cu_ptr + n + 1), tl.load(first_ptr + n)
    else:
        return n * T, (n + 1) * T, n * tl.cdiv(T, CT)


@triton.jit
def key_tile(
    ptr, slot, start, head, heads, row, mask, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr
):
    """Tile ``[C, BK]``: rows of a tensor ``[rows, heads, K]``, or, VECTOR, what ``local_kernel`` wrote out."""
    cols = tl.arange(0, BK)[None, :]
    wide = within(cols, K, BK)
    if VECTOR:
        at = ptr + slot * C * K + (tl.arange(0, C)[:, None] * K + cols)
        return tl.load(at, mask=tl.full([C, 1], True, tl.int1) & wide, other=0.0)
    else:
        return tl.load(tile_at(ptr, start, head, heads, K, row[:, None], cols), mask=mask[:, None] & wide, other=0.0)


@triton.jit
def factors(rows_ptr, chunk, n_chunks, h, H, C: tl.constexpr, VECTOR: tl.constexpr, GATE: tl.constexpr):
    """What a serial pass fetches a chunk ahead by hand: the compiler does so only for what enters a product."""
    slot = chunk.to(tl.int64) * H + h
    fade, read = 1.0, tl.zeros([C], dtype=tl.float32)
    if not VECTOR:
        if GATE != 0:
            fade = tl.load(rows_ptr + slot * (8 * C) + 7 * C, mask=n_chunks > 0, other=1.0)
        read = tl.load(rows_ptr + slot * (8 * C) + 2 * C + tl.arange(0, C), mask=n_chunks > 0, other=0.0)
    return fade, read


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def state_kernel(
    erase_ptr,  # k, k and q themselves, or the operands written out by local_kernel
    write_ptr,
    read_ptr,
    v_ptr,
    w_ptr,
    rows_ptr,
    fade_ptr,
    matrices_ptr,
    start_ptr,  # [N, H, K, V]
    last_ptr,
    o_ptr,
    S_ptr,  # KEEP: the state that enters each chunk, [chunks, H, V, K], and R^T, [chunks, H, V, C]
    R_ptr,
    cu_ptr,
    first_ptr,  # [N + 1] chunks before each sequence (PACKED)
    scale,
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    V: tl.constexpr,
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
    PACKED: tl.constexpr,
):
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    h = (pid // blocks) % H
    n = pid // (blocks * H)
    hq = h // (H // HQ)
    first, end, chunk0 = sequence(n, cu_ptr, first_ptr, T, CT, PACKED)
    r = tl.arange(0, C)
    values = pid % blocks * BV + tl.arange(0, BV)
    has = within(values, V, BV)[:, None]
    keys = tl.arange(0, BK)
    state = keys[None, :] * V + values[:, None]
    inside = has & within(keys, K, BK)[None, :]
    S = tl.load(start_ptr + (n.to(tl.int64) * H + h) * K * V + state, mask=inside, other=0.0)

    n_chunks = tl.cdiv(end - first, CT)
    fade, read = factors(rows_ptr, chunk0, n_chunks, h, H, C, VECTOR, GATE)
    for it in range(0, n_chunks):
        t0 = first + it * CT
        slot = (chunk0 + it).to(tl.int64) * H + h
        ahead = tl.minimum(it + 1, n_chunks - 1)
        next_fade, next_read = factors(rows_ptr, chunk0 + ahead, n_chunks, h, H, C, VECTOR, GATE)
        valid = r < tl.minimum(end - t0, CT) * SUB
        reads = valid & (r % SUB == SUB - 1)
        s0 = t0.to(tl.int64) * SUB
        tile = r[:, None] * C + r[None, :]
        rows = rows_ptr + slot * (8 * C) + r

        if KEEP:
            at = S_ptr + slot * K * V + (values[:, None] * K + keys[None, :])
            tl.store(at, S.to(S_ptr.dtype.element_ty), mask=inside)
        k = key_tile(write_ptr, slot, s0, hq, HQ, r, valid, K, C, BK, VECTOR)
        if VECTOR:
            e = key_tile(erase_ptr, slot, s0, hq, HQ, r, valid, K, C, BK, VECTOR)
        else:
            e = k
        Sb = S.to(k.dtype)
        X = tl.dot(Sb, tl.trans(e), input_precision="ieee")
        if not VECTOR:
            X = X * tl.load(rows)[None, :]
        if W:
            at = tile_at(v_ptr, s0, h, H, V, r[None, :], values[:, None])
            z = tl.load(at, mask=has & valid[None, :], other=0.0).to(tl.float32)
            at = tile_at(w_ptr, s0, h, H, V, r[None, :], values[:, None])
            z = z * tl.load(at, mask=has & valid[None, :], other=0.0).to(tl.float32)
            z = z - X * tl.load(rows + 3 * C)[None, :]
            A = tl.load(matrices_ptr + slot * (2 * C * C) + tile)
            R = tl.dot(z.to(k.dtype), tl.trans(A), input_precision="ieee")
        else:  # beta is in the matrix, so that v goes to the tensor cores as it lies in memory
            v = payload(v_ptr, t0, h, H, V, r, values, valid, has, SUB, UNTIED)
            A = tl.load(matrices_ptr + slot * (3 * C * C) + 2 * C * C + tile)
            R = tl.dot(tl.trans(v), tl.trans(A), input_precision="ieee")
            R = tl.dot((-X).to(k.dtype), tl.trans(A), R, input_precision="ieee")
        Rb = R.to(k.dtype)
        if KEEP:
            at = R_ptr + slot * C * V + (values[:, None] * C + r[None, :])
            tl.store(at, Rb, mask=has & tl.full([1, C], True, tl.int1))
        if OUTPUT:
            q = key_tile(read_ptr, slot, t0, hq, HQ, r // SUB, reads, K, C, BK, VECTOR)
            o = tl.dot(Sb, tl.trans(q), input_precision="ieee")
            if not VECTOR:
                o = o * read[None, :]
            P = tl.load(matrices_ptr + slot * ((2 if W else 3) * C * C) + C * C + tile)
            o = tl.dot(Rb, tl.trans(P), o, input_precision="ieee")
            at = tile_at(o_ptr, t0, h, H, V, (r // SUB)[None, :], values[:, None])
            tl.store(at, o.to(o_ptr.dtype.element_ty), mask=has & reads[None, :])
        if not VECTOR:
            Rb = (R * tl.load(rows + C)[None, :]).to(k.dtype)
        if GATE != 0:
            if VECTOR:
                S = S * tl.load(fade_ptr + slot * K + keys, mask=within(keys, K, BK), other=0.0)[None, :]
            else:
                S = S * fade
        S = tl.dot(Rb, k, S, input_precision="ieee")
        fade, read = next_fade, next_read

    if LAST:
        tl.store(last_ptr + (n.to(tl.int64) * H + h) * K * V + state, S, mask=inside)
