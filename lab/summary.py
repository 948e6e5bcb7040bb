"""What several runs of a preset came to: mean and range over seeds, of everything that a run measures about itself.

    python -m lab.summary runs/tiny-emu3-seed* --out assets/laptop.json
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import distance
from parts.settings import InputError, check_out, opt, parse, read_json, run_command, tell, write_json

MAY_DIFFER = ("seed", "out", "resume", "log_every", "save_every", "keep")       # settings that change no comparison


@dataclass(frozen=True)
class Summary:
    """Mean and range over the seeds of each preset, of scores, losses, distances to the targets, seconds and GB."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "finished run folders")
    out: str = opt("summary.json", "JSON file to write")


def summary(settings):
    """{preset: its number of seeds}; the file has {preset: {"seeds", "n", number: {"mean", "low", "high"}}}."""
    check_out(settings.out)
    if not settings.runs:
        raise InputError("summary needs run folders: python -m lab.summary runs/tiny-emu3-seed*")
    found, plans, machines = {}, {}, []
    for run in map(Path, settings.runs):
        if not (run / "result.json").exists():
            raise InputError(f"{run} has no result.json: give the folder of a finished run")
        preset, seed, machine, row = read_run(run)
        plan = read_json(run / "settings.json")
        first = plans.setdefault(preset, plan)
        if other := sorted(name for name in plan if name not in MAY_DIFFER and plan[name] != first.get(name)):
            raise InputError(f"{run} differs from the runs before it in --{other[0].replace('_', '-')}: means over "
                             "seeds need equal runs")
        seeds = found.setdefault(preset, {})
        if seed in seeds:
            raise InputError(f"{run} is a second run of {preset} with seed {seed}: give one")
        seeds[seed] = row
        machines.append(machine)
    rows = {preset: {"seeds": sorted(seeds), "n": len(seeds)} | over_seeds([*seeds.values()])
            for preset, seeds in found.items()}
    write_json({"runs": rows, "machines": [one for i, one in enumerate(machines) if one not in machines[:i]]},
               settings.out)
    for preset, row in rows.items():
        print(f"{preset}, seeds {', '.join(map(str, row['seeds']))}: " + ", ".join(
            f"{name} {row[name]['mean']:.2f} ({row[name]['low']:.2f} to {row[name]['high']:.2f})"
            for name in ("und", "gen", "seconds") if name in row))
    return {preset: len(seeds) for preset, seeds in found.items()}


def read_run(run):
    """Preset, seed and machine of a run, and all its numbers, with the distances of its curves to their targets."""
    result, curves, scores = read_json(run / "result.json"), read_json(run / "curves.json"), {}
    if (run / "scores.json").exists():              # none of a run on own pictures
        scores = read_json(run / "scores.json")
    try:
        for name in ("seed", "seconds", "und", "gen"):
            float(result[name] or 0)                # an error unless it is a number, or null
        far = {task: {name: distance(curves[task], name) for name in ("before", "after") if curves[task].get(name)}
               for task in ("gen", "und")}
        return result["preset"], result["seed"], result["machine"], numbers(result | scores | {"distance": far})
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run}: result.json, scores.json or curves.json is damaged ({error}): train it "
                         "again") from error


def numbers(content):
    """The numbers in nested dicts, with the same nesting; entries of lists by their index."""
    if isinstance(content, list):
        content = {str(i): value for i, value in enumerate(content)}
    found = {key: numbers(value) if isinstance(value, dict | list) else value for key, value in content.items()
             if isinstance(value, dict | list | int | float) and key not in ("seed", "machine")}
    return {key: value for key, value in found.items() if value != {}}


def over_seeds(rows):
    """Mean, least and largest of each number that all rows have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    found = {}
    for key in shared:
        values = [row[key] for row in rows]
        found[key] = over_seeds(values) if isinstance(values[0], dict) else {
            "mean": float(np.mean(values)), "low": min(values), "high": max(values)}
    return found


def main(argv=None):
    tell(summary(parse(Summary, argv, "python -m lab.summary")))


if __name__ == "__main__":
    run_command(main)
