"""Claims about reference curves of transformers models, against the maps of tiny random ones (lab/references.py)."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from made_hf import IDS, MODELS, ROLES, TEXT, hf, tiny
from PIL import Image

import aia
import data
from formats.datasets import FileSource
from lab.references import hf_curves, hf_ids, hf_intensity, hf_measure, hf_question
from parts.settings import InputError


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
