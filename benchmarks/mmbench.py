"""MMBench: multiple choice under all rotations of the options (arXiv 2307.06281). Score: percent of questions answered
right in every rotation ("circular"); also reported: percent right as asked first ("vanilla").

Variants: "aia" first reads letters as the AIA paper's program does, "vlmevalkit" scores the raw answers. Both are
scored as VLMEvalKit does, which runs on the MMBench server too.
    python eval.py score mmbench --data MMBench --checkpoint RUN --out scores/mmbench
"""

import base64
import random
import re
import string
from pathlib import Path

from benchmarks.common import LETTER_ONLY, Item, find_file, mmbench_letter, spreadsheet, table
from benchmarks.judge import judge_prompt
from parts.settings import InputError

MMBENCH_STEP = 1_000_000                        # rotation k of question i is the row with index i + k * STEP
MMBENCH_FAILED = "Failed to obtain answer via API"
MMBENCH_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                    "I'm sorry, but without the image provided", "Cannot determine the answer")
MMBENCH_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MMBENCH_SHORT = {"coarse_perception": "CP", "finegrained_perception (instance-level)": "FP-S",
                 "finegrained_perception (cross-instance)": "FP-C", "logic_reasoning": "LR",
                 "relation_reasoning": "RR", "attribute_reasoning": "AR"}
# Words that the official reader (pandas) takes for a missing value: an option with such a text disappears.
MMBENCH_MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
                   "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
MMBENCH_HIDDEN = ("hint", "category", "source", "comment", "l2-category")       # columns the server does not want


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and answers
# ---------------------------------------------------------------------------------------------------------------------
def mmbench_options(row, letters=string.ascii_uppercase):
    """Row -> {letter: option} of the options that are present."""
    return {letter: row[letter] for letter in letters if row.get(letter) is not None}


def mmbench_prompt(row, style="aia"):
    """Row -> user text, of the AIA program or of VLMEvalKit's Janus class ("vlmevalkit")."""
    lines = [row["question"]]
    lines += [f"{letter}. {text}" for letter, text in mmbench_options(row, "ABCDE").items()]
    hint = row.get("hint")
    if style == "vlmevalkit":
        hints = [] if hint is None else ["Hint: " + hint]
        return "\n".join(["", *hints, *lines, "", LETTER_ONLY])
    hints = [] if hint is None else [hint]
    return "\n".join([*hints, *lines, LETTER_ONLY])


def mmbench_infer(answer, choices):
    """Answer and {letter: option} -> letter, "Z" for a refusal, False if undecided. VLMEvalKit's matching."""
    answer = str(answer)
    if MMBENCH_FAILED not in answer:
        if any(refusal in answer for refusal in MMBENCH_REFUSALS):
            return "Z"
        tokens = answer.translate(MMBENCH_BLANKS).split()
        found = [letter for letter in choices if letter in tokens]
        if len(found) == 1 and tokens.index(found[0]) > len(tokens) - 5:
            return found[0]                     # only among the last four tokens: before, "A" may be an article
        if not found and "Z" in tokens:
            return "Z"
        match = re.search(r"answer\s+is\s+\**([ABCD])", answer, re.IGNORECASE)
        if match and match[1].upper() in choices:
            return match[1].upper()             # official: the word may go on, so "answer is Apple" gives A
    answer = answer.lower()
    if len(answer) > 2 * sum(len(str(text)) for text in choices.values()):
        return False
    found = [letter for letter, text in choices.items() if str(text).lower() in answer]
    return found[0] if len(found) == 1 else False


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------
def mmbench_judge_prompt(question, choices, prediction, template):
    """Fill {q}, {o}, {p} of VLMEvalKit's matching prompt, the text of the --judge-prompt file; ValueError without."""
    if template is None:
        raise ValueError("the MMBench judge needs its prompt: pass the text of the judge-prompt file as template")
    options = "".join(f"{letter}. {text}\n" for letter, text in choices.items())
    parts = {"{q}": question, "{o}": "There are several options: \n" + options, "{p}": prediction}
    return re.sub(r"\{[qop]\}", lambda field: str(parts[field[0]]), template)   # one pass: braces in the parts stay


def mmbench_groups(rows, circular=True):
    """Rows -> {index of the first row: [first row, with circular its rotations]}. Rotations without it are dropped."""
    groups = {}
    for row in sorted(rows, key=lambda row: int(row["index"])):
        index = int(row["index"])
        if index < MMBENCH_STEP or (circular and index % MMBENCH_STEP in groups):
            groups.setdefault(index % MMBENCH_STEP, []).append(row)
    return groups


def mmbench_open(rows):
    """Rows of one group -> 1 (all right), 0 (one is wrong), or the list of rows that only a judge can read."""
    letters = [mmbench_infer(row["prediction"], mmbench_options(row)) for row in rows]
    pairs = [*zip(rows, letters, strict=True)]
    if any(letter and letter != row["answer"] for row, letter in pairs):
        return 0                                # official: a wrong row decides before any judge call
    unread = [row for row, letter in pairs if not letter]
    return unread if unread else 1


def mmbench_ask(row, judge, rng, template):
    """The judge's letter for a row, after at most three tries a random option or Z, as in VLMEvalKit."""
    choices = mmbench_options(row)
    prompt = mmbench_judge_prompt(row["question"], choices, row["prediction"], template)
    for _ in range(3):
        reply = judge(prompt, temperature=0.0, max_tokens=2048, system=None)
        letter = MMBENCH_FAILED not in reply and mmbench_infer(reply, choices)
        if letter:
            return letter
    return rng.choice([*choices, "Z"])


def mmbench_score(rows, circular=True, judge=None, rng=random, template=None):
    """Rows with `prediction` -> {"hit": {index of the first row: 0 or 1}, "report": {name: mean hit}}. VLMEvalKit.

    circular: a question counts only if all its rotations are right. Without a judge, undecided answers are wrong.
    """
    def right(row):
        return mmbench_ask(row, judge, rng, template) == row["answer"]

    groups = mmbench_groups(rows, circular)
    hit = {}
    for index, group in groups.items():
        verdict = mmbench_open(group)
        if isinstance(verdict, list):
            verdict = int(judge is not None and all(right(row) for row in verdict))     # stops at the first wrong one
        hit[index] = verdict
    named = {"Overall": list(hit.values())}
    for column in ("l2-category", "category"):  # official: if two groups share a name, the later one stays
        for name in sorted({first.get(column) for first, *_ in groups.values()} - {None}):
            members = [hit[index] for index, (first, *_) in groups.items() if first.get(column) == name]
            named[MMBENCH_SHORT.get(name, name)] = members
    report = {name: sum(hits) / len(hits) if hits else float("nan") for name, hits in named.items()}
    return {"hit": hit, "report": report}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def mmbench_file(path):
    """The tab-separated file: `path` itself, the paper's file in this folder, or else the only table of MMBench there,
    under its first or under VLMEvalKit's name. Other benchmarks may lie beside it."""
    paper = Path(path) / "mmbench_dev_20230712.tsv"
    return paper if paper.exists() else find_file(path, "mmbench*.tsv", "MMBench*.tsv", itself=True)


def read_mmbench(folder, settings):
    """File and questions. In some copies a rotated row names the row that holds its picture."""
    file = mmbench_file(folder)
    rows = table(file, "index", "question", "image", delimiter="\t", missing=MMBENCH_MISSING)
    pictures = {row["index"]: row["image"] for _, row in rows}
    items = []
    for origin, row in rows:
        image = row.pop("image")
        try:
            image = pictures[image] if image.isdigit() else image
            row["index"] = int(row["index"])
            picture = base64.b64decode("".join(image.split()), validate=True)   # it may be wrapped into lines
        except (ValueError, KeyError) as error:
            raise InputError(f"{origin}: index or image cannot be read ({error}): download it again") from error
        if not mmbench_options(row):
            raise InputError(f"{origin} has no options A, B, ...: give --data a table of MMBench")
        items.append(Item(str(row["index"]), mmbench_prompt(row, settings.prompt_style), picture, row))
    if not any(item.row["index"] < MMBENCH_STEP for item in items):
        raise InputError(f"{file} holds no row with an index below {MMBENCH_STEP}: give --data the whole file")
    return file, items


def mmbench_submission(row):
    """Row with `prediction` -> row of the server's table, the prediction as its seventh column (official)."""
    columns = [(key, value) for key, value in row.items() if key not in (*MMBENCH_HIDDEN, "prediction")]
    columns.insert(6, ("prediction", row["prediction"]))
    return dict(columns)


def mmbench_wanted(rows, judge, template):
    """Ask the judge about all rows of both scores that it alone can read, so one export holds all requests."""
    verdicts = [mmbench_open(group) for circular in (True, False) for group in mmbench_groups(rows, circular).values()]
    unread = [row for verdict in verdicts if isinstance(verdict, list) for row in verdict]
    judge.each(unread, lambda row: mmbench_ask(row, judge, random.Random(0), template))


def mmbench_result(settings, items, texts, judge):
    """Percent of hits with and without rotations. Writes results.xlsx for the server. Without a judge, VLMEvalKit's
    exact matching."""
    rows = []
    for item, response in zip(items, texts, strict=True):
        if settings.variant == "aia":
            response = mmbench_letter(response, mmbench_options(item.row, "ABCDE"))
        rows.append(item.row | {"prediction": response})
    spreadsheet(Path(settings.out) / "results.xlsx", [mmbench_submission(row) for row in rows])
    if not all(row.get("answer") for row in rows):
        return {"score": None, "reason": "this split has no answers: upload results.xlsx to the MMBench server"}
    template, name = judge_prompt(settings) if judge else (None, None)
    if judge and judge.export:
        mmbench_wanted(rows, judge, template)
        if judge.wanted:
            return None
    reports = []
    for circular in (True, False):
        if judge:
            judge.calls.clear()                 # both scores read the replies from the first one on
        reports.append(mmbench_score(rows, circular, judge, random.Random(0), template)["report"])
    report, vanilla = reports
    return {"score": 100 * report["Overall"], "vanilla": 100 * vanilla["Overall"], "report": report,
            "judge_prompt": name}
