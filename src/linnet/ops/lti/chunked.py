"""Linear time-invariant systems chunk by chunk: a convolution inside a chunk, the recurrence between chunks.

The transition is the same for every token, so one set of matrices serves all chunks of a channel. For chunks of ``C``
tokens with the inputs ``U`` and the state ``x`` that each begins with as columns,

    Y = K U + O x          K[i, j] = C A^(i-j) B (a Toeplitz matrix),   O[i] = C A^(i+1)
    x_next = A^C x + R U                                                R[:, j] = A^(C-1-j) B

A diagonal complex system takes the same path: a complex number is two real columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv.wide import toeplitz
from ..core import Segments, differentiable

__all__ = ["System", "chunked", "dense_system", "diagonal_system", "powers"]


class System(NamedTuple):
    """The matrices of one chunk, for each of ``D`` channels; a state is ``S`` real numbers, in rows."""

    kernel: Tensor  # [D, M, C] impulse response
    read: Tensor  # [D, S, M * C] O, transposed
    write: Tensor  # [D, C, S] R, transposed
    jump: Tensor  # A^C: [D, S, S], or [D, P, 2] where diagonal
    halves: list[Tensor]  # dense: A, A^2, A^4, ... below A^C
    logs: tuple[Tensor, Tensor] | None  # diagonal: log-modulus and phase [D, P] of one step


def powers(g: Tensor, theta: Tensor, exponents: Tensor) -> Tensor:
    """``exp(n (g + i theta))`` for every ``n`` in ``exponents`` ``[C]``: ``[..., C, 2]``, exact for ``g = -inf``.

    Computed in float64: a phase of ``n theta`` radians in fp32 would be off by ``n theta`` units in the last place.
    """
    n = exponents.double()
    size = torch.where(n > 0, n * g[..., None].double(), 0.0).exp()
    angle = n * theta[..., None].double()
    return torch.stack([size * angle.cos(), size * angle.sin()], -1).to(g.dtype)


def dense_system(A: Tensor, B: Tensor, C: Tensor, size: int) -> System:
    """Powers by doubling: ``log2(size)`` products of matrices."""
    write, read, power, halves = B[..., None], C @ A, A, []
    while write.shape[-1] < size:
        halves.append(power)
        write = torch.cat([write, power @ write], -1)
        read = torch.cat([read, read @ power], -2)
        power = power @ power
    # Rows of ``read`` come as (step, output): outputs go first.
    read = read.unflatten(1, (size, -1)).transpose(1, 2).flatten(1, 2)
    return System(C @ write, read.transpose(1, 2), write.flip(-1).transpose(1, 2), power, halves, None)


def diagonal_system(g: Tensor, theta: Tensor, B: Tensor, C: Tensor, size: int) -> System:
    """``B [D, P, 2]``, ``C [D, M, P, 2]``."""
    a = powers(g, theta, torch.arange(size + 1, device=g.device))  # [D, P, size + 1, 2]
    write = _times(a[:, :, :-1], B[:, :, None]).transpose(1, 2).flatten(2)  # [D, size, P * 2]
    sign = torch.tensor([1.0, -1.0], dtype=C.dtype, device=C.device)  # Re(c x) = Re c Re x - Im c Im x
    read = _times(a[:, None, :, 1:], C[:, :, :, None]) * sign  # [D, M, P, size, 2]
    read = read.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
    kernel = (C * sign).flatten(2) @ write.transpose(1, 2)
    return System(kernel, read, write.flip(1), a[:, :, -1], [], (g, theta))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers as pairs ``[..., 2]``."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


def _is_dense(matrix: Tensor, x: Tensor) -> bool:
    """Of the shapes ``[D, S, S]`` and, diagonal with ``S = 2 P``, ``[D, P, 2]``."""
    return matrix.shape[1] == x.shape[2]


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """A transition on states ``[D, R, S]``; a diagonal one may be ``[D, R, P, 2]``, of its own for each."""
    if matrix.dim() == 3 and _is_dense(matrix, x):
        return x @ matrix.transpose(1, 2)
    each = matrix if matrix.dim() == 4 else matrix[:, None]
    return _times(each, x.unflatten(2, (-1, 2))).flatten(2)


def chunked(u: Tensor, system: System, x: Tensor, segments: Segments | None, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """``u [B, T, D]``, states ``x [N, D, S]``: ``(y [B, T, D, M], x [N, D, S])``, all in ``acc``.

    A sequence of T tokens has ``T // C`` whole chunks and one more, which may be empty: from the state it begins with,
    that after the last token is made.
    """
    D, M, size = system.kernel.shape
    rows, (batch, length) = x.shape[0], u.shape[:2]
    tokens = u.to(acc).flatten(0, 1)
    if segments is None:
        count = length // size + 1
        inputs, place = F.pad(u.to(acc), (0, 0, 0, count * size - length)).flatten(0, 1), None
        last = torch.arange(count - 1, rows * count, count, device=u.device)
        lengths = torch.ones_like(last) * length
        ends = lengths.cumsum(0)
    else:
        lengths, ends = segments.cu_seqlens.diff().long(), segments.cu_seqlens[1:].long()
        counts = lengths // size + 1
        last = counts.cumsum(0) - 1
        first = (last + 1 - counts).index_select(0, segments.ids)
        place = first * size + segments.positions  # of each token in its chunk
        # No more chunks than this; how many exactly would have to be asked from the device.
        inputs = tokens.new_zeros((length // size + rows) * size, D).index_copy(0, place, tokens)
    inputs = inputs.T.contiguous().unflatten(1, (-1, size))  # [D, chunks, C]
    host = None if segments is None else segments.cu_seqlens_host
    starts = _carry_op(inputs @ system.write, system.jump, x.transpose(0, 1).contiguous(), host, size)
    y = torch.baddbmm(starts @ system.read, inputs, toeplitz(system.kernel).flatten(1, 2).transpose(1, 2))
    y = y.unflatten(2, (M, size)).permute(1, 3, 0, 2).flatten(0, 1)  # [chunks * C, D, M]
    if place is None:
        y = y.unflatten(0, (batch, -1))[:, :length]
    else:
        y = y.index_select(0, place)[None]
    x = _advance(starts.index_select(1, last), system, lengths % size)
    back = torch.arange(-size, 0, device=u.device)
    rest = torch.where(back >= -(lengths % size)[:, None], ends[:, None] + back, tokens.shape[0])  # to the right
    rest = F.pad(tokens, (0, 0, 0, 1)).index_select(0, rest.flatten()).T.unflatten(1, (rows, size))
    return y, (x + rest @ system.write).transpose(0, 1)


def _advance(x: Tensor, system: System, steps: Tensor) -> Tensor:
    """States ``[D, N, S]`` after so many steps ``[N]``, less than a chunk, without input."""
    if system.logs is not None:
        return _apply(powers(*system.logs, steps).transpose(1, 2), x)
    for i, power in enumerate(system.halves):
        x = torch.where((steps[:, None] >> i) & 1 == 1, _apply(power, x), x)
    return x


# Between chunks. A registered op, so that a compiled graph does not unroll the loop and serves every length.


def _steps(rows: int, chunks: int, cu_host: Tensor | None, size: int, device: torch.device) -> list[tuple[Any, Any]]:
    """For each step from chunk to chunk: the rows that still have one, and which of all chunks it is."""
    if cu_host is None:
        count = chunks // rows
        return [(slice(None), slice(c, None, count)) for c in range(count)]
    counts = cu_host.diff().long() // size + 1
    first = counts.cumsum(0) - counts
    found = []
    for c in range(int(counts.max())):
        alive = (counts > c).nonzero().flatten()
        found.append((alive.to(device), (first[alive] + c).to(device)))
    return found


def _carry(wrote: Tensor, jump: Tensor, x: Tensor, cu_host: Tensor | None, size: int) -> Tensor:
    """States ``[D, chunks, S]`` at which the chunks begin, from what each adds (``wrote``) and the rows' initial states
    ``x [D, N, S]``; chunks that belong to no row are zero."""
    starts, x = torch.zeros_like(wrote, memory_format=torch.contiguous_format), x.clone()
    for rows, chunks in _steps(x.shape[1], wrote.shape[1], cu_host, size, x.device):
        now = x[:, rows]
        starts[:, chunks] = now
        x[:, rows] = _apply(jump, now) + wrote[:, chunks]
    return starts


def _carry_fake(wrote, jump, x, cu_host, size):
    return torch.empty_like(wrote, memory_format=torch.contiguous_format)


def _carry_backward(
    jump: Tensor, starts: Tensor, cu_host: Tensor | None, size: int, rows: int, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dense, sign = _is_dense(jump, starts), jump.new_tensor([1.0, -1.0])
    back = jump.transpose(1, 2) if dense else jump * sign
    dx, d_wrote = grad.new_zeros(grad.shape[0], rows, grad.shape[2]), torch.zeros_like(grad)
    for alive, chunks in reversed(_steps(rows, grad.shape[1], cu_host, size, grad.device)):
        now = dx[:, alive]
        d_wrote[:, chunks] = now
        dx[:, alive] = _apply(back, now) + grad[:, chunks]
    if dense:
        return d_wrote, d_wrote.transpose(1, 2) @ starts, dx
    after, before = (y.unflatten(2, (-1, 2)) for y in (d_wrote, starts))
    return d_wrote, _times(after, before * sign).sum(1), dx


def _carry_backward_fake(jump, starts, cu_host, size, rows, grad):
    return torch.empty_like(grad), torch.empty_like(jump), grad.new_empty(grad.shape[0], rows, grad.shape[2])


def _setup(ctx, inputs, output):
    _, jump, x, cu_host, size = inputs
    ctx.save_for_backward(jump, output, cu_host)
    ctx.size, ctx.rows = size, x.shape[1]


def _gradients(run, ctx, grad):
    jump, starts, cu_host = ctx.saved_tensors
    return *run(jump, starts, cu_host, ctx.size, ctx.rows, grad.contiguous()), None, None


_carry_op = differentiable(
    "lti_carry",
    _carry,
    _carry_backward,
    forward_fake=_carry_fake,
    backward_fake=_carry_backward_fake,
    setup=_setup,
    gradients=_gradients,
)
