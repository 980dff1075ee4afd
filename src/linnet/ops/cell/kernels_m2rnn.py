"""Triton kernels of the M2RNN: one program a head of a sequence, its state in registers from first to last token.

The backward kernel goes back piece by piece of KEEP tokens. It runs a piece forward from the state that was kept before
it, leaving the states of its tokens in a scratch of its own, and then back over them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _tanh, _tanh_slope
from .kernels_para import _span


@triton.jit
def _gate(g_ptr, at, live):
    """The forget gate and what it leaves, both exact."""
    g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
    f = tl.exp(g)
    near = -g * (1.0 + g * (0.5 + g * (1.0 / 6.0 + g * (1.0 / 24.0))))
    return f, tl.where(g > -0.1, near, 1.0 - f)


@triton.jit
def _inside(S, W, k, v, PRECISION: tl.constexpr):
    """S W + k v^T."""
    return tl.dot(S.to(W.dtype), W, input_precision=PRECISION) + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]


@triton.jit
def m2rnn_forward_kernel(
    q_ptr,  # [tokens, HQ, K]
    k_ptr,
    v_ptr,  # [tokens, H, V]
    g_ptr,  # [tokens, H]
    W_ptr,  # [H, V, V]
    S0_ptr,  # [N, H, K, V] fp32
    y_ptr,  # [tokens, H, V]
    kept_ptr,  # SAVE: states before every KEEP tokens [pieces, H, K, V] fp32
    S1_ptr,
    cu_ptr,
    piece_ptr,  # [N] number of pieces before a sequence (PACKED)
    T,
    H,
    HQ,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.program_id(0) % H
    n = tl.program_id(0) // H
    first, length = _span(n, cu_ptr, T, PACKED)
    if PACKED:
        piece = tl.load(piece_ptr + n).to(tl.int64)
    else:
        piece = (n * tl.cdiv(T, KEEP)).to(tl.int64)
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    mask = in_k[:, None] & in_v[None, :]
    W = tl.load(W_ptr + h * V * V + vs[:, None] * V + vs[None, :], mask=in_v[:, None] & in_v[None, :], other=0.0)
    tile = ks[:, None] * V + vs[None, :]
    S = tl.load(S0_ptr + (n * H + h).to(tl.int64) * K * V + tile, mask=mask, other=0.0)
    qk_at = (first * HQ + h // (H // HQ)) * K + ks
    v_at = (first * H + h) * V + vs
    g_at = first * H + h
    q = tl.load(q_ptr + qk_at, mask=in_k & (length > 0), other=0.0)
    k = tl.load(k_ptr + qk_at, mask=in_k & (length > 0), other=0.0)
    v = tl.load(v_ptr + v_at, mask=in_v & (length > 0), other=0.0)
    f, rest = _gate(g_ptr, g_at, length > 0)
    for t in range(0, length):
        more = t + 1 < length
        qk_at += HQ * K
        g_at += H
        next_q = tl.load(q_ptr + qk_at, mask=in_k & more, other=0.0)
        next_k = tl.load(k_ptr + qk_at, mask=in_k & more, other=0.0)
        next_v = tl.load(v_ptr + (v_at + H * V), mask=in_v & more, other=0.0)
        next_f, next_rest = _gate(g_ptr, g_at, more)
        if SAVE:
            if t % KEEP == 0:
                tl.store(kept_ptr + ((piece + t // KEEP) * H + h) * K * V + tile, S, mask=mask)
        S = f * S + rest * _tanh(_inside(S, W, k, v, PRECISION), EXACT, FAST)
        y = tl.sum(S * q.to(tl.float32)[:, None], 0)
        tl.store(y_ptr + v_at, y.to(y_ptr.dtype.element_ty), mask=in_v)
        v_at += H * V
        q = next_q
        k = next_k
        v = next_v
        f = next_f
        rest = next_rest
    tl.store(S1_ptr + (n * H + h).to(tl.int64) * K * V + tile, S, mask=mask)


@triton.jit
def m2rnn_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    W_ptr,
    kept_ptr,
    dy_ptr,
    dS1_ptr,
    scratch_ptr,  # [programs, KEEP, BK, BV]: states before the tokens of a piece
    dq_ptr,  # [tokens, H, K]
    dk_ptr,
    dv_ptr,
    dg_ptr,  # [tokens, H] fp32
    dW_ptr,  # [N, H, V, V] fp32
    dS0_ptr,
    cu_ptr,
    piece_ptr,
    clip,
    T,
    H,
    HQ,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEEP: tl.constexpr,
    CLIP: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.program_id(0) % H
    n = tl.program_id(0) // H
    first, length = _span(n, cu_ptr, T, PACKED)
    if PACKED:
        piece = tl.load(piece_ptr + n).to(tl.int64)
    else:
        piece = (n * tl.cdiv(T, KEEP)).to(tl.int64)
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    mask = in_k[:, None] & in_v[None, :]
    square = in_v[:, None] & in_v[None, :]
    W = tl.load(W_ptr + h * V * V + vs[:, None] * V + vs[None, :], mask=square, other=0.0)
    W_back = tl.load(W_ptr + h * V * V + vs[:, None] + vs[None, :] * V, mask=square, other=0.0)
    tile = ks[:, None] * V + vs[None, :]
    dS = tl.load(dS1_ptr + (n * H + h).to(tl.int64) * K * V + tile, mask=mask, other=0.0)
    dW = tl.zeros([BV, BV], tl.float32)
    own = scratch_ptr + tl.program_id(0).to(tl.int64) * KEEP * BK * BV + ks[:, None] * BV + vs[None, :]
    group = h // (H // HQ)
    low = W_ptr.dtype.element_ty
    for back in range(0, tl.cdiv(length, KEEP)):
        leg = tl.cdiv(length, KEEP) - 1 - back
        begin = leg * KEEP
        count = tl.minimum(KEEP, length - begin)
        S = tl.load(kept_ptr + ((piece + leg) * H + h) * K * V + tile, mask=mask, other=0.0)
        for i in range(0, count):
            tl.store(own + i * (BK * BV), S.to(scratch_ptr.dtype.element_ty))
            at = first + begin + i
            k = tl.load(k_ptr + (at * HQ + group) * K + ks, mask=in_k, other=0.0)
            v = tl.load(v_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0)
            f, rest = _gate(g_ptr, at * H + h, True)
            S = f * S + rest * _tanh(_inside(S, W, k, v, PRECISION), EXACT, FAST)
        tl.debug_barrier()  # the scratch is read by other threads than wrote it
        for j in range(0, count):
            i = count - 1 - j
            at = first + begin + i
            old = tl.load(own + i * (BK * BV)).to(tl.float32)
            q = tl.load(q_ptr + (at * HQ + group) * K + ks, mask=in_k, other=0.0).to(tl.float32)
            k = tl.load(k_ptr + (at * HQ + group) * K + ks, mask=in_k, other=0.0)
            v = tl.load(v_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0)
            dy = tl.load(dy_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0).to(tl.float32)
            f, rest = _gate(g_ptr, at * H + h, True)
            Z, slope = _tanh_slope(_inside(old, W, k, v, PRECISION), EXACT, FAST)
            new = f * old + rest * Z
            dq = tl.sum(new * dy[None, :], 1)
            if CLIP:
                dS = tl.minimum(tl.maximum(dS, -clip), clip)
            G = dS + q[:, None] * dy[None, :]
            dg = f * tl.sum(tl.sum(G * (old - Z), 1), 0)
            dX = rest * G * slope
            dk = tl.sum(dX * v.to(tl.float32)[None, :], 1)
            dv = tl.sum(dX * k.to(tl.float32)[:, None], 0)
            dW += tl.dot(tl.trans(old).to(low), dX.to(low), input_precision=PRECISION)
            dS = tl.dot(dX.to(low), W_back, f * G, input_precision=PRECISION)
            out = dq_ptr.dtype.element_ty
            tl.store(dq_ptr + (at * H + h) * K + ks, dq.to(out), mask=in_k)
            tl.store(dk_ptr + (at * H + h) * K + ks, dk.to(out), mask=in_k)
            tl.store(dv_ptr + (at * H + h) * V + vs, dv.to(dv_ptr.dtype.element_ty), mask=in_v)
            tl.store(dg_ptr + at * H + h, dg)
        tl.debug_barrier()
    tl.store(dW_ptr + (n * H + h).to(tl.int64) * V * V + vs[:, None] * V + vs[None, :], dW, mask=square)
    tl.store(dS0_ptr + (n * H + h).to(tl.int64) * K * V + tile, dS, mask=mask)
