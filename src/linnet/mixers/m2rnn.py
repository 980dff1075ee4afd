"""The M2RNN layer (Mishra et al. 2026): many small heads with a matrix state and a nonlinear transition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import ConvState, M2RNNState, Segments, m2rnn
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer


class M2RNNMixerState(NamedTuple):
    """The memory and the tail of the convolution (None without one)."""

    memory: M2RNNState | None = None
    conv: ConvState | None = None


def _token_by_token(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "m2rnn", 8, num_heads=2, head_k=3, head_v=4, conv_size=0)
    x = inputs(generator, 8)
    q, k, v, a, gate = mixer.in_proj(x).split([3, 3, 8, 2, 8], -1)
    v = v.unflatten(-1, (2, 4))
    f = (1 + (a + mixer.dt_bias).exp()) ** -mixer.A_log.exp()  # the gate as the paper writes it
    S, outputs = torch.zeros(2, 2, 3, 4, dtype=torch.float64), []
    for t in range(x.shape[1]):
        keep = f[:, t, :, None, None]
        write = torch.tanh(S @ mixer.W + k[:, t, None, :, None] * v[:, t, :, None])
        S = keep * S + (1 - keep) * write
        outputs.append(torch.einsum("nhkv,nk->nhv", S, q[:, t]) + mixer.D * v[:, t])
    y = torch.stack(outputs, 1).flatten(2) * F.silu(gate)
    return mixer(x)[0], mixer.o_proj(mixer.norm(y))


@register_mixer(
    "m2rnn",
    Card(
        paper="Mishra et al. 2026, M2RNN: Non-Linear RNNs with Matrix-Valued States for Scalable Language Modeling"
        " (arXiv 2603.14360)",
        recurrence="S_t = f_t S_{t-1} + (1 - f_t) tanh(S_{t-1} W + k_t v_t^T), y_t = S_t^T q_t + D v_t;"
        " f_t = exp(-A softplus(a_t + b))",
        state="H·K·V (+ (W-1)·(2·Hq·K + H·V) with a convolution of W taps)",
        engine="m2rnn",
        expressivity="all regular languages at finite precision: nonlinear recurrence, sequential in time",
        linear_state=False,
        examples=(
            {"d_model": 16, "num_heads": 4, "num_qk_heads": 2, "head_k": 5, "head_v": 3},
            {"d_model": 8, "num_heads": 2, "head_k": 3, "head_v": 4, "conv_size": 0, "w_init": "random", "f_init": 0.2},
        ),
        identities=(Identity("without convolution, is the recurrence written out token by token", _token_by_token),),
        notes=(
            "The clip acts on what a state receives from later tokens, as in the published kernel; the published loop"
            " also clips what the reading contributes.",
            "Without a convolution there is no SiLU on queries, keys and values either. With w_init='random' and"
            " f_init=0.2 that is the variant that learns to track states quickly.",
        ),
    ),
)
class M2RNN(Mixer):
    """Shared queries and keys, short convolution with SiLU, the cell, a skip from the values, gated RMSNorm.

    Args:
        d_model: width.
        num_heads: heads H.
        num_qk_heads: heads Hq of queries and keys, each shared by H / Hq consecutive heads.
        head_k: rows K of a state, channels of a query and a key.
        head_v: columns V of a state, channels of a value.
        conv_size: taps W of the short convolution, 0 for none.
        w_init: recurrent weights at first, "identity" or "random", normal of variance 1 / V.
        f_init: forget gate at first, of an input of 0, in (0, 1); None draws it as Mamba-2 does, mostly close to 1.
        clip: bound, entry by entry, of the gradient a state receives from later tokens; None for none.
        norm_eps: of the RMSNorm over all heads.

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    no_weight_decay = ("D",)

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 84,
        num_qk_heads: int = 1,
        head_k: int = 64,
        head_v: int = 16,
        conv_size: int = 4,
        w_init: str = "identity",
        f_init: float | None = None,
        clip: float | None = 1.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        parts.check_count(num_heads=num_heads, head_k=head_k, head_v=head_v)
        parts.check_divisor("num_qk_heads", num_qk_heads, num_heads, "num_heads")
        parts.check_conv_size(conv_size)
        parts.check_choice("w_init", w_init, ("identity", "random"))
        if clip is not None:
            parts.check_positive(clip=clip)
        if f_init is not None and not 0 < f_init < 1:
            raise ValueError(f"f_init: expected a number between 0 and 1 or None, got {f_init}")
        self.d_model, self.w_init, self.f_init, self.clip = d_model, w_init, f_init, clip
        self.num_heads, self.num_qk_heads, self.head_k, self.head_v = num_heads, num_qk_heads, head_k, head_v
        keys, values = num_qk_heads * head_k, num_heads * head_v
        self.split = 2 * keys + values, num_heads, values  # q k v, a, gate
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=False)
        self.conv = parts.ShortConv(self.split[0], conv_size) if conv_size else None
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(num_heads)) for _ in range(2))
        self.W = nn.Parameter(torch.empty(num_heads, head_v, head_v))
        self.D = nn.Parameter(torch.empty(num_heads, head_v))
        self.norm = parts.Norm(values, norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in (0, 16]; step sizes log-uniform in [1e-3, 0.1], stored as their inverse softplus; D = 1."""
        if self.f_init is None:
            parts.reset_softplus_decay(self.A_log, self.dt_bias, lowest=0.0)
        else:  # softplus(dt_bias) = -log f_init
            nn.init.zeros_(self.A_log)
            nn.init.constant_(self.dt_bias, math.log(1 / self.f_init - 1))
        nn.init.ones_(self.D)
        if self.w_init == "random":
            nn.init.normal_(self.W, std=self.head_v**-0.5)
        else:
            parts.assign(self.W, torch.eye(self.head_v, device=self.W.device).expand_as(self.W))

    def forward(
        self, x: Tensor, state: M2RNNMixerState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, M2RNNMixerState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, M2RNNMixerState)
        # Three products: one of their joint width, seldom a multiple of 8, is slow, and so is what reads its parts.
        qkv, a, gate = (F.linear(x, W) for W in parts.matrix(self.in_proj, x).split(self.split))
        keys = self.num_qk_heads * self.head_k
        sizes = keys, keys, self.split[2]
        if self.conv is None:
            q, k, v = qkv.split(sizes, -1)
        else:
            (q, k, v), tail = self.conv(qkv, split=sizes, state=tail, segments=segments)
        q, k, v = parts.heads(q, self.num_qk_heads), parts.heads(k, self.num_qk_heads), parts.heads(v, self.num_heads)
        g = parts.softplus_decay(a, self.A_log, self.dt_bias)
        y, memory = m2rnn(q, k, v, g, self.W.to(v.dtype), clip=self.clip, state=memory, segments=segments)
        y = self.norm(y, gate, norm_first=False, v=v.flatten(2), skip=self.D.flatten())
        return self.o_proj(y), M2RNNMixerState(memory, tail)

    def init_state(self, rows: int) -> M2RNNMixerState:
        shape = rows, self.num_heads, self.head_k, self.head_v
        S = torch.zeros(*shape, dtype=parts.state_dtype(self.W), device=self.W.device)
        return M2RNNMixerState(M2RNNState(S), None if self.conv is None else self.conv.init_state(rows))
