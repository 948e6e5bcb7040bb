"""Claims about public weights: names, loading, saving, refusals (formats/weights.py)."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from made import NAMES, SMALL, close, tiny
from safetensors.torch import load_file, save_file

import formats.weights
import model
from formats.checkpoints import save_checkpoint, tensors_of
from formats.weights import (
    EMU3_FROM_DISK,
    EMU3_TO_DISK,
    ID_FIELDS,
    TEXT_FIELDS,
    VQ_ORIGINAL,
    public_files,
    public_names,
    renamed,
    to_transformers,
)
from parts.settings import InputError

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_begins_from_public_weights(name, tmp_path):
    """Both branches read the same tensors; a forked model has no place in transformers' layout."""
    m = tiny(name, **SMALL)
    formats.weights.save(m, tmp_path / "public")
    f = formats.weights.load(tmp_path / "public", fork_layer=1)
    theirs, mine = m.lm.layers[1].state_dict(), f.lm.gen_layers[0].state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert torch.equal(f.lm.gen_norm.weight, m.lm.norm.weight)
    with pytest.raises(InputError, match="run folder"):
        formats.weights.save(f, tmp_path / "forked")


@pytest.mark.parametrize("preset, architecture, original, transformers", [
    ("emu3-8b", "Emu3ForConditionalGeneration", 786, 786), ("janus-pro-1b", "JanusForConditionalGeneration", 868, 964),
    ("janus-pro-7b", "JanusForConditionalGeneration", 922, 1018)])
def test_names_are_an_exact_round_trip_over_all_keys_of_full_size_models(preset, architecture, original, transformers):
    """Ours to transformers, whose own model has just these tensors, and back; ours to the authors' names and back
    (without the 14 tensors of Janus-Pro that nobody uses)."""
    hf = pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = model.build(preset)
        content = public_files(ours)["config"]
        theirs = getattr(hf, architecture)(getattr(hf, architecture.replace("ForConditionalGeneration", "Config"))(
            **{key: value for key, value in content.items() if key not in ("architectures", "model_type")}))
    state, public = ours.state_dict(), {}
    for name, value in state.items():
        public |= to_transformers(name, value, ours.config)
    assert {name: x.shape for name, x in public.items()} == {name: x.shape for name, x in theirs.state_dict().items()}
    assert len(public) == transformers
    on_disk = {renamed(name, EMU3_TO_DISK): x for name, x in public.items()}
    for layout, stored in [("hf", {renamed(name, EMU3_FROM_DISK): x for name, x in on_disk.items()}),
                           ("original", {public_names(name, ours.config, "original")[0]: value
                                         for name, value in state.items()})]:
        for name, value in state.items():
            parts = [stored.pop(part) for part in public_names(name, ours.config, layout)]
            assert (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(value.shape).shape == value.shape
        assert not stored
    names = [part for name in state for part in public_names(name, ours.config, "original")]
    assert len(set(names)) == len(names) == original


ORIGINAL_NAMES = {
    "lm.layers.11.self_attn.q_proj.weight": ("model.layers.11.self_attn.q_proj.weight",
                                             "language_model.model.layers.11.self_attn.q_proj.weight"),
    "lm_head.weight": ("lm_head.weight", "language_model.lm_head.weight"),
    "vq.quantize.weight": ("quantize.embedding.weight", "gen_vision_model.quantize.embedding.weight"),
    "vq.encoder.down.1.block.0.nin_shortcut.weight": ("encoder.down.1.block.0.nin_shortcut.weight", None),
    "vq.encoder.down.3.attn.1.proj_out.bias": ("encoder.down.3.attn.1.proj_out.bias", None),
    "vq.encoder.downsample.2.weight": ("encoder.down.2.downsample.conv.weight",
                                       "gen_vision_model.encoder.conv_blocks.2.downsample.conv.weight"),
    "vq.encoder_time_conv.1.conv.bias": ("encoder.time_conv.1.conv.conv.bias", None),
    "vq.encoder_time_blocks.1.conv2.conv.weight": ("encoder.time_res_stack.1.conv2.conv.weight", None),
    "vq.decoder.up.0.block.2.conv1.weight": ("decoder.up.3.block.2.conv1.weight",
                                             "gen_vision_model.decoder.conv_blocks.0.res.2.conv1.weight"),
    "vq.decoder.upsample.0.weight": ("decoder.up.3.upsample.conv.weight",
                                     "gen_vision_model.decoder.conv_blocks.0.upsample.conv.weight"),
    "vq.decoder.mid.attn_1.q.weight": ("decoder.mid.attn_1.q.weight", "gen_vision_model.decoder.mid.1.q.weight"),
    "vq.quant_conv.conv.weight": ("quant_conv.conv.weight", None),
    "vision.pos_embed": (None, "vision_model.vision_tower.pos_embed"),
    "vision.patch_embed.weight": (None, "vision_model.vision_tower.patch_embed.proj.weight"),
    "vision.blocks.23.qkv.bias": (None, "vision_model.vision_tower.blocks.23.attn.qkv.bias"),
    "vision.blocks.10.proj.weight": (None, "vision_model.vision_tower.blocks.10.attn.proj.weight"),
    "vision.blocks.10.fc1.weight": (None, "vision_model.vision_tower.blocks.10.mlp.fc1.weight"),
    "vision.blocks.10.norm2.bias": (None, "vision_model.vision_tower.blocks.10.norm2.bias"),
    "aligner.2.weight": (None, "aligner.layers.2.weight"),
    "gen_aligner.0.bias": (None, "gen_aligner.layers.0.bias"),
    "gen_head.0.weight": (None, "gen_head.output_mlp_projector.weight"),
    "gen_head.2.weight": (None, "gen_head.vision_head.weight"),
    "gen_embed.weight": (None, "gen_embed.weight"),
}


@pytest.mark.parametrize("ours", ORIGINAL_NAMES)
def test_original_names_are_those_of_the_released_files(ours):
    """One of each kind, written down by hand from the published lists of keys."""
    for config, expected in zip((model.EMU3_8B, model.JANUS_PRO_7B), ORIGINAL_NAMES[ours], strict=True):
        assert expected is None or public_names(ours, config, "original") == [expected]


def test_transformers_folders_load_with_equal_weights(pair, tmp_path, device):
    """What transformers saves, read by name from config.json and the file; no number of it is that of the recipe."""
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    m = formats.weights.load(tmp_path, device=device)
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in m.state_dict().items())
    same = {f.name for f in fields(model.Config)} - {"ids", "context", "image_size", "init_std", "embed_std"}
    assert {name: getattr(m.config, name) for name in same} == {name: getattr(ours.config, name) for name in same}
    assert m.ids["placeholder"] == ours.ids["placeholder"] and m.ids["pad"] == ours.ids["pad"]


def original_folder(m, folder, suffix):
    """The model in original names and files: one folder for Janus-Pro, two side by side for Emu3."""
    c, folder = m.config, folder / "language"
    state = {public_names(name, c, "original")[0]: value for name, value in m.state_dict().items()}
    text = {theirs: getattr(c, ours) for ours, theirs in TEXT_FIELDS.items()}
    if c.kind == "emu3":
        parts = {folder: {name: value for name, value in state.items() if name.startswith(("model.", "lm_head."))}}
        parts[folder.parent / "vision"] = {name: value for name, value in state.items() if name not in parts[folder]}
        ids = {theirs: m.ids[role] for role, theirs in ID_FIELDS.items()}
        vq = {theirs: getattr(c, ours) for ours, theirs in VQ_ORIGINAL.items()}
        configs = {folder: text | ids | {"model_type": "Emu3"},
                   folder.parent / "vision": vq | {"model_type": "Emu3VisionVQ"}}
    else:
        state |= {"vision_model.vision_tower.attn_pool.q.weight": torch.ones(2),
                  "gen_vision_model.quantize.codebook_used": torch.ones(3)}
        config = {"model_type": "multi_modality", "language_config": text,
                  "vision_config": {"params": {"model_name": "siglip_large_patch16_384", "heads": c.vit_heads}}}
        parts, configs = {folder: state}, {folder: config}
    for place, tensors in parts.items():
        place.mkdir()
        (place / "config.json").write_text(json.dumps(configs[place]))
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        if suffix == "safetensors":
            save_file(tensors, place / "model.safetensors")
        elif suffix == "bin":                        # in two shards with an index
            names = list(tensors)
            halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            for file, half in halves.items():
                torch.save({name: tensors[name] for name in half}, place / file)
            weight_map = {name: file for file, half in halves.items() for name in half}
            (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            torch.save(tensors, place / "iter_7.pth")
    return folder


OTHER = {"layers": 2, "width": 32, "ffn": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 97, "context": 77,
         "vq_width": 32}


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth"])
@pytest.mark.parametrize("kind", ["emu3", "janus"])
def test_original_folders_load_with_equal_weights(kind, suffix, tmp_path):
    """Both models in the authors' own names, in each way such files are stored. What Janus-Pro's original config.json
    keeps silent about is read off the tensors."""
    if kind == "emu3":
        ids = dict(zip(("pad", "bos", "eos", "eol", "eof", "img", "boi", "eoi"), range(8), strict=True))
        config = replace(model.EMU3_8B, **OTHER, codebook=48, vq_mult=(1, 2), vq_blocks=1, vq_attention=(1,), ids=ids)
    else:
        config = replace(model.JANUS_PRO_7B, **OTHER, codebook=48, code_dim=6, vq_latent=40, vq_mult=(1, 2),
                         vq_blocks=1, vq_attention=(1,), image_size=24, vit_width=64, vit_layers=2, vit_heads=4,
                         vit_ffn=80, vit_patch=8, ids={})
    torch.manual_seed(0)
    ours = model.from_config(config)
    folder = original_folder(ours, tmp_path, suffix)
    m = formats.weights.load(folder / "iter_7.pth" if suffix == "pth" and kind == "janus" else folder)
    assert all(torch.equal(value, m.state_dict()[name]) for name, value in ours.state_dict().items())
    assert replace(m.config, ids=config.ids) == config


def edited(folder, file="config.json", **changes):
    """Change a json file: section__field=value; the section __ is the file itself."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        (content[section] if section else content)[key] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("changes", [
    {"text_config__rope_scaling": {"rope_type": "default"}}, {"text_config__rope_scaling": {"type": "default"}},
    {"text_config__hidden_act": None}, {"__image_area": None}, {"__pictures": None}])
def test_settings_that_say_nothing_new_are_read(changes, emu3, tmp_path):
    """Older converters write defaults and nulls where newer ones write nothing."""
    emu3[0].save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    assert formats.weights.load(tmp_path).config.theta == emu3[1].config.theta


@pytest.mark.parametrize("changes, message", [
    ({"text_config__rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json: rope_type 'linear' is not"),
    ({"__vq_config": None}, "do not fit its config.json"),
    ({"vq_config__base_channels": 33}, "no model that can be built"),
    ({"text_config__num_hidden_layers": "three"}, "no model that can be built"),
    ({"vq_config__temporal_downsample_factor": 2}, "temporal_downsample_factor 2 is not supported, only 4")])
def test_settings_that_cannot_be_honoured_are_one_clear_line(changes, message, emu3, tmp_path):
    """Never a traceback, never a model that differs from what was asked for."""
    emu3[0].save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        formats.weights.load(tmp_path)


def test_picture_settings_of_a_newer_transformers_are_read(emu3, tmp_path):
    """Its processors write them into another file."""
    emu3[0].save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"min_pixels": 64}}))
    assert formats.weights.load(tmp_path).config.min_pixels == 64
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_std": [0.2, 0.2, 0.2]}}))
    with pytest.raises(InputError, match="processor_config.json: image_std"):
        formats.weights.load(tmp_path)


def test_neighbours_of_emu3_do_not_disturb(tmp_path):
    """The picture tokenizer is found beside the language model, whatever else lies there."""
    ids = dict(zip(("pad", "bos", "eos", "eol", "eof", "img", "boi", "eoi"), range(8), strict=True))
    config = replace(model.EMU3_8B, **OTHER, codebook=48, vq_mult=(1, 2), vq_blocks=1, vq_attention=(1,), ids=ids)
    folder = original_folder(model.from_config(config), tmp_path, "safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text("not json")
    assert formats.weights.load(folder).config.codebook == 48
    (tmp_path / "vision/config.json").unlink()
    with pytest.raises(InputError, match="holds the language model alone: give --vision-tokenizer"):
        formats.weights.load(folder)


def test_a_fine_tuned_file_alone_says_what_belongs_beside_it(tmp_path):
    """Such files hold tensors only; and of several, one must be chosen."""
    for name in ("iter_1.pth", "iter_2.pth"):
        torch.save({"lm_head.weight": torch.ones(1)}, tmp_path / name)
    with pytest.raises(InputError, match="holds no config.json: copy the json files of the model that iter_1.pth"):
        formats.weights.load(tmp_path / "iter_1.pth")
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    with pytest.raises(InputError, match="holds 2 checkpoints: give one of them"):
        formats.weights.load(tmp_path)


def test_a_folder_that_does_not_fit_is_refused_with_all_that_is_wrong(janus, tmp_path):
    """Missing, unknown and misshaped tensors in one message, and a setting that the code cannot honour by name."""
    janus[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.extra"] = torch.ones(1)
    del state["lm_head.weight"]
    state["model.aligner.fc1.bias"] = torch.ones(7)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head.weight is missing; model.aligner.fc1.bias is \(7,\), not \(64,\); "
                                         "model.extra is not known"):
        formats.weights.load(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="config.json: hidden_act 'relu'"):
        formats.weights.load(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    content["text_config"]["hidden_act"] = "silu"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        formats.weights.load(tmp_path)


def test_a_transformers_model_is_written_back_as_it_was(pair, tmp_path, device):
    """Every tensor and every size, whatever the configuration; the codes and sizes of pictures too."""
    theirs, ours = pair
    formats.weights.save(ours, tmp_path / "out")
    import transformers
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").to(device)
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert again.config.text_config.num_key_value_heads == ours.config.kv_heads
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 3
    assert replace(formats.weights.load(tmp_path / "out").config, ids=ours.config.ids) == ours.config


@pytest.mark.parametrize("where", ["config", "settings", "settings.json"])
def test_a_run_with_rounded_rotations_keeps_them(where, tmp_path):
    """Its weights learned with them. Older runs say so in their settings; RUN/before only in those of its run."""
    m = tiny("tiny-emu3", **SMALL)
    manifest = {"config": asdict(m.config), "dtype": "float32", "settings": {}}
    if where == "settings.json":
        (tmp_path / where).write_text('{"rope_bf16": true}')
    else:
        manifest[where]["rope_bf16"] = True
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("before", "checkpoints/0-0000000"):
        save_checkpoint(tensors_of(m), manifest, tmp_path / name).result()
        assert formats.weights.load(tmp_path / name).config.rope_bf16
    assert formats.weights.load(tmp_path).config.rope_bf16


def test_tied_embeddings_are_honoured(janus, tmp_path):
    """A file without lm_head.weight is complete if config.json ties it to the word embeddings, and only then."""
    janus[0].save_pretrained(tmp_path)
    state, content = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    silent = {key: value for key, value in content.items() if key != "tie_word_embeddings"}
    for tied in (True, None, False):                 # silence means yes to transformers
        told = silent if tied is None else silent | {"tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(told))
        if tied is not False:
            m = formats.weights.load(tmp_path)
            assert torch.equal(m.lm_head.weight, m.lm.embed_tokens.weight)
        else:
            with pytest.raises(InputError, match="lm_head.weight is missing"):
                formats.weights.load(tmp_path)


def test_the_preprocessor_file_is_read_and_what_it_asks_is_done_or_refused(emu3, tmp_path):
    """Sizes come from it; another normalisation than (x - 0.5) / 0.5 would silently spoil every picture."""
    emu3[0].save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"min_pixels": 4096, "max_pixels": 8192, "image_mean": [0.5, 0.5, 0.5]}))
    m = formats.weights.load(tmp_path)
    assert (m.config.min_pixels, m.config.max_pixels) == (4096, 8192)
    file.write_text(json.dumps({"image_mean": [0.48, 0.46, 0.41]}))
    with pytest.raises(InputError, match=r"preprocessor_config.json: image_mean \[0.48"):
        formats.weights.load(tmp_path)


@pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus"])
def test_saved_models_open_in_transformers_with_equal_logits(name, tmp_path, monkeypatch, device):
    """A model of the laptop run, in several shards, read by transformers and by us; a folder in use is left alone."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    m = model.build(name).to(device)
    monkeypatch.setattr(formats.weights, "SHARD_BYTES", 1e6)
    formats.weights.save(m, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and not (tmp_path / "out.part").exists()
    theirs = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").to(device)
    ids = torch.randint(5, 400, (2, 12)).to(device)
    with torch.no_grad():
        close(m.logits(ids), theirs(input_ids=ids).logits)
    again = formats.weights.load(tmp_path / "out", device=device)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in m.state_dict().items())
    fresh = {"init_std": m.config.init_std, "embed_std": m.config.embed_std, "ids": m.config.ids}
    assert replace(again.config, **fresh) == m.config
    half = formats.weights.load(tmp_path / "out", dtype=torch.bfloat16, device=device)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(value, half.vq.state_dict()[key]) for key, value in m.vq.state_dict().items())
    with pytest.raises(InputError, match="not empty"):
        formats.weights.save(m, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_holds_the_model_once(suffix, tmp_path):
    """Peak anonymous memory stays below 1.1 times the model in the target type plus the largest stored tensor."""
    torch.manual_seed(0)
    m = model.build("tiny-janus", width=768, ffn=3072, layers=8, heads=12, kv_heads=12, head_dim=64)
    formats.weights.save(m, tmp_path / "big")
    if suffix == "bin":
        file = tmp_path / "big/model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    script = """
import threading, torch, formats.weights
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
formats.weights.load(%r)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
m = formats.weights.load(%r, dtype=torch.bfloat16)
done.set(); thread.join()
print(peak - before, sum(x.nbytes for x in m.state_dict().values()))
"""
    small = tmp_path / "small"
    formats.weights.save(model.build("tiny-janus"), small)     # imports and allocators warm up before it counts
    done = subprocess.run([sys.executable, "-c", script % (str(small), str(tmp_path / "big"))], capture_output=True,
                          text=True, cwd=Path(model.__file__).parent, check=True)
    peak, size = map(int, done.stdout.split())
    largest = max(value.nbytes for value in m.state_dict().values())
    assert 0.5 * size < peak <= 1.1 * size + largest
