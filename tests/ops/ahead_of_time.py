"""Compiling the kernels of a call ahead of time, for GPUs that are not here.

:func:`launches` runs a launcher on CPU tensors with Triton's launch replaced by a record, so what is compiled is what
the library would launch: the same arguments, flags, tile sizes and warps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER, BLACKWELL, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)
SHARED_MEMORY = {HOPPER: 227 * 1024, BLACKWELL: 227 * 1024, MI300: 64 * 1024}
_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The kernels that ``call`` would launch."""
    found = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = "num_warps", "num_stages", "maxnreg", "launch_cooperative_grid"
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        found.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _NAMES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def specialized(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """What a kernel is compiled for: types, constants and attributes of its arguments."""
    signature, constants, attributes = {}, {}, {}
    flags = {p.name for p in launch.kernel.params if p.is_constexpr}
    general = {p.name for p in launch.kernel.params if p.do_not_specialize}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        number = isinstance(value, int) and not isinstance(value, bool) and name not in general
        if name in flags or value is None or (number and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = _kind(value)
        if isinstance(value, (Tensor, TensorDescriptor)) or (number and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def build(launch: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch; the result has the assembly (``asm``) and the metadata."""
    return compile(ASTSource(launch.kernel, *specialized(launch)), target=target, options=launch.options)
