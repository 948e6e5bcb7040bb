"""The rows of the study: what is run, from which weights, and what it is compared with.

Group by group: AIA's Tables 1 and 3 and Fig. 3, UniFork (arXiv 2506.17202), a search for a conflict between the tasks,
pictures and text in turn, and AIA where there is a conflict (lab/STUDY.md).
"""

from dataclasses import dataclass, replace

import aia
import train


@dataclass(frozen=True)
class Row:
    """A run of train.py for each seed."""

    groups: str                                     # a digit for each group it belongs to
    flags: dict                                     # its settings
    start: str = "aia/before"                       # weights of the same seed: ROW, or ROW/FOLDER of its run; "": none
    baseline: str = "unified"                       # the row it is compared with
    targets: str = ""                               # of AIA: "exchanged", or how the names of two experts begin
    phases: tuple = ()                              # in place of the plan of its preset
    lambdas: str = ""                               # the row whose final weights calibrate lambda; "": where it starts


OFF = {"aia_weight": "off"}
# Worlds and models in which the tasks may be in each other's way: chosen before any of them was run.
SETTINGS = {"half": {"preset": "tiny-half"}, "janus": {"preset": "tiny-janus"}, "words": {"shapes": 8, "colours": 8},
            "crowd": {"shapes": 6, "colours": 6, "objects": 4}}
SETTINGS |= {f"{one}-crowd": SETTINGS[one] | SETTINGS["crowd"] for one in ("half", "janus")}
GROUPS = {"1": "the papers' claims", "2": "parts of AIA", "3": "drawings : answers", "4": "Janus-Pro's manner",
          "5": "length and width", "6": "is there a conflict?", "7": "pictures and text in turn",
          "8": "AIA from the first joint step", "9": "a larger model in a larger world"}
CONFLICTS = (*SETTINGS, "narrow", "small")          # unified models that have experts of their own
# What rows are called in a figure, where their names do not say it.
TOLD = {"aia": "AIA at the end", "unifork-1": "fork from layer 1", "unifork-2":
        "fork from layer 2", "unifork": "UniFork's phases", "raw": "no stages", "no-huber": "no Huber", "paper":
        "the paper's lambda", "released": "the released lambda", "experts-curves": "targets: the experts",
        "early": "AIA throughout", "early-fading": "AIA, fading", "early-experts": "targets: the experts",
        "early-experts-fading": "the same, fading", "early-exchanged": "targets exchanged", "early-exchanged-fading":
        "the same, fading", "early-no-first": "without the first token", "early-fork": "fork from layer 2"}
TOLD |= {f"rho-{rho}": f"rho {rho}" for rho in (1, 10, 100)} | {name: f"targets: {name}" for name in aia.REFERENCES}
TOLD |= {f"{name}+{more}": told for name in ("half", "small", "mixed") for more, told in (
    ("aia", "AIA at the end"), ("fork", "fork of the upper half"))}
TOLD |= {"experts": "two experts"} | {f"{name}-experts": "two experts" for name in CONFLICTS}
EXPERTS = {task: {"ratio": ratio} | OFF for task, ratio in (("gen", "1:0"), ("und", "0:1"))}
# {unified model: (how the names of its two experts begin, the row that joins them)}
PAIRS = {"unified": ("expert", "experts")} | {name: (name, f"{name}-experts") for name in CONFLICTS}
QUICK = ("aia", "unified", "unifork-2", "raw", "no-huber")

# Where there is a conflict: half width. The weights after the answers are kept, and both tasks begin there with AIA.
NARROW = {"preset": "tiny-half", "eval_n": 300, "save_every": 200, "keep": 20}
NARROW_PLAN = (train.TOKENIZER, replace(train.ANSWERS, end="answered"), train.JOINT, train.TUNE)
EARLY = (replace(train.JOINT, aia=True), replace(train.TUNE, start=""))
STEPS = train.JOINT.steps + train.TUNE.steps
LAST_THIRD = (STEPS - STEPS // 3, STEPS)            # steps between which lambda falls to zero
FADING = tuple(replace(phase, fade=tuple(step - before for step in LAST_THIRD))
               for phase, before in zip(EARLY, (0, train.JOINT.steps), strict=True))


def arms_of(name, groups, flags, start="aia/before", baseline="unified"):
    """The same flags without AIA, compared with a baseline, and with AIA, compared with the former."""
    return {name: Row(groups, flags | OFF, start, baseline), f"{name}+aia": Row(groups, flags, start, name)}


def experts_of(name, groups, flags):
    """A model for each task alone, from the beginning, as many samples of its task a step as a unified one has."""
    return {f"{name}-{task}": Row(groups, flags | own, "", "") for task, own in EXPERTS.items()}


def setting_rows(name, flags, groups):
    """A setting from the beginning, with AIA and with a fork from its weights, and its experts if a conflict is
    searched for (group 6). The search leaves out AIA and fork: where it finds a conflict, they are run by name."""
    rows = {name: Row(groups, flags | OFF, "", ""),
            f"{name}+aia": Row(groups.strip("6"), flags, f"{name}/before", name),
            f"{name}+fork": Row("", flags | {"fork_layer": 2} | OFF, f"{name}/before", name)}
    return rows | (experts_of(name, "6", flags) if "6" in groups else {})


def early_rows():
    """Group 8: AIA from the first step of joint training on, at half width."""
    def early(**changes):
        return Row("8", NARROW, "narrow/answered", "narrow", **{"lambdas": "narrow", "phases": EARLY} | changes)
    rows = {"narrow": Row("8", NARROW | OFF, "", "", phases=NARROW_PLAN)} | experts_of("narrow", "8", NARROW)
    for name, targets in (("early", ""), ("early-experts", "narrow"), ("early-exchanged", "exchanged")):
        rows |= {name: early(targets=targets), f"{name}-fading": early(targets=targets, phases=FADING)}
    rows["early-no-first"] = replace(early(), flags=NARROW | {"aia_variant": "no-first"})
    rows["early-fork"] = replace(early(lambdas=""), flags=NARROW | OFF | {"fork_layer": 2})
    return rows


def all_rows():
    """{name: Row}, group by group."""
    rows = {"aia": Row("1", {}, ""), "unified": Row("1", OFF, baseline="")} | experts_of("expert", "1", {})
    rows |= {f"unifork-{layer}": Row("1", {"fork_layer": layer} | OFF) for layer in (1, 2)}
    # Both from the beginning. The first weights of a picture tokenizer depend on the preset; these two share them.
    rows["wide"] = Row("1", {"preset": "tiny-wide"} | OFF, "", "")
    rows["unifork"] = Row("1", {"preset": "tiny-unifork"} | OFF, "", "wide")
    rows |= {variant: Row("2", {"aia_variant": variant}) for variant in ("raw", "no-huber")}
    rows |= {f"rho-{rho}": Row("2", {"rho": float(rho)}) for rho in (1, 10, 100)}
    rows |= {name: Row("2", {"aia_weight": name}) for name in ("paper", "released")}
    rows |= {name: Row("2", {"aia_targets": name}) for name in aia.REFERENCES}
    rows["experts-curves"] = Row("2", {}, targets="expert")
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
    rows |= {name: Row("7", mixed[name] | OFF, "", base) for name, base in baselines.items()}
    rows |= early_rows()
    # For one GPU: a larger model in a larger world.
    small = {"preset": "small-emu3"} | train.SETTINGS_OF["small-emu3"]
    rows |= setting_rows("small", small, "9") | experts_of("small", "9", small)
    rows["small+fork"] = replace(rows["small+fork"], groups="9", flags=small | {"fork_layer": 4} | OFF)
    return rows


ROWS = all_rows()


def needs(name):
    """The rows that must be run before this one: for the weights it starts from, the curves that are its targets, and
    its lambda."""
    row = ROWS[name]
    others = [f"{row.targets}-{task}" for task in EXPERTS if row.targets not in ("", "exchanged")]
    others += filter(None, (row.lambdas, row.start.partition("/")[0]))
    return list(dict.fromkeys(needed for other in others for needed in (*needs(other), other)))
