"""What the mixers of the delta engine share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import Segments, delta

from . import parts
from .base import Mixer

__all__ = ["ChannelDecay", "DeltaRule", "Strengths"]


class Strengths(NamedTuple):
    """Arguments of :func:`linnet.ops.delta` in fp32: erase strength, log-decay, write strength."""

    beta: Tensor
    g: Tensor | None = None
    w: Tensor | None = None


class DeltaRule(Mixer):
    """Projections, short convolution with SiLU, the delta engine on unit queries and keys, per-head RMSNorm, output
    gate (``g_proj``, where there is one), output projection. Subclasses add :meth:`strengths`, and name the gate's
    activation.

    Args:
        d_model: width.
        num_heads: heads H of queries and keys.
        head_dim: K.
        expand_v: V = expand_v * K.
        num_v_heads: heads of values, of which num_v_heads / H share a query and key head; H when None.
        substeps: edits a token, each with a key and a value of its own.
        neg_eigval: strengths in (0, 2) in place of (0, 1), so that a transition can reflect.
        conv_size: taps of the short convolution over queries, keys and values; 0 for none (SiLU alone).
        norm_eps: of the RMSNorm.
    """

    gate_activation = "silu"

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        expand_v: float,
        *,
        num_v_heads: int | None = None,
        substeps: int = 1,
        neg_eigval: bool,
        conv_size: int,
        norm_eps: float,
    ):
        super().__init__()
        self.d_model, self.num_heads, self.substeps = d_model, num_heads, substeps
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        parts.check_count(num_heads=num_heads, head_dim=head_dim, num_v_heads=self.num_v_heads)
        self.head_k, self.head_v = head_dim, parts.head_size("expand_v", head_dim, expand_v, 1)
        self.reach = 2.0 if neg_eigval else 1.0
        parts.check_divisor("num_heads", num_heads, self.num_v_heads, "num_v_heads")
        parts.check_conv_size(conv_size)
        self.values = self.num_v_heads * self.head_v
        streams = num_heads * head_dim, substeps * num_heads * head_dim, substeps * self.values
        self.q_proj, self.k_proj, self.v_proj = parts.projections(d_model, *streams)
        self.conv = parts.ShortConv(sum(streams), conv_size) if conv_size else None
        self.g_proj: nn.Module | None = None
        self.norm = parts.Norm(self.head_v, norm_eps)
        self.o_proj = nn.Linear(self.values, d_model, bias=False)

    def strengths(self, x: Tensor) -> Strengths:
        """How the tokens edit the memory."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices with gain 2^-2.5, as in the released code of this family."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: parts.DeltaConvState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, parts.DeltaConvState]:
        parts.check_input(x, self.d_model, segments)
        memory, tail = parts.unpack(state, parts.DeltaConvState)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is None:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        else:
            (q, k, v), tail = self.conv(q, k, v, state=tail, segments=segments)
        q = parts.heads(q, self.num_heads)
        k, v = self.rows(k, self.num_heads), self.rows(v, self.num_v_heads)
        beta, g, w = self.strengths(x)
        o, memory = delta(q, k, v, beta, g, w, l2norm=True, substeps=self.substeps, state=memory, segments=segments)
        if self.g_proj is None:
            o = self.norm(o).flatten(2)
        else:
            o = self.norm(o, self.g_proj(x), activation=self.gate_activation)
        return self.o_proj(o), parts.DeltaConvState(memory, tail)

    def rows(self, x: Tensor, num_heads: int) -> Tensor:
        """``[B, T, n * H * D] -> [B, T * n, H, D]``: every substep of a token in a row of its own."""
        return x.unflatten(-1, (self.substeps, num_heads, -1)).flatten(1, 2)

    def init_state(self, rows: int) -> parts.DeltaConvState:
        memory = parts.delta_state(self.o_proj.weight, rows, self.num_v_heads, self.head_k, self.head_v)
        return parts.DeltaConvState(memory, None if self.conv is None else self.conv.init_state(rows))


class ChannelDecay(DeltaRule):
    """The delta rule on a memory whose every key channel forgets on its own. A subclass adds the gates of writing, then
    these by :meth:`add_gates`."""

    def add_gates(self, num_heads: int, gate_bound: float | None) -> None:
        """The maps to the forget gates of ``num_heads`` heads and to the output gate, both through K channels.

        Args:
            num_heads: heads with forget gates of their own.
            gate_bound: keep log-decays in (-gate_bound, 0), by a sigmoid in place of the softplus; None does not.

        Raises:
            ValueError: ``gate_bound`` is not above 0.
        """
        if gate_bound is not None:
            parts.check_positive(gate_bound=gate_bound)
        self.gate_bound = gate_bound
        self.f_proj = parts.low_rank(self.d_model, self.head_k, num_heads * self.head_k, gate=True)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * self.head_k))
        self.g_proj = parts.low_rank(self.d_model, self.head_k, self.values, bias=True)

    def reset_parameters(self) -> None:
        """exp(A) uniform in [1, 16], 1 with a bounded gate; the rest as in the family."""
        super().reset_parameters()
        parts.reset_softplus_decay(self.A_log, self.dt_bias)
        if self.gate_bound is not None:
            nn.init.zeros_(self.A_log)

    def log_decay(self, x: Tensor) -> Tensor:
        """What the channels keep at each token ``[B, T, num_heads, K]``, in fp32."""
        f = parts.heads(self.f_proj(x), self.A_log.shape[0])
        if self.gate_bound is None:
            return parts.softplus_decay(f, self.A_log, self.dt_bias)
        return parts.bounded_decay(f, self.A_log, self.dt_bias, self.gate_bound)
