"""What is particular to the decay engine; everything general is in the contract suite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops import DecayState, Segments, decay, get_op, mlstm, value_checks
from linnet.ops.decay import _pieces

B, T, H, K, V = 2, 37, 2, 8, 6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gradients(with_bonus: bool = False, value_gate: bool = False) -> dict[str, Tensor]:
    """Inputs, outputs, states and every gradient of one call in float64."""
    torch.manual_seed(0)
    x = {name: normal(B, T, H, K) for name in "qk"} | {"v": normal(B, T, H, V), "S0": normal(B, H, K, V)}
    x["gv" if value_gate else "g"] = -torch.exp(normal(B, T, H, V if value_gate else K))
    if with_bonus:
        x["u"] = normal(H, K)
    leaves = {name: value.requires_grad_() for name, value in x.items()}
    gates = {name: leaves[name] for name in ("g", "gv", "u") if name in leaves}
    o, state = decay(leaves["q"], leaves["k"], leaves["v"], **gates, state=DecayState(leaves["S0"]), chunk_size=8)
    do, dS = normal(*o.shape), normal(*state.S.shape)
    found = torch.autograd.grad([o, state.S], list(leaves.values()), [do, dS])
    x |= {"o": o, "S": state.S, "do": do, "dS": dS}
    return x | {f"d{name}": value for name, value in zip(leaves, found, strict=True)}


def after(x: Tensor) -> Tensor:
    """Sum over the tokens from each one on."""
    return x.flip(1).cumsum(1).flip(1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_key_gate_gradient_is_queries_less_keys() -> None:
    """gla.md 2.5: dg_t = sum_{i>=t} (q_i.dq_i - k_i.dk_i) + rowsum(S_T.dS_T), per channel."""
    x = gradients()
    close(x["dg"], after(x["q"] * x["dq"] - x["k"] * x["dk"]) + (x["S"] * x["dS"]).sum(-1)[:, None])


def test_value_gate_gradient_is_outputs_less_values() -> None:
    x = gradients(value_gate=True)
    close(x["dgv"], after(x["o"] * x["do"] - x["v"] * x["dv"]) + (x["S"] * x["dS"]).sum(-2)[:, None])


def test_exclusive_reading_shifts_the_gate_gradient() -> None:
    """With a bonus the own token is outside the state: its part of dq and dk does not reach the gate."""
    x, scale = gradients(with_bonus=True), K**-0.5
    own = (x["do"] * x["v"]).sum(-1, keepdim=True)
    dq, dk = (x[f"d{a}"] - scale * x["u"] * x[b] * own for a, b in (("q", "k"), ("k", "q")))
    read = after(x["q"] * dq) - x["q"] * dq
    close(x["dg"], read - after(x["k"] * dk) + (x["S"] * x["dS"]).sum(-1)[:, None])
    close(x["du"], (scale * x["q"] * x["k"] * own).sum((0, 1)))


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64, 128])
def test_chunk_size_is_a_matter_of_speed(chunk_size: int) -> None:
    torch.manual_seed(0)
    q, k, v, g = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), -torch.exp(normal(B, T, H, K))
    expected = decay(q, k, v, g, backend="reference")
    for a, b in zip(decay(q, k, v, g, chunk_size=chunk_size, backend="chunked"), expected, strict=True):
        close(a if isinstance(a, Tensor) else a.S, b if isinstance(b, Tensor) else b.S)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_chunk_size_must_be_a_power_of_two(backend: str) -> None:
    q = torch.zeros(1, 4, 1, 4)
    with pytest.raises(ValueError, match=r"chunk_size: expected a power of two, got 48"):
        decay(q, q, q, chunk_size=48, backend=backend)


@pytest.mark.parametrize("gate", [-0.01, -5.0])
def test_gate_gradient_stays_accurate_over_long_sequences(gate: float) -> None:
    """The gradient of every gate is summed from its own pairs, so neither length nor strong decay costs digits."""
    torch.manual_seed(0)
    steps = 65536
    x = [torch.randn(1, steps, 1, d) for d in (8, 8, 8)] + [gate * torch.rand(1, steps, 1, 8)]
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [y.detach().to(dtype).requires_grad_() for y in x]
        o, _ = decay(*leaves)
        found.append(torch.autograd.grad(o, leaves[3], torch.ones_like(o))[0].double())
    assert (found[1] - found[0]).norm() < 1e-6 * found[0].norm()


def test_positive_decay_is_refused() -> None:
    q = torch.zeros(1, 3, 1, 4)
    with pytest.raises(ValueError, match=r"g: expected natural-log decays, all <= 0 .* maximum of 0\.5"):
        decay(q, q, q, torch.full((1, 3, 1), 0.5))
    with value_checks(), pytest.raises(ValueError, match="gv: expected natural-log decays"):
        decay(q, q, q, gv=torch.full((1, 3, 1, 4), torch.nan))


def naive_mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """The cell without stabiliser: exp(i), sigmoid(f) and a denominator of at least 1."""
    C, n, outputs = torch.zeros(B, H, K, V, dtype=q.dtype), torch.zeros(B, H, K, dtype=q.dtype), []
    for t in range(q.shape[1]):
        keep, take = torch.sigmoid(f[:, t])[..., None], torch.exp(i[:, t])[..., None]
        C = keep[..., None] * C + take[..., None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = keep * n + take * k[:, t]
        query = K**-0.5 * q[:, t]
        below = (query * n).sum(-1).abs().clamp(min=1)
        outputs.append((query[..., None] * C).sum(-2) / below[..., None])
    return torch.stack(outputs, 1)


def test_mlstm_is_the_cell_with_its_full_gradient() -> None:
    """tfla.md 2.6: the denominator's gradient included, for every input."""
    torch.manual_seed(0)
    x = [normal(B, T, H, d) for d in (K, K, V)] + [normal(B, T, H) for _ in range(2)]
    x = [y.requires_grad_() for y in x]
    ours, theirs = mlstm(*x, chunk_size=8)[0], naive_mlstm(*x)
    close(ours, theirs)
    do = normal(*ours.shape)
    for a, b in zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(theirs, x, do), strict=True):
        close(a, b)


def test_mlstm_with_equal_gates_is_normalised_attention_for_open_gates() -> None:
    """With f = inf and large i the denominator is the sum of weights: a softmax-free average over all tokens."""
    torch.manual_seed(0)
    q, k = normal(B, T, H, K).abs(), normal(B, T, H, K).abs()
    v, i, f = normal(B, T, H, V), torch.full((B, T, H), 30.0).double(), torch.full((B, T, H), torch.inf).double()
    close(mlstm(q, k, v, i, f)[0], decay(q, k, v, normalize=True, eps=0.0)[0])


def test_mlstm_resets_its_stabiliser_in_every_segment() -> None:
    torch.manual_seed(0)
    x = [normal(1, 40, H, d) for d in (K, K, V)] + [20 * normal(1, 40, H), 20 * normal(1, 40, H)]
    lengths = [13, 1, 0, 26]
    h, state = mlstm(*x, segments=Segments.from_lengths(lengths), chunk_size=8)
    at = 0
    for n, length in enumerate(lengths):
        if length:
            one, last = mlstm(*(y[:, at : at + length] for y in x), chunk_size=8)
            close(h[:, at : at + length], one)
            close(state.m[n : n + 1], last.m)
        at += length


def test_sigmoid_mlstm_is_the_scalar_gate() -> None:
    torch.manual_seed(0)
    q, k, v, i, f = *(normal(B, T, H, d) for d in (K, K, V)), normal(B, T, H), normal(B, T, H)
    g = F.logsigmoid(f)
    close(decay(q, k, v, g, w=i.sigmoid())[0], decay(q, i.sigmoid()[..., None] * k, v, g)[0])


def test_cost_counts_bytes_once() -> None:
    cost = get_op("decay").cost(4, 8192, 16, 128, 128, gate="scalar")
    state = 4 * 16 * 128 * 128 * 4
    assert cost.bytes == 4 * 8192 * 16 * (4 * 128 * 2 + 4) + 2 * state and cost.state_bytes == state
    with pytest.raises(ValueError, match="gate: expected one of"):
        get_op("decay").cost(1, 1, 1, 1, 1, gate="matrix")


def test_tiles_are_as_wide_as_hopper_needs_them() -> None:
    from linnet.ops.decay.settings import chunk_length, launch_settings

    for DR in range(1, 513):
        for DP in (1, 4, 24, 35, 64, 300):
            settings = launch_settings(DR, DP, chunk_length(torch.bfloat16), torch.bfloat16, False)
            assert settings["BR"] >= DR and (settings["BR"] < 64 or settings["BP"] == 64)


def close_in_16_bits(
    x: dict[str, Tensor], dtype: torch.dtype, device: torch.device, lengths: list[int] | None = None, **fixed: Tensor
) -> None:
    """Kernels against the reference in float64 and, for what rounding costs, in ``dtype``."""
    segments = None if lengths is None else Segments.from_lengths(lengths, device)
    results = []
    for each, backend in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "triton")):
        given = {name: one.to(dtype).to(each).requires_grad_() for name, one in x.items() if name in "qkv"}
        wide = torch.promote_types(each, torch.float32)
        given |= {name: one.to(wide).requires_grad_() for name, one in x.items() if name not in "qkv"}
        rest = {name: one.to(wide) for name, one in fixed.items()} | {n: y for n, y in given.items() if n != "S"}
        o, (last, _) = decay(**rest, state=DecayState(given["S"]), segments=segments, backend=backend)
        found = torch.autograd.grad(o.double().sin().sum() + last.double().sin().sum(), list(given.values()))
        results.append([y.double() for y in (o, last, *found)])
    # Operands rounded to 16 bits, the rest exact, cost half an eps at most; a gate's gradient, in which sums over all
    # tokens cancel, up to 2.5 eps for these inputs.
    eps = torch.finfo(dtype).eps
    for name, exact, rough, got in zip(("o", "last", *x), *results, strict=True):
        share = (4 if name == "g" else 0.5) * eps
        assert (got - exact).norm() <= 4 * (rough - exact).norm() + share * exact.norm(), name


@pytest.mark.parametrize(
    ("B", "T", "gated", "piece"),
    [
        (4, 8192, False, 8192),
        (8, 300, False, 8192),
        (4, 8192, True, 512),
        (5, 8192, False, 512),
        (2, 65536, False, 512),
    ],
)
def test_boundary_states_are_few_where_nothing_needs_them(B: int, T: int, gated: bool, piece: int) -> None:
    """Heads of 64 without gates, where whole sequences fill the GPU and none of it waits for the last ones."""
    x = torch.empty(B, T, 32, 64, dtype=torch.bfloat16, device="meta")
    w = x[..., 0] if gated else None
    given: list[Tensor | None] = [x, x, x, None, None, None, w, None, None]
    assert _pieces(*given) == (piece, B * -(-T // piece))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [39, 130])
@pytest.mark.parametrize(("K", "V"), [(35, 4), (40, 8), (100, 4), (153, 16), (200, 24), (20, 35), (48, 48)])
def test_channels_that_fill_no_tile(K: int, V: int, T: int, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("in 16 bits, which the interpreter does not multiply: needs --device cuda")
    torch.manual_seed(0)
    x = {n: torch.randn(2, T, 2, D, device=device) / D**0.5 for n, D in zip("qkv", (K, K, V), strict=True)}
    x |= {"g": -torch.rand(2, T, 2, device=device), "S": torch.randn(2, 2, K, V, device=device)}
    close_in_16_bits(x, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 320), (50, 299), (2, 1100), [130, 1, 0, 168]], ids=str)
@pytest.mark.parametrize("gate", ["none", "constant"])
def test_heads_of_64(gate: str, shape: tuple[int, int] | list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Their gradients of keys and values come in one walk, over whole sequences or, where those are few, in pieces."""
    if device.type != "cuda":
        pytest.skip("in 16 bits, which the interpreter does not multiply: needs --device cuda")
    torch.manual_seed(0)
    lengths = shape if isinstance(shape, list) else None
    B, T = shape if isinstance(shape, tuple) else (1, sum(shape))
    x = {name: torch.randn(B, T, 2, 64, device=device) / 8 for name in "qkv"}
    x["S"] = torch.randn(B if lengths is None else len(lengths), 2, 64, 64, device=device)
    fixed = {"g": -torch.rand(2, device=device) / 8} if gate == "constant" else {}
    close_in_16_bits(x, dtype, device, lengths, **fixed)
