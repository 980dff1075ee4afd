"""What both halves of the contract suite share: running something with gradients, and bounding its error.

The bound. Let ``exact`` be the float64 reference on the very inputs under test (already rounded to the dtype under
test), ``rough`` the reference run in that dtype. A result may err by a small multiple of the error of ``rough``, plus a
few units in the last place of the tensor's own size: an inexact backend fails however loose its dtype is.

Where rounding is amplified (large scores in an exponential), the error of a single run is a matter of luck. So
``rough`` also counts the float64 reference on inputs moved by one fp32 unit in the last place, the least that fp32
arithmetic does; for kernels on matrix units, by half a unit of the dtype, to which such units round what they multiply.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linnet.ops.core import map_state
from linnet.ops.core import named_tensors as named

__all__ = [
    "Program", "Result", "cast", "error_report", "evaluate", "fit", "leaves", "named", "nudged", "poisoned_memory",
    "seeded", "strided", "versions",
]  # fmt: skip

OUTPUT_FACTOR = 3.0
GRADIENT_FACTOR = 4.0
ULPS = 4.0
TINY = torch.finfo(torch.float32).tiny
FLOAT64 = 1e-10

Program = Callable[[dict[str, Any], Any], tuple[Any, Any]]


def seeded(*key: Any) -> torch.Generator:
    """A CPU generator seeded by its key, the same in every process and on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


def cast(x: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Floating tensors to ``dtype``, every tensor to ``device``; anything else unchanged."""
    if isinstance(x, Tensor):
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)
    if isinstance(x, dict):
        return {name: cast(value, dtype, device) for name, value in x.items()}
    if isinstance(x, tuple):
        return map_state(lambda part: cast(part, dtype, device), x)
    return x


def nudged(x: Any, generator: torch.Generator, unit: float) -> Any:
    """Every floating entry moved by up to ``unit`` of its own size, in float64."""
    if isinstance(x, dict):
        return {name: nudged(value, generator, unit) for name, value in x.items()}
    if isinstance(x, tuple):
        return map_state(lambda part: nudged(part, generator, unit), x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    step = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
    return x.double() * (1 + unit * step.to(x.device))


def leaves(x: Any) -> Any:
    """A copy whose floating tensors are leaves that want a gradient."""
    if isinstance(x, Tensor):
        x = x.detach().clone()
        return x.requires_grad_() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {name: leaves(value) for name, value in x.items()}
    return map_state(leaves, x) if isinstance(x, tuple) else x


@dataclass
class Result:
    """Values (``out…``, ``state…``) and gradients (``d<argument>``, ``dstate…``) of one run, all detached."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def fit(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with as many slots on axis 1 as ``like``: growing caches are aligned to the right and padded by zeros."""
    if x.shape == like.shape or x.dim() < 2 or x.dim() != like.dim():
        return x
    extra = like.shape[1] - x.shape[1]
    if extra < 0:
        return x[:, -extra:]
    return torch.cat([x.new_zeros(x.shape[0], extra, *x.shape[2:]), x], 1)


def evaluate(
    program: Program,
    inputs: dict[str, Any],
    state: Any,
    key: Any,
    like: Result | None = None,
    *,
    parts: str = "both",
    growing: bool = False,
    constants: Collection[str] = (),
) -> Result:
    """Run ``program(inputs, state)`` forward and backward from random cotangents on everything it returns.

    ``key`` seeds the cotangents; ``like`` (the exact result) fixes their shapes where a cache may be padded
    differently; ``parts`` restricts them to the "out" or the "state". In a ``growing`` cache, slots of zeros are
    padding and get no cotangent: no token would receive its gradient. Parts of the state named in ``constants`` take no
    part in differentiation.
    """
    inputs, state = leaves(inputs), leaves(state)
    out, after = program(inputs, state)
    values = named("out", out) | named("state", after)
    roots, cotangents = [], []
    for name, x in values.items():
        kind, part = name.partition(".")[0], name.rpartition(".")[2]
        if not (x.is_floating_point() and x.requires_grad) or parts not in ("both", kind):
            continue
        if kind == "state" and part in constants:
            continue
        value = x if like is None else like.values[name]
        # Rounded like bfloat16, so that the same cotangent is exact in every dtype.
        cotangent = torch.randn(value.shape, generator=seeded(key, name), dtype=torch.float64).bfloat16().to(x)
        if growing and name.startswith("state"):
            cotangent = cotangent * value.detach().flatten(2).any(-1)[..., None, None]
        roots.append(x)
        cotangents.append(fit(cotangent, x))
    wanted = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    moving = {name: x for name, x in named("state", state).items() if name.rpartition(".")[2] not in constants}
    wanted |= {name: x for name, x in moving.items() if x.requires_grad}
    found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if roots:
        found = torch.autograd.grad(roots, list(wanted.values()), cotangents, allow_unused=True)
    grads = {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), found, strict=True)}
    return Result({name: x.detach() for name, x in values.items()}, grads)


def error_report(
    got: Result,
    exact: Result,
    rough: Result | Sequence[Result] | None,
    *,
    only: tuple[str, ...] = ("values", "grads"),
    slack: float = 1.0,
) -> list[str]:
    """One line for each tensor of ``got`` that is further from ``exact`` than the bound allows; empty when all hold.

    The error of ``rough`` is the largest of its results; None means that ``got`` is float64 itself, bounded by 1e-10
    relative to the largest entry. ``slack`` multiplies the bound where a program rounds more often than the reference
    (carrying a state through many calls).
    """
    rough = [rough] if isinstance(rough, Result) else rough
    problems = []
    for kind in only:
        have, want = getattr(got, kind), getattr(exact, kind)
        if have.keys() != want.keys():
            return [f"{kind}: expected {sorted(want)}, got {sorted(have)}"]
        for name, e in want.items():
            x = fit(have[name], e)
            if x.shape != e.shape:
                problems.append(f"{name}: expected shape {list(e.shape)}, got {list(have[name].shape)}")
            elif not e.is_floating_point():
                if not torch.equal(x, e.to(x.dtype)):
                    problems.append(f"{name}: expected {e.tolist()}, got {x.tolist()}")
            else:
                factor = OUTPUT_FACTOR if kind == "values" else GRADIENT_FACTOR
                r = None if rough is None else [fit(getattr(run, kind)[name], e) for run in rough]
                problems += _compare(name, x, e, r, factor, slack)
    return problems


def _compare(name: str, x: Tensor, exact: Tensor, rough: list[Tensor] | None, factor: float, slack: float) -> list[str]:
    x, ulp = x.double(), torch.finfo(x.dtype).eps
    exact = exact.double()
    if x.numel() == 0:
        return []
    if not torch.equal(x.isfinite(), exact.isfinite()):
        bad = (x.isfinite() != exact.isfinite()).nonzero()[0].tolist()
        return [f"{name}: at {bad} expected {exact[tuple(bad)].item():.6g}, got {x[tuple(bad)].item():.6g}"]
    x, exact = x.nan_to_num(), exact.nan_to_num()
    size = float(exact.square().mean().sqrt())
    problems = []
    for norm in ("largest", "rms"):
        error = _norm(x - exact, norm)
        if rough is None:
            limit = FLOAT64 * max(float(exact.abs().max()), 1e-3)
            what = "1e-10 of the largest entry"
        else:
            rough_error = max(_norm(run.double().nan_to_num() - exact, norm) for run in rough)
            # A correctly rounded entry is off by up to half a unit in its own last place, the largest by the most.
            # Below the smallest normal number fp32 hardware may count as zero.
            floor = ulp * (ULPS * size + (float(exact.abs().max()) if norm == "largest" else 0.0)) + TINY
            limit = slack * (factor * rough_error + floor)
            what = f"{factor:g} x the reference's {rough_error:.3g} + {floor:.3g}"
        if error > limit:
            at = ""
            if norm == "largest":
                index = tuple(((x - exact).abs() == (x - exact).abs().max()).nonzero()[0].tolist())
                at = f" at {list(index)}: expected {exact[index].item():.8g}, got {x[index].item():.8g}"
            problems.append(f"{name}: {norm} error {error:.3g} > {limit:.3g} ({what}; rms of {name} {size:.3g}){at}")
    return problems


def _norm(x: Tensor, norm: str) -> float:
    return float(x.abs().max()) if norm == "largest" else float(x.square().mean().sqrt())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every floating tensor that Python code allocates without a value is full of NaN instead of yesterday's data."""

    def filling(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocate

    names = [(torch, n) for n in ("empty", "empty_like", "empty_strided")]
    names += [(Tensor, n) for n in ("new_empty", "new_empty_strided")]
    patches = [mock.patch.object(owner, n, filling(getattr(owner, n))) for owner, n in names]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def strided(x: Any) -> Any:
    """The same values in tensors that are not contiguous: every second element of a larger one, axes swapped."""
    if isinstance(x, dict):
        return {name: strided(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return map_state(strided, x)
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).repeat_interleave(2, 0)[::2].permute(order)


def versions(*trees: Any) -> list[int]:
    """How often each tensor of the (named) tuples or dicts has been written in place."""
    found = []
    for tree in trees:
        parts = tree.values() if isinstance(tree, dict) else (tree,)
        for part in parts:
            if isinstance(part, (Tensor, tuple)):
                found += [x._version for x in named("", part).values()]
    return found
