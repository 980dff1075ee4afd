"""Triton kernels around those of the delta engine: between the parts of a sequence that is walked in parts, and when
decay or erasing differ by channel.

A part turns the state that enters it into ``M S + H``. ``state_kernel`` makes both at once from ``[0, I]``, and
``chain_kernel`` goes from part to part.

Channels. The matrix kernels know rows and no gates by channel. Of the two factors ``exp(G_r - a)`` and ``exp(a - G_s)``
into which a decay between two rows is taken apart, ``prepare_kernel`` multiplies the first into what reads and erases
and the second into what is written, and ``finish_kernel`` multiplies them into the gradients of these. The product of
an operand with its gradient is the same with and without its factor, so gates have their gradients from the operands.

With ``a`` near the middle of the chunk no factor exceeds the inverse of half a chunk's decay. A channel in which that
is too much is hard (LIFT 0): it has factors from the chunk's start and to its end, which never exceed one, and its
pairs of rows are taken by themselves, with the decay of every pair in full: exact for every gate, for as many channels
as need it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    _span,
    after,
    between,
    channel_gates,
    erasing,
    gate_parts,
    gate_sums,
    over_length,
    power_of_2,
    product,
    reading,
    tile_at,
    within,
)
from .kernels_backward import RESET


@triton.jit(do_not_specialize=["parts", "H"])
def chain_kernel(
    start_ptr,  # [N, H, K, V]
    own_ptr,  # what the parts add, the first V of WIDTH columns, [parts, H, K, WIDTH]
    moves_ptr,  # by what they multiply, the last K of MOVES columns, [parts, H, K, MOVES]
    state_ptr,  # the states that come to the parts, [parts, H, K, V]
    last_ptr,  # [N, H, K, V]
    first_ptr,  # [N + 1] parts before each sequence (PACKED)
    parts,  # of each sequence
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    MOVES: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,  # keys multiplied at once
    BV: tl.constexpr,
    REVERSE: tl.constexpr,  # the adjoint: from the last part to the first, by the transposes
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FINE: tl.constexpr,
):
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    h = (pid // blocks) % H
    n = pid // (blocks * H)
    first, count = n * parts, parts
    if PACKED:
        first = tl.load(first_ptr + n)
        count = tl.load(first_ptr + n + 1) - first
    keys, values = tl.arange(0, BK)[:, None], pid % blocks * BV + tl.arange(0, BV)[None, :]
    inside = within(keys, K, BK) & within(values, V, BV)
    ends = (n.to(tl.int64) * H + h) * K * V + (keys * V + values)
    S = tl.load(start_ptr + ends, mask=inside, other=0.0)
    for it in tl.range(0, count, num_stages=2 if BM == BK else 1):
        part = first + it
        if REVERSE:
            part = first + count - 1 - it
        slot = part.to(tl.int64) * H + h
        state = state_ptr + slot * K * V
        after = tl.load(own_ptr + slot * K * WIDTH + (keys * WIDTH + values), mask=inside, other=0.0)
        tl.store(state + (keys * V + values), S, mask=inside)
        if BM < BK:
            tl.debug_barrier()
        for m0 in tl.static_range(0, BK, BM):
            rows, cols = (m0 + tl.arange(0, BM))[:, None], (m0 + tl.arange(0, BM))[None, :]
            if BM == BK:
                before = S
            else:  # by way of memory: no part of what is in registers can be taken by itself
                mask = within(rows, K, BM) & within(values, V, BV)
                before = tl.load(state + (rows * V + values), mask=mask, other=0.0)
            if REVERSE:
                at = cols * MOVES + keys
            else:
                at = keys * MOVES + cols
            mask = within(keys, K, BK) & within(cols, K, BM)
            M = tl.load(moves_ptr + slot * K * MOVES + (MOVES - K) + at, mask=mask, other=0.0)
            after += product(M, before, EXACT, FINE)
        S = after
    tl.store(last_ptr + ends, S, mask=inside)


@triton.jit
def gates_of(
    g_ptr, t0, h, H, K: tl.constexpr, start: tl.constexpr, stop: tl.constexpr, rows, cols, wide, ROWS: tl.constexpr,
    SUB: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Both parts of the log2-decays of rows ``start`` to ``stop``, summed, by channel."""
    coarse = tl.zeros([ROWS, cols.shape[0]], dtype=tl.float32)
    fine = tl.zeros([ROWS, cols.shape[0]], dtype=tl.float32)
    for r0 in tl.static_range(start, stop, ROWS):  # unrolled: the loads do not wait for each other
        r = r0 + tl.arange(0, ROWS)
        more_coarse, more_fine = gate_parts(channel_gates(g_ptr, t0, h, H, K, r, r < rows, cols, wide, SUB, GATE))
        coarse += more_coarse
        fine += more_fine
    return tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def gates_left(g, behind_coarse, behind_fine):
    """Sums of the log2-decays after each row of a block, in two parts, from the sums after the block; then those after
    the block before it."""
    coarse, fine = gate_parts(g)
    coarse_sums, fine_sums = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    behind_coarse += tl.sum(coarse, 0)
    behind_fine += tl.sum(fine, 0)
    return behind_coarse[None, :] - coarse_sums, behind_fine[None, :] - fine_sums, behind_coarse, behind_fine


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def prepare_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    a_ptr,
    b_ptr,
    g_ptr,
    rows_ptr,
    decays_ptr,
    erase_ptr,
    read_ptr,
    write_ptr,
    cu_ptr,
    table_ptr,
    scale,
    limit,  # log2 of what half a chunk may forget
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,  # covers all keys
    ROWS: tl.constexpr,  # taken together, at most a quarter of the chunk
    STAGES: tl.constexpr,  # tiles fetched ahead
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Operands of a chunk with their decays in them. One warp walks it a few rows at a time, last row first: then the
    sums over the rows after each take no more than the gates of a block in registers. UNTIED, both rows of a token have
    the same decays, and are made together."""
    STEPS: tl.constexpr = 1 if UNTIED else SUB
    LINES: tl.constexpr = C // 2 if UNTIED else C
    pid = tl.program_id(0)
    h = pid % H
    hq = h // (H // HQ)
    slot = pid.to(tl.int64)
    t0, tokens = _span(pid // H, cu_ptr, table_ptr, T, CT, PACKED)
    lines = tokens * STEPS
    s0 = t0.to(tl.int64) * STEPS
    rows_ptr += slot * (8 * C)
    cols = tl.arange(0, BK)
    keys = cols[None, :]
    wide = within(keys, K, BK)
    dtype = erase_ptr.dtype.element_ty
    if GATE != 0:
        inside = within(cols, K, BK)
        half: tl.constexpr = LINES // 2
        end_coarse, end_fine = gates_of(g_ptr, t0, h, H, K, 0, half, lines, cols, wide, ROWS, STEPS, GATE)
        second_coarse, second_fine = gates_of(g_ptr, t0, h, H, K, half, LINES, lines, cols, wide, ROWS, STEPS, GATE)
        second = second_coarse + second_fine
        hard = tl.minimum(end_coarse + end_fine, second) < -limit
        end_coarse += second_coarse
        end_fine += second_fine
        n = tl.where(hard, 0.0, tl.floor(-second))
        decays_ptr += slot * (3 * K) + cols
        total = tl.exp2(end_coarse + end_fine)
        tl.store(decays_ptr, tl.where(hard, 1.0, tl.exp2((end_coarse + n) + end_fine)), mask=inside)
        tl.store(decays_ptr + K, tl.where(hard, total, power_of_2(-n)), mask=inside)
        tl.store(decays_ptr + 2 * K, tl.where(hard, 0.0, power_of_2(n)), mask=inside)
        tl.store(rows_ptr + 6 * C, tl.max(tl.where(hard & inside, 1.0, 0.0), 0))
        base_coarse, base_fine = tl.where(hard, end_coarse, -n), tl.where(hard, end_fine, 0.0)
        behind_coarse, behind_fine = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    for block in tl.range(0, LINES // ROWS, num_stages=STAGES):
        r = LINES - ROWS - block * ROWS + tl.arange(0, ROWS)
        row, token = r[:, None], (r // STEPS)[:, None]
        valid = r < lines
        reads = valid & reading(r, STEPS)
        k_in = valid[:, None] & wide
        k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, row, keys), mask=k_in, other=0.0).to(tl.float32)
        q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, keys), mask=reads[:, None] & wide, other=0.0).to(tl.float32)
        r_k = tl.zeros([ROWS], dtype=tl.float32) + 1.0
        r_q = tl.zeros([ROWS], dtype=tl.float32) + 1.0
        if NORM:
            r_k, r_q = over_length(tl.sum(k * k, 1)), over_length(tl.sum(q * q, 1))
        beta = tl.zeros([ROWS], dtype=tl.float32) + 1.0
        if not (ERASE or UNTIED):
            beta = tl.load(tile_at(beta_ptr, s0, h, H, 1, r, 0), mask=valid, other=0.0).to(tl.float32)
        for j in tl.static_range(0, 2 if UNTIED else 1):
            here = rows_ptr + (2 * r + j if UNTIED else r)
            tl.store(here + 3 * C, beta)
            tl.store(here + 4 * C, r_k)
            tl.store(here + 5 * C, r_q)
        k = k * r_k[:, None]
        if UNTIED:
            e = -tl.load(tile_at(a_ptr, t0, h, H, K, row, keys), mask=k_in, other=0.0).to(tl.float32)
            b = tl.load(tile_at(b_ptr, t0, hq, HQ, K, row, keys), mask=k_in, other=0.0).to(tl.float32)
        elif ERASE:
            e = k * tl.load(tile_at(beta_ptr, s0, h, H, K, row, keys), mask=k_in, other=0.0).to(tl.float32)
        else:
            e = k
        w = k * beta[:, None]
        q = q * (r_q * scale)[:, None]
        if GATE != 0:
            g = channel_gates(g_ptr, t0, h, H, K, r, valid, cols, wide, STEPS, GATE)
            left_coarse, left_fine, behind_coarse, behind_fine = gates_left(g, behind_coarse, behind_fine)
            left = tl.exp2(left_coarse + left_fine)
            w = w * left
            late_coarse, late_fine = base_coarse[None, :] - left_coarse, base_fine[None, :] - left_fine
            seen = tl.exp2(late_coarse + late_fine)
            q = q * seen
            if UNTIED:
                b = b * left
                own_coarse, own_fine = gate_parts(g)
                e = e * tl.exp2((late_coarse - own_coarse) + (late_fine - own_fine))
            else:
                e = e * seen
        fits = tl.full([ROWS, 1], True, tl.int1) & wide
        if UNTIED:
            out = slot * C * K + (2 * row * K + keys)
            tl.store(erase_ptr + out, e.to(dtype), mask=fits)
            tl.store(write_ptr + out, b.to(dtype), mask=fits)
            out += K
        else:
            out = slot * C * K + (row * K + keys)
            tl.store(erase_ptr + out, e.to(dtype), mask=fits)
        tl.store(write_ptr + out, w.to(dtype), mask=fits)
        tl.store(read_ptr + out, q.to(dtype), mask=reading(r, STEPS)[:, None] & wide)


@triton.jit
def column(ptr, start, head, heads, width, row, c, mask):
    """One channel of a head of ``[rows, heads, width]`` in fp32."""
    return tl.load(tile_at(ptr, start, head, heads, width, row, c), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def channel(
    q_ptr,
    k_ptr,
    beta_ptr,
    a_ptr,
    b_ptr,
    g_ptr,
    rows_ptr,
    t0,
    h,
    H,
    hq,
    HQ,
    K: tl.constexpr,
    c,
    scale,
    tokens,
    C: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    UNTIED: tl.constexpr,
):
    """One channel of a chunk, in fp32: queries times scale, keys erased with, keys written under, and the exact decays
    between rows ``[r, s]``: up to and with row r, and the same for what is erased; before them their sums and log2."""
    r = tl.arange(0, C)
    valid = r < tokens * SUB
    first = valid & (r % SUB == 0)
    s0 = t0.to(tl.int64) * SUB
    q = column(q_ptr, t0, hq, HQ, K, r // SUB, c, valid & (r % SUB == SUB - 1)) * tl.load(rows_ptr + 5 * C + r) * scale
    if UNTIED:
        w = column(k_ptr, t0, hq, HQ, K, r // 2, c, valid & (r % 2 == 1))
        w += column(b_ptr, t0, hq, HQ, K, r // 2, c, first)
        e = -column(a_ptr, t0, h, H, K, r // 2, c, first)
    else:
        w = column(k_ptr, s0, hq, HQ, K, r, c, valid) * tl.load(rows_ptr + 4 * C + r)
        e = w
        if ERASE:
            e = w * column(beta_ptr, s0, h, H, K, r, c, valid)
        else:
            w = w * tl.load(rows_ptr + 3 * C + r)
    if GATE == 2:
        g = column(g_ptr, t0, h, H, K, r // SUB, c, first)
    else:
        g = column(g_ptr, t0, h, H, 1, r // SUB, 0, first)
    g = tl.maximum(g, -104.0) * 1.4426950408889634
    coarse, fine = gate_sums(g)
    decay = between(coarse, fine, C)
    before = r[:, None] > r[None, :]
    if UNTIED:
        own_coarse, own_fine = gate_parts(g)
        pair = (coarse - own_coarse)[:, None] - coarse[None, :]
        pair += (fine - own_fine)[:, None] - fine[None, :]
        erased = tl.exp2(tl.where(before, pair, float("-inf")))
    else:
        erased = tl.where(before, decay, 0.0)
    return q, e, w, g, coarse, fine, decay, erased


@triton.jit
def any_hard(rows_ptr, slots, C: tl.constexpr):
    """Whether one of the chunks that are this program's, of every 64 at most, has a channel that forgets too much."""
    mine = tl.program_id(0) + tl.arange(0, 64) * tl.num_programs(0)
    flags = tl.load(rows_ptr + mine.to(tl.int64) * (8 * C) + 6 * C, mask=mine < slots, other=0.0)
    return tl.sum(flags, 0) > 0.0


@triton.jit(do_not_specialize=["slots", "T", "CT", "H", "HQ"])
def hard_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    a_ptr,
    b_ptr,
    g_ptr,
    rows_ptr,
    decays_ptr,
    matrices_ptr,
    cu_ptr,
    table_ptr,
    scale,
    slots,
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    UNTIED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Pairs of rows in channels that forget too much for one factor a row, left to local_kernel where A and P go."""
    keys = tl.arange(0, BK)
    if any_hard(rows_ptr, slots, C):
        for it in range(0, tl.cdiv(slots - tl.program_id(0), tl.num_programs(0))):
            pid = tl.program_id(0) + it * tl.num_programs(0)
            slot = pid.to(tl.int64)
            rows = rows_ptr + slot * (8 * C)
            decays = decays_ptr + slot * (3 * K)
            lift = tl.load(decays + 2 * K + keys, mask=within(keys, K, BK), other=1.0)
            if tl.min(lift, 0) == 0.0:
                h = pid % H
                hq = h // (H // HQ)
                t0, tokens = _span(pid // H, cu_ptr, table_ptr, T, CT, PACKED)
                r = tl.arange(0, C)
                P = tl.zeros([C, C], dtype=tl.float32)
                T_ = tl.zeros([C, C], dtype=tl.float32)
                for c in range(0, K):
                    if tl.load(decays + 2 * K + c) == 0.0:
                        q, e, w, _g, _coarse, _fine, decay, erased = channel(
                            q_ptr, k_ptr, beta_ptr, a_ptr, b_ptr, g_ptr, rows, t0, h, H, hq, HQ, K, c, scale,
                            tokens, C, SUB, GATE, ERASE, UNTIED,
                        )  # fmt: skip
                        P += (q[:, None] * w[None, :]) * decay
                        T_ += (e[:, None] * w[None, :]) * erased
                pairs = matrices_ptr + slot * (2 * C * C) + (r[:, None] * C + r[None, :])
                tl.store(pairs, T_.to(matrices_ptr.dtype.element_ty))
                tl.store(pairs + C * C, P.to(matrices_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["slots", "T", "CT", "H", "HQ"])
def hard_gradient_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    a_ptr,
    b_ptr,
    g_ptr,
    rows_ptr,
    decays_ptr,
    erase_ptr,  # the operands' gradients from the states; of hard channels replaced by the whole without factors
    read_ptr,
    write_ptr,
    D1_ptr,
    D2_ptr,
    dg_ptr,
    cu_ptr,
    table_ptr,
    scale,
    slots,
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients through the pairs of rows in channels that forget too much for one factor a row."""
    keys = tl.arange(0, BK)
    if any_hard(rows_ptr, slots, C):
        for it in range(0, tl.cdiv(slots - tl.program_id(0), tl.num_programs(0))):
            pid = tl.program_id(0) + it * tl.num_programs(0)
            slot = pid.to(tl.int64)
            rows = rows_ptr + slot * (8 * C)
            decays = decays_ptr + slot * (3 * K)
            lift = tl.load(decays + 2 * K + keys, mask=within(keys, K, BK), other=1.0)
            if tl.min(lift, 0) == 0.0:
                h = pid % H
                hq = h // (H // HQ)
                t0, tokens = _span(pid // H, cu_ptr, table_ptr, T, CT, PACKED)
                r = tl.arange(0, C)
                row, col = r[:, None], r[None, :]
                first = (r < tokens * SUB) & (r % SUB == 0)
                tile = slot * (C * C) + (row * C + col)
                D1 = tl.load(D1_ptr + tile).to(tl.float32)
                D2 = tl.load(D2_ptr + tile).to(tl.float32)
                if UNTIED:  # the rows that erase of the same matrix, negative
                    D2 = -D2
                s_q = tl.zeros([C], dtype=tl.float32)
                s_e = tl.zeros([C], dtype=tl.float32)
                s_w = tl.zeros([C], dtype=tl.float32)
                dg_row = tl.zeros([C], dtype=tl.float32)
                at = slot * C * K + r * K
                for c in range(0, K):
                    if tl.load(decays + 2 * K + c) == 0.0:
                        q, e, w, g, coarse, fine, decay, erased = channel(
                            q_ptr, k_ptr, beta_ptr, a_ptr, b_ptr, g_ptr, rows, t0, h, H, hq, HQ, K, c, scale,
                            tokens, C, SUB, GATE, ERASE, UNTIED,
                        )  # fmt: skip
                        decay = decay * D1
                        erased = erased * D2
                        dq = tl.sum(decay * w[None, :], 1)
                        de = -tl.sum(erased * w[None, :], 1)
                        dw = tl.sum(decay * q[:, None], 0) - tl.sum(erased * e[:, None], 0)
                        q, e, w = q * dq, e * de, w * dw
                        s_q += q
                        s_e += e
                        s_w += w
                        change = w - q - e
                        dg = tl.cumsum(change, 0) - change
                        seen = coarse + fine
                        left = after(coarse, C) + after(fine, C)
                        asked, erases = reading(r, SUB), erasing(r, UNTIED)
                        dq += tl.exp2(seen) * tl.load(read_ptr + at + c, mask=asked, other=0.0).to(tl.float32)
                        dw += tl.exp2(left) * tl.load(write_ptr + at + c).to(tl.float32)
                        if UNTIED:
                            dg -= e
                            own_coarse, own_fine = gate_parts(g)
                            seen = (coarse - own_coarse) + (fine - own_fine)
                        de += tl.exp2(seen) * tl.load(erase_ptr + at + c, mask=erases, other=0.0).to(tl.float32)
                        tl.store(read_ptr + at + c, dq.to(read_ptr.dtype.element_ty), mask=asked)
                        tl.store(write_ptr + at + c, dw.to(write_ptr.dtype.element_ty))
                        tl.store(erase_ptr + at + c, de.to(erase_ptr.dtype.element_ty), mask=erases)
                        if GATE == 2:
                            here = tile_at(dg_ptr, t0, h, H, K, r // SUB, c)
                            dg += tl.load(here, mask=first, other=0.0).to(tl.float32)
                            dg = tl.where(g < RESET, 0.0, dg)
                            tl.store(here, dg.to(dg_ptr.dtype.element_ty), mask=first)
                        else:
                            dg_row += tl.where(g < RESET, 0.0, dg)
                if GATE == 1:
                    here = tile_at(dg_ptr, t0, h, H, 1, r // SUB, 0)
                    dg_row += tl.load(here, mask=first, other=0.0).to(tl.float32)
                    tl.store(here, dg_row.to(dg_ptr.dtype.element_ty), mask=first)
                if NORM:  # else nobody has written there
                    sums = rows + r
                    tl.store(sums, tl.load(sums) + s_q)
                    tl.store(sums + C, tl.load(sums + C) + s_e)
                    tl.store(sums + 2 * C, tl.load(sums + 2 * C) + s_w)


@triton.jit(do_not_specialize=["T", "CT", "H", "HQ"])
def finish_kernel(
    q_ptr,
    k_ptr,
    beta_ptr,
    g_ptr,
    rows_ptr,
    decays_ptr,
    erase_ptr,  # the operands' gradients
    read_ptr,
    write_ptr,
    dq_ptr,  # by value head, [tokens, H, K]
    dk_ptr,
    dbeta_ptr,
    da_ptr,
    db_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    CT,
    H,
    HQ,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,
    ERASE: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of queries, keys and strengths from those of the operands, walking the rows as prepare_kernel does."""
    STEPS: tl.constexpr = 1 if UNTIED else SUB
    LINES: tl.constexpr = C // 2 if UNTIED else C
    pid = tl.program_id(0)
    h = pid % H
    hq = h // (H // HQ)
    slot = pid.to(tl.int64)
    t0, tokens = _span(pid // H, cu_ptr, table_ptr, T, CT, PACKED)
    lines = tokens * STEPS
    s0 = t0.to(tl.int64) * STEPS
    cols = tl.arange(0, BK)
    keys = cols[None, :]
    wide = within(keys, K, BK)
    if GATE != 0:
        lift = tl.load(decays_ptr + slot * (3 * K) + 2 * K + cols, mask=within(cols, K, BK), other=1.0)
        hard = (lift == 0.0)[None, :]
        n = ((lift.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)[None, :]
        behind_coarse, behind_fine = tl.zeros([BK], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    for block in tl.range(0, LINES // ROWS, num_stages=STAGES):
        r = LINES - ROWS - block * ROWS + tl.arange(0, ROWS)
        row, token = r[:, None], (r // STEPS)[:, None]
        valid = r < lines
        asked = reading(r, STEPS)
        k_in, q_in = valid[:, None] & wide, (valid & asked)[:, None] & wide
        fits = tl.full([ROWS, 1], True, tl.int1) & wide
        if UNTIED:
            at = slot * C * K + (2 * row * K + keys)
            de = tl.load(erase_ptr + at, mask=fits, other=0.0).to(tl.float32)
            db = tl.load(write_ptr + at, mask=fits, other=0.0).to(tl.float32)
            at += K
        else:
            at = slot * C * K + (row * K + keys)
            de = tl.load(erase_ptr + at, mask=fits, other=0.0).to(tl.float32)
        dw = tl.load(write_ptr + at, mask=fits, other=0.0).to(tl.float32)
        dq = tl.load(read_ptr + at, mask=asked[:, None] & wide, other=0.0).to(tl.float32) * scale
        sums = rows_ptr + slot * (8 * C) + r
        if GATE != 0:
            g = channel_gates(g_ptr, t0, h, H, K, r, valid, cols, wide, STEPS, GATE)
            left_coarse, left_fine, behind_coarse, behind_fine = gates_left(g, behind_coarse, behind_fine)
            left = tl.exp2(tl.where(hard, 0.0, left_coarse + left_fine))
            seen = tl.exp2(tl.where(hard, 0.0, (-n - left_coarse) - left_fine))
            dw, dq = dw * left, dq * seen
            if UNTIED:
                db = db * left
                own_coarse, own_fine = gate_parts(g)
                late = (-n - left_coarse - own_coarse) - (left_fine + own_fine)
                de = de * tl.exp2(tl.where(hard, 0.0, late))
            else:
                de = de * seen
        if NORM:
            r_q = tl.load(sums + 5 * C)
            q = tl.load(tile_at(q_ptr, t0, hq, HQ, K, token, keys), mask=q_in, other=0.0).to(tl.float32)
            dq = (dq - q * (r_q * tl.load(sums))[:, None]) * r_q[:, None]
        tl.store(tile_at(dq_ptr, t0, h, H, K, token, keys), dq.to(dq_ptr.dtype.element_ty), mask=q_in)
        if UNTIED:
            tl.store(tile_at(da_ptr, t0, h, H, K, row, keys), (-de).to(da_ptr.dtype.element_ty), mask=k_in)
            tl.store(tile_at(db_ptr, t0, h, H, K, row, keys), db.to(db_ptr.dtype.element_ty), mask=k_in)
            dk = dw
        else:
            r_k = tl.load(sums + 4 * C)
            k = tl.load(tile_at(k_ptr, s0, hq, HQ, K, row, keys), mask=k_in, other=0.0).to(tl.float32) * r_k[:, None]
            if ERASE:
                at = tile_at(beta_ptr, s0, h, H, K, row, keys)
                dk = de * tl.load(at, mask=k_in, other=0.0).to(tl.float32) + dw
                tl.store(tile_at(dbeta_ptr, s0, h, H, K, row, keys), (de * k).to(dbeta_ptr.dtype.element_ty), mask=k_in)
            else:
                dbeta = tl.sum(k * dw, 1)
                tl.store(tile_at(dbeta_ptr, s0, h, H, 1, r, 0), dbeta.to(dbeta_ptr.dtype.element_ty), mask=valid)
                dk = de + dw * tl.load(sums + 3 * C)[:, None]
            if NORM:
                n_k = tl.load(sums + C) + tl.load(sums + 2 * C)
                dk = (dk - k * n_k[:, None]) * r_k[:, None]
        tl.store(tile_at(dk_ptr, s0, h, H, K, row, keys), dk.to(dk_ptr.dtype.element_ty), mask=k_in)
