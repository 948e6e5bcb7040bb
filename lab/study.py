"""The papers in miniature: each row against a baseline of the same seed, several seeds, an interval for every claim.

    python -m lab.study --quick
"""

from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np

import aia
import train
from eval import distance
from lab.alignment import Alignment, alignment
from lab.figures import correlation
from parts.settings import InputError, machine, opt, parse, read_json, run_command, tell, write_json


@dataclass(frozen=True)
class Row:
    """A row: the groups that it belongs to, its flags, the weights of the same seed that it begins from (a row and a
    folder of its run; "": none, a whole run) and the row that it is compared with."""

    groups: str
    flags: dict
    start: str = "aia/before"
    baseline: str = "unified"


OFF = {"aia_weight": "off"}
BOTH = ("", OFF), ("+aia", {})
# Worlds and models in which the tasks may be in each other's way: chosen before any of them was run.
SETTINGS = {"half": {"preset": "tiny-half"}, "janus": {"preset": "tiny-janus"}, "words": {"shapes": 8, "colours": 8},
            "crowd": {"shapes": 6, "colours": 6, "objects": 4}}
SETTINGS |= {f"{one}-crowd": SETTINGS[one] | SETTINGS["crowd"] for one in ("half", "janus")}
EXPERTS = {task: {"ratio": ratio} | OFF for task, ratio in (("gen", "1:0"), ("und", "0:1"))}


def rows_of(name, flags, groups):
    """A setting without and with AIA, with a fork, and its experts where it is searched for a conflict (group 6). The
    search itself does without cures: where it found something to cure, they are run by name."""
    return {name: Row(groups, flags | OFF, "", ""),
            f"{name}+aia": Row(groups.strip("6"), flags, f"{name}/before", name),
            f"{name}+fork": Row("", flags | {"fork_layer": 2} | OFF, f"{name}/before", name),
            **{f"{name}-{task}": Row("6", flags | own, "", "") for task, own in EXPERTS.items() if "6" in groups}}


ROWS = {
    "aia": Row("1", {}, ""), "unified": Row("1", OFF, baseline=""),
    **{f"expert-{task}": Row("1", flags, "", "") for task, flags in EXPERTS.items()},
    **{f"unifork-{layer}": Row("1", {"fork_layer": layer} | OFF) for layer in (1, 2)},
    # Both from the beginning: a preset has a start of its own for the picture tokenizer, these two have the same.
    "wide": Row("1", {"preset": "tiny-wide"} | OFF, "", ""),
    "unifork": Row("1", {"preset": "tiny-unifork"} | OFF, "", "wide"),
    "raw": Row("2", {"aia_variant": "raw"}), "no-huber": Row("2", {"aia_variant": "no-huber"}),
    **{f"rho-{rho}": Row("2", {"rho": float(rho)}) for rho in (1, 10, 100)},
    **{name: Row("2", {"aia_weight": name}) for name in ("paper", "released")},
    **{name: Row("2", {"aia_targets": name}) for name in aia.REFERENCES},
    "experts-curves": Row("2", {"aia_targets": "experts"}),
    **{f"{gen}to{und}{arm}": Row("3", {"ratio": f"{gen}:{und}"} | flags, baseline=f"{gen}to{und}" if arm else "unified")
       for gen, und in ((2, 1), (4, 1), (1, 2)) for arm, flags in BOTH},
    **{f"tuned{arm}": Row("4", {"preset": "tiny-janus"} | flags, "janus", "tuned" if arm else "janus")
       for arm, flags in BOTH},
    **{f"long{arm}": Row("5", {"steps": 3 * train.TUNE.steps} | flags, baseline="long" if arm else "unified")
       for arm, flags in BOTH},
    **rows_of("double", {"preset": "tiny-double"}, "5"),
    **{row: what for name, flags in SETTINGS.items()
       for row, what in rows_of(name, flags, {"half": "56", "janus": "46"}.get(name, "6")).items()}}
# Unified model: how the names of its two experts begin, and of the row that joins them.
PAIRS = {"unified": ("expert", "experts")} | {name: (name, f"{name}-experts") for name in SETTINGS}
PUBLISHED = Path("assets/study.json")
QUICK = ("aia", "unified", "unifork-2", "raw", "no-huber")
# 97.5 % point of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)    # more seeds: the last, a little too wide


@dataclass(frozen=True)
class Study:
    """Run the rows of the study that are not there yet, and write what all finished ones say. It may be stopped at any
    time."""

    rows: tuple = opt(("1", "2"), "groups 1 to 6, or names of rows")
    seeds: tuple = opt(("0", "1", "2", "3", "4"), "seeds: each has its own world, held-out combinations and order")
    quick: bool = opt(False, "five rows of one seed: to show how it goes, not what is true")
    runs: str = opt("runs/study", "folder of the runs")
    out: str = opt("", "JSON file to write; empty: assets/study.json, or study.json in the folder of runs with --quick "
                   "and where the former knows more runs")


def study(settings):
    """All rows and seeds, one after the other -> {claim: verdict}."""
    groups = {group for row in ROWS.values() for group in row.groups}
    names = QUICK if settings.quick else [name for name, row in ROWS.items() if {name, *row.groups} & {*settings.rows}]
    unknown, runs = {*settings.rows} - {*ROWS} - groups, Path(settings.runs)
    seeds = settings.seeds[:1] if settings.quick else settings.seeds
    if unknown or not names:
        raise InputError(f"--rows {' '.join(sorted(unknown))}: give groups 1 to 6, or some of {', '.join(ROWS)}")
    if not (seeds and all(seed.isdecimal() for seed in seeds)):
        raise InputError(f"--seeds {' '.join(seeds)}: give whole numbers")
    if settings.out and not Path(settings.out).parent.is_dir():
        raise InputError(f"--out {settings.out}: there is no folder {Path(settings.out).parent}")
    names = dict.fromkeys(needed for name in names for needed in (*needs(name), name))
    todo = [(int(seed), name) for seed in seeds for name in names]
    published = names_of(read_json(PUBLISHED)["rows"]) if PUBLISHED.exists() else set()
    for number, (seed, name) in enumerate(todo, 1):
        print(f"== {name}, seed {seed}: row {number} of {len(todo)}")
        run_row(name, seed, runs)
        found = finished_rows(runs)
        content = {"summary": summary_of(found), "claims": claims_of(found), "rows": found, "machine": machine()}
        known = published <= names_of(found) and not settings.quick             # nothing that was found is lost
        out = settings.out or (PUBLISHED if known else runs / "study.json")
        write_json(content, out)
    print_study(content)
    print(f"written to {out}")
    return {claim["claim"]: claim["verdict"] for claim in content["claims"]}


def names_of(rows):
    """Which runs the rows of a study tell of."""
    return {(row["row"], row["seed"]) for row in rows}


def needs(name):
    """The rows that one begins from or takes its targets from."""
    row = ROWS[name]
    start = row.start.partition("/")[0]
    experts = [f"expert-{task}" for task in EXPERTS] if row.flags.get("aia_targets") == "experts" else []
    return [*experts, *([*needs(start), start] if start else [])]


def run_row(name, seed, runs):
    """Run one row of one seed, or go on with it, unless it is there."""
    row, folder = ROWS[name], runs / f"{name}-seed{seed}"
    start, _, part = row.start.partition("/")
    flags = {"seed": seed, "out": str(folder), "resume": folder.exists()} | row.flags
    flags["init"] = str(runs / f"{start}-seed{seed}" / part) if start else ""
    if row.flags.get("aia_targets") == "experts":
        flags["aia_targets"] = str(experts_targets(runs, seed))
    config = train.TrainConfig(**flags)
    if (folder / "result.json").exists():
        stored = read_json(folder / "settings.json")                            # what it began from may have moved
        ours = {name: getattr(config, name) for name in ("init", "aia_targets") if stored.get(name)}
        train.check_settings(stored | ours, config, folder)
    else:
        phases = train.plan(config)
        if 0 in train.parse_ratio(config.ratio):    # as many samples of its task a step as a model of both
            phases = [phase if phase.ratio or phase.pictures else replace(phase, batch_size=phase.batch_size // 2)
                      for phase in phases]
        train.train(config, phases)
    if "1" in row.groups and not (folder / "alignment.json").exists():
        alignment(Alignment(checkpoint=str(folder), n=512))


def finished_rows(runs):
    """What each finished run of the folder gave, in the order of ROWS."""
    found = []
    for name, row in ROWS.items():
        files = ("result.json", "alignment.json") if "1" in row.groups else ("result.json",)
        folders = {folder.name.removeprefix(f"{name}-seed"): folder for folder in runs.glob(f"{name}-seed*")
                  if all((folder / file).exists() for file in files)}
        found += [read_row(name, int(seed), folders[seed]) for seed in sorted(filter(str.isdecimal, folders), key=int)
                  if read_json(folders[seed] / "settings.json")["seed"] == int(seed)]                    # no copies
    return found


def read_row(name, seed, folder):
    """Scores, losses on held-out samples, distance to the targets, seconds; curves and alignment where there are."""
    result, curves = (read_json(folder / f"{file}.json") for file in ("result", "curves"))
    row = {"row": name, "seed": seed} | {key: result[key] for key in ("und", "gen", "seconds")}
    for task in aia.TASKS:
        tuned, before = curves[task]["after"], curves[task].get("before")
        if tuned:
            row[task + "_curve"] = tuned["intensity"]
            row |= {f"{key}_{task}": tuned[key] for key in ("ntp", "aia")} | {
                f"distance_{task}": distance(curves[task], "after"), f"std_{task}": float(np.mean(tuned["std"]))}
            row |= {f"aia_before_{task}": before["aia"]} if before else {}
    if (folder / "alignment.json").exists():
        alignment = read_json(folder / "alignment.json")
        row["alignment"] = {task: alignment[task]["score"]["10"] for task in aia.TASKS}
    return row


def experts_targets(runs, seed):
    """Targets made of the curves of this seed's experts."""
    file, table = runs / f"experts-seed{seed}.json", {}
    for task in aia.TASKS:
        curve = read_json(runs / f"expert-{task}-seed{seed}/curves.json")[task]["after"]["intensity"]
        table[task] = aia.stages_from_curve(curve, task)
    write_json(table, file)
    return file


def interval(values):
    """Mean and half of its 95 % interval (Student's t); None without at least three seeds."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, None
    return mean, float(STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * np.std(values, ddof=1) / len(values) ** 0.5)


def verdict(mean, interval):
    """Of a figure that is above zero where a claim holds."""
    decided = interval is not None and abs(mean) > interval > 0                 # 0: equal by chance, scores have steps
    return ("holds" if mean > 0 else "does not hold") if decided else "not decided here"


def mean_score(row):
    return (row["und"] + row["gen"]) / 2


MEASURES = ("ntp", "aia_before", "aia", "distance")
COMPARED = {key: itemgetter(key) for key in ("und", "gen", "ntp_und", "ntp_gen")} | {"both": mean_score}


def summary_of(rows):
    """{row: both scores with mean and interval; differences to its baseline, paired by seed, of scores, of their mean
    ("both") and of next-token losses; means of losses, distances and its own seconds}; two experts are one row more."""
    table, result = by_row(rows), {}
    baselines = {name: row.baseline for name, row in ROWS.items()} | {joint: name for name, (_, joint) in PAIRS.items()}
    for name, seeds in table.items():
        base = table.get(baselines[name], {})
        shared = sorted({*seeds} & {*base})
        result[name] = {"seeds": sorted(seeds), "seconds": float(np.mean([row["seconds"] for row in seeds.values()])),
                        "baseline": baselines[name] if shared else "", "paired": shared}
        for task in aia.TASKS:
            mean, half = interval([row[task] for row in seeds.values()])
            result[name][task] = {"mean": mean, "interval": half} | {
                key: float(np.mean([row[f"{key}_{task}"] for row in seeds.values()]))
                for key in MEASURES if all(f"{key}_{task}" in row for row in seeds.values())}
        if shared:
            result[name]["difference"] = {key: dict(zip(("mean", "interval"), interval(
                [of(seeds[seed]) - of(base[seed]) for seed in shared]), strict=True)) for key, of in COMPARED.items()}
    return result


def by_row(rows):
    """{row: {seed: row}}; "experts" has understanding of the one and generation of the other, and so have those of each
    setting."""
    table = {}
    for row in rows:
        table.setdefault(row["row"], {})[row["seed"]] = row
    for prefix, joint in PAIRS.values():
        for seed in sorted({*table.get(f"{prefix}-gen", {})} & {*table.get(f"{prefix}-und", {})}):
            parts = {task: table[f"{prefix}-{task}"][seed] for task in aia.TASKS}
            row = {key: value for task, part in parts.items() for key, value in part.items() if key.endswith(task)
                   or key.startswith(task)} | {"seconds": sum(part["seconds"] for part in parts.values())}
            if all("alignment" in part for part in parts.values()):
                row["alignment"] = {task: part["alignment"][task] for task, part in parts.items()}
            table.setdefault(joint, {})[seed] = row
    return table


def gap(row, other):
    """Mean distance of the curves of two rows, both tasks."""
    return float(np.mean([np.abs(np.array(row[f"{task}_curve"]) - other[f"{task}_curve"]) for task in aia.TASKS]))


def better(row, *others):
    """How much better a row is than each of the others."""
    return [mean_score(row) - mean_score(other) for other in others]


def between(experts, shared):
    """How far understanding's alignment of the last layer is above the shared model's, and generation's below."""
    und, gen = (experts["alignment"][task][-1] - shared["alignment"][task][-1] for task in ("und", "gen"))
    return [und, -gen]


# Claim, rows that it needs, and for each seed a number, or several, all above zero where the claim holds.
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
)


def claims_of(rows):
    """Verdict of each claim: one of several numbers decides against it, all decide for it; the figure is the least of
    those that decided."""
    table, found = by_row(rows), []
    for claim, names, number in CLAIMS:
        seeds = sorted(set.intersection(*({*table.get(name, {})} for name in names)))
        values = [np.atleast_1d(number(*(table[name][seed] for name in names))) for seed in seeds]
        parts = [interval(part) for part in zip(*values, strict=True)] or [(None, None)]
        verdicts = {verdict(*part) for part in parts}
        decision = next((one for one in ("does not hold", "not decided here") if one in verdicts), "holds")
        mean, half = min((part for part in parts if verdict(*part) == decision), key=lambda part: part[0])
        found.append({"claim": claim, "verdict": decision, "figure": mean, "interval": half, "seeds": len(seeds)})
    return found


def with_interval(mean, interval, sign="+"):
    """Mean with its interval, if there is one."""
    return f"{mean:{sign}.3f}" + (f" ± {interval:.3f}" if interval is not None else "")


def print_study(content):
    """Rows, settings and claims as tables in Markdown."""
    print("\n| row | seeds | understanding | generation | difference to | und | gen | loss und | gen | L_AIA und | "
          "gen | distance und | gen | minutes |\n" + "|---" * 14 + "|")
    tasks = ("und", "gen")
    alone = {f"{prefix}-{task}" for prefix, _ in PAIRS.values() for task in EXPERTS}         # shown in pairs
    for name, row in ((name, row) for name, row in content["summary"].items() if name not in alone):
        cells = [name, str(len(row["seeds"]))]
        cells += [with_interval(row[task]["mean"], row[task]["interval"], "") for task in tasks]
        few = f" ({len(row['paired'])})" if row["baseline"] and row["paired"] != row["seeds"] else ""
        cells += [row["baseline"] + few or "-"]
        cells += [with_interval(**row["difference"][task]) if row["baseline"] else "-" for task in tasks]
        cells += [f"{row[task]['ntp']:.4f}" if "ntp" in row[task] else "-" for task in tasks]
        cells += [f"{row[task]['aia_before']:.4f} -> {row[task]['aia']:.4f}" if "aia_before" in row[task] else "-"
                  for task in tasks]
        cells += [f"{row[task]['distance']:.3f}" if "distance" in row[task] else "-" for task in tasks]
        cells += [f"{row['seconds'] / 60:.1f}"]
        print(f"| {' | '.join(cells)} |")
    print("\nWhat two experts gain over a unified model (a conflict: scores above 0, losses below 0)\n\n"
          "| setting | seeds | understanding | generation | loss und | loss gen | conflict |\n" + "|---" * 7 + "|")
    for name, row in ((name, content["summary"].get(joint)) for name, (_, joint) in PAIRS.items()):
        if row and row["baseline"]:
            cells = [with_interval(**row["difference"][key]) for key in ("und", "gen", "ntp_und", "ntp_gen")]
            cells += [verdict(**row["difference"]["both"])]
            print(f"| {name} | {len(row['paired'])} | {' | '.join(cells)} |")
    print("\n| claim | verdict | figure (above 0 where it holds) | seeds |\n|---|---|---|---|")
    for claim in content["claims"]:
        figure = with_interval(claim["figure"], claim["interval"]) if claim["seeds"] else "-"
        print(f"| {claim['claim']} | {claim['verdict']} | {figure} | {claim['seeds']} |")


def main(argv=None):
    settings = parse(Study, argv, "python -m lab.study")
    tell(train.stoppable(lambda: study(settings), "go on with the same command"))


if __name__ == "__main__":
    run_command(main)
