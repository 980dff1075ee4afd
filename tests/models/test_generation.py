"""Generation: the same forward with state, whatever way the prompts come."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linnet.models import generate, generation, sample, stream
from linnet.ops.core import state_tensors

from .support import VOCAB, decoder, tokens


@pytest.fixture(scope="module")
def model():
    return decoder(init_std=0.5)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greedy_by_hand(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]


def test_greedy_equals_repeated_full_forwards(model):
    ids = tokens(3, 6)
    out = generate(model, ids, max_new_tokens=9, temperature=0)
    assert torch.equal(out.tokens, greedy_by_hand(model, ids, 9))
    assert out.lengths.tolist() == [9, 9, 9]
    one = generate(model, ids[1], max_new_tokens=9, temperature=0)
    assert torch.equal(one.tokens[0], out.tokens[1])


def test_same_seed_same_tokens(model):
    ids = tokens(2, 5)
    runs = [generate(model, ids, max_new_tokens=12, generator=rng(s)).tokens for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_streaming_yields_the_same_tokens(model):
    ids = tokens(2, 5)
    whole = generate(model, ids, max_new_tokens=7, top_k=5, generator=rng())
    steps = list(stream(model, ids, max_new_tokens=7, top_k=5, generator=rng()))
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), whole.tokens)
    lazily = stream(model, ids, max_new_tokens=10**9, temperature=0)
    assert torch.equal(next(lazily).tokens, greedy_by_hand(model, ids, 1)[:, 0])


def test_prompts_of_different_lengths(model):
    prompts = [tokens(n, seed=n) for n in (4, 1, 9)]
    out = generate(model, prompts, max_new_tokens=8, temperature=0)
    for n, prompt in enumerate(prompts):
        assert torch.equal(out.tokens[n], generate(model, prompt, max_new_tokens=8, temperature=0).tokens[0])
    lists = generate(model, [p.tolist() for p in prompts], max_new_tokens=8, temperature=0)
    assert torch.equal(lists.tokens, out.tokens)


def test_rows_finish_on_their_own(model):
    ids = tokens(4, 5)
    free = generate(model, ids, max_new_tokens=12, generator=rng()).tokens
    stop = [int(free[0, 3]), int(free[2, 5])]
    out = generate(model, ids, max_new_tokens=12, stop=stop, generator=rng())
    for row in range(4):
        hits = [t for t in range(12) if int(free[row, t]) in stop]
        length = hits[0] + 1 if hits else out.tokens.shape[1]
        assert out.lengths[row] == length
        assert torch.equal(out.tokens[row, :length], free[row, :length])
        assert (out.tokens[row, length:] == out.tokens[row, length - 1]).all()


def test_ends_when_all_rows_have_finished(model):
    ids = tokens(1, 5)
    first = greedy_by_hand(model, ids, 1)
    out = generate(model, ids, max_new_tokens=np.int64(50), temperature=0, stop=np.array([first[0, 0], 1]))
    assert out.tokens.tolist() == first.tolist() and out.lengths.tolist() == [1]


def test_continues_from_a_returned_state(model):
    ids = tokens(2, 5)
    whole = generate(model, ids, max_new_tokens=10, temperature=0)
    first = generate(model, ids, max_new_tokens=4, temperature=0)
    rest = generate(model, first.tokens[:, -1:], max_new_tokens=6, temperature=0, state=first.state)
    assert torch.equal(torch.cat([first.tokens, rest.tokens], 1), whole.tokens)
    ragged = generate(model, [ids[0], ids[1, :2]], max_new_tokens=3, temperature=0)
    more = [torch.tensor([int(ragged.tokens[0, -1]), 3]), ragged.tokens[1, -1:]]
    again = generate(model, more, max_new_tokens=3, temperature=0, state=ragged.state)
    text = torch.cat([ids[0], ragged.tokens[0], torch.tensor([3])])
    assert torch.equal(again.tokens[0], generate(model, text, max_new_tokens=3, temperature=0).tokens[0])


def test_leaves_the_model_alone(model):
    model.train()
    out = generate(model, tokens(1, 3), max_new_tokens=2)
    assert model.training and not out.state[0].decay.S.requires_grad
    model.eval()


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).repeat(20_000, 1)

    def frequencies(**options):
        return torch.bincount(sample(logits, generator=rng(), **options), minlength=5) / 20_000

    def expect(p, **options):
        torch.testing.assert_close(frequencies(**options), p, rtol=0, atol=0.015)

    p = logits[0].softmax(0)
    expect(p)
    expect((logits[0] / 2).softmax(0), temperature=2.0)
    expect((logits[0] / 0.5).softmax(0), temperature=0.5)
    expect(p * torch.tensor([1, 1, 0, 0, 0]) / p[:2].sum(), top_k=2)
    expect(p, top_k=5)
    expect(p, top_k=99)
    expect(p, top_p=1.0)
    nucleus = float(p[:2].sum())
    expect(p * torch.tensor([1, 1, 0, 0, 0]) / p[:2].sum(), top_p=nucleus - 0.01)
    expect(p * torch.tensor([1, 1, 1, 0, 0]) / p[:3].sum(), top_p=nucleus + 0.01)
    expect(torch.tensor([1.0, 0, 0, 0, 0]), top_p=1e-9)
    for cold in (0, 1e-9, 1e-40, 1e-320):
        expect(torch.tensor([1.0, 0, 0, 0, 0]), temperature=cold)
    expect(torch.tensor([1.0, 0, 0, 0, 0]), temperature=1e-40, top_p=0.9)
    in_k = p[:3] / p[:3].sum()  # top_p then counts within the three that top_k leaves
    both = torch.zeros(5)
    both[:2] = in_k[:2] / in_k[:2].sum()
    expect(both, top_k=3, top_p=float(in_k[:2].sum()) - 0.01)


def test_nucleus_with_unsorted_logits():
    logits = torch.tensor([[-5.0, 3.0, -5.0, 3.0, -5.0]]).repeat(1000, 1)
    assert set(sample(logits, top_p=0.9, generator=rng()).tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": float("nan")}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("stop", {"stop": [VOCAB]}),
        ("stop", {"stop": 3}),
        ("prompt", {"prompt": torch.zeros(1, 0, dtype=torch.int64)}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[1, 2], []]}),
        ("prompt", {"prompt": torch.zeros(1, 2, 3, dtype=torch.int64)}),
        ("prompt", {"prompt": torch.zeros(1, 2)}),
        ("tokens", {"prompt": [[VOCAB]]}),
        ("prompt", {"prompt": "text"}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": [[1], None]}),
        ("temperature", {"temperature": "warm"}),
        ("top_k", {"top_k": True}),
        ("top_p", {"top_p": "most"}),
        ("stop", {"stop": None}),
        ("generator", {"generator": 3}),
        ("state", {"state": 5}),
        ("state", {"state": [1, 2]}),
    ],
)
def test_bad_arguments_are_named(model, name, options):
    for function in (generate, stream):  # a stream complains at once, not at its first step
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(model, **{"prompt": [[1]], "max_new_tokens": 2, **options})
    if name in ("temperature", "top_k", "top_p"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            sample(torch.zeros(1, VOCAB), **options)


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, VOCAB), torch.zeros(1, VOCAB).long(), [[0.0]]], ids=type)
def test_bad_logits_are_named(bad):
    with pytest.raises(ValueError, match=r"^logits: expected floats of shape \[B, V\], got "):
        sample(bad)


def test_options_may_be_integers_of_numpy(model):
    options = {"max_new_tokens": 3, "top_k": 3, "stop": [2]}
    want = generate(model, [[1]], generator=rng(), **options)
    found = generate(model, [[1]], generator=rng(), **options | {"top_k": np.int64(3), "stop": [np.int64(2)]})
    assert torch.equal(found.tokens, want.tokens)


class TestCudaGraph:
    """On a CPU the graph is stood in for by the step itself, which runs on the buffers a graph would have."""

    @pytest.fixture
    def captured(self, monkeypatch):
        recorded = []

        def capture(warm, step):
            warm()
            recorded.append(step)
            return step

        monkeypatch.setattr(generation, "_capture", capture)
        monkeypatch.setattr(generation, "_one_by_one", lambda why: pytest.fail(why))
        start = generation.DecodingStep.__init__

        def on_a_gpu(self, model, cuda_graph):
            start(self, model, False)
            self._graph = cuda_graph

        monkeypatch.setattr(generation.DecodingStep, "__init__", on_a_gpu)
        return recorded

    def test_same_tokens_and_state(self, model, captured):
        ids = tokens(3, 2)  # the window of the attention layer is not full yet: the first steps are not captured
        plain = generate(model, ids, max_new_tokens=12, generator=rng())
        graph = generate(model, ids, max_new_tokens=12, generator=rng(), cuda_graph=True)
        assert len(captured) == 1 and torch.equal(plain.tokens, graph.tokens)
        for a, b in zip(state_tensors(plain.state), state_tensors(graph.state), strict=True):
            assert torch.equal(a, b)

    def test_what_was_given_out_stays(self, model, captured):
        ids = tokens(1, 7)
        start = generate(model, ids, max_new_tokens=1).state
        before = [x.clone() for x in state_tensors(start)]
        steps = stream(model, ids[:, -1:], max_new_tokens=6, temperature=0, state=start, cuda_graph=True)
        held = [(step, [x.clone() for x in state_tensors(step.state)]) for step in steps]
        assert captured
        for step, copies in held:
            assert all(torch.equal(a, b) for a, b in zip(state_tensors(step.state), copies, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(state_tensors(start), before, strict=True))
        assert len({int(step.state[2].length) for step, _ in held}) == len(held)

    def test_a_growing_cache_says_so(self, monkeypatch):
        monkeypatch.setattr(generation, "_capture", lambda *_: pytest.fail("captured"))
        growing = decoder(mixers=["gla(num_heads=2)", "attention(num_heads=2)"], num_layers=2)
        step = generation.DecodingStep(growing)
        step._graph = True
        step(tokens(1, 3))
        with pytest.warns(UserWarning, match=r"^cuda_graph: the state of layer 1 grows with every token; steps run"):
            step.advance(tokens(1, 1))
        step.advance(tokens(1, 1))

    def test_a_step_that_cannot_be_captured_says_so(self, model, monkeypatch):
        def capture(warm, step):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(generation, "_capture", capture)
        step = generation.DecodingStep(model)
        step._graph = True
        step(tokens(1, 8))
        with pytest.warns(UserWarning, match=r"cannot be captured: operation not permitted when stream is capturing;"):
            step.advance(tokens(1, 1))
        step.advance(tokens(1, 1))

    def test_on_a_cpu_says_so(self, model):
        with pytest.warns(UserWarning, match=r"^cuda_graph: the model is on cpu; steps run one by one"):
            out = generate(model, tokens(1, 3), max_new_tokens=3, temperature=0, cuda_graph=True)
        assert torch.equal(out.tokens, greedy_by_hand(model, tokens(1, 3), 3))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("mixer", ["gla(num_heads=2)", "mamba2(head_dim=16, state_dim=16)", "retnet(num_heads=2)"])
    def test_on_a_gpu(self, mixer):
        model = decoder(mixers=[mixer], d_model=64, vocab_size=VOCAB).to("cuda", torch.bfloat16)
        ids = tokens(4, 9).cuda()
        plain = generate(model, ids, max_new_tokens=40, temperature=0)
        graph = generate(model, ids, max_new_tokens=40, temperature=0, cuda_graph=True)
        assert torch.equal(plain.tokens, graph.tokens)
        for a, b in zip(state_tensors(plain.state), state_tensors(graph.state), strict=True):
            torch.testing.assert_close(a, b)


def test_ids_of_a_tokenizer(model):
    ids = np.array([3, 1, 2], dtype=np.uint16)
    want = generate(model, [[0, 3, 1, 2], [3, 1, 2]], max_new_tokens=3, temperature=0).tokens
    assert torch.equal(generate(model, [[0, *ids], ids], max_new_tokens=3, temperature=0).tokens, want)


def test_bad_states_are_named(model):
    state = generate(model, tokens(2, 3), max_new_tokens=1).state
    with pytest.raises(ValueError, match=r"^state: expected 3 rows"):
        generate(model, tokens(3, 1), max_new_tokens=1, state=state)
