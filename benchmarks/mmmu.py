"""MMMU: questions from 30 college subjects, multiple choice and open (arXiv 2311.16502). Score: accuracy in percent.

Variants: "aia" (prompt and letter rule of the AIA paper's program), "official" (MMMU's own prompt and parser).
    python eval.py score mmmu --data MMMU --checkpoint RUN --out scores/mmmu
"""

import ast
import contextlib
import random
import re
import string
from pathlib import Path

from benchmarks.common import LETTER_ONLY, SHORT_ANSWER, Item, lines_to, mmbench_letter, tell_left_out
from formats.readers import pyarrow_for
from parts.settings import InputError, first_line, read_json, write_json

MMMU_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                            "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering")}
# In the order of reading. It moves the score: official runs draw all random answers from one generator of seed 42.
MMMU_SUBJECTS = tuple(sorted(subject for subjects in MMMU_DOMAINS.values() for subject in subjects))
MMMU_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
MMMU_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",                                    # 1,000
                r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                                 # 1e3
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")         # 10.5


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------
def mmmu_options(row, strip=True):
    """Row -> {letter: option text}, empty for open questions. The column holds a Python list literal as text."""
    texts = ast.literal_eval(row.get("options") or "[]")
    return {string.ascii_uppercase[i]: text.strip() if strip else text for i, text in enumerate(texts)}


def mmmu_prompt(row, variant="aia"):
    """Row -> user text of the AIA program, or of MMMU's own ("official"). `<image n>` marks stay in the text."""
    task = LETTER_ONLY if row["question_type"] == "multiple-choice" else SHORT_ANSWER
    if variant == "official":
        lines = [f"({letter}) {text}" for letter, text in mmmu_options(row, strip=False).items()]
        blocks = [row["question"], "\n".join(lines), task] if lines else [row["question"], task]
        return "\n\n".join(blocks)
    lines = [f"{letter}. {text}" for letter, text in mmmu_options(row).items()]
    return "\n".join([row["question"].strip(), *lines, task]).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Reading answers
# ---------------------------------------------------------------------------------------------------------------------
def mmmu_letter(pred, option):
    """Answer and {letter: stripped option text} -> letter, or the text itself without options. AIA's rule."""
    letter = mmbench_letter(pred, option)
    if not option or len(letter) == 1:
        return letter
    letters = list(option)
    return letters[0] if letter else letters[1]                     # AIA: unreadable is the first, silence the second


def mmmu_parse_choice(response, all_choices, index2ans, rng):
    """Answer, letters, {letter: option text} -> the letter named last, else rng.choice(letters). MMMU's own parser."""
    for mark in ",.!?;:'":                      # official: in this order, so "A.," loses both, "A,." only one
        response = response.strip(mark)
    response = f" {response} "
    attempts = [(response, {letter: f"({letter})" for letter in all_choices}),
                (response, {letter: f" {letter} " for letter in all_choices})]      # official: so "A)" is no letter
    if len(response.split()) > 5:               # official: short answers are not compared with the option texts
        attempts.append((response.lower(), {letter: text.lower() for letter, text in index2ans.items()}))
    for text, marks in attempts:
        last = {letter: text.rfind(mark) for letter, mark in marks.items()}
        if max(last.values()) >= 0:
            return max(last, key=last.get)
    return rng.choice(all_choices)


def mmmu_normal(text):
    """Text -> [float with 2 places] if it is a number, else [lower case]; one character gets a blank on either side."""
    text = str(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]             # official: "nan", "inf" and "1_000" are numbers
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_tail(line, words):
    """The shortest text behind one of the indicator words ("so it is 3 cm" -> "3 cm"), "" without any."""
    best = ""
    for word in words:
        if word in line:                        # official: a plain substring, so "this " counts as "is "
            tail = line.split(word)[-1].strip()
            if not best or len(tail) < len(best):
                best = tail
    return best


def mmmu_parse_open(response):
    """Answer -> its possible meanings, floats and strings: the tail of each line, and the numbers in these tails.
    MMMU's own parser."""
    response = response.strip().strip(".").lower()                  # official: ".5" loses its point and becomes 5
    *lines, last = response.split("\n")
    tails = [mmmu_tail(line, MMMU_INDICATORS) for line in lines]
    tails.append(mmmu_tail(last, (*MMMU_INDICATORS, "=")))
    kept = [tail for tail in tails if tail and tail not in tuple(":,.!?;'")] or [response]
    numbers = [number for text in kept for pattern in MMMU_NUMBERS for number in re.findall(pattern, text)]
    return list(dict.fromkeys(meaning for text in kept + numbers for meaning in mmmu_normal(text)))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------
def mmmu_subject(name):
    """validation_Art_Theory_7 -> Art_Theory."""
    return "_".join(name.split("_")[1:-1])


def mmmu_eval_choice(gold, pred):
    """Is the letter the gold one, or one of a list of gold letters?"""
    return pred in gold if isinstance(gold, list) else pred == gold


def mmmu_eval_open(gold, parsed):
    """Does any parsed entry contain a gold text or equal a gold number? gold is a text or a list of texts."""
    golds = [value for text in (gold if isinstance(gold, list) else [gold]) for value in mmmu_normal(text)]
    texts = [value for value in golds if isinstance(value, str)]
    for entry in parsed:
        right = any(text in entry for text in texts) if isinstance(entry, str) else entry in golds
        if right:
            return True
    return False


def mmmu_score(predictions, answers):
    """{id: letter, or text of an open answer}, answer key -> {domain or subject: {"num", "acc"}}, "Overall" last.

    MMMU's own evaluator. Raises KeyError for a prediction of a known subject whose id is not in the key.
    """
    def right(answer, response):
        if answer["question_type"] == "multiple-choice":
            return mmmu_eval_choice(answer["ground_truth"], response)
        return mmmu_eval_open(answer["ground_truth"], mmmu_parse_open(response))

    def summary(results):                       # official: acc * n, whose last bit may decide the rounding
        num = sum(n for n, _ in results.values())
        return {"num": num, "acc": round(sum(acc * n for n, acc in results.values()) / num, 3) if num else 0}

    known = {mmmu_subject(name) for name in answers}
    hits = {subject: [] for subject in MMMU_SUBJECTS if subject in known}
    for name, response in predictions.items():  # official: a question without a prediction does not count
        subject = mmmu_subject(name)
        if subject in hits:
            hits[subject].append(right(answers[name], response))
    results = {subject: (len(marks), sum(marks) / len(marks)) for subject, marks in hits.items() if marks}
    report = {}
    for domain, subjects in MMMU_DOMAINS.items():
        present = {subject: results[subject] for subject in subjects if subject in results}
        report["Overall-" + domain] = summary(present)
        report |= {subject: {"num": n, "acc": round(acc, 3)} for subject, (n, acc) in present.items()}
    return {**report, "Overall": summary(results)}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def mmmu_items(parquet, file, settings):
    """Questions of one parquet file. Pictures are left out if the answers are given."""
    columns = ["id", "question", "options", "question_type", "answer"]
    if not settings.preds:
        columns.append("image_1")               # AIA: only the first picture of a question
    items = []
    origin = str(file)
    try:
        for row in parquet.read_table(file, columns=columns).to_pylist():
            origin = f"{file}, {row['id']},"
            if mmmu_subject(row["id"]) != file.parent.name:
                raise ValueError("the id is of another subject")
            picture = b"" if settings.preds else row.pop("image_1")["bytes"]
            items.append(Item(row["id"], mmmu_prompt(row, settings.variant), picture, row))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise InputError(f"{origin} cannot be read ({first_line(error)}): download it again") from error
    return items


def mmmu_gold(text):
    """The answer column: a text, or a list of texts stored as a Python literal."""
    golds = None
    if text.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            golds = ast.literal_eval(text)
    return [str(gold) for gold in golds] if isinstance(golds, list) else text


def mmmu_answers(settings, items):
    """The answer key: MMMU's own file if it lies beside the data, else from the data."""
    file = Path(settings.data) / "answer_dict_val.json"
    if not file.exists():
        answers = {}
        for item in items:
            choice = item.row["question_type"] == "multiple-choice"
            answers[item.id] = {"question_type": "multiple-choice" if choice else "short-answer",
                                "ground_truth": mmmu_gold(item.row["answer"])}
        return answers
    answers = read_json(file)
    for item in items:
        row = answers.get(item.id)
        known = isinstance(row, dict) and "question_type" in row
        if not known or not isinstance(row.get("ground_truth"), str | list):
            raise InputError(f"{file} has no answer to {item.id}: use the one of MMMU's validation set")
    return answers


def read_mmmu(folder, settings):
    """The folder, and the questions in its parquet files of the 30 subjects, in the order in which the official parser
    draws its random answers."""
    parquet = pyarrow_for(folder).parquet
    items = []
    absent = []
    for subject in MMMU_SUBJECTS:
        files = sorted(Path(folder).glob(f"{subject}/validation*.parquet"))
        if not files:
            absent.append(subject)
        for file in files:
            items += mmmu_items(parquet, file, settings)
    if not items:
        raise InputError(f"{folder} holds no SUBJECT/validation*.parquet: give --data the folder of MMMU")
    tell_left_out(absent, len(MMMU_SUBJECTS), "subjects have no file")
    mmmu_answers(settings, items)                   # a bad key is refused now, not after all questions have been asked
    return Path(folder), items


def mmmu_result(settings, items, texts, judge):
    """Accuracy in percent. Writes prediction.json, for the official evaluator and EvalAI, and results.txt."""
    rng = random.Random(42)                     # official
    predictions = {}
    for item, response in zip(items, texts, strict=True):
        options = mmmu_options(item.row, strip=settings.variant == "aia")
        response = response.strip()
        if settings.variant == "aia":
            response = mmmu_letter(response, options)
        elif options:
            response = mmmu_parse_choice(response, [*options], options, rng)
        predictions[item.id] = response
    report = mmmu_score(predictions, mmmu_answers(settings, items))
    out = Path(settings.out)
    write_json(predictions, out / "prediction.json")
    lines_to(out / "results.txt", [f"{name}: num={row['num']}, acc={row['acc']}" for name, row in report.items()])
    return {"score": 100 * report["Overall"]["acc"],
            "acc": {name: row["acc"] for name, row in report.items()},
            "num": {name: row["num"] for name, row in report.items()}}
