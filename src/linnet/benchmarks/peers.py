"""Other libraries' kernels for the same ops, as they are called. Each is imported when it first runs.

A peer gets the inputs of a workload in its own layout and dtypes, converted once before anything is timed. It has no
settings of ours: block sizes, chunk lengths and autotuning are its own defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.ops.core import get_op

from .workloads import Inputs, run_mixer, weights_of

__all__ = ["Peer", "peers"]

Run = Callable[[Inputs, "Tensor | None"], Tensor]


class Peer(NamedTuple):
    """An implementation of a workload.

    Attributes:
        name: the ``impl`` of a row.
        package: distribution it comes from.
        module: what must be importable.
        run: ``run(inputs, cu_seqlens)`` -> output.
        convert: linnet's inputs -> its own; on tensors [B, T, ...].
        restore: its output -> [B, T, H, V].
        packed: whether it takes packed sequences.
        cpu: whether it runs without a GPU.
        heads: how many it takes at most; any number when None.
        fixed: whether it compiles its kernels for one batch and length only.
    """

    name: str
    package: str
    module: str
    run: Run
    convert: Callable[[Inputs], Inputs]
    restore: Callable[[Tensor], Tensor]
    packed: bool = True
    cpu: bool = False
    heads: int | None = None
    fixed: bool = False

    def obstacle(self, device: torch.device, packed: bool, heads: int = 1) -> str | None:
        """Why it cannot run there, on packed sequences or not, with so many heads; None when it can."""
        if device.type == "cpu" and not self.cpu:
            return "runs on GPUs only"
        if packed and not self.packed:
            return "does not take packed sequences"
        if self.heads is not None and heads > self.heads:
            return f"takes {self.heads} head" + ("s" if self.heads > 1 else "")
        return None if find_spec(self.module) is not None else f"{self.package} is not installed"

    @property
    def version(self) -> str:
        """Of its package."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""


_peers: dict[str, list[Peer]] = {}


def peers(workload: str) -> list[Peer]:
    """All known implementations of a workload, installed or not."""
    return list(_peers.get(workload, ()))


def _peer(
    workload: str,
    name: str,
    package: str,
    module: str,
    *,
    convert: Callable[[Inputs], Inputs] = lambda x: x,
    restore: Callable[[Tensor], Tensor] = lambda o: o,
    packed: bool = True,
    heads: int | None = None,
    fixed: bool = False,
) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        peer = Peer(name, package, module, run, convert, restore, packed, heads=heads, fixed=fixed)
        _peers.setdefault(workload, []).append(peer)
        return run

    return add


def _swapped(inputs: Inputs) -> Inputs:
    """[B, T, H, ...] -> [B, H, T, ...]."""
    return {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()}


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


# flash-linear-attention: the chunked kernel of every op, and the fused one where there is one. Parts of some ops have a
# second form in TileLang, which it runs where that package happens to be importable: a row of its own.


def _fla(
    workload: str, name: str, *, convert: Callable[[Inputs], Inputs] = lambda x: x, packed: bool = True
) -> Callable[[Run], Run]:
    tilelang = name == "fla-tilelang"

    def add(run: Run) -> Run:
        def begin(x: Inputs, cu: Tensor | None) -> Tensor:
            os.environ["FLA_TILELANG"] = str(int(tilelang))  # the backward pass that follows asks for it as well
            return run(x, cu)

        module = "tilelang" if tilelang else "fla"
        _peer(workload, name, "fla-core", module, convert=convert, packed=packed)(begin)
        return run

    return add


@_fla("linear_attn", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False, cu_seqlens=cu)[0]


@_fla("linear_attn", "fla-fused")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.linear_attn import fused_chunk_linear_attn

    return fused_chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False, cu_seqlens=cu)[0]


@_fla("retention", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.retention import chunk_retention

    return chunk_retention(x["q"], x["k"], x["v"], cu_seqlens=cu)[0]


@_fla("retention", "fla-fused")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.retention import fused_chunk_retention

    return fused_chunk_retention(x["q"], x["k"], x["v"], cu_seqlens=cu)[0]


@_fla("simple_gla", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], g=x["g"], cu_seqlens=cu)[0]


@_fla("simple_gla", "fla-fused")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.simple_gla import fused_chunk_simple_gla

    return fused_chunk_simple_gla(x["q"], x["k"], x["v"], g=x["g"], cu_seqlens=cu)[0]


@_fla("gla", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], x["k"], x["v"], x["g"], cu_seqlens=cu)[0]


@_fla("rwkv6", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.rwkv6 import chunk_rwkv6

    return chunk_rwkv6(x["q"], x["k"], x["v"], x["g"], x["u"], cu_seqlens=cu)[0]


@_fla("delta_rule", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], cu_seqlens=cu)[0]


@_fla("gated_delta_rule", "fla")
@_fla("gated_delta_rule", "fla-tilelang")
@_fla("gated_delta_rule_grouped", "fla")
@_fla("gated_delta_rule_grouped", "fla-tilelang")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], cu_seqlens=cu)[0]


@_fla("kda", "fla")
@_fla("kda", "fla-tilelang")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.kda import chunk_kda

    return chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], cu_seqlens=cu)[0]


@_fla("gdn2", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.gdn2 import chunk_gdn2

    return chunk_gdn2(x["q"], x["k"], x["v"], x["g"], x["beta"], x["w"], cu_seqlens=cu)[0]


@_fla("deltaproduct", "fla")
@_fla("deltaproduct", "fla-tilelang")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    steps = x["k"].shape[1] // x["q"].shape[1]
    return chunk_gated_delta_product(x["q"], x["k"], x["v"], x["g"], x["beta"], steps, cu_seqlens=cu)[0]


@_fla("rwkv7", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.rwkv7 import chunk_rwkv7

    return chunk_rwkv7(x["q"], x["g"], x["k"], x["v"], x["a"], x["b"], cu_seqlens=cu)[0]


@_fla("rwkv7", "fla-bounded")
@_fla("rwkv7", "fla-tilelang")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.rwkv7 import chunk_rwkv7

    # RWKV-7's decays stay above -0.607, which its model says to the kernel; that one is faster.
    return chunk_rwkv7(x["q"], x["g"], x["k"], x["v"], x["a"], x["b"], cu_seqlens=cu, lower_bound=-0.61)[0]


@_fla("gated_scan", "fla", convert=lambda x: {"x": x["b"], "g": x["a"].log()}, packed=False)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(x["x"], x["g"])[0]


@_fla("gated_scan", "fla-recurrent", convert=lambda x: {"x": x["b"], "g": x["a"].log()})
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.hgrn import fused_recurrent_hgrn

    return fused_recurrent_hgrn(x["x"], x["g"], cu_seqlens=cu)[0]


@_fla("short_conv", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.modules.convolution import causal_conv1d

    return causal_conv1d(x["x"], x["weight"], activation="silu", cu_seqlens=cu)[0]


# FlashQLA (TileLang).


@_peer("gated_delta_rule", "flash-qla", "flash-qla", "flash_qla")
@_peer("gated_delta_rule_grouped", "flash-qla", "flash-qla", "flash_qla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from flash_qla import chunk_gated_delta_rule

    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], cu_seqlens=cu)[0]


# mlstm_kernels (tiled flash linear attention).

_mlstm = partial(
    _peer,
    package="mlstm-kernels",
    module="mlstm_kernels",
    convert=_swapped,
    restore=_swap,
    packed=False,
    fixed=True,
)


@_mlstm("mlstm_exp", "mlstm-kernels")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from mlstm_kernels.torch.chunkwise import registry

    kernel: Any = registry["triton_xl_chunk"]
    return kernel(x["q"], x["k"], x["v"], x["i"], x["f"], autocast_kernel_dtype=x["q"].dtype)


@_mlstm("mlstm_exp", "mlstm-kernels-limit")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from mlstm_kernels.torch.chunkwise import registry

    kernel: Any = registry["triton_limit_chunk"]
    return kernel(x["q"], x["k"], x["v"], x["i"], x["f"], autocast_kernel_dtype=x["q"].dtype)


def _preactivations(x: Inputs) -> Inputs:
    """Of the gates, which this kernel takes before their sigmoid."""
    f = x["g"].double().exp().logit().to(x["g"].dtype)
    return _swapped({"q": x["q"], "k": x["k"], "v": x["v"], "i": x["w"].double().logit().to(x["w"].dtype), "f": f})


@_mlstm("mlstm_sig", "mlstm-kernels", convert=_preactivations)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from mlstm_kernels.torch.chunkwise import registry

    kernel: Any = registry["triton_xl_chunk_siging"]
    inputs = x["q"], x["k"], x["v"], x["i"], x["f"]
    return kernel(*inputs, normalize=False, autocast_kernel_dtype=x["q"].dtype)


@_fla("mlstm_sig", "fla")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    # fla has no write weight: what a user of it does is scale the keys.
    return chunk_simple_gla(x["q"], x["k"] * x["w"][..., None].to(x["k"].dtype), x["v"], g=x["g"], cu_seqlens=cu)[0]


# accelerated-scan: [B, C, T].

_accelerated = partial(
    _peer,
    "gated_scan",
    package="accelerated-scan",
    module="accelerated_scan",
    convert=_swapped,
    restore=_swap,
    packed=False,
)


@_accelerated("accelerated-scan")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from accelerated_scan.scalar import scan

    return scan(x["a"], x["b"])


@_accelerated("accelerated-scan-warp")
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from accelerated_scan.warp import scan

    return scan(x["a"], x["b"])


# mamba-ssm, whose kernel of the selective scan is built from source: [B, D, T], and all that changes with the token in
# one dtype.


def _for_mamba(x: Inputs) -> Inputs:
    moving = {name: _swap(x[name].to(x["x"].dtype)).contiguous() for name in ("x", "delta", "B", "C")}
    return {**x, **moving, "A": x["A"].contiguous()}


@_peer("selective_scan", "mamba-ssm", "mamba-ssm", "mamba_ssm", convert=_for_mamba, restore=_swap, packed=False)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(x["x"], x["delta"], x["A"], x["B"], x["C"], x["D"])


# PyTorch's depthwise convolution: [B, D, T].


@_peer(
    "short_conv",
    "torch-conv1d",
    "torch",
    "torch",
    convert=lambda x: {"x": _swap(x["x"]).contiguous(), "weight": x["weight"][:, None]},
    restore=_swap,
    packed=False,
)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    W = x["weight"].shape[-1]
    y = torch.nn.functional.conv1d(x["x"], x["weight"], padding=W - 1, groups=x["x"].shape[1])
    return torch.nn.functional.silu(y[..., : 1 - W])


# PyTorch's own softmax attention: on the same shapes, what the linear ops are up against.


def _sdpa(x: Inputs, backend: Any) -> Tensor:
    with torch.nn.attention.sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)


@_peer("attention", "torch-cudnn", "torch", "torch", convert=_swapped, restore=_swap, packed=False)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    return _sdpa(x, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


@_peer("attention", "torch-flash", "torch", "torch", convert=_swapped, restore=_swap, packed=False)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    return _sdpa(x, torch.nn.attention.SDPBackend.FLASH_ATTENTION)


# cuDNN: layers of one head.


def _cudnn(kind: str) -> None:
    def convert(x: Inputs) -> Inputs:
        """The layer of `torch.nn` with these weights, which lie in one piece as cuDNN wants them."""
        width = x["x"].shape[-1]
        layer = getattr(torch.nn, kind)(width, width, batch_first=True).to(x["x"].device, x["x"].dtype)
        if x["R"].shape[0] == 1:
            layer.weight_ih_l0.copy_(x["W"].mT)
            layer.weight_hh_l0.copy_(x["R"][0].mT)
            layer.bias_ih_l0.copy_(x["bias"])
            layer.bias_hh_l0.zero_()
        layer.flatten_parameters()
        return {"x": x["x"], **dict(layer.named_parameters())}

    @_peer(f"{kind.lower()}_layer", "torch-cudnn", "torch", "torch", convert=convert, packed=False, heads=1)
    def _(x: Inputs, cu: Tensor | None) -> Tensor:
        y, *weights = x.values()
        state = y.new_zeros(1, y.shape[0], y.shape[2])
        run: Any = getattr(torch, kind.lower())
        return run(y, (state, state) if kind == "LSTM" else state, weights, True, 1, 0.0, True, False, True)[0]


_cudnn("LSTM")
_cudnn("GRU")


# FlashRNN: its Triton kernels, which hold a head's weights on one multiprocessor, and the CUDA kernels that alternate
# with matrix products. Those are compiled when they first run.


def _for_flashrnn(x: Inputs) -> Inputs:
    H, D, gates = x["R"].shape[0], x["R"].shape[1], x["R"].shape[2] // x["R"].shape[1]
    R = x["R"].unflatten(-1, (gates, D)).permute(2, 0, 3, 1)
    R = R.roll(1, 0) if gates == 3 else R  # of the GRU the candidate's comes first, with a bias of its own
    bias = torch.zeros(4, H, D, dtype=R.dtype, device=R.device)
    return {"gates": x["x"].unflatten(-1, (gates, D)).transpose(2, 3), "R": R, "bias": bias}


def _flashrnn(kind: str, name: str, backend: str) -> None:
    @_peer(kind, name, "flashrnn", "flashrnn", convert=_for_flashrnn, packed=False, fixed=True)
    def _(x: Inputs, cu: Tensor | None) -> Tensor:
        from flashrnn import flashrnn

        dtype = str(x["R"].dtype).removeprefix("torch.")
        return flashrnn(x["gates"], x["R"], x["bias"], function=kind, backend=backend, dtype=dtype)[0][0]


for _kind in ("lstm", "slstm"):
    _flashrnn(_kind, "flashrnn-triton", "triton_fused")
for _kind in ("lstm", "gru", "slstm"):
    _flashrnn(_kind, "flashrnn-alternating", "cuda")


# Beside an M2RNN layer: this library's Gated DeltaNet layer of the same width, with the heads that the M2RNN's paper
# compares with.


def _gated_deltanet(width: int) -> str:
    return f"gated_deltanet(num_heads={max(1, width // 512)}, head_dim=256, expand_v=2.0)"


@_peer(
    "m2rnn_layer",
    "gated-deltanet",
    "linnet",
    "linnet",
    convert=lambda x: {"x": x["x"], **weights_of(_gated_deltanet(x["x"].shape[-1]), x["x"])},
    packed=False,
)
def _(x: Inputs, cu: Tensor | None) -> Tensor:
    return run_mixer(_gated_deltanet(x["x"].shape[-1]), x, None)


# What a cell costs as a loop over tokens in PyTorch: linnet's own definitions, which are written that way.


def _loop(workload: str, engine: str, **options: Any) -> None:
    @_peer(workload, "torch-loop", "torch", "torch", packed=False)
    def _(x: Inputs, cu: Tensor | None) -> Tensor:
        return get_op(engine).function(**x, **options, backend="reference")[0]


for _kind in ("lstm", "gru", "slstm"):
    _loop(_kind, "cell", kind=_kind)
_loop("paragru", "paragru")
_loop("m2rnn", "m2rnn", clip=1.0)
_loop("block_scan", "scan")
_loop("selective_scan", "selective_scan")
