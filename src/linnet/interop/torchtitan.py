"""Decoders as models of torchtitan (extra ``torchtitan``, 0.3), for pre-training with sharded weights.

Any preset is a configuration of this module:

    torchrun --nproc_per_node=8 -m torchtitan.train --module linnet.interop.torchtitan --config gla-340m \\
        --hf_assets_path tokenizer --dataloader.dataset c4 --training.seq_len 4096

and :func:`trainer_config` makes others, in a module of one's own. Parameters have the names they have in a linnet
folder, so that what torchtitan saves in "Hugging Face" format is read by :func:`save_model`, and a linnet folder by
``--checkpoint.initial_load_path FOLDER --checkpoint.initial_load_in_hf``.

Weights are replicated, sharded or both (FSDP2); layers are checkpointed and compiled as torchtitan says. Its tensor,
pipeline, context and expert parallelism are refused, and so are experts, whose losses its trainer does not see.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import TORCH_DTYPE_MAP, TrainingConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.trainer import Trainer

from linnet import presets
from linnet.models import Decoder, DecoderConfig, parameter_groups
from linnet.models.decoder import check_tensors
from linnet.ops import Segments
from linnet.training import allow_graphs

__all__ = ["LinnetAdapter", "LinnetModel", "parallelize", "save_model", "trainer_config"]


class LinnetModel(Decoder, BaseModel):
    """A decoder with the forward and the life cycle that torchtitan expects."""

    _skip_lm_head = False  # set by its chunked loss, which applies the head itself

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """Fields of a :class:`~linnet.DecoderConfig`, under ``decoder``."""

        decoder: dict[str, Any] = field(default_factory=dict)

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Refuse what this model cannot do.

            Raises:
                ValueError: a kind of parallelism, experts, or a loss, that are not supported; names it.
            """
            shape = DecoderConfig.from_dict(self.decoder)
            for name in ("tensor", "pipeline", "context", "expert"):
                degree = getattr(config.parallelism, f"{name}_parallel_degree")
                if degree > 1:
                    raise ValueError(
                        f"parallelism.{name}_parallel_degree: expected 1, got {degree}; linnet shards and replicates"
                    )
            if "moe" in ({shape.mlp} if isinstance(shape.mlp, str) else {*shape.mlp}):
                raise ValueError("decoder.mlp: expected no 'moe', torchtitan's loss does not see what balances experts")
            if shape.z_loss:
                raise ValueError(f"decoder.z_loss: expected 0, torchtitan's loss has no such term, got {shape.z_loss}")
            if type(config.loss).__qualname__.startswith("Chunked") and (shape.tie_embeddings or shape.logit_soft_cap):
                raise ValueError("loss: expected no chunks for a model with a tied head or a soft cap of its logits")
            if not config.training.disable_cuda_graphs:
                raise ValueError(
                    "training.disable_cuda_graphs: expected True, the boundaries of packed documents are read on the"
                    " host"
                )

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Number of parameters, and operations a token of a training step: 6 a parameter outside the embedding. The
            recurrences, and what attention adds, are not counted."""
            assert isinstance(model, Decoder)
            matrices = model.num_parameters(embeddings=False) + model.config.vocab_size * model.config.d_model
            return model.num_parameters(), 6 * matrices

    def __init__(self, config: LinnetModel.Config):
        Decoder.__init__(self, DecoderConfig.from_dict(config.decoder))

    def verify_module_protocol(self) -> None:
        """Its submodules are plain modules that initialise themselves."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Every parameter as on construction, sharded or not."""
        self.reset_parameters()

    def forward(  # type: ignore[override]
        self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None
    ) -> Tensor:
        """Logits ``[B, T, V]``; the input of the head under a chunked loss.

        Args:
            tokens: int64 ``[B, T]``.
            positions: ``[B, T]`` in the document of each token; one that begins again at 0 begins from an empty state.
            attention_masks: nothing, which is what torchtitan makes for a model with none of its attention.
        """
        if attention_masks is not None:
            raise ValueError("attention_masks: expected None, documents are told apart by positions")
        segments, shape = None, tokens.shape
        if positions is not None:
            starts = (positions == 0).expand(shape)
            if bool(starts[:, 1:].any()):
                starts = starts.index_fill(1, torch.zeros(1, dtype=torch.int64, device=starts.device), True)
                segments = Segments.from_document_ids(starts.reshape(1, -1).long().cumsum(1))
                tokens = tokens.reshape(1, -1)
        if self._skip_lm_head:
            x, _, _ = self._hidden(tokens, None, segments)
        else:
            x = Decoder.forward(self, tokens, None, segments).logits
        return x.view(*shape, -1)


def parallelize(
    model: LinnetModel,
    *,
    parallel_dims: Any,
    training: TrainingConfig,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> LinnetModel:
    """Checkpoint, compile and shard the layers: torchtitan's ``parallelize_fn``.

    As everywhere under FSDP2, layers compute with parameters in ``training.mixed_precision_param``, those of gates too.
    """
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        allow_graphs(len(model.layers))
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
    axis = "fsdp" if parallelism.spmd_backend == "partial_dtensor" else "dp_shard"
    mesh = parallel_dims.get_mesh(["dp_replicate", axis] if parallel_dims.dp_replicate_enabled else [axis])
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if model.lm_head is not None:  # a module of its own, for the chunked loss
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    disable_fsdp_gradient_division(model)  # the trainer divides by the tokens of all processes
    return model


class LinnetAdapter(StateDictAdapter):
    """Names are those of a linnet folder on both sides."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        if from_quantized:
            raise ValueError("from_quantized: expected False, got True")
        return HuggingFaceStorageReader(path)


def _adamw(config: DecoderConfig, lr: float, weight_decay: float) -> OptimizersContainer.Config:
    """AdamW with the groups of ``linnet train``: decays and gates spared, steps and poles at rates of their own."""
    model = Decoder.meta(config)
    names = {p: name for name, p in model.named_parameters()}
    *others, rest = sorted(parameter_groups(model, weight_decay, lr=lr), key=lambda g: (g["lr"], g["weight_decay"]))
    general = {name: re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in names.values()}
    groups: dict[str, set[int]] = {}  # a general name to the groups that hold it
    for i, group in enumerate([*others, rest]):
        for p in group["params"]:
            groups.setdefault(general[names[p]], set()).add(i)

    def pattern(params: list[nn.Parameter]) -> str:
        found = set()
        for name in (names[p] for p in params):  # of all layers at once, where all of them are in this group
            escaped = re.escape(general[name] if len(groups[general[name]]) == 1 else name).replace(r"\*", r"\d+")
            found.add(re.sub(r"^(layers\\\.[^.]*\.)", r"\1(?:_checkpoint_wrapped_module\.)?", escaped))
        return f"^(?:{'|'.join(sorted(found))})$"

    def adamw(pattern: str, group: dict[str, Any]) -> ParamGroupConfig:
        options = {"lr": group["lr"], "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": group["weight_decay"]}
        return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=options)

    return OptimizersContainer.Config(
        param_groups=[*(adamw(pattern(group["params"]), group) for group in others), adamw(".*", rest)]
    )


def trainer_config(
    model: str | DecoderConfig, *, lr: float = 8e-4, weight_decay: float = 0.1, **fields: Any
) -> Trainer.Config:
    """The configuration of torchtitan's trainer for a decoder.

    Args:
        model: name of a preset, or the configuration.
        lr, weight_decay: of AdamW, which leaves out what ``linnet train`` does.
        fields: others of ``torchtitan.trainer.Trainer.Config``, such as ``training`` and ``dataloader``; they win.

    Raises:
        ValueError: there is no such preset.
    """
    config = presets.load(model) if isinstance(model, str) else model
    spec = ModelSpec(
        name="linnet",
        flavor=model if isinstance(model, str) else "decoder",
        model=LinnetModel.Config(decoder=config.to_dict()),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=LinnetAdapter,
    )
    defaults = {
        "model_spec": spec,
        "loss": CrossEntropyLoss.Config(global_vocab_size=config.vocab_size),
        "optimizer": _adamw(config, lr, weight_decay),
        "training": TrainingConfig(disable_cuda_graphs=True),
    }
    return Trainer.Config(**{**defaults, **fields})


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """Every preset is a function of this module: ``--config gla-340m``."""
    if name.partition("(")[0] not in presets.names():
        raise AttributeError(f"{__name__!r} has no attribute {name!r}")
    return lambda: trainer_config(name)


def save_model(source: str | Path, target: str | Path, model: str | DecoderConfig, *, overwrite: bool = False) -> None:
    """Make a linnet folder of what ``--checkpoint.last_save_in_hf`` wrote.

    Args:
        source: the folder with ``*.safetensors``.
        target: folder to write.
        model: name of the preset, or the configuration.
        overwrite: replace ``target`` if it holds something.

    Raises:
        FileNotFoundError: there are no ``*.safetensors``.
        FileExistsError: ``target`` holds something and ``overwrite`` is false.
        ValueError: these are not the weights of that model.
    """
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"source: no *.safetensors in {source}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    decoder = Decoder.meta(presets.load(model) if isinstance(model, str) else model)
    check_tensors(str(source), decoder.state_dict(), tensors)
    decoder.save(target, overwrite=overwrite, state_dict=tensors)
