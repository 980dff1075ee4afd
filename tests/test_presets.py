"""Presets: every file is a valid configuration whose size is the published one."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch

from linnet import presets
from linnet.mixers import parse_spec
from linnet.models import Decoder, DecoderConfig

# Presets that change a part of the published model, or whose published size leaves one out, and by how much that moves
# the size. Their notes say which part.
DEPARTURES = {"samba-mamba2-421m": 0.005, "deltaproduct-213m": 0.004, "deltaproduct-805m": 0.002}
OWN = {"default-small", "default-340m"}


@cache
def size(name: str, **choices: str) -> int:
    preset = presets.info(name)
    model = Decoder.meta(preset.choose(**choices))
    head = 0 if model.lm_head is None else model.lm_head.weight.numel()
    tables = {"all": 0, "once": head, "none": head + model.embed_tokens.weight.numel()}
    return model.num_parameters() - tables[preset.counted]


@pytest.mark.parametrize("name", presets.names())
def test_size_is_the_published_one(name):
    preset = presets.info(name)
    bounds = preset.published_range()
    assert preset.description and preset.counted in ("all", "once", "none")
    if bounds is None:
        assert name in OWN and not preset.paper and preset.notes
        return
    assert preset.paper and re.fullmatch(r"\d{4}\.\d{5}", preset.arxiv)
    low, high = bounds
    slack = DEPARTURES.get(name, 0) * (low + high) / 2
    assert low - slack <= size(name) <= high + slack, f"{size(name):,} parameters, published {low:,.0f} to {high:,.0f}"
    assert {"all": "", "once": "once", "none": "no token table"}[preset.counted] in preset.notes
    assert name not in DEPARTURES or re.search("in place of|above the printed size", preset.notes)


@pytest.mark.parametrize("name", presets.names())
def test_files_are_complete(name):
    config = presets.load(name)
    assert config == DecoderConfig.from_dict(config.to_dict())
    assert not presets.info(name).published_parameters or config.mlp_hidden or config.mlp == "none"


def test_exact_figures_match_exactly():
    assert size("xlstm-7b") == 6_865_424_896
    assert size("olmo-hybrid-7b") == 7_430_870_688
    assert size("mamba2-130m") == 128_989_632
    assert size("mamba-130m") == 129_135_360
    assert size("jamba-52b-a12b") == 51_570_323_328
    final = 2304  # a norm behind the layers, which these two do not count
    assert size("gated-deltanet2-1.3b") - final == 1_302_638_112
    assert size("gated-deltanet2-1.3b", layers="hybrid") - final == 1_300_314_384
    assert size("first-xlstm-350m", stack="7:1") == 408_436_048  # printed as 408.4M


def test_comparison_models_have_one_size():
    sizes = [size(name) for name in ("gla-340m", "transformer-340m")]
    model = Decoder.meta(presets.load("default-340m"))
    sizes.append(model.num_parameters() - model.lm_head.weight.numel())
    assert max(sizes) / min(sizes) < 1.015


def test_hybrid_models_have_attention_where_their_papers_say():
    def attention(name):
        config = presets.load(name)
        specs = [parse_spec(config.mixer_spec(i))[0] for i in range(config.num_layers)]
        return [i for i, spec in enumerate(specs) if spec in ("attention", "mla")]

    assert attention("kimi-linear-48b-a3b") == [3, 7, 11, 15, 19, 23, 26]
    assert attention("jamba-52b-a12b") == list(range(4, 32, 8))
    assert attention("olmo-hybrid-7b") == list(range(3, 32, 4))
    assert attention("qwen3-next-80b-a3b") == list(range(3, 48, 4))
    assert attention("hybrid-340m(mixer=gla)") == [3, 7, 11, 15, 19, 23]
    assert attention("hybrid-340m(mixer=gla, ratio=6:1)") == [6, 13, 20]
    assert attention("hybrid-340m(ratio=12:1,mixer=gla)") == [12]
    assert attention("hybrid-340m(mixer=gla, ratio=24:1)") == [23]
    assert attention("hybrid-340m(ratio=24:1)") == [20]  # 21 layers of Gated DeltaNet
    assert attention("hybrid-340m(mixer=gla, ratio=pure)") == []
    assert attention("m2rnn-410m(layers=hybrid)") == [4, 12, 20]
    assert attention("m2rnn-7b-a1b(layers=gdn)") == [4, 12, 20, 28, 36]
    assert attention("gated-deltanet2-1.3b(layers=hybrid)") == list(range(1, 18, 2))


@pytest.mark.parametrize("ratio", ["3:1", "pure"])
@pytest.mark.parametrize("mixer", sorted(presets.info("hybrid-340m").choices["mixer"]))
def test_models_of_the_hybrid_grid_have_about_one_size(mixer, ratio):
    low, high = presets.info("hybrid-340m").published_range()
    slack = 0.05 * low if mixer == "retnet" else 0.01 * low  # its MLPs are narrower, those of attention layers too
    assert low - slack <= size("hybrid-340m", mixer=mixer, ratio=ratio) <= high + slack


def test_choices_of_cells_and_layers_have_about_one_size():
    families = [("pararnn-400m", "cell"), ("deltaproduct-213m", "steps"), ("deltaproduct-805m", "steps")]
    for name, option in [*families, *((name, "layers") for name in ("m2rnn-410m", "m2rnn-7b-a1b"))]:
        sizes = [size(name, **{option: value}) for value in presets.info(name).choices[option]]
        assert max(sizes) / min(sizes) < 1.015
    config = presets.load("m2rnn-410m(layers=gdn+3)")
    assert [i for i in range(24) if "m2rnn" in str(config.mixer_spec(i))] == [3, 11, 19]
    active = Decoder.meta(presets.load("m2rnn-7b-a1b")).num_parameters() - 40 * (128 - 8) * 3 * 1536 * 256
    assert 1.05e9 < active - 100352 * 1536 < 1.15e9  # printed as 1.1B; the table of the inputs is not run


def test_the_hybrid_grid_has_the_mixers_of_the_paper():
    for name in ("hybrid-340m", "hybrid-1.3b"):
        mixers = set(presets.info(name).choices["mixer"])
        assert mixers == {"hgrn", "retnet", "hgrn2", "gla", "deltanet", "gated_deltanet"}


def test_unknown_choices_are_refused():
    for name, expected in {
        "hybrid-340m(mixer=glu)": "mixer: expected one of .*gla.*; got 'glu'",
        "hybrid-340m(depth=3)": "depth: the preset hybrid-340m lets choose mixer, ratio, got",
        "gla-340m(mixer=gla)": "mixer: the preset gla-340m lets choose nothing, got",
    }.items():
        with pytest.raises(ValueError, match=f"^{expected}"):
            presets.load(name)


def test_range_of_a_printed_figure():
    def bounds(text):
        return presets.Preset("x", "", {}, published_parameters=text).published_range()

    assert bounds("340M") == (335e6, 345e6)
    assert bounds("1.3B") == pytest.approx((1.25e9, 1.35e9))
    assert bounds("421M") == (420.5e6, 421.5e6)
    assert bounds("6865424896") == (6865424895.5, 6865424896.5)
    assert bounds("") is None


def test_default_runs():
    config = presets.load("default-small")
    names = [config.mixer_spec(i).split("(")[0] for i in range(config.num_layers)]
    assert names[:4].count("attention") == 1 and config.vocab_size == 257
    torch.manual_seed(0)
    ids = torch.randint(257, (2, 200))
    loss = Decoder(config).loss(ids, ids)
    assert 5 < loss.item() < 7
    loss.backward()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"^preset: expected one of .*gla-340m.*; got 'gla-340'"):
        presets.load("gla-340")
    assert json.dumps(presets.load("default-small").to_dict())
