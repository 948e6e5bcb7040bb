"""Claims about the drawn world: scenes, captions, questions and the reader (parts/world.py)."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from made_data import answer_of, combination_of, fits, random, training_scenes

from parts.settings import InputError
from parts.world import (
    BACKGROUND,
    CELL_SIDES,
    CELLS,
    COLOURS,
    SHAPES,
    TOPICS,
    Thing,
    World,
    caption,
    combinations,
    draw_scenes,
    held_out_questions,
    make_question,
    prompt_text,
    read_scenes,
    rotations,
    world_of,
)

worlds = pytest.mark.parametrize("size", [(4, 4, 2), (5, 5, 3), (8, 8, 4)])      # shapes, colours, objects


def held_out_scenes(n, seed=0, size=()):
    """[(scene, combination)], n for each skill."""
    world, rng = World(seed, *size), random(seed)
    return [world.held_out_scene(skill, rng) for skill in world.skills for _ in range(n)]


def crowds(n, seed=0, size=()):
    """Full pictures, as the picture tokenizer learns them."""
    world, rng = World(seed, *size), random(seed)
    return [world.crowd(rng) for _ in range(n)]


def every_thing(world):
    """A scene for each thing at each place."""
    return [(Thing(shape, colour, place),) for shape in world.shapes for colour in world.colours
            for place in range(CELLS)]


@worlds
def test_the_reader_reads_every_drawn_scene_exactly(size):
    """Sprites differ by more than rounding to uint8 changes them: each thing at each place, training and held out."""
    world = World(0, *size)
    scenes = every_thing(world) + training_scenes(1000, 0, size) + crowds(100, 0, size)
    scenes += [scene for scene, _ in held_out_scenes(50, 0, size)]
    found, clear = read_scenes(draw_scenes(scenes), world)
    assert [set(scene) for scene in found] == [set(scene) for scene in scenes] and clear.all()


@pytest.mark.parametrize("cell", CELL_SIDES)
def test_cells_of_every_size_are_read_back_exactly(cell):
    """Shapes grow with their cell, and no sprite comes to look like another; which scenes there are stays the same."""
    world, plain = World(0, 8, 8, 4, cell), World(0, 8, 8, 4)
    scenes = every_thing(world) + [world.crowd(random(i)) for i in range(100)]
    pictures = draw_scenes(scenes, cell)
    found, clear = read_scenes(pictures, world)
    assert pictures.shape[1:] == (world.side, world.side, 3) == (2 * cell, 2 * cell, 3)
    assert [set(scene) for scene in found] == [set(scene) for scene in scenes] and clear.all()
    assert world.held_out == plain.held_out and world.scene(random(0)) == plain.scene(random(0))


def test_cells_of_the_usual_size_are_drawn_as_ever():
    """Trained weights know these bytes. A bar is 2.88 by 7.2 pixels: 4 of 8 samples lie in the pixel columns at its
    sides, 5 of 8 in the rows at its ends."""
    world = World(0, 8, 8)
    pictures = draw_scenes(every_thing(world))
    assert hashlib.sha256(pictures.tobytes()).hexdigest() == (
        "663b7a5590031f50bfb9e4c8fa4d2f357d89e2eb53b07c946566c09671adca25")
    across, along = np.array([0, 0, 0.5, 1, 1, 0.5, 0, 0]), np.array([0.625, *[1.0] * 6, 0.625])
    cover = along[:, None, None] * across[:, None]
    bar = cover * COLOURS["red"] + (1 - cover) * BACKGROUND
    drawn, = draw_scenes([(Thing("bar", "red", 0),)])
    assert np.array_equal(drawn[:8, :8], bar.round()) and (drawn[8:] == 245).all() and (drawn[:, 8:] == 245).all()


@pytest.mark.parametrize("levels", [256, 2])
@pytest.mark.parametrize("cell", [8, 32])
def test_the_reader_finds_nothing_on_noise(cell, levels):
    """Noise is like no sprite, be it smooth or black and white: no thing, and the picture counts as unclear."""
    world = World(0, 8, 8, cell=cell)
    noise = random(0).integers(levels, size=(200, world.side, world.side, 3)) * (255 // (levels - 1))
    found, clear = read_scenes(noise.astype(np.uint8), world)
    assert not any(found) and not clear.any()


@worlds
@pytest.mark.parametrize("seed", [0, 1])
def test_training_scenes_show_no_held_out_combination(seed, size):
    """The score is about composition, so what is asked was never shown; held-out scenes show what was asked."""
    world, trained = World(seed, *size), set().union(*map(combinations, training_scenes(1500, seed, size)))
    assert not (trained | set().union(*map(combinations, crowds(300, seed, size)))) & world.held_out
    for skill in world.skills:      # the words themselves are known: every skill is met in training, and held out
        assert {c for c in world.held_out if c[0] == skill} and {c for c in trained if c[0] == skill}
    for scene, combination in held_out_scenes(30, seed, size):
        assert combination in world.held_out and combination in combinations(scene)


def test_every_two_words_of_a_held_out_combination_are_met_in_training():
    """Only their combination is new: each shape is met in each colour, at each place, beside each other shape, ..."""
    def words(combination):
        flat = [part for word in combination[1:] for part in (word if isinstance(word, tuple) else (word,))]
        return {(a, b) for i, a in enumerate(flat) for b in flat[i + 1:]}
    world, met = World(0), set()
    for scene in training_scenes(3000):
        met |= {pair for t in scene for pair in words((0, t.colour, t.shape, t.cell))}
        met |= {pair for combination in combinations(scene) for pair in words(combination)}
    assert not set().union(*map(words, world.held_out)) - met


@worlds
def test_a_prompt_mentions_exactly_its_combination(size):
    """Read back from its words, every prompt of every combination is that combination again, in either order."""
    for way in World(0, *size).combinations.values():
        for i, combination in enumerate(way[:500]):
            assert {combination_of(prompt_text(combination, random(i, j))) for j in range(4)} == {combination}


def spoiled(skill, scene):
    """Scenes with one thing added, or one word of what the skill mentions changed."""
    free = next((cell for cell in range(CELLS) if cell not in {t.cell for t in scene}), None)
    if free is not None:
        yield *scene, replace(scene[0], cell=free)
    for i, thing in enumerate(scene):
        rest = scene[:i] + scene[i + 1:]
        yield rest
        yield *rest, replace(thing, shape=next(s for s in SHAPES if s != thing.shape))
        if skill in ("colours", "counting", "position", "colour attribution"):
            yield *rest, replace(thing, colour=next(c for c in COLOURS if c != thing.colour))
        if skill in ("one object", "two objects", "three objects", "colours"):
            yield *rest, replace(thing, cell=free)
    if skill in ("position", "two objects", "three objects", "four objects"):
        yield replace(scene[0], cell=scene[1].cell), replace(scene[1], cell=scene[0].cell), *scene[2:]


@worlds
def test_a_scene_fulfils_its_prompt_and_a_changed_scene_does_not(size):
    """One thing more, one less, or a wrong word is a wrong picture: scores of drawing give no credit for parts."""
    for scene, combination in held_out_scenes(20, 0, size):
        assert combination in combinations(scene)
        for wrong in spoiled(combination[0], scene):
            assert combination not in combinations(wrong), (combination, wrong)


@worlds
def test_captions_of_training_pictures_fit_them(size):
    """A caption describes all of its scene, or is a prompt of any skill that the scene fulfils."""
    for i, scene in enumerate(training_scenes(300, 0, size)):
        assert fits(caption(scene, random(i)), scene)


@worlds
@pytest.mark.parametrize("kind", TOPICS)
def test_questions_are_answered_correctly(kind, size):
    """A brute-force reading of the question's words gives the same answer, and the answer that was asked for."""
    world, met = World(0, *size), set()
    scenes = training_scenes(300, 0, size) + [scene for scene, _ in held_out_scenes(30, 0, size)]
    for i, scene in enumerate(scenes):
        for truth in (None,) if kind == "choice" else (None, True, False):
            asked = make_question(world, scene, kind, random(i), truth)
            assert asked.topic == kind and asked.answer == answer_of(asked.text, scene), (asked, scene)
            assert truth is None or asked.answer == ("yes" if truth else "no")
            met.add(asked.answer)
    assert met >= (set("ABCD") if kind == "choice" else {"yes", "no"})


@pytest.mark.parametrize("size, message", [
    ((3, 4, 2), "--shapes 3: give 4 to 8"), ((4, 9, 2), "--colours 9: give 4 to 8"),
    ((5, 8, 4), "--objects 4: give 2 to 3 with --shapes 5 --colours 8"), ((8, 8, 5), "--objects 5: give 2 to 4"),
    ((4, 4, 2, 0), "--cell 0: give 8, 16, 24 or 32"), ((4, 4, 2, 12), "--cell 12: give 8, 16, 24 or 32")])
def test_a_world_of_an_impossible_size_is_refused(size, message):
    """A choice needs two words that the scene does not show, a picture has four places, and a cell is made of whole
    codes."""
    with pytest.raises(InputError, match=re.escape(message)):
        World(0, *size)


def test_runs_of_before_keep_their_world():
    """Settings that name no size are of the easiest world; others come back as they were."""
    before = world_of({"seed": 3, "lr": 1})
    assert before.held_out == World(3).held_out and before.cell_side == 8
    again = world_of({"seed": 3, "shapes": 6, "colours": 5, "objects": 3, "cell": 16})
    assert again.held_out == World(3, 6, 5, 3).held_out and again.cell_side == 16


def test_rotations_keep_the_right_option():
    """The four options move round, so that the right one stands behind each letter once; the first is the original."""
    for i, scene in enumerate(training_scenes(100)):
        asked = make_question(World(0), scene, "choice", random(i))
        turned = rotations(asked)
        assert turned[0] == asked and sorted(q.answer for q in turned) == list("ABCD")
        assert all(q.answer == answer_of(q.text, scene) for q in turned)


def test_a_choice_is_asked_in_all_four_turns():
    """Of each scored picture: the plain accuracy counts the first alone, the circular one all."""
    groups = {}
    for measure, number, _, question in held_out_questions(World(0), 8, random(0)):
        if question.topic == "choice":
            groups.setdefault(number, []).append((measure, question))
    assert len(groups) == 8
    for group in groups.values():
        measures, turns = zip(*group, strict=True)
        assert measures == ("choice", "turned", "turned", "turned") and [*turns] == rotations(turns[0])
