"""From continuous time, ``x' = A x + B u``, to steps of a given length: ``x_t = A_ x_{t-1} + B_ u_t``.

The step is what ties a layer to a sampling rate: at a rate r times coarser, the same A and B with steps r times longer
are the same layer. Under a zero-order hold that is exact for inputs held constant; the bilinear map warps frequencies.
With ``u_t`` at the right end of its step all rules are of first order for smooth inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bilinear", "bilinear_diagonal", "zoh", "zoh_dense"]


def bilinear(A: Tensor, B: Tensor, dt: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """The generalised bilinear transform: ``A_ = (1 - a dt A)^-1 (1 + (1-a) dt A)``, ``B_ = (1 - a dt A)^-1 dt B``.

    Args:
        A: ``[..., N, N]``; B: ``[..., N]``; dt: steps ``[...]``, broadcast against the leading axes.
        alpha: 0 is Euler's forward rule, 1 the backward rule, 1/2 the bilinear (Tustin) transform.

    Source: LSSL (arXiv 2110.13985) eq. 4.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
    step, eye = dt[..., None, None] * A, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    right = torch.cat([eye + (1 - alpha) * step, (dt[..., None] * B)[..., None]], -1)
    both = torch.linalg.solve(eye - alpha * step, right)
    return both[..., :-1], both[..., -1]


def zoh_dense(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The zero-order hold, ``A_ = exp(dt A)`` and ``B_ = int_0^dt exp(s A) B ds``, exact for inputs that are constant
    over a step, and for singular A. Shapes as in :func:`bilinear`."""
    step, write = dt[..., None, None] * A, (dt[..., None] * B)[..., None]
    rows = torch.cat([step, write.expand(*step.shape[:-1], 1)], -1)
    both = torch.linalg.matrix_exp(torch.cat([rows, torch.zeros_like(rows[..., :1, :])], -2))
    return both[..., :-1, :-1], both[..., :-1, -1]


def zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The zero-order hold of a diagonal system, element by element: ``exp(dt A)`` as its log-modulus and phase, and
    ``B_ = (exp(dt A) - 1) / A * B`` (``dt B`` in the limit).

    Args:
        A: ``[..., P, 2]`` real and imaginary parts; B: ``[..., P, 2]``; dt: ``[..., P]`` or ``[..., 1]``.

    Returns:
        ``g [..., P]``, ``theta [..., P]``, ``B_ [..., P, 2]``.

    Source: S4D (arXiv 2206.11893) section 3.1.
    """
    step = _complex(A) * dt
    return step.real, step.imag, torch.view_as_real(_phi(step) * dt * _complex(B))


def bilinear_diagonal(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bilinear transform of a diagonal system: ``a = (1 + dt A / 2) / (1 - dt A / 2)``, ``B_ = dt B / (1 - dt A /
    2)``. Arguments and results as in :func:`zoh`."""
    half = _complex(A) * dt / 2
    up, down = 1 + half, 1 - half
    # |up|^2 / |down|^2 - 1, without the difference of two numbers close to 1 that a small step would make of it
    ratio = 4 * half.real / down.abs().square()
    return torch.log1p(ratio) / 2, up.angle() - down.angle(), torch.view_as_real(dt * _complex(B) / down)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


def _phi(z: Tensor) -> Tensor:
    """``(exp(z) - 1) / z``; near zero by its series, which also gives the gradient there."""
    small = z.abs() < 1e-2 if z.dtype == torch.complex128 else z.abs() < 0.1
    safe = torch.where(small, torch.ones_like(z), z)
    near = torch.where(small, z, torch.zeros_like(z))
    series = torch.ones_like(z)
    for k in (8, 7, 6, 5, 4, 3, 2):
        series = 1 + near / k * series
    return torch.where(small, series, (safe.exp() - 1) / safe)
