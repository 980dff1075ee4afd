"""Softmax attention as a recurrent network (Mongaras & Larson 2025): the first Taylor orders of the exponential.

Each power of a score is linear attention over the monomials of queries and keys, so the orders up to P are one memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops import Segments, decay, rotary
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading, share
from .features import TaylorFeatures
from .retnet import RetNetState

NORMALIZERS = ("sum", "length", "rms", "l2", "none")


def _is_polynomial_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer, x = random_mixer(generator, "softmax_taylor", 8, num_heads=2, order=2), inputs(generator, 8)
    q, k, v = (y.transpose(1, 2) for y in mixer.queries_keys_values(x, torch.arange(x.shape[1])))
    scores = q @ k.transpose(-1, -2)
    weights = (1 + scores + scores**2 / 2).tril()
    o = (weights / weights.sum(-1, keepdim=True)) @ v
    return mixer(x)[0], mixer.o_proj(o.transpose(1, 2).flatten(2))


def _is_softmax_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    taylor = random_mixer(generator, "softmax_taylor", 4, num_heads=2, order=16)
    exact = random_mixer(generator, "attention", 4, num_heads=2)
    parts.assign(taylor.q_proj.weight, taylor.q_proj.weight * 0.2)
    share(taylor, exact, "q_proj", "k_proj", "v_proj", "o_proj")
    x = inputs(generator, 4)
    return taylor(x)[0], exact(x)[0]


def _norm_replaces_the_sum(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    normed = random_mixer(generator, "softmax_taylor", 8, num_heads=2, normalizer="l2", norm_eps=1e-30)
    summed = random_mixer(generator, "softmax_taylor", 8, num_heads=2)
    share(normed, summed, "q_proj", "k_proj", "v_proj", "o_proj")
    x = inputs(generator, 8)
    o = parts.heads(reading(summed, x, "o_proj"), 2)
    return reading(normed, x, "o_proj"), (o / o.norm(dim=-1, keepdim=True)).flatten(2)


@register_mixer(
    "softmax_taylor",
    Card(
        paper="Mongaras & Larson 2025, On the Expressiveness of Softmax Attention: A Recurrent Neural Network"
        " Perspective (arXiv 2507.23632)",
        recurrence="S_t = S_{t-1} + phi(k_t) v_t^T, <phi(q), phi(k)> = sum_{n <= P} (K^-1/2 q.k)^n / n!;"
        " o_t = S_t^T phi(q_t), divided by the sum of its weights or what is to replace it",
        state="H·F·V, F = C(K + P, P) (+ H·F with normalizer sum) + 1 position",
        engine="decay",
        expressivity="TC0: identity transition, nothing is ever forgotten",
        examples=(
            {"d_model": 8, "num_heads": 2},
            {"d_model": 8, "num_heads": 2, "order": 3, "normalizer": "rms", "gate": True, "rope": False},
        ),
        identities=(
            Identity("is masked attention with weights 1 + s + s^2 / 2 at order 2", _is_polynomial_attention),
            Identity("at order 16, with small scores, is softmax attention", _is_softmax_attention),
            Identity("with normalizer=l2 reads what it reads with the sum, of norm one", _norm_replaces_the_sum),
        ),
        notes=(
            "Each monomial is kept once; in the n-fold Kronecker power of the paper most appear n! times.",
            "normalizer=sum needs an even order: the Taylor polynomials of odd order have a zero. The released code"
            " forgets the division.",
            "normalizer=rms leaves out the division by the length, which the norm undoes.",
            "The ablations that keep the exponential have no state of constant size; see attention.",
        ),
    ),
)
class SoftmaxTaylor(Mixer):
    """Attention whose weights are the Taylor polynomial of the exponential, with constant memory.

    Args:
        d_model: width.
        num_heads: heads H of K = V = d_model / H channels; keep K small, the memory has C(K + order, order) rows.
        order: P, the highest power of the scores.
        normalizer: "sum" divides by the sum of the weights (softmax), "length" by the number of visible tokens, "rms"
            and "l2" normalise each head's output (with and without a learned weight), "none" does nothing.
        gate: multiply each head's output by sigmoid of a linear map of the input.
        rope: rotate queries and keys by their position, as in all published runs.
        rope_base: base of the rotation's frequencies.
        norm_eps: of "rms" and "l2".

    Raises:
        ValueError: naming the option, when it is out of range or does not divide, or for an odd order with "sum".
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 16,
        order: int = 2,
        normalizer: str = "sum",
        gate: bool = False,
        rope: bool = True,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_positive(rope_base=rope_base, norm_eps=norm_eps)
        parts.check_choice("normalizer", normalizer, NORMALIZERS)
        if not isinstance(order, int) or order < 0 or (normalizer == "sum" and order % 2):
            even = "an even whole number with normalizer='sum'" if normalizer == "sum" else "a whole number"
            raise ValueError(f"order: expected {even} of at least 0, got {order}")
        self.d_model, self.num_heads, self.order, self.normalizer = d_model, num_heads, order, normalizer
        self.rope, self.rope_base, self.norm_eps = rope, rope_base, norm_eps
        self.head = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        if rope and self.head % 2:
            raise ValueError(f"rope: expected an even number of channels per head, got {self.head}")
        self.q_proj, self.k_proj, self.v_proj = parts.projections(d_model, d_model, d_model, d_model)
        self.phi = TaylorFeatures(self.head, order)
        self.norm = parts.Norm(self.head, norm_eps) if normalizer == "rms" else None
        self.gate = parts.GateLinear(d_model, num_heads) if gate else None
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def queries_keys_values(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """``[B, T, H, K]`` each, the queries scaled by K^-1/2."""
        q, k, v = (parts.heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope:
            q, k = (rotary(y, positions, base=self.rope_base) for y in (q, k))
        return [q * self.head**-0.5, k, v]

    def forward(
        self, x: Tensor, state: RetNetState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, RetNetState]:
        parts.check_input(x, self.d_model, segments)
        memory, seen = parts.unpack(state, RetNetState)
        positions, seen = parts.count_positions(x, seen, segments)
        q, k, v = self.queries_keys_values(x, positions)
        q, k = self.phi(q), self.phi(k)
        summed = self.normalizer == "sum"  # of weights that are positive at every even order: no eps
        o, memory = decay(q, k, v, scale=1.0, normalize=summed, eps=0.0, state=memory, segments=segments)
        if self.normalizer == "length":
            o = o / (positions + 1)[..., None, None].to(o.dtype)
        elif self.norm is not None:
            o = self.norm(o)
        elif self.normalizer == "l2":
            o = (parts.rms_norm(o, self.norm_eps) * self.head**-0.5).to(o.dtype)
        if self.gate is not None:
            o = o * torch.sigmoid(self.gate(x))[..., None].to(o.dtype)
        return self.o_proj(o.flatten(2)), RetNetState(memory, seen)

    def init_state(self, rows: int) -> RetNetState:
        like = self.o_proj.weight
        memory = parts.decay_state(like, rows, self.num_heads, self.phi.features, self.head, self.normalizer == "sum")
        return RetNetState(memory, torch.zeros(rows, dtype=torch.int64, device=like.device))
