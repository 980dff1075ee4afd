"""A decoder trained by torchtitan, with sharded weights, against a plain loop."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs linnet[torchtitan]")
@pytest.mark.parametrize("name", ["tiny", "chunked"])  # losses, and ways of checkpointing
def test_two_processes_of_torchtitan_are_a_plain_loop(name, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("titan_processes.py")
    done = subprocess.run(
        [sys.executable, str(script), port, str(tmp_path), name],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.splitlines()[-1] == "OK"
