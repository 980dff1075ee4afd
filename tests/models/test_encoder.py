"""Encoders that read both ways, sequence to sequence, beam search."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from linnet.models import DecoderConfig, Encoder, Seq2Seq, beam_search, generate
from linnet.ops import Segments
from linnet.ops.core import select_rows

from .support import VOCAB, config, decoder, tokens

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def encoder(**options) -> Encoder:
    torch.manual_seed(0)
    return Encoder(config(mixers=["gru(num_heads=2)", "gla(num_heads=2)"]), **options).double().eval()


def test_every_output_depends_on_every_input():
    model, x = encoder(), torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    hidden = model(x).hidden
    for t in range(6):
        (grad,) = torch.autograd.grad(hidden[0, t, 0], x, retain_graph=True)
        assert bool((grad.norm(dim=-1) > 0).all())


def test_reading_backwards_swaps_the_two_mixers():
    model, x = encoder(), torch.randn(2, 7, 16, dtype=torch.float64)
    there = model(x).hidden
    for layer in model.layers:
        layer.mixer.ahead, layer.mixer.back = layer.mixer.back, layer.mixer.ahead
    torch.testing.assert_close(model(x.flip(1)).hidden.flip(1), there, **EXACT)


def test_packed_sequences_start_from_their_own_ends():
    model, lengths = encoder(), [4, 1, 9]
    ids = tokens(1, 14)
    packed = model(ids, segments=Segments.from_lengths(lengths)).hidden.split(lengths, 1)
    for part, hidden in zip(ids.split(lengths, 1), packed, strict=True):
        torch.testing.assert_close(model(part).hidden, hidden, **EXACT)


def test_one_way_carries_a_state_and_both_ways_refuse_one():
    model, ids = encoder(bidirectional=False), tokens(2, 9)
    whole, first = model(ids), model(ids[:, :4])
    second = model(ids[:, 4:], first.state)
    torch.testing.assert_close(torch.cat([first.hidden, second.hidden], 1), whole.hidden, **EXACT)
    with pytest.raises(ValueError, match=r"^state: expected None, both ends are read at once"):
        encoder()(ids, first.state)
    with pytest.raises(ValueError, match=r"^tokens: expected int64 \[B >= 1, T >= 1\] or \[B >= 1, T >= 1, 16\], got"):
        model(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=rf"^tokens: expected ids from 0 to {VOCAB - 1}, got {VOCAB}"):
        model(torch.tensor([[0, VOCAB]]))


def seq2seq(mixer: str = "lstm", context: bool = False, reverse_source: bool = False, **options) -> Seq2Seq:
    torch.manual_seed(0)
    shape = DecoderConfig(VOCAB, 16, 2, [mixer], init_std=0.2, **options)
    return Seq2Seq(shape, context=context, reverse_source=reverse_source).double().eval()


@pytest.mark.parametrize("mixer", ["lstm(num_heads=2)", "attention(num_heads=2)"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_decoder_goes_on_where_the_encoder_ends(mixer, scale):
    """With equal weights it is one decoder over source and target."""
    model = seq2seq(mixer, embed_scale=scale)
    model.encoder.load_state_dict(model.decoder.state_dict(), strict=False)
    source, target = tokens(2, 5), tokens(2, 4, seed=2)
    whole = model.decoder(torch.cat([source, target], 1)).logits[:, 5:]
    torch.testing.assert_close(model(source, target).logits, whole, **EXACT)


@pytest.mark.parametrize("context", [False, True])
def test_sources_and_targets_of_any_length(context):
    model = seq2seq(reverse_source=True, context=context)
    sources, targets = [tokens(1, n, seed=n) for n in (3, 1, 6)], [tokens(1, n, seed=9 + n) for n in (2, 5, 1)]
    packed = model(torch.cat(sources, 1), torch.cat(targets, 1), Segments.from_lengths([3, 1, 6]),
                   Segments.from_lengths([2, 5, 1])).logits  # fmt: skip
    for source, target, got in zip(sources, targets, packed.split([2, 5, 1], 1), strict=True):
        torch.testing.assert_close(model(source, target).logits, got, **EXACT)
    padded = torch.full((3, 5), -100)
    for row, target in zip(padded, targets, strict=True):
        row[: target.shape[1]] = target[0]
    loss = model.loss(torch.cat(sources, 1), padded.clamp(min=0), padded, Segments.from_lengths([3, 1, 6]))
    logits = model(torch.cat(sources, 1), padded.clamp(min=0), Segments.from_lengths([3, 1, 6])).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits[padded >= 0], padded[padded >= 0]))


@pytest.mark.parametrize("context", [False, True])
def test_generation_from_sources(context):
    model = seq2seq(context=context)
    source = tokens(3, 5)
    found = model.generate(source, start=0, max_new_tokens=4, temperature=0.0)
    begin = generate(model.decoder, torch.zeros(3, 1, dtype=torch.int64), state=model.encode(source),
                     max_new_tokens=4, temperature=0.0)  # fmt: skip
    assert torch.equal(found.tokens, begin.tokens)
    best, _ = model.beam_search(source, start=0, width=1, max_new_tokens=4, stop=VOCAB - 1)
    assert torch.equal(best[:, 0], found.tokens) or bool((best == VOCAB - 1).any())


@pytest.mark.parametrize("penalty", [0.0, 0.6])
def test_a_wide_beam_finds_the_most_probable_sequence(penalty):
    model, stop = decoder(vocab_size=4), 3
    prompt = torch.tensor([[0, 1], [2, 0]])
    found, scores = beam_search(model, prompt, width=64, max_new_tokens=3, stop=stop, length_penalty=penalty)
    for row in range(2):
        best: dict[tuple[int, ...], float] = {}
        for guess in itertools.product(range(4), repeat=3):
            end = guess.index(stop) + 1 if stop in guess else 3
            ids = torch.cat([prompt[row], torch.tensor(guess[:end])])[None]
            logp = model(ids[:, :-1]).logits.log_softmax(-1)[0, 1:].gather(1, ids[0, 2:, None]).sum()
            best[guess[:end] + (stop,) * (3 - end)] = logp.item() / ((5 + end) / 6) ** penalty
        want = max(best, key=best.__getitem__)
        assert tuple(found[row, 0].tolist()) == want
        assert float(scores[row, 0]) == pytest.approx(best[want])
    with pytest.raises(ValueError, match=r"^width: expected at least 1, got 0"):
        beam_search(model, prompt, width=0, max_new_tokens=1, stop=stop)


def test_learns_to_reverse():
    """Sutskever's frame on a task that needs all of the source: single symbols come back in reverse order."""
    torch.manual_seed(0)
    model = Seq2Seq(DecoderConfig(7, 48, 1, ["gru(num_heads=1)"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        source = torch.randint(1, 7, (32, 3))
        target = source.flip(1)
        loss = model.loss(source, torch.cat([torch.zeros(32, 1, dtype=torch.int64), target[:, :-1]], 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.randint(1, 7, (256, 3))
    found = model.eval().generate(source, start=0, max_new_tokens=3, temperature=0.0).tokens
    assert float((found == source.flip(1)).double().mean()) > 0.97


def test_the_context_is_given_at_every_step():
    """Added to every embedding."""
    model, plain = seq2seq(context=True), seq2seq()
    plain.decoder.load_state_dict(model.decoder.state_dict())
    source, inputs = tokens(2, 5), tokens(2, 4, seed=5)
    *states, context = model.encode(source)
    torch.testing.assert_close(context, model.context(model.encoder(source).hidden[:, -1]), **EXACT)
    x = plain.decoder.embed_tokens(inputs) + context[:, None]
    for layer, state in zip(plain.decoder.layers, states, strict=True):
        x, _, _ = layer(x, state, None)
    torch.testing.assert_close(model(source, inputs).logits, plain.decoder.lm_head(plain.decoder.norm(x)), **EXACT)
    with pytest.raises(ValueError, match=r"^state: expected what the source left"):
        model.decoder(inputs)
    with pytest.raises(ValueError, match=r"^segments: expected sources of at least one token"):
        model.encode(source[:1], Segments.from_lengths([5, 0]))


def test_rows_of_a_state_can_be_chosen():
    model, source = seq2seq(), tokens(3, 5)
    state, order = model.encode(source), torch.tensor([2, 0])
    inputs = tokens(2, 3, seed=5)
    picked = model.decoder(inputs, select_rows(state, order)).logits
    torch.testing.assert_close(picked, model(source[order], inputs).logits, **EXACT)


def test_initial_output_projections_of_both_ends_shrink_with_depth():
    models = []
    for scaled in (False, True):
        torch.manual_seed(0)
        models.append(Encoder(config(mixers=["gru(num_heads=2)"], num_layers=2, scale_residual_init=scaled)))
    plain, scaled = (model.layers[1].mixer for model in models)
    for end in ("ahead", "back"):
        torch.testing.assert_close(getattr(scaled, end).o_proj.weight, getattr(plain, end).o_proj.weight / 2)


def test_a_sequence_models_loss_is_its_decoders():
    """With the auxiliary losses of encoder and decoder in training, and 0 where no target counts."""
    shape = {"vocab_size": 11, "d_model": 8, "num_layers": 1, "mixers": ["gru"]}
    experts = {"mlp": "moe", "num_experts": 2, "experts_per_token": 1, "expert_hidden": 4, "z_loss": 0.1}
    model = Seq2Seq(DecoderConfig(**shape, **experts))
    source, inputs, targets = torch.randint(11, (3, 2, 5)).unbind()
    logits = model(source, inputs).logits
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    aux = model.encoder(source).aux_loss + model(source, inputs).aux_loss
    expected = entropy + aux + 0.1 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(model.loss(source, inputs, targets), expected)
    model.eval()
    torch.testing.assert_close(model.loss(source, inputs, targets), entropy)
    assert model.loss(source, inputs, torch.full_like(targets, -100)) == 0
