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


@pytest.fixture(autouse=True, scope="session")
def _slices_in_the_interpreter() -> Iterator[None]:
    """Triton's interpreter scans and reduces with a function of one's own element by element, in minutes; here the same
    function takes whole slices."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def prefixes(self: Any, given: tuple[Any, ...]) -> list[list[Any]]:
        slices = [np.split(x.handle.data, x.handle.data.shape[self.axis], self.axis) for x in given]
        dtypes = [x.dtype for x in given]
        done = [[part] for part, *_ in slices]
        for step in list(zip(*slices, strict=True))[1:]:
            before = (self.to_tensor(column[-1], dtype) for column, dtype in zip(done, dtypes, strict=True))
            both = self.combine_fn.fn(*before, *map(self.to_tensor, step, dtypes))
            for column, x in zip(done, both, strict=True):
                column.append(x.handle.data)
        return done

    def scan(self: Any, given: tuple[Any, ...]) -> list[Any]:
        return [
            self.to_tensor(np.concatenate(column, self.axis), x.dtype)
            for column, x in zip(prefixes(self, given), given, strict=True)
        ]

    def reduce(self: Any, given: tuple[Any, ...]) -> list[Any]:
        last = [column[-1] if self.keep_dims else column[-1].squeeze(self.axis) for column in prefixes(self, given)]
        return [self.to_tensor(y, x.dtype) for y, x in zip(last, given, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanOps, "generic_scan", scan)
        patch.setattr(ReduceOps, "generic_reduce", reduce)
        yield
