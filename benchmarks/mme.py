"""MME: perception and cognition in yes/no questions (arXiv 2306.13394)."""

import io
from pathlib import Path

from benchmarks.common import SHORT_ANSWER, Item, average, find_file
from parts.settings import InputError, lines_to, text_lines

# task: (group, lines of its official file)
MME_TASKS = {name: ("perception", lines) for name, lines in (
    ("existence", 60), ("count", 60), ("position", 60), ("color", 60), ("posters", 294), ("celebrity", 340),
    ("scene", 400), ("landmark", 400), ("artwork", 400), ("OCR", 40))}
MME_TASKS |= {name: ("cognition", lines) for name, lines in (
    ("commonsense_reasoning", 140), ("numerical_calculation", 40), ("text_translation", 40), ("code_reasoning", 40))}


def mme_parse(text):
    """Answer field -> "yes", "no" or "other", as calculation.py of MME reads it."""
    start = text.lower()[:4]                                     # official: so "know" is a no and "**yes**" is other
    return next((word for word in ("yes", "no") if word in start), "other")


def mme_right(task, text):
    """Text of a task's file -> right or wrong of each line; None for a line without four fields."""
    right = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):         # unlike splitlines, line ends only
        fields = line.split("\t")
        if len(fields) == 4 and fields[2].lower() not in ("yes", "no"):
            raise InputError(f"MME {task}, line {number}: the third field is {fields[2]!r}; make it Yes or No")
        right.append(mme_parse(fields[3]) == fields[2].lower() if len(fields) == 4 else None)
    if not right or len(right) % 2:
        raise InputError(f"MME {task}, line {len(right)}: the file ends without a pair; give two lines a picture")
    return right


def mme_score(files):
    """100 (accuracy + share of pictures with both answers right) per task, and the sums over tasks.

    files {task: text of image, question, Yes|No and answer, by tabs}. InputError when a task is missing, has an odd
    number of lines, or a gold answer is not yes or no. Source: calculation.py of MME, in the copy of the AIA paper,
    which skips a line without four fields: it is no answer, but its picture counts as not solved.
    """
    tasks, skipped = {}, 0
    for task in MME_TASKS:
        if task not in files:
            raise InputError(f"MME {task}: there is no {task}.txt; run all {len(MME_TASKS)} tasks")
        right = mme_right(task, files[task])
        answered = [each for each in right if each is not None]
        skipped += len(right) - len(answered)
        both = [all(pair) for pair in zip(right[::2], right[1::2], strict=True)]     # official: whatever the names
        tasks[task] = average(answered or [0], 100) + average(both, 100)
    groups = {group: sum(score for task, score in tasks.items() if MME_TASKS[task][0] == group)
              for group in ("perception", "cognition")}
    return groups | {"total": sum(groups.values()), "tasks": tasks, "skipped": skipped}


MME_SUFFIX = " " + SHORT_ANSWER


def read_mme(folder, settings):
    """The templates Your_Results/TASK.txt: picture, question, answer; two lines a picture."""
    items = []
    for task in MME_TASKS:
        home = Path(folder) / "MME_Benchmark_release_version" / task
        placed = text_lines(find_file(folder, f"Your_Results/{task}.txt", f"*/Your_Results/{task}.txt"))
        for number, (origin, line) in enumerate(placed, 1):
            fields = line.strip().split("\t")
            if len(fields) != 3 or fields[2].lower() not in ("yes", "no"):
                raise InputError(f"{origin}: it needs picture, question, and Yes or No, between tabs: download it "
                                 "again")
            choices = (home / fields[0], home / "images" / fields[0])
            picture = next(filter(Path.exists, choices), choices[0])
            row = {"task": task, "image": fields[0], "gold": fields[2]}
            items.append(Item(f"{task}/{number}", fields[1] + MME_SUFFIX, picture, row))
    return items


def judge_mme(settings, items, texts, judge):
    """Perception and cognition; a file a task as the official program takes them. A tab in an answer stays: the scorer
    counts such lines as skipped, as AIA's does."""
    files = dict.fromkeys(MME_TASKS, "")
    for item, text in zip(items, texts, strict=True):
        row, said = item.row, text.replace("\n", "").replace("\r", "")
        files[row["task"]] += f"{row['image']}\t{item.prompt}\t{row['gold']}\t{said}\n"
    for name, text in files.items():
        lines_to(Path(settings.out) / f"mme/{name}.txt", text.split("\n")[:-1])
    result = mme_score(files)
    return {"score": result["perception"], **result}
