"""MMBench: multiple choice under all rotations of the options (arXiv 2307.06281)."""

import base64
import random
import re
import string
from pathlib import Path

from benchmarks.common import LETTER_ONLY, Item, find_file, mmbench_letter, spreadsheet, table
from benchmarks.judge import judge_prompt
from parts.settings import InputError

# --- MMBench ---------------------------------------------------------------------------------------------------------
MMBENCH_STEP = 1_000_000                                # copy k of question i, its options turned, is row i + k * STEP
MMBENCH_FAILED = "Failed to obtain answer via API"
MMBENCH_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                    "I'm sorry, but without the image provided", "Cannot determine the answer")
MMBENCH_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MMBENCH_SHORT = {"coarse_perception": "CP", "finegrained_perception (instance-level)": "FP-S",
                 "finegrained_perception (cross-instance)": "FP-C", "logic_reasoning": "LR",
                 "relation_reasoning": "RR", "attribute_reasoning": "AR"}


def mmbench_options(row, letters=string.ascii_uppercase):
    """Row -> {letter: option} of the options that are present."""
    return {letter: row[letter] for letter in letters if row.get(letter) is not None}


def mmbench_prompt(row, style="aia"):
    """Row -> user text, of the AIA program or of VLMEvalKit's Janus class ("vlmevalkit")."""
    lines = [row["question"], *(f"{letter}. {text}" for letter, text in mmbench_options(row, "ABCDE").items())]
    hint = [] if row.get("hint") is None else [("Hint: " if style == "vlmevalkit" else "") + row["hint"]]
    return "\n".join(["", *hint, *lines, "", LETTER_ONLY] if style == "vlmevalkit" else [*hint, *lines, LETTER_ONLY])


def mmbench_infer(answer, choices):
    """Answer and {letter: option} -> letter, "Z" for a refusal, False if it cannot be told. VLMEvalKit's matching."""
    answer = str(answer)
    if MMBENCH_FAILED not in answer:
        if any(refusal in answer for refusal in MMBENCH_REFUSALS):
            return "Z"
        tokens = answer.translate(MMBENCH_BLANKS).split()
        found = [letter for letter in choices if letter in tokens]
        if len(found) == 1 and tokens.index(found[0]) > len(tokens) - 5:
            return found[0]                             # only among the last four tokens: earlier, "A" is an article
        if not found and "Z" in tokens:
            return "Z"
        said = re.search(r"answer\s+is\s+\**([ABCD])", answer, re.IGNORECASE)
        if said and said[1].upper() in choices:
            return said[1].upper()                      # official: no word end, "answer is Apple" gives A
    answer = answer.lower()
    if len(answer) > 2 * sum(len(str(text)) for text in choices.values()):
        return False
    found = [letter for letter, text in choices.items() if str(text).lower() in answer]
    return found[0] if len(found) == 1 else False


def mmbench_judge_prompt(question, choices, prediction, template):
    """Fill {q}, {o}, {p} of VLMEvalKit's matching prompt, which the user passes as a file; ValueError without it."""
    if template is None:
        raise ValueError("the MMBench judge needs its prompt: pass the text of the judge-prompt file as template")
    options = "".join(f"{letter}. {text}\n" for letter, text in choices.items())
    parts = {"{q}": question, "{o}": "There are several options: \n" + options, "{p}": prediction}
    return re.sub(r"\{[qop]\}", lambda field: str(parts[field[0]]), template)   # one pass: braces in a part stay


def mmbench_groups(rows, circular=True):
    """Rows -> {index of the main row: its rows, sorted}; circular: with its copies. Copies without a main row go."""
    groups = {}
    for row in sorted(rows, key=lambda row: int(row["index"])):
        index = int(row["index"])
        if index < MMBENCH_STEP or (circular and index % MMBENCH_STEP in groups):
            groups.setdefault(index % MMBENCH_STEP, []).append(row)
    return groups


def mmbench_open(rows):
    """Rows of one group -> 1 (all right), 0 (one is wrong), or the list of rows that only a judge can read."""
    read = [(row, mmbench_infer(row["prediction"], mmbench_options(row))) for row in rows]
    if any(letter and letter != row["answer"] for row, letter in read):
        return 0                                        # official: a wrong row decides before any judge call
    return [row for row, letter in read if not letter] or 1


def mmbench_ask(row, judge, rng, template):
    """The judge's letter for a row, in at most three tries; then any option or Z by chance, as VLMEvalKit does."""
    choices = mmbench_options(row)
    prompt = mmbench_judge_prompt(row["question"], choices, row["prediction"], template)
    for _ in range(3):
        reply = judge(prompt, temperature=0.0, max_tokens=2048, system=None)
        letter = MMBENCH_FAILED not in reply and mmbench_infer(reply, choices)
        if letter:
            return letter
    return rng.choice([*choices, "Z"])


def mmbench_score(rows, circular=True, judge=None, rng=random, template=None):
    """Rows with `prediction` -> {"hit": {index of the main row: 0 or 1}, "report": {name: mean hit}}. VLMEvalKit.

    circular: a question counts if every copy of it is right. Without a judge, what cannot be read is wrong.
    """
    groups, hit = mmbench_groups(rows, circular), {}
    for index, group in groups.items():
        verdict = mmbench_open(group)
        if isinstance(verdict, list):                   # all() stops at the first wrong letter, and so do the calls
            verdict = int(judge is not None and all(mmbench_ask(row, judge, rng, template) == row["answer"]
                                                    for row in verdict))
        hit[index] = verdict
    named = {"Overall": list(hit.values())}
    for column in ("l2-category", "category"):          # official: of two groups with one name the later stays
        for name in sorted({main.get(column) for main, *_ in groups.values()} - {None}):
            members = [hit[index] for index, (main, *_) in groups.items() if main.get(column) == name]
            named[MMBENCH_SHORT.get(name, name)] = members
    return {"hit": hit, "report": {name: sum(hits) / len(hits) if hits else float("nan")
                                   for name, hits in named.items()}}


# Words that the official reader (pandas) takes for a missing value: an option of that text disappears.
MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
           "NA", "NULL", "NaN", "None", "n/a", "nan", "null")


def read_mmbench(folder, settings):
    """The tab-separated file; a rotated row may name the row that holds its picture."""
    file = Path(folder) if Path(folder).is_file() else find_file(folder, "mmbench_dev_20230712.tsv", "*.tsv")
    placed = table(file, "index", "question", "image", delimiter="\t", missing=MISSING)
    pictures, items = {row["index"]: row["image"] for _, row in placed}, []
    for origin, row in placed:
        image = row.pop("image")
        try:
            image = pictures[image] if image.isdigit() else image
            row["index"], picture = int(row["index"]), base64.b64decode(image, validate=True)
        except (ValueError, KeyError) as error:
            raise InputError(f"{origin}: index or image cannot be read ({error}): download it again") from error
        items.append(Item(str(row["index"]), mmbench_prompt(row, settings.prompt_style), picture, row))
    if not any(item.row["index"] < MMBENCH_STEP for item in items):
        raise InputError(f"{file} holds no row with an index below {MMBENCH_STEP}: give --data the whole file")
    return items


def judge_mmbench(settings, items, texts, judge):
    """Mean hit with and without CircularEval; results.xlsx for the server. Without a judge: exact matching."""
    rows, shown, hidden = [], [], ("hint", "category", "source", "comment", "l2-category")
    for item, said in zip(items, texts, strict=True):
        if settings.variant == "aia":
            said = mmbench_letter(said, mmbench_options(item.row, "ABCDE"))
        rows.append(item.row | {"prediction": said})
        one = [(key, value) for key, value in item.row.items() if key not in hidden]
        shown.append(dict([*one[:6], ("prediction", said), *one[6:]]))          # official place of the column
    spreadsheet(Path(settings.out) / "results.xlsx", shown)
    if not all(row.get("answer") for row in rows):
        return {"score": None, "reason": "this split has no answers: upload results.xlsx to the server of MMBench"}
    template, name = judge_prompt(settings) if judge else (None, None)
    if judge and judge.export:
        verdicts = [mmbench_open(group) for circular in (True, False)
                    for group in mmbench_groups(rows, circular).values()]
        unread = [row for verdict in verdicts if isinstance(verdict, list) for row in verdict]
        judge.each(unread, lambda row: mmbench_ask(row, judge, random.Random(0), template))
        if judge.wanted:
            return None
    reports = []
    for circular in (True, False):
        if judge:
            judge.calls.clear()                                                 # each grading from the first reply on
        reports.append(mmbench_score(rows, circular, judge, random.Random(0), template)["report"])
    report, vanilla = reports
    return {"score": 100 * report["Overall"], "vanilla": 100 * vanilla["Overall"], "report": report,
            "judge_prompt": name}
