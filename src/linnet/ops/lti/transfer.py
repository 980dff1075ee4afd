"""Convolution kernels of state-space layers, the way their papers compute them.

``y = conv(u, kernel.flip(-1))`` with the long convolution of :func:`linnet.ops.conv` is the convolutional view of what
:func:`linnet.ops.lti` runs in chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import powers
from .discretize import bilinear

__all__ = ["cauchy_kernel", "dplr", "krylov_kernel", "vandermonde_kernel"]


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """``K_j = C A^j B`` for j < length, ``[D, M, L]``, by doubling: log2(L) products of matrices.

    Args:
        A: ``[D, S, S]``; B: ``[D, S]``; C: ``[D, M, S]``, discrete.

    Source: LSSL (arXiv 2110.13985) section 3.1 (its quasi-linear algorithm is numerically unusable).
    """
    columns, power = B[..., None], A
    while columns.shape[-1] < length:
        columns = torch.cat([columns, power @ columns], -1)
        power = power @ power
    return C @ columns[..., :length]


def vandermonde_kernel(g: Tensor, theta: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """``K_j = Re sum_p C_p B_p exp(j (g_p + i theta_p))`` for j < length, ``[D, M, L]``; arguments as in
    :func:`linnet.ops.lti_diagonal`.

    The exponents are split, ``j = block j1 + j0``, so that about ``2 sqrt(L)`` powers a mode are computed and the rest
    is a product of matrices: nothing of size ``[D, P, L]`` is ever held.

    Source: S4D (arXiv 2206.11893) section 3.2.
    """
    block = 1 << (max(length - 1, 1).bit_length() + 1) // 2
    j = torch.arange(block, device=g.device)
    inner = torch.view_as_complex(powers(g, theta, j))  # [D, P, block]
    outer = torch.view_as_complex(powers(g, theta, j[: -(-length // block)] * block))
    weight = torch.view_as_complex(C.contiguous()) * torch.view_as_complex(B.contiguous())[:, None]  # [D, M, P]
    K = torch.einsum("dmp,dpi,dpj->dmij", weight, outer, inner).real
    return K.flatten(2)[..., :length]


def cauchy_kernel(lam: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """The kernel ``[D, M, L]`` of a diagonal-plus-low-rank system ``A = diag(lam) - P^T conj(P)`` with conjugate pairs,
    discretised by the bilinear transform, from its generating function at the roots of unity.

    With ``w`` a root of unity, ``c = (1 + w) dt / 2`` and ``R = 1 / (1 - w - c lam)``, Woodbury's identity gives
    ``K^ (w) = dt (C.R.B - c C.R.P (1 + c P*.R.P)^-1 P*.R.B)``, without the pole that the published form has at
    ``w = -1``. C enters as ``C (1 - A_^L)``, which makes the sum over all tokens one over the first L.

    Args:
        lam: ``[D, N/2]``; P: ``[D, rank, N/2]``; B: ``[D, N/2]``; C: ``[D, M, N/2]``; all complex, one of each pair,
            such as :func:`nplr` gives.
        dt: steps ``[D]``.
        length: L.

    Source: S4 (arXiv 2111.00396) algorithm 1 and appendix C.3.
    """
    A, B_, C_ = dplr(lam, P, B, C)
    A, _ = bilinear(A, B_, dt)
    power = torch.linalg.matrix_power(A, length)
    pairs = (C_ - C_ @ power).unflatten(-1, (-1, 2))
    C = torch.complex(pairs[..., 0], -pairs[..., 1]) / 2
    lam, P, B, C = (torch.cat([x, x.conj()], -1) for x in (lam, P, B, C))
    root = torch.exp(-2j * torch.pi / length * torch.arange(length // 2 + 1, device=dt.device).to(dt.dtype))
    c = dt[:, None] / 2 * (1 + root)  # [D, F]
    R = 1 / (1 - root[:, None] - c[..., None] * lam[:, None])  # [D, F, N]
    rank = P.shape[1]
    left = torch.cat([C, P.conj()], 1)[:, None] * R[:, :, None]  # [D, F, M + rank, N]
    k = left @ torch.cat([B[:, None], P], 1).transpose(1, 2)[:, None]  # [D, F, M + rank, 1 + rank]
    top, low = k.split([C.shape[1], rank], 2)
    c = c[..., None, None]
    inner = torch.linalg.solve(torch.eye(rank, dtype=c.dtype, device=c.device) + c * low[..., 1:], low[..., :1])
    spectrum = dt[:, None, None] * (top[..., :1] - c * top[..., 1:] @ inner)[..., 0]
    return torch.fft.irfft(spectrum.transpose(1, 2), n=length)


def dplr(lam: Tensor, P: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same continuous system as dense real matrices ``A [D, N, N]``, ``B [D, N]`` and ``C [D, M, N]``; the state is
    the real and imaginary parts of one of each conjugate pair."""
    turn = torch.stack([torch.view_as_real(lam), torch.view_as_real(1j * lam)], -1)  # [D, N/2, 2, 2] columns
    pairs, size = torch.view_as_real(P).flatten(-2), 2 * lam.shape[-1]
    A = torch.zeros(*lam.shape[:-1], size // 2, size // 2, 2, 2, dtype=pairs.dtype, device=pairs.device)
    i = torch.arange(size // 2, device=pairs.device)
    A = A.index_put((torch.arange(lam.shape[0], device=lam.device)[:, None], i, i), turn)
    A = A.transpose(2, 3).reshape(-1, size, size) - 2 * pairs.transpose(-1, -2) @ pairs
    read = 2 * torch.view_as_real(C.conj().resolve_conj()).flatten(-2)
    return A, torch.view_as_real(B).flatten(-2), read
