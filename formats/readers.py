"""Which files a data set has, and where records lie in each format: JSON lines, JSON, tar, parquet, Arrow
(see formats/README.md).

    python -m pytest tests/test_readers.py
"""

import glob
import io
import math
import mmap
import re
import tarfile
from pathlib import Path

from formats.hub import POINTER
from formats.records import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    TURN_FIELDS,
    Record,
    caption_list,
    check_turns,
    edit_of,
    first_field,
    image_list,
    parsed,
    turn_pairs,
    turns_of,
)
from parts.settings import InputError, first_line, shortened, utf8

FORMS = ("tar", "parquet", "arrow", "json", "jsonl")
FOLDERS = FORMS[:3]                             # formats of which a folder is a data set
MOST_FILES = 2**16                              # of a data set: an index row has 16 bits for the number of a file
BRACES = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
SPLITS = ("train", "test", "validation", "val", "dev")
WORD = re.compile("([a-z]+)[-_]?")
TABLES = ("parquet", "arrow")
COLUMNS = (*IMAGE_FIELDS, *TURN_FIELDS, *CAPTION_FIELDS, "input_image")
ENDINGS = ("jpg", "jpeg", "png", "webp")
BROKEN = (OSError, ValueError, LookupError, NotImplementedError, tarfile.TarError)          # what readers raise
# What a file may be instead, by its first bytes, and the remedy.
DISGUISES = {
    b"\x1f\x8b": "compressed with gzip: unpack it, gunzip -c {file} > NEW_FILE",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, zstd -dc {file} > NEW_FILE",
    b"PK\x03\x04": "a zip archive: unpack it, and give the files in it",
    POINTER: "a pointer of Git LFS: get the data it stands for, git lfs pull",
}
JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([][{}])', re.DOTALL)           # a string, or a bracket
BLANK = re.compile(rb"\s*+")                     # what may stand before the first record, and behind the last ...
SEPARATOR = re.compile(rb"\s*+,\s*+")            # ... and between two


def form_of(file):
    """The format of a file, by its ending. One of any other ending holds JSON lines."""
    ending = file.suffix[1:].lower()
    return ending if ending in FORMS else "jsonl"


def expanded(pattern):
    """Braces as WebDataset writes them: x-{00..11}.tar -> [x-00.tar, ..., x-11.tar]."""
    braces = BRACES.search(pattern)
    if not braces:
        return [pattern]
    counts = [int(last) - int(first) + 1 for first, last in BRACES.findall(pattern)]
    if min(counts) < 1 or math.prod(counts) > MOST_FILES:
        raise InputError(f"data set {shortened(pattern)}: give braces as {{FIRST..LAST}}, at most {MOST_FILES} files")
    first, last = braces.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    before, after = pattern[:braces.start()], pattern[braces.end():]
    return [name for number in numbers for name in expanded(before + number + after)]


def matching(pattern):
    """The files of a pattern with wildcards or braces. Of braces, each file must be there."""
    names = expanded(pattern)
    files = []
    for name in names:
        if glob.has_magic(name):
            files += map(Path, glob.glob(name, recursive=True))
        elif Path(name).exists():
            files.append(Path(name))
        elif len(names) > 1:
            raise InputError(f"data set {shortened(pattern)}: {shortened(name)} is missing: get it, or change braces")
    return files


def split_of(file, by_folder):
    """The word of a file's name that tells its split, or else that of its folder's name, and a pattern of such files;
    ("", "") if there is none."""
    for word in WORD.finditer(file.name.lower()):
        if word[1] in SPLITS:
            return word[1], f"{file.parent / file.name[:word.end()]}*{file.suffix}"
    for word in WORD.finditer(file.parent.name.lower()) if by_folder else ():
        if word[1] in SPLITS:
            return word[1], f"{file.parent}/*{file.suffix}"
    return "", ""


def refuse_splits(path, files):
    """Training on what is meant for testing must not happen by mistake: names may show one split only."""
    by_folder = len({file.parent for file in files}) > 1
    patterns = {}
    for file in files:
        word, pattern = split_of(file, by_folder)
        if word:
            patterns.setdefault(word, f'"{pattern}"')
    if len(patterns) > 1:
        choice = ", ".join(sorted(patterns.values(), key=lambda pattern: "train" not in pattern))
        raise InputError(f"data set {shortened(path)} has several splits: give one of {shortened(choice)}")


def no_files(path):
    """Why a path names no files, and what to give instead."""
    remedy = "give .jsonl, .json, .tar, .parquet or .arrow files by name or pattern, or a folder of the last three"
    why = "it is missing"
    if str(path)[:1] in "'\"":
        why = "its name begins with a quotation mark"
        remedy = "give it without quotation marks"
    elif glob.has_magic(str(path)):
        why = "no file matches"
    elif path.is_dir():
        nested = {f"{file.parent}/" for file in path.glob("*/*") if form_of(file) in FOLDERS}
        nested = nested or {str(file) for file in path.iterdir() if file.suffix.lower() in (".json", ".jsonl")}
        endings = sorted({file.suffix or file.name for file in path.iterdir()})
        why = f"the folder has {', '.join(endings)}" if endings else "the folder is empty"
        if nested:
            why = "it is no folder of shards or tables"
            remedy = f"give what is in it, such as {', '.join(sorted(nested))}"
    return InputError(f"data set {shortened(path, 140)} cannot be read ({shortened(why, 90)}): {shortened(remedy)}")


def data_files(path):
    """A file, a folder or a pattern with wildcards or braces -> format, sorted files."""
    path = Path(path)
    files = []
    if path.is_dir():
        inside = [file for file in path.iterdir() if not file.name.startswith(("cache-", "."))]
        for form in FOLDERS:                        # the first one found: tables about shards often lie beside them
            files = files or [file for file in inside if file.suffix.lower() == f".{form}"]
    elif path.exists():
        files = [path]
    else:
        files = matching(str(path))
    if not files:
        raise no_files(path)
    forms = sorted({form_of(file) for file in files})
    if len(forms) > 1 or len(files) > MOST_FILES:
        raise InputError(f"data set {shortened(path)} cannot be read ({len(files)} files, {', '.join(forms)}): give a "
                         f"pattern of one format, such as *.{forms[0]}, and at most {MOST_FILES} files")
    files.sort()
    refuse_splits(path, files)
    return forms[0], files


def json_lines_of(file):
    """(offset, size, number) of each line of a JSON-lines file that is not blank."""
    with open(file, "rb") as lines:
        offset = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield offset, len(line), number
            offset += len(line)


def json_elements(file):
    """(offset, size, number) of each element of a JSON array of any size: brackets outside strings are counted, nothing
    is parsed or kept."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        opening = re.match(rb"(?:\xef\xbb\xbf)?\s*\[", text)
        depth = number = start = 0
        end = opening.end() if opening else 0       # of the last element
        for token in JSON_TOKEN.finditer(text, end) if opening else ():
            if token[1] in (b"[", b"{"):
                if depth == 0:
                    start = token.start()
                    if not (SEPARATOR if number else BLANK).fullmatch(text, end, start):
                        raise ValueError(f"no single comma between records {number} and {number + 1}")
                depth += 1
            elif token[1] and depth:
                depth -= 1
                if depth == 0:
                    number += 1
                    end = token.end()
                    yield start, end - start, number
            elif token[1]:
                if BLANK.fullmatch(text, end, token.start()) and BLANK.fullmatch(text, token.end()):
                    return
                break
        raise ValueError("it must hold one JSON array and nothing else; JSON lines belong in a .jsonl file")


def split_name(member):
    """A tar member -> the key of its sample, and its ending. Folders and hidden files have no key."""
    first = member.name.rfind("/") + 1
    cut = member.name.find(".", first)
    if cut <= first or not member.isfile():
        return "", ""
    return member.name[:cut], member.name[cut + 1:].lower()


def tar_samples(file):
    """(offset, size, number) of each sample of a WebDataset shard: neighbours with the same name up to the first full
    stop. A picture and its words under a longer name (22.04.jpg, 22.04.txt) are a sample of their own."""
    with tarfile.open(file, "r:") as tar:
        last = stem = None
        start = end = number = 0
        endings = set()                             # of the members of this stem
        while member := tar.next():
            tar.members.clear()                     # tarfile would keep them all
            key, _ = split_name(member)
            if not key:
                continue
            name, _, ending = member.name.rpartition(".")
            alone = stem != last and endings & {*ENDINGS} and endings & {"txt", "json"}
            if key != last or (name != stem and alone):
                if last:
                    number += 1
                    yield start, end - start, number
                start = member.offset
            if name != stem:
                endings = set()
            endings.add(ending.lower())
            last = key
            stem = name
            end = member.offset_data + -(-member.size // 512) * 512             # whole blocks
        if last:
            yield start, end - start, number + 1
        # tarfile takes a broken header for the end of the archive.
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read(2**20)
        if len(rest) < 512 or rest.strip(b"\0"):
            raise tarfile.ReadError("no end mark where the samples stop")


def members_of(parts, *endings):
    """The contents of a sample {ending: bytes} with one of these endings; if there is none, with longer ones, such as
    input.jpg for jpg."""
    plain = [parts[ending] for ending in endings if ending in parts]
    return plain[:1] or [content for ending, content in parts.items() if ending.rpartition(".")[2] in endings]


def tar_members(content):
    """The bytes of a sample -> its name, {ending: content} of its members."""
    parts = {}
    stems = set()
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        name, _ = split_name(tar.firstmember)
        for member in tar:
            key, ending = split_name(member)
            if key:
                parts[ending] = tar.extractfile(member).read()
                stems.add(member.name.rpartition(".")[0])
    return stems.pop() if len(stems) == 1 else name, parts


def tar_entry(parts):
    """The members of a sample -> an entry {"image": [bytes, ...], ...} with the fields of its .json if that holds turns
    or there is no .txt, else its .txt as the caption."""
    images = members_of(parts, *ENDINGS)
    captions = [utf8(text).strip() for text in members_of(parts, "txt")]
    entries = [parsed(utf8(text), "a .json holds the fields of a record") for text in members_of(parts, "json")]
    entry = entries[0] if entries and isinstance(entries[0], dict) else {}
    if any(captions) and not first_field(entry, TURN_FIELDS, False):            # the .json is metadata
        entry = {"caption": captions}
    if not images or not entry:
        found = ", ".join(f".{ending}" for ending in parts)
        raise InputError("a sample needs a picture (.jpg, .jpeg, .png or .webp) and, next to it in the archive, a "
                         f"caption (.txt) or fields (.json): found {shortened(found)}")
    return entry | {"image": images}


def pyarrow_for(file):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{file} is read through pyarrow, which is not installed: pip install pyarrow") from error
    return pyarrow


def arrow_table(file):
    """The table in an Arrow file of either kind, mapped into memory. A stream that was cut between two batches would be
    a shorter one, but for its end mark."""
    arrow = pyarrow_for(file)
    content = arrow.memory_map(str(file))
    if content.read(6) == b"ARROW1":
        return arrow.ipc.open_file(content).read_all()
    content.seek(max(content.size() - 8, 0))
    if content.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
        raise ValueError("the stream has no end mark")
    content.seek(0)
    return arrow.ipc.open_stream(content).read_all()


def read_table(form, file, group):
    """Our columns of a row group of a parquet file, or of a whole Arrow file."""
    if form == "parquet":
        table = pyarrow_for(file).parquet.ParquetFile(file)
        return table.read_row_group(group, [name for name in COLUMNS if name in table.schema_arrow.names])
    table = arrow_table(file)
    table = table.select([name for name in COLUMNS if name in table.column_names])
    table.validate(full=True)                       # wrong offsets would end the process
    return table


def table_rows(form, file):
    """(row group, row in it, number) of each row of a parquet or Arrow file; the latter counts as one group."""
    if form == "parquet":
        table = pyarrow_for(file).parquet.ParquetFile(file)
        names = table.schema_arrow.names
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    else:
        names = arrow_table(file).column_names
        sizes = [len(read_table(form, file, 0))]
    turns = {*names} & {*TURN_FIELDS}               # which may have pictures in them
    if not turns and not ({*names} & {*IMAGE_FIELDS} and {*names} & {*CAPTION_FIELDS}):
        raise InputError(f'{shortened(file)} has the columns {shortened(", ".join(names))}: rename them to "image", '
                         'and "conversations" or "caption"')
    number = 0
    for group, size in enumerate(sizes):
        for row in range(size):
            number += 1
            yield group, row, number


def refuse_disguise(form, file):
    """Stop at a file that is something else than its name says."""
    with open(file, "rb") as opened:
        head = opened.read(1000)
    what = next((what for start, what in DISGUISES.items() if head.startswith(start)), None)
    if form == "jsonl" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        what = "one JSON array: let its name end in .json"
    if what:
        raise InputError(f"{shortened(file)} is {what.format(file=shortened(file))}")


def scan(form, file):
    """Where the records of a file lie: (offset, size, number) of each, in order."""
    refuse_disguise(form, file)
    if form in TABLES:
        return table_rows(form, file)
    return {"json": json_elements, "jsonl": json_lines_of, "tar": tar_samples}[form](file)


def parse_record(line, origin, folder, strict=True):
    """One line of JSON, or its fields as a dictionary -> Record. Its task follows from where <image> stands.

    Paths are relative to folder. strict: unknown fields are an error; otherwise they are ignored, and so is "task",
    which public data sets use for other things.
    """
    if isinstance(line, bytes):                     # json.loads would guess the encoding, and wrongly in mid-file
        line = utf8(line)
    entry = line if isinstance(line, dict) else parsed(line, "write one object per line")
    if not isinstance(entry, dict):
        raise InputError('a record is an object, and needs "image" and "conversations"')
    known = {"id", "task", *COLUMNS}
    if strict and set(entry) - known:
        raise InputError(f"unknown field {shortened(min(set(entry) - known))!r}: known are {', '.join(sorted(known))}")
    words = first_field(entry, TURN_FIELDS + CAPTION_FIELDS, strict)
    shown = first_field(entry, IMAGE_FIELDS, strict)
    starts, result = edit_of(entry, words, folder)
    images, captions, turns, system = [], [], (), False
    if words in TURN_FIELDS:
        turns, system = turn_pairs(turns_of(entry[words], images))
    elif words:
        captions = ["<image>" * len(starts) + text for text in caption_list(entry[words])]
        turns = tuple((text, "<image>") for text in captions[:1])
    if re.search("[\ud800-\udfff]", "".join([*captions, *(text for turn in turns for text in turn)])):
        raise InputError("a text has half a character (\\ud800 to \\udfff), which no tokenizer takes: write it whole")
    images = starts + result or image_list(images or entry.get(shown), folder)
    if not turns or not images:
        fields = ", ".join(name if entry[name] else f"{name} (empty)" for name in entry)
        raise InputError('a record needs a picture ("image", a path or a list of them), and "conversations" or a '
                         f'"caption" to draw: found {shortened(fields) or "no field"}')
    task = check_turns(turns, len(images), entry.get("task") if strict else None)
    return Record(origin, task, turns, tuple(images), tuple(captions[1:] and captions), system)


def read_record(form, file, offset, size, number, table=read_table, check=None):
    """The record at an offset of a file, as `scan` tells it. check(picture) may refuse its pictures."""
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
                name, parts = tar_members(entry)
                origin = f"{file}:{name}"
                entry = tar_entry(parts)
        record = parse_record(entry, origin, file.parent, strict=form == "jsonl")
        for picture in record.pictures if check else ():
            check(picture)
        return record
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
    except BROKEN as error:
        raise InputError(f"{origin}: cannot be read ({first_line(error)}): check that the file is whole and "
                         "unchanged") from error
