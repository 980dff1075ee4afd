"""Room for the graphs of torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linnet.training import allow_graphs


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_every_layer_has_its_own_graphs():
    def compiled(count):
        torch.compiler.reset()
        layers = [Scaled(i) for i in range(count)]
        for layer in layers:
            layer.compile(fullgraph=True, backend="eager")
        return [float(layer(torch.ones(()))) for layer in layers]

    with torch._dynamo.config.patch(recompile_limit=8):
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(12)
        allow_graphs(12)
        assert compiled(12) == [*range(12)]
        limit = torch._dynamo.config.recompile_limit
        allow_graphs(1)
        assert torch._dynamo.config.recompile_limit == limit
