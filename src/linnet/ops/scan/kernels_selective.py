"""Triton kernels of the selective scan.

A program has one sequence (or packed row) and a block of channels, and walks it tile by tile. A tile ``[W, L, BD]`` of
inputs and steps is loaded once; then every state channel n in turn makes its factors and inputs from it, scans them as
the plain scan does, and adds what is read to the output. So the states of tokens are in registers only; in memory are
those before every tile, from which the backward pass makes them again, tile by tile from the last one. The hints about
offsets give a thread one channel and all tokens of its run, as in the plain scan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import REAL, _after_real, _combine_real, _over_runs, _over_tokens, _sequence, _tokens


@triton.jit
def _onto_real(a, b, a1, b1):
    """The map (a, b) after (a1, b1), which stands to its right."""
    return a * a1, a * b1 + b


@triton.jit
def _states(a, b, carry):
    """States of every token and the one after the tile."""
    to_a, to_b, k, m = _over_tokens((a,), (b,), REAL)
    k, m, e, f = _over_runs(k, m, REAL)
    return to_a[0] * (e[0] * carry + f[0]) + to_b[0], k[0] * carry + m[0]


@triton.jit
def _states_back(a, b, carry):
    """The same from the last token to the first."""
    to_a, to_b = tl.associative_scan((a, b), 1, _after_real, reverse=True)
    k, m = tl.reduce((a, b), 1, _onto_real, keep_dims=True)
    one = tl.zeros_like(k) + 1.0
    k, m, e, f = tl.associative_scan((k, m, one, one - 1.0), 0, _combine_real, reverse=True)
    return to_a * (e * carry + f) + to_b, k * carry + m


@triton.jit
def _pick(x, w, which):
    """The run ``which`` of ``[W, 1, BD]``."""
    return tl.sum(tl.where(w == which, x, 0.0), 0, keep_dims=True)


@triton.jit(do_not_specialize=["T", "S", "rows"])
def forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,  # [S, D]
    B_ptr,
    C_ptr,
    skip_ptr,
    start_ptr,  # packed: states the sequences start from, [N, S, D]
    edge_ptr,  # states before every tile and after the last one, [tiles + 1, rows, S, D]; the first are given
    last_ptr,  # packed: states the sequences end with, [N, S, D]
    y_ptr,
    ids_ptr,
    T,
    S,
    rows,
    D: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
):
    width: tl.constexpr = D // G
    blocks: tl.constexpr = (width + BD - 1) // BD
    pid = tl.program_id(0)
    row = pid // (G * blocks)
    this_row = row.to(tl.int64)
    group = pid // blocks % G
    w = tl.arange(0, W)[:, None, None]
    l = _tokens(L, T, D)
    lane = w * L + l
    place = (pid % blocks) * BD + tl.arange(0, BD)
    within = (place < width)[None, None, :]
    col = (group * width + place)[None, None, :]
    skip = tl.zeros([1, 1, BD], tl.float32)
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + col, mask=within, other=0.0).to(tl.float32)
    for i in range(tl.cdiv(T, W * L)):
        p0 = i * (W * L)
        first_row = this_row * T + p0
        there = lane < T - p0
        ok = within & there
        at = tl.multiple_of(w * (L * D) + col, (1, 1, 1))
        hop = l * D
        maps = (first_row * G + group) * S
        token = lane * (G * S)
        x = tl.load(x_ptr + first_row * D + at + hop, mask=ok, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + first_row * D + at + hop, mask=ok, other=0.0).to(tl.float32)
        y = skip * x
        if PACKED:
            p = p0 + lane
            seq, first = _sequence(ids_ptr, p, there, -1, p > 0)
            _, final = _sequence(ids_ptr, p, there, 1, p + 1 < T)
            known = ok & first
        edge = (this_row + i * rows) * S * D
        behind = (this_row + (i + 1) * rows) * S * D
        for n in range(S):
            A = tl.load(A_ptr + n * D + col, mask=within, other=0.0)
            B = tl.load(B_ptr + maps + n + token, mask=there, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + maps + n + token, mask=there, other=0.0).to(tl.float32)
            carry = tl.load(edge_ptr + edge + n * D + col, mask=within, other=0.0)
            a = tl.exp(dt * A)
            b = dt * x * B
            if PACKED:
                state = tl.multiple_of((seq * S + n) * D + col, (1, 1, 1))
                entering = tl.load(start_ptr + state, mask=known, other=0.0)
                b += tl.where(known, a * entering, 0.0)
                a = tl.where(known, 0.0, a)
            h, after = _states(a, b, carry)
            y += C * h
            tl.store(edge_ptr + behind + n * D + col, _pick(after, w, W - 1), mask=within)
            if PACKED:
                tl.store(last_ptr + state, h, mask=ok & final)
        tl.store(y_ptr + first_row * D + at + hop, y.to(y_ptr.dtype.element_ty), mask=ok)
        tl.debug_barrier()  # the states after this tile are read by other threads than have written them


@triton.jit(do_not_specialize=["T", "S", "rows"])
def backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    skip_ptr,
    start_ptr,
    edge_ptr,
    ids_ptr,
    dy_ptr,
    dlast_ptr,  # packed: gradients of the last states, [N, S, D]
    carry_ptr,  # gradients of the states after the tile, [2, rows, S, D]; tiles take turns, the last one's are given
    dx_ptr,
    ddt_ptr,
    dA_ptr,  # by tiles, [tiles, rows, S, D]
    dB_ptr,  # by blocks of channels, [rows, T, G, S, blocks]
    dC_ptr,
    dskip_ptr,  # by tiles, [tiles, rows, D]
    dstart_ptr,  # packed
    T,
    S,
    rows,
    D: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
):
    width: tl.constexpr = D // G
    blocks: tl.constexpr = (width + BD - 1) // BD
    pid = tl.program_id(0)
    row = pid // (G * blocks)
    this_row = row.to(tl.int64)
    group = pid // blocks % G
    block = pid % blocks
    w = tl.arange(0, W)[:, None, None]
    l = _tokens(L, T, D)
    lane = w * L + l
    place = block * BD + tl.arange(0, BD)
    within = (place < width)[None, None, :]
    col = (group * width + place)[None, None, :]
    skip = tl.zeros([1, 1, BD], tl.float32)
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + col, mask=within, other=0.0).to(tl.float32)
    tiles = tl.cdiv(T, W * L)
    for back in range(tiles):
        i = tiles - 1 - back
        p0 = i * (W * L)
        first_row = this_row * T + p0
        there = lane < T - p0
        ok = within & there
        at = tl.multiple_of(w * (L * D) + col, (1, 1, 1))
        hop = l * D
        maps = (first_row * G + group) * S
        token = lane * (G * S)
        x = tl.load(x_ptr + first_row * D + at + hop, mask=ok, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + first_row * D + at + hop, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + first_row * D + at + hop, mask=ok, other=0.0).to(tl.float32)
        # The step that led on; behind the last token the gradient of the last state comes in as it is.
        leading = ok & (lane + 1 < T - p0)
        dt_on = tl.load(dt_ptr + first_row * D + D + at + hop, mask=leading, other=0.0).to(tl.float32)
        # What the token before wrote. The state before the tile has it already for the first of its tokens.
        behind = ok & (lane > 0)
        wrote = tl.load(x_ptr + first_row * D - D + at + hop, mask=behind, other=0.0).to(tl.float32)
        wrote *= tl.load(dt_ptr + first_row * D - D + at + hop, mask=behind, other=0.0).to(tl.float32)
        dx = skip * dy
        ddt = tl.zeros_like(x)
        if skip_ptr is not None:
            dskip = tl.sum(tl.sum(dy * x, 1, keep_dims=True), 0, keep_dims=True)
            tl.store(dskip_ptr + (this_row + i * rows) * D + col, dskip, mask=within)
        if PACKED:
            p = p0 + lane
            seq, first = _sequence(ids_ptr, p, there, -1, p > 0)
            _, final = _sequence(ids_ptr, p, there, 1, p + 1 < T)
            known = ok & first
            ending = ok & final
        edge = (this_row + i * rows) * S * D
        turn = back % 2
        coming = (this_row + turn * rows) * S * D
        going = (this_row + (1 - turn) * rows) * S * D
        for n in range(S):
            A = tl.load(A_ptr + n * D + col, mask=within, other=0.0)
            B = tl.load(B_ptr + maps + n + token, mask=there, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + maps + n + token, mask=there, other=0.0).to(tl.float32)
            B_before = tl.load(B_ptr + maps + n + token - G * S, mask=there & (lane > 0), other=0.0).to(tl.float32)
            a = tl.exp(dt * A)
            on = tl.exp(dt_on * A)
            keep = a
            add = a * wrote * B_before
            g = C * dy
            if PACKED:
                state = tl.multiple_of((seq * S + n) * D + col, (1, 1, 1))
                entering = tl.load(start_ptr + state, mask=known, other=0.0)
                add = tl.where(known, a * entering, add)
                keep = tl.where(known, 0.0, a)
                on = tl.where(final, 0.0, on)
                g += tl.load(dlast_ptr + state, mask=ending, other=0.0)
            # What of the states before is kept, without a difference of states.
            kept, _end = _states(keep, add, tl.load(edge_ptr + edge + n * D + col, mask=within, other=0.0))
            g, after = _states_back(on, g, tl.load(carry_ptr + coming + n * D + col, mask=within, other=0.0))
            tl.store(carry_ptr + going + n * D + col, _pick(after, w, 0), mask=within)
            if PACKED:
                tl.store(dstart_ptr + state, a * g, mask=known)
            dx += g * dt * B
            ddt += g * (x * B + A * kept)
            dA = tl.sum(tl.sum(g * dt * kept, 1, keep_dims=True), 0, keep_dims=True)
            tl.store(dA_ptr + edge + n * D + col, dA, mask=within)
            token_at = (maps + n + token) * blocks + block
            tl.store(dB_ptr + token_at, tl.sum(g * dt * x, 2, keep_dims=True), mask=there)
            tl.store(dC_ptr + token_at, tl.sum(dy * (kept + dt * x * B), 2, keep_dims=True), mask=there)
        tl.store(dx_ptr + first_row * D + at + hop, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        tl.store(ddt_ptr + first_row * D + at + hop, ddt.to(ddt_ptr.dtype.element_ty), mask=ok)
        tl.debug_barrier()  # carried gradients are read by other threads than have written them
