"""The command line: `linnet train | generate | list | inspect | env`."""

from .app import app, main

__all__ = ["app", "main"]
