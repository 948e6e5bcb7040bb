"""Public weights of Emu3 and Janus-Pro: names, configurations, reading, and writing what transformers reads."""

import functools
import json
import math
import re
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import model
from formats.checkpoints import configured, from_manifest, newest_checkpoint, read_manifest
from parts.settings import InputError, aside, first_line, read_json
from parts.text import SPECIAL, TOKENIZER_NOTES, TOKENIZERS, find_tokenizer, special_ids, token_ids
from parts.vision import Emu3VQ

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------
# Ordered rules from our names to those of each layout. "hf" is transformers; decoder levels of Emu3 count from the
# highest resolution there, and `top` is the number of the lowest.
VQ_NAMES = ((r"quantize\.", "quantize.embedding."), (r"(down|up)sample\.(\d)", r"\1.\2.\1sample.conv"))
EMU3_VQ_NAMES = (
    *VQ_NAMES, (r"coder_time_conv\.(\d)", r"coder.time_conv.\1.conv"), (r"coder_time_blocks", "coder.time_res_stack"),
    (r"decoder\.up\.(\d)", lambda found, top: f"decoder.up.{top - int(found[1])}"))
NAMES = {
    ("emu3", "original"): (*EMU3_VQ_NAMES, (r"^vq\.", ""), (r"^lm\.", "model.")),
    ("emu3", "hf"): (
        *EMU3_VQ_NAMES, (r"^vq\.", "model.vqmodel."), (r"^lm\.", "model.text_model."),
        (r"coder\.(down|up)\.", r"coder.\1_block.\1."), (r"\.mid\.", ".middle_block."),
        (r"attn\.(\d)\.norm\.", r"attn_norms.\1."), (r"attn_1\.norm\.", "attn_norm."),
        (r"(attn[._]\d)\.([qkv])\.", r"\1.\2_proj."), (r"(attn[._]\d)\.proj_out", r"\1.out_proj")),
    ("janus", "original"): (
        *VQ_NAMES, (r"^vq\.", "gen_vision_model."), (r"coder\.(down|up)\.", "coder.conv_blocks."),
        (r"(conv_blocks\.\d)\.block\.", r"\1.res."), (r"mid\.block_1", "mid.0"), (r"mid\.attn_1", "mid.1"),
        (r"mid\.block_2", "mid.2"), (r"^lm\.", "language_model.model."), (r"^lm_head", "language_model.lm_head"),
        (r"aligner\.(\d)", r"aligner.layers.\1"), (r"^gen_head\.0", "gen_head.output_mlp_projector"),
        (r"^gen_head\.2", "gen_head.vision_head"), (r"^vision\.", "vision_model.vision_tower."),
        (r"patch_embed\.", "patch_embed.proj."), (r"(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
        (r"(blocks\.\d+)\.fc", r"\1.mlp.fc")),
    ("janus", "hf"): (
        *VQ_NAMES, (r"^vq\.", "model.vqmodel."), (r"^lm\.", "model.language_model."), (r"^aligner", "model.aligner"),
        (r"^gen_", "model.generation_"), (r"aligner\.0", "aligner.fc1"), (r"aligner\.2", "aligner.hidden_layers.0"),
        (r"generation_embed", "generation_embeddings"), (r"head\.0", "head.proj_out"),
        (r"head\.2", "head.vision_head"), (r"^vision\.patch_embed", "vision.embeddings.patch_embedding"),
        (r"^vision\.pos_embed", "vision.embeddings.position_embedding.weight"),
        (r"^vision\.norm", "vision.post_layernorm"), (r"^vision\.", "model.vision_model."),
        (r"blocks\.(\d+)\.norm", r"blocks.\1.layer_norm"), (r"blocks\.(\d+)\.fc", r"blocks.\1.mlp.fc"),
        (r"blocks\.(\d+)\.proj", r"blocks.\1.self_attn.projection_layer"),
        (r"blocks\.(\d+)\.qkv", r"blocks.\1.self_attn.qkv"), (r"blocks\.", "encoder.layers.")),
}
# What transformers writes for Emu3 differs from what it holds in memory; it reads both, and so do we.
EMU3_TO_DISK = ((r"^model\.text_model\.", "text_model.model."), (r"^lm_head\.", "text_model.lm_head."),
                (r"^model\.vqmodel\.", "vqmodel."))
EMU3_FROM_DISK = ((r"^text_model\.model\.", "model.text_model."), (r"^text_model\.lm_head\.", "lm_head."),
                  (r"^vqmodel\.", "model.vqmodel."))
UNUSED = r"attn_pool|codebook_used|inv_freq"             # in public files, used by nobody


def renamed(name, rules):
    """A name after all rules, in their order."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def public_names(name, config, layout):
    """The public names of one of our tensors: one, or three where a fused projection is stored apart."""
    top = len(config.vq_mult) - 1
    name = renamed(name, [(pattern, functools.partial(new, top=top) if callable(new) else new)
                          for pattern, new in NAMES[config.kind, layout]])
    return [name.replace("qkv", f"{part}_proj") for part in "qkv"] if layout == "hf" and "qkv" in name else [name]


def to_transformers(name, value, config):
    """One of our tensors as {name: tensor} in memory of transformers."""
    public = public_names(name, config, "hf")
    parts = dict(zip(public, value.chunk(3), strict=True)) if len(public) == 3 else {public[0]: value}
    if config.kind == "emu3":                       # 1 x 1 convolutions are linear there
        return {part: x[:, :, 0, 0] if re.search(r"(q|k|v|out)_proj", part) and x.ndim == 4 else x
                for part, x in parts.items()}
    return {part: x[0] if part.endswith("position_embedding.weight") else x for part, x in parts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------
# Fields of the json files by our names, and what the code takes for granted of the others.
TEXT_FIELDS = {"width": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers",
               "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
               "vocab": "vocab_size", "norm_eps": "rms_norm_eps", "theta": "rope_theta",
               "context": "max_position_embeddings"}
TEXT_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default",
             "type": "default", "partial_rotary_factor": 1.0}
VQ_HF = {"code_dim": "embed_dim", "vq_latent": "latent_channels", "vq_width": "base_channels",
         "vq_mult": "channel_multiplier", "vq_blocks": "num_res_blocks", "vq_attention": "attn_resolutions"}
VQ_ORIGINAL = {"codebook": "codebook_size", "code_dim": "embed_dim", "vq_latent": "z_channels", "vq_width": "ch",
               "vq_mult": "ch_mult", "vq_blocks": "num_res_blocks", "vq_attention": "attn_resolutions"}
VQ_ONLY = {"double_latent": False, "double_z": False, "in_channels": 3, "out_channels": 3,
           "temporal_downsample_factor": Emu3VQ.frames, "num_hidden_layers": 2}
VIT = {"vit_width": "hidden_size", "vit_layers": "num_hidden_layers", "vit_heads": "num_attention_heads",
       "vit_patch": "patch_size", "image_size": "image_size"}
VIT_ONLY = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_qk_norm": False, "attention_bias": True, "depth": 2,
            "num_channels": 3}
SIGLIP_L = {"model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
LLAMA = {"width": 4096, "ffn": 11008, "layers": 32, "heads": 32, "vocab": 32000, "norm_eps": 1e-6, "theta": 1e4,
         "context": 2048}                        # what transformers assumes where a Llama's config.json is silent
RESIZE = {"min_pixels": "min_pixels", "max_pixels": "max_pixels", "min_side": "min_size"}
RESIZE_ONLY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "background_color": [127] * 3, "resample": 3,
               "do_resize": True, "do_rescale": True, "do_normalize": True}
# How pictures are drawn: no public config.json says it, the presets of the recipes do; `save` writes it down.
DRAWING_FIELDS = ("image_size", "guidance", "top_k", "suffix", "negative", "system")
ID_FIELDS = {role: f"{role}_token_id" for role in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}


def taken(section, names, only, origin):
    """{our field: value} of those a section of a json file holds; what the code cannot honour is an error."""
    for key, value in only.items():
        given = section.get(key)
        if given is not None and value not in (given, [given] * 3):             # 127 for [127, 127, 127]
            raise InputError(f"{origin}: {key} {given!r} cannot be honoured, only {value!r}")
    return {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}


def read_config(folder, known):
    """config.json and the file of preprocessing -> (layout, values of a Config without ids, content of config.json).
    known {name: function that reads the tensor} fills in what Janus-Pro's original file leaves out."""
    file = folder / "config.json"
    content = read_json(file)
    kind, layout = {"emu3": ("emu3", "hf"), "Emu3": ("emu3", "original"), "janus": ("janus", "hf"),
                    "multi_modality": ("janus", "original")}.get(content.get("model_type"), (None, None))
    if not kind:
        raise InputError(f"{file}: model_type {content.get('model_type')!r} is not emu3, Emu3, janus or multi_modality")
    values = asdict(model.EMU3_8B) if kind == "emu3" else asdict(model.JANUS_PRO_7B) | LLAMA
    vision, vq, text = (content.get(part) or {} for part in (
        "vision_config", "vq_config", "text_config" if layout == "hf" else "language_config"))
    text = content if (kind, layout) == ("emu3", "original") else text
    values["head_dim"] = None
    if kind == "janus" or "num_key_value_heads" in text:
        values["kv_heads"] = None
    text = text | (text.get("rope_parameters") or {}) | (text.get("rope_scaling") or {})
    values |= taken(text, TEXT_FIELDS, TEXT_ONLY, file)
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["head_dim"] = values["head_dim"] or values["width"] // values["heads"]
    if layout == "hf":
        books = {"codebook": "codebook_size" if kind == "emu3" else "num_embeddings"}
        values |= taken(vq, VQ_HF | books, VQ_ONLY, file)
    if kind == "emu3":
        values["image_size"] = math.isqrt(content.get("image_area") or values["image_size"] ** 2)
    elif layout == "hf":
        values |= taken(vision, VIT, VIT_ONLY, file)
        values["vit_ffn"] = int(values["vit_width"] * (vision.get("mlp_ratio") or 4.0))
        values["vq_attention"] = [len(values["vq_mult"]) - 1]
    else:
        values |= taken(vision.get("params") or {}, {"vit_heads": "heads"}, SIGLIP_L, file) | janus_sizes(known)
    return layout, values | read_resize(folder) | (content.get("pictures") or {}), content


def read_resize(folder):
    """How pictures are resized, where a file of the folder says it. transformers 5 puts it into another file."""
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            content = read_json(folder / name)
            return taken((content.get(part) or {}) if part else content, RESIZE, RESIZE_ONLY, folder / name)
    return {}


def janus_sizes(known):
    """Sizes of SigLIP and the picture tokenizer from the shapes of Janus-Pro's original tensors; its config.json has
    only a name for them. (The number of heads shows in no shape.)"""
    def shape(name):
        if name not in known:
            raise InputError(f"weights lack {name}: download the whole folder again")
        return known[name]().shape

    def count(pattern):
        return len({found[0] for found in map(re.compile(pattern).match, known) if found})
    vit, vq = "vision_model.vision_tower.", "gen_vision_model."
    levels, blocks = count(vq + r"encoder\.conv_blocks\.\d+\."), count(vq + r"encoder\.conv_blocks\.0\.res\.\d+\.")
    vq_width, (vit_width, _, patch, _) = shape(vq + "encoder.conv_in.weight")[0], shape(vit + "patch_embed.proj.weight")
    ends = [shape(f"{vq}encoder.conv_blocks.{i}.res.{blocks - 1}.conv2.weight")[0] for i in range(levels)]
    codebook, code_dim = shape(vq + "quantize.embedding.weight")
    return {"vq_width": vq_width, "vq_mult": [end // vq_width for end in ends], "vq_blocks": blocks,
            "vq_attention": [i for i in range(levels) if count(rf"{vq}encoder\.conv_blocks\.{i}\.attn\.")],
            "vq_latent": shape(vq + "encoder.conv_out.weight")[0], "codebook": codebook, "code_dim": code_dim,
            "vit_width": vit_width, "vit_patch": patch, "vit_layers": count(vit + r"blocks\.\d+\."),
            "vit_ffn": shape(vit + "blocks.0.mlp.fc1.weight")[0],
            "image_size": patch * math.isqrt(shape(vit + "pos_embed")[1])}


def read_ids(folder, content, values):
    """(ids by role, tokenizer file or None): from the tokenizer's own file where it is there, else config.json."""
    kind, file = values["kind"], find_tokenizer(folder)
    known, origin = token_ids(file) if file else content.get("vocabulary_map"), file or folder / "config.json"
    if known:
        ids, name = special_ids(known, kind, origin), f"<|visual token {values['codebook'] - 1:06d}|>"
        last = ids.get("visual", 0) + values["codebook"] - 1
        if kind == "emu3" and known.get(name, last) != last:
            raise InputError(f"{origin}: the ids of the picture codes are not in one row from code 0 to {name}")
        return ids, file
    text = content | content.get("text_config", {})
    ids = {role: text[key] for role, key in ID_FIELDS.items() if text.get(key) is not None}
    return ids | ({"placeholder": content["image_token_id"]} if content.get("image_token_id") is not None else {}), None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def find_folder(name):
    """A folder (or .pth file) that exists, or else the local copy of a hub id, downloaded if need be."""
    if Path(name).exists() or Path(name).parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)                            # a mistyped runs/name is no hub id
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(str(name)))
    except Exception as error:                      # no such id, no network, no rights: all end here
        raise InputError(f"{name} is no folder and cannot be had from the hub ({first_line(error)}): run `hf download "
                         f"{name}` where there is a network, then give that folder") from error


def stored_tensors(path):
    """{name: function that reads this tensor} of a folder, or of one .pth file; pickled files run no code."""
    index = next(iter(sorted(path.glob("*.index.json"))), None)
    sharded = read_json(index).get("weight_map") or {} if index else {}
    files = [path] if path.is_file() else sorted(
        {path / name for name in sharded.values()} or
        list(path.glob("*.safetensors")) or list(path.glob("pytorch_model*.bin")) or list(path.glob("*.pth")))
    if not files:
        raise InputError(f"{path} holds no weights: expected *.safetensors, pytorch_model*.bin or *.pth")
    if len(files) > 1 and files[0].suffix == ".pth":
        raise InputError(f"{path} holds {len(files)} checkpoints: give one of them, such as {files[-1]}")
    known = {}
    for file in files:
        try:
            safe = file.suffix == ".safetensors"
            source = safe_open(file, "pt") if safe else torch.load(file, "cpu", weights_only=True, mmap=True)
            read = source.get_tensor if safe else source.get
            known |= {name: functools.partial(read, name) for name in source.keys()}
        except Exception as error:                  # missing, truncated, not a checkpoint: all mean the same
            raise InputError(f"weights {file} cannot be read ({first_line(error)}): download it again") from error
    return {name: read for name, read in known.items() if not re.search(UNUSED, name)}


def load_public(path, dtype, device, vision_tokenizer, changes, shard=None):
    """A model from public weights: built without memory, then filled tensor by tensor."""
    folder, known = path if path.is_dir() else path.parent, stored_tensors(path)
    if path.is_file() and not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json: copy the json files of the model that {path.name} was "
                         "trained from into it")
    try:
        m, layout, tied, known = empty_model(folder, known, vision_tokenizer, changes)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{folder / 'config.json'} describes no model that can be built "
                         f"({first_line(error)}): is it complete?") from error
    if shard:
        shard(m)
    head, words = (public_names(name, m.config, layout)[0] for name in ("lm_head.weight", "lm.embed_tokens.weight"))
    if tied and head not in known and words in known:
        known[head] = known[words]
    state, problems, used = model.fresh_lora(m, device), [], set()
    for name, like in m.state_dict().items():
        if name in state:
            continue
        public = public_names(model.unforked(name, m.config), m.config, layout)
        used.update(public)
        missing = [part for part in public if part not in known]
        problems += [f"{part} is missing" for part in missing]
        if missing:
            continue
        value = torch.cat([known[part]() for part in public]) if len(public) > 1 else known[public[0]]()
        if [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
            problems.append(f"{public[0]} is {tuple(value.shape)}, not {tuple(like.shape)}")
            continue
        wanted = model.held_type(name, dtype or value.dtype) if value.is_floating_point() else value.dtype
        # Nobody holds more than one whole tensor.
        state[name] = model.own_part(value.reshape(like.shape).to(device, wanted, copy=True), like)
    problems += [f"{name} is not known" for name in known.keys() - used]
    if problems:
        shown = "; ".join(sorted(problems)[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"weights in {path} do not fit its config.json: {shown}")
    m.load_state_dict(state, assign=True)
    return m


def empty_model(folder, known, vision_tokenizer, changes):
    """What the json files of a folder describe -> a model on the meta device, its layout, whether its embeddings are
    tied, and the stored tensors by the names of that layout."""
    layout, values, content = read_config(folder, known)
    kind = values["kind"]
    if (kind, layout) == ("emu3", "original"):
        vision = find_vision_tokenizer(folder, vision_tokenizer)
        values |= taken(read_json(vision / "config.json"), VQ_ORIGINAL, VQ_ONLY, vision / "config.json")
        values |= read_resize(vision)
        known = known | stored_tensors(vision)
    if (kind, layout) == ("emu3", "hf"):
        known = {renamed(name, EMU3_FROM_DISK): read for name, read in known.items()}
    ids, tokenizer_file = read_ids(folder, content, values)
    with torch.device("meta"):
        m = model.MODELS[kind](configured(values | {"ids": ids} | changes), tokenizer_file)
    # transformers assumes tied embeddings for Janus-Pro if config.json is silent; the public weights contradict it
    tied = content.get("tie_word_embeddings", (kind, layout) == ("janus", "hf"))
    return m, layout, tied, known


def find_vision_tokenizer(folder, given):
    """The folder of Emu3's picture tokenizer, given or beside the language model."""
    if given:
        return find_folder(given)
    for file in sorted(folder.resolve().parent.glob("*/config.json")):
        with suppress(InputError):                   # other folders are nobody's business
            if read_json(file).get("model_type") == "Emu3VisionVQ":
                return file.parent
    raise InputError(f"{folder} holds the language model alone: give --vision-tokenizer FOLDER "
                     "(hub: BAAI/Emu3-VisionTokenizer)")


def load(folder, dtype=None, device="cpu", vision_tokenizer=None, rope_bf16=False, attention="auto", part="",
         shard=None, lora_rank=None, fork_layer=0, checkpoint_activations=False):
    """A model in eval mode from a run folder, or a folder (or hub id) of public weights, whose layout is recognised.

    dtype           None: as stored; the picture tokenizer is always float32
    vision_tokenizer  folder of Emu3's picture tokenizer; None: beside the language model
    rope_bf16       round the rotary frequencies as the published scripts do
    part            "before" or "control" of a run; RUN/before may also be given as the folder
    shard           shard(m), called while the model is empty, may make its parameters DTensors
    lora_rank       start LoRA on a model without; None: LoRA if the run folder has it
    fork_layer      start UniFork's two branches on a model without; 0: a fork if the run folder has it
    attention, checkpoint_activations  see model.Config
    """
    home = folder = find_folder(folder)
    changes = {"attention": attention, "rope_bf16": rope_bf16, "checkpoint_activations": checkpoint_activations}
    changes |= {"lora_rank": lora_rank} if lora_rank else {}
    changes |= {"fork_layer": fork_layer} if fork_layer else {}
    if not (folder / "checkpoints").exists() and (folder.is_file() or (folder / "config.json").exists()):
        return load_public(folder, dtype, device, vision_tokenizer, changes, shard).eval()
    if (folder / "manifest.json").exists():         # one checkpoint of a run, RUN/before or RUN/checkpoints/3-0000300
        part = "."
        home = next((up for up in folder.absolute().parents if find_tokenizer(up)), folder)
    saved, manifest = (folder / part, read_manifest(folder / part)) if part else newest_checkpoint(folder)
    if lora_rank is not None and manifest["config"].get("lora_rank"):
        raise InputError(f"{folder} was trained with LoRA: write it as a plain model with formats.weights: save("
                         f"load({str(folder)!r}), 'FOLDER'), and start from that FOLDER")
    if fork_layer and manifest["config"].get("fork_layer"):
        raise InputError(f"{folder} is forked already: leave out --fork-layer")
    return from_manifest(manifest, saved, changes, device, shard, dtype, find_tokenizer(home)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
SHARD_BYTES = 5e9


def save(m, folder):
    """Write the layout of transformers, which AutoModelForImageTextToText reads: json files of the configuration,
    safetensors, and the tokenizer's files where they are known. A folder that holds anything is refused."""
    folder, described = Path(folder), public_files(m)
    if m.config.fork_layer:
        raise InputError("a forked model has no layout in transformers: keep its run folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: choose another folder to save to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder) as part:
        part.mkdir()
        files = save_shards(m, part)
        if len(files) > 1:
            described["model.safetensors.index"] = {
                "metadata": {"total_size": sum(size for _, size in files.values())},
                "weight_map": {name: file for file, (names, _) in files.items() for name in names}}
        if m.tokenizer_file and Path(m.tokenizer_file).name == "tokenizer.json":
            ends = {f"{role}_token": SPECIAL[m.config.kind][role] for role in ("bos", "eos", "pad")}
            described["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | ends
        for name, content in described.items():
            (part / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if m.tokenizer_file:
            for name in TOKENIZERS + TOKENIZER_NOTES:
                beside = Path(m.tokenizer_file).with_name(name)
                if beside.exists():
                    shutil.copy(beside, part / name)


def save_shards(m, folder):
    """Write all weights by their names in transformers -> {file: (names, bytes)}."""
    shards, size = [{}], 0
    for name, value in merged(m).items():
        for part, tensor in to_transformers(name, value, m.config).items():
            if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            if m.config.kind == "emu3":
                part = renamed(part, EMU3_TO_DISK)
            shards[-1][part] = tensor.contiguous()
            size += tensor.nbytes
    files = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files[file] = [*shard], sum(tensor.nbytes for tensor in shard.values())
    return files


@torch.no_grad()
def merged(m):
    """The weights of a model with W + (alpha / R) B A in place of W, A and B; of one without LoRA as they are."""
    state = m.state_dict()
    for name in [name for name in state if name.endswith("lora_a")]:
        a, b = state.pop(name), state.pop(name[:-1] + "b")
        key = name.replace("lora_a", "weight")
        state[key] = (state[key].float() + model.LORA_ALPHA / len(a) * (b.float() @ a.float())).to(state[key].dtype)
    return state


def public_files(m):
    """{name: content} of the json files that transformers writes beside the weights."""
    c, ids = m.config, m.ids
    ends = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}
    text = {theirs: getattr(c, ours) for ours, theirs in TEXT_FIELDS.items() if ours != "theta"} | ends | {
        "rope_parameters": {"rope_theta": c.theta, "rope_type": "default"}, "tie_word_embeddings": False}
    vq = {theirs: getattr(c, ours) for ours, theirs in VQ_HF.items()}
    config = {"image_token_id": ids["placeholder"], "tie_word_embeddings": False,
              "dtype": str(m.lm_head.weight.dtype).removeprefix("torch."),
              "pictures": {name: getattr(c, name) for name in DRAWING_FIELDS}}
    resize = {name: RESIZE_ONLY[name] for name in ("image_mean", "image_std")}
    if c.kind == "emu3":
        known = {SPECIAL["emu3"][role]: i for role, i in ids.items()} | {"<image>": ids["placeholder"]}
        known |= {f"<|visual token {code:06d}|>": ids["visual"] + code for code in range(c.codebook)}
        vq |= {"codebook_size": c.codebook, "hidden_size": c.vq_width * c.vq_mult[-1],
               "temporal_downsample_factor": Emu3VQ.frames}
        config |= {"architectures": ["Emu3ForConditionalGeneration"], "model_type": "emu3", "vq_config": vq,
                   "text_config": text | {"model_type": "emu3_text_model"}, "vocabulary_map": known}
        resize |= {"image_processor_type": "Emu3ImageProcessor", "min_pixels": c.min_pixels,
                   "max_pixels": c.max_pixels, "spatial_factor": c.factor}
        return {"config": config, "generation_config": ends, "preprocessor_config": resize}
    if set(c.vq_attention) != {len(c.vq_mult) - 1}:
        raise InputError(f"vq_attention {c.vq_attention}: transformers has it at the last level only")
    vq = {key: value for key, value in vq.items() if key != "attn_resolutions"} | {
        "num_embeddings": c.codebook, "projection_dim": c.width, "image_token_embed_dim": c.width,
        "num_hidden_layers": 2}
    vision = {theirs: getattr(c, ours) for ours, theirs in VIT.items()} | {
        "mlp_ratio": c.vit_ffn / c.vit_width, "projection_dim": c.width, "depth": 2,
        "num_image_tokens": c.picture_tokens}
    config |= {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus", "vq_config": vq,
               "text_config": text | {"model_type": "llama"}, "vision_config": vision}
    drawing = {"generation_kwargs": {"boi_token_id": ids["boi"]}, "guidance_scale": c.guidance} if "boi" in ids else {}
    resize |= {"image_processor_type": "JanusImageProcessor", "min_size": c.min_side,
               "size": {"height": c.image_size, "width": c.image_size}}
    return {"config": config, "generation_config": ends | drawing, "preprocessor_config": resize}
