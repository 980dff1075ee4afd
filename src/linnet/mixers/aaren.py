"""Aaren (Feng et al. 2024): attention as an RNN, softmax attention of one learned query a layer to every prefix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops import Segments, SoftmaxScanState, softmax_scan
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading


def _is_attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "aaren", 16, num_heads=2)
    x = inputs(generator, 16)
    q = parts.heads(mixer.q_proj(mixer.query).expand_as(x), 2)
    k, v = parts.heads(mixer.k_proj(x), 2), parts.heads(mixer.v_proj(x), 2)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return reading(mixer, x, "o_proj"), o.transpose(1, 2).flatten(2)


def _is_mean(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "aaren", 16, num_heads=2)
    nn.init.zeros_(mixer.k_proj.weight)
    x = inputs(generator, 16)
    counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    return reading(mixer, x, "o_proj"), mixer.v_proj(x).cumsum(1) / counts


@register_mixer(
    "aaren",
    Card(
        paper="Feng et al. 2024, Attention as an RNN (arXiv 2405.13956)",
        recurrence="u_t = u_{t-1} + exp(s_t); w_t = w_{t-1} + exp(s_t) v_t; o_t = w_t / u_t, s_t = K^-1/2 q.k_t with a"
        " learned query q",
        state="d_model + 2·H",
        engine="softmax_scan",
        expressivity="TC0: identity transition, nothing is ever forgotten",
        examples=({"d_model": 8, "num_heads": 2}, {"d_model": 8, "num_heads": 1, "bias": False}),
        identities=(
            Identity("is causal softmax attention with the same query at every token", _is_attention),
            Identity("is the running mean of the values when every score is zero", _is_mean),
        ),
        notes=("Keys have no bias: it would move all scores alike, which a softmax does not see.",),
    ),
)
class Aaren(Mixer):
    """Attention with one learned query a layer; a state of constant size for exact softmax attention.

    Args:
        d_model: width.
        num_heads: heads H of K = d_model / H channels.
        bias: learn offsets of query, values and output.

    Raises:
        ValueError: when ``num_heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, *, num_heads: int = 4, bias: bool = True):
        super().__init__()
        self.d_model, self.num_heads = d_model, num_heads
        self.head_dim = parts.check_divisor("num_heads", num_heads, d_model, "d_model")
        self.query = nn.Parameter(torch.empty(d_model))
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=bias) for _ in range(3))
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A standard normal query."""
        nn.init.normal_(self.query)

    def forward(
        self, x: Tensor, state: SoftmaxScanState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, SoftmaxScanState]:
        parts.check_input(x, self.d_model, segments)
        # The query is the same for every token, so it goes into the key's weights: no keys are formed.
        # As a row: the map of a vector is a view that PyTorch makes in place, which selective checkpointing takes for
        # a change of the product it keeps.
        q = parts.heads(self.q_proj(self.query[None]), self.num_heads)[0] * self.head_dim**-0.5
        keys = parts.matrix(self.k_proj, x).unflatten(0, (self.num_heads, -1))
        s = parts.fp32(x @ torch.einsum("hk,hkd->dh", q, keys).to(x.dtype))
        v = parts.heads(self.v_proj(x), self.num_heads)
        o, state = softmax_scan(s, v, state=state, segments=segments)
        return self.o_proj(o.flatten(2)), state

    def init_state(self, rows: int) -> SoftmaxScanState:
        new = {"dtype": parts.state_dtype(self.query), "device": self.query.device}
        u = torch.zeros(rows, self.num_heads, **new)
        return SoftmaxScanState(torch.full_like(u, -torch.inf), u, torch.zeros(*u.shape, self.head_dim, **new))
