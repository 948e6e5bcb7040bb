"""Train a unified model with next-token prediction and Attention Interaction Alignment: one loop, three stages.

Without flags this is the whole story on a laptop: (1) a picture tokenizer, then frozen; (2) training without AIA, first
of answering alone, then of drawing and answering; (3) fine-tuning with AIA. It ends with scores on held-out
combinations, curves and samples.

    python train.py                                   # tiny-emu3 on the built-in world
    python train.py --preset tiny-janus --seed 1
    python train.py --data train.jsonl --val val.jsonl
    python train.py --resume                          # go on where the same run stopped
"""

import contextlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import aia
import data
import eval as judge
import model
from aia import InputError
from data import opt


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainConfig:
    """Train a unified model with next-token prediction and AIA."""

    preset: str = opt("tiny-emu3", "model to train", tuple(model.PRESETS))
    seed: int = opt(0, "world, weights, order and words")
    steps: int = opt(0, "optimizer steps of every stage; 0: the plan of the preset")
    batch_size: int = opt(0, "samples per optimizer step of the language-model stages; 0: the plan of the preset")
    micro_batch: int = opt(64, "samples per forward pass; changes memory, not the result")
    lr: float = opt(0.0, "peak learning rate of the language-model stages; 0: the plan of the preset")
    weight_decay: float = opt(-1.0, "of matrices, norms and biases have none; -1: the plan of the preset")
    clip: float = opt(1.0, "largest norm of the gradient")
    ratio: str = opt("1:1", "samples for generation : understanding")
    aia_weight: str = opt("rho", "lambda in L = L_ntp + lambda L_aia: rho (calibrate), paper, released, off, a number, "
                          "or two as GEN,UND")
    rho: float = opt(aia.RHO, "with --aia-weight rho: next-token loss : weighted AIA loss at the start of stage 3")
    calibration: int = opt(0, "batches without updates that calibrate lambda; 0: 10 for tiny presets, else 100")
    aia_targets: str = opt("depth", "depth, S4, S5, released, hunyuan-image-3, simplear, qwen-image, flux, "
                           "or a JSON file")
    aia_variant: str = opt("full", "what is left out of AIA", aia.VARIANTS)
    arms: str = opt("aia", "both: train stage 3 a second time without AIA, from the same weights", ("aia", "both"))
    attention: str = opt("fused", "fused kernel or written out; same result", tuple(model.ATTENTION))
    checkpoint_activations: bool = opt(False, "recompute each layer in the backward pass: less memory, slower steps")
    compile: bool = opt(False, "torch.compile the layers: a slow first minute, then faster steps")
    rope_bf16: bool = opt(False, "round the rotary frequencies to bfloat16, as the authors' scripts do")
    data: str = opt("", "JSON-lines file of your own pictures; empty: the built-in world")
    val: str = opt("", "JSON-lines file for the final losses; empty: the records of --data themselves")
    encoded: str = opt("", "folder of `data.py encode`: pictures whose codes (and features) need not be made again")
    on_bad_record: str = opt("stop", "what to do with a record that cannot be used", ("stop", "skip"))
    init: str = opt("", "run folder, or folder or hub id of public weights, to start from; skips stages 1 and 2")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model of --init")
    out: str = opt("", "run folder; empty: runs/<preset>-seed<seed>")
    resume: bool = opt(False, "go on from the checkpoint in the run folder")
    pool: int = opt(8000, "pictures of the built-in world")
    eval_n: int = opt(60, "pictures for each question kind, and prompts for each skill, in the final scores")
    log_every: int = opt(50, "steps between reports")
    save_every: int = opt(300, "steps between checkpoints")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of activations; weights stay float32. auto: bfloat16 where the GPU has it",
                     ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class Stage:
    """One phase of training: its length, its learning rate, and which parts stand still."""

    name: str
    steps: int
    batch_size: int
    lr: float
    warmup: int
    frozen: tuple = ()
    aia: bool = False
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.05
    ratio: str = ""                                 # samples for generation : understanding; empty: that of --ratio


# Lengths for one laptop core; the README states what they took. Large models start at stage 3 with --init.
# Found by trial: beside drawing, reading takes several times as many questions to learn, so it comes first. Strong
# weight decay brings prompts that were held out closer to those that were seen.
TOKENIZER = Stage("tokenizer", 1000, 8, 8e-3, 30, betas=(0.9, 0.99), weight_decay=0.0)
READ = Stage("read", 1000, 24, 3e-3, 50, ("vq",), ratio="0:1")
JOINT = Stage("joint", 1300, 32, 3e-3, 50, ("vq",), weight_decay=0.3)
TUNE = Stage("tune", 400, 32, 1e-3, 30, ("vq",), aia=True, weight_decay=0.3)
PLANS = {"tiny-emu3": (TOKENIZER, READ, JOINT, TUNE),
         "tiny-janus": (TOKENIZER, READ, JOINT, replace(TUNE, frozen=("vq", "vision")))}
LARGE = (Stage("tune", 1000, 64, 2e-5, 50, ("vq", "vision"), True),)


LEAST = {"seed": 0, "steps": 0, "batch_size": 0, "micro_batch": 1, "lr": 0, "calibration": 0, "pool": 2, "eval_n": 1,
         "log_every": 1, "save_every": 1, "weight_decay": -1}


def parse_ratio(text):
    """--ratio GEN:UND as two numbers."""
    try:
        gen, und = (int(part) for part in text.split(":"))
    except ValueError:
        gen = und = -1
    if min(gen, und) < 0 or gen + und == 0:
        raise InputError(f"--ratio {text!r}: give two whole numbers as GEN:UND, for example 1:1 or 2:1")
    return gen, und


def check_numbers(config):
    """Refuse numbers that would fail after an hour, before anything is written."""
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: give at least {least}")
    for name in ("rho", "clip"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name} {getattr(config, name)}: give a number above 0")


def plan(config):
    """The stages of a run, flags applied."""
    stages = PLANS.get(config.preset, LARGE)
    if config.init:
        stages = stages[-1:]
    elif config.preset not in PLANS:
        raise InputError(f"--preset {config.preset} needs --init FOLDER: fresh weights of this size learn nothing here")
    if config.data or not parse_ratio(config.ratio)[1]:       # a user's records may hold no questions
        stages = tuple(stage for stage in stages if stage.name != "read")
    if config.arms == "both":
        stages = (*stages[:-1], replace(stages[-1], name="control", aia=False), stages[-1])
    changed = []
    for stage in stages:
        language = stage.name != "tokenizer"
        steps = config.steps or stage.steps
        changed.append(replace(stage, steps=steps, warmup=min(stage.warmup, max(steps // 10, 1)),
                               batch_size=language and config.batch_size or stage.batch_size,
                               lr=language and config.lr or stage.lr,
                               weight_decay=config.weight_decay if language and config.weight_decay >= 0
                               else stage.weight_decay))
    return changed


def learning_rate(step, stage):
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    return stage.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(m, stage):
    """AdamW over the parts that move; the others need no gradient."""
    own = ("vq",) if stage.name == "tokenizer" else [name for name, _ in m.named_children() if name not in stage.frozen]
    for name, parameter in m.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in own)
    moving = [p for p in m.parameters() if p.requires_grad]
    groups = [{"params": [p for p in moving if p.ndim >= 2], "weight_decay": stage.weight_decay},
              {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=1e-8, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# One step of the language model: next-token prediction + lambda AIA
# ---------------------------------------------------------------------------------------------------------------------
def counts(batches):
    """{task: (label tokens, valid samples)} of a whole step: what its sums are divided by."""
    total = {}
    for batch in batches:
        tokens, valid = total.get(batch.task, (0, 0))
        total[batch.task] = (tokens + int((batch.labels[:, 1:] != -100).sum()), valid + int(batch.aia_valid.sum()))
    return total


def accumulate(m, batches, targets, weights, scale=True, autocast=contextlib.nullcontext):
    """Gradients of one step, the same however its samples are cut into micro-batches.

    loss = sum over tasks of  ntp_sum / label_tokens(task)  +  lambda(task) * aia_sum / valid_samples(task)
    targets {task: (target, delta)}, weights {task: lambda}; weights None is next-token prediction alone, which also
    measures no attention; scale False measures only, without gradients.
    -> metrics {"gen": {"ntp", "aia", "intensity"}, "und": ...}
    """
    total, metrics = counts(batches), {}
    for batch in batches:
        tokens, valid = (max(n, 1) for n in total[batch.task])
        with autocast(), torch.set_grad_enabled(scale):
            out = m(batch.to(next(m.parameters()).device), intensity=weights is not None)
        loss, row = out.ntp / tokens, metrics.setdefault(batch.task, {"ntp": 0.0})
        row["ntp"] += loss.item()
        if weights is not None:
            aia_sum = aia.loss(out.intensity, *targets[batch.task], batch.aia_valid.to(out.intensity.device),
                               reduction="sum")
            # L = L_NTP + lambda L_AIA (Eq. 3)
            loss = loss + weights.get(batch.task, 0.0) * aia_sum / valid
            row["aia"] = row.get("aia", 0.0) + aia_sum.item() / valid
            row["intensity"] = row.get("intensity", 0) + \
                out.intensity.detach()[batch.aia_valid].sum(0).cpu() / valid
        if scale:
            loss.backward()
    return metrics


def calibrate(m, schedule, targets, config, autocast):
    """lambda of each task from batches without updates (aia.weight_for_ratio), unless --aia-weight gives it."""
    fixed = aia.fixed_weights(config.aia_weight)
    if fixed:
        return fixed
    n, sums = config.calibration or (10 if config.preset.startswith("tiny") else 100), {}
    for step in range(n):
        for task, row in accumulate(m, schedule.step(step), targets, {}, False, autocast).items():
            sums.setdefault(task, [0.0, 0.0])
            sums[task][0] += row["ntp"] / n
            sums[task][1] += row["aia"] / n
    return {task: aia.weight_for_ratio(*sums[task], config.rho) if task in sums else 0.0 for task in aia.TASKS}


# ---------------------------------------------------------------------------------------------------------------------
# The text tokenizer of the tiny models, and a run's copy of another's
# ---------------------------------------------------------------------------------------------------------------------
def train_tokenizer(file, config):
    """A byte-level BPE on the world's text, with the special tokens of `config` behind it; saved as tokenizer.json.

    Merges never cross the edge of a word that means something; what stands between such words may become one token, so
    that conversations are short.
    """
    words = [*data.SHAPES, *map(data.plural, data.SHAPES), *data.COLOURS, *data.NUMBERS, "at the top", "at the bottom",
             "left", "right", *data.RELATIONS, "yes", "no", "nothing", *"ABCD"]
    words = "|".join(sorted(words, key=len, reverse=True))      # beside them the template, numbers, line ends and *
    frame = "|".join(map(re.escape, (data.EMU3_SYSTEM + data.EMU3_USER, data.EMU3_USER, data.EMU3_ASSISTANT)))
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"{frame}| ?\b({words})\b|[0-9]+|\s*\n|\*"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    world, rng, lines = data.World(0), np.random.default_rng(0), []
    for _ in range(2000):
        scene = world.scene(rng)
        asked = data.question(scene, data.QUESTIONS[rng.integers(len(data.QUESTIONS))], rng)
        lines += [data.EMU3_SYSTEM + data.EMU3_USER, data.EMU3_USER, data.EMU3_ASSISTANT]
        lines += [data.JANUS_USER, data.JANUS_ASSISTANT]
        lines += [data.caption(scene, rng), asked.text, asked.answer, " " + asked.answer, data.DESCRIBE]
        lines += [f"{rng.integers(1, 91)}*{rng.integers(1, 91)}"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=model.TINY_TEXT, show_progress=False, min_frequency=1,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(lines, trainer)
    if core.get_vocab_size() != model.TINY_TEXT:
        raise RuntimeError(f"the world's text gives {core.get_vocab_size()} tokens, not {model.TINY_TEXT}")
    special = list(model.SPECIAL[config.kind].values())
    if config.kind == "emu3":
        special += [f"<|visual token {code:06d}|>" for code in range(1, config.codebook)]
    core.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    core.save(str(file))
    return data.Text(file, config.kind)


def store_tokenizer(text, folder):
    """A run folder's copy of a tokenizer: emu3.tiktoken as the equal tokenizer.json, all others as they are."""
    if text.file.suffix == ".tiktoken":
        text.core.save(str(folder / "tokenizer.json"))
        return
    for name in (text.file.name, "added_tokens.json"):
        if text.file.with_name(name).exists():
            shutil.copy(text.file.with_name(name), folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# One step of the picture tokenizer
# ---------------------------------------------------------------------------------------------------------------------
AGREEMENT = 5.0                     # weight of the latents' variance within equal patches, at the end of stage 1


def equal_patches(pixels, latents):
    """Which patch of pixels lies under each latent: flat latents (n, code_dim), the patch of each (n,) as a number that
    equal patches share, and the mean latent of each number (m, code_dim)."""
    side = pixels.shape[-1] // latents.shape[-1]
    content = F.unfold(pixels, side, stride=side).transpose(1, 2).flatten(0, 1)                 # (n, 3 side side)
    _, patch, times = torch.unique(content, dim=0, return_inverse=True, return_counts=True)
    flat = model.flatten(latents)                                               # (n, code_dim)
    mean = torch.zeros_like(flat[:len(times)]).index_add(0, patch, flat) / times[:, None]
    return flat, patch, mean


def autoencode(vq, pixels, commitment=0.25, quantize=True):
    """Pixels (B, 3, S, S) -> reconstruction, codes (B, h, w), |sg(z) - e|^2 + commitment |z - sg(e)|^2 (arXiv
    1711.00937, Eq. 3), and the share of the latents' variance that lies within equal patches.

    Equal patches of pixels get one code, that of their mean latent, whatever surrounds them: language models learn such
    codes many times faster. Where all patches differ this is plain vector quantization.
    """
    z = vq.latents(pixels)                                                      # (B, code_dim, h, w)
    flat, patch, mean = equal_patches(pixels, z)
    within = (flat - mean[patch]).square().sum(1).mean() / (flat - flat.mean(0)).square().sum(1).mean().detach()
    if not quantize:
        return vq.pixels(z), None, 0.0, within
    codes = vq.nearest(mean.detach())[patch].view(len(z), *z.shape[2:])         # (B, h, w)
    e = vq.vectors(codes)                                                       # (B, code_dim, h, w)
    pull = F.mse_loss(e, z.detach()) + commitment * F.mse_loss(z, e.detach())
    # Straight through: forward e, backward to z as if there were no rounding.
    return vq.pixels(z + (e - z).detach()), codes, pull, within


@torch.no_grad()
def fill_codebook(vq, pixels):
    """Move the codebook rows onto mean latents of equal patches of these pictures.

    Each row goes to the mean that is farthest from all rows so far. Rows drawn at random would land on the background,
    which outnumbers all else.
    """
    mean = equal_patches(pixels, vq.latents(pixels))[-1]                         # (m, code_dim)
    nearest = torch.full_like(mean[:, 0], torch.inf)
    for i in range(len(vq.quantize.weight)):
        vq.quantize.weight[i] = mean[nearest.argmax()]
        nearest = torch.minimum(nearest, (mean - vq.quantize.weight[i]).square().sum(1))


def tokenizer_step(m, pictures, step, stage, seed):
    """Gradients of one step of stage 1: reconstruction, codebook and agreement of equal patches, on a batch that the
    seed and the step decide."""
    rng, device = np.random.default_rng([seed, 10, step]), m.vq.quantize.weight.device

    def some(n):
        return torch.stack([data.to_tensor(pictures[i]) for i in rng.integers(len(pictures), size=n)]).to(device)
    warm = stage.steps // 5                         # first without the codebook, so that latents mean something
    if step in (warm, stage.steps // 2):
        fill_codebook(m.vq, some(128))
    pixels = some(stage.batch_size)
    again, codes, pull, within = autoencode(m.vq, pixels, quantize=step >= warm)
    error = again - pixels
    # Asked for at full weight from the start, agreement is reached by latents that say nothing.
    agree = AGREEMENT * step / stage.steps * within
    (error.abs().mean() + error.square().mean() + pull + agree).backward()
    used = 0 if codes is None else len(codes.unique())
    return {"tokenizer": {"l1": error.abs().mean().item(), "within": within.item(), "codes": used}}


# ---------------------------------------------------------------------------------------------------------------------
# The run: folder, checkpoints, log
# ---------------------------------------------------------------------------------------------------------------------
def save_checkpoint(state, path):
    """Write under a second name, then rename: a job killed while saving keeps its previous checkpoint."""
    aside = Path(f"{path}.part")
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def memory_gb():
    """Largest memory of this process so far, in 1e9 bytes: GPU memory where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Operations(TorchDispatchMode):
    """Notes the names of all operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += f" {function}"
        return function(*args, **(kwargs or {}))


def attention_kernel(m, autocast):
    """Which kernel attention runs on for this model's heads: what one call of it runs."""
    c, like = m.config, m.lm.embed_tokens.weight
    if c.attention == "explicit":
        return "explicit, every map is kept"
    q, k = (like.new_zeros(1, heads, 64, c.head_dim) for heads in (c.heads, c.kv_heads))
    with Operations() as seen, autocast():
        model.attend_fused(q.requires_grad_(), k, k, condition=torch.ones(1, 64, dtype=torch.bool, device=k.device))
    for kernel in ("flash", "cudnn", "efficient"):
        if f"_{kernel}_attention" in seen.names:
            return f"fused, {kernel} kernel"
    return "fused, but on the slow math fallback: no fast kernel takes heads of this size and type here"


class Stop(Exception):
    """Ctrl-C was pressed: save and go."""


class Run:
    """A training run in its folder."""

    def __init__(self, config):
        self.config, self.started, self.stopping, self.seconds, self.bad = config, time.time(), False, 0.0, []
        self.folder = Path(config.out or f"runs/{config.preset}-seed{config.seed}")
        self.state = None
        if config.resume:
            self.state = model.read_checkpoint(self.folder / "checkpoint.pt")
            if "settings" not in self.state:
                raise InputError(f"{self.folder / 'checkpoint.pt'} holds weights only, no run to resume: use --init")
            check_settings(self.state["settings"], asdict(config), self.folder)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} is not empty: continue it with --resume, or choose another --out")
        self.device = data.device_of(config.device)
        bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and self.device.startswith("cuda")
                                              and torch.cuda.is_bf16_supported())
        self.autocast = (lambda: torch.autocast(torch.device(self.device).type, torch.bfloat16)) if bf16 \
            else contextlib.nullcontext
        print(f"device {self.device}, {'bfloat16' if bf16 else 'float32'} activations, {torch.get_num_threads()} "
              f"threads, torch {torch.__version__}, Python {platform.python_version()}")
        torch.manual_seed(config.seed)
        self.prepare()

    def prepare(self):
        """Data, text tokenizer and model; nothing is written before all of them are good."""
        config = self.config
        kind = model.PRESETS[config.preset].kind
        self.world = None if config.data else data.World(config.seed)
        self.source = data.FileSource(config.data, kind, config.on_bad_record) if config.data else \
            data.WorldSource(self.world, config.pool, config.seed)
        self.val = data.FileSource(config.val, kind, config.on_bad_record) if config.val else self.source
        self.stages = plan(config)
        if config.encoded and not config.init:
            raise InputError("--encoded needs --init: without it the picture tokenizer is yet to be trained")
        if config.init:
            self.m = model.load(config.init, torch.float32, self.device, config.vision_tokenizer,
                                attention=config.attention)
            if not self.m.tokenizer_file:
                raise InputError(f"--init {config.init} holds no tokenizer: put {' or '.join(model.TOKENIZERS)} there")
            if self.m.config.kind != kind:
                raise InputError(f"--init {config.init} is a model of kind {self.m.config.kind}, but --preset "
                                 f"{config.preset} of kind {kind}: choose the preset that fits")
        else:
            self.m = model.build(config.preset, attention=config.attention).to(self.device)
        self.m.lm.rope_bf16, self.m.lm.checkpoint_activations = config.rope_bf16, config.checkpoint_activations
        print(f"attention: {attention_kernel(self.m, self.autocast)}")
        if config.compile:
            for layer in self.m.lm.layers:
                layer.compile()
        self.targets = {task: aia.targets(self.m.config.layers, task, config.aia_targets, config.aia_variant)
                        for task in aia.TASKS}
        self.targets = {task: tuple(x.to(self.device) for x in pair) for task, pair in self.targets.items()}
        aia.fixed_weights(config.aia_weight)
        parse_ratio(config.ratio)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = model.find_tokenizer(self.folder)
        if config.init and not file:
            store_tokenizer(data.Text(self.m.tokenizer_file, kind), self.folder)
            file = model.find_tokenizer(self.folder)
        self.text = data.Text(file, kind) if file else train_tokenizer(self.folder / "tokenizer.json", self.m.config)
        if self.text.ids != self.m.ids:
            raise InputError(f"{self.text.file} has other special ids than the model: it belongs to another preset")
        encoded = data.Encoded(config.encoded, self.m) if config.encoded else None
        self.preparer = data.Preparer(self.m, self.text, encoded=encoded)
        judge.write_json(asdict(config), self.folder / "settings.json")
        print("settings " + json.dumps(asdict(config)))

    def save(self, stage, step, optimizer, weights):
        """Everything that --resume needs. The order of data follows from the seed and the step."""
        save_checkpoint({"config": asdict(self.m.config), "settings": asdict(self.config), "model": self.m.state_dict(),
                         "optimizer": optimizer.state_dict() if optimizer else None, "stage": stage, "step": step,
                         "weights": weights, "seconds": self.elapsed(), "random": torch.get_rng_state()},
                        self.folder / "checkpoint.pt")

    def save_weights(self, path):
        """The model alone, for comparing later."""
        save_checkpoint({"config": asdict(self.m.config), "model": self.m.state_dict()}, path)

    def elapsed(self):
        return self.seconds + time.time() - self.started

    def log(self, entry):
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def check_settings(stored, given, folder):
    """A resumed run keeps its settings; only where it runs and how often it reports may change."""
    free = {"resume", "device", "out", "log_every", "save_every", "micro_batch", "eval_n", "attention",
            "checkpoint_activations", "compile", "encoded"}
    for name in stored:
        if name not in free and stored[name] != given[name]:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{folder} was started with {flag} {stored[name]}, not {given[name]}: "
                             "resume with the same settings, or choose another --out")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------
def train(config):
    """All stages, then the evaluation -> the result that is printed as the last line."""
    check_numbers(config)
    run = Run(config)
    begin, state = (0, None) if run.state is None else (run.state["stage"], run.state)
    if state:
        run.m.load_state_dict(state["model"])
        run.seconds = state["seconds"]
        torch.set_rng_state(state["random"])
        trim_log(run.folder / "metrics.jsonl", state["stage"], state["step"])
    with interruptible(run):
        for index in range(begin, len(run.stages)):
            run_stage(run, index, state)
            state = None
    return finish(run)


def run_stage(run, index, state):
    """One stage from its first step, or from a checkpoint's."""
    stage, config = run.stages[index], run.config
    before = run.folder / "before.pt"               # what stage 3 starts from, with or without AIA
    if stage.name in ("control", "tune") and not (state and state["optimizer"]):
        if before.exists():
            run.m.load_state_dict(model.read_checkpoint(before)["model"])
        else:
            run.save_weights(before)
    optimizer = make_optimizer(run.m, stage)
    schedule, weights = None, dict.fromkeys(aia.TASKS, 0.0)
    if stage.name != "tokenizer":
        order = 3 * config.seed + {"read": 2, "joint": 1}.get(stage.name, 0)   # both last arms meet the same samples
        schedule = data.Schedule(run.source, run.preparer, order, stage.batch_size,
                                 parse_ratio(stage.ratio or config.ratio), config.micro_batch,
                                 on_bad_record=config.on_bad_record)
    if state and state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
        weights = state["weights"]
    elif stage.aia:
        weights = calibrate(run.m, schedule, run.targets, config, run.autocast)
        print(f"lambda: generation {weights['gen']:.3g}, understanding {weights['und']:.3g} "
              f"({'calibrated for rho ' + str(config.rho) if config.aia_weight == 'rho' else config.aia_weight})")
    first = state["step"] if state else 0
    print(f"{stage.name}, part {index + 1} of {len(run.stages)}: {stage.steps} steps of {stage.batch_size}, "
          f"{sum(p.numel() for p in run.m.parameters() if p.requires_grad):,} of "
          f"{sum(p.numel() for p in run.m.parameters()):,} parameters move")
    run.m.train()
    bar, since = tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step", disable=None), time.time()
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        if schedule:
            batches = schedule.step(step)
            metrics = accumulate(run.m, batches, run.targets, weights, autocast=run.autocast)
        else:
            batches, metrics = [], tokenizer_step(run.m, pictures_of(run), step, stage, config.seed)
        norm = torch.nn.utils.clip_grad_norm_([p for p in run.m.parameters() if p.grad is not None], config.clip)
        check_finite(norm, metrics, stage, step, batches, run)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if (step + 1) % config.log_every == 0 or step + 1 == stage.steps:
            since = report(run, index, step, since, metrics, weights, float(norm), batches, bar)
        if run.stopping or ((step + 1) % config.save_every == 0 and step + 1 < stage.steps):
            run.save(index, step + 1, optimizer, weights)
        if run.stopping:
            bar.close()
            raise Stop
    bar.close()
    run.m.eval()
    if stage.name == "control":
        run.save_weights(run.folder / "control.pt")
    run.save(index + 1, 0, None, weights)
    run.bad += [text for text in (schedule.bad if schedule else []) if text not in run.bad]


def pictures_of(run):
    """Pictures for stage 1: the world's, or a user's own, brought to the size of drawn ones."""
    if run.world:
        return run.source.crowded
    if not hasattr(run, "own_pictures"):
        config, paths = run.m.config, {}
        for task in aia.TASKS:
            paths |= dict.fromkeys(p for record in run.source.records[task] for p in record.pictures)
        run.own_pictures = [data.to_picture(data.janus_drawing(data.load_picture(p, config.kind), config))
                            for p in paths]
    return run.own_pictures


def check_finite(norm, metrics, stage, step, batches, run):
    """Stop before a broken number reaches the weights; say where it came from."""
    losses = [value for row in metrics.values() for name, value in row.items() if name in ("ntp", "aia", "l1")]
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        return
    places = [place for batch in batches for place in batch.places]
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    saved = run.folder / "checkpoint.pt"
    good = f"last good checkpoint {saved}" if saved.exists() else "no checkpoint yet"
    raise InputError(f"stage {stage.name}, step {step + 1}: loss or gradient is not finite (norm {float(norm)}); "
                     f"records: {shown or 'tokenizer pictures'}; {good}; try a lower --lr or remove the records")


def report(run, index, step, since, metrics, weights, norm, batches, bar):
    """One line on the terminal, one object in metrics.jsonl."""
    stage, now = run.stages[index], time.time()
    rate = (now - since) / min(run.config.log_every, step + 1)                  # seconds per step
    lr, memory = learning_rate(step, stage), memory_gb()
    entry = {"stage": index, "name": stage.name, "step": step + 1, "lr": lr, "grad_norm": norm, "memory_gb": memory,
             "seconds": run.elapsed(), "samples_per_second": stage.batch_size / rate}
    parts = []
    for task, row in metrics.items():
        row = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        if task in aia.TASKS:
            weighted = weights[task] * row["aia"]
            entry[task] = row | {"lambda": weights[task], "ratio": row["ntp"] / weighted if weighted else None}
            parts.append(f"{task} {row['ntp']:.3f} aia {row['aia']:.4f}")
        else:
            entry[task] = row
            parts.append(f"l1 {row['l1']:.4f} codes {row['codes']}")
    if batches:
        tokens = sum(sum(batch.lengths) for batch in batches)
        entry |= {"tokens_per_second": tokens / rate,
                  "padding": 1 - tokens / sum(batch.tokens.numel() for batch in batches)}
    left = rate * (stage.steps - step - 1)
    bar.write(f"step {step + 1:5d}/{stage.steps} | {' | '.join(parts)} | lr {lr:.1e} | grad {norm:.2f} | "
              f"{stage.batch_size / rate:.0f} img/s | {memory:.1f} GB | eta {left:.0f} s", file=sys.stdout)
    sys.stdout.flush()
    run.log(entry)
    return now


def trim_log(path, stage, step):
    """Forget reports of steps that a resumed run takes again."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if complete(line)]
        kept = [line for line in kept if (lambda e: (e["stage"], e["step"]) <= (stage, step))(json.loads(line))]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def complete(line):
    """Is this a whole line of the log, not one that a kill cut short?"""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextlib.contextmanager
def interruptible(run):
    """Ctrl-C finishes the step, saves, and says how to go on; pressed twice it stops at once."""
    def stop(number, frame):
        run.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run
# ---------------------------------------------------------------------------------------------------------------------
def finish(run):
    """Scores, curves and samples of the final weights, written into the run folder -> the result."""
    models = {"after": run.m}
    for name in ("before", "control"):
        if (run.folder / f"{name}.pt").exists():
            models[name] = model.load(run.folder, device=run.device, rope_bf16=run.config.rope_bf16, file=f"{name}.pt")
    skipped = run.bad if run.config.on_bad_record == "skip" else None
    cpu_targets = {task: tuple(x.cpu() for x in pair) for task, pair in run.targets.items()}
    samples = judge.HeldOut(run.world, run.config.seed) if run.world else judge.FileBatches(run.val, skipped)
    curves = judge.curves(models, data.Preparer(run.m, run.text), samples, cpu_targets)
    judge.plot_curves(curves, run.folder / "curves.png")
    judge.write_json(curves, run.folder / "curves.json")
    judge.print_curves(curves)
    last = {task: curves[task]["after"] for task in aia.TASKS}
    result = {"und": None, "gen": None, "reader": None, "psnr": None}
    if run.world:
        scores = score(run, models)
        result |= {key: scores[key] for key in ("und", "gen", "reader", "psnr")}
        judge.write_json(scores, run.folder / "scores.json")
    result |= {f"val_ntp_{task}": last[task] and last[task]["ntp"] for task in aia.TASKS}
    result |= {f"aia_{task}": last[task] and last[task]["aia"] for task in aia.TASKS}
    bad = run.bad + run.source.bad + (run.val.bad if run.val is not run.source else [])
    if bad:
        print(f"{len(bad)} bad records were left out:\n  " + "\n  ".join(bad))
    print(f"run folder {run.folder}: checkpoint.pt, metrics.jsonl, curves.png" + (", samples.png, scores.json" * bool(
        run.world)))
    result |= {"preset": run.config.preset, "seed": run.config.seed, "seconds": round(run.elapsed(), 1),
               "rss_gb": round(memory_gb(), 3)}
    judge.write_json(result | {"machine": judge.machine() | {"device": run.device}}, run.folder / "result.json")
    return result


def score(run, models):
    """Held-out scores of the final weights, and of the other arms for comparison; draws samples.png."""
    config, scores = run.config, {}
    for name, m in models.items():
        understood = judge.score_understanding(m, run.text, run.world, config.eval_n, config.seed)
        drawn, samples = judge.score_generation(m, run.text, run.world, config.eval_n, config.seed)
        print(f"-- {judge.LABEL[name]}")
        judge.print_scores(understood | drawn)
        if name == "after":
            judge.plot_samples(samples, run.folder / "samples.png")
            scores |= understood | drawn
        else:
            scores[name] = understood | drawn
    return scores | judge.score_tokenizer(run.m, run.world, 4 * config.eval_n, config.seed)


def main(argv=None):
    config = data.parse(TrainConfig, argv, "train.py")
    try:
        result = train(config)
    except Stop:
        out = f" --out {config.out}" if config.out else ""
        print(f"stopped and saved; go on with the same command and --resume{out}")
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint, if one was saved")
        sys.exit(130)
    print("result " + json.dumps(result))


if __name__ == "__main__":
    data.run(main)
