"""MM-Vet: open answers, graded by a language model (arXiv 2308.02490)."""

import csv
from pathlib import Path

import numpy as np

from benchmarks.common import Item, find_file
from benchmarks.judge import judge_prompt
from parts.settings import InputError, aside, read_json, write_json

# --- MM-Vet ----------------------------------------------------------------------------------------------------------
MMVET_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)     # official: the first retry is at 0 again


def mmvet_prompt(question, answer, prediction, template, retry=False):
    """The judge's table (template) with one more line, whose last cell the judge fills."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = template + "\n" + " | ".join([question, answer, prediction, ""])
    return prompt + "\nPredict the correctness of the answer (digit): " if retry else prompt


def mmvet_grade(question, answer, prediction, judge, template):
    """-> score in 0..1, the judge's last reply, number of calls (at most 6). MM-Vet's own evaluator, but for `nan`."""
    for calls, temperature in enumerate(MMVET_TEMPERATURES, 1):
        reply = judge(mmvet_prompt(question, answer, prediction, template, retry=calls > 1),
                      temperature=temperature, max_tokens=3, system=None)
        if calls == len(MMVET_TEMPERATURES):
            break                                       # official: the sixth reply is never read
        reply = reply.split(" ")[0].strip()             # official: up to the first blank, so " 0.5" is unreadable
        try:
            score = float(reply)
        except ValueError:
            continue
        if 0 <= score <= 1:                             # not for nan, which the official test lets into the mean
            return score, reply, calls
    return 0.0, reply, calls


def mmvet_score(scores, metadata, decimals=1):
    """{id: [score of each run]}, mm-vet.json -> percents: total, its std over runs, runs, capabilities, sets.

    MM-Vet's own evaluator: means over the questions of the metadata. A question without scores raises KeyError, unequal
    numbers of runs ValueError; scores of other ids are ignored.
    """
    table = np.array([scores[name] for name in metadata], float)                # (questions, runs)
    groups = {"capabilities": {}, "sets": {}}
    for question, row in zip(metadata.values(), table, strict=True):
        has = sorted(set(question["capability"]))
        for kind, name in [("sets", "+".join(has)), *(("capabilities", capability) for capability in has)]:
            groups[kind].setdefault(name, []).append(row)

    def percents(rows):                                 # one of each run
        return sum(rows) / len(rows) * 100

    def rounded(value):
        return float(np.round(value, decimals))         # official: numpy's rounding, 0.15 becomes 0.2

    runs = percents(table)
    return {"total": rounded(runs.mean()), "std": rounded(runs.std()), "runs": [rounded(run) for run in runs],
            **{kind: {name: rounded(percents(rows).mean()) for name, rows in found.items()}
               for kind, found in groups.items()}}


def read_mmvet(folder, settings):
    """mm-vet.json, {id: fields}."""
    file, items, needed = find_file(folder, "mm-vet.json"), [], ("imagename", "question", "answer", "capability")
    for name, row in read_json(file).items():
        if absent := [field for field in needed if not isinstance(row, dict) or field not in row]:
            raise InputError(f"{file}, {name}: there is no {absent[0]!r}: download it again")
        items.append(Item(name, row["question"] + " ", Path(folder) / "images" / row["imagename"], row))
    return items


def judge_mmvet(settings, items, texts, judge):
    """Mean grade of a text judge; results.json is what the official online evaluator takes."""
    said, out = {item.id: text for item, text in zip(items, texts, strict=True)}, Path(settings.out)
    write_json(said, out / "results.json")
    if judge is None:
        return {"score": None, "reason": "a judge grades it: give --judge FILE, or upload results.json to its server"}
    (template, name), rows = judge_prompt(settings), {item.id: item.row for item in items}
    grader, graded = Path(judge.file).stem, {i: {"model": [], "content": [], "score": []} for i in rows}
    for _ in range(settings.runs):
        for i, (score, reply, _) in judge.each(rows, lambda i: (i, mmvet_grade(
                rows[i]["question"], rows[i]["answer"], said[i], judge, template))):
            for key, value in (("model", grader), ("content", reply), ("score", score)):
                graded[i][key].append(value)
    if judge.wanted:
        return None
    result = mmvet_score({i: row["score"] for i, row in graded.items()}, rows)
    asked, runs = Path(settings.checkpoint or "model").name, f"{settings.runs}runs"
    write_json(graded, out / f"{asked}_{grader}-grade-{runs}.json")
    for kind, columns in (("cap-score", result["capabilities"]), ("cap-int-score", result["sets"])):
        columns = columns | {key: result[key] for key in ("total", "std", "runs")}
        with aside(out / f"{asked}_{grader}-{kind}-{runs}.csv") as part, open(part, "w", newline="") as lines:
            csv.writer(lines).writerows([["", *columns], [asked, *columns.values()]])
    return {"score": result["total"], **result, "judge_prompt": name}
