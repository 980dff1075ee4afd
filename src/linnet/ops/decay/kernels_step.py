"""Triton kernels of the decay engine for single tokens and for the gates of the mLSTM."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    gv_ptr,
    u_ptr,
    w_ptr,
    S_ptr,
    z_ptr,
    floor_ptr,
    o_ptr,
    S_out_ptr,
    z_out_ptr,
    scale,
    eps,
    H,
    HQ,
    K,
    V,
    g_row,  # elements between the gates of two rows, 0 when they share them
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a scalar per head, 2 a vector over the key's channels
):
    """One token of the recurrence for some value channels of one head: the state is read once and written once."""
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    n = (pid // (blocks * H)).to(tl.int64)
    ks, vs = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    slot = n * H + h
    q_at = (n * HQ + h // (H // HQ)) * K + ks
    q = tl.load(q_ptr + q_at, mask=ks < K, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + q_at, mask=ks < K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + slot * V + vs, mask=vs < V, other=0.0).to(tl.float32)
    if w_ptr is not None:
        k = k * tl.load(w_ptr + slot).to(tl.float32)
    state = slot * K * V + ks[:, None] * V + vs[None, :]
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    S = tl.load(S_ptr + state, mask=inside, other=0.0)
    z = tl.zeros([BK], dtype=tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + slot * K + ks, mask=ks < K, other=0.0)
    o = tl.zeros([BV], dtype=tl.float32)
    x = 0.0
    if u_ptr is not None:  # exclusive reading: the state before, and the own token through the bonus
        own = q * tl.load(u_ptr + h * K + ks, mask=ks < K, other=0.0).to(tl.float32) * k
        o = tl.sum(S * q[:, None], 0) + tl.sum(own, 0) * v
        x = tl.sum(q * z + own, 0)
    if GATE == 1:
        keep = tl.exp(tl.load(g_ptr + n * g_row + h).to(tl.float32))
        S = S * keep
        z = z * keep
    if GATE == 2:
        keep_k = tl.exp(tl.load(g_ptr + n * g_row + h * K + ks, mask=ks < K, other=0.0).to(tl.float32))
        S = S * keep_k[:, None]
        z = z * keep_k
    if gv_ptr is not None:
        S = S * tl.exp(tl.load(gv_ptr + slot * V + vs, mask=vs < V, other=0.0).to(tl.float32))[None, :]
    S += k[:, None] * v[None, :]
    z += k
    if u_ptr is None:
        o = tl.sum(S * q[:, None], 0)
        x = tl.sum(q * z, 0)
    if z_ptr is not None:
        if floor_ptr is not None:
            o = o / (tl.maximum(tl.abs(x), tl.load(floor_ptr + slot)) + eps)
        else:
            o = o / (x + eps)
        tl.store(z_out_ptr + slot * K + ks, z, mask=(ks < K) & (block == 0))
    tl.store(S_out_ptr + state, S, mask=inside)
    tl.store(o_ptr + slot * V + vs, o.to(o_ptr.dtype.element_ty), mask=vs < V)


@triton.jit
def _max_plus(a, m, b, n):
    return a + b, tl.maximum(m + b, n)


@triton.jit
def stabilizer_kernel(
    i_ptr,
    f_ptr,
    m_ptr,
    g_ptr,
    w_ptr,
    floor_ptr,
    last_ptr,
    cu_ptr,
    T,
    H,
    least,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The stabiliser ``m_t = max(lf_t + m_{t-1}, i_t)`` of one head of one sequence, and the decay, write weight and
    least denominator it gives. float64: m is a difference of sums that grow with the sequence."""
    pid = tl.program_id(0)
    h = pid % H
    n = pid // H
    if PACKED:
        first = tl.load(cu_ptr + n)
        stop = tl.load(cu_ptr + n + 1)
    else:
        first = n * T
        stop = first + T
    carry = tl.maximum(tl.load(m_ptr + pid).to(tl.float64), least)
    last = tl.load(m_ptr + pid).to(tl.float64)
    steps = tl.arange(0, BLOCK)
    for t0 in range(first, stop, BLOCK):
        rows = t0 + steps
        valid = rows < stop
        at = rows.to(tl.int64) * H + h
        f = tl.load(f_ptr + at, mask=valid, other=0.0).to(tl.float32)
        i = tl.load(i_ptr + at, mask=valid, other=0.0).to(tl.float32)
        inner = valid & (steps > 0)
        f_before = tl.load(f_ptr + at - H, mask=inner, other=0.0).to(tl.float32)
        i_before = tl.load(i_ptr + at - H, mask=inner, other=0.0).to(tl.float32)
        lf = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
        lf_before = tl.minimum(f_before, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f_before)))
        a = tl.where(steps > 0, tl.maximum(lf_before.to(tl.float64), least), 0.0)
        m = tl.where(steps > 0, tl.maximum(i_before.to(tl.float64), least), carry)
        _, before = tl.associative_scan((a, m), 0, _max_plus)
        m = tl.maximum(tl.maximum(lf.to(tl.float64), least) + before, tl.maximum(i.to(tl.float64), least))
        g = tl.minimum(lf + (before - m).to(tl.float32), 0.0)
        m32 = m.to(tl.float32)
        tl.store(g_ptr + at, g, mask=valid)
        tl.store(w_ptr + at, tl.exp(i - m32), mask=valid)
        tl.store(floor_ptr + at, tl.exp(tl.minimum(tl.maximum(-m32, -80.0), 88.0)), mask=valid)  # within fp32
        carry = tl.max(tl.where(rows == tl.minimum(t0 + BLOCK, stop) - 1, m, float("-inf")), 0)
        last = carry
    tl.store(last_ptr + pid, last.to(tl.float32))
