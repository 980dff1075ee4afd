"""The delta kernels compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from ahead_of_time import BLACKWELL, HOPPER, MI300, SHARED_MEMORY, Launch, build, launches
from torch import Tensor
from triton.backends.compiler import GPUTarget

from linnet.ops.delta import launch

CALLS: dict[str, dict[str, Any]] = {
    "scalar": {"gate": "scalar"},
    "packed substeps": {"gate": "none", "substeps": 2, "lengths": [100, 300]},
    "channel-wise": {"gate": "vector", "channelwise": True},
    "untied": {"gate": "vector", "untied": True},
}


def recorded(
    K: int = 128,
    V: int = 128,
    *,
    gate: str,
    dtype: torch.dtype = torch.bfloat16,
    channelwise: bool = False,
    untied: bool = False,
    substeps: int = 1,
    lengths: list[int] | None = None,
) -> list[Launch]:
    """What forward and backward of a call launch."""
    B, T, H = (4, 400, 16) if lengths is None else (1, sum(lengths), 16)
    rows, R = B if lengths is None else len(lengths), T * substeps
    cu = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    g = {"none": None, "scalar": torch.empty(B, T, H), "vector": torch.empty(B, T, H, K)}[gate]
    beta = None if untied else torch.empty(B, R, H, K) if channelwise else torch.empty(B, R, H)
    w = torch.empty(B, R, H, V) if channelwise else None
    given = (empty(B, T, H, K), empty(B, R, H, K), empty(B, R, H, V), beta, g, w, torch.empty(rows, H, K, V))
    options = (cu, 1.0, not untied, 2 if untied else substeps)
    ab = (empty(B, T, H, K), empty(B, T, H, K)) if untied else None

    def call() -> None:
        o, last, matrices, decays = launch.forward(*given, *options, True, ab)
        assert matrices is not None and decays is not None
        launch.backward(*given, matrices, decays, *options, o, last, ab)

    return launches(call)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_hopper(name: str) -> None:
    for one in recorded(**CALLS[name]):
        built = build(one, HOPPER)
        assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
        if one.kernel.__name__ in ("local_kernel", "state_kernel", "adjoint_kernel", "pairs_kernel", "gradient_kernel"):
            assert "wgmma.mma_async" in built.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "kernel"),
    [(BLACKWELL, "state_kernel"), (BLACKWELL, "gradient_kernel"), (MI300, "local_kernel"), (MI300, "adjoint_kernel")],
    ids=["sm_100-state", "sm_100-gradient", "gfx942-local", "gfx942-adjoint"],
)
def test_compiles_for_other_gpus(target: GPUTarget, kernel: str) -> None:
    assert build(next(one for one in recorded(gate="scalar") if one.kernel.__name__ == kernel), target).asm


@pytest.mark.parametrize(
    ("width", "dtype"), [(32, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)], ids=["32", "256", "fp32"]
)
@pytest.mark.parametrize("kernel", ["state_kernel", "adjoint_kernel"])
def test_every_width_fits(width: int, dtype: torch.dtype, kernel: str) -> None:
    for gate in ("scalar", "vector") if dtype == torch.bfloat16 else ("scalar",):
        one = next(one for one in recorded(width, width, gate=gate, dtype=dtype) if one.kernel.__name__ == kernel)
        assert build(one, HOPPER).metadata.shared <= SHARED_MEMORY[HOPPER]
