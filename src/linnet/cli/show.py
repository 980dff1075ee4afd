"""How the commands print."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["console", "number", "print_in_full", "size"]


def console() -> Console:
    """Where results go: stdout, as wide as the terminal, and wide enough for a table when it is a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def print_in_full(screen: Console, table: Table) -> None:
    """Print a table of figures, none of them cut: on a narrower terminal its lines go on in the next row."""
    needed = Measurement.get(screen, screen.options.update(max_width=10_000), table).maximum
    width = screen.width
    screen.width = max(width, needed)
    screen.print(table)
    screen.width = width


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
