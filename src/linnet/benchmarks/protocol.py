"""How a call is timed: side by side with its rivals, from memory rather than cache, without the host's overhead.

The rivals of one line of the comparison run in turn, round by round, so that whatever drifts (clocks, temperature)
falls on all of them; the median over all rounds counts. On a GPU every call is timed by events on the stream, after a
write that pushes its inputs out of the L2 cache, and behind enough queued writes that the host is always ahead of the
device: what is measured are the kernels and the gaps they leave, not Python.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch

__all__ = ["Ceilings", "Timer", "Timing"]

Call = Callable[[], object]

_ROUNDS = 10
_BURST_SECONDS = 0.02  # of device work a call gets in one round
_BURST_CALLS = 8
_QUEUE = 200  # most writes to queue before a burst
_TURN_SECONDS = 2.0  # after so many a call, a loop over tokens say, has no further turn


class Timing(NamedTuple):
    """Milliseconds of a call: the median of ``samples`` and their tenth and ninetieth percentile."""

    ms: float
    low: float
    high: float
    samples: int


class Ceilings(NamedTuple):
    """What the device reaches on the two plainest loads: a copy of memory, in TB/s read and written together, and a
    product of large matrices, in TFLOP/s."""

    copy_tbs: float
    matmul_tflops: float

    def limit_ms(self, flops: float, moved: float) -> float:
        """The least milliseconds for so many operations and bytes: the larger of the two terms."""
        return max(flops / self.matmul_tflops, moved / self.copy_tbs) * 1e-9


class Timer:
    """Times calls on one device.

    Args:
        device: where the calls run.
        rounds: how often each of the compared calls has its turn.
    """

    def __init__(self, device: torch.device, rounds: int = _ROUNDS):
        self.device, self.rounds = device, rounds
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._scratch = torch.empty(max(4 * cache, 1 << 27), dtype=torch.int8, device=device)
            self._flush_ms = self._measure_flush()

    def compare(self, calls: Mapping[str, Call], begin: Callable[[str], None] | None = None) -> dict[str, Timing | str]:
        """Time all of ``calls`` in turn. A call that fails gets a short reason in place of its timing and leaves the
        others alone (a device error it may leave behind does not: see :mod:`linnet.benchmarks.worker`). One that has
        used up two seconds has no further turn.

        Args:
            calls: name to call.
            begin: told the name before each turn, so that who watches knows whom a crash belongs to.
        """
        failed: dict[str, Timing | str] = {}
        samples: dict[str, list[float]] = {}
        plans: dict[str, tuple[int, int]] = {}
        spent = dict.fromkeys(calls, 0.0)
        for turn in range(self.rounds + 1):
            for name, call in calls.items():
                if name in failed or spent[name] > _TURN_SECONDS:
                    continue
                if begin is not None:
                    begin(name)
                start = time.perf_counter()
                try:
                    if turn == 0:
                        plans[name] = self._plan(call)
                        samples[name] = []
                    else:
                        samples[name] += self._burst(call, *plans[name])
                        spent[name] += time.perf_counter() - start
                except Exception as error:
                    failed[name] = reason(error)
        return {name: failed[name] if name in failed else _summary(samples[name]) for name in calls}

    def wall(self, call: Call, seconds: float = 0.2) -> Timing:
        """Time ``call`` by the clock on the wall, as its user does: what the host needs counts where the device waits
        for it. Each round runs it for about so many seconds, the device drained at both ends; a sample is a round's
        mean. Raises what the call raises."""
        start = self._now()
        call()
        count = max(1, int(seconds / (self._now() - start)))
        samples = []
        for _ in range(self.rounds):
            start = self._now()
            for _ in range(count):
                call()
            samples.append(1e3 * (self._now() - start) / count)
        return _summary(samples)

    def peak_bytes(self, call: Call) -> int | None:
        """Most memory a call holds beyond what is allocated before it: outputs, saved activations, gradients. None on
        a CPU, where PyTorch does not count."""
        if not self.cuda:
            return None
        gc.collect()  # what an earlier call left in cycles must not be freed during this one
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def ceilings(self) -> Ceilings:
        """Measure the device: a copy of 2 GiB (16 MiB on a CPU) and a bf16 product of 8192 x 8192 (fp32, 512)."""
        size, n = (1 << 30, 8192) if self.cuda else (1 << 23, 512)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        result = self.compare({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
        copy, matmul = result["copy"], result["matmul"]
        if isinstance(copy, str) or isinstance(matmul, str):
            raise RuntimeError(f"the ceilings could not be measured: {copy}, {matmul}")
        return Ceilings(2 * size / copy.ms * 1e-9, 2 * n**3 / matmul.ms * 1e-9)

    def _plan(self, call: Call) -> tuple[int, int]:
        """How many calls make a burst, and how many queued writes keep the device busy until the host has issued them.
        The call has run before; its first runs still warm allocators up."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return max(1, min(_BURST_CALLS, int(_BURST_SECONDS / (time.perf_counter() - start + 1e-9)))), 0
        call()
        torch.cuda.synchronize(self.device)
        host, device = [], []
        for _ in range(3):
            first, last = self._event(), self._event()
            self._flush(2)
            start = time.perf_counter()
            first.record()
            call()
            last.record()
            host.append(1e3 * (time.perf_counter() - start))
            torch.cuda.synchronize(self.device)
            device.append(first.elapsed_time(last))
            if device[-1] > 1e3 * _TURN_SECONDS / 10:  # so long that once is enough to tell
                break
        count = max(1, min(_BURST_CALLS, int(1e3 * _BURST_SECONDS / min(device))))
        # A call that waits for the device itself (a copy to the host) is as long on the host whatever is queued; then
        # nothing helps. For all others the queue must last until the host has issued the burst.
        behind = 1.5 * max(0.0, statistics.median(host) - self._flush_ms) / self._flush_ms  # in writes a call
        count = max(1, min(count, int(_QUEUE / max(behind, 1e-9))))
        return count, min(_QUEUE, 2 + int(behind * count))

    def _burst(self, call: Call, count: int, queued: int) -> list[float]:
        if not self.cuda:
            marks = [time.perf_counter()]
            for _ in range(count):
                call()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        events = [(self._event(), self._event()) for _ in range(count)]
        self._flush(queued)
        for first, last in events:
            self._flush()
            first.record()
            call()
            last.record()
        torch.cuda.synchronize(self.device)
        return [first.elapsed_time(last) for first, last in events]

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def _flush(self, times: int = 1) -> None:
        for _ in range(times):
            self._scratch.zero_()

    def _measure_flush(self) -> float:
        self._flush(3)
        first, last = self._event(), self._event()
        first.record()
        self._flush(20)
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 20


def _summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return Timing(statistics.median(ordered), low, high, len(ordered))


def reason(error: BaseException) -> str:
    """An error in one short line, for the note of a row."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:240].rstrip(": ")
