"""Folders of weights: from a name to files, and from files to tensors.

A name is a folder, a file or a hub id. Tensors are read one by one, and pickled files run no code.
"""

import functools
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

from parts.settings import InputError, first_line, read_json

UNUSED = r"attn_pool|codebook_used|inv_freq"             # in public files, but never used


def find_folder(name):
    """A folder (or .pth file) as it is, or the local copy of a hub id, which is downloaded if necessary."""
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))
    if Path(name).parent.exists() or not hub_id:    # if runs/ exists, a mistyped runs/name is no hub id
        return Path(name)
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(str(name)))
    except Exception as error:                      # unknown id, no network, no permission: the library raises anything
        raise InputError(f"{name} is no folder and cannot be downloaded from the hub ({first_line(error)}): run "
                         f"`hf download {name}` on a machine with network access, then give that folder") from error


def weight_files(path):
    """The files of weights in a folder: those of its index, or else of the first kind found. A file is its own."""
    if path.is_file():
        return [path]
    files = []
    for index in sorted(path.glob("*.index.json"))[:1]:
        files = sorted({path / name for name in (read_json(index).get("weight_map") or {}).values()})
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth"):
        files = files or sorted(path.glob(pattern))
    if not files:
        raise InputError(f"{path} holds no weights: give a folder with *.safetensors, pytorch_model*.bin or *.pth")
    if len(files) > 1 and files[0].suffix == ".pth":
        raise InputError(f"{path} holds {len(files)} checkpoints: give one of them, such as {files[-1]}")
    return files


def stored_tensors(path):
    """{name: function that reads this tensor} of a folder, or of one .pth file. Pickled files run no code."""
    known = {}
    for file in weight_files(path):
        try:
            if file.suffix == ".safetensors":
                source = safe_open(file, "pt")
                read = source.get_tensor
            else:
                source = torch.load(file, "cpu", weights_only=True, mmap=True)
                read = source.get
            known |= {name: functools.partial(read, name) for name in source.keys()}
        except Exception as error:                  # missing, truncated, not a checkpoint: the remedy is the same
            raise InputError(f"weights {file} cannot be read ({first_line(error)}): download it again") from error
    return {name: read for name, read in known.items() if not re.search(UNUSED, name)}


def find_vision_tokenizer(folder, given):
    """The folder of Emu3's picture tokenizer: the given one, or one beside the language model."""
    if given:
        return find_folder(given)
    for file in sorted(folder.resolve().parent.glob("*/config.json")):
        with suppress(InputError):                  # other folders may hold anything
            if read_json(file).get("model_type") == "Emu3VisionVQ":
                return file.parent
    raise InputError(f"{folder} holds the language model alone: give --vision-tokenizer FOLDER "
                     "(hub: BAAI/Emu3-VisionTokenizer)")
