"""Claims about MMMU: prompts, both ways to read answers, and MMMU's own evaluator (benchmarks/mmmu.py)."""

import pytest
from made_benchmarks import Script, answers, command, mmmu_files

from benchmarks.common import LETTER_ONLY
from benchmarks.mmmu import (
    MMMU_SUBJECTS,
    mmmu_eval_choice,
    mmmu_eval_open,
    mmmu_letter,
    mmmu_options,
    mmmu_parse_choice,
    mmmu_parse_open,
    mmmu_prompt,
    mmmu_score,
)

FRUIT = {"A": "red apple", "B": "green pear", "C": "bananas", "D": "no fruit"}


def test_mmmu_prompts_show_the_options_and_keep_image_marks():
    """The AIA prompt is one block of lines with stripped options; MMMU's own has (A) and blank lines between blocks."""
    row = {"question": " See <image 1>. ", "options": "[' x ', 'it\\'s']", "question_type": "multiple-choice"}
    assert mmmu_prompt(row) == "See <image 1>.\nA. x\nB. it's\n" + LETTER_ONLY
    assert mmmu_prompt(row, "official") == f" See <image 1>. \n\n(A)  x \n(B) it's\n\n{LETTER_ONLY}"
    row = {"question": "How many?", "options": "[]", "question_type": "open"}
    assert mmmu_prompt(row) == "How many?\nAnswer the question using a single word or phrase."
    assert mmmu_prompt(row, "official") == "How many?\n\nAnswer the question using a single word or phrase."


def test_mmmu_options_are_data_and_never_code():
    """The column comes from a download: a literal parser refuses what eval would run."""
    with pytest.raises(ValueError):
        mmmu_options({"options": "[print('run')]"})


@pytest.mark.parametrize("pred, letter", [
    ("(B)", "A"), ("The answer is B", "A"), ("Because…", "B"), ("Dog", "D"), ("b", "b"), ("", "B"), (" \n", "B"),
    ("7", "7"), ("two bananas, no fruit", "C"), ("Bananas", "B"), ("I see bananas", "C"), ("i see BANANAS", "A")])
def test_mmmu_letter_follows_the_first_character_then_the_option_texts(pred, letter):
    """With options the rule always finds a letter: silence means the second, unreadable text the first."""
    assert mmmu_letter(pred, FRUIT) == letter
    assert mmmu_letter(pred, {}) == pred.strip()


@pytest.mark.parametrize("response, letter", [
    ("The answer is B.", "B"), ("(B) is tempting, but the answer is (C)", "C"),
    ("I would say that this is a green pear", "B"), ("Bananas", None), ("it is bananas for me", None),
    ("A.", "A"), ("A)", None), ("\nA\n", None), ("A\nB", None), ("**A**", None), ("[A]", None), ("A.B", None),
    ("A.,", "A"), ("A,.", None), ("B or A or B", "B"), ("(A) beats B", "A"), ("", None),
    ("not bananas, I rather think of a Red Apple", "A"), ("'B'", "B"), ("A or D", "D")])
def test_mmmu_parse_choice_takes_the_last_marker(response, letter):
    """Letters in brackets win over bare letters, and those over option texts; None is the random fallback, here D."""
    rng = Script()
    assert mmmu_parse_choice(response, list(FRUIT), FRUIT, rng) == (letter or "D")
    assert rng.calls == ([] if letter else [list(FRUIT)])


def test_mmmu_parse_choice_gives_ties_to_the_first_option():
    """Two options with the same text have the same last position, and the first maximum counts."""
    assert mmmu_parse_choice("I think that it is a cat now", ["A", "B"], {"A": "cat", "B": "cat"}, None) == "A"


@pytest.mark.parametrize("response, parsed", [
    ("The answer is 1,000", {0.0, 1000.0}), (".5", {5.0}), ("so x = .5", {0.5}), ("Paris.", {"paris"}),
    ("It is blue\nso the answer is red", {"blue", "red"}), ("a = 3\nb", {"a = 3\nb", 3.0}), ("a\nb = 3", {3.0}),
    ("the result is :", {"the result is :"}), ("x", {" x", "x "}), ("2e3 m", {"2e3 m", 2000.0, 3.0}),
    ("1_000", {1000.0, 0.0}), ("He is Tall. So it is Red", {"red"}), ("about 3.14159", {"about 3.14159", 3.14}),
    ("-7", {-7.0}), ("inf", {float("inf")}), ("could be either final one", {"one"}), ("this answer is \nx", {"is"})])
def test_mmmu_parse_open_keeps_short_tails_and_their_numbers(response, parsed):
    """The text behind an indicator word is the answer; each number in it is one more, rounded to two places."""
    found = mmmu_parse_open(response)
    assert set(found) == parsed
    assert len(found) == len(parsed)


@pytest.mark.parametrize("gold, response, right", [
    ("1000", "The answer is 1,000", True), ("0", "The answer is 1,000", True), ("0.5", ".5", False),
    (["12", "twelve"], "there are twelve", True), (["12", "twelve"], "there are 12 of them", True),
    ("c", "it is cold", False), ("c", "it is vitamin c or d", True), ("3.14159", "pi is 3.1416", True),
    ("12", "twelve", False), ("Red", "RED", True)])
def test_mmmu_eval_open_wants_one_right_entry(gold, response, right):
    """A gold text may be part of an entry; a gold number must equal one."""
    assert mmmu_eval_open(gold, mmmu_parse_open(response)) is right


def mmmu_key(**golds):
    """An answer key; "7" is the answer to an open question."""
    return {f"validation_{name}": {"question_type": "short-answer" if gold == "7" else "multiple-choice",
                                   "ground_truth": gold} for name, gold in golds.items()}


def test_mmmu_score_weighs_examples():
    """Math 2 of 3, Art 1 of 1, Music 0 of 1: averaging subjects would differ. A list holds several golds."""
    key = mmmu_key(Math_1="A", Math_2="7", Math_3="C", Art_1=["B", "D"], Music_1="A", Physics_1="A")
    given = {"validation_Math_1": "A", "validation_Math_2": "so it is 7", "validation_Math_3": "B",
             "validation_Art_1": "D", "validation_Music_1": "B"}
    report = mmmu_score(given, key)
    assert report["Overall-Science"] == report["Math"] == {"num": 3, "acc": 0.667}
    assert report["Overall-Art and Design"] == {"num": 2, "acc": 0.5}
    assert report["Overall"] == {"num": 5, "acc": 0.6}
    assert report["Overall-Business"] == {"num": 0, "acc": 0}
    assert list(report)[:4] == ["Overall-Art and Design", "Art", "Music", "Overall-Business"]
    assert list(report)[-1] == "Overall"
    assert "Physics" not in report
    assert len(report) == 10


def test_mmmu_names_the_subjects_without_a_file(tmp_path, capsys):
    """Three subjects of thirty give a score too, which is not MMMU's."""
    preds = answers(tmp_path / "said.jsonl", mmmu_files(tmp_path / "data"))
    command("mmmu", tmp_path, "--preds", preds)
    assert "warning: 27 of 30 subjects have no file, such as Accounting, Agriculture, Arch" in capsys.readouterr().out


def test_mmmu_score_counts_given_predictions_of_known_subjects_only():
    """The subject is the id without its first and last part; an id that is not in the key is an error."""
    assert len(MMMU_SUBJECTS) == 30
    key = mmmu_key(Art_Theory_1="A", Art_Theory_2="B", Chess_1="A")
    with pytest.raises(KeyError):
        mmmu_score({"test_Art_Theory_1": "A"}, key)
    given = {f"validation_{name}": "A" for name in ("Art_Theory_1", "Chess_1", "Law_9", "Math_9")}
    assert mmmu_score(given, key)["Overall"] == {"num": 1, "acc": 1.0}
    assert mmmu_eval_choice(["A", "C"], "C")
    assert not mmmu_eval_choice("A", "a")
