"""GenEval: does a drawing show what its prompt says? (arXiv 2310.11513). Score: mean over the skills ("tags") of the
share of correct pictures, in [0, 1].

A detector and a colour judge look at the pictures, see benchmarks/judge.py. Without them the command only draws.
    python eval.py score geneval --data GenEval --checkpoint RUN --out scores/geneval
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.common import average, check_texts, draw_all, find_file, lines_to, tell_left_out
from parts.processes import rank
from parts.settings import InputError, json_lines, read_json, text_lines

# Legend: a box is x1, y1, x2, y2 in pixels; a detector's row is a box and its score; an object is (row, mask or None).
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


# ---------------------------------------------------------------------------------------------------------------------
# Boxes and colours: evaluate_images.py of GenEval
# ---------------------------------------------------------------------------------------------------------------------
def geneval_iou(a, b):
    """Intersection over union of two boxes, in [0, 1]. Both borders count as inside."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return float(shared / union) if union else 0.0


def geneval_position(a, b, threshold=0.1):
    """Where box a lies as seen from box b: a set of up to two of left of, right of, above, below."""
    a, b = (np.asarray(box)[:4].reshape(2, 2) for box in (a, b))    # two corners, each x, y
    offset = a.mean(0) - b.mean(0)
    slack = threshold * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)                          # official: by the length before shrinking
    checks = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in checks.items() if holds}


def geneval_crop(image, box, mask):
    """What the colour judge gets: the part of a picture inside a box, grey outside the mask.

    image: PIL, W x H; box in pixels; mask (H, W) bool or None. Parts outside the picture are black.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    if mask is not None:
        grey = Image.new("RGB", image.size, "#999999")
        image = Image.composite(image, grey, Image.fromarray(np.asarray(mask, bool)))
    return image.crop(tuple(round(float(edge)) for edge in box[:4]))            # official: half to even


def geneval_color_texts(class_name, color, variant="official"):
    """The three texts whose mean CLIP embedding represents a colour of a class; variant "official" or "ulmevalkit"."""
    named = "{c}" if variant == "ulmevalkit" else color             # in ULMEvalKit the f of an f-string is missing
    return [f"a photo of a {color} {class_name}", f"a photo of a {color}-colored {class_name}",
            f"a photo of a {named} object"]


def geneval_keep(rows, masks, threshold, max_objects, max_overlap):
    """Rows (N, 5) and masks of one class -> the objects that count, highest score first."""
    rows = np.asarray(rows).reshape(-1, 5)
    scores = rows[:, 4].astype(np.float32)                          # so that a stored 0.3 is never above 0.3
    best = [i for i in np.argsort(-scores, kind="stable") if scores[i] > np.float32(threshold)]
    kept = []
    for i in best[:max_objects]:
        if max_overlap >= 1 or all(geneval_iou(rows[i], rows[k]) < max_overlap for k in kept):
            kept.append(i)
    return [(rows[i], None if masks is None else masks[i]) for i in kept]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------
def geneval_fault(clause, found, targets, color, image, threshold):
    """What is wrong with the objects found for an include clause, "" if nothing. targets: objects of earlier clauses,
    None for a clause that failed."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        if color is None:
            raise InputError(f"GenEval, color of {name}: there is no colour judge; give one with --judge")
        wanted = clause["color"]
        seen = Counter(color(image, found, name))
        if seen[wanted] < count:
            listed = ", ".join(f"{seen[other]} {other}" for other in GENEVAL_COLORS if seen[other])
            return f"expected {wanted} {name}>={count}, found {seen[wanted]} {wanted}; and {listed}"
    if "position" in clause:
        relation, index = clause["position"]
        if targets[index] is None:
            return f"no target for {name} to be {relation}"
        for (box, _), (target, _) in itertools.product(found, targets[index]):
            relations = geneval_position(box, target, threshold)
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(sorted(relations))} target"
    return ""


def geneval_evaluate(boxes, metadata, color, threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0,
                     position_threshold=0.1, masks=None, image=None):
    """Does a picture show what its prompt asks for? -> correct, reason (one line for each fault), details {class: kept
    rows}.

    boxes {class: rows (N, 5)}, masks {class: N masks (H, W) bool} or None; metadata: the prompt's line of the metadata
    file; color(image, [(row, mask or None), ...], class name) -> [colour name], called for colour clauses only, where
    None is an InputError. Source: evaluate_images.py of GenEval.
    """
    least = counting_threshold if metadata.get("tag") == "counting" else threshold
    masks = masks or {}
    kept = {name: geneval_keep(rows, masks.get(name), least, max_objects, max_overlap) for name, rows in boxes.items()}
    faults = []
    targets = []
    for clause in metadata.get("include", []):
        found = kept.get(clause["class"], [])[:clause["count"]]     # official: further objects are ignored
        fault = geneval_fault(clause, found, targets, color, image, position_threshold)
        if fault:
            faults.append(fault)
        targets.append(None if fault else found)
    for clause in metadata.get("exclude", []):
        found = kept.get(clause["class"], [])
        if len(found) >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {len(found)}")
    details = {name: [row.tolist() for row, _ in group] for name, group in kept.items() if group}
    return {"correct": not faults, "reason": "\n".join(faults), "details": details}


def geneval_summary(results):
    """[(tag, prompt key, correct)], one for each picture -> shares in [0, 1] (summary_scores.py of GenEval).

    overall is the mean over tags, whatever their sizes; a prompt is correct if one of its pictures is.
    """
    tags = {}
    prompts = {}
    for tag, prompt, correct in results:
        tags.setdefault(tag, []).append(bool(correct))
        prompts.setdefault(prompt, []).append(bool(correct))
    shares = {tag: average(right) for tag, right in tags.items()}
    return {"overall": average(shares.values()), "tags": shares,
            "correct_images": average(itertools.chain(*tags.values())),
            "correct_prompts": average(map(any, prompts.values()))}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def geneval_rows(file):
    """{number: line} of the metadata file. A line that cannot be scored is refused before anything is drawn."""
    rows = {}
    for number, (origin, row) in enumerate(json_lines(file, "tag", "include", "prompt")):
        check_texts(origin, row, "tag", "prompt")
        try:
            sound = True
            for clause in [*row["include"], *row.get("exclude", [])]:
                texts = isinstance(clause["class"], str) and isinstance(clause.get("color", ""), str)
                sound = sound and texts and isinstance(clause["count"], int)
            for i, clause in enumerate(row["include"]):
                if "position" in clause:
                    _, target = clause["position"]
                    sound = sound and 0 <= target < i                           # an earlier clause
        except (TypeError, ValueError, KeyError):
            sound = False
        if not sound:
            raise InputError(f"{origin}: include and exclude must list objects with a class, a count, and perhaps a "
                             "colour, or a position relative to an earlier one: download it again")
        rows[f"{number:05d}"] = row
    if not rows:
        raise InputError(f"{file} holds no prompts: download it again")
    return rows


def geneval_pictures(folder, file, rows):
    """(picture, metadata) of all pictures in NUMBER/samples. Folder names are digits; file names begin with digits and
    .png."""
    for home in sorted(path for path in folder.glob("*") if path.name.isdigit()):
        metadata = read_json(home / "metadata.jsonl")
        if metadata != rows.get(f"{int(home.name):05d}"):
            raise InputError(f"{home / 'metadata.jsonl'} is not line {int(home.name)}, from 0, of {file.name}: give "
                             "--data the file that these pictures were drawn from")
        for picture in sorted(home.glob("samples/*")):
            if re.match(r"\d+\.png", picture.name):
                yield picture, metadata


def geneval_missing(pictures, rows):
    """Names of the prompts with fewer pictures than others have, after a warning."""
    counts = Counter(f"{int(picture.parent.parent.name):05d}" for picture, _ in pictures)
    most = max(counts.values())
    missing = [name for name in rows if counts[name] < most]
    tell_left_out(missing, len(rows), f"prompts have fewer than {most} pictures")
    return missing


def geneval_line(folder, file, metadata, classes, judge):
    """A line of results.jsonl: what detector and colour judge say about one picture."""
    name = file.relative_to(folder).as_posix()
    boxes, masks = judge.detect(name)
    if len(boxes) != len(classes):
        raise InputError(f"{judge.file}: the reply about {name} has {len(boxes)} lists of boxes; give one for each of "
                         f"the {len(classes)} classes of object_names.txt")
    boxes = dict(zip(classes, boxes, strict=True))
    masks = dict(zip(classes, masks, strict=True)) if masks else None
    result = geneval_evaluate(boxes, metadata, judge.color, masks=masks, image=name)
    return {"filename": str(file), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": result["correct"],
            "reason": result["reason"], "metadata": json.dumps(metadata), "details": json.dumps(result["details"])}


def draw_geneval(settings, rows, folder, data_name):
    """The pictures in GenEval's layout: FOLDER/NUMBER/metadata.jsonl and samples/."""
    prompts = {name: row["prompt"] for name, row in rows.items()}
    files = {name: [folder / name / f"samples/{i:05d}.png" for i in range(settings.pictures)] for name in rows}
    draw_all(settings, prompts, files, data_name)
    if rank() == 0:
        for name, row in rows.items():
            lines_to(folder / name / "metadata.jsonl", [json.dumps(row)])


def run_geneval(settings, judge):
    """Draw the pictures unless they are given, and score them with detector and colour judge. Writes results.jsonl."""
    file = find_file(settings.data, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl", itself=True)
    rows = geneval_rows(file)
    folder = Path(settings.preds or Path(settings.out) / "images")
    if not settings.preds:
        draw_geneval(settings, rows, folder, file.name)
    if rank():
        return None
    pictures = [*geneval_pictures(folder, file, rows)]
    if not pictures:
        raise InputError(f"{folder} holds no NUMBER/samples/*.png: give --preds the folder of pictures of GenEval")
    missing = geneval_missing(pictures, rows)
    if judge is None:
        return {"score": None, "reason": f"a detector must look at {folder}: --judge-export FILE writes the requests"}
    classes = [line for _, line in text_lines(find_file(file.parent, "object_names.txt"))]
    results = judge.each(pictures, lambda pair: geneval_line(folder, *pair, classes, judge))
    if judge.wanted:
        return None
    lines_to(Path(settings.out) / "results.jsonl", map(json.dumps, results))
    summary = geneval_summary([(row["tag"], row["metadata"], row["correct"]) for row in results])
    return {"score": summary["overall"], **summary, "prompts": file.name, "pictures": len(results),
            "missing": missing}
