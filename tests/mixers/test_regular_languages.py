"""What MinMax cells are for: the states of group-free automata, learned on short words and exact on long ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import build_mixer
from linnet.models.mlp import SwiGLU

WIDTH = 24
Draw = Callable[[int, int], Tensor]  # words, length -> letters [words, length]


class Cascade(nn.Module):
    """Two MinMax layers with an MLP behind each, reading the automaton's state after every letter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, WIDTH), nn.Linear(WIDTH, 3)
        self.mixers = nn.ModuleList(build_mixer("minmax", WIDTH) for _ in range(2))
        self.mlps = nn.ModuleList(SwiGLU(WIDTH, 2 * WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(5))

    def forward(self, letters: Tensor) -> Tensor:
        x, norms = self.embed(letters), iter(self.norms)
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(next(norms)(x))[0]
            x = x + mlp(next(norms)(x))[0]
        return self.head(next(norms)(x))


def letters(*odds: float) -> Draw:
    return lambda words, length: torch.multinomial(torch.tensor(odds).expand(words, -1), length, replacement=True)


def alternating(words: int, length: int) -> Tensor:
    """The letters a and b in turn, with one of them changed in two words of three."""
    place = torch.arange(length)
    return (place % 2) ^ (place == torch.randint(length * 3 // 2, (words, 1))).long()


LANGUAGES: dict[str, tuple[list[list[int]], Draw, int]] = {
    # next states by state and letter, words, training steps
    "the last of two letters": ([[1, 2, 0], [1, 2, 1], [1, 2, 2]], letters(0.05, 0.05, 0.9), 100),
    "(ab)*": ([[1, 2], [2, 0], [2, 2]], alternating, 150),
}


def states(table: Tensor, word: Tensor) -> Tensor:
    state, every = torch.zeros(len(word), dtype=torch.long), []
    for letter in word.unbind(1):
        state = table[state, letter]
        every.append(state)
    return torch.stack(every, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGES)
def test_cascades_learn_languages_at_every_length(name: str) -> None:
    rows, draw, steps = LANGUAGES[name]
    table = torch.tensor(rows)
    torch.manual_seed(0)
    model = Cascade()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        word = draw(32, 24)
        loss = F.cross_entropy(model(word).flatten(0, 1), states(table, word).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for length in (24, 500, 4096):
        word = draw(8, length)
        with torch.no_grad():
            assert model(word).argmax(-1).equal(states(table, word)), f"{name}, {length} letters"
