"""Triton kernels of the selective scan.

A program has a block of channels with all their states in registers and walks token by token through CHUNK tokens; the
chunks of a sequence run side by side. A thread has some neighbouring channels of some of the states, so that sums over
the states and sums over the channels both take few steps between threads. A first launch (LOCAL) walks every chunk
from zeros for what it leaves behind, `carry_kernel` takes that from chunk to chunk, and a last launch walks every chunk
from the states before it, which are kept. The backward pass does the same from the end, and makes the states of a chunk
again from those: first every SUB-th, then those between, SUB at a time. All of SUB tokens is loaded before any of it is
used: then one wait for memory is enough.

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
def _numbers(ptr, at, D, col, within, end, SUB: tl.constexpr):
    """The values of every channel at SUB tokens from ``at``, none from token ``end`` on."""
    found = ()
    for i in tl.static_range(SUB):
        found = found + (tl.load(ptr + (at + i) * D + col, mask=within & (at + i < end), other=0.0).to(tl.float32),)
    return found


@triton.jit
def _maps(ptr, at, group, G, S, n, end, SUB: tl.constexpr):
    """The input or output maps of SUB tokens from ``at``, none from token ``end`` on."""
    found = ()
    for i in tl.static_range(SUB):
        ok = (n < S) & (at + i < end)
        found = found + (tl.load(ptr + ((at + i) * G + group) * S + n, mask=ok, other=0.0).to(tl.float32)[:, None],)
    return found


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
    SUB: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    LOCAL: tl.constexpr,  # then the last chunk is left out
    PACKED: tl.constexpr,
):
    row, chunk, group, _block, col, within = _place(tl.program_id(0), chunks - 1 if LOCAL else chunks, D, G, BD)
    n = tl.arange(0, BS)
    real = n < S
    both = real[:, None] & within[None, :]
    tile = n[:, None] * D + col[None, :]
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
    end = (row + 1) * T
    for s in range(0, tl.cdiv(tl.minimum(CHUNK, T - p0), SUB)):
        at = row * T + p0 + s * SUB
        xs, dts = _numbers(x_ptr, at, D, col, within, end, SUB), _numbers(dt_ptr, at, D, col, within, end, SUB)
        Bs = _maps(B_ptr, at, group, G, S, n, end, SUB)
        if not LOCAL:
            Cs = _maps(C_ptr, at, group, G, S, n, end, SUB)
        for i in tl.static_range(SUB):
            live = at + i < end
            if PACKED:
                seq, first, final = _bounds(ids_ptr, p0 + s * SUB + i, T, live)
                entering = tl.load(start_ptr + seq * D * S + tile, mask=both & first, other=0.0)
                h = tl.where(first, entering, h)
            h = tl.exp2(dts[i][None, :] * A) * h + Bs[i] * (dts[i] * xs[i])[None, :]
            if LOCAL:
                reach += dts[i]
            else:
                y = tl.sum(Cs[i] * h, 0) + skip * xs[i]
                tl.store(y_ptr + (at + i) * D + col, y.to(y_ptr.dtype.element_ty), mask=within & live)
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
    SUB: tl.constexpr,
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
    tile = n[:, None] * D + col[None, :]
    A = tl.load(A_ptr + tile, mask=both, other=0.0).to(tl.float32) * LOG2E
    p0 = chunk * CHUNK
    g = tl.zeros([BS, BD], tl.float32)
    if not PACKED:
        g = tl.load(dlast_ptr + row * D * S + tile, mask=both & (chunk == chunks - 1), other=0.0)
    reach = tl.zeros([BD], tl.float32)
    end = (row + 1) * T
    subs = tl.cdiv(tl.minimum(CHUNK, T - p0), SUB)
    for back in range(0, subs):
        at = row * T + p0 + (subs - 1 - back) * SUB
        dts, dys = _numbers(dt_ptr, at, D, col, within, end, SUB), _numbers(dy_ptr, at, D, col, within, end, SUB)
        Cs = _maps(C_ptr, at, group, G, S, n, end, SUB)
        for i in tl.static_range(SUB - 1, -1, -1):
            if PACKED:
                seq, _first, final = _bounds(ids_ptr, at - row * T + i, T, at + i < end)
                ending = tl.load(dlast_ptr + seq * D * S + tile, mask=both & final, other=0.0)
                g = tl.where(final, ending, g)
            g = tl.exp2(dts[i][None, :] * A) * (g + Cs[i] * dys[i][None, :])
            reach += dts[i]
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
    inside = n[:, None] * BD + tl.arange(0, BD)[None, :]
    for unit in range(tl.program_id(0), rows * chunks * G * tl.cdiv(D // G, BD), tl.num_programs(0)):
        row, chunk, group, block, col, within = _place(unit, chunks, D, G, BD)
        both = real[:, None] & within[None, :]
        tile = n[:, None] * D + col[None, :]
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
        end = (row + 1) * T
        for s in range(0, subs):
            at = row * T + p0 + s * SUB
            xs, dts = _numbers(x_ptr, at, D, col, within, end, SUB), _numbers(dt_ptr, at, D, col, within, end, SUB)
            Bs = _maps(B_ptr, at, group, G, S, n, end, SUB)
            tl.store(scratch_ptr + (room + s) * BS * BD + inside, h)
            for i in tl.static_range(SUB):
                if PACKED:
                    seq, first, final = _bounds(ids_ptr, p0 + s * SUB + i, T, at + i < end)
                    entering = tl.load(start_ptr + seq * D * S + tile, mask=both & first, other=0.0)
                    h = tl.where(first, entering, h)
                h = tl.exp2(dts[i][None, :] * A) * h + Bs[i] * (dts[i] * xs[i])[None, :]
        for back in range(0, subs):
            s = subs - 1 - back
            at = row * T + p0 + s * SUB
            xs, dts = _numbers(x_ptr, at, D, col, within, end, SUB), _numbers(dt_ptr, at, D, col, within, end, SUB)
            dys = _numbers(dy_ptr, at, D, col, within, end, SUB)
            Bs, Cs = _maps(B_ptr, at, group, G, S, n, end, SUB), _maps(C_ptr, at, group, G, S, n, end, SUB)
            h = tl.load(scratch_ptr + (room + s) * BS * BD + inside)
            kepts = ()
            for i in tl.static_range(SUB):
                if PACKED:
                    seq, first, final = _bounds(ids_ptr, p0 + s * SUB + i, T, at + i < end)
                    entering = tl.load(start_ptr + seq * D * S + tile, mask=both & first, other=0.0)
                    h = tl.where(first, entering, h)
                kept = tl.exp2(dts[i][None, :] * A) * h
                kepts = kepts + (kept,)
                h = kept + Bs[i] * (dts[i] * xs[i])[None, :]
            for i in tl.static_range(SUB - 1, -1, -1):
                x, dt, dy, B, C, kept = xs[i], dts[i], dys[i], Bs[i], Cs[i], kepts[i]
                live = at + i < end
                if PACKED:
                    seq, first, final = _bounds(ids_ptr, p0 + s * SUB + i, T, live)
                    ending = tl.load(dlast_ptr + seq * D * S + tile, mask=both & final, other=0.0)
                    g = tl.where(final, ending, g)
                g += C * dy[None, :]
                wrote = dt * x
                by_step = g * kept  # what of the states before is kept, without a difference of states
                written = tl.sum(g * B, 0)
                dx = skip * dy + dt * written
                ddt = x * written + LN2 * tl.sum(by_step * A, 0)
                dA += by_step * dt[None, :]
                dskip += dy * x
                out = (block * rows * T + at + i) * G * S + group * S + n
                tl.store(dB_ptr + out, tl.sum(g * wrote[None, :], 1), mask=real & live)
                tl.store(dC_ptr + out, tl.sum((kept + B * wrote[None, :]) * dy[None, :], 1), mask=real & live)
                tl.store(dx_ptr + (at + i) * D + col, dx.to(dx_ptr.dtype.element_ty), mask=within & live)
                tl.store(ddt_ptr + (at + i) * D + col, ddt.to(ddt_ptr.dtype.element_ty), mask=within & live)
                g = tl.exp2(dt[None, :] * A) * g
                if PACKED:
                    tl.store(dstart_ptr + seq * D * S + tile, g, mask=both & first)
        tl.store(dA_ptr + edge, dA, mask=both)
        if skip_ptr is not None:
            tl.store(dskip_ptr + (chunk * rows + row) * D + col, dskip, mask=within)
        if not PACKED:
            tl.store(dstart_ptr + row * D * S + tile, g, mask=both & (chunk == 0))
