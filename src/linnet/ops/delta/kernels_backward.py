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
    across,
    between,
    channel_gates,
    factors,
    key_tile,
    near,
    row_gates,
    sequence,
    split,
    sums,
    tile_at,
)


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def adjoint_kernel(
    erase_ptr,
    write_ptr,
    read_ptr,
    rows_ptr,
    fade_ptr,
    A_ptr,
    P_ptr,
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
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    VECTOR: tl.constexpr,
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
    state = keys[None, :] * V + values[:, None]
    inside = has & (keys < K)[None, :]
    dS = tl.load(last_ptr + (n.to(tl.int64) * H + h) * K * V + state, mask=inside, other=0.0)

    n_chunks = tl.cdiv(end - first, CT)
    fade, read = factors(rows_ptr, fade_ptr, chunk0 + n_chunks - 1, n_chunks, h, H, C, VECTOR, GATE)
    for it in range(0, n_chunks):
        c = n_chunks - 1 - it
        ahead = chunk0 + tl.maximum(c - 1, 0)
        next_fade, next_read = factors(rows_ptr, fade_ptr, ahead, n_chunks, h, H, C, VECTOR, GATE)
        t0 = first + c * CT
        slot = (chunk0 + c).to(tl.int64) * H + h
        valid = r < tl.minimum(end - t0, CT) * SUB
        reads = valid & (r % SUB == SUB - 1)
        s0 = t0.to(tl.int64) * SUB
        tile = r[:, None] * C + r[None, :]
        rows = rows_ptr + slot * (7 * C) + r

        at = dS_ptr + slot * K * V + (values[:, None] * K + keys[None, :])
        tl.store(at, dS.to(dS_ptr.dtype.element_ty), mask=inside)
        k = key_tile(write_ptr, slot, s0, hq, HQ, K, r, valid, C, BK, VECTOR, FULL)
        dR = tl.dot(dS.to(k.dtype), tl.trans(k), input_precision="ieee")
        if not VECTOR:
            dR = dR * tl.load(rows + C)[None, :]
        at = tile_at(do_ptr, t0, h, H, V, (r // SUB)[None, :], values[:, None])
        do = tl.load(at, mask=has & reads[None, :], other=0.0)
        P = tl.load(P_ptr + slot * (C * C) + tile)
        dR = tl.dot(do, P, dR, input_precision="ieee")
        A = tl.load(A_ptr + slot * (C * C) + tile)
        L = tl.dot(dR.to(k.dtype), A, input_precision="ieee")
        Lb = L.to(k.dtype)
        at = L_ptr + slot * C * V + (values[:, None] * C + r[None, :])
        tl.store(at, Lb, mask=has & (r >= 0)[None, :])
        q = key_tile(read_ptr, slot, t0, hq, HQ, K, r // SUB, reads, C, BK, VECTOR, FULL)
        if VECTOR:
            e = key_tile(erase_ptr, slot, s0, hq, HQ, K, r, valid, C, BK, VECTOR, FULL)
            Lb = (-L).to(k.dtype)
        else:
            e = k
            do = (do.to(tl.float32) * read[None, :]).to(k.dtype)
            Lb = (L * -tl.load(rows)[None, :]).to(k.dtype)
        if GATE != 0:
            if VECTOR:
                dS = dS * tl.load(fade_ptr + slot * K + keys, mask=keys < K, other=0.0)[None, :]
            else:
                dS = dS * fade
        dS = tl.dot(do, q, dS, input_precision="ieee")
        dS = tl.dot(Lb, e, dS, input_precision="ieee")
        fade, read = next_fade, next_read

    tl.store(start_ptr + (n.to(tl.int64) * H + h) * K * V + state, dS, mask=inside)


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    g_ptr,
    w_ptr,
    rows_ptr,
    fade_ptr,
    do_ptr,
    S_ptr,
    R_ptr,
    dS_ptr,
    L_ptr,
    dq_ptr,  # by value head, [tokens, H, K]
    dk_ptr,
    dv_ptr,
    dbeta_ptr,
    dg_ptr,
    dw_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    CT,
    H,
    HQ,
    K,
    V,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BK covers all keys
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
    token = r // SUB
    s0 = t0.to(tl.int64) * SUB
    rows_ptr += slot * (7 * C) + r
    R_ptr += slot * C * V
    L_ptr += slot * C * V
    S_ptr += slot * K * V
    dS_ptr += slot * K * V
    dtype = k_ptr.dtype.element_ty
    r_k = tl.load(rows_ptr + 4 * C)
    r_q = tl.load(rows_ptr + 5 * C)
    dbeta = tl.zeros([C], dtype=tl.float32)
    if not ERASE:
        beta = tl.load(rows_ptr + 3 * C)

    # Gradients of P and T, each with its transpose: of an accumulator that would not go to the tensor cores as it is.
    dP = tl.zeros([C, C], dtype=tl.float32)
    dPt = tl.zeros([C, C], dtype=tl.float32)
    dT = tl.zeros([C, C], dtype=tl.float32)
    dTt = tl.zeros([C, C], dtype=tl.float32)
    for v0 in range(0, V, BV):
        values = v0 + tl.arange(0, BV)
        has = values < V
        do_at = tile_at(do_ptr, t0, h, H, V, token[:, None], values[None, :])
        do = tl.load(do_at, mask=reads[:, None] & has[None, :], other=0.0)
        tile = values[:, None] * C + r[None, :]
        full = has[:, None] & (r >= 0)[None, :]
        R = tl.load(R_ptr + tile, mask=full, other=0.0)
        L = tl.load(L_ptr + tile, mask=full, other=0.0)
        dP = tl.dot(do, R, dP, input_precision="ieee")
        dPt = tl.dot(tl.trans(R), tl.trans(do), dPt, input_precision="ieee")
        dT = tl.dot(tl.trans(L), R, dT, input_precision="ieee")
        dTt = tl.dot(tl.trans(R), L, dTt, input_precision="ieee")
        row, col = r[None, :], values[:, None]
        inside = has[:, None] & valid[None, :]
        v = tl.load(tile_at(v_ptr, s0, h, H, V, row, col), mask=inside, other=0.0).to(tl.float32)
        dz = L.to(tl.float32)
        if W:
            w = tl.load(tile_at(w_ptr, s0, h, H, V, row, col), mask=inside, other=0.0).to(tl.float32)
            tl.store(tile_at(dv_ptr, s0, h, H, V, row, col), (dz * w).to(dtype), mask=inside)
            tl.store(tile_at(dw_ptr, s0, h, H, V, row, col), (dz * v).to(dw_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(tile_at(dv_ptr, s0, h, H, V, row, col), (dz * beta[None, :]).to(dtype), mask=inside)
            dbeta += tl.sum(dz * v, 0)

    row, col = r[:, None], r[None, :]
    dG = tl.zeros([C], dtype=tl.float32)
    ends = 0.0
    if VECTOR:
        own = tl.sum(tl.where(row == col, dP, 0.0), 1)
        if GATE == 0:
            dP, dPt = tl.where(row >= col, dP, 0.0), tl.where(row <= col, dPt, 0.0)
            dT, dTt = tl.where(row > col, dT, 0.0), tl.where(row < col, dTt, 0.0)
        D1, D1t, D2, D2t = dP.to(dtype), dPt.to(dtype), (-dT).to(dtype), (-dTt).to(dtype)
    else:
        dP, dPt = tl.where(row >= col, dP * scale, 0.0), tl.where(row <= col, dPt * scale, 0.0)
        dT, dTt = tl.where(row > col, -dT, 0.0), tl.where(row < col, -dTt, 0.0)
        if GATE != 0:
            g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
            sum_seen = tl.load(rows_ptr + 6 * C)
            kept = between(g, sum_seen, C, EXACT)
            dP, dT = dP * kept, dT * kept
            kept = tl.trans(kept)
            dPt, dTt = dPt * kept, dTt * kept
            seen = tl.exp2(sum_seen)
            left = tl.exp2(tl.sum(tl.where(row > col, g[:, None], 0.0), 0))
        D1, D2 = (dP * r_k[None, :]).to(dtype), (dT * r_k[None, :]).to(dtype)
        D1t, D2t = (dPt * r_q[None, :]).to(dtype), (dTt * (r_k * beta)[None, :]).to(dtype)

    n_q = tl.zeros([C], dtype=tl.float32)
    n_k = tl.zeros([C], dtype=tl.float32)
    for k0 in range(0, K, BK):
        keys = k0 + tl.arange(0, BK)
        wide = (keys < K)[None, :]
        dq = tl.zeros([C, BK], dtype=tl.float32)
        de = tl.zeros([C, BK], dtype=tl.float32)
        dk = tl.zeros([C, BK], dtype=tl.float32)
        end = tl.zeros([BK], dtype=tl.float32)
        for v0 in range(0, V, BV):
            values = v0 + tl.arange(0, BV)
            has = values < V
            do_at = tile_at(do_ptr, t0, h, H, V, token[:, None], values[None, :])
            do = tl.load(do_at, mask=reads[:, None] & has[None, :], other=0.0)
            tile = values[:, None] * C + r[None, :]
            full = has[:, None] & (r >= 0)[None, :]
            R = tl.load(R_ptr + tile, mask=full, other=0.0)
            L = tl.load(L_ptr + tile, mask=full, other=0.0)
            state = values[:, None] * K + keys[None, :]
            S = tl.load(S_ptr + state, mask=has[:, None] & wide, other=0.0)
            dS = tl.load(dS_ptr + state, mask=has[:, None] & wide, other=0.0)
            dq = tl.dot(do, S, dq, input_precision="ieee")
            de = tl.dot(tl.trans(L), S, de, input_precision="ieee")
            dk = tl.dot(tl.trans(R), dS, dk, input_precision="ieee")
            if GATE != 0:
                end += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)

        k_in, q_in = valid[:, None] & wide, reads[:, None] & wide
        k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, r[:, None], keys[None, :]), mask=k_in, other=0.0)
        q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token[:, None], keys[None, :]), mask=q_in, other=0.0)
        if not VECTOR:
            kn, qn = k.to(tl.float32) * r_k[:, None], q.to(tl.float32) * r_q[:, None]
            if GATE != 0:
                dq = dq * (scale * seen)[:, None]
                de = de * seen[:, None]
                dk = dk * left[:, None]
                ends += tl.sum(end, 0) * tl.load(fade_ptr + pid) + tl.sum(tl.sum(dk * kn, 1), 0)
            else:
                dq = dq * scale
            dq = tl.dot(D1, k, dq, input_precision="ieee")
            de = tl.dot(D2, k, -de, input_precision="ieee")
            dk = tl.dot(D1t, q, dk, input_precision="ieee")
            dk = tl.dot(D2t, k, dk, input_precision="ieee")
            erased = tl.sum(de * kn, 1)
            dbeta += erased
            if GATE != 0:
                dG += tl.sum(dq * qn, 1) + beta * erased - tl.sum(dk * kn, 1)
            dk += beta[:, None] * de
        else:
            kn, qn = k.to(tl.float32) * r_k[:, None], q.to(tl.float32) * (r_q * scale)[:, None]
            if ERASE:
                b = tl.load(tile_at(beta_ptr, s0, h, H, K, r[:, None], keys[None, :]), mask=k_in, other=0.0).to(tl.float32)
            else:
                b = beta[:, None]
            e = kn * b
            if GATE == 0:
                dq = tl.dot(D1, kn.to(dtype), dq, input_precision="ieee")
                de = tl.dot(D2, kn.to(dtype), -de, input_precision="ieee")
                dk = tl.dot(D1t, qn.to(dtype), dk, input_precision="ieee")
                dk = tl.dot(D2t, e.to(dtype), dk, input_precision="ieee")
            else:
                g = channel_gates(g_ptr, t0, h, H, K, r, valid, keys, SUB, GATE)
                high, low = split(g, EXACT)
                x = tl.exp2(sums(row >= col, high, low, EXACT))
                dq = dq * x + own[:, None] * kn
                de = -de * x
                dk = dk * tl.exp2(sums(row < col, high, low, EXACT))
                end = end * tl.exp2(tl.sum(g, 0)) + tl.sum(dk * kn, 0)
                dk += own[:, None] * qn
                for level in range(0, LEVELS):
                    x = tl.exp2(sums(near(level, C), high, low, EXACT))
                    pairs = across(level, C)
                    kx = (kn * x).to(dtype)
                    dq += x * tl.dot(tl.where(pairs, D1, 0.0).to(dtype), kx, input_precision="ieee")
                    de += x * tl.dot(tl.where(pairs, D2, 0.0).to(dtype), kx, input_precision="ieee")
                    pairs = tl.trans(pairs)
                    qx, ex = (qn * x).to(dtype), (e * x).to(dtype)
                    both = tl.dot(tl.where(pairs, D1t, 0.0).to(dtype), qx, input_precision="ieee")
                    dk += x * tl.dot(tl.where(pairs, D2t, 0.0).to(dtype), ex, both, input_precision="ieee")
                change = qn * dq + e * de - kn * dk
                high, low = split(change, EXACT)
                dg = sums(row <= col, high, low, EXACT) + end[None, :]
                if GATE == 2:
                    at = tile_at(dg_ptr, t0, h, H, K, token[:, None], keys[None, :])
                    tl.store(at, dg.to(dg_ptr.dtype.element_ty), mask=k_in & (r % SUB == 0)[:, None])
                else:
                    dG += tl.sum(tl.where(wide, dg, 0.0), 1)
            dq = dq * scale
            qn = q.to(tl.float32) * r_q[:, None]
            if ERASE:
                tl.store(tile_at(dbeta_ptr, s0, h, H, K, r[:, None], keys[None, :]), (de * kn).to(dbeta_ptr.dtype.element_ty), mask=k_in)
            else:
                dbeta += tl.sum(de * kn, 1)
            dk += de * b

        if NORM:
            n_q += tl.sum(dq * qn, 1)
            n_k += tl.sum(dk * kn, 1)
            if WHOLE:
                dq = (dq - qn * n_q[:, None]) * r_q[:, None]
                dk = (dk - kn * n_k[:, None]) * r_k[:, None]
        tl.store(tile_at(dq_ptr, t0, h, H, K, token[:, None], keys[None, :]), dq.to(dtype), mask=q_in)
        tl.store(tile_at(dk_ptr, s0, h, H, K, r[:, None], keys[None, :]), dk.to(dtype), mask=k_in)

    if NORM and not WHOLE:  # the norm's adjoint needs the sums over all keys
        tl.debug_barrier()
        for k0 in range(0, K, BK):
            keys = k0 + tl.arange(0, BK)
            k_in, q_in = valid[:, None] & (keys < K)[None, :], reads[:, None] & (keys < K)[None, :]
            k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, r[:, None], keys[None, :]), mask=k_in, other=0.0)
            q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token[:, None], keys[None, :]), mask=q_in, other=0.0)
            at = tile_at(dq_ptr, t0, h, H, K, token[:, None], keys[None, :])
            dq = tl.load(at, mask=q_in, other=0.0).to(tl.float32)
            dq = (dq - q.to(tl.float32) * (r_q * n_q)[:, None]) * r_q[:, None]
            tl.store(at, dq.to(dtype), mask=q_in)
            at = tile_at(dk_ptr, s0, h, H, K, r[:, None], keys[None, :])
            dk = tl.load(at, mask=k_in, other=0.0).to(tl.float32)
            dk = (dk - k.to(tl.float32) * (r_k * n_k)[:, None]) * r_k[:, None]
            tl.store(at, dk.to(dtype), mask=k_in)

    if not ERASE:
        tl.store(tile_at(dbeta_ptr, s0, h, H, 1, r, 0), dbeta.to(dbeta_ptr.dtype.element_ty), mask=valid)
    if GATE == 1:
        if VECTOR:
            dg = dG
        else:
            dg = tl.sum(tl.where(row <= col, dG[None, :], 0.0), 1) + ends
        tl.store(tile_at(dg_ptr, t0, h, H, 1, token, 0), dg.to(dg_ptr.dtype.element_ty), mask=valid & (r % SUB == 0))
