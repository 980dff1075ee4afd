"""The language model: embedding, pre-norm residual layers of a mixer and an MLP, norm, output head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linnet.mixers import Mixer, build_mixer
from linnet.mixers.base import parse_spec
from linnet.mixers.parts import soft_cap
from linnet.ops import Segments
from linnet.ops.core import check_names, check_segments, concrete

from .io import atomic_folder, read_checkpoint, write_checkpoint
from .mlp import GeGLU, MixtureOfExperts, SwiGLU, at_least_fp32

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "DecoderOutput"]

# The loss works on at most this many logits at a time (fp32: 256 MiB); above, they are recomputed in the backward pass.
_LOSS_LOGITS = 1 << 26


NORM_POSITIONS = ("pre", "post", "none")


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a :class:`Decoder`. Fields that make no sense raise a ValueError that names them.

    Attributes:
        vocab_size: number of token ids.
        d_model: width of the residual stream.
        num_layers: number of layers.
        mixers: mixer specs, repeated over the layers in turn: ``["gla", "gla", "gla", "attention(window=256)"]`` is
            three to one. A spec is a name, a name with options, or a mapping with a ``name``.
        mlp: "swiglu", "geglu", "moe" (mixture of experts) or "none" (the layer is its mixer alone); or a list of these,
            repeated over the layers like the mixers.
        mlp_hidden: inner width of the MLP; by default ``mlp_ratio * d_model`` rounded up to a multiple of 64.
        mlp_ratio: inner width relative to ``d_model`` when ``mlp_hidden`` is not given.
        mlp_bias: biases in "swiglu" and "geglu".
        num_experts, experts_per_token: experts of "moe", and how many of them a token runs.
        expert_hidden: inner width of one expert (default: that of the MLP).
        shared_experts: always-on experts beside them.
        shared_gate: their output is scaled by sigmoid(w . x), a number a token.
        dense_layers: so many first layers have a SwiGLU in place of the experts.
        experts_every: of the others, every so many-th layer has experts, the rest a SwiGLU.
        balance_loss, router_z_loss: coefficients of the auxiliary losses of the router.
        z_loss: coefficient of the mean squared log-sum-exp of the logits, which keeps them from drifting (PaLM, 2022);
            in training, as those of the router.
        router: scores of the experts, "softmax" or "sigmoid".
        router_scale: factor of the experts' output.
        router_bias_rate: step of the bias that balances the choice of experts without a loss; 0 has none.
        norm_position: "pre" normalises the input of every mixer and MLP, "post" their output, "none" neither (for
            mixers with norms of their own); a list of these is repeated over the layers like ``mixers``.
        norm_eps: epsilon of the RMS norms.
        tie_embeddings: the head shares the weight of the embedding; there is then no ``lm_head``.
        embed_scale: factor of the embeddings on their way into the first layer.
        logit_soft_cap: c in ``c * tanh(logits / c)``; None has no cap.
        init_std: standard deviation of the initial embedding, head and MLP weights. Mixers initialise themselves.
        scale_residual_init: divide the initial weights of the output projections of mixers and MLPs by the root of how
            many there are, so that the residual stream does not grow with depth (GPT-2; Mamba, M2RNN).
    """

    vocab_size: int
    d_model: int
    num_layers: int
    mixers: Sequence[str | Mapping[str, Any]]
    mlp: str | Sequence[str] = "swiglu"
    mlp_hidden: int | None = None
    mlp_ratio: float = 8 / 3
    mlp_bias: bool = False
    num_experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int | None = None
    shared_experts: int = 0
    shared_gate: bool = False
    dense_layers: int = 0
    experts_every: int = 1
    balance_loss: float = 0.01
    router_z_loss: float = 0.0
    z_loss: float = 0.0
    router: str = "softmax"
    router_scale: float = 1.0
    router_bias_rate: float = 0.0
    norm_position: str | Sequence[str] = "pre"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    logit_soft_cap: float | None = None
    init_std: float = 0.02
    scale_residual_init: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_experts", "experts_per_token", "experts_every"):
            self._expect(name, "an integer >= 1", lambda x: _is_int(x) and x >= 1)
        for name in ("shared_experts", "dense_layers"):
            self._expect(name, "an integer >= 0", lambda x: _is_int(x) and x >= 0)
        for name in ("mlp_hidden", "expert_hidden"):
            self._expect(name, "an integer >= 1 or None", lambda x: x is None or (_is_int(x) and x >= 1))
        for name in ("mlp_ratio", "norm_eps", "init_std", "router_scale", "embed_scale"):
            self._expect(name, "a number > 0", lambda x: _is_number(x) and x > 0)
        for name in ("balance_loss", "router_z_loss", "z_loss", "router_bias_rate"):
            self._expect(name, "a number >= 0", lambda x: _is_number(x) and x >= 0)
        for name in ("tie_embeddings", "scale_residual_init", "shared_gate", "mlp_bias"):
            self._expect(name, "true or false", lambda x: isinstance(x, bool))
        self._expect("logit_soft_cap", "a number > 0 or None", lambda x: x is None or (_is_number(x) and x > 0))
        allowed = ("swiglu", "geglu", "moe", "none")
        what = f"{', '.join(map(repr, allowed[:-1]))}, 'none' or a list of these"
        self._expect("mlp", what, lambda x: _is_one_or_several(x, allowed))
        if not isinstance(self.mlp, str):
            object.__setattr__(self, "mlp", tuple(self.mlp))
        self._expect("router", "'softmax' or 'sigmoid'", lambda x: x in ("softmax", "sigmoid"))
        what = "'pre', 'post', 'none' or a list of these, not empty"
        self._expect("norm_position", what, lambda x: _is_one_or_several(x, NORM_POSITIONS))
        if not isinstance(self.norm_position, str):
            object.__setattr__(self, "norm_position", tuple(self.norm_position))
        self._expect("experts_per_token", f"at most num_experts={self.num_experts}", lambda x: x <= self.num_experts)
        self._expect(
            "mixers",
            "a list of mixer specs, not empty",
            lambda x: isinstance(x, Sequence) and not isinstance(x, str) and len(x) > 0,
        )
        specs = []
        for spec in self.mixers:
            self._expect("mixers", "names or mappings", lambda _, spec=spec: isinstance(spec, (str, Mapping)))
            parse_spec(spec)
            specs.append(dict(spec) if isinstance(spec, Mapping) else spec)
        object.__setattr__(self, "mixers", tuple(specs))

    def _expect(self, name: str, what: str, holds: Any) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name}: expected {what}, got {value!r}")

    @property
    def hidden(self) -> int:
        """Inner width of the dense MLP."""
        return self.mlp_hidden or 64 * math.ceil(round(self.mlp_ratio * self.d_model, 6) / 64)

    def mixer_spec(self, layer: int) -> str | Mapping[str, Any]:
        """The mixer spec of a layer, counted from 0."""
        return self.mixers[layer % len(self.mixers)]

    def norm_place(self, layer: int) -> str:
        """Where the norms of a layer stand: "pre", "post" or "none"."""
        places = (self.norm_position,) if isinstance(self.norm_position, str) else self.norm_position
        return places[layer % len(places)]

    @property
    def residual_scale(self) -> float:
        """Factor of the initial weights that end a branch of the residual stream: 1 without ``scale_residual_init``."""
        if not self.scale_residual_init:
            return 1.0
        kinds = (self.mlp,) if isinstance(self.mlp, str) else self.mlp
        return (self.num_layers + sum(kinds[i % len(kinds)] != "none" for i in range(self.num_layers))) ** -0.5

    def build_mlp(self, layer: int) -> SwiGLU | MixtureOfExperts | None:
        """The MLP of a layer."""
        std = self.init_std * self.residual_scale
        kind = self.mlp if isinstance(self.mlp, str) else self.mlp[layer % len(self.mlp)]
        if kind == "none":
            return None
        sparse = layer >= self.dense_layers and (layer - self.dense_layers + 1) % self.experts_every == 0
        if kind != "moe" or not sparse:
            dense = GeGLU if kind == "geglu" else SwiGLU
            return dense(self.d_model, self.hidden, init_std=self.init_std, out_std=std, bias=self.mlp_bias)
        return MixtureOfExperts(
            self.d_model,
            self.expert_hidden or self.hidden,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            shared_experts=self.shared_experts,
            shared_gate=self.shared_gate,
            balance_loss=self.balance_loss,
            router_z_loss=self.router_z_loss,
            router=self.router,
            router_scale=self.router_scale,
            router_bias_rate=self.router_bias_rate,
            init_std=self.init_std,
            out_std=std,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` restores them."""
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """The config with these fields; unknown and missing ones raise a ValueError that lists the known ones."""
        fields = dataclasses.fields(cls)
        check_names("config", "field", values, [field.name for field in fields])
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ValueError(f"config: the field {field.name!r} is missing")
        return cls(**values)


def check_tensors(where: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of a model, with a ValueError that begins with ``where`` and names them."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} of shape {list(x.shape)} instead of {list(expected[name].shape)}"
        for name, x in tensors.items()
        if name in expected and x.shape != expected[name].shape
    ]
    refuse_tensors(where, problems)


def refuse_tensors(where: str, problems: Sequence[str]) -> None:
    """Raise the ValueError of tensors that are not those of a model, where there are such problems."""
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{where}: not the weights of its config: {', '.join(problems[:8])}{more}")


def check_ids(name: str, ids: Tensor, vocab_size: int, uncounted: int | None = None) -> None:
    """Refuse ids outside the vocabulary but ``uncounted``, where looking at them costs no wait for a device."""
    if not concrete(ids) or ids.device.type != "cpu":
        return
    if uncounted is not None:
        ids = ids.where(ids != uncounted, 0)
    low, high = (int(t) for t in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def _reset(module: nn.Module) -> None:
    for child in module.children():
        _reset(child)
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


@torch.no_grad()
def shrink_outputs(layers: nn.ModuleList, config: DecoderConfig) -> None:
    """What ``scale_residual_init`` does to mixers, which draw their weights knowing nothing of it; MLPs draw theirs
    accordingly."""
    if not config.scale_residual_init:
        return
    for mixer in layers.modules():
        for name in ("o_proj", "out_proj", "down_proj") if isinstance(mixer, Mixer) else ():
            if isinstance(projection := getattr(mixer, name, None), nn.Linear):
                projection.weight.mul_(config.residual_scale)


def _is_one_or_several(x: Any, allowed: tuple[str, ...]) -> bool:
    several = [x] if isinstance(x, str) else x
    return isinstance(several, Sequence) and len(several) > 0 and all(one in allowed for one in several)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


class DecoderOutput(NamedTuple):
    """What a forward returns.

    Attributes:
        logits: ``[B, T, V]``; with ``last_only`` ``[B, 1, V]``, or ``[N, 1, V]`` for N packed segments.
        state: one state a layer, to be passed to the next call.
        aux_loss: fp32 scalar, sum of the auxiliary losses of the layers (0 when there are none).
    """

    logits: Tensor
    state: tuple[Any, ...]
    aux_loss: Tensor


def _compute(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype, where that is on. Otherwise every projection that reads ``x`` casts it for itself, and
    its share of the gradient back."""
    kind = x.device.type
    if x.dtype != torch.float32 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class DecoderLayer(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; norms behind (``norm_position``) ``x + norm(mixer(x))``,
    then ``x + norm(mlp(x))``; without norms both are identities. The unit that FSDP shards and checkpointing
    recomputes."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        width, place = config.d_model, config.norm_place(layer)
        self.post = place == "post"

        def norm() -> nn.Module:
            return nn.Identity() if place == "none" else nn.RMSNorm(width, eps=config.norm_eps)

        self.mixer_norm = norm()
        self.mixer = build_mixer(config.mixer_spec(layer), width, layer=layer, num_layers=config.num_layers)
        self.mlp = config.build_mlp(layer)
        self.mlp_norm = None if self.mlp is None else norm()

    def forward(
        self, x: Tensor, state: Any = None, segments: Segments | None = None
    ) -> tuple[Tensor, Any, Tensor | None]:
        y, state = self.mixer(_compute(x if self.post else self.mixer_norm(x)), state, segments)
        x = x + (self.mixer_norm(y) if self.post else y)
        if self.mlp is None or self.mlp_norm is None:
            return x, state, None
        y, aux = self.mlp(_compute(x if self.post else self.mlp_norm(x)))
        return x + (self.mlp_norm(y) if self.post else y), state, aux


class Decoder(nn.Module):
    """A causal language model over any mixers; training, prefill and decoding are the same forward.

    Modules: ``embed_tokens``, ``layers[i].{mixer_norm, mixer, mlp_norm, mlp}``, ``norm``, ``lm_head`` (None when
    tied). Set ``gradient_checkpointing = True`` to keep only the layer boundaries in training and recompute the rest
    in the backward pass.

    >>> config = DecoderConfig(vocab_size=256, d_model=128, num_layers=4, mixers=["gla"])
    >>> out = Decoder(config)(torch.randint(256, (2, 16)))
    >>> out.logits.shape
    torch.Size([2, 16, 256])
    """

    gradient_checkpointing: bool = False

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._reset_own_parameters()

    @classmethod
    def meta(cls, config: DecoderConfig) -> Decoder:
        """The model without memory, on the meta device. Make it real with ``model.to_empty(device=...)`` (or after
        sharding it) and ``model.reset_parameters()``."""
        with torch.device("meta"):
            return cls(config)

    def _reset_own_parameters(self) -> None:
        shrink_outputs(self.layers, self.config)
        nn.init.normal_(self.embed_tokens.weight, std=self.config.init_std)
        self.norm.reset_parameters()
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=self.config.init_std)

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, in place: each module as it does on construction, a parent after its
        children, since mixers and MLPs set weights of the linear layers inside them."""
        _reset(self.layers)
        self._reset_own_parameters()

    def forward(
        self,
        tokens: Tensor,
        state: tuple[Any, ...] | None = None,
        segments: Segments | None = None,
        *,
        last_only: bool = False,
    ) -> DecoderOutput:
        """Logits of the next token at every position.

        Args:
            tokens: int64 ``[B, T]``, not empty; packed ``[1, total]`` with ``segments``. Or floating ``[B, T, W]``:
                each position a mixture of the embeddings of the first W tokens (several at once, noise, nothing).
            state: what an earlier call returned, B rows (one a segment when packed); None starts afresh.
            segments: boundaries of packed sequences.
            last_only: compute the logits of the last position of each row (of each segment when packed) only.

        Raises:
            ValueError: ``tokens`` has another shape, dtype or (on the CPU) ids outside the vocabulary; ``segments`` do
                not fit or hold an empty sequence under ``last_only``; ``state`` is of another number of layers.
        """
        x, new_state, aux = self._hidden(tokens, state, segments)
        if last_only and segments is None:
            x = x[:, -1:]
        elif last_only and segments is not None:
            if not torch.compiler.is_compiling() and min(segments.lengths) == 0:
                raise ValueError("segments: an empty sequence has no last position; drop it or pass last_only=False")
            x = x[0].index_select(0, segments.cu_seqlens[1:] - 1).unsqueeze(1)
        logits = self._project(x)
        if self.config.logit_soft_cap is not None:
            logits = self._soft_cap(at_least_fp32(logits)).to(logits.dtype)
        return DecoderOutput(logits, new_state, aux)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Segments | None = None,
        *,
        state: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """Mean cross entropy in nats per counted target, at least fp32; in training mode plus the auxiliary losses.

        Under a wrapper that hooks ``forward`` (DDP) call it from the forward of a module that holds this one.

        Args:
            tokens: as for :meth:`forward`.
            targets: int64 ``[B, T]``: the id each position has to predict; -100 is not counted. Nothing is shifted
                here. When no target counts, the cross entropy is 0.
            segments: boundaries of packed sequences.
            state: before the first token, as for :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`, or ``targets`` has another shape than ``tokens``, another dtype or (on the
                CPU) ids outside the vocabulary.
        """
        if isinstance(tokens, Tensor):  # otherwise they are what is wrong
            self._check_targets(targets, tokens)
        x, _, aux = self._hidden(tokens, state, segments)
        x, targets = x.flatten(0, 1), targets.flatten()
        parts = math.ceil(x.shape[0] * self.config.vocab_size / _LOSS_LOGITS)
        if parts == 1:
            total = self._summed_loss(x, targets)
        else:
            total = torch.stack(
                [
                    checkpoint(self._summed_loss, rows, ids, use_reentrant=False)
                    for rows, ids in zip(x.chunk(parts), targets.chunk(parts), strict=True)
                ]
            ).sum()
        mean = total / (targets != -100).sum().clamp(min=1)
        return mean + aux if self.training else mean

    def _hidden(
        self, tokens: Tensor, state: tuple[Any, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        self._check(tokens, state, segments)
        return self._through(self._embed(tokens), state, segments)

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            x = tokens.to(self.embed_tokens.weight.dtype) @ self.embed_tokens.weight[: tokens.shape[-1]]
        else:
            x = self.embed_tokens(tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def _through(
        self, x: Tensor, state: tuple[Any, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        states: list[Any] = []
        losses: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            old = None if state is None else state[i]
            if recompute:
                x, new, aux = checkpoint(layer, x, old, segments, use_reentrant=False)
            else:
                x, new, aux = layer(x, old, segments)
            states.append(new)
            if aux is not None:
                losses.append(aux)
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=x.device)
        return self.norm(x), tuple(states), total

    def _check(self, tokens: Tensor, state: tuple[Any, ...] | None, segments: Segments | None) -> None:
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens: expected a tensor of shape [B, T], got {type(tokens).__name__}")
        mixed = tokens.is_floating_point() and tokens.dim() == 3 and tokens.shape[2] <= self.config.vocab_size
        if not (mixed or (tokens.dim() == 2 and tokens.dtype == torch.int64)) or 0 in tokens.shape[:2]:
            raise ValueError(
                f"tokens: expected int64 of shape [B, T], not empty, or floats [B, T, W] with W <= "
                f"{self.config.vocab_size}, got {tokens.dtype} of shape {list(tokens.shape)}"
            )
        check_segments(segments, tokens)
        if state is not None and (not isinstance(state, (tuple, list)) or len(state) != len(self.layers)):
            got = len(state) if isinstance(state, (tuple, list)) else type(state).__name__
            raise ValueError(f"state: expected {len(self.layers)} layer states, got {got}")
        if not mixed:
            check_ids("tokens", tokens, self.config.vocab_size)

    def _check_targets(self, targets: Tensor, tokens: Tensor) -> None:
        if not isinstance(targets, Tensor) or targets.shape != tokens.shape[:2] or targets.dtype != torch.int64:
            given = isinstance(targets, Tensor)
            got = f"{targets.dtype} of shape {list(targets.shape)}" if given else type(targets).__name__
            raise ValueError(f"targets: expected int64 of shape {list(tokens.shape[:2])} like tokens, got {got}")
        check_ids("targets", targets, self.config.vocab_size, uncounted=-100)

    def _project(self, x: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(x)
        table = self.embed_tokens.weight
        if hasattr(table, "to_local"):  # a DTensor that is whole
            table = table.to_local()  # type: ignore[operator]
        return F.linear(x, table)

    def _soft_cap(self, logits: Tensor) -> Tensor:
        return soft_cap(logits, self.config.logit_soft_cap)

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self._soft_cap(at_least_fp32(self._project(x)))
        loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return loss + self.z_loss(logits, targets) if self.training and self.config.z_loss else loss

    def z_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The squared log-sum-exp of fp32 ``logits`` ``[..., V]``, summed over counted ``targets`` ``[...]``, times the
        coefficient in the config."""
        squares = logits.logsumexp(-1).square()
        return self.config.z_loss * torch.where(targets == -100, 0.0, squares).sum()

    def init_state(self, rows: int) -> tuple[Any, ...]:
        """The state before the first token for ``rows`` sequences."""
        return tuple(layer.mixer.init_state(rows) for layer in self.layers)  # type: ignore[operator, union-attr]

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters, a tied weight counted once; without the embedding and the head on request."""
        count = sum(p.numel() for p in self.parameters())
        tables = 1 if self.lm_head is None else 2
        return count if embeddings else count - tables * self.config.vocab_size * self.config.d_model

    def router_statistics(self) -> dict[str, float]:
        """Balance of the experts in the last training forward, by layer, e.g. ``{"layers.3.max_load": 1.2}``; see
        :meth:`MixtureOfExperts.router_statistics`. Empty without experts."""
        return {
            f"layers.{i}.{key}": value
            for i, layer in enumerate(self.layers)
            if isinstance(layer.mlp, MixtureOfExperts)
            for key, value in layer.mlp.router_statistics().items()
        }

    def save(
        self, folder: str | Path, *, overwrite: bool = False, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, completely or not at all.

        Args:
            folder: where to; missing parents are created.
            overwrite: replace a folder that holds something.
            state_dict: gathered weights of a sharded model, in place of the module's own.

        Raises:
            FileExistsError: the folder holds something and ``overwrite`` is false.
            OSError: it cannot be written, e.g. the disk is full; what was there before is unchanged.
        """
        with atomic_folder(folder, overwrite) as partial:
            write_checkpoint(partial, self.config.to_dict(), self.state_dict() if state_dict is None else state_dict)

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Decoder:
        """The model that :meth:`save` wrote, in evaluation mode.

        Args:
            folder: where it is.
            device: where its tensors go (default: the CPU).
            dtype: cast its floating tensors (default: as saved).

        Raises:
            FileNotFoundError: there is no model in the folder.
            ValueError: a file is damaged, or does not hold the weights its config describes; names the file.
        """
        values, tensors = read_checkpoint(folder, device, dtype)
        config = DecoderConfig.from_dict(values)
        model = cls.meta(config)
        expected = model.state_dict()
        check_tensors(str(Path(folder, "model.safetensors")), expected, tensors)
        if any(b.is_meta for name, b in model.named_buffers() if name not in expected):
            model = cls(config).to(device=device, dtype=dtype)  # some mixer computes buffers that are not saved
        model.load_state_dict(tensors, assign=True)
        return model.eval()
