"""Small systems of constraints over integers, for launch settings: tiles that divide sizes and fit into memories.

In the spirit of ConstrINT (FlashRNN, arXiv 2412.07752, appendix): variables have few values each, in order of
preference; the first assignment in that order that meets all constraints wins. What there is done by propagating
domains is done here by naming variables in an order in which each domain can be computed from those before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["divisors", "solutions"]

Domain = Iterable[int] | Callable[..., Iterable[int]]


def divisors(n: int) -> list[int]:
    """The divisors of a positive whole number, largest first."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def solutions(domains: Mapping[str, Domain], constraints: Sequence[Callable[..., bool]]) -> Iterator[dict[str, int]]:
    """All assignments that meet the constraints, best first.

    Args:
        domains: the variables in the order they are assigned, each with its values in order of preference, or with a
            function that gives them from variables before it, which are its parameters by name.
        constraints: functions of variables, by name; each is checked as soon as these are known.

    Raises:
        ValueError: when a domain or a constraint names a variable that is not there.

    >>> next(solutions({"a": divisors(12), "b": lambda a: divisors(12 // a)}, [lambda a: a <= 4, lambda a, b: a != b]))
    {'a': 4, 'b': 3}
    """
    names = list(domains)
    checks: dict[str, list[tuple[Callable[..., bool], list[str]]]] = {name: [] for name in names}
    for constraint in constraints:
        needs = list(inspect.signature(constraint).parameters)
        _known(needs, names)
        checks[max(needs, key=names.index)].append((constraint, needs))
    sources: dict[str, list[str]] = {}
    for i, (name, domain) in enumerate(domains.items()):
        sources[name] = list(inspect.signature(domain).parameters) if callable(domain) else []
        _known(sources[name], names[:i])

    def assign(depth: int, found: dict[str, int]) -> Iterator[dict[str, int]]:
        if depth == len(names):
            yield dict(found)
            return
        name = names[depth]
        domain: Any = domains[name]
        values: Any = domain(*(found[v] for v in sources[name])) if callable(domain) else domain
        for value in values:
            found[name] = value
            if all(check(*(found[v] for v in needs)) for check, needs in checks[name]):
                yield from assign(depth + 1, found)
        found.pop(name, None)

    return assign(0, {})


def _known(needs: list[str], names: list[str]) -> None:
    for name in needs:
        if name not in names:
            raise ValueError(f"variables: expected one of {', '.join(names) or 'none'}, got {name!r}")
