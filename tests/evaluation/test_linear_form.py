"""Canonical forms: what the dynamical-systems framework says about layers, executed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linnet.evaluation.linear_form import (
    Canonical,
    EngineCall,
    canonical,
    engine_calls,
    nonlinearity,
    ranks,
    realise,
    simulate,
    transfer,
)
from linnet.mixers import build_mixer
from linnet.ops import Segments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def phi_of(form: Canonical) -> Tensor:
    """``Phi`` from the matrices."""
    T, (p, m) = len(form.A), form.D[0].shape
    phi = torch.zeros(T, p, T, m, dtype=torch.float64)
    for j in range(T):
        phi[j, :, j], carried = form.D[j], form.B[j]
        for i in range(j + 1, T):
            phi[i, :, j], carried = form.C[i] @ carried, form.A[i] @ carried
    return phi


def decay_call(T: int = 12, K: int = 3, V: int = 2, **options) -> EngineCall:
    given = {"q": normal(1, T, 1, K), "k": normal(1, T, 1, K, seed=1), "v": normal(1, T, 1, V, seed=2), "scale": 1.0}
    return EngineCall("decay", given | options, "v", T)


GATES = {
    "none": {},
    "constant": {"g": torch.tensor([-0.3], dtype=torch.float64)},
    "scalar": {"g": -normal(1, 12, 1, seed=3).abs()},
    "vector": {"g": -normal(1, 12, 1, 3, seed=3).abs()},
    "bonus": {"g": -normal(1, 12, 1, 3, seed=3).abs(), "u": normal(1, 3, seed=4)},
    "normalised": {"q": normal(1, 12, 1, 3).abs(), "k": normal(1, 12, 1, 3, seed=1).abs(), "normalize": True},
}


@pytest.mark.parametrize("gate", GATES)
def test_matrices_transfer_and_layer_agree(gate: str) -> None:
    """The matrices, run on the values, the transfer matrix, and the engine itself."""
    call = decay_call(**GATES[gate])
    form, phi = canonical(call), transfer(call)
    assert form is not None and nonlinearity(call) < 1e-12
    v, y = call.values, call.run()[0][0].flatten(1)
    torch.testing.assert_close(simulate(form, v), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.einsum("ipjm,jm->ip", phi, v), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(phi_of(form), phi, rtol=1e-12, atol=1e-12)
    for i in range(12):
        assert not phi[i, :, i + 1 :].any(), "a value was read before it came"


def test_a_change_of_basis_changes_nothing_that_can_be_read() -> None:
    call = decay_call(**GATES["vector"])
    form = canonical(call)
    assert form is not None
    turn = [normal(6, 6, seed=s) for s in range(13)]
    back = [torch.linalg.inv(P) for P in turn]
    other = Canonical(
        [turn[t + 1] @ A @ back[t] for t, A in enumerate(form.A)],
        [turn[t + 1] @ B for t, B in enumerate(form.B)],
        [C @ back[t] for t, C in enumerate(form.C)],
        form.D,
    )
    torch.testing.assert_close(phi_of(other), phi_of(form), rtol=1e-9, atol=1e-9)


def test_decay_is_a_change_of_basis() -> None:
    """On a finite sequence, a decay moves into the keys and queries: k exp(-b), q exp(b) with b the sum of its logs."""
    call = decay_call(**GATES["vector"])
    b = GATES["vector"]["g"].cumsum(1)
    plain = decay_call(q=call.arguments["q"] * b.exp(), k=call.arguments["k"] * (-b).exp())
    torch.testing.assert_close(transfer(plain), transfer(call), rtol=1e-9, atol=1e-9)


def test_a_normaliser_acts_where_it_is_read() -> None:
    """The ratios of normalisers between tokens telescope: nothing is forgotten."""
    call = decay_call(**GATES["normalised"], eps=0.0)
    weights = torch.einsum("bihk,bjhk->ij", call.arguments["q"], call.arguments["k"]).tril()
    mixing = weights / weights.sum(-1, keepdim=True)
    want = torch.einsum("ij,pm->ipjm", mixing, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(transfer(call), want, rtol=1e-12, atol=1e-12)


def test_ranks_of_heads() -> None:
    """Rank over a cut: the state's K numbers for linear attention, W - 1 tokens for a window, all for softmax."""
    T, cuts = 24, (4, 8, 12, 16, 20)
    linear = decay_call(T, V=1)
    one = {"q": normal(1, T, 1, 3), "k": normal(1, T, 1, 3, seed=1), "v": normal(1, T, 1, 1, seed=2)}
    profiles = [
        ranks(transfer(call), 1e-9)[0]
        for call in (linear, EngineCall("attention", one | {"window": 5}, "v", T), EngineCall("attention", one, "v", T))
    ]
    assert [[profile[s - 1] for s in cuts] for profile in profiles] == [[3] * 5, [4] * 5, [4, 8, 12, 8, 4]]
    assert [profile[1] for profile in profiles] == [2, 2, 2]


@pytest.mark.parametrize("tokens", [2, 12])
def test_minimal_realisation_round_trip(tokens: int) -> None:
    """From its transfer matrix alone, the smallest system that is the same: of two value channels, K numbers each."""
    gate = {} if tokens == 2 else GATES["vector"]
    call = decay_call(tokens, **gate)
    phi = transfer(call)
    form = realise(phi)
    torch.testing.assert_close(phi_of(form), phi, rtol=1e-9, atol=1e-11)
    v = call.values
    torch.testing.assert_close(simulate(form, v), call.run()[0][0].flatten(1), rtol=1e-9, atol=1e-11)
    assert [A.shape[1] for A in form.A] == [min(2 * s, 2 * (tokens - s), 6) for s in range(tokens)]


def test_time_invariant_layers_have_a_toeplitz_transfer() -> None:
    torch.manual_seed(0)
    x = normal(1, 10, 4)
    for spec, constant in (("s4d(state_size=4)", True), ("gla(num_heads=2, expand_k=1.0)", False)):
        (call,) = engine_calls(build_mixer(spec, 4).double(), x)
        phi = transfer(call)
        moved = (phi[1:, :, 1:] - phi[:-1, :, :-1]).abs().max() / phi.abs().max()
        assert (moved < 1e-12) == constant


def test_packing_is_block_diagonal() -> None:
    phi = transfer(decay_call(**GATES["scalar"], segments=Segments.from_lengths([5, 7])))
    assert phi[:5, :, :5].any() and phi[5:, :, 5:].any()
    assert not phi[5:, :, :5].any()


def test_what_is_not_linear_is_found_out() -> None:
    """The key of delta-like or normalised layers is not a value."""
    call = decay_call(**GATES["normalised"])
    assert nonlinearity(call._replace(value="k")) > 1e-3


def test_engine_calls_of_a_mixer() -> None:
    """In order, short convolutions apart, and the modules are as they were afterwards."""
    import linnet.mixers.gsa as module

    before = module.decay
    torch.manual_seed(0)
    mixer = nn.Sequential(build_mixer("gsa(num_heads=2, num_slots=3)", 8).double())[0]
    calls = engine_calls(mixer, normal(1, 5, 8))
    assert [call.engine for call in calls] == ["decay", "decay"] and module.decay is before
    with pytest.raises(ValueError, match=r"^x:"):
        engine_calls(mixer, normal(1, 5, 7))
    assert module.decay is before
