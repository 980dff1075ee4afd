"""What a reader without a neural network reaches on the same text: gzip, xz and an interpolated byte 3-gram model."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence

import numpy as np

__all__ = ["NGram", "baselines", "gzip_bits_per_byte", "xz_bits_per_byte"]

_SYMBOLS = 257  # the bytes and the end of a document


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of ``gzip -9``; it has read nothing before."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of ``xz -9e``; it has read nothing before."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


class NGram:
    """A byte n-gram model that interpolates all orders (Witten & Bell 1991, "The zero-frequency problem").

    ``p(w | h) = (count(h w) + types(h) p(w | shorter h)) / (count(h) + types(h))``, down to the uniform distribution
    over 256 bytes and the end of a document. ``types(h)`` is the number of different bytes seen after ``h``.

    Args:
        order: length of the n-grams in bytes, 1 to 6; 3 predicts each byte from the two before it.

    Raises:
        ValueError: an order outside 1 to 6.
    """

    def __init__(self, order: int = 3):
        if not 1 <= order <= 6:
            raise ValueError(f"order: expected 1 to 6, got {order}")
        self.order = order
        self._grams: list[tuple[np.ndarray, np.ndarray]] = []
        self._contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def fit(self, documents: Sequence[bytes]) -> NGram:
        """Count the n-grams of ``documents``."""
        self._grams, self._contexts = [], []
        for n in range(1, self.order + 1):
            grams, counts = np.unique(self._keys(documents, n), return_counts=True)
            context, first, types = np.unique(grams // _SYMBOLS, return_index=True, return_counts=True)
            self._grams.append((grams, counts))
            self._contexts.append((context, np.add.reduceat(counts, first), types))
        return self

    def log2_probabilities(self, documents: Sequence[bytes]) -> np.ndarray:
        """Base-2 log-probability of every byte and every end of a document, in order."""
        if not self._grams:
            raise ValueError("NGram: fit it first")
        p = np.array(1 / _SYMBOLS)
        for n, (grams, contexts) in enumerate(zip(self._grams, self._contexts, strict=True), start=1):
            keys = self._keys(documents, n)
            (seen,) = _look_up(grams[0], keys, grams[1])
            total, types = _look_up(contexts[0], keys // _SYMBOLS, *contexts[1:])
            p = np.where(total > 0, (seen + types * p) / np.maximum(total + types, 1), p)
        return np.log2(p)

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Bits per byte on ``documents``; the ends of documents count as cost."""
        return float(-self.log2_probabilities(documents).sum() / sum(map(len, documents)))

    def _keys(self, documents: Sequence[bytes], n: int) -> np.ndarray:
        """For every byte and every end of a document: it and the ``n - 1`` symbols before it as one number, the
        symbol itself in the lowest place. Before the first document stand ends of documents."""
        end = np.array([256], np.int64)
        parts = [np.repeat(end, n - 1)]
        for document in documents:
            parts += [np.frombuffer(document, np.uint8).astype(np.int64), end]
        symbols = np.concatenate(parts)
        count = len(symbols) - n + 1
        key = np.zeros(count, np.int64)
        for i in range(n):
            key = key * _SYMBOLS + symbols[i : i + count]
        return key


def baselines(train: Sequence[bytes], held_out: Sequence[bytes]) -> dict[str, float]:
    """Held-out bits per byte of gzip and xz (which see only the held-out text, as one file) and of a 3-gram model
    learned on the training text."""
    text = b"".join(held_out)
    return {
        "gzip -9": gzip_bits_per_byte(text),
        "xz -9e": xz_bits_per_byte(text),
        "3-gram": NGram(3).fit(train).bits_per_byte(held_out),
    }


def _look_up(known: np.ndarray, keys: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """``values`` at the places of ``keys`` in the sorted ``known``, 0 where a key is unknown."""
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    found = known[at] == keys
    return [np.where(found, value[at], 0) for value in values]
