"""The Triton kernels on a machine without a GPU: the op contract once more, in Triton's interpreter.

The interpreter runs one element of the grid after the other in NumPy, so only two tests of the contract run, and one of
strided inputs, on small shapes; a GPU runs all of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from interpreted import run_interpreted, starts_the_interpreter
from linnet.ops.core import get_op, ops

PARTS = "matches_reference or packed_equals_separate"
BORROWED = {"softmax_scan"}  # runs the kernels of scan and minmax_scan
NAMES = [op.name for op in ops().values() if "triton" in op.backends and op.name not in BORROWED]


@pytest.mark.slow
@pytest.mark.timeout(900)
@starts_the_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_kernels_in_the_interpreter(name: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the kernels run for real in this session")
    file = str(Path(__file__).with_name("test_ops.py"))
    first = get_op(name).cases[0].name.replace(" ", "_")
    run_interpreted(file, "-k", f"triton and [{name}- and ({PARTS} or (strided and -{first}-))")
