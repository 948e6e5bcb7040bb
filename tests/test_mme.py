"""Claims about MME: reading answers, scores of tasks, and broken files (benchmarks/mme.py)."""

import pytest

from benchmarks.mme import MME_TASKS, mme_parse, mme_score
from parts.settings import InputError


def mme_file(*answers):
    """Text of a task's file from "gold/answer" pairs such as "Yes/no"."""
    return "".join(f"{i // 2}.jpg\tIs it?\t" + answer.replace("/", "\t") + "\n" for i, answer in enumerate(answers))


PERFECT = {task: mme_file("Yes/Yes", "No/No") for task in MME_TASKS}


@pytest.mark.parametrize("text, expected", [
    *((text, "yes") for text in ("Yes", "yes\n", "eyes", "Yes, no")),
    *((text, "no") for text in ("NO\n", "**No**", "know", "not sure", "canoe", "  no")),
    *((text, "other") for text in ("**Yes**", "  yes", "I cannot", "", "\n", "The answer is no"))])
def test_mme_reads_the_first_four_characters(text, expected):
    """First "yes", then "no" is searched for anywhere among them, in upper or lower case."""
    assert mme_parse(text) == expected


def test_mme_adds_accuracy_and_pictures_with_both_right():
    """The worked examples: 75 + 50 for color, 66.67 + 33.33 for OCR, 200 for each other of the 10 + 4 tasks."""
    color = mme_file("Yes/Yes", "No/no", "Yes/yes", "No/The answer is no")
    ocr = mme_file("Yes/no", "No/no", "Yes/yes", "No/yes", "Yes/yes", "No/no")
    report = mme_score(PERFECT | {"color": color, "OCR": ocr})
    assert report["tasks"]["color"] == 125
    assert report["tasks"]["OCR"] == pytest.approx(100)
    assert (report["perception"], report["cognition"]) == (pytest.approx(1825), 800)
    assert (report["total"], report["skipped"]) == (pytest.approx(2625), 0)
    assert sum(lines for _, lines in MME_TASKS.values()) == 2374


@pytest.mark.parametrize("text, score, skipped", [
    (mme_file("Yes/yes", "No/no\tor yes", "Yes/yes", "No/no"), 150, 1),         # 3 of 3 answers, 1 of 2 pictures
    ("no tabs\nat all\n", 0, 2), (mme_file("Yes/maybe", "No/"), 0, 0),          # the official table would fail here
    (mme_file("YES/Yes\u2028it is", "No/No").replace("\n", "\r\n").rstrip(), 200, 0)])
def test_mme_skips_a_line_without_four_fields_but_keeps_its_picture(text, score, skipped):
    """Such a line counts as no answer. Only line ends of files split the text, those of Windows included."""
    report = mme_score(PERFECT | {"count": text})
    assert (report["tasks"]["count"], report["skipped"]) == (score, skipped)


@pytest.mark.parametrize("text, message", [
    (mme_file("Yes/yes", "No/no", "Yes/yes"), "MME color, line 3: .*two lines for each picture"),
    ("", "MME color, line 0"),
    (mme_file("Yes/yes", "Maybe/no"), "MME color, line 2: the third field is 'Maybe'; make it Yes or No")])
def test_mme_refuses_files_that_stop_the_official_program(text, message):
    """An odd number of lines shifts the pairs, and a third gold answer is a mistake; the message names the line."""
    with pytest.raises(InputError, match=message):
        mme_score(PERFECT | {"color": text})
    with pytest.raises(InputError, match="MME OCR: there is no OCR.txt"):
        mme_score({task: text for task, text in PERFECT.items() if task != "OCR"})
