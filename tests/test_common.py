"""Claims about what the benchmarks share (benchmarks/common.py). Asking and drawing: see test_score.py."""

import pytest
from made_benchmarks import png, written
from PIL import Image

from benchmarks.common import Item, find_file, mmbench_letter, rgb, table
from parts.settings import InputError

DOOR = {"A": "Open", "B": "Closed"}


@pytest.mark.parametrize("pred, letter", [
    ("Open", "A"), ("open", "open"), ("(a)", "(a)"), ("Because", "B"), ("", ""), (" \n", ""), ("b", "b"),
    ("It is Closed", "B"), ("Ajar", "A"), ("A.", "A"), ("B", "B"), (" A. Open\n", "A"), ("B, not Open", "B"),
    ("C.", "C.")])
def test_mmbench_letter_reads_the_first_letter_and_leaves_what_it_cannot_read(pred, letter):
    """"A." is the commonest answer of all. Unlike MMMU's rule it never guesses: the text stays and scores as wrong."""
    assert mmbench_letter(pred, DOOR) == letter


def test_a_benchmarks_file_is_found_only_if_there_is_no_choice(tmp_path):
    """The first of several in the alphabet would be scored without a word; a file is taken only where it can be all of
    --data."""
    with pytest.raises(InputError, match=r"holds no a\*.tsv or b.tsv: give --data the benchmark"):
        find_file(tmp_path, "a*.tsv", "b.tsv")
    one = written(tmp_path / "a1.tsv")
    assert find_file(tmp_path, "a*.tsv", "a1.tsv") == find_file(one, "x", itself=True) == one
    with pytest.raises(InputError, match="a1.tsv is a file: give the folder of the benchmark"):
        find_file(one, "a*.tsv")
    written(tmp_path / "sub/b.tsv")
    with pytest.raises(InputError, match=r"holds 2 candidates \(a1.tsv, sub/b.tsv\): keep only one there"):
        find_file(tmp_path, "a*.tsv", "*/b.tsv")
    with pytest.raises(InputError, match="give --data the file itself"):
        find_file(tmp_path, "a*.tsv", "*/b.tsv", itself=True)


@pytest.mark.parametrize("encoding, readable", [("utf-8", True), ("utf-8-sig", True), ("utf-16", False),
                                                ("utf-16-le", False), ("latin-1", False)])
def test_a_table_is_utf8_or_refused_by_name(encoding, readable, tmp_path):
    """Excel marks UTF-8 with three bytes, which belong to no column's name; other encodings would give wrong words."""
    file = written(tmp_path / "a.csv", "name,other\n\xe9,two\xa0lines\n".encode(encoding))
    if readable:
        (_, row), = table(file, "name", "other")
        assert row == {"name": "\xe9", "other": "two\xa0lines"}
    else:
        with pytest.raises(InputError, match="a.csv: the text is"):
            table(file, "name")


def test_only_line_ends_end_a_record(tmp_path):
    """U+2028 may stand in a question. A table without records was cut short."""
    (_, row), = table(written(tmp_path / "a.csv", "name\r\ntwo\u2028lines\r\n"), "name")
    assert row == {"name": "two\u2028lines"}
    with pytest.raises(InputError, match="a.csv holds no rows"):
        table(written(tmp_path / "a.csv", "name\n"), "name")


def test_transparency_is_white_for_mmmu_and_dropped_elsewhere(tmp_path):
    """AIA's reader of MMMU pastes on white, the others just convert to RGB; a palette may be transparent too."""
    half = Item("1", "", png((255, 0, 0, 128), "RGBA"), {})
    assert rgb(half, "mmmu")[0, 0].tolist() == [255, 127, 127]
    assert rgb(half, "mmbench")[0, 0].tolist() == [255, 0, 0]
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert rgb(Item("1", "", tmp_path / "p.png", {}), "mmmu").min() == 255
