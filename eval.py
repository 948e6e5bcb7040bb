"""How a trained model is judged: pictures from prompts, answers about pictures, scores, and the curves of the paper.

Drawn pictures are read back exactly (data.read) and scored in GenEval's six skills; answers are scored in the manner of
POPE, MME and MMBench. Everything is asked about held-out combinations (data.World).

    python eval.py score    --checkpoint runs/tiny-emu3-seed0
    python eval.py generate --checkpoint runs/tiny-emu3-seed0 --prompt "a red circle above a blue square" --out red.png
    python eval.py chat     --checkpoint runs/tiny-emu3-seed0 --image red.png --question "is there a circle?"
    python eval.py curves   --checkpoint runs/tiny-emu3-seed0
    python eval.py collect  --runs "runs/tiny-*"
    python eval.py bench generate            # or train, processes, data, fits
"""

import contextlib
import functools
import glob
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aia
import data
import model
from aia import InputError
from data import opt

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


def draw(m, text, prompts, seed=0, guidance=None, temperature=1.0, size=None, negative=None, batch=128):
    """Prompts -> pixels (n, 3, S, S) in [-1, 1], on the CPU. Same seed, same pictures."""
    generator, pixels = torch.Generator(next(m.parameters()).device).manual_seed(seed), []
    for start in range(0, len(prompts), batch):
        codes = draw_codes(m, text, prompts[start:start + batch], generator, guidance, temperature, size, negative)
        pixels.append(m.decode_images(codes).cpu())
    return torch.cat(pixels)


def draw_codes(m, text, prompts, generator=None, guidance=None, temperature=1.0, size=None, negative=None):
    """Prompts -> codes as m.generate_images gives them. negative None: the model's own negative prompt."""
    template, device = data.TEMPLATES[m.config.kind](m.config, text, training=False), next(m.parameters()).device
    size, away = size or m.config.grid, None
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
    preparer, answers = data.Preparer(m, text, training=False), []
    for start in range(0, len(asked), batch):
        records = [conversation([(question, None)], (picture,)) for picture, question in asked[start:start + batch]]
        ids, mask, pixels = ask(preparer, records)[1:]
        new = m.generate_text(ids, pixels, mask, max_new_tokens, temperature)
        answers += [text.decode(row).strip() for row in new.tolist()]
    return answers


def conversation(turns, pictures):
    """A record of turns [(question, answer)], the last answer None, with its pictures."""
    return data.Record("the question", "und", tuple(turns), tuple(pictures))


def ask(preparer, records):
    """Conversations -> pieces of each, and what m.generate_text takes: ids (B, T), mask (B, T), pixels."""
    device = next(preparer.m.parameters()).device
    samples, _, pictures = preparer.pieces(records)
    ids, mask = left_padded(samples, preparer.text.ids["pad"], device)
    pixels = pictures.get("pixels")
    return samples, ids, mask, None if pixels is None else pixels.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
# Which held-out combinations the pictures of a question kind show.
SHOWN = {"existence": ("two objects", "colour attribution", "colours"), "count": ("counting", "two objects"),
         "position": ("position", "one object"), "colour": ("colours", "colour attribution"),
         "choice": ("colours", "two objects")}


def score_understanding(m, text, world, n, seed=0):
    """Plain accuracy per question kind on n held-out pictures each, and the stricter measures of the three benchmarks.

    existence  yes/no, balanced; f1 with "yes" as positive (POPE)
    count, position, colour  a true and a false yes/no question about each picture; acc+ wants both right (MME); open is
               the accuracy on questions without yes or no ("how many circles are there?")
    choice     four options; circular wants the right letter under all four rotations (MMBench)
    """
    rng = np.random.default_rng([seed, 6])
    asked = []                                                                  # (measure, number, picture, q)
    for kind in data.QUESTIONS:
        for i in range(n):
            scene, _ = world.held_out_scene(SHOWN[kind][i % len(SHOWN[kind])], rng)
            picture = data.draw([scene])[0]
            if kind == "existence":
                questions = [(kind, data.question(scene, kind, rng, i % 4 < 2))]
            elif kind == "choice":
                first, *others = rotations(data.question(scene, kind, rng))
                questions = [(kind, first), *(("turned", question) for question in others)]
            else:
                questions = [(kind, data.question(scene, kind, rng, truth)) for truth in (True, False)]
                questions.append(("open", data.question(scene, kind, rng, closed=False)))
            asked += [(measure, (kind, i), picture, question) for measure, question in questions]
    said = answer(m, text, [(picture, question.text) for _, _, picture, question in asked], max_new_tokens=8)
    right = {}                                                                  # {measure: {picture: [right or not]}}
    for (measure, number, _, question), reply in zip(asked, said, strict=True):
        right.setdefault(measure, {}).setdefault(number, []).append(reply == question.answer)
    plain = {measure: float(np.mean(sum(groups.values(), []))) for measure, groups in right.items()}
    strict = {measure: float(np.mean([all(group) for group in groups.values()])) for measure, groups in right.items()}
    kinds = {kind: plain[kind] for kind in data.QUESTIONS}
    pairs = [(reply == "yes", question.answer == "yes") for (measure, _, _, question), reply
             in zip(asked, said, strict=True) if measure == "existence"]
    hits, claimed, true = (sum(x) for x in ([a and b for a, b in pairs], [a for a, _ in pairs], [b for _, b in pairs]))
    return {"und": float(np.mean(list(kinds.values()))), "und_by_kind": kinds, "f1": 2 * hits / max(claimed + true, 1),
            "acc_plus": float(np.mean([strict[kind] for kind in ("count", "position", "colour")])),
            "circular": float(np.mean([all(right["choice"][number] + turned)
                                       for number, turned in right["turned"].items()])), "open": plain["open"]}


def rotations(asked):
    """The same multiple-choice question with its options moved round: four questions (circular evaluation)."""
    stem = asked.text[:asked.text.index("?") + 1]
    right = asked.options["ABCD".index(asked.answer)]
    return [data.choice_question(stem, asked.options[i:] + asked.options[:i], right) for i in range(4)]


def score_generation(m, text, world, n, seed=0):
    """One guided picture, of the likeliest codes, for each of n held-out prompts per skill, read back from its pixels
    -> scores, samples."""
    rng = np.random.default_rng([seed, 7])
    goals = [world.held_out_scene(skill, rng)[1] for skill in data.SKILLS for _ in range(n)]
    prompts = [data.prompt_text(goal, rng) for goal in goals]
    pictures = np.stack([data.to_picture(pixels) for pixels in draw(m, text, prompts, temperature=0)])
    scenes, clear = data.read(pictures)
    right = [bool(ok) and goal in data.combinations(scene)
             for goal, scene, ok in zip(goals, scenes, clear, strict=True)]
    skills = {skill: float(np.mean(right[i * n:(i + 1) * n])) for i, skill in enumerate(data.SKILLS)}
    return {"gen": float(np.mean(list(skills.values()))), "gen_by_skill": skills}, (prompts, pictures, right)


def score_tokenizer(m, world, n, seed=0):
    """Encode and decode n held-out pictures: psnr in dB, and the share that is read exactly as it was drawn."""
    rng = np.random.default_rng([seed, 8])
    scenes = [world.held_out_scene(data.SKILLS[i % len(data.SKILLS)], rng)[0] for i in range(n)]
    drawn = data.draw(scenes)
    pixels = torch.stack([data.to_tensor(picture) for picture in drawn]).to(next(m.parameters()).device)
    again = torch.cat([m.decode_images(m.encode_images(part)).cpu() for part in pixels.split(64)])
    again = np.stack([data.to_picture(picture) for picture in again])
    back, clear = data.read(again)
    error = ((drawn.astype(np.float32) - again) ** 2).mean((1, 2, 3))
    right = [bool(ok) and a == b for a, b, ok in zip(scenes, back, clear, strict=True)]
    return {"psnr": float((10 * np.log10(255**2 / np.maximum(error, 1e-6))).mean()), "reader": float(np.mean(right))}


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------
class HeldOut:
    """Samples of held-out scenes of a world, as a source of records (see data.WorldSource)."""

    def __init__(self, world, seed):
        self.world, self.seed = world, seed

    def batches(self, preparer, task, n, batch=25):
        rng = np.random.default_rng([self.seed, 9, aia.TASKS.index(task)])
        records = []
        for i in range(n):
            scene, combination = self.world.held_out_scene(data.SKILLS[i % len(data.SKILLS)], rng)
            kinds = [data.QUESTIONS[k] for k in rng.permutation(len(data.QUESTIONS))[:4]]
            asked = [data.question(scene, kind, rng) for kind in kinds]
            turns = [(q.text, q.answer) for q in asked] if task == "und" else [(data.prompt_text(combination, rng),
                                                                                 "<image>")]
            records.append(data.Record(f"held-out picture {i}", task, tuple(turns), (data.draw([scene])[0],)))
        for start in range(0, n, batch):
            yield preparer.batch(records[start:start + batch])


class FileBatches:
    """The first samples of a data set, for curves and losses on a user's own pictures.

    Records that cannot be used are added to the list `bad` and left out; without a list they stop the command.
    """

    def __init__(self, source, bad=None):
        self.source, self.bad = source, bad

    def batches(self, preparer, task, n, batch=8):
        n = min(n, self.source.count(task))
        for start in range(0, n, batch):
            positions = range(start, min(start + batch, n))
            yield data.usable_batch(preparer, lambda i: (self.source.record(task, i), None), positions, bad=self.bad)


class FreeDecoding(data.Preparer):
    """Records -> Batch with what the model itself draws or says in place of the stored answer.

    A pass over the whole sequence then gives the attention that each token paid when it was drawn, since no token sees
    a later one. Of a guided drawing it is that of the conditional branch.
    """

    def __init__(self, m, text, seed=0, max_new_tokens=64):
        super().__init__(m, text, training=False)
        self.generator = torch.Generator(next(m.parameters()).device).manual_seed(seed)
        self.max_new_tokens = max_new_tokens

    def batch(self, records, rngs=None, drop=0.0):
        task, pixels, codes = records[0].task, None, None
        if task == "gen":
            prompts = [record.turns[0][0] for record in records]
            drawn = draw_codes(self.m, self.text, prompts, self.generator).cpu()
            samples = [self.template.generation(prompt + self.config.suffix, one)
                       for prompt, one in zip(prompts, drawn, strict=True)]
            codes = drawn if self.config.kind == "janus" else None
        else:
            asked = [replace(record, turns=((record.turns[0][0], None),)) for record in records]
            samples, ids, mask, pixels = ask(self, asked)
            said = self.m.generate_text(ids, pixels, mask, self.max_new_tokens).tolist()
            eos = self.text.ids["eos"]
            samples = [[*pieces, (row[:row.index(eos) + 1] if eos in row else row, data.ANSWER)]
                       for pieces, row in zip(samples, said, strict=True)]
        return data.collate(task, samples, torch.ones(len(samples), dtype=torch.bool), self.text.ids["pad"], pixels,
                            codes, tuple(record.place for record in records))


def uniform_share(batch):
    """The intensity of a model that spreads its attention evenly: share of the condition among visible keys (B,)."""
    keys = torch.arange(1, batch.tokens.shape[1] + 1, device=batch.tokens.device)
    return aia.intensity((batch.condition.cumsum(1) / keys)[:, None], batch.queries)


@torch.inference_mode()
def measure(m, batches, target, delta):
    """Batches of one task: intensity per layer (mean and standard deviation over samples), without the first token of
    the sequence (an attention sink), share of keys, next-token loss and L_AIA."""
    device = next(m.parameters()).device
    found, sinkless, uniform, ntp, tokens = [], [], [], 0.0, 0
    for batch in filter(None, batches):
        batch = batch.to(device)
        out = m(batch)
        ntp, tokens = ntp + out.ntp.item(), tokens + out.tokens
        rest = batch.condition.clone()
        rest[:, 0] = False
        found.append(out.intensity[batch.aia_valid].cpu())
        sinkless.append(m(replace(batch, condition=rest)).intensity[batch.aia_valid].cpu())
        uniform.append(uniform_share(batch)[batch.aia_valid].cpu())
    if not tokens:
        return None
    found = torch.cat(found)                                                    # (n, L)
    valid = torch.ones(len(found), dtype=torch.bool)
    return {"intensity": found.mean(0).tolist(), "std": found.std(0, correction=0).tolist(),
            "without_first_token": torch.cat(sinkless).mean(0).tolist(), "uniform": torch.cat(uniform).mean().item(),
            "ntp": ntp / tokens, "aia": aia.loss(found, target, delta, valid).item(), "samples": len(found)}


def curves(models, preparer, samples, targets, n=100, decode=False):
    """Both tasks of several models (name, m), one after the other and with one picture tokenizer, and their targets ->
    one JSON-ready dict. decode: on what each model says and draws by itself."""
    batches = {task: [] if decode else [*samples.batches(preparer, task, n)] for task in aia.TASKS}
    # JSON has no infinity: without Huber, delta is null.
    result = {task: {"target": target.tolist(), "delta": [d if d < float("inf") else None for d in delta.tolist()]}
              for task, (target, delta) in targets.items()}
    for name, m in models:
        for task in aia.TASKS:
            own = samples.batches(FreeDecoding(m, preparer.text), task, n) if decode else batches[task]
            result[task][name] = measure(m, own, *targets[task])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of results
# ---------------------------------------------------------------------------------------------------------------------
COLOUR = {"before": "#999999", "control": "#56B4E9", "after": "#D55E00", "target": "#0072B2",
          "public": "#D55E00"}                      # Okabe and Ito
LABEL = {"before": "before AIA", "control": "same steps, without AIA", "after": "with AIA", "target": "target",
         "public": "the model"}
PANEL = {"gen": "generation: image to text", "und": "understanding: text to image"}


def plot_curves(result, file):
    """Intensity per layer of both tasks: before, after and target, with the share of keys as a dotted line."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, task in zip(panels, aia.TASKS, strict=True):
        rows = result[task]
        layers = range(len(rows["target"]))
        panel.step(layers, rows["target"], where="mid", color=COLOUR["target"], linestyle="--", label=LABEL["target"])
        for name in ("before", "control", "after", "public"):
            if rows.get(name):
                mean, std = np.array(rows[name]["intensity"]), np.array(rows[name]["std"])
                panel.plot(layers, mean, color=COLOUR[name], marker="o", markersize=4, label=LABEL[name])
                panel.fill_between(layers, mean - std, mean + std, color=COLOUR[name], alpha=0.15, linewidth=0)
        last = rows.get("after") or rows.get("public")
        if last:
            even = last["uniform"]
            panel.axhline(even, color="black", linewidth=0.8, linestyle=":", label="share of the keys")
        panel.set(title=PANEL[task], xlabel="layer")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set(ylabel="attention on the other modality", ylim=(0, panels[0].get_ylim()[1]))
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_samples(samples, file, per_skill=4):
    """Drawn pictures under their prompts, a row per skill; framed green and ticked if right, red and crossed if not."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    prompts, pictures, right = samples
    n = len(prompts) // len(data.SKILLS)
    per_skill = min(per_skill, n)
    figure, panels = plt.subplots(len(data.SKILLS), per_skill, figsize=(2.2 * per_skill, 2.35 * len(data.SKILLS)),
                                  layout="constrained", squeeze=False)
    for row, skill in enumerate(data.SKILLS):
        for column in range(per_skill):
            i, panel = row * n + column, panels[row, column]
            panel.imshow(pictures[i], interpolation="nearest")
            colour, mark = ("#009E73", "right") if right[i] else ("#D55E00", "wrong")
            panel.set_title(f"{wrap(prompts[i])}\n{mark}", fontsize=8, color=colour)
            panel.set(xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set(color=colour, linewidth=2)
        panels[row, 0].set_ylabel(skill, fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def wrap(text, width=26):
    """Break a prompt into lines for a picture's title."""
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [*lines, word]
    return "\n".join(lines)


def machine():
    """What a number was measured on, to be stored beside it."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":")[1].strip()
                break
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def write_json(content, file):
    """Write aside, then rename: a reader never sees half a file."""
    aside = Path(f"{file}.part")
    try:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): give a file in a folder that exists") from error


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


def load_run(settings, part=""):
    """Model, text tokenizer and settings of a run folder; of public weights, which have no settings, None."""
    dtype = None if settings.dtype == "stored" else getattr(torch, settings.dtype)
    m = model.load(settings.checkpoint, dtype, data.device_of(settings.device), settings.vision_tokenizer,
                   settings.rope_bf16, part=part)
    if not m.tokenizer_file:
        raise InputError(f"{settings.checkpoint} holds no tokenizer: put {' or '.join(model.TOKENIZERS)} there")
    run, own = None, Path(settings.checkpoint) / "settings.json"
    if (Path(settings.checkpoint) / "checkpoints").exists():
        run = model.read_json(own)
    return m, data.Text(m.tokenizer_file, m.config.kind, settings.allow_special), run


@dataclass(frozen=True)
class Score(Loaded):
    """Score a run on held-out combinations of the built-in world."""

    n: int = opt(100, "pictures for each question kind, and prompts for each skill")
    seed: int = opt(0, "draws questions, prompts and codes")
    out: str = opt("", "JSON file; empty: scores.json in the run folder")


def score(settings):
    """Scores of one run, printed and stored."""
    m, text, run = load_run(settings)
    if run is None:
        raise InputError(f"{settings.checkpoint} never saw the built-in world: score takes the folder of a run")
    world = data.World(run["seed"])
    scores = {**score_understanding(m, text, world, settings.n, settings.seed),
              **score_generation(m, text, world, settings.n, settings.seed)[0],
              **score_tokenizer(m, world, 2 * settings.n, settings.seed)}
    print_scores(scores)
    write_json(scores, settings.out or Path(settings.checkpoint) / "scores.json")
    return scores


def print_scores(scores):
    """Scores as two short tables."""
    for title, key in (("understanding", "und"), ("generation", "gen")):
        rows = scores["und_by_kind" if key == "und" else "gen_by_skill"]
        print(f"{title:20s} {scores[key]:.3f}   " + "   ".join(f"{name} {value:.2f}" for name, value in rows.items()))
    print(f"stricter: f1 {scores['f1']:.3f}, acc+ {scores['acc_plus']:.3f}, circular {scores['circular']:.3f}; "
          f"open questions {scores['open']:.3f}")


@dataclass(frozen=True)
class Generate(Loaded):
    """Draw a picture from a prompt."""

    prompt: str = opt("a red circle above a blue square", "what to draw")
    out: str = opt("picture.png", "PNG file to write")
    aspect: str = opt("1:1", "WIDTH:HEIGHT of the picture; Janus-Pro draws squares only")
    negative: str = opt("", "Emu3: prompt to be guided away from; empty: the model's own")
    guidance: float = opt(0.0, "classifier-free guidance; 0: the model's own, 1: none")
    temperature: float = opt(1.0, "0 takes the likeliest code")
    seed: int = opt(0, "draws the codes")
    scale: int = opt(0, "enlarge each pixel so many times; 0: small pictures to about 240")


def grid_for(aspect, config):
    """Sides (h, w) of the code grid of a drawn picture with an aspect W:H, its area that of the model's square one."""
    try:
        w, h = (int(part) for part in aspect.split(":"))
    except ValueError:
        w = h = 0
    limit = data.MAX_RATIO["emu3"]
    if min(w, h) < 1 or max(w, h) > limit * min(w, h):
        raise InputError(f"--aspect {aspect!r}: give two whole numbers as WIDTH:HEIGHT, up to {limit}:1")
    side = config.image_size * (w * h) ** -0.5                                  # of one unit of W:H, in pixels
    grid = tuple(round(n * side / config.factor) for n in (h, w))               # half to even, as the authors round
    if config.kind == "janus" and grid != config.grid:
        raise InputError(f"--aspect {aspect}: Janus-Pro draws squares only")
    return grid


def generate(settings):
    """Write one picture file."""
    out = Path(settings.out)
    if not out.parent.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--out {out} cannot be written: give a file in an existing folder that ends in .png")
    m, text, _ = load_run(settings)
    pixels = draw(m, text, [settings.prompt], settings.seed, settings.guidance or None, settings.temperature,
                  grid_for(settings.aspect, m.config), settings.negative or None)[0]
    picture = Image.fromarray(data.to_picture(pixels))
    scale = settings.scale or max(240 // max(picture.size), 1)
    size = tuple(side * scale for side in picture.size)
    picture.resize(size, Image.Resampling.NEAREST).save(settings.out)
    print(f"{settings.out}: {picture.width} x {picture.height}, each pixel shown {scale} times, from "
          f"{settings.prompt!r} with seed {settings.seed}")
    return {"out": settings.out, "width": size[0], "height": size[1]}


@dataclass(frozen=True)
class Chat(Loaded):
    """Answer a question about pictures; without a question, talk."""

    image: tuple = opt((), "picture files")
    question: str = opt("", "what to ask; empty: a conversation in the terminal")
    max_new_tokens: int = opt(512, "longest answer in tokens")
    temperature: float = opt(0.0, "0 is greedy")
    top_p: float = opt(1.0, "draw from the fewest words that are so likely together; 1: from all")
    seed: int = opt(0, "draws the words, where the temperature is not 0")


HELP = "/image FILE shows a picture with your next question, /new starts over, /quit or Ctrl-D ends."


def chat(settings):
    """Print one answer, or talk until the end of the input."""
    m, text, _ = load_run(settings)
    preparer = data.Preparer(m, text, training=False)
    generator = torch.Generator(next(m.parameters()).device).manual_seed(settings.seed)
    for path in settings.image:
        data.load_picture(path, m.config.kind)

    def reply(turns, pictures):
        ids, mask, pixels = ask(preparer, [conversation(turns, pictures)])[1:]
        typist = Typist(text)
        m.generate_text(ids, pixels, mask, settings.max_new_tokens, settings.temperature, settings.top_p, generator,
                        typist)
        return typist.end()
    if settings.question:
        return {"answer": reply([(settings.question, None)], settings.image)}
    return {"turns": converse(reply, m.config.kind, list(settings.image))}


def converse(reply, kind, waiting):
    """Questions from the terminal, answered by reply(turns, pictures), until it ends -> their number. The pictures
    `waiting` belong to the next question."""
    print(HELP)
    turns, pictures, answered = [], [], 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return answered
        try:
            if line == "/quit":
                return answered
            if line == "/new":
                turns, pictures, waiting = [], [], []
            elif line.startswith("/image "):
                path = line.removeprefix("/image ").strip()
                data.load_picture(path, kind)
                waiting.append(path)
                print(f"({path} is shown with your next question)")
            elif line.startswith("/"):
                print(HELP)
            elif line:
                marks = line.count("<image>")
                if marks not in (0, len(waiting)):
                    raise InputError(f"{marks} <image> marks for {len(waiting)} new pictures: write one each, or none")
                asked = line if marks else "<image>" * len(waiting) + line
                said = reply([*turns, (asked, None)], [*pictures, *waiting])
                turns, pictures, waiting, answered = [*turns, (asked, said)], [*pictures, *waiting], [], answered + 1
        except InputError as error:                  # of one line: the conversation goes on
            print(f"error: {error}")
        except KeyboardInterrupt:                    # of one answer
            print("\n(stopped; this question is forgotten)")


class Typist:
    """Prints an answer as its tokens come; a character of several tokens appears when it is whole."""

    def __init__(self, text):
        self.text, self.ids, self.shown = text, [], ""

    def __call__(self, token):
        self.ids.append(int(token[0]))
        now = self.text.decode(self.ids).strip()
        if not now.endswith("\ufffd"):
            print(now[len(self.shown):], end="", flush=True)
            self.shown = now

    def end(self):
        """Print what is left, end the line -> the whole answer."""
        now = self.text.decode(self.ids).strip()
        print(now[len(self.shown):], flush=True)
        return now


@dataclass(frozen=True)
class Curves(Loaded):
    """Intensity per layer of both tasks on held-out samples: before AIA, after, and the target."""

    data: str = opt("", "data set of samples, as for train.py --data; empty: held-out scenes of the world")
    n: int = opt(100, "samples for each task")
    decode: bool = opt(False, "measure while the model answers and draws by itself, not on the stored answers")
    seed: int = opt(0, "draws the samples")
    out: str = opt("", "PNG file, its numbers beside it as JSON; empty: curves.png in the run folder, or here")


def curve_command(settings):
    """Write curves.png and curves.json."""
    m, text, run = load_run(settings)
    folder = Path(settings.checkpoint)
    if run is None and not settings.data:
        raise InputError("curves of public weights need --data FILE.jsonl: the built-in world means nothing to them")
    models = {"after" if run else "public": m}
    for name in ("before", "control") if run else ():
        if (folder / name).exists():
            models[name] = load_run(settings, name)[0]
    if settings.data:
        samples = FileBatches(data.FileSource(settings.data, m.config.kind))
    else:
        samples = HeldOut(data.World(run["seed"]), settings.seed)
    chosen = (run["aia_targets"], run["aia_variant"]) if run else ()
    wanted = {task: aia.targets(m.config.layers, task, *chosen) for task in aia.TASKS}
    result = curves(models.items(), data.Preparer(m, text), samples, wanted, settings.n, settings.decode)
    out = Path(settings.out or (folder / "curves.png" if run else "curves.png"))
    plot_curves(result, out)
    write_json(result, out.with_suffix(".json"))
    print_curves(result)
    print(f"{out} and {out.with_suffix('.json')}")
    return {f"aia_{task}": {name: result[task][name]["aia"] for name in models if result[task][name]}
            for task in aia.TASKS}


def print_curves(result):
    """A line per model and task: L_AIA and the mean distance to the target."""
    for task in aia.TASKS:
        for name, row in result[task].items():
            if isinstance(row, dict):
                print(f"{task} {LABEL[name]:26s} L_AIA {row['aia']:.4f}   mean |I - T| "
                      f"{distance(result[task], name):.3f}   share of keys {row['uniform']:.3f}   ntp {row['ntp']:.3f}")


def distance(rows, name):
    """Mean over layers of |intensity - target| of one model."""
    return float(np.abs(np.array(rows[name]["intensity"]) - np.array(rows["target"])).mean())


@dataclass(frozen=True)
class Collect:
    """Put the results of several finished runs into one JSON file, with means over seeds."""

    runs: str = opt("runs/*", "run folders, a pattern")
    out: str = opt("assets/laptop.json", "JSON file to write")


def collect(settings):
    """Read result.json, scores.json and curves.json of each run; write them with mean and range for each preset."""
    rows = []
    for file in sorted(glob.glob(f"{settings.runs}/scores.json")):              # runs on own pictures have none
        row, scores, lines = (json.loads(Path(file).with_name(f"{name}.json").read_text())
                              for name in ("result", "scores", "curves"))
        rows.append(row | {key: scores[key] for key in ("und_by_kind", "gen_by_skill", "f1", "acc_plus", "circular",
                                                  "open")}
                    | {"before": {key: scores["before"][key] for key in ("und", "gen")}}
                    | {"distance": {f"{task} {name}": distance(lines[task], name) for task in aia.TASKS
                                    for name in ("before", "after")}})
    if not rows:
        raise InputError(f"no finished run of the world matches {settings.runs}: train some, then give their folders")
    summary = {}
    for preset in sorted({row["preset"] for row in rows}):
        mine = [row for row in rows if row["preset"] == preset]
        summary[preset] = {key: {"mean": float(np.mean([row[key] for row in mine])),
                                 "min": min(row[key] for row in mine), "max": max(row[key] for row in mine)}
                           for key in ("und", "gen", "reader", "psnr", "seconds", "rss_gb", "aia_gen", "aia_und")}
        for group in ("und_by_kind", "gen_by_skill", "before", "distance"):
            names = mine[0][group]
            summary[preset][group] = {name: float(np.mean([row[group][name] for row in mine])) for name in names}
        print(f"{preset}, {len(mine)} seeds: " + ", ".join(
            f"{key} {summary[preset][key]['mean']:.3f}" for key in ("und", "gen", "reader", "seconds", "rss_gb")))
    write_json({"summary": summary, "runs": rows}, settings.out)
    return {"out": settings.out, "runs": len(rows)}


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory, against what people would otherwise run
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bench:
    """Measure speed and memory; rivals in one run, in turn."""

    POSITIONAL = ("table",)
    table: str = opt("generate", "generate: answers and drawings; train: steps and memory of training; processes: one "
                     "and two of them, and waiting for data; data: a million records; fits: memory of training large "
                     "models on one GPU, computed", ("generate", "train", "processes", "data", "fits"))
    repeats: int = opt(5, "interleaved measurements of each side; the median counts")
    tokens: int = opt(64, "of each answer (generate)")
    threads: int = opt(2, "of PyTorch")
    out: str = opt("", "JSON file to write; empty: assets/bench-TABLE.json")


PROMPT = 12                                         # tokens of each prompt
WIDE = {"layers": 6, "width": 512, "ffn": 1376, "heads": 8, "kv_heads": 8, "head_dim": 64}


class Rivals:
    """The same greedy work done by our model of a folder and by transformers': functions of a batch size that return
    new ids, {"text", "image"}."""

    def __init__(self, folder, tokens):
        self.folder, self.tokens = folder, tokens
        values = model.read_config(Path(folder), {})[1]
        self.emu3, self.codebook = values["kind"] == "emu3", values["codebook"]
        self.side = values["image_size"] // 2 ** (len(values["vq_mult"]) - 1)
        file = Path(folder) / "tokenizer.json"
        self.codes, self.ids = self.side ** 2, model.special_ids(model.token_ids(file), values["kind"], file)

    def prompts(self, batch, seed):
        """Random words (batch, PROMPT)."""
        return torch.randint(5, 400, (batch, PROMPT), generator=torch.Generator().manual_seed(seed))

    def drawing_prompts(self, batch):
        """The same between what both sides expect around a prompt of Janus-Pro: BOS first, begin-of-image last."""
        rows = self.prompts(batch, 1)
        rows[:, 0], rows[:, -1] = self.ids["bos"], self.ids["boi"]
        return rows

    def ours(self):
        m = model.load(self.folder)
        m.ids["eos"] = -1                            # both sides write all tokens that are asked for

        def text(batch):
            return m.generate_text(self.prompts(batch, 0), max_new_tokens=self.tokens)

        def image(batch):
            codes = m.generate_images(self.drawing_prompts(batch), negative=self.prompts(1, 2) if self.emu3 else None,
                                      guidance=5.0, temperature=0)
            return m.block(codes).flatten(1) if self.emu3 else codes
        return {"text": text, "image": image}

    def theirs(self):
        import transformers
        transformers.utils.logging.disable_progress_bar()
        m = transformers.AutoModelForImageTextToText.from_pretrained(self.folder).eval()
        m.generation_config.max_length = None
        common = {"do_sample": False, "eos_token_id": None, "pad_token_id": self.ids["pad"]}
        row, first = self.side + 1, self.ids.get("visual", 0)
        visual = list(range(first, first + self.codebook))
        if not self.emu3:
            m.model.vision_model.config.num_image_tokens = self.codes           # how many codes it draws

        def text(batch):
            rows, kind = self.prompts(batch, 0), {} if self.emu3 else {"generation_mode": "text"}
            return m.generate(input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=self.tokens,
                              **common, **kind)[:, PROMPT:]

        def image(batch):
            rows, away = self.drawing_prompts(batch), self.prompts(1, 2).expand(batch, -1)
            if not self.emu3:
                return m.generate(inputs=rows, attention_mask=torch.ones_like(rows), generation_mode="image",
                                  guidance_scale=5, **common)

            def allowed(_, seen):
                return visual if (len(seen) - PROMPT + 1) % row else [self.ids["eol"]]
            return m.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=self.side * row,
                guidance_scale=5.0, negative_prompt_ids=away, negative_prompt_attention_mask=torch.ones_like(away),
                prefix_allowed_tokens_fn=allowed, **common)[:, PROMPT:]
        return {"text": text, "image": image}


def bench(settings):
    """Measure one table."""
    import transformers
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    tables = {"generate": bench_generate, "train": bench_train, "processes": bench_processes, "data": bench_data,
              "fits": bench_fits}
    result, rows = tables[settings.table](settings)
    write_json({"result": result, "rows": rows, "settings": vars(settings),
                "machine": machine() | {"transformers": transformers.__version__}},
               settings.out or f"assets/bench-{settings.table}.json")
    return result


def bench_generate(settings):
    """Tokens per second of both sides, for text and guided pictures, batch 1 and 8, and peak memory of fresh
    processes -> the worst ratios of the tiny presets, and all rows."""
    import train  # the one import against the order: it makes the tokenizer
    rows, models = [], {name: model.PRESETS[name] for name in ("tiny-emu3", "tiny-janus")}
    models |= {f"{name} 6 x 512": replace(config, **WIDE, init_std=0.02) for name, config in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in models.items():
            torch.manual_seed(0)
            m = model.from_config(config)
            m.tokenizer_file = train.train_tokenizer(Path(folder) / "tokenizer.json", config).file
            model.save(m, Path(folder) / name)
            rivals, row = Rivals(Path(folder) / name, settings.tokens), {"model": name, "bar": name in model.PRESETS}
            ours, theirs = rivals.ours(), rivals.theirs()
            for what, batch in [(what, batch) for what in ("text", "image") for batch in (1, 8)]:
                n = batch * (settings.tokens if what == "text" else rivals.codes)
                works = {"ours": functools.partial(ours[what], batch), "theirs": functools.partial(theirs[what], batch)}
                same = torch.equal(works["ours"](), works["theirs"]())
                seconds = interleaved(works, settings.repeats)
                rows.append(row | {"what": what, "batch": batch, "ours": n / seconds["ours"],
                                   "theirs": n / seconds["theirs"], "ratio": seconds["theirs"] / seconds["ours"],
                                   "same_tokens": same})
            memory = {side: fresh_memory(rivals, side, settings.threads) for side in ("ours", "theirs")}
            rows.append(row | {"what": "memory", "batch": 8, **memory, "ratio": memory["ours"] / memory["theirs"]})
    for row in rows:
        unit = "GB" if row["what"] == "memory" else "tokens/s"
        print(f"{row['model']:18s} {row['what']:6s} batch {row['batch']}   ours {row['ours']:8.5g}   transformers "
              f"{row['theirs']:8.5g} {unit:8s}   ratio {row['ratio']:.2f}"
              + ("" if row.get("same_tokens", True) else "   (other tokens)"))

    def worst(what, choose, batch):
        return choose(row["ratio"] for row in rows if (row["what"], row["batch"], row["bar"]) == (what, batch, True))
    result = {"text_speed": [worst("text", min, 1), worst("text", min, 8)],
              "image_speed": [worst("image", min, 1), worst("image", min, 8)], "memory": worst("memory", max, 8)}
    return result, rows


def interleaved(works, repeats):
    """{name: function}, run in turn -> {name: median seconds}."""
    seconds = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def fresh_memory(rivals, side, threads):
    """Largest resident memory in 1e9 bytes of a new process that loads the folder, answers and draws, batch 8."""
    return fresh(f"work = eval.Rivals({str(rivals.folder)!r}, {rivals.tokens}).{side}(); work['text'](8); "
                 "work['image'](8); print(eval.resident('VmHWM'))", threads)[0]


def fresh(script, threads):
    """Numbers that a script prints in a new Python process, where it finds `eval`."""
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch, eval; " \
        f"torch.set_num_threads({threads}); "
    # Blocks of a megabyte go back to the system when they are freed; else the heap's holes add 5 % by chance.
    done = subprocess.run([sys.executable, "-c", setup + script], capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
    if done.returncode:
        raise RuntimeError(f"a measurement failed: {done.stderr.strip().splitlines()[-1]}")
    return [float(word) for word in done.stdout.split()]


def resident(field):
    """VmRSS (now) or VmHWM (largest so far) of this process, in 1e9 bytes. (The peak that getrusage tells of a new
    process is at least that of the process which started it.)"""
    return next(int(line.split()[1]) * 1024 / 1e9 for line in open("/proc/self/status") if line.startswith(field))


# Training: six layers of width 512, one sample, all tokens labelled; a third of it is the prompt, the rest the picture.
TRAINED = {**WIDE, "vocab": 8000, "init_std": 0.02, "embed_std": 0.02, "context": 10_000}
VARIANTS = {"plain": "next-token prediction", "aia": "NTP + AIA, fused",
            "checkpointed": "NTP + AIA, recomputing layers", "explicit": "NTP + AIA, explicit attention",
            "released": "the released recipe"}
# Who is measured several times, in turn. One step in a fresh process gives everybody's memory, and the time of the
# others. At 8,192 tokens the two with maps are extrapolated: those do not fit.
INTERLEAVED = {512: ("plain", "aia", "explicit", "released"), 1576: ("plain", "aia", "explicit", "released"),
               3000: ("plain", "aia", "released"), 8192: ()}
WITH_MAPS = ("explicit", "released")


class Step:
    """One training step of train.py on one sample of `length` tokens, in one of five manners."""

    def __init__(self, variant, length, config=None):
        import train
        torch.manual_seed(0)
        attention = "explicit" if variant == "explicit" else "fused"
        config = replace(config or replace(model.TINY_EMU3, **TRAINED), attention=attention)
        self.variant, self.m = variant, model.from_config(config).train()
        self.m.lm.checkpoint_activations = variant == "checkpointed"
        self.train, self.optimizer = train, train.make_optimizer(self.m, train.LARGE[0])
        self.targets = {task: aia.targets(config.layers, task) for task in aia.TASKS}
        self.batch = self.sample(length)
        self(self.sample(16))                        # makes the moments, warms up

    def sample(self, length):
        tokens = torch.randint(self.m.config.vocab, (1, length), generator=torch.Generator().manual_seed(1))
        place = torch.arange(length)[None]
        return data.Batch("gen", tokens, tokens, place < length // 3, place >= length // 3, torch.ones(1).bool())

    def __call__(self, batch=None):
        batch = batch or self.batch
        if self.variant == "released":
            released_loss(self.m, batch, *self.targets["gen"], weight=5.0).backward()
        else:
            weights = None if self.variant == "plain" else {"gen": 5.0}
            self.train.accumulate(self.m, [batch], self.targets, weights)
        torch.nn.utils.clip_grad_norm_([p for p in self.m.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self):
        """Seconds of one step, GB at its peak, and above weights and moments, which a short step has made."""
        before, start = resident("VmRSS"), time.perf_counter()
        self()
        return time.perf_counter() - start, resident("VmHWM"), resident("VmHWM") - before


def released_loss(m, batch, target, delta, weight):
    """The authors' manner, written anew: eager attention that returns the map of every layer, a loop over layers and
    samples that cuts out queries and keys, a Huber loss for each, and logits of all tokens."""
    maps = []

    def keep_map(q, k, v, visible, condition):
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~causal, -torch.inf)
        maps.append(scores.softmax(-1))                                         # (B, H, T, T)
        return maps[-1] @ v, None
    for layer in m.lm.layers:
        layer.self_attn.attend = keep_map
    logits = m.lm_head(m.lm(m.embed(batch))[0])                                 # (B, T, V)
    ntp = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    total = 0.0
    for layer, attention in enumerate(maps):
        for b in range(len(batch.tokens)):
            rows, keys = batch.queries[b].nonzero()[:, 0], batch.condition[b].nonzero()[:, 0]
            share = attention[b][:, rows][:, :, keys].float().sum(-1).mean()
            total = total + torch.nn.functional.huber_loss(share, target[layer], delta=delta[layer].item())
    return ntp + weight * total / (len(maps) * len(batch.tokens))


def bench_train(settings):
    """Seconds and memory of the real training step against plain next-token prediction, against explicit attention and
    against the released recipe; against transformers; against the peak of matrix products; the loss head; padding."""
    rows = []
    for length, names in INTERLEAVED.items():
        seconds = interleaved({name: Step(name, length) for name in names}, settings.repeats)
        for name in VARIANTS:
            if names or name not in WITH_MAPS:
                once, peak, above = fresh(f"print(*eval.Step({name!r}, {length}).measure())", settings.threads)
                values, how = (seconds.get(name, once), peak, above), "median" if name in seconds else "once"
            else:               # a quadratic in tokens through the three shorter lengths
                points = [[row[key] for row in rows if row["variant"] == name]
                          for key in ("tokens", "seconds", "peak_gb", "above_weights_gb")]
                values = [float(np.polyval(np.polyfit(points[0], y, 2), length)) for y in points[1:]]
                how = "extrapolated"
            row = dict(zip(("seconds", "peak_gb", "above_weights_gb"), values, strict=True))
            rows.append({"variant": name, "tokens": length, **row, "how": how})
            print(f"{length:5d} tokens   {VARIANTS[name]:32s} {values[0]:7.2f} s   peak {values[1]:6.2f} GB   above "
                  f"weights {values[2]:6.2f} GB" + f"   ({how})" * (how != "median"), flush=True)

    def get(variant, length, key):
        return next(row[key] for row in rows if (row["variant"], row["tokens"]) == (variant, length))
    # Growth of memory: slope of log bytes over log tokens, by least squares over what was measured.
    exponent = {name: float(np.polyfit(*np.log([(row["tokens"], row["above_weights_gb"]) for row in rows if
                                                row["variant"] == name and row["how"] != "extrapolated"]).T, 1)[0])
                for name in VARIANTS}
    print("memory above weights grows with tokens to the power of "
          + ", ".join(f"{power:.2f} ({VARIANTS[name]})" for name, power in exponent.items()))
    speed, head, padding = against_transformers(settings), bench_head(settings), padding_shares()
    rows += [{"exponent": exponent}, speed, head, padding]
    return {"aia_time_1576": get("aia", 1576, "seconds") / get("plain", 1576, "seconds"),
            "aia_time_3000": get("aia", 3000, "seconds") / get("plain", 3000, "seconds"),
            "aia_memory_3000": get("aia", 3000, "peak_gb") / get("plain", 3000, "peak_gb"),
            "released_time_3000": get("released", 3000, "seconds") / get("aia", 3000, "seconds"),
            "released_memory_3000": get("released", 3000, "above_weights_gb") / get("aia", 3000, "above_weights_gb"),
            "memory_exponent": exponent["aia"], "transformers_train": speed["ours"] / speed["transformers"],
            "matmul_share": speed["step_flops"] / speed["matmul_flops"],
            "head_gib": head["chunked"]["gb"] * 1e9 / 2**30}, rows


# Bytes of a parameter that moves (weight, gradient, two moments; beside float32 weights autocast keeps a copy in
# bfloat16), of one that stands still (4 in the picture tokenizer), and of a layer's input per channel.
MANNERS = {"AdamW in float32": (4 + 4 + 8 + 2, 4, 4), "--pure-bf16": (2 + 2 + 4, 2, 2),
           "--lora-rank 16": (4 + 4 + 8, 2, 2)}
CARDS = (24, 48, 80)                                # GB; a tenth stays free for CUDA itself and for gaps


def bench_fits(settings):
    """Memory of training on one GPU, one sample at a time with --checkpoint-activations: computed, nothing is run. The
    part that grows with tokens is an estimate."""
    import train
    rows = []
    for preset in ("janus-pro-1b", "janus-pro-7b", "emu3-8b"):
        for manner, (moves, still, stream) in MANNERS.items():
            c = replace(model.PRESETS[preset], lora_rank=16 * manner.startswith("--lora"))
            with torch.device("meta"):
                m = model.MODELS[c.kind](c)
            train.freeze(m, train.LARGE[0])
            held = sum(p.numel() * (moves if p.requires_grad else 4 if name.startswith("vq.") else still)
                       for name, p in m.named_parameters()) / 1e9
            # inputs of L layers, T C each + what one layer keeps while it is recomputed, T (20 C + 4 ffn) in bfloat16
            # + the logits of a chunk of tokens, their softmax and gradient
            peak = {tokens: held + (tokens * (c.layers * c.width * stream + 2 * (20 * c.width + 4 * c.ffn))
                                    + 3 * 4 * model.CHUNK * c.vocab) / 1e9 for tokens in (3000, 8282)}
            fits = {tokens: next((card for card in CARDS if gb <= 0.9 * card), None) for tokens, gb in peak.items()}
            moving = sum(p.numel() for p in m.parameters() if p.requires_grad)
            rows.append({"preset": preset, "manner": manner, "moving": moving, "held_gb": held, "peak_gb": peak,
                         "fits": fits})
            print(f"| {preset} | {manner} | {moving / 1e6:,.0f} M | {held:.1f} | "
                  + " | ".join(f"{gb:.1f} ({fits[tokens] or 'more than 80'})" for tokens, gb in peak.items()) + " |")
    return {row["preset"]: row["peak_gb"][3000] for row in rows if row["manner"].startswith("--lora")}, rows


def against_transformers(settings):
    """Tokens/s of our plain step and of transformers' on 1,576 tokens, and FLOP/s of ours and of matrix products."""
    import transformers
    ours = Step("plain", 1576)
    config, theirs = ours.m.config, llama_step(transformers, ours.m.config, ours.batch.tokens)
    a, b = torch.randn(2, 1024, 1024)
    theirs()
    # The two are close: more repeats than elsewhere.
    seconds = interleaved({"ours": ours, "theirs": theirs, "product": lambda: [a @ b for _ in range(40)]},
                          2 * settings.repeats - 1)
    speed = {"ours": 1576 / seconds["ours"], "transformers": 1576 / seconds["theirs"],
             "matmul_flops": 40 * 2 * 1024**3 / seconds["product"],
             "step_flops": step_flops(config, 1576) / seconds["ours"]}
    print(f"1576 tokens   ours {speed['ours']:.0f} tokens/s, transformers {speed['transformers']:.0f}; matrix products "
          f"{speed['matmul_flops'] / 1e9:.0f} GFLOP/s, the step {speed['step_flops'] / 1e9:.0f}")
    return speed


def bench_head(settings):
    """GB and seconds of the next-token loss, forward and backward, at Emu3's vocabulary: with all logits for 2,048
    tokens, and ours for 8,192."""
    head = {}
    for name, tokens in (("plain", 2048), ("chunked", 8192)):
        gb, seconds = fresh(f"print(*eval.head_cost({tokens}, {name == 'chunked'}))", settings.threads)
        head[name] = {"tokens": tokens, "gb": gb, "seconds": seconds}
        times = 8192 // tokens
        scaled = f"   (scaled to 8192: {gb * times:.1f} GB, {seconds * times:.1f} s)" * (times > 1)
        print(f"loss head, 184,622 words of width 256, {name:7s} {tokens} tokens: {gb:.2f} GB above inputs and "
              f"gradients, {seconds:.1f} s{scaled}")
    return head


def padding_shares(micro_batch=8, samples=64):
    """Share of padding in conversations of the world, in order of arrival and as train.py sorts them in a step."""
    import train
    with tempfile.TemporaryDirectory() as folder:
        preparer = data.Preparer(model.build("tiny-emu3"), train.train_tokenizer(Path(folder) / "tokenizer.json",
                                                                                 model.TINY_EMU3))
    plan = data.Schedule(data.WorldSource(data.World(0), 1000, 0), preparer, 0, samples, (0, 1), micro_batch)
    shares = {"arrival": [], "by length": []}
    for step in range(10):
        first = range(step * samples, (step + 1) * samples, micro_batch)
        for name, groups in (("arrival", [range(i, i + micro_batch) for i in first]),
                             ("by length", [positions for _, positions in plan.groups(step)])):
            for positions in groups:
                lengths = preparer.batch([plan.record("und", position)[0] for position in positions]).lengths
                shares[name].append((sum(lengths), len(lengths) * max(lengths)))
    padding = {name: 1 - sum(used for used, _ in pairs) / sum(room for _, room in pairs)
               for name, pairs in shares.items()}
    print(f"padding in micro-batches of {micro_batch} conversations of the world: {padding['arrival']:.3f} in order of "
          f"arrival, {padding['by length']:.3f} by length within steps of {samples}")
    return {"padding": padding}


def llama_step(transformers, c, tokens):
    """The same step of a LlamaForCausalLM of the same sizes, as people would write it."""
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, tie_word_embeddings=False,
        attn_implementation="sdpa", max_position_embeddings=c.context, use_cache=False)
    m = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(m.parameters(), lr=2e-5, fused=True)          # as transformers' Trainer sets it

    def step():
        m(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_flops(c, length):
    """Model FLOPs of a training step on one sample: for each token 6 for each weight of a matrix (2 forward, 4
    backward), and 12 for each attended pair and channel, of which causal attention has half."""
    inner, shared = c.heads * c.head_dim, c.kv_heads * c.head_dim
    weights = c.layers * (2 * c.width * inner + 2 * c.width * shared + 3 * c.width * c.ffn) + c.width * c.vocab
    return 6 * weights * length + 12 * c.layers * inner * length**2 / 2


def head_cost(tokens, chunked):
    """Peak GB of the next-token loss at Emu3's vocabulary, above its inputs and their gradients, and its seconds."""
    head = torch.nn.Linear(256, model.EMU3_8B.vocab, bias=False)
    x, target = torch.randn(tokens, 256, requires_grad=True), torch.randint(model.EMU3_8B.vocab, (tokens,))
    before = resident("VmRSS") + (head.weight.nbytes + x.nbytes) / 1e9          # the latter for the gradients
    start = time.perf_counter()
    if chunked:
        model.next_token_loss(x, head, target).backward()
    else:
        torch.nn.functional.cross_entropy(head(x), target, reduction="sum").backward()
    return resident("VmHWM") - before, time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# Speed of several processes, and what the loop waits for
# ---------------------------------------------------------------------------------------------------------------------
def timed_process(rank, world, parallel, repeats, folder):
    """One of `world` processes with a thread each: seconds of steps on 4 x 512 tokens, as --parallel takes them, and
    with a model of its own, so that nothing but two sums of a few numbers is sent."""
    import train
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet-{parallel}", rank=rank, world_size=world)

    def worker(parallel):
        step = Step("aia", 512)
        net, batches = step.m, [step.batch] * (4 // world)
        if parallel == "ddp":
            net = train.DistributedDataParallel(step.m, forward_sync_buffers=False)
        elif parallel == "fsdp":
            train.freeze(step.m, train.LARGE[0])
            train.shard_model(step.m, train.TrainConfig(parallel="fsdp"), ("vq",), "cpu")
        optimizer = train.make_optimizer(step.m, train.LARGE[0])

        def work():
            train.accumulate(net, batches, step.targets, {"gen": 5.0})
            torch.nn.utils.clip_grad_norm_([p for p in step.m.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return work
    works = {"together": worker(parallel), "apart": worker("")}
    for work in works.values():
        work()
    seconds = interleaved(works, repeats)
    if rank == 0:
        write_json({"tokens_per_second": 4 * 512 / seconds["together"],
                    "communication": 1 - seconds["apart"] / seconds["together"]}, f"{folder}/{parallel}-{world}.json")


def bench_processes(settings):
    """Tokens per second of one process and of two, the share of a step that goes into working together, and that in
    which the loop waits for its data."""
    rows, result = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for world, parallel in ((1, "one"), (2, "ddp"), (2, "fsdp")):
            torch.multiprocessing.spawn(timed_process, (world, parallel, settings.repeats, folder), nprocs=world)
            row = json.loads((Path(folder) / f"{parallel}-{world}.json").read_text())
            rows.append({"processes": world, "parallel": parallel, **row})
            result[parallel] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
            print(f"{world} process{'es' * (world > 1):2s} {parallel:5s} {row['tokens_per_second']:6.0f} tokens/s, "
                  f"{result[parallel]:.2f} of one; {row['communication']:.2f} of a step is communication")
        for what, share in waiting(Path(folder)).items():
            rows.append({"data": what, "waiting": share})
            result[f"waiting_{what}"] = share
            print(f"waiting for data, {what}: {share:.4f} of a step (median of 100)")
    return result, rows


def waiting(folder):
    """Share of a step of tiny-emu3 in which it waits for its batches: from the world, and the same world in shards."""
    import tarfile

    import train
    data.export(data.Export(str(folder / "world"), 400))
    with tarfile.open(folder / "world.tar", "w") as tar:
        for line in (folder / "world/train.jsonl").read_text().splitlines():
            record = json.loads(line)
            (folder / "record").write_text(line)
            tar.add(folder / "world" / record["image"], f"{record['id']}.png")
            tar.add(folder / "record", f"{record['id']}.json")
    m, shares = model.build("tiny-emu3").train(), {}
    text = train.train_tokenizer(folder / "tokenizer.json", m.config)
    sources = {"world": data.WorldSource(data.World(0), 8000, 0),
               "shards": data.FileSource(folder / "world.tar", "emu3")}
    targets = {task: aia.targets(m.config.layers, task) for task in aia.TASKS}
    for name, source in sources.items():
        optimizer, found = train.make_optimizer(m, train.JOINT), []
        steps = data.Schedule(source, data.Preparer(m, text), 0, 32, (1, 1), 64).steps(0, 101)
        for _ in range(101):
            start = time.perf_counter()
            batches = next(steps)
            waited = time.perf_counter() - start
            train.accumulate(m, batches, targets, {"gen": 5.0, "und": 5.0})
            optimizer.step()
            optimizer.zero_grad()
            found.append(waited / (time.perf_counter() - start))
        shares[name] = float(np.median(found[1:]))          # nothing was prepared before the first
    return shares


def made_up_records(folder, lines, samples):
    """JSON lines over 100 small pictures, and shards of 1,000 samples with a caption each."""
    import io
    import tarfile
    pictures = data.draw([(data.Thing("circle", "red", 0),)] * 100)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")
    with open(folder / "lines.jsonl", "w") as out:
        for i in range(lines):
            asked, answered = f"picture {i}", "<image>" if i % 2 else str(i)
            said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
            out.write(json.dumps({"image": f"{i % 100}.png", "conversations": said}) + "\n")
    (folder / "shards").mkdir()
    for shard in range(samples // 1000):
        with tarfile.open(folder / f"shards/{shard:05d}.tar", "w") as tar:
            for i in range(1000):
                for ending, content in (("png", (folder / f"{i % 100}.png").read_bytes()), ("txt", b"a red circle")):
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def reading_cost(path, n=20_000):
    """Seconds to open an indexed data set, records/s at random places, and GB of memory before and after."""
    start, before = time.perf_counter(), resident("VmRSS")
    source = data.FileSource(path, "janus")
    opened = time.perf_counter()
    count = source.count("gen")
    for i in range(n):
        source.record("gen", data.shuffled(i % count, count, (0, 0)))
    return opened - start, n / (time.perf_counter() - opened), before, resident("VmRSS")


def bench_data(settings):
    """Indexing and random reading of a million JSON lines, and of 20,000 samples in tar shards."""
    rows, result = [], {}
    with tempfile.TemporaryDirectory() as folder:
        made_up_records(Path(folder), 1_000_000, 20_000)
        for name, records in (("lines.jsonl", 1_000_000), ("shards", 20_000)):
            path, start = f"{folder}/{name}", time.perf_counter()
            data.index(data.Index((path,)))
            row = {"data": name, "records": records, "index_seconds": time.perf_counter() - start}
            opened, rate, before, after = fresh(f"print(*eval.reading_cost({path!r}))", 1)
            rows.append(row | {"open_seconds": opened, "records_per_second": rate, "gb_before": before,
                               "gb_after": after})
            result |= {f"{name}_index_seconds": row["index_seconds"], f"{name}_records_per_second": rate}
            print(f"{name}: {records} records indexed in {row['index_seconds']:.0f} s, opened in {opened:.3f} s, "
                  f"{rate:.0f} records/s at random, memory {before:.2f} -> {after:.2f} GB")
    return result, rows


COMMANDS = {"score": (Score, score), "generate": (Generate, generate), "chat": (Chat, chat),
            "curves": (Curves, curve_command), "collect": (Collect, collect), "bench": (Bench, bench)}


def main(argv=None):
    command, settings = data.chosen(COMMANDS, "eval.py", __doc__, argv)
    if command:
        if not vars(settings).get("checkpoint", "none needed"):
            raise InputError("this command needs --checkpoint, the folder of a run")
        print("result " + json.dumps(command(settings)))


if __name__ == "__main__":
    data.run(main)
