"""Timing, on a CPU."""

from __future__ import annotations

import time

import pytest
import torch

from linnet.benchmarks.protocol import Ceilings, Timer, Timing

CPU = torch.device("cpu")


def test_rivals_take_turns():
    order = []
    timer = Timer(CPU, rounds=3)

    def slow():
        order.append("slow")
        time.sleep(0.02)

    found = timer.compare({"slow": slow, "fast": lambda: order.append("fast")})
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["slow", "fast"] * 4  # one to plan, three rounds
    slow_ms, fast_ms = found["slow"], found["fast"]
    assert 20 <= slow_ms.low <= slow_ms.ms <= slow_ms.high and slow_ms.samples == 3
    assert fast_ms.ms < slow_ms.ms and fast_ms.samples > 3


def test_a_slow_call_has_fewer_turns(monkeypatch):
    monkeypatch.setattr("linnet.benchmarks.protocol._TURN_SECONDS", 0.03)
    found = Timer(CPU, rounds=5).compare({"slow": lambda: time.sleep(0.02), "fast": lambda: None})
    assert found["slow"].samples == 2 and found["fast"].samples >= 5


def test_a_failure_is_its_own():
    def fails():
        raise RuntimeError("no kernel\n image " + "x" * 500)

    begun = []
    found = Timer(CPU, rounds=1).compare({"bad": fails, "good": lambda: None}, begun.append)
    assert found["bad"].startswith("RuntimeError: no kernel image xxx") and len(found["bad"]) == 240
    assert isinstance(found["good"], Timing) and begun == ["bad", "good", "good"]


def test_out_of_memory_is_said_in_words():
    def fails():
        raise torch.OutOfMemoryError("Tried to allocate 7 GiB")

    assert Timer(CPU, rounds=1).compare({"x": fails})["x"] == "out of memory"


def test_wall():
    calls = []
    timing = Timer(CPU, rounds=2).wall(lambda: (calls.append(0), time.sleep(0.005)), seconds=0.02)
    assert timing.ms >= 5 and timing.samples == 2 and len(calls) >= 3


def test_limit_is_the_larger_term():
    ceilings = Ceilings(copy_tbs=2.0, matmul_tflops=500.0)
    assert ceilings.limit_ms(flops=1e12, moved=2e9) == pytest.approx(2.0)
    assert ceilings.limit_ms(flops=1e9, moved=2e9) == pytest.approx(1.0)
