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
def _stabilizing(i_ptr, f_ptr, m_ptr, cu_ptr, ids_ptr, rows, heads, mask, T, H, least, PACKED: tl.constexpr):
    """Of tokens ``[rows, 1]`` and heads ``[1, heads]``: the gates, what each token makes of a stabiliser,
    ``m -> max(a + m, b)``, sequence and whether it is its first token, and the stabiliser that enters a sequence."""
    if PACKED:
        n = tl.load(ids_ptr + rows, mask=mask, other=0)
        first = rows == tl.load(cu_ptr + n)
    else:
        n = rows // T
        first = rows % T == 0
    at = rows.to(tl.int64) * H + heads
    f = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
    i = tl.load(i_ptr + at, mask=mask, other=0.0).to(tl.float32)
    lf = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
    first = first & mask
    enter = tl.maximum(tl.load(m_ptr + n * H + heads, mask=first, other=0.0).to(tl.float64), least)
    a = tl.maximum(lf.to(tl.float64), least)
    b = tl.maximum(i.to(tl.float64), least)
    after_a = tl.where(mask, tl.where(first, float("-inf"), a), tl.zeros_like(a))
    after_b = tl.where(mask, tl.where(first, tl.maximum(a + enter, b), b), float("-inf"))
    return i, lf, after_a, after_b, n, first, enter


@triton.jit
def _through(a_after, a, b):
    """What rows ``[rows, heads]`` of such maps make of a stabiliser together: ``a_after`` belongs to the row after."""
    return tl.sum(a, 0), tl.max(b + tl.cumsum(a_after, 0, reverse=True), 0)


@triton.jit
def stabilizer_sums_kernel(
    i_ptr,
    f_ptr,
    m_ptr,
    cu_ptr,
    ids_ptr,
    sum_a_ptr,
    sum_b_ptr,
    T,
    n_rows,
    H,
    blocks,
    least,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What each block of tokens makes of the stabilisers of some heads, ``m -> max(a + m, b)``, as ``[blocks, H]``."""
    block = tl.program_id(0) % blocks
    heads = tl.program_id(0) // blocks * HEADS + tl.arange(0, HEADS)[None, :]
    rows = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = (rows < n_rows) & (heads < H)
    _i, _lf, a, b, _n, _first, _enter = _stabilizing(
        i_ptr, f_ptr, m_ptr, cu_ptr, ids_ptr, rows, heads, mask, T, H, least, PACKED
    )
    inner = (rows + 1 < n_rows) & (rows + 1 < (block + 1) * BLOCK) & (heads < H)
    _i, _lf, a_after, _b, _n, _first, _enter = _stabilizing(
        i_ptr, f_ptr, m_ptr, cu_ptr, ids_ptr, rows + 1, heads, inner, T, H, least, PACKED
    )
    a, b = _through(a_after, a, b)
    at = block * H + tl.program_id(0) // blocks * HEADS + tl.arange(0, HEADS)
    inside = at < (block + 1) * H
    tl.store(sum_a_ptr + at, a, mask=inside)
    tl.store(sum_b_ptr + at, b, mask=inside)


@triton.jit
def stabilizer_kernel(
    i_ptr,
    f_ptr,
    m_ptr,
    cu_ptr,
    ids_ptr,
    sum_a_ptr,
    sum_b_ptr,
    T,
    n_rows,
    H,
    blocks,
    least,
    g_ptr,
    w_ptr,  # this and the next laid out [H, tokens]
    floor_ptr,
    last_ptr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The stabiliser ``m_t = max(lf_t + m_{t-1}, i_t)`` of a block of tokens, all sequences in one line, and the decay,
    write weight and least denominator it gives. float64: m is a difference of sums that grow with the sequence."""
    block = tl.program_id(0) % blocks
    heads = tl.program_id(0) // blocks * HEADS + tl.arange(0, HEADS)[None, :]
    steps = tl.arange(0, BLOCK)[:, None]
    # What enters the block, from the blocks before it.
    carry = tl.full([HEADS], float("-inf"), tl.float64)
    nth = tl.arange(0, 64)[:, None]
    for b0 in range(0, block, 64):
        there = (b0 + nth < block) & (heads < H)
        at = (b0 + nth) * H + heads
        a = tl.load(sum_a_ptr + at, mask=there, other=0.0)
        b = tl.load(sum_b_ptr + at, mask=there, other=float("-inf"))
        inner = there & (b0 + nth + 1 < block) & (nth < 63)
        a_after = tl.load(sum_a_ptr + at + H, mask=inner, other=0.0)
        a, b = _through(a_after, a, b)
        carry = tl.maximum(a + carry, b)
    # Before each token: what its block's earlier ones make of that.
    rows = block * BLOCK + steps
    mask = (rows < n_rows) & (heads < H)
    _i, _lf, a, b, _n, _first, _enter = _stabilizing(
        i_ptr, f_ptr, m_ptr, cu_ptr, ids_ptr, rows - 1, heads, mask & (steps > 0), T, H, least, PACKED
    )
    b = tl.where(steps > 0, b, carry[None, :])
    _, before = tl.associative_scan((a, b), 0, _max_plus)
    i, lf, _a, _b, n, first, enter = _stabilizing(
        i_ptr, f_ptr, m_ptr, cu_ptr, ids_ptr, rows, heads, mask, T, H, least, PACKED
    )
    before = tl.where(first, enter, before)
    m = tl.maximum(tl.maximum(lf.to(tl.float64), least) + before, tl.maximum(i.to(tl.float64), least))
    m32 = m.to(tl.float32)
    at = rows.to(tl.int64) * H + heads
    line = heads.to(tl.int64) * n_rows + rows
    tl.store(g_ptr + at, tl.minimum(lf + (before - m).to(tl.float32), 0.0), mask=mask)
    tl.store(w_ptr + line, tl.exp(i - m32), mask=mask)
    tl.store(floor_ptr + line, tl.exp(tl.minimum(tl.maximum(-m32, -80.0), 88.0)), mask=mask)  # within fp32
    if PACKED:
        final = rows + 1 == tl.load(cu_ptr + n + 1)
    else:
        final = rows % T == T - 1
    tl.store(last_ptr + n * H + heads, m32, mask=mask & final)
