"""Claims about lab/knockout.py: what is cut weighs nothing, all else stays, and the score is that of eval.py."""

import json
import math

import numpy as np
import pytest
import torch
from made import batch_of, tiny
from made_data import both_kinds, training_scenes
from made_folders import opened
from made_runs import command, refused

import aia
import data
import eval as evaluation
from formats.records import Record
from lab import knockout
from lab.plans import blind
from parts import decoding
from parts.decoding import Cache
from parts.pictures import to_tensor
from parts.settings import stream
from parts.world import World, draw_scenes

WORLD = World(0)
PROMPTS = ["a red circle", "a blue square above a green cross"]
forks_too = pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus", "tiny-unifork"])
each_task = pytest.mark.parametrize("task", aia.TASKS)


def sample_of(m, task):
    """One sample: embeddings (1, T, C), condition and queries (1, T), and where the first code, or answer, begins."""
    batch = batch_of(m.config, task)
    length = batch.lengths[0]
    condition, queries = batch.condition[:1, :length], batch.queries[:1, :length]
    return m.embed(batch)[:1, :length], condition, queries, int(queries[0].long().argmax())


@torch.inference_mode()
def generated(m, task, layers, last=False, condition=None, queries=None):
    """A pass over the prompt, then one over what is generated, which does not see the condition in these layers -> the
    last hidden state of the prompt and those after it, and the intensity."""
    x, hidden, own, first = sample_of(m, task)
    queries = own if queries is None else queries
    condition = hidden if condition is None else condition
    cache = Cache(m.lm, torch.ones(1, first, dtype=torch.bool), x.shape[1] - first)
    with blind(m, layers, hidden[:, :first], last):
        before, *_ = m.lm(x[:, :first], cache=cache, task=task)
        after, intensity, _ = m.lm(x[:, first:], None, condition, queries[:, first:], cache=cache, task=task)
    return torch.cat([before[:, -1:], after], 1), intensity


@each_task
@forks_too
def test_hiding_in_no_layer_changes_nothing(name, task):
    """Bit for bit: plain scores are those of the model as it is."""
    m = tiny(name)
    x, _, _, first = sample_of(m, task)
    cache = Cache(m.lm, torch.ones(1, first, dtype=torch.bool), x.shape[1] - first)
    with torch.inference_mode():
        expected = [m.lm(part, cache=cache, task=task)[0] for part in (x[:, :first], x[:, first:])]
    got, _ = generated(m, task, [], last=True)
    assert torch.equal(got, torch.cat([expected[0][:, -1:], expected[1]], 1))


@pytest.mark.parametrize("last", [False, True])
@each_task
@forks_too
def test_a_cut_is_a_score_of_minus_infinity(name, task, last, monkeypatch):
    """In its layer the mass is exactly zero, elsewhere it is not, and the rest is what attention written out gives."""
    m, cut = tiny(name, kv_heads=1), 2
    got, intensity = generated(m, task, [cut], last)
    assert intensity[0, cut] == 0 and (intensity[0, [0, 1, 3]] > 0).all()
    x, condition, queries, first = sample_of(m, task)

    def attend(q, k, v, visible, keys, rectangle):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])               # (1, H, T, T)
        scores[..., torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)] = -math.inf
        hidden = condition[0] & (torch.arange(len(condition[0])) < first)
        scores[:, :, first - last:, hidden] = -math.inf
        return scores.softmax(-1) @ v, (scores.softmax(-1) * keys[:, None, None]).sum(-1)
    monkeypatch.setattr(m.lm.path(task)[0][cut].self_attn, "attend", attend)
    with torch.inference_mode():
        expected, measured, _ = m.lm(x, None, condition, queries, task=task)
    torch.testing.assert_close(got, expected[:, first - 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(intensity, measured, rtol=1e-4, atol=1e-6)


@each_task
def test_keys_that_are_left_keep_their_proportions(task):
    """They share what the condition had, in proportion to what each had before."""
    m, cut = tiny("tiny-emu3", heads=1, kv_heads=1, attention="explicit"), 1
    x, condition, queries, first = sample_of(m, task)
    keys = torch.eye(x.shape[1], dtype=torch.bool)[:, None]                     # (K, 1, T): each key alone
    row = torch.zeros_like(queries)
    row[:, first] = True                            # Eq. 1 of one token and one head is its attention
    plain, left = (generated(m, task, layers, False, keys, row)[1][:, 0, cut] for layers in ([], [cut]))        # (K,)
    hidden = condition[0] & (torch.arange(x.shape[1]) < first)
    assert 0 < plain[hidden].sum() < 1 and (left[hidden] == 0).all()
    torch.testing.assert_close(left[~hidden], plain[~hidden] / (1 - plain[hidden].sum()))


@each_task
@both_kinds
def test_what_is_cut_are_the_keys_that_are_measured(kind, task, preparers):
    """Prompts are padded in front and batches behind, and both mark the same tokens of both templates."""
    preparer = preparers[kind]
    pictures = draw_scenes(training_scenes(2))
    turns = [("<image>" if task == "und" else "") + prompt for prompt in PROMPTS]
    records = [Record("", task, ((turn, "yes" if task == "und" else "<image>"),), (picture,))
               for turn, picture in zip(turns, pictures, strict=True)]
    condition = preparer.batch(records).condition
    samples = knockout.rows_of(preparer, PROMPTS)[::2]
    if task == "und":
        samples, *_ = evaluation.ask(preparer, [Record("", task, ((turn, None),), (picture,))
                                                for turn, picture in zip(turns, pictures, strict=True)])
    lengths = [sum(len(ids) for ids, _ in pieces) for pieces in samples]
    cut = {part: knockout.columns(samples, task, part, "cpu") for part in knockout.MASS}
    assert lengths[0] < lengths[1] == cut["condition"].shape[1]
    for i, length in enumerate(lengths):
        assert torch.equal(cut["condition"][i, -length:], condition[i, :length])
        assert cut["first"][i].nonzero().tolist() == [[lengths[1] - length]]
        assert not cut["condition"][i, :-length].any() and not condition[i, length:].any()
    assert torch.equal(cut["rest"], cut["condition"] & ~cut["first"])
    assert (cut["condition"] & cut["first"]).any(1).tolist() == [task == "gen"] * 2


@both_kinds
def test_guidance_is_cut_in_both_of_its_rows(kind, both_texts, monkeypatch):
    """Janus-Pro's blanked prompt in the columns of the prompt, and all words of Emu3's negative prompt."""
    m, text = tiny(f"tiny-{kind}", negative="a red circle above it"), both_texts[kind]
    rows, run = [], m.guided_rows
    monkeypatch.setattr(m, "guided_rows", lambda *given: rows.append(run(*given)) or rows[0])
    evaluation.draw_codes(m, text, PROMPTS, temperature=0)
    (ids, mask), preparer = rows[0], data.Preparer(m, text, training=False)
    hidden = knockout.columns(knockout.rows_of(preparer, PROMPTS), "gen", "condition", "cpu")
    assert hidden.shape == mask.shape and not (hidden & ~mask).any()
    if kind == "janus":
        assert torch.equal(hidden[::2], hidden[1::2])
    else:
        negative = [m.ids["bos"], *text.encode(m.config.negative)]
        assert [row[cut].tolist() for row, cut in zip(ids[1::2], hidden[1::2], strict=True)] == [negative] * 2


@pytest.mark.parametrize("guidance", [1.0, 1.2])
@both_kinds
def test_a_drawing_is_cut_from_its_first_code_on(kind, guidance, both_texts, monkeypatch):
    """In every row that guidance reads, row ends included, and in no other layer; a step that a GPU replays too."""
    m, text = tiny(f"tiny-{kind}", guidance=guidance), both_texts[kind]
    preparer, seen = data.Preparer(m, text, training=False), {1: [], 2: []}
    hidden = knockout.columns(knockout.rows_of(preparer, PROMPTS), "gen", "condition", "cpu")
    assert len(hidden) == len(PROMPTS) * (1 if guidance == 1 else 2)

    def drawn():
        with blind(m, [2], hidden):
            return evaluation.draw_codes(m, text, PROMPTS, temperature=0)

    def spy(layer, attend):
        def watched(q, k, v, visible, *rest):
            seen[layer].append(visible)
            return attend(q, k, v, visible, *rest)
        return watched
    with monkeypatch.context() as patch:
        for layer in seen:
            attention = m.lm.layers[layer].self_attn
            patch.setattr(attention, "attend", spy(layer, attention.attend))
        codes = drawn()
    (prompts, *steps), (same, *whole) = seen[2], seen[1]
    assert torch.equal(prompts, same) and len(steps) == m.config.grid[0] * m.config.grid[1] - 1
    for step, other in zip(steps, whole, strict=True):
        columns = torch.nn.functional.pad(hidden, (0, step.shape[-1] - hidden.shape[1]))[:, None, None]
        assert torch.equal(step, other & ~columns) and not torch.equal(step, other)
    monkeypatch.setattr(decoding, "REPLAYED", ("cpu",))
    monkeypatch.setattr(decoding, "REPLAY_FROM", 1)
    assert torch.equal(drawn(), codes)


@both_kinds
def test_scores_without_a_cut_are_those_of_eval(kind, both_texts, monkeypatch):
    """The same prompts and questions, in whatever portions, and the same rules for what is right."""
    m, text = tiny(f"tiny-{kind}"), both_texts[kind]
    rng, preparer = stream(0, "prompts"), data.Preparer(m, text, training=False)
    scenes = [WORLD.held_out_scene(skill, rng)[0] for skill in WORLD.skills for _ in range(2)]
    pictures = draw_scenes(scenes)
    pictures[0] = 255                               # one is drawn wrong, another one has a blot in an empty cell
    row, column = divmod(3 - scenes[1][0].cell, 2)
    pictures[1, 8 * row:8 * row + 8, 8 * column:8 * column + 8] = (255, 0, 255)
    monkeypatch.setattr(knockout, "AT_ONCE", 5)
    monkeypatch.setattr(m, "generate_text", lambda ids, *_, **more: torch.tensor([text.encode("yes")] * len(ids)))
    right_answers, _ = knockout.answers_to(preparer, WORLD, [
        one for one in knockout.held_out_questions(WORLD, 2, stream(0, "questions")) if one[0] in WORLD.topics], True)

    def draw(m, text, prompts, temperature):
        return torch.stack([to_tensor(next(given)) for _ in prompts])
    monkeypatch.setattr(evaluation, "draw", draw)
    given = iter([*pictures, *pictures])
    right_drawings, records = knockout.drawings(preparer, WORLD, 2, stream(0, "prompts"))
    drawn, samples = evaluation.score_generation(m, text, WORLD, 2)
    assert right_drawings("condition", ()) == drawn["gen"] == pytest.approx(1 - 2 / len(scenes))
    assert {prompt for some in samples for prompt, *_ in some} <= {record.turns[0][0] for record in records}
    assert right_answers("condition", ()) == evaluation.score_understanding(m, text, WORLD, 2)[0]["und"] > 0


@both_kinds
def test_the_first_word_is_predicted_by_the_last_token_of_the_prompt(kind, preparers):
    """It is no query of Eq. 1, and the only token that predicts a word of the answer and is none."""
    picture, = draw_scenes(training_scenes(1))
    batch = preparers[kind].batch([Record("", "und", (("<image>where is it?", "at the top left"),), (picture,))])
    queries = knockout.first_word(batch).queries
    assert queries.sum() == 1 and queries[0].nonzero() + 1 == batch.queries[0].nonzero()[0]


def test_the_file_is_complete(runs, tmp_path, capsys):
    """Each score plainly and with each cut in each layer and all; masses of all layers; correlations, or null where
    nothing falls, as in a model that has learned nothing."""
    out = tmp_path / "knockout.json"
    command(*runs.values(), "--n", 1, "--device", "cpu", "--out", out, main=knockout.main)
    content = json.loads(out.read_text())
    assert set(content) == {"runs", "n", "seed", "machine"} and set(content["runs"]) == set(map(str, runs.values()))
    for row in content["runs"].values():
        assert set(row) == {"gen", "und", "und_answers", "mass", "correlation"}
        for name, parts in (("gen", knockout.MASS), ("und", ["condition"]), ("und_answers", ["condition"])):
            assert set(row[name]) == {"plain", *parts} and row["correlation"][name] == dict.fromkeys(parts)
            assert all(set(row[name][part]) == {"0", "1", "all"} for part in parts)
        assert set(row["mass"]) == set(row["correlation"]) == {"gen", "und", "und_first_word", "und_answers"}
        shares = np.array([list(mass.values()) for mass in row["mass"].values()])
        assert shares.shape == (4, 3, 2) and (0 <= shares).all() and (shares < 1).all()
    printed = capsys.readouterr().out
    assert printed.count("correlation of mass and fall none") == 2 * 6 and "\nresult {" in printed


def test_correlation_is_over_layers(runs, monkeypatch):
    """Between the mass of a layer and what the score loses when that layer is cut; a gain is a negative fall."""
    m, text = opened(runs["tiny-emu3"])
    monkeypatch.setattr(knockout, "layer_by_layer", lambda m, right, parts: {"plain": 0.5} | {
        part: {"0": 0.25, "1": 0.75, "all": 0.0} for part in parts})
    row = knockout.knockout_of(m, text, WORLD, knockout.Knockout(n=1))
    for part, name in (("condition", "intensity"), ("first", "sink"), ("rest", "without_first_token")):
        first, second = row["mass"]["gen"][name]
        assert row["correlation"]["gen"][part] == pytest.approx(1 if first > second else -1)


def test_bad_input_is_one_line(tmp_path, capsys):
    """With cause and remedy, exit status 2."""
    assert "does not exist" in refused(capsys, tmp_path / "none", main=knockout.main)
    assert "needs run folders" in refused(capsys, main=knockout.main)
    assert "use condition, first, rest" in refused(capsys, tmp_path, "--part", "sink", main=knockout.main)
