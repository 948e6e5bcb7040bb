"""Claims about folders of weights: what a name stands for, and what is no weights at all (formats/hub.py)."""

import json

import pytest
import torch
from made import SMALL, tiny
from safetensors.torch import load_file, save_file

import formats.weights
from parts.settings import InputError

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


def test_a_hub_id_is_resolved_or_the_download_is_named(janus, tmp_path, monkeypatch):
    """With a local copy it is that folder; without network the one line says what to run."""
    import huggingface_hub
    janus[0].save_pretrained(tmp_path / "copy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(tmp_path / "copy"))
    assert formats.weights.load("someone/some-model").config.layers == 3

    def offline(name):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"^someone/some-model is no folder .*\(no network\): run `hf download"):
        formats.weights.load("someone/some-model")


@pytest.fixture
def public(tmp_path):
    """A folder of weights in transformers' layout."""
    formats.weights.save(tiny("tiny-janus", **SMALL), tmp_path / "public")
    return tmp_path / "public"


def edit(folder, **changes):
    """Change fields of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_git_has_not_fetched_says_how_to_fetch_it(name, public):
    """A clone without Git LFS holds three lines of text in place of each large file."""
    (public / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 4976698672\n")
    with pytest.raises(InputError, match=f"{name} is only a Git LFS pointer to the file: run `git lfs pull` in "):
        formats.weights.load(public)


@pytest.mark.parametrize("changes, named", [
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "{'group_size': 64, 'bits': 4}")])
def test_weights_of_four_or_eight_bits_are_refused_by_name(changes, named, public):
    """Their tensors have other names and shapes, so a list of these would say nothing. Null says they are plain."""
    edit(public, quantization_config=None)
    formats.weights.load(public)
    edit(public, **changes)
    with pytest.raises(InputError) as refused:
        formats.weights.load(public)
    assert f"config.json: the weights are quantised ({named}): give the original weights" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_tensor_of_eight_bits_is_refused(dtype, public):
    """Without its scale it is another matrix, and config.json need not tell."""
    file = public / "model.safetensors"
    state = load_file(file)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].to(dtype)
    save_file(state, file)
    with pytest.raises(InputError, match=f"model.safetensors: {name} is {str(dtype)[6:]}, which is quantised: give "):
        formats.weights.load(public, torch.float32)


@pytest.mark.parametrize("given", [".", "adapter_model.safetensors"])
def test_an_adapter_names_its_model_and_is_to_be_merged(given, tmp_path):
    """It holds no model, whether the folder is given or its file."""
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "deepseek-ai/Janus-Pro-1B"}')
    with pytest.raises(InputError, match="holds an adapter of deepseek-ai/Janus-Pro-1B, .* merge it into that model"):
        formats.weights.load(tmp_path / given)


def test_the_root_of_a_cached_model_stands_for_its_snapshot(public, tmp_path):
    """People copy that folder as a whole. Of several snapshots, one must be chosen."""
    root = tmp_path / "models--someone--some-model"
    (root / "snapshots").mkdir(parents=True)
    with pytest.raises(InputError, match="snapshots is empty: download the model again"):
        formats.weights.load(root)
    public.rename(root / "snapshots/0a1b")
    assert formats.weights.load(root).config.kind == "janus"
    (root / "snapshots/2c3d").mkdir()
    with pytest.raises(InputError, match="holds 2 snapshots: give one of them, such as .*snapshots/2c3d$"):
        formats.weights.load(root)
