"""Claims about running the study (lab/study.py)."""

import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aia
import lab.study
import model
import train
from lab.claims import summary_of
from lab.rows import needs
from lab.study import finished_rows
from parts.settings import InputError, Stop, write_json


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """Rows that are there are not run again; each row but the whole runs begins at the weights before AIA."""
    configs, sizes = [], []

    def pretend(config, phases):
        configs.append(config)
        sizes.append({phase.name: phase.batch_size for phase in phases})
        folder = Path(config.out)
        folder.mkdir(parents=True)
        rows = {"target": [0.2] * 3, "delta": [0.1] * 3, **{name: {"intensity": [0.1, 0.2, 0.3], "std": [0.1] * 3,
                "ntp": 1.0, "aia": 0.1} for name in ("before", "after")}}
        write_json({"gen": rows, "und": rows}, folder / "curves.json")
        write_json({"und": 0.5, "gen": 0.5, "seconds": 1.0}, folder / "result.json")
        write_json(asdict(config), folder / "settings.json")

    def align(asked):
        if Path(asked.checkpoint).name == "expert-und-seed3" and not stopped:
            stopped.append(asked)
            raise KeyboardInterrupt
        part = {"score": {"10": [0.1, 0.2, 0.3]}}
        write_json({"gen": part, "und": part}, Path(asked.checkpoint) / "alignment.json")
    stopped = []
    monkeypatch.setattr(train, "train", pretend)
    monkeypatch.setattr(lab.study, "alignment", align)
    flags = ["--rows", "unified", "unifork-2", "experts-curves", "--runs",
             tmp_path / "runs", "--out", tmp_path / "study.json"]
    with pytest.raises(SystemExit):
        lab.study.main([*map(str, flags), "--seeds", "3"])
    (tmp_path / "runs/aia-seed3-old").mkdir()
    shutil.copy(tmp_path / "runs/aia-seed3/result.json", tmp_path / "runs/aia-seed3-old")
    lab.study.main([*map(str, flags), "--seeds", "3"])
    lab.study.main([*map(str, flags), "--seeds", "3", "4"])
    names = [Path(config.out).name for config in configs]
    assert len(names) == len(set(names)) == 12 and names[:2] == ["aia-seed3", "unified-seed3"]
    for config in configs:
        base = tmp_path / f"runs/aia-seed{config.seed}/before"
        assert config.init == ("" if re.match("aia|expert-", Path(config.out).name) else str(base))
    whole, tuned, _, drawer, reader = sizes[:5]     # an expert differs by the other task alone
    assert whole == {"tokenizer": 8, "answer": 24, "joint": 32, "tune": 32} and tuned == {"tune": 32}
    assert drawer == {"tokenizer": 8, "joint": 16, "tune": 16} and reader == whole | drawer
    own = json.loads(Path(configs[5].aia_targets).read_text())
    assert configs[5].out.endswith("experts-curves-seed3") and own["gen"][0] == [0.0, 0.2, 0.1]
    lab.study.main([flags[0], "unified", *map(str, flags[4:]), "--seeds", "4"])
    stored = json.loads((tmp_path / "study.json").read_text())          # of all that is there, whatever was asked for
    assert len(configs) == 12 and stored["summary"]["experts"]["seeds"] == [3, 4]
    assert [(row["row"], row["seed"]) for row in stored["rows"][:3]] == [("aia", 3), ("aia", 4), ("unified", 3)]
    assert "| claim | verdict |" in capsys.readouterr().out
    with pytest.raises(InputError, match="--rows seventh"):
        lab.study.main(["--rows", "seventh"])
    shutil.copytree(tmp_path / "runs/aia-seed3", tmp_path / "runs/unified-seed5")
    shutil.copytree(tmp_path / "runs/aia-seed3", tmp_path / "runs/aia-seed5")
    with pytest.raises(InputError, match="aia-seed5 was started with --seed 3, not 5"):
        lab.study.main([*map(str, flags), "--seeds", "5"])
    assert {row["seed"] for row in finished_rows(tmp_path / "runs")} == {3, 4}            # a copy is no seed


def test_a_published_study_is_not_replaced_by_one_that_knows_less(tmp_path, monkeypatch, capsys):
    """A folder of runs may have fewer of them, or none yet, as in a fresh clone."""
    published, found = tmp_path / "assets.json", [{"row": "aia", "seed": 0, "und": 0.5, "gen": 0.5, "seconds": 60.0}]
    monkeypatch.setattr(lab.study, "PUBLISHED", published)
    monkeypatch.setattr(lab.study, "run_row", lambda *row: None)
    monkeypatch.setattr(lab.study, "finished_rows", lambda runs: found)
    (tmp_path / "runs").mkdir()
    for known, file in (([], published), ([("aia", 0), ("aia", 1)], tmp_path / "runs/study.json"),
                        ([("aia", 0)], published)):
        write_json({"rows": [{"row": row, "seed": seed} for row, seed in known]}, published)
        lab.study.main(["--rows", "aia", "--seeds", "0", "--runs", str(tmp_path / "runs")])
        assert f"written to {file}" in capsys.readouterr().out
        assert len(json.loads(file.read_text())["rows"]) == 1
        assert file == published or len(json.loads(published.read_text())["rows"]) == 2
    with pytest.raises(InputError, match="missing.study.json cannot be written: give a file in a folder that exists"):
        lab.study.main(["--rows", "aia", "--out", str(tmp_path / "missing/study.json")])


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_study_that_is_stopped_says_how_to_go_on(number, status, tmp_path, monkeypatch, capsys):
    """As a run does: one line, and the status that a scheduler or a shell expects."""
    def stopped(config, phases):
        raise train.Stop(number)
    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises(SystemExit) as stop:
        lab.study.main(["--seeds", "0", "--runs", str(tmp_path), "--out", str(tmp_path / "study.json")])
    assert stop.value.code == status and "continue with the same command\n" in capsys.readouterr().out


def test_a_row_keeps_the_parts_of_its_scores(tmp_path):
    """By topic and skill, means over seeds; runs of before the topics had their name count as well."""
    rows = {"target": [0.2], "after": {"intensity": [0.1], "std": [0.1], "ntp": 1.0, "aia": 0.1, "sink": [0.05]}}
    for seed, topics in ((0, "und_by_topic"), (1, "und_by_kind")):
        folder = tmp_path / f"raw-seed{seed}"
        folder.mkdir()
        write_json({"gen": rows, "und": rows}, folder / "curves.json")
        write_json({"und": 0.5, "gen": 0.5, "seconds": 1.0, "rss_gb": 0.5 + seed, "machine": {"cores": 2}},
                   folder / "result.json")
        write_json({topics: {"count": 0.25 + 0.5 * seed}, "gen_by_skill": {"colours": seed}, "psnr": 30 + seed,
                    "story": [1.0, seed]}, folder / "scores.json")
        write_json({"seed": seed}, folder / "settings.json")
        write_json({"commit": "abc", "started": "today"}, tmp_path / f"raw-seed{seed}.started.json")
    found = finished_rows(tmp_path)
    kept = ("gen_curve", "gen_sink", "commit", "machine")
    assert [[one[key] for key in kept] for one in found] == [[[0.1], [0.05], "abc", {"cores": 2}]] * 2
    row = summary_of(found)["raw"]
    assert (row["und_by_topic"], row["gen_by_skill"]) == ({"count": 0.5}, {"colours": 0.5})
    assert (row["psnr"], row["rss_gb"]) == (30.5, 1.0) and "reader" not in row and row["story"] == [1.0, 0.5]


def test_rows_that_run_side_by_side_wait_for_what_they_need(tmp_path, monkeypatch, capsys):
    """No more at once than were asked for, none before its weights are there; what needs a failed one is not begun."""
    running, began, most = {}, [], []

    class Pretended:
        """A process that ends when it is looked at for the second time; that of seed 1's unified model fails."""

        def __init__(self, target, args):
            self.run, self.looks = args[:2], 0

        def start(self):
            name, seed = self.run
            began.append(self.run)
            assert all(lab.study.is_done(other, seed, tmp_path) for other in needs(name))
            running[self.run] = self
            most.append(len(running))

        sentinel = 0

        def is_alive(self):
            self.looks += 1
            if self.looks == 2:
                del running[self.run]
                if self.run != ("narrow", 1):
                    folder = lab.study.folder_of(*self.run, tmp_path)
                    folder.mkdir()
                    write_json({"seconds": 120.0}, folder / "result.json")
            return self.looks < 2

        exitcode = 0
    monkeypatch.setattr(lab.study.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Pretended))
    monkeypatch.setattr(lab.study, "wait", lambda sentinels, timeout: None)
    names = ("narrow", "narrow-gen", "narrow-und", "early", "early-experts")
    todo = [(name, seed) for seed in (0, 1) for name in names]
    failed = lab.study.side_by_side(todo, 3, tmp_path)
    assert {*failed} == {(name, 1) for name in ("narrow", "early", "early-experts")} and max(most) == 3
    assert {*began} == {*todo} - {("early", 1), ("early-experts", 1)} and len(began) == len({*began})
    last = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split() for line in last[:3]] == [
        ["seed", "0", "1"], ["narrow", "2.0", "!"], ["narrow-gen", "2.0", "2.0"]]
    assert last[-1] == "7 of 10 runs finished, minutes left: 0"


def test_seeds_named_twice_run_once(tmp_path, monkeypatch):
    """Side by side, two processes would want the same folder."""
    asked = []
    monkeypatch.setattr(lab.study, "side_by_side", lambda todo, jobs, runs: asked.extend(todo) or [])
    words = ["--rows", "aia", "--seeds", "1", "01", "1", "--jobs", "2", "--runs", str(tmp_path)]
    lab.study.main([*words, "--out", str(tmp_path / "study.json")])
    assert asked == [("aia", 1)]


def test_the_quick_study_takes_no_rows():
    """It has its own, and would run others than those asked for."""
    with pytest.raises(InputError, match="--quick has rows of its own: leave out --rows"):
        lab.study.chosen_rows(lab.study.Study(rows=("9",), quick=True))


def test_a_row_waits_for_weights_and_not_for_the_rest_of_their_run(tmp_path):
    """A short study would be spent waiting for scores; a lambda or targets of that run have to be waited for."""
    kept = {"unified": "aia/before", "early-fork": "narrow/answered", "early": "narrow/answered",
            "small+aia": "small/before", "experts-curves": "aia/before", "tuned": "janus"}
    before = {name: lab.study.waits_for(name, 3, tmp_path) for name in kept}
    assert before == {name: needs(name) for name in kept}
    for folder in kept.values():
        row, _, part = folder.partition("/")
        (tmp_path / f"{row}-seed3" / part).mkdir(parents=True, exist_ok=True)
    assert {name: lab.study.waits_for(name, 3, tmp_path) for name in kept} == {
        "unified": [], "early-fork": [], "early": ["narrow"], "small+aia": [], "tuned": ["janus"],
        "experts-curves": ["expert-gen", "expert-und"]}
    assert lab.study.waits_for("unified", 4, tmp_path) == ["aia"]


def test_a_study_side_by_side_stops_its_runs(tmp_path, monkeypatch):
    """They save before they end, so the same command goes on. A Ctrl-C goes to them too, and one that still imports
    must not end in a traceback."""
    ended, deaf, handler = [], [], signal.getsignal(signal.SIGINT)

    class Pretended:
        sentinel = 0

        def __init__(self, target, args):
            self.run = args[:2]

        def start(self):
            deaf.append(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self):
            ended.append(self.run)

        def join(self):
            pass

        def is_alive(self):
            return self.run not in ended
    monkeypatch.setattr(lab.study.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Pretended))
    monkeypatch.setattr(lab.study, "wait", lambda sentinels, timeout: None)
    with pytest.raises(Stop) as stop:
        lab.study.side_by_side([("narrow", 0), ("narrow", 1), ("narrow", 2)], 2, tmp_path)
    assert stop.value.args == (signal.SIGTERM,) and ended == [("narrow", 0), ("narrow", 1)]
    assert deaf == [True, True] and signal.getsignal(signal.SIGINT) == handler


def test_a_run_tells_from_which_commit_it_was_started(tmp_path, monkeypatch):
    """A plan is worth something only if it is older; what goes on from a checkpoint keeps its start."""
    for folder, changed in (("clean", ""), ("changed", " M train.py")):
        said = iter(["abc123", changed])
        monkeypatch.setattr(lab.study.subprocess, "run", lambda *words, said=said, **named: SimpleNamespace(
            stdout=next(said) + "\n"))
        lab.study.tell_start(tmp_path / folder)
    first = json.loads((tmp_path / "clean.started.json").read_text())
    assert first["commit"] == "abc123" and first["started"].endswith("+00:00")
    assert json.loads((tmp_path / "changed.started.json").read_text())["commit"] == "abc123 and changes"
    (tmp_path / "clean/checkpoints/2-0000100").mkdir(parents=True)
    monkeypatch.setattr(lab.study.subprocess, "run", lambda *words, **named: pytest.fail("it goes on"))
    lab.study.tell_start(tmp_path / "clean")
    assert json.loads((tmp_path / "clean.started.json").read_text()) == first


def test_a_run_without_a_repository_is_started_all_the_same(tmp_path, monkeypatch):
    """An archive of the files has no commit."""
    def missing(*words, **named):
        raise FileNotFoundError("git")
    monkeypatch.setattr(lab.study.subprocess, "run", missing)
    lab.study.tell_start(tmp_path / "runs/run")
    assert json.loads((tmp_path / "runs/run.started.json").read_text())["commit"] is None


def test_exchanged_targets_are_those_of_the_other_task(tmp_path):
    """A control: if any pull on the curves helped, the paper's targets would say nothing."""
    file = lab.study.targets_file("early-exchanged", 0, tmp_path)
    for task, other in zip(aia.TASKS, reversed(aia.TASKS), strict=True):
        found, expected = aia.targets(6, task, str(file)), aia.targets(6, other)
        assert all(map(torch.equal, found, expected)) and not torch.equal(found[0], aia.targets(6, task)[0])


def test_lambda_at_the_end_of_another_run_is_that_of_its_weights(tmp_path, monkeypatch):
    """Measured there for the targets that are asked for, as --aia-weight takes it."""
    monkeypatch.setitem(model.PRESETS, "tiny-half", replace(model.PRESETS["tiny-half"], layers=2))
    small = {"preset": "tiny-half", "pool": 16, "eval_n": 1, "steps": 1, "batch_size": 4, "aia_weight": "off"}
    config = train.TrainConfig(out=str(tmp_path / "run"), **small)
    train.train(config, train.plan(config))
    wanted = replace(config, aia_weight="rho", calibration=1)
    words = [lab.study.lambdas_at_the_end(replace(wanted, **changes), tmp_path / "run")
             for changes in ({}, {"rho": 5.0}, {"aia_variant": "no-first"}, {"aia_targets": "flux"})]
    plain, strong, without, other = (train.fixed_lambdas(text) for text in words)
    assert strong == pytest.approx({task: 10 * value for task, value in plain.items()}, rel=0.01)
    assert without["und"] == plain["und"] == other["und"] and len({plain["gen"], without["gen"], other["gen"]}) == 3
