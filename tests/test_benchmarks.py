"""What the benchmarks' scorers must give: the official programs' results, quirks included; then whole commands."""

import base64
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.common
import benchmarks.fid
import data
import eval as evaluation
import model
import train
from benchmarks.common import LETTER_ONLY, MAX_NEW_TOKENS, Item, ask_group, rgb
from benchmarks.dpg import dpg_crops, dpg_score
from benchmarks.fid import fid_distance, fid_network, fid_pixels, fid_stats
from benchmarks.geneval import (
    GENEVAL_COLORS,
    geneval_color_texts,
    geneval_crop,
    geneval_evaluate,
    geneval_iou,
    geneval_position,
    geneval_summary,
)
from benchmarks.judge import PROMPTS
from benchmarks.mmbench import (
    mmbench_groups,
    mmbench_infer,
    mmbench_judge_prompt,
    mmbench_letter,
    mmbench_open,
    mmbench_prompt,
    mmbench_score,
)
from benchmarks.mme import MME_SUFFIX, MME_TASKS, mme_parse, mme_score
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
from benchmarks.mmvet import mmvet_grade, mmvet_prompt, mmvet_score
from benchmarks.mmvp import mmvp_grade, mmvp_options, mmvp_prompt, mmvp_score
from benchmarks.pope import POPE, pope_metrics, pope_parse, pope_score
from benchmarks.score import Score
from formats.checkpoints import save_checkpoint, tensors_of
from formats.datasets import pyarrow_for
from parts.settings import InputError, run_command, write_json
from parts.world import SKILLS

FRUIT = {"A": "red apple", "B": "green pear", "C": "bananas", "D": "no fruit"}
PETS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}
DOOR = {"A": "Open", "B": "Closed"}


class Script:
    """A judge that gives prepared replies and keeps what it was asked; used as rng, it takes the last choice."""

    def __init__(self, *replies):
        self.replies, self.calls = list(replies), []

    def __call__(self, prompt, **settings):
        self.calls.append((prompt, settings))
        return self.replies.pop(0)

    def choice(self, options):
        self.calls.append(options)
        return options[-1]


# --- MMMU ------------------------------------------------------------------------------------------------------------
def test_mmmu_prompts_show_the_options_and_keep_image_marks():
    """The AIA prompt is one block of lines with stripped options; MMMU's own has (A) and blank lines around."""
    row = {"question": " See <image 1>. ", "options": "[' x ', 'it\\'s']", "question_type": "multiple-choice"}
    assert mmmu_prompt(row) == "See <image 1>.\nA. x\nB. it's\n" + LETTER_ONLY
    assert mmmu_prompt(row, "official") == f" See <image 1>. \n\n(A)  x \n(B) it's\n\n{LETTER_ONLY}"
    row = {"question": "How many?", "options": "[]", "question_type": "open"}
    assert mmmu_prompt(row) == "How many?\nAnswer the question using a single word or phrase."
    assert mmmu_prompt(row, "official") == "How many?\n\nAnswer the question using a single word or phrase."


def test_mmmu_options_are_data_and_never_code():
    """The column comes with a download: a literal parser refuses what eval would run."""
    with pytest.raises(ValueError):
        mmmu_options({"options": "[print('run')]"})


@pytest.mark.parametrize("pred, letter", [
    ("(B)", "A"), ("The answer is B", "A"), ("Because…", "B"), ("Dog", "D"), ("b", "b"), ("", "B"), (" \n", "B"),
    ("7", "7"), ("two bananas, no fruit", "C"), ("Bananas", "B"), ("I see bananas", "C"), ("i see BANANAS", "A")])
def test_mmmu_letter_follows_the_first_character_then_the_option_texts(pred, letter):
    """With options the rule always gives an answer: silence is the second, an unreadable text the first."""
    assert mmmu_letter(pred, FRUIT) == letter
    assert mmmu_letter(pred, {}) == pred.strip()


@pytest.mark.parametrize("response, letter", [
    ("The answer is B.", "B"), ("(B) is tempting, but the answer is (C)", "C"),
    ("I would say that this is a green pear", "B"), ("Bananas", None), ("it is bananas for me", None),
    ("A.", "A"), ("A)", None), ("\nA\n", None), ("A\nB", None), ("**A**", None), ("[A]", None), ("A.B", None),
    ("A.,", "A"), ("A,.", None), ("B or A or B", "B"), ("(A) beats B", "A"), ("", None),
    ("not bananas, I rather think of a Red Apple", "A"), ("'B'", "B"), ("A or D", "D")])
def test_mmmu_parse_choice_takes_the_marker_said_last(response, letter):
    """Markers in brackets win over bare letters, those over option texts; None is the random fallback, here D."""
    rng = Script()
    assert mmmu_parse_choice(response, list(FRUIT), FRUIT, rng) == (letter or "D")
    assert rng.calls == ([] if letter else [list(FRUIT)])


def test_mmmu_parse_choice_gives_ties_to_the_first_option():
    """Two options that end at one place share the last position, and the first maximum counts."""
    assert mmmu_parse_choice("I think that it is a cat now", ["A", "B"], {"A": "cat", "B": "cat"}, None) == "A"


@pytest.mark.parametrize("response, parsed", [
    ("The answer is 1,000", {0.0, 1000.0}), (".5", {5.0}), ("so x = .5", {0.5}), ("Paris.", {"paris"}),
    ("It is blue\nso the answer is red", {"blue", "red"}), ("a = 3\nb", {"a = 3\nb", 3.0}), ("a\nb = 3", {3.0}),
    ("the result is :", {"the result is :"}), ("x", {" x", "x "}), ("2e3 m", {"2e3 m", 2000.0, 3.0}),
    ("1_000", {1000.0, 0.0}), ("He is Tall. So it is Red", {"red"}), ("about 3.14159", {"about 3.14159", 3.14}),
    ("-7", {-7.0}), ("inf", {float("inf")}), ("could be either final one", {"one"}), ("this answer is \nx", {"is"})])
def test_mmmu_parse_open_keeps_short_tails_and_their_numbers(response, parsed):
    """What follows an indicator word is the answer; numbers in it count for themselves, to two places."""
    found = mmmu_parse_open(response)
    assert set(found) == parsed and len(found) == len(parsed)


@pytest.mark.parametrize("gold, response, right", [
    ("1000", "The answer is 1,000", True), ("0", "The answer is 1,000", True), ("0.5", ".5", False),
    (["12", "twelve"], "there are twelve", True), (["12", "twelve"], "there are 12 of them", True),
    ("c", "it is cold", False), ("c", "it is vitamin c or d", True), ("3.14159", "pi is 3.1416", True),
    ("12", "twelve", False), ("Red", "RED", True)])
def test_mmmu_eval_open_wants_one_right_entry(gold, response, right):
    """A gold text may be part of an entry, a gold number has to equal one."""
    assert mmmu_eval_open(gold, mmmu_parse_open(response)) is right


def mmmu_key(**golds):
    return {f"validation_{name}": {"question_type": "short-answer" if gold == "7" else "multiple-choice",
                                   "ground_truth": gold} for name, gold in golds.items()}


def test_mmmu_score_weighs_examples():
    """Math 2 of 3, Art 1 of 1, Music 0 of 1: an average of subjects would give other numbers. A list has many keys."""
    key = mmmu_key(Math_1="A", Math_2="7", Math_3="C", Art_1=["B", "D"], Music_1="A", Physics_1="A")
    said = {"validation_Math_1": "A", "validation_Math_2": "so it is 7", "validation_Math_3": "B",
            "validation_Art_1": "D", "validation_Music_1": "B"}
    report = mmmu_score(said, key)
    assert report["Overall-Science"] == report["Math"] == {"num": 3, "acc": 0.667}
    assert report["Overall-Art and Design"] == {"num": 2, "acc": 0.5} and report["Overall"] == {"num": 5, "acc": 0.6}
    assert report["Overall-Business"] == {"num": 0, "acc": 0}
    assert list(report)[:4] == ["Overall-Art and Design", "Art", "Music", "Overall-Business"]
    assert list(report)[-1] == "Overall" and "Physics" not in report and len(report) == 10


def test_mmmu_score_counts_given_predictions_of_known_subjects_only():
    """The subject is the id between its first and last part; an id that its subject's key lacks is an error."""
    assert len(MMMU_SUBJECTS) == 30
    key = mmmu_key(Art_Theory_1="A", Art_Theory_2="B", Chess_1="A")
    said = {"test_Art_Theory_1": "A"}
    with pytest.raises(KeyError):
        mmmu_score(said, key)
    said = {f"validation_{name}": "A" for name in ("Art_Theory_1", "Chess_1", "Law_9", "Math_9")}
    assert mmmu_score(said, key)["Overall"] == {"num": 1, "acc": 1.0}
    assert mmmu_eval_choice(["A", "C"], "C") and not mmmu_eval_choice("A", "a")


# --- MMBench ---------------------------------------------------------------------------------------------------------
def test_mmbench_prompts_strip_nothing_and_skip_missing_options():
    """AIA puts a bare hint in front; VLMEvalKit labels it and sets blank lines."""
    row, asked = {"question": "Who? ", "A": "x", "B": None, "C": "z", "F": "never"}, "Who? \nA. x\nC. z\n"
    assert mmbench_prompt(row) == asked + LETTER_ONLY
    assert mmbench_prompt({**row, "hint": "look"}) == "look\n" + asked + LETTER_ONLY
    assert mmbench_prompt(row, "vlmevalkit") == f"\n{asked}\n{LETTER_ONLY}"
    assert mmbench_prompt({**row, "hint": "h"}, "vlmevalkit") == f"\nHint: h\n{asked}\n{LETTER_ONLY}"


@pytest.mark.parametrize("pred, letter", [
    ("Open", "A"), ("open", "open"), ("(a)", "(a)"), ("Because", "B"), ("", ""), (" \n", ""), ("b", "b"),
    ("It is Closed", "B"), ("Ajar", "A")])
def test_mmbench_letter_leaves_what_it_cannot_read(pred, letter):
    """Unlike MMMU's there is no last resort: the text stays and scores as wrong."""
    assert mmbench_letter(pred, DOOR) == letter


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
    """Seen far from the end, A may be an article; a text over twice as long as all options says too much."""
    assert mmbench_infer(answer, PETS) == letter


def test_mmbench_infer_takes_unusual_options():
    """Options may be numbers, empty, or called Z."""
    assert mmbench_infer("it's 12", {"A": 12, "B": 1000}) == "A"
    assert mmbench_infer("x", {"A": "", "B": "yes"}) == "A"
    assert mmbench_infer("Z", {"A": "no", "Z": "yes"}) == "Z"
    assert mmbench_infer("answer is D", {"A": "no", "B": "yes"}) is False


def test_mmbench_judge_prompt_fills_each_field_once():
    """Braces in a question are text, not fields."""
    filled = mmbench_judge_prompt("{p}?", {"A": "x", "C": 3}, "said", "Q {q} O {o}P {p}{r}")
    assert filled == "Q {p}? O There are several options: \nA. x\nC. 3\nP said{r}"
    with pytest.raises(ValueError, match="judge-prompt file"):
        mmbench_judge_prompt("?", {}, "", None)


def mmbench_rows(first, second):
    """Question 1 with four options and answers B, C, D, A; question 2 with two and A, B; copies turn the options."""
    rows = []
    for base, texts, answers, said, group in ((1, ["bear", "rabbit", "cat", "dog"], "BCDA", first, "coarse_perception"),
                                              (2, ["yes", "no"], "AB", second, "logic_reasoning")):
        for k, prediction in enumerate(said):
            options = dict(zip("ABCD"[:len(texts)], texts[-k:] + texts[:-k], strict=True))
            rows.append({"index": base + k * 1_000_000, "question": "Which?", "answer": answers[k], **options,
                         "prediction": prediction, "category": f"kind {base}", "l2-category": group, "split": "dev"})
    return rows


def test_mmbench_circular_wants_every_copy_and_vanilla_the_first():
    """Question 2 is right as asked first and wrong with its options turned."""
    rows = mmbench_rows(["B", "C.", "It is a rabbit", "A"], ["A", "A"])
    circular, vanilla = mmbench_score(rows), mmbench_score(rows[::-1], circular=False)
    assert circular["hit"] == {1: 1, 2: 0}
    assert circular["report"] == {"Overall": 0.5, "CP": 1.0, "LR": 0.0, "kind 1": 1.0, "kind 2": 0.0}
    assert vanilla["hit"] == {1: 1, 2: 1} and vanilla["report"]["Overall"] == 1.0


def test_mmbench_without_a_judge_unreadable_is_wrong():
    """The exact matching of VLMEvalKit knows no partial credit."""
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
    """A wrong letter anywhere ends the group without a call; three unreadable replies are a draw of the rng, here Z."""
    judge, rng = Script(*replies), Script()
    result = mmbench_score(mmbench_rows(first, ["A", "B"]), judge=judge, rng=rng, template="{q} {o} {p}")
    assert result["hit"] == {1: hit, 2: 1} and len(judge.calls) == calls
    assert rng.calls == ([["A", "B", "C", "D", "Z"]] if "Failed" in "".join(replies) else [])
    assert all(settings == {"temperature": 0, "max_tokens": 2048, "system": None} for _, settings in judge.calls)


def test_mmbench_groups_need_their_main_row_and_open_ones_are_listed():
    """A group is exactly the rows present, in order of index; what the judge must read can be exported."""
    rows = mmbench_rows(["B", "C", "hm", "A"], ["A", "B"])
    groups = mmbench_groups([rows[2], rows[0], rows[5]])
    assert {index: [row["index"] for row in group] for index, group in groups.items()} == {1: [1, 2_000_001]}
    assert mmbench_open(groups[1]) == [rows[2]]
    assert mmbench_open(rows[:2]) == 1
    assert list(mmbench_groups(rows, circular=False).values()) == [[rows[0]], [rows[4]]]


def test_mmbench_report_lets_a_later_group_overwrite():
    """Groups of both columns share one table."""
    rows = mmbench_rows(["B"], ["B"])
    rows[1]["category"] = "coarse_perception"
    assert mmbench_score(rows)["report"] == {"Overall": 0.5, "CP": 0.0, "LR": 0.0, "kind 1": 1.0}


# --- MMVP ------------------------------------------------------------------------------------------------------------
def test_mmvp_prompts():
    """AIA turns (a) and (b) into lettered lines; MMVP's own prompt keeps the column as it is."""
    row = {"Question": "Is it open?", "Options": "(a) Open (b) Closed"}
    assert mmvp_options(row["Options"]) == DOOR
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
    """The official test is an equality, so a full stop is a no."""
    judge = Script(reply)
    assert mmvp_grade("Is it? (a) x (b) y", "(a)", "x", judge) is right
    prompt, settings = judge.calls[0]
    assert prompt == ("Given the following question Is it? (a) x (b) y, the correct answer is (a). "
                      "Does the following answer correctly answers the question, answer:x?")
    assert settings["temperature"] == 0.2 and settings["system"].endswith("Please answer in only yes or no.")


# --- MM-Vet ----------------------------------------------------------------------------------------------------------
def test_mmvet_prompt_adds_one_open_line():
    """Blanks go around AND and OR even if there are some already."""
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
    """Six calls at growing temperatures, then 0 even if the last reply is a number."""
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
    assert list(grades.values()) == [[1], [0.5], [0.2], [0.3]] and len(judge.calls) == 5
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
    """A mean over what happens to be there would not compare; nor would unequal numbers of runs."""
    metadata = {"a": {"capability": ["rec"]}, "b": {"capability": ["rec"]}}
    with pytest.raises(KeyError):
        mmvet_score({"a": [1.0]}, metadata)
    with pytest.raises(ValueError):
        mmvet_score({"a": [1.0], "b": [1.0, 0.5]}, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# POPE
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, expected", [
    *((text, "yes") for text in ("Yes", "NO", "No!", "No\n", "none", "cannot", '"no"', ".No", "", "There is none")),
    *((text, "no") for text in ("No", "no", "No, there is no dog.", "Yes, no doubt", "it is not, no. Yes", "No,"))])
def test_pope_reads_an_answer_word_by_word(text, expected):
    """Only the words No, no and not before the first period count, and nothing is stripped."""
    assert pope_parse(text) == expected


@pytest.mark.parametrize("texts, labels, counts, shares", [
    (["Yes", "No, there is no dog.", "yes", "There is none", "No\n", "Yes. No."], "yes no no no no yes",
     (2, 3, 1, 0), (0.5, 0.4, 1, 0.5714, 0.8333)),
    (["yes", "no", "yes", "no", "yes"], "yes yes no no yes", (2, 1, 1, 1), (0.6, 2 / 3, 2 / 3, 0.6667, 0.6)),
    (["yes"] * 6, "yes yes yes no no no", (3, 3, 0, 0), (0.5, 0.5, 1, 0.6667, 1)),
    (["yes", "yes", "no"], "Yes no", (1, 1, 0, 0), (0.5, 0.5, 1, 2 / 3, 2 / 3)),           # the third answer is surplus
    (["no", "no"], "yes no", (0, 0, 1, 1), (0.5, None, 0, None, 0)),                        # no yes answer
    (["yes", "no"], "no no", (0, 1, 1, 0), (0.5, 0, None, None, 0.5)),                      # no yes label
    (["yes", "no"], "no yes", (0, 1, 0, 1), (0, 0, 0, None, 0.5)), ([], "", (0,) * 4, (None,) * 5)])
def test_pope_counts_yes_as_positive(texts, labels, counts, shares):
    """The official program's examples, and None where it divides by zero; the yes ratio counts surplus answers."""
    metrics = pope_metrics(texts, labels.split())
    assert tuple(metrics[name] for name in ("TP", "FP", "TN", "FN")) == counts
    found = [metrics[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert found == pytest.approx(list(shares), abs=5e-5)


def test_pope_score_is_the_mean_f1_of_the_categories():
    """It is a plain mean, in percent, and None as soon as one category has no F1."""
    answers = {"random": ["yes"] * 2, "popular": ["yes", "no"], "adversarial": ["yes", "no"]}
    labels = {name: ["yes", "no"] for name in answers}
    report = pope_score(answers, labels)
    assert report["score"] == pytest.approx(100 * (2 / 3 + 1 + 1) / 3)
    assert report["categories"]["random"]["FP"] == 1
    assert pope_score(answers | {"random": ["no", "no"]}, labels)["score"] is None


def test_pope_refuses_labels_of_another_version():
    """Pairing by position would give a wrong number in silence; --force drops the surplus instead."""
    answers, labels = {"random": ["yes", "no"]}, {"random": ["yes", "no", "no"]}
    with pytest.raises(InputError, match="POPE random: 2 answers, 3 labels; .*--force"):
        pope_score(answers, labels)
    assert pope_score(answers, labels, force=True)["score"] == 100
    with pytest.raises(InputError, match="POPE popular: 0 answers, 1 labels"):
        pope_score(answers, {"random": ["yes", "no"], "popular": ["yes"]})


# ---------------------------------------------------------------------------------------------------------------------
# MME
# ---------------------------------------------------------------------------------------------------------------------
def mme_file(*answers):
    """Lines of gold/answer pairs such as "Yes/no"."""
    return "".join(f"{i // 2}.jpg\tIs it?\t" + answer.replace("/", "\t") + "\n" for i, answer in enumerate(answers))


PERFECT = {task: mme_file("Yes/Yes", "No/No") for task in MME_TASKS}


@pytest.mark.parametrize("text, expected", [
    *((text, "yes") for text in ("Yes", "yes\n", "eyes", "Yes, no")),
    *((text, "no") for text in ("NO\n", "**No**", "know", "not sure", "canoe", "  no")),
    *((text, "other") for text in ("**Yes**", "  yes", "I cannot", "", "\n", "The answer is no"))])
def test_mme_reads_the_first_four_characters(text, expected):
    """Yes is looked for before no, and both anywhere in them, in any case."""
    assert mme_parse(text) == expected


def test_mme_adds_accuracy_and_pictures_with_both_right():
    """The worked examples: 75 + 50 for color, 66.67 + 33.33 for OCR, 200 for each other of the 10 + 4 tasks."""
    color = mme_file("Yes/Yes", "No/no", "Yes/yes", "No/The answer is no")
    ocr = mme_file("Yes/no", "No/no", "Yes/yes", "No/yes", "Yes/yes", "No/no")
    report = mme_score(PERFECT | {"color": color, "OCR": ocr})
    assert report["tasks"]["color"] == 125 and report["tasks"]["OCR"] == pytest.approx(100)
    assert report["perception"] == pytest.approx(1825) and report["cognition"] == 800
    assert report["total"] == pytest.approx(2625) and report["skipped"] == 0
    assert sum(lines for _, lines in MME_TASKS.values()) == 2374


@pytest.mark.parametrize("text, score, skipped", [
    (mme_file("Yes/yes", "No/no\tor yes", "Yes/yes", "No/no"), 150, 1),         # 3 of 3 answers, 1 of 2 pictures
    ("no tabs\nat all\n", 0, 2), (mme_file("Yes/maybe", "No/"), 0, 0),          # the official table would fail here
    (mme_file("YES/Yes\u2028it is", "No/No").replace("\n", "\r\n").rstrip(), 200, 0)])
def test_mme_skips_a_line_without_four_fields_but_keeps_its_picture(text, score, skipped):
    """Such a line is no answer. Only ends of lines as a file has them split the text, on Windows too."""
    report = mme_score(PERFECT | {"count": text})
    assert (report["tasks"]["count"], report["skipped"]) == (score, skipped)


@pytest.mark.parametrize("text, message", [
    (mme_file("Yes/yes", "No/no", "Yes/yes"), "MME color, line 3: .*two lines a picture"), ("", "MME color, line 0"),
    (mme_file("Yes/yes", "Maybe/no"), "MME color, line 2: the third field is 'Maybe'; make it Yes or No")])
def test_mme_refuses_what_the_official_program_stops_at(text, message):
    """An odd number of lines shifts the pairs, and another gold answer is a broken file; the message names the line."""
    with pytest.raises(InputError, match=message):
        mme_score(PERFECT | {"color": text})
    with pytest.raises(InputError, match="MME OCR: there is no OCR.txt"):
        mme_score({task: text for task, text in PERFECT.items() if task != "OCR"})


# ---------------------------------------------------------------------------------------------------------------------
# GenEval
# ---------------------------------------------------------------------------------------------------------------------
CAT, DOG = [20, 20, 30, 30], [0, 20, 10, 30]


def geneval(boxes, include, exclude=(), tag="position", color=None, **options):
    return geneval_evaluate(boxes, {"tag": tag, "include": include, "exclude": exclude}, color, **options)


def want(name, count=1, **more):
    return {"class": name, "count": count} | more


def scored(*scores, box=CAT):
    return np.array([[*box, score] for score in scores], np.float32)


def test_geneval_position_is_seen_from_the_second_box():
    """The worked examples: a tenth of both sizes is slack, and a direction counts above half of the whole offset."""
    assert geneval_position(DOG, CAT) == {"left of"} and geneval_position(CAT, DOG) == {"right of"}
    assert geneval_position((12, 12, 22, 22), (20, 20, 30, 30)) == {"above", "left of"}
    assert geneval_position((0, 0, 10, 10), (20, 30, 30, 40)) == {"above"}
    assert geneval_position((20, 30, 30, 40), (0, 0, 10, 10)) == {"below"}
    assert geneval_position(CAT, CAT) == set() == geneval_position((22, 20, 32, 30), CAT)
    assert geneval_position((24, 20, 34, 30), CAT) == set()         # 2 of 4 are left, which is not above half


def test_geneval_iou_counts_both_borders():
    """11 x 11 boxes that share 3 x 3 pixels: 9 of 233."""
    assert geneval_iou((12, 12, 22, 22), (20, 20, 30, 30)) == pytest.approx(9 / 233)
    assert geneval_iou((12, 12, 22, 22), (20, 20, 30, 30)) == pytest.approx(0.0386, abs=5e-5)
    assert geneval_iou(CAT, CAT) == 1 and geneval_iou(CAT, DOG) == 0


def test_geneval_asks_each_pair_for_the_relation():
    """A dog left of a cat is right; the reason tells which relation was seen, or that the cat was not there."""
    def reason(relation, dogs, cats=((*CAT, 0.9),), count=1):
        boxes = {"cat": cats, "dog": np.array([[*dog, 0.8 - i / 10] for i, dog in enumerate(dogs)])}
        found = geneval(boxes, [want("cat"), want("dog", count, position=[relation, 0])])
        assert found["correct"] == (found["reason"] == "")
        return found["reason"]

    assert reason("left of", [DOG]) == "" == reason("left of", [DOG, CAT])                  # one dog is asked about
    assert reason("left of", [DOG, CAT, CAT], count=3) == "expected dog left of target, found  target"     # told once
    assert reason("left of", [(40, 20, 50, 30)]) == "expected dog left of target, found right of target"
    assert reason("below", [(12, 12, 22, 22)]) == "expected dog below target, found above and left of target"
    assert reason("left of", [DOG], []) == "expected cat>=1, found 0\nno target for dog to be left of"


def test_geneval_takes_a_failed_clause_for_no_target():
    """The cat fails its colour, so the dog has nothing to be left of; details list the classes that were found."""
    include = [want("cat", color="red"), want("dog", position=("left of", 0)), want("sofa")]
    found = geneval({"cat": [[*CAT, 0.9]], "dog": [[*DOG, 0.8]], "sofa": []}, include, color=lambda *_: ["pink"])
    assert found == {"correct": False, "details": {"cat": [[*CAT, 0.9]], "dog": [[*DOG, 0.8]]},
                     "reason": "expected red cat>=1, found 0 red; and 1 pink\nno target for dog to be left of\n"
                               "expected sofa>=1, found 0"}


def test_geneval_counts_exactly_through_include_and_exclude():
    """Two dogs of scores .95 .95 .88: the third is below the .9 that holds for counting alone."""
    include, exclude = [want("dog", 2)], [want("dog", 3)]
    assert geneval({"dog": scored(0.95, 0.95, 0.88)}, include, exclude, "counting")["correct"]
    assert geneval({"dog": scored(0.95, 0.95, 0.88)}, include, exclude)["reason"] == "expected dog<3, found 3"
    found = geneval({"dog": scored(0.95)}, include, exclude, "counting")
    assert found["reason"] == "expected dog>=2, found 1"


def test_geneval_keeps_the_best_boxes_above_the_threshold():
    """Highest score first, strictly above 0.3 as float32, at most 16; overlap drops a box only when asked to."""
    def kept(scores, **options):
        boxes = {"cat": [[*CAT, score] for score in scores]}
        return [row[4] for row in geneval(boxes, [], **options)["details"].get("cat", [])]

    assert kept([0.4, 0.3, 0.9, 0.3000001, 0.30000000001]) == [0.9, 0.4, 0.3000001]
    assert kept([0.1]) == [] and len(kept([0.5] * 20)) == 16 and kept([0.9, 0.8], max_overlap=0.99) == [0.9]
    assert kept([0.4, 0.9], threshold=0.5) == [0.9]


def test_geneval_asks_for_the_colour_of_the_counted_boxes_only():
    """One red car, cars blue (.9) and red (.8): only the blue one is looked at, with its own mask."""
    asked = []

    def judge(image, objects, name):
        asked.append((image, [(row[4], mask) for row, mask in objects], name))
        return ["blue", "white", "blue"][:len(objects)]

    boxes, masks = {"car": scored(0.8, 0.9)}, {"car": ["mask of .8", "mask of .9"]}
    red = want("car", color="red")
    found = geneval(boxes, [red], color=judge, masks=masks, image="picture")
    assert found["reason"] == "expected red car>=1, found 0 red; and 1 blue"
    assert asked == [("picture", [(pytest.approx(0.9), "mask of .9")], "car")]
    found = geneval({"car": scored(0.9, 0.8, 0.7)}, [want("car", 3, color="white", position=("above", 0))], color=judge)
    assert found["reason"] == "expected white car>=3, found 1 white; and 2 blue, 1 white"   # position is not asked
    assert geneval(boxes, [want("car", color="blue")], color=judge)["correct"]
    with pytest.raises(InputError, match="there is no colour judge"):
        geneval(boxes, [red])


def test_geneval_crop_greys_the_surroundings_and_rounds_to_even():
    """Outside the mask lies #999999, outside the picture black; 0.5 rounds to 0 and 1.5 to 2."""
    red, mask = Image.new("RGBA", (4, 3), "red"), np.zeros((3, 4), bool)
    mask[0, 0] = True
    crop = np.asarray(geneval_crop(red, [0.5, -1, 1.5, 1.6, 0.9], mask))
    assert crop.shape == (3, 2, 3)
    assert crop[:, 0].tolist() == [[0, 0, 0], [255, 0, 0], [153, 153, 153]] and (crop[1:, 1] == 153).all()
    assert (np.asarray(geneval_crop(red, (0, 0, 4, 3), None)) == (255, 0, 0)).all()
    turned = Image.new("RGB", (4, 3))
    turned.getexif()[0x0112] = 6
    assert (np.asarray(geneval_crop(turned, (0, 0, 3, 4), np.zeros((4, 3), bool))) == 153).all()


def test_geneval_colours_have_three_texts():
    """ULMEvalKit's third text is the same for all colours, since it lacks the f of an f-string."""
    first = ["a photo of a orange car", "a photo of a orange-colored car"]
    assert geneval_color_texts("car", "orange") == [*first, "a photo of a orange object"]
    assert geneval_color_texts("car", "orange", "ulmevalkit") == [*first, "a photo of a {c} object"]
    assert " ".join(GENEVAL_COLORS) == "red orange yellow green blue purple pink brown black white"


def test_geneval_overall_is_the_mean_over_tags():
    """The worked example: 4/4, 1/4 + 0/4 and 2/4 pictures."""
    results = [(tag, prompt, i < right) for tag, prompt, right in (
        ("single_object", "a", 4), ("counting", "b", 1), ("counting", "c", 0), ("colors", "d", 2)) for i in range(4)]
    found = geneval_summary(results)
    assert found["tags"] == {"single_object": 1, "counting": 0.125, "colors": 0.5}
    assert list(found["tags"]) == ["single_object", "counting", "colors"]
    assert found["overall"] == pytest.approx(0.54167, abs=5e-6)
    assert (found["correct_images"], found["correct_prompts"]) == (0.4375, 0.75)


# ---------------------------------------------------------------------------------------------------------------------
# DPG-Bench
# ---------------------------------------------------------------------------------------------------------------------
def dpg_row(item, number, parents, broad="entity", detailed="whole"):
    return {"item_id": item, "proposition_id": str(number), "dependency": parents, "category_broad": broad,
            "category_detailed": detailed, "tuple": f"{broad} - {detailed} (it, {number})",
            "question_natural_language": f"{item}{number}?"}


FIRST = dpg_row("first", 1, "0")                                 # the official program never reads the first row
ROWS = [dpg_row("a", 1, "0"), dpg_row("a", 2, "1", "attribute", "color"), dpg_row("a", 3, "0", "global", ""),
        dpg_row("b", 1, "0"), dpg_row("b", 2, "1", "relation", "spatial")]
ONE = {"a.png": ["no yes yes"], "b.v2.png": ["yes yes"]}
TWO = {"a.png": ["no yes yes", "yes yes no"], "b.v2.png": ["yes yes", "yes no"]}


def dpg(answers, variant="official", rows=ROWS, pic_num=1):
    """Answers as words in question order, one text a crop."""
    replies = {file: [{f"{file[0]}{i}?": word for i, word in enumerate(crop.split(), 1)} for crop in crops]
               for file, crops in answers.items()}
    return dpg_score([FIRST, *rows] if variant == "official" else list(rows), replies, pic_num, variant)


def test_dpg_official_is_a_mean_over_pictures():
    """The worked examples: the no to a1 takes a2 along in the score; categories see the last crop, before that rule."""
    found = dpg(ONE)
    assert found["score"] == pytest.approx(66.667, abs=5e-4) and found["failed"] == []
    assert found["images"] == pytest.approx({"a.png": 1 / 3, "b.v2.png": 1})
    assert found["l1"] == {"entity": 50, "attribute": 100, "global": 100, "relation": 100}
    assert found["l2"] == {"entity - whole": 50, "attribute - color": 100, "global -": 100, "relation - spatial": 100}
    found = dpg(TWO, pic_num=2)
    assert found["score"] == 62.5 and found["images"] == pytest.approx({"a.png": 0.5, "b.v2.png": 0.75})
    assert found["l1"] == {"entity": 100, "attribute": 100, "global": 0, "relation": 0}


def test_dpg_ulmevalkit_is_a_mean_over_questions():
    """Both worked examples: long items weigh more, and the categories are taken after the rule of parents."""
    found = dpg(ONE, "ulmevalkit")
    assert found == {"score": 0.6, "l1": {"entity": 0.5, "attribute": 0, "global": 1, "relation": 1},
                     "l2": {"entity-whole": 0.5, "attribute-color": 0, "global-": 1, "relation-spatial": 1}}
    found = dpg(TWO, "ulmevalkit", pic_num=2)
    assert found["score"] == 0.6
    assert found["l1"] == {"entity": 0.75, "attribute": 0.5, "global": 0.5, "relation": 0.5}
    listed = [row | {"dependency": [int(row["dependency"])]} for row in ROWS]
    assert dpg(TWO, "ulmevalkit", listed, pic_num=2) == found


def test_dpg_zeros_travel_down_in_file_order_only():
    """3 rests on 2 and 2 on 1; a 3 that stands before 2 does not learn that 2 fell. ULMEvalKit trusts later parents."""
    first, second, third = dpg_row("a", 1, "0"), dpg_row("a", 2, "1"), dpg_row("a", 3, "0, 2")
    answers = {"a.png": ["no yes yes"]}
    for rows, official, ulmevalkit in (((first, second, third), 0, 0), ((first, third, second), 100 / 3, 1 / 3),
                                       ((second, first), 0, 1 / 2)):
        assert dpg(answers, rows=rows)["score"] == pytest.approx(official)
        assert dpg(answers, "ulmevalkit", rows)["score"] == pytest.approx(ulmevalkit)


def test_dpg_official_loses_the_first_row_and_what_rests_on_it():
    """A picture with a lost parent fails and is left out, unless another parent said no before."""
    replies = {"a.png": [{"a1?": "yes", "a2?": "yes"}], "b.png": [{"b1?": "yes", "b2?": "no"}]}
    rows = [dpg_row("a", 1, "0"), dpg_row("a", 2, "1"), *ROWS[3:]]
    found = dpg_score(rows, replies, 1, "official")
    assert found["score"] == 50 and found["failed"] == ["a.png"] and found["l1"] == {"entity": 100, "relation": 0}
    assert dpg_score(rows, replies, 1, "ulmevalkit")["score"] == 0.75
    unknown = [dpg_row("a", 1, "0"), dpg_row("a", 2, "1,9")]
    assert dpg({"a.png": ["no yes"], "a.jpg": ["yes yes"]}, rows=unknown)["failed"] == ["a.jpg"]
    assert dpg({"a.jpg": ["yes yes"]}, "ulmevalkit", unknown)["score"] == 1


def test_dpg_official_forgets_an_item_that_comes_back():
    """Its earlier rows are gone, and a repeated proposition id overwrites; ULMEvalKit counts every row."""
    rows = [dpg_row("a", 1, "0"), dpg_row("b", 1, "0"), dpg_row("a", 2, "0"), dpg_row("a", 2, "0", "other")]
    found = dpg({"a.png": ["no yes"]}, rows=rows)
    assert found["score"] == 100 and found["l1"] == {"other": 100}
    assert dpg({"a.png": ["no yes"]}, "ulmevalkit", rows)["score"] == pytest.approx(2 / 3)


def test_dpg_counts_an_exact_yes_and_lists_what_it_cannot_score():
    """Official leaves out a file without item, crop or reply; ULMEvalKit needs every reply."""
    assert dpg({"b.png": ["Yes yes."]})["score"] == 0
    found = dpg(ONE | {"readme.txt": [], "b.png": ["yes"]}, pic_num=1)
    assert found["failed"] == ["readme.txt", "b.png"] and found["score"] == pytest.approx(66.667, abs=5e-4)
    assert dpg(ONE, pic_num=2)["score"] is None and dpg(ONE, pic_num=2)["failed"] == list(ONE)
    assert dpg(ONE | {"readme.txt": ["yes"]}, "ulmevalkit")["score"] == 0.6
    with pytest.raises(InputError, match="DPG-Bench b.png: no reply to 'b2\\?'"):
        dpg({"b.png": ["yes"]}, "ulmevalkit")
    with pytest.raises(InputError, match="DPG-Bench, data row 2: "):
        dpg(ONE, rows=[dpg_row("a", 1, "one")])


def test_dpg_crops_read_the_grid_row_by_row():
    """Top left, top right, bottom left, bottom right."""
    assert dpg_crops(8) == [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert dpg_crops(8, 1) == [(0, 0, 8, 8)]


# ---------------------------------------------------------------------------------------------------------------------
# FID
# ---------------------------------------------------------------------------------------------------------------------
def test_fid_equals_the_official_packages():
    """The three worked examples, with covariances that commute, that do not, and from features."""
    assert fid_distance((0, 0), np.diag((1, 4)), (1, 2), np.diag((4, 1))) == pytest.approx(7)
    found = fid_distance((1, 2), [[2, 0.5], [0.5, 1]], (0, 1), [[1, -0.3], [-0.3, 2]])
    assert found == pytest.approx(2.575425893, abs=1e-8)
    one = fid_stats([(0, 0), (2, 0), (0, 2), (2, 2)])
    other = fid_stats(np.array([(1, 1), (3, 1), (1, 5)], np.float32))
    np.testing.assert_allclose(one[1], [[1.3333, 0], [0, 1.3333]], atol=5e-5)
    np.testing.assert_allclose(other[1], [[1.3333, -1.3333], [-1.3333, 5.3333]], atol=5e-5)
    assert other[0].dtype == other[1].dtype == np.float64
    assert fid_distance(*one, *other) == pytest.approx(3.797387792, abs=1e-8)


def test_fid_of_equal_sets_is_zero_even_when_they_are_few():
    """Three pictures of five features have a singular covariance, and one feature is a number in place of a matrix."""
    few = fid_stats(np.random.default_rng(0).normal(size=(3, 5)))
    assert fid_distance(*few, *few) == pytest.approx(0, abs=1e-6)
    assert fid_distance(0, 1, 3, 4) == pytest.approx(9 + 1 + 4 - 2 * 2)
    assert fid_stats([[1], [3]])[1].tolist() == [[2]]


def test_fid_refuses_shapes_that_do_not_fit():
    """Features of two networks cannot be compared, and one picture has no covariance."""
    with pytest.raises(InputError, match="use one network"):
        fid_distance((0, 0), np.eye(2), 0, 1)
    with pytest.raises(InputError, match="two or more pictures"):
        fid_stats([[1, 2]])


# ---------------------------------------------------------------------------------------------------------------------
# Whole commands: the official files of each benchmark, made small
# ---------------------------------------------------------------------------------------------------------------------
def png(colour="red", mode="RGB", size=(4, 4)):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def written(file, content=""):
    """Write text, bytes, or a list of objects as JSON lines, and the folders it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def answers(file, said):
    return written(file, [{"id": name, "response": text} for name, text in said.items()])


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def command(bench, folder, *flags):
    """Score folder/data, writing to folder/out -> scores.json."""
    evaluation.main(["score", bench, "--data", str(folder / "data"), "--out", str(folder / "out"), *map(str, flags)])
    return json.loads((folder / "out/scores.json").read_text())


def mmmu_files(folder):
    """Math 2 of 3 right, Art 1 of 1, Music 0 of 1: the worked example. -> answers in the order of the subjects."""
    parquet, said = pyarrow_for(folder).parquet, {}
    for subject, rows in {"Art": [("A", " A\n")], "Music": [("B", "(B)")],
                          "Math": [("B", "Because"), ("C", "x"), (["1000", "a k"], "The answer is 1,000")]}.items():
        columns = []
        for number, (gold, text) in enumerate(rows, 1):
            kind, options = ("multiple-choice", ["x", "y", "z"]) if isinstance(gold, str) else ("open", [])
            columns.append({"id": f"validation_{subject}_{number}", "question": "See <image 1>?", "answer": str(gold),
                            "options": str(options), "question_type": kind, "image_1": {"bytes": png(), "path": "1"}})
            said[columns[-1]["id"]] = text
        file = written(folder / f"{subject}/validation-00000-of-00001.parquet")
        parquet.write_table(pyarrow_for(folder).Table.from_pylist(columns), file)
    return {name: said[name] for name in sorted(said)}


def mmbench_files(folder, first=("B", "C.", "It is a rabbit", "A"), **changes):
    """The worked example; a copy of a question names the row with its picture, and question 2 has an option "None"."""
    rows, picture = mmbench_rows(first, ["A", "A"]), base64.b64encode(png()).decode()
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    file = io.StringIO()
    table = csv.DictWriter(file, columns, delimiter="\t", restval="", extrasaction="ignore")
    table.writeheader()
    for row in rows:
        shared = {"image": picture if row["index"] < 10**6 else row["index"] % 10**6, "hint": 'A "hint"\nof two lines'}
        table.writerow(row | shared | ({"D": "None"} if row["index"] == 2 else {}) | changes)
    written(folder / "mmbench_dev_20230712.tsv", file.getvalue())
    return {str(row["index"]): row["prediction"] for row in rows}


def mmvp_files(folder):
    """Hits 1 1 / 1 0 / 1 1 / 0 0, the index spelled as in some copies."""
    text = "lndex,Question,Options,Correct Answer\n"
    for number in range(1, 9):
        text += f'{number},"Is it open, or not?",(a) Open (b) Closed,{"(a)" if number % 2 else "(b)"}\n'
        written(folder / f"MMVP Images/{number}.jpg", png())
    written(folder / "Questions.csv", text)
    return dict(zip("12345678", ("A", "B", "Open", "(b)", "A.", "Closed", "open", "A"), strict=True))


def mmvet_files(folder):
    """Four questions with the capabilities of the worked example."""
    rows = {f"v1_{i}": {"imagename": f"{i}.png", "question": f"{i}?", "answer": "x<AND>y", "capability": names.split()}
            for i, names in enumerate(("rec", "ocr spat", "spat ocr", "rec know gen"))}
    written(folder / "mm-vet.json", json.dumps(rows))
    return {name: f" {name}\n" for name in rows}


def pope_files(folder):
    """Six questions a category; stripped answers give 2 true and 2 false positives, so F1 is 2/3."""
    texts, labels = ("Yes", "No, there is no dog.", "yes", "There is none", "No\n", "Yes. No."), "yes no no no no yes"
    for name in POPE:
        written(folder / f"coco/coco_pope_{name}.json", [{"image": f"{i // 2}.png", "label": label}
                                                         for i, label in enumerate(labels.split())])
    written(folder / "llava_pope_test.jsonl", [{"question_id": i, "image": f"{i % 6 // 2}.png", "text": "A dog?\nSay.",
                                                "category": POPE[i // 6]} for i in range(18)])
    return {str(i): texts[i % 6] for i in range(18)}


def mme_files(folder):
    """The worked example: color 125, OCR 100, all other tasks perfect."""
    said = {}
    for task in MME_TASKS:
        given = {"color": ("Yes", "No", "Yes", "The answer is no"), "OCR": ("No", "No", "Yes", "Yes", "Yes", "No")}.get(
            task, ("Yes", "no."))
        lines = [f"{i // 2}.jpg\tIs it? Please answer yes or no.\t{('Yes', 'No')[i % 2]}" for i in range(len(given))]
        written(folder / f"eval_tool/Your_Results/{task}.txt", "\n".join(lines))         # no line break at the end
        for i, text in enumerate(given):
            said[f"{task}/{i + 1}"] = text
            written(folder / f"MME_Benchmark_release_version/{task}/{'images/' * (i // 2 % 2)}{i // 2}.jpg", png())
    return said


FILES = {"mmmu": mmmu_files, "mmbench": mmbench_files, "mmvp": mmvp_files, "mmvet": mmvet_files, "pope": pope_files,
         "mme": mme_files, "fid": lambda folder: {str(i): written(folder / f"{i}.png", png()).name for i in range(2)}}
MMVP_LINE = {"question": "Is it open, or not?\nA. Open\nB. Closed\n" + LETTER_ONLY, "answer": "A",
             "gt_answers": "A", "data_id": "3"}


@pytest.mark.parametrize("bench, expected, file, line", [
    ("mmmu", {"score": 60.0}, "results.txt", "Overall-Science: num=3, acc=0.667"),
    ("mmmu --variant official", {"score": 60.0}, "prediction.json", ' "validation_Music_1": "B"'),
    ("mmbench", {"score": 50.0, "vanilla": 100.0}, "results.xlsx", None),
    ("mmbench --variant vlmevalkit", {"score": 50.0, "vanilla": 100.0}, "results.xlsx", None),
    ("mmvp", {"score": 50.0, "rows": 62.5}, "results.jsonl", json.dumps(MMVP_LINE)),
    ("mmvp --variant official", {"score": None, "reason": "the official way of MMVP needs --judge FILE"}, "", None),
    ("mmvet", {"score": None}, "results.json", ' "v1_0": " v1_0\\n",'),
    ("pope", {"score": pytest.approx(200 / 3)}, "results.json", '  "text_orig": "No",'),
    ("pope --force", {"score": pytest.approx(200 / 3)}, "results.txt", "random: TP 2"),
    ("mme", {"score": pytest.approx(1825), "cognition": 800}, "mme/color.txt",
     f"1.jpg\tIs it? Please answer yes or no.{MME_SUFFIX}\tNo\tThe answer is no"),
    ("mme --variant official", {"total": pytest.approx(2625), "skipped": 0}, "mme/OCR.txt", None)])
def test_given_answers_are_scored_and_written_for_submission(bench, expected, file, line, tmp_path, capsys):
    """Each benchmark from files in its official layout: the worked examples' numbers, printed and stored."""
    bench, *flags = bench.split()
    said = FILES[bench](tmp_path / "data")
    if "--force" in flags:                              # labels of another version: paired by position, without a word
        edit(tmp_path / "data/coco/coco_pope_random.json", "0.png", "1.png")
    preds = answers(tmp_path / "said.jsonl", dict(reversed(said.items())))                # in any order
    found = command(bench, tmp_path, "--preds", preds, *flags)
    printed = capsys.readouterr().out
    assert {key: found[key] for key in expected} == expected and found["questions"] == len(said)
    assert ("no score" if found["score"] is None else f"score {found['score']:.4g}") in printed
    assert (tmp_path / "out" / file).exists() and not [*(tmp_path / "out").rglob("*.part")]
    assert line is None or line in (tmp_path / "out" / file).read_text().splitlines()


def test_mmbench_submission_is_the_table_with_the_letters(tmp_path):
    """The columns that the server wants, `prediction` behind D; a text that begins like a formula stays a text."""
    openpyxl = pytest.importorskip("openpyxl")
    said = mmbench_files(tmp_path / "data", question="=1+1\x07?") | {"1000001": "=C\x07"}
    found = command("mmbench", tmp_path, "--preds", answers(tmp_path / "said.jsonl", said))
    sheet = openpyxl.load_workbook(tmp_path / "out/results.xlsx").active
    rows = [*sheet.values]
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[2] == (1000001, "=1+1?", "dog", "bear", "rabbit", "cat", "=C", "C", "dev")
    assert rows[5] == (2, "=1+1?", "yes", "no", None, None, "A", "A", "dev") and found["report"]["LR"] == 0
    assert sheet["B3"].data_type == "s"


# --- Asking a model --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder for each kind: a model with fresh weights, its tokenizer, the settings."""
    folders = {}
    for kind in ("emu3", "janus"):
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        config = replace(model.PRESETS[f"tiny-{kind}"], layers=1, width=64, ffn=64)
        data.train_tokenizer(folder / "tokenizer.json", config)
        torch.manual_seed(0)
        tensors, manifest = tensors_of(model.from_config(config)), {"config": asdict(config), "dtype": "float32"}
        save_checkpoint(tensors, manifest, folder / "checkpoints/0-0000000").result()
        write_json(asdict(train.TrainConfig(preset=f"tiny-{kind}")), folder / "settings.json")
    return folders


@pytest.fixture
def alone(monkeypatch):
    """Answers of six tokens; a process does not wait for others. -> run work() as the second, then the first of two."""
    def shared(work):
        for rank in "10":
            with monkeypatch.context() as process:
                process.setenv("RANK", rank)
                process.setenv("WORLD_SIZE", "2")
                work()
    monkeypatch.setitem(MAX_NEW_TOKENS, "aia", 6)
    monkeypatch.setattr(benchmarks.common, "all_done", lambda: None)
    return shared


@pytest.mark.parametrize("bench, kind, batch", [("mmvp", "emu3", 3), ("mmbench", "janus", 1), ("mmmu", "janus", 5)])
def test_raw_answers_are_stored_in_order_resumed_and_shared(bench, kind, batch, runs, alone, tmp_path, monkeypatch):
    """After a kill in the middle of a line, and from two processes, the same file: greedy answers depend on nothing."""
    said, flags = FILES[bench](tmp_path / "data"), ("--checkpoint", runs[kind], "--batch", batch)
    scores, file = command(bench, tmp_path, *flags), tmp_path / "out/predictions.jsonl"
    whole = file.read_text()
    rows, lines = [json.loads(line) for line in whole.splitlines()], whole.splitlines(keepends=True)
    assert [row["id"] for row in rows] == [*said] and all(row["response"] and row["prompt"] for row in rows)
    assert command(bench, tmp_path, "--preds", file) == scores
    file.unlink()
    written(tmp_path / "out/answers-0.jsonl", lines[3] + lines[2][:-9])
    written(tmp_path / "out/answers-1.jsonl", lines[1])
    asked, inner = [], ask_group
    monkeypatch.setattr(benchmarks.common, "ask_group", lambda *key: asked.extend(
        item.id for item in key[2]) or inner(*key))
    assert command(bench, tmp_path, *flags) == scores and file.read_text() == whole
    assert sorted(asked) == sorted({*said} - {rows[3]["id"], rows[1]["id"]})
    file.unlink()
    asked.clear()
    alone(lambda: command(bench, tmp_path, *flags))
    assert file.read_text() == whole and not [*file.parent.glob("answers*")]
    assert asked == [*said][1::2] + [*said][0::2]


@pytest.mark.parametrize("kind, bench, how, before, after, longest", [
    ("emu3", "mmvet", {}, "You are a helpful assistant. USER: ", " . ASSISTANT:", 512),
    ("janus", "mme", {"variant": "aia"}, model.JANUS_PRO_7B.system + "\n\n<|User|>: ", "\n\n<|Assistant|>:", 1),
    ("janus", "mme", {"variant": "official"}, model.JANUS_PRO_7B.system + "\n\n<|User|>: ", "\n\n<|Assistant|>:", 512),
    ("janus", "mmbench", {"prompt_style": "vlmevalkit"}, "User: ", "\n\nAssistant:", 2048)])
def test_questions_are_wrapped_for_each_model(kind, bench, how, before, after, longest, runs):
    """Emu3 takes the prompt as it stands, its period behind it; Janus-Pro's template strips the end. For MME, AIA keeps
    the first token of an answer."""
    m, text, _ = evaluation.load_run(Score(checkpoint=str(runs[kind])))
    preparer, seen = data.Preparer(m, text, training=False), []
    preparer.template.system = model.JANUS_PRO_7B.system                       # the tiny models have none
    if how.get("prompt_style"):
        preparer.template.plain()
    m.generate_text = lambda ids, *rest: seen.append((ids, rest)) or torch.full((len(ids), 1), text.ids["eos"])
    item = Item("1", "\n" * (longest > 999) + "<image 1>: a\n b ", png(size=(16, 16)), {})
    assert ask_group(Score(bench=bench, **how), preparer, [item]) == [""] and not preparer.known
    (ids, (pixels, _, tokens)), = seen
    ids, shown = ids[0].tolist(), functools.partial(text.core.decode, skip_special_tokens=False)
    first, last = ids.index(text.ids["boi"]), ids.index(text.ids["eoi"])
    assert ids[0] == text.ids["bos"] and shown(ids[1:first]) == before and (pixels is None) == (kind == "emu3")
    assert shown(ids[last + 1:]) == "\n" * (kind == "janus") + "<image 1>: a\n b" + after and tokens == longest


def test_transparency_is_white_for_mmmu_and_dropped_elsewhere(tmp_path):
    """AIA's reader of MMMU pastes on white, the others convert to RGB at once; a palette may be transparent too."""
    half = Item("1", "", png((255, 0, 0, 128), "RGBA"), {})
    assert rgb(half, "mmmu")[0, 0].tolist() == [255, 127, 127]
    assert rgb(half, "mmbench")[0, 0].tolist() == [255, 0, 0]
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert rgb(Item("1", "", tmp_path / "p.png", {}), "mmmu").min() == 255


# --- Judges ----------------------------------------------------------------------------------------------------------
def judged(bench, folder, judge, *flags):
    """Export open requests and have them answered, round after round -> scores, requests by round."""
    file, wanted, rounds = written(folder / "judge.jsonl"), folder / "open.jsonl", []
    flags = ("--judge", file, *flags)
    with contextlib.suppress(FileNotFoundError):                        # no scores.json while requests are open
        while len(rounds) < 8:
            wanted.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                command(bench, folder, "--judge-export", wanted, *flags)
            rows = [json.loads(line) for line in wanted.read_text().splitlines()]
            rounds.append([row["request"] for row in rows])
            with open(file, "a") as lines:
                lines.writelines(json.dumps(row | {"replies": judge(row["request"])}) + "\n" for row in rows)
    return command(bench, folder, *flags), rounds


def test_mmvet_is_judged_in_rounds(tmp_path, monkeypatch):
    """The worked example: replies 1.0, 0.5, "bad" and 0.3, then 0.2; of several gradings the last reply repeats."""
    prompt, said = written(tmp_path / "prompt.txt", "Table\r\n"), mmvet_files(tmp_path / "data")
    monkeypatch.setitem(PROMPTS, "mmvet", (7, hashlib.sha256(b"Table\r\n").hexdigest()))
    replies = {"0": ["1.0"], "1": ["0.5"], "2": ["bad"], "3": ["0.3", "0.7 so"]}
    found, rounds = judged("mmvet", tmp_path, lambda request: ["0.2"] if "(digit)" in request["prompt"] else
                           replies[request["prompt"].split("\n")[2][0]],
                           "--preds", answers(tmp_path / "said.jsonl", said), "--judge-prompt", prompt, "--runs", 3)
    assert [len(asked) for asked in rounds] == [4, 1] and rounds[0][1] == {
        "kind": "text", "max_tokens": 3, "prompt": "Table\r\n\n1? | x <AND> y |  v1_1\n | ", "system": None,
        "temperature": 0.0}
    assert (found["runs"], found["total"], found["judge_prompt"]) == ([50.0, 60.0, 60.0], 56.7, "official")
    graded = json.loads((tmp_path / "out/model_judge-grade-3runs.json").read_text())
    assert graded["v1_3"] == {"model": ["judge"] * 3, "content": ["0.3", "0.7", "0.7"], "score": [0.3, 0.7, 0.7]}
    _, row = csv.reader((tmp_path / "out/model_judge-cap-score-3runs.csv").read_text().splitlines())
    assert row[-3:] == ["56.7", "4.7", "[50.0, 60.0, 60.0]"]
    assert (tmp_path / "out/model_judge-cap-int-score-3runs.csv").read_text().startswith(",rec,ocr+spat,gen+know+rec,")


def test_mmbench_asks_its_judge_about_what_cannot_be_read(tmp_path):
    """One row each: question 1 hangs on it, question 2 is lost by another row, but its plain score is not. Both
    scores read the replies from the first on. An unknown prompt is named in the result."""
    prompt, said = written(tmp_path / "prompt.txt", "{q}|{o}|{p}"), mmbench_files(tmp_path / "data", first="BCDA")
    preds = answers(tmp_path / "said.jsonl", said | {"1": "some animal", "2": "hm"})
    found, rounds = judged("mmbench", tmp_path, lambda request: ["A"] if request["prompt"].endswith("\n|hm") else
                           ["who knows", "B", "C"], "--preds", preds, "--judge-prompt", prompt, "--force")
    assert [len(asked) for asked in rounds] == [2] and (found["score"], found["vanilla"]) == (50, 100)
    assert found["judge_prompt"] == hashlib.sha256(b"\1|\2|\3").hexdigest()


def test_mmvp_official_is_judged(tmp_path):
    """A reply that is not exactly yes is a no; the free answers are kept."""
    preds = answers(tmp_path / "said.jsonl", mmvp_files(tmp_path / "data"))
    found, rounds = judged("mmvp", tmp_path, lambda request: ["yes." if "answer:open?" in request["prompt"] else "Yes"],
                           "--preds", preds, "--variant", "official")
    assert (found["score"], found["rows"]) == (75, 87.5) and rounds[0][0]["temperature"] == 0.2
    assert json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[3])["answer"] == "(b)"


GENEVAL = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
           {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a red car"},
           {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
            "prompt": "two dogs"}]


def geneval_files(folder):
    written(folder / "evaluation_metadata.jsonl", GENEVAL)
    written(folder / "object_names.txt", "dog\ncat\ncar\n")


def test_geneval_asks_detector_then_colour_judge(tmp_path):
    """Both dogs found, one of two cars red, one of two pairs counted: tags 1, 1/2 and 1/2, overall 2/3."""
    geneval_files(tmp_path / "data")
    for i, row in enumerate(GENEVAL):
        written(tmp_path / f"images/{i:05d}/metadata.jsonl", [row])
        for name in ("0000.png", "0001.png", "grid.png"):
            written(tmp_path / f"images/{i:05d}/samples/{name}")

    def judge(request):
        first = "0000.png" in request["image"]
        if request["kind"] == "color":
            return ['["red"]' if first else '["blue"]']
        scores = {"0": (0.95,), "2": (0.95, 0.95, 0.88) if first else (0.95,)}.get(request["image"][4], ())
        return [json.dumps([[[0, 0, 10, 10, score] for score in scores], [], [[1, 2, 3, 4, 0.5]]])]
    found, rounds = judged("geneval", tmp_path, judge, "--preds", tmp_path / "images")
    assert [[request["kind"] for request in asked] for asked in rounds] == [["detect"] * 6, ["color"] * 2]
    assert rounds[1][0] == {"kind": "color", "image": "00001/samples/0000.png", "class_name": "car",
                            "boxes": [[1, 2, 3, 4, 0.5]]}
    assert found["score"] == pytest.approx(2 / 3) and [*found["tags"].values()] == [1, 0.5, 0.5]
    assert (found["prompts"], found["pictures"], found["correct_prompts"]) == ("evaluation_metadata.jsonl", 6, 1)
    row = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[3])
    assert row == {"filename": str(tmp_path / "images/00001/samples/0001.png"), "tag": "colors", "prompt": "a red car",
                   "correct": False, "reason": "expected red car>=1, found 0 red; and 1 blue", "metadata": json.dumps(
                       GENEVAL[1]), "details": '{"car": [[1.0, 2.0, 3.0, 4.0, 0.5]]}'}


def dpg_files(folder, variant="official"):
    file = io.StringIO()
    rows = [FIRST, *ROWS] if variant == "official" else [
        {"index": name, "text": "a text", "questions": json.dumps([row for row in ROWS if row["item_id"] == name])}
        for name in "ab"]
    table = csv.DictWriter(file, [*rows[0]], delimiter="," if variant == "official" else "\t")
    table.writeheader()
    table.writerows(rows)
    written(folder / ("dpg_bench.csv" if variant == "official" else "DPG_Bench.tsv"), file.getvalue())
    for name in "ab":
        written(folder / f"prompts/{name}.txt", f"a picture of {name}\n")


@pytest.mark.parametrize("variant, score", [("official", 62.5), ("ulmevalkit", 0.6)])
def test_dpg_asks_about_the_crops_of_a_grid(variant, score, tmp_path):
    """The worked example of two crops, each twice; a file that cannot be read is left out."""
    dpg_files(tmp_path / "data", variant)
    for name, content in {"a.png": png(size=(8, 8)), "b.v2.png": png(size=(8, 8)), "b.cut.png": b""}.items():
        written(tmp_path / "images" / name, content)
    no = {("a", 0): "a1?", ("a", 4): "a3?", ("b", 4): "b2?"}
    found, rounds = judged("dpg", tmp_path, lambda asked: [
        "no" if no.get((asked["image"][0], asked["box"][0])) == asked["question"] else "yes"],
        "--preds", tmp_path / "images", "--variant", variant)
    assert found["score"] == pytest.approx(score) and found.get("failed", ["b.cut.png"]) == ["b.cut.png"]
    assert len(rounds[0]) == 4 * 3 + 4 * 2 and rounds[0][3] == {"kind": "vqa", "image": "a.png", "box": [4, 0, 8, 4],
                                                                "question": "a1?"}
    lines = (tmp_path / "out/dpg-bench_results.txt").read_text().splitlines()
    assert lines[-1] == f"DPG-Bench score: {found['score']}" and (
        variant != "official" or lines[0] == f"{tmp_path / 'images/a.png'}, {1 / 3}, {2 / 3}, {1 / 3}, {2 / 3}, 0.5")
    detail = (tmp_path / "out/dpg-bench_results_detail.txt").read_text().splitlines()
    assert detail[0] == f"{tmp_path / 'images/a.png'}, (0, 0, 4, 4), a1?, no" and len(detail) == 20


@pytest.mark.parametrize("bench, kind, flags", [("geneval", "janus", ["--gen-roles", "plain"]), ("dpg", "emu3", [])])
def test_drawings_lie_in_the_official_folders_and_repeat(bench, kind, flags, runs, alone, tmp_path, monkeypatch):
    """Each prompt has its seed, so what a killed run lacks, and what two processes draw, are the same pictures."""
    (geneval_files if bench == "geneval" else dpg_files)(tmp_path / "data")

    def pictures():
        files = sorted((tmp_path / "out/images").rglob("*.png"))
        return {str(file.relative_to(tmp_path / "out/images")): file.read_bytes() for file in files}
    work, seeds, draw = functools.partial(command, bench, tmp_path, "--checkpoint", runs[kind], "--seed", 5, *flags
                                          ), [], evaluation.draw
    monkeypatch.setattr(evaluation, "draw", lambda *key, **how: seeds.append(key[3]) or draw(*key, **how))
    assert work()["score"] is None
    first = pictures()
    if bench == "dpg":
        assert [*first] == ["a.png", "b.png"] and Image.open(tmp_path / "out/images/a.png").size == (32, 32)
    else:
        assert [*first] == [f"{i:05d}/samples/{j:05d}.png" for i in range(3) for j in range(4)]
        assert json.loads((tmp_path / "out/images/00001/metadata.jsonl").read_text()) == GENEVAL[1]
    assert [*json.loads((tmp_path / "out/seeds.json").read_text()).values()] == seeds == [*range(5, 5 + len(seeds))]
    (tmp_path / "out/images" / min(first)).unlink()
    work()
    assert pictures() == first
    shutil.rmtree(tmp_path / "out/images")
    alone(work)
    assert pictures() == first


# --- What is refused -------------------------------------------------------------------------------------------------
def refused(capsys, *argv):
    """The one line of a command that is refused with status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command(*argv))
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def stored(folder, **content):
    np.savez(written(folder / "F.npz"), **content)


@pytest.mark.parametrize("bench, change, message", [
    ("mmvp", lambda f: edit(f / "said.jsonl", '{"id": "3"', '{"id: "3"'), r"said.jsonl line 3: not JSON"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '{"id": "3", ', "{"), r"said.jsonl line 3: there is no 'id'"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '"id": "3"', '"id": "2"'), r"said.jsonl line 3: id '2' comes twice"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '"id": "3"', '"id": "9"'), r"line 3: id '9' is none of this data set"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '"Open"', "null"), r"said.jsonl line 3: the response is no text"),
    ("mmvp", lambda f: answers(f / "said.jsonl", {"1": "A"}), r"1 answers for 8 questions, none for id '2'"),
    ("mmvp", lambda f: (f / "said.jsonl").unlink(), r"said.jsonl cannot be read"),
    ("mmvp", lambda f: edit(f / "data/Questions.csv", ",(b)", ",(c)"), r"Questions.csv record 2: it needs an Index"),
    ("mmvp", lambda f: edit(f / "data/Questions.csv", "(b)\n3", "(b)\n1"), r"data: id '1' comes 2 times"),
    ("mmvp", lambda f: edit(f / "data/Questions.csv", "Correct Answer", "Answer"), r"1: there is no 'Correct Answer'"),
    ("mmvp", lambda f: shutil.rmtree(f / "data"), r"data holds no Questions.csv"),
    ("mmvet", lambda f: edit(f / "data/mm-vet.json", '"answer"', '"reply"'), r"vet.json, v1_0: there is no 'answer'"),
    ("mme", lambda f: edit(f / "data/eval_tool/Your_Results/OCR.txt", "\tNo", ""), r"OCR.txt line 2: it needs picture"),
    ("mmmu", lambda f: written(f / "data/Art/validation-00000-of-00001.parquet", "PAR1"), r"Art/.*cannot be read"),
    ("mmmu", lambda f: written(f / "data/answer_dict_val.json", "{}"), r"json has no answer to validation_Art_1"),
    ("mmbench", lambda f: mmbench_files(f / "data", index="x"), r"record 1: index or image cannot be read"),
    ("mmbench", lambda f: mmbench_files(f / "data", image="77"), r"record 1: index or image cannot be read \('77'\)"),
    ("pope", lambda f: edit(f / "data/coco/coco_pope_random.json", "0.png", "1.png"),
     r"coco_pope_random.json does not belong to llava_pope_test.jsonl: 6 .* 6 .*line 1 is of another.*e3e3926"),
    ("pope", lambda f: written(f / "data/coco/coco_pope_random.json", [{"image": "0.png", "label": "no"}]),
     r"1 labels for 6 questions; take the labels"),
    ("pope", lambda f: edit(f / "data/llava_pope_test.jsonl", "random", "other"), r"category 'other' is none of"),
    ("mmbench --judge J --judge-prompt J", lambda f: None, r"J is not the official judge prompt .*--force takes it"),
    ("mmbench --judge J", lambda f: None, r"--judge-prompt '' cannot be read"),
    ("mmvp --judge J --variant official", lambda f: None, r"J holds no reply to .*--judge-export"),
    ("mmvp --judge J", lambda f: written(f / "J", [{"key": "", "replies": "yes"}]), r"J line 1: replies are a list"),
    ("mmvp --variant aia2", lambda f: None, r"--variant 'aia2': mmvp knows aia, official"),
    ("mmvet --prompt-style vlmevalkit", lambda f: None, r"--prompt-style vlmevalkit: its system text"),
    ("mmvp --batch 0", lambda f: None, r"--pictures, --batch and --runs start at 1"),
    ("mmvp", lambda f: written(f / "out"), r"--out .*out cannot be made"),
    ("geneval", lambda f: geneval_files(f / "data"), r"said.jsonl holds no NUMBER/samples"),
    ("geneval --preds I", lambda f: geneval_files(f / "data") or written(f / "I/00001/metadata.jsonl", "{}"),
     r"00001/metadata.jsonl is not line 1, from 0, of evaluation_metadata.jsonl: give --data"),
    ("dpg", lambda f: dpg_files(f / "data"), r"said.jsonl holds no pictures"),
    ("fid", lambda f: (f / "data/1.png").unlink(), r"data holds 1 pictures: FID needs"),
    ("fid --data F.npz", lambda f: written(f / "F.npz", "PK"), r"F.npz cannot be read"),
    ("fid --data F.npz", lambda f: stored(f, mu=np.zeros(2)), r"F.npz holds mu: it needs mu and sigma, or features"),
    ("fid --data F.npz", lambda f: stored(f, mu=np.zeros(2), sigma=np.eye(3)), r"mu \(2,\) and sigma .*do not fit"),
    ("fid --data F.npz", lambda f: stored(f, features=np.full((2, 3), np.nan)), r"are not finite"),
    ("fid --data F.npz", lambda f: stored(f, features=np.zeros((1, 3))), r"two or more pictures")])
def test_bad_files_are_refused_in_one_line(bench, change, message, tmp_path, capsys):
    """Place and remedy, status 2, and nothing that looks like a result is left behind."""
    bench, *flags = bench.split()
    answers(tmp_path / "said.jsonl", FILES.get(bench, lambda folder: {})(tmp_path / "data"))
    written(tmp_path / "J")
    change(tmp_path)
    line = refused(capsys, bench, tmp_path, "--preds", tmp_path / "said.jsonl",
                   *(tmp_path / flag if flag in ("F.npz", "I", "J") else flag for flag in flags))
    assert re.search(message, line) and not [*tmp_path.glob("out/scores.json"), *tmp_path.rglob("*.part")]


def test_a_folder_holds_answers_of_one_kind(runs, alone, tmp_path, capsys):
    """Other settings and other questions are refused, a missing picture before any question; a model that does not fit
    leaves the folder free."""
    mmvp_files(tmp_path / "data")
    emu3, janus = (("mmvp", tmp_path, "--checkpoint", runs[kind]) for kind in ("emu3", "janus"))
    line = refused(capsys, *emu3, "--prompt-style", "vlmevalkit")
    assert "--prompt-style vlmevalkit names the roles of Janus-Pro" in line
    picture = tmp_path / "data/MMVP Images/8.jpg"
    picture.rename(tmp_path / "8.jpg")
    assert re.search("question 8: picture .*8.jpg is missing: give --data", refused(capsys, *janus))
    picture.write_text("no picture")
    assert re.search("question 8: picture .*8.jpg cannot be opened", refused(capsys, *janus))
    shutil.copy(tmp_path / "8.jpg", picture)
    command(*janus)
    assert re.search("out holds results with checkpoint '.*: give another --out", refused(capsys, *emu3))
    weights = next(runs["janus"].rglob("*.safetensors"))
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))          # as if trained anew
    assert re.search("out holds results with weights '.*: give another --out", refused(capsys, *janus))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    command(*janus)
    edit(tmp_path / "data/Questions.csv", "Is it", "Was it")
    assert re.search(r"out holds results with questions '8 \(SHA-256", refused(capsys, *janus))
    geneval_files(tmp_path / "data")
    flags = ("--checkpoint", runs["emu3"], "--gen-roles", "plain", "--out", tmp_path / "drawn")
    assert "--gen-roles plain names the roles" in refused(capsys, "geneval", tmp_path, *flags)


@pytest.mark.parametrize("bench, package, pip", [
    ("mmmu", "pyarrow", "pyarrow"), ("mmbench", "openpyxl", "openpyxl"), ("fid", "pytorch_fid", "pytorch-fid"),
    ("fid --variant clean", "cleanfid", "clean-fid")])
def test_a_missing_package_is_named_with_its_command(bench, package, pip, tmp_path, capsys, monkeypatch):
    """Optional packages are imported only by what needs them."""
    bench, *flags = bench.split()
    preds = answers(tmp_path / "said.jsonl", FILES[bench](tmp_path / "data")) if bench != "fid" else tmp_path / "data"
    FILES[bench](tmp_path / "data")
    for name in (package, package + ".parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(capsys, bench, tmp_path, "--preds", preds, *flags).endswith(f"pip install {pip}")


# --- FID -------------------------------------------------------------------------------------------------------------
def test_fid_modes_resize_each_in_its_way(tmp_path):
    """A step and fine stripes: plain bilinear interpolation skips stripes, clean-fid's bicubic filter averages them; it
    overshoots beside the step, is clipped to 0..255, and rounds nothing."""
    step, stripes = np.zeros((2, 598, 598, 3), np.uint8)
    step[:, 299:], stripes[:, ::4] = 255, 255
    for name, array in (("step", step[297:301, 297:301]), ("stripes", stripes)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", array)
    plain, clean = (fid_pixels(tmp_path / "step.png", mode) for mode in ("pytorch", "clean"))
    assert plain.shape == clean.shape == (3, 299, 299) and plain.dtype == clean.dtype == torch.float32
    assert [plain.min(), plain.max(), clean.min(), clean.max()] == pytest.approx([-1, 1, 0, 255])
    assert plain[0, 0, 149] == pytest.approx(0, abs=1e-6) and (clean % 1 != 0).sum() > 1000
    assert torch.equal(clean, fid_pixels(tmp_path / "step.npy", "clean"))
    plain, clean = (fid_pixels(tmp_path / "stripes.png", mode)[0, 9, 9:11] for mode in ("pytorch", "clean"))
    assert (plain[0] - plain[1]).abs() == pytest.approx(1) and (clean[0] - clean[1]).abs() < 120


@pytest.mark.parametrize("mode, n", [("pytorch", 3), ("clean", 4)])
def test_fid_compares_folders_and_stored_numbers(mode, n, tmp_path, monkeypatch, capsys):
    """With a made-up network of two features a distance known in closed form; clean looks into subfolders too."""
    scale, shift = (127.5, 127.5) if mode == "pytorch" else (1, 0)              # -1..1 is 0..255 less 127.5
    monkeypatch.setattr(benchmarks.fid, "fid_network", lambda *_: lambda pixels: pixels[:, :2, 0, 0] * scale + shift)
    points, others = np.array([(0, 0), (200, 0), (0, 200), (200, 200)]), np.array([(100, 100), (101, 150)])
    for i, (red, green) in enumerate(points.tolist()):
        written(tmp_path / f"data/{'sub/' * (i == 3)}{i}.png", png((red, green, 7)))
    for i, (red, green) in enumerate(others.tolist()):
        written(tmp_path / f"other/{i}.png", png((red, green, 7)))
    one, other = fid_stats(points[:n]), fid_stats(others)
    found = command("fid", tmp_path, "--preds", tmp_path / "other", "--variant", mode)
    assert found["score"] == pytest.approx(fid_distance(*one, *other), rel=1e-4) and found["variant"] == mode
    assert "fewer than features" in capsys.readouterr().out
    stored(tmp_path, mu=one[0], sigma=one[1])
    np.savez(tmp_path / "other.npz", features=others)
    again = command("fid", tmp_path, "--data", tmp_path / "F.npz", "--features", tmp_path / "other.npz")
    assert again["score"] == pytest.approx(found["score"], rel=1e-4)


def test_fid_asks_each_package_for_the_network_it_means(monkeypatch):
    """pytorch-fid's takes what is resized and scaled already; clean-fid's takes 0..255."""
    calls = []

    class InceptionV3(torch.nn.Module):
        def forward(self, pixels):
            return [pixels.mean((2, 3), keepdim=True)]
    made = {"pytorch_fid.inception": SimpleNamespace(InceptionV3=lambda **how: calls.append(how) or InceptionV3()),
            "cleanfid.features": SimpleNamespace(build_feature_extractor=lambda mode, device, **how: (
                calls.append((mode, how)), lambda pixels: pixels.mean((2, 3)))[1])}
    for name, content in made.items():
        monkeypatch.setitem(sys.modules, name.split(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, content)
    for mode in ("pytorch", "clean"):
        assert fid_network(mode, "cpu")(torch.full((2, 3, 4, 4), 9.0)).tolist() == [[9.0] * 3] * 2
    assert calls == [{"resize_input": False, "normalize_input": False}, ("clean", {"use_dataparallel": False})]


def test_fid_of_the_world_uses_the_runs_own_tokenizer(runs, tmp_path):
    """Drawings of an untrained model are far from held-out scenes, and the same seed gives the same number."""
    found = [command("fid", tmp_path, "--variant", "world", "--checkpoint", runs["emu3"], "--n", 2) for _ in range(2)]
    assert found[0] == found[1] and found[0]["score"] > 0 and found[0]["pictures"] == 2 * len(SKILLS)
