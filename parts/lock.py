"""One command at a time writes into a folder: a lock that knows whether its owner is alive, on this machine or another.

    python -m pytest tests/test_lock.py
"""

import contextlib
import json
import os
import socket
import threading
from pathlib import Path

from parts.processes import first_decides
from parts.settings import InputError

BEAT = 15                                       # seconds between signs of life
SILENT = 120                                    # seconds without one after which an owner elsewhere counts as dead


def started(process):
    """When a process of this machine started, by its system's clock; None if it is gone, "" where nobody knows."""
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except OSError:
        return None
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def system():
    """What tells this machine's processes from others of equal numbers: its start, and the container they run in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:                                 # not on Linux
        return ""


def identity():
    """Who writes into a lock. A number of a process is used again, with another start."""
    return {"host": socket.gethostname(), "system": system(), "process": os.getpid(), "started": started(os.getpid())}


def silence(file):
    """Seconds since the last sign of life, by the clock of the disk: those of two machines differ."""
    probe = Path(f"{file}.{socket.gethostname()}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - file.stat().st_mtime
    finally:
        probe.unlink()


def alive(owner, file):
    """Whether the owner of a lock file still runs."""
    if (owner.get("host"), owner.get("system")) == (socket.gethostname(), system()):
        return started(owner["process"]) == owner["started"]
    return silence(file) < SILENT


def take(file, folder):
    """Make a lock file of this process. One whose owner is dead is replaced."""
    taken = InputError(f"{folder} was just taken by another process: choose another --out")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            found = file.read_text(encoding="utf-8")
            refuse_alive(found, file, folder)
            dead = Path(f"{file}.{os.getpid()}")
            try:
                file.rename(dead)
            except FileNotFoundError:
                raise taken from None
            if dead.read_text(encoding="utf-8") != found:       # another process was faster, and this lock is its own
                dead.rename(file)
                raise taken
            dead.unlink()
        with open(file, "x", encoding="utf-8") as lock:         # "x": of two that come at once, one fails
            json.dump(identity(), lock)
    except FileExistsError as error:
        raise taken from error
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): choose another --out") from error


def refuse_alive(found, file, folder):
    """Stop if the owner of a lock is alive. A lock that was cut short belongs to nobody."""
    try:
        owner = json.loads(found)
        name = f"process {owner['process']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return
    if alive(owner, file):
        raise InputError(f"{folder} is in use by {name}: wait for it, stop it, or choose another --out; if it cannot "
                         f"be running any more, remove {file}")


def beat(file, ended):
    """Signs of life, until the owner has ended."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


@contextlib.contextmanager
def held(folder):
    """Hold FOLDER.lock inside; in the folder itself, where nothing may be written beside it, as in a mounted volume."""
    file = Path(f"{folder}.lock")
    if Path(folder).is_dir() and not os.access(file.parent, os.W_OK):
        file = Path(folder) / "run.lock"
    take(file, folder)
    ended = threading.Event()
    threading.Thread(target=beat, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(folder):
    """Hold FOLDER.lock inside. Of several processes the first one does, and its refusal is that of all."""
    with contextlib.ExitStack() as stack:
        first_decides(lambda: stack.enter_context(held(folder)))
        yield
