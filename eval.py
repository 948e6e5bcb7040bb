"""How a trained model is scored: pictures from prompts, answers about pictures, scores, and the curves of the paper.

The scene reader of parts/world.py reads drawn pictures, which are scored in GenEval's six skills; answers are scored in
the manner of POPE, MME and MMBench. Everything is asked about held-out combinations.

    python eval.py score    --checkpoint runs/tiny-emu3-seed0
    python eval.py generate --checkpoint runs/tiny-emu3-seed0 --prompt "a red circle above a blue square" --out red.png
    python eval.py chat     --checkpoint runs/tiny-emu3-seed0 --image red.png --question "is there a circle?"
    python eval.py generate --checkpoint runs/tiny-mixed-seed0 --image red.png --prompt "make the circle blue"
    python eval.py curves   --checkpoint runs/tiny-emu3-seed0
    python eval.py check    Janus-Pro-7B              # does this code read a folder of public weights rightly?
    python eval.py score pope --data POPE --preds answers.jsonl --out scores/pope

The runs come from train.py: python train.py, and for conversations python train.py --preset tiny-mixed. Flags of a
command: python eval.py generate --help
"""

from parts.installed import missing  # noqa: F401  before what may be missing

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aia
import data
import formats.weights
from formats import checkpoints
from formats.datasets import FileSource, parse_ratio
from formats.records import Record, conversation, first_question
from parts import settings
from parts.decoding import finite
from parts.pictures import Drawn, grid_for, load_picture, picture_form, to_picture, to_tensor
from parts.plots import LABEL, WITHOUT, check_figure, label_of, plot_curves
from parts.settings import InputError, aside, opt, read_json, shortened, stream, write_json
from parts.stories import EDITS, MEND, PLAN, RIGHT, edits, held_out_edit, pick, rated
from parts.terminal import Typist, converse
from parts.text import TOKENIZERS, Text
from parts.world import (
    combinations,
    describe,
    draw_scenes,
    held_out_questions,
    make_question,
    prompt_text,
    questions_about,
    read_scenes,
    world_of,
)

# Legend: B samples, T tokens, L layers; scores are shares in 0..1.


# ---------------------------------------------------------------------------------------------------------------------
# Asking the model
# ---------------------------------------------------------------------------------------------------------------------
def left_padded(samples, pad, device):
    """Pieces of each prompt -> ids (B, T) and mask (B, T), padded in front."""
    rows = [[i for ids, _ in pieces for i in ids] for pieces in samples]
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def draw(m, text, prompts, seed=0, guidance=None, temperature=1.0, size=None, negative=None, batch=128, roles="tags"):
    """Prompts -> pixels (n, 3, S, S), nominally [-1, 1], on the CPU. Same seed, prompts and batch, same pictures.
    roles "plain": words for the role tags of Janus-Pro (JanusTemplate.plain)."""
    generator = torch.Generator(next(m.parameters()).device).manual_seed(seed)
    pixels = []
    for start in range(0, len(prompts), batch):
        codes = draw_codes(m, text, prompts[start:start + batch], generator, guidance, temperature, size, negative,
                           roles)
        pixels.append(m.decode_images(codes).cpu())
        finite(pixels[-1])
    return torch.cat(pixels)


def draw_codes(m, text, prompts, generator=None, guidance=None, temperature=1.0, size=None, negative=None,
               roles="tags"):
    """Prompts -> codes as m.generate_images gives them. negative None: the model's own negative prompt."""
    template = data.TEMPLATES[m.config.kind](m.config, text, training=False)
    device = next(m.parameters()).device
    if roles == "plain":
        template.plain()
    size = size or m.config.grid
    away = None
    if m.config.kind == "emu3" and guidance != 1:
        away = template.prompt(m.config.negative if negative is None else negative, size)
        away = left_padded([away], text.ids["pad"], device)[0]
    elif negative:
        raise InputError("a negative prompt acts in Emu3 with guidance only: leave it out")
    pieces = [template.prompt(prompt + m.config.suffix, size) for prompt in prompts]
    ids, mask = left_padded(pieces, text.ids["pad"], device)
    return m.generate_images(ids, mask, size, away, guidance, temperature, generator=generator)


def answer(m, text, asked, max_new_tokens=16, temperature=0.0, batch=128):
    """Questions [(picture, question)] -> answers. A picture is a path or an array (S, S, 3) uint8."""
    preparer = data.Preparer(m, text, training=False)
    answers = []
    for start in range(0, len(asked), batch):
        records = [conversation([(question, None)], (picture,)) for picture, question in asked[start:start + batch]]
        ids, mask, pictures = ask(preparer, records)[1:]
        new = m.generate_text(ids, pictures.get("pixels"), mask, max_new_tokens, temperature)
        answers += [text.decode(row).strip() for row in new.tolist()]
    return answers


def ask(preparer, records, dropped=None):
    """Conversations -> pieces of each, and what generation takes: ids (B, T), mask (B, T), and fields of a Batch that
    Janus-Pro has besides. dropped: as in Preparer.pieces."""
    device = next(preparer.m.parameters()).device
    samples, pictures = preparer.pieces(records, dropped)
    ids, mask = left_padded(samples, preparer.text.ids["pad"], device)
    return samples, ids, mask, {name: value.to(device) for name, value in pictures.items() if value is not None}


def reply(m, text, records, guidance=1.0, size=None, batch=64, watch=None, **limits):
    """Conversations, mixed ones too, that end with a None answer -> their answers: [text or parts.pictures.Drawn, ...].
    guidance other than 1: towards what is said. watch, limits: as in m.generate."""
    if len(records) > batch:
        parts = [records[start:start + batch] for start in range(0, len(records), batch)]
        return [one for part in parts for one in reply(m, text, part, guidance, size, batch, watch, **limits)]
    preparer = data.Preparer(m, text, training=False)
    guided = guidance != 1                          # each conversation, and the same without its words
    records = [replace(record, task="mixed") for record in records for _ in range(1 + guided)]
    samples, ids, mask, pictures = ask(preparer, records, [guided and i % 2 == 1 for i in range(len(records))])
    drawn = [[([role in (data.DRAWN, data.GIVEN)] * len(part), role) for part, role in pieces] for pieces in samples]
    size = size or m.config.grid
    said = m.generate(ids, mask=mask, drawn=left_padded(drawn, False, ids.device)[0], guidance=guidance, size=size,
                      opening=preparer.template.opening(*size), watch=watch, **pictures, **limits)
    return finished(m, text, said)


def finished(m, text, answers):
    """What m.generate gave, token ids and codes, as [text or Drawn, ...] of each row."""
    codes = [part for parts in answers for part in parts if torch.is_tensor(part)]
    device = next(m.parameters()).device
    decoded = iter(m.decode_images(torch.stack(codes).to(device)) if codes else ())
    return [[text.decode(part).strip() if isinstance(part, list) else Drawn(part, to_picture(next(decoded)))
             for part in parts] for parts in answers]


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
def score_understanding(m, text, world, n, seed=0):
    """Plain accuracy per question topic on n held-out pictures each, and the stricter measures of the three benchmarks
    -> scores, samples: one answer of each topic, (question, picture, said, right).

    existence  yes/no, balanced; f1 with "yes" as positive (POPE)
    count, position, colour  a true and a false yes/no question about each picture; acc+ wants both right (MME); open is
               the accuracy on questions without yes or no ("how many circles are there?")
    choice     four options; circular wants the right letter under all four rotations (MMBench)
    und_chance  what the best constant answer to each topic gets
    """
    asked = [(measure, number, draw_scenes([scene], world.cell_side)[0], question) for measure, number, scene, question
             in held_out_questions(world, n, stream(seed, "questions"))]
    said = answer(m, text, [(picture, question.text) for _, _, picture, question in asked], max_new_tokens=8)
    right = {}                                                                  # {measure: {number: [right or not]}}
    for (measure, number, _, question), words in zip(asked, said, strict=True):
        right.setdefault(measure, {}).setdefault(number, []).append(words == question.answer)
    plain = {measure: float(np.mean(sum(groups.values(), []))) for measure, groups in right.items()}
    strict = {measure: float(np.mean([all(group) for group in groups.values()])) for measure, groups in right.items()}
    topics = {topic: plain[topic] for topic in world.topics}
    pairs = [(words == "yes", question.answer == "yes") for (measure, _, _, question), words
             in zip(asked, said, strict=True) if measure == "existence"]
    hits = sum(claimed and true for claimed, true in pairs)
    circular = [all(right["choice"][number] + turned) for number, turned in right["turned"].items()]
    answers = [[question.answer for measure, *_, question in asked if measure == topic] for topic in topics]
    chance = np.mean([max(map(some.count, some)) / len(some) for some in answers])
    rows = zip(asked, said, strict=True)
    samples = {measure: (question.text, picture, words, words == question.answer)
               for (measure, _, picture, question), words in rows if measure in (*topics, "open")}
    return {"und": float(np.mean(list(topics.values()))), "und_by_topic": topics, "und_chance": float(chance),
            "f1": 2 * hits / max(sum(map(sum, pairs)), 1),
            "acc_plus": float(np.mean([strict[topic] for topic in ("count", "position", "colour")])),
            "circular": float(np.mean(circular)), "open": plain["open"]}, [*samples.values()]


def score_generation(m, text, world, n, seed=0):
    """One guided picture, of the likeliest codes, for each of n held-out prompts per skill, read back from its pixels
    -> scores, samples: two prompts of each skill that ask for different things, (prompt, picture, "", right).
    gen_chance: share that shows what a prompt drawn at random asks for."""
    rng = stream(seed, "prompts")
    goals = [world.held_out_scene(skill, rng)[1] for skill in world.skills for _ in range(n)]
    prompts = [prompt_text(goal, rng) for goal in goals]
    pictures = np.stack([to_picture(pixels) for pixels in draw(m, text, prompts, temperature=0)])
    scenes, clear = read_scenes(pictures, world)
    right = [bool(ok) and goal in combinations(scene)
             for goal, scene, ok in zip(goals, scenes, clear, strict=True)]
    skills = by_part(right, world.skills)
    chance = rated(lambda i, other: bool(clear[i]) and goals[other] in combinations(scenes[i]), len(goals))["chance"]
    samples = []
    for start in range(0, len(goals), n):
        some = {goals[i]: i for i in reversed(range(start, start + n))}         # the first with each goal
        samples.append([(prompts[i], pictures[i], "", right[i]) for i in sorted(some.values())[:2]])
    return {"gen": float(np.mean(list(skills.values()))), "gen_by_skill": skills, "gen_chance": chance}, samples


def by_part(right, names):
    """Share of what is right in each of several equally long parts, {name: share}."""
    return dict(zip(names, np.reshape(right, (len(names), -1)).mean(1).tolist(), strict=True))


def score_both(m, text, world, n, seed=0):
    """Scores of answers and drawings, printed -> scores with the checksum of their weights, rows for plot_samples."""
    drawn, pictures = score_generation(m, text, world, n, seed)
    said, answers = score_understanding(m, text, world, n, seed)
    scores = {"weights": formats.weights.digest(m)} | said | drawn
    print_scores(scores)
    rows = [("drawn", row) for row in zip(*pictures, strict=False)]
    return scores, [*rows, ("answered", answers)]


def score_tokenizer(m, world, n, seed=0):
    """Encode and decode n held-out pictures: psnr in dB, and the share that is read exactly as it was drawn."""
    rng = stream(seed, "reconstructions")
    scenes = [world.held_out_scene(world.skills[i % len(world.skills)], rng)[0] for i in range(n)]
    drawn = draw_scenes(scenes, world.cell_side)
    pixels = torch.stack([to_tensor(picture) for picture in drawn]).to(next(m.parameters()).device)
    again = torch.cat([m.decode_images(m.encode_images(part)).cpu() for part in pixels.split(64)])
    again = np.stack([to_picture(picture) for picture in again])
    back, clear = read_scenes(again, world)
    error = ((drawn.astype(np.float32) - again) ** 2).mean((1, 2, 3))
    right = [bool(ok) and a == b for a, b, ok in zip(scenes, back, clear, strict=True)]
    return {"psnr": float((10 * np.log10(255**2 / np.maximum(error, 1e-6))).mean()), "reader": float(np.mean(right))}


# ---------------------------------------------------------------------------------------------------------------------
# Scores of pictures and text in turn
# ---------------------------------------------------------------------------------------------------------------------
def seen_in(answers, world, which=-1):
    """What the reader sees in one picture of each answer, by default the last: a scene, or None where there is no
    picture, or an unclear one."""
    pictures = [[part.pixels for part in parts if isinstance(part, Drawn)][which:][:1] for parts in answers]
    scenes, clear = read_scenes(np.stack(sum(pictures, [draw_scenes([()], world.cell_side)[0]])), world)
    found = iter([scene if ok else None for scene, ok in zip(scenes[1:], clear[1:], strict=True)])
    return [next(found) if own else None for own in pictures]


def turn_of(asked, parts):
    """A turn of a conversation in which a model said these parts, and the pictures among them."""
    # A mark that it wrote itself stands for no picture: counted as one, it would spoil the rest of the conversation.
    said = " ".join(part.replace("<image>", "< image>") if isinstance(part, str) else "<image>" for part in parts)
    return (asked, said), tuple(part for part in parts if isinstance(part, Drawn))


def shows(goal, scene):
    return scene is not None and goal in combinations(scene)


LIKELIEST = {"code_temperature": 0.0, "temperature": 0.0}
MIXED_SCORES = ("edit", "stayed", "consistent", "right", "plan", "plain", "third", "judges", "mended")


def score_edits(m, text, world, n, rng):
    """n edits of each kind, whose result shows a held-out combination: the reader sees exactly that; and of what was
    not to change, all is seen to have stayed."""
    items = [held_out_edit(world, kind, rng) for kind in EDITS for _ in range(n)]
    pictures = draw_scenes([before for before, _, _ in items], world.cell_side)
    asked = [conversation([(f"<image>{said}", None)], (picture,))
             for (_, said, _), picture in zip(items, pictures, strict=True)]
    seen = seen_in(reply(m, text, asked, max_new_tokens=8, max_pictures=1, **LIKELIEST), world)
    right = [scene == result for scene, (_, _, result) in zip(seen, items, strict=True)]
    kept = [(scene, set(before) & set(result)) for scene, (before, _, result) in zip(seen, items, strict=True)]
    return {"edit": rated(lambda i, j: seen[i] == items[j][2], len(items)),
            "edit_by_kind": by_part(right, EDITS),
            "stayed": float(np.mean([scene is not None and same <= set(scene) for scene, same in kept if same]))}


def score_plans(m, text, world, n, rng):
    """n held-out prompts of each skill, drawn plainly, with a plan before the picture, and checked after it: skills of
    each, and of the mended picture; judges: it says rightly whether its own picture is right."""
    goals = [world.held_out_scene(skill, rng)[1] for skill in world.skills for _ in range(n)]
    prompts = [prompt_text(goal, rng) for goal in goals]
    found = {}

    def ask_for(before):
        asked = [conversation([(before + prompt, None)], ()) for prompt in prompts]
        return reply(m, text, asked, max_new_tokens=64, max_pictures=2, **LIKELIEST)

    def add(name, seen):
        right = [shows(goal, scene) for goal, scene in zip(goals, seen, strict=True)]
        found[name] = rated(lambda i, j: shows(goals[j], seen[i]), len(goals))
        found[f"{name}_by_skill"] = by_part(right, world.skills)
        return right
    add("plain", seen_in(ask_for(""), world))
    add("plan", seen_in(ask_for(PLAN), world))
    checked = ask_for(MEND)
    first = add("first", seen_in(checked, world, 0))
    add("mended", seen_in(checked, world))
    said = [any(isinstance(part, str) and part.endswith(RIGHT) for part in parts) for parts in checked]
    return found | {"judges": rated(lambda i, j: said[i] == first[j], len(goals))}


def score_telling(m, text, world, n, rng):
    """n held-out scenes a skill, described completely, drawn, and asked about twice, in one stream. right: the answer
    is what the description decides. consistent: what the reader sees, unclear drawings wrong."""
    scenes = [world.held_out_scene(skill, rng)[0] for skill in world.skills for _ in range(n)]
    prompts = [describe(scene) for scene in scenes]
    drawn = reply(m, text, [conversation([(prompt, None)], ()) for prompt in prompts], max_new_tokens=8,
                  max_pictures=1, **LIKELIEST)
    seen = seen_in(drawn, world)
    told = [turn_of(prompt, parts) for prompt, parts in zip(prompts, drawn, strict=True)]
    turns, pictures = [[turn] for turn, _ in told], [own for _, own in told]
    said = {}
    for name in ("right", "consistent"):
        about = [one if name == "consistent" and one else scene for scene, one in zip(scenes, seen, strict=True)]
        asked = [make_question(world, one, world.topics[i % len(world.topics)], rng) for i, one in enumerate(about)]
        replies = reply(m, text, [conversation([*before, (question.text, None)], own) for before, question, own
                                  in zip(turns, asked, pictures, strict=True)],
                        max_new_tokens=8, max_pictures=0, temperature=0.0)
        turns = [[*before, turn_of(question.text, parts)[0]]
                 for before, question, parts in zip(turns, asked, replies, strict=True)]
        known = [name == "right" or bool(one) for one in seen]
        said[name] = rated(lambda i, j, known=known, replies=replies, asked=asked:
                           known[i] and replies[i] == [asked[j].answer], len(scenes))
    return said


def score_stories(m, text, world, n, rng):
    """n stories: draw a held-out prompt, edit twice, answer. Right by number in the stream: the first picture shows the
    prompt, each further one the instruction applied to what the reader sees before it, the answer what it sees last;
    what follows an unclear picture is wrong -> scores, and [(asked, picture, said, right), ...] of each story."""
    starts = [world.held_out_scene(world.skills[i % len(world.skills)], rng) for i in range(n)]
    scenes, wanted = (list(part) for part in zip(*starts, strict=True))
    asked = [prompt_text(goal, rng) for goal in wanted]
    turns, pictures, sure = [[] for _ in starts], [() for _ in starts], [True for _ in starts]
    rows = [[] for _ in starts]
    for number in range(4):
        answers = reply(m, text, [conversation([*before, (one, None)], shown) for before, one, shown
                                  in zip(turns, asked, pictures, strict=True)],
                        max_new_tokens=8, max_pictures=int(number < 3), **LIKELIEST)
        looks = seen_in(answers, world) if number < 3 else [" ".join(map(str, parts)) for parts in answers]
        for i, (parts, look) in enumerate(zip(answers, looks, strict=True)):
            right = shows(wanted[i], look) if number == 0 else sure[i] and look == wanted[i]
            first = parts[0] if parts else ""
            shown = (first.pixels, "") if isinstance(first, Drawn) else (None, first)
            rows[i].append((asked[i], *shown, right))
            turn, drawn = turn_of(asked[i], parts)
            turns[i].append(turn)
            pictures[i] += drawn
            if number == 3:
                continue
            sure[i] = bool(look) and any(edits(world, look).values())
            scene = look if sure[i] else scenes[i]              # something is asked also after an unclear picture
            if number == 2:
                question = make_question(world, scene, pick(rng, world.topics), rng)
                asked[i], wanted[i] = question.text, question.answer
            else:
                asked[i], wanted[i] = pick(rng, [one for some in edits(world, scene).values() for one in some.items()])
                scenes[i] = wanted[i]
    shares = [float(np.mean([row[number][-1] for row in rows])) for number in range(4)]
    return {"story": shares, "third": shares[2]}, rows


def score_mixed(m, text, world, n, seed=0):
    """All scores of pictures and text in turn, printed; each in a fresh order of its own -> scores, stories."""
    scores = {}
    for number, score in enumerate((score_edits, score_plans, score_telling)):
        scores |= score(m, text, world, n, stream(seed, "in turn", number))
    told, stories = score_stories(m, text, world, 2 * n, stream(seed, "in turn", 3))
    scores |= told
    chance = {name: value["chance"] for name, value in scores.items() if isinstance(value, dict) and "chance" in value}
    scores = {name: value["score"] if name in chance else value for name, value in scores.items()}
    print("in turn              " + "   ".join(f"{name} {scores[name]:.2f}" for name in MIXED_SCORES))
    for name in ("plain", "plan", "first", "mended"):
        print(f"  {name:19s}{scores[name]:.3f}   " + "   ".join(
            f"{skill} {value:.2f}" for skill, value in scores[f"{name}_by_skill"].items()))
    print("  right by number in a story " + " ".join(f"{share:.2f}" for share in scores["story"]))
    return scores | {"chance": chance}, stories


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------
class HeldOut:
    """Samples of held-out scenes of a world, as a source of records (see data.WorldSource)."""

    def __init__(self, world, seed):
        self.world, self.seed = world, seed

    def batches(self, preparer, task, n, batch=25):
        rng = stream(self.seed, "curves", aia.TASKS.index(task))
        records = []
        for i in range(n):
            scene, combination = self.world.held_out_scene(self.world.skills[i % len(self.world.skills)], rng)
            turns = questions_about(self.world, scene, rng)
            if task == "gen":
                turns = [(prompt_text(combination, rng), "<image>")]
            picture = draw_scenes([scene], self.world.cell_side)[0]
            records.append(Record(f"held-out picture {i}", task, tuple(turns), (picture,)))
        for start in range(0, n, batch):
            yield preparer.batch(records[start:start + batch])


class FileBatches:
    """The first samples of a data set, for curves and losses on a user's own pictures: of a task, or where there are
    none, mixed ones.

    Records that cannot be used are added to the list `bad` and left out; without a list they stop the command.
    """

    def __init__(self, source, bad=None):
        self.source, self.bad = source, bad

    def batches(self, preparer, task, n, batch=8):
        task = task if self.source.count(task) else "mixed"
        n = min(n, self.source.count(task))
        for start in range(0, n, batch):
            positions = range(start, min(start + batch, n))
            yield data.usable_batch(preparer, lambda i: (self.source.record(task, i), None), positions, bad=self.bad)


class FreeDecoding(data.Preparer):
    """Records -> Batch with what the model itself draws, or says to the first question, in place of the stored answer.

    A pass over the whole sequence then gives the attention that each token paid when it was drawn, since no token sees
    a later one. Of a guided drawing it is that of the conditional branch.
    """

    def __init__(self, m, text, seed=0, max_new_tokens=64):
        super().__init__(m, text, training=False)
        self.generator = torch.Generator(next(m.parameters()).device).manual_seed(seed)
        self.max_new_tokens = max_new_tokens

    def batch(self, records, rngs=None, drop=0.0):
        task = records[0].task
        if task == "mixed":
            raise InputError("--decode takes drawings and answers, not conversations that do both: leave it out")
        pixels, codes = None, None
        if task == "gen":
            prompts = [record.turns[0][0] for record in records]
            drawn = draw_codes(self.m, self.text, prompts, self.generator).cpu()
            samples = [self.template.generation(prompt + self.config.suffix, one)
                       for prompt, one in zip(prompts, drawn, strict=True)]
            codes = drawn if self.config.kind == "janus" else None
        else:
            asked = [first_question(record) for record in records]
            samples, ids, mask, pictures = ask(self, asked)
            pixels = pictures.get("pixels")
            said = self.m.generate_text(ids, pixels, mask, self.max_new_tokens).tolist()
            eos = self.text.ids["eos"]
            samples = [[*pieces, (row[:row.index(eos) + 1] if eos in row else row, data.ANSWER)]
                       for pieces, row in zip(samples, said, strict=True)]
        return data.collate(task, samples, torch.ones(len(samples), dtype=torch.bool), self.text.ids["pad"], pixels,
                            codes, tuple(record.origin for record in records))


def uniform_share(condition, queries):
    """The intensity of a model that spreads its attention evenly: share of the condition among visible keys (B,)."""
    keys = torch.arange(1, condition.shape[1] + 1, device=condition.device)
    return aia.intensity((condition.cumsum(1) / keys)[:, None], queries)


@torch.inference_mode()
def measure(m, batches, task, target, delta):
    """Of a task, in its batches or in mixed ones: intensity per layer (mean and standard deviation over samples),
    attention on the first token of the sequence (a sink) and intensity without it, share of keys, next-token loss and
    L_AIA."""
    device = next(m.parameters()).device
    found, sink, sinkless, uniform = [], [], [], []
    ntp, tokens = 0.0, 0
    for batch in filter(None, batches):
        batch = batch.to(device)
        first = torch.zeros_like(batch.condition)
        first[..., 0] = True
        out, on_first = m(batch), m(batch.measuring(first)).intensity
        finite(out.ntp)
        own = (out.ntp, out.intensity, on_first, batch.condition, batch.queries, batch.aia_valid)
        part = batch.tasks.index(task)
        # (), (B, L), (B, L), (B, T), (B, T), (B,)
        loss, intensity, on_first, condition, queries, valid = (batch.per_task(x)[part] for x in own)
        ntp, tokens = ntp + loss.item(), tokens + batch.labelled[part]
        found.append(intensity[valid].cpu())
        sink.append(on_first[valid].cpu())
        sinkless.append((intensity - on_first * condition[:, :1])[valid].cpu())
        uniform.append(uniform_share(condition, queries)[valid].cpu())
    if not sum(map(len, found)):                    # no sample that AIA can use
        return None
    found = torch.cat(found)                                                    # (n, L)
    valid = torch.ones(len(found), dtype=torch.bool)
    return {"intensity": found.mean(0).tolist(), "std": found.std(0, correction=0).tolist(),
            "without_first_token": torch.cat(sinkless).mean(0).tolist(), "sink": torch.cat(sink).mean(0).tolist(),
            "uniform": torch.cat(uniform).mean().item(),
            "ntp": ntp / tokens, "aia": aia.loss(found, target, delta, valid).item(), "samples": len(found)}


def arms(folder, m):
    """(name, m) for the weights of a run before AIA, those trained on without it, and the final ones, one after the
    other in the same model: two may not fit where one was trained."""
    for name in ("before", "control"):
        if (folder / name).exists():
            checkpoints.read_manifest(folder / name)            # refuses damaged files
            checkpoints.read_tensors(checkpoints.tensors_of(m), folder / name)
            yield name, m
    checkpoints.read_tensors(checkpoints.tensors_of(m), checkpoints.newest_checkpoint(folder)[0])
    yield "after", m


def curves(models, preparer, samples, targets, n=100, decode=False, final=""):
    """Both tasks of several models (name, m), one after the other and with one picture tokenizer, and their targets ->
    one JSON-ready dict. decode: on what each model says and draws by itself. final: label of the model "after"."""
    batches = {task: [] if decode else [*samples.batches(preparer, task, n)] for task in aia.TASKS}
    # JSON has no infinity: without Huber, delta is null.
    result = {task: {"target": target.tolist(), "delta": [d if d < float("inf") else None for d in delta.tolist()]}
              for task, (target, delta) in targets.items()}
    for name, m in models:
        weights = formats.weights.digest(m)
        for task in aia.TASKS:
            own = samples.batches(FreeDecoding(m, preparer.text), task, n) if decode else batches[task]
            row = measure(m, own, task, *targets[task])
            if row:
                row |= {"weights": weights} | ({"label": final} if final and name == "after" else {})
            result[task][name] = row
    return result


def final_label(folder):
    """Label of the final weights of a run folder, which depends on whether its last phase had AIA."""
    *_, last = [None, *checkpoints.checkpoint_folders(folder)]
    if last is None:                                # a folder of results only
        return LABEL["after"]
    manifest = read_json(last / "manifest.json")
    lambdas = manifest.get("lambdas") or manifest.get("weights") or {}          # older runs: weights
    return LABEL["after"] if any(lambdas.values()) else WITHOUT


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Loaded:
    """Where the model of a command comes from."""

    checkpoint: str = opt("", "run folder of train.py, or a folder or hub id of public weights")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model")
    dtype: str = opt("stored", "of the weights", ("stored", "float32", "bfloat16"))
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    rope_bf16: bool = opt(False, "round the rotary frequencies to bfloat16, as the authors' scripts do")
    allow_special: bool = opt(False, "let strings such as <|image start|> in your text act as control tokens")


def load_run(config):
    """Model, text tokenizer and settings of a run folder (None for public weights)."""
    if not config.checkpoint:
        raise InputError("this command needs --checkpoint, the folder of a run, or of public weights")
    dtype = None if config.dtype == "stored" else getattr(torch, config.dtype)
    m = formats.weights.load(config.checkpoint, dtype, settings.device_of(config.device), config.vision_tokenizer,
                             config.rope_bf16)
    if not m.tokenizer_file:
        raise InputError(f"{config.checkpoint} holds no tokenizer: put {' or '.join(TOKENIZERS)} there")
    folder = Path(config.checkpoint)
    run = read_json(folder / "settings.json") if (folder / "checkpoints").exists() else None
    return m, Text(m.tokenizer_file, m.config.kind, config.allow_special), run


def own_world(run, folder, remedy="give the folder of a run that did"):
    """The built-in world that a run has learned; refuses public weights, and runs on other data."""
    if run is None or run.get("data"):
        raise InputError(f"{folder} never saw the built-in world: {remedy}")
    return world_of(run)


@dataclass(frozen=True)
class Generate(Loaded):
    """Draw pictures from prompts, or edit pictures as a prompt says. Several lie in a sheet, with a row for each
    prompt, and in a file each beside it."""

    image: tuple = opt((), "pictures that the prompt speaks of: it is an instruction to change them")
    prompt: tuple = opt(("a red circle above a blue square",), "what to draw; several texts are several prompts")
    prompts: str = opt("", "UTF-8 file with a prompt in each line, in place of --prompt")
    n: int = opt(1, "pictures for each prompt, with seeds that follow --seed")
    out: str = opt("picture.png", "PNG file to write")
    aspect: str = opt("1:1", "WIDTH:HEIGHT of the picture; Janus-Pro draws squares only")
    negative: str = opt("", "Emu3: prompt to be guided away from; empty: the model's own")
    guidance: float = opt(0.0, "classifier-free guidance; 0: the model's own, 1: none")
    temperature: float = opt(1.0, "0 takes the likeliest code")
    seed: int = opt(0, "draws the codes")
    scale: int = opt(0, "enlarge each pixel so many times; 0: small pictures to about 240")


def generate(config):
    """Write one picture, or a sheet of several and a file for each, NAME-PROMPT-SEED."""
    out = Path(config.out)
    settings.at_least(config, {"n": 1, "seed": 0, "guidance": 0, "temperature": 0, "scale": 0})
    form = picture_form(out, config.image)
    if config.image and config.negative:
        raise InputError("--negative acts on drawings from a prompt alone: leave it out, or --image")
    prompts = config.prompt
    if config.prompts:
        prompts = [line for _, line in settings.text_lines(config.prompts)]
        if not prompts or config.prompt != Generate.prompt:
            raise InputError(f"--prompts {config.prompts}: give a file with a prompt in each line, and no --prompt")
    m, text, _ = load_run(config)
    grid = grid_for(config.aspect, m.config)
    sheet = None
    for row, prompt in enumerate(prompts):
        for column in range(config.n):
            seed = config.seed + column             # one at a time: each can be drawn again alone
            shown = config.image or "<image>" in prompt         # a mark without a picture is refused there
            picture = Image.fromarray(edited(m, text, config, prompt, seed, grid) if shown else to_picture(
                draw(m, text, [prompt], seed, config.guidance or None, config.temperature, grid,
                     config.negative or None)[0]))
            scale = config.scale or max(240 // max(picture.size), 1)
            if picture.width * picture.height * scale**2 > Image.MAX_IMAGE_PIXELS:
                raise InputError(f"--scale {scale} makes a picture of over {Image.MAX_IMAGE_PIXELS} pixels: give less")
            picture = picture.resize([side * scale for side in picture.size], Image.Resampling.NEAREST)
            sheet = sheet or Image.new("RGB", (picture.width * config.n, picture.height * len(prompts)))
            sheet.paste(picture, (picture.width * column, picture.height * row))
            file = out
            if config.n * len(prompts) > 1:
                file = out.with_stem(f"{out.stem}-{row + 1}-{seed}")
                with aside(file) as part:
                    picture.save(part, form)
            print(f"{file}: {picture.width} x {picture.height}, each pixel shown {scale} times, from {prompt!r} with "
                  f"seed {seed}")
    with aside(out) as part:
        sheet.save(part, form)
    return {"out": config.out, "width": sheet.width, "height": sheet.height}


def edited(m, text, config, prompt, seed, grid):
    """The picture that a model draws when it is shown others and told what to change -> (H, W, 3) uint8."""
    marks = "" if "<image>" in prompt else "<image>" * len(config.image)
    generator = torch.Generator(next(m.parameters()).device).manual_seed(seed)
    said, = reply(m, text, [conversation([(marks + prompt, None)], config.image)], config.guidance or m.config.guidance,
                  grid, max_pictures=1, code_temperature=config.temperature, generator=generator)
    pictures = [part for part in said if isinstance(part, Drawn)]
    if not pictures:
        raise InputError(f"the model answered {shortened(' '.join(said))!r} and drew nothing: say what to change, or "
                         "first train it on conversations (train.py --ratio, formats/README.md)")
    return pictures[-1].pixels


@dataclass(frozen=True)
class Chat(Loaded):
    """Answer a question about pictures, in words and pictures; without a question, talk."""

    image: tuple = opt((), "picture files")
    out: str = opt("answer.png", "file for a picture in an answer; more of them are NAME-2, NAME-3")
    question: str = opt("", "what to ask; empty: a conversation in the terminal")
    max_new_tokens: int = opt(512, "longest answer in tokens")
    temperature: float = opt(0.0, "0 is greedy")
    top_p: float = opt(1.0, "draw from the fewest words that are so likely together; 1: from all")
    seed: int = opt(0, "draws the words, where the temperature is not 0")


def chat(config):
    """Print one answer, or talk until the end of the input."""
    settings.at_least(config, {"seed": 0, "temperature": 0, "max_new_tokens": 1})
    if not 0 < config.top_p <= 1:
        raise InputError(f"--top-p {config.top_p}: give a share above 0, at most 1")
    form = picture_form(config.out, config.image)
    m, text, _ = load_run(config)
    generator = torch.Generator(next(m.parameters()).device).manual_seed(config.seed)
    for path in config.image:
        load_picture(path, m.config.kind)
    out, saved = Path(config.out), []

    def save(codes):
        file = out.with_stem(f"{out.stem}-{len(saved) + 1}") if saved else out
        saved.append(file)
        pixels = to_picture(m.decode_images(codes[None].to(generator.device))[0])
        with aside(file) as part:
            Image.fromarray(pixels).save(part, form)
        return str(file)

    def say(turns, pictures):
        typist = Typist(text, save)
        try:
            said, = reply(m, text, [conversation(turns, pictures)], max_new_tokens=config.max_new_tokens,
                          temperature=config.temperature, top_p=config.top_p, generator=generator,
                          watch=lambda row, part: typist(part))
        finally:
            typist.end()                            # an error stands in a line of its own
        return turn_of("", said)
    if config.question:
        marks = "" if "<image>" in config.question else "<image>" * len(config.image)
        (_, said), _ = say([(marks + config.question, None)], config.image)
        return {"answer": said} | ({"pictures": list(map(str, saved))} if saved else {})
    return {"turns": converse(say, m.config.kind, list(config.image))}


@dataclass(frozen=True)
class Curves(Loaded):
    """Intensity per layer of both tasks on held-out samples: before AIA, after, and the target."""

    data: str = opt("", "data set of samples, as for train.py --data; empty: held-out scenes of the world")
    n: int = opt(100, "samples for each task")
    decode: bool = opt(False, "measure while the model answers and draws by itself, not on the stored answers")
    seed: int = opt(0, "draws the samples")
    out: str = opt("", "PNG file, its numbers beside it as JSON; empty: curves.png in the run folder, or here for "
                   "public weights, --data and --decode")


def curve_command(config):
    """Write curves.png and curves.json."""
    settings.at_least(config, {"n": 1, "seed": 0})
    check_figure(config.out)
    m, text, run = load_run(config)
    folder = Path(config.checkpoint)
    if config.data:
        samples = FileBatches(FileSource(config.data, m.config.kind))
    else:
        samples = HeldOut(own_world(run, folder, "curves need --data FILE.jsonl with samples"), config.seed)
    asked = (run["aia_targets"], run["aia_variant"]) if run else ()
    targets = {task: aia.targets(m.config.layers, task, *asked) for task in aia.TASKS}
    models = arms(folder, m) if run else [("public", m)]
    result = curves(models, data.Preparer(m, text), samples, targets, config.n, config.decode,
                    final_label(folder) if run else "")
    own = run and not config.data and not config.decode                         # what the run wrote itself
    out = Path(config.out or (folder / "curves.png" if own else "curves.png"))
    name = f"{run['preset']}, seed {run['seed']}" if run else folder.resolve().name
    show_curves(result, out, m.config.kind, name)
    print(f"{out} and {out.with_suffix('.json')}")
    return {f"aia_{task}": {name: row["aia"] for name, row in result[task].items() if isinstance(row, dict)}
            for task in aia.TASKS}


def show_curves(result, out, kind, name):
    """Draw and store what `curves` returned of a run or model with that name, and print a line per model and task."""
    result = result | {"kind": kind, "run": name}
    plot_curves(result, out)
    write_json(result, out.with_suffix(".json"))
    for task in aia.TASKS:
        for name, row in result[task].items():
            if isinstance(row, dict):
                print(f"{task} {label_of(name, row):26s} L_AIA {row['aia']:.4f}   mean |I - T| "
                      f"{distance(result[task], name):.3f}   share of keys {row['uniform']:.3f}   ntp {row['ntp']:.3f}")


def distance(rows, name):
    """Mean over layers of |intensity - target| of one model."""
    return float(np.abs(np.array(rows[name]["intensity"]) - np.array(rows["target"])).mean())


@dataclass(frozen=True)
class ScoreWorld(Loaded):
    """Score a run on held-out combinations of the built-in world. `eval.py score BENCH --help` tells of benchmarks."""

    out: str = opt("", "JSON file to write; empty: printed only")
    n: int = opt(60, "pictures for each topic, and prompts for each skill")
    seed: int = opt(0, "draws questions, prompts and codes")


def score_world(config):
    """Scores of one run on the built-in world, printed, and stored if --out says where: its own scores.json stays."""
    settings.at_least(config, {"n": 1, "seed": 0})
    settings.check_out(config.out)
    m, text, run = load_run(config)
    world = own_world(run, config.checkpoint)
    if m.config.image_size != world.side:
        raise InputError(f"{config.checkpoint} draws pictures of another size than those of the built-in world, so "
                         "they cannot be read: score it on a benchmark (eval.py score --help)")
    scores, _ = score_both(m, text, world, config.n, config.seed)
    scores |= score_tokenizer(m, world, 4 * config.n, config.seed)
    if parse_ratio(run["ratio"])[2]:
        scores |= score_mixed(m, text, world, config.n, config.seed)[0]
    if config.out:
        write_json(scores, config.out)
    return scores


def print_scores(scores):
    """Scores as two short tables."""
    for title, key in (("understanding", "und"), ("generation", "gen")):
        rows = scores["und_by_topic" if key == "und" else "gen_by_skill"]
        print(f"{title:20s} {scores[key]:.3f}   " + "   ".join(f"{name} {value:.2f}" for name, value in rows.items()))
    print(f"stricter: f1 {scores['f1']:.3f}, acc+ {scores['acc_plus']:.3f}, circular {scores['circular']:.3f}; "
          f"open questions {scores['open']:.3f}")


COMMANDS = {"score": (ScoreWorld, score_world), "generate": (Generate, generate), "chat": (Chat, chat),
            "curves": (Curves, curve_command)}
MOVED = {name: f"python -m lab.{name}" for name in ("figures", "alignment", "report")} | {
    "bench": "python -m lab.speed, and for a GPU python -m lab.gpu",
    "collect": "python -m lab.summary", "--hf": "python -m lab.references --hf"}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    settings.moved(argv, "eval.py", MOVED)
    if argv[:2] == ["score", "world"]:
        argv = ["score", *argv[2:]]
    if argv[:1] == ["score"] and argv[1:] and not argv[1].startswith("-"):
        import benchmarks.score  # it stands above this file
        return settings.tell(benchmarks.score.score(settings.parse(benchmarks.score.Score, argv[1:], "eval.py score")))
    commands = COMMANDS
    if argv and argv[0] not in COMMANDS:
        import lab.check  # it stands above this file too
        commands = COMMANDS | {"check": (lab.check.Check, lab.check.check)}
    command, config = settings.chosen(commands, "eval.py", __doc__, argv)
    settings.tell(command and command(config))


if __name__ == "__main__":
    settings.run_command(main)
