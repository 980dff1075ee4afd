"""Launching the decay kernels: sequences and their pieces, launch settings, forward and backward of a call."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core import chunk_table
from .kernels import chain_kernel, gate_kernel, pass_kernel, sums_kernel


def chunk_length(K: int, V: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, the same in every pass of a call."""
    if dtype == torch.float32:
        return 32 if max(K, V) <= 128 else 16
    return 64 if max(K, V) <= 256 else 32


def launch_settings(DR: int, DP: int, C: int, dtype: torch.dtype, split: bool, grad: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth, by the size of the state and how it is walked; T never enters.

    Measured on Hopper: pieces (split) run two programs a multiprocessor with two stages, whole sequences one program
    with three; from 256 reading channels on two warp groups share the state. One stage and BP = 32 with two warp
    groups are slower or wrong there and not used.
    """
    BR, widest = max(16, triton.next_power_of_2(DR)), max(16, triton.next_power_of_2(DP))
    if dtype == torch.float32:
        return {"BR": BR, "BP": min(32 if BR <= 128 else 16, widest), "C": C, "num_warps": 4, "num_stages": 2}
    if BR <= 128:
        return {"BR": BR, "BP": min(64, widest), "C": C, "num_warps": 4, "num_stages": 2 if split and BR == 128 else 3}
    if BR == 512 and grad == 1:
        return {"BR": BR, "BP": min(32, widest), "C": C, "num_warps": 4, "num_stages": 2}
    return {"BR": BR, "BP": min(64, widest), "C": C, "num_warps": 8, "num_stages": 2}


@cache
def _has_tma(device: torch.device) -> bool:
    """Whether tiles can be moved by the bulk tensor copy engine (NVIDIA from Hopper on)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


class _Layout:
    """Sequences and pieces of one call."""

    def __init__(self, q: Tensor, v: Tensor, piece: int, cu_host: Tensor | None):
        self.B, self.T = q.shape[:2]
        self.piece, self.chunk = piece, chunk_length(q.shape[3], v.shape[3], q.dtype)
        self.packed = cu_host is not None
        if cu_host is None:
            self.rows, self.per_row = self.B, -(-self.T // self.piece)
            self.pieces, self.longest = self.rows * self.per_row, self.T
            self.cu = self.table = self.first = None
        else:
            lengths = cu_host.diff()
            self.rows, self.per_row, self.longest = len(lengths), 0, int(lengths.max())
            self.table = chunk_table(cu_host, self.piece, q.device)
            self.pieces = len(self.table)
            counts = torch.zeros(len(cu_host), dtype=torch.int32)
            counts[1:] = (-(-lengths // self.piece)).cumsum(0)
            self.cu, self.first = cu_host.to(q.device), counts.to(q.device)

    def split(self, programs: int) -> bool:
        """Whether to walk pieces rather than whole sequences: when whole ones would leave the GPU half empty, or a
        single long one would keep it waiting."""
        uneven = self.packed and self.longest * self.rows > 2 * self.T
        return self.longest > self.piece and (programs < 96 or (uneven and programs < 1024))


def _walk(
    layout: _Layout,
    reader: Tensor,
    writer: Tensor,
    payload: Tensor,
    g: _Gate | None,
    *,
    H: int,
    scale: float = 1.0,
    reverse: bool = False,
    transposed: bool = False,
    split: bool,
    start: Tensor | None,
    out: Tensor | None = None,
    wr: Tensor | None = None,
    ws: Tensor | None = None,
    edges: Tensor | None = None,
    last: Tensor | None = None,
    total: Tensor | None = None,
    grad: int = 0,
    dot: Tensor | None = None,
    row: Tensor | None = None,
    col: Tensor | None = None,
) -> None:
    """Launch one pass; see the module docstring. ``transposed`` says the states in memory are ``[DP, DR]``."""
    DR, DP = writer.shape[-1], payload.shape[-1]
    settings = launch_settings(DR, DP, layout.chunk, writer.dtype, split, grad)
    units = layout.pieces if split else layout.rows
    grid = (units * H * triton.cdiv(DP, settings["BP"]),)
    gate = 0 if g is None else 1 if g.seen is None else 2
    heads = [H if x is None else x.shape[2] for x in (reader, writer, payload, dot)]
    fp32 = writer.dtype == torch.float32
    full = settings["BR"] == DR and DP % settings["BP"] == 0
    ragged = layout.packed or layout.T % settings["C"] != 0
    tma = full and not fp32 and _has_tma(writer.device)

    def tile(x: Tensor | None, width: int) -> Any:
        if x is None or not tma:
            return x
        flat = x.view(layout.B * layout.T, -1)
        return TensorDescriptor.from_tensor(flat, [settings["C"], width])

    pass_kernel[grid](
        tile(reader, settings["BR"]),
        tile(writer, settings["BR"]),
        tile(payload, settings["BP"]),
        None if g is None else g.values,
        None if g is None else g.seen,
        None if g is None else g.left,
        wr,
        ws,
        start,
        tile(out, settings["BP"]),
        out,
        edges,
        last,
        total,
        tile(dot, settings["BP"]),
        row,
        col,
        layout.cu,
        layout.table if split else layout.first,
        scale,
        layout.T,
        layout.piece,
        layout.B * layout.T,
        layout.pieces,
        H,
        *heads,
        DR,
        DP,
        1 if transposed else DP,
        DR if transposed else 1,
        REVERSE=reverse,
        GATE=gate,
        WR=wr is not None,
        WS=ws is not None,
        START=start is not None,
        SPLIT=split,
        STATE_ONLY=out is None,
        EDGES=edges is not None,
        LAST=last is not None,
        PACKED=layout.packed,
        GRAD=grad,
        EXACT=fp32,
        FULL=full,
        RAGGED=ragged,
        TMA=tma,
        **settings,
    )


def _chain(
    layout: _Layout,
    writer: Tensor,
    payload: Tensor,
    g: _Gate | None,
    ws: Tensor | None,
    start: Tensor,
    H: int,
    pieces: int,
    *,
    reverse: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Boundary states of every piece and the final state, from the pieces' own writes."""
    K, V = writer.shape[-1], payload.shape[-1]
    own = start.new_empty(pieces, H, K, V)
    total = start.new_zeros(layout.pieces, H)
    _walk(
        layout,
        writer,  # stands in for the reader: nothing is read
        writer,
        payload,
        g,
        H=H,
        scale=scale,
        reverse=reverse,
        split=True,
        start=None,
        ws=ws,
        last=own,
        total=total,
    )
    edges, last = torch.empty_like(own), torch.empty_like(start)
    block = 1024
    grid = (layout.rows * H * triton.cdiv(K * V, block),)
    chain_kernel[grid](
        start,
        own,
        total,
        edges,
        last,
        layout.first,
        layout.per_row,
        H,
        K * V,
        BLOCK=block,
        REVERSE=reverse,
        PACKED=layout.packed,
        GATED=g is not None,
    )
    return edges, last


def _splits(layout: _Layout, K: int, V: int, H: int, dtype: torch.dtype) -> bool:
    return layout.split(layout.rows * H * triton.cdiv(V, launch_settings(K, V, layout.chunk, dtype, False, 0)["BP"]))


class _Gate(NamedTuple):
    """A log-decay as the kernels read it: ``[H]`` when constant, else ``[B, T, H]`` with its sums within chunks."""

    values: Tensor
    seen: Tensor | None
    left: Tensor | None


def _prepare_gate(g: Tensor | None, layout: _Layout) -> _Gate | None:
    if g is None:
        return None
    if all(g.stride(i) == 0 or g.shape[i] == 1 for i in (0, 1)):  # constant over batch and time: it came expanded
        return _Gate(g[0, 0].contiguous(), None, None)
    g = g.contiguous()
    H, tokens = g.shape[2], layout.B * layout.T
    seen, left = (torch.empty(H, tokens, dtype=torch.float32, device=g.device) for _ in range(2))
    sums_kernel[(layout.pieces * H,)](
        g,
        seen,
        left,
        layout.cu,
        layout.table,
        layout.T,
        tokens,
        layout.piece,
        H,
        LENGTH=triton.next_power_of_2(layout.piece),
        C=layout.chunk,
        PACKED=layout.packed,
    )
    return _Gate(g, seen, left)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_host: Tensor | None,
    scale: float,
    piece: int,
    pieces: int,
    edges: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reading, final state and, with ``edges``, the boundary states the backward pass starts from."""
    q, k, v, S = q.contiguous(), k.contiguous(), v.contiguous(), S.contiguous()
    w = None if w is None else w.contiguous()
    H, K, V = v.shape[2], q.shape[3], v.shape[3]
    layout = _Layout(q, v, piece, cu_host)
    gate = _prepare_gate(g, layout)
    o = torch.empty_like(v)
    if _splits(layout, K, V, H, q.dtype):
        bounds, last = _chain(layout, k, v, gate, w, S, H, pieces)
        _walk(layout, q, k, v, gate, H=H, scale=scale, split=True, start=bounds, out=o, ws=w)
        return o, last, bounds if edges else None
    last = torch.empty_like(S)
    bounds = S.new_empty(pieces, H, K, V) if edges else None
    _walk(layout, q, k, v, gate, H=H, scale=scale, split=False, start=S, out=o, ws=w, edges=bounds, last=last)
    return o, last, bounds


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    bounds: Tensor,
    cu_host: Tensor | None,
    scale: float,
    piece: int,
    do: Tensor,
    dS: Tensor,
    gate_grad: bool,
) -> dict[str, Tensor]:
    """Gradients by input name, from those of the reading and of the final state."""
    q, k, v, do, dS = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous(), dS.contiguous()
    w = None if w is None else w.contiguous()
    H, K, V = v.shape[2], q.shape[3], v.shape[3]
    layout = _Layout(q, v, piece, cu_host)
    gate = _prepare_gate(g, layout)
    gate_grad = gate_grad and (g is not None or w is not None)
    dq, dk, dv = v.new_empty(*v.shape[:3], K), v.new_empty(*v.shape[:3], K), torch.empty_like(v)
    row, col, cross = None, None, None
    if gate_grad:  # one partial sum for each block of the payload's channels
        tiles = [launch_settings(V, K, layout.chunk, q.dtype, True, grad)["BP"] for grad in (1, 2)]
        inner, outer = (triton.cdiv(K, tile) for tile in tiles)
        row, col, cross = (dS.new_empty(n, H, layout.B * layout.T) for n in (inner, inner, outer))
    common: dict[str, Any] = {"H": H, "scale": scale}
    _walk(
        layout,
        do,
        v,
        k,
        gate,
        split=True,
        transposed=True,
        start=bounds,
        out=dq,
        ws=w,
        grad=int(gate_grad),
        dot=q if gate_grad else None,
        row=row,
        col=col,
        **common,
    )
    if _splits(layout, K, V, H, q.dtype):
        d_bounds, dS0 = _chain(layout, q, do, gate, None, dS, H, len(bounds), reverse=True, scale=scale)
        _walk(layout, k, q, do, gate, reverse=True, split=True, start=d_bounds, out=dv, wr=w, **common)
    else:
        d_bounds, dS0 = torch.empty_like(bounds), torch.empty_like(dS)
        _walk(
            layout,
            k,
            q,
            do,
            gate,
            reverse=True,
            split=False,
            start=dS,
            out=dv,
            wr=w,
            edges=d_bounds,
            last=dS0,
            **common,
        )
    _walk(
        layout,
        v,
        do,
        q,
        gate,
        reverse=True,
        split=True,
        transposed=True,
        start=d_bounds,
        out=dk,
        wr=w,
        grad=2 * int(gate_grad),
        dot=k if gate_grad else None,
        col=cross,
        **common,
    )
    heads = q.shape[2]
    if heads != H:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3) for x in (dq, dk))
    grads = {"q": dq, "k": dk, "v": dv, "S": dS0}
    if gate_grad:
        dg = None if g is None else torch.empty(g.shape, dtype=g.dtype, device=g.device)
        dw = None if w is None else torch.empty_like(w)
        gate_kernel[(layout.pieces * H,)](
            row,
            col,
            cross,
            w,
            bounds,
            d_bounds,
            dS0,
            dg,
            dw,
            layout.cu,
            layout.table,
            layout.T,
            layout.B * layout.T,
            layout.piece,
            H,
            K * V,
            inner,
            outer,
            LENGTH=triton.next_power_of_2(layout.piece),
            BLOCK=1024,
            WS=w is not None,
            GATED=g is not None,
            PACKED=layout.packed,
        )
        grads |= {name: x for name, x in (("g", dg), ("w", dw)) if x is not None}
    return grads
