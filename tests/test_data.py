"""Claims about batches: templates and masks, records, encoded pictures, the schedule (data.py)."""

import itertools
import json
import re
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_data import (
    ALBUM,
    ASKED,
    BYTES,
    DRAWN,
    MIXED,
    PRESET,
    answer_of,
    both_kinds,
    encode,
    entry,
    fits,
    random,
    rank_file,
    training_scenes,
)
from PIL import Image

import data
import formats.datasets
import model
from formats.datasets import Encoded, FileSource, Mixture, picture_key
from formats.records import RECORD_TASKS, Record, conversation_parts, pictures_asked
from parts.kernels import span
from parts.pictures import janus_picture, load_picture, siglip_picture
from parts.settings import InputError
from parts.stories import MEND, PLAN, STORIES, scene_of, story_about, story_sentences
from parts.text import Text
from parts.world import World, combinations, draw_scenes, read_scenes


@pytest.fixture(scope="module")
def texts(both_texts):
    """The text tokenizer of each tiny preset."""
    return both_texts


# ---------------------------------------------------------------------------------------------------------------------
# Templates and masks
# ---------------------------------------------------------------------------------------------------------------------
def check(task, pieces, *expected, codes=None, given=(), valid=True):
    """Compare one sample with its tokens written by hand: (token or tokens, mark) in order.

    Marks: k key (condition), q trained and query, t trained only, . none of them. Those of a mixed sample have two
    letters, for generation and for understanding. codes (n, N): what Janus-Pro draws, all learned but those given.
    """
    flat = [(i, mark) for part, mark in expected for i in (part if isinstance(part, list) else [part])]
    (ids, marks), batch = zip(*flat, strict=True), data.collate(task, [pieces], torch.tensor([valid]), 0, codes=codes)
    assert batch.tokens[0].tolist() == list(ids) and batch.aia_valid.any() == valid
    for i, name in enumerate(batch.tasks):
        labels, condition, queries = (batch.per_task(x)[i][0].tolist() for x in (
            batch.labels, batch.condition, batch.queries))
        own = [mark[i] for mark in marks]
        right = [token for token, mark in zip(ids, own, strict=True) if mark in "qt"]
        if name == "gen" and codes is not None:
            right = [code for n, picture in enumerate(codes.tolist()) if n not in given for code in picture]
        assert [label for label in labels if label != -100] == right
        assert [label != -100 for label in labels] == [mark in "qt" for mark in own]
        assert condition == [mark == "k" for mark in own] and queries == [mark == "q" for mark in own]


def test_masks_of_emu3_generation(texts):
    """Keys are BOS and prompt, queries the codes that predict a code; size (height first), tags and ends are neither.

    The last code of a row predicts the row end, so it is trained but no query; only codes are trained.
    """
    ids, e = texts["emu3"].ids, lambda text: list(texts["emu3"].encode(text))
    v, pieces = ids["visual"], data.Emu3Template(PRESET["emu3"], texts["emu3"]).generation(
        "a red cross", torch.tensor([[5, 9, 0], [7, 2, 1]]))
    check("gen", pieces, (ids["bos"], "k"), (e("a red cross"), "k"),
          (ids["boi"], "."), (e("2*3"), "."), (ids["img"], "."),
          ([v + 5, v + 9], "q"), (v + 0, "t"), (ids["eol"], "."), ([v + 7, v + 2], "q"), (v + 1, "t"),
          ([ids["eol"], ids["eof"], ids["eoi"]], "."))


def test_masks_of_emu3_understanding(texts):
    """Keys are the codes alone; queries the answers of all turns without their EOS, which is trained but asks nothing.

    Question and template belong to neither; the template itself adds the full stop after the question.
    """
    ids, e = texts["emu3"].ids, lambda text: list(texts["emu3"].encode(text))
    turns = conversation_parts([("is it red?", "yes"), ("how many crosses?", "two or three")], 1)
    v, pieces = ids["visual"], data.Emu3Template(PRESET["emu3"], texts["emu3"]).conversation(
        turns, [torch.tensor([[5, 9], [7, 2]])])
    check("und", pieces, (ids["bos"], "."), (e("You are a helpful assistant. USER: "), "."),
          (ids["boi"], "."), (e("2*2"), "."), (ids["img"], "."), ([v + 5, v + 9], "k"), (ids["eol"], "."),
          ([v + 7, v + 2], "k"), (ids["eol"], "."), (ids["eof"], "."), (ids["eoi"], "."),
          (e("is it red?"), "."), (e(". ASSISTANT:"), "."), (e("yes"), "q"), (ids["eos"], "t"),
          (e(" USER: "), "."), (e("how many crosses?"), "."), (e(". ASSISTANT:"), "."),
          (e("two or three"), "q"), (ids["eos"], "t"))


def test_text_between_pictures_is_encoded_in_one_piece(tmp_path):
    """The published templates are strings: a tokenizer that joins ?. or a space with a word must see them whole."""
    ranks = [*BYTES, b"?.", b" W", b" Wh", b" USER"]
    text = Text(rank_file(tmp_path, ranks), "emu3")
    template = data.Emu3Template(PRESET["emu3"], text)
    pieces = template.conversation([(["What?"], ["x"]), (["What?"], None)], [])
    first = text.encode("You are a helpful assistant. USER: What?. ASSISTANT:")
    flat = [text.ids["bos"], *first, *text.encode("x"), text.ids["eos"], *text.encode(" USER: What?. ASSISTANT:")]
    assert [i for ids, _ in pieces for i in ids] == flat and ranks.index(b"?.") in first


def test_masks_of_janus_generation(texts):
    """Keys are all tokens before begin-of-image; of the codes the last predicts nothing, so it is no query."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    codes = torch.tensor([[5, 9, 0, 7]])
    pieces = data.JanusTemplate(PRESET["janus"], texts["janus"]).generation(" a red cross ", codes[0])
    check("gen", pieces, (ids["bos"], "k"), (ids["user"], "k"), (e(": a red cross\n\n"), "k"),
          (ids["assistant"], "k"), (e(":"), "k"), (ids["boi"], "."),
          ([ids["placeholder"]] * 3, "q"), (ids["placeholder"], "t"), codes=codes)


def test_masks_of_janus_understanding(texts):
    """As in Emu3: keys are the image tokens of all pictures, queries the answers; no BOS within the conversation."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    turns = conversation_parts([("<image>\nand <image>\nred?", "yes"), ("how many crosses?", "two or three")], 2)
    config = replace(PRESET["janus"], image_size=2 * PRESET["janus"].vit_patch)              # 2 x 2 image tokens
    picture = [(ids["boi"], "."), ([ids["placeholder"]] * 4, "k"), (ids["eoi"], ".")]
    check("und", data.JanusTemplate(config, texts["janus"]).conversation(turns, None),
          (ids["bos"], "."), (ids["user"], "."), (e(": "), "."), *picture, (e("\nand "), "."), *picture,
          (e("\nred?\n\n"), "."), (ids["assistant"], "."), (e(":"), "."), (e(" yes"), "q"), (ids["eos"], "t"),
          (ids["user"], "."), (e(": how many crosses?\n\n"), "."), (ids["assistant"], "."), (e(":"), "."),
          (e(" two or three"), "q"), (ids["eos"], "t"))


def test_janus_answers_with_its_system_text_and_trains_without(texts, preparers):
    """As its authors do; the tiny model has none."""
    system = model.PRESETS["janus-pro-7b"].system
    m = SimpleNamespace(config=replace(PRESET["janus"], system=system), vq=preparers["janus"].m.vq)
    for training, expected in ((True, ()), (False, texts["janus"].encode(system + "\n\n"))):
        template = data.Preparer(m, texts["janus"], training).template
        (first, role), *_ = template.conversation([(["hi"], None)], [])
        assert first == [texts["janus"].ids["bos"], *expected] and role == data.TEXT
    assert PRESET["janus"].system == "" and system.startswith("You are a helpful language and vision assistant. ")


def test_janus_breaks_the_line_after_a_picture_only_before_words(texts):
    """Contents are stripped: a picture at the end is followed by the blank line of the template alone."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    template = data.JanusTemplate(PRESET["janus"], texts["janus"])
    for asked, after in ((["what?", 0], "\n\n"), ([0, "what?"], "\nwhat?\n\n")):
        flat = [i for part, _ in template.conversation([(asked, None)], [None]) for i in part]
        assert flat[flat.index(ids["eoi"]) + 1:] == [*e(after), ids["assistant"], *e(":")]
    flat = [i for part, _ in template.prompt("") for i in part]
    assert flat == [ids["bos"], ids["user"], *e(":"), ids["assistant"], *e(":"), ids["boi"]]


@pytest.mark.parametrize("words", [1, 2, 5])
def test_an_answer_has_a_query_for_each_of_its_tokens(words):
    """EOS is the last answer token: the token before it asks too, so that a one-word answer has exactly one query."""
    pieces = [([1] * 4, data.IMAGE), ([2], data.TEXT), ([*range(10, 10 + words), 3], data.ANSWER)]
    batch = data.collate("und", [pieces, [*pieces, ([2], data.TEXT), ([7, 3], data.ANSWER)]], torch.ones(2).bool(), 0)
    assert batch.queries.sum(1).tolist() == [words, words + 1] and not batch.queries[batch.tokens == 3].any()
    assert (batch.labels[batch.tokens == 3] == 3).all()


def world_records(task, n, turns=4):
    source = data.WorldSource(World(0), n, 0)
    records = [source.record(task, i, random(i)) for i in range(n)]
    return [replace(record, turns=record.turns[:turns]) for record in records]


# ---------------------------------------------------------------------------------------------------------------------
# Conversations in text and pictures
# ---------------------------------------------------------------------------------------------------------------------
STORY = [("a red cross", "<image>"), ("make it blue", "it is: <image>"), ("is it blue?", "yes it is")]
TWO_ROWS, ONE_ROW = torch.tensor([[5, 9], [7, 2]]), torch.tensor([[1, 3]])               # codes of its two pictures


def emu3_block(ids, text, codes, first, query, last):
    """A picture of Emu3 by hand, with the marks of its begin, of its codes, and of the last one of each row."""
    h, w = codes.shape
    yield from ((ids["boi"], first), (list(text.encode(f"{h}*{w}")), ".."), (ids["img"], ".."))
    for row in (codes + ids["visual"]).tolist():
        yield from ((row[:-1], query), (row[-1], last), (ids["eol"], ".."))
    yield [ids["eof"], ids["eoi"]], ".."


def janus_block(ids, n, first, query, last, see="both"):
    """A drawn picture of n codes of Janus-Pro by hand, and the second look at it: four tokens, keys of text alone."""
    hole = ids["placeholder"]
    drawn = [(ids["boi"], first), ([hole] * (n - 1), query), (hole, last), (ids["eoi"], "..")]
    return drawn + [(ids["boi"], ".."), ([hole] * 4, ".k"), (ids["eoi"], "..")] * (see == "both")


def test_masks_of_a_story_in_emu3(texts):
    """Drawn codes ask about all words and are asked about by those that follow; both are trained.

    Begin-of-image is trained, since the model decides to draw; it asks nothing, nor does the word before it. What
    decoding forces (size, row ends, the end) is not trained. A stretch of an answer ends with EOS or a picture.
    """
    ids, e = texts["emu3"].ids, lambda text: list(texts["emu3"].encode(text))
    template = data.Emu3Template(PRESET["emu3"], texts["emu3"])
    first, second = (emu3_block(ids, texts["emu3"], codes, ".t", "qk", "tk") for codes in (TWO_ROWS, ONE_ROW))
    check("mixed", template.conversation(conversation_parts(STORY, 2), [TWO_ROWS, ONE_ROW]),
          (ids["bos"], "k."), (e("You are a helpful assistant. USER: "), "k."), (e("a red cross"), "k."),
          (e(". ASSISTANT:"), "k."), *first, (ids["eos"], "kt"),
          (e(" USER: "), "k."), (e("make it blue"), "k."), (e(". ASSISTANT:"), "k."),
          (e("it is:")[:-1], "kq"), (e("it is:")[-1], "kt"), *second, (ids["eos"], "kt"),
          (e(" USER: "), "k."), (e("is it blue?"), "k."), (e(". ASSISTANT:"), "k."),
          (e("yes it is"), "kq"), (ids["eos"], "kt"))


@pytest.mark.parametrize("see", ["both", "codes"])
def test_masks_of_a_story_in_janus(see, texts):
    """As in Emu3, with codes for the labels of generation. The second look stands directly behind a drawn picture, and
    is no more than keys; without it the codes are all that later text can look at. A space begins each stretch."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    codes = torch.tensor([[5, 9, 7], [2, 1, 3]])
    template = data.JanusTemplate(replace(PRESET["janus"], see=see), texts["janus"])
    picture = janus_block(ids, 3, ".t", "qk", "tk", see)
    check("mixed", template.conversation(conversation_parts(STORY, 2), codes),
          (ids["bos"], "k."), (ids["user"], "k."), (e(": a red cross\n\n"), "k."), (ids["assistant"], "k."),
          (e(":"), "k."), *picture, (ids["eos"], "kt"),
          (ids["user"], "k."), (e(": make it blue\n\n"), "k."), (ids["assistant"], "k."), (e(":"), "k."),
          (e(" it is:")[:-1], "kq"), (e(" it is:")[-1], "kt"), *picture, (ids["eos"], "kt"),
          (ids["user"], "k."), (e(": is it blue?\n\n"), "k."), (ids["assistant"], "k."), (e(":"), "k."),
          (e(" yes it is"), "kq"), (ids["eos"], "kt"), codes=codes)


def test_words_before_any_picture_are_no_queries(texts):
    """A plan has no picture to look at: its intensity is 0 whatever the model does, and would pull down the mean. It is
    trained and looked at like all words, and those behind the picture ask as ever."""
    text, e = texts["emu3"], lambda text: list(texts["emu3"].encode(text))
    turns = conversation_parts([("a cross", "one cross: <image> it is red")], 1)
    check("mixed", data.Emu3Template(PRESET["emu3"], text).conversation(turns, [ONE_ROW]), (text.ids["bos"], "k."),
          (e("You are a helpful assistant. USER: "), "k."), (e("a cross"), "k."), (e(". ASSISTANT:"), "k."),
          (e("one cross:"), "kt"), *emu3_block(text.ids, text, ONE_ROW, ".t", "qk", "tk"), (e("it is red"), "kq"),
          (text.ids["eos"], "kt"))
    text, e = texts["janus"], lambda text: list(texts["janus"].encode(text))
    check("mixed", data.JanusTemplate(PRESET["janus"], text).conversation(turns, [ONE_ROW]), (text.ids["bos"], "k."),
          (text.ids["user"], "k."), (e(": a cross\n\n"), "k."), (text.ids["assistant"], "k."), (e(":"), "k."),
          (e(" one cross:"), "kt"), *janus_block(text.ids, 2, ".t", "qk", "tk"), (e(" it is red"), "kq"),
          (text.ids["eos"], "kt"), codes=ONE_ROW)


def test_a_given_picture_is_looked_at_and_not_learned(texts):
    """A wrong drawing that is to be mended must not teach to draw wrongly: neither its codes nor its begin."""
    turns = conversation_parts([("a cross", "<image> it is red <image>")], 2)
    text, e = texts["emu3"], lambda text: list(texts["emu3"].encode(text))
    given, mended = (emu3_block(text.ids, text, codes, *marks) for codes, marks in (
        (TWO_ROWS, ("..", ".k", ".k")), (ONE_ROW, (".t", "qk", "tk"))))
    check("mixed", data.Emu3Template(PRESET["emu3"], text).conversation(turns, [TWO_ROWS, ONE_ROW], (0,)),
          (text.ids["bos"], "k."), (e("You are a helpful assistant. USER: "), "k."), (e("a cross"), "k."),
          (e(". ASSISTANT:"), "k."), *given, (e("it is red")[:-1], "kq"), (e("it is red")[-1], "kt"), *mended,
          (text.ids["eos"], "kt"))
    text, e = texts["janus"], lambda text: list(texts["janus"].encode(text))
    codes = torch.tensor([[5, 9, 7], [2, 1, 3]])
    check("mixed", data.JanusTemplate(PRESET["janus"], text).conversation(turns, codes, (0,)),
          (text.ids["bos"], "k."), (text.ids["user"], "k."), (e(": a cross\n\n"), "k."), (text.ids["assistant"], "k."),
          (e(":"), "k."), *janus_block(text.ids, 3, "..", ".k", ".k"),
          (e(" it is red")[:-1], "kq"), (e(" it is red")[-1], "kt"), *janus_block(text.ids, 3, ".t", "qk", "tk"),
          (text.ids["eos"], "kt"), codes=codes, given=(0,))


def test_a_conversation_without_its_words_keeps_tags_and_pictures(texts):
    """For guidance, the words of both sides go: Emu3 leaves them out, Janus-Pro has as many pads, which are attended.
    Of what is left only the codes are learned."""
    turns = conversation_parts([("see <image>", "so: <image> done"), ("red?", "yes")], 2)
    text, e = texts["emu3"], lambda text: list(texts["emu3"].encode(text))
    seen, drawn = (emu3_block(text.ids, text, codes, *marks) for codes, marks in (
        (TWO_ROWS, ("..", ".k", ".k")), (ONE_ROW, ("..", "qk", "tk"))))
    check("mixed", data.Emu3Template(PRESET["emu3"], text).conversation(turns, [TWO_ROWS, ONE_ROW], dropped=True),
          (text.ids["bos"], "k."), (e("You are a helpful assistant. USER: "), "k."), *seen,
          (e(". ASSISTANT:"), "k."), *drawn, (text.ids["eos"], ".."), (e(" USER: "), "k."), (e(". ASSISTANT:"), "k."),
          (text.ids["eos"], ".."), valid=False)
    text = texts["janus"]
    ids, pads = text.ids, lambda said: [text.ids["pad"]] * len(text.encode(said))
    seen = [(ids["boi"], ".."), ([ids["placeholder"]] * 4, ".k"), (ids["eoi"], "..")]
    check("mixed", data.JanusTemplate(PRESET["janus"], text).conversation(turns, {1: ONE_ROW[0]}, dropped=True),
          (ids["bos"], "k."), (ids["user"], "k."), (pads(": see "), "k."), *seen, (pads("\n\n"), "k."),
          (ids["assistant"], "k."), (list(text.encode(":")), "k."), (pads(" so:"), "k."),
          *janus_block(ids, 2, "..", "qk", "tk"), (pads(" done"), "k."), (ids["eos"], ".."),
          (ids["user"], "k."), (pads(": red?\n\n"), "k."), (ids["assistant"], "k."), (list(text.encode(":")), "k."),
          (pads(" yes"), "k."), (ids["eos"], ".."), codes=ONE_ROW, valid=False)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
@both_kinds
def test_a_dropped_prompt_is_invalid_for_aia_but_trained(kind, preparers):
    """Guidance needs pictures without a prompt. Emu3: an empty caption. Janus-Pro: pads from BOS to begin-of-image."""
    ids, records, rngs = PRESET[kind].ids, world_records("gen", 3), [random(i) for i in range(3)]
    full, dropped = (preparers[kind].batch(records, rngs, drop) for drop in (0.0, 1.0))
    assert full.aia_valid.all() and not dropped.aia_valid.any()
    assert torch.equal(dropped.labels[dropped.labels != -100], full.labels[full.labels != -100])
    for row, before in zip(dropped.tokens.tolist(), full.tokens.tolist(), strict=True):
        pads = [ids["pad"]] * (before.index(ids["boi"]) - 1) if kind == "janus" else []
        assert row[:len(pads) + 2] == [ids["bos"], *pads, ids["boi"]]


@both_kinds
def test_lengths_for_a_gpu_are_multiples_and_change_nothing_else(kind, preparers, monkeypatch):
    """Its kernels plan anew for each length, so there are few of them; what is added is padding like any other."""
    p = preparers[kind]
    records = [Record("a", "und", (("what is there?" * n, "a red circle"),), ()) for n in (1, 3)]
    usual = p.batch(records)
    assert usual.tokens.shape[1] % 16
    monkeypatch.setitem(data.LENGTHS, p.device.type, data.LENGTHS["cuda"])
    longer = p.batch(records)
    more = longer.tokens.shape[1] - usual.tokens.shape[1]
    assert longer.tokens.shape[1] % 16 == 0 and 0 < more < 16 and longer.lengths == usual.lengths
    assert torch.equal(longer.tokens, F.pad(usual.tokens, (0, more), value=p.text.ids["pad"]))
    assert torch.equal(longer.labels, F.pad(usual.labels, (0, more), value=-100))
    assert torch.equal(longer.queries, F.pad(usual.queries, (0, more)))
    monkeypatch.setitem(data.LENGTHS, p.device.type, max(usual.lengths))
    assert p.batch(records).tokens.shape[1] == max(usual.lengths) == usual.tokens.shape[1]


@both_kinds
def test_aia_needs_keys_and_queries(kind, preparers):
    """A conversation without a picture shows nothing to attend to, an empty answer asks nothing: both train, without
    AIA."""
    p, talk = preparers[kind], Record("talk", "und", (("is it red?", "yes"),), ())
    batch = p.batch([*world_records("und", 1), talk])
    assert batch.aia_valid.tolist() == [True, False] and batch.queries.any(1).all()
    shown, said = ([5] * 4, data.IMAGE), ([7, 3], data.ANSWER)
    samples = [[shown, said], [shown, ([3], data.ANSWER)], [([5] * 4, data.TEXT), said]]
    batch = data.collate("und", samples, torch.ones(3).bool(), 0)
    assert batch.aia_valid.tolist() == [True, False, False] and (batch.labels != -100).any(1).all()
    assert not data.collate("und", samples, torch.zeros(3).bool(), 0).aia_valid.any()


@both_kinds
@pytest.mark.parametrize("task", ["gen", "und"])
def test_padding_changes_neither_labels_nor_masks(kind, task, preparers):
    """Beside longer samples a sample keeps its tokens, labels and masks; the pads behind it have none."""
    records = world_records(task, 3, turns=1) + world_records(task, 3, turns=4)
    together, p = preparers[kind].batch(records), preparers[kind]
    lengths = []
    for i, record in enumerate(records):
        alone = p.batch([record])
        n = alone.tokens.shape[1]
        lengths.append(n)
        for name, empty in (("tokens", p.text.ids["pad"]), ("labels", -100), ("condition", False), ("queries", False)):
            row = getattr(together, name)[i]
            assert torch.equal(row[:n], getattr(alone, name)[0]) and (row[n:] == empty).all(), name
    assert min(lengths) < max(lengths) == together.tokens.shape[1]


@both_kinds
@pytest.mark.parametrize("task", RECORD_TASKS)
def test_a_batch_of_nothing_trains_nothing(kind, task, preparers):
    """It only keeps a process in step with others: no label, no target, nothing valid, no sample to count. But it runs
    the modules that the others run: a mixed one draws and sees."""
    batch = preparers[kind].nothing(task)
    assert batch.task == task and (batch.labels == -100).all() and not batch.aia_valid.any()
    assert len(batch.targets) == len(batch.predicting) == sum(batch.lengths) == len(batch.origins) == 0
    assert sum(batch.labelled) == 0 and len(batch.labelled) == len(batch.tasks)
    if kind == "janus":
        assert (batch.codes is not None, batch.pixels is not None) == (task != "und", task != "gen")


MIXED_PRESETS = ("tiny-mixed", "tiny-mixed-janus", "tiny-mixed-codes", "tiny-mixed-fork")


def mixed_preparer(name, texts, **changes):
    """A preparer for a tiny model of random weights that takes conversations."""
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32, "fork_layer": int(name == "tiny-mixed-fork")}
    m = model.build(name, **sizes | changes)
    return data.Preparer(m, texts[m.config.kind])


def story_records():
    """A conversation of each kind about the drawn world."""
    world = World(0)
    stories = [story_about(world, world.scene(random(i)), random(i), kind) for i, kind in enumerate(STORIES)]
    return [Record(kind, "mixed", story.turns, tuple(draw_scenes(story.scenes)), given=story.given)
            for kind, story in zip(STORIES, stories, strict=True)]


@pytest.mark.parametrize("name", MIXED_PRESETS)
def test_a_conversation_is_the_same_alone_and_beside_others(name, texts):
    """Beside longer ones it keeps its tokens, labels and masks for both tasks, and what it sees and draws; in the model
    it has the same intensities, and losses are sums over samples."""
    p, records = mixed_preparer(name, texts), story_records()
    together, each = p.batch(records), [p.batch([record]) for record in records]
    with torch.inference_mode():
        out, own = p.m(together), [p.m(batch) for batch in each]
    for i, alone in enumerate(each):
        n = alone.tokens.shape[1]
        for field, empty in (("tokens", p.text.ids["pad"]), ("labels", -100), ("condition", False), ("queries", False)):
            row, other = getattr(together, field)[..., i, :], getattr(alone, field)[..., 0, :]
            assert torch.equal(row[..., :n], other) and (row[..., n:] == empty).all(), field
        assert torch.equal(together.aia_valid[:, i], alone.aia_valid[:, 0])
        torch.testing.assert_close(out.intensity[:, i], own[i].intensity[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.ntp, sum(one.ntp for one in own), rtol=1e-5, atol=0)
    assert out.tokens == tuple(map(sum, zip(*(one.tokens for one in own), strict=True)))
    assert out.intensity.shape == (2, len(records), 2) and (out.intensity[together.aia_valid] > 0).all()
    assert len({batch.lengths for batch in each}) > 2 and together.aia_valid.any(1).all()
    if p.config.kind == "janus":
        assert torch.equal(together.codes, torch.cat([batch.codes for batch in each]))
        seen = [batch.pixels for record, batch in zip(records, each, strict=True)
                if p.config.see == "both" or pictures_asked(record)]
        assert torch.equal(together.pixels, torch.cat(seen))


@both_kinds
def test_a_conversation_counts_for_both_tasks(kind, texts):
    """Codes are generation's labels; words, ends and the begin of each picture are understanding's. A sample may be
    valid for the one alone: nothing is said about the only picture of a plan."""
    p = mixed_preparer({"emu3": "tiny-mixed", "janus": "tiny-mixed-janus"}[kind], texts)
    pictures = draw_scenes(training_scenes(2))
    plan = Record("plan", "mixed", (("a cross", "one cross: <image>"),), (pictures[1],))
    batch = p.batch([Record("story", "mixed", tuple(STORY), tuple(pictures)), plan])
    said = ["it is:", "yes it is", "one cross:"]
    words = sum(len(p.text.encode(" " * (kind == "janus") + text)) for text in said)
    assert batch.labelled == (3 * 16, words + 4 + 3)                            # ends of answers, begins of pictures
    assert batch.aia_valid.tolist() == [[True, True], [True, False]] and batch.tasks == ("gen", "und")
    codes = torch.cat([one.flatten() for one in p.codes([*pictures, pictures[1]])]) + p.text.ids.get("visual", 0)
    drawn, spoken = batch.targets.split(batch.labelled)
    assert torch.equal(drawn, codes)
    assert torch.equal(spoken, batch.tokens.flatten()[batch.predicting[-len(spoken):] + 1])
    assert batch.rectangle == tuple((*span(q), *span(k)) for q, k in zip(batch.queries, batch.condition, strict=True))


@both_kinds
def test_a_dropped_conversation_learns_its_pictures_alone(kind, texts):
    """Guidance needs pictures that follow nothing but pictures; what it means for words, or for AIA, nobody asks."""
    p = mixed_preparer({"emu3": "tiny-mixed", "janus": "tiny-mixed-janus"}[kind], texts)
    records = story_records()
    full, dropped = (p.batch(records, [random(i) for i in range(len(records))], drop) for drop in (0.0, 1.0))
    assert full.aia_valid.any(1).all() and not dropped.aia_valid.any()
    assert dropped.labelled == (full.labelled[0], 0)
    assert torch.equal(dropped.targets, full.targets[:full.labelled[0]])
    if kind == "janus":
        assert dropped.lengths == full.lengths and torch.equal(dropped.pixels, full.pixels)


def test_janus_sees_again_the_part_of_a_picture_that_it_has_drawn(texts):
    """The picture tokenizer crops a photo to a square; a second look at the whole of it would show what the codes do
    not, and what no drawing will ever have. A picture in a question is seen whole, on grey."""
    p = mixed_preparer("tiny-mixed-janus", texts)
    photo = random(0).integers(256, size=(40, 60, 3)).astype(np.uint8)
    batch = p.batch([Record("edit", "mixed", (("<image>make it red", "<image>"),), (photo, photo))])
    asked, again = batch.pixels
    assert torch.equal(again, janus_picture(Image.fromarray(photo), p.config))
    assert torch.equal(batch.codes, p.m.encode_images(again[None]))
    assert torch.equal(asked, siglip_picture(Image.fromarray(photo), p.config))
    assert not torch.equal(asked, again)
    p = mixed_preparer("tiny-mixed-codes", texts)
    batch = p.batch([Record("edit", "mixed", (("<image>make it red", "<image>"),), (photo, photo))])
    assert torch.equal(batch.pixels, asked[None])


def test_a_conversation_without_a_picture_to_see_runs_the_same_modules(texts):
    """Processes that share out weights sum the gradients of the same modules, and another one may have a picture to
    see: what no token stands for leaves the loss as it is, and has gradients of zero. Answering needs no such thing."""
    p, (picture,) = mixed_preparer("tiny-mixed-codes", texts), draw_scenes(training_scenes(1))
    record = Record("draw", "mixed", (("a cross", "<image>"), ("is it red?", "no")), (picture,))
    batch = p.batch([record])
    out = p.m(batch)
    out.ntp.sum().backward()
    assert batch.pixels.shape[0] == 1 and all(weight.grad.eq(0).all() for weight in p.m.aligner.parameters())
    assert torch.equal(out.ntp, p.m(replace(batch, pixels=None)).ntp)
    assert data.Preparer(p.m, p.text, training=False).pieces([record])[1]["pixels"] is None


def test_attention_on_other_keys_is_looked_for_where_they_are(preparers):
    """Kernels compute one rectangle of the map, which must move with the keys."""
    batch = preparers["emu3"].batch(world_records("und", 2))
    other = torch.zeros_like(batch.condition)
    other[:, 1:3] = True
    moved = batch.measuring(other)
    assert moved.rectangle == (*batch.rectangle[:2], 1, 3) and batch.rectangle[2:] != (1, 3)
    assert torch.equal(moved.condition, other) and torch.equal(moved.queries, batch.queries)


@pytest.mark.parametrize("name", MIXED_PRESETS)
@pytest.mark.parametrize("task", ["gen", "und", "mixed"])
def test_the_first_token_can_be_left_out_of_the_condition(name, task, texts):
    """AIA could otherwise meet generation's target by attending to a sink that says nothing of the prompt."""
    p = mixed_preparer(name, texts)
    records = story_records() if task == "mixed" else world_records(task, 3)
    usual, without = p.batch(records), data.Preparer(p.m, p.text, first=False).batch(records)
    expected = usual.condition.clone()
    expected[..., 0] = False
    assert torch.equal(without.condition, expected) and torch.equal(usual.condition, expected) == (task == "und")
    assert torch.equal(without.queries, usual.queries) and torch.equal(without.aia_valid, usual.aia_valid)
    first_key = without.rectangle[0][2] if task == "mixed" else without.rectangle[2]
    assert first_key == without.per_task(expected)[0].any(0).nonzero()[0].item()


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------
def test_emu3_learns_from_pictures_of_the_area_that_it_draws_and_is_asked_about_whole_ones(texts):
    """A large photo would else be thousands of codes, in sizes that it is never to draw."""
    m = model.build("tiny-emu3", layers=1, width=32, min_pixels=8 * 8, max_pixels=64 * 64)      # draws 16 x 16
    photo = random(0).integers(256, size=(40, 60, 3)).astype(np.uint8)
    grids = [tuple(data.Preparer(m, texts["emu3"], training).codes([photo])[0].shape) for training in (True, False)]
    assert grids == [(3, 5), (10, 15)]


@both_kinds
@pytest.mark.parametrize("images, marked, bare", [
    ("b.png", "<image>\nis it red?", "is it red?"), ("b.png", " <image> is it red? ", "is it red?"),
    (["b.png", "c.png"], "<image><image>is it red?", "is it red?")])
def test_the_image_mark_is_optional(kind, images, marked, bare, album, preparers):
    """Without a mark the pictures come first, which is where the mark usually stands: both give the same batch."""
    file = album(*(entry(images, (asked, "yes"), ("and blue?", "no")) for asked in (marked, bare)))
    one, other = (preparers[kind].batch([record]) for record in FileSource(file, kind).records["und"])
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.condition, other.condition)


@both_kinds
def test_several_pictures_stand_where_their_marks_are(kind, album, preparers):
    """Pictures enter in the order of the list, also over several turns, and all their tokens are keys."""
    file = album(entry(["c.png", "a.png"], ("see <image>", "yes"), ("like <image> ?", "no")),
                 entry("c.png", ("?", "no")), entry("a.png", ("?", "no")))
    p = preparers[kind]
    both, *single = (p.batch([record]) for record in FileSource(file, kind).records["und"])
    keys = [batch.tokens[batch.condition].tolist() for batch in (both, *single)]
    assert keys[0] == keys[1] + keys[2]
    if kind == "janus":
        assert torch.equal(both.pixels, torch.cat([single[0].pixels, single[1].pixels]))


@pytest.mark.parametrize("cell", [8, 16])
def test_an_export_is_read_back_to_the_same_pictures(cell, tmp_path, capsys):
    """Pictures are stored without loss, so the built-in world and its export are the same training data."""
    data.main(["export", str(tmp_path / "world"), "--n", "10", "--seed", "3", *["--cell", "16"] * (cell == 16)])
    source = FileSource(tmp_path / "world/train.jsonl", "emu3")
    drawn = data.WorldSource(World(3, cell=cell), 10, 3)
    assert [source.count(task) for task in ("gen", "und")] == [5, 5] and "10 records" in capsys.readouterr().out
    for offset, task in enumerate(("gen", "und")):
        for i, record in enumerate(source.records[task]):
            scene = drawn.scenes[2 * i + offset]
            assert np.array_equal(load_picture(record.pictures[0], "emu3"), drawn.pictures[2 * i + offset])
            assert all(fits(asked, scene) if task == "gen" else answer_of(asked, scene) == answer
                       for asked, answer in record.turns)


def test_an_export_may_hold_conversations(tmp_path, capsys):
    """A third of the records, with all pictures that they show, in the order of their marks. Drawings that are to be
    checked are left out: a file cannot say that a picture is not to be learned."""
    data.main(["export", str(tmp_path / "world"), "--n", "60", "--mixed"])
    source, world = FileSource(tmp_path / "world/train.jsonl", "emu3"), World(0)
    assert [source.count(task) for task in RECORD_TASKS] == [20, 20, 20] and "60 records" in capsys.readouterr().out
    told = source.records["mixed"]
    assert {len(record.pictures) for record in told} == {1, 2, 3}
    assert len([*(tmp_path / "world/pictures").iterdir()]) == 40 + sum(len(record.pictures) for record in told)
    for record in told:
        scenes, clear = read_scenes(np.stack([np.asarray(load_picture(one, "emu3")) for one in record.pictures]), world)
        plan = scene_of(record.turns[0][1].removesuffix(" <image>"))            # None without one
        assert clear.all() and not any(combinations(scene) & world.held_out for scene in scenes)
        assert plan in (None, scenes[0]) and MEND not in record.turns[0][0]
    assert sum(PLAN in record.turns[0][0] for record in told) > 1


def use(file, p, on_bad_record):
    """Read a file and make a step of it, in which every record takes part: (bad records, places in the batches)."""
    source = FileSource(file, p.config.kind, on_bad_record)
    schedule = data.Schedule(source, p, 0, 6, (1, 1), 2, drop=0.0, on_bad_record=on_bad_record)
    return [place for batch in schedule.step(0) for place in batch.origins], source.bad + schedule.bad


# ---------------------------------------------------------------------------------------------------------------------
# Pictures encoded once
# ---------------------------------------------------------------------------------------------------------------------
def test_janus_sees_a_picture_also_when_its_codes_are_known(texts):
    """Codes that were made for drawing are not what SigLIP sees."""
    p = data.Preparer(model.build("tiny-janus", layers=1, width=32), texts["janus"])
    before = p.batch(world_records("und", 2))
    p.batch(world_records("gen", 2))
    again = p.batch(world_records("und", 2))
    assert len(p.known) == 2 and again.features is None and torch.equal(again.pixels, before.pixels)


def test_pictures_are_encoded_a_few_at_a_time(texts, monkeypatch):
    """The tokenizer's activations are large, so a long group is cut, without another result."""
    m, pictures = model.build("tiny-emu3", layers=1, width=32), [*draw_scenes(training_scenes(5))]
    expected, sizes, inner = data.Preparer(m, None).codes(pictures), [], m.encode_images
    monkeypatch.setattr(data, "PIXELS_AT_ONCE", 2 * 16 * 16)
    m.encode_images = lambda pixels: sizes.append(len(pixels)) or inner(pixels)
    codes = data.Preparer(m, None).codes(pictures)
    assert sizes == [2, 2, 1] and all(map(torch.equal, codes, expected))


@both_kinds
def test_encoded_pictures_give_the_batches_that_encoding_on_the_way_gives(kind, saved, album, texts, tmp_path, capsys):
    """Frozen towers say the same each time: once stored, codes and features take the towers' place, bit for bit."""
    (m, init), file = saved(kind, see="codes"), album(*ALBUM, MIXED)
    encode(tmp_path / "codes", file, init, *["--features"] * (kind == "janus"))
    assert re.findall(r"(\w+): (\d) pictures encoded", capsys.readouterr().out) == \
        ([("codes", "3")] if kind == "emu3" else [("codes", "2"), ("features", "2")])
    plain, stored = data.Preparer(m, texts[kind]), data.Preparer(m, texts[kind], encoded=Encoded(
        tmp_path / "codes", m))
    records = FileSource(file, kind).records
    expected = {task: plain.batch(records[task]) for task in RECORD_TASKS}
    losses = {task: m(batch) for task, batch in expected.items()}
    m.encode_images = None                                      # whoever calls a tower now fails
    if kind == "janus":
        m.vision.forward = None
    for task, batch in expected.items():
        again = stored.batch(records[task])
        assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.labels, batch.labels)
        assert torch.equal(m(again).ntp, losses[task].ntp) and torch.equal(m(again).intensity, losses[task].intensity)


def test_a_second_look_takes_its_codes_from_a_store_and_looks_itself(saved, album, texts, tmp_path):
    """Stored features are those of whole pictures, a drawn one is seen as it was drawn, even if it has features since
    another record asks about it: the batch is that without a store."""
    (m, init), file = saved("janus"), album(MIXED, entry("c.png", ("red?", "no")))
    encode(tmp_path / "codes", file, init, "--features")
    plain, stored = data.Preparer(m, texts["janus"]), data.Preparer(m, texts["janus"], encoded=Encoded(
        tmp_path / "codes", m))
    records = FileSource(file, "janus").records["mixed"]
    expected = plain.batch(records)
    m.encode_images = None                                      # whoever calls it now fails
    again = stored.batch(records)
    assert again.features is None and again.pixels.shape[0] == 2
    # Features of b.png, which only the mixed record shows, would take up space and never be read.
    assert [key for key in stored.encoded.parts if "features" in key] == [
        f"features/{picture_key(file.with_name('c.png'))}"]
    for name in ("tokens", "labels", "pixels", "codes", "drawn"):
        assert torch.equal(getattr(again, name), getattr(expected, name)), name


def test_pictures_are_read_once_where_nothing_is_stored_of_them(saved, album, texts, tmp_path, monkeypatch):
    """A store of codes knows no features, so the pictures of questions are not read a second time to look for some."""
    (m, init), file = saved("janus"), album(*ALBUM)
    encode(tmp_path / "codes", file, init)
    preparer = data.Preparer(m, texts["janus"], encoded=Encoded(tmp_path / "codes", m))
    hashed, key = [], picture_key
    monkeypatch.setattr(formats.datasets, "picture_key", lambda picture: hashed.append(picture) or key(picture))
    records = FileSource(file, "janus").records
    for task in ("gen", "und"):
        preparer.batch(records[task])
    assert hashed == [tmp_path / "a.png"]


def test_a_changed_picture_is_encoded_anew(saved, album, texts, tmp_path):
    """Pictures are known by their content: a new file under an old name is not taken for the old one."""
    (m, init), file = saved("emu3"), album(*ALBUM)
    encode(tmp_path / "codes", file, init)
    store = Encoded(tmp_path / "codes", m)
    assert store.get("codes", tmp_path / "a.png") is not None
    Image.fromarray(draw_scenes(training_scenes(5))[-1]).save(tmp_path / "a.png")
    assert store.get("codes", tmp_path / "a.png") is None
    fresh, stored = (data.Preparer(m, texts["emu3"], encoded=one).codes([tmp_path / "a.png"])[0]
                     for one in (None, store))
    assert torch.equal(fresh, stored)


@pytest.mark.parametrize("flags, message", [
    (["--data", "train.jsonl"], "needs a folder, --data and --init"),
    (["--data", "FILE", "--init", "EMU3", "--features"], "there is no SigLIP"),
    (["--data", "no.jsonl", "--init", "EMU3"], "no.jsonl cannot be read")])
def test_encode_refuses_what_it_cannot_do_before_it_writes(flags, message, saved, album, tmp_path):
    """One line with the remedy, and no folder left behind."""
    given = {"FILE": str(album(DRAWN)), "EMU3": saved("emu3")[1]}
    with pytest.raises(InputError, match=message):
        data.main(["encode", str(tmp_path / "codes"), *(given.get(flag, flag) for flag in flags)])
    assert not (tmp_path / "codes").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Records that cannot be used
# ---------------------------------------------------------------------------------------------------------------------
BAD = {
    "missing picture": (entry("none.png", ("is it?", "no")), "none.png is missing.*start from its folder"),
    "text as picture": (entry("text.png", ("is it?", "no")), "text.png cannot be opened.*check or replace"),
    "truncated picture": (entry("cut.png", ("is it?", "no")), "cut.png is broken.*replace it"),
    "truncated picture to draw": (entry("cut.png", ("a cross", "<image>")), "cut.png is broken.*replace it"),
    "extreme ratio": (entry("flat.png", ("is it?", "no")), "280 x 10.*crop it"),
    "not JSON": ('{"image": "a.png", ', "not JSON.*one object per line"),
    "no object": ('["a.png"]', 'needs "image" and "conversations"'),
    "unknown field": (DRAWN | {"captions": 1}, "unknown field 'captions'.*known are"),
    "unknown task": (DRAWN | {"task": "edit"}, "unknown task 'edit'.*gen, und"),
    "wrong task": (DRAWN | {"task": "und"}, "task is 'und'.*leave it out"),
    "empty answer": (entry("a.png", ("is it?", " ")), "answer is empty.*needs text"),
    "no answer": (entry("a.png") | {"conversations": [{"from": "human", "value": "?"}]},
                  "alternating human and gpt turns"),
    "too many marks": (entry("a.png", ("<image> and <image>?", "no")), "2 <image> marks.*for 1 pictures.*one each"),
    "one drawing, two pictures": (entry(["a.png", "b.png"], ("a cross", "<image>")), "1 <image> marks.*for 2 pictures"),
    "long caption": (entry("a.png", ("red " * 300, "<image>")), "tokens, but the model takes.*shorten"),
}


@both_kinds
@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_a_bad_record_is_named_with_line_and_remedy(kind, line, message, album, preparers):
    """One line says where and what to do; "skip" leaves just this record out and lists it."""
    file = album(DRAWN, ASKED, line)
    with pytest.raises(InputError, match=f"^{file}:3: .*{message}") as error:
        use(file, preparers[kind], "stop")
    assert "\n" not in str(error.value) and "--on-bad-record skip" in str(error.value)
    places, bad = use(file, preparers[kind], "skip")
    assert set(places) == {f"{file}:1", f"{file}:2"} and len(bad) == 1 and re.search(f"^{file}:3: .*{message}", bad[0])


@pytest.mark.parametrize("limit", [1000, 2000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(limit, album, preparers, monkeypatch):
    """A small file can unpack to gigabytes: Pillow warns above its limit and refuses above twice, both are refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    file = album(DRAWN, ASKED, entry("huge.png", ("is it?", "no")))                          # 3600 pixels
    with pytest.raises(InputError, match=f"^{file}:3: .*shrink it first"):
        use(file, preparers["emu3"], "stop")
    assert len(use(file, preparers["emu3"], "skip")[1]) == 1


def test_half_a_character_is_a_bad_record(album, preparers):
    """JSON may name one half of a pair; no tokenizer takes it."""
    batch, bad = use(album(json.dumps(entry("a.png", ("\ud83d?", "yes"))), ASKED, DRAWN), preparers["emu3"], "skip")[:2]
    assert len(bad) == 1 and "half a character" in bad[0]


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------
def schedule(p, n=10, batch_size=6, ratio=(1, 1), micro_batch=64, drop=0.3):
    return data.Schedule(data.WorldSource(World(0), n, 0), p, 0, batch_size, ratio, micro_batch, drop)


@pytest.mark.parametrize("ratio", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 0)])
def test_the_ratio_is_honoured_over_any_window(ratio, preparers):
    """Counts come from the running total, so no window of steps is more than one sample away from the ratio."""
    before = [data.samples_before(step, 5, ratio)["gen"] for step in range(40)]
    for first in range(40):
        for last in range(first + 1, 40):
            assert abs(before[last] - before[first] - (last - first) * 5 * ratio[0] / sum(ratio)) < 1
    made = schedule(preparers["emu3"], batch_size=5, ratio=ratio).step(3)
    assert sum(len(b.tokens) for b in made) == 5
    assert sum(len(b.tokens) for b in made if b.task == "gen") == before[4] - before[3]


RATIOS = [(1, 1, 2), (2, 1, 1), (1, 0, 3), (0, 1, 1), (0, 0, 1), (1, 1, 0)]


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_third_share_is_honoured_over_any_window(ratio):
    """All samples of a step are shared out, and no window is more than one sample away from the ratio."""
    before = [data.samples_before(step, 5, ratio) for step in range(40)]
    for first, last in itertools.combinations(range(40), 2):
        made = [before[last][task] - before[first][task] for task in RECORD_TASKS]
        assert sum(made) == 5 * (last - first)
        assert all(abs(n - sum(made) * share / sum(ratio)) < 1 for n, share in zip(made, ratio, strict=True))


@pytest.mark.parametrize("mix", ["both", "drawn"])
def test_a_third_share_of_nothing_changes_nothing(mix, preparers):
    """Two numbers or three, the same samples in the same order: older runs go on as they were."""
    source = data.WorldSource(World(0), 10, 0)
    steps = [[(b.task, b.origins, b.tokens.tolist(), b.aia_valid.tolist()) for step in range(4) for b in data.Schedule(
        source, preparers["emu3"], 0, 6, ratio, 2, 0.3, mix=mix).step(step)] for ratio in ((2, 1), (2, 1, 0))]
    assert steps[0] == steps[1] and len(steps[0]) > 4


@pytest.mark.parametrize("ratio", [(1, 1, 2), (0, 1, 3), (1, 0, 0)])
def test_a_step_of_one_sort_draws_it_with_the_odds_of_the_ratio(ratio):
    """As the released code mixes its tasks, with a third one. Which one a step has is drawn once, whatever follows."""
    before = [data.samples_before(step, 5, ratio, drawn=7) for step in range(401)]
    made = [{task: now[task] - then[task] for task in now} for then, now in itertools.pairwise(before)]
    assert all(sorted(step.values()) == [0, 0, 5] for step in made)
    for task, share in zip(RECORD_TASKS, ratio, strict=True):
        assert before[400][task] / 2000 == pytest.approx(share / sum(ratio), abs=0.06)
    assert before[400] != data.samples_before(400, 5, ratio, drawn=8) or ratio == (1, 0, 0)


@both_kinds
def test_conversations_have_micro_batches_of_their_own_behind_the_others(kind, texts):
    """One task after the other, since processes wait for one another; each batch is of records of one sort."""
    p = mixed_preparer({"emu3": "tiny-mixed", "janus": "tiny-mixed-janus"}[kind], texts)
    batches = schedule(p, batch_size=12, ratio=(1, 1, 2), micro_batch=2).step(1)
    assert [batch.task for batch in batches] == ["gen"] * 2 + ["und"] * 2 + ["mixed"] * 3
    assert all(batch.labels.shape == (2, *batch.tokens.shape) for batch in batches[4:])
    assert all(batch.labels.shape == batch.tokens.shape for batch in batches[:4])
    assert all(place.startswith("world conversation") for batch in batches[4:] for place in batch.origins)


@pytest.mark.parametrize("kind, share", [("emu3", 0.05), ("janus", 0.10)])
def test_a_model_drops_the_share_of_prompts_that_its_authors_dropped(kind, share, preparers):
    """Guidance needs some, AIA cannot use them. No setting says how many, so a schedule must know by itself."""
    plan = data.Schedule(data.WorldSource(World(0), 4, 0), preparers[kind], 0, 2000, (1, 0), 2000)
    batch, = plan.step(0)
    assert 1 - batch.aia_valid.float().mean().item() == pytest.approx(share, rel=0.2)


@both_kinds
@pytest.mark.parametrize("size, ratio", [(12, (1, 1)), (24, (1, 1, 2))])
def test_a_step_has_the_same_samples_whatever_the_micro_batch(kind, size, ratio, preparers):
    """Records, words and dropped prompts follow from seed and position alone, so memory can be traded for time."""
    def samples(micro_batch):
        return [(b.task, place, tokens[:1 + int((tokens != pad).nonzero().max())].tolist(), bool(valid))
                for b in schedule(preparers[kind], batch_size=size, ratio=ratio, micro_batch=micro_batch).step(2)
                for place, tokens, valid in zip(b.origins, b.tokens, b.per_task(b.aia_valid)[0], strict=True)]
    pad = preparers[kind].text.ids["pad"]
    assert sorted(samples(1)) == sorted(samples(4)) == sorted(samples(64))
    assert {valid for task, *_, valid in samples(64) if task == "gen"} == {True, False}


@both_kinds
def test_samples_of_like_length_share_a_micro_batch(kind, preparers):
    """Cut in order of arrival, short conversations would be padded to long ones; the longest come first."""
    plan = schedule(preparers[kind], n=64, batch_size=128, micro_batch=8, drop=0.0)
    lengths = {task: [batch.lengths for batch in plan.step(0) if batch.task == task] for task in ("gen", "und")}
    arrived = [sum(plan.preparer.batch([plan.record("und", i)[0]]).lengths) for i in range(64)]
    assert sorted(sum(lengths["und"], ())) == sorted(arrived)
    before = 8 * sum(max(arrived[first:first + 8]) for first in range(0, 64, 8)) / sum(arrived) - 1
    for groups in lengths.values():
        assert sum(groups[0]) > sum(groups[-1])
        assert 8 * sum(map(max, groups)) / sum(sum(groups, ())) - 1 < before / 3


def test_steps_follow_one_another_from_where_a_run_goes_on(preparers):
    """Each is prepared while the one before it trains, and none twice."""
    def origins(batches):
        return [batch.origins for batch in batches]
    plan = schedule(preparers["emu3"])
    assert [*map(origins, plan.steps(2, 5))] == [origins(plan.step(step)) for step in (2, 3, 4)]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_out_a_step(processes, preparers):
    """Each sample is one process's, and all meet the same tasks in turn, with empty hands if need be: they wait for
    one another."""
    source = data.WorldSource(World(0), 10, 0)
    plans = [data.Schedule(source, preparers["emu3"], 0, 13, (5, 5, 3), 2, rank=rank, processes=processes)
             for rank in range(processes)]
    shares = [plan.groups(3) for plan in plans]
    assert len({tuple(task for task, _ in share) for share in shares}) == 1
    for task, n in zip(RECORD_TASKS, (5, 5, 3), strict=True):
        mine = sorted(i for share in shares for name, group in share if name == task for i in group)
        assert mine == [*range(3 * n, 4 * n)]


def test_a_fault_in_preparation_names_its_records(preparers, monkeypatch):
    """Batches are prepared beside the training, where a bare traceback would not tell which picture broke a library."""
    def breaks(records, rngs=None, drop=0.0):
        raise MemoryError("a thousand layers")
    plan = schedule(preparers["emu3"], batch_size=4)
    monkeypatch.setattr(plan.preparer, "batch", breaks)
    with pytest.raises(MemoryError) as fault:
        next(plan.steps(0, 2))
    assert re.fullmatch("while preparing world picture [0-9]+, world picture [0-9]+", fault.value.__notes__[0])


def test_epochs_and_seeds_differ_in_order_and_words(preparers):
    """Each epoch of a task is a permutation of its own. A picture that is met again has new words, and what a visit
    draws (its words, whether its prompt is dropped) it shares with no other."""
    source, n = data.WorldSource(World(0), 20, 0), 20
    orders, numbers, words = [], [], []
    for seed, task in itertools.product((0, 1), RECORD_TASKS):
        plan, bare = (data.Schedule(one, preparers["emu3"], seed, 6, (1, 1), 64) for one in (source, Numbered("a", n)))
        met = [plan.record(task, position)[0] for position in range(3 * n)]
        numbers += [bare.record(task, position)[1].random() for position in range(3 * n)]
        epochs = [met[first:first + n] for first in range(0, 3 * n, n)]
        orders += [[record.origin for record in epoch] for epoch in epochs]
        words += [({record.origin: record.turns for record in epoch}, task) for epoch in epochs]
    assert all(len({*order}) == n for order in orders) and len({*map(tuple, orders)}) == len(orders)
    assert len({*numbers}) == len(numbers)
    for (one, task), (other, like) in itertools.combinations(words, 2):
        assert task != like or sum(one[place] == other[place] for place in one) < n / 2
    assert data.WorldSource(World(0), n, 1).scenes != source.scenes


@pytest.mark.parametrize("cell", [8, 16])
def test_conversations_about_the_world_show_what_they_tell(cell):
    """The pictures of a story are drawn from its scenes, whichever scene of the pool it begins with."""
    world = World(0, cell=cell)
    source = data.WorldSource(world, 12, 0)
    for i, scene in enumerate(source.scenes):
        record, story = source.record("mixed", i, random(i)), story_about(world, scene, random(i))
        assert (record.task, record.turns, record.given) == ("mixed", story.turns, story.given)
        scenes, clear = read_scenes(np.stack(record.pictures), world)
        assert scenes == [*story.scenes] and clear.all() and scene in scenes


def test_the_picture_tokenizer_learns_from_fuller_scenes():
    """Pictures of one to four things in any cells, half as many as those to talk about, and none of them held out."""
    source = data.WorldSource(World(0), 200, 0)
    scenes, clear = read_scenes(source.crowded, source.world)
    assert len(scenes) == 100 and clear.all() and {*map(len, scenes)} == {1, 2, 3, 4}
    assert max(len({(thing.shape, thing.colour) for thing in scene}) for scene in scenes) == 4
    assert not any(combinations(scene) & source.world.held_out for scene in scenes)


def test_a_tokenizer_of_conversations_knows_their_words(texts, tmp_path):
    """The plain one spells "make" and "move"; with pieces for them a conversation is a fifth shorter. Special tokens
    keep their ids, so weights of either preset fit."""
    mixed, plain = data.train_tokenizer(tmp_path / "mixed.json", PRESET["emu3"], mixed=True), texts["emu3"]
    lines = [text for said in story_sentences(World(3), 100) for text in said]
    assert sum(len(mixed.encode(text)) for text in lines) < 0.8 * sum(len(plain.encode(text)) for text in lines)
    for text in ("make the", "plan and draw", " to the top"):
        assert len(mixed.encode(text)) == 1 < len(plain.encode(text)), text
    assert mixed.ids == plain.ids


class Numbered:
    """A source of n records of both tasks, each named by its number."""

    def __init__(self, name, n):
        self.name, self.n, self.bad, self.paths = name, n, [], []

    def count(self, task):
        return self.n

    def record(self, task, index, rng=None):
        return Record(f"{self.name}{index}", task, (("?", "!"),), ()) if index < self.n else None


def places(source, p, positions, task="und"):
    plan = data.Schedule(source, p, 0, 4, (1, 1), 4)
    return [plan.record(task, position)[0].origin for position in positions]


def test_every_record_of_joined_sources_comes_once_per_epoch(preparers):
    """Without shares they are one data set, whose records follow from their positions alone."""
    source = Mixture([Numbered("a", 5), Numbered("b", 11)])
    for epoch in (0, 1):
        met = places(source, preparers["emu3"], range(16 * epoch, 16 * epoch + 16))
        assert len(met) == 16 and {*met} == {*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(11))}


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 4), (0.5, 0.25, 7, 1)])
def test_weights_hold_over_any_window_and_each_source_keeps_its_epochs(weights, preparers):
    """Shares come from running totals; a small source with a large weight just goes through more epochs."""
    names, total = "abcd"[:len(weights)], sum(weights)
    texts = [f"{weight}" for weight in weights]
    source = Mixture([Numbered(name, 3 + 2 * i) for i, name in enumerate(names)], [*map(Fraction, texts)])
    met = places(source, preparers["emu3"], range(120))
    for i, name in enumerate(names):
        served = np.cumsum([0, *(place[0] == name for place in met)])
        for window in range(1, 121):
            off = served[window:] - served[:-window] - window * weights[i] / total
            assert abs(off).max() < len(weights)
        mine, n = [place for place in met if place[0] == name], 3 + 2 * i
        epochs = [mine[first:first + n] for first in range(0, len(mine) - n + 1, n)]
        assert all(len({*epoch}) == n for epoch in epochs)
        assert len(epochs) < 4 or len({*map(tuple, epochs)}) > 1
    assert places(source, preparers["emu3"], [77, 5]) == [met[77], met[5]]


def test_a_source_without_a_task_leaves_its_share_to_the_others(album, preparers):
    """Weights count among the sources that have the task at all."""
    source = Mixture([FileSource(album(DRAWN), "emu3"), Numbered("b", 3)], [5, 1])
    assert {*places(source, preparers["emu3"], range(6))} == {"b0", "b1", "b2"}
    assert sum(place[0] == "b" for place in places(source, preparers["emu3"], range(60), "gen")) == 10


def test_a_missing_task_is_named_with_its_ratio(album, preparers):
    """Data of one task alone are usable with a ratio that asks for no other."""
    source = FileSource(album(DRAWN), "emu3")
    with pytest.raises(InputError, match="no record for task 'und'.*--ratio 1:0"):
        data.Schedule(source, preparers["emu3"], 0, 4, (1, 1), 4)
    with pytest.raises(InputError, match="no mixed record: add some, or train with --ratio 1:0$"):
        data.Schedule(source, preparers["emu3"], 0, 4, (1, 0, 1), 4)
    assert {b.task for b in data.Schedule(source, preparers["emu3"], 0, 4, (1, 0), 4).step(0)} == {"gen"}
    source = FileSource(album(DRAWN, MIXED), "emu3")
    with pytest.raises(InputError, match="no record for task 'und': add some, or train with --ratio 1:0:1$"):
        data.Schedule(source, preparers["emu3"], 0, 4, (1, 1, 1), 4)
    assert {b.task for b in data.Schedule(source, preparers["emu3"], 0, 4, (1, 0, 1), 4).step(0)} == {"gen", "mixed"}
