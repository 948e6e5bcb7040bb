"""The one look of all figures: colours, panels, files."""

import textwrap
from pathlib import Path

from parts.settings import InputError, aside, check_out

VERMILION, BLUE, GREEN, SKY, GREY = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#999999"
PALETTE = (VERMILION, BLUE, GREEN, "#CC79A7", "#E69F00", SKY)                   # Okabe and Ito


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
