"""The program itself: help, errors, loading of commands."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

import linnet
from linnet.cli import app, main
from linnet.cli.options import pick_device

runner = CliRunner()
COMMANDS = ("train", "generate", "eval", "compare", "reproduce", "list", "inspect", "dissect", "bench", "env")


def leave(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program."""
    with pytest.raises(SystemExit) as left:
        main([*line])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_help_names_every_command() -> None:
    found = runner.invoke(app, ["--help"])
    assert found.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in found.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    """The summary that `linnet --help` shows without loading a command is the first line of the command's own help."""
    overview = runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    found = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert found.exit_code == 0
    summary = next(line for line in overview.splitlines() if f" {command} " in line).strip(" │")
    assert summary.removeprefix(command).strip() in " ".join(found.output.split())


def test_version() -> None:
    found = runner.invoke(app, ["--version"])
    assert found.exit_code == 0
    assert found.output == f"linnet {linnet.__version__}\n"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = leave(capsys)
    assert "Commands" in out + err


def test_unknown_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = leave(capsys, "trian")
    assert code == 2
    assert "trian" in err
    code, _, err = leave(capsys, "list", "--jsno")
    assert code == 2
    assert "--jsno" in err


@pytest.mark.parametrize(
    ("line", "near"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["inspect", "gated-deltnet"], "did you mean 'gated_deltanet'?"),
        (["inspect", "GLA"], "did you mean 'gla'?"),
        (["inspect", "gla(num_head=2)"], "did you mean 'num_heads'?"),
        (["compare", "--task", "flip-flop"], "did you mean 'flipflop'?"),
        (["compare", "--task", "group(grup='S3')"], "did you mean 'group'?"),
        (["compare", "--task", "text(dat='x')"], "did you mean 'data'?"),
        (["reproduce", "delta-net"], "did you mean 'deltanet'?"),
        (["bench", "--suite", "dceay"], "did you mean 'decay'?"),
        (["bench", "--ops", "gal"], "did you mean 'gla'?"),
        (["train", "--preset", "default-smal"], "did you mean 'default-small'?"),
        (["train", "--schedule", "cosin"], "did you mean 'cosine'?"),
        (["train", "--max-bytes", "9999", "--set", "mlp_hiden=3"], "did you mean 'mlp_hidden'?"),
    ],
)
def test_a_near_name_is_suggested(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: list[str],
    near: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = leave(capsys, *line)
    assert code == 2
    assert near in err


def test_what_a_pipe_cannot_encode_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where pipes have few characters: the table is shown, with question marks."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", pipe)
    with pytest.raises(SystemExit) as left:
        main(["inspect", "gla"])
    assert not left.value.code
    pipe.flush()
    assert b"H?K?V" in pipe.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: expected one that this machine has .*cpu.*, got '{name}'"):
        pick_device(name)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("width: expected [1, 2], got 3"), "Error: width: expected [1, 2], got 3\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "Error: [Errno 2] No such file: 'a.txt'\n"),
        (FileExistsError("runs/x: already there"), "Error: runs/x: already there\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "Error: [Errno 28] No space left on device\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("linnet.cli.list._rows", fail)
    assert leave(capsys, "list") == (2, "", line)
    for arguments in (["--debug", "list"], ["list", "--debug"]):
        with pytest.raises(type(error)):
            main(arguments)


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("linnet.cli.list._rows", fail)
    with pytest.raises(KeyError):
        main(["list"])
