"""Checkpoints of other libraries to decoders and back: `linnet convert`.

Needs neither those libraries nor their models: it reads and writes their ``config.json`` and ``*.safetensors``. What
maps to what stands in :mod:`linnet.interop.layouts`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linnet.models import Decoder, DecoderConfig, atomic_folder
from linnet.models.decoder import check_tensors, refuse_tensors
from linnet.models.io import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    MODEL_TYPE,
    SOURCE,
    SOURCE_FILE,
    TOKENIZER_SETTINGS_FILE,
    WEIGHTS_FILE,
    read_checkpoint,
    weight_files,
    write_checkpoint,
)
from linnet.ops.core import check_choice
from linnet.tasks.tokenizers import FILE as TOKENIZER_FILE
from linnet.tasks.tokenizers import ByteTokenizer, Tokenizer, begin_id, end_ids, load_tokenizer
from linnet.training import find_model

from .layouts import LAYOUTS, Fields, Layout, Shape

__all__ = ["Conversion", "convert"]

# What lies beside a tokenizer and means nothing to a decoder: kept as source_NAME for transformers and the way back.
_BESIDE = (TOKENIZER_SETTINGS_FILE, "special_tokens_map.json", CHAT_TEMPLATE_FILE)


class Conversion(NamedTuple):
    """What :func:`convert` did.

    Attributes:
        source, target: model types, "linnet" being ours.
        parameters: number of parameters.
        dtype: of the embedding written.
        ignored: tensors of the source that are not part of the model.
    """

    source: str
    target: str
    parameters: int
    dtype: torch.dtype
    ignored: list[str]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint folder, in the direction that the source says.

    Args:
        source: a folder in a public layout (``config.json`` and safetensors), which becomes a linnet model; or a linnet
            model or run folder, which becomes one in the layout ``to``.
        target: folder to write. A ``tokenizer.json`` comes along, and so does the source's configuration, from which
            the way back fills in what a decoder does not know, with those of its tokenizer and of generation. A
            ``generation_config.json`` says which tokens begin and end texts. A linnet model's own tokenizer is written
            as transformers reads it.
        to: the layout to write ("llama", "qwen3", …); for a linnet model only.
        dtype: of the tensors to write; when None each keeps its own (decays are often fp32 among halves), but in fp32
            where some are computed (norm weights that a layout stores as differences from 1), which halves would round.
        overwrite: replace ``target`` if it holds something.

    Raises:
        FileNotFoundError: there is no checkpoint.
        FileExistsError: ``target`` holds something and ``overwrite`` is false.
        ValueError: an architecture or option that is not supported, a checkpoint that is damaged, partial or not what
            its configuration says (names the file, and the fields or tensors), an ``eos_token_id`` outside the
            vocabulary, a ``tokenizer.json`` that is none, or a ``target`` that holds the source.
    """
    source = Path(source)
    folder = source if (source / CONFIG_FILE).is_file() or not source.is_dir() else find_model(source)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"source: no checkpoint in {folder} ({CONFIG_FILE} is missing)")
    if folder.resolve().is_relative_to(Path(target).resolve()):
        raise ValueError(f"target: expected a folder that does not hold the source {folder}, got {target}")
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = str(values.get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: damaged ({error!r})") from error
    if kind == MODEL_TYPE or "format_version" in values:
        layout = _layout("to", to)
        return _export(folder, Path(target), str(to), layout, dtype, overwrite)
    if to not in (None, MODEL_TYPE):
        raise ValueError(f"to: {folder} is a {kind} model and becomes a linnet model first, got {to!r}")
    return _import(
        folder, Path(target), kind, values, _layout(f"{folder / CONFIG_FILE}: model_type", kind), dtype, overwrite
    )


def _layout(name: str, kind: str | None) -> Layout:
    if kind == "rwkv":
        raise ValueError(f"{name}: 'rwkv' is RWKV-4, for which linnet has no mixer (it has those of RWKV-6 and RWKV-7)")
    check_choice(name, kind, LAYOUTS)
    return LAYOUTS[str(kind)]


def _import(
    folder: Path,
    target: Path,
    kind: str,
    values: dict[str, Any],
    layout: Layout,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> Conversion:
    config = layout.read(Fields(values))
    generation = _generation(folder, config.vocab_size)
    names, load = _open(folder)
    wanted, tensors = set[str](), dict[str, Tensor]()
    missing, made = list[str](), list[str]()  # what they should have, and what they have not and we do
    for rule in layout.rules(Shape.of(config)):
        present = [next((name for name in either.split("|") if name in names), None) for either in rule.theirs]
        wanted.update(name for name in present if name is not None)
        if None in present:
            absent = [name.partition("|")[0] for name, found in zip(rule.theirs, present, strict=True) if found is None]
            missing += absent
            continue
        parts = [load(str(name)) for name in present]
        if not parts:
            made += rule.ours
        elif layout.widen and dtype is None:
            dtype = torch.promote_types(parts[0].dtype, torch.float32)
        parts = [x if dtype is None or not x.is_floating_point() else x.to(dtype) for x in parts]
        tensors |= _apply(rule.read, parts, rule.theirs, rule.ours)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    over = sorted(set(names) - wanted - tied)
    ignored = [name for name in over if any(re.search(pattern, name) for pattern in layout.ignored)]
    problems = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in over if name not in ignored]
    refuse_tensors(str(folder), problems)
    check_tensors(str(folder), Decoder.meta(config).state_dict(), tensors)
    found = tensors["embed_tokens.weight"].dtype
    tensors |= {name: tensors[name].to(found) for name in made}
    with atomic_folder(target, overwrite) as partial:
        write_checkpoint(partial, config.to_dict(), tensors)
        shutil.copyfile(folder / CONFIG_FILE, partial / SOURCE_FILE)
        _copy(folder / TOKENIZER_FILE, partial / TOKENIZER_FILE)
        for name in (GENERATION_FILE, *_BESIDE):
            _copy(folder / name, partial / f"{SOURCE}{name}")
        _write_json(partial / GENERATION_FILE, generation)
    return Conversion(kind, MODEL_TYPE, sum(x.numel() for x in tensors.values()), found, ignored)


def _generation(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Settings of generation, read by our tokenizers, transformers and vLLM alike: the tokens that begin and end the
    texts of a checkpoint, theirs or ours, of those that its files name the ones that its tokenizer has."""
    begin, ends = begin_id(folder), end_ids(folder, vocab_size)
    tokenizer = _tokenizer(folder)
    if tokenizer is not None:
        begin, ends = tokenizer.begin, list(tokenizer.ends)
    said: dict[str, Any] = {}
    if begin is not None and begin < vocab_size:  # a tokenizer without an end has made one, maybe beyond them
        said["bos_token_id"] = begin
    if ends := [i for i in ends if i < vocab_size]:
        said |= {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": ends[0]}
    return said


def _tokenizer(folder: Path) -> Tokenizer | None:
    """That of a folder; None where it has none, or without the package that reads it, which a conversion can do
    without."""
    there = (folder / TOKENIZER_FILE).is_file() and importlib.util.find_spec("tokenizers") is not None
    return load_tokenizer(folder) if there else None


def _export(
    folder: Path, target: Path, to: str, layout: Layout, dtype: torch.dtype | None, overwrite: bool
) -> Conversion:
    values, tensors = read_checkpoint(folder, dtype=dtype)
    config = DecoderConfig.from_dict(values)
    check_tensors(str(folder / WEIGHTS_FILE), Decoder.meta(config).state_dict(), tensors)
    shape = Shape.of(config)
    try:
        fields = layout.write(shape)
        back = Shape.of(layout.read(Fields(fields))).facts()
    except (ValueError, KeyError) as error:
        raise ValueError(f"to: this decoder is not a {to}: {error}") from error
    facts = shape.facts()
    differing = [key for key in {**facts, **back} if facts.get(key) != back.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {facts.get(key)!r}, there {back.get(key)!r}" for key in differing[:4])
        raise ValueError(f"to: this decoder is not a {to}: {shown}")
    found: dict[str, Tensor] = {}
    for rule in layout.rules(shape):
        theirs = tuple(name.partition("|")[0] for name in rule.theirs)
        found |= _apply(rule.write, [tensors[name] for name in rule.ours], rule.ours, theirs)
    kept: dict[str, Any] = {}
    if (folder / SOURCE_FILE).is_file():
        kept = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        kept = kept if kept.get("model_type") == to else {}
    if kept and Shape.of(layout.read(Fields(kept))).facts() == facts:
        fields = {}  # theirs says the same, in its own words
    type_ = tensors["embed_tokens.weight"].dtype
    header = {"architectures": [layout.architecture], "model_type": to, "dtype": str(type_).removeprefix("torch.")}
    generation = _generation(folder, config.vocab_size)
    if not kept:  # transformers would take the layout's defaults, which are tokens of another vocabulary
        tokens = {name: generation.get(name) for name in ("bos_token_id", "eos_token_id")}
        header |= {**tokens, "pad_token_id": None}  # whose embedding it would not train
    with atomic_folder(target, overwrite) as partial:
        _write_json(partial / CONFIG_FILE, kept | fields | header)
        save_file(
            {name: x.clone(memory_format=torch.contiguous_format) for name, x in found.items()},
            partial / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        if not kept or not _copy(folder / f"{SOURCE}{GENERATION_FILE}", partial / GENERATION_FILE):
            _write_json(partial / GENERATION_FILE, generation)
        _export_tokenizer(folder, partial, generation)
    return Conversion(MODEL_TYPE, to, sum(x.numel() for x in found.values()), type_, [])


def _export_tokenizer(folder: Path, target: Path, generation: dict[str, Any]) -> None:
    """The tokenizer of a linnet folder in files of transformers: those that ``save_pretrained`` has written there, or
    else those that a converted model came with, or else ours."""
    tokenizer = _tokenizer(folder)
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer.backend.save(str(target / TOKENIZER_FILE))
    else:
        _copy(folder / TOKENIZER_FILE, target / TOKENIZER_FILE)
    prefix = "" if (folder / TOKENIZER_SETTINGS_FILE).is_file() else SOURCE
    for name in _BESIDE:
        _copy(folder / f"{prefix}{name}", target / name)
    if tokenizer is not None and not (target / TOKENIZER_SETTINGS_FILE).is_file():
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        for name, ids in generation.items():
            first = ids[0] if isinstance(ids, list) else ids
            said[name.removesuffix("_id")] = tokenizer.backend.id_to_token(first)
        _write_json(target / TOKENIZER_SETTINGS_FILE, said)


def _apply(
    fn: Callable[..., Any], parts: list[Tensor], names: tuple[str, ...], results: tuple[str, ...]
) -> dict[str, Tensor]:
    try:
        return dict(zip(results, fn(parts), strict=True))
    except RuntimeError as error:  # of a shape that does not split as it should
        shapes = ", ".join(f"{name} of shape {list(x.shape)}" for name, x in zip(names, parts, strict=True))
        raise ValueError(f"{shapes}: not the shape that the configuration asks for ({error})") from error


def _open(folder: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    """Names of the tensors in a folder, and a function that reads one."""
    # Others may lie beside them: the same weights in the layout of their makers, adapters.
    files = [file for file in weight_files(folder) if file.is_file()] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"source: no *.safetensors in {folder} (what torch.save wrote is not read)")
    where: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated ({error}); restore it from a copy") from error
        where |= dict.fromkeys(handle.keys(), handle)
    return set(where), lambda name: where[name].get_tensor(name)


def _copy(source: Path, target: Path) -> bool:
    """Whether there was something to copy."""
    if found := source.is_file():
        shutil.copyfile(source, target)
    return found


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
