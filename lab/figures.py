"""The paper's figures from finished runs: Fig. 1, 3, 4, 5 and Table 1.

    python -m lab.figures runs/tiny-emu3-seed0 runs/tiny-janus-seed0
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import aia
import model
from eval import COLOUR, LABEL, distance, label_of
from parts.settings import InputError, opt, parse, read_json, run_command, tell, write_json

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
    references: tuple = opt((), "further reference curves for Fig. 4: JSON files of lab.references")
    study: str = opt("", "JSON file of lab.study: draws study.png as well, or alone")
    out: str = opt("figures", "folder to write")


def figures(settings):
    """Write fig1.png, fig3.png, fig4.png, fig5.png and figures.json, and study.png of a study."""
    if not (settings.runs or settings.study):
        raise InputError("figures needs run folders: python -m lab.figures runs/tiny-emu3-seed0")
    paper, out = read_json(aia.CURVES), Path(settings.out)
    runs = {name: load_result(path) for name, path in named(settings.runs).items()}
    references = load_references(settings.references, paper)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} is no folder that can be made ({error.strerror}): give another") from error
    if settings.study:
        figure_study(read_json(Path(settings.study)), out / "study.png")
    if not settings.runs:
        return {"out": str(out / "study.png")}
    numbers = {"fig1": figure_1(runs, paper, references, out / "fig1.png"), "table1": table_1(runs),
               "fig3": figure_3(runs, paper, out / "fig3.png"), "fig4": figure_4(references, out / "fig4.png"),
               "fig5": figure_5(runs, paper, out / "fig5.png")}
    write_json(numbers, out / "figures.json")
    print(f"{out}/fig1.png, fig3.png, fig4.png, fig5.png, figures.json")
    return {"correlation": {name: row["correlation"] for name, row in numbers["fig1"].items()}}


def named(paths):
    """{short name: path}: the last part of each path, with as many folders before it as tell them apart."""
    paths = [Path(os.path.abspath(path)) for path in paths]
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
    return read_json(file), file


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
        raise InputError(f"{file} holds no curves of a run: make it with eval.py curves (give what "
                         "lab.references wrote as --references)")
    kind = stored.get("kind")
    if not kind and run.exists():                    # else unknown, and the paper has nothing to lay over it
        kind = getattr(model.PRESETS.get(read_json(run).get("preset")), "kind", None)
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


def load_references(paths, paper):
    """{task: {name: curve}}: the paper's references, then further ones."""
    found = {}
    for task in aia.TASKS:
        figure, name, direction = aia.RAW[task]      # what the targets follow; Fig. 4 does not show all of it
        found[task] = {name: paper[figure][name][direction]} | {
            name: row[direction] for name, row in paper["fig4"].items() if direction in row}
    for name, path in named(paths).items():
        stored, file = curve_file(path)
        own = {task: stored[task]["intensity"] for task in aia.TASKS
               if isinstance(stored.get(task), dict) and "intensity" in stored[task]}
        if not own or not all(isinstance(curve, list) and len(curve) > 2 and all(
                isinstance(x, float | int) for x in curve) for curve in own.values()):
            raise InputError(f"--references {file} holds no reference curve: make it with lab.references")
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


def save_figure(figure, panels, file, bottom=0, shared=True):
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
    save_figure(figure, panels, file)
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
    save_figure(figure, panels, file, None)
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
    save_figure(figure, panels, file, shared=False)
    return references


def figure_5(runs, paper, file):
    """Without AIA, with it, and the target; the paper's own change dotted (Fig. 5)."""
    shown = [(name, task) for name in runs for task in aia.TASKS]
    figure, panels = canvas([f"{name}, {TASK_NAME[task]}" for name, task in shown], "attention on the other modality")
    numbers = {}
    for panel, (name, task) in zip(panels, shown, strict=True):
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
    save_figure(figure, panels, file)
    return numbers


def figure_study(content, file):
    """Both scores of each row, less those of its baseline with the same seed: mean and 95 % interval, none of one seed.
    Two experts are one row."""
    if not {"summary", "machine"} <= content.keys():
        raise InputError("--study: give a file that lab.study wrote")
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
    save_figure(figure, panels, file, None)
    print(f"{file}: rows and their seeds, of {content['machine']['date']}")


def main(argv=None):
    tell(figures(parse(Figures, argv, "python -m lab.figures")))


if __name__ == "__main__":
    run_command(main)
