"""Launching the cell kernels: rows of a call, launch settings, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .cells import CELLS, Tensors
from .kernels import KINDS, backward_kernel, forward_kernel


def launch_settings(D: int, gates: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and channels of a tile and warps of a program, by the size of the weights it holds on chip."""
    BD = max(16, triton.next_power_of_2(D))
    held = gates * BD * BD * dtype.itemsize  # over the registers of the program
    return {"BN": 16, "BD": BD, "num_warps": 4 if held <= 32768 else 8, "num_stages": 1}


def _rows(x: Tensor, cu_host: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """Number of sequences, where they start, and in which order they run: longest first, so that those sharing a
    program end together."""
    if cu_host is None:
        return x.shape[0], None, None
    order = cu_host.diff().sort(descending=True, stable=True).indices.int()
    return len(order), cu_host.to(x.device), order.to(x.device)


def _numerics(x: Tensor) -> dict[str, bool | str]:
    """How exactly the kernels compute: 16-bit inputs take hardware approximations where there are any."""
    exact, real = x.dtype == torch.float32, x.device.type == "cuda"
    fast = real and not exact and torch.version.hip is None
    return {"EXACT": exact, "FAST": fast, "PRECISION": "tf32x3" if exact and real else "ieee"}


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
    settings = launch_settings(D, gates, x.dtype)
    y = x.new_empty(B, T, H, D)
    tape = state[0].new_empty(B * T, len(state) - 1, H, D) if keep else None
    after = tuple(torch.empty_like(s) for s in state)
    missing = (None,) * (4 - len(state))
    forward_kernel[(triton.cdiv(N, settings["BN"]) * H,)](
        x, R, b, p, *state, *missing, y, tape, *after, *missing, start, order, N, T, H, D,
        KIND=KINDS[kind], G=gates, BIAS=b is not None, PEEPHOLES=p is not None, SAVE=keep and len(state) > 1,
        PACKED=cu_host is not None, **_numerics(x), **settings,
    )  # fmt: skip
    return y, after, tape


def _before(y: Tensor, h: Tensor, cu_host: Tensor | None) -> Tensor:
    """h before every token ``[B * T, H, D]``, as the products see it."""
    h = h.to(y.dtype)
    if cu_host is None:
        return torch.cat([h[:, None], y[:, :-1]], 1).flatten(0, 1)
    before = y[0].roll(1, 0)
    full = (cu_host.diff() > 0).nonzero().flatten()
    return before.index_copy(0, cu_host[full].to(y.device).long(), h.index_select(0, full.to(y.device)))


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
    settings = launch_settings(D, cell.gates, x.dtype)
    before = _before(y, h, cu_host).transpose(0, 1)  # [H, tokens, D]
    inputs = x.view(tokens, H, -1).transpose(0, 1)
    if kind == "gru":
        a = torch.bmm(before, R)
        a[..., : 2 * D] += inputs[..., : 2 * D]
    else:
        a = torch.baddbmm(inputs, before, R)
    dx, dg = torch.empty_like(x), torch.empty_like(y) if kind == "gru" else None
    tiles = triton.cdiv(N, settings["BN"])
    dp = None if p is None else h.new_empty(tiles, *p.shape)
    d_state = tuple(d.contiguous() for d in d_state)
    d_before = tuple(torch.empty_like(d) for d in d_state)
    missing = (None,) * (3 - len(d_state))
    backward_kernel[(tiles * H,)](
        a, x, R, bias, peep, h, y, tape, dy, *d_state, *missing, dx, dg, dp, *d_before, *missing, start, order,
        N, T, H, D, tokens,
        KIND=KINDS[kind], G=cell.gates, BIAS=b is not None, PEEPHOLES=p is not None,
        PACKED=cu_host is not None, **_numerics(x), **settings,
    )  # fmt: skip
    da = dx.view(tokens, H, -1).transpose(0, 1)
    if dg is not None:
        da = torch.cat([da[..., : 2 * D], dg.view(tokens, H, D).transpose(0, 1)], 2)
    grads = {"x": dx, "R": torch.bmm(before.transpose(1, 2), da).to(R.dtype)}
    if b is not None:
        grads["b"] = da.sum(1, dtype=torch.float32).to(b.dtype)
    if p is not None and dp is not None:
        grads["p"] = dp.sum(0).to(p.dtype)
    return grads | dict(zip(cell.states, d_before, strict=False))
