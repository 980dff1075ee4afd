"""Launching the delta kernels: chunks of a call, launch settings, forward and backward."""

from __future__ import annotations

from functools import cache
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core import chunk_table, following, uploaded
from ..core.compiling import Kernel, compile_together, compiling
from ..core.tiles import has_tma, multiprocessors
from . import kernels, kernels_around, kernels_backward, kernels_step
from .kept import chunk_rows, kept

local_kernel, state_kernel = Kernel(kernels.local_kernel), Kernel(kernels.state_kernel)
adjoint_kernel, gradient_kernel = Kernel(kernels_backward.adjoint_kernel), Kernel(kernels_backward.gradient_kernel)
prepare_kernel, finish_kernel = Kernel(kernels_around.prepare_kernel), Kernel(kernels_around.finish_kernel)
hard_kernel, hard_gradient_kernel = Kernel(kernels_around.hard_kernel), Kernel(kernels_around.hard_gradient_kernel)
chain_kernel = Kernel(kernels_around.chain_kernel)

# log2 of what half a chunk may forget in a channel for its rows to have one factor each; factors and their inverses
# reach it, gradients of operands its square. fp16 has little range; fp32 takes every channel exactly.
LIMITS = {torch.bfloat16: 48.0, torch.float16: 6.0, torch.float32: -1.0}

# A scalar beta below this is as good as none, and a divisor.
LEAST = {torch.bfloat16: 2.0**-40, torch.float16: 2.0**-14, torch.float32: 2.0**-40}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _block(n: int) -> int:
    """Least tile that holds n channels."""
    return max(16, 1 << (n - 1).bit_length())


@cache
def launch_settings(kernel: str, K: int, V: int, dtype: torch.dtype, vector: bool, tma: bool = False) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth, by the sizes of keys and values, and by whether the tiles of what is local
    to a chunk come through descriptors; T never enters."""
    fp32 = dtype == torch.float32
    # In 16 bits no tile is narrower than 64: with tiles of 16 channels gradients of gates came out wrong on Hopper.
    BK, BV = (_block(K), min(32, _block(V))) if fp32 else (max(64, _block(K)), 64)
    if kernel in ("prepare", "finish"):
        ROWS = min(1024 // BK, chunk_rows(K, dtype) // 4)  # 32 numbers of a tile a thread; at most a quarter of a chunk
        return {"BK": BK, "ROWS": ROWS, "STAGES": 3, "num_warps": 1, "num_stages": 1}
    if kernel == "hard":
        return {"BK": BK, "num_warps": 8, "num_stages": 1}
    if kernel in ("local", "untied"):  # the untied form has one product where the others have two
        warps = 4 if fp32 else 1 if kernel == "untied" else 2
        apart = fp32 and kernel == "local"  # in fp32 there is room for one product at a time
        if tma and kernel == "local" and not vector:  # one warp has room for one product, and needs no barriers
            return {"BK": 32, "APART": True, "num_warps": 1, "num_stages": 3}
        return {"BK": min(BK, 64), "APART": apart, "num_warps": warps, "num_stages": 1 if fp32 else 3}
    if kernel == "gradient":
        # In 16 bits a single block of 32 keys is computed wrongly on Hopper, and blocks of 32 beside 256 values end in
        # illegal accesses; two to four of them beside at most 128 values are right.
        narrow = (vector or tma) and 64 <= K <= 128 and V <= 128
        # Beside 256 keys, tiles of half as many values, fetched ahead, spill less: 376 bytes of a thread rather than
        # 536 (by address 992). With 512 values to read they lose.
        ahead = tma and K > 128 and V <= 256
        return {
            "BK": min(BK, 32) if fp32 else 32 if narrow else 64,
            "BV": min(32, _block(V)) if fp32 else 64 if ahead or V % 128 == 64 else min(max(64, _block(V)), 128),
            "num_warps": 4,
            "num_stages": 2 if ahead or (tma and narrow) else 1,
        }
    if fp32:
        return {"BK": BK, "BV": min(BV, 32 if BK <= 128 else 16), "num_warps": 8, "num_stages": 1}
    if BK > 128:  # two stages take up to 222 KB; a vector's operands are a third tile of keys
        return {"BK": BK, "BV": BV, "num_warps": 8, "num_stages": 1 if vector else 2}
    C = chunk_rows(K, dtype)
    stage, room = 2 * C * (BK * (3 if vector else 2) + 2 * C + BV), 225_000  # bytes that a chunk's tiles take
    if kernel == "moves":  # reads nothing, and two programs share a multiprocessor
        stage, room = 2 * C * (BK * (2 if vector else 1) + C + BV), 112_000
    if kernel == "written":  # w comes beside v, in up to 32 bits, and their product takes a tile, the reading another
        stage, room = stage + 4 * C * BV, room - 4 * C * BV
    if kernel == "adjoint" and 2 * stage < 115_200:  # two programs share a multiprocessor
        room = 115_200
    return {"BK": BK, "BV": BV, "num_warps": 4, "num_stages": max(1, min(3, room // stage))}


def part_length(chunks: int, programs: int, device: torch.device) -> int:
    """Chunks of the parts in which to walk sequences of so many, where whole ones would have so many programs.

    Parts are walked twice, first for what they do to a state, in half as long a time if twice as many programs run, so
    that they have to fit the GPU at once. Further launches, on the host too, take as long as 24 chunks, the chain as
    four for each part. The interpreter, where nothing is gained, has short sequences only.
    """
    step, launches = (4, 24) if device.type == "cuda" else (0, 0)
    parts = multiprocessors(device, 8) // max(1, programs)
    parts = max(1, min(parts, isqrt(2 * chunks // step) if step else chunks))
    length = _cdiv(chunks, parts)
    return length if 2 * length + step * parts + launches <= chunks else chunks


def _copied(q: Tensor, v: Tensor, modes: _Modes) -> bool:
    """Whether kernels may have their tiles from the copy engine: tiles of 16 bits that channels fill, with no fewer
    keys than rows of a chunk, whose pairs lie for a while where the gradients of keys will. States of 256 keys leave
    serial passes room to fetch tiles ahead only where there are no vectors of gates and no write gate."""
    K, V = q.shape[3], v.shape[3]
    full = (K in (64, 128) and V % 64 == 0) or (K == 256 and V % 256 == 0 and not (modes.vector or modes.write))
    return q.dtype != torch.float32 and full and q.numel() > 0 and has_tma(q.device)


def _rows(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of so many rows and columns of a tensor ``[sequences, rows, heads, channels]``, or of a copy where it does
    not lie as the copy engine needs it."""
    x = x.clone() if x.data_ptr() % 16 else x
    n, length, heads, channels = x.shape
    columns = heads * channels
    return TensorDescriptor(x, [n, length, columns], [length * columns, columns, 1], [1, rows, width])


def _blocks(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Tiles of so many rows of a contiguous tensor, whole ones or so many columns of them."""
    width = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], [rows, columns or width])


def _starts(counts: Tensor) -> Tensor:
    """How many there are before each, and in all."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


class _Parts(NamedTuple):
    """Stretches of tokens that a serial pass walks on their own: whole sequences, or parts of them."""

    count: int
    each: int  # of a sequence, where all have as many
    length: int  # tokens of one, but the last of a sequence
    cu: Tensor | None  # PACKED: their first tokens
    first: Tensor | None  # their first chunks
    before: Tensor | None  # parts before each sequence


@cache
def _below(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones below the diagonal: of a matrix made on chip Triton 3.6 makes wrong operands of the tensor cores."""
    return torch.ones(C, C, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16, device=device).tril_(-1)


class _Layout:
    """Sequences, chunks and parts of one call."""

    def __init__(
        self, q: Tensor, v: Tensor, modes: _Modes, substeps: int, cu_host: Tensor | None, length: int | None = None
    ):
        self.B, self.T = q.shape[:2]
        self.H, self.heads, self.K, self.V = v.shape[2], q.shape[2], q.shape[3], v.shape[3]
        self.substeps, self.C = substeps, chunk_rows(self.K, q.dtype)
        self.tokens = self.C // substeps
        self.packed, self.device, self.dtype = cu_host is not None, q.device, q.dtype
        self.kept = kept(q, v, substeps, cu_host)
        self.tma = self.tokens * substeps == self.C and not self.packed and _copied(q, v, modes)
        if cu_host is None:
            self.rows, self.longest = self.B, -(-self.T // self.tokens)
            self.chunks = self.B * self.longest
            self.cu = self.table = None
            self.whole = _Parts(self.B, 1, self.T, None, None, None)
        else:
            self.rows = len(cu_host) - 1
            self.table = chunk_table(cu_host, self.tokens, q.device)
            self.chunks, counts = len(self.table), _starts(-(-cu_host.diff() // self.tokens))
            self.longest = int(counts.diff().max())
            self.cu = uploaded(cu_host, q.device)
            self.whole = _Parts(self.rows, 1, self.T, self.cu, uploaded(counts, q.device), None)
        self.parts = self._split(cu_host, length)
        if self.K > 128 and self.parts is not None:  # how a part moves a state was not measured with such tiles
            self.tma = False

    def _split(self, cu_host: Tensor | None, length: int | None) -> _Parts | None:
        """Parts of the sequences, of as many chunks as given or where it is faster, else None."""
        if length is None:
            BV = launch_settings("state", self.K, self.V, self.dtype, True)["BV"]
            blocks = max(_cdiv(self.V, BV), _cdiv(self.V + self.K, BV * (2 if self.K <= 128 else 1)))
            rows = _cdiv(self.chunks, max(1, self.longest))  # as if all were as long as the longest
            length = part_length(self.longest, rows * self.H * blocks, self.device)
        if length >= self.longest:
            return None
        if cu_host is None:
            each = _cdiv(self.longest, length)
            return _Parts(self.B * each, each, length * self.tokens, None, None, None)
        table = chunk_table(cu_host, length * self.tokens, torch.device("cpu"))
        n, part = table[:, 0], table[:, 1]
        cu = torch.cat([cu_host[n] + part * (length * self.tokens), cu_host[-1:]])
        first = _starts(-(-cu_host.diff() // self.tokens))
        first = torch.cat([first[n] + part * length, first[-1:]])
        before = _starts(torch.bincount(n, minlength=self.rows))
        cu, first, before = (uploaded(x, self.device) for x in (cu, first, before))
        return _Parts(len(table), 1, self.T, cu, first, before)

    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.T, self.tokens, self.H, self.heads, self.K

    def tokens_of(self, x: Tensor | None, width: int) -> Any:
        """What moves tiles of so many channels of a tensor ``[B, rows, heads, D]`` whose rows are those of chunks."""
        return _rows(x, self.C, width) if self.tma and x is not None and x.shape[1] == self.T * self.substeps else x

    def operands(self, modes: _Modes, erase: Tensor, read: Tensor, write: Tensor, width: int) -> tuple[Any, Any, Any]:
        """What moves so many channels of the operands of a chunk: what is erased, if it is not the same as what is
        written, what is written and what is read."""
        if not modes.vector:
            return None, self.tokens_of(write, width), self.tokens_of(read, width)
        if not self.tma:
            return erase, write, read
        e, w = _blocks(erase, self.C, width), _blocks(write, self.C, width)
        return e, w, e if modes.untied else _blocks(read, self.C, width) if self.substeps == 1 else read

    def matrices(self, x: Tensor) -> Any:
        """What moves the matrices of chunks."""
        return _blocks(x, self.C) if self.tma else x

    def states(self, x: Tensor, rows: int, columns: int) -> Any:
        """What moves tiles of what is kept of every chunk by value."""
        return _blocks(x, rows, columns) if self.tma else x

    def rare(self) -> tuple[int]:
        """Programs of what few chunks of a call need, 64 chunks each at most: one each where all may need it."""
        slots = self.chunks * self.H
        return (max(min(slots, 512), _cdiv(slots, 64)),)


class _Modes:
    """Which of the family's modes a call is in. The untied form has two substeps: one erases with a and writes under b,
    the other only writes; both are read from the tokens' rows."""

    def __init__(self, beta: Tensor | None, g: Tensor | None, w: Tensor | None):
        self.gate = 0 if g is None else 1 if g.dim() == 3 else 2
        self.untied = beta is None
        self.erase = beta is not None and beta.dim() == 4
        self.write = w is not None
        self.vector = self.gate == 2 or self.erase or self.untied


def _prepare(
    layout: _Layout,
    modes: _Modes,
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float,
    l2norm: bool,
    ab: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """What the passes read: q and k as they are, or operands with their decays in them."""
    local: dict[str, Any] = {"decays": None, "operands": (k, q, k)}
    if not modes.vector:
        return local
    slots = layout.chunks, layout.H
    local["rows"] = q.new_empty(layout.kept[1], dtype=torch.float32)
    local["decays"] = q.new_empty(*slots, 3, layout.K, dtype=torch.float32) if modes.gate else None
    write, *others = (q.new_empty(*slots, layout.C, layout.K) for _ in range(2 if modes.untied else 3))
    local["operands"] = others[0], others[-1], write  # untied: a row erases or reads, both lie in one tensor
    prepare_kernel[(layout.chunks * layout.H,)](
        q,
        k,
        beta,
        *(ab or (None, None)),
        g,
        local["rows"],
        local["decays"],
        *local["operands"],
        layout.cu,
        layout.table,
        scale,
        LIMITS[q.dtype],
        *layout.sizes(),
        C=layout.C,
        SUB=layout.substeps,
        GATE=modes.gate,
        ERASE=modes.erase,
        UNTIED=modes.untied,
        NORM=l2norm,
        PACKED=layout.packed,
        **launch_settings("prepare", layout.K, layout.V, q.dtype, True),
    )
    return local


def _local(
    layout: _Layout,
    modes: _Modes,
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float,
    l2norm: bool,
    ab: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """What each chunk holds by itself: A and P, row and chunk decays, operands of the serial passes."""
    local = _prepare(layout, modes, q, k, beta, g, scale, l2norm, ab)
    if not modes.vector:
        local["rows"] = q.new_empty(layout.kept[1], dtype=torch.float32)
    local["matrices"] = q.new_empty(layout.kept[0])
    if modes.vector and modes.gate:
        hard_kernel[layout.rare()](
            q,
            k,
            beta,
            *(ab or (None, None)),
            g,
            local["rows"],
            local["decays"],
            local["matrices"],
            layout.cu,
            layout.table,
            scale,
            layout.chunks * layout.H,
            *layout.sizes(),
            C=layout.C,
            SUB=layout.substeps,
            GATE=modes.gate,
            ERASE=modes.erase,
            UNTIED=modes.untied,
            PACKED=layout.packed,
            **launch_settings("hard", layout.K, layout.V, q.dtype, True),
        )
    settings = launch_settings(
        "untied" if modes.untied else "local", layout.K, layout.V, q.dtype, modes.vector, layout.tma
    )
    erase, write, read = layout.operands(modes, *local["operands"], settings["BK"])
    local_kernel[(layout.chunks * layout.H,)](
        beta,
        g,
        local["rows"],
        local["decays"],
        layout.matrices(local["matrices"]),
        erase,
        write,
        read,
        layout.cu,
        layout.table,
        scale,
        LEAST[q.dtype],
        *layout.sizes(),
        C=layout.C,
        SUB=layout.substeps,
        GATE=modes.gate,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        NORM=l2norm,
        PACKED=layout.packed,
        EXACT=q.dtype == torch.float32,
        FINE=q.dtype == torch.float16,
        TMA=layout.tma,
        **settings,
    )
    return local


def _walk(
    layout: _Layout,
    modes: _Modes,
    local: dict[str, Any],
    v: Tensor,
    w: Tensor | None,
    S: Tensor | None,
    scale: float,
    parts: _Parts,
    *,
    o: Tensor | None = None,
    last: Tensor | None = None,
) -> None:
    """One serial pass over parts from their states ``S``: the reading and the final states, or (``S`` None) what each
    part adds to a state and by what it multiplies it."""
    kernel = "moves" if S is None else "written" if layout.tma and modes.write else "state"
    settings = launch_settings(kernel, layout.K, layout.V, v.dtype, modes.vector)
    BV = settings["BV"]
    width = layout.V + (layout.K if S is None else 0)
    state_kernel[(parts.count * layout.H * _cdiv(width, BV),)](
        *layout.operands(modes, *local["operands"], layout.K),
        *(x if S is None else layout.tokens_of(x, BV) for x in (v, w)),
        local["rows"],
        local["decays"],
        layout.matrices(local["matrices"]),
        S,
        last,
        layout.tokens_of(o, BV),
        None,
        None,
        parts.cu,
        parts.first,
        scale,
        layout.T,
        layout.tokens,
        parts.length,
        layout.H,
        layout.heads,
        layout.K,
        width,
        layout.V,
        C=layout.C,
        SUB=layout.substeps,
        GATE=modes.gate,
        W=modes.write,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        OUTPUT=o is not None,
        KEEP=False,
        LAST=last is not None,
        MOVES=S is None,
        PACKED=layout.packed,
        TMA=layout.tma,
        **settings,
    )


def _chain(
    layout: _Layout, parts: _Parts, start: Tensor, own: Tensor, moves: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """From part to part: the states that come to them, and the last of every sequence, from what each part adds and by
    what it multiplies."""
    states, last = start.new_empty(parts.count, *start.shape[1:]), torch.empty_like(start)
    BK, BV = _block(layout.K), min(32, _block(layout.V))
    chain_kernel[(layout.rows * layout.H * _cdiv(layout.V, BV),)](
        start,
        own,
        moves,
        states,
        last,
        parts.before,
        parts.each,
        layout.H,
        layout.K,
        layout.V,
        own.shape[-1],
        moves.shape[-1],
        BK=BK,
        BM=min(BK, 128),
        BV=BV,
        REVERSE=reverse,
        PACKED=layout.packed,
        EXACT=layout.dtype == torch.float32,
        FINE=layout.dtype == torch.float16,
        num_warps=4 if BK <= 128 else 8,
        num_stages=2,
    )
    return states, last


def _enter(
    layout: _Layout,
    modes: _Modes,
    local: dict[str, Any],
    v: Tensor,
    w: Tensor | None,
    S: Tensor,
    scale: float,
    parts: _Parts,
) -> tuple[Tensor, Tensor, Tensor]:
    """The states that enter the parts, the last of every sequence, and what each part adds to a state, beside by what
    it multiplies it, ``[parts, H, K, V + K]``."""
    moves = S.new_empty(parts.count, layout.H, layout.K, layout.V + layout.K)
    _walk(layout, modes, local, v, w, None, scale, parts, last=moves)
    return *_chain(layout, parts, S, moves, moves, False), moves


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
    length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Reading, final state, and when training what the backward pass needs of every chunk. The untied form has
    ``ab`` in place of ``beta``, and two substeps. ``length`` is that of the parts in which sequences are walked, in
    chunks, where it is not to be chosen."""
    q, k, v, S = (x.contiguous() for x in (q, k, v, S))
    beta, g, w = (None if x is None else x.contiguous() for x in (beta, g, w))
    ab = None if ab is None else (ab[0].contiguous(), ab[1].contiguous())
    modes = _Modes(beta, g, w)
    layout = _Layout(q, v, modes, substeps, cu_host, length)
    if q.is_cuda and not compiling():
        kinds = tuple(None if x is None else (x.dtype, x.dim() == 4) for x in (beta, g, w))
        sizes = layout.tokens, layout.K, layout.V, substeps
        _compile(q.device, q.dtype, kinds, sizes, l2norm, layout.packed, layout.parts is not None, training)
    local = _local(layout, modes, q, k, beta, g, scale, l2norm, ab)
    o = v.new_empty(layout.B, layout.T, layout.H, layout.V)
    if layout.parts is None:
        last = torch.empty_like(S)
        _walk(layout, modes, local, v, w, S, scale, layout.whole, o=o, last=last)
    else:
        entering, last, _ = _enter(layout, modes, local, v, w, S, scale, layout.parts)
        _walk(layout, modes, local, v, w, entering, scale, layout.parts, o=o)
    return (o, last, local["matrices"], local["rows"]) if training else (o, last, None, None)


@cache
def _compile(
    device: torch.device,
    dtype: torch.dtype,
    kinds: tuple[tuple[torch.dtype, bool] | None, ...],
    sizes: tuple[int, int, int, int],
    l2norm: bool,
    packed: bool,
    parts: bool,
    training: bool,
) -> None:
    """Compile the kernels of a call together, those of its backward pass too when training."""
    tokens, K, V, n = sizes
    T = 2 * tokens if parts else 1
    beta, g, w = (
        None if kind is None else torch.empty(1, R, 1, *([D] if kind[1] else []), dtype=kind[0], device=device)
        for kind, R, D in zip(kinds, (T * n, T, T * n), (K, K, V), strict=True)
    )
    ab = None if beta is not None else tuple(torch.empty(1, T, 1, K, dtype=dtype, device=device) for _ in range(2))
    R = T if beta is None else T * n  # the untied form has its substeps in the tokens' rows
    q, k, v = (torch.empty(1, r, 1, D, dtype=dtype, device=device) for r, D in ((T, K), (R, K), (R, V)))
    S, cu = torch.empty(1, 1, K, V, device=device), torch.tensor([0, T], dtype=torch.int32) if packed else None
    length = 1 if parts else 2

    def call() -> None:
        o, last, matrices, rows = forward(q, k, v, beta, g, w, S, cu, 1.0, l2norm, n, training, ab, length)
        if matrices is not None and rows is not None:
            backward(q, k, v, beta, g, w, S, matrices, rows, cu, 1.0, l2norm, n, o, last, ab, length)

    compile_together(call)


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
    out = following(S) if index is None else S
    o = v.new_empty(B, T, H, V)
    BV = _block(V)
    while BV > 32 or (BV > 8 and B * H * _cdiv(V, BV) < 256):  # enough programs to fill the memory's pipes
        BV //= 2
    kernels_step.step_kernel[(B * H * _cdiv(V, BV),)](
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
        BK=_block(K),
        BV=BV,
        SUB=substeps,
        GATE=modes.gate,
        ERASE=modes.erase,
        W=modes.write,
        UNTIED=modes.untied,
        NORM=l2norm,
        INDEX=index is not None,
        num_warps=2,
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
    length: int | None = None,
) -> dict[str, Tensor]:
    """Gradients by input name, from those of the reading and of the final state."""
    q, k, v, S, do, dS = (x.contiguous() for x in (q, k, v, S, do, dS))
    beta, g, w = (None if x is None else x.contiguous() for x in (beta, g, w))
    ab = None if ab is None else (ab[0].contiguous(), ab[1].contiguous())
    modes = _Modes(beta, g, w)
    layout = _Layout(q, v, modes, substeps, cu_host, length)
    H, K, V, C = layout.H, layout.K, layout.V, layout.C
    local = _prepare(layout, modes, q, k, beta, g, scale, l2norm, ab)
    if not modes.vector:
        local["rows"] = rows
    local["matrices"] = matrices

    entering, leaving = (q.new_empty(layout.chunks, H, V, K) for _ in range(2))
    R, L = q.new_empty(layout.chunks, H, V, C), torch.empty_like(v)
    dv = torch.empty_like(v) if modes.write or modes.untied else L
    settings = launch_settings("adjoint", K, V, v.dtype, modes.vector and not modes.untied)
    BV = settings["BV"]
    tiles = layout.operands(modes, *local["operands"], K)
    v_tiles, w_tiles, do_tiles = (layout.tokens_of(x, BV) for x in (v, w, do))
    matrix_tiles = layout.matrices(matrices)
    parts = layout.whole if layout.parts is None else layout.parts

    def walk_back(last: Tensor, start: Tensor, S: Tensor | None) -> None:
        """Gradients of the states, and, side by side, the states again from ``S``."""
        programs = parts.count * H * _cdiv(V, BV)
        adjoint_kernel[(programs * (1 if S is None else 2),)](
            0 if S is None else programs,
            *tiles,
            v_tiles,
            w_tiles,
            local["rows"],
            local["decays"],
            matrix_tiles,
            last if S is None else S,
            entering,
            R,
            do_tiles,
            last,
            start,
            leaving,
            L,
            dv if modes.untied else None,
            parts.cu,
            parts.first,
            scale,
            layout.T,
            layout.tokens,
            parts.length,
            H,
            layout.heads,
            K,
            V,
            C=C,
            SUB=substeps,
            GATE=modes.gate,
            W=modes.write,
            VECTOR=modes.vector,
            UNTIED=modes.untied,
            PACKED=layout.packed,
            TMA=layout.tma,
            **settings,
        )

    if layout.parts is None:
        dS0 = torch.empty_like(S)
        walk_back(dS, dS0, S)
    else:
        states, _, moves = _enter(layout, modes, local, v, w, S, scale, parts)
        own = torch.empty_like(states)
        walk_back(torch.zeros_like(states), own, states)
        states, dS0 = _chain(layout, parts, dS, own, moves, True)
        walk_back(states, own, None)
    dq, dk = q.new_empty(*q.shape[:2], H, K), k.new_empty(*k.shape[:2], H, K)
    a, b = ab or (None, None)
    wanted = {"beta": beta, "g": g, "w": w, "a": a, "b": b}
    grads = {"S": dS0, "v": dv} | {name: torch.empty_like(x) for name, x in wanted.items() if x is not None}
    # Of scalar gates, through descriptors, these lie where the gradients of queries and keys will.
    D1 = None if layout.tma and not modes.vector else q.new_empty(layout.chunks, H, C, C)
    D2 = D1 if modes.untied or D1 is None else torch.empty_like(D1)
    settings = launch_settings("gradient", K, V, v.dtype, modes.vector and not modes.untied, layout.tma)
    BK, BV = settings["BK"], settings["BV"]
    v_tiles, w_tiles, do_tiles, L_tiles, dv_tiles, dw_tiles = (
        layout.tokens_of(x, BV)
        for x in (v if modes.write else None, w, do, L, dv if modes.write else None, grads.get("w"))
    )
    if modes.untied:  # rows of the two alternate
        do_tiles, L_tiles = do, L
    gradient_kernel[(layout.chunks * H,)](
        v_tiles,
        g,
        w_tiles,
        local["rows"],
        local["decays"],
        *layout.operands(modes, *local["operands"], BK),
        None if modes.vector else k,
        None if modes.vector else q,
        do_tiles,
        *(layout.states(x, BV, width) for x, width in ((entering, BK), (R, C), (leaving, BK))),
        L_tiles,
        D1,
        D2,
        _below(C, v.dtype, v.device) if modes.vector and modes.gate else None,
        dq,
        dk,
        dv_tiles,
        dw_tiles,
        grads.get("beta"),
        grads.get("g"),
        layout.cu,
        layout.table,
        scale,
        *layout.sizes(),
        V,
        C=C,
        SUB=substeps,
        KEYS=_block(K),
        GATE=modes.gate,
        W=modes.write,
        VECTOR=modes.vector,
        UNTIED=modes.untied,
        NORM=l2norm,
        PACKED=layout.packed,
        TMA=layout.tma,
        **settings,
    )
    if modes.vector:
        del entering, leaving, R
        operands = local["operands"]
        flags = {
            "C": C,
            "SUB": substeps,
            "GATE": modes.gate,
            "ERASE": modes.erase,
            "UNTIED": modes.untied,
            "PACKED": layout.packed,
        }
        if modes.gate:
            hard_gradient_kernel[layout.rare()](
                q,
                k,
                beta,
                a,
                b,
                g,
                local["rows"],
                local["decays"],
                *operands,
                D1,
                D2,
                grads["g"],
                layout.cu,
                layout.table,
                scale,
                layout.chunks * H,
                *layout.sizes(),
                NORM=l2norm,
                **flags,
                **launch_settings("hard", K, V, v.dtype, True),
            )
        finish_kernel[(layout.chunks * H,)](
            q,
            k,
            beta,
            g,
            local["rows"],
            local["decays"],
            *operands,
            dq,
            dk,
            grads.get("beta"),
            grads.get("a"),
            grads.get("b"),
            layout.cu,
            layout.table,
            scale,
            *layout.sizes(),
            NORM=l2norm,
            **flags,
            **launch_settings("finish", K, V, v.dtype, True),
        )
    if layout.heads != H:
        dq, dk = (x.unflatten(2, (layout.heads, -1)).sum(3) for x in (dq, dk))
    return grads | {"q": dq, "k": dk}
