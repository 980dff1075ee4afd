"""Multi-head latent attention (DeepSeek-AI 2024): keys and values of all heads from one small cached vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linnet.ops import AttentionState, Segments, attention, rotary
from linnet.ops.attention.state import append
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer

SIZES: dict[str, Any] = {"kv_rank": 8, "nope_dim": 4, "rope_dim": 2, "v_dim": 6}


def _is_attention_over_expanded_heads(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m = random_mixer(generator, "mla", 16, num_heads=2, rope=True, **SIZES)
    x, positions = inputs(generator, 16), torch.arange(11)
    q = parts.heads(m.q_proj(x), 2)
    c, shared = m.kv_down(x).split([8, 2], -1)
    k, v = parts.heads(m.kv_up(m.kv_norm(c)), 2).split([4, 6], -1)
    shared = rotary(shared[:, :, None], positions).expand(-1, -1, 2, -1)
    q = torch.cat([q[..., :4], rotary(q[..., 4:], positions)], -1).transpose(1, 2)
    scores = q @ torch.cat([k, shared], -1).permute(0, 2, 3, 1) * 6**-0.5
    weights = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).softmax(-1)
    return m(x)[0], m.o_proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


def _cached_form_is_the_expanded_one(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m = random_mixer(generator, "mla", 16, num_heads=2, **SIZES)
    x = inputs(generator, 16)
    _, state = m(x[:, :4])
    return m(x[:, 4:], state)[0], m(x)[0][:, 4:]


@register_mixer(
    "mla",
    Card(
        paper="DeepSeek-AI 2024, DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model"
        " (arXiv 2405.04434); without positions in Kimi Linear (2510.26692)",
        recurrence="(c_t, r_t) is appended to a cache; k_s = [U c_s; r_s], v_s = W c_s a head;"
        " o_t = sum_s softmax_s(K^-1/2 q_t.k_s) v_s over s <= t",
        state="(kv_rank + rope_dim)·T",
        engine="attention",
        expressivity="TC0: exact recall of what is in view, no memory beyond it",
        linear_state=False,
        constant_state=False,
        examples=(
            {"d_model": 16, "num_heads": 2, **SIZES},
            {"d_model": 16, "num_heads": 2, "q_rank": 6, "rope": True, **SIZES},
        ),
        identities=(
            Identity("is attention with every head's keys and values written out", _is_attention_over_expanded_heads),
            Identity(
                "reading the cache itself, as one head, is reading the expanded heads", _cached_form_is_the_expanded_one
            ),
        ),
        notes=("The cache holds the normalised latent and the shared channels, rotated where there is a rotation.",),
    ),
)
class MLA(Mixer):
    """Causal softmax attention whose state is one latent vector a token.

    Without a cache the keys and values of all heads are written out; from a cache, the maps that would expand it are
    applied to the queries and the reading instead, so that decoding reads kv_rank + rope_dim numbers a token.

    Args:
        d_model: width.
        num_heads: heads H.
        kv_rank: channels of the latent that keys and values are made of.
        q_rank: channels of a latent that queries are made of; from the input directly when None.
        nope_dim: channels of a query and key head that are never rotated.
        rope_dim: further channels, of a key shared by all heads.
        v_dim: channels of a value head.
        rope: rotate those by position; without, attention knows order only through the causal mask.
        rope_base: base of the rotation's frequencies.
        norm_eps: of the RMSNorm of the latents.

    Raises:
        ValueError: naming the option, for sizes that are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 16,
        kv_rank: int = 512,
        q_rank: int | None = None,
        nope_dim: int = 128,
        rope_dim: int = 64,
        v_dim: int = 128,
        rope: bool = False,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        parts.check_count(num_heads=num_heads, kv_rank=kv_rank, nope_dim=nope_dim, rope_dim=rope_dim, v_dim=v_dim)
        parts.check_positive(rope_base=rope_base)
        self.d_model, self.num_heads, self.kv_rank, self.rope, self.rope_base = (
            d_model,
            num_heads,
            kv_rank,
            rope,
            rope_base,
        )
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        if rope and rope_dim % 2:
            raise ValueError(f"rope_dim: expected an even number of channels to rotate, got {rope_dim}")
        queries = num_heads * (nope_dim + rope_dim)
        self.q_proj: nn.Module = nn.Linear(d_model, queries, bias=False)
        if q_rank is not None:
            parts.check_count(q_rank=q_rank)
            down, up = parts.low_rank(d_model, q_rank, queries)
            self.q_proj = nn.Sequential(down, parts.Norm(q_rank, norm_eps), up)
        self.kv_down = nn.Linear(d_model, kv_rank + rope_dim, bias=False)
        self.kv_norm = parts.Norm(kv_rank, norm_eps)
        self.kv_up = nn.Linear(kv_rank, num_heads * (nope_dim + v_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_dim, d_model, bias=False)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, AttentionState]:
        rows = parts.check_input(x, self.d_model, segments)
        cache = None if state is None else parts.unpack(state, AttentionState)
        if cache is not None and cache.length.shape[0] != rows:
            raise ValueError(f"state: expected {rows} rows, got {cache.length.shape[0]}")
        q = parts.heads(self.q_proj(x), self.num_heads)
        latent, shared = self.kv_down(x).split([self.kv_rank, self.rope_dim], -1)
        latent, shared = self.kv_norm(latent), shared[:, :, None]
        if self.rope:
            positions, _ = parts.count_positions(x, None if cache is None else cache.length, segments)
            turned, shared = (rotary(y, positions, base=self.rope_base) for y in (q[..., self.nope_dim :], shared))
            q = torch.cat([q[..., : self.nope_dim], turned], -1)
        key = torch.cat([latent[:, :, None], shared], -1)
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        if cache is None or cache.k.shape[1] == 0:
            k, v = parts.heads(self.kv_up(latent), self.num_heads).split([self.nope_dim, self.v_dim], -1)
            k = torch.cat([k, shared.expand(-1, -1, self.num_heads, -1)], -1)
            o, _ = attention(q, k, v, scale=scale, segments=segments)
            cache = append(cache, key, key[..., :0], None, segments)
        else:
            up = parts.matrix(self.kv_up, latent).view(self.num_heads, self.nope_dim + self.v_dim, self.kv_rank)
            inner = torch.einsum("bthd,hdr->bthr", q[..., : self.nope_dim], up[:, : self.nope_dim])
            q = torch.cat([inner, q[..., self.nope_dim :]], -1)
            cache = AttentionState(cache.k, cache.k[..., : self.kv_rank], cache.length)
            o, cache = attention(q, key, latent[:, :, None], scale=scale, state=cache, segments=segments)
            o = torch.einsum("bthr,hdr->bthd", o, up[:, self.nope_dim :])
            cache = AttentionState(cache.k, cache.v[..., :0], cache.length)
        return self.o_proj(o.flatten(2)), cache

    def init_state(self, rows: int) -> AttentionState:
        like = self.o_proj.weight
        empty = like.new_zeros(rows, 0, 1, self.kv_rank + self.rope_dim)
        return AttentionState(empty, empty[..., :0], torch.zeros(rows, dtype=torch.int64, device=like.device))
