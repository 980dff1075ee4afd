"""What the delta rule is for: overwriting what a key holds, and, with reflections, following swaps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import build_mixer
from linnet.models.mlp import SwiGLU

WIDTH = 64


class Classifier(nn.Module):
    """Embedded tokens, one mixer (and an MLP), a class for every position."""

    def __init__(self, mixer: str, classes: int, *, mlp: bool):
        super().__init__()
        self.mixer = build_mixer(mixer, WIDTH)
        self.before, self.between, self.after = (nn.RMSNorm(WIDTH) for _ in range(3))
        self.mlp = SwiGLU(WIDTH, 128) if mlp else None
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before(x))[0]
        if self.mlp is not None:
            x = x + self.mlp(self.between(x))[0]
        return self.head(self.after(x))


Batch = Callable[[int], tuple[Tensor, Tensor]]  # size -> tokens, classes (-100 where none is asked for)


def trained(embed: nn.Module, model: Classifier, batch: Batch, steps: int) -> None:
    parameters = list(model.parameters()) + list(embed.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        tokens, classes = batch(64)
        loss = F.cross_entropy(model(embed(tokens)).flatten(0, 1), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


class PairEmbedding(nn.Module):
    """A token carries a key and a value at once."""

    def __init__(self, keys: int, values: int):
        super().__init__()
        self.key, self.value = nn.Embedding(keys, WIDTH), nn.Embedding(values, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.key(tokens[..., 0]) + self.value(tokens[..., 1])


def overwrites(size: int, *, keys: int = 12, values: int = 16, writes: int = 32, queries: int = 8):
    """Keys written about three times each, then asked for: the class is the latest value."""
    key, value = torch.randint(keys, (size, writes)), torch.randint(values, (size, writes))
    asked = key.gather(1, torch.randint(writes, (size, queries)))
    latest = (key[:, None] == asked[..., None]) * torch.arange(1, writes + 1)
    answers = value.gather(1, latest.argmax(-1))
    tokens = torch.stack([torch.cat([key, asked], 1), torch.cat([value, torch.full_like(asked, values)], 1)], -1)
    return tokens, torch.cat([torch.full_like(value, -100), answers], 1)


@torch.no_grad()
def accuracy(embed: nn.Module, model: Classifier, tokens: Tensor, classes: Tensor) -> float:
    asked = classes != -100
    return float((model(embed(tokens)).argmax(-1) == classes)[asked].double().mean())


def overwrite_recall(mixer: str, steps: int) -> float:
    torch.manual_seed(0)
    embed, model = PairEmbedding(12, 17), Classifier(mixer, 16, mlp=False)
    trained(embed, model, overwrites, steps)
    return accuracy(embed, model, *overwrites(512))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "steps"),
    [
        ("deltanet(num_heads=2, head_dim=16, conv_size=0)", 300),
        ("gated_deltanet(num_heads=2, head_dim=16, expand_v=1.0, conv_size=0)", 200),
        ("kda(num_heads=2, head_dim=16, conv_size=0)", 200),
        ("gated_deltanet2(num_heads=2, head_dim=16, conv_size=0)", 200),
    ],
)
def test_the_delta_rule_recalls_the_latest_value_of_a_key(mixer: str, steps: int) -> None:
    assert overwrite_recall(mixer, steps) >= 0.99


@pytest.mark.slow
def test_adding_alone_cannot_overwrite() -> None:
    options = "num_heads=2, expand_k=0.5, expand_v=0.5, feature_map='silu', normalize=False"
    assert overwrite_recall(f"linear_attention({options})", 300) <= 0.5


def swaps(size: int, length: int = 16, slots: int = 3) -> tuple[Tensor, Tensor]:
    """The slots' contents, then random swaps of two slots; after each the class is the content of the first slot."""
    pairs = torch.combinations(torch.arange(slots))
    moves = torch.randint(len(pairs), (size, length))
    content, classes = torch.arange(slots).repeat(size, 1), []
    for move in moves.unbind(1):
        content = content.scatter(1, pairs[move], content.gather(1, pairs[move].flip(1)))
        classes.append(content[:, 0])
    start = torch.arange(slots).repeat(size, 1)
    tokens = torch.cat([start, slots + moves], 1)
    return tokens, torch.cat([torch.full_like(start, -100), torch.stack(classes, 1)], 1)


@pytest.mark.slow
def test_reflections_track_swaps() -> None:
    found = {}
    for reflect in (True, False):
        torch.manual_seed(0)
        embed = nn.Embedding(3 + 3, WIDTH)
        model = Classifier(f"deltanet(num_heads=2, head_dim=16, conv_size=0, neg_eigval={reflect})", 3, mlp=True)
        trained(embed, model, swaps, 200)
        tokens, classes = swaps(256, 32)
        classes[:, :-4] = -100
        found[reflect] = accuracy(embed, model, tokens, classes)
    assert found[True] >= 0.99 and found[False] <= 0.6, found
