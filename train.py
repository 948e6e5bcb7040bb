"""Train a unified model with next-token prediction and Attention Interaction Alignment: one loop, a few phases.

Without flags this is the whole story on a laptop: a picture tokenizer, then frozen; training without AIA, first of
answering alone, then of drawing and answering; then tuning with AIA. It ends with scores on held-out combinations,
curves and samples.

    python train.py                                   # tiny-emu3 on the built-in world
    python train.py --preset tiny-janus --seed 1
    python train.py --preset small-emu3               # larger, in a harder world: for one GPU
    python train.py --data train.jsonl --val val.jsonl
    python train.py --resume                          # continue where the same run stopped
    torchrun --nproc-per-node 8 train.py --parallel fsdp --preset janus-pro-7b --init FOLDER --data train.jsonl

Other commands: python eval.py (draw, chat, score, curves), python data.py (export, index, encode), python -m lab.study
(lab.summary, figures, maps, explore, report, plans, knockout, gradients, alignment, references, dry_run, speed, gpu)
"""

from parts.installed import missing  # noqa: F401  before what may be missing

import contextlib
import functools
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import aia
import data
import eval as evaluation
import formats.weights
import model
from formats import checkpoints
from formats.checkpoints import Saver
from formats.datasets import Encoded, FileSource, bad_report, open_sources, parse_ratio, square_pictures
from formats.records import RECORD_TASKS
from parts import settings
from parts.lock import owned
from parts.pictures import drawn_at
from parts.plots import plot_samples
from parts.processes import first_decides, gathered, interruptible, join, over_processes, processes, rank
from parts.settings import InputError, Stop, opt
from parts.text import TOKENIZERS, Text, find_tokenizer, store_tokenizer
from parts.vision import tokenizer_step
from parts.world import CELL_SIDES, GRID, WORLD, world_of


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainConfig:
    """Train a unified model with next-token prediction and AIA."""

    preset: str = opt("tiny-emu3", "model to train", tuple(model.PRESETS), section="first of all")
    recipe: str = opt("", "the paper's training of Emu3 or Janus-Pro; other flags override parts of it",
                      ("", "emu3-sft", "janus-post"))
    data: tuple = opt((), "your own data sets (formats/README.md), each PATH or PATH=SHARE; none: the built-in world")
    init: str = opt("", "start from a run folder, or a folder or hub id of public weights, and tune")
    out: str = opt("", "run folder; empty: runs/<preset>-seed<seed>")
    resume: bool = opt(False, "continue from the newest checkpoint in the run folder; start if there is none")
    seed: int = opt(0, "of the world, the weights, the order of samples and their wording")
    steps: int = opt(0, "optimizer steps of every phase; 0: the plan of the preset")
    batch_size: int = opt(0, "samples per optimizer step, over all processes; 0: the plan of the preset")
    aia_weight: str = opt("rho", "lambda in L = L_ntp + lambda L_aia: rho (calibrate), paper, released, off, a number, "
                          "or two as GEN,UND")

    rho: float = opt(aia.RHO, "with --aia-weight rho: ratio of next-token loss to weighted AIA loss at the start",
                     section="attention interaction alignment")
    calibration: int = opt(0, "batches without updates that calibrate lambda; 0: 10 for tiny presets, else 100")
    aia_targets: str = opt("depth", "depth, S4, S5, released, hunyuan-image-3, simplear, qwen-image, flux, "
                           "or a JSON file")
    aia_variant: str = opt("full", "leave out a part of AIA (no-first: the sink in its condition)", aia.VARIANTS)
    arms: str = opt("aia", "both: run the last phase twice from the same weights, first without AIA", ("aia", "both"))

    lr: float = opt(0.0, "peak learning rate of the language model; 0: the plan of the preset", section="optimization")
    weight_decay: float = opt(-1.0, "of matrices; norms and biases have none. -1: the plan of the preset")
    micro_batch: int = opt(64, "samples per forward pass; changes memory, not the result")
    ratio: str = opt("1:1", "samples for generation : understanding (: conversations in text and pictures); each "
                     "task's loss is a mean over its own samples")
    mix: str = opt("both", "both: every step has both tasks; drawn: one task a step, drawn by --ratio, as in the "
                   "released code", ("both", "drawn"))

    lora_rank: int = opt(0, "train LoRA additions of this rank to the decoder's projections and nothing else; needs "
                         "--init and a larger --lr. 0: train the weights", section="the model")
    fork_layer: int = opt(0, "UniFork: from this layer on, each task has its own copy of the layers of --init")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model of --init")
    image_size: int = opt(0, "Emu3 on your own data: side of a square picture; others have its area. 0: the model's")
    attention: str = opt("auto", "explicit: written out; fused: one kernel; lse: one kernel, AIA from its log-sum-exp; "
                         "auto: what suits the device. The result is the same", tuple(model.ATTENTION))

    val: str = opt("", "data set for held-out losses; empty: the records of --data, at the end only",
                   section="your own data")
    val_every: int = opt(200, "steps between losses on --val")
    encoded: str = opt("", "folder of `data.py encode`: pictures whose codes (and features) are stored there")
    on_bad_record: str = opt("stop", "what to do with a record that cannot be used", ("stop", "skip"))

    shapes: int = opt(4, "how many shapes it has, 4 to 8", section="the built-in world")
    colours: int = opt(4, "how many colours it has, 4 to 8")
    objects: int = opt(2, "most different things in a scene: 2 to 4, with two more shapes and colours")
    cell: int = opt(8, "side of a cell in pixels: 8, 16, 24 or 32; a picture has 2 x 2 cells")
    pool: int = opt(8000, "training pictures")
    eval_n: int = opt(60, "pictures for each topic, and prompts for each skill, in the final scores")

    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps", section="machines and memory")
    dtype: str = opt("auto", "of activations; weights stay float32. auto: bfloat16 if the GPU supports it",
                     ("auto", "float32", "bfloat16"))
    pure_bf16: bool = opt(False, "weights, gradients and optimizer in bfloat16, as in the released code")
    checkpoint_activations: bool = opt(False, "recompute each layer in the backward pass: less memory, slower steps")
    compile: bool = opt(False, "torch.compile the layers: a slow first minute, then faster steps")
    parallel: str = opt("ddp", "what the processes of torchrun divide among themselves: ddp nothing; fsdp weights, "
                        "gradients and optimizer; hsdp the same within a node", ("ddp", "fsdp", "hsdp"))
    offload: bool = opt(False, "with fsdp, hsdp: keep weights and optimizer in CPU memory")

    log_every: int = opt(50, "steps between reports", section="reports and checkpoints")
    save_every: int = opt(300, "steps between checkpoints")
    keep: int = opt(2, "checkpoints to keep")


@dataclass(frozen=True)
class Phase:
    """A part of training: which parts of the model train, on what, from which weights, and whether AIA counts."""

    name: str
    steps: int
    batch_size: int
    lr: float
    warmup: int
    frozen: tuple = ()                              # parts that do not train, by the beginning of their names, or
    trained: tuple = ()                             # ... the only ones that do
    aia: bool = False                               # the AIA loss is added
    fade: tuple = ()                                # (first, last) step between which its lambda falls to 0, from here
    ratio: str = ""                                 # samples for generation : understanding; empty: that of --ratio
    pictures: bool = False                          # trains the picture tokenizer alone, on pictures
    fresh: bool = False                             # for weights that know nothing yet: left out with --init
    world: bool = False                             # for the built-in world: a user's records may hold no questions
    order: int = 0                                  # which order of samples of the seed, 0 to 2
    fork: bool = False                              # first copies the upper layers into the branch of generation
    start: str = ""                                 # folder of the run that keeps the weights it starts from ...
    end: str = ""                                   # ... and those it ends with, besides checkpoints
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.05
    eps: float = 1e-8
    clip: float = 1.0                               # largest norm of the gradient
    floor: float = 0.01                             # learning rate at the end, as a share of its peak


# Lengths for one laptop core; README.md says how long they take. Large models start with TUNE, from --init.
# Found by trial: beside drawing, answering takes several times as many questions to learn, so it comes first. Strong
# weight decay brings held-out prompts closer to those of training.
TOKENIZER = Phase("tokenizer", 1000, 8, 8e-3, 30, trained=("vq",), pictures=True, fresh=True, betas=(0.9, 0.99),
                  weight_decay=0.0)
ANSWERS = Phase("answer", 1000, 24, 3e-3, 50, ("vq",), ratio="0:1", fresh=True, world=True, order=2)
JOINT = Phase("joint", 1300, 32, 3e-3, 50, ("vq",), fresh=True, order=1, weight_decay=0.3)
# "before" is where both arms start, with and without AIA, and what curves and scores compare with.
TUNE = Phase("tune", 400, 32, 1e-3, 30, ("vq",), aia=True, start="before", weight_decay=0.3)
TUNE_JANUS = replace(TUNE, frozen=("vq", "vision"))             # what the authors freeze
# UniFork's phases: first what leads into and out of the decoder (its projector and image head; here pictures are words
# like any other, so embedding and head), then everything, then each branch alone, first drawing, then answering.
INSIDE = ("vq", "lm.layers", "lm.gen_layers", "lm.norm", "lm.gen_norm")
ALIGN = Phase("align", 200, 32, 3e-3, 30, INSIDE, fresh=True, order=2, fork=True, weight_decay=0.3)
# What both branches share: the layers below fork_layer = 2 of the preset.
SHARED = ("vq", "lm_head", "lm.embed_tokens", *(f"lm.layers.{i}" for i in range(model.TINY_UNIFORK.fork_layer)))
BRANCHES = (Phase("branch-gen", 200, 32, 1e-3, 30, (*SHARED, "lm.layers", "lm.norm"), ratio="1:0", weight_decay=0.3),
            Phase("branch-und", 200, 32, 1e-3, 30, (*SHARED, "lm.gen_layers", "lm.gen_norm"), ratio="0:1",
                  weight_decay=0.3))
# For one GPU: about seven minutes on an H200, by the steps timed there (lab/README.md).
SMALL = (replace(TOKENIZER, steps=800, batch_size=32, lr=4e-3),
         replace(ANSWERS, steps=1500, batch_size=128, lr=1e-3, warmup=100),
         replace(JOINT, steps=2500, batch_size=256, lr=1e-3, warmup=100),
         replace(TUNE, batch_size=256, lr=3e-4))
TINY = (TOKENIZER, ANSWERS, JOINT, TUNE)
# Pictures and text in turn: all sorts of samples from the beginning of joint training on.
MIXED = (TOKENIZER, ANSWERS, replace(JOINT, steps=3000, fork=True), TUNE)
PLANS = {"tiny-emu3": TINY, "tiny-wide": TINY, "tiny-half": TINY, "tiny-double": TINY,
         "tiny-janus": (TOKENIZER, ANSWERS, JOINT, TUNE_JANUS),
         "tiny-unifork": (TOKENIZER, ANSWERS, ALIGN, JOINT, *BRANCHES), "small-emu3": SMALL,
         **dict.fromkeys(("tiny-mixed", "tiny-mixed-fork"), MIXED),
         **dict.fromkeys(("tiny-mixed-janus", "tiny-mixed-codes"), (*MIXED[:-1], TUNE_JANUS))}
LARGE = (Phase("tune", 1000, 64, 2e-5, 50, ("vq", "vision"), aia=True, start="before"),)
# Defaults of a preset: its world, a micro-batch that holds one task of a step (half of the conversations, whose lengths
# differ: less padding), and so many pictures that training draws each about twenty times.
SETTINGS_OF = {"small-emu3": {"shapes": 6, "colours": 6, "objects": 3, "cell": 16, "pool": 32_000, "calibration": 10,
                              "micro_batch": 128},
               **{name: {"ratio": "1:1:2", "micro_batch": 8} for name in PLANS if name.startswith("tiny-mixed")}}
# The paper's two trainings: 3 M samples, half of each task, on 8 x 8 GPUs. Its text gives start, ratio and how weights
# are sharded; Janus-Pro's other values are those of the authors' code. Chosen here: four epochs of 256 samples a step
# for both, lambda by rho; Emu3, whose code was not released, takes the rest from Emu3's own fine-tuning script.
RECIPES = {
    "emu3-sft": (Phase("tune", 46_875, 256, 1e-5, 30, ("vq",), aia=True, start="before", weight_decay=0.1, eps=1e-6,
                       clip=5.0, floor=0.1),
                 {"preset": "emu3-8b", "parallel": "fsdp", "micro_batch": 1, "checkpoint_activations": True,
                  "save_every": 500, "dtype": "bfloat16"}),
    "janus-post": (Phase("tune", 46_875, 256, 2e-5, 1_172, ("vq", "vision"), aia=True, start="before", eps=1e-6,
                         floor=0.05),
                   {"preset": "janus-pro-7b", "parallel": "hsdp", "micro_batch": 4, "checkpoint_activations": True,
                    "mix": "drawn", "pure_bf16": True, "save_every": 1000}),
}


LEAST = {"seed": 0, "steps": 0, "batch_size": 0, "micro_batch": 1, "lr": 0, "calibration": 0, "pool": 2, "eval_n": 1,
         "log_every": 1, "save_every": 1, "val_every": 1, "keep": 1, "weight_decay": -1, "lora_rank": 0,
         "fork_layer": 0, "image_size": 0}


def fixed_lambdas(text):
    """--aia-weight as {task: lambda}: a name in aia.LAMBDAS, one number, or two as "gen,und". None for "rho": to be
    calibrated."""
    if text == "rho":
        return None
    if text in aia.LAMBDAS:
        return dict(aia.LAMBDAS[text])
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 <= number < math.inf for number in numbers):
        known = ", ".join(["rho", *aia.LAMBDAS])
        raise InputError(f"--aia-weight {text!r}: give {known}, a number >= 0, or two as GEN,UND")
    return dict(zip(aia.TASKS, numbers if len(numbers) == 2 else numbers * 2, strict=True))


def has_aia(config, phases):
    """Whether any phase of a run gives the AIA loss a weight."""
    lambdas = fixed_lambdas(config.aia_weight)
    return any(phase.aia for phase in phases) and (lambdas is None or any(lambdas.values()))


def check_numbers(config):
    """Refuse settings that would fail after an hour, before anything is written."""
    settings.at_least(config, LEAST)
    if not 0 < config.rho < math.inf:
        raise InputError(f"--rho {config.rho}: give a number above 0; --aia-weight off leaves AIA out")
    if -1 < config.weight_decay < 0:
        raise InputError(f"--weight-decay {config.weight_decay}: give at least 0, or -1 for that of the plan")
    world_of(asdict(config))                        # this and the next two for what they refuse
    fixed_lambdas(config.aia_weight)
    parse_ratio(config.ratio)
    if config.pure_bf16 and config.dtype == "float32":
        raise InputError("--pure-bf16 with --dtype float32: leave out one of them")
    if config.lora_rank and config.pure_bf16:
        raise InputError(f"--lora-rank {config.lora_rank} with --pure-bf16: give --dtype bfloat16 --no-pure-bf16 "
                         "instead, which stores all frozen weights in bfloat16")


def check_effects(config, phases):
    """Refuse settings of a command line that change nothing in their combination."""
    usual = asdict(TrainConfig()) | SETTINGS_OF.get(config.preset, {})
    usual |= RECIPES[config.recipe][1] if config.recipe else {}
    planned = any(phase.aia for phase in phases)
    public = config.init and not checkpoints.checkpoint_folders(Path(config.init))
    idle = [(not planned and config.aia_weight not in ("off", "0"), "no phase has AIA", ("aia_weight",)),
            (not has_aia(config, phases), "there is no AIA to weigh", ("rho", "calibration")),
            (config.aia_weight != "rho", "--aia-weight gives lambda", ("rho", "calibration")),
            (config.data, "--data takes the place of the built-in world", (*WORLD[1:], "pool", "eval_n")),
            (not (config.data or config.val), "the built-in world has no files", ("on_bad_record", "encoded")),
            (not public, "it belongs to --init with public weights", ("vision_tokenizer",)),
            (not (dist.is_torchelastic_launched() or config.resume), "it takes torchrun to start several processes",
             ("parallel",)),
            (not (config.init and config.data), "it belongs to --init and --data", ("image_size",)),
            (not config.val, "there is no --val", ("val_every",))]
    settings.check_idle(config, usual, {reason: names for holds, reason, names in idle if holds})


def plan(config):
    """The phases of a run, flags applied."""
    if config.lora_rank and not config.init:
        raise InputError(f"--lora-rank {config.lora_rank} needs --init FOLDER: it adds to weights that have learned")
    if config.fork_layer and not config.init:
        raise InputError(f"--fork-layer {config.fork_layer} needs --init FOLDER: it copies weights that have learned")
    phases = (RECIPES[config.recipe][0],) if config.recipe else PLANS.get(config.preset, LARGE)
    if config.init:
        phases = [phase for phase in phases if not phase.fresh]
    elif config.recipe or config.preset not in PLANS:
        raise InputError(f"--preset {config.preset} needs --init FOLDER: fresh weights of this size learn nothing here")
    if config.data:
        phases = [phase for phase in phases if not phase.world]
    shares = parse_ratio(config.ratio)              # a phase for a task without a share has nothing to train on
    phases = [phase for phase in phases if not phase.ratio or any(
        own and share for own, share in zip(parse_ratio(phase.ratio), shares, strict=True))]
    if config.arms == "both":
        if not has_aia(config, phases):
            raise InputError("--arms both compares with and without AIA: tiny-unifork and --aia-weight off are without")
        *before, last = phases
        phases = [*before, replace(last, name="control", aia=False, end="control"), last]
    return [with_flags(phase, config) for phase in phases]


def with_flags(phase, config):
    """A phase with what the flags change about it. The picture tokenizer keeps its batches, rate and decay."""
    steps = config.steps or phase.steps
    changed = {"steps": steps, "warmup": min(phase.warmup, max(steps // 10, 1))}
    if not phase.pictures:
        changed |= {name: getattr(config, name) for name in ("batch_size", "lr") if getattr(config, name)}
        if config.weight_decay >= 0:
            changed["weight_decay"] = config.weight_decay
    return replace(phase, **changed)


def learning_rate(step, phase):
    """Linear warm-up, then a cosine down to the floor."""
    if step < phase.warmup:
        return phase.lr * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(phase.steps - phase.warmup, 1)
    return phase.lr * (phase.floor + (1 - phase.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def lambdas_at(step, phase, lambdas):
    """lambda of each task, constant, or falling linearly to 0 between the steps of Phase.fade."""
    first, last = phase.fade or (math.inf, math.inf)
    share = 1.0 if step < first else max(last - step, 0) / (last - first)
    return {task: share * value for task, value in lambdas.items()}


def freeze(m, phase):
    """Only the parts that train in a phase need gradients; with LoRA only its additions."""
    for name, parameter in m.named_parameters():
        if m.config.lora_rank:
            trains = "lora_" in name
        elif phase.trained:
            trains = name.startswith(tuple(f"{part}." for part in phase.trained))
        else:
            trains = not name.startswith(tuple(f"{part}." for part in phase.frozen))
        parameter.requires_grad_(trains)


def make_optimizer(m, phase):
    """AdamW over the parts that train."""
    freeze(m, phase)
    training = [p for p in m.parameters() if p.requires_grad]
    groups = [{"params": [p for p in training if p.ndim >= 2], "weight_decay": phase.weight_decay},
              {"params": [p for p in training if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=phase.lr, betas=phase.betas, eps=phase.eps, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun started
# ---------------------------------------------------------------------------------------------------------------------
def start_processes(config):
    """Join the other processes of torchrun, if there are any -> device of this one."""
    device = settings.device_of(config.device)
    if dist.is_torchelastic_launched() and config.device not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device {config.device} with torchrun, whose processes have a GPU each: leave it out")
    join(device)
    if config.offload and (processes() == 1 or config.parallel == "ddp"):
        raise InputError("--offload moves parts of a sharded model: it needs torchrun, and --parallel fsdp or hsdp")
    return device


def replicated(m):
    """A model that every process holds in full (ddp). Modules of one task get no gradient from the other."""
    alone = m.config.kind == "janus" or m.config.fork_layer > 0
    return DistributedDataParallel(m, find_unused_parameters=alone)


def shard_model(m, config, frozen, device, node=None):
    """Divide the weights among the processes (fsdp), or among those of a node, with a copy on each node (hsdp): each
    process holds a part of every layer, and all of it only while it computes. Frozen picture encoders stay whole.
    node: processes of a node; None: as torchrun says."""
    shape, names = (processes(),), ("part",)
    if config.parallel == "hsdp":
        node = node or int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
        shape, names = (processes() // node, node), ("copy", "part")
    precision = MixedPrecisionPolicy()
    if settings.uses_bf16(config, device) and not config.pure_bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    offload = CPUOffloadPolicy(torch.cuda.is_available()) if config.offload else OffloadPolicy()
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=names)
    how = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for layer in m.lm.all_layers():
        fully_shard(layer, **how)
    # The root holds embeddings, heads and aligners. Its head is read directly (loss.next_token_loss), which works
    # because the root stays whole from its forward to its backward pass.
    whole = {p for name, part in m.named_children() if name in frozen for p in part.parameters()}
    fully_shard(m, **how, ignored_params=whole)


def reducing(net, now):
    """Whether the backward pass inside sums ddp's gradients over processes, or only adds to this process's own. Sharded
    weights sum after every pass: to add up, each process would need room for the gradients of the whole model."""
    skip = isinstance(net, DistributedDataParallel) and not now
    return net.no_sync() if skip else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# One step of the language model: next-token prediction + lambda AIA
# ---------------------------------------------------------------------------------------------------------------------
def counts(batches):
    """{task: (label tokens, valid samples)} of a whole step, over all processes: what its sums are divided by."""
    total = torch.zeros(len(aia.TASKS), 2, dtype=torch.long)
    for batch in batches:
        for task, tokens, valid in zip(batch.tasks, batch.labelled, batch.per_task(batch.aia_valid), strict=True):
            total[aia.TASKS.index(task)] += torch.tensor([tokens, int(valid.sum())])
    return dict(zip(aia.TASKS, over_processes(total).tolist(), strict=True))


def accumulate(net, batches, targets, lambdas, backward=True, autocast=contextlib.nullcontext, device=None):
    """Gradients of one step, the same however its samples are cut into micro-batches and over processes.

    loss = sum over tasks of  ntp_sum / label_tokens(task)  +  lambda(task) * aia_sum / valid_samples(task)
    targets {task: (target, delta)}, lambdas {task: lambda}, 0 for a task that is left out; lambdas None: next-token
    prediction alone, and no attention is measured. backward False: only measure. All processes have the same tasks in
    turn.
    -> sums {task: (tensor on the device, valid samples)} for `metrics_of`: a GPU works on while nobody asks for numbers
    """
    total = counts(batches)
    device = device or next(net.parameters()).device
    sums = {}
    for i, batch in enumerate(batches):
        batch = batch.to(device)
        # ddp sums gradients of the modules that a pass has used. Those of Janus-Pro's tasks differ, so it sums in the
        # last pass of each task, and of mixed samples.
        last = i + 1 == len(batches) or batches[i + 1].task != batch.task
        with reducing(net, last), torch.set_grad_enabled(backward):
            with autocast():
                out = net(batch, intensity=lambdas is not None)
            loss = 0.0
            for task, ntp_sum, intensity, aia_valid in zip(batch.tasks, *map(
                    batch.per_task, (out.ntp, out.intensity, batch.aia_valid)), strict=True):
                tokens, valid = (max(n, 1) for n in total[task])
                loss = loss + ntp_sum / tokens
                row = [ntp_sum.detach()[None] / tokens]
                if lambdas is not None:
                    aia_sum = aia.loss(intensity, *targets[task], aia_valid, reduction="sum")
                    # L = L_NTP + lambda L_AIA (Eq. 3)
                    loss = loss + lambdas.get(task, 0.0) * aia_sum / valid
                    measured = torch.where(aia_valid[:, None], intensity.detach(), 0.0).sum(0)                  # (L,)
                    row += [aia_sum.detach()[None] / valid, measured / valid]
                before, _ = sums.get(task, (0.0, 0))
                sums[task] = before + torch.cat(row), total[task][1]                            # (2 + L,)
            if backward:
                (loss * processes()).backward()                                     # reducing takes the mean
    return sums


def metrics_of(sums, *more):
    """What `accumulate` summed, over all processes, as {"gen": {"ntp", "aia", "intensity"}, "und": ...}, and scalars
    `more` as numbers: the only wait for the device in a step. aia and intensity are None without a valid sample."""
    parts = [*(row for row, _ in sums.values()), *(value.detach().float().reshape(1) for value in more)]
    ends = torch.cat(parts).cpu().split([*map(len, parts)]) if parts else []
    metrics = {}
    for (task, (_, valid)), row in zip(sums.items(), ends, strict=False):
        ntp, *measured = over_processes(row)
        metrics[task] = {"ntp": ntp.item()}
        if measured:
            metrics[task] |= {"aia": measured[0].item() if valid else None,
                              "intensity": torch.stack(measured[1:]) if valid else None}
    return (metrics, *(value.item() for value in ends[len(sums):])) if more else metrics


def calibrate(net, schedule, targets, config, autocast, device=None):
    """lambda of each task from batches without updates (aia.lambda_for_ratio), unless --aia-weight gives it."""
    fixed = fixed_lambdas(config.aia_weight)
    if fixed is not None:
        return fixed
    n = config.calibration or (10 if config.preset.startswith("tiny") else 100)
    measured = {task: [] for task in aia.TASKS}
    for step in range(n):
        # {} and not None: intensities are measured, with lambda 0.
        sums = accumulate(net, schedule.step(step), targets, {}, False, autocast, device)
        for task, row in metrics_of(sums).items():
            if row["aia"] is not None:
                measured[task].append((row["ntp"], row["aia"]))
    for task, share in zip(aia.TASKS, schedule.ratio, strict=False):
        if share and not measured[task]:
            raise InputError(f"lambda of task {task} cannot be calibrated: {n} batches hold no sample of it that AIA "
                             "can use; give a larger --calibration, or numbers with --aia-weight")
    return {task: aia.lambda_for_ratio(*np.mean(rows, 0).tolist(), config.rho) if rows else 0.0
            for task, rows in measured.items()}


@contextlib.contextmanager
def updating(m, optimizer, clip):
    """The end of a step: gradients are clipped to a norm, which the body gets and may refuse, then the weights move."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.grad is not None], clip)
    yield norm.full_tensor() if isinstance(norm, DTensor) else norm
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# The run: folder, checkpoints, log
# ---------------------------------------------------------------------------------------------------------------------
class Run:
    """A training run in its folder."""

    def __init__(self, config, phases, device):
        self.config = config
        self.phases = phases
        self.folder = run_folder(config)
        self.bad = []                               # texts about records that were left out
        self.stopping = 0                           # the signal that asks for an end
        self.held = None                            # batches of --val, made when they are first needed
        self.device = device
        self.saver = Saver(self.sharded(), pinned=self.device.startswith("cuda"))
        self.checkpoint, self.manifest = first_decides(lambda: checkpoints.resumed_from(
            self.folder, config.resume, lambda stored: check_settings(stored, config, self.folder)))
        self.began = time.time() - (self.manifest["seconds"] if self.manifest else 0.0)
        self.bf16 = settings.uses_bf16(config, self.device)
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32             # of activations
        print(f"device {self.device}, {'bfloat16' if self.bf16 else 'float32'} activations, {torch.get_num_threads()} "
              f"threads, process 1 of {processes()}, torch {torch.__version__}, Python {platform.python_version()}")
        torch.manual_seed(config.seed)
        self.prepare()

    def stop(self, number):
        """A signal asks for an end: after this step."""
        self.stopping = number

    def sharded(self):
        """Whether each process holds a part of the weights."""
        return processes() > 1 and self.config.parallel != "ddp"

    def autocast(self):
        """The precision of a forward pass. Sharded weights have a policy of their own."""
        if self.bf16 and not (self.config.pure_bf16 or self.sharded()):
            return torch.autocast(torch.device(self.device).type, torch.bfloat16)
        return contextlib.nullcontext()

    def prepare(self):
        """Data, model and text tokenizer; nothing is written before all of them are good."""
        config = self.config
        self.kind = model.PRESETS[config.preset].kind
        self.open_data()
        self.m = self.open(min(self.manifest["phase"], len(self.phases) - 1) if self.manifest else 0)
        self.check_model()
        if self.world:
            self.check_world()
        print(f"attention: {model.attention_kernel(self.m, self.device, self.dtype)}")
        self.targets = {task: tuple(x.to(self.device) for x in aia.targets(
            self.m.config.layers, task, config.aia_targets, config.aia_variant)) for task in aia.TASKS}
        self.encoded = Encoded(config.encoded, self.m) if config.encoded else None
        first_decides(self.begin_folder)
        if not find_tokenizer(self.folder):
            raise InputError(f"{self.folder} has lost its tokenizer: put {' or '.join(TOKENIZERS)} back")
        self.text = Text(find_tokenizer(self.folder), self.kind)
        if self.text.ids != self.m.ids:
            raise InputError(f"{self.text.file} has other special ids than the model: it belongs to another preset")
        self.preparer = self.prepared()
        usual = asdict(TrainConfig()) | SETTINGS_OF.get(config.preset, {})
        changed = [f"{name} {value}" for name, value in asdict(config).items() if value != usual[name]]
        print(f"settings: {', '.join(changed) or 'those of the preset'}; all in {self.folder / 'settings.json'}")

    def prepared(self):
        """What makes batches for the model of a phase."""
        return data.Preparer(self.m, self.text, encoded=self.encoded, first=self.config.aia_variant != "no-first")

    def open_data(self):
        """The world, or the user's records; a resumed run must find as many as before."""
        config = self.config
        self.world = None
        if config.data:
            self.source = open_sources(config.data, self.kind, config.on_bad_record)
            print(self.source.summary())
            if self.source.count("mixed") and not parse_ratio(config.ratio)[2]:
                print(f"mixed records have no share in --ratio {config.ratio}, so none is used: give them one, as in "
                      "--ratio 1:1:1")
        else:
            self.world = world_of(asdict(config))
            self.source = data.WorldSource(self.world, config.pool, config.seed)
        self.val = FileSource(config.val, self.kind, config.on_bad_record) if config.val else self.source
        if config.val:
            print(self.val.summary())
        counts = {task: self.source.count(task) for task in aia.TASKS}
        self.records = first_decides(self.source.identity) if config.data else counts
        if self.manifest and self.manifest["records"] not in (self.records, counts):            # older runs: counts
            found = sum(map(self.source.count, RECORD_TASKS))
            raise InputError(f"{self.folder} was started with other records than these {found}: resume with the same "
                             "data, wherever they lie now, or choose another --out")
        data.check_tasks(self.source, parse_ratio(config.ratio))
        if config.encoded and not config.init:
            raise InputError("--encoded needs --init: without it the picture tokenizer is yet to be trained")

    def check_model(self):
        """Refuse a model that the plan of the preset was not made for; sizes that no preset has are free."""
        config, found = self.config, self.m.config
        if found.kind != self.kind:
            raise InputError(f"--init {config.init} is a model of kind {found.kind}, but --preset {config.preset} of "
                             f"kind {self.kind}: choose the preset that fits")
        size = attrgetter("kind", "layers", "width", "ffn")
        like = [name for name, c in model.PRESETS.items() if size(c) == size(found)]
        if like and config.preset not in like:
            raise InputError(f"--init {config.init} has the size of {' or '.join(like)}, not of {config.preset}: give "
                             f"--preset {like[0]}")
        branch = model.PRESETS[config.preset].fork_layer
        if branch and found.fork_layer != branch:
            raise InputError(f"--preset {config.preset} has branches from layer {branch} on, --init from layer "
                             f"{found.fork_layer} (0: none): add --fork-layer {branch}, or use another --init")

    def check_world(self):
        """Refuse a world whose pictures differ in size from those that the model draws, which could not be read; and
        weights that have learned from what this world holds out."""
        config, size, side = self.config, self.m.config.image_size, self.world.side
        if size != side:
            fitting = [cell for cell in CELL_SIDES if GRID * cell == size]
            remedy = f"--cell {fitting[0]}" if fitting else "--data with pictures of your own"
            raise InputError(f"the model draws pictures of {size} x {size} pixels, those of the built-in world have "
                             f"{side} x {side}: give {remedy}")
        if self.manifest or not config.init:
            return
        file = self.m.tokenizer_file.with_name("settings.json")
        made = asdict(TrainConfig()) | settings.read_json(file) if file.exists() else {}
        if not made or made["data"]:                # public weights, or own pictures: nothing is known
            return
        for name in WORLD:
            if made[name] != getattr(config, name):
                raise InputError(f"--init {config.init} learned the world of --{name} {made[name]} and has met what "
                                 f"that of {getattr(config, name)} holds out: give --{name} {made[name]}")

    def open(self, index):
        """The model of a phase: from the checkpoint of this run, from --init, or fresh."""
        config = self.config
        phase = self.phases[index]

        def shard(m):
            freeze(m, phase)                        # what needs gradients is fixed at the first step of sharded weights
            shard_model(m, config, {"vq", *phase.frozen}, self.device)
        # Weights that LoRA leaves frozen are stored in the type of activations. Sharding allows it: only the training
        # parameters of a layer must be of one type.
        half = config.pure_bf16 or (config.lora_rank > 0 and self.bf16)
        dtype = torch.bfloat16 if half else torch.float32
        if not self.sharded():
            shard = None
        device = "cpu" if config.offload and shard else self.device
        kept = {"attention": config.attention, "checkpoint_activations": config.checkpoint_activations}
        if self.checkpoint:
            m = checkpoints.from_manifest(self.manifest, self.checkpoint, kept, device, shard, dtype)
        elif config.init:
            m = formats.weights.load(config.init, dtype, device, config.vision_tokenizer, shard=shard,
                                     lora_rank=config.lora_rank, fork_layer=config.fork_layer, **kept)
            if config.image_size:
                m.config = drawn_at(config.image_size, m.config)
            if not m.tokenizer_file:
                raise InputError(f"--init {config.init} holds no tokenizer: put {' or '.join(TOKENIZERS)} there")
        else:
            m = model.build(config.preset, **kept).to(device)
            for name, child in m.named_children():
                child.to(torch.float32 if name == "vq" else dtype)
            if shard:
                shard(m)
        # What is not sharded; --offload has loaded it on the CPU.
        for name in {"vq", *phase.frozen} & {name for name, _ in m.named_children()}:
            getattr(m, name).to(self.device)
        model.settle_attention(m, self.device, self.dtype)
        if config.compile:
            for layer in m.lm.all_layers():
                layer.compile()
        return m

    def reopen(self, index):
        """Sharded weights for another phase: which of them train was fixed when they were sharded."""
        self.saver.finish()
        self.checkpoint, self.manifest = first_decides(lambda: checkpoints.newest_checkpoint(self.folder))
        self.m = self.open(index)
        self.preparer = self.prepared()

    def begin_folder(self):
        """The run folder with a tokenizer, that of --init or a new one, and the settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be made ({error.strerror}): choose another") from error
        settings.write_json(asdict(self.config), self.folder / "settings.json")
        if self.manifest:
            return
        for phase in self.phases:                   # left by a job that was killed before its first checkpoint
            for name in filter(None, (phase.start, phase.end)):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.config.init:
            store_tokenizer(Text(self.m.tokenizer_file, self.m.config.kind), self.folder)
        else:
            world = world_of(asdict(self.config) | {"seed": 0})                 # the same words for every seed
            mixed = any(parse_ratio(phase.ratio or self.config.ratio)[2] for phase in self.phases)
            data.train_tokenizer(self.folder / "tokenizer.json", self.m.config, world, mixed)

    def save(self, index, step, optimizer, lambdas):
        """Everything that --resume needs, in the background. The order of data follows from the seed and the step."""
        self.write(f"checkpoints/{index}-{step:07d}", optimizer, self.config.keep,
                   {"settings": asdict(self.config), "phase": index, "step": step, "lambdas": lambdas,
                    "optimizer": optimizer is not None, "seconds": self.elapsed(), "records": self.records})

    def write(self, name, optimizer=None, keep=0, more=None):
        """Start writing a checkpoint folder, of the model alone unless told otherwise."""
        tensors = checkpoints.tensors_of(self.m, optimizer)
        manifest = {"config": asdict(self.m.config), "dtype": str(tensors["model.lm.norm.weight"].dtype).split(".")[1]}
        self.saver.begin(tensors, manifest | (more or {}), self.folder / name, keep)

    def restore(self, name):
        """Read the weights that a phase left in a folder of the run."""
        first_decides(lambda: checkpoints.read_manifest(self.folder / name))        # refuses damaged files
        checkpoints.read_tensors(checkpoints.tensors_of(self.m), self.folder / name)

    def elapsed(self):
        """Seconds of training, those before a resume included."""
        return time.time() - self.began

    def log(self, entry):
        """Add a line to metrics.jsonl."""
        if rank():
            return
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"{self.folder / 'metrics.jsonl'} could not be written ({error.strerror}): make room, "
                             "then continue with --resume; checkpoints are untouched") from error

    @functools.cached_property
    def pictures(self):
        """Pictures that train the picture tokenizer: the world's, or the user's at the size of drawn ones."""
        if self.world:
            return self.source.crowded
        return square_pictures(self.source, self.m.config, self.bad, self.config.on_bad_record == "stop")


# Settings that a run may change when it resumes: where it runs and how often it reports.
FREE = {"resume", "device", "out", "log_every", "save_every", "micro_batch", "eval_n", "attention", "val_every", "keep",
        "checkpoint_activations", "compile", "encoded", "parallel", "offload", "on_bad_record"}
PATHS = {"data", "val", "init", "vision_tokenizer"}       # may change too, but not appear or go: files may have moved
# Settings of older runs that are gone, with the values that change nothing. (None: whatever it was.)
GONE = {"dry_run_world": (0,), "tokens": (0,), "tflops": (989.0,), "utilisation": (0.4,), "shard": None,
        "whole_gradients": None, "rope_bf16": (False,), "clip": (1.0, 5.0)}


def check_settings(stored, config, folder):
    """A resumed run keeps its settings, except FREE ones. Settings that are newer than the run had their defaults."""
    plain, given = (json.loads(json.dumps(asdict(one))) for one in (TrainConfig(), config))     # tuples become lists
    if config.mix == "drawn" and "clip" in stored:  # --clip went when the drawing of tasks changed
        raise InputError(f"{folder} is of an older version, which drew the tasks of steps differently: start anew in "
                         "another folder")
    for name, value in (plain | stored).items():
        flag = "--" + name.replace("_", "-")
        if GONE.get(name) and value not in GONE[name]:
            raise InputError(f"{folder} was started with {flag} {value}, which is gone: start anew in another folder")
        same = value == given.get(name) or (name in PATHS and bool(value) == bool(given[name]))
        if name not in FREE | GONE.keys() and not same:
            raise InputError(f"{folder} was started with {flag} {value}, not {given.get(name)}: resume with the same "
                             f"settings, or train its weights in another folder: --init {folder} --out FOLDER")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------
def train(config, phases=None):
    """All phases, those of the plan unless given, then the evaluation -> the result that is printed as the last line;
    None except on the first process."""
    check_numbers(config)
    phases = phases or plan(config)
    device = start_processes(config)
    with owned(run_folder(config)):
        run = Run(config, phases, device)
        run_phases(run)
        return finish(run)


def run_folder(config):
    """Where a run lies."""
    return Path(config.out or f"runs/{config.preset}-seed{config.seed}")


def run_phases(run):
    """All phases that are left, until they are done or a signal asks for an end."""
    manifest = run.manifest
    begin, step = (manifest["phase"], manifest["step"]) if manifest else (0, 0)
    first_decides(lambda: checkpoints.trim_log(run.folder / "metrics.jsonl", begin, step))
    with interruptible(run.stop):
        for index in range(begin, len(run.phases)):
            run_phase(run, index, manifest)
            manifest = None
        run.saver.finish()
        if over_processes(torch.tensor(run.stopping)):
            raise Stop(run.stopping)


class Progress:
    """A phase under way: what it trains with, and what happened since the last report."""

    def __init__(self, run, index, manifest):
        self.run, self.index = run, index
        self.phase = phase = run.phases[index]
        self.first = manifest["step"] if manifest else 0
        self.optimizer = make_optimizer(run.m, phase)
        self.net = run.m                            # the model as several processes call it
        self.schedule, self.coming = None, None     # batches of each step; none for the picture tokenizer
        self.lambdas = dict.fromkeys(aia.TASKS, 0.0)
        if not phase.pictures:
            self.schedule = self.order_of(run.config.mix)
            if processes() > 1 and not run.sharded():
                self.net = replicated(run.m)
        if manifest and manifest["optimizer"]:
            self.lambdas = manifest["lambdas"]
            known = checkpoints.tensor_names(run.checkpoint)
            checkpoints.read_tensors(checkpoints.tensors_of(run.m, self.optimizer, known), run.checkpoint)
        elif phase.aia:
            self.calibrate()
        trains = sum(p.numel() for p in run.m.parameters() if p.requires_grad)
        print(f"{phase.name}, phase {index + 1} of {len(run.phases)}: {phase.steps} steps of {phase.batch_size}, "
              f"{trains:,} of {sum(p.numel() for p in run.m.parameters()):,} parameters train")
        self.bar = tqdm(total=phase.steps, initial=self.first, desc=phase.name, unit="step",
                        disable=True if rank() else None)
        self.reset(self.first)

    def reset(self, step):
        """Count anew from a step on."""
        self.since, self.start, self.waited = step, time.time(), 0.0
        self.tokens = torch.zeros(2, dtype=torch.long)                          # real ones, and with padding

    def order_of(self, mix):
        """The samples of every step. Both arms meet the same ones, the phases before them others of the same seed."""
        run, phase = self.run, self.phase           # 3 seed + order: no two seeds share an order
        return data.Schedule(run.source, run.preparer, 3 * run.config.seed + phase.order, phase.batch_size,
                             parse_ratio(phase.ratio or run.config.ratio), run.config.micro_batch,
                             on_bad_record=run.config.on_bad_record, rank=rank(), processes=processes(), mix=mix)

    def calibrate(self):
        """lambda of each task, on batches of both."""
        run, config = self.run, self.run.config
        self.lambdas = calibrate(self.net, self.order_of("both"), run.targets, config, run.autocast, run.device)
        how = f"calibrated for rho {config.rho}" if config.aia_weight == "rho" else config.aia_weight
        print(f"lambda: generation {self.lambdas['gen']:.3g}, understanding {self.lambdas['und']:.3g} ({how})")

    def batches(self):
        """The micro-batches of the next step, which were prepared while the last one trained."""
        start = time.time()
        self.coming = self.coming or self.schedule.steps(self.first, self.phase.steps)
        batches = next(self.coming)
        self.waited += time.time() - start
        self.tokens += sum(torch.tensor([sum(batch.lengths), batch.tokens.numel()]) for batch in batches)
        self.origins = [origin for batch in batches for origin in batch.origins]
        return batches


def run_phase(run, index, manifest=None):
    """One phase from its first step, or from the checkpoint that a manifest describes."""
    phase, config = run.phases[index], run.config
    begin_phase(run, index, manifest)
    now = Progress(run, index, manifest)
    run.m.train()
    if now.schedule and config.val and not run.held:            # a bad record is reported now, not after hours
        run.held = held_batches(run)
    metrics = {}
    for step in range(now.first, phase.steps):
        metrics, norm = take_step(now, step)
        if (step + 1) % config.log_every == 0 or step + 1 == phase.steps:
            report_step(now, step, metrics, norm)
        if now.schedule and config.val and (step + 1) % config.val_every == 0:
            held_out(now, step)
        stopping = bool(over_processes(torch.tensor(run.stopping)))
        if stopping or ((step + 1) % config.save_every == 0 and step + 1 < phase.steps):
            run.save(index, step + 1, now.optimizer, now.lambdas)
        if stopping:
            run.saver.finish()
            now.bar.close()
            raise Stop(run.stopping)
    now.bar.close()
    if metrics.get("tokenizer", {}).get("codes") == 1:
        print("warning: the picture tokenizer has collapsed to one code, so all pictures are the same to the model and "
              "losses of drawing mean nothing: start anew with another --seed, or with pictures that differ more")
    run.m.eval()
    if phase.end:
        run.write(phase.end)
    run.save(index + 1, 0, None, now.lambdas)
    if now.schedule:
        run.bad += [text for text in now.schedule.bad if text not in run.bad]


def begin_phase(run, index, manifest):
    """The weights that a phase starts from, unless it goes on from a checkpoint within it."""
    phase = run.phases[index]
    if run.sharded() and not manifest and index:
        run.reopen(index)
    if manifest and manifest["optimizer"]:
        return
    if phase.start and first_decides((run.folder / phase.start).exists):
        run.restore(phase.start)
    elif phase.start:
        run.write(phase.start)
    if phase.fork:                                  # drawing begins: its branch is a copy of what has learned to answer
        model.fork(run.m)


def take_step(now, step):
    """One optimizer step -> metrics, norm of the gradient."""
    run, phase = now.run, now.phase
    for group in now.optimizer.param_groups:
        group["lr"] = learning_rate(step, phase)
    batches = []
    if phase.pictures:                              # too small to share: every process does the same
        metrics = tokenizer_step(run.m, run.pictures, step, phase, run.config.seed)
    else:
        batches = now.batches()
        lambdas = lambdas_at(step, phase, now.lambdas)
        sums = accumulate(now.net, batches, run.targets, lambdas, autocast=run.autocast, device=run.device)
    with updating(run.m, now.optimizer, phase.clip) as norm:
        if not phase.pictures:
            metrics, norm = metrics_of(sums, norm)
        check_finite(norm, metrics, phase, step, batches, run)
    if step == 0 and not phase.pictures:
        first = (f"{task} {row['ntp']:.2f} (chance: {run.m.chance_loss(task):.2f})" for task, row in metrics.items())
        print("first loss " + ", ".join(first))
    now.bar.update()
    return metrics, float(norm)


def check_finite(norm, metrics, phase, step, batches, run):
    """Stop before a broken number reaches the weights; say where it came from."""
    losses = [row[name] for row in metrics.values() for name in ("ntp", "aia", "l1") if row.get(name) is not None]
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        return
    origins = gathered([origin for batch in batches for origin in batch.origins])
    shown = ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
    run.saver.finish()                              # the last good one may be on its way to the disk
    saved = checkpoints.checkpoint_folders(run.folder)
    good = f"last good checkpoint {saved[-1]}" if saved else "no checkpoint yet"
    raise InputError(f"phase {phase.name}, step {step + 1}: loss or gradient is not finite (norm {float(norm)}); "
                     f"records: {shown or 'tokenizer pictures'}; {good}; try a lower --lr or remove the records")


def held_batches(run):
    """Up to 32 records of --val for each task, and as many mixed ones, always the same."""
    ratio = [min(run.val.count(task), 32) for task in RECORD_TASKS]
    schedule = data.Schedule(run.val, run.preparer, 0, sum(ratio), ratio, run.config.micro_batch, 0.0,
                             run.config.on_bad_record, rank(), processes())
    batches = schedule.step(0)
    run.bad += schedule.bad
    return batches


def held_out(now, step):
    """Losses on the records of held_batches; in the log under "val". Their time does not count in the rates."""
    run = now.run
    start = time.time()
    metrics = metrics_of(accumulate(now.net, run.held, run.targets, {}, False, run.autocast, run.device))
    rows = {task: {key: row[key] for key in ("ntp", "aia")} for task, row in metrics.items()}
    run.log({"phase": now.index, "name": now.phase.name, "step": step + 1, "val": rows})
    now.bar.write(f"held out, step {step + 1} | " + " | ".join(map(brief, rows, rows.values())), file=sys.stdout)
    now.start += time.time() - start


def brief(task, row):
    """Losses of one task for the terminal."""
    return f"{task} {row['ntp']:.3f} aia " + ("-" if row["aia"] is None else f"{row['aia']:.4f}")


def report_step(now, step, metrics, norm):
    """One object in metrics.jsonl for each report, and about twenty lines a phase on the terminal."""
    run, phase = now.run, now.phase
    seconds = time.time() - now.start
    per_step = seconds / (step + 1 - now.since)                                 # seconds
    lr = learning_rate(step, phase)
    memory = settings.memory_gb()
    entry = {"phase": now.index, "name": phase.name, "step": step + 1, "lr": lr, "grad_norm": norm, "memory_gb": memory,
             "seconds": run.elapsed(), "samples_per_second": phase.batch_size / per_step}
    parts = []
    for task, row in metrics.items():
        row = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        entry[task] = row                           # what follows adds to it
        if phase.pictures:
            collapsed = " (collapsed)" if row["codes"] == 1 else ""
            parts.append(f"l1 {row['l1']:.4f} codes {row['codes']}{collapsed}")
        else:
            weight = lambdas_at(step, phase, now.lambdas)[task]
            weighted = weight * (row["aia"] or 0.0)
            row |= {"lambda": weight, "ratio": row["ntp"] / weighted if weighted else None}
            parts.append(brief(task, row))
    tokens, padded = over_processes(now.tokens).tolist()
    if padded:
        entry |= {"tokens_per_second": tokens / seconds, "padding": 1 - tokens / padded,
                  "waiting": now.waited / seconds, "origins": sorted(gathered(now.origins))}
    left = per_step * (phase.steps - step - 1)
    every = run.config.log_every * -(-phase.steps // (20 * run.config.log_every))               # a screen for a phase
    if (step + 1) % every == 0 or step + 1 == phase.steps:
        now.bar.write(f"step {step + 1:5d}/{phase.steps} | {' | '.join(parts)} | lr {lr:.1e} | grad {norm:.2f} | "
                      f"{phase.batch_size / per_step:.0f} img/s | {memory:.1f} GB | eta {left:.0f} s", file=sys.stdout)
        sys.stdout.flush()
    run.log(entry)
    now.reset(step + 1)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run
# ---------------------------------------------------------------------------------------------------------------------
def finish(run):
    """Scores, curves and samples of the final weights, in the run folder -> the result. Only the first process does it,
    the others end."""
    config = run.config
    run.bad = list(dict.fromkeys(gathered(run.bad)))
    if rank():
        return None
    m, run.m, run.preparer = run.m, None, None      # one model may be all that fits
    run.saver.release()
    if run.sharded():                               # all of it in place of a part, in the type of activations
        del m
        m = formats.weights.load(run.folder, torch.bfloat16 if run.bf16 else None, run.device)
    curves = curves_of(run, m)
    last = {task: curves[task]["after"] for task in aia.TASKS}
    result = {"und": None, "gen": None, "reader": None, "psnr": None}
    if run.world:
        scores = {name: score_arm(run, name, m) for name, m in evaluation.arms(run.folder, m)}
        scores |= scores.pop("after") | evaluation.score_tokenizer(m, run.world, 4 * config.eval_n, config.seed)
        result |= {key: scores[key] for key in ("und", "gen", "reader", "psnr")}
        result |= {key: scores[key] for key in evaluation.MIXED_SCORES if key in scores}
        settings.write_json(scores, run.folder / "scores.json")
    result |= {f"val_ntp_{task}": last[task] and last[task]["ntp"] for task in aia.TASKS}
    result |= {f"aia_{task}": last[task] and last[task]["aia"] for task in aia.TASKS}
    bad = run.bad + run.source.bad + (run.val.bad if run.val is not run.source else [])
    if bad:
        print(bad_report(bad, run.source.paths + run.val.paths))
    print(f"look at the pictures in {run.folder}, or at all of it on one page: python -m lab.report {run.folder}")
    result |= {"preset": config.preset, "seed": config.seed, "seconds": round(run.elapsed(), 1),
               "rss_gb": round(settings.memory_gb(), 3)}
    settings.write_json(result | {"machine": settings.machine() | {"device": run.device}}, run.folder / "result.json")
    return result


def curves_of(run, m):
    """Measure, draw and print the curves of all arms."""
    skipped = run.bad if run.config.on_bad_record == "skip" else None
    samples = evaluation.FileBatches(run.val, skipped)
    if run.world:
        samples = evaluation.HeldOut(run.world, run.config.seed)
    targets = {task: tuple(x.cpu() for x in pair) for task, pair in run.targets.items()}
    curves = evaluation.curves(evaluation.arms(run.folder, m), data.Preparer(m, run.text), samples, targets,
                               final=evaluation.final_label(run.folder))
    evaluation.show_curves(curves, run.folder / "curves.png", run.kind, f"{run.config.preset}, seed {run.config.seed}")
    return curves


def score_arm(run, name, m):
    """Held-out scores of one arm; draws samples.png of the final weights."""
    print("-- " + (evaluation.final_label(run.folder) if name == "after" else evaluation.LABEL[name]))
    config, stories = run.config, []
    scores, samples = evaluation.score_both(m, run.text, run.world, config.eval_n, config.seed)
    if parse_ratio(config.ratio)[2]:
        more, stories = evaluation.score_mixed(m, run.text, run.world, config.eval_n, config.seed)
        scores |= more
    if name == "after":
        plot_samples([*samples, *(("a story", story) for story in stories[:2])], run.folder / "samples.png")
    return scores


def settings_from(argv, cls=TrainConfig, prog="train.py", more=()):
    """Settings from flags. What no flag gives comes from the recipe, else from `more`, else from the preset."""
    config = settings.parse(cls, argv, prog, doc=__doc__ if cls is TrainConfig else "")
    recipe = RECIPES[config.recipe][1] if config.recipe else {}
    return settings.parse(cls, argv, prog, SETTINGS_OF.get(config.preset, {}) | dict(more) | recipe)


MOVED = {"study": "python -m lab.study", "--dry-run-world": "python -m lab.dry_run --world",
         "--shard": "--parallel hsdp", "--rope-bf16": "a flag of eval.py",
         "--whole-gradients": "what ddp always does", "--clip": "Phase.clip in train.py"}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    settings.moved(argv, "train.py", MOVED)
    config = settings_from(argv)
    phases = plan(config)
    check_effects(config, phases)
    settings.tell(settings.stoppable(lambda: train(config, phases), "continue with the same command and --resume"))


if __name__ == "__main__":
    settings.run_command(main)
