"""Triton's interpreter: it has to be chosen before Triton is imported, hence a process of its own for the tests."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
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
    # The interpreter turns arrays of one element into numbers, which NumPy is about to forbid.
    warnings = "-W", "ignore:Conversion of an array:DeprecationWarning"
    # Plugins would be loaded by every process, and no test here is asynchronous.
    command = file, "-q", "-p", "no:cacheprovider", "-p", "no:anyio", *warnings, *options
    process = _process()
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        code, printed = json.loads(process.stdout.readline() or '[1, "the process has ended"]')
    except BaseException:  # what it is doing is of no use any more
        os.killpg(process.pid, signal.SIGKILL)
        _process.cache_clear()
        raise
    assert code == 0, f"pytest ended with {code}:\n{printed[-8000:]}"


@functools.cache
def _process() -> subprocess.Popen[str]:
    """One process of this session with Triton's interpreter. It forks for every run, so that PyTorch and Triton are
    loaded once."""
    command, surroundings = [sys.executable, __file__], {**os.environ, "TRITON_INTERPRET": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=surroundings, start_new_session=True, **pipes)


def _serve() -> None:
    """Run pytest with the options on each line, in a process of its own; print its exit code and what it said."""
    for module in ("linnet.mixers", "triton.runtime.interpreter"):
        import_module(module)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as log:
            child = os.fork()
            if not child:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                code = pytest.main(json.loads(line))
                sys.stdout.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            log.seek(0)
            print(json.dumps([code, log.read()]), flush=True)


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Spare this process what the interpreter repeats: the results are the same."""
    _look_up_dtypes(patch)
    _patch_once(patch)
    _scan_slices(patch)
    _share_shapes(patch)
    _agree_at_once(patch)
    _check_sums_at_once(patch)


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


def _share_shapes(patch: pytest.MonkeyPatch) -> None:
    """The interpreter makes objects for the shape of every result and for each of its sizes; here they are shared."""
    from triton.language import core

    of_tensor, of_type = core.tensor.__init__, core.block_type.__init__
    tensors, types = dict[str, Any](), dict[Any, Any]()

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            of_tensor(self, handle, type)
            tensors[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[type.name]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            of_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(core.block_type, "__init__", block_type)


def _agree_at_once(patch: pytest.MonkeyPatch) -> None:
    """The interpreter finds the common type and shape of any two operands; here not of two that are alike."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    find = TritonSemantic.binary_op_type_checking_impl

    def common(
        self: Any, lhs: Any, rhs: Any, left: bool = False, right: bool = False, check: bool = True, ratio: bool = False
    ) -> Any:
        if not ratio and isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor):
            alike = str(lhs.type) == str(rhs.type) and not lhs.dtype.is_ptr()
            if alike:
                return lhs, rhs
        return find(self, lhs, rhs, left, right, check, ratio)

    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", common)


def _check_sums_at_once(patch: pytest.MonkeyPatch) -> None:
    """The interpreter calculates every sum and product of integers once more in its own 64 bits, and then does not
    look at it; here NumPy does, and one that does not fit fails."""
    import numpy as np
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.dtype
        if kind.int_bitwidth < 64:
            exact = operations[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            fits = exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value()
            assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"

    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check)


if __name__ == "__main__":
    _serve()
