"""Taking mixers apart."""

from __future__ import annotations

import json

import pytest
import torch

from linnet.evaluation import dissect, plot_dissection
from linnet.mixers import build_mixer, mixers
from linnet.ops.core import state_bytes


def sample(T: int, width: int) -> torch.Tensor:
    return torch.randn(1, T, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", mixers())
def test_every_mixer_can_be_taken_apart(name: str) -> None:
    """Its linear form is exact, its state as large as it says, and its JSON is plain."""
    cls = mixers()[name]
    torch.manual_seed(0)
    examples = [cls(**options) for options in cls.card.examples]
    mixer = min(examples, key=lambda m: state_bytes(m.init_state(1)) * m.d_model)
    found = dissect(mixer, sample(5, mixer.d_model))
    assert found.name == name and found.parts
    assert (found.memory is None) == (not mixer.card.constant_state)
    assert (found.affine_error is None) == (not mixer.card.linear_state or found.memory is None)
    assert found.affine_error is None or found.affine_error < 1e-10
    for part in found.parts:
        if part.linear:
            assert part.error < 1e-9
            assert len(part.ranks) == 4 and all(0 <= a <= b for a, b in zip(part.ranks, part.full, strict=True))
            assert part.state is None or part.state >= max(part.ranks)
    json.dumps(found.to_dict(), allow_nan=False)
    assert next(mixer.parameters()).dtype == torch.float32  # a copy was taken apart


@pytest.mark.parametrize(
    ("spec", "width", "transition", "constant", "commutes", "mixings"),
    [
        ("linear_attention(num_heads=2)", 8, "identity", True, True, 2),
        ("retnet(num_heads=2, expand_v=1.0)", 8, "diagonal, 2 different factors", True, True, 2),
        ("simple_gla(num_heads=1)", 8, "one factor for all", False, True, 1),
        ("gla(num_heads=2)", 8, "diagonal, 4 different factors", False, True, 2),
        ("s4d(state_size=4)", 3, "diagonal, 3 of 9 factors complex", True, True, 3),
        ("s5(state_size=4, num_blocks=1)", 3, "diagonal, 2 of 2 factors complex", True, True, None),
        ("lssl(state_size=4)", 3, "3 blocks of up to 4", True, True, 3),
        ("attention(num_heads=2)", 8, "none: the state grows", False, False, 2),
    ],
)
def test_what_is_found(
    spec: str, width: int, transition: str, constant: bool, commutes: bool, mixings: int | None
) -> None:
    torch.manual_seed(0)
    (part,) = dissect(build_mixer(spec, width), sample(9, width)).parts
    assert (part.transition, part.constant, part.commutes) == (transition, constant, commutes)
    assert mixings is None or part.mixings == mixings


def test_half_lives() -> None:
    """RetNet's heads forget by 31/32 and 63/64 a token."""
    torch.manual_seed(0)
    (part,) = dissect(build_mixer("retnet(num_heads=2, expand_v=1.0)", 8), sample(6, 8)).parts
    assert part.half_lives is not None
    shortest, _, longest = part.half_lives
    assert abs(shortest - 21.83) < 0.01 and abs(longest - 44.01) < 0.01
    assert {round(real, 6) for real, _ in part.eigenvalues} == {0.96875, 0.984375}


def test_bad_inputs() -> None:
    mixer = build_mixer("gla(num_heads=2)", 8)
    for bad in (sample(1, 8), sample(5, 7), sample(5, 8)[0], sample(5, 8).expand(2, -1, -1)):
        with pytest.raises(ValueError, match=r"^x: expected shape \[1, T >= 2, 8\], got"):
            dissect(mixer, bad)
    with pytest.raises(ValueError, match=r"^mixer: expected a state of at most 1,024 numbers, got 4,096"):
        dissect(build_mixer("gla(num_heads=1, expand_k=1.0)", 64), sample(3, 64))


def test_plot(tmp_path) -> None:
    torch.manual_seed(0)
    parts = dissect(build_mixer("gsa(num_heads=2, num_slots=3)", 8), sample(6, 8)).to_dict()["parts"]
    parts += dissect(build_mixer("attention(num_heads=2)", 8), sample(6, 8)).to_dict()["parts"]
    file = tmp_path / "parts.png"
    plot_dissection(file, parts, title="three calls")
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"^parts: expected at least one"):
        plot_dissection(file, [])
