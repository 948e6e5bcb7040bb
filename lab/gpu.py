"""This code on one GPU: kernels, steps, memory, drawing and saving, in about ten minutes.

Every row is written as soon as it is measured, so a run that is cut short goes on where it was: complete parts are left
out unless you name them. The part `predicted` needs no GPU: it compares the memory of each step with the dry run's.

    python -m lab.gpu                             # all parts that assets/gpu.json does not hold yet
    python -m lab.gpu attention small             # these again
    python -m lab.gpu --tiny --out tiny.json      # the same on tiny models, anywhere
"""

import contextlib
import gc
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.nn.attention import SDPBackend, sdpa_kernel

import aia
import model
import parts.decoding
import train
from formats.checkpoints import read_tensors, save_checkpoint, tensors_of
from formats.weights import public_files
from lab.dry_run import DryRun, made_batch, rehearse
from lab.speed import released_loss, step_flops
from parts.kernels import kernel_for, try_lse
from parts.settings import (
    InputError,
    check_out,
    device_of,
    first_line,
    machine,
    opt,
    parse,
    read_json,
    run_command,
    tell,
    write_json,
)
from parts.vision import JanusVQ, flatten

# Legend: B samples, H heads, G key/value heads, T tokens, D head size. Times in seconds or ms, memory in 1e9 bytes.


@dataclass(frozen=True)
class Gpu:
    """Measure this code on one GPU, part by part."""

    POSITIONAL = ("parts",)
    parts: tuple = opt((), "parts to measure, again if need be; none: those that --out does not hold yet")
    out: str = opt("assets/gpu.json", "JSON file of all rows")
    tiny: bool = opt(False, "tiny models and few tokens: to try the command itself")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1")
    seconds: float = opt(560.0, "start nothing more after this time")


class Meter:
    """What all parts share: the device, sizes with and without --tiny, clocks, and memory of the device."""

    def __init__(self, settings):
        self.tiny = settings.tiny
        self.device = device_of(settings.device)
        self.cuda = self.device.startswith("cuda")
        self.end = time.monotonic() + settings.seconds

    def size(self, full, tiny):
        return tiny if self.tiny else full

    def left(self):
        """Seconds until nothing more is started."""
        return self.end - time.monotonic()

    def wait(self):
        """Until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work, repeats=5, warm=2):
        """Median seconds of work()."""
        for _ in range(warm):
            work()
        taken = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def clean(self):
        """Free what nobody uses, and start a new peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def held(self):
        """GB of the device now; 0 without CUDA."""
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else 0.0

    def peak(self):
        """Most GB of the device since `clean`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0


def off(got, expected):
    """Relative distance of two tensors."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


# ---------------------------------------------------------------------------------------------------------------------
# The machine, and whether numbers are right on it
# ---------------------------------------------------------------------------------------------------------------------
def about_machine(bench):
    """Its name, the speed of matrix products and copies, and the kernels that attention runs on."""
    if bench.cuda:
        about = torch.cuda.get_device_properties(0)
        yield {"name": about.name, "gb": about.total_memory / 1e9, "capability": f"{about.major}.{about.minor}",
               "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    n = bench.size(8192, 256)
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    yield {"bfloat16_tflops": 2 * n**3 / bench.seconds(lambda: a @ b, 10) / 1e12}
    yield {"copy_tb_per_second": copy_rate(bench) / 1e12}
    for preset in ("janus-pro-1b", "emu3-8b"):
        c = model.PRESETS[preset]
        for dtype in (torch.float32, torch.bfloat16):
            found, faults = try_lse(bench.device, dtype, c.heads, c.kv_heads, c.head_dim)
            for attention in ("fused", "lse"):
                m = small_model(c, attention)
                yield {"preset": preset, "dtype": str(dtype), "attention": attention, "log_sum_exp": found,
                       "faults": faults, "kernels": model.attention_kernel(m, bench.device, dtype)}


def copy_rate(bench):
    """Bytes that the device reads and writes in a second when it copies."""
    a = torch.empty(bench.size(2**28, 2**18), device=bench.device)
    return 2 * a.nbytes / bench.seconds(a.clone)


def small_model(c, attention):
    """A model of one layer without memory: all that model.attention_kernel needs."""
    with torch.device("meta"):
        return model.MODELS[c.kind](replace(c, layers=1, attention=attention))


def parity(bench):
    """All bodies of attention against the softmax written out in float64; picture codes of this device and the CPU."""
    t = bench.size(700, 64)
    condition = (torch.arange(t) < t // 3).expand(2, -1).to(bench.device)       # (B, T)
    rectangle = t // 3, t, 0, t // 3
    names = ("out", "mass", "dq", "dk", "dv")
    for dtype, d in ((torch.float32, 64), (torch.float32, 128), (torch.bfloat16, 128)):
        try_lse(bench.device, dtype, 8, 2, d)
        g = torch.Generator().manual_seed(0)
        drawn = [torch.randn(2, h, t, d, generator=g).to(dtype).to(bench.device) for h in (8, 2, 2)]
        exact = outcome(model.attend_explicit, [x.double() for x in drawn], condition, rectangle)
        for name in ("explicit", "fused", "lse"):
            got = outcome(model.ATTENTION[name], drawn, condition, rectangle)
            errors = {part: off(a, b) for part, a, b in zip(names, got, exact, strict=True)}
            yield {"attention": name, "dtype": str(dtype), "head": d, "log_sum_exp": lse_kernel(drawn[0])} | errors
    yield from codes(bench)


def lse_kernel(q):
    """Name of the kernel that `lse` takes for q; None if it falls back to the flag channel."""
    found = kernel_for(q)
    return found and found.name


def outcome(attend, inputs, condition, rectangle):
    """Out, mass of the queries, and gradients of a function of both."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, mass = attend(*inputs, None, condition, rectangle)
    mass = mass * ~condition[:, None]
    (out.double().square().sum() + 30 * mass.double().sum()).backward()
    return [out.detach(), mass.detach(), *(x.grad for x in inputs)]


def codes(bench):
    """Share of picture codes that differ from the CPU's, as models run and with cuDNN's own rounding (TF32)."""
    torch.manual_seed(0)
    here = JanusVQ(model.PRESETS[bench.size("janus-pro-1b", "tiny-janus")]).eval()
    for p in here.parameters():
        if p.ndim == 4 and not p.any():             # branches that add nothing at first
            torch.nn.init.kaiming_uniform_(p, a=5**0.5)
    pixels = torch.rand(2, 3, *(bench.size(384, 16),) * 2) * 2 - 1
    with torch.no_grad():
        flat = flatten(here.latents(pixels))
        some = flat[torch.randint(len(flat), (len(here.quantize.weight),))]
        here.quantize.weight.copy_(some + 0.1 * torch.randn_like(some) / some.shape[1] ** 0.5)
        expected, z = here.encode(pixels), here.latents(pixels)
        there = here.to(bench.device)
        seen = pixels.to(bench.device)
        for tf32 in (False, True):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                yield {"picture tokenizer": "tf32" if tf32 else "exact", "latents": off(there.latents(seen).cpu(), z),
                       "codes_changed": (there.encode(seen).cpu() != expected).float().mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Attention alone
# ---------------------------------------------------------------------------------------------------------------------
def attention(bench):
    """Forward, and forward with backward, of a plain pass on each kernel, and of passes that also return the mass."""
    shapes = bench.size([(8, 32, 32, 640, 576, 50), (2, 32, 32, 3000, 2400, 576), (1, 32, 8, 8282, 8100, 120),
                         (1, 32, 8, 8281, 8100, 120)], [(2, 4, 2, 65, 20, 12)])
    d = bench.size(128, 16)
    ways = {"plain": ("fused", None), "plain, flash": ("fused", [SDPBackend.FLASH_ATTENTION]),
            "plain, cudnn": ("fused", [SDPBackend.CUDNN_ATTENTION]), "flag channel": ("fused", None),
            "log-sum-exp": ("lse", None)}
    for b, h, g, t, rows, keys in shapes:
        try_lse(bench.device, torch.bfloat16, h, g, d)
        position = torch.arange(t, device=bench.device).expand(b, -1)           # (B, T)
        condition = position < keys
        rectangle = t - rows, t, 0, keys
        for name, (body, only) in ways.items():
            if only and not bench.cuda:
                continue
            asked = None if name.startswith("plain") else condition
            inputs = [torch.randn(b, t, n, d, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
                      .requires_grad_() for n in (h, g, g)]
            row = {"way": name, "B": b, "H": h, "G": g, "T": t, "rows": rows, "keys": keys,
                   "log_sum_exp": lse_kernel(inputs[0])}
            with sdpa_kernel(only) if only else contextlib.nullcontext():
                yield row | tried(bench, attention_times, body, inputs, asked, rectangle)


def attention_times(bench, body, inputs, condition, rectangle):
    """Milliseconds of forward, of forward and backward, and of the first of the latter."""
    def forward():
        return model.ATTENTION[body](*inputs, None, condition, rectangle)

    def both():
        out, mass = forward()
        loss = (out.float() * 1e-3).sum() + (0.0 if mass is None else (mass * 1e-3).sum())
        torch.autograd.grad(loss, inputs)
    start = time.perf_counter()
    both()
    bench.wait()
    first = time.perf_counter() - start
    return {"forward_ms": 1e3 * bench.seconds(forward), "both_ms": 1e3 * bench.seconds(both), "first_ms": 1e3 * first}


NO_TIME = "no time left"


def tried(bench, work, *args):
    """The figures that work(bench, ...) returns, or why there are none: a failure is a row, not the end of a part."""
    if bench.left() < 0:
        return {"failed": NO_TIME}
    try:
        return work(bench, *args)
    except (RuntimeError, InputError) as error:
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


# ---------------------------------------------------------------------------------------------------------------------
# Steps of training
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One way to take a step, on `samples` of `tokens` each, all labelled."""

    variant: str                                    # plain; aia (flag channel); lse; released: the authors' recipe
    samples: int
    tokens: int
    task: str
    recompute: bool = False
    compiled: bool = False

    def batch(self, c):
        """Its samples, for a model of Config c."""
        return made_batch(c, self.task, self.samples, self.tokens, prompt=min(120, self.tokens // 3))


def filled(preset, device, dtype, lora_rank=0):
    """A model of a preset with random weights, made on the device, which saves minutes with large ones."""
    c = replace(model.PRESETS[preset], lora_rank=lora_rank)
    with torch.device("meta"):
        m = model.MODELS[c.kind](c)
    for name, parameter in m.named_parameters():
        parameter.data = parameter.data.to(model.held_type(name, dtype))
    m.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in m.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.fill_(1.0)
            elif name.endswith(("bias", "lora_b")):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02)
        for name, value in m.named_buffers():
            value.fill_(1 if "var" in name else 0)
    return m


def steps(bench, preset, manner, cases, lora_rank=0):
    """Seconds and memory of a step for each case, with one model; compiled cases last, as layers cannot be uncompiled.
    manner: "pure" is bfloat16 throughout, "lora" a frozen base in bfloat16, "autocast" float32 weights."""
    dtype = torch.float32 if manner == "autocast" else torch.bfloat16
    m = filled(preset, bench.device, dtype, lora_rank).train()
    c = m.config
    optimizer = train.make_optimizer(m, train.LARGE[0])
    targets = {task: targets_of(bench, c, task) for task in aia.TASKS}
    try_lse(bench.device, torch.bfloat16, c.heads, c.kv_heads, c.head_dim)

    def autocast():
        return torch.autocast(bench.device.split(":")[0], torch.bfloat16, enabled=manner == "autocast")
    for case in sorted(cases, key=attrgetter("compiled")):
        row = {"preset": preset, "manner": manner, "lora_rank": lora_rank, **vars(case)}
        yield row | tried(bench, step_cost, m, optimizer, targets, autocast, case)
        optimizer.zero_grad()


def targets_of(bench, c, task):
    """(target, delta) of a task, on the device."""
    target, delta = aia.targets(c.layers, task)
    return target.to(bench.device), delta.to(bench.device)


def step_cost(bench, m, optimizer, targets, autocast, case):
    """Seconds of a step and of the first one, GB before it and at its peak, and the share of an H100's peak FLOP/s."""
    for layer in m.lm.layers:
        layer.self_attn.attend = model.attend_lse if case.variant == "lse" else model.attend_fused
        if case.compiled:
            layer.compile()
    m.lm.config = replace(m.lm.config, checkpoint_activations=case.recompute)
    batch = case.batch(m.config)
    lambdas = None if case.variant == "plain" else {case.task: 5.0}

    def step():
        if case.variant == "released":
            with autocast():
                loss = released_loss(m, batch.to(bench.device), *targets[case.task], weight=5.0)
            loss.backward()
        else:
            sums = train.accumulate(m, [batch], targets, lambdas, autocast=autocast, device=bench.device)
        with train.updating(m, optimizer, 1.0) as norm:
            if case.variant == "released":
                norm.item()
            else:
                train.metrics_of(sums, norm)
    start = time.perf_counter()
    step()
    bench.wait()
    first = time.perf_counter() - start
    bench.clean()
    held = bench.held()
    seconds = bench.seconds(step, 3, 1)
    flop = step_flops(m.config, case.tokens) * case.samples
    return {"seconds": seconds, "first_seconds": first, "tokens_per_second": case.samples * case.tokens / seconds,
            "share_of_989_tflops": flop / seconds / 989e12, "held_gb": held, "peak_gb": bench.peak()}


def small(bench):
    """Janus-Pro-1B: what AIA costs at three lengths, both ways, and against the released recipe."""
    preset = bench.size("janus-pro-1b", "tiny-janus")
    draw, u = bench.size(640, 80), bench.size(1000, 30)
    ways = ("plain", "aia", "lse")
    yield from steps(bench, preset, "pure", [
        *(Case(way, 8, draw, "gen") for way in ways), *(Case(way, 4, u, "und") for way in ways),
        *(Case(way, 4, 3 * u, "und") for way in ways), Case("aia", 4, 3 * u, "und", recompute=True),
        *(Case(way, 4, 3 * u, "und", compiled=True) for way in bench.size(ways, ("aia",))),
        Case("released", 4, u, "und"),
        Case("released", 1, 3 * u, "und"), Case("aia", 1, 3 * u, "und"), Case("lse", 1, 3 * u, "und")])
    bench.clean()
    yield from steps(bench, preset, "autocast", [Case(way, 4, 3 * u, "und") for way in ways])


def large(bench):
    """Emu3-8B with LoRA at its own length, and Janus-Pro-7B in bfloat16, layers recomputed."""
    ways = ("plain", "aia", "lse")
    yield from steps(bench, bench.size("emu3-8b", "tiny-emu3"), "lora", [
        Case(way, 1, bench.size(8282, 90), "gen", recompute=True) for way in ways], lora_rank=16)
    bench.clean()
    preset = bench.size("janus-pro-7b", "tiny-janus")
    yield from steps(bench, preset, "pure", [
        *(Case(way, 4, bench.size(640, 80), "gen", recompute=True) for way in ways),
        *(Case(way, 1, bench.size(3000, 90), "und", recompute=True) for way in ways)])


def predicted(bench, rows):
    """The memory of each measured step with AIA beside the dry run's prediction for one process."""
    same = ("preset", "manner", "variant", "samples", "tokens", "task", "recompute")
    for row in rows:
        if row.get("variant") != "aia" or "peak_gb" not in row or row["compiled"] or row["manner"] == "autocast":
            continue
        known = {key: row[key] for key in same}
        yield known | {"measured_gb": row["peak_gb"]} | tried(bench, expected_memory, row)


def expected_memory(bench, row):
    """GB of the step of a row, from a dry run of one process."""
    config = DryRun(preset=row["preset"], world=1, parallel="fsdp", tokens=row["tokens"],
                    micro_batch=row["samples"], batch_size=row["samples"], dtype="bfloat16",
                    pure_bf16=row["manner"] == "pure", lora_rank=row["lora_rank"])
    dist.init_process_group("fake", rank=0, world_size=1)
    try:
        case = Case(row["variant"], row["samples"], row["tokens"], row["task"])
        found = rehearse(config, "fused", row["recompute"], case.batch(model.PRESETS[row["preset"]]))
    finally:
        dist.destroy_process_group()
    gb = found["peak"] / 1e9
    return {"predicted_gb": gb, "predicted_over_measured": gb / row["peak_gb"] if row["peak_gb"] else None}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing, answering, saving
# ---------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def generation(bench):
    """Milliseconds per code and per word, three ways, beside the time to read the weights; transformers' words."""
    for preset in (bench.size("janus-pro-7b", "tiny-janus"), bench.size("emu3-8b", "tiny-emu3")):
        m = filled(preset, bench.device, torch.bfloat16).eval()
        yield from decoding(bench, m, preset)
        files = public_files(m)["config"]
        ids = m.ids
        del m
        bench.clean()
        yield {"preset": preset, "who": "transformers"} | tried(bench, their_words, files, ids)
        bench.clean()


def decoding(bench, m, preset):
    """Our drawing and answering, one prompt."""
    c = m.config
    ids = torch.randint(5, 400, (1, 24), device=bench.device)
    away = torch.randint(5, 400, (1, 24), device=bench.device) if c.kind == "emu3" else None
    size = bench.size(4, 2), bench.size(24, 4)
    words = bench.size(96, 8)
    m.ids["eos"] = -1                               # never drawn: an answer has all the words that are asked for
    weights = 2 * (sum(p.numel() for p in m.lm.layers.parameters()) + c.width * c.codebook)
    bound = 1e3 * weights / copy_rate(bench)
    usual = parts.decoding.REPLAYED, parts.decoding.REPLAY_FROM
    try:
        for how, devices, least in (("cudnn may plan", (), 0), ("plain", usual[0], 10**9), ("replayed", usual[0], 0)):
            parts.decoding.REPLAYED, parts.decoding.REPLAY_FROM = devices, least
            row = {"preset": preset, "who": "ours", "how": how, "code_bound_ms": bound}
            yield row | tried(bench, our_speed, m, ids, size, away, words)
    finally:
        parts.decoding.REPLAYED, parts.decoding.REPLAY_FROM = usual


def our_speed(bench, m, ids, size, away, words):
    """Milliseconds per code of a guided drawing, and per word of an answer."""
    draw = bench.seconds(lambda: m.generate_images(ids, size=size, negative=away, guidance=5.0), 2, 1)
    say = bench.seconds(lambda: m.generate_text(ids, max_new_tokens=words), 2, 1)
    return {"code_ms": 1e3 * draw / (size[0] * size[1]), "text_ms": 1e3 * say / words}


def their_words(bench, files, ids):
    """Milliseconds per word of transformers' model of the same size, with its default cache."""
    import transformers
    kind = files["model_type"]
    config = getattr(transformers, f"{kind.capitalize()}Config").from_dict(files)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            m = getattr(transformers, f"{kind.capitalize()}ForConditionalGeneration")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    asked = torch.randint(5, 400, (1, 24), device=bench.device)
    n = bench.size(48, 8)
    mode = {"generation_mode": "text"} if kind == "janus" else {}
    seconds = bench.seconds(lambda: m.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=n, do_sample=False, eos_token_id=None,
        pad_token_id=ids["pad"], **mode), 2, 1)
    return {"text_ms": 1e3 * seconds / n}


def saving(bench):
    """Seconds that a checkpoint stops training, with and without pinned memory, seconds of a step beside the writing,
    and of reading it back."""
    task = "gen"
    m = filled(bench.size("janus-pro-1b", "tiny-janus"), bench.device, torch.bfloat16).train()
    optimizer = train.make_optimizer(m, train.LARGE[0])
    targets = {task: targets_of(bench, m.config, task)}
    batch = Case("aia", 1, bench.size(640, 80), task).batch(m.config)

    def step():
        sums = train.accumulate(m, [batch], targets, {task: 5.0}, device=bench.device)
        with train.updating(m, optimizer, 1.0):
            train.metrics_of(sums)
    step()
    alone = bench.seconds(step, 3)
    stager = None
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "checkpoints").mkdir()
        ways = (False, True, True) if bench.cuda else (False,)                  # the third reuses its pinned memory
        for i, pinned in enumerate(ways):
            if bench.left() < 0:                    # a slow disk takes a minute each time
                yield {"pinned": pinned, "time": i, "failed": NO_TIME}
                return
            if pinned and not stager:
                stager = BlockingAsyncStager(cache_staged_state_dict=True)
            tensors = tensors_of(m, optimizer)
            bench.wait()
            start = time.perf_counter()
            future = save_checkpoint(tensors, {"config": {}}, folder / f"checkpoints/0-{i:07d}", stager=stager)
            staged = time.perf_counter() - start
            beside = bench.seconds(step, 1, 0)
            future.result()
            yield {"pinned": pinned, "time": i, "gb": sum(x.nbytes for x in tensors.values()) / 1e9, "staged": staged,
                   "written": time.perf_counter() - start, "step_alone": alone, "step_beside": beside}
        before = {name: value.clone() for name, value in tensors_of(m, optimizer).items()}
        save_checkpoint(before, {"config": {}}, folder / "last").result()
        step()
        start = time.perf_counter()
        read_tensors(tensors_of(m, optimizer), folder / "last")
        bench.wait()
        seconds = time.perf_counter() - start
        now = tensors_of(m, optimizer)
        yield {"read": seconds, "same": all(torch.equal(now[key], x) for key, x in before.items())}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
PARTS = {"machine": about_machine, "parity": parity, "attention": attention, "small": small, "large": large,
         "generation": generation, "saving": saving, "predicted": predicted}


def opened(settings, bench):
    """Rows of earlier runs, and which parts of them are complete; refuses parts and files that do not fit."""
    unknown = set(settings.parts) - set(PARTS)
    if unknown:
        raise InputError(f"lab.gpu knows no part {', '.join(sorted(unknown))}: use some of {', '.join(PARTS)}")
    if not (bench.cuda or settings.tiny or settings.parts == ("predicted",)):
        raise InputError("there is no GPU here: --tiny --out tiny.json tries the command without one")
    out = Path(settings.out)
    check_out(out)
    content = read_json(out) if out.exists() else {"rows": [], "complete": []}
    if content["rows"] and content["tiny"] != settings.tiny:
        raise InputError(f"{out} holds rows {'of' if content['tiny'] else 'without'} --tiny: give another --out")
    return content | {"tiny": settings.tiny}


def measure_parts(settings):
    """Measure all parts that are wanted -> how many rows the file holds, and which parts are complete."""
    bench = Meter(settings)
    content = opened(settings, bench)
    wanted = [part for part in PARTS if part in (settings.parts or set(PARTS) - set(content["complete"]))]
    about = machine() | {"device": bench.device, "cuda": torch.version.cuda, "platform": platform.machine(),
                         "gpu": torch.cuda.get_device_name() if bench.cuda else None}
    if bench.cuda or settings.tiny:                 # `predicted` alone may follow on another machine
        content["machine"] = about
    for part in wanted:
        started = time.monotonic()
        rows = content["rows"] = [row for row in content["rows"] if row["part"] != part]
        content["complete"] = [name for name in content["complete"] if name != part]
        measured = PARTS[part](bench, list(rows)) if part == "predicted" else PARTS[part](bench)
        for row in measured:
            rows.append({"part": part, **row, "date": about["date"], "gpu": about["gpu"], "torch": about["torch"]})
            print(json.dumps(rows[-1]), flush=True)
            write_json(content, settings.out)
        if not any(row.get("failed") == NO_TIME for row in rows if row["part"] == part):
            content["complete"].append(part)
        write_json(content, settings.out)
        bench.clean()
        print(f"{part}: {time.monotonic() - started:.1f} s, {bench.left():.0f} s left", flush=True)
        if bench.left() < 0:
            break
    return {"rows": len(content["rows"]), "complete": content["complete"], "out": settings.out}


def main(argv=None):
    tell(measure_parts(parse(Gpu, argv, "python -m lab.gpu")))


if __name__ == "__main__":
    run_command(main)
