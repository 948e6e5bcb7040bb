"""MMVP: pairs of pictures that differ in one thing (arXiv 2401.06209)."""

import json
from pathlib import Path

from benchmarks.common import LETTER_ONLY, Item, find_file, mmbench_letter, table
from parts.settings import InputError, lines_to

# --- MMVP ------------------------------------------------------------------------------------------------------------
MMVP_JUDGE_SYSTEM = ("You are a helpful and precise assistant for checking the quality of the answer. "
                     "Please answer in only yes or no.")


def mmvp_options(text):
    """`(a) Open (b) Closed` -> {"A": "Open", "B": "Closed"}."""
    first, second = text.split("(b)")[:2]
    return {"A": first.replace("(a)", "").strip(), "B": second.strip()}


def mmvp_prompt(row, variant="aia"):
    """Row -> user text, of the AIA program or of MMVP's own ("official", answered freely and read by a judge)."""
    if variant == "official":
        return row["Question"] + " " + row["Options"]
    lines = [f"{letter}. {text}" for letter, text in mmvp_options(row["Options"]).items()]
    return "\n".join([row["Question"], *lines, LETTER_ONLY])


def mmvp_score(preds, golds, size=2):
    """Letters in file order -> share of whole pairs with both rows right; size=1 gives the share of single rows."""
    hits = [pred == gold for pred, gold in zip(preds, golds, strict=True)]
    whole = [all(hits[i:i + size]) for i in range(0, len(hits) - size + 1, size)]   # official: an odd row is dropped
    return sum(whole) / len(whole) if whole else float("nan")


def mmvp_judge_prompt(prompt, gold, response):
    """The question of MMVP's own grader; prompt is that of the official variant, gold `(a)` or `(b)`."""
    return (f"Given the following question {prompt}, the correct answer is {gold}. "
            f"Does the following answer correctly answers the question, answer:{response}?")


def mmvp_grade(prompt, gold, response, judge):
    """Is a free answer right by the judge? Official: the reply has to be exactly yes, and `yes.` is a no."""
    asked = mmvp_judge_prompt(prompt, gold, response)
    # The official grader sets no limit of tokens; 16 are enough, since a longer reply is not yes.
    return judge(asked, temperature=0.2, max_tokens=16, system=MMVP_JUDGE_SYSTEM).lower() == "yes"


def read_mmvp(folder, settings):
    """Questions.csv in file order: two rows are a pair."""
    file, items = find_file(folder, "Questions.csv"), []
    for origin, row in table(file, "Question", "Options", "Correct Answer"):
        index = row.get("Index") or row.get("lndex")                            # so spelled in some copies
        if not index or "(b)" not in row["Options"] or row["Correct Answer"] not in ("(a)", "(b)"):
            raise InputError(f"{origin}: it needs an Index, Options (a) ... (b) ..., and one of the two as Correct "
                             "Answer: download it again")
        items.append(Item(index, mmvp_prompt(row, settings.variant), Path(folder) / f"MMVP Images/{index}.jpg", row))
    if len(items) < 2:
        raise InputError(f"{file} holds no pair of questions: download it again")
    return items


def judge_mmvp(settings, items, texts, judge):
    """Share of pairs with both answers right; results.jsonl and results.txt."""
    golds, texts = [item.row["Correct Answer"][1].upper() for item in items], [said.strip() for said in texts]
    if settings.variant == "official":
        if judge is None:
            return {"score": None, "reason": "the official way of MMVP needs --judge FILE"}
        right = judge.each(zip(items, texts, strict=True), lambda one: mmvp_grade(
            one[0].prompt, one[0].row["Correct Answer"], one[1], judge))
        if judge.wanted:
            return None
        letters = [gold if ok else "" for gold, ok in zip(golds, right, strict=True)]
    else:
        letters = texts = [mmbench_letter(said, mmvp_options(item.row["Options"]))
                           for item, said in zip(items, texts, strict=True)]
    rows = [{"question": item.prompt, "answer": said, "gt_answers": gold, "data_id": item.id}
            for item, said, gold in zip(items, texts, golds, strict=True)]
    share, single = mmvp_score(letters, golds), mmvp_score(letters, golds, 1)
    lines_to(Path(settings.out) / "results.jsonl", map(json.dumps, rows))
    lines_to(Path(settings.out) / "results.txt", [f"The accuracy is {share}"])
    return {"score": 100 * share, "rows": 100 * single}
