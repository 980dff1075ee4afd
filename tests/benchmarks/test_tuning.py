"""Compiling the candidates of an autotuned kernel at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from linnet.benchmarks.tuning import parallel_compilation

autotuner = pytest.importorskip("triton.runtime.autotuner")


def test_all_candidates_are_compiled_before_the_first_is_timed(monkeypatch):
    said = []

    def plain(self, *args, config, **meta):
        said.append(("timed", config.num_warps))
        return [1.0]

    monkeypatch.setattr(autotuner.Autotuner, "_bench", plain)
    configs = [autotuner.Config({"BLOCK": 16}, num_warps=n) for n in (1, 2)]
    kernel = SimpleNamespace(
        _do_bench=None,
        prune_configs=lambda meta: configs,
        fn=SimpleNamespace(warmup=lambda *args, **kwargs: said.append(("compiled", kwargs["num_warps"]))),
    )
    x = torch.zeros(3)
    with parallel_compilation(1):
        for T in (5, 5, 6):
            for config in configs:
                found = autotuner.Autotuner._bench(kernel, x, T, config=config, grid=(1,), warmup=False)
                assert found == [1.0]
    tuning = [("compiled", 1), ("compiled", 2), ("timed", 1), ("timed", 2)]
    assert said == [*tuning, *tuning[2:], *tuning]  # the same call again is not compiled again
    assert kernel._do_bench.keywords == {"warmup": 5, "rep": 25}
    assert autotuner.Autotuner._bench is plain
