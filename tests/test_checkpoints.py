"""Claims about checkpoints on disk (formats/checkpoints.py)."""

import os
from pathlib import Path

import pytest
import torch
from made import fresh
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from formats.checkpoints import (
    Saver,
    checkpoint_folders,
    newest_checkpoint,
    read_tensors,
    save_checkpoint,
    tensor_names,
    tensors_of,
)


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


def test_memory_for_copies_is_kept_for_the_same_tensors_and_no_others(tmp_path, monkeypatch):
    """Phases differ in what their optimizer holds, and "before" holds none of it; a second copy of the same is free."""
    pinned, grown, manifest = [], [], {"config": {}, "dtype": "float32"}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *args: pinned.append(x) or x)
    m, saver = fresh("tiny-emu3"), Saver(sharded=False, pinned=True)
    optimizer = torch.optim.AdamW(m.lm.norm.parameters())
    m.lm.norm.weight.sum().backward()
    optimizer.step()
    weights, everything = tensors_of(m), tensors_of(m, optimizer)
    for name, tensors in (("before", weights), ("one", everything), ("two", everything)):
        saver.begin(tensors, manifest, tmp_path / name)
        saver.finish()
        assert tensor_names(tmp_path / name) == tensors.keys()
        grown.append(len(pinned) - sum(grown))
    assert grown[0] == len(weights) < grown[1] and grown[2] == 0


@pytest.mark.parametrize("keep", [1, 2])
def test_an_old_checkpoint_stays_until_the_next_one_is_in_place(keep, tmp_path, monkeypatch):
    """Killed in between, a run would have lost everything. The oldest go, but not what lies beside the checkpoints."""
    m, rename = fresh("tiny-emu3"), os.replace

    def save(name):
        manifest = {"config": vars(m.config), "dtype": "float32", "name": name}
        save_checkpoint(tensors_of(m), manifest, tmp_path / name, keep).result()

    def killed(source, target):
        if Path(source).suffix == ".part" and Path(source).is_dir():
            raise OSError("killed")
        rename(source, target)
    names = [f"checkpoints/0-000000{step}" for step in (3, 6, 9)] + ["checkpoints/1-0000000"]
    for name in ["before", *names[:3]]:
        save(name)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(CheckpointException):
        save(names[3])
    assert newest_checkpoint(tmp_path)[1]["name"] == names[2]
    assert checkpoint_folders(tmp_path) == [tmp_path / name for name in names[3 - keep:3]]
    monkeypatch.undo()
    save(names[3])
    assert newest_checkpoint(tmp_path)[1]["name"] == names[3]
    assert checkpoint_folders(tmp_path) == [tmp_path / name for name in names[4 - keep:]]
    assert (tmp_path / "before").exists()
