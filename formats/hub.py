"""Folders of weights: from a name to files, and from files to tensors.

A name is a folder, a file or a hub id. Tensors are read one by one, and pickled files run no code. What looks like
weights and is something else (a pointer to a file, an adapter, quantised tensors) is refused with its remedy.
"""

import functools
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

from parts.settings import InputError, first_line, read_json, shortened

UNUSED = r"attn_pool|codebook_used|inv_freq"             # in public files, but never used


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------
def find_folder(name):
    """A folder (or .pth file) as it is, the snapshot in a folder of the hub's cache, or the local copy of a hub id,
    which is downloaded if necessary."""
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))
    if Path(name).parent.exists() or not hub_id:    # if runs/ exists, a mistyped runs/name is no hub id
        return find_snapshot(Path(name))
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(str(name)))
    except Exception as error:                      # unknown id, no network, no permission: the library raises anything
        raise InputError(f"{name} is no folder and cannot be downloaded from the hub ({first_line(error)}): run "
                         f"`hf download {name}` on a machine with network access, then give that folder") from error


def find_snapshot(path):
    """The only snapshot in the root of one model in the hub's cache (models--ORG--NAME); any other path as it is."""
    if not (path / "snapshots").is_dir() or (path / "config.json").exists():
        return path
    snapshots = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
    if not snapshots:
        raise InputError(f"{path}/snapshots is empty: download the model again")
    if len(snapshots) > 1:
        raise InputError(f"{path} holds {len(snapshots)} snapshots: give one of them, such as {snapshots[-1]}")
    return snapshots[0]


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


# ---------------------------------------------------------------------------------------------------------------------
# What is no weights
# ---------------------------------------------------------------------------------------------------------------------
POINTER = b"version https://git-lfs.github.com/spec/"   # how a file of Git LFS begins before it is fetched


def refuse_pointer(file):
    """Refuse a file that git stored elsewhere and that nobody has fetched."""
    if not file.is_file():
        return
    with open(file, "rb") as content:
        start = content.read(len(POINTER))
    if start == POINTER:
        raise InputError(f"{file} is only a Git LFS pointer to the file: run `git lfs pull` in {file.parent}")


def refuse_adapter(path):
    """Refuse a folder of PEFT, or a file in it, whose tensors are changes to another model."""
    folder = path if path.is_dir() else path.parent
    file = folder / "adapter_config.json"
    if file.exists():
        base = shortened(read_json(file).get("base_model_name_or_path"))
        raise InputError(f"{folder} holds an adapter of {base}, not a whole model: merge it into that model "
                         "(peft: merge_and_unload, then save_pretrained), and give the merged folder")


def refuse_quantised(content, file):
    """Refuse the content of a config.json whose weights are packed into a few bits each."""
    for section in (content, content.get("text_config") or {}, content.get("language_config") or {}):
        how = section.get("quantization_config") or section.get("quantization")         # MLX has the second one
        if how:
            named = shortened(how.get("quant_method") or how, 100)
            raise InputError(f"{file}: the weights are quantised ({named}): give the original weights, in bfloat16 or "
                             "float32")


def read_tensor(read, name, file):
    """A stored tensor. Types of one byte are those of quantised weights, whose scales lie in other tensors."""
    value = read(name)
    if isinstance(value, torch.Tensor) and value.dtype.itemsize == 1:
        kind = str(value.dtype).removeprefix("torch.")
        raise InputError(f"weights {file}: {name} is {kind}, which is quantised: give the original weights, in "
                         "bfloat16 or float32")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Files and tensors
# ---------------------------------------------------------------------------------------------------------------------
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
        refuse_pointer(file)
        try:
            if file.suffix == ".safetensors":
                source = safe_open(file, "pt")
                read = source.get_tensor
            else:
                source = torch.load(file, "cpu", weights_only=True, mmap=True)
                read = source.get
            known |= {name: functools.partial(read_tensor, read, name, file) for name in source.keys()}
        except Exception as error:                  # missing, truncated, not a checkpoint: the remedy is the same
            raise InputError(f"weights {file} cannot be read ({first_line(error)}): download it again") from error
    return {name: read for name, read in known.items() if not re.search(UNUSED, name)}
