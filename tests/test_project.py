"""The package as a whole: what an import costs, where it works, and that its documents agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import linnet

ROOT = Path(__file__).parents[1]


def run(*command: str | Path) -> str:
    """Standard output of a command in the repository root, which must succeed."""
    found = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def python(code: str) -> str:
    return run(sys.executable, "-c", code)


def readme_example() -> str:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_import_is_instant() -> None:
    """`import linnet` needs no PyTorch at all; everything in it costs less than a second beyond PyTorch."""
    out = python(
        "import sys, time, linnet\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "start = time.process_time()\n"
        "for name in linnet.__all__: getattr(linnet, name)\n"
        "linnet.mixers.mixers()\n"
        "assert 'triton' not in sys.modules\n"
        "print(time.process_time() - start)\n"
    )
    assert float(out) < 1.0


def test_command_line_starts_without_torch() -> None:
    python(
        "import sys\n"
        "from linnet.cli import main\n"
        "for line in (['--help'], ['--version']):\n"
        "    try: main(line)\n"
        "    except SystemExit as left: assert left.code in (0, None), left.code\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_works_without_triton_and_gpu() -> None:
    """Where Triton cannot be imported and no GPU is visible, the README's example runs: forward, backward, sampling."""
    block = "import os, sys\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\nsys.modules['triton'] = None\n"
    python(block + readme_example())


def test_public_names() -> None:
    assert {"build_mixer", "Decoder", *linnet.ops.ops()} <= set(dir(linnet))
    assert all(callable(getattr(linnet, op)) for op in linnet.ops.ops())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        linnet.nonsense  # noqa: B018


def test_types_are_seen_by_users() -> None:
    """The package says that it is typed, and has the mark without which type checkers do not look."""
    assert "Typing :: Typed" in metadata("linnet").get_all("Classifier", [])
    assert (Path(linnet.__file__).parent / "py.typed").is_file()


def test_rooms_stay_modules() -> None:
    """Importing a room never turns its name into something else."""
    python(
        "import linnet, types\n"
        "first = linnet.ops\n"
        "import linnet.ops, linnet.mixers\n"
        "assert first is linnet.ops and isinstance(linnet.mixers, types.ModuleType)\n"
    )


def test_version_agrees_everywhere() -> None:
    assert version("linnet") == linnet.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {linnet.__version__}\n" in citation
    assert linnet.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert run(sys.executable, "-m", "linnet.cli", "--version").strip() == f"linnet {linnet.__version__}"


def test_metadata() -> None:
    about = metadata("linnet")
    assert about["License-Expression"] == "Apache-2.0"
    extras = {"hf", "torchtitan", "serve", "vllm", "eval", "bench", "docs", "dev"}
    assert set(about.get_all("Provides-Extra") or ()) == extras


def test_catalogue_is_up_to_date() -> None:
    """docs/mixers.md and the README's table say what the cards say, docs/benchmarks.md what the committed results say;
    `scripts/catalogue.py` renews them."""
    run(sys.executable, "scripts/catalogue.py", "--check")


def test_scripts_are_well_formed() -> None:
    for script in ("setup", "linnet", "test"):
        run("sh", "-n", ROOT / "scripts" / script)
    run("bash", "-n", ROOT / ".ci" / "run")


def test_no_room_is_empty_or_unlisted() -> None:
    """Every package is a layer of the import contract (which refuses others), and holds something."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = " ".join(contract["contracts"][0]["layers"])
    rooms = [room for room in (ROOT / "src" / "linnet").iterdir() if room.is_dir() and room.name != "__pycache__"]
    for room in rooms:
        assert re.search(rf"\b{room.name}\b", layers), room.name
        assert any(room.rglob("*.py")), f"{room.name} is empty"
