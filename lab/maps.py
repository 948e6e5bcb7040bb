"""The method in one picture: real attention maps of a trained model, what Eq. 1 averages in them, and the curve that
becomes of it.

    python -m lab.maps runs/tiny-emu3-seed0 --out assets/method.png
"""

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import aia
import data
import eval as evaluation
import model
from lab.plans import opened_run
from parts.plots import COLOUR, TASK_NAME, check_figure, save_figure
from parts.settings import InputError, at_least, opt, parse, read_json, run_command, tell

# Legend: B samples, H heads, T tokens, L layers.
KEYS = {"gen": "prompt", "und": "picture"}          # the columns of Eq. 1, and its rows
ROWS_OF = {"gen": "picture", "und": "answers"}


@dataclass(frozen=True)
class Maps:
    """Draw an attention map of each task with the rows and columns of Eq. 1 marked, and the curve of all layers."""

    POSITIONAL = ("run",)
    run: str = opt("", "a run folder that has learned the built-in world")
    layer: int = opt(-1, "layer whose maps are drawn, from 0; -1: where the two tasks differ most")
    seed: int = opt(0, "draws the samples")
    device: str = opt("cpu", "cpu, cuda, cuda:1, mps")
    out: str = opt("method.png", "PNG file to write")


def maps(settings):
    """Write the picture -> layer and both intensities there."""
    at_least(settings, {"layer": -1, "seed": 0})
    check_figure(settings.out)
    m, text, world = opened_run(settings.run, settings.device)
    samples, preparer = evaluation.HeldOut(world, settings.seed), data.Preparer(m, text)
    batches = {task: next(samples.batches(preparer, task, 25)) for task in aia.TASKS}
    found = {task: attention_maps(m, batch) for task, batch in batches.items()}
    curves = {task: aia.intensity(torch.stack([(one * batches[task].condition[:, None, None]).sum(-1)
                                               for one in found[task]]), batches[task].queries).mean(1).tolist()
              for task in aia.TASKS}                                            # (L,) each
    layer = settings.layer
    if layer < 0:
        layer = int(np.argmax(np.abs(np.array(curves["gen"]) - curves["und"])))
    if layer >= m.config.layers:
        raise InputError(f"--layer {layer}: the model has layers 0 to {m.config.layers - 1}")
    made = read_json(Path(settings.run) / "settings.json")
    asked = made["aia_targets"], made["aia_variant"]
    targets = {task: aia.targets(m.config.layers, task, *asked)[0].tolist() for task in aia.TASKS}
    draw_method({task: (one_sample(batches[task]), found[task][layer]) for task in aia.TASKS}, curves, targets, layer,
                settings.out)
    return {"layer": layer} | {task: curve[layer] for task, curve in curves.items()}


@torch.inference_mode()
def attention_maps(m, batch, keep=lambda attention: attention):
    """All attention maps of a batch, [(B, H, T, T), ...] layer by layer, on the CPU. Any body of attention gives the
    same; here they are written out beside it. keep(map): what is kept of each, where all of them would be too large."""
    found = []

    def looking(body):
        def attend(q, k, v, visible=None, condition=None, rectangle=None):
            # A = V's weights: with the unit matrix for V, attention gives itself
            unit = torch.eye(k.shape[2], device=k.device, dtype=v.dtype).expand(*k.shape[:3], -1)
            found.append(keep(model.attend_explicit(q, k, unit, visible)[0].float().cpu()))
            return body(q, k, v, visible, condition, rectangle)
        return attend
    with contextlib.ExitStack() as stack:
        for layer in m.lm.path(batch.task)[0]:
            attention = layer.self_attn
            stack.callback(setattr, attention, "attend", attention.attend)
            attention.attend = looking(attention.attend)
        m(batch.to(next(m.parameters()).device))
    return found


def one_sample(batch):
    """The first sample of a batch that AIA can use: its number, and how many of its positions are no padding."""
    i = int(batch.aia_valid.nonzero()[0])
    return i, batch.lengths[i], batch.condition[i], batch.queries[i]


def stretches(mask):
    """Ends (first, last) of each run of marked positions."""
    marked = np.flatnonzero(np.diff(np.concatenate([[0], mask.numpy().astype(int), [0]])))
    return [(int(a), int(b) - 1) for a, b in marked.reshape(-1, 2)]


def draw_method(shown, curves, targets, layer, file):
    """Two maps, mean over heads, and the curves. Columns of the condition are marked above a map, rows of the queries
    beside it: Eq. 1 is the mean over these rows of what lies in these columns."""
    from matplotlib.figure import Figure
    figure = Figure((13, 4.3), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for panel, task in zip(panels, aia.TASKS, strict=False):
        (i, length, condition, queries), attention = shown[task]
        panel.imshow(attention[i].mean(0)[:length, :length] ** 0.5, cmap="Greys", interpolation="nearest")
        colour = COLOUR[task]
        columns, rows, far = stretches(condition[:length]), stretches(queries[:length]), -length / 25
        bar = {"linewidth": 5, "solid_capstyle": "butt", "clip_on": False}
        for first, last in columns:
            panel.plot([first - 0.5, last + 0.5], [far, far], color=colour, **bar)
        for first, last in rows:
            panel.plot([far, far], [first - 0.5, last + 0.5], color="black", **bar)
        for (a, b), (top, bottom) in itertools.product(columns, rows):
            panel.fill_between([a - 0.5, b + 0.5], top - 0.5, bottom + 0.5, color=colour, alpha=0.22, linewidth=0)
        middle = (columns[0][0] + columns[-1][1]) / 2, (rows[0][0] + rows[-1][1]) / 2
        panel.text(middle[0], 1.6 * far, KEYS[task], ha="center", va="bottom", color=colour, fontsize=10)
        panel.text(1.6 * far, middle[1], ROWS_OF[task], ha="right", va="center", rotation=90, fontsize=10)
        panel.set_title(f"{TASK_NAME[task]}: I = {curves[task][layer]:.2f} in layer {layer}", fontsize=11, pad=20)
        panel.set(xlabel="keys (each row is a query)", xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    last = panels[-1]
    for task in aia.TASKS:
        colour, x = COLOUR[task], range(len(curves[task]))
        last.plot(x, curves[task], color=colour, marker="o" if task == "gen" else "s", label=f"I, {TASK_NAME[task]}")
        last.step(x, targets[task], where="mid", color=colour, linestyle="--", linewidth=1.3,
                  label=f"target, {TASK_NAME[task]}")
    last.axvline(layer, color="black", linewidth=0.7, linestyle=":")
    last.xaxis.get_major_locator().set_params(integer=True)
    last.set_title("one number for each layer, and what AIA asks for", fontsize=11)
    last.set_xlabel("layer", fontsize=9)
    last.set_ylim(0)
    last.spines[["top", "right"]].set_visible(False)
    last.legend(frameon=False, fontsize=8)
    save_figure(figure, (), file)
    print(f"{file}: layer {layer}, mean over heads; darker: more attention (square root)")


def main(argv=None):
    tell(maps(parse(Maps, argv, "python -m lab.maps")))


if __name__ == "__main__":
    run_command(main)
