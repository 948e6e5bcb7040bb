"""One record: pictures with a conversation. Which layouts are read, and what is refused.

The layouts are described in formats/README.md.

    python -m pytest tests/test_records.py
"""

import base64
import json
import os
import re
from dataclasses import dataclass, replace

import aia
from parts.settings import InputError, first_line, shortened

# Names of fields: ours, then those of public data sets (jpg to webp, txt: of WebDataset as a table).
IMAGE_FIELDS = ("image", "output_image", "images", "jpg", "jpeg", "png", "webp")
TURN_FIELDS = ("conversations", "messages", "texts")
CAPTION_FIELDS = ("caption", "text", "input_prompt", "prompt", "txt")           # to be drawn
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")                      # of PNG, JPEG, WebP, GIF
SKIP_HINT = "train.py --on-bad-record skip leaves such records out"


RECORD_TASKS = (*aia.TASKS, "mixed")


@dataclass(frozen=True)
class Record:
    """One example: a picture (or several, in questions) with a conversation. `origin` names it in messages."""

    origin: str
    task: str
    turns: tuple                  # ((human, assistant), ...); <image> marks stay in the human text
    pictures: tuple               # paths, bytes of picture files, or uint8 arrays (S, S, 3)
    captions: tuple = ()          # several prompts of one picture, of which each visit draws one
    system: bool = False          # a system turn was joined to the first question
    given: tuple = ()


def conversation_parts(turns, n_images):
    marks = sum(text.count("<image>") for turn in turns for text in turn if text)
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
        said = None if answer is None else []
        for i, text in enumerate([] if answer is None else answer.split("<image>")):
            if i > 0:
                said.append(seen)
                seen += 1
            if text.strip():
                said.append(text.strip())
        result.append((parts, said))
    return result


def check_turns(turns, n_images, named):
    """The task of a conversation with n_images pictures. named: the task that the record itself gives, or None."""
    for i, (_, answer) in enumerate(turns, 1):
        if not answer:
            raise InputError(f"question {i}: its answer is empty: every gpt turn needs text, or <image> to be drawn")
    task = "gen" if any("<image>" in answer for _, answer in turns) else "und"
    if named not in (None, *aia.TASKS):
        raise InputError(f"unknown task {shortened(named)!r}: use one of {', '.join(aia.TASKS)}, or leave it out")
    if named not in (None, task):
        raise InputError(f"task is {named!r}, but the conversation is of {task!r}: <image> in an answer means drawing")
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if task == "gen" and (len(turns) != 1 or n_images != 1 or marks or turns[0][1] != "<image>"):
        raise InputError("a drawing record has one human turn with the prompt, and <image> alone as the answer")
    if task == "und":
        conversation_parts(turns, n_images)             # refuses a wrong number of marks
    return task


def parsed(text, remedy):
    """The content of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({first_line(error)}): {remedy}") from error


def text_of(content, images):
    """The text of a turn, None if it has none. Of a list of parts, pictures become <image> marks; those that are there
    are added to a list."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append("<image>")
            if part.get("image"):
                images.append(part["image"])
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return None
    return "".join(texts)


def turns_of(conversation, images):
    """A conversation in any of the layouts -> [(speaker, text or None)]. Pictures in its parts are added to a list."""
    if isinstance(conversation, str):               # some tables hold it so
        conversation = parsed(conversation, "turns in a text are a JSON list; words to draw belong in caption")
    turns = []
    for turn in conversation if isinstance(conversation, list) else [None]:
        turn = turn if isinstance(turn, dict) else {}
        if "user" in turn:                          # the_cauldron: question and answer together
            said = [("human", turn["user"]), ("gpt", turn.get("assistant"))]
        else:
            speaker = str(turn.get("from") or turn.get("role") or "nobody")
            content = turn.get("value")
            said = [(SPEAKERS.get(speaker, speaker), turn.get("content") if content is None else content)]
        turns += [(speaker, text_of(content, images)) for speaker, content in said]
    return turns


def turn_pairs(turns):
    """[(speaker, text)] -> ((human, assistant), ...), and whether there was a system turn, which is joined to the first
    question."""
    system = bool(turns) and turns[0][0] == "system"
    expected = ["system"] * system + ["human", "gpt"] * (len(turns) // 2 + 1)
    for number, ((speaker, text), right) in enumerate(zip(turns, expected, strict=False), 1):
        if speaker != right:
            raise InputError(f"turn {number} is of {shortened(speaker, 60)!r}: write alternating human and gpt turns, "
                             "human first")
        if text is None:
            raise InputError(f"turn {number} has no text, nor a list of parts of type text or image")
    texts = [text for _, text in turns]
    if system:
        texts[:2] = ["\n".join(texts[:2])]
    if len(texts) % 2:
        raise InputError(f"turn {len(turns)}, the last one, is no answer: write alternating human and gpt turns")
    return tuple((asked, answer.strip()) for asked, answer in zip(texts[::2], texts[1::2], strict=True)), system


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
        if isinstance(one, dict):                   # as Hugging Face's datasets store it
            one = one.get("bytes") or one.get("path")
        if not (isinstance(one, str | bytes) and one):
            return []
        images.append(one if isinstance(one, bytes) else picture_of(one, folder))
    return images


def caption_list(caption):
    """The caption of a record, a text or a list of them -> [text, ...]."""
    captions = [text for text in (caption if isinstance(caption, list) else [caption]) if text]
    if not all(isinstance(text, str) and "<image>" not in text for text in captions):
        raise InputError("a caption is a text, or a list of texts, without <image> marks: it is to be drawn")
    return captions


def first_field(entry, names, strict):
    """The name of the first of these fields that holds something, or None. strict: refuse a second one."""
    found = [name for name in names if entry.get(name)]
    if strict and len(found) > 1:
        raise InputError(f"fields {found[0]!r} and {found[1]!r} mean the same: give one of them")
    return found[0] if found else None


def conversation(turns, pictures):
    """A record of turns [(question, answer)], the last answer None, with its pictures."""
    return Record("the question", "und", tuple(turns), tuple(pictures))


def first_question(record):
    """A record cut off after its first question, with the pictures that this question shows."""
    question = record.turns[0][0]
    marked = any("<image>" in asked for asked, _ in record.turns)
    pictures = record.pictures[:question.count("<image>")] if marked else record.pictures
    return replace(record, turns=((question, None),), pictures=pictures)
