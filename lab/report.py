"""Runs on one page that opens from disk: pictures, losses, scores and settings, nothing loaded from elsewhere.

    python -m lab.report runs/tiny-emu3-seed0
"""

import base64
import html
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import aia
from eval import distance, final_label
from lab.figures import load_result, named, training_log
from parts.plots import BLUE, LABEL, TASK_NAME, VERMILION, canvas, label_of, save_figure
from parts.settings import InputError, aside, opt, parse, read_json, run_command, tell


@dataclass(frozen=True)
class Report:
    """Put runs on one page that opens from disk: samples, curves, losses, scores, settings."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders")
    out: str = opt("report.html", "HTML file to write")


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } img { max-width: 100%; height: auto } details { margin: 1rem 0 }
h2 { margin-top: 3rem; border-top: 2px solid #222; padding-top: 1rem } td { font-variant-numeric: tabular-nums }
summary { cursor: pointer }"""
REPORT_PICTURES = {"samples": "Drawings of held-out prompts", "curves": "Attention on the other modality, by layer",
                   "alignment": "Alignment of text and picture, by layer"}
SCORED = {"und": "questions about held-out pictures, accuracy", "gen": "drawings of held-out prompts, share correct",
          "reader": "held-out pictures still readable after encode and decode, share",
          "psnr": "picture tokenizer, PSNR in dB",
          "val_ntp_gen": "next-token loss on held-out pictures", "val_ntp_und": "next-token loss on held-out answers",
          "aia_gen": "L_AIA of generation", "aia_und": "L_AIA of understanding", "seconds": "training, seconds",
          "rss_gb": "memory, GB"}
SCORED_BY = {"und_by_topic": "Questions, accuracy", "und_by_kind": "Questions, accuracy",       # the latter: older runs
             "gen_by_skill": "Drawings, share correct"}


def report(settings):
    """Write one self-contained HTML file."""
    if not settings.runs:
        raise InputError("report needs run folders: python -m lab.report runs/tiny-emu3-seed0")
    runs = named(settings.runs)
    parts = [section(name, path, Path(settings.out).resolve().parent) for name, path in runs.items()]
    title = html.escape(", ".join(runs))
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
            f"<h1>Attention Interaction Alignment</h1><p>{title}; {time.strftime('%Y-%m-%d')}</p>"
            f"{''.join(parts)}</html>")
    with aside(settings.out) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{settings.out}: {len(page) / 1e6:.1f} MB")
    return {"out": settings.out, "runs": len(parts)}


def stored(folder, name):
    """The object in a JSON file of a run; {} if there is no such file yet."""
    file = folder / f"{name}.json"
    return read_json(file) if file.exists() else {}


def section(name, folder, page):
    """One run as HTML, pictures first. page: the folder that the page will lie in."""
    if not (folder / "settings.json").exists():
        raise InputError(f"{folder} holds no settings.json: give the folder of a run")
    result = stored(folder, "result")
    text = [f"<h2>{html.escape(name)}</h2>"]
    if not result:
        text.append("<p>This run has no result yet.</p>")
    text.append(html_table({SCORED[key]: result[key] for key in SCORED if result.get(key) is not None}))
    for part, title in REPORT_PICTURES.items():
        file = folder / f"{part}.png"
        if file.exists():
            text.append(html_picture(title, file.read_bytes()))
        if part == "curves" and (folder / "curves.json").exists():
            text += ["<p>Mean distance to the target:</p>", html_table(distances(folder))]
    log = [row for row in training_log(folder / "metrics.jsonl") if set(aia.TASKS) & set(row)]
    if log:                                          # without the picture tokenizer, which has other losses
        text.append(html_picture("Losses of all phases", plot_losses(log)))
    text += score_tables(folder)
    if (folder / "explore.html").exists():           # of lab.explore
        link = quote(Path(os.path.relpath(folder.resolve() / "explore.html", page)).as_posix())
        text.append(f'<p><a href="{link}">Attention maps to play with</a></p>')
    for title, rows in (("Machine", result.get("machine")), ("Settings", stored(folder, "settings"))):
        if rows:
            text.append(f"<details><summary>{title}</summary>{html_table(rows)}</details>")
    return "".join(text)


def distances(folder):
    """{task and model: mean distance of its curve to the target}."""
    found = {}
    for task, row in load_result(folder)["curves"].items():
        for arm, curve in row["arms"].items():
            found[f"{TASK_NAME[task]}, {label_of(arm, curve)}"] = distance(row | row["arms"], arm)
    return found


def score_tables(folder):
    """Scores by topic and skill, with a column for each model of the run, and benchmarks scored into its folder."""
    scores = stored(folder, "scores")
    arms = [arm for arm in ("before", "control") if arm in scores]
    text = []
    for key, title in SCORED_BY.items():
        if key in scores:
            columns = [*(scores[arm].get(key, {}) for arm in arms), scores[key]]
            heads = [*(LABEL[arm] for arm in arms), final_label(folder)]
            rows = {name: [column.get(name) for column in columns] for name in scores[key]}
            text += [f"<h3>{title}</h3>", html_table(rows, "", *heads)]
    for file in sorted(folder.glob("*/scores.json")):
        text += [f"<h3>{html.escape(file.parent.name)}</h3>", html_table(read_json(file))]
    return text


def plot_losses(log):
    """Next-token loss and L_AIA of each report, the phases of a run one after the other -> PNG, as bytes."""
    figure, panels = canvas([*TASK_NAME.values()], "loss", "step, all phases", None)
    start = {}                                       # {phase: steps before it}
    ends = {}
    for row in log:                                  # in the order of training
        start.setdefault(row["name"], max(ends.values(), default=0))
        ends[row["name"]] = start[row["name"]] + row["step"]
    for panel, task in zip(panels, aia.TASKS, strict=True):
        for key, colour, label in (("ntp", BLUE, "next-token loss"), ("aia", VERMILION, "L_AIA")):
            for number, (name, first) in enumerate(start.items()):
                rows = [row for row in log if row["name"] == name and task in row and key in row[task]]
                panel.plot([first + row["step"] for row in rows], [row[task][key] for row in rows], color=colour,
                           label=label if number == 0 else None)
        panel.set_yscale("log")
        panel.margins(y=0.15)                        # room for the names
        for name, first in start.items():
            panel.axvline(first, color="#bbbbbb", linewidth=0.8)
            panel.annotate(f" {name}", (first, 0.99), xycoords=panel.get_xaxis_transform(), va="top", fontsize=8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.png"
        save_figure(figure, panels, file, None)
        return file.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------------------------------
def html_picture(title, png):
    """A picture that is part of the page."""
    code = base64.b64encode(png).decode()
    return f'<h3>{html.escape(title)}</h3><img alt="{html.escape(title)}" src="data:image/png;base64,{code}">'


def html_table(rows, *heads):
    """{first cell: second cell} as a table, or with heads {first cell: [the other cells]}."""
    lines = []
    if heads:
        lines.append("<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>")
    for key, value in rows.items():
        cells = "".join(f"<td>{cell_text(cell)}</td>" for cell in (value if heads else [value]))
        lines.append(f"<tr><td>{html.escape(str(key))}</td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def cell_text(value):
    """A value as HTML: numbers with four digits, nested values on one line."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{html.escape(str(key))} {cell_text(x)}" for key, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value)) or "none"
    return html.escape(str(value))


def main(argv=None):
    tell(report(parse(Report, argv, "python -m lab.report")))


if __name__ == "__main__":
    run_command(main)
