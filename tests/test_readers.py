"""Claims about files of records in each format (formats/readers.py)."""

import sys
import tarfile

import pytest
from made_data import PUBLIC, add, entry, records, store, write_table

from formats.datasets import FileSource
from formats.readers import tar_samples
from parts.settings import InputError


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_tables_may_hold_captions_plain_bytes_and_several_pictures(form, album, tmp_path):
    """A picture is bytes, or a struct, or a path; words are a conversation, or a caption, which is drawn."""
    album()
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    said = entry("", ("same?", "no"))["conversations"]
    for name, columns in {"x": {"image": [a], "caption": ["a cross"]}, "y": {"image": [b], "text": ["a square"]},
                          "z": {"image": [[a, b]], "conversations": [said]},
                          "w": {"image": [{"bytes": None, "path": "b.png"}], "text": ["by path"]}}.items():
        write_table(tmp_path / f"{name}.{form}", columns)
    found = records(FileSource(tmp_path / f"[w-z].{form}", "emu3"))
    assert [(record.task, record.turns[0][0]) for record in found] == [
        ("gen", "by path"), ("gen", "a cross"), ("gen", "a square"), ("und", "same?")]
    assert [record.pictures for record in found] == [(tmp_path / "b.png",), (a,), (b,), (a, b)]


@pytest.mark.parametrize("text", ['{"a": {"image": "a.png"}}', '[{"image": "a.png"}, {"image": ', "", "[]"])
def test_a_file_that_is_no_array_is_named(text, tmp_path):
    """A download that was cut, an object, or nothing."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="x.json.*(check that it is complete|holds no usable record)"):
        FileSource(tmp_path / "x.json", "emu3", "skip" if text[:1] == "[" else "stop")


@pytest.mark.parametrize("name", ["none.jsonl", "none.tar", "none*.tar", "."])
def test_a_source_without_files_is_named(name, tmp_path):
    """Also a folder or pattern that holds nothing of use."""
    with pytest.raises(InputError, match="data set .* cannot be read .*give .jsonl"):
        FileSource(tmp_path / name, "emu3")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_missing_pyarrow_is_named_with_its_command(form, album, tmp_path, monkeypatch):
    """Only those who have tables need it."""
    album()
    path = store(form, tmp_path, PUBLIC)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=f"{form} is read through pyarrow.*pip install pyarrow$"):
        FileSource(path, "emu3")


@pytest.mark.parametrize("harm", [lambda tar, at: tar[:at], lambda tar, at: tar[:at + 100],
                                  lambda tar, at: tar[:at] + b"x" + tar[at + 1:], lambda tar, at: tar + tar],
                         ids=["cut before a header", "cut in it", "a wrong byte", "two joined"])
def test_a_broken_archive_is_no_shorter_one(harm, tmp_path):
    """tarfile takes any broken header for the end; what is behind it would be missing without a word."""
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(3):
            at = tar.offset
            add(tar, f"{i}.png", b"x")
            add(tar, f"{i}.txt", b"a cat")
    assert len([*tar_samples(file)]) == 3
    file.write_bytes(harm(file.read_bytes(), at))
    with pytest.raises((tarfile.TarError, OSError)):
        [*tar_samples(file)]
