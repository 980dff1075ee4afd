from __future__ import annotations

import gzip
import math
from collections import defaultdict

import numpy as np
import pytest

from linnet.evaluation import NGram, baselines, gzip_bits_per_byte, xz_bits_per_byte


def witten_bell(train, order):
    """The textbook recursion, with dictionaries."""
    counts = [defaultdict(lambda: defaultdict(int)) for _ in range(order)]
    for n in range(order):
        symbols = [256] * n
        for document in train:
            symbols += [*document, 256]
        for i in range(n, len(symbols)):
            counts[n][tuple(symbols[i - n : i])][symbols[i]] += 1

    def probability(history, symbol):
        p = 1 / 257
        for n in range(order):
            seen = counts[n].get(tuple(history[len(history) - n :]))
            if seen:
                total, types = sum(seen.values()), len(seen)
                p = (seen.get(symbol, 0) + types * p) / (total + types)
        return p

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngram_is_witten_bell(order):
    rng = np.random.default_rng(order)
    train = [bytes(rng.integers(97, 101, n, dtype=np.uint8)) for n in (50, 1, 30)]
    test = [bytes(rng.integers(97, 103, n, dtype=np.uint8)) for n in (20, 5)]
    probability = witten_bell(train, order)
    expected, history = [], [256] * (order - 1)
    for document in test:
        for symbol in [*document, 256]:
            expected.append(math.log2(probability(history, symbol)))
            history.append(symbol)
    model = NGram(order).fit(train)
    np.testing.assert_allclose(model.log2_probabilities(test), expected, rtol=1e-12)
    assert model.bits_per_byte(test) == pytest.approx(-sum(expected) / 25)


def test_probabilities_add_up_to_one():
    model = NGram(3).fit([b"abracadabra", b"banana"])
    # After the context "an": score each possible next byte, and the end of the document.
    bytes_after = [model.log2_probabilities([b"an" + bytes([i])])[2] for i in range(256)]
    end_after = model.log2_probabilities([b"an"])[2]
    assert sum(2.0**x for x in [*bytes_after, end_after]) == pytest.approx(1)


def test_compressors():
    text = b"the same line again and again\n" * 200
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert xz_bits_per_byte(text) < 0.3
    random = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    assert gzip_bits_per_byte(random) > 8


def test_baselines_know_the_training_text_only_where_they_say_so():
    text = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    found = baselines([text], [text])
    assert list(found) == ["gzip -9", "xz -9e", "3-gram"]
    assert found["gzip -9"] > 8
    assert found["3-gram"] < 4


def test_bad_use():
    with pytest.raises(ValueError, match="order: expected 1 to 6, got 0"):
        NGram(0)
    with pytest.raises(ValueError, match="fit it first"):
        NGram(2).bits_per_byte([b"x"])
