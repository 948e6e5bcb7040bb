"""MMVP: pairs of pictures that differ in one thing (arXiv 2401.06209). Score: percent of pairs with both answers right.

Variants: "aia" (lettered options, read by rule), "official" (MMVP's own prompt; a judge grades the free answers).
    python eval.py score mmvp --data MMVP --checkpoint RUN --out scores/mmvp
"""

import json
from pathlib import Path

from benchmarks.common import LETTER_ONLY, Item, find_file, lines_to, mmbench_letter, table
from parts.settings import InputError

MMVP_JUDGE_SYSTEM = ("You are a helpful and precise assistant for checking the quality of the answer. "
                     "Please answer in only yes or no.")


def mmvp_options(text):
    """`(a) Open (b) Closed` -> {"A": "Open", "B": "Closed"}."""
    first, second = text.split("(b)")[:2]
    return {"A": first.replace("(a)", "").strip(), "B": second.strip()}


def mmvp_prompt(row, variant="aia"):
    """Row -> user text of the AIA program, or of MMVP's own ("official"), which asks for a free answer."""
    if variant == "official":
        return row["Question"] + " " + row["Options"]
    lines = [f"{letter}. {text}" for letter, text in mmvp_options(row["Options"]).items()]
    return "\n".join([row["Question"], *lines, LETTER_ONLY])


def mmvp_score(preds, golds, size=2):
    """Letters in file order -> share of pairs with both rows right; with size=1, share of single rows."""
    hits = [pred == gold for pred, gold in zip(preds, golds, strict=True)]
    starts = range(0, len(hits) - size + 1, size)                   # official: an odd last row is dropped
    whole = [all(hits[i:i + size]) for i in starts]
    return sum(whole) / len(whole) if whole else float("nan")


def mmvp_judge_prompt(prompt, gold, response):
    """The question of MMVP's own grader. prompt: that of the official variant; gold: `(a)` or `(b)`."""
    return (f"Given the following question {prompt}, the correct answer is {gold}. "
            f"Does the following answer correctly answers the question, answer:{response}?")


def mmvp_grade(prompt, gold, response, judge):
    """Does the judge accept a free answer? Official: its reply must be exactly yes, so `yes.` is a no."""
    asked = mmvp_judge_prompt(prompt, gold, response)
    # The official grader sets no limit. 16 tokens are enough: a longer reply is not yes.
    return judge(asked, temperature=0.2, max_tokens=16, system=MMVP_JUDGE_SYSTEM).lower() == "yes"


def read_mmvp(folder, settings):
    """The file Questions.csv, and its questions in file order: two successive rows are a pair."""
    file = find_file(folder, "Questions.csv")
    items = []
    for origin, row in table(file, "Question", "Options", "Correct Answer"):
        index = row.get("Index") or row.get("lndex")                # some copies spell it with a small L
        if not index or "(b)" not in row["Options"] or row["Correct Answer"] not in ("(a)", "(b)"):
            raise InputError(f"{origin} needs an Index, Options (a) ... (b) ..., and (a) or (b) as Correct Answer: "
                             "download it again")
        picture = Path(folder) / f"MMVP Images/{index}.jpg"
        items.append(Item(index, mmvp_prompt(row, settings.variant), picture, row))
    if len(items) < 2:
        raise InputError(f"{file} holds no pair of questions: download it again")
    return file, items


def mmvp_result(settings, items, texts, judge):
    """Percent of pairs with both answers right. Writes results.jsonl and results.txt."""
    golds = [item.row["Correct Answer"][1].upper() for item in items]
    texts = [text.strip() for text in texts]

    def accepted(pair):
        item, text = pair
        return mmvp_grade(item.prompt, item.row["Correct Answer"], text, judge)

    if settings.variant == "official":
        if judge is None:
            return {"score": None, "reason": "the official variant of MMVP needs --judge FILE"}
        right = judge.each(zip(items, texts, strict=True), accepted)
        if judge.wanted:
            return None
        letters = [gold if ok else "" for gold, ok in zip(golds, right, strict=True)]
    else:
        texts = [mmbench_letter(text, mmvp_options(item.row["Options"]))
                 for item, text in zip(items, texts, strict=True)]
        letters = texts
    rows = [{"question": item.prompt, "answer": text, "gt_answers": gold, "data_id": item.id}
            for item, text, gold in zip(items, texts, golds, strict=True)]
    pairs = mmvp_score(letters, golds)
    single = mmvp_score(letters, golds, size=1)
    lines_to(Path(settings.out) / "results.jsonl", map(json.dumps, rows))
    lines_to(Path(settings.out) / "results.txt", [f"The accuracy is {pairs}"])
    return {"score": 100 * pairs, "rows": 100 * single}
