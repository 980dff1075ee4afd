"""Weight decay reaches matrices and embeddings, not what a recurrence must keep."""

from __future__ import annotations

import pytest
import torch

from linnet.mixers import build_mixer
from linnet.models import learning_rate_caps, no_decay_names, parameter_groups

from .support import decoder


def test_groups():
    model = decoder()
    mixer = model.layers[0].mixer
    type(mixer).no_weight_decay  # noqa: B018 (every mixer has it)
    model.norm.weight.requires_grad_(False)
    decayed, exempt = parameter_groups(model, 0.1, lr=1e-2)
    assert decayed["lr"] == exempt["lr"] == 1e-2
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


@pytest.mark.parametrize(
    ("spec", "caps"),
    [
        ("s4d(state_size=4)", {"log_dt": 1e-3, "log_decay": 1e-3, "frequency": 1e-3}),
        ("dss(state_size=4)", {"log_dt": 1e-3, "log_decay": 1e-3, "frequency": 1e-3}),
        ("s4(state_size=4)", {"log_dt": 1e-3, "log_decay": 1e-3, "frequency": 1e-3, "P": 1e-3, "B": 1e-3}),
        ("s5(state_size=8, num_blocks=2)", {"log_dt": 1e-3, "log_decay": 1e-3, "frequency": 1e-3, "B": 1e-3}),
        ("lssl(state_size=4)", {"log_dt": 1e-3, **dict.fromkeys(("p", "d", "q", "middle", "below", "above"), 1e-4)}),
        ("lssl(state_size=4, learn=False)", {}),
        ("gla(num_heads=2)", {}),
    ],
)
def test_rates_of_steps_and_poles_are_capped(spec, caps):
    mixer = build_mixer(spec, 8)
    assert learning_rate_caps(mixer) == caps
    names = {p: name for name, p in mixer.named_parameters()}
    groups = parameter_groups(mixer, 0.1, lr=1e-2)
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates == {name: caps.get(name, 1e-2) for name in names.values()}
    assert all(group["weight_decay"] == 0 for group in groups if group["lr"] < 1e-2)
    assert {group["lr"] for group in parameter_groups(mixer, 0.1, lr=1e-5)} == {1e-5}  # lowered only, never raised


@pytest.mark.parametrize(("values", "message"), [((-0.1, 1e-3), "weight_decay: expected"), ((0.1, 0), "lr: expected")])
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(decoder(), values[0], lr=values[1])
