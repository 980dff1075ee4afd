"""Kernels that tune themselves on their first call compile every candidate, one after the other. Here all at once."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

__all__ = ["parallel_compilation"]


@contextmanager
def parallel_compilation(threads: int | None = None) -> Iterator[None]:
    """While inside, Triton's autotuner compiles the candidates of a kernel on ``threads`` threads (all cores when None)
    before it times them one by one as always, each for 25 ms in place of 100; of processes that tune on one GPU only
    one times at once. That takes minutes less; of candidates of nearly the same speed it may choose another one. Does
    nothing where there is no Triton, and warns where Triton lacks what this needs."""
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        yield
        return
    from triton.testing import do_bench

    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        warnings.warn("this Triton cannot compile in parallel: peers that tune themselves take long", stacklevel=3)
        yield
        return
    plain = Autotuner._bench
    seen: set[Any] = set()

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        call = id(self), *(_part(x) for x in (*args, *meta.values()))
        if call not in seen:  # the first candidate of a tuning
            seen.add(call)
            given = {name: value for name, value in meta.items() if name != "warmup"}
            with ThreadPoolExecutor(threads or os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
                for candidate in self.prune_configs(meta):
                    self.fn.warmup(*args, **given, **candidate.all_kwargs())
        if self._do_bench is None:
            self._do_bench = partial(do_bench, warmup=5, rep=25)
        with _turn():
            return plain(self, *args, config=config, **meta)

    Autotuner._bench = bench
    try:
        yield
    finally:
        Autotuner._bench = plain


@contextmanager
def _turn() -> Iterator[None]:
    """The GPU for oneself, among the processes that ask this way."""
    import fcntl  # where Triton is, this is

    device = torch.cuda.get_device_properties("cuda").uuid if torch.cuda.is_available() else "cpu"
    with open(os.path.join(tempfile.gettempdir(), f"linnet-tuning-{device}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _part(x: Any) -> Any:
    """What of an argument tells one tuning from another."""
    return getattr(x, "dtype", x if x is None or isinstance(x, (bool, int, str)) else None)
