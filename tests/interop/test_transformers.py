"""Decoders as models of the transformers library: generation, saving, training, adapters."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from forked import free_port, need_gpus, surroundings
from linnet.mixers import mixers
from linnet.models import Decoder, DecoderConfig
from linnet.models.io import atomic_folder, write_checkpoint
from linnet.ops.core import state_bytes
from linnet.tasks import ByteTokenizer

transformers = pytest.importorskip("transformers", reason="needs linnet[hf]")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # libraries that are not ours warn about themselves
]

VOCAB = 40
PURE = [
    "gla(num_heads=2)",
    "hgrn2(head_dim=8)",
    "gated_deltanet(num_heads=2, head_dim=8)",
    "mamba2(head_dim=8, state_dim=8)",
]
HYBRID = ["kda(num_heads=2, head_dim=8)", "attention(num_heads=2)", "attention(num_heads=2, window=5)"]
MLA = ["mla(num_heads=2, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=6, rope=True)", "retnet(num_heads=2)"]
PATTERNS = {"pure": PURE, "hybrid": HYBRID, "mla": MLA}


def config(pattern, **options):
    defaults = {"vocab_size": VOCAB, "d_model": 16, "num_layers": len(pattern), "mixers": pattern, "init_std": 0.3}
    return DecoderConfig(**{**defaults, "mlp_hidden": 16, **options})


def model(pattern, **options):
    from linnet.interop.transformers import LinnetForCausalLM

    torch.manual_seed(0)
    return LinnetForCausalLM.wrap(Decoder(config(pattern, **options)).eval())


def prompts():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, VOCAB, (n,), generator=generator) for n in (9, 4, 1)]
    ids = torch.stack([torch.nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    return rows, ids, torch.stack([torch.arange(9) >= 9 - len(row) for row in rows]).long()


def greedy(decoder, row, count):
    """By recomputing everything at every token."""
    for _ in range(count):
        row = torch.cat([row, decoder(row[None]).logits[0, -1:].argmax(-1)])
    return row[-count:]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@torch.no_grad()
def test_generation_is_recomputation(pattern):
    lm = model(pattern)
    rows, ids, mask = prompts()
    expected = [greedy(lm.model, row, 8) for row in rows]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    out = lm.generate(ids, attention_mask=mask, **options)
    torch.testing.assert_close(out[:, 9:], torch.stack(expected))
    for row, tokens in zip(rows, expected, strict=True):
        torch.testing.assert_close(lm.generate(row[None], **options)[0, len(row) :], tokens)
    torch.testing.assert_close(lm.generate(ids, attention_mask=mask, use_cache=False, **options), out)
    torch.testing.assert_close(lm.generate(ids, attention_mask=mask, prefill_chunk_size=4, **options), out)


@torch.no_grad()
def test_beams_and_sampling_do_not_need_the_cache():
    lm = model(HYBRID)
    _, ids, mask = prompts()
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(
                lm.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, use_cache=use_cache, **options)
            )
        torch.testing.assert_close(*results)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache():
    lm = model(HYBRID)
    _, ids, mask = prompts()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first = lm.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    cache = getattr(first, "cache", None) or first.past_key_values
    more = torch.randint(1, VOCAB, (3, 5), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([mask, torch.ones(3, 9, dtype=torch.long)], 1)
    whole = lm.generate(ids, attention_mask=mask, **options)
    for again in (cache.clone(), cache):  # twice from one cache
        name = "cache" if hasattr(first, "cache") else "past_key_values"
        torch.testing.assert_close(lm.generate(ids, attention_mask=mask, **{name: again}, **options), whole)
    with pytest.raises(NotImplementedError, match="rolled back"):
        cache.crop(-1)


@torch.no_grad()
def test_the_cache_of_a_recurrent_model_is_of_constant_size():
    lm = model(PURE)
    sizes = []
    for length in (5, 50):
        out = lm(torch.ones(2, length, dtype=torch.long), use_cache=True)
        sizes.append(state_bytes(out[1].state))
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_padding_and_packing_are_segments():
    from linnet.interop.transformers import packing

    lm = model(HYBRID)
    rows, ids, mask = prompts()
    alone = [lm(row[None]).logits[0] for row in rows]
    left = lm(ids, attention_mask=mask).logits
    flipped = torch.stack([torch.nn.functional.pad(row, (0, 9 - len(row))) for row in rows])
    right = lm(flipped, attention_mask=mask.flip(1)).logits
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    bounds = torch.tensor([0, 9, 13, 14])
    by_positions = lm(packed, position_ids=positions).logits[0]
    by_bounds = lm(packed, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9).logits[0]
    for i, expected in enumerate(alone):
        torch.testing.assert_close(left[i, 9 - len(expected) :], expected)
        torch.testing.assert_close(right[i, : len(expected)], expected)
        torch.testing.assert_close(by_positions[bounds[i] : bounds[i + 1]], expected)
    torch.testing.assert_close(by_bounds, by_positions)
    assert left[1, :5].count_nonzero() == 0
    with pytest.raises(ValueError, match="attention_mask: expected"):
        packing(ids, torch.ones(3, 1, 9, 9))
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        packing(ids, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="inputs_embeds"):
        lm(inputs_embeds=torch.zeros(1, 2, 16))


def test_the_loss_is_the_decoders():
    lm = model(HYBRID, mlp="moe", num_experts=4, expert_hidden=8, z_loss=0.01).train()
    ids = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
    loss = lm(ids, labels=ids).loss
    torch.testing.assert_close(
        loss, lm.model.loss(ids[:, :-1], ids[:, 1:]), rtol=1e-3, atol=1e-3
    )  # router sees 7, not 6
    loss.backward()
    expected = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    newer = hasattr(lm, "activation_checkpointing_enable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.activation_checkpointing_enable() if newer else lm.gradient_checkpointing_enable()
    assert lm.model.gradient_checkpointing
    lm(ids, labels=ids).loss.backward()
    for name, p in lm.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    left = lm(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(left, loss)
    if newer:
        for option, value in (("every_n_layers", 2), ("offload", True)):
            with pytest.raises(ValueError, match=f"{option}: expected"):
                lm.activation_checkpointing_enable(**{option: value})
    parts = [lm(row, labels=row, num_items_in_batch=12).loss for row in ids.split(1)]
    torch.testing.assert_close(sum(parts), loss, rtol=1e-3, atol=1e-3)


def test_a_saved_folder_is_one_layout_for_both(tmp_path):
    from linnet.interop.transformers import LinnetConfig, LinnetForCausalLM

    ids = prompts()[1]
    lm = model(PURE, tie_embeddings=True)
    lm.save_pretrained(tmp_path / "hf")
    expected = lm(ids).logits
    torch.testing.assert_close(Decoder.load(tmp_path / "hf")(ids).logits, expected)
    lm.config.return_dict = False
    assert torch.equal(lm(ids)[0], expected)
    lm.config.return_dict = True
    lm.save_pretrained(tmp_path / "large", max_shard_size="8KB")
    torch.testing.assert_close(Decoder.load(tmp_path / "large")(ids).logits, expected)
    index = tmp_path / "large" / "model.safetensors.index.json"
    next((tmp_path / "large").glob("*2-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model in .*model-00002-of-\d+.safetensors is missing"):
        Decoder.load(tmp_path / "large")
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: not a list of weight files \(KeyError"):
        Decoder.load(tmp_path / "large")
    lm.model.save(tmp_path / "run" / "model")
    for folder in (tmp_path / "hf", tmp_path / "run" / "model", tmp_path / "run"):
        again, report = LinnetForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(again(ids).logits, expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert isinstance(loaded, LinnetForCausalLM) and loaded.dtype == torch.bfloat16
    assert loaded.model.config == lm.model.config
    assert LinnetConfig.from_pretrained(tmp_path / "run").hidden_size == 16
    fresh = transformers.AutoModelForCausalLM.from_config(LinnetConfig.of(lm.model.config))
    fresh.resize_token_embeddings(50)
    fresh.save_pretrained(tmp_path / "wide")
    assert Decoder.load(tmp_path / "wide").config.vocab_size == 50


def test_a_missing_weight_starts_as_its_mixer_says(tmp_path):
    from linnet.interop.transformers import LinnetForCausalLM

    pattern = ["mamba2(head_dim=8, state_dim=8)", "softmax_taylor(num_heads=2)"]
    decoder = Decoder(config(pattern))
    tensors = decoder.state_dict()
    del tensors["layers.0.mixer.D"], tensors["layers.0.mixer.dt_bias"]
    with atomic_folder(tmp_path / "m") as partial:
        write_checkpoint(partial, decoder.config.to_dict(), tensors)
    lm = LinnetForCausalLM.from_pretrained(tmp_path / "m")
    mixer = lm.model.layers[0].mixer
    assert bool((mixer.D == 1).all())
    assert bool((torch.nn.functional.softplus(mixer.dt_bias) < 0.11).all())
    for name, x in tensors.items():
        torch.testing.assert_close(lm.model.state_dict()[name], x, rtol=0, atol=0)
    ids = prompts()[1]
    decoder.load_state_dict(lm.model.state_dict())
    torch.testing.assert_close(lm(ids).logits, decoder.eval()(ids).logits)  # buffers that are not saved are right


def test_pipeline_of_a_trained_run_in_a_fresh_process(tmp_path):
    decoder = Decoder(config(["gla(num_heads=2)"], vocab_size=257)).eval()
    with atomic_folder(tmp_path / "run" / "model") as partial:
        write_checkpoint(partial, decoder.config.to_dict(), decoder.state_dict())
        ByteTokenizer().save(partial)
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM, pipeline
from linnet.interop.transformers import fast_tokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")
assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == 256
tokenizer = fast_tokenizer(sys.argv[1])
assert tokenizer("é\\n").input_ids == [195, 169, 10] and tokenizer.decode([195, 169, 10]) == "é\\n"
run = pipeline("text-generation", model=model, tokenizer=tokenizer)
texts = ["def", "a longer one"]
options = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
both = run(texts, batch_size=2, **options)
each = [run(text, **options) for text in texts]
print(json.dumps([both, each]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    both, each = json.loads(done.stdout.splitlines()[-1])
    for text, one, other in zip(("def", "a longer one"), both, each, strict=True):
        expected = greedy(decoder, torch.tensor(list(text.encode())), 6).tolist()
        assert one[0]["generated_token_ids"][-6:] == expected
        assert other[0]["generated_token_ids"][-6:] == expected


def test_auto_tokenizer_of_a_folder(tmp_path):
    from linnet.interop.transformers import fast_tokenizer
    from linnet.tasks import load_tokenizer

    lm = model(["gla(num_heads=2)"], vocab_size=257)
    lm.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    assert (tokenizer.padding_side, tokenizer("é").input_ids) == ("left", [195, 169])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side="right").padding_side == "right"
    tokenizer.save_pretrained(tmp_path)  # in transformers' layout, which linnet reads too
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path)
    settings = {"bos_token_id": 257, "eos_token_id": [256, 257], "pad_token_id": 256}  # as convert writes them
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.eos_token_id, loaded.pad_token_id) == ([256, 257], 256)
    told = transformers.GenerationConfig(eos_token_id=5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, generation_config=told)
    assert loaded.generation_config.eos_token_id == 5
    assert fast_tokenizer(tmp_path).bos_token == "<s>"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("é").input_ids == [195, 169]
    assert load_tokenizer(tmp_path).encode("é".encode()).tolist() == [195, 169]


def test_other_folders_are_refused(tmp_path):
    from linnet.interop.transformers import LinnetForCausalLM

    lm = model(["gla(num_heads=2)"])
    lm.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format_version: expected 1, got 99; these files were written by linnet 0"):
        LinnetForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="decoder: expected a Decoder, got LinnetForCausalLM"):
        LinnetForCausalLM.wrap(lm)


def test_trainer(tmp_path):
    from linnet.models import parameter_groups

    class Trainer(transformers.Trainer):  # as in docs/interop.md
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                kind, options = self.get_optimizer_cls_and_kwargs(self.args)
                groups = parameter_groups(model or self.model, self.args.weight_decay, lr=options.pop("lr"))
                self.optimizer = kind(groups, **options)
            return self.optimizer

    lm = model(["gla(num_heads=2)", "s4d(state_size=4)"]).train()
    rows = [{"input_ids": [i % 7 + 1, i % 7 + 2] * 4} for i in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_steps=12, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.1,
    )  # fmt: skip
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = Trainer(lm, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    groups = [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert groups == [(1e-2, 0.1), (1e-2, 0.0), (1e-3, 0.0)]  # the last: steps and poles of s4d
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(Decoder.load(tmp_path / "saved").state_dict(), lm.model.state_dict())

    untrained = model(["gla(num_heads=2)", "s4d(state_size=4)"]).train()
    resumed = Trainer(untrained, arguments, train_dataset=rows, data_collator=collator)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))  # there is nothing left to train
    torch.testing.assert_close(untrained.state_dict(), lm.state_dict(), rtol=0, atol=0)
    untrained.load_state_dict(lm.state_dict())  # and by its own names


@pytest.mark.slow
def test_trainer_with_sharded_weights(device, tmp_path):
    if device.type != "cuda":
        pytest.skip("transformers shards on accelerators: --device cuda")
    need_gpus(device, 2)
    script, count = str(Path(__file__).with_name("trainer_processes.py")), 4 if torch.cuda.device_count() > 3 else 2
    many = [f"{Path(sys.executable).parent}/torchrun", "--nproc_per_node", str(count), "--master_port", free_port()]
    for name, command, rows in (("one", [sys.executable], 8), ("many", many, 8 // count)):
        (tmp_path / name).mkdir()
        seen = {**surroundings(device), **({"CUDA_VISIBLE_DEVICES": "0"} if name == "one" else {})}
        done = subprocess.run(
            [*command, script, str(tmp_path / name), str(rows)], capture_output=True, text=True, timeout=240, env=seen
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    one, many = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "many"))
    assert many == pytest.approx(one, rel=1e-5)
    one, many = (Decoder.load(tmp_path / name / "saved").state_dict() for name in ("one", "many"))
    for name, x in one.items():
        torch.testing.assert_close(many[name], x, rtol=1e-3, atol=1e-5)


def test_adapters_reach_every_projection(tmp_path):
    peft = pytest.importorskip("peft", reason="needs linnet[hf]")
    from linnet.interop.transformers import LinnetForCausalLM

    ids = prompts()[1]
    cases = [(name, dict(kind.card.examples[0]), {"mlp": "none"}) for name, kind in mixers().items()]
    moe = {"mlp": "moe", "num_experts": 4, "expert_hidden": 8, "shared_experts": 1, "shared_gate": True}
    for name, options, mlp in [*cases, ("gla", {"d_model": 16, "num_heads": 2}, moe)]:
        width = options.pop("d_model")
        torch.manual_seed(0)
        decoder = Decoder(config([{"name": name, **options}], d_model=width, num_layers=1, **mlp)).eval()
        if not any(isinstance(module, torch.nn.Linear) for module in decoder.layers.modules()):
            continue  # an adapter has nothing to attach to
        lm = LinnetForCausalLM.wrap(decoder)
        with torch.no_grad():
            for p in decoder.parameters():  # some factors start at zero, and what is before them is then not seen
                p.add_(0.1 * torch.randn_like(p))
            before = lm(ids[:, :5], use_cache=True)
            before = before.logits, lm(ids[:, 5:6], past_key_values=before[1]).logits
        adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        found = {key for key, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        for layer in found:
            for key, module in adapted.named_modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.enable_adapters(key == layer)
            with torch.no_grad():
                after = adapted(ids[:, :5], use_cache=True)
                first = after.logits
                second = adapted(ids[:, 5:6], past_key_values=after[1]).logits
            assert (first - before[0]).abs().max() > 1e-6, (name, layer)
            assert (second - before[1]).abs().max() > 1e-6, (name, layer)


def test_adapters_are_saved_merged_and_trained(tmp_path):
    peft = pytest.importorskip("peft", reason="needs linnet[hf]")
    ids = torch.randint(1, VOCAB, (4, 12), generator=torch.Generator().manual_seed(6))
    lm = model(["gated_deltanet(num_heads=2, head_dim=8)", *MLA])
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    for name, p in adapted.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = adapted(ids).logits
    again = peft.PeftModel.from_pretrained(
        model(["gated_deltanet(num_heads=2, head_dim=8)", *MLA]), tmp_path / "adapter"
    )
    torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=0, atol=0)
    expected = adapted.double()(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected)


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes", "bitsandbytes-4"])
@torch.no_grad()
def test_quantised_matrices_and_exact_gates(library, tmp_path):
    from linnet.interop.transformers import LinnetForCausalLM

    pytest.importorskip(library.partition("-")[0], reason="needs torchao or bitsandbytes, of no extra of linnet")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif library == "bitsandbytes":
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    torch.manual_seed(0)
    mixers = ["gated_deltanet(num_heads=2, head_dim=32)", "mla(num_heads=2, kv_rank=32, nope_dim=16, rope_dim=16)"]
    options = {"mixers": mixers, "mlp_hidden": 64, "mlp": ["moe", "swiglu"], "num_experts": 4, "init_std": 0.1}
    decoder = Decoder(DecoderConfig(vocab_size=64, d_model=64, num_layers=2, **options)).eval()
    decoder.save(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=quantization)
    assert isinstance(model, LinnetForCausalLM)
    exact = {name: p for name, p in model.named_parameters() if type(p) is torch.nn.Parameter}
    assert {"model.lm_head.weight", "model.layers.0.mixer.a_proj.weight", "model.layers.0.mlp.router.weight"} <= {
        *exact
    }
    assert sum("proj.weight" in name for name in exact) == 2  # the two gates
    ids = torch.randint(64, (2, 9))
    expected = decoder(ids).logits
    error = (model(ids).logits - expected).abs().max() / expected.std()
    assert error < (1.0 if library.endswith("4") else 0.15)
    ways = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*ways)
    model.save_pretrained(tmp_path / "q")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
