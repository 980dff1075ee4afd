"""Engine `lti`: a linear time-invariant system for every channel, the state-space layers of the S4 family.

What is the same at every token is the transition, so a call computes one set of matrices for a chunk of tokens and
applies it to all chunks; the state that travels between them makes decoding constant in memory. Around the engine:
`hippo` (transitions with long memory), `discretize` (from continuous time to steps) and `transfer` (the kernels of the
convolutional view, as published).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_floating,
    check_log_decay,
    check_segments,
    common_dtype,
    no_autocast,
    resolve_backend,
)
from ..core.chunks import chunk_length
from . import chunked, reference
from .discretize import bilinear, bilinear_diagonal, zoh, zoh_dense
from .hippo import hippo, hippo_core, nplr
from .state import LTIState
from .transfer import cauchy_kernel, dplr, krylov_kernel, vandermonde_kernel

__all__ = [
    "LTIState",
    "bilinear",
    "bilinear_diagonal",
    "cauchy_kernel",
    "cost",
    "dplr",
    "hippo",
    "hippo_core",
    "krylov_kernel",
    "lti",
    "lti_diagonal",
    "nplr",
    "vandermonde_kernel",
    "zoh",
    "zoh_dense",
]

BACKENDS = ("reference", "chunked")


def lti(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: LTIState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LTIState]:
    """A discrete linear system with a dense transition for every channel::

        x_t = A x_{t-1} + B u_t          y_t = C x_t

    which is the causal convolution of ``u`` with ``C A^j B``, j = 0, 1, ...

    Args:
        u: ``[B, T, D]``, one scalar input a channel.
        A: ``[D, S, S]``, any real matrix; nothing keeps an unstable one from growing.
        B: ``[D, S]``.
        C: ``[D, M, S]``, for M outputs a channel.
        state: the state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, D]`` inputs.
        chunk_size: tokens processed together, a power of two; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token) or "chunked" (vectorised PyTorch).

    Returns:
        ``y`` ``[B, T, D, M]`` in u's dtype, and ``LTIState(x [N, D, S])`` in fp32 (float64 for float64 inputs).
        Computed in fp32, whatever the dtype of u. Differentiable in u, A, B, C and the state, and through the returned
        state.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: LSSL (arXiv 2110.13985) eqs. 1-2 and 6-7; A, B and C are already discrete (`bilinear`, `zoh_dense`).
    """
    shapes = Shapes()
    shapes("u", u, "B T D")
    shapes("B", B, "D S")
    shapes("A", A, "D S S")
    shapes("C", C, "D M S")
    layout = {"D": shapes["D"], "S": shapes["S"]}
    return _run(u, {"A": A, "B": B, "C": C}, layout, state, segments, chunk_size, backend)


def lti_diagonal(
    u: Tensor,
    g: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: LTIState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LTIState]:
    """A discrete linear system with a diagonal complex transition for every channel::

        x_t = a . x_{t-1} + B u_t,  a = exp(g + i theta)          y_t = Re(C x_t)

    which is the causal convolution of ``u`` with ``Re sum_p C_p B_p a_p^j``, j = 0, 1, ... A system with conjugate
    pairs keeps one of each pair and doubles C.

    Args:
        u: ``[B, T, D]``, one scalar input a channel.
        g: ``[D, P]``, natural log of the modulus of ``a``, <= 0 (-inf forgets at once).
        theta: ``[D, P]``, its phase in radians a token.
        B: ``[D, P, 2]``, real and imaginary parts.
        C: ``[D, M, P, 2]``, real and imaginary parts, for M outputs a channel.
        state: the state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, D]`` inputs.
        chunk_size: tokens processed together, a power of two; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token) or "chunked" (vectorised PyTorch).

    Returns:
        ``y`` ``[B, T, D, M]`` in u's dtype, and ``LTIState(x [N, D, P, 2])`` in fp32 (float64 for float64 inputs).
        Computed in fp32, whatever the dtype of u. Differentiable in u, g, theta, B, C and the state, and through the
        returned state.

    Raises:
        ValueError: on shapes, dtypes, devices or a positive ``g``; the message names the argument.

    Source: S4D (arXiv 2206.11893) eqs. 2-5; a and B are already discrete (`zoh`, `bilinear`).
    """
    shapes = Shapes(two=2)
    shapes("u", u, "B T D")
    shapes("g", g, "D P")
    shapes("theta", theta, "D P")
    shapes("B", B, "D P two")
    shapes("C", C, "D M P two")
    check_floating("g", g, u.device)
    check_log_decay("g", g)
    layout = {"D": shapes["D"], "P": shapes["P"], "two": 2}
    return _run(u, {"g": g, "theta": theta, "B": B, "C": C}, layout, state, segments, chunk_size, backend)


def _run(
    u: Tensor,
    parameters: dict[str, Tensor],
    layout: dict[str, int],
    state: LTIState | None,
    segments: Segments | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, LTIState]:
    """What both have in common; ``layout`` is that of one row of the state."""
    (u,) = common_dtype(u=u)
    for name, x in parameters.items():
        check_floating(name, x, u.device)
    rows = check_segments(segments, u)
    acc = torch.promote_types(u.dtype, torch.float32)
    if state is None:
        x = u.new_zeros(rows, *layout.values(), dtype=acc)
    else:
        if not isinstance(state, LTIState):
            raise ValueError(f"state: expected an LTIState, got {type(state).__name__}")
        Shapes(N=rows, **layout)("state.x", state.x, " ".join(("N", *layout)))
        check_floating("state.x", state.x, u.device)
        x = state.x.to(acc)
    given = [p.to(acc) for p in parameters.values()]
    dense = len(given) == 3
    name = resolve_backend(backend, BACKENDS, u)
    size = chunk_length(chunk_size, 64, u.shape[1], name)
    with no_autocast(u):
        if name == "reference" or (u.shape[1] == 1 and segments is None and backend == "auto"):
            # One token is one step: there are no powers of the transition to prepare.
            step = reference.dense_step(*given) if dense else reference.diagonal_step(*given)
            y, x = reference.recurrent(step, u, x, None if segments is None else segments.cu_seqlens_host.tolist())
        else:
            system = chunked.dense_system(*given, size=size) if dense else chunked.diagonal_system(*given, size=size)
            y, after = chunked.chunked(u, system, x.flatten(2), segments, acc)
            x = after.reshape(x.shape)
    return y.to(u.dtype), LTIState(x)


def cost(
    B: int, T: int, D: int, N: int, *, outputs: int = 1, itemsize: int = 2, chunk: int = 64, backward: bool = False
) -> Cost:
    """Floor of one call with ``N`` real numbers of state a channel (``2 P`` of a diagonal system): u read once, y
    written once, the state kept on chip. Arithmetic: the products of :mod:`chunked`, without the powers, which do not
    grow with T. With ``backward``, of forward and backward together."""
    flops = 2 * B * T * D * (outputs * (chunk + N) + N) * (3 if backward else 1)
    moved = B * T * D * (1 + outputs) * (2 if backward else 1) + B * T * D * backward
    state = 4 * B * D * N
    return Cost(flops, moved * itemsize + 2 * state, state)


from . import cases as _cases  # noqa: E402,F401  (registers the ops and their sample inputs)
