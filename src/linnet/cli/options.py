"""What several commands make of their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["given", "pick_device"]


def given(context: typer.Context) -> dict[str, str]:
    """The parameters that stand on the command line, by name, as they are written there."""
    flags = {p.name: p.opts[0] for p in context.command.params if p.name}
    sources = {name: context.get_parameter_source(name) for name in flags}
    return {name: flags[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def pick_device(name: str) -> str:
    """The device that ``--device`` means; "auto" is a GPU if there is one.

    Raises:
        ValueError: no device of that name can be used here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown, absent, or not built in
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ", ".join(["auto", "cpu", *gpus])
        raise ValueError(f"device: expected one that this machine has ({here}), got {name!r}") from None
    return name
