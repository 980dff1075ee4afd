"""The processes of a run: one or many, one device each, weights replicated or sharded; and how they are stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerated", "any_process", "stop_signals", "summed"]


@contextmanager
def accelerated(model: nn.Module, *, precision: str, device: str = "auto") -> Iterator[Accelerator]:
    """The Accelerator for this process, as `accelerate launch` (or `torchrun`) has set up its surroundings.

    Accelerate keeps one set of settings for the process. Where that is the only one, what others keep there, as the
    Trainer of transformers does, is set aside, and is as it was when the run ends, however it ends.

    Sharding (`--use_fsdp --fsdp_version 2`) wraps each layer of ``model.layers``. Weights stay fp32 and compute runs
    under autocast, so that a sharded run computes what a single process computes: a cast of whole layers would round
    decay rates to bf16 as well.

    Args:
        model: the decoder, to learn the class of its layers.
        precision: "no", "bf16" or "fp16".
        device: "auto" or "cpu".

    Raises:
        ValueError: fp16 without a GPU, FSDP 1, or another kind of distributed training.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in kept]
    if before[0].get("num_processes", 1) == 1:
        for state in kept:
            state.clear()
    try:
        accelerator = _accelerator(model, precision, device)
        try:
            yield accelerator
        finally:
            accelerator.free_memory()
    finally:
        if kept[0].get("num_processes", 1) == 1:
            for state, content in zip(kept, before, strict=True):
                state.clear()
                state.update(content)


def _accelerator(model: nn.Module, precision: str, device: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not gpu
    if device == "auto" and not gpu and torch.backends.mps.is_available():
        cpu = False
    if cpu and precision == "fp16":
        raise ValueError("precision: fp16 needs a GPU; use bf16 or no on a CPU")
    plugin = None
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        if os.environ.get("FSDP_VERSION", "2") != "2":
            raise ValueError("FSDP: expected version 2, got 1; pass --fsdp_version 2 to accelerate launch")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(layer).__name__ for layer in model.layers}),  # type: ignore[union-attr]
            mixed_precision_policy=MixedPrecisionPolicy(),
            # Loading on one process only unties shared weights, and every process has initialised the same weights.
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, fsdp_plugin=plugin)
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate turns to FSDP on accelerators only and would replicate silently; sharding works over gloo as well.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    known = (
        DistributedType.NO,
        DistributedType.FSDP,
        *(t for t in DistributedType if t.value.startswith("MULTI_")),
    )
    if accelerator.distributed_type not in known:
        raise ValueError(
            f"accelerate: expected plain, multi-device or FSDP training, got {accelerator.distributed_type}"
        )
    return accelerator


def summed(accelerator: Accelerator, x: torch.Tensor) -> torch.Tensor:
    """``x`` added up over the processes; all of them must ask."""
    result = x if accelerator.num_processes == 1 else accelerator.reduce(x, "sum")
    assert isinstance(result, torch.Tensor)
    return result


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set in any process; all of them must ask."""
    if accelerator.num_processes == 1:
        return flag
    return bool(summed(accelerator, torch.tensor(int(flag), device=accelerator.device)).item())


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
