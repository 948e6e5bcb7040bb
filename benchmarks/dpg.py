"""DPG-Bench: long prompts, and questions about each drawing (arXiv 2403.05135). Score: mean share of questions answered
yes, where a question counts only if its parents are yes too.

Variants: "official" (percent, mean over pictures), "ulmevalkit" (share, mean over questions; scored the AIA paper). A
VQA judge looks at the pictures, see benchmarks/judge.py. Without it the command only draws.
    python eval.py score dpg --data DPG --checkpoint RUN --out scores/dpg
"""

import contextlib
import json
import os
from collections import namedtuple
from pathlib import Path

from PIL import Image

from benchmarks.common import average, check_texts, draw_all, find_file, lines_to, table, tell_left_out
from parts.processes import rank
from parts.settings import InputError, text_lines

DPGQuestion = namedtuple("DPGQuestion", "id parents l1 l2 text")    # l1, l2: broad and detailed category


def dpg_crops(resolution, pic_num=4):
    """Boxes of the samples, each resolution pixels wide, in their 2 x 2 grid, row by row (compute_dpg_bench.py)."""
    return [(x, y, x + resolution, y + resolution) for y in (0, resolution) for x in (0, resolution)][:pic_num]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------
def dpg_category(text):
    """The tuple "attribute - color (car, red)" -> its categories "attribute" and "attribute - color"."""
    l2 = text.split("(")[0].strip()
    return l2.split("-")[0].strip(), l2


def dpg_question(row, official):
    """Row of dpg_bench.csv -> DPGQuestion. dependency: numbers of the parents, 0 for none; ULMEvalKit's are a list."""
    parents = row["dependency"]
    if not isinstance(parents, list):
        parents = str(parents).split(",")
    if official:
        l1, l2 = dpg_category(row["tuple"])
    else:
        l1 = row.get("category_broad")
        l2 = f"{l1}-{row.get('category_detailed') or ''}"
    return DPGQuestion(int(row["proposition_id"]), [int(parent) for parent in parents], l1, l2,
                       row["question_natural_language"])


def dpg_questions(rows, variant="official"):
    """Rows of dpg_bench.csv as dicts -> {item: [DPGQuestion]}. InputError names a row that cannot be read."""
    official = variant == "official"
    items = {}
    previous = None
    for number, row in enumerate(rows, 1):
        if official and number == 1:            # official: the first row of the data is never read
            continue
        try:
            item = row["item_id"]
            question = dpg_question(row, official)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"DPG-Bench, data row {number}: {error!r}; restore the row of dpg_bench.csv") from None
        if official and item != previous:       # official: an item that comes back starts afresh
            items[item] = {}
        key = question.id if official else number                   # official: of equal ids the last one stays
        items.setdefault(item, {})[key] = question
        previous = item
    return {item: list(questions.values()) for item, questions in items.items()}


def dpg_marks(questions, replies, official):
    """Replies {question: reply} to one sample -> 0 or 1 for each question, before and after the rule of parents."""
    plain = [int(replies[question.text] == "yes") for question in questions]
    marks = {}
    if official:
        marks = {question.id: value for question, value in zip(questions, plain, strict=True)}
    final = []
    for question, value in zip(questions, plain, strict=True):
        # A 0 travels down in file order. An unknown parent is a yes in ULMEvalKit. In the official program it is a
        # KeyError, unless an earlier parent is a no: all() stops there, so this must stay a generator.
        parents = (marks[parent] if official else marks.get(parent, 1) for parent in question.parents if parent)
        marks[question.id] = value if all(parents) else 0
        final.append(marks[question.id])
    return plain, final


def dpg_score(rows, answers, pic_num, variant):
    """How many of the questions are answered yes -> score, means by category l1 and l2.

    rows: dicts of dpg_bench.csv; answers {file name: [{question: reply}, one for each crop or sample]}.
    official (compute_dpg_bench.py of ELLA): percent, a mean over pictures of pic_num crops. Also images {file: mean in
    [0, 1]}, and failed: the files without item, crop, reply or parent, which are left out.
    ulmevalkit (its dpgbench.py): shares in [0, 1] over all questions of all samples; InputError for a missing reply.
    """
    official = variant == "official"
    items = dpg_questions(rows, variant)
    images, l1, l2 = {}, {}, {}
    failed, every = [], []
    for file, samples in answers.items():
        item = os.path.basename(file).split(".")[0]
        if not official and item not in items:  # ULMEvalKit goes through the items, so it never sees other files
            continue
        try:
            if official:
                samples = [samples[i] for i in range(pic_num)]
            marks = [dpg_marks(items[item], replies, official) for replies in samples]
        except (KeyError, IndexError) as error:
            if not official:
                raise InputError(f"DPG-Bench {file}: no reply to {error}; have the judge answer it") from None
            failed.append(file)
            continue
        images[file] = average(average(final) for _, final in marks)
        # Official: categories count the last crop only, and its answers before the rule of parents.
        for values in [marks[-1][0]] if official else [final for _, final in marks]:
            every += values
            for question, value in zip(items[item], values, strict=True):
                l1.setdefault(question.l1, []).append(value)
                l2.setdefault(question.l2, []).append(value)
    unit = 100 if official else 1
    means = {level: {name: average(values, unit) for name, values in groups.items()}
             for level, groups in (("l1", l1), ("l2", l2))}
    if not official:
        return {"score": average(every, unit), **means}
    return {"score": average(images.values(), unit), **means, "images": images, "failed": failed}


def dpg_report(folder, items, answers, result):
    """Lines of results.txt: each picture with the scores of its crops and their mean, then the means of the categories,
    then the score."""
    for name, mean in result.get("images", {}).items():
        questions = items[name.split(".")[0]]
        crops = [average(dpg_marks(questions, replies, True)[1]) for replies in answers[name]]
        yield ", ".join(map(str, (folder / name, *crops, mean)))
    for level in ("l1", "l2"):
        yield f"{level.upper()} category scores:"
        yield from (f"\t{name}: {value}" for name, value in sorted(result[level].items()))
    yield f"DPG-Bench score: {result['score']}"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def read_dpg(settings):
    """File and rows of questions as dicts, and {item: prompt}: from dpg_bench.csv and prompts/, or from ULMEvalKit's
    table."""
    folder = Path(settings.data)
    rows = []
    prompts = {}
    if settings.variant == "ulmevalkit" and not (folder / "dpg_bench.csv").exists():
        file = find_file(folder, "DPG*.tsv", itself=True)
        for origin, row in table(file, "index", "text", "questions", delimiter="\t"):
            prompts[row["index"]] = row["text"]
            try:
                asked = [{"item_id": row["index"]} | question for question in json.loads(row["questions"])]
            except (ValueError, TypeError) as error:
                raise InputError(f"{origin}: its questions must be a JSON list of objects ({error}): download it again"
                                 ) from error
            for question in asked:
                check_texts(origin, question, "category_broad", "question_natural_language")
            rows += asked
        return file, rows, prompts
    needed = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    file = find_file(folder, "dpg_bench.csv")
    rows = [row for _, row in table(file, *needed)]
    for prompt in sorted(folder.glob("prompts/*.txt")):
        prompts[prompt.stem] = "\n".join(line for _, line in text_lines(prompt))
    return file, rows, prompts


def dpg_boxes(file, pic_num):
    """Boxes of the samples in a picture file; none if it cannot be read: the official program leaves it out."""
    with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(file) as picture:
        return dpg_crops(picture.width // 2 if pic_num > 1 else picture.width, pic_num)
    return []


def dpg_missing(boxes, items, folder, official):
    """Items without a readable picture. boxes {file name: boxes of its samples}. The official program leaves them out;
    ULMEvalKit scores all prompts, so there they are an InputError."""
    drawn = {name.split(".")[0] for name, found in boxes.items() if found}
    missing = [item for item in items if item not in drawn]
    if len(missing) == len(items):
        raise InputError(f"{folder} holds no readable picture named after a prompt, such as {missing[0]}.png: give "
                         "--preds the pictures of DPG-Bench")
    if missing and not official:
        raise InputError(f"{folder} lacks readable pictures of {len(missing)} of {len(items)} prompts, such as "
                         f"{missing[0]}: ulmevalkit scores all; draw them, or take --variant official")
    tell_left_out(missing, len(items), "prompts have no readable picture")
    return missing


def dpg_answers(judge, file, boxes, questions):
    """[{question: reply}, one for each box], as far as the replies are known."""
    def ask(pair):
        box, text = pair
        return text, judge.vqa((file.name, box), text)

    texts = dict.fromkeys(question.text for question in questions)              # without repetitions, in file order
    return [dict(judge.each([(box, text) for text in texts], ask)) for box in boxes]


def run_dpg(settings, judge):
    """Draw a grid of 2 x 2 pictures for each prompt unless they are given, and score them with a VQA judge. Writes
    dpg-bench_results.txt and dpg-bench_results_detail.txt."""
    file, rows, prompts = read_dpg(settings)
    items = dpg_questions(rows, settings.variant)
    if not items:
        raise InputError(f"{file} holds no questions that count: download it again")
    folder = Path(settings.preds or Path(settings.out) / "images")
    if not settings.preds:
        if not prompts:
            raise InputError(f"{settings.data} holds no prompts/*.txt to draw: give --data the folder of DPG-Bench")
        draw_all(settings, prompts, {name: [folder / f"{name}.png"] for name in prompts}, file.name)
    if rank():
        return None
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not pictures:
        raise InputError(f"{folder} holds no pictures: give --preds a folder of files named after their prompts")
    if judge is None:
        return {"score": None, "reason": f"a VQA judge must look at {folder}: --judge-export FILE writes the requests"}
    boxes = {picture.name: dpg_boxes(picture, settings.pictures) for picture in pictures}
    missing = dpg_missing(boxes, items, folder, settings.variant == "official")
    answers = {picture.name: dpg_answers(judge, picture, boxes[picture.name], items.get(picture.name.split(".")[0], ()))
               for picture in pictures}
    if judge.wanted:
        return None
    result = dpg_score(rows, answers, settings.pictures, settings.variant)
    details = [f"{folder / name}, {box}, {question}, {reply}" for name, crops in answers.items()
               for box, replies in zip(boxes[name], crops, strict=True) for question, reply in replies.items()]
    lines_to(Path(settings.out) / "dpg-bench_results_detail.txt", details)
    lines_to(Path(settings.out) / "dpg-bench_results.txt", dpg_report(folder, items, answers, result))
    result.pop("images", None)
    tell_left_out(result.get("failed"), len(pictures), "pictures cannot be scored")
    return result | {"pictures": len(pictures), "missing": missing, "data": file.name}
