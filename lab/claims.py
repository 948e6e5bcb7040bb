"""What the runs of a study say: means, intervals, differences paired by seed, verdicts on claims, and their tables.

Several seeds, and a 95 % interval for every claim; a plan made before the runs (lab/STUDY.md) also gets an exact
sign-flip test, corrected for the number of its claims.
"""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np

import aia
from eval import MIXED_SCORES
from lab.figures import correlation
from lab.rows import EXPERTS, PAIRS, ROWS
from parts.plots import TASK_NAME

# 97.5 % point of Student's t for 1, 2, ... degrees of freedom; with more seeds the last, which is a little too wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093)


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
           *MIXED_SCORES, "first", "plain_by_skill", "plan_by_skill", "edit_by_kind", "story", "chance")
COMPARED = {key: itemgetter(key) for key in ("und", "gen", "ntp_und", "ntp_gen")} | {"both": mean_score}


def baseline_of(name):
    """The row that a row, or two experts, are compared with; "": none."""
    return {joint: unified for unified, (_, joint) in PAIRS.items()}.get(name) or ROWS[name].baseline


def summary_of(rows):
    """{row: its seeds and seconds, both scores with mean and interval, means of MEASURES and DETAILS; differences to
    its baseline, paired by seed, of scores, of their mean ("both") and of next-token losses}. Two experts make one row
    more."""
    table = by_row(rows)
    result = {}
    for name, seeds in table.items():
        base = table.get(baseline_of(name), {})
        shared = sorted({*seeds} & {*base})
        runs = [*seeds.values()]
        summary = {"seeds": sorted(seeds), "seconds": mean_of([row["seconds"] for row in runs]),
                   "baseline": baseline_of(name) if shared else "", "paired": shared} | means_of(runs, DETAILS)
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
# Claims
# ---------------------------------------------------------------------------------------------------------------------
MARGIN = 0.02                                   # a smaller difference of scores counts as none
# Planned claims are judged on these seeds and no others, on the second look only where the first decided nothing; each
# look at this level.
LOOKS = (range(20, 30), range(20, 40))
LEVEL = 0.025


@dataclass(frozen=True)
class Claim:
    """A sentence, and what decides it."""

    text: str
    rows: tuple                                 # that it needs
    number: object                              # of these rows of one seed: above zero if it holds; or several numbers
    planned: bool = False                       # tested together with the other planned ones, on the seeds of LOOKS
    margin: float | None = None                 # a figure that lies within it, interval and all, is no effect


def verdict(mean, interval):
    """Whether a claim holds, given a figure that is above zero if it does."""
    decided = interval is not None and abs(mean) > interval > 0                 # 0: equal by chance, scores have steps
    if not decided:
        return "not decided here"
    return "holds" if mean > 0 else "does not hold"


MOST_SEEDS = 20                                 # whose 2^n choices of signs fit into memory


def sign_flip(values):
    """Exact p of a mean of paired differences, two-sided: if neither row were better, each difference could as well
    have had the other sign, so p is the share of all 2^n choices of signs whose mean is as far from zero. values (n,),
    or (n, L): differences of curves, whose mean is as far from zero as its layers are on average."""
    n = len(values)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.int8)                  # (2^n, n)
    sums = np.abs(signs @ np.array(values).reshape(n, -1)).sum(1)                                   # (2^n,)
    return float(np.mean(sums >= sums[0] - 1e-9))                               # the first has all signs as they are


def holm(ps):
    """Holm's correction: the i-th smallest of n (from 0) counts n - i fold, and none less than one before it."""
    order = np.argsort(ps)
    raised = np.maximum.accumulate([min(1.0, (len(ps) - i) * ps[at]) for i, at in enumerate(order)])
    return [float(raised[np.flatnonzero(order == at)[0]]) for at in range(len(ps))]


def shift(row, other, task):
    """Curve of a row minus that of another, (L,)."""
    return np.array(row[f"{task}_curve"]) - other[f"{task}_curve"]


def gap(row, other, tasks=aia.TASKS):
    """Mean distance of the curves of two rows, over layers and tasks."""
    return float(np.mean([np.abs(shift(row, other, task)) for task in tasks]))


def curves_apart(rows):
    """{unified model: {task: how curves differ}}. experts: distance of the expert's and the unified model's, seed by
    seed; seeds: of the unified models of two seeds; each a mean with its interval. shift: expert minus unified by
    layer, as a distance says nothing of direction, and p of the whole (sign_flip; None for too many seeds)."""
    table, found = by_row(rows), {}
    for name, (_, joint) in PAIRS.items():
        shared, experts = table.get(name, {}), table.get(joint, {})
        seeds = sorted({*shared} & {*experts})
        if len(seeds) < 2 or not all("gen_curve" in shared[seed] and "gen_curve" in experts[seed] for seed in seeds):
            continue
        found[name] = {"n": len(seeds)}
        for task in aia.TASKS:
            own = [gap(experts[seed], shared[seed], (task,)) for seed in seeds]
            between = [np.mean([gap(shared[one], shared[other], (task,)) for other in seeds if other != one])
                       for one in seeds]
            shifts = [shift(experts[seed], shared[seed], task) for seed in seeds]                   # n of (L,)
            measured = {"experts": interval(own), "seeds": interval(between)}
            found[name][task] = {key: {"mean": mean, "interval": half} for key, (mean, half) in measured.items()}
            found[name][task] |= {"shift": [interval(layer) for layer in zip(*shifts, strict=True)],
                                  "p": sign_flip(shifts) if len(seeds) <= MOST_SEEDS else None}
    return found


def moves_of(rows):
    """{row: [[how far its curves are from its baseline's, gain in the mean of both scores], ...]}, seed by seed."""
    table, found = by_row(rows), {}
    for name, seeds in table.items():
        base = table.get(baseline_of(name), {})
        pairs = [(row, base[seed]) for seed, row in sorted(seeds.items()) if seed in base]
        points = [[gap(*pair), mean_score(pair[0]) - mean_score(pair[1])] for pair in pairs
                  if all(f"{task}_curve" in one for one in pair for task in aia.TASKS)]
        found |= {name: points} if points else {}
    return found


def better(row, *others):
    """How much better a row is than each of the others."""
    return [mean_score(row) - mean_score(other) for other in others]


def between(experts, shared):
    """How far, in the last layer, the shared model's alignment is below the experts' in understanding, and above in
    generation."""
    und, gen = (experts["alignment"][task][-1] - shared["alignment"][task][-1] for task in ("und", "gen"))
    return [und, -gen]


def nearer(row, base):
    """How much nearer to the targets curves are, mean of both tasks."""
    return sum(base[f"distance_{task}"] - row[f"distance_{task}"] for task in aia.TASKS) / 2


def on_first(row, base):
    """How much of what generation's curve moved the first token accounts for: sums over layers, below 0 if it moved the
    other way."""
    moves, sinks = (np.array(row[key]) - base[key] for key in ("gen_curve", "gen_sink"))
    return float(np.sum(sinks * np.sign(moves)) / max(np.abs(moves).sum(), 1e-9))


def in_turn(row):
    """Mean of the scores of pictures and text in turn."""
    return float(np.mean([row[name] for name in ("edit", "consistent", "plan", "third")]))


def coloured(row):
    """What a plan adds to colour attribution."""
    return row["plan_by_skill"]["colour attribution"] - row["plain_by_skill"]["colour attribution"]


def of_papers():
    """What AIA's paper and UniFork's claim."""
    return (
        Claim("the two tasks' curves correlate negatively", ("unified",),
              lambda plain: -(correlation(plain["gen_curve"], plain["und_curve"]) or 0.0)),
        Claim("patterns are stable over inputs (deviation below the paper's 0.13 of Emu3)", ("unified",),
              lambda plain: 0.13 - (plain["std_gen"] + plain["std_und"]) / 2),
        Claim("more decoupling moves curves towards the experts", ("unified", "unifork-1", "experts"),
              lambda plain, forked, experts: gap(plain, experts) - gap(forked, experts)),
        Claim("AIA moves curves towards the targets", ("aia", "unified"), nearer),
        Claim("AIA improves understanding", ("unified", "aia"), lambda plain, tuned: tuned["und"] - plain["und"]),
        Claim("AIA improves generation", ("unified", "aia"), lambda plain, tuned: tuned["gen"] - plain["gen"]),
        Claim("Huber matters", ("aia", "no-huber"), better),
        Claim("stages matter", ("aia", "raw"), better),
        Claim("rho has a middle optimum: 50 beats 1 and 100", ("aia", "rho-1", "rho-100"), better),
        Claim("1:1 is the best ratio with AIA", ("aia", "2to1+aia", "4to1+aia", "1to2+aia"), better),
        Claim("unified training is worse than the experts (a conflict)", ("experts", "unified"), better),
        Claim("alignment rises in understanding", ("experts",),
              lambda experts: experts["alignment"]["und"][-1] - experts["alignment"]["und"][0]),
        Claim("alignment rises and falls in generation", ("experts",), lambda experts: max(
            experts["alignment"]["gen"][1:-1]) - max(experts["alignment"]["gen"][i] for i in (0, -1))),
        Claim("the shared model's alignment lies between: below the expert's in understanding, above in generation "
              "(last layer)", ("experts", "unified"), between),
        Claim("at half width unified training is worse than the experts (a conflict)", ("half-experts", "half"),
              better),
        Claim("at half width AIA improves the mean of both scores", ("half+aia", "half"), better),
        Claim("at half width forked beats shared", ("half+fork", "half"), better),
        Claim("forked beats shared", ("unifork-2", "unified"), better),
        Claim("forked beats shared of the same size", ("unifork", "wide"), better))


def in_turn_claims():
    """What pictures and text in turn give, and what they cost."""
    return (
        Claim("a plan improves colour attribution", ("mixed",), coloured),
        Claim("a plan improves colour attribution (Janus-Pro)", ("mixed-janus",), coloured),
        Claim("a plan improves the mean of all skills", ("mixed",), lambda row: row["plan"] - row["plain"]),
        Claim("AIA keeps what is done in turn (it loses less than 0.02)", ("mixed", "mixed+aia"),
              lambda plain, tuned: in_turn(tuned) - in_turn(plain) + MARGIN),
        Claim("a second encoder has to look again", ("mixed-janus", "mixed-codes"),
              lambda looking, blind: in_turn(looking) - in_turn(blind)),
        Claim("a fork costs what is done in turn", ("mixed", "mixed-fork"),
              lambda shared, forked: in_turn(shared) - in_turn(forked)))


def early_claims():
    """AIA where there is a conflict: planned before the runs (lab/STUDY.md). The first three are primary."""
    def planned(text, number):
        return Claim(f"AIA from the first joint step {text}", ("early", "narrow"), number, planned=True, margin=MARGIN)

    def explored(text, row, base="narrow", number=better):
        return Claim(text, (row, base), number, margin=MARGIN)
    return (
        planned("closes part of the conflict (mean of both scores)", better),
        planned("improves understanding", lambda row, base: row["und"] - base["und"]),
        planned("improves generation", lambda row, base: row["gen"] - base["gen"]),
        Claim("there is a conflict at half width (new seeds)", ("narrow-experts", "narrow"), better),
        Claim("early AIA moves curves towards the targets", ("early", "narrow"), nearer),
        explored("early AIA that fades improves the mean of both scores", "early-fading"),
        explored("early AIA towards the experts' curves improves it", "early-experts"),
        explored("early AIA towards the experts' curves that fades improves it", "early-experts-fading"),
        explored("early AIA towards exchanged targets improves it (a control)", "early-exchanged"),
        explored("early AIA towards exchanged targets that fades improves it (a control)", "early-exchanged-fading"),
        explored("the right targets beat exchanged ones", "early", "early-exchanged"),
        explored("early AIA without the first token improves it", "early-no-first"),
        explored("without the first token beats with it", "early-no-first", "early"),
        Claim("most of generation's moved attention lies on the first token", ("early", "narrow"),
              lambda row, base: on_first(row, base) - 0.5),
        explored("an early fork improves it", "early-fork"),
        explored("in a larger world on a GPU, AIA improves the mean of both scores", "small+aia", "small"))


CLAIMS = (*of_papers(), *in_turn_claims(), *early_claims())


def claims_of(rows):
    """Verdict of each claim. Of several numbers one clear failure rejects it, and it holds only if all hold; the figure
    is the smallest of those that decided. Planned claims are judged by `planned_look`."""
    table = by_row(rows)
    found = {claim.text: told(claim, table, seeds_of(claim, table)) for claim in CLAIMS}
    planned = [claim for claim in CLAIMS if claim.planned]
    for claim in planned:
        found[claim.text]["verdict"] = "not decided here"       # until a look is complete
    for look in LOOKS:
        for text, row in planned_look(planned, table, look).items():
            if found[text]["verdict"] == "not decided here":
                found[text] = row
    return [*found.values()]


def seeds_of(claim, table):
    """The seeds of which there are all rows that a claim needs."""
    return sorted(set.intersection(*({*table.get(name, {})} for name in claim.rows)))


def numbers_of(claim, table, seeds):
    """The numbers of a claim, each as a list over seeds."""
    values = [np.atleast_1d(claim.number(*(table[name][seed] for name in claim.rows))) for seed in seeds]
    return [*zip(*values, strict=True)]


def told(claim, table, seeds):
    """A claim by its interval over some seeds, JSON-ready."""
    parts = [interval(part) for part in numbers_of(claim, table, seeds)] or [(None, None)]
    verdicts = [verdict(*part) for part in parts]
    decision = next((one for one in ("does not hold", "not decided here") if one in verdicts), "holds")
    mean, half = min((part for part in parts if verdict(*part) == decision), key=itemgetter(0))
    if claim.margin and half is not None and abs(mean) + half < claim.margin:
        decision = "no effect"
    return {"claim": claim.text, "verdict": decision, "figure": mean, "interval": half, "seeds": len(seeds)}


def planned_look(claims, table, look):
    """Planned claims on the seeds of a look, {text: row}: by the sign-flip test, corrected for their number, and "no
    effect" by the interval as others; {} while a run of the look is missing."""
    seeds = [*look]
    if not claims or any({*seeds} - {*seeds_of(claim, table)} for claim in claims):
        return {}
    ps = [sign_flip(numbers_of(claim, table, seeds)[0]) for claim in claims]
    rows = {}
    for claim, p, corrected in zip(claims, ps, holm(ps), strict=True):
        row = told(claim, table, seeds) | {"p": p, "corrected": corrected}
        if row["verdict"] != "no effect":
            clear = "holds" if row["figure"] > 0 else "does not hold"
            row["verdict"] = clear if corrected <= LEVEL else "not decided here"
        rows[claim.text] = row
    return rows


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


def print_apart(apart):
    """How curves of experts differ from the unified model's, and those of seeds from one another."""
    rows = []
    for name, row in apart.items():
        for task in aia.TASKS:
            found = row[task]
            apart_by = [with_interval(**found[key], sign="") for key in ("experts", "seeds")]
            shifts = ", ".join(with_interval(*layer) for layer in found["shift"])
            p = "-" if found["p"] is None else f"{found['p']:.3f}"
            rows.append([name, TASK_NAME[task], str(row["n"]), *apart_by, shifts, p])
    print_table("Distance between curves (mean over layers), and where experts lie", (
        "setting", "task", "seeds", "expert and unified model", "unified models of two seeds",
        "expert minus unified, layer by layer", "p of the whole"), rows)


def print_claims(claims):
    """Verdicts, with the figures they rest on."""
    rows = []
    for claim in filter(itemgetter("seeds"), claims):
        figure = with_interval(claim["figure"], claim["interval"])
        p = f"{claim['p']:.3f} ({claim['corrected']:.3f})" if "p" in claim else "-"
        rows.append([claim["claim"], claim["verdict"], figure, p, str(claim["seeds"])])
    print_table("Claims", ("claim", "verdict", "figure (above 0 where it holds)", "p (corrected)", "seeds"), rows)
