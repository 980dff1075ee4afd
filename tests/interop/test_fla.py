"""Checkpoints of flash-linear-attention: its logits (kept in a file), and nothing lost on the way back.

The file comes from its own models; where the library is installed, it is made again and compared.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linnet.interop.convert import convert
from linnet.models import Decoder, DecoderConfig
from linnet.ops import Segments

SCRIPT = Path(__file__).with_name("fla_reference.py")
REFERENCE = runpy.run_path(str(SCRIPT))
KEPT = json.loads(SCRIPT.with_suffix(".json").read_text())


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", KEPT)
@torch.no_grad()
def test_same_logits_and_nothing_lost(case, tmp_path):
    kept = KEPT[case]
    kind = kept["config"]["model_type"]
    theirs = REFERENCE["weights"](kept["shapes"])
    write(tmp_path / "theirs", kept["config"], theirs)
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (done.source, done.ignored) == (kind, [])
    assert done.parameters == sum(x.numel() for x in theirs.values()) - 16 * (kind == "hgrn2")
    decoder = Decoder.load(tmp_path / "ours")
    ids = torch.tensor([REFERENCE["IDS"]])
    expected = torch.tensor(kept["logits"])[None]
    assert expected.std() > 0.1
    close = {"rtol": 0, "atol": 2e-5 * float(expected.abs().max())}
    torch.testing.assert_close(decoder(ids).logits, expected, **close)
    state = decoder(ids[:, :4]).state
    torch.testing.assert_close(decoder(ids[:, 4:], state).logits, expected[:, 4:], **close)
    packed = decoder(ids.repeat(1, 2), segments=Segments.from_lengths([9, 9])).logits
    torch.testing.assert_close(packed.view(2, 9, -1), expected.expand(2, -1, -1), **close)

    convert(tmp_path / "ours", tmp_path / "back", to=kind)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    for name, x in theirs.items():
        if name == "model.lower_bounds":  # softmax over the layers: up to a constant a channel
            torch.testing.assert_close(back[name].log_softmax(0), x.log_softmax(0), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(back[name], x), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config.get(key) for key in kept["config"]} == kept["config"]
    (tmp_path / "ours" / "source_config.json").unlink()  # from what the decoder knows alone
    convert(tmp_path / "ours", tmp_path / "alone", to=kind)
    convert(tmp_path / "alone", tmp_path / "twice")
    torch.testing.assert_close(Decoder.load(tmp_path / "twice")(ids).logits, expected, **close)


@torch.no_grad()
def test_gated_deltanet_without_an_output_gate(tmp_path):
    kept = KEPT["gated_deltanet"]
    theirs = {name: x for name, x in REFERENCE["weights"](kept["shapes"]).items() if "g_proj" not in name}
    write(tmp_path / "theirs", kept["config"] | {"use_gate": False}, theirs)
    assert convert(tmp_path / "theirs", tmp_path / "ours").ignored == []
    assert Decoder.load(tmp_path / "ours").layers[0].mixer.g_proj is None
    convert(tmp_path / "ours", tmp_path / "back", to="gated_deltanet")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["use_gate"] is False
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], x) for name, x in theirs.items())


def test_what_it_cannot_hold_is_refused(tmp_path):
    kept = KEPT["hgrn2"]
    tensors = REFERENCE["weights"](kept["shapes"])
    for changes, message in (
        ({"attn": REFERENCE["ATTENTION"]}, "attn = .* is not supported"),
        ({"use_short_conv": True}, "use_short_conv = True is not supported"),
        ({"attnres_block_size": 2}, "attnres_block_size = 2 is not supported"),
    ):
        write(tmp_path / "theirs", kept["config"] | changes, tensors)
        with pytest.raises(ValueError, match=rf"^config.json: {message}"):
            convert(tmp_path / "theirs", tmp_path / "ours")
    config = DecoderConfig(vocab_size=11, d_model=16, num_layers=3, mixers=["hgrn2(head_dim=4, norm_eps=1e-6)"])
    decoder = Decoder(config)
    torch.nn.init.zeros_(decoder.layers[2].mixer.lower_bound)
    torch.nn.init.ones_(decoder.layers[1].mixer.lower_bound)
    decoder.save(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"mixer.lower_bound: expected bounds that rise"):
        convert(tmp_path / "ours", tmp_path / "out", to="hgrn2")
    with pytest.raises(ValueError, match="not a gla: mixers: expected gla layers, found none"):
        convert(tmp_path / "ours", tmp_path / "out", to="gla")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention: linnet[bench]")
def test_the_reference_is_what_the_library_computes():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found.keys() == KEPT.keys()
    for case, kept in KEPT.items():
        assert found[case]["shapes"] == kept["shapes"]
        torch.testing.assert_close(torch.tensor(found[case]["logits"]), torch.tensor(kept["logits"]), rtol=0, atol=1e-5)
