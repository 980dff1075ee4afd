"""What is particular to attention; values, gradients, packing and states are checked by the contract suite."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from linnet.ops import AttentionState, Segments, attention, rotary
from linnet.ops.attention import merge
from linnet.ops.core import select_rows

flex = importlib.import_module("linnet.ops.attention.flex")


def _qkv(B: int, T: int, *, H: int = 4, Hkv: int = 2, K: int = 8, V: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, K), (B, T, Hkv, K), (B, T, Hkv, V))
    q, k, v = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return q, k, v


def test_worked_example() -> None:
    """Two tokens whose scores differ by log 3: the second output is 1/4 of one value and 3/4 of the other."""
    q = torch.tensor([[[[1.0]], [[1.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[0.0]], [[math.log(3.0)]]]], dtype=torch.float64)
    v = torch.tensor([[[[8.0]], [[4.0]]]], dtype=torch.float64)
    (o, lse), state = attention(q, k, v, scale=1.0, return_lse=True)
    torch.testing.assert_close(o.flatten(), torch.tensor([8.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(lse.flatten(), torch.tensor([0.0, math.log(4.0)], dtype=torch.float64))
    assert torch.equal(state.k, k) and torch.equal(state.v, v) and state.length.tolist() == [2]


# The cache


def test_cache_is_aligned_to_the_right() -> None:
    _, k, v = _qkv(1, 6)
    _, state = attention(_qkv(1, 6)[0], k, v, segments=Segments.from_lengths([4, 0, 2]))
    assert state.length.tolist() == [4, 0, 2]
    assert torch.equal(state.k[0], k[0, :4]) and torch.equal(state.v[0], v[0, :4])
    assert not state.k[1].any() and not state.k[2, :2].any()
    assert torch.equal(state.k[2, 2:], k[0, 4:])


def test_windowed_cache_stops_growing() -> None:
    q, k, v = _qkv(2, 12)
    state = None
    for t in range(12):
        _, state = attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], window=5, state=state)
        assert state.k.shape[1] == min(t + 1, 4)
    assert torch.equal(state.k, k[:, 8:]) and state.length.tolist() == [12, 12]


def test_cut_cache_does_not_keep_the_prompt_alive() -> None:
    q, k, v = _qkv(1, 100)
    _, state = attention(q, k, v, window=5)
    assert state.k.untyped_storage().nbytes() == state.k.numel() * 8


def test_a_packed_prompt_continues_as_a_batch() -> None:
    """Prompts of different length in one packed row, then all of them step together."""
    lengths, (q, k, v) = [3, 9, 1], _qkv(1, 13)
    bounds = [0, 3, 12, 13]
    _, state = attention(q, k, v, segments=Segments.from_lengths(lengths))
    for step in range(3):
        new = _qkv(3, step + 1)
        out, state = attention(*new, state=state)
        for n in range(3):
            rows = [x[:, bounds[n] : bounds[n + 1]] for x in (q, k, v)]
            alone = attention(*rows)[1]
            for s in range(step + 1):
                expected, alone = attention(*(x[n : n + 1] for x in _qkv(3, s + 1)), state=alone)
            torch.testing.assert_close(out[n : n + 1], expected, rtol=1e-12, atol=1e-12)
    assert state.length.tolist() == [9, 15, 7]


def test_a_full_cache_serves_a_windowed_call() -> None:
    q, k, v = _qkv(2, 20)
    _, state = attention(q[:, :15], k[:, :15], v[:, :15])
    out, after = attention(q[:, 15:], k[:, 15:], v[:, 15:], window=4, state=state)
    torch.testing.assert_close(out, attention(q, k, v, window=4)[0][:, 15:], rtol=1e-12, atol=1e-12)
    assert torch.equal(after.k, k[:, 17:])


def test_rows_of_a_cache_can_be_reordered() -> None:
    q, k, v = _qkv(3, 7)
    state = attention(q, k, v)[1]
    order = torch.tensor([2, 0])
    out = attention(*(x[order] for x in _qkv(3, 1)), state=select_rows(state, order))[0]
    torch.testing.assert_close(out, attention(*_qkv(3, 1), state=state)[0][order])


def test_meta_tensors_pass() -> None:
    q, k, v = (x.to("meta") for x in _qkv(2, 70))
    for options in ({}, {"window": 5}, {"return_lse": True}):
        assert attention(q, k, v, **options)[1].v.shape == (2, 4 if "window" in options else 70, 2, 8)


# Work


def _flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_windows_cost_what_they_see() -> None:
    """return_lse shows the products to the counter; the plain call has the same shapes."""

    def work(T: int, **options: object) -> int:
        q, k, v = _qkv(1, T)
        return _flops(lambda: attention(q, k, v, return_lse=True, **options))

    assert work(2048, window=64) == 2 * work(1024, window=64)
    dense = 2 * 2048 * 2048 * 4 * (8 + 8)
    assert work(2048, window=64) < dense / 12
    short = Segments.from_lengths([64] * 32)
    assert work(2048, segments=short) < dense / 12


# Parts that merge


def test_merge_is_attention_over_the_union() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 1, 12, dtype=torch.float64, generator=generator)
    v = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    parts = [(s.softmax(-1) @ part, s.logsumexp(-1)) for s, part in zip(scores.split(4, -1), v.split(4), strict=True)]
    outs, lses = zip(*parts, strict=True)
    o, lse = merge(outs, lses)
    torch.testing.assert_close(o, scores.softmax(-1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_merge_with_parts_that_saw_nothing() -> None:
    outs = [torch.randn(1, 2, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.tensor([[[0.3], [-torch.inf]]]).double().requires_grad_(), torch.full((1, 2, 1), -torch.inf).double()]
    o, lse = merge(outs, lses)
    torch.testing.assert_close(o[:, 0], outs[0][:, 0])
    assert not o[:, 1].any() and lse[0, 1, 0] == -torch.inf
    (o.sum() + lse[0, 0, 0]).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (*outs, lses[0]))


def test_merge_gradients() -> None:
    outs = [torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *lses))


def test_merge_refuses_parts_that_do_not_fit() -> None:
    o, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for outs, lses, name in (([], [], "lses"), ([o], [lse, lse], "lses"), ([o, o[:, :1]], [lse, lse], r"outs\[1\]")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            merge(outs, lses)
    with pytest.raises(ValueError, match=r"^lses\[0\]: expected shape \[1, 2, 3\], got \[1, 2\]"):
        merge([o], [lse[..., 0]])


# Rotary positions


def test_rotary_is_a_complex_rotation() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 1000, 1001]])
    z = torch.complex(x[..., :4], x[..., 4:])
    rates = 500.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    z = z * torch.polar(torch.ones(1, dtype=torch.float64), positions[..., None, None] * rates)
    torch.testing.assert_close(rotary(x, positions, base=500.0), torch.cat([z.real, z.imag], -1))
    assert torch.equal(rotary(x, torch.arange(5))[1], rotary(x[1:], torch.arange(5)[None])[0])


def test_rotary_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = [
        float((rotary(q, torch.tensor([m])) * rotary(k, torch.tensor([n]))).sum()) for m, n in ((5, 2), (905, 902))
    ]
    assert abs(scores[0] - scores[1]) < 1e-10


def test_rotary_slows_down_long_wavelengths() -> None:
    """Llama 3.1's rule, pair by pair: kept, interpolated or divided, by the turns in the original length."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    x, position = torch.randn(1, 1, 1, 16, dtype=torch.float64), 7
    y = rotary(x, torch.tensor([position]), base=300.0, scaling=scaling)
    kinds = set()
    for i in range(8):
        rate = 300.0 ** (-i / 8)
        turns = 64 * rate / (2 * math.pi)
        kinds.add("kept" if turns > 4 else "divided" if turns < 1 else "between")
        smooth = (turns - 1) / 3
        if turns > 4:
            slowed = rate
        elif turns < 1:
            slowed = rate / 8
        else:
            slowed = (1 - smooth) * rate / 8 + smooth * rate
        turned = torch.polar(torch.ones(1, dtype=torch.float64), torch.tensor([position * slowed], dtype=torch.float64))
        z = torch.complex(x[0, 0, 0, i], x[0, 0, 0, i + 8]) * turned[0]
        torch.testing.assert_close(torch.complex(y[0, 0, 0, i], y[0, 0, 0, i + 8]), z)
    assert kinds == {"kept", "between", "divided"}
    for wrong in ({**scaling, "factor": 0}, {"factor": 8.0}, {**scaling, "high_freq_factor": 1.0}, 8.0):
        with pytest.raises(ValueError, match=r"^scaling: expected numbers above 0 for factor, "):
            rotary(x, torch.tensor([position]), scaling=wrong)


def test_rotary_keeps_its_angles_in_half_precision() -> None:
    """A position of 4001 is not a bfloat16 number; its angle must be right all the same."""
    x, positions = torch.randn(1, 1, 1, 16), torch.tensor([4001])
    error = rotary(x.bfloat16(), positions).double() - rotary(x.bfloat16().double(), positions)
    assert error.abs().max() <= 2**-8 * x.abs().max()


@pytest.mark.parametrize(
    ("x", "positions", "name"),
    [
        (torch.zeros(1, 2, 3), torch.arange(2), "x"),
        (torch.zeros(1, 2, 3, 5), torch.arange(2), "x"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int64), torch.arange(2), "x"),
        (torch.zeros(1, 2, 3, 4), torch.arange(3), "positions"),
        (torch.zeros(1, 2, 3, 4), [0, 1], "positions"),
    ],
)
def test_rotary_refuses(x: Tensor, positions: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        rotary(x, positions)


# Bad input beyond what the contract suite tries


@pytest.mark.parametrize("window", [0, -3, 2.5, True])
def test_refuses_windows(window: object) -> None:
    with pytest.raises(ValueError, match=r"^window: expected None or an integer >= 1"):
        attention(*_qkv(1, 3), window=window)  # type: ignore[call-overload]


def test_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"^k: expected a number of heads that divides q's 4, got 3"):
        attention(*_qkv(1, 3, Hkv=3))


# FlexAttention. Its kernels run on a GPU; the ranges and block lists they are given do not depend on one.

FLEX = [
    pytest.param(2, 300, None, 0, None, id="full"),
    pytest.param(2, 300, 50, 0, None, id="window"),
    pytest.param(2, 300, None, 40, None, id="cache"),
    pytest.param(2, 300, 150, 149, None, id="windowed cache"),
    pytest.param(1, 400, None, 0, [100, 0, 250, 50], id="segments"),
    pytest.param(1, 400, 130, 0, [100, 0, 250, 50], id="windowed segments"),
    pytest.param(1, 400, None, 37, [100, 0, 250, 50], id="segments with caches"),
    pytest.param(1, 400, 30, 29, [100, 1, 249, 50], id="windowed segments with caches"),
    pytest.param(1, 129, 1, 0, [128, 1], id="window of one"),
]


def _flex_case(B: int, T: int, S: int, lengths: list[int] | None) -> tuple[tuple[Tensor, ...], AttentionState | None]:
    rows = B if lengths is None else len(lengths)
    state = None
    if S:
        seen = torch.arange(rows) * 5 % (S + 4)
        real = (torch.arange(S) >= S - seen[:, None])[..., None, None]
        _, k, v = _qkv(rows, S)
        state = AttentionState(k * real, v * real, seen)
    return _qkv(B, T), state


@pytest.mark.parametrize(("B", "T", "window", "S", "lengths"), FLEX)
def test_flex_sees_what_the_definition_sees(
    B: int, T: int, window: int | None, S: int, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (q, k, v), state = _flex_case(B, T, S, lengths)
    segments = None if lengths is None else Segments.from_lengths(lengths)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._call)  # uncompiled, PyTorch writes out the mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow so
        o, lse = flex.flex_attend(q, k, v, window, 0.3, state, segments, True)
    options = {"window": window, "scale": 0.3, "state": state, "segments": segments, "return_lse": True}
    (expected, expected_lse), _ = attention(q, k, v, **options, backend="reference")
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("B", "T", "window", "S", "lengths"), FLEX)
def test_flex_blocks_cover_the_mask(B: int, T: int, window: int | None, S: int, lengths: list[int] | None) -> None:
    (_, k, v), state = _flex_case(B, T, S, lengths)
    segments = None if lengths is None else Segments.from_lengths(lengths)
    k, v, lowest, highest = flex.key_ranges(k, v, state, segments)
    if window is not None:
        lowest = torch.maximum(lowest, highest - (window - 1))
    keys, size = k.shape[1], flex.BLOCK
    mask = flex.block_mask(lowest, highest, keys)
    at = torch.arange(keys)
    seen = (at >= lowest[..., None]) & (at <= highest[..., None])
    for b in range(B):
        for i in range(-(-T // size)):
            rows = seen[b, i * size : (i + 1) * size]
            blocks = [rows[:, j * size : (j + 1) * size] for j in range(-(-keys // size))]
            partial = mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
            assert mask.full_kv_indices is not None and mask.full_kv_num_blocks is not None
            full = mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
            assert not set(partial) & set(full) and len(set(partial)) == len(partial)
            assert {j for j, block in enumerate(blocks) if block.any()} <= {*partial, *full}
            assert all(blocks[j].all() and blocks[j].shape[1] == size for j in full)
            # Nothing is computed for blocks out of sight; a gap between a query's ranges may touch one more.
            assert len(partial) + len(full) <= sum(bool(block.any()) for block in blocks) + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "T", "window", "S", "lengths"), FLEX[:-1]
)  # a lone key: its score's gradient is pure cancellation
def test_long_calls_on_a_gpu(
    B: int, T: int, window: int | None, S: int, lengths: list[int] | None, dtype: torch.dtype, device: torch.device
) -> None:
    """The lengths from which FlexAttention runs, which are more than the contract suite uses: values and gradients."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    inputs, state = _flex_case(B, T, S, lengths)
    leaves = [torch.cat([x, x], -1).to(device, dtype) for x in inputs]  # FlexAttention takes no fewer than 16
    cache = [] if state is None else [torch.cat([x, x], -1).to(device, dtype) for x in state[:2]]
    segments = None if lengths is None else Segments.from_lengths(lengths, device)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in (*leaves, *cache)]
        before = None if state is None else AttentionState(given[3], given[4], state.length.to(device))
        options = {"window": window, "state": before, "segments": segments, "backend": backend}
        (o, lse), _ = attention(*given[:3], return_lse=True, **options)
        plain, _ = attention(*given[:3], **options)
        weights = torch.linspace(-1, 1, o.numel(), device=device, dtype=torch.float64).view_as(o)
        loss = ((o.double() + 2 * plain.double()) * weights).sum() + (lse.double() * weights[..., 0]).sum()
        return [o, lse, plain, *torch.autograd.grad(loss, given)]

    exact, rough, got = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "chunked")
    for e, r, x in zip(exact, rough, got, strict=True):
        size = e.square().mean().sqrt()
        error, allowed = ((y.double() - e).square().mean().sqrt() for y in (x, r))
        assert error <= 4 * allowed + 4 * torch.finfo(dtype).eps * size
