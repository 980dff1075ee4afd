from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import parts
from linnet.ops import ConvState, DecayState, Segments


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(module: nn.Module) -> Any:
    for i, p in enumerate(module.double().parameters()):
        p.data.copy_(_random(*p.shape, seed=i))
    return module


def test_norm_is_rms_norm_layer_norm_and_group_norm() -> None:
    x = _random(2, 5, 3, 8)
    rms = _draw(parts.Norm(8, 1e-3))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (8,), rms.weight, 1e-3))
    layer = _draw(parts.Norm(8, 1e-3, center=True))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (8,), layer.weight, None, 1e-3))
    group = _draw(parts.Norm(8, 1e-3, num_heads=3, center=True, bias=True))
    want = F.group_norm(x.reshape(10, 24), 3, group.weight, group.bias, 1e-3)
    torch.testing.assert_close(group(x), want.view_as(x))


def test_norm_of_what_fp32_cannot_square() -> None:
    norm = parts.Norm(8, 1e-5)
    x = _random(4, 8).float()
    small = x.clone().requires_grad_()
    large = (x * 2.0**70).requires_grad_()
    torch.testing.assert_close(norm(large), norm(small), rtol=1e-4, atol=1e-4)
    norm(large).sum().backward()
    norm(torch.zeros(1, 8)).sum().backward()
    assert large.grad is not None and large.grad.isfinite().all()


@pytest.mark.parametrize("center", [False, True])
def test_norm_computes_in_fp32(center: bool) -> None:
    norm = parts.Norm(64, 1e-6, center=center)
    x = (_random(8, 64) + 30).bfloat16()  # a mean that would swallow the variance in half precision
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=0, atol=0)
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_norm_refuses_a_negative_eps() -> None:
    with pytest.raises(ValueError, match="norm_eps: expected a number above 0, got -1"):
        parts.Norm(8, -1)


def test_gate_linear_adds_its_bias_in_fp32() -> None:
    gate = parts.GateLinear(8, 2)
    assert not gate.bias.any()
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([6.01, -10.03]))
    with torch.autocast("cpu", torch.bfloat16):
        y = gate(torch.ones(1, 3, 8))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[0, 0], gate.bias.detach())
    assert gate.bfloat16()(torch.ones(1, 3, 8).bfloat16()).dtype == torch.float32
    assert gate.double()(torch.ones(1, 3, 8).double()).dtype == torch.float64


def test_soft_cap() -> None:
    x = torch.tensor([-1e4, -1.0, 0.0, 1e4])
    assert parts.soft_cap(x, None) is x
    torch.testing.assert_close(parts.soft_cap(x, 15.0), torch.tensor([-15.0, -0.998521, 0.0, 15.0]))


@pytest.mark.parametrize("bias", [False, True])
def test_short_conv_is_a_depthwise_conv1d_over_its_streams(bias: bool) -> None:
    conv = _draw(parts.ShortConv(6, 4, bias=bias))
    a, b = _random(2, 9, 4), _random(2, 9, 2, seed=1)
    (ya, yb), state = conv(a, b)
    x = torch.cat([a, b], -1)
    want = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight[:, None], conv.bias, groups=6)).transpose(1, 2)
    torch.testing.assert_close(torch.cat([ya, yb], -1), want)
    torch.testing.assert_close(state.tail, x[:, -3:])
    assert conv.init_state(2).tail.shape == state.tail.shape


def test_token_shift_keeps_sequences_apart() -> None:
    x = _random(1, 7, 2)
    last = ConvState(_random(3, 1, 2, seed=1))
    shifted, state = parts.token_shift(x, last, Segments.from_lengths([3, 0, 4]))
    want = torch.cat([last.tail[0], x[0, :2], last.tail[2], x[0, 3:6]])
    assert torch.equal(shifted[0], want)
    assert torch.equal(state.tail[:, 0], torch.stack([x[0, 2], last.tail[1, 0], x[0, 6]]))
    assert not parts.token_shift(x, None, None)[0][:, 0].any()


def test_positions_continue() -> None:
    x = torch.zeros(2, 3, 1)
    positions, seen = parts.count_positions(x, None, None)
    assert positions.tolist() == [[0, 1, 2]] * 2 and seen.tolist() == [3, 3]
    positions, seen = parts.count_positions(x, torch.tensor([5, 0]), None)
    assert positions.tolist() == [[5, 6, 7], [0, 1, 2]] and seen.tolist() == [8, 3]
    packed = Segments.from_lengths([2, 0, 1])
    positions, seen = parts.count_positions(torch.zeros(1, 3, 1), torch.tensor([7, 9, 1]), packed)
    assert positions.tolist() == [[7, 8, 1]] and seen.tolist() == [9, 9, 2]
    with pytest.raises(ValueError, match=r"state\.position: expected shape \[3\]"):
        parts.count_positions(torch.zeros(1, 3, 1), torch.zeros(2, dtype=torch.int64), packed)


def test_checks_name_the_option() -> None:
    assert parts.head_size("expand_k", 32, 0.5, 4) == 4
    with pytest.raises(ValueError, match=r"num_heads, expand_k: .* got 0\.5 \* 32 and num_heads=3"):
        parts.head_size("expand_k", 32, 0.5, 3)
    assert parts.check_divisor("head_dim", 8, 32, "d_model") == 4
    with pytest.raises(ValueError, match="head_dim: expected a divisor of d_model = 32, got 0"):
        parts.check_divisor("head_dim", 0, 32, "d_model")
    with pytest.raises(ValueError, match=r"num_slots: expected a whole number of at least 1, got 2\.5"):
        parts.check_count(num_slots=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate: expected one of exp, sigmoid; got 'relu'"):
        parts.check_choice("gate", "relu", ("exp", "sigmoid"))
    with pytest.raises(ValueError, match=r"conv_size: expected 0 .* got 1"):
        parts.check_conv_size(1)
    with pytest.raises(ValueError, match="layer: expected 0 <= layer < num_layers = 3, got 3"):
        parts.check_depth(3, 3)


def test_unpack() -> None:
    assert parts.unpack(None, parts.DecayConvState) == (None, None)
    with pytest.raises(ValueError, match=r"state: expected a DecayConvState .* got DecayState"):
        parts.unpack(DecayState(torch.zeros(1)), parts.DecayConvState)


def test_assign_writes_sharded_parameters(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        parts.assign(parameter, torch.arange(4.0))
        assert isinstance(parameter.data, DTensor)
        assert parameter.full_tensor().tolist() == [0, 1, 2, 3]
    finally:
        distributed.destroy_process_group()
