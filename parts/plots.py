"""The one look of all figures: colours, panels, files."""

import textwrap
from pathlib import Path

import numpy as np

import aia
from parts.settings import InputError, aside, check_out

VERMILION, BLUE, GREEN, SKY, GREY = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#999999"
COLOUR = {"gen": VERMILION, "und": BLUE, "target": "black"}
PALETTE = (VERMILION, BLUE, GREEN, "#CC79A7", "#E69F00", SKY)                   # Okabe and Ito
TASK_NAME = {"gen": "generation", "und": "understanding"}
ARMS = ("before", "control", "after", "public")     # models of a run in the order of training, or public weights
LABEL = {"before": "before AIA", "control": "same steps, without AIA", "after": "with AIA", "target": "target",
         "public": "the model"}
WITHOUT = "at the end, without AIA"


def canvas(titles, ylabel, xlabel="relative depth", ends=(0, 1), shared=True):
    """Panels, two in a row, in the one look of all figures. ends: of the x axis; None: those of the data. shared: all
    have the same y axis."""
    from matplotlib.figure import Figure
    columns = min(len(titles), 2)
    rows = (len(titles) + 1) // 2
    figure = Figure((4.5 * columns, 3.4 * rows + 0.5), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=shared, squeeze=False)
    for panel in panels[:, 0]:
        panel.set_ylabel(ylabel)
    for panel in panels.flat[len(titles):]:
        panel.remove()
    panels = panels.flat[:len(titles)]
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel(xlabel)
        if ends:
            panel.set_xlim(ends)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def check_figure(file, flag="--out"):
    """Refuse a file of a flag that no figure can be written to, before hours of work for it. Empty: none is given."""
    from matplotlib.figure import Figure
    check_out(file, flag)
    ending = Path(file).suffix[1:].lower() or "png"
    if ending not in Figure().canvas.get_supported_filetypes():
        raise InputError(f"{flag} {file} cannot be written: give a file that ends in .png")


def save_figure(figure, panels, file, bottom=0, legend=True):
    """Write the file, with a legend below all panels that names each label once. bottom: of the y axis; None: that of
    the data."""
    entries = {}                                                                # {label: handle}
    for panel in panels:
        panel.set_ylim(bottom=bottom)
        handles, labels = panel.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    if legend and entries:
        width = 0.6 + 0.075 * max(map(len, entries))                            # of a column, in inches
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", frameon=False, fontsize=9,
                      ncols=max(int(figure.get_figwidth() / width), 1))
    with aside(file) as part:
        figure.savefig(part, format=Path(file).suffix[1:] or "png")


# Tasks differ in marker and line, not in colour alone, so that a grey print will do; models differ in filling.
TASK_STYLE = {"gen": {"marker": "o", "linestyle": "-"}, "und": {"marker": "s", "linestyle": "--"}}
FILLING = {"before": {"markerfacecolor": "white", "linestyle": ""}, "control": {"marker": "x", "linestyle": ""},
           "target": {"alpha": 0.3, "linestyle": ""}}
BESIDE = {"gen": -0.14, "und": 0.14}                # so that the two tasks of a layer do not cover each other
WHOSE = "Attention that image tokens pay to the text (generation), and answer tokens to the image (understanding)"


def label_of(name, row):
    """Label of a model beside its curve: the one stored with it, or the usual one."""
    return row.get("label", LABEL[name])


def plot_task(panel, task, target, arms):
    """One task in the panel of both; arms {name: row of curves.json}. Each layer has its target as a pale spot, the
    intensity of each arm, and an arrow from before to after."""
    x = np.arange(len(target)) + BESIDE[task]                                   # (L,)
    size = 7 if len(x) < 12 else 4.5                                            # of a marker, in points
    style = {"color": COLOUR[task], "markersize": size, "linewidth": 0.8} | TASK_STYLE[task]
    panel.plot(x, target, **style | FILLING["target"] | {"markersize": 1.7 * size})
    for name, row in arms.items():
        panel.plot(x, row["intensity"], **style | FILLING.get(name, {}))
    if {"before", "after"} <= arms.keys():
        look = {"arrowstyle": "-|>", "color": COLOUR[task], "mutation_scale": 1.3 * size, "shrinkA": 0,
                "shrinkB": size / 2}                                            # the tip ends at the filled marker
        least = 0.03 * panel.get_ylim()[1]                                      # a shorter arrow would be all head
        for at, begin, end in zip(x, arms["before"]["intensity"], arms["after"]["intensity"], strict=True):
            if abs(end - begin) > least:
                panel.annotate("", (at, end), (at, begin), arrowprops=look, zorder=1.5)     # markers are above it
    panel.plot([], [], **style, label=TASK_NAME[task])


def curve_caption(run, rows):
    """What the curves are, of which run, over how many samples. rows: one of each task; older files know less."""
    told = [run]
    for words, key, form in (("samples of each task:", "samples", "d"),
                             ("if spread evenly over the visible tokens:", "uniform", ".2f")):
        values = dict.fromkeys(format(row[key], form) for row in rows if key in row)
        told.append(values and f"{words} {' and '.join(values)}")
    return WHOSE + "\n" + textwrap.fill("; ".join(filter(None, told)), 120)


def plot_curves(result, file):
    """Intensity per layer of both tasks in one panel; result: what curves.json holds."""
    figure, (panel,) = canvas([""], "attention intensity (Eq. 1):\nshare on the other modality",
                              "layer, from the input (0) to the output", None)
    figure.set_figwidth(8.4)
    labels, last = {}, []
    for task in aia.TASKS:
        arms = {name: result[task][name] for name in ARMS if result[task].get(name)}
        labels |= {name: label_of(name, row) for name, row in arms.items()}
        if arms:                                    # else no samples
            plot_task(panel, task, result[task]["target"], arms)
            last.append([*arms.values()][-1])
    for name, label in (labels | {"target": LABEL["target"]}).items():
        style = {"color": "black", "marker": "o", "linestyle": "", "markersize": 10 if name == "target" else 6}
        panel.plot([], [], **style | FILLING.get(name, {}), label=label)
    panel.set_title(curve_caption(result.get("run"), last), fontsize=9, loc="left")
    panel.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, [panel], file)


def plot_samples(rows, file):
    """A sheet of what a model drew and said: rows (name, [(asked, picture or None, said, right), ...]). A panel shows
    the picture, or in its place what was said; framed green and ticked if right, red and crossed if not."""
    from matplotlib.figure import Figure
    width = max(len(shown) for _, shown in rows)
    figure = Figure((1.8 * width, 2.55 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), width, squeeze=False)
    for row, (name, shown) in zip(panels, rows, strict=True):
        for panel, (asked, picture, said, right) in zip(row, shown, strict=False):
            colour, mark = (GREEN, "\N{CHECK MARK}") if right else (VERMILION, "\N{BALLOT X}")
            if picture is None:
                panel.text(0.5, 0.5, textwrap.fill(said, 12), ha="center", va="center", fontsize=12,
                           transform=panel.transAxes)
                panel.set_box_aspect(1)
            else:
                panel.imshow(picture, interpolation="nearest")
            panel.set_title(textwrap.fill(asked, 27), fontsize=7.5)
            panel.set_xlabel(f"{said} {mark}" if picture is not None else mark, fontsize=9, color=colour)
            panel.set(xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set(color=colour, linewidth=2)
        for panel in row[len(shown):]:
            panel.axis("off")
        row[0].set_ylabel(name, fontsize=9)
    save_figure(figure, (), file)
