"""The registry of ops and the choice of a backend.

An op is registered once, with sample inputs. Registration is what puts it under the contract suite
(`tests/contract`), `linnet env`'s self-test, `linnet bench` and the documentation.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_choice
from .state import loadable

__all__ = [
    "BACKENDS",
    "Case",
    "Cost",
    "Identity",
    "Op",
    "backend",
    "get_op",
    "import_modules",
    "ops",
    "register_op",
    "resolve_backend",
]

BACKENDS = ("reference", "chunked", "triton")
"""The ways to run an op, the plainest first."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of inputs; the kernels compute in fp32
_forced: str | None = None
_ops: dict[str, Op] = {}


class Cost(NamedTuple):
    """What one forward call must do at least: floating-point operations, bytes moved through device memory (each
    input read once, each output written once), and bytes of recurrent state."""

    flops: int
    bytes: int
    state_bytes: int


class Identity(NamedTuple):
    """A claim such as "reduces to linear attention when g = 0": ``check(generator)`` computes both sides in float64."""

    claim: str
    check: Callable[[torch.Generator], tuple[Any, Any]]


@dataclass(frozen=True)
class Case:
    """Sample inputs of an op in one of its modes.

    Attributes:
        name: what the case shows; hostile cases hold legal but extreme values.
        make: ``make(generator, B, T)`` -> keyword arguments in float64 on the CPU; the suite casts the floating
            tensors to the dtype under test (``keep_fp32`` excepted).
        time: names of the arguments with layout ``[B, T, ...]``, or ``[B, T * n, ...]`` with n rows a token; the suite
            slices and packs these.
        state: ``state(generator, rows)`` -> a random initial state (float64), or None for a stateless mode.
        keep_fp32: arguments that stay fp32 when the others are cast down (log-decays, gates).
        hostile: extreme inputs; outputs must stay finite and accurate.
        backends: backends that implement this mode (all of the op's when None).
    """

    name: str
    make: Callable[[torch.Generator, int, int], dict[str, Any]]
    time: tuple[str, ...]
    state: Callable[[torch.Generator, int], Any] | None = None
    keep_fp32: tuple[str, ...] = ()
    hostile: bool = False
    backends: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Op:
    """A registered op; see the fields of :class:`Case` for what its sample inputs mean.

    Attributes:
        chunk: default ``chunk_size`` where the op takes one, else the length at which its work is cut into blocks.
        fixed_state: whether the state keeps its size. A growing one grows along axis 1, aligned to the right and padded
            with zeros in front, and has the dtype of the inputs; a fixed one is fp32.
        constants: parts of the state that are constants of differentiation (a stabiliser no output depends on).
    """

    name: str
    function: Callable[..., tuple[Tensor, Any]]
    backends: tuple[str, ...]
    cases: tuple[Case, ...]
    cost: Callable[..., Cost]
    chunk: int = 64
    fixed_state: bool = True
    constants: tuple[str, ...] = ()
    identities: tuple[Identity, ...] = field(default=())


@cache
def import_modules(package: str) -> None:
    """Import every module of ``package``, for what registers itself there."""
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def register_op(op: Op) -> Op:
    """Add ``op`` to the registry; its name must be new."""
    if op.name in _ops:
        raise ValueError(f"op {op.name!r} is already registered")
    loadable(op.function)
    _ops[op.name] = op
    return op


def ops() -> dict[str, Op]:
    """All registered ops by name."""
    import linnet.ops  # noqa: F401  (importing the package registers its engines)

    return dict(_ops)


def get_op(name: str) -> Op:
    """The op called ``name``; ValueError with the known names otherwise."""
    table = ops()
    check_choice("op", name, sorted(table))
    return table[name]


@cache
def has_triton() -> bool:
    """Whether Triton can be imported (checked without importing it)."""
    return find_spec("triton") is not None


def check_backend(name: str) -> str:
    """``name`` if it is a backend or "auto"; ValueError otherwise."""
    check_choice("backend", name, ("auto", *BACKENDS))
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for every op called inside: ``with linnet.backend("reference"): ...``."""
    global _forced
    before, _forced = _forced, check_backend(name)
    try:
        yield
    finally:
        _forced = before


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton runs kernels where ``x`` is: on a GPU, or in its interpreter."""
    return x.device.type != "cpu" or bool(os.environ.get("TRITON_INTERPRET"))


def resolve_backend(requested: str, available: tuple[str, ...], x: Tensor) -> str:
    """The backend to run. An explicit request wins over the context manager; "auto" takes Triton on a GPU, else the
    vectorised PyTorch form, else the reference."""
    name = check_backend(requested)
    if name == "auto" and _forced is not None:
        # A forced backend that this op does not have falls back to auto: the context spans whole models.
        name = _forced if _forced in available else "auto"
    if name == "auto":
        on_gpu = x.device.type == "cuda" and x.dtype != torch.float64
        if "triton" in available and on_gpu and has_triton():
            return "triton"
        return "chunked" if "chunked" in available else "reference"
    if name not in available:
        raise ValueError(f"backend: this call supports {available}, got {name!r}")
    if name == "triton" and not runs_kernels(x):
        raise ValueError("backend: triton needs tensors on a GPU (or its interpreter, TRITON_INTERPRET=1), got cpu")
    return name
