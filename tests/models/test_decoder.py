"""The decoder: one forward for training, prefill and decoding; configs; construction; loss; saving."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from linnet.models import Decoder, DecoderConfig
from linnet.models import decoder as decoder_module
from linnet.ops import Segments
from linnet.ops.core import repeat_rows, select_rows, state_tensors

from .support import VOCAB, config, decoder, tokens

EXACT = {"rtol": 1e-10, "atol": 1e-10}
MOE = {"mlp": "moe", "num_experts": 4, "experts_per_token": 2, "mlp_hidden": 24}
KINDS = pytest.mark.parametrize("options", [{}, MOE, {"mlp": "none"}], ids=["swiglu", "moe", "none"])


@KINDS
def test_step_by_step_equals_one_call(options):
    model, ids = decoder(**options), tokens(2, 13)
    whole = model(ids)
    state, logits = None, []
    for t in range(13):
        out = model(ids[:, t : t + 1], state)
        state, logits = out.state, [*logits, out.logits]
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **EXACT)
    for a, b in zip(state_tensors(state), state_tensors(whole.state), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("cut", [1, 4, 12])
def test_chunked_prefill_equals_one_call(cut):
    model, ids = decoder(), tokens(2, 13)
    first = model(ids[:, :cut])
    second = model(ids[:, cut:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), model(ids).logits, **EXACT)


def test_initial_state_is_no_state():
    model, ids = decoder(), tokens(3, 6)
    torch.testing.assert_close(model(ids, model.init_state(3)).logits, model(ids).logits, **EXACT)


@KINDS
def test_packed_equals_separate(options):
    model, lengths = decoder(**options), [4, 1, 9]
    ids = tokens(1, 14)
    segments = Segments.from_lengths(lengths)
    packed = model(ids, segments=segments)
    last = model(ids, segments=segments, last_only=True)
    assert last.logits.shape == (3, 1, VOCAB)
    for n, part in enumerate(ids.split(lengths, 1)):
        alone = model(part)
        start = int(segments.cu_seqlens[n])
        torch.testing.assert_close(packed.logits[:, start : start + lengths[n]], alone.logits, **EXACT)
        torch.testing.assert_close(last.logits[n], alone.logits[0, -1:], **EXACT)


def test_packed_prefill_continues_in_a_batch():
    model, parts = decoder(), [tokens(1, n, seed=n) for n in (3, 7)]
    prefill = model(torch.cat(parts, 1), segments=Segments.from_lengths([3, 7]))
    step = model(torch.tensor([[5], [6]]), prefill.state)
    for n, part in enumerate(parts):
        alone = model(torch.cat([part, torch.tensor([[5 + n]])], 1))
        torch.testing.assert_close(step.logits[n, -1], alone.logits[0, -1], **EXACT)


def test_rows_of_the_state_can_be_selected_and_repeated():
    model, ids = decoder(), tokens(3, 8)
    state = model(ids).state
    chosen = torch.tensor([2, 0])
    step = tokens(2, 1, seed=2)
    expected = model(torch.cat([ids[chosen], step], 1)).logits[:, -1:]
    torch.testing.assert_close(model(step, select_rows(state, chosen)).logits, expected, **EXACT)
    six = tokens(6, 1, seed=3)
    expected = model(torch.cat([ids.repeat_interleave(2, 0), six], 1)).logits[:, -1:]
    torch.testing.assert_close(model(six, repeat_rows(state, 2)).logits, expected, **EXACT)


def test_last_only():
    model, ids = decoder(), tokens(2, 7)
    torch.testing.assert_close(model(ids, last_only=True).logits, model(ids).logits[:, -1:], **EXACT)


def test_the_future_does_not_matter():
    model, ids = decoder(), tokens(1, 12)
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % VOCAB
    assert torch.equal(model(ids).logits[:, :8], model(other).logits[:, :8])


def test_soft_cap():
    free, capped = decoder(init_std=1.0), decoder(init_std=1.0, logit_soft_cap=3.0)
    ids = tokens(2, 9)
    z = free(ids).logits
    assert z.abs().max() > 6
    torch.testing.assert_close(capped(ids).logits, 3 * torch.tanh(z / 3), **EXACT)
    expected = F.cross_entropy(3 * torch.tanh(z / 3).flatten(0, 1), ids.flatten())
    torch.testing.assert_close(capped.loss(ids, ids), expected, **EXACT)


def test_tied_head():
    model = decoder(tie_embeddings=True)
    untied = decoder()
    assert model.lm_head is None
    assert model.num_parameters() == untied.num_parameters() - VOCAB * 16
    assert model.num_parameters(embeddings=False) == untied.num_parameters(embeddings=False)
    ids = tokens(1, 5)
    with torch.no_grad():
        untied.load_state_dict(model.state_dict(), strict=False)
        untied.lm_head.weight.copy_(model.embed_tokens.weight)
    assert torch.equal(model(ids).logits, untied(ids).logits)
    model.loss(ids, ids).backward()
    assert model.embed_tokens.weight.grad.count_nonzero(1).min() > 0  # unseen ids too: through the head


# Loss


def test_loss_counts_only_targets_that_are_not_ignored():
    model, ids = decoder(), tokens(2, 9)
    targets = tokens(2, 9, seed=2)
    targets[0, :4] = -100
    logits = model(ids).logits
    kept = targets != -100
    expected = F.cross_entropy(logits[kept], targets[kept])
    torch.testing.assert_close(model.loss(ids, targets), expected, **EXACT)
    assert model.loss(ids, torch.full_like(ids, -100)).item() == 0


def test_loss_of_packed_rows_is_that_of_the_sequences():
    model, lengths = decoder(), [6, 3]
    ids, targets = tokens(1, 9), tokens(1, 9, seed=2)
    parts = [
        model.loss(a, b) * a.numel() for a, b in zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(model.loss(ids, targets, Segments.from_lengths(lengths)), sum(parts) / 9, **EXACT)


def test_loss_in_parts_is_the_loss(monkeypatch):
    model, ids = decoder(z_loss=0.01).train(), tokens(2, 9)
    targets = tokens(2, 9, seed=2)
    targets[1, 3:] = -100
    whole = model.loss(ids, targets)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    monkeypatch.setattr(decoder_module, "_LOSS_LOGITS", 4 * VOCAB)
    parts = model.loss(ids, targets)
    torch.testing.assert_close(parts, whole, **EXACT)
    for a, b in zip(torch.autograd.grad(parts, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_z_loss_is_the_mean_square_of_the_normaliser_in_training_only():
    model, ids = decoder(z_loss=0.1, logit_soft_cap=3.0), tokens(2, 9)
    targets = tokens(2, 9, seed=2)
    targets[0, :4] = -100
    squares = model(ids).logits.exp().sum(-1).log().square()
    evaluated = model.loss(ids, targets)
    torch.testing.assert_close(evaluated, decoder(logit_soft_cap=3.0).loss(ids, targets), **EXACT)
    expected = evaluated + 0.1 * squares[targets != -100].mean()
    torch.testing.assert_close(model.train().loss(ids, targets), expected, **EXACT)


def test_auxiliary_loss_counts_in_training_only():
    model, ids = decoder(**MOE), tokens(2, 9)
    out = model(ids)
    assert 0.03 < out.aux_loss.item() < 0.16  # four layers of about 0.01 each
    evaluated = model.loss(ids, ids)
    torch.testing.assert_close(evaluated, F.cross_entropy(out.logits.flatten(0, 1), ids.flatten()), **EXACT)
    torch.testing.assert_close(model.train().loss(ids, ids), evaluated + out.aux_loss, **EXACT)
    assert len(model.router_statistics()) == 12
    assert decoder()(ids).aux_loss.item() == 0


def test_gradient_checkpointing_changes_nothing():
    for options in ({}, MOE):
        model, ids = decoder(**options).train(), tokens(2, 9)
        expected = torch.autograd.grad(model.loss(ids, ids), list(model.parameters()))
        model.gradient_checkpointing = True
        got = torch.autograd.grad(model.loss(ids, ids), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_every_parameter_learns():
    for options in ({}, MOE, {"tie_embeddings": True}):
        model, ids = decoder(**options).train(), tokens(4, 12)
        model.loss(ids, tokens(4, 12, seed=2)).backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
        assert silent == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = decoder(init_std=0.02), tokens(2, 9)
    exact = model.loss(ids, ids)
    half = model.to(dtype)
    assert half(ids).logits.dtype == dtype
    loss = half.loss(ids, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.02, atol=0)


def test_autocast():
    model, ids = decoder(init_std=0.02).float().train(), tokens(2, 9)
    exact = model.loss(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_compiles_as_one_graph():
    mixers = ["gla(num_heads=2)", "attention(num_heads=2, window=5)"]
    model = decoder(**MOE, dense_layers=1, mixers=mixers, num_layers=2).float().train()  # one layer of each MLP
    ids = tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, ids)
    torch.testing.assert_close(loss, model.loss(ids, ids))
    got = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(got, torch.autograd.grad(model.loss(ids, ids), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)


# Construction


@KINDS
def test_meta_model_becomes_real(options):
    options = {**options, "d_model": 64, "init_std": 0.02, "scale_residual_init": True}
    model = Decoder.meta(config(**options))
    assert all(x.is_meta for x in model.state_dict().values())
    assert model(torch.zeros(2, 8, dtype=torch.int64, device="meta")).logits.shape == (2, 8, VOCAB)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            x.fill_(float("nan") if x.is_floating_point() else -7)
    model.reset_parameters()
    torch.manual_seed(0)
    built = Decoder(config(**options))
    for (name, a), b in zip(model.state_dict().items(), built.state_dict().values(), strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a.mean(), b.mean(), rtol=0.5, atol=0.1, msg=name)
        if b.std() == 0 or b.numel() < 100:
            continue
        assert 0.7 < a.std() / b.std() < 1.4, name
    assert model.loss(tokens(1, 9), tokens(1, 9)).isfinite()


def test_initial_weights():
    torch.manual_seed(0)
    model = Decoder(config(d_model=64, vocab_size=500, init_std=0.05, scale_residual_init=True))
    for weight, std in [
        (model.embed_tokens.weight, 0.05),
        (model.lm_head.weight, 0.05),
        (model.layers[1].mlp.up_proj.weight, 0.05),
        (model.layers[1].mlp.down_proj.weight, 0.05 / 8**0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(("mlp", "branches"), [("swiglu", 6), ("none", 3), (["none", "swiglu"], 4)])
def test_initial_output_projections_shrink_with_depth(mlp, branches):
    """Those of mixers as those of MLPs, on construction and whenever the parameters are drawn again."""
    mixers = ["gla(num_heads=2)", "mamba", "mlstm_block(num_heads=2)"]
    models = []
    for scaled in (False, True):
        torch.manual_seed(0)
        models.append(Decoder(config(num_layers=3, mixers=mixers, mlp=mlp, scale_residual_init=scaled)))
    for again in (False, True):
        if again:
            for model in models:
                torch.manual_seed(1)
                model.reset_parameters()
        plain, scaled = (dict(model.named_parameters()) for model in models)
        for name, p in plain.items():
            ends = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
            torch.testing.assert_close(scaled[name], p * branches**-0.5 if ends else p, msg=name)


def test_layers_follow_the_pattern():
    model = decoder(num_layers=7)
    assert [layer.mixer.name for layer in model.layers] == ["gla", "mamba2", "attention"] * 2 + ["gla"]
    names = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("layers")}
    assert names == {"mixer_norm", "mixer", "mlp_norm", "mlp"}


def test_dense_layers_before_experts():
    model = decoder(**MOE, dense_layers=1, expert_hidden=8, shared_experts=1)
    assert model.layers[0].mlp.up_proj.weight.shape == (24, 16)
    assert model.layers[1].mlp.up_proj.shape == (4, 16, 8)
    assert model.layers[1].mlp.shared.up_proj.weight.shape == (8, 16)


def test_experts_in_every_other_layer():
    model = decoder(**MOE, dense_layers=1, experts_every=2, num_layers=5)
    names = [type(layer.mlp).__name__ for layer in model.layers]
    assert names == ["SwiGLU", "SwiGLU", "MixtureOfExperts", "SwiGLU", "MixtureOfExperts"]


def test_default_mlp_width():
    assert config(d_model=768).hidden == 2048
    assert config(d_model=1024).hidden == 2752
    assert config(d_model=768, mlp_ratio=4).hidden == 3072
    assert config(mlp_hidden=100).hidden == 100


# Bad input


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 0},
        {"vocab_size": 2.5},
        {"d_model": -1},
        {"d_model": True},
        {"num_layers": 0},
        {"mixers": []},
        {"mixers": "gla"},
        {"mixers": [3]},
        {"mlp": "relu"},
        {"mlp": None},
        {"mlp": [["moe"]]},
        {"norm_position": [["pre"]]},
        {"mlp_hidden": 0},
        {"mlp_ratio": 0},
        {"num_experts": 0},
        {"experts_per_token": 9},
        {"expert_hidden": -3},
        {"shared_experts": -1},
        {"router": "hash"},
        {"router_scale": 0.0},
        {"router_bias_rate": -1.0},
        {"norm_position": "middle"},
        {"norm_position": ["pre", "middle"]},
        {"norm_position": []},
        {"dense_layers": -1},
        {"experts_every": 0},
        {"balance_loss": -0.1},
        {"router_z_loss": float("nan")},
        {"norm_eps": 0},
        {"tie_embeddings": 1},
        {"logit_soft_cap": 0},
        {"init_std": float("inf")},
        {"scale_residual_init": "yes"},
        {"z_loss": -1e-4},
    ],
)
def test_bad_fields_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected .* got "):
        config(**options)


def test_a_layer_without_norms_adds_what_its_mixer_and_mlp_return():
    model = decoder(norm_position="none", num_layers=1, mixers=["minmax_block(state_dim=6)"])
    layer, x = model.layers[0], torch.randn(2, 5, 16, dtype=torch.float64)
    h = x + layer.mixer(x)[0]
    torch.testing.assert_close(layer(x)[0], h + layer.mlp(h)[0], **EXACT)
    assert [name for name, _ in model.named_parameters() if name.endswith("_norm.weight")] == []


def test_norms_behind_the_mixer_and_the_mlp():
    model = decoder(norm_position="post", num_layers=1, mixers=["gla(num_heads=2)"])
    layer, x = model.layers[0], torch.randn(2, 5, 16, dtype=torch.float64)
    h = x + layer.mixer_norm(layer.mixer(x)[0])
    torch.testing.assert_close(layer(x)[0], h + layer.mlp_norm(layer.mlp(h)[0]))
    torch.nn.init.zeros_(layer.mixer.o_proj.weight)  # a mixer that says nothing: the norm of zero is zero
    torch.testing.assert_close(layer(x)[0], x + layer.mlp_norm(layer.mlp(x)[0]))


def test_norms_in_another_place_in_every_layer():
    model = decoder(norm_position=["pre", "post"], mixers=["gla(num_heads=2)"])
    assert [layer.post for layer in model.layers] == [False, True, False, True]
    assert DecoderConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config


def test_bad_mixers_are_named():
    with pytest.raises(ValueError, match="mixer spec"):
        config(mixers=["gla("])
    with pytest.raises(ValueError, match="nonesuch"):
        Decoder(config(mixers=["nonesuch"]))
    with pytest.raises(ValueError, match="unknown option 'windw'"):
        Decoder(config(mixers=["attention(windw=4)"]))


def test_config_round_trips_through_json():
    original = config(**MOE, logit_soft_cap=30.0)
    assert DecoderConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    with pytest.raises(ValueError, match=r"unknown field 'd_modle'; it takes .*d_model"):
        DecoderConfig.from_dict({"d_modle": 16})
    with pytest.raises(ValueError, match="'mixers' is missing"):
        DecoderConfig.from_dict({"vocab_size": 8, "d_model": 16, "num_layers": 1})


def test_bad_inputs_are_named():
    model, ids = decoder(), tokens(2, 5)
    for bad in (ids[0], ids[:, :0], ids.int(), ids.double(), ids.tolist()):
        with pytest.raises(ValueError, match=r"^tokens: "):
            model(bad)
    for bad in (ids - VOCAB, ids + VOCAB):
        with pytest.raises(ValueError, match=f"^tokens: expected ids from 0 to {VOCAB - 1}"):
            model(bad)
    for bad in (ids[:, 1:], ids.int(), ids.tolist(), ids - VOCAB, ids + VOCAB):
        with pytest.raises(ValueError, match=r"^targets: "):
            model.loss(ids, bad)
    with pytest.raises(ValueError, match=r"^tokens: "):
        model.loss(ids.tolist(), ids)
    with pytest.raises(ValueError, match=r"^segments: "):
        model(ids, segments=Segments.from_lengths([4, 6]))
    with pytest.raises(ValueError, match=r"^segments: an empty sequence"):
        model(ids[:1], segments=Segments.from_lengths([0, 5]), last_only=True)
    with pytest.raises(ValueError, match=r"^state: expected 4 layer states, got 3"):
        model(ids, model(ids).state[:3])
    with pytest.raises(ValueError, match=r"^state: expected 4 layer states, got int"):
        model(ids, 4)


# Saving


TABLES = {"mixers": ["softmax_taylor(num_heads=2)"]}  # it has buffers that are not saved


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": True}, MOE, TABLES], ids=["untied", "tied", "moe", "tables"]
)
def test_save_and_load_are_bit_exact(tmp_path, options):
    model, ids = decoder(**options), tokens(2, 9)
    model.save(tmp_path / "m")
    loaded = Decoder.load(tmp_path / "m")
    assert not loaded.training and loaded.config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[name]) and x.dtype == loaded.state_dict()[name].dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert all(p.requires_grad for p in loaded.parameters())
    half = Decoder.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_save_refuses_to_overwrite(tmp_path):
    model = decoder()
    model.save(tmp_path / "m")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        decoder(num_layers=1).save(tmp_path / "m")
    assert Decoder.load(tmp_path / "m").config.num_layers == 4
    decoder(num_layers=1).save(tmp_path / "m", overwrite=True)
    assert Decoder.load(tmp_path / "m").config.num_layers == 1


def test_weights_that_are_not_those_of_the_config_are_named(tmp_path):
    model = decoder()
    state = dict(model.state_dict())
    state["stray"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    del state["embed_tokens.weight"]
    model.save(tmp_path / "m", state_dict=state)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*missing embed_tokens\.weight") as caught:
        Decoder.load(tmp_path / "m")
    assert "unexpected stray" in str(caught.value)
    assert "norm.weight of shape [3] instead of [16]" in str(caught.value)


def test_config_of_a_file_is_checked(tmp_path):
    decoder().save(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    header = json.loads(file.read_text())
    header["config"]["d_model"] = -1
    file.write_text(json.dumps(header))
    with pytest.raises(ValueError, match="d_model"):
        Decoder.load(tmp_path / "m")


def test_loading_rebuilds_buffers_that_are_not_saved(tmp_path, monkeypatch):
    init = nn.Module.__init__

    def with_buffer(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if isinstance(self, decoder_module.DecoderLayer):
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    monkeypatch.setattr(nn.Module, "__init__", with_buffer)
    model, ids = decoder(), tokens(1, 5)
    model.save(tmp_path / "m")
    loaded = Decoder.load(tmp_path / "m", dtype=torch.float64)
    assert loaded.layers[2].table.tolist() == [0, 1, 2]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_mixtures_of_tokens() -> None:
    """One-hot rows are the tokens themselves; sums, noise and nothing at all are read as sums of embeddings."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=7, d_model=16, num_layers=1, mixers=["gla(num_heads=2)"], mlp_hidden=16))
    tokens = torch.randint(5, (2, 6))
    hot = torch.nn.functional.one_hot(tokens, 5).float()
    assert torch.allclose(model(hot).logits, model(tokens).logits, atol=1e-6)
    assert torch.allclose(model.loss(hot, tokens), model.loss(tokens, tokens), atol=1e-6)
    other = model.embed_tokens.weight[3] * 0.5 + model.embed_tokens.weight[1]
    mixed = torch.zeros(1, 1, 7)
    mixed[..., 3], mixed[..., 1] = 0.5, 1.0
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(mixed)
    assert torch.allclose(seen[0][0, 0], other, atol=1e-6)
    with pytest.raises(ValueError, match=r"floats \[B, T, W\] with W <= 7"):
        model(torch.zeros(1, 2, 8))


def test_scaled_embeddings_and_biased_mlps():
    model = decoder(embed_scale=3.0, mlp="geglu", mlp_bias=True)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = tokens(1, 4)
    model(ids)
    assert torch.equal(seen[0], 3.0 * model.embed_tokens(ids))
    assert "layers.0.mlp.up_proj.bias" in model.state_dict()
    with pytest.raises(ValueError, match=r"^embed_scale: expected a number > 0, got 0"):
        config(embed_scale=0)


def test_mlps_by_layer_are_repeated_over_the_layers_like_mixers():
    model = decoder(mlp=["none", "swiglu", "none"])
    assert [layer.mlp is not None for layer in model.layers] == [False, True, False, False]
    assert DecoderConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    assert model(tokens(1, 4)).logits.shape == (1, 4, VOCAB)
    with pytest.raises(ValueError, match=r"^mlp: expected 'swiglu', 'geglu', 'moe', 'none' or a list of these, got"):
        config(mlp=["swiglu", "glu"])


def test_selective_checkpointing_keeps_an_op_whole():
    """Its recording of single products would be added to in place by the chunked engines."""
    mixers = ["gla(num_heads=2)", "gated_deltanet(num_heads=2, head_dim=4)", "mlstm(num_heads=2)", "rglru(num_heads=2)"]
    mixers += ["aaren(num_heads=2, bias=False)"]
    model = decoder(num_layers=len(mixers), mixers=mixers)
    kept = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default}

    def policy(ctx, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func in kept else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(1, 24, 16, dtype=torch.float64, requires_grad=True)
    for layer in model.layers:
        found = checkpoint(
            lambda x, layer=layer: layer(x)[0],
            x,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        )
        weight = torch.randn_like(found)
        given = [x, *layer.parameters()]
        got = torch.autograd.grad((found * weight).sum(), given)
        for a, b in zip(got, torch.autograd.grad((layer(x)[0] * weight).sum(), given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of ops it takes slice by slice
def test_gradients_of_each_sequence_under_vmap():
    model, ids = decoder(), tokens(3, 9)

    def loss(parameters, row):
        logits = torch.func.functional_call(model, parameters, (row[None, :-1],)).logits
        return F.cross_entropy(logits[0], row[1:])

    parameters = dict(model.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for n, row in enumerate(ids):
        want = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        torch.testing.assert_close([g[n] for g in found.values()], list(want), **EXACT)
    losses = torch.func.vmap(lambda row: model.loss(row[None, :-1], row[None, 1:]))(ids)
    torch.testing.assert_close(losses, torch.stack([loss(parameters, row) for row in ids]), **EXACT)


def test_fake_tensors_take_a_step_of_training():
    with FakeTensorMode():
        model = Decoder(config())
        model.loss(tokens(2, 9), tokens(2, 9)).backward()
        state = model(tokens(2, 9)).state
        assert model(tokens(2, 1), state).logits.shape == (2, 1, VOCAB)
    assert all(isinstance(p.grad, FakeTensor) for p in model.parameters())
