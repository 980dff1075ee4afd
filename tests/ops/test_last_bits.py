"""What is right, or the same, to the last bit, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from interpreted import INTERPRETED, in_the_interpreter, run_interpreted, starts_the_interpreter
from linnet.ops import decay

if INTERPRETED:
    import triton
    import triton.language as tl

    from linnet.ops.delta import launch
    from linnet.ops.delta.kernels import after, gate_sums

    @triton.jit
    def kernel(g_ptr, parts_ptr, C: tl.constexpr):
        r = tl.arange(0, C)
        coarse, fine = gate_sums(tl.load(g_ptr + r))
        behind, rest = after(coarse, C), after(fine, C)
        whole, part = tl.sum(tl.where(r == 0, coarse + behind, 0.0), 0), tl.sum(tl.where(r == 0, fine + rest, 0.0), 0)
        tl.store(parts_ptr + r, whole - behind)
        tl.store(parts_ptr + C + r, part - rest)

    @triton.jit
    def square_kernel(x_ptr):
        tl.store(x_ptr, tl.load(x_ptr) * tl.load(x_ptr))


@pytest.mark.slow
@starts_the_interpreter
def test_last_bits_in_the_interpreter() -> None:
    run_interpreted(__file__)


@in_the_interpreter
def test_integers_do_not_overflow() -> None:
    x = torch.tensor([2**15 - 1, 2**16], dtype=torch.int32)
    square_kernel[(1,)](x)
    assert x[0] == (2**15 - 1) ** 2
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        square_kernel[(1,)](x[1:])


@in_the_interpreter
def test_later_gates_do_not_change_earlier_decays() -> None:
    """The decay up to each row, made of all rows less those behind it as the kernels of the delta engine make it, is
    the same to the bit whatever is behind."""
    generator = torch.Generator().manual_seed(0)
    C = 64
    for _ in range(20):
        g = -torch.exp(2 * torch.randn(C, generator=generator) - 2)
        changed = g.clone()
        changed[C // 2 :] = -torch.exp(2 * torch.randn(C // 2, generator=generator) - 2)
        parts, other = torch.empty(2, C), torch.empty(2, C)
        kernel[(1,)](g, parts, C=C)
        kernel[(1,)](changed, other, C=C)
        assert torch.equal(parts[:, : C // 2], other[:, : C // 2])
        torch.testing.assert_close(parts.double().sum(0), g.double().cumsum(0), rtol=0, atol=C * 2.0**-29)


@in_the_interpreter
@pytest.mark.parametrize("name", ["g", "gv"])
def test_later_gates_do_not_change_earlier_readings(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    T, K, V, t = 16, 8, 8, 5

    def gates(tokens: int) -> torch.Tensor:
        return -0.3 * torch.rand(1, tokens, 1, K, generator=generator)

    for _ in range(4):
        q, k, v = (torch.randn(1, T, 1, D, generator=generator) for D in (K, K, V))
        g = gates(T)
        changed = torch.cat([g[:, :t], gates(T - t)], 1)
        o, other = (decay(q, k, v, **{name: x}, backend="triton")[0] for x in (g, changed))
        assert torch.equal(o[:, :t], other[:, :t])


@in_the_interpreter
@pytest.mark.parametrize("gated", [False, True])
def test_a_key_that_comes_back_is_reflected_to_the_last_bit(gated: bool) -> None:
    """In fp32 what its second row reads of its first is rounded once, whatever its length."""
    torch.manual_seed(0)
    H, K = 8, 8
    k, v, S = torch.randn(1, 1, H, K).repeat(1, 2, 1, 1), torch.zeros(1, 2, H, 1), torch.zeros(1, H, K, 1)
    beta, g = torch.full((1, 2, H), 2.0), torch.zeros(1, 2, H) if gated else None
    _, _, matrices, _ = launch.forward(k, k, v, beta, g, None, S, None, 1.0, True, 1, True)
    assert matrices is not None
    squares = k[0, 0].double().square().sum(-1)
    got, want = -matrices[0, :, 0, 1, 0], 2 * squares / (squares + 1e-6)
    assert (got - want).abs().max() < 1.01 * 2**-24  # half a unit below 2
