"""Judges: another model that grades answers or looks at drawings, as recorded replies."""

import contextlib
import hashlib
import json
from collections import Counter

import numpy as np

from parts.settings import InputError, json_lines


class NoReply(Exception):
    """A request that was written down to be answered elsewhere."""


class Judge:
    """Recorded replies of another model: a line each, {"key": sha256 of the request, "request", "replies": [text]}.

    The n-th call with one request gets its n-th reply, the last one repeats. With `export`, requests without a reply
    are collected in `wanted` (and raise NoReply); without, they are an error. A live judge is a subclass whose ask()
    asks.
    """

    def __init__(self, file="", export=""):
        self.file, self.export, self.wanted, self.calls, self.replies = file, export, {}, Counter(), {}
        for origin, row in json_lines(file, "key", "replies") if file else ():
            if not isinstance(row["replies"], list) or not all(isinstance(reply, str) for reply in row["replies"]):
                raise InputError(f"{origin}: replies are a list of texts, one a call")
            self.replies.setdefault(row["key"], []).extend(row["replies"])

    def ask(self, **request):
        canonical = json.dumps(request, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(canonical.encode()).hexdigest()
        if replies := self.replies.get(key):
            self.calls[key] += 1
            return replies[min(self.calls[key], len(replies)) - 1]
        if not self.export:
            raise InputError(f"{self.file} holds no reply to {canonical[:60]}... (key {key[:8]}): write the open "
                             "requests with --judge-export FILE, and add their replies")
        self.wanted[key] = request
        raise NoReply

    def __call__(self, prompt, *, temperature, max_tokens, system=None):
        """Text judge: the reply of a language model."""
        return self.ask(kind="text", prompt=prompt, temperature=temperature, max_tokens=max_tokens, system=system)

    def vqa(self, image, question):
        """VQA judge. image: (name of the file, box of the crop in it)."""
        return self.ask(kind="vqa", image=image[0], box=[*image[1]], question=question)

    def detect(self, path):
        """Detector: a list of [x1, y1, x2, y2, score] for each class; a recording holds no masks."""
        boxes = self.decoded(path, self.ask(kind="detect", image=path))
        try:
            return [np.array(rows, np.float32).reshape(-1, 5) for rows in boxes], None
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.file}: the boxes of {path} are no lists of five numbers: {error}") from error

    def color(self, image, boxes, name):
        """Colour judge: a colour name for each box; image is the name of the file."""
        reply = self.decoded(image, self.ask(kind="color", image=image, class_name=name,
                                             boxes=[[*map(float, box)] for box, _ in boxes]))
        if not isinstance(reply, list) or len(reply) != len(boxes):
            raise InputError(f"{self.file}: the colours of {name} in {image} are no list of {len(boxes)} names")
        return reply

    def decoded(self, image, reply):
        try:
            return json.loads(reply)
        except ValueError as error:
            raise InputError(f"{self.file}: the reply {reply[:40]!r} about {image} is not JSON") from error

    def each(self, things, judged):
        """judged(thing) of all things whose replies are known."""
        results = []
        for thing in things:
            with contextlib.suppress(NoReply):
                results.append(judged(thing))
        return results


# Official judge prompts are given by the user; they are known by length and SHA-256, MMBench's after {q}, {o}, {p} have
# become U+0001, U+0002, U+0003.
PROMPTS = {"mmbench": (761, "c43f2c868ec5c557796b973a7178990240d996db37d65f75092839874d11ec09"),
           "mmvet": (2290, "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f")}


def judge_prompt(settings):
    """Text of --judge-prompt and what it is: "official", or its SHA-256."""
    try:
        with open(settings.judge_prompt, encoding="utf-8", newline="") as file:
            text = marked = file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"--judge-prompt {settings.judge_prompt!r} cannot be read: a judge of {settings.bench} needs "
                         "the official text in a file") from error
    for name, mark in zip("qop", "\1\2\3", strict=True) if settings.bench == "mmbench" else ():
        marked = marked.replace("{" + name + "}", mark)
    what = len(marked), hashlib.sha256(marked.encode()).hexdigest()
    if what != PROMPTS[settings.bench] and not settings.force:
        raise InputError(f"{settings.judge_prompt} is not the official judge prompt of {settings.bench} ({what[0]} "
                         f"characters for {PROMPTS[settings.bench][0]}, SHA-256 {what[1][:8]}...): --force takes it")
    return text, "official" if what == PROMPTS[settings.bench] else what[1]
