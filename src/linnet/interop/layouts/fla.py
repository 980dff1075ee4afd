"""flash-linear-attention: GLA, RetNet, DeltaNet, Gated DeltaNet, KDA, HGRN-2, and each with some attention layers.

Its Mamba-2 is the layout of transformers, in :mod:`linnet.interop.layouts.mamba`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from linnet.models import DecoderConfig

from .base import (
    Fields,
    Layout,
    Rule,
    Shape,
    Tensors,
    attention,
    outer,
    read_common,
    renamed,
    swiglu,
    three_convs,
    value_dim,
    write_common,
)

__all__ = ["LAYOUTS"]

Options = Mapping[str, Any]


class _Mixer(NamedTuple):
    """One of their layers.

    Attributes:
        name: our mixer.
        read: their configuration to its options.
        write: its options to the fields of theirs; takes the width too.
        names: its tensors, as :func:`renamed` takes them; takes the options.
        streams: channels of the streams before the short convolutions; takes the options and the width.
        ratio: their default of ``hidden_ratio``.
    """

    name: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Options, int], dict[str, Any]]
    names: Callable[[Options], str]
    streams: Callable[[Options, int], tuple[int, ...]] = lambda options, width: ()
    ratio: int = 4


def _layout(architecture: str, mixer: _Mixer, **options: Any) -> Layout:
    def read(f: Fields) -> DecoderConfig:
        f.only(attnres_block_size=None, elementwise_affine=True)
        eps, width, count = f("norm_eps", 1e-6), f("hidden_size"), f("num_hidden_layers")
        wide = int(width * f("hidden_ratio", mixer.ratio) * 2 / 3)
        hidden = f.values.get("intermediate_size") or 256 * math.ceil(wide / 256)
        mixers = [{"name": mixer.name, "norm_eps": eps, **mixer.read(f)}] * count
        found = f.values.get("attn") or []
        for values in [found] if isinstance(found, Mapping) else found:
            for layer in values["layers"]:
                mixers[layer] = _read_attention(Fields(values), width)
        return read_common(f, mixers, norm_eps=eps, mlp_hidden=hidden)

    def write(shape: Shape) -> dict[str, Any]:
        own = shape.first(mixer.name)
        if not own:
            raise ValueError(f"mixers: expected {mixer.name} layers, found none")
        fields = write_common(shape) | {"hidden_act": "swish", "norm_eps": shape.config.norm_eps}
        del fields["rms_norm_eps"]
        full = [i for i, (name, _) in enumerate(shape.layers) if name == "attention"]
        if full:
            fields["attn"] = [{"layers": [i], **_write_attention(shape.options(i, "attention"))} for i in full]
        return fields | mixer.write(own, shape.config.d_model)

    def rules(shape: Shape) -> Iterator[Rule]:
        for rule in outer(shape):
            yield rule._replace(theirs=tuple(name.replace("embed_tokens", "embeddings") for name in rule.theirs))
        for i, (kind, found) in enumerate(shape.layers):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield from renamed(theirs, ours, "attn_norm.weight=mixer_norm.weight, mlp_norm.weight")
            yield from swiglu(f"{theirs}.mlp", f"{ours}.mlp")
            theirs, ours = f"{theirs}.attn", f"{ours}.mixer"
            if kind == "attention":
                yield from attention(theirs, ours, found)
                continue
            yield from renamed(theirs, ours, mixer.names(found))
            if found.get("conv_size"):
                yield from three_convs(theirs, ours, mixer.streams(found, shape.config.d_model))
        if mixer.name == "hgrn2":
            yield _lower_bounds(shape.config.num_layers, shape.config.d_model)

    return Layout(architecture, read, write, rules, **options)


def _read_attention(f: Fields, width: int) -> dict[str, Any]:
    options = {"name": "attention", "num_heads": f("num_heads"), "num_kv_heads": f("num_kv_heads", f("num_heads"))}
    if f.values.get("window_size") is not None:
        options["window"] = f("window_size")
    return options | {"qkv_bias": f("qkv_bias", False), "rope_base": f("rope_theta", 10000.0)}


def _write_attention(options: Options) -> dict[str, Any]:
    return {
        "num_heads": options["num_heads"],
        "num_kv_heads": options["num_kv_heads"],
        "qkv_bias": options["qkv_bias"],
        "window_size": options["window"],
        "rope_theta": options["rope_base"],
    }


def _conv_size(f: Fields, default: bool) -> int:
    return f("conv_size", 4) if f("use_short_conv", default) else 0


def _write_conv(options: Options) -> dict[str, Any]:
    size = options["conv_size"]
    return {"use_short_conv": True, "conv_size": size} if size else {"use_short_conv": False}


# GLA


def _read_gla(f: Fields) -> dict[str, Any]:
    f.only(use_output_gate=True, feature_map=None, clamp_min=None, fuse_norm=True)
    return {
        "num_heads": f("num_heads", 4),
        "num_kv_heads": f("num_kv_heads", f("num_heads", 4)),
        "expand_k": f("expand_k", 0.5),
        "expand_v": f("expand_v", 1.0),
        "conv_size": _conv_size(f, False),
    }


def _write_gla(options: Options, width: int) -> dict[str, Any]:
    same = ("num_heads", "num_kv_heads", "expand_k", "expand_v")
    return {name: options[name] for name in same} | _write_conv(options)


def _gla_names(options: Options) -> str:
    names = "q_proj.weight, k_proj.weight, v_proj.weight, g_proj.weight, o_proj.weight, gk_proj.0.weight=gate.0.weight"
    return names + ", gk_proj.1.weight=gate.1.weight, gk_proj.1.bias=gate.1.bias, g_norm_swish_gate.weight=norm.weight"


def _gla_streams(options: Options, width: int) -> tuple[int, ...]:
    shared = options["num_heads"] // options["num_kv_heads"]
    keys, values = (round(width * options[name]) for name in ("expand_k", "expand_v"))
    return keys, keys // shared, values // shared


# RetNet


def _read_retnet(f: Fields) -> dict[str, Any]:
    f.only(use_output_gate=True, feature_map=None, fuse_norm=True, num_kv_heads=f("num_heads", 8), use_short_conv=False)
    return {"num_heads": f("num_heads", 8), "expand_k": f("expand_k", 1.0), "expand_v": f("expand_v", 2.0)}


def _write_retnet(options: Options, width: int) -> dict[str, Any]:
    return {name: options[name] for name in ("num_heads", "expand_k", "expand_v")}


_RETNET = "q_proj.weight, k_proj.weight, v_proj.weight, g_proj.weight, o_proj.weight, g_norm_swish_gate.weight"

# The delta rules


def _read_deltanet(f: Fields) -> dict[str, Any]:
    f.only(use_beta=True, use_output_norm=True, qk_norm="l2", qk_activation="silu")
    heads, width = f("num_heads", 16), f("hidden_size")
    size = round(width * f("expand_k", 1.0)) // heads
    return {
        "num_heads": heads,
        "head_dim": size,
        "expand_v": round(width * f("expand_v", 1.0)) / heads / size,
        "neg_eigval": f("allow_neg_eigval", False),
        "output_gate": f("use_gate", False),
        "conv_size": _conv_size(f, True),
    }


def _write_deltanet(options: Options, width: int) -> dict[str, Any]:
    return _write_conv(options) | {
        "num_heads": options["num_heads"],
        "expand_k": options["num_heads"] * options["head_dim"] / width,
        "expand_v": options["num_heads"] * value_dim(options) / width,
        "allow_neg_eigval": options["neg_eigval"],
        "use_gate": options["output_gate"],
    }


def _deltanet_names(options: Options) -> str:
    letters = "qkvbgo" if options["output_gate"] else "qkvbo"
    return ", ".join(f"{name}_proj.weight" for name in letters) + ", o_norm.weight=norm.weight"


def _read_gated_deltanet(f: Fields) -> dict[str, Any]:
    if f("output_gate_activation", "swish") not in ("swish", "silu"):  # two names of one function
        f.only(output_gate_activation="swish")
    return {
        "num_heads": f("num_heads", 6),
        "num_v_heads": f("num_v_heads", f("num_heads", 6)),
        "head_dim": f("head_dim", 256),
        "expand_v": f("expand_v", 2.0),
        "neg_eigval": f("allow_neg_eigval", False),
        "output_gate": f("use_gate", True),
        "conv_size": _conv_size(f, True),
    }


def _write_gated_deltanet(options: Options, width: int) -> dict[str, Any]:
    return {name: options[name] for name in ("num_heads", "num_v_heads", "head_dim", "expand_v")} | {
        "allow_neg_eigval": options["neg_eigval"],
        "use_gate": options["output_gate"],
        **_write_conv(options),
    }


def _gated_deltanet_names(options: Options) -> str:
    return f"{_deltanet_names(options)}, a_proj.weight, A_log, dt_bias"


def _read_kda(f: Fields) -> dict[str, Any]:
    f.only(expand_v=1.0, num_v_heads=f("num_heads", 16))
    bound = f.values.get("lower_bound")
    return {
        "num_heads": f("num_heads", 16),
        "head_dim": f("head_dim", 128),
        "neg_eigval": f("allow_neg_eigval", False),
        "gate_bound": None if bound is None else -float(bound),
        "conv_size": _conv_size(f, True),
    }


def _write_kda(options: Options, width: int) -> dict[str, Any]:
    bound = options["gate_bound"]
    return _write_conv(options) | {
        "num_heads": options["num_heads"],
        "head_dim": options["head_dim"],
        "allow_neg_eigval": options["neg_eigval"],
        "safe_gate": bound is not None,
        "lower_bound": None if bound is None else -bound,
    }


def _kda_names(options: Options) -> str:
    names = ", ".join(f"{name}_proj.weight" for name in "qkvbo") + ", A_log, dt_bias, o_norm.weight=norm.weight"
    return names + ", f_proj.0.weight, f_proj.1.weight, g_proj.0.weight, g_proj.1.weight, g_proj.1.bias"


def _delta_streams(options: Options, width: int) -> tuple[int, ...]:
    keys = options["num_heads"] * options["head_dim"]
    return keys, keys, options.get("num_v_heads", options["num_heads"]) * value_dim({"expand_v": 1.0, **options})


# HGRN-2


def _read_hgrn2(f: Fields) -> dict[str, Any]:
    f.only(use_lower_bound=True, use_short_conv=False, attn=None)
    ratio = f.values.get("expand_ratio", 128)
    return {"head_dim": f("hidden_size") // f("num_heads") if ratio is None else ratio}


def _write_hgrn2(options: Options, width: int) -> dict[str, Any]:
    return {"expand_ratio": options["head_dim"], "num_heads": width // options["head_dim"]}


_HGRN2 = "q_proj.weight, f_proj.weight, i_proj.weight=v_proj.weight, g_norm.weight=norm.weight, o_proj.weight"


def _lower_bounds(count: int, width: int) -> Rule:
    """Their table ``[layers, width]``, of whose softmax over the layers the bound of layer l is the sum of the rows 1
    to l; ours are the logits of the bounds."""

    def read(x: Tensors) -> Tensors:
        log = F.log_softmax(x[0].double(), 0)
        below = log[1:].logcumsumexp(0)
        above = torch.cat([log[1:], log[:1]]).flip(0).logcumsumexp(0).flip(0)[1:]
        return list((below - above).to(x[0].dtype).reshape(count - 1, -1))

    def write(x: Tensors) -> Tensors:
        if not x:
            return [torch.zeros(1, width)]
        logits = torch.stack(list(x)).double()
        steps = torch.sigmoid(logits).diff(dim=0)
        if (steps <= 0).any():
            raise ValueError("mixer.lower_bound: expected bounds that rise from layer to layer, as those of hgrn2 do")
        rows = F.logsigmoid(-logits[-1:]), F.logsigmoid(logits[:1]), steps.log()
        return [torch.cat(rows).to(x[0].dtype)]

    return Rule(("model.lower_bounds",), tuple(f"layers.{i}.mixer.lower_bound" for i in range(1, count)), read, write)


LAYOUTS = {
    "gla": _layout("GLAForCausalLM", _Mixer("gla", _read_gla, _write_gla, _gla_names, _gla_streams)),
    "retnet": _layout(
        "RetNetForCausalLM",
        _Mixer("retnet", _read_retnet, _write_retnet, lambda options: f"{_RETNET}=norm.weight", ratio=2),
    ),
    "delta_net": _layout(
        "DeltaNetForCausalLM",
        _Mixer("deltanet", _read_deltanet, _write_deltanet, _deltanet_names, _delta_streams),
    ),
    "gated_deltanet": _layout(
        "GatedDeltaNetForCausalLM",
        _Mixer("gated_deltanet", _read_gated_deltanet, _write_gated_deltanet, _gated_deltanet_names, _delta_streams),
    ),
    "kda": _layout("KDAForCausalLM", _Mixer("kda", _read_kda, _write_kda, _kda_names, _delta_streams)),
    "hgrn2": _layout(
        "HGRN2ForCausalLM", _Mixer("hgrn2", _read_hgrn2, _write_hgrn2, lambda options: _HGRN2), widen=True
    ),
}
