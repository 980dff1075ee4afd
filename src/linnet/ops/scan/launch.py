"""Launching the scan kernels: tiles, pieces, forward and backward of a call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .kernels import BLOCK, COMPLEX, MINMAX, REAL, scan_kernel

__all__ = ["backward", "forward"]

ALGEBRAS = {"real": REAL.value, "complex": COMPLEX.value, "block": BLOCK.value, "minmax": MINMAX.value}


def tile(algebra: str, D: int, device: torch.device) -> dict[str, int]:
    """Warps W, tokens L a warp takes at once, and channels BD of a program; T never enters."""
    if device.type == "cpu":  # the interpreter: tiles that a short sequence fills more than once
        return {"W": 2, "L": 2, "BD": 4, "num_warps": 2}
    lengths = {"real": 8, "minmax": 8, "complex": 4, "block": 4}
    return {"W": 16, "L": lengths[algebra], "BD": 64 if D > 32 else 32, "num_warps": 16}


@cache
def _programs(device: torch.device) -> int:
    """Programs that fill the device."""
    if device.type == "cpu":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _piece(rows: int, T: int, D: int, step: int, BD: int, device: torch.device) -> int:
    """Tokens of a piece: the whole sequence when there are enough of them to fill half of the device."""
    columns, wanted = rows * triton.cdiv(D, BD), _programs(device)
    if 2 * columns >= wanted - wanted // 8 or 2 * step >= T:
        return T
    pieces = min(triton.cdiv(wanted, columns), triton.cdiv(T, step))
    return triton.cdiv(triton.cdiv(T, pieces), step) * step


def _walk(
    algebra: str,
    a: Tensor | None,
    b: Tensor,
    y: Tensor,
    start: Tensor,
    last: Tensor,
    ids: Tensor | None,
    *,
    a_stride: int,
    reverse: bool,
    grad: bool = False,
    da: Tensor | None = None,
    h: Tensor | None = None,
    init: Tensor | None = None,
    code: Tensor | None = None,
) -> None:
    """One scan of ``b`` ``[rows, T, D, *]``: states into ``y`` and ``last``, by way of pieces where rows are few."""
    rows, T, D = b.shape[:3]
    settings = tile(algebra, D, b.device)
    piece = _piece(rows, T, D, settings["W"] * settings["L"], settings["BD"], b.device)
    pieces = triton.cdiv(T, piece)
    columns = triton.cdiv(D, settings["BD"])

    def launch(y: Tensor, da: Tensor | None, edges: Tensor | None, totals: bool) -> None:
        scan_kernel[(rows * pieces * columns,)](
            a,
            b,
            y,
            da,
            h,
            code,
            start,
            edges,
            init,
            last,
            ids,
            T,
            D,
            a_stride,
            piece,
            ALGEBRA=ALGEBRAS[algebra],
            REVERSE=reverse,
            GRAD=grad,
            GRAD_A=grad and da is not None and algebra != "minmax" and not totals,
            CODE=code is not None and not grad and not totals,
            SPLIT=edges is not None,
            TOTALS=totals,
            PACKED=ids is not None,
            **settings,
        )

    edges = None
    if pieces > 1:
        linear = "real" if grad and algebra == "minmax" else algebra
        factors = {"block": (2, 2), "complex": (2,)}.get(linear, ())
        own = start.new_empty(rows, pieces, D, *b.shape[3:])
        total = start.new_empty(rows, pieces, D, *factors)
        launch(own, total, None, True)
        edges = torch.empty_like(own)
        # A packed row is one row here, and begins with a constant map.
        first = start if ids is None else start.new_zeros(1, *start.shape[1:])
        _walk(linear, total, own, edges, first, torch.empty_like(first), None, a_stride=D, reverse=False)
    launch(y, da, edges, False)


def _ids(cu_host: Tensor | None, device: torch.device) -> Tensor | None:
    if cu_host is None:
        return None
    lengths = cu_host.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths).to(device)


def _constant(a: Tensor) -> bool:
    """Whether factors are the same for every token: they then came expanded."""
    return all(a.stride(i) == 0 or a.shape[i] == 1 for i in (0, 1))


def _dense(a: Tensor) -> tuple[Tensor, int]:
    """Factors as the kernel reads them, and its stride."""
    return (a[0, 0].contiguous(), 0) if _constant(a) else (a.contiguous(), a.shape[2])


def forward(
    algebra: str, a: Tensor, b: Tensor, h0: Tensor, cu_host: Tensor | None, reverse: bool, training: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States of every token and the last ones; for minmax also what each token took, when a gradient will be wanted."""
    b, h0 = b.contiguous(), h0.contiguous()
    a, stride = _dense(a)
    y, last = torch.empty_like(b), h0.clone()
    code = torch.empty(b.shape, dtype=torch.uint8, device=b.device) if algebra == "minmax" and training else None
    options: dict[str, Any] = {"a_stride": stride, "reverse": reverse, "code": code}
    _walk(algebra, a, b, y, h0, last, _ids(cu_host, b.device), **options)
    return y, last, code


def backward(
    algebra: str,
    a: Tensor,
    basis: Tensor,
    h0: Tensor,
    cu_host: Tensor | None,
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
    factors, stride = (None, 0) if bounds else _dense(a)
    db, dh0 = torch.empty_like(dy), dlast.clone()
    options: dict[str, Any] = {"code": basis} if bounds else {"h": basis, "init": h0.contiguous()}
    options |= {"a_stride": stride, "reverse": not reverse, "da": da, "grad": True}
    _walk(algebra, factors, dy, db, dlast, dh0, _ids(cu_host, dy.device), **options)
    return da, db, dh0
