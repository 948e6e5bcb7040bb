"""Claims about files of records in each format (formats/readers.py)."""

import gzip
import json
import sys
import tarfile

import numpy as np
import pyarrow.ipc
import pytest
from made_data import DRAWN, PUBLIC, add, entry, records, store, write_table

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
    (["dataset_dict.json", "train/data-0.arrow", "test/data-0.arrow"], "such as F/test/, F/tr"),
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
        data_files(tmp_path / "a-{0..999}-{0..999}.tar")


def test_endings_are_read_in_either_case(tmp_path):
    """Some cameras and servers write capitals."""
    assert data_files(touched(tmp_path / "x", "A.JSON") / "A.JSON")[0] == "json"
    assert data_files(touched(tmp_path / "y", "A.TAR"))[0] == "tar"


def test_quotation_marks_in_a_path_are_named(tmp_path):
    """They come along from a file of settings, and look right in a message."""
    with pytest.raises(InputError, match="begins with a quotation mark.*without"):
        data_files(f"'{touched(tmp_path, 'a.tar')}/a.tar'")


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------
def shard(folder, *members):
    """A shard of members (name, content)."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return folder / "x.tar"


@pytest.mark.parametrize("names", [["22.0", "22.1", "23.0"], ["track 2.0 a", "track 2.0 b"], ["x.v1/0", "x.v1/1"]])
def test_a_full_stop_in_a_name_parts_samples_where_each_is_whole(names, album, tmp_path):
    """WebDataset takes the name up to the first full stop, by which 22.04 and 22.05 would be one sample."""
    picture = (album().parent / "a.png").read_bytes()
    file = shard(tmp_path, *[(f"{name}.{ending}", content) for name in names
                             for ending, content in (("png", picture), ("txt", name.encode()))])
    found = records(FileSource(file, "emu3"))
    assert [record.turns[0][0] for record in found] == [record.origin.split(":")[1] for record in found] == names


def test_members_with_longer_names_are_parts_of_a_sample(album, tmp_path):
    """0.input.png is the picture of sample 0; of several, all in their order; a plain one comes before them."""
    a, b = ((album().parent / name).read_bytes() for name in ("a.png", "b.png"))
    asked = json.dumps({"conversations": entry("", ("same?", "no"))["conversations"]}).encode()
    file = shard(tmp_path, ("0.input.png", a), ("0.output.txt", b"a cross"), ("1.left.png", a), ("1.right.png", b),
                 ("1.json", asked), ("2.png", b), ("2.mask.png", a), ("2.txt", b"a square"))
    drawn, square, two = records(FileSource(file, "emu3"))
    assert (drawn.pictures, square.pictures, two.pictures) == ((a,), (b,), (a, b))


@pytest.mark.parametrize("fields", [{"caption": "a cross"}, {"prompt": "a cross", "url": "web"}])
def test_the_json_of_a_sample_may_hold_its_caption(fields, album, tmp_path):
    """A .txt beside it comes first, as downloaders write both."""
    picture, packed = (album().parent / "a.png").read_bytes(), json.dumps(fields).encode()
    file = shard(tmp_path, ("0.png", picture), ("0.json", packed),
                 ("1.png", picture), ("1.json", packed), ("1.txt", b"a square"))
    assert [record.turns[0][0] for record in records(FileSource(file, "emu3"))] == ["a cross", "a square"]


@pytest.mark.parametrize("members, found", [([("0.png", b""), ("0.cls", b"3")], ".png, .cls"),
                                            ([("0.png", b""), ("1.txt", b"x")], ".png")])
def test_a_sample_without_words_names_its_members(members, found, tmp_path):
    """The number of a class is no caption, and what does not stand beside the picture is not its."""
    with pytest.raises(InputError, match=f":0: a sample needs a picture.* caption .*: found {found} "):
        FileSource(shard(tmp_path, *members), "emu3")


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not what their names say
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.jsonl.gz", "x.parquet", "x.json"])
@pytest.mark.parametrize("content, remedy", [
    (gzip.compress(b"x"), "compressed with gzip: unpack it, gunzip -c"), (b"PK\x03\x04", "zip archive: unpack"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")], ids=["gzip", "zip", "pointer"])
def test_packed_files_and_pointers_are_known_by_their_first_bytes(name, content, remedy, tmp_path):
    """Whatever they are called; skipping bad records does not help here."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is .*{remedy}"):
        FileSource(tmp_path / name, "emu3", "skip")


def test_an_array_called_jsonl_is_told_its_name(tmp_path):
    """Read line by line, each line would be a bad record."""
    (tmp_path / "x.jsonl").write_text(json.dumps([DRAWN], indent=1))
    with pytest.raises(InputError, match="x.jsonl is one JSON array: let its name end in .json"):
        FileSource(tmp_path / "x.jsonl", "emu3", "skip")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
def test_both_kinds_of_arrow_files_hold_the_same(album, tmp_path):
    """Streams are what datasets writes, files what feather does; the first bytes tell."""
    table = pyarrow.table({"image": [(album().parent / "a.png").read_bytes()] * 2, "text": ["a cross", "one"]})
    for name, writer in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with writer(str(tmp_path / f"{name}.arrow"), table.schema) as out:
            out.write_table(table, max_chunksize=1)
    one, other = (FileSource(tmp_path / f"{name}.arrow", "emu3") for name in ("stream", "file"))
    assert [record.turns for record in records(one)] == [record.turns for record in records(other)]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_without_our_columns_names_those_it_has(form, tmp_path):
    """One line for the file, not one for each of a million rows."""
    write_table(tmp_path / f"x.{form}", {"picture": ["a.png"], "alt": ["a cross"]})
    with pytest.raises(InputError, match='has the columns picture, alt: rename them to "image"'):
        FileSource(tmp_path / f"x.{form}", "emu3", "skip")


def test_an_arrow_stream_that_was_cut_between_batches_is_no_shorter_one(album, tmp_path):
    """Each batch is whole by itself; only the end mark tells that no more were to come."""
    table = pyarrow.table({"image": [(album().parent / "a.png").read_bytes()] * 2, "text": ["a cross", "one"]})
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as out:
        out.write_table(table.slice(0, 1))
        whole = (tmp_path / "x.arrow").stat().st_size
        out.write_table(table.slice(1))
    file = tmp_path / "x.arrow"
    assert len(records(FileSource(file, "emu3"))) == 2
    for size in (whole, file.stat().st_size - 8):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(InputError, match="x.arrow: cannot be read to its end .the stream has no end mark"):
            FileSource(file, "emu3")


def test_wrong_offsets_in_an_arrow_file_are_an_error(tmp_path):
    """The file is mapped into memory, and reading outside of it would end the process without a word."""
    write_table(tmp_path / "x.arrow", {"image": ["a.png"], "text": ["a" * 1234]})
    content = (tmp_path / "x.arrow").read_bytes()
    at = content.rindex(np.array([0, 1234], "<i4").tobytes())
    (tmp_path / "x.arrow").write_bytes(content[:at + 4] + b"\xff\xff\xff\x7f" + content[at + 8:])
    with pytest.raises(InputError, match="x.arrow: cannot be read to its end .*(offset|Offset|length)"):
        FileSource(tmp_path / "x.arrow", "emu3")


@pytest.mark.parametrize("text", ['[X rubbish, X]', '[X X]', '[X,, X]', '[X, 5, X]', '["x", X]', '[, X]', '[X,]',
                                  '[X] [X]', '[X]]', 'x[X]', '[X, X'])
def test_rubbish_between_the_records_of_an_array_is_refused(text, album, tmp_path):
    """A file that was damaged, or joined by hand, may have lost records there."""
    album()
    (tmp_path / "good.json").write_text(f" [ {json.dumps(DRAWN)}\n ,{json.dumps(DRAWN)} ] \n")
    assert len(records(FileSource(tmp_path / "good.json", "emu3"))) == 2
    (tmp_path / "x.json").write_text(text.replace("X", json.dumps(DRAWN)))
    with pytest.raises(InputError, match="x.json: cannot be read to its end"):
        FileSource(tmp_path / "x.json", "emu3")


def test_long_paths_and_many_names_leave_a_message_short(tmp_path):
    """A terminal shows some lines, and the remedy stands at the end."""
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    touched(deep, *[f"{i}{'x' * 200}.csv" for i in range(9)], "z.tar.gz", "many/train-0.tar", "many/test-0.tar")
    (deep / "z.tar.gz").write_bytes(b"\x1f\x8b")
    write_table(deep / "x.parquet", {"c" * 500: [1]})
    for given in (deep, deep / "many", deep / "none.tar", deep / "z.tar.gz", deep / "x.parquet", deep / "0*.csv"):
        with pytest.raises(InputError) as error:
            FileSource(given, "emu3", "skip")
        assert len(str(error.value)) <= 500
