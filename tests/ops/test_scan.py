"""The scan engine beyond the contract: bits of minmax cells, long and narrow inputs, memory of the selective scan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linnet.ops import ScanState, Segments, minmax_scan, scan, selective_scan
from linnet.ops.core import check_log_decay, check_not_negative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minmax_has_the_same_bits_everywhere(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    r, s, start = torch.randn(2, 300, 5) + 1, torch.randn(2, 300, 5) - 1, ScanState(torch.randn(2, 5))
    r, s = r.to(dtype), s.to(dtype)
    want, last = minmax_scan(r, s, state=start, backend="reference")
    for chunk in (1, 7, 64, None):
        x, state = minmax_scan(r, s, state=start, chunk_size=chunk, backend="chunked")
        assert x.equal(want) and state.h.equal(last.h)
    x, state = minmax_scan(r[:, :100], s[:, :100], state=start)
    y, state = minmax_scan(r[:, 100:], s[:, 100:], state=state)
    assert torch.cat([x, y], 1).equal(want) and state.h.equal(last.h)


def test_minmax_gradients_go_to_one_input() -> None:
    torch.manual_seed(0)
    r, s, h = (x.requires_grad_() for x in (torch.randn(1, 50, 9) + 1, torch.randn(1, 50, 9) - 1, torch.randn(1, 9)))
    x, _ = minmax_scan(r, s, state=ScanState(h))
    grads = torch.autograd.grad(x[:, -1].sum(), (r, s, h))
    for parts in zip(*(g.flatten(0, -2).unbind(-1) for g in grads), strict=True):
        every = torch.cat(parts)
        assert every.sum() == 1 and (every == 0).sum() == len(every) - 1


@pytest.mark.parametrize("D", [1, 3])
def test_long_and_narrow(D: int) -> None:
    """A million tokens of factors that keep, with one forgotten now and then: sums since the last reset."""
    T = 2**20
    a, b = torch.ones(1, T, D), torch.ones(1, T, D)
    a[:, ::65536] = 0
    h, state = scan(a, b)
    assert h[0, :, 0].equal((torch.arange(T) % 65536 + 1).float()) and state.h.eq(65536).all()


def test_reversed_segments_reset_at_their_ends() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(1, 9, 2, dtype=torch.float64), torch.randn(1, 9, 2, dtype=torch.float64)
    start = ScanState(torch.randn(3, 2, dtype=torch.float64))
    h, after = scan(a, b, reverse=True, state=start, segments=Segments.from_lengths([4, 0, 5]))
    for n, (lo, hi) in enumerate(((0, 4), (4, 4), (4, 9))):
        x = start.h[n]
        for t in reversed(range(lo, hi)):
            x = a[0, t] * x + b[0, t]
            torch.testing.assert_close(h[0, t], x)
        torch.testing.assert_close(after.h[n], x)


def test_selective_scan_keeps_no_states_of_tokens() -> None:
    B, T, D, S = 1, 512, 8, 16
    torch.manual_seed(0)
    x, delta = torch.randn(B, T, D, requires_grad=True), torch.rand(B, T, D, requires_grad=True)
    maps = [torch.randn(B, T, S, requires_grad=True) for _ in range(2)]
    kept: list[int] = []

    def keep(y: Tensor) -> Tensor:
        kept.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        y, _ = selective_scan(x, delta, -torch.rand(D, S), *maps)
    y.sum().backward()
    inputs = sum(y.numel() for y in (x, delta, *maps))
    assert sum(kept) - inputs <= 2 * B * D * S * T // 64 and x.grad is not None and delta.grad is not None


def test_conjugated_inputs_are_read_as_they_are():
    a, b, h = (torch.randn(2, n, 3, dtype=torch.complex128) for n in (5, 5, 1))
    lazy = scan(a.conj(), b.conj(), state=ScanState(h[:, 0].conj()))
    plain = scan(*(x.conj().resolve_conj() for x in (a, b)), state=ScanState(h[:, 0].conj().resolve_conj()))
    torch.testing.assert_close(lazy, plain, rtol=0, atol=0)


def test_values_on_a_gpu_are_not_touched_unchecked() -> None:
    """Not even negated, which for step sizes costs more than a tenth of a selective scan."""
    asked = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func)
            return func(*args, **(kwargs or {}))

    elsewhere = torch.ones(3, device="meta")
    with Watched():
        check_not_negative("delta", elsewhere)
        check_log_decay("A", elsewhere)
    assert not asked
