"""The cells in PyTorch, one batched product and one pointwise step a token; forward and hand-written backward.

The backward pass walks the tokens once and does as little there as it can. What depends on the forward pass alone is
worked out beforehand, for many tokens at a time: the pre-activations, rebuilt from the states with one product, and the
derivatives ``J_t`` of the cell, channel by channel a small matrix. Back in time there remains

    dS_t <- dS_t + dy_t        (da_t, dS_{t-1}) = J_t^T dS_t        dh_{t-1} <- dh_{t-1} + da_t R^T

and the gradients of the weights are products over all tokens at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.chunks import accumulate_dtype
from .cells import CELLS, Tensors, gate_slots, preactivations, split_peepholes

# Derivatives are held for at most this many pre-activations at a time (fp32, LSTM: 12 numbers for 4 of them).
_BLOCK = 1 << 22


class _Plan(NamedTuple):
    """The tokens in order of time: those at position 0 of every sequence, then those at 1, ...; within a position the
    longest sequences first, so that those still running are always the first rows."""

    counts: list[int]  # sequences still running at each position
    order: Tensor | None  # [N] sequences, longest first; None when they are all as long as each other
    gather: Tensor | None  # [tokens] token of a packed row at each place in this order


def make_plan(batch: int, length: int, cu_host: Tensor | None, device: torch.device) -> _Plan:
    """The plan for rows of ``length`` tokens, or for one packed row whose sequences begin at ``cu_host``."""
    if cu_host is None:
        return _Plan([batch] * length, None, None)
    lengths = cu_host.diff().long()
    lengths, order = lengths.sort(descending=True, stable=True)
    running = lengths[None, :] > torch.arange(int(lengths.max()), device="cpu")[:, None]  # [positions, N]
    tokens = cu_host.long()[:-1][order][None, :] + torch.arange(running.shape[0], device="cpu")[:, None]
    return _Plan(running.sum(1).tolist(), order.to(device), tokens[running].to(device))


def by_time(x: Tensor, plan: _Plan) -> Tensor:
    """``[B, T, ...]`` or packed ``[1, total, ...]`` -> ``[tokens, ...]`` in order of time."""
    return x.transpose(0, 1).flatten(0, 1) if plan.gather is None else x[0].index_select(0, plan.gather)


def by_row(x: Tensor, plan: _Plan, shape: torch.Size) -> Tensor:
    """The inverse of :func:`by_time`."""
    if plan.gather is None:
        return x.unflatten(0, (shape[1], shape[0])).transpose(0, 1).contiguous()
    return torch.empty_like(x).index_copy(0, plan.gather, x)[None]


def rows_in(state: Tensors, plan: _Plan) -> Tensors:
    """The rows of a state, longest sequence first."""
    return state if plan.order is None else tuple(s.index_select(0, plan.order) for s in state)


def rows_out(state: Tensors, plan: _Plan) -> Tensors:
    """The inverse of :func:`rows_in`."""
    return state if plan.order is None else tuple(torch.empty_like(s).index_copy(0, plan.order, s) for s in state)


def _product(h: Tensor, R: Tensor, b: Tensor | None) -> Tensor:
    """``[n, H, D] x [H, D, E] -> [n, H, E]``."""
    y = torch.bmm(h.transpose(0, 1), R).transpose(0, 1)
    return y if b is None else y + b


def _blocks(counts: list[int], size: int) -> list[list[slice]]:
    """The tokens from the last to the first: of every position its span, and as many positions together as have
    ``size`` tokens, at least one."""
    blocks: list[list[slice]] = [[]]
    end = sum(counts)
    for n in reversed(counts):
        at = slice(end - n, end)
        if blocks[-1] and blocks[-1][0].stop - at.start > size:
            blocks.append([])
        blocks[-1].append(at)
        end -= n
    return blocks


def forward(
    x: Tensor,
    R: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    state: Tensors,
    cu_host: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensors, Tensor | None]:
    """``h`` ``[B, T, H, D]``, the final state and, with ``keep``, the states before every token ``[tokens, S, H, D]``
    in order of time."""
    acc, shape = accumulate_dtype(x), x.shape
    plan = make_plan(shape[0], shape[1], cu_host, x.device)
    R, b = R.to(acc), None if b is None else b.to(acc)
    weights, step = split_peepholes(kind, None if p is None else p.to(acc)), CELLS[kind].step
    inputs = by_time(x, plan).split(plan.counts)
    state, outputs, tape = rows_in(state, plan), [], []
    for x_t, n in zip(inputs, plan.counts, strict=True):
        now = tuple(s[:n] for s in state)
        if keep:
            tape.append(torch.stack(now, 1))
        after = step(preactivations(kind, x_t.to(acc), _product(now[0], R, b)), now, weights)
        outputs.append(after[0])
        if n < len(state[0]):  # the others have ended
            after = tuple(torch.cat([new, old[n:]]) for new, old in zip(after, state, strict=True))
        state = after
    h = by_row(torch.cat(outputs).to(x.dtype), plan, shape)
    return h, tuple(s.clone() for s in rows_out(state, plan)), torch.cat(tape) if keep else None


def backward(
    x: Tensor,
    R: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    cu_host: Tensor | None,
    kind: str,
    tape: Tensor,
    dy: Tensor,
    d_state: Tensors,
) -> dict[str, Tensor]:
    """Gradients by input name, from those of ``h`` and of the final state (its differentiable parts)."""
    acc, cell = accumulate_dtype(x), CELLS[kind]
    plan = make_plan(x.shape[0], x.shape[1], cu_host, x.device)
    R_acc, b_acc = R.to(acc), None if b is None else b.to(acc)
    weights = split_peepholes(kind, None if p is None else p.to(acc))
    inputs, dy = by_time(x, plan).to(acc), by_time(dy, plan).to(acc)
    of_x, of_product = gate_slots(kind)
    slots = max(of_product) + 1
    dS = torch.stack(rows_in(d_state, plan))  # [states, N, H, D]
    da = inputs.new_empty(slots, *tape.shape[:1], *tape.shape[2:])  # [slots, tokens, H, D]
    dp = [torch.zeros_like(w) for w in weights]

    for positions in _blocks(plan.counts, max(1, _BLOCK // (slots * tape.shape[2] * tape.shape[3]))):
        block = slice(positions[-1].start, positions[0].stop)
        before = tape[block].unbind(1)
        slots_in = preactivations(kind, inputs[block], _product(before[0], R_acc, b_acc))
        J = cell.slope(slots_in, before, weights)
        for at in positions:
            n = at.stop - at.start
            now = dS[:, :n].clone()
            now[0] += dy[at]
            d = (now[:, None] * J[:, :, at.start - block.start : at.stop - block.start]).sum(0)
            da[:, at] = d[:slots]
            back = d[of_product].permute(2, 1, 0, 3).flatten(2)  # [H, n, G * D]
            now = d[slots:]
            now[0] += torch.bmm(back, R_acc.transpose(1, 2)).transpose(0, 1)
            dS = now if n == dS.shape[1] else torch.cat([now, dS[:, n:]], 1)
        if weights:
            c = before[1], cell.step(slots_in, before, weights)[1]
            for w, (gate, new) in enumerate(cell.peepholes):
                dp[w] += (da[gate, block] * c[new]).sum(0)

    back = da[of_product].permute(2, 1, 0, 3).flatten(2)  # [H, tokens, G * D]
    grads = {
        "x": by_row(da[of_x].permute(1, 2, 0, 3).flatten(2).to(x.dtype), plan, x.shape),
        "R": torch.bmm(tape[:, 0].permute(1, 2, 0), back).to(R.dtype),
    }
    if b is not None:
        grads["b"] = back.sum(1).to(b.dtype)
    if p is not None:
        grads["p"] = torch.stack(dp, 1).flatten(1).to(p.dtype)
    before = (d.clone() for d in rows_out(tuple(dS), plan))
    return grads | dict(zip(cell.states, before, strict=False))
