"""Sample inputs of linear time-invariant systems, one case a mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..conv import conv
from ..core import Case, Identity, Op, Segments, register_op
from . import BACKENDS, bilinear, cost, hippo, lti, lti_diagonal
from .state import LTIState
from .transfer import krylov_kernel, vandermonde_kernel

D, S, P = 3, 4, 2


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _dense(generator: torch.Generator, outputs: int) -> dict[str, Any]:
    """A HiPPO system per channel, in a basis of its own, with steps that remember a few to many tokens."""
    A, B = hippo("legs", S)
    A, B = bilinear(A, B.expand(D, S), torch.tensor([0.02, 0.1, 0.5], dtype=torch.float64))
    turn = torch.linalg.qr(_normal(generator, D, S, S))[0]
    A, B = turn @ A @ turn.mT, (turn @ B[..., None])[..., 0]
    return {"A": A, "B": B, "C": _normal(generator, D, outputs, S)}


def _diagonal(generator: torch.Generator, outputs: int, reset: bool = False) -> dict[str, Any]:
    g = -torch.rand(D, P, dtype=torch.float64, generator=generator)
    if reset:
        g[0] = -torch.inf
        g[1] = 0.0
    theta = 3 * _normal(generator, D, P)
    return {"g": g, "theta": theta, "B": _normal(generator, D, P, 2), "C": _normal(generator, D, outputs, P, 2)}


def _case(name: str, system: Any, *shape: int, size: float = 1.0, hostile: bool = False) -> Case:
    def make(generator: torch.Generator, B: int, T: int) -> dict[str, Any]:
        return {"u": size * _normal(generator, B, T, D), **system(generator)}

    def state(generator: torch.Generator, rows: int) -> LTIState:
        return LTIState(size * _normal(generator, rows, D, *shape))

    return Case(name, make, ("u",), state, keep_fp32=("A", "B", "C", "g", "theta"), hostile=hostile)


def _is_a_convolution(r: torch.Generator):
    u, system = _normal(r, 2, 80, D), _dense(r, 1)
    return lti(u, **system)[0][..., 0], conv(u, krylov_kernel(**system, length=80)[:, 0].flip(-1))[0]


def _diagonal_is_a_convolution(r: torch.Generator):
    u, system = _normal(r, 2, 80, D), _diagonal(r, 1)
    return lti_diagonal(u, **system)[0][..., 0], conv(u, vandermonde_kernel(**system, length=80)[:, 0].flip(-1))[0]


def _diagonal_is_dense(r: torch.Generator):
    u, s = _normal(r, 2, 37, D), _diagonal(r, 2)
    a = torch.polar(s["g"].exp(), s["theta"])
    A = torch.zeros(D, P, 2, P, 2, dtype=torch.float64)
    for p in range(P):
        A[:, p, 0, p, 0] = A[:, p, 1, p, 1] = a.real[:, p]
        A[:, p, 0, p, 1], A[:, p, 1, p, 0] = -a.imag[:, p], a.imag[:, p]
    read = s["C"] * torch.tensor([1.0, -1.0], dtype=torch.float64)
    y, after = lti(u, A.reshape(D, 4, 4), s["B"].flatten(1), read.flatten(2))
    got, state = lti_diagonal(u, **s)
    return (got, state.x.flatten(2)), (y, after.x)


def _sums(r: torch.Generator):
    u, one = _normal(r, 2, 37, D), torch.ones(D, 1, 1, dtype=torch.float64)
    return lti(u, one, one[..., 0], one)[0][..., 0], u.cumsum(1)


def _one_segment(r: torch.Generator):
    u, system = _normal(r, 1, 37, D), _dense(r, 2)
    y, after = lti(u, **system, segments=Segments.from_lengths([37, 0]))
    return (y, after.x[:1], after.x[1:]), (*lti(u, **system), torch.zeros(1, D, S, dtype=torch.float64))


register_op(
    Op(
        name="lti",
        function=lti,
        backends=BACKENDS,
        cases=(
            _case("dense", lambda r: _dense(r, 1), S),
            _case("two outputs, large inputs", lambda r: _dense(r, 2), S, size=1e4, hostile=True),
        ),
        cost=cost,
        identities=(
            Identity("is the convolution with C A^j B", _is_a_convolution),
            Identity("with A = B = C = 1 it sums", _sums),
            Identity("one segment is no segments", _one_segment),
        ),
    )
)
register_op(
    Op(
        name="lti_diagonal",
        function=lti_diagonal,
        backends=BACKENDS,
        cases=(
            _case("diagonal", lambda r: _diagonal(r, 2), P, 2),
            _case("resets and no decay", lambda r: _diagonal(r, 1, reset=True), P, 2, size=1e4, hostile=True),
        ),
        cost=cost,
        identities=(
            Identity("is the convolution with Re sum_p C_p B_p a_p^j", _diagonal_is_a_convolution),
            Identity("is lti with a rotation by theta and a factor exp(g) for each mode", _diagonal_is_dense),
        ),
    )
)
