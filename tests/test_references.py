"""Claims about reference curves of transformers models, against the maps of tiny random ones (lab/references.py)."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

import aia
import data
from formats.datasets import FileSource
from lab.references import hf_curves, hf_ids, hf_intensity, hf_measure, hf_question
from parts.settings import InputError

hf = pytest.importorskip("transformers")
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IDS = torch.tensor([[7, 9, 4, 6, 6, 6, 6, 5, 9, 10, 11, 8, 12, 13, 14, 2]])     # a picture, a question, an answer of 4
ROLES = torch.where(IDS == 6, data.IMAGE, torch.where(torch.arange(16) > 11, data.ANSWER, data.CONTROL))
LAYERS = {"depth": 2, "num_hidden_layers": 2, "num_heads": 2, "num_attention_heads": 2}        # of a vision tower
QWEN = LAYERS | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 14,
                 "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
VQ = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1,
      "channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32, "hidden_size": 32}
MODELS = {                                                                      # vision config, and the rest
    "Qwen2_5_VL": (QWEN, {"text_config": TEXT | ROPE}), "Qwen3VL": (QWEN, {"text_config": TEXT | ROPE}),
    "InternVL": (LAYERS | {"hidden_size": 16, "intermediate_size": 16, "image_size": [32, 32], "patch_size": [8, 8]},
                 {"text_config": TEXT | {"model_type": "qwen2"}}),
    "Janus": (LAYERS | {"hidden_size": 32, "image_size": 32, "patch_size": 16, "projection_dim": 32, "mlp_ratio": 2.0},
              {"text_config": TEXT | {"model_type": "llama"}, "vq_config": VQ | {"num_hidden_layers": 2}}),
    "Emu3": (None, {"text_config": TEXT, "vq_config": VQ, "vocabulary_map": {"<image>": 6, "<|extra_200|>": 3} | {
        f"<|visual token {c:06d}|>": 40 + c for c in range(8)}}),
    "Llama": (None, TEXT)}


def tiny(kind, attention="eager"):
    """A random model of three layers, and inputs in which ids 6 are the picture."""
    torch.manual_seed(0)
    tower, rest = MODELS[kind]
    vision = {"vision_config": tower, "image_token_id": 6} if tower else {}
    cls = getattr(hf, kind + ("ForConditionalGeneration" if "text_config" in rest else "ForCausalLM"))
    m = cls._from_config(getattr(hf, kind + "Config")(**vision, **rest), attn_implementation=attention).eval()
    for name, weight in m.named_parameters():        # far from even attention
        weight.data *= 20 if "q_proj.weight" in name or "k_proj.weight" in name else 1
    if tower is QWEN:
        return m, {"input_ids": IDS, "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
                   "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (IDS == 6).long()}
    return m, {"input_ids": IDS} | ({"pixel_values": torch.randn(1, 3, 32, 32)} if tower else {})


def run(folder, file, image_ids="", out="c.json", device="cpu"):
    """The command -> its curves, and their file, which aia.targets reads too."""
    done = hf_curves(SimpleNamespace(hf=str(folder), data=str(folder / file) if file else "", image_ids=image_ids,
                                     n=9, out=str(folder / out), dtype="float32", device=str(device)))
    return json.loads(Path(done["out"]).read_text()), done["out"]


@pytest.mark.parametrize("kind", MODELS)
def test_intensities_are_those_of_the_maps_that_transformers_returns(kind, device):
    """Eq. 1 written out on output_attentions, of the language layers alone. When a layer hands out its map, those of
    the layers before it are gone."""
    (m, inputs), (condition, queries), maps, alive = tiny(kind), data.spans(ROLES, "und"), [], []

    def look(module, args, output):
        alive.append(sum(ref() is not None for ref in maps))
        maps.append(weakref.ref(output[1]))
    attention = [layer.self_attn for layer in m.get_decoder().layers]
    for part in attention:
        part.register_forward_hook(look)
    got = hf_intensity(m.to(device), inputs, condition, queries)
    assert alive == [0, 0, 0] and [len(part._forward_hooks) for part in attention] == [1, 1, 1]
    with torch.no_grad():
        inputs = {key: x.to(device) for key, x in inputs.items()}
        found = m(**inputs, output_attentions=True).attentions                  # 3 times (1, H, T, T)
    rows = [part.cpu()[0][:, queries[0]] for part in found]                     # (H, Q, T)
    expected = [[row[..., condition[0]].sum(-1).mean(), row[..., 0].mean()] for row in rows]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=0)
    assert len(rows) == 3 and got[:, 0].std() > 1e-3


def test_a_question_is_the_models_own_prompt_then_answer_and_end_of_text(tmp_path):
    """A Janus with its processor and 15 words. First turn alone, the picture where it is marked; queries predict "red",
    "cat" and the end; other numbers per token (kinds) go on with 0, text. Without drawings their targets stay."""
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
    words = "<pad> <s> </s> <unk> <boi> <eoi> <image> user model what is it a red cat".split()
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(words, range(15), strict=True)), unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok = hf.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", extra_special_tokens={
        "image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    template = "{% for x in messages[0].content %}{{ '<image>' if x.type == 'image' else x.text }} {% endfor %}model"
    shrink = JanusImageProcessorPil(size={"height": 32, "width": 32}, min_size=4)
    hf.JanusProcessor(shrink, tok, template, num_image_tokens=4).save_pretrained(tmp_path)
    tiny("Janus")[0].save_pretrained(tmp_path)
    Image.new("RGB", (20, 16), "red").save(tmp_path / "a.png")
    said = [{"from": who, "value": text} for who, text in zip(
        ("human", "gpt", "human", "gpt"), ("what is <image> it", "a red cat", "what", "it"), strict=True)]
    line = json.dumps({"image": "a.png", "conversations": said})
    (tmp_path / "train.jsonl").write_text(line + "\n" + line.replace("red", "it"))
    (found, table), processor = run(tmp_path, "train.jsonl"), hf.AutoProcessor.from_pretrained(tmp_path)
    assert found.keys() == {"und", "stages"} and found["und"]["samples"] == 2 and len(found["und"]["std"]) == 3
    assert all(map(torch.equal, aia.targets(32, "gen", table), aia.targets(32, "gen")))
    stub = SimpleNamespace(tokenizer=processor.tokenizer, apply_chat_template=lambda *args, **how: {
        **(x := processor.apply_chat_template(*args, **how)), "kinds": torch.ones_like(x["input_ids"])})
    record = FileSource(tmp_path / "train.jsonl", "janus").record("und", 0)
    inputs, roles = hf_question(SimpleNamespace(image_token_id=6), stub, record)
    assert inputs["input_ids"].tolist() == [[9, 10, 4, 6, 6, 6, 6, 5, 11, 8, 12, 13, 14, 2]]
    assert inputs["attention_mask"].all() and inputs["kinds"].tolist() == [[1] * 10 + [0] * 4]
    where = [part[0].nonzero()[:, 0].tolist() for part in data.spans(roles, "und")]
    assert where == [[3, 4, 5, 6], [10, 11, 12]]


def test_token_ids_are_measured_by_the_rule_of_both_tasks(tmp_path, device):
    """Codes are 40..47, 3 is a row end. With queries of weight 0 attention is even: each layer has its keys' share."""
    m = tiny("Llama")[0]
    for layer in m.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    m.save_pretrained(tmp_path)
    und = {"ids": [1, 41, 42, 5, 9, 12, 13, 2], "task": "und"}
    lines = [{"ids": [1, 9, 4, 40, 47, 3, 41, 42, 5], "task": "gen"}, und, und | {"answer": 5}]
    (tmp_path / "ids.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found, table = run(tmp_path, "ids.jsonl", "40:47", "c.png", device)
    shares = {"gen": [(3 / 4 + 3 / 7) / 2], "und": [(2 / 4 + 2 / 5 + 2 / 6 + 2 / 7) / 4, (2 / 6 + 2 / 7) / 2]}
    for task, share in shares.items():
        assert found[task]["intensity"] == pytest.approx([np.mean(share)] * 3, abs=1e-6)
        assert found[task]["std"] == pytest.approx([np.std(share)] * 3, abs=1e-6)
        assert found[task]["uniform"] == pytest.approx(np.mean(share)) and found[task]["samples"] == len(share)
        assert aia.targets(3, task, table)[0].tolist() == pytest.approx([round(np.mean(share) * 20) / 20] * 3)
    assert found["gen"]["sink"] == pytest.approx([(1 / 4 + 1 / 7) / 2] * 3)
    assert hf_measure(m, hf_ids(tmp_path / "ids.jsonl", range(40, 48), 64), 1)["und"]["samples"] == 1


@pytest.mark.parametrize("ids, rest, why", [
    ([1, 40, 41], {"task": "draw"}, "give"), ([1, 64], {}, "below 64"), ([1, "40"], {}, "give"), ([], {}, "give"),
    (None, {}, "give"), ([1, 40, 41, 9, 2], {"task": "und", "answer": 2}, "after codes"), ([40, 41], {}, "nothing"),
    ([1, 40, 3, 41], {}, "nothing"), ([1, 9, 2], {"task": "und"}, "nothing")])
def test_a_bad_line_is_named(ids, rest, why, tmp_path):
    """File and line stand in front, and the remedy behind."""
    good = {"ids": [1, 40, 41], "task": "gen"}
    (tmp_path / "ids.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {"ids": ids} | rest))
    with pytest.raises(InputError, match=f"ids.jsonl line 2: .*{why}"):
        hf_measure(tiny("Llama")[0], hf_ids(tmp_path / "ids.jsonl", range(40, 48), 64), 9)


def test_models_and_flags_that_do_not_fit_are_refused_in_one_line(tmp_path):
    """No map at all, none in one layer (convolution), no model, no processor, no data, no range of codes."""
    hybrid = hf.Lfm2Config(**TEXT, layer_types=["full_attention", "full_attention", "conv"])
    hybrid, spans = hf.Lfm2ForCausalLM._from_config(hybrid, attn_implementation="eager"), data.spans(ROLES, "und")
    tiny("Llama")[0].save_pretrained(tmp_path)
    for call, why in ((lambda: hf_intensity(*tiny("Llama", "sdpa"), *spans), r"3 of 3 .* choose"),
                      (lambda: hf_intensity(hybrid, {"input_ids": IDS}, *spans), "1 of 3 .*first: 2"),
                      *((lambda args=args: run(*args), "give|check or replace") for args in (
                          (tmp_path / "none", "a"), (tmp_path, "a"), (tmp_path, ""), (tmp_path, "a", "9:8"),
                          (tmp_path, "a", "9"), (tmp_path, "a", "40:47")))):
        with pytest.raises(InputError, match=why) as error:
            call()
        assert "\n" not in str(error.value)
