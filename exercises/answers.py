"""Exercises that are graded by a text file of lines `name: value`: traps to find (7), numbers of two runs (9)."""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Refused(Exception):
    """Bad input, told in one line."""


def read(text):
    """{name: value} of the lines of an answers file; lines without a colon and empty values are left out."""
    pairs = [line.split("#")[0].partition(":") for line in text.splitlines()]
    return {name.strip(): value.strip(" `\t") for name, colon, value in pairs if colon and value.strip(" `\t")}


# ---------------------------------------------------------------------------------------------------------------------
# 7: break it and see
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trap:
    """One change that breaks the code, and its place."""

    points: int
    file: str
    function: str
    right: str
    wrong: str


TRAPS = {
    "A": Trap(3, "parts/decoding.py", "visibility",         # left padding is visible
              "return ((causal & mask[:, None]) | itself)[:, None]", "return (causal | itself)[None, None]"),
    "B": Trap(3, "train.py", "accumulate",                  # a mean of means: a short micro-batch counts as a long one
              "tokens, valid = (max(n, 1) for n in total[task])",
              "tokens, valid = (max(n, 1) * len(batches) / len(total) for n in counts([batch])[task])"),
    "C": Trap(4, "train.py", "counts",                      # dropped prompts count, as in the released code
              "int(valid.sum())", "valid.numel()"),
}


def trap(letter):
    if letter not in TRAPS:
        raise Refused(f"there is no error {letter}: choose one of {', '.join(TRAPS)}")
    return TRAPS[letter]


def traps(text):
    """Rows (points, of, title, remark) for lines `A: file:function`."""
    given, rows = read(text), []
    for letter, one in TRAPS.items():
        found = given.get(letter, "no answer")
        right = found.removesuffix("()") == f"{one.file}:{one.function}"
        rows.append((one.points if right else 0, one.points, f"error {letter}", "" if right else found))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 9: rho and distance
# ---------------------------------------------------------------------------------------------------------------------
def run_numbers(folder):
    """{name: number} of a run folder: rho, distances to the targets, lambda of understanding, checksum of its start."""
    folder = Path(folder)
    try:
        curves, settings = (json.loads((folder / name).read_text()) for name in ("curves.json", "settings.json"))
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        tuned = [row["und"]["lambda"] for row in log if row.get("name") == "tune" and "und" in row]
        found = {"rho": settings["rho"], "start": curves["und"]["before"]["weights"],
                 "lambda": float(tuned[-1])}
        for task in ("gen", "und"):
            rows = zip(curves[task]["after"]["intensity"], curves[task]["target"], strict=True)
            apart = [abs(intensity - target) for intensity, target in rows]
            found[task] = sum(apart) / len(apart)
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise Refused(f"{folder} is no finished run that tuned with AIA: {type(error).__name__} {error}") from error
    return found


def distances(text):
    """Rows for the two runs and the numbers that were read from them."""
    given = read(text)
    if not {"run 50", "run 1"} <= given.keys():
        raise Refused("name both run folders: `run 50: FOLDER` and `run 1: FOLDER`")
    runs = {rho: run_numbers(given[f"run {rho}"]) for rho in (50, 1)}
    same = runs[1]["start"] == runs[50]["start"] and all(run["rho"] == rho for rho, run in runs.items())
    rows = [(2 * same, 2, "two runs, one start", "" if same else "other weights at the start, or another rho")]
    for title, names, off in (("distance, rho 50", ("gen 50", "und 50"), 0.0006),
                              ("distance, rho 1", ("gen 1", "und 1"), 0.0006),
                              ("lambda", ("lambda 50", "lambda 1"), 0.01)):
        wrong = []
        for name in names:
            key, _, rho = name.partition(" ")
            right = runs[int(rho)][key]
            try:
                near = abs(float(given.get(name, "nan")) - right) <= off * (right if key == "lambda" else 1)
            except ValueError:
                near = False
            wrong += [] if near else [name]
        points = 2 if key == "lambda" else 3
        rows.append((0 if wrong else points, points, title, f"look again at {', '.join(wrong)}" if wrong else ""))
    return rows
