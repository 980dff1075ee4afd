"""Sequences spread over 2 and 4 processes (gloo) against one process, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from forked import run_script

PROCESSES = 4


@pytest.mark.slow
def test_slices_equal_the_whole():
    printed = run_script(Path(__file__).with_name("processes.py"), PROCESSES)
    names = {line.split()[1] for line in printed.splitlines() if line.startswith("OK")}
    expected = {"conv", "attention", "selective_scan", "decoder", "decoder-rows", "refusals", "tensor-parallel"}
    expected |= {f"decay-{kind}" for kind in ("none", "constant", "scalar", "vector", "values", "bonus", "normalised")}
    expected |= {f"delta-{kind}" for kind in ("plain", "scalar", "vector", "channels", "substeps")}
    expected |= {f"scan-{kind}" for kind in ("real", "complex", "block")}
    assert names == expected
