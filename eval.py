"""How a trained model is judged: pictures from prompts, answers about pictures, scores, and the curves of the paper.

Drawn pictures are read back exactly (data.read) and scored in GenEval's six skills; answers are scored in the manner of
POPE, MME and MMBench. Everything is asked about held-out combinations (data.World).

    python eval.py score    --checkpoint runs/tiny-emu3-seed0
    python eval.py generate --checkpoint runs/tiny-emu3-seed0 --prompt "a red circle above a blue square" --out red.png
    python eval.py chat     --checkpoint runs/tiny-emu3-seed0 --image red.png --question "is there a circle?"
    python eval.py curves   --checkpoint runs/tiny-emu3-seed0
    python eval.py figures  runs/tiny-emu3-seed0 runs/tiny-janus-seed0
    python eval.py alignment --checkpoint runs/tiny-emu3-seed0
    python eval.py report   runs/tiny-emu3-seed0
    python eval.py collect  --runs "runs/tiny-*"
    python eval.py score pope --data POPE --preds answers.jsonl --out scores/pope
    python eval.py bench generate            # or train, processes, data, fits, score
"""

import ast
import base64
import contextlib
import csv
import functools
import glob
import hashlib
import html
import inspect
import io
import itertools
import json
import os
import platform
import random
import re
import string
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, namedtuple
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import aia
import data
import model
from aia import InputError
from data import opt
from parts import kernels

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
    """Prompts -> pixels (n, 3, S, S) in [-1, 1], on the CPU. Same seed and prompts, same pictures."""
    generator, pixels = torch.Generator(next(m.parameters()).device).manual_seed(seed), []
    for start in range(0, len(prompts), batch):
        codes = draw_codes(m, text, prompts[start:start + batch], generator, guidance, temperature, size, negative,
                           roles)
        pixels.append(m.decode_images(codes).cpu())
    return torch.cat(pixels)


def draw_codes(m, text, prompts, generator=None, guidance=None, temperature=1.0, size=None, negative=None,
               roles="tags"):
    """Prompts -> codes as m.generate_images gives them. negative None: the model's own negative prompt."""
    template, device = data.TEMPLATES[m.config.kind](m.config, text, training=False), next(m.parameters()).device
    if roles == "plain":
        template.plain()
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
# Which held-out combinations the pictures of a question kind show; larger scenes are shown for every kind but count.
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
        shown = SHOWN[kind] + (world.several if kind != "count" else ())
        for i in range(n):
            scene, _ = world.held_out_scene(shown[i % len(shown)], rng)
            picture = data.draw([scene], world.cell)[0]
            if kind == "existence":
                # half of them true, of each kind of scene: with four kinds, turns of four would go with the kinds
                questions = [(kind, data.question(world, scene, kind, rng, i % 4 < 2 if len(shown) % 4 else i % 8 < 4))]
            elif kind == "choice":
                first, *others = rotations(data.question(world, scene, kind, rng))
                questions = [(kind, first), *(("turned", question) for question in others)]
            else:
                questions = [(kind, data.question(world, scene, kind, rng, truth)) for truth in (True, False)]
                questions.append(("open", data.question(world, scene, kind, rng, closed=False)))
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
    goals = [world.held_out_scene(skill, rng)[1] for skill in world.skills for _ in range(n)]
    prompts = [data.prompt_text(goal, rng) for goal in goals]
    pictures = np.stack([data.to_picture(pixels) for pixels in draw(m, text, prompts, temperature=0)])
    scenes, clear = data.read(pictures, world)
    right = [bool(ok) and goal in data.combinations(scene)
             for goal, scene, ok in zip(goals, scenes, clear, strict=True)]
    skills = {skill: float(np.mean(right[i * n:(i + 1) * n])) for i, skill in enumerate(world.skills)}
    return {"gen": float(np.mean(list(skills.values()))), "gen_by_skill": skills}, (prompts, pictures, right)


def score_tokenizer(m, world, n, seed=0):
    """Encode and decode n held-out pictures: psnr in dB, and the share that is read exactly as it was drawn."""
    rng = np.random.default_rng([seed, 8])
    scenes = [world.held_out_scene(world.skills[i % len(world.skills)], rng)[0] for i in range(n)]
    drawn = data.draw(scenes, world.cell)
    pixels = torch.stack([data.to_tensor(picture) for picture in drawn]).to(next(m.parameters()).device)
    again = torch.cat([m.decode_images(m.encode_images(part)).cpu() for part in pixels.split(64)])
    again = np.stack([data.to_picture(picture) for picture in again])
    back, clear = data.read(again, world)
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
            scene, combination = self.world.held_out_scene(self.world.skills[i % len(self.world.skills)], rng)
            kinds = [data.QUESTIONS[k] for k in rng.permutation(len(data.QUESTIONS))[:4]]
            asked = [data.question(self.world, scene, kind, rng) for kind in kinds]
            turns = [(q.text, q.answer) for q in asked] if task == "und" else [(data.prompt_text(combination, rng),
                                                                                 "<image>")]
            picture = data.draw([scene], self.world.cell)[0]
            records.append(data.Record(f"held-out picture {i}", task, tuple(turns), (picture,)))
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


def uniform_share(condition, queries):
    """The intensity of a model that spreads its attention evenly: share of the condition among visible keys (B,)."""
    keys = torch.arange(1, condition.shape[1] + 1, device=condition.device)
    return aia.intensity((condition.cumsum(1) / keys)[:, None], queries)


@torch.inference_mode()
def measure(m, batches, target, delta):
    """Batches of one task: intensity per layer (mean and standard deviation over samples), attention on the first token
    of the sequence (a sink) and intensity without it, share of keys, next-token loss and L_AIA."""
    device = next(m.parameters()).device
    found, sink, sinkless, uniform, ntp, tokens = [], [], [], [], 0.0, 0
    for batch in filter(None, batches):
        batch = batch.to(device)
        out = m(batch)
        ntp, tokens = ntp + out.ntp.item(), tokens + out.tokens
        first = torch.zeros_like(batch.condition)
        first[:, 0] = True
        on_first = m(batch.measuring(first)).intensity                # (B, L)
        found.append(out.intensity[batch.aia_valid].cpu())
        sink.append(on_first[batch.aia_valid].cpu())
        sinkless.append((out.intensity - on_first * batch.condition[:, :1])[batch.aia_valid].cpu())
        uniform.append(uniform_share(batch.condition, batch.queries)[batch.aia_valid].cpu())
    if not tokens:
        return None
    found = torch.cat(found)                                                    # (n, L)
    valid = torch.ones(len(found), dtype=torch.bool)
    return {"intensity": found.mean(0).tolist(), "std": found.std(0, correction=0).tolist(),
            "without_first_token": torch.cat(sinkless).mean(0).tolist(), "sink": torch.cat(sink).mean(0).tolist(),
            "uniform": torch.cat(uniform).mean().item(),
            "ntp": ntp / tokens, "aia": aia.loss(found, target, delta, valid).item(), "samples": len(found)}


def curves(models, preparer, samples, targets, n=100, decode=False, run=None):
    """Both tasks of several models (name, m), one after the other and with one picture tokenizer, and their targets ->
    one JSON-ready dict. decode: on what each model says and draws by itself. run: settings of the run they are of."""
    batches = {task: [] if decode else [*samples.batches(preparer, task, n)] for task in aia.TASKS}
    # JSON has no infinity: without Huber, delta is null.
    result = {task: {"target": target.tolist(), "delta": [d if d < float("inf") else None for d in delta.tolist()]}
              for task, (target, delta) in targets.items()}
    for name, m in models:
        for task in aia.TASKS:
            own = samples.batches(FreeDecoding(m, preparer.text), task, n) if decode else batches[task]
            result[task][name] = measure(m, own, *targets[task])
            if result[task][name] and name == "after" and run and not has_aia(run):
                result[task][name]["label"] = WITHOUT
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Reference curves of any transformers model
# ---------------------------------------------------------------------------------------------------------------------
# Targets come from single-task models, and transformers knows hundreds. With eager attention each of their layers hands
# out its map, of which a hook keeps two numbers. A sample is (task, place, inputs of the model, roles as in data.py).


def from_hub(folder, name, *others, **how):
    """What the first fitting Auto class of transformers (by name) opens: a local folder, or a hub id."""
    try:
        import transformers
        return getattr(transformers, name).from_pretrained(folder, **how)
    except (OSError, ValueError, ImportError) as error:
        if others and "configuration class" in str(error):      # the next class may know the model
            return from_hub(folder, *others, **how)
        raise InputError(f"--hf {folder}: {name} says {error!r:.200}: give the folder or hub id of a model that "
                         "transformers knows, and install what it asks for") from error


@torch.inference_mode()
def hf_intensity(m, inputs, condition, queries):
    """One sample through a transformers model -> (L, 2): intensity, and attention on the first token, of each layer.

    inputs as the model takes them; condition, queries (1, T) bool. InputError if a layer of language shows no map.
    """
    found, condition, queries = {}, condition.to(m.device), queries.to(m.device)

    def keep(module, args, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if torch.is_tensor(weights) and weights.shape[-2:] == (queries.shape[1],) * 2:      # (1, H, T, T)
            # M_l(h, q) = sum_{k in condition} A_l(h, q, k)
            mass = weights[..., condition[0]].sum(-1, dtype=torch.float32)      # (1, H, T)
            found[module.layer_idx] = torch.cat([aia.intensity(part, queries) for part in (mass, weights[..., 0])])
            return output[0], None, *output[2:]      # the map ends with its layer: there is one at a time
    inputs = {key: x.to(m.device, m.dtype if x.is_floating_point() else None) for key, x in inputs.items()}
    if "logits_to_keep" in inspect.signature(m.forward).parameters:             # nobody reads the (T, V) logits
        inputs["logits_to_keep"] = 1
    decoder = m.get_decoder()                        # the layers of language; vision towers stand beside it
    with contextlib.ExitStack() as hooks:
        for part in filter(lambda part: hasattr(part, "layer_idx"), decoder.modules()):
            hooks.enter_context(part.register_forward_hook(keep))
        m(**inputs, use_cache=False)
    layers = range(decoder.config.num_hidden_layers)
    if missing := sorted(set(layers) - set(found)):
        raise InputError(f"{type(m).__name__}: {len(missing)} of {len(layers)} layers (first: {missing[0]}) gave no "
                         "attention map: choose a model with eager softmax attention in every layer")
    return torch.stack([found[layer] for layer in layers]).cpu()                # (L, 2)


def hf_question(config, processor, record):
    """First turn of a record -> inputs by the model's own chat template, and roles (1, T); answer and EOS come last."""
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", -1)
    asked, answer = data.question_parts(record.turns, len(record.pictures))[0]
    content = [{"type": "text", "text": part} if isinstance(part, str) else
               {"type": "image", "image": data.load_picture(record.pictures[part], "janus")} for part in asked]
    try:
        inputs = dict(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                                    add_generation_prompt=True, return_dict=True, return_tensors="pt"))
        said = processor.tokenizer.encode(answer, add_special_tokens=False) + [processor.tokenizer.eos_token_id]
    except Exception as error:                       # template, tokenizer and picture reader each have their own kinds
        raise InputError(f"{record.place}: {error!r:.200} (choose a model that chats about pictures)") from error
    roles = torch.where(inputs["input_ids"] == image, data.IMAGE, data.CONTROL)             # (1, P), of the prompt
    for key, x in inputs.items():
        if x.shape == roles.shape:                                              # ids, mask, kinds of token (0: text)
            inputs[key] = torch.nn.functional.pad(x, (0, len(said)), value=int(key == "attention_mask"))    # (1, T)
    inputs["input_ids"][:, -len(said):] = torch.tensor(said)
    return inputs, torch.cat([roles, torch.full((1, len(said)), data.ANSWER)], 1)


def hf_ids(file, codes, vocab):
    """Samples that are token ids already, lines of JSON; codes: range of the ids that are parts of a picture."""
    for place, line in text_lines(file):
        try:
            entry = json.loads(line)
            ids, task, start = entry["ids"], entry["task"], entry.get("answer")
            good = (ids and all(type(token) is int and 0 <= token < vocab for token in ids) and task in aia.TASKS
                    and (start is None or 0 <= start and not any(token in codes for token in ids[start:])))
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise InputError(f'{place}: give {{"ids": [below {vocab}], "task": "gen" or "und"}}, "answer" after codes')
        image = torch.tensor([[token in codes for token in ids]])               # (1, T)
        before = image.cumsum(1)                                                # codes up to each token (1, T)
        words = before == 0 if task == "gen" else (before == before[:, -1:]) & (torch.arange(len(ids)) >= (start or 0))
        other = torch.where(words, data.TEXT if task == "gen" else data.ANSWER, data.CONTROL)
        yield task, place, {"input_ids": torch.tensor([ids])}, torch.where(image, data.IMAGE, other)


def hf_measure(m, samples, n):
    """The first n samples of each task -> {task: intensity (mean, std) and sink per layer, share of keys, count}."""
    found = {}                                                                  # {task: [((L, 2), (1,)), ...]}
    for task, place, inputs, roles in samples:
        condition, queries = data.spans(roles, task)
        if not (condition.any() and queries.any()):
            raise InputError(f"{place}: nothing to measure: give a picture, and text before (gen) or after it (und)")
        if len(found.get(task, ())) < n:
            both = hf_intensity(m, inputs, condition, queries), uniform_share(condition, queries)
            found[task] = [*found.get(task, ()), both]
    for task, rows in found.items():
        each, even = (torch.stack(part) for part in zip(*rows, strict=True))    # (n, L, 2), (n, 1)
        found[task] = {"intensity": each.mean(0)[:, 0].tolist(), "std": each.std(0, correction=0)[:, 0].tolist(),
                       "uniform": even.mean().item(), "sink": each.mean(0)[:, 1].tolist(), "samples": len(rows)}
    return found


def hf_curves(settings):
    """Write the curves of a transformers model, and stages for --aia-targets: the paper's, but for measured tasks."""
    first, colon, last = settings.image_ids.partition(":")
    if not settings.data or settings.image_ids and not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise InputError("curves --hf: give --data FILE and, if it holds token ids, --image-ids FIRST:LAST")
    dtype, device = "auto" if settings.dtype == "stored" else settings.dtype, data.device_of(settings.device)
    m = from_hub(settings.hf, "AutoModelForImageTextToText", "AutoModelForCausalLM", dtype=dtype,
                 attn_implementation="eager").eval().to(device)
    if colon:
        samples = hf_ids(settings.data, range(int(first), int(last) + 1), m.get_input_embeddings().num_embeddings)
    else:
        processor, source = from_hub(settings.hf, "AutoProcessor"), data.FileSource(settings.data, "janus")
        records = (source.record("und", i) for i in range(min(settings.n, source.count("und"))))
        samples = (("und", record.place, *hf_question(m.config, processor, record)) for record in records)
    result = hf_measure(m, samples, settings.n)
    if not result:
        raise InputError(f"--data {settings.data} has nothing to measure: give questions about pictures, or token ids")
    stages = {task: aia.stages_from_curve(row["intensity"], task) for task, row in result.items()}
    kept = {task: [(first / 32, *rest) for first, *rest in rows] for task, rows in aia.STAGES.items()}
    out = Path(settings.out or "curves.json").with_suffix(".json")
    write_json(result | {"stages": kept | stages}, out)
    return {"out": str(out), "stages": stages}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of results
# ---------------------------------------------------------------------------------------------------------------------
COLOUR = {"before": "#999999", "control": "#56B4E9", "after": "#D55E00", "target": "#0072B2",
          "public": "#D55E00"}                      # Okabe and Ito
LABEL = {"before": "before AIA", "control": "same steps, without AIA", "after": "with AIA", "target": "target",
         "public": "the model"}
WITHOUT = "at the end, without AIA"


def has_aia(run):
    """Did the settings of a run give AIA any weight? UniFork's stages have none, see train.PLANS."""
    weights = aia.fixed_weights(run.get("aia_weight", "rho"))
    return run.get("preset") != "tiny-unifork" and (weights is None or any(weights.values()))


def label_of(name, row):
    """How a model is called beside its curve."""
    return row.get("label", LABEL[name])


PANEL = {"gen": "generation: image tokens look at text", "und": "understanding: answers look at the image"}


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
                panel.plot(layers, mean, color=COLOUR[name], marker="o", markersize=4, label=label_of(name, rows[name]))
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


def plot_samples(samples, skills, file, per_skill=4):
    """Drawn pictures under their prompts, a row per skill; framed green and ticked if right, red and crossed if not."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    prompts, pictures, right = samples
    n = len(prompts) // len(skills)
    per_skill = min(per_skill, n)
    figure, panels = plt.subplots(len(skills), per_skill, figsize=(2.2 * per_skill, 2.35 * len(skills)),
                                  layout="constrained", squeeze=False)
    for row, skill in enumerate(skills):
        for column in range(per_skill):
            i, panel = row * n + column, panels[row, column]
            panel.imshow(pictures[i], interpolation="nearest")
            colour, mark = ("#009E73", "\N{CHECK MARK}") if right[i] else ("#D55E00", "\N{BALLOT X}")
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


@contextlib.contextmanager
def aside(file):
    """A second name to write a file under; it is renamed at the end, so that no one ever sees half of it."""
    part = Path(f"{file}.part")
    try:
        yield part
        os.replace(part, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{file} cannot be written ({error.strerror or error}): give a file in a folder that exists, "
                         "with room") from error


def write_json(content, file):
    with aside(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
    if not settings.checkpoint:
        raise InputError("this command needs --checkpoint, the folder of a run, or of public weights")
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
    data.at_least(settings, {"seed": 0, "guidance": 0, "temperature": 0, "scale": 0})
    form = Image.registered_extensions().get(out.suffix.lower())
    if not out.parent.is_dir() or out.is_dir() or form not in Image.SAVE:
        raise InputError(f"--out {out} cannot be written: give a file in an existing folder that ends in .png")
    m, text, _ = load_run(settings)
    pixels = draw(m, text, [settings.prompt], settings.seed, settings.guidance or None, settings.temperature,
                  grid_for(settings.aspect, m.config), settings.negative or None)[0]
    picture = Image.fromarray(data.to_picture(pixels))
    scale = settings.scale or max(240 // max(picture.size), 1)
    size = tuple(side * scale for side in picture.size)
    with aside(out) as part:
        picture.resize(size, Image.Resampling.NEAREST).save(part, form)
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
    data.at_least(settings, {"seed": 0, "temperature": 0, "max_new_tokens": 1})
    if not 0 < settings.top_p <= 1:
        raise InputError(f"--top-p {settings.top_p}: give a share above 0, at most 1")
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
    hf: str = opt("", "folder or hub id of any transformers model, in place of --checkpoint: reference curves")
    image_ids: str = opt("", "hf: FIRST:LAST of the ids that are picture codes; lines of --data are then token ids")
    n: int = opt(100, "samples for each task")
    decode: bool = opt(False, "measure while the model answers and draws by itself, not on the stored answers")
    seed: int = opt(0, "draws the samples")
    out: str = opt("", "PNG file, its numbers beside it as JSON; empty: curves.png in the run folder; here for "
                   "public weights, --data and --decode")


def curve_command(settings):
    """Write curves.png and curves.json; of a transformers model, curves.json alone."""
    if settings.hf:
        return hf_curves(settings)
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
        samples = HeldOut(data.world_of(run), settings.seed)
    chosen = (run["aia_targets"], run["aia_variant"]) if run else ()
    wanted = {task: aia.targets(m.config.layers, task, *chosen) for task in aia.TASKS}
    result = curves(models.items(), data.Preparer(m, text), samples, wanted, settings.n, settings.decode, run)
    own = run and not settings.data and not settings.decode                     # what the run wrote itself
    out = Path(settings.out or (folder / "curves.png" if own else "curves.png"))
    plot_curves(result, out)
    write_json(result | {"kind": m.config.kind}, out.with_suffix(".json"))
    print_curves(result)
    print(f"{out} and {out.with_suffix('.json')}")
    return {f"aia_{task}": {name: result[task][name]["aia"] for name in models if result[task][name]}
            for task in aia.TASKS}


def print_curves(result):
    """A line per model and task: L_AIA and the mean distance to the target."""
    for task in aia.TASKS:
        for name, row in result[task].items():
            if isinstance(row, dict):
                print(f"{task} {label_of(name, row):26s} L_AIA {row['aia']:.4f}   mean |I - T| "
                      f"{distance(result[task], name):.3f}   share of keys {row['uniform']:.3f}   ntp {row['ntp']:.3f}")


def distance(rows, name):
    """Mean over layers of |intensity - target| of one model."""
    return float(np.abs(np.array(rows[name]["intensity"]) - np.array(rows["target"])).mean())


@dataclass(frozen=True)
class Collect:
    """Put the results of several finished runs into one JSON file, with means over seeds."""

    runs: tuple = opt(("runs/*",), "run folders, one or more patterns")
    out: str = opt("assets/laptop.json", "JSON file to write")


def collect(settings):
    """Read result.json, scores.json and curves.json of each run; write them with mean and range for each preset."""
    rows, named = [], " ".join(settings.runs)
    places = {file for pattern in settings.runs for file in glob.glob(f"{pattern}/scores.json")}
    for file in sorted(places):                     # runs on own pictures have none
        row, scores, lines, made = (json.loads(Path(file).with_name(f"{name}.json").read_text())
                                    for name in ("result", "scores", "curves", "settings"))
        world = data.world_of(made)
        row["world"] = [len(world.shapes), len(world.colours), world.objects, world.cell]
        rows.append(row | {key: scores[key] for key in ("und_by_kind", "gen_by_skill", "f1", "acc_plus", "circular",
                                                  "open")}
                    | {"before": {key: scores["before"][key] for key in ("und", "gen") if "before" in scores}}
                    | {"distance": {f"{task} {name}": distance(lines[task], name) for task in aia.TASKS
                                    for name in ("before", "after") if name in lines[task]}})
    if not rows:
        raise InputError(f"no finished run of the world matches {named}: train some, then give their folders")
    summary = {}
    for preset in sorted({row["preset"] for row in rows}):
        mine = [row for row in rows if row["preset"] == preset]
        if any(row["world"] != mine[0]["world"] for row in mine):
            raise InputError(f"--runs {named}: the runs of {preset} had worlds of different size (--shapes, "
                             "--colours, --objects, --cell), whose scores have no common mean: collect them apart")
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
# Benchmarks: pure functions from texts, boxes and features to numbers
# ---------------------------------------------------------------------------------------------------------------------
# They do what the official programs do; where such a program has a quirk that moves the score, the quirk belongs to the
# benchmark and is kept. Files, metrics and the paper's numbers: README.
def average(values, unit=1):
    """Plain mean times unit; None without values, as a score that does not exist is not 0."""
    values = list(values)
    return unit * (sum(values) / len(values)) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# MMMU, MMBench, MMVP, MM-Vet: prompts, reading of answers, scores
# ---------------------------------------------------------------------------------------------------------------------
# A row is a dict of a data file's columns, a missing value is absent or None. A judge is any callable
# judge(prompt, *, temperature, max_tokens, system) -> str. "Official" is the program of a benchmark's authors; where it
# has a quirk that moves the score, the quirk belongs to the benchmark and is kept.
LETTER_ONLY = "Answer with the option's letter from the given choices directly."
SHORT_ANSWER = "Answer the question using a single word or phrase."


def mmbench_letter(pred, option):
    """Answer and {letter: option text} -> letter, or the stripped answer. AIA's rule for MMBench and MMVP."""
    pred = pred.strip()
    if len(pred) < 2:
        return pred                                     # any character stands; AIA stops on "", here it is just wrong
    if pred[0] in option:
        return pred[0]                                  # AIA: so "Because" is B
    return next((letter for letter, text in option.items() if text in pred), pred)


# --- MMMU ------------------------------------------------------------------------------------------------------------
MMMU_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                            "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering")}
# The order of reading. Official runs take all random choices from one generator of seed 42, so it moves the score.
MMMU_SUBJECTS = tuple(sorted(subject for subjects in MMMU_DOMAINS.values() for subject in subjects))
MMMU_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
MMMU_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",                                    # 1,000
                r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                                 # 1e3
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")         # 10.5


def mmmu_options(row, strip=True):
    """Row -> {letter: option text}, empty for open questions. The column holds a Python list literal, as text."""
    texts = enumerate(ast.literal_eval(row.get("options") or "[]"))
    return {string.ascii_uppercase[i]: text.strip() if strip else text for i, text in texts}


def mmmu_prompt(row, variant="aia"):
    """Row -> user text, of the AIA program or of MMMU's own ("official"). `<image n>` marks stay in the text."""
    task = LETTER_ONLY if row["question_type"] == "multiple-choice" else SHORT_ANSWER
    if variant == "official":
        lines = [f"({letter}) {text}" for letter, text in mmmu_options(row, strip=False).items()]
        return "\n\n".join([row["question"], *(["\n".join(lines)] if lines else []), task])
    lines = [f"{letter}. {text}" for letter, text in mmmu_options(row).items()]
    return "\n".join([row["question"].strip(), *lines, task]).strip()


def mmmu_letter(pred, option):
    """Answer and {letter: stripped option text} -> letter; the text itself if there are no options. AIA's rule."""
    letter = mmbench_letter(pred, option)
    if not option or len(letter) == 1:
        return letter
    return list(option)[0 if letter else 1]     # AIA: what it cannot read is the first option, silence the second


def mmmu_parse_choice(response, all_choices, index2ans, rng):
    """Answer, letters, {letter: option text} -> the letter said last, else rng.choice(letters). MMMU's own parser."""
    for mark in ",.!?;:'":                              # official: in this order, so "A.," loses both, "A,." one
        response = response.strip(mark)
    response = f" {response} "
    stages = [(response, {letter: f"({letter})" for letter in all_choices}),
              (response, {letter: f" {letter} " for letter in all_choices})]    # official: so "A)" is no letter
    if len(response.split()) > 5:                       # official: a short answer is not compared with the options
        stages.append((response.lower(), {letter: text.lower() for letter, text in index2ans.items()}))
    for text, marks in stages:
        last = {letter: text.rfind(mark) for letter, mark in marks.items()}
        if max(last.values()) >= 0:
            return max(last, key=last.get)
    return rng.choice(all_choices)


def mmmu_normal(text):
    """Text -> [float of 2 places] if it is a number, else [lower case]; a lone character gets a blank on a side."""
    text = str(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]                 # official: "nan", "inf" and "1_000" are numbers
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_parse_open(response):
    """Answer -> what it may mean, floats and strings. MMMU's own parser: of each line the shortest tail behind an
    indicator word ("so it is 3 cm" -> "3 cm"), then the numbers in these tails."""
    response = response.strip().strip(".").lower()      # official: ".5" loses its point and reads as 5
    lines, kept = response.split("\n"), []
    for i, line in enumerate(lines):
        best = ""
        for word in MMMU_INDICATORS + (("=",) if i == len(lines) - 1 else ()):
            tail = line.split(word)[-1].strip()         # official: a plain substring, so "this " counts as "is "
            if word in line and (not best or len(tail) < len(best)):
                best = tail
        if best and best not in tuple(":,.!?;'"):
            kept.append(best)
    kept = kept or [response]
    numbers = [number for text in kept for pattern in MMMU_NUMBERS for number in re.findall(pattern, text)]
    return list(dict.fromkeys(meaning for text in kept + numbers for meaning in mmmu_normal(text)))


def mmmu_eval_choice(gold, pred):
    """Is the letter the key's, or one of a list of keys?"""
    return pred in gold if isinstance(gold, list) else pred == gold


def mmmu_eval_open(gold, parsed):
    """Does any parsed entry hold a gold string or equal a gold number? gold is a text or a list of texts."""
    golds = [value for text in (gold if isinstance(gold, list) else [gold]) for value in mmmu_normal(text)]
    texts = [value for value in golds if isinstance(value, str)]
    return any(any(text in entry for text in texts) if isinstance(entry, str) else entry in golds for entry in parsed)


def mmmu_score(predictions, answers):
    """{id: letter, or text of an open answer}, answer key -> {domain or subject: {"num", "acc"}}, "Overall" last.

    MMMU's own evaluator. A prediction that the key of its subject lacks raises KeyError.
    """
    def subject_of(name):
        return "_".join(name.split("_")[1:-1])          # validation_Art_Theory_7 -> Art_Theory

    def summary(results):                               # official: acc * n, whose last bit may turn the rounding
        num = sum(n for n, _ in results.values())
        return {"num": num, "acc": round(sum(acc * n for n, acc in results.values()) / num, 3) if num else 0}

    known, report = {subject_of(name) for name in answers}, {}
    hits = {subject: [] for subject in MMMU_SUBJECTS if subject in known}
    for name, said in predictions.items():              # official: a missing prediction is not counted
        if subject_of(name) in hits:
            gold, choice = answers[name]["ground_truth"], answers[name]["question_type"] == "multiple-choice"
            right = mmmu_eval_choice(gold, said) if choice else mmmu_eval_open(gold, mmmu_parse_open(said))
            hits[subject_of(name)].append(right)
    results = {subject: (len(right), sum(right) / len(right)) for subject, right in hits.items() if right}
    for domain, subjects in MMMU_DOMAINS.items():
        present = {subject: results[subject] for subject in subjects if subject in results}
        report["Overall-" + domain] = summary(present)
        report |= {subject: {"num": n, "acc": round(acc, 3)} for subject, (n, acc) in present.items()}
    return {**report, "Overall": summary(results)}


# --- MMBench ---------------------------------------------------------------------------------------------------------
MMBENCH_STEP = 1_000_000                                # copy k of question i, its options turned, is row i + k * STEP
MMBENCH_FAILED = "Failed to obtain answer via API"
MMBENCH_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                    "I'm sorry, but without the image provided", "Cannot determine the answer")
MMBENCH_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
MMBENCH_SHORT = {"coarse_perception": "CP", "finegrained_perception (instance-level)": "FP-S",
                 "finegrained_perception (cross-instance)": "FP-C", "logic_reasoning": "LR",
                 "relation_reasoning": "RR", "attribute_reasoning": "AR"}


def mmbench_options(row, letters=string.ascii_uppercase):
    """Row -> {letter: option} of the options that are present."""
    return {letter: row[letter] for letter in letters if row.get(letter) is not None}


def mmbench_prompt(row, style="aia"):
    """Row -> user text, of the AIA program or of VLMEvalKit's Janus class ("vlmevalkit")."""
    lines = [row["question"], *(f"{letter}. {text}" for letter, text in mmbench_options(row, "ABCDE").items())]
    hint = [] if row.get("hint") is None else [("Hint: " if style == "vlmevalkit" else "") + row["hint"]]
    return "\n".join(["", *hint, *lines, "", LETTER_ONLY] if style == "vlmevalkit" else [*hint, *lines, LETTER_ONLY])


def mmbench_infer(answer, choices):
    """Answer and {letter: option} -> letter, "Z" for a refusal, False if it cannot be told. VLMEvalKit's matching."""
    answer = str(answer)
    if MMBENCH_FAILED not in answer:
        if any(refusal in answer for refusal in MMBENCH_REFUSALS):
            return "Z"
        tokens = answer.translate(MMBENCH_BLANKS).split()
        found = [letter for letter in choices if letter in tokens]
        if len(found) == 1 and tokens.index(found[0]) > len(tokens) - 5:
            return found[0]                             # only among the last four tokens: earlier, "A" is an article
        if not found and "Z" in tokens:
            return "Z"
        said = re.search(r"answer\s+is\s+\**([ABCD])", answer, re.IGNORECASE)
        if said and said[1].upper() in choices:
            return said[1].upper()                      # official: no word end, "answer is Apple" gives A
    answer = answer.lower()
    if len(answer) > 2 * sum(len(str(text)) for text in choices.values()):
        return False
    found = [letter for letter, text in choices.items() if str(text).lower() in answer]
    return found[0] if len(found) == 1 else False


def mmbench_judge_prompt(question, choices, prediction, template):
    """Fill {q}, {o}, {p} of VLMEvalKit's matching prompt, which the user passes as a file; ValueError without it."""
    if template is None:
        raise ValueError("the MMBench judge needs its prompt: pass the text of the judge-prompt file as template")
    options = "".join(f"{letter}. {text}\n" for letter, text in choices.items())
    parts = {"{q}": question, "{o}": "There are several options: \n" + options, "{p}": prediction}
    return re.sub(r"\{[qop]\}", lambda field: str(parts[field[0]]), template)   # one pass: braces in a part stay


def mmbench_groups(rows, circular=True):
    """Rows -> {index of the main row: its rows, sorted}; circular: with its copies. Copies without a main row go."""
    groups = {}
    for row in sorted(rows, key=lambda row: int(row["index"])):
        index = int(row["index"])
        if index < MMBENCH_STEP or (circular and index % MMBENCH_STEP in groups):
            groups.setdefault(index % MMBENCH_STEP, []).append(row)
    return groups


def mmbench_open(rows):
    """Rows of one group -> 1 (all right), 0 (one is wrong), or the list of rows that only a judge can read."""
    read = [(row, mmbench_infer(row["prediction"], mmbench_options(row))) for row in rows]
    if any(letter and letter != row["answer"] for row, letter in read):
        return 0                                        # official: a wrong row decides before any judge call
    return [row for row, letter in read if not letter] or 1


def mmbench_ask(row, judge, rng, template):
    """The judge's letter for a row, in at most three tries; then any option or Z by chance, as VLMEvalKit does."""
    choices = mmbench_options(row)
    prompt = mmbench_judge_prompt(row["question"], choices, row["prediction"], template)
    for _ in range(3):
        reply = judge(prompt, temperature=0.0, max_tokens=2048, system=None)
        letter = MMBENCH_FAILED not in reply and mmbench_infer(reply, choices)
        if letter:
            return letter
    return rng.choice([*choices, "Z"])


def mmbench_score(rows, circular=True, judge=None, rng=random, template=None):
    """Rows with `prediction` -> {"hit": {index of the main row: 0 or 1}, "report": {name: mean hit}}. VLMEvalKit.

    circular: a question counts if every copy of it is right. Without a judge, what cannot be read is wrong.
    """
    groups, hit = mmbench_groups(rows, circular), {}
    for index, group in groups.items():
        verdict = mmbench_open(group)
        if isinstance(verdict, list):                   # all() stops at the first wrong letter, and so do the calls
            verdict = int(judge is not None and all(mmbench_ask(row, judge, rng, template) == row["answer"]
                                                    for row in verdict))
        hit[index] = verdict
    named = {"Overall": list(hit.values())}
    for column in ("l2-category", "category"):          # official: of two groups with one name the later stays
        for name in sorted({main.get(column) for main, *_ in groups.values()} - {None}):
            members = [hit[index] for index, (main, *_) in groups.items() if main.get(column) == name]
            named[MMBENCH_SHORT.get(name, name)] = members
    return {"hit": hit, "report": {name: sum(hits) / len(hits) if hits else float("nan")
                                   for name, hits in named.items()}}


# --- MMVP ------------------------------------------------------------------------------------------------------------
MMVP_JUDGE_SYSTEM = ("You are a helpful and precise assistant for checking the quality of the answer. "
                     "Please answer in only yes or no.")


def mmvp_options(text):
    """`(a) Open (b) Closed` -> {"A": "Open", "B": "Closed"}."""
    first, second = text.split("(b)")[:2]
    return {"A": first.replace("(a)", "").strip(), "B": second.strip()}


def mmvp_prompt(row, variant="aia"):
    """Row -> user text, of the AIA program or of MMVP's own ("official", answered freely and read by a judge)."""
    if variant == "official":
        return row["Question"] + " " + row["Options"]
    lines = [f"{letter}. {text}" for letter, text in mmvp_options(row["Options"]).items()]
    return "\n".join([row["Question"], *lines, LETTER_ONLY])


def mmvp_score(preds, golds, size=2):
    """Letters in file order -> share of whole pairs with both rows right; size=1 gives the share of single rows."""
    hits = [pred == gold for pred, gold in zip(preds, golds, strict=True)]
    whole = [all(hits[i:i + size]) for i in range(0, len(hits) - size + 1, size)]   # official: an odd row is dropped
    return sum(whole) / len(whole) if whole else float("nan")


def mmvp_judge_prompt(prompt, gold, response):
    """The question of MMVP's own grader; prompt is that of the official variant, gold `(a)` or `(b)`."""
    return (f"Given the following question {prompt}, the correct answer is {gold}. "
            f"Does the following answer correctly answers the question, answer:{response}?")


def mmvp_grade(prompt, gold, response, judge):
    """Is a free answer right by the judge? Official: the reply has to be exactly yes, and `yes.` is a no."""
    asked = mmvp_judge_prompt(prompt, gold, response)
    # The official grader sets no limit of tokens; 16 are enough, since a longer reply is not yes.
    return judge(asked, temperature=0.2, max_tokens=16, system=MMVP_JUDGE_SYSTEM).lower() == "yes"


# --- MM-Vet ----------------------------------------------------------------------------------------------------------
MMVET_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)     # official: the first retry is at 0 again


def mmvet_prompt(question, answer, prediction, template, retry=False):
    """The judge's table (template) with one more line, whose last cell the judge fills."""
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = template + "\n" + " | ".join([question, answer, prediction, ""])
    return prompt + "\nPredict the correctness of the answer (digit): " if retry else prompt


def mmvet_grade(question, answer, prediction, judge, template):
    """-> score in 0..1, the judge's last reply, number of calls (at most 6). MM-Vet's own evaluator, but for `nan`."""
    for calls, temperature in enumerate(MMVET_TEMPERATURES, 1):
        reply = judge(mmvet_prompt(question, answer, prediction, template, retry=calls > 1),
                      temperature=temperature, max_tokens=3, system=None)
        if calls == len(MMVET_TEMPERATURES):
            break                                       # official: the sixth reply is never read
        reply = reply.split(" ")[0].strip()             # official: up to the first blank, so " 0.5" is unreadable
        try:
            score = float(reply)
        except ValueError:
            continue
        if 0 <= score <= 1:                             # not for nan, which the official test lets into the mean
            return score, reply, calls
    return 0.0, reply, calls


def mmvet_score(scores, metadata, decimals=1):
    """{id: [score of each run]}, mm-vet.json -> percents: total, its std over runs, runs, capabilities, sets.

    MM-Vet's own evaluator: means over the questions of the metadata. A question without scores raises KeyError, unequal
    numbers of runs ValueError; scores of other ids are ignored.
    """
    table = np.array([scores[name] for name in metadata], float)                # (questions, runs)
    groups = {"capabilities": {}, "sets": {}}
    for question, row in zip(metadata.values(), table, strict=True):
        has = sorted(set(question["capability"]))
        for kind, name in [("sets", "+".join(has)), *(("capabilities", capability) for capability in has)]:
            groups[kind].setdefault(name, []).append(row)

    def percents(rows):                                 # one of each run
        return sum(rows) / len(rows) * 100

    def rounded(value):
        return float(np.round(value, decimals))         # official: numpy's rounding, 0.15 becomes 0.2

    runs = percents(table)
    return {"total": rounded(runs.mean()), "std": rounded(runs.std()), "runs": [rounded(run) for run in runs],
            **{kind: {name: rounded(percents(rows).mean()) for name, rows in found.items()}
               for kind, found in groups.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# POPE: is the object there?
# ---------------------------------------------------------------------------------------------------------------------
def pope_parse(text):
    """Free answer -> "yes" or "no", as evaluate.py of POPE reads it."""
    words = text.split(".")[0].replace(",", "").split(" ")       # official: nothing is stripped, so "No\n" means yes
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def pope_metrics(texts, labels):
    """Answers and labels, paired by position -> counts and shares in 0..1 with yes as positive (evaluate.py of POPE).

    Where the official program would divide by zero the value is None.
    """
    said, truth = [pope_parse(text) == "yes" for text in texts], [label != "no" for label in labels]
    pairs = Counter(zip(said, truth, strict=False))              # official: what one side has too much is left out
    tp, fp, tn, fn = (pairs[pair] for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = (tp / whole if whole else None for whole in (tp + fp, tp + fn))
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn,
            "accuracy": (tp + tn) / pairs.total() if pairs else None, "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if tp else None,
            "yes_ratio": average(said)}                          # official: over all answers, paired or not


def pope_score(answers, labels, force=False):
    """The mean F1 of the categories in percent, and all metrics of each category (LLaVA's way to report POPE).

    answers {category: [text]}, labels {category: ["yes" or "no"]}, both in file order. InputError when they differ in
    length, as those of two versions of the data do. With force, the surplus is dropped instead.
    """
    metrics = {}
    for category in sorted(answers.keys() | labels.keys()):
        said, truth = answers.get(category, []), labels.get(category, [])
        if len(said) != len(truth) and not force:
            raise InputError(f"POPE {category}: {len(said)} answers, {len(truth)} labels; take both from one version, "
                             "or drop the surplus with --force")
        metrics[category] = pope_metrics(said, truth)
    f1 = [each["f1"] for each in metrics.values()]
    return {"score": None if None in f1 else average(f1, 100), "categories": metrics}


# ---------------------------------------------------------------------------------------------------------------------
# MME: two yes/no questions about each picture
# ---------------------------------------------------------------------------------------------------------------------
# task: (group, lines of its official file)
MME_TASKS = {name: ("perception", lines) for name, lines in (
    ("existence", 60), ("count", 60), ("position", 60), ("color", 60), ("posters", 294), ("celebrity", 340),
    ("scene", 400), ("landmark", 400), ("artwork", 400), ("OCR", 40))}
MME_TASKS |= {name: ("cognition", lines) for name, lines in (
    ("commonsense_reasoning", 140), ("numerical_calculation", 40), ("text_translation", 40), ("code_reasoning", 40))}


def mme_parse(text):
    """Answer field -> "yes", "no" or "other", as calculation.py of MME reads it."""
    start = text.lower()[:4]                                     # official: so "know" is a no and "**yes**" is other
    return next((word for word in ("yes", "no") if word in start), "other")


def mme_right(task, text):
    """Text of a task's file -> right or wrong of each line; None for a line without four fields."""
    right = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):         # unlike splitlines, line ends only
        fields = line.split("\t")
        if len(fields) == 4 and fields[2].lower() not in ("yes", "no"):
            raise InputError(f"MME {task}, line {number}: the third field is {fields[2]!r}; make it Yes or No")
        right.append(mme_parse(fields[3]) == fields[2].lower() if len(fields) == 4 else None)
    if not right or len(right) % 2:
        raise InputError(f"MME {task}, line {len(right)}: the file ends without a pair; give two lines a picture")
    return right


def mme_score(files):
    """100 (accuracy + share of pictures with both answers right) per task, and the sums over tasks.

    files {task: text of image, question, Yes|No and answer, by tabs}. InputError when a task is missing, has an odd
    number of lines, or a gold answer is not yes or no. Source: calculation.py of MME, in the copy of the AIA paper,
    which skips a line without four fields: it is no answer, but its picture counts as not solved.
    """
    tasks, skipped = {}, 0
    for task in MME_TASKS:
        if task not in files:
            raise InputError(f"MME {task}: there is no {task}.txt; run all {len(MME_TASKS)} tasks")
        right = mme_right(task, files[task])
        answered = [each for each in right if each is not None]
        skipped += len(right) - len(answered)
        both = [all(pair) for pair in zip(right[::2], right[1::2], strict=True)]     # official: whatever the names
        tasks[task] = average(answered or [0], 100) + average(both, 100)
    groups = {group: sum(score for task, score in tasks.items() if MME_TASKS[task][0] == group)
              for group in ("perception", "cognition")}
    return groups | {"total": sum(groups.values()), "tasks": tasks, "skipped": skipped}


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: are the objects of the prompt found in the picture?
# ---------------------------------------------------------------------------------------------------------------------
# A box is x1, y1, x2, y2 in pixels, in a detector's row followed by its score. An object is (row, mask or None).
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def geneval_iou(a, b):
    """Overlap of two boxes in 0..1, both borders counted as inside (evaluate_images.py of GenEval)."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return float(shared / union) if union else 0.0


def geneval_position(a, b, threshold=0.1):
    """Where box a lies as seen from box b: up to two of left of, right of, above, below (evaluate_images.py)."""
    a, b = (np.asarray(box)[:4].reshape(2, 2) for box in (a, b))               # two corners, each x, y
    offset = a.mean(0) - b.mean(0)
    slack = threshold * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)                       # official: by the length before shrinking
    checks = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in checks.items() if holds}


def geneval_crop(image, box, mask):
    """What the colour judge looks at: the box of a picture, with grey outside the mask (evaluate_images.py).

    image PIL of W x H; box in pixels; mask (H, W) bool or None. What lies outside the picture is black.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    if mask is not None:
        grey = Image.new("RGB", image.size, "#999999")
        image = Image.composite(image, grey, Image.fromarray(np.asarray(mask, bool)))
    return image.crop(tuple(round(float(edge)) for edge in box[:4]))           # halves go to the even number


def geneval_color_texts(class_name, color, variant="official"):
    """The three texts whose CLIP embeddings stand for a colour of a class; variant "official" or "ulmevalkit"."""
    named = "{c}" if variant == "ulmevalkit" else color          # ULMEvalKit forgets to fill in the third text
    return [f"a photo of a {color} {class_name}", f"a photo of a {color}-colored {class_name}",
            f"a photo of a {named} object"]


def geneval_keep(rows, masks, threshold, max_objects, max_overlap):
    """Rows (N, 5) and masks of one class -> the objects that count, best score first."""
    rows = np.asarray(rows).reshape(-1, 5)
    scores = rows[:, 4].astype(np.float32)                       # so 0.3 is not above 0.3, however it is stored
    best, kept = [i for i in np.argsort(-scores, kind="stable") if scores[i] > np.float32(threshold)], []
    for i in best[:max_objects]:
        if max_overlap >= 1 or all(geneval_iou(rows[i], rows[k]) < max_overlap for k in kept):
            kept.append(i)
    return [(rows[i], None if masks is None else masks[i]) for i in kept]


def geneval_fault(clause, found, targets, color, image, threshold):
    """What is wrong with the objects found for an include clause, "" if nothing. targets: those of earlier clauses."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        if color is None:
            raise InputError(f"GenEval, color of {name}: there is no colour judge; give one with --judge")
        wanted, seen = clause["color"], Counter(color(image, found, name))
        if seen[wanted] < count:
            listed = ", ".join(f"{seen[other]} {other}" for other in GENEVAL_COLORS if seen[other])
            return f"expected {wanted} {name}>={count}, found {seen[wanted]} {wanted}; and {listed}"
    if "position" in clause:
        relation, index = clause["position"]
        if targets[index] is None:
            return f"no target for {name} to be {relation}"
        for (box, _), (target, _) in itertools.product(found, targets[index]):
            seen = geneval_position(box, target, threshold)
            if relation not in seen:
                return f"expected {name} {relation} target, found {' and '.join(sorted(seen))} target"
    return ""


def geneval_evaluate(boxes, metadata, color, threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0,
                     position_threshold=0.1, masks=None, image=None):
    """Does a picture show what its prompt asks for? -> correct, reason (a line a fault), details {class: kept rows}.

    boxes {class: rows (N, 5)}, masks {class: N masks (H, W) bool} or None; metadata: the prompt's line of the metadata
    file; color(image, [(row, mask or None), ...], class name) -> [colour name], asked only about colour clauses, where
    InputError says that it is missing. Source: evaluate_images.py of GenEval.
    """
    least = counting_threshold if metadata.get("tag") == "counting" else threshold
    kept = {name: geneval_keep(rows, (masks or {}).get(name), least, max_objects, max_overlap)
            for name, rows in boxes.items()}
    faults, targets = [], []
    for clause in metadata.get("include", []):
        found = kept.get(clause["class"], [])[:clause["count"]]  # official: the rest is never looked at
        fault = geneval_fault(clause, found, targets, color, image, position_threshold)
        faults += [fault] if fault else []
        targets.append(None if fault else found)
    for clause in metadata.get("exclude", []):
        name, count, found = clause["class"], clause["count"], len(kept.get(clause["class"], []))
        faults += [f"expected {name}<{count}, found {found}"] if found >= count else []
    details = {name: [row.tolist() for row, _ in group] for name, group in kept.items() if group}
    return {"correct": not faults, "reason": "\n".join(faults), "details": details}


def geneval_summary(results):
    """[(tag, prompt key, correct)], one a picture -> shares in 0..1 (summary_scores.py of GenEval).

    overall is the mean over tags, whatever their sizes; a prompt is correct when one of its pictures is.
    """
    tags, prompts = {}, {}
    for tag, prompt, correct in results:
        tags.setdefault(tag, []).append(bool(correct))
        prompts.setdefault(prompt, []).append(bool(correct))
    shares = {tag: average(right) for tag, right in tags.items()}
    return {"overall": average(shares.values()), "tags": shares,
            "correct_images": average(itertools.chain(*tags.values())),
            "correct_prompts": average(map(any, prompts.values()))}


# ---------------------------------------------------------------------------------------------------------------------
# DPG-Bench: yes/no questions about each picture, some of which rest on others
# ---------------------------------------------------------------------------------------------------------------------
DPGQuestion = namedtuple("DPGQuestion", "id parents l1 l2 text")


def dpg_crops(resolution, pic_num=4):
    """Boxes of the samples, each resolution pixels wide, in their 2 x 2 grid: row by row (compute_dpg_bench.py)."""
    return [(x, y, x + resolution, y + resolution) for y in (0, resolution) for x in (0, resolution)][:pic_num]


def dpg_category(text):
    """The tuple "attribute - color (car, red)" -> its categories "attribute" and "attribute - color"."""
    l2 = text.split("(")[0].strip()
    return l2.split("-")[0].strip(), l2


def dpg_questions(rows, variant="official"):
    """Rows of dpg_bench.csv as dicts -> {item: [DPGQuestion]}. InputError names a row that cannot be read."""
    official, items, previous = variant == "official", {}, None
    for number, row in enumerate(rows, 1):
        if official and number == 1:                             # official: the first row of the data is never read
            continue
        try:
            item, broad, parents = row["item_id"], row.get("category_broad"), row["dependency"]
            parents = parents if isinstance(parents, list) else str(parents).split(",")
            levels = dpg_category(row["tuple"]) if official else (
                broad, f"{broad}-{row.get('category_detailed') or ''}")
            question = DPGQuestion(int(row["proposition_id"]), [int(parent) for parent in parents], *levels,
                                   row["question_natural_language"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"DPG-Bench, data row {number}: {error!r}; restore the row of dpg_bench.csv") from None
        if official and item != previous:                        # official: an item that comes back starts afresh
            items[item] = {}
        items.setdefault(item, {})[question.id if official else number] = question      # official: the last one stays
        previous = item
    return {item: list(questions.values()) for item, questions in items.items()}


def dpg_marks(questions, replies, official):
    """Replies {question: reply} to one sample -> 0 or 1 for each question, plain and after the rule of parents."""
    plain = [int(replies[question.text] == "yes") for question in questions]
    final, scores = [], {question.id: value for question, value in zip(questions, plain, strict=True) if official}
    for question, value in zip(questions, plain, strict=True):
        # A 0 travels down in file order. A parent that was never read: official KeyError, ULMEvalKit a yes.
        parents = (scores[parent] if official else scores.get(parent, 1) for parent in question.parents if parent)
        scores[question.id] = value if all(parents) else 0
        final.append(scores[question.id])
    return plain, final


def dpg_score(rows, answers, pic_num, variant):
    """How many of the questions about long prompts are answered yes, where a question needs the yes of its parents.

    rows: dicts of dpg_bench.csv; answers {file name: [{question: reply}, one a crop or sample]}.
    official (compute_dpg_bench.py of ELLA): percent, a mean over pictures of pic_num crops; images {file: 0..1}; failed
    names the files without item, crop, reply or parent, which are left out. ulmevalkit (its dpgbench.py, which scored
    the AIA paper): shares in 0..1 over all questions of all samples; InputError where a reply is missing.
    """
    official = variant == "official"
    items = dpg_questions(rows, variant)
    images, failed, every, l1, l2 = {}, [], [], {}, {}
    for file, samples in answers.items():
        item = os.path.basename(file).split(".")[0]
        if not official and item not in items:                   # ULMEvalKit starts from items: no other file is seen
            continue
        try:
            samples = [samples[i] for i in range(pic_num)] if official else samples
            judged = [dpg_marks(items[item], replies, official) for replies in samples]
        except (KeyError, IndexError) as error:
            if not official:
                raise InputError(f"DPG-Bench {file}: no reply to {error}; have the judge answer it") from None
            failed.append(file)
            continue
        images[file] = average(average(final) for _, final in judged)
        # Official: the categories see the last crop only, and its answers before the rule of parents.
        for values in [judged[-1][0]] if official else [final for _, final in judged]:
            every += values
            for question, value in zip(items[item], values, strict=True):
                l1.setdefault(question.l1, []).append(value)
                l2.setdefault(question.l2, []).append(value)
    unit = 100 if official else 1
    l1, l2 = ({name: average(values, unit) for name, values in level.items()} for level in (l1, l2))
    score = {"score": average(images.values() if official else every, unit), "l1": l1, "l2": l2}
    return score | {"images": images, "failed": failed} if official else score


# ---------------------------------------------------------------------------------------------------------------------
# FID: how far apart are two sets of pictures?
# ---------------------------------------------------------------------------------------------------------------------
def fid_stats(features):
    """Features (n, d), n > 1 -> mean (d,) and covariance (d, d) with n - 1, in float64 (pytorch-fid, clean-fid)."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"FID: features have the shape {features.shape}; give a row for each of two or more pictures")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def fid_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two normal distributions, mu (d,) and sigma (d, d) each (pytorch-fid, clean-fid).

    May be slightly negative. InputError when the two differ in shape.
    """
    mu1, mu2 = (np.atleast_1d(np.asarray(mu, np.float64)) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(np.asarray(sigma, np.float64)) for sigma in (sigma1, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise InputError(f"FID: {mu1.shape}, {sigma1.shape} against {mu2.shape}, {sigma2.shape}; use one network")
    # |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). The root's trace is the sum of the roots of the eigenvalues;
    # scipy's matrix root is not needed, and the real part clips eigenvalues just below 0.
    roots = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: what their files hold
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Item:
    """One question of a benchmark: `picture` a path, or bytes of a picture file; `row` its fields in the data file."""

    id: str
    prompt: str
    picture: Path | bytes
    row: dict


def found(folder, *names):
    """The first of some files (patterns) of a benchmark that is there."""
    for name in names:
        for file in sorted(Path(folder).glob(name)):
            return file
    raise InputError(f"{folder} holds no {' or '.join(names)}: give --data the benchmark as it is distributed")


def text_lines(file):
    """[(place, line)] of the lines of a file that hold anything."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({model.first_line(error)}): give the right file, complete"
                         ) from error
    return [(f"{file} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def json_lines(file, *needed):
    """[(place, object)] of a JSON-lines file, each object with the needed fields."""
    rows = []
    for place, line in text_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: not JSON ({error}): write one object a line") from error
        if absent := [name for name in needed if not isinstance(row, dict) or name not in row]:
            raise InputError(f"{place}: there is no {absent[0]!r}: each line is an object with {', '.join(needed)}")
        rows.append((place, row))
    return rows


def table(file, *needed, delimiter=",", missing=()):
    """[(place, row)] of a table with a header; a value that is one of the words `missing` becomes None."""
    csv.field_size_limit(2**31 - 1)                                             # pictures in base64
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = [*csv.DictReader(lines, delimiter=delimiter)]
        if not rows:
            raise ValueError("it holds no rows")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file} cannot be read ({model.first_line(error)}): download it again") from error
    placed = []
    for number, row in enumerate(rows, 1):
        place, row = f"{file} record {number}", {key: None if value in missing else value for key, value in row.items()}
        if None in row:
            raise InputError(f"{place}: it has more fields than the header: download it again")
        if absent := [name for name in needed if row.get(name) is None]:
            raise InputError(f"{place}: there is no {absent[0]!r}, or the line is cut: download it again")
        placed.append((place, row))
    return placed


def lines_to(file, lines):
    """Write text lines, making the folder where it is missing."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with aside(file) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def spreadsheet(file, rows):
    """Write rows (dicts of equal keys) as an .xlsx file. A text is a text, even where it begins like a formula."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell
    except ImportError as error:
        raise InputError(f"{file} is written through openpyxl, which is not installed: pip install openpyxl") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for values in ([*rows[0]], *(row.values() for row in rows)):
        cells = []
        for value in values:
            words = isinstance(value, str)
            cells.append(WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value) if words else value))
            cells[-1].data_type = "s" if words else cells[-1].data_type
        sheet.append(cells)
    with aside(file) as part:
        book.save(part)


def read_mmmu(folder, settings):
    """Parquet files of the 30 subjects, in the order in which chance answers are drawn."""
    parquet, items = data.pyarrow_for(folder).parquet, []
    columns = ["id", "question", "options", "question_type", "answer", "image_1"][:5 if settings.preds else 6]
    for subject in MMMU_SUBJECTS:
        for file in sorted(Path(folder).glob(f"{subject}/validation*.parquet")):
            row = None
            try:
                for row in parquet.read_table(file, columns=columns).to_pylist():
                    picture = b"" if settings.preds else row.pop("image_1")["bytes"]    # AIA: the first one only
                    items.append(Item(row["id"], mmmu_prompt(row, settings.variant), picture, row))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
                raise InputError(f"{file} cannot be read ({row['id'] + ': ' if row else ''}{model.first_line(error)}): "
                                 "download it again") from error
    if not items:
        raise InputError(f"{folder} holds no SUBJECT/validation*.parquet: give --data the folder of MMMU")
    return items


# Words that the official reader (pandas) takes for a missing value: an option of that text disappears.
MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
           "NA", "NULL", "NaN", "None", "n/a", "nan", "null")


def read_mmbench(folder, settings):
    """The tab-separated file; a rotated row may name the row that holds its picture."""
    file = Path(folder) if Path(folder).is_file() else found(folder, "mmbench_dev_20230712.tsv", "*.tsv")
    placed = table(file, "index", "question", "image", delimiter="\t", missing=MISSING)
    pictures, items = {row["index"]: row["image"] for _, row in placed}, []
    for place, row in placed:
        image = row.pop("image")
        try:
            image = pictures[image] if image.isdigit() else image
            row["index"], picture = int(row["index"]), base64.b64decode(image, validate=True)
        except (ValueError, KeyError) as error:
            raise InputError(f"{place}: index or image cannot be read ({error}): download it again") from error
        items.append(Item(str(row["index"]), mmbench_prompt(row, settings.prompt_style), picture, row))
    if not any(item.row["index"] < MMBENCH_STEP for item in items):
        raise InputError(f"{file} holds no row with an index below {MMBENCH_STEP}: give --data the whole file")
    return items


def read_mmvp(folder, settings):
    """Questions.csv in file order: two rows are a pair."""
    file, items = found(folder, "Questions.csv"), []
    for place, row in table(file, "Question", "Options", "Correct Answer"):
        index = row.get("Index") or row.get("lndex")                            # so spelled in some copies
        if not index or "(b)" not in row["Options"] or row["Correct Answer"] not in ("(a)", "(b)"):
            raise InputError(f"{place}: it needs an Index, Options (a) ... (b) ..., and one of the two as Correct "
                             "Answer: download it again")
        items.append(Item(index, mmvp_prompt(row, settings.variant), Path(folder) / f"MMVP Images/{index}.jpg", row))
    if len(items) < 2:
        raise InputError(f"{file} holds no pair of questions: download it again")
    return items


def read_mmvet(folder, settings):
    """mm-vet.json, {id: fields}."""
    file, items, needed = found(folder, "mm-vet.json"), [], ("imagename", "question", "answer", "capability")
    for name, row in model.read_json(file).items():
        if absent := [field for field in needed if not isinstance(row, dict) or field not in row]:
            raise InputError(f"{file}, {name}: there is no {absent[0]!r}: download it again")
        items.append(Item(name, row["question"] + " ", Path(folder) / "images" / row["imagename"], row))
    return items


POPE = ("adversarial", "popular", "random")


def read_pope(folder, settings):
    """LLaVA's questions; the labels lie in one file a category and are paired by position."""
    placed = json_lines(found(folder, "llava_pope_test.jsonl"), "question_id", "image", "text", "category")
    for place, row in placed:
        if row["category"] not in POPE:
            raise InputError(f"{place}: category {row['category']!r} is none of {', '.join(POPE)}: download it again")
    for name in POPE:
        file, labels = pope_labels(folder, name)
        mine = [row["image"] for _, row in placed if row["category"] == name]
        wrong = next((i for i, (a, b) in enumerate(zip(mine, labels, strict=False), 1) if a != b["image"]), 0)
        if (len(mine) != len(labels) or wrong) and not settings.force:
            raise InputError(f"{file} does not belong to llava_pope_test.jsonl: {len(labels)} labels for {len(mine)} "
                             f"questions" + f", and line {wrong} is of another picture" * bool(wrong)
                             + "; take the labels of AoiDragon/POPE at commit e3e3926, or --force")
    return [Item(str(row["question_id"]), row["text"], Path(folder) / "val2014" / row["image"], row)
            for _, row in placed]


def pope_labels(folder, name):
    """File and rows of the labels of a category."""
    file = found(folder, f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
    return file, [row for _, row in json_lines(file, "image", "label")]


MME_SUFFIX = " " + SHORT_ANSWER


def read_mme(folder, settings):
    """The templates Your_Results/TASK.txt: picture, question, answer; two lines a picture."""
    items = []
    for task in MME_TASKS:
        home = Path(folder) / "MME_Benchmark_release_version" / task
        placed = text_lines(found(folder, f"Your_Results/{task}.txt", f"*/Your_Results/{task}.txt"))
        for number, (place, line) in enumerate(placed, 1):
            fields = line.strip().split("\t")
            if len(fields) != 3 or fields[2].lower() not in ("yes", "no"):
                raise InputError(f"{place}: it needs picture, question, and Yes or No, between tabs: download it again")
            places = (home / fields[0], home / "images" / fields[0])
            items.append(Item(f"{task}/{number}", fields[1] + MME_SUFFIX, next(filter(Path.exists, places), places[0]),
                              {"task": task, "image": fields[0], "gold": fields[2]}))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: asking the model, and what was said
# ---------------------------------------------------------------------------------------------------------------------
def my_share():
    """Rank and number of the processes that torchrun started; 0 and 1 without it."""
    return tuple(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def all_done():
    """Wait until every process is here, which may take hours where one has more left to do."""
    if my_share()[1] > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


KEPT = ("bench", "variant", "checkpoint", "vision_tokenizer", "dtype", "rope_bf16", "allow_special", "prompt_style",
        "gen_roles", "guidance", "pictures", "seed")


def settings_of(settings, prompts):
    """What answers or pictures depend on. Those of one folder come from one model, asked the same in the same way."""
    mine = {name: getattr(settings, name) for name in KEPT}
    digest, file = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12], Path(settings.out) / "settings.json"
    mine |= {"questions": f"{len(prompts)} (SHA-256 {digest})", "weights": weights_of(settings.checkpoint)}
    stored = model.read_json(file) if file.exists() else mine
    for name, value in mine.items():
        if stored.get(name) != value:
            raise InputError(f"{settings.out} holds results with {name} {stored.get(name)!r}, now it is {value!r}: "
                             "give another --out, or score those with --preds")
    return mine


def weights_of(checkpoint):
    """What changes when other weights come under the same name: names, sizes and times of their files, in short."""
    folder = model.find_folder(checkpoint)
    files = [folder] if folder.is_file() else sorted(
        file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin", ".pth"))
    return hashlib.sha256(json.dumps(data.stamps(files, folder)).encode()).hexdigest()[:12]


def load_asked(settings, mine):
    """Model and text tokenizer. The settings are stored only now, so that a refused command leaves the folder free."""
    m, text, _ = load_run(settings)
    for name, usual in (("prompt_style", "aia"), ("gen_roles", "tags")):
        if m.config.kind == "emu3" and mine[name] != usual:
            raise InputError(f"--{name.replace('_', '-')} {mine[name]} names the roles of Janus-Pro's template, which "
                             "Emu3's does not have: leave it out")
    if my_share()[0] == 0:
        write_json(mine, Path(settings.out) / "settings.json")
    return m, text


MAX_NEW_TOKENS = {"aia": 512, "vlmevalkit": 2048}
WHITE = ("mmmu",)                                   # official: here what is transparent becomes white


def ask_all(settings, items):
    """Write OUT/predictions.jsonl, the raw answers in the order of the items. What a killed run has written is kept;
    under torchrun every process asks its share."""
    (rank, world), out = my_share(), Path(settings.out)
    mine = settings_of(settings, {item.id: item.prompt for item in items})
    if (out / "predictions.jsonl").exists():
        return
    for item in items:
        if isinstance(item.picture, Path) and not item.picture.exists():
            raise InputError(f"question {item.id}: picture {item.picture} is missing: give --data the benchmark with "
                             "its pictures")
    part = out / f"answers-{rank}.jsonl"
    lines_to(part, map(json.dumps, whole_lines([part]).values()))
    said = whole_lines(out.glob("answers-*.jsonl"))
    if todo := [item for item in items[rank::world] if item.id not in said]:
        m, text = load_asked(settings, mine)
        preparer = data.Preparer(m, text, training=False)
        if settings.prompt_style == "vlmevalkit":
            preparer.template.plain()
        with open(part, "a", encoding="utf-8") as lines:
            for first in tqdm(range(0, len(todo), settings.batch), desc=settings.bench, unit="batch", disable=None):
                group = todo[first:first + settings.batch]
                for item, response in zip(group, ask_group(settings, preparer, group), strict=True):
                    lines.write(json.dumps({"id": item.id, "prompt": item.prompt, "response": response}) + "\n")
                lines.flush()
    all_done()
    if rank == 0:
        said = whole_lines(parts := [*out.glob("answers-*.jsonl")])
        if absent := [item.id for item in items if item.id not in said]:
            raise InputError(f"{out} lacks {len(absent)} answers, such as {absent[0]!r}: all processes need one folder "
                             "that they share; what is there stays")
        lines_to(out / "predictions.jsonl", (json.dumps(said[item.id]) for item in items))
        for file in parts:
            file.unlink()


def whole_lines(files):
    """{id: row} of files of answers. A line that was cut, as the job was killed, does not count."""
    said = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                said[row["id"]] = row
    return said


def ask_group(settings, preparer, items):
    """Raw answers to some items: greedy, new tokens only, unstripped."""
    m, janus, pictures = preparer.m, preparer.config.kind == "janus", [rgb(item, settings.bench) for item in items]
    codes = None if janus else preparer.codes(pictures)
    preparer.known.clear()                                                      # thousands of large pictures
    samples = []
    for i, item in enumerate(items):
        asked = item.prompt                         # Emu3 reads it as it is; Janus-Pro's template strips its end, and
        if janus:                                   # sets the line break behind a picture
            asked = asked.rstrip().removeprefix("\n" * (settings.prompt_style == "vlmevalkit"))
        samples.append(preparer.template.understanding([([0, asked], None)], codes and codes[i:i + 1]))
    device = next(m.parameters()).device
    ids, mask = left_padded(samples, preparer.text.ids["pad"], device)
    pixels = preparer.reading(pictures)["pixels"].to(device) if janus else None
    longest = 1 if (settings.bench, settings.variant) == ("mme", "aia") else MAX_NEW_TOKENS[settings.prompt_style]
    return [preparer.text.decode(row) for row in m.generate_text(ids, pixels, mask, longest).tolist()]


def rgb(item, bench):
    """Picture of an item (H, W, 3) uint8. Transparency is dropped, as the readers of most benchmarks do, or pasted on
    white."""
    try:
        picture = data.open_picture(item.picture, "janus")                      # the wider limits, for both models
        if bench in WHITE and ("A" in picture.getbands() or "transparency" in picture.info):
            picture = picture.convert("RGBA")
            picture = Image.composite(picture, Image.new("RGBA", picture.size, "white"), picture.getchannel("A"))
        return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"question {item.id}: {model.first_line(error)}: download the benchmark again") from error


def read_predictions(file, items):
    """Raw answers to all items, in their order."""
    said, known = {}, {item.id for item in items}
    for place, row in json_lines(file, "id", "response"):
        name = str(row["id"])
        if not isinstance(row["response"], str):
            raise InputError(f"{place}: the response is no text: write what the model said")
        if name in said or name not in known:
            raise InputError(f"{place}: id {name!r} " + ("comes twice: leave one answer" if name in said else
                             "is none of this data set: give the answers to these questions"))
        said[name] = row["response"]
    if absent := [item.id for item in items if item.id not in said]:
        raise InputError(f"{file}: {len(said)} answers for {len(items)} questions, none for id {absent[0]!r}: it is "
                         "not complete, or of another data file")
    return [said[item.id] for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: judges
# ---------------------------------------------------------------------------------------------------------------------
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
        for place, row in json_lines(file, "key", "replies") if file else ():
            if not isinstance(row["replies"], list) or not all(isinstance(reply, str) for reply in row["replies"]):
                raise InputError(f"{place}: replies are a list of texts, one a call")
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


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: scores and submission files
# ---------------------------------------------------------------------------------------------------------------------
def judge_mmmu(settings, items, texts, judge):
    """Accuracy; prediction.json and results.txt, which the official evaluator and EvalAI take."""
    answers, rng, predictions = mmmu_answers(settings, items), random.Random(42), {}          # official seed
    for item, said in zip(items, texts, strict=True):
        options, said = mmmu_options(item.row, strip=settings.variant == "aia"), said.strip()
        if settings.variant == "aia":
            said = mmmu_letter(said, options)
        elif options:
            said = mmmu_parse_choice(said, [*options], options, rng)
        predictions[item.id] = said
    result = mmmu_score(predictions, answers)
    write_json(predictions, Path(settings.out) / "prediction.json")
    lines_to(Path(settings.out) / "results.txt", [f"{name}: num={row['num']}, acc={row['acc']}"
                                                  for name, row in result.items()])
    return {"score": 100 * result["Overall"]["acc"], **{key: {name: row[key] for name, row in result.items()}
                                                        for key in ("acc", "num")}}


def mmmu_answers(settings, items):
    """The official key where it lies beside the data, else from the data."""
    file, answers = Path(settings.data) / "answer_dict_val.json", {}
    if file.exists():
        answers = model.read_json(file)
        for item in items:
            row = answers.get(item.id)
            if not isinstance(row, dict) or not {"ground_truth", "question_type"} <= set(row):
                raise InputError(f"{file} has no answer to {item.id}: take the one of MMMU's validation set")
        return answers
    for item in items:
        kind, gold = item.row["question_type"], item.row["answer"]
        with contextlib.suppress(ValueError, SyntaxError):                      # several answers are a list, as text
            listed = ast.literal_eval(gold) if gold.startswith("[") else gold
            gold = [*map(str, listed)] if isinstance(listed, list) else gold
        answers[item.id] = {"question_type": kind if kind == "multiple-choice" else "short-answer",
                            "ground_truth": gold}
    return answers


def judge_mmbench(settings, items, texts, judge):
    """Mean hit with and without CircularEval; results.xlsx for the server. Without a judge: exact matching."""
    rows, shown, hidden = [], [], ("hint", "category", "source", "comment", "l2-category")
    for item, said in zip(items, texts, strict=True):
        if settings.variant == "aia":
            said = mmbench_letter(said, mmbench_options(item.row, "ABCDE"))
        rows.append(item.row | {"prediction": said})
        one = [(key, value) for key, value in item.row.items() if key not in hidden]
        shown.append(dict([*one[:6], ("prediction", said), *one[6:]]))          # official place of the column
    spreadsheet(Path(settings.out) / "results.xlsx", shown)
    if not all(row.get("answer") for row in rows):
        return {"score": None, "reason": "this split has no answers: upload results.xlsx to the server of MMBench"}
    template, name = judge_prompt(settings) if judge else (None, None)
    if judge and judge.export:
        verdicts = [mmbench_open(group) for circular in (True, False)
                    for group in mmbench_groups(rows, circular).values()]
        unread = [row for verdict in verdicts if isinstance(verdict, list) for row in verdict]
        judge.each(unread, lambda row: mmbench_ask(row, judge, random.Random(0), template))
        if judge.wanted:
            return None
    reports = []
    for circular in (True, False):
        if judge:
            judge.calls.clear()                                                 # each grading from the first reply on
        reports.append(mmbench_score(rows, circular, judge, random.Random(0), template)["report"])
    report, vanilla = reports
    return {"score": 100 * report["Overall"], "vanilla": 100 * vanilla["Overall"], "report": report,
            "judge_prompt": name}


def judge_mmvp(settings, items, texts, judge):
    """Share of pairs with both answers right; results.jsonl and results.txt."""
    golds, texts = [item.row["Correct Answer"][1].upper() for item in items], [said.strip() for said in texts]
    if settings.variant == "official":
        if judge is None:
            return {"score": None, "reason": "the official way of MMVP needs --judge FILE"}
        right = judge.each(zip(items, texts, strict=True), lambda one: mmvp_grade(
            one[0].prompt, one[0].row["Correct Answer"], one[1], judge))
        if judge.wanted:
            return None
        letters = [gold if ok else "" for gold, ok in zip(golds, right, strict=True)]
    else:
        letters = texts = [mmbench_letter(said, mmvp_options(item.row["Options"]))
                           for item, said in zip(items, texts, strict=True)]
    rows = [{"question": item.prompt, "answer": said, "gt_answers": gold, "data_id": item.id}
            for item, said, gold in zip(items, texts, golds, strict=True)]
    share, single = mmvp_score(letters, golds), mmvp_score(letters, golds, 1)
    lines_to(Path(settings.out) / "results.jsonl", map(json.dumps, rows))
    lines_to(Path(settings.out) / "results.txt", [f"The accuracy is {share}"])
    return {"score": 100 * share, "rows": 100 * single}


def judge_mmvet(settings, items, texts, judge):
    """Mean grade of a text judge; results.json is what the official online evaluator takes."""
    said, out = {item.id: text for item, text in zip(items, texts, strict=True)}, Path(settings.out)
    write_json(said, out / "results.json")
    if judge is None:
        return {"score": None, "reason": "a judge grades it: give --judge FILE, or upload results.json to its server"}
    (template, name), rows = judge_prompt(settings), {item.id: item.row for item in items}
    grader, graded = Path(judge.file).stem, {i: {"model": [], "content": [], "score": []} for i in rows}
    for _ in range(settings.runs):
        for i, (score, reply, _) in judge.each(rows, lambda i: (i, mmvet_grade(
                rows[i]["question"], rows[i]["answer"], said[i], judge, template))):
            for key, value in (("model", grader), ("content", reply), ("score", score)):
                graded[i][key].append(value)
    if judge.wanted:
        return None
    result = mmvet_score({i: row["score"] for i, row in graded.items()}, rows)
    asked, runs = Path(settings.checkpoint or "model").name, f"{settings.runs}runs"
    write_json(graded, out / f"{asked}_{grader}-grade-{runs}.json")
    for kind, columns in (("cap-score", result["capabilities"]), ("cap-int-score", result["sets"])):
        columns = columns | {key: result[key] for key in ("total", "std", "runs")}
        with aside(out / f"{asked}_{grader}-{kind}-{runs}.csv") as part, open(part, "w", newline="") as lines:
            csv.writer(lines).writerows([["", *columns], [asked, *columns.values()]])
    return {"score": result["total"], **result, "judge_prompt": name}


def judge_pope(settings, items, texts, judge):
    """Mean F1 of the three categories; results.json and results.txt."""
    texts, said = [text.strip() for text in texts], {name: [] for name in POPE}
    for item, text in zip(items, texts, strict=True):
        said[item.row["category"]].append(text)
    labels = {name: [row["label"] for row in pope_labels(settings.data, name)[1]] for name in POPE}
    result = pope_score(said, labels, settings.force)
    write_json([{"question_id": item.row["question_id"], "text": text, "text_orig": text, "metadata": {}}
                for item, text in zip(items, texts, strict=True)], Path(settings.out) / "results.json")
    lines_to(Path(settings.out) / "results.txt", [
        *(f"{name}: {key} {value}" for name in POPE for key, value in result["categories"][name].items()),
        f"Avg F1 score: {result['score']}"])
    reason = {"reason": "F1 needs a true positive in each category"} if result["score"] is None else {}
    return {"score": result["score"], **reason, **result["categories"]}


def judge_mme(settings, items, texts, judge):
    """Perception and cognition; a file a task as the official program takes them. A tab in an answer stays: the scorer
    counts such lines as skipped, as AIA's does."""
    files = dict.fromkeys(MME_TASKS, "")
    for item, text in zip(items, texts, strict=True):
        row, said = item.row, text.replace("\n", "").replace("\r", "")
        files[row["task"]] += f"{row['image']}\t{item.prompt}\t{row['gold']}\t{said}\n"
    for name, text in files.items():
        lines_to(Path(settings.out) / f"mme/{name}.txt", text.split("\n")[:-1])
    result = mme_score(files)
    return {"score": result["perception"], **result}


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks of drawing
# ---------------------------------------------------------------------------------------------------------------------
def draw_all(settings, prompts, files):
    """Draw {name: prompt} into {name: [picture files]}, where they are not there yet; a single file takes four pictures
    as a grid. Every prompt has its own seed, so a resumed or shared run draws the same."""
    (rank, world), names = my_share(), [*prompts]
    mine, seeds = settings_of(settings, prompts), {name: settings.seed + i for i, name in enumerate(names)}
    if todo := [name for name in names[rank::world] if not all(file.exists() for file in files[name])]:
        m, text = load_asked(settings, mine)
        if rank == 0:
            write_json(seeds, Path(settings.out) / "seeds.json")
        for name in tqdm(todo, desc=settings.bench, unit="prompt", disable=None):
            pixels = draw(m, text, [prompts[name]] * settings.pictures, seeds[name], settings.guidance or None,
                          roles=settings.gen_roles)
            pictures = [data.to_picture(one) for one in pixels]
            if len(pictures) > len(files[name]):
                pictures = [np.concatenate([np.concatenate(pictures[i:i + 2], 1) for i in (0, 2)])]
            for picture, file in zip(pictures, files[name], strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                with aside(file) as part:
                    Image.fromarray(picture).save(part, format="PNG")
    all_done()


def run_geneval(settings, judge):
    """Pictures of IMAGES/NUMBER/samples, and what detector and colour judge make of them."""
    file = Path(settings.data)
    if not file.is_file():
        file = found(file, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    rows = {f"{i:05d}": row for i, (_, row) in enumerate(json_lines(file, "tag", "include", "prompt"))}
    folder = Path(settings.preds or Path(settings.out) / "images")
    if not settings.preds:
        draw_all(settings, {name: row["prompt"] for name, row in rows.items()},
                 {name: [folder / name / f"samples/{i:05d}.png" for i in range(settings.pictures)] for name in rows})
    if my_share()[0]:
        return None
    for name, row in () if settings.preds else rows.items():
        lines_to(folder / name / "metadata.jsonl", [json.dumps(row)])
    pictures = [*geneval_pictures(folder, file, rows)]
    if not pictures:
        raise InputError(f"{folder} holds no NUMBER/samples/*.png: give --preds the folder of pictures of GenEval")
    if judge is None:
        return {"score": None, "reason": f"a detector looks at {folder}: --judge-export FILE writes what to ask it"}
    classes = [line for _, line in text_lines(found(file.parent, "object_names.txt"))]
    results = judge.each(pictures, lambda one: geneval_judged(folder, *one, classes, judge))
    if judge.wanted:
        return None
    lines_to(Path(settings.out) / "results.jsonl", map(json.dumps, results))
    summary = geneval_summary([(row["tag"], row["metadata"], row["correct"]) for row in results])
    return {"score": summary["overall"], **summary, "prompts": file.name, "pictures": len(results)}


def geneval_pictures(folder, file, rows):
    """(picture, metadata) of all folders whose names are digits; pictures begin with digits and .png."""
    for place in sorted(p for p in folder.glob("*") if p.name.isdigit()):
        metadata = model.read_json(place / "metadata.jsonl")
        if metadata != rows.get(f"{int(place.name):05d}"):
            raise InputError(f"{place / 'metadata.jsonl'} is not line {int(place.name)}, from 0, of {file.name}: give "
                             "--data the file these pictures were drawn from")
        for picture in sorted(place.glob("samples/*")):
            if re.match(r"\d+\.png", picture.name):
                yield picture, metadata


def geneval_judged(folder, file, metadata, classes, judge):
    """A line of results.jsonl."""
    name = file.relative_to(folder).as_posix()
    boxes, masks = judge.detect(name)
    if len(boxes) != len(classes):
        raise InputError(f"{judge.file}: the reply about {name} has {len(boxes)} lists of boxes, not one for each of "
                         f"the {len(classes)} classes of object_names.txt")
    by_class, masks = dict(zip(classes, boxes, strict=True)), masks and dict(zip(classes, masks, strict=True))
    result = geneval_evaluate(by_class, metadata, judge.color, masks=masks, image=name)
    return {"filename": str(file), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": result["correct"],
            "reason": result["reason"], "metadata": json.dumps(metadata), "details": json.dumps(result["details"])}


def read_dpg(settings):
    """Rows of questions, as dicts, and {item: prompt}: from dpg_bench.csv and prompts/, or from ULMEvalKit's table."""
    folder, rows, prompts = Path(settings.data), [], {}
    if settings.variant == "ulmevalkit" and not (folder / "dpg_bench.csv").exists():
        for place, row in table(found(folder, "*.tsv"), "index", "text", "questions", delimiter="\t"):
            prompts[row["index"]] = row["text"]
            try:
                rows += [{"item_id": row["index"]} | question for question in json.loads(row["questions"])]
            except (ValueError, TypeError) as error:
                raise InputError(f"{place}: its questions are no list of objects ({error}): download it again"
                                 ) from error
        return rows, prompts
    needed = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    rows = [row for _, row in table(found(folder, "dpg_bench.csv"), *needed)]
    return rows, {file.stem: "\n".join(line for _, line in text_lines(file))
                  for file in sorted(folder.glob("prompts/*.txt"))}


def run_dpg(settings, judge):
    """Grids of 2 x 2 pictures a prompt, and the answers of a VQA judge about them."""
    (rows, prompts), folder = read_dpg(settings), Path(settings.preds or Path(settings.out) / "images")
    items, answers, crops = dpg_questions(rows, settings.variant), {}, {}
    if not settings.preds:
        if not prompts:
            raise InputError(f"{settings.data} holds no prompts/*.txt to draw: give --data the folder of DPG-Bench")
        draw_all(settings, prompts, {name: [folder / f"{name}.png"] for name in prompts})
    if my_share()[0]:
        return None
    pictures = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not pictures:
        raise InputError(f"{folder} holds no pictures: give --preds a folder of files named after their prompts")
    if judge is None:
        return {"score": None, "reason": f"a VQA judge looks at {folder}: --judge-export FILE writes what to ask it"}
    for file in pictures:
        crops[file.name], questions = [], items.get(file.name.split(".")[0], ())
        with contextlib.suppress(OSError), Image.open(file) as opened:          # official: what is unreadable is left
            crops[file.name] = dpg_crops(opened.width // (1 + (settings.pictures > 1)), settings.pictures)
        answers[file.name] = [dict(judge.each(dict.fromkeys(question.text for question in questions),
                                              lambda text, c=(file.name, crop): (text, judge.vqa(c, text))))
                              for crop in crops[file.name]]
    if judge.wanted:
        return None
    result = dpg_score(rows, answers, settings.pictures, settings.variant)
    lines_to(Path(settings.out) / "dpg-bench_results_detail.txt", [
        f"{folder / name}, {box}, {question}, {reply}" for name, parts in answers.items()
        for box, said in zip(crops[name], parts, strict=True) for question, reply in said.items()])
    lines_to(Path(settings.out) / "dpg-bench_results.txt", dpg_report(folder, items, answers, result))
    return {name: value for name, value in result.items() if name != "images"} | {"pictures": len(pictures)}


def dpg_report(folder, items, answers, result):
    """Lines: a picture with the scores of its crops and their mean; then the means of categories, and of all."""
    for name, mean in result.get("images", {}).items():
        marks = [average(dpg_marks(items[name.split(".")[0]], said, True)[1]) for said in answers[name]]
        yield ", ".join(map(str, (folder / name, *marks, mean)))
    for level in ("l1", "l2"):
        yield f"{level.upper()} category scores:"
        yield from (f"\t{name}: {value}" for name, value in sorted(result[level].items()))
    yield f"DPG-Bench score: {result['score']}"


# ---------------------------------------------------------------------------------------------------------------------
# FID: pictures as features
# ---------------------------------------------------------------------------------------------------------------------
FID_FILES = {"pytorch": ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")}
FID_FILES["clean"] = (*FID_FILES["pytorch"], "npy", "JPEG", "JPG", "PNG")
FID_PACKAGE = {"pytorch": ("pytorch-fid", "pt_inception-2015-12-05-6726825d.pth"),
               "clean": ("clean-fid", "inception-2015-12-05.pt")}


def fid_network(mode, device):
    """Inception-v3 of the installed package: pixels as fid_pixels gives them -> features (B, 2048)."""
    package, weights = FID_PACKAGE[mode]
    try:
        if mode == "pytorch":
            from pytorch_fid.inception import InceptionV3
            network = InceptionV3(resize_input=False, normalize_input=False).to(device).eval()
            return lambda pixels: network(pixels.to(device))[0].flatten(1)
        from cleanfid.features import build_feature_extractor
        network = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
        return lambda pixels: network(pixels.to(device))                        # takes 0..255, subtracts 128 itself
    except ImportError as error:
        raise InputError(f"FID in mode {mode} needs the network of {package}: pip install {package}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{package} cannot load its weights {weights} ({model.first_line(error)}): download them "
                         "first") from error


def fid_pixels(file, mode):
    """A picture as its mode resizes it: (3, 299, 299); "pytorch" in -1..1, "clean" in 0..255."""
    try:
        array = np.load(file, allow_pickle=False) if file.suffix == ".npy" else Image.open(file).convert("RGB")
        array = np.array(array)
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"its shape is {array.shape}, not (height, width, 3)")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"picture {file} cannot be read ({model.first_line(error)}): replace it") from error
    if mode == "pytorch":
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
        return 2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)[0] - 1
    planes = [Image.fromarray(array[..., i].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
              for i in range(3)]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 255)


@torch.inference_mode()
def fid_side(place, mode, network, batch=32):
    """(mu, sigma) of a folder of pictures, or of an .npz with mu and sigma, or features (n, d)."""
    if Path(place).suffix == ".npz":
        return fid_stored(place)
    pattern = Path(place).rglob("*") if mode == "clean" else Path(place).glob("*")
    files = sorted(file for file in pattern if file.suffix[1:] in FID_FILES[mode])
    if len(files) < 2:
        raise InputError(f"{place} holds {len(files)} pictures: FID needs a folder of them, or an .npz")
    if len(files) < 2048:
        print(f"warning: {place} holds {len(files)} pictures, fewer than features: the covariance is singular")
    network, features = network(), []
    for first in tqdm(range(0, len(files), batch), desc=str(place), unit="batch", disable=None):
        pixels = torch.stack([fid_pixels(file, mode) for file in files[first:first + batch]])
        features.append(network(pixels).double().cpu().numpy())
    return fid_stats(np.concatenate(features))


def fid_stored(place):
    """(mu, sigma) of an .npz."""
    try:
        with np.load(place, allow_pickle=False) as content:
            stored = {name: content[name] for name in content.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{place} cannot be read ({model.first_line(error)}): give an .npz without objects") from error
    if {"mu", "sigma"} <= set(stored):
        mu, sigma = np.atleast_1d(stored["mu"]), np.atleast_2d(stored["sigma"])
    elif "features" in stored:
        mu, sigma = fid_stats(stored["features"])
    else:
        raise InputError(f"{place} holds {', '.join(stored)}: it needs mu and sigma, or features (n, d)")
    if sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{place}: mu {mu.shape} and sigma {sigma.shape} do not fit, or are not finite: make it anew")
    return mu, sigma


@torch.inference_mode()
def tokenizer_features(m, pixels):
    """Mean over positions of what the picture tokenizer encodes, before it chooses codes: (n, d)."""
    device = next(m.parameters()).device
    return torch.cat([m.vq.latents(part.to(device)).flatten(2).mean(2).cpu() for part in pixels.split(64)]).numpy()


def run_fid(settings, judge):
    """Frechet distance of two sets. "world": of held-out scenes and drawings of their prompts, in the features of the
    model's own picture tokenizer, which no other FID can be compared with."""
    if my_share()[0]:
        return None
    if settings.variant != "world":
        network = functools.cache(lambda: fid_network(settings.variant, data.device_of(settings.device)))
        a, b = (fid_side(place, settings.variant, network)
                for place in (settings.data, settings.features or settings.preds))
        return {"score": fid_distance(*a, *b)}
    m, text, run = load_run(settings)
    if run is None:
        raise InputError("--variant world compares drawings of the built-in world: give the run folder of one")
    world, rng = data.world_of(run), np.random.default_rng([settings.seed, 7])
    pairs = [world.held_out_scene(skill, rng) for skill in world.skills for _ in range(settings.n)]
    prompts = [data.prompt_text(goal, rng) for _, goal in pairs]
    shown = data.draw([scene for scene, _ in pairs], world.cell)
    real = torch.stack([data.to_tensor(picture) for picture in shown])
    drawn = draw(m, text, prompts, settings.seed, settings.guidance or None)
    a, b = (fid_stats(tokenizer_features(m, pixels)) for pixels in (real, drawn))
    return {"score": fid_distance(*a, *b), "features": "of the picture tokenizer", "pictures": len(pairs)}


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: one command
# ---------------------------------------------------------------------------------------------------------------------
def score_world(settings):
    """Scores of one run on the built-in world, printed, and stored where --out says: its own scores.json stays."""
    m, text, run = load_run(settings)
    if run is None:
        raise InputError(f"{settings.checkpoint} never saw the built-in world: score takes the folder of a run")
    world = data.world_of(run)
    scores = {**score_understanding(m, text, world, settings.n, settings.seed),
              **score_generation(m, text, world, settings.n, settings.seed)[0],
              **score_tokenizer(m, world, 2 * settings.n, settings.seed)}
    print_scores(scores)
    if settings.out:
        write_json(scores, settings.out)
    return scores


def print_scores(scores):
    """Scores as two short tables."""
    for title, key in (("understanding", "und"), ("generation", "gen")):
        rows = scores["und_by_kind" if key == "und" else "gen_by_skill"]
        print(f"{title:20s} {scores[key]:.3f}   " + "   ".join(f"{name} {value:.2f}" for name, value in rows.items()))
    print(f"stricter: f1 {scores['f1']:.3f}, acc+ {scores['acc_plus']:.3f}, circular {scores['circular']:.3f}; "
          f"open questions {scores['open']:.3f}")


ASKED = {"mmmu": (read_mmmu, judge_mmmu), "mmbench": (read_mmbench, judge_mmbench), "mmvp": (read_mmvp, judge_mmvp),
         "mmvet": (read_mmvet, judge_mmvet), "pope": (read_pope, judge_pope), "mme": (read_mme, judge_mme)}
DRAWN = {"geneval": run_geneval, "dpg": run_dpg, "fid": run_fid}
# Ways to score, the default first: "aia" is what the paper's evaluation programs do.
WAYS = {"mmmu": ("aia", "official"), "mmbench": ("aia", "vlmevalkit"), "mmvp": ("aia", "official"),
        "mmvet": ("official",), "pope": ("aia",), "mme": ("aia", "official"), "geneval": ("official",),
        "dpg": ("official", "ulmevalkit"), "fid": ("pytorch", "clean", "world"), "world": ("",)}


@dataclass(frozen=True)
class Score(Loaded):
    """Score a model on a benchmark, or a run on held-out combinations of the built-in world."""

    POSITIONAL = ("bench",)
    bench: str = opt("world", "benchmark", tuple(WAYS))
    data: str = opt("", "folder of the benchmark as it is distributed; mmbench, geneval: or its file; fid: folder of "
                    "pictures, or an .npz with mu and sigma")
    out: str = opt("", "folder of answers, submission files, scores.json; world: JSON file, empty: printed only")
    preds: str = opt("", "score this and run no model: predictions.jsonl; geneval, dpg, fid: a folder of pictures")
    variant: str = opt("", "way to score, empty: the first of "
                       + "; ".join(f"{name}: {', '.join(ways)}" for name, ways in WAYS.items() if len(ways) > 1))
    judge: str = opt("none", "JSONL of recorded replies of a judge; none: what needs one is null")
    judge_export: str = opt("", "write the requests that have no reply yet to this file, and stop")
    judge_prompt: str = opt("", "file with the official judge prompt (mmbench with a judge, mmvet)")
    force: bool = opt(False, "take a judge prompt or labels (pope) that are not the official ones")
    prompt_style: str = opt("aia", "how questions are put to Janus-Pro: aia or vlmevalkit", tuple(MAX_NEW_TOKENS))
    gen_roles: str = opt("tags", "role words of Janus-Pro's drawing prompts: <|User|>, or User", ("tags", "plain"))
    guidance: float = opt(0.0, "classifier-free guidance of drawings; 0: the model's own")
    pictures: int = opt(4, "for each prompt (geneval, dpg)")
    runs: int = opt(1, "gradings by the judge (mmvet)")
    features: str = opt("", "fid: .npz with features (n, d) in place of --preds")
    batch: int = opt(1, "questions asked together")
    n: int = opt(60, "world: pictures for each question kind, and prompts for each skill")
    seed: int = opt(0, "draws questions, prompts and codes")


def refuse_flags(settings):
    """Flags that do not go together, before anything is read or written."""
    bench, variant, world = settings.bench, settings.variant, settings.variant == "world"
    given = settings.preds or (bench == "fid" and settings.features)
    for wrong, message in (
            (variant not in WAYS[bench], f"--variant {variant!r}: {bench} knows {', '.join(WAYS[bench])}"),
            (not settings.out, f"score {bench} needs --out, a folder for what it writes"),
            (not settings.data and not world, f"score {bench} needs --data, the benchmark as it is distributed"),
            (bench == "fid" and not world and not given, "score fid needs --preds or --features beside --data"),
            (not settings.checkpoint and (world or not given),
             "give --checkpoint FOLDER to run a model, or --preds to score what one has said or drawn"),
            (settings.prompt_style != "aia" and bench == "mmvet",
             "--prompt-style vlmevalkit: its system text for MM-Vet is not known here; use aia"),
            (bench == "dpg" and settings.pictures not in (1, 4), "--pictures: dpg takes 4, as a grid, or 1"),
            (min(settings.pictures, settings.batch, settings.runs) < 1, "--pictures, --batch and --runs start at 1")):
        if wrong:
            raise InputError(message)


def score_answers(settings, judge):
    """Read the questions, have them answered unless they are, score what is on disk."""
    read, judged = ASKED[settings.bench]
    items = read(settings.data, settings)
    for name, times in Counter(item.id for item in items).items():
        if times > 1:
            raise InputError(f"{settings.data}: id {name!r} comes {times} times: download it again")
    if not items:
        raise InputError(f"{settings.data} holds no questions: download it again")
    if not settings.preds:
        ask_all(settings, items)
    if my_share()[0]:
        return None
    file = settings.preds or Path(settings.out) / "predictions.jsonl"
    scores = judged(settings, items, read_predictions(file, items), judge)
    return scores and scores | {"questions": len(items)}


def score(settings):
    """Scores of one benchmark, printed and stored."""
    if settings.bench == "world":
        return score_world(settings)
    settings, judge = replace(settings, variant=settings.variant or WAYS[settings.bench][0]), None
    refuse_flags(settings)
    recorded = "" if settings.judge == "none" else settings.judge
    if recorded or settings.judge_export:
        judge = Judge(recorded, settings.judge_export)
    try:
        Path(settings.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {settings.out} cannot be made ({error.strerror}): give a folder") from error
    scores = DRAWN.get(settings.bench, score_answers)(settings, judge)
    if judge and judge.wanted:
        lines_to(settings.judge_export, [json.dumps({"key": key, "request": request, "replies": []}, ensure_ascii=False)
                                         for key, request in judge.wanted.items()])
        print(f"{settings.judge_export}: {len(judge.wanted)} requests; fill in their replies"
              + f", {settings.runs} each," * (settings.runs > 1) + " and give it as --judge")
        return {"benchmark": settings.bench, "requests": len(judge.wanted)}
    if scores is None:                                                          # another process of torchrun tells it
        return {}
    scores = {"benchmark": settings.bench, "variant": settings.variant, **scores}
    write_json(scores, Path(settings.out) / "scores.json")
    print_benchmark(scores)
    return {key: value for key, value in scores.items() if not isinstance(value, dict | list)}


def print_benchmark(scores):
    """The number first, then what it is made of."""
    def listed(values):
        return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in values.items())

    plain = {key: value for key, value in scores.items() if not isinstance(value, dict | list) and value is not None}
    print(f"{plain.pop('benchmark')} ({plain.pop('variant')}): " + "no score, " * (scores["score"] is None)
          + listed(plain))
    for name, value in scores.items():
        if isinstance(value, dict):
            print(f"  {name}: {listed(value)}")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of the paper
# ---------------------------------------------------------------------------------------------------------------------
TASK_COLOUR = {"gen": "#D55E00", "und": "#0072B2"}
TASK_NAME = {"gen": "generation", "und": "understanding"}
DIRECTION = {"gen": "T2I", "und": "I2T"}             # names in the file of digitised curves
PAPER_MODEL = {"emu3": ("emu3", "Emu3", 0.13), "janus": ("janus_pro", "Janus-Pro", 0.02)}   # name there, Table 1
PAPER_STYLE = {"linestyle": (0, (1, 1.2)), "linewidth": 1.3, "alpha": 0.8}      # dotted: not measured here
CYCLE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")      # Okabe and Ito
ARMS = ("before", "control", "after", "public")      # of a run, in the order of training; or public weights


@dataclass(frozen=True)
class Figures:
    """Draw the paper's figures from finished runs: Fig. 1, 3, 4, 5 and Table 1, with the paper's curves dotted."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders, or JSON files of eval.py curves")
    references: tuple = opt((), "further reference curves for Fig. 4: JSON files of eval.py curves --hf")
    study: str = opt("", "JSON file of train.py study: draws study.png as well, or alone")
    out: str = opt("figures", "folder to write")


def figures(settings):
    """Write fig1.png, fig3.png, fig4.png, fig5.png and figures.json, and study.png of a study."""
    if not (settings.runs or settings.study):
        raise InputError("figures needs run folders: python eval.py figures runs/tiny-emu3-seed0")
    paper, out = model.read_json(aia.CURVES), Path(settings.out)
    runs = {name: load_result(path) for name, path in named(settings.runs).items()}
    references = load_references(settings.references, paper)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} is no folder that can be made ({error.strerror}): give another") from error
    if settings.study:
        figure_study(model.read_json(Path(settings.study)), out / "study.png")
    if not settings.runs:
        return {"out": str(out / "study.png")}
    numbers = {"fig1": figure_1(runs, paper, references, out / "fig1.png"), "table1": table_1(runs),
               "fig3": figure_3(runs, paper, out / "fig3.png"), "fig4": figure_4(references, out / "fig4.png"),
               "fig5": figure_5(runs, paper, out / "fig5.png")}
    write_json(numbers, out / "figures.json")
    print(f"{out}/fig1.png, fig3.png, fig4.png, fig5.png, figures.json")
    return {"correlation": {name: row["correlation"] for name, row in numbers["fig1"].items()}}


def named(places):
    """{short name: path}: the last part of each path, with as many folders before it as tell them apart."""
    paths = [Path(os.path.abspath(place)) for place in places]
    paths = list(dict.fromkeys(path.parent if path.name == "curves.json" else path for path in paths))
    parts = [path.with_suffix("").parts if path.suffix == ".json" else path.parts for path in paths]
    for n in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return {str(path): path for path in paths}


def curve_file(path):
    """The object in a JSON file of curves, or in that of a folder, and the file."""
    file = path if path.suffix == ".json" else path / "curves.json"
    if not file.exists():
        raise InputError(f"{file} is missing: give the folder of a finished run, or make it with eval.py curves")
    return model.read_json(file), file


def load_result(path):
    """Run folder or JSON file -> {"curves": {task: {"target", "arms"}} of the tasks with samples, "kind", "log"}."""
    stored, file = curve_file(path)
    curves, run = {}, file.with_name("settings.json")
    try:
        for task in aia.TASKS:
            rows = stored.get(task) or {}
            arms = {name: rows[name] for name in ARMS if rows.get(name)}        # null: no samples
            for row in arms.values():
                if len({len(np.asarray(x, float)) for x in (row["intensity"], row["std"], rows["target"])}) > 1:
                    raise ValueError("curves of different length")
            curves |= {task: {"target": rows["target"], "arms": arms}} if arms else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): make it again with eval.py curves") from error
    if not curves:
        raise InputError(f"{file} holds no curves of a run: make it with eval.py curves (give what curves --hf wrote "
                         "as --references)")
    kind = stored.get("kind")
    if not kind and run.exists():                    # else unknown, and the paper has nothing to lay over it
        kind = getattr(model.PRESETS.get(model.read_json(run).get("preset")), "kind", None)
    return {"curves": curves, "kind": kind if kind in PAPER_MODEL else None,
            "log": training_log(path / "metrics.jsonl")}


def training_log(file):
    """Reports of a run so far, without a last line that was cut short; none where there is no log."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"name", "step"} <= set(row)]


def load_references(places, paper):
    """{task: {name: curve}}: the paper's references, then further ones."""
    found = {}
    for task in aia.TASKS:
        figure, name, direction = aia.RAW[task]      # what the targets follow; Fig. 4 does not show all of it
        found[task] = {name: paper[figure][name][direction]} | {
            name: row[direction] for name, row in paper["fig4"].items() if direction in row}
    for name, path in named(places).items():
        stored, file = curve_file(path)
        own = {task: stored[task]["intensity"] for task in aia.TASKS
               if isinstance(stored.get(task), dict) and "intensity" in stored[task]}
        if not own or not all(isinstance(curve, list) and len(curve) > 2 and all(
                isinstance(x, float | int) for x in curve) for curve in own.values()):
            raise InputError(f"--references {file} holds no reference curve: make it with eval.py curves --hf")
        for task, curve in own.items():
            found[task][name + " (here)"] = curve    # the paper may have one of the same name
    return found


def depths(n):
    """Relative depth of each of n layers, so that models of different depth share an axis."""
    return (np.arange(n) + 0.5) / n


def canvas(titles, ylabel, xlabel="relative depth", ends=(0, 1)):
    """Panels, two in a row, in the one look of all figures."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    columns, rows = min(len(titles), 2), (len(titles) + 1) // 2
    figure, panels = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.4 * rows + 0.5), sharey=True,
                                  layout="constrained", squeeze=False)
    for panel in panels.flat[len(titles):]:
        panel.remove()
    for panel, title in zip(panels.flat, titles, strict=False):
        panel.set_title(title, fontsize=11)
        panel.set(xlabel=xlabel, **{"xlim": ends} if ends else {})
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel(ylabel)
    return figure, panels.flat[:len(titles)]


def finish(figure, panels, file, bottom=0, shared=True):
    """A legend below all panels, with one entry for each label, or below each panel its own; then the file."""
    from matplotlib import pyplot as plt
    look, entries = {"frameon": False, "fontsize": 9}, {}
    for panel in panels:
        panel.set_ylim(bottom=bottom)
        handles, labels = panel.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
        if not shared:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, **look)
    if shared and entries:
        width = 0.6 + 0.075 * max(map(len, entries))                            # of a column, in inches
        figure.legend(entries.values(), entries.keys(), loc="outside lower center",
                      ncols=max(int(figure.get_figwidth() / width), 1), **look)
    try:
        figure.savefig(file, dpi=150, format="png")
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): give a file in a folder that exists") from error
    finally:
        plt.close(figure)


def dotted(panel, curve, colour, label):
    """A digitised curve of the paper."""
    panel.plot(depths(len(curve)), curve, color=colour, label=label, **PAPER_STYLE)


def figure_1(runs, paper, references, file):
    """Intensity of both tasks per layer, before AIA: where one is high the other is low (Fig. 1)."""
    first = {name: next(iter(next(iter(run["curves"].values()))["arms"].items())) for name, run in runs.items()}
    figure, panels = canvas([f"{name}, {label_of(*first[name])}" for name in runs], "attention on the other modality")
    numbers = {}
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        curves = {}
        for task, rows in run["curves"].items():
            row, colour = next(iter(rows["arms"].values())), TASK_COLOUR[task]
            curves[task] = mean = np.array(row["intensity"])
            std, depth = np.array(row["std"]), depths(len(mean))
            panel.plot(depth, mean, color=colour, marker="o", markersize=4, label=TASK_NAME[task])
            panel.fill_between(depth, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
            if run["kind"]:
                key, title, _ = PAPER_MODEL[run["kind"]]
                dotted(panel, paper["fig1"][key][DIRECTION[task]], colour, f"{TASK_NAME[task]}, {title} (paper)")
        numbers[name] = {"model": first[name][0],
                         "correlation": correlation(*curves.values()) if len(curves) == 2 else None,
                         "tasks": {task: described(rows, references[task]) for task, rows in run["curves"].items()}}
    finish(figure, panels, file)
    return numbers


def correlation(a, b):
    """Pearson's over layers, None for a constant curve."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else None


def described(rows, references):
    """Of each arm: mean distance over layers to the target and to each reference, even share of the keys, and per layer
    the share of the first token (older files have none)."""
    layers = len(rows["target"])
    return {name: {"distance_to_target": distance(rows | rows["arms"], name),
                   "distance_to_references": {
                       other: float(np.abs(np.array(row["intensity"]) - aia.resample(curve, layers)).mean())
                       for other, curve in references.items()},
                   "uniform": row.get("uniform"), "sink": row.get("sink")} for name, row in rows["arms"].items()}


def table_1(runs):
    """Standard deviation of the intensity over samples: of each layer, then the mean over layers (Table 1)."""
    numbers = {}
    for name, run in runs.items():
        first = {task: next(iter(rows["arms"].values())) for task, rows in run["curves"].items()}
        row = numbers[name] = {task: float(np.mean(row["std"])) for task, row in first.items()}
        row |= {"mean": float(np.mean([*row.values()])), "paper": PAPER_MODEL[run["kind"]][2] if run["kind"] else None,
                "samples": {task: row.get("samples") for task, row in first.items()},
                "layers": {task: row["std"] for task, row in first.items()}}
        print(f"Table 1, {name}: " + ", ".join(f"{TASK_NAME.get(key, key)} {row[key]:.3f}" for key in (*first, "mean"))
              + (f" (paper: {PAPER_MODEL[run['kind']][1]} {row['paper']})" if run["kind"] else ""))
    return numbers


def figure_3(runs, paper, file):
    """Next-token loss of several runs in their last stage, dashed without AIA; the paper's at all of its ratios
    NTP : AIA (Fig. 3), of which 50:1 lies lowest."""
    figure, panels = canvas([*TASK_NAME.values()], "next-token loss", "share of the stage's steps")
    numbers = {}
    for kind in sorted({run["kind"] for run in runs.values() if run["kind"]}):
        key, title, _ = PAPER_MODEL[kind]
        for label, points in paper["fig3"][key].items():
            for panel, task in zip(panels, aia.TASKS, strict=True):
                if label.startswith(("joint", DIRECTION[task])):
                    step, loss = np.array(points).T
                    panel.plot(step / step[-1], loss, color="black" if kind == "emu3" else "#888888", **PAPER_STYLE,
                               label=f"{title} (paper), 1:1 to {'50' if kind == 'emu3' else '100'}:1")
    for number, (name, run) in enumerate(runs.items()):
        for stage, label, line in (("control", f"{name}, without AIA", "--"), ("tune", name, "-")):
            for panel, task in zip(panels, aia.TASKS, strict=True):
                rows = [row for row in run["log"] if row["name"] == stage and task in row]
                if rows:
                    steps, ntp = [row["step"] for row in rows], [row[task]["ntp"] for row in rows]
                    panel.plot(np.array(steps) / steps[-1], ntp, line, color=CYCLE[number % len(CYCLE)], label=label)
                    numbers.setdefault(label, {})[task] = {"step": steps, "ntp": ntp}
    for panel in panels:
        panel.set_yscale("log")                      # vocabularies, and so losses, are of very different size
    finish(figure, panels, file, None)
    return numbers


def figure_4(references, file):
    """References that targets can be made of: the paper's dotted, further ones solid (Fig. 4)."""
    figure, panels = canvas([*TASK_NAME.values()], "attention on the other modality")
    figure.set_figheight(figure.get_figheight() + 0.9)                          # nine names stand below
    for panel, task in zip(panels, aia.TASKS, strict=True):
        for i, (name, curve) in enumerate(references[task].items()):
            style = {"linewidth": 2} if name.endswith(" (here)") else PAPER_STYLE | (
                {"linestyle": "-."} if i >= len(CYCLE) else {})
            panel.plot(depths(len(curve)), curve, color=CYCLE[i % len(CYCLE)], label=name.replace("_", "-"), **style)
        panel.step(depths(32), aia.targets(32, task)[0], where="mid", color="black", linewidth=1.5, label="target")
    finish(figure, panels, file, shared=False)
    return references


def figure_5(runs, paper, file):
    """Without AIA, with it, and the target; the paper's own change dotted (Fig. 5)."""
    places = [(name, task) for name in runs for task in aia.TASKS]
    figure, panels = canvas([f"{name}, {TASK_NAME[task]}" for name, task in places], "attention on the other modality")
    numbers = {}
    for panel, (name, task) in zip(panels, places, strict=True):
        rows, kind = runs[name]["curves"].get(task), runs[name]["kind"]
        if not rows:
            panel.annotate("no samples", (0.5, 0.5), xycoords="axes fraction", ha="center")
            continue
        panel.step(depths(len(rows["target"])), rows["target"], where="mid", color="black", linewidth=1.5,
                   label=LABEL["target"])
        for which, row in rows["arms"].items():
            panel.plot(depths(len(row["intensity"])), row["intensity"], color=COLOUR[which], marker="o", markersize=4,
                       label=label_of(which, row))
        even = row.get("uniform")                    # of the last arm
        if even is not None:
            panel.axhline(even, color="black", linewidth=0.8, linestyle="--", alpha=0.5, label="share of the keys")
        for which, ours in (("without", "before"), ("with", "after")) if kind else ():
            key, title, _ = PAPER_MODEL[kind]
            dotted(panel, paper["fig5"][f"{key}_{which}_aia"][DIRECTION[task]], COLOUR[ours],
                   f"{title} {which} AIA (paper)")
        numbers.setdefault(name, {})[task] = {which: row["intensity"] for which, row in rows["arms"].items()} | {
            "target": rows["target"]}
    finish(figure, panels, file)
    return numbers


def figure_study(content, file):
    """Both scores of each row, less those of its baseline with the same seed: mean and 95 % interval, none of one seed.
    Two experts are one row."""
    if not {"summary", "machine"} <= content.keys():
        raise InputError("--study: give a file that train.py study wrote")
    rows = {name: row for name, row in content["summary"].items() if row["baseline"]}
    figure, panels = canvas([TASK_NAME[task] for task in ("und", "gen")], "", "difference of scores", None)
    figure.set_figheight(1.4 + 0.3 * len(rows))
    for panel, task in zip(panels, ("und", "gen"), strict=True):
        for i, row in enumerate(rows.values()):
            found = row["difference"][task]
            panel.errorbar(found["mean"], -i, xerr=found["interval"], fmt="o", capsize=3, color=TASK_COLOUR[task],
                           markersize=5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.locator_params(axis="x", nbins=5)
    panels[0].set_yticks([-i for i in range(len(rows))], [
        f"{name} \N{MINUS SIGN} {row['baseline']} ({len(row['paired'])})" for name, row in rows.items()])
    finish(figure, panels, file, None)
    print(f"{file}: rows and their seeds, of {content['machine']['date']}")


# ---------------------------------------------------------------------------------------------------------------------
# UniFork's modality alignment
# ---------------------------------------------------------------------------------------------------------------------
NEIGHBOURS = (10, 5, 20)                             # the first is the measure, the others show what k does
RESAMPLES = 1000
ORDER = {"gen": "generation: caption, then picture", "und": "understanding: picture, then caption"}


@dataclass(frozen=True)
class Alignment(Loaded):
    """UniFork's measure: do pictures and captions have the same neighbours, layer by layer? Attention is causal: what
    comes later in a task has seen what came before, and not the other way round."""

    data: str = opt("", "data set of drawing records (picture and caption); empty: held-out scenes of the world")
    n: int = opt(1024, "pairs of picture and caption, all different; the easiest world has about 450")
    seed: int = opt(0, "draws the pairs and the bootstrap")
    out: str = opt("", "PNG file, its numbers beside it as JSON; empty: alignment.png in the run folder, or here")


def different_pairs(settings, kind, run):
    """Up to n pairs (picture, caption), none twice: equal pairs would be neighbours by nature, in both spaces."""
    if settings.data:
        records = data.every(data.FileSource(settings.data, kind), "gen")
        found = ((record.turns[0][0], record.pictures[0]) for record in records)
    elif run is None or run.get("data"):
        raise InputError(f"{settings.checkpoint} never saw the built-in world: alignment needs --data FILE.jsonl with "
                         "drawing records")
    else:
        rng, world = np.random.default_rng([settings.seed, 11]), data.world_of(run)
        scenes = (world.held_out_scene(world.skills[i % len(world.skills)], rng)[0] for i in range(20 * settings.n))
        found = ((data.describe(scene), scene) for scene in scenes)
    pairs, seen = [], set()
    for caption, picture in found:
        if len(pairs) >= settings.n:
            break
        if caption.strip() and not {caption, picture} & seen:
            seen |= {caption, picture}
            pairs.append((data.draw([picture], world.cell)[0] if isinstance(picture, tuple) else picture, caption))
    if len(pairs) <= max(NEIGHBOURS) + 1:
        raise InputError(f"{len(pairs)} different pairs of picture and caption are too few for {max(NEIGHBOURS)} "
                         "neighbours: give more drawing records, or a larger --n")
    return pairs


def caption_tokens(preparer, caption):
    """First and end of a drawing prompt's words in its first piece: as few tokens as say all of them."""
    own, text = preparer.template.prompt(caption, (1, 1))[0][0], preparer.text
    words, start, end = text.decode(text.encode(caption.strip())).strip(), 0, len(own)
    if not words or words not in text.decode(own):
        raise InputError(f"the caption {caption[:60]!r} is not found in its prompt: leave its record out")
    while words in text.decode(own[start + 1:]):
        start += 1
    while words in text.decode(own[start:end - 1]):
        end -= 1
    return start, end


def pair_batch(preparer, pairs, task):
    """Pairs (picture, caption) -> Batch, and where the words of the captions and the pictures lie, (B, T) bool each.
    Template, tags, row ends and EOS belong to neither."""
    records = [data.Record("a pair", task, ((caption, "<image>") if task == "gen" else (data.DESCRIBE, caption),),
                           (picture,)) for picture, caption in pairs]
    samples, valid, pictures = preparer.pieces(records)
    batch = data.collate(task, samples, torch.tensor(valid), preparer.text.ids["pad"], **pictures)
    words, image = torch.zeros(2, *batch.tokens.shape, dtype=torch.bool)        # (B, T) each
    for i, pieces in enumerate(samples):
        roles = torch.tensor([role for ids, role in pieces for _ in ids])
        image[i, :len(roles)] = roles == data.IMAGE
        if task == "gen":
            start, end = caption_tokens(preparer, pairs[i][1])
            words[i, start:end] = True
        else:
            words[i, :len(roles) - 1] = roles[:-1] == data.ANSWER               # without EOS
    return batch, words, image


@torch.inference_mode()
def pooled(m, preparer, pairs, task):
    """Mean hidden state of caption and of picture tokens after each layer (the embedding is layer 0), (L + 1, n, C)
    each. In generation the caption stands first, in understanding the picture: what comes later has seen it."""
    device, sides = next(m.parameters()).device, ([], [])
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


def alignment(settings):
    """Write alignment.png and alignment.json: score per layer, with 95 % bootstrap bars over pairs, beside chance and
    shuffled pairs (UniFork, Sec. 3.1; definition after Huh et al. 2024)."""
    m, text, run = load_run(settings)
    out = Path(settings.out or (Path(settings.checkpoint) / "alignment.png" if run else "alignment.png"))
    if not out.parent.is_dir() or out.suffix != ".png":
        raise InputError(f"--out {out} cannot be written: give a file in an existing folder that ends in .png")
    pairs = different_pairs(settings, m.config.kind, run)
    n, rng = len(pairs), np.random.default_rng(settings.seed)
    result = {"n": n, "chance": {k: k / (n - 1) for k in NEIGHBOURS}}
    weights = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)).float() / n       # (R, n)
    order = torch.from_numpy(rng.permutation(n))
    mixed = order.roll(1)[order.argsort()]           # one long cycle: no pair stays together
    preparer = data.Preparer(m, text)
    for task in aia.TASKS:
        words, image = pooled(m, preparer, pairs, task)
        rows = result[task] = {"score": {}, "low": {}, "high": {}, "shuffled": {}}
        for k in NEIGHBOURS:
            each, apart = (torch.stack([mutual_neighbours(a, b[index], k) for a, b in zip(words, image, strict=True)])
                           for index in (slice(None), mixed))                   # (L + 1, n) each
            ends = (each @ weights.T).quantile(torch.tensor([0.025, 0.975]), dim=1)                     # (2, L + 1)
            for name, values in zip(rows, (each.mean(1), *ends, apart.mean(1)), strict=True):
                rows[name][k] = values.tolist()
        k = NEIGHBOURS[0]
        print(f"{ORDER[task]}; alignment of {n} pairs, k = {k}, by layer "
              + " ".join(f"{value:.3f}" for value in rows["score"][k])
              + f"; shuffled {np.mean(rows['shuffled'][k]):.3f}, chance {result['chance'][k]:.3f}")
    plot_alignment(result, out)
    write_json(result, out.with_suffix(".json"))
    print(f"{out} and {out.with_suffix('.json')}")
    return {task: result[task]["score"][NEIGHBOURS[0]] for task in aia.TASKS}


def plot_alignment(result, file):
    """Alignment of both tasks over layers; beside it with fewer and with more neighbours."""
    first, *others = NEIGHBOURS
    figure, panels = canvas([f"{result['n']} pairs, {first} neighbours",
                             f"{' (dashed) and '.join(map(str, others))} (dash-dotted) neighbours"],
                            "alignment of text and picture", "layer (0: embedding)", None)
    for task in aia.TASKS:
        for k, line in zip(NEIGHBOURS, ("-", "--", "-."), strict=True):
            panel = panels[int(k != first)]
            mean, low, high = (np.array(result[task][name][k]) for name in ("score", "low", "high"))
            panel.errorbar(range(len(mean)), mean, np.array([mean - low, high - mean]).clip(0), fmt=line, marker="o",
                           color=TASK_COLOUR[task], markersize=4, capsize=2, label=ORDER[task] if k == first else None)
        panels[0].plot(result[task]["shuffled"][first], color=TASK_COLOUR[task], linewidth=0.8, linestyle="--",
                       label=f"{TASK_NAME[task]}, pairs shuffled")
    panels[0].axhline(result["chance"][first], color="black", linewidth=0.8, linestyle=":", label="chance")
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("Attention is causal: what comes later in a task has seen what came before.", fontsize=9)
    finish(figure, panels, file)


# ---------------------------------------------------------------------------------------------------------------------
# A page to look at
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Report:
    """Put runs on one page that opens from disk: samples, curves, losses, scores, settings."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders")
    out: str = opt("report.html", "HTML file to write")


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } img { max-width: 100%; height: auto } details { margin: 1rem 0 }
h2 { margin-top: 3rem; border-top: 2px solid #222; padding-top: 1rem } td { font-variant-numeric: tabular-nums }
summary { cursor: pointer }"""
PICTURES = {"samples": "Drawings of held-out prompts", "curves": "Attention on the other modality, by layer",
            "alignment": "Alignment of text and picture, by layer"}
SCORED = {"und": "questions about held-out pictures, share right", "gen": "drawings of held-out prompts, share right",
          "reader": "pictures that the tokenizer gives back readable, share", "psnr": "picture tokenizer, PSNR in dB",
          "val_ntp_gen": "next-token loss on held-out pictures", "val_ntp_und": "next-token loss on held-out answers",
          "aia_gen": "L_AIA of generation", "aia_und": "L_AIA of understanding", "seconds": "training, seconds",
          "rss_gb": "memory, GB"}


def report(settings):
    """Write one self-contained HTML file."""
    if not settings.runs:
        raise InputError("report needs run folders: python eval.py report runs/tiny-emu3-seed0")
    runs = named(settings.runs)
    parts = [section(name, path) for name, path in runs.items()]
    title = html.escape(", ".join(runs))
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
            f"<h1>Attention Interaction Alignment</h1><p>{title}; {time.strftime('%Y-%m-%d')}</p>"
            f"{''.join(parts)}</html>")
    with aside(settings.out) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{settings.out}: {len(page) / 1e6:.1f} MB")
    return {"out": settings.out, "runs": len(parts)}


def section(name, folder):
    """What one run left, as HTML: pictures first."""
    if not (folder / "settings.json").exists():
        raise InputError(f"{folder} holds no settings.json: give the folder of a run")
    read = {part: model.read_json(folder / f"{part}.json") if (folder / f"{part}.json").exists() else {}
            for part in ("result", "scores", "settings")}
    result, scores, log = read["result"], read["scores"], training_log(folder / "metrics.jsonl")
    text = [f"<h2>{html.escape(name)}</h2>"]
    if not result:
        text.append("<p>This run has no result yet.</p>")
    text.append(html_table({SCORED[key]: result[key] for key in SCORED if result.get(key) is not None}))
    for part, title in PICTURES.items():
        if (folder / f"{part}.png").exists():
            text.append(html_picture(title, (folder / f"{part}.png").read_bytes()))
        if part == "curves" and (folder / "curves.json").exists():
            rows = load_result(folder)["curves"]
            distances = {f"{TASK_NAME[task]}, {label_of(arm, row['arms'][arm])}": distance(row | row["arms"], arm)
                         for task, row in rows.items() for arm in row["arms"]}
            text += ["<p>Mean distance to the target:</p>", html_table(distances)]
    if any(task in row for row in log for task in aia.TASKS):
        drawn = io.BytesIO()
        plot_losses(log, drawn)
        text.append(html_picture("Losses of all stages", drawn.getvalue()))
    arms = [arm for arm in ("before", "control") if arm in scores]
    for key, title in (("und_by_kind", "Questions, share right"), ("gen_by_skill", "Drawings, share right")):
        if key in scores:
            columns = [scores[arm].get(key, {}) for arm in arms] + [scores[key]]
            rows = {kind: [column.get(kind) for column in columns] for kind in scores[key]}
            text += [f"<h3>{title}</h3>", html_table(
                rows, "", *(LABEL[arm] for arm in arms), LABEL["after"] if has_aia(read["settings"]) else WITHOUT)]
    for file in sorted(folder.glob("*/scores.json")):                           # benchmarks scored into the run folder
        text += [f"<h3>{html.escape(file.parent.name)}</h3>", html_table(model.read_json(file))]
    for title, rows in (("Machine", result.get("machine")), ("Settings", read["settings"])):
        if rows:
            text.append(f"<details><summary>{title}</summary>{html_table(rows)}</details>")
    return "".join(text)


def plot_losses(log, file):
    """Next-token loss and L_AIA of each report, the stages of a run one after the other."""
    figure, panels = canvas([*TASK_NAME.values()], "loss", "step, all stages", None)
    start, ends = {}, {}
    for row in log:                                  # in the order of training; the picture tokenizer has other losses
        if not set(aia.TASKS) & set(row):
            continue
        start.setdefault(row["name"], max(ends.values(), default=0))
        ends[row["name"]] = start[row["name"]] + row["step"]
    for panel, task in zip(panels, aia.TASKS, strict=True):
        for key, colour, label in (("ntp", "#0072B2", "next-token loss"), ("aia", "#D55E00", "L_AIA")):
            for number, (name, first) in enumerate(start.items()):
                rows = [row for row in log if row["name"] == name and task in row and key in row[task]]
                panel.plot([first + row["step"] for row in rows], [row[task][key] for row in rows], color=colour,
                           label=label if number == 0 else None)
        panel.set_yscale("log")
        panel.margins(y=0.15)                        # room for the names
        for name, first in start.items():
            panel.axvline(first, color="#bbbbbb", linewidth=0.8)
            panel.annotate(f" {name}", (first, 0.99), xycoords=panel.get_xaxis_transform(), va="top", fontsize=8)
    finish(figure, panels, file, None)


def html_picture(title, png):
    """A picture that is part of the page."""
    code = base64.b64encode(png).decode()
    return f'<h3>{html.escape(title)}</h3><img alt="{html.escape(title)}" src="data:image/png;base64,{code}">'


def html_table(rows, *heads):
    """{first cell: other cell, or list of them} as a table, with heads if there are several columns."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"] if heads else []
    for key, value in rows.items():
        cells = "".join(f"<td>{shown(cell)}</td>" for cell in (value if heads else [value]))
        lines.append(f"<tr><td>{html.escape(str(key))}</td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def shown(value):
    """A value as HTML: numbers with four digits, what is nested in one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{html.escape(str(key))} {shown(x)}" for key, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return "none" if value is None else html.escape(str(value))


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory, against what people would otherwise run
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bench:
    """Measure speed and memory; rivals in one run, in turn."""

    POSITIONAL = ("table",)
    table: str = opt("generate", "generate: answers and drawings; train: steps and memory of training; processes: one "
                     "and two of them, and waiting for data; data: a million records; fits: memory of training large "
                     "models on one GPU, computed; score: scoring benchmarks of full size; gpu: all that `python -m "
                     "lab.gpu` measures on one",
                     ("generate", "train", "processes", "data", "fits", "score", "gpu"))
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
    if settings.table == "gpu":
        import lab.gpu
        return lab.gpu.measure(lab.gpu.Gpu(**({"out": settings.out} if settings.out else {})))
    import transformers
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    tables = {"generate": bench_generate, "train": bench_train, "processes": bench_processes, "data": bench_data,
              "fits": bench_fits, "score": bench_score}
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
    return [float(word) for word in done.stdout.splitlines()[-1].split()]            # libraries may print before


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

    def keep_map(q, k, v, visible, condition, rectangle):
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
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
            # + of a chunk of tokens the logits, their softmax in float32, and its gradient
            # + of a head that moves the sum of its gradient in float32, and what is added to it
            head = (4 + 2) * c.vocab * c.width * m.lm_head.weight.requires_grad
            peak = {tokens: held + (tokens * (c.layers * c.width * stream + 2 * (20 * c.width + 4 * c.ffn)) + head
                                    + (2 + 4 + 2) * kernels.CHUNK["cuda"] * c.vocab) / 1e9 for tokens in (3000, 8282)}
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
            net = train.DistributedDataParallel(step.m, broadcast_buffers=False)
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


def bench_score(settings):
    """Seconds of reading and scoring made-up answers to as many questions as the benchmarks of questions have."""
    rng, letters = random.Random(0), "ABCD"
    said = ("A", "The answer is B.", "(C)", "I think it shows a dog", "yes", "No, there is none.", "it is 1,000 cm")
    options = {letter: f"option {i}" for i, letter in enumerate(letters)}
    ids = [f"validation_{subject}_{i}" for subject in MMMU_SUBJECTS for i in range(1, 31)]
    key = {name: {"question_type": "multiple-choice" if i % 17 else "short-answer",
                  "ground_truth": rng.choice(letters) if i % 17 else "1000"} for i, name in enumerate(ids)}
    turned = [options | {"index": i + turn * MMBENCH_STEP, "question": "what?", "answer": letters[(i + turn) % 4],
                         "prediction": rng.choice(said), "category": f"kind {i % 20}", "l2-category": f"group {i % 6}"}
              for i in range(1164) for turn in range(4)]
    files = {task: "".join(f"{i // 2}.jpg\tquestion\t{('Yes', 'No')[i % 2]}\t{rng.choice(said)}\n"
                           for i in range(lines)) for task, (_, lines) in MME_TASKS.items()}
    texts, labels = [rng.choice(said) for _ in range(9000)], [rng.choice(("yes", "no")) for _ in range(9000)]
    works = {"mmmu": (900, lambda: mmmu_score({name: mmmu_parse_choice(rng.choice(said), letters, options, rng)
                                               for name in ids}, key)),
             "mmbench": (len(turned), lambda: [mmbench_score(turned, circular) for circular in (True, False)]),
             "pope": (9000, lambda: pope_metrics(texts, labels)),
             "mme": (sum(lines for _, lines in MME_TASKS.values()), lambda: mme_score(files))}
    seconds = interleaved({name: work for name, (_, work) in works.items()}, settings.repeats)
    rows = [{"benchmark": name, "answers": works[name][0], "seconds": value} for name, value in seconds.items()]
    for row in rows:
        print(f"{row['benchmark']:8s} {row['answers']:5d} answers scored in {row['seconds']:.2f} s")
    return {"seconds": sum(seconds.values())}, rows


COMMANDS = {"score": (Score, score), "generate": (Generate, generate), "chat": (Chat, chat),
            "curves": (Curves, curve_command), "alignment": (Alignment, alignment), "figures": (Figures, figures),
            "report": (Report, report), "collect": (Collect, collect), "bench": (Bench, bench)}


def main(argv=None):
    command, settings = data.chosen(COMMANDS, "eval.py", __doc__, argv)
    result = command and command(settings)
    if result:                                       # other processes of torchrun have none
        print("result " + json.dumps(result))


if __name__ == "__main__":
    data.run(main)
