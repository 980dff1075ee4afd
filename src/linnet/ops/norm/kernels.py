"""Triton kernels of the gated norm. A program has R tokens of one head, each with its channels whole: once in the
forward pass, again and again in the backward pass, where it adds up what they give to the gradients of weight, bias and
skip. Nothing but the inputs is kept in between.

With NORM_FIRST the gate multiplies what the norm gives, else the norm takes what the gate gives. SHARED: all heads have
one weight and bias. Pointers are None of what the call does not have.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(ptr, first, stride, rows, columns, mask):
    """R rows, from token ``first`` on; zeros where there is none."""
    at = ptr + first.to(tl.int64) * stride
    return tl.load(at + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, first, stride, rows, columns, mask):
    at = ptr + first.to(tl.int64) * stride
    tl.store(at + rows[:, None] * stride + columns[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _vector(ptr, columns, mask):
    return tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _opening(gate, ACTIVATION: tl.constexpr):
    """The activation of the gate and its derivative."""
    if ACTIVATION == "identity":
        return gate, tl.full(gate.shape, 1.0, tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    if ACTIVATION == "sigmoid":
        return s, s * (1.0 - s)
    return gate * s, s * (1.0 + gate * (1.0 - s))


@triton.jit
def _normalise(x, inside, mask, small, eps, W, CENTER: tl.constexpr):
    """Rows made small and divided by the root of their mean square, and what they were multiplied by after that; rows
    and channels that there are none of stay 0."""
    x *= small
    if CENTER:
        x = tl.where(mask, x - (tl.sum(x, 1) / W)[:, None], 0.0)
    r = tl.where(inside, 1.0 / tl.sqrt(tl.sum(x * x, 1) / W + eps), 0.0)[:, None]
    return x * r, r


@triton.jit
def _through_norm(d, n, r, W, CENTER: tl.constexpr):
    """The gradient of what was normalised to ``n``, and multiplied by ``r`` for that, from the gradient of ``n``."""
    d -= n * (tl.sum(d * n, 1) / W)[:, None] + ((tl.sum(d, 1) / W)[:, None] if CENTER else 0.0)
    return d * r


@triton.jit
def forward_kernel(
    y_ptr,  # this, the gate and v: rows of D channels, whose tokens may lie apart
    gate_ptr,
    weight_ptr,  # [D] or [W], or None, as the bias
    bias_ptr,
    v_ptr,
    skip_ptr,  # [D]
    out_ptr,  # [tokens, D]
    y_stride,
    gate_stride,
    v_stride,
    small,
    eps,
    tokens,
    groups,
    W,
    NORM_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CENTER: tl.constexpr,
    SHARED: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
):
    first, group = tl.program_id(0) // groups * R, tl.program_id(0) % groups
    rows, channels = tl.arange(0, R), tl.arange(0, BW)
    inside, real = rows < tokens - first, channels < W
    mask = inside[:, None] & real[None, :]
    columns = group * W + channels
    own = channels if SHARED else columns
    x = _load(y_ptr, first, y_stride, rows, columns, mask)
    gate = _load(gate_ptr, first, gate_stride, rows, columns, mask)
    act, _ = _opening(gate, ACTIVATION)
    if NORM_FIRST:
        x, _ = _normalise(x, inside, mask, small, eps, W, CENTER)
        if weight_ptr is not None:
            x *= _vector(weight_ptr, own, real)
        if bias_ptr is not None:
            x += _vector(bias_ptr, own, real)
    if v_ptr is not None:
        x += _vector(skip_ptr, columns, real) * _load(v_ptr, first, v_stride, rows, columns, mask)
    x *= act
    if not NORM_FIRST:
        x, _ = _normalise(x, inside, mask, small, eps, W, CENTER)
        if weight_ptr is not None:
            x *= _vector(weight_ptr, own, real)
        if bias_ptr is not None:
            x += _vector(bias_ptr, own, real)
    _store(out_ptr, x, first, groups * W, rows, columns, mask)


@triton.jit
def backward_kernel(
    y_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    v_ptr,
    skip_ptr,
    dout_ptr,  # [tokens, D], as the next three
    dy_ptr,
    dgate_ptr,
    dv_ptr,
    dweight_ptr,  # these [programs, W] fp32, those of a head ``groups`` apart
    dbias_ptr,
    dskip_ptr,
    y_stride,
    gate_stride,
    v_stride,
    small,
    eps,
    tokens,
    groups,
    W,
    NORM_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CENTER: tl.constexpr,
    SHARED: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
):
    group, side = tl.program_id(0) % groups, tl.num_programs(0) // groups
    rows, channels = tl.arange(0, R), tl.arange(0, BW)
    real = channels < W
    columns = group * W + channels
    own = channels if SHARED else columns
    weight, skip = 1.0, 0.0
    if weight_ptr is not None:
        weight = _vector(weight_ptr, own, real)
    if v_ptr is not None:
        skip = _vector(skip_ptr, columns, real)
    dweight = tl.zeros([R, BW], tl.float32)
    dbias = tl.zeros([R, BW], tl.float32)
    dskip = tl.zeros([R, BW], tl.float32)
    # Wide rows of fp32 leave no room for a next block in the shared memory of smaller GPUs.
    ahead: tl.constexpr = 3 if BW * gate_ptr.dtype.element_ty.primitive_bitwidth <= 65536 else 1
    for block in tl.range(tl.program_id(0) // groups, tl.cdiv(tokens, R), side, num_stages=ahead):
        first = block * R
        inside = rows < tokens - first
        mask = inside[:, None] & real[None, :]
        x = _load(y_ptr, first, y_stride, rows, columns, mask)
        act, slope = _opening(_load(gate_ptr, first, gate_stride, rows, columns, mask), ACTIVATION)
        d = _load(dout_ptr, first, groups * W, rows, columns, mask)
        if NORM_FIRST:
            n, r = _normalise(x, inside, mask, small, eps, W, CENTER)
            x = n * weight
            if bias_ptr is not None:
                x += _vector(bias_ptr, own, real)
        if v_ptr is not None:
            v = _load(v_ptr, first, v_stride, rows, columns, mask)
            x += skip * v
        if not NORM_FIRST:
            n, r = _normalise(x * act, inside, mask, small, eps, W, CENTER)
            if weight_ptr is not None:
                dweight += d * n
            if bias_ptr is not None:
                dbias += d
            d = _through_norm(d * weight, n, r * small, W, CENTER)
        _store(dgate_ptr, d * x * slope, first, groups * W, rows, columns, mask)
        d *= act
        if v_ptr is not None:
            dskip += d * v
            _store(dv_ptr, d * skip, first, groups * W, rows, columns, mask)
        if NORM_FIRST:
            if weight_ptr is not None:
                dweight += d * n
            if bias_ptr is not None:
                dbias += d
            d = _through_norm(d * weight, n, r * small, W, CENTER)
        _store(dy_ptr, d, first, groups * W, rows, columns, mask)
    at = tl.program_id(0) * W + channels
    if weight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=real)
    if bias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=real)
    if v_ptr is not None:
        tl.store(dskip_ptr + at, tl.sum(dskip, 0), mask=real)
