"""Triton kernels of the short convolution.

A program walks a run of L tokens of some channels, with the last inputs of each in registers: what is read of the
memory is read once (but for the W - 1 tokens where two runs meet) and nothing but the output is written. Backward, a
walk makes the gradient before the activation again and goes W - 1 tokens further than its run, so that no two programs
write to one place; what the runs add to the gradient of the taps is summed by a second launch. The last programs of a
launch have no run: they write the states after the sequences, or the gradients of those before.

Tokens of another sequence of a packed row are never read: where one begins, its state replaces the inputs kept.
"""
# ruff: noqa: RUF005 (Triton's language has no unpacking into tuples)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiple(n, ALIGNED: tl.constexpr):
    """A number so that the compiler sees of what it is a multiple: then it moves words of so many channels."""
    return n // ALIGNED * ALIGNED


@triton.jit
def _place(D, BD: tl.constexpr):
    """Run and channels of a program."""
    blocks = tl.cdiv(D, BD)
    cols = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    return tl.program_id(0) // blocks, cols, cols < D


@triton.jit
def _run(unit, runs, L, ids_ptr, cu_ptr, PACKED: tl.constexpr):
    """Row of tokens and first token of a run, the sequence of that and its place in it."""
    row = unit // runs
    t0 = (unit - row * runs) * L
    n, p = row, t0
    if PACKED:
        n = tl.load(ids_ptr + t0)
        p = t0 - tl.load(cu_ptr + n)
    return row.to(tl.int64), t0, n, p


@triton.jit
def _bounds(cu_ptr, n, T, PACKED: tl.constexpr):
    """Where a sequence begins and ends in its row of tokens, and the row."""
    if PACKED:
        begin = tl.load(cu_ptr + n)
        end = tl.load(cu_ptr + n + 1)
        row = n * 0
    else:
        begin = n * 0
        end = begin + T
        row = n
    return begin, end, row.to(tl.int64)


@triton.jit
def _taps(w_ptr, bias_ptr, cols, within, W: tl.constexpr):
    """Those of every channel, the oldest first, and the bias."""
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(w_ptr + cols * W + i, mask=within, other=0.0).to(tl.float32),)
    if bias_ptr is None:
        bias = tl.zeros(cols.shape, tl.float32)
    else:
        bias = tl.load(bias_ptr + cols, mask=within, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _waiting(tail_ptr, n, slot, D, cols, ok, W: tl.constexpr):
    """An input in the state before a sequence; zeros where there is none."""
    if tail_ptr is None:
        kept = tl.zeros(cols.shape, tl.float32)
    else:
        kept = tl.load(tail_ptr + (n.to(tl.int64) * (W - 1) + slot) * D + cols, mask=ok, other=0.0)
    return kept


@triton.jit
def _token(ptr, base, t, step, cols, ok):
    return tl.load(ptr + (base + t.to(tl.int64) * step) + cols, mask=ok, other=0.0)


@triton.jit
def _entering(x_ptr, tail_ptr, base, t, p, n, step, D, cols, within, W: tl.constexpr):
    """The W - 1 inputs before a token ``t`` of a row that is the ``p``-th of its sequence."""
    window = ()
    for i in tl.static_range(W - 1):
        back = W - 1 - i
        x = _token(x_ptr, base, t - back, step, cols, within & (p >= back)).to(tl.float32)
        kept = _waiting(tail_ptr, n, p + i, D, cols, within & (p < back), W)
        window = window + (x + kept.to(x_ptr.dtype.element_ty).to(tl.float32),)
    return window


@triton.jit
def _next(window, n, p, ids_ptr, t, there, x_ptr, tail_ptr, D, cols, within, W: tl.constexpr):
    """The inputs before a packed token, its sequence and its place in that, from those of the token before it."""
    now = tl.load(ids_ptr + t, mask=there, other=0)
    first = there & (now != n)
    new = ()
    for i in tl.static_range(W - 1):
        kept = _waiting(tail_ptr, now, i, D, cols, within & first, W)
        new = new + (tl.where(first, kept.to(x_ptr.dtype.element_ty).to(tl.float32), window[i]),)
    return new, tl.where(there, now, n), tl.where(first, 0, p)


@triton.jit
def _answer(window, taps, bias, W: tl.constexpr):
    total = bias
    for i in tl.static_range(W):
        total += window[i] * taps[i]
    return total


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-tl.maximum(x, -80.0)))  # beyond, the power would overflow


@triton.jit(do_not_specialize=["T", "L", "runs", "units"])
def forward_kernel(
    x_ptr,
    w_ptr,  # [D, W]
    bias_ptr,
    tail_ptr,  # [rows, W - 1, D]
    y_ptr,  # [B, T, D]
    after_ptr,  # [rows, W - 1, D]
    cu_ptr,
    ids_ptr,
    T,
    L,
    runs,  # of a row of tokens
    units,  # of all
    D,
    x_row,
    x_step,
    W: tl.constexpr,
    U: tl.constexpr,  # tokens on their way at a time
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
):
    D, x_row, x_step = _multiple(D, ALIGNED), _multiple(x_row, ALIGNED), _multiple(x_step, ALIGNED)
    unit, cols, within = _place(D, BD)
    if unit < units:
        row, t0, n, p = _run(unit, runs, L, ids_ptr, cu_ptr, PACKED)
        base = row * x_row
        taps, bias = _taps(w_ptr, bias_ptr, cols, within, W)
        window = _entering(x_ptr, tail_ptr, base, t0, p, n, x_step, D, cols, within, W)
        for u in range(0, tl.minimum(L, T - t0), U):
            t1 = t0 + u
            xs = ()
            for j in tl.static_range(U):
                xs = xs + (_token(x_ptr, base, t1 + j, x_step, cols, within & (t1 + j < T)),)
            for j in tl.static_range(U):
                t = t1 + j
                if PACKED:
                    window, n, p = _next(window, n, p, ids_ptr, t, t < T, x_ptr, tail_ptr, D, cols, within, W)
                window = window + (xs[j].to(tl.float32),)
                y = _answer(window, taps, bias, W)
                if SILU:
                    y = y * _sigmoid(y)
                at = (row * T + t) * D
                tl.store(y_ptr + at + cols, y.to(y_ptr.dtype.element_ty), mask=within & (t < T))
                window = window[1:]
    else:
        n = unit - units
        begin, end, row = _bounds(cu_ptr, n, T, PACKED)
        slots = n.to(tl.int64) * (W - 1)
        for i in tl.static_range(W - 1):
            t = end - (W - 1) + i
            kept = _token(x_ptr, row * x_row, t, x_step, cols, within & (t >= begin)).to(tl.float32)
            # What merely waits keeps its precision.
            kept += _waiting(tail_ptr, n, end - begin + i, D, cols, within & (t < begin), W)
            tl.store(after_ptr + (slots + i) * D + cols, kept, mask=within)


@triton.jit
def _back(window, dy, taps, bias, sums, p, W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr):
    """A token's gradient before the activation, and added to what its W inputs, the oldest first, have so far."""
    total = _answer(window, taps, bias, W)
    if SILU:
        s = _sigmoid(total)
        dy = dy * (s + total * s * (1.0 - s))
    new = ()
    for i in tl.static_range(W):
        mine = dy
        if PACKED:  # inputs of another sequence have no part in it
            mine = tl.where(p >= W - 1 - i, dy, 0.0)
        new = new + (sums[i] + mine * taps[i],)
    return dy, new


@triton.jit
def _write(
    dx_ptr, dafter_ptr, cu_ptr, ids_ptr, d, row, t, t0, T, D, cols, within, W: tl.constexpr, PACKED: tl.constexpr
):
    """The gradient of a token of the run, with what comes through the state after its sequence."""
    mine = (t >= t0) & (t < T)
    if dafter_ptr is not None:
        n = row
        if PACKED:
            n = tl.load(ids_ptr + t, mask=mine, other=0)
        _begin, end, _row = _bounds(cu_ptr, n, T, PACKED)
        slot = W - 1 - (end - t)
        d += _waiting(dafter_ptr, n, slot, D, cols, within & mine & (slot >= 0), W)
    tl.store(dx_ptr + (row * T + t) * D + cols, d.to(dx_ptr.dtype.element_ty), mask=within & mine)


@triton.jit(do_not_specialize=["T", "L", "runs", "units"])
def backward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    tail_ptr,
    dy_ptr,
    dafter_ptr,
    dx_ptr,  # [B, T, D]
    dw_ptr,  # by runs, [units, W + 1, D], the bias last
    dtail_ptr,  # [rows, W - 1, D]
    cu_ptr,
    ids_ptr,
    T,
    L,
    runs,
    units,
    D,
    x_row,
    x_step,
    dy_row,
    dy_step,
    W: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
):
    D, x_row, x_step = _multiple(D, ALIGNED), _multiple(x_row, ALIGNED), _multiple(x_step, ALIGNED)
    dy_row, dy_step = _multiple(dy_row, ALIGNED), _multiple(dy_step, ALIGNED)
    unit, cols, within = _place(D, BD)
    taps, bias = _taps(w_ptr, bias_ptr, cols, within, W)
    zero = tl.zeros([BD], tl.float32)
    sums = ()
    for _i in tl.static_range(W - 1):
        sums = sums + (zero,)
    if unit < units:
        row, t0, n, p = _run(unit, runs, L, ids_ptr, cu_ptr, PACKED)
        base, dbase = row * x_row, row * dy_row
        window = _entering(x_ptr, tail_ptr, base, t0, p, n, x_step, D, cols, within, W)
        dw, dbias = sums + (zero,), zero
        for u in range(0, L, U):
            t1 = t0 + u
            xs, dys = (), ()
            for j in tl.static_range(U):
                ok = within & (t1 + j < T)
                xs = xs + (_token(x_ptr, base, t1 + j, x_step, cols, ok),)
                dys = dys + (_token(dy_ptr, dbase, t1 + j, dy_step, cols, ok),)
            for j in tl.static_range(U):
                t = t1 + j
                if PACKED:
                    window, n, p = _next(window, n, p, ids_ptr, t, t < T, x_ptr, tail_ptr, D, cols, within, W)
                window = window + (xs[j].to(tl.float32),)
                d, sums = _back(window, dys[j].to(tl.float32), taps, bias, sums + (zero,), p, W, SILU, PACKED)
                new = ()
                for i in tl.static_range(W):
                    new = new + (dw[i] + d * window[i],)
                dw = new
                dbias += d
                _write(
                    dx_ptr, dafter_ptr, cu_ptr, ids_ptr, sums[0], row, t - (W - 1), t0, T, D, cols, within, W, PACKED
                )
                window, sums, p = window[1:], sums[1:], p + 1
        if dw_ptr is not None:
            for i in tl.static_range(W):
                tl.store(dw_ptr + (unit.to(tl.int64) * (W + 1) + i) * D + cols, dw[i], mask=within)
            tl.store(dw_ptr + (unit.to(tl.int64) * (W + 1) + W) * D + cols, dbias, mask=within)
        for j in tl.static_range(W - 1):  # the next run's first tokens have read the last of this one
            t = t0 + L + j
            ok = within & (t < T)
            if PACKED:
                window, n, p = _next(window, n, p, ids_ptr, t, t < T, x_ptr, tail_ptr, D, cols, within, W)
            window = window + (_token(x_ptr, base, t, x_step, cols, ok).to(tl.float32),)
            dy = _token(dy_ptr, dbase, t, dy_step, cols, ok).to(tl.float32)
            _d, sums = _back(window, dy, taps, bias, sums + (zero,), p, W, SILU, PACKED)
            _write(dx_ptr, dafter_ptr, cu_ptr, ids_ptr, sums[0], row, t - (W - 1), t0, T, D, cols, within, W, PACKED)
            window, sums, p = window[1:], sums[1:], p + 1
    elif dtail_ptr is not None:
        n = unit - units
        begin, end, row = _bounds(cu_ptr, n, T, PACKED)
        slots = n.to(tl.int64) * (W - 1)
        window = _entering(x_ptr, tail_ptr, row * x_row, begin, 0, n, x_step, D, cols, within, W)
        for j in tl.static_range(W - 1):
            ok = within & (begin + j < end)
            window = window + (_token(x_ptr, row * x_row, begin + j, x_step, cols, ok).to(tl.float32),)
            dy = _token(dy_ptr, row * dy_row, begin + j, dy_step, cols, ok).to(tl.float32)
            _d, sums = _back(window, dy, taps, bias, sums + (zero,), j, W, SILU, False)
            d = sums[0] + _waiting(dafter_ptr, n, j - (end - begin), D, cols, within & (j >= end - begin), W)
            tl.store(dtail_ptr + (slots + j) * D + cols, d, mask=within)
            window, sums = window[1:], sums[1:]


@triton.jit(do_not_specialize=["units"])
def sum_kernel(part_ptr, dw_ptr, dbias_ptr, units, D, W: tl.constexpr, BD: tl.constexpr, BU: tl.constexpr):
    """The gradients of the taps ``[D, W]`` and the bias from those by runs, ``[units, W + 1, D]``."""
    i = tl.program_id(1)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros([BU, BD], tl.float32)
    for start in range(0, units, BU):
        unit = start + tl.arange(0, BU)[:, None]
        at = (unit.to(tl.int64) * (W + 1) + i) * D + cols[None, :]
        total += tl.load(part_ptr + at, mask=(unit < units) & (cols < D)[None, :], other=0.0)
    d = tl.sum(total, 0)
    if i < W:
        tl.store(dw_ptr + cols * W + i, d.to(dw_ptr.dtype.element_ty), mask=cols < D)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + cols, d.to(dbias_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def step_kernel(
    x_ptr, w_ptr, bias_ptr, tail_ptr, y_ptr, after_ptr, D, x_row, W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr
):
    """One token of a row; the state after it may lie where the one before it does."""
    n, cols, within = _place(D, BD)
    taps, y = _taps(w_ptr, bias_ptr, cols, within, W)
    kept = ()
    for i in tl.static_range(W - 1):
        kept = kept + (_waiting(tail_ptr, n, i, D, cols, within, W),)
    kept = kept + (_token(x_ptr, 0, n, x_row, cols, within).to(tl.float32),)
    for i in tl.static_range(W):
        y += kept[i].to(x_ptr.dtype.element_ty).to(tl.float32) * taps[i]
    if SILU:
        y = y * _sigmoid(y)
    n = n.to(tl.int64)
    tl.store(y_ptr + n * D + cols, y.to(y_ptr.dtype.element_ty), mask=within)
    for i in tl.static_range(W - 1):
        tl.store(after_ptr + (n * (W - 1) + i) * D + cols, kept[i + 1], mask=within)
