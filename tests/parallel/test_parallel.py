"""Sequences spread over 2 and 4 processes (gloo) against one process, in float64."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROCESSES = 4


@pytest.mark.slow
def test_slices_equal_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("processes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(PROCESSES), port],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    names = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("OK")}
    expected = {"conv", "attention", "selective_scan", "decoder", "decoder-rows", "refusals", "tensor-parallel"}
    expected |= {f"decay-{kind}" for kind in ("none", "constant", "scalar", "vector", "values", "bonus", "normalised")}
    expected |= {f"delta-{kind}" for kind in ("plain", "scalar", "vector", "channels", "substeps")}
    expected |= {f"scan-{kind}" for kind in ("real", "complex", "block")}
    assert names == expected
