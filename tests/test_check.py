"""Claims about the check of real weights: each line passes or fails for the right reason (lab/check.py)."""

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from made import NAMES, tiny
from PIL import Image

import eval as evaluation
import formats.weights
import model
from lab import check
from lab.check import Check, Subject
from parts.settings import run_command

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
kinds = pytest.mark.parametrize("kind", ["emu3", "janus"])
TEMPLATE = {
    "janus": "{% for message in messages %}<|User|>: {% for part in message['content'] %}{% if part['type'] == 'image' "
             "%}<image_placeholder>{{ '\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n\\n' }}"
             "{% endfor %}<|Assistant|>:",
    "emu3": "{{ bos_token }}You are a helpful assistant. USER: {% for part in messages[0]['content'] %}"
            "{{ part['text'] or '<|extra_0|>' }}{% endfor %}. ASSISTANT:"}


@pytest.fixture(scope="module")
def folders(both_texts, tmp_path_factory):
    """{kind: folder} of random weights in transformers' layout, with a tokenizer."""
    made = {}
    for name, (kind, text) in zip(NAMES, both_texts.items(), strict=True):
        made[kind] = tmp_path_factory.mktemp("weights") / kind
        (made[kind].parent / "tokenizer.json").write_bytes(text.file.read_bytes())
        m = tiny(name, tokenizer_file=made[kind].parent / "tokenizer.json")
        formats.weights.save(m, made[kind])
    return made


@pytest.fixture
def subject(folders, tmp_path):
    """subject(kind) -> what checks share, whose folder has json files only."""
    def make(kind):
        s = Subject(Check(folder=str(folders[kind]), device="cpu", out=str(tmp_path / "out")))
        s.folder = tmp_path
        for file in folders[kind].glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return s
    return make


def edit(s, name, **changes):
    """Change fields of a json file beside the weights."""
    (s.folder / name).write_text(json.dumps(s.file(name) | changes))


def verdicts(rows):
    return [one["verdict"] for one in rows]


@kinds
def test_one_command_reports_on_a_folder(kind, folders, tmp_path, capsys):
    """Random weights read right, see nothing and keep no picture: just these two lines fail. The file has it all."""
    pytest.importorskip("transformers")
    check.main([str(folders[kind]), "--device", "cpu", "--out", str(tmp_path / "out")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result "))
    assert result["failed"] == ["reconstruction", "caption loss"]
    assert result["skipped"] == ["chat template", "picture tokens"]
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert report["config"]["kind"] == kind and report["versions"]["safetensors"] and report["machine"]["torch"]
    parity = [one for one in report["rows"] if one["check"].startswith("parity")]
    assert set(verdicts(parity)) == {"ok"} and len(parity) == {"emu3": 1, "janus": 2}[kind]
    curves = [one for one in report["rows"] if one["check"].startswith("curve of")]
    assert [len(one["here"]) == len(one["paper"]) == 4 for one in curves] == [True, True]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"check.json", "drawing.png", "reconstruction.png"}


def test_a_check_that_cannot_run_stops_no_other(folders, tmp_path, monkeypatch, capsys):
    """The first owner's run must count: the file tells of the error, and the exit status is 2."""
    monkeypatch.setattr(evaluation, "answer", lambda *args: 1 / 0)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: check.main([str(folders["emu3"]), "--device", "cpu", "--no-parity", "--out",
                                        str(tmp_path)]))
    assert end.value.code == 2
    assert "error: checks that could not run: answer: send in" in capsys.readouterr().err
    rows = {one["check"]: one for one in json.loads((tmp_path / "check.json").read_text())["rows"]}
    assert "1 / 0" in rows["answer"]["traceback"] and rows["drawing"]["verdict"] == "look"


def test_a_tokenizer_that_loses_text_fails(subject):
    """Spaces at line starts are what careless decoders drop."""
    s = subject("janus")
    assert verdicts(check.round_trip(s)) == ["ok"]
    decode = s.text.decode
    s.text.decode = lambda ids: decode(ids).replace("\n  ", "\n")
    assert verdicts(check.round_trip(s)) == ["FAIL"]


@kinds
@pytest.mark.parametrize("file, field", [("config.json", "eos_token_id"), ("generation_config.json", "pad_token_id")])
def test_a_shifted_special_id_fails_by_name(kind, file, field, subject):
    """Ids come from the tokenizer; a file that says otherwise belongs to another one. A list may hold more of them."""
    s = subject(kind)
    role = field[:3]
    edit(s, file, **{field: [s.text.ids[role], 3]})
    assert verdicts(check.special_ids_agree(s)) == ["ok"]
    edit(s, file, **{field: s.text.ids[role] + 1})
    [one] = check.special_ids_agree(s)
    assert one["verdict"] == "FAIL"
    assert one["measured"] == f"{file}: {role} {s.text.ids[role] + 1}, not {s.text.ids[role]}"


def test_codes_beyond_the_vocabulary_fail(subject):
    """The last picture code of Emu3 must be a row of the embedding."""
    s = subject("emu3")
    s.config = replace(s.config, vocab=s.config.vocab - 1)
    [one] = check.special_ids_agree(s)
    assert one["verdict"] == "FAIL" and "beyond the vocabulary" in one["measured"]


@kinds
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_is_compared_by_tokens(kind, file, subject):
    """Wherever it lies. One that differs fails for Janus-Pro; for Emu3 it is not the authors' own."""
    pytest.importorskip("jinja2")
    s = subject(kind)
    for template, expected in ((TEMPLATE[kind], "ok"),
                               (TEMPLATE[kind].lower(), {"emu3": "look", "janus": "FAIL"}[kind])):
        if file.endswith("jinja"):
            (s.folder / file).write_text(template)
        else:
            edit(s, file, chat_template=[{"name": "default", "template": template}])
        assert verdicts(check.chat_template(s)) == [expected]


def test_a_chat_template_that_cannot_be_compared_says_why(subject, monkeypatch):
    """None is there, jinja2 is missing, or it fails: no verdict on this code."""
    pytest.importorskip("jinja2")
    s = subject("janus")
    assert verdicts(check.chat_template(s)) == ["skipped"]
    edit(s, "chat_template.json", chat_template="{{ messages[9]['content'] + 1 }}")
    [one] = check.chat_template(s)
    assert one["verdict"] == "look" and one["measured"].startswith("it cannot be rendered: ")
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    [one] = check.chat_template(s)
    assert one["verdict"] == "skipped" and one["measured"] == "pip install jinja2"


def test_placeholders_are_as_many_as_the_processor_says(subject):
    """One too few would shift the picture by a patch."""
    s = subject("janus")
    for stated, expected in ((s.config.picture_tokens, "ok"), (s.config.picture_tokens + 1, "FAIL")):
        edit(s, "processor_config.json", num_image_tokens=stated)
        assert verdicts(check.picture_tokens(s)) == [expected]


@kinds
def test_reconstruction_needs_more_than_the_mean_colour(kind, subject):
    """A tokenizer passes from 4 dB above that on: its error is 63 % as large. One of a tenth of the range has 20 dB."""
    s = subject(kind)
    s.m.encode_images = lambda pixels: pixels
    for error, expected in ((0.0, "ok"), (0.62, "ok"), (0.64, "FAIL"), (1.0, "FAIL")):
        s.m.decode_images = lambda pixels, error=error: pixels.lerp(pixels.mean((2, 3), keepdim=True), error)
        assert verdicts(check.reconstruction(s)) == [expected]
    assert check.decibels(torch.zeros(3), torch.full((3,), 0.2)) == pytest.approx(20)


@kinds
def test_a_drawing_takes_no_longer_than_it_must(kind, subject, monkeypatch):
    """Emu3 draws a part as large as told in place of 90 x 90 codes; Janus-Pro has one size only."""
    monkeypatch.setattr(check, "DRAWN_SIDE", 2)
    s = subject(kind)
    assert verdicts(check.drawing(s)) == ["look"]
    assert Image.open(s.out / "drawing.png").size == {"emu3": (8, 8), "janus": (16, 16)}[kind]


@pytest.mark.parametrize("other, expected", [(1.05, "FAIL"), (1.5, "ok"), (0.5, "FAIL")])
def test_the_caption_of_the_other_picture_must_be_unlikelier(other, expected, subject, monkeypatch):
    """By more than chance. Pairs that belong together are the first and the last of four, and alone make the curves."""
    s = subject("emu3")
    losses = iter([1.0, other, other, 1.0] * 2)
    layers = iter([1.0, 7.0, 7.0, 2.0] * 2)

    def forward(batch):
        return model.Output(torch.tensor(next(losses) * len(batch.targets)), len(batch.targets),
                            torch.full((1, 4), next(layers)))
    monkeypatch.setattr(s.m, "forward", forward)
    rows = check.losses(s)
    assert verdicts(rows) == [expected, "look"]
    np.testing.assert_allclose(s.intensity["und"], [1.5] * 4)


def swapped_norms(m):
    layer = m.lm.layers[1]
    layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def transposed_projection(m):
    weight = m.lm.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.T.contiguous()


def shuffled_queries(m):
    """Pairs that turn together, side by side instead of half a head apart."""
    weight = m.lm.layers[1].self_attn.q_proj.weight
    pairs = weight.data.view(m.config.heads, 2, -1, m.config.width)
    weight.data = pairs.transpose(1, 2).reshape(weight.shape)


def other_theta(m):
    m.lm.config = replace(m.config, theta=1e6)


def slightly_larger_logits(m):
    """By a hundredth: in half precision that is rounding, in float32 it is not."""
    m.lm_head.weight.data *= 1.01


@kinds
@pytest.mark.parametrize("fault", [swapped_norms, transposed_projection, shuffled_queries, other_theta,
                                   slightly_larger_logits])
def test_a_wrong_reading_of_the_weights_fails_against_transformers(fault, kind, folders, subject):
    """No shape and no name shows these faults. They are made in our model; the folder stays right."""
    pytest.importorskip("transformers")
    s = subject(kind)
    s.folder = folders[kind]
    s.m = copy.deepcopy(s.m)
    fault(s.m)
    assert set(verdicts(check.same_logits(s))) == {"FAIL"}


def test_without_transformers_parity_is_skipped(folders, subject, monkeypatch):
    """As it is if nobody asks for it, or in the authors' layout, which transformers does not read."""
    s = subject("janus")
    edit(s, "config.json", model_type="multi_modality")
    assert verdicts(check.same_logits(s)) == ["skipped"]
    s.folder = folders["janus"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    [one] = check.same_logits(s)
    assert one["verdict"] == "skipped" and "transformers" in one["measured"]
    s.settings = replace(s.settings, parity=False)
    assert check.same_logits(s)[0]["measured"] == "--no-parity"
