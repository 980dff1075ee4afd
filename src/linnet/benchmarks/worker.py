"""The process that measures. A peer that kills it (an illegal access, a hang) costs its own row, not the run.

``python -m linnet.benchmarks.worker`` reads a job as JSON on standard input and answers, one JSON object a line: what
it begins (``{"begin": [workload, impl, shape]}``) and rows. :func:`run` is the other end of that pipe. Before it, with
``ahead``, such processes side by side fill the compilers' caches, one for an implementation on a shape.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from .results import Results, key

__all__ = ["run"]

_DEATHS = 2  # an implementation that brought the process down so often in one workload is not run there again


def run(
    job: dict[str, Any],
    results: Results,
    report: Callable[[str], None],
    *,
    timeout: float = 600,
    ahead: int = 0,
    patience: float = 600,
) -> None:
    """Measure what ``job`` asks for and ``results`` does not hold yet.

    Args:
        job: ``suite``, ``ops``, ``shapes``, ``passes``, ``impls`` (None: all), ``dtype``, ``device``, ``backend``,
            ``rounds``, ``first_call`` (names of implementations). For a suite of models ``suite``, ``shapes`` (batch,
            context), ``impls``, ``dtype``, ``device``, ``rounds`` and ``small``.
        results: where rows go.
        report: told in a line what begins.
        timeout: seconds without a sign after which the process is ended and the implementation at work recorded as
            timed out.
        ahead: processes that compile and tune side by side before anything is timed; 0: each implementation does so
            when its turn comes.
        patience: seconds for all of that; peers that are not ready by then get a row that says so.
    """
    deaths: Counter[tuple[str, str]] = Counter()
    first: dict[str, float | None] = {}
    if ahead and "ops" in job:
        unready = _compile_ahead(job, results, report, ahead, patience)
        job = job | {"unready": dict.fromkeys(unready, f"not compiled and tuned within {patience:.0f} s")}
    while True:
        done = [list(k) for k in results.done]
        banned = [list(k) for k, count in deaths.items() if count >= _DEATHS]
        begun: list[str] = []
        for message in _converse(job | {"done": done, "banned": banned, "first": first}, timeout):
            if "begin" in message:
                begun = [str(part) for part in message["begin"]]
                report(" ".join(begun))
            elif "first" in message:
                first.update(message["first"])
            elif "row" in message:
                results.add(message["row"])
            elif "end" in message and message["end"] is None:
                return
            elif "end" in message:
                if not message["rows"]:
                    raise RuntimeError(f"the measuring process failed before it measured anything: {message['end']}")
                deaths[begun[0], begun[1]] += 1
                for row in message["rows"]:
                    results.add(row | {"note": message["end"]})


def _converse(job: dict[str, Any], timeout: float) -> Iterator[dict[str, Any]]:
    """The messages of one process, and its end: None when it is through, else why it is not and what was under way."""
    under_way: list[dict[str, Any]] = []
    with _children() as start:
        child = start(job)
        assert child.stdout is not None
        buffer = b""
        end: str | None = None
        while True:
            ready, _, _ = select.select([child.stdout], [], [], timeout)
            if not ready:
                end = f"no answer within {timeout:.0f} s"
                break
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                code = child.wait()
                end = None if code == 0 else f"the process ended with code {code}"
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                under_way = message.get("rows", under_way)
                yield message
        yield {"end": end, "rows": under_way}


@contextmanager
def _children() -> Iterator[Callable[[dict[str, Any]], subprocess.Popen[bytes]]]:
    """Start measuring processes; at the end, or when this process is told to end, they and theirs (compilers) do. They
    build extensions of PyTorch in a folder of their own, so that what a build that is cut short leaves behind is not in
    the way of the user's."""
    started: list[subprocess.Popen[bytes]] = []
    env = {"TORCH_EXTENSIONS_DIR": str(Path.home() / ".cache" / "linnet" / "torch_extensions")} | os.environ

    def locks() -> set[Path]:
        return set(Path(env["TORCH_EXTENSIONS_DIR"]).glob("**/lock"))

    others = locks()

    def start(job: dict[str, Any]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "linnet.benchmarks.worker"]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
        )
        started.append(child)
        assert child.stdin is not None
        child.stdin.write(json.dumps(job).encode())
        child.stdin.close()
        return child

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield start
    finally:
        signal.signal(signal.SIGTERM, before)
        cut = [child for child in started if child.poll() is None]
        for child in cut:
            os.killpg(child.pid, signal.SIGKILL)
        for child in started:
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        if cut:
            # A build that was cut short leaves a lock behind, for which the next one waits for ever.
            for lock in locks() - others:
                lock.unlink(missing_ok=True)


def _compile_ahead(
    job: dict[str, Any], results: Results, report: Callable[[str], None], processes: int, patience: float
) -> list[str]:
    """Run every implementation once, side by side in processes of their own, so that its kernels are in the caches;
    what is not through in time."""
    import torch

    from .peers import peers
    from .workloads import Shape, suite

    device = torch.device(job["device"])
    done = results.done
    waiting: dict[str, list[Any]] = {}
    for shape in (Shape.of(sizes) for sizes in job["shapes"]):
        for workload in suite(job["suite"]):
            if workload.name not in job["ops"] or not workload.fits(shape):
                continue
            found = {peer.name: peer for peer in peers(workload.name)}
            for name in ("linnet", *found):
                asked = job["impls"] is None or name in job["impls"]
                peer = found.get(name)
                able = peer is None or not (
                    peer.module == "torch"  # which compiles nothing
                    or peer.obstacle(device, bool(shape.lengths), shape.H)
                )
                keys = (key(_names(workload.name, name, p, shape, job["dtype"])) for p in job["passes"])
                if asked and able and not done.issuperset(keys):
                    waiting.setdefault(_variant(job, workload.name, name, shape), [workload.name, name, list(shape)])
    # Who compiles anew for every shape, extensions among them, takes longest, and must not keep the others waiting.
    waiting = dict(sorted(waiting.items(), key=lambda item: _fixed(item[1][0], item[1][1])))
    running: dict[str, subprocess.Popen[bytes]] = {}
    threads = max(1, (os.cpu_count() or 1) // processes)
    end = time.monotonic() + patience
    count = len(waiting)
    with _children() as start:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < processes:
                at, only = next(iter(waiting.items()))
                del waiting[at]
                running[at] = start(job | {"only": only, "threads": threads})
            running = {at: child for at, child in running.items() if child.poll() is None}
            report(f"compiling ahead: {count - len(waiting) - len(running)} of {count} are ready")
            time.sleep(0.1)
    return [*running, *waiting]


def _fixed(op: str, name: str) -> bool:
    """Whether an implementation compiles anew for every shape."""
    from .peers import peers

    return any(peer.fixed for peer in peers(op) if peer.name == name)


def _variant(job: dict[str, Any], op: str, name: str, shape: Any) -> str:
    """What is compiled and tuned once: few make kernels anew for another batch or length."""
    B, T, H, K, V, lengths = shape
    return f"{op} {name} {f'{B} {T} ' if _fixed(op, name) else ''}{H} {K} {V} {bool(lengths)} {job['dtype']}"


def _names(op: str, name: str, p: str, shape: Any, dtype: str) -> dict[str, Any]:
    """Of a row, what tells it from others."""
    B, T, H, K, V, lengths = shape
    row = {"op": op, "impl": name, "pass": p, "B": B, "T": T, "H": H, "K": K, "V": V}
    return row | {"dtype": dtype, "segments": len(lengths) or None}


def _main() -> None:
    # What peers print on standard output goes to standard error; the answers keep the pipe to themselves.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    job = json.load(sys.stdin)
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # fla would run FlashQLA, which has rows of its own
    from .tuning import parallel_compilation

    if job.get("only"):
        with parallel_compilation(job["threads"]) if "threads" in job else nullcontext():
            emit({"first": _first_call(job)})
        return
    with parallel_compilation():
        _measure(job, emit)


def _measure(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    import torch

    from .protocol import Timer
    from .workloads import Shape, suite

    device = torch.device(job["device"])
    timer = Timer(device, job["rounds"])
    emit({"begin": ["ceilings", "", ""]})
    ceilings = timer.ceilings()
    if "small" in job:
        from .models import measure

        measure(job, timer, ceilings, _about(job["device"]), {tuple(k) for k in job["done"]}, emit)
        return
    first = dict(job["first"])
    for shape in (Shape.of(sizes) for sizes in job["shapes"]):
        for workload in suite(job["suite"]):
            if workload.name in job["ops"] and workload.fits(shape):
                _Comparison(job, workload, shape, timer, ceilings, first, emit).go()


class _Comparison:
    """All implementations of a workload on one shape."""

    def __init__(self, job, workload, shape, timer, ceilings, first, emit):
        import torch

        from .peers import peers

        self.job, self.workload, self.shape = job, workload, shape
        self.timer, self.ceilings, self.first, self.emit = timer, ceilings, first, emit
        self.dtype = getattr(torch, job["dtype"])
        self.peers = {peer.name: peer for peer in peers(workload.name)}
        wanted = job["impls"]
        self.names = [n for n in ("linnet", *self.peers) if wanted is None or n in wanted]
        self.rows = {(n, p): self._row(n, p) for n in self.names for p in job["passes"]}
        done = {tuple(k) for k in job["done"]}
        self.open = {at: row for at, row in self.rows.items() if key(row) not in done}

    def go(self) -> None:
        """Measure what is open and give the rows out."""
        import torch

        from .protocol import Timing, reason

        calls: dict[str, dict[str, Callable[[], object]]] = {p: {} for p in self.job["passes"]}
        for name in dict.fromkeys(n for n, _ in self.open):
            why = self._obstacle(name)
            if why is not None:
                self._give_up(name, why)
        if not self.open:
            return
        try:
            inputs = self.workload.inputs(self.shape, self.timer.device, self.dtype)
        except torch.OutOfMemoryError as error:
            for name in self.names:
                self._give_up(name, f"inputs: {reason(error)}")
            return
        reference = None
        for name in dict.fromkeys(n for n, _ in self.open):
            self._begin(name)
            try:
                ready, output = self._prepare(name, inputs)
                if name == "linnet":
                    reference = output
                difference = None if reference is None else _difference(output, reference)
            except Exception as error:
                self._give_up(name, reason(error))
                ready, output, difference = {}, None, None
            for p, call in ready.items():  # who has no backward pass may still have a forward one
                if (name, p) not in self.open:
                    continue
                try:
                    call()
                    self.open[name, p] |= {
                        "difference": difference,
                        "peak_bytes": self.timer.peak_bytes(call),
                        "first_call_s": self._first(name),
                    }
                    calls[p][name] = call
                except Exception as error:
                    self._give_up(name, reason(error), p)
            del output, ready
            if self.timer.cuda:
                torch.cuda.empty_cache()
        del reference
        for p, rivals in calls.items():
            for name, timing in self.timer.compare(rivals, self._begin).items():
                row = self.open[name, p]
                if isinstance(timing, Timing):
                    row |= {
                        "ms": timing.ms,
                        "ms_low": timing.low,
                        "ms_high": timing.high,
                        "samples": timing.samples,
                        "tokens_per_s": 1e3 * self.shape.tokens / timing.ms,
                    }
                else:
                    row["note"] = timing
                self.emit({"row": row})

    def _prepare(self, name: str, inputs: Any) -> tuple[dict[str, Callable[[], object]], Any]:
        """The calls to be timed, and the output in linnet's layout."""
        import torch

        segments = self.shape.segments(self.timer.device)
        if name == "linnet":

            def call(x: Any) -> Any:
                return self.workload.run(x, segments, self.job["backend"])

            given, restore = inputs, _same
        else:
            peer = self.peers[name]
            cu = None if segments is None else segments.cu_seqlens.long()

            def call(x: Any) -> Any:
                return peer.run(x, cu)

            with torch.no_grad():
                converted = peer.convert(inputs)
            given = inputs if converted is inputs else self.workload.leaves(converted)
            restore = peer.restore
        leaves = [x for x in given.values() if x.requires_grad]

        def forward() -> Any:
            with torch.no_grad():
                return call(given)

        output = forward()
        grad = torch.randn_like(output)

        def both() -> Any:
            return torch.autograd.grad(call(given), leaves, grad, allow_unused=True)

        calls: dict[str, Callable[[], object]] = {"fwd": forward, "fwdbwd": both}
        if self.timer.cuda:
            torch.cuda.synchronize()
        return {p: calls[p] for p in self.job["passes"]}, restore(output)

    def _obstacle(self, name: str) -> str | None:
        if [self.workload.name, name] in self.job["banned"]:
            return "not run: it ended the process on other shapes of this op"
        if name == "linnet":
            return None
        unready = self.job.get("unready", {}).get(_variant(self.job, self.workload.name, name, self.shape))
        return unready or self.peers[name].obstacle(self.timer.device, bool(self.shape.lengths), self.shape.H)

    def _first(self, name: str) -> float | None:
        if name not in self.job["first_call"]:
            return None
        at = _variant(self.job, self.workload.name, name, self.shape)
        if at not in self.first:
            self.first[at] = _in_a_fresh_process(self.job, self.workload.name, name, self.shape)
            self.emit({"first": {at: self.first[at]}})
        return self.first[at]

    def _begin(self, name: str) -> None:
        under_way = [row for (n, _), row in self.open.items() if n == name]
        sizes = "x".join(map(str, self.shape[:5])) + (f" in {len(self.shape.lengths)}" if self.shape.lengths else "")
        self.emit({"begin": [self.workload.name, name, sizes], "rows": under_way})

    def _give_up(self, name: str, why: str, only: str | None = None) -> None:
        for at in [at for at in self.open if at[0] == name and only in (None, at[1])]:
            self.emit({"row": self.open.pop(at) | {"note": why}})

    def _row(self, name: str, p: str) -> dict[str, Any]:
        row = _about(self.job["device"]) | _names(self.workload.name, name, p, self.shape, self.job["dtype"])
        row |= {"version": self._version(name), "limit_ms": self._limit(p)}
        return row | {"copy_tbs": self.ceilings.copy_tbs, "matmul_tflops": self.ceilings.matmul_tflops}

    def _version(self, name: str) -> str:
        import linnet

        return linnet.__version__ if name == "linnet" else self.peers[name].version

    def _limit(self, p: str) -> float | None:
        from linnet.ops.core import ops

        if self.workload.engine not in ops():
            return None
        flops, moved, _ = self.workload.floor(self.shape, self.dtype.itemsize, p == "fwdbwd")
        return self.ceilings.limit_ms(flops, moved)


def _same(x: Any) -> Any:
    return x


def _difference(output: Any, reference: Any) -> float:
    """Relative to the reference, both in fp32."""
    apart = (output.float() - reference.float()).norm() / reference.float().norm()
    return float(apart)


def _in_a_fresh_process(job: dict[str, Any], op: str, name: str, shape: Any) -> float | None:
    """Seconds of the first call (forward, and backward where that is measured) with every compiler's cache empty, the
    implementation's import included, PyTorch's and the device's start not. None when it fails there."""
    with tempfile.TemporaryDirectory() as folder:
        caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
        env = os.environ | {name: os.path.join(folder, name.lower()) for name in caches}
        task = json.dumps(job | {"only": [op, name, list(shape)]})
        command = [sys.executable, "-m", "linnet.benchmarks.worker"]
        try:
            done = subprocess.run(command, input=task.encode(), stdout=subprocess.PIPE, env=env, timeout=540)
        except subprocess.TimeoutExpired:
            return None
    lines = done.stdout.splitlines()
    return json.loads(lines[-1])["first"] if done.returncode == 0 and lines else None


def _first_call(job: dict[str, Any]) -> float:
    import torch

    from .peers import peers
    from .workloads import Shape, suite

    op, name, sizes = job["only"]
    shape = Shape.of(sizes)
    device = torch.device(job["device"])
    workload = next(w for w in suite(job["suite"]) if w.name == op)
    inputs = workload.inputs(shape, device, getattr(torch, job["dtype"]))
    segments = shape.segments(device)
    peer = next((p for p in peers(op) if p.name == name), None)
    given = inputs if peer is None else workload.leaves(peer.convert(inputs))
    cu = None if segments is None else segments.cu_seqlens.long()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    o = workload.run(given, segments, job["backend"]) if peer is None else peer.run(given, cu)
    if "fwdbwd" in job["passes"]:
        torch.autograd.grad(o, [x for x in given.values() if x.requires_grad], torch.ones_like(o), allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@cache
def _about(device: str) -> dict[str, str]:
    """Date, machine and versions, as every row states them."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpu": where,
        "torch": torch.__version__,
        "triton": triton,
    }


if __name__ == "__main__":
    _main()
