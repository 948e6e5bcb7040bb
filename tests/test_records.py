"""Claims about single records: fields, layouts and image marks (formats/records.py)."""

import base64
import json
import re

import pytest
from made_data import ASKED, DRAWN, both_kinds, entry, records
from PIL import Image

from formats.datasets import FileSource
from formats.records import Record, question_parts
from parts.settings import InputError


@pytest.mark.parametrize("marks, pictures", [(1, 0), (2, 1), (1, 2)])
def test_marks_must_fit_the_pictures(marks, pictures):
    """Else a picture would be lost, or a question would ask about one that is not there."""
    with pytest.raises(InputError, match=f"{marks} <image> marks in the questions for {pictures} pictures"):
        question_parts([("<image> and " * marks, None)], pictures)


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
