"""What is compared: one entry per op and mode, on inputs as layers produce them, over grids of shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from linnet.mixers import Mixer, build_mixer
from linnet.ops import backend as using
from linnet.ops import cell
from linnet.ops.core import Cost, Segments, check_choice, get_op

__all__ = ["GRIDS", "SUITES", "Shape", "Workload", "grid", "run_mixer", "suite", "weights_of"]

Inputs = dict[str, Tensor]
STATES = 16  # of a channel of the selective scan, Mamba's default


class Shape(NamedTuple):
    """``B`` sequences of ``T`` tokens, ``H`` heads of ``K`` key and ``V`` value channels; with ``lengths`` one packed
    row (``B`` = 1, ``T`` their sum)."""

    B: int
    T: int
    H: int
    K: int
    V: int
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, sizes: Sequence[Any]) -> Shape:
        """From a plain list, as JSON has it."""
        B, T, H, K, V, *rest = sizes
        return cls(B, T, H, K, V, tuple(rest[0]) if rest else ())

    @property
    def tokens(self) -> int:
        """All tokens of the call."""
        return self.B * self.T

    def segments(self, device: torch.device) -> Segments | None:
        """The packing, or None."""
        return Segments.from_lengths(self.lengths, device) if self.lengths else None


@dataclass(frozen=True)
class Workload:
    """One op in one mode.

    Attributes:
        name: the ``op`` of a row.
        engine: the registered op that runs it.
        make: ``make(draw, shape)`` -> arguments by name; ``draw(*shape)`` is standard normal in the dtype of the run.
        options: further arguments of linnet's op.
        cost: arguments of the op's cost function beside shape, itemsize and direction; a function is given the shape.
        constants: inputs that a layer does not train, which ask for no gradient.
        layer: for a whole layer around the op, ``layer(inputs, segments, backend)`` -> output ``[B, T, H V]``; its
            inputs are ``x`` of that shape and weights.
        fits: the shapes it is for.
    """

    name: str
    engine: str
    make: Callable[[Callable[..., Tensor], Shape], Inputs]
    options: dict[str, Any]
    cost: dict[str, Any]
    constants: tuple[str, ...] = ()
    layer: Callable[[Inputs, Segments | None, str], Tensor] | None = None
    fits: Callable[[Shape], bool] = lambda shape: True

    def inputs(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Random inputs, as leaves of the autograd graph."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

        with torch.no_grad():
            made = self.make(draw, shape)
        return self.leaves(made)

    def leaves(self, inputs: Inputs) -> Inputs:
        """The same inputs cut from the graph, all but the constants asking for gradients."""
        return {k: x.detach().contiguous().requires_grad_(k not in self.constants) for k, x in inputs.items()}

    def run(self, inputs: Inputs, segments: Segments | None, backend: str = "auto") -> Tensor:
        """linnet's output."""
        if self.layer is not None:
            return self.layer(inputs, segments, backend)
        return get_op(self.engine).function(**inputs, **self.options, segments=segments, backend=backend)[0]

    def floor(self, shape: Shape, itemsize: int, backward: bool) -> Cost:
        """Operations and bytes that the call needs at least, after the op's own account."""
        options = {name: x(shape) if callable(x) else x for name, x in self.cost.items()}
        cost = get_op(self.engine).cost(*self._sizes(shape), itemsize=itemsize, backward=backward, **options)
        if self.layer is not None:
            cost = self._floor_of_layer(cost, shape, itemsize, backward)
        if shape.lengths:  # that account counts one state a row; packing has one a sequence, read and written
            more = cost.state_bytes * (len(shape.lengths) - 1)
            cost = Cost(cost.flops, cost.bytes + 2 * more, cost.state_bytes + more)
        return cost

    def _floor_of_layer(self, op: Cost, shape: Shape, itemsize: int, backward: bool) -> Cost:
        """The op's operations and a product with every weight of a map; of memory only weights, input and output."""
        made = self.make(lambda *size: torch.empty(*size, device="meta"), shape)
        maps = sum(x.numel() for name, x in made.items() if name != "x" and x.dim() == 2)
        width = shape.H * shape.V
        moved = (3 * maps + 5 * width * shape.tokens) if backward else (maps + 2 * width * shape.tokens)
        return Cost(op.flops + 2 * maps * shape.tokens * (3 if backward else 1), itemsize * moved, op.state_bytes)

    def _sizes(self, shape: Shape) -> tuple[int, ...]:
        B, T, H, K, V, _ = shape
        if self.engine in ("scan", "paragru", "conv"):
            return B, T, H * V // (2 if self.cost.get("algebra") == "block" else 1)
        if self.engine == "selective_scan":
            return B, T, H * V, STATES
        return (B, T, H, V) if self.engine == "cell" else (B, T, H, K, V)


def _qkv(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    return {"q": draw(s.B, s.T, s.H, s.K), "k": draw(s.B, s.T, s.H, s.K), "v": draw(s.B, s.T, s.H, s.V)}


def _unit_keys(draw: Callable[..., Tensor], s: Shape, per_token: int = 1) -> Inputs:
    rows = s.T * per_token
    q, k = F.normalize(draw(s.B, s.T, s.H, s.K), dim=-1), F.normalize(draw(s.B, rows, s.H, s.K), dim=-1)
    return {"q": q, "k": k, "v": draw(s.B, rows, s.H, s.V), "beta": draw(s.B, rows, s.H).float().sigmoid()}


def _grouped(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    """The gated delta rule with two value heads to a key head."""
    values = {**_unit_keys(draw, s), "g": _scalar_decay(draw, s)}
    return values | {name: values[name][:, :, : s.H // 2] for name in ("q", "k")}


def _scalar_decay(draw: Callable[..., Tensor], s: Shape) -> Tensor:
    return F.logsigmoid(draw(s.B, s.T, s.H).float() + 3)


def _vector_decay(draw: Callable[..., Tensor], s: Shape) -> Tensor:
    """Of the activations' dtype and about -1/20 a token, as GLA's layer makes it."""
    return F.logsigmoid(draw(s.B, s.T, s.H, s.K)) / 16


def _bounded_decay(draw: Callable[..., Tensor], s: Shape) -> Tensor:
    """RWKV-7's: never below exp(-0.607) a token."""
    return -math.exp(-0.5) * draw(s.B, s.T, s.H, s.K).sigmoid()


def _retention(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    rates = torch.arange(s.H, dtype=torch.float32, device=draw(1).device)
    return {**_qkv(draw, s), "g": torch.log1p(-torch.exp2(-5 - rates))}


def _rwkv7(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    key = F.normalize(draw(s.B, s.T, s.H, s.K), dim=-1)
    rate = draw(s.B, s.T, s.H, s.K).sigmoid()
    return {**_qkv(draw, s), "a": -key, "b": key * rate, "g": _bounded_decay(draw, s)}


def _gates(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    return {"i": draw(s.B, s.T, s.H).float(), "f": draw(s.B, s.T, s.H).float() + 3}


def _sigmoid_gates(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    gates = _gates(draw, s)
    return {"g": F.logsigmoid(gates["f"]), "w": gates["i"].sigmoid()}


def _gdn2(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    inputs = _unit_keys(draw, s) | {"g": _vector_decay(draw, s)}
    return inputs | {"beta": draw(s.B, s.T, s.H, s.K).sigmoid(), "w": draw(s.B, s.T, s.H, s.V).sigmoid()}


def _elementwise(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    width = s.H * s.V
    return {"a": (draw(s.B, s.T, width) + 3).sigmoid(), "b": draw(s.B, s.T, width)}


def _blocks(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    width = s.H * s.V // 2
    return {"a": 0.6 * draw(s.B, s.T, width, 2, 2), "b": draw(s.B, s.T, width, 2)}


def _short(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    """A convolution of four taps, as layers put it in front of their gates."""
    width = s.H * s.V
    return {"x": draw(s.B, s.T, width), "weight": draw(width, 4) / 2}


def _selective(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    width = s.H * s.V
    rates = torch.arange(1, STATES + 1, dtype=torch.float32, device=draw(1).device)
    return {
        "x": draw(s.B, s.T, width),
        "delta": F.softplus(draw(s.B, s.T, width).float() - 4),
        "A": -rates.expand(width, STATES),
        "B": draw(s.B, s.T, STATES),
        "C": draw(s.B, s.T, STATES),
        "D": draw(width).float(),
    }


def _cell(gates: int) -> Callable[[Callable[..., Tensor], Shape], Inputs]:
    """Inputs of the gates and recurrent weights of a cell, heads of V units (K means nothing)."""

    def make(draw: Callable[..., Tensor], s: Shape) -> Inputs:
        return {"x": draw(s.B, s.T, s.H, gates * s.V), "R": draw(s.H, s.V, gates * s.V) * s.V**-0.5}

    return make


def _cell_layer(gates: int) -> Callable[[Callable[..., Tensor], Shape], Inputs]:
    """A cell with the map from its input to its gates, as `torch.nn.LSTM` has it."""

    def make(draw: Callable[..., Tensor], s: Shape) -> Inputs:
        width, size = s.H * s.V, s.H * gates * s.V
        weights = {"W": draw(width, size) * width**-0.5, "bias": draw(size), "R": _cell(gates)(draw, s)["R"]}
        return {"x": draw(s.B, s.T, width), **weights}

    return make


def _run_cell_layer(kind: str) -> Callable[[Inputs, Segments | None, str], Tensor]:
    def run(x: Inputs, segments: Segments | None, backend: str) -> Tensor:
        gates = (x["x"] @ x["W"] + x["bias"]).unflatten(-1, (x["R"].shape[0], -1))
        return cell(gates, x["R"], kind=kind, segments=segments, backend=backend)[0].flatten(2)

    return run


def _paragru(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    width = s.H * s.V
    return {"x": draw(s.B, s.T, 3, width), "A": (draw(3, width).float() / 5).clamp(-0.5, 0.5)}


def _m2rnn(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    q, k = draw(s.B, s.T, 1, s.K) * s.K**-0.5, draw(s.B, s.T, 1, s.K)
    W = torch.eye(s.V, dtype=q.dtype, device=q.device).repeat(s.H, 1, 1)
    return {"q": q, "k": k, "v": draw(s.B, s.T, s.H, s.V), "g": _scalar_decay(draw, s), "W": W}


def _on_meta(spec: str, width: int) -> Mixer:
    with torch.device("meta"):
        return build_mixer(spec, width)


def weights_of(spec: str, like: Tensor) -> Inputs:
    """Weights of a mixer as it starts, on the device and in the dtype of its input ``[B, T, width]``."""
    mixer = _on_meta(spec, like.shape[-1]) if like.is_meta else build_mixer(spec, like.shape[-1])
    return {name: p.detach().to(like.device, like.dtype) for name, p in mixer.named_parameters()}


def run_mixer(spec: str, x: Inputs, segments: Segments | None) -> Tensor:
    """A mixer's output from its input ``x["x"]`` and its weights, the rest of ``x``."""
    mixer, weights = _on_meta(spec, x["x"].shape[-1]), {name: w for name, w in x.items() if name != "x"}
    return functional_call(mixer, weights, (x["x"],), {"segments": segments})[0]


def _m2rnn_layer(draw: Callable[..., Tensor], s: Shape) -> Inputs:
    x = draw(s.B, s.T, s.H * s.V)
    return {"x": x, **weights_of(f"m2rnn(num_heads={s.H}, head_k={s.K}, head_v={s.V})", x)}


def _run_m2rnn_layer(x: Inputs, segments: Segments | None, backend: str) -> Tensor:
    H, V = x["D"].shape
    K = (x["in_proj.weight"].shape[0] - 2 * H * V - H) // 2
    with using(backend):
        return run_mixer(f"m2rnn(num_heads={H}, head_k={K}, head_v={V})", x, segments)


def _narrow(shape: Shape) -> bool:
    return shape.V <= 256


# Suites are lists of workloads; a workload's peers are in peers.py under its name.
SUITES: dict[str, tuple[Workload, ...]] = {
    "decay": (
        Workload("linear_attn", "decay", _qkv, {}, {"gate": "none"}),
        Workload("retention", "decay", _retention, {}, {"gate": "constant"}, ("g",)),
        Workload("simple_gla", "decay", lambda d, s: {**_qkv(d, s), "g": _scalar_decay(d, s)}, {}, {"gate": "scalar"}),
        Workload("gla", "decay", lambda d, s: {**_qkv(d, s), "g": _vector_decay(d, s)}, {}, {"gate": "vector"}),
        Workload(
            "rwkv6",
            "decay",
            lambda d, s: {**_qkv(d, s), "g": _vector_decay(d, s), "u": d(s.H, s.K)},
            {},
            {"gate": "vector"},
        ),
    ),
    "mlstm": (
        Workload("mlstm_exp", "mlstm", lambda d, s: {**_qkv(d, s), **_gates(d, s)}, {"eps": 1e-6}, {}),
        Workload("mlstm_sig", "decay", lambda d, s: {**_qkv(d, s), **_sigmoid_gates(d, s)}, {}, {"gate": "scalar"}),
    ),
    "delta": (
        Workload("delta_rule", "delta", _unit_keys, {}, {"gate": "none"}),
        Workload(
            "gated_delta_rule",
            "delta",
            lambda d, s: {**_unit_keys(d, s), "g": _scalar_decay(d, s)},
            {},
            {"gate": "scalar"},
        ),
        Workload(
            "gated_delta_rule_grouped",
            "delta",
            _grouped,
            {},
            {"gate": "scalar", "query_heads": lambda s: s.H // 2},
            fits=lambda s: s.H % 2 == 0,
        ),
        Workload("kda", "delta", lambda d, s: {**_unit_keys(d, s), "g": _vector_decay(d, s)}, {}, {"gate": "vector"}),
        Workload("gdn2", "delta", _gdn2, {}, {"gate": "vector", "channelwise": True}),
        Workload(
            "deltaproduct",
            "delta",
            lambda d, s: {**_unit_keys(d, s, 2), "g": _scalar_decay(d, s)},
            {"substeps": 2},
            {"gate": "scalar", "substeps": 2},
        ),
        Workload("rwkv7", "dplr", _rwkv7, {}, {}),
    ),
    "scan": (
        Workload("gated_scan", "scan", _elementwise, {}, {}),
        Workload("selective_scan", "selective_scan", _selective, {}, {}),
        Workload("block_scan", "scan", _blocks, {}, {"algebra": "block"}),
    ),
    "conv": (Workload("short_conv", "conv", _short, {"activation": "silu"}, {}),),
    "cell": (
        Workload("lstm", "cell", _cell(4), {"kind": "lstm"}, {"kind": "lstm"}),
        Workload("gru", "cell", _cell(3), {"kind": "gru"}, {"kind": "gru"}),
        Workload("slstm", "cell", _cell(4), {"kind": "slstm"}, {"kind": "slstm"}),
        *(
            Workload(f"{kind}_layer", "cell", _cell_layer(gates), {}, {"kind": kind}, layer=_run_cell_layer(kind))
            for kind, gates in (("lstm", 4), ("gru", 3))
        ),
        Workload("paragru", "paragru", _paragru, {}, {}),
        Workload("m2rnn", "m2rnn", _m2rnn, {"clip": 1.0}, {"query_heads": 1}, fits=_narrow),
        Workload("m2rnn_layer", "m2rnn", _m2rnn_layer, {}, {"query_heads": 1}, layer=_run_m2rnn_layer, fits=_narrow),
    ),
    "attention": (Workload("attention", "attention", _qkv, {}, {}),),
}

# Softmax attention and what is linear in the length, over the length.
_OVER_LENGTH = ("attention", "linear_attn", "simple_gla", "gla", "mlstm_exp", "gated_delta_rule", "kda")
SUITES["length"] = tuple(w for name in _OVER_LENGTH for s in tuple(SUITES.values()) for w in s if w.name == name)

_TOKENS = 32768
_USUAL = Shape(4, 8192, 16, 128, 128)


def _lengths(count: int, total: int, seed: int) -> tuple[int, ...]:
    """``count`` lengths of very different size that add up to ``total``; none is a round number."""
    draw = torch.Generator().manual_seed(seed)
    share = torch.randn(count, generator=draw).mul(1.2).exp()
    ends = (share.cumsum(0) / share.sum() * (total - count)).round().long() + torch.arange(1, count + 1)
    return tuple(torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long)).tolist())


def _packed(count: int, H: int, K: int, V: int, total: int = _TOKENS) -> Shape:
    return Shape(1, total, H, K, V, _lengths(count, total, count))


def _far(s: Shape) -> int:
    """In how many of length, heads and head sizes a shape differs from the usual one."""
    return (s.T != _USUAL.T) + (s.H != _USUAL.H) + ((s.K, s.V) != (_USUAL.K, _USUAL.V))


# Nearest first, so that a run cut short has covered most.
_WIDE = sorted(
    (
        Shape(_TOKENS // T, T, H, K, V)
        for K, V in ((128, 128), (64, 64), (128, 256), (256, 512))
        for H in (16, 4, 32, 8)
        for T in (8192, 32768, 2048, 1024)
    ),
    key=_far,
)

GRIDS: dict[str, tuple[Shape, ...]] = {
    "main": (
        _USUAL,
        Shape(16, 2048, 16, 128, 128),
        Shape(1, 32768, 16, 128, 128),
        Shape(4, 8192, 32, 64, 64),
        Shape(4, 8192, 4, 256, 512),
    ),
    "near": tuple(shape for shape in _WIDE if _far(shape) <= 1),
    "wide": tuple(_WIDE),
    "heads": (_USUAL, *(Shape(1, _TOKENS, H, 128, 128) for H in (16, 8, 4))),
    "sizes": tuple(Shape(4, 8192, 16, size, size) for size in (64, 96, 256)),
    "length": tuple(Shape(_TOKENS // T, T, 16, 128, 128) for T in (512, 1024, 2048, 4096, 8192, 16384, 32768)),
    "packed": (
        _packed(8, 16, 128, 128),
        _packed(64, 16, 128, 128),
        _packed(256, 16, 128, 128),
        _packed(64, 32, 64, 64),
        _packed(64, 4, 256, 512),
    ),
    "cell": (
        Shape(16, 1024, 12, 64, 64),
        Shape(16, 1024, 6, 128, 128),
        Shape(16, 1024, 1, 768, 768),
        Shape(8, 2048, 64, 64, 16),
    ),
    "tiny": (Shape(2, 128, 2, 16, 16), _packed(5, 2, 16, 16, 200)),
}


def suite(name: str) -> tuple[Workload, ...]:
    """The workloads of a suite; ValueError with the known names otherwise."""
    check_choice("suite", name, SUITES)
    return SUITES[name]


def grid(names: str) -> tuple[Shape, ...]:
    """The shapes of a grid, or of several with commas between their names, each once; ValueError with the known names
    otherwise."""
    for name in names.split(","):
        check_choice("grid", name, GRIDS)
    return tuple(dict.fromkeys(shape for name in names.split(",") for shape in GRIDS[name]))
