"""A decoder whose layers are spread over processes: each has some heads of every mixer, some channels of every MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from linnet.mixers import Mixer
from linnet.models import Decoder, MixtureOfExperts

__all__ = ["tensor_parallel"]


class _Heads(NamedTuple):
    """How a mixer is split by heads. Rows of its parameters belong to heads in their order, columns of its output
    projection too; what this does not hold for is said here.

    Attributes:
        counts: its attributes that count heads or channels of all heads.
        whole: parameters that all heads share.
        streams: parameters whose rows are several streams of heads, with their sizes; takes the mixer.
    """

    counts: tuple[str, ...]
    whole: tuple[str, ...] = ()
    streams: Callable[[Any], dict[str, tuple[int, ...]]] = lambda mixer: {}


def _gla_streams(m: Any) -> dict[str, tuple[int, ...]]:
    return {"conv.weight": (m.num_heads * m.head_k, m.num_kv_heads * m.head_k, m.num_kv_heads * m.head_v)}


def _delta_streams(m: Any) -> dict[str, tuple[int, ...]]:
    keys, n = m.num_heads * m.head_k, m.substeps
    several = {"k_proj.weight": (keys,) * n, "v_proj.weight": (m.values,) * n, "b_proj.weight": (m.num_v_heads,) * n}
    return {"conv.weight": (keys,) * (1 + n) + (m.values,) * n, **(several if n > 1 else {})}


def _mamba2_streams(m: Any) -> dict[str, tuple[int, ...]]:
    conv = (m.inner, m.num_groups * m.state_dim, m.num_groups * m.state_dim)
    return {"in_proj.weight": (m.inner, *conv, m.num_heads), "conv.weight": conv, "conv.bias": conv}


_DELTA = _Heads(
    ("num_heads", "num_v_heads", "values"), ("norm.weight", "f_proj.0.weight", "g_proj.0.weight"), _delta_streams
)
_GLA = _Heads(("num_heads", "num_kv_heads"), ("gate.0.weight", "norm.weight"), _gla_streams)
_HEADS = {
    "attention": _Heads(("num_heads", "num_kv_heads"), ("q_norm.weight", "k_norm.weight")),
    "deltanet": _DELTA,
    "deltaproduct": _DELTA,
    "gated_deltanet": _DELTA,
    "gated_deltanet2": _DELTA,
    "gla": _GLA,
    "kda": _DELTA,
    "linear_attention": _Heads(("num_heads",), ("norm.weight",)),
    "mamba2": _Heads(("num_heads", "num_groups", "inner", "split"), (), _mamba2_streams),
    "mla": _Heads(("num_heads",), ("kv_down.weight", "kv_norm.weight", "q_proj.0.weight", "q_proj.1.weight")),
    "mlstm": _Heads(("num_heads",)),
    "rglru": _Heads(("num_heads", "width")),
    "simple_gla": _GLA,
}


def tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> Decoder:
    """Spread a decoder over the processes of a one-dimensional mesh, in place.

    Each process keeps and computes H / R of the heads of every mixer and the same share of every MLP's inner channels,
    of every expert too; a layer adds up twice in either direction. The embedding and the head are split by the
    vocabulary (not where they are tied). Everything else, the state of a head included, is as in one process: `loss`,
    decoding from states and packed segments are called the same way with the same arguments in every process.

    >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "tensor"))
    >>> tensor_parallel(decoder, mesh["tensor"])
    >>> for layer in decoder.layers:
    ...     fully_shard(layer, mesh=mesh["data"])

    Parameters become DTensors; ``torch.distributed.checkpoint.state_dict.get_model_state_dict`` gathers them. Short
    convolutions, and the input projection of ``mamba2``, hold several streams of heads in one tensor and stay whole in
    memory, as do a mixer's parameters that all heads share; every process computes with its own rows of them.

    Args:
        decoder: with the weights to start from (those of the first process count), not on the meta device.
        mesh: R processes.

    Returns:
        The decoder.

    Raises:
        ValueError: a mixer that cannot be split by heads, or numbers of heads or channels that R does not divide; names
            the layer and the mixer. The decoder is then unchanged.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}; pass one of them, as mesh['tensor']")
    if any(p.is_meta for p in decoder.parameters()):
        raise ValueError("decoder: expected initialised weights, got parameters on the meta device")
    plan: dict[str, ParallelStyle] = {}
    for i, layer in enumerate(decoder.layers):
        try:
            plan[f"layers.{i}.mixer"] = _split_mixer(layer.mixer, mesh.size())  # type: ignore[arg-type]
            if layer.mlp is not None:
                plan[f"layers.{i}.mlp"] = _split_mlp(layer.mlp, mesh.size())  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"decoder: layer {i}: {error}") from error
        plan |= {f"layers.{i}.{name}": _Whole() for name in ("mixer_norm", "mlp_norm") if getattr(layer, name)}
    plan["norm"] = _Whole()
    if decoder.lm_head is None:
        plan["embed_tokens"] = _Whole()
    else:
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(decoder, mesh, plan)
    return decoder


def _split_mixer(mixer: Mixer, size: int) -> _Region:
    heads = _HEADS.get(mixer.name)
    if heads is None:
        raise ValueError(f"the mixer {mixer.name} cannot be split by heads; those that can are {', '.join(_HEADS)}")
    if getattr(mixer, "q_norm", None) is not None and mixer.q_norm.size != mixer.head_dim:  # type: ignore[union-attr]
        raise ValueError(f"the mixer {mixer.name} cannot be split by heads: qk_norm='joint' is over all of them")
    for name in heads.counts:
        count = getattr(mixer, name)
        if isinstance(count, int) and count % size:
            raise ValueError(f"the mixer {mixer.name} has {name}={count}, expected a multiple of {size} processes")
    streams = heads.streams(mixer)
    parts = {name: _rows(sizes, size) for name, sizes in streams.items()}
    parts |= {name: _Part(Replicate(), _summed) for name in heads.whole}
    for name in ("o_proj", "out_proj"):
        parts |= {f"{name}.weight": _Part(Shard(1)), f"{name}.bias": _Part(Replicate(), _shared)}
    return _Region(parts, heads.counts)


def _split_mlp(mlp: nn.Module, size: int) -> _Region:
    down = {"down_proj.weight": _Part(Shard(1)), "down_proj.bias": _Part(Replicate(), _shared)}
    if not isinstance(mlp, MixtureOfExperts):
        hidden, parts = mlp.down_proj.weight.shape[1], down  # type: ignore[union-attr]
    else:
        hidden = mlp.down_proj.shape[1]
        parts = {f"shared.{name}": part for name, part in down.items()}
        parts |= {"gate_proj": _Part(Shard(2)), "up_proj": _Part(Shard(2)), "down_proj": _Part(Shard(1))}
        parts |= {name: _Part(Replicate(), _summed) for name in ("router.weight", "shared_gate.weight")}
    if hidden % size:
        raise ValueError(f"the MLP has {hidden} inner channels, expected a multiple of {size} processes")
    return _Region(parts)


# What a process computes with


class _Part(NamedTuple):
    """How a parameter is stored, and what of its local tensor the process uses (takes the tensor and the group)."""

    placement: Placement = Shard(0)
    use: Callable[[Tensor, Any], Tensor] = lambda x, group: x


def _summed(x: Tensor, group: Any) -> Tensor:
    """A parameter that all heads share: every process has a part of its gradient."""
    return _Copy.apply(x, group)  # type: ignore[return-value]


def _shared(x: Tensor, group: Any) -> Tensor:
    """A parameter that is added once, to a sum over the processes."""
    return _summed(x, group) / dist.get_world_size(group)


def _rows(sizes: Sequence[int], count: int) -> _Part:
    """The rows of this process in each of several streams."""
    if len(sizes) == 1:
        return _Part()

    def use(x: Tensor, group: Any) -> Tensor:
        rank = dist.get_rank(group)
        return torch.cat([stream.chunk(count)[rank] for stream in _summed(x, group).split(list(sizes))])

    return _Part(Replicate(), use)


class _Copy(torch.autograd.Function):
    """The same in every process; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is that of every term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Region(ParallelStyle):
    """A module whose processes each compute a term of the output, from parameters that are split as ``parts`` say (by
    rows where they say nothing) and attributes ``counts`` that are divided."""

    def __init__(self, parts: dict[str, _Part], counts: tuple[str, ...] = ()):
        super().__init__()
        self.parts, self.counts = parts, counts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group, size = device_mesh.get_group(), device_mesh.size()
        for name in self.counts:
            count = getattr(module, name)
            setattr(module, name, count // size if isinstance(count, int) else tuple(n // size for n in count))

        def run(forward: Callable[..., Any], x: Tensor, *rest: Any) -> tuple[Any, ...]:
            y, other = forward(_Copy.apply(x, group), *rest)
            if isinstance(other, Tensor):  # the loss of a router, the same in every process: each gives its share
                other = _Sum.apply(other / size, group)
            return _Sum.apply(y, group), other

        _localise(module, device_mesh, self.parts, _Part(), run)
        return module


class _Whole(ParallelStyle):
    """A module that every process computes alike."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _localise(module, device_mesh, {}, _Part(Replicate()), lambda forward, *args: forward(*args))
        return module


def _localise(
    root: nn.Module, mesh: DeviceMesh, parts: dict[str, _Part], default: _Part, run: Callable[..., Any]
) -> None:
    """Store the parameters of a module as DTensors, which read as what this process uses of them while the module runs
    (through ``run``), and as themselves to everyone else."""
    inside = [False]

    def enter(call: Callable[..., Any], *args: Any) -> Any:
        inside[0] = True
        try:
            return call(*args)
        finally:
            inside[0] = False

    methods: dict[nn.Module, dict[str, Any]] = {root: {}}
    for name, p in list(root.named_parameters()):
        path, _, leaf = name.rpartition(".")
        module, part = root.get_submodule(path), parts.get(name, default)
        stored = distribute_tensor(p.detach(), mesh, [part.placement])
        module.register_parameter(leaf, nn.Parameter(stored, requires_grad=p.requires_grad))
        read = partial(_read, leaf, part, mesh.get_group(), inside)
        methods.setdefault(module, {})[leaf] = property(read)
    kind = type(root)
    methods[root]["forward"] = lambda self, *args: enter(run, partial(kind.forward, self), *args)
    if isinstance(root, Mixer):
        methods[root]["init_state"] = lambda self, rows: enter(kind.init_state, self, rows)  # type: ignore[attr-defined]
    for module, own in methods.items():
        kind_ = type(module)
        module.__class__ = type(kind_.__name__, (kind_,), {"__module__": kind_.__module__, **own})


def _read(name: str, part: _Part, group: Any, inside: list[bool], module: nn.Module) -> Tensor:
    p = module._parameters[name]
    return part.use(p.to_local(), group) if inside[0] and isinstance(p, DTensor) else p  # type: ignore[return-value]
