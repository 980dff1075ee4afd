"""The normaliser in Triton's interpreter: the scan of keys that makes it for 16-bit inputs (in the contract suite there
are none, and in fp32 the normaliser is one more channel), tokens that read only themselves, and the stabiliser of the
mLSTM over many blocks of tokens."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from interpreted import INTERPRETED, in_the_interpreter, run_interpreted, starts_the_interpreter
from linnet.ops import Segments, decay

SCALE, EPS, PIECE, CHUNK = 0.7, 0.1, 16, 8
ONE, PACKED = [38], [21, 0, 1, 14]


@pytest.mark.slow
@starts_the_interpreter
def test_the_normaliser_in_the_interpreter() -> None:
    run_interpreted(__file__)


def recurrence(
    q: Tensor, k: Tensor, g: Tensor | None, u: Tensor | None, w: Tensor | None, z: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Normaliser of one sequence token by token, and the sums of keys before each token and after the last."""
    x, sums = [], [z]
    for t in range(len(k)):
        key = k[t] if w is None else w[t, :, None] * k[t]
        keep = 1.0 if g is None else (g[t] if g.dim() == 3 else g[t, :, None]).exp()
        after = keep * z + key
        read = after if u is None else z + u * key
        x.append(SCALE * (q[t] * read).sum(-1))
        z = after
        sums.append(z)
    return x, sums


@in_the_interpreter
@pytest.mark.parametrize(
    ("gate", "bonus", "write", "bounded", "lengths"),
    [
        ("none", False, False, False, ONE),
        ("constant", False, True, True, ONE),
        ("scalar", False, True, True, PACKED),
        ("vector", False, False, False, PACKED),
        ("vector", True, False, False, ONE),
        ("vector", True, False, False, PACKED),
    ],
)
def test_the_scan_of_keys(
    gate: str, bonus: bool, write: bool, bounded: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = import_module("linnet.ops.decay.launch_walks")
    monkeypatch.setattr(walks, "chunk_length", lambda dtype: CHUNK)
    torch.manual_seed(0)
    T, H, K = sum(lengths), 2, 6
    q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, H, 4)
    g = {"constant": -torch.rand(H), "scalar": -torch.rand(1, T, H), "vector": -torch.rand(1, T, H, K)}.get(gate)
    if g is not None and gate != "constant":
        g[:, 5] = -200.0  # a reset
    if gate == "constant":
        g = g.expand(1, T, H)
    u, w = torch.randn(H, K) if bonus else None, torch.rand(1, T, H) if write else None
    floor = torch.rand(1, T, H) if bounded else None
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) if len(lengths) > 1 else None
    z = torch.randn(len(lengths), H, K).double().requires_grad_()
    dx, dz = torch.randn(1, T, H), torch.randn(len(lengths), H, K)

    call = walks.Call(q, v, g, None, u, cu, SCALE, PIECE)
    line = walks.line
    x, over, bounds, last = call.normaliser(q, k, line(w), z.detach().float(), line(floor), EPS, call.pieces)
    _, d_first = call.sum_keys(q, line(dx), dz, call.pieces, reverse=True)

    first, expected, starts, ends, loss = 0, [], [], [], 0.0
    for n, length in enumerate(lengths):
        own = slice(first, first + length)
        parts = [None if y is None else y[0, own].double() for y in (g, w)]
        given = (q[0, own].double(), k[0, own].double(), parts[0], None if u is None else u.double(), parts[1], z[n])
        found, sums = recurrence(*given)
        expected += found
        starts += [sums[min(t, length)] for t in range(0, -(-length // PIECE) * PIECE, CHUNK)]
        ends.append(sums[-1])
        loss = loss + sum((y * dx[0, first + t]).sum() for t, y in enumerate(found)) + (sums[-1] * dz[n]).sum()
        first += length
    exact = torch.stack(expected, 1)  # [H, T]
    low = exact if floor is None else torch.maximum(exact.abs(), line(floor).double())
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(x.double(), exact, **close)
    torch.testing.assert_close(1 / over.double(), low + EPS, **close)
    torch.testing.assert_close(bounds[: len(starts)].double(), torch.stack(starts), **close)
    torch.testing.assert_close(last.double(), torch.stack(ends), **close)
    torch.testing.assert_close(d_first.double(), torch.autograd.grad(loss, z)[0], **close)


@in_the_interpreter
@pytest.mark.parametrize("bonus", [False, True])
def test_tokens_that_read_only_themselves(bonus: bool) -> None:
    """The normaliser divides out how much they read, so no gradient gets to q and k."""
    torch.manual_seed(0)
    T, H, K = 10, 2, 8
    q, k = torch.rand(2, 1, T, H, K).requires_grad_()
    v, g, u = torch.randn(1, T, H, K), -torch.rand(1, T, H, K), torch.rand(H, K) if bonus else None
    alone = Segments.from_lengths([1] * T)
    o, _ = decay(q, k, v, g, u=u, normalize=True, segments=alone, backend="triton")
    dq, dk = torch.autograd.grad(o, (q, k), 10 * torch.randn(o.shape))
    assert max(dq.abs().max(), dk.abs().max()) < 2e-6


@pytest.mark.parametrize(
    ("lengths", "heads"), [([520, 520], 3), ([300, 1, 0, 256, 43], 5), ([66 * 256 + 9], 4)], ids=str
)
def test_the_stabiliser_over_blocks_of_tokens(lengths: list[int], heads: int, device: torch.device) -> None:
    """What enters a block of 256 tokens comes from those before it, 64 at a time; sequences end anywhere in one."""
    if device.type == "cpu" and (not INTERPRETED or sum(lengths) > 2000):
        pytest.skip("needs a GPU, or, for few tokens, the interpreter: see the first test of the file")
    mlstm, launch = (import_module(f"linnet.ops.decay.{name}") for name in ("mlstm", "launch_step"))
    torch.manual_seed(0)
    packed = len(set(lengths)) > 1
    shape = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    i, f, m = 8 * torch.randn(*shape, heads), 8 * torch.randn(*shape, heads), 5 * torch.randn(len(lengths), heads)
    i[:, 5], f[:, 9], f[:, 40:200] = -1e6, -1e5, 50.0  # nothing written, a reset, nothing forgotten
    segments = Segments.from_lengths(lengths, device) if packed else None
    given = [x.to(device) for x in (i, f, m)]
    given += [None, None] if segments is None else [segments.cu_seqlens, segments.ids]
    got = launch.stabilizer(*given, mlstm._FLOOR)
    g, w, floor, last = mlstm._forward(*given, None, False)
    torch.testing.assert_close(got[0], g, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1:], (w, floor, last), rtol=1e-5, atol=1e-30)
