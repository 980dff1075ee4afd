"""M2RNN: a matrix state with a nonlinear transition. Definition, vectorised form, registration.

The state of every token is too much to keep, so the forward pass leaves one every few tokens, and the backward pass
runs from each to the next again before it goes back over them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

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
    differentiable,
    no_autocast,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype
from .chunked import by_row, by_time, make_plan, rows_in, rows_out

BACKENDS = ("reference", "chunked", "triton")
KEEP = 32  # tokens between the states that are kept for the backward pass


class M2RNNState(NamedTuple):
    """``S`` ``[N, H, K, V]`` in fp32, one row a sequence."""

    S: Tensor


def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    W: Tensor,
    *,
    clip: float | None = None,
    state: M2RNNState | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, M2RNNState]:
    """A recurrent network whose state is a matrix. Per head, with ``S`` ``[K, V]`` and ``f_t = exp(g_t)``::

        S_t = f_t S_{t-1} + (1 - f_t) tanh(S_{t-1} W + k_t v_t^T)          y_t = S_t^T q_t

    Args:
        q, k: ``[B, T, Hq, K]``; ``H`` must be a multiple of ``Hq`` (consecutive heads share a query and a key).
        v: ``[B, T, H, V]``.
        g: natural log of the forget gate ``[B, T, H]``, <= 0 (-inf forgets everything), fp32 advised.
        W: recurrent weights ``[H, V, V]``, the same for all rows of a state.
        clip: bound, entry by entry, of the gradient that a state receives from the tokens after it; None for none.
        state: the state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        backend: "auto", "reference" (token by token), "chunked" (PyTorch, the weight gradient deferred) or
            "triton" (one launch; V up to 256 in 16 bits, 128 in fp32).

    Returns:
        ``y`` ``[B, T, H, V]`` in v's dtype and the :class:`M2RNNState` after the last token in fp32 (float64 for
        float64 inputs). Differentiable in every floating argument and through the returned state.

    Raises:
        ValueError: on shapes, dtypes, devices, a positive ``g`` or ``clip`` <= 0; the message names the argument.

    Source: M2RNN (arXiv 2603.14360), eqs. of the cell and its backward pass; the clip is that of its kernel.
    """
    shapes = Shapes()
    shapes("q", q, "B T Hq K")
    shapes("k", k, "B T Hq K")
    shapes("v", v, "B T H V")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v: expected a multiple of q's {q.shape[2]} heads, got {v.shape[2]}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    shapes("g", g, "B T H")
    H, K, V = v.shape[2], q.shape[3], v.shape[3]
    Shapes(H=H, V=V)("W", W, "H V V")
    q, k, v, W = common_dtype(q=q, k=k, v=v, W=W)
    check_floating("g", g, q.device)
    check_log_decay("g", g)
    rows, acc = check_segments(segments, q), accumulate_dtype(q)
    if state is None:
        S = torch.zeros(rows, H, K, V, dtype=acc, device=q.device)
    else:
        if not isinstance(state, M2RNNState):
            raise ValueError(f"state: expected an M2RNNState, got {type(state).__name__}")
        Shapes(N=rows, H=H, K=K, V=V)("state.S", state.S, "N H K V")
        check_floating("state.S", state.S, q.device)
        S = state.S.to(acc)
    name = resolve_backend(backend, BACKENDS if _kernels_cover(q.dtype, V) else BACKENDS[:2], q)
    with no_autocast(q):
        if name == "reference" or (q.shape[1] == 1 and segments is None and backend == "auto"):
            bounds = None if segments is None else segments.cu_seqlens_host.tolist()
            y, S = _reference(q, k, v, g, W, S, clip, bounds)
        else:
            host = None if segments is None else segments.cu_seqlens_host
            training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, g, W, S))
            y, S, _ = _m2rnn(q, k, v, g, W, S, host, clip, name, training)
    return y, M2RNNState(S)


def _kernels_cover(dtype: torch.dtype, columns: int) -> bool:
    """Whether the Triton kernels have states of so many columns, whose weights one multiprocessor has to hold."""
    return dtype != torch.float64 and columns <= (128 if dtype == torch.float32 else 256)


class _ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        return grad.clamp(-ctx.bound, ctx.bound), None


def _run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, W: Tensor, S: Tensor, clip: float | None) -> tuple[Any, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        f, rest = g[:, t, :, None, None].exp(), -torch.expm1(g[:, t, :, None, None])
        S = f * S + rest * torch.tanh(S @ W + k[:, t, :, :, None] * v[:, t, :, None, :])
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
        S = S if clip is None else _ClipGradient.apply(S, clip)  # type: ignore[assignment]
    return outputs, S


def _reference(q, k, v, g, W, S, clip, bounds) -> tuple[Tensor, Tensor]:
    dtype, acc, groups = v.dtype, S.dtype, v.shape[2] // q.shape[2]
    q, k = (x.to(acc).repeat_interleave(groups, 2) for x in (q, k))
    v, g, W = v.to(acc), g.to(acc), W.to(acc)
    if bounds is None:
        outputs, S = _run(q, k, v, g, W, S, clip)
        return torch.stack(outputs, 1).to(dtype), S
    outputs, rows = [], []
    for n, (a, b) in enumerate(pairwise(bounds)):
        part, row = _run(q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b], W, S[n : n + 1], clip)
        outputs += part
        rows.append(row)
    return torch.stack(outputs, 1).to(dtype), torch.cat(rows)


# The vectorised form. Tokens in order of time, as in `chunked`.


def _advance(S: Tensor, f: Tensor, rest: Tensor, kv: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The state after a token, and its tanh."""
    Z = torch.tanh(S @ W + kv)
    return f * S + rest * Z, Z


def _spans(counts: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """The tokens in groups of KEEP positions: number of running sequences at the first of a group, and where each
    position's tokens begin and end."""
    ends, total = [], 0
    for n in counts:
        ends.append((total, total + n))
        total += n
    return [(counts[i], ends[i : i + KEEP]) for i in range(0, len(counts), KEEP)]


def _unpack(plan: Any, acc: torch.dtype, heads: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    groups = heads // q.shape[2]
    q, k = (by_time(x, plan).to(acc).repeat_interleave(groups, 1) for x in (q, k))
    v, g = by_time(v, plan).to(acc), by_time(g, plan).to(acc)[..., None, None]
    return q, k, v, g.exp(), -torch.expm1(g)


def kept_states(batch: int, length: int, cu_host: Tensor | None) -> int:
    """Room for the states that a training call keeps: of every sequence one every KEEP tokens."""
    return batch * -(-length // KEEP) if cu_host is None else length // KEEP + cu_host.shape[0] - 1


def _chunked_forward(q, k, v, g, W, S, cu_host, training) -> tuple[Tensor, Tensor, Tensor]:
    plan, shape, dtype = make_plan(q.shape[0], q.shape[1], cu_host, q.device), v.shape, v.dtype
    q, k, v, f, rest = _unpack(plan, S.dtype, v.shape[2], q, k, v, g)
    W, (S,) = W.to(S.dtype), rows_in((S,), plan)
    outputs, kept = [], []
    for running, span in _spans(plan.counts):
        if training:
            kept.append(S[:running].clone())
        for a, b in span:
            now, _ = _advance(S[: b - a], f[a:b], rest[a:b], k[a:b, :, :, None] * v[a:b, :, None, :], W)
            outputs.append((now * q[a:b, :, :, None]).sum(-2))
            S = now if b - a == len(S) else torch.cat([now, S[b - a :]])
    room = S.new_empty(kept_states(shape[0], shape[1], cu_host) if training else 0, *S.shape[1:])
    if training:
        torch.cat(kept, out=room[: sum(map(len, kept))])
    return by_row(torch.cat(outputs).to(dtype), plan, shape), rows_out((S,), plan)[0].clone(), room


def _chunked_backward(q, k, v, g, W, cu_host, clip, kept, dy, dS) -> tuple[Tensor, ...]:
    plan, acc, H = make_plan(q.shape[0], q.shape[1], cu_host, q.device), kept.dtype, v.shape[2]
    inputs, shapes = (q, k, v, g, W), [x.shape for x in (q, k, v, g)]
    q, k, v, f, rest = _unpack(plan, acc, H, q, k, v, g)
    dy, W, (dS,) = by_time(dy, plan).to(acc), W.to(acc), rows_in((dS,), plan)
    dq, dk, dv, dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(f[..., 0, 0])
    spans = _spans(plan.counts)
    dW, end = torch.zeros_like(W), sum(running for running, _ in spans)
    for running, span in reversed(spans):
        begin, stop = span[0][0], span[-1][1]
        S, before, tanh = kept[end - running : end], [], []
        end -= running
        for a, b in span:
            before.append(S[: b - a])
            S, Z = _advance(S[: b - a], f[a:b], rest[a:b], k[a:b, :, :, None] * v[a:b, :, None, :], W)
            tanh.append(Z)
        old, Z = torch.cat(before), torch.cat(tanh)
        part = slice(begin, stop)
        new = f[part] * old + rest[part] * Z
        dq[part] = (new * dy[part][:, :, None, :]).sum(-1)
        direct, slope = q[part][..., None] * dy[part][:, :, None, :], rest[part] * (1 - Z.square())
        change, dX = old - Z, torch.empty_like(Z)
        for a, b in reversed(span):
            i, j, n = a - begin, b - begin, b - a
            now = dS[:n] if clip is None else dS[:n].clamp(-clip, clip)
            now = now + direct[i:j]
            dg[a:b] = (now * change[i:j]).sum((-1, -2))
            dX[i:j] = now * slope[i:j]
            now = f[a:b] * now + dX[i:j] @ W.transpose(1, 2)
            dS = now if n == len(dS) else torch.cat([now, dS[n:]])
        dk[part], dv[part] = (dX * v[part][:, :, None, :]).sum(-1), (dX * k[part][..., None]).sum(-2)
        dW += torch.einsum("nhkv,nhku->hvu", old, dX)
    groups = H // shapes[0][2]
    dq, dk = (x.unflatten(1, (-1, groups)).sum(2) for x in (dq, dk))
    grads = (dq, dk, dv, dg * f[..., 0, 0])
    found = [by_row(d, plan, s).to(x.dtype) for d, s, x in zip(grads, shapes, inputs, strict=False)]
    return *found, dW.to(inputs[-1].dtype), rows_out((dS,), plan)[0].clone()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    W: Tensor,
    S: Tensor,
    cu_host: Tensor | None,
    clip: float | None,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(q):
        if backend == "triton":
            from . import launch_m2rnn

            return launch_m2rnn.forward(q, k, v, g, W, S, cu_host, training)
        return _chunked_forward(q, k, v, g, W, S, cu_host, training)


def _forward_fake(q, k, v, g, W, S, cu_host, clip, backend, training):
    kept = S.new_empty(kept_states(q.shape[0], q.shape[1], cu_host) if training else 0, *S.shape[1:])
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(S), kept


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    W: Tensor,
    cu_host: Tensor | None,
    clip: float | None,
    backend: str,
    kept: Tensor,
    dy: Tensor,
    dS: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(q):
        if backend == "triton":
            from . import launch_m2rnn

            return launch_m2rnn.backward(q, k, v, g, W, cu_host, clip, kept, dy, dS)  # type: ignore[return-value]
        return _chunked_backward(q, k, v, g, W, cu_host, clip, kept, dy, dS)  # type: ignore[return-value]


def _backward_fake(q, k, v, g, W, cu_host, clip, backend, kept, dy, dS):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, W, dS))


def _setup(ctx, inputs, output):
    q, k, v, g, W, _, cu_host, clip, backend, _ = inputs
    ctx.save_for_backward(q, k, v, g, W, cu_host, output[-1])
    ctx.options = clip, backend


def _gradients(run, ctx, dy, dS, _):
    *given, kept = ctx.saved_tensors
    grads = run(*given, *ctx.options, kept, dy.contiguous(), dS.contiguous())
    return *grads, None, None, None, None


_m2rnn = differentiable(
    "m2rnn",
    _forward,
    _backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup=_setup,
    gradients=_gradients,
)


def cost(
    B: int, T: int, H: int, K: int, V: int, *, query_heads: int | None = None, itemsize: int = 2, backward: bool = False
) -> Cost:
    """Floor of one call: q, k, v and the gate (fp32) read once, y written once. With ``backward``, of both passes: the
    inputs and the output's gradient are read and the inputs' gradients written; the states are run through again."""
    shared = 2 * (H if query_heads is None else query_heads) * K * itemsize
    inputs, outputs, state = shared + H * V * itemsize + 4 * H, H * V * itemsize, 4 * B * H * K * V
    moved = inputs + outputs + (2 * inputs + outputs if backward else 0)
    flops = H * (2 * K * V * V + 6 * K * V)
    return Cost(B * T * flops * (4 if backward else 1), B * T * moved + 2 * state + H * V * V * itemsize, state)
