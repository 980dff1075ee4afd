"""Triton kernels of the selective scan.

A thread has a channel of the features with all its states in registers and walks token by token; a program has a block
of channels and CHUNK tokens, and the chunks of a sequence run side by side. A first launch (LOCAL) walks every chunk
from zeros for what it leaves behind, `carry_kernel` takes that from chunk to chunk, and a last launch walks every chunk
from the states before it, which are kept. The backward pass does the same from the end, and makes the states of a chunk
again from those: first every SUB-th, then those between, SUB at a time.

Powers are of two: ``A`` comes in multiplied by log2(e).
"""
# ruff: noqa: RUF005 (Triton's language has no unpacking into tuples)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _place(unit, chunks, D, G, BD: tl.constexpr):
    """Row, chunk, group of the maps, block within it and channels of a program."""
    width = D // G
    blocks = tl.cdiv(width, BD)
    block = unit % blocks
    group = unit // blocks % G
    chunk = unit // (blocks * G) % chunks
    row = unit // (blocks * G * chunks)
    place = block * BD + tl.arange(0, BD)
    return row.to(tl.int64), chunk, group, block, group * width + place, place < width


@triton.jit
def _tile(n, D, col):
    """Where the states of some channels are. Without a claim about alignment a thread gets whole columns of the tile,
    and sums over the states stay within it."""
    return tl.multiple_of(n[:, None] * D + col[None, :], (1, 1))


@triton.jit
def _numbers(ptr, at, D, col, ok):
    """One token's value of every channel."""
    return tl.load(ptr + at * D + col, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _map(ptr, at, S, n, ok):
    """One token's input or output map."""
    return tl.load(ptr + at * S + n, mask=ok, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _bounds(ids_ptr, p, T, live):
    """The sequence of a packed token, and whether it is the first and the last one of it."""
    seq = tl.load(ids_ptr + p, mask=live, other=-1)
    first = live & (seq != tl.load(ids_ptr + p - 1, mask=live & (p > 0), other=-1))
    final = live & (seq != tl.load(ids_ptr + p + 1, mask=live & (p + 1 < T), other=-1))
    return seq.to(tl.int64), first, final


@triton.jit(do_not_specialize=["T", "chunks"])
def forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,  # [S, D]
    B_ptr,
    C_ptr,
    skip_ptr,
    start_ptr,  # states the sequences start from, [N, S, D]
    edge_ptr,  # states before every chunk but the first, [chunks, rows, S, D]
    reach_ptr,  # LOCAL: sums of a chunk's steps, [chunks, rows, D]
    last_ptr,  # states the sequences end with, [N, S, D]
    y_ptr,
    ids_ptr,
    T,
    chunks,
    rows,
    S,
    D,
    G,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    LOCAL: tl.constexpr,  # then the last chunk is left out
    PACKED: tl.constexpr,
):
    row, chunk, group, _block, col, within = _place(tl.program_id(0), chunks - 1 if LOCAL else chunks, D, G, BD)
    n = tl.arange(0, BS)
    real = n < S
    both = real[:, None] & within[None, :]
    tile = _tile(n, D, col)
    A = tl.load(A_ptr + tile, mask=both, other=0.0).to(tl.float32) * LOG2E
    p0 = chunk * CHUNK
    h = tl.zeros([BS, BD], tl.float32)
    if not PACKED:
        h = tl.load(start_ptr + row * D * S + tile, mask=both & (chunk == 0), other=0.0)
    reach = tl.zeros([BD], tl.float32)
    skip = tl.zeros([BD], tl.float32)
    if not LOCAL:
        h += tl.load(edge_ptr + (chunk * rows + row) * S * D + tile, mask=both & (chunk > 0), other=0.0)
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + col, mask=within, other=0.0).to(tl.float32)
    for i in range(0, tl.minimum(CHUNK, T - p0)):
        at = row * T + p0 + i
        x = _numbers(x_ptr, at, D, col, within)
        dt = _numbers(dt_ptr, at, D, col, within)
        B = _map(B_ptr, at * G + group, S, n, real)
        if PACKED:
            seq, first, final = _bounds(ids_ptr, p0 + i, T, True)
            entering = tl.load(start_ptr + seq * D * S + tile, mask=both & first, other=0.0)
            h = tl.where(first, entering, h)
        h = tl.exp2(dt[None, :] * A) * h + B * (dt * x)[None, :]
        if LOCAL:
            reach += dt
        else:
            y = tl.sum(_map(C_ptr, at * G + group, S, n, real) * h, 0) + skip * x
            tl.store(y_ptr + at * D + col, y.to(y_ptr.dtype.element_ty), mask=within)
            if PACKED:
                tl.store(last_ptr + seq * D * S + tile, h, mask=both & final)
    if LOCAL:
        tl.store(edge_ptr + ((chunk + 1) * rows + row) * S * D + tile, h, mask=both)
        tl.store(reach_ptr + (chunk * rows + row) * D + col, reach, mask=within)
    elif not PACKED:
        tl.store(last_ptr + row * D * S + tile, h, mask=both & (chunk == chunks - 1))


@triton.jit(do_not_specialize=["T", "chunks"])
def carry_kernel(
    A_ptr,
    edge_ptr,  # what every chunk passes on by itself, then with all that comes through it
    reach_ptr,
    ids_ptr,
    T,
    chunks,
    rows,
    S,
    D,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BACK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """From chunk to chunk, for one state of BD channels."""
    blocks = tl.cdiv(D, BD)
    n = tl.program_id(0) // blocks % S
    row = (tl.program_id(0) // (blocks * S)).to(tl.int64)
    col = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    ok = col < D
    A = tl.load(A_ptr + n * D + col, mask=ok, other=0.0).to(tl.float32) * LOG2E
    at = n * D + col
    carry = tl.load(edge_ptr + ((chunks - 2 if BACK else 1) * rows + row) * S * D + at, mask=ok, other=0.0)
    for i in tl.range(1, chunks - 1, num_stages=4):
        chunk = chunks - 1 - i if BACK else i
        to = chunk - 1 if BACK else chunk + 1
        own = tl.load(edge_ptr + (to * rows + row) * S * D + at, mask=ok, other=0.0)
        keep = tl.exp2(tl.load(reach_ptr + (chunk * rows + row) * D + col, mask=ok, other=0.0) * A)
        if PACKED:  # nothing passes from one sequence to the next
            begin = tl.load(ids_ptr + chunk * CHUNK - 1)
            end = tl.load(ids_ptr + (chunk + 1) * CHUNK - (0 if BACK else 1))
            keep = tl.where(begin == end, keep, 0.0)
        carry = keep * carry + own
        tl.store(edge_ptr + (to * rows + row) * S * D + at, carry, mask=ok)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_local_kernel(
    dt_ptr,
    A_ptr,
    C_ptr,
    dy_ptr,
    dlast_ptr,
    edge_ptr,  # gradients of the states after every chunk but the last, [chunks, rows, S, D]
    reach_ptr,
    ids_ptr,
    T,
    chunks,
    rows,
    S,
    D,
    G,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What every chunk but the first passes back."""
    row, chunk, group, _block, col, within = _place(tl.program_id(0), chunks - 1, D, G, BD)
    chunk += 1
    n = tl.arange(0, BS)
    real = n < S
    both = real[:, None] & within[None, :]
    tile = _tile(n, D, col)
    A = tl.load(A_ptr + tile, mask=both, other=0.0).to(tl.float32) * LOG2E
    p0 = chunk * CHUNK
    count = tl.minimum(CHUNK, T - p0)
    g = tl.zeros([BS, BD], tl.float32)
    if not PACKED:
        g = tl.load(dlast_ptr + row * D * S + tile, mask=both & (chunk == chunks - 1), other=0.0)
    reach = tl.zeros([BD], tl.float32)
    for i in range(0, count):
        p = p0 + count - 1 - i
        at = row * T + p
        dt = _numbers(dt_ptr, at, D, col, within)
        dy = _numbers(dy_ptr, at, D, col, within)
        if PACKED:
            seq, _first, final = _bounds(ids_ptr, p, T, True)
            ending = tl.load(dlast_ptr + seq * D * S + tile, mask=both & final, other=0.0)
            g = tl.where(final, ending, g)
        g = tl.exp2(dt[None, :] * A) * (g + _map(C_ptr, at * G + group, S, n, real) * dy[None, :])
        reach += dt
    tl.store(edge_ptr + ((chunk - 1) * rows + row) * S * D + tile, g, mask=both)
    tl.store(reach_ptr + (chunk * rows + row) * D + col, reach, mask=within)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    skip_ptr,
    start_ptr,
    edge_ptr,
    dy_ptr,
    dlast_ptr,
    dedge_ptr,
    scratch_ptr,  # [programs, CHUNK / SUB, BS, BD]: states before every SUB tokens
    dx_ptr,
    ddt_ptr,
    dA_ptr,  # by chunks, [chunks, rows, S, D]
    dB_ptr,  # by blocks of channels, [blocks, rows, T, G, S]
    dC_ptr,
    dskip_ptr,  # by chunks, [chunks, rows, D]
    dstart_ptr,
    ids_ptr,
    T,
    chunks,
    rows,
    S,
    D,
    G,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
):
    n = tl.arange(0, BS)
    real = n < S
    room = tl.program_id(0).to(tl.int64) * CHUNK // SUB
    inside = _tile(n, BD, tl.arange(0, BD))
    for unit in range(tl.program_id(0), rows * chunks * G * tl.cdiv(D // G, BD), tl.num_programs(0)):
        row, chunk, group, block, col, within = _place(unit, chunks, D, G, BD)
        both = real[:, None] & within[None, :]
        tile = _tile(n, D, col)
        A = tl.load(A_ptr + tile, mask=both, other=0.0).to(tl.float32) * LOG2E
        p0 = chunk * CHUNK
        subs = tl.cdiv(tl.minimum(CHUNK, T - p0), SUB)
        edge = (chunk * rows + row) * S * D + tile
        h = tl.load(edge_ptr + edge, mask=both & (chunk > 0), other=0.0)
        g = tl.load(dedge_ptr + edge, mask=both & (chunk + 1 < chunks), other=0.0)
        if not PACKED:
            h += tl.load(start_ptr + row * D * S + tile, mask=both & (chunk == 0), other=0.0)
            g += tl.load(dlast_ptr + row * D * S + tile, mask=both & (chunk + 1 == chunks), other=0.0)
        skip = tl.zeros([BD], tl.float32)
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + col, mask=within, other=0.0).to(tl.float32)
        dskip = tl.zeros([BD], tl.float32)
        dA = tl.zeros([BS, BD], tl.float32)
        for s in range(0, subs):
            tl.store(scratch_ptr + (room + s) * BS * BD + inside, h)
            for i in tl.static_range(SUB):
                p = p0 + s * SUB + i
                at = row * T + p
                ok = within & (p < T)
                dt = _numbers(dt_ptr, at, D, col, ok)
                wrote = dt * _numbers(x_ptr, at, D, col, ok)
                if PACKED:
                    seq, first, final = _bounds(ids_ptr, p, T, p < T)
                    entering = tl.load(start_ptr + seq * D * S + tile, mask=both & first, other=0.0)
                    h = tl.where(first, entering, h)
                B = _map(B_ptr, at * G + group, S, n, real & (p < T))
                h = tl.exp2(dt[None, :] * A) * h + B * wrote[None, :]
        for back in range(0, subs):
            s = subs - 1 - back
            h = tl.load(scratch_ptr + (room + s) * BS * BD + inside)
            kepts = ()
            for i in tl.static_range(SUB):
                p = p0 + s * SUB + i
                at = row * T + p
                ok = within & (p < T)
                dt = _numbers(dt_ptr, at, D, col, ok)
                wrote = dt * _numbers(x_ptr, at, D, col, ok)
                if PACKED:
                    seq, first, final = _bounds(ids_ptr, p, T, p < T)
                    entering = tl.load(start_ptr + seq * D * S + tile, mask=both & first, other=0.0)
                    h = tl.where(first, entering, h)
                kept = tl.exp2(dt[None, :] * A) * h
                kepts = kepts + (kept,)
                h = kept + _map(B_ptr, at * G + group, S, n, real & (p < T)) * wrote[None, :]
            for j in tl.static_range(SUB):
                p = p0 + s * SUB + (SUB - 1 - j)
                at = row * T + p
                ok = within & (p < T)
                mapped = real & (p < T)
                x = _numbers(x_ptr, at, D, col, ok)
                dt = _numbers(dt_ptr, at, D, col, ok)
                dy = _numbers(dy_ptr, at, D, col, ok)
                B = _map(B_ptr, at * G + group, S, n, mapped)
                C = _map(C_ptr, at * G + group, S, n, mapped)
                if PACKED:
                    seq, first, final = _bounds(ids_ptr, p, T, p < T)
                    ending = tl.load(dlast_ptr + seq * D * S + tile, mask=both & final, other=0.0)
                    g = tl.where(final, ending, g)
                g += C * dy[None, :]
                wrote = dt * x
                by_step = g * kepts[SUB - 1 - j]  # what of the states before is kept, without a difference of states
                written = tl.sum(g * B, 0)
                dx = skip * dy + dt * written
                ddt = x * written + LN2 * tl.sum(by_step * A, 0)
                dA += by_step * dt[None, :]
                dskip += dy * x
                out = ((block * rows + row) * T + p) * G * S + group * S + n
                tl.store(dB_ptr + out, tl.sum(g * wrote[None, :], 1), mask=mapped)
                tl.store(dC_ptr + out, tl.sum((kepts[SUB - 1 - j] + B * wrote[None, :]) * dy[None, :], 1), mask=mapped)
                tl.store(dx_ptr + at * D + col, dx.to(dx_ptr.dtype.element_ty), mask=ok)
                tl.store(ddt_ptr + at * D + col, ddt.to(ddt_ptr.dtype.element_ty), mask=ok)
                g = tl.exp2(dt[None, :] * A) * g
                if PACKED:
                    tl.store(dstart_ptr + seq * D * S + tile, g, mask=both & first)
        tl.store(dA_ptr + edge, dA, mask=both)
        if skip_ptr is not None:
            tl.store(dskip_ptr + (chunk * rows + row) * D + col, dskip, mask=within)
        if not PACKED:
            tl.store(dstart_ptr + row * D * S + tile, g, mask=both & (chunk == 0))
