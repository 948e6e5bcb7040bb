"""How far text and picture agree in each layer (UniFork, arXiv 2506.17202, Sec. 3.1).

A caption and its picture are aligned if they have the same neighbours: among n captions, and among n pictures.

    python -m lab.alignment --checkpoint runs/tiny-emu3-seed0
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import aia
import data
from eval import Loaded, load_run, own_world
from formats.datasets import FileSource, every
from formats.records import Record
from parts.plots import COLOUR, TASK_NAME, canvas, save_figure
from parts.settings import InputError, opt, parse, run_command, stream, tell, write_json
from parts.world import DESCRIBE, describe, draw_scenes

# Legend: n pairs of caption and picture, B of them in a batch, T tokens, C channels, L layers.
NEIGHBOURS = (10, 5, 20)                             # the measure comes first, the others show what k does
RESAMPLES = 1000
ORDER = {"gen": "generation: caption, then picture", "und": "understanding: picture, then caption"}


@dataclass(frozen=True)
class Alignment(Loaded):
    """UniFork's measure: do pictures and captions have the same neighbours, layer by layer? Attention is causal: tokens
    have seen those before them, and none after."""

    data: str = opt("", "data set of drawing records (picture and caption); empty: held-out scenes of the world")
    n: int = opt(1024, "pairs of picture and caption, all different; the easiest world has about 450")
    seed: int = opt(0, "draws the pairs and the bootstrap")
    out: str = opt("", "PNG file, its numbers beside it as JSON; empty: alignment.png in the run folder, or here")


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of picture and caption, and where they are in a sample
# ---------------------------------------------------------------------------------------------------------------------
def different_pairs(settings, kind, run):
    """Up to n pairs (picture, caption), none twice: equal pairs would be neighbours in both spaces from the start."""
    if settings.data:
        records = every(FileSource(settings.data, kind), "gen")
        found = ((record.turns[0][0], record.pictures[0]) for record in records)
    else:
        rng = stream(settings.seed, "pairs")
        world = own_world(run, settings.checkpoint, "alignment needs --data FILE.jsonl with drawing records")
        scenes = (world.held_out_scene(world.skills[i % len(world.skills)], rng)[0] for i in range(20 * settings.n))
        found = ((describe(scene), scene) for scene in scenes)
    pairs = []
    seen = set()
    for caption, picture in found:
        if len(pairs) >= settings.n:
            break
        if caption.strip() and not {caption, picture} & seen:
            seen |= {caption, picture}
            if isinstance(picture, tuple):           # a scene
                picture = draw_scenes([picture], world.cell_side)[0]
            pairs.append((picture, caption))
    if len(pairs) <= max(NEIGHBOURS) + 1:
        raise InputError(f"{len(pairs)} different pairs of picture and caption are too few for {max(NEIGHBOURS)} "
                         "neighbours: give more drawing records, or a larger --n")
    return pairs


def caption_tokens(preparer, caption):
    """First token and end of a caption in the first piece of its prompt: the fewest tokens that hold all of its
    words."""
    own = preparer.template.prompt(caption, (1, 1))[0][0]
    text = preparer.text
    words = text.decode(text.encode(caption.strip())).strip()
    if not words or words not in text.decode(own):
        raise InputError(f"the caption {caption[:60]!r} is not found in its prompt: leave its record out")
    start, end = 0, len(own)
    while words in text.decode(own[start + 1:]):
        start += 1
    while words in text.decode(own[start:end - 1]):
        end -= 1
    return start, end


def pair_batch(preparer, pairs, task):
    """Pairs (picture, caption) -> Batch, and masks of the captions' words and of the pictures, (B, T) bool each.
    Template, tags, row ends and EOS belong to neither."""
    records = []
    for picture, caption in pairs:
        turn = (caption, "<image>") if task == "gen" else (DESCRIBE, caption)
        records.append(Record("a pair", task, (turn,), (picture,)))
    samples, pictures = preparer.pieces(records)
    kept = torch.ones(len(samples), dtype=torch.bool)
    batch = data.collate(task, samples, kept, preparer.text.ids["pad"], **pictures)
    words, image = torch.zeros(2, *batch.tokens.shape, dtype=torch.bool)        # (B, T) each
    for i, pieces in enumerate(samples):
        roles = torch.tensor([role for ids, role in pieces for _ in ids])
        image[i, :len(roles)] = roles == (data.DRAWN if task == "gen" else data.IMAGE)
        if task == "gen":
            start, end = caption_tokens(preparer, pairs[i][1])
            words[i, start:end] = True
        else:
            words[i, :len(roles) - 1] = roles[:-1] == data.ANSWER               # without EOS
    return batch, words, image


# ---------------------------------------------------------------------------------------------------------------------
# The measure
# ---------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def pooled(m, preparer, pairs, task):
    """Mean hidden state of caption and of picture tokens after each layer (the embedding is layer 0), (L + 1, n, C)
    each. The caption comes first in generation, the picture in understanding; what comes later has seen it."""
    device = next(m.parameters()).device
    sides = [], []                                                              # caption, picture
    for first in range(0, len(pairs), 16):
        batch, *masks = pair_batch(preparer, pairs[first:first + 16], task)
        states = m(batch.to(device), intensity=False, hidden=True).hidden       # L + 1 of (B, T, C)
        for side, mask in zip(sides, masks, strict=True):
            mask = mask.to(device).float()
            mean = [(mask[:, None] @ x.float())[:, 0] / mask.sum(1, keepdim=True) for x in states]
            side.append(torch.stack(mean).cpu())                                # (L + 1, B, C)
    return [torch.cat(side, 1) for side in sides]


def mutual_neighbours(a, b, k):
    """Share of the k nearest others (by cosine) that a point has in common in both spaces: a, b (n, C) -> (n,)."""
    near = []
    for x in (a, b):
        x = torch.nn.functional.normalize(x, dim=1)
        near.append((x @ x.T).fill_diagonal_(-2).topk(k, dim=1).indices)        # (n, k)
    return (near[0][:, :, None] == near[1][:, None]).any(2).float().mean(1)


def scores_of(words, image, weights, order):
    """Pooled captions and pictures, (L + 1, n, C) each -> {name: {k: value of each layer}}: score, both ends of its
    95 % interval, and the score when picture i belongs to caption order[i].

    weights (R, n): how often each of R bootstrap samples holds a pair, divided by n.
    """
    ends = torch.tensor([0.025, 0.975])
    rows = {"score": {}, "low": {}, "high": {}, "shuffled": {}}
    for k in NEIGHBOURS:
        each = torch.stack([mutual_neighbours(a, b, k) for a, b in zip(words, image, strict=True)])         # (L + 1, n)
        apart = torch.stack([mutual_neighbours(a, b[order], k) for a, b in zip(words, image, strict=True)])
        low, high = (each @ weights.T).quantile(ends, dim=1)                                                # (L + 1,)
        for name, values in (("score", each.mean(1)), ("low", low), ("high", high), ("shuffled", apart.mean(1))):
            rows[name][k] = values.tolist()
    return rows


def alignment(settings):
    """Write alignment.png and alignment.json: score per layer, with 95 % bootstrap intervals over pairs, beside chance
    and shuffled pairs (UniFork, Sec. 3.1; definition after Huh et al. 2024)."""
    m, text, run = load_run(settings)
    out = Path(settings.out or (Path(settings.checkpoint) / "alignment.png" if run else "alignment.png"))
    if not out.parent.is_dir() or out.suffix != ".png":
        raise InputError(f"--out {out} cannot be written: give a file in an existing folder that ends in .png")
    pairs = different_pairs(settings, m.config.kind, run)
    n = len(pairs)
    rng = np.random.default_rng(settings.seed)
    weights = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)).float() / n       # (R, n)
    shuffled = torch.from_numpy(rng.permutation(n))
    order = shuffled.roll(1)[shuffled.argsort()]     # one long cycle: no pair stays together
    preparer = data.Preparer(m, text)
    result = {"n": n, "chance": {k: k / (n - 1) for k in NEIGHBOURS}}
    k = NEIGHBOURS[0]
    for task in aia.TASKS:
        rows = result[task] = scores_of(*pooled(m, preparer, pairs, task), weights, order)
        by_layer = " ".join(f"{value:.3f}" for value in rows["score"][k])
        print(f"{ORDER[task]}; alignment of {n} pairs, k = {k}, by layer {by_layer}; shuffled "
              f"{np.mean(rows['shuffled'][k]):.3f}, chance {result['chance'][k]:.3f}")
    plot_alignment(result, out)
    write_json(result, out.with_suffix(".json"))
    print(f"{out} and {out.with_suffix('.json')}")
    return {task: result[task]["score"][k] for task in aia.TASKS}


def plot_alignment(result, file):
    """Alignment of both tasks over layers; in a second panel with fewer and with more neighbours."""
    first, *others = NEIGHBOURS
    figure, panels = canvas([f"{result['n']} pairs, {first} neighbours",
                             f"{' (dashed) and '.join(map(str, others))} (dash-dotted) neighbours"],
                            "alignment of text and picture", "layer (0: embedding)", None)
    for task in aia.TASKS:
        for k, line in zip(NEIGHBOURS, ("-", "--", "-."), strict=True):
            panel = panels[int(k != first)]
            mean, low, high = (np.array(result[task][name][k]) for name in ("score", "low", "high"))
            panel.errorbar(range(len(mean)), mean, np.array([mean - low, high - mean]).clip(0), fmt=line, marker="o",
                           color=COLOUR[task], markersize=4, capsize=2, label=ORDER[task] if k == first else None)
        panels[0].plot(result[task]["shuffled"][first], color=COLOUR[task], linewidth=0.8, linestyle="--",
                       label=f"{TASK_NAME[task]}, pairs shuffled")
    panels[0].axhline(result["chance"][first], color="black", linewidth=0.8, linestyle=":", label="chance")
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("Attention is causal: what comes later in a task has seen what came before.", fontsize=9)
    save_figure(figure, panels, file)


def main(argv=None):
    tell(alignment(parse(Alignment, argv, "python -m lab.alignment")))


if __name__ == "__main__":
    run_command(main)
