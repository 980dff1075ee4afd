"""The delta kernels compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from ahead_of_time import BLACKWELL, HOPPER, MI300, SHARED_MEMORY, Launch, build, launches
from torch import Tensor
from triton.backends.compiler import GPUTarget

from linnet.ops.delta import launch

SCALAR = ("local_kernel", "state_kernel", "adjoint_kernel", "gradient_kernel")
VECTOR = ("prepare_kernel", "hard_kernel", "hard_gradient_kernel", "finish_kernel")

# Modes, and the kernels that differ from those of the modes before.
CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "scalar": ({"gate": "scalar"}, SCALAR),
    "packed substeps": ({"gate": "none", "substeps": 2, "lengths": [100, 300]}, ("local_kernel", "state_kernel")),
    "channel-wise": ({"gate": "vector", "channelwise": True}, (*SCALAR, *VECTOR)),
    "channel-wise in fp32": ({"gate": "vector", "channelwise": True, "gates": torch.float32}, ("state_kernel",)),
    "untied": ({"gate": "vector", "untied": True}, ("prepare_kernel", "gradient_kernel", "finish_kernel")),
    "few heads": ({"gate": "vector", "heads": 1}, ("state_kernel", "chain_kernel")),
}


def recorded(
    K: int = 128,
    V: int = 128,
    *,
    gate: str,
    dtype: torch.dtype = torch.bfloat16,
    channelwise: bool = False,
    gates: torch.dtype = torch.bfloat16,
    write: torch.dtype | None = None,
    untied: bool = False,
    substeps: int = 1,
    lengths: list[int] | None = None,
    heads: int = 16,
    target: GPUTarget = HOPPER,
) -> list[Launch]:
    """What forward and backward of a call launch on such a GPU."""
    B, T, H = (4 if heads > 1 else 1, 400, heads) if lengths is None else (1, sum(lengths), heads)
    rows, R = B if lengths is None else len(lengths), T * substeps
    cu = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    g = {"none": None, "scalar": torch.empty(B, T, H), "vector": torch.empty(B, T, H, K)}[gate]
    beta = None if untied else torch.empty(B, R, H, K, dtype=gates) if channelwise else torch.empty(B, R, H)
    write = gates if channelwise else write
    w = None if write is None else torch.empty(B, R, H, V, dtype=write)
    given = (empty(B, T, H, K), empty(B, R, H, K), empty(B, R, H, V), beta, g, w, torch.empty(rows, H, K, V))
    options = (cu, 1.0, not untied, 2 if untied else substeps)
    ab = (empty(B, T, H, K), empty(B, T, H, K)) if untied else None

    def call() -> None:
        o, last, matrices, decays = launch.forward(*given, *options, True, ab)
        assert matrices is not None and decays is not None
        launch.backward(*given, matrices, decays, *options, o, last, ab)

    with mock.patch.object(launch, "has_tma", lambda device: target.backend == "cuda"):
        return launches(call)


def one_launch(kernel: str, K: int = 128, V: int = 128, **mode: Any) -> Launch:
    """The first launch of a kernel in a call."""
    return next(one for one in recorded(K, V, **mode) if one.kernel.__name__ == kernel)


@pytest.mark.parametrize(
    ("name", "kernel"), [(name, kernel) for name, (_, kernels) in CALLS.items() for kernel in kernels]
)
def test_compiles_for_hopper(name: str, kernel: str) -> None:
    built = build(one_launch(kernel, **CALLS[name][0]), HOPPER)
    assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
    if kernel in SCALAR:  # wgmma takes four warps; packed sequences lie at no equal distances
        assert ("mma.sync" if kernel == "local_kernel" else "wgmma.mma_async") in built.asm["ptx"]
        assert ("cp.async.bulk.tensor" in built.asm["ptx"]) == ("lengths" not in CALLS[name][0])


def test_parts_are_for_few_heads_and_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda *given: 132)
    gpu = torch.device("cuda")
    assert launch.part_length(512, 132, gpu) == 512 and launch.part_length(16, 4, gpu) == 16
    assert [launch.part_length(512, programs, gpu) for programs in (2, 8, 33)] == [32, 32, 128]


def test_parts_cover_packed_sequences() -> None:
    lengths, K = [1, 0, 200, 64, 130], 16
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.empty(1, sum(lengths), 1, K, dtype=torch.bfloat16)
    parts = launch._Layout(q, q, launch._Modes(None, None, None), 1, cu, 2).parts
    assert parts is not None
    assert parts.before.tolist() == [0, 1, 1, 3, 4, 6]  # type: ignore[union-attr]
    assert parts.cu.tolist() == [0, 1, 129, 201, 265, 393, 395]  # type: ignore[union-attr]
    assert parts.first.tolist() == [0, 1, 3, 5, 6, 8, 9]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "kernel"), [(BLACKWELL, "state_kernel"), (MI300, "local_kernel")], ids=["sm_100-state", "gfx942-local"]
)
def test_compiles_for_other_gpus(target: GPUTarget, kernel: str) -> None:
    assert build(one_launch(kernel, gate="scalar", target=target), target).asm


# Of 256 keys, and whether tiles come through descriptors: where two stages of them surely have room.
WIDE: dict[str, tuple[str, dict[str, Any], bool]] = {
    "state, scalar, w in 32 bits": ("state_kernel", {"gate": "scalar", "write": torch.float32}, False),
    "gradient, scalar": ("gradient_kernel", {"gate": "scalar"}, True),
    "state, vector": ("state_kernel", {"gate": "vector"}, False),
    "adjoint, vector": ("adjoint_kernel", {"gate": "vector"}, False),
    "state in fp32": ("state_kernel", {"gate": "scalar", "dtype": torch.float32}, False),
}


@pytest.mark.parametrize(("kernel", "mode", "copied"), WIDE.values(), ids=WIDE)
def test_wide_states_fit(kernel: str, mode: dict[str, Any], copied: bool) -> None:
    built = build(one_launch(kernel, 256, 256, **mode), HOPPER)
    assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
    assert ("cp.async.bulk.tensor" in built.asm["ptx"]) == copied
