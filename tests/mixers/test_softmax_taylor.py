"""The Taylor orders of softmax attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linnet.mixers import build_mixer
from linnet.mixers.claims import inputs, random_mixer, share
from linnet.mixers.features import TaylorFeatures
from linnet.ops import attention, decay


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "order", "features"), [(4, 0, 1), (3, 1, 4), (16, 2, 153), (5, 4, 126)])
def test_features_have_the_products_of_the_polynomial(size: int, order: int, features: int) -> None:
    phi, q, k = TaylorFeatures(size, order), normal(7, size), normal(7, size, seed=1)
    assert phi(q).shape == (7, features) == (7, math.comb(size + order, order))
    scores = q @ k.T
    want = sum(scores**n / math.factorial(n) for n in range(order + 1))
    torch.testing.assert_close(phi(q) @ phi(k).T, want, rtol=1e-12, atol=1e-12)


def test_orders_approach_softmax_attention() -> None:
    """Each order is closer than the one before, and 16 of them are exact for scores up to 1."""
    q, k, v = normal(1, 40, 2, 4), normal(1, 40, 2, 4, seed=1), normal(1, 40, 2, 4, seed=2)
    scale = 1 / float(torch.einsum("bihd,bjhd->hij", q, k).abs().max())
    want = attention(q, k, v, scale=scale)[0]
    errors = []
    for order in range(13):
        phi = TaylorFeatures(4, order)
        read = decay(phi(scale * q), phi(k), v, scale=1.0, normalize=True, eps=0.0)[0]
        errors.append(float((read - want).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[-1] < 1e-9


def test_odd_orders_have_a_zero() -> None:
    """Which is why the sum of the weights is no divisor there."""
    for order in range(1, 8):
        s = torch.linspace(-20, 20, 4001, dtype=torch.float64)
        lowest = float(sum(s**n / math.factorial(n) for n in range(order + 1)).min())
        assert (lowest > 0.1) == (order % 2 == 0)
    with pytest.raises(ValueError, match=r"^order: expected an even whole number with normalizer='sum'"):
        build_mixer("softmax_taylor(num_heads=2, order=3)", 8)
    build_mixer("softmax_taylor(num_heads=2, order=3, normalizer='l2')", 8)


@pytest.mark.parametrize("normalizer", ["rms", "l2"])
def test_norms_do_not_see_a_factor(normalizer: str) -> None:
    """Reading the plain sum, or the same divided by the number of tokens, the norm gives the same."""
    options = {"num_heads": 2, "order": 3, "rope": False}
    plain = random_mixer(torch.Generator().manual_seed(0), "softmax_taylor", 8, normalizer="none", **options)
    normed = random_mixer(
        torch.Generator().manual_seed(0), "softmax_taylor", 8, normalizer=normalizer, norm_eps=1e-30, **options
    )
    divided = random_mixer(torch.Generator().manual_seed(0), "softmax_taylor", 8, normalizer="length", **options)
    for other in (normed, divided):
        share(plain, other, "q_proj", "k_proj", "v_proj", "o_proj")
        torch.nn.init.eye_(other.o_proj.weight)
    if normed.norm is not None:
        torch.nn.init.ones_(normed.norm.weight)
    x = inputs(torch.Generator().manual_seed(1), 8)
    heads = divided(x)[0].unflatten(-1, (2, 4))
    size = 1.0 if normalizer == "l2" else 2.0  # the root of the four channels of a head
    want = size * heads / heads.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(normed(x)[0], want.flatten(2), rtol=1e-9, atol=1e-9)


def test_memory_is_as_large_as_the_card_says() -> None:
    mixer = build_mixer("softmax_taylor(num_heads=4, order=4)", 64)
    state = mixer.init_state(1)
    assert state.decay.S.shape == (1, 4, math.comb(20, 4), 16)
