"""Newton's method over the sequence against the tokens run one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linnet.ops import Segments, check_step, newton, paragru, unroll

# A cell of one's own is a plain function of one token. This is all it takes to run it both ways:


def leaky(h: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A leaky unit with a gate that looks at its own past; h and x ``[..., D]``, a and b ``[D]``."""
    keep = torch.sigmoid(a * h + x)
    return keep * h + (1 - keep) * torch.tanh(b * h + x)


def pair(s: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two numbers a channel that see each other; s ``[..., D, 2]``."""
    c, h = s.unbind(-1)
    f = torch.sigmoid(a * h + x)
    c = f * c + (1 - f) * torch.tanh(b * h + x)
    return torch.stack([c, torch.sigmoid(b * c - x) * torch.tanh(c)], -1)


def mixed(h: Tensor, x: tuple[Tensor, Tensor], W: Tensor) -> Tensor:
    """Every unit sees every other; inputs given as a pair."""
    return torch.tanh(h @ W + x[0]) * torch.sigmoid(x[1])


def draw(kind: str, lengths: list[int] | None, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    B, T, rows = (2, 33, 2) if lengths is None else (1, sum(lengths), len(lengths))
    x, state = torch.randn(B, T, 3, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
    a, b = torch.rand(2, 3, dtype=dtype) - 0.5
    if kind == "diagonal":
        return leaky, x, state, (a, b)
    if kind == "block":
        return pair, x, torch.stack([state, state.tanh()], -1), (a, b)
    return mixed, (x, torch.randn(B, T, 3, dtype=dtype)), state, (0.4 * torch.randn(3, 3, dtype=dtype),)


@pytest.mark.parametrize("lengths", [None, [4, 0, 9, 1]], ids=["batch", "packed"])
@pytest.mark.parametrize("kind", ["diagonal", "block", "dense"])
def test_equals_the_tokens_one_by_one(kind, lengths):
    step, x, state, params = draw(kind, lengths)
    segments = None if lengths is None else Segments.from_lengths(lengths)
    inputs = x if isinstance(x, tuple) else (x,)
    leaves = [t.requires_grad_() for t in (*inputs, state, *params)]
    found = newton(step, x, state, params, jacobian=kind, segments=segments)
    exact = unroll(step, x, state, params, segments=segments)
    assert 0 < found.iterations <= 8 and found.residual < 1e-13
    grads = []
    for h, last in ((found.h, found.state), exact):
        grads.append(torch.autograd.grad((h * h.sin()).sum() + (last**3).sum(), leaves))
    for got, want in ((found.h, exact[0]), (found.state, exact[1]), *zip(*grads, strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("within", [True, False], ids=["within", "from"])
@pytest.mark.parametrize("kind", ["diagonal", "block", "dense"])
def test_inference_mode(kind, within):
    """Neither the mode nor tensors from it are in the way of the derivatives the method takes for itself."""
    step, x, state, params = draw(kind, None)
    params = tuple(p.clone().requires_grad_() for p in params)
    exact, last = unroll(step, x, state, params)
    with torch.inference_mode():
        x, state = tuple(2 * y / 2 for y in x) if isinstance(x, tuple) else 2 * x / 2, 2 * state / 2
        found = newton(step, x, state, params, jacobian=kind)
    if not within:
        found = newton(step, x, state, params, jacobian=kind)
        assert torch.autograd.grad(found.h.sum(), params[0])[0].any()
    assert found.iterations > 0 and found.h.requires_grad != within
    torch.testing.assert_close((found.h, found.state), (exact, last), rtol=1e-11, atol=1e-12)


def test_a_diagonal_cell_may_have_axes_of_its_own():
    """Two numbers a channel that do not see each other are no complex number."""
    torch.manual_seed(0)
    x, state, a, b = (torch.randn(*shape, 3, 2, dtype=torch.float64) for shape in ((2, 9), (2,), (), ()))
    found = check_step(leaky, x, state, (a, b))
    flat = newton(leaky, x.flatten(2), state.flatten(1), (a.flatten(), b.flatten()))
    assert torch.equal(found.h.flatten(2), flat.h) and found.iterations == flat.iterations > 0
    with pytest.raises(AssertionError, match=r"step: channel \d depends on another, not diagonal"):
        check_step(pair, x[..., 0], state, (a[:, 0], b[:, 0]))


def test_gradients_by_finite_differences():
    step, x, state, params = draw("block", None)
    leaves = [t.requires_grad_() for t in (x[:1, :4].clone(), state[:1].clone(), *params)]
    torch.autograd.gradcheck(lambda x, s, *p: newton(step, x, s, p, jacobian="block")[:2], leaves)


def test_first_tokens_are_exact_after_as_many_steps_and_a_linear_cell_after_one():
    def wild(h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(3 * h + x)

    x, state = torch.randn(1, 20, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    exact = unroll(wild, x, state)[0]
    for k in (1, 3, 6):
        with pytest.warns(RuntimeWarning, match="newton: residual"):
            found = newton(wild, x, state, iterations=k, on_failure="warn")
        torch.testing.assert_close(found.h[:, : k + 1], exact[:, : k + 1], rtol=1e-12, atol=1e-12)
        assert found.residual > 1e-3
    linear = newton(lambda h, x: 0.9 * h + x, x, state)
    assert linear.iterations == 1 and linear.residual < 1e-13


def test_what_happens_without_convergence():
    def chaotic(h: Tensor, x: Tensor) -> Tensor:
        return torch.sin(6 * h + x)

    x, state = torch.randn(1, 60, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    found = newton(chaotic, x.requires_grad_(), state, iterations=3)
    assert found.iterations == -1 and found.residual == 0
    exact = unroll(chaotic, x, state)[0]
    torch.testing.assert_close(found.h, exact, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(h[:, :9].sum(), x)[0] for h in (found.h, exact)))
    with pytest.raises(RuntimeError, match=r"newton: residual .* after 3 iterations"):
        newton(chaotic, x, state, iterations=3, on_failure="error")


@pytest.mark.parametrize("T", [256, 2048])
def test_clipped_paragru_converges_in_three_steps_at_any_length(T):
    """The published regime: weights up to 0.5 in size, inputs N(0, 2^2), fp32."""

    def gru(h: Tensor, x: Tensor, A: Tensor) -> Tensor:
        x_z, x_r, x_n = x.unbind(-2)
        z, r = torch.sigmoid(A[0] * h + x_z), torch.sigmoid(A[1] * h + x_r)
        return (1 - z) * h + z * torch.tanh(A[2] * r * h + x_n)

    torch.manual_seed(0)
    A = 0.5 * torch.sign(torch.randn(3, 8))
    x, state = 2 * torch.randn(2, T, 3, 8), torch.zeros(2, 8)
    found = newton(gru, x, state, (A,))
    assert found.iterations <= 4
    exact = paragru(x.double(), A.double(), backend="reference")[0]
    assert (found.h - exact).abs().max() < 2e-6
    with pytest.warns(RuntimeWarning):
        three = newton(gru, x.double(), state.double(), (A.double(),), iterations=3, on_failure="warn")
    assert (three.h - exact).abs().max() < 1e-4


def test_bad_arguments_are_named():
    step, x, state, params = draw("diagonal", None)
    cases = [
        ("jacobian", lambda: newton(step, x, state, params, jacobian="full")),
        ("on_failure", lambda: newton(step, x, state, params, on_failure="ignore")),
        ("iterations", lambda: newton(step, x, state, params, iterations=0)),
        ("state", lambda: newton(step, x, state[:1], params)),
        ("x", lambda: unroll(step, x[:, 0, 0], state, params)),
        ("step", lambda: newton(lambda h, x: h[..., :1], x, state)),
        ("iterations", lambda: newton(step, x, state, params, iterations=1.5)),
        ("tolerance", lambda: newton(step, x, state, params, tolerance=-1.0)),
        ("x", lambda: newton(step, (), state, params)),
        ("state", lambda: newton(step, x, None, params)),
        ("params", lambda: newton(step, x, state, torch.ones(3))),
        ("params", lambda: newton(step, x, state, (0.5,))),
        (r"params\[0\]", lambda: newton(step, x, state, (torch.ones(3, device="meta"),))),
        ("step", lambda: newton(lambda h, x: (h, h), x, state)),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
            call()
    with pytest.raises(ValueError, match=r"^state: expected shape \[N, D, 2\]"):
        newton(step, x, state, params, jacobian="block")


@pytest.mark.parametrize("kind", ["diagonal", "block", "dense"])
def test_cells_of_ones_own_are_tested_by_one_call(kind):
    step, x, state, params = draw(kind, None, torch.float32)
    assert 0 < check_step(step, x, state, params, jacobian=kind).iterations <= 8


def test_what_is_wrong_with_a_cell_is_said():
    step, x, state, params = draw("dense", None)
    with pytest.raises(AssertionError, match=r"step: channel \d depends on another, not diagonal"):
        check_step(step, x, state, params)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor, x: Tensor) -> Tensor:
            return 0.5 * h + x

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
            return 0.5 * g, 2 * g if g.dim() == 2 else g

    x, state = torch.randn(2, 5, 3), torch.zeros(2, 3)
    with pytest.raises(AssertionError, match=r"gradient of x\[0\]: newton and token by token differ by"):
        check_step(lambda h, x: Halved.apply(h, x), x, state)


def test_a_step_may_ignore_the_state():
    x, state, (a,) = torch.randn(2, 5, 3, dtype=torch.float64), torch.zeros(2, 3), (torch.rand(3, dtype=torch.float64),)
    found = newton(lambda h, x, a: torch.tanh(a * x), x, state.double(), (a,))
    torch.testing.assert_close(found.h, torch.tanh(a * x))


def test_a_second_derivative_is_refused():
    step, x, state, params = draw("diagonal", None)
    x.requires_grad_()
    (first,) = torch.autograd.grad(newton(step, x, state, params).h.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.square().sum().backward()
