"""MMMU: questions of 30 college subjects, multiple choice and open (arXiv 2311.16502)."""

import ast
import contextlib
import random
import re
import string
from pathlib import Path

from benchmarks.common import LETTER_ONLY, SHORT_ANSWER, Item, mmbench_letter
from formats.datasets import pyarrow_for
from parts.settings import InputError, first_line, lines_to, read_json, write_json

# --- MMMU ------------------------------------------------------------------------------------------------------------
MMMU_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                            "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering")}
# The order of reading. Official runs take all random choices from one generator of seed 42, so it moves the score.
MMMU_SUBJECTS = tuple(sorted(subject for subjects in MMMU_DOMAINS.values() for subject in subjects))
MMMU_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
MMMU_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",                                    # 1,000
                r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                                 # 1e3
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")         # 10.5


def mmmu_options(row, strip=True):
    """Row -> {letter: option text}, empty for open questions. The column holds a Python list literal, as text."""
    texts = enumerate(ast.literal_eval(row.get("options") or "[]"))
    return {string.ascii_uppercase[i]: text.strip() if strip else text for i, text in texts}


def mmmu_prompt(row, variant="aia"):
    """Row -> user text, of the AIA program or of MMMU's own ("official"). `<image n>` marks stay in the text."""
    task = LETTER_ONLY if row["question_type"] == "multiple-choice" else SHORT_ANSWER
    if variant == "official":
        lines = [f"({letter}) {text}" for letter, text in mmmu_options(row, strip=False).items()]
        return "\n\n".join([row["question"], *(["\n".join(lines)] if lines else []), task])
    lines = [f"{letter}. {text}" for letter, text in mmmu_options(row).items()]
    return "\n".join([row["question"].strip(), *lines, task]).strip()


def mmmu_letter(pred, option):
    """Answer and {letter: stripped option text} -> letter; the text itself if there are no options. AIA's rule."""
    letter = mmbench_letter(pred, option)
    if not option or len(letter) == 1:
        return letter
    return list(option)[0 if letter else 1]     # AIA: what it cannot read is the first option, silence the second


def mmmu_parse_choice(response, all_choices, index2ans, rng):
    """Answer, letters, {letter: option text} -> the letter said last, else rng.choice(letters). MMMU's own parser."""
    for mark in ",.!?;:'":                              # official: in this order, so "A.," loses both, "A,." one
        response = response.strip(mark)
    response = f" {response} "
    stages = [(response, {letter: f"({letter})" for letter in all_choices}),
              (response, {letter: f" {letter} " for letter in all_choices})]    # official: so "A)" is no letter
    if len(response.split()) > 5:                       # official: a short answer is not compared with the options
        stages.append((response.lower(), {letter: text.lower() for letter, text in index2ans.items()}))
    for text, marks in stages:
        last = {letter: text.rfind(mark) for letter, mark in marks.items()}
        if max(last.values()) >= 0:
            return max(last, key=last.get)
    return rng.choice(all_choices)


def mmmu_normal(text):
    """Text -> [float of 2 places] if it is a number, else [lower case]; a lone character gets a blank on a side."""
    text = str(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]                 # official: "nan", "inf" and "1_000" are numbers
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_parse_open(response):
    """Answer -> what it may mean, floats and strings. MMMU's own parser: of each line the shortest tail behind an
    indicator word ("so it is 3 cm" -> "3 cm"), then the numbers in these tails."""
    response = response.strip().strip(".").lower()      # official: ".5" loses its point and reads as 5
    lines, kept = response.split("\n"), []
    for i, line in enumerate(lines):
        best = ""
        for word in MMMU_INDICATORS + (("=",) if i == len(lines) - 1 else ()):
            tail = line.split(word)[-1].strip()         # official: a plain substring, so "this " counts as "is "
            if word in line and (not best or len(tail) < len(best)):
                best = tail
        if best and best not in tuple(":,.!?;'"):
            kept.append(best)
    kept = kept or [response]
    numbers = [number for text in kept for pattern in MMMU_NUMBERS for number in re.findall(pattern, text)]
    return list(dict.fromkeys(meaning for text in kept + numbers for meaning in mmmu_normal(text)))


def mmmu_eval_choice(gold, pred):
    """Is the letter the key's, or one of a list of keys?"""
    return pred in gold if isinstance(gold, list) else pred == gold


def mmmu_eval_open(gold, parsed):
    """Does any parsed entry hold a gold string or equal a gold number? gold is a text or a list of texts."""
    golds = [value for text in (gold if isinstance(gold, list) else [gold]) for value in mmmu_normal(text)]
    texts = [value for value in golds if isinstance(value, str)]
    return any(any(text in entry for text in texts) if isinstance(entry, str) else entry in golds for entry in parsed)


def mmmu_score(predictions, answers):
    """{id: letter, or text of an open answer}, answer key -> {domain or subject: {"num", "acc"}}, "Overall" last.

    MMMU's own evaluator. A prediction that the key of its subject lacks raises KeyError.
    """
    def subject_of(name):
        return "_".join(name.split("_")[1:-1])          # validation_Art_Theory_7 -> Art_Theory

    def summary(results):                               # official: acc * n, whose last bit may turn the rounding
        num = sum(n for n, _ in results.values())
        return {"num": num, "acc": round(sum(acc * n for n, acc in results.values()) / num, 3) if num else 0}

    known, report = {subject_of(name) for name in answers}, {}
    hits = {subject: [] for subject in MMMU_SUBJECTS if subject in known}
    for name, said in predictions.items():              # official: a missing prediction is not counted
        if subject_of(name) in hits:
            gold, choice = answers[name]["ground_truth"], answers[name]["question_type"] == "multiple-choice"
            right = mmmu_eval_choice(gold, said) if choice else mmmu_eval_open(gold, mmmu_parse_open(said))
            hits[subject_of(name)].append(right)
    results = {subject: (len(right), sum(right) / len(right)) for subject, right in hits.items() if right}
    for domain, subjects in MMMU_DOMAINS.items():
        present = {subject: results[subject] for subject in subjects if subject in results}
        report["Overall-" + domain] = summary(present)
        report |= {subject: {"num": n, "acc": round(acc, 3)} for subject, (n, acc) in present.items()}
    return {**report, "Overall": summary(results)}


def read_mmmu(folder, settings):
    """Parquet files of the 30 subjects, in the order in which chance answers are drawn."""
    parquet, items = pyarrow_for(folder).parquet, []
    columns = ["id", "question", "options", "question_type", "answer", "image_1"][:5 if settings.preds else 6]
    for subject in MMMU_SUBJECTS:
        for file in sorted(Path(folder).glob(f"{subject}/validation*.parquet")):
            row = None
            try:
                for row in parquet.read_table(file, columns=columns).to_pylist():
                    picture = b"" if settings.preds else row.pop("image_1")["bytes"]    # AIA: the first one only
                    items.append(Item(row["id"], mmmu_prompt(row, settings.variant), picture, row))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
                raise InputError(f"{file} cannot be read ({row['id'] + ': ' if row else ''}{first_line(error)}): "
                                 "download it again") from error
    if not items:
        raise InputError(f"{folder} holds no SUBJECT/validation*.parquet: give --data the folder of MMMU")
    return items


def judge_mmmu(settings, items, texts, judge):
    """Accuracy; prediction.json and results.txt, which the official evaluator and EvalAI take."""
    answers, rng, predictions = mmmu_answers(settings, items), random.Random(42), {}          # official seed
    for item, said in zip(items, texts, strict=True):
        options, said = mmmu_options(item.row, strip=settings.variant == "aia"), said.strip()
        if settings.variant == "aia":
            said = mmmu_letter(said, options)
        elif options:
            said = mmmu_parse_choice(said, [*options], options, rng)
        predictions[item.id] = said
    result = mmmu_score(predictions, answers)
    write_json(predictions, Path(settings.out) / "prediction.json")
    lines_to(Path(settings.out) / "results.txt", [f"{name}: num={row['num']}, acc={row['acc']}"
                                                  for name, row in result.items()])
    return {"score": 100 * result["Overall"]["acc"], **{key: {name: row[key] for name, row in result.items()}
                                                        for key in ("acc", "num")}}


def mmmu_answers(settings, items):
    """The official key where it lies beside the data, else from the data."""
    file, answers = Path(settings.data) / "answer_dict_val.json", {}
    if file.exists():
        answers = read_json(file)
        for item in items:
            row = answers.get(item.id)
            if not isinstance(row, dict) or not {"ground_truth", "question_type"} <= set(row):
                raise InputError(f"{file} has no answer to {item.id}: take the one of MMMU's validation set")
        return answers
    for item in items:
        kind, gold = item.row["question_type"], item.row["answer"]
        with contextlib.suppress(ValueError, SyntaxError):                      # several answers are a list, as text
            listed = ast.literal_eval(gold) if gold.startswith("[") else gold
            gold = [*map(str, listed)] if isinstance(listed, list) else gold
        answers[item.id] = {"question_type": kind if kind == "multiple-choice" else "short-answer",
                            "ground_truth": gold}
    return answers
