from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from linnet.tasks import ByteTokenizer, Corpus, TextData

END = ByteTokenizer.end


def corpus(count=40, seed=0):
    rng = np.random.default_rng(seed)
    documents = [bytes(rng.integers(97, 123, rng.integers(1, 90), dtype=np.uint8)) for _ in range(count)]
    return Corpus("made up", documents, [b"held out", b"text"])


def make(packing, *, context=16, batch_tokens=64, seed=0, documents=None):
    return TextData(
        documents or corpus(), ByteTokenizer(), context=context, batch_tokens=batch_tokens, packing=packing, seed=seed
    )


def pairs_of(documents):
    """All (input, target) pairs that a data set may contain, with how often."""
    counts = {}
    for document in documents:
        ids = [END, *document, END]
        for pair in pairwise(ids):
            counts[pair] = counts.get(pair, 0) + 1
    return counts


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
class TestBoth:
    def test_shapes(self, packing):
        batch = make(packing).batch(0)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.shape == batch.targets.shape == ((1, 64) if packing == "documents" else (4, 16))
        assert batch.count == 64

    def test_a_step_is_a_pure_function(self, packing):
        data, again = make(packing), make(packing)
        for step in (5, 0, 200, 5):
            torch.testing.assert_close(data.batch(step).tokens, again.batch(step).tokens, rtol=0, atol=0)
        assert not torch.equal(data.batch(0).tokens, data.batch(1).tokens)
        assert not torch.equal(data.batch(0).tokens, make(packing, seed=1).batch(0).tokens)

    def test_parts_make_up_the_whole(self, packing):
        data = make(packing)
        for step in (0, 7, 100):
            parts = [data.batch(step, i, 4) for i in range(4)]
            whole = data.batch(step)
            torch.testing.assert_close(torch.cat([p.tokens.flatten() for p in parts]), whole.tokens.flatten())
            torch.testing.assert_close(torch.cat([p.targets.flatten() for p in parts]), whole.targets.flatten())

    def test_labels_never_cross_documents(self, packing):
        data = make(packing)
        known = pairs_of(corpus().train)
        for step in range(60):
            batch = data.batch(step)
            for pair in zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True):
                assert pair in known

    def test_epochs_differ(self, packing):
        data = make(packing)
        per_epoch = data.pairs if packing == "documents" else data.rows_per_epoch * 16
        steps = math.lcm(per_epoch, 64) // 64
        assert data.position(0) == (0, 0)
        epoch, index = data.position(steps)
        assert (epoch, index) == (steps * 64 // per_epoch, 0)
        assert not torch.equal(data.batch(0).tokens, data.batch(steps).tokens)

    def test_sizes_that_do_not_fit(self, packing):
        with pytest.raises(ValueError, match="batch_tokens"):
            make(packing, context=16, batch_tokens=8)
        with pytest.raises(ValueError, match="cannot be divided into 3 micro-batches"):
            make(packing).batch(0, 0, 3)


def test_documents_epoch_holds_every_pair_once():
    documents = corpus(5)
    data = make("documents", context=16, batch_tokens=16, documents=documents)
    steps = math.lcm(data.pairs, 16) // 16
    seen: dict[tuple[int, int], int] = {}
    for step in range(steps):
        batch = data.batch(step)
        for pair in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True):
            seen[pair] = seen.get(pair, 0) + 1
    epochs = steps * 16 // data.pairs
    assert seen == {pair: epochs * count for pair, count in pairs_of(documents.train).items()}


def test_segments_are_pieces_of_single_documents():
    data = make("documents", batch_tokens=128)
    texts = [bytes(d) for d in corpus().train]
    for step in range(20):
        batch = data.batch(step)
        assert batch.segments is not None
        assert batch.segments.total == 128
        assert batch.segments.max_len <= 16
        for a, b in zip(batch.segments.cu_seqlens_host[:-1], batch.segments.cu_seqlens_host[1:], strict=True):
            piece = batch.tokens[0, a:b].tolist()
            assert END not in piece[1:]  # an end of document only ever begins a piece
            assert any(bytes(t for t in piece if t != END) in text for text in texts)


def test_windows_are_stretches_of_the_text():
    data = make("concatenate")
    flat = data.tokens.astype(np.uint16).tobytes()
    for step in range(20):
        batch = data.batch(step)
        for row, target in zip(batch.tokens, batch.targets, strict=True):
            assert row.numpy().astype(np.uint16).tobytes() in flat
            assert torch.equal(row[1:], target[:-1])


def test_bits_per_byte_counts_every_byte():
    data = make("concatenate")
    assert data.held_out_bytes == 12
    assert data.held_out.tolist() == [END, *b"held out", END, *b"text", END]
    assert data.bytes_per_token == pytest.approx(corpus().train_bytes / (corpus().train_bytes + 40))


def test_too_little_text():
    with pytest.raises(ValueError, match="too few for rows of 4096"):
        make("concatenate", context=4096, batch_tokens=4096)
    make("documents", context=4096, batch_tokens=4096).batch(0)  # repeats


def test_unknown_packing():
    with pytest.raises(ValueError, match="packing: expected one of"):
        make("best-fit")
