"""Flip-flop: remember the last written bit among distractors, the smallest task that needs data-dependent forgetting.

Alphabet of five: 0 and 1 write that bit, 2 and 3 are distractors that carry a random bit, 4 asks for the last written
bit. A sequence begins with a write. Scored are only the positions that ask. A decay that is the same for every token
must keep the old bits and the distractors or forget the written one; a gate that sees the token can do right by both.
Related: Liu et al. 2023, "Exposing Attention Glitches with Flip-Flop Language Modeling" (arXiv 2306.00946).
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.tasks.text import Batch

__all__ = ["DISTRACT", "READ", "WRITE", "FlipFlop", "solve_flip_flop"]

WRITE, DISTRACT, READ = 0, 2, 4  # tokens WRITE + bit, DISTRACT + bit, READ


class FlipFlop:
    """Batches of the flip-flop task; each is a pure function of its step.

    Args:
        length: tokens of a sequence, at least 2.
        batch_size: sequences of a batch.
        p_write: chance of a write at each position after the first.
        p_read: chance of a read at each position after the first; a distractor otherwise.
        min_distance: score only reads at least this many tokens after the last write (1: all of them).
        seed: which sequences.

    Raises:
        ValueError: an argument outside its range.
    """

    vocab_size = 5
    bytes_per_token = None

    def __init__(
        self,
        length: int = 64,
        batch_size: int = 32,
        *,
        p_write: float = 0.1,
        p_read: float = 0.1,
        min_distance: int = 1,
        seed: int = 0,
    ):
        if length < 2 or batch_size < 1 or min_distance < 1:
            raise ValueError(
                "length, batch_size, min_distance: expected at least 2, 1 and 1, got "
                f"{length}, {batch_size}, {min_distance}"
            )
        if min(p_write, p_read) < 0 or p_write + p_read > 1:
            raise ValueError(
                f"p_write, p_read: expected probabilities with a sum of at most 1, got {p_write}, {p_read}"
            )
        self.length, self.batch_size, self.min_distance, self.seed = length, batch_size, min_distance, seed
        self.p_write, self.p_read = p_write, p_read

    def position(self, step: int) -> tuple[int, int]:
        """(0, step): the data never repeats."""
        return 0, step

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Micro-batch ``part`` of ``parts`` of step ``step``: targets hold the bit (0 or 1) at scored reads."""
        if self.batch_size % parts:
            raise ValueError(f"batch_size: {self.batch_size} sequences cannot be divided into {parts} micro-batches")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shape = (self.batch_size, self.length)
        draw = torch.rand(shape, generator=generator)
        draw[:, 0] = 0  # the first token writes
        bit = torch.randint(2, shape, generator=generator)
        write, read = draw < max(self.p_write, 1e-9), draw >= 1 - self.p_read
        tokens = torch.where(write, WRITE + bit, torch.where(read, READ, DISTRACT + bit))
        answer, distance = solve_flip_flop(tokens)
        targets = torch.where(read & (distance >= self.min_distance), answer, -100)
        rows = slice(part * self.batch_size // parts, (part + 1) * self.batch_size // parts)
        tokens, targets = tokens[rows], targets[rows]
        return Batch(tokens, targets, None, int((targets >= 0).sum()))


def solve_flip_flop(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The exact solution: the last written bit at every position, and how many tokens ago it was written.

    Args:
        tokens: int64 ``[B, T]`` whose rows begin with a write.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    last = torch.where(tokens < DISTRACT, position, 0).cummax(1).values
    return tokens.gather(1, last), position - last
