"""`linnet env`: what this machine has, and whether the ops compute the right thing on it."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import linnet

from .show import console, print_in_full, size

if TYPE_CHECKING:
    import torch

    from linnet.ops.core import Case, Op

_ROWS, _LENGTH = 2, 37
# A backend may round differently from the reference, never worse than this many times its error in the same dtype.
_FACTOR = 4
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions and devices, and test every op's backends on this machine.

    The test compares with the float64 reference. When a backend fails, the exit code is 1.
    """
    facts = {"versions": versions(), "machine": machine()}
    out = console()
    if not as_json:
        for title, table in facts.items():
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="cyan", no_wrap=True)
            for name, value in table.items():
                for i, line in enumerate(value if isinstance(value, list) else [value]):
                    grid.add_row("" if i else f"  {name}", escape(str(line)))
            out.print(f"[bold]{title}[/bold]", grid, "", sep="\n")
        with out.status("testing the ops"):
            results = self_test()
        _print_results(results)
    else:
        results = self_test()
        typer.echo(json.dumps({**facts, "self_test": results}, indent=2))
    if any(result["status"] == "FAIL" for result in results):
        raise typer.Exit(1)


def versions() -> dict[str, str]:
    """Versions of Python, linnet and what it stands on."""
    import torch

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    toolkit = toolkit or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only")
    packages = ("triton", "numpy", "accelerate", "safetensors", "tokenizers")
    return {
        "linnet": linnet.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({toolkit})",
        **{package: of(package) for package in packages},
    }


def machine() -> dict[str, Any]:
    """The processor, how many threads PyTorch uses, and the GPUs."""
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        gpus.append(f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}")
    return {
        "system": platform.platform(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpu": gpus or "none",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def self_test() -> list[dict[str, Any]]:
    """Every op in every mode, by every backend that this machine can run, on a small input: fp32 on the CPU, bf16 on a
    GPU. A result says how far the worst mode is from the float64 reference, relative to what it may be."""
    import torch

    from linnet.ops import ops

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        _test_backend(op, backend, device)
        for op in ops().values()
        for device in devices
        for backend in op.backends
        if backend != "triton" or device != "cpu"  # Triton has no CPU target
    ]


def _test_backend(op: Op, backend: str, device: str) -> dict[str, Any]:
    import torch

    result = {"op": op.name, "backend": backend, "device": device, "modes": 0, "error": 0.0, "bound": 0.0}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    result["dtype"] = str(dtype).removeprefix("torch.")
    worst, message, start = 0.0, None, time.perf_counter()
    for case in op.cases:
        if case.hostile or (case.backends is not None and backend not in case.backends):
            continue
        result["modes"] += 1
        try:
            error, bound = _compare(op, case, backend, torch.device(device), dtype)
        except Exception as failure:  # whatever a kernel or compiler raises is this backend's result
            message = f"{case.name}: {type(failure).__name__}: {failure}"
            break
        if not error <= bound:
            message = f"{case.name}: relative error {error:.2e}, expected at most {bound:.2e}"
        if message or error / bound >= worst:
            worst, result["error"], result["bound"] = error / bound, error, bound
        if message:
            break
    return {
        **result,
        "seconds": round(time.perf_counter() - start, 3),
        "status": "FAIL" if message else "PASS",
        "message": message,
    }


def _compare(op: Op, case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Relative error of ``backend`` in one mode, and the most it may be."""
    import torch

    from linnet.ops.core import map_state, state_tensors

    generator = torch.Generator().manual_seed(0)
    inputs = case.make(generator, _ROWS, _LENGTH)
    state = None if case.state is None else case.state(generator, _ROWS)

    def run(by: str, exact: bool) -> list[torch.Tensor]:
        def cast(x: Any, keep: bool) -> Any:
            if exact or not isinstance(x, torch.Tensor):
                return x
            return x.to(device, (torch.float32 if keep else dtype) if x.is_floating_point() else None)

        given = {name: cast(x, name in case.keep_fp32) for name, x in inputs.items()}
        before = map_state(lambda x: cast(x, True), state)
        with torch.no_grad():
            return state_tensors(op.function(**given, state=before, backend=by))

    truth = run("reference", exact=True)

    def error(found: list[torch.Tensor]) -> float:
        pairs = [(x.to("cpu", torch.float64), y.double()) for x, y in zip(found, truth, strict=True) if y.numel()]
        return max(float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in pairs)

    allowed = _FACTOR * error(run("reference", exact=False)) + 8 * torch.finfo(dtype).eps
    return error(run(backend, exact=False)), allowed


def _print_results(results: list[dict[str, Any]]) -> None:
    out = console()
    out.print("[bold]self-test against the float64 reference[/bold]")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = ("op", "backend", "on", "modes", "error", "bound", "seconds", "")
    for column in columns:
        table.add_column(column, justify="right" if column in ("modes", "error", "bound", "seconds") else "left")
    for result in results:
        colour = "green" if result["status"] == "PASS" else "bold red"
        table.add_row(
            result["op"],
            result["backend"],
            f"{result['device']} {_SHORT.get(result['dtype'], result['dtype'])}",  # the table fits 80 columns
            str(result["modes"]),
            f"{result['error']:.1e}",
            f"{result['bound']:.1e}",
            f"{result['seconds']:.2f}",
            f"[{colour}]{result['status']}[/]",
        )
    print_in_full(out, table)
    for result in results:
        if result["message"]:
            where = f"{result['op']} ({result['backend']}, {result['device']})"
            out.print(f"FAIL {where}: {result['message']}", style="red", markup=False)
