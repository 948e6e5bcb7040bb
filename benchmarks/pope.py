"""POPE: does the model see objects that are not there? Asks "is there a ... in the picture?" (arXiv 2305.10355). Score:
mean F1 of the three categories in percent, as LLaVA and the AIA paper report it.

    python eval.py score pope --data POPE --checkpoint RUN --out scores/pope
"""

from collections import Counter
from pathlib import Path

from benchmarks.common import Item, average, check_texts, find_file, lines_to
from parts.settings import InputError, json_lines, write_json

POPE_CATEGORIES = ("adversarial", "popular", "random")


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------
def pope_parse(text):
    """Free answer -> "yes" or "no", as POPE's evaluate.py reads it."""
    words = text.split(".")[0].replace(",", "").split(" ")          # official: nothing is stripped, "No\n" means yes
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def pope_metrics(texts, labels):
    """Answers and labels, paired by position -> counts, and shares in [0, 1], with yes as positive (evaluate.py).

    A value is None where the official program divides by zero.
    """
    said_yes = [pope_parse(text) == "yes" for text in texts]
    is_yes = [label != "no" for label in labels]
    pairs = Counter(zip(said_yes, is_yes, strict=False))            # official: a surplus on either side is dropped
    tp, fp = pairs[True, True], pairs[True, False]
    tn, fn = pairs[False, False], pairs[False, True]
    precision = tp / (tp + fp) if tp + fp else None
    recall = tp / (tp + fn) if tp + fn else None
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn,
            "accuracy": (tp + tn) / pairs.total() if pairs else None, "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if tp else None,
            "yes_ratio": average(said_yes)}                         # official: over all answers, paired or not


def pope_score(answers, labels, force=False):
    """Mean F1 of the categories in percent, and all metrics of each category (LLaVA's way to report POPE).

    answers {category: [text]}, labels {category: ["yes" or "no"]}, both in file order. InputError if they differ in
    length, as those of two versions of the data do; with force the surplus is dropped instead.
    """
    metrics = {}
    for category in sorted(answers.keys() | labels.keys()):
        texts = answers.get(category, [])
        truth = labels.get(category, [])
        if len(texts) != len(truth) and not force:
            raise InputError(f"POPE {category}: {len(texts)} answers, {len(truth)} labels; take both from one version, "
                             "or drop the surplus with --force")
        metrics[category] = pope_metrics(texts, truth)
    f1 = [row["f1"] for row in metrics.values()]
    return {"score": None if None in f1 else average(f1, 100), "categories": metrics}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def pope_labels(folder, name):
    """File and rows of the labels of one category."""
    file = find_file(folder, f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
    rows = json_lines(file, "image", "label")
    for origin, row in rows:
        check_texts(origin, row, "label")
    return file, [row for _, row in rows]


def check_labels(folder, name, images, force):
    """Labels are paired with questions by position only, so both must be of the same version: compare the pictures."""
    file, labels = pope_labels(folder, name)
    other = [i for i, (image, label) in enumerate(zip(images, labels, strict=False), 1) if image != label["image"]]
    if force or (len(images) == len(labels) and not other):
        return
    where = f", and line {other[0]} is about another picture" if other else ""
    raise InputError(f"{file} does not belong to llava_pope_test.jsonl: {len(labels)} labels for {len(images)} "
                     f"questions{where}; take the labels of AoiDragon/POPE at commit e3e3926, or --force")


def read_pope(folder, settings):
    """File and items of LLaVA's questions. The labels are in one file for each category, see check_labels."""
    file = find_file(folder, "llava_pope_test.jsonl")
    rows = json_lines(file, "question_id", "image", "text", "category")
    for origin, row in rows:
        check_texts(origin, row, "image", "text")
        if row["category"] not in POPE_CATEGORIES:
            raise InputError(f"{origin}: category {row['category']!r} is not one of {', '.join(POPE_CATEGORIES)}: "
                             "download it again")
    for name in POPE_CATEGORIES:
        check_labels(folder, name, [row["image"] for _, row in rows if row["category"] == name], settings.force)
    pictures = Path(folder) / "val2014"
    items = [Item(str(row["question_id"]), row["text"], pictures / row["image"], row) for _, row in rows]
    return file, items


def pope_result(settings, items, texts, judge):
    """Mean F1 of the three categories in percent. Writes results.json and results.txt."""
    texts = [text.strip() for text in texts]
    answers = {name: [] for name in POPE_CATEGORIES}
    for item, text in zip(items, texts, strict=True):
        answers[item.row["category"]].append(text)
    labels = {name: [row["label"] for row in pope_labels(settings.data, name)[1]] for name in POPE_CATEGORIES}
    result = pope_score(answers, labels, settings.force)
    rows = [{"question_id": item.row["question_id"], "text": text, "text_orig": text, "metadata": {}}
            for item, text in zip(items, texts, strict=True)]
    lines = [f"{name}: {key} {value}"
             for name in POPE_CATEGORIES for key, value in result["categories"][name].items()]
    write_json(rows, Path(settings.out) / "results.json")
    lines_to(Path(settings.out) / "results.txt", [*lines, f"Avg F1 score: {result['score']}"])
    if result["score"] is None:
        return {"score": None, "reason": "F1 needs a true positive in each category", **result["categories"]}
    return {"score": result["score"], **result["categories"]}
