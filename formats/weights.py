"""Public weights of Emu3 and Janus-Pro (layouts: formats/README.md): names, configurations, `load` and `save`."""

import functools
import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

import model
from formats.checkpoints import configured, from_manifest, new_checksum, newest_checkpoint, read_manifest
from formats.hub import (
    find_folder,
    find_vision_tokenizer,
    refuse_adapter,
    refuse_pointer,
    refuse_quantised,
    stored_tensors,
)
from parts.settings import InputError, aside, first_line, read_json
from parts.text import SPECIAL, TOKENIZER_NOTES, TOKENIZERS, find_tokenizer, special_ids, token_ids
from parts.vision import Emu3VQ

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------
# Rules, applied in order, that turn our names into those of each layout; "hf" is transformers. The decoder levels of
# Emu3 count from the highest resolution, so that the lowest one is `top`.
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
# For Emu3, transformers writes other names than it uses in memory. It reads both, and so do we.
EMU3_TO_DISK = ((r"^model\.text_model\.", "text_model.model."), (r"^lm_head\.", "text_model.lm_head."),
                (r"^model\.vqmodel\.", "vqmodel."))
EMU3_FROM_DISK = ((r"^text_model\.model\.", "model.text_model."), (r"^text_model\.lm_head\.", "lm_head."),
                  (r"^vqmodel\.", "model.vqmodel."))


def renamed(name, rules):
    """A name after all rules, applied in order."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def public_names(name, config, layout):
    """The public names of one of our tensors: one, or three if a fused projection is stored in parts."""
    top = len(config.vq_mult) - 1
    rules = [(pattern, functools.partial(new, top=top) if callable(new) else new)
             for pattern, new in NAMES[config.kind, layout]]
    name = renamed(name, rules)
    if layout == "hf" and "qkv" in name:
        return [name.replace("qkv", f"{part}_proj") for part in "qkv"]
    return [name]


def to_transformers(name, value, config):
    """One of our tensors as {name: tensor} in the memory of transformers."""
    public = public_names(name, config, "hf")
    pieces = value.chunk(3) if len(public) == 3 else [value]
    parts = {}
    for part, x in zip(public, pieces, strict=True):
        if config.kind == "emu3" and x.ndim == 4 and re.search(r"(q|k|v|out)_proj", part):
            x = x[:, :, 0, 0]                       # linear layers there, 1 x 1 convolutions here
        if part.endswith("position_embedding.weight"):
            x = x[0]
        parts[part] = x
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------
LAYOUTS = {"emu3": ("emu3", "hf"), "Emu3": ("emu3", "original"), "janus": ("janus", "hf"),
           "multi_modality": ("janus", "original")}                             # kind and layout by model_type
# {our field: field of the json files}; in those with ONLY, {field: the only value that this code supports}.
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
         "context": 2048}                        # transformers' defaults for Llama
RESIZE = {"min_pixels": "min_pixels", "max_pixels": "max_pixels", "min_side": "min_size"}
RESIZE_ONLY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "background_color": [127] * 3, "resample": 3,
               "do_resize": True, "do_rescale": True, "do_normalize": True}
# How pictures are drawn. Public config.json files do not tell, so these come from our presets; `save` writes them.
DRAWING_FIELDS = ("image_size", "guidance", "top_k", "suffix", "negative", "system")
ID_FIELDS = {role: f"{role}_token_id" for role in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}


def taken(section, names, only, origin):
    """{our field: value} of the fields that a section of a json file holds; unsupported values are refused."""
    for key, value in only.items():
        given = section.get(key)
        if given is not None and value not in (given, [given] * 3):             # 127 for [127, 127, 127]
            raise InputError(f"{origin}: {key} {given!r} is not supported, only {value!r}: give another model")
    return {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}


def read_resize(folder):
    """How pictures are resized, if a file of the folder says so. transformers 5 writes another file."""
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            content = read_json(folder / name)
            if part:
                content = content.get(part) or {}
            return taken(content, RESIZE, RESIZE_ONLY, folder / name)
    return {}


def janus_sizes(known):
    """Sizes of SigLIP and of the picture tokenizer, from the shapes of Janus-Pro's original tensors: its config.json
    only names them. (Except for the number of heads, which no shape shows.)"""
    def shape(name):
        if name not in known:
            raise InputError(f"weights lack {name}: download the whole folder again")
        return known[name]().shape

    def count(pattern):
        return len({found[0] for found in map(re.compile(pattern).match, known) if found})
    vit, vq = "vision_model.vision_tower.", "gen_vision_model."
    levels = count(vq + r"encoder\.conv_blocks\.\d+\.")
    blocks = count(vq + r"encoder\.conv_blocks\.0\.res\.\d+\.")
    vq_width = shape(vq + "encoder.conv_in.weight")[0]
    ends = [shape(f"{vq}encoder.conv_blocks.{i}.res.{blocks - 1}.conv2.weight")[0] for i in range(levels)]
    codebook, code_dim = shape(vq + "quantize.embedding.weight")
    vit_width, _, patch, _ = shape(vit + "patch_embed.proj.weight")
    return {"vq_width": vq_width, "vq_mult": [end // vq_width for end in ends], "vq_blocks": blocks,
            "vq_attention": [i for i in range(levels) if count(rf"{vq}encoder\.conv_blocks\.{i}\.attn\.")],
            "vq_latent": shape(vq + "encoder.conv_out.weight")[0], "codebook": codebook, "code_dim": code_dim,
            "vit_width": vit_width, "vit_patch": patch, "vit_layers": count(vit + r"blocks\.\d+\."),
            "vit_ffn": shape(vit + "blocks.0.mlp.fc1.weight")[0],
            "image_size": patch * math.isqrt(shape(vit + "pos_embed")[1])}


def text_sizes(text, values, file):
    """Sizes of the language model, from its section of config.json. values: those of a Config, used where it is
    silent."""
    values = values | {"head_dim": None}            # like transformers, computed from the others if missing
    if values["kind"] == "janus" or "num_key_value_heads" in text:
        values["kv_heads"] = None
    text = text | (text.get("rope_parameters") or {}) | (text.get("rope_scaling") or {})
    values |= taken(text, TEXT_FIELDS, TEXT_ONLY, file)
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["head_dim"] = values["head_dim"] or values["width"] // values["heads"]
    return values


def read_config(folder, known):
    """The json files of a folder -> layout, values of a Config without ids, content of config.json. The sizes that
    Janus-Pro's original leaves out come from known {name: function that reads the tensor}."""
    file = folder / "config.json"
    content = read_json(file)
    refuse_quantised(content, file)
    model_type = content.get("model_type")
    if model_type not in LAYOUTS:
        raise InputError(f"{file}: model_type {model_type!r} is not one of {', '.join(LAYOUTS)}: give another folder")
    kind, layout = LAYOUTS[model_type]
    values = asdict(model.EMU3_8B) if kind == "emu3" else asdict(model.JANUS_PRO_7B) | LLAMA
    section = {"hf": "text_config", "original": "language_config"}[layout]
    text = content if model_type == "Emu3" else content.get(section) or {}
    values = text_sizes(text, values, file)
    if layout == "hf":
        codebook = {"codebook": "codebook_size" if kind == "emu3" else "num_embeddings"}
        values |= taken(content.get("vq_config") or {}, VQ_HF | codebook, VQ_ONLY, file)
    vision = content.get("vision_config") or {}
    if kind == "emu3":
        values["image_size"] = math.isqrt(content.get("image_area") or values["image_size"] ** 2)
    elif layout == "hf":
        values |= taken(vision, VIT, VIT_ONLY, file)
        values["vit_ffn"] = int(values["vit_width"] * (vision.get("mlp_ratio") or 4.0))
        values["vq_attention"] = [len(values["vq_mult"]) - 1]
    else:
        values |= taken(vision.get("params") or {}, {"vit_heads": "heads"}, SIGLIP_L, file)
        values |= janus_sizes(known)
    values |= read_resize(folder)
    values |= content.get("pictures") or {}
    return layout, values, content


def read_ids(folder, content, values):
    """Ids by role, and the tokenizer's file or None. They are read from that file or else from config.json."""
    file = find_tokenizer(folder)
    origin = file or folder / "config.json"
    known = token_ids(file) if file else content.get("vocabulary_map")
    if not known:
        text = content | content.get("text_config", {})
        ids = {role: text[key] for role, key in ID_FIELDS.items() if text.get(key) is not None}
        if content.get("image_token_id") is not None:
            ids["placeholder"] = content["image_token_id"]
        return ids, None
    ids = special_ids(known, values["kind"], origin)
    if values["kind"] == "emu3":
        name = f"<|visual token {values['codebook'] - 1:06d}|>"
        last = ids["visual"] + values["codebook"] - 1
        if known.get(name, last) != last:
            raise InputError(f"{origin}: the ids from code 0 to {name} are not consecutive: download this file again")
    return ids, file


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def empty_model(folder, known, vision_tokenizer, changes):
    """The model that the json files of a folder describe, on the meta device; its layout; whether its embeddings are
    tied; and the stored tensors {name: function that reads it} by the names of that layout."""
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
    # For Janus-Pro, transformers assumes tied embeddings by default, although the public weights are not tied.
    tied = content.get("tie_word_embeddings", (kind, layout) == ("janus", "hf"))
    return m, layout, tied, known


def read_state(m, known, layout, dtype, device):
    """Read, convert and shard the tensors of an empty model one by one, so that no process holds more than one whole
    tensor -> {name: tensor}, and texts about missing, unknown and mis-shaped ones."""
    state = model.fresh_lora(m, device)
    problems = []
    used = set()
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
        state[name] = model.own_part(value.reshape(like.shape).to(device, wanted, copy=True), like)
    return state, problems + [f"{name} is not known" for name in known.keys() - used]


def load_public(path, dtype, device, vision_tokenizer, changes, shard=None):
    """A model from public weights, built without memory and then filled tensor by tensor. Arguments as in `load`."""
    folder = path if path.is_dir() else path.parent
    for file in filter(None, (folder / "config.json", find_tokenizer(folder))):
        refuse_pointer(file)
    known = stored_tensors(path)
    if path.is_file() and not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json: copy the json files of the model that {path.name} was "
                         "trained from into it")
    try:
        m, layout, tied, known = empty_model(folder, known, vision_tokenizer, changes)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{folder / 'config.json'} describes no model that can be built ({first_line(error)}): "
                         "download this file again") from error
    if shard:
        shard(m)
    head, words = (public_names(name, m.config, layout)[0] for name in ("lm_head.weight", "lm.embed_tokens.weight"))
    if tied and head not in known and words in known:
        known[head] = known[words]
    state, problems = read_state(m, known, layout, dtype, device)
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        shown = "; ".join(sorted(problems)[:20] + more)
        raise InputError(f"weights in {path} do not fit its config.json: {shown}")
    m.load_state_dict(state, assign=True)
    return m


def rounded_rope(manifest, home):
    """Whether a run rounded its rotary frequencies: older ones say it in their settings, not in the model's Config."""
    stored = manifest.get("settings")
    if not stored and (home / "settings.json").exists():        # RUN/before has no settings of its own
        stored = read_json(home / "settings.json")
    return (stored or {}).get("rope_bf16", False)


def load(folder, dtype=None, device="cpu", vision_tokenizer=None, rope_bf16=False, attention="auto",
         shard=None, lora_rank=None, fork_layer=0, checkpoint_activations=False):
    """A model in eval mode, from the folder of a run, or from a folder or hub id of public weights in any layout.

    dtype             None: as stored; the picture tokenizer is always float32
    vision_tokenizer  folder of Emu3's picture tokenizer; None: one beside the language model
    rope_bf16         round the rotary frequencies as the published scripts do; False: only if the run was trained so
    shard             shard(m), called while the model is empty, may make its parameters DTensors
    lora_rank         add LoRA to a model without it; None: LoRA only if the run has it
    fork_layer        add UniFork's two branches to a model without them; 0: a fork only if the run has it
    attention, checkpoint_activations: see model.Config
    """
    home = folder = find_folder(folder)
    refuse_adapter(folder)
    changes = {"attention": attention, "checkpoint_activations": checkpoint_activations}
    if rope_bf16:
        changes["rope_bf16"] = True
    if lora_rank:
        changes["lora_rank"] = lora_rank
    if fork_layer:
        changes["fork_layer"] = fork_layer
    if not (folder / "checkpoints").exists() and (folder.is_file() or (folder / "config.json").exists()):
        return load_public(folder, dtype, device, vision_tokenizer, changes, shard).eval()
    if (folder / "manifest.json").exists():         # one checkpoint of a run, RUN/before or RUN/checkpoints/3-0000300
        saved = folder
        manifest = read_manifest(saved)
        home = next((up for up in folder.absolute().parents if find_tokenizer(up)), folder)
    else:
        saved, manifest = newest_checkpoint(folder)
    if lora_rank is not None and manifest["config"].get("lora_rank"):
        raise InputError(f"{folder} was trained with LoRA: write it as a plain model with formats.weights: save("
                         f"load({str(folder)!r}), 'FOLDER'), and start from that FOLDER")
    if fork_layer and manifest["config"].get("fork_layer"):
        raise InputError(f"{folder} is forked already: leave out --fork-layer")
    if rounded_rope(manifest, home):
        changes["rope_bf16"] = True
    return from_manifest(manifest, saved, changes, device, shard, dtype, find_tokenizer(home)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
SHARD_BYTES = 5e9


@torch.no_grad()
def merged(m):
    """The weights of a model, with W + (alpha / R) B A instead of W, A and B if it has LoRA."""
    state = m.state_dict()
    for name in [name for name in state if name.endswith("lora_a")]:
        a = state.pop(name).float()
        b = state.pop(name[:-1] + "b").float()
        key = name.replace("lora_a", "weight")
        state[key] = (state[key].float() + model.LORA_ALPHA / len(a) * (b @ a)).to(state[key].dtype)
    return state


def save_shards(m, folder):
    """Write all weights by their names in transformers -> {file name: content} of their index, if it takes one."""
    shards = [{}]
    size = 0
    for name, value in merged(m).items():
        for part, tensor in to_transformers(name, value, m.config).items():
            if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            if m.config.kind == "emu3":
                part = renamed(part, EMU3_TO_DISK)
            shards[-1][part] = tensor.contiguous()
            size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {"model.safetensors.index": index} if len(shards) > 1 else {}


def emu3_fields(c, ids):
    """What the config.json of transformers holds for Emu3 alone."""
    known = {SPECIAL["emu3"][role]: i for role, i in ids.items()} | {"<image>": ids["placeholder"]}
    known |= {f"<|visual token {code:06d}|>": ids["visual"] + code for code in range(c.codebook)}
    vq = {theirs: getattr(c, ours) for ours, theirs in VQ_HF.items()}
    vq |= {"codebook_size": c.codebook, "hidden_size": c.vq_width * c.vq_mult[-1],
           "temporal_downsample_factor": Emu3VQ.frames}
    return {"architectures": ["Emu3ForConditionalGeneration"], "model_type": "emu3", "vq_config": vq,
            "vocabulary_map": known}


def janus_fields(c):
    """What the config.json of transformers holds for Janus-Pro alone."""
    if set(c.vq_attention) != {len(c.vq_mult) - 1}:
        raise InputError(f"vq_attention {c.vq_attention}: transformers has attention at the last level only")
    vq = {theirs: getattr(c, ours) for ours, theirs in VQ_HF.items() if ours != "vq_attention"}
    vq |= {"num_embeddings": c.codebook, "projection_dim": c.width, "image_token_embed_dim": c.width,
           "num_hidden_layers": 2}
    vision = {theirs: getattr(c, ours) for ours, theirs in VIT.items()}
    vision |= {"mlp_ratio": c.vit_ffn / c.vit_width, "projection_dim": c.width, "depth": 2,
               "num_image_tokens": c.picture_tokens}
    return {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus", "vq_config": vq,
            "vision_config": vision}


def public_files(m):
    """{name: content} of the json files that transformers writes beside the weights."""
    c, ids = m.config, m.ids
    generation = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}
    text = {theirs: getattr(c, ours) for ours, theirs in TEXT_FIELDS.items() if ours != "theta"}
    text |= {**generation, "rope_parameters": {"rope_theta": c.theta, "rope_type": "default"},
             "tie_word_embeddings": False, "model_type": "emu3_text_model" if c.kind == "emu3" else "llama"}
    config = {"image_token_id": ids["placeholder"], "tie_word_embeddings": False, "text_config": text,
              "dtype": str(m.lm_head.weight.dtype).removeprefix("torch."),
              "pictures": {name: getattr(c, name) for name in DRAWING_FIELDS}}
    resize = {name: RESIZE_ONLY[name] for name in ("image_mean", "image_std")}
    if c.kind == "emu3":
        config |= emu3_fields(c, ids)
        resize |= {"image_processor_type": "Emu3ImageProcessor", "min_pixels": c.min_pixels,
                   "max_pixels": c.max_pixels, "spatial_factor": c.factor}
    else:
        config |= janus_fields(c)
        resize |= {"image_processor_type": "JanusImageProcessor", "min_size": c.min_side,
                   "size": {"height": c.image_size, "width": c.image_size}}
        if "boi" in ids:
            generation |= {"generation_kwargs": {"boi_token_id": ids["boi"]}, "guidance_scale": c.guidance}
    return {"config": config, "generation_config": generation, "preprocessor_config": resize}


def digest(m):
    """Checksum of a model's weights, rounded to bfloat16, so that it is the same however they are held: it says which
    weights a number belongs to."""
    total = new_checksum()
    for _, x in sorted(m.state_dict().items()):
        total.update(x.detach().to("cpu", torch.bfloat16).contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def save(m, folder):
    """Save a model in the layout of transformers, for AutoModelForImageTextToText: configuration, safetensors, and the
    files of its tokenizer if known. LoRA is merged. The folder must be new or empty."""
    folder = Path(folder)
    if m.config.fork_layer:
        raise InputError("a forked model has no layout in transformers: keep its run folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: choose another folder to save to")
    described = public_files(m)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder) as part:
        part.mkdir()
        described |= save_shards(m, part)
        tokenizer = Path(m.tokenizer_file) if m.tokenizer_file else None
        if tokenizer and tokenizer.name == "tokenizer.json":
            ends = {f"{role}_token": SPECIAL[m.config.kind][role] for role in ("bos", "eos", "pad")}
            described["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | ends
        for name, content in described.items():
            (part / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZERS + TOKENIZER_NOTES if tokenizer else ():
            if tokenizer.with_name(name).exists():
                shutil.copy(tokenizer.with_name(name), part / name)
