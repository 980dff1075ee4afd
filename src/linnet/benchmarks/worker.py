"""The process that measures. A peer that kills it (an illegal access, a hang) costs its own row, not the run.

``python -m linnet.benchmarks.worker`` reads a job as JSON on standard input and answers, one JSON object a line: what
it begins (``{"begin": [workload, impl, shape]}``) and rows. :func:`run` is the other end of that pipe.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

from .results import Results, key

__all__ = ["run"]

PASSES = ("fwd", "fwdbwd")
_DEATHS = 2  # an implementation that brought the process down so often in one workload is not run there again


def run(
    job: dict[str, Any],
    results: Results,
    report: Callable[[str], None],
    *,
    timeout: float = 600,
) -> None:
    """Measure what ``job`` asks for and ``results`` does not hold yet.

    Args:
        job: ``suite``, ``ops``, ``shapes``, ``passes``, ``impls`` (None: all), ``dtype``, ``device``, ``backend``,
            ``rounds``, ``first_call``. For a suite of models ``suite``, ``shapes`` (batch, context), ``impls``,
            ``dtype``, ``device``, ``rounds`` and ``small``.
        results: where rows go.
        report: told in a line what begins.
        timeout: seconds without a sign after which the process is ended and the implementation at work recorded as
            timed out.
    """
    deaths: Counter[tuple[str, str]] = Counter()
    first: dict[str, float | None] = {}
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
    command = [sys.executable, "-m", "linnet.benchmarks.worker"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    under_way: list[dict[str, Any]] = []
    try:
        child.stdin.write(json.dumps(job).encode())
        child.stdin.close()
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
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _main() -> None:
    # What peers print on standard output goes to standard error; the answers keep the pipe to themselves.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    job = json.load(sys.stdin)
    # Peers as their users install them: fla runs some ops on TileLang where that happens to be importable.
    os.environ.setdefault("FLA_TILELANG", "0")
    if job.get("only"):
        emit({"first": _first_call(job)})
        return
    from .tuning import parallel_compilation

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
    for workload in suite(job["suite"]):
        if workload.name not in job["ops"]:
            continue
        for shape in (Shape.of(sizes) for sizes in job["shapes"]):
            if workload.fits(shape):
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
                for p, call in ready.items():
                    if (name, p) in self.open:
                        self.open[name, p] |= {
                            "difference": difference,
                            "peak_bytes": self.timer.peak_bytes(call),
                            "first_call_s": self._first(name),
                        }
                        calls[p][name] = call
                del output, ready
            except Exception as error:
                self._give_up(name, reason(error))
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
        """The calls to be timed, each of which has run once, and the output in linnet's layout."""
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
        ready = {p: calls[p] for p in self.job["passes"]}
        for run_once in ready.values():
            run_once()
        if self.timer.cuda:
            torch.cuda.synchronize()
        return ready, restore(output)

    def _obstacle(self, name: str) -> str | None:
        if [self.workload.name, name] in self.job["banned"]:
            return "not run: it ended the process on other shapes of this op"
        if name == "linnet":
            return None
        return self.peers[name].obstacle(self.timer.device, bool(self.shape.lengths), self.shape.H)

    def _first(self, name: str) -> float | None:
        if not self.job["first_call"]:
            return None
        _, _, H, K, V, lengths = self.shape
        at = f"{self.workload.name} {name} {H} {K} {V} {bool(lengths)} {self.job['dtype']}"
        if at not in self.first:
            self.first[at] = _in_a_fresh_process(self.job, self.workload.name, name, self.shape)
            self.emit({"first": {at: self.first[at]}})
        return self.first[at]

    def _begin(self, name: str) -> None:
        under_way = [row for (n, _), row in self.open.items() if n == name]
        sizes = "x".join(map(str, self.shape[:5])) + (f" in {len(self.shape.lengths)}" if self.shape.lengths else "")
        self.emit({"begin": [self.workload.name, name, sizes], "rows": under_way})

    def _give_up(self, name: str, why: str) -> None:
        for at in [at for at in self.open if at[0] == name]:
            self.emit({"row": self.open.pop(at) | {"note": why}})

    def _row(self, name: str, p: str) -> dict[str, Any]:
        B, T, H, K, V, lengths = self.shape
        row = {**_about(self.job["device"]), "op": self.workload.name, "impl": name, "pass": p}
        row |= {"B": B, "T": T, "H": H, "K": K, "V": V, "dtype": self.job["dtype"]}
        row |= {"segments": len(lengths) or None, "version": self._version(name), "limit_ms": self._limit(p)}
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
    """Seconds of the first forward and backward with every compiler's cache empty, the implementation's import
    included, PyTorch's and the device's start not. None when it fails there."""
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
