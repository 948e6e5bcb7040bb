"""Claims about single records: fields, layouts and image marks (formats/records.py)."""

import base64
import json
from pathlib import Path

import pytest
from made_data import ASKED, DRAWN, both_kinds, entry, records, write_table
from PIL import Image

from formats.datasets import FileSource
from formats.readers import parse_record
from formats.records import (
    RECORD_TASKS,
    Record,
    check_turns,
    conversation,
    conversation_parts,
    first_question,
    pictures_asked,
    pictures_drawn,
)
from parts.settings import InputError, stream

# Conversation, its task, and its parts turn by turn; below, the pictures of its questions and of its answers.
CONVERSATIONS = {
    "drawing": ([("a cat", "<image>")], "gen", [(["a cat"], [0])], ([], [0])),
    "question": ([("<image>\nwhat is it?", "a cat")], "und", [([0, "what is it?"], ["a cat"])], ([0], [])),
    "question without a mark": ([("what is it?", "a cat"), ("red?", "no")], "und",
                                [([0, "what is it?"], ["a cat"]), (["red?"], ["no"])], ([0], [])),
    "edit": ([("<image>make it red", "<image>")], "mixed", [([0, "make it red"], [1])], ([0], [1])),
    "draw and tell": ([("a cat", "<image>"), ("what is it?", "a cat")], "mixed",
                      [(["a cat"], [0]), (["what is it?"], ["a cat"])], ([], [0])),
    "plan and draw": ([("a cat", "on a mat:\n<image>")], "mixed", [(["a cat"], ["on a mat:", 0])], ([], [0])),
    "mending": ([("a cat", "<image>"), ("is it right?", "no, a dog <image>")], "mixed",
                [(["a cat"], [0]), (["is it right?"], ["no, a dog", 1])], ([], [0, 1])),
    "story": ([("go on: <image> ", "<image> he ran\n<image><image> home "), ("and <image>?", "<image>")], "mixed",
              [(["go on: ", 0], [1, "he ran", 2, 3, "home"]), (["and ", 4, "?"], [5])], ([0, 4], [1, 2, 3, 5]))}


@pytest.mark.parametrize("turns, task, parts, shown", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_pictures_are_numbered_by_their_marks_whoever_says_them(turns, task, parts, shown):
    """The task follows from who shows pictures; blanks of an answer are stripped, behind a mark of a question, too."""
    asked, drawn = shown
    record = Record("x", task, tuple(turns), tuple("abcdef"[:len(asked) + len(drawn)]))
    assert check_turns(turns, len(record.pictures), None) == check_turns(turns, len(record.pictures), task) == task
    assert conversation_parts(turns, len(record.pictures)) == parts
    assert (pictures_asked(record), pictures_drawn(record)) == shown


def test_the_page_shows_a_record_of_each_sort():
    """In its order; what people copy from there must be what is read."""
    page = (Path(__file__).parent.parent / "formats/README.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith('{"image": ')]
    assert tuple(parse_record(line, "x", Path()).task for line in lines) == RECORD_TASKS


def test_an_answer_that_is_still_to_come_stays_none():
    """None asks for an answer, an empty list would be one that says nothing."""
    assert conversation_parts([("a cat", "<image>"), ("red?", None)], 1) == [(["a cat"], [0]), (["red?"], None)]


@pytest.mark.parametrize("marks, pictures", [(1, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("turn", [("M", None), ("red?", "M"), ("red?", "no M")])
def test_marks_must_fit_the_pictures(turn, marks, pictures):
    """Else a picture would be lost, or words would be about one that is not there."""
    turns = [tuple(text and text.replace("M", "<image> and " * marks) for text in turn)]
    with pytest.raises(InputError, match=f"{marks} <image> marks in the conversation for {pictures} pictures"):
        conversation_parts(turns, pictures)


@pytest.mark.parametrize("answer", ["<image>", "here: <image>"])
def test_a_conversation_that_draws_has_a_mark_for_each_picture(answer):
    """That unmarked pictures come first is a rule for questions alone: beside a drawing it would be a guess."""
    with pytest.raises(InputError, match="1 <image> marks .* for 2 pictures"):
        check_turns([("a cat", answer)], 2, None)


@pytest.mark.parametrize("turns, named", [([("a cat", "<image>")], "mixed"), ([("a cat", "so: <image>")], "gen"),
                                          ([("red?", "no")], "mixed")])
def test_a_named_task_is_that_of_the_conversation(turns, named):
    """It is checked and never believed: what a record trains must not hang on a label."""
    with pytest.raises(InputError, match=f"task is '{named}', but by its <image> marks .* leave it out"):
        check_turns(turns, 1, named)


def test_a_conversation_that_goes_on_may_have_drawn_before():
    """Its task tells by what has been said so far."""
    assert conversation([("a cat", "<image>"), ("red?", None)], ["a"]) == Record(
        "the question", "mixed", (("a cat", "<image>"), ("red?", None)), ("a",))
    assert conversation([("<image> red?", None)], ["a"]).task == "und"
    assert conversation([("a cat", "<image>")], ["a"]).task == "mixed"


@pytest.mark.parametrize("first, second, shown", [
    ("see <image>", "like <image>?", 1), ("red?", "and <image><image>?", 0), ("red?", "and blue?", 2)])
def test_a_first_question_takes_its_own_pictures_along(first, second, shown):
    """Those of later questions stay behind; without marks all pictures stand before the first."""
    record = Record("x", "und", ((first, "yes"), (second, "no")), ("a", "b"))
    asked = first_question(record)
    assert asked.turns == ((first, None),) and asked.pictures == ("a", "b")[:shown]


def test_a_first_question_leaves_the_pictures_of_answers_behind():
    """What is drawn later is nothing to look at: the question alone is one to answer."""
    record = Record("x", "mixed", (("like <image>", "so: <image>"), ("red?", "no")), ("a", "b"), given=(1,))
    assert first_question(record) == Record("x", "und", (("like <image>", None),), ("a",))
    assert first_question(Record("x", "mixed", (("a cat", "<image>"), ("red?", "no")), ("a",))).pictures == ()


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


# ---------------------------------------------------------------------------------------------------------------------
# Edits
# ---------------------------------------------------------------------------------------------------------------------
EDIT = {"input_prompt": "make it red", "input_image": "b.png", "output_image": "a.png"}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("starts", ["b.png", ["b.png"], ["b.png", "c.png"]])
def test_edits_of_another_layout_are_conversations(starts, form, album, tmp_path):
    """ShareGPT-4o-Image: what an edit starts from stands before the prompt, the result is the answer. Beside edits, a
    prompt alone is drawn."""
    drawn = {"input_prompt": "a cross", "input_image": None, "output_image": "a.png"}
    entries = [drawn, EDIT | {"input_image": starts}]
    file = album(*entries).with_suffix(f".{form}")
    if form == "json":
        file.write_text(json.dumps([e | {"output_image_resolution": [16, 16]} for e in entries]))
    elif form == "parquet":
        write_table(file, {name: [e[name] for e in entries] for name in drawn})
    names = ["b.png", "c.png"][:2 if len(starts) == 2 else 1]
    assert records(FileSource(file, "emu3")) == [
        Record(f"{file}:1", "gen", (("a cross", "<image>"),), (tmp_path / "a.png",)),
        Record(f"{file}:2", "mixed", (("<image>" * len(names) + "make it red", "<image>"),),
               tuple(tmp_path / name for name in [*names, "a.png"]))]


def test_each_visit_of_an_edit_keeps_its_pictures(album):
    """One of several prompts is drawn, and what it is about still stands before it."""
    source = FileSource(album(EDIT | {"input_prompt": ["one", "two"]}), "emu3")
    visits = {source.record("mixed", 0, stream(0, "record", 0, i)).turns for i in range(20)}
    assert visits == {(("<image>one", "<image>"),), (("<image>two", "<image>"),)}


@pytest.mark.parametrize("change, why", [
    ({"output_image": None}, "an edit needs .*: add output_image"),
    ({"input_prompt": ""}, "an edit needs .*: add input_prompt"),
    ({"input_prompt": "", "output_image": ""}, "add input_prompt and output_image"),
    ({"output_image": None, "image": "a.png"}, "an edit needs .*: add output_image"),
    ({"input_image": 5}, "add input_image .a path or a list"), ({"input_image": ["b.png", None]}, "add input_image .a"),
    ({"input_image": "http://x/b.png"}, "lies on the web"), ({"output_image": ["a.png", "c.png"]}, "2 <image> ma.* 3"),
    ({"input_prompt": "so: <image>"}, "a caption is a text, or a list of texts, without <image>"),
    ({"input_prompt": None, "conversations": ASKED["conversations"]}, "input_image beside conversations: .* in image")])
@pytest.mark.parametrize("strict", [True, False])
def test_half_an_edit_is_told_what_it_lacks(change, why, strict, album):
    """It would otherwise be learned as a plain drawing, of a prompt that makes no sense alone."""
    file = album(EDIT | change)
    if not strict:
        file = file.rename(file.with_suffix(".json"))
        file.write_text(f"[{file.read_text()}]")
    with pytest.raises(InputError, match=why) as error:
        FileSource(file, "emu3")
    assert len(str(error.value)) <= 500 and "\n" not in str(error.value)


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


def test_pictures_in_the_parts_of_an_answer_are_drawn(album, tmp_path):
    """A list of parts has them where they stand, so that they need no list of their own."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "so: "}, {"type": "image", "image": "b.png"}]}
    record, = records(FileSource(album({"messages": [PARTS[0], answer]}), "emu3"))
    assert (record.task, record.turns) == ("mixed", (("<image>red?", "so: <image>"),))
    assert record.pictures == (tmp_path / "a.png", tmp_path / "b.png")


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
    ({"conversations": [{"from": "system", "value": "see <image>"}, *CHAT]}, "turn 1, of the system, has an <image> m"),
    ({"conversations": [{"from": "system", "value": "<image>"}, *said("a cross", "<image>")]}, "turn 1, of the system"),
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
