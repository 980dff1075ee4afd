"""Tests of several processes: a script is started once and forks when PyTorch is loaded, so that its processes share
the cost of that."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_script(script: Path, *arguments: object) -> str:
    """What a script prints, given a free port and these arguments; it must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (port, *arguments))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def fork(count: int, main: Callable[[int], None]) -> int:
    """Run ``main(index)`` in so many processes; the highest of their exit codes."""
    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                main(index)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
