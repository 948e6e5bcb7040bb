"""Claims about single records: fields, layouts and image marks (formats/records.py)."""

import json
import re

import pytest
from made_data import ASKED, DRAWN, both_kinds, entry, records

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
