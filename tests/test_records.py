"""Claims about single records: fields, layouts and image marks (formats/records.py)."""

import base64
import json
import re

import pytest
from made_data import ASKED, DRAWN, both_kinds, entry, records, write_table
from PIL import Image

from formats.datasets import FileSource
from formats.records import Record, first_question, question_parts
from parts.settings import InputError, stream


@pytest.mark.parametrize("marks, pictures", [(1, 0), (2, 1), (1, 2)])
def test_marks_must_fit_the_pictures(marks, pictures):
    """Else a picture would be lost, or a question would ask about one that is not there."""
    with pytest.raises(InputError, match=f"{marks} <image> marks in the questions for {pictures} pictures"):
        question_parts([("<image> and " * marks, None)], pictures)


@pytest.mark.parametrize("first, second, shown", [
    ("see <image>", "like <image>?", 1), ("red?", "and <image><image>?", 0), ("red?", "and blue?", 2)])
def test_a_first_question_takes_its_own_pictures_along(first, second, shown):
    """Those of later questions stay behind; without marks all pictures stand before the first."""
    record = Record("x", "und", ((first, "yes"), (second, "no")), ("a", "b"))
    asked = first_question(record)
    assert asked.turns == ((first, None),) and asked.pictures == ("a", "b")[:shown]


@both_kinds
def test_records_of_both_tasks_are_read(kind, album):
    """The task follows from the conversation; a place names file and line, paths are relative to the file."""
    file = album(DRAWN, "", ASKED | {"task": "und", "id": "x"}, entry(["b.png", "c.png"], ("same?", "no")))
    source = FileSource(file, kind)
    drawn, = source.records["gen"]
    asked, two = source.records["und"]
    assert drawn == Record(f"{file}:1", "gen", (("a red cross", "<image>"),), (file.parent / "a.png",))
    assert asked.origin == f"{file}:3" and asked.turns == (("is it red?", "yes"), ("and blue?", "no"))
    assert two.pictures == (file.parent / "b.png", file.parent / "c.png")


def test_prompts_of_another_layout_are_drawn_and_edits_are_refused(album, tmp_path):
    """ShareGPT-4o-Image has text to picture, which we learn, and picture to picture, which no task here is."""
    album()
    drawn = {"input_prompt": "a cross", "output_image": "a.png", "output_image_resolution": [16, 16]}
    (tmp_path / "4o.json").write_text(json.dumps([drawn, drawn | {"input_image": ["b.png"]}]))
    source = FileSource(tmp_path / "4o.json", "emu3", "skip")
    assert records(source) == [Record(f"{tmp_path / '4o.json'}:1", "gen", (("a cross", "<image>"),),
                                      (tmp_path / "a.png",))]
    assert len(source.bad) == 1 and re.search(r"4o.json:2: .*edits a picture.*leave it out", source.bad[0])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures inside records
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "gif"])
@pytest.mark.parametrize("before", ["data:image/{};base64,", ""])
def test_a_picture_may_stand_in_the_record_as_base64(before, ending, album, tmp_path):
    """In a data URL or bare: either gives the bytes of the file."""
    album()
    Image.open(tmp_path / "a.png").save(tmp_path / f"x.{ending}")
    content = (tmp_path / f"x.{ending}").read_bytes()
    file = album(entry(before.format(ending) + base64.b64encode(content).decode(), ("red?", "no")))
    assert records(FileSource(file, "emu3"))[0].pictures == (content,)


def test_a_file_comes_before_base64(album, tmp_path):
    """A path may begin like a packed picture, such as that of a folder 9j."""
    (tmp_path / "UklGRg").write_bytes((album().parent / "a.png").read_bytes())
    file = album(entry("UklGRg", ("red?", "no")))
    assert records(FileSource(file, "emu3"))[0].pictures == (tmp_path / "UklGRg",)


@pytest.mark.parametrize("image, why", [
    ("https://example.org/a.png", "lies on the web.*not downloaded: give files"),
    ("data:image/png;base64,iVBOR%", "neither a file nor base64.*write a path, or data:image/png;base64,"),
    ("iVBORw0KGgo" + "A" * 100_000, "neither a file nor base64"), ("Qk0" * 100_000, "no path of a file, nor base64"),
    ("a\nb.png", "picture a b.png is no path"), ("\ud800.png", "no path")])
def test_a_picture_that_is_neither_file_nor_base64_is_named_in_one_short_line(image, why, album):
    """A record can be megabytes long, a terminal and an index should not have to hold it."""
    with pytest.raises(InputError, match=why) as error:
        FileSource(album(json.dumps(entry(image, ("red?", "no")))), "emu3")
    assert len(str(error.value)) <= 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"x" * 10_000: 1}, {"task": "x" * 10_000}])
def test_quoted_values_are_cut(change, album):
    """Whatever a record holds, the line about it stays one."""
    with pytest.raises(InputError, match=r"x\.\.\.'") as error:
        FileSource(album(DRAWN | change), "emu3")
    assert len(str(error.value)) <= 500


# ---------------------------------------------------------------------------------------------------------------------
# Layouts of others
# ---------------------------------------------------------------------------------------------------------------------
def said(*texts, who=("from", "human", "gpt"), what="value"):
    """Alternating turns."""
    return [{who[0]: who[1 + i % 2], what: text} for i, text in enumerate(texts)]


CHAT = said("red?", "no", who=("role", "user", "assistant"), what="content")
PARTS = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "red?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
BARE = [PARTS[0] | {"content": [{"type": "image"}, PARTS[0]["content"][1]]}, PARTS[1]]
LAYOUTS = {
    "roles": ({"image": "a.png", "conversations": said("red?", "no", who=("from", "user", "assistant"))}, "red?"),
    "role and content": ({"image": "a.png", "conversations": CHAT}, "red?"),
    "messages": ({"images": ["a.png"], "messages": CHAT}, "red?"),
    "parts": ({"messages": PARTS}, "<image>red?"), "parts beside images": ({"images": "a.png", "messages": BARE},
                                                                          "<image>red?"),
    "JSON text": ({"image": "a.png", "conversations": json.dumps(CHAT)}, "red?"),
    "the cauldron": ({"images": ["a.png"], "texts": [{"user": "red?", "assistant": "no", "source": "x"}]}, "red?"),
    "system": ({"image": "a.png", "conversations": [{"from": "system", "value": "be short"}, *CHAT]},
               "be short\nred?"),
    "prompt": ({"image": "a.png", "prompt": "a cross"}, "a cross"),
    "captions": ({"image": "a.png", "caption": ["a cross", "one"]}, "a cross")}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("fields, asked", LAYOUTS.values(), ids=LAYOUTS)
def test_common_layouts_are_read_in_every_format(fields, asked, form, album, tmp_path):
    """The names differ from tool to tool, the meaning does not."""
    file = album(fields)
    if form == "json":
        file = file.with_suffix(".json")
        file.write_text(json.dumps([fields]))
    elif form == "parquet":
        file = file.with_suffix(".parquet")
        write_table(file, {name: [value] for name, value in fields.items()})
    source = FileSource(file, "emu3")
    record, = records(source)
    assert record.turns == ((asked, "<image>" if record.task == "gen" else "no"),)
    assert record.pictures == (tmp_path / "a.png",)
    assert ("1 with a system turn, joined to the first question" in source.summary()) == ("be short" in asked)


@pytest.mark.parametrize("change, why", [
    ({"conversations": said("hello", "red?", "no", who=("from", "gpt", "human"))}, "turn 1 is of 'gpt'.*human first"),
    ({"conversations": said("red?", "no", "why?")}, "turn 3, the last one, is no answer"),
    ({"conversations": [*CHAT, {"from": "system", "value": "x"}]}, "turn 3 is of 'system'"),
    ({"conversations": said("red?", 5)}, "turn 2 has no text, nor a list of parts of type text or image"),
    ({"conversations": said([{"type": "video"}], "no")}, "turn 1 has no text"),
    ({"conversations": "red?"}, "not JSON.*turns in a text are a JSON list"),
    ({"conversations": []}, "found image, conversations .empty."), ({"image": None}, "found image .empty., conv"),
    ({"conversations": said("red?", "no", "why?", "")}, "question 2: its answer is empty"),
    ({"conversations": said("red\ud800?", "no")}, "a text has half a character"),
    ({"messages": CHAT}, "fields 'conversations' and 'messages' mean the same: give one"),
    ({"conversations": None, "caption": ["a cross", "<image>"]}, "a caption is a text, or a list of texts, without")])
def test_what_is_refused_names_its_turn_or_its_fields(change, why, album):
    """Among ten turns the wrong one is not found by looking."""
    with pytest.raises(InputError, match=why):
        FileSource(album(json.dumps(ASKED | change)), "emu3")


def test_each_visit_draws_one_of_several_captions(album):
    """Seed and position decide, by random numbers of their own: all else that the visit draws stays as it was."""
    source = FileSource(album({"image": "a.png", "caption": ["one", "two", "three"]}, DRAWN), "emu3")
    assert source.record("gen", 0).turns == (("one", "<image>"),)
    drawn = []
    for position in range(60):
        rng, other = stream(0, "record", 0, position), stream(0, "record", 0, position)
        drawn.append(source.record("gen", 0, rng).turns[0][0])
        assert source.record("gen", 0, other).turns[0][0] == drawn[-1] and source.record("gen", 1, other) is not None
        assert rng.random() == other.random() == stream(0, "record", 0, position).random()
    assert min(drawn.count(caption) for caption in ("one", "two", "three")) > 10
    assert drawn != [source.record("gen", 0, stream(1, "record", 0, position)).turns[0][0] for position in range(60)]
