"""The `linnet` program: its commands, loaded when they are called, and what a user sees of an error."""

from __future__ import annotations

import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

import linnet

# Each command is the function of its own name in the module of its own name. The line is what `linnet --help` shows;
# so the program answers without importing PyTorch.
_COMMANDS = {
    "train": "Train a language model and report held-out bits per byte.",
    "generate": "Continue a text with a trained model.",
    "serve": "Serve a trained model over HTTP, to OpenAI's clients.",
    "eval": "Measure a trained language model: loss by context length, copying, recall and state tracking.",
    "convert": "Convert a checkpoint of transformers (Llama, Qwen, Olmo Hybrid, Kimi Linear, Mamba, xLSTM), or back.",
    "compare": "Train mixers on a synthetic task or a text in the same decoder and compare them by length.",
    "reproduce": "Run the small version of a paper's central experiment and hold the measured figures against bars.",
    "list": "List the mixers, the ops they run on, or the synthetic tasks.",
    "inspect": "Show one mixer: paper, recurrence, options, size and identities.",
    "dissect": "Take one mixer apart: its exact linear form, its memory, and what its state can track.",
    "bench": "Time the ops beside other libraries, or whole models.",
    "env": "Show versions and devices, and test every op's backends on this machine.",
}


class _LazyGroup(TyperGroup):
    """A group whose commands are imported when they run; until then only their names and summaries exist."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=summary) for name, summary in _COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(str(name)), rest


def _load(name: str) -> Any:
    """The real command called ``name``."""
    single = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    single.command(name)(getattr(import_module(f"linnet.cli.{name}"), name))
    return typer.main.get_command(single)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"linnet {linnet.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_LazyGroup,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Recurrent sequence models, linear and nonlinear: train, generate, look inside."""


def main(arguments: list[str] | None = None) -> None:
    """Run the program on ``arguments`` (default: those of the process) and leave with its exit code.

    What a user can mend (a wrong value, a missing or existing file, a full disk) is one red line on stderr and exit
    code 2, without a traceback unless ``--debug`` is given anywhere on the line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that a pipe's encoding lacks is not worth an abort
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if arguments is None else arguments
    passed_on = [argument for argument in given if argument != "--debug"]
    try:
        app(passed_on, prog_name="linnet")
    except (ValueError, OSError) as error:
        if len(passed_on) < len(given):
            raise
        Console(stderr=True, highlight=False).print(f"Error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
