"""What the papers of the delta family fix beyond the equations: sizes, initial values, numerics of the gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linnet.mixers import build_mixer, mixers
from linnet.mixers.claims import random_mixer
from linnet.ops.core import state_tensors


def test_the_mixers_of_the_delta_engine() -> None:
    names = {name for name, cls in mixers().items() if cls.card.engine == "delta"}
    assert names >= {"deltanet", "deltaproduct", "gated_deltanet", "gated_deltanet2", "kda", "rwkv7"}


@pytest.mark.parametrize(
    ("spec", "d_model", "expected"),
    [
        # DeltaNet 1.3B: q, k, v, o of d, the strength, a convolution of 4 taps over q, k, v, the norm of V
        ("deltanet(num_heads=16)", 2048, 4 * 2048**2 + 2048 * 16 + 4 * 3 * 2048 + 128),
        # Olmo Hybrid 7B: d (2HK + 3HV + 2H) + 4 (2HK + HV) + 2H + V
        ("gated_deltanet(num_heads=30, head_dim=96)", 3840, 88_750_332),
        ("gated_deltanet2", 2304, 29_454_480),  # the released 1.3B
        # Kimi Linear 48B-A3B: q, k, v, o, strength, two maps of rank 128, their biases, A, taps, norm
        (
            "kda(num_heads=32)",
            2304,
            2304 * (4 * 4096 + 32) + 2 * 128 * (2304 + 4096) + 2 * 4096 + 32 + 4 * 3 * 4096 + 128,
        ),
        ("mla(num_heads=32)", 2304, 2304 * (32 * 192 + 576 + 32 * 128) + 512 + 512 * 32 * 256),
        # two further steps are two further keys, values and strengths, each with its taps
        (
            "deltaproduct(num_heads=6, head_dim=128, num_steps=3)",
            768,
            768**2 * (2 + 3 + 3) + 768 * 18 + 4 * 768 * (1 + 3 + 3) + 128,
        ),
        # RWKV-7 of width 768: the maps of r, k, v, o; ranks 64, 64, 128; six shifts, k_k, k_a, r_k, norm
        ("rwkv7", 768, 4 * 768**2 + 2 * 768 * (64 + 64 + 128) + 2 * 768 + 6 * 768 + 3 * 768 + 2 * 768),
    ],
)
def test_published_sizes(spec: str, d_model: int, expected: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_mixer(spec, d_model).parameters()) == expected


@pytest.mark.parametrize(
    ("spec", "d_model", "expected"),
    [
        ("deltanet(num_heads=2)", 16, 2 * 8 * 8 + 3 * 3 * 16),
        ("deltanet(num_heads=2, conv_size=0)", 16, 2 * 8 * 8),
        ("gated_deltanet(num_heads=1, num_v_heads=2, head_dim=4)", 16, 2 * 4 * 8 + 3 * (2 * 4 + 2 * 8)),
        ("kda(num_heads=2, head_dim=4)", 16, 2 * 4 * 4 + 3 * 24),
        ("gated_deltanet2(num_heads=2, head_dim=4)", 16, 2 * 4 * 4 + 3 * 24),
        ("deltaproduct(num_heads=2, num_steps=3)", 16, 2 * 8 * 8 + 3 * (16 + 3 * 32)),
        ("rwkv7(head_dim=4)", 16, 16 * (4 + 1)),
    ],
)
def test_state_has_the_size_on_the_card(spec: str, d_model: int, expected: int) -> None:
    state = build_mixer(spec, d_model).init_state(3)
    assert sum(x.numel() for x in state_tensors(state)) == 3 * expected


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "lowest"), [("gated_deltanet", 0.0), ("kda", 1.0), ("gated_deltanet2", 1.0), ("mamba2", 1.0)]
)
def test_initial_decays(name: str, lowest: float) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"head_dim": 8} if name == "mamba2" else {"num_heads": 64, "head_dim": 8}
    mixer = build_mixer({"name": name, **options}, 64 * 8)
    A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)  # type: ignore[operator, arg-type]
    assert A.min() >= lowest - 1e-6 and A.max() <= 16 + 1e-4 and A.mean() > 7
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert math.log(1e-2) == pytest.approx(float(dt.log().mean()), abs=0.4)


@torch.no_grad()
def test_initial_matrices() -> None:
    torch.manual_seed(0)
    gdn, plain = build_mixer("gated_deltanet(num_heads=4, head_dim=64)", 256), build_mixer("deltanet", 256)
    for name, p in gdn.named_parameters():
        if name.endswith("proj.weight"):
            assert float(p.abs().max()) == pytest.approx(2**-2.5 * (6 / sum(p.shape)) ** 0.5, rel=0.02), name
    assert float(plain.q_proj.weight.std()) == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr, operator]
    for name in ("kda", "gated_deltanet2"):
        bounded = build_mixer(f"{name}(num_heads=2, head_dim=4, gate_bound=5.0)", 16)
        assert not bounded.A_log.any()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["kda", "gated_deltanet2"])
@pytest.mark.parametrize("options", [{}, {"gate_bound": 5.0}])
def test_saturated_gates_have_finite_gradients(name: str, options: dict[str, float]) -> None:
    mixer = build_mixer({"name": name, "num_heads": 2, "head_dim": 4, **options}, 16)
    torch.nn.init.constant_(mixer.A_log, 20.0)  # type: ignore[arg-type]
    for f in (-50.0, 50.0):
        torch.nn.init.constant_(mixer.dt_bias, f)  # type: ignore[arg-type]
        y, _ = mixer(torch.randn(1, 9, 16))
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kda", "gated_deltanet2"])
def test_bounded_gate_stays_in_its_bounds(name: str) -> None:
    mixer: Any = random_mixer(torch.Generator().manual_seed(0), name, 16, num_heads=2, head_dim=4, gate_bound=5.0)
    g = mixer.strengths(100 * torch.randn(1, 50, 16, dtype=torch.float64)).g
    assert -5 <= g.min() < -4.9 and -0.1 < g.max() <= 0


@torch.no_grad()
def test_latent_cache_holds_one_vector_a_token() -> None:
    mixer = random_mixer(torch.Generator().manual_seed(0), "mla", 16, num_heads=4, kv_rank=12, nope_dim=4, rope_dim=2)
    for tokens in (3, 5):
        _, state = mixer(torch.randn(2, tokens, 16, dtype=torch.float64))
        assert sum(x[0].numel() for x in (state.k, state.v)) == tokens * (12 + 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mla", "attention"])
def test_without_positions_the_order_of_the_past_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"kv_rank": 12, "nope_dim": 4, "rope_dim": 2} if name == "mla" else {}
    x = torch.randn(1, 9, 16, dtype=torch.float64, generator=generator)
    shuffled = torch.cat([x[:, torch.randperm(8, generator=generator)], x[:, 8:]], 1)
    for rope in (False, True):
        mixer = random_mixer(generator, name, 16, num_heads=2, rope=rope, **options)
        assert torch.allclose(mixer(x)[0][:, 8], mixer(shuffled)[0][:, 8], rtol=1e-10, atol=1e-12) is not rope


@torch.no_grad()
def test_joint_norm_of_queries_spans_the_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=generator)

    def change(qk_norm: bool | str) -> Tensor:
        """What a larger first head of queries does to the reading of the second."""
        mixer = random_mixer(generator, "attention", 16, num_heads=2, qk_norm=qk_norm)
        torch.nn.init.eye_(mixer.o_proj.weight)
        before = mixer(x)[0]
        mixer.q_proj.weight[:8] *= 10
        return (mixer(x)[0] - before)[..., 8:].abs().max()

    assert change("joint") > 1e-3 and change(True) < 1e-12


@torch.no_grad()
def test_partial_rotation_leaves_the_other_channels() -> None:
    mixer = random_mixer(torch.Generator().manual_seed(0), "attention", 16, num_heads=2, rope_fraction=0.25)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    y = mixer.rotate(x, torch.arange(5))
    assert torch.equal(y[..., 2:], x[..., 2:]) and not torch.equal(y[:, 1:, :, :2], x[:, 1:, :, :2])
    with pytest.raises(ValueError, match="rope_fraction"):
        build_mixer("attention(num_heads=2, rope_fraction=0.2)", 16)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kda", "gated_deltanet2", "deltaproduct"])
def test_value_heads_that_share_a_key_equal_repeated_keys(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"deltaproduct": {"gate": True, "num_steps": 3}}.get(name, {})
    shared: Any = random_mixer(generator, name, 16, num_heads=2, num_v_heads=4, head_dim=4, **options)
    full: Any = random_mixer(generator, name, 16, num_heads=4, head_dim=4, **options)
    of_keys = {"q_proj.weight", "k_proj.weight"}
    if name == "gated_deltanet2":  # erase and forget gates go with the key
        of_keys |= {"b_proj.weight", "f_proj.1.weight", "dt_bias", "A_log"}
    for key, p in full.named_parameters():
        source = shared.get_parameter(key)
        if key == "conv.weight":
            n = full.substeps
            q, k, v = source.split([8, 8 * n, 16 * n])
            q, k = (y.unflatten(0, (-1, 2, 4)).repeat_interleave(2, 1).flatten(0, 2) for y in (q, k))
            source = torch.cat([q, k, v])
        elif key in of_keys:
            rows = (-1, 2) if key == "A_log" else (-1, 2, 4)
            source = source.unflatten(0, rows).repeat_interleave(2, 1).flatten(0, len(rows) - 1)
        p.copy_(source)
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(shared(x)[0], full(x)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("neg_eigval", "least", "worst"), [(False, 0.144, 2 / 3**0.5), (True, 0.347, 2**0.5)])
def test_least_decay_makes_the_channelwise_transition_a_contraction(
    neg_eigval: bool, least: float, worst: float
) -> None:
    """Over erase gates of 0 and their largest value, for keys that spread over two channels: the worst there are."""
    mixer: Any = random_mixer(
        torch.Generator().manual_seed(0), "gated_deltanet2", 16, num_heads=2, neg_eigval=neg_eigval, least_decay=least
    )
    strengths = mixer.strengths(100 * torch.randn(1, 200, 16, dtype=torch.float64))
    assert strengths.g.max() <= -least
    angle = torch.linspace(0, torch.pi / 2, 1000, dtype=torch.float64)
    k = torch.stack([angle.cos(), angle.sin()], -1)
    erase = torch.tensor([0.0, strengths.beta.max().ceil()])
    norms = torch.linalg.matrix_norm(torch.eye(2) - k[:, :, None] * (erase * k)[:, None, :], 2)
    assert norms.max() == pytest.approx(worst, rel=1e-4)
    assert norms.max() * math.exp(-least) <= 1
