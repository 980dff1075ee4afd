"""Triton kernel of the delta engine's decoding step: few tokens, the state read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import over_length, within


@triton.jit(do_not_specialize=["T", "H", "HQ"])
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    a_ptr,  # UNTIED
    b_ptr,
    g_ptr,
    w_ptr,
    S_ptr,
    out_ptr,
    index_ptr,  # INDEX: rows of the states of each sequence, in both S and out
    o_ptr,
    scale,
    T,
    H,
    HQ,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SUB: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a scalar per token, 2 one per channel
    ERASE: tl.constexpr,  # whether beta has channels
    W: tl.constexpr,
    UNTIED: tl.constexpr,
    NORM: tl.constexpr,
    INDEX: tl.constexpr,
):
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    h = (pid // blocks) % H
    n = (pid // (blocks * H)).to(tl.int64)
    hq = h // (H // HQ)
    keys, values = tl.arange(0, BK), pid % blocks * BV + tl.arange(0, BV)
    wide, has = within(keys, K, BK), within(values, V, BV)
    state = n
    if INDEX:
        state = tl.load(index_ptr + n).to(tl.int64)
    at = (state * H + h) * K * V + keys[:, None] * V + values[None, :]
    S = tl.load(S_ptr + at, mask=wide[:, None] & has[None, :], other=0.0)
    for t in range(0, T):
        token = n * T + t
        if UNTIED:
            at_k = (token * H + h) * K + keys
            a = tl.load(a_ptr + at_k, mask=wide, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + at_k, mask=wide, other=0.0).to(tl.float32)
            moved = b[:, None] * tl.sum(S * a[:, None], 0)[None, :]
        if GATE == 1:
            S = S * tl.exp(tl.load(g_ptr + token * H + h).to(tl.float32))
        if GATE == 2:
            g = tl.load(g_ptr + (token * H + h) * K + keys, mask=wide, other=0.0).to(tl.float32)
            S = S * tl.exp(g)[:, None]
        if UNTIED:
            S += moved
        for j in tl.static_range(0, SUB):
            line = token * SUB + j
            k = tl.load(k_ptr + (line * HQ + hq) * K + keys, mask=wide, other=0.0).to(tl.float32)
            if NORM:
                k = k * over_length(tl.sum(k * k, 0))
            z = tl.load(v_ptr + (line * H + h) * V + values, mask=has, other=0.0).to(tl.float32)
            if ERASE:
                e = k * tl.load(beta_ptr + (line * H + h) * K + keys, mask=wide, other=0.0).to(tl.float32)
            elif not UNTIED:
                beta = tl.load(beta_ptr + line * H + h).to(tl.float32)
                e = k * beta
            if W:
                z = z * tl.load(w_ptr + (line * H + h) * V + values, mask=has, other=0.0).to(tl.float32)
            elif not UNTIED:
                z = z * beta
            if not UNTIED:
                z = z - tl.sum(S * e[:, None], 0)
            S += k[:, None] * z[None, :]
        q = tl.load(q_ptr + (token * HQ + hq) * K + keys, mask=wide, other=0.0).to(tl.float32)
        if NORM:
            q = q * over_length(tl.sum(q * q, 0))
        o = tl.sum(S * (q * scale)[:, None], 0)
        tl.store(o_ptr + (token * H + h) * V + values, o.to(o_ptr.dtype.element_ty), mask=has)
    tl.store(out_ptr + at, S, mask=wide[:, None] & has[None, :])
