"""Claims about MM-Vet: the judge's prompt, reading and repeating its replies, means and files (benchmarks/mmvet.py)."""

import csv
import hashlib
import json

import pytest
from made_benchmarks import Script, answers, judged, mmvet_files, written

from benchmarks.judge import PROMPTS
from benchmarks.mmvet import mmvet_grade, mmvet_prompt, mmvet_score


def test_mmvet_prompt_adds_one_open_row():
    """The official program puts blanks around AND and OR even if there are some already."""
    assert mmvet_prompt("q", "1<AND>2 <OR> 3", "p", "T\n") == "T\n\nq | 1 <AND> 2  <OR>  3 | p | "
    assert mmvet_prompt("q", "a", "p", "T", retry=True).endswith(
        "T\nq | a | p | \nPredict the correctness of the answer (digit): ")


@pytest.mark.parametrize("reply, score", [
    ("1.0", 1), ("0.5 because", 0.5), (".5", 0.5), ("0\n", 0), (" 0.5", None), ("0.5.", None), ("Score: 0.5", None),
    ("1.1", None), ("-0.1", None), ("nan", None), ("", None)])
def test_mmvet_grade_reads_up_to_the_first_blank(reply, score):
    """An unreadable reply costs a second call; nan would pass the official range test and spoil the mean."""
    expected = (0.7, "0.7", 2) if score is None else (score, reply.split(" ")[0].strip(), 1)
    assert mmvet_grade("q", "a", "p", Script(reply, "0.7"), "T") == expected


def test_mmvet_grade_never_reads_the_sixth_reply():
    """Six calls at rising temperatures, then 0 even if the last reply is a number."""
    judge = Script(*["bad"] * 5, "1.0")
    assert mmvet_grade("q", "a", "p", judge, "T") == (0.0, "1.0", 6)
    assert [settings["temperature"] for _, settings in judge.calls] == [0, 0, 0.5, 1, 1.5, 2]
    assert all(settings["max_tokens"] == 3 and settings["system"] is None for _, settings in judge.calls)
    assert ["digit" in prompt for prompt, _ in judge.calls] == [False] + [True] * 5
    assert mmvet_grade("q", "a", "p", Script(*["bad"] * 4, "0.4"), "T") == (0.4, "0.4", 5)


def test_mmvet_scores_questions_capabilities_and_sets():
    """Four questions graded in five calls; a set does not depend on the order of its capabilities."""
    wants = [["rec"], ["ocr", "spat"], ["spat", "ocr"], ["rec", "know", "gen"]]
    metadata = {f"v1_{i}": {"capability": capability} for i, capability in enumerate(wants)}
    judge = Script("1.0", "0.5", "bad", "0.2", "0.3")
    grades = {name: [mmvet_grade("q", "a", "p", judge, "T")[0]] for name in metadata}
    assert list(grades.values()) == [[1], [0.5], [0.2], [0.3]]
    assert len(judge.calls) == 5
    assert mmvet_score({**grades, "other": [1.0]}, metadata) == {
        "total": 50.0, "std": 0.0, "runs": [50.0],
        "capabilities": {"rec": 65.0, "ocr": 35.0, "spat": 35.0, "know": 30.0, "gen": 30.0},
        "sets": {"ocr+spat": 35.0, "rec": 100.0, "gen+know+rec": 30.0}}


def test_mmvet_runs_give_a_mean_and_a_population_deviation():
    """Totals 58.3, 56.7 and 48.3 have mean 54.4 and deviation 4.4, not the 5.4 of a sample."""
    metadata = {"v1_0": {"capability": ["rec"]}}
    score = mmvet_score({"v1_0": [0.583, 0.567, 0.483]}, metadata)
    assert (score["total"], score["std"], score["runs"]) == (54.4, 4.4, [58.3, 56.7, 48.3])
    assert mmvet_score({"v1_0": [0.58349]}, metadata, decimals=2)["total"] == 58.35


def test_mmvet_score_needs_every_question_of_the_metadata():
    """A mean over whatever is present would not be comparable, nor would unequal numbers of runs."""
    metadata = {"a": {"capability": ["rec"]}, "b": {"capability": ["rec"]}}
    with pytest.raises(KeyError):
        mmvet_score({"a": [1.0]}, metadata)
    with pytest.raises(ValueError):
        mmvet_score({"a": [1.0], "b": [1.0, 0.5]}, metadata)


def test_mmvet_is_judged_in_rounds(tmp_path, monkeypatch):
    """The worked example: replies 1.0, 0.5, "bad" and 0.3, then 0.2. In several gradings the last reply repeats."""
    prompt = written(tmp_path / "prompt.txt", "Table\r\n")
    preds = answers(tmp_path / "said.jsonl", mmvet_files(tmp_path / "data"))
    monkeypatch.setitem(PROMPTS, "mmvet", (7, hashlib.sha256(b"Table\r\n").hexdigest()))
    replies = {"0": ["1.0"], "1": ["0.5"], "2": ["bad"], "3": ["0.3", "0.7 so"]}

    def judge(request):
        if "(digit)" in request["prompt"]:              # asked again
            return ["0.2"]
        return replies[request["prompt"].split("\n")[2][0]]

    found, rounds = judged("mmvet", tmp_path, judge, "--preds", preds, "--judge-prompt", prompt, "--runs", 3)
    assert [len(requests) for requests in rounds] == [4, 1]
    assert rounds[0][1] == {"kind": "text", "max_tokens": 3, "prompt": "Table\r\n\n1? | x <AND> y |  v1_1\n | ",
                            "system": None, "temperature": 0.0}
    assert (found["runs"], found["total"], found["judge_prompt"]) == ([50.0, 60.0, 60.0], 56.7, "official")
    graded = json.loads((tmp_path / "out/model_judge-grade-3runs.json").read_text())
    assert graded["v1_3"] == {"model": ["judge"] * 3, "content": ["0.3", "0.7", "0.7"], "score": [0.3, 0.7, 0.7]}
    _, row = csv.reader((tmp_path / "out/model_judge-cap-score-3runs.csv").read_text().splitlines())
    assert row[-3:] == ["56.7", "4.7", "[50.0, 60.0, 60.0]"]
    assert (tmp_path / "out/model_judge-cap-int-score-3runs.csv").read_text().startswith(",rec,ocr+spat,gen+know+rec,")
