"""`linnet serve FOLDER`: a model behind an endpoint that OpenAI's clients speak to."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from .options import pick_device


def serve(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A run of `linnet train` or a saved model, with its tokenizer.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests (default: of the folder).")] = None,
    slots: Annotated[
        int, typer.Option(min=1, help="Requests worked on at the same time.", rich_help_panel="Limits")
    ] = 64,
    waiting: Annotated[
        int, typer.Option(min=0, help="Further requests that may wait.", rich_help_panel="Limits")
    ] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.", rich_help_panel="Limits")] = 32768,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.", rich_help_panel="Limits")] = 4096,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="Longest time for one request.", rich_help_panel="Limits")
    ] = 300.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time for running requests when the server stops.", rich_help_panel="Limits")
    ] = 30.0,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, ... or `auto`.", rich_help_panel="Machine")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="`float32` or `bfloat16` (default: as saved).", rich_help_panel="Machine")
    ] = None,
) -> None:
    """Serve a trained model over HTTP, many requests at once.

    Example: `linnet serve runs/default-small`, then `curl localhost:8000/v1/completions -H "Content-Type:
    application/json" -d '{"model": "default-small", "prompt": "def main(", "max_tokens": 50}'`. Ctrl-C stops it, once
    the running requests have ended.
    """
    try:
        import uvicorn

        from linnet.interop.serving.app import make_app
        from linnet.interop.serving.connections import timely_connections
    except ImportError as error:
        raise ValueError(f"serve: needs {error.name}; install it with: pip install 'linnet[serve]'") from error
    import torch

    from linnet.interop.serving.batching import Engine, Limits
    from linnet.models import Decoder
    from linnet.tasks import load_tokenizer
    from linnet.training import find_model

    kinds = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype!r}")
    device = pick_device(device)
    found = find_model(folder)
    limits = Limits(slots=slots, waiting=waiting, prompt_tokens=prompt_tokens, new_tokens=new_tokens, seconds=seconds)
    engine = Engine(Decoder.load(found, device=device, dtype=kinds[dtype]), load_tokenizer(found), limits)
    app = make_app(engine, name or folder.resolve().name, drain_seconds)
    config = uvicorn.Config(
        app,
        http=timely_connections(limits.body_seconds),
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        timeout_keep_alive=15,
        limit_concurrency=4 * (slots + waiting),
    )
    with _listen(host, port) as listener:
        at = listener.getsockname()[1]
        typer.echo(f"serving {name or folder.resolve().name} on http://{host}:{at}/v1 (Ctrl-C to stop)")
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"host, port: cannot listen on {host}:{port} ({error.strerror})") from error
