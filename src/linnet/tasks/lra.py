"""ListOps of the Long Range Arena, and a Pathfinder that is drawn here."""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task

__all__ = ["ListOps", "Pathfinder"]

OPERATORS = {10: min, 11: max, 12: lambda x: int(median(x)), 13: lambda x: sum(x) % 10}  # MIN, MAX, MED, SM
CLOSE, PAD = 14, 15


@register_task(
    "listops",
    "Tay et al. 2020, Long Range Arena (arXiv 2011.04006), after Nangia & Bowman 2018: nested list operations",
)
class ListOps(Task):
    """Nested MIN, MAX, MED and SM (sum mod 10) over digits; the value, after the last bracket.

    A tree is a digit with probability 0.75, at the greatest depth always, else an operator with 2 to ``max_args``
    arguments; kept are trees of more than a quarter and less than all of the row's positions: with rows of 2,000 the
    paper's data. Ids: the digits, 10 … 13 operators, 14 the closing bracket, 15 padding on the right.

    Args:
        max_depth, max_args: 10 and 10 in the paper.
    """

    lengths = (128, 512, 2000)
    examples = ({}, {"max_depth": 4, "max_args": 5})
    vocab_size, chance = 16, 0.171  # the most frequent value

    def __init__(self, *, max_depth: int = 10, max_args: int = 10):
        self.expect(max_depth >= 2 and max_args >= 2, "max_depth, max_args", "at least 2", (max_depth, max_args))
        self.max_depth, self.max_args = max_depth, max_args

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 16, "length", "at least 16", length)
        rolls = iter(())

        def roll() -> float:
            nonlocal rolls
            for value in rolls:
                return value
            rolls = iter(torch.rand(4096, generator=generator).tolist())
            return next(rolls)

        def tree(depth: int, out: list[int]) -> int:
            if len(out) > length:
                return 0  # too long already
            if depth >= self.max_depth or (depth > 1 and roll() > 0.25):
                out.append(int(10 * roll()))
                return out[-1]
            operator = 10 + int(4 * roll())
            out.append(operator)
            values = [tree(depth + 1, out) for _ in range(2 + int((self.max_args - 1) * roll()))]
            out.append(CLOSE)
            return OPERATORS[operator](values)

        tokens, targets = torch.full((rows, length), PAD), torch.full((rows, length), IGNORE)
        for n in range(rows):
            while True:
                out: list[int] = []
                value = tree(1, out)
                if length / 4 < len(out) < length:
                    break
            tokens[n, : len(out)] = torch.tensor(out)
            targets[n, len(out) - 1] = value
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            stack: list[list[int]] = [[]]
            for t, token in enumerate(row):
                if token == PAD:
                    break
                if token == CLOSE:
                    operator, *values = stack.pop()
                    token = OPERATORS[operator](values)
                    found[t] = token
                    stack[-1].append(token)
                elif token >= 10:
                    stack.append([token])
                else:
                    stack[-1].append(token)
        return answers


@register_task(
    "pathfinder",
    "after Linsley et al. 2018 and the Long Range Arena (arXiv 2011.04006): drawn here, so not comparable with their "
    "figures",
)
class Pathfinder(Task):
    """An image of dashed curves, pixel by pixel, and two discs: do they lie at the ends of the same curve?

    Ids: 0 background, 1 a dash, 2 a disc; the answer, 0 or 1, is due at the last pixel. A row of T positions is an
    image of the side √T.

    Args:
        curves: how many, at least 2. Pixels of different curves are at least 6 apart.
        dashes: dashes of three pixels a curve, two pixels apart; each turns by up to 20 degrees.
    """

    lengths = (1024,)
    vocab_size, chance = 3, 0.5

    def __init__(self, *, curves: int = 2, dashes: int = 4):
        self.expect(curves >= 2 and dashes >= 2, "curves, dashes", "at least 2", (curves, dashes))
        self.curves, self.dashes = curves, dashes

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        side = math.isqrt(length)
        self.expect(side * side == length and side >= 24, "length", "a square of at least 24 x 24", length)
        answers = torch.randint(2, (rows,), generator=generator)
        targets = torch.full((rows, length), IGNORE)
        targets[:, -1] = answers
        images = [self._draw(side, bool(answer), generator) for answer in answers.tolist()]
        return Sample(torch.stack(images).flatten(1), targets)

    def _draw(self, side: int, same: bool, generator: torch.Generator) -> Tensor:
        while True:
            image, taken, ends = torch.zeros(side, side, dtype=torch.int64), [], []
            for _ in range(50 * self.curves):
                pixels = self._curve(side, generator)
                if pixels and all(max(abs(y - v), abs(x - u)) >= 6 for y, x in pixels for v, u in taken):
                    taken += pixels
                    ends.append((pixels[0], pixels[-1]))
                if len(ends) == self.curves:
                    break
            else:
                continue  # no room is left: begin again
            for y, x in taken:
                image[y, x] = 1
            for y, x in ends[0] if same else (ends[0][0], ends[1][1]):
                image[y - 1 : y + 2, x - 1 : x + 2] = 2
            return image

    def _curve(self, side: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Pixels of a random curve; none when it leaves the image."""
        draw = torch.rand(3 + self.dashes, generator=generator).tolist()
        y, x = 2 + draw[0] * (side - 5), 2 + draw[1] * (side - 5)
        heading, pixels = 2 * math.pi * draw[2], []
        for turn in draw[3:]:
            for step in range(5):
                if not (2 <= y <= side - 3 and 2 <= x <= side - 3):
                    return []
                if step < 3:
                    pixels.append((round(y), round(x)))
                y, x = y + math.sin(heading), x + math.cos(heading)
            heading += math.radians(40 * turn - 20)
        return pixels

    def solve(self, tokens: Tensor) -> Tensor:
        """Pixels at most 3 apart belong together."""
        answers = torch.zeros_like(tokens)
        side = math.isqrt(tokens.shape[1])
        for row, found in zip(tokens, answers, strict=True):
            image = row.view(side, side)
            lit = [(int(y), int(x)) for y, x in image.nonzero()]
            discs = [p for p in lit if image[p] == 2]
            reached, front = {discs[0]}, [discs[0]]
            while front:
                y, x = front.pop()
                near = [p for p in lit if p not in reached and max(abs(p[0] - y), abs(p[1] - x)) <= 3]
                reached.update(near)
                front += near
            found[-1] = int(all(disc in reached for disc in discs))
        return answers
