"""Public checkpoint layouts: how their configurations and tensors map to those of a decoder, one table each.

A table is three functions: ``read`` (their ``config.json`` to a :class:`~linnet.DecoderConfig`), ``write`` (the way
back) and ``rules`` (which of their tensors are which of ours). Names are those of the files that were published; where
`transformers` writes another one, it follows after a bar: ``"mlp.up_proj.weight|block_sparse_moe.up_proj.weight"``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.mixers import get_mixer
from linnet.mixers.base import parse_spec
from linnet.models import Decoder, DecoderConfig, MixtureOfExperts, SwiGLU

__all__ = ["LAYOUTS", "Layout", "Rule", "Shape"]

Tensors = Sequence[Tensor]


class Rule(NamedTuple):
    """Some of their tensors and some of ours that hold the same numbers.

    Attributes:
        theirs, ours: names; of theirs, "a|b" is the first that there is, and is written as "a".
        read: from theirs to ours.
        write: the way back; a ValueError where theirs cannot hold what ours do.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[[Tensors], Tensors]
    write: Callable[[Tensors], Tensors]


def same(theirs: str, ours: str) -> Rule:
    """The same tensor."""
    return Rule((theirs,), (ours,), list, list)


def reshaped(theirs: str, ours: str, before: Sequence[int], after: Sequence[int]) -> Rule:
    """The same numbers in another shape."""
    return Rule((theirs,), (ours,), lambda x: [x[0].reshape(after)], lambda x: [x[0].reshape(before)])


def shifted(theirs: str, ours: str) -> Rule:
    """The weight of a norm, which they store as its difference from 1."""
    return Rule((theirs,), (ours,), lambda x: [1 + x[0]], lambda x: [x[0] - 1])


def absent(ours: str, shape: Sequence[int]) -> Rule:
    """A tensor of ours that they do not have: zeros."""

    def write(x: Tensors) -> Tensors:
        if x[0].count_nonzero():
            raise ValueError(f"{ours}: expected zeros, the target has no such tensor")
        return []

    return Rule((), (ours,), lambda _: [torch.zeros(tuple(shape))], write)


def split_heads(theirs: str, ours: Sequence[str], num_heads: int, sizes: Sequence[int]) -> Rule:
    """One matrix of theirs that holds, head by head, rows of several of ours (so many a head)."""

    def read(x: Tensors) -> Tensors:
        return [part.flatten(0, 1) for part in x[0].unflatten(0, (num_heads, -1)).split(list(sizes), 1)]

    def write(x: Tensors) -> Tensors:
        return [torch.cat([part.unflatten(0, (num_heads, -1)) for part in x], 1).flatten(0, 1)]

    return Rule((theirs,), tuple(ours), read, write)


def short_conv(theirs: Sequence[str], ours: str, sizes: Sequence[int]) -> Rule:
    """Depthwise kernels ``[C, 1, W]`` of several streams, in one of ours ``[sum C, W]``."""
    return Rule(
        tuple(theirs),
        (ours,),
        lambda x: [torch.cat(list(x)).squeeze(1)],
        lambda x: [part.unsqueeze(1) for part in x[0].split(list(sizes))],
    )


def experts(theirs: Callable[[int], str], ours: str, count: int) -> Rule:
    """The matrices ``[out, in]`` of all experts, in one of ours ``[E, in, out]``."""
    names = tuple(theirs(e) for e in range(count))
    return Rule(names, (ours,), lambda x: [torch.stack([w.T for w in x])], lambda x: [w.T for w in x[0]])


# Configurations


class Fields:
    """Their ``config.json``, with errors that name it."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __call__(self, name: str, default: Any = None) -> Any:
        """A field; without a default, its absence is an error."""
        value = self.values.get(name)
        if value is None and default is None:
            raise ValueError(f"config.json: the field {name!r} is missing")
        return default if value is None else value

    def only(self, **supported: Any) -> None:
        """Refuse fields that are there with another value than the supported one."""
        for name, value in supported.items():
            found = self.values.get(name)
            if found is not None and found != value:
                raise ValueError(f"config.json: {name} = {found!r} is not supported, only {value!r}")

    def rotation(self) -> tuple[float, float]:
        """Base of the rotary frequencies, and the share of channels that are rotated."""
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json: rotary positions of type {kind!r} are not supported, only 'default'")
        base = rope.get("rope_theta") or self("rope_theta", 10000.0)
        return float(base), float(rope.get("partial_rotary_factor") or self("partial_rotary_factor", 1.0))


@dataclass(frozen=True)
class Shape:
    """A decoder's configuration with every option of every layer's mixer written out.

    Attributes:
        config: the configuration.
        layers: name and options of the mixer of each layer, defaults included.
        mlps: kind of the MLP of each layer: "none", "swiglu" or "moe".
    """

    config: DecoderConfig
    layers: tuple[tuple[str, dict[str, Any]], ...]
    mlps: tuple[str, ...]

    @classmethod
    def of(cls, config: DecoderConfig) -> Shape:
        built = Decoder.meta(config).layers
        layers = []
        for i, layer in enumerate(built):
            name, options = parse_spec(config.mixer_spec(i))
            known = inspect.signature(get_mixer(name).__init__).parameters.values()
            full = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY} | options
            # What None stands for is an attribute of the mixer.
            full = {key: getattr(layer.mixer, key, None) if value is None else value for key, value in full.items()}
            layers.append((name, full))
        kinds = {type(None): "none", SwiGLU: "swiglu", MixtureOfExperts: "moe"}
        return cls(config, tuple(layers), tuple(kinds[type(layer.mlp)] for layer in built))

    def options(self, layer: int, expected: str) -> dict[str, Any]:
        """Options of a layer's mixer, which must be of the expected kind."""
        name, options = self.layers[layer]
        if name != expected:
            raise ValueError(f"layer {layer}: expected the mixer {expected}, got {name}")
        return options

    def first(self, name: str) -> dict[str, Any]:
        """Options of the first mixer of that name; empty when there is none."""
        return next((options for found, options in self.layers if found == name), {})

    def facts(self) -> dict[str, Any]:
        """All that decides what the model computes, to compare two."""
        c = self.config
        found: dict[str, Any] = {f"layer {i}, mixer": name for i, (name, _) in enumerate(self.layers)}
        for i, (_, options) in enumerate(self.layers):
            found |= {
                f"layer {i}, {key}": value for key, value in options.items() if key not in ("layer", "num_layers")
            }
            found |= {f"layer {i}, norm behind": c.norm_after(i), f"layer {i}, mlp": self.mlps[i]}
        names = ["vocab_size", "d_model", "num_layers", "norm_eps", "tie_embeddings", "logit_soft_cap"]
        if "moe" in self.mlps:
            names += ["num_experts", "experts_per_token", "shared_experts", "shared_gate", "router", "router_scale"]
            found |= {"expert_hidden": c.expert_hidden or c.hidden, "router bias": c.router_bias_rate > 0}
        if "swiglu" in self.mlps:
            found["mlp_hidden"] = c.hidden
        return found | {name: getattr(c, name) for name in names}

    def dense(self) -> int:
        """The number of first layers without experts; a ValueError where others follow among those with them."""
        count = next((i for i, kind in enumerate(self.mlps) if kind == "moe"), len(self.mlps))
        if set(self.mlps[count:]) - {"moe"}:
            raise ValueError("mlp: expected experts in all layers after the first ones that have none")
        return count


@dataclass(frozen=True)
class Layout:
    """One public layout.

    Attributes:
        architecture: class in transformers.
        read: their configuration to ours.
        write: ours to the fields of theirs that ours decides.
        rules: correspondence of the tensors.
        ignored: patterns of tensors that are not part of the language model.
        zero_centred: norm weights are stored as differences from 1, which need fp32 to be added to it.
    """

    architecture: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[Shape], dict[str, Any]]
    rules: Callable[[Shape], Iterator[Rule]]
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    zero_centred: bool = False


def _pattern(mixers: list[Any]) -> list[Any]:
    """The shortest pattern that repeats to ``mixers``."""
    count = len(mixers)
    return next(mixers[:n] for n in range(1, count + 1) if all(mixers[i] == mixers[i % n] for i in range(count)))


def _read_common(f: Fields, mixers: list[dict[str, Any]], **fields: Any) -> DecoderConfig:
    f.only(hidden_act="silu", attention_bias=False, mlp_bias=False)
    defaults = {"mlp_hidden": f.values.get("intermediate_size"), "norm_eps": f("rms_norm_eps", 1e-6)}
    return DecoderConfig(
        vocab_size=f("vocab_size"),
        d_model=f("hidden_size"),
        num_layers=len(mixers),
        mixers=_pattern(mixers),
        tie_embeddings=f("tie_word_embeddings", False),
        **{**defaults, **fields},
    )


def _write_common(shape: Shape) -> dict[str, Any]:
    c = shape.config
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "intermediate_size": c.hidden,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
    }


def _layer_types(f: Fields, default: Callable[[int], str]) -> list[str]:
    count = f("num_hidden_layers")
    types = f.values.get("layer_types") or [default(i) for i in range(count)]
    if len(types) != count:
        raise ValueError(f"config.json: layer_types: expected {count}, got {len(types)}")
    return types


def _written_types(shape: Shape, **names: str) -> list[str]:
    found = [names.get(name) for name, _ in shape.layers]
    if None in found:
        i = found.index(None)
        raise ValueError(f"layer {i}: expected a mixer among {', '.join(names)}, got {shape.layers[i][0]}")
    return [name for name in found if name is not None]


def _outer(shape: Shape, norm: Callable[[str, str], Rule] = same) -> Iterator[Rule]:
    yield same("model.embed_tokens.weight", "embed_tokens.weight")
    yield norm("model.norm.weight", "norm.weight")
    if not shape.config.tie_embeddings:
        yield same("lm_head.weight", "lm_head.weight")


def _swiglu(theirs: str, ours: str) -> Iterator[Rule]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield same("|".join(f"{their}.{name}.weight" for their in theirs.split("|")), f"{ours}.{name}.weight")


def _renamed(theirs: str, ours: str, names: str) -> Iterator[Rule]:
    """``"a=b, c"``: their ``a`` is our ``b``, ``c`` is the same."""
    for pair in names.split(", "):
        their, _, our = pair.partition("=")
        yield same("|".join(f"{theirs}.{name}" for name in their.split("|")), f"{ours}.{our or their}")


# Llama, Qwen2, Qwen3: softmax attention throughout


def _read_transformer(f: Fields, **options: Any) -> DecoderConfig:
    base, fraction = f.rotation()
    heads = f("num_attention_heads")
    windows = f("use_sliding_window", False)
    types = _layer_types(
        f, lambda i: "sliding_attention" if windows and i >= f("max_window_layers", 0) else "full_attention"
    )
    mixers = []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"config.json: layer_types: {kind!r} is not supported here")
        window = {"window": f("sliding_window")} if kind == "sliding_attention" else {}
        shared = {"num_heads": heads, "num_kv_heads": f("num_key_value_heads", heads), "rope_base": base}
        head = {"head_dim": f("head_dim", f("hidden_size") // heads), "rope_fraction": fraction}
        mixers.append({"name": "attention", **shared, **head, **window, **options})
    return _read_common(f, mixers)


def _write_rotation(options: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": options["rope_base"]}
    if options["rope_fraction"] != 1:
        rope["partial_rotary_factor"] = options["rope_fraction"]
    return {"rope_parameters": rope}


def _write_attention(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": options["num_heads"],
        "num_key_value_heads": options["num_kv_heads"],
        "head_dim": options["head_dim"],
        **(_write_rotation(options) if options["rope"] else {"rope_parameters": None}),
    }


def _write_transformer(shape: Shape) -> dict[str, Any]:
    options = [shape.options(i, "attention") for i in range(shape.config.num_layers)]
    kinds = ["full_attention" if o["window"] is None else "sliding_attention" for o in options]
    fields = _write_common(shape) | _write_attention(options[0])
    if "sliding_attention" in kinds:
        window = next(o["window"] for o in options if o["window"] is not None)
        fields |= {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
        fields["max_window_layers"] = kinds.index("sliding_attention")
    return fields


def _attention(
    theirs: str, ours: str, options: Mapping[str, Any], norm: Callable[[str, str], Rule] = same
) -> Iterator[Rule]:
    names = "k_proj.weight, v_proj.weight, o_proj.weight"
    if options["qkv_bias"]:
        names += ", q_proj.bias, k_proj.bias, v_proj.bias"
    yield from _renamed(theirs, ours, names)
    if options["output_gate"]:
        heads, size = options["num_heads"], options["head_dim"]
        both = f"{ours}.q_proj.weight", f"{ours}.g_proj.weight"
        yield split_heads(f"{theirs}.q_proj.weight", both, heads, (size, size))
    else:
        yield same(f"{theirs}.q_proj.weight", f"{ours}.q_proj.weight")
    if options["qk_norm"]:
        yield norm(f"{theirs}.q_norm.weight", f"{ours}.q_norm.weight")
        yield norm(f"{theirs}.k_norm.weight", f"{ours}.k_norm.weight")


def _transformer_rules(shape: Shape) -> Iterator[Rule]:
    yield from _outer(shape)
    for i in range(shape.config.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from _renamed(theirs, ours, _NORMS)
        yield from _attention(f"{theirs}.self_attn", f"{ours}.mixer", shape.options(i, "attention"))
        yield from _swiglu(f"{theirs}.mlp", f"{ours}.mlp")


_NORMS = "input_layernorm.weight=mixer_norm.weight, post_attention_layernorm.weight=mlp_norm.weight"


# Qwen3-Next: gated delta rule and gated attention, experts


def _read_qwen3_next(f: Fields) -> DecoderConfig:
    base, fraction = f.rotation()
    if f.values.get("rope_parameters") is None and f.values.get("partial_rotary_factor") is None:
        fraction = 0.25
    eps = f("rms_norm_eps", 1e-6)
    linear = _read_delta(f, eps)
    full = {
        "name": "attention",
        "num_heads": f("num_attention_heads"),
        "num_kv_heads": f("num_key_value_heads"),
        "head_dim": f("head_dim"),
        "rope_base": base,
        "rope_fraction": fraction,
        "qk_norm": True,
        "output_gate": True,
        "norm_eps": eps,
    }
    every = f("full_attention_interval", 4)
    types = _layer_types(f, lambda i: "linear_attention" if (i + 1) % every else "full_attention")
    mixers = [linear if kind == "linear_attention" else full for kind in types]
    if f("num_experts", 0) == 0:
        return _read_common(f, mixers)
    f.only(norm_topk_prob=True, decoder_sparse_step=1)
    dense = sorted(f("mlp_only_layers", []))
    if dense != list(range(len(dense))):
        raise ValueError(f"config.json: mlp_only_layers: only the first layers can be without experts, got {dense}")
    return _read_common(
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


def _read_delta(f: Fields, eps: float, **options: Any) -> dict[str, Any]:
    key, value = f("linear_key_head_dim"), f("linear_value_head_dim")
    return {
        "name": "gated_deltanet",
        "num_heads": f("linear_num_key_heads"),
        "num_v_heads": f("linear_num_value_heads"),
        "head_dim": key,
        "expand_v": value / key,
        "conv_size": f("linear_conv_kernel_dim", 4),
        "norm_eps": eps,
        **options,
    }


def _write_delta(options: Mapping[str, Any]) -> dict[str, Any]:
    if not options:
        return {}
    return {
        "linear_num_key_heads": options["num_heads"],
        "linear_num_value_heads": options["num_v_heads"],
        "linear_key_head_dim": options["head_dim"],
        "linear_value_head_dim": _value_dim(options),
        "linear_conv_kernel_dim": options["conv_size"],
    }


def _value_dim(options: Mapping[str, Any]) -> int:
    return round(options["head_dim"] * options["expand_v"])


def _write_qwen3_next(shape: Shape) -> dict[str, Any]:
    c = shape.config
    types = _written_types(shape, gated_deltanet="linear_attention", attention="full_attention")
    fields = _write_common(shape) | {"layer_types": types} | _write_delta(shape.first("gated_deltanet"))
    if shape.first("attention"):
        fields |= _write_attention(shape.first("attention"))
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
    yield from _outer(shape, shifted)
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield shifted(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
        yield shifted(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        if kind == "attention":
            yield from _attention(f"{theirs}.self_attn", f"{ours}.mixer", options, shifted)
        else:
            yield from _fused_delta(f"{theirs}.linear_attn", f"{ours}.mixer", options)
        if shape.mlps[i] != "moe":
            yield from _swiglu(f"{theirs}.mlp", f"{ours}.mlp")
            continue
        yield same(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.router.weight")
        yield same(f"{theirs}.mlp.shared_expert_gate.weight", f"{ours}.mlp.shared_gate.weight")
        yield from _swiglu(f"{theirs}.mlp.shared_expert", f"{ours}.mlp.shared")
        for name in ("gate_proj", "up_proj", "down_proj"):
            each = f"{theirs}.mlp.experts.{{}}.{name}.weight".format
            yield experts(each, f"{ours}.mlp.{name}", c.num_experts)


def _fused_delta(theirs: str, ours: str, options: Mapping[str, Any]) -> Iterator[Rule]:
    heads, key, value = options["num_heads"], options["head_dim"], _value_dim(options)
    group = options["num_v_heads"] // heads
    qkvz = [f"{ours}.{name}_proj.weight" for name in "qkvg"]
    yield split_heads(f"{theirs}.in_proj_qkvz.weight", qkvz, heads, (key, key, group * value, group * value))
    ba = [f"{ours}.{name}_proj.weight" for name in "ba"]
    yield split_heads(f"{theirs}.in_proj_ba.weight", ba, heads, (group, group))
    channels = 2 * heads * key + heads * group * value
    yield short_conv([f"{theirs}.conv1d.weight"], f"{ours}.conv.weight", [channels])
    yield from _renamed(theirs, ours, "A_log, dt_bias, norm.weight, out_proj.weight=o_proj.weight")


# Olmo Hybrid: gated delta rule in pre-norm layers, attention in post-norm layers


def _read_olmo_hybrid(f: Fields) -> DecoderConfig:
    heads, width = f("num_attention_heads"), f("hidden_size")
    values = dict(f.values)
    values.setdefault("linear_num_key_heads", heads)
    values.setdefault("linear_num_value_heads", heads)
    values.setdefault("linear_key_head_dim", int(0.75 * width / values["linear_num_key_heads"]))
    values.setdefault("linear_value_head_dim", 2 * values["linear_key_head_dim"])
    # The norm of the reading has an epsilon of its own, whatever the configuration says.
    linear = _read_delta(Fields(values), 1e-5, neg_eigval=f("linear_allow_neg_eigval", True))
    full: dict[str, Any] = {
        "name": "attention",
        "num_heads": heads,
        "num_kv_heads": f("num_key_value_heads", heads),
        "head_dim": f("head_dim", width // heads),
        "qk_norm": "joint",
        "norm_eps": f("rms_norm_eps", 1e-6),
    }
    rope = f.values.get("rope_parameters") or {}
    full |= {"rope_base": f.rotation()[0]} if rope.get("rope_theta") is not None else {"rope": False}
    count = f("num_hidden_layers")
    types = _layer_types(f, lambda i: "full_attention" if i % 4 == 3 or i + 1 == count < 4 else "linear_attention")
    mixers = [linear if kind == "linear_attention" else full for kind in types]
    places = ["pre" if kind == "linear_attention" else "post" for kind in types]
    return _read_common(f, mixers, norm_position=_pattern(places))


def _write_olmo_hybrid(shape: Shape) -> dict[str, Any]:
    types = _written_types(shape, gated_deltanet="linear_attention", attention="full_attention")
    linear, full = shape.first("gated_deltanet"), shape.first("attention")
    if not linear or not full:
        raise ValueError("mixers: expected both gated_deltanet and attention layers")
    fields = _write_common(shape) | _write_attention(full) | _write_delta(linear)
    if full["head_dim"] * full["num_heads"] == shape.config.d_model:
        del fields["head_dim"]
    return fields | {"layer_types": types, "linear_allow_neg_eigval": linear["neg_eigval"]}


def _olmo_hybrid_rules(shape: Shape) -> Iterator[Rule]:
    yield from _outer(shape)
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from _swiglu(f"{theirs}.mlp", f"{ours}.mlp")
        if kind == "attention":
            norm = "post_attention_layernorm.weight|feedforward_layer_norm.weight"
            yield from _renamed(
                theirs, ours, f"{norm}=mixer_norm.weight, post_feedforward_layernorm.weight=mlp_norm.weight"
            )
            yield from _attention(f"{theirs}.self_attn", f"{ours}.mixer", options)
            continue
        norms = "attention_layer_norm.weight=mixer_norm.weight, feedforward_layer_norm.weight=mlp_norm.weight"
        yield from _renamed(theirs, ours, norms)
        key, value = options["num_heads"] * options["head_dim"], options["num_v_heads"] * _value_dim(options)
        yield from _three_convs(f"{theirs}.linear_attn", f"{ours}.mixer", (key, key, value))
        names = ", ".join(f"{name}_proj.weight" for name in "qkvabgo")
        yield from _renamed(
            f"{theirs}.linear_attn", f"{ours}.mixer", f"{names}, A_log, dt_bias, o_norm.weight=norm.weight"
        )


def _three_convs(theirs: str, ours: str, sizes: Sequence[int]) -> Iterator[Rule]:
    yield short_conv([f"{theirs}.{name}_conv1d.weight" for name in "qkv"], f"{ours}.conv.weight", sizes)


# Kimi Linear: KDA and latent attention without positions, experts


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
    types = _layer_types(
        f, lambda i: "full_attention" if (i in full if listed else i and i % 4 == 0) else "linear_attention"
    )
    mixers = [kda if kind == "linear_attention" else mla for kind in types]
    kinds = f.values.get("mlp_layer_types")
    dense = f("first_k_dense_replace", 1) if kinds is None else kinds.count("dense")
    if kinds is not None and kinds != ["dense"] * dense + ["sparse"] * (count - dense):
        raise ValueError("config.json: mlp_layer_types: only the first layers can be without experts")
    return _read_common(
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
    return _write_common(shape) | {
        "layer_types": _written_types(shape, kda="linear_attention", mla="full_attention"),
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
    yield from _outer(shape)
    for i, (kind, options) in enumerate(shape.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from _renamed(theirs, ours, _NORMS)
        attn, mixer = f"{theirs}.self_attn", f"{ours}.mixer"
        if kind == "kda":
            heads, size = options["num_heads"], options["head_dim"]
            names = ", ".join(f"{name}_proj.weight" for name in "qkvbo") + ", dt_bias, o_norm.weight=norm.weight"
            for name in "fg":
                names += f", {name}_a_proj.weight={name}_proj.0.weight, {name}_b_proj.weight={name}_proj.1.weight"
            yield from _renamed(attn, mixer, names)
            yield from _three_convs(attn, mixer, (heads * size,) * 3)
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
            yield from _renamed(attn, mixer, names)
        moe = f"{theirs}.block_sparse_moe"
        if shape.mlps[i] != "moe":
            yield from _swiglu(f"{theirs}.mlp|{moe}", f"{ours}.mlp")
            continue
        yield same(f"{moe}.gate.weight", f"{ours}.mlp.router.weight")
        yield same(f"{moe}.gate.e_score_correction_bias", f"{ours}.mlp.router_bias")
        yield from _swiglu(f"{moe}.shared_experts", f"{ours}.mlp.shared")
        for their, our in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            yield experts(f"{moe}.experts.{{}}.{their}.weight".format, f"{ours}.mlp.{our}", c.num_experts)


# Mamba-2


def _read_mamba2(f: Fields) -> DecoderConfig:
    f.only(use_bias=False, use_conv_bias=True)
    low, high = f("time_step_limit", [0.0, float("inf")])
    high = float("inf") if isinstance(high, dict) else float(high)  # JSON has no infinity: {"__float__": "Infinity"}
    if (float(low), high) != (0.0, float("inf")):
        raise ValueError(f"config.json: time_step_limit = {[low, high]} is not supported, only no limit")
    eps = f("layer_norm_epsilon", 1e-5)
    mixer = {
        "name": "mamba2",
        "expand": f("expand", 2),
        "head_dim": f("head_dim", 64),
        "state_dim": f("state_size", 128),
        "num_groups": f("n_groups", 1),
        "conv_size": f("conv_kernel", 4),
        "norm_eps": eps,
    }
    return _read_common(f, [mixer] * f("num_hidden_layers"), mlp="none", norm_eps=eps)


def _write_mamba2(shape: Shape) -> dict[str, Any]:
    options = shape.options(0, "mamba2")
    fields = _write_common(shape)
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


def _backbone(shape: Shape, embedding: str, norm: str) -> Iterator[Rule]:
    """The outer tensors under other names."""
    names = {
        "model.embed_tokens.weight": f"backbone.{embedding}.weight",
        "model.norm.weight": f"backbone.{norm}.weight",
    }
    for rule in _outer(shape):
        yield rule._replace(theirs=tuple(names.get(name, name) for name in rule.theirs))


def _mamba2_rules(shape: Shape) -> Iterator[Rule]:
    yield from _backbone(shape, "embeddings", "norm_f")
    for i in range(shape.config.num_layers):
        options = shape.options(i, "mamba2")
        theirs, ours = f"backbone.layers.{i}", f"layers.{i}"
        yield same(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
        names = "A_log, D, dt_bias, conv1d.bias=conv.bias, in_proj.weight, norm.weight, out_proj.weight"
        yield from _renamed(f"{theirs}.mixer", f"{ours}.mixer", names)
        channels = options["expand"] * shape.config.d_model + 2 * options["num_groups"] * options["state_dim"]
        yield short_conv([f"{theirs}.mixer.conv1d.weight"], f"{ours}.mixer.conv.weight", [channels])


# Mamba


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
    return _read_common(f, [mixer] * f("num_hidden_layers"), mlp="none", norm_eps=eps)


def _write_mamba(shape: Shape) -> dict[str, Any]:
    options = shape.options(0, "mamba")
    fields = _write_common(shape)
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
    yield from _backbone(shape, "embeddings", "norm_f")
    for i in range(shape.config.num_layers):
        options = shape.options(i, "mamba")
        theirs, ours = f"backbone.layers.{i}", f"layers.{i}"
        yield same(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
        names = "A_log, D, conv1d.bias=conv.bias, in_proj.weight, x_proj.weight, dt_proj.weight, dt_proj.bias, "
        yield from _renamed(f"{theirs}.mixer", f"{ours}.mixer", names + "out_proj.weight")
        channels = options["expand"] * shape.config.d_model
        yield short_conv([f"{theirs}.mixer.conv1d.weight"], f"{ours}.mixer.conv.weight", [channels])


# xLSTM: mLSTM blocks


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
    return _read_common(
        Fields({**f.values, "hidden_size": width}),
        [mixer] * f("num_hidden_layers", f.values.get("num_blocks")),
        norm_eps=eps,
        mlp_hidden=int((width * f("ffn_proj_factor", 2.667) + multiple - 1) // multiple * multiple),
        logit_soft_cap=f("output_logit_soft_cap", 30.0),
    )


def _write_xlstm(shape: Shape) -> dict[str, Any]:
    c, options = shape.config, shape.options(0, "mlstm")
    fields = _write_common(shape)
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
    yield from _backbone(shape, "embeddings", "out_norm")
    for i in range(shape.config.num_layers):
        theirs, ours = f"backbone.blocks.{i}", f"layers.{i}"
        yield from _renamed(theirs, ours, "norm_mlstm.weight=mixer_norm.weight, norm_ffn.weight=mlp_norm.weight")
        names = ", ".join(f"{name}.weight={name}_proj.weight" for name in "qkv") + ", multihead_norm.weight=norm.weight"
        names += ", ogate_preact.weight=g_proj.weight, out_proj.weight=o_proj.weight"
        for name in "if":
            names += "".join(f", {name}gate_preact.{part}={name}_gate.{part}" for part in ("weight", "bias"))
        yield from _renamed(f"{theirs}.mlstm_layer", f"{ours}.mixer", names)
        names = "proj_up_gate.weight=gate_proj.weight, proj_up.weight=up_proj.weight, proj_down.weight=down_proj.weight"
        yield from _renamed(f"{theirs}.ffn", f"{ours}.mlp", names)


_TRANSFORMER = Layout("LlamaForCausalLM", _read_transformer, _write_transformer, _transformer_rules)

LAYOUTS: dict[str, Layout] = {
    "llama": _TRANSFORMER,
    "qwen2": replace(_TRANSFORMER, architecture="Qwen2ForCausalLM", read=lambda f: _read_transformer(f, qkv_bias=True)),
    "qwen3": replace(
        _TRANSFORMER,
        architecture="Qwen3ForCausalLM",
        read=lambda f: _read_transformer(f, qk_norm=True, norm_eps=f("rms_norm_eps", 1e-6)),
    ),
    "qwen3_next": Layout(
        "Qwen3NextForCausalLM",
        _read_qwen3_next,
        _write_qwen3_next,
        _qwen3_next_rules,
        ignored=(*_TRANSFORMER.ignored, r"^mtp\."),  # its second head, which predicts further tokens
        zero_centred=True,
    ),
    "olmo_hybrid": Layout("OlmoHybridForCausalLM", _read_olmo_hybrid, _write_olmo_hybrid, _olmo_hybrid_rules),
    "kimi_linear": Layout(
        "KimiLinearForCausalLM",
        _read_kimi_linear,
        _write_kimi_linear,
        _kimi_linear_rules,
    ),
    "mamba": Layout("MambaForCausalLM", _read_mamba, _write_mamba, _mamba_rules),
    "mamba2": Layout("Mamba2ForCausalLM", _read_mamba2, _write_mamba2, _mamba2_rules),
    "xlstm": Layout("xLSTMForCausalLM", _read_xlstm, _write_xlstm, _xlstm_rules),
}
