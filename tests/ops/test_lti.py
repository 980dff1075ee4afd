"""What is particular to linear time-invariant systems: HiPPO, discretisation, kernels, long inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from linnet.ops import conv, lti, lti_diagonal
from linnet.ops.lti import (
    bilinear,
    bilinear_diagonal,
    cauchy_kernel,
    dplr,
    hippo,
    hippo_core,
    krylov_kernel,
    nplr,
    vandermonde_kernel,
    zoh,
    zoh_dense,
)

MEASURES = ("legs", "legt", "lagt")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# HiPPO


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("size", [2, 16])
def test_hippo_is_stable_and_structured(measure: str, size: int) -> None:
    A, B = hippo(measure, size)
    assert A.shape == (size, size) and B.shape == (size,) and A.dtype == B.dtype == torch.float64
    assert torch.linalg.eigvals(A).real.max() < 0
    p, d, q, T = hippo_core(measure, size)
    assert torch.equal(T, T.triu(-1).tril(1))
    torch.testing.assert_close(-p[:, None] * (torch.diag(d) + torch.linalg.inv(T)) * q, A, rtol=1e-12, atol=1e-12)
    poles, P, b, V = nplr(measure, size)
    both = [torch.cat([x, x.conj()], -1) for x in (poles, P, b, V)]
    whole = both[3] @ (torch.diag(both[0]) - both[1].T @ both[1].conj()) @ both[3].mH
    torch.testing.assert_close(whole.real, A, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close((both[3] @ both[2]).real, B, rtol=1e-11, atol=1e-11)
    assert len(P) == (2 if measure == "legt" else 1) and poles.imag.min() > 0


def test_hippo_small_tables() -> None:
    root3 = math.sqrt(3)
    assert torch.allclose(hippo("legs", 2)[0], torch.tensor([[-1, 0], [-root3, -2]], dtype=torch.float64))
    assert torch.allclose(hippo("legt", 2)[0], torch.tensor([[-1, root3], [-root3, -3]], dtype=torch.float64) / 2)
    assert torch.allclose(hippo("lagt", 2)[0], torch.tensor([[-0.5, 0], [-1, -0.5]], dtype=torch.float64))


def test_legs_remembers_warped_legendre_polynomials() -> None:
    A, B = hippo("legs", 8)
    for t in (0.1, 1.0, 3.0):
        z, n = 2 * math.exp(-t) - 1, np.arange(8)
        legendre = np.polynomial.legendre.legval(z, np.eye(8)) * np.sqrt(2 * n + 1) * math.exp(-t)
        torch.testing.assert_close(torch.linalg.matrix_exp(t * A) @ B, torch.tensor(legendre), rtol=1e-11, atol=1e-12)


def test_legt_forgets_after_two_units_of_time() -> None:
    A, B = hippo("legt", 64)
    inside, outside = ((torch.linalg.matrix_exp(t * A) @ B).norm() for t in (1.9, 2.5))
    assert inside > 3 and outside < 0.02


@pytest.mark.parametrize(("measure", "good"), [("legt", (50, 190)), ("legs", (50, 190)), (None, ())])
def test_memory_of_a_delayed_signal(measure: str | None, good: tuple[int, ...]) -> None:
    """A linear reading of the state, to four digits, recovers a band-limited signal as it was tau samples ago: "legt"
    with steps of 0.01 as far as its window of 200 goes; a random stable matrix at none of these delays."""
    N, T, dt = 64, 4000, torch.tensor(0.01, dtype=torch.float64)
    if measure is None:
        A = normal(N, N) / N**0.5
        A, B = A - 1.1 * torch.eye(N, dtype=torch.float64) * torch.linalg.eigvals(A).real.max(), normal(N, seed=1)
    else:
        A, B = hippo(measure, N)
    spectrum = torch.fft.rfft(normal(T, seed=2))
    spectrum[int(0.05 * T) :] = 0
    u = torch.fft.irfft(spectrum, n=T)
    A, B = bilinear(A, B, dt)
    states = lti(u[None, :, None], A[None], B[None], torch.eye(N, dtype=torch.float64)[None])[0][0, :, 0]

    def recovered(tau: int) -> float:
        wanted, fit, rest = u.roll(tau), slice(500, 3000), slice(3000, T)
        weights = torch.linalg.lstsq(states[fit], wanted[fit, None], rcond=1e-4, driver="gelsd").solution[:, 0]
        return float(1 - (states[rest] @ weights - wanted[rest]).square().mean() / wanted[rest].var())

    assert all(recovered(tau) > 0.99 for tau in good)
    if measure == "legt":
        assert recovered(250) < 0.2
    if measure is None:
        assert recovered(50) < 0.2


# Discretisation


def test_bilinear_special_cases() -> None:
    A, B, dt = hippo("legs", 4)[0], hippo("legs", 4)[1], torch.tensor([0.01, 0.3], dtype=torch.float64)
    eye, step = torch.eye(4, dtype=torch.float64), dt[:, None, None] * A
    forward, backward, middle = (bilinear(A, B, dt, alpha) for alpha in (0.0, 1.0, 0.5))
    torch.testing.assert_close(forward[0], eye + step)
    torch.testing.assert_close(forward[1], dt[:, None] * B)
    torch.testing.assert_close(backward[0], torch.linalg.inv(eye - step))
    torch.testing.assert_close(middle[0], torch.linalg.inv(eye - step / 2) @ (eye + step / 2))
    torch.testing.assert_close(middle[1], (torch.linalg.inv(eye - step / 2) @ (dt[:, None] * B)[..., None])[..., 0])


def test_zoh_is_exact_for_held_inputs() -> None:
    """One step equals many small ones with the same input; splitting a step changes nothing."""
    A, B = hippo("legs", 6)
    whole, parts = (zoh_dense(A, B, torch.tensor(d, dtype=torch.float64)) for d in (0.2, 0.2 / 500))
    x, u = normal(6), 0.7
    fine = x
    for _ in range(500):
        fine = parts[0] @ fine + parts[1] * u
    torch.testing.assert_close(whole[0] @ x + whole[1] * u, fine, rtol=1e-11, atol=1e-11)
    singular = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # a double integrator
    exact = zoh_dense(singular, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(exact[1], torch.tensor([0.125, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(("diagonal", "dense"), [(zoh, zoh_dense), (bilinear_diagonal, bilinear)])
def test_diagonal_rules_are_the_dense_ones(diagonal, dense) -> None:
    A, B = torch.stack([-normal(5).abs(), 3 * normal(5, seed=1)], -1), normal(5, 2, seed=2)
    A[0] = 0.0  # an integrator
    A[1] = torch.tensor([-1e-7, 1e-7])
    for dt in (1e-6, 0.05, 2.0):
        step = torch.tensor(dt, dtype=torch.float64)
        g, theta, b = diagonal(A, B, step.expand(5))
        matrix = torch.diag(torch.view_as_complex(A))
        want = dense(matrix, torch.view_as_complex(B), step.to(matrix.dtype))
        torch.testing.assert_close(torch.polar(g.exp(), theta), want[0].diagonal(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.view_as_complex(b), want[1], rtol=1e-12, atol=1e-14)
        assert g.max() <= 0


def test_discretisation_has_gradients_at_the_limit() -> None:
    A, B = torch.zeros(2, 2, dtype=torch.float64), normal(2, 2)
    A[1] = torch.tensor([-0.5, 2.0])
    step = torch.tensor([0.1, 0.3], dtype=torch.float64)
    for rule in (zoh, bilinear_diagonal):
        leaves = [x.clone().requires_grad_() for x in (A, B, step)]
        assert torch.autograd.gradcheck(lambda *x, rule=rule: rule(*x), leaves)


def test_discretisation_refuses_another_alpha() -> None:
    A, B = hippo("legs", 2)
    with pytest.raises(ValueError, match=r"^alpha: expected a number from 0 to 1, got 2"):
        bilinear(A, B, torch.tensor(0.1, dtype=torch.float64), 2.0)


# Kernels


@pytest.mark.parametrize("measure", ["legs", "legt"])
@pytest.mark.parametrize("length", [1, 50, 51, 64])
def test_cauchy_kernel_is_that_of_the_dense_system(measure: str, length: int) -> None:
    D, N = 3, 16
    poles, P, B, V = (x.expand(D, *x.shape) for x in nplr(measure, N))
    C, dt = torch.complex(normal(D, 2, N // 2), normal(D, 2, N // 2, seed=1)), normal(D, seed=2).abs() / 10
    got = cauchy_kernel(poles, P, B, C, dt, length)
    real = dplr(poles, P, B, C)
    torch.testing.assert_close(got, krylov_kernel(*bilinear(*real[:2], dt), real[2], length), rtol=1e-10, atol=1e-11)
    A, b = bilinear(*hippo(measure, N), dt)  # in the basis that the polynomials come in
    read = 2 * (C @ V.mH).real
    torch.testing.assert_close(got, krylov_kernel(A, b, read, length), rtol=1e-9, atol=1e-10)


def test_vandermonde_kernel_at_any_length() -> None:
    g, theta, B, C = -normal(3, 4).abs() / 10, normal(3, 4, seed=1), normal(3, 4, 2, seed=2), normal(3, 2, 4, 2, seed=3)
    weight = torch.view_as_complex(C) * torch.view_as_complex(B)[:, None]
    for length in (1, 2, 7, 64, 100):
        j = torch.arange(length, dtype=torch.float64)
        powers = torch.polar((j * g[..., None]).exp(), j * theta[..., None])
        got = vandermonde_kernel(g, theta, B, C, length)
        torch.testing.assert_close(got, (weight @ powers).real, rtol=1e-12, atol=1e-12)


# Long inputs and hostile ones


def test_phase_does_not_drift_over_long_inputs() -> None:
    """An oscillation that hardly decays, after 65,536 tokens in fp32."""
    T = 65_536
    u = torch.zeros(1, T, 1)
    u[0, 0] = 1.0
    g, theta = torch.full((1, 1), -1e-5), torch.full((1, 1), 0.7)
    B, C = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[[1.0, 0.0]]]])
    y = lti_diagonal(u, g, theta, B, C)[0].flatten().double()
    want = (torch.arange(T) * g.double()[0]).exp() * (torch.arange(T) * theta.double()[0]).cos()
    assert (y - want).abs().max() < 2e-4


def test_tiny_and_long_steps_stay_finite() -> None:
    A, B = hippo("legs", 256)
    dt = torch.tensor([1e-6, 1e-3, 10.0], dtype=torch.float64)
    system = [x.float() for x in bilinear(A, B, dt)]
    y, state = lti(normal(1, 300, 3).float(), *system, normal(3, 1, 256, seed=1).float())
    assert y.isfinite().all() and state.x.isfinite().all()


@pytest.mark.parametrize("taps", [65, 128, 129, 300])
def test_long_convolution(taps: int) -> None:
    """Around the sizes at which its blocks change, with and without a past, against the sum itself."""
    weight, tail = normal(3, taps), normal(2, taps - 1, 3, seed=1)
    for length in (1, 63, 64, 200, 515):
        x = normal(2, length, 3, seed=length)
        for state in (None, type(conv(x, weight)[1])(tail)):
            got, want = (conv(x, weight, state=state, backend=name)[0] for name in ("chunked", "reference"))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_long_convolution_keeps_large_inputs_in_the_future() -> None:
    """Not even their rounding errors reach the outputs before them."""
    x, weight = normal(1, 500, 2).float(), normal(2, 400).float()
    other = x.clone()
    other[:, 300:] *= 1e6
    assert torch.equal(conv(x, weight)[0][:, :300], conv(other, weight)[0][:, :300])
