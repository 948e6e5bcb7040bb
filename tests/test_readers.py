"""Claims about files of records in each format (formats/readers.py)."""

import sys
import tarfile

import pytest
from made_data import PUBLIC, add, entry, records, store, write_table

from formats.datasets import FileSource
from formats.readers import data_files, tar_samples
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


# ---------------------------------------------------------------------------------------------------------------------
# Which files
# ---------------------------------------------------------------------------------------------------------------------
def touched(folder, *names):
    """Empty files in a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("names, given, choice", [
    (["train-0.parquet", "train-1.parquet", "test-0.parquet"], "", ['"F/train-*.parquet"', '"F/test-*.parquet"']),
    (["cats_val_0.tar", "cats_train_0.tar", "cats_train_1.tar"], "", ['"F/cats_train_*.tar"', '"F/cats_val_*.tar"']),
    (["train.json", "dev.json"], "*.json", ['"F/train*.json"', '"F/dev*.json"']),
    (["train2017/0.tar", "val2017/0.tar"], "*/*.tar", ['"F/train2017/*.tar"', '"F/val2017/*.tar"']),
    (["validation/0.tar", "x/train-0.tar"], "**/*.tar", ['"F/x/train-*.tar"', '"F/validation/*.tar"'])])
def test_files_of_several_splits_are_no_data_set(names, given, choice, tmp_path):
    """A folder of the hub has train and test beside each other: training on both must be no oversight."""
    folder = touched(tmp_path / "set", *names)
    with pytest.raises(InputError, match="has several splits: give one of") as error:
        data_files(f"{folder}/{given}")
    assert str(error.value).endswith(", ".join(choice).replace("F", str(folder)))
    for pattern in choice:
        _, files = data_files(pattern.replace("F", str(folder)).strip('"'))
        assert {str(file.relative_to(folder)) for file in files} <= {*names}


@pytest.mark.parametrize("names", [["train-0.tar", "train-1.tar"], ["latest-0.tar", "train-0.tar"], ["a.tar", "b.tar"]])
def test_files_of_one_split_are_a_data_set(names, tmp_path):
    """Only whole words tell, and the folder that all share tells nothing."""
    assert len(data_files(touched(tmp_path / "test", *names))[1]) == 2


@pytest.mark.parametrize("names, told", [
    (["data/train-0.parquet", "README.md"], "such as F/data/$"),
    (["dataset_dict.json", "train/data-0.arrow", "test/data-0.arrow"], "such as F/test/, F/train/"),
    (["train.jsonl", "a.png"], "such as F/train.jsonl$"),
    (["a.csv", "b.txt"], "the folder has .csv, .txt.: give .jsonl"),
    ([], "the folder is empty")])
def test_a_folder_that_is_none_of_a_data_set_says_what_to_give(names, told, tmp_path):
    """Mostly the data set is one floor further down."""
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match=told.replace("F", str(tmp_path / "set"))):
        data_files(touched(tmp_path / "set", *names))


def test_braces_name_numbered_files(tmp_path):
    """As WebDataset writes shards; each must be there, or part of the data would be missing without a word."""
    touched(tmp_path, "a-08.tar", "a-09.tar", "a-10.tar")
    _, files = data_files(tmp_path / "a-{08..10}.tar")
    assert [file.name for file in files] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    with pytest.raises(InputError, match="a-07.tar is missing"):
        data_files(tmp_path / "a-{07..10}.tar")
    with pytest.raises(InputError, match="at most 65536 files"):
        data_files(tmp_path / "a-{0..99999999999}.tar")


def test_endings_are_read_in_either_case(tmp_path):
    """Some cameras and servers write capitals."""
    assert data_files(touched(tmp_path / "x", "A.JSON") / "A.JSON")[0] == "json"
    assert data_files(touched(tmp_path / "y", "A.TAR"))[0] == "tar"


def test_quotation_marks_in_a_path_are_named(tmp_path):
    """They come along from a file of settings, and look right in a message."""
    with pytest.raises(InputError, match="begins with a quotation mark.*without"):
        data_files(f"'{touched(tmp_path, 'a.tar')}/a.tar'")
