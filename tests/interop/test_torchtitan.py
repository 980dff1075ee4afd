"""A decoder trained by torchtitan, with sharded weights, against a plain loop."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from forked import run_script


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs linnet[torchtitan]")
@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("tiny", 2),
        ("chunked", 2),  # another loss, and checkpointed layers
        ("replicated", 4),  # two replicas of two shards; stopped, and resumed from the checkpoint
        ("compiled", 2),  # and checkpointed
    ],
)
def test_processes_of_torchtitan_are_a_plain_loop(name, processes, tmp_path):
    printed = run_script(Path(__file__).with_name("titan_processes.py"), tmp_path, name, processes)
    assert printed.splitlines()[-1] == "OK"
