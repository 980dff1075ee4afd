"""What each process of the test does: every engine and two decoders, on its slice and on the whole, in parts:

    PYTHONPATH=tests python tests/parallel/processes.py PORT PROCESSES DEVICE [PART ...]

On GPUs it runs over NCCL, and there is a part for the kernels in bf16.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from forked import begin, fork
from linnet import ops, parallel
from linnet.models import Decoder, DecoderConfig
from linnet.ops import ConvState, DecayState, DeltaState, ScanState
from linnet.ops.core import map_state, state_tensors
from linnet.parallel import ops as sliced

B, T, H, K, V = 2, 19, 2, 3, 4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gates(*shape):
    g = F.logsigmoid(randn(*shape) + 2)
    g[:, 7] = -torch.inf  # a hard reset, in a slice of its own
    return g


def cases():
    """name, whole op, op on slices, tensors over time, others, options, state"""
    q, k, v = randn(B, T, 1, K), randn(B, T, 1, K), randn(B, T, H, V)
    S = randn(B, H, K, V)
    decays = {
        "none": {},
        "constant": {"g": -torch.rand(H, dtype=torch.float64)},
        "scalar": {"g": gates(B, T, H), "w": torch.rand(B, T, H, dtype=torch.float64)},
        "vector": {"g": gates(B, T, H, K)},
        "values": {"g": gates(B, T, H, K), "gv": gates(B, T, H, V)},
        "bonus": {"g": gates(B, T, H, K), "u": randn(H, K)},
    }
    for name, extra in decays.items():
        yield f"decay-{name}", ops.decay, sliced.decay, {"q": q, "k": k, "v": v, **extra}, {}, DecayState(S)
    q1, k1 = q.exp(), k.exp()
    positive = {"q": q1, "k": k1, "v": v, "g": gates(B, T, H)}
    z = torch.rand(B, H, K, dtype=torch.float64)
    yield "decay-normalised", ops.decay, sliced.decay, positive, {"normalize": True}, DecayState(S, z)
    keys = F.normalize(k, dim=-1)
    beta = 2 * torch.rand(B, T, H, dtype=torch.float64)
    channels = {"beta": torch.rand(B, T, H, K, dtype=torch.float64), "w": torch.rand(B, T, H, V, dtype=torch.float64)}
    deltas = {
        "plain": {"beta": beta},
        "scalar": {"beta": beta, "g": gates(B, T, H)},
        "vector": {"beta": beta, "g": gates(B, T, H, K)},
        "channels": {"g": gates(B, T, H, K), **channels},
    }
    for name, extra in deltas.items():
        options = {"l2norm": name == "vector"}
        yield f"delta-{name}", ops.delta, sliced.delta, {"q": q, "k": keys, "v": v, **extra}, options, DeltaState(S)
    double = [torch.cat([x, x.flip(1)], 2).unflatten(2, (2, -1)) for x in (keys, v)]  # two edits a token
    both = {"q": q, "k": double[0], "v": double[1], "beta": torch.stack([beta, beta / 2], 2)}
    yield "delta-substeps", _edited(ops.delta), _edited(sliced.delta), both, {"substeps": 2}, DeltaState(S)
    a, b = torch.rand(B, T, 5, dtype=torch.float64), randn(B, T, 5)
    yield "scan-real", ops.scan, sliced.scan, {"a": a, "b": b}, {}, ScanState(randn(B, 5))
    pairs = randn(B, T, 5, 2)
    complex_ = {"a": 0.6 * randn(B, T, 5, 2), "b": pairs}
    yield "scan-complex", ops.scan, sliced.scan, complex_, {}, ScanState(randn(B, 5, 2))
    block = {"a": 0.5 * randn(B, T, 5, 2, 2), "b": pairs}
    yield "scan-block", ops.scan, sliced.scan, block, {}, ScanState(randn(B, 5, 2))
    mamba = {"x": randn(B, T, 4), "delta": torch.rand(B, T, 4, dtype=torch.float64), "A": -randn(4, 3).exp()}
    mamba |= {"B": randn(B, T, 3), "C": randn(B, T, 3), "D": randn(4)}
    yield "selective_scan", ops.selective_scan, sliced.selective_scan, mamba, {}, ScanState(randn(B, 4, 3))
    filters = {"x": randn(B, T, 4), "weight": randn(4, 4), "bias": randn(4)}
    yield "conv", ops.conv, sliced.conv, filters, {"activation": "silu"}, ConvState(randn(B, 3, 4))
    yield (
        "attention",
        ops.attention,
        sliced.attention,
        {"q": randn(B, T, H, K), "k": k, "v": v[:, :, :1]},
        {"window": 5},
        None,
    )


def _edited(op):
    """Substeps on an axis of their own, so that slices are cut between tokens."""

    def run(q, k, v, beta, **options):
        return op(q, *[x.flatten(1, 2) for x in (k, v, beta)], **options)

    return run


def check(name, whole, part, inputs, options, state, group):
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def leaves():
        held = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        return held, None if state is None else map_state(lambda x: x.clone().requires_grad_(), state)

    a, start_a = leaves()
    out, after = whole(**a, **options, **({} if state is None else {"state": start_a}))
    weight, last = randn(*out.shape), map_state(lambda x: randn(*x.shape), after)
    final = [
        (x * y).sum() for x, y in zip(state_tensors(after), state_tensors(last), strict=True) if x.is_floating_point()
    ]
    ((out * weight).sum() + sum(final)).backward()

    b, start_b = leaves()
    timed = {key for key, x in inputs.items() if x.dim() > 1 and x.shape[:2] == (B, T)}
    mine = {key: parallel.shard(x, group) if key in timed else x for key, x in b.items()}
    got, reached = part(**mine, **options, group=group, **({} if state is None else {"state": start_b}))
    close(name, got, parallel.shard(out, group))
    loss = (got * parallel.shard(weight, group)).sum()
    if rank == size - 1:
        for x, y, w in zip(state_tensors(reached), state_tensors(after), state_tensors(last), strict=True):
            close(name, x, y)
            if x.is_floating_point():
                loss = loss + (x * w).sum()
    loss.backward()
    ours, theirs = [*b.values(), *state_tensors(start_b)], [*a.values(), *state_tensors(start_a)]
    for x, y in zip(ours, theirs, strict=True):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group)  # each process has those of its slice
        close(name, grad, torch.zeros_like(y) if y.grad is None else y.grad)


def close(name, x, y):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def check_decoder(group, split_rows):
    torch.manual_seed(1)
    mixers = [
        "gated_deltanet(num_heads=2, head_dim=4)", "gla(num_heads=2)", "attention(num_heads=2, window=4)",
        "mamba2(head_dim=8, state_dim=4)", "mlstm(num_heads=2)", "rwkv7(head_dim=4)", "attention(num_heads=2)",
    ]  # fmt: skip
    config = DecoderConfig(
        vocab_size=11, d_model=16, num_layers=len(mixers), mixers=mixers, mlp_hidden=16, init_std=0.3
    )
    model = Decoder(config).double()
    tokens, targets = torch.randint(11, (B, T)), torch.randint(11, (B, T))
    targets[:, :5] = -100  # the first slice has no targets, in the case of four
    expected = model.loss(tokens, targets)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        whole = model(tokens)
    spread = parallel.ContextParallel(model, group, split_rows=split_rows)
    loss = spread.loss(parallel.shard(tokens, group), parallel.shard(targets, group))
    loss.backward()
    parallel.sum_gradients(model, group)
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    close("loss", total, expected.detach())
    for name, p in model.named_parameters():
        close(name, p.grad, grads[name])
    with torch.no_grad():
        out = spread(parallel.shard(tokens, group))
    close("logits", out.logits, parallel.shard(whole.logits, group))
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        for x, y in zip(state_tensors(out.state), state_tensors(whole.state), strict=True):
            close("state", x, y)
    spread.remove()
    with torch.no_grad():
        close("removed", model(tokens).logits, whole.logits)


def check_tensor_parallel(group):
    torch.manual_seed(2)
    mixers = [
        "gated_deltanet(num_heads=2, num_v_heads=4, head_dim=4)", "gla(num_heads=4, num_kv_heads=2, conv_size=3)",
        "attention(num_heads=4, num_kv_heads=2, qkv_bias=True, o_bias=True, qk_norm=True, output_gate=True)",
        "mamba2(head_dim=4, state_dim=3, num_groups=2)", "mlstm(num_heads=2)", "rglru(num_heads=2)",
        "kda(num_heads=2, num_v_heads=4, head_dim=4)", "simple_gla(num_heads=2)", "linear_attention(num_heads=2)",
        "deltaproduct(num_heads=2, num_v_heads=4, gate=True, output_gate=True)", "deltanet(num_heads=2)",
        "mla(num_heads=2, kv_rank=4, q_rank=6, nope_dim=4, rope_dim=2, v_dim=6)",
        "gated_deltanet2(num_heads=2, num_v_heads=4, head_dim=4)",
    ]  # fmt: skip
    shape = {"vocab_size": 11, "d_model": 16, "num_layers": len(mixers), "mlp_hidden": 12, "init_std": 0.3}
    moe = {"num_experts": 3, "shared_experts": 1, "shared_gate": True, "expert_hidden": 4}
    for options in (
        {"mixers": mixers, "mlp": ["swiglu", "none", "moe", "geglu"], "mlp_bias": True, **moe},
        {"mixers": mixers[1:3], "num_layers": 2, "tie_embeddings": True, "logit_soft_cap": 5.0},
    ):
        model = Decoder(DecoderConfig(**{**shape, **options})).double()
        with torch.no_grad():
            for p in model.parameters():  # no weight that a wrong part of would go unnoticed
                p.add_(0.1 * torch.randn_like(p))
        spread = copy.deepcopy(model)
        tokens, targets = torch.randint(11, (B, T)), torch.randint(11, (B, T))
        expected = model.loss(tokens, targets)
        expected.backward()
        mesh = DeviceMesh.from_group(group, torch.get_default_device().type)
        assert parallel.tensor_parallel(spread, mesh) is spread
        loss = spread.loss(tokens, targets)
        loss.backward()
        close("loss", loss.detach(), expected.detach())
        whole = dict(model.named_parameters())
        split = 0
        for name, p in spread.named_parameters():
            close(name, p.grad.full_tensor(), whole[name].grad)
            close(name, p.full_tensor(), whole[name])
            split += p.numel() - p.to_local().numel()
        assert split > 0.35 * sum(p.numel() for p in whole.values())
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (spread, model)]
        close("norm", norms[0].full_tensor(), norms[1])
        for m in (spread, model):
            torch.optim.AdamW(m.parameters(), lr=0.01).step()
        tokens = tokens.view(1, -1)
        lengths = ops.Segments.from_lengths([5, 14, 19], tokens.device)
        with torch.no_grad():
            close("logits", spread(tokens, segments=lengths).logits, model(tokens, segments=lengths).logits)
            first = [m(tokens[:, :30]).state for m in (spread, model)]
            outputs = [m(tokens[:, 30:], state).logits for m, state in zip((spread, model), first, strict=True)]
            close("from a state", *outputs)
            close("from zeros", spread(tokens, spread.init_state(1)).logits, model(tokens).logits)
    for mixer, text in (
        ("hgrn2(head_dim=4)", "layer 1: the mixer hgrn2 cannot be split by heads"),
        ("attention(num_heads=2, qk_norm='joint')", "qk_norm='joint' is over all of them"),
        ("gla(num_heads=3, expand_k=0.75, expand_v=0.75)", "the mixer gla has num_heads=3"),
    ):
        model = Decoder(DecoderConfig(**{**shape, "d_model": 16, "num_layers": 2, "mixers": ["gla", mixer]}))
        before = model.state_dict()
        refuses(lambda model=model: parallel.tensor_parallel(model, mesh), text)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    refuses(lambda: parallel.tensor_parallel(Decoder.meta(model.config), mesh), "decoder: expected initialised weights")


def check_sharded_and_split():
    """Two processes for the layers, times the others for the batch."""
    mesh = init_device_mesh(
        torch.get_default_device().type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor")
    )
    torch.manual_seed(3)
    mixers = ["gated_deltanet(num_heads=2, head_dim=4)", "attention(num_heads=2)"]
    model = Decoder(DecoderConfig(vocab_size=11, d_model=8, num_layers=2, mixers=mixers, mlp_hidden=8)).double()
    spread = parallel.tensor_parallel(copy.deepcopy(model), mesh["tensor"])
    for module in (*spread.layers, spread):
        fully_shard(module, mesh=mesh["data"])
    register_fsdp_forward_method(spread, "loss")
    tokens = torch.randint(11, (2, T))
    spread.loss(*[tokens.chunk(mesh["data"].size())[mesh["data"].get_local_rank()]] * 2).backward()
    model.loss(tokens, tokens).backward()
    for m in (spread, model):
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    found = get_model_state_dict(spread, options=StateDictOptions(full_state_dict=True))
    for name, x in model.state_dict().items():
        if dist.get_rank() == 0:
            close(name, found[name], x)


def refuses(call, text):
    try:
        call()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


def check_refusals(group):
    config = DecoderConfig(vocab_size=11, d_model=16, num_layers=1, mixers=["gla(num_heads=2)"])
    model = Decoder(config)
    model.gradient_checkpointing = True
    refuses(lambda: parallel.ContextParallel(model, group), "gradient_checkpointing")
    refuses(lambda: parallel.shard(torch.zeros(1, 1), group), "at least")
    refuses(lambda: sliced.conv(randn(1, 2, 3), randn(3, 5), group=group), "slices of at least 4 tokens")


KERNELS = ("decay", "decay-vector", "delta", "delta-vector", "scan", "selective_scan", "conv", "attention")


def kernel_case(name):
    """Of a size that the kernels take: whole op, op on slices, tensors over time, others."""
    B, T, H, D = 1, 300, 2, 64

    def half(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16)

    def rates(*shape):
        return F.logsigmoid(torch.randn(*shape) + 3)

    q, k, v, beta = half(B, T, H, D), half(B, T, H, D), half(B, T, H, D), torch.rand(B, T, H).bfloat16()
    g = rates(B, T, H, D) if name.endswith("vector") else rates(B, T, H)
    edits = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta, "g": g}
    channels = {"A": -torch.rand(D, 16).exp(), "D": torch.randn(D)}
    mamba = {"x": half(B, T, D), "delta": torch.rand(B, T, D), "B": half(B, T, 16), "C": half(B, T, 16)}
    return {
        "decay": (ops.decay, sliced.decay, {"q": q, "k": k, "v": v, "g": g}, {}),
        "delta": (ops.delta, sliced.delta, edits, {}),
        "scan": (ops.scan, sliced.scan, {"a": rates(B, T, D).exp(), "b": torch.randn(B, T, D)}, {}),
        "selective_scan": (ops.selective_scan, sliced.selective_scan, mamba, channels),
        "conv": (ops.conv, sliced.conv, {"x": half(B, T, D)}, {"weight": half(D, 4)}),
        "attention": (
            partial(ops.attention, window=32), partial(sliced.attention, window=32), {"q": q, "k": k, "v": v}, {}
        ),
    }[name.removesuffix("-vector")]  # fmt: skip


def check_kernel(name, group):
    """In 16 bits slices are no further from the exact result than the whole is, up to a rounding."""
    whole, part, timed, shared = kernel_case(name)
    weight = None

    def run(op, dtype=None, cut=lambda x: x):
        nonlocal weight
        given = {key: x.to(dtype or x.dtype, copy=True).requires_grad_() for key, x in (timed | shared).items()}
        y, state = op(**{key: cut(x) if key in timed else x for key, x in given.items()})
        weight = torch.randn(y.shape) if weight is None else weight
        (y * cut(weight)).sum().backward()
        return y, [x.grad.float() for x in given.values()], state

    exact, exact_grads, exact_state = run(whole, torch.float64)
    one, one_grads, one_state = run(whole)
    ours, our_grads, our_state = run(partial(part, group=group), cut=lambda x: parallel.shard(x, group))
    for x in our_grads:
        dist.all_reduce(x, group=group)
    triples = [(parallel.shard(exact, group), parallel.shard(one, group), ours)]
    triples += zip(exact_grads, one_grads, our_grads, strict=True)
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        states = [state_tensors(x) for x in (exact_state, one_state, our_state)]
        triples += [xs for xs in zip(*states, strict=True) if xs[0].is_floating_point()]
    check_errors(name, triples)


def check_errors(name, triples):
    for i, triple in enumerate(triples):
        exact, one, ours = (x.detach().double() for x in triple)
        errors = [float((x - exact).norm() / exact.norm()) for x in (one, ours)]
        assert errors[1] <= 2 * errors[0] + 2**-9, (name, i, errors)


def check_kernels_of_a_decoder(group):
    mixers = ["gated_deltanet(num_heads=2, head_dim=64)", "attention(num_heads=2, window=32)", "attention(num_heads=2)"]
    model = Decoder(DecoderConfig(vocab_size=11, d_model=128, num_layers=3, mixers=mixers, mlp_hidden=128))
    tokens, targets = torch.randint(11, (2, 300)), torch.randint(11, (2, 300))
    found = []
    for kind in ("exact", "one", "ours"):
        copied = copy.deepcopy(model)
        if kind == "exact":
            copied.double()
        with torch.autocast("cuda", torch.bfloat16, enabled=kind != "exact"):
            if kind == "ours":
                spread = parallel.ContextParallel(copied, group, split_rows=True)
                loss = spread.loss(parallel.shard(tokens, group), parallel.shard(targets, group))
            else:
                loss = copied.loss(tokens, targets)
        loss.backward()
        loss = loss.detach()
        if kind == "ours":
            parallel.sum_gradients(copied, group)
            dist.all_reduce(loss, group=group)
        found.append([loss, *[p.grad for p in copied.parameters()]])
    check_errors("decoder", zip(*found, strict=True))


def check_ops(cases, group):
    for name, *case in cases:
        check(name, *case, group)
        if dist.get_rank() == 0:
            print("OK", name, flush=True)


def parts(device):
    """Name -> the processes that take part, and what they do."""
    everyone = {
        "sharded-and-split": lambda _: check_sharded_and_split(),
        "ops": lambda group: check_ops(cases(), group),
        "decoder": lambda group: check_decoder(group, False),
        "decoder-rows": lambda group: check_decoder(group, True),
        "refusals": check_refusals,
    }
    if device == "cuda":
        everyone |= {f"kernels-{name}": partial(check_kernel, name) for name in KERNELS}
        everyone["kernels-decoder"] = check_kernels_of_a_decoder
    two = {
        "ops-of-two": lambda group: check_ops([*cases()][2::6], group),
        "decoder-of-two": lambda group: check_decoder(group, False),
        "tensor-parallel": check_tensor_parallel,
    }
    return {name: (None, run) for name, run in everyone.items()} | {name: (2, run) for name, run in two.items()}


def main(rank, size, port, device, names):
    begin("start", 60)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    options = {}
    if device == "cuda":
        if torch.cuda.device_count() < size:
            raise ValueError(f"expected a GPU for each of {size} processes, got {torch.cuda.device_count()}")
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    torch.set_default_device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=size, **options)
    pair = dist.new_group([0, 1]) if size > 2 else dist.group.WORLD
    for name, (count, run) in parts(device).items():
        if (names and name not in names) or (count == 2 and rank > 1):
            continue
        begin(name)
        began = time.monotonic()
        torch.manual_seed(0)
        run(pair if count == 2 else None)
        if rank == 0:
            print("OK", name, f"{time.monotonic() - began:.1f} s", flush=True)
    begin("end", 240)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    port, count, device, *names = sys.argv[1:]
    sys.exit(fork(int(count), lambda index: main(index, int(count), port, device, names)))
