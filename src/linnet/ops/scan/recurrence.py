"""Linear and minmax scans: the public functions, their checks and the registered op behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_chunk_size,
    check_floating,
    check_segments,
    common_dtype,
    differentiable,
    no_autocast,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype
from ..core.registry import KERNEL_DTYPES
from . import chunked, reference
from .state import ScanState

__all__ = ["BACKENDS", "backends", "check_state", "cost", "is_step", "minmax_scan", "scan"]

BACKENDS = ("reference", "chunked", "triton")


def scan(
    a: Tensor,
    b: Tensor,
    *,
    reverse: bool = False,
    state: ScanState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ScanState]:
    """Linear recurrence of independent channels, all states of it::

        h_t = a_t h_{t-1} + b_t          (reverse: h_t = a_t h_{t+1} + b_t)

    where ``a_t`` is a number, a complex number or a 2x2 block. It is given as a factor, not as a logarithm: it may be
    negative or complex, 0 is an exact reset and 1 keeps exactly. Factors close to 1 want fp32 (bf16 ends at 0.996).

    Args:
        a: factors: ``[B, T, D]``, or ``[D]`` when constant over time; complex ones as pairs ``[B, T, D, 2]`` or
            ``[D, 2]`` (the layout of `torch.view_as_real`); blocks ``[B, T, D, 2, 2]`` (row,
            column). Any floating dtype.
        b: inputs ``[B, T, D]``; pairs ``[B, T, D, 2]`` for complex factors and blocks.
        reverse: run from the last token of every sequence to its first; the state then comes in behind the last one and
            the returned state is that at the first.
        state: state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        chunk_size: tokens of a chunk of the PyTorch form; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton".

    Complex tensors may be given instead of pairs, and give complex states.

    Returns:
        ``h``, of b's shape and dtype, and ``ScanState(h)`` ``[N, D]`` or ``[N, D, 2]`` in fp32 (float64 for float64
        inputs). Differentiable in a, b and the state, and through the returned state.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: the recurrence of S5 (arXiv 2208.04933), HGRN (2311.04823) and RG-LRU (2402.19427); blocks as in ParaRNN
    (2510.21450).
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.is_complex() or b.is_complex()):
        pairs = [_as_pairs(x if x.is_complex() else torch.complex(x, torch.zeros_like(x))) for x in (a, b)]
        if isinstance(state, ScanState) and isinstance(state.h, Tensor) and state.h.is_complex():
            state = ScanState(_as_pairs(state.h))
        h, after = scan(*pairs, reverse=reverse, state=state, segments=segments, chunk_size=chunk_size,
                        backend=backend)  # fmt: skip
        return torch.view_as_complex(h), ScanState(torch.view_as_complex(after.h))
    shapes = Shapes(P=2)
    single = shapes("b", b, "B T D", "B T D P") == "B T D"
    layout = shapes("a", a, *(("B T D", "D") if single else ("B T D P", "D P", "B T D P P")))
    (b,) = common_dtype(b=b)
    check_floating("a", a, b.device)
    if not layout.startswith("B"):
        a = a.expand(*b.shape[:2], *a.shape)
    algebra = "real" if single else "block" if layout.endswith("P P") else "complex"
    return _run(algebra, a, b, reverse, state, segments, chunk_size, backend)


def minmax_scan(
    r: Tensor,
    s: Tensor,
    *,
    state: ScanState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ScanState]:
    """Memory cells of the (max, min) algebra, all states of them::

        x_t = max(min(x_{t-1}, r_t), s_t)

    Between the bounds a cell keeps its value, outside it takes the bound; the lower bound wins where they cross. Every
    operation is a selection, so every backend gives the same bits, and every gradient goes to exactly one input (on a
    tie to a bound, the lower one first). A NaN stays.

    Args:
        r: upper bounds ``[B, T, D]``; infinity keeps whatever is large.
        s: lower bounds ``[B, T, D]``.
        state: state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, D]`` inputs.
        chunk_size: tokens of a chunk of the PyTorch form.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton".

    Returns:
        ``x`` ``[B, T, D]`` in the inputs' dtype and ``ScanState(h [N, D])`` in fp32 (float64 for float64 inputs).
        Differentiable in r, s and the state, and through the returned state.

    Raises:
        ValueError: on shapes, dtypes or devices; the message names the argument.

    Source: MinMax recurrent neural cascades (arXiv 2605.06384).
    """
    shapes = Shapes()
    shapes("r", r, "B T D")
    shapes("s", s, "B T D")
    r, s = common_dtype(r=r, s=s)
    return _run("minmax", r, s, False, state, segments, chunk_size, backend)


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _run(
    algebra: str,
    a: Tensor,
    b: Tensor,
    reverse: bool,
    state: ScanState | None,
    segments: Segments | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, ScanState]:
    """A scan whose shapes fit: the initial state and the backend."""
    rows = check_segments(segments, b)
    acc = accumulate_dtype(b)
    if state is None:
        h = b.new_zeros(rows, *b.shape[2:], dtype=acc)
    else:
        h = check_state(state, rows, b.shape[2:], b.device).to(acc)
    name = resolve_backend(backend, backends(b), b)
    size = check_chunk_size(chunk_size, 0, power_of_two=False)  # 0 leaves the choice to the backend
    if name == "reference" or is_step(b, segments, backend):
        with no_autocast(b):
            y, h = reference.recurrent(algebra, a, b, h, reverse, segments)
        return y, ScanState(h)
    where = (None, None) if segments is None else (segments.cu_seqlens_host, segments.ids)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, h))
    y, h, _ = _scan(a, b, h, *where, algebra, reverse, size, name, training)
    return y, ScanState(h)


def is_step(x: Tensor, segments: Segments | None, backend: str) -> bool:
    """One token is one step of the recurrence: nothing to scan, and no registration overhead on the decode path."""
    return x.shape[1] == 1 and segments is None and backend == "auto"


def check_state(state: object, rows: int, tail: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensor of a ScanState ``[rows, *tail]``."""
    if not isinstance(state, ScanState):
        raise ValueError(f"state: expected a ScanState, got {type(state).__name__}")
    letters = ("N", "D", "S")[: 1 + len(tail)]
    Shapes(**dict(zip(letters, (rows, *tail), strict=True)))("state.h", state.h, " ".join(letters))
    check_floating("state.h", state.h, device)
    return state.h


# The registered op. What a minmax cell took (the kernels' note for the backward pass) is an empty tensor otherwise.


def backends(x: Tensor) -> tuple[str, ...]:
    """Those that have this dtype."""
    return BACKENDS if x.dtype in KERNEL_DTYPES else BACKENDS[:2]


def _forward(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    cu_host: Tensor | None,
    ids: Tensor | None,
    algebra: str,
    reverse: bool,
    chunk: int,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    taken = None
    if backend == "triton":
        from . import launch

        y, last, taken = launch.forward(algebra, a, b, h, ids, reverse, training)
    else:
        with torch.autocast(b.device.type, enabled=False):
            y, last = chunked.forward(algebra, a, b, h, cu_host, reverse, chunk)
    return y, last, b.new_empty(0, dtype=torch.uint8) if taken is None else taken


def _forward_fake(a, b, h, cu_host, ids, algebra, reverse, chunk, backend, training):
    noted = algebra == "minmax" and backend == "triton" and training
    taken = b.new_empty(b.shape if noted else 0, dtype=torch.uint8)
    return torch.empty_like(b, memory_format=torch.contiguous_format), h.new_empty(h.shape), taken


def _backward(
    a: Tensor,
    basis: Tensor,
    h: Tensor,
    cu_host: Tensor | None,
    ids: Tensor | None,
    algebra: str,
    reverse: bool,
    chunk: int,
    backend: str,
    wanted: bool,
    dy: Tensor,
    dh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from . import launch

        da, db, dh = launch.backward(algebra, a, basis, h, ids, reverse, dy, dh, wanted)
    else:
        with torch.autocast(dy.device.type, enabled=False):
            da, db, dh = chunked.backward(algebra, a, basis, h, cu_host, reverse, chunk, dy, dh)
    return a.new_empty(0) if da is None else da, db, dh


def _backward_fake(a, basis, h, cu_host, ids, algebra, reverse, chunk, backend, wanted, dy, dh):
    given = wanted or algebra == "minmax" or backend != "triton"
    return a.new_empty(a.shape if given else 0), dy.new_empty(dy.shape), h.new_empty(h.shape)


def _setup(ctx, inputs, output):
    a, b, h, cu_host, ids, *options, _ = inputs
    # The chunked form goes back from the inputs, the kernels from the states or, for minmax, from what was taken.
    basis = b if options[-1] != "triton" else output[2] if options[0] == "minmax" else output[0]
    ctx.save_for_backward(a, basis, h, cu_host, ids)
    ctx.options, ctx.like = options, (b.shape, b.dtype)
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, dy, dh, _):
    a, basis, h, *where = ctx.saved_tensors
    shape, dtype = ctx.like
    dy = h.new_zeros(shape, dtype=dtype) if dy is None else dy
    dh = torch.zeros_like(h) if dh is None else dh
    wanted = ctx.needs_input_grad[0]
    da, db, dh = run(a, basis, h, *where, *ctx.options, wanted, dy, dh)
    return da if wanted else None, db, dh, *(None,) * 7


_scan = differentiable(
    "scan",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(
    B: int,
    T: int,
    D: int,
    *,
    algebra: str = "real",
    itemsize: int = 2,
    gate_itemsize: int | None = None,
    backward: bool = False,
) -> Cost:
    """Floor of one call of :func:`scan` or :func:`minmax_scan`: every input read once, every output written once.

    ``algebra`` is "real", "complex", "block" or "minmax"; ``itemsize`` the bytes of an element of b, ``gate_itemsize``
    of a (the same when None). With ``backward``, of forward and backward together: factors, states and the output's
    gradient are read and two gradients written.
    """
    sizes = {"real": (1, 1, 2), "complex": (2, 2, 8), "block": (4, 2, 8), "minmax": (1, 1, 2)}
    if algebra not in sizes:
        raise ValueError(f"algebra: expected one of {sorted(sizes)}, got {algebra!r}")
    factors, channels, flops = sizes[algebra]
    gate = factors * (itemsize if gate_itemsize is None else gate_itemsize)
    moved = gate + 2 * channels * itemsize
    if backward:
        moved += 2 * gate + 3 * channels * itemsize
    state = 4 * B * D * channels
    return Cost(B * T * D * flops * (3 if backward else 1), B * T * D * moved + 2 * state, state)
