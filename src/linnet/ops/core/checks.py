"""Input checks whose messages name the argument, what was expected and what came."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .segments import Segments

__all__ = [
    "Shapes",
    "check_choice",
    "check_chunk_size",
    "check_floating",
    "check_log_decay",
    "check_names",
    "check_not_negative",
    "check_number",
    "check_options",
    "check_segments",
    "check_type",
    "common_dtype",
    "concrete",
    "hint",
    "no_autocast",
    "value_checks",
]

_value_checks = False
_AT_LEAST_ONE = {"B": "sequence", "T": "token", "H": "head", "Hq": "head", "Hkv": "head", "K": "channel of a key"}


def hint(name: object, known: Collection[str]) -> str:
    """The end of a message about an unknown name: `` (did you mean 'gla'?)``, or nothing when no known one is near.

    >>> hint("gated-deltnet", ["gla", "gated_deltanet"])
    " (did you mean 'gated_deltanet'?)"
    """
    plain = {one.lower().replace("-", "_"): one for one in known}
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), plain, n=1)
    return f" (did you mean {plain[near[0]]!r}?)" if near else ""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """``value`` of the argument ``name`` must be one of ``choices``.

    Raises:
        ValueError: it is not; lists them, and says which one is near.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}{hint(value, choices)}")


def check_names(where: str, kind: str, names: Iterable[object], known: Collection[str]) -> None:
    """``names`` of the ``kind`` "option", "field" and so on must be among those that ``where`` takes.

    Raises:
        ValueError: one is not; begins with ``where``, lists the known ones, and says which one is near.
    """
    for name in names:
        if name not in known:
            takes = f"{', '.join(known) or 'none'}{hint(name, known)}"
            raise ValueError(f"{where}: unknown {kind} {name!r}; it takes {takes}")


def check_type(what: str, annotation: Any, value: Any) -> None:
    """Refuse an option that is not of its annotated type: specs come from command lines and JSON, where ``"False"`` is
    a true string and ``1e999`` a number. Types other than numbers, texts and flags are not looked at.

    Raises:
        ValueError: it is not; begins with ``what``.
    """
    wanted = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    flag = isinstance(value, bool)
    fits = {
        "bool": flag,
        "int": isinstance(value, int) and not flag,
        "float": isinstance(value, (int, float)) and not flag and math.isfinite(value),
        "str": isinstance(value, str),
        "None": value is None,
    }
    if not any(fits.get(kind.strip(), True) for kind in wanted.split("|")):
        raise ValueError(f"{what}: expected {wanted}, got {value!r}")


def check_options(what: str, constructor: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """``options`` must be among those that ``constructor`` takes by name, and of their annotated types.

    Raises:
        ValueError: one is not; begins with ``what`` and names it.
    """
    parameters = inspect.signature(constructor).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    check_names(what, "option", options, known)
    for name, value in options.items():
        check_type(f"{what}: option {name}", known[name], value)


class Shapes:
    """Checks shapes given as letters: the first use of a letter fixes its size, later uses must agree. There is at
    least one sequence (B), one token (T), one head (H, Hq, Hkv) and one channel of a key (K).

    >>> shapes = Shapes()
    >>> shapes("q", torch.zeros(2, 8, 4, 16), "B T H K")
    >>> shapes("g", torch.zeros(2, 8, 4), "B T H")
    """

    def __init__(self, **sizes: int):
        self.sizes = sizes

    def __call__(self, name: str, x: Tensor, *layouts: str) -> str:
        """Match ``x`` against the first fitting layout and return it; ValueError when none fits."""
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor {self._show(layouts)}, got {type(x).__name__}")
        for layout in layouts:
            letters = layout.split()
            if len(letters) == x.dim() and all(
                self.sizes.get(c, n) == n for c, n in zip(letters, x.shape, strict=True)
            ):
                self.sizes.update(zip(letters, x.shape, strict=True))
                for letter, what in _AT_LEAST_ONE.items():
                    if letter in letters and self.sizes[letter] == 0:
                        raise ValueError(f"{name}: expected at least one {what}, got shape {list(x.shape)}")
                return layout
        raise ValueError(f"{name}: expected shape {self._show(layouts)}, got {list(x.shape)}")

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def _show(self, layouts: tuple[str, ...]) -> str:
        def one(layout: str) -> str:
            return "[" + ", ".join(f"{c}={self.sizes[c]}" if c in self.sizes else c for c in layout.split()) + "]"

        return " or ".join(one(layout) for layout in layouts)


def common_dtype(**tensors: Tensor | None) -> list[Any]:
    """The tensors in one floating dtype. Inside autocast that is autocast's dtype; outside they must already agree."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first_name, first = next(iter(given.items()))
    for name, x in given.items():
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} like {first_name}, got {x.device}")
    device = first.device.type
    # The meta device knows no autocast and raises when asked.
    if device != "meta" and torch.is_autocast_enabled(device) and first.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return [None if x is None else x.to(dtype) for x in tensors.values()]
    for name, x in given.items():
        if x.dtype != first.dtype:
            raise ValueError(f"{name}: expected dtype {first.dtype} like {first_name}, got {x.dtype}")
    return list(tensors.values())


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off for the device of ``x`` (the meta device has none to switch off)."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def check_floating(name: str, x: Tensor, device: torch.device) -> None:
    """Refuse integers and other devices, where any floating dtype will do (states, gates)."""
    if not x.is_floating_point() or x.device != device:
        raise ValueError(f"{name}: expected a floating tensor on {device}, got {x.dtype} on {x.device}")


def check_number(name: str, value: Any, least: float = -math.inf) -> float:
    """An option that is a finite number of at least ``least``. A tensor is refused: no gradient would reach it."""
    if not torch.compiler.is_compiling():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or float(value) < least:
            limits = "" if least == -math.inf else f" of at least {least:g}"
            raise ValueError(f"{name}: expected a finite number{limits}, got {value!r}")
    return float(value)


def check_chunk_size(chunk_size: Any, default: int, *, power_of_two: bool = True) -> int:
    """``chunk_size``, ``default`` when None."""
    if chunk_size is None:
        return default
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1
    if not whole or (power_of_two and chunk_size & (chunk_size - 1)):
        wanted = "a power of two" if power_of_two else "an integer of at least 1"
        raise ValueError(f"chunk_size: expected {wanted}, got {chunk_size!r}")
    return chunk_size


def check_segments(segments: Segments | None, x: Tensor) -> int:
    """Number of state rows of an input ``[B, T, ...]``: the batch, or the sequences of a packed row (which needs
    ``B = 1``, ``T = total`` and ``segments`` on the same device)."""
    batch, length = x.shape[:2]
    if segments is None:
        return batch
    if not isinstance(segments, Segments):
        raise ValueError(f"segments: expected linnet.Segments, got {type(segments).__name__}")
    if batch != 1 or length != segments.total:
        raise ValueError(
            f"segments: packed inputs need shape [1, {segments.total}, ...] (one row holding all "
            f"{len(segments)} sequences), got B={batch}, T={length}"
        )
    if segments.ids.device != x.device and x.device.type != "meta":
        raise ValueError(f"segments: expected device {x.device} like the input, got {segments.ids.device}; see .to()")
    return len(segments)


def check_log_decay(name: str, g: Tensor) -> None:
    """Refuse positive or NaN log-decays. Reading values on a GPU would synchronise, so there only inside
    :func:`value_checks`."""
    worst = float(g.detach().max()) if _readable(g) else 0.0
    if not worst <= 0:
        raise ValueError(f"{name}: expected natural-log decays, all <= 0 (-inf resets), got a maximum of {worst:g}")


def check_not_negative(name: str, x: Tensor) -> None:
    """Refuse negative or NaN entries, where :func:`check_log_decay` looks at values."""
    worst = float(x.detach().min()) if _readable(x) else 0.0
    if not worst >= 0:
        raise ValueError(f"{name}: expected no negative entry, got a minimum of {worst:g}")


def _readable(x: Tensor) -> bool:
    """Whether there are values, and they are to be read."""
    return concrete(x) and (_value_checks or x.device.type == "cpu") and x.numel() > 0


def concrete(x: Tensor) -> bool:
    """Whether ``x`` has values, for Python code to branch on, and memory, for a kernel to be launched on: neither in a
    graph that is captured or in a fake tensor, and those of many under the ``vmap`` of ``torch.func``."""
    captured = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (captured or isinstance(x, FakeTensor))


@contextmanager
def value_checks(enabled: bool = True) -> Iterator[None]:
    """Check values, not only shapes, on every device (each check synchronises with a GPU)."""
    global _value_checks
    before, _value_checks = _value_checks, enabled
    try:
        yield
    finally:
        _value_checks = before
