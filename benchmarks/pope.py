"""POPE: is there a ... in the picture? (arXiv 2305.10355)."""

from collections import Counter
from pathlib import Path

from benchmarks.common import Item, average, find_file
from parts.settings import InputError, json_lines, lines_to, write_json


def pope_parse(text):
    """Free answer -> "yes" or "no", as evaluate.py of POPE reads it."""
    words = text.split(".")[0].replace(",", "").split(" ")       # official: nothing is stripped, so "No\n" means yes
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def pope_metrics(texts, labels):
    """Answers and labels, paired by position -> counts and shares in 0..1 with yes as positive (evaluate.py of POPE).

    Where the official program would divide by zero the value is None.
    """
    said, truth = [pope_parse(text) == "yes" for text in texts], [label != "no" for label in labels]
    pairs = Counter(zip(said, truth, strict=False))              # official: what one side has too much is left out
    tp, fp, tn, fn = (pairs[pair] for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = (tp / whole if whole else None for whole in (tp + fp, tp + fn))
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn,
            "accuracy": (tp + tn) / pairs.total() if pairs else None, "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if tp else None,
            "yes_ratio": average(said)}                          # official: over all answers, paired or not


def pope_score(answers, labels, force=False):
    """The mean F1 of the categories in percent, and all metrics of each category (LLaVA's way to report POPE).

    answers {category: [text]}, labels {category: ["yes" or "no"]}, both in file order. InputError when they differ in
    length, as those of two versions of the data do. With force, the surplus is dropped instead.
    """
    metrics = {}
    for category in sorted(answers.keys() | labels.keys()):
        said, truth = answers.get(category, []), labels.get(category, [])
        if len(said) != len(truth) and not force:
            raise InputError(f"POPE {category}: {len(said)} answers, {len(truth)} labels; take both from one version, "
                             "or drop the surplus with --force")
        metrics[category] = pope_metrics(said, truth)
    f1 = [each["f1"] for each in metrics.values()]
    return {"score": None if None in f1 else average(f1, 100), "categories": metrics}


POPE = ("adversarial", "popular", "random")


def read_pope(folder, settings):
    """LLaVA's questions; the labels lie in one file a category and are paired by position."""
    placed = json_lines(find_file(folder, "llava_pope_test.jsonl"), "question_id", "image", "text", "category")
    for origin, row in placed:
        if row["category"] not in POPE:
            raise InputError(f"{origin}: category {row['category']!r} is none of {', '.join(POPE)}: download it again")
    for name in POPE:
        file, labels = pope_labels(folder, name)
        mine = [row["image"] for _, row in placed if row["category"] == name]
        wrong = next((i for i, (a, b) in enumerate(zip(mine, labels, strict=False), 1) if a != b["image"]), 0)
        if (len(mine) != len(labels) or wrong) and not settings.force:
            raise InputError(f"{file} does not belong to llava_pope_test.jsonl: {len(labels)} labels for {len(mine)} "
                             f"questions" + f", and line {wrong} is of another picture" * bool(wrong)
                             + "; take the labels of AoiDragon/POPE at commit e3e3926, or --force")
    return [Item(str(row["question_id"]), row["text"], Path(folder) / "val2014" / row["image"], row)
            for _, row in placed]


def pope_labels(folder, name):
    """File and rows of the labels of a category."""
    file = find_file(folder, f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
    return file, [row for _, row in json_lines(file, "image", "label")]


def judge_pope(settings, items, texts, judge):
    """Mean F1 of the three categories; results.json and results.txt."""
    texts, said = [text.strip() for text in texts], {name: [] for name in POPE}
    for item, text in zip(items, texts, strict=True):
        said[item.row["category"]].append(text)
    labels = {name: [row["label"] for row in pope_labels(settings.data, name)[1]] for name in POPE}
    result = pope_score(said, labels, settings.force)
    write_json([{"question_id": item.row["question_id"], "text": text, "text_orig": text, "metadata": {}}
                for item, text in zip(items, texts, strict=True)], Path(settings.out) / "results.json")
    lines_to(Path(settings.out) / "results.txt", [
        *(f"{name}: {key} {value}" for name in POPE for key, value in result["categories"][name].items()),
        f"Avg F1 score: {result['score']}"])
    reason = {"reason": "F1 needs a true positive in each category"} if result["score"] is None else {}
    return {"score": result["score"], **reason, **result["categories"]}
