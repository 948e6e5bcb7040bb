"""Small benchmarks in their official layouts, recorded judges, and the score command, for the tests of benchmarks/.

NAME_files(folder) writes the data files of a benchmark and returns made-up answers {id: text}.
"""

import base64
import contextlib
import csv
import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import model
import train
from benchmarks.mme import MME_TASKS
from benchmarks.pope import POPE_CATEGORIES
from formats.checkpoints import save_checkpoint, tensors_of
from formats.readers import pyarrow_for
from parts.settings import run_command, write_json


class Script:
    """A judge that gives prepared replies and records its requests; as an rng it takes the last choice."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.calls = []

    def __call__(self, prompt, **settings):
        self.calls.append((prompt, settings))
        return self.replies.pop(0)

    def choice(self, options):
        self.calls.append(options)
        return options[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def png(colour="red", mode="RGB", size=(4, 4)):
    """Bytes of a PNG file."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def written(file, content=""):
    """Write text, bytes, or a list of objects as JSON lines, and make the folders -> file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def answers(file, texts):
    """Write {id: text} in the format of predictions.jsonl -> file."""
    return written(file, [{"id": name, "response": text} for name, text in texts.items()])


def stored(folder, **content):
    """Write arrays to F.npz."""
    np.savez(written(folder / "F.npz"), **content)


def edit(file, old, new):
    """Replace the first `old` in a file by `new`."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def made_run(kind, folder):
    """Make a run folder: a model with fresh weights, its tokenizer, the settings -> folder."""
    folder.mkdir(exist_ok=True)
    config = replace(model.PRESETS[f"tiny-{kind}"], layers=1, width=64, ffn=64)
    data.train_tokenizer(folder / "tokenizer.json", config)
    torch.manual_seed(0)
    manifest = {"config": asdict(config), "dtype": "float32"}
    save_checkpoint(tensors_of(model.from_config(config)), manifest, folder / "checkpoints/0-0000000").result()
    write_json(asdict(train.TrainConfig(preset=f"tiny-{kind}")), folder / "settings.json")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks
# ---------------------------------------------------------------------------------------------------------------------
def mmmu_files(folder):
    """Math 2 of 3 right, Art 1 of 1, Music 0 of 1. The answers are in the order of the subjects."""
    arrow = pyarrow_for(folder)
    texts = {}
    for subject, rows in {"Art": [("A", " A\n")], "Music": [("B", "(B)")],
                          "Math": [("B", "Because"), ("C", "x"), (["1000", "a k"], "The answer is 1,000")]}.items():
        columns = []
        for number, (gold, text) in enumerate(rows, 1):
            name = f"validation_{subject}_{number}"
            kind, options = ("multiple-choice", ["x", "y", "z"]) if isinstance(gold, str) else ("open", [])
            columns.append({"id": name, "question": "See <image 1>?", "answer": str(gold), "options": str(options),
                            "question_type": kind, "image_1": {"bytes": png(), "path": "1"}})
            texts[name] = text
        file = written(folder / f"{subject}/validation-00000-of-00001.parquet")
        arrow.parquet.write_table(arrow.Table.from_pylist(columns), file)
    return {name: texts[name] for name in sorted(texts)}


def mmbench_rows(first, second):
    """Question 1 with four options and answers B, C, D, A; question 2 with two and A, B. first, second: predictions for
    the question and its rotations."""
    rows = []
    for base, texts, golds, predictions, group in (
            (1, ["bear", "rabbit", "cat", "dog"], "BCDA", first, "coarse_perception"),
            (2, ["yes", "no"], "AB", second, "logic_reasoning")):
        for k, prediction in enumerate(predictions):
            options = dict(zip("ABCD"[:len(texts)], texts[-k:] + texts[:-k], strict=True))
            rows.append({"index": base + k * 1_000_000, "question": "Which?", "answer": golds[k], **options,
                         "prediction": prediction, "category": f"kind {base}", "l2-category": group, "split": "dev"})
    return rows


def mmbench_files(folder, first=("B", "C.", "It is a rabbit", "A"), **changes):
    """Question 1 right in all rotations, question 2 only as asked first. Rotated rows name the row with their picture;
    question 2 has an option "None"."""
    rows = mmbench_rows(first, ["A", "A"])
    picture = base64.b64encode(png()).decode()
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    file = io.StringIO()
    table = csv.DictWriter(file, columns, delimiter="\t", restval="", extrasaction="ignore")
    table.writeheader()
    for row in rows:
        row = row | {"hint": 'A "hint"\nof two lines'}
        row["image"] = picture if row["index"] < 10**6 else row["index"] % 10**6
        if row["index"] == 2:
            row["D"] = "None"
        table.writerow(row | changes)
    written(folder / "mmbench_dev_20230712.tsv", file.getvalue())
    return {str(row["index"]): row["prediction"] for row in rows}


def mmvp_files(folder):
    """Four pairs with the hits 1 1 / 1 0 / 1 1 / 0 0. The index column is spelled as in some copies."""
    text = "lndex,Question,Options,Correct Answer\n"
    for number in range(1, 9):
        text += f'{number},"Is it open, or not?",(a) Open (b) Closed,{"(a)" if number % 2 else "(b)"}\n'
        written(folder / f"MMVP Images/{number}.jpg", png())
    written(folder / "Questions.csv", text)
    return dict(zip("12345678", ("A", "B", "Open", "(b)", "A.", "Closed", "open", "A"), strict=True))


def mmvet_files(folder):
    """Four questions with the capabilities of the worked example."""
    rows = {f"v1_{i}": {"imagename": f"{i}.png", "question": f"{i}?", "answer": "x<AND>y", "capability": names.split()}
            for i, names in enumerate(("rec", "ocr spat", "spat ocr", "rec know gen"))}
    written(folder / "mm-vet.json", json.dumps(rows))
    return {name: f" {name}\n" for name in rows}


def pope_files(folder):
    """Six questions for each category; the stripped answers give 2 true and 2 false positives, so F1 is 2/3."""
    texts = ("Yes", "No, there is no dog.", "yes", "There is none", "No\n", "Yes. No.")
    labels = "yes no no no no yes".split()
    rows = [{"image": f"{i // 2}.png", "label": label} for i, label in enumerate(labels)]
    for name in POPE_CATEGORIES:
        written(folder / f"coco/coco_pope_{name}.json", rows)
    questions = [{"question_id": i, "image": f"{i % 6 // 2}.png", "text": "A dog?\nSay.",
                  "category": POPE_CATEGORIES[i // 6]} for i in range(18)]
    written(folder / "llava_pope_test.jsonl", questions)
    return {str(i): texts[i % 6] for i in range(18)}


def mme_files(folder):
    """color 125, OCR 100, all other tasks perfect. Every other picture is in images/."""
    given = {"color": ("Yes", "No", "Yes", "The answer is no"), "OCR": ("No", "No", "Yes", "Yes", "Yes", "No")}
    texts = {}
    for task in MME_TASKS:
        lines = []
        for i, text in enumerate(given.get(task, ("Yes", "no."))):
            lines.append(f"{i // 2}.jpg\tIs it? Please answer yes or no.\t{('Yes', 'No')[i % 2]}")
            texts[f"{task}/{i + 1}"] = text
            home = folder / "MME_Benchmark_release_version" / task
            written((home / "images" if i // 2 % 2 else home) / f"{i // 2}.jpg", png())
        written(folder / f"eval_tool/Your_Results/{task}.txt", "\n".join(lines))         # no line break at the end
    return texts


GENEVAL = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
           {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a red car"},
           {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
            "prompt": "two dogs"}]


def geneval_files(folder):
    """Three prompts, three classes."""
    written(folder / "evaluation_metadata.jsonl", GENEVAL)
    written(folder / "object_names.txt", "dog\ncat\ncar\n")


def dpg_row(item, number, parents, broad="entity", detailed="whole"):
    """A row of dpg_bench.csv."""
    return {"item_id": item, "proposition_id": str(number), "dependency": parents, "category_broad": broad,
            "category_detailed": detailed, "tuple": f"{broad} - {detailed} (it, {number})",
            "question_natural_language": f"{item}{number}?"}


DPG_FIRST = dpg_row("first", 1, "0")                             # the official program never reads the first row
DPG_ROWS = [dpg_row("a", 1, "0"), dpg_row("a", 2, "1", "attribute", "color"), dpg_row("a", 3, "0", "global", ""),
            dpg_row("b", 1, "0"), dpg_row("b", 2, "1", "relation", "spatial")]


def dpg_files(folder, variant="official"):
    """Questions about two items, in the CSV of the authors or in ULMEvalKit's table, and their prompts."""
    file = io.StringIO()
    if variant == "official":
        name, delimiter = "dpg_bench.csv", ","
        rows = [DPG_FIRST, *DPG_ROWS]
    else:
        name, delimiter = "DPG_Bench.tsv", "\t"
        questions = {item: [row for row in DPG_ROWS if row["item_id"] == item] for item in "ab"}
        rows = [{"index": item, "text": "a text", "questions": json.dumps(asked)} for item, asked in questions.items()]
    table = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    written(folder / name, file.getvalue())
    for item in "ab":
        written(folder / f"prompts/{item}.txt", f"a picture of {item}\n")


def fid_files(folder):
    """Two pictures."""
    return {str(i): written(folder / f"{i}.png", png()).name for i in range(2)}


FILES = {"mmmu": mmmu_files, "mmbench": mmbench_files, "mmvp": mmvp_files, "mmvet": mmvet_files, "pope": pope_files,
         "mme": mme_files, "fid": fid_files}


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def command(bench, folder, *flags):
    """Score folder/data, with folder/out as --out -> scores.json."""
    evaluation.main(["score", bench, "--data", str(folder / "data"), "--out", str(folder / "out"), *map(str, flags)])
    return json.loads((folder / "out/scores.json").read_text())


def judged(bench, folder, judge, *flags):
    """Export the open requests and record judge(request) for each, round after round -> scores, requests by round."""
    file = written(folder / "judge.jsonl")
    wanted = folder / "open.jsonl"
    flags = ("--judge", file, *flags)
    rounds = []
    with contextlib.suppress(FileNotFoundError):                        # no request is open any more
        while len(rounds) < 8:
            wanted.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):                # no scores.json while requests are open
                command(bench, folder, "--judge-export", wanted, *flags)
            rows = [json.loads(line) for line in wanted.read_text().splitlines()]
            rounds.append([row["request"] for row in rows])
            with open(file, "a") as lines:
                lines.writelines(json.dumps(row | {"replies": judge(row["request"])}) + "\n" for row in rows)
    return command(bench, folder, *flags), rounds


def refused(capsys, *argv):
    """The one line of a command that is refused with status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command(*argv))
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def refused_files(bench, change, folder, capsys):
    """The line that refuses answers or data that `change(folder)` has spoilt. bench: with flags; F.npz, I and J are
    names in the folder. Nothing that looks like a result may be left behind."""
    bench, *flags = bench.split()
    make = FILES.get(bench, lambda folder: {})
    answers(folder / "said.jsonl", make(folder / "data"))
    written(folder / "J")
    change(folder)
    flags = [folder / flag if flag in ("F.npz", "I", "J") else flag for flag in flags]
    line = refused(capsys, bench, folder, "--preds", folder / "said.jsonl", *flags)
    assert not [*folder.glob("out/scores.json"), *folder.rglob("*.part")]
    return line
