"""Triton kernels of the decay engine.

One kernel serves every pass. The recurrence written for a reader ``r``, a writer ``s`` and a payload ``p``,

    S_t = exp(g_t) S_{t-1} + ws_t s_t p_t^T              out_t = wr_t r_t^T S_t

is the forward pass with (r, s, p) = (q, k, v). Its three gradients are the same recurrence over other tensors:

    dq: (dO, v, k) forward in time        dv: (k, q, dO) backward in time        dk: (v, dO, q) backward in time

so a program walks the chunks of one sequence (or of one piece of it) in either direction with the state on chip, and
only the payload's channels are split over programs. Pieces of ``PIECE`` tokens have their boundary states in memory:
they let a long sequence fill the GPU (every piece starts from its own boundary state), and the gradient of the gates
starts afresh at each, which keeps it free of cancellation over long sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Log-decays are cut at -80: exp of it is 2e-35, a reset, and sums over a chunk keep four digits of its neighbours.


@triton.jit
def _load(
    x, head, heads, width, t0, column, valid, C: tl.constexpr, W: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr
):
    """Tile ``[C, W]`` of one head of a tensor ``[tokens, heads, width]``, from token ``t0`` and ``column`` on."""
    if TMA:
        tile = x.load([t0, head * width + column])
    else:
        steps, cols = tl.arange(0, C), column + tl.arange(0, W)
        at = x + (t0.to(tl.int64) * heads + head) * width + (steps[:, None] * (heads * width) + cols[None, :])
        if FULL:
            tile = tl.load(at, mask=valid[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=valid[:, None] & (cols < width)[None, :], other=0.0)
    return tile


@triton.jit
def _state_block(ptr, slot, DR, DP, st_r, st_p, column, BR: tl.constexpr, BP: tl.constexpr):
    """Columns ``column ..`` of the state number ``slot`` (a block pointer costs no registers between uses)."""
    base = ptr + slot * DR * DP
    return tl.make_block_ptr(base, (DR, DP), (st_r, st_p), (0, column), (BR, BP), (1, 0))


@triton.jit
def _piece_bounds(piece, cu_ptr, table_ptr, T, PIECE, PACKED: tl.constexpr):
    """First token of a piece, the one after its last, its sequence, and whether it begins it."""
    if PACKED:
        n = tl.load(table_ptr + 2 * piece)
        c = tl.load(table_ptr + 2 * piece + 1)
        first = tl.load(cu_ptr + n) + c * PIECE
        end = tl.load(cu_ptr + n + 1)
    else:
        per_row = tl.cdiv(T, PIECE)
        n = piece // per_row
        c = piece % per_row
        first = n * T + c * PIECE
        end = (n + 1) * T
    return first, tl.minimum(first + PIECE, end), n, c == 0


@triton.jit
def pass_kernel(
    r_ptr,
    s_ptr,
    p_ptr,
    g_ptr,
    seen_ptr,  # per token, summed log2-decay of its chunk up to and with it, [H, tokens]
    left_ptr,  # per token, summed log2-decay of its chunk after it
    wr_ptr,
    ws_ptr,
    start_ptr,  # boundary states [pieces, H, DR, DP] (or [rows, H, DR, DP] when whole sequences are walked)
    out_ptr,
    out_raw,  # the same memory as a pointer
    edge_ptr,  # boundary states to be written
    last_ptr,  # final state
    total_ptr,  # STATE_ONLY: summed log-decay of the piece
    dot_ptr,  # GRAD: the readers' (dq) or writers' (dk) other half of q.dq or k.dk
    row_ptr,
    col_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    PIECE,
    n_rows,
    n_pieces,
    H,
    HR,
    HS,
    HP,
    HD,
    DR,
    DP,
    st_r,
    st_p,
    BR: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 a constant per head, 2 a scalar per token
    WR: tl.constexpr,
    WS: tl.constexpr,
    START: tl.constexpr,
    SPLIT: tl.constexpr,
    STATE_ONLY: tl.constexpr,
    EDGES: tl.constexpr,
    LAST: tl.constexpr,
    PACKED: tl.constexpr,
    GRAD: tl.constexpr,  # 0 none, 1 rows and columns of the gate gradient (dq), 2 columns only (dk)
    EXACT: tl.constexpr,
    FULL: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    splits = tl.cdiv(DP, BP)
    pid = tl.program_id(0)
    p_block = pid % splits
    h = (pid // splits) % H
    unit = pid // (splits * H)  # a piece when SPLIT, else a sequence

    # Tokens are counted over the whole batch, [B * T].
    if SPLIT:
        first, stop, _n, _begins = _piece_bounds(unit, cu_ptr, table_ptr, T, PIECE, PACKED)
        piece0 = unit
    elif PACKED:
        first = tl.load(cu_ptr + unit)
        stop = tl.load(cu_ptr + unit + 1)
        piece0 = tl.load(table_ptr + unit)
    else:
        first = unit * T
        stop = first + T
        piece0 = unit * tl.cdiv(T, PIECE)

    if START:
        origin = _state_block(start_ptr, unit.to(tl.int64) * H + h, DR, DP, st_r, st_p, p_block * BP, BR, BP)
        S = tl.load(origin, boundary_check=(0, 1), padding_option="zero")
    else:
        S = tl.zeros([BR, BP], dtype=tl.float32)

    line_base = h.to(tl.int64) * n_rows
    steps = tl.arange(0, C)
    if GATE == 1:
        constant = tl.maximum(tl.load(g_ptr + h).to(tl.float32), -80.0) * 1.4426950408889634
    total_all = 0.0

    walks = 1
    if not SPLIT:
        walks = tl.cdiv(stop - first, PIECE)
    for walk in range(0, walks):
        if REVERSE:
            leg = walks - 1 - walk
        else:
            leg = walk
        begin = first + leg * PIECE
        end = tl.minimum(begin + PIECE, stop)
        if EDGES:  # the state that enters this piece, in the direction of the walk
            edge = (piece0 + leg).to(tl.int64) * H + h
            edge = _state_block(edge_ptr, edge, DR, DP, st_r, st_p, p_block * BP, BR, BP)
            tl.store(edge, S, boundary_check=(0, 1))

        n_chunks = tl.cdiv(end - begin, C)
        for it in range(0, n_chunks):
            if REVERSE:
                t0 = begin + (n_chunks - 1 - it) * C
            else:
                t0 = begin + it * C
            rows = t0 + steps
            valid = rows < end

            s = _load(s_ptr, h // (H // HS), HS, DR, t0, 0, valid, C, BR, FULL, TMA)
            p = _load(p_ptr, h // (H // HP), HP, DP, t0, p_block * BP, valid, C, BP, FULL, TMA)

            # Gates: what a reader has kept of the entering state, what the leaving state keeps of a writer.
            if GATE != 0:
                if GATE == 1:
                    count = tl.minimum(end - t0, C)
                    b = constant * tl.minimum(steps + 1, count).to(tl.float32)
                    tail = constant * tl.maximum(count - 1 - steps, 0).to(tl.float32)
                    total = constant * count
                else:
                    b = tl.load(seen_ptr + line_base + rows, mask=valid, other=0.0)
                    tail = tl.load(left_ptr + line_base + rows, mask=valid, other=0.0)
                    total = tl.load(seen_ptr + line_base + tl.minimum(t0 + C, end) - 1)
                total_all += total
                if REVERSE:
                    read = tl.exp2(tail)
                    write = tl.exp2(b)
                else:
                    read = tl.exp2(b)
                    write = tl.exp2(tail)
            if WS:
                ws = tl.load(ws_ptr + rows.to(tl.int64) * H + h, mask=valid, other=0.0).to(tl.float32)

            if not STATE_ONLY:
                r = _load(r_ptr, h // (H // HR), HR, DR, t0, 0, valid, C, BR, FULL, TMA)
                A = tl.dot(r, tl.trans(s), input_precision="ieee")
                if REVERSE:
                    seen = steps[:, None] <= steps[None, :]
                    if RAGGED:
                        seen = seen & valid[None, :]
                else:
                    seen = steps[:, None] >= steps[None, :]
                    if RAGGED:
                        seen = seen & valid[:, None]
                if GATE == 0:
                    A = tl.where(seen, A, 0.0)
                else:
                    if EXACT and GATE == 2:  # each pair sums its own gates: no cancellation
                        g = tl.load(g_ptr + rows.to(tl.int64) * H + h, mask=valid, other=0.0).to(tl.float32)
                        g = tl.maximum(g, -80.0) * 1.4426950408889634
                        if REVERSE:
                            pair = tl.cumsum(tl.where(steps[:, None] < steps[None, :], g[None, :], 0.0), 1)
                        else:
                            pair = tl.cumsum(tl.where(steps[:, None] > steps[None, :], g[:, None], 0.0), 0)
                    elif GATE == 1 and REVERSE:
                        pair = constant * (steps[None, :] - steps[:, None])
                    elif GATE == 1:
                        pair = constant * (steps[:, None] - steps[None, :])
                    elif REVERSE:
                        pair = b[None, :] - b[:, None]
                    else:
                        pair = b[:, None] - b[None, :]
                    A = A * tl.exp2(tl.where(seen, pair, float("-inf")))
                if REVERSE:  # backward in time the reading's scale belongs to what is written: the state is dS itself
                    A = A * scale
                plain = A
                if WS:
                    A = A * ws[None, :]
                inter = tl.dot(r, S.to(r.dtype), input_precision="ieee")
                if GATE != 0:
                    inter = inter * read[:, None]
                if GRAD == 0:
                    o = tl.dot(A.to(p.dtype), p, inter, input_precision="ieee")
                else:
                    o = inter + tl.dot(A.to(p.dtype), p, input_precision="ieee")
                if WR:
                    wr = tl.load(wr_ptr + rows.to(tl.int64) * H + h, mask=valid, other=0.0).to(tl.float32)
                    o = o * wr[:, None]
                if not REVERSE:
                    o = o * scale
                o = o.to(p.dtype)
                if TMA and not RAGGED:
                    out_ptr.store([t0, h * DP + p_block * BP], o)
                else:
                    cols = p_block * BP + tl.arange(0, BP)
                    at = out_raw + (t0.to(tl.int64) * H + h) * DP + (steps[:, None] * (H * DP) + cols[None, :])
                    tl.store(at, o, mask=valid[:, None] & (cols < DP)[None, :])

                if GRAD != 0:
                    # E_rs, what the pair (reader, writer) contributes to the log-gates between them and, without the
                    # write weight, to the weight. Pairs inside the chunk come from one tile, so that their sums over
                    # readers and over writers cancel exactly; pairs that cross chunks come through the state.
                    d = _load(dot_ptr, h // (H // HD), HD, DP, t0, p_block * BP, valid, C, BP, FULL, TMA)
                    across = tl.sum(d.to(tl.float32) * inter, 1)
                    line = p_block.to(tl.int64) * H * n_rows + line_base + rows
                    if GRAD == 1:
                        across = across * scale
                        E = plain * tl.dot(d, tl.trans(p), input_precision="ieee") * scale
                        if WR:
                            E = E * wr[:, None]
                            across = across * wr
                        tl.store(col_ptr + line, tl.sum(E, 0), mask=valid)
                        if WS:
                            E = E * ws[None, :]
                        tl.store(row_ptr + line, tl.sum(E, 1) + across, mask=valid)
                    else:
                        tl.store(col_ptr + line, across, mask=valid)

            # The write: the payload carries the weights, so the writer's tile goes to the tensor cores as loaded.
            if GATE != 0:
                S = S * tl.exp2(total)
                if WS:
                    write = write * ws
            elif WS:
                write = ws
            elif REVERSE or RAGGED:
                write = tl.zeros([C], dtype=tl.float32) + 1.0
            if REVERSE:
                write = write * scale
            if (GATE != 0) or WS or REVERSE or RAGGED:
                weighted = p * write[:, None]
                if RAGGED:  # what lies behind the sequence's end is another's
                    weighted = tl.where(valid[:, None], weighted, 0.0)
                p = weighted.to(p.dtype)
            S = tl.dot(tl.trans(s), p, S, input_precision="ieee")

    if LAST:
        final = _state_block(last_ptr, unit.to(tl.int64) * H + h, DR, DP, st_r, st_p, p_block * BP, BR, BP)
        tl.store(final, S, boundary_check=(0, 1))
    if STATE_ONLY and GATE != 0:
        if p_block == 0:
            tl.store(total_ptr + unit * H + h, total_all)


@triton.jit
def chain_kernel(
    start_ptr,
    piece_ptr,
    total_ptr,
    edge_ptr,
    last_ptr,
    first_ptr,  # [rows + 1] pieces before each sequence (PACKED)
    per_row,
    H,
    SIZE,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Boundary states of the pieces, one after another: ``S <- exp(total) S + piece``."""
    blocks = tl.cdiv(SIZE, BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    n = pid // (blocks * H)
    if PACKED:
        first = tl.load(first_ptr + n)
        count = tl.load(first_ptr + n + 1) - first
    else:
        first = n * per_row
        count = per_row
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    S = tl.load(start_ptr + (n.to(tl.int64) * H + h) * SIZE + at, mask=mask, other=0.0)
    for it in range(0, count):
        if REVERSE:
            piece = first + count - 1 - it
        else:
            piece = first + it
        slot = (piece.to(tl.int64) * H + h) * SIZE + at
        tl.store(edge_ptr + slot, S, mask=mask)
        if GATED:
            S = S * tl.exp2(tl.load(total_ptr + piece * H + h))
        S += tl.load(piece_ptr + slot, mask=mask, other=0.0)
    tl.store(last_ptr + (n.to(tl.int64) * H + h) * SIZE + at, S, mask=mask)


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
    first, stop, _n, _begins = _piece_bounds(pid // H, cu_ptr, table_ptr, T, PIECE, PACKED)
    at = tl.arange(0, LENGTH // C)[:, None] * C + tl.arange(0, C)[None, :]
    rows = first + at
    valid = (rows < stop) & (at < PIECE)
    g = tl.load(g_ptr + rows.to(tl.int64) * H + h, mask=valid, other=0.0).to(tl.float32)
    inner = valid & (rows + 1 < stop) & (at % C + 1 < C)
    after = tl.load(g_ptr + (rows + 1).to(tl.int64) * H + h, mask=inner, other=0.0).to(tl.float32)
    line = h.to(tl.int64) * n_rows + rows
    log2e = 1.4426950408889634
    tl.store(seen_ptr + line, tl.cumsum(tl.maximum(g, -80.0) * log2e, 1), mask=valid)
    tl.store(left_ptr + line, tl.cumsum(tl.maximum(after, -80.0) * log2e, 1, reverse=True), mask=valid)


@triton.jit
def gate_kernel(
    row_ptr,
    col_ptr,
    cross_ptr,
    w_ptr,
    edge_ptr,
    d_edge_ptr,
    d_first_ptr,
    dg_ptr,
    dw_ptr,
    cu_ptr,
    table_ptr,
    T,
    n_rows,
    PIECE,
    H,
    SIZE,
    n_blocks,
    n_cross,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WS: tl.constexpr,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of the log-gates and write weights of one piece from the sums of the dq and dk passes.

    With E_ij the contribution of the pair (reader i, writer j), a gate t collects all pairs j < t <= i. At the first
    token of the piece that is <S, dS> of the state before it; from token to token the pairs it wrote come in and those
    it read go out.
    """
    pid = tl.program_id(0)
    h = pid % H
    piece = pid // H
    first, stop, n, begins = _piece_bounds(piece, cu_ptr, table_ptr, T, PIECE, PACKED)
    rows = first + tl.arange(0, LENGTH)
    valid = (rows < stop) & (tl.arange(0, LENGTH) < PIECE)
    at = rows.to(tl.int64) * H + h
    line = h.to(tl.int64) * n_rows + rows
    row = tl.zeros([LENGTH], dtype=tl.float32)
    col = tl.zeros([LENGTH], dtype=tl.float32)
    for _ in range(0, n_blocks):
        row += tl.load(row_ptr + line, mask=valid, other=0.0)
        col += tl.load(col_ptr + line, mask=valid, other=0.0)
        row_ptr += n_rows * H
        col_ptr += n_rows * H
    for _ in range(0, n_cross):
        col += tl.load(cross_ptr + line, mask=valid, other=0.0)
        cross_ptr += n_rows * H
    if WS:
        tl.store(dw_ptr + at, col.to(dw_ptr.dtype.element_ty), mask=valid)
        col = col * tl.load(w_ptr + at, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        S_at = edge_ptr + (piece.to(tl.int64) * H + h) * SIZE
        if begins:
            dS_at = d_first_ptr + (n.to(tl.int64) * H + h) * SIZE
        else:
            dS_at = d_edge_ptr + ((piece - 1).to(tl.int64) * H + h) * SIZE
        acc = tl.zeros([BLOCK], dtype=tl.float32)
        for k in range(0, SIZE, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            S = tl.load(S_at + cols, mask=cols < SIZE, other=0.0)
            acc += S * tl.load(dS_at + cols, mask=cols < SIZE, other=0.0)
        change = col - row
        dg = tl.sum(acc, 0) + (tl.cumsum(change, 0) - change)
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=valid)
