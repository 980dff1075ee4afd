"""What published mixers have in common around the engine call: gates in fp32, norms, short convolutions, checks.

Gates decide what a state keeps over thousands of tokens, so they never see half precision: :class:`GateLinear` runs its
matmul in the compute dtype and adds the bias in fp32, and every gate is computed and passed on as fp32 from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, DecayState, DeltaState, ScanState, Segments, conv, gated_norm
from linnet.ops.core import check_choice, check_segments
from linnet.ops.norm.chunked import normalised, rms_norm

__all__ = [
    "DecayConvState",
    "DeltaConvState",
    "GateLinear",
    "Norm",
    "ScanConvState",
    "ShortConv",
    "assign",
    "bounded_decay",
    "check_choice",
    "check_conv_size",
    "check_count",
    "check_depth",
    "check_divisor",
    "check_input",
    "check_positive",
    "count_positions",
    "decay_state",
    "delta_state",
    "fp32",
    "head_size",
    "heads",
    "low_rank",
    "matrix",
    "projections",
    "reset_softplus_decay",
    "rms_norm",
    "scan_state",
    "soft_cap",
    "softplus_decay",
    "state_dtype",
    "token_shift",
    "unpack",
]

S = TypeVar("S")


class DecayConvState(NamedTuple):
    """State of a mixer with one decay memory and a short convolution in front (None without one)."""

    decay: DecayState
    conv: ConvState | None = None


class DeltaConvState(NamedTuple):
    """State of a mixer with one delta memory and a short convolution in front (None without one)."""

    delta: DeltaState
    conv: ConvState | None = None


class ScanConvState(NamedTuple):
    """State of a mixer with one scanned memory and a short convolution in front (None without one)."""

    scan: ScanState
    conv: ConvState | None = None


# Dtypes and shapes


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and gates next to ``x``: fp32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fp32(x: Tensor) -> Tensor:
    """``x`` in fp32; float64 stays float64."""
    return x.to(state_dtype(x))


def heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, T, H * D] -> [B, T, H, D]``."""
    return x.unflatten(-1, (num_heads, -1))


def delta_state(like: Tensor, rows: int, num_heads: int, K: int, V: int) -> DeltaState:
    """The zero state of the delta engine, on the device of the parameter ``like``."""
    return DeltaState(torch.zeros(rows, num_heads, K, V, dtype=state_dtype(like), device=like.device))


def decay_state(like: Tensor, rows: int, num_heads: int, K: int, V: int, normalize: bool = False) -> DecayState:
    """The zero state of the decay engine, on the device of the parameter ``like``."""
    new = {"dtype": state_dtype(like), "device": like.device}
    z = torch.zeros(rows, num_heads, K, **new) if normalize else None
    return DecayState(torch.zeros(rows, num_heads, K, V, **new), z)


def scan_state(like: Tensor, rows: int, *tail: int) -> ScanState:
    """The zero state of the scan engine, on the device of the parameter ``like``."""
    return ScanState(torch.zeros(rows, *tail, dtype=state_dtype(like), device=like.device))


# Checks of options and inputs


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def head_size(name: str, d_model: int, factor: float, num_heads: int) -> int:
    """Channels of a head when ``factor * d_model`` (``name`` is that option) is split over ``num_heads``."""
    total = factor * d_model
    if not _whole(num_heads) or total < 1 or total % num_heads:
        raise ValueError(
            f"num_heads, {name}: expected {name} * d_model to be a multiple of num_heads,"
            f" got {factor} * {d_model} and num_heads={num_heads}"
        )
    return int(total) // num_heads


def check_divisor(name: str, value: int, total: int, of: str) -> int:
    """``total // value``; ValueError when option ``name`` does not divide it."""
    if not _whole(value) or total % value:
        raise ValueError(f"{name}: expected a divisor of {of} = {total}, got {value}")
    return total // value


def check_count(**options: int) -> None:
    """Every option must be a whole number above zero."""
    for name, value in options.items():
        if not _whole(value):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_positive(**options: float) -> None:
    """Every option must be a number above zero."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")


def check_conv_size(conv_size: int) -> None:
    """The width of a short convolution, 0 for none."""
    if conv_size != 0 and not (_whole(conv_size) and conv_size > 1):
        raise ValueError(f"conv_size: expected 0 (no convolution) or at least 2 taps, got {conv_size}")


def check_depth(layer: int, num_layers: int) -> None:
    """``layer`` must be a position in a stack of ``num_layers``."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: expected 0 <= layer < num_layers = {num_layers}, got {layer}")


def check_input(x: Tensor, d_model: int, segments: Segments | None) -> int:
    """Refuse an empty ``x``, one not ``[B, T, d_model]`` or not floating, packed as ``segments`` say; the number of
    state rows."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != d_model or 0 in x.shape[:2]:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected shape [B >= 1, T >= 1, d_model={d_model}], got {got}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    return check_segments(segments, x)


def unpack(state: Any, kind: type[S]) -> S:
    """A mixer's state, every part None before the first token."""
    if state is None:
        return kind(*[None] * len(kind._fields))  # type: ignore[attr-defined]
    if not isinstance(state, kind):
        raise ValueError(f"state: expected a {kind.__name__} (what forward returned), got {type(state).__name__}")
    return state


# Parameters


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Write ``value`` into a parameter, sharded (DTensor) or not."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


def projections(d_model: int, *sizes: int) -> list[nn.Linear]:
    """Linear maps without bias from the width to each of ``sizes``."""
    return [nn.Linear(d_model, size, bias=False) for size in sizes]


class GateLinear(nn.Linear):
    """A linear map to gate pre-activations: matmul in the compute dtype, bias added in fp32, fp32 out.

    A forget-gate bias of 6 rounds by up to 0.016 in bf16, which moves a time constant of 400 tokens by six.
    """

    def forward(self, input: Tensor) -> Tensor:
        y = fp32(F.linear(input, self.weight))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def matrix(projection: nn.Module, x: Tensor) -> Tensor:
    """The matrix ``[out, in]`` of a projection of ``x`` without bias, for what multiplies it in another order than its
    forward. Read off the forward where that is not a plain linear map's: an adapter in its place, quantised weights."""
    if type(projection).forward is nn.Linear.forward and type(projection.weight) in (Tensor, nn.Parameter):
        return projection.weight  # type: ignore[return-value]
    like = next((p for p in projection.parameters() if p.is_floating_point()), x)
    return projection(torch.eye(projection.in_features, dtype=like.dtype, device=like.device)).T  # type: ignore[arg-type]


def low_rank(d_model: int, rank: int, size: int, *, bias: bool = False, gate: bool = False) -> nn.Sequential:
    """A linear map through ``rank`` channels; the bias is on the second factor. With ``gate`` that one is a
    :class:`GateLinear`."""
    up = GateLinear if gate else nn.Linear
    return nn.Sequential(nn.Linear(d_model, rank, bias=False), up(rank, size, bias=bias))


def softplus_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The log-decay ``-exp(A_log) softplus(x + dt_bias)`` of pre-activations ``[B, T, H]`` or ``[B, T, H, K]`` in fp32,
    with ``A_log`` ``[H]`` and ``dt_bias`` ``[H]`` or ``[H * K]``."""
    rate, bias = fp32(A_log).exp(), fp32(dt_bias)
    if x.dim() == 4:
        rate, bias = rate[:, None], bias.view(x.shape[2:])
    return -rate * F.softplus(fp32(x) + bias)


def bounded_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor, bound: float) -> Tensor:
    """The log-decay ``-bound sigmoid(exp(A_log) (x + dt_bias))``, never below ``-bound``; arguments as in
    :func:`softplus_decay`, ``x`` with a key channel axis."""
    slope, bias = fp32(A_log).exp()[:, None], fp32(dt_bias).view(x.shape[2:])
    return -bound * torch.sigmoid(slope * (fp32(x) + bias))


@torch.no_grad()
def reset_softplus_decay(A_log: Tensor, dt_bias: Tensor, *, lowest: float = 1.0) -> None:
    """exp(A_log) uniform in [lowest, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1], as Mamba-2 starts."""
    A_log.uniform_(lowest, 16).clamp_(min=1e-6).log_()
    dt = dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
    dt.add_(torch.log(-torch.expm1(-dt)))


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``, the identity when ``cap`` is None."""
    return x if cap is None else cap * torch.tanh(x / cap)


class Norm(nn.Module):
    """RMSNorm, or with ``center`` LayerNorm, over the last axis of ``[..., H, D]``, computed in fp32.

    With a gate, :func:`linnet.ops.gated_norm` of ``[B, T, H, D]`` or ``[B, T, H * D]`` and the gate's pre-activations
    ``[B, T, H * D]``, which gives ``[B, T, H * D]``; ``options`` are its norm_first, activation, v and skip.

    Args:
        size: D.
        eps: added to the mean square.
        num_heads: give every head a weight of its own (a grouped norm); 1 shares one weight among them.
        center: subtract the mean first.
        bias: learn an offset.
    """

    def __init__(self, size: int, eps: float, *, num_heads: int = 1, center: bool = False, bias: bool = False):
        super().__init__()
        check_positive(norm_eps=eps)
        self.size, self.eps, self.center = size, eps, center
        self.weight = nn.Parameter(torch.empty(num_heads * size))
        self.bias = nn.Parameter(torch.empty(num_heads * size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, gate: Tensor | None = None, **options: Any) -> Tensor:
        if gate is None:
            return normalised(x, self.weight, self.bias, self.center, self.eps).to(x.dtype)
        x = x.flatten(2)
        options |= {"groups": x.shape[2] // self.size, "center": self.center, "eps": self.eps}
        return gated_norm(x, gate, self.weight, bias=self.bias, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, center={self.center}, bias={self.bias is not None}"


class ShortConv(nn.Module):
    """Causal depthwise convolution in front of an engine, over several streams with one state.

    ``(a, b, ...), state = conv(a, b, ..., state=None, segments=None)`` with streams ``[B, T, D_i]``, or one stream that
    is to come out in parts of widths ``split``.
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False, activation: str | None = "silu"):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5  # what nn.Conv1d does for a depthwise kernel
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def forward(
        self,
        *streams: Tensor,
        split: Sequence[int] | None = None,
        state: ConvState | None = None,
        segments: Segments | None = None,
    ) -> tuple[tuple[Tensor, ...], ConvState]:
        x = streams[0]
        sizes = [s.shape[-1] for s in streams] if split is None else list(split)
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        options: dict[str, Any] = {"activation": self.activation, "segments": segments}
        if len(sizes) == 1 or (x.shape[1] if segments is None else segments.max_len) == 1:  # a step: as few launches
            x = x if len(streams) == 1 else torch.cat(streams, -1)
            y, state = conv(x, weight, bias, state=state, **options)
            return y.split(sizes, -1), state
        # One by one: nothing is copied to join them, and each comes out whole, as what reads it next wants it.
        xs = streams if split is None else x.split(sizes, -1)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        tails = [None] * len(sizes) if state is None else [ConvState(tail) for tail in state.tail.split(sizes, -1)]
        each = zip(xs, weight.split(sizes), biases, tails, strict=True)
        done = [conv(x, w, b, state=tail, **options) for x, w, b, tail in each]
        return tuple(y for y, _ in done), ConvState(torch.cat([after.tail for _, after in done], -1))

    def init_state(self, rows: int) -> ConvState:
        channels, size = self.weight.shape
        return ConvState(self.weight.new_zeros(rows, size - 1, channels, dtype=state_dtype(self.weight)))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.weight.shape[1]}, bias={self.bias is not None}"


def count_positions(x: Tensor, seen: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Positions ``[B, T]`` of the tokens of ``x`` in their sequences, and the number of tokens seen afterwards.

    ``seen`` is int64 ``[N]``, tokens before ``x`` (None: none), one row a sequence or a segment.
    """
    rows = x.shape[0] if segments is None else len(segments)
    start = torch.zeros(rows, dtype=torch.int64, device=x.device) if seen is None else seen
    if start.shape != (rows,):
        raise ValueError(f"state.position: expected shape [{rows}], one a sequence, got {list(start.shape)}")
    if start.device != x.device:
        raise ValueError(f"state.position: expected device {x.device} like x, got {start.device}")
    if segments is None:
        return start[:, None] + torch.arange(x.shape[1], device=x.device), start + x.shape[1]
    return (segments.positions + start[segments.ids.long()])[None], start + segments.cu_seqlens.diff()


def token_shift(x: Tensor, state: ConvState | None, segments: Segments | None) -> tuple[Tensor, ConvState]:
    """The previous token of every token ``[B, T, D]``, zeros (or the state) before the first one of a sequence."""
    taps = torch.arange(1, -1, -1, device=x.device, dtype=x.dtype)  # a convolution that keeps only the older tap
    return conv(x, taps.expand(x.shape[-1], 2).contiguous(), state=state, segments=segments)
