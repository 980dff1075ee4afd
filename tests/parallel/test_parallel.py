"""Sequences spread over 2 and 4 processes against one process, in float64; over NCCL with ``--device cuda``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forked import need_gpus, run_script

KERNELS = {"decay", "decay-vector", "delta", "delta-vector", "scan", "selective_scan", "conv", "attention", "decoder"}


@pytest.mark.slow
def test_slices_equal_the_whole(device: torch.device):
    need_gpus(device, 2)
    processes = 4 if device.type == "cpu" or torch.cuda.device_count() >= 4 else 2
    printed = run_script(Path(__file__).with_name("processes.py"), processes, device.type, device=device)
    names = {line.split()[1] for line in printed.splitlines() if line.startswith("OK")}
    expected = {"sharded-and-split", "ops", "decoder", "decoder-rows", "refusals"}
    expected |= {"ops-of-two", "decoder-of-two", "tensor-parallel", "conv", "attention", "selective_scan"}
    expected |= {f"decay-{kind}" for kind in ("none", "constant", "scalar", "vector", "values", "bonus", "normalised")}
    expected |= {f"delta-{kind}" for kind in ("plain", "scalar", "vector", "channels", "substeps")}
    expected |= {f"scan-{kind}" for kind in ("real", "complex", "block")}
    if device.type == "cuda":
        expected |= {f"kernels-{name}" for name in KERNELS}
    assert names == expected
