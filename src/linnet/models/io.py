"""Checkpoints on disk: a model is a folder with ``config.json`` and ``model.safetensors``, replaced as a whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["atomic_folder", "read_checkpoint", "recover_folder", "weight_files", "write_checkpoint"]

FORMAT_VERSION = 1
MODEL_TYPE = "linnet"  # by which the transformers library knows the folder
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Of transformers, beside the model.
GENERATION_FILE = "generation_config.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SOURCE = "source_"  # before the names of files that a converted model came with
SOURCE_FILE = f"{SOURCE}{CONFIG_FILE}"
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}"


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # directories cannot be opened there; the rename is journalled
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover_folder(path: str | Path) -> Path:
    """Finish a replacement that was cut short between its two renames, and return ``path``.

    Call it before reading a folder that :func:`atomic_folder` writes. It does nothing unless ``path`` is missing and
    its predecessor still lies beside it.
    """
    path = Path(path)
    if not path.exists() and _sibling(path, "replaced").is_dir():
        _sibling(path, "replaced").rename(path)
    return path


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Yields an empty folder beside ``path`` (``.NAME.partial``) to write into. When the block ends, everything in it is
    flushed to the disk and the folder takes the place of ``path`` by renaming. When the block raises, the process dies
    or the disk is full, ``path`` stays what it was. One writer at a time per path: a left-over of a killed process is
    removed by the next call.

    Args:
        path: the folder to create or replace. Missing parents are created.
        overwrite: replace ``path`` if it holds something; otherwise that is refused.

    Raises:
        FileExistsError: ``path`` is a file, or a folder that is not empty and ``overwrite`` is false.
        OSError: something could not be written (no space, no permission); says what to do.
    """
    path = Path(os.path.abspath(path))
    partial, replaced = _sibling(path, "partial"), _sibling(path, "replaced")
    recover_folder(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"path: expected a folder, got the file {path}")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"path: {path} already exists; choose another folder or pass overwrite=True")
    survives = "the previous contents are unchanged" if path.exists() else "nothing was written there"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            recover_folder(path)
            raise
        _fsync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_write_error(error):
            raise OSError(
                getattr(error, "errno", errno.EIO),
                f"could not write {path}: {getattr(error, 'strerror', None) or error}; {survives}. Free some space or "
                "check the permissions, or save to another folder",
            ) from error
        raise
    except BaseException:  # Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_write_error(error: Exception) -> bool:
    # torch.save reports a failed write as a RuntimeError of its archive writer, safetensors as its own error.
    if isinstance(error, RuntimeError):
        return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in _WRITE_ERRORS)


def write_checkpoint(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing folder.

    Not atomic by itself: give it the folder that :func:`atomic_folder` yields, beside whatever else belongs there.

    Args:
        config: JSON-able description of the model.
        tensors: the state dict, gathered when it was sharded. Tensors sharing memory are stored once each by name.
    """
    import linnet

    header = {"format_version": FORMAT_VERSION, "linnet_version": linnet.__version__, "model_type": MODEL_TYPE}
    header["config"] = dict(config)
    Path(folder, CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, x in tensors.items():
        x = x.detach().contiguous()
        shared = x.numel() > 0 and x.untyped_storage().data_ptr() in seen
        seen.add(x.untyped_storage().data_ptr())
        plain[name] = x.clone() if shared else x
    save_file(plain, Path(folder, WEIGHTS_FILE), metadata={"format": "pt"})


def read_checkpoint(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_checkpoint` wrote, or transformers from that: the config and the tensors by name.

    Args:
        device: where the tensors go (default: the CPU).
        dtype: floating tensors are cast to it (default: as saved).

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is corrupt, truncated, or of a newer format; names the file. ``dtype`` is not floating, or
            there is no such ``device``.
    """
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected one that PyTorch knows, got {device!r}") from error
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating dtype or None, got {dtype!r}")
    folder = recover_folder(folder)
    file, shards = folder / CONFIG_FILE, weight_files(folder)
    for needed in (file, *shards):
        if not needed.is_file():
            raise FileNotFoundError(f"folder: no model in {folder} ({needed.name} is missing)")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        version, config = header["format_version"], dict(header["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a linnet model description ({error!r}); the file is damaged") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: expected format version {FORMAT_VERSION}, got {version!r}; it was written by linnet "
            f"{header.get('linnet_version')}, use that version or a newer one"
        )
    tensors: dict[str, Tensor] = {}
    for file in shards:
        try:
            with safe_open(file, "pt", device="cpu" if place.type == "meta" else str(place)) as weights:
                for name in weights.keys():  # noqa: SIM118 (not a mapping)
                    x = weights.get_tensor(name)
                    # A copy: on the CPU these are windows into the mapped file, at addresses slow for matmuls.
                    tensors[name] = x.to(place, dtype if x.is_floating_point() else None, copy=True)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated ({error}); restore it from a copy") from error
    return config, tensors


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``; or the files that transformers makes of a large one, which an index lists.

    Raises:
        ValueError: the index is damaged.
    """
    whole, index = folder / WEIGHTS_FILE, folder / f"{WEIGHTS_FILE}.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a list of weight files ({error!r}); the file is damaged") from error
