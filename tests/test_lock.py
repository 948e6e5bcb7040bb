"""Claims about the lock of a folder (parts/lock.py)."""

import json
import os
import subprocess
import sys
import time

import pytest

import parts.lock
from formats.checkpoints import resumed_from
from parts.lock import SILENT, held, identity
from parts.settings import InputError


def left(tmp_path, **changes):
    """A lock that another owner has left."""
    file = tmp_path / "run.lock"
    file.write_text(json.dumps(identity() | changes))
    return file


def test_a_folder_is_held_once(tmp_path):
    """Two runs in one folder would mix their logs and remove each other's checkpoints: the second is refused."""
    with held(tmp_path / "run"):
        with pytest.raises(InputError, match=f"run is in use by process {os.getpid()} on .*: wait for it"):
            held(tmp_path / "run").__enter__()
    assert not [*tmp_path.iterdir()]
    with held(tmp_path / "run"):
        assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


def test_the_lock_of_a_dead_process_is_replaced(tmp_path):
    """A job that was killed cannot remove its lock. Its number may belong to another process by now."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in ({"process": gone.pid}, {"started": "1"}):
        file = left(tmp_path, **changes)
        with held(tmp_path / "run"):
            assert json.loads(file.read_text()) == identity()
        assert not [*tmp_path.iterdir()]
    left(tmp_path).write_text('{"host": "x", ')
    with held(tmp_path / "run"):
        pass


def test_a_mounted_folder_is_locked_from_inside(tmp_path, monkeypatch):
    """Beside the mount of a container nobody may write, in it everybody may; a lock alone is no run."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with held(tmp_path / "run"):
        assert [file.name for file in tmp_path.rglob("*")] == ["run", "run.lock"]
        with pytest.raises(InputError, match="is in use by process"):
            held(tmp_path / "run").__enter__()
        assert resumed_from(tmp_path / "run", False, None) == (None, None)


def test_equal_numbers_in_another_container_are_another_owner(tmp_path):
    """Containers may share a host's name and their processes' numbers: the heartbeat decides."""
    left(tmp_path, system="another", process=os.getpid(), started="1")
    with pytest.raises(InputError, match="is in use by process"):
        held(tmp_path / "run").__enter__()


def test_an_owner_on_another_machine_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    """Nobody can ask for a process elsewhere: its lock counts as long as it is touched."""
    monkeypatch.setattr(parts.lock, "BEAT", 0.05)
    file = left(tmp_path, host="elsewhere")
    with pytest.raises(InputError, match="in use by process .* on elsewhere"):
        held(tmp_path / "run").__enter__()
    long_ago = time.time() - SILENT - 5
    os.utime(file, (long_ago, long_ago))
    with held(tmp_path / "run"):
        os.utime(file, (long_ago, long_ago))
        for _ in range(100):
            time.sleep(0.05)
            if file.stat().st_mtime > long_ago + SILENT:
                break
        else:
            pytest.fail("no heartbeat")


def test_of_two_that_find_a_dead_lock_one_takes_it(tmp_path, monkeypatch):
    """The second may have read the old lock before the first replaced it: it must not remove the new one."""
    file = left(tmp_path, started="1")
    inner = parts.lock.refuse_alive

    def slow(found, *rest):
        inner(found, *rest)
        file.write_text(json.dumps({"host": "faster"}))
    monkeypatch.setattr(parts.lock, "refuse_alive", slow)
    with pytest.raises(InputError, match="was just taken by another process"):
        held(tmp_path / "run").__enter__()
    assert json.loads(file.read_text()) == {"host": "faster"}
