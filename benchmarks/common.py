"""What benchmarks share: questions, tables, asking a model or reading what it said, drawing."""

import contextlib
import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
from formats.datasets import stamps
from formats.weights import find_folder
from parts.pictures import open_picture, to_picture
from parts.processes import all_done, processes, rank
from parts.settings import InputError, aside, first_line, json_lines, lines_to, read_json, write_json


# They do what the official programs do; where such a program has a quirk that moves the score, the quirk belongs to the
# benchmark and is kept. Files, metrics and the paper's numbers: README.
def average(values, unit=1):
    """Plain mean times unit; None without values, as a score that does not exist is not 0."""
    values = list(values)
    return unit * (sum(values) / len(values)) if values else None


# A row is a dict of a data file's columns, a missing value is absent or None. A judge is any callable
# judge(prompt, *, temperature, max_tokens, system) -> str. "Official" is the program of a benchmark's authors; where it
# has a quirk that moves the score, the quirk belongs to the benchmark and is kept.
LETTER_ONLY = "Answer with the option's letter from the given choices directly."
SHORT_ANSWER = "Answer the question using a single word or phrase."


def mmbench_letter(pred, option):
    """Answer and {letter: option text} -> letter, or the stripped answer. AIA's rule for MMBench and MMVP."""
    pred = pred.strip()
    if len(pred) < 2:
        return pred                                     # any character stands; AIA stops on "", here it is just wrong
    if pred[0] in option:
        return pred[0]                                  # AIA: so "Because" is B
    return next((letter for letter, text in option.items() if text in pred), pred)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Item:
    """One question of a benchmark: `picture` a path, or bytes of a picture file; `row` its fields in the data file."""

    id: str
    prompt: str
    picture: Path | bytes
    row: dict


def find_file(folder, *names):
    """The first of some files (patterns) of a benchmark that is there."""
    for name in names:
        for file in sorted(Path(folder).glob(name)):
            return file
    raise InputError(f"{folder} holds no {' or '.join(names)}: give --data the benchmark as it is distributed")


def table(file, *needed, delimiter=",", missing=()):
    """[(origin, row)] of a table with a header; a value that is one of the words `missing` becomes None."""
    csv.field_size_limit(2**31 - 1)                                             # pictures in base64
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = [*csv.DictReader(lines, delimiter=delimiter)]
        if not rows:
            raise ValueError("it holds no rows")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): download it again") from error
    placed = []
    for number, row in enumerate(rows, 1):
        origin = f"{file} record {number}"
        row = {key: None if value in missing else value for key, value in row.items()}
        if None in row:
            raise InputError(f"{origin}: it has more fields than the header: download it again")
        if absent := [name for name in needed if row.get(name) is None]:
            raise InputError(f"{origin}: there is no {absent[0]!r}, or the line is cut: download it again")
        placed.append((origin, row))
    return placed


def spreadsheet(file, rows):
    """Write rows (dicts of equal keys) as an .xlsx file. A text is a text, even where it begins like a formula."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell
    except ImportError as error:
        raise InputError(f"{file} is written through openpyxl, which is not installed: pip install openpyxl") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for values in ([*rows[0]], *(row.values() for row in rows)):
        cells = []
        for value in values:
            words = isinstance(value, str)
            cells.append(WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value) if words else value))
            cells[-1].data_type = "s" if words else cells[-1].data_type
        sheet.append(cells)
    with aside(file) as part:
        book.save(part)


# ---------------------------------------------------------------------------------------------------------------------
# Asking the model, and what was said
# ---------------------------------------------------------------------------------------------------------------------
KEPT = ("bench", "variant", "checkpoint", "vision_tokenizer", "dtype", "rope_bf16", "allow_special", "prompt_style",
        "gen_roles", "guidance", "pictures", "seed")


def settings_of(settings, prompts):
    """What answers or pictures depend on. Those of one folder come from one model, asked the same in the same way."""
    mine = {name: getattr(settings, name) for name in KEPT}
    digest, file = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12], Path(settings.out) / "settings.json"
    mine |= {"questions": f"{len(prompts)} (SHA-256 {digest})", "weights": weights_of(settings.checkpoint)}
    stored = read_json(file) if file.exists() else mine
    for name, value in mine.items():
        if stored.get(name) != value:
            raise InputError(f"{settings.out} holds results with {name} {stored.get(name)!r}, now it is {value!r}: "
                             "give another --out, or score those with --preds")
    return mine


def weights_of(checkpoint):
    """What changes when other weights come under the same name: names, sizes and times of their files, in short."""
    folder = find_folder(checkpoint)
    files = [folder] if folder.is_file() else sorted(
        file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin", ".pth"))
    return hashlib.sha256(json.dumps(stamps(files, folder)).encode()).hexdigest()[:12]


def load_asked(settings, mine):
    """Model and text tokenizer. The settings are stored only now, so that a refused command leaves the folder free."""
    m, text, _ = evaluation.load_run(settings)
    for name, usual in (("prompt_style", "aia"), ("gen_roles", "tags")):
        if m.config.kind == "emu3" and mine[name] != usual:
            raise InputError(f"--{name.replace('_', '-')} {mine[name]} names the roles of Janus-Pro's template, which "
                             "Emu3's does not have: leave it out")
    if rank() == 0:
        write_json(mine, Path(settings.out) / "settings.json")
    return m, text


MAX_NEW_TOKENS = {"aia": 512, "vlmevalkit": 2048}
WHITE = ("mmmu",)                                   # official: here what is transparent becomes white


def ask_all(settings, items):
    """Write OUT/predictions.jsonl, the raw answers in the order of the items. What a killed run has written is kept;
    under torchrun every process asks its share."""
    out = Path(settings.out)
    mine = settings_of(settings, {item.id: item.prompt for item in items})
    if (out / "predictions.jsonl").exists():
        return
    for item in items:
        if isinstance(item.picture, Path) and not item.picture.exists():
            raise InputError(f"question {item.id}: picture {item.picture} is missing: give --data the benchmark with "
                             "its pictures")
    part = out / f"answers-{rank()}.jsonl"
    lines_to(part, map(json.dumps, whole_lines([part]).values()))
    said = whole_lines(out.glob("answers-*.jsonl"))
    if todo := [item for item in items[rank()::processes()] if item.id not in said]:
        m, text = load_asked(settings, mine)
        preparer = data.Preparer(m, text, training=False)
        if settings.prompt_style == "vlmevalkit":
            preparer.template.plain()
        with open(part, "a", encoding="utf-8") as lines:
            for first in tqdm(range(0, len(todo), settings.batch), desc=settings.bench, unit="batch", disable=None):
                group = todo[first:first + settings.batch]
                for item, response in zip(group, ask_group(settings, preparer, group), strict=True):
                    lines.write(json.dumps({"id": item.id, "prompt": item.prompt, "response": response}) + "\n")
                lines.flush()
    all_done()
    if rank() == 0:
        said = whole_lines(parts := [*out.glob("answers-*.jsonl")])
        if absent := [item.id for item in items if item.id not in said]:
            raise InputError(f"{out} lacks {len(absent)} answers, such as {absent[0]!r}: all processes need one folder "
                             "that they share; what is there stays")
        lines_to(out / "predictions.jsonl", (json.dumps(said[item.id]) for item in items))
        for file in parts:
            file.unlink()


def whole_lines(files):
    """{id: row} of files of answers. A line that was cut, as the job was killed, does not count."""
    said = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                said[row["id"]] = row
    return said


def ask_group(settings, preparer, items):
    """Raw answers to some items: greedy, new tokens only, unstripped."""
    m, janus, pictures = preparer.m, preparer.config.kind == "janus", [rgb(item, settings.bench) for item in items]
    codes = None if janus else preparer.codes(pictures)
    preparer.known.clear()                                                      # thousands of large pictures
    samples = []
    for i, item in enumerate(items):
        asked = item.prompt                         # Emu3 reads it as it is; Janus-Pro's template strips its end, and
        if janus:                                   # sets the line break behind a picture
            asked = asked.rstrip().removeprefix("\n" * (settings.prompt_style == "vlmevalkit"))
        samples.append(preparer.template.understanding([([0, asked], None)], codes and codes[i:i + 1]))
    device = next(m.parameters()).device
    ids, mask = evaluation.left_padded(samples, preparer.text.ids["pad"], device)
    pixels = preparer.seen(pictures)["pixels"].to(device) if janus else None
    longest = 1 if (settings.bench, settings.variant) == ("mme", "aia") else MAX_NEW_TOKENS[settings.prompt_style]
    return [preparer.text.decode(row) for row in m.generate_text(ids, pixels, mask, longest).tolist()]


def rgb(item, bench):
    """Picture of an item (H, W, 3) uint8. Transparency is dropped, as the readers of most benchmarks do, or pasted on
    white."""
    try:
        picture = open_picture(item.picture, "janus")                           # the wider limits, for both models
        if bench in WHITE and ("A" in picture.getbands() or "transparency" in picture.info):
            picture = picture.convert("RGBA")
            picture = Image.composite(picture, Image.new("RGBA", picture.size, "white"), picture.getchannel("A"))
        return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"question {item.id}: {first_line(error)}: download the benchmark again") from error


def read_predictions(file, items):
    """Raw answers to all items, in their order."""
    said, known = {}, {item.id for item in items}
    for origin, row in json_lines(file, "id", "response"):
        name = str(row["id"])
        if not isinstance(row["response"], str):
            raise InputError(f"{origin}: the response is no text: write what the model said")
        if name in said or name not in known:
            raise InputError(f"{origin}: id {name!r} " + ("comes twice: leave one answer" if name in said else
                             "is none of this data set: give the answers to these questions"))
        said[name] = row["response"]
    if absent := [item.id for item in items if item.id not in said]:
        raise InputError(f"{file}: {len(said)} answers for {len(items)} questions, none for id {absent[0]!r}: it is "
                         "not complete, or of another data file")
    return [said[item.id] for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------
def draw_all(settings, prompts, files):
    """Draw {name: prompt} into {name: [picture files]}, where they are not there yet; a single file takes four pictures
    as a grid. Every prompt has its own seed, so a resumed or shared run draws the same."""
    names = [*prompts]
    mine, seeds = settings_of(settings, prompts), {name: settings.seed + i for i, name in enumerate(names)}
    if todo := [name for name in names[rank()::processes()] if not all(file.exists() for file in files[name])]:
        m, text = load_asked(settings, mine)
        if rank() == 0:
            write_json(seeds, Path(settings.out) / "seeds.json")
        for name in tqdm(todo, desc=settings.bench, unit="prompt", disable=None):
            pixels = evaluation.draw(m, text, [prompts[name]] * settings.pictures, seeds[name],
                                     settings.guidance or None, roles=settings.gen_roles)
            pictures = [to_picture(one) for one in pixels]
            if len(pictures) > len(files[name]):
                pictures = [np.concatenate([np.concatenate(pictures[i:i + 2], 1) for i in (0, 2)])]
            for picture, file in zip(pictures, files[name], strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                with aside(file) as part:
                    Image.fromarray(picture).save(part, format="PNG")
    all_done()
