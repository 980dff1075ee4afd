"""Llama, Qwen2, Qwen3: softmax attention throughout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from linnet.models import DecoderConfig

from .base import (
    NORMS,
    Fields,
    Layout,
    Rule,
    Shape,
    attention,
    layer_types,
    outer,
    read_common,
    renamed,
    swiglu,
    write_attention,
    write_common,
)

__all__ = ["LAYOUTS"]


def _read_transformer(f: Fields, **options: Any) -> DecoderConfig:
    rotation = f.rotation()
    heads = f("num_attention_heads")
    windows = f("use_sliding_window", False)
    types = layer_types(
        f, lambda i: "sliding_attention" if windows and i >= f("max_window_layers", 0) else "full_attention"
    )
    mixers = []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"config.json: layer_types: {kind!r} is not supported here")
        window = {"window": f("sliding_window")} if kind == "sliding_attention" else {}
        shared = {"num_heads": heads, "num_kv_heads": f("num_key_value_heads", heads), **rotation}
        head = {"head_dim": f("head_dim", f("hidden_size") // heads)}
        mixers.append({"name": "attention", **shared, **head, **window, **options})
    return read_common(f, mixers)


def _write_transformer(shape: Shape) -> dict[str, Any]:
    options = [shape.options(i, "attention") for i in range(shape.config.num_layers)]
    kinds = ["full_attention" if o["window"] is None else "sliding_attention" for o in options]
    fields = write_common(shape) | write_attention(options[0])
    if "sliding_attention" in kinds:
        window = next(o["window"] for o in options if o["window"] is not None)
        fields |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
        fields["max_window_layers"] = kinds.index("sliding_attention")
    return fields


def _transformer_rules(shape: Shape) -> Iterator[Rule]:
    yield from outer(shape)
    for i in range(shape.config.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from renamed(theirs, ours, NORMS)
        yield from attention(f"{theirs}.self_attn", f"{ours}.mixer", shape.options(i, "attention"))
        yield from swiglu(f"{theirs}.mlp", f"{ours}.mlp")


_LLAMA = Layout("LlamaForCausalLM", _read_transformer, _write_transformer, _transformer_rules)

LAYOUTS = {
    "llama": _LLAMA,
    "qwen2": replace(_LLAMA, architecture="Qwen2ForCausalLM", read=lambda f: _read_transformer(f, qkv_bias=True)),
    "qwen3": replace(
        _LLAMA,
        architecture="Qwen3ForCausalLM",
        read=lambda f: _read_transformer(f, qk_norm=True, norm_eps=f("rms_norm_eps", 1e-6)),
    ),
}
