"""The scans token by token: the definitions every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..core import Segments
from ..core.chunks import accumulate_dtype

__all__ = ["recurrent", "selective", "softmax"]


def apply(algebra: str, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """One step of the recurrence from the state ``h``."""
    if algebra == "minmax":  # a tie, and with it the gradient, goes to the bound; NaN goes on
        h = torch.where((h < a) | h.isnan(), h, a)
        return torch.where((h > b) | h.isnan(), h, b)
    if algebra == "block":
        return a[..., 0] * h[..., :1] + a[..., 1] * h[..., 1:] + b
    return a * h + b


def recurrent(
    algebra: str, a: Tensor, b: Tensor, h: Tensor, reverse: bool, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """States after every token in b's dtype, and after the last one of each row; shapes as in :func:`linnet.scan`."""
    if segments is not None:
        rows = zip(pairwise(segments.cu_seqlens_host.tolist()), h.split(1), strict=True)
        done = [recurrent(algebra, a[:, s:e], b[:, s:e], row, reverse, None) for (s, e), row in rows]
        return torch.cat([y for y, _ in done], 1), torch.cat([after for _, after in done])
    if reverse:
        y, h = recurrent(algebra, a.flip(1), b.flip(1), h, False, None)
        return y.flip(1), h
    dtype, acc = b.dtype, accumulate_dtype(b)
    a, b, h = a.to(acc), b.to(acc), h.to(acc)
    if algebra == "complex":
        a, b, h = (torch.view_as_complex(x.contiguous()) for x in (a, b, h))
    out = []
    for t in range(b.shape[1]):
        h = apply(algebra, a[:, t], b[:, t], h)
        out.append(h)
    y = torch.stack(out, 1) if out else b
    if algebra == "complex":
        y, h = torch.view_as_real(y), torch.view_as_real(h)
    return y.to(dtype), h


def softmax(
    s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running softmax averages ``[B, T, H, V]`` and the last ``m``, ``u``, ``w`` (online softmax)."""
    if segments is not None:
        rows = enumerate(pairwise(segments.cu_seqlens_host.tolist()))
        done = [softmax(s[:, a:b], v[:, a:b], m[n : n + 1], u[n : n + 1], w[n : n + 1], None) for n, (a, b) in rows]
        return tuple(torch.cat(part, int(i == 0)) for i, part in enumerate(zip(*done, strict=True)))  # type: ignore[return-value]
    dtype, acc = v.dtype, accumulate_dtype(v)
    s, v, m, u, w = (x.to(acc) for x in (s, v, m, u, w))
    out = []
    for t in range(s.shape[1]):
        top = torch.maximum(m, s[:, t]).detach()
        keep = torch.where(m == top, 1.0, (m.detach() - top).exp())
        add = torch.where(s[:, t] == -torch.inf, 0.0, (s[:, t] - torch.where(top == -torch.inf, 0.0, top)).exp())
        m, u, w = top, keep * u + add, keep[..., None] * w + add[..., None] * v[:, t]
        out.append(torch.where(u[..., None] > 0, w / torch.where(u > 0, u, 1.0)[..., None], 0.0))
    y = torch.stack(out, 1) if out else v
    return y.to(dtype), m, u, w


def selective(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence, ``B`` and ``C`` as ``[B, T, G, S]``; the reading in x's dtype and the last states."""
    if segments is not None:
        rows = zip(pairwise(segments.cu_seqlens_host.tolist()), h.split(1), strict=True)
        done = [selective(x[:, s:e], delta[:, s:e], A, B[:, s:e], C[:, s:e], D, row, None) for (s, e), row in rows]
        return torch.cat([y for y, _ in done], 1), torch.cat([after for _, after in done])
    dtype, acc = x.dtype, accumulate_dtype(x)
    x, delta, A, B, C, h = (y.to(acc) for y in (x, delta, A, B, C, h))
    B, C = (y.repeat_interleave(x.shape[2] // y.shape[2], 2) for y in (B, C))
    out = []
    for t in range(x.shape[1]):
        h = (delta[:, t, :, None] * A).exp() * h + (delta[:, t] * x[:, t])[..., None] * B[:, t]
        out.append((h * C[:, t]).sum(-1))
    y = torch.stack(out, 1) if out else x
    if D is not None:
        y = y + D.to(acc) * x
    return y.to(dtype), h
