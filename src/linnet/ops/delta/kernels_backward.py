"""Triton kernels of the delta engine's backward pass.

With ``R`` and the entering states recomputed by ``state_kernel`` and ``dS`` the gradient of a chunk's leaving state,
the triangular solve has the adjoint

    dR = P^T dO + (exp(G_C - G) K) dS          L = A^T dR          dZ = L          dT = -tril(L R^T, -1)

so that ``adjoint_kernel`` walks the chunks backward with ``dS`` on chip and leaves ``dS`` and ``L`` of every chunk to
``gradient_kernel``, which makes the gradients of all inputs of all chunks in parallel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    _span,
    after,
    between,
    block_level,
    channel_gates,
    chosen,
    erase_keys,
    factors,
    key_tile,
    payload_at,
    row_gates,
    sequence,
    split,
    step_number,
    sums,
    tile_at,
    within,
    write_keys,
)


RESET = tl.constexpr(-115.0)  # log2-decays below it were cut: a reset passes no gradient


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def adjoint_kernel(
    erase_ptr,
    write_ptr,
    read_ptr,
    rows_ptr,
    fade_ptr,
    matrices_ptr,
    do_ptr,
    last_ptr,  # gradient of the final state, [N, H, K, V]
    start_ptr,  # gradient of the initial state
    dS_ptr,  # [chunks, H, V, K]
    L_ptr,  # L^T, [chunks, H, V, C]
    cu_ptr,
    first_ptr,
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
    MATRICES: tl.constexpr,
    VECTOR: tl.constexpr,
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
    dS = tl.load(last_ptr + (n.to(tl.int64) * H + h) * K * V + state, mask=inside, other=0.0)

    n_chunks = tl.cdiv(end - first, CT)
    fade, read = factors(rows_ptr, chunk0 + n_chunks - 1, n_chunks, h, H, C, VECTOR, GATE)
    for it in range(0, n_chunks):
        c = n_chunks - 1 - it
        ahead = chunk0 + tl.maximum(c - 1, 0)
        next_fade, next_read = factors(rows_ptr, ahead, n_chunks, h, H, C, VECTOR, GATE)
        t0 = first + c * CT
        slot = (chunk0 + c).to(tl.int64) * H + h
        valid = r < tl.minimum(end - t0, CT) * SUB
        reads = valid & (r % SUB == SUB - 1)
        s0 = t0.to(tl.int64) * SUB
        tile = r[:, None] * C + r[None, :]
        rows = rows_ptr + slot * (8 * C) + r

        at = dS_ptr + slot * K * V + (values[:, None] * K + keys[None, :])
        tl.store(at, dS.to(dS_ptr.dtype.element_ty), mask=inside)
        k = key_tile(write_ptr, slot, s0, hq, HQ, r, valid, K, C, BK, VECTOR)
        dR = tl.dot(dS.to(k.dtype), tl.trans(k), input_precision="ieee")
        if not VECTOR:
            dR = dR * tl.load(rows + C)[None, :]
        at = tile_at(do_ptr, t0, h, H, V, (r // SUB)[:, None], values[None, :])
        do = tl.trans(tl.load(at, mask=tl.trans(has) & reads[:, None], other=0.0))
        P = tl.load(matrices_ptr + slot * (MATRICES * C * C) + C * C + tile)
        dR = tl.dot(do, P, dR, input_precision="ieee")
        A = tl.load(matrices_ptr + slot * (MATRICES * C * C) + tile)
        L = tl.dot(dR.to(k.dtype), A, input_precision="ieee")
        Lb = L.to(k.dtype)
        at = L_ptr + slot * C * V + (values[:, None] * C + r[None, :])
        tl.store(at, Lb, mask=has & tl.full([1, C], True, tl.int1))
        q = key_tile(read_ptr, slot, t0, hq, HQ, r // SUB, reads, K, C, BK, VECTOR)
        if VECTOR:
            e = key_tile(erase_ptr, slot, s0, hq, HQ, r, valid, K, C, BK, VECTOR)
            Lb = (L * -tl.load(rows + 3 * C)[None, :]).to(k.dtype)
        else:
            e = k
            do = (do.to(tl.float32) * read[None, :]).to(k.dtype)
            Lb = (L * -(tl.load(rows) * tl.load(rows + 3 * C))[None, :]).to(k.dtype)
        if GATE != 0:
            if VECTOR:
                dS = dS * tl.load(fade_ptr + slot * K + keys, mask=within(keys, K, BK), other=0.0)[None, :]
            else:
                dS = dS * fade
        dS = tl.dot(do, q, dS, input_precision="ieee")
        dS = tl.dot(Lb, e, dS, input_precision="ieee")
        fade, read = next_fade, next_read

    tl.store(start_ptr + (n.to(tl.int64) * H + h) * K * V + state, dS, mask=inside)


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def pairs_kernel(
    v_ptr,
    g_ptr,
    w_ptr,
    rows_ptr,
    do_ptr,
    R_ptr,
    L_ptr,
    D1_ptr,  # gradients of P and T without their decays, but with those of scalar gates, [chunks, H, C, C]
    D2_ptr,
    lv_ptr,  # sum over V of L v, [chunks, H, C]
    dv_ptr,
    dw_ptr,
    cu_ptr,
    table_ptr,
    T,
    CT,
    H,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    slot = pid.to(tl.int64)
    t0, tokens = _span(pid // H, cu_ptr, table_ptr, T, CT, PACKED)
    r = tl.arange(0, C)
    row, col = r[:, None], r[None, :]
    valid = r < tokens * SUB
    reads = valid & (r % SUB == SUB - 1)
    s0 = t0.to(tl.int64) * SUB
    rows_ptr += slot * (8 * C) + r
    dP = tl.zeros([C, C], dtype=tl.float32)
    dT = tl.zeros([C, C], dtype=tl.float32)
    lv = tl.zeros([C], dtype=tl.float32)
    for v0 in range(0, V, BV):
        values = v0 + tl.arange(0, BV)
        has = within(values, V, BV)
        at = tile_at(do_ptr, t0, h, H, V, (r // SUB)[:, None], values[None, :])
        do = tl.load(at, mask=reads[:, None] & has[None, :], other=0.0)
        tile = slot * C * V + (values[:, None] * C + col)
        full = has[:, None] & tl.full([1, C], True, tl.int1)
        R = tl.load(R_ptr + tile, mask=full, other=0.0)
        L = tl.load(L_ptr + tile, mask=full, other=0.0)
        dP = tl.dot(do, R, dP, input_precision="ieee")
        dT = tl.dot(tl.trans(L), R, dT, input_precision="ieee")
        at, writes = payload_at(v_ptr, t0, h, H, V, r, values, valid, SUB, UNTIED)
        inside = has[:, None] & writes[None, :]
        v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        dz = L.to(tl.float32)
        at, writes = payload_at(dv_ptr, t0, h, H, V, r, values, valid, SUB, UNTIED)
        if W:
            w = tl.load(tile_at(w_ptr, s0, h, H, V, col, values[:, None]), mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (dz * w).to(dv_ptr.dtype.element_ty), mask=inside)
            at = tile_at(dw_ptr, s0, h, H, V, col, values[:, None])
            tl.store(at, (dz * v).to(dw_ptr.dtype.element_ty), mask=inside)
        else:
            beta = tl.load(rows_ptr + 3 * C)
            tl.store(at, (dz * beta[None, :]).to(dv_ptr.dtype.element_ty), mask=inside)
            lv += tl.sum(dz * v, 0)
    dP = tl.where(row >= col, dP, 0.0)
    dT = tl.where(row > col, dT, 0.0)
    if not VECTOR:
        if GATE != 0:
            g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
            kept = between(g, tl.load(rows_ptr + 6 * C), C, EXACT)
            dP, dT = dP * kept, dT * kept
    tile = slot * (C * C) + (row * C + col)
    tl.store(D1_ptr + tile, dP.to(D1_ptr.dtype.element_ty))
    tl.store(D2_ptr + tile, dT.to(D2_ptr.dtype.element_ty))
    if not W:
        tl.store(lv_ptr + slot * C + r, lv)


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def gradient_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    a_ptr,
    b_ptr,
    g_ptr,
    rows_ptr,
    do_ptr,
    S_ptr,
    R_ptr,
    dS_ptr,
    L_ptr,
    D1_ptr,
    D2_ptr,
    lv_ptr,
    dq_ptr,  # by value head, [tokens, H, K]
    dk_ptr,
    dbeta_ptr,
    da_ptr,
    db_ptr,
    dg_ptr,
    select_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BK covers all keys
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    hq = h // (H // HQ)
    slot = pid.to(tl.int64)
    t0, tokens = _span(pid // H, cu_ptr, table_ptr, T, CT, PACKED)
    r = tl.arange(0, C)
    row, col = r[:, None], r[None, :]
    valid = r < tokens * SUB
    reads = valid & (r % SUB == SUB - 1)
    token = (r // SUB)[:, None]
    s0 = t0.to(tl.int64) * SUB
    rows_ptr += slot * (8 * C) + r
    R_ptr += slot * C * V
    L_ptr += slot * C * V
    S_ptr += slot * K * V
    dS_ptr += slot * K * V
    D1_own = D1_ptr + slot * (C * C) + r * (C + 1)
    D1_ptr += slot * (C * C) + (row * C + col)
    D2_ptr += slot * (C * C) + (row * C + col)
    dtype = k_ptr.dtype.element_ty
    r_k = tl.load(rows_ptr + 4 * C)
    r_q = tl.load(rows_ptr + 5 * C)
    dbeta = tl.zeros([C], dtype=tl.float32)
    read_back = tl.zeros([C], dtype=tl.float32)  # what each row has from the entering state,
    kept = tl.zeros([C], dtype=tl.float32)  # what the leaving state has from each row,
    pair = tl.zeros([C, C], dtype=tl.float32)  # and what rows have from each other: the three that gates pass
    n_q = tl.zeros([C], dtype=tl.float32)
    n_k = tl.zeros([C], dtype=tl.float32)
    ends = 0.0
    if not ERASE:
        beta = tl.load(rows_ptr + 3 * C)
        if not W:
            dbeta = tl.load(lv_ptr + slot * C + r)
    if GATE != 0:
        if not VECTOR:
            seen = tl.exp2(tl.load(rows_ptr + 6 * C))
            g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
            left = tl.exp2(after(g, r, C, EXACT))

    for k0 in range(0, K, BK):
        keys = (k0 + tl.arange(0, BK))[None, :]
        wide = within(keys, K, BK)
        dq = tl.zeros([C, BK], dtype=tl.float32)
        de = tl.zeros([C, BK], dtype=tl.float32)
        dk = tl.zeros([C, BK], dtype=tl.float32)
        end = tl.zeros([BK], dtype=tl.float32)  # through the decay of the state across the chunk
        for v0 in range(0, V, BV):
            values = v0 + tl.arange(0, BV)
            has = within(values, V, BV)
            at = tile_at(do_ptr, t0, h, H, V, token, values[None, :])
            do = tl.load(at, mask=reads[:, None] & has[None, :], other=0.0)
            full = has[:, None] & tl.full([1, C], True, tl.int1)
            R = tl.load(R_ptr + (values[:, None] * C + col), mask=full, other=0.0)
            L = tl.load(L_ptr + (values[:, None] * C + col), mask=full, other=0.0)
            S = tl.load(S_ptr + (values[:, None] * K + keys), mask=has[:, None] & wide, other=0.0)
            dS = tl.load(dS_ptr + (values[:, None] * K + keys), mask=has[:, None] & wide, other=0.0)
            dq = tl.dot(do, S, dq, input_precision="ieee")
            de = tl.dot(tl.trans(L), S, de, input_precision="ieee")
            dk = tl.dot(tl.trans(R), dS, dk, input_precision="ieee")
            if GATE != 0:
                end += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)

        k_in, q_in = valid[:, None] & wide, reads[:, None] & wide
        cols = k0 + tl.arange(0, BK)
        k = write_keys(k_ptr, b_ptr, t0, hq, HQ, K, r, valid, cols, wide, SUB, UNTIED)
        q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, keys), mask=q_in, other=0.0)
        kn, qn = k.to(tl.float32) * r_k[:, None], q.to(tl.float32) * (r_q * scale)[:, None]
        if ERASE:
            b = tl.load(tile_at(beta_ptr, s0, h, H, K, row, keys), mask=k_in, other=0.0).to(tl.float32)
        else:
            b = beta[:, None]

        if not VECTOR:
            if GATE != 0:
                dk = dk * left[:, None]
                ends += tl.sum(end, 0)
                kept += tl.sum(dk * kn, 1)
            D1, D2 = tl.load(D1_ptr), tl.load(D2_ptr)
            dk += tl.dot(tl.trans(D1), qn.to(dtype), input_precision="ieee")
            dk -= tl.dot(tl.trans(D2), (kn * b).to(dtype), input_precision="ieee")
            if GATE != 0:
                kt = tl.trans(kn.to(dtype))
                pair += D1.to(tl.float32) * tl.dot(qn.to(dtype), kt, input_precision="ieee")
                pair -= D2.to(tl.float32) * tl.dot((kn * b).to(dtype), kt, input_precision="ieee")

        if not VECTOR:
            if GATE != 0:
                de = de * seen[:, None]
                read_back -= beta * tl.sum(de * kn, 1)
            de = -tl.dot(tl.load(D2_ptr), kn.to(dtype), de, input_precision="ieee")
            dbeta += tl.sum(de * kn, 1)
            dk += de * b

        if not VECTOR:
            if GATE != 0:
                dq = dq * seen[:, None]
                read_back += tl.sum(dq * qn, 1)
            dq += tl.dot(tl.load(D1_ptr), kn.to(dtype), input_precision="ieee")
        else:
            if UNTIED:
                e = erase_keys(a_ptr, t0, h, H, K, r, valid, cols, wide)
            else:
                e = kn * b
            if GATE == 0:
                D1, D2 = tl.load(D1_ptr), tl.load(D2_ptr)
                dq = tl.dot(D1, kn.to(dtype), dq, input_precision="ieee")
                de = -tl.dot(D2, kn.to(dtype), de, input_precision="ieee")
                dk += tl.dot(tl.trans(D1), qn.to(dtype), input_precision="ieee")
                dk -= tl.dot(tl.trans(D2), e.to(dtype), input_precision="ieee")
            else:
                g = channel_gates(g_ptr, t0, h, H, K, r, valid, cols, wide, SUB, GATE)
                high, low = split(g, EXACT)
                x = tl.exp2(sums(chosen(select_ptr, 9, 0, C), high, low, EXACT))
                dq = dq * x
                if UNTIED:
                    x = tl.exp2(sums(chosen(select_ptr, 9, 1, C), high, low, EXACT))
                de = -de * x
                x = tl.exp2(sums(chosen(select_ptr, 9, 2, C), high, low, EXACT))
                tail = dk * x
                dk = tl.zeros([C, BK], dtype=tl.float32)
                start = block_level(g, C, LEVELS, dtype == tl.bfloat16)
                for level in range(start - 1, LEVELS):
                    step = step_number(level, start)
                    pairs = tl.where(row // SUB == col // SUB, 0.0, chosen(select_ptr, step, 2, C).to(dtype))
                    D1, D2 = tl.load(D1_ptr) * pairs, tl.load(D2_ptr) * pairs
                    x = sums(chosen(select_ptr, step, 0, C), high, low, EXACT)
                    xk = tl.exp2(tl.where(level < start, -x, x))
                    x = tl.exp2(x)
                    xe = x
                    if UNTIED:
                        xe = tl.exp2(sums(chosen(select_ptr, step, 1, C), high, low, EXACT))
                    kx = (kn * xk).to(dtype)
                    dq += x * tl.dot(D1, kx, input_precision="ieee")
                    de -= xe * tl.dot(D2, kx, input_precision="ieee")
                    both = tl.dot(tl.trans(D1), (qn * x).to(dtype), input_precision="ieee")
                    both -= tl.dot(tl.trans(D2), (e * xe).to(dtype), input_precision="ieee")
                    dk += xk * both
                if UNTIED:
                    passed, rest = split(e * de, EXACT)
                    dg = sums(chosen(select_ptr, 9, 2, C), passed, rest, EXACT)
                    passed, rest = split(qn * dq - kn * dk, EXACT)
                    dg += sums(tl.trans(chosen(select_ptr, 9, 0, C)), passed, rest, EXACT)
                else:
                    passed, rest = split(qn * dq + e * de - kn * dk, EXACT)
                    dg = sums(tl.trans(chosen(select_ptr, 9, 0, C)), passed, rest, EXACT)
                passed, rest = split(tail * kn, EXACT)
                dg += sums(chosen(select_ptr, 9, 1, C), passed, rest, EXACT) + (end * tl.exp2(tl.sum(g, 0)))[None, :]
                dg = tl.where(g < RESET, 0.0, dg)
                if GATE == 2:
                    at = tile_at(dg_ptr, t0, h, H, K, token, keys)
                    tl.store(at, dg.to(dg_ptr.dtype.element_ty), mask=k_in & (row % SUB == 0))
                else:
                    read_back += tl.sum(tl.where(wide, dg, 0.0), 1)
                dk += tail
                if SUB == 1:  # the pairs of a token with itself: no gate lies between them
                    own = tl.load(D1_own).to(tl.float32)[:, None]
                    dq += own * kn
                    dk += own * qn
                else:
                    pairs = tl.where(row // SUB == col // SUB, 1.0, 0.0).to(dtype)
                    D1, D2 = tl.load(D1_ptr) * pairs, tl.load(D2_ptr) * pairs
                    dq += tl.dot(D1, kn.to(dtype), input_precision="ieee")
                    de -= tl.dot(D2, kn.to(dtype), input_precision="ieee")
                    both = tl.dot(tl.trans(D1), qn.to(dtype), input_precision="ieee")
                    both -= tl.dot(tl.trans(D2), e.to(dtype), input_precision="ieee")
                    dk += both
            if UNTIED:
                at = tile_at(da_ptr, t0, h, H, K, token, keys)
                tl.store(at, (-de).to(dtype), mask=k_in & (row % SUB == 0))
            elif ERASE:
                at = tile_at(dbeta_ptr, s0, h, H, K, row, keys)
                tl.store(at, (de * kn).to(dbeta_ptr.dtype.element_ty), mask=k_in)
            else:
                dbeta += tl.sum(de * kn, 1)
            if not UNTIED:
                dk += de * b

        dq = dq * scale
        if NORM:
            qn = q.to(tl.float32) * r_q[:, None]
            n_q += tl.sum(dq * qn, 1)
            n_k += tl.sum(dk * kn, 1)
            if WHOLE:
                dq = (dq - qn * n_q[:, None]) * r_q[:, None]
                dk = (dk - kn * n_k[:, None]) * r_k[:, None]
        tl.store(tile_at(dq_ptr, t0, h, H, K, token, keys), dq.to(dtype), mask=q_in)
        if UNTIED:
            tl.store(tile_at(dk_ptr, t0, h, H, K, token, keys), dk.to(dtype), mask=q_in)
            tl.store(tile_at(db_ptr, t0, h, H, K, token, keys), dk.to(dtype), mask=k_in & (row % SUB == 0))
        else:
            tl.store(tile_at(dk_ptr, s0, h, H, K, row, keys), dk.to(dtype), mask=k_in)

    if NORM and not WHOLE:  # the norm's adjoint needs the sums over all keys
        tl.debug_barrier()
        for k0 in range(0, K, BK):
            keys = (k0 + tl.arange(0, BK))[None, :]
            k_in, q_in = valid[:, None] & within(keys, K, BK), reads[:, None] & within(keys, K, BK)
            k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, row, keys), mask=k_in, other=0.0)
            q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, keys), mask=q_in, other=0.0)
            at = tile_at(dq_ptr, t0, h, H, K, token, keys)
            dq = tl.load(at, mask=q_in, other=0.0).to(tl.float32)
            dq = (dq - q.to(tl.float32) * (r_q * n_q)[:, None]) * r_q[:, None]
            tl.store(at, dq.to(dtype), mask=q_in)
            at = tile_at(dk_ptr, s0, h, H, K, row, keys)
            dk = tl.load(at, mask=k_in, other=0.0).to(tl.float32)
            dk = (dk - k.to(tl.float32) * (r_k * n_k)[:, None]) * r_k[:, None]
            tl.store(at, dk.to(dtype), mask=k_in)

    if not (ERASE or UNTIED):
        tl.store(tile_at(dbeta_ptr, s0, h, H, 1, r, 0), dbeta.to(dbeta_ptr.dtype.element_ty), mask=valid)
    if GATE == 1:
        at = tile_at(dg_ptr, t0, h, H, 1, r // SUB, 0)
        first = valid & (r % SUB == 0)
        if VECTOR:
            dg = read_back
        else:  # a gate passes what rows from it on have from rows before it, and from the state
            before = tl.cumsum(pair, 1) - pair
            dg = tl.sum(tl.where(row >= col, before + read_back[:, None], 0.0), 0)
            dg += tl.sum(tl.where(row > col, kept[None, :], 0.0), 1) + ends * tl.load(rows_ptr + 7 * C)
            dg = tl.where(row_gates(g_ptr, t0, h, H, r, valid, SUB) < RESET, 0.0, dg)
        tl.store(at, dg.to(dg_ptr.dtype.element_ty), mask=first)
