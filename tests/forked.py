"""Tests of several processes: a script is started once and forks when PyTorch is loaded, so that its processes share
the cost of that. One that fails or hangs ends all, and says in which part of the work and on which line it was."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import pytest
import torch

PART = float(os.environ.get("PART_SECONDS", "60"))  # that a part of the work may take
GRACE = 10.0  # seconds that the others have once a process has failed
_log: TextIO = sys.stderr


def need_gpus(device: torch.device, count: int) -> None:
    """Skip a test on GPUs where there are fewer."""
    if device.type == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, this machine has {torch.cuda.device_count()}")


def surroundings(device: torch.device) -> dict[str, str]:
    """The environment of processes that compute on such devices, and find the modules of the tests."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path), **hidden}


def free_port() -> str:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_script(script: Path, *arguments: object, device: torch.device | str = "cpu") -> str:
    """What a script prints, given a free port and these arguments; it must succeed."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (free_port(), *arguments))],
        capture_output=True,
        text=True,
        timeout=240,
        env=surroundings(torch.device(device)),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def begin(name: str, seconds: float = PART) -> None:
    """Begin a part of the work of this process. If it takes longer, the process ends with what all its threads do."""
    _log.write(f"{name}\n")
    _log.flush()
    faulthandler.dump_traceback_later(seconds, exit=True, file=_log)


def fork(count: int, main: Callable[[int], None]) -> int:
    """Run ``main(index)`` in so many processes; the highest of their exit codes, or 1 if one was killed."""
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        codes = _wait({_child(index, main, logs[index]): index for index in range(count)})
        for index, code in enumerate(codes):
            if code:
                logs[index].seek(0)
                sys.stderr.write(f"-- process {index} ended with {code}; its parts:\n{logs[index].read()}")
    sys.stderr.flush()
    return max(1 if code < 0 else code for code in codes)


def _wait(running: dict[int, int]) -> list[int]:
    """The exit codes of children, by index. Once one has failed the others are stopped after a while."""
    codes = [0] * len(running)
    ends_at = None
    while running:
        time.sleep(0.02)
        for child, index in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[index] = os.waitstatus_to_exitcode(status)
                del running[child]
        if any(codes) and ends_at is None:
            ends_at = time.monotonic() + GRACE
        if ends_at is not None and time.monotonic() > ends_at:
            for child in running:
                os.kill(child, signal.SIGTERM)
            ends_at += GRACE
    return codes


def _child(index: int, main: Callable[[int], None], log: TextIO) -> int:
    global _log
    child = os.fork()
    if child:
        return child
    _log, code = log, 1
    faulthandler.register(signal.SIGTERM, file=log, chain=True)
    try:
        main(index)
        code = 0
    except BaseException:
        traceback.print_exc(file=log)
    finally:
        for stream in (log, sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
