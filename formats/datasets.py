"""Data sets: the index that finds any record, sources of records, the order in which they come, pictures encoded once.

    python -m pytest tests/test_datasets.py
"""

import copy
import functools
import hashlib
import json
import os
import re
import struct
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from formats.readers import BROKEN, data_files, read_record, read_table, scan
from formats.records import RECORD_TASKS, SKIP_HINT, Record
from parts.pictures import janus_picture, load_picture, open_picture, siglip_picture, to_picture, tokenizer_picture
from parts.processes import processes, rank
from parts.settings import InputError, aside, first_line, shortened, stream

# ---------------------------------------------------------------------------------------------------------------------
# Records that cannot be used
# ---------------------------------------------------------------------------------------------------------------------
LISTED = 1000                                   # most bad records of a data set that are described; others are counted
MORE = re.compile("(.*) and later: ([0-9]+) more bad records")
WILD = re.compile(r"[*?\[{]")                   # where a path turns into a pattern


def note_bad(text, bad, stop):
    """Add a record that cannot be used to a list, or stop at it. The last text of a full list counts the others."""
    text = shortened(text, 430)
    if stop:
        bad.append(text)
        raise InputError(f"{text} ({SKIP_HINT})")
    if len(bad) < LISTED:
        bad.append(text)
        return
    counted = MORE.fullmatch(bad[-1])
    origin, more = counted.groups() if counted else (text.split(": ")[0], 0)
    bad[LISTED:] = [f"{origin} and later: {int(more) + 1} more bad records"]


def how_many(text):
    """How many bad records a text of the list stands for."""
    more = MORE.fullmatch(text)
    return int(more[2]) if more else 1


def bad_report(bad, paths):
    """How many records of each data set were left out, then the first of them."""
    beginnings = {path: WILD.split(str(Path(path)))[0] for path in paths}
    longest_first = sorted(paths, key=lambda path: -len(beginnings[path]))
    counts = {}
    for text in bad:
        owner = next((path for path in longest_first if text.startswith(beginnings[path])), "elsewhere")
        counts[owner] = counts.get(owner, 0) + how_many(text)
    total = sum(counts.values())
    rest = [f"and {total - 20} more"] if total > 20 else []
    owners = [f"{path}: {count}" for path, count in counts.items()]
    left = "1 bad record was" if total == 1 else f"{total} bad records were"
    return "\n  ".join([f"{left} left out:", *owners, *bad[:20], *rest])


def refuse_empty(path, records, bad):
    """Stop at a data set without a usable record {task: records}."""
    if not any(map(len, records.values())):
        first = f" (the first: {shortened(bad[0], 220)})" if bad else ""
        raise InputError(f"data set {shortened(path)} holds no usable record{first}: see formats/README.md")


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------
# An index has 16 bytes per record, first all to draw, then all to answer, then the mixed ones. `where` is the number of
# the file (upper 16 bits) and an offset in it (lower 48); of tables, offset and size are a row group and a row in it.
# `number` counts the records of a file, for messages.
ROW = np.dtype([("where", "<u8"), ("size", "<u4"), ("number", "<u4")])
OFFSET = 2**48 - 1
INDEX = ".index.npy"


def make_index(form, files, kind, stop=False, kept=None):
    """One pass over all records -> {task: rows (n,) of ROW}, texts about bad ones, how many have a system turn. Of
    pictures, the header is read; if kept, {task: []}, takes the records, all of them."""
    rows = {task: bytearray() for task in RECORD_TASKS}
    bad = []
    system = 0
    table = functools.lru_cache(maxsize=1)(read_table)

    def check(picture):
        if kept is None:
            open_picture(picture, kind).close()
        else:
            load_picture(picture, kind)             # a truncated file has a good header
    bar = tqdm(desc="index", unit="record", disable=None)
    for i, file in enumerate(files):
        try:
            for offset, size, number in scan(form, file):
                bar.update()
                try:
                    record = read_record(form, file, offset, size, number, table, check)
                    rows[record.task] += struct.pack("<QII", i << 48 | offset, size, number)
                    system += record.system
                    if kept is not None:
                        kept[record.task].append(record)
                except InputError as error:
                    note_bad(str(error), bad, stop)
        except InputError:
            raise
        except BROKEN as error:
            note_bad(f"{file}: cannot be read to its end ({first_line(error)}): check that it is complete", bad, stop)
    bar.close()
    return {task: np.frombuffer(packed, ROW) for task, packed in rows.items()}, bad, system


def index_file(path):
    """PATH.index.npy beside a file or folder. Of a pattern: in the folder before its first wildcard, with _ for each
    wildcard."""
    path = str(Path(path))
    before = path if Path(path).exists() else WILD.split(path)[0]
    folder = before[:before.rfind("/") + 1]
    return Path(folder + re.sub(r"[/*?\[\]{}]+", "_", path[len(folder):]) + INDEX)


def stamps(files, folder):
    """What shows that a file has changed: [[name, size, time], ...], names relative to a folder."""
    return [[os.path.relpath(file, folder), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]


def read_index(stored):
    """An index file -> its rows, mapped into memory, and the JSON behind them."""
    try:
        rows = np.load(stored, mmap_mode="r", allow_pickle=False)
        with open(stored, "rb") as file:
            file.seek(rows.offset + rows.nbytes)    # in the same file behind the array, so that the two always agree
            head = json.loads(file.read())
        head = {"path": str(stored).removesuffix(INDEX), "system": 0} | head                # older ones lack these
        head["files"] = {tuple(one) for one in head["files"]}
        head["bad"] = list(head["bad"])
        old = "mixed" not in head["count"]
    except (*BROKEN, EOFError, AttributeError, TypeError) as error:
        raise InputError(f"{stored} is broken ({first_line(error)}): run python data.py index again") from error
    if old:
        raise InputError(f"{shortened(stored, 140)} was written before there were mixed records: run python data.py "
                         f"index {shortened(head['path'], 140)} again")
    return rows, head


def load_index(stored, path, files):
    """The stored index of a data set -> what make_index tells of it. It is refused if a file has changed."""
    rows, head = read_index(stored)
    if changed := head["files"] ^ {tuple(one) for one in stamps(files, index_file(path).parent)}:
        raise InputError(f"{shortened(min(changed)[0], 140)} has changed, come or gone since {shortened(stored, 140)} "
                         f"was written: run python data.py index {shortened(path, 140)} again")
    parts = {}
    first = 0
    for task in RECORD_TASKS:
        parts[task] = rows[first:first + head["count"][task]]
        first += head["count"][task]
    return parts, head["bad"], head["system"]


def refuse_unwritable(stored):
    """Try to write before the pass over the data, which may take hours."""
    part = Path(f"{stored}.part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{stored} cannot be written ({error.strerror}): give a file in another folder, as --out "
                         f"FILE{INDEX}") from error


def store_index(path, out=""):
    """One pass over a data set -> its index file, and {task: number of records}. The first LISTED bad records are
    named beside it, in PATH.bad.txt. out: the index file, if it is not to lie beside the data."""
    form, files = data_files(path)
    stored = Path(out or index_file(path))
    if not stored.name.endswith(INDEX):
        raise InputError(f"--out {shortened(out)}: let the name end in {INDEX}")
    refuse_unwritable(stored)
    # Before reading, so that a change in the meantime will show; relative to the data, since an index may be moved.
    seen = stamps(files, index_file(path).parent)
    # Janus-Pro's limits on pictures are the wider ones; those of the model are checked in training.
    rows, bad, system = make_index(form, files, "janus")
    listed = Path(str(stored).removesuffix(INDEX) + ".bad.txt")
    listed.unlink(missing_ok=True)
    if bad:
        with aside(listed) as part:
            part.write_text("\n".join([*bad, ""]), encoding="utf-8", errors="backslashreplace")
        print(f"{bad_report(bad, [path])}\nlisted in {listed}")
    refuse_empty(path, rows, bad)
    if system:
        print(f"{path}: {system} with a system turn, joined to the first question")
    count = {task: len(part) for task, part in rows.items()}
    head = {"path": os.path.abspath(path), "files": seen, "count": count, "bad": bad, "system": system}
    with aside(stored) as part, open(part, "wb") as file:
        np.save(file, np.concatenate(list(rows.values())), allow_pickle=False)
        file.write(json.dumps(head).encode())
    return stored, count


# ---------------------------------------------------------------------------------------------------------------------
# Sources of records
# ---------------------------------------------------------------------------------------------------------------------
class FileSource:
    """The records of a data set. They are read one by one through an index, which is stored or made at once; only JSON
    lines without a stored index are read and checked as a whole."""

    def __init__(self, path, kind, on_bad_record="stop"):
        started = time.time()
        stop = on_bad_record == "stop"
        self.name = str(path)
        stored = index_file(path)
        if self.name.endswith(INDEX):               # the index itself, which lies elsewhere and names its data
            stored = Path(path)
            path = Path(read_index(stored)[1]["path"])
        self.paths = [str(path)]
        self.form, self.files = data_files(path)
        kept = None
        # Rows of an index {task: (n,)}, texts about bad records, how many records had a system turn.
        if stored.exists():
            self.rows, self.bad, self.system = load_index(stored, path, self.files)
        else:
            kept = {task: [] for task in RECORD_TASKS} if self.form == "jsonl" else None
            self.rows, self.bad, self.system = make_index(self.form, self.files, kind, stop, kept)
        self.records = kept or self.rows
        self.table = functools.lru_cache(maxsize=2 if self.form == "parquet" else None)(read_table)
        self.read = functools.lru_cache(maxsize=256)(read_record)               # batches ask for lengths first
        if time.time() - started > 5:
            print(f"{path}: read in {time.time() - started:.0f} s; to do this only once: python data.py index {path}")
        refuse_empty(path, self.records, self.bad)

    def count(self, task):
        return len(self.records[task])

    def summary(self):
        """What the data set holds, as one line."""
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        parts = [files, f"{self.count('gen')} records to draw", f"{self.count('und')} to answer"]
        if self.count("mixed"):
            parts.append(f"{self.count('mixed')} mixed")
        if self.bad:
            parts.append(f"{sum(map(how_many, self.bad))} left out")
        if self.system:
            parts.append(f"{self.system} with a system turn, joined to the first question")
        return f"{self.name}: {', '.join(parts)}"

    def identity(self):
        """What tells these data from others, wherever they lie, to be stored as JSON: how many records, and a hash of
        the sizes of the files, of where each record lies in them, and of the words of some."""
        mix = hashlib.blake2b(repr([os.stat(file).st_size for file in self.files]).encode(), digest_size=16)
        for task in RECORD_TASKS:
            mix.update(self.rows[task].view(np.uint8))
            count = self.count(task)
            for index in range(0, count, max(count // 16, 1)):
                mix.update(repr(self.record(task, index).turns).encode())
        counts = {task: self.count(task) for task in RECORD_TASKS}
        if not counts["mixed"]:                     # then it is that of runs from before there were any
            del counts["mixed"]
        return counts | {"content": mix.hexdigest()}

    def record(self, task, index, rng=None):
        """The record of a task at an index. rng: the random numbers of a visit, by which one of several captions is
        drawn; without them it is the first."""
        record = self.records[task][index]
        if not isinstance(record, Record):
            where, size, number = record.item()
            record = self.read(self.form, self.files[where >> 48], where & OFFSET, size, number, self.table)
        if rng is None or not record.captions:
            return record
        visit = copy.deepcopy(rng).integers(2**63)              # a copy: what else the visit draws stays the same
        caption = record.captions[stream(visit, "captions").integers(len(record.captions))]
        return replace(record, turns=((caption, "<image>"),))


class Mixture:
    """Several sources as one: joined, or with shares, according to which data.Schedule takes turns between them."""

    def __init__(self, sources, shares=()):
        self.sources = sources
        self.shares = shares
        self.bad = [text for source in sources for text in source.bad]
        self.paths = [path for source in sources for path in source.paths]

    def count(self, task):
        return sum(source.count(task) for source in self.sources)

    def summary(self):
        """One line of each data set."""
        return "\n".join(source.summary() for source in self.sources)

    def identity(self):
        """As FileSource.identity, of each data set, and their shares."""
        return {"sources": [source.identity() for source in self.sources], "shares": list(map(str, self.shares))}

    def record(self, task, index, rng=None):
        for source in self.sources:
            if index < source.count(task):
                return source.record(task, index, rng)
            index -= source.count(task)


def open_sources(texts, kind, on_bad_record="stop"):
    """The source that --data names; each text is a PATH or PATH=SHARE."""
    found = [(text, None) if Path(text).exists() or "=" not in text else text.rsplit("=", 1) for text in texts]
    try:
        shares = [Fraction(share) for _, share in found if share]
    except (ValueError, ZeroDivisionError):
        shares = [0]
    if min(shares, default=1) <= 0 or len(shares) not in (0, len(found)):
        given = shortened(" ".join(texts))
        raise InputError(f"--data {given}: give each data set a share above 0 (PATH=SHARE), or none")
    sources = [FileSource(path, kind, on_bad_record) for path, _ in found]
    return Mixture(sources, shares) if len(sources) > 1 else sources[0]


def every(source, task):
    """All records of a task, one at a time."""
    return (source.record(task, i) for i in range(source.count(task)))


def square_pictures(source, config, bad, stop):
    """All pictures of a source at the size of drawn ones [(S, S, 3) uint8]. Bad ones are noted in the list `bad`, or
    stop the command."""
    found = {}
    for record in (record for task in RECORD_TASKS for record in every(source, task)):
        try:
            for picture in record.pictures:
                if picture not in found:
                    found[picture] = to_picture(janus_picture(load_picture(picture, config.kind), config))
        except InputError as error:
            note_bad(f"{record.origin}: {error}", bad, stop)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Order: computed from positions, whatever the size
# ---------------------------------------------------------------------------------------------------------------------
def shuffled(i, n, key):
    """Position of item i in a keyed permutation of range(n), computed without storing it.

    A Feistel network permutes the numbers of 2 h bits, of which there are at least n; a result outside range(n) is
    permuted again.
    """
    h = max((n - 1).bit_length() + 1, 2) // 2
    key = repr(key).encode()
    while True:
        left, right = i >> h, i & (1 << h) - 1
        for turn in range(4):
            mixed = hashlib.blake2b(b"%d %d" % (turn, right), key=key, digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & (1 << h) - 1
        i = left << h | right
        if i < n:
            return i


def parse_ratio(text):
    """The numbers of --ratio GEN:UND:MIXED; of GEN:UND, the third is 0."""
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or min(numbers) < 0 or sum(numbers) == 0:
        raise InputError(f"--ratio {text!r}: give two or three whole numbers as GEN:UND or GEN:UND:MIXED, for example "
                         "1:1 or 2:1:1")
    return (*numbers, 0)[:3]


def deal(position, shares):
    """Deal positions out to several streams by their shares -> number of the stream, position within it. In any window,
    the counts are less than len(shares) away from the shares. The first stream takes its share of the running total,
    the next one its share of the rest, and so on."""
    rest = sum(shares)
    for number, share in enumerate(shares[:-1]):
        mine = position * share // rest
        if (position + 1) * share // rest > mine:
            return number, int(mine)
        position -= mine
        rest -= share
    return len(shares) - 1, int(position)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures encoded once
# ---------------------------------------------------------------------------------------------------------------------
ENCODING = 3                                    # to be raised whenever the same weights encode pictures differently
BYTES_A_FILE = 2**28                            # most bytes of encoded pictures in a file ...
PICTURES_A_FILE = 1000                          # ... and most pictures, so that a kill loses little
TOGETHER = 32                                   # pictures encoded at once


def picture_key(file):
    """A hash of the content of a picture (path or bytes); "" if it cannot be read: loading it will say why."""
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
    except OSError:
        return ""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def fingerprint(tower, resize, config):
    """A hash of the weights of an encoder, and of what resize(picture, config) makes of a small and a large picture."""
    mix = hashlib.blake2b(b"encoding %d" % ENCODING, digest_size=8)
    for key, weight in sorted(tower.state_dict().items()):
        if weight.is_floating_point():              # not the counters of batch norm
            exact = weight.float().cpu().contiguous()           # public weights are the same in float32 and bfloat16
            mix.update(key.encode() + exact.view(-1).view(torch.uint8).numpy().tobytes())
    for height, width in ((90, 60), (700, 1100)):
        noise = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
        mix.update(resize(Image.fromarray(noise), config).numpy().tobytes())
    return mix.hexdigest()


class Encoded:
    """What frozen encoders made of pictures, stored by `data.py encode` as safetensors: codes/KEY as encode_images
    gives them, features/KEY (N, vit_width) of SigLIP, KEY from picture_key. Files made with other weights or another
    resize are refused. new: the folder may be empty."""

    def __init__(self, folder, m, new=False):
        self.folder = Path(folder)
        self.m = m
        self.parts = {}                             # {name of a tensor: opened file}
        files = sorted(self.folder.glob("*.safetensors"))
        if not (files or new):
            raise InputError(f"--encoded {folder} holds no encoded pictures: make them with python data.py encode")
        for file in files:
            self.parts |= self.open(file)
        self.held = {key.split("/")[0] for key in self.parts}                   # "codes", "features", or both

    def open(self, file):
        """{name: opened file} of the tensors in a file that was made with these weights and this resize."""
        try:
            part = safe_open(file, "pt")
            stored = part.metadata() or {}
            names = list(part.keys())
        except (OSError, SafetensorError) as error:
            why = first_line(error)
            raise InputError(f"{file} is broken ({why}): remove it and run data.py encode again") from error
        for name, made_with in stored.items():
            if made_with != self.fingerprints.get(name):
                raise InputError(f"{file} was encoded with other weights or another resize ({name} {made_with}, "
                                 f"here {self.fingerprints.get(name)}): encode again, into another folder")
        return dict.fromkeys(names, part)

    @functools.cached_property
    def fingerprints(self):
        """{"codes": fingerprint of the picture tokenizer, "features": that of SigLIP}."""
        found = {"codes": fingerprint(self.m.vq, tokenizer_picture, self.m.config)}
        if self.m.config.kind == "janus":
            found["features"] = fingerprint(self.m.vision, siglip_picture, self.m.config)
        return found

    def get(self, name, file):
        """Codes or features of a picture file, or None. The file is read only if there are any of that name."""
        key = f"{name}/{picture_key(file)}" if name in self.held else ""
        return self.parts[key].get_tensor(key) if key in self.parts else None

    def add(self, tensors, name):
        """Write tensors into a new file."""
        made_with = {key.split("/")[0]: self.fingerprints[key.split("/")[0]] for key in tensors}
        with aside(self.folder / f"{name}.safetensors") as part:
            save_file(tensors, part, made_with)

    def fill(self, name, source, tasks, make, stop, which=None):
        """Store make(pictures) of the pictures of some tasks that are not stored yet; under torchrun, of this process's
        share. A picture that cannot be encoded is added to source.bad, or stops the command. which(record): numbers of
        the pictures to store, such as records.pictures_drawn; without it, all of them."""
        where = {}                                  # not the pictures themselves, which would not fit into memory
        for task in tasks:
            for i in range(rank(), source.count(task), processes()):
                record = source.record(task, i)
                for j in which(record) if which else range(len(record.pictures)):
                    where[f"{name}/{picture_key(record.pictures[j])}"] = task, i, j
        todo = [(key, at) for key, at in where.items() if key not in self.parts]
        numbers = [int(file.stem[4:]) for file in self.folder.glob(f"{rank():03d}-*.safetensors")]
        number = max(numbers, default=-1) + 1
        made = {}
        missing = 0
        for first in tqdm(range(0, len(todo), TOGETHER), desc=name, unit="batch", disable=None):
            good, bad = self.encode_some(todo[first:first + TOGETHER], source, make, stop)
            made |= good
            missing += bad
            full = len(made) >= PICTURES_A_FILE or sum(one.nbytes for one in made.values()) >= BYTES_A_FILE
            if full or first + TOGETHER >= len(todo):
                self.add(made, f"{rank():03d}-{number:05d}")
                number += 1
                made = {}
        if where:
            print(f"{name}: {len(todo) - missing} pictures encoded, {len(where) - len(todo)} were there")

    def encode_some(self, todo, source, make, stop):
        """make() of some pictures, or if it fails, of each by itself -> {key: tensor}, how many were bad."""
        keys = [key for key, _ in todo]
        pictures = [source.record(task, i).pictures[j] for _, (task, i, j) in todo]
        try:
            return dict(zip(keys, make(pictures), strict=True)), 0
        except InputError:
            good = {}
            for (key, (task, i, _)), picture in zip(todo, pictures, strict=True):
                try:
                    good[key], = make([picture])
                except InputError as error:
                    note_bad(f"{source.record(task, i).origin}: {error}", source.bad, stop)
            return good, len(todo) - len(good)
