"""Forward and backward of a call of the decay kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.compiling import Kernel, compile_together, compiling
from . import kernels_around
from .launch_walks import Call, State, line
from .settings import EXACT, ceil_div, gradients_together, launch_settings, power_of_2

__all__ = ["State", "backward", "forward"]

gate_kernel = Kernel(kernels_around.gate_kernel)
_compiled: set[Any] = set()


def _append(x: Tensor, channel: Tensor) -> Tensor:
    return torch.cat([x, channel[..., None]], -1)


def _joined(state: State) -> State:
    return State(_append(state.S, state.z), None)  # type: ignore[arg-type]


def _apart(state: State) -> State:
    return State(state.S[..., :-1].contiguous(), state.S[..., -1].contiguous())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    state: State,
    floor: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    eps: float,
    piece: int,
    pieces: int,
    training: bool,
) -> tuple[Tensor, Tensor | None, State, State | None]:
    """Reading, normaliser ``[H, tokens]``, final state and, when ``training``, the boundary states that the backward
    pass starts from, of all pieces and behind them those after every sequence."""
    if state.z is not None and q.dtype == EXACT:
        given = (q, k, _append(v, v.new_ones(v.shape[:3])), g, gv, u, w, _joined(state), None, cu_host, scale, eps)
        o, _, last, kept = forward(*given, piece, pieces, training)
        o, x = o[..., :-1], o[..., -1]
        den = (x if floor is None else torch.maximum(x.abs(), floor)) + eps
        return o / den[..., None], line(x), _apart(last), None if kept is None else _apart(kept)
    if q.is_cuda and not compiling():
        _compile((q, k, v, g, gv, u, w), state, floor, cu_host, scale, eps, piece, pieces, training)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    S, z = (None if x is None else x.contiguous() for x in state)
    w, floor = line(w), line(floor)
    call = Call(q, v, g, gv, u, cu_host, scale, piece)
    x = z_bounds = z_last = None
    norm: dict[str, Any] = {}
    if z is not None:
        x, over, z_bounds, z_last = call.normaliser(q, k, w, z, floor, eps, pieces)
        norm = {"x": over, "norm": 1}
    q, k, own = call.prepare(call.key, q, k, u=call.u, own=u is not None)  # type: ignore[assignment]
    _, payload, _ = call.prepare(call.value, None, v)
    o = v.new_empty(v.shape)
    apart = own is not None and call.value is not None
    pair: dict[str, Any] = {"diag": 1} if apart else {"diag": 0 if own is None else 2, "own": own}
    pair["pairs"], _ = call.pair(q, k, norm.get("x"), w)
    bounds, last = call.read_along(q, k, payload, S, pieces, keep=training, out=o, ws=w, **norm, **pair)  # type: ignore
    if call.value is not None:
        call.read(call.value, o, v, own)
    kept = State(bounds, z_bounds) if training and bounds is not None else None
    for states, end in zip(kept or (), (last, z_last), strict=False):
        if states is not None:
            states[-call.rows :].copy_(end)
    return o, x, State(last, z_last), kept


def _compile(
    inputs: tuple[Tensor | None, ...],
    state: State,
    floor: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    eps: float,
    piece: int,
    pieces: int,
    training: bool,
) -> None:
    """Before the first call of its kind, compile what such a call launches, forward and backward, together: on tensors
    without memory, for which `new_empty` costs nothing and `empty_like` imports half of PyTorch."""
    kinds = tuple(None if x is None else (x.dtype, x.shape[2:], x.stride(0) == 0) for x in (*inputs, *state, floor))
    q = inputs[0]
    assert q is not None
    kind = q.device, kinds, cu_host is None, q.shape[1] % 64 == 0, piece, training
    if kind in _compiled:
        return
    _compiled.add(kind)

    def like(x: Tensor | None) -> Any:
        return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    given, ends, low = [like(x) for x in inputs], State(*map(like, state)), like(floor)

    def call() -> None:
        o, x, last, bounds = forward(*given, ends, low, cu_host, scale, eps, piece, pieces, training)
        if bounds is not None:
            do = o.new_empty(o.shape)
            backward(*given, low, cu_host, scale, eps, piece, o, x, bounds, do, last, True)

    compile_together(call)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    w: Tensor | None,
    floor: Tensor | None,
    cu_host: Tensor | None,
    scale: float,
    eps: float,
    piece: int,
    o: Tensor | None,
    x: Tensor | None,
    bounds: State,
    do: Tensor,
    d_state: State,
    gates: bool,
    own_value: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients by input name, from those of the reading ``o`` and of the final state. ``gates`` says whether any
    of the gates, the bonus and the write weight wants one, ``own_value`` the weight of each token's own pair in the
    gradients of q and k, made here when None."""
    if x is not None and o is not None and q.dtype == EXACT:
        x = x.view(-1, *q.shape[:2]).permute(1, 2, 0)
        den = (x if floor is None else torch.maximum(x.abs(), floor)) + eps
        do = do / den[..., None]
        centre = o if floor is None else o * (x.sign() * (x.abs() > floor))[..., None]
        dx = -(do * centre).sum(-1)
        own = None
        if u is not None or (g is not None and g.dim() == 4):  # not as a difference of sums: may be all that is read
            own = (do * (v - centre)).sum(-1).contiguous()
        given = (q, k, _append(v, v.new_ones(v.shape[:3])), g, gv, u, w, None, cu_host, scale, eps, piece, None, None)
        found = backward(*given, _joined(bounds), _append(do, dx), _joined(d_state), gates, own)
        d_first = _apart(State(found["S"], None))
        return found | {"v": found["v"][..., :-1], "S": d_first.S, "z": d_first.z}  # type: ignore[dict-item]
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    w, floor = line(w), line(floor)
    call = Call(q, v, g, gv, u, cu_host, scale, piece)
    H, K, V, pieces = call.H, call.K, call.V, len(bounds.S) - call.rows
    gates = gates and any(x is not None for x in (g, gv, u, w))
    new = bounds.S.new_empty

    lw = dx = dz = None  # by what the late tokens are weighted, the normaliser's gradient over that, and that gradient
    divided: dict[str, Any] = {}
    if x is not None:
        lw, dx, dz = (x.new_empty(x.shape) for _ in range(3))
        if call.stored:
            call.divide(x, floor, eps, lw, dx, dz, do, o)
        else:  # the dv pass, which has the readings' gradients on chip, multiplies them by the readings
            call.divide(x, floor, eps, lw, None, None)
            blocks = ceil_div(V, launch_settings(K, V, call.chunk, q.dtype, False)["BP"])
            divided = {"grad": 3, "dot": o, "col": new(blocks, H, call.tokens)}

    # Where gates lie between tokens channel by channel, or reading is exclusive, a token's own pair goes apart.
    key_apart, value_apart = call.key is not None or u is not None, call.value is not None
    late, early, own = call.prepare(call.key, q, k, u=call.u, own=u is not None or value_apart)
    d_late, values, prepared = call.prepare(call.value, do, v, own=value_apart)
    own_value, asked = prepared if own_value is None else own_value, None
    if own_value is None and key_apart:
        own_value = asked = new(call.B, call.T, H)  # by the dq pass
    dk, dv = v.new_empty(*v.shape[:3], K), v.new_empty(v.shape)
    # Unrounded where the gradient of a value gate is summed from it: rounding errors add up along a piece.
    dv_pass = dv.new_empty(dv.shape, dtype=torch.float32) if value_apart else dv
    scalar = gates and call.key is None and call.value is None and (g is not None or w is not None)
    row = col = pair_row = pair_col = None
    if scalar:
        # Partial sums for each block of the payload's channels: of late tokens by the dq pass, of early ones by the dk
        # pass and, over pairs within chunks, by the dq pass; pairs that are stored have theirs in one.
        blocks = ceil_div(K, launch_settings(V, K, call.chunk, q.dtype, True)["BP"])
        row = new(blocks + int(call.stored), H, call.tokens)
        col = new(blocks + (1 if call.stored else blocks), H, call.tokens)
        pair_row, pair_col = row[blocks:], col[blocks:]
    pairs, d_pairs = call.pair(q, k, lw, w, do=do, v=v, dx=dx, row=pair_row, col=pair_col)

    dv_own: dict[str, Any] = {"diag": 1} if value_apart else {"diag": 0 if own is None else 2, "own": own}
    constant = g is None or (call.gate is not None and call.gate.seen is None)
    together = constant and not scalar and all(y is None for y in (gv, u, w, x))
    together = together and gradients_together(K, V, q.dtype)
    if together:
        divided = {"beside": v, "turned": dk}
    # Only a dk pass of its own starts from the boundary states, and gradients of gates, which are not ``together``.
    d_bounds, d_first = call.read_along(
        *(early, late, d_late, d_state.S, pieces),
        keep=not together,
        reverse=True,
        pairs=pairs,
        out=dv_pass,
        wr=w,
        ws=lw,
        **dv_own,
        **divided,
    )
    dz_bounds = dz_first = None
    if x is not None and lw is not None and dz is not None and d_state.z is not None:
        if divided:
            call.divide(x, floor, eps, lw, dx, dz, part=divided["col"])
        dz_bounds, dz_first = call.sum_keys(q, dz, d_state.z, pieces, reverse=True)
    norm = 0 if x is None else 2
    keys: dict[str, Any] = {"transposed": True, "split": True, "pairs": d_pairs, "diag": int(key_apart)}
    keys |= {"norm": norm, "x": dx}
    if not together:
        call.walk(
            values,
            d_late,
            late,
            start=d_bounds,
            z=dz_bounds,
            out=dk,
            grad=2 * int(scalar),
            dot=k if scalar else None,
            col=col,
            reverse=True,
            wr=w,
            ws=lw,
            **keys,
        )
    if not (scalar or key_apart or value_apart):  # where the gradient of the queries has room
        d_bounds = None
    dq = v.new_empty(dk.shape)
    call.walk(
        d_late,
        values,
        early,
        start=bounds.S,
        z=bounds.z,
        out=dq,
        wr=lw,
        ws=w,
        own=asked,
        grad=int(scalar),
        dot=q if scalar else None,
        row=row,
        col=pair_col,
        **keys,
    )

    found: dict[str, Tensor | None] = {}
    sides = (bounds.S, d_bounds, d_first, bounds.z, dz_bounds, dz_first)
    if key_apart:
        dg = call.key.values.new_empty(call.key.values.shape) if gates and call.key is not None else None
        du = new(pieces, H, K) if gates and u is not None else None
        call.finish(call.key, q, k, dq, dk, dk, own_value, by_key=True, dg=dg, du=du, sides=sides)  # type: ignore[arg-type]
        found = {"g": dg, "u": None if du is None or u is None else du[: call.pieces].sum(0).to(u.dtype)}
    if call.value is not None:  # the late tokens of a value gate are those of the reading, whose pairs are walked again
        o = v.new_empty(v.shape)
        call.walk(late, early, values, split=True, start=bounds.S, out=o, diag=1)
        dgv = call.value.values.new_empty(call.value.values.shape)
        call.finish(call.value, do, v, o, dv_pass, dv, own, by_key=False, dg=dgv, du=None, sides=sides)  # type: ignore[arg-type]
        found["gv"] = dgv
    heads = q.shape[2]
    if heads != H:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3) for x in (dq, dk))
    found |= {"q": dq, "k": dk, "v": dv, "S": d_first, "z": dz_first}
    if scalar:
        found["g"] = None if g is None else torch.empty(g.shape, dtype=g.dtype, device=g.device)
        found["w"] = None if w is None else new(call.B, call.T, H, dtype=w.dtype)
        gate_kernel[(call.pieces * H,)](
            row,
            col,
            w,
            *sides,
            found["g"],
            found["w"],
            call.cu,
            call.table,
            call.T,
            call.tokens,
            call.piece,
            pieces,
            H,
            K * V,
            K,
            0 if row is None else len(row),
            0 if col is None else len(col),
            LENGTH=power_of_2(call.piece),
            C=call.chunk,
            BLOCK=4096,
            WS=w is not None,
            GATED=g is not None,
            NORM=x is not None,
            BONUS=u is not None,
            PACKED=call.packed,
            num_warps=8,
        )
    return {name: x for name, x in found.items() if x is not None}
