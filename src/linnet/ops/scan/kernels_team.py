"""Triton kernel of the scans where columns of channels are few: a team of programs shares each, and reads it once.

The members take the tiles of a sequence in turn. Each tells the others the map of its tile a round before it is needed,
so that nobody waits long. What a tile starts from is the state before its round, which every member keeps, and the maps
of the members before. All programs must be on the device at once, for they wait for each other: the launch is a
cooperative one. `kernels.py` has the rest: tiles, maps, and what is written.
"""
# ruff: noqa: RUF005 (Triton's language has no unpacking into tuples)

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    BLOCK,
    COMPLEX,
    MINMAX,
    REAL,
    _apply,
    _factor,
    _fp32,
    _last_run,
    _leave,
    _leave_last,
    _over_runs,
    _over_tokens,
    _tile,
    _tokens,
    _vector,
    _where,
)


@triton.jit
def _maps(tile, KIND: tl.constexpr, FLIP: tl.constexpr):
    """Of a tile: the maps to its tokens and runs, what is needed with them, and the map of all up to each run's end."""
    factors, values, extra = tile
    to_a, to_b, k, m = _over_tokens(_factor(factors, KIND, FLIP), _fp32(values), KIND)
    k, m, e, f = _over_runs(k, m, KIND)
    return (to_a, to_b, e, f, factors, values, extra), k + m


@triton.jit
def _tell(room_ptr, count_ptr, at, member, x, lane, final, BD: tl.constexpr, TEAM: tl.constexpr):
    """Leave the map of a member's tile, which the threads of its last run have (``final``), where the others look."""
    n: tl.constexpr = len(x)
    for c in tl.static_range(n):
        tl.store(room_ptr + ((at * TEAM + member) * n + c) * BD + lane, x[c], mask=final)
    tl.debug_barrier()  # one thread's release is for what all have written
    tl.atomic_add(count_ptr + at, 1, sem="release")


@triton.jit
def _told(room_ptr, at, member, like, lane, within, BD: tl.constexpr, TEAM: tl.constexpr):
    n: tl.constexpr = len(like)
    out = ()
    for c in tl.static_range(n):
        number = room_ptr + ((at * TEAM + member) * n + c) * BD + lane
        out = out + (tl.load(number, mask=within, other=0.0, cache_modifier=".cg"),)
    return out


@triton.jit
def _everywhere(x, like):
    n: tl.constexpr = len(x)
    out = ()
    for c in tl.static_range(n):
        out = out + (x[c] + tl.zeros_like(like),)
    return out


@triton.jit
def team_kernel(
    a_ptr,
    b_ptr,  # GRAD: gradient of the states
    y_ptr,  # GRAD: gradient of b
    da_ptr,
    h_ptr,  # GRAD: the states of the forward pass
    code_ptr,  # minmax: which of state, r and s a token takes, uint8
    start_ptr,  # states the sequences start from (GRAD: gradients of their last states)
    room_ptr,  # maps of the tiles [columns, rounds + 1, TEAM, numbers of a map, BD] fp32
    count_ptr,  # members that have told theirs [columns, rounds + 1], zeros
    init_ptr,  # GRAD: states the forward pass started from
    last_ptr,  # states the sequences end with (GRAD: gradients of the first ones)
    ids_ptr,
    T,
    D: tl.constexpr,
    CONSTANT: tl.constexpr,  # one factor for all tokens
    ALGEBRA: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
    TEAM: tl.constexpr,  # members
    REVERSE: tl.constexpr,
    GRAD: tl.constexpr,
    GRAD_A: tl.constexpr,
    CODE: tl.constexpr,
    PACKED: tl.constexpr,
):
    STEP: tl.constexpr = -1 if REVERSE else 1
    KIND: tl.constexpr = REAL if GRAD and ALGEBRA == MINMAX else ALGEBRA
    FLIP: tl.constexpr = GRAD and not PACKED  # packed factors are transposed as they are loaded
    FACTOR: tl.constexpr = 4 if KIND == BLOCK else 2 if KIND == COMPLEX else 1  # numbers of one
    blocks: tl.constexpr = (D + BD - 1) // BD
    member = tl.program_id(0) % TEAM
    column = tl.program_id(0) // TEAM
    n = (column // blocks).to(tl.int64)
    left = (column % blocks) * BD
    rounds = tl.cdiv(T, TEAM * W * L)
    mail = column * (rounds + 1)
    origin = n * T
    if REVERSE:
        origin += T - 1
    w = tl.arange(0, W)[:, None, None]
    l = _tokens(L, T, D)
    lane = tl.arange(0, BD)[None, None, :]
    col = left + lane
    within = tl.max_constancy(left + tl.arange(0, BD) < D, V)[None, None, :]
    # Every run has its own copy of what comes from the others: nothing then has to change hands among threads.
    each = within & (w >= 0)
    lane = w * 0 + lane

    here = _tile(
        a_ptr, b_ptr, h_ptr, code_ptr, start_ptr, ids_ptr, member * W * L, w, l, col, left, within, origin, T, T, D,
        CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, False, PACKED,
    )  # fmt: skip
    coming = _tile(
        a_ptr, b_ptr, h_ptr, code_ptr, start_ptr, ids_ptr, (TEAM + member) * W * L, w, l, col, left, within, origin, T,
        T, D, CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, False, PACKED,
    )  # fmt: skip
    ready, mine = _maps(here, KIND, FLIP)
    _tell(room_ptr, count_ptr, mail, member, mine, lane, each & (w == W - 1), BD, TEAM)
    # A packed row starts with a map that is constant, whatever comes in.
    carry = _everywhere(_vector(start_ptr, n * D, col, 0, within & (not PACKED), KIND, 0.0), mine[0])
    for r in range(rounds):
        later = _tile(
            a_ptr, b_ptr, h_ptr, code_ptr, start_ptr, ids_ptr, ((r + 2) * TEAM + member) * W * L, w, l, col, left,
            within, origin, T, T, D, CONSTANT, ALGEBRA, KIND, V, STEP, GRAD, GRAD_A, CODE, False, PACKED,
        )  # fmt: skip
        next, mine = _maps(coming, KIND, FLIP)
        _tell(room_ptr, count_ptr, mail + r + 1, member, mine, lane, each & (w == W - 1), BD, TEAM)
        while tl.atomic_add(count_ptr + mail + r, 0, sem="acquire") < TEAM:
            pass
        start = carry
        for other in tl.static_range(TEAM):
            start = _where(member == other, carry, start)
            theirs = _told(room_ptr, mail + r, other, mine, lane, each, BD, TEAM)
            carry = _apply(theirs[:FACTOR], theirs[FACTOR:], carry, KIND)
        to_a, to_b, e, f, factors, values, extra = ready
        h = _apply(to_a, to_b, _apply(e, f, start, KIND), KIND)
        _leave(
            a_ptr, y_ptr, da_ptr, code_ptr, init_ptr, last_ptr, ids_ptr, _factor(factors, KIND, FLIP), _fp32(values),
            extra, h, (r * TEAM + member) * W * L, w, l, col, left, within, origin, T, T, D, CONSTANT, ALGEBRA, KIND, V,
            STEP, GRAD, GRAD_A, CODE, PACKED,
        )  # fmt: skip
        ready = next
        coming = later
    if not PACKED:
        if member == 0:
            _leave_last(
                a_ptr, y_ptr, da_ptr, code_ptr, init_ptr, last_ptr, _last_run(carry, w, W), n, col, within, origin, T,
                D, CONSTANT, ALGEBRA, KIND, STEP, GRAD, GRAD_A,
            )  # fmt: skip
