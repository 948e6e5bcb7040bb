"""The paper's figures from finished runs: Fig. 1, 3, 4, 5 and Table 1, with the paper's own curves dotted.

    python -m lab.figures runs/tiny-emu3-seed0 runs/tiny-janus-seed0
    python -m lab.figures --study assets/study*.json --out assets       # study.png and study-moves.png alone
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import aia
import model
from eval import distance
from lab.rows import GROUPS, ROWS, TOLD
from parts.plots import (
    ARMS,
    COLOUR,
    GREY,
    LABEL,
    PALETTE,
    SKY,
    TASK_NAME,
    VERMILION,
    canvas,
    label_of,
    save_figure,
)
from parts.settings import InputError, opt, parse, read_json, run_command, tell, whole_lines, write_json

# L layers. A run here is what load_result returns: {"curves": {task: {"target", "arms"}}, "kind", "log"}.
ARM_COLOUR = {"before": GREY, "control": SKY, "after": VERMILION, "public": VERMILION}
YLABEL = "attention on the other modality"
# Of a kind of model: name in the file of digitised curves, name in a legend, standard deviation in Table 1.
PAPER_MODEL = {"emu3": ("emu3", "Emu3", 0.13), "janus": ("janus_pro", "Janus-Pro", 0.02)}
DIRECTION = {"gen": "T2I", "und": "I2T"}             # names of the tasks in that file
PAPER_STYLE = {"linestyle": (0, (1, 1.2)), "linewidth": 1.3, "alpha": 0.8}      # dotted: not measured here
NOT_STUDY = "give files that lab.study wrote, as they are"


@dataclass(frozen=True)
class Figures:
    """Draw the paper's figures from finished runs: Fig. 1, 3, 4, 5 and Table 1, with the paper's curves dotted."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders, or JSON files of eval.py curves")
    references: tuple = opt((), "further reference curves for Fig. 4: JSON files of lab.references")
    study: tuple = opt((), "JSON files of lab.study: draws study.png and study-moves.png as well, or alone")
    out: str = opt("figures", "folder to write to")


def figures(settings):
    """Write fig1.png, fig3.png, fig4.png, fig5.png and figures.json, and two figures of a study."""
    if not (settings.runs or settings.study):
        raise InputError("figures needs run folders: python -m lab.figures runs/tiny-emu3-seed0")
    paper = read_json(aia.CURVES)
    out = Path(settings.out)
    runs = {name: load_result(path) for name, path in named(settings.runs).items()}
    references = load_references(settings.references, paper)
    content = joined(settings.study)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: the folder cannot be created ({error.strerror}): choose another") from error
    if settings.study:
        try:
            figure_study(content, out / "study.png")
            figure_moves(content, out / "study-moves.png")
        except (AttributeError, LookupError, TypeError) as error:      # of a file with rows cut out, say
            raise InputError(f"--study: {NOT_STUDY} ({error!r})") from error
    if not settings.runs:
        return {"out": str(out / "study.png")}
    numbers = {"fig1": figure_1(runs, paper, references, out / "fig1.png"), "table1": table_1(runs),
               "fig3": figure_3(runs, paper, out / "fig3.png"), "fig4": figure_4(references, out / "fig4.png"),
               "fig5": figure_5(runs, paper, out / "fig5.png")}
    write_json(numbers, out / "figures.json")
    print(f"{out}/fig1.png, fig3.png, fig4.png, fig5.png, figures.json")
    return {"correlation": {name: row["correlation"] for name, row in numbers["fig1"].items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Reading runs and references
# ---------------------------------------------------------------------------------------------------------------------
def named(paths):
    """{short name: path}: the last part of each path, with as many folders in front as it takes to tell them apart."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    paths = list(dict.fromkeys(path.parent if path.name == "curves.json" else path for path in paths))
    parts = [path.with_suffix("").parts if path.suffix == ".json" else path.parts for path in paths]
    for n in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return {str(path): path for path in paths}


def curve_file(path):
    """A JSON file of curves, or the one in a folder -> its object, the file."""
    file = path if path.suffix == ".json" else path / "curves.json"
    if not file.exists():
        raise InputError(f"{file} is missing: give the folder of a finished run, or make it with eval.py curves")
    return read_json(file), file


def load_result(path):
    """Run folder or JSON file -> {"curves": {task: {"target", "arms"}}, "kind", "log"}, without tasks that have no
    samples. kind None: unknown, and there is nothing of the paper to compare with."""
    stored, file = curve_file(path)
    curves = {}
    try:
        for task in aia.TASKS:
            rows = stored.get(task) or {}
            arms = {name: rows[name] for name in ARMS if rows.get(name)}        # null: no samples
            for row in arms.values():
                check_lengths(row["intensity"], row["std"], rows["target"])
            if arms:
                curves[task] = {"target": rows["target"], "arms": arms}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): make it again with eval.py curves") from error
    if not curves:
        raise InputError(f"{file} holds no curves of a run: make it with eval.py curves (files of lab.references "
                         "belong after --references)")
    kind = stored.get("kind")
    run = file.with_name("settings.json")
    if not kind and run.exists():
        kind = getattr(model.PRESETS.get(read_json(run).get("preset")), "kind", None)
    return {"curves": curves, "kind": kind if kind in PAPER_MODEL else None,
            "log": training_log(path / "metrics.jsonl")}


def check_lengths(*curves):
    """ValueError unless all are lists of equally many numbers."""
    if len({len(np.asarray(curve, float)) for curve in curves}) > 1:
        raise ValueError("curves of different length")


def training_log(file):
    """Reports of a run so far; none if there is no log."""
    return [row for row in whole_lines(file) if {"name", "step"} <= set(row)]


def load_references(paths, paper):
    """{task: {name: curve}}: the paper's references, then those of lab.references."""
    found = {}
    for task in aia.TASKS:
        figure, name, direction = aia.RAW[task]      # what the targets follow; not all of it is in Fig. 4
        found[task] = {name: paper[figure][name][direction]}
        found[task] |= {name: row[direction] for name, row in paper["fig4"].items() if direction in row}
    for name, path in named(paths).items():
        stored, file = curve_file(path)
        rows = {task: stored[task] for task in aia.TASKS if isinstance(stored.get(task), dict)}
        own = {task: row["intensity"] for task, row in rows.items() if "intensity" in row}
        if not own or not all(map(is_curve, own.values())):
            raise InputError(f"--references {file} holds no reference curve: make it with lab.references")
        for task, curve in own.items():
            found[task][f"{name} (here)"] = curve    # the paper may have one of the same name
    return found


def is_curve(values):
    """Whether a JSON value is a list of at least three numbers."""
    return isinstance(values, list) and len(values) > 2 and all(isinstance(x, float | int) for x in values)


# ---------------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------------
def depths(n):
    """Relative depth of each of n layers, so that models of different depth share an axis."""
    return (np.arange(n) + 0.5) / n


def dotted(panel, curve, colour, label):
    """A digitised curve of the paper."""
    panel.plot(depths(len(curve)), curve, color=colour, label=label, **PAPER_STYLE)


def first_arm(rows):
    """(name, row) of the earliest model of a run for one task, before AIA if it was kept."""
    return next(iter(rows["arms"].items()))


def figure_1(runs, paper, references, file):
    """Intensity of both tasks per layer, before AIA, with a band of one standard deviation over samples: where one task
    is high the other is low (Fig. 1)."""
    arms = {name: first_arm(next(iter(run["curves"].values()))) for name, run in runs.items()}
    figure, panels = canvas([f"{name}, {label_of(*arms[name])}" for name in runs], YLABEL)
    numbers = {}
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        curves = []
        for task, rows in run["curves"].items():
            _, row = first_arm(rows)
            mean, std = np.array(row["intensity"]), np.array(row["std"])        # (L,) each
            depth = depths(len(mean))
            panel.plot(depth, mean, color=COLOUR[task], marker="o", markersize=4, label=TASK_NAME[task])
            panel.fill_between(depth, mean - std, mean + std, color=COLOUR[task], alpha=0.15, linewidth=0)
            if run["kind"]:
                key, title, _ = PAPER_MODEL[run["kind"]]
                dotted(panel, paper["fig1"][key][DIRECTION[task]], COLOUR[task], f"{TASK_NAME[task]}, {title} (paper)")
            curves.append(mean)
        numbers[name] = {"model": arms[name][0],
                         "correlation": correlation(*curves) if len(curves) == 2 else None,
                         "tasks": {task: described(rows, references[task]) for task, rows in run["curves"].items()}}
    save_figure(figure, panels, file)
    return numbers


def correlation(a, b):
    """Pearson's correlation over layers; None if a curve is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else None


def described(rows, references):
    """Numbers of each arm of one task: mean distance over layers to the target and to each reference, what even
    attention would give, and attention on the first token of each layer. The last two are None in older files."""
    layers = len(rows["target"])
    resampled = {name: np.array(aia.resample(curve, layers)) for name, curve in references.items()}
    found = {}
    for name, row in rows["arms"].items():
        curve = np.array(row["intensity"])
        found[name] = {"distance_to_target": distance(rows | rows["arms"], name),
                       "distance_to_references": {other: float(np.abs(curve - reference).mean())
                                                  for other, reference in resampled.items()},
                       "uniform": row.get("uniform"), "sink": row.get("sink")}
    return found


def table_1(runs):
    """Standard deviation of the intensity over samples: of each layer, and the mean over layers (Table 1)."""
    numbers = {}
    for name, run in runs.items():
        arms = {task: first_arm(rows)[1] for task, rows in run["curves"].items()}
        means = {task: float(np.mean(row["std"])) for task, row in arms.items()}
        mean = float(np.mean([*means.values()]))
        line = ", ".join(f"{TASK_NAME[task]} {value:.3f}" for task, value in means.items()) + f", mean {mean:.3f}"
        published = None
        if run["kind"]:
            _, title, published = PAPER_MODEL[run["kind"]]
            line += f" (paper: {title} {published})"
        print(f"Table 1, {name}: {line}")
        numbers[name] = means | {"mean": mean, "paper": published,
                                 "samples": {task: row.get("samples") for task, row in arms.items()},
                                 "layers": {task: row["std"] for task, row in arms.items()}}
    return numbers


def figure_3(runs, paper, file):
    """Next-token loss of several runs in their last phase, dashed without AIA, with the paper's at all of its ratios
    NTP : AIA (Fig. 3), of which 50:1 is lowest."""
    figure, panels = canvas([*TASK_NAME.values()], "next-token loss", "share of the phase's steps")
    for kind in sorted({run["kind"] for run in runs.values() if run["kind"]}):
        paper_losses(panels, paper, kind)
    numbers = {}
    for number, (name, run) in enumerate(runs.items()):
        for phase, label, line in (("control", f"{name}, without AIA", "--"), ("tune", name, "-")):
            for panel, task in zip(panels, aia.TASKS, strict=True):
                rows = [row for row in run["log"] if row["name"] == phase and task in row]
                if rows:
                    steps = [row["step"] for row in rows]
                    ntp = [row[task]["ntp"] for row in rows]
                    panel.plot(np.array(steps) / steps[-1], ntp, line, color=PALETTE[number % len(PALETTE)],
                               label=label)
                    numbers.setdefault(label, {})[task] = {"step": steps, "ntp": ntp}
    for panel in panels:
        panel.set_yscale("log")                      # vocabularies, and so losses, differ widely in size
    save_figure(figure, panels, file, None)
    return numbers


def paper_losses(panels, paper, kind):
    """Digitised losses of one of the paper's models, over the share of its steps."""
    key, title, _ = PAPER_MODEL[kind]
    colour, last = ("black", 50) if kind == "emu3" else ("#888888", 100)
    for label, points in paper["fig3"][key].items():
        for panel, task in zip(panels, aia.TASKS, strict=True):
            if label.startswith(("joint", DIRECTION[task])):
                step, loss = np.array(points).T
                panel.plot(step / step[-1], loss, color=colour, label=f"{title} (paper), 1:1 to {last}:1",
                           **PAPER_STYLE)


def figure_4(references, file):
    """Reference curves that targets can be made of: the paper's dotted, others solid (Fig. 4). Each task has references
    of its own, so each panel has its own legend."""
    figure, panels = canvas([*TASK_NAME.values()], YLABEL)
    figure.set_figheight(figure.get_figheight() + 0.9)                          # for nine names
    for panel, task in zip(panels, aia.TASKS, strict=True):
        for i, (name, curve) in enumerate(references[task].items()):
            if name.endswith(" (here)"):
                style = {"linewidth": 2}
            elif i < len(PALETTE):
                style = PAPER_STYLE
            else:                                    # the second round of colours
                style = PAPER_STYLE | {"linestyle": "-."}
            panel.plot(depths(len(curve)), curve, color=PALETTE[i % len(PALETTE)], label=name.replace("_", "-"),
                       **style)
        panel.step(depths(aia.DEPTH), aia.targets(aia.DEPTH, task)[0], where="mid", color=COLOUR["target"],
                   linewidth=1.5, label=LABEL["target"])
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    save_figure(figure, panels, file, legend=False)
    return references


def plot_arms(panel, x, rows):
    """One task over x (L,): the target, the intensity of each arm, and what even attention would give the last one."""
    panel.step(x, rows["target"], where="mid", color=COLOUR["target"], linewidth=1.5, label=LABEL["target"])
    even = None
    for name, row in rows["arms"].items():
        panel.plot(x, row["intensity"], color=ARM_COLOUR[name], marker="o", markersize=4, label=label_of(name, row))
        even = row.get("uniform")                   # older files have none
    if even is not None:
        panel.axhline(even, color="black", linewidth=0.8, linestyle="--", alpha=0.5, label="attention spread evenly")


def figure_5(runs, paper, file):
    """Without AIA, with it, and the target; the paper's own change dotted (Fig. 5)."""
    shown = [(name, task) for name in runs for task in aia.TASKS]
    figure, panels = canvas([f"{name}, {TASK_NAME[task]}" for name, task in shown], YLABEL)
    numbers = {}
    for panel, (name, task) in zip(panels, shown, strict=True):
        rows = runs[name]["curves"].get(task)
        kind = runs[name]["kind"]
        if not rows:
            panel.annotate("no samples", (0.5, 0.5), xycoords="axes fraction", ha="center")
            continue
        plot_arms(panel, depths(len(rows["target"])), rows)
        if kind:
            key, title, _ = PAPER_MODEL[kind]
            for which, arm in (("without", "before"), ("with", "after")):
                dotted(panel, paper["fig5"][f"{key}_{which}_aia"][DIRECTION[task]], ARM_COLOUR[arm],
                       f"{title} {which} AIA (paper)")
        numbers.setdefault(name, {})[task] = {arm: row["intensity"] for arm, row in rows["arms"].items()} | {
            "target": rows["target"]}
    save_figure(figure, panels, file)
    return numbers


WIDEST = 0.15                                       # of scores; wider intervals leave the panel, or hide all others


def joined(files):
    """Summaries and moves of several files of lab.study in one. The same row may stand in one of them only."""
    found = {"summary": {}, "moves": {}, "dates": []}
    for file in files:
        content = read_json(file)
        if not all(isinstance(content.get(key), dict) for key in ("summary", "moves", "machine")):
            raise InputError(f"--study {file}: {NOT_STUDY}")
        if twice := sorted({*found["summary"]} & {*content["summary"]}):
            raise InputError(f"--study {file}: {twice[0]} stands in another file, too; leave one out")
        found["summary"] |= content["summary"]
        found["moves"] |= content["moves"]
        found["dates"].append(content["machine"].get("date", ""))
    return found


def group_of(name):
    """The first group of a row, or of the row that it belongs to."""
    for begin in (name, name.partition("+")[0], name.removesuffix("-experts"), "unified"):
        if begin in ROWS and ROWS[begin].groups:
            return ROWS[begin].groups[0]
    return ""


def own_targets(name):
    """Whether a row has other targets than its baseline, or another condition, so that distances cannot be compared."""
    row = ROWS.get(name)
    return bool(row) and bool(row.targets or row.flags.get("aia_targets")
                              or row.flags.get("aia_variant") in ("raw", "no-first"))


def figure_study(content, file):
    """Both scores of each row minus those of its baseline with the same seed: mean and 95 % interval, grey and without
    one below three seeds; and how far its curves, and those of the baseline, are from the targets. Two experts share a
    row."""
    from matplotlib.figure import Figure
    summary = content["summary"]
    names = sorted((name for name in summary if summary[name]["baseline"]), key=group_of)
    lines = []                                                                  # a heading, or a row, for each line
    for name in names:
        lines += [GROUPS[group_of(name)]] * (not lines or group_of(lines[-1]) != group_of(name)) + [name]
    figure = Figure((11, 1.3 + 0.24 * len(lines)), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    for panel, task in zip(panels, ("und", "gen"), strict=False):
        for i, name in enumerate(lines):
            found = summary[name]["difference"][task] if name in summary else None
            if found:
                colour = COLOUR[task] if found["interval"] is not None else GREY
                panel.errorbar(found["mean"], -i, xerr=found["interval"], fmt="o", capsize=2.5, color=colour,
                               markersize=4.5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(TASK_NAME[task], fontsize=11, color=COLOUR[task])
        panel.set_xlabel("worse \N{LEFTWARDS ARROW} difference of scores \N{RIGHTWARDS ARROW} better\n"
                         "(bars that reach the edge go on)")
    most = min(max(abs(end) for panel in panels[:2] for end in panel.get_xlim()), WIDEST)
    for panel in panels[:2]:
        panel.set_xlim(-most, most)
    for i, name in enumerate(lines):
        for task, y in (("und", 0.17 - i), ("gen", -0.17 - i)) if name in summary else ():
            own, base = (summary[one][task].get("distance") for one in (name, summary[name]["baseline"]))
            if own is not None:
                panels[2].plot([own], [y], "|", color=COLOUR[task], markersize=5)
            if None not in (own, base) and not own_targets(name):
                panels[2].annotate("", (own, y), (base, y), arrowprops={
                    "arrowstyle": "->", "color": COLOUR[task], "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0})
                panels[2].plot([base], [y], "|", color=COLOUR[task], markersize=5)
    panels[2].set_xlim(0)
    panels[2].set_title("distance to the targets", fontsize=11)
    panels[2].set_xlabel("baseline \N{RIGHTWARDS ARROW} row\n(upper: understanding;\nalone: other targets)")
    panels[0].set_yticks([-i for i in range(len(lines))], [
        f"{TOLD.get(name, name)} \N{MINUS SIGN} {summary[name]['baseline']} ({len(summary[name]['paired'])})"
        if name in summary else name for name in lines], fontsize=8.5)
    for name, label in zip(lines, panels[0].get_yticklabels(), strict=True):
        label.set_weight("normal" if name in summary else "bold")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_ylim(0.5 - len(lines), 0.8)
    save_figure(figure, (), file)
    print(f"{file}: rows and their number of seeds, of {', '.join(content['dates'])}")


def figure_moves(content, file):
    """Does it help to move curves? The gain in the mean of both scores against how far the curves were moved, of all
    rows: a small mark for each seed, a large one for their mean, a colour for each group."""
    figure, (panel,) = canvas(["do scores follow the curves? (small: a seed, large: their mean)"],
                              "gain in the mean of both scores",
                              "how far curves were moved (mean over layers and tasks)", None)
    figure.set_size_inches(6, 4.6)
    groups = sorted({group_of(name) for name in content["moves"]})
    for name, points in sorted(content["moves"].items(), key=lambda item: group_of(item[0])):
        moved, gains = zip(*points, strict=True)
        i = groups.index(group_of(name))
        style = {"color": (*PALETTE, "black")[i % 7], "marker": "os^DvpP"[i % 7], "linestyle": ""}
        panel.plot(moved, gains, markersize=3, alpha=0.35, **style)
        panel.plot([np.mean(moved)], [np.mean(gains)], markersize=7, markeredgecolor="white",
                   label=GROUPS[groups[i]], **style)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xlim(0)
    save_figure(figure, [panel], file, None)


def main(argv=None):
    tell(figures(parse(Figures, argv, "python -m lab.figures")))


if __name__ == "__main__":
    run_command(main)
