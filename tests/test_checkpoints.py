"""Claims about checkpoints on disk (formats/checkpoints.py)."""

import torch
from made import fresh
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from formats.checkpoints import read_tensors, save_checkpoint, tensors_of


def test_a_checkpoint_is_written_from_the_copies_that_a_stager_made(tmp_path, monkeypatch):
    """On a GPU it copies into pinned memory; what is written is what was there then, not what a later step makes."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *args: pinned.append(x) or x)     # only CUDA has such
    m, stager, before = fresh("tiny-emu3"), BlockingAsyncStager(cache_staged_state_dict=True), {}
    for name in ("one", "two"):                     # the second time into the memory of the first
        before[name] = {key: value.clone() for key, value in m.state_dict().items()}
        future = save_checkpoint(tensors_of(m), {"config": vars(m.config), "dtype": "float32"},
                                 tmp_path / name, stager=stager)
        with torch.no_grad():
            m.lm.norm.weight.add_(1.0)
        future.result()
    for name, tensors in before.items():
        read_tensors(tensors_of(m), tmp_path / name)
        assert all(torch.equal(value, tensors[key]) for key, value in m.state_dict().items())
    assert len(pinned) == len(m.state_dict())
