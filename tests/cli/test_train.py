"""`linnet train` and `linnet generate`, from the command line to the files they leave."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from linnet.cli import app
from linnet.cli.generate import printable
from linnet.cli.train import _literal
from linnet.mixers import split_specs
from linnet.models import Decoder
from linnet.tasks import train_bpe
from linnet.training import checkpoints

runner = CliRunner()
SMALL = ["--mixers", "gla(num_heads=2), attention(num_heads=2, window=8)", "--d-model", "16", "--layers", "2"]
SMALL += ["--set", "mlp_hidden=16", "--context", "16", "--batch-size", "64", "--steps", "6", "--device", "cpu"]
SMALL += ["--evaluate-every", "3", "--save-every", "3"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Once upon a time, for the {i}th time, there was a fox.\n" * (1 + i % 4))
    return folder


def call(*line: object) -> Result:
    return runner.invoke(app, [str(word) for word in line], env={"COLUMNS": "140"})


def train(out: Path, text: Path, *more: object) -> Result:
    return call("train", *SMALL, "--data", text, "--out", out, *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "fox"
    found = train(out, text)
    assert found.exit_code == 0, found.output
    (out / "shown").write_text(found.output)
    return out


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["train/loss"] for r in records if "train/loss" in r]


class TestTrain:
    def test_reports(self, run: Path) -> None:
        shown = (run / "shown").read_text()
        for part in ("held-out text", "gzip -9", "xz -9e", "3-gram", "fox", "linnet generate", "tensorboard --logdir"):
            assert part in shown
        results = json.loads((run / "results.json").read_text())
        assert set(results["baselines"]) == {"gzip -9", "xz -9e", "3-gram"}
        assert f"{results['held_out_bits_per_byte']:.3f}" in shown
        assert results["tokens"] == 6 * 64

    def test_leaves_the_run(self, run: Path) -> None:
        names = {p.name for p in run.iterdir()} - {"shown"}
        files = {"run.json", "metrics.jsonl", "results.json", "samples.txt", "loss.png"}
        assert names == files | {"model", "checkpoints", "tensorboard"}
        model = Decoder.load(run / "model")
        assert model.config.mixers == ("gla(num_heads=2)", "attention(num_heads=2, window=8)")
        assert (model.config.d_model, model.config.mlp_hidden, model.config.vocab_size) == (16, 16, 257)
        stored = json.loads((run / "run.json").read_text())
        assert stored["options"]["context"] == 16
        assert stored["data"]["fingerprint"]

    def test_interrupt_and_resume(self, run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from linnet.tasks import TextData

        out, real = tmp_path / "again", TextData.batch

        def interrupt(self, step, *rest):
            if step == 3 and not checkpoints(out):
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, step, *rest)

        monkeypatch.setattr(TextData, "batch", interrupt)
        found = train(out, text, "--log-every", 1, "--save-every", 100)
        assert found.exit_code == 0, found.output
        assert "Stopped after step 4 of 6; everything is saved" in found.output
        assert f"linnet train --resume --out {out}" in " ".join(found.output.split())
        refused = call("train", "--resume", "--out", out, "--lr", 1.0)
        assert isinstance(refused.exception, ValueError)
        assert "--lr: this run was started with" in str(refused.exception)
        found = call("train", "--resume", "--out", out)
        assert found.exit_code == 0, found.output
        assert len(losses(out)) == 6
        again = tmp_path / "whole"
        assert train(again, text, "--log-every", 1).exit_code == 0
        assert losses(again) == losses(out)

    def test_resume_wants_the_same_text(self, text: Path, tmp_path: Path) -> None:
        copy, out = tmp_path / "text", tmp_path / "run"
        copy.mkdir()
        for file in text.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        assert train(out, copy, "--minutes", 1e-9).exit_code == 0
        (copy / "0.txt").write_text("something else")
        found = call("train", "--resume", "--out", out, "--device", "cpu")
        assert "is no longer the one this run began with" in str(found.exception)

    def test_learned_tokenizer_goes_with_the_model(self, text: Path, tmp_path: Path) -> None:
        out = tmp_path / "bpe"
        found = train(out, text, "--tokenizer", "bpe:280", "--packing", "documents", "--minutes", 1e-9)
        assert found.exit_code == 0, found.output
        assert call("train", "--resume", "--out", out).exit_code == 0
        assert Decoder.load(out / "model").config.vocab_size <= 280
        found = call("generate", out, "--prompt", "Once", "--max-new-tokens", 5, "--seed", 0)
        assert found.exit_code == 0
        assert found.output.startswith("Once")

    def test_a_tokenizer_that_loses_text_is_noted(self, text: Path, tmp_path: Path) -> None:
        from tokenizers.normalizers import Lowercase, Sequence

        lossy = train_bpe([file.read_bytes() for file in text.iterdir()], 260)
        notes = []
        for lossy.backend.normalizer in (Sequence([]), Lowercase()):
            lossy.save(tmp_path)
            done = train(tmp_path / f"run{len(notes)}", text, "--tokenizer", tmp_path / "tokenizer.json", "--steps", 1)
            notes.append("does not give back the held-out text" in " ".join(done.output.split()))
        assert notes == [False, True]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--preset", "no-such"], "preset: expected one of"),
            (["--data", "no/such/file"], "no file or folder 'no/such/file'"),
            (["--mixers", "gla, nope"], "mixer: expected one of"),
            (["--mixers", "gla,,"], "mixers: expected specs separated by"),
            (["--set", "widht=3"], "unknown field 'widht'"),
            (["--set", "mlp"], "--set: expected FIELD=VALUE"),
            (["--set", "=3"], "--set: expected FIELD=VALUE"),
            (["--set", "vocab_size=10"], "--set vocab_size: expected at least the 257 tokens of --tokenizer byte"),
            (["--backend", "triton"], "backend: triton needs tensors on a GPU"),  # found in the first step
            (["--batch-size", "60"], "--batch-size): expected a multiple of context=16"),
            (["--accumulate", "3"], "cannot be divided into 3"),
            (["--precision", "fp8"], "precision: expected one of"),
            (["--packing", "tight"], "packing: expected one of"),
            (["--tokenizer", "nope.json"], "no file 'nope.json'"),
            (["--held-out", "2"], "held_out: expected a share"),
            (["--resume"], "no checkpoint in"),
        ],
    )
    def test_errors_leave_nothing(self, text: Path, tmp_path: Path, options: list[str], message: str) -> None:
        out = tmp_path / "out"
        found = train(out, text, *options)
        assert isinstance(found.exception, (ValueError, OSError))
        assert message in str(found.exception)
        assert not out.exists()

    def test_a_run_is_never_overwritten(self, run: Path, text: Path) -> None:
        before = (run / "metrics.jsonl").read_bytes()
        found = train(run, text)
        assert isinstance(found.exception, FileExistsError)
        assert "--resume" in str(found.exception)
        assert "another folder (--out)" in str(found.exception)
        assert (run / "metrics.jsonl").read_bytes() == before

    def test_a_folder_that_was_there_stays(self, text: Path, tmp_path: Path) -> None:
        """When the first step fails, what the run had written goes, and no more."""
        found = train(tmp_path, text, "--backend", "triton")
        assert isinstance(found.exception, ValueError)
        assert tmp_path.is_dir() and not list(tmp_path.iterdir())

    def test_commands_to_copy_are_quoted(self, text: Path, tmp_path: Path) -> None:
        out = tmp_path / "my [run]"
        found = train(out, text, "--minutes", 1e-9)
        assert f"linnet train --resume --out '{out}'\n" in found.output
        found = call("train", "--resume", "--out", out)
        assert f"linnet generate '{out}' --prompt" in found.output
        assert f"Saved in {out}:" in found.output

    def test_default_folder(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert call("train", *SMALL, "--data", text, "--minutes", 1e-9).exit_code == 0
        assert checkpoints("runs/gla-attention")


class TestGenerate:
    def test_continues(self, run: Path) -> None:
        options = ("--prompt", "Once upon", "--max-new-tokens", 30, "--seed", 3)
        first = call("generate", run, *options)
        assert first.exit_code == 0, first.output
        assert first.output.startswith("Once upon")
        assert call("generate", run, *options).output == first.output
        assert call("generate", run / "model", *options).output == first.output
        assert call("generate", run, *options[:-1], 4).output != first.output

    def test_prompt_from_stdin(self, run: Path) -> None:
        line = ["generate", str(run), "--prompt", "-", "--max-new-tokens", "3"]
        assert runner.invoke(app, line, input="From a pipe").output.startswith("From a pipe")

    def test_prompt_from_stdin_is_utf8(self, run: Path) -> None:
        found = runner.invoke(app, ["generate", str(run), "--prompt", "-"], input=b"caf\xe9")
        assert "prompt: expected UTF-8, got the byte 0xe9" in str(found.exception)
        assert not found.stdout

    def test_no_prompt_begins_a_document(self, run: Path) -> None:
        assert call("generate", run, "--max-new-tokens", 3, "--seed", 0).exit_code == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--top-p", "1.5"], "top_p: expected a number in"),
            (["--stop", ""], "stop: expected a text"),
            (["--device", "gpu"], "device: expected one that this machine has"),
            (["--prompt", "caf\udce9"], "prompt: expected UTF-8, got the byte 0xe9 after 3 characters"),
        ],
    )
    def test_bad_options(self, run: Path, options: list[str], message: str) -> None:
        assert message in str(call("generate", run, *options).exception)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "there is no" in str(call("generate", tmp_path / "nowhere").exception)
        assert "no model in" in str(call("generate", tmp_path).exception)

    def test_damaged_model(self, run: Path, tmp_path: Path) -> None:
        for file in (run / "model").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "damaged or truncated" in str(call("generate", tmp_path).exception)


def scripted(monkeypatch: pytest.MonkeyPatch, text: bytes):
    """Lets generation give these bytes, whatever the model."""
    from types import SimpleNamespace

    def stream(model, prompt, *, stop, **options):
        for byte in text:
            yield SimpleNamespace(tokens=torch.tensor([byte]))

    monkeypatch.setattr("linnet.models.stream", stream)


def test_a_prompt_begins_and_stops_as_documents_of_the_model_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from linnet.cli.generate import continuation
    from linnet.tasks import ByteTokenizer

    tokenizer, asked = ByteTokenizer(), []
    monkeypatch.setattr("linnet.models.stream", lambda model, prompt, stop, **_: asked.append((*prompt, stop)) or [])
    for tokenizer.begin, tokenizer.ends in ((256, (256,)), (7, (256, 8))):
        list(continuation(None, tokenizer, "a", max_new_tokens=9))  # type: ignore[arg-type]
    assert asked == [([256, 97], (256,)), ([7, 97], (256, 8))]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], ["one "]),
        ("one two three", ["three", "two"], ["one "]),
        ("tw two", ["two"], ["tw "]),
        ("ends in tw", ["two"], ["ends in tw"]),
        ("ä€😀 done", [], ["ä€😀 done"]),
        ("aab", ["ab"], ["a"]),
    ],
)
def test_stop_texts_and_whole_characters(
    monkeypatch: pytest.MonkeyPatch, text: str, stops: list[str], expected: list[str]
) -> None:
    from linnet.cli.generate import continuation
    from linnet.tasks import ByteTokenizer

    scripted(monkeypatch, text.encode())
    model: Decoder = None  # type: ignore[assignment]
    pieces = list(continuation(model, ByteTokenizer(), "", stop=stops, max_new_tokens=99))
    assert "".join(pieces) == expected[0]
    assert all("\ufffd" not in piece for piece in pieces)


def test_terminals_are_not_commanded() -> None:
    assert printable("a\x1b[31mb\r\n\tä€😀") == "a\ufffd[31mb\ufffd\n\tä€😀"


def test_mixer_lists() -> None:
    assert split_specs("gla") == ["gla"]
    assert split_specs("gla + a(x='+')", "+") == ["gla", "a(x='+')"]
    assert split_specs('a(x=(1, 2), y="b,c"), b') == ['a(x=(1, 2), y="b,c")', "b"]


def test_values() -> None:
    values = {"3": 3, "0.5": 0.5, "true": True, "None": None, "moe": "moe", "[1, 2]": [1, 2], "'x'": "x"}
    assert {text: _literal(text) for text in values} == values
