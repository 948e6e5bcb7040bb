"""The training command, and how it is refused."""

import pytest

import train
from parts.settings import run_command


def command(*argv, main=train.main):
    run_command(lambda: main([str(word) for word in argv]))


def refused(capsys, *argv, main=train.main):
    """The one line with which a command is refused: exit status 2, no traceback, no other exception."""
    with pytest.raises(SystemExit) as stop:
        command(*argv, main=main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and (len(lines) == 1 or lines[0].startswith("usage:"))
    return lines[-1]
