"""Compiling the kernels of a call all at once: one after the other they keep a first call waiting for many seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

__all__ = ["Kernel", "compile_together", "compiling"]

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def compiling() -> bool:
    """Whether kernels are compiled now and not run."""
    return _compiling.get()


class Kernel:
    """A Triton kernel that :func:`compile_together` can compile without running it; launched as any other."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self.kernel.warmup, grid=grid) if compiling() else self.kernel[grid]


def compile_together(call: Callable[[], Any]) -> None:
    """Compile what ``call`` launches through :class:`Kernel`, in as many threads as there are processors (but 16).

    Nothing runs: the smallest inputs do, and results are arbitrary. A kernel that does not compile says so when it is
    launched for real. Does nothing where Triton cannot compile in threads (before 3.5).
    """
    import triton

    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        return
    token = _compiling.set(True)
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads, mode(threads, ignore_errors=True):
            call()
    finally:
        _compiling.reset(token)
