"""Flip-flop: remember the last written bit among distractors, the smallest task that needs data-dependent forgetting.

Alphabet of five: 0 and 1 write that bit, 2 and 3 are distractors that carry a random bit, 4 asks for the last written
bit. A row begins with a write. Scored are only the positions that ask. A decay that is the same for every token must
keep the old bits and the distractors or forget the written one; a gate that sees the token can do right by both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task

__all__ = ["DISTRACT", "READ", "WRITE", "FlipFlop"]

WRITE, DISTRACT, READ = 0, 2, 4  # tokens WRITE + bit, DISTRACT + bit, READ


@register_task(
    "flipflop",
    "after Liu et al. 2023, Exposing Attention Glitches with Flip-Flop Language Modeling (arXiv 2306.00946): one bit, "
    "random distractors, scored at reads",
)
class FlipFlop(Task):
    """The last written bit.

    Args:
        p_write: chance of a write at each position after the first.
        p_read: chance of a read at each position after the first; a distractor otherwise.
        min_distance: score only reads at least this many tokens after the last write (1: all of them).

    Raises:
        ValueError: an argument outside its range.
    """

    lengths = (64, 128, 256)
    examples = ({}, {"min_distance": 8, "p_write": 0.05})
    vocab_size = 5
    chance = 0.5

    def __init__(self, *, p_write: float = 0.1, p_read: float = 0.1, min_distance: int = 1):
        self.expect(min_distance >= 1, "min_distance", "at least 1", min_distance)
        possible = min(p_write, p_read) >= 0 and p_write + p_read <= 1
        self.expect(possible, "p_write, p_read", "probabilities with a sum of at most 1", (p_write, p_read))
        self.p_write, self.p_read, self.min_distance = p_write, p_read, min_distance

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 2, "length", "at least 2", length)
        draw = torch.rand(rows, length, generator=generator)
        draw[:, 0] = 0  # the first token writes
        bit = torch.randint(2, (rows, length), generator=generator)
        write, read = draw < max(self.p_write, 1e-9), draw >= 1 - self.p_read
        tokens = torch.where(write, WRITE + bit, torch.where(read, READ, DISTRACT + bit))
        last = _last_write(tokens)
        distance = torch.arange(length) - last
        return Sample(tokens, torch.where(read & (distance >= self.min_distance), bit.gather(1, last), IGNORE))

    def solve(self, tokens: Tensor) -> Tensor:
        return tokens.gather(1, _last_write(tokens))


def _last_write(tokens: Tensor) -> Tensor:
    """Position of the last write at or before each position."""
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return torch.where(tokens < DISTRACT, position, 0).cummax(1).values
