"""Weight decay reaches matrices and embeddings, not what a recurrence must keep."""

from __future__ import annotations

import pytest
import torch

from linnet.models import no_decay_names, parameter_groups

from .support import decoder


def test_groups():
    model = decoder()
    mixer = model.layers[0].mixer
    type(mixer).no_weight_decay  # noqa: B018 (every mixer has it)
    model.norm.weight.requires_grad_(False)
    decayed, exempt = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0.0
    ids = {id(p): name for name, p in model.named_parameters()}
    names = {ids[id(p)] for p in decayed["params"]}
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.mlp.up_proj.weight"} <= names
    assert all(p.dim() >= 2 for p in decayed["params"])
    rest = {ids[id(p)] for p in exempt["params"]}
    assert {"layers.0.mixer_norm.weight", "layers.1.mixer.dt_bias"} <= rest
    assert names | rest == {name for name, p in model.named_parameters() if p.requires_grad} and not names & rest
    torch.optim.AdamW([decayed, exempt])


def test_mixers_exempt_their_own_matrices(monkeypatch):
    model = decoder()
    monkeypatch.setattr(type(model.layers[0].mixer), "no_weight_decay", ("q_proj.weight", "absent"))
    exempt = no_decay_names(model)
    assert {name for name in exempt if name.endswith("q_proj.weight")} == {
        "layers.0.mixer.q_proj.weight",
        "layers.3.mixer.q_proj.weight",
    }
    assert no_decay_names(model.layers[0].mixer) >= {"q_proj.weight"}


def test_bad_weight_decay():
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(decoder(), -0.1)
