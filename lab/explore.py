"""An attention map to play with: one page that opens from disk. Choose a sample, a layer and a head, mark rows and
columns of the map, and see how the intensity of Eq. 1, the mean of what is marked, follows.

    python -m lab.explore runs/tiny-emu3-seed0 --out runs/tiny-emu3-seed0/explore.html
"""

import base64
import html
import io
import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aia
import data
import eval as evaluation
from formats.datasets import FileSource, parse_ratio
from formats.records import RECORD_TASKS, Record
from lab.maps import attention_maps, stretches
from parts.pictures import to_picture
from parts.plots import TASK_NAME
from parts.settings import InputError, aside, at_least, check_out, opt, parse, run_command, shortened, stream, tell
from parts.stories import story_about
from parts.world import draw_scenes

# Legend: H heads, T tokens, L layers; h maps of a layer and N blocks of tokens, as the page has them. In a short sample
# each token is a block.
TEMPLATE = Path(__file__).with_suffix(".html")
LARGEST = 5e6                                       # bytes of a page
KIND = TASK_NAME | {"mixed": "story"}


@dataclass(frozen=True)
class Explore:
    """Write one HTML page on which the attention maps of a run can be looked at and played with."""

    POSITIONAL = ("run",)
    run: str = opt("", "run folder of train.py, or with --data a folder or hub id of public weights")
    data: str = opt("", "data set of samples, as for train.py --data; empty: held-out scenes of the world")
    n: int = opt(3, "samples of each task, and as many stories if the run has learned conversations")
    tokens: int = opt(512, "rows of a map at most: those of longer samples are means over several tokens")
    heads: int = opt(8, "heads at most: of more, only their mean is kept")
    seed: int = opt(0, "draws the samples")
    device: str = opt("cpu", "cpu, cuda, cuda:1, mps")
    out: str = opt("explore.html", "HTML file to write; lab.report links to one in the run folder")


def explore(settings):
    """Write the page -> where it is, its size in bytes, its samples."""
    at_least(settings, {"n": 1, "tokens": 1, "heads": 1, "seed": 0})
    check_out(settings.out)
    m, text, run = evaluation.load_run(evaluation.ScoreWorld(checkpoint=settings.run, device=settings.device))
    chosen = usable(settings, m, text, run)
    samples = [sample_of(m, text, *one, settings.tokens) for one in chosen]
    folder = Path(settings.run)
    arms = []
    for name, model in evaluation.arms(folder, m) if run else [("public", m)]:
        label = evaluation.final_label(folder) if name == "after" else evaluation.LABEL[name]
        arms.append({"name": name, "label": label})
        for sample, (_, _, batch) in zip(samples, chosen, strict=True):
            sample["maps"][name] = packed(model, batch, sample["sizes"], settings.heads)
    asked = (run["aia_targets"], run["aia_variant"]) if run else ()
    content = {"layers": m.config.layers, "heads": m.config.heads if m.config.heads <= settings.heads else 1,
               "arms": arms, "names": TASK_NAME,
               "targets": {task: aia.targets(m.config.layers, task, *asked)[0].tolist() for task in aia.TASKS}}
    page, shown = fitting(folder.resolve().name, content, samples)
    with aside(settings.out) as part:
        part.write_bytes(page)
    left_out = f", {len(samples) - shown} more would not fit" if shown < len(samples) else ""
    print(f"{settings.out}: {shown} samples, {len(page) / 1e6:.1f} MB{left_out}")
    return {"out": settings.out, "bytes": len(page), "samples": shown}


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
class Told(data.Preparer):
    """Records -> Batch, whose samples are called by what is said in them, not by where they come from."""

    def batch(self, records, rngs=None, drop=0.0):
        said = [" ".join(part for turn in record.turns for part in turn).replace("<image>", " ") for record in records]
        return replace(super().batch(records, rngs, drop), origins=tuple(shortened(one, 100) for one in said))


def usable(settings, m, text, run):
    """[(kind, number, Batch of this one sample), ...] of all samples that AIA can use."""
    preparer = Told(m, text)
    if settings.data:
        source = FileSource(settings.data, m.config.kind)
        own = evaluation.FileBatches(source)
        found = {task: own.batches(preparer, task, settings.n, 1) for task in RECORD_TASKS if source.count(task)}
    else:
        world = evaluation.own_world(run, settings.run, "give the folder of a run that did, or --data FILE.jsonl")
        held_out = evaluation.HeldOut(world, settings.seed)
        found = {task: held_out.batches(preparer, task, settings.n, 1) for task in aia.TASKS}
        if parse_ratio(run["ratio"])[2]:
            found["mixed"] = [preparer.batch([story(world, settings.seed, i)]) for i in range(settings.n)]
    chosen = []
    for kind, batches in found.items():
        good = [batch for batch in batches if batch.aia_valid.any()]
        chosen += [(kind, number, batch) for number, batch in enumerate(good, 1)]
    if not chosen:
        raise InputError(f"{settings.data}: no sample has queries and a condition: give answers of several tokens, or "
                         "more samples with --n")
    return chosen


def story(world, seed, i):
    """The record of a story that begins with a held-out scene: a drawing, two edits, a question."""
    rng = stream(seed, "in turn", 5, i)             # 0 to 3 are those of eval.score_mixed, 4 that of lab.plans
    scene, _ = world.held_out_scene(world.skills[i % len(world.skills)], rng)
    told = story_about(world, scene, rng, "story")
    return Record(f"story {i}", "mixed", told.turns, tuple(draw_scenes(told.scenes, world.cell_side)))


def sample_of(m, text, kind, number, batch, most):
    """One sample as the page has it, JSON-ready, its maps still to come. A block has the tokens `sizes`, a name, and
    if it is of a picture, [number of the picture, first cell, last cell]."""
    length = batch.lengths[0]
    ids = batch.tokens[0, :length].tolist()
    marks = {task: (condition[0, :length], queries[0, :length]) for task, condition, queries, valid in zip(
        batch.tasks, *map(batch.per_task, (batch.condition, batch.queries, batch.aia_valid)), strict=True) if valid[0]}
    pictures, cells = [], [None] * length                                       # (picture, cell) of each token
    for at, (h, w), pixels in pictures_of(m, batch):
        drawn = "gen" in marks and marks["gen"][1][at].any().item()
        for cell, position in enumerate(at):
            cells[position] = len(pictures), cell
        pictures.append({"h": h, "w": w, "drawn": drawn, "png": png(pixels), "rows": []})
    same = [tuple(mask[i].item() for masks in marks.values() for mask in masks) + (cells[i] and cells[i][0],)
            for i in range(length)]
    sizes = blocks(same, most)
    ends = [*itertools.accumulate(sizes)]
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    parts = [cells[a] and [*cells[a], cells[b - 1][1]] for a, b in zip(starts, ends, strict=True)]
    for row, part in enumerate(parts):
        if part:
            pictures[part[0]]["rows"].append(row)
    names = [cell_name(part, pictures[part[0]]["w"]) if part else token_name(text, ids[a:b])
             for part, a, b in zip(parts, starts, ends, strict=True)]
    return {"title": f"{KIND[kind]} {number}: {batch.origins[0].strip()}", "number": number, "sizes": sizes,
            "names": names, "cells": parts, "pictures": pictures, "maps": {},
            "marks": {task: {"columns": condition[starts].tolist(), "rows": queries[starts].tolist()}
                      for task, (condition, queries) in marks.items()}}


def cell_name(part, w):
    """What a block [picture, first cell, last cell] of a picture w cells wide is called."""
    picture, *ends = part
    first, last = (f"{cell // w + 1} down, {cell % w + 1} across" for cell in ends)
    return f"picture {picture + 1}, cell {first}" + (f" to {last}" if last != first else "")


def token_name(text, ids):
    """What a block of other tokens is called: control tokens by their role, if they have one."""
    control = {i: token for token, i in text.control.items()} | {i: f"<{role}>" for role, i in text.ids.items()}
    said = "".join(control.get(i) or text.decode([i]) for i in ids).replace("\n", "↵")
    return f"“{shortened(said, 40)}”"


def blocks(same, most):
    """Sizes of the blocks in which T tokens are kept: as small as possible with at most so many blocks. Neighbours
    share one only if `same` (T,) is the same for both: a block is marked as a whole, and lies in one picture."""
    alike = [len([*group]) for _, group in itertools.groupby(same)]
    for size in range(1, len(same) + 1):
        sizes = [min(size, n - first) for n in alike for first in range(0, n, size)]
        if len(sizes) <= most:
            return sizes
    raise InputError(f"--tokens {most}: a sample changes between text and picture more often, give at least "
                     f"{len(alike)}")


def pictures_of(m, batch):
    """Pictures of one sample in the order of its tokens: [(positions of its cells, (h, w), pixels as uint8), ...]."""
    tokens, device = batch.tokens[0], next(m.parameters()).device

    def decoded(codes):
        return to_picture(m.decode_images(codes[None].to(device))[0])
    found = []
    if m.config.kind == "emu3":
        codes = tokens - m.ids["visual"]
        places = []
        for first, last in stretches((codes >= 0) & (codes < m.config.codebook)):
            if not places or first != places[-1][-1] + 2:       # else a further row, behind a row end
                places.append([])
            places[-1] += range(first, last + 1)
        for at in places:
            h = at[-1] - at[0] + 1 - len(at) + 1                # row ends between rows, and one
            found.append((at, (h, len(at) // h), decoded(codes[at].reshape(h, -1))))
        return found
    # Janus-Pro draws codes and sees pixels; both stand in the batch, in the order of the tokens.
    codes, seen = iter(() if batch.codes is None else batch.codes), iter(() if batch.pixels is None else batch.pixels)
    for first, last in stretches(tokens == m.ids["placeholder"]):
        drawn = batch.task == "gen" if batch.drawn is None else batch.drawn[0, first]
        side = round((last + 1 - first) ** 0.5)
        pixels = decoded(next(codes)) if drawn else to_picture(next(seen))
        found.append((list(range(first, last + 1)), (side, side), pixels))
    return found


def png(pixels):
    """A picture (H, W, 3) uint8 as an address that holds it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------
def packed(m, batch, sizes, heads):
    """All maps of one sample as base64 of 16-bit numbers: (L, h, N (N + 1) / 2), rows without what comes later.

    A block pays the mean of its queries' attention, and gets the sum over its keys: rows still add up to 1. Kept is the
    square root, which is also what is drawn: rounded to s = 1/65535, the sum over K keys is off by at most
    s sqrt(K) (Cauchy and Schwarz), 4e-4 for 512. Rounded as they are, many small weights would vanish together.
    """
    length = batch.lengths[0]
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))     # (T,)
    member = torch.nn.functional.one_hot(block).float()                         # (T, N)
    mean = (member / torch.tensor(sizes)).T                                     # (N, T)

    def smaller(attention):
        attention = attention[0, :, :length, :length]                           # (H, T, T)
        if len(attention) > heads:
            attention = attention.mean(0, keepdim=True)                         # (1, T, T)
        return mean @ attention @ member                                        # (h, N, N)
    maps = torch.stack(attention_maps(m, batch, smaller)).numpy()               # (L, h, N, N)
    row, column = np.tril_indices(len(sizes))
    return base64.b64encode(np.rint(np.sqrt(maps[..., row, column]) * 65535).astype("<u2").tobytes()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------
def fitting(title, content, samples):
    """The page with as many samples of each kind as fit -> bytes, number of samples."""
    for n in range(max(sample["number"] for sample in samples), 0, -1):
        shown = [sample for sample in samples if sample["number"] <= n]
        page = page_of(title, content | {"samples": shown}).encode()
        if len(page) <= LARGEST:
            return page, len(shown)
    raise InputError(f"a page with one sample of each kind has {len(page) / 1e6:.1f} MB, more than "
                     f"{LARGEST / 1e6:.0f}: give --heads 1, or fewer --tokens")


def page_of(title, content):
    """The template with title and data in place. Text of users may hold anything: in the title it is escaped, and data
    without any "<" cannot end the script element that they stand in."""
    values = {"title": html.escape(title), "data": json.dumps(content).replace("<", "\\u003c")}
    return re.sub("{{(title|data)}}", lambda mark: values[mark[1]], TEMPLATE.read_text(encoding="utf-8"))


def main(argv=None):
    tell(explore(parse(Explore, argv, "python -m lab.explore")))


if __name__ == "__main__":
    run_command(main)
