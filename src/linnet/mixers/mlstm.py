"""The mLSTM of xLSTM-7B (Beck et al. 2024, 2025): matrix memory with an exponential or a sigmoid input gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.ops import DecayState, MLSTMState, Segments, decay, mlstm
from linnet.ops.core import Identity

from . import parts
from .base import Card, Mixer, register_mixer
from .claims import inputs, random_mixer, reading, share


def _is_unstabilised_cell(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mixer = random_mixer(generator, "mlstm", 8, num_heads=2)
    mixer.eps = 0.0
    parts.assign(mixer.i_gate.bias, torch.tensor([-2.0, 2.0]))  # both branches of the denominator
    x = inputs(generator, 8)
    q, k, v = (parts.heads(p(x), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    i, f = (15 * torch.tanh(gate(x) / 15) for gate in (mixer.i_gate, mixer.f_gate))
    C, n, outputs = x.new_zeros(2, 2, 2, 4), x.new_zeros(2, 2, 2), []
    for t in range(x.shape[1]):
        keep, write = torch.sigmoid(f[:, t])[..., None], torch.exp(i[:, t])[..., None] * k[:, t]
        C, n = keep[..., None] * C + write[..., :, None] * v[:, t, :, None], keep * n + write
        s = q[:, t] * 2**-0.5
        outputs.append((s[..., None] * C).sum(-2) / (s * n).sum(-1).abs().clamp(min=1)[..., None])
    return reading(mixer, x), torch.stack(outputs, 1)


def _sigmoid_is_simple_gla(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cell = random_mixer(generator, "mlstm", 16, num_heads=2, gate="sigmoid", gate_soft_cap=None)
    simple = random_mixer(generator, "simple_gla", 16, num_heads=2, gate_logit_normalizer=1.0)
    share(cell, simple, "q_proj", "k_proj", "v_proj")
    simple.gate.load_state_dict(cell.f_gate.state_dict())
    nn.init.constant_(cell.i_gate.bias, 1e3)  # input gate open
    x = inputs(generator, 16)
    return reading(cell, x), reading(simple, x)


def _gates_agree_when_small(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    sigmoid = random_mixer(generator, "mlstm", 16, num_heads=2, gate="sigmoid", gate_soft_cap=None)
    exp = random_mixer(generator, "mlstm", 16, num_heads=2, gate_soft_cap=None)
    exp.load_state_dict(sigmoid.state_dict())
    exp.eps = 0.0
    for cell in (sigmoid, exp):
        nn.init.constant_(cell.i_gate.bias, -40.0)
    x = inputs(generator, 16)
    return reading(exp, x), reading(sigmoid, x)


@register_mixer(
    "mlstm",
    Card(
        paper="Beck et al. 2024, xLSTM: Extended Long Short-Term Memory (arXiv 2405.04517); layer of xLSTM-7B (arXiv"
        " 2503.13427); sigmoid gate: Beck et al. 2025, Tiled Flash Linear Attention (arXiv 2503.14376)",
        recurrence="C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T, n_t likewise with k_t;"
        " h_t = C_t^T q_t / max(|n_t.q_t|, 1); sigmoid gate: sigmoid(i_t) for exp(i_t), no division",
        state="H·(K·V + K + 1); sigmoid gate H·K·V",
        engine="decay",
        expressivity="TC0: diagonal transition, one data-dependent factor per head",
        examples=(
            {"d_model": 32, "num_heads": 2},
            {"d_model": 16, "num_heads": 2, "gate": "sigmoid", "gate_soft_cap": None, "expand_k": 1.0},
        ),
        identities=(
            Identity("exp: is the unstabilised cell", _is_unstabilised_cell),
            Identity("sigmoid: reads what simple_gla reads when the input gate stays open", _sigmoid_is_simple_gla),
            Identity("exp and sigmoid read the same when the input gate is small", _gates_agree_when_small),
        ),
        notes=(
            "The block of xLSTM-7B: no convolution, no up-projection and no block-diagonal maps as in the first paper.",
            "Gradients go through the denominator in full; the published kernels treat it as a constant.",
        ),
    ),
)
class MLSTM(Mixer):
    """The mLSTM layer with per-head LayerNorm and sigmoid output gate.

    Args:
        d_model: width.
        num_heads: heads H.
        expand_k: K = expand_k * d_model / H channels of a query and key head.
        expand_v: V = expand_v * d_model / H channels of a value head.
        gate: input gate, "exp" or "sigmoid".
        gate_soft_cap: bound c of both gates' pre-activations, c tanh(. / c); None for none.
        norm_eps: of the LayerNorm (a weight per channel, no bias).

    Raises:
        ValueError: naming the option, for sizes that do not divide or values out of range.
    """

    eps = 1e-6  # added to the stabilised denominator, as published

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate: str = "exp",
        gate_soft_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        parts.check_choice("gate", gate, ("exp", "sigmoid"))
        if gate_soft_cap is not None:
            parts.check_positive(gate_soft_cap=gate_soft_cap)
        self.d_model, self.num_heads, self.gate, self.gate_soft_cap = d_model, num_heads, gate, gate_soft_cap
        self.head_k = parts.head_size("expand_k", d_model, expand_k, num_heads)
        self.head_v = parts.head_size("expand_v", d_model, expand_v, num_heads)
        keys, values = num_heads * self.head_k, num_heads * self.head_v
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = parts.projections(d_model, keys, keys, values, values)
        self.i_gate, self.f_gate = parts.GateLinear(d_model, num_heads), parts.GateLinear(d_model, num_heads)
        self.norm = parts.Norm(self.head_v, norm_eps, num_heads=num_heads, center=True)
        self.o_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Input gates start shut (bias -10), forget gates open (biases spread over 3 .. 6)."""
        nn.init.constant_(self.i_gate.bias, -10.0)
        parts.assign(self.f_gate.bias, torch.linspace(3, 6, self.num_heads, device=self.f_gate.bias.device))

    def forward(
        self, x: Tensor, state: Any = None, segments: Segments | None = None
    ) -> tuple[Tensor, MLSTMState | DecayState]:
        parts.check_input(x, self.d_model, segments)
        q, k, v = (parts.heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        i, f = (parts.soft_cap(gate(x), self.gate_soft_cap) for gate in (self.i_gate, self.f_gate))
        if self.gate == "exp":
            h, state = mlstm(q, k, v, i, f, eps=self.eps, state=state, segments=segments)
        else:
            h, state = decay(q, k, v, F.logsigmoid(f), w=torch.sigmoid(i), state=state, segments=segments)
        return self.o_proj(self.norm(h, self.g_proj(x), activation="sigmoid")), state

    def init_state(self, rows: int) -> MLSTMState | DecayState:
        memory = parts.decay_state(self.o_proj.weight, rows, self.num_heads, self.head_k, self.head_v)
        if self.gate == "sigmoid":
            return memory
        S = memory.S
        return MLSTMState(S, S.new_zeros(S.shape[:3]), S.new_zeros(S.shape[:2]))
