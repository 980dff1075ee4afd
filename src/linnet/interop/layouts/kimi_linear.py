"""Kimi Linear: KDA and latent attention without positions, experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from linnet.models import DecoderConfig

from .base import (
    NORMS,
    Fields,
    Layout,
    Rule,
    Shape,
    absent,
    experts,
    layer_types,
    outer,
    read_common,
    renamed,
    reshaped,
    same,
    swiglu,
    three_convs,
    write_common,
    written_types,
)

__all__ = ["LAYOUTS"]


def _read_kimi_linear(f: Fields) -> DecoderConfig:
    inner = f.values.get("linear_attn_config") or {}
    f.only(moe_renormalize=True, num_expert_group=1, use_grouped_topk=True, moe_router_activation_func="sigmoid")
    f.only(mla_use_nope=True, moe_layer_freq=1)
    eps, count = f("rms_norm_eps", 1e-5), f("num_hidden_layers")
    kda = {
        "name": "kda",
        "num_heads": inner.get("num_heads") or f("linear_num_heads", 32),
        "head_dim": inner.get("head_dim") or f("linear_head_dim", 128),
        "conv_size": inner.get("short_conv_kernel_size") or f("linear_conv_kernel_dim", 4),
        "norm_eps": eps,
    }
    mla = {
        "name": "mla",
        "num_heads": f("num_attention_heads"),
        "kv_rank": f("kv_lora_rank"),
        "nope_dim": f("qk_nope_head_dim"),
        "rope_dim": f("qk_rope_head_dim"),
        "v_dim": f("v_head_dim"),
        "norm_eps": 1e-6,  # of the latents: the class's own default, whatever the configuration says
    }
    if f.values.get("q_lora_rank") is not None:
        mla["q_rank"] = f("q_lora_rank")
    full = [layer - 1 for layer in inner.get("full_attn_layers", ())]  # counted from 1
    listed = bool(full)
    types = layer_types(
        f, lambda i: "full_attention" if (i in full if listed else i and i % 4 == 0) else "linear_attention"
    )
    mixers = [kda if kind == "linear_attention" else mla for kind in types]
    kinds = f.values.get("mlp_layer_types")
    dense = f("first_k_dense_replace", 1) if kinds is None else kinds.count("dense")
    if kinds is not None and kinds != ["dense"] * dense + ["sparse"] * (count - dense):
        raise ValueError("config.json: mlp_layer_types: only the first layers can be without experts")
    return read_common(
        f,
        mixers,
        mlp="moe",
        norm_eps=eps,
        num_experts=f("num_experts"),
        experts_per_token=f("num_experts_per_token"),
        expert_hidden=f("moe_intermediate_size"),
        shared_experts=f("num_shared_experts", 1),
        dense_layers=dense,
        balance_loss=0.0,
        router="sigmoid",
        router_scale=f("routed_scaling_factor", 1.0),
        router_bias_rate=0.001,
    )


def _write_kimi_linear(shape: Shape) -> dict[str, Any]:
    c = shape.config
    kda, mla = shape.first("kda"), shape.first("mla")
    if not kda or not mla:
        raise ValueError("mixers: expected both kda and mla layers")
    return write_common(shape) | {
        "layer_types": written_types(shape, kda="linear_attention", mla="full_attention"),
        "mlp_layer_types": ["sparse" if kind == "moe" else "dense" for kind in shape.mlps],
        "linear_num_heads": kda["num_heads"],
        "linear_head_dim": kda["head_dim"],
        "linear_conv_kernel_dim": kda["conv_size"],
        "num_attention_heads": mla["num_heads"],
        "num_key_value_heads": mla["num_heads"],
        "kv_lora_rank": mla["kv_rank"],
        "q_lora_rank": mla["q_rank"],
        "qk_nope_head_dim": mla["nope_dim"],
        "qk_rope_head_dim": mla["rope_dim"],
        "v_head_dim": mla["v_dim"],
        "num_experts": c.num_experts,
        "num_experts_per_token": c.experts_per_token,
        "moe_intermediate_size": c.expert_hidden or c.hidden,
        "num_shared_experts": c.shared_experts,
        "routed_scaling_factor": c.router_scale,
        "moe_renormalize": True,
        "num_expert_group": 1,
        "topk_group": 1,
    }


def _kimi_linear_rules(shape: Shape) -> Iterator[Rule]:
    c = shape.config
    yield from outer(shape)
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from renamed(theirs, ours, NORMS)
        attn, mixer = f"{theirs}.self_attn", f"{ours}.mixer"
        if kind == "kda":
            heads, size = options["num_heads"], options["head_dim"]
            names = ", ".join(f"{name}_proj.weight" for name in "qkvbo") + ", dt_bias, o_norm.weight=norm.weight"
            for name in "fg":
                names += f", {name}_a_proj.weight={name}_proj.0.weight, {name}_b_proj.weight={name}_proj.1.weight"
            yield from renamed(attn, mixer, names)
            yield from three_convs(attn, mixer, (heads * size,) * 3)
            yield reshaped(f"{attn}.A_log", f"{mixer}.A_log", (1, 1, heads, 1), (heads,))
            yield absent(f"{mixer}.g_proj.1.bias", [heads * size])
        else:
            names = "kv_a_proj_with_mqa.weight=kv_down.weight, kv_a_layernorm.weight=kv_norm.weight"
            names += ", kv_b_proj.weight=kv_up.weight, o_proj.weight, "
            if options["q_rank"] is None:
                names += "q_proj.weight"
            else:
                names += "q_a_proj.weight=q_proj.0.weight, q_a_layernorm.weight=q_proj.1.weight"
                names += ", q_b_proj.weight=q_proj.2.weight"
            yield from renamed(attn, mixer, names)
        moe = f"{theirs}.block_sparse_moe"
        if shape.mlps[i] != "moe":
            yield from swiglu(f"{theirs}.mlp|{moe}", f"{ours}.mlp")
            continue
        yield same(f"{moe}.gate.weight", f"{ours}.mlp.router.weight")
        yield same(f"{moe}.gate.e_score_correction_bias", f"{ours}.mlp.router_bias")
        yield from swiglu(f"{moe}.shared_experts", f"{ours}.mlp.shared")
        for their, our in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            yield experts(f"{moe}.experts.{{}}.{their}.weight".format, f"{ours}.mlp.{our}", c.num_experts)


LAYOUTS = {"kimi_linear": Layout("KimiLinearForCausalLM", _read_kimi_linear, _write_kimi_linear, _kimi_linear_rules)}
