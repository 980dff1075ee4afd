"""The layer of MinMax cascades starts as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linnet.mixers import build_mixer


@torch.no_grad()
@pytest.mark.parametrize("asymmetric", [False, True])
def test_initial_weights(asymmetric: bool) -> None:
    torch.manual_seed(0)
    spec = f"minmax_block(state_dim=512, asymmetric={asymmetric})"
    block: Any = build_mixer(spec, 256, layer=1, num_layers=4)
    small, lower = (2 / (5 * 256)) ** 0.5, (2 / 256) ** 0.5
    expected = {
        "up": small,
        "neuron.r_proj": small,
        "neuron.g_proj": small,
        "neuron.s_proj": lower if asymmetric else small,
        "down": 2 / (4 * 256**0.5),
        "neuron.o_proj": 2 / (4 * 512**0.5),
    }
    for name, std in expected.items():
        proj = block.get_submodule(name)
        assert float(proj.weight.std()) == pytest.approx(std, rel=0.02), name
        assert bool((proj.bias == float(asymmetric and name == "neuron.s_proj")).all()), name


def test_published_sizes() -> None:
    with torch.device("meta"):
        for d_model, cells, expected in ((512, 512, 16_632_224 // 8), (728, 1456, 75_877_440 // 12)):
            block = build_mixer(f"minmax_block(state_dim={cells})", d_model)
            assert sum(p.numel() for p in block.parameters()) == expected
