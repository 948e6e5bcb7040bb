"""Where records lie: JSON lines, JSON, tar, parquet, Arrow; the index that finds any of them; pictures encoded once."""

import functools
import glob
import hashlib
import io
import json
import mmap
import os
import re
import struct
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import aia
from formats.records import SKIP_HINT, Record, parse_record
from parts.pictures import load_picture, open_picture, siglip_picture, tokenizer_picture
from parts.processes import processes, rank
from parts.settings import InputError, aside

# ---------------------------------------------------------------------------------------------------------------------
# Files, and where their records lie
# ---------------------------------------------------------------------------------------------------------------------
# An index has 16 bytes a record, drawings first. `where` is the file (upper 16 bits) and the offset in it; in tables,
# offset and size are a row group and a row of it. `number` counts the records of a file, for messages.
ROW, OFFSET = np.dtype([("where", "<u8"), ("size", "<u4"), ("number", "<u4")]), 2**48 - 1
FORMS = ("tar", "parquet", "arrow", "json", "jsonl")                        # the first three also as a folder
TABLES = ("parquet", "arrow")
COLUMNS = ("image", "conversations", "caption", "text", "input_prompt", "input_image", "output_image")
ENDINGS = ("jpg", "jpeg", "png", "webp")
BROKEN = (OSError, ValueError, LookupError, NotImplementedError, tarfile.TarError)          # what readers raise
JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([][{}])', re.DOTALL)


def data_files(path):
    """A file, a folder or a pattern with wildcards -> format, sorted files."""
    path, files = Path(path), []
    if path.is_dir():
        found = ([file for file in path.glob(f"*.{form}") if not file.name.startswith("cache-")] for form in FORMS[:3])
        files = next(filter(None, found), [])        # beside shards often lie tables about them
    elif path.exists() or glob.has_magic(str(path)):
        files = [path] if path.exists() else [Path(file) for file in glob.glob(str(path), recursive=True)]
    forms = {file.suffix[1:] if file.suffix[1:] in FORMS else "jsonl" for file in files}
    if len(forms) != 1 or len(files) > 2**16:
        raise InputError(f"data set {path} cannot be read ({len(files)} files of {len(forms)} formats): give .jsonl, "
                         ".json, .tar, .parquet or .arrow files by name or pattern, or a folder of the last three")
    return forms.pop(), sorted(files)


def scan(form, file):
    """Where the records of a file lie: (offset, size, number) of each, in order."""
    if form == "json":
        yield from json_elements(file)
    elif form == "tar":
        yield from tar_samples(file)
    elif form == "jsonl":
        with open(file, "rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield offset, len(line), number
                offset += len(line)
    else:
        number, arrow = 0, pyarrow_for(file)
        about = arrow.parquet.ParquetFile(file).metadata if form == "parquet" else None
        for group in range(about.num_row_groups if about else 1):
            for row in range(about.row_group(group).num_rows if about else len(read_table(form, file, group))):
                number += 1
                yield group, row, number


def json_elements(file):
    """The objects of a JSON array of any size: brackets outside strings are counted, nothing is parsed or kept."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        depth = number = start = 0
        for token in JSON_TOKEN.finditer(text) if re.match(rb"(?:\xef\xbb\xbf)?\s*\[", text) else ():
            if token[1] in (b"[", b"{"):
                start = token.start() if depth == 1 else start
                depth += 1
            elif token[1]:
                depth -= 1
                if depth == 1:
                    number += 1
                    yield start, token.end() - start, number
                elif depth == 0:
                    if text[token.end():].strip():
                        break
                    return
        raise ValueError("no JSON array, or not all of it, or more behind it; JSON lines are named .jsonl")


def tar_samples(file):
    """The samples of a WebDataset shard: neighbours whose names agree up to the first full stop."""
    with tarfile.open(file, "r:") as tar:
        last, start, end, number = None, 0, 0, 0
        while member := tar.next():
            tar.members.clear()                      # tarfile would keep them all
            key, _ = split_name(member)
            if key and key != last:
                if last:
                    number += 1
                    yield start, end - start, number
                last, start = key, member.offset
            end = member.offset_data + -(-member.size // 512) * 512 if key else end         # whole blocks
        if last:
            yield start, end - start, number + 1
        tar.fileobj.seek(tar.offset)                 # tarfile takes a broken header for the end
        rest = tar.fileobj.read(2**20)
        if len(rest) < 512 or rest.strip(b"\0"):
            raise tarfile.ReadError("no end mark where the samples stop")


def split_name(member):
    """A tar member -> the key of its sample, and its ending. Folders and hidden files have no key."""
    first = member.name.rfind("/") + 1
    cut = member.name.find(".", first)
    return (member.name[:cut], member.name[cut + 1:].lower()) if cut > first and member.isfile() else ("", "")


def tar_entry(content):
    """The bytes of a sample -> its key; its picture and its .json with conversations, else its .txt caption."""
    parts = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        first, _ = split_name(tar.firstmember)
        for member in tar:
            key, ending = split_name(member)
            if key:
                parts[ending] = tar.extractfile(member).read()
    entry = json.loads(parts.get("json", b"{}"))
    if not (isinstance(entry, dict) and "conversations" in entry):             # .json beside .txt may be about anything
        entry = {"caption": parts.get("txt", b"").decode("utf-8").strip()}
    return first, entry | {"image": next((parts[ending] for ending in ENDINGS if ending in parts), None)}


def pyarrow_for(file):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{file} is read through pyarrow, which is not installed: pip install pyarrow") from error
    return pyarrow


def read_table(form, file, group):
    """Our columns of a row group of a parquet file, or of a whole Arrow stream (mapped into memory, not read)."""
    arrow = pyarrow_for(file)
    if form == "parquet":
        table = arrow.parquet.ParquetFile(file)
        return table.read_row_group(group, [name for name in COLUMNS if name in table.schema_arrow.names])
    table = arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all()
    return table.select([name for name in COLUMNS if name in table.column_names])


def read_record(form, file, offset, size, number, table=read_table, check=None):
    """The record at an offset of a file; check(picture) may refuse its pictures."""
    origin = f"{file}:{number}"
    try:
        if form in TABLES:
            rows = table(form, file, offset)
            entry = {name: rows[name][size].as_py() for name in rows.column_names}
        else:
            with open(file, "rb") as opened:
                opened.seek(offset)
                entry = opened.read(size)
            if form == "tar":
                key, entry = tar_entry(entry)
                origin = f"{file}:{key}"
        record = parse_record(entry, origin, file.parent, strict=form == "jsonl")
        for picture in record.pictures if check else ():
            check(picture)
        return record
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
    except BROKEN as error:
        raise InputError(f"{origin}: cannot be read ({error}): is the file complete, and unchanged?") from error


def make_index(form, files, kind, stop=False):
    """One pass over all records -> {task: rows (n,) of ROW}, texts about bad ones. Of pictures the header is read."""
    rows, bad, table = {task: bytearray() for task in aia.TASKS}, [], functools.lru_cache(maxsize=1)(read_table)

    def check(picture):
        open_picture(picture, kind).close()
    bar = tqdm(desc="index", unit="record", disable=None)
    for i, file in enumerate(files):
        try:
            for offset, size, number in scan(form, file):
                bar.update()
                try:
                    record = read_record(form, file, offset, size, number, table, check)
                    rows[record.task] += struct.pack("<QII", i << 48 | offset, size, number)
                except InputError as error:
                    note_bad(str(error), bad, stop)
        except InputError:
            raise
        except BROKEN as error:
            note_bad(f"{file}: cannot be read to its end ({error}): is it complete?", bad, stop)
    bar.close()
    return {task: np.frombuffer(packed, ROW) for task, packed in rows.items()}, bad


def index_file(path):
    """PATH.index.npy beside a file or folder; of a pattern in the folder before its first wildcard, wildcards as _."""
    path = str(Path(path))
    before = path if Path(path).exists() else re.split(r"[*?\[]", path)[0]
    folder = before[:before.rfind("/") + 1]
    return Path(folder + re.sub(r"[/*?\[\]]+", "_", path[len(folder):]) + ".index.npy")


def stamps(files, folder):
    """What tells that a file has changed: [[name, size, time], ...]."""
    return [[os.path.relpath(file, folder), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]


def load_index(path, files):
    """A stored index -> rows {task: (n,)}, mapped into memory, and its bad records; refused if a file has changed."""
    stored, again = index_file(path), f"run python data.py index {path} again"
    try:
        rows = np.load(stored, mmap_mode="r", allow_pickle=False)
        with open(stored, "rb") as file:
            file.seek(rows.offset + rows.nbytes)     # behind the array: the two are written together
            head = json.loads(file.read())
        gen, bad, seen = head["count"]["gen"], head["bad"], {tuple(one) for one in head["files"]}
    except (*BROKEN, EOFError, AttributeError, TypeError) as error:
        raise InputError(f"{stored} is broken ({error}): {again}") from error
    if changed := seen ^ {tuple(one) for one in stamps(files, stored.parent)}:
        raise InputError(f"{min(changed)[0]} has changed, come or gone since {stored} was written: {again}")
    return {"gen": rows[:gen], "und": rows[gen:]}, bad


def store_index(path):
    """One pass over a data set -> its index file, and {task: number of records}. What cannot be used is listed beside
    it, in PATH.bad.txt."""
    form, files = data_files(path)
    stored = index_file(path)
    listed = stored.with_suffix("").with_suffix(".bad.txt")
    seen = stamps(files, stored.parent)              # before reading: a change meanwhile will show
    rows, bad = make_index(form, files, "janus")     # the wider limits; reading checks those of its model
    listed.unlink(missing_ok=True)
    if bad:
        with aside(listed) as part:
            part.write_text("\n".join([*bad, ""]), encoding="utf-8", errors="backslashreplace")
        print(f"{bad_report(bad, [path])}\nall are in {listed}")
    if not any(map(len, rows.values())):
        raise InputError(f"data set {path} holds no usable record: see formats/README.md")
    count = {task: len(part) for task, part in rows.items()}
    with aside(stored) as part, open(part, "wb") as out:
        np.save(out, np.concatenate(list(rows.values())), allow_pickle=False)
        out.write(json.dumps({"files": seen, "count": count, "bad": bad}).encode())
    return stored, count


def note_bad(text, bad, stop):
    """Add a record that cannot be used to a list, or stop at it."""
    bad.append(text)
    if stop:
        raise InputError(f"{text} ({SKIP_HINT})")


def bad_report(bad, paths):
    """How many records of each data set were left out, then the first of them."""
    homes = sorted(((re.split(r"[*?\[]", str(Path(path)))[0], path) for path in paths), key=lambda home: len(home[0]))
    owners = [[path for home, path in [("", "elsewhere"), *homes] if text.startswith(home)][-1] for text in bad]
    counts = [f"{path}: {owners.count(path)}" for path in dict.fromkeys(owners)]
    more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
    return "\n  ".join([f"{len(bad)} bad records were left out:", *counts, *bad[:20], *more])


# ---------------------------------------------------------------------------------------------------------------------
# Sources of records
# ---------------------------------------------------------------------------------------------------------------------
class FileSource:
    """Records of a data set, read one by one through an index, stored or made at once; but JSON lines without a stored
    index are read and checked whole. A bad record is named with file, line and remedy."""

    def __init__(self, path, kind, on_bad_record="stop"):
        self.paths, self.bad, self.records = [str(path)], [], {task: [] for task in aia.TASKS}
        (self.form, self.files), stop, started = data_files(path), on_bad_record == "stop", time.time()
        self.table = functools.lru_cache(maxsize=2 if self.form == "parquet" else None)(read_table)
        self.read = functools.lru_cache(maxsize=256)(read_record)               # lengths are asked for before records
        if index_file(path).exists():
            self.records, self.bad = load_index(path, self.files)
        elif self.form == "jsonl":
            self.read_whole(kind, stop)
        else:
            self.records, self.bad = make_index(self.form, self.files, kind, stop)
        if time.time() - started > 5:
            print(f"{path}: read through in {time.time() - started:.0f} s; once for all: python data.py index {path}")
        if not any(map(len, self.records.values())):
            raise InputError(f"data set {path} holds no usable record: see README, 'Your own pictures'")

    def read_whole(self, kind, stop):
        for file in self.files:
            try:
                lines = file.read_bytes().split(b"\n")                             # other separators are text in JSON
            except OSError as error:
                raise InputError(f"data set {file} cannot be read ({error}): give a UTF-8 JSON-lines file") from error
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = parse_record(line, f"{file}:{number}", file.parent)
                    for path in record.pictures:
                        load_picture(path, kind)     # whole, since a truncated file has a good header
                    self.records[record.task].append(record)
                except InputError as error:
                    note_bad(f"{file}:{number}: {error}", self.bad, stop)

    def count(self, task):
        return len(self.records[task])

    def record(self, task, index, rng=None):
        row = self.records[task][index]
        if isinstance(row, Record):
            return row
        where, size, number = row.item()
        return self.read(self.form, self.files[where >> 48], where & OFFSET, size, number, self.table)


class Mixture:
    """Several sources as one: joined, or with shares (see Schedule) each by its share and in its own epochs."""

    def __init__(self, sources, shares=()):
        self.sources, self.shares = sources, shares
        self.bad = [text for source in sources for text in source.bad]
        self.paths = [path for source in sources for path in source.paths]

    def count(self, task):
        return sum(source.count(task) for source in self.sources)

    def record(self, task, index, rng=None):
        for source in self.sources:
            if index < source.count(task):
                return source.record(task, index, rng)
            index -= source.count(task)


def open_sources(texts, kind, on_bad_record="stop"):
    """The source that --data names, each text a PATH or PATH=SHARE."""
    found = [(text, None) if Path(text).exists() or "=" not in text else text.rsplit("=", 1) for text in texts]
    try:
        shares = [Fraction(share) for _, share in found if share]
    except (ValueError, ZeroDivisionError):
        shares = [0]
    if min(shares, default=1) <= 0 or len(shares) not in (0, len(found)):
        raise InputError(f"--data {' '.join(texts)}: give each data set a share above 0 (PATH=SHARE), or none")
    sources = [FileSource(path, kind, on_bad_record) for path, _ in found]
    return Mixture(sources, shares) if sources[1:] else sources[0]


def every(source, task):
    """All records of a task, one at a time."""
    return (source.record(task, i) for i in range(source.count(task)))


# ---------------------------------------------------------------------------------------------------------------------
# Order: nothing is stored, whatever the size
# ---------------------------------------------------------------------------------------------------------------------
def shuffled(i, n, key):
    """Position of item i in a keyed permutation of range(n), computed without storing it.

    A Feistel network permutes the numbers of 2 h bits, at least n of them; a result outside range(n) is permuted again.
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


def deal(position, shares):
    """Which of several streams serves a position, and which position of its own: shares follow the shares, over any
    window less than len(shares) away. The first stream takes its share of the running total, the next of the rest."""
    rest = sum(shares)
    for number, share in enumerate(shares[:-1]):
        mine = position * share // rest
        if (position + 1) * share // rest > mine:
            return number, int(mine)
        position, rest = position - mine, rest - share
    return len(shares) - 1, int(position)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures encoded once
# ---------------------------------------------------------------------------------------------------------------------
def picture_key(file):
    """Name of the content of a picture (path or bytes). Of a file that cannot be read: "" (loading it will say why)."""
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    except OSError:
        return ""


ENCODING = 2                                     # raised whenever the same weights encode a picture otherwise


BYTES_A_FILE = 2**28                             # of encoded pictures, and at most ...
PICTURES_A_FILE = 1000                           # ... so many of them, so that a kill loses little
TOGETHER = 32                                    # pictures that are encoded at once


class Encoded:
    """What frozen towers made of pictures, stored by `data.py encode`: safetensors files of codes/KEY, as encode_images
    gives them, and features/KEY (N, vit_width), KEY as in picture_key. Files made with other weights, or by another
    resizing, are refused."""

    def __init__(self, folder, m, new=False):
        self.folder, self.m, self.parts = Path(folder), m, {}
        files = sorted(self.folder.glob("*.safetensors"))
        if not (files or new):
            raise InputError(f"--encoded {folder} holds no encoded pictures: make them with python data.py encode")
        for file in files:
            try:
                part = safe_open(file, "pt")
                stored, names = part.metadata() or {}, list(part.keys())
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file} is broken ({error}): remove it and run data.py encode again") from error
            for name, made_with in stored.items():
                if made_with != self.fingerprints.get(name):
                    raise InputError(f"{file} was encoded with another tower or another resizing ({name} {made_with}, "
                                     f"here {self.fingerprints.get(name)}): encode again, into another folder")
            self.parts |= dict.fromkeys(names, part)
        self.kinds = {key.split("/")[0] for key in self.parts}                  # of "codes", "features"

    @functools.cached_property
    def fingerprints(self):
        """{"codes", "features": hash of the tower's weights, and of what the resizing makes of a small and of a large
        picture of noise}."""
        towers = {"codes": (self.m.vq, tokenizer_picture)}
        if self.m.config.kind == "janus":
            towers["features"] = (self.m.vision, siglip_picture)
        found = {}
        for name, (tower, resize) in towers.items():
            mix = hashlib.blake2b(b"encoding %d" % ENCODING, digest_size=8)
            for key, weight in sorted(tower.state_dict().items()):
                if weight.is_floating_point():       # not the counters of batch norm
                    exact = weight.float().cpu().contiguous()               # public ones are the same in both types
                    mix.update(key.encode() + exact.view(-1).view(torch.uint8).numpy().tobytes())
            for height, width in ((90, 60), (700, 1100)):
                noise = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
                mix.update(resize(Image.fromarray(noise), self.m.config).numpy().tobytes())
            found[name] = mix.hexdigest()
        return found

    def get(self, name, file):
        """Codes or features of a picture file, or None; the file is not read for what is stored of no picture."""
        key = f"{name}/{picture_key(file)}" if name in self.kinds else ""
        return self.parts[key].get_tensor(key) if key in self.parts else None

    def add(self, tensors, name):
        """Write tensors into a new file."""
        towers = {key.split("/")[0] for key in tensors}
        with aside(self.folder / f"{name}.safetensors") as part:
            save_file(tensors, part, {tower: self.fingerprints[tower] for tower in towers})

    def fill(self, name, source, tasks, make, stop):
        """Store make(pictures) of all pictures of some tasks that are not there yet; under torchrun, this process's
        share of them. A picture that cannot be encoded is added to source.bad, or stops the command."""
        # Where each picture is: their bytes would not fit into memory.
        mine = {f"{name}/{picture_key(picture)}": (task, i, j) for task in tasks
                for i in range(rank(), source.count(task), processes())
                for j, picture in enumerate(source.record(task, i).pictures)}
        todo = [(key, where) for key, where in mine.items() if key not in self.parts]
        number = 1 + max((int(file.stem[4:]) for file in self.folder.glob(f"{rank():03d}-*.safetensors")), default=-1)
        made, missing = {}, 0
        for first in tqdm(range(0, len(todo), TOGETHER), desc=name, unit="batch", disable=None):
            good, bad = self.encode_some(todo[first:first + TOGETHER], source, make, stop)
            made |= good
            missing += bad
            full = len(made) >= PICTURES_A_FILE or sum(one.nbytes for one in made.values()) >= BYTES_A_FILE
            if full or first + TOGETHER >= len(todo):
                self.add(made, f"{rank():03d}-{number:05d}")
                number, made = number + 1, {}
        if mine:
            print(f"{name}: {len(todo) - missing} pictures encoded, {len(mine) - len(todo)} were there")

    def encode_some(self, todo, source, make, stop):
        """make() of some pictures, or where it fails, of each by itself -> {key: tensor}, how many were bad."""
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
