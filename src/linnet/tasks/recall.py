"""Recall: multi-query associative recall, overwriting, induction heads and their hops, copying, palindromes, stacks,
latching, one position of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task

__all__ = [
    "MQAR",
    "Copy",
    "Hops",
    "InductionHeads",
    "KeepNth",
    "Latching",
    "Palindrome",
    "Recall",
    "SelectiveCopy",
    "Stacks",
    "distinct",
]


def distinct(rows: int, count: int, high: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``high`` in each row, in random order."""
    if count * count > 2 * high:
        return torch.rand(rows, high, generator=generator).topk(count, 1).indices
    # A third of the rows or more come out without repetition, evenly among all such rows; the others are drawn again.
    found = torch.randint(high, (rows, count), generator=generator)
    while True:
        ordered = found.sort(1).values
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not again.any():
            return found
        found[again] = torch.randint(high, (int(again.sum()), count), generator=generator)


@register_task(
    "mqar",
    "Arora et al. 2023, Zoology (arXiv 2312.04927): multi-query associative recall, with its power-law distances",
)
class MQAR(Task):
    """Pairs of a key and a value, then the keys again at power-law distances among fill; each asks for its value.

    Keys are 1 … V/2-1, values V/2 … V-1, both without repetition. Of the ``(T - 2n) / 2`` slots after the context,
    query slots are drawn without replacement with probability proportional to ``i^(power - 1)``.

    Args:
        pairs: n.
        tokens_per_pair: makes n the length of a row divided by it instead, so that rows of several lengths are equally
            full; at least 4.
        vocab_size: V; 8192 in the paper.
        power: 0.01 in the paper, which puts most queries right behind the context; 1 is uniform.
        fill: fill the rest with random tokens; otherwise with token 0.
        updates: so many of the keys come again in the context with a new value; the last one counts.
    """

    lengths = (64, 128, 256)
    examples = (
        {"vocab_size": 512},
        {"vocab_size": 64, "pairs": 6, "updates": 4, "fill": False, "power": 1.0},
        {"vocab_size": 512, "tokens_per_pair": 8, "fill": False},
    )

    def __init__(
        self,
        *,
        pairs: int = 4,
        tokens_per_pair: int | None = None,
        vocab_size: int = 8192,
        power: float = 0.01,
        fill: bool = True,
        updates: int = 0,
    ):
        self.expect(pairs >= 1, "pairs", "at least 1", pairs)
        fits = vocab_size % 2 == 0 and pairs + updates < vocab_size // 2
        self.expect(fits, "vocab_size", f"an even number above {2 * (pairs + updates)}", vocab_size)
        self.expect(0 <= updates <= pairs, "updates", f"0 to pairs={pairs}", updates)
        self.expect(power > 0, "power", "more than 0", power)
        alone = tokens_per_pair is None or (tokens_per_pair >= 4 and updates == 0)
        self.expect(alone, "tokens_per_pair", "at least 4, without updates", tokens_per_pair)
        self.pairs, self.vocab_size, self.power, self.fill, self.updates = pairs, vocab_size, power, fill, updates
        self.tokens_per_pair = tokens_per_pair
        self.chance = 2 / vocab_size

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        half = self.vocab_size // 2
        pairs = self.pairs if self.tokens_per_pair is None else length // self.tokens_per_pair
        n = pairs + self.updates
        slots = (length - 2 * n) // 2
        self.expect(slots >= pairs >= 1, "length", f"at least {self.tokens_per_pair or 2 * n + 2 * pairs}", length)
        self.expect(pairs < half, "length", f"at most {half - 1} pairs", length)
        keys = 1 + distinct(rows, pairs, half - 1, generator)
        again = keys.gather(1, distinct(rows, self.updates, pairs, generator))
        values = half + distinct(rows, n, half, generator)
        context = torch.stack([torch.cat([keys, again], 1), values], 2).flatten(1)
        # Successive draws without replacement: the largest of log p + Gumbel noise.
        rank = torch.arange(1, slots + 1, dtype=torch.float64)
        noise = -torch.rand(rows, slots, generator=generator, dtype=torch.float64).log().neg().log()
        at = ((self.power - 1) * rank.log() + noise).topk(pairs, 1).indices
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        if self.fill:
            tokens = torch.randint(self.vocab_size, (rows, length), generator=generator)
        tokens[:, : 2 * n] = context
        targets = torch.full_like(tokens, IGNORE)
        tokens.scatter_(1, 2 * n + 2 * at, keys)
        return Sample(tokens, targets.scatter_(1, 2 * n + 2 * at, self._look_up(context, keys)))

    def _look_up(self, context: Tensor, keys: Tensor) -> Tensor:
        """The value last paired with each key of ``[B, N]``; 0 for other tokens."""
        known, values = context[:, 0::2], context[:, 1::2]
        hit = keys.unsqueeze(2) == known.unsqueeze(1)
        last = torch.where(hit, torch.arange(1, known.shape[1] + 1), 0).amax(2)
        return F.pad(values, (1, 0)).gather(1, last)

    def solve(self, tokens: Tensor) -> Tensor:
        if self.tokens_per_pair is None:
            return self._look_up(tokens[:, : 2 * (self.pairs + self.updates)], tokens)
        # A part of a row does not show where its context ends; of what looks like a pair the first one counts.
        pairs = tokens[:, : tokens.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        return self._look_up(pairs.flip(1).flatten(1), tokens)


@register_task(
    "recall",
    "key and value in one token, in the manner of Yang et al. 2024, Parallelizing Linear Transformers with the Delta "
    "Rule (arXiv 2406.06484): the last value written to a key",
)
class Recall(Task):
    """Each writing position holds a key and a value at once (the sum of their embeddings), then some keys are asked
    for.

    Ids: the values, an "ask" token, the keys; with ``separate`` the keys once more, as questions without "ask".

    Args:
        keys, values: how many there are.
        queries: questions at the end of a row; a row of T positions writes T - queries times.
        unique: no key is written twice (and none asked twice); otherwise keys are uniform, and so are overwritten.
        separate: questions have embeddings of their own.
    """

    lengths = (40,)
    examples = ({}, {"keys": 64, "unique": True}, {"keys": 64, "values": 64, "unique": True, "separate": True})

    def __init__(
        self, *, keys: int = 12, values: int = 16, queries: int = 8, unique: bool = False, separate: bool = False
    ):
        self.expect(min(keys, values, queries) >= 1, "keys, values, queries", "at least 1", (keys, values, queries))
        self.keys, self.values, self.queries, self.unique, self.separate = keys, values, queries, unique, separate
        self.vocab_size = values + 1 + keys * (1 + separate)
        self.chance = 1 / values

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        writes = length - self.queries
        self.expect(writes >= 1, "length", f"more than queries={self.queries}", length)
        if self.unique:
            fits = self.queries <= writes <= self.keys
            self.expect(fits, "length", f"{2 * self.queries} to {self.keys + self.queries} (unique keys)", length)
            keys = distinct(rows, writes, self.keys, generator)
            asked = keys.gather(1, distinct(rows, self.queries, writes, generator))
        else:
            keys = torch.randint(self.keys, (rows, writes), generator=generator)
            asked = keys.gather(1, torch.randint(writes, (rows, self.queries), generator=generator))
        values = torch.randint(self.values, (rows, writes), generator=generator)
        offset = self.values + 1
        written = F.one_hot(values, self.vocab_size) + F.one_hot(offset + keys, self.vocab_size)
        questions = F.one_hot(asked + offset + self.keys * self.separate, self.vocab_size)
        if not self.separate:
            questions[..., self.values] = 1
        tokens = torch.cat([written, questions], 1).float()
        targets = torch.full((rows, length), IGNORE)
        hit = asked.unsqueeze(2) == keys.unsqueeze(1)
        targets[:, writes:] = values.gather(1, torch.where(hit, torch.arange(writes), -1).amax(2))
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros(tokens.shape[:2], dtype=torch.int64)
        for row, found in zip(tokens, answers, strict=True):
            memory: dict[int, int] = {}
            for t, position in enumerate(row):
                here = position.nonzero().flatten().tolist()
                key = (here[-1] - self.values - 1) % self.keys
                if here[0] < self.values:
                    memory[key] = here[0]
                found[t] = memory[key]
        return answers


@register_task("induction_heads", "Gu & Dao 2023, Mamba (arXiv 2312.00752): what followed the special token")
class InductionHeads(Task):
    """Random tokens; a special one (the last id) stands once among them and again at the end: what followed it?

    Args:
        vocab_size: ids, the special one included; 16 in the paper.
    """

    lengths = (64, 128, 256, 512)
    chance: float

    def __init__(self, *, vocab_size: int = 16):
        self.expect(vocab_size >= 2, "vocab_size", "at least 2", vocab_size)
        self.vocab_size, self.chance = vocab_size, 1 / (vocab_size - 1)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 3, "length", "at least 3", length)
        tokens = torch.randint(self.vocab_size - 1, (rows, length), generator=generator)
        at = torch.randint(length - 2, (rows, 1), generator=generator)
        tokens.scatter_(1, at, self.vocab_size - 1)
        tokens[:, -1] = self.vocab_size - 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1:] = tokens.gather(1, at + 1)
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        first = (tokens == self.vocab_size - 1).int().argmax(1, keepdim=True)
        answers[:, -1:] = tokens.gather(1, first + 1)
        return answers


@register_task("selective_copy", "Gu & Dao 2023, Mamba (arXiv 2312.00752): copy the tokens, leave out the blanks")
class SelectiveCopy(Task):
    """Data tokens at random places among blanks, then as many markers, at which they are due in order.

    Ids: data, then blank and marker. A row of T positions holds T - copies of content.

    Args:
        vocab_size: ids; 16 in the paper.
        copies: data tokens; 16 in the paper.
    """

    lengths = (64, 128, 256)
    examples = ({}, {"copies": 4})

    def __init__(self, *, vocab_size: int = 16, copies: int = 16):
        self.expect(vocab_size >= 3 and copies >= 1, "vocab_size, copies", "at least 3 and 1", (vocab_size, copies))
        self.vocab_size, self.copies, self.chance = vocab_size, copies, 1 / (vocab_size - 2)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        content = length - self.copies
        self.expect(content >= self.copies, "length", f"at least {2 * self.copies}", length)
        data = torch.randint(self.vocab_size - 2, (rows, self.copies), generator=generator)
        at = distinct(rows, self.copies, content, generator).sort(1).values
        tokens = torch.full((rows, length), self.vocab_size - 2)
        tokens.scatter_(1, at, data)
        tokens[:, content:] = self.vocab_size - 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, content:] = data
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens, answers, strict=True):
            found[-self.copies :] = row[row < self.vocab_size - 2]
        return answers


@register_task("palindrome", "Kimi Team 2025, Kimi Linear (arXiv 2510.26692): random tokens, then the same backwards")
class Palindrome(Task):
    """Random tokens, a separator (the last id), and the tokens in reverse, of which each next one is due.

    A row of T positions, T even, holds T / 2 tokens, the separator and all of the reversed tokens but the last.

    Args:
        vocab_size: ids, the separator included. The paper gives no number.
    """

    lengths = (64, 128, 256, 512)

    def __init__(self, *, vocab_size: int = 33):
        self.expect(vocab_size >= 3, "vocab_size", "at least 3", vocab_size)
        self.vocab_size, self.chance = vocab_size, 1 / (vocab_size - 1)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length % 2 == 0, "length", "an even number", length)
        content = torch.randint(self.vocab_size - 1, (rows, length // 2), generator=generator)
        back = self.repeat(content)
        separator = torch.full((rows, 1), self.vocab_size - 1)
        tokens = torch.cat([content, separator, back[:, :-1]], 1)
        return Sample(tokens, torch.cat([torch.full_like(content, IGNORE), back], 1))

    def repeat(self, content: Tensor) -> Tensor:
        """What is due after ``content`` ``[B, n]``."""
        return content.flip(1)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens, answers, strict=True):
            at = row.tolist().index(self.vocab_size - 1) if (row == self.vocab_size - 1).any() else len(row)
            found[at:] = self.repeat(row[None, :at])[0, : len(row) - at]
        return answers


@register_task("copy", "Jelassi et al. 2024, Repeat After Me (arXiv 2402.01032): random tokens, then the same again")
class Copy(Palindrome):
    """Random tokens, a separator (the last id), and the tokens again, of which each next one is due.

    A row of T positions, T even, holds T / 2 tokens, the separator and all of the repeated tokens but the last.

    Args:
        vocab_size: ids, the separator included; the paper has the 26 letters.
    """

    def __init__(self, *, vocab_size: int = 27):
        super().__init__(vocab_size=vocab_size)

    def repeat(self, content: Tensor) -> Tensor:
        return content


@register_task(
    "k_hop",
    "Sanford, Hsu & Telgarsky 2024, Transformers, parallel computation, and logarithmic depth (arXiv 2402.09268)",
)
class Hops(Task):
    """Random tokens. One hop goes from a token to the one that followed its latest earlier occurrence; due at every
    position is where ``hops`` of them lead, or the last id when one of them leads nowhere.

    One hop is the induction head. ParaRNN (arXiv 2510.21450) has one hop over 10 tokens and two over 5.

    Args:
        hops: k.
        tokens: how many there are; ids and answers are one more.
    """

    lengths = (100, 200, 400)
    examples = ({}, {"hops": 1, "tokens": 10})

    def __init__(self, *, hops: int = 2, tokens: int = 5):
        self.expect(hops >= 1 and tokens >= 2, "hops, tokens", "at least 1 and 2", (hops, tokens))
        self.hops, self.vocab_size, self.chance = hops, tokens + 1, 1 / tokens

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        tokens = torch.randint(self.vocab_size - 1, (rows, length), generator=generator)
        # Position `length` stands for nowhere: it leads to itself and holds the last id.
        after, leads = torch.full((rows, self.vocab_size - 1), length), []
        for t, token in enumerate(tokens.unbind(1)):
            leads.append(after.gather(1, token[:, None]))
            after = after.scatter(1, token[:, None], t + 1)
        nowhere = torch.full((rows, 1), length)
        lead = torch.cat([*leads, nowhere], 1)
        place = lead
        for _ in range(self.hops - 1):
            place = lead.gather(1, place)
        held = torch.cat([tokens, torch.full_like(nowhere, self.vocab_size - 1)], 1)
        return Sample(tokens, held.gather(1, place[:, :length]))

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.full_like(tokens, self.vocab_size - 1)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            for t in range(len(row)):
                at: int | None = t
                for _ in range(self.hops):
                    if at is not None:
                        at = next((j + 1 for j in range(at - 1, -1, -1) if row[j] == row[at]), None)
                if at is not None:
                    found[t] = row[at]
        return answers


@register_task("keep_nth", "Danieli et al. 2025, ParaRNN (arXiv 2510.21450): at the end, the n-th token")
class KeepNth(Task):
    """Random tokens; after the last one, the one at place ``n``. A model has to count, or to be told where it is.

    Args:
        n: counted from 1.
        vocab_size: ids.
    """

    lengths = (100, 200, 400)

    def __init__(self, *, n: int = 5, vocab_size: int = 128):
        self.expect(n >= 1 and vocab_size >= 2, "n, vocab_size", "at least 1 and 2", (n, vocab_size))
        self.n, self.vocab_size, self.chance = n, vocab_size, 1 / vocab_size

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= self.n, "length", f"at least n = {self.n}", length)
        tokens = torch.randint(self.vocab_size, (rows, length), generator=generator)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = tokens[:, self.n - 1]
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        return tokens[:, min(self.n, tokens.shape[1]) - 1 :][:, :1].expand_as(tokens)


@register_task("stacks", "Kimi Team 2025, Kimi Linear (arXiv 2510.26692): last in, first out, in many stacks at once")
class Stacks(Task):
    """Operations of three tokens: push, a stack, an element; or pop, a stack, the element that it gives.

    The element of a pop is due after the stack's id. Half of the operations pop, from a stack that holds something,
    as far as there is one. Ids: elements, stacks, push, pop. The last operation of a row may be cut off.

    Args:
        stacks: how many there are; 64 in the paper.
        elements: how many there are; the paper gives no number.
    """

    lengths = (96, 192, 384)
    examples = ({}, {"stacks": 4, "elements": 8})

    def __init__(self, *, stacks: int = 64, elements: int = 32):
        self.expect(stacks >= 1, "stacks", "at least 1", stacks)
        self.expect(elements >= 2, "elements", "at least 2", elements)
        self.stacks, self.elements = stacks, elements
        self.vocab_size, self.chance = elements + stacks + 2, 1 / elements

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 5, "length", "at least 5", length)  # a push, and a pop up to what is due
        steps, row = -(-length // 3), torch.arange(rows)
        content = torch.randint(self.elements, (steps, rows), generator=generator)
        pops = torch.rand(steps, rows, generator=generator) < 0.5
        pops[1] = True  # a row without a question is no row
        chosen = torch.rand(steps, rows, self.stacks, generator=generator)
        held, height = torch.zeros(rows, self.stacks, steps + 1, dtype=torch.int64), torch.zeros(rows, self.stacks)
        found = []
        for element, pop, rank in zip(content, pops, chosen, strict=True):
            pop = pop & (height > 0).any(1)
            stack = torch.where(pop.unsqueeze(1) & (height == 0), -1.0, rank).argmax(1)
            top = height[row, stack].long()
            element = torch.where(pop, held[row, stack, top - 1], element)
            held[row, stack, top - pop.long()] = element  # a pop leaves what it read
            height[row, stack] += torch.where(pop, -1.0, 1.0)
            found.append(torch.stack([self.vocab_size - 2 + pop.long(), self.elements + stack, element], 1))
        tokens = torch.cat(found, 1)
        asked = (tokens[:, 0::3] == self.vocab_size - 1).repeat_interleave(3, 1)
        asked &= torch.arange(3 * steps) % 3 == 1
        return Sample(tokens[:, :length], torch.where(asked, tokens.roll(-1, 1), IGNORE)[:, :length])

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            memory: dict[int, list[int]] = {}
            for t in range(1, len(row), 3):
                if row[t - 1] == self.vocab_size - 1:
                    found[t] = memory[row[t]].pop()
                elif t + 1 < len(row):
                    memory.setdefault(row[t], []).append(row[t + 1])
        return answers


@register_task("latching", "MinMax recurrent neural cascades: the first token, at every position")
class Latching(Task):
    """The first token, from a memory set of ``4 · 2^(k-1)``, among ``20 · 2^(k-1)`` others, repeated at every position.

    Args:
        k: size of the sets, 1 to 8.
    """

    lengths = (64, 256, 1024)
    examples = ({}, {"k": 3})

    def __init__(self, *, k: int = 1):
        self.expect(1 <= k <= 8, "k", "1 to 8", k)
        self.vocab_size, self.memory = 20 * 2 ** (k - 1), 4 * 2 ** (k - 1)
        self.chance = 1 / self.memory

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        tokens = torch.randint(self.vocab_size, (rows, length), generator=generator)
        tokens[:, 0] = torch.randint(self.memory, (rows,), generator=generator)
        return Sample(tokens, self.solve(tokens))

    def solve(self, tokens: Tensor) -> Tensor:
        return tokens[:, :1].expand_as(tokens).clone()
