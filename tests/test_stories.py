"""Claims about conversations in text and pictures about the drawn world (parts/stories.py)."""

import re

import pytest
from made_data import COLOUR, PLACE, SHAPE, answer_of, combination_of, fits, random

from formats.records import check_turns, conversation_parts
from parts.stories import (
    EDITS,
    MEND,
    PLAN,
    RIGHT,
    STORIES,
    WRONG,
    edits,
    held_out_edit,
    in_order,
    mistaken,
    scene_of,
    story_about,
    story_sentences,
)
from parts.world import CELL_WORDS, Thing, World, combinations, describe

worlds = pytest.mark.parametrize("size", [(4, 4, 2), (5, 5, 3), (8, 8, 4)])      # shapes, colours, objects
stories = pytest.mark.parametrize("kind", STORIES)
CIRCLE, SQUARE = Thing("circle", "red", 0), Thing("square", "blue", 3)


def follow(instruction, scene):
    """Do what an instruction says, by its words alone."""
    place = PLACE.replace("at the", "(?:at|to) the")
    if found := re.fullmatch(f"make the {SHAPE}(?:e?s)? {COLOUR}", instruction):
        return tuple(Thing(t.shape, found[2], t.cell) if t.shape == found[1] else t for t in scene)
    if found := re.fullmatch(f"move the {SHAPE} {place}", instruction):
        cell = CELL_WORDS.index(found[2].replace("to", "at", 1))
        moved = [Thing(t.shape, t.colour, cell) if t.shape == found[1] else t for t in scene]
    elif found := re.fullmatch(f"remove the {SHAPE}", instruction):
        moved = [t for t in scene if t.shape != found[1]]
    else:
        found = re.fullmatch(f"add a {COLOUR} {SHAPE} {place}", instruction)
        moved = [*scene, Thing(found[2], found[1], CELL_WORDS.index(found[3]))]
    return tuple(sorted(moved, key=lambda thing: thing.cell))


def told(kind, n=100, size=()):
    """[(world, story)] of a kind, n of them about training scenes."""
    world = World(0, *size)
    return [(world, story_about(world, world.scene(random(0, i)), random(1, i), kind)) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Edits
# ---------------------------------------------------------------------------------------------------------------------
def test_all_edits_of_one_thing():
    """Its colours and cells, and what can stand beside it: 3 other shapes in 4 colours in 3 cells. It cannot go, since
    nothing would be left to speak of."""
    found = edits(World(0), (CIRCLE,))
    assert found["recolour"] == {f"make the circle {colour}": (Thing("circle", colour, 0),)
                                 for colour in ("green", "blue", "yellow")}
    assert found["move"] == {f"move the circle to the {place}": (Thing("circle", "red", cell),)
                             for cell, place in enumerate(("top right", "bottom left", "bottom right"), 1)}
    assert found["remove"] == {} and len(found["add"]) == 3 * 4 * 3
    assert found["add"]["add a blue square at the bottom right"] == (CIRCLE, SQUARE)


def test_all_edits_of_two_things():
    """Each is spoken of by its shape, and moves to free cells only; in the easiest world nothing can be added."""
    found = edits(World(0), (CIRCLE, SQUARE))
    assert found["move"] == {
        "move the circle to the top right": (Thing("circle", "red", 1), SQUARE),
        "move the circle to the bottom left": (Thing("circle", "red", 2), SQUARE),
        "move the square to the top right": (CIRCLE, Thing("square", "blue", 1)),
        "move the square to the bottom left": (CIRCLE, Thing("square", "blue", 2))}
    assert found["remove"] == {"remove the circle": (SQUARE,), "remove the square": (CIRCLE,)}
    assert found["recolour"]["make the square red"] == (CIRCLE, Thing("square", "red", 3))
    assert len(found["recolour"]) == 3 + 3 and found["add"] == {}
    assert len(edits(World(0, 5, 5, 3), (CIRCLE, SQUARE))["add"]) == 3 * 5 * 2


@pytest.mark.parametrize("shape, name", [("circle", "circles"), ("cross", "crosses")])
def test_a_group_changes_its_colour_as_one(shape, name):
    """Which of the equal things moves or goes could not be said, and no prompt speaks of a group beside others."""
    group = (Thing(shape, "red", 0), Thing(shape, "red", 3))
    found = edits(World(0, 5, 5, 3), group)
    assert found == {"move": {}, "add": {}, "remove": {}, "recolour": {
        f"make the {name} {colour}": (Thing(shape, colour, 0), Thing(shape, colour, 3))
        for colour in ("green", "blue", "yellow", "black")}}


@worlds
def test_every_edit_does_what_it_says(size):
    """Its words alone lead to its result, which is another scene, in the order of cells, that a prompt can describe."""
    world, met = World(0, *size), set()
    for i in range(60):
        scene = world.scene(random(i))
        for kind, some in edits(world, scene).items():
            for instruction, result in some.items():
                assert follow(instruction, scene) == result == in_order(result) != scene and combinations(result)
                met.add(kind)
    assert met == {*EDITS}


ONE, TWO = {"one object", "colours"}, {"two objects", "position", "colour attribution"}
REACHED = {"recolour": ONE | TWO | {"counting"}, "move": ONE | TWO, "add": TWO, "remove": ONE}


@worlds
@pytest.mark.parametrize("kind", EDITS)
def test_a_held_out_edit_leads_to_what_was_never_shown(kind, size):
    """The score is about composition: the result shows a held-out combination, of every skill whose scenes are results
    of such an edit."""
    world, skills = World(0, *size), set()
    for i in range(80):
        scene, instruction, result = held_out_edit(world, kind, random(i))
        assert edits(world, scene)[kind][instruction] == follow(instruction, scene) == result
        assert combinations(result) & world.held_out
        skills |= {combination[0] for combination in combinations(result) & world.held_out}
    assert skills >= REACHED[kind] and (skills == REACHED[kind] or size != (4, 4, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------------------------------
@worlds
@stories
def test_no_picture_of_a_story_shows_what_is_held_out(kind, size):
    """Not what it begins with, nor what edits lead to, nor what is drawn wrongly: else the score would be memory."""
    for world, story in told(kind, size=size):
        assert all(combinations(scene) and not combinations(scene) & world.held_out for scene in story.scenes)


@stories
def test_a_story_is_a_mixed_record(kind):
    """It has a scene for each mark, in their order, and says something wherever it says no picture."""
    for _, story in told(kind):
        assert check_turns(story.turns, len(story.scenes), "mixed") == "mixed"
        assert all(asked and answer for asked, answer in conversation_parts(story.turns, len(story.scenes)))
        assert not {*story.given} - {*range(len(story.scenes))}


@stories
def test_the_same_seed_tells_the_same_story(kind):
    """A run that goes on meets what it would have met; another seed tells another one."""
    scene = World(0).scene(random(0))
    once, again = ([story_about(World(0), scene, random(i), kind) for i in range(9)] for _ in range(2))
    assert once == again and len({*once}) > 4


def test_kinds_of_stories_have_their_shares():
    """Of nine conversations, if no kind is asked for."""
    world = World(0)
    found = [story_about(world, world.scene(random(0, i)), random(1, i)) for i in range(500)]
    told_by = {"edit": lambda story: story.turns[0][0].startswith("<image>"),
               "tell": lambda story: len(story.turns) == 3 and len(story.scenes) == 1,
               "plan": lambda story: story.turns[0][0].startswith(PLAN),
               "mend": lambda story: story.turns[0][0].startswith(MEND),
               "story": lambda story: len(story.scenes) == 3}
    shares = {kind: sum(map(is_one, found)) / 500 for kind, is_one in told_by.items()}
    assert shares == pytest.approx({kind: share / 9 for kind, share in STORIES.items()}, abs=0.05)
    assert sum(shares.values()) == pytest.approx(1)


def test_an_edit_starts_from_a_picture_of_the_user():
    """One picture is shown and one is drawn, as the instruction between them says."""
    for _, story in told("edit"):
        (asked, answer), = story.turns
        before, after = story.scenes
        assert follow(asked.removeprefix("<image>"), before) == after and answer == "<image>" and asked[0] == "<"


def test_what_is_told_of_a_drawing_is_so():
    """The prompt fits the picture, and both answers are right."""
    for _, story in told("tell"):
        (caption, drawing), *asked = story.turns
        scene, = story.scenes
        assert fits(caption, scene) and drawing == "<image>" and len(asked) == 2
        assert all(answer_of(question, scene) == answer for question, answer in asked)


@worlds
def test_a_plan_names_every_thing_and_then_draws_it(size):
    """Colour, shape and cell of each, whatever the prompt leaves open, in its order: what it says is copied."""
    for _, story in told("plan", size=size):
        ((asked, answer),), (scene,) = story.turns, story.scenes
        assert asked.startswith(PLAN) and fits(asked.removeprefix(PLAN), scene) and answer.endswith(" <image>")
        plan = answer.removesuffix(" <image>")
        things = re.findall(f"a {COLOUR} {SHAPE} {PLACE}", plan)
        assert {Thing(shape, colour, CELL_WORDS.index(place)) for colour, shape, place in things} == {*scene}
        assert plan == " and ".join("a " + " ".join(thing) for thing in things) and len(things) == len(scene)
        named = [shape for _, shape in re.findall(f"a (?:{COLOUR} )?{SHAPE}", asked)]
        assert [shape for _, shape, _ in things][:len(named)] == named


@worlds
def test_a_plan_is_read_back_to_its_scene(size):
    """In whatever order it speaks of the things."""
    world = World(0, *size)
    for i in range(100):
        scene = world.scene(random(i))
        assert scene_of(describe(scene)) == scene_of(describe(scene[::-1])) == scene


@pytest.mark.parametrize("plan", ["", "a", "a red circle", "red circle at the top left", "a red circle on the top left",
                                  "a red circle at the top left and ", "a red circle at the top left and a"])
def test_words_that_are_no_plan_have_no_scene(plan):
    """A model may write anything, or nothing."""
    assert scene_of(plan) is None


@worlds
def test_mending_says_yes_exactly_where_the_drawing_is_right(size):
    """The first picture is described as it is, and not learned. After a no comes what the prompt asks for."""
    said = []
    for _, story in told("mend", 200, size):
        (asked, answer), = story.turns
        wanted = combination_of(asked.removeprefix(MEND))
        first, words, *rest = conversation_parts(story.turns, len(story.scenes))[0][1]
        right = wanted in combinations(story.scenes[0])
        assert (first, rest, story.given) == (0, [] if right else [1], (0,)) and asked.startswith(MEND)
        assert words == describe(story.scenes[0]) + (RIGHT if right else WRONG)
        assert wanted in combinations(story.scenes[-1])
        said.append(right)
    assert 0.4 < sum(said) / len(said) < 0.65


@worlds
def test_a_mistake_is_one_thing_that_is_wrong(size):
    """An edit, or two colours exchanged, as models are apt to err; never what was asked for, nor what is held out."""
    world, exchanged, seen = World(0, *size), 0, 0
    for i in range(200):
        scene = world.scene(random(i))
        for wanted in combinations(scene):
            other = mistaken(world, scene, wanted, random(i), lambda one: not combinations(one) & world.held_out)
            assert wanted not in combinations(other) and not combinations(other) & world.held_out
            edited = other in [result for some in edits(world, scene).values() for result in some.values()]
            swapped = len(scene) == 2 and other == tuple(
                Thing(a.shape, b.colour, a.cell) for a, b in zip(scene, scene[::-1], strict=True))
            assert edited or swapped
            exchanged, seen = exchanged + (swapped and not edited), seen + 1
    assert 0 < exchanged < seen / 2


def test_there_may_be_no_mistake_to_make():
    """Then the drawing is right: the caller is told so."""
    assert mistaken(World(0), (CIRCLE,), ("one object", "circle", 0), random(0), lambda scene: False) is None


def test_a_story_goes_on_from_picture_to_picture():
    """Drawn from a prompt, edited twice, each time as the instruction says; the question is about the last picture."""
    for _, story in told("story"):
        (caption, drawing), *edited, (question, answer) = story.turns
        assert fits(caption, story.scenes[0]) and len(edited) == 2
        for (instruction, shown), before, after in zip(edited, story.scenes, story.scenes[1:], strict=False):
            assert follow(instruction, before) == after and shown == drawing == "<image>"
        assert answer_of(question, story.scenes[-1]) == answer


def test_a_tokenizer_learns_from_words_without_marks():
    """Marks are no text: what stands between them is, without the blanks around it. All kinds are among them."""
    lines = [text for said in story_sentences(World(0), 100) for text in said]
    assert not any("<image>" in text or text != text.strip() or not text for text in lines)
    for start in (PLAN, MEND, "make the ", "move the ", "remove the ", "add a "):
        assert any(text.startswith(start) for text in lines), start
    assert any(text.endswith(RIGHT) for text in lines) and any(text.endswith(WRONG) for text in lines)
