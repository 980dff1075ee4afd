"""Feature maps of queries and keys that need tables."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from . import parts

__all__ = ["TaylorFeatures"]


class TaylorFeatures(nn.Module):
    """Monomials up to a degree, ``[..., K] -> [..., F]``, with ``<phi(q), phi(k)> = sum_{n <= order} (q.k)^n / n!``.

    Each monomial comes once, divided by the root of the product of the factorials of its powers: ``F = C(K + order,
    order)``, where the n-fold Kronecker powers would have ``K^n`` entries for every degree n. Computed in fp32, in the
    dtype of the input.
    """

    def __init__(self, size: int, order: int):
        super().__init__()
        self.size, self.order, self.features = size, order, math.comb(size + order, order)
        for degree in range(1, order + 1):
            count = math.comb(size + degree - 1, degree)
            self.register_buffer(f"table{degree}", torch.empty(3, count, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the tables: of each monomial the one of a degree less that it extends, by which channel, and the
        product of the factorials of its powers."""
        shorter: dict[tuple[int, ...], int] = {(): 0}
        for degree in range(1, self.order + 1):
            longer = list(combinations_with_replacement(range(self.size), degree))
            rows = [(shorter[m[:-1]], m[-1], math.prod(math.factorial(m.count(c)) for c in set(m))) for m in longer]
            parts.assign(self.get_buffer(f"table{degree}"), torch.tensor(rows).T)
            shorter = {m: i for i, m in enumerate(longer)}

    def forward(self, x: Tensor) -> Tensor:
        wide = parts.fp32(x)
        level = torch.ones_like(wide[..., :1])
        found = [level]
        for degree in range(1, self.order + 1):
            before, channel, factorials = self.get_buffer(f"table{degree}")
            level = level[..., before] * wide[..., channel]
            found.append(level * factorials.to(wide.dtype).rsqrt())
        return torch.cat(found, -1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, order={self.order}"
