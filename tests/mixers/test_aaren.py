"""Aaren as a stream: softmax attention to everything so far, from a state that does not grow."""

from __future__ import annotations

import torch

from linnet.mixers import build_mixer
from linnet.mixers.claims import inputs, random_mixer
from linnet.models import Decoder, DecoderConfig
from linnet.ops.core import state_bytes


def test_streaming_is_attention_at_constant_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    mixer = random_mixer(generator, "aaren", 16, num_heads=2)
    x = inputs(generator, 16, length=1000)
    scores = torch.einsum("hk,bthk->bth", mixer.q_proj(mixer.query).unflatten(0, (2, 8)),
                          mixer.k_proj(x).unflatten(-1, (2, 8))) / 8**0.5  # fmt: skip
    value = mixer.v_proj(x).unflatten(-1, (2, 8))
    state, sizes = mixer.init_state(2), set()
    with torch.no_grad():
        for t in range(1000):
            y, state = mixer(x[:, t : t + 1], state)
            sizes.add(state_bytes(state))
            if t in (0, 7, 999):
                seen = torch.einsum("bth,bthv->bhv", scores[:, : t + 1].softmax(1), value[:, : t + 1])
                torch.testing.assert_close(y[:, 0], mixer.o_proj(seen.flatten(1)), rtol=1e-10, atol=1e-12)
    assert len(sizes) == 1


def test_costs_one_vector_more_than_attention() -> None:
    aaren = sum(p.numel() for p in build_mixer("aaren(num_heads=8)", 512).parameters())
    assert aaren == 4 * 512**2 + 3 * 512 + 512  # no bias of the keys, one query


def test_models_decode_from_it() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=11, d_model=16, num_layers=2, mixers=["aaren(num_heads=2)"])).eval()
    ids = torch.randint(11, (1, 6))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4])
        rest = model(ids[:, 4:], first.state).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)
