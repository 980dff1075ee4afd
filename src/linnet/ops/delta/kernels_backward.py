"""Triton kernels of the delta engine's backward pass.

With ``R`` and the states that are read recomputed by ``state_kernel`` and ``dS`` the gradient of a chunk's leaving
state, the triangular solve has the adjoint

    dR = P^T dO + (exp(G_C - G) W) dS          L = A^T dR          dZ = L          dT = -tril(L R^T, -1)

so that ``adjoint_kernel`` walks the chunks backward with ``dS`` on chip and leaves ``dS`` and ``L`` of every chunk to
``gradient_kernel``, which makes the gradients of queries and keys, or of the operands made of them, of all chunks in
parallel. Gates have theirs from these: what reaches a gate from the state before it is ``<S, dS>``, and from row to row
what is written comes in and what is read and erased goes out. It is summed within a chunk from the very products that
make the gradients, so that a pair of rows on one side of a gate leaves nothing behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    _span,
    between,
    erasing,
    factors,
    gate_sums,
    key_tile,
    matrix_tile,
    moved,
    reading,
    row_gates,
    state_kernel,
    stretch,
    tile_at,
    within,
)

RESET = tl.constexpr(-150.0)  # log2-decays below it were cut: a reset passes no gradient


@triton.jit
def adjoint(
    pid,
    erase_ptr,
    write_ptr,
    read_ptr,
    rows_ptr,
    decays_ptr,
    matrices_ptr,
    do_ptr,
    last_ptr,  # gradient of the final state, [N, H, K, V]
    start_ptr,  # gradient of the initial state
    dS_ptr,  # [chunks, H, V, K]
    L_ptr,  # [rows, H, V], or, UNTIED, of the rows that erase, negative, [tokens, H, V]
    dv_ptr,  # UNTIED: L of the rows that are written to
    cu_ptr,
    first_ptr,
    scale,
    T,
    CT,
    LENGTH,
    H,
    HQ,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Walk the chunks backward, program ``pid`` a block of values of a head."""
    blocks = tl.cdiv(V, BV)
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
    state = keys[None, :] * V + values[:, None]
    inside = has & within(keys, K, BK)[None, :]
    dS = tl.load(last_ptr + (n.to(tl.int64) * H + h) * K * V + state, mask=inside, other=0.0)

    n_chunks = tl.cdiv(end - first, CT)
    fade, into, read = factors(rows_ptr, decays_ptr, chunk0 + n_chunks - 1, n_chunks, h, H, K, C, BK, VECTOR, GATE)
    for it in range(0, n_chunks):
        c = n_chunks - 1 - it
        ahead = chunk0 + tl.maximum(c - 1, 0)
        next_fade, next_into, next_read = factors(rows_ptr, decays_ptr, ahead, n_chunks, h, H, K, C, BK, VECTOR, GATE)
        t0 = first + c * CT
        slot = (chunk0 + c).to(tl.int64) * H + h
        valid = r < tl.minimum(end - t0, CT) * SUB
        all_rows = tl.full([C], True, tl.int1)
        reads = valid & reading(r, SUB)
        s0 = t0.to(tl.int64) * SUB
        rows = rows_ptr + slot * (8 * C) + r

        at = dS_ptr + slot * K * V + (values[:, None] * K + keys[None, :])
        tl.store(at, dS.to(dS_ptr.dtype.element_ty), mask=inside)
        k = key_tile(
            write_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, 0, all_rows if VECTOR else valid, K, C, BK, VECTOR, TMA
        )
        if TMA and SUB == 1:
            do = tl.trans(moved(do_ptr, sequence, t0 - sequence * T, h * V + value, C, BV))
        else:
            at = tile_at(do_ptr, t0, h, H, V, (r // SUB)[:, None], values[None, :])
            do = tl.trans(tl.load(at, mask=tl.trans(has) & reads[:, None], other=0.0))
        P = matrix_tile(matrices_ptr, slot, 1, C, TMA)
        dR = tl.dot(do, P, input_precision="ieee")
        if VECTOR:
            dR = tl.dot(dS.to(k.dtype), tl.trans(k), dR, input_precision="ieee")
        else:
            # A sum would be made one product that starts from the other, and the load then not be fetched ahead.
            x = tl.dot(dS.to(k.dtype), tl.trans(k), input_precision="ieee")
            dR = tl.fma(x, tl.load(rows + C)[None, :], dR)
        A = matrix_tile(matrices_ptr, slot, 0, C, TMA)
        L = tl.dot(dR.to(k.dtype), A, input_precision="ieee")
        if UNTIED:
            L = tl.where(erasing(r, UNTIED)[None, :], -L, L)
            at = tl.where(erasing(r, UNTIED)[None, :], L_ptr, dv_ptr)
            at = tile_at(at, t0, h, H, V, (r // SUB)[None, :], values[:, None])
        else:
            at = tile_at(L_ptr, s0, h, H, V, r[None, :], values[:, None])
        tl.store(at, L.to(L_ptr.dtype.element_ty), mask=has & valid[None, :])
        asked = reads
        if UNTIED:  # a row erases or reads: one product for both
            asked = all_rows
            do = tl.where(erasing(r, UNTIED)[None, :], L.to(k.dtype), do)
        elif VECTOR:
            asked = reading(r, SUB)
        q = key_tile(
            read_ptr, slot, t0, sequence, T, hq, HQ, r // SUB, 0, asked, K, C, BK, VECTOR, TMA and (UNTIED or SUB == 1)
        )
        if UNTIED:
            pass
        elif VECTOR:
            e = key_tile(erase_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, 0, all_rows, K, C, BK, VECTOR, TMA)
            Lb = (-L).to(k.dtype)
        else:
            e = k
            do = (do.to(tl.float32) * read[None, :]).to(k.dtype)
            Lb = (L * -tl.load(rows)[None, :]).to(k.dtype)
        if GATE != 0:
            if VECTOR:
                dS = dS * fade[None, :]
            else:
                dS = dS * fade
        dS = tl.dot(do, q, dS, input_precision="ieee")
        if not UNTIED:
            dS = tl.dot(Lb, e, dS, input_precision="ieee")
        if VECTOR:
            if GATE != 0:
                dS = dS * into[None, :]
        fade, into, read = next_fade, next_into, next_read

    tl.store(start_ptr + (n.to(tl.int64) * H + h) * K * V + state, dS, mask=inside)


@triton.jit(do_not_specialize=["states", "T", "CT", "LENGTH", "H", "HQ"])
def adjoint_kernel(
    states,  # programs that walk the states, before those that walk their gradients
    erase_ptr,
    write_ptr,
    read_ptr,
    v_ptr,
    w_ptr,
    rows_ptr,
    decays_ptr,
    matrices_ptr,
    S0_ptr,  # state before the first chunk, [N, H, K, V]
    S_ptr,  # the state that each chunk reads, [chunks, H, V, K]
    R_ptr,  # [chunks, H, V, C]
    do_ptr,
    last_ptr,  # gradient of the final state, [N, H, K, V]
    start_ptr,  # gradient of the initial state
    dS_ptr,  # [chunks, H, V, K]
    L_ptr,  # [rows, H, V], or, UNTIED, of the rows that erase, negative, [tokens, H, V]
    dv_ptr,  # UNTIED: L of the rows that are written to
    cu_ptr,
    first_ptr,
    scale,
    T,
    CT,
    LENGTH,
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
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """The serial passes: states forward and their gradients backward. Neither needs the other, and each leaves a
    multiprocessor idle when it waits for its chain of products: they run side by side."""
    if tl.program_id(0) < states:
        state_kernel(
            erase_ptr, write_ptr, read_ptr, v_ptr, w_ptr, rows_ptr, decays_ptr, matrices_ptr, S0_ptr, None, None,
            S_ptr, R_ptr, cu_ptr, first_ptr, scale, T, CT, LENGTH, H, HQ, K, V, V, C, BK, BV, SUB, GATE, W, VECTOR,
            UNTIED, False, True, False, False, PACKED, TMA,
        )  # fmt: skip
    else:
        adjoint(
            tl.program_id(0) - states, erase_ptr, write_ptr, read_ptr, rows_ptr, decays_ptr, matrices_ptr, do_ptr,
            last_ptr, start_ptr, dS_ptr, L_ptr, dv_ptr, cu_ptr, first_ptr, scale, T, CT, LENGTH, H, HQ, K, V, C, BK,
            BV, SUB, GATE, VECTOR, UNTIED, PACKED, TMA,
        )  # fmt: skip


@triton.jit
def value_tile(
    ptr, t0, h, H, v0, sequence, T, rows, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SUB: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Tile ``[C, BV]`` of a tensor ``[tokens times SUB, H, V]``: so many rows of a chunk, else zero."""
    if TMA:
        return moved(ptr, sequence, (t0 - sequence * T) * SUB, h * V + v0, C, BV)
    else:
        values = v0 + tl.arange(0, BV)[None, :]
        at = tile_at(ptr, t0.to(tl.int64) * SUB, h, H, V, tl.arange(0, C)[:, None], values)
        return tl.load(at, mask=rows[:, None] & within(values, V, BV), other=0.0)


@triton.jit
def keep_value_tile(
    ptr, x, t0, h, H, v0, sequence, T, rows, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SUB: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`value_tile`."""
    if TMA:
        ptr.store([sequence, (t0 - sequence * T) * SUB, h * V + v0], tl.reshape(x.to(ptr.dtype), [1, C, BV]))
    else:
        values = v0 + tl.arange(0, BV)[None, :]
        at = tile_at(ptr, t0.to(tl.int64) * SUB, h, H, V, tl.arange(0, C)[:, None], values)
        tl.store(at, x.to(ptr.dtype.element_ty), mask=rows[:, None] & within(values, V, BV))


@triton.jit
def value_tiles(
    do_ptr, R_ptr, L_ptr, slot, t0, h, H, v0, sequence, T, valid, reads,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SUB: tl.constexpr, UNTIED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tiles of a chunk's values: gradients of the reading ``[C, BV]``, R ``[BV, C]``, L ``[C, BV]``. UNTIED, the first
    has the rows of both."""
    r = tl.arange(0, C)
    values = v0 + tl.arange(0, BV)
    has = within(values, V, BV)
    if TMA and SUB == 1:
        do = value_tile(do_ptr, t0, h, H, v0, sequence, T, reads, V, C, BV, 1, TMA)
    else:
        if UNTIED:
            do_ptr, reads = tl.where(erasing(r, UNTIED)[:, None], L_ptr, do_ptr), valid
        at = tile_at(do_ptr, t0, h, H, V, (r // SUB)[:, None], values[None, :])
        do = tl.load(at, mask=reads[:, None] & has[None, :], other=0.0)
    if TMA:
        R = R_ptr.load([slot.to(tl.int32) * V + v0, 0])
    else:
        every = has[:, None] & tl.full([1, C], True, tl.int1)
        R = tl.load(R_ptr + slot * C * V + (values[:, None] * C + r[None, :]), mask=every, other=0.0)
    if UNTIED:
        L = do
    else:
        L = value_tile(L_ptr, t0, h, H, v0, sequence, T, valid, V, C, BV, SUB, TMA)
    return do, R, L


@triton.jit
def state_tiles(
    S_ptr, dS_ptr, slot, v0, k0, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Tiles ``[BV, BK]`` of the state that a chunk reads and of the gradient of the one it leaves."""
    if TMA:
        value = slot.to(tl.int32) * V + v0
        return S_ptr.load([value, k0]), dS_ptr.load([value, k0])
    else:
        values, cols = v0 + tl.arange(0, BV), k0 + tl.arange(0, BK)
        inside = within(values, V, BV)[:, None] & (cols < K)[None, :]
        at = slot * K * V + (values[:, None] * K + cols[None, :])
        return tl.load(S_ptr + at, mask=inside, other=0.0), tl.load(dS_ptr + at, mask=inside, other=0.0)


@triton.jit
def keep_operand(
    ptr, x, slot, k0, mask, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Store a tile ``[C, BK]`` where :func:`key_tile` has its operands, in the rows asked for."""
    if TMA:
        ptr.store([slot.to(tl.int32) * C, k0], x.to(ptr.dtype))
    else:
        cols = k0 + tl.arange(0, BK)[None, :]
        at = ptr + slot * C * K + (tl.arange(0, C)[:, None] * K + cols)
        tl.store(at, x.to(ptr.dtype.element_ty), mask=mask[:, None] & within(cols, K, BK))


@triton.jit
def sum_before(x, start, below):
    """``start`` and the rows of ``x`` before each: on the tensor cores, in two parts that hold 16 bits."""
    C: tl.constexpr = x.shape[0]
    total = tl.zeros([C, x.shape[1]], dtype=tl.float32) + start[None, :]
    if below.dtype == tl.float32:
        return tl.dot(below, x, total, input_precision="ieee")
    else:
        bits = x.to(tl.int32, bitcast=True)
        rest = x - (bits & -65536).to(tl.float32, bitcast=True)
        total = tl.dot(below, rest.to(tl.bfloat16), total)
        return tl.dot(below, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), total)


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def gradient_kernel(
    v_ptr,
    g_ptr,
    w_ptr,
    rows_ptr,  # VECTOR: the first three become sums over the keys of read, erase and write times their gradients
    decays_ptr,
    erase_ptr,  # k and q, from the second on, or, VECTOR, operands, replaced by their gradients
    write_ptr,
    read_ptr,
    k_ptr,  # not VECTOR: k and q by address, for what is no product's and comes without waiting for each other
    q_ptr,
    do_ptr,
    S_ptr,
    R_ptr,
    dS_ptr,
    L_ptr,
    D1_ptr,  # gradients of the pairs of P and (negative) T, with the decays and strengths of scalars [chunks, H, C, C],
    D2_ptr,  # or None, TMA and not VECTOR; UNTIED: the first has the rows of both
    below_ptr,  # VECTOR with a gate: ones below the diagonal, [C, C]
    dq_ptr,  # by value head, [tokens, H, K]; not VECTOR, as the next two
    dk_ptr,
    dv_ptr,  # W; otherwise the gradient of v is there
    dw_ptr,
    dbeta_ptr,
    dg_ptr,
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,  # K rounded up to a power of two
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    TMA: tl.constexpr,  # tiles come through descriptors, but for tokens that several rows share
):
    pid = tl.program_id(0)
    h = pid % H
    hq = h // (H // HQ)
    slot = pid.to(tl.int64)
    chunk = pid // H
    t0, tokens = _span(chunk, cu_ptr, table_ptr, T, CT, PACKED)
    sequence = chunk if PACKED else chunk // tl.cdiv(T, CT)
    r = tl.arange(0, C)
    row, col = r[:, None], r[None, :]
    valid = r < tokens * SUB
    reads = valid & (r % SUB == SUB - 1)
    first = valid & (r % SUB == 0)
    token = (r // SUB)[:, None]
    s0 = t0.to(tl.int64) * SUB
    rows_ptr += slot * (8 * C)
    total_ptr = rows_ptr + 7 * C
    rows_ptr += r
    dtype = L_ptr.dtype if TMA and not UNTIED else L_ptr.dtype.element_ty
    FINE: tl.constexpr = dtype == tl.float16
    COPIED: tl.constexpr = TMA and (UNTIED or SUB == 1)
    all_rows = tl.full([C], True, tl.int1)
    written = all_rows if VECTOR else valid
    asked = all_rows if UNTIED else reading(r, SUB) if VECTOR else reads
    ONE: tl.constexpr = V <= BV  # values in one tile: read once
    do, R, L = value_tiles(
        do_ptr, R_ptr, L_ptr, slot, t0, h, H, 0, sequence, T, valid, reads, V, C, BV, SUB, UNTIED, TMA
    )

    s_q = tl.zeros([C], dtype=tl.float32)
    s_e = tl.zeros([C], dtype=tl.float32)
    s_w = tl.zeros([C], dtype=tl.float32)
    reach = 0.0  # <S, dS> of the state before the chunk
    dg_row = tl.zeros([C], dtype=tl.float32)
    if not VECTOR:
        beta, r_k, r_q = tl.load(rows_ptr + 3 * C), tl.load(rows_ptr + 4 * C), tl.load(rows_ptr + 5 * C)
        # Lengths, decays and strengths go into pairs and products, so that the operands are q and k as they lie in
        # memory; fp16 has no room for that, and has the lengths in the operands.
        c_e, c_w, c_q = tl.load(rows_ptr), tl.load(rows_ptr + C), tl.load(rows_ptr + 2 * C)
        p_q, p_k = r_q * scale, r_k
        if FINE:
            c_e, c_w, c_q = c_e / r_k, c_w / r_k, c_q / r_q
            p_q, p_k = tl.zeros([C], dtype=tl.float32) + scale, tl.zeros([C], dtype=tl.float32) + 1.0
        total = tl.load(total_ptr) if GATE != 0 else 1.0

    dP = tl.dot(do, R, input_precision="ieee")
    dT = dP
    if not UNTIED:
        dT = tl.dot(L, R, input_precision="ieee")
    for v0 in range(BV, V, BV):
        do, R, L = value_tiles(
            do_ptr, R_ptr, L_ptr, slot, t0, h, H, v0, sequence, T, valid, reads, V, C, BV, SUB, UNTIED, TMA
        )
        dP = tl.dot(do, R, dP, input_precision="ieee")
        if not UNTIED:
            dT = tl.dot(L, R, dT, input_precision="ieee")
    if UNTIED:  # odd rows read what their own token writes, even ones erase before it is written
        dP = tl.where(row + row % 2 > col, dP, 0.0)
    else:
        dP = tl.where(row >= col, dP, 0.0)
        dT = tl.where(row > col, dT, 0.0)
    hard = 0
    if VECTOR:
        if GATE != 0:
            decays_ptr += slot * (3 * K)
            every = tl.arange(0, KEYS)
            factor = tl.load(decays_ptr + 2 * K + every, mask=within(every, K, KEYS), other=1.0)
            hard = tl.sum((factor == 0.0).to(tl.int32), 0)
    else:
        if GATE != 0:
            coarse, fine = gate_sums(row_gates(g_ptr, t0, h, H, r, valid, SUB))
            decay = between(coarse, fine, C)
            dP, dT = dP * decay, dT * decay
        dP = dP * p_q[:, None] * (beta * p_k)[None, :]
        dT = dT * p_k[:, None] * (beta * p_k)[None, :]
    # To memory and back: both sides of these are needed, and Triton 3.6 turns what is in registers wrongly on Hopper.
    if TMA and not VECTOR:  # where the gradients of queries and keys come to lie, of no fewer channels than C
        every = tl.full([1, C], True, tl.int1)
        D1_ptr, in1 = tile_at(dq_ptr, t0, h, H, K, token, col), reads[:, None] & every
        D2_ptr, in2 = tile_at(dk_ptr, s0, h, H, K, row, col), valid[:, None] & every
        tl.store(D1_ptr, dP.to(dtype), mask=in1)
        tl.store(D2_ptr, dT.to(dtype), mask=in2)
        tl.debug_barrier()
        D1 = tl.load(D1_ptr, mask=in1, other=0.0)
        D2 = tl.load(D2_ptr, mask=in2, other=0.0)
        tl.debug_barrier()
    else:
        D1_ptr += slot * (C * C) + (row * C + col)
        tl.store(D1_ptr, dP.to(dtype))
        if not UNTIED:
            D2_ptr += slot * (C * C) + (row * C + col)
            tl.store(D2_ptr, dT.to(dtype))
        tl.debug_barrier()
        if VECTOR:  # else in the loop: beside tiles by address there are no registers to keep them in
            D1 = tl.load(D1_ptr)
            if not UNTIED:
                D2 = tl.load(D2_ptr)
    if VECTOR and GATE != 0:
        below = tl.load(below_ptr + (row * C + col))

    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        keys = cols[None, :]
        wide = within(keys, K, BK)
        k_in, q_in = valid[:, None] & wide, reads[:, None] & wide
        if not ONE:
            do, R, L = value_tiles(
                do_ptr, R_ptr, L_ptr, slot, t0, h, H, 0, sequence, T, valid, reads, V, C, BV, SUB, UNTIED, TMA
            )
        S, dS = state_tiles(S_ptr, dS_ptr, slot, 0, k0, K, V, BK, BV, TMA)
        end = tl.zeros([BK], dtype=tl.float32)  # through the state that crosses the chunk
        if GATE != 0:
            if VECTOR:
                end += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
            else:
                reach += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        dq = tl.dot(do, S, input_precision="ieee")
        if not UNTIED:
            de = tl.dot(L, S, input_precision="ieee")
        dw = tl.dot(tl.trans(R), dS, input_precision="ieee")
        for v0 in range(BV, V, BV):
            do, R, L = value_tiles(
                do_ptr, R_ptr, L_ptr, slot, t0, h, H, v0, sequence, T, valid, reads, V, C, BV, SUB, UNTIED, TMA
            )
            S, dS = state_tiles(S_ptr, dS_ptr, slot, v0, k0, K, V, BK, BV, TMA)
            dq = tl.dot(do, S, dq, input_precision="ieee")
            if not UNTIED:
                de = tl.dot(L, S, de, input_precision="ieee")
            dw = tl.dot(tl.trans(R), dS, dw, input_precision="ieee")
            if GATE != 0:
                if VECTOR:
                    end += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
                else:
                    reach += tl.sum(S.to(tl.float32) * dS.to(tl.float32))

        q = key_tile(read_ptr, slot, t0, sequence, T, hq, HQ, r // SUB, k0, asked, K, C, BK, VECTOR, COPIED)
        w = key_tile(write_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, k0, written, K, C, BK, VECTOR, TMA)
        if VECTOR:
            if not UNTIED:
                e = key_tile(erase_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, k0, all_rows, K, C, BK, VECTOR, TMA)
            wx = w
            if GATE != 0:
                inside = within(cols, K, BK)
                lift = tl.load(decays_ptr + 2 * K + cols, mask=inside, other=0.0)
                end = end * tl.load(decays_ptr + K + cols, mask=inside, other=0.0)
                wx = (w.to(tl.float32) * lift[None, :]).to(dtype)
            if GATE != 0:
                part = dq * q.to(tl.float32)
                if not UNTIED:
                    part -= de * e.to(tl.float32)
                end += tl.sum(part, 0)
            dq += tl.dot(D1, wx, input_precision="ieee")
            keep_operand(read_ptr, dq, slot, k0, asked, K, C, BK, COPIED)
            part = dq * q.to(tl.float32)
            change = -part
            pairs = tl.dot(tl.trans(D1), q, input_precision="ieee")
            if not UNTIED:
                s_q += tl.sum(part, 1)
                de += tl.dot(D2, wx, input_precision="ieee")
                keep_operand(erase_ptr, -de, slot, k0, all_rows, K, C, BK, TMA)
                erased = de * e.to(tl.float32)
                s_e -= tl.sum(erased, 1)
                change += erased
                pairs -= tl.dot(tl.trans(D2), e, input_precision="ieee")
            if GATE != 0:
                dw = tl.fma(pairs, tl.zeros([C, BK], dtype=tl.float32) + lift[None, :], dw)
            else:
                dw += pairs
            keep_operand(write_ptr, dw, slot, k0, all_rows, K, C, BK, TMA)
            part = dw * w.to(tl.float32)
            if not UNTIED:
                s_w += tl.sum(part, 1)
            if GATE != 0:
                dg = sum_before(change + part, end, below)
                if UNTIED:
                    dg += change  # of the first row of a token, which erases
                if GATE == 2:
                    if hard > 0:
                        here = tile_at(g_ptr, t0, h, H, K, token, keys)
                        g = tl.load(here, mask=first[:, None] & wide, other=0.0).to(tl.float32) * 1.4426950408889634
                        dg = tl.where(g < RESET, 0.0, dg)
                    here = tile_at(dg_ptr, t0, h, H, K, token, keys)
                    tl.store(here, dg.to(dg_ptr.dtype.element_ty), mask=first[:, None] & wide)
                else:
                    dg_row += tl.sum(dg, 1)
        else:
            k = w
            if FINE:
                k = (k.to(tl.float32) * r_k[:, None]).to(dtype)
                q = (q.to(tl.float32) * r_q[:, None]).to(dtype)
            dq, de, dw = dq * c_q[:, None], de * c_e[:, None], dw * c_w[:, None]
            if GATE != 0:
                dg_row += tl.sum(dq * q.to(tl.float32) - de * k.to(tl.float32), 1)
            if not TMA:
                D1, D2 = tl.load(D1_ptr), tl.load(D2_ptr)
            dq += tl.dot(D1, k, input_precision="ieee")
            de += tl.dot(D2, k, input_precision="ieee")
            dw += tl.dot(tl.trans(D1), q, input_precision="ieee")
            dw -= tl.dot(tl.trans(D2), k, input_precision="ieee")
            s_q += tl.sum(dq * q.to(tl.float32), 1)
            s_e -= tl.sum(de * k.to(tl.float32), 1)
            s_w += tl.sum(dw * k.to(tl.float32), 1)
            dw = dw - de
            n_q, n_k = s_q * r_q, (s_e + s_w) * r_k
            if FINE:
                dq, dw = dq * r_q[:, None], dw * r_k[:, None]
            else:
                n_q, n_k = n_q * r_q, n_k * r_k
            if NORM:  # its adjoint needs the sums over all keys: here in the last block, for the others below
                last = k0 + BK >= K
                dq -= q.to(tl.float32) * tl.where(last, n_q, 0.0)[:, None]
                dw -= k.to(tl.float32) * tl.where(last, n_k, 0.0)[:, None]
            tl.store(tile_at(dq_ptr, t0, h, H, K, token, keys), dq.to(dtype), mask=q_in)
            tl.store(tile_at(dk_ptr, s0, h, H, K, row, keys), dw.to(dtype), mask=k_in)
    if W:
        for v0 in range(0, V, BV):
            dz = value_tile(L_ptr, t0, h, H, v0, sequence, T, valid, V, C, BV, SUB, TMA).to(tl.float32)
            v = value_tile(v_ptr, t0, h, H, v0, sequence, T, valid, V, C, BV, SUB, TMA).to(tl.float32)
            by = value_tile(w_ptr, t0, h, H, v0, sequence, T, valid, V, C, BV, SUB, TMA).to(tl.float32)
            keep_value_tile(dw_ptr, dz * v, t0, h, H, v0, sequence, T, valid, V, C, BV, SUB, TMA)
            keep_value_tile(dv_ptr, dz * by, t0, h, H, v0, sequence, T, valid, V, C, BV, SUB, TMA)
    if VECTOR:
        if NORM:
            tl.store(rows_ptr, s_q)
            tl.store(rows_ptr + C, s_e)
            tl.store(rows_ptr + 2 * C, s_w)
    else:
        if NORM and K > BK:
            tl.debug_barrier()
            for k0 in range(0, K - BK, BK):
                keys = (k0 + tl.arange(0, BK))[None, :]
                k_in, q_in = valid[:, None] & within(keys, K, BK), reads[:, None] & within(keys, K, BK)
                k = key_tile(k_ptr, slot, s0, sequence, T * SUB, hq, HQ, r, k0, written, K, C, BK, VECTOR, False)
                q = key_tile(q_ptr, slot, t0, sequence, T, hq, HQ, r // SUB, k0, asked, K, C, BK, VECTOR, False)
                k, q = k.to(tl.float32), q.to(tl.float32)
                at = tile_at(dq_ptr, t0, h, H, K, token, keys)
                dq = tl.load(at, mask=q_in, other=0.0).to(tl.float32)
                tl.store(at, (dq - q * (s_q * r_q * r_q)[:, None]).to(dtype), mask=q_in)
                at = tile_at(dk_ptr, s0, h, H, K, row, keys)
                dk = tl.load(at, mask=k_in, other=0.0).to(tl.float32)
                tl.store(at, (dk - k * ((s_e + s_w) * r_k * r_k)[:, None]).to(dtype), mask=k_in)
        dbeta = s_w / beta
        tl.store(tile_at(dbeta_ptr, s0, h, H, 1, r, 0), dbeta.to(dbeta_ptr.dtype.element_ty), mask=valid)
        if GATE != 0:
            change = s_w - s_q - s_e
            dg_row = reach * total + tl.sum(dg_row, 0) + tl.cumsum(change, 0) - change
    if GATE == 1:
        g = row_gates(g_ptr, t0, h, H, r, valid, SUB)
        at = tile_at(dg_ptr, t0, h, H, 1, r // SUB, 0)
        tl.store(at, tl.where(g < RESET, 0.0, dg_row).to(dg_ptr.dtype.element_ty), mask=first)
