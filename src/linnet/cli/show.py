"""How the commands print."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["console", "number", "size"]


def console() -> Console:
    """Where results go: stdout, as wide as the terminal, and wide enough for a table when it is a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def number(n: int) -> str:
    """``1234567`` -> ``1,234,567``."""
    return f"{n:,}"


def size(n: int) -> str:
    """Bytes for people: ``1536`` -> ``1.5 KiB``."""
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
