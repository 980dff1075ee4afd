"""The walks of the decay kernels over a call's sequences: their pieces and gates, states and sums of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core import chunk_table, uploaded
from ..core.compiling import Kernel
from ..core.tiles import has_tensor_memory, has_tma
from . import kernels, kernels_around, kernels_norm, kernels_pairs
from .settings import (
    EXACT,
    LIMITS,
    NUMBERS,
    ceil_div,
    chunk_length,
    launch_settings,
    pairs_stored,
    power_of_2,
    scale_apart,
)

__all__ = ["Call", "State", "line"]

pass_kernel, pairs_kernel = Kernel(kernels.pass_kernel), Kernel(kernels_pairs.pairs_kernel)
prepare_kernel, finish_kernel = Kernel(kernels_around.prepare_kernel), Kernel(kernels_around.finish_kernel)
sums_kernel, read_kernel = Kernel(kernels_around.sums_kernel), Kernel(kernels_around.read_kernel)
chain_kernel, keys_kernel = Kernel(kernels_around.chain_kernel), Kernel(kernels_norm.keys_kernel)
norm_kernel = Kernel(kernels_norm.norm_kernel)


class _Vector(NamedTuple):
    """A vector log-decay ``[B, T, H, D]`` with the sums over both halves of every chunk."""

    values: Tensor
    halves: Tensor


class _Scalar(NamedTuple):
    """A log-decay ``[H]`` when constant, else ``[B, T, H]`` with its sums within chunks."""

    values: Tensor
    seen: Tensor | None
    left: Tensor | None


class State(NamedTuple):
    """A matrix state with its running sum of keys, or such states of all pieces, the sums those of all chunks."""

    S: Tensor
    z: Tensor | None


def _rows(state: Tensor, rows: int) -> Tensor:
    """Uninitialised states of as many rows."""
    return state.new_empty(rows, *state.shape[1:])


def line(x: Tensor | None) -> Tensor | None:
    """One number a token and head, ``[B, T, H]``, laid out ``[H, tokens]``: a walk reads along a head."""
    return None if x is None else x.permute(2, 0, 1).contiguous().flatten(1)


class Call:
    """One call's sequences, pieces and gates, and the walks over them."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        g: Tensor | None,
        gv: Tensor | None,
        u: Tensor | None,
        cu_host: Tensor | None,
        scale: float,
        piece: int,
    ):
        self.B, self.T = q.shape[:2]
        self.H, self.K, self.V = v.shape[2], q.shape[3], v.shape[3]
        self.device, self.dtype = q.device, q.dtype
        self.piece, self.chunk = piece, chunk_length(q.dtype)
        self.scale = scale
        self.u = None if u is None else u.contiguous()
        self.packed = cu_host is not None
        self.tokens = self.B * self.T
        if cu_host is None:
            self.rows, self.per_row, self.longest = self.B, -(-self.T // piece), self.T
            self.pieces = self.rows * self.per_row
            self.cu = self.table = self.first = None
        else:
            lengths = cu_host.diff()
            self.rows, self.per_row, self.longest = len(lengths), 0, int(lengths.max())
            self.table = chunk_table(cu_host, piece, q.device)
            self.pieces = len(self.table)
            counts = torch.zeros(len(cu_host), dtype=torch.int32, device="cpu")
            counts[1:] = (-(-lengths // piece)).cumsum(0)
            self.cu, self.first = uploaded(cu_host, q.device), uploaded(counts, q.device)
        self.slow: Tensor | None = None
        self.descriptors: dict[tuple[int, ...], tuple[Tensor, TensorDescriptor]] = {}
        self.gate = self._scalar(g) if g is not None and g.dim() == 3 else None
        chunks = self.pieces * (piece // self.chunk)
        self.key, self.value = (
            None
            if x is None
            else _Vector(x.contiguous(), x.new_empty(chunks, self.H, 2, x.shape[-1], dtype=torch.float32))
            for x in (g if g is not None and g.dim() == 4 else None, gv)
        )
        if self.key is not None or self.value is not None:
            self.slow = torch.zeros(chunks, self.H, dtype=torch.int8, device=q.device)
        self.tma = q.dtype != torch.float32 and has_tma(q.device)
        scalar = self.key is None and self.value is None and u is None
        self.stored = scalar and pairs_stored(self.K, self.V, q.dtype)
        self.decided = False
        if self.key is not None and self.value is not None:  # a chunk is walked token by token for either gate
            for gate in (self.key, self.value):
                self._prepare(gate, None, gate.values, None, None, None, None, slow=1)
            self.decided = True

    def _scalar(self, g: Tensor) -> _Scalar:
        if all(g.stride(i) == 0 or g.shape[i] == 1 for i in (0, 1)):  # constant over batch and time: it came expanded
            return _Scalar(g[0, 0].contiguous(), None, None)
        g = g.contiguous()
        seen, left = (torch.empty(self.H, self.tokens, dtype=torch.float32, device=g.device) for _ in range(2))
        sums_kernel[(self.pieces * self.H,)](
            g,
            seen,
            left,
            self.cu,
            self.table,
            self.T,
            self.tokens,
            self.piece,
            self.H,
            LENGTH=power_of_2(self.piece),
            C=self.chunk,
            PACKED=self.packed,
        )
        return _Scalar(g, seen, left)

    def tile(self, t: Tensor | None, width: int, tma: bool) -> Any:
        """What moves tiles of so many channels of a tensor ``[B, T, heads, D]``: a descriptor for the copy engine, or
        the tensor itself. Of a copy where it does not lie as that needs it; what a pass writes is new, and does."""
        if t is None or not tma:
            return t
        return self._described(t, self.tokens, self.chunk, width)

    def _described(self, t: Tensor, rows: int, *block: int) -> TensorDescriptor:
        """A descriptor of a tensor as so many rows; making it takes long beside a launch, so passes share theirs."""
        made = self.descriptors.get((id(t), *block))
        if made is None:
            aligned = t.clone() if t.data_ptr() % 16 else t
            made = t, TensorDescriptor.from_tensor(aligned.view(rows, -1), list(block))  # t, whose id is the key, lives
            self.descriptors[id(t), *block] = made
        return made[1]

    def line(self, t: Tensor | None, tma: bool) -> Any:
        """What moves the numbers of a chunk's tokens of a line; see :meth:`tile`."""
        return t if t is None or not tma else self._described(t, self.H, 1, self.chunk)

    def pair(
        self,
        q: Tensor,
        k: Tensor,
        late: Tensor | None,
        early: Tensor | None,
        *,
        do: Tensor | None = None,
        v: Tensor | None = None,
        dx: Tensor | None = None,
        row: Tensor | None = None,
        col: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weights ``[B, T, H, C]`` of the pairs within chunks where passes read them, and with ``do`` those of the
        gradients; see :func:`pairs_kernel`."""
        if not self.stored:
            return None, None
        pairs = q.new_empty(self.B, self.T, self.H, self.chunk)
        d_pairs = None if do is None else pairs.new_empty(pairs.shape)
        BK, BV = (min(64, max(16, power_of_2(D))) for D in (self.K, self.V))
        full = self.K % BK == 0 and self.V % BV == 0
        tma, gate = self.tma and full, self.gate
        pairs_kernel[(self.pieces * (self.piece // self.chunk) * self.H,)](
            *(self.tile(t, BK, tma) for t in (q, k)),
            *(self.tile(t, BV, tma) for t in (do, v)),
            None if gate is None else gate.values,
            None if gate is None else gate.seen,
            late,
            early,
            dx,
            pairs,
            d_pairs,
            row,
            col,
            self.cu,
            self.table,
            self.scale,
            self.T,
            self.tokens,
            self.piece,
            self.H,
            q.shape[2],
            self.K,
            self.V,
            BK=BK,
            BV=BV,
            C=self.chunk,
            GATE=0 if gate is None else 1 if gate.seen is None else 2,
            FULL=full,
            PACKED=self.packed,
            TMA=tma,
        )
        return pairs, d_pairs

    def _prepare(
        self,
        gate: _Vector | None,
        late: Tensor | None,
        early: Tensor,
        late_out: Tensor | None,
        early_out: Tensor | None,
        own: Tensor | None,
        u: Tensor | None,
        slow: int,
    ) -> None:
        D = early.shape[-1]
        wide = max(16, power_of_2(D))
        chunks = self.pieces * (self.piece // self.chunk)
        prepare_kernel[(chunks * self.H,)](
            late,
            early,
            None if gate is None else gate.values,
            u,
            late_out,
            early_out,
            own,
            None if gate is None else gate.halves,
            self.slow,
            self.cu,
            self.table,
            LIMITS[self.dtype],
            self.T,
            self.piece,
            self.H,
            early.shape[2],
            D,
            BD=wide,
            ROWS=min(NUMBERS // wide, self.chunk // 2),
            C=self.chunk,
            GATED=gate is not None,
            BONUS=self.u is not None,
            OWN=own is not None,
            SLOW=slow,
            PACKED=self.packed,
            num_warps=1,
            num_stages=1,
        )

    def prepare(
        self, gate: _Vector | None, late: Tensor | None, early: Tensor, *, u: Tensor | None = None, own: bool = False
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Late and early tokens with the factors of their vector gate, one head a head of the gate; with ``own`` also
        the weight of each token's own pair."""
        weight = early.new_empty(self.B, self.T, self.H, dtype=torch.float32) if own else None
        if gate is None:
            if own:
                self._prepare(None, late, early, None, None, weight, u, slow=0)
            return late, early, weight
        early_out = early.new_empty(self.B, self.T, self.H, early.shape[-1])
        late_out = None if late is None else early_out.new_empty(early_out.shape)
        self._prepare(gate, late, early, late_out, early_out, weight, u, slow=2 if self.decided else 0)
        return late_out, early_out, weight

    def finish(
        self,
        gate: _Vector | None,
        late: Tensor,
        early: Tensor,
        d_late: Tensor,
        d_early: Tensor,
        d_early_out: Tensor,
        own: Tensor,
        *,
        by_key: bool,
        sides: tuple[Tensor | None, ...],
        dg: Tensor | None,
        du: Tensor | None,
    ) -> None:
        """Turn the passes' gradients into those of the tokens, in place or to ``d_early_out``, and gather those
        of gate and bonus."""
        D, E = early.shape[-1], self.V if by_key else self.K
        wide = min(64, max(16, power_of_2(D)))
        finish_kernel[(self.pieces * self.H * ceil_div(D, wide),)](
            late,
            early,
            None if gate is None else gate.values,
            self.u if by_key else None,
            d_late,
            d_early,
            d_early_out,
            own,
            None if gate is None else gate.halves,
            self.slow,
            *sides,
            dg,
            du,
            self.cu,
            self.table,
            self.scale,
            self.T,
            self.piece,
            self.H,
            early.shape[2],
            D,
            E,
            self.V if by_key else 1,
            1 if by_key else self.V,
            BD=wide,
            BE=32,
            ROWS=min(NUMBERS // wide, self.chunk),
            C=self.chunk,
            GATED=gate is not None,
            BONUS=self.u is not None,
            GRAD=dg is not None or du is not None,
            LATE=by_key,
            NORM=by_key and sides[3] is not None,
            PACKED=self.packed,
            num_warps=1,
            num_stages=1,
        )

    def read(self, gate: _Vector, o: Tensor, v: Tensor, own: Tensor | None) -> None:
        """Turn the pass's reading under a value gate into the reading, in place."""
        chunks, D = gate.halves.shape[0], o.shape[-1]
        read_kernel[(chunks * self.H,)](
            o,
            v,
            own,
            gate.values,
            gate.halves,
            self.slow,
            self.cu,
            self.table,
            self.scale,
            self.T,
            self.piece,
            self.H,
            D,
            BD=max(16, power_of_2(D)),
            C=self.chunk,
            PACKED=self.packed,
            num_warps=4 if D <= 128 else 8,
        )

    def splits(self, DP: int) -> bool:
        """Whether to walk a payload of so many channels in pieces rather than whole sequences: when whole ones would
        leave the GPU half empty, or a single long one would keep it waiting."""
        settings = launch_settings(self.K, DP, self.chunk, self.dtype, False, self.stored)
        programs = self.rows * self.H * ceil_div(DP, settings["BP"])
        uneven = self.packed and self.longest * self.rows > 2 * self.T
        return self.longest > self.piece and (programs < 96 or (uneven and programs < 1024))

    def walk(
        self,
        reader: Tensor,
        writer: Tensor,
        payload: Tensor,
        *,
        transposed: bool = False,
        reverse: bool = False,
        split: bool,
        start: Tensor | None = None,
        z: Tensor | None = None,
        pairs: Tensor | None = None,
        out: Tensor | None = None,
        wr: Tensor | None = None,
        ws: Tensor | None = None,
        edges: Tensor | None = None,
        last: Tensor | None = None,
        totals: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        diag: int = 0,
        own: Tensor | None = None,
        norm: int = 0,
        x: Tensor | None = None,
        grad: int = 0,
        dot: Tensor | None = None,
        row: Tensor | None = None,
        col: Tensor | None = None,
        beside: Tensor | None = None,
        turned: Tensor | None = None,
    ) -> None:
        """Launch one pass; see the kernels' docstring. ``transposed`` says that the key's channels are the payload's:
        states in memory are ``[DP, DR]``. Where ``turned`` is given, ``beside`` reads the transposed state into it."""
        DR, DP = writer.shape[-1], payload.shape[-1]
        side_r, side_p = (self.value, self.key) if transposed else (self.key, self.value)
        plain = norm == 0 and all(x is None for x in (self.gate, side_r, side_p, self.u, wr, ws))
        settings = launch_settings(DR, DP, self.chunk, self.dtype, split, self.stored, plain, turned is not None)
        grid = ((self.pieces if split else self.rows) * self.H * ceil_div(DP, settings["BP"]),)
        gate = self.gate
        heads = [self.H if t is None else t.shape[2] for t in (reader, writer, payload, dot, beside)]
        BR, BP = settings["BR"], settings["BP"]
        full_r, full_p = BR == DR, DP % BP == 0
        tma = self.tma and full_r
        ragged = self.packed or self.T % self.chunk != 0
        # Where products alone change a state that lies in tensor memory, Triton 3.6 pipelines their sum and then fails
        # on a store by descriptor.
        described = gate is not None or side_r is not None or side_p is not None or not has_tensor_memory(self.device)
        stores = [t if described and t is not None and t.dtype == self.dtype else None for t in (out, turned)]
        # Measured on Hopper: a scalar gate's passes over 128 channels are slower so, but for those with tiles or lines
        # that enter no product of matrices, and for readings that are divided where no state is kept on the way.
        ahead = DR != 128 or side_r is not None or grad >= 2 or norm == 2 or (norm == 1 and edges is None)
        unscaled = reverse and norm == 0 and grad != 2 and self.slow is None
        unscaled = unscaled and self.scale != 0 and scale_apart(self.dtype)
        # Whole chunks, whose lines then start at a multiple of 16 bytes; single tokens are read by address. Each copy
        # would be waited for where nothing is fetched ahead.
        lines = tma and not ragged and self.slow is None and settings["num_stages"] > 1
        seen, left = (None, None) if gate is None else (gate.seen, gate.left)
        pass_kernel[grid](
            *(self.tile(t, BR, tma) for t in (reader, writer)),
            self.tile(payload, BP, tma and full_p),
            self.tile(pairs, self.chunk, tma and not ragged),
            self.tile(stores[0], BP, tma and full_p),
            self.tile(dot, BP, tma and full_p),
            self.tile(beside, BP, tma and full_p),
            self.tile(stores[1], BR, tma),
            reader,
            writer,
            payload,
            out,
            dot,
            turned,
            None if gate is None else gate.values,
            self.line(seen, lines),
            seen,
            self.line(left, lines),
            None if side_r is None else side_r.values,
            None if side_p is None else side_p.values,
            None if side_r is None else side_r.halves,
            None if side_p is None else side_p.halves,
            self.slow,
            own,
            self.line(wr, lines),
            self.line(ws, lines),
            start,
            edges,
            last,
            self._described(z, z[..., 0].numel(), 1, BP) if z is not None and lines and full_p else z,
            z,
            *totals,
            self.line(x, lines),
            row,
            col,
            self.cu,
            self.table if split else self.first,
            self.scale,
            self.T,
            self.piece,
            self.tokens,
            self.H,
            *heads,
            DR,
            DP,
            1 if transposed else DP,
            DR if transposed else 1,
            WINDOW=32,
            REVERSE=reverse,
            UNSCALED=unscaled,
            GATE=0 if gate is None else 1 if gate.seen is None else 2,
            HALF_R=side_r is not None,
            HALF_P=side_p is not None,
            BONUS=self.u is not None,
            DIAG=diag,
            OWN=diag == 1 and own is not None,
            WR=wr is not None,
            WS=ws is not None,
            NORM=norm,
            START=start is not None,
            SPLIT=split,
            STATE_ONLY=out is None,
            EDGES=edges is not None,
            LAST=last is not None,
            PACKED=self.packed,
            GRAD=grad,
            BOTH=turned is not None,
            EXACT=self.dtype == EXACT,
            FULL_R=full_r,
            FULL_P=full_p,
            RAGGED=ragged,
            TMA=tma,
            LINES=lines,
            AHEAD=settings["num_stages"] if ahead else None,
            **settings,
        )

    def chain(
        self,
        writer: Tensor,
        payload: Tensor,
        ws: Tensor | None,
        start: Tensor,
        pieces: int,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Boundary states of every piece and the final state, from the pieces' own writes."""
        own = _rows(start, pieces)
        totals = (
            start.new_empty(pieces, self.H) if self.gate is not None else None,
            *(
                None if x is None else start.new_empty(pieces, self.H, x.values.shape[-1])
                for x in (self.key, self.value)
            ),
        )
        # The writer stands in for the reader: nothing is read.
        self.walk(writer, writer, payload, reverse=reverse, split=True, ws=ws, last=own, totals=totals)
        return self._link(start, own, totals, reverse)

    def _link(
        self,
        start: Tensor,
        own: Tensor,
        totals: tuple[Tensor | None, Tensor | None, Tensor | None],
        reverse: bool,
        each: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Boundary states of every piece, or of ``each`` chunks of it, and the final state, from their own writes and
        summed gates."""
        # Forward, the states after the sequences may follow.
        edges, last = _rows(own, len(own) + (0 if reverse else self.rows)), _rows(start, self.rows)
        R, P, block = start.shape[2], start[0, 0, 0].numel(), 64 if each == 1 else 16
        chain_kernel[(self.rows * self.H * ceil_div(R * P, block),)](
            start,
            own,
            *totals,
            edges,
            last,
            self.first,
            self.per_row,
            each,
            self.H,
            R,
            P,
            BLOCK=block,
            GROUP=NUMBERS // block,
            REVERSE=reverse,
            PACKED=self.packed,
            num_warps=1,
        )
        return edges, last

    def _walk_keys(
        self,
        keys: Tensor,
        w: Tensor | None,
        *,
        reverse: bool = False,
        own: Tensor | None = None,
        total: Tensor | None = None,
        q: Tensor | None = None,
        start: Tensor | None = None,
        x: Tensor | None = None,
        over: Tensor | None = None,
        floor: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Launch the walk of the running sum of keys, which fills ``own`` and ``total``, or, where ``x`` is given, is
        read from ``start`` on; see :func:`keys_kernel`."""
        read, K = x is not None, keys.shape[-1]
        wide = max(16, power_of_2(K) if read else min(32, power_of_2(K)))
        gate = self.gate if self.key is None else self.key
        chunks = self.pieces * (self.piece // self.chunk)
        keys_kernel[(chunks * self.H * ceil_div(K, wide),)](
            q,
            keys,
            None if gate is None else gate.values,
            self.u,
            w,
            start,
            x,
            over,
            floor,
            own,
            total,
            self.cu,
            self.table,
            self.scale,
            eps,
            self.T,
            self.tokens,
            self.piece,
            self.H,
            keys.shape[2],
            K,
            BK=wide,
            ROWS=min(NUMBERS // wide, self.chunk),
            C=self.chunk,
            GATE=0 if gate is None else 3 if self.key is not None else 1 if gate.seen is None else 2,  # type: ignore
            READ=read,
            REVERSE=reverse,
            BONUS=self.u is not None,
            PACKED=self.packed,
            num_warps=1,
            num_stages=1,
        )

    def sum_keys(
        self, keys: Tensor, w: Tensor | None, start: Tensor, pieces: int, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The running sum of keys ``[., H, K]`` at the boundaries of the chunks of all pieces, and the final one; or,
        backward in time, its gradient, from the queries and what ``w`` holds for each."""
        each = self.piece // self.chunk
        own = _rows(start, pieces * each)
        scalar, vector = self.gate is not None, self.key is not None
        total = None if not (scalar or vector) else own.new_empty(own.shape if vector else own.shape[:2])
        self._walk_keys(keys, w, reverse=reverse, own=own, total=total)
        return self._link(start, own, (total if scalar else None, total if vector else None, None), reverse, each)

    def normaliser(
        self, q: Tensor, k: Tensor, w: Tensor | None, z: Tensor, floor: Tensor | None, eps: float, pieces: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normaliser and what a reading is multiplied by, ``[H, tokens]``, and the running sum of keys at the
        boundaries of the chunks of all pieces and after the last token."""
        x, over = (z.new_empty(self.H, self.tokens) for _ in range(2))
        bounds, last = self.sum_keys(k, w, z, pieces)
        self._walk_keys(k, w, q=q, start=bounds, x=x, over=over, floor=floor, eps=eps)
        return x, over, bounds, last

    def divide(
        self,
        x: Tensor,
        floor: Tensor | None,
        eps: float,
        inverse: Tensor,
        dx: Tensor | None,
        weighted: Tensor | None,
        do: Tensor | None = None,
        o: Tensor | None = None,
        part: Tensor | None = None,
    ) -> None:
        """The inverse of the denominator and, from the readings and their gradients or from blocks of channels of their
        products, the gradient of the normaliser; see :func:`norm_kernel`."""
        rows, V = (256, 16) if do is None else (32, self.V)
        norm_kernel[(ceil_div(self.tokens, rows) * self.H,)](
            do,
            o,
            part,
            x,
            floor,
            inverse,
            dx,
            weighted,
            eps,
            self.tokens,
            self.H,
            V,
            0 if part is None else len(part),
            ROWS=rows,
            BV=min(128, max(16, power_of_2(V))),
        )

    def read_along(
        self,
        reader: Tensor,
        writer: Tensor,
        payload: Tensor,
        start: Tensor,
        pieces: int,
        *,
        keep: bool = True,
        reverse: bool = False,
        ws: Tensor | None = None,
        **read: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """Walk every sequence from its start, whole or in pieces: boundary states (where kept) and the final state.
        Without ``out`` nothing is read."""
        if self.splits(start.shape[3]):
            edges, last = self.chain(writer, payload, ws, start, pieces, reverse)
            if read.get("out") is not None:
                self.walk(reader, writer, payload, split=True, start=edges, reverse=reverse, ws=ws, **read)
            return edges, last
        last, kept = _rows(start, self.rows), _rows(start, pieces + (0 if reverse else self.rows)) if keep else None
        ends: dict[str, Any] = {"start": start, "edges": kept, "last": last}
        self.walk(reader, writer, payload, split=False, reverse=reverse, ws=ws, **ends, **read)
        return kept, last
