"""Presets: every file is a valid configuration whose size is the published one."""

from __future__ import annotations

import json
import re

import pytest
import torch

from linnet import presets
from linnet.models import Decoder, DecoderConfig

# Presets that change a part of the published model, and by how much that moves the size. Their notes say which part.
DEPARTURES = {"samba-mamba2-421m": 0.005}
OWN = {"default-small", "default-340m"}


def size(name: str) -> int:
    preset, model = presets.info(name), Decoder.meta(presets.load(name))
    head = 0 if model.lm_head is None else model.lm_head.weight.numel()
    return model.num_parameters() - (head if preset.counted == "once" else 0)


@pytest.mark.parametrize("name", presets.names())
def test_size_is_the_published_one(name):
    preset = presets.info(name)
    bounds = preset.published_range()
    assert preset.description and preset.counted in ("all", "once")
    if bounds is None:
        assert name in OWN and not preset.paper and preset.notes
        return
    assert preset.paper and re.fullmatch(r"\d{4}\.\d{5}", preset.arxiv)
    low, high = bounds
    slack = DEPARTURES.get(name, 0) * (low + high) / 2
    assert low - slack <= size(name) <= high + slack, f"{size(name):,} parameters, published {low:,.0f} to {high:,.0f}"
    assert preset.counted == "all" or "once" in preset.notes
    assert name not in DEPARTURES or "in place of" in preset.notes


@pytest.mark.parametrize("name", presets.names())
def test_files_are_complete(name):
    config = presets.load(name)
    assert config == DecoderConfig.from_dict(config.to_dict())
    assert not presets.info(name).published_parameters or config.mlp_hidden or config.mlp == "none"


def test_exact_figures_match_exactly():
    assert size("xlstm-7b") == 6_865_424_896
    assert size("mamba2-130m") == 128_989_632


def test_comparison_models_have_one_size():
    sizes = [size(name) for name in ("gla-340m", "transformer-340m")]
    model = Decoder.meta(presets.load("default-340m"))
    sizes.append(model.num_parameters() - model.lm_head.weight.numel())
    assert max(sizes) / min(sizes) < 1.01


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
