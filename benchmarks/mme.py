"""MME: perception and cognition in yes/no questions, two for each picture (arXiv 2306.13394). Score: perception, the
sum of ten tasks, at most 2000; also reported: cognition, the sum of four, at most 800.

Variants: "aia" asks for one token, as the AIA paper's program keeps no more; "official" takes the whole answer.
    python eval.py score mme --data MME --checkpoint RUN --out scores/mme
"""

import io
from pathlib import Path

from benchmarks.common import SHORT_ANSWER, Item, average, find_file, lines_to
from parts.settings import InputError, text_lines

MME_SUFFIX = " " + SHORT_ANSWER
# task: (group, lines of its official file)
MME_TASKS = {name: ("perception", lines) for name, lines in (
    ("existence", 60), ("count", 60), ("position", 60), ("color", 60), ("posters", 294), ("celebrity", 340),
    ("scene", 400), ("landmark", 400), ("artwork", 400), ("OCR", 40))}
MME_TASKS |= {name: ("cognition", lines) for name, lines in (
    ("commonsense_reasoning", 140), ("numerical_calculation", 40), ("text_translation", 40), ("code_reasoning", 40))}


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------
def mme_parse(text):
    """Answer -> "yes", "no" or "other", as MME's calculation.py reads it."""
    start = text.lower()[:4]                    # official: so "know" is a no, and "**yes**" is other
    return next((word for word in ("yes", "no") if word in start), "other")


def mme_right(task, text):
    """Text of a task's file -> [is the answer of the line right?]; None for a line without four fields."""
    right = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):          # splitlines cuts at U+2028 too
        fields = line.split("\t")
        if len(fields) != 4:
            right.append(None)
            continue
        gold = fields[2].lower()
        if gold not in ("yes", "no"):
            raise InputError(f"MME {task}, line {number}: the third field is {fields[2]!r}; make it Yes or No")
        right.append(mme_parse(fields[3]) == gold)
    if not right or len(right) % 2:
        raise InputError(f"MME {task}, line {len(right)}: the file does not end with a pair; give two lines for each "
                         "picture")
    return right


def mme_score(files):
    """100 (accuracy + share of pictures with both answers right) for each task, and the sums over tasks.

    files {task: lines of picture, question, Yes or No, and answer, between tabs}. InputError if a task is missing, has
    an odd number of lines, or a gold answer is neither yes nor no. Source: MME's calculation.py in the AIA paper's
    copy, which skips a line without four fields: it counts as no answer, but its picture as not solved.
    """
    tasks = {}
    skipped = 0
    for task in MME_TASKS:
        if task not in files:
            raise InputError(f"MME {task}: there is no {task}.txt; run all {len(MME_TASKS)} tasks")
        right = mme_right(task, files[task])
        answered = [mark for mark in right if mark is not None]
        skipped += len(right) - len(answered)
        both = [all(pair) for pair in zip(right[::2], right[1::2], strict=True)]    # official: whatever the file names
        tasks[task] = average(answered or [0], 100) + average(both, 100)
    groups = {"perception": 0, "cognition": 0}
    for task, score in tasks.items():
        groups[MME_TASKS[task][0]] += score
    return groups | {"total": sum(groups.values()), "tasks": tasks, "skipped": skipped}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def read_mme(folder, settings):
    """Folder and lines of the templates Your_Results/TASK.txt: picture, question, gold answer; two lines for each
    picture."""
    templates = find_file(folder, "Your_Results", "*/Your_Results")
    items = []
    for task in MME_TASKS:
        home = Path(folder) / "MME_Benchmark_release_version" / task
        lines = text_lines(templates / f"{task}.txt")
        if not lines or len(lines) % 2:             # now, not after all questions have been answered
            raise InputError(f"{templates / task}.txt has {len(lines)} lines, but needs two for each picture: download "
                             "it again")
        for number, (origin, line) in enumerate(lines, 1):
            fields = line.strip().split("\t")
            if len(fields) != 3 or fields[2].lower() not in ("yes", "no"):
                raise InputError(f"{origin} needs a picture, a question, and Yes or No, between tabs: download it "
                                 "again")
            image, question, gold = fields
            picture = home / image
            if not picture.exists() and (home / "images" / image).exists():
                picture = home / "images" / image
            row = {"task": task, "image": image, "gold": gold}
            items.append(Item(f"{task}/{number}", question + MME_SUFFIX, picture, row))
    return templates, items


def mme_result(settings, items, texts, judge):
    """Perception and cognition. Writes a file for each task, as the official program takes them.

    A tab in an answer stays: such a line counts as skipped, as in AIA's program.
    """
    files = dict.fromkeys(MME_TASKS, "")
    for item, text in zip(items, texts, strict=True):
        answer = text.replace("\n", "").replace("\r", "")
        row = item.row
        files[row["task"]] += f"{row['image']}\t{item.prompt}\t{row['gold']}\t{answer}\n"
    for name, text in files.items():
        lines_to(Path(settings.out) / f"mme/{name}.txt", text.split("\n")[:-1])
    result = mme_score(files)
    return {"score": result["perception"], **result}
