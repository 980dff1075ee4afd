"""Launching the decay kernels of single tokens, and those of the mLSTM's gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linnet.ops.core import following

from ..core.compiling import Kernel, compile_together
from . import kernels_step
from .launch_walks import State
from .settings import ceil_div, power_of_2

stabilizer_kernel = Kernel(kernels_step.stabilizer_kernel)
stabilizer_sums_kernel = Kernel(kernels_step.stabilizer_sums_kernel)
_compiled: set[Any] = set()


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    state: State,
    floor: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, State]:
    """One token for every row, without gradients: reading and the new state."""
    q, k, v, gv, u, w, floor = (None if x is None else x.contiguous() for x in (q, k, v, gv, u, w, floor))
    (N, _, H, V), (HQ, K) = v.shape, q.shape[2:]  # type: ignore[union-attr]
    gate, row = 0, 0
    if g is not None:
        gate = 2 if g.dim() == 4 else 1
        if gate == 2 or g.stride(0) != 0 or g.stride(2) != 1:  # a constant gate came expanded over the rows
            g = g.contiguous()
        row = g.stride(0) if N > 1 else 0
    S, z = (None if x is None else x.contiguous() for x in state)
    o = torch.empty_like(v)
    # Every program reads all of a head's z, so that one is never overwritten.
    after = State(following(S), None if z is None else torch.empty_like(z))  # type: ignore[arg-type]
    BK = max(16, power_of_2(K))
    BV = min(max(16, power_of_2(V)), max(16, 8192 // BK))
    kernels_step.step_kernel[(N * H * ceil_div(V, BV),)](
        q, k, v, g, gv, u, w, S, z, floor, o, *after, scale, eps, H, HQ, K, V, row, BK=BK, BV=BV, GATE=gate
    )
    return o, after  # type: ignore[return-value]


def stabilizer(
    i: Tensor, f: Tensor, m: Tensor, cu: Tensor | None, ids: Tensor | None, least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-decay, write weight and least denominator ``[B, T, H]`` of the mLSTM (the last two laid out ``[H, B, T]``),
    and the stabiliser ``[N, H]`` after the last token, from its gates' pre-activations and the stabiliser before the
    first. Blocks of tokens are walked at once: first for what each does to a stabiliser, then from what enters it."""
    i, f, m = i.contiguous(), f.contiguous(), m.contiguous()
    B, T, H = i.shape
    heads = min(4, power_of_2(H))  # few, so that programs fill the GPU while the chain over their blocks stays short
    block = 1024 // heads
    blocks = ceil_div(B * T, block)
    grid = (blocks * ceil_div(H, heads),)
    sums = torch.empty(2, blocks, H, dtype=torch.float64, device=i.device)
    g, last = torch.empty(i.shape, dtype=torch.float32, device=i.device), m.float().clone()
    w, floor = (torch.empty(H, B, T, dtype=torch.float32, device=i.device) for _ in range(2))
    given = (i, f, m, cu, ids, *sums, T, B * T, H, blocks, least)
    sizes: dict[str, Any] = {"HEADS": heads, "BLOCK": block, "PACKED": cu is not None, "num_warps": 8}

    def launch() -> None:
        stabilizer_sums_kernel[grid](*given, **sizes)
        stabilizer_kernel[grid](*given, g, w, floor, last, **sizes)

    kind = i.device, i.dtype, f.dtype, m.dtype, H, cu is None
    if i.is_cuda and kind not in _compiled:
        _compiled.add(kind)
        compile_together(launch)
    launch()
    return g, w.permute(1, 2, 0), floor.permute(1, 2, 0), last
