"""RecurrentGemma: Griffin's recurrent block and attention over a window, GeGLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from linnet.models import DecoderConfig

from .base import (
    Fields,
    Layout,
    Rule,
    Shape,
    attention,
    outer,
    read_common,
    renamed,
    reshaped,
    shifted,
    short_conv,
    write_attention,
    write_common,
    written_types,
)

__all__ = ["LAYOUTS"]

_GELU = "gelu_pytorch_tanh"
_MAPS = (("x", "x"), ("y", "y"), ("out", "o"))


def _embed_scale(width: int) -> float:
    """sqrt(width) as the bf16 number that the released class multiplies by."""
    return float(torch.tensor(width**0.5, dtype=torch.bfloat16))


def _read_recurrent_gemma(f: Fields) -> DecoderConfig:
    f.only(hidden_activation=_GELU)
    width, heads, count = f("hidden_size"), f("num_attention_heads"), f("num_hidden_layers")
    recurrent = {
        "name": "rglru",
        "width": f("lru_width", width),
        "num_heads": heads,
        "conv_size": f("conv1d_width", 4),
        "plain_start": True,
    }
    full = {
        "name": "attention",
        "num_heads": heads,
        "num_kv_heads": f("num_key_value_heads", heads),
        "head_dim": width // heads,
        "window": f("attention_window_size", 2048),
        "o_bias": True,
        **f.rotation(0.5),
    }
    kinds = f("block_types", ["recurrent", "recurrent", "attention"])
    if set(kinds) - {"recurrent", "attention"}:
        raise ValueError(f"config.json: block_types: expected 'recurrent' and 'attention', got {kinds!r}")
    mixers = [recurrent if kinds[i % len(kinds)] == "recurrent" else full for i in range(count)]
    return read_common(
        f,
        mixers,
        mlp="geglu",
        mlp_hidden=f("intermediate_size") // 2,
        mlp_bias=True,
        embed_scale=_embed_scale(width),
        logit_soft_cap=f("logits_soft_cap", 30.0),
        tie_embeddings=f("tie_word_embeddings", True),
    )


def _write_recurrent_gemma(shape: Shape) -> dict[str, Any]:
    types = written_types(shape, rglru="recurrent", attention="attention")
    fields = write_common(shape) | {"intermediate_size": 2 * shape.config.hidden, "hidden_activation": _GELU}
    recurrent, full = shape.first("rglru"), shape.first("attention")
    if not recurrent or not full:
        raise ValueError("mixers: expected both rglru and attention layers")
    fields |= write_attention(full)
    del fields["hidden_act"], fields["head_dim"]
    return fields | {
        "lru_width": recurrent["width"],
        "conv1d_width": recurrent["conv_size"],
        "attention_window_size": full["window"],
        "block_types": types,
        "logits_soft_cap": shape.config.logit_soft_cap,
    }


def _recurrent_gemma_rules(shape: Shape) -> Iterator[Rule]:
    for rule in outer(shape, shifted):
        yield rule._replace(theirs=tuple(name.replace("model.norm", "model.final_norm") for name in rule.theirs))
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield shifted(f"{theirs}.temporal_pre_norm.weight", f"{ours}.mixer_norm.weight")
        yield shifted(f"{theirs}.channel_pre_norm.weight", f"{ours}.mlp_norm.weight")
        names = ", ".join(f"{name}_proj.{p}" for name in ("gate", "up", "down") for p in ("weight", "bias"))
        yield from renamed(f"{theirs}.mlp_block", f"{ours}.mlp", names)
        block, mixer = f"{theirs}.temporal_block", f"{ours}.mixer"
        if kind == "attention":
            yield from attention(block, mixer, options)
            continue
        names = ", ".join(f"linear_{their}.{p}={our}_proj.{p}" for their, our in _MAPS for p in ("weight", "bias"))
        names += ", rg_lru.recurrent_param=decay, conv_1d.bias=conv.bias"
        names += ", rg_lru.recurrent_gate_weight=r_weight, rg_lru.input_gate_weight=i_weight"
        yield from renamed(block, mixer, names)
        yield short_conv([f"{block}.conv_1d.weight"], f"{mixer}.conv.weight", [options["width"]])
        heads, width = options["num_heads"], options["width"]
        for their, our in (("recurrent", "r"), ("input", "i")):
            shapes = (heads, width // heads), (width,)
            yield reshaped(f"{block}.rg_lru.{their}_gate_bias", f"{mixer}.{our}_bias", *shapes)


LAYOUTS = {
    "recurrent_gemma": Layout(
        "RecurrentGemmaForCausalLM",
        _read_recurrent_gemma,
        _write_recurrent_gemma,
        _recurrent_gemma_rules,
        widen=True,
    )
}
