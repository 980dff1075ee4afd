"""Engine `cell`: nonlinear recurrent cells, one token after the other at the speed the hardware allows.

Serves the Elman network, LSTM, GRU and sLSTM, dense or block-diagonal over heads.
"""

from __future__ import annotations

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
from . import chunked, reference
from .cells import CELLS, Cell
from .m2rnn import M2RNNState, m2rnn
from .newton import NewtonResult, check_step, newton, unroll
from .para import ParaState, paragru, paralstm
from .state import CellState

__all__ = [
    "CellState",
    "M2RNNState",
    "NewtonResult",
    "ParaState",
    "cell",
    "cell_state",
    "check_step",
    "cost",
    "m2rnn",
    "newton",
    "paragru",
    "paralstm",
    "unroll",
]

BACKENDS = ("reference", "chunked", "triton")


def cell(
    x: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    p: Tensor | None = None,
    *,
    kind: str = "lstm",
    state: CellState | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CellState]:
    """A nonlinear recurrent network. With ``a_t = x_t + h_{t-1} R + b``, head by head (σ the logistic function)::

        tanh    h = tanh(a)                                                            (Elman)
        relu    h = max(a, 0)
        lstm    c = σ(f) c' + σ(i) tanh(z)               h = σ(o) tanh(c)              (i, f, z, o) = a
        cifg    c = σ(f) c' + (1 - σ(f)) tanh(z)         h = σ(o) tanh(c)              (f, z, o) = a
        gru     h = σ(z) h' + (1 - σ(z)) tanh(x_n + σ(r) (h' R_n + b_n))               (r, z, n) = x, R, b
        slstm   c = σ(f) c' + exp(i) tanh(z)   n = σ(f) n' + exp(i)   h = σ(o) c / n   (i, f, z, o) = a

    ``'`` marks the state before the token. The sLSTM is evaluated with ``c`` and ``n`` scaled by ``exp(-m)``,
    ``m = max(i, log σ(f) + m')``, so ``i`` may be of any size. One head is the ordinary dense network; for ``lstm``,
    ``gru``, ``tanh`` and ``relu`` that is the one of ``torch.nn``, gates in the same order.

    Args:
        x: inputs to the gates ``[B, T, H, G * D]``, G gates of D channels one after the other.
        R: recurrent weights ``[H, D, G * D]``.
        b: bias of the recurrent product ``[H, G * D]``, any floating dtype, fp32 advised.
        p: peepholes ``[H, P * D]``, likewise: ``lstm`` adds ``p_i c'``, ``p_f c'`` and ``p_o c`` to the gates (P = 3),
            ``cifg`` the last two of these (P = 2); the other kinds have none.
        kind: which cell.
        state: the state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        backend: "auto", "reference" (token by token), "chunked" (PyTorch, one product a token) or "triton" (one launch
            for all tokens; D up to 1024 in 16 bits, 64 in fp32).

    Returns:
        ``h`` ``[B, T, H, D]`` in x's dtype, and the :class:`CellState` after the last token in fp32 (float64 for
        float64 inputs). Differentiable in every floating argument and through the returned state, its ``m`` excepted.

    Raises:
        ValueError: on shapes, dtypes, devices or an unknown kind; the message names the argument.

    Source: FlashRNN (arXiv 2412.07752) for the interface and the deferred weight gradient; sLSTM: xLSTM (2405.04517);
    variants of the LSTM: Greff et al. 2015 (1503.04069).
    """
    x, R, b, p, parts = _check(x, R, b, p, kind, state, segments)
    name = resolve_backend(backend, BACKENDS if kernels_cover(x, R) else BACKENDS[:2], x)
    with no_autocast(x):
        if name == "reference" or (x.shape[1] == 1 and segments is None and backend == "auto"):
            bounds = None if segments is None else segments.cu_seqlens_host.tolist()
            y, after = reference.recurrent(x, R, b, p, parts, bounds, kind)
            return y, CellState(*after)
        host = None if segments is None else segments.cu_seqlens_host
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, R, b, p, *parts))
        h, c, n, m = (*parts, None, None, None)[:4]
        y, *after, _ = _cell(x, R, b, p, h, c, n, m, host, kind, name, training)
    after = after[: len(parts)]
    return y, CellState(*after[:3], *(m.detach() for m in after[3:]))


def cell_state(kind: str, rows: int, H: int, D: int, *, dtype: torch.dtype | None = None, device=None) -> CellState:
    """The state before the first token, zeros, of ``rows`` sequences (fp32 unless ``dtype`` says otherwise)."""
    zeros = torch.zeros(rows, H, D, dtype=dtype or torch.float32, device=device)
    return CellState(*(zeros.clone() for _ in _kind(kind).states))


def _kind(name: str) -> Cell:
    if not isinstance(name, str) or name not in CELLS:
        raise ValueError(f"kind: expected one of {', '.join(CELLS)}; got {name!r}")
    return CELLS[name]


def kernels_cover(x: Tensor, R: Tensor) -> bool:
    """Whether the Triton kernels have this: what one multiprocessor holds in fp32, what a GPU's hold in 16 bits."""
    if x.dtype == torch.float32:
        return R.shape[1] <= 64
    return x.dtype in (torch.bfloat16, torch.float16) and R.shape[1] <= 1024


def _check(x, R, b, p, kind, state, segments):
    """Shapes and dtypes; the parts of the initial state as a tuple."""
    kinds, shapes = _kind(kind), Shapes()
    shapes("x", x, "B T H GD")
    shapes("R", R, "H D GD")
    H, D = R.shape[:2]
    if R.shape[2] != kinds.gates * D:
        raise ValueError(f"R: expected [H, D, {kinds.gates} * D] for kind={kind!r}, got {list(R.shape)}")
    x, R = common_dtype(x=x, R=R)
    if b is not None:
        shapes("b", b, "H GD")
        check_floating("b", b, x.device)
    if p is not None:
        if not kinds.peepholes:
            raise ValueError(f"p: expected None, kind {kind!r} has no peepholes, got {list(p.shape)}")
        Shapes(H=H, PD=len(kinds.peepholes) * D)("p", p, "H PD")
        check_floating("p", p, x.device)
    rows, acc = check_segments(segments, x), accumulate_dtype(x)
    if state is None:
        state = cell_state(kind, rows, H, D, dtype=acc, device=x.device)
    elif not isinstance(state, CellState):
        raise ValueError(f"state: expected a CellState, got {type(state).__name__}")
    parts = []
    for name, part in zip(CellState._fields, state, strict=True):
        if (part is None) != (name not in kinds.states):
            raise ValueError(f"state.{name}: expected {'a tensor' if part is None else 'None'} for kind={kind!r}, got "
                             f"{'None' if part is None else list(part.shape)}")  # fmt: skip
        if part is not None:
            Shapes(N=rows, H=H, D=D)(f"state.{name}", part, "N H D")
            check_floating(f"state.{name}", part, x.device)
            parts.append(part.detach().to(acc) if name == "m" else part.to(acc))
    return x, R, b, p, tuple(parts)


# The registered op. Optional tensors cannot be returned, so the parts a kind does not have are empty tensors.


def _forward(
    x: Tensor,
    R: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    cu_host: Tensor | None,
    kind: str,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = tuple(s for s in (h, c, n, m) if s is not None)
    with no_autocast(x):
        if backend == "triton":
            from . import launch

            y, after, tape = launch.forward(x, R, b, p, state, cu_host, kind, training)
        else:
            y, after, tape = chunked.forward(x, R, b, p, state, cu_host, kind, training)
    missing = [h.new_empty(0) for _ in range(4 - len(after))]
    return (y, *after, *missing, h.new_empty(0) if tape is None else tape)  # type: ignore[return-value]


def _forward_fake(x, R, b, p, h, c, n, m, cu_host, kind, backend, training):
    y = x.new_empty(*x.shape[:3], R.shape[1])
    after = [h.new_empty(0) if s is None else torch.empty_like(s) for s in (h, c, n, m)]
    parts = len(CELLS[kind].states) - (backend == "triton")
    tape = (x.shape[0] * x.shape[1], parts, *R.shape[:2]) if training else (0,)
    return y, *after, h.new_empty(tape)


_GRADS = ("x", "R", "b", "p", "h", "c", "n")


def _backward(
    x: Tensor,
    R: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    h: Tensor,
    cu_host: Tensor | None,
    kind: str,
    backend: str,
    tape: Tensor,
    y: Tensor,
    dy: Tensor,
    d_state: list[Tensor],
) -> list[Tensor]:
    with no_autocast(x):
        if backend == "triton":
            from . import launch

            grads = launch.backward(x, R, b, p, h, cu_host, kind, tape, y, dy, tuple(d_state))
        else:
            grads = chunked.backward(x, R, b, p, cu_host, kind, tape, dy, tuple(d_state))
    return [grads[name].contiguous() if name in grads else tape.new_empty(0) for name in _GRADS]


def _backward_fake(x, R, b, p, h, cu_host, kind, backend, tape, y, dy, d_state):
    given = (x, R, b, p, *d_state, *[None] * (3 - len(d_state)))
    return [
        tape.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in given
    ]


def _setup(ctx, inputs, output):
    x, R, b, p, h, _, _, _, cu_host, kind, backend, _ = inputs
    ctx.save_for_backward(x, R, b, p, cu_host, h, output[0], output[-1])
    ctx.options = kind, backend
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, dy, *d_after):
    x, R, b, p, cu_host, h, y, tape = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    free = CELLS[ctx.options[0]].differentiable
    d_state = [torch.zeros_like(h) if d is None else d.contiguous() for d in d_after[:free]]
    grads = run(x, R, b, p, h, cu_host, *ctx.options, tape, y, dy, d_state)
    grads = [d if needed and d.numel() else None for d, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return *grads, None, None, None, None, None


_cell = differentiable(
    "cell",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(B: int, T: int, H: int, D: int, *, kind: str = "lstm", itemsize: int = 2, backward: bool = False) -> Cost:
    """Floor of one call: the inputs of the gates read once, ``h`` written once, the weights read once.

    ``itemsize`` is that of x and R. With ``backward``, of forward and backward together: x, h and its gradient are read
    again, the gradients of x and R written; the products are rebuilt, taken back in time and reduced to that of R.
    The time of a call is rarely this: every token waits for the one before it, T steps of about a microsecond.
    """
    gates, states = CELLS[kind].gates, len(CELLS[kind].states)
    inputs, outputs, weights = B * T * H * gates * D * itemsize, B * T * H * D * itemsize, H * gates * D * D * itemsize
    state = 4 * B * H * states * D
    moved = inputs + outputs + weights
    if backward:
        moved += 2 * inputs + 2 * outputs + 2 * weights
    return Cost(2 * B * T * H * gates * D * D * (4 if backward else 1), moved + 2 * state, state)


from . import cases as _cases  # noqa: E402,F401  (registers the op and its sample inputs)
