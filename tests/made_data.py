"""Scenes, tokenizers, records and data folders that several test files make."""

import base64
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import data
import model
from formats.checkpoints import save_checkpoint, tensors_of
from formats.datasets import every
from formats.records import RECORD_TASKS
from parts.world import (
    CELL_WORDS,
    COLOURS,
    GRID,
    NUMBERS,
    OPPOSITE,
    PREFIXES,
    RELATIONS,
    SHAPES,
    World,
    combinations,
    draw_scenes,
    read_scenes,
)

PRESET = {"emu3": model.PRESETS["tiny-emu3"], "janus": model.PRESETS["tiny-janus"]}
both_kinds = pytest.mark.parametrize("kind", PRESET)
SHAPE, COLOUR, PLACE, RELATION = (f"({'|'.join(words)})" for words in (SHAPES, COLOURS, CELL_WORDS,
                                                                       RELATIONS))


def random(*key):
    return np.random.default_rng(key)


def train_tokenizers(folder):
    """The text tokenizer of each tiny preset."""
    return {kind: data.train_tokenizer(folder / f"{kind}.json", config) for kind, config in PRESET.items()}


def make_preparers(texts):
    """A preparer for a tiny model of each kind; its picture codes are those of random weights."""
    torch.manual_seed(0)
    return {kind: data.Preparer(model.build(f"tiny-{kind}", layers=1, width=32), text) for kind, text in texts.items()}


def training_scenes(n, seed=0, size=()):
    world, rng = World(seed, *size), random(seed)
    return [world.scene(rng) for _ in range(n)]


def combination_of(prompt):
    """Read a prompt back by its words alone."""
    prefix = max((p for p in PREFIXES if prompt.startswith(p)), key=len)
    several = {skill: " and ".join([f"a {SHAPE} {PLACE}"] * n) for n, skill in
               enumerate(("one object", "two objects", "three objects", "four objects"), 1)}
    patterns = {**several,
                "counting": f"(two|three) {COLOUR} {SHAPE}e?s", "colours": f"a {COLOUR} {SHAPE} {PLACE}",
                "position": f"a {COLOUR} {SHAPE} {RELATION} a {COLOUR} {SHAPE}",
                "colour attribution": f"a {COLOUR} {SHAPE} and a {COLOUR} {SHAPE}"}
    (skill, words), = ((skill, found.groups()) for skill, pattern in patterns.items()
                       if (found := re.fullmatch(pattern, prompt.removeprefix(prefix))))
    words = [CELL_WORDS.index(w) if w in CELL_WORDS else NUMBERS.index(w) if w in NUMBERS else w
             for w in words]
    if skill in ("counting", "colours"):
        return skill, *words
    if skill in several:
        return skill, *(word for pair in sorted(zip(words[::2], words[1::2], strict=True)) for word in pair)
    first, name, second = tuple(words[:2]), words[2:-2], tuple(words[-2:])
    if first[1] > second[1]:
        first, name, second = second, [OPPOSITE[n] for n in name], first
    return skill, first, *name, second


def all_held_out(pictures, world):
    """Can every picture be read, and shows each a combination that no training picture of the world shows?"""
    scenes, clear = read_scenes(np.stack(pictures), world)
    return clear.all() and all(combinations(scene) & world.held_out for scene in scenes)


def fits(caption, scene):
    """Is this the full description of a scene, or a prompt that it fulfils?"""
    return caption == answer_of("what is there?", scene) or combination_of(caption) in combinations(scene)


def answer_of(text, scene):
    """Answer a question about a scene by brute force, from its words alone."""
    def count(**want):
        return sum(all(getattr(thing, key) == word for key, word in want.items()) for thing in scene)

    def match(pattern):
        return re.fullmatch(pattern.replace("?", r"\?").replace("PLURAL", "(?:e?s)?"), text)
    truth = None
    if found := match(f"is there a {SHAPE}?"):
        truth = count(shape=found[1]) > 0
    elif found := match(f"is there a {SHAPE} {PLACE}?"):
        truth = count(shape=found[1], cell=CELL_WORDS.index(found[2])) > 0
    elif found := match(f"(is|are) there (one|two|three) {SHAPE}PLURAL?"):
        truth = NUMBERS[count(shape=found[3])] == found[2]
    elif found := match(f"(is|are) the {SHAPE}PLURAL {COLOUR}?"):
        truth = count(shape=found[2], colour=found[3]) == count(shape=found[2])
    elif found := match(f"is the {SHAPE} {RELATION} the {SHAPE}?"):
        (row, column), (row2, column2) = (divmod(t.cell, GRID) for name in (found[1], found[3]) for t in scene
                                          if t.shape == name)
        truth = {"left of": column < column2, "right of": column > column2, "above": row < row2,
                 "below": row > row2}[found[2]]
    elif text == "what is there?":
        return " and ".join(f"a {t.colour} {t.shape} {CELL_WORDS[t.cell]}" for t in scene)
    elif found := match(f"is there a {SHAPE} or a {SHAPE}?"):
        shape, = (name for name in found.groups() if count(shape=name))
        return shape
    elif found := match(f"is the {SHAPE} (left or right of|above or below) the {SHAPE}?"):
        sides = ("left", "right") if "left" in found[2] else ("above", "below")
        right, = (side for side in sides
                  if answer_of(text.replace(found[2], side + " of" * ("left" in found[2])), scene) == "yes")
        return right
    elif found := match(f"how many {SHAPE}PLURAL are there?"):
        return NUMBERS[count(shape=found[1])]
    elif found := match(f"where is the {SHAPE}?"):
        return next(CELL_WORDS[t.cell] for t in scene if t.shape == found[1])
    elif found := match(f"what colour (is|are) the {SHAPE}PLURAL?"):
        return next(t.colour for t in scene if t.shape == found[2])
    else:
        name, *options = match(r"which (colour|shape) is there? A (\w+) B (\w+) C (\w+) D (\w+)").groups()
        letter, = (letter for letter, word in zip("ABCD", options, strict=True) if count(**{name: word}))
        return letter
    return "yes" if truth else "no"


def rank_file(folder, ranks, n_visual=4, filler=0):
    """Emu3's two tokenizer files: byte strings by rank, padded with strings no text contains, and visual tokens."""
    ranks = dict(enumerate(ranks)) if isinstance(ranks, list) else ranks
    filled = [ranks.get(rank, b"\xff\xfe" + rank.to_bytes(3, "big")) for rank in range(max(filler, len(ranks)))]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(filled)]
    (folder / "emu3.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    visual = ["<|image token|>", "<|image start|>", "<|image end|>"]
    visual += [f"<|visual token {code:06d}|>" for code in range(n_visual)]
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(visual) + "\n\n")
    return folder / "emu3.tiktoken"


# The 256 single bytes in the order of the published ranks: visible ASCII, visible Latin-1, then the others.
BYTES = [bytes([b]) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [bytes([b]) for b in range(256) if bytes([b]) not in BYTES]


def entry(image, *turns, **more):
    """A record as it stands in a JSON-lines file; turns are (human, gpt)."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"image": image, "conversations": said} | more


def make_album(tmp_path):
    """A folder with pictures, good and bad, and a function that writes a JSON-lines file beside them."""
    for name, picture in zip("abc", draw_scenes(training_scenes(3)), strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    Image.fromarray(random(0).integers(256, size=(60, 60, 3)).astype(np.uint8)).save(tmp_path / "huge.png")
    Image.new("RGB", (280, 10)).save(tmp_path / "flat.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "huge.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")

    def write(*entries):
        lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
        (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "train.jsonl"
    return write


DRAWN, ASKED = entry("a.png", ("a red cross", "<image>")), entry("b.png", ("is it red?", "yes"), ("and blue?", "no"))


def records(source):
    return [record for task in RECORD_TASKS for record in every(source, task)]


def saver(tmp_path):
    """Tiny weights in a folder, and the model that they are: saved(kind, seed, **changes)."""
    def make(kind, seed=0, **changes):
        torch.manual_seed(seed)
        m, folder = model.build(f"tiny-{kind}", layers=1, width=32, **changes), tmp_path / f"{kind}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(tensors_of(m), {"config": vars(m.config), "dtype": "float32"},
                        folder / "checkpoints/0-0000000").result()
        return m, str(folder)
    return make


def encode(folder, file, init, *flags):
    data.main(["encode", str(folder), "--data", str(file), "--init", init, *flags])


ALBUM = [DRAWN, ASKED, entry(["b.png", "c.png"], ("same?", "no"))]
MIXED = entry(["b.png", "c.png"], ("<image>make it red", "so: <image>"), ("is it red?", "yes"))


# Data sets as they are published
SHARDED = ("tar", "parquet", "arrow")
EXTRA = {"id": 7, "data_source": "web", "note": 'brackets ]} in "quotes" \\', "scores": [1, 2]}
PUBLIC = [DRAWN, ASKED, entry("c.png", ("two red crosses", "<image>"))]


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_table(file, columns):
    table = pyarrow.table(columns)
    if file.suffix == ".parquet":
        return pyarrow.parquet.write_table(table, file, row_group_size=1)
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table, max_chunksize=1)


def store(form, folder, entries):
    """Entries as others publish them, with fields that we do not know, in two shards where there are shards."""
    entries = [e | EXTRA for e in entries]
    if form == "json":
        (folder / "train.json").write_text(json.dumps(entries, indent=1))
        return folder / "train.json"
    (folder / form).mkdir()
    for shard, part in enumerate((entries[:2], entries[2:])):
        file, pictures = folder / form / f"{shard}.{form}", [(folder / e["image"]).read_bytes() for e in part]
        if form != "tar":
            write_table(file, {"image": [{"bytes": content, "path": "x.png"} for content in pictures],
                               **{name: [e[name] for e in part] for name in ("conversations", *EXTRA)}})
            continue
        with tarfile.open(file, "w") as tar:
            for i, (e, content) in enumerate(zip(part, pictures, strict=True)):
                add(tar, f"part/{i}.PNG", content)
                caption = e["conversations"][1]["value"] == "<image>" and e["conversations"][0]["value"]
                if caption:
                    add(tar, f"part/{i}.txt", f"{caption}\n".encode())
                add(tar, f"part/{i}.json", json.dumps({"url": "web"} if caption else e).encode())
    return folder / form
