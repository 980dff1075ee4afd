"""Where text comes from: the Python standard library, files and folders, Hugging Face data sets.

A corpus is two lists of documents (bytes), one to train on and one held out. Which document goes where depends only
on its name, so the split is the same on every machine and does not move when documents are added.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["Corpus", "load_corpus"]

# Left out of the standard library: what is not part of it, its tests, and tables written by programs.
_NOT_THE_LIBRARY = {"__pycache__", "dist-packages", "lib-dynload", "site-packages"}
_TESTS_AND_TABLES = {"encodings", "idle_test", "idlelib", "pydoc_data", "test", "tests", "turtledemo"}
_FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out.

    Attributes:
        name: where they come from, e.g. ``"stdlib (Python 3.11.7)"``.
        train: documents to learn from, as raw bytes.
        held_out: documents never trained on.
    """

    name: str
    train: list[bytes]
    held_out: list[bytes]

    @property
    def train_bytes(self) -> int:
        """Size of the training documents in bytes."""
        return sum(map(len, self.train))

    @property
    def held_out_bytes(self) -> int:
        """Size of the held-out documents in bytes."""
        return sum(map(len, self.held_out))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with any byte of either part; equal fingerprints mean equal text."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(len(part).to_bytes(8, "little"))
            for document in part:
                digest.update(len(document).to_bytes(8, "little"))
                digest.update(document)
        return digest.hexdigest()[:12]


def load_corpus(source: str = "stdlib", *, held_out: float = 0.05, max_bytes: int | None = None) -> Corpus:
    """Load text and split it into training and held-out documents.

    Args:
        source: one of

            - ``"stdlib"``: the Python files of this interpreter's standard library, without tests, IDLE and
              generated tables. About 9 MB; it differs a little between Python versions.
            - a file: one document of text or any bytes. Its end is held out.
            - a folder: every file below it is a document (hidden files are skipped).
            - ``"hf:NAME"``, ``"hf:OWNER/NAME"``, ``"hf:OWNER/NAME/CONFIG"``, each with ``":FIELD"`` for the column
              (default ``text``): a Hugging Face data set. Its own validation or test split is held out if it has one.
              Needs the ``hf`` extra and a network or a filled cache.
        held_out: share of the documents held out, chosen by a hash of the relative path. With fewer than 20
            documents the end of each one is held out instead.
        max_bytes: stop after about this many bytes (default: take everything).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: nothing to read, a share outside (0, 1), or a data set that cannot be loaded.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: expected a positive number of bytes, got {max_bytes}")
    if source.startswith("hf:"):
        return _hugging_face(source, held_out, max_bytes)
    if source == "stdlib":
        name, documents = f"stdlib (Python {_python_version()})", _standard_library()
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"data: no file or folder {source!r} (give a path, 'stdlib', or 'hf:NAME' for a Hugging Face data set)"
            )
        name, documents = str(source), _files(path)
    try:
        named = list(_up_to(documents, max_bytes))
    except OSError as error:
        raise ValueError(f"data: cannot read {error.filename or source}: {error.strerror}") from error
    if not named:
        raise ValueError(f"data: {source!r} holds no text (every file is empty, or there is none)")
    return Corpus(name, *_split(named, held_out))


def _python_version() -> str:
    import platform

    return platform.python_version()


def _standard_library() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"data: this Python keeps its standard library in no folder ({root}); pass --data instead")
    yield from _walk(root, _NOT_THE_LIBRARY | _TESTS_AND_TABLES, ".py")


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_file():
        yield path.name, path.read_bytes()
    else:
        yield from _walk(path, set(), "")


def _walk(root: Path, skipped: set[str], suffix: str) -> Iterator[tuple[str, bytes]]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        found += [Path(folder, f) for f in files if f.endswith(suffix) and not f.startswith(".")]
    # Sorted by the relative path with forward slashes: the same order and the same hash on every system.
    for name, file in sorted((f.relative_to(root).as_posix(), f) for f in found):
        if file.is_file():
            yield name, file.read_bytes()


def _up_to(documents: Iterable[tuple[str, bytes]], max_bytes: int | None) -> Iterator[tuple[str, bytes]]:
    left = max_bytes
    for name, text in documents:
        if left is not None:
            text = text[: _boundary(text, left)]
            left -= len(text)
        if text:
            yield name, text
        if left is not None and left <= 3:
            return


def _split(named: list[tuple[str, bytes]], share: float) -> tuple[list[bytes], list[bytes]]:
    if len(named) >= _FEW_DOCUMENTS:
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for name, text in named:
            draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64
            parts[draw < share].append(text)
        if all(parts):
            return parts
    train, held_out = [], []
    for _, text in named:
        at = _cut(text, share)
        train.append(text[:at])
        held_out.append(text[at:])
    return [t for t in train if t], [t for t in held_out if t]


def _cut(text: bytes, share: float) -> int:
    """Where the held-out end of a document begins: after a line end if there is one near, never inside a character."""
    at = min(len(text) - 1, round(len(text) * (1 - share)))
    line = text.find(b"\n", at, at + 1000) + 1
    if 0 < line < len(text):
        return line
    return _boundary(text, at)


def _boundary(text: bytes, at: int) -> int:
    """``at``, or up to three bytes before it where a UTF-8 character begins there."""
    for start in range(at, max(-1, at - 4), -1):
        if start >= len(text) or text[start] & 0xC0 != 0x80:
            return start
    return at


def _hugging_face(source: str, share: float, max_bytes: int | None) -> Corpus:
    if find_spec("datasets") is None:
        raise ValueError("data: Hugging Face data sets need the hf extra; install it with: pip install 'linnet[hf]'")
    import datasets

    path, _, field = source.removeprefix("hf:").partition(":")
    parts = path.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"data: expected 'hf:NAME', 'hf:OWNER/NAME' or 'hf:OWNER/NAME/CONFIG', got {source!r}")
    field = field or "text"
    try:
        loaded = datasets.load_dataset(
            "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, streaming=max_bytes is not None
        )
    except Exception as error:  # the library raises many types; all of them mean the same to the user
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"data: cannot load the Hugging Face data set {source!r}: {first}") from error

    def documents(split: str) -> Iterator[tuple[str, bytes]]:
        for i, row in enumerate(loaded[split]):
            yield f"{split}/{i}", _field(row, field).encode()

    train_split = "train" if "train" in loaded else next(iter(loaded))
    named = list(_up_to(documents(train_split), max_bytes))
    if not named:
        raise ValueError(f"data: {source!r} holds no text in its column {field!r}")
    for split in ("validation", "test"):
        if split in loaded and split != train_split:
            limit = None if max_bytes is None else max(1, int(max_bytes * share))
            held_out = [text for _, text in _up_to(documents(split), limit)]
            if held_out:
                return Corpus(source, [text for _, text in named], held_out)
    return Corpus(source, *_split(named, share))


def _field(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(
            f"data: the data set has no column {field!r}, only {', '.join(row)}; name one as 'hf:...:COLUMN'"
        )
    if not isinstance(row[field], str):
        raise ValueError(f"data: expected text in column {field!r}, got {type(row[field]).__name__}")
    return row[field]
