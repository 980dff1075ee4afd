"""The program itself: help, errors, loading of commands."""

from __future__ import annotations

import errno

import pytest
from typer.testing import CliRunner

import linnet
from linnet.cli import app, main

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
