"""Triton kernels of the decay engine.

One kernel serves every pass. The recurrence written for a reader ``r``, a writer ``s`` and a payload ``p``,

    S_t = exp(g_t) S_{t-1} + ws_t s_t p_t^T              out_t = wr_t r_t^T S_t

is the forward pass with (r, s, p) = (q, k, v). Its three gradients are the same recurrence over other tensors:

    dq: (dO, v, k) forward in time        dv: (k, q, dO) backward in time        dk: (v, dO, q) backward in time

The states of dv and dk are each other's transpose: where one program holds them whole, one pass gives both (``BOTH``).
A program walks the chunks of one sequence (or of one piece of it) in either direction with the state on chip, and only
the payload's channels are split over programs. Pieces of ``PIECE`` tokens have their boundary states in memory: they
let a long sequence fill the GPU (every piece starts from its own boundary state), and the gradient of the gates starts
afresh at each, which keeps it free of cancellation over long sequences.

Gates. Of a pair of tokens, the *late* one (q, dO) reads what the *early* one (k, v) wrote. A scalar gate enters as a
matrix over the pairs of a chunk, which a kernel of its own makes for wide heads (``kernels_pairs.py``). A vector gate,
on the channels of reader and writer or of the payload, is split into a factor of the late and one of the early token,
both relative to the middle of the chunk: ``prepare_kernel`` multiplies them into the tensors, the pass has only to
scale its state (``HALF_R``, ``HALF_P``), and ``finish_kernel`` multiplies the results and gathers the gates' gradients.
The factors grow as the inverse of half a chunk's gates, so a chunk in which any channel forgets more than a limit has
factors of 1 and is walked token by token: the recurrence itself, exact for every gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Log-decays are cut at -104: exp of it is 0 in fp32, a reset, and sums over a chunk keep four digits of its neighbours.


@triton.jit
def _load(
    x, head, heads, width, t0, column, valid, C: tl.constexpr, W: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr
):
    """Tile ``[C, W]`` of one head of a tensor ``[tokens, heads, width]``, from token ``t0`` and ``column`` on."""
    if TMA and FULL:
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
def _load_line(x, h, line, t0, valid, other, C: tl.constexpr, TMA: tl.constexpr):
    """A number each of the tokens of a chunk, of a tensor ``[H, tokens]``."""
    if TMA:
        values = tl.reshape(x.load([h, t0]), [C])
    else:
        values = tl.load(x + line, mask=valid, other=other)
    return values.to(tl.float32)


@triton.jit
def _load_sum(z, row, width, column, W: tl.constexpr, TMA: tl.constexpr):
    """Channels from ``column`` on of a row of sums ``[rows, width]``."""
    if TMA:
        values = tl.reshape(z.load([row.to(tl.int32), column]), [W])
    else:
        cols = column + tl.arange(0, W)
        values = tl.load(z + row * width + cols, mask=cols < width, other=0.0)
    return values


@triton.jit
def _load_pairs(x, h, H, t0, valid, C: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr):
    """Weights of the pairs of a chunk ``[C, C]``, late tokens down, or across where ``TRANSPOSED``."""
    steps = tl.arange(0, C)
    if TMA:
        A = x.load([t0, h * C])
        if TRANSPOSED:
            A = tl.trans(A)
    else:
        late = ((t0 + steps).to(tl.int64) * H + h) * C
        if TRANSPOSED:
            A = tl.load(x + late[None, :] + steps[:, None], mask=valid[None, :], other=0.0)
        else:
            A = tl.load(x + late[:, None] + steps[None, :], mask=valid[:, None], other=0.0)
    return A


@triton.jit
def _store(x, head, heads, width, t0, column, valid, tile, C: tl.constexpr, W: tl.constexpr):
    """Write the valid rows of a tile ``[C, W]``."""
    steps, cols = tl.arange(0, C), column + tl.arange(0, W)
    at = x + (t0.to(tl.int64) * heads + head) * width + (steps[:, None] * (heads * width) + cols[None, :])
    tl.store(at, tile.to(x.dtype.element_ty), mask=valid[:, None] & (cols < width)[None, :])


@triton.jit
def _state_block(ptr, slot, DR, DP, st_r, st_p, column, BR: tl.constexpr, BP: tl.constexpr):
    """Columns ``column ..`` of the state number ``slot`` (a block pointer costs no registers between uses)."""
    base = ptr + slot * DR * DP
    return tl.make_block_ptr(base, (DR, DP), (st_r, st_p), (0, column), (BR, BP), (1, 0))


@triton.jit
def _piece_bounds(piece, cu_ptr, table_ptr, T, PIECE, PACKED: tl.constexpr):
    """First token of a piece, the one after its last, its sequence, and the sequence's first token."""
    if PACKED:
        n = tl.load(table_ptr + 2 * piece)
        c = tl.load(table_ptr + 2 * piece + 1)
        origin = tl.load(cu_ptr + n)
        end = tl.load(cu_ptr + n + 1)
    else:
        per_row = tl.cdiv(T, PIECE)
        n = piece // per_row
        c = piece % per_row
        origin = n * T
        end = origin + T
    first = origin + c * PIECE
    return first, tl.minimum(first + PIECE, end), n, origin


@triton.jit
def _chunk_bounds(chunk, cu_ptr, table_ptr, T, PIECE, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of a chunk, counted over all pieces, and the one after the last of its piece."""
    per_piece = PIECE // C
    first, stop, _n, _origin = _piece_bounds(chunk // per_piece, cu_ptr, table_ptr, T, PIECE, PACKED)
    return first + (chunk % per_piece) * C, stop


@triton.jit
def _row(x, head, heads, width, t, cols):
    """One token of one head of ``[tokens, heads, width]`` in fp32."""
    at = x + (t.to(tl.int64) * heads + head) * width + cols
    return tl.load(at, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def pass_kernel(
    # Tiles, and lines of numbers of the tokens, [H, tokens]: descriptors where the copy engine moves them (TMA, LINES),
    # and always pointers to the same memory of tiles.
    r_ptr,
    s_ptr,
    p_ptr,
    pairs_ptr,  # weights of the pairs of each chunk, late tokens down, [tokens, H, C]; None: they are made here
    out_ptr,  # None where it is stored by address: its dtype is not the tiles', or :meth:`Call.walk` says so
    dot_ptr,  # GRAD: the late (dq) or early (dk) tokens' other half of q.dq or k.dk, or the reading (dv)
    beside_ptr,  # BOTH: what reads the transposed state
    turned_ptr,  # and what it reads there, as out_ptr
    r_raw,
    s_raw,
    p_raw,
    out_raw,
    dot_raw,
    turned_raw,
    g_ptr,  # scalar gate, [tokens, H], or [H] when constant
    seen_ptr,  # a line: summed log2-decay of a token's chunk up to and with it
    seen_raw,
    left_ptr,  # a line: summed log2-decay of a token's chunk after it
    gr_ptr,  # vector gates, for chunks that are walked token by token, [tokens, H, channels]
    gp_ptr,
    half_r_ptr,  # their log2-decays over both halves of each chunk, [chunks, H, 2, channels]
    half_p_ptr,
    slow_ptr,  # whether a chunk is walked token by token, [chunks, H]
    own_ptr,  # DIAG: weight of each token's own pair, [tokens, H]
    wr_ptr,  # lines: weights of the late and of the early tokens
    ws_ptr,
    start_ptr,  # boundary states [pieces, H, DR, DP] (or [rows, H, DR, DP] when whole sequences are walked)
    edge_ptr,  # boundary states to be written
    last_ptr,  # final state
    z_ptr,  # NORM 2: running sum of the keys before each chunk, in the direction of the walk, [chunks, H, DP] (LINES)
    z_raw,
    total_ptr,  # STATE_ONLY: summed log2-decay of the piece by a scalar gate, [pieces, H]
    total_r_ptr,  # and by vector gates, with their channels
    total_p_ptr,
    x_ptr,  # a line: NORM 1, the inverse of the denominator; 2, the normaliser's gradient
    row_ptr,
    col_ptr,
    cu_ptr,
    table_ptr,
    scale,
    T,
    PIECE,
    n_rows,
    H,
    HR,
    HS,
    HP,
    HD,
    HB,
    DR,
    DP,
    st_r,
    st_p,
    BR: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,  # chunks that are looked through at a time for those to be walked token by token
    REVERSE: tl.constexpr,
    UNSCALED: tl.constexpr,  # REVERSE: the state on chip lacks the scale of what is written, so that nothing has to
    # be multiplied before it is written
    GATE: tl.constexpr,  # 0 none, 1 a constant per head, 2 a scalar per token
    HALF_R: tl.constexpr,  # a vector gate over the channels of reader and writer
    HALF_P: tl.constexpr,  # a vector gate over the channels of the payload
    BONUS: tl.constexpr,  # exclusive reading: a late token's own gate is not between it and an early one
    DIAG: tl.constexpr,  # a token's own pair: 0 like the others, 1 left out, its weight written where asked, 2 given
    OWN: tl.constexpr,  # DIAG 1: write the weights
    WR: tl.constexpr,
    WS: tl.constexpr,
    NORM: tl.constexpr,  # 1 the reading is divided by the normaliser; 2 its gradient comes in, keys as payload
    START: tl.constexpr,
    SPLIT: tl.constexpr,
    STATE_ONLY: tl.constexpr,
    EDGES: tl.constexpr,
    LAST: tl.constexpr,
    PACKED: tl.constexpr,
    GRAD: tl.constexpr,  # scalar gates: 1 rows and columns of the gate gradient (dq), 2 columns only (dk); 3 the
    # reading's products with its gradient, the payload, in columns (dv); 0 none of these
    BOTH: tl.constexpr,  # the dv pass gives dk as well; no gate but a constant one, no weights or normaliser
    EXACT: tl.constexpr,
    FULL_R: tl.constexpr,  # tiles lie within the channels
    FULL_P: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    LINES: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks under way also of loads that feed no product, or None
):
    splits = tl.cdiv(DP, BP)
    pid = tl.program_id(0)
    column = (pid % splits) * BP
    h = (pid // splits) % H
    unit = pid // (splits * H)  # a piece when SPLIT, else a sequence

    # Tokens are counted over the whole batch, [B * T].
    if SPLIT:
        first, stop, _n, _origin = _piece_bounds(unit, cu_ptr, table_ptr, T, PIECE, PACKED)
        piece0 = unit
    elif PACKED:
        first = tl.load(cu_ptr + unit)
        stop = tl.load(cu_ptr + unit + 1)
        piece0 = tl.load(table_ptr + unit)
    else:
        first = unit * T
        stop = first + T
        piece0 = unit * tl.cdiv(T, PIECE)

    VECTOR: tl.constexpr = HALF_R or HALF_P
    SCALED: tl.constexpr = REVERSE and not UNSCALED
    slot = unit.to(tl.int64) * H + h
    r_cols, p_cols = tl.arange(0, BR), column + tl.arange(0, BP)
    S = tl.zeros([BR, BP], dtype=tl.float32)
    if START:
        entering = _state_block(start_ptr, slot, DR, DP, st_r, st_p, column, BR, BP)
        S = tl.load(entering, boundary_check=(0, 1), padding_option="zero")
        if UNSCALED:
            S = S / scale
    if BOTH:
        turned = tl.trans(S)

    line_base = h.to(tl.int64) * n_rows
    steps = tl.arange(0, C)
    if GATE == 1:
        constant = tl.maximum(tl.load(g_ptr + h).to(tl.float32), -104.0) * 1.4426950408889634
    total_all = 0.0
    total_r = tl.zeros([BR], dtype=tl.float32)
    total_p = tl.zeros([BP], dtype=tl.float32)

    n_chunks = tl.cdiv(stop - first, C)
    per_piece = PIECE // C
    plan = piece0.to(tl.int64) * per_piece  # number of the first chunk
    done = 0
    while done < n_chunks:
        halt, slow = n_chunks, False
        if EDGES:  # up to the next boundary; the state that enters a piece, in the direction of the walk, is kept
            chunk = n_chunks - 1 - done if REVERSE else done
            gone = per_piece - 1 - chunk % per_piece if REVERSE else chunk % per_piece
            if (gone == 0) | (done == 0):
                piece = (piece0 + chunk // per_piece).to(tl.int64) * H + h
                edge = _state_block(edge_ptr, piece, DR, DP, st_r, st_p, column, BR, BP)
                tl.store(edge, S * scale if UNSCALED else S, boundary_check=(0, 1))
            halt = tl.minimum(done + per_piece - gone, n_chunks)
        if VECTOR:  # up to the first chunk that has to be walked token by token
            halt = tl.minimum(done + WINDOW, halt)
            nth = done + tl.arange(0, WINDOW)
            which = n_chunks - 1 - nth if REVERSE else nth
            flag = tl.load(slow_ptr + (plan + which) * H + h, mask=nth < halt, other=0)
            quick = tl.min(tl.where(flag != 0, nth, halt), 0)
            slow = quick < halt
            halt = quick

        for it in tl.range(done, halt, num_stages=AHEAD):
            if REVERSE:
                nth_chunk = n_chunks - 1 - it
            else:
                nth_chunk = it
            t0 = first + nth_chunk * C
            rows = t0 + steps
            valid = rows < stop
            at_rows = rows.to(tl.int64) * H + h
            line = line_base + rows

            s = _load(s_ptr, h // (H // HS), HS, DR, t0, 0, valid, C, BR, FULL_R, TMA)
            p = _load(p_ptr, h // (H // HP), HP, DP, t0, column, valid, C, BP, FULL_P, TMA)

            # Gates: what a reader has kept of the entering state, what the leaving state keeps of a writer.
            if GATE == 1:
                count = tl.minimum(stop - t0, C)
                late = constant * tl.minimum(steps + (0 if BONUS else 1), count).to(tl.float32)
                early = constant * tl.maximum(count - 1 - steps, 0).to(tl.float32)
                total = constant * count
            if GATE == 2:
                b = _load_line(seen_ptr, h, line, t0, valid, 0.0, C, LINES)
                late = b
                if BONUS:
                    late = tl.load(seen_raw + line - 1, mask=valid & (steps > 0), other=0.0)
                early = _load_line(left_ptr, h, line, t0, valid, 0.0, C, LINES)
                total = tl.load(seen_raw + line_base + tl.minimum(t0 + C, stop) - 1)
            if GATE != 0:
                total_all += total
                if REVERSE:
                    read, write = tl.exp2(early), tl.exp2(late)
                else:
                    read, write = tl.exp2(late), tl.exp2(early)
            if HALF_R:  # the state, seen from the middle of the chunk
                half = half_r_ptr + ((plan + nth_chunk) * H + h) * 2 * DR + r_cols
                g0 = tl.load(half, mask=r_cols < DR, other=0.0)
                g1 = tl.load(half + DR, mask=r_cols < DR, other=0.0)
                into, past = (g1, g0) if REVERSE else (g0, g1)
                total_r += g0 + g1
                S = S * tl.exp2(into)[:, None]
            if HALF_P:
                half = half_p_ptr + ((plan + nth_chunk) * H + h) * 2 * DP + p_cols
                g0 = tl.load(half, mask=p_cols < DP, other=0.0)
                g1 = tl.load(half + DP, mask=p_cols < DP, other=0.0)
                into_p, past_p = (g1, g0) if REVERSE else (g0, g1)
                total_p += g0 + g1
                S = S * tl.exp2(into_p)[None, :]
            if WS:
                ws = _load_line(ws_ptr, h, line, t0, valid, 0.0, C, LINES)
            if NORM == 2:
                dx = _load_line(x_ptr, h, line, t0, valid, 0.0, C, LINES)

            if not STATE_ONLY:
                r = _load(r_ptr, h // (H // HR), HR, DR, t0, 0, valid, C, BR, FULL_R, TMA)
                if pairs_ptr is None:  # pairs of the chunk: readers down, writers across
                    A = tl.dot(r, tl.trans(s), input_precision="ieee")
                    if NORM == 2:
                        A += dx[None, :] if REVERSE else dx[:, None]
                    if REVERSE:
                        apart = steps[None, :] - steps[:, None]
                    else:
                        apart = steps[:, None] - steps[None, :]
                    if OWN:
                        own = tl.sum(tl.where(apart == 0, A, 0.0), 1)
                    seen = apart >= (0 if DIAG == 0 else 1)
                    if RAGGED:
                        seen = seen & (valid[None, :] if REVERSE else valid[:, None])
                    if GATE == 0:
                        A = tl.where(seen, A, 0.0)
                    else:
                        if EXACT and GATE == 2:  # each pair sums its own gates: no cancellation
                            shift: tl.constexpr = 1 if BONUS else 0
                            one = tl.load(g_ptr + at_rows - shift * H, mask=valid & (steps >= shift), other=0.0)
                            one = tl.maximum(one.to(tl.float32), -104.0) * 1.4426950408889634
                            if REVERSE:
                                pair = tl.cumsum(tl.where(apart > shift, one[None, :], 0.0), 1)
                            else:
                                pair = tl.cumsum(tl.where(apart > shift, one[:, None], 0.0), 0)
                        elif GATE == 1:
                            pair = constant * (apart - (1 if BONUS else 0))
                        elif REVERSE:
                            pair = late[None, :] - b[:, None]
                        else:
                            pair = late[:, None] - b[None, :]
                        kept = tl.exp2(tl.where(seen, pair, float("-inf")))
                        A = A * kept
                    if DIAG == 2:
                        own = tl.load(own_ptr + at_rows, mask=valid, other=0.0)
                        A = tl.where(apart == 0, own[:, None], A)
                # By what a reading is multiplied. Backward in time its scale belongs to what is written: the state
                # is dS itself, but where UNSCALED.
                times = tl.zeros([C], dtype=tl.float32) + (1.0 if SCALED else scale)
                if SCALED and pairs_ptr is None:
                    A = A * scale
                if WR:
                    wr = _load_line(wr_ptr, h, line, t0, valid, 0.0, C, LINES)
                    times = times * wr
                if NORM == 1:
                    times = times * _load_line(x_ptr, h, line, t0, valid, 1.0, C, LINES)
                if OWN and column == 0:
                    tl.store(own_ptr + at_rows, own * wr if WR else own, mask=valid)
                if pairs_ptr is None:
                    plain = A
                    A = A * times[:, None]
                    if WS:
                        A = A * ws[None, :]
                    A = A.to(p.dtype)
                else:
                    A = _load_pairs(pairs_ptr, h, H, t0, valid, C, REVERSE, TMA and not RAGGED)
                if NORM == 2:
                    z_row = (plan + nth_chunk) * H + h
                    z = _load_sum(z_ptr, z_row, DP, column, BP, LINES and FULL_P)
                    if HALF_P:
                        z = z * tl.exp2(into_p)
                inter = tl.dot(r, S.to(r.dtype), input_precision="ieee")
                if NORM == 2 and REVERSE:
                    inter += z[None, :]
                if NORM == 2 and not REVERSE:
                    inter += dx[:, None] * z[None, :]
                if GATE != 0 and (GRAD == 1 or GRAD == 2):
                    inter = inter * read[:, None]
                from_state = times
                if GATE != 0 and (GRAD == 0 or GRAD == 3):
                    from_state = times * read
                o = tl.dot(A, p, inter * from_state[:, None], input_precision="ieee")
                if out_ptr is not None and TMA and FULL_P and not RAGGED:
                    out_ptr.store([t0, h * DP + column], o.to(p.dtype))
                else:
                    _store(out_raw, h, H, DP, t0, column, valid, o, C, BP)

                if BOTH:  # after the other, in whose registers it has room
                    beside = _load(beside_ptr, h // (H // HB), HB, DP, t0, column, valid, C, BP, FULL_P, TMA)
                    A = tl.dot(beside, tl.trans(p), input_precision="ieee")
                    A = tl.where(seen, A, 0.0) if GATE == 0 else A * kept
                    if SCALED:
                        A = A * scale
                    A = (A * times[:, None]).to(s.dtype)
                    inter = tl.dot(beside, turned.to(beside.dtype), input_precision="ieee")
                    if GATE != 0:
                        inter = inter * read[:, None]
                    o = tl.dot(A, s, inter * times[:, None], input_precision="ieee")
                    if turned_ptr is not None and TMA and not RAGGED:
                        turned_ptr.store([t0, h * DR], o.to(s.dtype))
                    else:
                        _store(turned_raw, h, H, DR, t0, 0, valid, o, C, BR)

                if GRAD != 0:
                    # E_rs, what the pair (reader, writer) contributes to the log-gates between them and, without
                    # the write weight, to the weight. Pairs inside the chunk come from one tile, so that their sums
                    # over readers and over writers cancel exactly; pairs that cross chunks come through the state.
                    d = _load(dot_ptr, h // (H // HD), HD, DP, t0, column, valid, C, BP, FULL_P, TMA)
                    across = tl.sum(d.to(tl.float32) * (p.to(tl.float32) if GRAD == 3 else inter), 1)
                    part = (column // BP).to(tl.int64) * H * n_rows + line
                    if GRAD == 1:
                        late_weight = tl.zeros([C], dtype=tl.float32) + scale
                        if WR:
                            late_weight = late_weight * wr
                        across = across * late_weight
                        if pairs_ptr is None:
                            E = plain * tl.dot(d, tl.trans(p), input_precision="ieee") * late_weight[:, None]
                            tl.store(col_ptr + part, tl.sum(E, 0), mask=valid)
                            if WS:
                                E = E * ws[None, :]
                            across += tl.sum(E, 1)
                        tl.store(row_ptr + part, across, mask=valid)
                    else:
                        tl.store(col_ptr + part, across, mask=valid)

            # The write: the payload carries the weights, so the writer's tile goes to the tensor cores as loaded.
            weight = tl.zeros([C], dtype=tl.float32) + (scale if SCALED else 1.0)
            if GATE != 0:
                S = S * tl.exp2(total)
                weight = weight * write
            if WS:
                weight = weight * ws
            if RAGGED:  # what lies behind the sequence's end is another's
                weight = tl.where(valid, weight, 0.0)
            heavy = p
            if GATE != 0 or WS or SCALED or RAGGED:
                heavy = p * weight[:, None]
                if RAGGED:
                    heavy = tl.where(valid[:, None], heavy, 0.0)
                heavy = heavy.to(p.dtype)
            S = tl.dot(tl.trans(s), heavy, S, input_precision="ieee")
            if BOTH:  # here the writer carries the weights, for the same reason
                heavy = s
                if GATE != 0:
                    turned = turned * tl.exp2(total)
                if GATE != 0 or SCALED or RAGGED:
                    heavy = s * weight[:, None]
                    if RAGGED:
                        heavy = tl.where(valid[:, None], heavy, 0.0)
                    heavy = heavy.to(s.dtype)
                turned = tl.dot(tl.trans(p), heavy, turned, input_precision="ieee")
            if HALF_R:
                S = S * tl.exp2(past)[:, None]
            if HALF_P:
                S = S * tl.exp2(past_p)[None, :]

        if VECTOR and slow:  # token by token: the recurrence as it stands in the reference
            nth_chunk = n_chunks - 1 - halt if REVERSE else halt
            t0 = first + nth_chunk * C
            count = tl.minimum(stop - t0, C)
            z = tl.zeros([BP], dtype=tl.float32)
            if NORM == 2:
                z = _load_sum(z_raw, (plan + nth_chunk) * H + h, DP, column, BP, False)
            for step in range(0, count):
                t = t0 + (count - 1 - step if REVERSE else step)
                at_t = t.to(tl.int64) * H + h
                s = _row(s_raw, h // (H // HS), HS, DR, t, r_cols)
                p = _row(p_raw, h // (H // HP), HP, DP, t, p_cols)
                weight = scale if REVERSE else 1.0
                if WS:
                    weight = weight * tl.load(ws_ptr + line_base + t).to(tl.float32)
                dx = 1.0
                if NORM == 2:
                    dx = tl.load(x_ptr + line_base + t)
                keep_r = tl.zeros([BR], dtype=tl.float32) + 1.0
                keep_p = tl.zeros([BP], dtype=tl.float32) + 1.0
                if HALF_R:
                    g = tl.maximum(_row(gr_ptr, h, H, DR, t, r_cols), -104.0) * 1.4426950408889634
                    total_r += g
                    keep_r = tl.exp2(g)
                if HALF_P:
                    g = tl.maximum(_row(gp_ptr, h, H, DP, t, p_cols), -104.0) * 1.4426950408889634
                    total_p += g
                    keep_p = tl.exp2(g)
                # A token's own gate comes before its reading, or behind it where reading is exclusive; backward
                # in time, behind its write.
                if not REVERSE and not BONUS:
                    S = S * keep_r[:, None] * keep_p[None, :]
                    z = z * keep_p
                if not STATE_ONLY:
                    r = _row(r_raw, h // (H // HR), HR, DR, t, r_cols)
                    o = tl.sum(S * r[:, None], 0)
                    if NORM == 2:
                        o += z if REVERSE else dx * z
                    if DIAG == 2:
                        own = tl.load(own_ptr + at_t)
                    else:
                        own = tl.sum(r * s, 0)
                        if NORM == 2:
                            own += dx
                    factor = 1.0
                    if WR:
                        factor = tl.load(wr_ptr + line_base + t).to(tl.float32)
                    if OWN:
                        if column == 0:
                            tl.store(own_ptr + at_t, own * factor)
                    if not REVERSE:
                        factor = factor * scale
                    o = o * factor
                    if DIAG != 1:  # the weight first: where all else is 0, o over its channel of ones is p
                        o += own * weight * factor * p
                    if NORM == 1:
                        o = o * tl.load(x_ptr + line_base + t)
                    tl.store(out_raw + at_t * DP + p_cols, o.to(out_raw.dtype.element_ty), p_cols < DP)
                    if GRAD == 3:
                        part = (column // BP).to(tl.int64) * H * n_rows + line_base + t
                        tl.store(col_ptr + part, tl.sum(p * _row(dot_raw, h // (H // HD), HD, DP, t, p_cols), 0))
                if BONUS:
                    S = S * keep_r[:, None] * keep_p[None, :]
                    z = z * keep_p
                S += s[:, None] * (weight * p)[None, :]
                if NORM == 2:
                    z += p * weight * (dx if REVERSE else 1.0)
                if REVERSE and not BONUS:
                    S = S * keep_r[:, None] * keep_p[None, :]
                    z = z * keep_p
        done = halt
        if VECTOR:
            done += slow.to(tl.int32)

    if LAST:
        final = _state_block(last_ptr, slot, DR, DP, st_r, st_p, column, BR, BP)
        tl.store(final, S * scale if UNSCALED else S, boundary_check=(0, 1))
    if STATE_ONLY:
        if total_r_ptr is not None and column == 0:
            tl.store(total_r_ptr + slot * DR + r_cols, total_r, mask=r_cols < DR)
        if total_p_ptr is not None:
            tl.store(total_p_ptr + slot * DP + p_cols, total_p, mask=p_cols < DP)
        if total_ptr is not None and column == 0:
            tl.store(total_ptr + slot, total_all)
