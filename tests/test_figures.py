"""Claims about the figures of runs and of the paper (lab/figures.py)."""

import json
import re

import numpy as np
import pytest
from made_folders import command, made_up
from PIL import Image

import aia
import lab.figures
from parts.plots import save_figure
from parts.settings import write_json


def test_figures_hold_the_numbers_of_the_runs_and_of_the_paper(tmp_path, monkeypatch):
    """By hand: deviations (-2, -1, 3) and (3, -1, -2) correlate by -11/14, distances are means of three; runs of one
    name get the folder above, and what is not known (a task's samples, the kind of the model) is left out."""
    paper = json.loads(aia.CURVES.read_text())
    paper["fig1"]["janus_pro"]["I2T"] = mark = [0.123, 0.456, 0.789]
    write_json(paper, tmp_path / "paper.json")
    monkeypatch.setattr(aia, "CURVES", tmp_path / "paper.json")
    write_json({"gen": {"intensity": [0.1, 0.1, 0.1]}, "stages": {}}, tmp_path / "flux.json")
    own = {"target": [0, 0], "public": {"intensity": [0.2, 0.3], "std": [0.1, 0.1], "sink": [0.4, 0.5]}}
    write_json({"gen": own | {"public": None}, "und": own}, tmp_path / "own.json")
    drawn, inner = {}, save_figure

    def look(figure, panels, file, *how, **more):
        drawn[file.stem] = {(i, line.get_label()): list(line.get_ydata()) for i, panel in enumerate(panels)
                            for line in panel.get_lines()}
        inner(figure, panels, file, *how, **more)
    monkeypatch.setattr(lab.figures, "save_figure", look)
    command("figures", made_up(tmp_path / "a/run"), made_up(tmp_path / "b/run", "tiny-janus") / "curves.json",
            tmp_path / "own.json", "--references", tmp_path / "flux.json", "--out", tmp_path / "new")
    found = json.loads((tmp_path / "new/figures.json").read_text())
    assert all(Image.open(tmp_path / f"new/fig{i}.png").size[0] > 1000 for i in (1, 3, 4, 5))
    first, _, last = found["fig1"].values()
    row = first["tasks"]["gen"]["before"]
    assert row["distance_to_target"] == pytest.approx(0.3) and (row["uniform"], row["sink"]) == (0.25, None)
    theirs = np.abs(np.subtract([0.1, 0.2, 0.6], aia.resample(paper["fig4"]["flux"]["T2I"], 3))).mean()
    assert [row["distance_to_references"][x] for x in ("flux (here)", "flux")] == pytest.approx([0.2, theirs])
    assert (first["correlation"], last["correlation"]) == (pytest.approx(-11 / 14), None)
    assert last["tasks"]["und"]["public"]["sink"] == [0.4, 0.5]
    table = [found["table1"]["b/run"][x] for x in ("gen", "und", "mean", "paper")]
    assert table == pytest.approx([0.2, 0.1, 0.15, 0.02])
    assert found["fig3"]["a/run"] == {"gen": {"step": [1, 2, 4], "ntp": [1, 0.5, 0.25]}} and len(found["fig3"]) == 2
    assert found["fig5"]["a/run"]["und"] == {"before": [0.6, 0.2, 0.1], "target": [0.1, 0.2, 0.3]}
    assert drawn["fig1"][1, "understanding, Janus-Pro (paper)"] == mark
    assert [label for i, label in drawn["fig1"] if i == 2] == ["understanding"]
    assert drawn["fig4"][1, "qwen3-32b"] == paper["fig4"]["qwen3_32b"]["I2T"]
    assert drawn["fig5"][0, "Emu3 with AIA (paper)"] == paper["fig5"]["emu3_with_aia"]["T2I"]
    assert drawn["fig3"][0, "Emu3 (paper), 1:1 to 50:1"] == [loss for _, loss in paper["fig3"]["emu3"]["joint_1:1"]]


@pytest.mark.parametrize("words, message", [
    ("figures", "needs run folders"), ("figures EMPTY", "curves.json is missing: give the folder of a finished"),
    ("figures BAD", "is damaged.*make it again"), ("figures HF.json", "no curves of a run.*--references"),
    ("figures RUN --references BAD", "no reference curve"), ("figures RUN --out HF.json", "folder cannot be created"),
    ("report EMPTY", "no settings.json"), ("report RUN --out none/page.html", "page.html cannot be written"),
    ("alignment --checkpoint TINY --n 20", "20 different pairs .*are too few.*give more"),
    ("alignment --checkpoint TINY --out none/a.png", "a.png cannot be written")])
def test_figures_and_pages_name_what_they_miss(words, message, runs, tmp_path, capsys, monkeypatch):
    """One line with cause and remedy, exit status 2."""
    monkeypatch.chdir(tmp_path)
    made_up(tmp_path / "EMPTY/RUN").replace("RUN")
    made_up(tmp_path / "BAD", after={"intensity": [0.1]})
    write_json({"gen": {"intensity": [0.1, 0.2, 0.3]}}, "HF.json")
    with pytest.raises(SystemExit) as stop:
        command(*(str(runs["tiny-emu3"]) if word == "TINY" else word for word in words.split()))
    line, = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and re.search(message, line)


def test_a_study_is_drawn_with_its_intervals(tmp_path, capsys):
    """One seed has no interval; the two runs that make up the experts are one row; each group has a heading."""
    part, far = {"mean": 0.1, "interval": None}, {task: {"distance": 0.1} for task in aia.TASKS}
    rows = {**{name: far | {"seeds": [0], "baseline": ""} for name in ("unified", "expert-gen")},
            **{name: far | {"seeds": [0, 1], "baseline": "unified", "paired": [0],
                            "difference": {"und": part, "gen": part | {"interval": 0.05}}}
               for name in ("raw", "aia", "experts")}}
    write_json({"summary": rows, "moves": {"aia": [[0.1, 0.0], [0.2, 0.1]]}, "machine": {"date": "today"}},
               tmp_path / "study.json")
    command("figures", "--study", tmp_path / "study.json", "--out", tmp_path / "drawn")
    size = Image.open(tmp_path / "drawn/study.png").size
    assert size == (1650, round(150 * (1.3 + 0.24 * 5)))                        # three rows, in two groups
    assert {file.name for file in (tmp_path / "drawn").iterdir()} == {"study.png", "study-moves.png"}
    write_json({"summary": {"raw": rows["raw"]}, "moves": {}, "machine": {"date": "later"}}, tmp_path / "more.json")
    assert lab.figures.joined([tmp_path / "more.json"])["dates"] == ["later"]
    write_json({}, tmp_path / "other.json")
    write_json({"summary": {}, "moves": {}, "machine": None}, tmp_path / "odd.json")
    for name, message in (("other", "give files that lab.study wrote"), ("more", "raw stands in another file"),
                          ("odd", "give files that lab.study wrote, as they are")):
        files = tmp_path / "study.json", tmp_path / f"{name}.json"
        with pytest.raises(SystemExit, match="2"):
            command("figures", "--study", *files, "--out", tmp_path / "not drawn")
        assert message in capsys.readouterr().err and not (tmp_path / "not drawn").exists()


def test_several_files_of_a_study_are_drawn_as_one(tmp_path):
    """Runs of one plan lie in one file; a figure of all rows needs them all."""
    for number, name in enumerate(("raw", "early")):
        write_json({"summary": {name: {"seeds": [number]}}, "moves": {name: [[0.1, number]]},
                    "machine": {"date": str(number)}}, tmp_path / f"{number}.json")
    found = lab.figures.joined([tmp_path / "0.json", tmp_path / "1.json"])
    assert found == {"summary": {"raw": {"seeds": [0]}, "early": {"seeds": [1]}},
                     "moves": {"raw": [[0.1, 0]], "early": [[0.1, 1]]}, "dates": ["0", "1"]}
