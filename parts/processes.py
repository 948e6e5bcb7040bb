"""One process, or as many as torchrun started: rank and world, who decides, sums over all of them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from parts.settings import InputError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def over_processes(values):
    """Sum of a CPU tensor over all processes, in place."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def first_decides(work):
    """What work() gives, or refuses, on the first process: the same on all of them."""
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


def my_share():
    """Rank and number of the processes that torchrun started; 0 and 1 without it."""
    return tuple(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def all_done():
    """Wait until every process is here, which may take hours where one has more left to do."""
    if my_share()[1] > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
