"""One process, or as many as torchrun starts: their number, sums over all of them, decisions of the first, signals.

How a model is wrapped for several processes, and when gradients are summed, is in train.py.
"""

import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch.distributed as dist

from parts.settings import InputError


def rank():
    """Number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def processes():
    """How many processes there are (torch calls it the world size)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Connect to the other processes of torchrun, if there are any. From here on only the first process prints."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def all_done():
    """Wait for all processes of a command that does not communicate otherwise. One may be hours behind."""
    if processes() > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()


def over_processes(values):
    """Sum of a CPU tensor over all processes, in place."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def gathered(values):
    """The lists of all processes, joined in the order of their ranks."""
    if processes() == 1:
        return values
    lists = [None] * processes()
    dist.all_gather_object(lists, values)
    return sum(lists, [])


def first_decides(work):
    """Run work() on the first process only; all processes return its result, or raise its InputError."""
    result = refusal = None
    if rank() == 0:
        try:
            result = work()
        except InputError as error:
            refusal = str(error)
    if processes() > 1:
        sent = [result, refusal]
        dist.broadcast_object_list(sent)
        result, refusal = sent
    if refusal:
        raise InputError(refusal)
    return result


@contextlib.contextmanager
def interruptible(stop):
    """Ctrl-C, SIGTERM, SLURM's USR1 and a closed terminal (HUP, unless nohup ignores it) only call stop(number) inside.
    A second Ctrl-C interrupts at once, except under torchrun, which sends each one twice."""
    shown = [number for number in (1, 2) if os.isatty(number)]

    def handle(number, frame):
        stop(number)
        if number == signal.SIGINT and processes() == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.Signals(number).name == "SIGHUP":
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for file in shown:                      # to print on a closed terminal is an error
                os.dup2(nowhere, file)
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]        # Windows has no USR1
    if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        names.append("SIGHUP")
    before = {name: signal.signal(getattr(signal, name), handle) for name in names}
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(getattr(signal, name), old)
