"""Which parameters weight decay applies to."""

from __future__ import annotations

from typing import Any

from torch import nn

from linnet.mixers import Mixer

__all__ = ["no_decay_names", "parameter_groups"]


def no_decay_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone.

    These are all of fewer than two axes (norms, biases, decay rates, gates) and those that a mixer lists in its
    ``no_weight_decay``. Embeddings are decayed.
    """
    names = {name for name, p in model.named_parameters() if p.dim() < 2}
    for prefix, module in model.named_modules():
        if isinstance(module, Mixer):
            own = {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay}
            names.update(own & {name for name, _ in model.named_parameters()})
    return names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two optimiser groups: with ``weight_decay``, and without.

    >>> torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-4)

    Raises:
        ValueError: ``weight_decay`` is negative.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay!r}")
    exempt = no_decay_names(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
