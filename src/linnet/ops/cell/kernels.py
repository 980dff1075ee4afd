"""Triton kernels of the cells whose recurrent weights fit on one multiprocessor.

A program runs one head of a few sequences from their first token to their last, or back: time is the loop, the weights
and the state stay on chip, only the inputs come in and what was asked for goes out. Inputs are read one token ahead of
their use, so that the tokens' chain of dependence holds nothing but one product and the cell.

The backward kernel is given the pre-activations again (one product over all tokens, outside), and the gradients of the
weights are left to such products too; its loop is the chain of the forward pass in reverse.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Kinds, as the kernels number them.
KINDS = {"tanh": 0, "relu": 1, "lstm": 2, "cifg": 3, "gru": 4, "slstm": 5}


# FAST: hardware approximations of NVIDIA's, for 16-bit inputs. A token's transcendental functions are what a program
# waits for most after its product. Gates that decide what is kept and written keep fp32 accuracy all the same. Without
# it they are right to a unit or two in the last place, as PyTorch's are: errors of one sign add up over tokens.


@triton.jit
def _exp(x, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # what rounding takes from the argument of the power of 2, which grows with x, is made good
        x = tl.where(x < -120.0, -120.0, x)  # 0, as of -inf
        scaled = x * 1.4426950408889634
        lost = tl.fma(x, 1.4426950408889634, -scaled) + x * 1.925963033500e-8
        y = tl.exp2(scaled)
        y = tl.fma(y, lost * 0.6931471805599453, y)
    return y


@triton.jit
def _inverse(x, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.div_rn(1.0, x)
    return y


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """The logistic function of x and of -x."""
    e = _exp(-tl.abs(x), FAST)
    big = _inverse(1.0 + e, FAST)
    small = e * big
    return tl.where(x >= 0, big, small), tl.where(x >= 0, small, big)


@triton.jit
def _sigmoids(x, y, FAST: tl.constexpr):
    """The logistic function of x, -x, y and -y, for one division."""
    if FAST:
        ex = _exp(tl.minimum(-x, 40.0), FAST)
        ey = _exp(tl.minimum(-y, 40.0), FAST)
        both = _inverse((1.0 + ex) * (1.0 + ey), FAST)
        x_on = both * (1.0 + ey)
        y_on = both * (1.0 + ex)
        x_off = ex * x_on
        y_off = ey * y_on
    else:
        x_on, x_off = _sigmoid(x, FAST)
        y_on, y_off = _sigmoid(y, FAST)
    return x_on, x_off, y_on, y_off


@triton.jit
def _tanh(x, EXACT: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif EXACT:  # next to 0 the difference loses digits; the best polynomial is right there to 1e-9 of the result
        e = _exp(-2.0 * tl.abs(x), FAST)
        far = 1.0 - 2.0 * e * _inverse(1.0 + e, FAST)
        s = tl.minimum(x * x, 1.0)
        near = -0.0538523 + s * (0.02107166 - s * 0.00627421)
        near = -0.33333318 + s * (0.13332586 + s * near)
        y = tl.where(tl.abs(x) < 0.55, x + x * (s * near), tl.where(x >= 0, far, -far))
    else:
        e = tl.exp(-2.0 * tl.abs(x))
        y = (1.0 - e) / (1.0 + e)
        y = tl.where(x >= 0, y, -y)
    return y


@triton.jit
def _tanh_slope(x, EXACT: tl.constexpr, FAST: tl.constexpr):
    """The hyperbolic tangent and its derivative, which next to 1 is not the difference it could be written as."""
    y = _tanh(x, EXACT, FAST)
    if FAST:
        slope = 1.0 - y * y
    else:
        e = _exp(-2.0 * tl.abs(x), FAST)
        over = _inverse(1.0 + e, FAST)
        slope = 4.0 * e * over * over
    return y, slope


@triton.jit
def _output_gate(x, FAST: tl.constexpr):
    """The logistic function of x and of -x, where nothing accumulates."""
    if FAST:
        y = 0.5 * _tanh(0.5 * x, False, FAST)
        on = 0.5 + y
        off = 0.5 - y
    else:
        on, off = _sigmoid(x, FAST)
    return on, off


@triton.jit
def _slstm_weights(i, f, n, m, FAST: tl.constexpr):
    """What is kept and what is written next to the new scale exp(m), and that m."""
    i = tl.maximum(i, -1e30)
    f = tl.maximum(f, -1e30)
    lf = tl.minimum(f, 0.0) - tl.log(1.0 + _exp(-tl.abs(f), FAST))
    ahead = tl.where(n == 0, float("inf"), i - m - lf)
    less = _exp(-tl.abs(ahead), FAST)  # the larger of the two is 1
    return tl.where(ahead > 0, less, 1.0), tl.where(ahead > 0, 1.0, less), tl.where(ahead > 0, i, lf + m)


@triton.jit
def _rows(pid, start_ptr, order_ptr, N, T, BN: tl.constexpr, PACKED: tl.constexpr):
    """Of the sequences of a program: their state rows, first tokens, lengths, and whether they exist."""
    rows = pid * BN + tl.arange(0, BN)
    live = rows < N
    if PACKED:
        rows = tl.load(order_ptr + rows, mask=live, other=0)
        first = tl.load(start_ptr + rows, mask=live, other=0)
        length = tl.load(start_ptr + rows + 1, mask=live, other=0) - first
        length = tl.where(live, length, 0)
    else:
        first = rows * T
        length = tl.where(live, T, 0)
    return rows, first, length, live


@triton.jit
def _vectors(ptr, start, D, cols, ins, COUNT: tl.constexpr, GIVEN: tl.constexpr):
    """Up to four rows of D numbers as [1, BD] tiles (zeros where not given)."""
    v0 = tl.zeros_like(cols).to(tl.float32)[None, :]
    v1 = v0
    v2 = v0
    v3 = v0
    if GIVEN:
        v0 = tl.load(ptr + start + cols, mask=ins, other=0.0)[None, :]
        if COUNT > 1:
            v1 = tl.load(ptr + start + D + cols, mask=ins, other=0.0)[None, :]
        if COUNT > 2:
            v2 = tl.load(ptr + start + 2 * D + cols, mask=ins, other=0.0)[None, :]
        if COUNT > 3:
            v3 = tl.load(ptr + start + 3 * D + cols, mask=ins, other=0.0)[None, :]
    return v0, v1, v2, v3


@triton.jit
def _tiles(at, D, mask, COUNT: tl.constexpr):
    """Up to four tiles D numbers apart."""
    a0 = tl.load(at, mask=mask, other=0.0)
    a1 = a0
    a2 = a0
    a3 = a0
    if COUNT > 1:
        a1 = tl.load(at + D, mask=mask, other=0.0)
    if COUNT > 2:
        a2 = tl.load(at + 2 * D, mask=mask, other=0.0)
    if COUNT > 3:
        a3 = tl.load(at + 3 * D, mask=mask, other=0.0)
    return a0, a1, a2, a3


@triton.jit
def _load_state(h_ptr, c_ptr, n_ptr, m_ptr, at, mask, KIND: tl.constexpr):
    h = tl.load(h_ptr + at, mask=mask, other=0.0)
    c = tl.zeros_like(h)
    n = c
    m = c
    if KIND == 2 or KIND == 3 or KIND == 5:
        c = tl.load(c_ptr + at, mask=mask, other=0.0)
    if KIND == 5:
        n = tl.load(n_ptr + at, mask=mask, other=0.0)
        if m_ptr is not None:
            m = tl.load(m_ptr + at, mask=mask, other=0.0)
    return h, c, n, m


@triton.jit
def _store_state(h_ptr, c_ptr, n_ptr, m_ptr, at, h, c, n, m, mask, KIND: tl.constexpr):
    tl.store(h_ptr + at, h, mask=mask)
    if KIND == 2 or KIND == 3 or KIND == 5:
        tl.store(c_ptr + at, c, mask=mask)
    if KIND == 5:
        tl.store(n_ptr + at, n, mask=mask)
        if m_ptr is not None:
            tl.store(m_ptr + at, m, mask=mask)


@triton.jit
def _store_tape(at, c, n, m, stride, mask, KIND: tl.constexpr):
    if KIND == 2 or KIND == 3 or KIND == 5:
        tl.store(at, c, mask=mask)
    if KIND == 5:
        tl.store(at + stride, n, mask=mask)
        tl.store(at + 2 * stride, m, mask=mask)


@triton.jit
def _step(
    a0, a1, a2, a3, h, c, n, m, p0, p1, p2,
    KIND: tl.constexpr, PEEPHOLES: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The state after a token (GRU: a2 is the candidate's product, a3 its input)."""
    if KIND == 0:
        h = _tanh(a0, EXACT, FAST)
    elif KIND == 1:
        h = tl.maximum(a0, 0.0)
    elif KIND == 4:
        r, _r, z, u = _sigmoids(a0, a1, FAST)
        h = z * h + u * _tanh(a3 + r * a2, EXACT, FAST)
    elif KIND == 3:
        if PEEPHOLES:
            a0 += p0 * c
        keep, write = _sigmoid(a0, FAST)
        c = keep * c + write * _tanh(a1, EXACT, FAST)
        if PEEPHOLES:
            a2 += p1 * c
        o, _o = _output_gate(a2, FAST)
        h = o * _tanh(c, EXACT, FAST)
    elif KIND == 2:
        if PEEPHOLES:
            a0 += p0 * c
            a1 += p1 * c
        write, _w, keep, _k = _sigmoids(a0, a1, FAST)
        c = keep * c + write * _tanh(a2, EXACT, FAST)
        if PEEPHOLES:
            a3 += p2 * c
        o, _o = _output_gate(a3, FAST)
        h = o * _tanh(c, EXACT, FAST)
    else:
        keep, write, m = _slstm_weights(a0, a1, n, m, FAST)
        n = keep * n + write
        c = keep * c + write * _tanh(a2, EXACT, FAST)
        o, _o = _output_gate(a3, FAST)
        h = o * c * _inverse(n, FAST)
    return h, c, n, m


@triton.jit
def _step_back(
    a0, a1, a2, a3, c, n, m, g, dc, dn, p0, p1, p2,
    KIND: tl.constexpr, PEEPHOLES: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the pre-activations (GRU: the fourth is the candidate's product) and, apart from the recurrent
    product, of the state before the token, from those of the state after it. ``c`` is the memory before the token (GRU:
    its h); the memory after it comes back as well."""
    d1 = g
    d2 = g
    d3 = g
    dh = tl.zeros_like(g)
    if KIND == 0:
        y = _tanh(a0, EXACT, FAST)
        d0 = g * (1.0 - y * y)
    elif KIND == 1:
        d0 = tl.where(a0 > 0, g, 0.0)
    elif KIND == 4:
        r, r_off, z, u = _sigmoids(a0, a1, FAST)
        w = _tanh(a3 + r * a2, EXACT, FAST)
        d2 = g * u * (1.0 - w * w)
        d0 = d2 * a2 * r * r_off
        d1 = g * (c - w) * z * u
        d3 = d2 * r
        dh = g * z
    elif KIND == 3:
        if PEEPHOLES:
            a0 += p0 * c
        keep, write = _sigmoid(a0, FAST)
        z = _tanh(a1, EXACT, FAST)
        before = c
        c = keep * c + write * z
        if PEEPHOLES:
            a2 += p1 * c
        o, o_off = _output_gate(a2, FAST)
        y = _tanh(c, EXACT, FAST)
        d2 = g * y * o * o_off
        dc += g * o * (1.0 - y * y)
        if PEEPHOLES:
            dc += d2 * p1
        d0 = dc * (before - z) * keep * write
        d1 = dc * write * (1.0 - z * z)
        dc = dc * keep
        if PEEPHOLES:
            dc += d0 * p0
    elif KIND == 2:
        if PEEPHOLES:
            a0 += p0 * c
            a1 += p1 * c
        write, w_off, keep, f_off = _sigmoids(a0, a1, FAST)
        z = _tanh(a2, EXACT, FAST)
        before = c
        c = keep * c + write * z
        if PEEPHOLES:
            a3 += p2 * c
        o, o_off = _output_gate(a3, FAST)
        y = _tanh(c, EXACT, FAST)
        d3 = g * y * o * o_off
        dc += g * o * (1.0 - y * y)
        if PEEPHOLES:
            dc += d3 * p2
        d0 = dc * z * write * w_off
        d1 = dc * before * keep * f_off
        d2 = dc * write * (1.0 - z * z)
        dc = dc * keep
        if PEEPHOLES:
            dc += d0 * p0 + d1 * p1
    else:
        keep, write, _m = _slstm_weights(a0, a1, n, m, FAST)
        _f, f_off = _sigmoid(a1, FAST)
        z = _tanh(a2, EXACT, FAST)
        before = c
        c = keep * c + write * z
        over = _inverse(keep * n + write, FAST)
        o, o_off = _output_gate(a3, FAST)
        d3 = g * c * over * o * o_off
        dc += g * o * over
        dn -= g * o * c * over * over
        d0 = write * (z * dc + dn)
        d1 = keep * f_off * (before * dc + n * dn)
        d2 = dc * write * (1.0 - z * z)
        dc = dc * keep
        dn = dn * keep
    return d0, d1, d2, d3, dh, dc, dn, c


@triton.jit
def _backward_inputs(
    a_at, x_at, dy_at, before_at, tape_at, h0_at, stride, mask, first, D, KIND: tl.constexpr, G: tl.constexpr
):
    """What the backward pass reads for a token: its gates' inputs (GRU: as the fourth the candidate's own), the
    gradient of its h, and the parts of the state before it (GRU: h as the first of them)."""
    a0, a1, a2, a3 = _tiles(a_at, D, mask, G)
    dy = tl.load(dy_at, mask=mask, other=0.0)
    c = tl.zeros_like(dy).to(tl.float32)
    n = c
    m = c
    if KIND == 4:
        a3 = tl.load(x_at + 2 * D, mask=mask, other=0.0)
        c = tl.load(before_at, mask=mask & (first == 0), other=0.0).to(tl.float32)
        if first:
            c = tl.load(h0_at, mask=mask, other=0.0)
    if KIND == 2 or KIND == 3 or KIND == 5:
        c = tl.load(tape_at, mask=mask, other=0.0)
    if KIND == 5:
        n = tl.load(tape_at + stride, mask=mask, other=1.0)
        m = tl.load(tape_at + 2 * stride, mask=mask, other=0.0)
    return a0, a1, a2, a3, dy, c, n, m


@triton.jit
def forward_kernel(
    x_ptr,  # [tokens, H, G * D]
    R_ptr,  # [H, D, G * D]
    b_ptr,  # [H, G * D] fp32
    p_ptr,  # [H, P * D] fp32
    h0_ptr,  # states [N, H, D] fp32
    c0_ptr,
    n0_ptr,
    m0_ptr,
    y_ptr,  # [tokens, H, D]
    tape_ptr,  # SAVE: c, n, m before every token, [tokens, S - 1, H, D] fp32
    h1_ptr,
    c1_ptr,
    n1_ptr,
    m1_ptr,
    start_ptr,
    order_ptr,
    N,
    T,
    H,
    D,
    KIND: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
    PEEPHOLES: tl.constexpr,
    SAVE: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of BN sequences, from the first token to the last."""
    h_id = tl.program_id(0) % H
    rows, first, length, live = _rows(tl.program_id(0) // H, start_ptr, order_ptr, N, T, BN, PACKED)
    cols = tl.arange(0, BD)
    ins = cols < D
    mask = live[:, None] & ins[None, :]
    ks = tl.arange(0, BD)
    weights = R_ptr + h_id.to(tl.int64) * D * G * D + ks[:, None] * (G * D) + cols[None, :]
    R0, R1, R2, R3 = _tiles(weights, D, (ks < D)[:, None] & ins[None, :], G)
    b0, b1, b2, b3 = _vectors(b_ptr, h_id * G * D, D, cols, ins, G, BIAS)
    p0, p1, p2, _p3 = _vectors(p_ptr, h_id * (G - 1) * D, D, cols, ins, G - 1, PEEPHOLES)

    at = (rows.to(tl.int64) * H + h_id)[:, None] * D + cols[None, :]
    h, c, n, m = _load_state(h0_ptr, c0_ptr, n0_ptr, m0_ptr, at, mask, KIND)
    EXTRA: tl.constexpr = 3 if KIND == 5 else 1
    token = (first.to(tl.int64) * H + h_id)[:, None]
    x_at = x_ptr + token * (G * D) + cols[None, :]
    y_at = y_ptr + token * D + cols[None, :]
    tape_at = (first.to(tl.int64) * (EXTRA * H) + h_id)[:, None] * D + cols[None, :]

    steps = tl.max(length, 0)
    x0, x1, x2, x3 = _tiles(x_at, D, mask & (length > 0)[:, None], G)
    for t in range(0, steps):
        if PACKED:
            now = mask & (t < length)[:, None]
        else:
            now = mask
        # What the next token brings.
        x_at += H * G * D
        f0, f1, f2, f3 = _tiles(x_at, D, mask & (t + 1 < length)[:, None], G)
        if SAVE:
            _store_tape(tape_ptr + tape_at, c, n, m, H * D, now, KIND)
            tape_at += EXTRA * H * D

        low = h.to(R_ptr.dtype.element_ty)
        a0 = tl.dot(low, R0, input_precision=PRECISION) + b0 + x0.to(tl.float32)
        a1 = a0
        a2 = a0
        a3 = a0
        if G > 1:
            a1 = tl.dot(low, R1, input_precision=PRECISION) + b1 + x1.to(tl.float32)
            a2 = tl.dot(low, R2, input_precision=PRECISION) + b2
        if KIND == 4:
            a3 = x2.to(tl.float32)
        elif G > 1:
            a2 += x2.to(tl.float32)
        if G > 3:
            a3 = tl.dot(low, R3, input_precision=PRECISION) + b3 + x3.to(tl.float32)
        h_new, c_new, n_new, m_new = _step(
            a0, a1, a2, a3, h, c, n, m, p0, p1, p2, KIND, PEEPHOLES, EXACT, FAST
        )  # fmt: skip
        tl.store(y_at, h_new.to(y_ptr.dtype.element_ty), mask=now)
        y_at += H * D
        if PACKED:  # sequences that have ended keep their state
            h = tl.where(now, h_new, h)
            c = tl.where(now, c_new, c)
            n = tl.where(now, n_new, n)
            m = tl.where(now, m_new, m)
        else:
            h = h_new
            c = c_new
            n = n_new
            m = m_new
        x0 = f0
        x1 = f1
        x2 = f2
        x3 = f3
    _store_state(h1_ptr, c1_ptr, n1_ptr, m1_ptr, at, h, c, n, m, mask, KIND)


@triton.jit
def backward_kernel(
    a_ptr,  # input plus recurrent product [H, tokens, G * D]; of the GRU's candidate the product alone
    x_ptr,  # GRU: the inputs
    R_ptr,
    b_ptr,
    p_ptr,
    h0_ptr,  # GRU: h before the first token [N, H, D] fp32
    y_ptr,  # GRU: h of every token
    tape_ptr,
    dy_ptr,  # [tokens, H, D]
    dh1_ptr,  # gradients of the final state [N, H, D] fp32
    dc1_ptr,
    dn1_ptr,
    dx_ptr,  # out: gradients of the pre-activations [tokens, H, G * D]
    dg_ptr,  # out, GRU: of the candidate's product [tokens, H, D]
    dp_ptr,  # out: of the peepholes, summed over the sequences of a program [tiles, H, P * D]
    dh0_ptr,
    dc0_ptr,
    dn0_ptr,
    start_ptr,
    order_ptr,
    N,
    T,
    H,
    D,
    tokens,
    KIND: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
    PEEPHOLES: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of BN sequences, from the last token to the first."""
    h_id = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    rows, first, length, live = _rows(tile, start_ptr, order_ptr, N, T, BN, PACKED)
    cols = tl.arange(0, BD)
    ins = cols < D
    mask = live[:, None] & ins[None, :]
    ks = tl.arange(0, BD)
    # R transposed: from the gates' channels to the state's.
    weights = R_ptr + h_id.to(tl.int64) * D * G * D + ks[:, None] + cols[None, :] * (G * D)
    R0, R1, R2, R3 = _tiles(weights, D, (ks < D)[:, None] & ins[None, :], G)
    b0, b1, b2, b3 = _vectors(b_ptr, h_id * G * D, D, cols, ins, G, BIAS)
    p0, p1, p2, _p3 = _vectors(p_ptr, h_id * (G - 1) * D, D, cols, ins, G - 1, PEEPHOLES)

    at = (rows.to(tl.int64) * H + h_id)[:, None] * D + cols[None, :]
    dh, dc, dn, _m = _load_state(dh1_ptr, dc1_ptr, dn1_ptr, None, at, mask, KIND)
    dp0 = tl.zeros_like(dh)
    dp1 = dp0
    dp2 = dp0

    steps = tl.max(length, 0)
    EXTRA: tl.constexpr = 3 if KIND == 5 else 1
    token = (first + steps - 1).to(tl.int64)[
        :, None
    ]  # rows that end before the last step come in when it is their turn
    a_at = (h_id.to(tl.int64) * tokens + token) * (G * D) + cols[None, :]
    x_at = (token * H + h_id) * (G * D) + cols[None, :]
    y_at = (token * H + h_id) * D + cols[None, :]
    tape_at = (token * (EXTRA * H) + h_id) * D + cols[None, :]
    e0, e1, e2, e3, e_dy, e_c, e_n, e_m = _backward_inputs(
        a_ptr + a_at, x_ptr + x_at, dy_ptr + y_at, y_ptr + y_at - H * D, tape_ptr + tape_at, h0_ptr + at, H * D,
        mask & (length >= steps)[:, None], steps == 1, D, KIND, G,
    )  # fmt: skip
    for back in range(0, steps):
        t = steps - 1 - back
        if PACKED:
            now = mask & (t < length)[:, None]
        else:
            now = mask
        # What the token before brings.
        f0, f1, f2, f3, f_dy, f_c, f_n, f_m = _backward_inputs(
            a_ptr + a_at - G * D, x_ptr + x_at - H * G * D, dy_ptr + y_at - H * D, y_ptr + y_at - 2 * H * D,
            tape_ptr + tape_at - EXTRA * H * D, h0_ptr + at, H * D,
            mask & ((t <= length) & (t > 0))[:, None], t == 1, D, KIND, G,
        )  # fmt: skip
        a3 = e3.to(tl.float32)
        if G > 3:
            a3 += b3
        d0, d1, d2, d3, dh_new, dc_new, dn_new, c_new = _step_back(
            e0.to(tl.float32) + b0, e1.to(tl.float32) + b1, e2.to(tl.float32) + b2, a3, e_c, e_n, e_m,
            dh + e_dy.to(tl.float32), dc, dn, p0, p1, p2, KIND, PEEPHOLES, EXACT, FAST,
        )  # fmt: skip

        low = R_ptr.dtype.element_ty
        out = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + x_at, d0.to(out), mask=now)
        dh_new = tl.dot(d0.to(low), R0, dh_new, input_precision=PRECISION)
        if G > 1:
            tl.store(dx_ptr + x_at + D, d1.to(out), mask=now)
            tl.store(dx_ptr + x_at + 2 * D, d2.to(out), mask=now)
            dh_new = tl.dot(d1.to(low), R1, dh_new, input_precision=PRECISION)
        if KIND == 4:
            tl.store(dg_ptr + y_at, d3.to(out), mask=now)
            dh_new = tl.dot(d3.to(low), R2, dh_new, input_precision=PRECISION)
        elif G > 1:
            dh_new = tl.dot(d2.to(low), R2, dh_new, input_precision=PRECISION)
        if G > 3:
            tl.store(dx_ptr + x_at + 3 * D, d3.to(out), mask=now)
            dh_new = tl.dot(d3.to(low), R3, dh_new, input_precision=PRECISION)
        if PEEPHOLES:
            dp0 += tl.where(now, d0 * e_c, 0.0)
            if KIND == 2:
                dp1 += tl.where(now, d1 * e_c, 0.0)
                dp2 += tl.where(now, d3 * c_new, 0.0)
            else:
                dp1 += tl.where(now, d2 * c_new, 0.0)
        if PACKED:  # of sequences that ended earlier, the gradient of the final state waits
            dh = tl.where(now, dh_new, dh)
            dc = tl.where(now, dc_new, dc)
            dn = tl.where(now, dn_new, dn)
        else:
            dh = dh_new
            dc = dc_new
            dn = dn_new
        a_at -= G * D
        x_at -= H * G * D
        y_at -= H * D
        tape_at -= EXTRA * H * D
        e0 = f0
        e1 = f1
        e2 = f2
        e3 = f3
        e_dy = f_dy
        e_c = f_c
        e_n = f_n
        e_m = f_m
    _store_state(dh0_ptr, dc0_ptr, dn0_ptr, None, at, dh, dc, dn, dn, mask, KIND)
    if PEEPHOLES:
        dp_at = dp_ptr + (tile * H + h_id) * (G - 1) * D + cols
        tl.store(dp_at, tl.sum(dp0, 0), mask=ins)
        tl.store(dp_at + D, tl.sum(dp1, 0), mask=ins)
        if KIND == 2:
            tl.store(dp_at + 2 * D, tl.sum(dp2, 0), mask=ins)
