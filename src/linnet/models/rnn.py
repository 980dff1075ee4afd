"""The recurrent modules of ``torch.nn`` on the cell engine: same arguments, parameters and results, and heads."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from linnet.ops import CellState, Segments, cell

from .encoder import reverse

__all__ = ["GRU", "LSTM", "RNN"]


class _Recurrent(nn.Module):
    """What the three have in common; their parameters have the names and shapes of ``torch.nn``."""

    kind: str  # of cell of :func:`linnet.ops.cell`
    gates = 1
    has_cell = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        heads: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "heads": heads}
        for name, size, least in (*((*pair, 1) for pair in sizes.items()), ("proj_size", proj_size, 0)):
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {size!r}")
        if hidden_size % heads:
            raise ValueError(f"heads: expected a divisor of hidden_size = {hidden_size}, got {heads}")
        if proj_size and (heads > 1 or proj_size >= hidden_size):
            limits = f"less than hidden_size = {hidden_size} and heads = 1"
            raise ValueError(f"proj_size: expected {limits}, got {proj_size} and heads = {heads}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability, got {dropout!r}")
        for name, flag in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: expected true or false, got {flag!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self.proj_size, self.heads = proj_size, heads
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        out, rows = proj_size or hidden_size, self.gates * hidden_size
        for layer, suffix in self._parts():
            size = input_size if layer == 0 else out * (1 + bidirectional)
            shapes = {"weight_ih": (rows, size), "weight_hh": (rows, proj_size or hidden_size // heads)}
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}
            shapes |= {"weight_hr": (proj_size, hidden_size)} if proj_size else {}
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_l{layer}{suffix}", nn.Parameter(torch.empty(shape, **new)))
        self.reset_parameters()

    def _parts(self) -> list[tuple[int, str]]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(layer, suffix) for layer in range(self.num_layers) for suffix in directions]

    def reset_parameters(self) -> None:
        """Everything uniform within 1 / sqrt(hidden_size), as in ``torch.nn``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing to do: the weights need no particular place in memory."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As in ``torch.nn``: ``output, h_n`` (LSTM: ``output, (h_n, c_n)``) from ``[T, B, input_size]``
        (``[B, T, ...]`` with ``batch_first``), ``[T, input_size]`` or a PackedSequence."""
        order: Tensor | None = None
        if isinstance(input, PackedSequence):
            rows, segments, x = self._from_packed(input)
            batched, order = True, input.sorted_indices
        else:
            if not isinstance(input, Tensor) or input.dim() not in (2, 3):
                got = f"shape {list(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
                raise ValueError(f"input: expected a tensor of 2 or 3 axes or a PackedSequence, got {got}")
            segments, rows, batched = None, None, input.dim() == 3
            x = input if batched else input[None]
            x = x if self.batch_first or not batched else x.transpose(0, 1)
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input: expected input_size={self.input_size} features, got {x.shape[-1]}")
        if not x.is_floating_point():
            raise ValueError(f"input: expected a floating dtype, got {x.dtype}")
        count = x.shape[0] if segments is None else len(segments)
        starts = self._initial(hx, count, batched, order)
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            sides = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                start = None if starts is None else tuple(s[len(ends)] for s in starts)
                y = reverse(x, segments) if suffix else x
                y, end = self._run(y, f"l{layer}{suffix}", start, segments)
                sides.append(reverse(y, segments) if suffix else y)
                ends.append(end)
            x = torch.cat(sides, -1)
        last = tuple(torch.stack(part).to(x.dtype) for part in zip(*ends, strict=True))
        if isinstance(input, PackedSequence):
            y = torch.empty_like(x[0]).index_copy(0, rows, x[0])  # type: ignore[arg-type]
            output: Any = PackedSequence(y, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            if input.unsorted_indices is not None:
                last = tuple(s.index_select(1, input.unsorted_indices) for s in last)
        else:
            output = x if self.batch_first or not batched else x.transpose(0, 1)
            if not batched:
                output, last = output[0], tuple(s[:, 0] for s in last)
        return output, last if self.has_cell else last[0]

    @staticmethod
    def _from_packed(packed: PackedSequence) -> tuple[Tensor, Segments, Tensor]:
        """Places in ``packed.data`` (ordered by time) of the tokens in order of sequence, the sequences, the tokens."""
        sizes = packed.batch_sizes
        begin = sizes.cumsum(0) - sizes
        sequence = torch.arange(int(sizes[0]), device="cpu")[:, None]  # where sizes are, whatever the default device
        running = sequence < sizes[None, :]  # [sequences, positions]
        rows = (begin[None, :] + sequence)[running].to(packed.data.device)
        segments = Segments.from_lengths(running.sum(1).tolist(), packed.data.device)
        return rows, segments, packed.data.index_select(0, rows)[None]

    def _initial(self, hx: Any, count: int, batched: bool, order: Tensor | None) -> tuple[Tensor, ...] | None:
        """The initial states ``[num_layers * directions, count, size]``, checked."""
        if hx is None:
            return None
        parts = tuple(hx) if self.has_cell else (hx,)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + self.has_cell]
        if len(parts) != len(sizes) or not all(isinstance(s, Tensor) for s in parts):
            raise ValueError(f"hx: expected {'(h_0, c_0)' if self.has_cell else 'h_0'}, got {type(hx).__name__}")
        parts = tuple(s if batched else s[:, None] for s in parts)
        for part, size in zip(parts, sizes, strict=True):
            want = [len(self._parts()), count, size]
            if list(part.shape) != want:
                raise ValueError(f"hx: expected shape {want if batched else [want[0], size]}, got {list(part.shape)}")
        return parts if order is None else tuple(s.index_select(1, order) for s in parts)

    def _run(
        self, x: Tensor, name: str, start: tuple[Tensor, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: its output and its last states ``[rows, size]``."""
        G, H, D = self.gates, self.heads, self.hidden_size // self.heads
        weight_ih, weight_hh = getattr(self, f"weight_ih_{name}"), getattr(self, f"weight_hh_{name}")
        b_ih = b = None
        if self.bias:  # from gate, head, unit to head, gate, unit
            b_ih, b = (
                getattr(self, f"bias_{side}_{name}").view(G, H, D).transpose(0, 1).reshape(H, -1)
                for side in ("ih", "hh")
            )
        w = weight_ih.view(G, H, D, -1).transpose(0, 1).reshape(G * self.hidden_size, -1)
        a = F.linear(x, w, None if b_ih is None else b_ih.flatten()).unflatten(-1, (H, -1))
        R = weight_hh.view(G, H, D, -1).permute(1, 3, 0, 2).flatten(2)
        rows = x.shape[0] if segments is None else len(segments)
        project = getattr(self, f"weight_hr_{name}") if self.proj_size else None
        state = None
        if start is not None:
            h = start[0]
            if project is not None:  # what is fed back at the first token is given; from then on it is projected
                first = h.to(R.dtype) @ R[0]
                if segments is None:
                    a = torch.cat([a[:, :1] + first[:, None, None], a[:, 1:]], 1)
                else:
                    full = segments.cu_seqlens.diff() > 0
                    a = a.index_add(1, segments.cu_seqlens[:-1][full].long(), first[full][None, :, None].to(a.dtype))
                h = first.new_zeros(rows, self.hidden_size)
            parts = (h, *start[1:])
            state = CellState(*(s.reshape(rows, H, D) for s in parts))
        if project is not None:  # h_t = W_hr h_full: the product with it, once for all tokens
            R = (project.T @ R[0])[None]
        y, last = cell(a, R.to(a.dtype), b, kind=self.kind, state=state, segments=segments)
        y, ends = y.flatten(2), [s.flatten(1) for s in last[:2] if s is not None]
        if project is not None:
            y, ends[0] = F.linear(y, project), F.linear(ends[0].to(project.dtype), project)
        return y, tuple(ends)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, heads={self.heads}"


class RNN(_Recurrent):
    """``torch.nn.RNN`` on the cell engine.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional: as there.
        device, dtype: of the parameters.
        heads: units in so many independent groups; 1 is the module of ``torch.nn``, whose state dict fits. With more,
            the recurrent weights are block-diagonal, stored as ``[gates * hidden_size, hidden_size / heads]``.

    Raises:
        ValueError: naming the argument, for options out of range and inputs of the wrong shape.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
    ):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, heads, device, dtype
        )
        self.kind = self.nonlinearity = nonlinearity


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` on the cell engine.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size: as there.
        device, dtype: of the parameters.
        heads: units in so many independent groups, as in :class:`RNN`; not with ``proj_size``.

    Raises:
        ValueError: naming the argument, for options out of range and inputs of the wrong shape.
    """

    kind = "lstm"
    gates = 4
    has_cell = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
    ):
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            heads,
            device,
            dtype,
        )


class GRU(_Recurrent):
    """``torch.nn.GRU`` on the cell engine.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as there.
        device, dtype: of the parameters.
        heads: units in so many independent groups, as in :class:`RNN`.

    Raises:
        ValueError: naming the argument, for options out of range and inputs of the wrong shape.
    """

    kind = "gru"
    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
    ):
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, heads, device, dtype
        )
