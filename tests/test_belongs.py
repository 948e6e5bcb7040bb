"""What a run reports belongs to the weights and samples that it names."""

import json

import pytest
import torch
from made import SMALL, fresh
from made_runs import command

import aia
import data
import eval as evaluation
import train
from formats.checkpoints import checkpoint_folders, read_tensors, tensors_of
from formats.weights import digest, load
from lab.study import check_weights
from parts.settings import InputError, read_json
from parts.text import Text
from parts.world import world_of

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


def test_the_checksum_of_weights_tells_all_of_them_apart():
    """One number of one parameter counts, and the place of a tensor; a copy is the same, and so is one that is held in
    half precision, as final weights are that were trained in parts."""
    m, twin = fresh("tiny-emu3", **SMALL), fresh("tiny-emu3", **SMALL)
    twin.load_state_dict(m.state_dict())
    found = [digest(m)]
    assert digest(twin) == found[0]
    with torch.no_grad():
        for x in (twin.lm.norm.weight, twin.vq.quantize.weight, twin.lm.layers[-1].mlp.up_proj.weight):
            last = x.flatten()[-1].clone()
            x.view(-1)[-1] = 1.01 * last
            found.append(digest(twin))
            x.view(-1)[-1] = last
        assert digest(twin) == found[0]
        q, k = (getattr(twin.lm.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
        q.weight, k.weight = k.weight, q.weight
        found.append(digest(twin))
    assert digest(m.bfloat16()) == found[0]
    assert len(set(found)) == len(found)


def test_scores_and_curves_name_the_weights_they_were_measured_on(two_steps):
    """Three arms, three weights, each the same in both files and in the checkpoint of that name."""
    scores, curves = read_json(two_steps / "scores.json"), read_json(two_steps / "curves.json")
    m, named = load(two_steps), {}
    for name, folder in (("before", two_steps / "before"), ("control", two_steps / "control"),
                         ("after", checkpoint_folders(two_steps)[-1])):
        read_tensors(tensors_of(m), folder)
        named[name] = digest(m)
    assert {name: (scores if name == "after" else scores[name])["weights"] for name in named} == named
    assert [{name: curves[task][name]["weights"] for name in named} for task in aia.TASKS] == [named] * 2
    assert len(set(named.values())) == 3


@pytest.mark.parametrize("task, other", [("und", "gen"), ("gen", "und")])
def test_a_study_refuses_scores_and_curves_of_different_weights(task, other, two_steps):
    """Of any arm; runs that are older than the checksums still count."""
    def parts():
        return read_json(two_steps / "scores.json"), read_json(two_steps / "curves.json")
    check_weights(*parts(), two_steps)
    for name in ("before", "control", "after"):
        scores, curves = parts()
        curves[task][name]["weights"] = "0"
        with pytest.raises(InputError, match=f"run: .*different weights \\({name}\\)"):
            check_weights(scores, curves, two_steps)
        del curves[task][name]["weights"], curves[other][name]["weights"]
        check_weights(scores, curves, two_steps)


def test_scores_of_the_final_weights_are_those_of_the_command(two_steps, tmp_path):
    """`eval.py score` and the end of training measure alike, and say so by the same checksum."""
    own = read_json(two_steps / "scores.json")
    m = load(two_steps)
    world = world_of(read_json(two_steps / "settings.json"))
    again, _ = evaluation.score_both(m, Text(m.tokenizer_file, "emu3"), world, 1)
    assert {key: own[key] for key in again} == again and again["weights"] == digest(m)


def samples_of(folder, step):
    """Origins of a step of tuning, from the folder of a run and its schedule."""
    m, world = load(folder), world_of(read_json(folder / "settings.json"))
    plan = data.Schedule(data.WorldSource(world, 8, 0), data.Preparer(m, Text(m.tokenizer_file, "emu3")),
                         train.TUNE.order, 4, (1, 1), 3)
    return sorted(origin for batch in plan.step(step) for origin in batch.origins)


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_logged_step_names_its_samples(two_steps):
    """Beside the losses stand the origins of that step, all micro-batches of both tasks, the same for both arms."""
    for arm in ("control", "tune"):
        named = [row["origins"] for row in log_of(two_steps) if row["name"] == arm]
        assert named == [samples_of(two_steps, step) for step in range(2)]
    assert named[0] != named[1] and len(named[0]) == 4


def test_samples_are_named_for_all_processes_and_the_last_step(runs, tmp_path, monkeypatch):
    """Losses of a report are sums over processes, of one step, whatever came since the last report."""
    monkeypatch.setattr(train, "gathered", lambda values: [*values, "z of another process"])
    monkeypatch.setattr(train, "finish", lambda run: None)
    command("--init", runs["tiny-emu3"], "--steps", 3, "--batch-size", 4, "--pool", 8, "--calibration", 1,
            "--micro-batch", 3, "--out", tmp_path / "run")
    row, = log_of(tmp_path / "run")
    assert row["step"] == 3 and row["origins"] == [*samples_of(tmp_path / "run", 2), "z of another process"]
