"""The linear engines on slices of a sequence: all processes at once, joined by the transitions of their slices.

Every function takes the slice of its process and returns the slice of the output, and the state after that slice (the
last process holds the state after the whole sequence). ``state`` is the state before the whole sequence; the first
process reads its own, the others ignore theirs. All processes of ``group`` (default: all there are) call together, with
slices of the same batch; lengths may differ. Gradients arrive where the inputs are, for the sum of the losses of all
processes; so every process runs a backward pass through its output.

A slice is read twice, once for its transition. What is exchanged has the size of a state, or of K / V + 1 states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linnet import ops
from linnet.ops import AttentionState, ConvState, DecayState, DeltaState, ScanState
from linnet.ops.core.chunks import accumulate_dtype

from .exchange import gather

__all__ = ["attention", "conv", "decay", "delta", "scan", "selective_scan"]


def _before(parts: list[Tensor], group: Any, compose: Callable[..., list[Tensor]], start: list[Tensor]) -> list[Tensor]:
    """The state before this process's slice: ``start``, carried through the transitions of the slices before."""
    gathered, zero = gather(parts, group)
    state = start
    for transition in gathered[: dist.get_rank(group)]:
        state = compose(transition, state)
    return [x + zero.to(x.dtype) for x in state]


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    u: Tensor | None = None,
    w: Tensor | None = None,
    *,
    group: Any = None,
    normalize: bool = False,
    state: DecayState | None = None,
    **options: Any,
) -> tuple[Tensor, DecayState]:
    """:func:`linnet.ops.decay` on a slice, without segments; a slice's transition is (total decay, final state)."""
    (B, T), H, K, V, acc = v.shape[:2], v.shape[2], k.shape[3], v.shape[3], accumulate_dtype(v)
    zeros = DecayState(v.new_zeros(B, H, K, V, dtype=acc), v.new_zeros(B, H, K, dtype=acc) if normalize else None)
    first = zeros if state is None or dist.get_rank(group) else state
    reading = {"scale": options.pop("scale", None)}
    _, after = ops.decay(torch.zeros_like(q), k, v, g, gv, None, w, normalize=normalize, state=first, **options)
    keys = v.new_zeros(B, H, 1, dtype=acc) if g is None else _total(g, B, T, acc).reshape(B, H, -1)
    values = v.new_zeros(B, H, 1, dtype=acc) if gv is None else _total(gv, B, T, acc)

    def compose(transition: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        log_k, log_v, S, *z = transition
        kept = [log_k.exp()[..., None] * before[0] * log_v.exp()[..., None, :] + S]
        return kept + [log_k.exp() * old + new for old, new in zip(before[1:], z, strict=True)]

    parts = [x for x in after if x is not None]
    start = [x for x in (zeros if dist.get_rank(group) else first) if x is not None]
    before = DecayState(*_before([keys, values, *parts], group, compose, start), *[None] * (not normalize))
    return ops.decay(q, k, v, g, gv, u, w, normalize=normalize, state=before, **reading, **options)


def _total(g: Tensor, B: int, T: int, dtype: torch.dtype) -> Tensor:
    """Sum over the slice of a log-decay that may be constant ``[H]``."""
    return (g.to(dtype) * T).expand(B, -1) if g.dim() == 1 else g.to(dtype).sum(1)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    w: Tensor | None = None,
    *,
    group: Any = None,
    scale: float | None = None,
    state: DeltaState | None = None,
    **options: Any,
) -> tuple[Tensor, DeltaState]:
    """:func:`linnet.ops.delta` on a slice, without segments; a slice's transition is ``(M, H)`` of
    :func:`linnet.ops.delta_transition`."""
    M, S = ops.delta_transition(k, v, beta, g, w, **options)
    start = torch.zeros_like(S) if state is None or dist.get_rank(group) else state.S
    if dist.get_rank(group) == 0:
        S = M @ start + S
    (before,) = _before([M, S], group, lambda t, s: [t[0] @ s[0] + t[1]], [start])
    return ops.delta(q, k, v, beta, g, w, scale=scale, state=DeltaState(before), **options)


def scan(
    a: Tensor, b: Tensor, *, group: Any = None, state: ScanState | None = None, **options: Any
) -> tuple[Tensor, ScanState]:
    """:func:`linnet.ops.scan` on a slice, forward, without segments and with real tensors; a slice's transition is
    (product of the factors, final state)."""
    acc = accumulate_dtype(b)
    blocks = a.dim() > 2 and a.shape[-2:] == (2, 2) and b.dim() == 4
    zeros = b.new_zeros(b.shape[0], *b.shape[2:], dtype=acc)
    units = [torch.ones_like(zeros)]
    if b.dim() == 4:  # pairs: the unit of complex numbers, or the columns of the unit matrix
        units = [x.expand_as(zeros) for x in torch.eye(2, dtype=acc, device=b.device)[: 2 if blocks else 1]]
    start = zeros if state is None or dist.get_rank(group) else state.h
    product = [ops.scan(a, torch.zeros_like(b), state=ScanState(unit), **options)[1].h for unit in units]
    h = ops.scan(a, b, state=ScanState(start), **options)[1].h

    def compose(transition: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        *factor, last = transition
        (x,) = before
        if blocks:
            x = factor[0] * x[..., :1] + factor[1] * x[..., 1:]
        elif b.dim() == 4:
            real, imaginary = factor[0].unbind(-1)
            x = torch.stack([real * x[..., 0] - imaginary * x[..., 1], real * x[..., 1] + imaginary * x[..., 0]], -1)
        else:
            x = factor[0] * x
        return [x + last]

    (before,) = _before([*product, h], group, compose, [start])
    return ops.scan(a, b, state=ScanState(before), **options)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    group: Any = None,
    state: ScanState | None = None,
    **options: Any,
) -> tuple[Tensor, ScanState]:
    """:func:`linnet.ops.selective_scan` on a slice, without segments; a slice's transition is (total decay, final
    state)."""
    acc = accumulate_dtype(x)
    zeros = x.new_zeros(x.shape[0], *A.shape, dtype=acc)
    start = zeros if state is None or dist.get_rank(group) else state.h
    _, after = ops.selective_scan(x, delta, A, B, torch.zeros_like(C), state=ScanState(start), **options)
    log = delta.to(acc).sum(1)[..., None] * A.to(acc)
    (before,) = _before([log, after.h], group, lambda t, s: [t[0].exp() * s[0] + t[1]], [start])
    return ops.selective_scan(x, delta, A, B, C, D, state=ScanState(before), **options)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    state: ConvState | None = None,
    **options: Any,
) -> tuple[Tensor, ConvState]:
    """:func:`linnet.ops.conv` on a slice, without segments; the slices hand on their last ``W - 1`` inputs.

    Raises:
        ValueError: a slice is shorter than that.
    """
    reach = weight.shape[1] - 1
    _check_reach("x", x, reach)
    tail = x[:, x.shape[1] - reach :].to(accumulate_dtype(x))
    start = torch.zeros_like(tail) if state is None or dist.get_rank(group) else state.tail
    (before,) = _before([tail], group, lambda transition, _: transition, [start])
    return ops.conv(x, weight, bias, state=ConvState(before), **options)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    group: Any = None,
    **options: Any,
) -> tuple[Any, AttentionState]:
    """:func:`linnet.ops.attention` over a window on a slice, without segments and state; the slices hand on their last
    ``window - 1`` keys and values, rotated already where they are. For full attention see
    ``torch.distributed.tensor.experimental.context_parallel``.

    Raises:
        ValueError: a slice is shorter than that.
    """
    reach = window - 1
    _check_reach("k", k, reach)
    rank, start = dist.get_rank(group), k.shape[1] - reach
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=k.device)
    lengths[rank] = k.shape[1]
    dist.all_reduce(lengths, group=group)
    gathered, zero = gather([k[:, start:], v[:, start:]], group)
    cache = None
    if rank > 0:
        keys, values = gathered[rank - 1]
        cache = AttentionState(keys, values, lengths[:rank].sum().expand(k.shape[0]))
    return ops.attention(q + zero, k, v, window=window, state=cache, **options)


def _check_reach(name: str, x: Tensor, reach: int) -> None:
    if x.shape[1] < reach:
        raise ValueError(f"{name}: expected slices of at least {reach} tokens, got {x.shape[1]}")
