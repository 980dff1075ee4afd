"""Triton kernels of the cells whose recurrent weights do not fit on one multiprocessor.

The programs of a head share it: each holds the weights of BC of its channels, all gates of them, and keeps their state.
After every token they exchange what the others' products need (forward, h; back in time, the gradients of the gates)
through device memory and wait for each other. All programs of a launch have to be resident for that, which a
cooperative launch guarantees; how many there are is the host's business. What is exchanged has two places, one for the
even and one for the odd tokens: nobody writes to a place before everybody has read what it held.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    _backward_inputs,
    _load_state,
    _rows,
    _step,
    _step_back,
    _store_state,
    _store_tape,
    _vectors,
)


@triton.jit
def _arrive(counter):
    tl.debug_barrier()  # every thread's stores come before the one that announces them
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _wait(counter, target):
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _interleaved(ptr, start, D, channels, gates, ins, KIND: tl.constexpr, G: tl.constexpr):
    """The gates of a row of channels, four slots a channel; the GRU's fourth is its candidate's input."""
    slots = gates
    if KIND == 4:
        slots = tl.where(gates == 3, 2, tl.where(gates == 2, 4, gates))
    return tl.load(ptr + start + slots * D + channels, mask=ins & (slots < G), other=0.0)


@triton.jit
def wide_forward_kernel(
    x_ptr,  # as in forward_kernel
    R_ptr,
    b_ptr,
    p_ptr,
    h0_ptr,
    c0_ptr,
    n0_ptr,
    m0_ptr,
    y_ptr,
    tape_ptr,
    h1_ptr,
    c1_ptr,
    n1_ptr,
    m1_ptr,
    shared_ptr,  # h of the even and of the odd tokens [2, N, H, D], the first holding h0
    counter_ptr,  # [tiles, H] zeros
    start_ptr,
    order_ptr,
    first_unit,  # of (tile, head), which the first program of this launch takes
    N,
    T,
    H,
    D,
    KIND: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BK of the D channels
    BIAS: tl.constexpr,
    PEEPHOLES: tl.constexpr,
    SAVE: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """BC channels of a head of BN sequences, from the first token to the last."""
    parts = tl.cdiv(D, BC)
    unit = first_unit + tl.program_id(0) // parts
    h_id = unit % H
    rows, first, length, live = _rows(unit // H, start_ptr, order_ptr, N, T, BN, PACKED)
    origin = tl.program_id(0) % parts * BC
    cols = origin + tl.arange(0, BC)
    ins = cols < D
    mask = live[:, None] & ins[None, :]
    counter = counter_ptr + unit

    # The channels of all gates side by side, four slots a channel, so that one product serves them.
    SLOTS: tl.constexpr = 1 if G == 1 else 4
    lanes = tl.arange(0, SLOTS * BC)
    channels = origin + lanes // SLOTS
    gates = lanes % SLOTS
    held = channels < D
    ks = tl.arange(0, BK)
    weights = R_ptr + h_id.to(tl.int64) * D * G * D + gates * D + channels
    owned = (held & (gates < G))[None, :]
    W0 = tl.load(weights[None, :] + ks[:, None] * (G * D), mask=owned & (ks < D)[:, None], other=0.0)
    if BLOCKS > 1:
        ks1 = BK + ks
        W1 = tl.load(weights[None, :] + ks1[:, None] * (G * D), mask=owned & (ks1 < D)[:, None], other=0.0)
    if BLOCKS > 2:
        ks2 = 2 * BK + ks
        W2 = tl.load(weights[None, :] + ks2[:, None] * (G * D), mask=owned & (ks2 < D)[:, None], other=0.0)
    if BLOCKS > 3:
        ks3 = 3 * BK + ks
        W3 = tl.load(weights[None, :] + ks3[:, None] * (G * D), mask=owned & (ks3 < D)[:, None], other=0.0)
    bias = tl.zeros_like(lanes).to(tl.float32)[None, :]
    if BIAS:
        bias = tl.load(b_ptr + h_id * G * D + gates * D + channels, mask=held & (gates < G), other=0.0)[None, :]
    p0, p1, p2, _p3 = _vectors(p_ptr, h_id * (G - 1) * D, D, cols, ins, G - 1, PEEPHOLES)

    at = (rows.to(tl.int64) * H + h_id)[:, None] * D + cols[None, :]
    h, c, n, m = _load_state(h0_ptr, c0_ptr, n0_ptr, m0_ptr, at, mask, KIND)
    EXTRA: tl.constexpr = 3 if KIND == 5 else 1
    token = (first.to(tl.int64) * H + h_id)[:, None]
    x_at = token * (G * D)
    y_at = y_ptr + token * D + cols[None, :]
    tape_at = (first.to(tl.int64) * (EXTRA * H) + h_id)[:, None] * D + cols[None, :]
    whole = shared_ptr + (rows.to(tl.int64) * H + h_id)[:, None] * D + ks[None, :]
    place = tl.full((), 1, tl.int64) * N * H * D
    alive = live[:, None]

    steps = tl.max(length, 0)
    seen = held[None, :] & (length > 0)[:, None]
    x = _interleaved(x_ptr, x_at, D, channels[None, :], gates[None, :], seen, KIND, G)
    for t in range(0, steps):
        if PACKED:
            now = mask & (t < length)[:, None]
        else:
            now = mask
        x_at += H * G * D
        seen = held[None, :] & (t + 1 < length)[:, None]
        x_next = _interleaved(x_ptr, x_at, D, channels[None, :], gates[None, :], seen, KIND, G)
        if SAVE:
            _store_tape(tape_ptr + tape_at, c, n, m, H * D, now, KIND)
            tape_at += EXTRA * H * D

        if t > 0:
            _wait(counter, t * parts)
        even = place * (t % 2)
        odd = place * (1 - t % 2)
        a = tl.dot(tl.load(whole + even, mask=alive & (ks < D)[None, :], other=0.0, cache_modifier=".cg"), W0)
        if BLOCKS > 1:
            part = tl.load(whole + (even + BK), mask=alive & (ks1 < D)[None, :], other=0.0, cache_modifier=".cg")
            a += tl.dot(part, W1)
        if BLOCKS > 2:
            part = tl.load(whole + (even + 2 * BK), mask=alive & (ks2 < D)[None, :], other=0.0, cache_modifier=".cg")
            a += tl.dot(part, W2)
        if BLOCKS > 3:
            part = tl.load(whole + (even + 3 * BK), mask=alive & (ks3 < D)[None, :], other=0.0, cache_modifier=".cg")
            a += tl.dot(part, W3)
        a += bias + x.to(tl.float32)
        if SLOTS == 1:
            a0 = a
            a1 = a
            a2 = a
            a3 = a
        else:
            lower, upper = tl.split(tl.reshape(a, [BN, BC, 2, 2]))
            a0, a2 = tl.split(lower)
            a1, a3 = tl.split(upper)
        h_new, c_new, n_new, m_new = _step(
            a0, a1, a2, a3, h, c, n, m, p0, p1, p2, KIND, PEEPHOLES, False, FAST
        )  # fmt: skip
        if PACKED:  # sequences that have ended keep their state
            h = tl.where(now, h_new, h)
            c = tl.where(now, c_new, c)
            n = tl.where(now, n_new, n)
            m = tl.where(now, m_new, m)
        else:
            h = h_new
            c = c_new
            n = n_new
            m = m_new
        low = h.to(y_ptr.dtype.element_ty)
        tl.store(shared_ptr + odd + at, low, mask=mask)
        _arrive(counter)
        tl.store(y_at, low, mask=now)
        y_at += H * D
        x = x_next
    _store_state(h1_ptr, c1_ptr, n1_ptr, m1_ptr, at, h, c, n, m, mask, KIND)


@triton.jit
def wide_backward_kernel(
    a_ptr,  # as in backward_kernel
    x_ptr,
    R_ptr,
    b_ptr,
    p_ptr,
    h0_ptr,
    y_ptr,
    tape_ptr,
    dy_ptr,
    dh1_ptr,
    dc1_ptr,
    dn1_ptr,
    dx_ptr,
    dg_ptr,
    dp_ptr,
    dh0_ptr,
    dc0_ptr,
    dn0_ptr,
    shared_ptr,  # gradients of the recurrent products [2, N, H, G * D]
    counter_ptr,  # [tiles, H] zeros
    start_ptr,
    order_ptr,
    first_unit,
    N,
    T,
    H,
    D,
    tokens,
    KIND: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SLICES: tl.constexpr,  # a block of the product is this many products of BK channels each, summed at the end
    BK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    PEEPHOLES: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """BC channels of a head of BN sequences, from the last token to the first."""
    parts = tl.cdiv(D, BC)
    unit = first_unit + tl.program_id(0) // parts
    h_id = unit % H
    rows, first, length, live = _rows(unit // H, start_ptr, order_ptr, N, T, BN, PACKED)
    cols = tl.program_id(0) % parts * BC + tl.arange(0, BC)
    ins = cols < D
    mask = live[:, None] & ins[None, :]
    counter = counter_ptr + unit
    # R transposed: from the channels of all gates, one gate after the other, to this program's.
    ks = (tl.arange(0, SLICES)[:, None] * BK + tl.arange(0, BK)[None, :])[:, :, None]
    weights = R_ptr + (h_id.to(tl.int64) * D + cols[None, None, :]) * (G * D)
    owned = ins[None, None, :]
    W0 = tl.load(weights + ks, mask=owned & (ks < G * D), other=0.0)
    BLOCK: tl.constexpr = SLICES * BK
    if BLOCKS > 1:
        W1 = tl.load(weights + (ks + BLOCK), mask=owned & (ks + BLOCK < G * D), other=0.0)
    if BLOCKS > 2:
        W2 = tl.load(weights + (ks + 2 * BLOCK), mask=owned & (ks + 2 * BLOCK < G * D), other=0.0)
    if BLOCKS > 3:
        W3 = tl.load(weights + (ks + 3 * BLOCK), mask=owned & (ks + 3 * BLOCK < G * D), other=0.0)
    b0, b1, b2, b3 = _vectors(b_ptr, h_id * G * D, D, cols, ins, G, BIAS)
    p0, p1, p2, _p3 = _vectors(p_ptr, h_id * (G - 1) * D, D, cols, ins, G - 1, PEEPHOLES)

    at = (rows.to(tl.int64) * H + h_id)[:, None] * D + cols[None, :]
    dh, dc, dn, _m = _load_state(dh1_ptr, dc1_ptr, dn1_ptr, None, at, mask, KIND)
    dp0 = tl.zeros_like(dh)
    dp1 = dp0
    dp2 = dp0

    steps = tl.max(length, 0)
    EXTRA: tl.constexpr = 3 if KIND == 5 else 1
    token = (first + steps - 1).to(tl.int64)[:, None]
    a_at = (h_id.to(tl.int64) * tokens + token) * (G * D) + cols[None, :]
    x_at = (token * H + h_id) * (G * D) + cols[None, :]
    y_at = (token * H + h_id) * D + cols[None, :]
    tape_at = (token * (EXTRA * H) + h_id) * D + cols[None, :]
    own = shared_ptr + (rows.to(tl.int64) * H + h_id)[:, None] * (G * D) + cols[None, :]
    ks = (tl.arange(0, SLICES)[:, None] * BK + tl.arange(0, BK)[None, :])[:, None, :]
    whole = shared_ptr + (rows.to(tl.int64) * H + h_id)[None, :, None] * (G * D) + ks
    size = tl.full((), 1, tl.int64) * N * H * G * D
    e0, e1, e2, e3, e_dy, e_c, e_n, e_m = _backward_inputs(
        a_ptr + a_at, x_ptr + x_at, dy_ptr + y_at, y_ptr + y_at - H * D, tape_ptr + tape_at, h0_ptr + at, H * D,
        mask & (length >= steps)[:, None], steps == 1, D, KIND, G,
    )  # fmt: skip
    for back in range(0, steps):
        t = steps - 1 - back
        running = live & (t < length)
        now = ins[None, :] & running[:, None]
        f0, f1, f2, f3, f_dy, f_c, f_n, f_m = _backward_inputs(
            a_ptr + a_at - G * D, x_ptr + x_at - H * G * D, dy_ptr + y_at - H * D, y_ptr + y_at - 2 * H * D,
            tape_ptr + tape_at - EXTRA * H * D, h0_ptr + at, H * D,
            mask & ((t <= length) & (t > 0))[:, None], t == 1, D, KIND, G,
        )  # fmt: skip
        a3 = e3.to(tl.float32)
        if G > 3:
            a3 += b3
        d0, d1, d2, d3, dh_new, dc_new, dn_new, c_new = _step_back(
            e0.to(tl.float32) + b0, e1.to(tl.float32) + b1, e2.to(tl.float32) + b2, a3, e_c, e_n, e_m,
            dh + e_dy.to(tl.float32), dc, dn, p0, p1, p2, KIND, PEEPHOLES, False, FAST,
        )  # fmt: skip
        out = dx_ptr.dtype.element_ty
        place = size * (back % 2)
        tl.store(own + place, d0.to(out), mask=now)
        if G > 1:
            tl.store(own + (place + D), d1.to(out), mask=now)
        if KIND == 4:
            tl.store(own + (place + 2 * D), d3.to(out), mask=now)
        elif G > 1:
            tl.store(own + (place + 2 * D), d2.to(out), mask=now)
        if G > 3:
            tl.store(own + (place + 3 * D), d3.to(out), mask=now)
        _arrive(counter)
        tl.store(dx_ptr + x_at, d0.to(out), mask=now)
        if G > 1:
            tl.store(dx_ptr + x_at + D, d1.to(out), mask=now)
            tl.store(dx_ptr + x_at + 2 * D, d2.to(out), mask=now)
        if KIND == 4:
            tl.store(dg_ptr + y_at, d3.to(out), mask=now)
        if G > 3:
            tl.store(dx_ptr + x_at + 3 * D, d3.to(out), mask=now)
        if PEEPHOLES:
            dp0 += tl.where(now, d0 * e_c, 0.0)
            if KIND == 2:
                dp1 += tl.where(now, d1 * e_c, 0.0)
                dp2 += tl.where(now, d3 * c_new, 0.0)
            else:
                dp1 += tl.where(now, d2 * c_new, 0.0)
        _wait(counter, (back + 1) * parts)
        there = running[None, :, None]
        part = tl.load(whole + place, mask=there & (ks < G * D), other=0.0, cache_modifier=".cg")
        product = tl.dot(part, W0)
        if BLOCKS > 1:
            seen = there & (ks + BLOCK < G * D)
            part = tl.load(whole + (place + BLOCK), mask=seen, other=0.0, cache_modifier=".cg")
            product = tl.dot(part, W1, product)
        if BLOCKS > 2:
            seen = there & (ks + 2 * BLOCK < G * D)
            part = tl.load(whole + (place + 2 * BLOCK), mask=seen, other=0.0, cache_modifier=".cg")
            product = tl.dot(part, W2, product)
        if BLOCKS > 3:
            seen = there & (ks + 3 * BLOCK < G * D)
            part = tl.load(whole + (place + 3 * BLOCK), mask=seen, other=0.0, cache_modifier=".cg")
            product = tl.dot(part, W3, product)
        dh_new += tl.sum(product, 0)
        if PACKED:
            dh = tl.where(now, dh_new, dh)
            dc = tl.where(now, dc_new, dc)
            dn = tl.where(now, dn_new, dn)
        else:
            dh = dh_new
            dc = dc_new
            dn = dn_new
        a_at -= G * D
        x_at -= H * G * D
        y_at -= H * D
        tape_at -= EXTRA * H * D
        e0 = f0
        e1 = f1
        e2 = f2
        e3 = f3
        e_dy = f_dy
        e_c = f_c
        e_n = f_n
        e_m = f_m
    _store_state(dh0_ptr, dc0_ptr, dn0_ptr, None, at, dh, dc, dn, dn, mask, KIND)
    if PEEPHOLES:
        dp_at = dp_ptr + unit * (G - 1) * D + cols
        tl.store(dp_at, tl.sum(dp0, 0), mask=ins)
        tl.store(dp_at + D, tl.sum(dp1, 0), mask=ins)
        if KIND == 2:
            tl.store(dp_at + 2 * D, tl.sum(dp2, 0), mask=ins)
