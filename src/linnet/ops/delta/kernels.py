"""Triton kernels of the delta engine: what is local to a chunk, and the serial pass over the chunks.

With ``S0`` the state that enters a chunk of ``C`` rows and ``G`` the log-decays summed from its first row on, the
recurrence ``S_t = (I - k_t e_t^T) D_t S_{t-1} + k_t z_t^T`` reads

    T[r, s] = sum_c e_r[c] k_s[c] exp(G_r[c] - G_s[c]),  s < r          P likewise from q, s <= r, times scale
    R = (I + T)^-1 (Z - (exp(G) E) S0)                                  what each row writes under its key
    O = scale (exp(G) Q) S0 + P R                                       S1 = exp(G_C) S0 + (exp(G_C - G) K)^T R

``local_kernel`` makes ``A = (I + T)^-1`` and ``P`` of every chunk in parallel, ``state_kernel`` walks the chunks with
the state on chip, transposed: ``S^T`` and everything it is multiplied into stay in registers as the left operands of
the tensor cores, and the right operands are tiles as they lie in memory.

A decay that is the same for all channels of a key scales rows, so the pass reads q and k themselves, with five numbers
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
def _inverse(T, N: tl.constexpr, B: tl.constexpr):
    """``(I + T)^-1`` of ``N`` strictly lower triangular blocks ``[N, B, B]`` in fp32, from the inverses of halves."""
    if B == 1:
        return T * 0.0 + 1.0
    else:
        half: tl.constexpr = B // 2
        side = tl.arange(0, 2)
        blocks = tl.reshape(T, [N, 2, half, 2, half])
        row, col = side[None, :, None, None, None], side[None, None, None, :, None]
        corner = tl.sum(tl.sum(tl.where((row == 1) & (col == 0), blocks, 0.0), 3), 1)
        diagonal = tl.reshape(tl.sum(tl.where(row == col, blocks, 0.0), 3), [2 * N, half, half])
        X = tl.reshape(_inverse(diagonal, 2 * N, half), [N, 2, half, half])
        upper = tl.sum(tl.where(side[None, :, None, None] == 0, X, 0.0), 1)
        lower = tl.sum(tl.where(side[None, :, None, None] == 1, X, 0.0), 1)
        if half < 16:
            corner = tl.sum(corner[:, :, :, None] * upper[:, None, :, :], 2)
            corner = tl.sum(lower[:, :, :, None] * corner[:, None, :, :], 2)
        else:
            corner = tl.dot(corner, upper, input_precision="ieee")
            corner = tl.dot(lower, corner, input_precision="ieee")
        below = tl.where(row > col, -corner[:, None, :, None, :], 0.0)
        return tl.reshape(tl.where(row == col, X[:, :, :, None, :], below), [N, B, B])


@triton.jit
def row_gates(g_ptr, t0, h, H, r, valid, SUB: tl.constexpr):
    """log2-decay of each row; the substeps of a token share the one before its first."""
    at = (t0 + r // SUB).to(tl.int64) * H + h
    g = tl.load(g_ptr + at, mask=valid & (r % SUB == 0), other=0.0).to(tl.float32)
    return tl.maximum(g, -80.0) * 1.4426950408889634


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
def channel_gates(g_ptr, t0, h, H, K, r, valid, cols, SUB: tl.constexpr, GATE: tl.constexpr):
    """log2-decay of each row and channel."""
    at = (t0 + r // SUB).to(tl.int64) * H + h
    mask = (valid & (r % SUB == 0))[:, None] & (cols < K)[None, :]
    if GATE == 2:
        g = tl.load(g_ptr + at[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(g_ptr + at[:, None] + cols[None, :] * 0, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(g, -80.0) * 1.4426950408889634


@triton.jit
def split(x, EXACT: tl.constexpr):
    """``x`` as two bfloat16 terms, for sums of it on the tensor cores that keep 16 bits; fp32 as it is with EXACT."""
    if EXACT:
        return x, x
    else:
        high = x.to(tl.bfloat16)
        return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def sums(selected, high, low, EXACT: tl.constexpr):
    """Sums over the rows selected, ``selected @ x``, of an ``x`` taken apart by :func:`split`."""
    if EXACT:
        return tl.dot(selected.to(tl.float32), high, input_precision="ieee")
    else:
        selected = selected.to(tl.bfloat16)
        return tl.dot(selected, high, tl.dot(selected, low))


@triton.jit
def near(level, C: tl.constexpr):
    """Rows ``i`` whose log-decays lie between a row and the middle of its block of ``2 << level`` rows, ``[row, i]``."""
    r, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    after = (r >> level) % 2 == 1
    return (r >> level == i >> level) & ((after & (i <= r)) | ((after == 0) & (i > r)))


@triton.jit
def across(level, C: tl.constexpr):
    """Pairs of a row in the second half of a block of ``2 << level`` rows and one in its first half."""
    r, s = tl.arange(0, C)[:, None] >> level, tl.arange(0, C)[None, :] >> level
    return (r == s + 1) & (s % 2 == 0)


@triton.jit
def local_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    g_ptr,
    rows_ptr,  # [chunks, H, 5, C]: summed log2-decay up to and with a row, after it, 1/|k|, 1/|q|, beta
    total_ptr,  # summed log2-decay of the chunk, [chunks, H] or, by channel, [chunks, H, K]
    A_ptr,  # [chunks, H, C, C]
    P_ptr,
    erase_ptr,  # VECTOR: exp(G) E, scale exp(G) Q and exp(G_C - G) K, [chunks, H, C, K]
    read_ptr,
    write_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    CT,
    H,
    HQ,
    K,
    C: tl.constexpr,
    LEVELS: tl.constexpr,  # log2 C
    BK: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a scalar per token, 2 one per channel
    ERASE: tl.constexpr,  # whether beta has channels
    VECTOR: tl.constexpr,
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
    q_row = ((t0 + r // SUB).to(tl.int64) * HQ + hq) * K
    line = t0.to(tl.int64) * SUB + r
    k_row = (line * HQ + hq) * K
    r_k = tl.zeros([C], dtype=tl.float32) + 1.0
    r_q = tl.zeros([C], dtype=tl.float32) + 1.0
    lower = r[:, None] > r[None, :]

    if not VECTOR:
        cols = tl.arange(0, BK)
        k = tl.load(k_ptr + k_row[:, None] + cols[None, :], mask=valid[:, None] & (cols < K)[None, :], other=0.0)
        q = tl.load(q_ptr + q_row[:, None] + cols[None, :], mask=reads[:, None] & (cols < K)[None, :], other=0.0)
        if NORM:
            r_k = tl.rsqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1) + 1e-6)
            r_q = tl.rsqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) + 1e-6)
        T_ = tl.dot(k, tl.trans(k), input_precision="ieee")
        P = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = tl.zeros([C], dtype=tl.float32)
        left = seen
        if GATE != 0:
            g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
            seen = tl.sum(tl.where(r[:, None] >= r[None, :], g[None, :], 0.0), 1)
            left = tl.sum(tl.where(r[:, None] < r[None, :], g[None, :], 0.0), 1)
            decay = between(g, seen, C, EXACT)
            T_ = T_ * decay
            P = P * decay
            tl.store(total_ptr + pid, tl.sum(g, 0))
        tl.store(rows_ptr + slot * (5 * C) + r, seen)
        tl.store(rows_ptr + slot * (5 * C) + C + r, left)
    else:
        T_ = tl.zeros([C, C], dtype=tl.float32)
        P = tl.zeros([C, C], dtype=tl.float32)
        own = tl.zeros([C], dtype=tl.float32)
        if NORM:
            k2, q2 = tl.zeros([C], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
            for k0 in range(0, K, BK):
                cols = k0 + tl.arange(0, BK)
                k = tl.load(k_ptr + k_row[:, None] + cols, mask=valid[:, None] & (cols < K)[None, :], other=0.0)
                q = tl.load(q_ptr + q_row[:, None] + cols, mask=reads[:, None] & (cols < K)[None, :], other=0.0)
                k2 += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
                q2 += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
            r_k, r_q = tl.rsqrt(k2 + 1e-6), tl.rsqrt(q2 + 1e-6)
        for k0 in range(0, K, BK):
            cols = k0 + tl.arange(0, BK)
            inside = valid[:, None] & (cols < K)[None, :]
            k = tl.load(k_ptr + k_row[:, None] + cols[None, :], mask=inside, other=0.0)
            q = tl.load(q_ptr + q_row[:, None] + cols[None, :], mask=reads[:, None] & (cols < K)[None, :], other=0.0)
            dtype = k.dtype
            k, q = k.to(tl.float32) * r_k[:, None], q.to(tl.float32) * (r_q * scale)[:, None]
            if ERASE:
                e = k * tl.load(beta_ptr + (line * H + h)[:, None] * K + cols[None, :], mask=inside, other=0.0)
            else:
                e = k * tl.load(beta_ptr + line * H + h, mask=valid, other=0.0).to(tl.float32)[:, None]
            out = slot * C * K + r[:, None] * K + cols[None, :]
            fits = (r[:, None] >= 0) & (cols < K)[None, :]
            if GATE == 0:
                if SCORES:
                    T_ += tl.dot(e.to(dtype), tl.trans(k.to(dtype)), input_precision="ieee")
                    P += tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision="ieee")
                tl.store(erase_ptr + out, e.to(dtype), mask=fits)
                tl.store(read_ptr + out, q.to(dtype), mask=fits)
                tl.store(write_ptr + out, k.to(dtype), mask=fits)
            else:
                g = channel_gates(g_ptr, t0, h, H, K, r, valid, cols, SUB, GATE)
                high, low = split(g, EXACT)
                if SCORES:
                    own += tl.sum(q * k, 1)
                    for level in range(0, LEVELS):
                        x = tl.exp2(sums(near(level, C), high, low, EXACT))
                        kx = tl.trans((k * x).to(dtype))
                        pairs = across(level, C)
                        T_ += tl.where(pairs, tl.dot((e * x).to(dtype), kx, input_precision="ieee"), 0.0)
                        P += tl.where(pairs, tl.dot((q * x).to(dtype), kx, input_precision="ieee"), 0.0)
                seen = tl.exp2(sums(r[:, None] >= r[None, :], high, low, EXACT))
                tl.store(erase_ptr + out, (e * seen).to(dtype), mask=fits)
                tl.store(read_ptr + out, (q * seen).to(dtype), mask=fits)
                left = tl.exp2(sums(r[:, None] < r[None, :], high, low, EXACT))
                tl.store(write_ptr + out, (k * left).to(dtype), mask=fits)
                tl.store(total_ptr + slot * K + cols, tl.sum(g, 0), mask=cols < K)
        if GATE != 0:
            P += tl.where(r[:, None] == r[None, :], own[:, None], 0.0)

    tl.store(rows_ptr + slot * (5 * C) + 2 * C + r, r_k)
    tl.store(rows_ptr + slot * (5 * C) + 3 * C + r, r_q)
    if not ERASE:
        beta = tl.load(beta_ptr + line * H + h, mask=valid, other=0.0).to(tl.float32)
        tl.store(rows_ptr + slot * (5 * C) + 4 * C + r, beta)
        if not VECTOR:
            T_ = T_ * (beta * r_k)[:, None] * r_k[None, :]
            P = P * (r_q * scale)[:, None] * r_k[None, :]
    if SCORES:
        A = tl.reshape(_inverse(tl.reshape(tl.where(lower, T_, 0.0), [1, C, C]), 1, C), [C, C])
        tile = slot * (C * C) + r[:, None] * C + r[None, :]
        tl.store(A_ptr + tile, A.to(A_ptr.dtype.element_ty))
        tl.store(P_ptr + tile, tl.where(r[:, None] >= r[None, :], P, 0.0).to(P_ptr.dtype.element_ty))


@triton.jit
def sequence(n, cu_ptr, first_ptr, T, CT, PACKED: tl.constexpr):
    """First token of a sequence, the one after its last, and its first chunk."""
    if PACKED:
        return tl.load(cu_ptr + n), tl.load(cu_ptr + n + 1), tl.load(first_ptr + n)
    else:
        return n * T, (n + 1) * T, n * tl.cdiv(T, CT)


@triton.jit
def key_tile(ptr, slot, row, K, mask, C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr):
    """Tile ``[C, BK]``: of a tensor at rows ``row``, or, VECTOR, one written out by ``local_kernel``."""
    cols = tl.arange(0, BK)
    if VECTOR:
        at = ptr + slot * C * K + (tl.arange(0, C)[:, None] * K + cols[None, :])
        if FULL:
            return tl.load(at)
        else:
            return tl.load(at, mask=(tl.arange(0, C)[:, None] >= 0) & (cols < K)[None, :], other=0.0)
    else:
        at = ptr + row[:, None] + cols[None, :]
        if FULL:
            return tl.load(at, mask=mask[:, None], other=0.0)
        else:
            return tl.load(at, mask=mask[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit
def state_kernel(
    erase_ptr,  # k, k and q themselves, or the operands written out by local_kernel
    write_ptr,
    read_ptr,
    v_ptr,
    w_ptr,
    rows_ptr,
    total_ptr,
    A_ptr,
    P_ptr,
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
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    OUTPUT: tl.constexpr,
    KEEP: tl.constexpr,
    LAST: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
):
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    h = (pid // blocks) % H
    n = pid // (blocks * H)
    hq = h // (H // HQ)
    first, end, chunk0 = sequence(n, cu_ptr, first_ptr, T, CT, PACKED)
    r = tl.arange(0, C)
    values = pid % blocks * BV + tl.arange(0, BV)
    has = (values < V)[:, None]
    keys = tl.arange(0, BK)
    state = (n.to(tl.int64) * H + h) * K * V + keys[None, :] * V + values[:, None]
    inside = has & (keys < K)[None, :]
    S = tl.load(start_ptr + state, mask=inside, other=0.0)

    for it in range(0, tl.cdiv(end - first, CT)):
        t0 = first + it * CT
        slot = (chunk0 + it).to(tl.int64) * H + h
        valid = r < tl.minimum(end - t0, CT) * SUB
        reads = valid & (r % SUB == SUB - 1)
        line = t0.to(tl.int64) * SUB + r
        k_row = (line * HQ + hq) * K
        tile = slot * (C * C) + r[:, None] * C + r[None, :]

        if KEEP:
            tl.store(S_ptr + slot * K * V + values[:, None] * K + keys[None, :], S.to(S_ptr.dtype.element_ty), inside)
        k = key_tile(write_ptr, slot, k_row, K, valid, C, BK, VECTOR, FULL)
        if VECTOR:
            e = key_tile(erase_ptr, slot, k_row, K, valid, C, BK, VECTOR, FULL)
        else:
            e = k
        Sb = S.to(k.dtype)
        X = tl.dot(Sb, tl.trans(e), input_precision="ieee")
        z = tl.load(v_ptr + ((line * H + h) * V)[None, :] + values[:, None], mask=has & valid[None, :], other=0.0)
        z = z.to(tl.float32)
        if W:
            w = tl.load(w_ptr + ((line * H + h) * V)[None, :] + values[:, None], mask=has & valid[None, :], other=0.0)
            z = z * w.to(tl.float32)
        else:
            beta = tl.load(rows_ptr + slot * (5 * C) + 4 * C + r)
            z = z * beta[None, :]
        if VECTOR:
            z = z - X
        else:
            r_k = tl.load(rows_ptr + slot * (5 * C) + 2 * C + r)
            kept = r_k
            if W:
                beta = tl.load(rows_ptr + slot * (5 * C) + 4 * C + r)
            if GATE != 0:
                kept = r_k * tl.exp2(tl.load(rows_ptr + slot * (5 * C) + r))
            z = z - X * (beta * kept)[None, :]
        A = tl.load(A_ptr + tile)
        R = tl.dot(z.to(k.dtype), tl.trans(A), input_precision="ieee")
        Rb = R.to(k.dtype)
        if KEEP:
            tl.store(R_ptr + slot * C * V + values[:, None] * C + r[None, :], Rb, mask=has & (r >= 0)[None, :])
        if OUTPUT:
            q_row = ((t0 + r // SUB).to(tl.int64) * HQ + hq) * K
            q = key_tile(read_ptr, slot, q_row, K, reads, C, BK, VECTOR, FULL)
            o = tl.dot(Sb, tl.trans(q), input_precision="ieee")
            if not VECTOR:
                seen = tl.load(rows_ptr + slot * (5 * C) + 3 * C + r) * scale
                if GATE != 0:
                    seen = seen * tl.exp2(tl.load(rows_ptr + slot * (5 * C) + r))
                o = o * seen[None, :]
            P = tl.load(P_ptr + tile)
            o = tl.dot(Rb, tl.trans(P), o, input_precision="ieee")
            at = o_ptr + (((t0 + r // SUB).to(tl.int64) * H + h) * V)[None, :] + values[:, None]
            tl.store(at, o.to(o_ptr.dtype.element_ty), mask=has & reads[None, :])
        if VECTOR:
            if GATE != 0:
                S = S * tl.exp2(tl.load(total_ptr + slot * K + keys, mask=keys < K, other=0.0))[None, :]
        else:
            if GATE != 0:
                S = S * tl.exp2(tl.load(total_ptr + slot))
                r_k = r_k * tl.exp2(tl.load(rows_ptr + slot * (5 * C) + C + r))
            Rb = (R * r_k[None, :]).to(k.dtype)
        S = tl.dot(Rb, k, S, input_precision="ieee")

    if LAST:
        tl.store(last_ptr + state, S, mask=inside)
