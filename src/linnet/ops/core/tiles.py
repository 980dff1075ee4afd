"""Whether tiles can be moved by the bulk tensor copy engine, by descriptors, rather than address by address."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["has_tma"]


@cache
def has_tma(device: torch.device) -> bool:
    """Whether a device has the bulk tensor copy engine (NVIDIA from Hopper on)."""
    if device.type not in ("cuda", "meta") or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None)[0] >= 9
