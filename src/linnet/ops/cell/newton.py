"""Newton's method over the sequence: a nonlinear recurrence solved for all tokens at once.

``h_t = f(h_{t-1}, x_t)`` for t = 1 .. T is one system of equations in the whole trajectory. A Newton step linearises
every token around the current guess and solves the linear recurrence ``d_t = J_t d_{t-1} + (f(h_{t-1}, x_t) - h_t)``
with a scan. After k steps the first k tokens are exact whatever f is, so T steps always suffice; contractive cells need
three or four. The backward pass needs no iteration: it is one linear recurrence in reverse around the solution.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Segments, check_floating, check_number, check_segments, no_autocast, once
from ..core.chunks import accumulate_dtype
from ..scan import scan
from .state import add_at_last, after_last, at_first, before

JACOBIANS = ("diagonal", "block", "dense")
Step = Callable[..., Tensor]


class NewtonResult(NamedTuple):
    """What :func:`newton` returns.

    Attributes:
        h: states after every token ``[B, T, ...]``.
        state: states after the last token of every sequence ``[N, ...]``.
        residual: largest ``|f(h_{t-1}, x_t) - h_t|`` of the trajectory that was accepted or, with
            ``on_failure="warn"``, given up on (a number on the host).
        iterations: linear systems solved; -1 when the tokens had to be run one after the other.
    """

    h: Tensor
    state: Tensor
    residual: float
    iterations: int


def newton(
    step: Step,
    x: Tensor | tuple[Tensor, ...],
    state: Tensor,
    params: tuple[Tensor, ...] = (),
    *,
    jacobian: str = "diagonal",
    iterations: int = 16,
    tolerance: float | None = None,
    on_failure: str = "sequential",
    segments: Segments | None = None,
) -> NewtonResult:
    """Run any recurrent cell in parallel over time. A cell is a plain function of one token::

        def step(h, x, a, b):                       # h [..., D], x [..., D], parameters [D]
            return torch.tanh(a * h + x) * b        # the state after the token

        h, last, residual, iterations = newton(step, x, h0, (a, b))
        h, last = unroll(step, x, h0, (a, b))       # the same, one token after the other

    ``step`` gets a batch of any shape in front (here all tokens at once) and must treat its entries alike. Its
    derivatives are taken by automatic differentiation.

    Args:
        step: ``step(h, x, *params)`` -> the state after the token, shaped like ``h``.
        x: inputs ``[B, T, ...]``, one tensor or a tuple of them, which ``step`` then gets as a tuple.
        state: the state before the first token, a row a sequence or segment: ``[N, D]``, ``[N, D, 2]`` for "block",
            any ``[N, ...]`` for "diagonal".
        params: parameters that gradients are wanted for.
        jacobian: which entries of a state depend on which of the one before: "diagonal", each on itself alone; "block",
            the two of the last axis on each other; "dense", all of ``[N, D]`` (T log T products of D x D matrices).
        iterations: Newton steps at most.
        tolerance: largest residual of a solution, relative to the largest state or to 1; 4 units in the last place of
            the dtype when None. Where rounding keeps it above, a residual that falls no more is accepted below 64 times
            this.
        on_failure: what to do when ``iterations`` do not suffice: "sequential" runs the tokens one after the other,
            which is exact; "warn" returns the last guess with a RuntimeWarning (its gradients are then those of nothing
            in particular); "error" raises.
        segments: packing of ``[1, total, ...]`` inputs.

    Returns:
        A :class:`NewtonResult`; its ``h`` and ``state`` are differentiable in x, state and params. In fp32, or float64
        for float64 inputs.

    Raises:
        ValueError: on options, shapes or devices; the message names the argument.
        RuntimeError: without convergence, with ``on_failure="error"``.

    Source: ParaRNN (arXiv 2510.21450) and DEER (2309.12252). Weights that track a state over long spans, as those that
    solve parity, are expansive in places; the iterations they need grow with T.
    """
    if jacobian not in JACOBIANS:
        raise ValueError(f"jacobian: expected one of {', '.join(JACOBIANS)}; got {jacobian!r}")
    if on_failure not in ("sequential", "warn", "error"):
        raise ValueError(f"on_failure: expected 'sequential', 'warn' or 'error', got {on_failure!r}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected a whole number of at least 1, got {iterations!r}")
    tolerance = None if tolerance is None else check_number("tolerance", tolerance, 0.0)
    inputs, state, params = _check(x, state, params, segments)
    if state.dim() != 3 if jacobian == "block" else jacobian == "dense" and state.dim() != 2:
        wanted = "[N, D, 2]" if jacobian == "block" else "[N, D]"
        raise ValueError(f"state: expected shape {wanted} for jacobian={jacobian!r}, got {list(state.shape)}")
    host = None if segments is None else segments.cu_seqlens_host
    call = _Call(step, isinstance(x, tuple), len(inputs), jacobian, iterations, tolerance, on_failure, host)
    with ExitStack() as modes:
        modes.enter_context(no_autocast(state))
        if torch.is_inference_mode_enabled():  # the derivatives that the method itself needs are not to be had in it
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        tensors = (y.clone() if y.is_inference() else y for y in (state, *inputs, *params))
        h, last = _Newton.apply(call, *tensors)  # type: ignore[misc]
    return NewtonResult(h, last, call.residual, call.solves)


def unroll(
    step: Step,
    x: Tensor | tuple[Tensor, ...],
    state: Tensor,
    params: tuple[Tensor, ...] = (),
    *,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`newton`, with the same arguments, one token after the other: exact for every ``step``.
    Returns the states after every token and those after the last ones."""
    inputs, state, params = _check(x, state, params, segments)
    bounds = None if segments is None else segments.cu_seqlens_host.tolist()
    with no_autocast(state):
        return _unroll(step, inputs, isinstance(x, tuple), state, params, bounds)


def check_step(
    step: Step,
    x: Tensor | tuple[Tensor, ...],
    state: Tensor,
    params: tuple[Tensor, ...] = (),
    *,
    jacobian: str = "diagonal",
    tolerance: float = 1e-8,
) -> NewtonResult:
    """Test a cell of one's own, on inputs of one's choice in float64: its states depend on each other as ``jacobian``
    says, and both ways to run it give the same states and gradients.

    Args:
        step, x, state, params, jacobian: as for :func:`newton`.
        tolerance: largest difference, relative to the largest entry or to 1.

    Returns:
        What :func:`newton` found; ``iterations`` says how well the cell suits it (-1: it did not converge).

    Raises:
        AssertionError: naming what differs.
        ValueError: as :func:`newton`.
    """
    inputs, state, params = _check(x, state, params, None)
    tensors = [t.detach().double().requires_grad_() for t in (*inputs, state, *params)]
    inputs, (state, *rest), several = tuple(tensors[: len(inputs)]), tensors[len(inputs) :], isinstance(x, tuple)
    first = tuple(y[:1, 0].detach() for y in inputs)
    full: Any = torch.autograd.functional.jacobian(
        lambda h: _evaluate(step, h, first, several, tuple(p.detach() for p in rest)), state[:1].detach()
    )
    if jacobian != "dense":  # entries of other channels must be 0
        size = 2 if jacobian == "block" else 1
        D = state[0].numel() // size
        across = full.reshape(D, size, D, size).abs().amax((1, 3)) * (1 - torch.eye(D, dtype=full.dtype))
        assert not across.any(), f"step: channel {int(across.amax(1).argmax())} depends on another, not {jacobian}"
    x = inputs if several else inputs[0]
    found = newton(step, x, state, tuple(rest), jacobian=jacobian)
    names = [f"x[{i}]" for i in range(len(inputs))] + ["state"] + [f"params[{i}]" for i in range(len(rest))]
    weights = torch.linspace(-1, 1, found.h.numel(), dtype=found.h.dtype).view_as(found.h)
    results = []
    for h, last in (found[:2], unroll(step, x, state, tuple(rest))):
        grads = torch.autograd.grad((h * weights).sum() + last.sum(), tensors, allow_unused=True)
        results.append([h, last, *grads])
    for name, got, want in zip(["h", "state", *(f"gradient of {n}" for n in names)], *results, strict=True):
        if got is None or want is None:
            assert got is want, f"{name}: in one way only"
            continue
        error = float((got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1))
        assert error <= tolerance, f"{name}: newton and token by token differ by {error:.3g}"
    return found


def _check(x: Any, state: Tensor, params: tuple[Tensor, ...], segments: Segments | None):
    """The inputs as a tuple, everything in the dtype of states."""
    inputs = x if isinstance(x, tuple) else (x,)
    if not inputs:
        raise ValueError("x: expected a tensor [B >= 1, T >= 1, ...] or several in a tuple, got none")
    for y in inputs:
        if not isinstance(y, Tensor) or y.dim() < 2 or 0 in y.shape[:2] or y.shape[:2] != inputs[0].shape[:2]:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"x: expected tensors of one shape [B >= 1, T >= 1, ...], got {got}")
        check_floating("x", y, inputs[0].device)
    rows = check_segments(segments, inputs[0])
    if not isinstance(state, Tensor) or state.dim() < 2 or state.shape[0] != rows:
        got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"state: expected shape [N={rows}, D, ...], got {got}")
    check_floating("state", state, inputs[0].device)
    if not isinstance(params, (tuple, list)) or not all(isinstance(p, Tensor) for p in params):
        raise ValueError(f"params: expected a tuple of tensors, got {type(params).__name__}")
    for i, p in enumerate(params):
        check_floating(f"params[{i}]", p, inputs[0].device)
    acc = accumulate_dtype(inputs[0])
    return tuple(y.to(acc) for y in inputs), state.to(acc), tuple(p.to(acc) for p in params)


def _evaluate(step: Step, h: Tensor, inputs: tuple[Tensor, ...], several: bool, params: tuple[Tensor, ...]) -> Tensor:
    f = step(h, inputs if several else inputs[0], *params)
    if not isinstance(f, Tensor) or f.shape != h.shape:
        got = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(f"step: expected a state shaped like h, {list(h.shape)}, got {got}")
    return f


def _unroll(
    step: Step, inputs: tuple[Tensor, ...], several: bool, state: Tensor, params: tuple[Tensor, ...], bounds: Any
) -> tuple[Tensor, Tensor]:
    def run(begin: int, end: int, h: Tensor) -> list[Tensor]:
        states = [h]
        for t in range(begin, end):
            now = tuple(y[:, t] for y in inputs)
            states.append(_evaluate(step, states[-1], now, several, params))
        return states

    if bounds is None:
        states = run(0, inputs[0].shape[1], state)
        return torch.stack(states[1:], 1), states[-1]
    parts = [run(a, b, state[n : n + 1]) for n, (a, b) in enumerate(pairwise(bounds))]
    return torch.stack([h for part in parts for h in part[1:]], 1), torch.cat([part[-1] for part in parts])


def solve_linear(J: Tensor, b: Tensor, *, reverse: bool = False) -> Tensor:
    """``y_t = J_t y_{t-1} + b_t`` over ``[B, T, ...]`` from 0, with y of the token after in place of before when
    ``reverse``. J is shaped like b (diagonal), ``[B, T, D, 2, 2]`` (blocks) or ``[B, T, D, D]`` (dense)."""
    if J.shape == b.shape:  # flat: pairs on the last axis would be complex numbers
        return scan(J.flatten(2), b.flatten(2), reverse=reverse)[0].view_as(b)
    if J.dim() == 5:
        return scan(J, b, reverse=reverse)[0]
    if reverse:
        return solve_linear(J.flip(1), b.flip(1)).flip(1)
    b, shift = b[..., None], 1
    while shift < b.shape[1]:  # every token's map composed with the one `shift` tokens back
        b = torch.cat([b[:, :shift], b[:, shift:] + J[:, shift:] @ b[:, :-shift]], 1)
        J = torch.cat([J[:, :shift], J[:, shift:] @ J[:, :-shift]], 1)
        shift *= 2
    return b[..., 0]


def without_firsts(J: Tensor, cu_host: Tensor | None) -> Tensor:
    """J with 0 at the first token of every sequence, which no earlier token reaches."""
    J = J.clone()
    if cu_host is None:
        J[:, 0] = 0
    else:
        firsts = cu_host[:-1][cu_host.diff() > 0].to(J.device).long()
        J[0].index_fill_(0, firsts, 0)
    return J


def solve(
    linearise: Callable[[Tensor], tuple[Tensor, Tensor]],
    h: Tensor,
    state: Tensor,
    cu_host: Tensor | None,
    iterations: int,
    tolerance: float | None,
) -> tuple[Tensor, float, int, bool]:
    """Newton's iteration from the guess ``h``. ``linearise`` takes the states before all tokens to those after them and
    their derivatives. Returns the trajectory, its residual, the number of steps and whether it is a solution."""
    unit = 4 * torch.finfo(h.dtype).eps if tolerance is None else tolerance
    previous = float("inf")
    for k in range(iterations + 1):
        f, J = linearise(before(h, state, cu_host))
        error = f - h
        residual, size = torch.stack([error.abs().amax(), f.abs().amax().clamp(min=1)]).tolist()
        if residual <= unit * size or (residual <= 64 * unit * size and residual > previous / 2):
            return f, residual, k, True
        if k == iterations or not residual < float("inf"):
            break
        previous = residual
        h = h + solve_linear(without_firsts(J, cu_host), error)
    return f, residual, k, False


def adjoint(J: Tensor, w: Tensor, cu_host: Tensor | None) -> Tensor:
    """``l_t = w_t + J_{t+1}^T l_{t+1}``: the whole gradient of every state from the direct ones."""
    J = without_firsts(J, cu_host)
    J = torch.cat([J[:, 1:], torch.zeros_like(J[:, :1])], 1)
    return solve_linear(J if J.shape == w.shape else J.transpose(-1, -2), w, reverse=True)


class _Call:
    """One call of :func:`newton`; what happened goes into ``residual`` and ``solves``."""

    def __init__(self, step, several, count, jacobian, iterations, tolerance, on_failure, cu_host):
        self.step, self.several, self.count, self.jacobian = step, several, count, jacobian
        self.iterations, self.tolerance, self.on_failure, self.cu_host = iterations, tolerance, on_failure, cu_host
        self.residual, self.solves = 0.0, 0

    def run(self, h: Tensor, inputs: tuple[Tensor, ...], params: tuple[Tensor, ...]) -> Tensor:
        return _evaluate(self.step, h, inputs, self.several, params)

    def derivative(self, f: Tensor, h: Tensor) -> Tensor:
        """df/dh from the graph of f, which is kept."""
        if self.jacobian == "diagonal":
            return self._gradient(f, h, torch.ones_like(f))
        rows = []
        for i in range(f.shape[-1]):
            one = torch.zeros_like(f)
            one[..., i] = 1
            rows.append(self._gradient(f, h, one))
        return torch.stack(rows, -2)

    @staticmethod
    def _gradient(f: Tensor, h: Tensor, cotangent: Tensor) -> Tensor:
        if not f.requires_grad:  # a step that does not look at the state
            return torch.zeros_like(h)
        return torch.autograd.grad(f, h, cotangent, retain_graph=True, materialize_grads=True)[0]


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs, params = tensors[: call.count], tensors[call.count :]

        def linearise(prev: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                prev = prev.detach().requires_grad_()
                f = call.run(prev, inputs, params)
                return f.detach(), call.derivative(f, prev)

        guess = state.new_zeros(*inputs[0].shape[:2], *state.shape[1:])
        guess = call.run(before(guess, state, call.cu_host), inputs, params)
        h, call.residual, call.solves, solved = solve(
            linearise, guess, state, call.cu_host, call.iterations, call.tolerance
        )
        if not solved:
            message = f"newton: residual {call.residual:.3g} after {call.solves} iterations"
            if call.on_failure == "error":
                raise RuntimeError(message)
            if call.on_failure == "warn":
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            else:
                bounds = None if call.cu_host is None else call.cu_host.tolist()
                h, _ = _unroll(call.step, inputs, call.several, state, params, bounds)
                call.residual, call.solves = 0.0, -1
        return h, after_last(h, state, call.cu_host)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(output[0], *tensors)

    @staticmethod
    def backward(ctx, dh: Tensor, dlast: Tensor):
        return once("newton", ctx, lambda: _Newton.gradients(ctx, dh, dlast))

    @staticmethod
    def gradients(ctx, dh: Tensor, dlast: Tensor):
        call, (h, state, *tensors) = ctx.call, ctx.saved_tensors
        w, rest = add_at_last(dh, dlast, call.cu_host)
        with torch.enable_grad():
            prev = before(h, state, call.cu_host).detach().requires_grad_()
            leaves = [y.detach().requires_grad_() for y in tensors]
            f = call.run(prev, tuple(leaves[: call.count]), tuple(leaves[call.count :]))
            J = call.derivative(f, prev)
            with torch.no_grad():
                total = adjoint(J, w, call.cu_host)
            d_prev, *grads = torch.autograd.grad(f, [prev, *leaves], total, allow_unused=True)
        d_state = torch.zeros_like(state) if d_prev is None else at_first(d_prev, state, call.cu_host)
        return None, d_state + rest, *grads
