"""Checkpoints on disk: a folder is replaced as a whole or not at all."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from linnet.models import io


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    with io.atomic_folder(folder) as partial:
        io.write_checkpoint(partial, {"size": 1}, {"w": torch.arange(6.0), "n": torch.tensor([7])})
    return folder


def test_round_trip_and_cast(saved):
    config, tensors = io.read_checkpoint(saved)
    assert config == {"size": 1}
    assert torch.equal(tensors["w"], torch.arange(6.0)) and torch.equal(tensors["n"], torch.tensor([7]))
    _, tensors = io.read_checkpoint(saved, dtype=torch.bfloat16)
    assert tensors["w"].dtype == torch.bfloat16 and tensors["n"].dtype == torch.int64
    _, tensors = io.read_checkpoint(saved, device="meta")
    assert tensors["w"].is_meta and tensors["w"].shape == (6,)
    with pytest.raises(ValueError, match=r"^dtype: expected a floating dtype or None, got torch\.int64"):
        io.read_checkpoint(saved, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^device: expected one that PyTorch knows, got 'gpu'"):
        io.read_checkpoint(saved, device="gpu")


def test_tensors_that_share_memory_are_saved_whole(tmp_path):
    base = torch.arange(6.0)
    (tmp_path / "m").mkdir()
    io.write_checkpoint(tmp_path / "m", {}, {"a": base, "b": base, "c": base[2:4]})
    _, tensors = io.read_checkpoint(tmp_path / "m")
    assert torch.equal(tensors["b"], base) and torch.equal(tensors["c"], base[2:4])


def test_existing_folder_is_refused_unless_asked(saved):
    with pytest.raises(FileExistsError, match="overwrite=True"), io.atomic_folder(saved):
        pass
    (saved.parent / "empty").mkdir()
    with io.atomic_folder(saved.parent / "empty") as partial:
        (partial / "x").write_text("1")
    with io.atomic_folder(saved, overwrite=True) as partial:
        (partial / "only").write_text("new")
    assert [p.name for p in saved.iterdir()] == ["only"]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["empty", "model"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder"), io.atomic_folder(tmp_path / "f", overwrite=True):
        pass
    assert (tmp_path / "f").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_folder(saved, error):
    with pytest.raises(type(error)), io.atomic_folder(saved, overwrite=True) as partial:
        (partial / "half").write_text("...")
        raise error
    assert io.read_checkpoint(saved)[0] == {"size": 1}
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def _through_torch_save(partial):
    torch.save(torch.zeros(100_000), partial / "optimizer.pt")


def _through_safetensors(partial):
    io.write_checkpoint(partial, {}, {"w": torch.zeros(100_000)})


def _through_python(partial):
    (partial / "log").write_bytes(b"0" * 400_000)


@pytest.mark.parametrize("write", [_through_torch_save, _through_safetensors, _through_python])
def test_failing_writes_leave_the_old_folder(saved, write):
    resource = pytest.importorskip("resource", reason="file size limits need a POSIX system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # writes beyond it fail as on a full disk
    try:
        with (
            pytest.raises(OSError, match=r"could not write .*model.*unchanged.*Free some space"),
            io.atomic_folder(saved, overwrite=True) as partial,
        ):
            write(partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert io.read_checkpoint(saved)[0] == {"size": 1}
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_disk_full_keeps_its_error_number(tmp_path):
    with pytest.raises(OSError, match="nothing was written") as caught, io.atomic_folder(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_death_between_the_two_renames_is_repaired(saved):
    saved.rename(saved.parent / ".model.replaced")
    (saved.parent / ".model.partial").mkdir()
    assert io.read_checkpoint(saved)[0] == {"size": 1}
    with io.atomic_folder(saved, overwrite=True) as partial:
        (partial / "x").write_text("1")
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_failure_of_the_last_rename_restores_the_old_folder(saved, monkeypatch):
    rename = type(saved).rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(saved), "rename", failing)
    with pytest.raises(OSError, match="unchanged"), io.atomic_folder(saved, overwrite=True) as partial:
        (partial / "x").write_text("1")
    assert io.read_checkpoint(saved)[0] == {"size": 1}


def test_damaged_files_are_named(saved):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        io.read_checkpoint(saved.parent / "nowhere")
    weights = saved / io.WEIGHTS_FILE
    whole = weights.read_bytes()
    for damaged in (whole[:-3], whole[:5], b"", b"\xff" * len(whole)):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors.*damaged"):
            io.read_checkpoint(saved)
    weights.write_bytes(whole)
    config = saved / io.CONFIG_FILE
    header = json.loads(config.read_text())
    config.write_text(json.dumps(header | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"config\.json.*99"):
        io.read_checkpoint(saved)
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            io.read_checkpoint(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        io.read_checkpoint(saved)
