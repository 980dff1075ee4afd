"""linnet decoders as models of the `transformers` library (extra ``hf``).

Importing this module registers them, so that a folder written by ``linnet train``, :meth:`linnet.Decoder.save` or
``save_pretrained`` (the same files: ``config.json`` and ``model.safetensors``, large ones in shards) loads by its name:

>>> import linnet.interop.transformers
>>> model = AutoModelForCausalLM.from_pretrained("runs/default-small/model")
>>> tokenizer = AutoTokenizer.from_pretrained("runs/default-small/model")
>>> model.generate(ids, attention_mask=mask, max_new_tokens=20)

``generate``, pipelines, ``Trainer`` and PEFT then work as with any other model. What differs from an attention model:
the cache is a recurrent state, which cannot be rolled back, so assisted decoding is refused; padded batches are packed,
so that padding is never computed; and weight decay must spare decays and gates, and step sizes learn slowly, which is a
``Trainer`` whose optimiser has :func:`linnet.models.parameter_groups`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from linnet.mixers.parts import GateLinear
from linnet.models import Decoder, DecoderConfig, MixtureOfExperts
from linnet.models.io import CHAT_TEMPLATE_FILE, FORMAT_VERSION, MODEL_TYPE, SOURCE, TOKENIZER_SETTINGS_FILE
from linnet.models.mlp import at_least_fp32
from linnet.ops import Segments
from linnet.ops.core import map_state, repeat_rows, select_rows
from linnet.tasks.tokenizers import FILE as TOKENIZER_FILE
from linnet.tasks.tokenizers import load_tokenizer, read_settings
from linnet.training import find_model

__all__ = ["FolderTokenizer", "LinnetConfig", "LinnetForCausalLM", "StateCache", "fast_tokenizer", "packing"]

# The name of the cache among the outputs of a model and the arguments of `generate`: new in transformers 5.24.
_CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


class LinnetConfig(PreTrainedConfig):
    """A :class:`~linnet.DecoderConfig` under ``config``, and what transformers wants to know of it.

    Args:
        config: the fields of the decoder's configuration.
        format_version, linnet_version: of the checkpoint's files.

    Raises:
        ValueError: the files are of another version of the format.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    config: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    linnet_version: str | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        import linnet

        self.linnet_version = self.linnet_version or linnet.__version__
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION}, got {self.format_version!r}; these files were written by"
                f" linnet {self.linnet_version}, use that version or a newer one"
            )
        if self.config is not None:
            shape = self.decoder_config()
            for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
                kwargs.pop(name, None)
            self.vocab_size, self.hidden_size, self.num_hidden_layers = (
                shape.vocab_size,
                shape.d_model,
                shape.num_layers,
            )
        # The head of a tied decoder is the embedding itself, not a second module to be tied to it.
        kwargs["tie_word_embeddings"] = False
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or ["LinnetForCausalLM"]

    @classmethod
    def of(cls, config: DecoderConfig, **kwargs: Any) -> LinnetConfig:
        """The configuration of a decoder."""
        return cls(config=config.to_dict(), **kwargs)

    def decoder_config(self) -> DecoderConfig:
        """The decoder's configuration.

        Raises:
            ValueError: there is none, or a field of it is unknown or wrong.
        """
        if self.config is None:
            raise ValueError("config: expected the fields of a DecoderConfig, got None")
        return DecoderConfig.from_dict(self.config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the folder may also be a whole run of ``linnet train``."""
        return super().from_pretrained(_model_folder(pretrained_model_name_or_path), *args, **kwargs)


def _model_folder(name: Any) -> Any:
    """The model of a run folder; what else there may be, such as a name on the hub, is for transformers to judge."""
    try:
        return (
            str(find_model(os.fspath(name))) if isinstance(name, (str, os.PathLike)) and Path(name).is_dir() else name
        )
    except FileNotFoundError:
        return name


def _sparing(quantization: Any, config: LinnetConfig) -> Any:
    """A quantisation of matrices alone: what decides over thousands of tokens what a state keeps, and which experts a
    token gets, keeps its precision."""
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):  # of bitsandbytes; of the others
        if getattr(quantization, field, "") is None:
            decoder = Decoder.meta(config.decoder_config())
            kept = [module for module in decoder.modules() if isinstance(module, GateLinear)]
            kept += [module.router for module in decoder.modules() if isinstance(module, MixtureOfExperts)]
            names = [f"model.{name}" for name, module in decoder.named_modules() if module in kept]
            quantization = copy.copy(quantization)
            setattr(quantization, field, [*names, "model.lm_head"])
            break
    return quantization


class StateCache(Cache):
    """The recurrent state of a decoder as the cache of ``generate``: one row a sequence.

    Args:
        state: what a decoder returned; None before the first token.
        seen: columns of the batch read so far, padding included.
    """

    is_compileable: ClassVar[bool] = False  # type: ignore[assignment, override]
    is_croppable: ClassVar[bool] = False  # type: ignore[assignment, override]
    # Not a "linear" cache in its sense: the columns read are counted, as in a cache of attention.
    is_linear: ClassVar[list[bool]] = [False]  # type: ignore[assignment, override]

    def __init__(self, state: tuple[Any, ...] | None = None, seen: int = 0):
        super().__init__(layers=[])
        self.state, self.seen = state, seen

    def __repr__(self) -> str:
        return f"StateCache(seen={self.seen})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = select_rows(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = select_rows(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = repeat_rows(self.state, repeats)

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a recurrent state cannot be rolled back to fewer tokens")

    def clone(self) -> StateCache:
        """A copy that goes on independently: later tokens replace the state and never change it in place."""
        return StateCache(map_state(torch.clone, self.state), self.seen)


class Packing(NamedTuple):
    """How a batch is laid out for the decoder.

    Attributes:
        segments: boundaries of the sequences in the packed row, or None for a batch as it stands.
        kept: bool ``[B, T]``, the tokens that are read; None: all.
    """

    segments: Segments | None = None
    kept: Tensor | None = None

    def pack(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` -> ``[1, total]`` where there are segments."""
        if self.segments is None:
            return tokens
        return (tokens.flatten() if self.kept is None else tokens[self.kept]).unsqueeze(0)

    def unpack(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``[1, total, V]`` back in their places ``[B, T, V]``, zeros at padding."""
        if self.segments is None:
            return logits
        if self.kept is None:
            return logits.view(*tokens.shape, -1)
        return logits.new_zeros(*tokens.shape, logits.shape[-1]).index_put((self.kept,), logits[0])


def packing(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    continued: bool = False,
) -> Packing:
    """The one place where masks and positions become segments.

    Padding, on either side, is left out: each row is a segment. A token alone (a decoding step) is always read. Without
    a mask, sequences packed in a row are found by ``cu_seqlens``, or by positions that start again at 0.

    Args:
        tokens: ``[B, T]``.
        attention_mask: ``[B, S]``, nonzero for tokens, of which the last T columns are those of ``tokens``.
        position_ids: ``[B, T]`` or ``[1, T]``; only where sequences begin is read from them.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences of a single row.
        continued: a state goes before the tokens; there is then a sequence a row.

    Raises:
        ValueError: a mask of more than two axes or too few columns, or packed sequences in more than a row.
    """
    rows, length = tokens.shape
    if cu_seqlens is not None:
        if rows != 1 or continued:
            raise ValueError(f"cu_seq_lens_q: expected one packed row without a cache, got {rows} rows")
        return Packing(Segments.from_cu_seqlens(cu_seqlens))
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask: expected [{rows}, >= {length}], got {list(getattr(attention_mask, 'shape', ()))}"
            )
        kept = attention_mask[:, -length:] != 0
        if length > 1 and not bool(kept.all()):
            return Packing(Segments.from_lengths(kept.sum(1)), kept)
    elif position_ids is not None and not continued and length > 1:
        starts = (position_ids == 0).expand(rows, length)
        if bool(starts[:, 1:].any()):
            return Packing(Segments.from_document_ids(starts.long().cumsum(1)))
    return Packing()


def _take_names_of_files(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """When ``Trainer`` resumes, or goes back to the best model, it gives ``load_state_dict`` what ``save_pretrained``
    wrote, and goes on whatever is missing."""
    for name in [key for key in state_dict if key.startswith(prefix)]:
        if not name.startswith(f"{prefix}model."):
            state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)


class LinnetForCausalLM(PreTrainedModel, GenerationMixin):
    """A linnet decoder, ``model``, as a causal language model of transformers.

    Inputs, outputs and labels follow its conventions (labels are shifted here). Logits at padding are 0. In training
    mode the auxiliary losses of the decoder are added to the loss. ``inputs_embeds``, hidden states and attention maps
    are refused, and so are prompt tuning and assisted decoding, which need them.
    """

    config: LinnetConfig
    config_class = LinnetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _is_stateful = True

    def __init__(self, config: LinnetConfig):
        super().__init__(config)
        self.model = Decoder(config.decoder_config())
        for tensor in self._tensors():  # the decoder initialises itself; transformers would draw it anew
            if not tensor.is_meta:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_load_state_dict_pre_hook(_take_names_of_files)
        self.post_init()

    @classmethod
    def wrap(cls, decoder: Decoder) -> LinnetForCausalLM:
        """Around an existing decoder, which is not copied."""
        if not isinstance(decoder, Decoder):
            raise ValueError(f"decoder: expected a Decoder, got {type(decoder).__name__}")
        with torch.device("meta"):
            self = cls(LinnetConfig.of(decoder.config))
        self.model = decoder
        return self.train(decoder.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the folder may also be a whole run of ``linnet train``. Generation begins (without
        a prompt) and stops as the folder's tokenizer says (``begin``, ``ends``), unless it is told where. A
        ``quantization_config`` that does not say itself what to leave out leaves out gates, routers and the head."""
        folder = _model_folder(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            config: Any = kwargs.get("config") or LinnetConfig.from_pretrained(folder)
            kwargs["quantization_config"] = _sparing(kwargs["quantization_config"], config)
        loaded = super().from_pretrained(folder, *args, **kwargs)
        settings = (loaded[0] if isinstance(loaded, tuple) else loaded).generation_config
        if settings.eos_token_id is None and isinstance(folder, str) and Path(folder, TOKENIZER_FILE).is_file():
            tokenizer = load_tokenizer(folder)
            settings.bos_token_id = tokenizer.begin
            settings.pad_token_id = tokenizer.end
            settings.eos_token_id = list(tokenizer.ends) if len(tokenizer.ends) > 1 else tokenizer.end
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """As in transformers, in the layout of :meth:`linnet.Decoder.save`."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name.removeprefix("model."): x for name, x in state_dict.items()}
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What ``activation_checkpointing_enable`` (in older releases ``gradient_checkpointing_enable``) comes down to:
        all layers are recomputed, or none."""
        if every_n_layers != 1:
            raise ValueError(
                f"every_n_layers: expected 1, a linnet decoder recomputes all layers, got {every_n_layers}"
            )
        if getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func) is not checkpoint:
            raise ValueError("offload: expected False, a decoder keeps the inputs of its layers where they are")
        self.model.gradient_checkpointing = enable

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what neither the constructor nor a checkpoint has set (missing weights, buffers that are not saved)."""
        tensors = [x for x in self._tensors() if not x.is_meta]
        kept = [(x, x.clone()) for x in tensors if getattr(x, "_is_hf_initialized", False)]
        if len(kept) < len(tensors):
            self.model.reset_parameters()
            for x, value in kept:
                x.copy_(value)

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> Any:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the decoder's configuration follows."""
        result = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = dataclasses.replace(self.model.config, vocab_size=result.num_embeddings)
        self.config.config = self.model.config.to_dict()
        return result

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: the state of this model is of constant size; leave it out, got "
                f"{generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache is not False and model_kwargs.get(_CACHE) is None:
            model_kwargs[_CACHE] = StateCache()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token, and the loss when there are labels.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask, position_ids, cu_seq_lens_q: see :func:`packing`.
            cache: state to go on from, under its old name ``past_key_values`` too; it is updated.
            labels: int64 ``[B, T]``, -100 is not counted.
            use_cache: return the cache (default: the config's, except in training).
            logits_to_keep: only those of the last so many positions (with 1, of the last token of each row), or at
                these indices; 0 keeps all.
            return_dict: a tuple when False (default: the config's).
            kwargs: ``num_items_in_batch`` and other arguments of the loss.

        Raises:
            ValueError: an argument that a recurrent decoder cannot take, or a cache of another kind.
        """
        cache = past_key_values if cache is None else cache
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds: expected token ids in input_ids, a linnet decoder takes no embeddings")
        if output_hidden_states or output_attentions:
            raise ValueError("output_hidden_states, output_attentions: a linnet decoder returns neither")
        if cache is not None and not isinstance(cache, StateCache):
            raise ValueError(f"cache: expected a StateCache, got {type(cache).__name__}")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        state = None if cache is None else cache.state
        layout = packing(input_ids, attention_mask, position_ids, cu_seq_lens_q, continued=state is not None)
        a_row_each = layout.segments is None or layout.kept is not None
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and a_row_each and labels is None
        last = last and (layout.segments is None or min(layout.segments.lengths) > 0)
        out = self.model(layout.pack(input_ids), state, layout.segments, last_only=last)
        if use_cache and a_row_each:
            cache = StateCache() if cache is None else cache
            cache.state, cache.seen = out.state, cache.seen + input_ids.shape[1]
        logits = out.logits if last else layout.unpack(out.logits, input_ids)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            if layout.kept is not None:  # nothing was read before the first token behind padding: nothing predicts it
                labels = labels.clone()
                labels[:, 1:].masked_fill_(~layout.kept[:, :-1], -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.model.config.vocab_size, **kwargs)
            if self.training:
                count = kwargs.get("num_items_in_batch")  # of a whole step: each part adds its share
                goals = labels[:, 1:]
                own = (goals != -100).sum()
                share = 1.0 if count is None else own / count
                loss = loss + share * out.aux_loss
                if self.model.config.z_loss:
                    total = self.model.z_loss(at_least_fp32(logits[:, :-1]), goals)
                    loss = loss + total / (own if count is None else count)
        if return_dict is None:
            return_dict = self.config.return_dict
        held: dict[str, Any] = {_CACHE: cache if use_cache else None}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **held)
        return result.to_tuple() if return_dict is False else result


def fast_tokenizer(folder: str | Path, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a model or run folder for transformers, padding on the left, with the end-of-document token as
    ``eos``, ``bos`` and padding; a converted model has the tokens of its makers instead, as far as they named them, and
    their chat template. Texts are encoded without ``bos``, unless the file of the tokenizer itself puts it there.

    Args:
        folder: the folder.
        options: others of ``PreTrainedTokenizerFast``, such as ``padding_side``.

    Raises:
        FileNotFoundError: the folder has none.
    """
    folder = find_model(folder)
    tokenizer = load_tokenizer(folder)
    backend = tokenizer.backend
    begin, end = (backend.id_to_token(i) for i in (tokenizer.begin, tokenizer.end))
    given = {"bos_token": begin, "eos_token": end, "pad_token": end, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(given | _source_settings(folder, backend) | options))


def _source_settings(folder: Path, backend: Any) -> dict[str, Any]:
    """What the makers of a converted model said of its tokenizer beside its ``tokenizer.json``."""
    said = read_settings(folder / f"{SOURCE}{TOKENIZER_SETTINGS_FILE}")
    found = {name: said.get(name) for name in ("chat_template", "model_max_length")}
    template = folder / f"{SOURCE}{CHAT_TEMPLATE_FILE}"
    if template.is_file():
        found["chat_template"] = template.read_text(encoding="utf-8")
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = said.get(name)
        token = token.get("content") if isinstance(token, dict) else token  # as older releases wrote them
        found[name] = token if isinstance(token, str) and backend.token_to_id(token) is not None else None
    return {name: x for name, x in found.items() if x is not None}


class FolderTokenizer(PreTrainedTokenizerFast):
    """What ``AutoTokenizer`` takes for a model of linnet: :func:`fast_tokenizer` where the folder holds linnet's own
    file, and transformers' where ``save_pretrained`` of a tokenizer has written there."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path
        own = isinstance(name, (str, os.PathLike)) and Path(name, TOKENIZER_FILE).is_file()
        if own and not Path(name, TOKENIZER_SETTINGS_FILE).is_file():
            sides = ("padding_side", "truncation_side", "model_max_length")
            return fast_tokenizer(Path(name), **{key: kwargs[key] for key in sides if key in kwargs})
        return PreTrainedTokenizerFast.from_pretrained(name, *args, **kwargs)


AutoConfig.register(MODEL_TYPE, LinnetConfig, exist_ok=True)
AutoModelForCausalLM.register(LinnetConfig, LinnetForCausalLM, exist_ok=True)
AutoTokenizer.register(LinnetConfig, fast_tokenizer_class=FolderTokenizer, exist_ok=True)
