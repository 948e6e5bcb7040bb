"""Claims about MMVP: prompts, the score of pairs, and the official judge (benchmarks/mmvp.py)."""

import json

import pytest
from made_benchmarks import Script, answers, judged, mmvp_files

from benchmarks.common import LETTER_ONLY
from benchmarks.mmvp import mmvp_grade, mmvp_options, mmvp_prompt, mmvp_score


def test_mmvp_prompts_letter_the_options_or_keep_them():
    """AIA turns (a) and (b) into lettered lines; MMVP's own prompt keeps the column unchanged."""
    row = {"Question": "Is it open?", "Options": "(a) Open (b) Closed"}
    assert mmvp_options(row["Options"]) == {"A": "Open", "B": "Closed"}
    assert mmvp_prompt(row) == "Is it open?\nA. Open\nB. Closed\n" + LETTER_ONLY
    assert mmvp_prompt(row, "official") == "Is it open? (a) Open (b) Closed"


@pytest.mark.parametrize("hits, pairs, single", [("11101100", 0.5, 0.625), ("11011", 0.5, 0.8)])
def test_mmvp_score_wants_both_rows_of_a_pair(hits, pairs, single):
    """Rows are paired in file order, and an odd last row has no partner."""
    preds = ["A" if hit == "1" else "a" for hit in hits]
    assert mmvp_score(preds, ["A"] * len(hits)) == pairs
    assert mmvp_score(preds, ["A"] * len(hits), size=1) == single


@pytest.mark.parametrize("reply, right", [("yes", True), ("YES", True), ("yes.", False), (" yes", False),
                                          ("yes\n", False), ("no", False)])
def test_mmvp_grader_wants_exactly_yes(reply, right):
    """The official test is for equality, so a full stop makes a no."""
    judge = Script(reply)
    assert mmvp_grade("Is it? (a) x (b) y", "(a)", "x", judge) is right
    prompt, settings = judge.calls[0]
    assert prompt == ("Given the following question Is it? (a) x (b) y, the correct answer is (a). "
                      "Does the following answer correctly answers the question, answer:x?")
    assert settings["temperature"] == 0.2
    assert settings["system"].endswith("Please answer in only yes or no.")


def test_mmvp_official_is_judged(tmp_path):
    """One reply of eight is not exactly yes and costs its pair; the free answers are stored."""
    preds = answers(tmp_path / "said.jsonl", mmvp_files(tmp_path / "data"))

    def judge(request):
        return ["yes." if "answer:open?" in request["prompt"] else "Yes"]

    found, rounds = judged("mmvp", tmp_path, judge, "--preds", preds, "--variant", "official")
    assert (found["score"], found["rows"]) == (75, 87.5)
    assert rounds[0][0]["temperature"] == 0.2
    assert json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[3])["answer"] == "(b)"
