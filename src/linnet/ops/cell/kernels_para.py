"""Triton kernels of the ParaGRU and ParaLSTM: token by token, and tile by tile of the sequence.

Token by token takes three or four transcendental functions a token, and is what a GPU does best wherever there are
channels enough to fill it. Loads run several tokens ahead of their use.

With few channels it waits for one token after the other. A tile of tokens is then solved at once by Newton's method,
with a scan over the tile in a program's registers, and the next tile starts from its exact end. A tile that has not
converged after a few steps is run token by token after all. Back in time one scan a tile is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _sigmoid, _tanh

AHEAD = tl.constexpr(8)


@triton.jit
def _span(n, cu_ptr, T, PACKED: tl.constexpr):
    """First token and number of tokens of a sequence."""
    if PACKED:
        first = tl.load(cu_ptr + n)
        length = tl.load(cu_ptr + n + 1) - first
    else:
        first = n * T
        length = T
    return first.to(tl.int64), length


@triton.jit
def _weights(A_ptr, C_ptr, D, cols, ins, LSTM: tl.constexpr):
    a0 = tl.load(A_ptr + cols, mask=ins, other=0.0)
    a1 = tl.load(A_ptr + D + cols, mask=ins, other=0.0)
    a2 = tl.load(A_ptr + 2 * D + cols, mask=ins, other=0.0)
    c0 = a0
    c1 = a0
    if LSTM:
        c0 = tl.load(C_ptr + cols, mask=ins, other=0.0)
        c1 = tl.load(C_ptr + D + cols, mask=ins, other=0.0)
    return a0, a1, a2, c0, c1


@triton.jit
def _gru(h, x0, x1, x2, a0, a1, a2, EXACT: tl.constexpr, FAST: tl.constexpr):
    """The gates around h, and the derivative of the state after."""
    z, keep = _sigmoid(a0 * h + x0, FAST)
    r, r_off = _sigmoid(a1 * h + x1, FAST)
    n = _tanh(a2 * r * h + x2, EXACT, False)
    slope = z * (1.0 - n * n) * a2
    J = keep + (n - h) * z * keep * a0 + slope * (r + h * r * r_off * a1)
    return z, keep, r, r_off, n, J


@triton.jit
def _lstm(c, h, x0, x1, x2, a0, a1, a2, p0, p1, EXACT: tl.constexpr, FAST: tl.constexpr):
    """The gates around (c, h), the memory after, and the derivatives of (c, h) after."""
    f, f_off = _sigmoid(a0 * h + p0 * c + x0, FAST)
    z = _tanh(a2 * h + x2, EXACT, False)
    new = f * c + f_off * z
    o, o_off = _sigmoid(a1 * h + p1 * new + x1, FAST)
    y = _tanh(new, EXACT, False)
    df = (c - z) * f * f_off
    do = y * o * o_off
    cc = f + df * p0
    ch = df * a0 + f_off * (1.0 - z * z) * a2
    through = do * p1 + o * (1.0 - y * y)
    return f, f_off, z, new, o, o_off, y, cc, ch, through * cc, do * a1 + through * ch


@triton.jit
def _gru_back(g, h, z, keep, r, r_off, n, a2):
    """Gradients of the gates' inputs from that of the state after."""
    d2 = g * z * (1.0 - n * n)
    return g * (n - h) * z * keep, d2 * a2 * h * r * r_off, d2


@triton.jit
def _lstm_back(g, dc, c, f, f_off, z, o, o_off, y, p1):
    """Gradients of the gates' inputs, and the whole one of the memory after, from those of (c, h) after."""
    d1 = g * y * o * o_off
    dc += g * o * (1.0 - y * y) + d1 * p1
    return dc * (c - z) * f * f_off, d1, dc * f_off * (1.0 - z * z), dc


@triton.jit
def para_forward_kernel(
    x_ptr,  # [tokens, 3, D]
    A_ptr,  # [3, D] fp32
    C_ptr,  # [2, D] fp32
    s0_ptr,  # [N, D], ParaLSTM [N, D, 2] (c, h), fp32
    y_ptr,  # [tokens, D]
    states_ptr,  # [tokens, D] or [tokens, D, 2] fp32
    s1_ptr,
    cu_ptr,
    T,
    D,
    BD: tl.constexpr,
    LSTM: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
):
    n = tl.program_id(1)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    ins = cols < D
    first, length = _span(n, cu_ptr, T, PACKED)
    a0, a1, a2, p0, p1 = _weights(A_ptr, C_ptr, D, cols, ins, LSTM)
    PARTS: tl.constexpr = 2 if LSTM else 1
    at = (n * D + cols) * PARTS
    c = tl.load(s0_ptr + at, mask=ins, other=0.0)
    h = c
    if LSTM:
        h = tl.load(s0_ptr + at + 1, mask=ins, other=0.0)
    x_at = x_ptr + first * 3 * D + cols
    y_at = y_ptr + first * D + cols
    states_at = states_ptr + (first * D + cols) * PARTS
    for t in tl.range(0, length, num_stages=AHEAD):
        x0 = tl.load(x_at + t * 3 * D, mask=ins, other=0.0).to(tl.float32)
        x1 = tl.load(x_at + t * 3 * D + D, mask=ins, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + t * 3 * D + 2 * D, mask=ins, other=0.0).to(tl.float32)
        if LSTM:
            _f, _f_off, _z, c, o, _o_off, y, _cc, _ch, _hc, _hh = _lstm(
                c, h, x0, x1, x2, a0, a1, a2, p0, p1, EXACT, FAST
            )
            h = o * y
            tl.store(states_at + t * 2 * D, c, mask=ins)
            tl.store(states_at + t * 2 * D + 1, h, mask=ins)
        else:
            z, keep, _r, _r_off, y, _J = _gru(h, x0, x1, x2, a0, a1, a2, EXACT, FAST)
            h = keep * h + z * y
            tl.store(states_at + t * D, h, mask=ins)
        tl.store(y_at + t * D, h.to(y_ptr.dtype.element_ty), mask=ins)
    if LSTM:
        tl.store(s1_ptr + at, c, mask=ins)
        tl.store(s1_ptr + at + 1, h, mask=ins)
    else:
        tl.store(s1_ptr + at, h, mask=ins)


@triton.jit
def para_backward_kernel(
    x_ptr,
    A_ptr,
    C_ptr,
    s0_ptr,
    states_ptr,
    dy_ptr,
    ds1_ptr,
    dx_ptr,
    dA_ptr,  # [N, 5, D]: of A and C, summed over a sequence
    ds0_ptr,
    cu_ptr,
    T,
    D,
    BD: tl.constexpr,
    LSTM: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
):
    n = tl.program_id(1)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    ins = cols < D
    first, length = _span(n, cu_ptr, T, PACKED)
    a0, a1, a2, p0, p1 = _weights(A_ptr, C_ptr, D, cols, ins, LSTM)
    PARTS: tl.constexpr = 2 if LSTM else 1
    at = (n * D + cols) * PARTS
    dc = tl.load(ds1_ptr + at, mask=ins, other=0.0)
    dh = dc
    c_first = tl.load(s0_ptr + at, mask=ins, other=0.0)
    h_first = c_first
    if LSTM:
        dh = tl.load(ds1_ptr + at + 1, mask=ins, other=0.0)
        h_first = tl.load(s0_ptr + at + 1, mask=ins, other=0.0)
    da0 = tl.zeros([BD], tl.float32)
    da1 = da0
    da2 = da0
    dp0 = da0
    dp1 = da0
    x_at = first * 3 * D + cols
    y_at = first * D + cols
    out = dx_ptr.dtype.element_ty
    for back in tl.range(0, length, num_stages=AHEAD):
        t = length - 1 - back
        x0 = tl.load(x_ptr + x_at + t * 3 * D, mask=ins, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + x_at + t * 3 * D + D, mask=ins, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + x_at + t * 3 * D + 2 * D, mask=ins, other=0.0).to(tl.float32)
        g = dh + tl.load(dy_ptr + y_at + t * D, mask=ins, other=0.0).to(tl.float32)
        if LSTM:
            c = tl.load(states_ptr + (y_at + t * D - D) * 2, mask=ins & (t > 0), other=0.0)
            h = tl.load(states_ptr + (y_at + t * D - D) * 2 + 1, mask=ins & (t > 0), other=0.0)
            c = tl.where(t > 0, c, c_first)
            h = tl.where(t > 0, h, h_first)
            f, f_off, z, new, o, o_off, y, _cc, _ch, _hc, _hh = _lstm(c, h, x0, x1, x2, a0, a1, a2, p0, p1, EXACT, FAST)
            d0, d1, d2, dc = _lstm_back(g, dc, c, f, f_off, z, o, o_off, y, p1)
            dh = a0 * d0 + a1 * d1 + a2 * d2
            dc = dc * f + d0 * p0
            da2 += d2 * h
            dp0 += d0 * c
            dp1 += d1 * new
        else:
            h = tl.load(states_ptr + y_at + t * D - D, mask=ins & (t > 0), other=0.0)
            h = tl.where(t > 0, h, h_first)
            z, keep, r, r_off, y, _J = _gru(h, x0, x1, x2, a0, a1, a2, EXACT, FAST)
            d0, d1, d2 = _gru_back(g, h, z, keep, r, r_off, y, a2)
            dh = g * keep + a0 * d0 + a1 * d1 + a2 * r * d2
            da2 += d2 * r * h
        da0 += d0 * h
        da1 += d1 * h
        tl.store(dx_ptr + x_at + t * 3 * D, d0.to(out), mask=ins)
        tl.store(dx_ptr + x_at + t * 3 * D + D, d1.to(out), mask=ins)
        tl.store(dx_ptr + x_at + t * 3 * D + 2 * D, d2.to(out), mask=ins)
    sums = dA_ptr + n.to(tl.int64) * 5 * D + cols
    tl.store(sums, da0, mask=ins)
    tl.store(sums + D, da1, mask=ins)
    tl.store(sums + 2 * D, da2, mask=ins)
    if LSTM:
        tl.store(sums + 3 * D, dp0, mask=ins)
        tl.store(sums + 4 * D, dp1, mask=ins)
        tl.store(ds0_ptr + at, dc, mask=ins)
        tl.store(ds0_ptr + at + 1, dh, mask=ins)
    else:
        tl.store(ds0_ptr + at, dh, mask=ins)


# Tiles. A channel's state is one number (GRU: h) or two (LSTM: c, h); for the GRU the second is carried along unused.


@triton.jit
def _then1(a, b, c, d):
    """First y -> a y + b, then y -> c y + d."""
    return a * c, b * c + d


@triton.jit
def _then2(a0, a1, a2, a3, u, v, b0, b1, b2, b3, x, y):
    """The same for maps of pairs, their matrices [[m0, m1], [m2, m3]]."""
    return (
        b0 * a0 + b1 * a2,
        b0 * a1 + b1 * a3,
        b2 * a0 + b3 * a2,
        b2 * a1 + b3 * a3,
        b0 * u + b1 * v + x,
        b2 * u + b3 * v + y,
    )


@triton.jit
def _before(x, edge, BT: tl.constexpr):
    """In every row of a tile what is in the row before, ``edge`` in the first."""
    rows = tl.arange(0, BT)[:, None] + tl.zeros_like(x).to(tl.int32)
    return tl.where(rows > 0, tl.gather(x, tl.maximum(rows - 1, 0), 0), edge[None, :])


@triton.jit
def _tokens(ptr, at, stride, rows, inside):
    return tl.load(ptr + at + rows * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _largest(x):
    """The largest size of an entry; NaN is infinite."""
    return tl.max(tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1), 0)


@triton.jit
def para_tile_forward_kernel(
    x_ptr,  # as in para_forward_kernel
    A_ptr,
    C_ptr,
    s0_ptr,
    y_ptr,
    states_ptr,
    s1_ptr,
    cu_ptr,
    tolerance,  # residual after which one more step is enough
    steps,  # of Newton, at most
    T,
    D,
    BT: tl.constexpr,
    BD: tl.constexpr,
    LSTM: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
):
    n = tl.program_id(1)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    ins = cols < D
    first, length = _span(n, cu_ptr, T, PACKED)
    a0, a1, a2, p0, p1 = _weights(A_ptr, C_ptr, D, cols, ins, LSTM)
    PARTS: tl.constexpr = 2 if LSTM else 1
    at = (n * D + cols) * PARTS
    c_in = tl.load(s0_ptr + at, mask=ins, other=0.0)
    h_in = c_in
    if LSTM:
        h_in = tl.load(s0_ptr + at + 1, mask=ins, other=0.0)
    rows = tl.arange(0, BT)[:, None]
    for begin in range(0, length, BT):
        count = tl.minimum(BT, length - begin)
        inside = (rows < count) & ins[None, :]
        x_at = (first + begin) * 3 * D + cols
        out_at = (first + begin) * D + cols
        x0 = _tokens(x_ptr, x_at[None, :], 3 * D, rows, inside)
        x1 = _tokens(x_ptr, x_at[None, :] + D, 3 * D, rows, inside)
        x2 = _tokens(x_ptr, x_at[None, :] + 2 * D, 3 * D, rows, inside)
        # No state leaves [-1, 1], or the size of the one before the tile; no guess needs to. The first is 0.
        c_most = tl.maximum(tl.abs(c_in), 1.0)[None, :]
        h_most = tl.maximum(tl.abs(h_in), 1.0)[None, :]
        c = tl.zeros([BT, BD], tl.float32)
        h = c
        open = count > 0
        k = 0
        while (k < steps) & open:
            c_old = _before(c, c_in, BT)
            h_old = _before(h, h_in, BT)
            if LSTM:
                _f, _f_off, _z, c_new, o, _o_off, y, cc, ch, hc, hh = _lstm(
                    c_old, h_old, x0, x1, x2, a0, a1, a2, p0, p1, EXACT, FAST
                )
                dc = tl.where(inside, c_new - c, 0.0)
                dh = tl.where(inside, o * y - h, 0.0)
                residual = tl.maximum(_largest(dc / c_most), _largest(dh / h_most))
                _a, _b, _c, _d, dc, dh = tl.associative_scan((cc, ch, hc, hh, dc, dh), 0, _then2)
                c = tl.minimum(tl.maximum(c + dc, -c_most), c_most)
            else:
                z, keep, _r, _r_off, y, J = _gru(h_old, x0, x1, x2, a0, a1, a2, EXACT, FAST)
                dh = tl.where(inside, keep * h_old + z * y - h, 0.0)
                residual = _largest(dh / h_most)
                _a, dh = tl.associative_scan((J, dh), 0, _then1)
            h = tl.minimum(tl.maximum(h + dh, -h_most), h_most)
            open = residual > tolerance
            k += 1
        if open:
            for t in range(0, count):
                x0_t = tl.load(x_ptr + x_at + t * 3 * D, mask=ins, other=0.0).to(tl.float32)
                x1_t = tl.load(x_ptr + x_at + t * 3 * D + D, mask=ins, other=0.0).to(tl.float32)
                x2_t = tl.load(x_ptr + x_at + t * 3 * D + 2 * D, mask=ins, other=0.0).to(tl.float32)
                if LSTM:
                    _f, _f_off, _z, c_in, o_t, _o_off, y_t, _cc, _ch, _hc, _hh = _lstm(
                        c_in, h_in, x0_t, x1_t, x2_t, a0, a1, a2, p0, p1, EXACT, FAST
                    )
                    h_in = o_t * y_t
                    tl.store(states_ptr + (out_at + t * D) * 2, c_in, mask=ins)
                    tl.store(states_ptr + (out_at + t * D) * 2 + 1, h_in, mask=ins)
                else:
                    z_t, keep_t, _r, _r_off, y_t, _J = _gru(h_in, x0_t, x1_t, x2_t, a0, a1, a2, EXACT, FAST)
                    h_in = keep_t * h_in + z_t * y_t
                    tl.store(states_ptr + out_at + t * D, h_in, mask=ins)
                tl.store(y_ptr + out_at + t * D, h_in.to(y_ptr.dtype.element_ty), mask=ins)
        else:
            if LSTM:
                states_at = states_ptr + (out_at[None, :] + rows * D) * 2
                tl.store(states_at, c, mask=inside)
                tl.store(states_at + 1, h, mask=inside)
                c_in = tl.sum(tl.where(rows == count - 1, c, 0.0), 0)
            else:
                tl.store(states_ptr + out_at[None, :] + rows * D, h, mask=inside)
            h_in = tl.sum(tl.where(rows == count - 1, h, 0.0), 0)
            tl.store(y_ptr + out_at[None, :] + rows * D, h.to(y_ptr.dtype.element_ty), mask=inside)
    if LSTM:
        tl.store(s1_ptr + at, c_in, mask=ins)
        tl.store(s1_ptr + at + 1, h_in, mask=ins)
    else:
        tl.store(s1_ptr + at, h_in, mask=ins)


@triton.jit
def para_tile_backward_kernel(
    x_ptr,  # as in para_backward_kernel
    A_ptr,
    C_ptr,
    s0_ptr,
    states_ptr,
    dy_ptr,
    ds1_ptr,
    dx_ptr,
    dA_ptr,
    ds0_ptr,
    cu_ptr,
    T,
    D,
    BT: tl.constexpr,
    BD: tl.constexpr,
    LSTM: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
):
    n = tl.program_id(1)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    ins = cols < D
    first, length = _span(n, cu_ptr, T, PACKED)
    a0, a1, a2, p0, p1 = _weights(A_ptr, C_ptr, D, cols, ins, LSTM)
    PARTS: tl.constexpr = 2 if LSTM else 1
    at = (n * D + cols) * PARTS
    dc_in = tl.load(ds1_ptr + at, mask=ins, other=0.0)
    dh_in = dc_in
    c_first = tl.load(s0_ptr + at, mask=ins, other=0.0)
    h_first = c_first
    if LSTM:
        dh_in = tl.load(ds1_ptr + at + 1, mask=ins, other=0.0)
        h_first = tl.load(s0_ptr + at + 1, mask=ins, other=0.0)
    da0 = tl.zeros([BT, BD], tl.float32)
    da1 = da0
    da2 = da0
    dp0 = da0
    dp1 = da0
    nothing = tl.zeros([BD], tl.float32)
    rows = tl.arange(0, BT)[:, None]  # from a tile's last token to its first
    out = dx_ptr.dtype.element_ty
    tiles = tl.cdiv(length, BT)
    for back in range(0, tiles):
        begin = (tiles - 1 - back) * BT
        count = tl.minimum(BT, length - begin)
        inside = (rows < count) & ins[None, :]
        back_rows = count - 1 - rows
        past = inside & (begin + back_rows > 0)
        x_at = ((first + begin) * 3 * D + cols)[None, :]
        out_at = ((first + begin) * D + cols)[None, :]
        x0 = _tokens(x_ptr, x_at, 3 * D, back_rows, inside)
        x1 = _tokens(x_ptr, x_at + D, 3 * D, back_rows, inside)
        x2 = _tokens(x_ptr, x_at + 2 * D, 3 * D, back_rows, inside)
        # The gradient of a state: its own, and what the scan brings from the states after it.
        wh = _tokens(dy_ptr, out_at, D, back_rows, inside)
        wh += tl.where(rows == 0, dh_in[None, :], 0.0)
        if LSTM:
            c = _tokens(states_ptr, (out_at - D) * 2, 2 * D, back_rows, past)
            h = _tokens(states_ptr, (out_at - D) * 2 + 1, 2 * D, back_rows, past)
            c = tl.where(begin + back_rows > 0, c, c_first[None, :])
            h = tl.where(begin + back_rows > 0, h, h_first[None, :])
            wc = tl.where(rows == 0, dc_in[None, :], 0.0)
            f, f_off, z, new, o, o_off, y, cc, ch, hc, hh = _lstm(c, h, x0, x1, x2, a0, a1, a2, p0, p1, EXACT, FAST)
            _a, _b, _c, _d, mc, mh = tl.associative_scan(
                (cc, hc, ch, hh, cc * wc + hc * wh, ch * wc + hh * wh), 0, _then2
            )
            dc_in = tl.sum(tl.where(rows == count - 1, mc, 0.0), 0)
            dh_in = tl.sum(tl.where(rows == count - 1, mh, 0.0), 0)
            g = wh + _before(mh, nothing, BT)
            d0, d1, d2, _dc = _lstm_back(g, wc + _before(mc, nothing, BT), c, f, f_off, z, o, o_off, y, p1)
            da2 += tl.where(inside, d2 * h, 0.0)
            dp0 += tl.where(inside, d0 * c, 0.0)
            dp1 += tl.where(inside, d1 * new, 0.0)
        else:
            h = _tokens(states_ptr, out_at - D, D, back_rows, past)
            h = tl.where(begin + back_rows > 0, h, h_first[None, :])
            z, keep, r, r_off, y, J = _gru(h, x0, x1, x2, a0, a1, a2, EXACT, FAST)
            _a, mh = tl.associative_scan((J, J * wh), 0, _then1)
            dh_in = tl.sum(tl.where(rows == count - 1, mh, 0.0), 0)
            g = wh + _before(mh, nothing, BT)
            d0, d1, d2 = _gru_back(g, h, z, keep, r, r_off, y, a2)
            da2 += tl.where(inside, d2 * r * h, 0.0)
        da0 += tl.where(inside, d0 * h, 0.0)
        da1 += tl.where(inside, d1 * h, 0.0)
        dx_at = dx_ptr + x_at + back_rows * 3 * D
        tl.store(dx_at, d0.to(out), mask=inside)
        tl.store(dx_at + D, d1.to(out), mask=inside)
        tl.store(dx_at + 2 * D, d2.to(out), mask=inside)
    sums = dA_ptr + n.to(tl.int64) * 5 * D + cols
    tl.store(sums, tl.sum(da0, 0), mask=ins)
    tl.store(sums + D, tl.sum(da1, 0), mask=ins)
    tl.store(sums + 2 * D, tl.sum(da2, 0), mask=ins)
    if LSTM:
        tl.store(sums + 3 * D, tl.sum(dp0, 0), mask=ins)
        tl.store(sums + 4 * D, tl.sum(dp1, 0), mask=ins)
        tl.store(ds0_ptr + at, dc_in, mask=ins)
        tl.store(ds0_ptr + at + 1, dh_in, mask=ins)
    else:
        tl.store(ds0_ptr + at, dh_in, mask=ins)
