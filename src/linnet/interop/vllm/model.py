"""A decoder inside vLLM: its mixers keep their states in vLLM's pages.

vLLM hands out pages of one size. Here a page is a row of bytes with all tensors of the state of one sequence in one
layer, at the offsets of :class:`Row`; layers with smaller states leave the rest unused. A batch comes as one row of
tokens, decoding requests first, one token each, then prompts or parts of prompts; the first take the mixer's step, the
others its packed prefill.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig  # type: ignore[import-not-found, attr-defined]
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention as PagedAttention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linnet.mixers import Mixer
from linnet.mixers.attention import Attention
from linnet.models import Decoder, DecoderConfig
from linnet.models.decoder import check_tensors
from linnet.models.mlp import at_least_fp32
from linnet.ops import Segments
from linnet.ops.core import map_state, state_tensors

from .config import ServedConfig, served_mixers

__all__ = ["LinnetForCausalLM"]

_ALIGNMENT = 16  # bytes, of every tensor in a row


class Row:
    """How the state of one sequence lies in bytes.

    Args:
        mixer: whose state it is; it may be without memory.

    Attributes:
        template: a state, for its structure.
        parts: (offset, shape, dtype) of its tensors.
        size: in bytes.
    """

    def __init__(self, mixer: Mixer):
        self.template = mixer.init_state(1)
        self.parts: list[tuple[int, torch.Size, torch.dtype]] = []
        self.size = 0
        for x in state_tensors(self.template):
            self.parts.append((self.size, x.shape[1:], x.dtype))
            self.size += _ALIGNMENT * math.ceil(x.numel() * x.element_size() / _ALIGNMENT)

    def views(self, rows: Tensor) -> list[Tensor]:
        """The tensors ``[N, ...]`` of the states that lie in bytes ``[N, >= size]``; they share their memory."""
        found = []
        for at, shape, dtype in self.parts:
            flat = rows[:, at : at + shape.numel() * dtype.itemsize].view(dtype)
            found.append(flat.unflatten(1, shape) if shape else flat[:, 0])
        return found


def _row_bytes(config: ServedConfig, dtype: torch.dtype) -> int:
    """Size of a page: of the largest state of a layer, when the parameters are of ``dtype``."""
    mixers = served_mixers(config.decoder_config())
    return max([Row(m.to(dtype)).size for m in mixers if not isinstance(m, Attention)], default=0)


@dataclass
class Batch(LinearAttentionMetadata):
    """vLLM's description of a batch, and the boundaries of its prompts."""

    segments: Segments | None = None


class _Builder(LinearAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Where captured steps read which pages to use.
        self.pages = torch.zeros(self.vllm_config.scheduler_config.max_num_seqs, dtype=torch.int64, device=self.device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        common = common_attn_metadata
        batch = Batch(**vars(super().build(common_prefix_len, common, fast_build)))
        count = common.num_reqs
        batch.state_indices_tensor = self.pages[:count].copy_(batch.state_indices_tensor[:count])
        lengths = common.query_start_loc_cpu[: count + 1].diff()
        # Pages are handed out as they were left. A prompt of one token comes as a decoding request.
        begins = ((lengths > 0) & (common.seq_lens_cpu_upper_bound[:count] == lengths)).nonzero()[:, 0]
        if len(begins):
            pages = batch.state_indices_tensor.index_select(0, begins.to(self.device))
            for name in self.layer_names:
                self.vllm_config.compilation_config.static_forward_context[name].begin(pages)
        if batch.num_prefills:
            batch.segments = Segments.from_lengths(lengths[batch.num_decodes :].tolist(), self.device)
        return batch


class _Backend(LinearAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder


class _Recurrent(MambaBase):
    """Runs a mixer, in place of its ``forward``, on the states in its pages."""

    mamba_type = MambaAttentionBackendEnum.LINEAR  # type: ignore[assignment]

    def __init__(self, mixer: Mixer, size: int, prefix: str, context: dict[str, Any]):
        self.mixer, self.run, self.row, self.size, self.prefix = mixer, mixer.forward, Row(mixer), size, prefix
        self.kv_cache = (torch.tensor([]),)
        self.states: list[Tensor] = []
        if prefix in context:
            raise ValueError(f"prefix: expected a new name, got {prefix!r}")
        context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.size,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def get_attn_backend(self) -> type[_Backend]:
        return _Backend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.states = self.row.views(self.kv_cache[0])

    def begin(self, pages: Tensor) -> None:
        """Write the state before the first token."""
        self._write(pages, self.mixer.init_state(len(pages)))

    def _write(self, pages: Tensor, state: Any) -> None:
        for held, x in zip(self.states, state_tensors(state), strict=True):
            held.index_copy_(0, pages, x)

    def _advance(self, x: Tensor, pages: Tensor, segments: Segments | None) -> Tensor:
        held = iter(self.states)
        state = map_state(lambda _: next(held).index_select(0, pages), self.row.template)
        y, state = self.run(x, state, segments)
        self._write(pages, state)
        return y

    def __call__(self, x: Tensor, state: Any = None, segments: Segments | None = None) -> tuple[Tensor, None]:
        batches: Any = get_forward_context().attn_metadata
        if batches is None:  # vLLM measures the memory that a batch takes
            return self.run(x, None, None)[0], None
        batch: Batch = batches[self.prefix]
        steps, tokens = batch.num_decodes, batch.num_decode_tokens + batch.num_prefill_tokens
        y = torch.zeros_like(x)
        if steps:
            pages = batch.state_indices_tensor[:steps]
            y[0, :steps] = self._advance(x[0, :steps].unsqueeze(1), pages, None)[:, 0]
        if batch.num_prefills:
            pages = batch.state_indices_tensor[steps : steps + batch.num_prefills]
            y[:, steps:tokens] = self._advance(x[:, steps:tokens], pages, batch.segments)
        return y, None


class _Paged:
    """Runs a mixer ``attention``, in place of its ``forward``, on vLLM's cache of keys and values."""

    def __init__(self, mixer: Attention, config: VllmConfig, prefix: str, now: dict[str, Tensor]):
        self.mixer, self.run, self.now = mixer, mixer.forward, now
        mixer.attend = self._attend  # type: ignore[assignment, method-assign]
        self.attend = PagedAttention(
            mixer.num_heads,
            mixer.head_dim,
            mixer.head_dim**-0.5,
            mixer.num_kv_heads,
            cache_config=config.cache_config,
            per_layer_sliding_window=mixer.window,
            prefix=prefix,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.attend(*[y.flatten(1).contiguous() for y in (q, k, v)]).view(q.shape), None

    def __call__(self, x: Tensor, state: Any = None, segments: Segments | None = None) -> tuple[Tensor, None]:
        rows = x[0].unsqueeze(1)  # one a token, each at its position
        before = self.mixer.init_state(len(rows))._replace(length=self.now["positions"])
        return self.run(rows, before)[0].transpose(0, 1), None


def _empty(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """A decoder whose weights are yet to be loaded, on vLLM's device."""
    model = Decoder.meta(config)
    saved = model.state_dict()
    if all(name in saved for name, _ in model.named_buffers()):
        return model.to(dtype).to_empty(device=torch.get_default_device()).eval()
    with set_default_torch_dtype(torch.float32):  # some mixer computes buffers that are not saved
        return Decoder(config).to(dtype).eval()


class LinnetForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """A linnet decoder as a model of vLLM.

    Raises:
        ValueError: more than one process for the layers, speculative decoding, quantised weights, a dtype of states
            that is not their own, or a mixer that cannot be served; names it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        parallel = vllm_config.parallel_config
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(parallel, name) > 1:
                raise ValueError(f"{name}: expected 1, got {getattr(parallel, name)}; use data_parallel_size")
        if vllm_config.num_speculative_tokens:
            raise ValueError("speculative_config: expected none, a recurrent state cannot be rolled back")
        if vllm_config.quant_config is not None:
            raise ValueError(f"quantization: expected none, got {vllm_config.quant_config.get_name()}")
        caches = vllm_config.cache_config
        for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
            if getattr(caches, name) not in ("auto", "float32"):
                raise ValueError(f"{name}: expected auto or float32, got {getattr(caches, name)}")
        config: ServedConfig = vllm_config.model_config.hf_config
        size = _row_bytes(config, vllm_config.model_config.dtype)
        self.model = _empty(config.decoder_config(), vllm_config.model_config.dtype)
        self.paged = nn.ModuleList()
        self.now: dict[str, Tensor] = {}
        context = vllm_config.compilation_config.static_forward_context
        for i, layer in enumerate(self.model.layers):
            mixer, name = layer.mixer, f"{prefix}{'.' if prefix else ''}model.layers.{i}.mixer"
            if isinstance(mixer, Attention):
                mixer.forward = _Paged(mixer, vllm_config, name, self.now)  # type: ignore[assignment, method-assign]
                self.paged.append(mixer.forward.attend)  # type: ignore[attr-defined]
            else:
                mixer.forward = _Recurrent(mixer, size, name, context)  # type: ignore[assignment, arg-type]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        model = vllm_config.model_config
        return ((_row_bytes(model.hf_config, model.dtype),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return (get_temporal_copy_spec,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model._embed(input_ids.long())

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states ``[tokens, D]`` before the head.

        Args:
            input_ids: ``[tokens]``, those of all requests of the batch one after the other.
            positions: ``[tokens]``, in the sequence of each.
            inputs_embeds: in place of ``input_ids``, ``[tokens, D]``.
        """
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        self.now["positions"] = positions.long()
        return self.model._through(x[None], None, None)[0][0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.model._soft_cap(at_least_fp32(self.model._project(hidden_states)))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the weights of a linnet folder.

        Raises:
            ValueError: one is missing, unexpected or of another shape; names them.
        """
        expected, found = self.model.state_dict(), {}
        for name, x in weights:
            found[name] = x.to("meta")
            if name in expected and expected[name].shape == x.shape:
                expected[name].copy_(x)
        check_tensors("weights", expected, found)
        return {f"model.{name}" for name in found}
