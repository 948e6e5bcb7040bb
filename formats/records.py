"""One record: pictures with a conversation. Which layouts are read, and what is refused.

The layout is described in formats/README.md.

    python -m pytest tests/test_records.py
"""

import base64
import json
import os
import re
from dataclasses import dataclass, replace

import aia
from parts.settings import InputError, first_line, shortened, utf8

BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")                      # of PNG, JPEG, WebP, GIF
SKIP_HINT = "train.py --on-bad-record skip leaves such records out"


@dataclass(frozen=True)
class Record:
    """One example: a picture (or several, in questions) with a conversation. `origin` names it in messages."""

    origin: str
    task: str
    turns: tuple                  # ((human, assistant), ...); <image> marks stay in the human text
    pictures: tuple               # paths, bytes of picture files, or uint8 arrays (S, S, 3)


def question_parts(turns, n_images):
    """Turns (human, assistant) with <image> marks in the human text -> [([text or picture index, ...], assistant)].
    Without marks, the pictures come first."""
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if marks == 0:
        asked, answer = turns[0]
        turns = [("<image>" * n_images + asked, answer), *turns[1:]]
    elif marks != n_images:
        raise InputError(f"{marks} <image> marks in the questions for {n_images} pictures: write one each, or none")
    seen = 0
    result = []
    for asked, answer in turns:
        parts = []
        for i, text in enumerate(asked.strip().split("<image>")):
            if i > 0:
                parts.append(seen)
                seen += 1
                text = text.lstrip()                # the templates write the line breaks around a picture
            if text:
                parts.append(text)
        result.append((parts, answer))
    return result


def check_turns(turns, n_images, named):
    """The task of a conversation with n_images pictures. named: the task that the record itself gives, or None."""
    if any(not answer for _, answer in turns):
        raise InputError("an answer is empty: every gpt turn needs text, or <image> to be drawn")
    task = "gen" if any("<image>" in answer for _, answer in turns) else "und"
    if named not in (None, *aia.TASKS):
        raise InputError(f"unknown task {shortened(named)!r}: use one of {', '.join(aia.TASKS)}, or leave it out")
    if named not in (None, task):
        raise InputError(f"task is {named!r}, but the conversation is of {task!r}: <image> in an answer means drawing")
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if task == "gen" and (len(turns) != 1 or n_images != 1 or marks or turns[0][1] != "<image>"):
        raise InputError("a drawing record has one human turn with the prompt, and <image> alone as the answer")
    if task == "und":
        question_parts(turns, n_images)             # refuses a wrong number of marks
    return task


def published(entry):
    """A record of a public data set in our fields. Layouts: LLaVA's conversations, the prompts of ShareGPT-4o-Image,
    pictures with captions."""
    if entry.get("input_image"):
        raise InputError("the record edits a picture (input_image), which neither task does: leave it out")
    image = entry.get("image") or entry.get("output_image")
    conversations = entry.get("conversations")
    caption = entry.get("caption") or entry.get("text") or entry.get("input_prompt")
    if not conversations and caption:
        conversations = [{"from": "human", "value": caption}, {"from": "gpt", "value": "<image>"}]
    if not (image and conversations):
        raise InputError("a record needs a picture, and a conversation or a caption")
    return {"image": image, "conversations": conversations}


def turn_pairs(conversation):
    """Alternating human and gpt turns -> ((human, assistant), ...); () for anything else."""
    if not isinstance(conversation, list) or len(conversation) % 2:
        return ()
    for i, turn in enumerate(conversation):
        speaker = ("human", "gpt")[i % 2]
        if not (isinstance(turn, dict) and turn.get("from") == speaker and isinstance(turn.get("value"), str)):
            return ()
    texts = [turn["value"] for turn in conversation]
    return tuple((asked, answer.strip()) for asked, answer in zip(texts[::2], texts[1::2], strict=True))


def picture_of(text, folder):
    """The text that stands for a picture -> its path, or the bytes that it holds as base64, in a data URL or bare."""
    if text.startswith(("http://", "https://")):
        raise InputError(f"picture {shortened(text)} lies on the web, and pictures are not downloaded: give files")
    url = text.startswith("data:")
    if url or (text.startswith(BASE64_STARTS) and not os.path.exists(folder / text)):
        packed = text.partition(",")[2] if url else text
        try:
            return base64.b64decode("".join(packed.split()), validate=True)
        except ValueError as error:
            raise InputError(f"picture {shortened(text, 60)} is neither a file nor base64 ({first_line(error)}): write "
                             "a path, or data:image/png;base64,...") from error
    if len(text) > 1000 or re.search("[\x00-\x1f\ud800-\udfff]", text):
        raise InputError(f"picture {shortened(text, 60)} is no path of a file, nor base64 of a PNG, JPEG, WebP or GIF")
    return folder / text


def image_list(image, folder):
    """The "image" of a record -> [path or bytes, ...]; [] for anything else."""
    images = []
    for one in image if isinstance(image, list) else [image]:
        if isinstance(one, dict) and {"bytes", "path"} <= set(one):             # as Hugging Face's datasets store it
            one = one["bytes"] or one["path"]
        if not (isinstance(one, str | bytes) and one):
            return []
        images.append(one if isinstance(one, bytes) else picture_of(one, folder))
    return images


def parse_record(line, origin, folder, strict=True):
    """One line of JSON, or its fields as a dictionary -> Record. A record whose answer is <image> is one to draw.

    Paths are relative to folder. strict: only our own fields are allowed; otherwise the layouts of public data sets are
    read too, and unused fields are ignored.
    """
    if isinstance(line, bytes):                     # json.loads would guess the encoding, and wrongly in mid-file
        line = utf8(line)
    try:
        entry = line if isinstance(line, dict) else json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({first_line(error)}): write one object per line") from error
    if not strict and isinstance(entry, dict):
        entry = published(entry)
    known = {"id", "image", "conversations", "task"}
    if not isinstance(entry, dict) or not {"image", "conversations"} <= set(entry):
        raise InputError('a record needs "image" and "conversations"')
    if set(entry) - known:
        raise InputError(f"unknown field {shortened(min(set(entry) - known))!r}: known are {', '.join(sorted(known))}")
    turns = turn_pairs(entry["conversations"])
    images = image_list(entry["image"], folder)
    if not turns or not images:
        raise InputError('"image" must be a path or a list of paths, "conversations" alternating human and gpt turns, '
                         'each {"from": ..., "value": text}')
    task = check_turns(turns, len(images), entry.get("task"))
    return Record(origin, task, turns, tuple(images))


def conversation(turns, pictures):
    """A record of turns [(question, answer)], the last answer None, with its pictures."""
    return Record("the question", "und", tuple(turns), tuple(pictures))


def first_question(record):
    """A record cut off after its first question, with the pictures that this question shows."""
    question = record.turns[0][0]
    marked = any("<image>" in asked for asked, _ in record.turns)
    pictures = record.pictures[:question.count("<image>")] if marked else record.pictures
    return replace(record, turns=((question, None),), pictures=pictures)
