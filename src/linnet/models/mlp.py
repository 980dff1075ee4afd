"""Position-wise layers of a decoder: SwiGLU, GeGLU and a mixture of SwiGLU experts.

Both return ``(y, aux)``: the output and a scalar to add to the training loss (``None`` when there is none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from linnet.mixers.parts import matrix
from linnet.ops.core import no_autocast

__all__ = ["GeGLU", "MixtureOfExperts", "SwiGLU", "grouped_matmul"]


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or unchanged in float64."""
    return x if x.dtype == torch.float64 else x.float()


@torch.library.custom_op("linnet::grouped_matmul", mutates_args=())
def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of ``x`` times the matrix of their group: ``y[a:b] = x[a:b] @ weight[e]`` for group ``e`` = ``[a, b)``.

    Args:
        x: ``[N, K]``, rows sorted by group.
        weight: ``[E, K, M]``.
        offsets: int32 ``[E]`` on the device of ``x``, the end of each group; the last one is ``N``.

    Returns:
        ``[N, M]``. bf16 runs as one grouped kernel; the other dtypes loop over the groups, reading the offsets on the
        host.
    """
    if _has_kernel(x, weight):
        return F.grouped_mm(x, weight, offs=offsets)
    y = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for factor, end in zip(weight, offsets.tolist(), strict=True):
        torch.mm(x[start:end], factor, out=y[start:end])
        start = end
    return y


@torch.library.custom_op("linnet::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """``out[e] = x[a:b].T @ y[a:b]``: ``[N, K]``, ``[N, M]`` -> ``[E, K, M]``, the weight gradient of the above."""
    if _has_kernel(x, y):
        return F.grouped_mm(x.t(), y, offs=offsets)
    out = x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])
    start = 0
    for product, end in zip(out, offsets.tolist(), strict=True):
        torch.mm(x[start:end].t(), y[start:end], out=product)
        start = end
    return out


def _has_kernel(x: Tensor, y: Tensor) -> bool:
    # Every row of an operand has to start on a 16-byte boundary, whichever of its last two axes is the dense one.
    aligned = all(min(t.stride()[-2:]) == 1 and max(t.stride()[-2:]) % 8 == 0 for t in (x, y))
    return x.dtype == y.dtype == torch.bfloat16 and aligned and x.shape[0] > 0 and hasattr(F, "grouped_mm")


@grouped_matmul.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = _matmul(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    grad_weight = _outer(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


def _outer_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = _matmul(y, grad.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    grad_y = _matmul(x, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_x, grad_y, None


grouped_matmul.register_autograd(_matmul_backward, setup_context=_save)
grouped_outer.register_autograd(_outer_backward, setup_context=_save)


def _with_tangents(op: Any, backward: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``op``, linear in its first and in its second argument, also under ``torch.func`` and in forward mode, where an
    op of ``torch.library`` has no gradient and leaves tangents out silently."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(op)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(ctx, grad)

        @staticmethod
        def jvp(ctx: Any, dx: Tensor, dy: Tensor, _: None) -> Tensor:
            x, y, offsets = ctx.saved_tensors
            return call(dx, y, offsets) + call(x, dy, offsets)

    def call(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        return Transformed.apply(x, y, offsets) if transformed else op(x, y, offsets)  # type: ignore[return-value]

    return call


_matmul = _with_tangents(grouped_matmul, _matmul_backward)
_outer = _with_tangents(grouped_outer, _outer_backward)


class SwiGLU(nn.Module):
    """Gated position-wise layer: ``down(silu(gate(x)) * up(x))``, ``[..., D] -> [..., D]``.

    Source: "GLU Variants Improve Transformer", 2020, arXiv 2002.05202, equation 6.

    Args:
        d_model: width D.
        hidden: inner width; 8/3 of D has the size of a plain layer of width 4 D.
        init_std, out_std: standard deviation of the initial input and output weights (out_std: like init_std).
        bias: biases on the three maps, which start at zero.
    """

    def __init__(
        self, d_model: int, hidden: int, *, init_std: float = 0.02, out_std: float | None = None, bias: bool = False
    ):
        super().__init__()
        self.init_std, self.out_std = init_std, init_std if out_std is None else out_std
        self.gate_proj = nn.Linear(d_model, hidden, bias=bias)
        self.up_proj = nn.Linear(d_model, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear, std in (
            (self.gate_proj, self.init_std),
            (self.up_proj, self.init_std),
            (self.down_proj, self.out_std),
        ):
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x)), None


class GeGLU(SwiGLU):
    """The same with a GELU (its tanh form) in place of the SiLU, as in Gemma and Griffin; equation 6 of that paper."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")


class MixtureOfExperts(nn.Module):
    """A mixture of SwiGLU experts, of which each token runs its ``experts_per_token`` most probable ones.

    With router scores p = softmax(W x) or sigmoid(W x) (fp32) and C the set of the largest, the output is the sum over
    e in C of ``router_scale * p_e / sum_{C} p * expert_e(x)``, plus an always-on shared expert if there is one.
    Dropless: there is no capacity limit, every token is served by all of its experts whatever the other tokens are.

    The auxiliary loss is ``balance_loss * E * sum_e f_e P_e`` with f the share of assignments expert e received and P
    its mean probability ("Switch Transformers", 2021, arXiv 2101.03961, equations 4-6, with f counted over all k
    assignments): 1 * balance_loss for a uniform router. ``router_z_loss`` adds the mean squared log-sum-exp of the
    router logits ("ST-MoE", 2022, arXiv 2202.08906, equation 5). Without an auxiliary loss, ``router_bias_rate``
    balances by a bias on the scores that only the choice of C sees; :meth:`balance` moves it ("DeepSeek-V3", 2024,
    arXiv 2412.19437, section 2.1.2).

    Args:
        d_model: width D.
        hidden: inner width of one expert.
        num_experts: number of experts E.
        experts_per_token: experts each token runs, 1 <= k <= E.
        shared_experts: width of the always-on expert in units of ``hidden``; 0 has none.
        shared_gate: scale its output by sigmoid(w . x).
        balance_loss, router_z_loss: coefficients of the auxiliary loss; 0 switches a term off.
        router: "softmax" or "sigmoid".
        router_scale: factor of the experts' output.
        router_bias_rate: step of the bias at every :meth:`balance`; 0 has no bias.
        init_std, out_std: as in :class:`SwiGLU`.
    """

    router_bias: Tensor | None
    expert_load: Tensor | None = None  # share of assignments per expert [E] in the last forward in training mode

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        num_experts: int,
        experts_per_token: int,
        shared_experts: int = 0,
        shared_gate: bool = False,
        balance_loss: float = 0.01,
        router_z_loss: float = 0.0,
        router: str = "softmax",
        router_scale: float = 1.0,
        router_bias_rate: float = 0.0,
        init_std: float = 0.02,
        out_std: float | None = None,
    ):
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token: expected 1 to num_experts={num_experts} experts, got {experts_per_token}"
            )
        if router not in ("softmax", "sigmoid"):
            raise ValueError(f"router: expected 'softmax' or 'sigmoid', got {router!r}")
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.sigmoid, self.router_scale, self.router_bias_rate = router == "sigmoid", router_scale, router_bias_rate
        self.balance_loss, self.router_z_loss = balance_loss, router_z_loss
        self.init_std, self.out_std = init_std, init_std if out_std is None else out_std
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(num_experts, d_model, hidden))
        self.up_proj = nn.Parameter(torch.empty(num_experts, d_model, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, d_model))
        self.register_buffer("router_bias", torch.zeros(num_experts) if router_bias_rate else None)
        shared = shared_experts * hidden
        self.shared = SwiGLU(d_model, shared, init_std=init_std, out_std=out_std) if shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared and shared_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.router.weight, self.gate_proj, self.up_proj):
            nn.init.normal_(weight, std=self.init_std)
        nn.init.normal_(self.down_proj, std=self.out_std)
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)
        if self.shared is not None:
            self.shared.reset_parameters()
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=self.init_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = x.reshape(-1, x.shape[-1])
        count, k = tokens.shape[0], self.experts_per_token
        with no_autocast(x):
            logits = F.linear(at_least_fp32(tokens), at_least_fp32(matrix(self.router, tokens)))
            scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
            experts = (scores if self.router_bias is None else scores + self.router_bias).topk(k, dim=-1).indices
            weights = scores.gather(-1, experts)
            weights = self.router_scale * weights / weights.sum(-1, keepdim=True)

        experts = experts.flatten()
        order = experts.argsort(stable=True)
        position = torch.empty_like(order).scatter_(0, order, torch.arange(count * k, device=x.device))
        served = (experts.unsqueeze(1) == torch.arange(self.num_experts, device=x.device)).sum(0)
        offsets = served.cumsum(0).int()

        # Copying each token k times before sorting keeps the backward pass a permutation: no atomic additions.
        rows = tokens.unsqueeze(1).expand(-1, k, -1).reshape(count * k, -1).index_select(0, order)
        y = self._experts(rows, offsets).index_select(0, position).view(count, k, -1)
        y = (y * weights.unsqueeze(-1).to(y.dtype)).sum(1).view(x.shape)
        if self.shared is not None:
            scale = 1.0 if self.shared_gate is None else torch.sigmoid(self.shared_gate(x))
            y = y + scale * self.shared(x)[0]

        share = served / served.sum()
        if self.training:
            self.expert_load = share.detach()
        probabilities = scores / scores.sum(-1, keepdim=True) if self.sigmoid else scores
        aux = self.balance_loss * self.num_experts * (share * probabilities.mean(0)).sum()
        if self.router_z_loss:
            aux = aux + self.router_z_loss * logits.logsumexp(-1).square().mean()
        return y, aux

    def _experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        device = rows.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else rows.dtype
        rows, gate, up, down = (t.to(dtype) for t in (rows, self.gate_proj, self.up_proj, self.down_proj))
        hidden = F.silu(_matmul(rows, gate, offsets)) * _matmul(rows, up, offsets)
        return _matmul(hidden, down, offsets)

    @torch.no_grad()
    def balance(self) -> None:
        """After an optimiser step: raise the bias of experts that the last forward in training mode (of all processes)
        gave less than the mean load, lower that of the others."""
        if self.router_bias is None or self.expert_load is None:
            return
        load = self.expert_load.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        self.router_bias += self.router_bias_rate * torch.sign(load.mean() - load).to(self.router_bias)

    def router_statistics(self) -> dict[str, float]:
        """Balance of the last forward in training mode: ``max_load`` and ``min_load`` (share of assignments times the
        number of experts; 1 is balanced) and ``load_entropy`` (in [0, 1]; 1 is balanced). Empty before the first one.
        """
        if self.expert_load is None:
            return {}
        load = self.expert_load.double()
        entropy = -torch.xlogy(load, load).sum() / torch.tensor(self.num_experts, dtype=torch.float64).log()
        return {
            "max_load": float(load.max()) * self.num_experts,
            "min_load": float(load.min()) * self.num_experts,
            "load_entropy": 1.0 if self.num_experts == 1 else float(entropy),
        }
