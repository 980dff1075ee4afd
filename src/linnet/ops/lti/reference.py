"""Linear time-invariant systems, token by token: the definition (the recurrent view)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["dense_step", "diagonal_step", "recurrent"]

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def dense_step(A: Tensor, B: Tensor, C: Tensor) -> Step:
    """From a token ``u [N, D]`` and a state ``x [N, D, S]`` to ``y [N, D, M]`` and the next state."""

    def step(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.einsum("dij,ndj->ndi", A, x) + B * u[..., None]
        return torch.einsum("dms,nds->ndm", C, x), x

    return step


def diagonal_step(g: Tensor, theta: Tensor, B: Tensor, C: Tensor) -> Step:
    """The same with a diagonal transition and a state ``x [N, D, P, 2]``."""
    ar, ai = g.exp() * theta.cos(), g.exp() * theta.sin()
    read = C * C.new_tensor([1.0, -1.0])  # Re(c x) = Re c Re x - Im c Im x

    def step(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        xr, xi = x.unbind(-1)
        x = torch.stack([ar * xr - ai * xi, ar * xi + ai * xr], -1) + B * u[..., None, None]
        return torch.einsum("dmpc,ndpc->ndm", read, x), x

    return step


def recurrent(step: Step, u: Tensor, x: Tensor, bounds: list[int] | None) -> tuple[Tensor, Tensor]:
    """``step`` over all tokens of ``u [B, T, D]``, row by row where ``bounds`` (cumulative lengths) cut a packed one:
    ``y [B, T, D, M]`` and the states after the last tokens. An empty row keeps its state."""
    if bounds is not None:
        parts = [recurrent(step, u[:, a:b], x[n : n + 1], None) for n, (a, b) in enumerate(pairwise(bounds)) if b > a]
        after = iter(after for _, after in parts)
        states = [next(after) if b > a else x[n : n + 1] for n, (a, b) in enumerate(pairwise(bounds))]
        return torch.cat([y for y, _ in parts], 1), torch.cat(states)
    found = []
    for t in range(u.shape[1]):
        y, x = step(u[:, t].to(x.dtype), x)
        found.append(y)
    return torch.stack(found, 1), x
