"""The canonical linear time-varying form of what a mixer does to its state and to its values.

A layer whose gates, keys and queries are frozen at what an input made of them is a linear system that changes from
token to token (the dynamical-systems framework of Sieber et al. 2024, arXiv 2405.15731)::

    y_t = C_t h_t + D_t v_t          h_{t+1} = A_t h_t + B_t v_t          y = Phi v

with ``h_t`` the state before token t. All of it is read off the layer itself: single steps from unit vectors give the
matrices, one-hot values the block-triangular ``Phi``. The matrices of two layers may differ by a change of basis and
mean the same; ``Phi`` does not depend on it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.mixers import Mixer, mixers
from linnet.ops.core import Segments, map_state, named_tensors, ops, repeat_rows, select_rows

__all__ = [
    "Canonical",
    "EngineCall",
    "affine_steps",
    "canonical",
    "engine_calls",
    "memory",
    "nonlinearity",
    "ranks",
    "realise",
    "simulate",
    "transfer",
    "with_memory",
]

_NOT_MEMORY = ("tail", "m", "position")  # convolution tails, stabilisers, counters: they follow their own course
_VALUES = ("v", "u", "b", "x")  # what the engines call the argument that is written into the state
_ROWS = 512  # probes in one call


class Canonical(NamedTuple):
    """``y_t = C_t h_t + D_t v_t``, ``h_{t+1} = A_t h_t + B_t v_t`` with ``h_0 = 0``, on flattened values and outputs.

    Lists over time, because a minimal realisation changes its size: ``A [n', n]``, ``B [n', m]``, ``C [p, n]``, ``D [p,
    m]``.
    """

    A: list[Tensor]
    B: list[Tensor]
    C: list[Tensor]
    D: list[Tensor]


# Mixers: the state


def _is_memory(path: str) -> bool:
    return path.rpartition(".")[2] not in _NOT_MEMORY


def memory(state: Any) -> Tensor:
    """The memory in a mixer's state as one vector a row, ``[N, n]``: all but convolution tails, positions and
    stabilisers."""
    return torch.cat([x.flatten(1) for path, x in named_tensors("", state).items() if _is_memory(path)], 1)


def with_memory(state: Any, v: Tensor) -> Any:
    """``state`` with the vectors ``v [N, n]`` for its memory: the inverse of :func:`memory`."""
    return _replace(state, v, _is_memory)


def _replace(state: Any, v: Tensor, chosen: Callable[[str], bool]) -> Any:
    parts = named_tensors("", state)
    sizes = [x[0].numel() if chosen(path) else 0 for path, x in parts.items()]
    new = iter(
        part.reshape(-1, *x.shape[1:]) if chosen(path) else x
        for (path, x), part in zip(parts.items(), v.split(sizes, 1), strict=True)
    )
    return map_state(lambda _: next(new), state)


@torch.no_grad()
def affine_steps(mixer: Mixer, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """``A [T, n, n]`` and ``b [T, n]`` such that a memory ``v`` before token t is ``A_t v + b_t`` after it, where the
    state enters its own update linearly (``card.linear_state``): ``b_t`` from ``v = 0``, ``A_t`` from unit vectors.

    Args:
        mixer: of any dtype; float64 gives exact matrices.
        x: inputs ``[1, T, D]``.
        state: one row; what in it is not memory follows its own course from there.
    """
    size = memory(state).shape[1]
    basis = torch.cat([x.new_zeros(1, size), torch.eye(size).to(x)])
    A, b = [], []
    for step in x.split(1, 1):
        after = memory(mixer(step.expand(size + 1, -1, -1), with_memory(repeat_rows(state, size + 1), basis))[1])
        A.append((after[1:] - after[0]).T)
        b.append(after[0])
        state = mixer(step, state)[1]
    return torch.stack(A), torch.stack(b)


# Engines: values in, readings out


class EngineCall(NamedTuple):
    """One call of an engine inside a mixer.

    Attributes:
        engine: its name in the registry.
        arguments: of the call.
        value: name of the one that is written into the state.
        length: tokens T. An argument may have several entries a token (the substeps of a product of transitions).
    """

    engine: str
    arguments: dict[str, Any]
    value: str
    length: int

    @property
    def values(self) -> Tensor:
        """``[T, m]``, what is written for each token."""
        return self.arguments[self.value].reshape(self.length, -1)

    def run(self, **changed: Any) -> tuple[Tensor, Any]:
        """The reading and the state, with some arguments changed."""
        out, state = ops()[self.engine].function(**self.arguments | changed)
        return (out if isinstance(out, Tensor) else out[0]), state

    def rows(self, values: Tensor, start: int = 0, stop: int | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """The readings ``[R, T', p]`` of rows of other values ``[R, T', m]`` from one token to another, everything else
        repeated, and the state."""
        stop = self.length if stop is None else stop
        other = {}
        for name in {name for case in ops()[self.engine].cases for name in case.time}:
            x = self.arguments.get(name)
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == 1 and x.shape[1] % self.length == 0:
                each = x.shape[1] // self.length
                other[name] = x[:, start * each : stop * each].expand(len(values), *[-1] * (x.dim() - 1))
        values = values.reshape(other[self.value].shape)
        read, after = self.run(**other | {self.value: values, "state": state})
        return read.flatten(2), after


@torch.no_grad()
def engine_calls(mixer: Mixer, x: Tensor) -> list[EngineCall]:
    """The engine calls (short convolutions apart) that ``mixer`` makes on ``x [1, T, D]``, in order."""
    found: list[EngineCall] = []
    with _recording(mixer, found, x.shape[1]):
        mixer(x)
    return found


@contextmanager
def _recording(mixer: Mixer, found: list[EngineCall], length: int) -> Iterator[None]:
    """Mixers find an engine by the name under which their module imported it: for the time of a call, those names lead
    to functions that take notes."""
    mixers()  # all of their modules are loaded now
    classes = {cls for module in mixer.modules() for cls in type(module).__mro__}
    names = {cls.__module__ for cls in classes} | {name for name in sys.modules if name.startswith("linnet.mixers.")}
    engines = {op.function: op.name for op in ops().values() if op.name != "conv"}

    def noting(function: Callable[..., Any], engine: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
            time = {name for case in ops()[engine].cases for name in case.time} & given.keys()
            # Where nothing is called a value, as in nonlinear cells, whatever comes in over time will do.
            value = next((name for name in (*_VALUES, *sorted(time)) if name in time), None)
            if value is not None:
                found.append(EngineCall(engine, given, value, length))
            return function(*args, **kwargs)

        return call

    replaced = []
    for module in (sys.modules[name] for name in sorted(names) if name in sys.modules):
        for name, item in list(vars(module).items()):
            if inspect.isfunction(item) and item in engines:
                replaced.append((module, name, item))
                setattr(module, name, noting(item, engines[item]))
    try:
        yield
    finally:
        for module, name, item in replaced:
            setattr(module, name, item)


@torch.no_grad()
def nonlinearity(call: EngineCall) -> float:
    """How far the reading is from additive and homogeneous in the values, relative to its size; 0 when it is linear."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, *call.values.shape, generator=generator, dtype=torch.float64).to(call.values)
    parts = [call.rows(v[None])[0] for v in (one, two, 2 * one - 3 * two)]
    want = 2 * parts[0] - 3 * parts[1]
    return float((parts[2] - want).abs().max() / want.abs().max().clamp(min=1e-300))


@torch.no_grad()
def transfer(call: EngineCall) -> Tensor:
    """``Phi [T, p, T, m]``: the reading at every token for one-hot values at every token."""
    T, m = call.values.shape
    probes = torch.eye(T * m).to(call.values).view(T * m, T, m)
    size = _ROWS if call.arguments.get("segments") is None else 1  # a packed call has one row
    read = torch.cat([call.rows(part)[0] for part in probes.split(size)])
    return read.view(T, m, T, -1).permute(2, 3, 0, 1)


@torch.no_grad()
def canonical(call: EngineCall) -> Canonical | None:
    """The matrices of a linear call, not packed, in the coordinates of its own state; None when that grows with the
    sequence.

    Memory are the parts of the state that the values reach; the others (sums of keys, stabilisers) go their own way.
    """
    if not ops()[call.engine].fixed_state:
        return None
    values, (T, m) = call.values, call.values.shape
    state = call.arguments.get("state")
    if state is None:  # of a sequence without tokens
        state = select_rows(call.run(segments=Segments.from_lengths([0, T], values.device))[1], torch.tensor([0]))
    once, twice = (named_tensors("", call.rows(f * values[None])[1]) for f in (1, 2))
    reached = {path for path, x in once.items() if not torch.equal(x, twice[path])}
    n = sum(x.numel() for path, x in once.items() if path in reached)
    unit = torch.eye(n + m, dtype=torch.float64)
    before, written = unit[:, :n], unit[:, None, n:].to(values)
    found: list[list[Tensor]] = [[], [], [], []]
    for t in range(T):
        start = _replace(repeat_rows(state, n + m), before, lambda path: path in reached)
        read, after = call.rows(written, t, t + 1, start)
        after = torch.cat([x.flatten(1) for path, x in named_tensors("", after).items() if path in reached], 1)
        columns = after[:n].T, after[n:].T, read[:n, 0].T, read[n:, 0].T
        for matrices, matrix in zip(found, columns, strict=True):
            matrices.append(matrix)
        state = call.rows(values[None, t : t + 1], t, t + 1, state)[1]
    return Canonical(*found)


def simulate(form: Canonical, v: Tensor) -> Tensor:
    """``y [T, p]`` from ``v [T, m]``."""
    h, out = v.new_zeros(form.A[0].shape[1]), []
    for A, B, C, D, value in zip(*form, v, strict=True):
        out.append(C @ h + D @ value)
        h = A @ h + B @ value
    return torch.stack(out)


def ranks(phi: Tensor, *tolerances: float) -> list[list[int]]:
    """For every cut s = 1 .. T-1 the rank of what tokens before s do to readings from s on: the numbers that any linear
    system with this ``Phi`` must carry over that cut. One list a tolerance: singular values count above it times the
    largest of all cuts."""
    spectra = [torch.linalg.svdvals(_cut(phi, s)) for s in range(1, phi.shape[0])]
    top = max((float(values[0]) for values in spectra), default=0.0)
    return [[int((values > tolerance * top).sum()) for values in spectra] for tolerance in tolerances]


def _cut(phi: Tensor, s: int) -> Tensor:
    return phi[s:, :, :s].flatten(2).flatten(0, 1)


def realise(phi: Tensor, tolerance: float = 1e-9) -> Canonical:
    """The smallest linear time-varying system with a given ``Phi [T, p, T, m]``, from singular value decompositions of
    its cuts (Ho & Kalman's method, for systems that vary). Truncated at a larger tolerance it is an approximation."""
    T, p, _, m = phi.shape
    readers, writers = [phi.new_zeros(T * p, 0)], [phi.new_zeros(0, 0)]
    for s in range(1, T):
        U, values, V = torch.linalg.svd(_cut(phi, s), full_matrices=False)
        rank = int((values > tolerance * values[0]).sum())
        root = values[:rank].sqrt()
        readers.append(U[:, :rank] * root)
        writers.append(root[:, None] * V[:rank])
    writers.append(phi.new_zeros(0, T * m))
    A, B, C, D = [], [], [], []
    for t in range(T):
        before, after = writers[t], writers[t + 1]
        A.append(after[:, : t * m] @ torch.linalg.pinv(before) if before.numel() else phi.new_zeros(len(after), 0))
        B.append(after[:, t * m :])
        C.append(readers[t][:p])
        D.append(phi[t, :, t])
    return Canonical(A, B, C, D)
