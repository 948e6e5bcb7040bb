"""One record: pictures with a conversation. What is refused, and which layouts of public data sets are taken."""

import json
from dataclasses import dataclass

import aia
from parts.settings import InputError

SKIP_HINT = "train.py --on-bad-record skip leaves such records out"


@dataclass(frozen=True)
class Record:
    """One example: a picture (or several, for questions) with a conversation. `origin` names it in messages."""

    origin: str
    task: str
    turns: tuple                  # ((human, assistant), ...); <image> marks stay in the human text
    pictures: tuple               # paths, bytes of picture files, or uint8 arrays (S, S, 3)


def parse_record(line, origin, folder, strict=True):
    """One JSON line, or its fields -> Record. A generation record has <image> as (or in) the assistant's answer. Not
    strict: the layouts of public sets are taken too, and fields that no one needs are ignored."""
    try:
        entry = line if isinstance(line, dict) else json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}): write one object per line") from error
    entry = entry if strict or not isinstance(entry, dict) else published(entry)
    known = {"id", "image", "conversations", "task"}
    if not isinstance(entry, dict) or not {"image", "conversations"} <= set(entry):
        raise InputError('a record needs "image" and "conversations"')
    if set(entry) - known:
        raise InputError(f"unknown field {sorted(set(entry) - known)[0]!r}: known are {', '.join(sorted(known))}")
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    said = entry["conversations"]
    good = isinstance(said, list) and len(said) >= 2 and len(said) % 2 == 0 and all(
        isinstance(turn, dict) and turn.get("from") == ("human", "gpt")[i % 2] and isinstance(turn.get("value"), str)
        for i, turn in enumerate(said))
    images = [(one["bytes"] or one["path"]) if isinstance(one, dict) and {"bytes", "path"} <= set(one) else one
              for one in images]                     # as Hugging Face's datasets store pictures
    if not good or not images or not all(isinstance(one, str | bytes) and one for one in images):
        raise InputError('"image" must be a path or a list of paths, "conversations" human and gpt turns in turn, '
                         'each {"from": ..., "value": text}')
    turns = tuple((said[i]["value"], said[i + 1]["value"].strip()) for i in range(0, len(said), 2))
    task = check_turns(turns, len(images), entry.get("task"))
    return Record(origin, task, turns, tuple(one if isinstance(one, bytes) else folder / one for one in images))


def published(entry):
    """Fields of a public record as ours: LLaVA's conversations, ShareGPT-4o-Image's prompts, pictures with captions."""
    if entry.get("input_image"):
        raise InputError("the record edits a picture (input_image), which neither task does: leave it out")
    image, said = entry.get("image") or entry.get("output_image"), entry.get("conversations")
    caption = entry.get("caption") or entry.get("text") or entry.get("input_prompt")
    if not said and caption:
        said = [{"from": "human", "value": caption}, {"from": "gpt", "value": "<image>"}]
    if not (image and said):
        raise InputError("a record needs a picture, and a conversation or a caption")
    return {"image": image, "conversations": said}


def check_turns(turns, n_images, named):
    """The task of a conversation; refuse what neither task can use."""
    if any(not answer for _, answer in turns):
        raise InputError("an answer is empty: every gpt turn needs text, or <image> to be drawn")
    task = "gen" if any("<image>" in answer for _, answer in turns) else "und"
    if named not in (None, *aia.TASKS):
        raise InputError(f"unknown task {named!r}: use one of {', '.join(aia.TASKS)}, or leave it out")
    if named not in (None, task):
        raise InputError(f"task is {named!r}, but the conversation is of {task!r}: <image> in an answer means drawing")
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if task == "gen" and (len(turns) != 1 or n_images != 1 or marks or turns[0][1] != "<image>"):
        raise InputError("a drawing record has one human turn with the prompt, and <image> alone as the answer")
    if task == "und":
        question_parts(turns, n_images)              # refuses marks that do not fit
    return task


def question_parts(turns, n_images):
    """Human texts with <image> marks -> [([text or picture number, ...], answer)]. No mark: the pictures come first."""
    marks = sum(asked.count("<image>") for asked, _ in turns)
    if marks == 0:
        turns = [("<image>" * n_images + turns[0][0], turns[0][1]), *turns[1:]]
    elif marks != n_images:
        raise InputError(f"{marks} <image> marks in the questions for {n_images} pictures: write one each, or none")
    number, result = 0, []
    for asked, answer in turns:
        parts = []
        for i, text in enumerate(asked.strip().split("<image>")):
            if i:
                parts.append(number)
                number += 1
            text = text.lstrip() if i else text     # the templates set the line breaks around a picture
            parts += [text] if text else []
        result.append((parts, answer))
    return result
