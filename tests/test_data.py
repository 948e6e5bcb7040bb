"""Claims about the data: the drawn world, text, templates and masks, pictures, records, schedule (data.py)."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pyarrow.parquet
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file

import aia
import data
import eval as evaluation
import formats.datasets
import model
import train
from formats.checkpoints import save_checkpoint, tensors_of
from formats.datasets import (
    ENCODING,
    Encoded,
    FileSource,
    Mixture,
    bad_report,
    every,
    index_file,
    open_sources,
    picture_key,
    tar_samples,
)
from formats.records import Record, question_parts
from parts.pictures import (
    check_size,
    emu3_picture,
    janus_drawing,
    janus_reading,
    load_picture,
    smart_resize,
    to_picture,
    to_tensor,
)
from parts.settings import InputError, opt, parse
from parts.text import SPECIAL, Text, find_tokenizer, store_tokenizer
from parts.world import (
    BACKGROUND,
    CELL_SIDES,
    CELL_WORDS,
    CELLS,
    COLOURS,
    GRID,
    NUMBERS,
    OPPOSITE,
    PREFIXES,
    RELATIONS,
    SHAPES,
    TOPICS,
    Thing,
    World,
    caption,
    combinations,
    draw_scenes,
    make_question,
    prompt_text,
    read_scenes,
    world_of,
)

PRESET = {"emu3": model.PRESETS["tiny-emu3"], "janus": model.PRESETS["tiny-janus"]}
both_kinds = pytest.mark.parametrize("kind", PRESET)
SHAPE, COLOUR, PLACE, RELATION = (f"({'|'.join(words)})" for words in (SHAPES, COLOURS, CELL_WORDS,
                                                                       RELATIONS))


worlds = pytest.mark.parametrize("size", [(4, 4, 2), (5, 5, 3), (8, 8, 4)])      # shapes, colours, objects


def random(*key):
    return np.random.default_rng(key)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The text tokenizer of each tiny preset."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: data.train_tokenizer(folder / f"{kind}.json", config) for kind, config in PRESET.items()}


@pytest.fixture(scope="module")
def preparers(texts):
    """A preparer for a tiny model of each kind; its picture codes are those of random weights."""
    torch.manual_seed(0)
    return {kind: data.Preparer(model.build(f"tiny-{kind}", layers=1, width=32), text) for kind, text in texts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------
def training_scenes(n, seed=0, size=()):
    world, rng = World(seed, *size), random(seed)
    return [world.scene(rng) for _ in range(n)]


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


def fits(caption, scene):
    """Is this the full description of a scene, or a prompt that it fulfils?"""
    return caption == answer_of("what is there?", scene) or combination_of(caption) in combinations(scene)


@worlds
def test_captions_of_training_pictures_fit_them(size):
    """A caption describes all of its scene, or is a prompt of any skill that the scene fulfils."""
    for i, scene in enumerate(training_scenes(300, 0, size)):
        assert fits(caption(scene, random(i)), scene)


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
        turned = evaluation.rotations(asked)
        assert turned[0] == asked and sorted(q.answer for q in turned) == list("ABCD")
        assert all(q.answer == answer_of(q.text, scene) for q in turned)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
@both_kinds
def test_the_tiny_tokenizer_has_the_ids_of_the_preset(kind, texts):
    """Special tokens stand behind the text, in the preset's order, and code c of a picture is the token visual + c."""
    core, config = texts[kind].core, PRESET[kind]
    assert texts[kind].ids == config.ids and core.get_vocab_size() == config.vocab
    if kind == "emu3":
        last = core.token_to_id(f"<|visual token {config.codebook - 1:06d}|>")
        assert last == config.ids["visual"] + config.codebook - 1 == config.vocab - 1


def test_training_the_tokenizer_is_repeatable(texts):
    """Both kinds learn from the same text, so they cut it alike: a checkpoint's ids mean the same in every run."""
    assert all(texts["emu3"].core.id_to_token(i) == texts["janus"].core.id_to_token(i) for i in range(model.TINY_TEXT))


@both_kinds
def test_any_unicode_text_survives_encoding(kind, texts):
    """Bytes are the alphabet, so nothing is unknown: what is encoded is decoded to the same text."""
    points = random(0).integers(0x110000, size=(200, 12))
    strings = ["".join(chr(p) for p in row if not 0xD800 <= p < 0xE000) for row in points]
    for text in [*strings, "", " ", "\n\n\t\x00", "naïve 漢字 🙂🏽 e\u0301", "a red  circle\r\n"]:
        assert texts[kind].decode(texts[kind].encode(text)) == text


@both_kinds
def test_special_strings_in_a_users_text_stay_text(kind, texts):
    """Else a caption that quotes a control token would end the answer, or open a picture."""
    for special in [*SPECIAL[kind].values(), "<|visual token 000007|>", "<image>"]:
        ids = texts[kind].encode(f"say {special} now")
        assert max(ids) < model.TINY_TEXT and texts[kind].decode(ids) == f"say {special} now"


@both_kinds
def test_special_strings_act_only_where_they_are_allowed(kind, texts):
    """The flag's whole effect: the same string is one control token instead of text."""
    open_text = Text(texts[kind].file, kind, allow_special=True)
    boi = SPECIAL[kind]["boi"]
    assert open_text.encode(f"a{boi}b") == (*texts[kind].encode("a"), texts[kind].ids["boi"], *texts[kind].encode("b"))


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


def test_emu3s_own_tokenizer_has_the_published_ids(tmp_path):
    """Digits alone, the special tokens behind 151,643 ranks, and the 15 ids of a prompt whose length is published."""
    words = {64: "a", 33033: " portrait", 315: " of", 3908: " young", 3743: " girl", 13: ".", 58731: " masterpiece",
             11: ",", 4531: " film", 1081: " gr", 2627: "ained", 1850: " best", 4271: " quality", 220: " "}
    ranks = dict(enumerate(BYTES)) | {rank: word.encode() for rank, word in words.items()}
    ranks |= {300: b" g", 301: b"ai", 302: b"ain", 303: b"aine"}                # on the way to " grained"
    text = Text(rank_file(tmp_path, ranks, 32768, 151643), "emu3")
    prompt = "a portrait of young girl. masterpiece, film grained, best quality."
    assert [*text.encode(prompt)] == [64, 33033, 315, 3908, 3743, 13, 58731, 11, 4531, 1081, 2627, 11, 1850, 4271, 13]
    assert list(text.encode("64*64")) == [21, 19, 9, 21, 19]
    assert text.ids == model.EMU3_8B.ids
    assert text.control["<|visual token 032767|>"] == 184621 == model.EMU3_8B.vocab - 1
    assert text.decode(text.encode(prompt)) == prompt


def lowest_rank_first(word, ranks):
    """The published merge rule, written out: join the neighbours whose joint bytes have the lowest rank, until none."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while word not in ranks:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[word]]


def test_emu3s_own_tokenizer_merges_as_published(tmp_path):
    """Random words over random ranks, against the rule written out: the file has no list of merges, only ranks."""
    rng, tokens = random(3), []
    while len(tokens) < 120:                            # as training makes them: each of two earlier ones
        pool = [b"a", b"b", b"c", b"d", *tokens]
        joint = pool[rng.integers(len(pool))] + pool[rng.integers(len(pool))]
        tokens += [joint] if joint not in pool and len(joint) < 9 else []
    ranks = {token: rank for rank, token in enumerate([*BYTES, *tokens])}
    text = Text(rank_file(tmp_path, [*BYTES, *tokens]), "emu3")
    for _ in range(300):
        word = "".join("abcd"[i] for i in rng.integers(4, size=rng.integers(1, 20)))
        assert list(text.encode(word)) == lowest_rank_first(word.encode(), ranks), word


@pytest.mark.parametrize("given, cut", [
    ("it's We'LL", ["it", "'s", " We", "'LL"]), ("a1234", ["a", "1", "2", "3", "4"]), ("(word)", ["(word", ")"]),
    ("end!\n\n  next", ["end", "!\n\n", " ", " next"]), ("a  \n b", ["a", "  \n", " b"]), ("e\u0301", ["\u00e9"]),
    ("two  spaces ", ["two", " ", " spaces", " "])])
def test_emu3s_own_tokenizer_cuts_words_as_published(given, cut, tmp_path):
    """Contractions in any case, single digits, line ends with the signs before them; composed characters (NFC)."""
    text = Text(rank_file(tmp_path, BYTES), "emu3")
    core = text.core
    assert [given for given, _ in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(given))] == [
        "".join(core.id_to_token(i) for i in core.encode(piece, add_special_tokens=False).ids) for piece in cut]
    assert text.decode(text.encode(given)) == unicodedata.normalize("NFC", given)


def test_emu3s_own_tokenizer_is_stored_as_an_equal_tokenizer_json(tmp_path):
    """A run that starts from the original files keeps one that every library reads."""
    text = Text(rank_file(tmp_path, [*BYTES, b"re", b"ed", b"red", b" red"]), "emu3")
    (tmp_path / "run").mkdir()
    store_tokenizer(text, tmp_path / "run")
    again = Text(find_tokenizer(tmp_path / "run"), "emu3")
    assert again.ids == text.ids and again.file.name == "tokenizer.json"
    for given in ("a red cat's 12\n\n!", "<|image start|>"):
        assert again.encode(given) == text.encode(given) and max(text.encode(given)) < 260


@pytest.mark.parametrize("line", [b"not base64 5", b"YQ== x", b"YQ=="])
def test_a_broken_rank_file_is_named(line, tmp_path):
    """One line, with the file and what to do."""
    file = rank_file(tmp_path, BYTES)
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(InputError, match=r"emu3.tiktoken cannot be read .*download"):
        Text(file, "emu3")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A Llama-type sentencepiece tokenizer with Janus-Pro's control tokens, some in the model and some beside it."""
    folder, special = tmp_path_factory.mktemp("pieces"), list(SPECIAL["janus"].values())
    lines = [caption(scene, random(i)) for i, scene in enumerate(training_scenes(200))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=special[:5], minloglevel=2)
    (folder / "added_tokens.json").write_text(json.dumps({token: 340 + i for i, token in enumerate(special[5:])}))
    return folder / "tokenizer.model"


def test_sentencepiece_models_encode_and_decode(pieces, tmp_path):
    """Ids are those of the library; control tokens are found by string in the model and in the file beside it."""
    text, library = Text(pieces, "janus"), sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    given = "a red circle, 漢\n"
    assert list(text.encode(given)) == library.encode(given)
    assert text.decode([text.ids["boi"], *text.encode(given), text.ids["eos"], 5]) == given
    assert text.ids["bos"] == library.piece_to_id(SPECIAL["janus"]["bos"]) and text.ids["assistant"] == 342
    store_tokenizer(text, tmp_path)
    assert Text(find_tokenizer(tmp_path), "janus").ids == text.ids


def test_a_control_string_that_cannot_be_kept_apart_is_refused(pieces):
    """Sentencepiece finds its own control tokens in any text; they act only where they are allowed."""
    text, special = Text(pieces, "janus"), SPECIAL["janus"]
    with pytest.raises(InputError, match=f"holds the control string {special['boi']}.*--allow-special"):
        text.encode(f"a {special['boi']} b")
    assert 342 not in text.encode(special["assistant"])
    allowed = Text(pieces, "janus", allow_special=True).encode(special["boi"] + special["assistant"])
    assert list(allowed) == [text.ids["boi"], 342]


def test_letters_among_the_added_tokens_stay_letters(texts, tmp_path):
    """Janus-Pro's tokenizer.json lists ordinary letters and control tokens together, and marks few of them."""
    content = json.loads(texts["janus"].file.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 488, "content": "€"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = Text(tmp_path / "tokenizer.json", "janus")
    assert text.encode("€") == (488,) and text.decode([488]) == "€"
    assert max(text.encode(SPECIAL["janus"]["boi"])) < model.TINY_TEXT


# ---------------------------------------------------------------------------------------------------------------------
# Templates and masks
# ---------------------------------------------------------------------------------------------------------------------
def check(task, pieces, *expected, labels=None):
    """Compare one sample with its tokens written by hand: (token or tokens, mark) in order.

    Marks: k key (condition), q trained and query, t trained only, . none of them.
    """
    flat = [(i, mark) for part, mark in expected for i in (part if isinstance(part, list) else [part])]
    (ids, marks), batch = zip(*flat, strict=True), data.collate(task, [pieces], torch.tensor([True]), 0, codes=labels)
    answer = iter(ids if labels is None else [None] * marks.index("q") + labels[0].tolist())
    assert batch.tokens[0].tolist() == list(ids)
    assert batch.labels[0].tolist() == [i if mark in "qt" else -100 for i, mark in zip(answer, marks, strict=True)]
    assert batch.condition[0].tolist() == [mark == "k" for mark in marks]
    assert batch.queries[0].tolist() == [mark == "q" for mark in marks]


def test_masks_of_emu3_generation(texts):
    """Keys are BOS and prompt, queries the codes that predict a code; size (height first), tags and ends are neither.

    The last code of a row predicts the row end, so it is trained but no query; only codes are trained.
    """
    ids, e = texts["emu3"].ids, lambda text: list(texts["emu3"].encode(text))
    v, pieces = ids["visual"], data.Emu3Template(PRESET["emu3"], texts["emu3"]).generation(
        "a red cross", torch.tensor([[5, 9, 0], [7, 2, 1]]))
    check("gen", pieces, (ids["bos"], "k"), (e("a red cross"), "k"),
          (ids["boi"], "."), (e("2*3"), "."), (ids["img"], "."),
          ([v + 5, v + 9], "q"), (v + 0, "t"), (ids["eol"], "."), ([v + 7, v + 2], "q"), (v + 1, "t"),
          ([ids["eol"], ids["eof"], ids["eoi"]], "."))


def test_masks_of_emu3_understanding(texts):
    """Keys are the codes alone; queries the answers of all turns without their EOS, which is trained but asks nothing.

    Question and template belong to neither; the template itself adds the full stop after the question.
    """
    ids, e = texts["emu3"].ids, lambda text: list(texts["emu3"].encode(text))
    turns = question_parts([("is it red?", "yes"), ("how many crosses?", "two or three")], 1)
    v, pieces = ids["visual"], data.Emu3Template(PRESET["emu3"], texts["emu3"]).understanding(
        turns, [torch.tensor([[5, 9], [7, 2]])])
    check("und", pieces, (ids["bos"], "."), (e("You are a helpful assistant. USER: "), "."),
          (ids["boi"], "."), (e("2*2"), "."), (ids["img"], "."), ([v + 5, v + 9], "k"), (ids["eol"], "."),
          ([v + 7, v + 2], "k"), (ids["eol"], "."), (ids["eof"], "."), (ids["eoi"], "."),
          (e("is it red?"), "."), (e(". ASSISTANT:"), "."), (e("yes"), "q"), (ids["eos"], "t"),
          (e(" USER: "), "."), (e("how many crosses?"), "."), (e(". ASSISTANT:"), "."),
          (e("two or three"), "q"), (ids["eos"], "t"))


def test_text_between_pictures_is_encoded_in_one_piece(tmp_path):
    """The published templates are strings: a tokenizer that joins ?. or a space with a word must see them whole."""
    ranks = [*BYTES, b"?.", b" W", b" Wh", b" USER"]
    text = Text(rank_file(tmp_path, ranks), "emu3")
    template = data.Emu3Template(PRESET["emu3"], text)
    pieces = template.understanding([(["What?"], "x"), (["What?"], None)], [])
    first = text.encode("You are a helpful assistant. USER: What?. ASSISTANT:")
    flat = [text.ids["bos"], *first, *text.encode("x"), text.ids["eos"], *text.encode(" USER: What?. ASSISTANT:")]
    assert [i for ids, _ in pieces for i in ids] == flat and ranks.index(b"?.") in first


def test_masks_of_janus_generation(texts):
    """Keys are all tokens before begin-of-image; of the codes the last predicts nothing, so it is no query."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    codes = torch.tensor([[5, 9, 0, 7]])
    pieces = data.JanusTemplate(PRESET["janus"], texts["janus"]).generation(" a red cross ", codes[0])
    check("gen", pieces, (ids["bos"], "k"), (ids["user"], "k"), (e(": a red cross\n\n"), "k"),
          (ids["assistant"], "k"), (e(":"), "k"), (ids["boi"], "."),
          ([ids["placeholder"]] * 3, "q"), (ids["placeholder"], "t"), labels=codes)


def test_masks_of_janus_understanding(texts):
    """As in Emu3: keys are the image tokens of all pictures, queries the answers; no BOS within the conversation."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    turns = question_parts([("<image>\nand <image>\nred?", "yes"), ("how many crosses?", "two or three")], 2)
    config = replace(PRESET["janus"], image_size=2 * PRESET["janus"].vit_patch)              # 2 x 2 image tokens
    picture = [(ids["boi"], "."), ([ids["placeholder"]] * 4, "k"), (ids["eoi"], ".")]
    check("und", data.JanusTemplate(config, texts["janus"]).understanding(turns, None),
          (ids["bos"], "."), (ids["user"], "."), (e(": "), "."), *picture, (e("\nand "), "."), *picture,
          (e("\nred?\n\n"), "."), (ids["assistant"], "."), (e(":"), "."), (e(" yes"), "q"), (ids["eos"], "t"),
          (ids["user"], "."), (e(": how many crosses?\n\n"), "."), (ids["assistant"], "."), (e(":"), "."),
          (e(" two or three"), "q"), (ids["eos"], "t"))


def test_janus_answers_with_its_system_text_and_trains_without(texts):
    """As its authors do; the tiny model has none."""
    system = model.PRESETS["janus-pro-7b"].system
    for training, expected in ((True, ()), (False, texts["janus"].encode(system + "\n\n"))):
        template = data.JanusTemplate(replace(PRESET["janus"], system=system), texts["janus"], training)
        (first, role), *_ = template.understanding([(["hi"], None)], [])
        assert first == [texts["janus"].ids["bos"], *expected] and role == data.TEXT
    assert PRESET["janus"].system == "" and system.startswith("You are a helpful language and vision assistant. ")


def test_janus_breaks_the_line_after_a_picture_only_before_words(texts):
    """Contents are stripped: a picture at the end is followed by the blank line of the template alone."""
    ids, e = texts["janus"].ids, lambda text: list(texts["janus"].encode(text))
    template = data.JanusTemplate(PRESET["janus"], texts["janus"])
    for asked, after in ((["what?", 0], "\n\n"), ([0, "what?"], "\nwhat?\n\n")):
        flat = [i for part, _ in template.understanding([(asked, None)], [None]) for i in part]
        assert flat[flat.index(ids["eoi"]) + 1:] == [*e(after), ids["assistant"], *e(":")]
    flat = [i for part, _ in template.prompt("") for i in part]
    assert flat == [ids["bos"], ids["user"], *e(":"), ids["assistant"], *e(":"), ids["boi"]]


@pytest.mark.parametrize("marks, pictures", [(1, 0), (2, 1), (1, 2)])
def test_marks_must_fit_the_pictures(marks, pictures):
    """Else a picture would be lost, or a question would ask about one that is not there."""
    with pytest.raises(InputError, match=f"{marks} <image> marks in the questions for {pictures} pictures"):
        question_parts([("<image> and " * marks, None)], pictures)


def test_a_tokenizer_of_a_newer_library_is_named(texts, tmp_path):
    """It is valid JSON with parts that this version does not know."""
    content = json.loads(texts["emu3"].file.read_text()) | {"pre_tokenizer": {"type": "Invented"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json cannot be used .* newer version"):
        Text(tmp_path / "tokenizer.json", "emu3")


@pytest.mark.parametrize("words", [1, 2, 5])
def test_an_answer_has_a_query_for_each_of_its_tokens(words):
    """EOS is the last answer token: the token before it asks too, so that a one-word answer has exactly one query."""
    pieces = [([1] * 4, data.IMAGE), ([2], data.TEXT), ([*range(10, 10 + words), 3], data.ANSWER)]
    batch = data.collate("und", [pieces, [*pieces, ([2], data.TEXT), ([7, 3], data.ANSWER)]], torch.ones(2).bool(), 0)
    assert batch.queries.sum(1).tolist() == [words, words + 1] and not batch.queries[batch.tokens == 3].any()
    assert (batch.labels[batch.tokens == 3] == 3).all()


def world_records(task, n, turns=4):
    source = data.WorldSource(World(0), n, 0)
    records = [source.record(task, i, random(i)) for i in range(n)]
    return [replace(record, turns=record.turns[:turns]) for record in records]


@both_kinds
def test_a_dropped_prompt_is_invalid_for_aia_but_trained(kind, preparers):
    """Guidance needs pictures without a prompt. Emu3: an empty caption. Janus-Pro: pads from BOS to begin-of-image."""
    ids, records, rngs = PRESET[kind].ids, world_records("gen", 3), [random(i) for i in range(3)]
    full, dropped = (preparers[kind].batch(records, rngs, drop) for drop in (0.0, 1.0))
    assert full.aia_valid.all() and not dropped.aia_valid.any()
    assert torch.equal(dropped.labels[dropped.labels != -100], full.labels[full.labels != -100])
    for row, before in zip(dropped.tokens.tolist(), full.tokens.tolist(), strict=True):
        pads = [ids["pad"]] * (before.index(ids["boi"]) - 1) if kind == "janus" else []
        assert row[:len(pads) + 2] == [ids["bos"], *pads, ids["boi"]]


@both_kinds
@pytest.mark.parametrize("task", ["gen", "und"])
def test_padding_changes_neither_labels_nor_masks(kind, task, preparers):
    """Beside longer samples a sample keeps its tokens, labels and masks; the pads behind it have none."""
    records = world_records(task, 3, turns=1) + world_records(task, 3, turns=4)
    together, p = preparers[kind].batch(records), preparers[kind]
    lengths = []
    for i, record in enumerate(records):
        alone = p.batch([record])
        n = alone.tokens.shape[1]
        lengths.append(n)
        for name, empty in (("tokens", p.text.ids["pad"]), ("labels", -100), ("condition", False), ("queries", False)):
            row = getattr(together, name)[i]
            assert torch.equal(row[:n], getattr(alone, name)[0]) and (row[n:] == empty).all(), name
    assert min(lengths) < max(lengths) == together.tokens.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width, height, expected", [
    (640, 427, (424, 640)), (500, 333, (424, 632)), (1000, 301, (304, 1000)), (384, 384, (512, 512)),
    (200, 150, (448, 592)), (1600, 1203, (880, 1176)), (719, 717, (720, 720)), (4000, 3000, (880, 1176)),
    (524, 516, (512, 528))])                            # 64.5 and 65.5 codes: half to even, 64 and 66
def test_emu3_picture_sizes(width, height, expected):
    """What Emu3's own code makes of a picture: multiples of 8, area within 512^2..1024^2, height x width."""
    assert smart_resize(height, width, model.PRESETS["emu3-8b"]) == expected
    if width < 600:
        assert emu3_picture(Image.new("RGB", (width, height)), model.PRESETS["emu3-8b"]).shape == (3, *expected)


@pytest.mark.parametrize("aspect, side, grid", [
    ("1:1", 720, (90, 90)), ("16:9", 720, (68, 120)), ("4:3", 720, (78, 104)), ("9:16", 720, (120, 68)),
    ("5:1", 720, (40, 201)), ("1:1", 512, (64, 64))])
def test_emu3_draws_any_aspect(aspect, side, grid):
    """Rows and columns of codes, height first, all of about the same area; 67.5 becomes 68."""
    assert evaluation.grid_for(aspect, replace(model.PRESETS["emu3-8b"], image_size=side)) == grid


@pytest.mark.parametrize("kind, aspect", [("emu3", "16x9"), ("emu3", "0:1"), ("emu3", "-4:-3"), ("emu3", "9:1"),
                                          ("janus", "16:9")])
def test_an_aspect_that_cannot_be_drawn_is_refused(kind, aspect):
    """Janus-Pro draws squares only, Emu3 up to 5:1."""
    with pytest.raises(InputError, match=f"--aspect .*{aspect}"):
        evaluation.grid_for(aspect, model.PRESETS["emu3-8b" if kind == "emu3" else "janus-pro-1b"])


@pytest.mark.parametrize("width, height, inner", [(500, 333, (384, 255)), (333, 500, (255, 384)), (96, 96, (384, 384)),
                                                  (1000, 20, (384, 14))])
def test_janus_reads_a_picture_on_grey_with_truncated_sides(width, height, inner):
    """333 / 500 * 384 = 255.7 becomes 255, at least 14; the rest of the square is 127, its larger part last."""
    pixels = janus_reading(Image.new("RGB", (width, height), "white"), model.PRESETS["janus-pro-7b"])
    expected = np.full((384, 384, 3), 127, np.uint8)
    left, top = ((384 - side) // 2 for side in inner)
    expected[top:top + inner[1], left:left + inner[0]] = 255
    torch.testing.assert_close(pixels, torch.from_numpy(expected / np.float32(255)).permute(2, 0, 1) * 2 - 1)


@pytest.mark.parametrize("width, height", [(1600, 800), (800, 1600), (90, 45), (768, 384)])
def test_janus_draws_the_centre_square(width, height):
    """The short side becomes 384 and the long one is cropped on both sides: of bands 1 : 2 : 1 the middle is left."""
    long = max(width, height)
    bands = np.zeros((height, width, 3), np.uint8)
    rows = bands if height > width else bands.transpose(1, 0, 2)
    rows[:] = (255, 0, 0)
    rows[long // 4:long - long // 4] = (0, 255, 0)
    pixels = janus_drawing(Image.fromarray(bands), model.PRESETS["janus-pro-7b"])
    assert pixels.shape == (3, 384, 384)
    middle = pixels[:, 192, :] if width > height else pixels[:, :, 192]                      # (3, 384), along the bands
    assert (middle[1, 8:-8] > 0.99).all() and (middle[0, 8:-8] < -0.99).all()


def test_pictures_are_truncated_to_bytes():
    """Both models cut the fraction off instead of rounding, and clip: (0 + 1) / 2 * 255 = 127.5 becomes 127."""
    pixels = torch.tensor([-9.0, -1.0, 0.0, 0.9999, 1.0, 9.0])[None, None].expand(3, 1, 6)
    assert to_picture(pixels)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    picture = random(0).integers(256, size=(5, 4, 3)).astype(np.uint8)
    assert np.abs(to_picture(to_tensor(picture)).astype(int) - picture).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------
def entry(image, *turns, **more):
    """A record as it stands in a JSON-lines file; turns are (human, gpt)."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"image": image, "conversations": said} | more


@pytest.fixture
def album(tmp_path):
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


@both_kinds
def test_records_of_both_tasks_are_read(kind, album):
    """The task follows from the conversation; a place names file and line, paths are relative to the file."""
    file = album(DRAWN, "", ASKED | {"task": "und", "id": "x"}, entry(["b.png", "c.png"], ("same?", "no")))
    source = FileSource(file, kind)
    drawn, = source.records["gen"]
    asked, two = source.records["und"]
    assert drawn == Record(f"{file}:1", "gen", (("a red cross", "<image>"),), (file.parent / "a.png",))
    assert asked.origin == f"{file}:3" and asked.turns == (("is it red?", "yes"), ("and blue?", "no"))
    assert two.pictures == (file.parent / "b.png", file.parent / "c.png")


def test_text_may_hold_any_line_separator_but_the_newline(album):
    """JSON allows U+2028 and its like inside a string, and captions from the web have them: they end no record."""
    file = album(DRAWN, entry("a.png", ("a\u2028red\x85cross", "<image>")))
    assert [record.turns[0][0] for record in FileSource(file, "emu3").records["gen"]][1] == "a\u2028red\x85cross"


@both_kinds
@pytest.mark.parametrize("images, marked, bare", [
    ("b.png", "<image>\nis it red?", "is it red?"), ("b.png", " <image> is it red? ", "is it red?"),
    (["b.png", "c.png"], "<image><image>is it red?", "is it red?")])
def test_the_image_mark_is_optional(kind, images, marked, bare, album, preparers):
    """Without a mark the pictures come first, which is where the mark usually stands: both give the same batch."""
    file = album(*(entry(images, (asked, "yes"), ("and blue?", "no")) for asked in (marked, bare)))
    one, other = (preparers[kind].batch([record]) for record in FileSource(file, kind).records["und"])
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.condition, other.condition)


@both_kinds
def test_several_pictures_stand_where_their_marks_are(kind, album, preparers):
    """Pictures enter in the order of the list, also over several turns, and all their tokens are keys."""
    file = album(entry(["c.png", "a.png"], ("see <image>", "yes"), ("like <image> ?", "no")),
                 entry("c.png", ("?", "no")), entry("a.png", ("?", "no")))
    p = preparers[kind]
    both, *single = (p.batch([record]) for record in FileSource(file, kind).records["und"])
    keys = [batch.tokens[batch.condition].tolist() for batch in (both, *single)]
    assert keys[0] == keys[1] + keys[2]
    if kind == "janus":
        assert torch.equal(both.pixels, torch.cat([single[0].pixels, single[1].pixels]))


@pytest.mark.parametrize("cell", [8, 16])
def test_an_export_is_read_back_to_the_same_pictures(cell, tmp_path, capsys):
    """Pictures are stored without loss, so the built-in world and its export are the same training data."""
    data.main(["export", str(tmp_path / "world"), "--n", "10", "--seed", "3", *["--cell", "16"] * (cell == 16)])
    source = FileSource(tmp_path / "world/train.jsonl", "emu3")
    drawn = data.WorldSource(World(3, cell=cell), 10, 3)
    assert [source.count(task) for task in ("gen", "und")] == [5, 5] and "10 records" in capsys.readouterr().out
    for offset, task in enumerate(("gen", "und")):
        for i, record in enumerate(source.records[task]):
            scene = drawn.scenes[2 * i + offset]
            assert np.array_equal(load_picture(record.pictures[0], "emu3"), drawn.pictures[2 * i + offset])
            assert all(fits(asked, scene) if task == "gen" else answer_of(asked, scene) == answer
                       for asked, answer in record.turns)


def use(file, p, on_bad_record):
    """Read a file and make a step of it, in which every record takes part: (bad records, places in the batches)."""
    source = FileSource(file, p.config.kind, on_bad_record)
    schedule = data.Schedule(source, p, 0, 6, (1, 1), 2, drop=0.0, on_bad_record=on_bad_record)
    return [place for batch in schedule.step(0) for place in batch.origins], source.bad + schedule.bad


# ---------------------------------------------------------------------------------------------------------------------
# Data sets as they are published
# ---------------------------------------------------------------------------------------------------------------------
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


def records(source):
    return [record for task in aia.TASKS for record in every(source, task)]


def content(record):
    return record.task, record.turns, [load_picture(p, "emu3").tobytes() for p in record.pictures]


def index(*paths):
    data.main(["index", *map(str, paths)])


@pytest.mark.parametrize("form", ["json", *SHARDED])
def test_published_formats_hold_the_same_records(form, album, tmp_path, preparers):
    """Where a record is stored changes neither its words nor its pixels, nor the batch that it becomes."""
    own, public = (FileSource(path, "emu3") for path in (album(*PUBLIC), store(form, tmp_path, PUBLIC)))
    assert [content(record) for record in records(public)] == [content(record) for record in records(own)]
    for task in aia.TASKS:
        one, other = (preparers["emu3"].batch(list(every(source, task))) for source in (own, public))
        assert torch.equal(one.tokens, other.tokens)
    names = [picture_key(p) for source in (own, public) for record in records(source) for p in record.pictures]
    assert len(set(names)) == 3 and names[:3] == names[3:]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_tables_may_hold_captions_plain_bytes_and_several_pictures(form, album, tmp_path):
    """A picture is bytes, or a struct, or a path; words are a conversation, or a caption, which is drawn."""
    album()
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    said = entry("", ("same?", "no"))["conversations"]
    for name, columns in {"x": {"image": [a], "caption": ["a cross"]}, "y": {"image": [b], "text": ["a square"]},
                          "z": {"image": [[a, b]], "conversations": [said]},
                          "w": {"image": [{"bytes": None, "path": "b.png"}], "text": ["by path"]}}.items():
        write_table(tmp_path / f"{name}.{form}", columns)
    found = records(FileSource(tmp_path / f"[w-z].{form}", "emu3"))
    assert [(record.task, record.turns[0][0]) for record in found] == [
        ("gen", "by path"), ("gen", "a cross"), ("gen", "a square"), ("und", "same?")]
    assert [record.pictures for record in found] == [(tmp_path / "b.png",), (a,), (b,), (a, b)]


def test_prompts_of_another_layout_are_drawn_and_edits_are_refused(album, tmp_path):
    """ShareGPT-4o-Image has text to picture, which we learn, and picture to picture, which no task here is."""
    album()
    drawn = {"input_prompt": "a cross", "output_image": "a.png", "output_image_resolution": [16, 16]}
    (tmp_path / "4o.json").write_text(json.dumps([drawn, drawn | {"input_image": ["b.png"]}]))
    source = FileSource(tmp_path / "4o.json", "emu3", "skip")
    assert records(source) == [Record(f"{tmp_path / '4o.json'}:1", "gen", (("a cross", "<image>"),),
                                      (tmp_path / "a.png",))]
    assert len(source.bad) == 1 and re.search(r"4o.json:2: .*edits a picture.*leave it out", source.bad[0])


@pytest.mark.parametrize("form", ["jsonl", "json", *SHARDED])
def test_an_index_finds_what_direct_reading_finds(form, album, tmp_path, capsys):
    """The index holds places alone, 16 bytes each: records, order and the places in messages stay."""
    path = album(*PUBLIC) if form == "jsonl" else store(form, tmp_path, PUBLIC)
    direct = records(FileSource(path, "emu3"))
    index(path)
    assert "2 records to draw, 1 to answer" in capsys.readouterr().out
    assert np.load(index_file(path)).dtype.itemsize == 16
    source = FileSource(path, "emu3")
    assert isinstance(source.records["gen"], np.memmap) and records(source) == direct and len(direct) == 3


@pytest.mark.parametrize("path, expected", [
    ("a/train.jsonl", "a/train.jsonl.index.npy"), ("a/shards/", "a/shards.index.npy"),
    ("a/x-*.tar", "a/x-_.tar.index.npy"), ("a/*/b-?.tar", "a/_b-_.tar.index.npy"), ("*.tar", "_.tar.index.npy")])
def test_an_index_has_the_documented_name(path, expected):
    """Beside the data, and for a pattern in the last folder that has a name."""
    assert str(index_file(path)) == expected


@pytest.mark.parametrize("change", ["longer", "touched", "come", "gone"])
def test_an_index_of_files_that_have_changed_is_refused(change, album, tmp_path):
    """Offsets into other bytes would read nonsense; the message says which file and what to run."""
    path = store("tar", tmp_path, PUBLIC)
    index(path)
    FileSource(path, "emu3")
    if change == "longer":
        (path / "1.tar").write_bytes((path / "1.tar").read_bytes() + bytes(512))
    elif change == "touched":
        os.utime(path / "1.tar", (0, 0))
    else:
        os.replace(path / "1.tar", path / ("2.tar" if change == "come" else "1.old"))
    with pytest.raises(InputError, match=r"[12]\.tar has changed, come or gone since .*run python data.py index .*tar"):
        FileSource(path, "emu3")
    index(path)
    assert len(records(FileSource(path, "emu3"))) == (2 if change == "gone" else 3)


def test_a_killed_index_leaves_the_last_one(album, tmp_path, monkeypatch):
    """It is written under another name and renamed: there is none, or the old one, or all of the new one."""
    path = album(*PUBLIC)

    def half(out, array, **kwargs):
        out.write(bytes(40))
        raise KeyboardInterrupt
    for stored in (None, index_file(path)):
        before = stored and stored.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(np, "save", half)
            index(path)
        assert (index_file(path).read_bytes() if stored else index_file(path).exists() or None) == before
        assert len(records(FileSource(path, "emu3"))) == 3
        index(path)
    index_file(path).write_bytes(bytes(40))
    with pytest.raises(InputError, match="index.npy is broken.*run python data.py index"):
        FileSource(path, "emu3")


def test_the_index_names_and_counts_bad_records_and_leaves_them_out(album, tmp_path, capsys):
    """20 are shown, all are listed; a shard that ends too soon gives what it has."""
    good = [(f"{i}.{ending}", content) for i in range(3)
            for ending, content in (("png", (album().parent / "a.png").read_bytes()), ("txt", b"a cross"))]
    bad = [("no words.png", good[0][1]), ("no picture.txt", b"a cross"), ("x.png", b"text"), ("x.txt", b"a cross")]
    bad += [(f"empty{i}.txt", b"") for i in range(20)]
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name, content in good[:2] + bad + good[2:]:
            add(tar, name, content)
    packed = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "all.tar").write_bytes(packed[:packed.rindex(b"2.png") + 600])           # within its pixels
    index(tmp_path / "all.tar")
    out, listed = capsys.readouterr().out, (tmp_path / "all.tar.bad.txt").read_text().splitlines()
    assert f"24 bad records were left out:\n  {tmp_path / 'all.tar'}: 24\n" in out and "  and 4 more\n" in out
    for text, name, why in zip(listed[:3], ["no words", "no picture", "x"], ["caption", "needs a picture", "cannot be"],
                               strict=True):
        assert text.startswith(f"{tmp_path / 'all.tar'}:{name}: ") and why in text and text in out
    assert len(listed) == 24 and listed[-1] not in out and "cannot be read to its end" in listed[-1]
    source = FileSource(tmp_path / "all.tar", "emu3")
    assert [record.origin[-2:] for record in records(source)] == [":0", ":1"] and source.bad == listed
    index_file(tmp_path / "all.tar").unlink()
    with pytest.raises(InputError, match="all.tar:no words: .*--on-bad-record skip"):
        FileSource(tmp_path / "all.tar", "emu3")


@pytest.mark.parametrize("text", ['{"a": {"image": "a.png"}}', '[{"image": "a.png"}, {"image": ', "", "[]"])
def test_a_file_that_is_no_array_is_named(text, tmp_path):
    """A download that was cut, an object, or nothing."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="x.json.*(is it complete|holds no usable record)"):
        FileSource(tmp_path / "x.json", "emu3", "skip" if text[:1] == "[" else "stop")


@pytest.mark.parametrize("name", ["none.jsonl", "none.tar", "none*.tar", "."])
def test_a_source_without_files_is_named(name, tmp_path):
    """Also a folder or pattern that holds nothing of use."""
    with pytest.raises(InputError, match="data set .* cannot be read .*give .jsonl"):
        FileSource(tmp_path / name, "emu3")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_missing_pyarrow_is_named_with_its_command(form, album, tmp_path, monkeypatch):
    """Only those who have tables need it."""
    album()
    path = store(form, tmp_path, PUBLIC)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=f"{form} is read through pyarrow.*pip install pyarrow$"):
        FileSource(path, "emu3")


@pytest.mark.parametrize("texts", [["a=0"], ["a=1", "b"], ["a=1.2.3", "b=1"], ["a=1", "b=0.0"]])
def test_weights_are_numbers_above_zero_for_all_or_none(texts):
    """A data set with no weight among others with one has no share that could be meant."""
    with pytest.raises(InputError, match="give each data set a weight above 0 .PATH=WEIGHT., or none"):
        open_sources(texts, "emu3")


def test_bad_records_are_counted_by_data_set(album, tmp_path):
    """Of several data sets one may be rotten, which a list of lines does not show."""
    store("tar", tmp_path, PUBLIC)
    (tmp_path / "tar/1.tar").write_bytes(b"rotten" * 200)
    source = open_sources([f"{album(DRAWN, 'rotten', 'rotten')}=2", f"{tmp_path}/./tar/=.5"], "emu3", "skip")
    assert source.weights == [2, 0.5] and [source.count(task) for task in aia.TASKS] == [2, 1]
    report = bad_report(source.bad, source.paths).splitlines()
    assert report[0].startswith("3 bad") and report[1:3] == [f"  {tmp_path}/train.jsonl: 2", f"  {tmp_path}/./tar/: 1"]
    assert len(report) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Pictures encoded once
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path, texts):
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


@both_kinds
def test_encoded_pictures_give_the_batches_that_encoding_on_the_way_gives(kind, saved, album, texts, tmp_path, capsys):
    """Frozen towers say the same each time: once stored, codes and features take the towers' place, bit for bit."""
    (m, init), file = saved(kind), album(*ALBUM)
    encode(tmp_path / "codes", file, init, *["--features"] * (kind == "janus"))
    assert re.findall(r"(\w+): (\d) pictures encoded", capsys.readouterr().out) == \
        ([("codes", "3")] if kind == "emu3" else [("codes", "1"), ("features", "2")])
    plain, stored = data.Preparer(m, texts[kind]), data.Preparer(m, texts[kind], encoded=Encoded(
        tmp_path / "codes", m))
    records = FileSource(file, kind).records
    expected = {task: plain.batch(records[task]) for task in records}
    losses = {task: m(batch) for task, batch in expected.items()}
    m.encode_images = None                                      # whoever calls a tower now fails
    if kind == "janus":
        m.vision.forward = None
    for task, batch in expected.items():
        again = stored.batch(records[task])
        assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.labels, batch.labels)
        assert torch.equal(m(again).ntp, losses[task].ntp) and torch.equal(m(again).intensity, losses[task].intensity)


def test_encoding_goes_on_where_it_stopped(saved, album, tmp_path, monkeypatch, capsys):
    """Files are written whole or not at all, and what they hold is not made again."""
    (_, init), file = saved("emu3"), album(*ALBUM)
    monkeypatch.setattr(formats.datasets, "TOGETHER", 1)
    monkeypatch.setattr(formats.datasets, "PICTURES_A_FILE", 1)
    save = save_file

    def killed(tensors, path, metadata):
        save(tensors, path, metadata)
        if "00001" in str(path):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(formats.datasets, "save_file", killed)
        encode(tmp_path / "codes", file, init)
    assert [path.name for path in (tmp_path / "codes").glob("*.safetensors")] == ["000-00000.safetensors"]
    encode(tmp_path / "codes", file, init)
    assert "codes: 2 pictures encoded, 1 were there" in capsys.readouterr().out
    (tmp_path / "codes/000-00001.safetensors").unlink()        # a lost file is replaced under a new name
    encode(tmp_path / "codes", file, init)
    assert "codes: 1 pictures encoded, 2 were there" in capsys.readouterr().out


def test_several_processes_share_the_encoding(saved, album, tmp_path, monkeypatch):
    """Each takes its part by RANK and WORLD_SIZE, and writes files of its own."""
    (m, init), file = saved("emu3"), album(*ALBUM)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, held in (("0", 2), ("1", 3)):
        monkeypatch.setenv("RANK", rank)
        encode(tmp_path / "codes", file, init)
        assert len(Encoded(tmp_path / "codes", m).parts) == held


def test_codes_of_other_weights_or_another_resizing_are_refused(saved, album, tmp_path, monkeypatch):
    """They would train the model on noise without any error; so would those of the same weights used otherwise."""
    (m, init), file = saved("janus"), album(*ALBUM)
    encode(tmp_path / "codes", file, init, "--features")
    Encoded(tmp_path / "codes", m)
    others = {"codes": [saved("janus", 1)[0], saved("janus", vq_mult=(1, 1))[0]], "features": [saved("janus")[0]]}
    with torch.no_grad():
        others["features"][0].vision.norm.bias += 1e-6
    for name, models in others.items():
        for other in models:
            with pytest.raises(InputError, match=rf"codes/000-0000\d.safetensors.*\({name} \w+, here \w+\).*again"):
                Encoded(tmp_path / "codes", other)
    (emu, _), (larger, _) = saved("emu3"), saved("emu3", image_size=32, max_pixels=32 * 32)
    assert emu.vq.state_dict().keys() == larger.vq.state_dict().keys()
    larger.vq.load_state_dict(emu.vq.state_dict())
    assert Encoded(tmp_path / "no", emu, new=True).fingerprints != \
        Encoded(tmp_path / "no", larger, new=True).fingerprints
    monkeypatch.setattr(formats.datasets, "ENCODING", ENCODING + 1)
    with pytest.raises(InputError, match="encode again"):
        Encoded(tmp_path / "codes", m)


def test_pictures_are_read_once_where_nothing_is_stored_of_them(saved, album, texts, tmp_path, monkeypatch):
    """A store of codes knows no features, so the pictures of questions are not read a second time to look for some."""
    (m, init), file = saved("janus"), album(*ALBUM)
    encode(tmp_path / "codes", file, init)
    preparer = data.Preparer(m, texts["janus"], encoded=Encoded(tmp_path / "codes", m))
    hashed, key = [], picture_key
    monkeypatch.setattr(formats.datasets, "picture_key", lambda picture: hashed.append(picture) or key(picture))
    for records in FileSource(file, "janus").records.values():
        preparer.batch(records)
    assert hashed == [tmp_path / "a.png"]


def test_a_changed_picture_is_encoded_anew(saved, album, texts, tmp_path):
    """Pictures are known by their content: a new file under an old name is not taken for the old one."""
    (m, init), file = saved("emu3"), album(*ALBUM)
    encode(tmp_path / "codes", file, init)
    store = Encoded(tmp_path / "codes", m)
    assert store.get("codes", tmp_path / "a.png") is not None
    Image.fromarray(draw_scenes(training_scenes(5))[-1]).save(tmp_path / "a.png")
    assert store.get("codes", tmp_path / "a.png") is None
    fresh, stored = (data.Preparer(m, texts["emu3"], encoded=one).codes([tmp_path / "a.png"])[0]
                     for one in (None, store))
    assert torch.equal(fresh, stored)


@pytest.mark.parametrize("flags, message", [
    (["--data", "train.jsonl"], "needs a folder, --data and --init"),
    (["--data", "FILE", "--init", "EMU3", "--features"], "there is no SigLIP"),
    (["--data", "no.jsonl", "--init", "EMU3"], "no.jsonl cannot be read")])
def test_encode_refuses_what_it_cannot_do_before_it_writes(flags, message, saved, album, tmp_path):
    """One line with the remedy, and no folder left behind."""
    given = {"FILE": str(album(DRAWN)), "EMU3": saved("emu3")[1]}
    with pytest.raises(InputError, match=message):
        data.main(["encode", str(tmp_path / "codes"), *(given.get(flag, flag) for flag in flags)])
    assert not (tmp_path / "codes").exists()


def test_a_broken_store_is_named(saved, tmp_path):
    """A truncated file of codes is one clear line; so is a folder that holds none."""
    m, _ = saved("emu3")
    with pytest.raises(InputError, match="codes holds no encoded pictures.*data.py encode"):
        Encoded(tmp_path / "codes", m)
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/000-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="000-00000.safetensors is broken.*run data.py encode again"):
        Encoded(tmp_path / "codes", m)


# ---------------------------------------------------------------------------------------------------------------------
# Records that cannot be used
# ---------------------------------------------------------------------------------------------------------------------
BAD = {
    "missing picture": (entry("none.png", ("is it?", "no")), "none.png is missing.*relative to the JSON file"),
    "text as picture": (entry("text.png", ("is it?", "no")), "text.png cannot be opened.*is it a picture"),
    "truncated picture": (entry("cut.png", ("is it?", "no")), "cut.png is broken.*replace it"),
    "truncated picture to draw": (entry("cut.png", ("a cross", "<image>")), "cut.png is broken.*replace it"),
    "extreme ratio": (entry("flat.png", ("is it?", "no")), "280 x 10.*crop it"),
    "not JSON": ('{"image": "a.png", ', "not JSON.*one object per line"),
    "no object": ('["a.png"]', 'needs "image" and "conversations"'),
    "unknown field": (DRAWN | {"captions": 1}, "unknown field 'captions'.*known are"),
    "unknown task": (DRAWN | {"task": "edit"}, "unknown task 'edit'.*gen, und"),
    "wrong task": (DRAWN | {"task": "und"}, "task is 'und'.*means drawing"),
    "empty answer": (entry("a.png", ("is it?", " ")), "answer is empty.*needs text"),
    "no answer": (entry("a.png") | {"conversations": [{"from": "human", "value": "?"}]}, "human and gpt turns in turn"),
    "too many marks": (entry("a.png", ("<image> and <image>?", "no")), "2 <image> marks.*for 1 pictures.*one each"),
    "drawing in two turns": (entry("a.png", ("a cross", "<image>"), ("?", "no")), "one human turn with the prompt"),
    "long caption": (entry("a.png", ("red " * 300, "<image>")), "tokens, but the model takes.*shorten"),
}


@both_kinds
@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_a_bad_record_is_named_with_line_and_remedy(kind, line, message, album, preparers):
    """One line says where and what to do; "skip" leaves just this record out and lists it."""
    file = album(DRAWN, ASKED, line)
    with pytest.raises(InputError, match=f"^{file}:3: .*{message}") as error:
        use(file, preparers[kind], "stop")
    assert "\n" not in str(error.value) and "--on-bad-record skip" in str(error.value)
    places, bad = use(file, preparers[kind], "skip")
    assert set(places) == {f"{file}:1", f"{file}:2"} and len(bad) == 1 and re.search(f"^{file}:3: .*{message}", bad[0])


@pytest.mark.parametrize("limit", [1000, 2000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(limit, album, preparers, monkeypatch):
    """A small file can unpack to gigabytes: Pillow warns above its limit and refuses above twice, both are refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    file = album(DRAWN, ASKED, entry("huge.png", ("is it?", "no")))                          # 3600 pixels
    with pytest.raises(InputError, match=f"^{file}:3: .*shrink it first"):
        use(file, preparers["emu3"], "stop")
    assert len(use(file, preparers["emu3"], "skip")[1]) == 1


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_file_without_records_is_refused(content, tmp_path):
    """The message names the file, not a place inside the program."""
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"data set {tmp_path / 'train.jsonl'} .*(give|see)"):
        FileSource(tmp_path / "train.jsonl", "emu3")


def test_one_bad_byte_costs_one_record(album):
    """A mark of UTF-8 at the start is none; a line that is not UTF-8 is a bad record as any other."""
    file = album(DRAWN, ASKED)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join([lines[0], lines[1].replace(b"yes", b"\xff"), lines[1]]))
    source = FileSource(file, "emu3", "skip")
    assert [source.count(task) for task in aia.TASKS] == [1, 1]
    assert len(source.bad) == 1 and ":2: not JSON" in source.bad[0]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_many_bits_are_refused(mode, album, tmp_path):
    """Made 8-bit by cutting, all but the darkest of their values would be white."""
    ramp = Image.fromarray(np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16))
    ramp.convert(mode).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="a.tiff has more than 8 bits a channel"):
        load_picture(tmp_path / "a.tiff", "emu3")


def test_half_a_character_is_a_bad_record(album, preparers):
    """JSON may name one half of a pair; no tokenizer takes it."""
    batch, bad = use(album(json.dumps(entry("a.png", ("\ud83d?", "yes"))), ASKED, DRAWN), preparers["emu3"], "skip")[:2]
    assert len(bad) == 1 and "half a character" in bad[0]


@pytest.mark.parametrize("harm", [lambda tar, at: tar[:at], lambda tar, at: tar[:at + 100],
                                  lambda tar, at: tar[:at] + b"x" + tar[at + 1:], lambda tar, at: tar + tar],
                         ids=["cut before a header", "cut in it", "a wrong byte", "two joined"])
def test_a_broken_archive_is_no_shorter_one(harm, tmp_path):
    """tarfile takes any broken header for the end; what is behind it would be missing without a word."""
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(3):
            at = tar.offset
            add(tar, f"{i}.png", b"x")
            add(tar, f"{i}.txt", b"a cat")
    assert len([*tar_samples(file)]) == 3
    file.write_bytes(harm(file.read_bytes(), at))
    with pytest.raises((tarfile.TarError, OSError)):
        [*tar_samples(file)]


# ---------------------------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------------------------
def schedule(p, n=10, batch_size=6, ratio=(1, 1), micro_batch=64, drop=0.3):
    return data.Schedule(data.WorldSource(World(0), n, 0), p, 0, batch_size, ratio, micro_batch, drop)


@pytest.mark.parametrize("ratio", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 0)])
def test_the_ratio_is_honoured_over_any_window(ratio, preparers):
    """Counts come from the running total, so no window of steps is more than one sample away from the ratio."""
    before = [data.samples_before(step, 5, ratio)["gen"] for step in range(40)]
    for first in range(40):
        for last in range(first + 1, 40):
            assert abs(before[last] - before[first] - (last - first) * 5 * ratio[0] / sum(ratio)) < 1
    made = schedule(preparers["emu3"], batch_size=5, ratio=ratio).step(3)
    assert sum(len(b.tokens) for b in made) == 5
    assert sum(len(b.tokens) for b in made if b.task == "gen") == before[4] - before[3]


@both_kinds
def test_a_step_has_the_same_samples_whatever_the_micro_batch(kind, preparers):
    """Records, words and dropped prompts follow from seed and position alone, so memory can be traded for time."""
    def samples(micro_batch):
        return [(b.task, place, tokens[:1 + int((tokens != pad).nonzero().max())].tolist(), bool(valid))
                for b in schedule(preparers[kind], batch_size=12, micro_batch=micro_batch).step(2)
                for place, tokens, valid in zip(b.origins, b.tokens, b.aia_valid, strict=True)]
    pad = preparers[kind].text.ids["pad"]
    assert sorted(samples(1)) == sorted(samples(4)) == sorted(samples(64))
    assert {valid for task, *_, valid in samples(64) if task == "gen"} == {True, False}


@both_kinds
def test_samples_of_like_length_share_a_micro_batch(kind, preparers):
    """Cut in order of arrival, short conversations would be padded to long ones; the longest come first."""
    plan = schedule(preparers[kind], n=64, batch_size=128, micro_batch=8, drop=0.0)
    lengths = {task: [batch.lengths for batch in plan.step(0) if batch.task == task] for task in ("gen", "und")}
    arrived = [sum(plan.preparer.batch([plan.record("und", i)[0]]).lengths) for i in range(64)]
    assert sorted(sum(lengths["und"], ())) == sorted(arrived)
    before = 8 * sum(max(arrived[first:first + 8]) for first in range(0, 64, 8)) / sum(arrived) - 1
    for groups in lengths.values():
        assert sum(groups[0]) > sum(groups[-1])
        assert 8 * sum(map(max, groups)) / sum(sum(groups, ())) - 1 < before / 3


def test_a_fault_in_preparation_names_its_records(preparers, monkeypatch):
    """Batches are prepared beside the training, where a bare traceback would not tell which picture broke a library."""
    def breaks(records, rngs=None, drop=0.0):
        raise MemoryError("a thousand layers")
    plan = schedule(preparers["emu3"], batch_size=4)
    monkeypatch.setattr(plan.preparer, "batch", breaks)
    with pytest.raises(MemoryError) as fault:
        next(plan.steps(0, 2))
    assert re.fullmatch("while preparing world picture [0-9]+, world picture [0-9]+", fault.value.__notes__[0])


def test_every_record_comes_once_per_epoch(preparers):
    """Each epoch is a permutation, and another one each time."""
    plan = schedule(preparers["emu3"], n=7)
    for task in ("gen", "und"):
        epochs = [[plan.record(task, i)[0].origin for i in range(first, first + 7)] for first in (0, 7, 14)]
        assert all(len(set(epoch)) == 7 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_shuffling_is_a_permutation_for_every_key(n):
    """Each place alone is enough to know what stands there, in whatever order one asks."""
    orders = [[data.shuffled(i, n, (seed, epoch)) for i in range(n)] for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] == [data.shuffled(i, n, (0, 0)) for i in reversed(range(n))][::-1]
    assert n < 7 or len({*map(tuple, orders)}) == 4


def test_shuffling_prefers_no_place():
    """Over many keys each of 20 things comes first about as often, and second after a given first one, too."""
    firsts = [tuple(data.shuffled(i, 20, key) for i in (0, 1)) for key in range(4000)]
    first, second = np.bincount([a for a, _ in firsts]), np.bincount([(b - a) % 20 for a, b in firsts])
    assert len(first) == 20 and abs(first - 200).max() < 70                     # five standard deviations
    assert second[0] == 0 and abs(second[1:] - 4000 / 19).max() < 70


class Numbered:
    """A source of n records of both tasks, each named by its number."""

    def __init__(self, name, n):
        self.name, self.n, self.bad, self.paths = name, n, [], []

    def count(self, task):
        return self.n

    def record(self, task, index, rng=None):
        return Record(f"{self.name}{index}", task, (("?", "!"),), ()) if index < self.n else None


def places(source, p, positions, task="und"):
    plan = data.Schedule(source, p, 0, 4, (1, 1), 4)
    return [plan.record(task, position)[0].origin for position in positions]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_record_comes_once_per_epoch_over_any_number_of_ranks(ranks, preparers):
    """A record follows from its position alone, so processes that share positions share records."""
    source = Mixture([Numbered("a", 5), Numbered("b", 11)])
    for epoch in (0, 1):
        met = [place for rank in range(ranks)
               for place in places(source, preparers["emu3"], range(16 * epoch + rank, 16 * epoch + 16, ranks))]
        assert len(met) == 16 and {*met} == {*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(11))}


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 4), (0.5, 0.25, 7, 1)])
def test_weights_hold_over_any_window_and_each_source_keeps_its_epochs(weights, preparers):
    """Shares come from running totals; a small source with a large weight just goes through more epochs."""
    names, total = "abcd"[:len(weights)], sum(weights)
    texts = [f"{weight}" for weight in weights]
    source = Mixture([Numbered(name, 3 + 2 * i) for i, name in enumerate(names)], [*map(Fraction, texts)])
    met = places(source, preparers["emu3"], range(120))
    for i, name in enumerate(names):
        served = np.cumsum([0, *(place[0] == name for place in met)])
        for window in range(1, 121):
            off = served[window:] - served[:-window] - window * weights[i] / total
            assert abs(off).max() < len(weights)
        mine, n = [place for place in met if place[0] == name], 3 + 2 * i
        epochs = [mine[first:first + n] for first in range(0, len(mine) - n + 1, n)]
        assert all(len({*epoch}) == n for epoch in epochs)
        assert len(epochs) < 4 or len({*map(tuple, epochs)}) > 1
    assert places(source, preparers["emu3"], [77, 5]) == [met[77], met[5]]


def test_a_source_without_a_task_leaves_its_share_to_the_others(album, preparers):
    """Weights count among the sources that have the task at all."""
    source = Mixture([FileSource(album(DRAWN), "emu3"), Numbered("b", 3)], [5, 1])
    assert {*places(source, preparers["emu3"], range(6))} == {"b0", "b1", "b2"}
    assert sum(place[0] == "b" for place in places(source, preparers["emu3"], range(60), "gen")) == 10


def test_a_missing_task_is_named_with_its_ratio(album, preparers):
    """Data of one task alone are usable with a ratio that asks for no other."""
    source = FileSource(album(DRAWN), "emu3")
    with pytest.raises(InputError, match="no record for task 'und'.*--ratio 1:0"):
        data.Schedule(source, preparers["emu3"], 0, 4, (1, 1), 4)
    assert {b.task for b in data.Schedule(source, preparers["emu3"], 0, 4, (1, 0), 4).step(0)} == {"gen"}


@pytest.mark.parametrize("text", ["0:0", "1", "1:2:3", "-1:2", "a:b", "1.5:1", ""])
def test_a_ratio_that_is_none_is_refused(text):
    """Two whole numbers, not both zero."""
    with pytest.raises(InputError, match="--ratio .*GEN:UND"):
        train.parse_ratio(text)


def test_a_turned_photo_is_read_as_a_viewer_shows_it(tmp_path):
    """Cameras store the pixels lying on their side and note the turn; ignoring it would teach lying cats."""
    upright = Image.new("RGB", (20, 30), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the top of the scene is on the right of the file
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert load_picture(tmp_path / "turned.png", "emu3").size == (20, 30)


def test_emu3_refuses_a_side_below_one_code():
    """Its own resize refuses sides under 8 pixels; Janus-Pro takes them."""
    with pytest.raises(InputError, match="20 x 7.*below 8 pixels"):
        check_size(20, 7, "emu3")
    check_size(20, 7, "janus")


def test_a_flag_given_twice_adds():
    """--data A --data B is both of them, in place of the default, as is --data A B."""
    @dataclass(frozen=True)
    class Settings:
        """Some."""
        seeds: tuple = opt(("0", "1"), "seeds")
    assert parse(Settings, []).seeds == ("0", "1")
    for words in (["--seeds", "2", "3"], ["--seeds", "2", "--seeds", "3"]):
        assert parse(Settings, words).seeds == ("2", "3")
