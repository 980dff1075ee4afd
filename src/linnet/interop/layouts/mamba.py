"""Mamba and Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from linnet.models import DecoderConfig

from .base import Fields, Layout, Rule, Shape, backbone, read_common, renamed, same, short_conv, write_common

__all__ = ["LAYOUTS"]


def _read_mamba2(f: Fields) -> DecoderConfig:
    f.only(use_bias=False, use_conv_bias=True, rmsnorm=True, D_has_hdim=False)
    if f.values.get("layer_norm_epsilon") is None:  # transformers' class gates first, whatever its files say
        f.only(norm_before_gate=False)
    # Second names: flash-linear-attention's.
    low, high = f.values.get("time_step_limit") or f("dt_limit", [0.0, float("inf")])
    high = float("inf") if isinstance(high, dict) else float(high)  # JSON has no infinity: {"__float__": "Infinity"}
    if (float(low), high) != (0.0, float("inf")):
        raise ValueError(f"config.json: time_step_limit = {[low, high]} is not supported, only no limit")
    eps = f.values.get("layer_norm_epsilon") or f("norm_eps", 1e-5)
    mixer = {
        "name": "mamba2",
        "expand": f("expand", 2),
        "head_dim": f("head_dim", 64),
        "state_dim": f("state_size", 128),
        "num_groups": f("n_groups", 1),
        "conv_size": f("conv_kernel", 4),
        "norm_eps": eps,
    }
    return read_common(f, [mixer] * f("num_hidden_layers"), mlp="none", norm_eps=eps)


def _write_mamba2(shape: Shape) -> dict[str, Any]:
    options = shape.options(0, "mamba2")
    fields = write_common(shape)
    del fields["intermediate_size"], fields["rms_norm_eps"]
    return fields | {
        "layer_norm_epsilon": shape.config.norm_eps,
        "expand": options["expand"],
        "head_dim": options["head_dim"],
        "num_heads": options["expand"] * shape.config.d_model // options["head_dim"],
        "state_size": options["state_dim"],
        "n_groups": options["num_groups"],
        "conv_kernel": options["conv_size"],
        "use_bias": False,
        "use_conv_bias": True,
    }


def _mamba2_rules(shape: Shape) -> Iterator[Rule]:
    yield from backbone(shape, "embeddings", "norm_f")
    for i in range(shape.config.num_layers):
        options = shape.options(i, "mamba2")
        theirs, ours = f"backbone.layers.{i}", f"layers.{i}"
        yield same(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
        names = "A_log, D, dt_bias, conv1d.bias=conv.bias, in_proj.weight, norm.weight, out_proj.weight"
        yield from renamed(f"{theirs}.mixer", f"{ours}.mixer", names)
        channels = options["expand"] * shape.config.d_model + 2 * options["num_groups"] * options["state_dim"]
        yield short_conv([f"{theirs}.mixer.conv1d.weight"], f"{ours}.mixer.conv.weight", [channels])


def _read_mamba(f: Fields) -> DecoderConfig:
    f.only(use_bias=False, use_conv_bias=True, intermediate_size=f("expand", 2) * f("hidden_size"))
    eps = f("layer_norm_epsilon", 1e-5)
    rank = f("time_step_rank", "auto")
    mixer = {
        "name": "mamba",
        "expand": f("expand", 2),
        "state_dim": f("state_size", 16),
        "dt_rank": math.ceil(f("hidden_size") / 16) if rank == "auto" else rank,
        "conv_size": f("conv_kernel", 4),
    }
    tied = f("tie_word_embeddings", True)  # older releases write what differs from their defaults
    return read_common(f, [mixer] * f("num_hidden_layers"), mlp="none", norm_eps=eps, tie_embeddings=tied)


def _write_mamba(shape: Shape) -> dict[str, Any]:
    options = shape.options(0, "mamba")
    fields = write_common(shape)
    del fields["rms_norm_eps"]
    inner = options["expand"] * shape.config.d_model
    rank = -(-shape.config.d_model // 16) if options["dt_rank"] is None else options["dt_rank"]
    return fields | {
        "layer_norm_epsilon": shape.config.norm_eps,
        "expand": options["expand"],
        "intermediate_size": inner,
        "state_size": options["state_dim"],
        "time_step_rank": rank,
        "conv_kernel": options["conv_size"],
        "use_bias": False,
        "use_conv_bias": True,
    }


def _mamba_rules(shape: Shape) -> Iterator[Rule]:
    yield from backbone(shape, "embeddings", "norm_f")
    for i in range(shape.config.num_layers):
        options = shape.options(i, "mamba")
        theirs, ours = f"backbone.layers.{i}", f"layers.{i}"
        yield same(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
        names = "A_log, D, conv1d.bias=conv.bias, in_proj.weight, x_proj.weight, dt_proj.weight, dt_proj.bias, "
        yield from renamed(f"{theirs}.mixer", f"{ours}.mixer", names + "out_proj.weight")
        channels = options["expand"] * shape.config.d_model
        yield short_conv([f"{theirs}.mixer.conv1d.weight"], f"{ours}.mixer.conv.weight", [channels])


LAYOUTS = {
    "mamba": Layout("MambaForCausalLM", _read_mamba, _write_mamba, _mamba_rules),
    "mamba2": Layout("Mamba2ForCausalLM", _read_mamba2, _write_mamba2, _mamba2_rules),
}
