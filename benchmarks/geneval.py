"""GenEval: does a drawing show what its prompt says? (arXiv 2310.11513)."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.common import average, draw_all, find_file
from parts.processes import rank
from parts.settings import InputError, json_lines, lines_to, read_json, text_lines

# A box is x1, y1, x2, y2 in pixels, in a detector's row followed by its score. An object is (row, mask or None).
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def geneval_iou(a, b):
    """Overlap of two boxes in 0..1, both borders counted as inside (evaluate_images.py of GenEval)."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return float(shared / union) if union else 0.0


def geneval_position(a, b, threshold=0.1):
    """Where box a lies as seen from box b: up to two of left of, right of, above, below (evaluate_images.py)."""
    a, b = (np.asarray(box)[:4].reshape(2, 2) for box in (a, b))               # two corners, each x, y
    offset = a.mean(0) - b.mean(0)
    slack = threshold * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)                       # official: by the length before shrinking
    checks = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in checks.items() if holds}


def geneval_crop(image, box, mask):
    """What the colour judge looks at: the box of a picture, with grey outside the mask (evaluate_images.py).

    image PIL of W x H; box in pixels; mask (H, W) bool or None. What lies outside the picture is black.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    if mask is not None:
        grey = Image.new("RGB", image.size, "#999999")
        image = Image.composite(image, grey, Image.fromarray(np.asarray(mask, bool)))
    return image.crop(tuple(round(float(edge)) for edge in box[:4]))           # halves go to the even number


def geneval_color_texts(class_name, color, variant="official"):
    """The three texts whose CLIP embeddings stand for a colour of a class; variant "official" or "ulmevalkit"."""
    named = "{c}" if variant == "ulmevalkit" else color          # ULMEvalKit forgets to fill in the third text
    return [f"a photo of a {color} {class_name}", f"a photo of a {color}-colored {class_name}",
            f"a photo of a {named} object"]


def geneval_keep(rows, masks, threshold, max_objects, max_overlap):
    """Rows (N, 5) and masks of one class -> the objects that count, best score first."""
    rows = np.asarray(rows).reshape(-1, 5)
    scores = rows[:, 4].astype(np.float32)                       # so 0.3 is not above 0.3, however it is stored
    best, kept = [i for i in np.argsort(-scores, kind="stable") if scores[i] > np.float32(threshold)], []
    for i in best[:max_objects]:
        if max_overlap >= 1 or all(geneval_iou(rows[i], rows[k]) < max_overlap for k in kept):
            kept.append(i)
    return [(rows[i], None if masks is None else masks[i]) for i in kept]


def geneval_fault(clause, found, targets, color, image, threshold):
    """What is wrong with the objects found for an include clause, "" if nothing. targets: those of earlier clauses."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        if color is None:
            raise InputError(f"GenEval, color of {name}: there is no colour judge; give one with --judge")
        wanted, seen = clause["color"], Counter(color(image, found, name))
        if seen[wanted] < count:
            listed = ", ".join(f"{seen[other]} {other}" for other in GENEVAL_COLORS if seen[other])
            return f"expected {wanted} {name}>={count}, found {seen[wanted]} {wanted}; and {listed}"
    if "position" in clause:
        relation, index = clause["position"]
        if targets[index] is None:
            return f"no target for {name} to be {relation}"
        for (box, _), (target, _) in itertools.product(found, targets[index]):
            seen = geneval_position(box, target, threshold)
            if relation not in seen:
                return f"expected {name} {relation} target, found {' and '.join(sorted(seen))} target"
    return ""


def geneval_evaluate(boxes, metadata, color, threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0,
                     position_threshold=0.1, masks=None, image=None):
    """Does a picture show what its prompt asks for? -> correct, reason (a line a fault), details {class: kept rows}.

    boxes {class: rows (N, 5)}, masks {class: N masks (H, W) bool} or None; metadata: the prompt's line of the metadata
    file; color(image, [(row, mask or None), ...], class name) -> [colour name], asked only about colour clauses, where
    InputError says that it is missing. Source: evaluate_images.py of GenEval.
    """
    least = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {name: geneval_keep(rows, (masks or {}).get(name), least, max_objects, max_overlap)
            for name, rows in boxes.items()}
    faults, targets = [], []
    for clause in metadata.get("include", []):
        found = kept.get(clause["class"], [])[:clause["count"]]  # official: the rest is never looked at
        fault = geneval_fault(clause, found, targets, color, image, position_threshold)
        faults += [fault] if fault else []
        targets.append(None if fault else found)
    for clause in metadata.get("exclude", []):
        name, count, found = clause["class"], clause["count"], len(kept.get(clause["class"], []))
        faults += [f"expected {name}<{count}, found {found}"] if found >= count else []
    details = {name: [row.tolist() for row, _ in group] for name, group in kept.items() if group}
    return {"correct": not faults, "reason": "\n".join(faults), "details": details}


def geneval_summary(results):
    """[(tag, prompt key, correct)], one a picture -> shares in 0..1 (summary_scores.py of GenEval).

    overall is the mean over tags, whatever their sizes; a prompt is correct when one of its pictures is.
    """
    tags, prompts = {}, {}
    for tag, prompt, correct in results:
        tags.setdefault(tag, []).append(bool(correct))
        prompts.setdefault(prompt, []).append(bool(correct))
    shares = {tag: average(right) for tag, right in tags.items()}
    return {"overall": average(shares.values()), "tags": shares,
            "correct_images": average(itertools.chain(*tags.values())),
            "correct_prompts": average(map(any, prompts.values()))}


def run_geneval(settings, judge):
    """Pictures of IMAGES/NUMBER/samples, and what detector and colour judge make of them."""
    file = Path(settings.data)
    if not file.is_file():
        file = find_file(file, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    rows = {f"{i:05d}": row for i, (_, row) in enumerate(json_lines(file, "tag", "include", "prompt"))}
    folder = Path(settings.preds or Path(settings.out) / "images")
    if not settings.preds:
        draw_all(settings, {name: row["prompt"] for name, row in rows.items()},
                 {name: [folder / name / f"samples/{i:05d}.png" for i in range(settings.pictures)] for name in rows})
    if rank():
        return None
    for name, row in () if settings.preds else rows.items():
        lines_to(folder / name / "metadata.jsonl", [json.dumps(row)])
    pictures = [*geneval_pictures(folder, file, rows)]
    if not pictures:
        raise InputError(f"{folder} holds no NUMBER/samples/*.png: give --preds the folder of pictures of GenEval")
    if judge is None:
        return {"score": None, "reason": f"a detector looks at {folder}: --judge-export FILE writes what to ask it"}
    classes = [line for _, line in text_lines(find_file(file.parent, "object_names.txt"))]
    results = judge.each(pictures, lambda one: geneval_judged(folder, *one, classes, judge))
    if judge.wanted:
        return None
    lines_to(Path(settings.out) / "results.jsonl", map(json.dumps, results))
    summary = geneval_summary([(row["tag"], row["metadata"], row["correct"]) for row in results])
    return {"score": summary["overall"], **summary, "prompts": file.name, "pictures": len(results)}


def geneval_pictures(folder, file, rows):
    """(picture, metadata) of all folders whose names are digits; pictures begin with digits and .png."""
    for home in sorted(p for p in folder.glob("*") if p.name.isdigit()):
        metadata = read_json(home / "metadata.jsonl")
        if metadata != rows.get(f"{int(home.name):05d}"):
            raise InputError(f"{home / 'metadata.jsonl'} is not line {int(home.name)}, from 0, of {file.name}: give "
                             "--data the file these pictures were drawn from")
        for picture in sorted(home.glob("samples/*")):
            if re.match(r"\d+\.png", picture.name):
                yield picture, metadata


def geneval_judged(folder, file, metadata, classes, judge):
    """A line of results.jsonl."""
    name = file.relative_to(folder).as_posix()
    boxes, masks = judge.detect(name)
    if len(boxes) != len(classes):
        raise InputError(f"{judge.file}: the reply about {name} has {len(boxes)} lists of boxes, not one for each of "
                         f"the {len(classes)} classes of object_names.txt")
    by_class, masks = dict(zip(classes, boxes, strict=True)), masks and dict(zip(classes, masks, strict=True))
    result = geneval_evaluate(by_class, metadata, judge.color, masks=masks, image=name)
    return {"filename": str(file), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": result["correct"],
            "reason": result["reason"], "metadata": json.dumps(metadata), "details": json.dumps(result["details"])}
