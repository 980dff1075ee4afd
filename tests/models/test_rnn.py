"""The drop-in modules against those of torch.nn, with their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import linnet

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")
PAIRS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}


def test_packed_under_another_default_device():
    ours, theirs = linnet.GRU(5, 6), nn.GRU(5, 6)
    ours.load_state_dict(theirs.state_dict())
    packed = pack_padded_sequence(torch.randn(4, 3, 5), torch.tensor([4, 2, 3]), enforce_sorted=False)
    with torch.device("meta"):
        found, _ = ours(packed)
    torch.testing.assert_close(found.data, theirs(packed)[0].data)


def twins(name: str, **options):
    theirs = PAIRS[name](5, 6, **options)
    ours = getattr(linnet, name)(5, 6, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def flat(result) -> list[torch.Tensor]:
    output, last = result
    output = output.data if hasattr(output, "batch_sizes") else output
    return [output, *(last if isinstance(last, tuple) else (last,))]


def initial(net, rows: int):
    count = net.num_layers * (1 + net.bidirectional)
    h, c = torch.randn(count, rows, net.proj_size or net.hidden_size), torch.randn(count, rows, net.hidden_size)
    return (h, c) if isinstance(net, nn.LSTM) else h


CONFIGS = [
    ("RNN", {"num_layers": 2, "nonlinearity": "relu", "bias": False}),
    ("RNN", {"bidirectional": True, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "proj_size": 3, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"bias": False, "batch_first": True}),
]


@pytest.mark.parametrize(("name", "options"), CONFIGS)
def test_equals_torch(name, options):
    torch.manual_seed(0)
    ours, theirs = twins(name, **options)
    x = torch.randn(4, 7, 5)
    rows = 4 if theirs.batch_first else 7
    for hx in (None, initial(theirs, rows)):
        for a, b in zip(flat(ours(x, hx)), flat(theirs(x, hx)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    results = [sum(y.square().sum() for y in flat(net(x, hx))) for net in (ours, theirs)]
    mine, other = (
        torch.autograd.grad(y, list(net.parameters())) for y, net in zip(results, (ours, theirs), strict=True)
    )
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), CONFIGS[2:5])
def test_packed_sequences_equal_torch(name, options):
    torch.manual_seed(0)
    ours, theirs = twins(name, **options)
    x = torch.randn(4, 7, 5)
    packed = pack_padded_sequence(x, torch.tensor([3, 7, 1, 4]), batch_first=True, enforce_sorted=False)
    for hx in (None, initial(theirs, 4)):
        (y, last), (want, want_last) = ours(packed, hx), theirs(packed, hx)
        for a, b in zip(flat((y, last)), flat((want, want_last)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pad_packed_sequence(y)[0], pad_packed_sequence(want)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_unbatched_and_half_of_it_first(name):
    torch.manual_seed(0)
    ours, theirs = twins(name)
    x = torch.randn(7, 5)
    for a, b in zip(flat(ours(x)), flat(theirs(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    whole, (first, state) = ours(x), ours(x[:3])
    second, last = ours(x[3:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole[0])
    torch.testing.assert_close(last, whole[1])


def test_heads_are_a_block_diagonal_network():
    torch.manual_seed(0)
    heads, dense = linnet.GRU(5, 6, heads=3), linnet.GRU(5, 6)
    assert heads.weight_hh_l0.shape == (18, 2)
    weights = heads.state_dict()
    blocks = weights["weight_hh_l0"].view(3, 3, 2, 2)  # gate, head, unit, unit before
    weights["weight_hh_l0"] = torch.stack([torch.block_diag(*gate) for gate in blocks]).flatten(0, 1)
    dense.load_state_dict(weights)
    x = torch.randn(7, 2, 5)
    for a, b in zip(flat(heads(x)), flat(dense(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_between_layers_in_training_only():
    torch.manual_seed(0)
    net = linnet.LSTM(5, 6, num_layers=2, dropout=1.0)
    x = torch.randn(7, 2, 5)
    assert not torch.equal(net.train()(x)[0], net.eval()(x)[0])
    assert torch.equal(net.train()(x)[0], net(torch.randn(7, 2, 5))[0])  # the second layer sees zeros


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: linnet.LSTM(5, 6, heads=4), "heads"),
        (lambda: linnet.LSTM(5, 6, proj_size=6), "proj_size"),
        (lambda: linnet.LSTM(5, 6, proj_size=3, heads=2), "proj_size"),
        (lambda: linnet.GRU(5, 0), "hidden_size"),
        (lambda: linnet.RNN(5, 6, nonlinearity="sin"), "nonlinearity"),
        (lambda: linnet.RNN(5, 6, dropout=2.0), "dropout"),
        (lambda: linnet.GRU(5, 6)(torch.zeros(3, 2, 4)), "input"),
        (lambda: linnet.GRU(5, 6)(torch.zeros(3)), "input"),
        (lambda: linnet.GRU(5, 6)(torch.zeros(3, 2, 5), torch.zeros(1, 3, 6)), "hx"),
        (lambda: linnet.LSTM(5, 6)(torch.zeros(3, 2, 5), torch.zeros(1, 2, 6)), "hx"),
        (lambda: linnet.GRU(5, 6)([[0.0] * 5]), "input"),
        (lambda: linnet.GRU(5, 6)(torch.zeros(3, 2, 5).long()), "input"),
        (lambda: linnet.GRU(5, 6, bidirectional=2), "bidirectional"),
        (lambda: linnet.GRU(5, 6, dropout="a"), "dropout"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
        call()
