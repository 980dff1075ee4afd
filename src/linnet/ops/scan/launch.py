"""Launching the scan kernels: tiles, pieces, teams, forward and backward of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.tiles import multiprocessors
from .kernels import BLOCK, COMPLEX, MINMAX, REAL, scan_kernel
from .kernels_team import team_kernel

__all__ = ["backward", "forward"]

ALGEBRAS = {"real": REAL.value, "complex": COMPLEX.value, "block": BLOCK.value, "minmax": MINMAX.value}


def tile(
    algebra: str, rows: int, D: int, device: torch.device, *, half: bool, packed: bool, grad: bool
) -> dict[str, int]:
    """Runs W of L tokens, channels BD of a program, V of a thread and tiles AHEAD; T never enters.

    Measured on Hopper: what counts are the bytes on their way, so many tokens a thread; more warps with fewer each are
    slower. A pair moves as one word of twice the width, so it takes half the channels to fill a transaction. Fewer
    channels than threads in a warp leave the others more runs. In 16 bits (``half``) what is loaded takes few
    registers, and forward there is room for a second tile on its way.
    """
    if device.type == "cpu":  # the interpreter: tiles that a short sequence fills more than once
        return {"W": 2, "L": 4, "BD": 8, "V": 1, "AHEAD": 2 if algebra == "real" else 1, "num_warps": 2}
    L = (8 if algebra == "block" and not half else 16) // (2 if packed else 1)
    V = 2 if D > 32 and D % 2 == 0 and algebra in ("real", "minmax") else 1
    BD = _channels(rows, D, multiprocessors(device, 16)) if V == 2 else min(32, 1 << (D - 1).bit_length())
    ahead = 2 if half and not grad and algebra != "block" else 1
    return {"W": 256 * V // BD, "L": L, "BD": BD, "V": V, "AHEAD": ahead, "num_warps": 8}


def _channels(rows: int, D: int, room: int) -> int:
    """Channels of a program that walks whole sequences, where a thread has two.

    With few columns of channels most of the device would be idle. Narrower ones are more, and each is done sooner, but
    reads less well; and they must not begin another round of programs. Where even those are too few, the widest are cut
    into pieces (see :func:`_piece`).
    """
    of_a_round = {64: 34, 32: 24, 16: 17}  # how long one takes, relative to the others; measured on an H100

    def programs(BD: int) -> int:
        return rows * -(-D // BD)

    BD = min(of_a_round, key=lambda BD: -(-programs(BD) // room) * of_a_round[BD])
    return BD if 9 * programs(BD) >= 4 * room else 64  # below, pieces read twice are faster than an idle device


def team(
    algebra: str, rows: int, T: int, D: int, device: torch.device, *, half: bool, packed: bool
) -> dict[str, int] | None:
    """Members of the teams that share columns of channels, and their tiles as in :func:`tile`; None where columns are
    many, sequences short, or the device has no launch that puts all programs on it at once.

    Measured on an H100, numbers in 16 bits: from 8 members on they are faster than pieces, which are read twice, and
    than narrower columns. With 2 members a column is read more slowly than alone. Nothing else was measured.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if algebra != "real" or not half or packed or D <= 32:
        return None
    V, W, L = 2 if D % 2 == 0 else 1, 4, 16
    columns = rows * -(-D // (32 * V))
    members = 32
    while members * columns > 2 * multiprocessors(device, 16):  # two programs of four warps are on one at a time
        members //= 2
    if members < 8 or 16 * members * W * L > T:
        return None
    return {"TEAM": members, "W": W, "L": L, "BD": 32 * V, "V": V, "num_warps": 4}


def _piece(columns: int, T: int, step: int, device: torch.device) -> int:
    """Tokens of a piece, where there are so many columns of channels: the whole sequence where they fill most of the
    device, or where it is too short to be worth the two launches more that pieces take. Each processor has one program
    at a time, and all the same work, so what counts is not to begin another round of them."""
    room = multiprocessors(device, 16)
    tiles = -(-T // step)
    if columns * 3 >= room or tiles <= (2 if device.type == "cpu" else 16):
        return T
    pieces = min(2 * room // columns, -(-tiles // 2))
    return -(-tiles // pieces) * step


def _walk(
    algebra: str,
    a: Tensor | None,
    b: Tensor,
    y: Tensor,
    start: Tensor,
    last: Tensor,
    ids: Tensor | None,
    *,
    constant: bool,
    reverse: bool,
    grad: bool = False,
    da: Tensor | None = None,
    h: Tensor | None = None,
    init: Tensor | None = None,
    code: Tensor | None = None,
) -> None:
    """One scan of ``b`` ``[rows, T, D, *]``: states into ``y`` and ``last``, by way of pieces where rows are few."""
    rows, T, D = b.shape[:3]
    linear = "real" if grad and algebra == "minmax" else algebra
    flags: dict[str, Any] = {
        "D": D,
        "CONSTANT": constant,
        "ALGEBRA": ALGEBRAS[algebra],
        "REVERSE": reverse,
        "GRAD": grad,
        "GRAD_A": grad and da is not None and algebra != "minmax",
        "CODE": code is not None and not grad,
        "PACKED": ids is not None,
    }
    shared = team(algebra, rows, T, D, b.device, half=b.itemsize == 2, packed=ids is not None)
    if shared is not None:
        columns, members = rows * -(-D // shared["BD"]), shared["TEAM"]
        rounds = -(-T // (members * shared["W"] * shared["L"]))
        numbers = {"block": 6, "complex": 4}.get(linear, 2)
        room = start.new_empty(columns, rounds + 1, members, numbers, shared["BD"])
        count = torch.zeros(columns, rounds + 1, dtype=torch.int32, device=b.device)
        team_kernel[(columns * members,)](
            a, b, y, da, h, code, start, room, count, init, last, ids, T,
            **flags, **shared, num_stages=1, launch_cooperative_grid=True,
        )  # fmt: skip
        return
    settings = tile(algebra, rows, D, b.device, half=b.itemsize == 2, packed=ids is not None, grad=grad)
    columns = rows * -(-D // settings["BD"])
    piece = _piece(columns, T, settings["W"] * settings["L"], b.device)
    pieces = -(-T // piece)

    def launch(y: Tensor, da: Tensor | None, edges: Tensor | None, totals: bool) -> None:
        own = {"GRAD_A": False, "CODE": False} if totals else {}
        scan_kernel[(pieces * columns,)](
            a, b, y, da, h, code, start, edges, init, last, ids, T, piece,
            **flags | own, **settings, SPLIT=edges is not None, TOTALS=totals,
        )  # fmt: skip

    edges = None
    if pieces > 1:
        factors = {"block": (2, 2), "complex": (2,)}.get(linear, ())
        own = start.new_empty(rows, pieces, D, *b.shape[3:])
        total = start.new_empty(rows, pieces, D, *factors)
        launch(own, total, None, True)
        edges = torch.empty_like(own)
        # A packed row is one row here, and begins with a constant map.
        first = start if ids is None else start.new_zeros(1, *start.shape[1:])
        _walk(linear, total, own, edges, first, torch.empty_like(first), None, constant=False, reverse=False)
    launch(y, da, edges, False)


def _constant(a: Tensor) -> bool:
    """Whether factors are the same for every token: they then came expanded."""
    return all(a.stride(i) == 0 or a.shape[i] == 1 for i in (0, 1))


def _dense(a: Tensor) -> tuple[Tensor, bool]:
    """Factors as the kernel reads them, and whether they are one token's for all."""
    return (a[0, 0].contiguous(), True) if _constant(a) else (a.contiguous(), False)


def _rows(given: Tensor, ids: Tensor | None) -> Tensor:
    """Where the states of all rows go: those of empty sequences stay what they were given as."""
    return torch.empty_like(given) if ids is None else given.clone()


def forward(
    algebra: str, a: Tensor, b: Tensor, h0: Tensor, ids: Tensor | None, reverse: bool, training: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States of every token and the last ones; for minmax also what each token took, when a gradient will be wanted.
    ``ids`` are the sequences of packed tokens."""
    b, h0 = b.contiguous(), h0.contiguous()
    a, constant = _dense(a)
    y, last = torch.empty_like(b), _rows(h0, ids)
    code = torch.empty(b.shape, dtype=torch.uint8, device=b.device) if algebra == "minmax" and training else None
    options: dict[str, Any] = {"constant": constant, "reverse": reverse, "code": code}
    _walk(algebra, a, b, y, h0, last, ids, **options)
    return y, last, code


def backward(
    algebra: str,
    a: Tensor,
    basis: Tensor,
    h0: Tensor,
    ids: Tensor | None,
    reverse: bool,
    dy: Tensor,
    dlast: Tensor,
    grad_a: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of a (None unless wanted), b and the initial states. ``basis`` is what :func:`forward` gave: the
    states, or for minmax what each token took."""
    dy, dlast = dy.contiguous(), dlast.contiguous()
    bounds = algebra == "minmax"
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if grad_a or bounds else None
    factors, constant = (None, False) if bounds else _dense(a)
    db, dh0 = torch.empty_like(dy), _rows(dlast, ids)
    options: dict[str, Any] = {"code": basis} if bounds else {"h": basis, "init": h0.contiguous()}
    options |= {"constant": constant, "reverse": not reverse, "da": da, "grad": True}
    _walk(algebra, factors, dy, db, dlast, dh0, ids, **options)
    return da, db, dh0
