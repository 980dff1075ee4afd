"""ParaGRU and ParaLSTM: cells whose channels recur each on its own, made to be solved in parallel by Newton's method.

Given the inputs of the gates, a channel's state depends on its own past alone: one number (ParaGRU) or the pair of
memory and output (ParaLSTM). The derivatives are written out, since they are needed several times a call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_floating,
    check_segments,
    common_dtype,
    differentiable,
    no_autocast,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype
from .newton import _unroll, adjoint, solve
from .state import add_at_last, after_last, at_first, before

BACKENDS = ("reference", "chunked", "triton")
_ITERATIONS = 24  # of Newton; beyond, token by token is the better deal


class ParaState(NamedTuple):
    """``h`` ``[N, D]`` and, for the ParaLSTM, its memory ``c`` ``[N, D]``; fp32, one row a sequence."""

    h: Tensor
    c: Tensor | None = None


def paragru(
    x: Tensor,
    A: Tensor,
    *,
    state: ParaState | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ParaState]:
    """A GRU with diagonal recurrent weights. Channel by channel, with ``(x_z, x_r, x_n) = x_t``::

        z = σ(A_z h' + x_z)   r = σ(A_r h' + x_r)   n = tanh(A_n r h' + x_n)   h = (1 - z) h' + z n

    Args:
        x: inputs of the gates ``[B, T, 3, D]``, in the order update, reset, candidate.
        A: recurrent weights ``[3, D]``, any floating dtype, fp32 advised. Up to about 0.5 in size they let Newton's
            method converge in three or four steps whatever the length.
        state: the state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        backend: "auto", "reference" (token by token), "chunked" (Newton's method over the sequence, and token by token
            where it does not converge: the result is the same) or "triton" (one launch: token by token, or where few
            channels would leave a GPU idle by Newton's method in tiles of the sequence).

    Returns:
        ``h`` ``[B, T, D]`` in x's dtype and the :class:`ParaState` after the last token in fp32 (float64 for float64
        inputs). Differentiable in every floating argument and through the returned state.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: ParaRNN (arXiv 2510.21450), section on ParaGRU.
    """
    return _para("paragru", x, A, None, state, segments, backend)


def paralstm(
    x: Tensor,
    A: Tensor,
    C: Tensor,
    *,
    state: ParaState | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ParaState]:
    """An LSTM with coupled gates, diagonal recurrent weights and peepholes. With ``(x_f, x_o, x_z) = x_t``::

        f = σ(A_f h' + C_f c' + x_f)   c = f c' + (1 - f) tanh(A_z h' + x_z)
        o = σ(A_o h' + C_o c + x_o)    h = o tanh(c)

    Args:
        x: inputs of the gates ``[B, T, 3, D]``, in the order forget, output, candidate.
        A: recurrent weights ``[3, D]``, any floating dtype.
        C: peepholes ``[2, D]``, forget and output gate, any floating dtype.
        state, segments, backend: as in :func:`paragru`; the state has a memory ``c``.

    Returns:
        ``h`` ``[B, T, D]`` and the :class:`ParaState`, as there.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: ParaRNN (arXiv 2510.21450), section on ParaLSTM.
    """
    return _para("paralstm", x, A, C, state, segments, backend)


def _para(kind, x, A, C, state, segments, backend):
    shapes = Shapes()
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] != 3:
        raise ValueError(f"x: expected shape [B, T, 3, D], got {list(x.shape) if isinstance(x, Tensor) else type(x)}")
    shapes("x", x, "B T G D")
    (x,) = common_dtype(x=x)
    shapes("A", A, "G D")
    check_floating("A", A, x.device)
    if kind == "paralstm":
        Shapes(P=2, D=shapes["D"])("C", C, "P D")
        check_floating("C", C, x.device)
    rows, acc = check_segments(segments, x), accumulate_dtype(x)
    if state is None:
        zeros = torch.zeros(rows, 2, x.shape[-1], dtype=acc, device=x.device).unbind(1)
        state = ParaState(zeros[0], zeros[1] if kind == "paralstm" else None)
    elif not isinstance(state, ParaState):
        raise ValueError(f"state: expected a ParaState, got {type(state).__name__}")
    for name, part in zip(ParaState._fields, state, strict=True):
        wanted = name == "h" or kind == "paralstm"
        if (part is not None) != wanted:
            got = "None" if part is None else list(part.shape)
            raise ValueError(f"state.{name}: expected {'a tensor' if wanted else 'None'} for {kind}, got {got}")
        if part is not None:
            Shapes(N=rows, D=shapes["D"])(f"state.{name}", part, "N D")
            check_floating(f"state.{name}", part, x.device)
    name = resolve_backend(backend, BACKENDS if x.dtype != torch.float64 else BACKENDS[:2], x)
    with no_autocast(x):
        s, A = _pack(state.h.to(acc), None if state.c is None else state.c.to(acc)), A.to(acc)
        C = None if C is None else C.to(acc)
        if name == "reference" or (x.shape[1] == 1 and segments is None and backend == "auto"):
            bounds = None if segments is None else segments.cu_seqlens_host.tolist()
            params = (A,) if C is None else (A, C)
            states, last = _unroll(_STEPS[kind], (x.to(acc),), False, s, params, bounds)
            y = _output(states).to(x.dtype)
        else:
            host = None if segments is None else segments.cu_seqlens_host
            y, last, _ = _para_op(x, A, C, s, host, kind, name)
    return y, ParaState(last) if C is None else ParaState(last[..., 1], last[..., 0])


def _pack(h: Tensor, c: Tensor | None) -> Tensor:
    """The state as Newton's method has it: ``[..., D]``, or ``[..., D, 2]`` with the memory first."""
    return h if c is None else torch.stack([c, h], -1)


def _output(states: Tensor) -> Tensor:
    return states[..., 1] if states.dim() == 4 else states


def _gru_step(h: Tensor, x: Tensor, A: Tensor) -> Tensor:
    x_z, x_r, x_n = x.unbind(-2)
    z, r = torch.sigmoid(A[0] * h + x_z), torch.sigmoid(A[1] * h + x_r)
    return (1 - z) * h + z * torch.tanh(A[2] * r * h + x_n)


def _lstm_step(s: Tensor, x: Tensor, A: Tensor, C: Tensor) -> Tensor:
    (x_f, x_o, x_z), (c, h) = x.unbind(-2), s.unbind(-1)
    f = torch.sigmoid(A[0] * h + C[0] * c + x_f)
    c = f * c + (1 - f) * torch.tanh(A[2] * h + x_z)
    return torch.stack([c, torch.sigmoid(A[1] * h + C[1] * c + x_o) * torch.tanh(c)], -1)


_STEPS = {"paragru": _gru_step, "paralstm": _lstm_step}


class _Gru:
    """The ParaGRU around states before every token: the states after them, their derivatives, and the way back."""

    def __init__(self, x: Tensor, A: Tensor, C: Tensor | None, h: Tensor):
        x_z, x_r, x_n = x.unbind(-2)
        self.A, self.h = A, h
        self.z, self.r = torch.sigmoid(A[0] * h + x_z), torch.sigmoid(A[1] * h + x_r)
        self.n = torch.tanh(A[2] * self.r * h + x_n)
        self.f = h + self.z * (self.n - h)

    def jacobian(self) -> Tensor:
        z, r, n, h, A = self.z, self.r, self.n, self.h, self.A
        inner = r + h * r * (1 - r) * A[1]
        return (1 - z) + (n - h) * z * (1 - z) * A[0] + z * (1 - n.square()) * A[2] * inner

    def pull(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        z, r, n, h, A = self.z, self.r, self.n, self.h, self.A
        dn = g * z * (1 - n.square())
        dz = g * (n - h) * z * (1 - z)
        dr = dn * A[2] * h * r * (1 - r)
        dx = torch.stack([dz, dr, dn], -2)
        seen = torch.stack([h, h, r * h], -2)
        return dx, (dx * seen).sum((0, 1)), None


class _Lstm:
    def __init__(self, x: Tensor, A: Tensor, C: Tensor, s: Tensor):
        (x_f, x_o, x_z), (self.c0, self.h0) = x.unbind(-2), s.unbind(-1)
        self.A, self.C = A, C
        self.forget = torch.sigmoid(A[0] * self.h0 + C[0] * self.c0 + x_f)
        self.z = torch.tanh(A[2] * self.h0 + x_z)
        self.c = self.z + self.forget * (self.c0 - self.z)
        self.o, self.y = torch.sigmoid(A[1] * self.h0 + C[1] * self.c + x_o), torch.tanh(self.c)
        self.f = torch.stack([self.c, self.o * self.y], -1)

    def jacobian(self) -> Tensor:
        A, C, f, o, y, z = self.A, self.C, self.forget, self.o, self.y, self.z
        df, do = (self.c0 - z) * f * (1 - f), y * o * (1 - o)
        cc, ch = f + df * C[0], df * A[0] + (1 - f) * (1 - z.square()) * A[2]
        through = do * C[1] + o * (1 - y.square())
        rows = torch.stack([cc, ch], -1), torch.stack([through * cc, do * A[1] + through * ch], -1)
        return torch.stack(rows, -2)

    def pull(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        C, f, o, y, z = self.C, self.forget, self.o, self.y, self.z
        dc, dh = g.unbind(-1)
        do = dh * y * o * (1 - o)
        dc = dc + dh * o * (1 - y.square()) + do * C[1]
        df, dz = dc * (self.c0 - z) * f * (1 - f), dc * (1 - f) * (1 - z.square())
        dx = torch.stack([df, do, dz], -2)
        dC = torch.stack([df * self.c0, do * self.c], -2).sum((0, 1))
        return dx, (dx * self.h0[..., None, :]).sum((0, 1)), dC


_CELLS = {"paragru": _Gru, "paralstm": _Lstm}


def _forward(
    x: Tensor, A: Tensor, C: Tensor | None, s: Tensor, cu_host: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from . import launch_para

        return launch_para.forward(x, A, C, s, cu_host)
    wide, cell = x.to(s.dtype), _CELLS[kind]

    def linearise(prev: Tensor) -> tuple[Tensor, Tensor]:
        at = cell(wide, A, C, prev)  # type: ignore[arg-type]
        return at.f, at.jacobian()

    with no_autocast(x):
        empty = s.new_zeros(*x.shape[:2], *s.shape[1:])
        guess = cell(wide, A, C, before(empty, s, cu_host)).f  # type: ignore[arg-type]
        states, _, _, solved = solve(linearise, guess, s, cu_host, _ITERATIONS, None)
        if not solved:
            bounds = None if cu_host is None else cu_host.tolist()
            states, _ = _unroll(_STEPS[kind], (wide,), False, s, (A,) if C is None else (A, C), bounds)
        return _output(states).to(x.dtype, copy=True), after_last(states, s, cu_host), states


def _forward_fake(x, A, C, s, cu_host, kind, backend):
    return x.new_empty(*x.shape[:2], x.shape[3]), torch.empty_like(s), s.new_empty(*x.shape[:2], *s.shape[1:])


def _backward(
    x: Tensor,
    A: Tensor,
    C: Tensor | None,
    s: Tensor,
    cu_host: Tensor | None,
    kind: str,
    backend: str,
    states: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from . import launch_para

        return launch_para.backward(x, A, C, s, cu_host, states, dy, dlast)
    with no_autocast(x):
        dy = dy.to(s.dtype)
        w, rest = add_at_last(dy if C is None else torch.stack([torch.zeros_like(dy), dy], -1), dlast, cu_host)
        at = _CELLS[kind](x.to(s.dtype), A, C, before(states, s, cu_host))  # type: ignore[arg-type]
        J = at.jacobian()
        total = adjoint(J, w, cu_host)
        dx, dA, dC = at.pull(total)
        d_prev = J * total if C is None else (J * total[..., None]).sum(-2)
        ds = at_first(d_prev, s, cu_host) + rest
        return dx.to(x.dtype), dA, s.new_empty(0) if dC is None else dC, ds


def _backward_fake(x, A, C, s, cu_host, kind, backend, states, dy, dlast):
    return torch.empty_like(x), torch.empty_like(A), s.new_empty(0 if C is None else C.shape), torch.empty_like(s)


def _setup(ctx, inputs, output):
    *tensors, kind, backend = inputs
    ctx.save_for_backward(*tensors, output[-1])
    ctx.options = kind, backend


def _gradients(run, ctx, dy, dlast, _):
    *given, states = ctx.saved_tensors
    dx, dA, dC, ds = run(*given, *ctx.options, states, dy.contiguous(), dlast.contiguous())
    return dx, dA, None if given[2] is None else dC, ds, None, None, None


_para_op = differentiable(
    "para",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(B: int, T: int, D: int, *, kind: str = "paragru", itemsize: int = 2, backward: bool = False) -> Cost:
    """Floor of one call: the gates' inputs read once, the output written once; the weights are next to nothing. With
    ``backward``, of both passes: inputs, output and its gradient are read and the inputs' gradient is written.

    The arithmetic counts one evaluation of the cell, three transcendental functions (ParaLSTM: four) and some 15
    operations; each Newton step costs about three times that."""
    tokens, states = B * T * D * itemsize, 1 if kind == "paragru" else 2
    return Cost(
        18 * B * T * D * (4 if backward else 1), tokens * (12 if backward else 4) + 8 * B * D, 4 * B * D * states
    )
