"""Softmax attention (Vaswani et al. 2017), full or over a sliding window, with grouped heads and rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linnet.ops import AttentionState, Segments, attention, rotary
from linnet.ops.attention.rotary import SCALING, check_scaling
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, share

SWITCHES = {"qk_norm": "joint", "qkv_bias": True, "o_bias": True, "output_gate": True}
FURTHER = {"rope_fraction": 0.5, "rope_scaling": dict(zip(SCALING, (8.0, 1.0, 4.0, 8), strict=True))}


def _wide_window_is_full(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    full = random_mixer(generator, "attention", 16, num_heads=2)
    windowed = random_mixer(generator, "attention", 16, num_heads=2, window=11)
    share(full, windowed, "q_proj", "k_proj", "v_proj", "o_proj")
    return windowed(x := inputs(generator, 16, length=11))[0], full(x)[0]


def _window_of_one_is_linear(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "attention", 16, num_heads=2, window=1)
    x = inputs(generator, 16)
    return mixer(x)[0], mixer.o_proj(mixer.v_proj(x))


def _grouped_is_repeated(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    grouped = random_mixer(generator, "attention", 16, num_heads=4, num_kv_heads=2)
    full = random_mixer(generator, "attention", 16, num_heads=4)
    share(grouped, full, "q_proj", "o_proj")
    for name in ("k_proj", "v_proj"):
        weight = grouped.get_submodule(name).weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)  # type: ignore[operator, union-attr]
        parts.assign(full.get_submodule(name).weight, weight)  # type: ignore[arg-type]
    x = inputs(generator, 16)
    return grouped(x)[0], full(x)[0]


@register_mixer(
    "attention",
    Card(
        paper="Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762); sliding window: Beltagy et al. 2020"
        " (2004.05150); rotary positions: Su et al. 2021 (2104.09864); grouped heads: Ainslie et al. 2023 (2305.13245)",
        recurrence="(k_t, v_t) is appended to a cache; o_t = sum_s softmax_s(K^-1/2 q_t.k_s) v_s over s <= t, of the"
        " last W tokens when windowed",
        state="2·Hkv·K·T, 2·Hkv·K·min(T, W-1) when windowed",
        engine="attention",
        expressivity="TC0: exact recall of what is in view, no memory beyond it",
        linear_state=False,
        constant_state=False,
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "window": 5, "qk_norm": True, **FURTHER},
            {"d_model": 16, "num_kv_heads": 1, "head_dim": 6, "num_heads": 2, "rope": False, **SWITCHES},
        ),
        identities=(
            Identity("a window of at least the sequence is full attention", _wide_window_is_full),
            Identity("a window of one is the linear map of values and output", _window_of_one_is_linear),
            Identity("grouped heads are full heads with repeated keys and values", _grouped_is_repeated),
        ),
        notes=(
            "Positions are rotary or none, not added sinusoids; the projections have no bias by default.",
            "The cache holds rotated keys, in the dtype of the activations.",
        ),
    ),
)
class Attention(Mixer):
    """Causal softmax attention with a key-value cache as its state.

    Args:
        d_model: width.
        num_heads: query heads H; d_model / 64 (at least 1) when None.
        num_kv_heads: heads of keys and values, each shared by H / num_kv_heads query heads; H when None.
        head_dim: channels K of a head; d_model / H when None.
        window: tokens a query sees, itself included; all when None.
        rope: rotate queries and keys by their position; without, attention knows order only through the causal mask.
        rope_base: base of the rotation's frequencies.
        rope_scaling: slow them down to reach further than the training did; see :func:`linnet.ops.rotary`.
        rope_fraction: rotate this share of a head's channels, the first ones.
        qk_norm: RMSNorm with a learned weight on queries and keys before the rotation: True for a norm of every head,
            "joint" for one over the channels of all heads together.
        qkv_bias, o_bias: biases on the query, key and value projections, and on the output projection.
        output_gate: multiply the reading by sigmoid(W x), channel by channel.
        norm_eps: of that RMSNorm.

    Raises:
        ValueError: naming the option, for sizes that do not divide or are out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        rope_scaling: dict[str, float] | None = None,
        rope_fraction: float = 1.0,
        qk_norm: bool | str = False,
        qkv_bias: bool = False,
        o_bias: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.d_model, self.window, self.rope_base, self.rope_scaling = d_model, window, rope_base, rope_scaling
        self.num_heads = max(d_model // 64, 1) if num_heads is None else num_heads
        if head_dim is None:
            head_dim = parts.check_divisor("num_heads", self.num_heads, d_model, "d_model")
        parts.check_count(num_heads=self.num_heads, head_dim=head_dim, window=1 if window is None else window)
        self.head_dim, self.num_kv_heads = head_dim, self.num_heads if num_kv_heads is None else num_kv_heads
        parts.check_divisor("num_kv_heads", self.num_kv_heads, self.num_heads, "num_heads")
        parts.check_positive(rope_base=rope_base, norm_eps=norm_eps)
        check_scaling("rope_scaling", rope_scaling)
        parts.check_choice("qk_norm", str(qk_norm), ("True", "False", "joint"))
        self.rotated = int(rope_fraction * head_dim) if rope else 0
        if not 0 < rope_fraction <= 1 or self.rotated % 2 or self.rotated != rope * rope_fraction * head_dim:
            raise ValueError(
                f"rope, rope_fraction: expected an even number of channels, got {rope_fraction} of head_dim={head_dim}"
            )
        queries, keys = self.num_heads * head_dim, self.num_kv_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, n, bias=qkv_bias) for n in (queries, keys, keys))
        spans = (queries, keys) if qk_norm == "joint" else (head_dim, head_dim)
        self.q_norm, self.k_norm = (parts.Norm(span, norm_eps) if qk_norm else None for span in spans)
        self.g_proj = nn.Linear(d_model, queries, bias=False) if output_gate else None
        self.o_proj = nn.Linear(queries, d_model, bias=o_bias)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, AttentionState]:
        parts.check_input(x, self.d_model, segments)
        cache = None if state is None else parts.unpack(state, AttentionState)
        q, k, v = self.q_proj(x), self.k_proj(x), parts.heads(self.v_proj(x), self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:  # over a head, or over all of them
            q, k = (n(y.unflatten(-1, (-1, n.size))).flatten(2) for n, y in ((self.q_norm, q), (self.k_norm, k)))
        q, k = parts.heads(q, self.num_heads), parts.heads(k, self.num_kv_heads)
        if self.rotated:
            positions, _ = parts.count_positions(x, None if cache is None else cache.length, segments)
            q, k = (self.rotate(y, positions) for y in (q, k))
        o, cache = self.attend(q, k, v, state=cache, segments=segments)
        return self.o_proj(o.flatten(2) * (1.0 if self.g_proj is None else torch.sigmoid(self.g_proj(x)))), cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, state: AttentionState | None, segments: Segments | None):
        return attention(q, k, v, window=self.window, state=state, segments=segments)  # a server has another cache

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        turned = rotary(x[..., : self.rotated], positions, base=self.rope_base, scaling=self.rope_scaling)
        return turned if self.rotated == self.head_dim else torch.cat([turned, x[..., self.rotated :]], -1)

    def init_state(self, rows: int) -> AttentionState:
        empty = self.o_proj.weight.new_zeros(rows, 0, self.num_kv_heads, self.head_dim)
        return AttentionState(empty, empty, empty.new_zeros(rows, dtype=torch.int64))
