"""Claims about judging: scores, curves, and the commands that draw and answer (eval.py)."""

import inspect
import itertools
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import both_models
from made_data import all_held_out, answer_of, combination_of
from made_folders import BLUE, RED, command, opened
from made_runs import refused
from PIL import Image

import aia
import data
import eval as evaluation
import formats.records
import formats.weights
import model
import parts.terminal
import train
from formats.checkpoints import save_checkpoint, tensors_of
from parts import decoding
from parts.pictures import Drawn, to_picture, to_tensor
from parts.settings import InputError, write_json
from parts.stories import MEND, PLAN, RIGHT, edits, scene_of
from parts.world import (
    CELL_SIDE,
    CELLS,
    GRID,
    TOPICS,
    Thing,
    World,
    combinations,
    describe,
    draw_scenes,
    make_question,
    read_scenes,
)


def result_of(capsys):
    """What a command printed before its last line, and the object in that line."""
    before, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return before, json.loads(last.removeprefix("result "))


def watched(monkeypatch, owner, name):
    """The arguments, by name, of each call of a method from now on."""
    inner, seen = getattr(owner, name), []

    def call(*args, **more):
        bound = inspect.signature(inner).bind(*args, **more)
        bound.apply_defaults()
        seen.append(SimpleNamespace(**bound.arguments))
        return inner(*args, **more)
    monkeypatch.setattr(owner, name, call)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
def saying(monkeypatch, world, change):
    """From now on questions are answered by change(right answer, question)."""
    def say(m, text, asked, **_):
        scenes, _ = read_scenes(np.stack([picture for picture, _ in asked]), world)
        return [change(answer_of(words, scene), words) for (_, words), scene in zip(asked, scenes, strict=True)]
    monkeypatch.setattr(evaluation, "answer", say)


@pytest.mark.parametrize("size", [(4, 4, 2), (8, 8, 4)])
def test_right_answers_score_one(size, monkeypatch):
    """Someone who reads the pictures and answers by the words of the question is right in every measure."""
    world = World(0, *size)
    saying(monkeypatch, world, lambda right, words: right)
    scores, _ = evaluation.score_understanding(None, None, world, 8)
    assert 0.45 <= scores.pop("und_chance") < 0.6   # half of the yes/no questions, one letter or another of the choices
    assert scores.pop("und_by_topic") == dict.fromkeys(TOPICS, 1.0) and set(scores.values()) == {1.0}


def test_always_yes_scores_chance(monkeypatch):
    """Half of the yes/no questions are true: accuracy 1/2, F1 2/3, and no pair of a true and a false one right."""
    monkeypatch.setattr(evaluation, "answer", lambda m, text, asked, **_: ["yes"] * len(asked))
    scores, _ = evaluation.score_understanding(None, None, World(0), 8)
    assert scores["und_by_topic"] == dict.fromkeys(TOPICS, 0.5) | {"choice": 0.0} and scores["und"] == 0.4
    assert (scores["f1"], scores["acc_plus"], scores["circular"]) == (pytest.approx(2 / 3), 0.0, 0.0)
    assert scores["und"] == pytest.approx(np.mean(list(scores["und_by_topic"].values())))


def test_always_the_same_letter_is_right_once_in_four_turns(monkeypatch):
    """All four rotations of a question must be answered rightly, which guessing a letter never does."""
    monkeypatch.setattr(evaluation, "answer", lambda m, text, asked, **_: ["A"] * len(asked))
    scores, _ = evaluation.score_understanding(None, None, World(0), 40)
    assert 0 < scores["und_by_topic"]["choice"] < 1 and scores["circular"] == 0
    assert scores["und_chance"] >= (4 * 0.5 + scores["und_by_topic"]["choice"]) / 5             # or better by another


@pytest.mark.parametrize("wrong", range(4))
def test_one_wrong_turn_of_a_choice_is_enough(wrong, monkeypatch):
    """Right under all four rotations, the first asking among them, which alone is the plain accuracy."""
    world, number = World(0), itertools.count()
    saying(monkeypatch, world, lambda right, words: "none" if words.startswith("which") and next(number) % 4 == wrong
           else right)
    scores, _ = evaluation.score_understanding(None, None, world, 8)
    assert scores["circular"] == 0 and scores["und_by_topic"] == dict.fromkeys(TOPICS, 1.0) | {
        "choice": float(wrong > 0)}


@pytest.mark.parametrize("change", [lambda right: f"{right} or not", lambda right: f"not {right}", str.upper,
                                    lambda right: right[:-1]], ids=["longer", "behind", "loud", "shorter"])
def test_an_answer_counts_as_a_whole(change, monkeypatch):
    """The model was taught just these words: who says more, or less, hedges or has not learned them."""
    world = World(0)
    saying(monkeypatch, world, lambda right, words: "" if right in "ABCD" else change(right))
    scores, _ = evaluation.score_understanding(None, None, world, 8)
    assert scores.pop("und_chance") > 0 == scores["und"]
    assert scores.pop("und_by_topic") == dict.fromkeys(TOPICS, 0.0) and set(scores.values()) == {0.0}


def test_scores_take_what_is_likeliest(runs, monkeypatch):
    """Drawn by chance, two scores of one model would differ. Pictures are guided as the model's preset says."""
    said, drawn = (watched(monkeypatch, model.Unified, name) for name in ("generate_text", "generate_images"))
    evaluation.score_both(*opened(runs["tiny-emu3"]), World(0), 1)
    assert {(one.temperature, one.max_new_tokens) for one in said} == {(0.0, 8)}
    assert {(one.temperature, one.guidance) for one in drawn} == {(0, None)}


def test_the_seed_decides_what_is_scored_and_measured(runs, tmp_path, monkeypatch):
    """Questions, prompts, reconstructions and samples of curves: all random numbers of both commands follow from it."""
    keys, drawn, inner = [], [], evaluation.stream
    monkeypatch.setattr(evaluation, "stream", lambda *key: keys.append(key) or inner(*key))
    monkeypatch.setattr(evaluation, "answer", lambda m, text, asked, **_: ["yes"] * len(asked))
    monkeypatch.setattr(evaluation, "draw", lambda m, text, prompts, **_: drawn.extend(prompts) or torch.zeros(
        len(prompts), 3, 16, 16))
    monkeypatch.setattr(evaluation, "plot_curves", lambda result, file: None)
    command("score", "--checkpoint", runs["tiny-emu3"], "--n", 2, "--seed", 3, "--out", tmp_path / "s.json")
    command("curves", "--checkpoint", runs["tiny-emu3"], "--n", 1, "--seed", 3, "--out", tmp_path / "a.png")
    assert {*keys} == {(3, "questions"), (3, "prompts"), (3, "reconstructions"), (3, "curves", 0), (3, "curves", 1)}
    assert len(drawn) == 2 * 6
    assert {"und", "gen", "f1", "acc_plus", "circular", "open", "psnr", "reader"} <= json.loads(
        (tmp_path / "s.json").read_text()).keys()


@pytest.mark.parametrize("objects", [2, 3, 4])
def test_whether_something_is_there_does_not_follow_from_the_kind_of_scene(objects, monkeypatch):
    """Else "yes, there are three things" would score without a look at the shapes."""
    asked = []
    monkeypatch.setattr(evaluation, "answer", lambda m, text, questions, **_: [
        asked.append((read_scenes(picture[None], world)[0][0], words)) or "yes" for picture, words in questions])
    world = World(0, 8, 8, objects)
    evaluation.score_understanding(None, None, world, 40)
    met = {(len(scene), answer_of(words, scene)) for scene, words in asked if re.fullmatch(r"is there a \w+\?", words)}
    assert met == {(n, said) for n in range(1, objects + 1) for said in ("yes", "no")}


@pytest.mark.parametrize("size", [(), (5, 5, 3)])
@pytest.mark.parametrize("drawn, expected", [("right scene", 1.0), ("another shape", 0.0), ("noise in a cell", 0.0)])
def test_drawings_are_scored_by_what_they_show(drawn, expected, size, monkeypatch):
    """The picture of each prompt must show its combination and nothing else, readable in every cell."""
    scenes, choose, world = [], World.held_out_scene, World(0, *size)
    monkeypatch.setattr(World, "held_out_scene", lambda *key: scenes.append(choose(*key)) or scenes[-1])

    def paint(m, text, prompts, temperature):
        assert len(prompts) == len(scenes) and temperature == 0
        shown = [scene for scene, _ in scenes]
        if drawn == "another shape":
            following = dict(zip(world.shapes, (*world.shapes[1:], world.shapes[0]), strict=True))
            shown = [(replace(one, shape=following[one.shape]), *rest) for one, *rest in shown]
        pictures = draw_scenes(shown)
        for picture, scene in zip(pictures, shown, strict=True) if drawn == "noise in a cell" else ():
            free = next(cell for cell in range(CELLS) if cell not in {t.cell for t in scene})
            row, column = (CELL_SIDE * x for x in divmod(free, GRID))
            noise = np.random.default_rng(0).integers(256, size=(CELL_SIDE, CELL_SIDE, 3))
            picture[row:row + CELL_SIDE, column:column + CELL_SIDE] = noise
        return torch.stack([to_tensor(picture) for picture in pictures])
    monkeypatch.setattr(evaluation, "draw", paint)
    scores, samples = evaluation.score_generation(None, None, world, 5)
    chance = scores.pop("gen_chance")
    others = np.random.default_rng(0).permutation(len(scenes))
    shown = [scenes[other][1] in combinations(scene) for other, (scene, _) in zip(others, scenes, strict=True)]
    assert drawn != "right scene" or (chance == pytest.approx(np.mean(shown)) and chance < 0.2)
    assert scores == {"gen": expected, "gen_by_skill": dict.fromkeys(world.skills, expected)}
    assert [len({prompt for prompt, *_ in some}) for some in samples] == [2] * len(world.skills)
    assert {right for some in samples for *_, right in some} == {bool(expected)}


def test_each_skill_has_a_score_of_its_own(monkeypatch):
    """Someone who draws groups of equal things only is right in counting and wrong everywhere else."""
    world = World(0)

    def paint(m, text, prompts, temperature):
        scenes = []
        for skill, *words in map(combination_of, prompts):
            number, colour, shape = words if skill == "counting" else (0, None, None)
            scenes.append([Thing(shape, colour, cell) for cell in range(number)])
        return torch.stack([to_tensor(picture) for picture in draw_scenes(scenes)])
    monkeypatch.setattr(evaluation, "draw", paint)
    scores, samples = evaluation.score_generation(None, None, world, 3)
    assert scores["gen_by_skill"] == dict.fromkeys(world.skills, 0.0) | {"counting": 1.0}
    assert scores["gen"] == pytest.approx(1 / len(world.skills))
    for some in samples:
        assert all(right == (combination_of(prompt)[0] == "counting") for prompt, _, _, right in some)


def test_what_is_scored_or_measured_was_never_shown(monkeypatch):
    """A model that knows its training pictures by heart must gain nothing by that: not in answers, open ones among
    them, drawings, reconstructions or curves."""
    world, met = World(3, 5, 5, 3), {}

    class Keeper(torch.nn.Linear):
        encode_images = staticmethod(lambda pixels: met.update(rebuilt=[*map(to_picture, pixels)]) or pixels)
        decode_images = staticmethod(lambda pixels: pixels)
    monkeypatch.setattr(evaluation, "answer", lambda m, text, asked, **_: met.update(
        shown=[picture for picture, _ in asked]) or ["yes"] * len(asked))
    monkeypatch.setattr(evaluation, "draw", lambda m, text, prompts, **_: met.update(
        prompts=prompts) or torch.zeros(len(prompts), 3, world.side, world.side))
    evaluation.score_understanding(None, None, world, 6)
    evaluation.score_generation(None, None, world, 3)
    evaluation.score_tokenizer(Keeper(1, 1), world, 21)
    records = {task: next(evaluation.HeldOut(world, 0).batches(SimpleNamespace(batch=list), task, 21))
               for task in aia.TASKS}
    measured = {task: [record.pictures[0] for record in some] for task, some in records.items()}
    for pictures in (met["shown"], met["rebuilt"], *measured.values()):
        assert len(pictures) >= 21 and all_held_out(pictures, world)
    for prompts in (met["prompts"], [record.turns[0][0] for record in records["gen"]]):
        asked = [combination_of(prompt) for prompt in prompts]
        assert {*asked} <= world.held_out and {combination[0] for combination in asked} == {*world.skills}
    scenes, _ = read_scenes(np.stack(measured["gen"]), world)
    assert all(combination in combinations(scene) for combination, scene in zip(asked, scenes, strict=True))


@pytest.mark.parametrize("offset, psnr, reader", [(0, 90, 1.0), (10, 20 * np.log10(25.5), 1.0)])
def test_the_tokenizer_score_is_that_of_its_pictures(offset, psnr, reader):
    """A tokenizer that darkens by 10 of 255 has 28 dB and is still read; PSNR = 20 log10(255 / error)."""
    class Darker(torch.nn.Linear):
        encode_images = staticmethod(lambda pixels: pixels)
        decode_images = staticmethod(lambda pixels: pixels - 2 * offset / 255 + 1e-4)
    scores = evaluation.score_tokenizer(Darker(1, 1), World(0), 6)
    assert scores["reader"] == reader and scores["psnr"] >= psnr - 0.1 and (offset == 0 or scores["psnr"] < psnr + 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------
@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_the_uniform_share_is_the_intensity_of_even_attention(name, task, runs):
    """Without queries and keys all scores are 0, and every visible key gets the same weight, in every layer."""
    m, text = opened(runs[name])
    for layer in m.lm.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    batch, = evaluation.HeldOut(World(0), 0).batches(data.Preparer(m, text), task, 5)
    with torch.inference_mode():
        found = m(batch).intensity
    even = evaluation.uniform_share(batch.condition, batch.queries)[:, None].expand(-1, 2)
    torch.testing.assert_close(found, even, rtol=0, atol=1e-6)


@both_models
def test_curves_are_stored_for_every_layer(name, runs, tmp_path, capsys):
    """Picture and JSON stand beside each other: intensity and spread of each layer, target, delta and share of keys."""
    command("curves", "--checkpoint", runs[name], "--n", 3, "--out", tmp_path / "curves.png")
    _, result = result_of(capsys)
    stored, (m, text) = json.loads((tmp_path / "curves.json").read_text()), opened(runs[name])
    assert Image.open(tmp_path / "curves.png").size[0] > 500 and stored["run"] == f"{name}, seed 0"
    for task in aia.TASKS:
        target, delta = aia.targets(2, task)
        rows = stored[task]
        assert rows["target"] == target.tolist() and rows["delta"] == delta.tolist()
        batch, = evaluation.HeldOut(World(0), 0).batches(data.Preparer(m, text), task, 3)
        with torch.inference_mode():
            out = m(batch)
        assert rows["after"]["intensity"] == pytest.approx(out.intensity.mean(0).tolist(), abs=1e-6)
        assert rows["after"]["std"] == pytest.approx(out.intensity.std(0, correction=0).tolist(), abs=1e-6)
        assert rows["after"]["ntp"] == pytest.approx(out.ntp.item() / out.tokens)
        assert rows["after"]["aia"] == result[f"aia_{task}"]["after"] == pytest.approx(
            aia.loss(out.intensity, target, delta, batch.aia_valid).item(), abs=1e-6)


def test_curves_without_huber_are_json_for_every_reader(runs, tmp_path):
    """Its delta is infinite, which JSON has no number for: other programs refuse a file that says Infinity. Targets are
    those that the run asked for."""
    shutil.copy(runs["tiny-emu3"] / "tokenizer.json", tmp_path)
    shutil.copytree(runs["tiny-emu3"] / "checkpoints", tmp_path / "checkpoints")
    write_json(asdict(train.TrainConfig(aia_variant="no-huber", aia_targets="flux")), tmp_path / "settings.json")
    command("curves", "--checkpoint", tmp_path, "--n", 1)
    stored = json.loads((tmp_path / "curves.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert stored["gen"]["target"] == aia.targets(2, "gen", "flux")[0].tolist() != aia.targets(2, "gen")[0].tolist()
    assert stored["gen"]["delta"] == [None] * 2


@pytest.mark.parametrize("task", aia.TASKS)
def test_the_curve_without_the_first_token_leaves_only_it_out(task, runs):
    """Attention on a set of keys is a sum, so the gap is the attention on the first token, which is text."""
    m, text = opened(runs["tiny-emu3"])
    preparer, samples = data.Preparer(m, text), evaluation.HeldOut(World(0), 0)
    batch, = samples.batches(preparer, task, 3)
    rows = evaluation.measure(m, [batch], task, *aia.targets(2, task))
    first = torch.zeros_like(batch.condition)
    first[:, 0] = task == "gen"
    with torch.inference_mode():
        gap = m(batch.measuring(first)).intensity.mean(0)
    assert (gap > 1e-3).all() or task == "und"
    torch.testing.assert_close(torch.tensor(rows["intensity"]) - torch.tensor(rows["without_first_token"]), gap)


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_samples_that_aia_cannot_use_are_in_no_curve(name, task, runs):
    """A dropped prompt would pull every mean towards the attention on nothing. The others count alike, whatever batch
    they are in; only the next-token loss is of all tokens."""
    m, text = opened(runs[name])
    preparer, targets = data.Preparer(m, text), aia.targets(2, task)
    records, = evaluation.HeldOut(World(0), 0).batches(SimpleNamespace(batch=list), task, 4)
    mixed, last, alone = (preparer.batch([records[i] for i in chosen]) for chosen in ((0, 1, 2), (3,), (0, 2, 3)))
    mixed = replace(mixed, aia_valid=torch.tensor([True, False, True]))
    found, expected = (evaluation.measure(m, batches, task, *targets) for batches in ([mixed, last], [alone]))
    with torch.inference_mode():
        whole = [m(batch) for batch in (mixed, last)]
    assert found.pop("ntp") == pytest.approx(sum(out.ntp.item() for out in whole) / sum(out.tokens for out in whole))
    expected.pop("ntp")
    assert found.keys() == expected.keys() and found["samples"] == 3
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-4), key
    invalid = replace(last, aia_valid=torch.tensor([False]))
    assert evaluation.measure(m, [invalid], task, *targets) is None


def test_the_first_samples_of_a_data_set_are_measured_once_each():
    """As many as are asked for, or there are, in order, and none with a dropped prompt."""
    source = SimpleNamespace(count=lambda task: 5, record=lambda task, i: i)
    preparer = SimpleNamespace(batch=lambda records, rngs, drop: (records, drop))
    for n, expected in ((3, [[0, 1], [2]]), (9, [[0, 1], [2, 3], [4]])):
        found = [*evaluation.FileBatches(source).batches(preparer, "gen", n, batch=2)]
        assert found == [(records, 0.0) for records in expected]


@pytest.mark.parametrize("manifest, label", [
    ({"lambdas": {"gen": 0.0, "und": 0.0}}, "at the end, without AIA"), ({"lambdas": {}}, "at the end, without AIA"),
    ({"lambdas": {"gen": 0.0, "und": 2.0}}, "with AIA"), ({"weights": {"gen": 5.0, "und": 0.0}}, "with AIA")])
def test_final_weights_are_called_by_how_they_were_trained(manifest, label, tmp_path):
    """Measured with lambda 0, or without a lambda, they had no AIA; the newest checkpoint tells, and older ones call
    lambdas weights."""
    assert evaluation.final_label(tmp_path) == "with AIA"                       # results alone, as they are copied
    for name, content in (("2-0000005", {"lambdas": {"gen": float(label != "with AIA")}}), ("3-0000001", manifest)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        write_json(content, tmp_path / "checkpoints" / name / "manifest.json")
    assert evaluation.final_label(tmp_path) == label


@both_models
def test_a_spoken_answer_ends_with_its_end(name, runs, monkeypatch):
    """EOS is predicted like any word, so it has a label; what stands behind it was never said."""
    m, text = opened(runs[name])
    eos = m.ids["eos"]
    said = torch.tensor([[7, 8, eos, m.ids["pad"]], [7, 8, 9, 10]])
    monkeypatch.setattr(m, "generate_text", lambda *key: said)
    batch, = evaluation.HeldOut(World(0), 0).batches(evaluation.FreeDecoding(m, text), "und", 2)
    assert [row[row != -100].tolist() for row in batch.labels] == [[7, 8, eos], [7, 8, 9, 10]]
    assert batch.queries.sum(1).tolist() == [2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
@both_models
def test_a_drawing_is_repeated_by_its_seed(name, runs, tmp_path, capsys):
    """Codes are drawn from the seed alone: same seed same file, another seed another; the size is as stated."""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for seed, file in zip((1, 1, 2), files, strict=True):
        command("generate", "--checkpoint", runs[name], "--prompt", "a red cross", "--seed", seed, "--out", file,
                "--scale", 3)
        _, result = result_of(capsys)
        assert Image.open(file).size == (result["width"], result["height"]) == (3 * model.PRESETS[name].image_size,) * 2
    first, same, other = (file.read_bytes() for file in files)
    assert first == same != other


@pytest.mark.parametrize("flags, away, how", [
    ((), "blurry", {}), (("--negative", "ugly", "--guidance", 2.5), "ugly", {"guidance": 2.5}),
    (("--guidance", 1, "--temperature", 0.5, "--seed", 4), None, {"guidance": 1, "temperature": 0.5, "seed": 4})])
def test_what_emu3_is_given_to_draw(flags, away, how, runs, tmp_path, monkeypatch):
    """What public weights were trained and drawn with: the suffix behind every prompt, the model's own negative prompt
    without it, and in both as text the sides of the grid, height first, that is drawn. Flags reach the model."""
    m, text = opened(runs["tiny-emu3"])
    m.config = replace(m.config, suffix=" best quality.", negative="blurry")
    monkeypatch.setattr(evaluation, "load_run", lambda config: (m, text, None))
    seen = watched(monkeypatch, model.Unified, "generate_images")
    command("generate", "--prompt", "a red cross", "--aspect", "5:2", "--out", tmp_path / "a.png", *flags)
    one, = seen

    def prompt(words):
        ids = text.ids
        return [[ids["bos"], *text.encode(words), ids["boi"], *text.encode("3*6"), ids["img"]]]
    assert one.size == (3, 6) and one.ids.tolist() == prompt("a red cross best quality.") and one.mask.all()
    assert one.negative is None if away is None else one.negative.tolist() == prompt(away)
    found = {"guidance": one.guidance, "temperature": one.temperature, "seed": one.generator.initial_seed()}
    assert found == {"guidance": None, "temperature": 1.0, "seed": 0} | how and one.top_k is None


@pytest.mark.parametrize("roles", ["tags", "plain"])
def test_what_janus_is_given_to_draw(roles, runs, monkeypatch):
    """A conversation of one turn, up to begin-of-image, with role tags or the words for them; nothing to be guided
    away from."""
    m, text = opened(runs["tiny-janus"])
    seen = watched(monkeypatch, model.Unified, "generate_images")
    evaluation.draw_codes(m, text, ["a red cross "], roles=roles)
    one, = seen
    user, assistant = ([text.ids["user"]], [text.ids["assistant"]]) if roles == "tags" else map(
        text.encode, ("User", "Assistant"))
    said = [text.ids["bos"], *user, *text.encode(": a red cross\n\n"), *assistant, *text.encode(":"), text.ids["boi"]]
    assert one.ids.tolist() == [said] and (one.size, one.negative, one.guidance) == ((4, 4), None, None)


def test_the_next_batch_of_prompts_is_drawn_from_other_random_numbers(runs):
    """Were the seed taken anew for each, one prompt would give the same picture in all of them."""
    one, two = evaluation.draw(*opened(runs["tiny-emu3"]), ["a red cross"] * 2, 7, batch=1)
    assert not torch.equal(one, two)


def test_free_decoding_measures_what_was_drawn_from(runs, monkeypatch):
    """The suffix is a part of the prompt, so attention on it counts as well."""
    m, text = opened(runs["tiny-emu3"])
    m.config = replace(m.config, suffix=" best quality.")
    seen = watched(monkeypatch, model.Unified, "generate_images")
    batch, = evaluation.HeldOut(World(0), 0).batches(evaluation.FreeDecoding(m, text, seed=3), "gen", 4)
    one, = seen
    assert one.generator.initial_seed() == 3 and len({*one.mask.sum(1).tolist()}) > 1
    for tokens, ids, kept in zip(batch.tokens, one.ids, one.mask, strict=True):
        assert torch.equal(tokens[:kept.sum()], ids[kept])


@both_models
def test_each_of_several_pictures_can_be_drawn_again_alone(name, runs, tmp_path, capsys):
    """Two prompts from a file, two seeds: a sheet with a row for each prompt, and four files, each equal to that of the
    command with its prompt and seed."""
    file = tmp_path / "prompts.txt"
    file.write_text("a red cross\n\nzwei: é\n", encoding="utf-8")
    folder = ("--checkpoint", runs[name])
    command("generate", *folder, "--prompts", file, "--n", 2, "--seed", 5, "--out", tmp_path / "a.png", "--scale", 1)
    sheet = Image.open(tmp_path / "a.png")
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "a.png", "a-1-5.png", "a-1-6.png", "a-2-5.png", "a-2-6.png"}
    side = sheet.width // 2
    for row, prompt in enumerate(("a red cross", "zwei: é")):
        for column in range(2):
            part = tmp_path / f"a-{row + 1}-{5 + column}.png"
            command("generate", *folder, "--prompt", prompt, "--seed", 5 + column, "--out", tmp_path / "one.png",
                    "--scale", 1)
            assert part.read_bytes() == (tmp_path / "one.png").read_bytes()
            box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            assert sheet.crop(box).tobytes() == Image.open(part).tobytes()
    capsys.readouterr()
    for words in (["generate", "--n", 0], ["generate", "--seed", -1], ["score", "--n", 0], ["curves", "--n", 0],
                  ["curves", "--seed", -1], ["score", "--seed", -1]):
        assert f"error: {words[1]} {words[2]}: give at least" in refused(capsys, words[0], *folder, *words[1:],
                                                                         main=evaluation.main)
    for words in (["generate", "--out", tmp_path / "no/a.png"], ["curves", "--out", tmp_path / "no/a.png"],
                  ["score", "--out", tmp_path], ["curves", "--out", tmp_path / "a.txt"]):
        assert "cannot be written: give a file" in refused(capsys, words[0], *folder, *words[1:], main=evaluation.main)


def test_prompts_that_cannot_be_drawn_are_refused_in_one_line(runs, tmp_path, capsys):
    """A file without a prompt has nothing to draw, --prompt beside a file would be ignored, and an enormous --scale
    would end in want of memory; nothing is written."""
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("a red cross\n")
    folder = ("--checkpoint", runs["tiny-emu3"], "--out", tmp_path / "a.png")
    for words in (["--prompts", tmp_path / "none.txt"], ["--prompts", tmp_path / "one.txt", "--prompt", "x"]):
        message = refused(capsys, "generate", *folder, *words, main=evaluation.main)
        assert "give a file with a prompt in each line, and no --prompt" in message
    assert "--scale 10000 makes" in refused(capsys, "generate", *folder, "--scale", 10000, main=evaluation.main)
    assert not [*tmp_path.glob("*.png")]


@pytest.mark.parametrize("flags", [{}, {"dtype": "bfloat16", "rope_bf16": True, "allow_special": True}])
def test_flags_of_loading_reach_model_and_tokenizer(flags, runs):
    """As stored and safe by default: exact frequencies, and strings that look like control tokens are text."""
    m, text, run = evaluation.load_run(evaluation.Loaded(str(runs["tiny-emu3"]), device="cpu", **flags))
    assert m.lm_head.weight.dtype == (torch.bfloat16 if flags else torch.float32) and run["preset"] == "tiny-emu3"
    assert m.config.rope_bf16 == m.lm.config.rope_bf16 == bool(flags)
    assert ([*text.encode("<|image start|>")] == [text.ids["boi"]]) == bool(flags)


@both_models
def test_chat_prints_the_models_answer(name, runs, capsys):
    """What is printed is the greedy answer, alone on the lines before the result."""
    picture, question = runs[name] / "red.png", "is there a red circle?"
    command("chat", "--checkpoint", runs[name], "--image", picture, "--question", question, "--max-new-tokens", 5)
    printed, result = result_of(capsys)
    expected, = evaluation.answer(*opened(runs[name]), [(picture, question)], max_new_tokens=5)
    assert printed == result["answer"] == expected != ""


@pytest.mark.parametrize("flags, how", [
    ((), (512, 0.0, 1.0, 0)),
    (("--temperature", 0.7, "--top-p", 0.4, "--seed", 5, "--max-new-tokens", 3), (3, 0.7, 0.4, 5))])
def test_flags_of_a_chat_reach_the_model(flags, how, runs, monkeypatch):
    """How words are drawn: greedily, unless a flag asks for more."""
    seen = watched(monkeypatch, model.Unified, "generate")
    command("chat", "--checkpoint", runs["tiny-emu3"], "--question", "what?", *flags)
    one, = seen
    assert (one.max_new_tokens, one.temperature, one.top_p, one.generator.initial_seed()) == how


def talk(monkeypatch, *lines):
    """Type these lines into the next conversation, then end it."""
    typed = iter(lines)

    def type_in(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line
    monkeypatch.setattr("builtins.input", type_in)


@both_models
def test_chat_without_a_question_is_a_conversation(name, runs, capsys, monkeypatch):
    """Each answer is that of all turns and pictures shown so far; a mistake costs one line, not the talk."""
    picture, seen = str(runs[name] / "red.png"), []
    m, text = opened(runs[name])
    inner = evaluation.conversation
    monkeypatch.setattr(evaluation, "conversation", lambda *key: seen.append(key) or inner(*key))
    talk(monkeypatch, "hello", f"/image {picture}", "is it <image>?", "/image none.png", "<image>?", "/new", "", "and?",
         "/help")
    command("chat", "--checkpoint", runs[name], "--max-new-tokens", 4)
    printed, result = result_of(capsys)
    assert result == {"turns": 3} and printed.count("error: ") == 2 and printed.count(parts.terminal.HELP) == 2
    assert "picture none.png is missing" in printed and "1 <image> marks for 0 new pictures" in printed
    said = []
    for turns, pictures in ([("hello", None)], []), ([("is it <image>?", None)], [picture]), ([("and?", None)], []):
        turns = [*said, *turns] if turns[0][0] != "and?" else turns
        assert seen.pop(0) == (turns, pictures)
        ids, mask, fields = evaluation.ask(data.Preparer(m, text, training=False), [inner(turns, pictures)])[1:]
        answer = text.decode(m.generate_text(ids, fields.get("pixels"), mask, 4)[0]).strip()
        assert answer in printed
        said.append((turns[-1][0], answer))


@both_models
def test_what_is_longer_than_the_context_is_refused(name, runs, capsys, monkeypatch, tmp_path):
    """Positions that the model was never trained on give words and pictures without sense. In a conversation /new
    helps; an answer ends where the context does."""
    long = "a red circle " * 200
    for words in (["chat", "--question", long], ["generate", "--prompt", long, "--out", tmp_path / "a.png"]):
        line = refused(capsys, words[0], "--checkpoint", runs[name], *words[1:], main=evaluation.main)
        assert re.fullmatch(r"error: \d+ tokens and \d+ to come, but the model takes 256: shorten .*", line)
    assert not (tmp_path / "a.png").exists()
    talk(monkeypatch, long, "/new", "hello")
    command("chat", "--checkpoint", runs[name], "--max-new-tokens", 2)
    printed, result = result_of(capsys)
    assert result == {"turns": 1} and "begin anew (/new" in printed
    m, _ = opened(runs[name])
    m.lm_head.weight.data.zero_()                   # never the end of an answer
    ids = torch.ones(1, 250, dtype=torch.long)
    assert m.generate_text(ids, max_new_tokens=50).shape == (1, 6)


@both_models
def test_a_model_that_puts_out_nan_is_refused(name, runs, capsys, monkeypatch, tmp_path):
    """One broken weight makes every word the same: no answer, picture, score or curve is made of that."""
    load = formats.weights.load

    def broken(*key, **more):
        m = load(*key, **more)
        m.lm.norm.weight.data[3] = math.nan
        return m
    monkeypatch.setattr(formats.weights, "load", broken)
    monkeypatch.setattr(evaluation, "arms", lambda folder, m: [("after", m)])
    for words in (["chat", "--question", "what?"], ["generate", "--out", tmp_path / "a.png"], ["score", "--n", 1],
                  ["curves", "--n", 1, "--out", tmp_path / "a.png"]):
        line = refused(capsys, words[0], "--checkpoint", runs[name], *words[1:], main=evaluation.main)
        assert line.startswith("error: the model puts out NaN or infinity: try --dtype float32")
    assert not [*tmp_path.iterdir()]


@both_models
def test_several_pictures_may_be_asked_about(name, runs, capsys):
    """--image takes a list; the answer is that of both pictures in front of the question."""
    files = [runs[name] / "red.png", runs[name] / "red.png"]
    command("chat", "--checkpoint", runs[name], "--image", *files, "--question", "what?", "--max-new-tokens", 3)
    m, text = opened(runs[name])
    samples, ids, mask, fields = evaluation.ask(data.Preparer(m, text, training=False),
                                                [formats.records.conversation([("what?", None)], files)])
    assert sum(role == data.IMAGE for _, role in samples[0]) == 2 * (4 if name == "tiny-emu3" else 1)
    assert result_of(capsys)[1]["answer"] == text.decode(m.generate_text(ids, fields.get("pixels"), mask, 3)[0]).strip()


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_free_decoding_is_measured_on_the_models_own_tokens(name, task, runs):
    """The intensity of a pass over what was drawn or said is the mean of the cached steps that drew or said it."""
    m, text = opened(runs[name])
    m.requires_grad_(False)
    batch, = evaluation.HeldOut(World(0), 0).batches(evaluation.FreeDecoding(m, text, max_new_tokens=6), task, 2)
    x, found = m.embed(batch), m(batch).intensity                               # (B, T, C), (B, L)
    one = torch.ones(1, 1).bool()
    for b in range(2):
        cache, steps = decoding.Cache(m.lm, one, x.shape[1]), []
        for t in range(x.shape[1]):
            steps.append(m.lm(x[b:b + 1, t:t + 1], condition=batch.condition[b:b + 1, :t + 1], queries=one,
                              cache=cache)[1][0])
        torch.testing.assert_close(torch.stack(steps)[batch.queries[b]].mean(0), found[b])
    own = batch.labels[0][batch.labels[0] != -100]
    if task == "gen":
        codes = own - (m.ids["visual"] if name == "tiny-emu3" else 0)
        records, = evaluation.HeldOut(World(0), 0).batches(SimpleNamespace(batch=list), task, 2)
        prompts, generator = [record.turns[0][0] for record in records], evaluation.FreeDecoding(m, text).generator
        assert torch.equal(codes, evaluation.draw_codes(m, text, prompts, generator)[0].flatten())
    else:                                            # greedy: each is the likeliest after all before it
        at = (batch.labels[0] != -100).nonzero()[:, 0]
        assert torch.equal(m.lm_head(m.lm(x[:1])[0])[0, at - 1].argmax(-1), own)


@both_models
def test_public_weights_are_inspected_in_half_precision(name, runs, tmp_path, capsys):
    """A folder as transformers writes it, own samples, bfloat16: the curves of the run up to rounding."""
    m, text = opened(runs[name])
    formats.weights.save(m, tmp_path / "public")
    data.export(data.Export(folder=str(tmp_path / "data"), n=4))
    found = {}
    for folder, flags in (runs[name], []), (tmp_path / "public", ["--dtype", "bfloat16"]):
        command("curves", "--checkpoint", folder, "--data", tmp_path / "data/train.jsonl", "--out", tmp_path / "c.png",
                *flags)
        found[folder] = json.loads((tmp_path / "c.json").read_text())
    for task in aia.TASKS:
        exact, half = found[runs[name]][task]["after"], found[tmp_path / "public"][task]["public"]
        assert half["intensity"] == pytest.approx(exact["intensity"], abs=1e-2) and half["samples"] == exact["samples"]
    with pytest.raises(SystemExit):
        command("curves", "--checkpoint", tmp_path / "public")
    assert "need --data" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [(), ("before",), ("before", "control")])
def test_each_arm_is_measured_on_its_own_weights(kept, runs, tmp_path):
    """Before, without AIA, and after are three checkpoints of a run, read into one model in turn: a mistake there would
    compare weights with themselves, or under another's name."""
    folder = tmp_path / "run"
    shutil.copytree(runs["tiny-emu3"], folder)
    m, _ = opened(folder)
    marks = {"before": 2.0, "control": 3.0, "checkpoints/1-0000007": 5.0, "checkpoints/1-0000003": 7.0}
    for name, mark in marks.items():
        m.lm.norm.weight.data.fill_(mark)
        if name in kept or "/" in name:
            save_checkpoint(tensors_of(m), {"config": asdict(m.config), "dtype": "float32"}, folder / name).result()
    found = {name: one.lm.norm.weight.unique().tolist() for name, one in evaluation.arms(folder, m)}
    assert found == {name: [marks[name]] for name in kept} | {"after": [5.0]}


@both_models
def test_curves_of_free_decoding_are_another_measurement(name, runs, tmp_path, capsys):
    """--decode leaves out the stored answers: of the same samples, what the model itself says and draws is measured."""
    files = [tmp_path / "given.png", tmp_path / "free.png"]
    for file, flag in zip(files, ([], ["--decode"]), strict=True):
        command("curves", "--checkpoint", runs[name], "--n", 2, "--out", file, *flag)
    given, free = (json.loads(file.with_suffix(".json").read_text()) for file in files)
    m, text = opened(runs[name])
    for task in aia.TASKS:
        own = evaluation.HeldOut(World(0), 0).batches(evaluation.FreeDecoding(m, text), task, 2)
        expected = evaluation.measure(m, own, task, *aia.targets(2, task))
        assert {key: pytest.approx(free[task]["after"][key]) for key in expected} == expected
        assert given[task]["after"]["intensity"] != free[task]["after"]["intensity"]


@both_models
def test_a_batch_of_questions_is_answered_as_one_by_one(name, runs):
    """Prompts of different lengths are padded in front, which changes no answer."""
    m, text = opened(runs[name])
    pictures = draw_scenes([(RED,), (BLUE,)])
    asked = [(pictures[0], "what?"), (pictures[1], "is there a red circle at the top left of it?"), (pictures[1], "?")]
    assert evaluation.answer(m, text, asked) == [evaluation.answer(m, text, [one])[0] for one in asked]


@pytest.mark.parametrize("words, message", [
    (["paint"], "no command 'paint'.*score, generate"), (["score"], "needs --checkpoint"),
    (["score", "--checkpoint", "nowhere"], "nowhere does not exist"),
    (["generate", "--checkpoint", "RUN", "--out", "nowhere/red.png"], "nowhere/red.png"),
    (["generate", "--checkpoint", "RUN", "--out", "RUN/red.unknown"], "red.unknown"),
    (["curves", "--checkpoint", "RUN", "--device", "toaster"], "--device toaster.*cpu"),
    (["chat", "--checkpoint", "RUN", "--image", "none.png", "--question", "?"], "picture none.png is missing"),
    (["chat", "--checkpoint", "RUN", "--image", "RUN/settings.json", "--question", "?"], "settings.json cannot be"),
    (["curves", "--checkpoint", "RUN", "--data", "none.jsonl"], "data set none.jsonl cannot be read"),
    (["chat", "--checkpoint", "RUN", "--question", "?", "--out", "RUN/a.unknown"], "a.unknown cannot be written.*png"),
    (["chat", "--checkpoint", "RUN", "--question", "?", "--out", "RUN/no/a.png"], "no/a.png cannot be written"),
    (["generate", "--checkpoint", "RUN", "--prompt", "make it <image>"], "1 <image> marks in the .* for 0 pictures"),
    (["generate", "--checkpoint", "RUN", "--image", "RUN/red.png", "--negative", "dark"], "--negative acts on"),
    (["chat", "--bogus"], "unrecognized arguments: --bogus")])
def test_bad_input_is_refused_with_one_line(words, message, runs, capsys):
    """The line names cause and remedy, the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        command(*(word.replace("RUN", str(runs["tiny-emu3"])) for word in words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and (len(lines) == 1 or lines[0].startswith("usage:"))
    assert re.search(message, lines[-1])


@pytest.mark.parametrize("missing", ["checkpoint", "tokenizer.json", "settings.json"])
def test_an_incomplete_run_folder_is_named(missing, runs, tmp_path, capsys):
    """A checkpoint that was copied alone lacks its vocabulary, its world and its targets."""
    shutil.copytree(runs["tiny-emu3"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints") if missing == "checkpoint" else (tmp_path / "run" / missing).unlink()
    with pytest.raises(SystemExit) as stop:
        command("curves", "--checkpoint", tmp_path / "run")
    assert stop.value.code == 2 and missing in capsys.readouterr().err


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_the_sink_is_the_attention_on_the_first_token(name, task, runs):
    """It is the first column of the attention map, written out here, averaged as Eq. 1 averages."""
    m, text = opened(runs[name])
    batch, = evaluation.HeldOut(World(0), 0).batches(data.Preparer(m, text), task, 3)
    found, masses = evaluation.measure(m, [batch], task, *aia.targets(2, task))["sink"], []

    def look(q, k, v, visible=None, condition=None, rectangle=None):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        masses.append(scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -1e9).softmax(-1)[..., 0])
        return model.attend_explicit(q, k, v, visible, condition)
    for layer in m.lm.layers:
        layer.self_attn.attend = look
    with torch.inference_mode():
        m(batch)
    assert found == pytest.approx([aia.intensity(mass, batch.queries).mean().item() for mass in masses], rel=1e-4)


def test_pictures_of_another_size_are_not_scored_on_the_world(runs, monkeypatch):
    """They could not be read, which would show after all of them are drawn."""
    monkeypatch.setattr(evaluation, "world_of", lambda run: World(0, cell=16))
    monkeypatch.setattr(evaluation, "score_both", None)
    with pytest.raises(InputError, match="draws pictures of another size than those of the built-in world"):
        evaluation.score_world(evaluation.ScoreWorld(checkpoint=str(runs["tiny-emu3"])))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and text in turn
# ---------------------------------------------------------------------------------------------------------------------
class Oracle:
    """Does what it is asked in the drawn world, in place of evaluation.reply; `spoil` may change what it draws."""

    def __init__(self, monkeypatch, world, spoil=lambda number, scene: scene):
        self.world, self.spoil, self.goals, self.asked = world, spoil, {}, []
        inner = evaluation.prompt_text

        def remember(goal, rng):
            text = inner(goal, rng)
            self.goals[text] = goal
            return text
        monkeypatch.setattr(evaluation, "prompt_text", remember)
        monkeypatch.setattr(evaluation, "reply", self.reply)

    def scene_for(self, prompt):
        """A scene that shows what a prompt asks for: one of the world's own, or one that is described completely."""
        if prompt not in self.goals:
            return scene_of(prompt)
        rng = np.random.default_rng(0)
        while True:
            scene, goal = self.world.held_out_scene(self.goals[prompt][0], rng)
            if goal == self.goals[prompt]:
                return scene

    def draw(self, number, scene):
        return Drawn(torch.zeros(4, 4), draw_scenes([self.spoil(number, scene)])[0])

    def reply(self, m, text, records, **how):
        return [self.answer(record) for record in records]

    def answer(self, record):
        self.asked.append(record)
        asked, number = record.turns[-1][0].removeprefix("<image>"), len(record.turns) - 1
        shown = [one.pixels if isinstance(one, Drawn) else one for one in record.pictures]
        before = read_scenes(np.stack(shown), self.world)[0][-1] if shown else ()
        changed = {said: result for some in edits(self.world, before).values() for said, result in some.items()}
        if asked in changed:
            return [self.draw(number, changed[asked])]
        if shown:
            return [truth(self.world, before, asked) if before else "nothing to see"]
        kind = next((one for one in (PLAN, MEND) if asked.startswith(one)), "")
        scene = self.scene_for(asked.removeprefix(kind))
        if kind == PLAN:
            return [describe(scene), self.draw(number, scene)]
        return [self.draw(number, scene), *([describe(scene) + RIGHT] if kind else [])]


def truth(world, scene, asked):
    """The answer to a question about a scene: what it is when the world asks the same."""
    for seed in range(10_000):
        rng = np.random.default_rng(seed)
        question = make_question(world, scene, TOPICS[seed % len(TOPICS)], rng)
        if question.text == asked:
            return question.answer
    raise AssertionError(asked)


def test_who_does_all_that_is_asked_has_all_scores(monkeypatch):
    """Edits, plans, answers about own drawings, stories: each score is 1 for what is right, and chance is far below."""
    world = World(0)
    Oracle(monkeypatch, world)
    scores, stories = evaluation.score_mixed(None, None, world, 2)
    assert {scores[name] for name in evaluation.MIXED_SCORES} == {1.0} and scores["story"] == [1.0] * 4
    assert {*scores["edit_by_kind"].values(), *scores["plan_by_skill"].values()} == {1.0}
    assert max(scores["chance"][name] for name in ("edit", "plan", "plain", "right")) < 0.5
    assert len(stories) == 4 and [picture is None for _, picture, _, _ in stories[0]] == [False, False, False, True]
    assert stories[0][3][2] and not stories[0][0][2]                            # words at the end, none before


def test_an_edit_counts_for_what_is_seen_before_it(monkeypatch):
    """A wrong first picture costs its own score only; what is edited is what the reader sees there."""
    world = World(0)
    other = (Thing("circle", "red", 3),)
    oracle = Oracle(monkeypatch, world, lambda number, scene: other if number == 0 and scene != other else scene)
    scores, _ = evaluation.score_stories(None, None, world, 6, np.random.default_rng(0))
    assert scores == {"story": [0.0, 1.0, 1.0, 1.0], "third": 1.0}
    last = [record for record in oracle.asked if len(record.turns) == 4]
    assert len(last) == 6 and all(len(record.pictures) == 3 and record.task == "mixed" for record in last)


def test_what_follows_an_unclear_picture_is_wrong(monkeypatch):
    """An empty picture cannot be edited or asked about; the story goes on, and the next picture may be clear again."""
    world = World(0)
    Oracle(monkeypatch, world, lambda number, scene: () if number == 1 else scene)
    scores, _ = evaluation.score_stories(None, None, world, 6, np.random.default_rng(0))
    assert scores["story"][:3] == [1.0, 0.0, 0.0]


def test_an_edit_that_changes_more_than_it_should_has_not_stayed(monkeypatch):
    """Two numbers, since a picture may be wrong in what was asked, or in what was not."""
    world = World(0)
    Oracle(monkeypatch, world, lambda number, scene: scene[:1])
    scores = evaluation.score_edits(None, None, world, 6, np.random.default_rng(0))
    assert 0 < scores["edit"]["score"] < 1 and scores["stayed"] < 1
    Oracle(monkeypatch, world, lambda number, scene: ())
    scores = evaluation.score_edits(None, None, world, 3, np.random.default_rng(0))
    assert scores["edit"]["score"] == scores["stayed"] == 0


def test_a_judge_that_always_says_yes_is_right_as_often_as_it_draws_right(monkeypatch):
    """Its own first picture is what it judges, and the last what counts as mended."""
    world = World(0)
    Oracle(monkeypatch, world, lambda number, scene: scene[:1])
    scores = evaluation.score_plans(None, None, world, 3, np.random.default_rng(0))
    assert scores["judges"]["score"] == scores["first"]["score"] == scores["mended"]["score"] < 1


def test_the_reader_sees_the_picture_that_is_meant():
    """The first or the last of an answer; nothing where there is none, or where it is unclear."""
    world = World(0)
    a, b = (Thing("circle", "red", 0),), (Thing("square", "blue", 2),)
    one, two = (Drawn(torch.zeros(4, 4), picture) for picture in draw_scenes([a, b]))
    blur = Drawn(torch.zeros(4, 4), np.full((world.side, world.side, 3), 130, np.uint8))
    answers = [["x", one, two], ["no picture"], [], [blur], [two]]
    assert evaluation.seen_in(answers, world) == [b, None, None, None, b]
    assert evaluation.seen_in(answers, world, 0) == [a, None, None, None, b]


def drawing(monkeypatch):
    """A model that opens a picture in place of the first word, and says nothing after it."""
    def words_of(m, x, wanted, *_):
        fresh = [row for row, want in enumerate(wanted) if want == "word"]
        said = m.ids["boi"] if not getattr(m, "drew", False) else m.ids["eos"]
        m.drew = True
        return dict.fromkeys(fresh, said)
    monkeypatch.setattr(model.Unified, "words_of", words_of)


@both_models
def test_a_picture_in_an_answer_is_saved_and_named(name, runs, capsys, monkeypatch, tmp_path):
    """A terminal cannot show it: its file is printed, and part of the result."""
    drawing(monkeypatch)
    file = tmp_path / "said.png"
    command("chat", "--checkpoint", runs[name], "--question", "draw", "--out", file)
    printed, result = result_of(capsys)
    side = opened(runs[name])[0].config.image_size
    assert f"[picture: {file}]" in printed and result == {"answer": "<image>", "pictures": [str(file)]}
    assert Image.open(file).size == (side, side)


@both_models
def test_generate_edits_the_pictures_it_is_given(name, runs, capsys, monkeypatch, tmp_path):
    """The picture stands before the instruction; the drawing depends on it, and without learning to edit there is one
    clear line."""
    seen = watched(monkeypatch, model.Unified, "generate")
    with monkeypatch.context() as patch:
        drawing(patch)
        command("generate", "--checkpoint", runs[name], "--image", runs[name] / "red.png", "--prompt", "make it blue",
                "--out", tmp_path / "a.png", "--temperature", 0)
    assert (tmp_path / "a.png").exists() and seen[0].code_temperature == 0 and seen[0].guidance == 1.2
    capsys.readouterr()
    monkeypatch.setattr(model.Unified, "words_of", lambda m, x, wanted, *_: {
        row: m.ids["eos"] for row, want in enumerate(wanted) if want == "word"})
    line = refused(capsys, "generate", "--checkpoint", runs[name], "--image", runs[name] / "red.png", "--prompt", "x",
                   "--out", tmp_path / "b.png", main=evaluation.main)
    assert "drew nothing: say what to change, or first train it on conversations" in line
    assert not (tmp_path / "b.png").exists()


def test_an_answer_is_not_saved_over_a_drawing_by_default():
    """The drawing that `generate` left is often the picture that a chat is about, and is read again at each turn."""
    assert evaluation.Chat().out != evaluation.Generate().out


def test_an_error_within_an_answer_stands_in_a_line_of_its_own(runs, capsys, monkeypatch):
    """Words are there before the picture that does not fit is refused."""
    def breaks_off(m, text, records, watch, **_):
        for token in text.encode("so"):
            watch(0, token)
        raise InputError("no room")
    monkeypatch.setattr(evaluation, "reply", breaks_off)
    talk(monkeypatch, "draw")
    command("chat", "--checkpoint", runs["tiny-emu3"])
    assert "\nso\nerror: no room\n" in capsys.readouterr().out


def test_a_mark_that_the_model_wrote_itself_is_no_picture():
    """Counted as one, it would not fit the pictures, and every further question would be refused."""
    drawn = Drawn(torch.zeros(1), None)
    turn, pictures = evaluation.turn_of("what is <b>?", ["a tag like <image>", drawn])
    formats.records.conversation_parts([turn, ("and?", None)], len(pictures))
    assert turn[1] == "a tag like < image> <image>" and pictures == (drawn,)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_picture_that_is_shown_is_never_written_over(command, runs, capsys, tmp_path):
    """What the user gave would be lost, and a chat would go on about another picture."""
    file = tmp_path / "mine.png"
    shutil.copy(runs["tiny-emu3"] / "red.png", file)
    before = file.read_bytes()
    line = refused(capsys, command, "--checkpoint", runs["tiny-emu3"], "--image", file, "--out",
                   tmp_path / ".." / tmp_path.name / "mine.png", main=evaluation.main)
    assert "would be lost: give another --out" in line and file.read_bytes() == before


def test_a_run_on_other_data_is_not_measured_on_the_built_in_world(capsys, tmp_path, monkeypatch):
    """Its curves would be overwritten by those of samples that it never saw."""
    settings = {"data": ["mine.jsonl"], "aia_targets": "depth", "aia_variant": "full"}
    monkeypatch.setattr(evaluation, "load_run", lambda config: (SimpleNamespace(), None, settings))
    for word, remedy in (("curves", "curves need --data FILE.jsonl"), ("score", "give the folder of a run that did")):
        line = refused(capsys, word, "--checkpoint", tmp_path / "run", main=evaluation.main)
        assert f"run never saw the built-in world: {remedy}" in line
