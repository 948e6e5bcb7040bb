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
    """One bit of one parameter counts, and the place and type of a tensor; a copy is the same."""
    m, twin = fresh("tiny-emu3", **SMALL), fresh("tiny-emu3", **SMALL)
    twin.load_state_dict(m.state_dict())
    found = [digest(m)]
    assert digest(twin) == found[0]
    with torch.no_grad():
        for x in (twin.lm.norm.weight, twin.vq.quantize.weight, twin.lm.layers[-1].mlp.up_proj.weight):
            last = x.flatten()[-1].clone()
            x.view(-1)[-1] = last.nextafter(last + 1)
            found.append(digest(twin))
            x.view(-1)[-1] = last
        assert digest(twin) == found[0]
        q, k = (getattr(twin.lm.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
        q.weight, k.weight = k.weight, q.weight
        found += [digest(twin), digest(m.bfloat16())]
    assert len(set(found)) == len(found)


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """A run with both arms, from fresh weights, scored."""
    folder = tmp_path_factory.mktemp("belongs") / "run"
    command("--init", runs["tiny-emu3"], "--arms", "both", "--steps", 2, "--batch-size", 4, "--pool", 8, "--eval-n", 1,
            "--calibration", 1, "--micro-batch", 3, "--log-every", 1, "--lr", 0.01, "--out", folder)
    return folder


def test_scores_and_curves_name_the_weights_they_were_measured_on(compared):
    """Three arms, three weights, each the same in both files and in the checkpoint of that name."""
    scores, curves = read_json(compared / "scores.json"), read_json(compared / "curves.json")
    m, named = load(compared), {}
    for name, folder in (("before", compared / "before"), ("control", compared / "control"),
                         ("after", checkpoint_folders(compared)[-1])):
        read_tensors(tensors_of(m), folder)
        named[name] = digest(m)
    assert {name: (scores if name == "after" else scores[name])["weights"] for name in named} == named
    assert [{name: curves[task][name]["weights"] for name in named} for task in aia.TASKS] == [named] * 2
    assert len(set(named.values())) == 3


def test_a_study_refuses_scores_and_curves_of_different_weights(compared):
    """Of any arm; runs that are older than the checksums still count."""
    def parts():
        return read_json(compared / "scores.json"), read_json(compared / "curves.json")
    check_weights(*parts(), compared)
    for name in ("before", "control", "after"):
        scores, curves = parts()
        curves["und"][name]["weights"] = "0"
        with pytest.raises(InputError, match=f"run: .*different weights \\({name}\\)"):
            check_weights(scores, curves, compared)
        del curves["und"][name]["weights"], curves["gen"][name]["weights"]
        check_weights(scores, curves, compared)


def test_scores_of_the_final_weights_are_those_of_the_command(compared, tmp_path):
    """`eval.py score` and the end of training measure alike, and say so by the same checksum."""
    own = read_json(compared / "scores.json")
    m = load(compared)
    world = world_of(read_json(compared / "settings.json"))
    again, _ = evaluation.score_both(m, Text(m.tokenizer_file, "emu3"), world, 1)
    assert {key: own[key] for key in again} == again and again["weights"] == digest(m)


def test_a_logged_step_names_its_samples(compared):
    """Beside the losses stand the origins of that step, all micro-batches of both tasks, the same for both arms."""
    rows = [json.loads(line) for line in (compared / "metrics.jsonl").read_text().splitlines()]
    m, phases = load(compared), {}
    world = world_of(read_json(compared / "settings.json"))
    plan = data.Schedule(data.WorldSource(world, 8, 0), data.Preparer(m, Text(m.tokenizer_file, "emu3")),
                         train.TUNE.order, 4, (1, 1), 3)
    for row in rows:
        expected = sorted(origin for batch in plan.step(row["step"] - 1) for origin in batch.origins)
        assert row["origins"] == expected and len(expected) == 4
        phases.setdefault(row["name"], []).append(row["origins"])
    assert phases["control"] == phases["tune"] and phases["tune"][0] != phases["tune"][1]
