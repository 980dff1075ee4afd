"""Options of the whole test suite."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch

from interpreted import INTERPRETED, hasten


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the contract suite: cpu (default), cuda, …")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device given with --device."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit(f"--device {device}: PyTorch finds no CUDA device here", returncode=4)
    if device.type == "cuda":
        with warnings.catch_warnings():  # the first product of the backward thread remarks that it has no context yet
            warnings.simplefilter("ignore")
            x = torch.ones(2, 2, device=device, requires_grad=True)
            (x @ x).sum().backward()
    return device


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            hasten(patch)
        yield


@pytest.fixture(autouse=True, scope="module")
def _permanent() -> None:
    """What is there between two files mostly stays. Training and compiling call the garbage collector again and again,
    which need not look through all of it every time, nor as often on its own."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers in every order: one that fails fails again."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """The models are tiny: more threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
