"""The examples of CONTRIBUTING.md, put through the contract suite as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ("linnet.mixers.leaky", "linnet.ops.running_sum")
PLUGIN = """
import importlib.util, pathlib, sys
import linnet.mixers, linnet.ops
for name in {modules}:
    file = pathlib.Path(__file__).with_name(name + ".py")
    inside = [] if name.startswith("linnet.ops.") else None  # an engine is a folder, a mixer a file
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
"""


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A folder with the examples as modules, and a pytest plugin that registers them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == len(MODULES)
    for name, block in zip(MODULES, blocks, strict=True):
        (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
    (tmp_path / "register_examples.py").write_text(PLUGIN.format(modules=MODULES), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_examples_keep_the_contract(examples: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-vx", "-p", "register_examples", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, "-k", "leaky or running_sum", "tests/contract"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(examples), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for name in ("leaky", "running_sum"):
        assert len(re.findall(rf"\[.*{name}.*\] PASSED", found.stdout)) >= 15, found.stdout


def test_examples_are_linted(examples: Path) -> None:
    files = [str(examples / f"{name}.py") for name in MODULES]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), *files]
        found = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
