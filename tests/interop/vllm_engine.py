"""vLLM's own engine on a linnet decoder, on the CPU, against :func:`linnet.generate`; the plug-in is found by its entry
point. Prompts of one token, of several parts, and with a beginning that is cached; pages that others have used;
requests that have to give their pages away and begin again."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

import pytest
import torch

from linnet.mixers import build_mixer
from linnet.models import Decoder, DecoderConfig, generate
from linnet.ops.core import map_state, state_tensors
from linnet.tasks import ByteTokenizer

ATTENTION = "attention(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True"
MIXERS = [
    "gla(num_heads=2)", f"{ATTENTION})", "mamba2(head_dim=8, state_dim=8)", f"{ATTENTION}, window=9)",
    "gated_deltanet(num_heads=2, head_dim=8)", "rwkv7(head_dim=8)", "retnet(num_heads=2)", "aaren(num_heads=2)",
    "slstm(num_heads=2)",
]  # fmt: skip
NEW = 12


def refuses(text: str):
    return pytest.raises(ValueError, match=re.escape(text))


def check_rows() -> None:
    from linnet.interop.vllm.model import Row

    for spec in MIXERS[::2]:
        mixer = build_mixer(spec, 16)
        row, state = Row(mixer), map_state(lambda x: torch.rand(x.shape).to(x.dtype), mixer.init_state(3))
        pages = torch.full((3, row.size + 32), 255, dtype=torch.uint8)
        for held, x in zip(row.views(pages), state_tensors(state), strict=True):
            held.copy_(x)
        for held, x in zip(row.views(pages), state_tensors(state), strict=True):
            assert torch.equal(held, x) and held.dtype == x.dtype
        assert bool((pages[:, row.size :] == 255).all())


def check_configs() -> None:
    from linnet.interop.vllm.config import served_mixers

    shape = {"vocab_size": 8, "d_model": 16, "num_layers": 2}
    mla = "mla(num_heads=2, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=6)"
    with refuses("the state of mla grows"):
        served_mixers(DecoderConfig(mixers=["gla", mla], **shape))
    heads = ["attention(num_heads=2)", "attention(num_heads=4)"]
    with refuses("got [(2, 8), (4, 4)]"):
        served_mixers(DecoderConfig(mixers=heads, **shape))


def check_padding() -> None:
    """A captured step has a fixed number of rows: those without a request take page 0, which belongs to none."""
    from linnet.interop.vllm import model as served

    mixer = build_mixer("gla(num_heads=2)", 16)
    layer = served._Recurrent(mixer, served.Row(mixer).size, "layer", {})
    layer.states = layer.row.views(torch.zeros(4, layer.size, dtype=torch.uint8))
    x, pages, outputs = torch.randn(1, 2, 16), torch.tensor([3, 1]), []
    for padding in (0, 3):
        layer.begin(pages)
        rows = torch.cat([pages, pages.new_zeros(padding)])
        batch = served.Batch(0, 0, len(rows), len(rows), None, None, rows)  # type: ignore[arg-type]
        served.get_forward_context = lambda batch=batch: SimpleNamespace(attn_metadata={"layer": batch})
        y, _ = layer(torch.cat([x, torch.randn(1, padding, 16)], 1))
        outputs.append((y[:, :2], [held[pages] for held in layer.states]))
    torch.testing.assert_close(*outputs)


def check_processes() -> None:
    from linnet.interop.vllm.model import LinnetForCausalLM

    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, name: 2}
        with refuses(f"{name}: expected 1, got 2"):
            LinnetForCausalLM(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(**sizes)))


def preempted(folder: str) -> None:
    """More text than there are pages for; a prompt as a text, read by the tokenizer of the folder."""
    torch.manual_seed(0)
    mixers = ["gla(num_heads=2)", "attention(num_heads=2, head_dim=32)"]
    shape = {"vocab_size": 257, "d_model": 32, "num_layers": 2, "mlp_hidden": 32, "init_std": 0.2}
    decoder = Decoder(DecoderConfig(mixers=mixers, **shape)).eval()
    decoder.save(folder)
    ByteTokenizer().save(folder)

    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="float32", max_model_len=256, max_num_batched_tokens=64, max_num_seqs=8, enforce_eager=True,
        gpu_memory_utilization=0.05, enable_prefix_caching=True, num_gpu_blocks_override=14, disable_log_stats=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (40, 50, 33, 60, 20)] + [[*b"def main("]]
    options = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    given = [{"prompt_token_ids": p} for p in prompts[:-1]]
    outputs = llm.generate([*given, "def main("], options, use_tqdm=False)
    expected = [generate(decoder, [p], max_new_tokens=100, temperature=0).tokens[0].tolist() for p in prompts]
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
    assert next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


def mixed(folder: str) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=64, d_model=32, num_layers=9, mixers=MIXERS, mlp_hidden=32, init_std=0.2)
    decoder = Decoder(config).eval()
    decoder.save(folder)
    ends = {"eos_token_id": [7, 31]}  # as convert writes them
    Path(folder, "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")

    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_batched_tokens=64, max_num_seqs=4,
        enforce_eager=True, gpu_memory_utilization=0.05, enable_prefix_caching=True, num_gpu_blocks_override=48,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(64, (n,), generator=generator).tolist() for n in (5, 150, 1, 33, 64, 1)]
    prompts.append([*prompts[1], 3, 4])
    options = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    expected = [generate(decoder, [p], max_new_tokens=NEW, temperature=0).tokens[0].tolist() for p in prompts]
    cached = 0
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], options, use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        cached += sum(o.num_cached_tokens for o in outputs)
    assert cached > 0

    several = SamplingParams(temperature=0, max_tokens=60, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], several, use_tqdm=False)
    stopped = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        longer = generate(decoder, [prompt], max_new_tokens=60, temperature=0).tokens[0].tolist()
        at = next((i for i, token in enumerate(longer) if token in ends["eos_token_id"]), None)
        assert list(output.outputs[0].token_ids) == longer[: None if at is None else at + 1]
        stopped |= set() if at is None else {longer[at]}
    assert stopped == set(ends["eos_token_id"])

    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    assert {name for name, _ in model.named_parameters()} == {f"model.{name}" for name in decoder.state_dict()}
    tensors = dict(decoder.state_dict())
    taken = model.load_weights((name, x + 1) for name, x in tensors.items())
    assert taken == {f"model.{name}" for name in tensors}
    assert all(torch.equal(x, tensors[name] + 1) for name, x in model.model.state_dict().items())
    tensors["other"] = tensors.pop("norm.weight")
    with refuses("missing norm.weight, unexpected other"):
        model.load_weights(tensors.items())
    check_rows()
    check_configs()
    check_padding()
    check_processes()


if __name__ == "__main__":
    {"mixed": mixed, "preempted": preempted}[sys.argv[2]](sys.argv[1])
    print("OK")
