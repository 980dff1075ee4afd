"""SwiGLU and the mixture of experts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from linnet.models.mlp import GeGLU, MixtureOfExperts, SwiGLU, grouped_matmul, grouped_outer


def experts(**options):
    torch.manual_seed(0)
    defaults = {"num_experts": 4, "experts_per_token": 2, "init_std": 0.3}
    return MixtureOfExperts(16, 24, **{**defaults, **options}).double()


def expert_output(moe, x, e):
    return (F.silu(x @ moe.gate_proj[e]) * (x @ moe.up_proj[e])) @ moe.down_proj[e]


def naive(moe, x):
    """Every token by itself, straight from the definition."""
    out = torch.zeros_like(x)
    for index in range(x.shape[0]):
        p = (moe.router.weight @ x[index]).softmax(-1)
        best = p.argsort(descending=True)[: moe.experts_per_token]
        for e in best:
            out[index] += p[e] / p[best].sum() * expert_output(moe, x[index], e)
        if moe.shared is not None:
            gate = 1.0 if moe.shared_gate is None else torch.sigmoid(x[index] @ moe.shared_gate.weight[0])
            out[index] += gate * moe.shared(x[index])[0]
    return out


@pytest.mark.parametrize(("kind", "activation"), [(SwiGLU, F.silu), (GeGLU, partial(F.gelu, approximate="tanh"))])
def test_gated_layers_are_their_formula(kind, activation):
    torch.manual_seed(0)
    mlp = kind(8, 20, init_std=0.5, out_std=0.1)
    x = torch.randn(2, 3, 8)
    y, aux = mlp(x)
    assert aux is None
    gate, up, down = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    torch.testing.assert_close(y, (activation(x @ gate.T) * (x @ up.T)) @ down.T)
    biased = kind(8, 20, bias=True)
    assert not any(p.count_nonzero() for name, p in biased.named_parameters() if name.endswith("bias"))
    assert sum(p.numel() for p in biased.parameters()) == sum(p.numel() for p in mlp.parameters()) + 48
    assert 0.4 < mlp.gate_proj.weight.std() < 0.6 and 0.08 < mlp.down_proj.weight.std() < 0.12


@pytest.mark.parametrize(("shared", "gated"), [(0, False), (2, False), (1, True)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_token_gets_its_experts(k, shared, gated):
    moe = experts(experts_per_token=k, shared_experts=shared, shared_gate=gated)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    y, _ = moe(x)
    expected = naive(moe, x.flatten(0, 1)).view_as(y)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    given = [x, *moe.parameters()]
    weight = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad((y * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((expected * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(
            torch.zeros(()) if got is None else got.float(), want.float() if want is not None else torch.zeros(())
        )


def test_all_experts_chosen_is_the_dense_sum():
    moe = experts(experts_per_token=4)
    x = torch.randn(7, 16, dtype=torch.float64)
    p = moe.router(x).softmax(-1)
    dense = sum(p[:, e : e + 1] * expert_output(moe, x, e) for e in range(4))
    torch.testing.assert_close(moe(x[None])[0][0], dense, rtol=1e-12, atol=1e-12)


def test_no_token_is_dropped_when_all_want_one_expert():
    moe = experts(experts_per_token=1)
    torch.nn.init.zeros_(moe.router.weight)
    moe.router.weight.data[2] = 1.0
    x = torch.rand(1, 50, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], expert_output(moe, x, 2), rtol=1e-12, atol=1e-12)
    assert moe.expert_load.tolist() == [0, 0, 1, 0]
    assert moe.router_statistics() == {"max_load": 4.0, "min_load": 0.0, "load_entropy": 0.0}


def test_balance_loss_is_its_coefficient_for_a_uniform_router():
    moe = experts(balance_loss=0.25)
    torch.nn.init.zeros_(moe.router.weight)
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    assert moe(x)[1].item() == pytest.approx(0.25, abs=1e-15)
    skewed = experts(balance_loss=0.25, experts_per_token=1)
    torch.nn.init.zeros_(skewed.router.weight)
    skewed.router.weight.data[0] = 100.0
    assert skewed(x.abs())[1].item() == pytest.approx(1.0)  # all on one of four experts


def test_auxiliary_losses_are_their_formulas():
    moe = experts(balance_loss=0.5, router_z_loss=0.1)
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    logits = moe.router(x[0])
    p = logits.softmax(-1)
    share = F.one_hot(p.topk(2).indices, 4).sum((0, 1)) / 26
    expected = 0.5 * 4 * (share * p.mean(0)).sum() + 0.1 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(moe(x)[1], expected, rtol=1e-12, atol=1e-12)
    moe(x)[1].backward()
    assert moe.router.weight.grad.abs().sum() > 0 and moe.up_proj.grad is None


def test_statistics_are_of_training_only():
    moe = experts().eval()
    moe(torch.randn(1, 5, 16, dtype=torch.float64))
    assert moe.router_statistics() == {}
    assert "expert_load" not in moe.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 0, 8, 3), (0, 0, 16, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("widths", [(16, 24), (16, 1), (1, 16)])
def test_grouped_matmul(dtype, sizes, widths):
    torch.manual_seed(0)
    groups, n = len(sizes), sum(sizes)
    offsets = torch.tensor(sizes).cumsum(0).int()
    x = torch.randn(n, widths[0], dtype=dtype, requires_grad=True)
    weight = torch.randn(groups, *widths, dtype=dtype, requires_grad=True)
    y = grouped_matmul(x, weight, offsets)
    parts = zip(x.split(sizes), weight, strict=True)
    expected = torch.cat([a.double() @ b.double() for a, b in parts])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=32 * eps)
    up = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, weight), up), torch.autograd.grad(expected, (x, weight), up.double()), strict=True
    ):
        torch.testing.assert_close(got, want.to(dtype), rtol=4 * eps, atol=32 * eps)


def test_grouped_ops_are_registered_properly():
    torch.manual_seed(0)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(grouped_matmul, (x, weight, offsets))
    torch.library.opcheck(grouped_outer, (x, y, offsets))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_matmul(x, w, offsets), (x, weight))


def test_transforms_differentiate_through_the_experts():
    """Forward mode, by `torch.func` or by hand, and derivatives of derivatives."""
    moe = experts()
    x, along = torch.randn(2, 1, 5, 16, dtype=torch.float64)
    names, given = zip(*moe.named_parameters(), strict=True)

    def loss(x, *params):
        y, aux = torch.func.functional_call(moe, dict(zip(names, params, strict=True)), (x,))
        return y.sin().sum() + aux

    everything = tuple(range(len(given) + 1))
    tangents = along, *(torch.randn_like(p) for p in given)
    leaves = [x.requires_grad_(), *given]
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    turned = torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)), leaves)
    leaves = tuple(leaf.detach() for leaf in leaves)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))

    torch.testing.assert_close(torch.func.grad(loss, everything)(*leaves), grads)
    torch.testing.assert_close(torch.func.jvp(loss, leaves, tangents)[1], expected)
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss, everything), leaves, tangents)[1], turned)
    with forward_ad.dual_level():
        out = loss(*(forward_ad.make_dual(a, t) for a, t in zip(leaves, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)


def test_half_precision_and_autocast_route_in_fp32():
    moe = experts().float()
    x = torch.randn(1, 40, 16)
    y, aux = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_aux = moe(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low_aux, aux)
    torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.02)


def test_runs_are_identical():
    moe = experts().float()
    x = torch.randn(2, 30, 16, requires_grad=True)

    def run():
        y, aux = moe(x)
        return [y, *torch.autograd.grad(y.square().sum() + aux, [x, *moe.parameters()])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_bad_options():
    with pytest.raises(ValueError, match="experts_per_token"):
        experts(experts_per_token=5)


def test_sigmoid_router_scales_weights_that_sum_to_one():
    moe = experts(router="sigmoid", router_scale=2.446)
    x = torch.randn(5, 16, dtype=torch.float64)
    out = torch.zeros_like(x)
    for index in range(5):
        p = (moe.router.weight @ x[index]).sigmoid()
        best = p.argsort(descending=True)[:2]
        for e in best:
            out[index] += 2.446 * p[e] / p[best].sum() * expert_output(moe, x[index], e)
    torch.testing.assert_close(moe(x)[0], out)


def test_router_bias_moves_the_choice_and_not_the_weights():
    moe = experts(router="sigmoid", router_bias_rate=0.01).train()
    x = torch.randn(6, 16, dtype=torch.float64)
    before = moe(x)[0]
    moe.balance()
    load = moe.expert_load
    torch.testing.assert_close(moe.router_bias, 0.01 * torch.sign(load.mean() - load), check_dtype=False)
    moe.router_bias.copy_(torch.tensor([0.0, 9.0, 9.0, 0.0]))  # experts 1 and 2 for everyone
    y = moe(x)[0]
    scores = (x @ moe.router.weight.T).sigmoid()[:, 1:3]
    weights = scores / scores.sum(-1, keepdim=True)
    expected = sum(weights[:, i, None] * expert_output(moe, x, e) for i, e in enumerate((1, 2)))
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, before)
    assert "router_bias" in moe.state_dict() and not moe.router_bias.requires_grad
    moe.reset_parameters()
    assert not moe.router_bias.any()


def test_unknown_router_is_refused():
    with pytest.raises(ValueError, match=r"^router: expected 'softmax' or 'sigmoid', got 'top'"):
        experts(router="top")
