"""`linnet convert SOURCE TARGET`: checkpoints of other libraries to linnet's, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint folder of transformers, or a linnet model or run.", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.", show_default=False)],
    to: Annotated[
        str | None, typer.Option(help="From a linnet model: the layout to write, such as `qwen3` or `mamba2`.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="`float32`, `bfloat16` or `float16`; each tensor as in the source where that loses nothing."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the target holds.")] = False,
) -> None:
    """Convert a checkpoint: Llama, Qwen2, Qwen3, Qwen3-Next, Olmo Hybrid, Kimi Linear, Mamba, Mamba-2, xLSTM,
    RecurrentGemma; of flash-linear-attention GLA, RetNet, DeltaNet, Gated DeltaNet, KDA, HGRN-2, Mamba-2.

    The direction is read off the source. Example: `linnet convert downloads/Qwen3-0.6B models/qwen3`, and back with
    `linnet convert models/qwen3 out --to qwen3`.
    """
    import torch

    from linnet.interop.convert import convert as run
    from linnet.ops.core import check_choice

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None:
        check_choice("dtype", dtype, kinds)
    done = run(source, target, to=to, dtype=None if dtype is None else kinds[dtype], overwrite=overwrite)
    kind = str(done.dtype).removeprefix("torch.")
    typer.echo(f"{done.source} -> {done.target}: {done.parameters / 1e6:.1f}M parameters in {kind}, in {target}")
    if done.ignored:
        typer.echo(f"left out, no part of the language model: {len(done.ignored)} tensors, {done.ignored[0]}, ...")
