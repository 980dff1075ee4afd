"""The decay kernels compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from linnet.ops.decay import launch
from linnet.ops.decay.kernels import pass_kernel

HOPPER, BLACKWELL, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)
FORWARD = {"EDGES": True, "LAST": True}
PASSES = {
    "forward": FORWARD,
    "constant": FORWARD | {"GATE": 1},
    "no gate": FORWARD | {"GATE": 0},
    "packed": FORWARD | {"PACKED": True, "RAGGED": True},
    "dq": {"SPLIT": True, "GRAD": 1, "WS": True},
    "dv": FORWARD | {"REVERSE": True, "WR": True},
    "dk": {"REVERSE": True, "SPLIT": True, "GRAD": 2, "WR": True},
    "states": {"SPLIT": True, "STATE_ONLY": True, "START": False, "LAST": True},
}
FLAGS = {
    "REVERSE": False,
    "GATE": 2,
    "WR": False,
    "WS": False,
    "START": True,
    "SPLIT": False,
    "STATE_ONLY": False,
    "EDGES": False,
    "LAST": False,
    "PACKED": False,
    "GRAD": 0,
    "EXACT": False,
    "FULL": True,
    "RAGGED": False,
}


def build(target: GPUTarget, passed: dict, width: int = 128, element: str = "bf16"):
    """Compile one pass of the kernel with the launch settings the library would use."""
    flags = FLAGS | passed
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[element]
    chunk = launch.chunk_length(width, width, dtype)
    tiles = launch.launch_settings(width, width, chunk, dtype, flags["SPLIT"], flags["GRAD"])
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    tma = target.backend == "cuda" and element == "bf16"
    constants = flags | tiles | {"TMA": tma, "EXACT": element == "fp32"}
    used = {
        "g_ptr": flags["GATE"] > 0,
        "seen_ptr": flags["GATE"] == 2,
        "left_ptr": flags["GATE"] == 2,
        "wr_ptr": flags["WR"],
        "ws_ptr": flags["WS"],
        "start_ptr": flags["START"],
        "out_ptr": not flags["STATE_ONLY"],
        "out_raw": not flags["STATE_ONLY"],
        "edge_ptr": flags["EDGES"],
        "last_ptr": flags["LAST"],
        "total_ptr": flags["STATE_ONLY"],
        "dot_ptr": flags["GRAD"] > 0,
        "row_ptr": flags["GRAD"] == 1,
        "col_ptr": flags["GRAD"] > 0,
        "cu_ptr": flags["PACKED"],
        "table_ptr": flags["PACKED"],
    }
    tensors = {"r_ptr": "BR", "s_ptr": "BR", "p_ptr": "BP", "out_ptr": "BP", "dot_ptr": "BP"}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(pass_kernel.arg_names):
        if name in constants or not used.get(name, True):
            signature[name], constexprs[(i,)] = "constexpr", constants.get(name)
        elif name in tensors and tma:
            signature[name] = f"tensordesc<{element}[{tiles['C']},{tiles[tensors[name]]}]>"
        elif name in tensors or name == "out_raw":
            signature[name] = f"*{element}"
        elif name in ("cu_ptr", "table_ptr"):
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name == "scale" else "*fp32" if name.endswith("_ptr") else "i32"
        if name not in constants and signature[name] != "fp32":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(pass_kernel, signature, constexprs, attributes)
    return compile(source, target=target, options=options)


@pytest.mark.parametrize("name", PASSES)
def test_compiles_for_hopper(name: str) -> None:
    built = build(HOPPER, PASSES[name])
    assert built.metadata.shared <= 227 * 1024
    assert "wgmma.mma_async" in built.asm["ptx"] and "cp.async.bulk.tensor" in built.asm["ptx"]


@pytest.mark.parametrize("target", [BLACKWELL, MI300], ids=["sm_100", "gfx942"])
@pytest.mark.parametrize("name", ["forward", "dq"])
def test_compiles_for_other_gpus(target: GPUTarget, name: str) -> None:
    assert build(target, PASSES[name]).asm


@pytest.mark.parametrize("width", [16, 64, 256, 512])
def test_every_width_fits(width: int) -> None:
    for name in ("forward", "dq"):
        assert build(HOPPER, PASSES[name], width).metadata.shared <= 227 * 1024


def test_float32_compiles() -> None:
    assert build(HOPPER, PASSES["forward"], element="fp32").metadata.shared <= 227 * 1024
