"""The delta kernels compile ahead of time for every kind of GPU they are meant for, without one."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from linnet.ops.delta import launch
from linnet.ops.delta.kept import chunk_rows
from linnet.ops.delta.kernels import local_kernel, state_kernel
from linnet.ops.delta.kernels_backward import adjoint_kernel, gradient_kernel, pairs_kernel
from linnet.ops.delta.kernels_step import step_kernel

HOPPER, BLACKWELL, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)
KERNELS = {
    "local": local_kernel,
    "state": state_kernel,
    "adjoint": adjoint_kernel,
    "pairs": pairs_kernel,
    "gradient": gradient_kernel,
    "step": step_kernel,
}
FLOATS = {"rows_ptr", "start_ptr", "last_ptr", "fade_ptr", "lv_ptr", "g_ptr", "dg_ptr", "S_ptr", "out_ptr"}
INTEGERS = {"cu_ptr", "table_ptr", "first_ptr", "index_ptr"}
PASSES = {
    "scalar": {"GATE": 1},
    "vector": {"GATE": 2, "VECTOR": True},
    "channel-wise": {"GATE": 2, "VECTOR": True, "ERASE": True, "W": True},
    "untied": {"GATE": 2, "VECTOR": True, "UNTIED": True, "SUB": 2, "NORM": False},
    "packed": {"GATE": 1, "PACKED": True},
    "states": {"GATE": 1, "OUTPUT": False, "LAST": False, "KEEP": True},
}
FLAGS = {
    "SUB": 1,
    "ERASE": False,
    "W": False,
    "VECTOR": False,
    "UNTIED": False,
    "NORM": True,
    "SCORES": True,
    "OUTPUT": True,
    "KEEP": False,
    "LAST": True,
    "PACKED": False,
    "INDEX": False,
}


def build(target: GPUTarget, name: str, passed: str, width: int = 128, element: str = "bf16"):
    """Compile one kernel with the launch settings the library would use."""
    kernel, flags = KERNELS[name], FLAGS | PASSES[passed]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[element]
    rows = chunk_rows(width, dtype)
    if name == "step":
        settings = {"BK": width, "BV": 32, "num_warps": 4, "num_stages": 1}
    else:
        settings = launch.launch_settings(name, width, width, dtype, flags["VECTOR"])
    options = {option: settings.pop(option) for option in ("num_warps", "num_stages")}
    constants = flags | settings | {"K": width, "V": width, "C": rows, "LEVELS": rows.bit_length() - 1}
    constants |= {"EXACT": element == "fp32", "MATRICES": 2 if flags["W"] else 3}
    constants |= {"WHOLE": settings.get("BK", 0) >= width}
    states = name == "state" and flags["KEEP"]
    absent = {
        **dict.fromkeys(("w_ptr", "dw_ptr"), not flags["W"]),
        **dict.fromkeys(("a_ptr", "b_ptr", "da_ptr", "db_ptr"), not flags["UNTIED"]),
        **dict.fromkeys(("erase_ptr", "read_ptr", "write_ptr"), name == "local" and not flags["VECTOR"]),
        **dict.fromkeys(("beta_ptr", "dbeta_ptr"), flags["UNTIED"]),
        **dict.fromkeys(("cu_ptr", "table_ptr", "first_ptr"), not flags["PACKED"]),
        **dict.fromkeys(("S_ptr", "R_ptr"), name == "state" and not states),
        **dict.fromkeys(("o_ptr", "last_ptr"), states),
        "fade_ptr": not flags["VECTOR"],
        "lv_ptr": flags["W"],
        "index_ptr": not flags["INDEX"],
    }
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants or absent.get(argument):
            signature[argument], constexprs[(i,)] = "constexpr", constants.get(argument)
        elif argument.endswith("_ptr"):
            float32 = argument in FLOATS and (name != "gradient" or argument != "S_ptr")
            kind = "i32" if argument in INTEGERS else "fp32" if float32 and not states else element
            signature[argument] = "*" + ("fp32" if states and argument in FLOATS - {"S_ptr"} else kind)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    return compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)


@pytest.mark.parametrize(
    ("name", "passed"),
    [
        ("local", "scalar"),
        ("local", "untied"),
        ("state", "channel-wise"),
        ("state", "packed"),
        ("adjoint", "vector"),
        ("pairs", "scalar"),
        ("gradient", "scalar"),
        ("gradient", "channel-wise"),
        ("step", "vector"),
    ],
)
def test_compiles_for_hopper(name: str, passed: str) -> None:
    built = build(HOPPER, name, passed)
    assert built.metadata.shared <= 227 * 1024
    assert name == "step" or "wgmma.mma_async" in built.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "name"),
    [(BLACKWELL, "state"), (BLACKWELL, "gradient"), (MI300, "local"), (MI300, "adjoint")],
    ids=["sm_100-state", "sm_100-gradient", "gfx942-local", "gfx942-adjoint"],
)
def test_compiles_for_other_gpus(target: GPUTarget, name: str) -> None:
    assert build(target, name, "scalar").asm


@pytest.mark.parametrize("width", [32, 256])
def test_every_width_fits(width: int) -> None:
    assert build(HOPPER, "state", "vector", width).metadata.shared <= 227 * 1024


def test_float32_compiles() -> None:
    assert build(HOPPER, "state", "scalar", element="fp32").metadata.shared <= 227 * 1024
