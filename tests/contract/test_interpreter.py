"""The Triton kernels on a machine without a GPU: the op contract once more, in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, hence a process of its own. It runs one element of the grid
after the other in NumPy, so only two tests of the contract run, on small shapes; a GPU runs all of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linnet.ops.core import ops
from linnet.ops.core.registry import has_triton

PARTS = "matches_reference or packed_equals_separate"
BORROWED = {"softmax_scan"}  # runs the kernels of scan and minmax_scan
NAMES = [op.name for op in ops().values() if "triton" in op.backends and op.name not in BORROWED]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_in_the_interpreter(name: str, device: torch.device) -> None:
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels run for real in this session, or this is the interpreter's own")
    if not has_triton():
        pytest.skip("Triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).with_name("test_ops.py")),
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    # The interpreter turns arrays of one element into numbers, which NumPy is about to forbid.
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]
    command += ["-k", f"triton and ({PARTS}) and [{name}-"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"pytest ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
