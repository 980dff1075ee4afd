"""Checkpoints of a run: complete or absent, loadable as a model, and resumable to the bit.

``checkpoints/step-00000400/`` is a model folder (``config.json``, ``model.safetensors``, the tokenizer) that also holds
``optimizer/`` (written by every process, in PyTorch's distributed format, so that a run may go on with another number
of processes), ``rng-PROCESS.pt`` and ``trainer.json``.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from linnet.models.io import atomic_folder, read_checkpoint, recover_folder, write_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["checkpoints", "find_model", "load_checkpoint", "prune", "save_checkpoint", "save_model"]

_PREFIX = "model."  # the decoder inside the module that Accelerate prepares


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folder = Path(run, "checkpoints")
    if not folder.is_dir():
        return []
    for left in folder.glob(".step-*.replaced"):
        recover_folder(folder / left.name.removeprefix(".").removesuffix(".replaced"))
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name))


def find_model(folder: str | Path) -> Path:
    """The model folder meant by ``folder``: itself, the ``model`` of a finished run, or a run's latest checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"folder: there is no {folder}")
    for candidate in (folder, folder / "model", *reversed(checkpoints(folder))):
        if recover_folder(candidate).joinpath("config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"folder: no model in {folder} (expected config.json and model.safetensors, or a run folder of linnet train)"
    )


def _gathered_weights(objective: nn.Module) -> dict[str, torch.Tensor]:
    """The decoder's full weights on the CPU of the main process (elsewhere empty); every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(objective, options=options)
    return {name.removeprefix(_PREFIX): x for name, x in weights.items() if isinstance(x, torch.Tensor)}


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    trainer: dict[str, Any],
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint; every process must call it.

    Args:
        folder: where to; replaced as a whole.
        objective: the prepared module whose ``model`` is the decoder.
        optimizer: the optimiser under Accelerate's wrapper.
        config: of the decoder.
        trainer: what else the loop needs to go on, as JSON.
        extras: called with the folder to add files (the tokenizer), in the main process.

    Raises:
        OSError: on every process, when any of them could not write; whatever was in ``folder`` is unchanged.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    main = accelerator.is_main_process
    partial = folder.parent / f".{folder.name}.partial"  # where atomic_folder lets the main process write

    def begin() -> None:
        if main:
            stack.enter_context(atomic_folder(folder, overwrite=True))

    def write_own() -> None:
        torch.save(_rng_state(), partial / f"rng-{accelerator.process_index}.pt")

    def write_shared() -> None:
        if not main:
            return
        write_checkpoint(partial, config, weights)
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        content = {**trainer, "processes": accelerator.num_processes, "scaler": scaler}
        (partial / "trainer.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if extras is not None:
            extras(partial)

    with ExitStack() as stack:
        _together(accelerator, begin)
        weights = _gathered_weights(objective)
        moments = get_optimizer_state_dict(objective, optimizer)
        _together(accelerator, write_own)
        _together(accelerator, lambda: _save_distributed(moments, partial / "optimizer", accelerator))
        _together(accelerator, write_shared)
        _together(accelerator, stack.close)  # puts the folder in its place


def save_model(
    folder: Path,
    accelerator: Accelerator,
    objective: nn.Module,
    config: dict[str, Any],
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write an ordinary model folder, replacing it as a whole; every process must call it.

    Raises:
        OSError: on every process, when it could not be written; whatever was in ``folder`` is unchanged.
    """
    weights = _gathered_weights(objective)

    def write() -> None:
        if not accelerator.is_main_process:
            return
        with atomic_folder(folder, overwrite=True) as partial:
            write_checkpoint(partial, config, weights)
            if extras is not None:
                extras(partial)

    _together(accelerator, write)


def _together(accelerator: Accelerator, write: Callable[[], None]) -> None:
    """Run ``write`` in every process and fail in all of them if it fails in one, so that none waits for ever."""
    from accelerate.utils import gather_object

    error: BaseException | None = None
    try:
        write()
    except Exception as raised:
        error = raised
    if accelerator.num_processes > 1:
        messages = [m for m in gather_object([None if error is None else str(error)]) if m]
        if messages and error is None:
            raise OSError(f"another process could not write: {messages[0]}")
    if error is not None:
        raise error


def _save_distributed(state: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, checkpoint_id=folder, no_dist=accelerator.num_processes == 1)
    except CheckpointException as error:  # not an Exception; holds one failure a process
        first = next(iter(error.failures.values()))[0]
        raise OSError(getattr(first, "errno", None), getattr(first, "strerror", None) or str(first)) from error


def load_checkpoint(
    folder: Path, accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore the weights, the optimiser and the random-number generators, and return what ``trainer`` was.

    Raises:
        ValueError: something in the folder is damaged or missing, or fits another model; names it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    hint = f"; remove {folder} to go on from the checkpoint before it"
    try:
        trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        _, weights = read_checkpoint(folder)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(objective, {_PREFIX + name: x for name, x in weights.items()}, options=options)
        # Adam's moments come into being at the first step; the loaded values replace these.
        moments = get_optimizer_state_dict(objective, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(moments, checkpoint_id=folder / "optimizer", no_dist=accelerator.num_processes == 1)
        set_optimizer_state_dict(objective, optimizer, moments)
        if accelerator.scaler is not None and trainer["scaler"] is not None:
            accelerator.scaler.load_state_dict(trainer["scaler"])
        rng = folder / f"rng-{accelerator.process_index}.pt"
        if trainer["processes"] == accelerator.num_processes:
            _set_rng_state(torch.load(rng, weights_only=True))
        else:
            warnings.warn(
                f"the checkpoint is of {trainer['processes']} processes and goes on with {accelerator.num_processes}; "
                "batches and weights are restored, random numbers (dropout) begin anew",
                stacklevel=2,
            )
    except CheckpointException as error:
        raise ValueError(f"{folder / 'optimizer'}: damaged ({next(iter(error.failures.values()))[0]}){hint}") from error
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise ValueError(f"{folder}: cannot be resumed ({error}){hint}") from error
    return trainer


def prune(run: Path, keep_last: int) -> None:
    """Delete all but the newest checkpoints of a run, and left-overs of interrupted saves. No save may be under way."""
    for folder in (*checkpoints(run)[:-keep_last], *Path(run, "checkpoints").glob(".step-*.partial")):
        shutil.rmtree(folder, ignore_errors=True)


def _rng_state() -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=False)
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
