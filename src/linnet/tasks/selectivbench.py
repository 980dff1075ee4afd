"""SelectivBench: name the hidden state of a random automaton, or the odds of its next symbol, while blanks, noise or
distractors intervene.

Bouhadjar et al. 2026, "Dissecting Linear Recurrent Models" (arXiv 2601.12598); grammars and complexity measures of
SymSeqBench (arXiv 2512.24977). Test rows are drawn apart from training rows, which the released pipeline does not do.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task, seeded

__all__ = ["Grammar", "SelectivBench", "compressibility", "kgram_entropy", "lzw_complexity"]

END = 0  # the symbol '#' and the state it leads to


class Grammar:
    """A random unifilar grammar: letters with hidden instances; state and symbol settle the next state.

    From every state and for every letter one instance of the letter is chosen, and the edge to it is kept with
    probability ``density``; the edge to the end marker with ``density / depth``. Edges are equiprobable. Four different
    start states. Drawn anew until the end can be reached from every state.

    Args:
        letters: A; instances of each letter are as many.
        density: 0.4 in the paper.
        longest: strings of more elements, the end marker included, do not occur; 200 in the paper.
        seed: which grammar.

    Attributes:
        states: A² + 1; state 0 is the end, ``1 + letter · A + instance`` the others; the symbol of a letter is 1 + it.
        successor: int64 ``[states, A + 1]``: the state after a symbol; -1 where there is no edge.
        starts: int64 ``[4]``.
        reach: float64 ``[longest, states]``: entry ``[r, s]`` is the probability to end within r further elements.

    Raises:
        ValueError: fewer than 2 letters, or a density outside (0, 1].
    """

    def __init__(self, letters: int, *, density: float = 0.4, longest: int = 200, seed: int = 0):
        if letters < 2 or not 0 < density <= 1 or longest < 2:
            raise ValueError(
                "letters, density, longest: expected at least 2, a share above 0 and at least 2, got "
                f"{letters}, {density}, {longest}"
            )
        self.letters, self.longest = letters, longest
        self.states = letters**2 + 1
        generator = seeded(seed)
        while True:
            shape = (self.states, letters)
            instance = torch.randint(letters, shape, generator=generator)
            state = 1 + torch.arange(letters) * letters + instance
            kept = torch.rand(shape, generator=generator) < density
            ends = torch.rand(self.states, 1, generator=generator) < density / letters
            self.successor = torch.cat([torch.where(ends, END, -1), torch.where(kept, state, -1)], 1)
            self.successor[END] = -1
            if self._ends_everywhere():
                break
        self.starts = 1 + torch.randperm(self.states - 1, generator=generator)[:4]
        edges = (self.successor >= 0).double()
        self.edge = edges / edges.sum(1, keepdim=True).clamp(min=1)
        self.reach = torch.zeros(longest, self.states, dtype=torch.float64)
        self.reach[:, END] = 1
        for r in range(1, longest):
            after = self.reach[r - 1][self.successor.clamp(min=0)]
            self.reach[r, 1:] = (self.edge * after).sum(1)[1:]

    def _ends_everywhere(self) -> bool:
        good = torch.zeros(self.states, dtype=torch.bool)
        good[END] = True
        while True:
            more = good | ((self.successor >= 0) & good[self.successor.clamp(min=0)]).any(1)
            if torch.equal(more, good):
                return bool(good.all())
            good = more

    def symbol(self, state: Tensor) -> Tensor:
        """The symbol that leads to a state."""
        return torch.where(state == END, END, (state - 1) // self.letters + 1)

    def next_symbol(self) -> Tensor:
        """Probability of each symbol after each state, float64 ``[states, A + 1]``, whatever the length of the string.
        No edge leaves the end; what is said to follow it is the end."""
        after = self.edge.clone()
        after[END, END] = 1
        return after

    def strings(self, rows: int, elements: int, generator: torch.Generator) -> Tensor:
        """States of strings end to end, cut to ``elements``: int64 ``[rows, elements]``.

        A string is a walk to the end marker that is not longer than ``longest``. It is drawn without rejection: a step
        is weighted with the probability that the walk still ends in time (Doob's h-transform).
        """
        start = self.reach[-1][self.starts]
        state, left, found = torch.zeros(rows).long(), torch.zeros(rows).long(), []
        for _ in range(elements):
            first = self.starts[torch.multinomial(start.expand(rows, -1), 1, generator=generator)[:, 0]]
            after = self.successor[state]
            weight = self.edge[state] * self.reach[(left - 1).clamp(min=0).unsqueeze(1), after.clamp(min=0)]
            begins = state == END
            weight[begins, 0] = 1
            step = torch.multinomial(weight, 1, generator=generator)
            state = torch.where(begins, first, after.gather(1, step)[:, 0])
            left = torch.where(begins, self.longest - 1, left - 1)
            found.append(state)
        return torch.stack(found, 1)

    def entropy(self) -> float:
        """Topological entropy in nats: log of the largest eigenvalue of the graph, the end leading to the starts."""
        graph = torch.zeros(self.states, self.states, dtype=torch.float64)
        source, symbol = (self.successor >= 0).nonzero(as_tuple=True)
        graph[source, self.successor[source, symbol]] = 1
        graph[END, self.starts] = 1
        return math.log(float(torch.linalg.eigvals(graph).abs().max()))


def kgram_entropy(symbols: Sequence[int], longest: int = 15) -> float:
    """Topological entropy of an observed sequence in nats ("lift"): of the graph of its k-grams, k growing until the
    increment rounds to 0.0."""
    value = math.nan
    for k in range(1, longest + 1):
        grams = [tuple(symbols[i : i + k]) for i in range(len(symbols) - k + 1)]
        index = {gram: i for i, gram in enumerate(dict.fromkeys(grams))}
        graph = torch.zeros(len(index), len(index), dtype=torch.float64)
        for a, b in pairwise(grams):
            graph[index[a], index[b]] = 1
        radius = float(torch.linalg.eigvals(graph).abs().max())
        before, value = value, math.log(radius) if radius > 0 else -math.inf
        if math.isinf(value) or round(value - before, 1) == 0.0:
            break
    return value


def compressibility(symbols: Sequence[int]) -> float:
    """Bytes of gzip per symbol (symbols below 256)."""
    return len(gzip.compress(bytes(symbols), mtime=0)) / len(symbols)


def lzw_complexity(symbols: Sequence[int]) -> float:
    """Codes that LZW emits per symbol, from an initial dictionary of 256 characters."""
    known: set[tuple[int, ...]] = {(i,) for i in range(256)}
    current: tuple[int, ...] = ()
    codes = 0
    for symbol in symbols:
        longer = (*current, symbol)
        if longer in known:
            current = longer
        else:
            codes += 1
            known.add(longer)
            current = (symbol,)
    return (codes + bool(current)) / len(symbols)


@register_task("selectivbench", "Bouhadjar et al. 2026, Dissecting Linear Recurrent Models (arXiv 2601.12598)")
class SelectivBench(Task):
    """The hidden state of a grammar after each element, or the next symbol, through what stands between the elements.

    A row holds ``length`` elements; blanks and distractors come on top. All positions are scored, those after an
    element with its state, and an element is judged by the sum of the probabilities over its positions.

    The paper's tasks (``letters=40``, 200 elements): 1 ``gap="1"`` (and other numbers of letters); 2
    ``gap="1-10", noise=0.2``, tested with ``gap="10"``; 3 ``distractors=0.1, quiet=50``; 4 the models of task 2 with
    ``gap="20"``, ``"50"`` and ``"100"``.

    With ``target="symbol"`` the answer is the symbol of the next element instead. It is drawn by chance, so a model is
    judged by the divergence of its odds from those of the grammar, in the mean over all positions. As in the released
    code, the end is said to follow the end, and the odds do not know that no string is longer than ``longest``: where
    many would be, a perfect model stays above 0 too. Unlike there, the last element is not scored.

    Args:
        letters: A. There are A + 1 symbols and A² + 1 classes.
        target: "state", or "symbol".
        gap: blanks after each element: a number, or ``"a-b"`` for a random number (a duration uniform between the two,
            rounded, so that both ends are half as likely as the rest). Blanks are zero vectors.
        noise: this times a uniform number is added to every entry of every input.
        distractors: chance that a symbol follows that cannot come at this place.
        quiet: elements at the beginning without distractors.
        density, longest, grammar_seed: see :class:`Grammar`.

    Raises:
        ValueError: an option outside its range.
    """

    lengths = (64,)
    examples = (
        {"letters": 6, "grammar_seed": 3},
        {"letters": 6, "gap": "1-10", "noise": 0.2, "grammar_seed": 3},
        {"letters": 6, "gap": "0", "distractors": 0.2, "quiet": 8, "grammar_seed": 3},
        {"letters": 6, "target": "symbol", "gap": "0-2", "grammar_seed": 3},
        {"letters": 6, "target": "symbol", "gap": "0", "distractors": 0.2, "quiet": 8, "grammar_seed": 3},
    )
    causal = False  # which of two starts with the same letter it was shows later, and the next symbol comes later

    def __init__(
        self,
        *,
        letters: int = 10,
        target: str = "state",
        gap: str = "1",
        noise: float = 0.0,
        distractors: float = 0.0,
        quiet: int = 50,
        density: float = 0.4,
        longest: int = 200,
        grammar_seed: int = 0,
    ):
        self.expect(target in ("state", "symbol"), "target", "'state' or 'symbol'", target)
        low, _, high = str(gap).partition("-")
        known = low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)
        self.expect(known, "gap", "a number of blanks, or two as in '1-10'", gap)
        self.low, self.high = int(low), int(high or low)
        self.expect(noise >= 0 and 0 <= distractors <= 1, "noise, distractors", "shares", (noise, distractors))
        single = not (distractors and self.high)
        self.expect(single, "distractors", "gap='0' beside distractors, which take the place of blanks", gap)
        self.expect(noise < 0.5, "noise", "less than 0.5", noise)
        self.noise, self.distractors, self.quiet = noise, distractors, quiet
        self.grammar = Grammar(letters, density=density, longest=longest, seed=grammar_seed)
        self.drawn, self.chance = target == "symbol", 1 / letters
        self.vocab_size = letters + 1 if self.drawn else self.grammar.states

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        grammar = self.grammar
        states = grammar.strings(rows, length, generator)
        gaps = self._gaps(rows, length, generator)
        # Position p of a row belongs to the last element at or before it.
        start = F.pad((1 + gaps).cumsum(1), (1, 0))[:, :-1]
        total = int((1 + gaps).sum(1).max())
        element = torch.zeros(rows, total, dtype=torch.int64)
        element.scatter_(1, start, 1)
        element = element.cumsum(1) - 1
        position = torch.arange(total)
        own = start.gather(1, element) == position
        inside = position < (1 + gaps).sum(1, keepdim=True)
        here, answers, probabilities = states.gather(1, element), states, None
        if self.drawn:
            probabilities = grammar.next_symbol()[here].float()
            follows = torch.where(states[:, :-1] == END, END, grammar.symbol(states[:, 1:]))
            answers = F.pad(follows, (0, 1), value=IGNORE)
        targets = torch.where(inside, answers.gather(1, element), IGNORE)
        symbol = grammar.symbol(states).gather(1, element)
        shown = own & inside
        if self.distractors:
            legal = grammar.successor >= 0
            legal[END, grammar.symbol(grammar.starts)] = True
            foreign = torch.multinomial((~legal[here]).flatten(0, 1).double(), 1, generator=generator).view(rows, total)
            symbol, shown = torch.where(own, symbol, foreign), inside
        tokens = F.one_hot(symbol, grammar.letters + 1) * shown.unsqueeze(2).float()
        if self.noise:
            tokens = tokens + self.noise * torch.rand(tokens.shape, generator=generator)
        return Sample(tokens, targets, element, probabilities)

    def _gaps(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Positions after each element."""
        draw = torch.rand(rows, length, generator=generator)
        if self.distractors:
            return ((draw < self.distractors) & (torch.arange(length) >= self.quiet)).long()
        return (self.low + draw * (self.high - self.low)).round().long()

    def solve(self, tokens: Tensor) -> Tensor:
        """Runs the automaton. A distractor is a symbol without an edge; which of several starts it was, and whether a
        symbol was a distractor, is settled by all that follows."""
        grammar = self.grammar
        read = torch.where(tokens.amax(2) >= 0.5, tokens.argmax(2), -1)
        answers = torch.zeros(tokens.shape[:2], dtype=torch.int64)
        for row, found in zip(read.tolist(), answers, strict=True):
            path: list[dict[int, int]] = []  # for each position the states it may be in, each with the one before
            here = {END: END}
            for symbol in row:
                after: dict[int, int] = {}
                for state in here:
                    if symbol < 0:
                        after.setdefault(state, state)
                        continue
                    options = grammar.starts.tolist() if state == END else [int(grammar.successor[state, symbol])]
                    legal = [s for s in options if s >= 0 and int(grammar.symbol(torch.tensor(s))) == symbol]
                    for other in legal:
                        after.setdefault(other, state)
                    if self.distractors and not legal:
                        after.setdefault(state, state)
                path.append(after)
                here = after
            state, following = next(iter(here)), END
            for t in reversed(range(len(path))):
                before, symbol = path[t][state], row[t]
                found[t] = state if not self.drawn else END if state == END else following
                edge = grammar.starts.tolist() if before == END else [int(grammar.successor[before, symbol])]
                if symbol >= 0 and state in edge:  # neither a blank nor a distractor
                    following = symbol
                state = before
        return answers
