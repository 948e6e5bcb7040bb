"""DPG-Bench: dense prompts, questions about each drawing (arXiv 2403.05135)."""

import contextlib
import json
import os
from collections import namedtuple
from pathlib import Path

from PIL import Image

from benchmarks.common import average, draw_all, find_file, table
from parts.processes import rank
from parts.settings import InputError, lines_to, text_lines

DPGQuestion = namedtuple("DPGQuestion", "id parents l1 l2 text")


def dpg_crops(resolution, pic_num=4):
    """Boxes of the samples, each resolution pixels wide, in their 2 x 2 grid: row by row (compute_dpg_bench.py)."""
    return [(x, y, x + resolution, y + resolution) for y in (0, resolution) for x in (0, resolution)][:pic_num]


def dpg_category(text):
    """The tuple "attribute - color (car, red)" -> its categories "attribute" and "attribute - color"."""
    l2 = text.split("(")[0].strip()
    return l2.split("-")[0].strip(), l2


def dpg_questions(rows, variant="official"):
    """Rows of dpg_bench.csv as dicts -> {item: [DPGQuestion]}. InputError names a row that cannot be read."""
    official, items, previous = variant == "official", {}, None
    for number, row in enumerate(rows, 1):
        if official and number == 1:                             # official: the first row of the data is never read
            continue
        try:
            item, broad, parents = row["item_id"], row.get("category_broad"), row["dependency"]
            parents = parents if isinstance(parents, list) else str(parents).split(",")
            levels = dpg_category(row["tuple"]) if official else (
                broad, f"{broad}-{row.get('category_detailed') or ''}")
            question = DPGQuestion(int(row["proposition_id"]), [int(parent) for parent in parents], *levels,
                                   row["question_natural_language"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"DPG-Bench, data row {number}: {error!r}; restore the row of dpg_bench.csv") from None
        if official and item != previous:                        # official: an item that comes back starts afresh
            items[item] = {}
        items.setdefault(item, {})[question.id if official else number] = question      # official: the last one stays
        previous = item
    return {item: list(questions.values()) for item, questions in items.items()}


def dpg_marks(questions, replies, official):
    """Replies {question: reply} to one sample -> 0 or 1 for each question, plain and after the rule of parents."""
    plain = [int(replies[question.text] == "yes") for question in questions]
    final, scores = [], {question.id: value for question, value in zip(questions, plain, strict=True) if official}
    for question, value in zip(questions, plain, strict=True):
        # A 0 travels down in file order. A parent that was never read: official KeyError, ULMEvalKit a yes.
        parents = (scores[parent] if official else scores.get(parent, 1) for parent in question.parents if parent)
        scores[question.id] = value if all(parents) else 0
        final.append(scores[question.id])
    return plain, final


def dpg_score(rows, answers, pic_num, variant):
    """How many of the questions about long prompts are answered yes, where a question needs the yes of its parents.

    rows: dicts of dpg_bench.csv; answers {file name: [{question: reply}, one a crop or sample]}.
    official (compute_dpg_bench.py of ELLA): percent, a mean over pictures of pic_num crops; images {file: 0..1}; failed
    names the files without item, crop, reply or parent, which are left out. ulmevalkit (its dpgbench.py, which scored
    the AIA paper): shares in 0..1 over all questions of all samples; InputError where a reply is missing.
    """
    official = variant == "official"
    items = dpg_questions(rows, variant)
    images, failed, every, l1, l2 = {}, [], [], {}, {}
    for file, samples in answers.items():
        item = os.path.basename(file).split(".")[0]
        if not official and item not in items:                   # ULMEvalKit starts from items: no other file is seen
            continue
        try:
            samples = [samples[i] for i in range(pic_num)] if official else samples
            judged = [dpg_marks(items[item], replies, official) for replies in samples]
        except (KeyError, IndexError) as error:
            if not official:
                raise InputError(f"DPG-Bench {file}: no reply to {error}; have the judge answer it") from None
            failed.append(file)
            continue
        images[file] = average(average(final) for _, final in judged)
        # Official: the categories see the last crop only, and its answers before the rule of parents.
        for values in [judged[-1][0]] if official else [final for _, final in judged]:
            every += values
            for question, value in zip(items[item], values, strict=True):
                l1.setdefault(question.l1, []).append(value)
                l2.setdefault(question.l2, []).append(value)
    unit = 100 if official else 1
    l1, l2 = ({name: average(values, unit) for name, values in level.items()} for level in (l1, l2))
    score = {"score": average(images.values() if official else every, unit), "l1": l1, "l2": l2}
    return score | {"images": images, "failed": failed} if official else score


def read_dpg(settings):
    """Rows of questions, as dicts, and {item: prompt}: from dpg_bench.csv and prompts/, or from ULMEvalKit's table."""
    folder, rows, prompts = Path(settings.data), [], {}
    if settings.variant == "ulmevalkit" and not (folder / "dpg_bench.csv").exists():
        for origin, row in table(find_file(folder, "*.tsv"), "index", "text", "questions", delimiter="\t"):
            prompts[row["index"]] = row["text"]
            try:
                rows += [{"item_id": row["index"]} | question for question in json.loads(row["questions"])]
            except (ValueError, TypeError) as error:
                raise InputError(f"{origin}: its questions are no list of objects ({error}): download it again"
                                 ) from error
        return rows, prompts
    needed = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    rows = [row for _, row in table(find_file(folder, "dpg_bench.csv"), *needed)]
    return rows, {file.stem: "\n".join(line for _, line in text_lines(file))
                  for file in sorted(folder.glob("prompts/*.txt"))}


def run_dpg(settings, judge):
    """Grids of 2 x 2 pictures a prompt, and the answers of a VQA judge about them."""
    (rows, prompts), folder = read_dpg(settings), Path(settings.preds or Path(settings.out) / "images")
    items, answers, crops = dpg_questions(rows, settings.variant), {}, {}
    if not settings.preds:
        if not prompts:
            raise InputError(f"{settings.data} holds no prompts/*.txt to draw: give --data the folder of DPG-Bench")
        draw_all(settings, prompts, {name: [folder / f"{name}.png"] for name in prompts})
    if rank():
        return None
    pictures = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not pictures:
        raise InputError(f"{folder} holds no pictures: give --preds a folder of files named after their prompts")
    if judge is None:
        return {"score": None, "reason": f"a VQA judge looks at {folder}: --judge-export FILE writes what to ask it"}
    for file in pictures:
        crops[file.name], questions = [], items.get(file.name.split(".")[0], ())
        with contextlib.suppress(OSError), Image.open(file) as opened:          # official: what is unreadable is left
            crops[file.name] = dpg_crops(opened.width // (1 + (settings.pictures > 1)), settings.pictures)
        answers[file.name] = [dict(judge.each(dict.fromkeys(question.text for question in questions),
                                              lambda text, c=(file.name, crop): (text, judge.vqa(c, text))))
                              for crop in crops[file.name]]
    if judge.wanted:
        return None
    result = dpg_score(rows, answers, settings.pictures, settings.variant)
    lines_to(Path(settings.out) / "dpg-bench_results_detail.txt", [
        f"{folder / name}, {box}, {question}, {reply}" for name, parts in answers.items()
        for box, said in zip(crops[name], parts, strict=True) for question, reply in said.items()])
    lines_to(Path(settings.out) / "dpg-bench_results.txt", dpg_report(folder, items, answers, result))
    return {name: value for name, value in result.items() if name != "images"} | {"pictures": len(pictures)}


def dpg_report(folder, items, answers, result):
    """Lines: a picture with the scores of its crops and their mean; then the means of categories, and of all."""
    for name, mean in result.get("images", {}).items():
        marks = [average(dpg_marks(items[name.split(".")[0]], said, True)[1]) for said in answers[name]]
        yield ", ".join(map(str, (folder / name, *marks, mean)))
    for level in ("l1", "l2"):
        yield f"{level.upper()} category scores:"
        yield from (f"\t{name}: {value}" for name, value in sorted(result[level].items()))
    yield f"DPG-Bench score: {result['score']}"
