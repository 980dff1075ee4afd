"""Word problems of finite groups: the running product of a sequence of elements, the measure of state tracking.

Solvable groups are within reach of diagonal transitions at best with depth; the word problems of A5 and S5 are complete
for NC1, out of reach of softmax attention and diagonal recurrences of any fixed depth (Barrington 1989, Merrill et al.
2024).
"""

from __future__ import annotations

import re
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task

__all__ = ["SlotSwaps", "WordProblem", "group_table", "permutation_group"]


@cache
def permutation_group(name: str) -> tuple[tuple[int, ...], ...]:
    """The elements of ``"S3"`` … ``"S6"`` or ``"A3"`` … ``"A6"`` as tuples in lexicographic order (identity first)."""
    kind, n = name[0], int(name[1:])
    elements = tuple(permutations(range(n)))
    return elements if kind == "S" else tuple(p for p in elements if _even(p))


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


@cache
def group_table(name: str) -> Tensor:
    """Multiplication table, int64 ``[n, n]``: entry ``[a, b]`` is the index of ``a b``; 0 is the identity.

    Args:
        name: a cyclic group ``"Z2"``, ``"Z60"``, …, a symmetric or alternating one up to 6 points, ``"S5"``, ``"A4"``,
            or a direct product of them, ``"A4xZ5"``. Permutations compose as ``(a b)(i) = a(b(i))``.

    Raises:
        ValueError: another name.
    """
    factors = name.split("x")
    for factor in factors:
        if not re.fullmatch(r"Z[1-9]\d*|[SA][3-6]", factor):
            raise ValueError(f"group: expected Zn, S3 to S6, A3 to A6 or a product such as A4xZ5, got {name!r}")
    table = torch.zeros(1, 1, dtype=torch.int64)
    for factor in factors:
        right = _table(factor)
        n, m = len(table), len(right)
        table = (table[:, None, :, None] * m + right[None, :, None, :]).reshape(n * m, n * m)
    return table


def _table(name: str) -> Tensor:
    if name[0] == "Z":
        n = torch.arange(int(name[1:]))
        return (n[:, None] + n) % len(n)
    elements = permutation_group(name)
    index = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[index[tuple(a[i] for i in b)] for b in elements] for a in elements])


@register_task(
    "group",
    "Merrill et al. 2024, The Illusion of State in State-Space Models (arXiv 2404.08819): uniform elements, the"
    " running product at every position",
)
class WordProblem(Task):
    """The product of all elements so far.

    Args:
        group: as in :func:`group_table`.
        generators: "all" draws from the whole group; "two" from two generators (cyclic: 0 and 1; S: the swap of the
            first two points and the rotation of all; A: a 3-cycle and the longest even rotation); "swaps" from the
            transpositions (S only).
        p_reset: chance of a reset token, one id above the elements, after which the product is the identity.
        start: begin every row with a reset token, which is not scored, as the code of Siems et al. 2025 (arXiv
            2502.10297) does: the memory is empty at first, and there is nothing in it that an element could permute.

    Raises:
        ValueError: an unknown group, or generators that it does not have.
    """

    lengths = (32, 64, 128, 256)
    examples = (
        {},
        {"group": "A5", "start": True},
        {"group": "S5", "generators": "swaps"},
        {"group": "Z60", "p_reset": 0.1},
    )

    def __init__(self, *, group: str = "S3", generators: str = "all", p_reset: float = 0.0, start: bool = False):
        self.table = group_table(group)
        self.expect(0 <= p_reset < 1, "p_reset", "a probability below 1", p_reset)
        self.group, self.p_reset, self.start = group, p_reset, start
        self.generators = torch.tensor(_generators(group, generators, len(self.table)))
        self.vocab_size = len(self.table) + (p_reset > 0 or start)
        self.chance = p_reset + (1 - p_reset) / len(self.table)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        draw = torch.randint(len(self.generators), (rows, length), generator=generator)
        tokens = self.generators[draw]
        if self.p_reset:
            reset = torch.rand(rows, length, generator=generator) < self.p_reset
            tokens = torch.where(reset, len(self.table), tokens)
        if self.start:
            tokens[:, 0] = len(self.table)
        targets = self.solve(tokens)
        if self.start:
            targets[:, 0] = IGNORE
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        n = len(self.table)
        reset = self.table.new_zeros(n, 1)  # any state, then a reset: the identity
        table = torch.cat([self.table, reset], 1).to(tokens.device)
        state, found = tokens.new_zeros(tokens.shape[0]), []
        for token in tokens.unbind(1):
            state = table[state, token]
            found.append(state)
        return torch.stack(found, 1)


def _generators(group: str, which: str, n: int) -> list[int]:
    if which == "all":
        return list(range(n))
    kind = group[0]
    if "x" in group or which not in ("two", "swaps") or (which == "swaps" and kind != "S"):
        raise ValueError(
            f"generators: expected 'all', 'two' (one factor only) or 'swaps' (S3 to S6), got {which!r} of {group}"
        )
    if kind == "Z":
        return [0, 1]
    elements = permutation_group(group)
    points = tuple(range(len(elements[0])))
    if which == "swaps":
        return [i for i, p in enumerate(elements) if sum(a != b for a, b in zip(p, points, strict=True)) == 2]
    first = (1, 0, *points[2:]) if kind == "S" else (1, 2, 0, *points[3:])
    whole = kind == "S" or len(points) % 2 == 1  # the rotation of an even number of points is odd
    rotation = (*points[1:], 0) if whole else (0, *points[2:], 1)
    return [elements.index(first), elements.index(rotation)]


@register_task(
    "swaps",
    "after the state tracking of Olmo Hybrid: values in slots, swaps of two slots, what is in the first slot now",
)
class SlotSwaps(Task):
    """A token for the content of each slot, then swaps; after each, what is in slot 0.

    Args:
        slots: number m of slots, 2 to 6. Tokens 0 … m-1 fill the slots in order, then come the m(m-1)/2 swaps.
    """

    lengths = (16, 32, 64, 128)
    examples = ({}, {"slots": 5})

    def __init__(self, *, slots: int = 3):
        self.expect(2 <= slots <= 6, "slots", "2 to 6", slots)
        self.slots = slots
        self.pairs = torch.combinations(torch.arange(slots), 2)
        self.vocab_size = slots + len(self.pairs)
        self.chance = 1 / slots

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length > self.slots, "length", f"more than {self.slots}", length)
        start = torch.arange(self.slots).expand(rows, -1)
        draw = torch.randint(len(self.pairs), (rows, length - self.slots), generator=generator)
        tokens = torch.cat([start, self.slots + draw], 1)
        content, found, row = start.clone(), [], torch.arange(rows)
        for pair in self.pairs[draw].unbind(1):
            a, b = pair.unbind(1)
            content[row, a], content[row, b] = content[row, b], content[row, a]
            found.append(content[:, 0].clone())
        targets = torch.cat([torch.full_like(start, IGNORE), torch.stack(found, 1)], 1)
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = []
        for row in tokens.tolist():
            content, found = row[: self.slots], row[: self.slots]
            for token in row[self.slots :]:
                a, b = self.pairs[token - self.slots].tolist()
                content[a], content[b] = content[b], content[a]
                found.append(content[0])
            answers.append(found)
        return torch.tensor(answers)
