"""Formal languages: parity, even pairs, cycle navigation, arithmetic, Dyck words, events in order.

The versions of Beck et al. 2024 (xLSTM, arXiv 2405.04517) and Grazzi et al. 2024 (arXiv 2411.12537), after Delétang et
al. 2022 (arXiv 2207.02098): token 0 is padding, the answer is due once, after the last token. ``dense=True`` asks for
the answer of every prefix, which is learned far sooner and is not the published protocol.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task

__all__ = ["BracketArithmetic", "CycleNavigation", "Dyck", "EvenPairs", "ModularArithmetic", "OrderedEvents", "Parity"]

_SUITE = "Delétang et al. 2022, Neural Networks and the Chomsky Hierarchy (arXiv 2207.02098), in the version of xLSTM"


class Prefix(Task):
    """A task whose answer is a function of every prefix."""

    lengths = (40, 64, 128, 256)
    examples = ({}, {"dense": False})

    def __init__(self, *, dense: bool = True):
        self.dense = dense

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """The tokens."""
        raise NotImplementedError

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        tokens = self.draw(rows, length, generator)
        targets = self.solve(tokens)
        if not self.dense:
            targets[:, :-1] = IGNORE
        return Sample(tokens, targets)


@register_task("parity", f"{_SUITE} (arXiv 2405.04517): the sum of the tokens, each less one, mod V - 1, plus one")
class Parity(Prefix):
    """Sum modulo ``modulus``: tokens 1 … modulus stand for 0 … modulus - 1, the answers likewise.

    Args:
        modulus: 2 is parity.
        dense: score every position, not only the last.
    """

    examples = ({}, {"dense": False}, {"modulus": 5})

    def __init__(self, *, modulus: int = 2, dense: bool = True):
        super().__init__(dense=dense)
        self.expect(modulus >= 2, "modulus", "at least 2", modulus)
        self.modulus, self.vocab_size, self.chance = modulus, modulus + 1, 1 / modulus

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, self.modulus + 1, (rows, length), generator=generator)

    def solve(self, tokens: Tensor) -> Tensor:
        return (tokens - 1).cumsum(1) % self.modulus + 1


@register_task("even_pairs", f"{_SUITE} (arXiv 2405.04517): 1 when the first and the last token are equal, else 2")
class EvenPairs(Prefix):
    """Tokens 1 and 2; an even number of changes, that is, whether the last token equals the first."""

    vocab_size, chance = 3, 0.5

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, 3, (rows, length), generator=generator)

    def solve(self, tokens: Tensor) -> Tensor:
        return torch.where(tokens == tokens[:, :1], 1, 2)


@register_task("cycle_navigation", f"{_SUITE} (arXiv 2405.04517): the place on a cycle after steps 0, +1 and -1")
class CycleNavigation(Prefix):
    """Tokens 1, 2, 3 stay, step forward and step back; the answer is 4 plus the place.

    Args:
        cycle: places; 6 in xLSTM, 5 in Delétang et al.
        dense: score every position, not only the last.
    """

    def __init__(self, *, cycle: int = 6, dense: bool = True):
        super().__init__(dense=dense)
        self.expect(cycle >= 2, "cycle", "at least 2", cycle)
        self.cycle, self.vocab_size, self.chance = cycle, cycle + 4, 1 / cycle

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, 4, (rows, length), generator=generator)

    def solve(self, tokens: Tensor) -> Tensor:
        step = torch.tensor([0, 0, 1, -1], device=tokens.device)[tokens]
        return step.cumsum(1) % self.cycle + 4


@register_task("modular_arithmetic", f"{_SUITE} (arXiv 2405.04517): numbers mod 5 and + - *, * first, no brackets")
class ModularArithmetic(Task):
    """``number op number … =`` and its value. Ids: 0 padding, 1 +, 2 -, 3 *, 4 =, then the numbers.

    A row of odd length begins with one padding token.

    Args:
        modulus: m; 5 in the papers.
    """

    lengths = (40, 64, 128, 256)
    examples = ({}, {"modulus": 3})

    def __init__(self, *, modulus: int = 5):
        self.expect(modulus >= 2, "modulus", "at least 2", modulus)
        self.modulus, self.vocab_size, self.chance = modulus, modulus + 5, 1 / modulus

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 2, "length", "at least 2", length)
        numbers = torch.randint(5, 5 + self.modulus, (rows, length), generator=generator)
        ops = torch.randint(1, 4, (rows, length), generator=generator)
        odd = length % 2
        tokens = torch.where((torch.arange(length) - odd) % 2 == 0, numbers, ops)
        tokens[:, :odd], tokens[:, -1] = 0, 4
        total, product, op = torch.zeros(rows).long(), torch.zeros(rows).long(), torch.ones(rows).long()
        for token in tokens[:, odd:].unbind(1):
            number, is_number = token - 5, token >= 5
            into = torch.where(op == 3, product * number, torch.where(op == 2, -number, number)) % self.modulus
            total = torch.where(is_number & (op != 3), total + product, total)
            product = torch.where(is_number, into, product)
            op = torch.where(is_number, op, token)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = 5 + (total + product) % self.modulus
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            text = "".join("_+-*="[t] if t < 5 else chr(ord("0") + t - 5) for t in row).strip("_=")
            found[-1] = 5 + sum(_terms(text, self.modulus)) % self.modulus
        return answers


def _terms(text: str, modulus: int) -> list[int]:
    """The signed products of an expression without brackets."""
    values = []
    for term in text.replace("-", "+-").split("+"):
        value = -1 if term.startswith("-") else 1
        for factor in term.removeprefix("-").split("*"):
            value *= ord(factor) - ord("0")
        values.append(value % modulus)
    return values


@register_task("bracket_arithmetic", f"{_SUITE} (arXiv 2405.04517): nested brackets, + and - (and * on request)")
class BracketArithmetic(Task):
    """A bracketed expression, ``=``, and its value. Ids: the numbers, then + - * ( ) = and padding.

    An expression of at least five tokens is ``( left op right )``, the length of ``left`` uniform; shorter ones are
    ``x``, ``-x``, ``(x)`` and ``(-x)``.

    Args:
        modulus: m; 5 in the papers.
        products: also draw ``*``.
    """

    lengths = (40, 64, 128, 256)
    examples = ({}, {"products": True})

    def __init__(self, *, modulus: int = 5, products: bool = False):
        self.expect(modulus >= 2, "modulus", "at least 2", modulus)
        self.modulus, self.vocab_size, self.chance = modulus, modulus + 7, 1 / modulus
        self.ops = 3 if products else 2

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 2, "length", "at least 2", length)
        m = self.modulus
        plus, minus, _, opening, closing, equals = range(m, m + 6)

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        def expression(n: int) -> tuple[list[int], int]:
            if n >= 5:
                size = 1 + draw(n - 4)
                left, a = expression(size)
                right, b = expression(n - size - 3)
                op = plus + draw(self.ops)
                value = a + b if op == plus else a - b if op == minus else a * b
                return [opening, *left, op, *right, closing], value % m
            x = draw(m)
            signed = [minus, x] if n in (2, 4) else [x]
            return ([opening, *signed, closing] if n > 2 else signed), (-x if n in (2, 4) else x) % m

        made = [expression(length - 1) for _ in range(rows)]
        tokens = torch.tensor([[*row, equals] for row, _ in made])
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = torch.tensor([value for _, value in made])
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        m, answers = self.modulus, torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            stack: list[tuple[int, int, int]] = []  # value so far, operator and sign outside of each open bracket
            value, op, sign, operand = 0, m, 1, True
            for token in row[:-1]:
                if token == m + 3:
                    stack.append((value, op, sign))
                    value, op, sign, operand = 0, m, 1, True
                elif m <= token < m + 3 and operand:
                    sign = -1
                elif m <= token < m + 3:
                    op, operand = token, True
                else:
                    x = token
                    if token == m + 4:
                        x = value
                        value, op, sign = stack.pop()
                    value = value + sign * x if op == m else value - sign * x if op == m + 1 else value * sign * x
                    sign, operand = 1, False
            found[-1] = value % m
        return answers


@register_task(
    "dyck",
    "Dyck-(k, D): Hewitt et al. 2020, RNNs can generate bounded hierarchical languages (arXiv 2010.07515), scored at "
    "closing brackets",
)
class Dyck(Task):
    """Well-nested brackets of ``kinds`` types up to ``depth``: before each closing bracket, its type.

    At depth 0 a bracket opens, at the greatest depth it closes, between them it does either with probability 1/2. Ids:
    ``kinds`` opening brackets, then the closing ones.

    Args:
        kinds: types of bracket.
        depth: most that are open at once.
    """

    lengths = (64, 128, 256)
    examples = ({}, {"kinds": 8, "depth": 3})

    def __init__(self, *, kinds: int = 2, depth: int = 8):
        self.expect(kinds >= 1 and depth >= 1, "kinds, depth", "at least 1", (kinds, depth))
        self.kinds, self.depth, self.vocab_size, self.chance = kinds, depth, 2 * kinds, 1 / kinds

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 2, "length", "at least 2", length)
        coin = torch.rand(rows, length + 1, generator=generator)
        kind = torch.randint(self.kinds, (rows, length + 1), generator=generator)
        stack, level, row = torch.zeros(rows, self.depth).long(), torch.zeros(rows).long(), torch.arange(rows)
        tokens = []
        for t in range(length + 1):
            opens = (level == 0) | ((level < self.depth) & (coin[:, t] < 0.5))
            top = (level - 1).clamp(min=0)
            tokens.append(torch.where(opens, kind[:, t], self.kinds + stack[row, top]))
            at = level.clamp(max=self.depth - 1)
            stack[row, at] = torch.where(opens, kind[:, t], stack[row, at])
            level = level + torch.where(opens, 1, -1)
        both = torch.stack(tokens, 1)
        closes = both[:, 1:] >= self.kinds
        return Sample(both[:, :-1], torch.where(closes, both[:, 1:], IGNORE))

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            stack = []
            for t, token in enumerate(row):
                if token < self.kinds:
                    stack.append(token)
                else:
                    stack.pop()
                found[t] = self.kinds + stack[-1] if stack else 0
        return answers


@register_task(
    "ordered_events",
    "after Ronca 2026, MinMax Recurrent Neural Cascades (arXiv 2605.06384), 'sequences': which of two are complete",
)
class OrderedEvents(Task):
    """Two sequences of ``n`` events, each in order: at every position, which of them are complete.

    An event counts when it is the next one of its sequence and is ignored otherwise; a reset begins its sequence anew.
    The language is star-free: it takes flip-flops one behind another, and no counting. Ids: ``4 n`` events (by
    sequence, event, and which of its two synonyms), 2 resets, 10 distractors. Answers are 0 to 3, a bit a sequence.

    Args:
        k: 1 to 5, for n = 2, 3, 4, 8 or 16.
        p_set: chance of an event at a position.
        p_reset: chance of a reset; a distractor otherwise.
    """

    lengths = (64, 256, 1024)
    examples = ({}, {"k": 3, "p_reset": 0.002})

    def __init__(self, *, k: int = 1, p_set: float = 0.5, p_reset: float = 0.02):
        self.expect(1 <= k <= 5, "k", "1 to 5", k)
        possible = min(p_set, p_reset) >= 0 and p_set + p_reset <= 1
        self.expect(possible, "p_set, p_reset", "probabilities with a sum of at most 1", (p_set, p_reset))
        self.events, self.p_set, self.p_reset = (2, 3, 4, 8, 16)[k - 1], p_set, p_reset
        self.resets = 4 * self.events
        self.vocab_size = self.resets + 12
        step, reset = p_set / (2 * self.events), p_reset / 2
        complete = (step / (step + reset)) ** self.events if step else 0.0  # of long rows
        self.chance = max(complete, 1 - complete) ** 2

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        draw = torch.rand(rows, length, generator=generator)
        event, reset, distractor = (
            first + torch.randint(count, (rows, length), generator=generator)
            for first, count in ((0, self.resets), (self.resets, 2), (self.resets + 2, 10))
        )
        quiet = torch.where(draw < self.p_set + self.p_reset, reset, distractor)
        tokens = torch.where(draw < self.p_set, event, quiet)
        return Sample(tokens, self.solve(tokens))

    def solve(self, tokens: Tensor) -> Tensor:
        at, answers = torch.arange(tokens.shape[1]).expand_as(tokens), torch.zeros_like(tokens)
        for i in range(2):
            begun = at.where(tokens == self.resets + i, -1).cummax(1).values
            done = torch.ones_like(tokens, dtype=torch.bool)  # up to the event before, since the last reset
            for j in range(self.events):
                next_one = (tokens // 2 == i * self.events + j) & done.roll(1, 1)
                if j:
                    next_one[:, 0] = False
                done = at.where(next_one, -1).cummax(1).values > begun
            answers += done << i
        return answers
