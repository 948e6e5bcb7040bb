"""Plan and draw: does it help to write down what will be drawn, and is it the plan that the picture is drawn from?

The same weights draw the same held-out prompts plainly, with the plan that they write, with a right plan and with a
plan of another scene; then layer by layer with the plan, or the prompt, hidden from the picture. Beside it stands Eq. 1
of the codes on either: is attention paid where it is needed?

Of several runs it also tells what a story costs them, beside the first: their seconds are measured in turn.

    python -m lab.plans runs/tiny-mixed-seed0 runs/tiny-mixed-janus-seed0 --out plans.json
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import aia
import data
import eval as evaluation
from formats.datasets import parse_ratio
from formats.records import conversation
from lab.speed import interleaved
from parts.settings import (
    InputError,
    at_least,
    check_out,
    machine,
    opt,
    parse,
    read_json,
    run_command,
    stream,
    tell,
    write_json,
)
from parts.stories import PLAN, plan_of, scene_of
from parts.world import describe, draw_scenes, prompt_text

# Legend: B samples, T tokens, U keys, L layers.


@dataclass(frozen=True)
class Plans:
    """Draw held-out prompts with and without a plan, and hide the plan from the picture layer by layer."""

    POSITIONAL = ("runs",)
    runs: tuple = opt((), "run folders that have learned conversations (--preset tiny-mixed)")
    n: int = opt(60, "prompts for each skill")
    seed: int = opt(0, "draws the prompts")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    out: str = opt("plans.json", "JSON file to write")


def plans(settings):
    """All runs, one after the other -> {run: shares of right pictures}."""
    at_least(settings, {"n": 1, "seed": 0})
    check_out(settings.out)
    if not settings.runs:
        raise InputError("plans needs run folders: python -m lab.plans runs/tiny-mixed-seed0")
    opened = {run: opened_run(run, settings.device) for run in settings.runs}
    for run in opened:
        if not parse_ratio(read_json(Path(run) / "settings.json")["ratio"])[2]:
            raise InputError(f"{run} has learned no plans: give a run with conversations (--preset tiny-mixed)")
    rows = {}
    for run, one in opened.items():
        rows[run] = plans_of(*one, settings)
        print_run(run, rows[run])
    costs = story_costs(opened)
    content = {"runs": rows, "costs": costs, "n": settings.n, "seed": settings.seed, "machine": machine()}
    write_json(content, settings.out)
    return {run: {way: row["skills"][way]["all"] for way in row["skills"]} for run, row in rows.items()}


def opened_run(run, device, dtype="stored"):
    """Model, tokenizer and world of a run that has learned it."""
    m, text, made = evaluation.load_run(evaluation.ScoreWorld(checkpoint=run, device=device, dtype=dtype))
    return m, text, evaluation.own_world(made, run)


def plans_of(m, text, world, settings):
    """All measurements of one run, JSON-ready."""
    rng = stream(settings.seed, "in turn", 4)
    items = [world.held_out_scene(skill, rng) for skill in world.skills for _ in range(settings.n)]
    goals = [goal for _, goal in items]
    prompts = [prompt_text(goal, rng) for goal in goals]
    right = [plan_of(scene, prompt) for (scene, _), prompt in zip(items, prompts, strict=True)]
    others = np.random.default_rng(settings.seed).permutation(len(items))
    wrong = [describe(items[i][0]) for i in others]

    def scored(seen):
        right = [evaluation.shows(goal, scene) for goal, scene in zip(goals, seen, strict=True)]
        return evaluation.by_part(right, world.skills) | {"all": float(np.mean(right))}
    plain, _ = drawn(m, text, world, prompts)
    own, said = drawn(m, text, world, prompts, PLAN)
    given, _ = drawn(m, text, world, prompts, PLAN, right)
    misled, _ = drawn(m, text, world, prompts, PLAN, wrong)
    fits = [evaluation.shows(goal, scene_of(plan)) for goal, plan in zip(goals, said, strict=True)]
    found = {"skills": {"plain": scored(plain), "own plan": scored(own), "right plan": scored(given),
                        "wrong plan": scored(misled)},
             "own plan fits the prompt": float(np.mean(fits)),
             "picture shows the own plan": float(np.mean([
                 scene is not None and scene == scene_of(plan) for scene, plan in zip(own, said, strict=True)])),
             "wrong plan: picture shows the plan": float(np.mean([
                 scene == items[i][0] for scene, i in zip(misled, others, strict=True)])),
             "tokens of a plan": float(np.mean([len(text.encode(plan)) for plan in said])),
             "tokens of a prompt": float(np.mean([len(text.encode(prompt)) for prompt in prompts]))}
    found["intensity"] = attention_paid(m, text, [scene for scene, _ in items], prompts, right, world)
    layers = range(m.config.layers)
    for name in ("plan", "prompt"):
        hidden = {}
        for where in (*([layer] for layer in layers), list(layers)):
            seen, _ = drawn(m, text, world, prompts, PLAN, right, (name, where))
            hidden["all" if len(where) > 1 else str(where[0])] = scored(seen)["all"]
        found[f"{name} hidden in layer"] = hidden
    return found


def begun(preparer, prompts, before, given):
    """Conversations up to the picture -> pieces of each, and where prompt and plan stand in it, {name: (first, end)}.
    The prompt is all between the first token and the answer. given: plans, or None to leave them to the model."""
    samples, spans = [], []
    for i, prompt in enumerate(prompts):
        pieces, = preparer.pieces([conversation([(before + prompt, None)], ())])[0]
        first = sum(len(ids) for ids, _ in pieces)
        plan = preparer.template.stretch(given[i]) if given else []
        samples.append([*pieces, (plan, data.ANSWER)])
        spans.append({"prompt": (1, first), "plan": (first, first + len(plan))})
    return samples, spans


def drawn(m, text, world, prompts, before="", given=None, hide=None, batch=64):
    """What the reader sees in the pictures of prompts, scenes or None, and the plan of each as it was written. hide:
    ("plan" or "prompt", layers): not seen by the picture in these layers."""
    preparer = data.Preparer(m, text, training=False)
    device = next(m.parameters()).device
    seen, said = [], []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        samples, spans = begun(preparer, prompts[part], before, given and given[part])
        ids, mask = evaluation.left_padded(samples, text.ids["pad"], device)
        hidden = torch.zeros_like(mask)                                         # (B, T)
        for row, span in zip(hidden, spans, strict=True):
            first, end = span[hide[0]] if hide else (0, 0)
            shift = len(row) - span["plan"][1]                                  # padding stands in front
            row[first + shift:end + shift] = True
        with blind(m, hide[1] if hide else (), hidden):
            answers = m.generate(ids, mask=mask, opening=preparer.template.opening(*m.config.grid), max_new_tokens=64,
                                 max_pictures=1, code_temperature=0.0)
        answers = evaluation.finished(m, text, answers)
        seen += evaluation.seen_in(answers, world)
        said += [" ".join(one for one in parts if isinstance(one, str)) for parts in answers]
    return seen, said


@contextlib.contextmanager
def blind(m, layers, hidden, last=False):
    """In some layers, what is generated does not see the columns of the prompts that hidden (B, T) marks. last: nor
    does the last token of the prompts, which predicts the first one that is generated."""
    def look_away(layer, given):
        x, rows, rope, visible, *rest = given
        new, used = len(x) // rows, rest[-1].used
        blinded = int(last) if new == used else new             # the prompts come first, in one go
        if not blinded:
            return given
        if visible is None:
            visible = torch.ones(new, used, dtype=torch.bool, device=x.device).tril(used - new)[None, None]
        columns = visible.shape[-1]                 # a step that is replayed reads all columns, used or not
        keep = ~torch.nn.functional.pad(hidden, (0, columns - hidden.shape[1]))                 # (B, U)
        sighted = torch.arange(new, device=x.device) < new - blinded                            # (T,)
        return x, rows, rope, visible & (keep[:, None, None] | sighted[:, None]), *rest
    hooks = [part.self_attn.register_forward_pre_hook(look_away) for i in layers
             for part in {m.lm.path("und")[0][i], m.lm.path("gen")[0][i]}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def attention_paid(m, text, scenes, prompts, given, world):
    """Eq. 1 of the codes of right pictures that follow a right plan, on the plan and on the prompt: {name: (L,)}."""
    preparer = data.Preparer(m, text, training=False)
    device = next(m.parameters()).device
    sums = {name: 0.0 for name in ("prompt", "plan")}
    pictures = draw_scenes(scenes, world.cell_side)
    for start in range(0, len(prompts), 64):
        part = range(start, min(start + 64, len(prompts)))
        _, spans = begun(preparer, [prompts[i] for i in part], PLAN, [given[i] for i in part])
        batch = preparer.batch([conversation([(PLAN + prompts[i], f"{given[i]} <image>")], (pictures[i],))
                                for i in part])
        for name in sums:
            condition = torch.zeros_like(batch.condition)                       # (2, B, T)
            for row, span in zip(condition[0], spans, strict=True):
                row[slice(*span[name])] = True
            out = m(batch.measuring(condition).to(device))
            sums[name] += out.intensity[aia.TASKS.index("gen")].sum(0).cpu()    # (L,)
    return {name: (value / len(prompts)).tolist() for name, value in sums.items()}


def story_costs(opened, n=12, repeats=5):
    """What n stories of four turns cost each run: seconds of one, the ratio to the first run, positions that run
    through the decoder (a fork runs some layers twice; each turn reads all before it again), and parameters. Medians;
    the runs take turns."""
    def tell(m, text, world):
        return evaluation.score_stories(m, text, world, n, np.random.default_rng(0))

    def seen(counted):
        return lambda layer, given: counted.append(len(given[0]))
    seconds = interleaved({run: lambda one=one: tell(*one) for run, one in opened.items()}, repeats)
    costs = {}
    for run, (m, text, world) in opened.items():
        counted = []
        hooks = [layer.register_forward_pre_hook(seen(counted)) for layer in m.lm.all_layers()]
        tell(m, text, world)
        for hook in hooks:
            hook.remove()
        costs[run] = {"seconds": seconds[run] / n, "ratio": seconds[run] / seconds[next(iter(opened))],
                      "positions": sum(counted) / m.config.layers / n,
                      "parameters": sum(p.numel() for p in m.parameters())}
        print(f"a story of {run}: {costs[run]['seconds']:.3f} s, {costs[run]['ratio']:.2f} of the first run's, "
              f"{costs[run]['positions']:.0f} positions, {costs[run]['parameters']:,} parameters")
    return costs


def print_run(run, row):
    """One run as a table for the terminal."""
    print(run)
    for way, skills in row["skills"].items():
        print(f"  {way:12s}" + "   ".join(f"{skill} {value:.2f}" for skill, value in skills.items()))
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in row.items() if isinstance(value, float)))
    for name in ("plan", "prompt"):
        print(f"  {name:6s} attention by layer " + " ".join(f"{share:.2f}" for share in row["intensity"][name])
              + "   right if hidden in layer " + " ".join(
                  f"{layer}: {value:.2f}" for layer, value in row[f"{name} hidden in layer"].items()))


def main(argv=None):
    tell(plans(parse(Plans, argv, "lab.plans")))


if __name__ == "__main__":
    run_command(main)
