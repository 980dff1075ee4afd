"""What is particular to the delta engine; everything general is in the contract suite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linnet.ops import DeltaState, Segments, delta, delta_transition, dplr
from linnet.ops.delta import cost
from linnet.ops.delta.reference import normalized

B, T, H, K, V = 2, 37, 2, 8, 6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def given(rows: int = B, length: int = T, *, gate: bool = True, channelwise: bool = False, substeps: int = 1):
    """Unit keys and the strengths of a mode, in float64."""
    torch.manual_seed(0)
    R = length * substeps
    x = {"k": normalized(normal(rows, R, H, K)), "v": normal(rows, R, H, V), "beta": torch.rand(rows, R, H).double()}
    if gate:
        x["g"] = -torch.exp(normal(rows, length, H, K))
    if channelwise:
        x["beta"], x["w"] = torch.rand(rows, R, H, K).double(), torch.rand(rows, R, H, V).double()
    return x


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# The transition of a stretch of tokens


@pytest.mark.parametrize(
    "options", [{"gate": False}, {}, {"channelwise": True}, {"channelwise": True, "substeps": 3}], ids=str
)
def test_transition_is_what_the_tokens_do_to_any_state(options: dict[str, int]) -> None:
    x, n = given(**options), options.get("substeps", 1)
    M, Hc = delta_transition(**x, substeps=n, chunk_size=8)
    for _ in range(2):
        S = normal(B, H, K, V)
        _, after = delta(normal(B, T, H, K), **x, substeps=n, state=DeltaState(S), backend="reference")
        close(after.S, M @ S + Hc)


def test_stretches_computed_apart_give_the_whole_sequence() -> None:
    """Each stretch's transition from nothing, a scan over them, then every stretch from its own state at once."""
    x, q, S0 = given(1, 48), normal(1, 48, H, K), normal(1, H, K, V)
    whole, last = delta(q, **x, state=DeltaState(S0), chunk_size=8)
    stretches = {name: y.view(3, 16, *y.shape[2:]) for name, y in x.items()}
    M, Hc = delta_transition(**stretches, chunk_size=8)
    states = [S0[0]]
    for m, h in zip(M, Hc, strict=True):
        states.append(m @ states[-1] + h)
    o, after = delta(q.view(3, 16, H, K), **stretches, state=DeltaState(torch.stack(states[:-1])), chunk_size=8)
    close(o.reshape(whole.shape), whole)
    close(after.S[-1], last.S[0])
    close(states[-1], last.S[0])


def test_transition_of_packed_sequences() -> None:
    x = given(1, 20, channelwise=True)
    lengths = [7, 0, 1, 12]
    M, Hc = delta_transition(**x, segments=Segments.from_lengths(lengths))
    for n, parts in enumerate(zip(*(y.split(lengths, 1) for y in x.values()), strict=True)):
        if lengths[n]:
            one = delta_transition(**dict(zip(x, parts, strict=True)))
            close(M[n], one[0][0])
            close(Hc[n], one[1][0])
        else:
            close(M[n], torch.eye(K).double().expand(H, K, K))
            close(Hc[n], torch.zeros_like(Hc[n]))


def test_transition_is_differentiable() -> None:
    x = {name: y.requires_grad_() for name, y in given(1, 5).items()}
    loss = sum(y.square().sum() for y in delta_transition(**x, chunk_size=2))
    S = DeltaState(torch.cat([torch.zeros(1, H, K, V), torch.eye(K).expand(1, H, K, K)], -1).double())
    wide = x | {"v": torch.cat([x["v"], x["v"].new_zeros(1, 5, H, K)], -1)}
    want = delta(normal(1, 5, H, K), **wide, state=S, backend="reference")[1].S.square().sum()
    for a, b in zip(*(torch.autograd.grad(y, list(x.values())) for y in (loss, want)), strict=True):  # type: ignore[arg-type]
        close(a, b)


# Numerics


@pytest.mark.parametrize("substeps", [1, 2])
def test_reflections_keep_the_norm_of_the_state(substeps: int) -> None:
    """beta = 2 on unit keys without a write is orthogonal: 10,000 steps in fp32 move the norm by less than 1e-3."""
    torch.manual_seed(0)
    k = torch.randn(1, 10_000, 1, K)
    S = DeltaState(torch.randn(1, 1, K, V))
    beta = 2 / k.square().sum(-1)
    _, after = delta(k[:, ::substeps], k, torch.zeros(1, 10_000, 1, V), beta, substeps=substeps, state=S)
    assert abs(float(after.S.norm() / S.S.norm()) - 1) < 1e-3


def test_swaps_permute_the_rows_of_the_state() -> None:
    """The key (e_i - e_j) / sqrt 2 with beta = 2 swaps rows i and j: 10,000 random swaps in fp32 stay exact to 1e-2."""
    torch.manual_seed(0)
    pairs = torch.combinations(torch.arange(5))[torch.randint(10, (10_000,))]
    k = torch.zeros(10_000, 5).scatter(1, pairs, torch.tensor([[1.0, -1.0]]).expand(10_000, 2) * 0.5**0.5)
    content = torch.randn(5, V)
    order = list(range(5))
    for i, j in pairs.tolist():
        order[i], order[j] = order[j], order[i]
    k = k[None, :, None]
    beta = torch.full((1, 10_000, 1), 2.0)
    _, after = delta(k, k, torch.zeros(1, 10_000, 1, V), beta, state=DeltaState(content[None, None]))
    assert (after.S[0, 0] - content[order]).abs().max() < 1e-2


def test_one_key_and_the_largest_beta_alternate_the_sign() -> None:
    torch.manual_seed(0)
    k = normalized(normal(1, 1, 1, K)).float()
    S = torch.randn(1, 1, K, V)
    rows = k.expand(1, 130, 1, K)
    o, _ = delta(rows, rows, torch.zeros(1, 130, 1, V), torch.full((1, 130, 1), 2.0), scale=1.0, state=DeltaState(S))
    sign = torch.where(torch.arange(130) % 2 == 0, -1.0, 1.0)[None, :, None, None]
    torch.testing.assert_close(o, sign * (k @ S).expand_as(o), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("gated", "substeps"), [(False, 1), (True, 1), (True, 2)])
def test_reflections_by_one_key_do_not_add_up_its_rounding(gated: bool, substeps: int) -> None:
    """Its length, off by a rounding, is off in the same way in every row: 1,024 reflections would multiply it."""
    torch.manual_seed(0)
    R, heads, K = 1024, 64, 64
    k, v, beta = torch.randn(1, 1, heads, K).expand(1, R, -1, -1), torch.zeros(1, R, heads, 1), torch.ones(1, R, heads)
    q, S, g = k[:, ::substeps], torch.randn(1, heads, K, 1), torch.zeros(1, R // substeps, heads) if gated else None

    def after(dtype: torch.dtype) -> Tensor:
        inputs = (None if x is None else x.to(dtype) for x in (q, k, v, 2 * beta, g))
        state = DeltaState(S.to(dtype))
        return delta(*inputs, l2norm=True, substeps=substeps, state=state, backend="chunked")[1].S  # type: ignore[arg-type]

    along = (normalized(k[0, 0]) * S[0, ..., 0]).sum(-1)
    assert (after(torch.float32) - after(torch.float64)).norm(dim=2).max() < 1e-4 * along.abs().max()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_nothing_passes_a_hard_reset(backend: str) -> None:
    x, q = given(1, 20, channelwise=True), normal(1, 20, H, K)
    x["g"][:, 11] = -torch.inf
    S = normal(1, H, K, V).requires_grad_()
    v = x.pop("v").requires_grad_()
    o, after = delta(q, v=v, **x, state=DeltaState(S), chunk_size=8, backend=backend)
    other, _ = delta(q, v=v, **x, state=DeltaState(100 * S), chunk_size=8, backend=backend)
    assert torch.equal(o[:, 11:], other[:, 11:])
    dS, dv = torch.autograd.grad(after.S.sum() + o[:, 11:].sum(), (S, v))
    assert not dS.any() and not dv[:, :11].any() and dv[:, 11:].all()


@pytest.mark.parametrize("vector", [False, True])
def test_one_token_of_very_strong_decay_costs_no_accuracy(vector: bool) -> None:
    """A decay of -200 among mild ones, inside a chunk: fp32 stays at fp32 accuracy."""
    x, q = given(1, 64), normal(1, 64, H, K)
    x["g"] = -0.01 * torch.rand(1, 64, H, K if vector else 1).double()
    x["g"][:, 29] = -200.0
    x["g"] = x["g"] if vector else x["g"][..., 0]
    want, _ = delta(q, **x, backend="reference")
    got, _ = delta(q.float(), **{name: y.float() for name, y in x.items()})
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_channelwise_erasing_may_expand_the_state() -> None:
    """Gated DeltaNet-2 is no contraction: a key orthogonal to the state, erased on half of the channels, moves energy
    into it, by about 1.12 a step. Chunks follow the recurrence all the same."""
    torch.manual_seed(0)
    start = x = normal(K)
    keys, gates = [], []
    for _ in range(64):
        half = torch.zeros(K).double()
        for i in x.abs().argsort(descending=True):  # two halves of about the same energy
            half[i] = float((half * x).norm() <= ((1 - half) * x).norm())
        one, two = half * x, (1 - half) * x
        k = one / one.square().sum() - two / two.square().sum()
        keys.append(k / k.norm())
        gates.append(half)
        x = x - keys[-1] * ((half * keys[-1]) @ x)
    k, b = (torch.stack(y)[None, :, None] for y in (keys, gates))
    w = torch.zeros(1, 64, 1, 1).double()
    _, got = delta(k, k, w, b, None, w, state=DeltaState(start.view(1, 1, K, 1)), chunk_size=64)
    assert x.norm() > 100 * start.norm()
    assert (got.S.flatten() - x).abs().max() < 1e-9 * x.abs().max()


# Interface


def test_a_step_calls_no_registered_op() -> None:
    x, q = given(B, 1), normal(B, 1, H, K)
    untied = {"a": normal(B, 1, H, K), "b": normal(B, 1, H, K), "g": x["g"]}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        delta(q, **x)
        dplr(q, x["k"], x["v"], **untied)
    assert not [e.key for e in profile.key_averages() if "linnet" in e.key]


def test_bad_options_are_named() -> None:
    x, q = given(channelwise=True), normal(B, T, H, K)
    for changes, message in (
        ({"w": None}, r"w: expected \[B=2, R=37, H, V\] with a channel-wise beta, got None"),
        ({"substeps": 0}, "substeps: expected an integer >= 1, got 0"),
        ({"substeps": 2}, r"k: expected shape \[B=2, R=74, .* got"),
        ({"chunk_size": 24, "backend": "chunked"}, "chunk_size: expected a power of two, got 24"),
        ({"g": -x["g"]}, "g: expected natural-log decays"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            delta(q, **x | changes)  # type: ignore[arg-type]


def test_cost_is_the_floor_of_bytes() -> None:
    """Bytes a token and head at K = V = 128 in bf16: q, k, v, o, an fp32 strength and what the gates add."""

    def per_token(**options) -> float:
        one, two = (cost(1, t, 1, 128, 128, **options).bytes for t in (1024, 2048))
        return (two - one) / 1024

    assert per_token() == 1028
    assert per_token(gate="scalar") == 1032
    assert per_token(gate="vector") == 1284
    assert per_token(gate="vector", channelwise=True) == 1792
    assert per_token(gate="vector", backward=True) == 1284 + 1284 + 1028  # inputs and do again, five gradients
