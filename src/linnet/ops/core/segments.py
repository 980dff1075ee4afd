"""Packing: several sequences of different length laid end to end in one row ``[1, total, ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import index

import torch
from torch import Tensor

__all__ = ["Segments"]


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the sequences of a packed row ``[1, total, ...]`` begin and end.

    Build it once per batch with :meth:`from_lengths`, :meth:`from_cu_seqlens` or :meth:`from_document_ids` and pass
    it to every op and mixer: each sequence then starts from its own state row, and nothing leaks between them.
    Everything a kernel or the host needs is stored twice, on the device and on the host, so that no later call
    has to synchronise.

    Attributes:
        cu_seqlens: int32 ``[N + 1]`` on the device, cumulative lengths from 0 to ``total``.
        cu_seqlens_host: the same on the CPU.
        ids: int32 ``[total]`` on the device, the sequence each token belongs to.
        max_len: length of the longest sequence.
    """

    cu_seqlens: Tensor
    cu_seqlens_host: Tensor
    ids: Tensor
    max_len: int
    total: int = field(default=0)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Segments:
        """From the length of each sequence. A length of 0 is legal: such a state row passes through unchanged."""
        if isinstance(lengths, Tensor):
            device = lengths.device if device is None else device
            lengths = lengths.tolist()
        try:
            whole = [index(n) for n in lengths]
        except TypeError as error:
            raise ValueError(f"lengths: expected a list or 1-D tensor of whole numbers, got {lengths!r}") from error
        # The host's part says so: a caller may have set another default device.
        sizes = torch.tensor(whole, dtype=torch.int64, device="cpu")
        if sizes.numel() == 0 or int(sizes.min()) < 0:
            raise ValueError(f"lengths: expected at least one length, none negative, got {whole[:8]}")
        host = torch.zeros(sizes.numel() + 1, dtype=torch.int32, device="cpu")
        host[1:] = sizes.cumsum(0)
        ids = torch.repeat_interleave(torch.arange(sizes.numel(), dtype=torch.int32, device="cpu"), sizes)
        device = torch.device("cpu") if device is None else torch.device(device)
        return cls(host.to(device), host, ids.to(device), int(sizes.max()), int(host[-1]))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Segments:
        """From cumulative lengths ``[N + 1]`` that start at 0 and never fall."""
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point():
            got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise ValueError(f"cu_seqlens: expected a tensor of integers [N+1], got {got}")
        host = cu_seqlens.detach().to("cpu", torch.int64)
        if host.dim() != 1 or host.numel() < 2 or int(host[0]) != 0 or bool((host.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected a 1-D tensor [N+1] that starts at 0 and never falls, got {host.tolist()[:8]}"
                f" of shape {list(host.shape)}"
            )
        return cls.from_lengths(host.diff().tolist(), cu_seqlens.device)

    @classmethod
    def from_document_ids(cls, ids: Tensor) -> Segments:
        """From a document id per token, ``[total]`` or ``[B, T]``: a new sequence starts wherever the id changes, and
        at every row (rows are laid end to end, so pass activations reshaped to ``[1, B*T, ...]``)."""
        if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.numel() == 0:
            got = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids: expected a non-empty tensor [total] or [B, T], got {got}")
        rows = ids.detach().to("cpu").reshape(-1, ids.shape[-1])
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
        at = starts.flatten().nonzero().flatten()
        ends = torch.cat([at[1:], at.new_tensor([rows.numel()])])
        return cls.from_lengths((ends - at).tolist(), ids.device)

    def __len__(self) -> int:
        return self.cu_seqlens_host.shape[0] - 1

    @property
    def lengths(self) -> list[int]:
        """Length of each sequence (host)."""
        return self.cu_seqlens_host.diff().tolist()

    @property
    def positions(self) -> Tensor:
        """int64 ``[total]``: position of each token in its own sequence."""
        starts = self.cu_seqlens[:-1].index_select(0, self.ids)
        return torch.arange(self.total, device=self.ids.device) - starts

    def to(self, device: torch.device | str) -> Segments:
        """The same segments with the device tensors moved."""
        return Segments(self.cu_seqlens.to(device), self.cu_seqlens_host, self.ids.to(device), self.max_len, self.total)


@lru_cache(maxsize=64)
def _chunk_table(bounds: tuple[int, ...], chunk: int, device: str) -> Tensor:
    rows = [(n, c) for n, (a, b) in enumerate(pairwise(bounds)) for c in range(-(-(b - a) // chunk))]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 2).to(device)


def chunk_table(cu_seqlens_host: Tensor, chunk: int, device: torch.device | str) -> Tensor:
    """int32 ``[chunks, 2]``: (sequence, chunk within it) of every chunk of a packed row; no chunk spans a boundary.

    Cached by content, so a refilled ``cu_seqlens`` buffer never meets a stale table.
    """
    return _chunk_table(tuple(cu_seqlens_host.tolist()), chunk, str(device))


@lru_cache(maxsize=64)
def _uploaded(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def uploaded(host: Tensor, device: torch.device | str) -> Tensor:
    """A short list of integers on the device, int32, to be read only. Cached by content: an upload in each call would
    wait for the device, and hold up the host behind everything that is queued."""
    return _uploaded(tuple(host.tolist()), str(device))
