"""Claims about one of several processes: what it learns from its environment (parts/processes.py)."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from made_data import ALBUM, encode

from formats.datasets import Encoded
from parts.processes import first_decides, gathered, interruptible, over_processes, processes, rank
from parts.settings import InputError


def test_several_processes_share_the_encoding(saved, album, tmp_path, monkeypatch):
    """Each takes its part by RANK and WORLD_SIZE, and writes files of its own."""
    (m, init), file = saved("emu3"), album(*ALBUM)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, held in (("0", 2), ("1", 3)):
        monkeypatch.setenv("RANK", number)
        encode(tmp_path / "codes", file, init)
        assert len(Encoded(tmp_path / "codes", m).parts) == held


def test_one_process_decides_sums_and_gathers_alone():
    """Without torchrun nothing is sent, and a refusal is the same InputError."""
    def refused():
        raise InputError("no room")
    assert (rank(), processes()) == (0, 1)
    assert first_decides(lambda: 3) == 3 and gathered(["a"]) == ["a"]
    assert over_processes(torch.tensor([2])).tolist() == [2]
    with pytest.raises(InputError, match="no room"):
        first_decides(refused)


def test_the_first_signal_is_noted_and_the_second_stops():
    """Ctrl-C asks for an end; pressed twice it is a KeyboardInterrupt; afterwards handlers are as before."""
    before, met = signal.getsignal(signal.SIGINT), []
    with interruptible(met.append), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert met == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_queue_may_ask_for_an_end():
    """SIGTERM, and the signal that SLURM sends some minutes before, are noted; afterwards handlers are as before."""
    numbers, met = [signal.SIGTERM, signal.SIGUSR1], []
    before = [signal.getsignal(number) for number in numbers]
    with interruptible(met.append):
        assert all(signal.getsignal(number) != old for number, old in zip(numbers, before, strict=True))
        for number in numbers:
            signal.raise_signal(number)
    assert met == numbers and [signal.getsignal(number) for number in numbers] == before


def test_a_closed_terminal_asks_for_an_end_unless_it_is_ignored():
    """HUP is noted like SIGTERM; under nohup, which ignores it, a run goes on."""
    met = []
    before = signal.getsignal(signal.SIGHUP)        # ignored, if the tests themselves run under nohup
    try:
        for handler in (signal.default_int_handler, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, handler)
            with interruptible(met.append):
                signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert met == [signal.SIGHUP]


CLOSED = """
import signal, sys, time
from parts.processes import interruptible
met = []
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with interruptible(met.append):
    print("ready", flush=True)
    while not met:
        time.sleep(0.01)
    print("on a closed terminal", flush=True)
    print("here too", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("saved")
"""


def test_what_is_printed_after_the_terminal_is_closed_stops_nothing(tmp_path):
    """The system refuses what is written to a closed terminal; the checkpoint that comes after must be saved."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", CLOSED, tmp_path / "file"], stdin=terminal, stdout=terminal,
                               stderr=terminal, start_new_session=True, cwd=Path(__file__).parent.parent,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(terminal)
    assert b"ready" in os.read(screen, 100)
    os.close(screen)
    assert process.wait(60) == 0 and (tmp_path / "file").read_text() == "saved"
