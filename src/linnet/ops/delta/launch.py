"""Launching the delta kernels: chunks of a call, launch settings, forward and backward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..core import chunk_table
from .kept import chunk_rows, kept
from .kernels import local_kernel, state_kernel
from .kernels_backward import adjoint_kernel, gradient_kernel, pairs_kernel
from .kernels_step import step_kernel


def launch_settings(kernel: str, K: int, V: int, dtype: torch.dtype, vector: bool) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth, by the sizes of keys and values; T never enters."""
    BK, widest = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(V))
    fp32 = dtype == torch.float32
    if kernel == "local":
        return {"BK": min(BK, 64) if vector else BK, "num_warps": 4, "num_stages": 1 if fp32 else 2}
    BV = min(32 if fp32 else 64, widest)
    if kernel == "pairs":
        return {"BV": BV, "num_warps": 4, "num_stages": 1 if fp32 else 2}
    if kernel == "gradient":
        BK = min(BK, 32 if fp32 or vector else 128)
        warps = 8 if BK == 128 else 4
        return {"BK": BK, "BV": BV, "num_warps": warps, "num_stages": 1 if fp32 else 2}
    C = chunk_rows(K, dtype)
    stage = 2 * C * (BK * (3 if vector else 2) + 2 * C + BV)  # bytes that a chunk's tiles take, of about 225 KB
    return {"BK": BK, "BV": BV, "num_warps": 4, "num_stages": 1 if fp32 else max(1, min(3, 225_000 // stage))}


@cache
def selections(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros and ones ``[step, 3, C, C]``: for each step in which the kernels take pairs of rows (r, s), s before r, the
    rows whose log-decays lie between a row and the one where its pairs are parted; the same without the row's own when
    it is the later of the pair; and the pairs. Steps 0..5 take, within blocks of 2 << step rows, a row of the second
    half with one of the first; 6, 7 and 8 whole blocks (of the chunk, of 16 rows, of one), parted at their first row.
    Entry 9: rows up to a row, before it, after it."""
    r, i = torch.arange(C)[:, None], torch.arange(C)[None, :]
    table = []
    for b in (1, 2, 4, 8, 16, 32):
        same, late = r // b == i // b, r // b % 2 == 1
        near = [same & torch.where(late, inner, i > r) for inner in (i <= r, i < r)]
        table += [*near, (r // b == i // b + 1) & late]
    for b in (C, 16, 1):
        same = (r // b == i // b) & (i % b != 0)
        table += [same & (i <= r), same & (i < r), (r // b == i // b) & (i <= r)]
    table += [i <= r, i < r, i > r]
    return torch.stack(table).unflatten(0, (-1, 3)).to(device, torch.float32 if dtype == torch.float32 else torch.bfloat16)


class _Layout:
    """Sequences and chunks of one call."""

    def __init__(self, q: Tensor, v: Tensor, write: bool, substeps: int, cu_host: Tensor | None):
        self.B, self.T = q.shape[:2]
        self.H, self.heads, self.K, self.V = v.shape[2], q.shape[2], q.shape[3], v.shape[3]
        self.substeps, self.C = substeps, chunk_rows(self.K, q.dtype)
        self.tokens = self.C // substeps
        self.packed = cu_host is not None
        self.kept = kept(q, v, write, substeps, cu_host)
        if cu_host is None:
            self.rows, self.chunks = self.B, self.B * -(-self.T // self.tokens)
            self.cu = self.table = self.first = None
        else:
            self.rows = len(cu_host) - 1
            self.table = chunk_table(cu_host, self.tokens, q.device)
            self.chunks = len(self.table)
            counts = torch.zeros(len(cu_host), dtype=torch.int32)
            counts[1:] = (-(-cu_host.diff() // self.tokens)).cumsum(0)
            self.cu, self.first = cu_host.to(q.device), counts.to(q.device)

    def sizes(self, scale: float) -> tuple[float, int, int, int, int, int]:
        return scale, self.T, self.tokens, self.H, self.heads, self.K


class _Modes:
    """Which of the family's modes a call is in. The untied form has two substeps: one erases with a and writes under b,
    the other only writes; both are read from the tokens' rows."""

    def __init__(self, beta: Tensor | None, g: Tensor | None, w: Tensor | None):
        self.gate = 0 if g is None else 1 if g.dim() == 3 else 2
        self.untied = beta is None
        self.erase = beta is not None and beta.dim() == 4
        self.write = w is not None
        self.vector = self.gate == 2 or self.erase or self.untied


def _local(
    layout: _Layout,
    modes: _Modes,
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float,
    l2norm: bool,
    scores: bool,
    ab: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """What each chunk holds by itself: A and P (``scores``), row and chunk decays, operands of the serial passes."""
    C, K, H = layout.C, layout.K, layout.H
    slots = layout.chunks, H
    fp32 = {"dtype": torch.float32, "device": q.device}
    local: dict[str, Any] = {"rows": torch.empty(layout.kept[1], **fp32)}
    local["fade"] = torch.empty(*slots, K, **fp32) if modes.gate and modes.vector else None
    local["matrices"] = q.new_empty(layout.kept[0]) if scores else None
    operands = [q.new_empty(*slots, C, K) if modes.vector else None for _ in range(3)]
    local_kernel[(layout.chunks * H,)](
        q,
        k,
        beta,
        *(ab or (None, None)),
        g,
        local["rows"],
        local["fade"],
        local["matrices"],
        *operands,
        selections(C, q.dtype, q.device),
        layout.cu,
        layout.table,
        *layout.sizes(scale),
        C=C,
        LEVELS=C.bit_length() - 1,
        SUB=layout.substeps,
        GATE=modes.gate,
        ERASE=modes.erase,
        W=modes.write,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        NORM=l2norm,
        SCORES=scores,
        PACKED=layout.packed,
        EXACT=q.dtype == torch.float32,
        **launch_settings("local", K, layout.V, q.dtype, modes.vector),
    )
    local["operands"] = operands if modes.vector else [k, q, k]
    return local


def _walk(
    layout: _Layout,
    modes: _Modes,
    local: dict[str, Any],
    v: Tensor,
    w: Tensor | None,
    S: Tensor,
    scale: float,
    *,
    o: Tensor | None = None,
    last: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The serial pass: the reading and the final state, or (``kept``) entering states and writes of every chunk."""
    settings = launch_settings("state", layout.K, layout.V, v.dtype, modes.vector)
    erase, read, write = local["operands"]
    state_kernel[(layout.rows * layout.H * triton.cdiv(layout.V, settings["BV"]),)](
        erase,
        write,
        read,
        v,
        w,
        local["rows"],
        local["fade"],
        local["matrices"],
        S,
        last,
        o,
        *(kept or (None, None)),
        layout.cu,
        layout.first,
        *layout.sizes(scale),
        layout.V,
        C=layout.C,
        SUB=layout.substeps,
        GATE=modes.gate,
        W=modes.write,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        OUTPUT=o is not None,
        KEEP=kept is not None,
        LAST=last is not None,
        PACKED=layout.packed,
        **settings,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    training: bool,
    ab: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Reading, final state, and when training what the backward pass needs of every chunk. The untied form has
    ``ab`` in place of ``beta``, and two substeps."""
    q, k, v, S = (x.contiguous() for x in (q, k, v, S))
    beta, g, w = (None if x is None else x.contiguous() for x in (beta, g, w))
    ab = None if ab is None else (ab[0].contiguous(), ab[1].contiguous())
    layout, modes = _Layout(q, v, w is not None, substeps, cu_host), _Modes(beta, g, w)
    local = _local(layout, modes, q, k, beta, g, scale, l2norm, True, ab)
    o, last = v.new_empty(layout.B, layout.T, layout.H, layout.V), torch.empty_like(S)
    _walk(layout, modes, local, v, w, S, scale, o=o, last=last)
    return (o, last, local["matrices"], local["rows"]) if training else (o, last, None, None)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    scale: float,
    l2norm: bool,
    substeps: int,
    ab: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reading and next state of a few tokens, without gradients, in one kernel that moves the state once.

    With ``index`` (an integer tensor ``[B]``) sequence n has its state in row ``index[n]`` of ``S``, and that row is
    overwritten: a server keeps the states of all its sequences in one tensor. Otherwise ``S`` is left as it is.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    beta, g, w, a, b = (None if x is None else x.contiguous() for x in (beta, g, w, *(ab or (None, None))))
    S = S if index is not None else S.contiguous()
    modes = _Modes(beta, g, w)
    (B, T, heads, K), (H, V) = q.shape, v.shape[2:]
    out = torch.empty_like(S) if index is None else S
    o = v.new_empty(B, T, H, V)
    BV = max(16, triton.next_power_of_2(V))
    while BV > 32 or (BV > 8 and B * H * triton.cdiv(V, BV) < 256):  # enough programs to fill the memory's pipes
        BV //= 2
    step_kernel[(B * H * triton.cdiv(V, BV),)](
        q,
        k,
        v,
        beta,
        a,
        b,
        g,
        w,
        S,
        out,
        index,
        o,
        scale,
        T,
        H,
        heads,
        K,
        V,
        BK=max(16, triton.next_power_of_2(K)),
        BV=BV,
        SUB=substeps,
        GATE=modes.gate,
        ERASE=modes.erase,
        W=modes.write,
        UNTIED=modes.untied,
        NORM=l2norm,
        INDEX=index is not None,
        num_warps=4,
    )
    return o, out


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    matrices: Tensor,
    rows: Tensor,
    cu_host: Tensor | None,
    scale: float,
    l2norm: bool,
    substeps: int,
    do: Tensor,
    dS: Tensor,
    ab: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients by input name, from those of the reading and of the final state."""
    q, k, v, S, do, dS = (x.contiguous() for x in (q, k, v, S, do, dS))
    beta, g, w = (None if x is None else x.contiguous() for x in (beta, g, w))
    ab = None if ab is None else (ab[0].contiguous(), ab[1].contiguous())
    layout, modes = _Layout(q, v, w is not None, substeps, cu_host), _Modes(beta, g, w)
    H, K, V, C = layout.H, layout.K, layout.V, layout.C
    if modes.vector:
        local = _local(layout, modes, q, k, beta, g, scale, l2norm, False, ab)
    else:
        local = {"rows": rows, "fade": None, "operands": [k, q, k]}
    local["matrices"] = matrices

    entering, leaving = (q.new_empty(layout.chunks, H, V, K) for _ in range(2))
    R, L = (q.new_empty(layout.chunks, H, V, C) for _ in range(2))
    _walk(layout, modes, local, v, w, S, scale, kept=(entering, R))

    settings = launch_settings("state", K, V, v.dtype, modes.vector)
    erase, read, write = local["operands"]
    dS0 = torch.empty_like(S)
    adjoint_kernel[(layout.rows * H * triton.cdiv(V, settings["BV"]),)](
        erase,
        write,
        read,
        local["rows"],
        local["fade"],
        matrices,
        do,
        dS,
        dS0,
        leaving,
        L,
        layout.cu,
        layout.first,
        *layout.sizes(scale),
        V,
        C=C,
        SUB=substeps,
        GATE=modes.gate,
        MATRICES=matrices.shape[2],
        VECTOR=modes.vector,
        PACKED=layout.packed,
        **settings,
    )
    del local["operands"], erase, read, write

    dq, dk = q.new_empty(*q.shape[:2], H, K), k.new_empty(*k.shape[:2], H, K)
    a, b = ab or (None, None)
    wanted = {"v": v, "beta": beta, "g": g, "w": w, "a": a, "b": b}
    grads = {"S": dS0} | {name: torch.empty_like(x) for name, x in wanted.items() if x is not None}
    D1, D2 = (q.new_empty(layout.chunks, H, C, C) for _ in range(2))
    lv = None if modes.write else S.new_empty(layout.chunks, H, C)
    settings = launch_settings("pairs", K, V, v.dtype, modes.vector)
    pairs_kernel[(layout.chunks * H,)](
        v,
        g,
        w,
        local["rows"],
        do,
        R,
        L,
        D1,
        D2,
        lv,
        grads["v"],
        grads.get("w"),
        layout.cu,
        layout.table,
        layout.T,
        layout.tokens,
        H,
        V,
        C=C,
        SUB=substeps,
        GATE=modes.gate,
        W=modes.write,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        PACKED=layout.packed,
        EXACT=q.dtype == torch.float32,
        **settings,
    )
    settings = launch_settings("gradient", K, V, v.dtype, modes.vector)
    gradient_kernel[(layout.chunks * H,)](
        q,
        k,
        beta,
        *(ab or (None, None)),
        g,
        local["rows"],
        do,
        entering,
        R,
        leaving,
        L,
        D1,
        D2,
        lv,
        dq,
        dk,
        grads.get("beta"),
        grads.get("a"),
        grads.get("b"),
        grads.get("g"),
        selections(C, q.dtype, q.device),
        layout.cu,
        layout.table,
        *layout.sizes(scale),
        V,
        C=C,
        LEVELS=C.bit_length() - 1,
        SUB=substeps,
        GATE=modes.gate,
        ERASE=modes.erase,
        W=modes.write,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        NORM=l2norm,
        WHOLE=settings["BK"] >= K,
        PACKED=layout.packed,
        EXACT=q.dtype == torch.float32,
        **settings,
    )
    if layout.heads != H:
        dq, dk = (x.unflatten(2, (layout.heads, -1)).sum(3) for x in (dq, dk))
    return grads | {"q": dq, "k": dk}
