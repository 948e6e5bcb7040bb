"""What the model eats: a world drawn by code, your own pictures, prompt templates, and the masks that AIA needs.

A record (a picture with a conversation) becomes tokens with a role each; from the roles follow the labels of next-token
prediction and the two masks of Eq. 1, by one rule for both models (see `spans`).

    python data.py export FOLDER --n 200      # draw world data as pictures + JSON lines, the layout of --data
    python data.py index shards/ train.jsonl  # where each record lies: data sets of any size, read at random
    python data.py encode FOLDER --data train.jsonl --init Janus-Pro-7B      # the codes of all pictures, once
"""

import argparse
import base64
import concurrent.futures
import functools
import glob
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import struct
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import aia
import model
from aia import InputError
from parts import kernels

# Legend: B samples of one task, T tokens, N image tokens of one picture, S side of a picture in pixels.


# ---------------------------------------------------------------------------------------------------------------------
# Settings: a dataclass is defaults, flags, help and log
# ---------------------------------------------------------------------------------------------------------------------
def opt(default, help, choices=None):
    """A field of a settings dataclass, with the help text of its flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def at_least(settings, least):
    """Refuse numbers of a settings dataclass that are below {field: least}, too large for 64 bits, or not numbers."""
    for name, low in least.items():
        if not low <= getattr(settings, name) < 2**63:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: give at least {low}, below 2^63")


class Extend(argparse.Action):
    """A flag that is given twice adds to what was given before, and takes the place of the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


def parse(cls, argv=None, prog=None, defaults=()):
    """A --flag for every field; positional fields are those named in cls.POSITIONAL. Bad flags exit with status 2.
    defaults {field: value} stand in for those of the class."""
    positional = getattr(cls, "POSITIONAL", ())
    cli = argparse.ArgumentParser(prog=prog, description=cls.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    for f in fields(cls):
        kind = {"default": f.default, "help": f.metadata["help"]}
        if isinstance(f.default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            kind |= {"nargs": "*" if f.name in positional else "+", "metavar": f.name.upper(), "action": Extend}
        else:
            kind |= {"type": type(f.default), "choices": f.metadata["choices"]}
            kind |= {} if f.name in positional or kind["choices"] else {"metavar": type(f.default).__name__.upper()}
        name = f.name if f.name in positional else "--" + f.name.replace("_", "-")
        cli.add_argument(name, **kind | ({"nargs": "?"} if f.name in positional and f.default else {}))
    cli.set_defaults(**dict(defaults))
    return cls(**vars(cli.parse_args(argv)))


def chosen(commands, prog, doc, argv=None):
    """The first word of a command line names one of commands {name: (settings class, function)} -> function, settings.
    Without it, or with --help, the doc is printed: (None, None)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(doc)
        return None, None
    if argv[0] not in commands:
        raise InputError(f"{prog} knows no command {argv[0]!r}: use one of {', '.join(commands)}")
    cls, command = commands[argv[0]]
    return command, parse(cls, argv[1:], f"{prog} {argv[0]}")


def run(command):
    """Run a command line: bad input is one clear line on stderr and exit status 2, never a traceback."""
    try:
        command()
    except (InputError, OSError, SafetensorError) as error:                     # the latter two: a full disk, no rights
        if os.environ.get("RANK", "0") != "0":      # what all processes meet, the first one says, and torchrun ends all
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def device_of(name):
    """--device: "auto" takes CUDA where there is one; a process of torchrun has the GPU of its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name
    try:
        torch.empty(0, device=name).numpy(force=True)                           # meta tensors hold no numbers
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} is not available here: use cpu, or auto, and no more processes than "
                         "GPUs") from error
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The world: scenes, drawing, reading
# ---------------------------------------------------------------------------------------------------------------------
# A world has the first few of these words: see World.
SHAPES = ("circle", "square", "triangle", "cross", "ring", "wedge", "bar", "corner")
COLOURS = {"red": (225, 45, 45), "green": (40, 175, 75), "blue": (55, 85, 235), "yellow": (245, 215, 50),
           "black": (25, 25, 25), "pink": (225, 55, 175), "brown": (120, 70, 30), "cyan": (30, 200, 215)}
BACKGROUND = (245, 245, 245)
GRID = 2                                        # cells per side of a picture
CELLS = GRID * GRID
CELL, CELL_SIDES = 8, range(8, 33, 8)           # pixels per side of a cell: the usual one, and all that codes of 8 fill
EXTENT = 0.45                                   # half the extent of a shape, as a share of its cell
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}      # sign of (row, column)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three")
UNREADABLE = 0.13                               # root mean square distance (of 1) beyond which a cell is like no shape


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene. place counts the cells row by row."""

    shape: str
    colour: str
    place: int


SPRITE_OF = {name: i for i, name in enumerate([None, *itertools.product(SHAPES, COLOURS)])}         # None: empty


@functools.cache
def sprites(cell):
    """The smooth-edged pictures (n, cell, cell, 3) in 0..255 of all that SPRITE_OF names."""
    fine, r = 8, EXTENT * cell
    at = (np.arange(cell * fine) + 0.5) / fine - cell / 2
    y, x = np.meshgrid(at, at, indexing="ij")
    inside = {
        "circle": x * x + y * y < r * r,
        "square": (abs(x) < 0.95 * r) & (abs(y) < 0.95 * r),
        "triangle": (y < 0.9 * r) & (y > -r) & (abs(x) < 0.62 * (y + r)),
        "cross": ((abs(x) < 0.34 * r) | (abs(y) < 0.34 * r)) & (abs(x) < r) & (abs(y) < r),
        "ring": (x * x + y * y < r * r) & (x * x + y * y > (0.55 * r) ** 2),
        "wedge": (y > -0.9 * r) & (y < r) & (abs(x) < 0.62 * (r - y)),
        "bar": (abs(x) < 0.4 * r) & (abs(y) < r),
        "corner": (abs(x) < r) & (abs(y) < r) & ((x < -0.3 * r) | (y > 0.3 * r)),
    }
    pictures = [np.broadcast_to(np.float32(BACKGROUND), (cell, cell, 3))]
    for shape in SHAPES:
        cover = inside[shape].reshape(cell, fine, cell, fine).mean((1, 3))[..., None]
        pictures += [cover * np.float32(rgb) + (1 - cover) * np.float32(BACKGROUND) for rgb in COLOURS.values()]
    return np.stack(pictures).astype(np.float32)


def draw(scenes, cell=CELL):
    """Scenes (sequences of Thing) -> pictures (n, S, S, 3) uint8, S = GRID * cell."""
    cells = np.zeros((len(scenes), CELLS), int)
    for row, scene in zip(cells, scenes, strict=True):
        for thing in scene:
            row[thing.place] = SPRITE_OF[thing.shape, thing.colour]
    tiles = sprites(cell)[cells].reshape(-1, GRID, GRID, cell, cell, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, GRID * cell, GRID * cell, 3).round().astype(np.uint8)


def read(pictures, world):
    """Find the things in pictures (n, S, S, 3) uint8: list of scenes, and clear (n,) bool.

    Each cell is compared with every sprite of the world. A cell like none of them holds no thing and makes its picture
    unclear.
    """
    n, cell, names = len(pictures), world.cell, [None, *itertools.product(world.shapes, world.colours)]
    tiles = pictures.reshape(n, GRID, cell, GRID, cell, 3).transpose(0, 1, 3, 2, 4, 5) / np.float32(255)
    tiles = tiles.reshape(n * CELLS, -1)
    known = sprites(cell)[[SPRITE_OF[name] for name in names]].reshape(len(names), -1) / 255
    square = (tiles**2).sum(1)[:, None] + (known**2).sum(1) - 2 * tiles @ known.T                  # (n CELLS, sprites)
    best = square.argmin(1)
    good = np.sqrt(square.min(1).clip(0) / tiles.shape[1]) < UNREADABLE
    best = np.where(good, best, 0).reshape(n, CELLS)
    scenes = [tuple(Thing(*names[i], place) for place, i in enumerate(row) if i) for row in best]
    return scenes, good.reshape(n, CELLS).all(1)


# ---------------------------------------------------------------------------------------------------------------------
# The world: combinations, wordings, held-out split
# ---------------------------------------------------------------------------------------------------------------------
# A prompt of each skill (the six of GenEval) mentions one combination of words. An eighth of the combinations of each
# skill is held out: no training picture shows one of them and nothing else. Worlds of larger scenes have a skill more
# for each size; there a held-out pair may be met beside other things.
SKILLS = ("one object", "two objects", "counting", "colours", "position", "colour attribution")
SEVERAL = {3: "three objects", 4: "four objects"}
QUESTIONS = ("existence", "count", "position", "colour", "choice")
HELD_OUT = 1 / 8
SCENES = ("one", "group", "two", "two", "two", "two")       # two things are hardest to tell apart: most practice there
SIZES = {"one": 1, "two": 2, **{skill: n for n, skill in SEVERAL.items()}}       # things of a scene; "group": 2 or 3
ASKED = 4                                       # questions of a training conversation; half end in a description
DESCRIBE = "what is there?"
PREFIXES = ("", "a picture of ", "draw ", "there is ")


def relations(a, b):
    """Which relations hold between things a and b, by their cells."""
    step = [divmod(a.place, GRID)[i] - divmod(b.place, GRID)[i] for i in (0, 1)]
    return [name for name, (row, column) in RELATIONS.items() if row * step[0] > 0 or column * step[1] > 0]


def combinations(scene):
    """All combinations that a scene shows, and nothing besides: {(skill, words...)}, each in one canonical order.

    A scene fulfils a prompt if the prompt's combination is among them: one thing more, and it is not.
    """
    objects = [(thing.colour, thing.shape) for thing in scene]
    if len(scene) == 1:
        return {("one object", objects[0][1], scene[0].place), ("colours", *objects[0], scene[0].place)}
    if len(set(objects)) == 1:
        return {("counting", len(scene), *objects[0])}
    if not scene or len({thing.shape for thing in scene}) < len(scene):
        return set()                                # nothing, or some alike and some not
    ordered = sorted(scene)                         # by shape
    placed = sum(((thing.shape, thing.place) for thing in ordered), ())
    if len(scene) > 2:
        return {(SEVERAL[len(scene)], *placed)}
    a, b = ordered
    x, y = (a.colour, a.shape), (b.colour, b.shape)
    return {("two objects", *placed), ("colour attribution", x, y),
            *(("position", x, name, y) for name in relations(a, b))}


def all_combinations(world):
    """{skill: every combination of it}, in a fixed order."""
    objects, places = [(colour, shape) for colour in world.colours for shape in world.shapes], range(CELLS)
    pairs = [(x, y) for x in objects for y in objects if x[1] < y[1]]

    def placed(n):
        """Every n different shapes, in order, each with a cell of its own."""
        shapes = (row for row in itertools.product(world.shapes, repeat=n) if sorted({*row}) == [*row])
        return [sum(zip(row, at, strict=True), ()) for row in shapes for at in itertools.permutations(places, n)]
    return {
        "one object": [("one object", *words) for words in placed(1)],
        "two objects": [("two objects", *words) for words in placed(2)],
        "counting": [("counting", n, *x) for n in (2, 3) for x in objects],
        "colours": [("colours", *x, p) for x in objects for p in places],
        "position": [("position", x, name, y) for x, y in pairs for name in RELATIONS],
        "colour attribution": [("colour attribution", x, y) for x, y in pairs],
        **{skill: [(skill, *words) for words in placed(n)] for n, skill in SEVERAL.items() if n <= world.objects},
    }


def prompt_text(combination, rng):
    """A caption that mentions exactly this combination."""
    skill, *words = combination
    swap = rng.random() < 0.5
    if skill == "one object":
        text = f"a {words[0]} {PLACES[words[1]]}"
    elif skill == "colours":
        text = f"a {words[0]} {words[1]} {PLACES[words[2]]}"
    elif skill == "counting":
        text = f"{NUMBERS[words[0]]} {words[1]} {plural(words[2])}"
    elif skill in ("two objects", *SEVERAL.values()):
        said = [f"a {shape} {PLACES[place]}" for shape, place in zip(words[::2], words[1::2], strict=True)]
        text = " and ".join(said[::-1] if swap else said)
    else:
        first, name, second = words[0], words[1] if skill == "position" else "and", words[-1]
        if swap:
            first, name, second = second, OPPOSITE.get(name, name), first
        text = f"a {' '.join(first)} {name} a {' '.join(second)}"
    return PREFIXES[rng.integers(len(PREFIXES))] + text


def plural(word):
    return word + ("es" if word.endswith("s") else "s")


class World:
    """Scenes of a seed: the held-out combinations, and random scenes that show none, or a given one, of them.

    shapes, colours: how many words of each kind it has; objects: how many different things a scene holds at most; cell:
    side of a cell in pixels. The defaults are the easiest world.
    """

    def __init__(self, seed, shapes=4, colours=4, objects=2, cell=CELL):
        for name, value, least, most in (("shapes", shapes, 4, len(SHAPES)), ("colours", colours, 4, len(COLOURS)),
                                         ("objects", objects, 2, min(CELLS, shapes - 2, colours - 2))):
            if not least <= value <= most:          # a choice needs two words that are absent
                raise InputError(f"--{name} {value}: give {least} to {most}" + (
                    f" with --shapes {shapes} --colours {colours}" if name == "objects" else ""))
        if cell not in CELL_SIDES:
            raise InputError(f"--cell {cell}: give {', '.join(map(str, CELL_SIDES[:-1]))} or {CELL_SIDES[-1]}")
        self.shapes, self.colours, self.objects = SHAPES[:shapes], tuple(COLOURS)[:colours], objects
        self.cell, self.side = cell, GRID * cell    # of a cell and of a picture, in pixels
        self.several = tuple(skill for n, skill in SEVERAL.items() if n <= objects)
        self.skills = SKILLS + self.several
        self.kinds = SCENES + tuple(skill for skill in self.several for _ in range(4))          # of training scenes
        rng = np.random.default_rng([seed, 1])
        self.combinations = all_combinations(self)
        self.held = {skill: [every[i] for i in sorted(rng.permutation(len(every))[:round(len(every) * HELD_OUT)])]
                     for skill, every in self.combinations.items()}
        self.held_out = frozenset(itertools.chain(*self.held.values()))

    def scene(self, rng):
        """A training scene: one object, a group of two or three equal ones, or two or more different ones."""
        while True:
            scene = random_scene(self, rng, self.kinds[rng.integers(len(self.kinds))])
            if not combinations(scene) & self.held_out:
                return scene

    def crowd(self, rng):
        """Up to a full picture of things, from which the picture tokenizer learns more; nothing held out."""
        while True:
            places = rng.permutation(CELLS)[:rng.integers(1, CELLS + 1)].tolist()
            scene = tuple(Thing(self.shapes[rng.integers(len(self.shapes))],
                                self.colours[rng.integers(len(self.colours))], place) for place in sorted(places))
            if not combinations(scene) & self.held_out:
                return scene

    def held_out_scene(self, skill, rng):
        """A scene and the held-out combination of this skill that it shows."""
        wanted = self.held[skill][rng.integers(len(self.held[skill]))]
        kinds = {"one object": "one", "colours": "one", "counting": "group"} | {name: name for name in self.several}
        while True:
            scene = random_scene(self, rng, kinds.get(skill, "two"), wanted)
            if wanted in combinations(scene):
                return scene, wanted


WORLD = ("seed", "shapes", "colours", "objects", "cell")       # settings of a run that say which world it has


def world_of(run):
    """The world of a run, by its settings; runs of before worlds could be harder have the easiest."""
    return World(**{name: run[name] for name in WORLD if name in run})


def random_scene(world, rng, kind, wanted=None):
    """One, a group or several different things at random cells; `wanted` fixes the words of a combination, to be found
    sooner."""
    places, alike = rng.permutation(CELLS).tolist(), kind in ("one", "group")
    colours = [world.colours[i] for i in rng.integers(len(world.colours), size=world.objects)]
    shapes = [world.shapes[i] for i in rng.permutation(len(world.shapes))]
    number = SIZES.get(kind) or int(rng.integers(2, 4))
    skill, *words = wanted or (None,)
    if skill == "one object":
        shapes[0], places[0] = words
    elif skill == "colours":
        colours[0], shapes[0], places[0] = words
    elif skill == "counting":
        number, colours[0], shapes[0] = words
    elif skill in ("two objects", *SEVERAL.values()):
        shapes, places = words[::2], words[1::2]
    elif skill:
        colours, shapes = [list(pair) for pair in zip(words[0], words[-1], strict=True)]
    return tuple(sorted((Thing(shapes[0 if alike else i], colours[0 if alike else i], places[i])
                         for i in range(number)), key=lambda thing: thing.place))


def describe(scene):
    """Everything in a scene: "a red circle at the top left and a blue square ..."."""
    return " and ".join(f"a {thing.colour} {thing.shape} {PLACES[thing.place]}" for thing in scene)


def caption(scene, rng):
    """A caption that fits the scene: all of it (one in three), or what one random skill mentions."""
    if rng.random() < 1 / 3:
        return describe(scene)
    shown = sorted(combinations(scene), key=repr)
    skills = sorted({c[0] for c in shown})
    skill = skills[rng.integers(len(skills))]
    mine = [c for c in shown if c[0] == skill]
    return prompt_text(mine[rng.integers(len(mine))], rng)


# ---------------------------------------------------------------------------------------------------------------------
# The world: questions
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Question:
    """kind is one of QUESTIONS; options are the four choices of a multiple-choice question, else empty."""

    kind: str
    text: str
    answer: str
    options: tuple = ()


def yes_no(kind, text, truth):
    return Question(kind, text, "yes" if truth else "no")


def question(world, scene, kind, rng, truth=None, closed=None):
    """Ask about a scene of a world. truth True or False asks for a yes/no question with that answer (not for "choice");
    closed False for an open one where there is one (not for the position of a group): those teach what the others need.
    """
    closed = truth is not None or (rng.random() < 0.5 if closed is None else closed)
    truth = bool(rng.random() < 0.5) if truth is None else truth
    thing = scene[rng.integers(len(scene))]
    return {"existence": ask_existence, "count": ask_count, "position": ask_position, "colour": ask_colour,
            "choice": ask_choice}[kind](world, scene, thing, rng, closed, truth)


def other(rng, known, *present):
    """A random member of `known` that is not present."""
    absent = [word for word in known if word not in present]
    return absent[rng.integers(len(absent))]


def ask_existence(world, scene, thing, rng, closed, truth):
    absent = other(rng, world.shapes, *(t.shape for t in scene))
    if not closed:
        first, second = (thing.shape, absent) if truth else (absent, thing.shape)
        return Question("existence", f"is there a {first} or a {second}?", thing.shape)
    return yes_no("existence", f"is there a {thing.shape if truth else absent}?", truth)


def ask_count(world, scene, thing, rng, closed, truth):
    number = sum(t.shape == thing.shape for t in scene)
    if not closed:
        return Question("count", f"how many {plural(thing.shape)} are there?", NUMBERS[number])
    said = number if truth else other(rng, (1, 2, 3), number)
    shapes = plural(thing.shape) if said > 1 else thing.shape
    return yes_no("count", f"{'are' if said > 1 else 'is'} there {NUMBERS[said]} {shapes}?", truth)


def ask_position(world, scene, thing, rng, closed, truth):
    others = [t for t in scene if t.shape != thing.shape]
    if not closed and (len(scene) == 1 or others and rng.random() < 0.5):
        return Question("position", f"where is the {thing.shape}?", PLACES[thing.place])
    if others:
        holds = relations(thing, others[0])
        name = holds[rng.integers(len(holds))]
        if not closed:
            which = "left or right of" if "of" in name else "above or below"
            return Question("position", f"is the {thing.shape} {which} the {others[0].shape}?", name.split()[0])
        name = name if truth else OPPOSITE[name]
        return yes_no("position", f"is the {thing.shape} {name} the {others[0].shape}?", truth)
    place = thing.place if truth else other(rng, range(CELLS), *(t.place for t in scene))
    return yes_no("position", f"is there a {thing.shape} {PLACES[place]}?", truth)


def ask_colour(world, scene, thing, rng, closed, truth):
    several = sum(t.shape == thing.shape for t in scene) > 1
    verb, noun = ("are", plural(thing.shape)) if several else ("is", thing.shape)
    if not closed:
        return Question("colour", f"what colour {verb} the {noun}?", thing.colour)
    colour = thing.colour if truth else other(rng, world.colours, thing.colour)
    return yes_no("colour", f"{verb} the {noun} {colour}?", truth)


def ask_choice(world, scene, thing, rng, closed, truth):
    name = "colour" if rng.random() < 0.5 else "shape"
    right = getattr(thing, name)
    shown = {getattr(t, name) for t in scene}
    absent = [word for word in getattr(world, name + "s") if word not in shown]
    wrong = [absent[i] for i in rng.permutation(len(absent))[:3]]
    options = wrong + [right] if len(wrong) == 3 else wrong + ["nothing"] + [right]
    options = [options[i] for i in rng.permutation(4)]
    return choice_question(f"which {name} is there?", options, right)


def choice_question(stem, options, right):
    """Four lettered options, answered by the letter (in the manner of MMBench)."""
    text = stem + "".join(f" {letter} {option}" for letter, option in zip("ABCD", options, strict=True))
    return Question("choice", text, "ABCD"[options.index(right)], tuple(options))


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
class Text:
    """Encode and decode text with a tokenizer.json, with Emu3's own emu3.tiktoken, or with a sentencepiece .model.

    Special ids come from the file, by string. Special strings inside a user's text stay text, or are refused where the
    tokenizer cannot keep them apart; allow_special turns them into control tokens instead.
    """

    def __init__(self, file, kind, allow_special=False):
        self.file, known, control = Path(file), model.token_ids(file), set(model.SPECIAL[kind].values())
        self.ids, self.allow_special = model.special_ids(known, kind, file), allow_special
        if self.file.suffix == ".model":
            self.core = sentencepiece.SentencePieceProcessor(model_file=str(file))
            control |= {token for token, i in known.items() if is_control(self.core, i)}
        elif self.file.suffix == ".tiktoken":
            self.core, control = byte_bpe(self.file, known), set(known)
        else:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            for token in content["added_tokens"]:    # ordinary letters may be among them; control tokens are <...>
                token["special"] = token.get("special") or bool(re.fullmatch("<.+>", token["content"]))
                control |= {token["content"]} if token["special"] else set()
            try:
                self.core = tokenizers.Tokenizer.from_str(json.dumps(content))
                self.core.encode_special_tokens = True
            except Exception as error:               # the library raises nothing more special
                raise InputError(f"tokenizer {file} cannot be used ({error}): was it made for a newer version of "
                                 "tokenizers?") from error
        self.control = {token: known[token] for token in control if token in known}
        self.control_ids = frozenset(self.control.values())
        self.encode = functools.lru_cache(maxsize=100_000)(self._encode)

    def cut(self, text):
        """Ids of text in which no special string acts, as far as the tokenizer can keep them apart."""
        if self.file.suffix == ".model":
            return self.core.encode(text)
        return self.core.encode(text, add_special_tokens=False).ids

    def _encode(self, text):
        if half := re.search("[\ud800-\udfff]", text):
            raise InputError(f"the text holds half a character, {half[0]!r}: take it out")
        if self.allow_special:
            parts = re.split("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")", text)
            return tuple(i for part in parts
                         for i in ([self.control[part]] if part in self.control else self.cut(part)))
        ids = tuple(self.cut(text))
        if found := self.control_ids.intersection(ids):
            token = next(token for token, i in self.control.items() if i in found)
            raise InputError(f"the text {text[:60]!r} holds the control string {token}: take it out, or let it act as "
                             "one with --allow-special")
        return ids

    def decode(self, ids):
        """Ids up to the first EOS -> text without control tokens."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.ids["eos"])] if self.ids["eos"] in ids else ids
        return self.core.decode([i for i in ids if i not in self.control_ids])


def is_control(pieces, i):
    """Is a sentencepiece token control, unknown, or a user's that looks like <this>? Bytes like <0x0A> are text."""
    return i >= len(pieces) or pieces.is_control(i) or pieces.is_unknown(i) or (
        bool(re.fullmatch("<.+>", pieces.id_to_piece(i))) and not pieces.is_byte(i))


# How Emu3's own tokenizer cuts text before merging bytes: contractions in any case, words with one character that is no
# letter before them, single digits, other signs with a space before and line ends after them, line ends, spaces.
EMU3_CUT = (r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_bpe(file, special):
    """emu3.tiktoken (a byte string in base64 and its rank per line) as a byte-level BPE with special tokens {text: id}.

    Such a file names no merges: any two neighbours whose joint bytes have a rank may merge, the lowest rank first.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise InputError(f"tokenizer {file} cannot be read ({error}): download this file again") from error
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xa0\xad"]
    letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(shown)))}
    word = {token: "".join(map(letter.get, token)) for token in ranks}
    merges = [(word[token[:i]], word[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={word[token]: rank for token, rank in ranks.items()}, merges=merges, ignore_merges=True))
    core.normalizer = tokenizers.normalizers.NFC()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(EMU3_CUT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    core.encode_special_tokens = True
    return core


# ---------------------------------------------------------------------------------------------------------------------
# Templates: a conversation as tokens with roles
# ---------------------------------------------------------------------------------------------------------------------
TEXT, CONTROL, IMAGE, ANSWER, PADDING = range(5)
EMU3_SYSTEM = "You are a helpful assistant."
EMU3_USER, EMU3_ASSISTANT = " USER: ", ". ASSISTANT:"        # the template itself adds the full stop
JANUS_USER, JANUS_ASSISTANT, JANUS_TURN = ": ", ":", "\n\n"


def spans(roles, task):
    """The rule of Eq. 1: roles (B, T) -> condition (B, T), queries (B, T), both bool.

    Queries are tokens of the answer that predict another token of the same answer: image tokens in generation (a row
    end between two of them is neither), text up to the one before EOS in understanding.
    """
    answer, condition = (IMAGE, TEXT) if task == "gen" else (ANSWER, IMAGE)
    following = torch.nn.functional.pad(roles[:, 1:], (0, 1), value=PADDING)
    return roles == condition, (roles == answer) & (following == answer)


class Emu3Template:
    """One stream: pictures are tokens like any other."""

    def __init__(self, config, text, training=True):
        self.config, self.text, self.ids = config, text, text.ids

    def block(self, codes):
        """A picture, codes (h, w): begin, size as text, rows each with a row end, frame end, end."""
        h, w = codes.shape
        pieces = [self.opening(h, w)]
        for row in codes.tolist():
            pieces += [([self.ids["visual"] + code for code in row], IMAGE), ([self.ids["eol"]], CONTROL)]
        return [*pieces, ([self.ids["eof"], self.ids["eoi"]], CONTROL)]

    def opening(self, h, w):
        """What stands before the first code: begin of image, height*width of the code grid, image token."""
        return [self.ids["boi"], *self.text.encode(f"{h}*{w}"), self.ids["img"]], CONTROL

    def prompt(self, prompt, size, dropped=False):
        """Generation, up to the first code."""
        return [([self.ids["bos"], *self.text.encode("" if dropped else prompt)], TEXT), self.opening(*size)]

    def generation(self, prompt, codes, dropped=False):
        return [([self.ids["bos"], *self.text.encode("" if dropped else prompt)], TEXT), *self.block(codes)]

    def understanding(self, turns, pictures):
        """turns [(question, answer or None)], question a list of text and picture numbers; None: up to the answer."""
        pieces, before = [([self.ids["bos"]], TEXT)], EMU3_SYSTEM + EMU3_USER
        for asked, answer in turns:
            for part in asked:                       # text between two pictures is one piece: tokenizers may join
                if isinstance(part, str):            # the end of a question with the template's full stop
                    before += part
                else:
                    pieces += [(self.text.encode(before), TEXT), *self.block(pictures[part])]
                    before = ""
            pieces.append((self.text.encode(before + EMU3_ASSISTANT), TEXT))
            before = EMU3_USER
            if answer is not None:
                pieces.append(([*self.text.encode(answer), self.ids["eos"]], ANSWER))
        return pieces


class JanusTemplate:
    """Roles and blank lines in the DeepSeek manner; pictures are placeholders that the model fills."""

    def __init__(self, config, text, training=True):
        self.config, self.text, self.ids = config, text, text.ids
        self.system = "" if training else config.system         # the authors train without it, and answer with it
        self.user, self.assistant = [text.ids["user"]], [text.ids["assistant"]]

    def plain(self):
        """Words for roles, and no system text: as VLMEvalKit asks, and as the AIA authors had pictures drawn."""
        self.system, self.user, self.assistant = "", self.text.encode("User"), self.text.encode("Assistant")

    def prompt(self, prompt, size=None, dropped=False):
        """Generation, up to begin-of-image. Dropped: every token between BOS and begin-of-image becomes a pad."""
        said = JANUS_USER + prompt.strip() + JANUS_TURN if prompt.strip() else JANUS_ASSISTANT  # a role without words
        ids = [self.ids["bos"], *self.user, *self.text.encode(said), *self.assistant,
               *self.text.encode(JANUS_ASSISTANT)]
        ids = [ids[0], *[self.ids["pad"]] * (len(ids) - 1)] if dropped else ids
        return [(ids, TEXT), ([self.ids["boi"]], CONTROL)]

    def generation(self, prompt, codes, dropped=False):
        return [*self.prompt(prompt, dropped=dropped), ([self.ids["placeholder"]] * codes.numel(), IMAGE)]

    def understanding(self, turns, pictures):
        """As Emu3Template.understanding; a picture is followed by a line break."""
        n = (self.config.image_size // self.config.vit_patch) ** 2
        picture = [([self.ids["boi"]], CONTROL), ([self.ids["placeholder"]] * n, IMAGE), ([self.ids["eoi"]], CONTROL)]
        system = self.text.encode(self.system + JANUS_TURN) if self.system else []
        pieces = [([self.ids["bos"], *system], TEXT)]
        for asked, answer in turns:
            pieces.append((self.user, TEXT))
            before = JANUS_USER                      # text in front of a picture, and the line break after it, belong
            for i, part in enumerate(asked):         # to one piece, as the tokenizer would cut the whole string
                if isinstance(part, str):
                    before += part
                else:
                    pieces += [(self.text.encode(before), TEXT), *picture]
                    before = "\n" if i + 1 < len(asked) else ""
            pieces += [(self.text.encode(before + JANUS_TURN), TEXT), (self.assistant, TEXT),
                       (self.text.encode(JANUS_ASSISTANT), TEXT)]
            if answer is not None:                   # a non-empty message follows ": " in this template
                pieces.append(([*self.text.encode(" " + answer), self.ids["eos"]], ANSWER))
        return pieces


TEMPLATES = {"emu3": Emu3Template, "janus": JanusTemplate}
DROP = {"emu3": 0.05, "janus": 0.10}             # share of generation prompts that are dropped, for guidance


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
MAX_RATIO = {"emu3": 5, "janus": 27}             # Emu3's own limit; Janus-Pro shrinks the short side to 14 of 384
MIN_SIDE = {"emu3": 8, "janus": 1}               # Emu3's own limit


def check_size(width, height, kind):
    """Refuse pictures that no transform handles sensibly."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise InputError(f"the picture has {width} x {height} pixels (limit {Image.MAX_IMAGE_PIXELS}): shrink it first")
    if max(width, height) > MAX_RATIO[kind] * min(width, height):
        raise InputError(f"the picture is {width} x {height}, one side over {MAX_RATIO[kind]} times the other: crop it")
    if min(width, height) < MIN_SIDE[kind]:
        raise InputError(f"the picture is {width} x {height}, a side below {MIN_SIDE[kind]} pixels: enlarge it")


def smart_resize(height, width, config):
    """Emu3's target sides: multiples of the code size, area within min_pixels..max_pixels."""
    f, area = config.factor, height * width
    new = [f * round(side / f) for side in (height, width)]                     # Python rounds half to even
    if new[0] * new[1] > config.max_pixels:
        shrink = (area / config.max_pixels) ** 0.5
        new = [f * int(side / shrink / f) for side in (height, width)]
    elif new[0] * new[1] < config.min_pixels:
        grow = (config.min_pixels / area) ** 0.5
        new = [f * -int(-side * grow // f) for side in (height, width)]
    return tuple(new)


def to_tensor(picture):
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1) * 2 - 1


def to_picture(pixels):
    """(3, H, W) in [-1, 1] -> uint8 array (H, W, 3), truncated as both models do."""
    return ((pixels.float() + 1) / 2 * 255).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def emu3_picture(picture, config, area=None):
    """Resize for Emu3, keeping the ratio: to `area` pixels first where given (training), then to its code grid."""
    width, height = picture.size
    if area:
        scale = (area / (width * height)) ** 0.5
        width, height = max(round(width * scale), 1), max(round(height * scale), 1)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    height, width = smart_resize(height, width, config)
    return to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))


def janus_reading(picture, config):
    """Resize for SigLIP: the longer side to S with *truncated* sides, centred on grey 127."""
    size, longest = config.image_size, max(picture.size)
    width, height = (max(int(side / longest * size), config.min_side) for side in picture.size)
    square = Image.new("RGB", (size, size), (127, 127, 127))
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return to_tensor(square)


def janus_drawing(picture, config):
    """Resize for the codes of Janus-Pro: halve with a box filter while large, short side to S, centre crop."""
    size = config.image_size
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return to_tensor(picture.crop((left, top, left + size, top + size)))


def written(picture, config, training=True):
    """Resize for the picture tokenizer of either model. Emu3 in training: to the area of a drawn picture."""
    if config.kind == "janus":
        return janus_drawing(picture, config)
    return emu3_picture(picture, config, config.image_size**2 if training else None)


# ---------------------------------------------------------------------------------------------------------------------
# Records and where they come from
# ---------------------------------------------------------------------------------------------------------------------
SKIP_HINT = "train.py --on-bad-record skip leaves such records out"


@dataclass(frozen=True)
class Record:
    """One example: a picture (or several, for questions) with a conversation. `place` names it in messages."""

    place: str
    task: str
    turns: tuple                  # ((human, assistant), ...); <image> marks stay in the human text
    pictures: tuple               # paths, bytes of picture files, or uint8 arrays (S, S, 3)


class WorldSource:
    """Training data of a World: a pool of pictures, each with fresh words whenever it is met."""

    def __init__(self, world, n, seed):
        rng = np.random.default_rng([seed, 2])
        self.world, self.bad, self.paths = world, [], []
        self.scenes = [world.scene(rng) for _ in range(n)]
        self.pictures, self.rng = draw(self.scenes, world.cell), rng

    @functools.cached_property
    def crowded(self):
        """Pictures for the picture tokenizer, half as many; drawn when they are needed."""
        return draw([self.world.crowd(self.rng) for _ in range(len(self.scenes) // 2)], self.world.cell)

    def count(self, task):
        return len(self.scenes)

    def record(self, task, index, rng):
        scene = self.scenes[index]
        if task == "gen":
            turns = ((caption(scene, rng), "<image>"),)
        else:
            asked = [question(self.world, scene, kind, rng) for kind in rng.permutation(QUESTIONS)[:ASKED]]
            described = [(DESCRIBE, describe(scene))] * int(rng.integers(2))
            turns = (*((q.text, q.answer) for q in asked), *described)
        return Record(f"world picture {index}", task, turns, (self.pictures[index],))


def parse_record(line, place, folder, strict=True):
    """One JSON line, or its fields -> Record. A generation record has <image> as (or in) the assistant's answer. Not
    strict: the layouts of public sets are taken too, and fields that no one needs are ignored."""
    try:
        entry = line if isinstance(line, dict) else json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}): write one object per line") from error
    entry = entry if strict or not isinstance(entry, dict) else published(entry)
    known = {"id", "image", "conversations", "task"}
    if not isinstance(entry, dict) or not {"image", "conversations"} <= set(entry):
        raise InputError('a record needs "image" and "conversations"')
    if set(entry) - known:
        raise InputError(f"unknown field {sorted(set(entry) - known)[0]!r}: known are {', '.join(sorted(known))}")
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    said = entry["conversations"]
    good = isinstance(said, list) and len(said) >= 2 and len(said) % 2 == 0 and all(
        isinstance(turn, dict) and turn.get("from") == ("human", "gpt")[i % 2] and isinstance(turn.get("value"), str)
        for i, turn in enumerate(said))
    images = [(one["bytes"] or one["path"]) if isinstance(one, dict) and {"bytes", "path"} <= set(one) else one
              for one in images]                     # as Hugging Face's datasets store pictures
    if not good or not images or not all(isinstance(one, str | bytes) and one for one in images):
        raise InputError('"image" must be a path or a list of paths, "conversations" human and gpt turns in turn, '
                         'each {"from": ..., "value": text}')
    turns = tuple((said[i]["value"], said[i + 1]["value"].strip()) for i in range(0, len(said), 2))
    task = check_turns(turns, len(images), entry.get("task"))
    return Record(place, task, turns, tuple(one if isinstance(one, bytes) else folder / one for one in images))


def published(entry):
    """Fields of a public record as ours: LLaVA's conversations, ShareGPT-4o-Image's prompts, pictures with captions."""
    if entry.get("input_image"):
        raise InputError("the record edits a picture (input_image), which neither task does: leave it out")
    image, said = entry.get("image") or entry.get("output_image"), entry.get("conversations")
    caption = entry.get("caption") or entry.get("text") or entry.get("input_prompt")
    if not said and caption:
        said = [{"from": "human", "value": caption}, {"from": "gpt", "value": "<image>"}]
    if not (image and said):
        raise InputError("a record needs a picture, and a conversation or a caption")
    return {"image": image, "conversations": said}


def check_turns(turns, n_images, named):
    """The task of a conversation; refuse what neither task can use."""
    if any(not answer for _, answer in turns):
        raise InputError("an answer is empty: every gpt turn needs text, or <image> to be drawn")
    task = "gen" if any("<image>" in answer for _, answer in turns) else "und"
    if named not in (None, *aia.TASKS):
        raise InputError(f"unknown task {named!r}: use one of {', '.join(aia.TASKS)}, or leave it out")
    if named not in (None, task):
        raise InputError(f"task is {named!r}, but the conversation is of {task!r}: <image> in an answer means drawing")
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if task == "gen" and (len(turns) != 1 or n_images != 1 or marks or turns[0][1] != "<image>"):
        raise InputError("a drawing record has one human turn with the prompt, and <image> alone as the answer")
    if task == "und":
        question_parts(turns, n_images)              # refuses marks that do not fit
    return task


def open_picture(source, kind):
    """Path or bytes of a picture file -> Pillow picture: header read, size checked, pixels yet to come."""
    name = "the picture" if isinstance(source, bytes) else f"picture {source}"
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        raise InputError(f"{name} is missing: paths are relative to the JSON file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large to open safely ({error}): shrink it first") from error
    except Exception as error:                       # of one file; readers raise whatever a broken one leads them to
        why = re.sub(" <.*>", "", str(error))        # the address of a buffer
        raise InputError(f"{name} cannot be opened ({why}): is it a picture, and complete?") from error
    if picture.mode[0] in "IF":
        raise InputError(f"{name} has more than 8 bits a channel ({picture.mode}), which would be cut off: save it "
                         "with 8")
    check_size(*picture.size, kind)
    return picture


def load_picture(source, kind):
    """Path, bytes or uint8 array -> RGB picture, turned as a viewer shows it."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    picture = open_picture(source, kind)
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:
        name = "the picture" if isinstance(source, bytes) else f"picture {source}"
        raise InputError(f"{name} is broken ({error}): replace it") from error


def question_parts(turns, n_images):
    """Human texts with <image> marks -> [([text or picture number, ...], answer)]. No mark: the pictures come first."""
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if marks == 0:
        turns = [("<image>" * n_images + turns[0][0], turns[0][1]), *turns[1:]]
    elif marks != n_images:
        raise InputError(f"{marks} <image> marks in the questions for {n_images} pictures: write one each, or none")
    number, result = 0, []
    for asked, answer in turns:
        parts = []
        for i, text in enumerate(asked.strip().split("<image>")):
            if i:
                parts.append(number)
                number += 1
            text = text.lstrip() if i else text     # the templates set the line breaks around a picture
            parts += [text] if text else []
        result.append((parts, answer))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Data sets as they are published: where records lie, and how one is read
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
    """The record at a place of a file; check(picture) may refuse its pictures."""
    place = f"{file}:{number}"
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
                place = f"{file}:{key}"
        record = parse_record(entry, place, file.parent, strict=form == "jsonl")
        for picture in record.pictures if check else ():
            check(picture)
        return record
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    except BROKEN as error:
        raise InputError(f"{place}: cannot be read ({error}): is the file complete, and unchanged?") from error


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


class FileSource:
    """Records of a data set, read one by one through an index, stored or made at once; but JSON lines without a stored
    index are read and checked whole. A bad record is named with file, place and remedy."""

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
    """Several sources as one: joined, or with weights (see Schedule) each by its share and in its own epochs."""

    def __init__(self, sources, weights=()):
        self.sources, self.weights = sources, weights
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
    """The source that --data names, each text a PATH or PATH=WEIGHT."""
    found = [(text, None) if Path(text).exists() or "=" not in text else text.rsplit("=", 1) for text in texts]
    try:
        weights = [Fraction(weight) for _, weight in found if weight]
    except (ValueError, ZeroDivisionError):
        weights = [0]
    if min(weights, default=1) <= 0 or len(weights) not in (0, len(found)):
        raise InputError(f"--data {' '.join(texts)}: give each data set a weight above 0 (PATH=WEIGHT), or none")
    sources = [FileSource(path, kind, on_bad_record) for path, _ in found]
    return Mixture(sources, weights) if sources[1:] else sources[0]


def every(source, task):
    """All records of a task, one at a time."""
    return (source.record(task, i) for i in range(source.count(task)))


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
        towers = {"codes": (self.m.vq, written)}
        if self.m.config.kind == "janus":
            towers["features"] = (self.m.vision, janus_reading)
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

    def add(self, tensors, place):
        """Write tensors into a new file, whole or not at all."""
        aside = self.folder / f"{place}.part"
        save_file(tensors, aside, {name: self.fingerprints[name] for name in {key.split("/")[0] for key in tensors}})
        os.replace(aside, self.folder / f"{place}.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """B samples of one task, T tokens, padded on the right. Image positions hold a placeholder for Janus-Pro, which has
    no ids for them."""

    task: str
    tokens: torch.Tensor                     # (B, T) ids
    labels: torch.Tensor                     # (B, T) ids (Janus-Pro generation: codes), -100 where not trained
    condition: torch.Tensor                  # (B, T) bool: keys of the other modality
    queries: torch.Tensor                    # (B, T) bool: rows that are averaged
    aia_valid: torch.Tensor                  # (B,) bool: false for a dropped prompt, or without keys or queries
    pixels: torch.Tensor | None = None       # Janus-Pro understanding: (n, 3, S, S)
    features: torch.Tensor | None = None     # the same, already read by SigLIP: (n, N, vit_width)
    codes: torch.Tensor | None = None        # Janus-Pro generation: (B, N)
    places: tuple = ()                       # where each sample comes from, for messages
    lengths: tuple = ()                      # tokens of each sample, without padding
    # What follows from the above, made while the batch is still on the CPU, so that a GPU is never asked how many there
    # are. Whoever replaces a mask must make its indices anew: see `measuring`.
    rows: torch.Tensor | None = None         # (B, R) indices of queries, -1 behind the last of a sample
    keys: torch.Tensor | None = None         # (B, K) indices of the condition
    predicting: torch.Tensor | None = None   # (n,) which of the B T tokens have a successor with a label ...
    targets: torch.Tensor | None = None      # ... and that label

    def __post_init__(self):
        if self.rows is None:
            self.rows = kernels.indices(self.queries)
        if self.keys is None:
            self.keys = kernels.indices(self.condition)
        if self.targets is None:
            following = torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=-100).flatten()       # (B T,)
            self.predicting = (following != -100).nonzero()[:, 0]
            self.targets = following[self.predicting]

    def measuring(self, condition):
        """The same samples, asked for the attention on other keys: condition (B, T) bool."""
        return replace(self, condition=condition, keys=None)

    def each(self, change):
        """A copy with all its tensors changed alike."""
        return replace(self, **{k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})

    def to(self, device):
        waits = torch.device(device).type != "cuda"             # elsewhere a copy may outlive what it copies
        return self.each(lambda x: x.to(device, non_blocking=not waits))

    def pinned(self):
        """In memory from which a GPU copies while the CPU goes on."""
        return self.each(lambda x: x.pin_memory())


PIXELS_AT_ONCE = 2**16                       # for the picture tokenizer, whose activations are a thousand times larger


class Preparer:
    """Records -> Batch for one model: pictures through its transforms and tokenizer, texts through its template."""

    def __init__(self, m, text, training=True, encoded=None):
        self.m, self.config, self.text, self.training, self.encoded = m, m.config, text, training, encoded
        self.template = text and TEMPLATES[m.config.kind](m.config, text, training)    # None: for pictures only
        self.known = {}                                                         # codes of world pictures, by content
        self.device = next(m.vq.parameters()).device

    def recall(self, name, source):
        """The "codes" or "features" of a picture if they were made before, else None."""
        if isinstance(source, np.ndarray):
            return self.known.get(source.tobytes()) if name == "codes" else None
        return self.encoded.get(name, source) if self.encoded else None

    def codes(self, pictures):
        """Codes of pictures, each a CPU tensor; equal-sized ones are encoded together, known ones are not."""
        found, shapes = [self.recall("codes", p) for p in pictures], {}
        for i, source in enumerate(pictures):
            if found[i] is None:
                pixels = written(load_picture(source, self.config.kind), self.config, self.training)
                shapes.setdefault(pixels.shape, {})[i] = pixels
        for (_, height, width), group in shapes.items():
            parts = torch.stack(list(group.values())).split(max(1, PIXELS_AT_ONCE // (height * width)))
            codes = torch.cat([self.m.encode_images(part.to(self.device)).cpu() for part in parts])
            for i, one in zip(group, codes, strict=True):
                found[i] = one.clone()
                if isinstance(pictures[i], np.ndarray):
                    self.known[pictures[i].tobytes()] = found[i]
        return found

    def reading(self, pictures):
        """What Janus-Pro reads of the pictures of questions, as fields of a Batch: pixels, or where all pictures have
        stored features, those."""
        features = [self.recall("features", p) for p in pictures]
        if pictures and all(one is not None for one in features):
            return {"features": torch.stack(features)}
        return {"pixels": torch.stack([janus_reading(load_picture(p, "janus"), self.config) for p in pictures])
                if pictures else None}

    def batch(self, records, rngs=None, drop=0.0):
        """Records of one task -> Batch. With drop, rngs (one a record) decide which generation prompts are dropped."""
        samples, valid, pictures = self.pieces(records, rngs, drop)
        return collate(records[0].task, samples, torch.tensor(valid), self.text.ids["pad"],
                       places=tuple(record.place for record in records), **pictures)

    def nothing(self, task):
        """A Batch of one sample without labels: all modules take part, and no gradient comes of it."""
        side = self.config.image_size
        said = (("nothing", "<image>" if task == "gen" else "nothing"),)
        batch = self.batch([Record("nothing", task, said, (np.zeros((side, side, 3), np.uint8),))])
        return replace(batch, labels=torch.full_like(batch.labels, -100), targets=None, places=(), lengths=(0,),
                       aia_valid=torch.zeros_like(batch.aia_valid))

    def pieces(self, records, rngs=None, drop=0.0):
        """Records of one task -> pieces of each, whether its prompt was kept, and fields of a Batch that Janus-Pro has
        beside the tokens: what it reads for questions, codes (B, N) of drawings. An answer None ends a prompt."""
        task, janus = records[0].task, self.config.kind == "janus"
        sources = [p for r in records for p in r.pictures]
        codes = self.codes(sources) if task == "gen" or not janus else None
        pictures = {} if not janus else self.reading(sources) if task == "und" else {"codes": torch.stack(codes)}
        samples, kept, first = [], [], 0
        for i, record in enumerate(records):
            dropped = task == "gen" and drop > 0 and bool(rngs[i].random() < drop)
            mine = None if codes is None else codes[first:first + len(record.pictures)]
            first += len(record.pictures)
            if task == "gen":
                pieces = self.template.generation(record.turns[0][0], mine[0], dropped)
            else:
                pieces = self.template.understanding(question_parts(record.turns, len(record.pictures)), mine)
            length = sum(len(ids) for ids, _ in pieces)
            if self.training and length > self.config.context:
                raise InputError(f"{record.place}: {length} tokens, but the model takes {self.config.context}: "
                                 "shorten the text or split the conversation")
            samples.append(pieces)
            kept.append(not dropped)
        return samples, kept, pictures


def collate(task, samples, valid, pad, pixels=None, codes=None, places=(), features=None):
    """Pieces [(ids, role), ...] of each sample -> Batch; labels and masks follow from the roles."""
    lengths = tuple(sum(len(ids) for ids, _ in pieces) for pieces in samples)
    tokens = torch.full((len(samples), max(lengths)), pad)                      # (B, T)
    roles = torch.full_like(tokens, PADDING)                                    # (B, T)
    for b, pieces in enumerate(samples):
        ids = [i for part, _ in pieces for i in part]
        tokens[b, :len(ids)] = torch.tensor(ids)
        roles[b, :len(ids)] = torch.tensor([role for part, role in pieces for _ in part])
    condition, queries = spans(roles, task)
    answer = roles == (IMAGE if task == "gen" else ANSWER)
    labels = torch.where(answer, tokens, -100)
    if codes is not None:                                                       # Janus-Pro: gen_head predicts codes
        labels = labels.masked_scatter(answer, codes)
    valid = valid & condition.any(1) & queries.any(1)
    return Batch(task, tokens, labels, condition, queries, valid, pixels, features, codes, places, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Which samples make a step
# ---------------------------------------------------------------------------------------------------------------------
def samples_before(step, batch_size, ratio, drawn=None):
    """How many samples of each task all steps before `step` have used: the mix honours the ratio over any window.
    drawn: a seed; each step then has one task, drawn with the odds of the ratio, as the released code does it."""
    total = step * batch_size
    gen = total * ratio[0] // sum(ratio)
    if drawn is not None:
        gen = batch_size * int((np.random.default_rng([drawn, 7]).random(step) * sum(ratio) < ratio[0]).sum())
    return {"gen": gen, "und": total - gen}


def usable_batch(preparer, get, positions, drop=0.0, bad=None):
    """Batch of the records at these positions, or None if there is none. get(position) -> record, random numbers.

    A record that cannot be used is noted in the list `bad` and left out; without a list it stops the command.
    """
    pairs = []
    try:
        pairs = [get(position) for position in positions]
        return preparer.batch([record for record, _ in pairs], [rng for _, rng in pairs], drop) if pairs else None
    except InputError as error:
        if len(positions) > 1:                      # find it: each record alone, with fresh random numbers
            good = [position for position in positions if usable_batch(preparer, get, [position], drop, bad)]
            if len(good) == len(positions):
                raise
            return usable_batch(preparer, get, good, drop, bad)
        place = pairs[0][0].place if pairs else ""  # reading names its place itself
        text = str(error) if place in str(error) else f"{place}: {error}"
        if bad is None:
            raise InputError(f"{text} ({SKIP_HINT})") from error
        bad += [text] if text not in bad else []


def shuffled(i, n, key):
    """Where the permutation of range(n) that belongs to a key sends i: no list is held, whatever n.

    A Feistel network permutes the numbers of 2 h bits, at least n of them; whoever lands outside range(n) walks on.
    """
    h, key = max((n - 1).bit_length() + 1, 2) // 2, repr(key).encode()
    while True:
        left, right = i >> h, i & (1 << h) - 1
        for turn in range(4):
            mixed = hashlib.blake2b(b"%d %d" % (turn, right), key=key, digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & (1 << h) - 1
        i = left << h | right
        if i < n:
            return i


def deal(position, weights):
    """Which of several streams serves a position, and which position of its own: shares follow the weights, over any
    window less than len(weights) away. The first stream takes its share of the running total, the next of the rest."""
    rest = sum(weights)
    for number, weight in enumerate(weights[:-1]):
        mine = position * weight // rest
        if (position + 1) * weight // rest > mine:
            return number, int(mine)
        position, rest = position - mine, rest - weight
    return len(weights) - 1, int(position)


def check_tasks(source, ratio):
    """Refuse a source without records of a task that has a share."""
    for task, share in zip(aia.TASKS, ratio, strict=True):
        if share and not source.count(task):
            other = "1:0" if task == "und" else "0:1"
            raise InputError(f"the data hold no record for task {task!r}: add some, or train with --ratio {other}")


def beside(device):
    """Set up a thread that prepares batches while another trains. On a GPU it encodes pictures on a stream of its own,
    behind what the weights still wait for, and not behind each step."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        torch.cuda.set_stream(stream)               # and of this thread the device, which would else be the first


class Schedule:
    """The samples of every step, from the seed alone: nothing to store for resuming, nothing that depends on layout."""

    def __init__(self, source, preparer, seed, batch_size, ratio, micro_batch, drop=None, on_bad_record="stop", rank=0,
                 world=1, mix="both"):
        self.source, self.preparer, self.seed, self.batch_size = source, preparer, seed, batch_size
        self.ratio, self.micro_batch, self.on_bad_record = ratio, micro_batch, on_bad_record
        self.drop = DROP[preparer.config.kind] if drop is None else drop
        self.bad, self.rank, self.world, self.drawn = [], rank, world, seed if mix == "drawn" else None
        mixed = isinstance(source, Mixture) and source.weights
        parts = list(zip(source.sources, source.weights, strict=True)) if mixed else [(source, 1)]
        self.parts = {task: [part for part in parts if part[0].count(task)] for task in aia.TASKS}
        check_tasks(source, ratio)

    def record(self, task, position):
        """The record at a position of the task's endless stream, and its random numbers."""
        sources, weights = zip(*self.parts[task], strict=True)
        number, place = deal(position, weights)
        n = sources[number].count(task)
        epoch, place = divmod(place, n)
        index = shuffled(place, n, (self.seed, aia.TASKS.index(task), epoch, number))
        rng = np.random.default_rng([self.seed, 4, aia.TASKS.index(task), position])
        return sources[number].record(task, index, rng), rng

    def length(self, task, position):
        """Length of a record in characters, a picture token counted as four: good enough to sort by."""
        try:
            record, config = self.record(task, position)[0], self.preparer.config
        except InputError:
            return 0                                # told, or left out, when its batch is made
        picture = (config.image_size // (config.vit_patch if config.kind == "janus" else config.factor)) ** 2
        return 4 * picture * len(record.pictures) + sum(len(asked) + len(answer) for asked, answer in record.turns)

    def groups(self, step):
        """[(task, this process's positions)] of the micro-batches of a step: generation first, then understanding.

        Samples of like length go together: less padding, and the same gradient, since a step is one sum. The longest
        come first, so that what does not fit into memory fails at once. Every process has the same tasks in turn.
        """
        start, end = (samples_before(s, self.batch_size, self.ratio, self.drawn) for s in (step, step + 1))
        groups, n = [], self.micro_batch
        for task in aia.TASKS:
            positions = range(start[task], end[task])
            mine = list(positions[self.rank::self.world])
            if len(mine) > n:
                mine.sort(key=functools.partial(self.length, task), reverse=True)
            most = -(-len(positions) // self.world)                             # samples of the first process
            groups += [(task, mine[first:first + n]) for first in range(0, most, n)]
        return groups

    def step(self, step):
        """The micro-batches of a step, each of one task. One without a usable record counts nothing, or where no other
        process waits for it, is left out."""
        bad, batches, cuda = self.bad if self.on_bad_record == "skip" else None, [], self.preparer.device.type == "cuda"
        for task, positions in self.groups(step):
            try:
                batch = usable_batch(self.preparer, functools.partial(self.record, task), positions, self.drop, bad)
            except InputError:
                raise
            except Exception as error:              # out of memory, a fault in a library: say with which records
                error.add_note(f"while preparing {', '.join(self.record(task, i)[0].place for i in positions)}")
                raise
            if batch or self.world > 1:
                batch = batch or self.preparer.nothing(task)
                batches.append(batch.pinned() if cuda else batch)
        return batches

    def steps(self, first, end):
        """The batches of each step; the next ones are prepared while these train."""
        # One thread of its own: with more, it would take the cores of a CPU from the training and slow it by half.
        with concurrent.futures.ThreadPoolExecutor(1, initializer=beside, initargs=(self.preparer.device,)) as worker:
            coming = worker.submit(self.step, first)
            for step in range(first, end):
                batches = coming.result()
                coming = worker.submit(self.step, step + 1) if step + 1 < end else None
                yield batches


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Export:
    """Draw world data as pictures and JSON lines, in the layout that `train.py --data` reads."""

    POSITIONAL = ("folder",)
    folder: str = opt("", "folder to write; must be empty or new")
    n: int = opt(200, "records, half of each task")
    seed: int = opt(0, "world and order")
    shapes: int = opt(4, "shapes of the world, 4 to 8")
    colours: int = opt(4, "colours of the world, 4 to 8")
    objects: int = opt(2, "different things in a scene at most: 2 to 4, with two more shapes and colours")
    cell: int = opt(8, "side of a cell of the world in pixels: 8, 16, 24 or 32; a picture has 2 x 2 cells")


def export(settings):
    """Write n records: pictures/NNNNN.png and train.jsonl."""
    folder = Path(settings.folder)
    at_least(settings, {"seed": 0})
    if not settings.folder or settings.n < 2:
        raise InputError("export needs a folder and --n of at least 2: python data.py export FOLDER --n 200")
    world = world_of(asdict(settings))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another or empty it")
    (folder / "pictures").mkdir(parents=True)
    source = WorldSource(world, settings.n, settings.seed)
    lines = []
    for i in range(settings.n):
        record = source.record(aia.TASKS[i % 2], i, np.random.default_rng([settings.seed, 5, i]))
        path = f"pictures/{i:05d}.png"
        Image.fromarray(source.pictures[i]).save(folder / path)
        said = [{"from": who, "value": text} for turn in record.turns for who, text in zip(("human", "gpt"), turn,
                                                                                           strict=True)]
        lines.append(json.dumps({"id": f"{i:05d}", "image": path, "conversations": said}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{settings.n} records in {folder / 'train.jsonl'}")


@dataclass(frozen=True)
class Index:
    """Write down where each record of a data set lies (PATH.index.npy), so that any of them is found at once. Bad ones
    are left out and listed in PATH.bad.txt."""

    POSITIONAL = ("paths",)
    paths: tuple = opt((), "data sets, as for train.py")


def index(settings):
    """One pass over each data set. Files are written under a second name and renamed: whole or not at all."""
    if not settings.paths:
        raise InputError("index needs a data set: python data.py index train.jsonl")
    for path in settings.paths:
        started, (form, files), stored = time.time(), data_files(path), index_file(path)
        seen = stamps(files, stored.parent)          # before reading: a change meanwhile will show
        rows, bad = make_index(form, files, "janus")  # the wider limits; reading checks those of its model
        aside, listed = stored.with_suffix(".part"), stored.with_suffix("").with_suffix(".bad.txt")
        listed.unlink(missing_ok=True)
        if bad:
            aside.write_text("\n".join([*bad, ""]), encoding="utf-8", errors="backslashreplace")
            os.replace(aside, listed)
            print(f"{bad_report(bad, [path])}\nall are in {listed}")
        if not any(map(len, rows.values())):
            raise InputError(f"data set {path} holds no usable record: see README, 'Your own pictures'")
        count = {task: len(part) for task, part in rows.items()}
        with open(aside, "wb") as out:
            np.save(out, np.concatenate(list(rows.values())), allow_pickle=False)
            out.write(json.dumps({"files": seen, "count": count, "bad": bad}).encode())
        os.replace(aside, stored)
        print(f"{stored}: {count['gen']} records to draw, {count['und']} to answer, {time.time() - started:.1f} s")


PART = 2**28                                     # bytes of one file of encoded pictures, and at most ...
PICTURES = 1000                                  # ... so many pictures, so that little is lost to a kill
TOGETHER = 32                                    # pictures that pass a tower at once


@dataclass(frozen=True)
class Encode:
    """Run all pictures of a data set through the frozen towers once; `train.py --encoded FOLDER` then reads the result.
    The same command goes on where it was stopped. Under torchrun every process takes a share."""

    POSITIONAL = ("folder",)
    folder: str = opt("", "folder to write")
    data: str = opt("", "a data set, as for train.py")
    init: str = opt("", "model whose towers encode, as for train.py")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model of --init")
    features: bool = opt(False, "also what SigLIP makes of pictures in questions (Janus-Pro; 2.4 MB a picture)")
    on_bad_record: str = opt("stop", "what to do with a record that cannot be used", ("stop", "skip"))
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")


def encode(settings):
    """Write RANK-NUMBER.safetensors with what the folder does not hold yet."""
    if not (settings.folder and settings.data and settings.init):
        raise InputError("encode needs a folder, --data and --init: "
                         "python data.py encode FOLDER --data train.jsonl --init Janus-Pro-7B")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    folder, m = Path(settings.folder), model.load(settings.init, torch.float32, device_of(settings.device),
                                                  settings.vision_tokenizer)
    janus = m.config.kind == "janus"
    if settings.features and not janus:
        raise InputError("--features: Emu3 reads pictures as codes, there is no SigLIP; leave it out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder")
    source = FileSource(settings.data, m.config.kind, settings.on_bad_record)
    store, preparer = Encoded(folder, m, new=True), Preparer(m, None)

    @torch.inference_mode()
    def features(paths):
        pixels = preparer.reading(paths)["pixels"]
        return [one.clone() for one in m.vision(pixels.to(m.vision.pos_embed.device)).cpu()]
    wanted = {"codes": (aia.TASKS[:1 if janus else 2], preparer.codes),
              "features": (("und",) * settings.features, features)}
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(file.stem[4:]) for file in folder.glob(f"{rank:03d}-*.safetensors")), default=-1)
    for name, (tasks, make) in wanted.items():
        mine = {f"{name}/{picture_key(path)}": (task, i, j) for task in tasks
                for i in range(rank, source.count(task), world)
                for j, path in enumerate(source.record(task, i).pictures)}           # where it is: bytes would not fit
        todo, made, missing = [(key, place) for key, place in mine.items() if key not in store.parts], {}, 0
        for first in tqdm(range(0, len(todo), TOGETHER), desc=name, unit="batch", disable=None):
            keys, places = zip(*todo[first:first + TOGETHER], strict=True)
            pictures = [source.record(task, i).pictures[j] for task, i, j in places]
            try:
                made |= zip(keys, make(pictures), strict=True)
            except InputError:
                for key, (task, i, _), picture in zip(keys, places, pictures, strict=True):             # find it
                    try:
                        made[key], = make([picture])
                    except InputError as error:
                        missing += 1
                        note_bad(f"{source.record(task, i).place}: {error}", source.bad,
                                 settings.on_bad_record == "stop")
            full = len(made) >= PICTURES or sum(one.nbytes for one in made.values()) >= PART
            if full or first + TOGETHER >= len(todo):
                store.add(made, f"{rank:03d}-{number:05d}")
                number, made = number + 1, {}
        if mine:
            print(f"{name}: {len(todo) - missing} pictures encoded, {len(mine) - len(todo)} were there")
    if source.bad:
        print(bad_report(source.bad, [settings.data]))


COMMANDS = {"export": (Export, export), "index": (Index, index), "encode": (Encode, encode)}


def main(argv=None):
    command, settings = chosen(COMMANDS, "data.py", __doc__, argv)
    if command:
        command(settings)


if __name__ == "__main__":
    run(main)
