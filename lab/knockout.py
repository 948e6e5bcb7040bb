"""Does attention mass mean use? AIA moves the share of attention that each layer spends on the other modality (Eq. 1).
Here that attention is cut, in one layer at a time and in all: do scores fall where the mass is high?

What is cut has scores of -inf before the softmax, so that the keys which are left share its attention:

    condition   the keys that Eq. 1 counts
    first       the first token of the sequence only: it draws much attention and says little (a sink)
    rest        the condition without it

The condition of understanding is the picture, which has no first token: there is only the first way.

    python -m lab.knockout runs/tiny-emu3-seed0 runs/tiny-janus-seed0 --out knockout.json
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import aia
import data
import eval as evaluation
from formats.records import Record, conversation
from lab.figures import correlation
from lab.plans import blind, opened_run
from parts.pictures import to_picture
from parts.settings import InputError, at_least, check_out, machine, opt, parse, run_command, stream, tell, write_json
from parts.world import combinations, draw_scenes, held_out_questions, prompt_text, read_scenes

# Legend: B samples, T tokens, L layers.
MASS = {"condition": "intensity", "first": "sink", "rest": "without_first_token"}       # what is cut, and its Eq. 1
AT_ONCE = 128                                   # as many prompts or questions as eval.py takes together


@dataclass(frozen=True)
class Knockout:
    """Cut the attention on the condition layer by layer: do scores fall where the attention mass is high?"""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders that have learned the built-in world")
    n: int = opt(60, "prompts for each skill, and pictures for each topic of questions")
    seed: int = opt(0, "draws prompts and questions, as in eval.py score")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = opt("knockout.json", "JSON file to write")
    part: tuple = opt(tuple(MASS), "what is cut, one after the other: condition, first, rest")


def knockout(settings):
    """All runs, one after the other -> {run: correlations of mass and fall}."""
    at_least(settings, {"n": 1, "seed": 0})
    check_out(settings.out)
    if unknown := [part for part in settings.part if part not in MASS]:
        raise InputError(f"--part {unknown[0]} is unknown: use {', '.join(MASS)}")
    if not settings.runs:
        raise InputError("knockout needs run folders: python -m lab.knockout runs/tiny-emu3-seed0")
    opened = {run: opened_run(run, settings.device) for run in settings.runs}
    rows = {}
    for run, one in opened.items():
        rows[run] = knockout_of(*one, settings)
        print_knockout(run, rows[run])
    write_json({"runs": rows, "n": settings.n, "seed": settings.seed, "machine": machine()}, settings.out)
    return {run: row["correlation"] for run, row in rows.items()}


def knockout_of(m, text, world, settings):
    """All measurements of one run, JSON-ready."""
    preparer = data.Preparer(m, text, training=False)
    asked = list(held_out_questions(world, settings.n, stream(settings.seed, "questions")))
    closed = [one for one in asked if one[0] in world.topics]
    several = [one for one in asked if one[0] == "open" and len(text.encode(one[3].answer)) > 1]
    pictures = [part for part in settings.part if part == "condition"]
    scores, mass = {}, {}

    right, records = drawings(preparer, world, settings.n, stream(settings.seed, "prompts"))
    scores["gen"] = layer_by_layer(m, right, settings.part)
    mass["gen"] = mass_of(preparer, records)
    right, records = answers_to(preparer, world, closed, last=True)
    scores["und"] = layer_by_layer(m, right, pictures)
    mass["und"] = mass_of(preparer, records)
    mass["und_first_word"] = mass_of(preparer, records, first_word)
    if several:                                     # a tokenizer may have one token for each answer
        right, records = answers_to(preparer, world, several, last=False)
        scores["und_answers"] = layer_by_layer(m, right, pictures)
        mass["und_answers"] = mass_of(preparer, records)

    related = {}
    for name, shares in mass.items():
        score = scores["und" if name == "und_first_word" else name]
        falls = {part: [score["plain"] - score[part][str(layer)] for layer in range(m.config.layers)]
                 for part in MASS if part in score}
        related[name] = {part: correlation(shares[MASS[part]], fall) for part, fall in falls.items()}
    return scores | {"mass": mass, "correlation": related}


def layer_by_layer(m, right, parts):
    """right(part, layers) -> share: with nothing cut, and with each part cut in each layer, and in all of them."""
    layers = range(m.config.layers)
    found = {"plain": right("condition", ())}
    for part in parts:
        found[part] = {str(layer): right(part, [layer]) for layer in layers} | {"all": right(part, layers)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is cut
# ---------------------------------------------------------------------------------------------------------------------
def columns(samples, task, part, device):
    """Prompts as pieces -> those of their columns that are cut, (B, T) bool, padded in front."""
    roles = [[([role] * len(ids), role) for ids, role in pieces] for pieces in samples]
    roles, _ = evaluation.left_padded(roles, data.PADDING, device)              # (B, T)
    condition, _ = data.spans(roles, task)
    first = (roles != data.PADDING).cumsum(1) == 1                              # (B, T)
    return {"condition": condition, "first": first, "rest": condition & ~first}[part]


def rows_of(preparer, prompts):
    """Prompts -> pieces of each row that m.generate_images runs. With guidance every other row is without the prompt,
    and is cut alike: otherwise guidance would also push the picture towards what the cut does."""
    template, c = preparer.template, preparer.config
    samples = [template.prompt(prompt + c.suffix, c.grid) for prompt in prompts]
    if c.guidance == 1:
        return samples
    # Janus-Pro blanks the prompt, token by token: the same columns.
    return [row for pieces in samples
            for row in (pieces, template.prompt(c.negative, c.grid) if c.kind == "emu3" else pieces)]


# ---------------------------------------------------------------------------------------------------------------------
# What is scored
# ---------------------------------------------------------------------------------------------------------------------
def drawings(preparer, world, n, rng):
    """n held-out prompts of each skill, drawn as in eval.score_generation -> right(part, layers), the share of right
    pictures, and the records with their right pictures.

    Cut are the rows from the first code on, row ends too, since these predict codes. What predicts the first code is no
    query of Eq. 1 and sees the prompt, and so do the tags before it, which stay in sight: even with all layers cut, the
    prompt is not out of reach.
    """
    m, device = preparer.m, next(preparer.m.parameters()).device
    items = [world.held_out_scene(skill, rng) for skill in world.skills for _ in range(n)]
    prompts = [prompt_text(goal, rng) for _, goal in items]
    pictures = draw_scenes([scene for scene, _ in items], world.cell_side)

    def right(part, layers):
        drawn = []
        for start in range(0, len(prompts), AT_ONCE):
            some = prompts[start:start + AT_ONCE]
            with blind(m, layers, columns(rows_of(preparer, some), "gen", part, device)):
                drawn += map(to_picture, evaluation.draw(m, preparer.text, some, temperature=0))
        scenes, clear = read_scenes(np.stack(drawn), world)
        return float(np.mean([bool(ok) and goal in combinations(scene)
                              for (_, goal), scene, ok in zip(items, scenes, clear, strict=True)]))
    return right, [Record("", "gen", ((prompt, "<image>"),), (picture,))
                   for prompt, picture in zip(prompts, pictures, strict=True)]


def answers_to(preparer, world, asked, last):
    """Questions of parts.world.held_out_questions, asked as in eval.score_understanding -> right(part, layers), the
    mean over measures of the share of right answers, and the records with their right answers.

    Eq. 1's queries are answer tokens, none of which predicts the first word; that is done by the last token of the
    prompt, which is cut too if `last`. The tokens of the question before it still see the picture.
    """
    m = preparer.m
    pictures = draw_scenes([scene for _, _, scene, _ in asked], world.cell_side)
    questions = [conversation([(question.text, None)], (picture,))
                 for (_, _, _, question), picture in zip(asked, pictures, strict=True)]
    batches = [evaluation.ask(preparer, questions[start:start + AT_ONCE])
               for start in range(0, len(questions), AT_ONCE)]

    def right(part, layers):
        said = []
        for samples, ids, mask, seen in batches:
            with blind(m, layers, columns(samples, "und", part, ids.device), last):
                new = m.generate_text(ids, seen.get("pixels"), mask, max_new_tokens=8)
            said += [preparer.text.decode(row).strip() for row in new.tolist()]
        found = {}                                                              # {measure: [right or not]}
        for (measure, _, _, question), words in zip(asked, said, strict=True):
            found.setdefault(measure, []).append(words == question.answer)
        return float(np.mean([np.mean(some) for some in found.values()]))
    return right, [Record("", "und", ((question.text, question.answer),), (picture,))
                   for (_, _, _, question), picture in zip(asked, pictures, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Attention mass
# ---------------------------------------------------------------------------------------------------------------------
def mass_of(preparer, records, change=lambda batch: batch):
    """Eq. 1 of records, with their stored answers: on each of what is cut, {name: (L,)}."""
    task = records[0].task
    batches = [change(preparer.batch(records[start:start + 25])) for start in range(0, len(records), 25)]
    row = evaluation.measure(preparer.m, batches, task, *aia.targets(preparer.config.layers, task))
    return {name: row[name] for name in MASS.values()}


def first_word(batch):
    """A batch that asks for the attention of what predicts the first word of an answer, the prompt's last token."""
    following = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)                # (B, T)
    return replace(batch, queries=(following != -100) & ~batch.queries, rectangle=())


def print_knockout(run, row):
    """One run for the terminal: a table of layers for each score and part of the prompt."""
    print(run)
    for name, related in row["correlation"].items():
        score = row["und" if name == "und_first_word" else name]
        for part, value in related.items():
            print(f"  {name}, {part}: right {score['plain']:.2f}, correlation of mass and fall "
                  + ("none" if value is None else f"{value:+.2f}"))
            print("    layer       " + "".join(f"{layer:>6}" for layer in score[part]))
            print("    attention   " + "".join(f"{share:6.2f}" for share in row["mass"][name][MASS[part]]))
            print("    right if cut" + "".join(f"{share:6.2f}" for share in score[part].values()))


def main(argv=None):
    tell(knockout(parse(Knockout, argv, "python -m lab.knockout")))


if __name__ == "__main__":
    run_command(main)
