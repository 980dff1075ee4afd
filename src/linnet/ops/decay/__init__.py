"""Engine `decay`: a matrix state per head with an elementwise (diagonal) decay and a rank-one write.

Serves linear attention, RetNet, Lightning, GLA, Mamba-2, HGRN-2, RWKV-6, GSA and the mLSTM; they differ only in which
gates they pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import (
    Cost,
    Segments,
    Shapes,
    check_floating,
    check_log_decay,
    check_number,
    check_segments,
    common_dtype,
    concrete,
    differentiable,
    resolve_backend,
)
from ..core.chunks import accumulate_dtype, chunk_length
from ..core.registry import KERNEL_DTYPES
from . import chunked, reference, settings
from .mlstm import MLSTMState, mlstm
from .state import DecayState

__all__ = ["DecayState", "MLSTMState", "cost", "decay", "mlstm"]

BACKENDS = ("reference", "chunked", "triton")


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    u: Tensor | None = None,
    w: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-10,
    state: DecayState | None = None,
    segments: Segments | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, DecayState]:
    """Linear attention with a diagonal decay. Per head, with ``S`` a matrix ``[K, V]``::

        S_t = diag(exp g_t) S_{t-1} diag(exp gv_t) + w_t k_t v_t^T
        o_t = scale * S_t^T q_t                                          (inclusive reading, u = None)
        o_t = scale * (S_{t-1} + diag(u) w_t k_t v_t^T)^T q_t            (exclusive reading with bonus, RWKV-6)

    and with ``normalize`` additionally ``z_t = exp(g_t) z_{t-1} + w_t k_t``, ``o_t / (scale * q_t.z_t + eps)``.

    Args:
        q, k: ``[B, T, Hq, K]``; ``H`` must be a multiple of ``Hq`` (consecutive value heads share a query/key head).
        v: ``[B, T, H, V]``.
        g: natural log of the key-side decay, <= 0 (-inf is a hard reset): None, constant ``[H]``, scalar
            ``[B, T, H]`` or a vector over the key channels ``[B, T, H, K]``. fp32 is advised whatever q's dtype.
        gv: natural log of the value-side decay ``[B, T, H, V]``, <= 0.
        u: bonus of the current token ``[H, K]``; switches to the exclusive reading.
        w: write weight ``[B, T, H]`` (an input gate or a step size), 1 when None.
        scale: factor of the reading; ``K ** -0.5`` when None.
        normalize: divide by the decayed sum of keys (needs positive features; not defined with ``gv``).
        eps: added to the normaliser.
        state: state before the first token, zeros when None; one row a sequence, or a segment.
        segments: packing of ``[1, total, ...]`` inputs.
        chunk_size: tokens processed together, a power of two; never changes the result beyond rounding.
        backend: "auto", "reference" (token by token), "chunked" (vectorised PyTorch) or "triton" (K and V up to 512,
            not float64).

    Returns:
        ``o`` ``[B, T, H, V]`` in v's dtype, and ``DecayState(S [N, H, K, V], z [N, H, K] | None)`` in fp32 (float64
        for float64 inputs). Differentiable in every floating argument and through the returned state.

    Raises:
        ValueError: on shapes, dtypes, devices or a positive log-decay; the message names the argument.

    Source: GLA (arXiv 2312.06635) eqs. 3-6; exclusive reading RWKV-6 (2404.05892); write weight: the step size of
    Mamba-2 (2405.21060) and the input gate of the mLSTM (2405.04517).
    """
    if normalize and gv is not None:
        raise ValueError("normalize: expected False with gv (a value-side decay has no matching key sum), got True")
    q, k, v, g, gv, u, w, S, z, scale = _check(q, k, v, g, gv, u, w, scale, normalize, state, segments)
    eps = check_number("eps", eps, 0.0)
    o, S, z = run(q, k, v, g, gv, u, w, S, z, None, segments, scale, eps, chunk_size, backend)
    return o, DecayState(S, z)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    floor: Tensor | None,
    segments: Segments | None,
    scale: float,
    eps: float,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The engine behind :func:`decay` and :func:`mlstm`, on checked inputs. With ``z`` the reading is divided by
    ``x + eps``, or with ``floor`` ``[B, T, H]`` by ``max(|x|, floor) + eps``, where ``x = scale * q.z``."""
    name = resolve_backend(backend, BACKENDS if kernels_cover(q, v, z is not None) else BACKENDS[:2], q)
    size = chunk_length(chunk_size, 64, q.shape[1], name)
    host = None if segments is None else segments.cu_seqlens_host
    given = (q, k, v, g, gv, u, w, S, z)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    step = q.shape[1] == 1 and segments is None and backend == "auto"  # nothing to chunk or to register
    if step and name == "triton" and not training and concrete(q):
        from . import launch, launch_step

        o, (S, z) = launch_step.step(q, k, v, g, gv, u, w, launch.State(S, z), floor, scale, eps)
        return o, S, z
    if name == "reference" or step:
        bounds = None if segments is None else segments.cu_seqlens_host.tolist()
        o, x, S, z = reference.recurrent(q, k, v, g, gv, u, w, scale, S, z, bounds)
        return o if x is None else (o / _denominator(x, floor, eps)).to(o.dtype), S, z
    vector = u is not None or gv is not None or (g is not None and g.dim() == 4)
    if name == "triton" and w is not None and vector:  # those kernels know no write weight
        k, w = (k.unflatten(2, (-1, 1)) * w.to(k.dtype).unflatten(2, (k.shape[2], -1))[..., None]).flatten(2, 3), None
        q = q if q.shape[2] == k.shape[2] else q.repeat_interleave(k.shape[2] // q.shape[2], 2)
    if name == "triton" and gv is not None and g is not None and g.dim() == 3:
        g, gv = None, gv + g[..., None]  # a scalar decays every value channel alike
    given = (q, k, v, g, gv, u, w, S, z)
    o, _, S, z_out, *_ = _decay(*given, floor, host, scale, eps, size, name, training)
    return o, S, None if z is None else z_out


def kernels_cover(q: Tensor, v: Tensor, normalised: bool = False) -> bool:
    """Whether the Triton kernels take this call; the chunked PyTorch form takes the others."""
    extra = int(normalised and q.dtype == torch.float32)  # the normaliser is one more channel there
    return q.dtype in KERNEL_DTYPES and max(q.shape[-1], v.shape[-1] + extra) <= 512


def _denominator(x: Tensor, floor: Tensor | None, eps: float) -> Tensor:
    return ((x if floor is None else torch.maximum(x.abs(), floor)) + eps)[..., None]


def _pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    z: Tensor | None,
    cu_host: Tensor | None,
) -> tuple[int, int]:
    """Tokens between two boundary states kept for the backward pass, and how many of them a call has at most: enough
    tokens that the states stay below a tenth of the activations, fewer when the pieces are needed to fill the GPU."""
    B, T, H, K, V = *q.shape[:2], v.shape[2], q.shape[3], v.shape[3]
    if q.dtype == torch.float32:  # for accuracy: the gates' gradient is a running sum that starts afresh at each piece
        return 16, B * -(-T // 16) if cu_host is None else T // 16 + cu_host.shape[0] - 1
    if settings.gradients_together(K, V, q.dtype) and all(x is None for x in (g, gv, u, w, z, cu_host)):
        # Nothing starts afresh at the boundaries, and small heads take long to store them. The queries' gradient walks
        # pieces: not where an H100, of 132 multiprocessors, would wait for the last of pieces so long.
        pieces = B * -(-T // 8192)
        if B * H >= 96 and 5 * pieces * H >= 4 * 132 * -(-pieces * H // 132):
            return 8192, pieces
    piece = 512 if K * V <= 8192 else 1024 if K * V <= 32768 else 2048
    if gv is not None or (g is not None and g.dim() == 4):  # the running sum of a vector gate has no exact pairs
        piece = min(piece, 512)
    while piece > 128 and (B * T // piece) * H * max(1, V // 64) < 264:
        piece //= 2
    return piece, B * -(-T // piece) if cu_host is None else T // piece + cu_host.shape[0] - 1


def _check(q, k, v, g, gv, u, w, scale, normalize, state, segments):
    """Shapes, dtypes, signs; broadcasts a constant decay and makes the initial state."""
    shapes = Shapes()
    shapes("q", q, "B T Hq K")
    shapes("k", k, "B T Hq K")
    shapes("v", v, "B T H V")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v: expected a multiple of q's {q.shape[2]} heads, got {v.shape[2]}")
    q, k, v = common_dtype(q=q, k=k, v=v)
    rows = check_segments(segments, q)
    layouts = {"g": ("H", "B T H", "B T H K"), "gv": ("B T H V",), "u": ("H K",), "w": ("B T H",)}
    for (name, layout), x in zip(layouts.items(), (g, gv, u, w), strict=True):
        if x is None:
            continue
        shapes(name, x, *layout)
        check_floating(name, x, q.device)
        if name in ("g", "gv"):
            check_log_decay(name, x)
    if g is not None and g.dim() == 1:
        g = g.expand(q.shape[0], q.shape[1], -1)
    acc = accumulate_dtype(q)
    H, K, V = v.shape[2], q.shape[3], v.shape[3]
    if state is None:
        S = torch.zeros(rows, H, K, V, dtype=acc, device=q.device)
        z = torch.zeros(rows, H, K, dtype=acc, device=q.device) if normalize else None
    else:
        if not isinstance(state, DecayState):
            raise ValueError(f"state: expected a DecayState, got {type(state).__name__}")
        if (state.z is None) == normalize:
            raise ValueError(f"state: expected z {'given' if normalize else 'None'} with normalize={normalize}")
        state_shapes = Shapes(N=rows, H=H, K=K, V=V)
        state_shapes("state.S", state.S, "N H K V")
        check_floating("state.S", state.S, q.device)
        S, z = state.S.to(acc), None
        if state.z is not None:
            state_shapes("state.z", state.z, "N H K")
            check_floating("state.z", state.z, q.device)
            z = state.z.to(acc)
    return q, k, v, g, gv, u, w, S, z, check_number("scale", K**-0.5 if scale is None else scale)


# The registered op. Optional tensors cannot be returned, so an absent one is an empty tensor.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    floor: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    eps: float,
    chunk: int,
    backend: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reading, normaliser, final S and z, and the boundary states (S, z) that the kernels' backward pass starts from;
    the chunked form, which has none, keeps the reading in the accumulation dtype in their place."""
    edges = z_edges = None
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from . import launch

            given = (q, k, v, g, gv, u, w, launch.State(S, z), floor, cu_host, scale, eps)
            o, x, (S_out, z_out), bounds = launch.forward(*given, *_pieces(*given[:7], z, cu_host), training)
            if bounds is not None:
                edges, z_edges = bounds
        else:
            o, x, S_out, z_out = chunked.forward(q, k, v, g, gv, u, w, S, z, cu_host, scale, chunk)
            if x is not None:
                o = o / _denominator(x, floor, eps)
                edges = o if training and o.dtype != v.dtype else None
            o = o.to(v.dtype)
    absent = (S.new_empty(0) if y is None else y for y in (x, S_out, z_out, edges, z_edges))
    return o, *absent  # type: ignore[return-value]


def _forward_fake(q, k, v, g, gv, u, w, S, z, floor, cu_host, scale, eps, chunk, backend, training):
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    none, kept = S.new_empty(0), backend == "triton" and training
    piece, pieces = _pieces(q, k, v, g, gv, u, w, z, cu_host)
    line = (v.shape[2], v.shape[0] * v.shape[1]) if backend == "triton" else v.shape[:3]
    x, z_out = (none, none.clone()) if z is None else (S.new_empty(line), S.new_empty(z.shape))
    edges = S.new_empty(pieces + S.shape[0], *S.shape[1:]) if kept else none.clone()
    if backend == "chunked" and training and z is not None and S.dtype != v.dtype:
        edges = S.new_empty(v.shape)
    sums = pieces * (piece // settings.chunk_length(q.dtype))  # at the boundaries of chunks
    z_edges = z.new_empty(sums + z.shape[0], *z.shape[1:]) if kept and z is not None else none.clone()
    return o, x, S.new_empty(S.shape), z_out, edges, z_edges


_GRADS = ("q", "k", "v", "g", "gv", "u", "w", "S", "z")


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    z: Tensor | None,
    floor: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    eps: float,
    chunk: int,
    backend: str,
    o: Tensor | None,
    x: Tensor | None,
    edges: Tensor,
    z_edges: Tensor | None,
    gates: bool,
    do: Tensor,
    dS: Tensor,
    dz: Tensor | None,
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from .launch import State, backward

            given = (q, k, v, g, gv, u, w)
            given = (*given, floor, cu_host, scale, eps, _pieces(*given, z, cu_host)[0])
            grads = backward(*given, o, x, State(edges, z_edges), do, State(dS, dz), gates)
        else:
            dx = None
            if x is not None and o is not None:  # o = num / den
                o = edges if edges.numel() else o
                do = do.to(x.dtype) / _denominator(x, floor, eps)
                dx = -(do * o).sum(-1)
                dx = dx if floor is None else dx * x.sign() * (x.abs() > floor)
            grads = chunked.backward(q, k, v, g, gv, u, w, S, z, cu_host, scale, chunk, do, dx, dS, dz)
    none = S.new_empty(0)
    return [grads[name].contiguous() if name in grads else none.clone() for name in _GRADS]


def _backward_fake(q, k, v, g, gv, u, w, S, z, *_):
    given = (q, k, v, g, gv, u, w, S, z)
    return [S.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format) for y in given]


def _setup(ctx, inputs, output):
    *tensors, scale, eps, chunk, backend, _ = inputs
    o, x, _, _, edges, z_edges = output
    o, x, z_edges = (None, None, None) if tensors[8] is None else (o, x, z_edges)
    ctx.save_for_backward(*tensors, o, x, edges, z_edges)
    ctx.options = scale, eps, chunk, backend
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, do, _dx, dS, dz, *_):
    *given, floor, cu_host, o, x, edges, z_edges = ctx.saved_tensors
    q, v, S, z = given[0], given[2], given[7], given[8]
    do = v.new_zeros(*q.shape[:2], *v.shape[2:]) if do is None else do.contiguous()
    dS = torch.zeros_like(S) if dS is None else dS.contiguous()
    if z is None:
        dz = None
    else:
        dz = torch.zeros_like(z) if dz is None else dz.contiguous()
    gates = any(ctx.needs_input_grad[_GRADS.index(name)] for name in ("g", "gv", "u", "w"))
    grads = run(*given, floor, cu_host, *ctx.options, o, x, edges, z_edges, gates, do, dS, dz)
    wanted = zip(grads, given, ctx.needs_input_grad[: len(given)], strict=True)
    return *(d if needed and y is not None else None for d, y, needed in wanted), *(None,) * 7


_decay = differentiable(
    "decay",
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
    H: int,
    K: int,
    V: int,
    *,
    gate: str = "scalar",
    query_heads: int | None = None,
    itemsize: int = 2,
    chunk: int = 64,
    backward: bool = False,
) -> Cost:
    """Floor of one call: each input read once, each output written once, the state kept on chip.

    ``gate`` is "none", "constant", "scalar" or "vector" (fp32 scalar, ``itemsize`` vector); ``itemsize`` the bytes of
    q, k, v. With ``backward``, of forward and backward together: q, k, v and the output's gradient are read again and
    the gradients written (specific arithmetic: 2.5 times the forward's for the backward).
    """
    Hq = H if query_heads is None else query_heads
    gates = {"none": 0, "constant": 0, "scalar": 4 * H, "vector": itemsize * H * K}
    if gate not in gates:
        raise ValueError(f"gate: expected one of {sorted(gates)}, got {gate!r}")
    qk, values, gate_bytes = 2 * Hq * K * itemsize, H * V * itemsize, gates[gate]
    moved = qk + 2 * values + gate_bytes
    if backward:  # again q, k, v, gate and do; dq, dk, dv, dgate
        moved += 2 * (qk + values + gate_bytes) + values
    flops = H * (4 * K * V + chunk * (K + V))
    state = B * H * K * V * 4
    return Cost(int(B * T * flops * (3.5 if backward else 1)), B * T * moved + 2 * state, state)


from . import cases as _cases  # noqa: E402,F401  (registers the op and its sample inputs)
