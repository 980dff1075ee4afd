"""Triton kernels around the passes: plans and sums of the gates, boundary states and gate gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _chunk_bounds, _piece_bounds


@triton.jit
def linear(a, b, c, d):
    """The map ``z -> c (a z + b) + d`` as one of the kind ``z -> a z + b``."""
    return a * c, b * c + d


@triton.jit
def chain_kernel(
    start_ptr,
    piece_ptr,
    total_ptr,  # summed log2-decay of each piece by a scalar gate, and by vectors over rows and columns of the state
    total_r_ptr,
    total_p_ptr,
    edge_ptr,
    last_ptr,
    first_ptr,  # [rows + 1] pieces before each sequence (PACKED)
    per_row,
    each,  # states a piece: where there is one a chunk, chunks take the place of pieces
    H,
    R,
    P,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # pieces taken together
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Boundary states of the pieces: a scan of ``S <- exp(total) S + piece``."""
    size = R * P
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    n = pid // (blocks * H)
    if PACKED:
        first = tl.load(first_ptr + n) * each
        count = tl.load(first_ptr + n + 1) * each - first
    else:
        first = n * per_row * each
        count = per_row * each
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    S = tl.load(start_ptr + (n.to(tl.int64) * H + h) * size + at, mask=mask, other=0.0)
    for done in range(0, count, GROUP):
        nth = done + tl.arange(0, GROUP)
        slot = (first + (count - 1 - nth if REVERSE else nth)).to(tl.int64) * H + h
        there = (nth < count)[:, None]
        total = tl.zeros([GROUP, BLOCK], dtype=tl.float32)
        if total_ptr is not None:
            total += tl.load(total_ptr + slot, mask=nth < count, other=0.0)[:, None]
        if total_r_ptr is not None:
            total += tl.load(
                total_r_ptr + slot[:, None] * R + (at // P)[None, :], mask=there & mask[None, :], other=0.0
            )
        if total_p_ptr is not None:
            total += tl.load(total_p_ptr + slot[:, None] * P + (at % P)[None, :], mask=there & mask[None, :], other=0.0)
        piece = tl.load(piece_ptr + slot[:, None] * size + at[None, :], mask=there & mask[None, :], other=0.0)
        keep, add = tl.associative_scan((tl.exp2(total), piece), 0, linear)
        after = keep * S[None, :] + add
        if done == 0:
            tl.store(
                edge_ptr + ((first + (count - 1 if REVERSE else 0)).to(tl.int64) * H + h) * size + at, S, mask=mask
            )
        follows = slot + (-H if REVERSE else H)
        tl.store(
            edge_ptr + follows[:, None] * size + at[None, :], after, mask=(nth + 1 < count)[:, None] & mask[None, :]
        )
        S = tl.sum(tl.where((nth == tl.minimum(done + GROUP, count) - 1)[:, None], after, 0.0), 0)
    tl.store(last_ptr + (n.to(tl.int64) * H + h) * size + at, S, mask=mask)


@triton.jit
def _log2_gate(g_ptr, rows, heads, h, width, cols, mask):
    """Log2-decays of a tile of tokens, resets cut at -104."""
    at = (rows.to(tl.int64) * heads + h)[:, None] * width + cols[None, :]
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(g, -104.0) * 1.4426950408889634


@triton.jit
def prepare_kernel(
    late_ptr,
    early_ptr,
    g_ptr,
    u_ptr,
    late_out_ptr,
    early_out_ptr,
    own_ptr,
    half_ptr,
    slow_ptr,
    cu_ptr,
    table_ptr,
    limit,
    T,
    PIECE,
    H,
    HQ,
    D,
    BD: tl.constexpr,
    ROWS: tl.constexpr,  # taken together, at most half of the chunk
    C: tl.constexpr,
    GATED: tl.constexpr,
    BONUS: tl.constexpr,
    OWN: tl.constexpr,
    SLOW: tl.constexpr,  # which chunks are walked token by token: 0 decide, 1 decide with another gate, 2 as decided
    PACKED: tl.constexpr,
):
    """One chunk of a head: multiply the factors of a vector gate into the late (where given) and the early tokens, and
    pair every token with itself (through the bonus ``u`` where there is one). One warp a chunk, a few rows at a time:
    sums over rows then hardly leave a thread, and many chunks are under way."""
    pid = tl.program_id(0)
    h = pid % H
    t0, stop = _chunk_bounds(pid // H, cu_ptr, table_ptr, T, PIECE, C, PACKED)
    cols = tl.arange(0, BD)
    inside = cols < D
    nth = tl.arange(0, ROWS)
    if t0 < stop:
        sums = tl.zeros([BD], dtype=tl.float32)
        if GATED:
            for block in tl.static_range(0, C // 2, ROWS):
                rows = t0 + block + nth
                sums -= tl.sum(_log2_gate(g_ptr, rows, H, h, D, cols, (rows < stop)[:, None] & inside[None, :]), 0)
            if SLOW != 2:
                after = tl.zeros([BD], dtype=tl.float32)
                for block in tl.static_range(C // 2, C, ROWS):
                    rows = t0 + block + nth
                    after += tl.sum(_log2_gate(g_ptr, rows, H, h, D, cols, (rows < stop)[:, None] & inside[None, :]), 0)
                half = half_ptr + pid.to(tl.int64) * 2 * D + cols
                tl.store(half, -sums, mask=inside)
                tl.store(half + D, after, mask=inside)
                slow = tl.minimum(tl.min(-sums, 0), tl.min(after, 0)) < -limit
            if SLOW == 1:
                slow = slow | (tl.load(slow_ptr + pid) != 0)
            if SLOW == 2:
                slow = tl.load(slow_ptr + pid) != 0
            else:
                tl.store(slow_ptr + pid, slow.to(tl.int8))
        if SLOW != 1:
            for block in range(0, C, ROWS):
                rows = t0 + block + nth
                mask = (rows < stop)[:, None] & inside[None, :]
                at = (rows.to(tl.int64) * HQ + h // (H // HQ))[:, None] * D + cols[None, :]
                out = (rows.to(tl.int64) * H + h)[:, None] * D + cols[None, :]
                early = tl.load(early_ptr + at, mask=mask, other=0.0).to(tl.float32)
                if late_ptr is not None:
                    late = tl.load(late_ptr + at, mask=mask, other=0.0).to(tl.float32)
                if GATED:
                    g = _log2_gate(g_ptr, rows, H, h, D, cols, mask)
                    seen = sums[None, :] + tl.cumsum(g, 0)
                    sums += tl.sum(g, 0)
                    type = early_out_ptr.dtype.element_ty
                    tl.store(early_out_ptr + out, (early * tl.exp2(tl.where(slow, 0.0, -seen))).to(type), mask=mask)
                    if late_ptr is not None:
                        to = tl.where(slow, 0.0, seen - g if BONUS else seen)
                        tl.store(late_out_ptr + out, (late * tl.exp2(to)).to(type), mask=mask)
                if OWN:
                    pair = late * early
                    if u_ptr is not None:
                        pair = pair * tl.load(u_ptr + h * D + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
                    tl.store(own_ptr + rows.to(tl.int64) * H + h, tl.sum(pair, 1), mask=rows < stop)


@triton.jit
def finish_kernel(
    late_ptr,
    early_ptr,
    g_ptr,
    u_ptr,
    d_late_ptr,  # late tokens' gradient without their own pair, multiplied by 1 / factor; replaced by the gradient
    d_early_ptr,  # likewise, but not replaced
    d_early_out_ptr,  # the gradient; may be d_early_ptr
    own_ptr,  # weight of each token's own pair, to be scaled
    half_ptr,
    slow_ptr,
    edge_ptr,
    d_edge_ptr,
    d_first_ptr,
    z_edge_ptr,  # by chunks
    dz_edge_ptr,
    dz_first_ptr,
    dg_ptr,
    du_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    PIECE,
    H,
    HQ,
    D,
    E,  # channels of the state's other side
    st_d,
    st_e,
    BD: tl.constexpr,
    BE: tl.constexpr,
    ROWS: tl.constexpr,  # taken together, at most a chunk
    C: tl.constexpr,
    GATED: tl.constexpr,
    BONUS: tl.constexpr,
    GRAD: tl.constexpr,  # gradient of the gate, and of the bonus where there is one
    LATE: tl.constexpr,  # write the late tokens' gradient
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of late and early tokens from the passes', and of the vector gate between them, over one piece.

    A gate collects from all pairs on whose two sides it lies: at the first token of the piece <S, dS> of the state
    before it; from token to token the pairs it wrote come in and those it read go out.
    """
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    unit = pid // (blocks * H)
    first, stop, n, origin = _piece_bounds(unit, cu_ptr, table_ptr, T, PIECE, PACKED)
    cols = block * BD + tl.arange(0, BD)
    nth = tl.arange(0, ROWS)
    slot = unit.to(tl.int64) * H + h
    reach = tl.zeros([BD], dtype=tl.float32)
    du = tl.zeros([BD], dtype=tl.float32)
    if GRAD and GATED:
        if first == origin:
            dS_at = d_first_ptr + (n.to(tl.int64) * H + h) * D * E
        else:
            dS_at = d_edge_ptr + (slot - H) * D * E
        acc = tl.zeros([BD, BE], dtype=tl.float32)
        for e in range(0, E, BE):
            others = e + tl.arange(0, BE)
            at = cols[:, None] * st_d + others[None, :] * st_e
            mask = (cols < D)[:, None] & (others < E)[None, :]
            S = tl.load(edge_ptr + slot * D * E + at, mask=mask, other=0.0)
            acc += S * tl.load(dS_at + at, mask=mask, other=0.0)
        reach = tl.sum(acc, 1)
        if NORM:
            chunk = unit.to(tl.int64) * (PIECE // C) * H + h
            if first == origin:
                dz_at = dz_first_ptr + (n.to(tl.int64) * H + h) * D
            else:
                dz_at = dz_edge_ptr + (chunk - H) * D
            z = tl.load(z_edge_ptr + chunk * D + cols, mask=cols < D, other=0.0)
            reach += z * tl.load(dz_at + cols, mask=cols < D, other=0.0)
    if u_ptr is not None:
        u = tl.load(u_ptr + h * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    sums = tl.zeros([BD], dtype=tl.float32)
    for t0 in range(first, stop, ROWS):
        rows = t0 + nth
        mask = (rows < stop)[:, None] & (cols < D)[None, :]
        at = (rows.to(tl.int64) * HQ + h // (H // HQ))[:, None] * D + cols[None, :]
        out = (rows.to(tl.int64) * H + h)[:, None] * D + cols[None, :]
        late = tl.load(late_ptr + at, mask=mask, other=0.0).to(tl.float32)
        early = tl.load(early_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d_late = tl.load(d_late_ptr + out, mask=mask, other=0.0).to(tl.float32)
        d_early = tl.load(d_early_ptr + out, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            chunk = (unit.to(tl.int64) * (PIECE // C) + (t0 - first) // C) * H + h
            slow = tl.load(slow_ptr + chunk) != 0
            g0 = tl.load(half_ptr + chunk * 2 * D + cols, mask=cols < D, other=0.0)
            sums = tl.where((t0 - first) % C == 0, -g0, sums)
            g = _log2_gate(g_ptr, rows, H, h, D, cols, mask)
            seen = sums[None, :] + tl.cumsum(g, 0)
            sums += tl.sum(g, 0)
            # From the tokens as the passes read them, rounded: what a pair brings to a gate and takes from it cancels.
            type = late_ptr.dtype.element_ty
            factor = tl.exp2(tl.where(slow, 0.0, seen - g if BONUS else seen))
            read = (late * factor).to(type).to(tl.float32) * d_late
            d_late = d_late * factor
            factor = tl.exp2(tl.where(slow, 0.0, -seen))
            wrote = (early * factor).to(type).to(tl.float32) * d_early
            d_early = d_early * factor
        own = scale * tl.load(own_ptr + rows.to(tl.int64) * H + h, mask=rows < stop, other=0.0)[:, None]
        if u_ptr is not None:
            du += tl.sum(own * late * early, 0)
            own = own * u[None, :]
        if LATE:
            tl.store(d_late_ptr + out, (d_late + own * early).to(d_late_ptr.dtype.element_ty), mask=mask)
        tl.store(d_early_out_ptr + out, (d_early + own * late).to(d_early_out_ptr.dtype.element_ty), mask=mask)
        if GRAD and GATED:
            change = wrote - read
            keep, sum = tl.zeros([ROWS, BD], dtype=tl.float32) + 1.0, tl.cumsum(change, 0)
            if slow:  # there may be resets: nothing reaches across one, no rounding error of earlier tokens either
                keep = tl.where(g > -150.0, 1.0, 0.0)
                keep, sum = tl.associative_scan((keep, wrote - keep * read if BONUS else change), 0, linear)
            before = keep * reach[None, :]  # added last: a token's own change may be far larger
            dg = (sum - (wrote if BONUS else change)) + before
            reach = tl.sum(tl.where((nth == ROWS - 1)[:, None], sum + before, 0.0), 0)
            tl.store(dg_ptr + out, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    if GRAD and u_ptr is not None:
        tl.store(du_ptr + slot * D + cols, du, mask=cols < D)


@triton.jit
def read_kernel(
    o_ptr,
    v_ptr,
    own_ptr,
    g_ptr,
    half_ptr,
    slow_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    PIECE,
    H,
    D,
    BD: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Multiply the late factors of a value gate into a reading, one chunk of a head. Where reading is exclusive the
    token's own pair comes in afterwards: its factors are not each other's inverse."""
    pid = tl.program_id(0)
    h = pid % H
    t0, stop = _chunk_bounds(pid // H, cu_ptr, table_ptr, T, PIECE, C, PACKED)
    if t0 < stop:
        rows, cols = t0 + tl.arange(0, C), tl.arange(0, BD)
        mask = (rows < stop)[:, None] & (cols < D)[None, :]
        at = (rows.to(tl.int64) * H + h)[:, None] * D + cols[None, :]
        g = _log2_gate(g_ptr, rows, H, h, D, cols, mask)
        to = tl.cumsum(g, 0) - tl.load(half_ptr + pid.to(tl.int64) * 2 * D + cols, mask=cols < D, other=0.0)[None, :]
        if own_ptr is not None:
            to -= g
        to = tl.where(tl.load(slow_ptr + pid) != 0, 0.0, to)
        o = tl.load(o_ptr + at, mask=mask, other=0.0).to(tl.float32) * tl.exp2(to)
        if own_ptr is not None:
            own = scale * tl.load(own_ptr + rows.to(tl.int64) * H + h, mask=rows < stop, other=0.0)
            o += own[:, None] * tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(
    g_ptr,
    seen_ptr,
    left_ptr,
    cu_ptr,
    table_ptr,
    T,
    n_rows,
    PIECE,
    H,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Sums of the log2-decays of each chunk up to a token and after it, laid out ``[H, tokens]``. The second is summed
    from its own gates: a difference would lose what follows a reset."""
    pid = tl.program_id(0)
    h = pid % H
    first, stop, _n, _origin = _piece_bounds(pid // H, cu_ptr, table_ptr, T, PIECE, PACKED)
    at = tl.arange(0, LENGTH // C)[:, None] * C + tl.arange(0, C)[None, :]
    rows = first + at
    valid = (rows < stop) & (at < PIECE)
    g = tl.load(g_ptr + rows.to(tl.int64) * H + h, mask=valid, other=0.0).to(tl.float32)
    inner = valid & (rows + 1 < stop) & (at % C + 1 < C)
    after = tl.load(g_ptr + (rows + 1).to(tl.int64) * H + h, mask=inner, other=0.0).to(tl.float32)
    line = h.to(tl.int64) * n_rows + rows
    log2e = 1.4426950408889634
    tl.store(seen_ptr + line, tl.cumsum(tl.maximum(g, -104.0) * log2e, 1), mask=valid)
    tl.store(left_ptr + line, tl.cumsum(tl.maximum(after, -104.0) * log2e, 1, reverse=True), mask=valid)


@triton.jit
def gate_kernel(
    row_ptr,  # partial sums of late and of early tokens, [., H, tokens]
    col_ptr,
    w_ptr,  # [H, tokens]
    edge_ptr,  # behind those of the pieces the states after every sequence, as in z_edge
    d_edge_ptr,
    d_first_ptr,
    z_edge_ptr,  # by chunks
    dz_edge_ptr,
    dz_first_ptr,
    dg_ptr,
    dw_ptr,
    cu_ptr,
    table_ptr,
    T,
    n_rows,
    PIECE,
    pieces,
    H,
    SIZE,
    K,
    n_row,
    n_col,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WS: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BONUS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of the scalar log-gates and write weights of one piece from the sums of the dq and dk passes.

    With E_ij the contribution of the pair (reader i, writer j), a gate t collects all pairs j < t <= i (j < t < i when
    reading is exclusive). At the first token of the piece that is <S, dS> of the state before it; from token to token
    the pairs it wrote come in and those it read go out.
    """
    pid = tl.program_id(0)
    h = pid % H
    piece = pid // H
    first, stop, n, origin = _piece_bounds(piece, cu_ptr, table_ptr, T, PIECE, PACKED)
    rows = first + tl.arange(0, LENGTH)
    valid = (rows < stop) & (tl.arange(0, LENGTH) < PIECE)
    at = rows.to(tl.int64) * H + h
    line = h.to(tl.int64) * n_rows + rows
    row = tl.zeros([LENGTH], dtype=tl.float32)
    col = tl.zeros([LENGTH], dtype=tl.float32)
    for _ in range(0, n_row):
        row += tl.load(row_ptr + line, mask=valid, other=0.0)
        row_ptr += n_rows * H
    for _ in range(0, n_col):
        col += tl.load(col_ptr + line, mask=valid, other=0.0)
        col_ptr += n_rows * H
    if WS:
        tl.store(dw_ptr + at, col.to(dw_ptr.dtype.element_ty), mask=valid)
        col = col * tl.load(w_ptr + line, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        slot = piece.to(tl.int64) * H + h
        row_slot = n.to(tl.int64) * H + h
        if first == origin:
            dS_at = d_first_ptr + row_slot * SIZE
        else:
            dS_at = d_edge_ptr + (slot - H) * SIZE
        if PACKED:
            end = tl.load(cu_ptr + n + 1)
        else:
            end = origin + T
        following = piece.to(tl.int64) + 1
        if stop == end:
            following = n.to(tl.int64) + pieces
        S_after = edge_ptr + (following * H + h) * SIZE
        acc = tl.zeros([BLOCK], dtype=tl.float32)
        acc_after = tl.zeros([BLOCK], dtype=tl.float32)
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        squares_after = tl.zeros([BLOCK], dtype=tl.float32)
        for k in range(0, SIZE, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            S = tl.load(edge_ptr + slot * SIZE + cols, mask=cols < SIZE, other=0.0)
            product = S * tl.load(dS_at + cols, mask=cols < SIZE, other=0.0)
            acc += product
            squares += product * product
            S = tl.load(S_after + cols, mask=cols < SIZE, other=0.0)
            product = S * tl.load(d_edge_ptr + slot * SIZE + cols, mask=cols < SIZE, other=0.0)
            acc_after += product
            squares_after += product * product
        if NORM:
            chunk = piece.to(tl.int64) * (PIECE // C) * H + h
            if first == origin:
                dz_at = dz_first_ptr + row_slot * K
            else:
                dz_at = dz_edge_ptr + (chunk - H) * K
            cols = tl.arange(0, BLOCK)
            z = tl.load(z_edge_ptr + chunk * K + cols, mask=cols < K, other=0.0)
            acc += z * tl.load(dz_at + cols, mask=cols < K, other=0.0)
            each = PIECE // C
            following = (piece.to(tl.int64) + 1) * each
            dz_at = dz_edge_ptr + ((following - 1) * H + h) * K
            if stop == end:
                following = n.to(tl.int64) + pieces * each
            z = tl.load(z_edge_ptr + (following * H + h) * K + cols, mask=cols < K, other=0.0)
            acc_after += z * tl.load(dz_at + cols, mask=cols < K, other=0.0)
        row, col = row.to(tl.float64), col.to(tl.float64)  # what is left may be far smaller than the terms
        change = col - row
        before = tl.sum(acc.to(tl.float64), 0)
        dg = before + (tl.cumsum(change, 0) - change)
        # Behind the piece's last token <S, dS> is known again. What differs are rounding errors, which would outlast
        # what the gates let go of: each term bears its part, by the variance of independent errors of its size.
        differs = before + tl.sum(change, 0) - tl.sum(acc_after.to(tl.float64), 0)
        doubt = row * row + col * col
        part = tl.sum(squares.to(tl.float64), 0) + (tl.cumsum(doubt, 0) - doubt)
        whole = tl.sum(squares.to(tl.float64) + squares_after, 0) + tl.sum(doubt, 0)
        if BONUS:
            dg -= row
            part += row * row
        dg -= tl.where(whole > 0, differs / tl.where(whole > 0, whole, 1.0), 0.0) * part
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=valid)
