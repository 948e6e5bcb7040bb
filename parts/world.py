"""The drawn world: scenes of coloured shapes, their pictures, captions and questions, and a reader that finds the
scene in a picture. Some combinations of words are held out, to test composition.

    python -m pytest tests/test_world.py
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from parts.settings import InputError, stream

# ---------------------------------------------------------------------------------------------------------------------
# Scenes, drawing, reading
# ---------------------------------------------------------------------------------------------------------------------
# A world uses the first few of these shapes and colours: see World.
SHAPES = ("circle", "square", "triangle", "cross", "ring", "wedge", "bar", "corner")
COLOURS = {"red": (225, 45, 45), "green": (40, 175, 75), "blue": (55, 85, 235), "yellow": (245, 215, 50),
           "black": (25, 25, 25), "pink": (225, 55, 175), "brown": (120, 70, 30), "cyan": (30, 200, 215)}
BACKGROUND = (245, 245, 245)
GRID = 2                                        # cells per side of a picture
CELLS = GRID * GRID
CELL_SIDE = 8                                   # default side of a cell, in pixels
CELL_SIDES = range(8, 33, 8)                    # all allowed sides: whole picture codes of 8 x 8 pixels
EXTENT = 0.45                                   # half the width of a shape, as a share of its cell
CELL_WORDS = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}      # sign of (row, column)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three")
UNREADABLE = 0.13                               # a cell whose RMS distance to every sprite is larger (of 1) is unclear


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene. cell: index of its cell, counted row by row."""

    shape: str
    colour: str
    cell: int


# Index of the sprite of each (shape, colour); None is an empty cell.
SPRITE_OF = {name: i for i, name in enumerate([None, *itertools.product(SHAPES, COLOURS)])}


@functools.cache
def sprites(cell_side):
    """Smooth-edged pictures (n, cell_side, cell_side, 3), float32 in 0..255, of all cells in SPRITE_OF."""
    fine = 8                                        # samples per pixel and side
    r = EXTENT * cell_side
    at = (np.arange(cell_side * fine) + 0.5) / fine - cell_side / 2
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
    pictures = [np.broadcast_to(np.float32(BACKGROUND), (cell_side, cell_side, 3))]
    for shape in SHAPES:
        cover = inside[shape].reshape(cell_side, fine, cell_side, fine).mean((1, 3))[..., None]
        pictures += [cover * np.float32(rgb) + (1 - cover) * np.float32(BACKGROUND) for rgb in COLOURS.values()]
    return np.stack(pictures).astype(np.float32)


def draw_scenes(scenes, cell_side=CELL_SIDE):
    """Scenes (sequences of Thing) -> pictures (n, S, S, 3) uint8, S = GRID * cell_side."""
    cells = np.zeros((len(scenes), CELLS), int)
    for row, scene in zip(cells, scenes, strict=True):
        for thing in scene:
            row[thing.cell] = SPRITE_OF[thing.shape, thing.colour]
    tiles = sprites(cell_side)[cells].reshape(-1, GRID, GRID, cell_side, cell_side, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, GRID * cell_side, GRID * cell_side, 3).round().astype(np.uint8)


def read_scenes(pictures, world):
    """Find the things in pictures (n, S, S, 3) uint8 -> list of scenes, clear (n,) bool.

    Each cell is compared with every sprite of the world. If none is close, the cell counts as empty and the picture as
    unclear.
    """
    n = len(pictures)
    cell_side = world.cell_side
    names = [None, *itertools.product(world.shapes, world.colours)]
    tiles = pictures.reshape(n, GRID, cell_side, GRID, cell_side, 3).transpose(0, 1, 3, 2, 4, 5) / np.float32(255)
    tiles = tiles.reshape(n * CELLS, -1)
    known = sprites(cell_side)[[SPRITE_OF[name] for name in names]].reshape(len(names), -1) / 255
    square = (tiles**2).sum(1)[:, None] + (known**2).sum(1) - 2 * tiles @ known.T                  # (n CELLS, sprites)
    best = square.argmin(1)
    good = np.sqrt(square.min(1).clip(0) / tiles.shape[1]) < UNREADABLE
    best = np.where(good, best, 0).reshape(n, CELLS)
    scenes = [tuple(Thing(*names[i], cell) for cell, i in enumerate(row) if i) for row in best]
    return scenes, good.reshape(n, CELLS).all(1)


# ---------------------------------------------------------------------------------------------------------------------
# Combinations, captions, held-out split
# ---------------------------------------------------------------------------------------------------------------------
# Each prompt tests one skill (the six of GenEval) and mentions one combination of words. An eighth of the combinations
# of each skill is held out: no training picture consists of exactly one of these. Worlds with larger scenes have one
# more skill for each size; in those, training pictures may show a held-out pair beside other things.
SKILLS = ("one object", "two objects", "counting", "colours", "position", "colour attribution")
SEVERAL = {3: "three objects", 4: "four objects"}
TOPICS = ("existence", "count", "position", "colour", "choice")
HELD_OUT = 1 / 8
# Training scenes: one thing, a group of equal ones, or two different ones, which are hardest and therefore most common.
ARRANGEMENTS = ("one", "group", "two", "two", "two", "two")
SIZES = {"one": 1, "two": 2, **{skill: n for n, skill in SEVERAL.items()}}      # things in a scene; a group has 2 or 3
QUESTIONS_ASKED = 4                             # per training conversation; half of them end in a description
DESCRIBE = "what is there?"
PREFIXES = ("", "a picture of ", "draw ", "there is ")


def relations(a, b):
    """The relations that hold between things a and b, from their cells."""
    down, right = (divmod(a.cell, GRID)[i] - divmod(b.cell, GRID)[i] for i in (0, 1))
    return [name for name, (row, column) in RELATIONS.items() if row * down > 0 or column * right > 0]


def combinations(scene):
    """All combinations {(skill, words...)} that describe a scene completely, their words in a fixed order.

    A scene fulfils a prompt if the prompt's combination is among them. It does not with one more thing in it.
    """
    objects = [(thing.colour, thing.shape) for thing in scene]
    if len(scene) == 1:
        return {("one object", objects[0][1], scene[0].cell), ("colours", *objects[0], scene[0].cell)}
    if len(set(objects)) == 1:
        return {("counting", len(scene), *objects[0])}
    if not scene or len({thing.shape for thing in scene}) < len(scene):
        return set()                                # empty, or two of one shape beside another thing or colour
    ordered = sorted(scene)                         # by shape
    placed = sum(((thing.shape, thing.cell) for thing in ordered), ())
    if len(scene) > 2:
        return {(SEVERAL[len(scene)], *placed)}
    a, b = ordered
    x, y = (a.colour, a.shape), (b.colour, b.shape)
    return {("two objects", *placed), ("colour attribution", x, y),
            *(("position", x, name, y) for name in relations(a, b))}


def all_combinations(world):
    """{skill: every combination of it}, in a fixed order."""
    objects = [(colour, shape) for colour in world.colours for shape in world.shapes]
    cells = range(CELLS)
    pairs = [(x, y) for x in objects for y in objects if x[1] < y[1]]

    def placed(n):
        """(shape, cell, shape, cell, ...) of n different shapes in alphabetical order, each in a cell of its own."""
        rows = (row for row in itertools.product(world.shapes, repeat=n) if sorted({*row}) == [*row])
        return [sum(zip(row, at, strict=True), ()) for row in rows for at in itertools.permutations(cells, n)]
    return {
        "one object": [("one object", *words) for words in placed(1)],
        "two objects": [("two objects", *words) for words in placed(2)],
        "counting": [("counting", n, *x) for n in (2, 3) for x in objects],
        "colours": [("colours", *x, cell) for x in objects for cell in cells],
        "position": [("position", x, name, y) for x, y in pairs for name in RELATIONS],
        "colour attribution": [("colour attribution", x, y) for x, y in pairs],
        **{skill: [(skill, *words) for words in placed(n)] for n, skill in SEVERAL.items() if n <= world.objects},
    }


def plural(word):
    return word + ("es" if word.endswith("s") else "s")


def prompt_text(combination, rng):
    """A caption that mentions exactly this combination."""
    skill, *words = combination
    swap = rng.random() < 0.5
    if skill == "one object":
        text = f"a {words[0]} {CELL_WORDS[words[1]]}"
    elif skill == "colours":
        text = f"a {words[0]} {words[1]} {CELL_WORDS[words[2]]}"
    elif skill == "counting":
        text = f"{NUMBERS[words[0]]} {words[1]} {plural(words[2])}"
    elif skill in ("two objects", *SEVERAL.values()):
        parts = [f"a {shape} {CELL_WORDS[cell]}" for shape, cell in zip(words[::2], words[1::2], strict=True)]
        if swap:
            parts.reverse()
        text = " and ".join(parts)
    else:
        first, second = words[0], words[-1]
        name = words[1] if skill == "position" else "and"
        if swap:
            first, second = second, first
            name = OPPOSITE.get(name, name)
        text = f"a {' '.join(first)} {name} a {' '.join(second)}"
    return PREFIXES[rng.integers(len(PREFIXES))] + text


def check_world(shapes, colours, objects, cell):
    """Refuse sizes of a World that do not exist."""
    for name, value, most in (("shapes", shapes, len(SHAPES)), ("colours", colours, len(COLOURS))):
        if not 4 <= value <= most:
            raise InputError(f"--{name} {value}: give 4 to {most}")
    most = min(CELLS, shapes - 2, colours - 2)      # multiple choice needs two words that are not in the scene
    if not 2 <= objects <= most:
        raise InputError(f"--objects {objects}: give 2 to {most} with --shapes {shapes} --colours {colours}")
    if cell not in CELL_SIDES:
        raise InputError(f"--cell {cell}: give {', '.join(map(str, CELL_SIDES[:-1]))} or {CELL_SIDES[-1]}")


def random_scene(world, rng, arrangement, wanted=None):
    """One thing, a group of equal ones, or several different ones in random cells. wanted: a combination whose words
    are used as they are, so that a scene that shows it is found sooner."""
    cells = rng.permutation(CELLS).tolist()
    colours = [world.colours[i] for i in rng.integers(len(world.colours), size=world.objects)]
    shapes = [world.shapes[i] for i in rng.permutation(len(world.shapes))]
    number = SIZES.get(arrangement) or int(rng.integers(2, 4))
    skill, *words = wanted or (None,)
    if skill == "one object":
        shapes[0], cells[0] = words
    elif skill == "colours":
        colours[0], shapes[0], cells[0] = words
    elif skill == "counting":
        number, colours[0], shapes[0] = words
    elif skill in ("two objects", *SEVERAL.values()):
        shapes, cells = words[::2], words[1::2]
    elif skill:
        colours, shapes = [list(pair) for pair in zip(words[0], words[-1], strict=True)]
    if arrangement in ("one", "group"):
        things = [Thing(shapes[0], colours[0], cells[i]) for i in range(number)]
    else:
        things = [Thing(shapes[i], colours[i], cells[i]) for i in range(number)]
    return tuple(sorted(things, key=lambda thing: thing.cell))


class World:
    """The held-out combinations of a seed, and random scenes that show none of them, or a given one.

    shapes, colours: how many of each there are. objects: the most different things in a scene. cell: side of a cell in
    pixels. The defaults are the easiest world.
    """

    def __init__(self, seed, shapes=4, colours=4, objects=2, cell=CELL_SIDE):
        check_world(shapes, colours, objects, cell)
        self.shapes = SHAPES[:shapes]
        self.colours = tuple(COLOURS)[:colours]
        self.objects = objects
        self.cell_side = cell
        self.side = GRID * cell                     # of a picture, in pixels
        self.several = tuple(skill for n, skill in SEVERAL.items() if n <= objects)
        self.skills = SKILLS + self.several
        self.topics = TOPICS
        self.arrangements = ARRANGEMENTS + tuple(skill for skill in self.several for _ in range(4))
        rng = stream(seed, "held out")
        self.combinations = all_combinations(self)
        self.held = {}                              # {skill: its held-out combinations}
        for skill, every in self.combinations.items():
            chosen = rng.permutation(len(every))[:round(len(every) * HELD_OUT)]
            self.held[skill] = [every[i] for i in sorted(chosen)]
        self.held_out = frozenset(itertools.chain(*self.held.values()))

    def scene(self, rng):
        """A training scene: one thing, a group of two or three equal ones, or two or more different ones."""
        while True:
            scene = random_scene(self, rng, self.arrangements[rng.integers(len(self.arrangements))])
            if not combinations(scene) & self.held_out:
                return scene

    def crowd(self, rng):
        """A scene to train the picture tokenizer on: random things in one or more cells, nothing held out."""
        while True:
            cells = rng.permutation(CELLS)[:rng.integers(1, CELLS + 1)].tolist()
            scene = []
            for cell in sorted(cells):
                shape = self.shapes[rng.integers(len(self.shapes))]
                colour = self.colours[rng.integers(len(self.colours))]
                scene.append(Thing(shape, colour, cell))
            if not combinations(scene) & self.held_out:
                return tuple(scene)

    def held_out_scene(self, skill, rng):
        """A scene and the held-out combination of this skill that it shows."""
        wanted = self.held[skill][rng.integers(len(self.held[skill]))]
        arrangements = {"one object": "one", "colours": "one", "counting": "group"}
        arrangements |= {name: name for name in self.several}
        while True:
            scene = random_scene(self, rng, arrangements.get(skill, "two"), wanted)
            if wanted in combinations(scene):
                return scene, wanted


WORLD = ("seed", "shapes", "colours", "objects", "cell")       # the settings of a run that decide its world


def world_of(run):
    """The world of a run, from its settings. Older runs without some of them get the defaults."""
    return World(**{name: run[name] for name in WORLD if name in run})


def describe(scene):
    """Everything in a scene: "a red circle at the top left and a blue square ..."."""
    return " and ".join(f"a {thing.colour} {thing.shape} {CELL_WORDS[thing.cell]}" for thing in scene)


def shown_combination(scene, rng):
    """One of the combinations that a scene shows, each skill as likely as another."""
    shown = sorted(combinations(scene), key=repr)
    skills = sorted({c[0] for c in shown})
    skill = skills[rng.integers(len(skills))]
    mine = [c for c in shown if c[0] == skill]
    return mine[rng.integers(len(mine))]


def caption(scene, rng):
    """A caption that fits the scene: a full description (one in three), or a prompt of one of its skills."""
    return describe(scene) if rng.random() < 1 / 3 else prompt_text(shown_combination(scene, rng), rng)


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Question:
    """A question about a scene. topic: one of TOPICS. options: the four of a multiple-choice question, else empty."""

    topic: str
    text: str
    answer: str
    options: tuple = ()


def yes_no(topic, text, truth):
    return Question(topic, text, "yes" if truth else "no")


def other(rng, known, *present):
    """A random word of `known` that is not present."""
    absent = [word for word in known if word not in present]
    return absent[rng.integers(len(absent))]


# Each of these asks about one thing of a scene: a closed question, answered by yes if truth and else by no, or an open
# one. Multiple choice ignores both.
def ask_existence(world, scene, thing, rng, closed, truth):
    absent = other(rng, world.shapes, *(t.shape for t in scene))
    first, second = (thing.shape, absent) if truth else (absent, thing.shape)
    if not closed:
        return Question("existence", f"is there a {first} or a {second}?", thing.shape)
    return yes_no("existence", f"is there a {first}?", truth)


def ask_count(world, scene, thing, rng, closed, truth):
    number = sum(t.shape == thing.shape for t in scene)
    if not closed:
        return Question("count", f"how many {plural(thing.shape)} are there?", NUMBERS[number])
    asked = number if truth else other(rng, (1, 2, 3), number)
    if asked == 1:
        return yes_no("count", f"is there one {thing.shape}?", truth)
    return yes_no("count", f"are there {NUMBERS[asked]} {plural(thing.shape)}?", truth)


def ask_position(world, scene, thing, rng, closed, truth):
    others = [t for t in scene if t.shape != thing.shape]
    if not closed and (len(scene) == 1 or (others and rng.random() < 0.5)):
        return Question("position", f"where is the {thing.shape}?", CELL_WORDS[thing.cell])
    if others:
        holds = relations(thing, others[0])
        name = holds[rng.integers(len(holds))]
        if not closed:
            which = "left or right of" if "of" in name else "above or below"
            return Question("position", f"is the {thing.shape} {which} the {others[0].shape}?", name.split()[0])
        asked = name if truth else OPPOSITE[name]
        return yes_no("position", f"is the {thing.shape} {asked} the {others[0].shape}?", truth)
    cell = thing.cell if truth else other(rng, range(CELLS), *(t.cell for t in scene))
    return yes_no("position", f"is there a {thing.shape} {CELL_WORDS[cell]}?", truth)


def ask_colour(world, scene, thing, rng, closed, truth):
    several = sum(t.shape == thing.shape for t in scene) > 1
    verb, noun = ("are", plural(thing.shape)) if several else ("is", thing.shape)
    if not closed:
        return Question("colour", f"what colour {verb} the {noun}?", thing.colour)
    asked = thing.colour if truth else other(rng, world.colours, thing.colour)
    return yes_no("colour", f"{verb} the {noun} {asked}?", truth)


def choice_question(stem, options, right):
    """Four lettered options, answered by a letter (as in MMBench)."""
    text = stem + "".join(f" {letter} {option}" for letter, option in zip("ABCD", options, strict=True))
    return Question("choice", text, "ABCD"[options.index(right)], tuple(options))


def rotations(asked):
    """The same multiple-choice question with its options moved round: four questions (circular evaluation)."""
    stem = asked.text[:asked.text.index("?") + 1]
    right = asked.options["ABCD".index(asked.answer)]
    return [choice_question(stem, asked.options[i:] + asked.options[:i], right) for i in range(4)]


def ask_choice(world, scene, thing, rng, closed, truth):
    name = "colour" if rng.random() < 0.5 else "shape"
    right = getattr(thing, name)
    shown = {getattr(t, name) for t in scene}
    absent = [word for word in getattr(world, name + "s") if word not in shown]
    wrong = [absent[i] for i in rng.permutation(len(absent))[:3]]
    if len(wrong) == 2:
        wrong.append("nothing")
    options = [*wrong, right]
    options = [options[i] for i in rng.permutation(4)]
    return choice_question(f"which {name} is there?", options, right)


def make_question(world, scene, topic, rng, truth=None, closed=None):
    """A question about a scene of a world.

    truth True or False: a yes/no question with this answer (not for "choice"). closed False: an open question, if the
    topic has one for this scene (the position of a group has none). Scores of understanding count closed ones; open
    ones teach what these need.
    """
    if truth is not None:
        closed = True
    elif closed is None:
        closed = rng.random() < 0.5
    if truth is None:
        truth = bool(rng.random() < 0.5)
    thing = scene[rng.integers(len(scene))]
    ask = {"existence": ask_existence, "count": ask_count, "position": ask_position, "colour": ask_colour,
           "choice": ask_choice}[topic]
    return ask(world, scene, thing, rng, closed, truth)


def questions_about(world, scene, rng):
    """Questions about some topics in random order, as turns of a conversation [(question, answer)]."""
    asked = [make_question(world, scene, topic, rng) for topic in rng.permutation(TOPICS)[:QUESTIONS_ASKED]]
    return [(question.text, question.answer) for question in asked]


# Which held-out combinations the pictures of a topic show; larger scenes are shown for every topic but count.
SHOWN = {"existence": ("two objects", "colour attribution", "colours"), "count": ("counting", "two objects"),
         "position": ("position", "one object"), "colour": ("colours", "colour attribution"),
         "choice": ("colours", "two objects")}


def held_out_questions(world, n, rng):
    """Questions about n held-out scenes for each topic, each (measure, (topic, number of its scene), scene, question).
    Measures are the topics, "open", and "turned": the other rotations of a multiple-choice question."""
    for topic in TOPICS:
        shown = SHOWN[topic] + (world.several if topic != "count" else ())
        for i in range(n):
            scene, _ = world.held_out_scene(shown[i % len(shown)], rng)
            if topic == "existence":
                # Half of them true, for each kind of scene: where these repeat every four, the answer must not.
                truth = i % 4 < 2 if len(shown) % 4 else i % 8 < 4
                asked = [(topic, make_question(world, scene, topic, rng, truth))]
            elif topic == "choice":
                first, *others = rotations(make_question(world, scene, topic, rng))
                asked = [(topic, first), *(("turned", question) for question in others)]
            else:
                asked = [(topic, make_question(world, scene, topic, rng, truth)) for truth in (True, False)]
                asked.append(("open", make_question(world, scene, topic, rng, closed=False)))
            yield from ((measure, (topic, i), scene, question) for measure, question in asked)


# ---------------------------------------------------------------------------------------------------------------------
# Words for a tokenizer
# ---------------------------------------------------------------------------------------------------------------------
def words_of(world):
    """The words and phrases of a world that carry meaning, for parts.text.train_bpe."""
    return [*world.shapes, *map(plural, world.shapes), *world.colours, *NUMBERS, "at the top", "at the bottom", "left",
            "right", *RELATIONS, "yes", "no", "nothing", *"ABCD"]


def sentences(world, n):
    """Text to train a tokenizer on, n times: a caption, a question, its answer, " " + answer, sides of a code grid."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        scene = world.scene(rng)
        asked = make_question(world, scene, TOPICS[rng.integers(len(TOPICS))], rng)
        text = caption(scene, rng)
        sides = f"{rng.integers(1, 91)}*{rng.integers(1, 91)}"
        yield text, asked.text, asked.answer, " " + asked.answer, sides
