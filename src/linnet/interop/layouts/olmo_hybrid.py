"""Olmo Hybrid: gated delta rule in pre-norm layers, attention in post-norm layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from linnet.models import DecoderConfig

from .base import (
    Fields,
    Layout,
    Rule,
    Shape,
    attention,
    layer_types,
    outer,
    pattern,
    read_common,
    read_delta,
    renamed,
    swiglu,
    three_convs,
    value_dim,
    write_attention,
    write_common,
    write_delta,
    written_types,
)

__all__ = ["LAYOUTS"]


def _read_olmo_hybrid(f: Fields) -> DecoderConfig:
    heads, width = f("num_attention_heads"), f("hidden_size")
    values = dict(f.values)
    values.setdefault("linear_num_key_heads", heads)
    values.setdefault("linear_num_value_heads", heads)
    values.setdefault("linear_key_head_dim", int(0.75 * width / values["linear_num_key_heads"]))
    values.setdefault("linear_value_head_dim", 2 * values["linear_key_head_dim"])
    # The norm of the reading has an epsilon of its own, whatever the configuration says.
    linear = read_delta(Fields(values), 1e-5, neg_eigval=f("linear_allow_neg_eigval", True))
    full: dict[str, Any] = {
        "name": "attention",
        "num_heads": heads,
        "num_kv_heads": f("num_key_value_heads", heads),
        "head_dim": f("head_dim", width // heads),
        "qk_norm": "joint",
        "norm_eps": f("rms_norm_eps", 1e-6),
    }
    # Without positions the base is there, and null; what is not there is a default.
    rope = f.values.get("rope_parameters") or {}
    full |= {"rope": False} if rope.get("rope_theta", ...) is None else f.rotation()
    count = f("num_hidden_layers")
    types = layer_types(f, lambda i: "full_attention" if i % 4 == 3 or i + 1 == count < 4 else "linear_attention")
    mixers = [linear if kind == "linear_attention" else full for kind in types]
    places = ["pre" if kind == "linear_attention" else "post" for kind in types]
    return read_common(f, mixers, norm_position=pattern(places))


def _write_olmo_hybrid(shape: Shape) -> dict[str, Any]:
    types = written_types(shape, gated_deltanet="linear_attention", attention="full_attention")
    linear, full = shape.first("gated_deltanet"), shape.first("attention")
    if not linear or not full:
        raise ValueError("mixers: expected both gated_deltanet and attention layers")
    fields = write_common(shape) | write_attention(full) | write_delta(linear)
    if full["head_dim"] * full["num_heads"] == shape.config.d_model:
        del fields["head_dim"]
    return fields | {"layer_types": types, "linear_allow_neg_eigval": linear["neg_eigval"]}


def _olmo_hybrid_rules(shape: Shape) -> Iterator[Rule]:
    yield from outer(shape)
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from swiglu(f"{theirs}.mlp", f"{ours}.mlp")
        if kind == "attention":
            norm = "post_attention_layernorm.weight|feedforward_layer_norm.weight"
            yield from renamed(
                theirs, ours, f"{norm}=mixer_norm.weight, post_feedforward_layernorm.weight=mlp_norm.weight"
            )
            yield from attention(f"{theirs}.self_attn", f"{ours}.mixer", options)
            continue
        norms = "attention_layer_norm.weight=mixer_norm.weight, feedforward_layer_norm.weight=mlp_norm.weight"
        yield from renamed(theirs, ours, norms)
        key, value = options["num_heads"] * options["head_dim"], options["num_v_heads"] * value_dim(options)
        yield from three_convs(f"{theirs}.linear_attn", f"{ours}.mixer", (key, key, value))
        names = ", ".join(f"{name}_proj.weight" for name in "qkvabgo")
        yield from renamed(
            f"{theirs}.linear_attn", f"{ours}.mixer", f"{names}, A_log, dt_bias, o_norm.weight=norm.weight"
        )


LAYOUTS = {"olmo_hybrid": Layout("OlmoHybridForCausalLM", _read_olmo_hybrid, _write_olmo_hybrid, _olmo_hybrid_rules)}
