from __future__ import annotations

import errno
import json
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from linnet.evaluation import bits_per_byte
from linnet.models import Decoder
from linnet.ops import Segments
from linnet.tasks import Batch, TaskData, build_task
from linnet.training import TrainingDiverged, checkpoints, find_model, learning_rate

from .conftest import make_data, make_model


class Spy:
    """Data that does something when a step is fetched."""

    def __init__(self, action, at, data=None):
        self.data, self.action, self.at = data or make_data(), action, at
        self.bytes_per_token = self.data.bytes_per_token

    def position(self, step):
        return self.data.position(step)

    def batch(self, step, part=0, parts=1):
        if step == self.at:
            self.at = None
            self.action()
        return self.data.batch(step, part, parts)


def weights(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestTraining:
    def test_learns(self, run):
        run(steps=60, save_every=60)
        assert run.result.finished
        assert run.result.tokens == 60 * 128
        assert run.losses[0] == pytest.approx(math.log(257), rel=0.02)
        assert run.losses[-1] < 3

    def test_the_folder_holds_everything(self, run):
        seen = []

        def evaluate(model, *, final, part, parts):
            seen.append(final)
            data = make_data()
            return {"bits_per_byte": bits_per_byte(model, data.held_out, data.held_out_bytes, context=16)}

        def on_save(folder, records):
            (folder / "loss.png").write_text(str(len(records)))

        run(evaluate=evaluate, on_save=on_save, evaluate_every=3, settings={"data": "mine"})
        names = {p.name for p in run.out.iterdir()}
        assert names == {"run.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "loss.png"}
        stored = json.loads((run.out / "run.json").read_text())
        assert stored["training"] == run.config.to_dict()
        assert stored["model"] == run.model.config.to_dict()
        assert stored["data"] == "mine"
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        assert lines == run.result.records
        assert seen == [False, False, True]
        assert [r["step"] for r in lines if "held_out/bits_per_byte" in r] == [3, 6, 8]
        keys = {"train/loss", "train/bits_per_byte", "train/grad_norm", "train/lr", "perf/tokens_per_s"}
        trained = [r for r in lines if "train/loss" in r]
        assert [r["step"] for r in trained] == list(range(1, 9))
        assert all(keys <= set(r) for r in trained)
        assert [r["train/lr"] for r in trained] == pytest.approx([learning_rate(i, run.config) for i in range(8)])
        assert any(p.name.startswith("events") for p in (run.out / "tensorboard").iterdir())
        assert "held out: bits per byte" in run.text.getvalue()
        assert "tokens/s" in run.text.getvalue()
        loaded = Decoder.load(find_model(run.out))
        assert find_model(run.out) == run.out / "model"
        assert same(weights(loaded), weights(run.model))

    def test_accumulation_changes_nothing(self, run):
        run()
        other = run.at("other")(accumulate=4)
        assert other.losses == pytest.approx(run.losses, rel=1e-5)

    def test_accumulation_of_packed_rows_changes_nothing(self, run):
        class Joined(Spy):
            """The four micro-batches of a step as one row, cut where they are cut."""

            def batch(self, step, part=0, parts=1):
                pieces = [self.data.batch(step, i, 4) for i in range(4)]
                tokens, targets = (torch.cat(x, 1) for x in list(zip(*pieces, strict=True))[:2])
                lengths = [n for piece in pieces for n in piece.segments.lengths]
                return Batch(tokens, targets, Segments.from_lengths(lengths), 128)

        run(data=Joined(None, None, make_data("documents")))
        other = run.at("other")(data=make_data("documents"), accumulate=4)
        assert other.losses == pytest.approx(run.losses, rel=1e-5)

    def test_loss_is_per_token_whatever_the_micro_batches_hold(self, run):
        # The number of scored tokens differs between micro-batches: a mean of their means would be wrong.
        data = TaskData(build_task("flipflop"), length=12, batch_size=8)
        counts = [data.batch(0, i, 4).count for i in range(4)]
        assert len(set(counts)) > 1
        run(data=data, model=make_model(vocab_size=5), steps=4)
        other = run.at("other")(data=data, model=make_model(vocab_size=5), steps=4, accumulate=4)
        assert other.losses == pytest.approx(run.losses, rel=1e-5)

    def test_gradient_checkpointing_and_compile_change_nothing(self, run, monkeypatch):
        run(steps=3)
        other = run.at("checkpointing")(steps=3, gradient_checkpointing=True)
        assert other.losses == pytest.approx(run.losses, rel=1e-6)
        compiled = []
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
        run.at("compiled")(steps=1, compile=True)
        assert [type(m).__name__ for m in compiled] == ["DecoderLayer"] * 2

    def test_bf16(self, run):
        run(steps=3)
        other = run.at("bf16")(steps=3, precision="bf16")
        assert other.losses != run.losses
        assert other.losses == pytest.approx(run.losses, rel=1e-2)
        assert all(p.dtype == torch.float32 for p in other.model.parameters())

    def test_mixture_of_experts_reports_its_balance(self, run):
        run(model=make_model(mlp="moe", num_experts=4, router_bias_rate=0.01), steps=2)
        assert any(key.startswith("router/") for key in run.result.records[-1])
        for layer in run.model.layers:  # one move for each update, by the rate or by nothing
            moved = layer.mlp.router_bias.abs() / 0.01
            assert moved.sum() > 0 and all(round(float(x), 3) in (0, 1, 2) for x in moved)

    def test_settings_that_cannot_do_what_they_say_are_printed(self, run):
        run(steps=2, warmup_steps=2)
        assert "Note" not in run.text.getvalue()
        other = run.at("other")(steps=2, warmup_steps=8, data=make_data(batch_tokens=2**14))
        notes = [line for line in other.text.getvalue().splitlines() if line.startswith("Note: ")]
        assert [line.split(":")[1] for line in notes] == [" warmup_steps (--warmup)", " data"]
        assert "8 are more than the 2 steps of the run, whose rate ends at 25% of its peak" in notes[0]
        assert "the batch of one step is larger than the training data" in notes[1]

    def test_clipping_bounds_the_update(self, run):
        run(steps=2, clip=1e-3)
        assert run.result.records[0]["train/grad_norm"] > 0.1  # as it was before


class TestResume:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted_and_resumed_equals_uninterrupted(self, run, number):
        whole = run.at("whole")(steps=9)
        run(steps=9, data=Spy(lambda: os.kill(os.getpid(), number), at=4))
        assert not run.result.finished
        assert run.result.step == 5
        assert [p.name for p in checkpoints(run.out)] == ["step-00000003", "step-00000005"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        run(steps=9, resume=True, model=make_model(num_layers=2, init_std=0.5))  # its weights are replaced
        assert run.result.finished
        assert run.losses == whole.losses
        assert same(weights(run.model), weights(whole.model))
        assert run.result.tokens == whole.result.tokens

    def test_groups_keep_their_rates(self, run, monkeypatch):
        """Steps and poles of state spaces follow the schedule up to their own peak, also in a resumed run."""
        rates, step = [], torch.optim.AdamW.step

        def note(self, *args, **kwargs):
            rates.append([group["lr"] for group in self.param_groups])
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", note)
        model = {"mixers": ["s4d(state_size=4)"]}
        whole = run.at("whole")(model=make_model(**model))
        before = [x for x in rates if any(x)]  # DCP steps with a rate of 0 to make the moments
        assert len(before) == 8
        for now, rate in zip(before, (learning_rate(i, whole.config) for i in range(8)), strict=True):
            assert now == pytest.approx([rate, rate, rate / 10])
        rates.clear()
        run(model=make_model(**model), data=Spy(lambda: os.kill(os.getpid(), signal.SIGINT), at=4))
        run(model=make_model(**model), resume=True)
        assert [x for x in rates if any(x)] == before
        assert run.losses == whole.losses

    def test_the_second_interrupt_is_immediate(self, run):
        def twice():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run(data=Spy(twice, at=4))
        assert [p.name for p in checkpoints(run.out)] == ["step-00000003"]

    def test_records_after_the_checkpoint_are_dropped(self, run):
        with pytest.raises(RuntimeError, match="power cut"):
            run(data=Spy(lambda: (_ for _ in ()).throw(RuntimeError("power cut")), at=5))
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "trai')  # cut off
        run(resume=True)
        assert [r["step"] for r in run.result.records] == list(range(1, 9))

    def test_minutes(self, run):
        run(steps=1000, minutes=1e-9)
        assert not run.result.finished
        assert run.result.step == 1
        run(steps=1000, minutes=1e-9, resume=True)
        assert run.result.step == 2

    def test_random_numbers_go_on(self, run):
        drawn = []
        draw = lambda: drawn.append(torch.rand(1).item())  # noqa: E731
        run.at("whole")(data=Spy(draw, at=5))
        run(steps=8, minutes=1e-9)
        for _ in range(7):
            run(resume=True, minutes=1e-9, data=Spy(draw, at=5))
        assert drawn[0] == drawn[1]

    def test_nothing_to_resume(self, run):
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            run(resume=True)

    def test_a_finished_run(self, run):
        run()
        with pytest.raises(ValueError, match="already finished its 8 steps"):
            run(resume=True)


class TestNothingIsLost:
    def test_a_folder_in_use_is_refused(self, run):
        run.out.mkdir()
        (run.out / "thesis.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty and nothing in it is overwritten; choose another"):
            run()
        assert [p.name for p in run.out.iterdir()] == ["thesis.txt"]

    def test_a_run_is_refused_and_says_how_to_go_on(self, run):
        run(steps=2)
        with pytest.raises(FileExistsError, match="--resume"):
            run(steps=2)

    def test_a_file_is_refused(self, run):
        run.out.write_text("mine")
        with pytest.raises(FileExistsError, match="is a file"):
            run()

    def test_a_wrong_batch_leaves_no_folder(self, run):
        with pytest.raises(ValueError, match="cannot be divided into 3 micro-batches"):
            run(accumulate=3)
        assert not run.out.exists()

    def test_accelerate_is_as_others_left_it(self, run):
        """The Trainer of transformers keeps its precision there, of which a run, though it fails, has its own."""
        state = Accelerator(mixed_precision="no", cpu=True).state
        try:
            with pytest.raises(ValueError, match="micro-batches"):
                run(accumulate=3, precision="bf16")
            assert run(steps=1, precision="bf16").result.finished
            assert state.mixed_precision == "no"
        finally:
            state._reset_state(reset_partial_state=True)

    def test_keeps_the_last_checkpoints(self, run):
        killed = run.out / "checkpoints" / ".step-00000003.partial"  # in the middle of a save
        run(steps=10, save_every=2, keep_last=3, data=Spy(lambda: killed.mkdir(parents=True), at=2))
        assert [p.name for p in checkpoints(run.out)] == [f"step-{i:08d}" for i in (6, 8, 10)]
        assert not killed.exists()

    @pytest.mark.parametrize("where", ["weights", "optimizer", "rng"])
    def test_a_full_disk_costs_one_checkpoint(self, run, monkeypatch, where):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        targets = {
            "weights": ("linnet.training.checkpoint.write_checkpoint",),
            "optimizer": ("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data",),
            "rng": ("torch.save",),
        }
        patch = pytest.MonkeyPatch()

        def fail(*args, **kwargs):
            raise full

        def fill():
            for target in targets[where]:
                patch.setattr(target, fail)

        class FullFor3Steps(Spy):
            def batch(self, step, part=0, parts=1):
                if step == 4:
                    fill()
                if step == 7:
                    patch.undo()
                    kept.append([p.name for p in checkpoints(run.out)])
                return super().batch(step, part, parts)

        kept = []
        try:
            run(steps=9, data=FullFor3Steps(lambda: None, at=None))
        finally:
            patch.undo()
        assert kept == [["step-00000003"]]
        assert "checkpoint not saved" in run.text.getvalue()
        assert "No space left on device" in run.text.getvalue()
        assert run.result.finished
        assert [p.name for p in checkpoints(run.out)] == ["step-00000003", "step-00000009"]
        assert not list((run.out / "checkpoints").glob(".*"))

    def test_a_disk_that_stays_full_ends_with_the_old_checkpoint(self, run, monkeypatch):
        from linnet.training import checkpoint

        calls = []
        real = checkpoint.write_checkpoint

        def fail_later(*args):
            calls.append(1)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*args)

        monkeypatch.setattr(checkpoint, "write_checkpoint", fail_later)
        with pytest.raises(OSError, match="No space left on device"):
            run()
        assert [p.name for p in checkpoints(run.out)] == ["step-00000003"]
        monkeypatch.undo()
        whole = run.at("whole")()
        run(resume=True)
        assert run.losses == whole.losses

    def test_metrics_on_a_full_disk_do_not_end_the_run(self, run, monkeypatch):
        from linnet.training.monitor import Monitor

        real = Monitor.__init__

        def start(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self._file.close()
            self._file = open("/dev/full", "a")  # noqa: SIM115

        if not os.path.exists("/dev/full"):
            pytest.skip("needs /dev/full")
        monkeypatch.setattr(Monitor, "__init__", start)
        run(steps=3)
        assert run.result.finished
        assert run.text.getvalue().count("metrics not written") == 1

    @pytest.mark.parametrize("step", [0, 4])
    def test_divergence_stops_and_keeps_the_checkpoint(self, run, step):
        model = make_model()
        data = Spy(lambda: model.norm.weight.data.fill_(float("nan")), at=step)
        message = "there is no checkpoint yet" if step == 0 else "the checkpoint of step 3 is in"
        with pytest.raises(TrainingDiverged, match=rf"loss nan.*at step {step + 1}; {message}.*lower learning rate"):
            run(model=model, data=data)
        assert len(checkpoints(run.out)) == (step > 0)
        assert not (run.out / "model").exists()

    @pytest.mark.parametrize("damage", ["weights", "trainer", "optimizer", "rng", "config"])
    def test_a_damaged_checkpoint_is_named(self, run, damage):
        run(steps=9, minutes=1e-9)
        run(steps=9, minutes=1e-9, resume=True)
        last = checkpoints(run.out)[-1]
        file = {
            "weights": last / "model.safetensors",
            "trainer": last / "trainer.json",
            "optimizer": next((last / "optimizer").glob("*.distcp")),
            "rng": last / "rng-0.pt",
            "config": last / "config.json",
        }[damage]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match="step-00000002") as error:
            run(steps=9, resume=True)
        assert "go on from the checkpoint before it" in str(error.value)
        for left in last.rglob("*"):
            left.is_file() and left.unlink()
        (last / "optimizer").rmdir()
        last.rmdir()
        run(steps=3, resume=True)
        assert run.result.finished

    def test_fp16_needs_a_gpu(self, run):
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            run(precision="fp16")
        assert not run.out.exists()


def test_find_model(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no model in"):
        find_model(tmp_path)
    run(minutes=1e-9)
    assert find_model(run.out) == checkpoints(run.out)[-1]
    Decoder.load(find_model(run.out))
