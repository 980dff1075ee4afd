"""Which parameters weight decay applies to, and which learn at a lower rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from linnet.mixers import Mixer

__all__ = ["learning_rate_caps", "no_decay_names", "parameter_groups"]


def no_decay_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone.

    These are all of fewer than two axes (norms, biases, decay rates, gates) and those that a mixer lists in its
    ``no_weight_decay``. Embeddings are decayed.
    """
    names = {name for name, p in model.named_parameters() if p.dim() < 2}
    return names | {name for name, _ in _listed(model, lambda mixer: dict.fromkeys(mixer.no_weight_decay))}


def learning_rate_caps(model: nn.Module) -> dict[str, float]:
    """Highest peak learning rate by name, for the parameters whose mixer sets one in its ``max_learning_rate``: step
    sizes and poles of state-space layers, which published code trains at 1e-3 however fast the rest learns."""
    return dict(_listed(model, lambda mixer: mixer.max_learning_rate))


def parameter_groups(model: nn.Module, weight_decay: float, *, lr: float) -> list[dict[str, Any]]:
    """The trainable parameters as groups of an optimiser, each with its ``lr`` and ``weight_decay``.

    One group is decayed, one is not (:func:`no_decay_names`); parameters that may not learn as fast as ``lr``
    (:func:`learning_rate_caps`) have groups at their own rate. A schedule that multiplies the rate of every group, as
    those of PyTorch do, keeps the proportion.

    >>> torch.optim.AdamW(parameter_groups(model, 0.1, lr=3e-4))

    Args:
        model: a decoder, or any module that holds mixers.
        weight_decay: of the parameters that are decayed.
        lr: peak learning rate.

    Raises:
        ValueError: ``weight_decay`` is negative, or ``lr`` not above 0.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay!r}")
    if not lr > 0:
        raise ValueError(f"lr: expected a number > 0, got {lr!r}")
    exempt, caps = no_decay_names(model), learning_rate_caps(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(lr, False): [], (lr, True): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((min(lr, caps.get(name, lr)), name in exempt), []).append(p)
    return [
        {"params": params, "lr": rate, "weight_decay": 0.0 if spared else weight_decay}
        for (rate, spared), params in groups.items()
        if params
    ]


def _listed(model: nn.Module, of: Callable[[Mixer], Any]) -> Iterator[tuple[str, Any]]:
    """Full name and value of what each mixer of ``model`` lists about its own parameters, of those that it has."""
    known = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, Mixer):
            for name, value in of(module).items():
                full = f"{prefix}.{name}" if prefix else name
                if full in known:
                    yield full, value
