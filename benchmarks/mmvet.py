"""MM-Vet: open questions whose answers a language model grades (arXiv 2308.02490). Score: mean grade in percent.

Without a judge there is no score: results.json can be uploaded to the official online evaluator instead.
    python eval.py score mmvet --data MM-Vet --checkpoint RUN --out scores/mmvet
"""

import csv
from pathlib import Path

import numpy as np

from benchmarks.common import Item, check_texts, find_file
from benchmarks.judge import judge_prompt
from parts.settings import InputError, aside, read_json, write_json

MMVET_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)                 # official: the first retry is at 0 again


# ---------------------------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------------------------
def mmvet_prompt(question, answer, prediction, template, retry=False):
    """The judge's table (template) with one more row, whose last column the judge fills in."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = template + "\n" + " | ".join([question, answer, prediction, ""])
    return prompt + "\nPredict the correctness of the answer (digit): " if retry else prompt


def mmvet_grade(question, answer, prediction, judge, template):
    """-> (score in [0, 1], the judge's last reply, number of calls, at most 6). MM-Vet's own evaluator, except that
    `nan` is unreadable."""
    for calls, temperature in enumerate(MMVET_TEMPERATURES, 1):
        prompt = mmvet_prompt(question, answer, prediction, template, retry=calls > 1)
        reply = judge(prompt, temperature=temperature, max_tokens=3, system=None)
        if calls == len(MMVET_TEMPERATURES):
            break                               # official: the sixth reply is never read
        reply = reply.split(" ")[0].strip()     # official: up to the first blank, so " 0.5" is unreadable
        try:
            score = float(reply)
        except ValueError:
            continue
        if 0 <= score <= 1:                     # false for nan, which passes the official test and spoils the mean
            return score, reply, calls
    return 0.0, reply, calls


def mmvet_score(scores, metadata, decimals=1):
    """{id: [score of each run]}, mm-vet.json -> percents: total, its std over runs, runs, capabilities, sets.

    MM-Vet's own evaluator: means over the questions of the metadata; a set is a combination of capabilities. Raises
    KeyError for a question without scores, ValueError for unequal numbers of runs; ignores other ids.
    """
    def percents(rows):                         # one for each run
        return sum(rows) / len(rows) * 100

    def rounded(value):
        return float(np.round(value, decimals))                     # official: numpy rounds 0.15 to 0.2

    grades = np.array([scores[name] for name in metadata], float)                   # (questions, runs)
    capabilities = {}
    sets = {}
    for question, row in zip(metadata.values(), grades, strict=True):
        needs = sorted(set(question["capability"]))
        sets.setdefault("+".join(needs), []).append(row)
        for capability in needs:
            capabilities.setdefault(capability, []).append(row)
    runs = percents(grades)                                                         # (runs,)
    return {"total": rounded(runs.mean()), "std": rounded(runs.std()), "runs": [rounded(run) for run in runs],
            "capabilities": {name: rounded(percents(rows).mean()) for name, rows in capabilities.items()},
            "sets": {name: rounded(percents(rows).mean()) for name, rows in sets.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def read_mmvet(folder, settings):
    """The file mm-vet.json, {id: fields}, and its questions."""
    file = find_file(folder, "mm-vet.json")
    items = []
    for name, row in read_json(file).items():
        for field in ("imagename", "question", "answer", "capability"):
            if not isinstance(row, dict) or field not in row:
                raise InputError(f"{file}, {name} has no {field!r}: download it again")
        check_texts(f"{file}, {name}", row, "imagename", "question", "answer")
        picture = Path(folder) / "images" / row["imagename"]
        items.append(Item(name, row["question"] + " ", picture, row))           # AIA: an empty suffix after a blank
    return file, items


def mmvet_grades(rows, responses, judge, template, runs):
    """{id: {"model": [judge], "content": [last reply], "score": [in [0, 1]]}}, one entry for each run."""
    grades = {name: {"model": [], "content": [], "score": []} for name in rows}

    def grade(name):
        question, answer = rows[name]["question"], rows[name]["answer"]
        score, reply, _ = mmvet_grade(question, answer, responses[name], judge, template)
        grades[name]["model"].append(Path(judge.file).stem)
        grades[name]["content"].append(reply)
        grades[name]["score"].append(score)

    for _ in range(runs):
        judge.each(rows, grade)
    return grades


def mmvet_result(settings, items, texts, judge):
    """Mean grade by a text judge. Writes results.json for the official online evaluator, and with a judge the grades
    and tables of MM-Vet's own evaluator."""
    out = Path(settings.out)
    rows = {item.id: item.row for item in items}
    responses = dict(zip(rows, texts, strict=True))
    write_json(responses, out / "results.json")
    if judge is None:
        return {"score": None, "reason": "answers need a judge: give --judge FILE, or upload results.json"}
    template, name = judge_prompt(settings)
    grades = mmvet_grades(rows, responses, judge, template, settings.runs)
    if judge.wanted:
        return None
    result = mmvet_score({key: row["score"] for key, row in grades.items()}, rows)
    model = Path(settings.checkpoint or "model").name
    stem = f"{model}_{Path(judge.file).stem}"
    write_json(grades, out / f"{stem}-grade-{settings.runs}runs.json")
    for kind, means in (("cap-score", result["capabilities"]), ("cap-int-score", result["sets"])):
        columns = means | {key: result[key] for key in ("total", "std", "runs")}
        file = out / f"{stem}-{kind}-{settings.runs}runs.csv"
        with aside(file) as part, open(part, "w", encoding="utf-8", newline="") as lines:
            csv.writer(lines).writerows([["", *columns], [model, *columns.values()]])
    return {"score": result["total"], **result, "judge_prompt": name}
