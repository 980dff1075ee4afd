"""The six tasks of MAD (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844).

Recall tasks are scored as in the paper's tests: wherever the answer is known. ``shifted=True`` is its training: every
position asks for the next token, also where nobody can know it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import IGNORE, Sample, Task, register_task, seeded
from .recall import SelectiveCopy

__all__ = ["Compression", "FuzzyRecall", "InContextRecall", "Memorization", "NoisyRecall", "SelectiveCopyMAD"]

_MAD = "Poli et al. 2024, Mechanistic Design and Scaling of Hybrid Architectures (arXiv 2403.17844)"


@register_task("mad_recall", f"{_MAD}: in-context recall")
class InContextRecall(Task):
    """Pairs of a key and its value, the same whenever the key returns; at a key seen before, its value.

    Args:
        vocab_size: keys in the lower half, values in the upper; 16 (32, 64, 128).
        shifted: every position asks for the next token.
    """

    lengths = (128, 256, 512, 1024)
    examples = ({}, {"shifted": False, "vocab_size": 32})
    noise = 0

    def __init__(self, *, vocab_size: int = 16, shifted: bool = False):
        self._set_up(vocab_size, 0, 0.0, shifted)

    def _set_up(self, vocab_size: int, noise: int, share: float, shifted: bool) -> None:
        known = vocab_size - noise
        self.expect(known >= 4 and known % 2 == 0, "vocab_size", f"an even number of at least {4 + noise}", vocab_size)
        self.vocab_size, self.noise, self.share, self.shifted = vocab_size, noise, share, shifted
        self.keys, self.chance = known // 2, 2 / known

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 4 and length % 2 == 0, "length", "an even number of at least 4", length)
        pairs, half = length // 2, self.keys
        value = half + torch.randint(half, (rows, half), generator=generator)
        keys = torch.randint(half, (rows, pairs), generator=generator)
        noisy = torch.rand(rows, pairs, generator=generator) < self.share
        noisy[:, -1] = False
        first = torch.randint(pairs - 1, (rows, 1), generator=generator)  # at least one real pair before the last
        noisy.scatter_(1, first, noisy.gather(1, first) & (~noisy[:, :-1]).any(1, keepdim=True))
        real = (~noisy[:, :-1]).double()
        keys[:, -1:] = keys.gather(1, torch.multinomial(real, 1, generator=generator))  # the last pair is known
        tokens = torch.stack([keys, value.gather(1, keys)], 2)
        if self.noise:
            chaff = torch.randint(self.vocab_size - self.noise, self.vocab_size, tokens.shape, generator=generator)
            tokens = torch.where(noisy.unsqueeze(2), chaff, tokens)
        tokens = tokens.flatten(1)
        if self.shifted:
            # What follows the last token is not drawn: it has no target.
            return Sample(tokens, torch.cat([tokens[:, 1:], torch.full((rows, 1), IGNORE)], 1))
        seen = (keys.unsqueeze(2) == keys.unsqueeze(1)) & ~noisy.unsqueeze(1)
        known = seen.tril(-1).any(2) & ~noisy
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 0::2] = torch.where(known, tokens[:, 1::2], IGNORE)
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            memory: dict[int, int] = {}
            for t in range(0, len(row), 2):
                found[t] = memory.get(row[t], 0)
                if row[t] < self.keys and t + 1 < len(row):
                    memory[row[t]] = row[t + 1]
        return answers


@register_task("mad_noisy_recall", f"{_MAD}: noisy in-context recall")
class NoisyRecall(InContextRecall):
    """In-context recall in which some pairs are two noise tokens.

    Args:
        vocab_size: 32 (48, 80, 144), the noise tokens included.
        noise: how many ids, the last ones, are noise; 16.
        share: of the pairs that are noise; 0.2 (0.4, 0.6, 0.8).
        shifted: every position asks for the next token.
    """

    examples = ({}, {"share": 0.8})

    def __init__(self, *, vocab_size: int = 32, noise: int = 16, share: float = 0.2, shifted: bool = False):
        self.expect(0 <= share < 1, "share", "a share below 1", share)
        self._set_up(vocab_size, noise, share, shifted)


@register_task("mad_fuzzy_recall", f"{_MAD}: fuzzy in-context recall")
class FuzzyRecall(Task):
    """Keys and values of several tokens; every token of a value whose key is known.

    Ids: keys, values, padding (the last id) on the left.

    Args:
        vocab_size: 16; the keys are the lower half of all but the padding.
        key_size: tokens of a key, without repetition, or 0 for 1 to 3 (the paper trains with 0 and tests with 3).
    """

    lengths = (128, 256)
    examples = ({}, {"key_size": 0})

    def __init__(self, *, vocab_size: int = 16, key_size: int = 3):
        self.expect(vocab_size >= 8, "vocab_size", "at least 8", vocab_size)
        self.expect(0 <= key_size <= 3, "key_size", "0 to 3", key_size)
        self.vocab_size, self.key_size, self.keys = vocab_size, key_size, (vocab_size - 1) // 2
        self.chance = 1 / (vocab_size - 1 - self.keys)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 18, "length", "at least 18", length)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        tokens, targets = torch.full((rows, length), self.vocab_size - 1), torch.full((rows, length), IGNORE)
        for n in range(rows):
            memory: dict[tuple[int, ...], list[int]] = {}

            def pair(memory: dict[tuple[int, ...], list[int]] = memory) -> tuple[tuple[int, ...], list[int]]:
                size = self.key_size or draw(1, 4)
                key = tuple(torch.randperm(self.keys, generator=generator)[:size].tolist())
                if key not in memory:
                    memory[key] = [draw(self.keys, self.vocab_size - 1) for _ in range(draw(1, 4))]
                return key, memory[key]

            probe = pair()
            pairs, used = [], 2 * (len(probe[0]) + len(probe[1]))
            while True:
                key, value = pair()
                if used + len(key) + len(value) > length:
                    break
                pairs.append((key, value))
                used += len(key) + len(value)
            pairs.insert(draw(0, len(pairs) + 1), probe)
            at, seen = length - used, set()
            for key, value in [*pairs, probe]:
                row = [*key, *value]
                tokens[n, at : at + len(row)] = torch.tensor(row)
                if key in seen:
                    targets[n, at + len(key) - 1 : at + len(row) - 1] = torch.tensor(value)
                seen.add(key)
                at += len(row)
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            memory: dict[tuple[int, ...], list[int]] = {}
            key: list[int] = []
            value: list[int] = []
            for t, token in enumerate(row):
                if token == self.vocab_size - 1:
                    continue
                if token < self.keys:
                    if value:
                        memory[tuple(key)] = value
                        key, value = [], []
                    key.append(token)
                else:
                    value.append(token)
                known = memory.get(tuple(key), [])
                found[t] = known[len(value)] if len(value) < len(known) else 0
        return answers


@register_task("mad_memorize", f"{_MAD}: memorization of training facts")
class Memorization(Task):
    """Keys, each followed by a marker, at which the key's value is due; the same dictionary in every row.

    Args:
        vocab_size: 256 (512 … 8192): keys, as many values, the marker last.
        dictionary_seed: which dictionary.
    """

    lengths = (32,)

    def __init__(self, *, vocab_size: int = 256, dictionary_seed: int = 0):
        self.expect(vocab_size >= 4, "vocab_size", "at least 4", vocab_size)
        self.vocab_size, self.keys = vocab_size, (vocab_size - 1) // 2
        self.values = self.keys + torch.randperm(self.keys, generator=seeded(dictionary_seed))
        self.chance = 1 / self.keys

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 2 and length % 2 == 0, "length", "an even number of at least 2", length)
        keys = torch.randint(self.keys, (rows, length // 2), generator=generator)
        tokens = torch.stack([keys, torch.full_like(keys, self.vocab_size - 1)], 2).flatten(1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 1::2] = self.values[keys]
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
        return self.values[before.clamp(max=self.keys - 1)]


@register_task("mad_selective_copy", f"{_MAD}: selective copying")
class SelectiveCopyMAD(SelectiveCopy):
    """Data tokens, blanks before each of them at random, a marker, and blanks at which the data is due in order.

    As in the released code, no blank follows the last data token.

    Args:
        vocab_size: 16: data, then blank and marker.
        copies: data tokens; 16 (32, 64, 96).
    """

    lengths = (256, 512, 1024)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        n = self.copies
        self.expect(length >= 2 * n + 1, "length", f"at least {2 * n + 1}", length)
        data = torch.randint(self.vocab_size - 2, (rows, n), generator=generator)
        slot = torch.randint(n, (rows, length - 2 * n - 1), generator=generator)
        before = torch.zeros(rows, n).long().scatter_add_(1, slot, torch.ones_like(slot)).cumsum(1)
        tokens = torch.full((rows, length), self.vocab_size - 2)
        tokens.scatter_(1, torch.arange(n) + before, data)
        tokens[:, length - n - 1] = self.vocab_size - 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -n:] = data
        return Sample(tokens, targets)


@register_task("mad_compression", f"{_MAD}: compression")
class Compression(Task):
    """Random tokens and a compression token (the last id), from whose output all of them are read.

    The model is a :class:`linnet.models.Compressor`, which decodes every position from the last one.

    Args:
        vocab_size: 16.
    """

    lengths = (32,)
    compressed = True

    def __init__(self, *, vocab_size: int = 16):
        self.expect(vocab_size >= 3, "vocab_size", "at least 3", vocab_size)
        self.vocab_size, self.chance = vocab_size, 1 / (vocab_size - 1)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        self.expect(length >= 2, "length", "at least 2", length)
        tokens = torch.randint(self.vocab_size - 1, (rows, length), generator=generator)
        tokens[:, -1] = self.vocab_size - 1
        targets = tokens.clone()
        targets[:, -1] = IGNORE
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        return tokens
