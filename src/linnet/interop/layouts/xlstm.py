"""xLSTM: mLSTM blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from linnet.models import DecoderConfig

from .base import Fields, Layout, Rule, Shape, backbone, read_common, renamed, write_common

__all__ = ["LAYOUTS"]


def _read_xlstm(f: Fields) -> DecoderConfig:
    f.only(use_bias=False, add_out_norm=True, eps=1e-6, weight_mode="single")
    width, eps = f("hidden_size", f.values.get("embedding_dim")), f("norm_eps", 1e-6)
    multiple = f("ffn_round_up_to_multiple_of", 64)
    mixer = {
        "name": "mlstm",
        "num_heads": f("num_heads"),
        "expand_k": f("qk_dim_factor", 0.5),
        "expand_v": f("v_dim_factor", 1.0),
        "gate_soft_cap": f("gate_soft_cap", 15.0),
        "norm_eps": eps,
    }
    return read_common(
        Fields({**f.values, "hidden_size": width}),
        [mixer] * f("num_hidden_layers", f.values.get("num_blocks")),
        norm_eps=eps,
        mlp_hidden=int((width * f("ffn_proj_factor", 2.667) + multiple - 1) // multiple * multiple),
        logit_soft_cap=f("output_logit_soft_cap", 30.0),
    )


def _write_xlstm(shape: Shape) -> dict[str, Any]:
    c, options = shape.config, shape.options(0, "mlstm")
    fields = write_common(shape)
    for name in ("intermediate_size", "rms_norm_eps", "hidden_act"):
        del fields[name]
    return fields | {
        "embedding_dim": c.d_model,
        "num_blocks": c.num_layers,
        "num_heads": options["num_heads"],
        "qk_dim_factor": options["expand_k"],
        "v_dim_factor": options["expand_v"],
        "gate_soft_cap": options["gate_soft_cap"],
        "norm_eps": c.norm_eps,
        "ffn_proj_factor": c.hidden / c.d_model,
        "ffn_round_up_to_multiple_of": math.gcd(c.hidden, 64),
        "output_logit_soft_cap": c.logit_soft_cap,
        "use_bias": False,
        "add_out_norm": True,
        "weight_mode": "single",
    }


def _xlstm_rules(shape: Shape) -> Iterator[Rule]:
    yield from backbone(shape, "embeddings", "out_norm")
    for i in range(shape.config.num_layers):
        theirs, ours = f"backbone.blocks.{i}", f"layers.{i}"
        yield from renamed(theirs, ours, "norm_mlstm.weight=mixer_norm.weight, norm_ffn.weight=mlp_norm.weight")
        names = ", ".join(f"{name}.weight={name}_proj.weight" for name in "qkv") + ", multihead_norm.weight=norm.weight"
        names += ", ogate_preact.weight=g_proj.weight, out_proj.weight=o_proj.weight"
        for name in "if":
            names += "".join(f", {name}gate_preact.{part}={name}_gate.{part}" for part in ("weight", "bias"))
        yield from renamed(f"{theirs}.mlstm_layer", f"{ours}.mixer", names)
        names = "proj_up_gate.weight=gate_proj.weight, proj_up.weight=up_proj.weight, proj_down.weight=down_proj.weight"
        yield from renamed(f"{theirs}.ffn", f"{ours}.mlp", names)


LAYOUTS = {"xlstm": Layout("xLSTMForCausalLM", _read_xlstm, _write_xlstm, _xlstm_rules)}
