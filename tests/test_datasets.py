"""Claims about data sets on disk: published formats, the index, stored codes, refusals (formats/datasets.py)."""

import functools
import json
import os
import shutil
import tarfile
import time

import numpy as np
import pyarrow
import pytest
import torch
from made_data import (
    ALBUM,
    ASKED,
    DRAWN,
    MIXED,
    PRESET,
    PUBLIC,
    SHARDED,
    add,
    encode,
    entry,
    random,
    records,
    store,
    write_table,
)
from safetensors.torch import save_file

import aia
import data
import formats.datasets
from formats.datasets import (
    ENCODING,
    Encoded,
    FileSource,
    bad_report,
    every,
    fingerprint,
    index_file,
    open_sources,
    parse_ratio,
    picture_key,
    square_pictures,
)
from formats.records import RECORD_TASKS, pictures_asked, pictures_drawn
from parts.pictures import janus_picture, load_picture, to_picture
from parts.settings import InputError


# ---------------------------------------------------------------------------------------------------------------------
# Data sets as they are published
# ---------------------------------------------------------------------------------------------------------------------
def content(record):
    return record.task, record.turns, [load_picture(p, "emu3").tobytes() for p in record.pictures]


def index(*paths):
    data.main(["index", *map(str, paths)])


@pytest.mark.parametrize("form", ["json", *SHARDED])
def test_published_formats_hold_the_same_records(form, album, tmp_path, preparers):
    """Where a record is stored changes neither its words nor its pixels, nor the batch that it becomes."""
    own, public = (FileSource(path, "emu3") for path in (album(*PUBLIC), store(form, tmp_path, PUBLIC)))
    assert [content(record) for record in records(public)] == [content(record) for record in records(own)]
    for task in aia.TASKS:
        one, other = (preparers["emu3"].batch(list(every(source, task))) for source in (own, public))
        assert torch.equal(one.tokens, other.tokens)
    names = [picture_key(p) for source in (own, public) for record in records(source) for p in record.pictures]
    assert len(set(names)) == 3 and names[:3] == names[3:]


@pytest.mark.parametrize("form", ["jsonl", "json", *SHARDED])
def test_an_index_finds_what_direct_reading_finds(form, album, tmp_path, capsys):
    """The index holds places alone, 16 bytes each: records, order and the places in messages stay."""
    path = album(*PUBLIC) if form == "jsonl" else store(form, tmp_path, PUBLIC)
    direct = records(FileSource(path, "emu3"))
    index(path)
    assert "2 records to draw, 1 to answer" in capsys.readouterr().out
    assert np.load(index_file(path)).dtype.itemsize == 16
    source = FileSource(path, "emu3")
    assert isinstance(source.records["gen"], np.memmap) and records(source) == direct and len(direct) == 3


@pytest.mark.parametrize("path, expected", [
    ("a/train.jsonl", "a/train.jsonl.index.npy"), ("a/shards/", "a/shards.index.npy"),
    ("a/x-*.tar", "a/x-_.tar.index.npy"), ("a/*/b-?.tar", "a/_b-_.tar.index.npy"), ("*.tar", "_.tar.index.npy")])
def test_an_index_has_the_documented_name(path, expected):
    """Beside the data, and for a pattern in the last folder that has a name."""
    assert str(index_file(path)) == expected


@pytest.mark.parametrize("change", ["longer", "touched", "come", "gone"])
def test_an_index_of_files_that_have_changed_is_refused(change, album, tmp_path):
    """Offsets into other bytes would read nonsense; the message says which file and what to run."""
    path = store("tar", tmp_path, PUBLIC)
    index(path)
    FileSource(path, "emu3")
    if change == "longer":
        (path / "1.tar").write_bytes((path / "1.tar").read_bytes() + bytes(512))
    elif change == "touched":
        os.utime(path / "1.tar", (0, 0))
    else:
        os.replace(path / "1.tar", path / ("2.tar" if change == "come" else "1.old"))
    with pytest.raises(InputError, match=r"[12]\.tar has changed, come or gone since .*run python data.py index .*tar"):
        FileSource(path, "emu3")
    index(path)
    assert len(records(FileSource(path, "emu3"))) == (2 if change == "gone" else 3)


@pytest.mark.parametrize("entries, count", [(["MIXED", "ASKED", "DRAWN", "MIXED"], (1, 1, 2)), (["MIXED"], (0, 0, 1)),
                                            (["ASKED", "MIXED"], (0, 1, 1)), (["DRAWN"], (1, 0, 0))])
def test_an_index_parts_the_three_sorts_of_records(entries, count, album, capsys):
    """They lie in one array behind one another, whatever order they have in the file, and any of them may be absent."""
    path = album(*({"MIXED": MIXED, "ASKED": ASKED, "DRAWN": DRAWN}[name] for name in entries))
    direct = FileSource(path, "emu3")
    index(path)
    found = FileSource(path, "emu3")
    assert tuple(found.count(task) for task in RECORD_TASKS) == tuple(map(len, found.records.values())) == count
    assert records(found) == records(direct) and found.identity() == direct.identity()
    assert [record.task for record in records(found)] == [task for task, n in zip(RECORD_TASKS, count, strict=True)
                                                          for _ in range(n)]


def test_an_index_from_before_mixed_records_is_refused(album, tmp_path):
    """Those that it left out would be missing without a word; the message names what to run."""
    path = album(DRAWN, ASKED)
    index(path)
    old = index_file(path).read_bytes()
    index_file(path).write_bytes(old.replace(b', "mixed": 0', b""))
    with pytest.raises(InputError, match=f"was written before .* mixed .*run python data.py index {path} again"):
        FileSource(path, "emu3")
    with pytest.raises(InputError, match=f"run python data.py index {path} again"):
        FileSource(shutil.copy(index_file(path), tmp_path / "x.index.npy"), "emu3")
    index(path)
    assert index_file(path).read_bytes() == old and len(records(FileSource(path, "emu3"))) == 2


def test_a_killed_index_leaves_the_last_one(album, tmp_path, monkeypatch):
    """It is written under another name and renamed: there is none, or the old one, or all of the new one."""
    path = album(*PUBLIC)

    def half(out, array, **kwargs):
        out.write(bytes(40))
        raise KeyboardInterrupt
    for stored in (None, index_file(path)):
        before = stored and stored.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(np, "save", half)
            index(path)
        assert (index_file(path).read_bytes() if stored else index_file(path).exists() or None) == before
        assert len(records(FileSource(path, "emu3"))) == 3
        index(path)
    index_file(path).write_bytes(bytes(40))
    with pytest.raises(InputError, match="index.npy is broken.*run python data.py index"):
        FileSource(path, "emu3")


@pytest.mark.parametrize("form", ["jsonl", *SHARDED])
def test_an_index_elsewhere_stands_for_its_data_set(form, album, tmp_path):
    """Public data often lie on a read-only disk. The index may be moved, and still sees that the data have changed."""
    path = album(*PUBLIC, "rotten") if form == "jsonl" else store(form, tmp_path, PUBLIC)
    direct = records(FileSource(path, "emu3", "skip"))
    (tmp_path / "elsewhere").mkdir()
    index(path, "--out", tmp_path / "elsewhere/x.index.npy")
    assert not index_file(path).exists()
    moved = tmp_path / "moved.index.npy"
    os.replace(tmp_path / "elsewhere/x.index.npy", moved)
    source = FileSource(moved, "emu3")
    assert records(source) == direct and len(direct) == 3 and source.summary().startswith(f"{moved}: ")
    if form == "jsonl":
        listed = tmp_path / "elsewhere/x.bad.txt"
        assert listed.read_text().splitlines() == source.bad and len(source.bad) == 1
        assert f"\n  {path}: 1\n" in bad_report(source.bad, source.paths)
    os.utime(source.files[0], (0, 0))
    with pytest.raises(InputError, match="has changed, come or gone"):
        FileSource(moved, "emu3")


def test_a_place_that_cannot_be_written_shows_before_the_pass(album, tmp_path, monkeypatch):
    """Which may take hours; the message names the flag for another place."""
    file = album(DRAWN)
    monkeypatch.setattr(formats.datasets, "make_index", None)
    (tmp_path / "train.jsonl.index.npy.part/x").mkdir(parents=True)             # as good as a read-only disk
    with pytest.raises(InputError, match="train.jsonl.index.npy cannot be written .*--out FILE.index.npy"):
        index(file)
    for flags, why in (("--out", "x.npy"), "end in .index"), ((file, "--out", "x.index.npy"), "just one with --out"):
        with pytest.raises(InputError, match=why):
            index(file, *flags)


def test_an_index_is_not_indexed(tmp_path):
    """It is no text either, whatever its bytes look like."""
    with pytest.raises(InputError, match="a.index.npy is an index already"):
        data.index(data.Index((str(tmp_path / "a.index.npy"),)))


def test_the_index_names_and_counts_bad_records_and_leaves_them_out(album, tmp_path, capsys):
    """20 are shown, all are listed; a shard that ends too soon gives what it has."""
    good = [(f"{i}.{ending}", content) for i in range(3)
            for ending, content in (("png", (album().parent / "a.png").read_bytes()), ("txt", b"a cross"))]
    bad = [("no words.png", good[0][1]), ("no picture.txt", b"a cross"), ("x.png", b"text"), ("x.txt", b"a cross")]
    bad += [(f"empty{i}.txt", b"") for i in range(20)]
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name, content in good[:2] + bad + good[2:]:
            add(tar, name, content)
    packed = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "all.tar").write_bytes(packed[:packed.rindex(b"2.png") + 600])           # within its pixels
    index(tmp_path / "all.tar")
    out, listed = capsys.readouterr().out, (tmp_path / "all.tar.bad.txt").read_text().splitlines()
    assert f"24 bad records were left out:\n  {tmp_path / 'all.tar'}: 24\n" in out and "  and 4 more\n" in out
    for text, name, why in zip(listed[:3], ["no words", "no picture", "x"], ["caption", "needs a picture", "cannot be"],
                               strict=True):
        assert text.startswith(f"{tmp_path / 'all.tar'}:{name}: ") and why in text and text in out
    assert len(listed) == 24 and listed[-1] not in out and "cannot be read to its end" in listed[-1]
    source = FileSource(tmp_path / "all.tar", "emu3")
    assert [record.origin[-2:] for record in records(source)] == [":0", ":1"] and source.bad == listed
    index_file(tmp_path / "all.tar").unlink()
    with pytest.raises(InputError, match="all.tar:no words: .*--on-bad-record skip"):
        FileSource(tmp_path / "all.tar", "emu3")


@pytest.mark.parametrize("texts", [["a=0"], ["a=1", "b"], ["a=1.2.3", "b=1"], ["a=1", "b=0.0"]])
def test_weights_are_numbers_above_zero_for_all_or_none(texts):
    """A data set with no weight among others with one has no share that could be meant."""
    with pytest.raises(InputError, match="give each data set a share above 0 .PATH=SHARE., or none"):
        open_sources(texts, "emu3")


def test_bad_records_are_counted_by_data_set(album, tmp_path):
    """Of several data sets one may be rotten, which a list of lines does not show."""
    store("tar", tmp_path, PUBLIC)
    (tmp_path / "tar/1.tar").write_bytes(b"rotten" * 200)
    source = open_sources([f"{album(DRAWN, 'rotten', 'rotten')}=2", f"{tmp_path}/./tar/=.5"], "emu3", "skip")
    assert source.shares == [2, 0.5] and [source.count(task) for task in aia.TASKS] == [2, 1]
    report = bad_report(source.bad, source.paths).splitlines()
    assert report[0].startswith("3 bad") and report[1:3] == [f"  {tmp_path}/train.jsonl: 2", f"  {tmp_path}/./tar/: 1"]
    assert len(report) == 6


def test_a_million_bad_records_are_counted_but_not_all_described(album, monkeypatch):
    """The index of a rotten data set would be larger than the data; the report still says how many there are."""
    monkeypatch.setattr(formats.datasets, "LISTED", 3)
    file = album(DRAWN, *["rotten"] * 10)
    index(file)
    listed = (file.parent / "train.jsonl.bad.txt").read_text().splitlines()
    assert len(listed) == 4 and listed[-1] == f"{file}:5 and later: 7 more bad records"
    assert bad_report(FileSource(file, "emu3").bad, [file]).splitlines()[:2] == [
        "10 bad records were left out:", f"  {file}: 10"]


def test_the_picture_tokenizer_learns_from_all_pictures_once(album):
    """Those to draw and those of questions, of mixed records too, cut to the square that is drawn."""
    config, file = PRESET["emu3"], album(*ALBUM, entry(["c.png", "huge.png"], ("<image>noise", "so: <image>")))
    found = square_pictures(FileSource(file, "emu3"), config, [], True)
    expected = [to_picture(janus_picture(load_picture(file.parent / f"{name}.png", "emu3"), config))
                for name in ("a", "b", "c", "huge")]
    assert len(found) == 4 and all(map(np.array_equal, found, expected))


def test_a_source_says_what_it_holds(album, tmp_path):
    """One line of each data set, so that the start of a run shows what it trains on."""
    store("tar", tmp_path, PUBLIC)
    file = album(DRAWN, "rotten")
    source = open_sources([str(file), str(tmp_path / "tar")], "emu3", "skip")
    assert source.summary().splitlines() == [
        f"{file}: 1 file, 1 records to draw, 0 to answer, 1 left out",
        f"{tmp_path / 'tar'}: 2 files, 2 records to draw, 1 to answer"]
    file = album(MIXED, DRAWN, "rotten", MIXED)
    assert open_sources([str(file)], "emu3", "skip").summary() == \
        f"{file}: 1 file, 1 records to draw, 0 to answer, 2 mixed, 1 left out"


@pytest.mark.parametrize("form", ["jsonl", "json", *SHARDED])
def test_data_keep_their_identity_when_they_move(form, album, tmp_path):
    """It is that of the content: not of paths or times, with or without an index; other records make another one."""
    path = album(*PUBLIC) if form == "jsonl" else store(form, tmp_path, PUBLIC)
    identity = FileSource(path, "emu3").identity()
    assert json.loads(json.dumps(identity)) == identity and (identity["gen"], identity["und"]) == (2, 1)
    index(path)
    assert FileSource(path, "emu3").identity() == identity
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    index_file(moved / path.name).unlink()
    assert FileSource(moved / path.name, "emu3").identity() == identity
    index_file(path).unlink()
    if path.is_dir():
        shutil.rmtree(path)
    other = [entry("a.png", ("a red cross!", "<image>")), *PUBLIC[1:]]
    changed = album(*other) if form == "jsonl" else store(form, tmp_path, other)
    assert FileSource(changed, "emu3").identity() != identity


def test_mixed_records_leave_the_identity_of_other_data_alone(album):
    """A run that was made before there were any must still know its data: this is what its checkpoints hold."""
    assert FileSource(album(*PUBLIC), "emu3").identity() == \
        {"gen": 2, "und": 1, "content": "777ca5b4e338aeab2744277373782729"}
    one, other = (FileSource(album(*PUBLIC, MIXED | {"id": name}), "emu3").identity() for name in ("a", "bc"))
    assert one["mixed"] == other["mixed"] == 1 and one["content"] != other["content"]


def test_mixed_records_of_several_data_sets_are_joined(album, tmp_path):
    """They have an order of their own, in which one data set stands behind the other."""
    (tmp_path / "x.json").write_text(json.dumps([DRAWN, MIXED | {"image": ["c.png", "a.png"]}]))
    source = open_sources([str(album(MIXED, ASKED)), str(tmp_path / "x.json")], "emu3")
    assert [source.count(task) for task in RECORD_TASKS] == [1, 1, 2]
    assert [record.pictures[0].name for record in every(source, "mixed")] == ["b.png", "c.png"]


def test_the_identity_of_a_mixture_has_its_shares(album, tmp_path):
    """Other shares give other samples at the same step."""
    store("tar", tmp_path, PUBLIC)
    paths = [str(album(DRAWN)), f"{tmp_path}/tar"]
    one, two, joined = (open_sources(texts, "emu3").identity() for texts in (
        [f"{paths[0]}=1", f"{paths[1]}=2"], [f"{paths[0]}=1", f"{paths[1]}=.5"], paths))
    assert one["sources"] == two["sources"] == joined["sources"] and len(one["sources"]) == 2
    assert (one["shares"], two["shares"], joined["shares"]) == (["1", "2"], ["1", "1/2"], [])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures encoded once
# ---------------------------------------------------------------------------------------------------------------------
def test_codes_of_other_weights_or_another_resizing_are_refused(saved, album, tmp_path, monkeypatch):
    """They would train the model on noise without any error; so would those of the same weights used otherwise."""
    (m, init), file = saved("janus"), album(*ALBUM)
    encode(tmp_path / "codes", file, init, "--features")
    Encoded(tmp_path / "codes", m)
    others = {"codes": [saved("janus", 1)[0], saved("janus", vq_mult=(1, 1))[0]], "features": [saved("janus")[0]]}
    with torch.no_grad():
        others["features"][0].vision.norm.bias += 1e-6
    for name, models in others.items():
        for other in models:
            with pytest.raises(InputError, match=rf"codes/000-0000\d.safetensors.*\({name} \w+, here \w+\).*again"):
                Encoded(tmp_path / "codes", other)
    (emu, _), (larger, _) = saved("emu3"), saved("emu3", image_size=32, max_pixels=32 * 32)
    assert emu.vq.state_dict().keys() == larger.vq.state_dict().keys()
    larger.vq.load_state_dict(emu.vq.state_dict())
    assert Encoded(tmp_path / "no", emu, new=True).fingerprints != \
        Encoded(tmp_path / "no", larger, new=True).fingerprints
    monkeypatch.setattr(formats.datasets, "ENCODING", ENCODING + 1)
    with pytest.raises(InputError, match="encode again"):
        Encoded(tmp_path / "codes", m)


def test_a_resizing_is_known_by_small_and_by_large_pictures():
    """Some differ in one of them only, such as in how they halve what is much too large."""
    def resize(most, least=0):
        def resized(picture, config):
            return torch.full((1,), float(least <= max(picture.size) <= most))
        return resized
    tower = torch.nn.Linear(1, 1)
    prints = [fingerprint(tower, one, None) for one in (resize(-1), resize(200), resize(9999, 500), resize(9999))]
    assert len({*prints}) == 4 and prints[0] == fingerprint(tower, resize(-1), None)


def test_processes_share_the_encoding(saved, album, tmp_path, monkeypatch):
    """Each writes its own files, of other pictures; together they are all."""
    (m, _), source = saved("emu3"), FileSource(album(*(entry(f"{name}.png", ("?", "no")) for name in "abc")), "emu3")
    store, made = Encoded(tmp_path, m, new=True), []

    def encoded(pictures):
        made.append(pictures)
        return [torch.zeros(1) for _ in pictures]
    for number in (0, 1):
        monkeypatch.setattr(formats.datasets, "rank", lambda number=number: number)
        monkeypatch.setattr(formats.datasets, "processes", lambda: 2)
        store.fill("codes", source, ("gen", "und"), encoded, stop=True)
    names = [[picture.name for picture in some] for some in made]
    assert names == [["a.png", "c.png"], ["b.png"]]
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == ["000-00000.safetensors",
                                                                            "001-00000.safetensors"]
    assert len(Encoded(tmp_path, m).parts) == 3


@pytest.mark.parametrize("tasks, which, names", [
    (("gen", "mixed"), pictures_drawn, ["a.png", "c.png"]), (("und", "mixed"), pictures_asked, ["b.png"]),
    (RECORD_TASKS, pictures_drawn, ["a.png", "c.png"]), (RECORD_TASKS, None, ["a.png", "b.png", "c.png"])])
def test_only_the_pictures_that_are_needed_are_encoded(tasks, which, names, saved, album, tmp_path):
    """Janus-Pro needs codes of what answers draw, and features of what questions show; Emu3 needs codes of all."""
    (m, _), source, made = saved("janus"), FileSource(album(DRAWN, ASKED, MIXED), "janus"), []

    def encoded(pictures):
        made.extend(picture.name for picture in pictures)
        return [torch.zeros(1) for _ in pictures]
    Encoded(tmp_path, m, new=True).fill("codes", source, tasks, encoded, True, which)
    assert sorted(made) == names
    assert sorted(Encoded(tmp_path, m).parts) == sorted(f"codes/{picture_key(tmp_path / name)}" for name in names)


def test_a_broken_store_is_named(saved, tmp_path):
    """A truncated file of codes is one clear line; so is a folder that holds none."""
    m, _ = saved("emu3")
    with pytest.raises(InputError, match="codes holds no encoded pictures.*data.py encode"):
        Encoded(tmp_path / "codes", m)
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/000-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="000-00000.safetensors is broken.*run data.py encode again"):
        Encoded(tmp_path / "codes", m)


def test_encoding_goes_on_where_it_stopped(saved, album, tmp_path, monkeypatch, capsys):
    """Files are written whole or not at all, and what they hold is not made again."""
    (_, init), file = saved("emu3"), album(*ALBUM)
    monkeypatch.setattr(formats.datasets, "TOGETHER", 1)
    monkeypatch.setattr(formats.datasets, "PICTURES_A_FILE", 1)
    save = save_file

    def killed(tensors, path, metadata):
        save(tensors, path, metadata)
        if "00001" in str(path):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(formats.datasets, "save_file", killed)
        encode(tmp_path / "codes", file, init)
    assert [path.name for path in (tmp_path / "codes").glob("*.safetensors")] == ["000-00000.safetensors"]
    encode(tmp_path / "codes", file, init)
    assert "codes: 2 pictures encoded, 1 were there" in capsys.readouterr().out
    (tmp_path / "codes/000-00001.safetensors").unlink()        # a lost file is replaced under a new name
    encode(tmp_path / "codes", file, init)
    assert "codes: 1 pictures encoded, 2 were there" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_shuffling_is_a_permutation_for_every_key(n):
    """Each place alone is enough to know what stands there, in whatever order one asks."""
    orders = [[formats.datasets.shuffled(i, n, (seed, epoch)) for i in range(n)] for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] == [formats.datasets.shuffled(i, n, (0, 0)) for i in reversed(range(n))][::-1]
    assert n < 7 or len({*map(tuple, orders)}) == 4


def test_shuffling_prefers_no_place():
    """Over many keys each of 20 things comes first about as often, and second after a given first one, too."""
    firsts = [tuple(formats.datasets.shuffled(i, 20, key) for i in (0, 1)) for key in range(4000)]
    first, second = np.bincount([a for a, _ in firsts]), np.bincount([(b - a) % 20 for a, b in firsts])
    assert len(first) == 20 and abs(first - 200).max() < 70                     # five standard deviations
    assert second[0] == 0 and abs(second[1:] - 4000 / 19).max() < 70


# ---------------------------------------------------------------------------------------------------------------------
# Records that cannot be used
# ---------------------------------------------------------------------------------------------------------------------
def test_text_may_hold_any_line_separator_but_the_newline(album):
    """JSON allows U+2028 and its like inside a string, and captions from the web have them: they end no record."""
    file = album(DRAWN, entry("a.png", ("a\u2028red\x85cross", "<image>")))
    assert [record.turns[0][0] for record in FileSource(file, "emu3").records["gen"]][1] == "a\u2028red\x85cross"


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_file_without_records_is_refused(content, tmp_path):
    """The message names the file, not a place inside the program."""
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"data set {tmp_path / 'train.jsonl'} .*(give|see)"):
        FileSource(tmp_path / "train.jsonl", "emu3")


def test_one_bad_byte_costs_one_record(album):
    """A mark of UTF-8 at the start is none; a line that is not UTF-8 is a bad record as any other."""
    file = album(DRAWN, ASKED)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join([lines[0], lines[1].replace(b"yes", b"\xff"), lines[1]]))
    source = FileSource(file, "emu3", "skip")
    assert [source.count(task) for task in aia.TASKS] == [1, 1]
    assert len(source.bad) == 1 and ":2: the text is not UTF-8 from byte" in source.bad[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_lines_in_utf_16_are_no_records(encoding, album):
    """json.loads guesses the encoding of bytes; of a line from the middle of such a file it guesses other words."""
    file = album(DRAWN, ASKED)
    file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    with pytest.raises(InputError, match=":1: the text is UTF-16 or UTF-32: save it as UTF-8"):
        FileSource(file, "emu3")
    with pytest.raises(InputError, match="holds no usable record"):
        FileSource(file, "emu3", "skip")


ODD = [None, True, 5, -1e300, "", " ", "x" * 100_000, "\ud800", "a\nb\0", "\u202e", "<image>" * 50, "../../..", "~",
       "data:image/png;base64,AAAA", "iVBORw0KGgo", "http://x", [], [None], [[]], {}, {"bytes": 5, "path": None},
       {"bytes": b"x", "path": None}, {"type": "image"}, {"from": ["human"]}, {"user": 5}, [{"user": "a"}], ["a"] * 999,
       functools.reduce(lambda inner, _: [inner], range(300), "deep")]
FIELDS = ["image", "images", "conversations", "messages", "texts", "caption", "prompt", "task", "input_image", "x"]


def damaged(value, rng):
    """A record with one of its values, at any depth, replaced by an odd one, or with one field more."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice([*value, *FIELDS[:3]])
        return value | {str(key): damaged(value.get(str(key)), rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.integers(len(value))
        return [*value[:i], damaged(value[i], rng), *value[i + rng.integers(2):]]
    if isinstance(value, dict) and rng.random() < 0.5:
        return value | {str(rng.choice(FIELDS)): ODD[rng.integers(len(ODD))]}
    return ODD[rng.integers(len(ODD))]


def torn(content, rng):
    """The bytes of a file, cut, swapped, overwritten, doubled or in another encoding."""
    at, to = sorted(rng.integers(len(content) + 1, size=2))
    way = rng.integers(6)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + content[to:] + content[at:to]
    if way == 2:
        return content[:at] + rng.bytes(rng.integers(1, 40)) + content[at:]
    if way == 3:
        return content[:at] + bytes([rng.integers(256)]) + content[at + 1:]
    if way == 4:
        return content + content[at:to]
    return content.decode("latin-1").encode(["utf-16", "utf-8", "utf-32-le"][rng.integers(3)])


def stored_as(form, folder, entries):
    """Entries in a file of a format, as far as it can hold them."""
    file = folder / f"x.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(e, default=repr) + "\n" for e in entries))
    elif form == "json":
        file.write_text(json.dumps(entries, default=repr))
    elif form == "tar":
        with tarfile.open(file, "w") as tar:
            for i, e in enumerate(entries):
                add(tar, f"{i}.png", (folder / "a.png").read_bytes())
                add(tar, f"{i}.json", json.dumps(e, default=repr).encode())
    else:
        rows = [e for e in entries[:1] if isinstance(e, dict)] or entries[1:]
        try:
            write_table(file, {name: [value] for name, value in rows[0].items()})
        except (pyarrow.ArrowException, ValueError):                            # a list in a column has one type
            write_table(file, {name: [json.dumps(value, default=repr)] for name, value in rows[0].items()})
    return file


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "json", *SHARDED])
def test_damage_of_any_kind_ends_in_one_short_line(form, album, tmp_path):
    """400 files of each format, with odd values or torn bytes: no crash, no hang, no message over 500 characters."""
    album()
    for seed in range(400):
        rng = random(seed)
        file = stored_as(form, tmp_path, [damaged(DRAWN, rng), ASKED])
        if seed % 2:
            file = stored_as(form, tmp_path, [DRAWN, ASKED])
            file.write_bytes(torn(file.read_bytes(), rng))
        started = time.time()
        for on_bad_record in ("skip", "stop"):
            try:
                source = FileSource(file, "emu3", on_bad_record)
                found = [*records(source), source.identity(), source.summary()]
                assert len(found) >= 3 and max(map(len, source.bad), default=0) <= 500
            except InputError as error:
                assert len(str(error)) <= 500 and len(str(error).splitlines()) == 1, seed
        assert time.time() - started < 10, seed


@pytest.mark.parametrize("text, numbers", [("1:2", (1, 2, 0)), ("1:2:3", (1, 2, 3)), ("0:0:1", (0, 0, 1))])
def test_a_ratio_has_a_share_of_mixed_records_where_it_says_so(text, numbers):
    """Without a third number there are none, as ever."""
    assert parse_ratio(text) == numbers


@pytest.mark.parametrize("text", ["0:0", "1", "1:2:3:4", "0:0:0", "-1:2", "1:1:-1", "a:b", "1.5:1", "1:1:", ""])
def test_a_ratio_that_is_none_is_refused(text):
    """Two or three whole numbers, not all of them zero."""
    with pytest.raises(InputError, match="--ratio .*GEN:UND or GEN:UND:MIXED"):
        parse_ratio(text)
