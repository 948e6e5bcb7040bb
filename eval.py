"""How a trained model is judged: pictures from prompts, answers about pictures, scores, and the curves of the paper.

Drawn pictures are read back exactly (data.read) and scored in GenEval's six skills; answers are scored in the manner of
POPE, MME and MMBench. Everything is asked about held-out combinations (data.World).

    python eval.py score    --checkpoint runs/tiny-emu3-seed0
    python eval.py generate --checkpoint runs/tiny-emu3-seed0 --prompt "a red circle above a blue square" --out red.png
    python eval.py chat     --checkpoint runs/tiny-emu3-seed0 --image red.png --question "is there a circle?"
    python eval.py curves   --checkpoint runs/tiny-emu3-seed0
    python eval.py collect  --runs "runs/tiny-*"
"""

import glob
import json
import os
import sys
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


def draw(m, text, prompts, seed=0, guidance=None, temperature=1.0, size=None, batch=128):
    """Prompts -> pixels (n, 3, S, S) in [-1, 1], on the CPU. Same seed, same pictures."""
    preparer, device = data.Preparer(m, text, training=False), next(m.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    size, config, pixels = size or m.config.grid, m.config, []
    negative = None
    if config.kind == "emu3" and guidance != 1:
        negative = left_padded([preparer.template.prompt(config.negative, size)], text.ids["pad"], device)[0]
    for start in range(0, len(prompts), batch):
        pieces = [preparer.template.prompt(prompt + config.suffix, size) for prompt in prompts[start:start + batch]]
        ids, mask = left_padded(pieces, text.ids["pad"], device)
        codes = m.generate_images(ids, mask, size, negative, guidance, temperature, generator=generator)
        pixels.append(m.decode_images(codes).cpu())
    return torch.cat(pixels)


def answer(m, text, asked, max_new_tokens=16, temperature=0.0, batch=128):
    """Questions [(picture, question)] -> answers. A picture is a path or an array (S, S, 3) uint8."""
    preparer, device = data.Preparer(m, text, training=False), next(m.parameters()).device
    answers = []
    for start in range(0, len(asked), batch):
        part = asked[start:start + batch]
        pictures, pixels = [picture for picture, _ in part], None
        if m.config.kind == "janus":
            loaded = [data.janus_reading(data.load_picture(p, "janus"), m.config) for p in pictures]
            pixels, codes = torch.stack(loaded).to(device), [None] * len(part)
        else:
            codes = preparer.codes(pictures)
        turns = [data.question_parts([(question, None)], 1) for _, question in part]
        pieces = [preparer.template.understanding(turn, [code]) for turn, code in zip(turns, codes, strict=True)]
        ids, mask = left_padded(pieces, text.ids["pad"], device)
        new = m.generate_text(ids, pixels, mask, max_new_tokens, temperature)
        answers += [text.decode(row).strip() for row in new.tolist()]
    return answers


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
                first, *others = data.rotations(data.question(scene, kind, rng))
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
    """The first samples of a JSON-lines file, for curves and losses on a user's own pictures.

    Records that cannot be used are added to the list `bad` and left out; without a list they stop the command.
    """

    def __init__(self, source, bad=None):
        self.source, self.bad = source, bad

    def batches(self, preparer, task, n, batch=8):
        records = self.source.records[task][:n]
        for start in range(0, len(records), batch):
            positions = range(start, min(start + batch, len(records)))
            yield data.usable_batch(preparer, lambda i: (records[i], None), positions, bad=self.bad)


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
    for batch in batches:
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


def curves(models, preparer, samples, targets, n=100):
    """Both tasks of several models {name: m} with one picture tokenizer, and their targets -> one JSON-ready dict."""
    result = {}
    for task in aia.TASKS:
        target, delta = targets[task]
        batches = [batch for batch in samples.batches(preparer, task, n) if batch]
        # JSON has no infinity: without Huber, delta is null.
        result[task] = {"target": target.tolist(), "delta": [d if d < float("inf") else None for d in delta.tolist()]}
        for name, m in models.items():
            result[task][name] = measure(m, batches, target, delta)
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
def device_of(name):
    """--device: "auto" takes CUDA where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available here: use cpu, or auto") from error
    return name


@dataclass(frozen=True)
class Loaded:
    """Where the model of a command comes from."""

    checkpoint: str = opt("", "run folder of train.py, or a folder or hub id of public weights")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model")
    dtype: str = opt("stored", "of the weights", ("stored", "float32", "bfloat16"))
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")


def load_run(settings, file="checkpoint.pt"):
    """Model, text tokenizer and settings of a run folder; of public weights, which have no settings, None."""
    dtype = None if settings.dtype == "stored" else getattr(torch, settings.dtype)
    m = model.load(settings.checkpoint, dtype, device_of(settings.device), settings.vision_tokenizer, file=file)
    if not m.tokenizer_file or m.tokenizer_file.name != "tokenizer.json":
        raise InputError(f"{settings.checkpoint} holds no tokenizer.json: put that of its -hf version there")
    run, own = None, Path(settings.checkpoint) / "settings.json"
    if (Path(settings.checkpoint) / file).exists():
        try:
            run = json.loads(own.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{own} cannot be read ({error}): give the folder of a run") from error
    return m, data.Text(m.tokenizer_file, m.config.kind), run


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
    guidance: float = opt(0.0, "classifier-free guidance; 0: the model's own, 1: none")
    temperature: float = opt(1.0, "0 takes the likeliest code")
    seed: int = opt(0, "draws the codes")
    scale: int = opt(0, "enlarge each pixel so many times; 0: small pictures to about 240")


def generate(settings):
    """Write one picture file."""
    out = Path(settings.out)
    if not out.parent.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--out {out} cannot be written: give a file in an existing folder that ends in .png")
    m, text, _ = load_run(settings)
    pixels = draw(m, text, [settings.prompt], settings.seed, settings.guidance or None, settings.temperature)[0]
    picture = Image.fromarray(data.to_picture(pixels))
    scale = settings.scale or max(240 // max(picture.size), 1)
    size = tuple(side * scale for side in picture.size)
    picture.resize(size, Image.Resampling.NEAREST).save(settings.out)
    print(f"{settings.out}: {picture.width} x {picture.height}, each pixel shown {scale} times, from "
          f"{settings.prompt!r} with seed {settings.seed}")
    return {"out": settings.out, "width": size[0], "height": size[1]}


@dataclass(frozen=True)
class Chat(Loaded):
    """Answer a question about a picture."""

    image: str = opt("", "picture file")
    question: str = opt("", "what to ask")
    max_new_tokens: int = opt(64, "longest answer in tokens")
    temperature: float = opt(0.0, "0 is greedy")


def chat(settings):
    """Print one answer."""
    if not settings.image or not settings.question:
        raise InputError("chat needs --image FILE and --question TEXT")
    m, text, _ = load_run(settings)
    reply = answer(m, text, [(settings.image, settings.question)], settings.max_new_tokens, settings.temperature)[0]
    print(reply)
    return {"answer": reply}


@dataclass(frozen=True)
class Curves(Loaded):
    """Intensity per layer of both tasks on held-out samples: before AIA, after, and the target."""

    data: str = opt("", "JSON-lines file of samples; empty: held-out scenes of the world")
    n: int = opt(100, "samples for each task")
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
        if (folder / f"{name}.pt").exists():
            models[name] = load_run(settings, f"{name}.pt")[0]
    if settings.data:
        samples = FileBatches(data.FileSource(settings.data, m.config.kind))
    else:
        samples = HeldOut(data.World(run["seed"]), settings.seed)
    chosen = (run["aia_targets"], run["aia_variant"]) if run else ()
    wanted = {task: aia.targets(m.config.layers, task, *chosen) for task in aia.TASKS}
    result = curves(models, data.Preparer(m, text), samples, wanted, settings.n)
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


COMMANDS = {"score": (Score, score), "generate": (Generate, generate), "chat": (Chat, chat),
            "curves": (Curves, curve_command), "collect": (Collect, collect)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return
    if argv[0] not in COMMANDS:
        raise InputError(f"eval.py knows no command {argv[0]!r}: use one of {', '.join(COMMANDS)}")
    cls, command = COMMANDS[argv[0]]
    settings = data.parse(cls, argv[1:], f"eval.py {argv[0]}")
    if "checkpoint" in vars(settings) and not settings.checkpoint:
        raise InputError(f"eval.py {argv[0]} needs --checkpoint, the folder of a run")
    print("result " + json.dumps(command(settings)))


if __name__ == "__main__":
    data.run(main)
