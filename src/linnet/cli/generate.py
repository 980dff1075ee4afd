"""`linnet generate FOLDER`: continue a text with a trained model, printed as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import pick_device

if TYPE_CHECKING:
    from linnet.models import Decoder
    from linnet.tasks import Tokenizer


def generate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A run of `linnet train` or a saved model, with its tokenizer.", show_default=False
        ),
    ],
    prompt: Annotated[
        str, typer.Option(help="Text to continue; `-` reads it from stdin. Empty: begin a new document.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 400,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop before this text (may be given again). The end of a document always stops."),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, help="Below 1 plays safe, above 1 dares; 0 takes the likeliest token.", rich_help_panel="Sampling"
        ),
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.", rich_help_panel="Sampling")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Choose among the likeliest tokens that reach this probability together.", rich_help_panel="Sampling"
        ),
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The same seed gives the same text; without one it differs each time.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, ... or `auto`.", rich_help_panel="Machine")] = "auto",
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph", help="Replay a token's kernels as one graph (GPU).", rich_help_panel="Machine"),
    ] = False,
) -> None:
    """Continue a text with a trained model.

    Example: `linnet generate runs/default-small --prompt "def main("`
    """
    if any(not text for text in stop or ()):
        raise ValueError("stop: expected a text, got an empty one")
    import torch

    from linnet.models import Decoder
    from linnet.tasks import load_tokenizer
    from linnet.training import find_model

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")  # as Python reads arguments
    _check_text(prompt)
    device = pick_device(device)
    found = find_model(folder)
    model, tokenizer = Decoder.load(found, device=device), load_tokenizer(found)
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    sys.stdout.write(prompt)
    pieces = continuation(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        cuda_graph=cuda_graph,
    )
    on_terminal = sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(printable(piece) if on_terminal else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(prompt[error.start]) - 0xDC00  # that of a lone surrogate, which stands for a byte
        raise ValueError(f"prompt: expected UTF-8, got the byte {byte:#x} after {error.start} characters") from None


def printable(text: str) -> str:
    """``text`` without characters that command a terminal, which a model may well come up with."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def continuation(
    model: Decoder, tokenizer: Tokenizer, prompt: str, *, stop: list[str] | None = None, **options
) -> Iterator[str]:
    """Pieces of text that continue ``prompt``, as soon as each is certain: whole characters that no longer can be the
    beginning of a text to stop at."""
    from linnet.models import stream
    from linnet.tasks import TextStream

    ids = [tokenizer.begin, *(int(i) for i in tokenizer.encode(prompt.encode()))]
    text = TextStream(tokenizer, stop or ())
    for step in stream(model, [ids], stop=tokenizer.ends, **options):
        if piece := text(int(step.tokens[0])):
            yield piece
        if text.stopped:
            return
    yield text(None)
