"""Triton's interpreter: it has to be chosen before Triton is imported, hence a process of its own for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest import mock

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


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Spare this process what the interpreter repeats: the results are the same."""
    _look_up_dtypes(patch)
    _patch_once(patch)
    _scan_slices(patch)


def _look_up_dtypes(patch: pytest.MonkeyPatch) -> None:
    """The interpreter makes its table of NumPy's dtypes anew for every operation."""
    from triton.runtime import interpreter

    find, known = interpreter._get_np_dtype, dict[str, Any]()

    def look_up(kind: Any) -> Any:
        kind = kind.scalar
        if kind.name not in known:
            known[kind.name] = find(kind)
        return known[kind.name]

    patch.setattr(interpreter, "_get_np_dtype", look_up)


def _patch_once(patch: pytest.MonkeyPatch) -> None:
    """At every launch and every call of a device function the interpreter goes through all names of Triton's language
    to replace its builtins. Here once for each module with kernels, and they stay replaced."""
    from triton.runtime import interpreter

    once, done, nothing = interpreter._patch_lang, set[int](), mock.Mock()

    def replace(fn: Any) -> Any:
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            once(fn)
        return nothing  # to restore afterwards

    patch.setattr(interpreter, "_patch_lang", replace)


def _scan_slices(patch: pytest.MonkeyPatch) -> None:
    """The interpreter scans and reduces with a function of one's own element by element, in minutes; here the same
    function takes whole slices."""
    import numpy as np
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def prefixes(self: Any, given: tuple[Any, ...]) -> list[list[Any]]:
        slices = [np.split(x.handle.data, x.handle.data.shape[self.axis], self.axis) for x in given]
        dtypes = [x.dtype for x in given]
        done = [[part] for part, *_ in slices]
        for step in list(zip(*slices, strict=True))[1:]:
            before = (self.to_tensor(column[-1], dtype) for column, dtype in zip(done, dtypes, strict=True))
            both = self.combine_fn.fn(*before, *map(self.to_tensor, step, dtypes))
            for column, x in zip(done, both, strict=True):
                column.append(x.handle.data)
        return done

    def scan(self: Any, given: tuple[Any, ...]) -> list[Any]:
        return [
            self.to_tensor(np.concatenate(column, self.axis), x.dtype)
            for column, x in zip(prefixes(self, given), given, strict=True)
        ]

    def reduce(self: Any, given: tuple[Any, ...]) -> list[Any]:
        last = [column[-1] if self.keep_dims else column[-1].squeeze(self.axis) for column in prefixes(self, given)]
        return [self.to_tensor(y, x.dtype) for y, x in zip(last, given, strict=True)]

    patch.setattr(ScanOps, "generic_scan", scan)
    patch.setattr(ReduceOps, "generic_reduce", reduce)
