from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from linnet.evaluation import by_position, copy_bits, question_score, swap_accuracy
from linnet.evaluation.language import _log_probability
from linnet.models import Decoder, DecoderConfig
from linnet.tasks import ByteTokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    mixers = ["gla(num_heads=2)", "attention(num_heads=2)"]
    return Decoder(DecoderConfig(vocab_size=257, d_model=16, num_layers=2, mixers=mixers, mlp_hidden=16)).eval()


TEXT = np.random.default_rng(0).integers(0, 256, 500)


def test_loss_over_the_position_is_the_loss(model):
    buckets = by_position(model, TEXT, len(TEXT), length=100, rows=3)
    assert [(b.first, b.last) for b in buckets] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 64),
        (65, 100),
    ]
    windows = torch.from_numpy(np.stack([TEXT[at : at + 101] for at in (0, 199, 399)]))
    loss = model.loss(windows[:, :-1], windows[:, 1:]).item()
    total = sum(math.log(b.perplexity) * b.tokens for b in buckets)
    assert total / 300 == pytest.approx(loss, rel=1e-5)
    assert buckets[-1].bits_per_byte == pytest.approx(math.log2(buckets[-1].perplexity))
    with pytest.raises(ValueError, match="length: expected at most 500"):
        by_position(model, TEXT, len(TEXT), length=500)


def test_copying(model):
    class Copier(Decoder):
        """Predicts the token it read 50 tokens ago."""

        def forward(self, tokens, state=None, segments=None, *, last_only=False):
            out = super().forward(tokens, state, segments)
            following = torch.roll(tokens, 49, 1)
            return out._replace(logits=torch.nn.functional.one_hot(following, 257) * 20.0)

    copier = Copier(model.config)
    copier.load_state_dict(model.state_dict())
    first, again = copy_bits(copier.eval(), TEXT, length=50, rows=4)
    assert again < 0.1 < 5 < first
    first, again = copy_bits(model, TEXT, length=50, rows=4)
    assert first == pytest.approx(again, rel=0.1)


def test_probes_run(model):
    tokenizer = ByteTokenizer()
    assert question_score(model, tokenizer, "niah_single_1", budget=600, questions=1) == 0
    found = swap_accuracy(model, tokenizer, swaps=(0, 2), questions=6)
    assert list(found) == [0, 2]
    assert all(0 <= share <= 1 for share in found.values())
    with pytest.raises(ValueError, match="family: expected one of"):
        question_score(model, tokenizer, "nope", budget=600)


def test_log_probability_is_that_of_the_answer(model):
    tokenizer = ByteTokenizer()
    whole = _log_probability(model, tokenizer, "ab", "cd")
    assert whole == pytest.approx(
        _log_probability(model, tokenizer, "ab", "c") + _log_probability(model, tokenizer, "abc", "d"), rel=1e-5
    )
    total = sum(math.exp(_log_probability(model, tokenizer, "x", chr(i))) for i in range(128))
    assert 0 < total < 1
