"""The papers in miniature: rows of their tables on the built-in world, each against a baseline of the same seed.

Several seeds, and a 95 % interval for every claim; AIA's Tables 1 and 3 and Fig. 3, and UniFork (arXiv 2506.17202).

    python -m lab.study --quick                 # five rows of one seed
    python -m lab.study                         # groups 1 and 2, five seeds: hours
    python -m lab.study --rows 6 --seeds 0      # the search for a conflict between the tasks
"""

from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np

import aia
import train
from eval import ARMS, MIXED_SCORES, distance
from formats.datasets import parse_ratio
from lab.alignment import Alignment, alignment
from lab.figures import correlation
from parts.settings import (
    InputError,
    check_out,
    machine,
    opt,
    parse,
    read_json,
    run_command,
    stoppable,
    tell,
    write_json,
)


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """A run of train.py for each seed."""

    groups: str                                     # a digit for each group it belongs to
    flags: dict                                     # its settings
    start: str = "aia/before"                       # weights of the same seed: ROW, or ROW/FOLDER of its run; "": none
    baseline: str = "unified"                       # the row it is compared with


OFF = {"aia_weight": "off"}
# Worlds and models in which the tasks may be in each other's way: chosen before any of them was run.
SETTINGS = {"half": {"preset": "tiny-half"}, "janus": {"preset": "tiny-janus"}, "words": {"shapes": 8, "colours": 8},
            "crowd": {"shapes": 6, "colours": 6, "objects": 4}}
SETTINGS |= {f"{one}-crowd": SETTINGS[one] | SETTINGS["crowd"] for one in ("half", "janus")}
EXPERTS = {task: {"ratio": ratio} | OFF for task, ratio in (("gen", "1:0"), ("und", "0:1"))}


def arms_of(name, groups, flags, start="aia/before", baseline="unified"):
    """The same flags without AIA, compared with a baseline, and with AIA, compared with the former."""
    return {name: Row(groups, flags | OFF, start, baseline), f"{name}+aia": Row(groups, flags, start, name)}


def setting_rows(name, flags, groups):
    """A setting from the beginning, with AIA and with a fork from its weights, and its experts if a conflict is
    searched for (group 6). The search leaves out AIA and fork: where it finds a conflict, they are run by name."""
    rows = {name: Row(groups, flags | OFF, "", ""),
            f"{name}+aia": Row(groups.strip("6"), flags, f"{name}/before", name),
            f"{name}+fork": Row("", flags | {"fork_layer": 2} | OFF, f"{name}/before", name)}
    if "6" in groups:
        rows |= {f"{name}-{task}": Row("6", flags | own, "", "") for task, own in EXPERTS.items()}
    return rows


def all_rows():
    """{name: Row}, group by group."""
    rows = {"aia": Row("1", {}, ""), "unified": Row("1", OFF, baseline="")}
    rows |= {f"expert-{task}": Row("1", flags, "", "") for task, flags in EXPERTS.items()}
    rows |= {f"unifork-{layer}": Row("1", {"fork_layer": layer} | OFF) for layer in (1, 2)}
    # Both from the beginning. The first weights of a picture tokenizer depend on the preset; these two share them.
    rows["wide"] = Row("1", {"preset": "tiny-wide"} | OFF, "", "")
    rows["unifork"] = Row("1", {"preset": "tiny-unifork"} | OFF, "", "wide")
    rows |= {variant: Row("2", {"aia_variant": variant}) for variant in ("raw", "no-huber")}
    rows |= {f"rho-{rho}": Row("2", {"rho": float(rho)}) for rho in (1, 10, 100)}
    rows |= {name: Row("2", {"aia_weight": name}) for name in ("paper", "released")}
    rows |= {name: Row("2", {"aia_targets": name}) for name in aia.REFERENCES}
    rows["experts-curves"] = Row("2", {"aia_targets": "experts"})
    for gen, und in ((2, 1), (4, 1), (1, 2)):
        rows |= arms_of(f"{gen}to{und}", "3", {"ratio": f"{gen}:{und}"})
    rows |= arms_of("tuned", "4", {"preset": "tiny-janus"}, "janus", "janus")
    rows |= arms_of("long", "5", {"steps": 3 * train.TUNE.steps})
    rows |= setting_rows("double", {"preset": "tiny-double"}, "5")
    for name, flags in SETTINGS.items():
        groups = {"half": "56", "janus": "46"}.get(name, "6")
        rows |= setting_rows(name, flags, groups)
    # Pictures and text in turn, all from the beginning: what AIA, a second encoder and a fork make of it.
    mixed = {name: {"preset": f"tiny-{name}"} | train.SETTINGS_OF[f"tiny-{name}"] for name in (
        "mixed", "mixed-janus", "mixed-codes", "mixed-fork")}
    rows |= arms_of("mixed", "7", mixed["mixed"], "", "")
    rows["mixed+aia"] = replace(rows["mixed+aia"], start="mixed/before")
    baselines = {"mixed-janus": "", "mixed-codes": "mixed-janus", "mixed-fork": "mixed"}
    return rows | {name: Row("7", mixed[name] | OFF, "", base) for name, base in baselines.items()}


ROWS = all_rows()
# {unified model: (how the names of its two experts begin, the row that joins them)}
PAIRS = {"unified": ("expert", "experts")} | {name: (name, f"{name}-experts") for name in SETTINGS}
PUBLISHED = Path("assets/study.json")
QUICK = ("aia", "unified", "unifork-2", "raw", "no-huber")
# 97.5 % point of Student's t for 1, 2, ... degrees of freedom; with more seeds the last, which is a little too wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Study:
    """Run the rows of the study that are not finished, and write tables of all finished ones. Stop it at any time; the
    same command goes on."""

    rows: tuple = opt(("1", "2"), "groups 1 to 7, or names of rows")
    seeds: tuple = opt(("0", "1", "2", "3", "4"), "seeds: each has its own world, held-out combinations and order")
    quick: bool = opt(False, "five rows of one seed: shows how it works, not what is true")
    runs: str = opt("runs/study", "folder of the runs")
    out: str = opt("", "JSON file to write; empty: assets/study.json, or study.json in the folder of runs with --quick "
                   "or if assets/study.json holds runs that are not in that folder")


def study(settings):
    """All rows and seeds, one after the other -> {claim: verdict}."""
    names = chosen_rows(settings)
    seeds = settings.seeds[:1] if settings.quick else settings.seeds
    runs = Path(settings.runs)
    todo = [(int(seed), name) for seed in seeds for name in names]
    published = runs_in(read_json(PUBLISHED)["rows"]) if PUBLISHED.exists() else set()
    for number, (seed, name) in enumerate(todo, 1):
        print(f"== {name}, seed {seed}: row {number} of {len(todo)}")
        run_row(name, seed, runs)
        found = finished_rows(runs)
        content = {"summary": summary_of(found), "claims": claims_of(found), "rows": found, "machine": machine()}
        complete = published <= runs_in(found) and not settings.quick           # nothing published would be lost
        out = settings.out or (PUBLISHED if complete else runs / "study.json")
        write_json(content, out)
    print_rows(content["summary"])
    print_conflicts(content["summary"])
    print_claims(content["claims"])
    print(f"written to {out}")
    return {claim["claim"]: claim["verdict"] for claim in content["claims"]}


def chosen_rows(settings):
    """Names of the rows that were asked for, after those they need; refuses what cannot be run."""
    groups = {group for row in ROWS.values() for group in row.groups}
    unknown = {*settings.rows} - {*ROWS} - groups
    names = QUICK
    if not settings.quick:
        names = [name for name, row in ROWS.items() if {name, *row.groups} & {*settings.rows}]
    if unknown or not names:
        raise InputError(f"--rows {' '.join(sorted(unknown))}: give groups 1 to 7, or some of {', '.join(ROWS)}")
    if not (settings.seeds and all(seed.isdecimal() for seed in settings.seeds)):
        raise InputError(f"--seeds {' '.join(settings.seeds)}: give whole numbers")
    check_out(settings.out)
    return list(dict.fromkeys(needed for name in names for needed in (*needs(name), name)))


def runs_in(rows):
    """{(row, seed)} of the rows of a study."""
    return {(row["row"], row["seed"]) for row in rows}


def needs(name):
    """The rows that must be run before this one, for the weights it starts from or the curves that are its targets."""
    row = ROWS[name]
    rows = []
    if row.flags.get("aia_targets") == "experts":
        rows += [f"expert-{task}" for task in EXPERTS]
    if start := row.start.partition("/")[0]:
        rows += [*needs(start), start]
    return rows


def run_row(name, seed, runs):
    """Run one row of one seed, or continue it, unless it is finished."""
    row = ROWS[name]
    folder = runs / f"{name}-seed{seed}"
    start, _, part = row.start.partition("/")
    flags = {"seed": seed, "out": str(folder), "resume": folder.exists()} | row.flags
    flags["init"] = str(runs / f"{start}-seed{seed}" / part) if start else ""
    if row.flags.get("aia_targets") == "experts":
        flags["aia_targets"] = str(experts_targets(runs, seed))
    config = train.TrainConfig(**flags)
    if (folder / "result.json").exists():
        stored = read_json(folder / "settings.json")
        # Paths of what it started from: the whole folder may have been moved.
        ours = {field: getattr(config, field) for field in ("init", "aia_targets") if stored.get(field)}
        train.check_settings(stored | ours, config, folder)
    else:
        phases = train.plan(config)
        if 0 in parse_ratio(config.ratio)[:2]:      # an expert: as many samples of its task a step as a unified model
            phases = [phase if phase.ratio or phase.pictures else replace(phase, batch_size=phase.batch_size // 2)
                      for phase in phases]
        train.train(config, phases)
    if "1" in row.groups and not (folder / "alignment.json").exists():
        alignment(Alignment(checkpoint=str(folder), n=512))


# ---------------------------------------------------------------------------------------------------------------------
# Reading what they gave
# ---------------------------------------------------------------------------------------------------------------------
def finished_rows(runs):
    """What `read_row` keeps of each finished run in a folder, in the order of ROWS."""
    found = []
    for name, row in ROWS.items():
        files = ["result.json", "settings.json"]
        if "1" in row.groups:
            files.append("alignment.json")
        rows = []
        for folder in runs.glob(f"{name}-seed*"):
            if all((folder / file).exists() for file in files):
                seed = read_json(folder / "settings.json")["seed"]
                if folder.name == f"{name}-seed{seed}":                         # no copy under another name
                    rows.append(read_row(name, seed, folder))
        found += sorted(rows, key=itemgetter("seed"))
    return found


def check_weights(scores, curves, folder):
    """Refuse scores and curves of a run that were not measured on the same weights. Older runs do not say."""
    for name in ARMS:
        scored = scores if name == "after" else scores.get(name, {})
        measured = [curves[task][name] for task in aia.TASKS if curves[task].get(name)]
        if len({row.get("weights") for row in [scored, *measured]} - {None}) > 1:
            raise InputError(f"{folder}: scores.json and curves.json belong to different weights ({name}): measure "
                             "them again (eval.py curves), or remove the folder for another run")


def read_row(name, seed, folder):
    """Scores, losses on held-out samples, distances to the targets, seconds and GB; curves, parts of the scores and
    alignment where there are any."""
    result = read_json(folder / "result.json")
    curves = read_json(folder / "curves.json")
    row = {"row": name, "seed": seed} | {key: result[key] for key in ("und", "gen", "seconds")}
    for task in aia.TASKS:
        tuned, before = curves[task]["after"], curves[task].get("before")
        if tuned:
            row |= {f"{task}_curve": tuned["intensity"], f"ntp_{task}": tuned["ntp"], f"aia_{task}": tuned["aia"],
                    f"distance_{task}": distance(curves[task], "after"), f"std_{task}": float(np.mean(tuned["std"]))}
        if tuned and before:
            row[f"aia_before_{task}"] = before["aia"]
    scores = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    check_weights(scores, curves, folder)
    if "und_by_kind" in scores:                     # older runs
        scores["und_by_topic"] = scores["und_by_kind"]
    row |= {key: part[key] for part in (result, scores) for key in DETAILS if key in part}
    if (folder / "alignment.json").exists():
        aligned = read_json(folder / "alignment.json")
        row["alignment"] = {task: aligned[task]["score"]["10"] for task in aia.TASKS}
    return row


def experts_targets(runs, seed):
    """Write targets made of the curves of this seed's experts -> their file."""
    file = runs / f"experts-seed{seed}.json"
    table = {}
    for task in aia.TASKS:
        curve = read_json(runs / f"expert-{task}-seed{seed}/curves.json")[task]["after"]["intensity"]
        table[task] = aia.stages_from_curve(curve, task)
    write_json(table, file)
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Means, intervals, differences
# ---------------------------------------------------------------------------------------------------------------------
def interval(values):
    """Mean and half of its 95 % interval (Student's t); None for fewer than three seeds."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, None
    return mean, float(STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * np.std(values, ddof=1) / len(values) ** 0.5)


def mean_of(values):
    """Mean of numbers, or of each entry of lists, or of dicts with equal keys."""
    if isinstance(values[0], dict):
        return {key: mean_of([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return np.mean(values, 0).tolist()
    return float(np.mean(values))


def mean_score(row):
    """Mean of understanding and generation."""
    return (row["und"] + row["gen"]) / 2


MEASURES = ("ntp", "aia_before", "aia", "distance")                             # of each task
DETAILS = ("und_by_topic", "gen_by_skill", "reader", "psnr", "rss_gb",          # of a run; some have not all
           *MIXED_SCORES, "plain_by_skill", "plan_by_skill", "edit_by_kind", "story", "chance")
COMPARED = {key: itemgetter(key) for key in ("und", "gen", "ntp_und", "ntp_gen")} | {"both": mean_score}


def summary_of(rows):
    """{row: its seeds and seconds, both scores with mean and interval, means of MEASURES and DETAILS; differences to
    its baseline, paired by seed, of scores, of their mean ("both") and of next-token losses}. Two experts make one row
    more."""
    table = by_row(rows)
    baselines = {name: row.baseline for name, row in ROWS.items()} | {joint: name for name, (_, joint) in PAIRS.items()}
    result = {}
    for name, seeds in table.items():
        base = table.get(baselines[name], {})
        shared = sorted({*seeds} & {*base})
        runs = [*seeds.values()]
        summary = {"seeds": sorted(seeds), "seconds": mean_of([row["seconds"] for row in runs]),
                   "baseline": baselines[name] if shared else "", "paired": shared} | means_of(runs, DETAILS)
        for task in aia.TASKS:
            mean, half = interval([row[task] for row in runs])
            summary[task] = {"mean": mean, "interval": half} | means_of(runs, MEASURES, f"_{task}")
        if shared:
            summary["difference"] = {}
            for key, value in COMPARED.items():
                mean, half = interval([value(seeds[seed]) - value(base[seed]) for seed in shared])
                summary["difference"][key] = {"mean": mean, "interval": half}
        result[name] = summary
    return result


def means_of(runs, keys, ending=""):
    """{key: mean of the runs' key + ending}, without keys that some run lacks."""
    shared = [key for key in keys if all(key + ending in run for run in runs)]
    return {key: mean_of([run[key + ending] for run in runs]) for key in shared}


def by_row(rows):
    """{row: {seed: row}}; "experts" joins understanding of one expert and generation of the other, and so do the rows
    of the other settings."""
    table = {}
    for row in rows:
        table.setdefault(row["row"], {})[row["seed"]] = row
    for prefix, joint in PAIRS.values():
        for seed in sorted({*table.get(f"{prefix}-gen", {})} & {*table.get(f"{prefix}-und", {})}):
            experts = {task: table[f"{prefix}-{task}"][seed] for task in aia.TASKS}
            row = {"seconds": sum(expert["seconds"] for expert in experts.values())}
            for task, expert in experts.items():
                row |= {key: value for key, value in expert.items() if key.startswith(task) or key.endswith(task)}
            if all("alignment" in expert for expert in experts.values()):
                row["alignment"] = {task: expert["alignment"][task] for task, expert in experts.items()}
            table.setdefault(joint, {})[seed] = row
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Claims of the papers
# ---------------------------------------------------------------------------------------------------------------------
def verdict(mean, interval):
    """Whether a claim holds, given a figure that is above zero if it does."""
    decided = interval is not None and abs(mean) > interval > 0                 # 0: equal by chance, scores have steps
    if not decided:
        return "not decided here"
    return "holds" if mean > 0 else "does not hold"


def gap(row, other):
    """Mean distance of the curves of two rows, both tasks."""
    return float(np.mean([np.abs(np.array(row[f"{task}_curve"]) - other[f"{task}_curve"]) for task in aia.TASKS]))


def better(row, *others):
    """How much better a row is than each of the others."""
    return [mean_score(row) - mean_score(other) for other in others]


def between(experts, shared):
    """How far, in the last layer, the shared model's alignment is below the experts' in understanding, and above in
    generation."""
    und, gen = (experts["alignment"][task][-1] - shared["alignment"][task][-1] for task in ("und", "gen"))
    return [und, -gen]


def in_turn(row):
    """Mean of the scores of pictures and text in turn."""
    return float(np.mean([row[name] for name in ("edit", "consistent", "plan", "third")]))


def coloured(row):
    """What a plan adds to colour attribution."""
    return row["plan_by_skill"]["colour attribution"] - row["plain_by_skill"]["colour attribution"]


MARGIN = 0.02                                   # a smaller loss counts as none

# Claim, the rows it needs, and their number for each seed, above zero if the claim holds; or several such numbers.
CLAIMS = (
    ("the two tasks' curves correlate negatively", ("unified",),
     lambda plain: -(correlation(plain["gen_curve"], plain["und_curve"]) or 0.0)),
    ("patterns are stable over inputs (deviation below the paper's 0.13 of Emu3)", ("unified",),
     lambda plain: 0.13 - (plain["std_gen"] + plain["std_und"]) / 2),
    ("more decoupling moves curves towards the experts", ("unified", "unifork-1", "experts"),
     lambda plain, forked, experts: gap(plain, experts) - gap(forked, experts)),
    ("AIA moves curves towards the targets", ("unified", "aia"),
     lambda plain, tuned: sum(plain[f"distance_{task}"] - tuned[f"distance_{task}"] for task in aia.TASKS) / 2),
    ("AIA improves understanding", ("unified", "aia"), lambda plain, tuned: tuned["und"] - plain["und"]),
    ("AIA improves generation", ("unified", "aia"), lambda plain, tuned: tuned["gen"] - plain["gen"]),
    ("Huber matters", ("aia", "no-huber"), better),
    ("stages matter", ("aia", "raw"), better),
    ("rho has a middle optimum: 50 beats 1 and 100", ("aia", "rho-1", "rho-100"), better),
    ("1:1 is the best ratio with AIA", ("aia", "2to1+aia", "4to1+aia", "1to2+aia"), better),
    ("unified training is worse than the experts (a conflict)", ("experts", "unified"), better),
    ("alignment rises in understanding", ("experts",),
     lambda experts: experts["alignment"]["und"][-1] - experts["alignment"]["und"][0]),
    ("alignment rises and falls in generation", ("experts",),
     lambda experts: max(experts["alignment"]["gen"][1:-1]) - max(experts["alignment"]["gen"][i] for i in (0, -1))),
    ("the shared model's alignment lies between: below the expert's in understanding, above in generation (last layer)",
     ("experts", "unified"), between),
    ("at half width unified training is worse than the experts (a conflict)", ("half-experts", "half"), better),
    ("at half width AIA improves the mean of both scores", ("half+aia", "half"), better),
    ("at half width forked beats shared", ("half+fork", "half"), better),
    ("forked beats shared", ("unifork-2", "unified"), better),
    ("forked beats shared of the same size", ("unifork", "wide"), better),
    ("a plan improves colour attribution", ("mixed",), coloured),
    ("a plan improves colour attribution (Janus-Pro)", ("mixed-janus",), coloured),
    ("a plan improves the mean of all skills", ("mixed",), lambda row: row["plan"] - row["plain"]),
    ("AIA keeps what is done in turn (it loses less than 0.02)", ("mixed", "mixed+aia"),
     lambda plain, tuned: in_turn(tuned) - in_turn(plain) + MARGIN),
    ("a second encoder has to look again", ("mixed-janus", "mixed-codes"),
     lambda looking, blind: in_turn(looking) - in_turn(blind)),
    ("a fork costs what is done in turn", ("mixed", "mixed-fork"),
     lambda shared, forked: in_turn(shared) - in_turn(forked)),
)


def claims_of(rows):
    """Verdict of each claim. Of several numbers one clear failure rejects it, and it holds only if all hold; the figure
    is the smallest of those that decided."""
    table = by_row(rows)
    found = []
    for claim, names, number in CLAIMS:
        seeds = sorted(set.intersection(*({*table.get(name, {})} for name in names)))
        values = [np.atleast_1d(number(*(table[name][seed] for name in names))) for seed in seeds]
        parts = [interval(part) for part in zip(*values, strict=True)] or [(None, None)]
        verdicts = [verdict(*part) for part in parts]
        decision = next((one for one in ("does not hold", "not decided here") if one in verdicts), "holds")
        mean, half = min((part for part in parts if verdict(*part) == decision), key=itemgetter(0))
        found.append({"claim": claim, "verdict": decision, "figure": mean, "interval": half, "seeds": len(seeds)})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables in Markdown
# ---------------------------------------------------------------------------------------------------------------------
def with_interval(mean, interval, sign="+"):
    """Mean with its interval, if it has one."""
    text = f"{mean:{sign}.3f}"
    return text if interval is None else f"{text} ± {interval:.3f}"


def print_table(title, heads, rows):
    """A title, and rows of cells."""
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


def print_rows(summary):
    """Scores, losses and distances of each row; experts only as pairs."""
    alone = {f"{prefix}-{task}" for prefix, _ in PAIRS.values() for task in EXPERTS}
    tasks = ("und", "gen")
    rows = []
    for name, row in summary.items():
        if name in alone:
            continue
        base = row["baseline"] or "-"
        if row["baseline"] and row["paired"] != row["seeds"]:
            base += f" ({len(row['paired'])})"
        cells = [name, str(len(row["seeds"]))]
        cells += [with_interval(row[task]["mean"], row[task]["interval"], "") for task in tasks]
        cells += [base]
        cells += [with_interval(**row["difference"][task]) if row["baseline"] else "-" for task in tasks]
        cells += [f"{row[task]['ntp']:.4f}" if "ntp" in row[task] else "-" for task in tasks]
        cells += [f"{row[task]['aia_before']:.4f} -> {row[task]['aia']:.4f}" if "aia_before" in row[task] else "-"
                  for task in tasks]
        cells += [f"{row[task]['distance']:.3f}" if "distance" in row[task] else "-" for task in tasks]
        rows.append([*cells, f"{row['seconds'] / 60:.1f}"])
    print_table("Rows", ("row", "seeds", "understanding", "generation", "difference to", "und", "gen", "loss und",
                         "gen", "L_AIA und", "gen", "distance und", "gen", "minutes"), rows)


def print_conflicts(summary):
    """What two experts gain over a unified model."""
    rows = []
    for name, (_, joint) in PAIRS.items():
        row = summary.get(joint)
        if row and row["baseline"]:
            cells = [with_interval(**row["difference"][key]) for key in ("und", "gen", "ntp_und", "ntp_gen")]
            rows.append([name, str(len(row["paired"])), *cells, verdict(**row["difference"]["both"])])
    print_table("What two experts gain over a unified model (a conflict: scores above 0, losses below 0)",
                ("setting", "seeds", "understanding", "generation", "loss und", "loss gen", "conflict"), rows)


def print_claims(claims):
    """Verdicts, with the figures they rest on."""
    rows = []
    for claim in claims:
        figure = with_interval(claim["figure"], claim["interval"]) if claim["seeds"] else "-"
        rows.append([claim["claim"], claim["verdict"], figure, str(claim["seeds"])])
    print_table("Claims", ("claim", "verdict", "figure (above 0 where it holds)", "seeds"), rows)


def main(argv=None):
    settings = parse(Study, argv, "python -m lab.study")
    tell(stoppable(lambda: study(settings), "continue with the same command"))


if __name__ == "__main__":
    run_command(main)
