"""What the benchmarks share: data tables, asking a model, reading its answers, drawing pictures.

Every benchmark follows its official program, the one by its authors. A quirk of that program that moves the score is
part of the benchmark and is kept. Comments mark it "official", or "AIA" if it comes from the evaluation code of the
AIA paper (arXiv 2511.22663).

    python eval.py score mmbench --data MMBench --checkpoint RUN --out scores/mmbench
"""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
from formats.datasets import stamps
from formats.hub import find_folder
from parts.pictures import on_white, open_picture, to_picture
from parts.processes import all_done, processes, rank
from parts.settings import InputError, aside, first_line, json_lines, read_json, read_text, whole_lines, write_json

LETTER_ONLY = "Answer with the option's letter from the given choices directly."
SHORT_ANSWER = "Answer the question using a single word or phrase."


def average(values, unit=1):
    """Plain mean times unit. None without values: a score that does not exist is not 0."""
    values = list(values)
    return unit * (sum(values) / len(values)) if values else None


def mmbench_letter(pred, option):
    """Answer and {letter: option text} -> letter, or the stripped answer. AIA's rule for MMBench and MMVP."""
    pred = pred.strip()
    if len(pred) < 2:
        return pred                             # any character counts; AIA crashes on "", here it is merely wrong
    if pred[0] in option:
        return pred[0]                          # AIA: so "Because" is B
    return next((letter for letter, text in option.items() if text in pred), pred)


# ---------------------------------------------------------------------------------------------------------------------
# Data files
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Item:
    """One question of a benchmark. picture: path, or bytes of a picture file; row: its fields in the data file, where a
    missing value is absent or None."""

    id: str
    prompt: str
    picture: Path | bytes
    row: dict


def tell_left_out(names, total, what):
    """Say what the score of a benchmark leaves out: some `names` of `total` things, and what is wrong with them."""
    if names and rank() == 0:
        listed = ", ".join(names[:3])
        print(f"warning: {len(names)} of {total} {what}, such as {listed[:200]}: the score leaves them out, as the "
              "official program does")


def lines_to(file, lines):
    """Write text lines; make the folder if needed."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with aside(file) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def find_file(folder, *names, itself=False):
    """The only file (or folder) in a benchmark's folder that matches one of several names or patterns. itself: `folder`
    may be that file. InputError if nothing or more than one thing matches: a guess would score another benchmark."""
    folder = Path(folder)
    if itself and folder.is_file():
        return folder
    if folder.is_file():
        raise InputError(f"--data {folder} is a file: give the folder of the benchmark as it is distributed")
    files = sorted({file for name in names for file in folder.glob(name)})
    if not files:
        raise InputError(f"{folder} holds no {' or '.join(names)}: give --data the benchmark as it is distributed")
    if len(files) > 1:
        listed = ", ".join(file.relative_to(folder).as_posix() for file in files)
        remedy = "give --data the file itself" if itself else "keep only one there"
        raise InputError(f"{folder} holds {len(files)} candidates ({listed[:200]}): {remedy}")
    return files[0]


def check_texts(origin, row, *names):
    """Refuse a row of a data file in which one of the named fields is not a text."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise InputError(f"{origin}: {name!r} is not a text: download it again")


def table(file, *needed, delimiter=",", missing=()):
    """[(origin, row)] of a table with a header. A value that is one of the words `missing` becomes None."""
    csv.field_size_limit(2**31 - 1)             # pictures in base64
    lines = io.StringIO(read_text(file), newline="")
    try:
        rows = [*csv.DictReader(lines, delimiter=delimiter)]
    except csv.Error as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): download it again") from error
    if not rows:
        raise InputError(f"{file} holds no rows: download it again")
    found = []
    for number, row in enumerate(rows, 1):
        origin = f"{file} record {number}"
        row = {key: None if value in missing else value for key, value in row.items()}
        if None in row:                         # DictReader files surplus fields under None
            raise InputError(f"{origin} has more fields than the header: download it again")
        if absent := [name for name in needed if row.get(name) is None]:
            raise InputError(f"{origin} has no {absent[0]!r}, or its line is cut short: download it again")
        found.append((origin, row))
    return found


def spreadsheet(file, rows):
    """Write rows (dicts with the same keys) as an .xlsx file. Text stays text, even if it looks like a formula."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell
    except ImportError as error:
        raise InputError(f"writing {file} needs openpyxl, which is not installed: pip install openpyxl") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet()

    def entry(value):
        if not isinstance(value, str):
            return WriteOnlyCell(sheet, value)
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        made.data_type = "s"
        return made

    sheet.append([entry(name) for name in rows[0]])
    for row in rows:
        sheet.append([entry(value) for value in row.values()])
    with aside(file) as part:
        book.save(part)


# ---------------------------------------------------------------------------------------------------------------------
# One output folder holds the results of one model, asked in one way
# ---------------------------------------------------------------------------------------------------------------------
DECISIVE = ("bench", "variant", "checkpoint", "vision_tokenizer", "dtype", "rope_bf16", "allow_special", "prompt_style",
            "gen_roles", "guidance", "pictures", "seed")


def weights_of(checkpoint):
    """Short hash of the names, sizes and times of the weight files: it changes if they are replaced."""
    folder = find_folder(checkpoint)
    if folder.is_file():
        files = [folder]
    else:
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin", ".pth"))
    return hashlib.sha256(json.dumps(stamps(files, folder)).encode()).hexdigest()[:12]


def settings_of(settings, prompts, data_name):
    """Everything the answers or pictures depend on. data_name: of the file with the questions or prompts. Refused if
    the output folder holds results of other settings."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]
    mine = {name: getattr(settings, name) for name in DECISIVE}
    mine["data"] = data_name
    mine["questions"] = f"{len(prompts)} (SHA-256 {digest})"
    mine["weights"] = weights_of(settings.checkpoint)
    file = Path(settings.out) / "settings.json"
    stored = read_json(file) if file.exists() else mine
    stored.setdefault("data", data_name)            # older results do not name it
    for name, value in mine.items():
        if stored.get(name) != value:
            raise InputError(f"{settings.out} holds results with {name} {stored.get(name)!r}, but it is now {value!r}: "
                             "give another --out, or score the stored results with --preds")
    return mine


def load_asked(settings, mine):
    """Model and text tokenizer. The settings are stored only now, so a refused command leaves the folder free."""
    m, text, _ = evaluation.load_run(settings)
    for name, usual in (("prompt_style", "aia"), ("gen_roles", "tags")):
        if m.config.kind == "emu3" and mine[name] != usual:
            raise InputError(f"--{name.replace('_', '-')} {mine[name]} changes the role words of Janus-Pro's template; "
                             "Emu3's has none to change: leave it out")
    if rank() == 0:
        write_json(mine, Path(settings.out) / "settings.json")
    return m, text


# ---------------------------------------------------------------------------------------------------------------------
# Asking the model
# ---------------------------------------------------------------------------------------------------------------------
MAX_NEW_TOKENS = {"aia": 512, "vlmevalkit": 2048}   # by prompt style
WHITE = ("mmmu",)                                   # benchmarks whose AIA reader turns transparent pixels white


def rgb(item, bench):
    """Picture of an item (H, W, 3) uint8."""
    try:
        picture = open_picture(item.picture, "janus")               # the wider size limits, for both kinds
        if bench in WHITE:
            return np.asarray(on_white(picture))
        return np.asarray(picture.convert("RGB"))   # AIA: its other readers drop transparency, unlike ours for training
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"question {item.id}: {first_line(error)}: download the benchmark again") from error


def ask_group(settings, preparer, items):
    """Raw answers to some items: greedy decoding, new tokens only, not stripped."""
    m = preparer.m
    janus = preparer.config.kind == "janus"
    pictures = [rgb(item, settings.bench) for item in items]
    codes = None if janus else preparer.codes(pictures)
    preparer.known.clear()                          # it would keep thousands of large pictures
    samples = []
    for i, item in enumerate(items):
        prompt = item.prompt                        # Emu3 reads it unchanged; Janus-Pro's template strips its end
        if janus:
            prompt = prompt.rstrip()
        if janus and settings.prompt_style == "vlmevalkit":
            prompt = prompt.removeprefix("\n")      # the template puts this line break behind the picture itself
        own = [codes[i]] if codes else None
        samples.append(preparer.template.conversation([([0, prompt], None)], own))
    device = next(m.parameters()).device
    ids, mask = evaluation.left_padded(samples, preparer.text.ids["pad"], device)
    pixels = preparer.seen(pictures)["pixels"].to(device) if janus else None
    longest = MAX_NEW_TOKENS[settings.prompt_style]
    if settings.bench == "mme" and settings.variant == "aia":
        longest = 1                                 # AIA: its MME program keeps the first token only
    return [preparer.text.decode(row) for row in m.generate_text(ids, pixels, mask, longest).tolist()]


def answers_in(*files):
    """{id: row} of files of answers. What is no answer is left out: it will be asked again."""
    return {row["id"]: row for row in whole_lines(*files)
            if isinstance(row.get("id"), str) and isinstance(row.get("response"), str)}


def join_answers(out, items):
    """Make predictions.jsonl of the answers of all processes."""
    parts = [*out.glob("answers-*.jsonl")]
    known = answers_in(*parts)
    if absent := [item.id for item in items if item.id not in known]:
        raise InputError(f"{out} lacks {len(absent)} answers, such as {absent[0]!r}: give all processes one shared "
                         "--out; the stored answers are kept")
    lines_to(out / "predictions.jsonl", (json.dumps(known[item.id]) for item in items))
    for file in parts:
        file.unlink()


def ask_all(settings, items, data_name):
    """Write OUT/predictions.jsonl: the raw answers in the order of the items. data_name: see settings_of.

    Answers that a killed run has stored are kept. Under torchrun every process asks its share of the questions.
    """
    out = Path(settings.out)
    mine = settings_of(settings, {item.id: item.prompt for item in items}, data_name)
    if (out / "predictions.jsonl").exists():
        return
    for item in items:
        if isinstance(item.picture, Path) and not item.picture.exists():
            raise InputError(f"question {item.id}: picture {item.picture} is missing: give --data the benchmark with "
                             "its pictures")
    part = out / f"answers-{rank()}.jsonl"
    lines_to(part, map(json.dumps, answers_in(part).values()))       # without a line that was cut short
    known = answers_in(*out.glob("answers-*.jsonl"))
    if todo := [item for item in items[rank()::processes()] if item.id not in known]:
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
        join_answers(out, items)


def read_predictions(file, items):
    """Raw answers to all items, in the order of the items."""
    known = {item.id for item in items}
    answers = {}
    for origin, row in json_lines(file, "id", "response"):
        name = str(row["id"])
        if not isinstance(row["response"], str):
            raise InputError(f"{origin}: the response is not a string: give the model's raw text")
        if name in answers:
            raise InputError(f"{origin}: id {name!r} comes twice: keep one answer")
        if name not in known:
            raise InputError(f"{origin}: id {name!r} is not in this data set: give the answers to its questions")
        answers[name] = row["response"]
    if absent := [item.id for item in items if item.id not in answers]:
        raise InputError(f"{file}: {len(answers)} answers for {len(items)} questions, none for id {absent[0]!r}: is it "
                         "complete, and of this data file?")
    return [answers[item.id] for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------
def store_pictures(pictures, files):
    """Write a PNG file for each picture (H, W, 3) uint8. Four pictures for a single file become a grid of 2 x 2."""
    if len(pictures) > len(files):
        rows = [np.concatenate(pictures[i:i + 2], axis=1) for i in (0, 2)]
        pictures = [np.concatenate(rows)]
    for picture, file in zip(pictures, files, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as part:
            Image.fromarray(picture).save(part, format="PNG")


def draw_all(settings, prompts, files, data_name):
    """Draw {name: prompt} into {name: [picture files]}, except where all files exist. data_name: see settings_of.

    Every prompt has its own seed, so a resumed or shared run draws the same pictures.
    """
    names = [*prompts]
    mine = settings_of(settings, prompts, data_name)
    seeds = {name: settings.seed + i for i, name in enumerate(names)}
    if todo := [name for name in names[rank()::processes()] if not all(file.exists() for file in files[name])]:
        m, text = load_asked(settings, mine)
        if rank() == 0:
            write_json(seeds, Path(settings.out) / "seeds.json")
        for name in tqdm(todo, desc=settings.bench, unit="prompt", disable=None):
            pixels = evaluation.draw(m, text, [prompts[name]] * settings.pictures, seeds[name],
                                     settings.guidance or None, roles=settings.gen_roles)
            store_pictures([to_picture(one) for one in pixels], files[name])
    all_done()
