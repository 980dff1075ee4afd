"""The contract of every registered mixer. A mixer is tested by registering it, with the examples on its card.

Parameters are drawn at random before a test (`randomize`), so that no branch hides behind a zero initial weight.
`pytest tests/contract --device cuda` runs the same on a GPU.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linnet.ops
from linnet.evaluation.linear_form import affine_steps, memory, with_memory
from linnet.mixers import Mixer, build_mixer, get_mixer, mixers, parse_spec
from linnet.mixers.claims import randomize
from linnet.ops import Segments, backend
from linnet.ops.core import map_state, repeat_rows, select_rows, state_bytes, state_tensors

from .support import Program, Result, error_report, evaluate, named, nudged, seeded, versions

B = 2
LENGTHS = (1, 2, 3, 15, 16, 17, 39)
PACKED = (3, 1, 17, 0, 1, 5)
ENGINES = tuple(name for name in linnet.ops.__all__ if inspect.isfunction(getattr(linnet.ops, name)))
GATES = ("g", "gv", "w", "i", "f", "beta", "a", "delta", "A")
WEIGHTS = {"dplr": ("a",), "paragru": ("A",), "paralstm": ("A",)}  # of these names, what no exponential is taken of
LOW = {"fp32": torch.float32, "bf16": torch.bfloat16}

each = pytest.mark.parametrize("kind", [pytest.param(cls, id=name) for name, cls in mixers().items()])
every = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(cls, options, id=f"{name}-{i}")
        for name, cls in mixers().items()
        for i, options in enumerate(cls.card.examples)
    ],
)


def _make(kind: type[Mixer], options: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float64) -> Any:
    mixer = kind(**options)
    randomize(mixer, seeded(kind.name, options))
    return mixer.to(device, dtype)


def _input(mixer: Mixer, T: int, *, rows: int = B, key: Any = "x") -> Tensor:
    x = torch.randn(rows, T, mixer.d_model, generator=seeded(mixer.name, key, rows, T), dtype=torch.float64)
    p = next(mixer.parameters())
    return x.to(p.device, p.dtype)


def _warm(mixer: Mixer, rows: int = B) -> Any:
    """A state that some tokens have already passed through."""
    with torch.no_grad():
        return mixer(_input(mixer, 5, rows=rows, key="before"))[1]


def _arguments(mixer: Mixer, x: Tensor) -> dict[str, Any]:
    return {"x": x, **{f"p.{name}": p for name, p in mixer.named_parameters()}}


def _call(mixer: Mixer, arguments: dict[str, Any], x: Tensor, state: Any, segments: Segments | None = None) -> Any:
    """Run with the parameters given as arguments, so that their gradients are compared like any other."""
    parameters = {name[2:]: p for name, p in arguments.items() if name.startswith("p.")}
    return torch.func.functional_call(mixer, parameters, (x, state, segments))


def _evaluate(
    mixer: Mixer, program: Program, x: Tensor, state: Any, like: Result | None = None, parts: str = "both"
) -> Result:
    """``program(arguments, state)`` forward and backward; a stabiliser ``m`` is a constant of differentiation."""
    options: dict[str, Any] = {"parts": parts, "growing": not mixer.card.constant_state, "constants": ("m",)}
    return evaluate(program, _arguments(mixer, x), state, (mixer.name, x.shape), like, **options)


def _run(mixer: Mixer, x: Tensor, state: Any, segments: Segments | None = None, like: Result | None = None) -> Result:
    return _evaluate(mixer, lambda a, s: _call(mixer, a, a["x"], s, segments), x, state, like)


def _equal(got: Result, want: Result) -> None:
    problems = error_report(got, want, None)
    assert not problems, "\n".join(problems)


def _values(out: Any) -> Result:
    """Outputs and state of a call, without gradients."""
    return Result({name: v.detach() for name, v in named("out", out).items()}, {})


def _same_structure(state: Any, like: Any, *, shapes: bool = True) -> None:
    assert type(state) is type(like)
    got, want = named("state", state), named("state", like)
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert (x.dtype, x.device) == (want[name].dtype, want[name].device), name
        assert not shapes or x.shape == want[name].shape, name


def _finite(*tensors: Tensor | None) -> bool:
    return all(x is not None and bool(x.isfinite().all()) for x in tensors)


# What a mixer says about itself


@each
def test_card_is_complete(kind: type[Mixer]) -> None:
    card = kind.card
    assert re.search(r"arXiv \d{4}\.\d{4,5}", card.paper)
    assert all((card.recurrence, card.state, card.expressivity))
    assert hasattr(linnet.ops, card.engine), f"engine {card.engine!r} is not in linnet.ops"
    assert card.identities, "a card states at least one identity"
    assert len({identity.claim for identity in card.identities}) == len(card.identities)
    doc = inspect.getdoc(kind) or ""
    assert "Args:" in doc and "Raises:" in doc
    for name, p in inspect.signature(kind).parameters.items():
        assert p.kind is (p.POSITIONAL_OR_KEYWORD if name == "d_model" else p.KEYWORD_ONLY), name
        assert p.annotation is not p.empty and re.search(rf"^\s*(\w+, )*{name}(, \w+)*:", doc, re.M), (
            f"{name}: undocumented"
        )


@each
def test_file_is_short(kind: type[Mixer]) -> None:
    source = inspect.getsourcefile(kind)
    assert source is not None
    assert len(Path(source).read_text().splitlines()) <= 160


@each
def test_examples_run_every_branch(kind: type[Mixer]) -> None:
    """Every option that switches something has an example on either side."""
    for name, p in inspect.signature(kind).parameters.items():
        if p.default is None or isinstance(p.default, (bool, str)) or (name == "conv_size" and p.default == 0):
            values = {str(options.get(name, p.default)) for options in kind.card.examples}
            assert len(values) > 1, f"no example changes {name}"


@each
def test_no_weight_decay_names_parameters(kind: type[Mixer]) -> None:
    parameters = dict(kind(**kind.card.examples[-1]).named_parameters())
    for name in kind.no_weight_decay:
        assert parameters[name].dim() >= 2, f"{name}: vectors are never decayed, so it need not be listed"


@pytest.mark.parametrize(
    "identity",
    [
        pytest.param(identity, id=f"{name}-{i}")
        for name, cls in mixers().items()
        for i, identity in enumerate(cls.card.identities)
    ],
)
def test_identity(identity: Any) -> None:
    left, right = identity.check(seeded(identity.claim))
    left, right = (side if isinstance(side, tuple) else (side,) for side in (left, right))
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape and b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), identity.claim


# One definition, however it is cut


@every
def test_every_length_matches_the_reference(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    for T in LENGTHS:
        x = _input(mixer, T)
        y, state = mixer(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        _same_structure(state, mixer.init_state(B), shapes=kind.card.constant_state)
        with backend("reference"):
            want = mixer(x)
        _equal(_values((y, state)), _values(want))
    if kind.card.constant_state:
        assert state_bytes(state) == state_bytes(mixer.init_state(B))


@every
def test_no_state_is_the_initial_state(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    x = _input(mixer, 17)
    _equal(_values(mixer(x, mixer.init_state(B))), _values(mixer(x)))


@every
def test_split_anywhere(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    x, state = _input(mixer, 39), _warm(mixer)
    want = _run(mixer, x, state)
    for cuts in ((16,), (1, 2, 20, 38)):

        def pieces(a: dict[str, Any], s: Any, cuts: tuple[int, ...] = cuts) -> tuple[Tensor, Any]:
            outputs = []
            for part in a["x"].tensor_split(cuts, 1):
                y, s = _call(mixer, a, part, s)
                outputs.append(y)
            return torch.cat(outputs, 1), s

        _equal(_evaluate(mixer, pieces, x, state, want), want)


@every
def test_steps_equal_one_call(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    x = _input(mixer, 9)
    want = _run(mixer, x, None)

    def steps(a: dict[str, Any], s: Any) -> tuple[Tensor, Any]:
        outputs = []
        for t in range(x.shape[1]):
            y, s = _call(mixer, a, a["x"][:, t : t + 1], s)
            outputs.append(y)
        return torch.cat(outputs, 1), s

    _equal(_evaluate(mixer, steps, x, None, want), want)


@every
def test_packed_equals_separate(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    segments = Segments.from_lengths(PACKED, device)
    x = _input(mixer, sum(PACKED), rows=1)
    state = _warm(mixer, len(PACKED))

    def separate(a: dict[str, Any], s: Any) -> tuple[Tensor, Any]:
        outputs, states = [], []
        for n, part in enumerate(a["x"].split(list(PACKED), 1)):
            row = select_rows(s, torch.tensor([n], device=device))
            y, row = (part, row) if PACKED[n] == 0 else _call(mixer, a, part, row)
            outputs.append(y)
            states.append(row)
        return torch.cat(outputs, 1), _stack(states, s)

    # Rows of a growing cache differ in length, so there only the outputs are compared.
    parts = "both" if kind.card.constant_state else "out"
    got = _evaluate(mixer, lambda a, s: _call(mixer, a, a["x"], s, segments), x, state, parts=parts)
    want = _evaluate(mixer, separate, x, state, parts=parts)
    if parts == "out":
        got, want = (Result({"out": r.values["out"]}, r.grads) for r in (got, want))
    _equal(got, want)
    _equal(_values(mixer(x, None, segments)), _values(mixer(x, mixer.init_state(len(PACKED)), segments)))


def _stack(states: list[Any], like: Any) -> Any:
    """Rows of constant size in one state; of a growing cache only the first, which is not compared."""
    flat = [state_tensors(s) for s in states]
    if any(a.shape != b.shape for row in flat for a, b in zip(row, flat[0], strict=True)):
        return states[0]
    columns = iter([torch.cat(column) for column in zip(*flat, strict=True)])
    return map_state(lambda _: next(columns), like)


@every
def test_causality_bit_for_bit(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    x = _input(mixer, 23)
    y = mixer(x)[0]
    for t in (1, 8, 22):
        other = torch.cat([x[:, :t], _input(mixer, 23 - t, key="other")], 1)
        assert torch.equal(mixer(other)[0][:, :t], y[:, :t])
        assert not torch.equal(mixer(other)[0][:, t:], y[:, t:])


@every
def test_rows_can_be_selected_and_repeated(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    x, state = _input(mixer, 4), _warm(mixer)
    want = mixer(x, state)
    order = torch.tensor([1, 0, 1], device=device)
    got = mixer(x[order], select_rows(state, order))
    _equal(_values(got), _values(select_rows(want, order)))
    got = mixer(x.repeat_interleave(3, 0), repeat_rows(state, 3))
    _equal(_values(got), _values(repeat_rows(want, 3)))


@every
def test_state_is_never_mutated(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    for T in (1, 17):
        x, state = _input(mixer, T), _warm(mixer)
        before, written = map_state(torch.clone, state), versions(state)
        _run(mixer, x, state)
        mixer(x, state)
        assert versions(state) == written
        assert all(torch.equal(a, b) for a, b in zip(state_tensors(state), state_tensors(before), strict=True))


@every
def test_deterministic(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device, torch.float32)
    x, state = _input(mixer, 39), _warm(mixer)
    first, second = _run(mixer, x, state), _run(mixer, x, state)
    for a, b in ((first.values, second.values), (first.grads, second.grads)):
        assert all(torch.equal(a[name], b[name]) for name in a)


@every
def test_is_a_linear_time_varying_system(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    """With the inputs given, every step is v -> A_t v + b_t on the flattened memory v. The maps are read off single
    steps, unrolled from a random memory, and compared with one call over all tokens."""
    if not kind.card.linear_state:
        pytest.skip("the state does not enter its own update linearly")
    mixer = _make(kind, options, device)
    x, state = _input(mixer, 4, rows=1), _warm(mixer, 1)
    A, b = affine_steps(mixer, x, state)
    v = torch.randn(b.shape[1], generator=seeded(mixer.name, "start"), dtype=torch.float64).to(device)
    with torch.no_grad():
        got = memory(mixer(x, with_memory(state, v[None]))[1])[0]
    for transition, write in zip(A, b, strict=True):
        v = transition @ v + write
    assert got.shape == v.shape and v.abs().max() > 0
    assert (got - v).abs().max() <= 1e-10 * v.abs().max()


# Parameters


@every
def test_every_parameter_learns(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    y = mixer(_input(mixer, 17))[0]
    y.backward(torch.randn(y.shape, generator=seeded("dy"), dtype=torch.float64).to(device))
    for name, p in mixer.named_parameters():
        assert p.grad is not None, f"{name} receives no gradient"
        assert _finite(p.grad) and p.grad.abs().max() > 0, name


@every
def test_state_dict_round_trip(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer, other = _make(kind, options, device), kind(**options).to(device, torch.float64)
    x = _input(mixer, 9)
    other.load_state_dict(mixer.state_dict(), strict=True)
    assert torch.equal(other(x)[0], mixer(x)[0])
    assert torch.equal(copy.deepcopy(mixer)(x)[0], mixer(x)[0])


@every
def test_a_state_is_saved_and_loaded(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    state, file = _warm(_make(kind, options, device)), BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    _same_structure(loaded, state)
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(loaded), state_tensors(state), strict=True))


@every
def test_meta_construction_then_reset(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    """`to_empty` and `reset_parameters`, children first, give what the constructor gives."""
    with torch.device("meta"):
        mixer = kind(**options)
    assert all(p.is_meta for p in mixer.parameters())
    mixer.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    torch.manual_seed(0)
    mixer.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)  # type: ignore[operator]
    torch.manual_seed(1)
    one, two = (dict(kind(**options).to(device).named_parameters()) for _ in range(2))
    for name, p in mixer.named_parameters():
        assert _finite(p), name
        if torch.equal(one[name], two[name]):
            # Powers and logarithms of a GPU round differently from those of the CPU the constructor ran on.
            same = (
                torch.allclose(p, one[name], rtol=1e-6, atol=1e-6)
                if device.type != "cpu"
                else torch.equal(p, one[name])
            )
            assert same, f"{name}: expected its constant initial value"
        elif p.numel() >= 64:
            assert 0.7 < float((p.std() / one[name].std()).detach()) < 1.4, name
    assert _finite(mixer(_input(mixer, 5))[0])


# Dtypes


def _nudged(exact: Mixer, x: Tensor, key: int, unit: float = torch.finfo(torch.float32).eps) -> tuple[Mixer, Tensor]:
    """A float64 mixer and input, every entry moved by a unit: of fp32, what fp32 arithmetic may do at the least."""
    generator = seeded("nudged", key)
    mixer = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(nudged(parameter, generator, unit))
    return mixer, nudged(x.detach(), generator, unit)


@every
@pytest.mark.parametrize("low", LOW)
def test_low_precision(kind: type[Mixer], options: dict[str, Any], device: torch.device, low: str) -> None:
    dtype = LOW[low]
    mixer = _make(kind, options, device, dtype)
    exact = copy.deepcopy(mixer).double()
    x = _input(mixer, 39)
    want = _run(exact, x.double(), None)
    got = _run(mixer, x, None, like=want)
    with backend("reference"):
        rough = [_run(mixer, x, None, like=want), *(_run(*_nudged(exact, x, i), None, like=want) for i in range(3))]
    y, state = mixer(x)
    assert y.dtype == dtype
    _same_structure(state, mixer.init_state(B), shapes=kind.card.constant_state)
    if kind.card.constant_state:
        assert all(s.dtype in (torch.float32, torch.int64) for s in state_tensors(state))
    problems = error_report(got, want, rough)
    assert not problems, "\n".join(problems)
    _accurate(got, want, dtype, rough)


@every
def test_autocast(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device, torch.float32)
    x, exact = _input(mixer, 39), copy.deepcopy(mixer).double()
    want = _run(exact, x.double(), None)
    with torch.autocast(device.type, torch.bfloat16):
        y, state = mixer(x)
        got = _run(mixer, x, None, like=want)
    assert y.dtype == torch.bfloat16
    if kind.card.constant_state:
        _same_structure(state, mixer.init_state(B))
    assert all(g.dtype == torch.float32 for g in got.grads.values())
    half = torch.finfo(torch.bfloat16).eps / 2  # to which products under autocast round their operands
    _accurate(
        got, want, torch.bfloat16, [_run(*_nudged(exact, x.double(), i, half), None, like=want) for i in range(3)]
    )


@every
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_gates_stay_fp32(
    kind: type[Mixer], options: dict[str, Any], device: torch.device, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever gates an engine is handed, it is handed in fp32, half-precision weights or not."""
    seen: dict[str, torch.dtype] = {}

    def spying(engine: Any) -> Any:
        signature, gates = inspect.signature(engine), set(GATES).difference(WEIGHTS.get(engine.__name__, ()))

        def spy(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            seen.update({name: given[name].dtype for name in gates if given.get(name) is not None})
            return engine(*args, **kwargs)

        return spy

    for cls in kind.__mro__[:-1]:
        module = sys.modules[cls.__module__]
        for name in ENGINES:
            if vars(module).get(name) is getattr(linnet.ops, name):
                monkeypatch.setattr(module, name, spying(getattr(linnet.ops, name)))
    mixer = _make(kind, options, device, torch.bfloat16 if mode == "bf16" else torch.float32)
    with torch.autocast(device.type, torch.bfloat16, enabled=mode == "autocast"):
        mixer(_input(mixer, 3))
    assert all(dtype == torch.float32 for dtype in seen.values()), seen


def _accurate(got: Result, want: Result, dtype: torch.dtype, rough: list[Result] | None = None) -> None:
    """Output and state within a few roundings of float64: gates in half precision, for one, would not be. Where the
    recurrence itself amplifies a rounding (``rough``), within what it makes of one."""
    for name, e in want.values.items():
        if not e.is_floating_point() or e.numel() == 0:
            continue
        size = e.square().mean().sqrt().clamp(min=1e-12)
        error, *floors = (
            float((run.values[name].double() - e).square().mean().sqrt() / size) for run in (got, *(rough or ()))
        )
        assert error <= max(4 * torch.finfo(dtype).eps, *(3 * f for f in floors), 0.0), (
            f"{name}: relative error {error:.3g}"
        )


# Hostile inputs


@every
@pytest.mark.parametrize("what", ["huge", "zero", "identical", "alternating"])
def test_hostile_inputs(kind: type[Mixer], options: dict[str, Any], device: torch.device, what: str) -> None:
    mixer = _make(kind, options, device, torch.float32)
    x = _input(mixer, 39)
    x = {
        "huge": 1e4 * x,
        "zero": 0 * x,
        "identical": x[:, :1].expand_as(x),
        "alternating": x * torch.tensor([1e4, 0.0, 1.0], device=device).repeat(13)[:, None],
    }[what]
    result = _run(mixer, x, None)
    bad = [name for name, v in (result.values | result.grads).items() if not _finite(v)]
    assert not bad, f"not finite: {bad}"


# torch.compile


@every
def test_compile_fullgraph(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    x, state = _input(mixer, 17), _warm(mixer)
    want = _run(mixer, x, state)
    mixer.compile(fullgraph=True, backend="aot_eager")
    _equal(_run(mixer, x, state, like=want), want)


@each
def test_compile_packed(kind: type[Mixer], device: torch.device) -> None:
    mixer = _make(kind, kind.card.examples[-1], device)
    segments = Segments.from_lengths(PACKED, device)
    x = _input(mixer, sum(PACKED), rows=1)
    want = _run(mixer, x, None, segments)
    mixer.compile(fullgraph=True, backend="aot_eager")
    _equal(_run(mixer, x, None, segments, want), want)


# Bad input


@every
def test_bad_input(kind: type[Mixer], options: dict[str, Any], device: torch.device) -> None:
    mixer = _make(kind, options, device)
    width = mixer.d_model
    x = _input(mixer, 3)
    for bad in (x[..., :-1], x[0], x[:0], x[:, :0], x[..., None]):
        with pytest.raises(ValueError, match=rf"x: expected .*{width}.*got \[{', '.join(map(str, bad.shape))}\]"):
            mixer(bad)
    for bad in (x.long(), x.to(torch.complex64)):
        with pytest.raises(ValueError, match=rf"^x: expected a floating dtype, got {bad.dtype}"):
            mixer(bad)
    for state in (x, (), object()):
        with pytest.raises(ValueError, match="state"):
            mixer(x, state)
    with pytest.raises(ValueError, match="state"):
        mixer(x, mixer.init_state(B + 1))
    with pytest.raises(ValueError, match="state"):
        mixer(x, map_state(lambda s: s.to("meta"), _warm(mixer)))
    with pytest.raises(ValueError, match="segments"):
        mixer(x, None, Segments.from_lengths([2, 2], device))


@each
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_built_under_a_default_dtype(kind: type[Mixer], default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        mixer = kind(**kind.card.examples[-1])
        y, state = mixer(torch.randn(B, 9, mixer.d_model))
        start = mixer.init_state(B)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in mixer.parameters()} == {default} and y.dtype == default and _finite(y)
    _same_structure(state, start, shapes=kind.card.constant_state)


@each
def test_bad_options(kind: type[Mixer]) -> None:
    """Every number below its range is refused by name."""
    options = {key: value for key, value in kind.card.examples[0].items() if key != "d_model"}
    d_model = kind.card.examples[0]["d_model"]
    for name, p in inspect.signature(kind).parameters.items():
        number = re.search(r"\b(int|float)\b", str(p.annotation))
        if name in ("d_model", "num_layers") or number is None:
            continue
        for value in _out_of_range(name):
            try:
                mixer = build_mixer({"name": kind.name, **options, name: value}, d_model)
            except ValueError as error:
                assert re.search(rf"\b{name}\b", str(error)), f"{name}={value}: {error}"
            else:  # heads need not divide the width where their size is an option of its own
                assert value == 7, f"{name}={value} is accepted"
                assert mixer(torch.zeros(1, 2, d_model))[0].shape == (1, 2, d_model)
    with pytest.raises(ValueError, match=r"unknown option 'no_such_option'; it takes \w+"):
        build_mixer(f"{kind.name}(no_such_option=1)", d_model)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gla(norm_eps='small')", "mixer 'gla': option norm_eps: expected float, got 'small'"),
        ("gla(norm_eps=1e999)", "mixer 'gla': option norm_eps: expected float, got inf"),
        ("gla(num_heads=2.0)", "mixer 'gla': option num_heads: expected int, got 2.0"),
        ("gla(num_heads=True)", "mixer 'gla': option num_heads: expected int, got True"),
        ("attention(rope='False')", "mixer 'attention': option rope: expected bool, got 'False'"),
        ("attention(window='256')", "mixer 'attention': option window: expected int | None, got '256'"),
        (3, "mixer spec: expected 'name' or 'name(option=value, ...)', got 3"),
    ],
)
def test_options_of_another_type_are_named(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_mixer(spec, 32)
    if isinstance(spec, str):
        name, options = parse_spec(spec)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            get_mixer(name)(32, **options)  # type: ignore[call-arg]


@pytest.mark.parametrize("width", [0, -4, 32.0, True, "32", None])
def test_bad_widths_are_named(width: Any) -> None:
    for build in (partial(build_mixer, "gla"), get_mixer("gla")):
        with pytest.raises(ValueError, match=r"^d_model: expected an integer >= 1, got "):
            build(width)


def test_a_constructor_takes_a_width_and_named_options() -> None:
    gla: Any = get_mixer("gla")
    assert gla(d_model=8, num_heads=2).d_model == 8
    with pytest.raises(ValueError, match=r"^mixer 'gla': unknown option 'num_head'; .* 'num_heads'\?\)$"):
        gla(8, num_head=2)
    for call in (gla, partial(gla, num_heads=2)):
        with pytest.raises(ValueError, match=r"^mixer 'gla': missing a required argument: 'd_model'"):
            call()
    with pytest.raises(ValueError, match=r"^mixer 'gla': too many positional arguments"):
        gla(8, 2)


def _out_of_range(name: str) -> Iterable[int]:
    yield -1
    if name in ("num_heads", "head_dim", "num_kv_heads", "num_groups"):
        yield 7
        yield 0


def test_unknown_mixer_and_bad_specs() -> None:
    with pytest.raises(ValueError, match=r"mixer: expected one of .*gla.*; got 'gal'"):
        build_mixer("gal", 32)
    for spec in ("gla(4)", "gla(num_heads=)", "gla num_heads", "gla(num_heads=x)"):
        with pytest.raises(ValueError, match="mixer spec"):
            parse_spec(spec)
    assert parse_spec("gla(num_heads=2, conv_size=4)") == ("gla", {"num_heads": 2, "conv_size": 4})
    assert parse_spec({"name": "gla", "num_heads": 2}) == ("gla", {"num_heads": 2})
