"""HiPPO transitions: continuous-time systems whose state expands the past in orthogonal polynomials."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MEASURES", "hippo", "hippo_core", "nplr"]

MEASURES = ("legs", "legt", "lagt")


def _check(measure: str, size: int) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}; got {measure!r}")
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")


def hippo(measure: str, size: int) -> tuple[Tensor, Tensor]:
    """``A [N, N]`` and ``B [N]`` in float64 of ``x' = A x + B u``, stable (all eigenvalues to the left of zero).

    Args:
        measure: what of the past is remembered how well. "legs": all of it, scaled Legendre, which without the factor
            1/t of the paper weighs it exponentially, ``exp(tA) B = e^-t L(e^-t)``; "legt": a sliding window of 2 units
            of time, translated Legendre; "lagt": exponentially less, translated Laguerre.
        size: N.

    Raises:
        ValueError: for an unknown measure or no state.

    Source: HiPPO (arXiv 2008.07669) and LSSL (2110.13985) appendix E.2, whose appendix B.2 lacks the sign of "legs".
    """
    _check(measure, size)
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root
    if measure == "legt":
        # Not as a power of -1: graphs that torch.compile runs as they are (backend="eager") have the wrong signs then.
        alternating = torch.where(n[:, None] >= n, 1.0, 1 - 2 * ((n - n[:, None]) % 2))
        return -torch.outer(root, root) * alternating / 2, root / 2
    return -torch.ones(size, size, dtype=torch.float64).tril(-1) - torch.eye(size, dtype=torch.float64) / 2, n * 0 + 1


def hippo_core(measure: str, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The vectors ``p, d, q [N]`` and the tridiagonal ``T [N, N]`` (float64) of ``A = -diag(p) (diag(d) + T^-1)
    diag(q)``: the class of matrices within which an LSSL learns its transition.

    Source: LSSL (arXiv 2110.13985) theorem 11 and appendix E.
    """
    _check(measure, size)
    n = torch.arange(size, dtype=torch.float64)
    root, one = (2 * n + 1).sqrt(), torch.ones(size, dtype=torch.float64)
    below = torch.diag(one[1:], -1)
    if measure == "legt":
        ends = ((n == 0) | (n == size - 1)).double()
        return root, 0 * n, root, torch.diag(ends) + below.T - below
    lower = torch.diag(one) - below  # its inverse is the lower triangle of ones
    return (root, -n / (2 * n + 1), root, lower) if measure == "legs" else (one, -one / 2, one, lower)


def nplr(measure: str, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normal-plus-low-rank form: ``A = V (diag(lambda) - P^T conj(P)) V*`` with a unitary V.

    Returns, in complex128 and with one of each conjugate pair only: ``lambda [N/2]``, ``P [rank, N/2]`` and ``B [N/2]``
    in the basis of V, and ``V [N, N/2]``. "legs" and "lagt" have rank 1, "legt" 2.

    Raises:
        ValueError: for an unknown measure or an odd size.

    Source: S4 (arXiv 2111.00396) theorem 1 and appendix C.
    """
    A, B = hippo(measure, size)
    if size % 2:
        raise ValueError(f"size: expected an even number, for conjugate pairs, got {size}")
    n = torch.arange(size, dtype=torch.float64)
    if measure == "legs":
        P, shift = (n + 0.5).sqrt()[None], -0.5
    elif measure == "lagt":
        P, shift = torch.full((1, size), 0.5**0.5, dtype=torch.float64), 0.0
    else:
        P, shift = (n + 0.5).sqrt() * torch.stack([1 - n % 2, n % 2]), 0.0
    skew = A + P.T @ P - shift * torch.eye(size, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)  # ascending: the upper half has positive imaginary parts
    frequency, V = frequency[size // 2 :], V[:, size // 2 :]
    return shift + 1j * frequency, P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype), V
