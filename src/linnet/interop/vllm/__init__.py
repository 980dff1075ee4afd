"""linnet decoders as models of vLLM (extra ``vllm``): a plug-in that vLLM finds by itself where both are installed.

    vllm serve runs/default-small/model --max-model-len 32768

Requests are batched continuously, prompts read in parts and states kept by vLLM: a page of its cache holds the whole
state of a sequence in one layer, whatever the mixer, and the mixers run as they do everywhere else, by prefill and by
step. Softmax ``attention`` keeps its keys and values in vLLM's paged cache. See :mod:`linnet.interop.vllm.model`.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the architecture known; vLLM calls this in each of its processes, maybe more than once. The model itself is
    imported when one is loaded."""
    from transformers import AutoConfig, AutoTokenizer
    from vllm import ModelRegistry  # type: ignore[import-not-found, attr-defined]

    from linnet.interop.transformers import FolderTokenizer
    from linnet.interop.vllm.config import ServedConfig

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    AutoTokenizer.register(ServedConfig, fast_tokenizer_class=FolderTokenizer, exist_ok=True)
    ModelRegistry.register_model("LinnetForCausalLM", "linnet.interop.vllm.model:LinnetForCausalLM")
