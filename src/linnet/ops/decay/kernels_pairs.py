"""Triton kernel of the pairs of tokens within chunks, for wide heads under a scalar gate or none.

A pass makes the pairs of a chunk itself; where many blocks of the payload's channels would each do so, from tiles of
many reading channels, they are made once here and read by the passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _chunk_bounds, _load


@triton.jit
def pairs_kernel(
    q_ptr,
    k_ptr,
    do_ptr,  # the gradients too where given, of readings [tokens, H, V]
    v_ptr,
    g_ptr,  # [H], see GATE
    seen_ptr,  # this and the following lines [H, tokens]: summed log2-decay of its chunk up to and with each token
    late_ptr,  # weights of the late and of the early tokens
    early_ptr,
    dx_ptr,  # the normaliser's gradient, divided by the late tokens' weight
    pairs_ptr,  # [tokens, H, C], as the following
    d_pairs_ptr,
    row_ptr,
    col_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    n_rows,
    PIECE,
    H,
    HQ,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a constant per head, 2 a scalar per token
    FULL: tl.constexpr,  # tiles lie within the channels
    PACKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Weights ``[C, C]`` of a chunk's tokens in the readings of one another, late tokens down; with ``do`` also those
    in the gradients of q and k. Of the latter the contributions to the gates between the tokens, summed over early ones
    (``row``) and, without the write weight, over late ones (``col``): from one tile, so that they cancel exactly."""
    pid = tl.program_id(0)
    h = pid % H
    t0, stop = _chunk_bounds(pid // H, cu_ptr, table_ptr, T, PIECE, C, PACKED)
    steps = tl.arange(0, C)
    rows = t0 + steps
    valid = rows < stop
    if t0 < stop:
        line = h.to(tl.int64) * n_rows + rows
        A = tl.zeros([C, C], dtype=tl.float32)
        for column in range(0, K, BK):
            q = _load(q_ptr, h // (H // HQ), HQ, K, t0, column, valid, C, BK, FULL, TMA)
            k = _load(k_ptr, h // (H // HQ), HQ, K, t0, column, valid, C, BK, FULL, TMA)
            A = tl.dot(q, tl.trans(k), A, input_precision="ieee")
        apart = steps[:, None] - steps[None, :]
        kept = tl.zeros([C, C], dtype=tl.float32)
        if GATE == 1:
            kept += tl.maximum(tl.load(g_ptr + h).to(tl.float32), -104.0) * 1.4426950408889634 * apart
        if GATE == 2:
            seen = tl.load(seen_ptr + line, mask=valid, other=0.0)
            kept += seen[:, None] - seen[None, :]
        D = tl.exp2(tl.where((apart >= 0) & valid[:, None], kept, float("-inf"))) * scale
        if late_ptr is not None:
            D = D * tl.load(late_ptr + line, mask=valid, other=0.0)[:, None]
        if early_ptr is not None:
            early = tl.load(early_ptr + line, mask=valid, other=0.0).to(tl.float32)
        at = (rows.to(tl.int64) * H + h)[:, None] * C + steps[None, :]
        if do_ptr is not None:
            B = tl.zeros([C, C], dtype=tl.float32)
            for column in range(0, V, BV):
                do = _load(do_ptr, h, H, V, t0, column, valid, C, BV, FULL, TMA)
                v = _load(v_ptr, h, H, V, t0, column, valid, C, BV, FULL, TMA)
                B = tl.dot(do, tl.trans(v), B, input_precision="ieee")
            if dx_ptr is not None:
                B += tl.load(dx_ptr + line, mask=valid, other=0.0)[:, None]
            B = B * D
            if row_ptr is not None:
                tl.store(col_ptr + line, tl.sum(A * B, 0), mask=valid)
            if early_ptr is not None:
                B = B * early[None, :]
            if row_ptr is not None:
                tl.store(row_ptr + line, tl.sum(A * B, 1), mask=valid)
            tl.store(d_pairs_ptr + at, B.to(d_pairs_ptr.dtype.element_ty), mask=valid[:, None])
        A = A * D
        if early_ptr is not None:
            A = A * early[None, :]
        tl.store(pairs_ptr + at, A.to(pairs_ptr.dtype.element_ty), mask=valid[:, None])
