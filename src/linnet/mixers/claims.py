"""Tools for the executable identities on the mixers' cards: build two mixers, share their weights, compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Mixer, build_mixer

__all__ = ["inputs", "random_mixer", "randomize", "reading", "share"]


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter away from its initial value, so that no branch hides behind a zero: matrices are drawn with
    variance 1 / fan-in, vectors (biases, norms, decays) are shifted a little."""
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        if p.dim() < 2:
            p.add_(noise, alpha=0.1)
        else:
            p.copy_(noise * p.shape[-1] ** -0.5)


def random_mixer(
    generator: torch.Generator, name: str, d_model: int, *, depth: tuple[int, int] = (0, 1), **options: Any
) -> Any:
    """A mixer in float64 on the CPU with random parameters; ``depth`` is (layer, num_layers)."""
    mixer = build_mixer({"name": name, **options}, d_model, layer=depth[0], num_layers=depth[1]).double()
    randomize(mixer, generator)
    return mixer


def inputs(generator: torch.Generator, d_model: int, *, rows: int = 2, length: int = 11) -> Tensor:
    """A random input ``[B, T, D]`` in float64."""
    return torch.randn(rows, length, d_model, generator=generator, dtype=torch.float64)


def share(source: Mixer, target: Mixer, *names: str) -> None:
    """Copy the submodules called ``names`` from one mixer to another."""
    for name in names:
        target.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())


@torch.no_grad()
def reading(mixer: Mixer, x: Tensor, module: str = "norm") -> Tensor:
    """What the engine reads from its state: the input of the mixer's norm (or of another submodule)."""
    seen: list[Tensor] = []
    hook = mixer.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        mixer(x)
    finally:
        hook.remove()
    return seen[0]
