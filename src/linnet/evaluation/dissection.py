"""What a mixer is as a linear system: its canonical form, and the size and reach of its memory."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from linnet.mixers import Mixer

from .linear_form import (
    Canonical,
    EngineCall,
    affine_steps,
    canonical,
    engine_calls,
    memory,
    nonlinearity,
    ranks,
    realise,
    simulate,
    transfer,
    with_memory,
)

__all__ = ["Dissection", "LinearPart", "dissect"]

EXACT, USED = 1e-9, 1e-2  # of the largest singular value: what is there at all, and what matters
LARGEST = 1024  # numbers of state whose transition is formed as a matrix
_SAME = 1e-9


@dataclass(frozen=True)
class LinearPart:
    """One engine call of a mixer, seen as a linear system from its values to its readings.

    Attributes:
        engine: registered op.
        values, readings: numbers that go in and come out at each token.
        nonlinearity: relative deviation from additivity and homogeneity in the values; what follows is empty when it is
            not tiny, because there is no linear form then.
        state: numbers of the state that values reach; None when the state grows with the sequence.
        error: of the canonical form (of the minimal realisation when the state grows), run on the actual values,
            relative to the reading.
        ranks: at every cut s = 1 .. T-1, the numbers that any linear system with these readings must carry over it.
        used: the same, of what stands out by more than a hundredth.
        full: the largest these ranks could be for the cut's size, whatever the layer.
        mixings: number of different token-mixing matrices that the readings are made of.
        transition: structure of ``A_t``.
        constant: whether it is the same at every token.
        commutes: whether the transitions of different tokens commute.
        eigenvalues: of all ``A_t``, as (real, imaginary) pairs.
        half_lives: shortest, median and longest time in tokens over which a mode of the state halves.
        lags: root mean square of ``Phi`` at every distance 0 .. T-1 between value and reading.
        reach: mean distance between value and reading, weighted by ``|Phi|``.
        mixing: ``|Phi|`` over pairs of tokens, ``[T][T]``.
    """

    engine: str
    values: int
    readings: int
    nonlinearity: float
    state: int | None = None
    error: float = 0.0
    ranks: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    mixings: int = 0
    transition: str = ""
    constant: bool = False
    commutes: bool = False
    eigenvalues: list[tuple[float, float]] = field(default_factory=list)
    half_lives: tuple[float, float, float] | None = None
    lags: list[float] = field(default_factory=list)
    reach: float = 0.0
    mixing: list[list[float]] = field(default_factory=list)

    @property
    def linear(self) -> bool:
        """Whether the readings are linear in the values."""
        return self.nonlinearity <= _SAME


@dataclass(frozen=True)
class Dissection:
    """What :func:`dissect` found.

    Attributes:
        name: of the mixer.
        length: tokens T of the input.
        memory: numbers in its state (convolution tails, stabilisers and positions apart); None when it grows.
        affine_error: relative deviation of one call over all tokens from ``v -> A_t v + b_t``, step by step; None when
            the card says that the state does not enter its own update linearly, or it grows.
        parts: its engine calls, in order.
    """

    name: str
    length: int
    memory: int | None
    affine_error: float | None
    parts: list[LinearPart]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite half-lives become None."""
        facts = asdict(self)
        for part in facts["parts"]:
            lives = part["half_lives"]
            part["half_lives"] = lives and [life if math.isfinite(life) else None for life in lives]
        return facts


@torch.no_grad()
def dissect(mixer: Mixer, x: Tensor) -> Dissection:
    """Take a mixer apart on one input, exactly, in float64: a copy of it, on the CPU.

    Args:
        mixer: with whatever parameters it has.
        x: ``[1, T, D]``; T bounds the ranks that can be seen. Time and memory grow as ``T^2`` times values times
            readings: this is for small layers and a few dozen tokens.

    Raises:
        ValueError: another shape, or a state of more than 1,024 numbers.
    """
    if x.dim() != 3 or x.shape[0] != 1 or x.shape[1] < 2 or x.shape[2] != mixer.d_model:
        raise ValueError(f"x: expected shape [1, T >= 2, {mixer.d_model}], got {list(x.shape)}")
    mixer, x = copy.deepcopy(mixer).to("cpu", torch.float64).eval(), x.to("cpu", torch.float64)
    held = memory(mixer(x)[1]).shape[1] if mixer.card.constant_state else None
    if held is not None and held > LARGEST:
        raise ValueError(f"mixer: expected a state of at most {LARGEST:,} numbers, got {held:,}; choose smaller sizes")
    error = None
    if mixer.card.linear_state and held is not None:
        state = mixer(x)[1]  # some memory to carry on with
        A, b = affine_steps(mixer, x, state)
        v = torch.randn(held, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        got = memory(mixer(x, with_memory(state, v[None]))[1])[0]
        for transition, write in zip(A, b, strict=True):
            v = transition @ v + write
        error = _relative(got, v)
    return Dissection(mixer.name, x.shape[1], held, error, [_part(call) for call in engine_calls(mixer, x)])


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-300))


def _part(call: EngineCall) -> LinearPart:
    read, values = call.run()[0][0].flatten(1), call.values
    T, m, p = *values.shape, read.shape[1]
    facts: dict[str, Any] = {"engine": call.engine, "values": m, "readings": p, "nonlinearity": nonlinearity(call)}
    if facts["nonlinearity"] > _SAME:
        return LinearPart(**facts)
    phi, form = transfer(call), canonical(call)
    forgetting: dict[str, Any] = {"transition": "none: the state grows"} if form is None else _transition(form)
    exact, used = ranks(phi, EXACT, USED)
    weights = phi.square().sum((1, 3)).sqrt()
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    return LinearPart(
        **facts,
        state=None if form is None else form.A[0].shape[1],
        error=_relative(simulate(form or realise(phi), values), read),
        ranks=exact,
        used=used,
        full=[min(s * m, (T - s) * p) for s in range(1, T)],
        mixings=_kronecker_rank(phi),
        lags=[float(weights.diagonal(-lag).square().mean().sqrt()) for lag in range(T)],
        reach=float((weights * distance).sum() / weights.sum().clamp(min=1e-300)),
        mixing=weights.tolist(),
        **forgetting,
    )


def _kronecker_rank(phi: Tensor) -> int:
    """Of ``Phi`` as a sum of products of a matrix over tokens and one over channels."""
    T, p, _, m = phi.shape
    values = torch.linalg.svdvals(phi.permute(0, 2, 1, 3).reshape(T * T, p * m))
    return int((values > EXACT * values[0]).sum())


def _transition(form: Canonical) -> dict[str, Any]:
    """Structure, spectrum and speed of forgetting of the transitions."""
    A = torch.stack(form.A)
    size = max(float(A.abs().max()), 1e-300)
    diagonal = A.diagonal(dim1=1, dim2=2)
    off = A - torch.diag_embed(diagonal)
    if bool((off.abs() <= _SAME * size).all()):
        spectrum, rates = diagonal.flatten(), diagonal.abs().clamp(min=1e-300).log().mean(0).exp()
        commutes = True
    else:
        product = torch.eye(A.shape[1], dtype=A.dtype)
        for step in A:
            product = step @ product
        spectrum, rates = torch.linalg.eigvals(A).flatten(), torch.linalg.eigvals(product).abs() ** (1 / len(A))
        swapped = A[:-1] @ A[1:] - A[1:] @ A[:-1]
        commutes = bool(swapped.abs().max() <= _SAME * size**2)
    lives = torch.where(rates < 1 - 1e-12, math.log(0.5) / rates.clamp(1e-300, 1 - 1e-12).log(), torch.inf)
    lives = lives.sort().values
    return {
        "transition": _structure(A, size),
        "constant": bool((A - A[0]).abs().max() <= _SAME * size),
        "commutes": commutes,
        "eigenvalues": [(z.real, z.imag) for z in spectrum.tolist()],
        "half_lives": (float(lives[0]), float(lives[len(lives) // 2]), float(lives[-1])),
    }


def _structure(A: Tensor, size: float) -> str:
    """In words, in the coordinates of the engine's own state."""
    n = A.shape[1]
    used = (A.abs() > _SAME * size).any(0)
    if not (used & ~torch.eye(n, dtype=torch.bool)).any():
        diagonal = A.diagonal(dim1=1, dim2=2)
        if bool(((diagonal - 1).abs() <= _SAME).all()):
            return "identity"
        factors = len(torch.unique((diagonal / size * 1e8).round(), dim=1).T)
        return "one factor for all" if factors == 1 else f"diagonal, {factors} different factors"
    blocks = _blocks(used | used.T)
    largest = max(len(block) for block in blocks)
    turning = [block for block in blocks if len(block) == 2 and _is_complex(A, block)]
    if largest == 2 and len(turning) == sum(len(block) == 2 for block in blocks):
        return f"diagonal, {len(turning)} of {len(blocks)} factors complex"
    low = max(_rank_beyond_a_factor(A[0][block][:, block]) for block in blocks)
    text = "one dense block" if len(blocks) == 1 else f"{len(blocks)} blocks of up to {largest}"
    return text + (f", a factor plus rank {low}" if 0 < low < largest - 1 else "")


def _is_complex(A: Tensor, block: list[int]) -> bool:
    a = A[:, block][:, :, block]
    same, opposite = a[:, 0, 0] - a[:, 1, 1], a[:, 0, 1] + a[:, 1, 0]
    return bool((same.abs().max() <= _SAME) & (opposite.abs().max() <= _SAME))


def _rank_beyond_a_factor(block: Tensor) -> int:
    """How far a block is from a multiple of the identity, by the multiplicity of its most frequent eigenvalue."""
    values = torch.linalg.eigvals(block)
    near = (values[:, None] - values).abs() <= 1e-7 * values.abs().max().clamp(min=1e-300)
    return len(block) - int(near.sum(1).max())


def _blocks(linked: Tensor) -> list[list[int]]:
    """Connected components of a symmetric relation."""
    left, found = set(range(len(linked))), []
    while left:
        block, new = set(), {min(left)}
        while new:
            block |= new
            new = {j for i in new for j in linked[i].nonzero().flatten().tolist()} - block
        left -= block
        found.append(sorted(block))
    return found
