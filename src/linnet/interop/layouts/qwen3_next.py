"""Qwen3-Next: gated delta rule and gated attention, experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from linnet.models import DecoderConfig

from .base import (
    Fields,
    Layout,
    Rule,
    Shape,
    attention,
    experts,
    layer_types,
    outer,
    read_common,
    read_delta,
    renamed,
    same,
    shifted,
    short_conv,
    split_heads,
    swiglu,
    value_dim,
    write_attention,
    write_common,
    write_delta,
    written_types,
)

__all__ = ["LAYOUTS"]


def _read_qwen3_next(f: Fields) -> DecoderConfig:
    eps = f("rms_norm_eps", 1e-6)
    linear = read_delta(f, eps)
    full = {
        "name": "attention",
        "num_heads": f("num_attention_heads"),
        "num_kv_heads": f("num_key_value_heads"),
        "head_dim": f("head_dim"),
        **f.rotation(1.0 if f.values.get("rope_parameters") else 0.25),
        "qk_norm": True,
        "output_gate": True,
        "norm_eps": eps,
    }
    every = f("full_attention_interval", 4)
    types = layer_types(f, lambda i: "linear_attention" if (i + 1) % every else "full_attention")
    mixers = [linear if kind == "linear_attention" else full for kind in types]
    if f("num_experts", 0) == 0:
        return read_common(f, mixers)
    f.only(norm_topk_prob=True, decoder_sparse_step=1)
    dense = sorted(f("mlp_only_layers", []))
    if dense != list(range(len(dense))):
        raise ValueError(f"config.json: mlp_only_layers: only the first layers can be without experts, got {dense}")
    return read_common(
        f,
        mixers,
        mlp="moe",
        num_experts=f("num_experts"),
        experts_per_token=f("num_experts_per_tok"),
        expert_hidden=f("moe_intermediate_size"),
        shared_experts=_multiple(f, "shared_expert_intermediate_size", "moe_intermediate_size"),
        shared_gate=True,
        dense_layers=len(dense),
        balance_loss=f("router_aux_loss_coef", 0.001),
    )


def _multiple(f: Fields, name: str, of: str) -> int:
    if f(name) % f(of):
        raise ValueError(f"config.json: {name} = {f(name)} is not a multiple of {of} = {f(of)}")
    return f(name) // f(of)


def _write_qwen3_next(shape: Shape) -> dict[str, Any]:
    c = shape.config
    types = written_types(shape, gated_deltanet="linear_attention", attention="full_attention")
    fields = write_common(shape) | {"layer_types": types} | write_delta(shape.first("gated_deltanet"))
    if shape.first("attention"):
        fields |= write_attention(shape.first("attention"))
    if "moe" not in shape.mlps:
        return fields | {"num_experts": 0}
    return fields | {
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "moe_intermediate_size": c.expert_hidden or c.hidden,
        "shared_expert_intermediate_size": c.shared_experts * (c.expert_hidden or c.hidden),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(shape.dense())),
        "router_aux_loss_coef": c.balance_loss,
    }


def _qwen3_next_rules(shape: Shape) -> Iterator[Rule]:
    c = shape.config
    yield from outer(shape, shifted)
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield shifted(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
        yield shifted(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        if kind == "attention":
            yield from attention(f"{theirs}.self_attn", f"{ours}.mixer", options, shifted)
        else:
            yield from _fused_delta(f"{theirs}.linear_attn", f"{ours}.mixer", options)
        if shape.mlps[i] != "moe":
            yield from swiglu(f"{theirs}.mlp", f"{ours}.mlp")
            continue
        yield same(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.router.weight")
        yield same(f"{theirs}.mlp.shared_expert_gate.weight", f"{ours}.mlp.shared_gate.weight")
        yield from swiglu(f"{theirs}.mlp.shared_expert", f"{ours}.mlp.shared")
        for name in ("gate_proj", "up_proj", "down_proj"):
            each = f"{theirs}.mlp.experts.{{}}.{name}.weight".format
            yield experts(each, f"{ours}.mlp.{name}", c.num_experts)


def _fused_delta(theirs: str, ours: str, options: Mapping[str, Any]) -> Iterator[Rule]:
    heads, key, value = options["num_heads"], options["head_dim"], value_dim(options)
    group = options["num_v_heads"] // heads
    qkvz = [f"{ours}.{name}_proj.weight" for name in "qkvg"]
    yield split_heads(f"{theirs}.in_proj_qkvz.weight", qkvz, heads, (key, key, group * value, group * value))
    ba = [f"{ours}.{name}_proj.weight" for name in "ba"]
    yield split_heads(f"{theirs}.in_proj_ba.weight", ba, heads, (group, group))
    channels = 2 * heads * key + heads * group * value
    yield short_conv([f"{theirs}.conv1d.weight"], f"{ours}.conv.weight", [channels])
    yield from renamed(theirs, ours, "A_log, dt_bias, norm.weight, out_proj.weight=o_proj.weight")


LAYOUTS = {
    "qwen3_next": Layout(
        "Qwen3NextForCausalLM",
        _read_qwen3_next,
        _write_qwen3_next,
        _qwen3_next_rules,
        ignored=(*Layout.ignored, r"^mtp\."),  # its second head, which predicts further tokens
        widen=True,
    )
}
