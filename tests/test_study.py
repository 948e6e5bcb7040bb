"""Claims about the study: rows, seeds, intervals and verdicts (lab/study.py)."""

import json
import math
import re
import shutil
import signal
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import aia
import lab.study
import train
from lab.study import ROWS, STUDENT, by_row, claims_of, finished_rows, interval, needs, summary_of
from parts.settings import InputError, write_json
from parts.world import world_of


def made_up_row(name, seed, und, gen, lift=0.0):
    """A row of a study with given scores; lift moves its curves."""
    row = {"row": name, "seed": seed, "und": und, "gen": gen, "seconds": 60.0, "ntp_und": 1 - und, "ntp_gen": 1 - gen,
           "alignment": {"und": [0.1, 0.2, 0.3], "gen": [0.1, 0.3, 0.2]}}
    for task, curve in (("gen", [0.1, 0.2, 0.3]), ("und", [0.3, 0.2, 0.1])):
        row |= {f"{task}_curve": [x + lift for x in curve], f"distance_{task}": 0.2 - lift, f"std_{task}": 0.05}
    return row


def test_the_study_pairs_rows_by_seed():
    """Seeds differ more than rows do, so a row is compared with the plain one of the same seed."""
    plain = [made_up_row("unified", seed, 0.5 + 0.1 * seed, 0.4) for seed in range(4)]
    tuned = [made_up_row("aia", seed, 0.52 + 0.1 * seed + 0.001 * (seed % 2), 0.4) for seed in range(4)]
    summary = summary_of(plain + tuned)
    row, found = summary["aia"]["und"], summary["aia"]["difference"]["und"]
    assert found["mean"] == pytest.approx(0.0205) and found["interval"] < 0.001 < row["interval"]
    differences = [0.02, 0.021, 0.02, 0.021]
    half = 3.182 * statistics.stdev(differences) / 2                            # t of three degrees of freedom
    assert found["interval"] == pytest.approx(half) and "difference" not in summary["unified"]


def test_experts_are_one_row_of_two_runs():
    """Each is judged by its own task only."""
    rows = [made_up_row("expert-gen", 0, 0.0, 0.9), made_up_row("expert-und", 0, 0.8, 0.0, 0.1)]
    joint = by_row(rows)["experts"][0]
    assert (joint["und"], joint["gen"]) == (0.8, 0.9)
    assert joint["und_curve"] == rows[1]["und_curve"] and joint["gen_curve"] == rows[0]["gen_curve"]
    assert (joint["ntp_und"], joint["ntp_gen"], joint["seconds"]) == pytest.approx((0.2, 0.1, 120))


def test_a_conflict_is_what_the_experts_of_a_setting_gain():
    """Each setting has experts of its own, in its world, and seeds that miss one of the three runs do not count."""
    rows = [made_up_row(name, seed, und, gen) for seed in (0, 1) for name, und, gen in (
        ("unified", 0.9, 0.8), ("expert-und", 0.9, 0.0), ("expert-gen", 0.0, 0.7),
        ("crowd", 0.5, 0.4), ("crowd-und", 0.6, 0.0), ("crowd-gen", 0.0, 0.6))]
    summary = summary_of(rows + [made_up_row("crowd", 2, 0.5, 0.4), made_up_row("half", 0, 0.5, 0.4)])
    assert [name for name, row in summary.items() if row["baseline"]] == ["experts", "crowd-experts"]
    found = {key: part["mean"] for key, part in summary["crowd-experts"]["difference"].items()}
    assert found == pytest.approx({"und": 0.1, "gen": 0.2, "both": 0.15, "ntp_und": -0.1, "ntp_gen": -0.2})
    assert summary["crowd-experts"]["paired"] == [0, 1]
    assert summary["experts"]["difference"]["gen"]["mean"] == pytest.approx(-0.1)


def test_every_row_of_the_study_is_a_run():
    """Its flags are settings, it begins from a row, and both arms of a comparison begin from the same weights."""
    for name, row in ROWS.items():
        config = train.TrainConfig(**row.flags | ({"aia_targets": ""} if "aia_targets" in row.flags else {}))
        train.plan(replace(config, init="folder" if row.start else ""))
        world_of({"seed": 0, "shapes": config.shapes, "colours": config.colours, "objects": config.objects})
        assert {*needs(name), row.baseline} - {""} <= {*ROWS}
        if name.endswith("+aia"):
            start, plain = row.start or name, ROWS[row.baseline]
            assert row.baseline == name.removesuffix("+aia") and start in (plain.start, f"{row.baseline}/before")
            assert row.flags | lab.study.OFF == plain.flags
    assert needs("tuned+aia") == ["janus"]
    assert needs("experts-curves") == ["expert-gen", "expert-und", "aia"]


@pytest.mark.parametrize("gains, verdict", [
    ([0.1, 0.11, 0.12], "holds"), ([-0.1, -0.11, -0.12], "does not hold"), ([0.1, -0.1, 0.05], "not decided here"),
    ([0.1], "not decided here"), ([], "not decided here")])
def test_a_verdict_needs_an_interval_without_zero(gains, verdict):
    """One seed decides nothing, however large its figure."""
    rows = [made_up_row("unified", seed, 0.5, 0.5) for seed in range(3)]
    rows += [made_up_row("aia", seed, 0.5 + gain, 0.5) for seed, gain in enumerate(gains)]
    claim = next(claim for claim in claims_of(rows) if claim["claim"] == "AIA improves understanding")
    assert claim["verdict"] == verdict and claim["seeds"] == len(gains)
    stable = next(claim for claim in claims_of(rows) if claim["claim"].startswith("patterns"))
    assert stable["figure"] == pytest.approx(0.08)


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
    published, found = tmp_path / "assets.json", [made_up_row("aia", 0, 0.5, 0.5)]
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


def test_a_claim_about_several_rows_needs_all_of_them():
    """The best of some rows is above their mean by chance alone, so each is compared on its own."""
    def decided(low, high):
        rows = [made_up_row(name, seed, 0.5 + gain + 0.01 * seed * (name == "aia"), 0.5) for seed in range(3)
                for name, gain in (("aia", 0.0), ("rho-1", low), ("rho-100", high))]
        return next(claim for claim in claims_of(rows) if claim["claim"].startswith("rho"))
    assert decided(-0.2, -0.3)["verdict"] == "holds" and decided(-0.2, 0.1)["verdict"] == "does not hold"
    assert decided(-0.2, 0.005)["verdict"] == "not decided here"
    assert decided(-0.2, -0.3)["figure"] == pytest.approx(0.105)


def test_the_shared_model_lies_between_in_each_task():
    """Above one expert and below the other on average is not enough."""
    rows = [made_up_row(name, seed, 0.5, 0.5) for seed in range(3) for name in ("unified", "expert-gen", "expert-und")]
    for row in rows:                                # experts end at 0.3 and 0.2
        if row["row"] == "unified":
            row["alignment"] = {"und": [0.1, 0.2, 0.25], "gen": [0.1, 0.2, 0.15 + 0.001 * row["seed"]]}
    claim = next(claim for claim in claims_of(rows) if "lies between" in claim["claim"])
    assert claim["figure"] == pytest.approx(-0.049) and claim["verdict"] == "does not hold"


CURVES = {"low": [0.1, 0.2, 0.3], "high": [0.3, 0.4, 0.5], "middle": [0.2, 0.3, 0.4], "falling": [0.3, 0.2, 0.1]}


@pytest.mark.parametrize("claim, good, bad", [
    ("the two tasks' curves", {"unified": {"gen_curve": "low", "und_curve": "falling"}},
     {"unified": {"gen_curve": "low", "und_curve": "high"}}),
    ("more decoupling", {"unified": {"und_curve": "low"}, "unifork-1": {"und_curve": "middle"}},
     {"unified": {"und_curve": "middle"}, "unifork-1": {"und_curve": "low"}}),
    ("AIA moves", {"aia": {"distance_gen": 0.1}}, {"aia": {"distance_gen": 0.3}}),
    ("AIA improves und", {"aia": {"und": 0.6}}, {"aia": {"und": 0.4}}),
    ("AIA improves gen", {"aia": {"gen": 0.6}}, {"aia": {"gen": 0.4}}),
    ("at half width AIA", {"half+aia": {"gen": 0.6}}, {"half+aia": {"gen": 0.4}}),
    ("at half width forked", {"half+fork": {"gen": 0.6}}, {"half+fork": {"gen": 0.4}}),
    ("forked beats shared", {"unifork-2": {"gen": 0.6}}, {"unifork-2": {"gen": 0.4}}),
    ("forked beats shared of", {"unifork": {"gen": 0.6}}, {"unifork": {"gen": 0.4}}),
    ("alignment rises in", {}, {"expert-und": {"alignment": {"und": [0.3, 0.2, 0.1], "gen": [0.1, 0.3, 0.2]}}}),
    ("alignment rises and", {}, {"expert-gen": {"alignment": {"und": [0.1, 0.2, 0.3], "gen": [0.1, 0.2, 0.3]}}}),
    ("Huber", {"no-huber": {"und": 0.4}}, {"no-huber": {"und": 0.6}}),
    ("stages", {"raw": {"und": 0.4}}, {"raw": {"und": 0.6}})])
def test_a_claim_holds_where_its_rows_say_so_and_not_in_their_mirror(claim, good, bad):
    """Operands or signs that are the wrong way round would report the contrary of what was found."""
    def verdict(changes):
        rows = []
        for seed in range(3):
            for place, name in enumerate(("unified", "aia", "expert-und", "expert-gen", "unifork-1", "unifork-2",
                                          "unifork", "wide", "raw", "no-huber", "half", "half+aia", "half+fork")):
                row = made_up_row(name, seed, 0.5, 0.5) | {"und_curve": CURVES["high"], "gen_curve": CURVES["low"]}
                row |= {key: CURVES[value] if isinstance(value, str) else value
                        for key, value in changes.get(name, {}).items()}
                little = 0.0003 * seed * (place + 1)                            # no two seeds or rows are alike

                def bent(curve, little=little):
                    return [x + little * i * i for i, x in enumerate(curve)]
                for task in aia.TASKS:
                    row |= {task: row[task] + little, f"distance_{task}": row[f"distance_{task}"] + little,
                            f"{task}_curve": bent(row[f"{task}_curve"])}
                rows.append(row | {"alignment": {task: bent(curve) for task, curve in row["alignment"].items()}})
        names = [entry["claim"] for entry in claims_of(rows)]
        name = claim if claim in names else next(name for name in names if name.startswith(claim))
        return next(entry["verdict"] for entry in claims_of(rows) if entry["claim"] == name)
    assert (verdict(good), verdict(bad)) == ("holds", "does not hold")


@pytest.mark.parametrize("claim, better, worse", [
    ("a plan improves colour attribution", ("mixed", "plan_by_skill"), ("mixed", "plain_by_skill")),
    ("a plan improves colour attribution (Janus-Pro)", ("mixed-janus", "plan_by_skill"),
     ("mixed-janus", "plain_by_skill")),
    ("a plan improves the mean of all skills", ("mixed", "plan"), ("mixed", "plain")),
    ("AIA keeps what is done in turn (it loses less than 0.02)", ("mixed+aia", "edit"), ("mixed", "consistent")),
    ("a second encoder has to look again", ("mixed-janus", "third"), ("mixed-codes", "plan")),
    ("a fork costs what is done in turn", ("mixed", "edit"), ("mixed-fork", "third"))])
def test_what_is_done_in_turn_is_judged_the_right_way_round(claim, better, worse):
    """Each claim holds where its row gains, and does not where what it is compared with does."""
    def verdict(name, score):
        rows = []
        for seed in range(3):
            for row in ("mixed", "mixed+aia", "mixed-janus", "mixed-codes", "mixed-fork"):
                made = made_up_row(row, seed, 0.5, 0.5) | dict.fromkeys(lab.study.MIXED_SCORES, 0.5)
                made |= {f"{way}_by_skill": {"colour attribution": 0.5} for way in ("plan", "plain")}
                gain = 0.3 + 0.01 * seed
                if row == name:
                    made[score] = {"colour attribution": 0.5 + gain} if score.endswith("skill") else 0.5 + gain
                rows.append(made)
        return next(entry["verdict"] for entry in claims_of(rows) if entry["claim"] == claim)
    assert (verdict(*better), verdict(*worse)) == ("holds", "does not hold")


def test_a_loss_within_the_margin_counts_as_none():
    """So that "AIA loses nothing" can be found true, and not only left open."""
    rows = [made_up_row(name, seed, 0.5, 0.5) | dict.fromkeys(lab.study.MIXED_SCORES, 0.5 - loss - 0.001 * seed)
            for name, loss in (("mixed", 0.0), ("mixed+aia", 0.01)) for seed in range(3)]
    for row in rows:
        row |= {f"{way}_by_skill": {"colour attribution": 0.5} for way in ("plan", "plain")}
        if row["row"] == "mixed+aia":
            row["edit"] += 0.002 * row["seed"]      # no two seeds are alike
    claim = next(entry for entry in claims_of(rows) if entry["claim"].startswith("AIA keeps"))
    assert claim["verdict"] == "holds" and 0.009 < claim["figure"] < 0.012


def test_intervals_are_those_of_students_distribution():
    """Its quantile has a closed form for 1, 2 and 4 degrees of freedom."""
    p = 0.975
    two, q = (2 * p - 1) / (2 * p * (1 - p)) ** 0.5, 4 * p * (1 - p)
    four = 2 * (math.cos(math.acos(q**0.5) / 3) / q**0.5 - 1) ** 0.5
    assert STUDENT[:2] + STUDENT[3:4] == pytest.approx((math.tan(math.pi * (p - 0.5)), two, four), abs=1e-3)
    assert list(STUDENT) == sorted(STUDENT, reverse=True) and STUDENT[-1] > 1.96
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, two / 3**0.5), abs=1e-3)
    assert interval([1.0, 2.0]) == (1.5, None)


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
    rows = {"target": [0.2], "after": {"intensity": [0.1], "std": [0.1], "ntp": 1.0, "aia": 0.1}}
    for seed, topics in ((0, "und_by_topic"), (1, "und_by_kind")):
        folder = tmp_path / f"raw-seed{seed}"
        folder.mkdir()
        write_json({"gen": rows, "und": rows}, folder / "curves.json")
        write_json({"und": 0.5, "gen": 0.5, "seconds": 1.0, "rss_gb": 0.5 + seed}, folder / "result.json")
        write_json({topics: {"count": 0.25 + 0.5 * seed}, "gen_by_skill": {"colours": seed}, "psnr": 30 + seed,
                    "story": [1.0, seed]}, folder / "scores.json")
        write_json({"seed": seed}, folder / "settings.json")
    row = summary_of(finished_rows(tmp_path))["raw"]
    assert (row["und_by_topic"], row["gen_by_skill"]) == ({"count": 0.5}, {"colours": 0.5})
    assert (row["psnr"], row["rss_gb"]) == (30.5, 1.0) and "reader" not in row and row["story"] == [1.0, 0.5]
