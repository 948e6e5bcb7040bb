"""A cluster that is not there: one step of a large model, predicted on a laptop.

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
from parts.kernels import chunks_of
from parts.processes import processes
from parts.settings import InputError, at_least, opt, run_command, tell, write_json


@dataclass(frozen=True)
class DryRun(train.TrainConfig):
    """Predict a step of many GPUs without any. Every flag of train.py that shapes a step counts."""

    world: int = opt(8, "GPUs", section="the dry run")
    node: int = opt(8, "GPUs of a node, with --parallel hsdp")
    tokens: int = opt(0, "tokens of each sample; 0: 8282 for Emu3, 3000 for Janus-Pro, at most its context")
    tflops: float = opt(989.0, "1e12 FLOP/s of one GPU in bfloat16 (989: the data sheet of an H100)")
    utilisation: float = opt(0.4, "share of --tflops that a step reaches, recomputation counted as work")
    out: str = opt("", "JSON file to write; empty: printed only")


DRY = {"parallel": "fsdp", "dtype": "bfloat16", "checkpoint_activations": True, "micro_batch": 1}
SAMPLES, EPOCHS, GIB = 3_000_000, 4, 2**30          # the paper's data, and our reading of how often (RECIPES)
# Kernels of attention: place of q among their arguments, of is_causal, products of size T x T x D.
ATTENTION_KERNELS = {"_scaled_dot_product_flash_attention_for_cpu": (0, 4, 2),
                     "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 7, 5)}
# What a process of a ring of k sends: (k - 1) / k of a whole tensor; the sum of whole tensors takes two rounds.
COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


def storages(x):
    """{key: storage} of the tensors in x, of sharded ones this process's part."""
    found = [t._local_tensor if isinstance(t, DTensor) else t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
    return {storage._cdata: storage for storage in (t.untyped_storage() for t in found)}


class Ledger(TorchDispatchMode):
    """Within `with ledger.fake, ledger:` nothing is computed, but every operation is written down: its FLOPs, the bytes
    that it sends to other processes, and which storages live at the worst moment.

    Weights are fake, shapes without memory. A batch made before is real, and so is what follows from it alone: masks
    pick as many rows as they would in earnest. A number read from fake tensors, such as a loss for the log, is 1.
    """

    def __init__(self):
        super().__init__()
        self.fake, self.flop, self.sent = FakeTensorMode(allow_non_fake_inputs=True), 0, dict.fromkeys(COLLECTIVES, 0)
        self.live, self.count, self.gathered, self.worst = {}, 0, set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if {type(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)} == {torch.Tensor}:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1
        if name == "index" and args[1][0].dtype is torch.bool:
            with unset_fake_temporarily():
                args = (args[0], list(args[1][0].nonzero().unbind(1)))
        if name in COLLECTIVES:                     # they have no form without numbers before torch 2.10
            least = min(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            with unset_fake_temporarily():
                numbers = tree_map_only(torch.Tensor, lambda x: torch.zeros(x.numel() // least, dtype=x.dtype), args)
                out = args[0], function(*numbers, **kwargs)[1]
        else:
            out = function(*args, **kwargs)
        if function.overloadpacket in flop_registry:
            self.flop += flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        elif name in ATTENTION_KERNELS:
            q, causal, products = ATTENTION_KERNELS[name]
            self.flop += 2 * products * args[q].numel() * args[q + 1].shape[2] // (2 if True in args[causal:] else 1)
        elif name == "allreduce_":
            k = dist.ProcessGroup.unbox(args[1]).size()
            self.sent[name] += sum(x.nbytes for x in args[0]) * 2 * (k - 1) // k
        elif name in COLLECTIVES:
            self.sent[name] += abs(args[0].nbytes - args[1].nbytes)
        self.remember(storages(out), look=torch.is_grad_enabled() or name != "add")
        if function.namespace in ("fsdp", "c10d"):
            self.gathered |= self.numbers((args, kwargs))
        return out

    def remember(self, found, look):
        """Number new storages. They go when they are freed; FSDP also empties some and fills them again. Sums of
        gradients are not looked at: autograd makes them in place, but not where somebody writes down operations."""
        for key in found.keys() - self.live.keys():
            self.count += 1
            self.live[key] = self.count, weakref.ref(found[key], lambda _, key=key: self.live.pop(key))
        if look and found:
            now = {number: storage().nbytes() for number, storage in list(self.live.values())}
            self.worst = max(self.worst, now, key=lambda sizes: sum(sizes.values()))

    def numbers(self, x):
        return {self.live[key][0] for key in storages(x) if key in self.live}


def rehearse(config, attention, recompute, batch=None):
    """One step of the first process, on samples of the dearer task unless a batch is given: a drawing of Emu3, or a
    picture and a long answer of Janus-Pro, all labelled -> bytes by kind, bytes sent, FLOPs."""
    phases = (train.RECIPES[config.recipe][0],) if config.recipe else train.PLANS.get(config.preset, train.LARGE)
    phase = [phase for phase in phases if not phase.ratio][-1]                  # the last that trains both tasks
    c = replace(model.PRESETS[config.preset], attention=attention, lora_rank=config.lora_rank,
                checkpoint_activations=recompute)
    with torch.device("meta"):
        m = model.MODELS[c.kind](c).train()
    n, ledger = config.micro_batch, Ledger()
    half = config.pure_bf16 or config.dtype == "bfloat16"
    held = torch.bfloat16 if config.pure_bf16 or config.lora_rank and half else torch.float32
    for name, parameter in m.named_parameters():
        parameter.data = parameter.data.to(model.held_type(name, held))
    train.freeze(m, phase)
    train.shard_model(m, config, {"vq", *phase.frozen}, "cpu", config.node)
    if batch is None:
        task, first = ("gen", config.tokens // 3) if c.kind == "emu3" else ("und", (c.image_size // c.vit_patch) ** 2)
        condition = (torch.arange(config.tokens) < first).expand(n, -1)
        labels, pixels = (0, None) if task == "gen" else (-100, torch.zeros(n, 3, c.image_size, c.image_size))
        batch = data.Batch(task, condition * c.ids["placeholder"], condition * labels, condition, ~condition,
                           torch.ones(n).bool(), pixels)
    passes = max(1, config.batch_size // (n * processes()))
    targets = {batch.task: aia.targets(c.layers, batch.task)}
    # Half precision is that of a GPU: its loss is cut as it is there.
    with chunks_of("cuda" if half else "cpu"), ledger.fake, ledger:
        m.to_empty(device="cpu")
        optimizer = train.make_optimizer(m, phase)
        train.accumulate(m, [batch] * passes, targets, {batch.task: 1.0})
        moving = [p for p in m.parameters() if p.requires_grad]
        kinds = {"parameters": moving, "gradients": [p.grad for p in moving],
                 "frozen": [p for p in m.parameters() if not p.requires_grad] + list(m.buffers())}
        row = {kind: sum(x.nbytes() for x in storages(tensors).values()) for kind, tensors in kinds.items()}
        others = ledger.gathered | ledger.numbers(kinds)
        row["activations"] = sum(size for number, size in ledger.worst.items() if number not in others)
        # The moments are always there: the first step makes them at its end, and fused AdamW makes nothing else.
        row["optimizer"] = 2 * row["parameters"]
        row["peak"] = sum(ledger.worst.values()) + row["optimizer"]
        with train.updating(m, optimizer, phase.clip):
            pass
    return row | {"sent": {COLLECTIVES[name]: x for name, x in ledger.sent.items()}, "flop": ledger.flop,
                  "samples": n * processes() * passes, "all": sum(p.numel() for p in m.parameters()),
                  "moving": sum(p.numel() for p in moving)}


def dry_run(config):
    """A step of --world processes, four ways, and the days of the paper's training -> the result."""
    train.check_numbers(config)
    at_least(config, {"world": 1, "node": 1, "tokens": 0})
    for name in ("tflops", "utilisation"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name} {getattr(config, name)}: give a number above 0")
    c, n = model.PRESETS[config.preset], config.world
    wrong = [name for name in ("data", "val", "encoded", "init", "resume", "offload", "compile") if
             getattr(config, name)] + ["parallel ddp"] * (config.parallel == "ddp")
    if wrong:
        raise InputError(f"the dry run reads no data and needs weights divided among GPUs: leave out --{wrong[0]}")
    config = replace(config, tokens=config.tokens or min({"emu3": 8282, "janus": 3000}[c.kind], c.context),
                     node=min(config.node, n))
    if config.parallel == "hsdp" and n % config.node:
        raise InputError(f"--node {config.node} does not divide {n} GPUs: choose a divisor")
    least = 3 if c.kind == "emu3" else (c.image_size // c.vit_patch) ** 2 + 2
    if not least <= config.tokens <= c.context:
        raise InputError(f"--tokens {config.tokens}: {config.preset} takes {least} to {c.context}")
    dist.init_process_group("fake", rank=0, world_size=n)
    try:
        ways = [(attention, recompute) for attention in ("explicit", "fused") for recompute in (True, False)]
        rows = {way: rehearse(config, *way) for way in ways}
    finally:
        dist.destroy_process_group()
    kept = {True: "recomputed", False: "kept"}
    row, explicit = (rows[name, config.checkpoint_activations] for name in ("fused", "explicit"))
    print(f"predicted from shapes, nothing measured: {config.preset}, {n} processes ({config.parallel}), a step of "
          f"{row['samples']} samples of {config.tokens:,} tokens; {row['all']:,} parameters, {row['moving']:,} train\n"
          "GiB of a process: " + ", ".join(f"{kind} {row[kind] / GIB:.2f}" for kind in (
              "parameters", "gradients", "optimizer", "frozen")))
    for (name, recompute), way in rows.items():
        print(f"  {name:8s} attention, layers {kept[recompute]:10s} | peak {way['peak'] / GIB:7.2f}, of which "
              f"activations {way['activations'] / GIB:7.2f} | {way['flop'] * n / 1e15:.2f} PFLOP a step")
    seconds = row["flop"] / (config.tflops * 1e12 * config.utilisation)
    days = SAMPLES * EPOCHS / row["samples"] * seconds / 86_400
    print("GiB that a process sends: " + ", ".join(f"{kind} {x / GIB:.2f}" for kind, x in row["sent"].items()) +
          f"\n{SAMPLES:,} samples x {EPOCHS} epochs, layers {kept[config.checkpoint_activations]}, at "
          f"{config.tflops:g} TFLOP/s x {config.utilisation:g}: {seconds:.2f} s a step, {days:.1f} days")
    result = {"parameters": row["all"], "peak_gib": row["peak"] / GIB, "peak_gib_explicit": explicit["peak"] / GIB,
              "comm_gib": sum(row["sent"].values()) / GIB, "pflop": row["flop"] * n / 1e15, "days": days}
    if config.out:
        write_json({"result": result, "settings": asdict(config), "rows": [
            {"attention": name, "recompute": recompute} | way for (name, recompute), way in rows.items()]}, config.out)
    return result


def main(argv=None):
    config = train.settings_from(argv, DryRun, "python -m lab.dry_run", DRY)
    try:
        tell(dry_run(config))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
