"""Truncated back-propagation through time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linnet.models import Decoder, DecoderConfig
from linnet.ops.core import detach, state_tensors
from linnet.training import windows


def sample(**options):
    torch.manual_seed(0)
    mixers = ["lstm(num_heads=2)", "gla(num_heads=2)"]
    model = Decoder(DecoderConfig(11, 16, 2, mixers, init_std=0.2, **options)).double()
    ids = torch.randint(11, (2, 14))
    targets = ids[:, 1:].clone()
    targets[0, 3] = -100
    return model, ids[:, :-1], targets


def test_one_window_is_the_whole():
    model, ids, targets = sample(z_loss=0.1, mlp="moe")
    (window,) = windows(model, ids, targets, 13)
    torch.testing.assert_close(window.loss, model.loss(ids, targets))
    for got, want in zip(state_tensors(window.state), state_tensors(model(ids).state), strict=True):
        torch.testing.assert_close(got, want)


def test_losses_are_those_of_the_whole_and_gradients_stop_between_windows():
    model, ids, targets = sample()
    found = list(windows(model, ids, targets, 5))
    counts = [int((part != -100).sum()) for part in targets.split(5, 1)]
    mean = sum(w.loss * n for w, n in zip(found, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(mean, model.loss(ids, targets))
    got = torch.autograd.grad(mean, list(model.parameters()))
    state, logits = None, []
    for part in ids.split(5, 1):
        out = model(part, detach(state))
        state, logits = out.state, [*logits, out.logits]
    loss = F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), targets.flatten())
    for a, b in zip(got, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    whole = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    assert any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(got, whole, strict=True))


def test_rows_go_on_in_the_next_batch():
    model, ids, targets = sample()
    whole = list(windows(model, ids, targets, 4))
    *_, half = windows(model, ids[:, :8], targets[:, :8], 4)
    rest = list(windows(model, ids[:, 8:], targets[:, 8:], 4, half.state))
    for a, b in zip(whole[2:], rest, strict=True):
        torch.testing.assert_close(a.loss, b.loss)


def test_bad_arguments_are_named():
    model, ids, targets = sample()
    with pytest.raises(ValueError, match=r"^size: expected at least 1, got 0"):
        windows(model, ids, targets, 0)
    with pytest.raises(ValueError, match=r"^targets: expected shape \[2, 13\] like tokens"):
        windows(model, ids, targets[:, 1:], 4)
