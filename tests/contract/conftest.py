"""Settings of the contract suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _exact_matmul() -> Iterator[None]:
    """No TF32: the suite bounds fp32 by fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled code of one test never counts against the recompilation limit of the next."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()
