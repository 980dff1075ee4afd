"""Triton kernels of the ParaGRU and ParaLSTM, token by token.

Exact, and with three or four transcendental functions a token cheaper than Newton's method wherever there are channels
enough to fill the GPU. Loads run several tokens ahead of their use.
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
            f, f_off = _sigmoid(a0 * h + p0 * c + x0, FAST)
            c = f * c + f_off * _tanh(a2 * h + x2, EXACT, False)
            o, _o = _sigmoid(a1 * h + p1 * c + x1, FAST)
            h = o * _tanh(c, EXACT, False)
            tl.store(states_at + t * 2 * D, c, mask=ins)
            tl.store(states_at + t * 2 * D + 1, h, mask=ins)
        else:
            z, keep = _sigmoid(a0 * h + x0, FAST)
            r, _r = _sigmoid(a1 * h + x1, FAST)
            h = keep * h + z * _tanh(a2 * r * h + x2, EXACT, False)
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
    before_ptr,  # states before every token, like states_ptr
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
    if LSTM:
        dh = tl.load(ds1_ptr + at + 1, mask=ins, other=0.0)
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
            c = tl.load(before_ptr + (y_at + t * D) * 2, mask=ins, other=0.0)
            h = tl.load(before_ptr + (y_at + t * D) * 2 + 1, mask=ins, other=0.0)
            f, f_off = _sigmoid(a0 * h + p0 * c + x0, FAST)
            z = _tanh(a2 * h + x2, EXACT, False)
            new = f * c + f_off * z
            o, o_off = _sigmoid(a1 * h + p1 * new + x1, FAST)
            y = _tanh(new, EXACT, False)
            d1 = g * y * o * o_off
            dc += g * o * (1.0 - y * y) + d1 * p1
            d0 = dc * (c - z) * f * f_off
            d2 = dc * f_off * (1.0 - z * z)
            dh = a0 * d0 + a1 * d1 + a2 * d2
            dc = dc * f + d0 * p0
            da2 += d2 * h
            dp0 += d0 * c
            dp1 += d1 * new
        else:
            h = tl.load(before_ptr + y_at + t * D, mask=ins, other=0.0)
            z, keep = _sigmoid(a0 * h + x0, FAST)
            r, r_off = _sigmoid(a1 * h + x1, FAST)
            y = _tanh(a2 * r * h + x2, EXACT, False)
            d2 = g * z * (1.0 - y * y)
            d0 = g * (y - h) * z * keep
            d1 = d2 * a2 * h * r * r_off
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
