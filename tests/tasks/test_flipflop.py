"""The generator and its solver, and the experiment they are for (Yang et al. 2023 in miniature: a gate that sees the
token remembers what a fixed decay cannot)."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from linnet.models import Decoder, DecoderConfig
from linnet.tasks import FlipFlop, solve_flip_flop
from linnet.training import TrainingConfig, train


def last_bit(row):
    """The definition, token by token."""
    bit, at, found = None, None, []
    for i, token in enumerate(row):
        if token < 2:
            bit, at = token, i
        found.append((bit, i - at))
    return found


def test_generator():
    batch = FlipFlop(length=64, batch_size=256).batch(3)
    tokens = batch.tokens
    assert tokens.shape == batch.targets.shape == (256, 64)
    assert (tokens[:, 0] < 2).all()
    later = tokens[:, 1:]
    for low, high, share in ((0, 1, 0.1), (2, 3, 0.8), (4, 4, 0.1)):
        assert ((later >= low) & (later <= high)).double().mean().item() == pytest.approx(share, abs=0.01)
    for a, b in ((0, 1), (2, 3)):
        share = (later == a).sum() / ((later == a) | (later == b)).sum()
        assert share.item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(batch.targets >= 0, tokens == 4)
    assert batch.count == int((tokens == 4).sum())


def test_solver_is_right_everywhere_a_read_is_scored():
    task = FlipFlop(length=64, batch_size=16, min_distance=8)
    batch = task.batch(0)
    answers, distances = solve_flip_flop(batch.tokens)
    for row, answer, distance, target in zip(batch.tokens, answers, distances, batch.targets, strict=True):
        expected = last_bit(row.tolist())
        assert list(zip(answer.tolist(), distance.tolist(), strict=True)) == expected
        for token, (bit, ago), scored in zip(row.tolist(), expected, target.tolist(), strict=True):
            assert scored == (bit if token == 4 and ago >= 8 else -100)


def test_deterministic_and_divisible():
    task = FlipFlop(batch_size=8, seed=1)
    assert torch.equal(task.batch(5).tokens, FlipFlop(batch_size=8, seed=1).batch(5).tokens)
    assert not torch.equal(task.batch(5).tokens, task.batch(6).tokens)
    parts = [task.batch(5, i, 4) for i in range(4)]
    assert torch.equal(torch.cat([p.targets for p in parts]), task.batch(5).targets)
    assert sum(p.count for p in parts) == task.batch(5).count


@pytest.mark.parametrize("options", [{"length": 1}, {"batch_size": 0}, {"p_write": 0.7, "p_read": 0.4}, {"p_read": -1}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match="expected"):
        FlipFlop(**options)
    with pytest.raises(ValueError, match="cannot be divided into 3"):
        FlipFlop(batch_size=8).batch(0, 0, 3)


def accuracy(model, task, steps=8):
    right = total = 0
    for step in range(steps):
        batch = task.batch(step)
        guess = model(batch.tokens).logits.argmax(-1)
        right += int((guess == batch.targets)[batch.targets >= 0].sum())
        total += batch.count
    return right / total


def trained_accuracy(mixer, tmp_path, seed=0):
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=FlipFlop.vocab_size, d_model=32, num_layers=1, mixers=[mixer], mlp_hidden=64, norm_eps=1e-5
    )
    model = Decoder(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    optimiser = {"lr": 1e-2, "warmup_steps": 20, "final_lr": 0.0, "weight_decay": 0.01, "beta2": 0.999}
    rarely = {"log_every": 250, "save_every": 250, "evaluate_every": 250}
    settings = TrainingConfig(steps=250, device="cpu", **optimiser, **rarely)
    near = FlipFlop(length=64, batch_size=64, seed=100)
    far = FlipFlop(length=256, batch_size=32, p_write=0.02, min_distance=64, seed=101)
    result = train(
        model,
        FlipFlop(length=64, batch_size=32, seed=seed),
        settings,
        out=tmp_path / "run",
        console=Console(quiet=True),
        evaluate=lambda model, **_: {"near": accuracy(model, near), "far": accuracy(model, far)},
    )
    return result.last("held_out/near"), result.last("held_out/far")


SHAPE = "num_heads=2, expand_k=0.5, expand_v=1.0"


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gla", "simple_gla"])
def test_data_dependent_decay_remembers(mixer, tmp_path):
    near, _ = trained_accuracy(f"{mixer}({SHAPE}, gate_logit_normalizer=1.0)", tmp_path)
    assert near >= 0.99


@pytest.mark.slow
def test_constant_decay_does_not(tmp_path):
    near, _ = trained_accuracy(f"retnet({SHAPE}, rope=False)", tmp_path)  # the decay alone, without positions
    assert near <= 0.92
