"""Two processes on a CPU, over gloo: replicated (torchrun) and sharded (accelerate launch with FSDP 2)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from linnet.models import Decoder
from linnet.training import checkpoints, find_model

SCRIPT = """
import os
import sys
import torch
from linnet.evaluation import bits_per_byte
from linnet.models import Decoder, DecoderConfig
from linnet.tasks import ByteTokenizer, Corpus, TextData
from linnet.training import TrainingConfig, train

torch.set_num_threads(1)
out, accumulate, resume, minutes, packing = sys.argv[1:]

if os.environ.get("FULL_DISK") == os.environ.get("RANK", "0"):  # for the first checkpoint of this process
    real = torch.save

    def full(*args):
        torch.save = real
        raise OSError(28, "No space left on device")

    torch.save = full

documents = [b"some words that follow each other, %d\\n" % (i % 7) * (1 + i % 5) for i in range(40)]
data = TextData(Corpus("x", documents[:35], documents[35:]), ByteTokenizer(), context=16, batch_tokens=128,
                packing=packing)
torch.manual_seed(0)
# No norm behind the mixer: where it divides by nearly nothing, weights that differ by 1e-7 give gradients that differ
# by 1e-3, and a comparison of two runs would measure that.
config = DecoderConfig(vocab_size=257, d_model=16, num_layers=2, mixers=["linear_attention(num_heads=2)"],
                       mlp_hidden=16, tie_embeddings=True)

def evaluate(model, *, final, part, parts):
    share = bits_per_byte(model, data.held_out, data.held_out_bytes, context=16, batch_size=4, part=part, parts=parts)
    return {"bits_per_byte": share}

result = train(
    Decoder(config),
    data,
    TrainingConfig(steps=6, lr=1e-2, warmup_steps=2, log_every=1, save_every=3, evaluate_every=3, device="cpu",
                   accumulate=int(accumulate), minutes=float(minutes) or None),
    out=out,
    resume=resume == "resume",
    evaluate=evaluate,
    extras=ByteTokenizer().save,
)
sys.stdout.write(f"DONE {result.is_main} {result.finished} {result.step}\\n")
"""
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1"]
FSDP += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(kind, out, *, accumulate=1, resume="new", minutes=0, packing="documents", **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        bin_folder = os.path.dirname(sys.executable)
        command = {
            "single": [sys.executable],
            "replicated": [f"{bin_folder}/torchrun", "--nproc_per_node", "2", "--master_port", port],
            "sharded": [
                f"{bin_folder}/accelerate",
                "launch",
                "--num_processes",
                "2",
                "--main_process_port",
                port,
                *FSDP,
            ],
        }[kind]
        arguments = [str(script), str(out), str(accumulate), resume, str(minutes), packing]
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return start


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def values(out, name):
    return [r[name] for r in records(out) if name in r]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_equal_one(launch, tmp_path, kind):
    one, two = tmp_path / "one", tmp_path / "two"
    launch("single", one, accumulate=2)
    done = launch(kind, two)
    assert "DONE True True 6" in done.stdout
    assert "DONE False True 6" in done.stdout
    assert values(two, "train/loss") == pytest.approx(values(one, "train/loss"), rel=1e-5)
    assert values(two, "train/grad_norm") == pytest.approx(values(one, "train/grad_norm"), rel=1e-5)
    assert values(two, "held_out/bits_per_byte") == pytest.approx(values(one, "held_out/bits_per_byte"), rel=1e-5)
    assert records(two)[-1]["step"] == records(one)[-1]["step"] == 6
    # What is saved is an ordinary model folder with the whole weights.
    a, b = Decoder.load(find_model(one)), Decoder.load(find_model(two))
    for name, x in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], x, rtol=1e-3, atol=1e-5)
    assert (two / "model" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_sharded_run_goes_on_sharded_and_in_one_process(launch, tmp_path):
    whole, sharded, single = tmp_path / "whole", tmp_path / "sharded", tmp_path / "single"
    launch("sharded", whole)
    launch("sharded", sharded, minutes=1e-9)
    assert [p.name for p in checkpoints(sharded)] == ["step-00000001"]
    subprocess.run(["cp", "-r", str(sharded), str(single)], check=True)
    launch("sharded", sharded, resume="resume")
    assert values(sharded, "train/loss") == values(whole, "train/loss")
    done = launch("single", single, resume="resume", accumulate=2)
    assert "goes on with 1" in done.stderr
    assert values(single, "train/loss") == pytest.approx(values(whole, "train/loss"), rel=1e-5)


@pytest.mark.slow
def test_a_full_disk_in_one_process_stops_none(launch, tmp_path):
    done = launch("sharded", tmp_path / "run", FULL_DISK="1")
    assert "checkpoint not saved: another process could not write: [Errno 28] No space left" in done.stdout
    assert "DONE True True 6" in done.stdout
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000006"]
