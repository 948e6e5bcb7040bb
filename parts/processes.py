"""One process, or as many as torchrun started: rank and world, who decides, sums over all of them.

How a model is wrapped for several processes, and when gradients are summed, is part of train.py.
"""

import os
import sys
from datetime import timedelta

import torch.distributed as dist

from parts.settings import InputError


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def processes():
    """How many processes there are: the world, in torch's words."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other processes of torchrun, if there are any. From here on only the first one prints."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def all_done():
    """Wait for every process of a command that otherwise sends nothing. One may have hours of work left."""
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
    """The lists of all processes as one."""
    if processes() == 1:
        return values
    lists = [None] * processes()
    dist.all_gather_object(lists, values)
    return sum(lists, [])


def first_decides(work):
    """What work() returns, or refuses, on the first process: the same on all of them."""
    found = [None, None]
    if rank() == 0:
        try:
            found[0] = work()
        except InputError as error:
            found[1] = str(error)
    if processes() > 1:
        dist.broadcast_object_list(found)
    if found[1]:
        raise InputError(found[1])
    return found[0]
