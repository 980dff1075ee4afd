from __future__ import annotations

import pytest
import torch

from linnet.models import Compressor, Decoder, DecoderConfig
from linnet.models.compressor import sinusoids
from linnet.ops import Segments

CONFIG = DecoderConfig(vocab_size=9, d_model=16, num_layers=2, mixers=["gla(num_heads=2)"], mlp_hidden=24)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Compressor(CONFIG)


def test_reads_everything_from_the_last_output(model):
    tokens = torch.randint(9, (2, 7))
    out = model(tokens)
    assert out.logits.shape == (2, 7, 9)
    last = Decoder._hidden(model, tokens, None, None)[0][:, -1:]
    x = model.read_out(torch.nn.functional.gelu(model.read_in(last + sinusoids(7, 16))))
    assert torch.allclose(out.logits, model.lm_head(x), atol=1e-6)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens.flatten())
    assert torch.allclose(model.loss(tokens, tokens), loss)


def test_saves_and_loads(model, tmp_path):
    model.save(tmp_path / "model")
    tokens = torch.randint(9, (1, 5))
    assert torch.equal(Compressor.load(tmp_path / "model")(tokens).logits, model.eval()(tokens).logits)
    with pytest.raises(ValueError, match="unexpected read_in"):
        Decoder.load(tmp_path / "model")


def test_reset(model):
    other = Compressor.meta(CONFIG).to_empty(device="cpu")
    torch.manual_seed(1)
    other.reset_parameters()
    assert all(torch.isfinite(p).all() for p in other.parameters())


def test_whole_rows_only(model):
    with pytest.raises(ValueError, match="segments: expected None"):
        model(torch.zeros(1, 4, dtype=torch.int64), segments=Segments.from_lengths([1, 3]))


def test_sinusoids():
    code = sinusoids(50, 15)
    assert code.shape == (50, 15)
    assert torch.equal(code[0], torch.cat([torch.zeros(8), torch.ones(7)]))
    assert len({tuple(row.tolist()) for row in code}) == 50
