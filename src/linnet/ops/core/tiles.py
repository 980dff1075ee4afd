"""What a GPU has that launch settings depend on: the bulk tensor copy engine, tensor memory, multiprocessors."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["has_tensor_memory", "has_tma", "multiprocessors"]


@cache
def has_tma(device: torch.device) -> bool:
    """Whether a device has the bulk tensor copy engine (NVIDIA from Hopper on)."""
    if device.type not in ("cuda", "meta") or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None)[0] >= 9


@cache
def has_tensor_memory(device: torch.device) -> bool:
    """Whether products of matrices are summed in a memory of their own (NVIDIA's data-centre Blackwell)."""
    return has_tma(device) and torch.cuda.get_device_capability(device if device.type == "cuda" else None)[0] == 10


@cache
def multiprocessors(device: torch.device, otherwise: int) -> int:
    """Multiprocessors of a GPU; ``otherwise`` for the interpreter, which has none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else otherwise
