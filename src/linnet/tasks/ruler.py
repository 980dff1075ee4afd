"""Needles in a haystack, variable tracking and word counting of RULER (Hsieh et al. 2024, arXiv 2404.06654), on text
that is made up here: nothing is downloaded, and word lists and essays are this library's own.

A :class:`Question` is a prompt and its answers, for models that read text; the task ``ruler`` is the same as bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from linnet.ops.core import check_choice

from .base import IGNORE, Sample, Task, register_task, seeded
from .recall import distinct

__all__ = ["FAMILIES", "Question", "Ruler", "TokenNeedle", "make_question", "string_match"]

ADJECTIVES = [
    "amber",
    "brave",
    "calm",
    "dusty",
    "eager",
    "faint",
    "gentle",
    "hollow",
    "icy",
    "jolly",
    "keen",
    "lively",
    "mellow",
    "narrow",
    "olive",
    "proud",
    "quiet",
    "rapid",
    "silent",
    "tidy",
    "upper",
    "vivid",
    "warm",
    "young",
]
NOUNS = [
    "anchor",
    "bridge",
    "candle",
    "dragon",
    "engine",
    "falcon",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "lantern",
    "mirror",
    "needle",
    "orchard",
    "pebble",
    "quiver",
    "ribbon",
    "saddle",
    "temple",
    "umbrella",
    "village",
    "window",
    "yarn",
]
VERBS = [
    "watched",
    "carried",
    "painted",
    "followed",
    "forgot",
    "repaired",
    "answered",
    "crossed",
    "borrowed",
    "counted",
    "opened",
    "praised",
]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
GENERATED = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}  # tokens that RULER lets a model generate


class Question(NamedTuple):
    """A prompt that ends where the answer is due, and what the answer has to contain."""

    prompt: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """All answers, as they would continue the prompt."""
        return " " + ", ".join(self.answers)


class Family(NamedTuple):
    """A kind of question: what the needles lie in, their kinds, and how many of them there are and are asked for."""

    haystack: str  # noise, essay, needles
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


FAMILIES = {
    "niah_single_1": Family("noise"),
    "niah_single_2": Family("essay"),
    "niah_single_3": Family("essay", value="uuids"),
    "niah_multikey_1": Family("essay", keys=4),
    "niah_multikey_2": Family("needles"),
    "niah_multikey_3": Family("needles", "uuids", "uuids"),
    "niah_multivalue": Family("essay", values=4),
    "niah_multiquery": Family("essay", keys=4, queries=4),
    "vt": Family("noise"),
    "cwe": Family("words"),
    "fwe": Family("words"),
}


class _Draw:
    """Random choices from a generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def one(self, things: list[str]) -> str:
        return things[self.below(len(things))]

    def order(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator).tolist()

    def letters(self, n: int, alphabet: str) -> str:
        return "".join(alphabet[i] for i in torch.randint(len(alphabet), (n,), generator=self.generator).tolist())

    def word(self, kind: str) -> str:
        """A key or value: "words" (adjective-noun), "numbers" of seven digits, or "uuids"."""
        if kind == "words":
            return f"{self.one(ADJECTIVES)}-{self.one(NOUNS)}{self.one(NOUNS)}"
        if kind == "numbers":
            return str(1_000_000 + self.below(9_000_000))
        parts = [self.letters(n, "0123456789abcdef") for n in (8, 4, 4, 4, 12)]
        return "-".join(parts)

    def different(self, n: int, make: Callable[[], str]) -> list[str]:
        """So many different results of ``make``."""
        found: dict[str, None] = {}
        while len(found) < n:
            found[make()] = None
        return list(found)


def make_question(
    family: str, budget: int, generator: torch.Generator, count: Callable[[str], int] = len, reserve: int | None = None
) -> Question:
    """A question as long as fits.

    Args:
        family: a key of ``FAMILIES``.
        budget: most tokens of the prompt and the answer together.
        generator: source of all randomness.
        count: number of tokens of a text (default: characters).
        reserve: tokens kept free for the answer (default: as many as it has).

    Raises:
        ValueError: an unknown family, or a budget that holds no question.
    """
    check_choice("family", family, FAMILIES)
    make = {"vt": _variables, "cwe": _common_words, "fwe": _frequent_words}.get(family, _needles)
    start = generator.get_state()

    def attempt(size: int) -> Question:
        generator.set_state(start)
        return make(FAMILIES[family], size, _Draw(generator))

    def fits(size: int) -> bool:
        question = attempt(size)
        if reserve is not None:
            return count(question.prompt) + reserve <= budget
        return count(question.prompt + question.answer) <= budget

    if not fits(0):
        raise ValueError(f"budget: expected more than {budget} tokens for a question of the family {family!r}")
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:  # the largest size that fits; sizes are not quite monotone, so the last test decides
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return attempt(low)


def string_match(prediction: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that occur in the prediction, whatever the case ("string_match_all" of RULER)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def _essay(sentences: int, draw: _Draw) -> list[str]:
    def noun() -> str:
        return f"the {draw.one(ADJECTIVES)} {draw.one(NOUNS)}"

    return [f"{noun().capitalize()} {draw.one(VERBS)} {noun()}." for _ in range(sentences)]


def _insert(lines: list[str], new: list[str], draw: _Draw) -> list[str]:
    """``new`` among ``lines``, in order, at different ones of 40 even depths."""
    depths = sorted(draw.order(40)[: len(new)], reverse=True)
    lines = list(lines)
    for depth, line in zip(depths, reversed(new), strict=True):  # from the back, so that the order is kept
        lines.insert(round(depth / 39 * len(lines)), line)
    return lines


def _needles(family: Family, size: int, draw: _Draw) -> Question:
    only = family.haystack == "needles"
    keys = draw.different(size + 1 if only else family.keys, lambda: draw.word(family.key))
    needles, known = [], {}
    for key in keys:
        known[key] = draw.different(family.values, lambda: draw.word(family.value))
        needles += [f"One of the special magic {family.value} for {key} is: {value}." for value in known[key]]
    if only:
        text = "\n".join(needles[i] for i in draw.order(len(needles)))
    elif family.haystack == "noise":
        text = "\n".join(_insert([NOISE] * size, needles, draw))
    else:
        text = " ".join(_insert(_essay(size, draw), needles, draw))
    asked = [keys[i] for i in draw.order(len(keys))[: family.queries]]
    answers = tuple(value for key in asked for value in known[key])
    several = len(answers) > 1
    kind = family.value if several else family.value[:-1]
    names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
    prompt = (
        f"{'Some' if several else 'A'} special magic {kind} {'are' if several else 'is'} hidden within the following"
        f" text. Make sure to memorize {'them' if several else 'it'}. I will quiz you about the {kind}"
        f" afterwards.\n{text}\nWhat {'are all the' if several else 'is the'} special magic {kind} for {names}"
        f" mentioned in the provided text? The special magic {kind} for {names} mentioned in the provided text"
        f" {'are' if several else 'is'}"
    )
    return Question(prompt, answers)


def _chain(draw: _Draw, size: int, letters: int, hops: int = 4) -> tuple[list[str], list[str], str]:
    names = draw.different(hops + 1, lambda: draw.letters(letters, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    value = str(10_000 + draw.below(90_000))
    steps = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    lines, gaps = [NOISE] * size, sorted((draw.below(size + 1) for _ in steps), reverse=True)
    for at, step in zip(gaps, reversed(steps), strict=True):  # from the back, so that the order is kept
        lines.insert(at, step)
    return lines, names, value


def _variables(family: Family, size: int, draw: _Draw) -> Question:
    def ask(lines: list[str], value: str) -> str:
        body = "\n".join(lines)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{body}\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer:"
            f" According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value"
            f" {value}, they are:"
        )

    example, shown, first = _chain(draw, min(size, 2), 3)
    lines, names, value = _chain(draw, size, 5)
    return Question(f"{ask(example, first)} {' '.join(shown)}\n\n{ask(lines, value)}", tuple(names))


def _common_words(family: Family, size: int, draw: _Draw) -> Question:
    def ask(words: list[str]) -> str:
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones"
            f" that appear most often.\n{numbered}\nQuestion: What are the 10 most common words in the above list?"
            " Answer: The top 10 words that appear most often in the list are:"
        )

    def make(others: int, often: int, rarely: int) -> tuple[list[str], list[str]]:
        words = draw.different(10 + others, lambda: f"{draw.one(ADJECTIVES)}{draw.one(NOUNS)}")
        every = [word for i, word in enumerate(words) for _ in range(often if i < 10 else rarely)]
        return [every[i] for i in draw.order(len(every))], sorted(words[:10])

    example, shown = make(2, 3, 1)
    words, common = make(min(size, 500), *((30, 3) if size > 120 else (6, 1)))
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(shown, start=1))
    return Question(f"{ask(example)} {numbered}\n\n{ask(words)}", tuple(common))


def _frequent_words(family: Family, size: int, draw: _Draw) -> Question:
    total = 50 + 10 * size
    kinds = max(5, total // 50)
    words = draw.different(kinds, lambda: draw.letters(6, "abcdefghijklmnopqrstuvwxyz"))
    counts = [max(1, round(total * (k + 1) ** -2.0 / 1.6449)) for k in range(kinds)]
    # Neighbouring ranks must differ, or the question has no answer.
    counts[1:4] = [max(c, 6 - k) for k, c in enumerate(counts[1:4])]
    counts[4:] = [min(c, counts[3] - 1) for c in counts[4:]]
    every = [word if k else "..." for k, (word, n) in enumerate(zip(words, counts, strict=True)) for _ in range(n)]
    text = " ".join(every[i] for i in draw.order(len(every)))
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
        f" appeared coded words. {text}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What"
        " are the three most frequently appeared words in the above coded text? Answer: According to the coded text"
        " above, the three most frequently appeared words are:"
    )
    return Question(prompt, tuple(words[1:4]))


@register_task("ruler", "Hsieh et al. 2024, RULER (arXiv 2404.06654): its retrieval, tracing and counting, as bytes")
class Ruler(Task):
    """A question as bytes, then its answers, which are due byte by byte; 256 fills the end.

    Args:
        family: "niah_single_1" to "niah_multiquery", "vt", "cwe" or "fwe".
    """

    lengths = (1024, 2048, 4096)
    examples = tuple({"family": name} for name in FAMILIES)
    vocab_size = 257
    chance = 0.1  # a digit of a number; a constant guess is as often right on the letters of words

    def __init__(self, *, family: str = "niah_single_1"):
        self.expect(family in FAMILIES, "family", f"one of {', '.join(FAMILIES)}", family)
        self.family = family
        if family == "cwe":
            self.lengths = (4096,)  # ten words thirty or six times, and an example

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        tokens, targets = torch.full((rows, length), 256), torch.full((rows, length), IGNORE)
        for n in range(rows):
            question = make_question(self.family, length, generator)
            prompt, answer = question.prompt.encode(), question.answer.encode()
            row = torch.tensor([*prompt, *answer])
            tokens[n, : len(row)] = row
            targets[n, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.full_like(tokens, 256)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            text = bytes(t for t in row if t < 256).decode()
            end = [match.end() for match in re.finditer("mentioned in the provided text (?:is|are)|are:", text)][-1]
            answer = Question("", tuple(_read(self.family, text[:end]))).answer.encode()
            found[end - 1 : end - 1 + len(answer)] = torch.tensor(list(answer))
        return answers


def _read(family: str, prompt: str) -> list[str]:
    """The answers, from the text alone."""
    if family == "vt":
        last = prompt[prompt.rindex("Memorize") :]
        value = re.findall(r"assigned the value (\d+)", last)[-1]
        names = re.findall(rf"VAR (\w+) = {value}", last)
        return names + [b for b, _ in re.findall(r"VAR (\w+) = VAR (\w+)", last)]
    if family == "cwe":
        words = re.findall(r"\d+\. (\w+)", prompt[prompt.rindex("Below is") :])
        counts = Counter(words)
        top = {word for word, n in counts.items() if n == max(counts.values())}
        return sorted(top)
    if family == "fwe":
        text = prompt[prompt.index("coded words. ") + 13 : prompt.rindex("\nQuestion")]
        counts = Counter(word for word in text.split() if word != "...")
        return [word for word, _ in counts.most_common(3)]
    asked = re.findall(r"magic \w+ for ([^.:?]+) mentioned", prompt)[-1].replace("and ", "").split(", ")
    known = re.findall(r"for (\S+) is: ([\w-]+)\.", prompt)
    return [value for key in asked for k, value in known if k == key]


@register_task(
    "needle_tokens",
    "single needle in a haystack on tokens, after RULER (arXiv 2404.06654), for models too small for text",
)
class TokenNeedle(Task):
    """Filler with needles in it, each a marker, a key and its values; at the end a question for one of them.

    Ids: 0 the needle's marker, 1 the question's, then keys, values and filler. The values are due after the question's
    key, each after the one before it.

    Args:
        keys, values, fillers: how many ids of each.
        needles: needles of a row, with different keys.
        size: values of a needle.
        filler: "motif" repeats a fixed one of 8 tokens; "text" follows a fixed order-2 Markov source.
    """

    lengths = (64, 128, 256, 512)
    examples = ({}, {"filler": "text", "size": 8}, {"needles": 4})

    def __init__(
        self,
        *,
        keys: int = 16,
        values: int = 16,
        fillers: int = 16,
        needles: int = 1,
        size: int = 1,
        filler: str = "motif",
    ):
        self.expect(1 <= needles <= keys, "needles", f"1 to keys={keys}", needles)
        self.expect(min(values, fillers, size) >= 1, "values, fillers, size", "at least 1", (values, fillers, size))
        self.expect(filler in ("motif", "text"), "filler", "'motif' or 'text'", filler)
        self.keys, self.values, self.fillers = keys, values, fillers
        self.needles, self.size, self.filler = needles, size, filler
        self.vocab_size, self.chance = 2 + keys + values + fillers, 1 / values
        fixed = seeded(0)
        self.motif = torch.randint(fillers, (8,), generator=fixed)
        self.transitions = torch.rand(fillers, fillers, fillers, generator=fixed).pow(8)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Sample:
        one = 2 + self.size
        free = length - self.needles * one - 1 - self.size  # the question's last value is only asked for
        self.expect(free >= 1, "length", f"at least {length - free + 1}", length)
        base = 2 + self.keys
        fill = self.motif[torch.arange(free) % 8].expand(rows, -1)
        if self.filler == "text":
            walk = list(torch.randint(self.fillers, (2, rows), generator=generator))
            while len(walk) < free:
                walk.append(torch.multinomial(self.transitions[walk[-2], walk[-1]], 1, generator=generator)[:, 0])
            fill = torch.stack(walk[:free], 1)
        keys = distinct(rows, self.needles, self.keys, generator)
        values = torch.randint(self.values, (rows, self.needles, self.size), generator=generator)
        # The needles go before filler tokens drawn without order; equal places are allowed.
        place = torch.randint(free + 1, (rows, self.needles), generator=generator).sort(1).values
        start = place + torch.arange(self.needles) * one
        body = torch.full((rows, length - 1 - self.size), -1)
        needle = torch.cat([torch.zeros_like(keys).unsqueeze(2), 2 + keys.unsqueeze(2), base + values], 2)
        at = start.unsqueeze(2) + torch.arange(one)
        body.scatter_(1, at.flatten(1), needle.flatten(1))
        body[body < 0] = (base + self.values + fill).flatten()
        asked = torch.randint(self.needles, (rows,), generator=generator)
        row = torch.arange(rows)
        answer = base + values[row, asked]
        question = torch.stack([torch.ones_like(asked), 2 + keys[row, asked]], 1)
        tokens = torch.cat([body, question, answer[:, :-1]], 1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.size :] = answer
        return Sample(tokens, targets)

    def solve(self, tokens: Tensor) -> Tensor:
        answers = torch.zeros_like(tokens)
        for row, found in zip(tokens.tolist(), answers, strict=True):
            key = row[-self.size]
            at = next(t for t in range(len(row)) if row[t] == 0 and row[t + 1] == key)
            found[-self.size :] = torch.tensor(row[at + 2 : at + 2 + self.size])
        return answers
