"""Triton kernels of the M2RNN: one program some rows of a head's state, in registers from first to last token.

The rows of a state never meet but in sums over them (readings, gradients of values and weights), of which a program
gives its part. Time is the loop, and the inputs of the next AHEAD - 1 tokens are on their way meanwhile.

Forward, a program of many columns has its state transposed (TURNED): a product then has the columns where matrix units
want 64 of something, so that few rows are enough for one, and a sum over rows stays within a warp.

The backward kernel goes back piece by piece of KEEP tokens. It runs a piece forward from the state that was kept before
it, leaving the states of its tokens in a scratch of its own, and then back over them. Where columns are many (WIDE),
the weights, their transpose and the sum of their gradient do not fit on a multiprocessor together. Each then has a
piece to itself: the way forward leaves what was inside the tanh as well, the way back the gradients of that, of which
the weights' gradient is summed last.

Its transposed form is a kernel of its own. Sums over columns would there go through all threads, so queries' and keys'
gradients are products for matrix units, those of queries of the states as they are rounded on the way forward. Programs
fill a multiprocessor each; that the last of them do not leave most of the GPU idle, several launches go back over one
stretch of every sequence after the other, the state's gradient waiting in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _tanh, _tanh_slope
from .kernels_para import _span


@triton.jit
def _gate(g):
    """The forget gate and what it leaves, both exact."""
    g = g.to(tl.float32)
    f = tl.exp(g)
    near = -g * (1.0 + g * (0.5 + g * (1.0 / 6.0 + g * (1.0 / 24.0))))
    return f, tl.where(g > -0.1, near, 1.0 - f)


@triton.jit
def _key(ptr, at, head, heads, K, ks, there):
    """A token's query, key or value. The compiler does not load the first two ahead, and values at the price of
    barriers: a loop that waits for one does so itself."""
    return tl.load(ptr + (at * heads + head) * K + ks, mask=(ks < K) & there, other=0.0)


@triton.jit
def _along(x, AXIS: tl.constexpr):
    """A vector as a matrix that has it along one axis."""
    return x[:, None] if AXIS == 0 else x[None, :]


@triton.jit
def _inside(S, W, k, v, PRECISION: tl.constexpr, TURNED: tl.constexpr = False):
    """S W + k v^T, or of transposed matrices the transpose of that."""
    if TURNED:
        S, W, k, v = W, S.to(W.dtype), v, k
    return tl.dot(S.to(W.dtype), W, input_precision=PRECISION) + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]


@triton.jit
def _place(unit, cu_ptr, piece_ptr, T, H, K, BK: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr):
    """Which rows of which state a unit is: part, head, sequence, its first token, length and first piece."""
    parts = tl.cdiv(K, BK)
    part = unit % parts
    h = unit // parts % H
    n = unit // parts // H
    first, length = _span(n, cu_ptr, T, PACKED)
    if PACKED:
        piece = tl.load(piece_ptr + n).to(tl.int64)
    else:
        piece = (n * tl.cdiv(T, KEEP)).to(tl.int64)
    return part, h, n, first, length, piece


@triton.jit
def m2rnn_forward_kernel(
    q_ptr,  # [tokens, HQ, K]
    k_ptr,
    v_ptr,  # [tokens, H, V]
    g_ptr,  # [tokens, H]
    W_ptr,  # [H, V, V]
    S0_ptr,  # [N, H, K, V] fp32
    y_ptr,  # [parts, tokens, H, V]
    kept_ptr,  # SAVE: states before every KEEP tokens [pieces, H, K, V] fp32
    S1_ptr,
    cu_ptr,
    piece_ptr,  # [N] number of pieces before a sequence (PACKED)
    tokens,
    T,
    H,
    HQ,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEEP: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,  # queries and keys are loaded a token before
    TURNED: tl.constexpr,  # the state is transposed; values and gates are loaded a token before
    SAVE: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, h, n, first, length, piece = _place(tl.program_id(0), cu_ptr, piece_ptr, T, H, K, BK, KEEP, PACKED)
    ROW: tl.constexpr = 1 if TURNED else 0
    COLUMN: tl.constexpr = 0 if TURNED else 1
    ks, vs = part * BK + tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    mask = _along(in_k, ROW) & _along(in_v, COLUMN)
    if TURNED:
        at_W = W_ptr + h * V * V + vs[:, None] + vs[None, :] * V
    else:
        at_W = W_ptr + h * V * V + vs[:, None] * V + vs[None, :]
    W = tl.load(at_W, mask=in_v[:, None] & in_v[None, :], other=0.0)
    tile = _along(ks, ROW) * V + _along(vs, COLUMN)
    S = tl.load(S0_ptr + (n * H + h).to(tl.int64) * K * V + tile, mask=mask, other=0.0)
    group = h // (H // HQ)
    y_ptr += part.to(tl.int64) * tokens * H * V
    span = KEEP if SAVE else length
    for begin in range(0, length, span):
        if SAVE:
            tl.store(kept_ptr + ((piece + begin // KEEP) * H + h) * K * V + tile, S, mask=mask)
        end = tl.minimum(begin + span, length)
        if EARLY:
            q, k = (
                _key(q_ptr, first + begin, group, HQ, K, ks, True),
                _key(k_ptr, first + begin, group, HQ, K, ks, True),
            )
        if TURNED:
            v, g = _key(v_ptr, first + begin, h, H, V, vs, True), tl.load(g_ptr + (first + begin) * H + h)
        for t in tl.range(begin, end, num_stages=AHEAD):
            at = first + t
            if EARLY:
                next_q = _key(q_ptr, at + 1, group, HQ, K, ks, t + 1 < end)
                next_k = _key(k_ptr, at + 1, group, HQ, K, ks, t + 1 < end)
            else:
                q, k = _key(q_ptr, at, group, HQ, K, ks, True), _key(k_ptr, at, group, HQ, K, ks, True)
            if TURNED:
                next_v = _key(v_ptr, at + 1, h, H, V, vs, t + 1 < end)
                next_g = tl.load(g_ptr + (at + 1) * H + h, mask=t + 1 < end, other=0.0)
            else:
                v = tl.load(v_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0)
                g = tl.load(g_ptr + (at * H + h))
            f, rest = _gate(g)
            S = f * S + rest * _tanh(_inside(S, W, k, v, PRECISION, TURNED), EXACT, FAST)
            y = tl.sum(S * _along(q.to(tl.float32), ROW), ROW)
            tl.store(y_ptr + (at * H + h) * V + vs, y.to(y_ptr.dtype.element_ty), mask=in_v)
            if EARLY:
                q, k = next_q, next_k
            if TURNED:
                v, g = next_v, next_g
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
    scratch_ptr,  # [programs, KEEP, BK, BV]: states before the tokens of a piece
    inside_ptr,  # WIDE, alike, fp32: what is inside the tanh
    dX_ptr,  # WIDE, alike: gradients of that
    dq_ptr,  # [tokens, H, K]
    dk_ptr,
    dv_ptr,  # [parts, tokens, H, V]
    dg_ptr,  # [parts, tokens, H] fp32
    dW_ptr,  # [parts, N, H, V, V] fp32
    dS_ptr,  # gradient of the last state, replaced by that of the first
    cu_ptr,
    piece_ptr,
    clip,
    tokens,
    N,
    T,
    H,
    HQ,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEEP: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,  # queries and keys are loaded a token before
    STRIP: tl.constexpr,  # WIDE: rows of the weights' gradient that are summed at a time
    CLIP: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, h, n, first, length, piece = _place(tl.program_id(0), cu_ptr, piece_ptr, T, H, K, BK, KEEP, PACKED)
    ks, vs = part * BK + tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    mask = in_k[:, None] & in_v[None, :]
    square = in_v[:, None] & in_v[None, :]
    into = dW_ptr + ((part * N + n) * H + h).to(tl.int64) * V * V
    if WIDE:
        for strip in range(0, BV, STRIP):
            rows = strip + tl.arange(0, STRIP)
            tl.store(into + rows[:, None] * V + vs[None, :], tl.zeros([STRIP, BV], tl.float32),
                     mask=(rows < V)[:, None] & in_v[None, :])  # fmt: skip
    else:
        W = tl.load(W_ptr + h * V * V + vs[:, None] * V + vs[None, :], mask=square, other=0.0)
        W_back = tl.load(W_ptr + h * V * V + vs[:, None] + vs[None, :] * V, mask=square, other=0.0)
        dW = tl.zeros([BV, BV], tl.float32)
    tile = ks[:, None] * V + vs[None, :]
    dS_ptr += (n * H + h).to(tl.int64) * K * V
    dS = tl.load(dS_ptr + tile, mask=mask, other=0.0)
    own = tl.program_id(0).to(tl.int64) * KEEP * BK * BV
    place = tl.arange(0, BK)[:, None] * BV + vs[None, :]
    group = h // (H // HQ)
    low = W_ptr.dtype.element_ty
    dv_ptr += part.to(tl.int64) * tokens * H * V
    dg_ptr += part.to(tl.int64) * tokens * H
    for back in range(0, tl.cdiv(length, KEEP)):
        leg = tl.cdiv(length, KEEP) - 1 - back
        begin = leg * KEEP
        count = tl.minimum(KEEP, length - begin)
        S = tl.load(kept_ptr + ((piece + leg) * H + h) * K * V + tile, mask=mask, other=0.0)
        if WIDE:
            W = tl.load(W_ptr + h * V * V + vs[:, None] * V + vs[None, :], mask=square, other=0.0)
        if EARLY:
            k = _key(k_ptr, first + begin, group, HQ, K, ks, True)
        for i in tl.range(0, count, num_stages=AHEAD):
            at = first + begin + i
            if EARLY:
                next_k = _key(k_ptr, at + 1, group, HQ, K, ks, i + 1 < count)
            else:
                k = _key(k_ptr, at, group, HQ, K, ks, True)
            tl.store(scratch_ptr + (own + i * (BK * BV)) + place, S.to(scratch_ptr.dtype.element_ty))
            v = tl.load(v_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0)
            f, rest = _gate(tl.load(g_ptr + (at * H + h)))
            inside = _inside(S, W, k, v, PRECISION)
            if WIDE:
                tl.store(inside_ptr + (own + i * (BK * BV)) + place, inside)
            S = f * S + rest * _tanh(inside, EXACT, FAST)
            if EARLY:
                k = next_k
        tl.debug_barrier()  # the scratch is read by other threads than wrote it
        if WIDE:
            W_back = tl.load(W_ptr + h * V * V + vs[:, None] + vs[None, :] * V, mask=square, other=0.0)
        if EARLY:
            end = first + begin + count - 1
            next_q, next_k = _key(q_ptr, end, group, HQ, K, ks, True), _key(k_ptr, end, group, HQ, K, ks, True)
        for j in tl.range(0, count, num_stages=AHEAD):
            i = count - 1 - j
            at = first + begin + i
            if EARLY:
                q, k = next_q.to(tl.float32), next_k
                next_q = _key(q_ptr, at - 1, group, HQ, K, ks, i > 0)
                next_k = _key(k_ptr, at - 1, group, HQ, K, ks, i > 0)
            else:
                q, k = _key(q_ptr, at, group, HQ, K, ks, True).to(tl.float32), _key(k_ptr, at, group, HQ, K, ks, True)
            old = tl.load(scratch_ptr + (own + i * (BK * BV)) + place)
            v = tl.load(v_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0)
            dy = tl.load(dy_ptr + (at * H + h) * V + vs, mask=in_v, other=0.0).to(tl.float32)
            f, rest = _gate(tl.load(g_ptr + (at * H + h)))
            if WIDE:
                inside = tl.load(inside_ptr + (own + i * (BK * BV)) + place)
            else:
                inside = _inside(old, W, k, v, PRECISION)
            Z, slope = _tanh_slope(inside, EXACT, FAST)
            change = old.to(tl.float32) - Z
            dq = tl.sum((f * change + Z) * dy[None, :], 1)
            if CLIP:
                dS = tl.minimum(tl.maximum(dS, -clip), clip)
            G = dS + q[:, None] * dy[None, :]
            dg = f * tl.sum(tl.sum(G * change, 1), 0)
            dX = rest * G * slope
            dk = tl.sum(dX * v.to(tl.float32)[None, :], 1)
            dv = tl.sum(dX * k.to(tl.float32)[:, None], 0)
            if WIDE:
                tl.store(dX_ptr + (own + i * (BK * BV)) + place, dX.to(low))
            else:
                dW = tl.dot(tl.trans(old.to(low)), dX.to(low), dW, input_precision=PRECISION)
            dS = tl.dot(dX.to(low), W_back, f * G, input_precision=PRECISION)
            out = dq_ptr.dtype.element_ty
            tl.store(dq_ptr + (at * H + h) * K + ks, dq.to(out), mask=in_k)
            tl.store(dk_ptr + (at * H + h) * K + ks, dk.to(out), mask=in_k)
            tl.store(dv_ptr + (at * H + h) * V + vs, dv.to(dv_ptr.dtype.element_ty), mask=in_v)
            tl.store(dg_ptr + at * H + h, dg)
        tl.debug_barrier()
        if WIDE:
            for strip in range(0, BV, STRIP):
                rows = strip + tl.arange(0, STRIP)
                here = into + rows[:, None] * V + vs[None, :]
                there = (rows < V)[:, None] & in_v[None, :]
                total = tl.load(here, mask=there, other=0.0)
                for i in tl.range(0, count, num_stages=AHEAD):
                    old = tl.load(scratch_ptr + (own + i * (BK * BV)) + tl.arange(0, BK)[:, None] * BV + rows[None, :])
                    dX = tl.load(dX_ptr + (own + i * (BK * BV)) + place)
                    total = tl.dot(tl.trans(old), dX, total, input_precision=PRECISION)
                tl.store(here, total, mask=there)
            tl.debug_barrier()  # the scratch is written anew
    if not WIDE:
        tl.store(into + vs[:, None] * V + vs[None, :], dW, mask=square)
    tl.store(dS_ptr + tile, dS, mask=mask)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _across(x, M, PRECISION: tl.constexpr):
    """x^T M by matrix units, which take no fewer than 16 rows: all are x. Far cheaper than sums over threads."""
    rows = tl.broadcast_to(x.to(M.dtype)[None, :], (16, M.shape[0]))
    return tl.sum(tl.dot(rows, M, input_precision=PRECISION), 0) * 0.0625


@triton.jit(do_not_specialize=["begin"])
def m2rnn_backward_turned_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    W_ptr,
    kept_ptr,
    dy_ptr,
    scratch_ptr,  # [programs, KEEP, BV, BK]: states before the tokens of a piece, transposed
    sums_ptr,  # [programs, KEEP, BV] fp32: gates' gradients of its tokens, column by column
    dq_ptr,  # [tokens, H, K]
    dk_ptr,
    dv_ptr,  # [parts, tokens, H, V]
    dg_ptr,  # [parts, tokens, H] fp32
    dW_ptr,  # [stretches, parts, N, H, V, V] fp32
    dS_ptr,  # gradient of the last state, replaced by that of the first
    cu_ptr,
    piece_ptr,
    clip,
    begin,
    tokens,
    N,
    T,
    H,
    HQ,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEEP: tl.constexpr,
    STRETCHES: tl.constexpr,  # in how many launches a sequence is gone back over
    CLIP: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    units = tl.cdiv(K, BK) * H * N
    own = tl.program_id(0)
    stretch = STRETCHES - 1 - (begin + own) // units
    part, h, n, first, length, piece = _place((begin + own) % units, cu_ptr, piece_ptr, T, H, K, BK, KEEP, PACKED)
    ks, vs = part * BK + tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    mask = in_v[:, None] & in_k[None, :]
    square = in_v[:, None] & in_v[None, :]
    corner = vs[:, None] * V + vs[None, :]
    W = tl.load(W_ptr + h * V * V + corner, mask=square, other=0.0)
    W_ahead = tl.trans(W)
    dW = tl.zeros([BV, BV], tl.float32)
    tile = vs[:, None] + ks[None, :] * V
    dS_ptr += (n * H + h).to(tl.int64) * K * V
    dS = tl.load(dS_ptr + tile, mask=mask, other=0.0)
    scratch_ptr += own.to(tl.int64) * KEEP * BK * BV
    sums_ptr += own.to(tl.int64) * KEEP * BV
    place = vs[:, None] * BK + tl.arange(0, BK)[None, :]
    group = h // (H // HQ)
    low = W_ptr.dtype.element_ty
    out = dq_ptr.dtype.element_ty
    dv_ptr += part.to(tl.int64) * tokens * H * V
    dg_ptr += part.to(tl.int64) * tokens * H
    pieces = tl.cdiv(length, KEEP)
    least, most = pieces * stretch // STRETCHES, pieces * (stretch + 1) // STRETCHES
    for back in range(0, most - least):
        leg = most - 1 - back
        count = tl.minimum(KEEP, length - leg * KEEP)
        start = first + leg * KEEP
        S = tl.load(kept_ptr + ((piece + leg) * H + h) * K * V + tile, mask=mask, other=0.0)
        k, v = _key(k_ptr, start, group, HQ, K, ks, True), _key(v_ptr, start, h, H, V, vs, True)
        dy, g = _key(dy_ptr, start, h, H, V, vs, True), tl.load(g_ptr + start * H + h)
        for i in tl.range(0, count, num_stages=1):
            at = start + i
            next_k = _key(k_ptr, at + 1, group, HQ, K, ks, i + 1 < count)
            next_v = _key(v_ptr, at + 1, h, H, V, vs, i + 1 < count)
            next_g = tl.load(g_ptr + (at + 1) * H + h, mask=i + 1 < count, other=0.0)
            rounded = S.to(low)
            tl.store(scratch_ptr + i * (BK * BV) + place, rounded)
            dq = _across(dy, rounded, PRECISION)  # of the token before
            tl.store(dq_ptr + ((at - 1) * H + h) * K + ks, dq.to(out), mask=in_k & (i > 0))
            dy = _key(dy_ptr, at, h, H, V, vs, True)
            f, rest = _gate(g)
            S = f * S + rest * _tanh(_inside(S, W_ahead, k, v, PRECISION, True), EXACT, FAST)
            k, v, g = next_k, next_v, next_g
        end = start + count - 1
        dq = _across(dy, S.to(low), PRECISION)
        tl.store(dq_ptr + (end * H + h) * K + ks, dq.to(out), mask=in_k)
        tl.debug_barrier()  # the scratch is read by other threads than wrote it
        old = tl.load(scratch_ptr + (count - 1) * (BK * BV) + place)
        q, k = _key(q_ptr, end, group, HQ, K, ks, True), _key(k_ptr, end, group, HQ, K, ks, True)
        v, dy = _key(v_ptr, end, h, H, V, vs, True), _key(dy_ptr, end, h, H, V, vs, True)
        g = tl.load(g_ptr + end * H + h)
        for j in tl.range(0, count, num_stages=1):
            i = count - 1 - j
            at = start + i
            f, rest = _gate(g)
            Z, slope = _tanh_slope(_inside(old, W_ahead, k, v, PRECISION, True), EXACT, FAST)
            if CLIP:
                dS = tl.minimum(tl.maximum(dS, -clip), clip)
            G = dS + dy.to(tl.float32)[:, None] * q.to(tl.float32)[None, :]
            dX = rest * G * slope
            dv, dg = tl.reduce((dX * k.to(tl.float32)[None, :], G * (old.to(tl.float32) - Z)), 1, _both)
            # What the next token needs is under way during the products: earlier there are no registers for it.
            next_old = tl.load(scratch_ptr + tl.maximum(i - 1, 0) * (BK * BV) + place)
            next_q = _key(q_ptr, at - 1, group, HQ, K, ks, i > 0)
            next_k = _key(k_ptr, at - 1, group, HQ, K, ks, i > 0)
            next_v = _key(v_ptr, at - 1, h, H, V, vs, i > 0)
            next_dy = _key(dy_ptr, at - 1, h, H, V, vs, i > 0)
            next_g = tl.load(g_ptr + (at - 1) * H + h, mask=i > 0, other=0.0)
            rounded = dX.to(low)
            dS = tl.dot(W, rounded, f * G, input_precision=PRECISION)
            dk = _across(v, rounded, PRECISION)
            dW = tl.dot(old.to(low), tl.trans(rounded), dW, input_precision=PRECISION)
            tl.store(dk_ptr + (at * H + h) * K + ks, dk.to(out), mask=in_k)
            tl.store(dv_ptr + (at * H + h) * V + vs, dv.to(dv_ptr.dtype.element_ty), mask=in_v)
            tl.store(sums_ptr + i * BV + vs, f * dg)
            old, q, k, v, dy, g = next_old, next_q, next_k, next_v, next_dy, next_g
        tl.debug_barrier()  # as above; and the scratch is written anew
        every = tl.arange(0, KEEP)
        dg = tl.sum(tl.load(sums_ptr + every[:, None] * BV + vs[None, :], mask=every[:, None] < count, other=0.0), 1)
        tl.store(dg_ptr + (start + every) * H + h, dg, mask=every < count)
    at_dW = (((stretch * tl.cdiv(K, BK) + part) * N + n) * H + h).to(tl.int64) * V * V
    tl.store(dW_ptr + at_dW + corner, dW, mask=square)
    tl.store(dS_ptr + tile, dS, mask=mask)
