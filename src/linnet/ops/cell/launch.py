"""Launching the cell kernels: rows of a call, launch settings, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..core import uploaded
from ..core.tiles import multiprocessors
from .cells import CELLS, Tensors
from .kernels import KINDS, backward_kernel, forward_kernel
from .kernels_wide import wide_backward_kernel, wide_forward_kernel
from .solver import solutions
from .state import before

WIDE = 128  # a head with more channels is shared by several programs
SHARED = 200 << 10  # bytes of shared memory that a program may hold weights in


def launch_settings(D: int, gates: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and channels of a tile and warps of a program, by the size of the weights it holds on chip."""
    BD = max(16, triton.next_power_of_2(D))
    held = gates * BD * BD * dtype.itemsize  # over the registers of the program
    return {"BN": 16, "BD": BD, "num_warps": 4 if held <= 32768 else 8, "num_stages": 1}


def wide_settings(D: int, gates: int, backward: bool, units: int = 1, multiprocessors: int = 132) -> dict[str, int]:
    """Tiles where several programs share a head: BC channels of D each, all gates of them, for ``units`` heads of
    groups of sequences. Products are cut into blocks of channels, chains of dependence that run side by side.

    The fewer channels a program has, the sooner it is done with a token, so the fewest that let all units run at once
    are taken, as far as the weights of those channels fit into shared memory; failing that, units wait for each other.
    """
    width = gates * D if backward else D

    def blocks() -> list[int]:  # channels of one product: a power of two, at most four products or groups of products
        least = max(16, triton.next_power_of_2(triton.cdiv(width, 8)))
        return [min(128, least)] if backward else [max(64, triton.next_power_of_2(D)) // 4]

    def held(BC: int, BK: int) -> int:  # bytes of weights, and of one block of what they are multiplied with
        span, slots = (8 * BK, 1) if backward else (BK, 4 if gates > 1 else 1)
        return 2 * triton.cdiv(width, span) * span * slots * BC + 2 * 16 * span

    domains = {
        "at_once": [units, *range(min(units, multiprocessors) - 1, 0, -1)],
        "BC": [16, 32, 64],
        "BK": blocks(),
    }
    limits = [
        lambda at_once, BC: at_once * triton.cdiv(D, BC) <= multiprocessors,
        lambda BC, BK: held(BC, BK) <= SHARED,
    ]
    found = next(solutions(domains, limits))
    BC, BK = found["BC"], found["BK"]
    tile = {"BN": 16, "BC": BC, "BK": BK, "num_stages": 1}
    if backward:
        return tile | {"SLICES": 8, "BLOCKS": triton.cdiv(width, 8 * BK), "num_warps": 8}
    return tile | {"BLOCKS": triton.cdiv(width, BK), "num_warps": 4}


def _rows(x: Tensor, cu_host: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """Number of sequences, where they start, and in which order they run: longest first, so that those sharing a
    program end together."""
    if cu_host is None:
        return x.shape[0], None, None
    order = cu_host.diff().sort(descending=True, stable=True).indices
    return len(order), uploaded(cu_host, x.device), uploaded(order, x.device)


def numerics(x: Tensor) -> dict[str, bool | str]:
    """How exactly the kernels compute: 16-bit inputs take hardware approximations where there are any; fp32 products
    run on matrix units only where ``torch.set_float32_matmul_precision`` allows it, as three of TF32."""
    exact, nvidia = x.dtype == torch.float32, x.device.type == "cuda" and torch.version.hip is None
    split = exact and nvidia and torch.get_float32_matmul_precision() != "highest"
    return {"EXACT": exact, "FAST": nvidia and not exact, "PRECISION": "tf32x3" if split else "ieee"}


def forward(
    x: Tensor,
    R: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    state: Tensors,
    cu_host: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensors, Tensor | None]:
    """``h`` ``[B, T, H, D]``, the final state and, with ``keep``, the other parts of the state before every token
    ``[B * T, S - 1, H, D]``."""
    x, R = x.contiguous(), R.contiguous()
    b, p = (None if w is None else w.float().contiguous() for w in (b, p))
    state = tuple(s.contiguous() for s in state)
    (B, T, H), D = x.shape[:3], R.shape[1]
    gates = CELLS[kind].gates
    N, start, order = _rows(x, cu_host)
    y = x.new_empty(B, T, H, D)
    tape = state[0].new_empty(B * T, len(state) - 1, H, D) if keep else None
    after = tuple(torch.empty_like(s) for s in state)
    missing = (None,) * (4 - len(state))
    tensors = x, R, b, p, *state, *missing, y, tape, *after, *missing
    flags = {"KIND": KINDS[kind], "G": gates, "BIAS": b is not None, "PEEPHOLES": p is not None}
    flags |= {"SAVE": keep and len(state) > 1, "PACKED": cu_host is not None}
    if D > WIDE:
        shared = torch.stack([state[0].to(x.dtype)] * 2)
        settings = wide_settings(D, gates, False, triton.cdiv(N, 16) * H, multiprocessors(x.device, 1))
        for first, programs, counter in _shares(N, H, D, settings, x.device):
            wide_forward_kernel[(programs,)](
                *tensors, shared, counter, start, order, first, N, T, H, D,
                FAST=numerics(x)["FAST"], launch_cooperative_grid=True, **flags, **settings,
            )  # fmt: skip
    else:
        settings = launch_settings(D, gates, x.dtype)
        grid = (triton.cdiv(N, settings["BN"]) * H,)
        forward_kernel[grid](*tensors, start, order, N, T, H, D, **flags, **numerics(x), **settings)
    return y, after, tape


def _shares(
    N: int, H: int, D: int, settings: dict[str, int], device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Launches of programs that wait for each other: no more than there are multiprocessors. Each is the first (tile,
    head) it takes and its number of programs; and the counters of all."""
    units, parts = triton.cdiv(N, settings["BN"]) * H, triton.cdiv(D, settings["BC"])
    counters = torch.zeros(units, dtype=torch.int32, device=device)
    at_once = max(1, multiprocessors(device, 1) // parts)
    for first in range(0, units, at_once):
        yield first, min(at_once, units - first) * parts, counters


def backward(
    x: Tensor,
    R: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    h: Tensor,
    cu_host: Tensor | None,
    kind: str,
    tape: Tensor,
    y: Tensor,
    dy: Tensor,
    d_state: Tensors,
) -> dict[str, Tensor]:
    """Gradients by input name, from those of ``h`` and of the final state (its differentiable parts)."""
    x, R, dy, h = x.contiguous(), R.contiguous(), dy.contiguous(), h.contiguous()
    bias, peep = (None if w is None else w.float().contiguous() for w in (b, p))
    (B, T, H), D = x.shape[:3], R.shape[1]
    cell, tokens = CELLS[kind], B * T
    N, start, order = _rows(x, cu_host)
    past = before(y, h, cu_host).flatten(0, 1).transpose(0, 1)  # [H, tokens, D]
    inputs = x.view(tokens, H, -1).transpose(0, 1)
    if kind == "gru":
        a = torch.bmm(past, R)
        a[..., : 2 * D] += inputs[..., : 2 * D]
    else:
        a = torch.baddbmm(inputs, past, R)
    dx, dg = torch.empty_like(x), torch.empty_like(y) if kind == "gru" else None
    if D > WIDE:
        settings = wide_settings(D, cell.gates, True, triton.cdiv(N, 16) * H, multiprocessors(x.device, 1))
    else:
        settings = launch_settings(D, cell.gates, x.dtype)
    tiles = triton.cdiv(N, settings["BN"])
    dp = None if p is None else h.new_empty(tiles, *p.shape)
    d_state = tuple(d.contiguous() for d in d_state)
    d_before = tuple(torch.empty_like(d) for d in d_state)
    missing = (None,) * (3 - len(d_state))
    tensors = a, x, R, bias, peep, h, y, tape, dy, *d_state, *missing, dx, dg, dp, *d_before, *missing
    flags = {"KIND": KINDS[kind], "G": cell.gates, "BIAS": b is not None, "PEEPHOLES": p is not None}
    flags |= {"PACKED": cu_host is not None}
    if D > WIDE:
        shared = x.new_empty(2, N, H, cell.gates * D)
        for first, programs, counter in _shares(N, H, D, settings, x.device):
            wide_backward_kernel[(programs,)](
                *tensors, shared, counter, start, order, first, N, T, H, D, tokens,
                FAST=numerics(x)["FAST"], launch_cooperative_grid=True, **flags, **settings,
            )  # fmt: skip
    else:
        backward_kernel[(tiles * H,)](*tensors, start, order, N, T, H, D, tokens, **flags, **numerics(x), **settings)
    da = dx.view(tokens, H, -1).transpose(0, 1)
    if dg is not None:
        da = torch.cat([da[..., : 2 * D], dg.view(tokens, H, D).transpose(0, 1)], 2)
    grads = {"x": dx, "R": torch.bmm(past.transpose(1, 2), da).to(R.dtype)}
    if b is not None:
        grads["b"] = da.sum(1, dtype=torch.float32).to(b.dtype)
    if p is not None and dp is not None:
        grads["p"] = dp.sum(0).to(p.dtype)
    return grads | dict(zip(cell.states, d_before, strict=False))
