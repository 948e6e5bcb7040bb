"""Where do generation and understanding pull the weights in different directions, and does training with AIA change it?

Of all weights that a run has kept: the gradient of next-token prediction of each task alone, always on the same
held-out samples of it, and the cosine of the two for each layer and kind of weight. Where it is below 0, a small step
for one task makes the other worse. The AIA loss itself does not enter: only what it has made of the weights.

    python -m lab.gradients runs/tiny-emu3-seed0 runs/tiny-janus-seed0 --out gradients.json --figure gradients.png
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import aia
import data
import eval as evaluation
from formats import checkpoints
from lab.figures import training_log
from lab.plans import opened_run
from parts.plots import PALETTE, canvas, check_figure, save_figure
from parts.settings import InputError, at_least, check_out, machine, opt, parse, run_command, tell, write_json
from train import Phase, accumulate, freeze

# A gradient here is {weight: tensor}, without the weights that a loss does not reach.
KINDS = {"attention.query": ("self_attn.q_proj",), "attention.key": ("self_attn.k_proj",),
         "attention.value": ("self_attn.v_proj",), "attention.output": ("self_attn.o_proj",), "mlp": ("mlp",),
         "norms": ("input_layernorm", "post_attention_layernorm")}
# What never trains with the language model, and what only one task of Janus-Pro uses.
APART = ("vq", "vision", "aligner", "gen_embed", "gen_aligner", "gen_head")
MARKS = "os^Dv"                                      # lines differ without colour, too


@dataclass(frozen=True)
class Gradients:
    """Compare the gradients of both tasks, layer by layer, at each checkpoint that runs have kept."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders; train with --keep 99 to have more of their checkpoints")
    n: int = opt(64, "held-out samples of each task")
    seed: int = opt(0, "draws the samples")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = opt("gradients.json", "JSON file to write")
    figure: str = opt("", "PNG file to draw; empty: none")


def gradients(settings):
    """All runs, one after the other -> {run: cosine over all shared layers at its last checkpoint}."""
    at_least(settings, {"n": 1, "seed": 0})
    check_out(settings.out)
    if settings.figure:
        check_figure(settings.figure, "--figure")
    if not settings.runs:
        raise InputError("gradients needs run folders: python -m lab.gradients runs/tiny-emu3-seed0")
    opened = {run: model_and_world(run, settings.device) for run in settings.runs}
    rows = {}
    for run, (m, text, world) in opened.items():
        print(run)
        samples, preparer = evaluation.HeldOut(world, settings.seed), data.Preparer(m, text)
        batches = {task: [*samples.batches(preparer, task, settings.n)] for task in aia.TASKS}
        rows[run] = kept_rows(m, Path(run), batches)
    write_json({"runs": rows, "n": settings.n, "seed": settings.seed, "machine": machine()}, settings.out)
    if settings.figure:
        draw_gradients(rows, settings.figure)
    return {run: row[-1]["cosine"]["layers"] for run, row in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a run has kept
# ---------------------------------------------------------------------------------------------------------------------
def model_and_world(run, device):
    """Model, tokenizer and world of a run. Gradients are those of float32, however the weights are stored."""
    m, text, world = opened_run(run, device, "float32")
    freeze(m, Phase("gradients", 0, 0, 0.0, 0, APART))          # with LoRA, only what it adds has gradients
    return m, text, world


def kept_weights(folder):
    """[(phase, step, steps of both tasks so far, folder)] of the weights that a run has kept, in the order of training.
    As in the names of checkpoints, step 0 of a phase is the end of the phase before it."""
    kept = {tuple(map(int, one.name.split("-"))): one for one in checkpoints.checkpoint_folders(folder)}
    lengths, index = {}, {}                         # {phase: its steps, if it trains both tasks}, {name: phase}
    for row in training_log(folder / "metrics.jsonl"):
        phase = row.get("phase", row.get("stage"))                              # older runs: stage
        lengths[phase], index[row["name"]] = row["step"] if "gen" in row and "und" in row else 0, phase
    # With --arms both, "control" is the first to start from RUN/before, and RUN/control is what it ends with.
    first = index.get("control", index.get("tune"))
    for after, name in enumerate(("before", "control")):
        if first is not None and (folder / name).exists():
            kept.setdefault((first + after, 0), folder / name)
    done = {phase: sum(n for earlier, n in lengths.items() if earlier < phase) for phase, _ in kept}
    return [(phase, step, done[phase] + min(step, lengths.get(phase, 0)), kept[phase, step])
            for phase, step in sorted(kept)]


def kept_rows(m, folder, batches):
    """A row for all weights that a run has kept, read one after the other into the same model. batches: of each task,
    with the picture codes of the run's last tokenizer."""
    rows = []
    for phase, step, steps, saved in kept_weights(folder):
        checkpoints.read_manifest(saved)            # refuses damaged files
        checkpoints.read_tensors(checkpoints.tensors_of(m), saved)
        found = agreement(m, {task: gradient_of(m, batches[task]) for task in aia.TASKS})
        rows.append({"phase": phase, "step": step, "steps": steps} | found)
        cosine, kind, layer = lowest(found["cosine"])
        print(f"  phase {phase + 1} step {step:5d}   layers {found['cosine']['layers']:6.3f}   lowest {cosine:6.3f}, "
              f"{kind} of layer {layer}")
    return rows


def lowest(cosines):
    """The lowest cosine of any layer and kind of weight, with its kind and layer."""
    return min((value, kind, layer) for kind in KINDS for layer, value in enumerate(cosines[kind])
               if value is not None)


# ---------------------------------------------------------------------------------------------------------------------
# The measure
# ---------------------------------------------------------------------------------------------------------------------
def gradient_of(m, batches):
    """The gradient of the next-token loss alone, a mean over the label tokens of all batches: in float64, on the CPU.
    What the weights hold in .grad stays there."""
    held = [p.grad for p in m.parameters()]
    m.zero_grad()
    accumulate(m, batches, {}, None)
    found = {p: p.grad.cpu().double() for p in m.parameters() if p.grad is not None}
    for p, grad in zip(m.parameters(), held, strict=True):
        p.grad = grad
    return found


def groups_of(m, task, shared):
    """{group: its weights} on the way of a task, those of KINDS layer by layer. layers: those of the decoder's layers
    that both tasks train, which are `shared`; all: those of embedding and head besides. Left out of these two are a
    fork's branches; in Janus-Pro SigLIP, aligners and both heads, each of which belongs to one task; and the picture
    tokenizer, which is frozen."""
    layers, _ = m.lm.path(task)
    groups = {kind: [[p for part in parts for p in layer.get_submodule(part).parameters()] for layer in layers]
              for kind, parts in KINDS.items()}
    whole = [*m.lm.parameters(), *m.lm_head.parameters()]
    return groups | {"embedding": [*m.lm.embed_tokens.parameters()], "head": [*m.lm_head.parameters()],
                     "layers": [p for layer in layers for p in layer.parameters() if p in shared],
                     "all": [p for p in whole if p in shared]}


def agreement(m, gradients):
    """Gradients of both tasks {task: gradient} -> {"cosine": {group: value}, "norm": {task: {group: value}}}, of KINDS
    a list with a value for each layer. None: no weight of the group has a gradient, for a cosine one of both tasks."""
    shared = gradients["gen"].keys() & gradients["und"].keys()
    groups = {task: groups_of(m, task, shared) for task in aia.TASKS}
    return {"cosine": each(cosine_of, groups["gen"], gradients["gen"], gradients["und"]),
            "norm": {task: each(norm_of, groups[task], gradients[task]) for task in aia.TASKS}}


def each(measure, groups, *given):
    """measure(weights, *given) of each group, and of KINDS of each layer."""
    return {group: [measure(own, *given) for own in weights] if group in KINDS else measure(weights, *given)
            for group, weights in groups.items()}


def norm_of(weights, gradient):
    """Length of the part of a gradient that belongs to some weights; None if it reaches none of them."""
    found = [gradient[p].square().sum().item() for p in weights if p in gradient]
    return math.sqrt(sum(found)) if found else None


def cosine_of(weights, a, b):
    """Cosine of two gradients over the weights that both reach; None if there are none, or one gradient is zero."""
    weights = [p for p in weights if p in a and p in b]
    # cos(a, b) = <a, b> / (|a| |b|)
    product = sum((a[p] * b[p]).sum().item() for p in weights)
    length = (norm_of(weights, a) or 0.0) * (norm_of(weights, b) or 0.0)
    return product / length if length else None


# ---------------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------------
def seeds_together(rows):
    """{run without its seed: [the rows of each seed]}."""
    groups = {}
    for run, kept in rows.items():
        groups.setdefault(re.sub(r"-seed\d+$", "", run), []).append(kept)
    return groups


def draw_gradients(rows, file):
    """The cosine over all shared layers while runs trained (thin: each seed, thick: their mean), and that of each layer
    and kind at their last checkpoint (mean over seeds)."""
    groups = seeds_together(rows)
    titles = [f"{Path(name).name}, last checkpoint" for name in groups]
    figure, (line, *maps) = canvas(["the layers that both tasks train", *titles], "cosine of the two gradients",
                                   "training step", None, shared=False)
    ends = []                                                                   # (L, kinds) of each group
    for i, (name, seeds) in enumerate(groups.items()):
        style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKS[i % len(MARKS)]}
        curves = [{row["steps"]: row["cosine"]["layers"] for row in kept} for kept in seeds]
        for curve in curves:
            line.plot([*curve], [*curve.values()], markersize=2, linewidth=0.7, alpha=0.4, **style)
        shared = sorted(set.intersection(*map(set, curves)))
        line.plot(shared, np.mean([[curve[step] for step in shared] for curve in curves], 0), markersize=5,
                  label=f"{Path(name).name} ({len(seeds)})", **style)
        ends.append(np.mean([np.array([kept[-1]["cosine"][kind] for kind in KINDS], float).T for kept in seeds], 0))
    line.axhline(0, color="black", linewidth=0.8)
    most = max(np.nanmax(np.abs(end)) for end in ends)                          # 0 is the same grey in all panels
    for panel, end in zip(maps, ends, strict=True):
        panel.imshow(end, cmap="Greys_r", vmin=-most, vmax=most, aspect="auto")
        for (layer, kind), value in np.ndenumerate(end):
            shown = "one task" if np.isnan(value) else f"{value:.2f}"
            colour = "white" if value < 0 else "black"
            panel.text(kind, layer, shown, ha="center", va="center", fontsize=9, color=colour)
        panel.set_xticks(range(len(KINDS)), [kind.split(".")[-1] for kind in KINDS])
        panel.set_yticks(range(len(end)))
        panel.set(xlabel="kind of weight", ylabel="layer")
    save_figure(figure, [line], file, None)


def main(argv=None):
    tell(gradients(parse(Gradients, argv, "python -m lab.gradients")))


if __name__ == "__main__":
    run_command(main)
