"""The contract of every registered op. An op is tested by registering it; nothing here names one.

`pytest tests/contract --device cuda` runs the same on a GPU. Triton kernels run on a CPU only in Triton's interpreter,
which has to be chosen before Triton is imported: `test_interpreter.py` starts this file again with it.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from linnet.ops.core import Case, Op, Segments, map_state, ops, select_rows, state_tensors

from .support import (
    Program,
    Result,
    cast,
    error_report,
    evaluate,
    fit,
    leaves,
    named,
    nudged,
    poisoned_memory,
    seeded,
    strided,
    versions,
)

B = 2
CHUNK = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILE: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
LOW = {"fp32": torch.float32, "bf16": torch.bfloat16}
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "scale": (float("nan"), float("inf"), "1", True, torch.ones(())),  # no gradient would reach a tensor
    "eps": (-1e-6, float("nan"), "0", None),
    "chunk_size": (0, -8, 2.5, "64", True),
    "kind": (["lstm"], "lstn"),
}


def _grid(*, reference: bool = True, hostile: bool = True) -> list[Any]:
    """(op, case, backend) of everything registered."""
    return [
        pytest.param(op, case, backend, id=f"{op.name}-{case.name}-{backend}".replace(" ", "_").replace(",", ""))
        for op in ops().values()
        for case in op.cases
        for backend in case.backends or op.backends
        if (reference or backend != "reference") and (hostile or not case.hostile)
    ]


every = pytest.mark.parametrize(("op", "case", "backend"), _grid())
every_backend = pytest.mark.parametrize(("op", "case", "backend"), _grid(reference=False))
every_mild_backend = pytest.mark.parametrize(("op", "case", "backend"), _grid(reference=False, hostile=False))
every_mild = pytest.mark.parametrize(("op", "case", "backend"), _grid(hostile=False))
every_case = pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case.name}".replace(" ", "_").replace(",", ""))
        for op in ops().values()
        for case in op.cases
        if not case.hostile
    ],
)


@pytest.fixture(autouse=True)
def _backend_runs_here(request: pytest.FixtureRequest, device: torch.device) -> None:
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if INTERPRETED and backend != "triton":
        pytest.skip("not a Triton kernel; this session runs Triton's interpreter")
    if INTERPRETED and request.node.callspec.params.get("dtype") == "bf16":
        pytest.skip("the interpreter multiplies bfloat16 matrices as if they were integers")
    if backend == "triton" and device.type == "cpu" and not INTERPRETED:
        pytest.skip("Triton kernels run on a CPU only in the interpreter: see test_interpreter.py")


def _dtype(backend: str) -> torch.dtype:
    """The most accurate dtype a backend computes in."""
    return torch.float32 if backend == "triton" else torch.float64


class Sample:
    """Inputs of one case in one dtype, with their exact (float64) and rough (same dtype) reference results."""

    def __init__(self, op: Op, case: Case, device: torch.device, dtype: torch.dtype, T: int, rows: int = B):
        self.op, self.case, self.device, self.dtype, self.T, self.rows = op, case, device, dtype, T, rows
        generator = seeded(op.name, case.name, T, rows)
        self.inputs = self.cast(case.make(generator, rows, T))
        # A growing cache keeps the dtype of the inputs, any other state is fp32.
        at_least = dtype if not op.fixed_state else torch.promote_types(dtype, torch.float32)
        state = case.state(generator, rows) if case.state is not None else None
        self.state = cast(state, at_least, device)
        self.key = (op.name, case.name, T)

    def cast(self, inputs: dict[str, Any]) -> dict[str, Any]:
        low = torch.promote_types(self.dtype, torch.float32)
        return {
            name: cast(x, low if name in self.case.keep_fp32 else self.dtype, self.device) for name, x in inputs.items()
        }

    @property
    def time(self) -> list[str]:
        """Arguments with layout [B, T, ...] among this case's; T may be a number of rows a token."""
        return [name for name in self.case.time if _is_time(self.inputs.get(name), self.rows, self.T)]

    def tokens(self, name: str, a: int, b: int) -> slice:
        """Where argument ``name`` holds the tokens from a to b."""
        rows = self.inputs[name].shape[1] // self.T
        return slice(a * rows, b * rows)

    def slice(self, inputs: dict[str, Any], a: int, b: int) -> dict[str, Any]:
        return inputs | {name: inputs[name][:, self.tokens(name, a, b)] for name in self.time}

    def call(self, backend: str, **options: Any) -> Program:
        """One call of the op on all inputs."""
        options = _options(self.op) | options
        if backend == "reference":
            options.pop("chunk_size", None)
        return lambda inputs, state: self.op.function(**inputs, state=state, backend=backend, **options)

    def references(self, backend: str, program: Program | None = None) -> tuple[Result, list[Result] | None]:
        """The exact and the rough results of ``program``, one plain call of the reference unless given."""
        program = self.call("reference") if program is None else program
        exact = self.run(program, dtype=torch.float64)
        return exact, None if self.dtype == torch.float64 else self.rough(backend, program, exact)

    def rough(self, backend: str, program: Program, exact: Result, **options: Any) -> list[Result]:
        # Matrix units take their operands in the dtype: the kernels round states and decayed writes to it as well, as
        # PyTorch's own products in that dtype would.
        unit = torch.finfo(self.dtype).eps / 2 if backend == "triton" else torch.finfo(torch.float32).eps
        unit = max(unit, torch.finfo(torch.float32).eps)
        runs = [self.run(program, exact, **options)]
        for i in range(3):
            generator = seeded(self.key, "nudged", i)
            inputs, state = nudged(self.inputs, generator, unit), nudged(self.state, generator, unit)
            runs.append(self.evaluate(program, inputs, state, exact, **options))
        return runs

    def run(
        self, program: Program, exact: Result | None = None, *, dtype: torch.dtype | None = None, **options: Any
    ) -> Result:
        """``program`` on these inputs, cast to ``dtype`` first when given."""
        inputs, state = self.inputs, self.state
        if dtype is not None:
            inputs, state = cast(inputs, dtype, self.device), cast(state, dtype, self.device)
        return self.evaluate(program, inputs, state, exact, **options)

    def evaluate(self, program: Program, inputs: dict[str, Any], state: Any, exact: Any, **options: Any) -> Result:
        options |= {"growing": not self.op.fixed_state, "constants": self.op.constants}
        return evaluate(program, inputs, state, self.key, exact, **options)

    def check(
        self, program: Program, exact: Result, rough: Result | list[Result] | None, what: str, slack: float = 1.0
    ) -> Result:
        got = self.run(program, exact)
        self.verdict(error_report(got, exact, rough, slack=slack), what)
        return got

    def verdict(self, problems: Iterable[str], what: str) -> None:
        lines = list(problems)
        if lines:
            head = f"{self.op.name}, case {self.case.name!r}, {what}, {self.dtype}, T={self.T}:"
            pytest.fail("\n  ".join([head, *lines]), pytrace=False)


def _is_time(x: Any, rows: int, T: int) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[0] == rows and x.shape[1] > 0 and x.shape[1] % T == 0


def _options(op: Op) -> dict[str, Any]:
    return {"chunk_size": CHUNK} if "chunk_size" in inspect.signature(op.function).parameters else {}


def _chunk(op: Op) -> int:
    return CHUNK if _options(op) else op.chunk


def _join(parts: list[Any], axis: int) -> Any:
    """Outputs (tensors, or tuples of them) joined along an axis."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, axis)
    return tuple(_join(list(group), axis) for group in zip(*parts, strict=True))


def _join_states(states: list[Any]) -> Any:
    """Rows of several states one under the other; caches of different size get padded on the left."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        widest = max(states, key=lambda x: x.shape[1] if x.dim() > 1 else 0)
        return torch.cat([fit(x, widest) if x.dim() > 1 else x for x in states])
    return type(first)(*(_join_states(list(group)) for group in zip(*states, strict=True)))


# ------------------------------------------------------------------------------------------------------ values


@every_backend
def test_matches_reference(op: Op, case: Case, backend: str, device: torch.device) -> None:
    C = _chunk(op)
    for T in (C + 1,) if INTERPRETED else (1, 2, 3, C - 1, C, C + 1, 2 * C + 7):
        sample = Sample(op, case, device, _dtype(backend), T)
        exact, rough = sample.references(backend)
        sample.check(sample.call(backend), exact, rough, backend)
        if INTERPRETED and case is not op.cases[0]:
            continue
        sample.state = None
        exact, rough = sample.references(backend)
        sample.check(sample.call(backend), exact, rough, f"{backend}, no initial state")
    if _options(op) and not INTERPRETED:
        sample = Sample(op, case, device, _dtype(backend), op.chunk + 5, rows=1)
        exact, rough = sample.references(backend)
        sample.check(sample.call(backend, chunk_size=None), exact, rough, f"{backend}, default chunk_size")


@pytest.mark.parametrize("dtype", LOW)
@every_backend
def test_low_precision(op: Op, case: Case, backend: str, dtype: str, device: torch.device) -> None:
    for T in (1, _chunk(op) + 1, 2 * _chunk(op) + 7):
        sample = Sample(op, case, device, LOW[dtype], T)
        exact, rough = sample.references(backend)
        got = sample.check(sample.call(backend), exact, rough, backend)
        first = next(iter(got.values))
        assert got.values[first].dtype == LOW[dtype], (
            f"{first}: expected the input dtype, got {got.values[first].dtype}"
        )
        for name, x in got.values.items():
            if name.startswith("state") and x.is_floating_point() and op.fixed_state:
                assert x.dtype == torch.float32, f"{name}: expected a state in fp32, got {x.dtype}"
        for name, x in got.grads.items():
            assert x.isfinite().all(), f"{name}: not finite"


@every_mild_backend
def test_autocast(op: Op, case: Case, backend: str, device: torch.device) -> None:
    sample = Sample(op, case, device, torch.float32, _chunk(op) + 1)
    exact, _ = sample.references(backend)

    def under_autocast(name: str) -> Program:
        program = sample.call(name)

        def run(inputs: dict[str, Any], state: Any) -> tuple[Any, Any]:
            with torch.autocast(device.type, torch.bfloat16):
                return program(inputs, state)

        return run

    rough = sample.run(under_autocast("reference"), exact)
    got = sample.check(under_autocast(backend), exact, rough, f"{backend}, under autocast")
    assert got.values[next(iter(got.values))].dtype == torch.bfloat16


@every
def test_one_sided_gradients(op: Op, case: Case, backend: str, device: torch.device) -> None:
    """A loss on the output alone, on the state alone, and with a single argument that wants a gradient."""
    sample = Sample(op, case, device, _dtype(backend), _chunk(op) + 3)
    program = sample.call(backend)
    for parts in ("out", "state"):
        exact = sample.run(sample.call("reference"), dtype=torch.float64, parts=parts)
        rough = None if backend != "triton" else sample.rough(backend, sample.call("reference"), exact, parts=parts)
        got = sample.run(program, exact, parts=parts)
        sample.verdict(error_report(got, exact, rough), f"{backend}, loss on the {parts} only")
    whole = sample.run(program)
    for name in (n for n, x in sample.inputs.items() if isinstance(x, Tensor) and x.is_floating_point()):

        def alone(inputs: dict[str, Any], state: Any, name: str = name) -> tuple[Any, Any]:
            return program({n: x.detach() if isinstance(x, Tensor) and n != name else x for n, x in inputs.items()},
                           map_state(Tensor.detach, state))  # fmt: skip

        got = sample.run(alone, whole)
        one = Result(got.values, {f"d{name}": got.grads[f"d{name}"]})
        both = Result(whole.values, {f"d{name}": whole.grads[f"d{name}"]})
        sample.verdict(
            error_report(one, both, both if backend == "triton" else None), f"{backend}, only d{name} wanted"
        )


@every_mild
def test_gradcheck(op: Op, case: Case, backend: str, device: torch.device) -> None:
    if _dtype(backend) != torch.float64:
        pytest.skip("finite differences need float64")
    sample = Sample(op, case, device, torch.float64, 5, rows=1)
    inputs, state = leaves(sample.inputs), leaves(sample.state)
    names = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    moving = {n: x for n, x in named("state", state).items() if x.requires_grad}
    moving = {n: x for n, x in moving.items() if n.removeprefix("state.") not in op.constants}

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        given = inputs | dict(zip(names, flat, strict=False))
        rest, order = iter(flat[len(names) :]), iter(named("state", state))
        before = map_state(lambda x: next(rest) if next(order) in moving else x, state)
        out, after = sample.call(backend, **({"chunk_size": 2} if _options(op) else {}))(given, before)
        found = named("out", out)
        if not op.constants:  # a state scaled by a constant of differentiation is not what finite differences see
            found |= named("state", after)
        return tuple(x for x in found.values() if x.is_floating_point() and x.numel())

    try:
        torch.autograd.gradcheck(function, (*(inputs[n] for n in names), *moving.values()), fast_mode=True)
    except torch.autograd.gradcheck.GradcheckError as error:
        wanted = ", ".join(f"{i} {n}" for i, n in enumerate((*names, *moving)))
        sample.verdict([str(error).split("\n")[0], f"inputs: {wanted}"], f"{backend}, gradcheck")


# -------------------------------------------------------------------------------------------- one call in other ways


@every
def test_split_anywhere(op: Op, case: Case, backend: str, device: torch.device) -> None:
    T = 2 * _chunk(op) + 7
    sample = Sample(op, case, device, _dtype(backend), T)
    exact, rough = sample.references(backend)
    program = sample.call(backend)

    def split(*at: int) -> Program:
        def run(inputs: dict[str, Any], state: Any) -> tuple[Any, Any]:
            outs = []
            for a, b in zip((0, *at), (*at, T), strict=True):
                out, state = program(sample.slice(inputs, a, b), state)
                outs.append(out)
            return _join(outs, 1), state

        return run

    C = _chunk(op)
    for at in ((1,), (C,), (C + 2,), (T - 1,), (1, 3, C - 1, C, 2 * C)):
        sample.check(split(*at), exact, rough, f"{backend}, split at {at}", slack=1.0 if rough is None else 2.0)


@every
def test_steps_equal_one_call(op: Op, case: Case, backend: str, device: torch.device) -> None:
    T = _chunk(op) + 3
    sample = Sample(op, case, device, _dtype(backend), T)
    exact, rough = sample.references(backend)
    program = sample.call(backend)

    def steps(inputs: dict[str, Any], state: Any) -> tuple[Any, Any]:
        outs = []
        for t in range(T):
            out, state = program(sample.slice(inputs, t, t + 1), state)
            outs.append(out)
        return _join(outs, 1), state

    sample.check(steps, exact, rough, f"{backend}, step by step", slack=1.0 if rough is None else 2.0)


@every
def test_causal(op: Op, case: Case, backend: str, device: torch.device) -> None:
    """Changing token t leaves every output before t as it was, bit for bit."""
    T = 2 * _chunk(op) + 7
    sample = Sample(op, case, device, _dtype(backend), T)
    other = sample.cast(case.make(seeded(op.name, "other", T), B, T))
    program = sample.call(backend)
    before = named("out", program(sample.inputs, sample.state)[0])
    for t in (1, _chunk(op) // 2, _chunk(op), T - 1):
        changed = dict(sample.inputs)
        for name in sample.time:
            changed[name] = sample.inputs[name].clone()
            here = sample.tokens(name, t, t + 1)
            changed[name][:, here] = other[name][:, here]
        for name, x in named("out", program(changed, sample.state)[0]).items():
            differ = (x[:, :t] != before[name][:, :t]).nonzero()
            if len(differ):
                sample.verdict([f"{name}: changing token {t} changed {len(differ)} earlier entries, the first at "
                                f"{differ[0].tolist()}"], backend)  # fmt: skip


@pytest.fixture(scope="module")
def separate_results() -> dict[Any, Any]:
    """What the reference makes of packed sequences one by one, which is the same for every backend."""
    return {}


@pytest.mark.parametrize("dtype", ["best", "bf16"])
@every
def test_packed_equals_separate(
    op: Op, case: Case, backend: str, dtype: str, device: torch.device, separate_results: dict[Any, Any]
) -> None:
    C = _chunk(op)
    patterns = [[1, 0, C + 1, 5, 1, C], [C], [0, 3, 2 * C + 3], [1, 1, 1]]
    if INTERPRETED and case is not op.cases[0]:
        pytest.skip("one case is enough of the interpreter, which takes seconds a token; a GPU runs all")
    if INTERPRETED:
        patterns = [[1, 0, C + 1]]
    elif dtype == "bf16":
        patterns = patterns[:1]
    for lengths in patterns:
        rows, total = len(lengths), sum(lengths)
        low = _dtype(backend) if dtype == "best" else torch.bfloat16
        sample = Sample(op, case, device, low, total, rows=1)
        if case.state is not None:
            state_dtype = low if not op.fixed_state else torch.promote_types(low, torch.float32)
            sample.state = cast(case.state(seeded(op.name, lengths), rows), state_dtype, device)
        segments = Segments.from_lengths(lengths, device)

        def separate(
            inputs: dict[str, Any], state: Any, sample: Sample = sample, lengths: list[int] = lengths
        ) -> tuple[Any, Any]:
            outs, states, start = [], [], 0
            one = sample.call("reference")
            for n, length in enumerate(lengths):
                row = select_rows(state, torch.tensor([n], device=sample.device))
                if length:
                    out, row = one(sample.slice(inputs, start, start + length), row)
                    outs.append(out)
                elif row is None:  # an empty row without a state ends with the state of no token at all
                    row = sample.call("reference", segments=Segments.from_lengths([0, 1], sample.device))(
                        sample.slice(inputs, 0, 1), None
                    )[1]
                    row = select_rows(row, torch.tensor([0], device=sample.device))
                states.append(row)
                start += length
            return _join(outs, 1), _join_states(states)

        for state in (sample.state, None):
            sample.state = state
            key = (*sample.key, tuple(lengths), low, state is None, backend == "triton")
            if key not in separate_results:
                separate_results[key] = sample.references(backend, separate)
            exact, rough = separate_results[key]
            how = f"packed {lengths}, {'with' if state is not None else 'without'} initial state"
            sample.check(sample.call(backend, segments=segments), exact, rough, f"{backend}, {how}")


@every_backend
def test_strided_inputs(op: Op, case: Case, backend: str, device: torch.device) -> None:
    sample = Sample(op, case, device, _dtype(backend), _chunk(op) + 3)
    exact, rough = sample.references(backend)
    program = sample.call(backend)
    sample.check(
        lambda inputs, state: program(strided(inputs), strided(state)), exact, rough, f"{backend}, strided inputs"
    )


# ------------------------------------------------------------------------------------------------------ hygiene


@every
def test_writes_to_nothing_it_was_given(op: Op, case: Case, backend: str, device: torch.device) -> None:
    sample = Sample(op, case, device, _dtype(backend), _chunk(op) + 3)
    inputs, state = leaves(sample.inputs), leaves(sample.state)
    count = versions(inputs, state)
    out, after = sample.call(backend)(inputs, state)
    loss = sum(x.sum() for x in (named("out", out) | named("state", after)).values() if x.requires_grad)
    loss.backward()
    assert versions(inputs, state) == count, f"{op.name}, {case.name}, {backend}: an input or the state was written to"
    count = versions(after)
    sample.call(backend)(sample.slice(inputs, 0, 1), after)
    assert versions(after) == count, f"{op.name}, {case.name}, {backend}: a step wrote to the state it was given"


@every_backend
def test_reads_no_memory_it_did_not_write(op: Op, case: Case, backend: str, device: torch.device) -> None:
    for lengths in (None, [3, 0, _chunk(op) + 1, 1]):
        if lengths is None:
            sample = Sample(op, case, device, _dtype(backend), 2 * _chunk(op) + 7)
            program = sample.call(backend)
        else:
            sample = Sample(op, case, device, _dtype(backend), sum(lengths), rows=1)
            sample.state = None
            program = sample.call(backend, segments=Segments.from_lengths(lengths, device))
        clean = sample.run(program)
        with poisoned_memory():
            dirty = sample.run(program)
        rough = clean if backend == "triton" else None
        sample.verdict(error_report(dirty, clean, rough), f"{backend}, memory poisoned, segments {lengths}")


@every_backend
def test_deterministic(op: Op, case: Case, backend: str, device: torch.device) -> None:
    sample = Sample(op, case, device, _dtype(backend), 2 * _chunk(op) + 7)
    program = sample.call(backend)
    before = torch.are_deterministic_algorithms_enabled()
    # PyTorch's own attention kernels may add gradients in any order on a GPU unless told not to.
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        first, second = sample.run(program), sample.run(program)
    finally:
        torch.use_deterministic_algorithms(before)
    for kind in ("values", "grads"):
        for name, x in getattr(first, kind).items():
            assert torch.equal(x, getattr(second, kind)[name]), f"{op.name}, {case.name}, {backend}: {name} differs"


def _any_length(program: Program, names: list[str]) -> Program:
    """The compiled ``program`` with the lengths of these arguments as symbols; compiling fails where one gets fixed."""

    def run(inputs: dict[str, Any], state: Any) -> tuple[Any, Any]:
        for name in names:
            torch._dynamo.mark_dynamic(inputs[name], 1)
        return program(inputs, state)

    return run


@every_mild_backend
def test_compile(op: Op, case: Case, backend: str, device: torch.device) -> None:
    """One graph without breaks: forward, backward, state and packing as in eager mode; in an op's first case also one
    graph for every length."""
    C, first = _chunk(op), case is op.cases[0]
    lengths = [3, 0, C + 1, 1]
    for packing, times in ((None, (C + 1, 2 * C + 7) if first else (C + 1,)), (lengths, (sum(lengths),))):
        segments = None if packing is None else Segments.from_lengths(packing, device)
        options = {"segments": segments}
        compiled = torch.compile(Sample(op, case, device, _dtype(backend), 2).call(backend, **options), **COMPILE)
        for i, T in enumerate(times):
            sample = Sample(op, case, device, _dtype(backend), T, rows=B if packing is None else 1)
            if packing is not None and case.state is not None:
                sample.state = cast(case.state(seeded(op.name, T), len(packing)), _dtype(backend), device)

            expected = sample.run(sample.call(backend, **options))
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                got = sample.run(_any_length(compiled, sample.time) if len(times) > 1 else compiled, expected)
            rough = expected if backend == "triton" else None
            sample.verdict(error_report(got, expected, rough), f"{backend}, compiled, packed {packing}")


# --------------------------------------------------------------------------------------------- claims and complaints


@pytest.mark.parametrize(
    ("op", "identity"),
    [
        pytest.param(op, identity, id=f"{op.name}-{identity.claim}".replace(" ", "_"))
        for op in ops().values()
        for identity in op.identities
    ],
)
def test_identity(op: Op, identity: Any) -> None:
    sides = (state_tensors(side) for side in identity.check(seeded(op.name, identity.claim)))
    left, right = (Result({str(i): x for i, x in enumerate(side)}, {}) for side in sides)
    assert left.values, "the identity compares nothing"
    problems = error_report(left, right, None)
    assert not problems, f"{op.name}: {identity.claim}: " + "; ".join(problems)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in ops().items()])
def test_cost(op: Op) -> None:
    letters = {"B": 2, "T": 64, "H": 2, "K": 16, "V": 16, "D": 32, "W": 4, "N": 2}
    required = [n for n, p in inspect.signature(op.cost).parameters.items() if p.default is p.empty]
    assert set(required) <= set(letters), f"{op.name}: cost() needs {required}; the suite knows {sorted(letters)}"
    given = {n: letters[n] for n in required}
    one, two = op.cost(**given), op.cost(**given | {"T": 128})
    assert all(isinstance(x, int) and x > 0 for x in one)
    assert two.flops >= 2 * one.flops and two.bytes > one.bytes
    assert (two.state_bytes == one.state_bytes) == op.fixed_state


def _refuses(op: Op, call: Program, inputs: dict[str, Any], state: Any, names: Iterable[str], what: str) -> None:
    try:
        call(inputs, state)
    except ValueError as error:
        known = "|".join(re.escape(name) for name in names)
        assert re.match(rf"({known})\b[^:]*:", str(error)), (
            f"{what}: the message does not begin with the argument: {error}"
        )
        assert "got" in str(error), f"{what}: the message does not say what came: {error}"
    except Exception as error:
        pytest.fail(f"{op.name}, {what}: expected a ValueError, got {type(error).__name__}: {error}", pytrace=False)
    else:
        pytest.fail(f"{op.name}, {what}: expected a ValueError, but the call went through", pytrace=False)


def _longer(x: Tensor, axis: int) -> Tensor:
    extra = x.narrow(axis, 0, 1) if x.shape[axis] else x.new_zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]))
    return torch.cat([x, extra], axis)


@every_case
def test_bad_input(op: Op, case: Case, device: torch.device) -> None:
    sample = Sample(op, case, device, torch.float32, 5)
    call, inputs, state = sample.call("auto"), sample.inputs, sample.state
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    parts = named("state", state)
    anyone = [*tensors, *parts, "state"]
    elsewhere = torch.device("meta")
    for name, x in tensors.items():
        for bad, what in ((x[None], "one axis too many"), (x[..., 0], "one axis too few"), (x.tolist(), "a list")):
            allowed = anyone if what == "one axis too few" else [name]  # g [B,T,H,K] without K is the scalar gate
            if what == "one axis too few" and _legal(call, inputs | {name: bad}, state):
                continue
            _refuses(op, call, inputs | {name: bad}, state, allowed, f"{name} with {what}")
        for axis in range(x.dim()):
            if axis == 1 and sample.time == [name]:
                continue  # the only argument with a time axis may have any length
            if _widens_the_output(call, inputs, inputs | {name: _longer(x, axis)}, state):
                continue
            _refuses(op, call, inputs | {name: _longer(x, axis)}, state, anyone, f"{name} longer on axis {axis}")
        _refuses(op, call, inputs | {name: x.long()}, state, [name], f"{name} with integers")
        _refuses(op, call, inputs | {name: x.to(elsewhere)}, state, anyone, f"{name} on another device")
        if name not in case.keep_fp32 and len([n for n in tensors if n not in case.keep_fp32]) > 1:
            others = [n for n in tensors if n not in case.keep_fp32]
            if _legal(call, inputs | {name: x.double()}, state):  # a parameter that may have any floating dtype
                expected, got = call(inputs, state)[0], call(inputs | {name: x.double()}, state)[0]
                torch.testing.assert_close(got, expected)
                continue
            _refuses(op, call, inputs | {name: x.double()}, state, [*others, *parts], f"{name} in float64")
    for name, x in parts.items():

        def with_part(new: Tensor, name: str = name) -> Any:
            order = iter(parts)
            return map_state(lambda old: new if next(order) == name else old, state)

        _refuses(op, call, inputs, with_part(x[None]), [name], f"{name} with one axis too many")
        _refuses(op, call, inputs, with_part(_longer(x, 0)), [name], f"{name} with too many rows")
        for axis in range(1, x.dim()):
            if op.fixed_state or axis != 1:
                _refuses(op, call, inputs, with_part(_longer(x, axis)), list(parts), f"{name} longer on axis {axis}")
        wrong = x.long() if x.is_floating_point() else x.float()
        _refuses(op, call, inputs, with_part(wrong), [name], f"{name} in {wrong.dtype}")
        _refuses(op, call, inputs, with_part(x.to(elsewhere)), list(parts), f"{name} on another device")
    if state is not None:
        _refuses(op, call, inputs, tuple(state), ["state"], "a state that is a plain tuple")
        _refuses(op, call, inputs, next(iter(parts.values())), ["state"], "a state that is a tensor")
    for what, cut in (("no sequence", slice(0)), ("no token", (slice(None), slice(0)))):
        _refuses(op, call, inputs | {name: inputs[name][cut] for name in sample.time}, None, sample.time, what)
    packed = Sample(op, case, device, torch.float32, 5, rows=1)
    for segments, what in (
        (Segments.from_lengths([2, 2], device), "segments of another total"),
        (Segments.from_lengths([2, 3], "meta"), "segments on another device"),
        (torch.tensor([0, 5]), "segments that are a tensor"),
    ):
        _refuses(op, packed.call("auto", segments=segments), packed.inputs, None, ["segments"], what)
    two = Segments.from_lengths([2, 3], device)
    _refuses(op, sample.call("auto", segments=two), inputs, None, ["segments"], "segments with a batch of two")
    if state is not None:
        _refuses(
            op, packed.call("auto", segments=two), packed.inputs, packed.state, parts, "one state row for two segments"
        )
    _refuses(op, sample.call("fastest"), inputs, state, ["backend"], "an unknown backend")
    known = inspect.signature(op.function).parameters
    for option, values in BAD_OPTIONS.items():
        for bad in values if option in known else ():
            given = {name: x for name, x in inputs.items() if name != option}
            for by in ("auto", "reference"):  # also where the option changes nothing
                plain = partial(_plainly, op, by)
                _refuses(op, plain, given | {option: bad}, state, [option], f"{by}, {option}={bad!r}")
    if "q" in tensors:
        none = {name: x[..., :0, :] if x.dim() == 4 else x[..., :0] for name, x in tensors.items() if x.dim() > 1}
        _refuses(op, call, inputs | none, None, ["q"], "no heads")


@every_case
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_defaults_of_torch_do_not_matter(op: Op, case: Case, default: Any) -> None:
    """Neither the default dtype nor the default device reaches into a call, packed or not."""
    device, segments = torch.device("cpu"), Segments.from_lengths([9, 0, 1, 13])
    samples = [Sample(op, case, device, torch.float32, 23, rows) for rows in (B, 1)]
    for sample, options in zip(samples, ({}, {"segments": segments}), strict=True):
        inputs, state = sample.inputs, None if options else sample.state
        want = sample.call("auto", **options)(inputs, state)
        before = torch.get_default_dtype()
        try:
            if isinstance(default, torch.dtype):
                torch.set_default_dtype(default)
            with torch.device(default) if isinstance(default, str) else nullcontext():
                got = sample.call("auto", **options)(inputs, state)
        finally:
            torch.set_default_dtype(before)
        torch.testing.assert_close(named("out", got), named("out", want), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of ops it takes slice by slice
@every_case
def test_other_derivatives_are_right_or_refused(op: Op, case: Case) -> None:
    """Those of `torch.func`, those of a derivative and those forward are never silently something else."""
    backend = "chunked" if "chunked" in (case.backends or op.backends) else "reference"
    sample = Sample(op, case, torch.device("cpu"), torch.float64, 7)
    moving = {name: x for name, x in sample.inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}

    def loss(backend: str, *given: Tensor) -> Tensor:
        call = sample.call(backend)
        out, _ = call(sample.inputs | dict(zip(moving, given, strict=True)), sample.state)
        return (out if isinstance(out, Tensor) else out[0]).sum()

    def gradients(backend: str, **options: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        given = [x.clone().requires_grad_() for x in moving.values()]
        return given, torch.autograd.grad(loss(backend, *given), given, materialize_grads=True, **options)

    first = torch.func.grad(partial(loss, backend), argnums=tuple(range(len(moving))))(*moving.values())
    torch.testing.assert_close(first, gradients(backend)[1])

    every = tuple(range(len(moving)))
    several = [torch.stack([x, 0.5 * x]) for x in moving.values()]
    found = torch.func.vmap(torch.func.grad(partial(loss, backend), argnums=every))(*several)
    torch.testing.assert_close([x[0] for x in found], list(first))
    half = torch.func.jacrev(partial(loss, backend), argnums=every)(*(x[1] for x in several))
    torch.testing.assert_close([x[1] for x in found], list(half))

    def second(backend: str) -> list[Tensor]:
        given, grads = gradients(backend, create_graph=True)
        total = sum(g.square().sum() for g in grads) + 0 * sum(x.sum() for x in given)
        return [torch.zeros_like(g) if g is None else g for g in torch.autograd.grad(total, given, allow_unused=True)]

    try:
        found = second(backend)
    except RuntimeError as error:
        assert "can be differentiated once" in str(error)
    else:
        torch.testing.assert_close(found, second("reference"))

    tangents = tuple(torch.ones_like(x) for x in moving.values())
    try:
        _, along = torch.func.jvp(partial(loss, backend), tuple(moving.values()), tangents)
    except NotImplementedError:
        return
    torch.testing.assert_close(along, sum(g.sum() for g in first))


def _plainly(op: Op, backend: str, inputs: dict[str, Any], state: Any) -> Any:
    return op.function(**inputs, state=state, backend=backend)


def _widens_the_output(call: Program, inputs: dict[str, Any], longer: dict[str, Any], state: Any) -> bool:
    """Whether the longer axis is one of free size, that of the outputs."""
    if not _legal(call, longer, state):
        return False
    shapes = ([x.shape for x in named("out", call(given, state)[0]).values()] for given in (inputs, longer))
    return next(shapes) != next(shapes)


def _legal(call: Program, inputs: dict[str, Any], state: Any) -> bool:
    try:
        call(inputs, state)
    except ValueError:
        return False
    return True
