"""A run's own checkpoints (layout: formats/README.md). torch.distributed.checkpoint writes the shards as safetensors,
so nothing is ever unpickled."""

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

import model
from parts.processes import first_decides, processes, rank
from parts.settings import InputError, aside, first_line, read_json, whole_lines, write_json

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
new_checksum = functools.partial(hashlib.blake2b, digest_size=16)


def checksum(file):
    with open(file, "rb") as content:
        return hashlib.file_digest(content, new_checksum).hexdigest()


# Names in the manifests of older runs, and the present ones.
RENAMED = {"stage": "phase", "weights": "lambdas"}


def read_manifest(folder):
    """The manifest of a checkpoint folder, after checking every file against its checksum."""
    if not (folder / "manifest.json").exists():
        raise InputError(f"checkpoint {folder} is missing")
    manifest = read_json(folder / "manifest.json")
    for name, expected in manifest.get("files", {}).items():
        if not (folder / name).exists() or checksum(folder / name) != expected:
            raise InputError(f"checkpoint {folder} is damaged ({name} is missing or not what was written)")
    return {RENAMED.get(name, name): value for name, value in manifest.items()}


def checkpoint_folders(folder):
    """Complete checkpoints of a run folder, checkpoints/PHASE-STEP, oldest first."""
    return sorted(folder.glob("checkpoints/[0-9]*-" + "[0-9]" * 7))


def newest_checkpoint(folder):
    """(folder, manifest) of the newest undamaged checkpoint of a run folder. Damaged ones are reported."""
    for newest in reversed(checkpoint_folders(folder)):
        try:
            return newest, read_manifest(newest)
        except InputError as error:
            print(f"{error}: looking for an earlier one", file=sys.stderr)
    if not folder.exists():
        raise InputError(f"{folder} does not exist: give the folder of a run, or a folder or hub id of public weights")
    raise InputError(f"{folder} holds no checkpoint that can be read: give the folder of a run that has saved one")


def resumed_from(folder, resume, check):
    """(checkpoint folder, manifest) that a run continues from, (None, None) at its start. check(settings) refuses the
    settings of another run. Damaged checkpoints are renamed, as the run will write their names again."""
    used = folder.is_file()
    if folder.is_dir():
        used = any(file.suffix not in (".part", ".lock") for file in folder.iterdir())
    if used and not resume:
        raise InputError(f"{folder} is not empty: continue it with --resume, or choose another --out")
    if used and not (folder / "settings.json").exists():
        raise InputError(f"{folder} is not the folder of a run: choose another --out")
    if not checkpoint_folders(folder):
        if used:
            check(read_json(folder / "settings.json"))
        if resume:
            print(f"{folder} holds no checkpoint yet: starting")
        return None, None
    newest, manifest = newest_checkpoint(folder)
    check(manifest["settings"])
    for newer in checkpoint_folders(folder):
        if newer.name > newest.name:
            shutil.rmtree(f"{newer}.damaged", ignore_errors=True)
            os.replace(newer, f"{newer}.damaged")
    return newest, manifest


def trim_log(path, index, step):
    """Forget reports of steps that a resumed run takes again."""
    if path.exists():
        kept = [row for row in whole_lines(path)
                if (row.get("phase", row.get("stage")), row["step"]) <= (index, step)]          # older runs: stage
        with aside(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def tensor_names(folder):
    return set(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def read_tensors(tensors, folder):
    """Fill tensors {name: tensor} from a checkpoint folder. Each process reads what its shards need."""
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)


def configured(values):
    """A Config from the values of a JSON file, in which tuples are lists."""
    return model.Config(**values | {key: tuple(values[key]) for key in ("vq_mult", "vq_attention")})


def from_manifest(manifest, folder, changes, device="cpu", shard=None, dtype=None, tokenizer_file=None):
    """The model of a checkpoint folder, built without memory and then filled. Each process reads its own part.
    changes: fields of the Config that replace the stored ones; they may add LoRA or a fork. shard(m) may make the
    parameters of the still empty model DTensors. dtype None: as stored."""
    stored = manifest["config"]
    new_lora = changes.get("lora_rank", 0) and not stored.get("lora_rank")
    new_fork = changes.get("fork_layer", 0) and not stored.get("fork_layer")
    with torch.device("meta"):
        m = model.MODELS[stored["kind"]](configured(stored | changes), tokenizer_file)
    for name, parameter in m.named_parameters():
        parameter.data = parameter.data.to(model.held_type(name, dtype or getattr(torch, manifest["dtype"])))
    if shard:
        shard(m)
    m.to_empty(device=device)
    fresh = model.fresh_lora(m, device) if new_lora else {}
    wanted = {name: value for name, value in m.state_dict().items() if name not in fresh}
    if new_fork:
        wanted = {name: value for name, value in wanted.items() if model.unforked(name, m.config) == name}
    read_tensors({f"model.{name}": value for name, value in wanted.items()}, folder)
    if new_fork:
        model.fork(m)
    m.load_state_dict(fresh, strict=False)
    return m


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def tensors_of(m, optimizer=None, known=None):
    """{name: tensor} of a model and its optimizer, to be saved or loaded in place. known: the names in a checkpoint to
    load; the optimizer gets the moments found there. A parameter that never had a gradient has none."""
    tensors = {f"model.{name}": value for name, value in m.state_dict().items()}
    for name, parameter in m.named_parameters() if optimizer else ():
        moments = optimizer.state.get(parameter, {})
        if f"optimizer.exp_avg.{name}" in (known or ()):
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.zeros((), device=parameter.device)
            optimizer.state[parameter] = moments
        tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
    return tensors


class Summed(io.BufferedWriter):
    """A file that computes its checksum while it is written."""

    def __init__(self, path):
        super().__init__(io.FileIO(path, "w"))
        self.sum = new_checksum()

    def write(self, part):
        self.sum.update(part)
        return super().write(part)


class Summing(FileSystem):
    """Writes the checksum of each file NAME to NAME.sum."""

    @contextlib.contextmanager
    def create_stream(self, path, mode):
        with Summed(path) as file:
            yield file
        Path(f"{path}.sum").write_text(file.sum.hexdigest(), encoding="ascii")


class Writer(dcp.HuggingFaceStorageWriter):
    """Writes a checkpoint under a temporary name. Once all processes have, the first one adds the manifest and renames
    the folder (parts.settings.aside is for one process). If killed before, the last checkpoint stays the newest."""

    def __init__(self, folder, manifest, keep):
        super().__init__(f"{folder}.part", save_distributed=True)
        self.folder, self.manifest, self.keep = folder, manifest, keep
        self.fs = Summing()

    def finish(self, metadata, results):
        """Called on the first process only, when all shards are on disk."""
        files = {}
        part = Path(self.path)
        for file in sorted(part.glob("*.sum")):
            files[file.stem] = file.read_text(encoding="ascii")
            file.unlink()
        write_json(self.manifest | {"files": files}, part / "manifest.json")
        os.replace(part, self.folder)
        for old in checkpoint_folders(self.folder.parent.parent)[:-self.keep] if self.keep else ():
            shutil.rmtree(old)


def save_checkpoint(tensors, manifest, folder, keep=0, group=None, stager=None):
    """Write a checkpoint folder in the background -> future, or None if there is nothing to do. Each process writes its
    shards; if nothing is sharded, the first process writes everything. keep: how many checkpoints to keep, 0: all.
    group: the processes, on a channel of their own. stager: copies tensors off a GPU; None: into pageable memory."""
    if first_decides(folder.exists):
        return None
    first_decides(lambda: shutil.rmtree(f"{folder}.part", ignore_errors=True))
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    if alone and rank():
        return None
    return dcp.async_save(tensors, storage_writer=Writer(folder, manifest, keep), process_group=group,
                          async_stager=stager, no_dist=alone)


class Saver:
    """Writes the checkpoints of a run in the background, one at a time. sharded: each process writes its part, else the
    first one writes everything. pinned: the tensors are copied from a GPU."""

    def __init__(self, sharded, pinned):
        self.sharded, self.pinned = sharded, pinned
        self.group = dist.new_group(backend="gloo") if processes() > 1 else None        # a channel of its own
        self.stager = self.staged = None            # memory for copies of tensors, and the names it was made for
        self.future = self.folder = None            # what is being written

    def begin(self, tensors, manifest, folder, keep=0):
        """Start to write, as soon as the last checkpoint is on disk."""
        self.finish()
        # Copies into pinned memory are fast, but allocating it is slow: it is kept for checkpoints of the same tensors.
        if self.pinned and self.staged != set(tensors):
            self.stager = BlockingAsyncStager(cache_staged_state_dict=True)
            self.staged = set(tensors)
        self.folder = folder
        self.future = save_checkpoint(tensors, manifest, folder, keep, self.group, self.stager)

    def finish(self):
        """Wait for the checkpoint that is being written. If it fails, it fails on all processes."""
        if self.sharded:
            self.wait()
        else:
            first_decides(self.wait)

    def wait(self):
        """Wait for this process's part."""
        try:
            if self.future:
                self.future.result()
        except (CheckpointException, OSError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise InputError(f"checkpoint {self.folder} could not be written ({first_line(cause)}): make room, then "
                             "continue with --resume; earlier checkpoints are untouched") from error
        finally:
            self.future = None

    def release(self):
        """Free the memory for copies."""
        self.stager = self.staged = None
