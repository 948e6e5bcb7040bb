"""Does this code do right by a folder of real weights? One command, a verdict a line, and a file to send in.

Each check compares with something that does not come from this code: files beside the weights, published numbers, the
picture itself, transformers. What nobody can decide by a number is printed to look at.

    python -m lab.check FOLDER                    # a drawn scene as the picture
    python -m lab.check FOLDER --image photo.jpg --out check
"""

import importlib.metadata
import math
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aia
import data
import eval as evaluation
import model
from formats.hub import find_folder
from formats.records import Record, conversation
from formats.weights import ID_FIELDS
from lab.figures import DIRECTION, PAPER_MODEL, TASK_NAME, correlation
from lab.references import from_hub
from parts.pictures import load_picture, to_picture, tokenizer_picture
from parts.settings import (
    InputError,
    aside,
    first_line,
    machine,
    opt,
    parse,
    read_json,
    read_text,
    run_command,
    tell,
    write_json,
)
from parts.text import SPECIAL, Text
from parts.world import Thing, describe, draw_scenes

# Legend: L layers, T tokens, V vocabulary; s: the Subject.
OK, FAIL, SKIPPED, LOOK, ERROR = "ok", "FAIL", "skipped", "look", "error"
TEXTS = ("A red circle is above a blue square.", "It's 12:30 on 2024-01-05; the price isn't $3.50 (really).",
         "Ein Café für Übermorgen,\n\n  zwei Leerzeichen.", "一只猫坐在红色的垫子上。", "🙂 ± × \u00bd")
SCENES = ((Thing("circle", "red", 0), Thing("square", "blue", 3)),
          (Thing("triangle", "green", 1), Thing("cross", "yellow", 2)))
QUESTION = "Describe this picture in one sentence."
TO_DRAW = "a red circle above a blue square"
DRAWN_SIDE = 32                                 # rows and columns of codes that Emu3 draws: a full picture has 90
LIBRARIES = ("numpy", "pillow", "safetensors", "tokenizers", "sentencepiece", "transformers", "jinja2")


@dataclass(frozen=True)
class Check:
    """Check this code on a folder of public weights. Exit status 2 if a check could not run."""

    POSITIONAL = ("folder",)
    folder: str = opt("", "folder or hub id of public weights of Emu3 or Janus-Pro")
    image: str = opt("", "picture to reconstruct and ask about; empty: a drawn scene")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model")
    parity: bool = opt(True, "compare with transformers, which holds the model a second time, in the CPU's memory")
    dtype: str = opt("stored", "of the weights", ("stored", "float32", "bfloat16"))
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = opt("check", "folder for check.json and pictures")


class Subject:
    """What the checks share: settings, model, tokenizer, pictures, the json files beside the weights."""

    def __init__(self, settings):
        self.settings = settings
        if settings.image:
            load_picture(settings.image, "janus")   # before the minutes that loading takes
        self.folder = find_folder(settings.folder)
        self.m, self.text, _ = evaluation.load_run(evaluation.Loaded(
            str(self.folder), settings.vision_tokenizer, settings.dtype, settings.device))
        self.out = Path(settings.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.out} cannot be created ({error.strerror}): choose another") from error
        self.config = self.m.config
        self.device = next(self.m.parameters()).device
        side = math.isqrt(self.config.min_pixels) or self.config.image_size    # the smallest that Emu3 sees as it is
        self.drawn = [np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))
                      for picture in draw_scenes(SCENES)]
        self.picture = settings.image or self.drawn[0]
        self.intensity = {}                         # {task: (L,)}, measured by `losses`

    def file(self, name):
        """The content of a json file in the folder, {} if there is none."""
        return read_json(self.folder / name) if (self.folder / name).exists() else {}

    def save(self, pixels, name):
        with aside(self.out / name) as part:
            Image.fromarray(to_picture(pixels)).save(part, "PNG")


def row(name, verdict, measured, expected, **values):
    """One line of the report. verdict: one of the five above; values: numbers for the file alone."""
    return {"check": name, "verdict": verdict, "measured": measured, "expected": expected, **values}


def judged(right):
    return OK if right else FAIL


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
def round_trip(s):
    """Encode and decode texts. Both tokenizers work on bytes, so every text in normal form C must come back."""
    changed = [text for text in TEXTS if s.text.decode(s.text.encode(text)) != text]
    told = f"{len(TEXTS) - len(changed)} of {len(TEXTS)} texts come back"
    return [row("tokenizer", judged(not changed), told, "all of them", changed=changed)]


def stated_ids(s):
    """[(origin, role, id or ids)] of special tokens, by the json files and, for models of full size, as published."""
    content = s.file("config.json")
    stated = []
    fields = {role: name for role, name in ID_FIELDS.items() if role in s.text.ids} | {"placeholder": "image_token_id"}
    sections = {"config.json": content, "config.json text_config": content.get("text_config") or {},
                "config.json language_config": content.get("language_config") or {},
                "generation_config.json": s.file("generation_config.json")}
    for origin, section in sections.items():
        stated += [(origin, role, section[field]) for role, field in fields.items() if section.get(field) is not None]
    known = content.get("vocabulary_map") or {}
    for role, token in SPECIAL[s.config.kind].items():
        if token in known:
            stated.append(("config.json vocabulary_map", role, known[token]))
    for name, preset in model.PRESETS.items():
        sizes = (preset.kind, preset.layers, preset.width, preset.vocab)
        if not name.startswith("tiny") and sizes == (s.config.kind, s.config.layers, s.config.width, s.config.vocab):
            stated += [(f"published {name}", role, i) for role, i in preset.ids.items()]
    return stated


def special_ids_agree(s):
    """Special tokens are found by their strings; whatever else states an id must agree, and the model must have it."""
    stated = stated_ids(s)
    if not stated:
        return [row("special ids", SKIPPED, "no file states them", "")]
    wrong = [f"{origin}: {role} {i}, not {s.text.ids[role]}" for origin, role, i in stated
             if s.text.ids[role] not in (i if isinstance(i, list) else [i])]
    last = s.text.ids.get("visual", 0) + s.config.codebook - 1
    if s.config.kind == "emu3" and last >= s.config.vocab:
        wrong.append(f"id {last} is beyond the vocabulary of {s.config.vocab}")
    told = "; ".join(wrong) or f"{len(stated)} stated ids agree"
    return [row("special ids", judged(not wrong), told, "those of the tokenizer", ids=s.text.ids)]


def own_template(s):
    """The chat template among the files of a folder, or None."""
    if (s.folder / "chat_template.jinja").exists():
        return read_text(s.folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = s.file(name).get("chat_template")
        if isinstance(found, list):                 # several, each with a name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if found:
            return found
    return None


def rendered(template, s):
    """A question about a picture by a chat template -> text. It may come from anyone, so it runs in a sandbox."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    special = {f"{role}_token": SPECIAL[s.config.kind][role] for role in ("bos", "eos", "pad")}
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True, **special)


def chat_template(s):
    """Our prompt of a question against that of the folder's chat template, each picture as one placeholder.

    For Janus-Pro both are the authors' prompt, without the system text, which the processor adds. For Emu3 the authors'
    own is in their code; the template of a folder was added later by others, so a difference is only shown.
    """
    name, expected = "chat template", "the same tokens as ours"
    template = own_template(s)
    if not template:
        return [row(name, SKIPPED, "the folder has none", expected)]
    try:
        theirs = rendered(template, s)
    except ImportError:
        return [row(name, SKIPPED, "pip install jinja2", expected)]
    except Exception as error:                      # a template may raise anything, and may be written for other input
        return [row(name, LOOK, f"it cannot be rendered: {first_line(error)}", expected)]
    theirs = list(Text(s.text.file, s.config.kind, allow_special=True).encode(theirs))
    ours = []
    codes = torch.zeros(1, 1, dtype=torch.long)
    for ids, role in data.TEMPLATES[s.config.kind](s.config, s.text).conversation([([0, QUESTION], None)], [codes]):
        ours += [] if role == data.IMAGE else ids
    begin, end = ours.index(s.text.ids["boi"]), ours.index(s.text.ids["eoi"])
    ours[begin:end + 1] = [s.text.ids["placeholder"]]
    ours, theirs = (ids[1:] if ids[:1] == [s.text.ids["bos"]] else ids for ids in (ours, theirs))   # processors add it
    if ours == theirs:
        return [row(name, OK, f"{len(ours)} tokens are the same", expected)]
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    told = [f"{ids[first:first + 3]} {s.text.core.decode(ids[first:])!r}" for ids in (ours, theirs)]
    return [row(name, LOOK if s.config.kind == "emu3" else FAIL,
                f"other tokens from number {first} on: ours {told[0]}, theirs {told[1]}", expected)]


def picture_tokens(s):
    """Placeholders of a picture, by the processor's file."""
    stated = s.file("processor_config.json").get("num_image_tokens")
    if stated is None or s.config.kind == "emu3":   # those of Emu3 depend on the picture
        return [row("picture tokens", SKIPPED, "no file states them", "")]
    return [row("picture tokens", judged(stated == s.config.picture_tokens), f"{s.config.picture_tokens}",
                f"{stated}, by processor_config.json")]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def decibels(pixels, again):
    """Peak signal-to-noise ratio of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / ((pixels - again) ** 2).mean().clamp(min=1e-9)))


def reconstruction(s):
    """A picture through the picture tokenizer and back.

    A tokenizer with one wrong tensor gives a smear, at best the right mean colour. The published ones reach 20 dB and
    more on photographs, whose mean colour is at about 12: 4 dB above it is 40 % of its squared error.
    """
    pixels = tokenizer_picture(load_picture(s.picture, s.config.kind), s.config, training=False)[None].to(s.device)
    again = s.m.decode_images(s.m.encode_images(pixels)).clamp(-1, 1)
    found, plain = decibels(pixels, again), decibels(pixels, pixels.mean((2, 3), keepdim=True))
    s.save(torch.cat([pixels, again], 3)[0], "reconstruction.png")
    return [row("reconstruction", judged(found >= plain + 4), f"{found:.1f} dB",
                f"4 dB above its mean colour, {plain:.1f} dB", psnr=found, mean_colour=plain)]


@torch.inference_mode()
def losses(s):
    """Next-token loss of the caption of each drawn scene, of its own picture and of the other one, and the same of the
    codes of the picture after its own caption and the other one.

    Both sides have the same captions and pictures, so a blind model has a difference of about 0. Colours, shapes and
    places are half of the words, and worth over 1 nat each: 0.2 nat a token is far from both. Codes depend on their
    neighbours far more than on words: that difference is only shown. Emu3-Gen has not learned to answer.
    """
    preparer = data.Preparer(s.m, s.text, training=False)
    captions = [describe(scene) for scene in SCENES]
    rows = []
    for task in ("und", "gen"):
        found = {True: [], False: []}
        curves = []
        for i, picture in enumerate(s.drawn):
            for j, caption in enumerate(captions):
                record = conversation([(QUESTION, caption)], (picture,))
                if task == "gen":
                    record = Record("a drawn scene", "gen", ((caption, "<image>"),), (picture,))
                out = s.m(preparer.batch([record]).to(s.device))
                found[i == j].append(out.ntp.item() / out.tokens)
                if i == j:
                    curves.append(out.intensity[0].float().cpu())
        s.intensity[task] = torch.stack(curves).mean(0).tolist()
        own, other = np.mean(found[True]), np.mean(found[False])
        name, verdict, expected = "picture loss", LOOK, "lower after its own caption"
        if task == "und":
            name, verdict, expected = "caption loss", judged(other - own >= 0.2), "at least 0.2 lower"
        rows.append(row(name, verdict, f"{own:.3f} a token, of the wrong pair {other:.3f}", expected,
                        own=float(own), other=float(other)))
    return rows


def answered(s):
    """What the model says about the picture."""
    said = evaluation.answer(s.m, s.text, [(s.picture, QUESTION)], 32)[0]
    return [row("answer", LOOK, repr(said), f"a fitting answer to {QUESTION!r}")]


def drawing(s):
    """What the model draws, into a file."""
    size = tuple(min(side, DRAWN_SIDE) for side in s.config.grid) if s.config.kind == "emu3" else None
    s.save(evaluation.draw(s.m, s.text, [TO_DRAW], size=size)[0], "drawing.png")
    return [row("drawing", LOOK, "drawing.png", repr(TO_DRAW))]


def paper_curves(s):
    """Intensity per layer on the drawn scenes beside the paper's Fig. 1, whose samples were others."""
    key, title, _ = PAPER_MODEL[s.config.kind]
    if not s.intensity:
        return [row("curves", SKIPPED, "the losses could not be measured", "")]
    rows = []
    for task, here in s.intensity.items():
        paper = aia.resample(read_json(aia.CURVES)["fig1"][key][DIRECTION[task]], len(here))
        apart = float(np.abs(np.subtract(here, paper)).mean())
        alike = correlation(here, paper)
        told = f"apart {apart:.3f}, correlation {'none' if alike is None else f'{alike:.2f}'}"
        rows.append(row(f"curve of {TASK_NAME[task]}", LOOK, told, f"near {title} in Fig. 1", here=here, paper=paper))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Parity
# ---------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def same_logits(s):
    """Logits of a text, and for Janus-Pro of a picture before it, against transformers.

    Distances are relative to the size of all logits. On random models of 4 and 32 layers, right ones are 1e-6 apart in
    float32 and up to 0.011 in bfloat16. Two norms of a layer in each other's place move logits by 0.15, queries with
    pairs in another order by 0.28, a wrong base of the rotations by 0.4, a transposed projection by more than 1. (The
    picture codes of Emu3 are left out: rounding changes some.)
    """
    name, expected = "parity with transformers", "the same logits"
    if not s.settings.parity:
        return [row(name, SKIPPED, "--no-parity", expected)]
    if s.file("config.json").get("model_type") not in ("emu3", "janus"):
        return [row(name, SKIPPED, "the folder is not in the layout of transformers", expected)]
    dtype = s.m.lm_head.weight.dtype
    try:
        theirs = from_hub(str(s.folder), "AutoModelForImageTextToText", dtype=dtype).eval()
    except InputError as error:                     # transformers is missing, or too old or too new for the folder
        return [row(name, SKIPPED, f"it cannot be used: {first_line(error.__cause__)}", expected)]
    words = [i for text in TEXTS for i in s.text.encode(text)]
    prompts = {"text": ([s.text.ids["bos"], *words], None)}
    if s.config.kind == "janus":
        pixels = data.Preparer(s.m, None).seen([s.picture])["pixels"]
        held = [s.text.ids["boi"], *[s.text.ids["placeholder"]] * s.config.picture_tokens, s.text.ids["eoi"]]
        prompts["picture"] = [s.text.ids["bos"], *held, *words], pixels
    limit = 1e-3 if dtype == torch.float32 else 0.05
    rows = []
    for what, (ids, pixels) in prompts.items():
        ids = torch.tensor([ids])                                               # (1, T)
        shown = {} if pixels is None else {"pixel_values": pixels.to(dtype)}
        expected_logits = theirs(input_ids=ids, **shown).logits.float()         # (1, T, V)
        found = s.m.logits(ids.to(s.device), None if pixels is None else pixels.to(s.device)).float().cpu()
        apart = float((found - expected_logits).norm() / expected_logits.norm())
        rows.append(row(f"{name}, {what}", judged(apart <= limit), f"{apart:.2g} apart", f"at most {limit:g}",
                        apart=apart))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------
CHECKS = {"tokenizer": round_trip, "special ids": special_ids_agree, "chat template": chat_template,
          "picture tokens": picture_tokens, "reconstruction": reconstruction, "losses": losses, "answer": answered,
          "drawing": drawing, "curves": paper_curves, "parity with transformers": same_logits}


def versions():
    """{library: version} of those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check(settings):
    """Run all checks, print a line each, and write them to check.json -> {"failed", "skipped", "out"}."""
    s = Subject(settings)
    gpu = torch.cuda.get_device_name(s.device) if s.device.type == "cuda" else None
    report = {"rows": [], "folder": s.folder.name, "config": asdict(s.config), "device": str(s.device), "gpu": gpu,
              "dtype": str(s.m.lm_head.weight.dtype), "versions": versions(), "machine": machine(),
              "seconds": {}}
    for name, run in CHECKS.items():
        start = time.monotonic()
        try:
            rows = run(s)
        except Exception as error:                  # whatever it is: the others still run, and the file tells of it
            rows = [row(name, ERROR, f"{type(error).__name__}: {first_line(error)}", "no error",
                        traceback=traceback.format_exc())]
        for found in rows:
            wanted = f"   (expected: {found['expected']})" if found["expected"] else ""
            print(f"{found['verdict']:8s} {found['check']:34s} {found['measured']}{wanted}")
        report["rows"] += rows
        report["seconds"][name] = round(time.monotonic() - start, 1)
        write_json(report, s.out / "check.json")
    named = {verdict: [one["check"] for one in report["rows"] if one["verdict"] == verdict]
             for verdict in (FAIL, SKIPPED, ERROR)}
    print(f"{s.out / 'check.json'} holds all of this, to be sent in; the pictures lie beside it")
    if named[ERROR]:
        raise InputError(f"checks that could not run: {', '.join(named[ERROR])}: send in {s.out / 'check.json'}")
    return {"failed": named[FAIL], "skipped": named[SKIPPED], "out": str(s.out)}


def main(argv=None):
    tell(check(parse(Check, argv, "python -m lab.check")))


if __name__ == "__main__":
    run_command(main)
