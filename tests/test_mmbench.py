"""Claims about MMBench: prompts, reading letters, CircularEval, the judge, the submission (benchmarks/mmbench.py)."""

import base64
import hashlib

import pytest
from made_benchmarks import Script, answers, command, judged, mmbench_files, mmbench_rows, png, refused, written

from benchmarks.common import LETTER_ONLY
from benchmarks.mmbench import (
    mmbench_groups,
    mmbench_infer,
    mmbench_judge_prompt,
    mmbench_open,
    mmbench_prompt,
    mmbench_score,
)

PETS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


def test_mmbench_prompts_strip_nothing_and_skip_missing_options():
    """AIA puts the bare hint first; VLMEvalKit labels it and adds blank lines."""
    row = {"question": "Who? ", "A": "x", "B": None, "C": "z", "F": "never"}
    asked = "Who? \nA. x\nC. z\n"
    assert mmbench_prompt(row) == asked + LETTER_ONLY
    assert mmbench_prompt({**row, "hint": "look"}) == "look\n" + asked + LETTER_ONLY
    assert mmbench_prompt(row, "vlmevalkit") == f"\n{asked}\n{LETTER_ONLY}"
    assert mmbench_prompt({**row, "hint": "h"}, "vlmevalkit") == f"\nHint: h\n{asked}\n{LETTER_ONLY}"


@pytest.mark.parametrize("answer, letter", [
    ("The answer is (B).", "B"), ("It is A dog that I can see", "D"), ("a small white rabbit", "B"),
    ("rabbit or cat", False), ("C.", "C"), ("A, B", False), ("Z", "Z"), ("it is Z or A", "A"), ("B?", False),
    ("I choose A over all of them", False), ("I choose A over all of", "A"), ("A is what I choose so A", False),
    ("My answer is Apple", "A"), ("the correct ANSWER  is **c**, not A, B", "C"), ("answer is E or so", False),
    ("Sorry, I can't help with images of people yet. B", "Z"), ("I can't process this file.", "Z"),
    ("I'm sorry, but without the image provided", "Z"), ("Cannot determine the answer", "Z"),
    ("cannot determine the answer", False), ("Failed to obtain answer via API A", False),
    ("Failed to obtain answer via API: cat", "C"), ("some animal", False), (None, False), ("", False),
    ("rabbit " * 7, False), ("rabbit " * 6, "B")])
def test_mmbench_infer_reads_letters_near_the_end_then_phrases_then_option_texts(answer, letter):
    """Far from the end, A may be an article; a text over twice as long as all options is not matched with them."""
    assert mmbench_infer(answer, PETS) == letter


def test_mmbench_infer_takes_unusual_options():
    """Options may be numbers or empty, and a letter may be Z."""
    assert mmbench_infer("it's 12", {"A": 12, "B": 1000}) == "A"
    assert mmbench_infer("x", {"A": "", "B": "yes"}) == "A"
    assert mmbench_infer("Z", {"A": "no", "Z": "yes"}) == "Z"
    assert mmbench_infer("answer is D", {"A": "no", "B": "yes"}) is False


def test_mmbench_judge_prompt_fills_each_field_once():
    """Braces in a question are text, not fields, so all fields are filled in one pass."""
    filled = mmbench_judge_prompt("{p}?", {"A": "x", "C": 3}, "said", "Q {q} O {o}P {p}{r}")
    assert filled == "Q {p}? O There are several options: \nA. x\nC. 3\nP said{r}"
    with pytest.raises(ValueError, match="judge-prompt file"):
        mmbench_judge_prompt("?", {}, "", None)


def test_mmbench_circular_wants_every_copy_and_vanilla_the_first():
    """Question 2 is right as asked first and wrong with its options rotated."""
    rows = mmbench_rows(["B", "C.", "It is a rabbit", "A"], ["A", "A"])
    circular = mmbench_score(rows)
    vanilla = mmbench_score(rows[::-1], circular=False)
    assert circular["hit"] == {1: 1, 2: 0}
    assert circular["report"] == {"Overall": 0.5, "CP": 1.0, "LR": 0.0, "kind 1": 1.0, "kind 2": 0.0}
    assert vanilla["hit"] == {1: 1, 2: 1}
    assert vanilla["report"]["Overall"] == 1.0


def test_mmbench_without_a_judge_unreadable_is_wrong():
    """VLMEvalKit's exact matching gives no partial credit."""
    rows = mmbench_rows(["B", "C", "D", "some animal"], ["A", "B"])
    assert mmbench_score(rows)["hit"] == {1: 0, 2: 1}
    assert mmbench_score(rows)["report"]["Overall"] == 0.5
    assert mmbench_score(mmbench_rows(["hm"], ["A"]), circular=False)["hit"] == {1: 0, 2: 1}


@pytest.mark.parametrize("first, replies, hit, calls", [
    (["B", "C", "D", "some animal"], ["A"], 1, 1), (["B", "C", "D", "some animal"], ["hm", "", "(A)"], 1, 3),
    (["some animal", "C", "D", "C"], [], 0, 0), (["some animal", "C", "D", "Z"], [], 0, 0),
    (["hm", "C", "hm", "A"], ["C"], 0, 1), (["hm", "C", "hm", "A"], ["B", "D"], 1, 2),
    (["hm", "C", "D", "A"], ["Failed to obtain answer via API B", "?", "?"], 0, 3), (["B", "C", "D", "A"], [], 1, 0)])
def test_mmbench_asks_the_judge_only_where_it_decides(first, replies, hit, calls):
    """A wrong letter anywhere ends the group without a call; after three unreadable replies the rng decides, here Z."""
    judge, rng = Script(*replies), Script()
    result = mmbench_score(mmbench_rows(first, ["A", "B"]), judge=judge, rng=rng, template="{q} {o} {p}")
    assert result["hit"] == {1: hit, 2: 1}
    assert len(judge.calls) == calls
    assert rng.calls == ([["A", "B", "C", "D", "Z"]] if "Failed" in "".join(replies) else [])
    assert all(settings == {"temperature": 0, "max_tokens": 2048, "system": None} for _, settings in judge.calls)


def test_mmbench_groups_need_their_main_row_and_open_ones_are_listed():
    """A group holds exactly the rows present, in order of index; rows that need the judge can be listed for export."""
    rows = mmbench_rows(["B", "C", "hm", "A"], ["A", "B"])
    groups = mmbench_groups([rows[2], rows[0], rows[5]])
    assert {index: [row["index"] for row in group] for index, group in groups.items()} == {1: [1, 2_000_001]}
    assert mmbench_open(groups[1]) == [rows[2]]
    assert mmbench_open(rows[:2]) == 1
    assert list(mmbench_groups(rows, circular=False).values()) == [[rows[0]], [rows[4]]]


def test_mmbench_report_lets_a_later_group_overwrite():
    """Groups of both columns share one table, so equal names collide."""
    rows = mmbench_rows(["B"], ["B"])
    rows[1]["category"] = "coarse_perception"
    assert mmbench_score(rows)["report"] == {"Overall": 0.5, "CP": 0.0, "LR": 0.0, "kind 1": 1.0}


def test_mmbench_takes_no_other_benchmarks_table(tmp_path, capsys):
    """VLMEvalKit keeps the tables of all benchmarks in one folder: only MMBench's count, and no guess among several.
    What was scored is named on the screen and in scores.json."""
    pytest.importorskip("openpyxl")
    folder = tmp_path / "data"
    preds = answers(tmp_path / "said.jsonl", mmbench_files(folder))
    whole = (folder / "mmbench_dev_20230712.tsv").rename(tmp_path / "whole.tsv").read_bytes()
    written(folder / "AI2D_TEST.tsv", whole)
    flags = ("mmbench", tmp_path, "--preds", preds)
    assert "data holds no mmbench*.tsv or MMBench*.tsv: give --data" in refused(capsys, *flags)
    written(folder / "MMBench_DEV_EN.tsv", whole)
    assert command(*flags)["data"] == "MMBench_DEV_EN.tsv"
    assert "data MMBench_DEV_EN.tsv" in capsys.readouterr().out
    written(folder / "MMBench_DEV_CN.tsv", whole)
    assert refused(capsys, *flags).endswith("data holds 2 candidates (MMBench_DEV_CN.tsv, MMBench_DEV_EN.tsv): give "
                                            "--data the file itself")
    assert command(*flags, "--data", folder / "MMBench_DEV_CN.tsv")["data"] == "MMBench_DEV_CN.tsv"
    written(folder / "mmbench_dev_20230712.tsv", whole)             # the paper's file
    assert command(*flags)["data"] == "mmbench_dev_20230712.tsv"


def test_mmbench_pictures_may_be_wrapped_into_lines(tmp_path):
    """The official reader ignores line breaks in base64."""
    pytest.importorskip("openpyxl")
    picture = base64.encodebytes(png(size=(64, 64))).decode()
    assert "\n" in picture.strip()
    said = mmbench_files(tmp_path / "data", image=picture)
    assert command("mmbench", tmp_path, "--preds", answers(tmp_path / "said.jsonl", said))["score"] == 50


def test_mmbench_submission_is_the_table_with_the_letters(tmp_path):
    """The columns that the server wants, `prediction` behind D; text that looks like a formula stays text."""
    openpyxl = pytest.importorskip("openpyxl")
    given = mmbench_files(tmp_path / "data", question="=1+1\x07?") | {"1000001": "=C\x07"}
    found = command("mmbench", tmp_path, "--preds", answers(tmp_path / "said.jsonl", given))
    sheet = openpyxl.load_workbook(tmp_path / "out/results.xlsx").active
    rows = [*sheet.values]
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[2] == (1000001, "=1+1?", "dog", "bear", "rabbit", "cat", "=C", "C", "dev")
    assert rows[5] == (2, "=1+1?", "yes", "no", None, None, "A", "A", "dev")
    assert sheet["B3"].data_type == "s"
    assert found["report"]["LR"] == 0


def test_mmbench_asks_its_judge_about_what_cannot_be_read(tmp_path):
    """One row of each question: it decides question 1, while question 2 has a wrong row and is open only in the score
    without rotations. Both scores read the replies from the first one. The hash names an unknown prompt."""
    prompt = written(tmp_path / "prompt.txt", "{q}|{o}|{p}")
    given = mmbench_files(tmp_path / "data", first="BCDA") | {"1": "some animal", "2": "hm"}
    preds = answers(tmp_path / "said.jsonl", given)

    def judge(request):
        return ["A"] if request["prompt"].endswith("\n|hm") else ["who knows", "B", "C"]

    found, rounds = judged("mmbench", tmp_path, judge, "--preds", preds, "--judge-prompt", prompt, "--force")
    assert [len(requests) for requests in rounds] == [2]
    assert (found["score"], found["vanilla"]) == (50, 100)
    assert found["judge_prompt"] == hashlib.sha256(b"\1|\2|\3").hexdigest()
