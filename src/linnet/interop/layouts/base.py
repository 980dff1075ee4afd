"""What the tables share: rules between tensors, readers of configurations, and parts that recur."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.mixers import get_mixer
from linnet.mixers.base import parse_spec
from linnet.models import Decoder, DecoderConfig, GeGLU, MixtureOfExperts, SwiGLU
from linnet.ops.attention.rotary import SCALING

__all__ = [
    "NORMS",
    "Fields",
    "Layout",
    "Rule",
    "Shape",
    "absent",
    "attention",
    "backbone",
    "experts",
    "layer_types",
    "outer",
    "pattern",
    "read_common",
    "read_delta",
    "renamed",
    "reshaped",
    "same",
    "shifted",
    "short_conv",
    "split_heads",
    "swiglu",
    "three_convs",
    "value_dim",
    "write_attention",
    "write_common",
    "write_delta",
    "write_rotation",
    "written_types",
]

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

    def rotation(self, fraction: float = 1.0) -> dict[str, Any]:
        """Rotary positions as options of ``attention``; ``fraction`` is their default share of rotated channels."""
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(
                f"config.json: rotary positions of type {kind!r} are not supported, only 'default' and 'llama3'"
            )
        options: dict[str, Any] = {
            "rope_base": float(rope.get("rope_theta") or self("rope_theta", 10000.0)),
            "rope_fraction": float(rope.get("partial_rotary_factor") or self("partial_rotary_factor", fraction)),
        }
        if kind == "llama3":
            given = {SCALING[-1]: self.values.get("max_position_embeddings"), **rope}
            options["rope_scaling"] = {name: Fields(given)(name) for name in SCALING}
        return options


@dataclass(frozen=True)
class Shape:
    """A decoder's configuration with every option of every layer's mixer written out.

    Attributes:
        config: the configuration.
        layers: name and options of the mixer of each layer, defaults included.
        mlps: kind of the MLP of each layer: "none", "swiglu", "geglu" or "moe".
    """

    config: DecoderConfig
    layers: tuple[tuple[str, dict[str, Any]], ...]
    mlps: tuple[str, ...]

    @classmethod
    def of(cls, config: DecoderConfig) -> Shape:
        """The shape of a configuration, read off the decoder that it makes (on the meta device)."""
        built = Decoder.meta(config).layers
        layers = []
        for i, layer in enumerate(built):
            name, options = parse_spec(config.mixer_spec(i))
            known = inspect.signature(get_mixer(name).__init__).parameters.values()
            full = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY} | options
            # What None stands for is an attribute of the mixer.
            full = {key: getattr(layer.mixer, key, None) if value is None else value for key, value in full.items()}
            layers.append((name, full))
        kinds = {type(None): "none", SwiGLU: "swiglu", GeGLU: "geglu", MixtureOfExperts: "moe"}
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
            found |= {f"layer {i}, norm_position": c.norm_place(i), f"layer {i}, mlp": self.mlps[i]}
        names = ["vocab_size", "d_model", "num_layers", "norm_eps", "tie_embeddings", "embed_scale"]
        names += ["logit_soft_cap"]
        if "moe" in self.mlps:
            names += ["num_experts", "experts_per_token", "shared_experts", "shared_gate", "router", "router_scale"]
            found |= {"expert_hidden": c.expert_hidden or c.hidden, "router bias": c.router_bias_rate > 0}
        if {"swiglu", "geglu"} & {*self.mlps}:
            found |= {"mlp_hidden": c.hidden, "mlp_bias": c.mlp_bias}
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
        widen: some tensors are computed, not copied (norm weights stored as differences from 1), which needs fp32.
    """

    architecture: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[Shape], dict[str, Any]]
    rules: Callable[[Shape], Iterator[Rule]]
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    widen: bool = False


def pattern(mixers: list[Any]) -> list[Any]:
    """The shortest pattern that repeats to ``mixers``."""
    count = len(mixers)
    return next(mixers[:n] for n in range(1, count + 1) if all(mixers[i] == mixers[i % n] for i in range(count)))


def read_common(f: Fields, mixers: list[dict[str, Any]], **fields: Any) -> DecoderConfig:
    """A decoder of these mixers, one a layer, with what most configurations say in the same words; ``fields`` win."""
    f.only(attention_bias=False, mlp_bias=False)
    if f("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        f.only(hidden_act="silu")
    defaults = {
        "mlp_hidden": f.values.get("intermediate_size"),
        "norm_eps": f("rms_norm_eps", 1e-6),
        "tie_embeddings": f("tie_word_embeddings", False),
    }
    return DecoderConfig(
        vocab_size=f("vocab_size"),
        d_model=f("hidden_size"),
        num_layers=len(mixers),
        mixers=pattern(mixers),
        **{**defaults, **fields},
    )


def write_common(shape: Shape) -> dict[str, Any]:
    """The same on the way back."""
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


def layer_types(f: Fields, default: Callable[[int], str]) -> list[str]:
    """The kind of every layer, of which a layout may have a default by its number."""
    count = f("num_hidden_layers")
    types = f.values.get("layer_types") or [default(i) for i in range(count)]
    if len(types) != count:
        raise ValueError(f"config.json: layer_types: expected {count}, got {len(types)}")
    return types


def written_types(shape: Shape, **names: str) -> list[str]:
    """Kinds of the layers by the names of their mixers."""
    found = [names.get(name) for name, _ in shape.layers]
    if None in found:
        i = found.index(None)
        raise ValueError(f"layer {i}: expected a mixer among {', '.join(names)}, got {shape.layers[i][0]}")
    return [name for name in found if name is not None]


def outer(shape: Shape, norm: Callable[[str, str], Rule] = same) -> Iterator[Rule]:
    """Embedding, last norm and head."""
    yield same("model.embed_tokens.weight", "embed_tokens.weight")
    yield norm("model.norm.weight", "norm.weight")
    if not shape.config.tie_embeddings:
        yield same("lm_head.weight", "lm_head.weight")


def swiglu(theirs: str, ours: str) -> Iterator[Rule]:
    """The three matrices of an MLP, under the first of several names (``"a|b"``) that there is."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield same("|".join(f"{their}.{name}.weight" for their in theirs.split("|")), f"{ours}.{name}.weight")


def renamed(theirs: str, ours: str, names: str) -> Iterator[Rule]:
    """``"a=b, c"``: their ``a`` is our ``b``, ``c`` is the same."""
    for pair in names.split(", "):
        their, _, our = pair.partition("=")
        yield same("|".join(f"{theirs}.{name}" for name in their.split("|")), f"{ours}.{our or their}")


NORMS = "input_layernorm.weight=mixer_norm.weight, post_attention_layernorm.weight=mlp_norm.weight"


def write_rotation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions, from options of ``attention``."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": options["rope_base"]}
    if options["rope_scaling"] is not None:
        rope |= {"rope_type": "llama3", **options["rope_scaling"]}
    if options["rope_fraction"] != 1:
        rope["partial_rotary_factor"] = options["rope_fraction"]
    return {"rope_parameters": rope}


def write_attention(options: Mapping[str, Any]) -> dict[str, Any]:
    """What an ``attention`` mixer is, in their words."""
    return {
        "num_attention_heads": options["num_heads"],
        "num_key_value_heads": options["num_kv_heads"],
        "head_dim": options["head_dim"],
        **(
            write_rotation(options)
            if options["rope"]
            else {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
        ),
    }


def attention(
    theirs: str, ours: str, options: Mapping[str, Any], norm: Callable[[str, str], Rule] = same
) -> Iterator[Rule]:
    """The projections of an ``attention`` mixer; an output gate is the second half of each head's query rows."""
    names = "k_proj.weight, v_proj.weight, o_proj.weight"
    if options["qkv_bias"]:
        names += ", q_proj.bias, k_proj.bias, v_proj.bias"
    if options["o_bias"]:
        names += ", o_proj.bias"
    yield from renamed(theirs, ours, names)
    if options["output_gate"]:
        heads, size = options["num_heads"], options["head_dim"]
        both = f"{ours}.q_proj.weight", f"{ours}.g_proj.weight"
        yield split_heads(f"{theirs}.q_proj.weight", both, heads, (size, size))
    else:
        yield same(f"{theirs}.q_proj.weight", f"{ours}.q_proj.weight")
    if options["qk_norm"]:
        yield norm(f"{theirs}.q_norm.weight", f"{ours}.q_norm.weight")
        yield norm(f"{theirs}.k_norm.weight", f"{ours}.k_norm.weight")


def read_delta(f: Fields, eps: float, **options: Any) -> dict[str, Any]:
    """A ``gated_deltanet`` from the fields they have for it."""
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


def write_delta(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields from its options."""
    if not options:
        return {}
    return {
        "linear_num_key_heads": options["num_heads"],
        "linear_num_value_heads": options["num_v_heads"],
        "linear_key_head_dim": options["head_dim"],
        "linear_value_head_dim": value_dim(options),
        "linear_conv_kernel_dim": options["conv_size"],
    }


def value_dim(options: Mapping[str, Any]) -> int:
    """Channels of a value head of ``gated_deltanet``."""
    return round(options["head_dim"] * options["expand_v"])


def three_convs(theirs: str, ours: str, sizes: Sequence[int]) -> Iterator[Rule]:
    """Short convolutions of queries, keys and values, which ours has in one."""
    yield short_conv([f"{theirs}.{name}_conv1d.weight" for name in "qkv"], f"{ours}.conv.weight", sizes)


def backbone(shape: Shape, embedding: str, norm: str) -> Iterator[Rule]:
    """The outer tensors under other names."""
    names = {
        "model.embed_tokens.weight": f"backbone.{embedding}.weight",
        "model.norm.weight": f"backbone.{norm}.weight",
    }
    for rule in outer(shape):
        yield rule._replace(theirs=tuple(names.get(name, name) for name in rule.theirs))
