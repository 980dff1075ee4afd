"""What the papers fix beyond the equations: initial values, sizes, and the numerics of the gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linnet.mixers import build_mixer, mixers
from linnet.mixers.claims import reading
from linnet.mixers.retnet import log_gamma
from linnet.ops.core import state_tensors


def _parameters(mixer: nn.Module) -> int:
    return sum(p.numel() for p in mixer.parameters())


def test_the_mixers_of_the_decay_engine() -> None:
    names = {name for name, cls in mixers().items() if cls.card.engine == "decay"}
    assert names >= {
        "gla", "gsa", "hgrn2", "lightning", "linear_attention", "mamba2", "mlstm", "retnet", "rwkv6", "simple_gla",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "d_model", "expected"),
    [
        # GLA 340M: K = 128, V = 256; q, k of d/2, v, g, o of d; the gate d*16 + 16*d/2 + d/2; the norm of V
        ("gla", 1024, 4 * 1024**2 + 1024 * 16 + 16 * 512 + 512 + 256),
        # RetNet: q, k of d, v, g, o of 2d
        ("retnet", 1024, 8 * 1024**2 + 256),
        # Mamba-2 130M: in_proj, conv (width 4, bias), A, dt, D, norm, out_proj
        ("mamba2", 768, 768 * (2 * 1536 + 256 + 24) + 5 * (1536 + 256) + 3 * 24 + 1536 + 1536 * 768),
        # xLSTM-7B: q, k of d/2, v, g, o of d, two gates with bias, a norm weight per channel
        ("mlstm(num_heads=8)", 4096, 4 * 4096**2 + 2 * (4096 * 8 + 8) + 4096),
        ("hgrn2", 1024, 4 * 1024**2 + 1024),
    ],
)
def test_published_sizes(spec: str, d_model: int, expected: int) -> None:
    with torch.device("meta"):
        assert _parameters(build_mixer(spec, d_model)) == expected


@pytest.mark.parametrize(
    ("spec", "d_model", "expected"),
    [
        ("linear_attention(num_heads=2)", 16, 2 * (8 * 8 + 8)),
        ("linear_attention(num_heads=2, normalize=False)", 16, 2 * 8 * 8),
        ("retnet(num_heads=2)", 16, 2 * 8 * 16 + 1),
        ("lightning(num_heads=2)", 16, 2 * 8 * 8),
        ("simple_gla(num_heads=2)", 16, 2 * 4 * 8),
        ("gla(num_heads=2, conv_size=3)", 16, 2 * 4 * 8 + 2 * (8 + 8 + 16)),
        ("mamba2(head_dim=8, state_dim=5)", 16, 4 * 5 * 8 + 3 * (32 + 2 * 5)),
        ("hgrn2(head_dim=4)", 16, 16 * 4),
        ("rwkv6(head_dim=4)", 16, 16 * (4 + 1)),
        ("gsa(num_heads=2, num_slots=3)", 16, 2 * (8 * 3 + 3 * 8)),
        ("mlstm(num_heads=2)", 16, 2 * (4 * 8 + 4 + 1)),
        ("mlstm(num_heads=2, gate='sigmoid')", 16, 2 * 4 * 8),
    ],
)
def test_state_has_the_size_on_the_card(spec: str, d_model: int, expected: int) -> None:
    state = build_mixer(spec, d_model).init_state(3)
    assert sum(x.numel() for x in state_tensors(state)) == 3 * expected


def test_retnet_decays() -> None:
    gamma = log_gamma(8, torch.zeros(0)).exp()
    torch.testing.assert_close(gamma, torch.tensor([1 - 2.0 ** (-5 - h) for h in range(8)]))
    assert log_gamma(8, torch.zeros(0, dtype=torch.bfloat16)).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightning_forgets_less_with_depth_and_not_in_head_0(dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # of weights with which nothing that is written is nearly zero
    x = torch.zeros(1, 5, 16, dtype=dtype)
    x[:, 0] = torch.randn(16)
    for layer in range(3):
        mixer: Any = build_mixer("lightning(num_heads=4)", 16, layer=layer, num_layers=3).to(dtype)
        first, last = mixer(x[:, :1])[1].S, mixer(x)[1].S  # no writes after the first token: silu(0) = 0
        rates = (first / last).flatten(2).mean(-1)[0].log() / 4
        expected = torch.tensor([8 * h / 4 * (1 - layer / 3) for h in range(4)])
        torch.testing.assert_close(rates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_hgrn2_gates_start_above_layer_over_layers(layer: int) -> None:
    mixer: Any = build_mixer("hgrn2(head_dim=8)", 16, layer=layer, num_layers=4)
    nn.init.constant_(mixer.f_proj.weight, -100.0)
    f = mixer.log_decay(torch.ones(1, 1, 16)).exp()
    torch.testing.assert_close(f, torch.full_like(f, layer / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hgrn2_writes_next_to_open_gates_without_cancellation(dtype: torch.dtype) -> None:
    mixer: Any = build_mixer("hgrn2(head_dim=1)", 2)
    nn.init.constant_(mixer.f_proj.weight, 8.0)
    nn.init.constant_(mixer.v_proj.weight, 0.5)
    written = mixer.to(dtype)(torch.ones(1, 1, 2, dtype=dtype))[1].S.double().flatten()
    exact = torch.sigmoid(torch.tensor(-16.0, dtype=torch.float64)).expand(2)  # 1 - f, far below the spacing at 1
    torch.testing.assert_close(written, exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_mamba2_step_sizes_and_decays() -> None:
    mixer: Any = build_mixer("mamba2(head_dim=1)", 512)
    dt = torch.nn.functional.softplus(mixer.dt_bias.detach())
    A = mixer.A_log.detach().exp()
    assert 1e-3 * 0.999 <= float(dt.min()) < 2e-3 and 0.05 < float(dt.max()) <= 0.1 * 1.001
    assert abs(float(dt.log().mean()) - math.log(1e-2)) < 0.15  # log-uniform
    assert 1 <= float(A.min()) < 1.5 and 15 < float(A.max()) <= 16
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert mixer.norm.eps == 1e-5


def test_mlstm_gates_start_shut_and_open() -> None:
    mixer: Any = build_mixer("mlstm(num_heads=4)", 32)
    assert mixer.i_gate.bias.tolist() == [-10.0] * 4
    assert mixer.f_gate.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert (mixer.head_k, mixer.head_v, mixer.eps, mixer.norm.eps) == (4, 8, 1e-6, 1e-6)
    nn.init.constant_(mixer.i_gate.bias, 1e4)
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    assert mixer(x)[1].m.abs().max() <= 15  # soft-capped


def test_rwkv6_starts_as_published() -> None:
    D, layer, L = 8, 1, 3
    mixer: Any = build_mixer("rwkv6(head_dim=4)", D, layer=layer, num_layers=L)
    depth, rest = layer / (L - 1), 1 - layer / L
    i = torch.arange(D) / D
    n = torch.arange(D) / (D - 1)
    torch.testing.assert_close(mixer.mix_x.data, 1 - i**rest)
    torch.testing.assert_close(mixer.mix[0].data, 1 - i**rest)
    torch.testing.assert_close(mixer.mix[2].data, 1 - (i**rest + 0.3 * depth))
    torch.testing.assert_close(mixer.mix[4].data, 1 - i ** (0.5 * rest))
    torch.testing.assert_close(mixer.decay_up.bias.data, -6 + 5 * n ** (0.7 + 1.3 * depth))
    zigzag = torch.tensor([0.0, 0.1, -0.1, 0.0, 0.1, -0.1, 0.0, 0.1])
    torch.testing.assert_close(mixer.bonus.data.flatten(), depth * (1 - n) + zigzag)
    assert not mixer.mix_down.weight.any() and not mixer.decay_down.weight.any()
    assert 0 < mixer.mix_up.abs().max() <= 0.01 and 0 < mixer.decay_up.weight.abs().max() <= 0.01
    assert mixer.norm.eps == 64e-5


def test_gla_gate_normalizer_lengthens_the_memory() -> None:
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    for spec in ("gla(num_heads=2)", "simple_gla(num_heads=2)"):
        torch.manual_seed(0)
        mixer: Any = build_mixer(spec, 16)
        g = mixer.log_decay(x).detach()
        assert g.dtype == torch.float32 and float(g.max()) < 0
        assert 0.9 < float(g.exp().mean()) < 0.99  # sigmoid(0)^(1/16) = 0.958
        mixer.gate_logit_normalizer = 1.0
        torch.testing.assert_close(mixer.log_decay(x).detach(), 16 * g)


def test_shared_key_value_heads_equal_repeated_ones() -> None:
    torch.manual_seed(0)
    shared: Any = build_mixer("gla(num_heads=4, num_kv_heads=2)", 16).double()
    full: Any = build_mixer("gla(num_heads=4)", 16).double()

    def repeat(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)

    state = {
        name: repeat(p) if name in ("k_proj.weight", "v_proj.weight", "gate.1.weight", "gate.1.bias") else p
        for name, p in shared.state_dict().items()
    }
    full.load_state_dict(state)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(shared(x)[0], full(x)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_mlstm_gates_transfer_alike_behind_the_norm() -> None:
    """The gain from input to normalised output against the input gate, for both gates (TFLA, section 5)."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, 64)
    gains = {}
    for gate in ("exp", "sigmoid"):
        torch.manual_seed(1)
        mixer: Any = build_mixer({"name": "mlstm", "num_heads": 2, "gate": gate, "gate_soft_cap": None}, 64)
        nn.init.zeros_(mixer.f_gate.weight)
        nn.init.constant_(mixer.f_gate.bias, 3.0)
        for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
            nn.init.normal_(layer.weight, std=64**-0.5)
        nn.init.zeros_(mixer.i_gate.weight)
        for bias in (-14.0, -8.0, 0.0):
            nn.init.constant_(mixer.i_gate.bias, bias)
            h = reading(mixer, x)
            gains[gate, bias] = mixer.norm(h).square().mean().sqrt().item()
    for bias in (-14.0, -8.0, 0.0):
        assert abs(gains["exp", bias] - gains["sigmoid", bias]) < 0.02
    assert gains["exp", -14.0] < 0.05 < 0.4 < gains["exp", -8.0] < 0.95 < gains["exp", 0.0]


@torch.no_grad()
@pytest.mark.parametrize("coupled", [False, True])
def test_lstm_starts_with_memories_up_to_the_expected_one(coupled: bool) -> None:
    torch.manual_seed(0)
    mixer: Any = build_mixer(f"lstm(num_heads=4, memory=100, coupled={coupled})", 512)
    gates = mixer.bias.view(4, mixer.gates, 128)
    times = gates[:, -3].exp()  # sigmoid(log t) keeps 1 - 1 / (1 + t) a token
    assert 1 <= times.min() < 3 and 97 < times.max() <= 99
    assert float(times.mean()) == pytest.approx(50, rel=0.06)
    assert not gates[:, -2:].any()
    if not coupled:
        assert torch.equal(gates[:, 0], -gates[:, 1])
    with pytest.raises(ValueError, match=r"^memory: expected at least 3 tokens or None, got 2"):
        build_mixer("lstm(num_heads=4, memory=2)", 512)
