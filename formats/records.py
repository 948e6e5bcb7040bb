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
RECORD_TASKS = (*aia.TASKS, "mixed")             # mixed: pictures and text come in turn, in answers too
SKIP_HINT = "train.py --on-bad-record skip leaves such records out"


@dataclass(frozen=True)
class Record:
    """One example: a conversation with its pictures. `origin` names it in messages."""

    origin: str
    task: str
    turns: tuple                  # ((human, assistant), ...); <image> marks stay in the texts
    pictures: tuple               # paths, bytes of picture files, or uint8 arrays (S, S, 3)
    captions: tuple = ()          # several prompts of one picture, of which each visit draws one
    system: bool = False          # a system turn was joined to the first question
    given: tuple = ()             # numbers of pictures that stand in answers, but are not to be learned


def parts_of(text, numbers, strip):
    """A text with <image> marks -> [stretch of text or picture number, ...]; strip(stretch) cuts the blanks around."""
    first, *others = text.strip().split("<image>")
    parts = [strip(first)]
    for stretch in others:
        parts += [next(numbers), strip(stretch)]
    return [part for part in parts if part != ""]               # picture 0 stays


def conversation_parts(turns, n_images):
    """Turns (human, assistant) with <image> marks -> [([text or picture number, ...], the same of the answer, or None
    without one)]. Pictures are numbered by their marks, whoever says them. Without any marks, the pictures come first.
    """
    marks = sum(text.count("<image>") for turn in turns for text in turn if text)
    if marks == 0:
        asked, answer = turns[0]
        turns = [("<image>" * n_images + asked, answer), *turns[1:]]
    elif marks != n_images:
        raise InputError(f"{marks} <image> marks in the conversation for {n_images} pictures: write one each, or none "
                         "at all")
    numbers = iter(range(n_images))
    result = []
    for asked, answer in turns:
        question = parts_of(asked, numbers, str.lstrip)         # templates write the line break behind a picture
        result.append((question, None if answer is None else parts_of(answer, numbers, str.strip)))
    return result


def pictures_in(sides):
    """The numbers of the pictures that stand in questions, or in answers, each as `conversation_parts` gives it."""
    return [part for side in sides for part in side or () if isinstance(part, int)]


def pictures_asked(record):
    """The numbers of the pictures that stand in questions."""
    return pictures_in(asked for asked, _ in conversation_parts(record.turns, len(record.pictures)))


def pictures_drawn(record):
    """The numbers of the pictures that stand in answers."""
    return pictures_in(answer for _, answer in conversation_parts(record.turns, len(record.pictures)))


def task_of(turns):
    """What a conversation is: one to draw, one to answer, or mixed."""
    if not any("<image>" in (answer or "") for _, answer in turns):
        return "und"
    asked, answer = turns[0]
    return "gen" if len(turns) == 1 and answer == "<image>" and "<image>" not in asked else "mixed"


def check_turns(turns, n_images, named):
    """The task of a conversation with n_images pictures. named: the task that the record itself gives, or None."""
    for i, (_, answer) in enumerate(turns, 1):
        if not answer:
            raise InputError(f"question {i}: its answer is empty: every gpt turn needs text, or <image> to be drawn")
    task = task_of(turns)
    if named not in (None, *RECORD_TASKS):
        raise InputError(f"unknown task {shortened(named)!r}: use one of {', '.join(RECORD_TASKS)}, or leave it out")
    if named not in (None, task):
        raise InputError(f"task is {named!r}, but by its <image> marks the conversation is {task!r}: leave it out")
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
    if system and "<image>" in texts[0]:
        raise InputError("turn 1, of the system, has an <image> mark: let it stand where a human or gpt turn shows it")
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


def edit_of(entry, words, folder):
    """An edit of ShareGPT-4o-Image -> the pictures that it starts from, and its result, each [path or bytes, ...]; any
    other record -> [], []. words: the field that holds the words of the record, or None."""
    if not entry.get("input_image"):
        return [], []
    if words in TURN_FIELDS:
        raise InputError(f"input_image beside {words}: list the pictures of a conversation in image, and write <image> "
                         "where each stands")
    starts, result = (image_list(entry.get(name), folder) for name in ("input_image", "output_image"))
    needed = {"input_image (a path or a list of them)": starts, "input_prompt": words, "output_image": result}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise InputError(f"an edit needs input_image, input_prompt and output_image: add {' and '.join(missing)}")
    return starts, result


def conversation(turns, pictures):
    """A record of turns [(question, answer)], the last answer None, with its pictures."""
    task = "und" if task_of(turns) == "und" else "mixed"
    return Record("the question", task, tuple(turns), tuple(pictures))


def first_question(record):
    """A record cut off after its first question, with the pictures that this question shows: one to answer."""
    question = record.turns[0][0]
    marked = any("<image>" in text for turn in record.turns for text in turn if text)
    pictures = record.pictures[:question.count("<image>")] if marked else record.pictures
    return replace(record, task="und", turns=((question, None),), pictures=pictures, given=())
