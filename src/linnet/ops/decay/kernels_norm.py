"""Triton kernels of the normaliser: running sums of keys, their readings, and the gradient of the division."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _chunk_bounds
from .kernels_around import linear


@triton.jit
def keys_kernel(
    q_ptr,
    k_ptr,
    g_ptr,  # [H], [tokens, H] or [tokens, H, K], see GATE
    u_ptr,
    w_ptr,  # write weights, this and x, over, floor laid out [H, tokens]
    start_ptr,  # READ: the sum that enters each chunk, [chunks, H, K]
    x_ptr,
    over_ptr,
    floor_ptr,
    own_ptr,  # what the chunk adds up to, [chunks, H, K]
    total_ptr,  # and its summed log2-decay, [chunks, H] or, by channel, [chunks, H, K]
    cu_ptr,
    table_ptr,
    scale,
    eps,
    T,
    n_rows,
    PIECE,
    H,
    HQ,
    K,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a constant per head, 2 a scalar per token, 3 a vector over the key's channels
    READ: tl.constexpr,
    REVERSE: tl.constexpr,
    BONUS: tl.constexpr,  # exclusive reading
    PACKED: tl.constexpr,
):
    """The running sum ``z_t = exp(g_t) z_{t-1} + w_t k_t`` by one warp, a few rows at a time, exact for any gate: a
    scan over the rows where it is read at each or gates lie between channels, else their weighted sum.

    READ: the normaliser ``x = scale q.z`` of a chunk (with a bonus: of the sum before the token, and of the token
    itself through ``u``) and ``over``, what a reading is multiplied by. Else what a chunk adds for some channels;
    REVERSE the same backward in time, for the gradient of z: k is q there, and w carries the gradient.
    """
    blocks = tl.cdiv(K, BK)
    pid = tl.program_id(0)
    h = (pid // blocks) % H
    chunk = pid // (blocks * H)
    first, stop = _chunk_bounds(chunk, cu_ptr, table_ptr, T, PIECE, C, PACKED)
    stop = tl.minimum(first + C, stop)
    cols = (pid % blocks) * BK + tl.arange(0, BK)
    inside = (cols < K)[None, :]
    slot = chunk.to(tl.int64) * H + h
    line = h.to(tl.int64) * n_rows
    log2e = 1.4426950408889634
    z = tl.zeros([BK], dtype=tl.float32)
    total = tl.zeros([BK], dtype=tl.float32)
    acc = tl.zeros([ROWS, BK], dtype=tl.float32)  # what adds up to z, where rows are only summed
    SCAN: tl.constexpr = READ or GATE == 3
    if READ:
        z = tl.load(start_ptr + slot * K + cols, mask=cols < K, other=0.0)
    SHIFT: tl.constexpr = 1 if READ and BONUS else 0  # what is read was written by the tokens before
    final = (tl.arange(0, ROWS) == ROWS - 1)[:, None]
    for done in range(0, stop - first, ROWS):
        nth = done + tl.arange(0, ROWS)
        t = stop - 1 - nth if REVERSE else first + nth
        valid = (t >= first) & (t < stop)
        wrote = valid & (nth >= SHIFT)
        source = t - SHIFT
        there = wrote[:, None] & inside
        at = (source.to(tl.int64) * HQ + h // (H // HQ))[:, None] * K + cols[None, :]
        write = tl.load(k_ptr + at, mask=there, other=0.0).to(tl.float32)
        if w_ptr is not None:
            write = write * tl.load(w_ptr + line + source, mask=wrote, other=0.0).to(tl.float32)[:, None]
        if REVERSE:
            write = write * scale
        if SCAN:
            keep = tl.zeros([ROWS, BK], dtype=tl.float32) + 1.0
            if GATE != 0:
                gate = source.to(tl.int64) * H + h
                if GATE == 3:
                    g = tl.load(g_ptr + gate[:, None] * K + cols[None, :], mask=there, other=0.0).to(tl.float32)
                elif GATE == 2:
                    g = tl.load(g_ptr + gate, mask=wrote, other=0.0).to(tl.float32)[:, None]
                else:
                    g = tl.where(wrote[:, None], tl.load(g_ptr + h).to(tl.float32), 0.0)
                g = tl.maximum(g, -104.0) * log2e
                total += tl.sum(tl.zeros([ROWS, BK], dtype=tl.float32) + g, 0)
                keep = keep * tl.exp2(g)
            if REVERSE and not BONUS:  # a token's own gate lies before its reading
                write = write * keep
            keep, sums = tl.associative_scan((keep, write), 0, linear)
            sums += keep * z[None, :]
            z = tl.sum(tl.where(final, sums, 0.0), 0)
        else:
            if GATE != 0:
                # What follows a row is summed from its own gates: a difference would lose it behind a reset.
                inner = (nth + 1 < done + ROWS) & (nth + 1 < stop - first)
                if GATE == 2:
                    ahead = t - 1 if REVERSE else t + 1
                    g = tl.load(g_ptr + t.to(tl.int64) * H + h, mask=valid, other=0.0).to(tl.float32)
                    after = tl.load(g_ptr + ahead.to(tl.int64) * H + h, mask=inner, other=0.0).to(tl.float32)
                else:
                    one = tl.load(g_ptr + h).to(tl.float32)
                    g, after = tl.where(valid, one, 0.0), tl.where(inner, one, 0.0)
                g, after = tl.maximum(g, -104.0) * log2e, tl.maximum(after, -104.0) * log2e
                weight = tl.cumsum(after, 0, reverse=True)
                if REVERSE and not BONUS:
                    weight += g
                write = write * tl.exp2(weight)[:, None]
                passed = tl.sum(g, 0)
                acc = acc * tl.exp2(passed)
                total += passed
            acc += write
        if READ:
            at = (t.to(tl.int64) * HQ + h // (H // HQ))[:, None] * K + cols[None, :]
            mask = valid[:, None] & inside
            q = tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if BONUS:
                own = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
                sums += own * tl.load(u_ptr + h * K + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
            x = scale * tl.sum(q * sums, 1)
            over = x
            if floor_ptr is not None:
                over = tl.maximum(tl.abs(x), tl.load(floor_ptr + line + t, mask=valid, other=1.0))
            tl.store(x_ptr + line + t, x, mask=valid)
            tl.store(over_ptr + line + t, 1.0 / (over + eps), mask=valid)
    if not READ:
        if not SCAN:
            z = tl.sum(acc, 0)
        tl.store(own_ptr + slot * K + cols, z.to(tl.float32), mask=cols < K)
        if GATE == 3:
            tl.store(total_ptr + slot * K + cols, total, mask=cols < K)
        elif GATE != 0:
            tl.store(total_ptr + slot + tl.zeros([BK], dtype=tl.int32), total, mask=cols == 0)


@triton.jit
def norm_kernel(
    do_ptr,
    o_ptr,
    part_ptr,  # instead of these their products' sums over blocks of channels, [parts, H, tokens]
    x_ptr,  # this and the following [H, tokens]
    floor_ptr,
    inverse_ptr,
    dx_ptr,  # None where only the inverse is asked for
    weighted_ptr,
    eps,
    n_rows,
    H,
    V,
    parts,
    ROWS: tl.constexpr,
    BV: tl.constexpr,
):
    """From the gradient of a normalised reading ``o = num / den``: 1 / den, by which the passes weight the late tokens,
    and the gradient of the normaliser x, divided by it, so that the same weight serves both, and itself."""
    h = tl.program_id(0) % H
    rows = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)
    mask = rows < n_rows
    line = h.to(tl.int64) * n_rows + rows
    x = tl.load(x_ptr + line, mask=mask, other=1.0)
    slope = 1.0
    den = x + eps
    if floor_ptr is not None:
        low = tl.load(floor_ptr + line, mask=mask, other=1.0)
        den = tl.maximum(tl.abs(x), low) + eps
        slope = tl.where(tl.abs(x) > low, tl.where(x > 0, 1.0, -1.0), 0.0)
    tl.store(inverse_ptr + line, 1.0 / den, mask=mask)
    if dx_ptr is not None:
        acc = tl.zeros([ROWS], dtype=tl.float32)
        if part_ptr is not None:
            for _ in range(0, parts):
                acc += tl.load(part_ptr + line, mask=mask, other=0.0)
                part_ptr += n_rows * H
        else:
            for column in range(0, V, BV):
                cols = column + tl.arange(0, BV)
                at = (rows.to(tl.int64) * H + h)[:, None] * V + cols[None, :]
                inside = mask[:, None] & (cols < V)[None, :]
                do = tl.load(do_ptr + at, mask=inside, other=0.0).to(tl.float32)
                acc += tl.sum(do * tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(dx_ptr + line, -slope * acc, mask=mask)
        tl.store(weighted_ptr + line, -slope * acc / den, mask=mask)
