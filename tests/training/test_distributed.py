"""Several processes: replicated (torchrun) and sharded (accelerate launch, FSDP 2); over NCCL with --device cuda."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from forked import free_port, need_gpus, surroundings
from linnet.models import Decoder
from linnet.training import checkpoints, find_model

SCRIPT = """
import faulthandler
import os
import sys
import torch
from linnet.evaluation import bits_per_byte
from linnet.models import Decoder, DecoderConfig
from linnet.tasks import ByteTokenizer, Corpus, TextData
from linnet.training import TrainingConfig, train

torch.set_num_threads(1)
out, accumulate, resume, minutes, packing, device = sys.argv[1:]
faulthandler.dump_traceback_later(100, exit=True)

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
    TrainingConfig(steps=6, lr=1e-2, warmup_steps=2, log_every=1, save_every=3, evaluate_every=3, device=device,
                   accumulate=int(accumulate), minutes=float(minutes) or None),
    out=out,
    resume=resume == "resume",
    evaluate=evaluate,
    extras=ByteTokenizer().save,
)
sys.stdout.write(f"DONE {result.is_main} {result.finished} {result.step}\\n")
"""
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, device):
    need_gpus(device, 2)
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(SCRIPT)

    def start(kind, out, *, processes=2, accumulate=1, resume="new", minutes=0, packing="documents", **environment):
        folder, count = os.path.dirname(sys.executable), str(processes)
        command = {
            "single": [sys.executable],
            "replicated": [f"{folder}/torchrun", "--nproc_per_node", count, "--master_port", free_port()],
            "sharded": [f"{folder}/accelerate", "launch", "--num_processes", count, "--main_process_port", free_port()],
        }[kind]
        command += FSDP if kind == "sharded" else []
        place = "auto" if device.type == "cuda" else "cpu"
        done = subprocess.run(
            [*command, str(script), str(out), str(accumulate), resume, str(minutes), packing, place],
            capture_output=True,
            text=True,
            timeout=240,
            env={**surroundings(device), **environment},
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return done

    return start


@pytest.fixture(scope="module")
def whole_run(launch, tmp_path_factory):
    """A kind of run from its first step to its last, once for all tests: what it printed, and its folder."""

    @cache
    def start(kind, processes):
        out = tmp_path_factory.mktemp(kind) / "run"
        return launch(kind, out, processes=processes, accumulate=2 // processes or 1), out

    return start


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def values(out, name):
    return [r[name] for r in records(out) if name in r]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_equal_one(whole_run, kind):
    _, one = whole_run("single", 1)
    done, two = whole_run(kind, 2)
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
def test_sharded_run_goes_on_with_any_number_of_processes(launch, whole_run, tmp_path, device):
    many, fewer = (4, 2) if device.type == "cuda" and torch.cuda.device_count() >= 4 else (2, 1)
    stopped, same, other = (tmp_path / name for name in ("stopped", "same", "other"))
    with ThreadPoolExecutor() as side_by_side:
        first = side_by_side.submit(whole_run, "sharded", many)
        launch("sharded", stopped, processes=many, minutes=1e-9)
        _, whole = first.result()
    assert [p.name for p in checkpoints(stopped)] == ["step-00000001"]
    for folder in (same, other):
        shutil.copytree(stopped, folder)
    with ThreadPoolExecutor() as side_by_side:
        first = side_by_side.submit(launch, "sharded", same, processes=many, resume="resume")
        kind = "sharded" if fewer > 1 else "single"
        done = launch(kind, other, processes=fewer, resume="resume", accumulate=many // fewer)
        first.result()
    expected = values(whole, "train/loss")
    assert values(same, "train/loss") == (expected if device.type == "cpu" else pytest.approx(expected, rel=1e-5))
    assert f"goes on with {fewer}" in done.stderr
    assert values(other, "train/loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_full_disk_in_one_process_stops_none(launch, tmp_path):
    done = launch("sharded", tmp_path / "run", FULL_DISK="1")
    assert "checkpoint not saved: another process could not write: [Errno 28] No space left" in done.stdout
    assert "DONE True True 6" in done.stdout
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000006"]
