"""Text as batches for language modelling: a pure function of the step, so that a run can stop and go on anywhere.

All documents lie end to end in one array, an end-of-document token before, between and after them. Token ``i`` is an
input and token ``i + 1`` its target. Two ways to make rows of it:

- ``"concatenate"``: windows of ``context`` tokens, wherever they fall; rows ``[B, context]``. Every epoch shifts the
  windows by a random amount and shuffles them.
- ``"documents"``: documents of any length, cut where they exceed ``context``, shuffled and packed into one row
  ``[1, tokens]`` with :class:`linnet.Segments`; each starts from an empty state.

In both, each target follows its input in the same document: labels never cross documents.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linnet.ops import Segments
from linnet.ops.core import check_choice

from .corpus import Corpus
from .tokenizers import Tokenizer

__all__ = ["Batch", "TextData"]

PACKINGS = ("concatenate", "documents")


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        tokens: int64 ``[B, T]``, or what else the model reads.
        targets: int64 ``[B, T]``; -100 is not scored.
        segments: the documents of a packed row, or None.
        count: number of scored targets (host).
    """

    tokens: Tensor
    targets: Tensor
    segments: Segments | None
    count: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors moved."""
        segments = None if self.segments is None else self.segments.to(device)
        return Batch(
            self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), segments, self.count
        )


class TextData:
    """Batches of a corpus, and its held-out part as one array.

    Args:
        corpus: the documents.
        tokenizer: how they become ids.
        context: longest stretch of one document that the model sees at once, in tokens.
        batch_tokens: tokens of one optimiser step, over all micro-batches and processes.
        packing: ``"concatenate"`` or ``"documents"``, see the module's docstring.
        seed: order of the data.

    Raises:
        ValueError: sizes that do not fit each other or the corpus, or an unknown packing.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_tokens: int,
        packing: str = "concatenate",
        seed: int = 0,
    ):
        check_choice("packing", packing, PACKINGS)
        if context < 1 or batch_tokens < context or (packing == "concatenate" and batch_tokens % context):
            raise ValueError(
                f"batch_tokens (--batch-size): expected a multiple of context={context} tokens, at least one, "
                f"got {batch_tokens}"
            )
        self.context, self.batch_tokens, self.packing, self.seed = context, batch_tokens, packing, seed
        self.tokens, starts = _lay_out(corpus.train, tokenizer)
        self.held_out, _ = _lay_out(corpus.held_out, tokenizer)
        self.held_out_bytes = corpus.held_out_bytes
        self.bytes_per_token: float | None = corpus.train_bytes / (len(self.tokens) - 1)
        self.pairs = len(self.tokens) - 1
        self.rows_per_epoch = (self.pairs - context + 1) // context
        if packing == "concatenate" and self.rows_per_epoch < 1:
            raise ValueError(
                f"context: the training text has {self.pairs} tokens, too few for rows of {context}; "
                "use a smaller context or more text"
            )
        # Pieces: (first pair, number of pairs) of every document, cut where it exceeds the context.
        cuts = [np.arange(a, b, context) for a, b in zip(starts, [*starts[1:], self.pairs], strict=True)]
        self._piece_start = np.concatenate(cuts)
        self._piece_length = np.diff(np.append(self._piece_start, self.pairs))
        self._shuffle = lru_cache(maxsize=2)(self._make_shuffle)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, index in the epoch) of the next row (concatenate) or token (documents) before ``step``."""
        if self.packing == "documents":
            return divmod(step * self.batch_tokens, self.pairs)
        return divmod(step * (self.batch_tokens // self.context), self.rows_per_epoch)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Micro-batch ``part`` of ``parts`` of an optimiser step; the same arguments always give the same batch.

        Raises:
            ValueError: the batch cannot be divided into that many parts.
        """
        unit = 1 if self.packing == "documents" else self.context
        if self.batch_tokens % (parts * unit):
            raise ValueError(
                f"batch_tokens (--batch-size): {self.batch_tokens} tokens cannot be divided into {parts} micro-batches "
                f"(processes x --accumulate) of whole rows of {unit}"
            )
        size = self.batch_tokens // parts
        first = step * self.batch_tokens + part * size
        if self.packing == "documents":
            return self._packed(first, size)
        return self._windows(first // self.context, size // self.context)

    def _make_shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray | int]:
        rng = np.random.default_rng([self.seed, epoch])
        if self.packing == "concatenate":
            return rng.permutation(self.rows_per_epoch), int(rng.integers(self.context))
        order = rng.permutation(len(self._piece_start))
        return order, np.append(0, self._piece_length[order].cumsum())

    def _windows(self, first: int, rows: int) -> Batch:
        picked = []
        for n in range(first, first + rows):
            order, shift = self._shuffle(n // self.rows_per_epoch)
            at = int(order[n % self.rows_per_epoch]) * self.context + int(shift)
            picked.append(self.tokens[at : at + self.context + 1])
        both = torch.from_numpy(np.stack(picked).astype(np.int64))
        return Batch(both[:, :-1], both[:, 1:], None, rows * self.context)

    def _packed(self, first: int, size: int) -> Batch:
        inputs, targets, lengths, end = [], [], [], first + size
        while first < end:
            epoch, at = divmod(first, self.pairs)
            order, bounds = self._shuffle(epoch)
            assert isinstance(bounds, np.ndarray)
            i = int(np.searchsorted(bounds, at, side="right")) - 1
            take = min(int(bounds[i + 1]) - at, end - first)
            a = int(self._piece_start[order[i]]) + at - int(bounds[i])
            inputs.append(self.tokens[a : a + take])
            targets.append(self.tokens[a + 1 : a + take + 1])
            lengths.append(take)
            first += take

        def row(pieces: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(pieces).astype(np.int64))[None]

        return Batch(row(inputs), row(targets), Segments.from_lengths(lengths), size)


def _lay_out(documents: list[bytes], tokenizer: Tokenizer) -> tuple[np.ndarray, list[int]]:
    """All documents end to end, and where each begins (at the end-of-document token before it)."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.array([tokenizer.end], dtype=dtype)
    parts, starts, at = [], [], 0
    for document in documents:
        ids = tokenizer.encode(document).astype(dtype, copy=False)
        parts += [end, ids]
        starts.append(at)
        at += len(ids) + 1
    return np.concatenate([*parts, end]), starts
