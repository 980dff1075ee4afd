"""The gated norm: what it computes, what it refuses, and its kernels in the interpreter, on a GPU and ahead of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from interpreted import INTERPRETED, run_interpreted, starts_the_interpreter
from linnet.ops import gated_norm
from linnet.ops.norm import WIDEST

Given = dict[str, Tensor]
kernels_run = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
MODES: dict[str, dict[str, Any]] = {  # as layers have them
    "gla": {},
    "kda": {"activation": "sigmoid"},
    "lightning": {"activation": "identity", "without": ("weight",)},
    "elman": {"own": True},
    "mlstm": {"own": True, "center": True, "activation": "sigmoid"},
    "mlstm_block": {"own": True, "center": True, "skip": True},
    "rwkv6": {"own": True, "center": True, "bias": True},
    "mamba2": {"norm_first": False, "own": True, "skip": True},
    "centred after the gate": {"norm_first": False, "center": True, "bias": True},
}


def call(
    mode: str, B: int, T: int, groups: int, W: int, dtype: torch.dtype, wide: bool = False, device: str = "cpu"
) -> tuple[Given, dict[str, Any]]:
    """Tensors and options of a mode; with ``wide``, values and gate are parts of wider tokens."""
    options = {"groups": groups, "eps": 0.1} | MODES[mode]
    has = {name: options.pop(name, False) for name in ("own", "bias", "skip")}
    without, D, generator = options.pop("without", ()), groups * W, torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    both = draw(B, T, 2 * D + 3 * wide)
    v, gate = (x if wide else x.contiguous() for x in (both[..., :D], both[..., -D:]))
    size = D if has["own"] else W
    given = {"y": draw(B, T, D), "gate": gate, "weight": draw(size).float()}
    if has["bias"]:
        given["bias"] = draw(size).float()
    if has["skip"]:
        given |= {"v": v, "skip": draw(D)}
    return {name: x for name, x in given.items() if name not in without}, options


def gradients(given: Given, options: dict[str, Any], backend: str) -> Given:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = gated_norm(**leaves, **options, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], dout), strict=True))}


@pytest.mark.parametrize("mode", MODES)
def test_is_the_formula(mode):
    given, options = call(mode, 2, 3, 2, 4, torch.float64)
    found = gated_norm(**given, **options)

    def vector(name: str, otherwise: float) -> Tensor:
        p = given.get(name, torch.full((4,), otherwise, dtype=torch.float64))
        return p.view(-1, 4)

    def norm(x: Tensor) -> Tensor:
        x = x.unflatten(2, (2, 4))
        x = x - x.mean(-1, keepdim=True) if options.get("center") else x
        x = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
        return (x * vector("weight", 1) + vector("bias", 0)).flatten(2)

    def opened(x: Tensor) -> Tensor:
        opening = {"silu": F.silu, "sigmoid": torch.sigmoid, "identity": lambda g: g}
        past = given["skip"] * given["v"] if "v" in given else 0
        return (x + past) * opening[options.get("activation", "silu")](given["gate"])

    want = opened(norm(given["y"])) if options.get("norm_first", True) else norm(opened(given["y"]))
    torch.testing.assert_close(found, want)


@kernels_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape, wide", [((2, 41, 3, 40), True), ((1, 5, 1, 1100), False)])
def test_kernels_are_as_exact_as_pytorch(shape, wide, mode, dtype):
    given, options = call(mode, *shape, dtype, wide, DEVICE)
    exact = gradients({name: x.double() for name, x in given.items()}, options, "chunked")
    plain, found = (gradients(given, options, backend) for backend in ("chunked", "triton"))
    for name, x in found.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape
        bound = 1.5 * (plain[name] - exact[name]).norm() + 1e-6 * exact[name].norm()
        assert (x - exact[name]).norm() <= bound, name


@pytest.mark.parametrize("backend", ["chunked", pytest.param("triton", marks=kernels_run)])
@pytest.mark.parametrize("mode", ["gla", "mamba2", "mlstm"])
def test_takes_what_a_memory_can_give(mode, backend):
    given, options = call(mode, 1, 2, 1, 16, torch.float32, device=DEVICE)
    given["y"] *= 1e24
    exact = gradients({name: x.double() for name, x in given.items()}, options, "chunked")
    for name, x in gradients(given, options, backend).items():
        torch.testing.assert_close(x.double() / exact[name].norm(), exact[name] / exact[name].norm(), rtol=0, atol=1e-5)


@kernels_run
def test_kernels_take_other_strides():
    given, options = call("mamba2", 2, 5, 2, 8, torch.float32, device=DEVICE)
    turned = {
        name: x.mT.contiguous().mT if x.dim() == 3 else x[:, None].expand(-1, 2)[:, 0] for name, x in given.items()
    }
    torch.testing.assert_close(gradients(turned, options, "triton"), gradients(given, options, "triton"))


@kernels_run
def test_transforms():
    given, options = call("mlstm_block", 2, 5, 2, 8, torch.float32, device=DEVICE)

    def loss(weight: Tensor, y: Tensor, backend: str) -> Tensor:
        return gated_norm(**given | {"weight": weight, "y": y}, **options, backend=backend).square().sum()

    def each(backend: str) -> Any:
        arguments = given["weight"].expand(3, -1), given["y"].expand(3, -1, -1, -1)
        return torch.func.vmap(torch.func.grad(lambda w, y: loss(w, y, backend), (0, 1)))(*arguments)

    torch.testing.assert_close(each("triton"), each("chunked"))


@starts_the_interpreter
def test_kernels_in_the_interpreter():
    run_interpreted(__file__, "-k", "kernels_are or takes_what or kernels_take or transforms")


@kernels_run
def test_compiles_without_breaks():
    given, options = call("mlstm_block", 2, 5, 2, 8, torch.float32, device=DEVICE)

    def run(given: Given) -> Tensor:
        return gated_norm(**given, **options, backend="triton")

    want = gradients(given, options, "triton")
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, [*leaves.values()], dout)
    torch.testing.assert_close({"out": out.detach(), **dict(zip(leaves, found, strict=True))}, want)


def test_wider_norms_are_left_to_pytorch():
    given, options = call("gla", 1, 1, 1, WIDEST + 1, torch.float32)
    with pytest.raises(ValueError, match="backend: this call supports"):
        gated_norm(**given, **options, backend="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": torch.zeros(1, 2, 3)}, "y: expected shape"),
        ({"skip": torch.zeros(4, dtype=torch.int64)}, "skip: expected a floating tensor"),
        ({"gate": torch.zeros(4)}, "gate: expected shape"),
        ({"weight": torch.zeros(3)}, r"weight: expected shape \[D=4\] or \[W=2\], got \[3\]"),
        ({"bias": torch.zeros(2)}, r"bias: expected shape \[4\] like weight, got \[2\]"),
        ({"v": None}, "v, skip: expected both or neither, got skip alone"),
        ({"groups": 3}, "groups: expected a divisor of the 4 channels, got 3"),
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"eps": -1.0}, "eps: expected a finite number"),
        ({"eps": 0}, "eps: expected a number above 0"),
    ],
)
def test_refuses(change, message):
    given, options = call("mamba2", 1, 2, 2, 2, torch.float32)
    with pytest.raises(ValueError, match=message):
        gated_norm(**given | options | change)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("mode, W", [("gla", 128), ("rwkv6", 64), ("mamba2", WIDEST), ("mlstm_block", 336)])
def test_kernels_compile_ahead_of_time(mode, W):
    pytest.importorskip("triton")
    from ahead_of_time import HOPPER, MI300, SHARED_MEMORY, build, launches

    from linnet.ops.norm import launch

    given, options = call(mode, 1, 64, 2, W, torch.bfloat16)
    names = "norm_first", "activation", "center"
    chosen = [options.get(name, otherwise) for name, otherwise in zip(names, (True, "silu", False), strict=True)]
    tensors = [given.get(name) for name in ("y", "gate", "weight", "bias", "v", "skip")]
    arguments = *tensors, 2, *chosen, 0.1
    found = [*launches(lambda: launch.forward(*arguments)), *launches(lambda: launch.backward(*arguments, given["y"]))]
    assert len(found) == 2
    for one in found:
        for target in (HOPPER, MI300):
            assert build(one, target).metadata.shared <= SHARED_MEMORY[target]
