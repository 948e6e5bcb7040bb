"""What the model eats: a world drawn by code, your own pictures, prompt templates, and the masks that AIA needs.

A record (pictures with a conversation) becomes tokens with a role each; from the roles follow the labels of next-token
prediction and the two masks of Eq. 1, by one rule for both models (see `spans`). A record is for one task, or mixed: in
its answers text and pictures come in turn, and it is a sample of both tasks.

    python data.py export FOLDER --n 200      # draw world data as pictures + JSON lines, the layout of --data
    python data.py index shards/ train.jsonl  # where each record lies: data sets of any size, read at random
    python data.py encode FOLDER --data train.jsonl --init Janus-Pro-7B      # the codes of all pictures, once
"""

from parts.installed import missing  # noqa: F401  before what may be missing

import concurrent.futures
import contextlib
import functools
import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aia
import formats.weights
import model
from formats import datasets
from formats.records import (
    RECORD_TASKS,
    SKIP_HINT,
    Record,
    conversation_parts,
    pictures_asked,
    pictures_drawn,
    pictures_in,
)
from parts.decoding import CLOSING
from parts.kernels import span
from parts.pictures import Drawn, drawn_at, janus_picture, load_picture, siglip_picture, tokenizer_picture
from parts.settings import InputError, at_least, chosen, device_of, opt, run_command, stream
from parts.stories import story_about, story_sentences, story_words
from parts.text import Text, special_tokens, train_bpe
from parts.world import DESCRIBE, World, caption, describe, draw_scenes, questions_about, sentences, words_of, world_of

# Legend: B samples of one task, T tokens, N image tokens of one picture, S side of a picture in pixels.


# ---------------------------------------------------------------------------------------------------------------------
# Templates: a conversation as tokens with roles
# ---------------------------------------------------------------------------------------------------------------------
# Pictures of questions are IMAGE; those that answers draw are DRAWN, or GIVEN if they are not to be learned. OPEN is
# the begin-of-image with which an answer goes on to draw.
TEXT, CONTROL, IMAGE, ANSWER, PADDING, DRAWN, GIVEN, OPEN = range(8)
# What each task has to predict; in a sample of one task nothing else is learned.
LABELLED = {"gen": (DRAWN,), "und": (ANSWER, OPEN)}
EMU3_SYSTEM = "You are a helpful assistant."
EMU3_USER, EMU3_ASSISTANT = " USER: ", ". ASSISTANT:"        # the template itself adds the full stop
JANUS_USER, JANUS_ASSISTANT, JANUS_TURN = ": ", ":", "\n\n"


def marked(roles, *which):
    """Where roles (B, T) are one of `which`: (B, T) bool."""
    return torch.isin(roles, torch.tensor(which, device=roles.device))


def spans(roles, task):
    """The rule of Eq. 1: roles (B, T) -> condition (B, T), queries (B, T), both bool; of a mixed sample (2, B, T), in
    the order of TASKS.

    Queries are tokens that predict another one of the same picture (a row end between two of them is neither) in
    generation, of the same stretch of an answer, up to the one before EOS, in understanding. The condition of the one
    is all text before them, of the other all pictures. In a mixed sample, text may come before any picture: a token
    without a key would pull the mean to zero, and does not count.
    """
    if task == "mixed":
        both = [spans(roles, one) for one in aia.TASKS]
        condition, queries = (torch.stack(masks) for masks in zip(*both, strict=True))
        return condition, queries & (condition.cumsum(-1) > 0)
    answer, keys = (DRAWN, (TEXT, ANSWER)) if task == "gen" else (ANSWER, (IMAGE, DRAWN, GIVEN))
    following = torch.nn.functional.pad(roles[:, 1:], (0, 1), value=PADDING)
    return marked(roles, *keys), (roles == answer) & (following == answer)


class Emu3Template:
    """One stream: pictures are tokens like any other."""

    def __init__(self, config, text, training=True):        # training: as in JanusTemplate; unused here
        self.config, self.text, self.ids = config, text, text.ids

    def block(self, codes, role=IMAGE):
        """A picture, codes (h, w): begin, size as text, rows each with a row end, frame end, end."""
        h, w = codes.shape
        pieces = [([self.ids["boi"]], OPEN if role == DRAWN else CONTROL), (self.opening(h, w), CONTROL)]
        for row in codes.tolist():
            pieces += [([self.ids["visual"] + code for code in row], role), ([self.ids["eol"]], CONTROL)]
        return [*pieces, ([self.ids[role] for role in CLOSING["emu3"]], CONTROL)]

    def opening(self, h, w):
        """What stands between begin-of-image and the first code: height*width of the code grid, image token."""
        return [*self.text.encode(f"{h}*{w}"), self.ids["img"]]

    def stretch(self, text):
        """Text of an answer, between pictures."""
        return self.text.encode(text)

    def prompt(self, prompt, size, dropped=False):
        """Generation, up to the first code."""
        return [([self.ids["bos"], *self.text.encode("" if dropped else prompt)], TEXT),
                ([self.ids["boi"], *self.opening(*size)], CONTROL)]

    def generation(self, prompt, codes, dropped=False):
        return [([self.ids["bos"], *self.text.encode("" if dropped else prompt)], TEXT), *self.block(codes, DRAWN)]

    def conversation(self, turns, pictures, given=(), dropped=False):
        """turns [(question, answer or None)], each a list of text and picture numbers; None: up to the answer. given:
        pictures of answers that are not to be learned. dropped: without all that is said; tags and pictures stay."""
        pieces = [([self.ids["bos"]], TEXT)]
        before = EMU3_SYSTEM + EMU3_USER
        for asked, answer in turns:
            for part in asked:                       # text between two pictures is one piece: tokenizers may join
                if isinstance(part, str):            # the end of a question with the template's full stop
                    before += "" if dropped else part
                else:
                    pieces += [(self.text.encode(before), TEXT), *self.block(pictures[part])]
                    before = ""
            pieces.append((self.text.encode(before + EMU3_ASSISTANT), TEXT))
            before = EMU3_USER
            for part in answer or ():
                if not isinstance(part, str):
                    pieces += self.block(pictures[part], GIVEN if part in given else DRAWN)
                elif not dropped:
                    pieces.append((self.stretch(part), ANSWER))
            if answer is not None:
                pieces.append(([self.ids["eos"]], CONTROL if dropped else ANSWER))
        return pieces


class JanusTemplate:
    """Roles and blank lines in the DeepSeek manner; pictures are placeholders that the model fills."""

    def __init__(self, config, text, training=True):
        self.config, self.text, self.ids = config, text, text.ids
        self.system = "" if training else config.system         # the authors train without it, and answer with it
        self.user, self.assistant = [text.ids["user"]], [text.ids["assistant"]]

    def plain(self):
        """Words for roles, and no system text: as VLMEvalKit asks, and as the AIA authors had pictures drawn."""
        self.system, self.user, self.assistant = "", self.text.encode("User"), self.text.encode("Assistant")

    def prompt(self, prompt, size=None, dropped=False):
        """Generation, up to begin-of-image. Dropped: every token between BOS and begin-of-image becomes a pad."""
        said = JANUS_USER + prompt.strip() + JANUS_TURN if prompt.strip() else JANUS_ASSISTANT  # a role without words
        ids = [self.ids["bos"], *self.user, *self.text.encode(said), *self.assistant,
               *self.text.encode(JANUS_ASSISTANT)]
        ids = [ids[0], *[self.ids["pad"]] * (len(ids) - 1)] if dropped else ids
        return [(ids, TEXT), ([self.ids["boi"]], CONTROL)]

    def generation(self, prompt, codes, dropped=False):
        return [*self.prompt(prompt, dropped=dropped), ([self.ids["placeholder"]] * codes.numel(), DRAWN)]

    def seen(self):
        """A picture as SigLIP sees it."""
        placeholders = [self.ids["placeholder"]] * self.config.picture_tokens
        return [([self.ids["boi"]], CONTROL), (placeholders, IMAGE), ([self.ids["eoi"]], CONTROL)]

    def block(self, codes, role):
        """A picture in an answer, codes (N,), and behind it, unless Config.see is "codes", the second look: what is
        drawn means nothing to this model's understanding before it has seen it."""
        return [([self.ids["boi"]], OPEN if role == DRAWN else CONTROL),
                ([self.ids["placeholder"]] * codes.numel(), role),
                ([self.ids[role] for role in CLOSING["janus"]], CONTROL),
                *(self.seen() if self.config.see == "both" else ())]

    def opening(self, h, w):
        """Nothing stands between begin-of-image and the first code."""
        return []

    def stretch(self, text):
        """Text of an answer, between pictures: a message follows ": " in this template."""
        return self.text.encode(" " + text)

    def blanked(self, ids, role, dropped):
        """A piece of text; dropped: as many pads, which are attended."""
        return ([self.ids["pad"]] * len(ids), TEXT) if dropped else (ids, role)

    def conversation(self, turns, pictures, given=(), dropped=False):
        """As Emu3Template.conversation; a picture in a question is followed by a line break."""
        system = self.text.encode(self.system + JANUS_TURN) if self.system else []
        pieces = [([self.ids["bos"], *system], TEXT)]
        for asked, answer in turns:
            pieces.append((self.user, TEXT))
            before = JANUS_USER                      # text in front of a picture, and the line break after it, belong
            for i, part in enumerate(asked):         # to one piece, as the tokenizer would cut the whole string
                if isinstance(part, str):
                    before += part
                else:
                    pieces += [self.blanked(self.text.encode(before), TEXT, dropped), *self.seen()]
                    before = "\n" if i + 1 < len(asked) else ""
            pieces += [self.blanked(self.text.encode(before + JANUS_TURN), TEXT, dropped), (self.assistant, TEXT),
                       (self.text.encode(JANUS_ASSISTANT), TEXT)]
            for part in answer or ():
                if isinstance(part, str):
                    pieces.append(self.blanked(self.stretch(part), ANSWER, dropped))
                else:
                    pieces += self.block(pictures[part], GIVEN if part in given else DRAWN)
            if answer is not None:
                pieces.append(([self.ids["eos"]], CONTROL if dropped else ANSWER))
        return pieces


TEMPLATES = {"emu3": Emu3Template, "janus": JanusTemplate}
DROP = {"emu3": 0.05, "janus": 0.10}             # share of generation prompts that are dropped, for guidance


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """B samples of one task, T tokens, padded on the right. Image positions hold a placeholder for Janus-Pro, which has
    no ids for them. Mixed samples are of K = 2 tasks: then labels, condition and queries are (K, B, T), aia_valid is
    (K, B) and rectangle holds K, in the order of TASKS."""

    task: str
    tokens: torch.Tensor                     # (B, T) ids
    labels: torch.Tensor                     # (B, T) ids (Janus-Pro generation: codes), -100 where not trained
    condition: torch.Tensor                  # (B, T) bool: keys of the other modality
    queries: torch.Tensor                    # (B, T) bool: rows that are averaged
    aia_valid: torch.Tensor                  # (B,) bool: false for a dropped prompt, or without keys or queries
    pixels: torch.Tensor | None = None       # what Janus-Pro sees: (n, 3, S, S)
    features: torch.Tensor | None = None     # the same, as SigLIP has seen it: (n, N, vit_width)
    codes: torch.Tensor | None = None        # what Janus-Pro draws: (n, N)
    drawn: torch.Tensor | None = None        # (B, T) bool, mixed: the placeholders that stand for codes
    origins: tuple = ()                      # where each sample comes from, for messages
    lengths: tuple = ()                      # tokens of each sample, without padding
    # What follows from the above, made while the batch is still on the CPU, so that a GPU is never asked how many there
    # are. Whoever replaces a mask must make its span anew: see `measuring`.
    rectangle: tuple = ()                    # first query and end, first key of the condition and end, of all samples
    predicting: torch.Tensor | None = None   # (n,) which of the B T tokens have a successor with a label ...
    targets: torch.Tensor | None = None      # ... and that label; mixed: first all of generation
    labelled: tuple = ()                     # how many of these each task has

    def __post_init__(self):
        if not self.rectangle:
            each = [(*span(queries), *span(condition)) for queries, condition in zip(
                self.per_task(self.queries), self.per_task(self.condition), strict=True)]
            self.rectangle = tuple(each) if self.task == "mixed" else each[0]
        if self.targets is None:
            following = torch.nn.functional.pad(self.labels[..., 1:], (0, 1), value=-100).flatten(-2)   # (B T,)
            found = [(row != -100).nonzero()[:, 0] for row in self.per_task(following)]
            self.predicting = torch.cat(found)
            self.targets = torch.cat([row[at] for row, at in zip(self.per_task(following), found, strict=True)])
            self.labelled = tuple(map(len, found))

    @property
    def tasks(self):
        """The tasks that these are samples of."""
        return aia.TASKS if self.task == "mixed" else (self.task,)

    def per_task(self, x):
        """Something that a mixed batch has for each task, as one item for each of `tasks`; None stays None in each."""
        return x if self.task == "mixed" and x is not None else (x,) * len(self.tasks)

    def measuring(self, condition):
        """The same samples, asked for the attention on other keys: condition (B, T) bool."""
        return replace(self, condition=condition, rectangle=())

    def each(self, change):
        """A copy with all its tensors changed alike."""
        return replace(self, **{k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})

    def to(self, device):
        waits = torch.device(device).type != "cuda"             # MPS: a copy under way may outlive its source
        return self.each(lambda x: x.to(device, non_blocking=not waits))

    def pinned(self):
        """In memory from which a GPU copies while the CPU goes on."""
        return self.each(lambda x: x.pin_memory())


LENGTHS = {"cuda": 16}                       # T is a multiple: cuDNN plans 0.12 s for each new one (assets/gpu.json)
PIXELS_AT_ONCE = 2**16                       # for the picture tokenizer, whose activations are a thousand times larger


class Preparer:
    """Records -> Batch for one model: pictures through its transforms and tokenizer, texts through its template."""

    def __init__(self, m, text, training=True, encoded=None, first=True):
        self.m = m
        self.config = m.config
        self.text = text
        self.training = training
        self.encoded = encoded
        self.first = first                          # whether the first token, a sink, is in generation's condition
        self.template = text and TEMPLATES[m.config.kind](m.config, text, training)    # None: for pictures only
        # Codes of world pictures by content. They are never forgotten, so nothing may be prepared before the picture
        # tokenizer is trained.
        self.known = {}
        self.device = next(m.vq.parameters()).device

    def recall(self, name, source):
        """The "codes" or "features" of a picture if they were made before, else None."""
        if isinstance(source, Drawn):
            return source.codes if name == "codes" else None
        if isinstance(source, np.ndarray):
            return self.known.get(source.tobytes()) if name == "codes" else None
        return self.encoded.get(name, source) if self.encoded else None

    def codes(self, pictures):
        """Codes of pictures, each a CPU tensor; equal-sized ones are encoded together, known ones are not."""
        found = [self.recall("codes", p) for p in pictures]
        shapes = {}
        for i, source in enumerate(pictures):
            if found[i] is None:
                pixels = tokenizer_picture(load_picture(source, self.config.kind), self.config, self.training)
                shapes.setdefault(pixels.shape, {})[i] = pixels
        for (_, height, width), group in shapes.items():
            parts = torch.stack(list(group.values())).split(max(1, PIXELS_AT_ONCE // (height * width)))
            codes = torch.cat([self.m.encode_images(part.to(self.device)).cpu() for part in parts])
            for i, one in zip(group, codes, strict=True):
                found[i] = one.clone()
                if isinstance(pictures[i], np.ndarray):
                    self.known[pictures[i].tobytes()] = found[i]
        return found

    def seen(self, pictures, drawn=()):
        """Pictures as Janus-Pro sees them, as fields of a Batch: pixels, or if all of them have stored features, those.
        drawn: which of them it has drawn, and sees as it drew them: cropped to a square."""
        drawn = drawn or [False] * len(pictures)
        features = [None if own else self.recall("features", p) for p, own in zip(pictures, drawn, strict=True)]
        if pictures and all(one is not None for one in features):
            return {"features": torch.stack(features)}
        pixels = [(janus_picture if own else siglip_picture)(load_picture(p, "janus"), self.config)
                  for p, own in zip(pictures, drawn, strict=True)]
        return {"pixels": torch.stack(pixels) if pixels else None}

    def batch(self, records, rngs=None, drop=0.0):
        """Records of one task, or mixed ones -> Batch. With drop, rngs (one a record) say which prompts are dropped."""
        dropped = [record.task != "und" and drop > 0 and bool(rngs[i].random() < drop) for i, record in
                   enumerate(records)]
        samples, pictures = self.pieces(records, dropped)
        batch = collate(records[0].task, samples, ~torch.tensor(dropped), self.text.ids["pad"],
                        origins=tuple(record.origin for record in records),
                        multiple=LENGTHS.get(self.device.type, 1), **pictures)
        if self.first:
            return batch
        others = torch.arange(batch.tokens.shape[1]) > 0                        # (T,)
        return batch.measuring(batch.condition & others)

    def nothing(self, task):
        """A dummy batch without labels, so that every process runs the same modules."""
        side = self.config.image_size
        said = (("nothing", {"gen": "<image>", "und": "nothing", "mixed": "<image> nothing"}[task]),)
        batch = self.batch([Record("nothing", task, said, (np.zeros((side, side, 3), np.uint8),))])
        return replace(batch, labels=torch.full_like(batch.labels, -100), targets=None, origins=(), lengths=(0,),
                       aia_valid=torch.zeros_like(batch.aia_valid))

    def pieces(self, records, dropped=None):
        """Records of one task, or mixed ones -> pieces of each, and fields of a Batch that Janus-Pro has besides
        tokens: pictures that it sees, and codes that it draws. dropped: of which records the words are left out. A None
        answer ends the prompt."""
        task = records[0].task
        talks = [conversation_parts(record.turns, len(record.pictures)) for record in records]
        drawn = [pictures_in(answer for _, answer in talk) for talk in talks]
        coded = drawn if self.config.kind == "janus" else [range(len(record.pictures)) for record in records]
        wanted = [(i, number) for i, numbers in enumerate(coded) for number in numbers]
        codes = dict(zip(wanted, self.codes([records[i].pictures[number] for i, number in wanted]), strict=True))
        dropped = dropped or [False] * len(records)
        samples = []
        for i, (record, talk) in enumerate(zip(records, talks, strict=True)):
            mine = {number: codes[i, number] for number in coded[i]}
            if task == "gen":
                pieces = self.template.generation(record.turns[0][0], mine[0], dropped[i])
            else:
                pieces = self.template.conversation(talk, mine, record.given, dropped[i])
            length = sum(len(ids) for ids, _ in pieces)
            if self.training and length > self.config.context:
                raise InputError(f"{record.origin}: {length} tokens, but the model takes {self.config.context}: "
                                 "shorten the text, split the conversation, or show fewer or smaller pictures")
            samples.append(pieces)
        return samples, self.pictures(records, drawn, codes) if self.config.kind == "janus" else {}

    def pictures(self, records, drawn, codes):
        """Fields of a Batch of Janus-Pro: what it sees, in the order of the tokens, and the codes of what it draws."""
        again = self.config.see == "both"
        looks = [(picture, number in own) for record, own in zip(records, drawn, strict=True)
                 for number, picture in enumerate(record.pictures) if again or number not in own]
        if self.training and records[0].task == "mixed" and not looks:
            # All processes have to run the same modules: it sees one for which no token stands.
            looks = [(records[0].pictures[0], True)]
        found = {}
        if records[0].task != "gen":
            found = self.seen([picture for picture, _ in looks], [own for _, own in looks])
        return found | ({"codes": torch.stack(list(codes.values()))} if codes else {})


def collate(task, samples, valid, pad, pixels=None, codes=None, origins=(), features=None, multiple=1):
    """Pieces [(ids, role), ...] of each sample -> Batch, T a multiple; labels and masks follow from the roles. valid
    (B,) bool: false for a dropped prompt, of which a mixed sample learns the pictures only."""
    lengths = tuple(sum(len(ids) for ids, _ in pieces) for pieces in samples)
    tokens = torch.full((len(samples), -(-max(lengths) // multiple) * multiple), pad)           # (B, T)
    roles = torch.full_like(tokens, PADDING)                                    # (B, T)
    for b, pieces in enumerate(samples):
        ids = [i for part, _ in pieces for i in part]
        tokens[b, :len(ids)] = torch.tensor(ids)
        roles[b, :len(ids)] = torch.tensor([role for part, role in pieces for _ in part])
    condition, queries = spans(roles, task)                                     # (B, T) or (2, B, T), as all below
    labels = {one: torch.where(marked(roles, *LABELLED[one]), tokens, -100) for one in aia.TASKS}
    drawn = None
    if codes is not None:                                                       # Janus-Pro: gen_head predicts codes
        drawn = marked(roles, DRAWN, GIVEN)
        labels["gen"] = torch.where(roles == DRAWN, tokens.masked_scatter(drawn, codes), -100)
    if task == "mixed":
        labels["und"] = labels["und"].masked_fill(~valid[:, None], -100)
    labels = torch.stack(list(labels.values())) if task == "mixed" else labels[task]
    valid = valid & condition.any(-1) & queries.any(-1)                         # (B,) or (2, B)
    return Batch(task, tokens, labels, condition, queries, valid, pixels, features, codes,
                 drawn if task == "mixed" else None, origins, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Which samples make a step
# ---------------------------------------------------------------------------------------------------------------------
def samples_before(step, batch_size, ratio, drawn=None):
    """How many samples of each task, and mixed ones, all steps before `step` have used: the mix honours the ratio over
    any window. drawn: a seed; each step then has one of them, drawn with the odds of the ratio, as the released code
    does it."""
    bounds = [0, *itertools.accumulate(ratio)]
    total = step * batch_size
    used = [total * bound // bounds[-1] for bound in bounds]
    if drawn is not None:
        lots = stream(drawn, "mix").random(step) * bounds[-1]
        used = [batch_size * int((lots < bound).sum()) for bound in bounds]
    return {task: end - start for task, start, end in zip(RECORD_TASKS, used, used[1:], strict=False)}


def usable_batch(preparer, get, positions, drop=0.0, bad=None):
    """Batch of the records at these positions, or None if there is none. get(position) -> record, random numbers.

    A record that cannot be used is noted in the list `bad` and left out; without a list it stops the command.
    """
    pairs = []
    try:
        pairs = [get(position) for position in positions]
        return preparer.batch([record for record, _ in pairs], [rng for _, rng in pairs], drop) if pairs else None
    except InputError as error:
        if len(positions) > 1:                      # find it: each record alone, with fresh random numbers
            good = [position for position in positions if usable_batch(preparer, get, [position], drop, bad)]
            if len(good) == len(positions):
                raise
            return usable_batch(preparer, get, good, drop, bad)
        origin = pairs[0][0].origin if pairs else ""            # an error of reading names it already
        text = str(error) if origin in str(error) else f"{origin}: {error}"
        if bad is None:
            raise InputError(f"{text} ({SKIP_HINT})") from error
        bad += [text] if text not in bad else []


def check_tasks(source, ratio):
    """Refuse a source without records of a task that has a share."""
    for task, share in zip(RECORD_TASKS, ratio, strict=False):
        if share and not source.count(task):
            there = ":".join("1" if source.count(one) else "0" for one in RECORD_TASKS)
            what = "mixed record" if task == "mixed" else f"record for task {task!r}"
            raise InputError(f"the data hold no {what}: add some, or train with --ratio {there.removesuffix(':0')}")


def beside(device):
    """Set up a thread that prepares batches while another trains. On a GPU it encodes pictures on a stream of its own,
    which waits for the weights but not for each step."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        own = torch.cuda.Stream(device)
        own.wait_stream(torch.cuda.default_stream(device))
        torch.cuda.set_stream(own)                  # also makes the device current: a new thread starts on 0


class Schedule:
    """The samples of every step, from the seed alone: nothing to store for resuming, the same for any processes.

    ratio (gen, und, mixed); drop: portion of prompts that are dropped, None: that of the model; on_bad_record "stop" or
    "skip"; mix "both": each step has both tasks, "drawn": one, drawn with the odds of the ratio.
    """

    def __init__(self, source, preparer, seed, batch_size, ratio, micro_batch, drop=None, on_bad_record="stop", rank=0,
                 processes=1, mix="both"):
        self.source, self.preparer, self.seed, self.batch_size = source, preparer, seed, batch_size
        self.ratio, self.micro_batch, self.on_bad_record = ratio, micro_batch, on_bad_record
        self.drop = DROP[preparer.config.kind] if drop is None else drop
        self.bad = []
        self.rank = rank
        self.processes = processes
        self.drawn = seed if mix == "drawn" else None
        parts = [(source, 1)]
        if isinstance(source, datasets.Mixture) and source.shares:
            parts = list(zip(source.sources, source.shares, strict=True))
        self.parts = {task: [part for part in parts if part[0].count(task)] for task in RECORD_TASKS}
        check_tasks(source, ratio)

    def record(self, task, position):
        """The record at a position of the task's endless stream, and its random numbers."""
        sources, shares = zip(*self.parts[task], strict=True)
        number, own = datasets.deal(position, shares)
        n = sources[number].count(task)
        epoch, own = divmod(own, n)
        index = datasets.shuffled(own, n, (self.seed, RECORD_TASKS.index(task), epoch, number))
        rng = stream(self.seed, "record", RECORD_TASKS.index(task), position)
        return sources[number].record(task, index, rng), rng

    def length(self, task, position):
        """Length of a record in characters, a picture token counted as four: good enough to sort by."""
        try:
            record = self.record(task, position)[0]
            config = self.preparer.config
        except InputError:
            return 0                                # reported, or left out, when its batch is made
        words = sum(len(asked) + len(answer) for asked, answer in record.turns)
        return words + 4 * config.picture_tokens * len(record.pictures)

    def groups(self, step):
        """[(task, this process's positions)] of the micro-batches of a step: generation, understanding, mixed.

        Samples of like length go together: less padding, and the same gradient, since a step is one sum. The longest
        come first, so that what does not fit into memory fails at once. Every process has the same tasks in turn.
        """
        start, end = (samples_before(s, self.batch_size, self.ratio, self.drawn) for s in (step, step + 1))
        groups = []
        n = self.micro_batch
        for task in start:
            positions = range(start[task], end[task])
            mine = list(positions[self.rank::self.processes])
            if len(mine) > n:
                mine.sort(key=functools.partial(self.length, task), reverse=True)
            most = -(-len(positions) // self.processes)                             # samples of the first process
            groups += [(task, mine[first:first + n]) for first in range(0, most, n)]
        return groups

    def step(self, step):
        """The micro-batches of a step, each of one task or mixed. One without a usable record is left out; with
        several processes, which wait for one another, a dummy takes its turn (Preparer.nothing)."""
        bad = self.bad if self.on_bad_record == "skip" else None
        batches = []
        cuda = self.preparer.device.type == "cuda"
        for task, positions in self.groups(step):
            try:
                batch = usable_batch(self.preparer, functools.partial(self.record, task), positions, self.drop, bad)
            except InputError:
                raise
            except Exception as error:              # out of memory, a fault in a library: say with which records
                with contextlib.suppress(InputError):           # an unreadable record must not hide the fault
                    error.add_note(f"while preparing {', '.join(self.record(task, i)[0].origin for i in positions)}")
                raise
            if batch or self.processes > 1:
                batch = batch or self.preparer.nothing(task)
                batches.append(batch.pinned() if cuda else batch)
        return batches

    def steps(self, first, end):
        """The batches of each step; the next ones are prepared while these train."""
        # One thread of its own: with more, it would take the cores of a CPU from the training and slow it by half.
        with concurrent.futures.ThreadPoolExecutor(1, initializer=beside, initargs=(self.preparer.device,)) as worker:
            coming = worker.submit(self.step, first)
            for step in range(first, end):
                batches = coming.result()
                coming = worker.submit(self.step, step + 1) if step + 1 < end else None
                yield batches


# ---------------------------------------------------------------------------------------------------------------------
# The world as a source
# ---------------------------------------------------------------------------------------------------------------------
class WorldSource:
    """Training data of a World: a pool of pictures, each with fresh words whenever it is met."""

    def __init__(self, world, n, seed):
        rng = stream(seed, "pool")
        self.world = world
        self.bad, self.paths = [], []               # as FileSource has: no bad records, no files
        self.scenes = [world.scene(rng) for _ in range(n)]
        self.pictures = draw_scenes(self.scenes, world.cell_side)
        self.rng = rng

    @functools.cached_property
    def crowded(self):
        """Pictures for the picture tokenizer, half as many; drawn when they are needed."""
        return draw_scenes([self.world.crowd(self.rng) for _ in range(len(self.scenes) // 2)], self.world.cell_side)

    def count(self, task):
        return len(self.scenes)

    def record(self, task, index, rng):
        scene = self.scenes[index]
        if task == "mixed":
            story = story_about(self.world, scene, rng)
            pictures = draw_scenes(story.scenes, self.world.cell_side)
            return Record(f"world conversation {index}", task, story.turns, tuple(pictures), given=story.given)
        if task == "gen":
            turns = ((caption(scene, rng), "<image>"),)
        else:
            asked = questions_about(self.world, scene, rng)
            described = [(DESCRIBE, describe(scene))] * int(rng.integers(2))
            turns = (*asked, *described)
        return Record(f"world picture {index}", task, turns, (self.pictures[index],))


def train_tokenizer(file, config, world=None, mixed=False):
    """The text tokenizer of a tiny model: a BPE on the words of a world (None: the easiest) and of both templates, with
    the special tokens of `config`; saved as tokenizer.json -> Text. mixed: on the words of stories, too."""
    world = world or World(0)
    frames = (EMU3_SYSTEM + EMU3_USER, EMU3_USER, EMU3_ASSISTANT)
    lines = []
    for said in sentences(world, 2000):
        lines += [*frames, JANUS_USER, JANUS_ASSISTANT, *said, DESCRIBE]
    words = words_of(world)
    if mixed:
        words += story_words()
        for said in story_sentences(world, 2000):
            lines += [*said, *(" " + text for text in said)]
    train_bpe(file, lines, words, frames, model.TINY_TEXT, special_tokens(config.kind, config.codebook))
    return Text(file, config.kind)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Export:
    """Draw world data as pictures and JSON lines, in the layout that `train.py --data` reads."""

    POSITIONAL = ("folder",)
    folder: str = opt("", "folder to write; must be empty or new")
    n: int = opt(200, "records, as many of each task")
    mixed: bool = opt(False, "a third of them conversations with pictures in answers")
    seed: int = opt(0, "world and order")
    shapes: int = opt(4, "shapes of the world, 4 to 8")
    colours: int = opt(4, "colours of the world, 4 to 8")
    objects: int = opt(2, "different things in a scene at most: 2 to 4, with two more shapes and colours")
    cell: int = opt(8, "side of a cell of the world in pixels: 8, 16, 24 or 32; a picture has 2 x 2 cells")


def export(settings):
    """Write n records: pictures/NNNNN.png, further ones of the same record NNNNN-1.png and so on, and train.jsonl."""
    folder = Path(settings.folder)
    at_least(settings, {"seed": 0})
    if not settings.folder or settings.n < 2:
        raise InputError("export needs a folder and --n of at least 2: python data.py export FOLDER --n 200")
    world = world_of(asdict(settings))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: choose another or empty it")
    (folder / "pictures").mkdir(parents=True)
    source = WorldSource(world, settings.n, settings.seed)
    lines = []
    tasks = RECORD_TASKS if settings.mixed else aia.TASKS
    for i in range(settings.n):
        rng = stream(settings.seed, "export", i)
        record = source.record(tasks[i % len(tasks)], i, rng)
        while record.given:                         # a file cannot say that a picture is not to be learned
            record = source.record("mixed", i, rng)
        paths = [f"pictures/{i:05d}{f'-{number}' if number else ''}.png" for number in range(len(record.pictures))]
        for path, picture in zip(paths, record.pictures, strict=True):
            Image.fromarray(picture).save(folder / path)
        said = [{"from": who, "value": text} for turn in record.turns for who, text in zip(("human", "gpt"), turn,
                                                                                           strict=True)]
        image = paths if len(paths) > 1 else paths[0]
        lines.append(json.dumps({"id": f"{i:05d}", "image": image, "conversations": said}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{settings.n} records in {folder / 'train.jsonl'}")


@dataclass(frozen=True)
class Index:
    """Write down where each record of a data set lies (PATH.index.npy), so that any of them is found at once. Bad ones
    are left out and listed in PATH.bad.txt."""

    POSITIONAL = ("paths",)
    paths: tuple = opt((), "data sets, as for train.py")
    out: str = opt("", "index to write, FILE.index.npy, which train.py --data takes, too; empty: beside the data")


def index(settings):
    """Index each data set, and say what was found."""
    if not settings.paths or (settings.out and settings.paths[1:]):
        raise InputError("index needs a data set, just one with --out: python data.py index train.jsonl")
    for path in settings.paths:
        if path.endswith(datasets.INDEX):
            raise InputError(f"{path} is an index already: train.py --data takes it")
        started = time.time()
        stored, count = datasets.store_index(path, settings.out)
        mixed = f", {count['mixed']} mixed" if count["mixed"] else ""
        print(f"{stored}: {count['gen']} records to draw, {count['und']} to answer{mixed}, "
              f"{time.time() - started:.1f} s")


@dataclass(frozen=True)
class Encode:
    """Run all pictures of a data set through the frozen towers once; `train.py --encoded FOLDER` then reads the result.
    The same command goes on where it was stopped. Under torchrun every process takes a share."""

    POSITIONAL = ("folder",)
    folder: str = opt("", "folder to write")
    data: str = opt("", "a data set, as for train.py")
    init: str = opt("", "model whose towers encode, as for train.py")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model of --init")
    image_size: int = opt(0, "Emu3: as for train.py")
    features: bool = opt(False, "also what SigLIP makes of pictures in questions (Janus-Pro; 2.4 MB a picture)")
    on_bad_record: str = opt("stop", "what to do with a record that cannot be used", ("stop", "skip"))
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")


def encode(settings):
    """Write RANK-NUMBER.safetensors with what the folder does not hold yet."""
    if not (settings.folder and settings.data and settings.init):
        raise InputError("encode needs a folder, --data and --init: "
                         "python data.py encode FOLDER --data train.jsonl --init Janus-Pro-7B")
    folder, device = Path(settings.folder), device_of(settings.device)
    m = formats.weights.load(settings.init, torch.float32, device, settings.vision_tokenizer)
    janus = m.config.kind == "janus"
    if settings.image_size:
        m.config = drawn_at(settings.image_size, m.config)
    if settings.features and not janus:
        raise InputError("--features: Emu3 sees pictures as codes, there is no SigLIP; leave it out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder")
    source = datasets.FileSource(settings.data, m.config.kind, settings.on_bad_record)
    preparer = Preparer(m, None)

    @torch.inference_mode()
    def features(paths):
        pixels = preparer.seen(paths)["pixels"]
        return [one.clone() for one in m.vision(pixels.to(m.vision.pos_embed.device)).cpu()]
    folder.mkdir(parents=True, exist_ok=True)
    store = datasets.Encoded(folder, m, new=True)
    stop = settings.on_bad_record == "stop"
    # Janus-Pro needs codes of drawn pictures only.
    store.fill("codes", source, RECORD_TASKS, preparer.codes, stop, pictures_drawn if janus else None)
    if settings.features:
        # Features take the place of all pixels of a batch or of none, and a second look never has any.
        tasks = RECORD_TASKS if m.config.see == "codes" else aia.TASKS
        store.fill("features", source, tasks, features, stop, pictures_asked)
    if source.bad:
        print(datasets.bad_report(source.bad, [settings.data]))


COMMANDS = {"export": (Export, export), "index": (Index, index), "encode": (Encode, encode)}


def main(argv=None):
    command, settings = chosen(COMMANDS, "data.py", __doc__, argv)
    if command:
        command(settings)


if __name__ == "__main__":
    run_command(main)
