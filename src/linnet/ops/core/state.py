"""Recurrent state as immutable nested tuples of tensors.

A state is a NamedTuple of tensors (or of further states, or ``None`` for a part a mode does not use). Axis 0 of
every tensor is the row: one sequence of a batch, or one segment of a packed sequence. Nothing here mutates, and no op
overwrites a state it was given, unless the caller says so with :func:`overwriting_states`.

``torch.save`` stores states; ``torch.load`` reads those of registered ops and mixers, whose modules must be imported (a
model that is built has imported its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

__all__ = [
    "detach",
    "following",
    "join_rows",
    "loadable",
    "map_state",
    "named_tensors",
    "overwriting_states",
    "repeat_rows",
    "select_rows",
    "state_bytes",
    "state_tensors",
    "to",
]


def map_state(fn: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply ``fn`` to every tensor of ``state`` and rebuild the same structure."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, tuple):
        parts = [map_state(fn, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise ValueError(f"state: expected tensors in (named) tuples, got {type(state).__name__}")


def state_tensors(state: Any) -> list[Tensor]:
    """The tensors of ``state``, in order."""
    found: list[Tensor] = []
    map_state(lambda x: found.append(x) or x, state)
    return found


def named_tensors(prefix: str, state: Any) -> dict[str, Tensor]:
    """The tensors of ``state`` by path: ``state.S``, ``state.decay.z``; plain tuples count, ``out.1``."""
    if state is None:
        return {}
    if isinstance(state, Tensor):
        return {prefix: state}
    names = getattr(state, "_fields", range(len(state)))
    parts = (named_tensors(f"{prefix}.{name}", part) for name, part in zip(names, state, strict=True))
    return {path: x for part in parts for path, x in part.items()}


def detach(state: Any) -> Any:
    """The same state cut from the autograd graph (truncated back-propagation through time)."""
    return map_state(torch.Tensor.detach, state)


def to(state: Any, device: torch.device | str) -> Any:
    """The same state on another device."""
    return map_state(lambda x: x.to(device), state)


def select_rows(state: Any, rows: Tensor) -> Any:
    """Gather rows by index ``[R]`` (reordering of beams, dropping finished sequences)."""
    return map_state(lambda x: x.index_select(0, rows.to(x.device)), state)


def repeat_rows(state: Any, times: int) -> Any:
    """Repeat each row ``times`` times in place (one prompt, several continuations)."""
    return map_state(lambda x: x.repeat_interleave(times, 0), state)


def join_rows(states: Sequence[Any]) -> Any:
    """The rows of several states of one structure in one state. Caches of different length, which are aligned to the
    right, get zeros in front."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        if any(x.shape[1:] != first.shape[1:] for x in states):
            longest = max(x.shape[1] for x in states)
            states = [torch.cat([x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:]), x], 1) for x in states]
        return torch.cat(list(states))
    parts = [join_rows([state[i] for state in states]) for i in range(len(first))]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def state_bytes(state: Any) -> int:
    """Memory the state occupies, in bytes."""
    return sum(x.numel() * x.element_size() for x in state_tensors(state))


def loadable(function: Callable[..., Any]) -> None:
    """Let ``torch.load`` read, as it reads tensors, the states that ``function`` is annotated to return."""
    try:
        hint = get_type_hints(function).get("return")
    except NameError:  # of an annotation that only a type checker can read
        return
    kinds: list[Any] = [hint, *get_args(hint)]
    torch.serialization.add_safe_globals([kind for kind in kinds if hasattr(kind, "_fields")])


_overwriting: ContextVar[bool] = ContextVar("overwriting", default=False)


@contextmanager
def overwriting_states() -> Iterator[None]:
    """While inside, the kernels that read one token a row may put the new state where the old one is, and the old one
    is then lost. For a loop that owns its state: nothing is copied back, and there is one state instead of two."""
    token = _overwriting.set(True)
    try:
        yield
    finally:
        _overwriting.reset(token)


def following(state: Tensor) -> Tensor:
    """Memory for the state after ``state``: new, or its own inside :func:`overwriting_states`."""
    return state if _overwriting.get() else torch.empty_like(state)
