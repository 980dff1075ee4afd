"""Compiling the kernels of a call together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Thread, get_ident
from time import sleep
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import linnet
import linnet.ops.core.compiling
from linnet.ops import ConvState, conv
from linnet.ops.core.compiling import Kernel, compile_together, compiling

triton = pytest.importorskip("triton")


class Recorder:
    """Stands for a Triton kernel."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda x: self.calls.append(("run", (grid, x)))

    def warmup(self, x: Any, grid: Any) -> None:
        self.calls.append(("compile", (grid, x)))


def _delta(x: Tensor) -> Tensor:
    return linnet.delta(x, x, x, beta=x.new_empty(x.shape[:3]), backend="triton")[0]


def _dplr(x: Tensor) -> Tensor:
    return linnet.dplr(x, x, x, x, x, x, backend="triton")[0]


def _conv(x: Tensor) -> Tensor:
    state = ConvState(x.new_empty(2, 3, 32, dtype=torch.float32))
    return conv(x.flatten(2), x.new_empty(32, 4), state=state, backend="triton")[0].view(x.shape)


@pytest.mark.parametrize("call", [_delta, _dplr, _conv])
@pytest.mark.parametrize("length", [1, 9])
def test_no_kernel_is_launched_on_fake_tensors(call: Callable[[Tensor], Tensor], length: int) -> None:
    """Also not by a decoding step, which launches its kernel outside of any registered op."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, length, 2, 16, dtype=torch.bfloat16, device="cuda")
        assert call(x).shape == x.shape


@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="Triton is older than 3.5")
def test_kernels_are_compiled_and_not_run() -> None:
    recorder = Recorder()
    kernel = Kernel(recorder)
    kernel[(1,)](2)
    compile_together(lambda: kernel[(3,)](4))
    with pytest.raises(ZeroDivisionError):
        compile_together(lambda: kernel[(5,)](1 // 0))
    assert not compiling()
    kernel[(6,)](7)
    assert recorder.calls == [("run", ((1,), 2)), ("compile", ((3,), 4)), ("run", ((6,), 7))]


@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="Triton is older than 3.5")
def test_launchers_are_loaded_one_at_a_time_and_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does it, the loader gives all of one name the same module."""
    build = pytest.importorskip("triton.runtime.build")
    shared, loading = ModuleType("__triton_launcher"), []

    def load(name: str, path: str) -> ModuleType:
        assert not loading
        loading.append(path)
        shared.launch = path  # type: ignore[attr-defined]
        sleep(0.001)
        loading.pop()
        return shared

    monkeypatch.setattr(build, "_load_module_from_path", load)
    compile_together(lambda: None)
    with ThreadPoolExecutor(8) as threads:
        loaded = [*threads.map(lambda path: build._load_module_from_path(shared.__name__, path), range(20))]
    assert [module.launch for module in loaded] == [*range(20)]


def test_launchers_are_made_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        made = 0

        @property
        def run(self) -> None:
            Compiled.made += 1
            raise RuntimeError("said when it is launched for real")

    class Eventual:
        def warmup(self, grid: Any) -> Any:
            self.future: Future[Any] = Future()
            return self

    monkeypatch.setattr(linnet.ops.core.compiling, "_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    eventual, failing = Eventual(), Eventual()
    compile_together(lambda: (Kernel(eventual)[(1,)](), Kernel(failing)[(1,)]()))
    eventual.future.set_result(Compiled())
    failing.future.set_exception(ValueError("does not compile"))
    assert Compiled.made == 1


def test_a_thread_has_a_context_before_its_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was another thread that loaded the kernel."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(get_ident()))
    kernel = Kernel(Recorder())

    def launch() -> None:
        for x in range(3):
            kernel[(1,)](x)

    threads = [Thread(target=launch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 2
