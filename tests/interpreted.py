"""Triton's interpreter: it has to be chosen before Triton is imported, hence a process of its own for the tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from linnet.ops.core.registry import has_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

starts_the_interpreter = pytest.mark.skipif(
    INTERPRETED or not has_triton(), reason="needs Triton; this is the process that it starts"
)
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="started by the first test of the file")


def run_interpreted(file: str, *options: str) -> None:
    """Run the tests of a file in the interpreter; they must pass."""
    command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", *options]
    # The interpreter turns arrays of one element into numbers, which NumPy is about to forbid.
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"pytest ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
