"""Tokenizers: raw bytes, and any `tokenizers` JSON file.

Every tokenizer maps bytes to ids and back and has an end-of-document token. It marks both ends of each document, so
that the first byte is predicted from something and bits per byte count everything a reader would have to be told.
Converted models may know another token before a document, ``begin``, and more tokens to stop at, ``ends``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from linnet.models.io import CONFIG_FILE, GENERATION_FILE

__all__ = [
    "ByteTokenizer",
    "JsonTokenizer",
    "TextStream",
    "Tokenizer",
    "gives_back",
    "load_tokenizer",
    "make_tokenizer",
    "train_bpe",
]

FILE = "tokenizer.json"
_END = "<|endoftext|>"
_KNOWN_ENDS = (_END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the library needs of a tokenizer.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` of the same ids.
        name: for people, e.g. ``"byte"``.
        vocab_size: one more than the largest id.
        end: id of the end-of-document token.
        begin: id before the first token of a document: ``end``, but in a converted model what its makers put there.
        ends: ids at which generation stops: ``end``, and in a converted model those at which its makers stop.
    """

    name: str
    vocab_size: int
    end: int
    begin: int
    ends: tuple[int, ...]

    @property
    def backend(self) -> Any: ...

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of ``text`` (1-D, unsigned), without end-of-document tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of ``ids``; those of ``ends`` give nothing."""
        ...

    def stream(self) -> Callable[[int | None], str]:
        """A function that turns one id after the other into printable text and holds back incomplete characters.
        Call it with None at the end to get what is left."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into an existing folder."""
        ...


class ByteTokenizer:
    """One token a byte (ids 0 to 255), and 256 as end of document. Loses nothing, whatever the bytes are."""

    name = "byte"
    vocab_size = 257
    begin = end = 256
    ends = (end,)

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(i for i in map(int, ids) if i < 256)

    def stream(self) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def feed(token: int | None) -> str:
            if token is None:
                return decoder.decode(b"", final=True)
            return decoder.decode(self.decode([token]))

        return feed

    def save(self, folder: str | Path) -> None:
        Path(folder, FILE).write_text(json.dumps({"linnet": "byte"}) + "\n", encoding="utf-8")

    @property
    def backend(self) -> Any:
        """The same ids as a ``tokenizers.Tokenizer``, for other libraries; it takes text alone.

        Raises:
            ValueError: the `tokenizers` package is missing.
        """
        backend = _library()
        alphabet = {character: i for i, character in enumerate(_byte_alphabet())}
        made = backend.Tokenizer(backend.models.BPE(vocab=alphabet, merges=[]))
        made.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = backend.decoders.ByteLevel()
        made.add_special_tokens([_END])
        assert made.token_to_id(_END) == self.end
        return made


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's convention)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        file: its JSON file. If it knows none of the usual end-of-document tokens, the first of ``ends`` is taken, or
            one is added.
        ends: more ids at which generation stops.
        begin: id before the first token of a document; the end-of-document token when None.

    Of ``begin`` and ``ends``, what is no special token of the file is passed over: defaults of another vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tokenizer, or the `tokenizers` package is missing.
    """

    def __init__(self, file: str | Path, ends: Sequence[int] = (), begin: int | None = None):
        backend = _library()
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"tokenizer: no file {str(file)!r} (give 'byte', 'bpe:SIZE' or a tokenizers JSON file)"
            )
        try:
            self._start(backend.Tokenizer.from_file(str(file)), Path(file).name, ends, begin)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {file} is not a tokenizers JSON file ({error})") from error

    @classmethod
    def wrap(cls, backend: object, name: str) -> JsonTokenizer:
        """From a ``tokenizers.Tokenizer`` in memory."""
        self = cls.__new__(cls)
        self._start(backend, name)
        return self

    def _start(self, backend, name: str, ends: Sequence[int] = (), begin: int | None = None) -> None:
        self.backend, self.name = backend, name
        backend.no_truncation()  # which files may ask for, and which would quietly cut documents
        backend.no_padding()
        special = backend.get_added_tokens_decoder()
        found = [i for t in _KNOWN_ENDS if (i := backend.token_to_id(t)) is not None][:1]
        found += [i for i in ends if i in special]
        if not found:
            backend.add_special_tokens([_END])
            found = [backend.token_to_id(_END)]
        self.begin: int = begin if begin is not None and begin in special else found[0]
        self.end: int = found[0]
        self.ends: tuple[int, ...] = tuple(dict.fromkeys(found))
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: bytes) -> np.ndarray:
        try:
            plain = text.decode("utf-8")
        except UnicodeDecodeError as error:
            near = text[max(0, error.start - 20) : error.start + 20]
            raise ValueError(
                f"tokenizer: {self.name} needs UTF-8 text, but byte {error.start} of a document is not ({near!r}); "
                "the byte tokenizer takes anything"
            ) from error
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        return np.array(self.backend.encode(plain, add_special_tokens=False).ids, dtype=dtype)

    def decode(self, ids: Sequence[int]) -> bytes:
        return self.backend.decode([int(i) for i in ids if int(i) not in self.ends], skip_special_tokens=False).encode()

    def stream(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=False)
        held: list[int] = []  # the tokens of an incomplete character, which the library never gives back

        def feed(token: int | None) -> str:
            if token is None:
                return self.backend.decode(held, skip_special_tokens=False)
            if token in self.ends:
                return ""
            held.append(token)
            text = decoder.step(self.backend, token)
            if text is not None:
                held.clear()
            return text or ""

        return feed

    def save(self, folder: str | Path) -> None:
        self.backend.save(str(Path(folder, FILE)))


class TextStream:
    """Text of tokens as they come, up to a text to stop at: each piece as soon as it is certain, whole characters that
    no longer can be the beginning of such a text.

    Args:
        tokenizer: the tokenizer.
        stop: texts to stop at, none of them empty; they are not part of the output.

    Attributes:
        stopped: whether one has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._feed, self._stop, self._held, self.stopped = tokenizer.stream(), tuple(stop), "", False

    def __call__(self, token: int | None) -> str:
        """The text that has become certain with one more token, or with the end (None)."""
        if self.stopped:
            return ""
        self._held += self._feed(token)
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        self.stopped = bool(found)
        # Back to the longest end of what is held that a text to stop at begins with.
        keep = max((n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0)
        certain = min(found) if found else len(self._held) - (0 if token is None else keep)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece


def gives_back(tokenizer: Tokenizer, documents: Iterable[bytes]) -> bool:
    """Whether ``tokenizer`` gives back documents byte for byte, by the beginnings of some of them. Where it does not,
    bits per byte mean little: nobody could tell the text from its tokens."""
    beginnings = (document[: 1 << 14].decode("utf-8", "ignore").encode() for document in islice(documents, 16))
    return all(tokenizer.decode(tokenizer.encode(text)) == text for text in beginnings)  # type: ignore[arg-type]


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> JsonTokenizer:
    """Learn a byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909; on bytes as in GPT-2).

    Args:
        documents: UTF-8 text.
        vocab_size: number of tokens, at least 257: the bytes, the end of document and the merges.

    Raises:
        ValueError: the size is too small, or the `tokenizers` package is missing.
    """
    if vocab_size < 257:
        raise ValueError(f"tokenizer: expected 'bpe:SIZE' with a size of at least 257, got {vocab_size}")
    library = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = library.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.decode("utf-8", errors="replace") for d in documents), trainer)
    return JsonTokenizer.wrap(backend, f"bpe:{vocab_size}")


def make_tokenizer(spec: str, documents: Iterable[bytes] = ()) -> Tokenizer:
    """``"byte"``, ``"bpe:SIZE"`` (learned on ``documents``) or the path of a `tokenizers` JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the spec or the file is not valid.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdigit():
            raise ValueError(f"tokenizer: expected 'bpe:SIZE' with a whole number, got {spec!r}")
        return train_bpe(documents, int(size))
    return JsonTokenizer(spec)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a model folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: its file is damaged, or that of the settings of generation.
    """
    file = Path(folder, FILE)
    if not file.is_file():
        raise FileNotFoundError(f"folder: no tokenizer in {folder} ({FILE} is missing)")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); restore it from a copy") from error
    if content == {"linnet": "byte"}:
        return ByteTokenizer()
    return JsonTokenizer(file, end_ids(folder), begin_id(folder))


def begin_id(folder: str | Path) -> int | None:
    """Id that texts begin with by the files of a checkpoint, ours or of transformers: ``bos_token_id`` of
    ``generation_config.json`` or else of ``config.json``. None where neither says an id.

    Raises:
        ValueError: a file is damaged.
    """
    said = [read_settings(Path(folder, name)).get("bos_token_id") for name in (GENERATION_FILE, CONFIG_FILE)]
    return next((i for i in said if type(i) is int and i >= 0), None)


def end_ids(folder: str | Path, vocab_size: int | None = None) -> list[int]:
    """Ids at which generation stops by the files of a checkpoint, ours or of transformers: ``eos_token_id``, one or a
    list, of ``generation_config.json`` or else of ``config.json``. None where neither says, or -1, as some write it.

    Args:
        folder: where the files are.
        vocab_size: number of ids there are; None for any.

    Raises:
        ValueError: a file is damaged, or says something else than ids, or ids outside the vocabulary.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        file = Path(folder, name)
        said = read_settings(file).get("eos_token_id")
        if said is None or said == -1:
            continue
        ids = said if isinstance(said, list) else [said]
        if not all(type(i) is int and i >= 0 and (vocab_size is None or i < vocab_size) for i in ids):
            expected = "a token id or a list of them" + ("" if vocab_size is None else f", from 0 to {vocab_size - 1}")
            raise ValueError(f"{file}: eos_token_id: expected {expected}, got {said!r}")
        return ids
    return []


def read_settings(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); restore it from a copy") from error


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "tokenizer: everything but 'byte' needs the tokenizers package; install it with: pip install 'linnet[hf]'"
        ) from error
    return tokenizers
