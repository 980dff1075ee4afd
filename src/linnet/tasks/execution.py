"""Running small programs: pointers that are swapped and followed, products of matrices, paths in a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task
from .recall import distinct

__all__ = ["MatrixProduct", "Reachability", "StateRecall"]


@register_task(
    "state_recall",
    "the state-based recall of Olmo Hybrid, in small: bits, pointers to them, swaps; the bit under the first pointer",
)
class StateRecall(Task):
    """Bits in order of address, pointers (each an address), then swaps of two pointers; after each the bit that pointer
    0 points to. Needs both: the swaps are state tracking, the bits are recall.

    Positions hold two tokens at once. Ids: the answers and bit values 0 and 1, addresses, pointers, swaps.

    Args:
        bits: how many, n.
        pointers: how many, with different addresses.
    """

    lengths = (35, 51, 83)
    examples = ({}, {"bits": 8, "pointers": 5})

    def __init__(self, *, bits: int = 16, pointers: int = 3):
        self.expect(2 <= pointers <= bits, "pointers", f"2 to bits={bits}", pointers)
        self.bits, self.pointers = bits, pointers
        self.pairs = torch.combinations(torch.arange(pointers), 2)
        self.vocab_size = 2 + bits + pointers + len(self.pairs)
        self.chance = 0.5

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        swaps = length - self.bits - self.pointers
        self.expect(swaps >= 1, "length", f"more than {self.bits + self.pointers}", length)
        bit = torch.randint(2, (rows, self.bits), generator=generator)
        address = distinct(rows, self.pointers, self.bits, generator)
        draw = torch.randint(len(self.pairs), (rows, swaps), generator=generator)

        def hot(ids: Tensor) -> Tensor:
            return F.one_hot(ids.expand(rows, -1), self.vocab_size)

        written = hot(bit) + hot(2 + torch.arange(self.bits))
        pointed = hot(2 + address) + hot(2 + self.bits + torch.arange(self.pointers))
        tokens = torch.cat([written, pointed, hot(2 + self.bits + self.pointers + draw)], 1).float()
        targets = torch.full((rows, length), IGNORE)
        row = torch.arange(rows)
        for t in range(swaps):
            a, b = self.pairs[draw[:, t]].unbind(1)
            address[row, a], address[row, b] = address[row, b], address[row, a]
            targets[:, self.bits + self.pointers + t] = bit[row, address[:, 0]]
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros(tokens.shape[:2], dtype=torch.int64)
        first = 2 + self.bits + self.pointers
        for row, found in zip(tokens, answers, strict=True):
            memory, address = {}, {}
            for t, position in enumerate(row):
                here = position.nonzero().flatten().tolist()
                if here[0] < 2:
                    memory[here[1] - 2] = here[0]
                elif here[-1] < first:
                    address[here[1] - 2 - self.bits] = here[0] - 2
                else:
                    a, b = self.pairs[here[0] - first].tolist()
                    address[a], address[b] = address[b], address[a]
                    found[t] = memory[address[0]]
        return answers


@register_task(
    "matrix_product", "iterated 3x3 multiplication of Merrill et al. 2026 (arXiv 2603.03612), asked after every matrix"
)
class MatrixProduct(Task):
    """3x3 matrices over Z_m, nine entries each, row by row; after each matrix the first entry of the product so far.

    Entries of ``M_t … M_2 M_1``. A row that is no multiple of nine long ends within a matrix.

    Args:
        modulus: m.
    """

    lengths = (90, 180, 360)
    examples = ({}, {"modulus": 3})

    def __init__(self, *, modulus: int = 2):
        self.expect(modulus >= 2, "modulus", "at least 2", modulus)
        self.modulus = self.vocab_size = modulus
        self.chance = 1 / modulus

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 9, "length", "at least 9", length)
        count = -(-length // 9)
        matrices = torch.randint(self.modulus, (rows, count, 3, 3), generator=generator)
        # Singular matrices would soon make every product zero: all are invertible (lower times upper unitriangular).
        lower, upper = matrices.tril(-1) + torch.eye(3).long(), matrices.triu(1) + torch.eye(3).long()
        matrices = (lower @ upper) % self.modulus
        product, targets = torch.eye(3).long().expand(rows, -1, -1), torch.full((rows, 9 * count), IGNORE)
        for t in range(count):
            product = matrices[:, t] @ product % self.modulus
            targets[:, 9 * t + 8] = product[:, 0, 0]
        return Sample(matrices.flatten(1)[:, :length], targets[:, :length])

    def solve(self, tokens: Tensor) -> Tensor:
        answers, m = torch.zeros_like(tokens), self.modulus
        for row, found in zip(tokens.tolist(), answers, strict=True):
            product = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
            for t in range(0, len(row) - 8, 9):
                M = [row[t + 3 * i : t + 3 * i + 3] for i in range(3)]
                product = [[sum(M[i][k] * product[k][j] for k in range(3)) % m for j in range(3)] for i in range(3)]
                found[t + 8] = product[0][0]
        return answers


@register_task(
    "reachability",
    "sorted deterministic graph connectivity of Merrill et al. 2026 (arXiv 2603.03612), drawn so that the end points"
    " give nothing away",
)
class Reachability(Task):
    """Every node with the one it leads to (or itself), in order, then two nodes: does a path lead from one to the
    other?

    Each node has a colour and leads to the next node of its colour, so every colour is a chain; some edges are missing.
    The source lies in the first third and has an edge, the target in the last third and is reached by one; half of the
    answers are yes. A row of T positions has ``T / 2 - 1`` nodes. Ids: the answers 0 and 1, then the nodes.

    Args:
        colours: chains.
        p_drop: chance that an edge is missing.
        max_nodes: ids for nodes.
    """

    lengths = (62, 122, 202)
    examples = ({},)

    def __init__(self, *, colours: int = 3, p_drop: float = 0.08, max_nodes: int = 100):
        self.expect(colours >= 2 and 0 <= p_drop < 1, "colours, p_drop", "at least 2, a probability", (colours, p_drop))
        self.colours, self.p_drop, self.max_nodes = colours, p_drop, max_nodes
        self.vocab_size, self.chance = 2 + max_nodes, 0.5

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        nodes = length // 2 - 1
        fits = length % 2 == 0 and 9 <= nodes <= self.max_nodes
        self.expect(fits, "length", f"an even number from 20 to {2 * self.max_nodes + 2}", length)
        tokens, answers = [], []
        while len(tokens) < rows:
            colour = torch.randint(self.colours, (nodes,), generator=generator).tolist()
            dropped = (torch.rand(nodes, generator=generator) < self.p_drop).tolist()
            after = list(range(nodes))
            for i in range(nodes):
                following = [j for j in range(i + 1, nodes) if colour[j] == colour[i]]
                if following and not dropped[i]:
                    after[i] = following[0]
            sources = [i for i in range(nodes // 3) if after[i] != i]
            reached = {after[i] for i in range(nodes) if after[i] != i}
            ends = [j for j in range(nodes - nodes // 3, nodes) if j in reached]
            if not sources:
                continue
            source = sources[int(torch.randint(len(sources), (), generator=generator))]
            path = {source}
            at = source
            while after[at] != at:
                at = after[at]
                path.add(at)
            wanted = int(torch.randint(2, (), generator=generator))
            kinds = [[j for j in ends if (j in path) == bool(answer)] for answer in (0, 1)]
            if not kinds[0] or not kinds[1]:
                continue  # whichever answer is wanted, so that the other one is not rarer
            target = kinds[wanted][int(torch.randint(len(kinds[wanted]), (), generator=generator))]
            edges = [2 + node for i in range(nodes) for node in (i, after[i])]
            tokens.append([*edges, 2 + source, 2 + target])
            answers.append(wanted)
        targets = torch.full((rows, length), IGNORE)
        targets[:, -1] = torch.tensor(answers)
        return Sample(torch.tensor(tokens), targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            current, target = row[-2], row[-1]
            for i in range(0, len(row) - 2, 2):  # one pass: edges are sorted
                if row[i] == current and current != target:
                    current = row[i + 1]
            found[-1] = int(current == target)
        return answers
