"""Judges: other models that grade answers or look at drawings, replaced here by recorded replies.

MM-Vet needs a judge, and so do MMVP's official variant, GenEval and DPG-Bench; MMBench may have one. Two commands:
    python eval.py score mmvet ... --judge-export open.jsonl    # write the open requests, and stop
    python eval.py score mmvet ... --judge replies.jsonl        # score with the replies
"""

import contextlib
import hashlib
import json
from collections import Counter

import numpy as np

from benchmarks.common import check_texts
from parts.settings import InputError, json_lines, read_text


class NoReply(Exception):
    """A request without a reply, collected to be answered elsewhere."""


class Judge:
    """Recorded replies, one line per request: {"key": SHA-256 of the request, "request": {...}, "replies": [text]}.

    The n-th call with the same request gets its n-th reply; the last reply repeats. A request without a reply is an
    error, or with `export` is collected in `wanted` and raises NoReply. For a live judge, write a subclass whose ask()
    calls the model.
    """

    def __init__(self, file="", export=""):
        self.file = file
        self.export = export
        self.wanted = {}                        # {key: request}, still to be answered
        self.calls = Counter()                  # {key: number of calls so far}
        self.replies = {}                       # {key: [text]}
        for origin, row in json_lines(file, "key", "replies") if file else ():
            check_texts(origin, row, "key")
            if not isinstance(row["replies"], list) or not all(isinstance(reply, str) for reply in row["replies"]):
                raise InputError(f"{origin}: replies must be a list of strings, one for each call")
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
        """VQA judge: the answer to a question about a crop. image: (name of the file, box of the crop in pixels)."""
        name, box = image
        return self.ask(kind="vqa", image=name, box=[*box], question=question)

    def detect(self, path):
        """Detector -> an array (N, 5) of x1, y1, x2, y2, score for each class; and None: recordings hold no masks."""
        boxes = self.decoded(path, self.ask(kind="detect", image=path))
        try:
            return [np.array(rows, np.float32).reshape(-1, 5) for rows in boxes], None
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.file}: the boxes of {path} must be lists of five numbers: {error}") from error

    def color(self, image, boxes, name):
        """Colour judge: a colour name for each box of class `name`. image: name of the file; boxes: [(box, mask)]."""
        numbers = [[float(value) for value in box] for box, _ in boxes]
        reply = self.decoded(image, self.ask(kind="color", image=image, class_name=name, boxes=numbers))
        named = isinstance(reply, list) and all(isinstance(colour, str) for colour in reply)
        if not named or len(reply) != len(boxes):
            raise InputError(f"{self.file}: the colours of {name} in {image} must be a list of {len(boxes)} names")
        return reply

    def decoded(self, image, reply):
        try:
            return json.loads(reply)
        except ValueError as error:
            raise InputError(f"{self.file}: the reply {reply[:40]!r} about {image} is not JSON: record it again"
                             ) from error

    def each(self, things, grade):
        """[grade(thing)] of all things whose replies are known; the requests of the others are collected."""
        results = []
        for thing in things:
            with contextlib.suppress(NoReply):
                results.append(grade(thing))
        return results


# The user brings the official judge prompts; we know them by length and SHA-256. MMBench's are taken after its fields
# {q}, {o}, {p} have become U+0001, U+0002, U+0003.
PROMPTS = {"mmbench": (761, "c43f2c868ec5c557796b973a7178990240d996db37d65f75092839874d11ec09"),
           "mmvet": (2290, "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f")}


def judge_prompt(settings):
    """Text of the --judge-prompt file, and its name in the scores: "official", or else its SHA-256."""
    if not settings.judge_prompt:
        raise InputError(f"a judge of {settings.bench} needs --judge-prompt, a file with the official text")
    text = read_text(settings.judge_prompt, f"--judge-prompt {settings.judge_prompt}")
    marked = text
    if settings.bench == "mmbench":
        marked = marked.replace("{q}", "\1").replace("{o}", "\2").replace("{p}", "\3")
    size = len(marked)
    digest = hashlib.sha256(marked.encode()).hexdigest()
    official = PROMPTS[settings.bench]
    if (size, digest) == official:
        return text, "official"
    if not settings.force:
        raise InputError(f"{settings.judge_prompt} is not the official judge prompt of {settings.bench} ({size} "
                         f"characters instead of {official[0]}, SHA-256 {digest[:8]}...): --force accepts it")
    return text, digest
