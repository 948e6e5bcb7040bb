"""The papers in miniature: runs the rows of lab/rows.py on the built-in world and says what they show (lab/claims.py).

Each seed has its own world, and rows of one seed are compared. The plan of group 8, made before its runs: lab/STUDY.md.

    python -m lab.study --quick --jobs 2        # five rows of one seed, ten minutes on two cores
    python -m lab.study                         # groups 1 and 2, five seeds: hours
    python -m lab.study --rows 8 --seeds 20 21 22 --jobs 2
"""

import contextlib
import datetime
import multiprocessing
import os
import signal
import subprocess
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

import aia
import data
import formats.weights
import train
from eval import distance
from formats.checkpoints import checkpoint_folders
from formats.datasets import parse_ratio
from lab.alignment import Alignment, alignment
from lab.claims import (
    DETAILS,
    claims_of,
    curves_apart,
    moves_of,
    print_apart,
    print_claims,
    print_conflicts,
    print_rows,
    summary_of,
)
from lab.rows import EXPERTS, QUICK, ROWS, needs
from parts import settings
from parts.plots import ARMS
from parts.processes import interruptible
from parts.settings import InputError, Stop, check_out, opt, read_json, write_json
from parts.text import Text
from parts.world import world_of

PUBLISHED = Path("assets/study.json")


@dataclass(frozen=True)
class Study:
    """Run the rows of the study that are not finished, and write tables of all finished ones. Stop it at any time; the
    same command goes on."""

    rows: tuple = opt(("1", "2"), "groups 1 to 9, or names of rows")
    seeds: tuple = opt(("0", "1", "2", "3", "4"), "seeds: each has its own world, held-out combinations and order")
    jobs: int = opt(1, "runs side by side; each trains on one thread of a CPU, or shares the GPU")
    quick: bool = opt(False, "five rows of one seed: shows how it works, not what is true")
    runs: str = opt("runs/study", "folder of the runs")
    out: str = opt("", "JSON file to write; empty: assets/study.json, or study.json in the folder of runs with --quick "
                   "or if assets/study.json holds runs that are not in that folder")


def study(config):
    """All rows and seeds -> {claim: verdict}."""
    names = chosen_rows(config)
    seeds = dict.fromkeys(map(int, config.seeds[:1] if config.quick else config.seeds))         # each once
    runs = Path(config.runs)
    todo = [(name, seed) for seed in seeds for name in names]
    torch.set_num_threads(1)                        # whatever the number of jobs, so that results do not depend on it
    if config.jobs > 1:
        failed = side_by_side(todo, config.jobs, runs)
    else:
        failed = []
        for number, (name, seed) in enumerate(todo, 1):
            print(f"== {name}, seed {seed}: row {number} of {len(todo)}")
            run_row(name, seed, runs)
    claims, out = published(config, runs)
    if failed:
        names = ", ".join(f"{name}-seed{seed}" for name, seed in failed)
        raise InputError(f"failed, or waited for one that did: {names}; their logs lie in {runs}")
    print(f"written to {out}")
    return {claim["claim"]: claim["verdict"] for claim in claims if claim["seeds"]}


def published(config, runs):
    """Print and write what all finished runs say -> claims, file."""
    known = runs_in(read_json(PUBLISHED)["rows"]) if PUBLISHED.exists() else set()
    found = finished_rows(runs)
    content = {"summary": summary_of(found), "claims": claims_of(found), "curves apart": curves_apart(found),
               "moves": moves_of(found), "rows": found, "machine": settings.machine()}
    complete = known <= runs_in(found) and not config.quick                     # nothing published would be lost
    out = config.out or (PUBLISHED if complete else runs / "study.json")
    write_json(content, out)
    print_rows(content["summary"])
    print_conflicts(content["summary"])
    print_apart(content["curves apart"])
    print_claims(content["claims"])
    return content["claims"], out


def chosen_rows(config):
    """Names of the rows that were asked for, after those they need; refuses what cannot be run."""
    groups = {group for row in ROWS.values() for group in row.groups}
    unknown = {*config.rows} - {*ROWS} - groups
    names = QUICK
    if config.quick and config.rows != Study.rows:
        raise InputError("--quick has rows of its own: leave out --rows")
    if not config.quick:
        names = [name for name, row in ROWS.items() if {name, *row.groups} & {*config.rows}]
    if unknown or not names:
        raise InputError(f"--rows {' '.join(sorted(unknown))}: give groups 1 to 9, or names of ROWS in lab/rows.py")
    if not (config.seeds and all(seed.isdecimal() for seed in config.seeds)):
        raise InputError(f"--seeds {' '.join(config.seeds)}: give whole numbers")
    settings.at_least(config, {"jobs": 1})
    check_out(config.out)
    return list(dict.fromkeys(needed for name in names for needed in (*needs(name), name)))


def runs_in(rows):
    """{(row, seed)} of the rows of a study."""
    return {(row["row"], row["seed"]) for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------
def folder_of(name, seed, runs):
    return runs / f"{name}-seed{seed}"


def log_of(name, seed, runs):
    return runs / f"{name}-seed{seed}.log"


def run_row(name, seed, runs):
    """Run one row of one seed, or continue it, unless it is finished."""
    row, folder = ROWS[name], folder_of(name, seed, runs)
    start, _, part = row.start.partition("/")
    flags = {"seed": seed, "out": str(folder), "resume": folder.exists()} | row.flags
    flags["init"] = str(folder_of(start, seed, runs) / part) if start else ""
    if row.targets:
        flags["aia_targets"] = str(targets_file(name, seed, runs))
    config = train.TrainConfig(**flags)
    if row.lambdas and (folder / "settings.json").exists():     # measured once: another machine might round otherwise
        config = replace(config, aia_weight=read_json(folder / "settings.json")["aia_weight"])
    elif row.lambdas:
        config = replace(config, aia_weight=lambdas_at_the_end(config, folder_of(row.lambdas, seed, runs)))
    if is_done(name, seed, runs):
        stored = read_json(folder / "settings.json")
        # Paths of what it started from: the whole folder may have been moved.
        ours = {field: getattr(config, field) for field in ("init", "aia_targets") if stored.get(field)}
        train.check_settings(stored | ours, config, folder)
    else:
        tell_start(folder)
        phases = [train.with_flags(phase, config) for phase in row.phases] or train.plan(config)
        if 0 in parse_ratio(config.ratio)[:2]:      # an expert: as many samples of its task a step as a unified model
            phases = [phase if phase.ratio or phase.pictures else replace(phase, batch_size=phase.batch_size // 2)
                      for phase in phases]
        train.train(config, phases)
    if "1" in row.groups and not (folder / "alignment.json").exists():
        alignment(Alignment(checkpoint=str(folder), n=512))


def is_done(name, seed, runs):
    return (folder_of(name, seed, runs) / "result.json").exists()


def start_of(folder):
    """The file that tells how a run was started: beside its folder, which must be new."""
    return folder.with_name(f"{folder.name}.started.json")


def tell_start(folder):
    """Write from which commit and when a run was started, unless it goes on from a checkpoint."""
    if checkpoint_folders(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):           # no git, or no repository
        commit, changed = (subprocess.run(["git", *words], cwd=Path(__file__).parent, check=True, capture_output=True,
                                          text=True).stdout.strip()
                           for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")))
        if changed:
            commit += " and changes"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json({"commit": commit, "started": now}, start_of(folder))


def targets_file(name, seed, runs):
    """Write AIA's targets of a row: the paper's with the tasks exchanged, or stages made of the curves of this seed's
    experts -> their file."""
    file, experts = runs / f"{name}-targets-seed{seed}.json", ROWS[name].targets
    if experts == "exchanged":
        table = {task: aia.stages_of(0, other) for task, other in zip(aia.TASKS, reversed(aia.TASKS), strict=True)}
    else:
        curves = {task: read_json(folder_of(f"{experts}-{task}", seed, runs) / "curves.json") for task in EXPERTS}
        table = {task: aia.stages_from_curve(curves[task][task]["after"]["intensity"], task) for task in aia.TASKS}
    write_json(table, file)
    return file


def lambdas_at_the_end(config, folder):
    """lambda of both tasks as --aia-weight, calibrated at the final weights of another run for the targets of this one.
    At the random weights that this one may start from, the ratio of losses means nothing."""
    m = formats.weights.load(folder)
    world = world_of(read_json(folder / "settings.json"))
    preparer = data.Preparer(m, Text(m.tokenizer_file, m.config.kind), first=config.aia_variant != "no-first")
    schedule = data.Schedule(data.WorldSource(world, config.pool, config.seed), preparer, 3 * config.seed,
                             train.JOINT.batch_size, parse_ratio(config.ratio), config.micro_batch)
    targets = {task: aia.targets(m.config.layers, task, config.aia_targets, config.aia_variant) for task in aia.TASKS}
    found = train.calibrate(m, schedule, targets, config, contextlib.nullcontext)
    return ",".join(f"{found[task]:.3g}" for task in aia.TASKS)


# ---------------------------------------------------------------------------------------------------------------------
# Many runs, side by side
# ---------------------------------------------------------------------------------------------------------------------
def waits_for(name, seed, runs):
    """The rows that must be finished first. For weights alone it is enough that they have been kept."""
    row = ROWS[name]
    start, _, kept = row.start.partition("/")
    begun = kept and row.lambdas != start and (folder_of(start, seed, runs) / kept).exists()
    return [needed for needed in needs(name) if not (begun and needed == start)]


def side_by_side(todo, jobs, runs):
    """Run each (row, seed) in a process of its own, as soon as what it needs is there -> those that failed."""
    runs.mkdir(parents=True, exist_ok=True)
    context, asked = multiprocessing.get_context("spawn"), []
    waiting, going, failed = list(todo), {}, []
    with interruptible(asked.append):
        while waiting or going:
            needed = {run: [(other, run[1]) for other in waits_for(*run, runs)] for run in waiting}
            lost = [run for run in waiting if {*needed[run]} & {*failed}]
            waiting = [run for run in waiting if run not in lost]
            failed += lost
            ready = [run for run in waiting if not {*needed[run]} & {*waiting, *going}][:jobs - len(going)]
            for run in ready if not asked else ():
                waiting.remove(run)
                going[run] = context.Process(target=work, args=(*run, runs))
                ours = signal.signal(signal.SIGINT, signal.SIG_IGN)     # it reaches all, also those that still import
                going[run].start()
                signal.signal(signal.SIGINT, ours)
            if ready or lost:
                print_progress(todo, going, failed, jobs, runs)
            wait([process.sentinel for process in going.values()], timeout=1)
            if asked:
                for process in going.values():      # each saves if it is training, and ends
                    process.terminate()
                for process in going.values():
                    process.join()
                raise Stop(asked[0])
            for run, process in list(going.items()):
                if not process.is_alive():
                    del going[run]
                    if process.exitcode or not is_done(*run, runs):
                        failed.append(run)
    print_progress(todo, going, failed, jobs, runs)
    return failed


def work(name, seed, runs):
    """One run in a process of its own; what it prints goes into a log beside its folder."""
    with open(log_of(name, seed, runs), "a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    settings.run_command(lambda: settings.stoppable(lambda: run_row(name, seed, runs), "continue with the study"))


def print_progress(todo, going, failed, jobs, runs):
    """A line per row, a column per seed: minutes it took, > running, . waiting, ! failed; then the time left."""
    seeds = sorted({seed for _, seed in todo})
    names = list(dict.fromkeys(name for name, _ in todo))
    done = [run for run in todo if is_done(*run, runs)]
    took = {run: read_json(folder_of(*run, runs) / "result.json")["seconds"] / 60 for run in done}

    def cell(run):
        mark = ">" if run in going else "!" if run in failed else "."
        return f"{took[run]:.1f}" if run in took else mark
    wide = max(map(len, names))
    print(f"\n{'seed':{wide}s} " + "".join(f"{seed:>6d}" for seed in seeds))
    for name in names:
        print(f"{name:{wide}s} " + "".join(f"{cell((name, seed)):>6s}" for seed in seeds))
    left = [run for run in todo if run not in took and run not in failed]
    by_name = {name: [took[run] for run in took if run[0] == name] or [*took.values()] for name in names}
    minutes = f"about {sum(np.mean(by_name[name]) for name, _ in left) / jobs:.0f}" if took else "unknown"
    print(f"{len(took)} of {len(todo)} runs finished, minutes left: {minutes if left else 0}", flush=True)


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
    """Scores, losses on held-out samples, distances to the targets, seconds, GB and machine; curves, parts of the
    scores, alignment, commit and start where there are any."""
    result = read_json(folder / "result.json")
    curves = read_json(folder / "curves.json")
    row = {"row": name, "seed": seed} | {key: result[key] for key in ("und", "gen", "seconds")}
    for task in aia.TASKS:
        tuned, before = curves[task]["after"], curves[task].get("before")
        if tuned:
            row |= {f"{task}_curve": tuned["intensity"], f"ntp_{task}": tuned["ntp"], f"aia_{task}": tuned["aia"],
                    f"distance_{task}": distance(curves[task], "after"), f"std_{task}": float(np.mean(tuned["std"])),
                    f"{task}_sink": tuned.get("sink")}
        if tuned and before:
            row[f"aia_before_{task}"] = before["aia"]
    if start_of(folder).exists():
        row |= read_json(start_of(folder))
    scores = read_json(folder / "scores.json") if (folder / "scores.json").exists() else {}
    check_weights(scores, curves, folder)
    if "und_by_kind" in scores:                     # older runs
        scores["und_by_topic"] = scores["und_by_kind"]
    row |= {key: part[key] for part in (result, scores) for key in (*DETAILS, "machine") if key in part}
    if (folder / "alignment.json").exists():
        aligned = read_json(folder / "alignment.json")
        row["alignment"] = {task: aligned[task]["score"]["10"] for task in aia.TASKS}
    return row


def main(argv=None):
    config = settings.parse(Study, argv, "python -m lab.study")
    settings.tell(settings.stoppable(lambda: study(config), "continue with the same command"))


if __name__ == "__main__":
    settings.run_command(main)
