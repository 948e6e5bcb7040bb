"""A cluster that is not there: one step of a large model, predicted on a laptop.

The real model takes one step through the real code, with as many processes as you like, on tensors that have shapes but
no memory, in a process group that sends nothing. Every number is predicted, none is measured.

    python -m lab.dry_run --world 64 --preset emu3-8b
"""

import weakref
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

import aia
import data
import model
import train
from parts.processes import processes
from parts.settings import InputError, at_least, check_out, opt, run_command, tell, write_json


@dataclass(frozen=True)
class DryRun(train.TrainConfig):
    """Predict a training step on many GPUs without any. All flags of train.py that shape a step apply."""

    world: int = opt(8, "GPUs", section="the dry run")
    node: int = opt(8, "GPUs of a node, with --parallel hsdp")
    tokens: int = opt(0, "tokens of each sample; 0: 8282 for Emu3, 3000 for Janus-Pro, at most its context")
    tflops: float = opt(989.0, "peak of one GPU in bfloat16, in 1e12 FLOP/s (989: data sheet of an H100)")
    utilisation: float = opt(0.4, "share of --tflops that a step reaches, with recomputation counted as work")
    out: str = opt("", "JSON file to write; empty: printed only")


DRY = {"parallel": "fsdp", "dtype": "bfloat16", "checkpoint_activations": True, "micro_batch": 1}
SAMPLES, EPOCHS = 3_000_000, 4                      # the paper's data, and our reading of how often (train.RECIPES)
GIB = 2**30
# Kernels of attention: index of q among their arguments, index of is_causal, products of size T x T x D.
ATTENTION_KERNELS = {"_scaled_dot_product_flash_attention_for_cpu": (0, 4, 2),
                     "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 7, 5)}
# In a ring of k, a process sends (k - 1) / k of a whole tensor; summing whole tensors takes two rounds.
COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


# ---------------------------------------------------------------------------------------------------------------------
# Counting instead of computing
# ---------------------------------------------------------------------------------------------------------------------
def storages(x):
    """{key: storage} of the tensors in x; of a sharded one, the part that this process holds."""
    tensors = [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
    own = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    return {storage._cdata: storage for storage in (t.untyped_storage() for t in own)}


class Ledger(TorchDispatchMode):
    """Within `with ledger.fake, ledger:` nothing is computed, but every operation is recorded: its FLOPs, the bytes it
    sends to other processes, and which storages are alive at the worst moment.

    Weights are fake: shapes without memory. A batch made before is real, and so is whatever follows from it alone, so
    masks select as many rows as they would in earnest. A number read from fake tensors, such as a loss for the log,
    is 1.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.flop = 0
        self.sent = dict.fromkeys(COLLECTIVES, 0)   # bytes
        self.live = {}                              # {key: (number, weak reference to the storage)}
        self.count = 0                              # storages so far
        self.gathered = set()                       # numbers of storages that took part in communication
        self.worst = {}                             # {number: bytes} at the worst moment

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if {type(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)} == {torch.Tensor}:
            with unset_fake_temporarily():          # all of it is real
                return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1
        if name == "index" and args[1][0].dtype is torch.bool:
            with unset_fake_temporarily():
                args = (args[0], list(args[1][0].nonzero().unbind(1)))
        out = self.collective(function, args, kwargs) if name in COLLECTIVES else function(*args, **kwargs)
        self.add(function, name, args, kwargs, out)
        self.remember(storages(out), look=torch.is_grad_enabled() or name != "add")
        if function.namespace in ("fsdp", "c10d"):
            self.gathered |= self.numbers((args, kwargs))
        return out

    def collective(self, function, args, kwargs):
        """Communicate tiny tensors instead: before torch 2.10, collectives do not accept fake ones."""
        least = min(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        with unset_fake_temporarily():
            tiny = tree_map_only(torch.Tensor, lambda x: torch.zeros(x.numel() // least, dtype=x.dtype), args)
            return args[0], function(*tiny, **kwargs)[1]

    def add(self, function, name, args, kwargs, out):
        """Add an operation's FLOPs, or the bytes it sends."""
        if function.overloadpacket in flop_registry:
            self.flop += flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        elif name in ATTENTION_KERNELS:
            q, causal, products = ATTENTION_KERNELS[name]
            flop = 2 * products * args[q].numel() * args[q + 1].shape[2]
            self.flop += flop // 2 if True in args[causal:] else flop
        elif name == "allreduce_":
            k = dist.ProcessGroup.unbox(args[1]).size()
            self.sent[name] += sum(x.nbytes for x in args[0]) * 2 * (k - 1) // k
        elif name in COLLECTIVES:
            self.sent[name] += abs(args[0].nbytes - args[1].nbytes)

    def remember(self, found, look):
        """Number new storages, forget freed ones, and look whether this is the worst moment so far. (FSDP also empties
        storages and fills them again.) No look at sums of gradients: autograd adds in place, except under a dispatch
        mode such as this."""
        for key in found.keys() - self.live.keys():
            self.count += 1
            self.live[key] = self.count, weakref.ref(found[key], lambda _, key=key: self.live.pop(key))
        if look and found:
            now = {number: storage().nbytes() for number, storage in list(self.live.values())}
            self.worst = max(self.worst, now, key=lambda sizes: sum(sizes.values()))

    def numbers(self, x):
        """Numbers of the live storages in x."""
        return {self.live[key][0] for key in storages(x) if key in self.live}


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------
def unreal_model(config, phase, attention, recompute):
    """The model as the first process holds it, without memory."""
    c = replace(model.PRESETS[config.preset], attention=attention, lora_rank=config.lora_rank,
                checkpoint_activations=recompute)
    half = config.pure_bf16 or config.dtype == "bfloat16"
    frozen_half = config.lora_rank and half         # with LoRA, frozen weights are stored as activations are
    held = torch.bfloat16 if config.pure_bf16 or frozen_half else torch.float32
    with torch.device("meta"):
        m = model.MODELS[c.kind](c).train()
    for name, parameter in m.named_parameters():
        parameter.data = parameter.data.to(model.held_type(name, held))
    train.freeze(m, phase)
    if processes() > 1:                             # one process keeps everything, as train.py does
        train.shard_model(m, config, {"vq", *phase.frozen}, "cpu", config.node)
    return m


def costly_batch(config, c):
    """Samples of the more expensive task, all labelled: a drawing of Emu3, or a picture and a long answer of
    Janus-Pro."""
    n, tokens = config.micro_batch, config.tokens
    if c.kind == "emu3":
        task, first, unlabelled, pixels = "gen", tokens // 3, 0, None
    else:
        task, first, unlabelled = "und", c.picture_tokens, -100
        pixels = torch.zeros(n, 3, c.image_size, c.image_size)
    condition = (torch.arange(tokens) < first).expand(n, -1)                    # (B, T)
    return data.Batch(task, condition * c.ids["placeholder"], condition * unlabelled, condition, ~condition,
                      torch.ones(n).bool(), pixels)


def rehearse(config, attention, recompute, batch=None):
    """One step of the first process, on costly_batch unless a batch is given -> bytes by kind, bytes sent, FLOPs."""
    phases = (train.RECIPES[config.recipe][0],) if config.recipe else train.PLANS.get(config.preset, train.LARGE)
    phase = [phase for phase in phases if not phase.ratio][-1]                  # the last that trains both tasks
    m = unreal_model(config, phase, attention, recompute)
    n = config.micro_batch
    batch = batch or costly_batch(config, m.config)
    passes = max(1, config.batch_size // (n * processes()))
    targets = {batch.task: aia.targets(m.config.layers, batch.task)}
    ledger = Ledger()
    with ledger.fake, ledger:
        m.to_empty(device="cpu")
        optimizer = train.make_optimizer(m, phase)
        half = processes() == 1 and config.dtype == "bfloat16" and not config.pure_bf16
        train.accumulate(m, [batch] * passes, targets, {batch.task: 1.0},
                         autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=half))
        row = bytes_by_kind(m, ledger)
        with train.updating(m, optimizer, phase.clip):
            pass
    numbers = [(p.numel(), p.requires_grad) for p in m.parameters()]
    return row | {"sent": {COLLECTIVES[name]: x for name, x in ledger.sent.items()}, "flop": ledger.flop,
                  "samples": n * processes() * passes, "all": sum(number for number, _ in numbers),
                  "moving": sum(number for number, moves in numbers if moves)}


def bytes_by_kind(m, ledger):
    """{kind: bytes} after the last backward pass: what the process holds, and activations and everything at the worst
    moment."""
    moving = [p for p in m.parameters() if p.requires_grad]
    kinds = {"parameters": moving, "gradients": [p.grad for p in moving],
             "frozen": [p for p in m.parameters() if not p.requires_grad] + list(m.buffers())}
    row = {kind: sum(x.nbytes() for x in storages(tensors).values()) for kind, tensors in kinds.items()}
    others = ledger.gathered | ledger.numbers(kinds)
    row["activations"] = sum(size for number, size in ledger.worst.items() if number not in others)
    # The first step makes the moments only at its end, all others have them from the start. Fused AdamW makes nothing
    # else.
    row["optimizer"] = 2 * row["parameters"]
    row["peak"] = sum(ledger.worst.values()) + row["optimizer"]
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
def checked(config):
    """The settings with their defaults filled in; refuses what cannot be predicted."""
    train.check_numbers(config)
    at_least(config, {"world": 1, "node": 1, "tokens": 0})
    for name in ("tflops", "utilisation"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name} {getattr(config, name)}: give a number above 0")
    check_out(config.out)
    c = model.PRESETS[config.preset]
    wrong = [name for name in ("data", "val", "encoded", "init", "resume", "offload", "compile", "vision_tokenizer",
                                  "image_size") if getattr(config, name)]
    if config.attention != "auto":
        wrong.append("attention, as it tries explicit and fused")
    if config.parallel == "ddp":
        wrong.append("parallel ddp")
    if wrong:
        raise InputError("the dry run reads no data and needs weights divided among GPUs: leave out --"
                         + wrong[0].replace("_", "-"))
    config = replace(config, tokens=config.tokens or min({"emu3": 8282, "janus": 3000}[c.kind], c.context),
                     node=min(config.node, config.world))
    if config.parallel == "hsdp" and config.world % config.node:
        raise InputError(f"--node {config.node} does not divide {config.world} GPUs: choose a divisor")
    least = 3 if c.kind == "emu3" else c.picture_tokens + 2
    if not least <= config.tokens <= c.context:
        raise InputError(f"--tokens {config.tokens}: {config.preset} takes {least} to {c.context}")
    return config


KEPT = {True: "recomputed", False: "kept"}


def dry_run(config):
    """A step of --world processes, four ways, and the days of the paper's training -> the result."""
    config = checked(config)
    dist.init_process_group("fake", rank=0, world_size=config.world)
    try:
        ways = [(attention, recompute) for attention in ("explicit", "fused") for recompute in (True, False)]
        rows = {way: rehearse(config, *way) for way in ways}
    finally:
        dist.destroy_process_group()
    row, explicit = (rows[name, config.checkpoint_activations] for name in ("fused", "explicit"))
    seconds = row["flop"] / (config.tflops * 1e12 * config.utilisation)
    days = SAMPLES * EPOCHS / row["samples"] * seconds / 86_400
    print_prediction(config, rows, row, seconds, days)
    result = {"parameters": row["all"], "peak_gib": row["peak"] / GIB, "peak_gib_explicit": explicit["peak"] / GIB,
              "comm_gib": sum(row["sent"].values()) / GIB, "pflop": row["flop"] * config.world / 1e15, "days": days}
    if config.out:
        table = [{"attention": name, "recompute": recompute} | way for (name, recompute), way in rows.items()]
        write_json({"result": result, "settings": asdict(config), "rows": table}, config.out)
    return result


def print_prediction(config, rows, row, seconds, days):
    """All four ways; what a process holds and sends, and the time, in the one that was asked for."""
    print(f"predicted from shapes, nothing measured: {config.preset}, {config.world} processes ({config.parallel}), a "
          f"step of {row['samples']} samples of {config.tokens:,} tokens; {row['all']:,} parameters, "
          f"{row['moving']:,} train")
    print("GiB of a process: " + ", ".join(
        f"{kind} {row[kind] / GIB:.2f}" for kind in ("parameters", "gradients", "optimizer", "frozen")))
    for (name, recompute), way in rows.items():
        print(f"  {name:8s} attention, layers {KEPT[recompute]:10s} | peak {way['peak'] / GIB:7.2f}, of which "
              f"activations {way['activations'] / GIB:7.2f} | {way['flop'] * config.world / 1e15:.2f} PFLOP a step")
    print("GiB that a process sends: " + ", ".join(f"{kind} {x / GIB:.2f}" for kind, x in row["sent"].items()))
    print(f"{SAMPLES:,} samples x {EPOCHS} epochs, layers {KEPT[config.checkpoint_activations]}, at "
          f"{config.tflops:g} TFLOP/s x {config.utilisation:g}: {seconds:.2f} s a step, {days:.1f} days")


def made_batch(c, task, samples, tokens, prompt):
    """A batch as training makes it, of equally long samples of random words and codes. Emu3 draws after a prompt of so
    many tokens, all labelled; Janus-Pro draws at the end, or (task "und") sees a picture and gives a long answer."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, min(400, c.vocab), (samples, tokens), generator=generator)     # (B, T), no special ids
    position = torch.arange(tokens).expand(samples, -1)                                     # (B, T)
    common = {"aia_valid": torch.ones(samples, dtype=torch.bool), "lengths": (tokens,) * samples}
    if task == "mixed":                             # Emu3: prompt, picture, answer
        parts = [(position >= i * tokens // 3) & (position < (i + 1) * tokens // 3) for i in range(3)]
        labels = torch.stack([torch.where(part, words, -100) for part in parts[1:]])            # (2, B, T)
        queries = torch.stack([part & part.roll(-1, 1) for part in parts[1:]])
        return data.Batch(task, words, labels, torch.stack(parts[:2]), queries,
                          **common | {"aia_valid": torch.ones(2, samples, dtype=torch.bool)})
    if c.kind == "emu3":
        condition = position < prompt
        return data.Batch("gen", words, words, condition, ~condition, **common)
    placeholder = c.ids["placeholder"]
    if task == "und":
        seen = position < c.picture_tokens
        pixels = torch.rand(samples, 3, c.image_size, c.image_size, generator=generator)
        return data.Batch("und", words.masked_fill(seen, placeholder), words.masked_fill(seen, -100), seen, ~seen,
                          pixels=pixels, **common)
    count = c.grid[0] * c.grid[1]
    drawn = position >= tokens - count
    codes = torch.randint(c.codebook, (samples, count), generator=generator)
    labels = torch.full_like(words, -100).masked_scatter(drawn, codes)
    queries = drawn & (position < tokens - 1)                                               # those that predict a code
    return data.Batch("gen", words.masked_fill(drawn, placeholder), labels, ~drawn, queries, codes=codes, **common)


def main(argv=None):
    config = train.settings_from(argv, DryRun, "python -m lab.dry_run", DRY)
    try:
        tell(dry_run(config))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
