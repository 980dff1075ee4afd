"""Compiling the kernels of a call all at once: one after the other they keep a first call waiting for many seconds.

What launches a kernel counts too: Triton has the system's C compiler make it, for almost half a second, when a kernel
is first run. Here the thread that compiled the kernel does that, and loads it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["Kernel", "compile_together", "compiling"]

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)
_thread = threading.local()


def compiling() -> bool:
    """Whether kernels are compiled now and not run."""
    return _compiling.get()


class Kernel:
    """A Triton kernel that :func:`compile_together` can compile without running it; launched as any other."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if compiling():
            return partial(self._compile, grid)
        _bind()
        return self.kernel[grid]

    def _compile(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
        future = getattr(compiled, "future", None)  # none of what was compiled before
        if future is not None:
            future.add_done_callback(partial(_load, _device()))


def _bind() -> None:
    """Have a context in this thread, once. Triton makes one where it loads a kernel, which was in another thread, and
    without it the copy engine's descriptors fail in a backward pass whose thread has run nothing else."""
    if not hasattr(_thread, "bound"):
        _thread.bound = True
        if torch.cuda.is_initialized():
            torch.cuda.mem_get_info()


class _Apart:
    """Loads what launches kernels, for Triton. It calls all of these C modules by one name, and Python takes those for
    one module: a thread that loads another before a first one's function was looked up gives that the wrong function,
    whose kernel takes other arguments. Here each is loaded alone, and has its functions to itself."""

    def __init__(self, load: Callable[..., Any]):
        self.load, self.lock = load, threading.Lock()

    def __call__(self, *args: Any) -> SimpleNamespace:
        with self.lock:
            return SimpleNamespace(**vars(self.load(*args)))


def _load_apart() -> bool:
    """Have Triton load launchers so that threads may; whether this version does it in the known place."""
    from triton.runtime import build

    load = getattr(build, "_load_module_from_path", None)
    if load is None:
        return False
    if not isinstance(load, _Apart):
        build._load_module_from_path = _Apart(load)
    return True


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _load(device: int | None, future: Any) -> None:
    """Make what launches a kernel that has been compiled, and load it. In the thread that did; what fails here fails
    again, and says so, when the kernel is launched for real."""
    if device is None or future.exception() is not None or not _load_apart():
        return
    with torch.cuda.device(device), suppress(Exception):
        future.result().run  # noqa: B018 a property that makes both


def compile_together(call: Callable[[], Any]) -> None:
    """Compile what ``call`` launches through :class:`Kernel`, in as many threads as there are processors (but 16).

    Nothing runs: the smallest inputs do, and results are arbitrary. A kernel that does not compile says so when it is
    launched for real. Does nothing where Triton cannot compile in threads (before 3.5).
    """
    import triton

    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        return
    _load_apart()  # before any thread might
    token = _compiling.set(True)
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads, mode(threads, ignore_errors=True):
            call()
    finally:
        _compiling.reset(token)
