"""Train a unified model with next-token prediction and Attention Interaction Alignment: one loop, three stages.

Without flags this is the whole story on a laptop: (1) a picture tokenizer, then frozen; (2) training without AIA, first
of answering alone, then of drawing and answering; (3) fine-tuning with AIA. It ends with scores on held-out
combinations, curves and samples.

    python train.py                                   # tiny-emu3 on the built-in world
    python train.py --preset tiny-janus --seed 1
    python train.py --preset small-emu3               # larger, in a harder world: for one GPU
    python train.py --data train.jsonl --val val.jsonl
    python train.py --resume                          # go on where the same run stopped
    torchrun --nproc-per-node 8 train.py --parallel fsdp --preset janus-pro-7b --init FOLDER --data train.jsonl
    python -m lab.dry_run --world 64 --preset emu3-8b           # what a step on 64 GPUs would take, without any
    python -m lab.study --quick                       # the paper's claims in miniature, with UniFork beside it
"""

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import aia
import data
import eval as evaluation
import formats.weights
import model
from formats.checkpoints import (
    checkpoint_folders,
    from_manifest,
    newest_checkpoint,
    read_manifest,
    read_tensors,
    save_checkpoint,
    tensor_names,
    tensors_of,
)
from formats.datasets import Encoded, FileSource, bad_report, every, note_bad, open_sources
from parts.pictures import janus_drawing, load_picture, to_picture
from parts.processes import first_decides, over_processes, processes, rank
from parts.settings import (
    InputError,
    at_least,
    device_of,
    first_line,
    machine,
    memory_gb,
    moved,
    opt,
    parse,
    read_json,
    run_command,
    tell,
    whole,
    write_json,
)
from parts.text import TOKENIZERS, Text, find_tokenizer, store_tokenizer
from parts.vision import tokenizer_step
from parts.world import CELL_SIDES, GRID, WORLD, world_of


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainConfig:
    """Train a unified model with next-token prediction and AIA."""

    preset: str = opt("tiny-emu3", "model to train", tuple(model.PRESETS))
    recipe: str = opt("", "the paper's training of Emu3 or Janus-Pro; other flags replace parts of it",
                      ("", "emu3-sft", "janus-post"))
    seed: int = opt(0, "world, weights, order and words")
    steps: int = opt(0, "optimizer steps of every stage; 0: the plan of the preset")
    batch_size: int = opt(0, "samples per optimizer step of the language-model stages; 0: the plan of the preset")
    micro_batch: int = opt(64, "samples per forward pass; changes memory, not the result")
    lr: float = opt(0.0, "peak learning rate of the language-model stages; 0: the plan of the preset")
    weight_decay: float = opt(-1.0, "of matrices, norms and biases have none; -1: the plan of the preset")
    clip: float = opt(1.0, "largest norm of the gradient")
    ratio: str = opt("1:1", "samples for generation : understanding; each task's loss is a mean over its own samples")
    mix: str = opt("both", "both: each step has both tasks; drawn: one task a step, drawn by --ratio, as the released "
                   "code does", ("both", "drawn"))
    aia_weight: str = opt("rho", "lambda in L = L_ntp + lambda L_aia: rho (calibrate), paper, released, off, a number, "
                          "or two as GEN,UND")
    rho: float = opt(aia.RHO, "with --aia-weight rho: next-token loss : weighted AIA loss at the start of stage 3")
    calibration: int = opt(0, "batches without updates that calibrate lambda; 0: 10 for tiny presets, else 100")
    aia_targets: str = opt("depth", "depth, S4, S5, released, hunyuan-image-3, simplear, qwen-image, flux, "
                           "or a JSON file")
    aia_variant: str = opt("full", "what is left out of AIA", aia.VARIANTS)
    arms: str = opt("aia", "both: train stage 3 a second time without AIA, from the same weights", ("aia", "both"))
    attention: str = opt("auto", "explicit: written out; fused: one kernel; lse: one kernel, AIA from its log-sum-exp; "
                         "auto: what suits the device. The result is the same", tuple(model.ATTENTION))
    checkpoint_activations: bool = opt(False, "recompute each layer in the backward pass: less memory, slower steps")
    parallel: str = opt("ddp", "what the processes of torchrun share out: ddp nothing, fsdp weights, gradients and "
                        "optimizer, hsdp the same within a node", ("ddp", "fsdp", "hsdp"))
    shard: int = opt(0, "with hsdp: processes that share one copy of the weights; 0: those of a node")
    whole_gradients: bool = opt(False, "with fsdp, hsdp: sum gradients over processes once a task, not after every "
                                "micro-batch: less traffic, but each process holds the gradients of the whole model")
    offload: bool = opt(False, "with fsdp, hsdp: weights and optimizer wait in CPU memory")
    pure_bf16: bool = opt(False, "weights, gradients and optimizer in bfloat16, as in the released code")
    compile: bool = opt(False, "torch.compile the layers: a slow first minute, then faster steps")
    rope_bf16: bool = opt(False, "round the rotary frequencies to bfloat16, as the authors' scripts do")
    data: tuple = opt((), "data sets of your own (see README), each PATH or PATH=WEIGHT; none: the built-in world")
    val: str = opt("", "data set for held-out losses; empty: the records of --data, at the end only")
    val_every: int = opt(200, "steps between losses on --val")
    encoded: str = opt("", "folder of `data.py encode`: pictures whose codes (and features) need not be made again")
    on_bad_record: str = opt("stop", "what to do with a record that cannot be used", ("stop", "skip"))
    init: str = opt("", "run folder, or folder or hub id of public weights, to start from; skips stages 1 and 2")
    lora_rank: int = opt(0, "train additions of this rank to the decoder's projections (LoRA) and nothing else; "
                         "needs --init, wants a larger --lr. 0: train the weights")
    fork_layer: int = opt(0, "UniFork: give each task its own layers from this one on, as copies of those of --init")
    vision_tokenizer: str = opt("", "folder of Emu3's picture tokenizer; empty: beside the language model of --init")
    out: str = opt("", "run folder; empty: runs/<preset>-seed<seed>")
    resume: bool = opt(False, "go on from the newest checkpoint in the run folder; begin where there is none yet")
    shapes: int = opt(4, "shapes of the built-in world, 4 to 8")
    colours: int = opt(4, "colours of the built-in world, 4 to 8")
    objects: int = opt(2, "different things in a scene at most: 2 to 4, with two more shapes and colours")
    cell: int = opt(8, "side of a cell of the built-in world in pixels: 8, 16, 24 or 32; a picture has 2 x 2 cells")
    pool: int = opt(8000, "pictures of the built-in world")
    eval_n: int = opt(60, "pictures for each topic, and prompts for each skill, in the final scores")
    log_every: int = opt(50, "steps between reports")
    save_every: int = opt(300, "steps between checkpoints")
    keep: int = opt(2, "checkpoints that are kept")
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
    eps: float = 1e-8
    floor: float = 0.01                             # learning rate at the end, as a share of its peak
    ratio: str = ""                                 # samples for generation : understanding; empty: that of --ratio


# Lengths for one laptop core; the README states what they took. Large models start at stage 3 with --init.
# Found by trial: beside drawing, reading takes several times as many questions to learn, so it comes first. Strong
# weight decay brings prompts that were held out closer to those that were seen.
TOKENIZER = Stage("tokenizer", 1000, 8, 8e-3, 30, betas=(0.9, 0.99), weight_decay=0.0)
READ = Stage("read", 1000, 24, 3e-3, 50, ("vq",), ratio="0:1")
JOINT = Stage("joint", 1300, 32, 3e-3, 50, ("vq",), weight_decay=0.3)
TUNE = Stage("tune", 400, 32, 1e-3, 30, ("vq",), aia=True, weight_decay=0.3)
# UniFork's stages: what leads into and out of the decoder alone (its projector and image head; here pictures are words
# like any other, so embedding and head), then everything, then each branch alone, first drawing, then answering.
ALIGN = Stage("align", 200, 32, 3e-3, 30, ("vq", *(f"lm.{part}" for part in ("layers", "gen_layers", "norm",
                                                                             "gen_norm"))), weight_decay=0.3)
TRUNK = ("vq", "lm_head", *(f"lm.{part}" for part in ("embed_tokens", "layers.0", "layers.1")))
OWN = {"gen": (*TRUNK, "lm.layers", "lm.norm"), "und": (*TRUNK, "lm.gen_layers", "lm.gen_norm")}
# For one GPU, estimated to take ten minutes on an H100; it has never run on one. With 14.7 M parameters in the
# decoder, 37 tokens a drawing and 74 a conversation a joint step is 1.3e12 FLOP: 13 ms at a tenth of 989e12 FLOP/s.
# Launching its kernels (25 ms) and preparing samples (0.15 ms a drawing, 0.25 a conversation, in a thread beside it)
# weigh more. At 30, 55, 60 and 70 ms a step the stages take 30, 165, 240 and 70 s, scores perhaps 80.
SMALL = (replace(TOKENIZER, steps=1000, batch_size=32, lr=4e-3),
         replace(READ, steps=3000, batch_size=128, lr=1e-3, warmup=100),
         replace(JOINT, steps=4000, batch_size=256, lr=1e-3, warmup=100),
         replace(TUNE, steps=1000, batch_size=256, lr=3e-4))
PLANS = {**dict.fromkeys(("tiny-emu3", "tiny-wide", "tiny-half", "tiny-double"), (TOKENIZER, READ, JOINT, TUNE)),
         "tiny-unifork": (TOKENIZER, READ, ALIGN, JOINT, *(
             Stage(f"branch-{task}", 200, 32, 1e-3, 30, OWN[task], weight_decay=0.3, ratio=ratio)
             for task, ratio in (("gen", "1:0"), ("und", "0:1")))),
         "tiny-janus": (TOKENIZER, READ, JOINT, replace(TUNE, frozen=("vq", "vision"))), "small-emu3": SMALL}
# What a preset takes where no flag says otherwise: its world, one pass for each task of a step, and so many pictures
# that none is drawn more than twenty times.
SETTINGS_OF = {"small-emu3": {"shapes": 6, "colours": 6, "objects": 3, "cell": 16, "pool": 32_000, "calibration": 10,
                              "micro_batch": 128}}
LARGE = (Stage("tune", 1000, 64, 2e-5, 50, ("vq", "vision"), True),)
# The paper's two trainings: 3 M samples, half of each task, on 8 x 8 GPUs. Its text gives start, ratio and kind of
# sharding; Janus-Pro's other values are those of the authors' code. Chosen here: four epochs of 256 samples a step for
# both, lambda by rho; Emu3, of which no code was released, takes the rest from Emu3's own fine-tuning script.
RECIPES = {
    "emu3-sft": (Stage("tune", 46_875, 256, 1e-5, 30, ("vq",), True, weight_decay=0.1, eps=1e-6, floor=0.1),
                 {"preset": "emu3-8b", "parallel": "fsdp", "micro_batch": 1, "checkpoint_activations": True,
                  "clip": 5.0, "save_every": 500, "dtype": "bfloat16"}),
    "janus-post": (Stage("tune", 46_875, 256, 2e-5, 1_172, ("vq", "vision"), True, eps=1e-6, floor=0.05),
                   {"preset": "janus-pro-7b", "parallel": "hsdp", "micro_batch": 4, "checkpoint_activations": True,
                    "mix": "drawn", "pure_bf16": True, "save_every": 1000}),
}


LEAST = {"seed": 0, "steps": 0, "batch_size": 0, "micro_batch": 1, "lr": 0, "calibration": 0, "pool": 2, "eval_n": 1,
         "log_every": 1, "save_every": 1, "val_every": 1, "keep": 1, "shard": 0, "weight_decay": -1, "lora_rank": 0,
         "fork_layer": 0}


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
    at_least(config, LEAST)
    for name in ("rho", "clip"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name} {getattr(config, name)}: give a number above 0")
    if config.rho == math.inf:
        raise InputError("--rho inf: --aia-weight off leaves AIA out")
    if -1 < config.weight_decay < 0:
        raise InputError(f"--weight-decay {config.weight_decay}: give at least 0, or -1 for that of the plan")
    world_of(asdict(config))
    evaluation.fixed_weights(config.aia_weight)
    parse_ratio(config.ratio)
    if config.lora_rank and not config.init:
        raise InputError(f"--lora-rank {config.lora_rank} needs --init FOLDER: it adds to weights that have learned")
    if config.fork_layer and not config.init:
        raise InputError(f"--fork-layer {config.fork_layer} needs --init FOLDER: it copies weights that have learned")
    if config.arms == "both" and not evaluation.has_aia(asdict(config)):
        raise InputError("--arms both compares with and without AIA: tiny-unifork and --aia-weight off are without")
    if config.encoded and not (config.data or config.val):
        raise InputError("--encoded holds pictures of your own: the built-in world needs none, leave it out")
    if config.pure_bf16 and config.dtype == "float32":
        raise InputError("--pure-bf16 with --dtype float32: leave out one of them")
    if config.lora_rank and config.pure_bf16:
        raise InputError(f"--lora-rank {config.lora_rank} with --pure-bf16: give --dtype bfloat16 --no-pure-bf16 "
                         "instead, which holds in bfloat16 all that stands still")


def plan(config):
    """The stages of a run, flags applied."""
    stages = (RECIPES[config.recipe][0],) if config.recipe else PLANS.get(config.preset, LARGE)
    if config.init:
        stages = tuple(stage for stage in stages if stage.name not in ("tokenizer", "read", "align", "joint"))
    elif config.recipe or config.preset not in PLANS:
        raise InputError(f"--preset {config.preset} needs --init FOLDER: fresh weights of this size learn nothing here")
    if config.data:                                 # a user's records may hold no questions
        stages = tuple(stage for stage in stages if stage.name != "read")
    shares = parse_ratio(config.ratio)              # a stage of a task that has no share has nothing to train on
    stages = tuple(stage for stage in stages if not stage.ratio or any(
        own and share for own, share in zip(parse_ratio(stage.ratio), shares, strict=True)))
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
    """Linear warm-up, then a cosine down to the floor."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    return stage.lr * (stage.floor + (1 - stage.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def freeze(m, stage):
    """Only the parts that move in a stage need gradients."""
    for name, parameter in m.named_parameters():
        moves = name.startswith("vq.") if stage.name == "tokenizer" else not any(
            name.startswith(f"{part}.") for part in stage.frozen)
        parameter.requires_grad_("lora_" in name if m.config.lora_rank else moves)


def make_optimizer(m, stage):
    """AdamW over the parts that move."""
    freeze(m, stage)
    moving = [p for p in m.parameters() if p.requires_grad]
    groups = [{"params": [p for p in moving if p.ndim >= 2], "weight_decay": stage.weight_decay},
              {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun started
# ---------------------------------------------------------------------------------------------------------------------
def start_processes(config):
    """Join the other processes of torchrun, if there are any -> device of this one. Only the first one prints."""
    device = device_of(config.device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if config.device not in ("auto", "cuda", "cpu"):
            raise InputError(f"--device {config.device} with torchrun, whose processes have a GPU each: leave it out")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    if config.offload and (processes() == 1 or config.parallel == "ddp"):
        raise InputError("--offload moves shares of a model: it needs torchrun, and --parallel fsdp or hsdp")
    if config.shard and (config.parallel != "hsdp" or processes() % config.shard):
        raise InputError(f"--shard {config.shard}: give a divisor of the {processes()} processes, with --parallel hsdp")
    return device


def replicated(m):
    """A model that every process holds whole (ddp). Modules of one task get no gradient from the other."""
    alone = m.config.kind == "janus" or m.config.fork_layer > 0
    return DistributedDataParallel(m, find_unused_parameters=alone, broadcast_buffers=False)


def shard_model(m, config, frozen, device):
    """Share the weights out over the processes (fsdp, hsdp): each holds a part of every layer, and the whole of it only
    while it computes. Frozen towers stay whole on every process."""
    kind, n = torch.device(device).type, config.shard or int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    shape, names = (processes(),), ("part",)
    if config.parallel == "hsdp":
        shape, names = (processes() // n, n), ("copy", "part")
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if uses_bf16(config, device) and not \
        config.pure_bf16 else MixedPrecisionPolicy()
    how = {"mesh": init_device_mesh(kind, shape, mesh_dim_names=names), "mp_policy": precision,
           "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if config.offload else OffloadPolicy()}
    for layer in m.lm.all_layers():
        fully_shard(layer, **how)
    # The root holds embeddings, heads and aligners. Its head is read directly (model.next_token_loss), which works
    # because the root stays whole from its forward to its backward pass.
    m.whole_gradients = config.whole_gradients
    fully_shard(m, **how, ignored_params={p for name, part in m.named_children() if name in frozen
                                          for p in part.parameters()})


@contextlib.contextmanager
def reducing(net, now):
    """Whether the backward pass inside sums gradients over processes, or only adds to this one's. The latter would keep
    whole gradients where they are sharded, so that is asked for separately."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(now or not net.whole_gradients)
    with net.no_sync() if isinstance(net, DistributedDataParallel) and not now else contextlib.nullcontext():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# One step of the language model: next-token prediction + lambda AIA
# ---------------------------------------------------------------------------------------------------------------------
def counts(batches):
    """{task: (label tokens, valid samples)} of a whole step, all processes together: what its sums are divided by."""
    total = torch.zeros(len(aia.TASKS), 2, dtype=torch.long)
    for batch in batches:
        total[aia.TASKS.index(batch.task)] += torch.tensor([len(batch.targets), int(batch.aia_valid.sum())])
    return dict(zip(aia.TASKS, over_processes(total).tolist(), strict=True))


def accumulate(net, batches, targets, weights, scale=True, autocast=contextlib.nullcontext, device=None):
    """Gradients of one step, the same however its samples are cut into micro-batches and over processes.

    loss = sum over tasks of  ntp_sum / label_tokens(task)  +  lambda(task) * aia_sum / valid_samples(task)
    targets {task: (target, delta)}, weights {task: lambda}; weights None is next-token prediction alone, which also
    measures no attention; scale False measures only, without gradients. All processes have the same tasks in turn.
    -> sums {task: (tensor on the device, valid samples)} for `metrics_of`: a GPU works on while nobody asks for numbers
    """
    total, sums, device = counts(batches), {}, device or next(net.parameters()).device
    for i, batch in enumerate(batches):
        batch, (tokens, valid) = batch.to(device), (max(n, 1) for n in total[batch.task])
        # Gradients are summed over processes once a task. Once a step would do in float32; in half precision, those of
        # the last pass are bfloat16 and those kept from earlier ones float32, which fully_shard cannot sum together.
        last = i + 1 == len(batches) or batches[i + 1].task != batch.task
        with reducing(net, last), torch.set_grad_enabled(scale):
            with autocast():
                out = net(batch, intensity=weights is not None)
            loss, row = out.ntp / tokens, [out.ntp.detach()[None] / tokens]
            if weights is not None:
                aia_sum = aia.loss(out.intensity, *targets[batch.task], batch.aia_valid, reduction="sum")
                # L = L_NTP + lambda L_AIA (Eq. 3)
                loss = loss + weights.get(batch.task, 0.0) * aia_sum / valid
                measured = torch.where(batch.aia_valid[:, None], out.intensity.detach(), 0.0).sum(0)            # (L,)
                row += [aia_sum.detach()[None] / valid, measured / valid]
            if scale:
                (loss * processes()).backward()                                     # reducing takes the mean
        before, _ = sums.get(batch.task, (0.0, 0))
        sums[batch.task] = before + torch.cat(row), total[batch.task][1]                            # (2 + L,)
    return sums


def metrics_of(sums, *more):
    """What `accumulate` summed, over all processes, as {"gen": {"ntp", "aia", "intensity"}, "und": ...}, and scalars
    `more` as numbers: the one moment of a step that waits for the device. aia and intensity are None without a valid
    sample."""
    parts = [*(row for row, _ in sums.values()), *(value.detach().float().reshape(1) for value in more)]
    ends = torch.cat(parts).cpu().split([*map(len, parts)]) if parts else []
    metrics = {}
    for (task, (_, valid)), row in zip(sums.items(), ends, strict=False):
        ntp, *measured = over_processes(row)
        metrics[task] = {"ntp": ntp.item()}
        if measured:                                # None: no sample of the step was valid, so nothing was measured
            metrics[task] |= {"aia": measured[0].item() if valid else None,
                              "intensity": torch.stack(measured[1:]) if valid else None}
    return (metrics, *(value.item() for value in ends[len(sums):])) if more else metrics


def calibrate(net, schedule, targets, config, autocast, device=None):
    """lambda of each task from batches without updates (aia.weight_for_ratio), unless --aia-weight gives it."""
    fixed = evaluation.fixed_weights(config.aia_weight)
    if fixed:
        return fixed
    n, rows = config.calibration or (10 if config.preset.startswith("tiny") else 100), {task: [] for task in aia.TASKS}
    for step in range(n):
        sums = accumulate(net, schedule.step(step), targets, {}, False, autocast, device)
        for task, row in metrics_of(sums).items():
            rows[task] += [(row["ntp"], row["aia"])] if row["aia"] is not None else []
    for task, share in zip(aia.TASKS, schedule.ratio, strict=True):
        if share and not rows[task]:
            raise InputError(f"lambda of task {task} cannot be calibrated: {n} batches hold no sample of it that AIA "
                             "can use; give a larger --calibration, or numbers with --aia-weight")
    return {task: aia.weight_for_ratio(*np.mean(found, 0).tolist(), config.rho) if found else 0.0
            for task, found in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The run: folder, checkpoints, log
# ---------------------------------------------------------------------------------------------------------------------
class Stop(Exception):
    """A signal came (its number; 0: to another process): the run is saved, go."""


class Run:
    """A training run in its folder."""

    def __init__(self, config, stages):
        self.stages = stages
        self.config, self.started, self.stopping, self.seconds, self.bad = config, time.time(), 0, 0.0, []
        self.folder, self.saving = Path(config.out or f"runs/{config.preset}-seed{config.seed}"), None
        self.held = None                            # batches of --val, made when they are first needed
        self.stager, self.staged = None, None       # memory for copies of a checkpoint, and the names it was made for
        self.device = start_processes(config)
        self.group = dist.new_group(backend="gloo") if processes() > 1 else None        # of saving in the background
        self.state = first_decides(lambda: resumed_from(self.folder, config))
        bf16 = uses_bf16(config, self.device)
        # Sharded weights have a precision of their own.
        self.autocast = (lambda: torch.autocast(torch.device(self.device).type, torch.bfloat16)) if bf16 and not (
            config.pure_bf16 or self.sharded()) else contextlib.nullcontext
        print(f"device {self.device}, {'bfloat16' if bf16 else 'float32'} activations, {torch.get_num_threads()} "
              f"threads, process 1 of {processes()}, torch {torch.__version__}, Python {platform.python_version()}")
        torch.manual_seed(config.seed)
        self.prepare()

    def sharded(self):
        return processes() > 1 and self.config.parallel != "ddp"

    def prepare(self):
        """Data, text tokenizer and model; nothing is written before all of them are good."""
        config = self.config
        kind = model.PRESETS[config.preset].kind
        self.world = None if config.data else world_of(asdict(config))
        self.source = open_sources(config.data, kind, config.on_bad_record) if config.data else \
            data.WorldSource(self.world, config.pool, config.seed)
        self.val = FileSource(config.val, kind, config.on_bad_record) if config.val else self.source
        if self.state and self.state[1]["records"] != self.records():
            raise InputError(f"{self.folder} was started with {self.state[1]['records']} records, now there are "
                             f"{self.records()}: resume with the same data, or choose another --out")
        data.check_tasks(self.source, parse_ratio(config.ratio))
        if config.encoded and not config.init:
            raise InputError("--encoded needs --init: without it the picture tokenizer is yet to be trained")
        self.m = self.open(min(self.state[1]["stage"], len(self.stages) - 1) if self.state else 0, self.state)
        if self.m.config.kind != kind:
            raise InputError(f"--init {config.init} is a model of kind {self.m.config.kind}, but --preset "
                             f"{config.preset} of kind {kind}: choose the preset that fits")
        size = attrgetter("kind", "layers", "width", "ffn")
        like = [name for name, c in model.PRESETS.items() if size(c) == size(self.m.config)]
        if like and config.preset not in like:      # its plan would be another's; sizes that no preset has are free
            raise InputError(f"--init {config.init} has the size of {' or '.join(like)}, not of {config.preset}: give "
                             f"--preset {like[0]}")
        if self.world:
            self.check_pictures()
        if self.world and config.init and not self.state:
            self.check_world()
        branch = model.PRESETS[config.preset].fork_layer
        if branch and self.m.config.fork_layer != branch:
            raise InputError(f"--preset {config.preset} has branches from layer {branch} on, --init from layer "
                             f"{self.m.config.fork_layer} (0: none): add --fork-layer {branch}, or use another --init")
        dtype = torch.bfloat16 if uses_bf16(config, self.device) else torch.float32
        print(f"attention: {model.attention_kernel(self.m, self.device, dtype)}")
        self.targets = {task: aia.targets(self.m.config.layers, task, config.aia_targets, config.aia_variant)
                        for task in aia.TASKS}
        self.targets = {task: tuple(x.to(self.device) for x in pair) for task, pair in self.targets.items()}
        self.encoded = Encoded(config.encoded, self.m) if config.encoded else None
        first_decides(self.begin_folder)
        if not find_tokenizer(self.folder):
            raise InputError(f"{self.folder} has lost its tokenizer: put {' or '.join(TOKENIZERS)} back")
        self.text = Text(find_tokenizer(self.folder), kind)
        if self.text.ids != self.m.ids:
            raise InputError(f"{self.text.file} has other special ids than the model: it belongs to another preset")
        self.preparer = data.Preparer(self.m, self.text, encoded=self.encoded)
        print("settings " + json.dumps(asdict(config)))

    def check_pictures(self):
        """Refuse a world whose pictures have another size than those that the model draws: they could not be read."""
        size, side = self.m.config.image_size, self.world.side
        if size != side:
            fitting = [cell for cell in CELL_SIDES if GRID * cell == size]
            remedy = f"--cell {fitting[0]}" if fitting else "--data with pictures of your own"
            raise InputError(f"the model draws pictures of {size} x {size} pixels, those of the built-in world have "
                             f"{side} x {side}: give {remedy}")

    def check_world(self):
        """Refuse weights that have met what this run would hold out."""
        file = self.m.tokenizer_file.with_name("settings.json")
        made = asdict(TrainConfig()) | read_json(file) if file.exists() else {}
        if not made or made["data"]:                # public weights, or own pictures: nothing is known
            return
        for name in WORLD:
            if made[name] != getattr(self.config, name):
                raise InputError(f"--init {self.config.init} learned the world of --{name} {made[name]} and has met "
                                 f"what that of {getattr(self.config, name)} holds out: give --{name} {made[name]}")

    def open(self, index, saved=None):
        """The model of a stage: from a checkpoint (folder, manifest) of this run, from --init, or fresh."""
        config, stage = self.config, self.stages[index]

        def shard(m):
            freeze(m, stage)                        # what needs gradients is fixed at the first step of sharded weights
            shard_model(m, config, {"vq", *stage.frozen}, self.device)
        # What LoRA leaves alone is held as it is computed with. Sharding allows it: of one type must be only those
        # parameters of a layer that move.
        half = config.pure_bf16 or config.lora_rank and uses_bf16(config, self.device)
        shard, dtype = shard if self.sharded() else None, torch.bfloat16 if half else torch.float32
        device = "cpu" if config.offload and shard else self.device
        if saved:
            m = from_manifest(saved[1], saved[0], device, config.attention, shard, dtype)
        elif config.init:
            m = formats.weights.load(
                config.init, dtype, device, config.vision_tokenizer, attention=config.attention, shard=shard,
                lora_rank=config.lora_rank, fork_layer=config.fork_layer)
            if not m.tokenizer_file:
                raise InputError(f"--init {config.init} holds no tokenizer: put {' or '.join(TOKENIZERS)} there")
        else:
            m = model.build(config.preset, attention=config.attention).to(device)
            for name, child in m.named_children():
                child.to(torch.float32 if name == "vq" else dtype)
            if shard:
                shard(m)
        for name in {"vq", *stage.frozen} & {name for name, _ in m.named_children()}:
            getattr(m, name).to(self.device)
        m.lm.rope_bf16, m.lm.checkpoint_activations = config.rope_bf16, config.checkpoint_activations
        model.settle_attention(m, self.device, torch.bfloat16 if uses_bf16(config, self.device) else torch.float32)
        if config.compile:
            for layer in m.lm.all_layers():
                layer.compile()
        return m

    def begin_folder(self):
        """The run folder with a tokenizer, that of --init or a new one, and the settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be made ({error.strerror}): choose another") from error
        write_json(asdict(self.config), self.folder / "settings.json")
        if not self.state:                          # whatever a job that was killed early has left
            for name in ("before", "control"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            if self.config.init:
                store_tokenizer(Text(self.m.tokenizer_file, self.m.config.kind), self.folder)
            else:
                world = world_of(asdict(self.config) | {"seed": 0})              # the same words for every seed
                data.train_tokenizer(self.folder / "tokenizer.json", self.m.config, world)

    def save(self, stage, step, optimizer, weights):
        """Everything that --resume needs, in the background. The order of data follows from the seed and the step."""
        self.write(f"checkpoints/{stage}-{step:07d}", optimizer, self.config.keep,
                   {"settings": asdict(self.config), "stage": stage, "step": step, "weights": weights,
                    "optimizer": optimizer is not None, "seconds": self.elapsed(), "records": self.records()})

    def records(self):
        return {task: self.source.count(task) for task in aia.TASKS}

    def write(self, name, optimizer=None, keep=0, more=None):
        """Begin to write a checkpoint folder, of the model alone unless told otherwise."""
        self.written()
        tensors = tensors_of(self.m, optimizer)
        # Pinned memory is copied into at the full speed of the bus, but slow to get: it stays for checkpoints of the
        # same tensors.
        if self.device.startswith("cuda") and self.staged != set(tensors):
            self.stager, self.staged = BlockingAsyncStager(cache_staged_state_dict=True), set(tensors)
        manifest = {"config": asdict(self.m.config), "dtype": str(tensors["model.lm.norm.weight"].dtype).split(".")[1]}
        self.saving = save_checkpoint(tensors, manifest | (more or {}), self.folder / name, keep, self.group,
                                      self.stager)

    def written(self):
        """Wait for the checkpoint that is being written, and tell what went wrong with it, all processes alike."""
        if self.sharded():
            self.wait()
        else:                                       # only the first one writes
            first_decides(self.wait)

    def wait(self):
        """Wait for what this process writes."""
        try:
            if self.saving:
                self.saving.result()
        except (CheckpointException, OSError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise InputError(f"a checkpoint in {self.folder} could not be written ({first_line(cause)}): make "
                             "room, then go on with --resume; earlier checkpoints are untouched") from error
        finally:
            self.saving = None

    def elapsed(self):
        return self.seconds + time.time() - self.started

    def log(self, entry):
        if rank():
            return
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"{self.folder / 'metrics.jsonl'} could not be written ({error.strerror}): make room, "
                             "then go on with --resume; checkpoints are untouched") from error


def uses_bf16(config, device):
    return config.pure_bf16 or config.dtype == "bfloat16" or (
        config.dtype == "auto" and device.startswith("cuda") and torch.cuda.is_bf16_supported())


def resumed_from(folder, config):
    """(folder, manifest) of the newest whole checkpoint with --resume, None where a run begins. What is damaged is put
    aside, as its name is needed again."""
    used = folder.exists() and (not folder.is_dir() or any(file.suffix != ".part" for file in folder.iterdir()))
    if used and not (config.resume and (folder / "settings.json").exists()):
        remedy = "is no run folder:" if config.resume else "is not empty: continue it with --resume, or"
        raise InputError(f"{folder} {remedy} choose another --out")
    if not checkpoint_folders(folder):
        if config.resume:
            if used:
                check_settings(read_json(folder / "settings.json"), config, folder)
            print(f"{folder} holds no checkpoint yet: beginning")
        return None
    newest, manifest = newest_checkpoint(folder)
    check_settings(manifest["settings"], config, folder)
    for newer in checkpoint_folders(folder):
        if newer.name > newest.name:
            shutil.rmtree(f"{newer}.damaged", ignore_errors=True)
            os.replace(newer, f"{newer}.damaged")
    return newest, manifest


GONE = {"dry_run_world": 0, "tokens": 0, "tflops": 989.0, "utilisation": 0.4}       # settings of older runs


def check_settings(stored, config, folder):
    """A resumed run keeps its settings; only where it runs and how often it reports may change."""
    plain, given = (json.loads(json.dumps(asdict(one))) for one in (TrainConfig(), config))     # tuples become lists
    # a run of before a setting was there had its default
    stored = plain | {name: value for name, value in stored.items() if GONE.get(name, ...) != value}
    free = {"resume", "device", "out", "log_every", "save_every", "micro_batch", "eval_n", "attention",
            "checkpoint_activations", "compile", "encoded", "parallel", "shard", "whole_gradients", "offload", "keep",
            "val_every", "on_bad_record"}
    for name in stored:
        if name not in free and stored[name] != given.get(name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{folder} was started with {flag} {stored[name]}, not {given.get(name)}: "
                             "resume with the same settings, or choose another folder")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------
def train(config, stages=None):
    """All stages, those of the plan unless given, then the evaluation -> the result that is printed as the last line;
    None but on the first process."""
    check_numbers(config)
    stages = stages or plan(config)
    run = Run(config, stages)
    begin, state = (run.state[1]["stage"], run.state[1]) if run.state else (0, None)
    if state:
        run.seconds = state["seconds"]
    first_decides(lambda: trim_log(run.folder / "metrics.jsonl", begin, state["step"] if state else 0))
    with interruptible(run):
        for index in range(begin, len(run.stages)):
            run_stage(run, index, state)
            state = None
        run.written()
        if over_processes(torch.tensor(run.stopping)):
            raise Stop(run.stopping)
    return finish(run)


def equip(run, stage, state):
    """What a stage needs: its optimizer, the schedule of its batches (None for the picture tokenizer), lambda of each
    task, and the model as several processes call it. state: of the checkpoint within the stage that it goes on from."""
    config, optimizer, schedule = run.config, make_optimizer(run.m, stage), None
    if stage.name == "align" and not state:         # drawing begins: its branch is a copy of what has learned to read
        model.fork(run.m)
    weights, net = dict.fromkeys(aia.TASKS, 0.0), run.m
    if stage.name != "tokenizer":
        # Three orders for each seed: "both" arms meet the same samples; what comes before has others.
        order = 3 * config.seed + {"read": 2, "align": 2, "joint": 1}.get(stage.name, 0)
        schedule, both = (data.Schedule(run.source, run.preparer, order, stage.batch_size,
                                        parse_ratio(stage.ratio or config.ratio), config.micro_batch,
                                        on_bad_record=config.on_bad_record, rank=rank(), world=processes(), mix=mix)
                          for mix in (config.mix, "both"))
        if processes() > 1 and not run.sharded():
            net = replicated(run.m)
    if state:
        saved, weights = run.state[0], state["weights"]
        read_tensors(tensors_of(run.m, optimizer, tensor_names(saved)), saved)
    elif stage.aia:
        weights = calibrate(net, both, run.targets, config, run.autocast, run.device)
        print(f"lambda: generation {weights['gen']:.3g}, understanding {weights['und']:.3g} "
              f"({'calibrated for rho ' + str(config.rho) if config.aia_weight == 'rho' else config.aia_weight})")
    return optimizer, schedule, weights, net


def run_stage(run, index, state):
    """One stage from its first step, or from a checkpoint's."""
    stage, config, first = run.stages[index], run.config, state["step"] if state else 0
    resumed = bool(state and state["optimizer"])
    if run.sharded() and not state and index:
        run.written()
        run.m = run.open(index, first_decides(lambda: newest_checkpoint(run.folder)))
        run.preparer = data.Preparer(run.m, run.text, encoded=run.encoded)
    if stage.name in ("control", "tune") and not resumed:
        if first_decides((run.folder / "before").exists):           # what stage 3 starts from, with or without AIA
            first_decides(lambda: read_manifest(run.folder / "before"))
            read_tensors(tensors_of(run.m), run.folder / "before")
        else:
            run.write("before")
    optimizer, schedule, weights, net = equip(run, stage, state if resumed else None)
    print(f"{stage.name}, part {index + 1} of {len(run.stages)}: {stage.steps} steps of {stage.batch_size}, "
          f"{sum(p.numel() for p in run.m.parameters() if p.requires_grad):,} of "
          f"{sum(p.numel() for p in run.m.parameters()):,} parameters move")
    run.m.train()
    bar = tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step", disable=True if rank() else None)
    if schedule and config.val and not run.held:    # a bad record is told now, not after hours
        run.held = held_batches(run)
    since, waited, coming = (time.time(), first), 0.0, schedule and schedule.steps(first, stage.steps)
    spent = torch.zeros(2, dtype=torch.long)        # tokens, and positions with padding, since the last report
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        if schedule:
            start = time.time()
            batches = next(coming)
            waited += time.time() - start
            spent += sum(torch.tensor([sum(batch.lengths), batch.tokens.numel()]) for batch in batches)
            sums = accumulate(net, batches, run.targets, weights, autocast=run.autocast, device=run.device)
        else:                                       # too small to share: every process does the same
            batches, metrics = [], tokenizer_step(run.m, pictures_of(run), step, stage, config.seed)
        norm = torch.nn.utils.clip_grad_norm_([p for p in run.m.parameters() if p.grad is not None], config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if schedule:
            metrics, norm = metrics_of(sums, norm)
        check_finite(norm, metrics, stage, step, batches, run)
        if schedule and step == 0:
            print("first loss " + ", ".join(f"{task} {row['ntp']:.2f} (knowing nothing: {ignorance(run.m, task):.2f})"
                                            for task, row in metrics.items()))
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if (step + 1) % config.log_every == 0 or step + 1 == stage.steps:
            since = report_step(run, index, step, since, metrics, weights, float(norm), spent, bar, waited)
            waited, spent = 0.0, torch.zeros_like(spent)
        if schedule and config.val and (step + 1) % config.val_every == 0:
            start = time.time()
            held_out(run, net, index, step, bar)
            since = since[0] + time.time() - start, since[1]                    # no part of the rates
        stopping = bool(over_processes(torch.tensor(run.stopping)))
        if stopping or ((step + 1) % config.save_every == 0 and step + 1 < stage.steps):
            run.save(index, step + 1, optimizer, weights)
        if stopping:
            run.written()
            bar.close()
            raise Stop(run.stopping)
    bar.close()
    run.m.eval()
    if stage.name == "control":
        run.write("control")
    run.save(index + 1, 0, None, weights)
    run.bad += [text for text in (schedule.bad if schedule else []) if text not in run.bad]


def pictures_of(run):
    """Pictures for stage 1: the world's, or a user's own, brought to the size of drawn ones."""
    if run.world:
        return run.source.crowded
    if not hasattr(run, "own_pictures"):
        config, found = run.m.config, {}
        for record in (record for task in aia.TASKS for record in every(run.source, task)):
            try:
                for picture in record.pictures:
                    if picture not in found:
                        drawn = janus_drawing(load_picture(picture, config.kind), config)
                        found[picture] = to_picture(drawn)
            except InputError as error:
                note_bad(f"{record.origin}: {error}", run.bad, run.config.on_bad_record == "stop")
        run.own_pictures = list(found.values())
    return run.own_pictures


def check_finite(norm, metrics, stage, step, batches, run):
    """Stop before a broken number reaches the weights; say where it came from."""
    losses = [row[name] for row in metrics.values() for name in ("ntp", "aia", "l1") if row.get(name) is not None]
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        return
    origins = [origin for batch in batches for origin in batch.origins]
    if processes() > 1:
        found = [None] * processes()
        dist.all_gather_object(found, origins)
        origins = sum(found, [])
    shown = ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
    run.written()                                   # the last good one may be on its way to the disk
    saved = checkpoint_folders(run.folder)
    good = f"last good checkpoint {saved[-1]}" if saved else "no checkpoint yet"
    raise InputError(f"stage {stage.name}, step {step + 1}: loss or gradient is not finite (norm {float(norm)}); "
                     f"records: {shown or 'tokenizer pictures'}; {good}; try a lower --lr or remove the records")


def ignorance(m, task):
    """Loss of a model that finds every word, or code, equally likely."""
    last = m.head(task)
    return math.log((last[-1] if isinstance(last, torch.nn.Sequential) else last).out_features)


def held_batches(run):
    """Up to 64 records of --val, always the same."""
    ratio = [min(run.val.count(task), 32) for task in aia.TASKS]
    schedule = data.Schedule(run.val, run.preparer, 0, sum(ratio), ratio, run.config.micro_batch, 0.0,
                             run.config.on_bad_record, rank(), processes())
    batches = schedule.step(0)
    run.bad += schedule.bad
    return batches


def held_out(run, net, index, step, bar):
    """Losses on the records of held_batches; in the log under "val"."""
    metrics = metrics_of(accumulate(net, run.held, run.targets, {}, False, run.autocast, run.device))
    rows = {task: {key: row[key] for key in ("ntp", "aia")} for task, row in metrics.items()}
    run.log({"stage": index, "name": run.stages[index].name, "step": step + 1, "val": rows})
    bar.write(f"held out, step {step + 1} | " + " | ".join(map(brief, rows, rows.values())), file=sys.stdout)


def brief(task, row):
    """Losses of one task for the terminal."""
    return f"{task} {row['ntp']:.3f} aia " + ("-" if row["aia"] is None else f"{row['aia']:.4f}")


def report_step(run, index, step, since, metrics, weights, norm, spent, bar, waited):
    """One line on the terminal, one object in metrics.jsonl."""
    stage, now = run.stages[index], time.time()
    rate = (now - since[0]) / (step + 1 - since[1])                             # seconds per step
    lr, memory = learning_rate(step, stage), memory_gb()
    entry = {"stage": index, "name": stage.name, "step": step + 1, "lr": lr, "grad_norm": norm, "memory_gb": memory,
             "seconds": run.elapsed(), "samples_per_second": stage.batch_size / rate}
    parts = []
    for task, row in metrics.items():
        row = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        if task in aia.TASKS:
            weighted = weights[task] * (row["aia"] or 0.0)
            entry[task] = row | {"lambda": weights[task], "ratio": row["ntp"] / weighted if weighted else None}
            parts.append(brief(task, row))
        else:
            entry[task] = row
            parts.append(f"l1 {row['l1']:.4f} codes {row['codes']}")
    tokens, everywhere = over_processes(spent).tolist()
    if everywhere:
        entry |= {"tokens_per_second": tokens / (now - since[0]), "padding": 1 - tokens / everywhere,
                  "waiting": waited / (now - since[0])}
    left = rate * (stage.steps - step - 1)
    bar.write(f"step {step + 1:5d}/{stage.steps} | {' | '.join(parts)} | lr {lr:.1e} | grad {norm:.2f} | "
              f"{stage.batch_size / rate:.0f} img/s | {memory:.1f} GB | eta {left:.0f} s", file=sys.stdout)
    sys.stdout.flush()
    run.log(entry)
    return now, step + 1


def trim_log(path, stage, step):
    """Forget reports of steps that a resumed run takes again."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if (e := whole(line)) and (e["stage"], e["step"]) <= (stage, step)]
        aside = path.with_name("metrics.part")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, path)


@contextlib.contextmanager
def interruptible(run):
    """Ctrl-C, SIGTERM and SLURM's USR1 finish the step, save, and say how to go on; Ctrl-C pressed twice stops at once
    (but not under torchrun, which repeats it)."""
    def stop(number, frame):
        run.stopping = number
        if number == signal.SIGINT and processes() == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]        # Windows has no USR1
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run
# ---------------------------------------------------------------------------------------------------------------------
def finish(run):
    """Scores, curves and samples of the final weights, in the run folder -> the result. Only the first process does it,
    the others end."""
    if processes() > 1:
        found = [None] * processes()
        dist.all_gather_object(found, run.bad)
        run.bad = list(dict.fromkeys(sum(found, [])))
        if rank():
            return None
    m, run.m, run.preparer, run.stager = None if run.sharded() else run.m, None, None, None
    if run.sharded():                               # the whole of it, in the type of activations, in place of a part
        dtype = torch.bfloat16 if uses_bf16(run.config, run.device) else None
        m = formats.weights.load(run.folder, dtype, run.device, rope_bf16=run.config.rope_bf16)
    skipped = run.bad if run.config.on_bad_record == "skip" else None
    cpu_targets = {task: tuple(x.cpu() for x in pair) for task, pair in run.targets.items()}
    samples = evaluation.HeldOut(run.world, run.config.seed) if run.world else evaluation.FileBatches(run.val, skipped)
    curves = evaluation.curves(arms(run, m), data.Preparer(m, run.text), samples, cpu_targets, run=asdict(run.config))
    evaluation.plot_curves(curves, run.folder / "curves.png")
    write_json(curves, run.folder / "curves.json")
    evaluation.print_curves(curves)
    last = {task: curves[task]["after"] for task in aia.TASKS}
    result = {"und": None, "gen": None, "reader": None, "psnr": None}
    if run.world:
        scores = {name: score_arm(run, name, m) for name, m in arms(run, m)}
        scores |= scores.pop("after") | evaluation.score_tokenizer(m, run.world, 4 * run.config.eval_n, run.config.seed)
        result |= {key: scores[key] for key in ("und", "gen", "reader", "psnr")}
        write_json(scores, run.folder / "scores.json")
    result |= {f"val_ntp_{task}": last[task] and last[task]["ntp"] for task in aia.TASKS}
    result |= {f"aia_{task}": last[task] and last[task]["aia"] for task in aia.TASKS}
    bad = run.bad + run.source.bad + (run.val.bad if run.val is not run.source else [])
    if bad:
        print(bad_report(bad, run.source.paths + run.val.paths))
    print(f"run folder {run.folder}: checkpoints, metrics.jsonl, curves.png" + (", samples.png, scores.json" * bool(
        run.world)))
    result |= {"preset": run.config.preset, "seed": run.config.seed, "seconds": round(run.elapsed(), 1),
               "rss_gb": round(memory_gb(), 3)}
    write_json(result | {"machine": machine() | {"device": run.device}}, run.folder / "result.json")
    return result


def arms(run, m):
    """(name, m) for the weights before stage 3, those without AIA, and the final ones, in turn in the same model: two
    may not fit where one was trained."""
    for name in ("before", "control"):
        if (run.folder / name).exists():
            read_manifest(run.folder / name)        # refuses damaged files
            read_tensors(tensors_of(m), run.folder / name)
            yield name, m
    read_tensors(tensors_of(m), newest_checkpoint(run.folder)[0])
    yield "after", m


def score_arm(run, name, m):
    """Held-out scores of one arm; draws samples.png of the final weights."""
    config = run.config
    understood = evaluation.score_understanding(m, run.text, run.world, config.eval_n, config.seed)
    drawn, samples = evaluation.score_generation(m, run.text, run.world, config.eval_n, config.seed)
    plain = name == "after" and not evaluation.has_aia(asdict(config))
    print("-- " + (evaluation.WITHOUT if plain else evaluation.LABEL[name]))
    evaluation.print_scores(understood | drawn)
    if name == "after":
        evaluation.plot_samples(samples, run.world.skills, run.folder / "samples.png")
    return understood | drawn


def settings_from(argv, cls=TrainConfig, prog="train.py", more=()):
    """Flags over the defaults of the preset and the recipe that they name, over `more`."""
    config = parse(cls, argv, prog)
    recipe = RECIPES[config.recipe][1] if config.recipe else {}
    return parse(cls, argv, prog, SETTINGS_OF.get(config.preset, {}) | dict(more) | recipe)


def stoppable(work, again):
    """work(), or when it was stopped, one line that says how to go on, and the exit status of a signal."""
    try:
        return work()
    except Stop as stop:
        print(f"stopped and saved; {again}")
        sys.exit(130 if stop.args[0] == signal.SIGINT else 0)
    except KeyboardInterrupt:
        print(f"stopped at once; {again}, from the last checkpoint if one was saved")
        sys.exit(130)
    finally:
        if dist.is_initialized():                   # its threads, left alone, may abort a process that ends
            dist.destroy_process_group()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    moved(argv, "train.py", {"study": "python -m lab.study"})
    if any(word.split("=")[0] == "--dry-run-world" for word in argv):
        raise InputError("train.py --dry-run-world N is now python -m lab.dry_run --world N")
    config = settings_from(argv)
    tell(stoppable(lambda: train(config), "go on with the same command and --resume"))


if __name__ == "__main__":
    run_command(main)
