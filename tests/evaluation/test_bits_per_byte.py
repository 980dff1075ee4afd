from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linnet.evaluation import bits_per_byte
from linnet.models import Decoder, DecoderConfig


def model(*mixers):
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=257, d_model=16, num_layers=2, mixers=mixers, mlp_hidden=16, init_std=0.3)
    return Decoder(config).double().eval()


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 257, 301).astype(np.uint16)


def nats(network, ids):
    x = torch.from_numpy(ids.astype(np.int64))[None]
    return float(F.cross_entropy(network(x[:, :-1]).logits[0], x[0, 1:], reduction="sum"))


@torch.no_grad()
@pytest.mark.parametrize("second", ["retnet(num_heads=2)", "attention(num_heads=2, window=50)"])
def test_carries_a_bounded_state_over_windows(tokens, second):
    network = model("gla(num_heads=2)", second)
    expected = nats(network, tokens) / math.log(2) / 123
    assert bits_per_byte(network, tokens, 123, context=32, batch_size=1) == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(network, tokens, 123, context=300, batch_size=1) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_drops_a_growing_state(tokens):
    network = model("attention(num_heads=2)", "gla(num_heads=2)")
    expected = sum(nats(network, tokens[at : at + 61]) for at in range(0, 300, 60)) / math.log(2) / 300
    for form in (network, lambda tokens, state: network(tokens, state)):  # it is seen from outside too
        found = bits_per_byte(form, tokens, 300, context=60, batch_size=1, device="cpu")
        assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_strips_and_parts_add_up(tokens):
    network = model("gla(num_heads=2)")
    expected = sum(nats(network, tokens[at : at + 101]) for at in (0, 100, 200)) / math.log(2) / 300
    options = {"context": 20, "batch_size": 3}
    assert bits_per_byte(network, tokens, 300, **options) == pytest.approx(expected, rel=1e-5)
    shares = [bits_per_byte(network, tokens, 300, **options, part=i, parts=3) for i in range(3)]
    assert sum(shares) == pytest.approx(expected, rel=1e-5)
    # Four strips are needed for two parts, and the last of them is padded.
    shares = [bits_per_byte(network, tokens, 300, **options, part=i, parts=2) for i in range(2)]
    again = bits_per_byte(network, tokens, 300, context=20, batch_size=4)
    assert sum(shares) == pytest.approx(again, rel=1e-6)


@torch.no_grad()
def test_sample_is_the_beginning_of_every_strip(tokens):
    network = model("gla(num_heads=2)")
    expected = sum(nats(network, tokens[at : at + 21]) for at in (0, 100, 200)) / math.log(2) / 60
    sampled = bits_per_byte(network, tokens, 300, context=20, batch_size=3, max_tokens=70)
    assert sampled == pytest.approx(expected, rel=1e-5)


def test_uniform_model_needs_the_bits_of_its_vocabulary(tokens):
    network = model("gla(num_heads=2)")
    torch.nn.init.zeros_(network.lm_head.weight)
    assert bits_per_byte(network, tokens, 300, context=50) == pytest.approx(math.log2(257), rel=1e-6)


def test_bad_arguments(tokens):
    network = model("gla(num_heads=2)")
    with pytest.raises(ValueError, match="at least two tokens"):
        bits_per_byte(network, tokens[:1], 1)
    with pytest.raises(ValueError, match="at least 1"):
        bits_per_byte(network, tokens, 300, context=0)
