"""Checkpoints of other libraries: the same logits, nothing lost on the way back, wrong ones refused by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from linnet.interop.convert import convert
from linnet.models import Decoder, DecoderConfig
from linnet.ops import Segments
from linnet.tasks import ByteTokenizer, load_tokenizer, train_bpe

tokenizers = pytest.importorskip("tokenizers", reason="needs linnet[hf]")
transformers = pytest.importorskip("transformers", reason="needs linnet[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # libraries that are not ours warn about themselves

BASE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA = {"linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
CASES = {
    "llama": ("Llama", {"rope_theta": 500.0, "tie_word_embeddings": True}),
    "llama-3.1": (
        "Llama",
        {
            "head_dim": 16, "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 8, **DELTA, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_next-dense": ("Qwen3Next", {"head_dim": 8, **DELTA, "num_experts": 0}),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "linear_num_value_heads": 2, "rms_norm_eps": 1e-4}),
    "olmo_hybrid-nope": ("OlmoHybrid", {**DELTA, "rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    "kimi_linear": (
        "KimiLinear",
        {
            **MOE, "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 2, "qk_nope_head_dim": 4,
            "v_head_dim": 6, "num_local_experts": 4, "linear_head_dim": 4, "linear_num_heads": 2, "n_group": 1,
            "layer_types": ["linear_attention", "full_attention"] * 2, "q_lora_rank": 6,
        },
    ),
    "mamba": ("Mamba", {"state_size": 8, "time_step_rank": 3, "intermediate_size": 32}),
    "xlstm": ("xLSTM", {"num_heads": 2, "num_blocks": 4, "ffn_proj_factor": 1.3, "autocast_kernel_dtype": "float32"}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"intermediate_size": 48, "lru_width": 24, "attention_window_size": 5, "logits_soft_cap": 5.0},
    ),
    "mamba2": ("Mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 2, "norm_before_gate": True}),
}  # fmt: skip


def original(name, options, folder):
    """A tiny model of the original class with random weights of a size that matters, saved."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if "e_score_correction_bias" in key:
                buffer.copy_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_same_logits_and_nothing_lost(case, tmp_path):
    name, options = CASES[case]
    kind = case.partition("-")[0]
    model = original(name, options, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "theirs" / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.add_special_tokens(["</s>", "<|user|>", "<|eot|>"])
    words.save(str(tmp_path / "theirs" / "tokenizer.json"))
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (done.source, done.target, done.ignored) == (kind, "linnet", [])
    tokenizer = load_tokenizer(tmp_path / "ours")
    assert (tokenizer.begin, tokenizer.ends) == (2, (2, 4))  # token 1, with which its texts would begin, is a word
    told = transformers.GenerationConfig.from_pretrained(tmp_path / "ours").to_diff_dict()  # as vLLM reads it
    assert (told["bos_token_id"], told["eos_token_id"], told["pad_token_id"]) == (2, [2, 4], 2)
    decoder = Decoder.load(tmp_path / "ours")
    ids = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = model(ids, use_cache=False).logits
    assert expected.std() > 0.1
    # Either is about 1e-5 of the largest logit from what float64 gives: the recurrences amplify their rounding.
    close = {"rtol": 0, "atol": 4e-5 * float(expected.abs().max())}
    torch.testing.assert_close(decoder(ids).logits, expected, **close)
    state = decoder(ids[:, :4]).state  # and from a state
    torch.testing.assert_close(decoder(ids[:, 4:], state).logits, expected[:, 4:], **close)
    packed = decoder(ids.view(1, -1), segments=Segments.from_lengths([11, 11])).logits
    torch.testing.assert_close(packed.view_as(expected), expected, **close)

    decoder.save(tmp_path / "own")  # which knows nothing of theirs
    convert(tmp_path / "own", tmp_path / "out", to=kind)
    torch.testing.assert_close(
        type(model).from_pretrained(tmp_path / "out")(ids, use_cache=False).logits, expected, **close
    )

    back = convert(tmp_path / "ours", tmp_path / "back", to=kind)
    for beside in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / beside).read_bytes() == (tmp_path / "theirs" / beside).read_bytes()
    assert back.parameters >= done.parameters - 40 * 16
    again, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tolerance = 2**-23 if kind in ("qwen3_next", "recurrent_gemma") else 0  # weights of norms go through 1 + w
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=tolerance)
    kept, config = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "back"))
    assert {key: config.get(key) for key in kept if key != "transformers_version"} == {
        key: value for key, value in kept.items() if key != "transformers_version"
    }
    convert(tmp_path / "back", tmp_path / "twice")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "twice"))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "config", "ends"),
    [(None, 3, 3), ([2, 4], 3, [2, 4]), (None, -1, None), (-1, -1, None), (None, None, None)],  # -1: as some write none
)
def test_without_a_tokenizer_texts_end_as_the_files_say(settings, config, ends, tmp_path):
    original("Llama", {}, tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"eos_token_id": settings}))
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": config}))
    convert(tmp_path / "theirs", tmp_path / "ours")
    told = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert (told["bos_token_id"], told.get("eos_token_id")) == (1, ends)
    assert told.get("pad_token_id") == (ends[0] if isinstance(ends, list) else ends)


def bpe():
    return train_bpe([b"some text, and more of it, and still more text"], 270)


def test_a_converted_chat_model_keeps_its_template_and_tokens(tmp_path):
    import linnet.interop.transformers  # noqa: F401

    original("Qwen3", {"vocab_size": 280}, tmp_path / "theirs")
    backend = bpe().backend
    backend.add_special_tokens(["<|im_end|>", "<s>"])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    theirs.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    theirs.save_pretrained(tmp_path / "theirs")
    begin, end = theirs.bos_token_id, theirs.eos_token_id
    settings = {"bos_token_id": begin, "eos_token_id": [end, 0]}  # before what config.json says, token 1
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").begin == begin
    chat = [{"role": "user", "content": "more"}]
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.padding_side) == (begin, end, 0, "left")
    assert ours.apply_chat_template(chat)["input_ids"] == theirs.apply_chat_template(chat)["input_ids"]

    file = tmp_path / "ours" / "source_tokenizer_config.json"  # as older releases wrote it, and a token it has not
    said = {"chat_template": "old", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"}
    file.write_text(json.dumps(said))
    (tmp_path / "ours" / "source_chat_template.jinja").unlink()
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (ours.chat_template, ours.eos_token_id, ours.pad_token_id, len(ours)) == ("old", end, 0, len(theirs))
    ours.chat_template = "new"
    ours.save_pretrained(tmp_path / "ours")  # what the user says wins
    convert(tmp_path / "ours", tmp_path / "back", to="qwen3")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == "new"


@pytest.mark.parametrize("kind", ["byte", "bpe", None])
@pytest.mark.parametrize("to", ["llama", "olmo_hybrid"])  # whose usual end and padding are others
def test_a_model_of_ours_takes_its_tokenizer_along(kind, to, tmp_path):
    name, options = CASES[to]
    original(name, {**options, "vocab_size": 280}, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "like")
    Decoder.load(tmp_path / "like").save(tmp_path / "m")  # knows nothing of theirs
    if kind is not None:
        (ByteTokenizer() if kind == "byte" else bpe()).save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", to=to)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    end = {"byte": 256, "bpe": 0, None: None}[kind]
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id) == (end, end)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (None, end)
    if kind is None:
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, end, end)
    text = "a längere text\n"
    ids = load_tokenizer(tmp_path / "m").encode(text.encode()).tolist()
    assert tokenizer(text).input_ids == ids and tokenizer.decode(ids) == text
    convert(tmp_path / "out", tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert (again.encode(text.encode()).tolist(), again.begin, again.ends) == (ids, end, (end,))


@pytest.mark.parametrize(
    ("case", "field", "tied"), [("mamba", "tie_word_embeddings", True), ("olmo_hybrid", "rope_parameters", False)]
)
@torch.no_grad()
def test_fields_that_are_not_there_have_the_defaults_of_the_class(case, field, tied, tmp_path):
    name, options = CASES[case]
    model = original(name, {**options, "tie_word_embeddings": tied}, tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    said = json.loads(file.read_text())
    del said[field]
    file.write_text(json.dumps(said))
    convert(tmp_path / "theirs", tmp_path / "ours")
    decoder, ids = Decoder.load(tmp_path / "ours"), torch.randint(40, (2, 11))
    assert decoder.config.tie_embeddings == tied
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(decoder(ids).logits, expected, rtol=0, atol=4e-5 * float(expected.abs().max()))


def test_weights_are_those_that_transformers_reads(tmp_path):
    model = original("Llama", {}, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    for folder in ("theirs", "shards"):
        save_file({"tok_embeddings.weight": torch.zeros(40, 16)}, tmp_path / folder / "consolidated.safetensors")
        convert(tmp_path / folder, tmp_path / f"ours_{folder}")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    one, many = (Decoder.load(tmp_path / f"ours_{folder}").state_dict() for folder in ("theirs", "shards"))
    torch.testing.assert_close(one, many, rtol=0, atol=0)


def test_the_package_of_tokenizers_is_not_needed(monkeypatch, tmp_path):
    original("Llama", {"vocab_size": 280}, tmp_path / "theirs")
    bpe().save(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="llama")
    for folder in ("ours", "back"):
        written = (tmp_path / folder / "tokenizer.json").read_bytes()
        assert written == (tmp_path / "theirs" / "tokenizer.json").read_bytes()
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_wrong_checkpoints_are_refused_by_name(tmp_path):
    original("Llama", {}, tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")

    def attempt(changes, message, **config):
        file = tmp_path / "theirs" / "config.json"
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | config))
        found = {key: value for key, value in (weights | changes).items() if value is not None}
        save_file(found, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "theirs", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        file.write_text(before)

    key = "model.layers.1.self_attn.k_proj.weight"
    attempt({key: None}, f"missing {key}")
    attempt({"model.layers.1.self_attn.k_proj.bias": torch.zeros(8)}, "unexpected model.layers.1.self_attn.k_proj.bias")
    attempt({key: torch.zeros(4, 16)}, r"layers.1.mixer.k_proj.weight of shape \[4, 16\] instead of \[8, 16\]")
    attempt({}, "missing model.layers.4", num_hidden_layers=5)
    attempt({}, "rotary positions of type 'yarn'", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    attempt({}, "the field 'low_freq_factor' is missing", rope_parameters={"rope_type": "llama3", "factor": 8.0})
    attempt({}, "attention_bias = True is not supported", attention_bias=True)
    attempt({}, "model_type: expected one of llama, .* got 'gpt2'", model_type="gpt2")
    settings = tmp_path / "theirs" / "generation_config.json"
    settings.write_text('{"eos_token_id": [2, 40]}')
    where = "eos_token_id: expected a token id or a list of them, from 0 to 39, got"
    attempt({}, rf"generation_config.json: {where} \[2, 40\]")
    settings.unlink()
    attempt({}, f"config.json: {where} -2", eos_token_id=-2)
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    attempt({}, "tokenizer.json is not a tokenizers JSON file")
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    attempt({}, "'rwkv' is RWKV-4, for which linnet has no mixer", model_type="rwkv")
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    for target in ("theirs", "."):
        with pytest.raises(ValueError, match="target: expected a folder that does not hold the source"):
            convert(tmp_path / "theirs", tmp_path / target, overwrite=True)
    assert (tmp_path / "theirs" / "config.json").is_file()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_a_decoder_of_another_shape_is_refused(tmp_path):
    mixers = ["attention(num_heads=2, qk_norm=True)", "gla(num_heads=2)"]
    config = DecoderConfig(vocab_size=40, d_model=16, num_layers=2, mixers=mixers)
    Decoder(config).save(tmp_path / "m")
    with pytest.raises(
        ValueError, match="to: this decoder is not a qwen3: layer 1: expected the mixer attention, got gla"
    ):
        convert(tmp_path / "m", tmp_path / "out", to="qwen3")
    Decoder(DecoderConfig(vocab_size=40, d_model=16, num_layers=2, mixers=mixers[:1])).save(tmp_path / "q")
    with pytest.raises(ValueError, match="not a llama: layer 0, qk_norm: True, there False"):
        convert(tmp_path / "q", tmp_path / "out", to="llama")
    with pytest.raises(ValueError, match="to: expected one of llama"):
        convert(tmp_path / "m", tmp_path / "out")
    assert convert(tmp_path / "q", tmp_path / "out", to="qwen3").target == "qwen3"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(40, (1, 9))
    torch.testing.assert_close(Decoder.load(tmp_path / "q")(ids).logits, model(ids).logits, rtol=1e-4, atol=2e-5)


def test_half_precision_of_differences_is_widened(tmp_path):
    name, options = CASES["qwen3_next-dense"]
    model = original(name, options, tmp_path / "wide").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert convert(tmp_path / "half", tmp_path / "ours").dtype == torch.float32
    back = convert(tmp_path / "ours", tmp_path / "back", to="qwen3_next", dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["kimi_linear", "mamba2"])
def test_each_tensor_keeps_its_dtype(case, tmp_path):
    original(*CASES[case], tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    precise = ("A_log", "dt_bias", "e_score_correction_bias")
    mixed = {key: x if key.endswith(precise) else x.bfloat16() for key, x in load_file(file).items()}
    save_file(mixed, file, metadata={"format": "pt"})
    assert convert(tmp_path / "theirs", tmp_path / "ours").dtype == torch.bfloat16
    decoder = Decoder.load(tmp_path / "ours")
    assert {x.dtype for x in decoder.state_dict().values()} == {torch.float32, torch.bfloat16}
    assert decoder(torch.randint(40, (1, 9))).logits.dtype == torch.bfloat16
    assert convert(tmp_path / "ours", tmp_path / "back", to=case.partition("-")[0]).dtype == torch.bfloat16
    for key, x in load_file(tmp_path / "back" / "model.safetensors").items():
        torch.testing.assert_close(mixed.get(key, x), x, rtol=0, atol=0)
    convert(tmp_path / "back", tmp_path / "twice")
    for key, x in Decoder.load(tmp_path / "twice").state_dict().items():
        torch.testing.assert_close(decoder.state_dict()[key], x, rtol=0, atol=0)


def test_the_command(tmp_path, capsys):
    from linnet.cli import main

    original("Mamba2", CASES["mamba2"][1], tmp_path / "theirs")
    with pytest.raises(SystemExit) as left:
        main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert left.value.code in (0, None)
    assert "mamba2 -> linnet: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "llama"])
    assert left.value.code == 2
    assert "this decoder is not a llama" in capsys.readouterr().err
