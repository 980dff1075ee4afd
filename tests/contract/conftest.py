"""Settings of the contract suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(autouse=True)
def _poison_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that calculates with what nobody has written fails, every time and not once in many: fresh memory holds
    NaNs that NumPy warns of when they are added or multiplied."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return

    def poisoned(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and x.is_contiguous():
                x.view(torch.int32).fill_(0x7FA00000)  # a signalling NaN
            return x

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
