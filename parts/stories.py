"""Conversations in which pictures and text come in turn, about the drawn world: edits, drawings that are asked about,
plans, drawings that are checked, stories. What each of them shows is known exactly, so what a model makes of it can be
scored exactly.

    python -m pytest tests/test_stories.py
"""

from dataclasses import dataclass

import numpy as np

from parts.world import (
    CELL_WORDS,
    CELLS,
    TOPICS,
    Thing,
    caption,
    combinations,
    describe,
    make_question,
    plural,
    prompt_text,
    shown_combination,
)

# The kinds of conversations, and how many of nine each has in training: edits take longest to learn.
STORIES = {"edit": 3, "tell": 1, "plan": 2, "mend": 1, "story": 2}
PLAN = "plan and draw: "                        # before a prompt: first say what will be drawn, then draw it
MEND = "draw and check: "                       # before a prompt: draw, say what is there, draw again if it is wrong
RIGHT, WRONG = ": yes", ": no"                  # what is said of a drawing, behind its description


@dataclass(frozen=True)
class Story:
    """A conversation: ((human, assistant), ...) with <image> marks, the scenes of its pictures in order, and the
    numbers of pictures in answers that are given, and not to be learned."""

    turns: tuple
    scenes: tuple
    given: tuple = ()


# ---------------------------------------------------------------------------------------------------------------------
# Edits
# ---------------------------------------------------------------------------------------------------------------------
# Which kind of edit leads back from the result of each kind.
UNDONE_BY = {"recolour": "recolour", "move": "move", "add": "remove", "remove": "add"}
EDITS = tuple(UNDONE_BY)


def in_order(things):
    """A scene: things in the order of their cells."""
    return tuple(sorted(things, key=lambda thing: thing.cell))


def edits(world, scene):
    """All edits of a scene, {kind: {instruction: result}}. Each result is a scene of which a prompt can speak."""
    found = {kind: {} for kind in EDITS}
    free = [cell for cell in range(CELLS) if cell not in {thing.cell for thing in scene}]
    shapes = {thing.shape for thing in scene}
    for shape in sorted(shapes):
        mine = [thing for thing in scene if thing.shape == shape]
        rest = [thing for thing in scene if thing.shape != shape]
        name = plural(shape) if len(mine) > 1 else shape
        for colour in world.colours:
            if any(thing.colour != colour for thing in mine):
                found["recolour"][f"make the {name} {colour}"] = in_order(
                    [*rest, *(Thing(shape, colour, thing.cell) for thing in mine)])
        if len(mine) == 1:
            for cell in free:
                target = CELL_WORDS[cell].replace("at", "to", 1)
                found["move"][f"move the {shape} {target}"] = in_order([*rest, Thing(shape, mine[0].colour, cell)])
            if rest:
                found["remove"][f"remove the {shape}"] = in_order(rest)
    if len(scene) < world.objects:
        for shape in sorted(set(world.shapes) - shapes):
            for colour in world.colours:
                for cell in free:
                    found["add"][f"add a {colour} {shape} {CELL_WORDS[cell]}"] = in_order(
                        [*scene, Thing(shape, colour, cell)])
    return {kind: {text: result for text, result in some.items() if combinations(result)}
            for kind, some in found.items()}


def pick(rng, items):
    items = list(items)
    return items[rng.integers(len(items))]


def random_edit(world, scene, rng, allowed):
    """An edit of a scene whose result passes allowed(scene): (instruction, result), every kind as likely as another;
    None if there is none."""
    found = [[(text, result) for text, result in some.items() if allowed(result)]
             for some in edits(world, scene).values()]
    found = [some for some in found if some]
    return pick(rng, pick(rng, found)) if found else None


def held_out_edit(world, kind, rng):
    """An edit whose result shows a held-out combination: scene before, instruction, result."""
    while True:
        result, _ = world.held_out_scene(pick(rng, world.skills), rng)
        before = list(edits(world, result)[UNDONE_BY[kind]].values())
        if before:
            scene = pick(rng, before)
            texts = [text for text, after in edits(world, scene)[kind].items() if after == result]
            if texts:
                return scene, texts[0], result


# ---------------------------------------------------------------------------------------------------------------------
# Conversations for training
# ---------------------------------------------------------------------------------------------------------------------
def mistaken(world, scene, combination, rng, allowed):
    """A scene with one thing wrong, so that it no longer shows a combination: two things with their colours exchanged,
    as models are apt to draw them, or an edit."""
    def wrong(other):
        return combination not in combinations(other) and allowed(other)
    if len(scene) == 2 and rng.random() < 0.5:
        a, b = scene
        swapped = Thing(a.shape, b.colour, a.cell), Thing(b.shape, a.colour, b.cell)
        if wrong(swapped):
            return swapped
    edit = random_edit(world, scene, rng, wrong)
    return edit and edit[1]


def plan_of(scene, prompt):
    """A full description of a scene, in the order in which a prompt speaks of its things: so a plan copies what the
    prompt says, and adds what it leaves open."""
    return describe(sorted(scene, key=lambda thing: prompt.find(thing.shape)))


def scene_of(plan):
    """The scene that a full description speaks of, None if it is none: the inverse of parts.world.describe."""
    things = []
    for part in plan.split(" and "):
        article, colour, shape, *cell = [*part.split(), "", "", ""]
        where = " ".join(cell).strip()
        if article != "a" or where not in CELL_WORDS:
            return None
        things.append(Thing(shape, colour, CELL_WORDS.index(where)))
    return in_order(things)


def story_about(world, scene, rng, kind=None):
    """A conversation for training that begins with a scene; none of its pictures shows a held-out combination. kind:
    one of STORIES, by chance if not given."""
    def allowed(other):
        return not combinations(other) & world.held_out

    def question(of):
        asked = make_question(world, of, pick(rng, TOPICS), rng)
        return asked.text, asked.answer
    kind = kind or pick(rng, [one for one, share in STORIES.items() for _ in range(share)])
    if kind == "plan":
        prompt = caption(scene, rng)
        return Story(((PLAN + prompt, f"{plan_of(scene, prompt)} <image>"),), (scene,))
    if kind == "tell":
        return Story(((caption(scene, rng), "<image>"), question(scene), question(scene)), (scene,))
    if kind == "mend":
        combination = shown_combination(scene, rng)
        asked = MEND + prompt_text(combination, rng)
        other = mistaken(world, scene, combination, rng, allowed) if rng.random() < 0.5 else None
        if other is None:
            return Story(((asked, f"<image> {describe(scene)}{RIGHT}"),), (scene,), (0,))
        return Story(((asked, f"<image> {describe(other)}{WRONG} <image>"),), (other, scene), (0,))
    turns, scenes = [(caption(scene, rng), "<image>")], [scene]
    for _ in range(1 if kind == "edit" else 2):
        edit = random_edit(world, scenes[-1], rng, allowed)
        if edit:
            turns.append((edit[0], "<image>"))
            scenes.append(edit[1])
    if kind == "edit" and len(scenes) == 2:         # the first picture comes from the user
        return Story(((f"<image>{turns[1][0]}", "<image>"),), tuple(scenes))
    return Story((*turns, question(scenes[-1])), tuple(scenes))


def rated(right, n):
    """Share of n items for which right(item, its own reference) holds, and beside it chance: with those of others."""
    others = np.random.default_rng(0).permutation(n).tolist()
    return {"score": float(np.mean([right(i, i) for i in range(n)])),
            "chance": float(np.mean([right(i, other) for i, other in enumerate(others)]))}


# ---------------------------------------------------------------------------------------------------------------------
# Words for a tokenizer
# ---------------------------------------------------------------------------------------------------------------------
def story_words():
    """Phrases of these conversations that carry meaning, beside those of parts.world.words_of."""
    return ["make the", "move the", "to the top", "to the bottom", "add a", "remove the", "plan and draw",
            "draw and check"]


def story_sentences(world, n):
    """The texts of n conversations, each a list."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        story = story_about(world, world.scene(rng), rng)
        yield [part.strip() for turn in story.turns for text in turn for part in text.split("<image>") if part.strip()]
