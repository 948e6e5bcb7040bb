"""Score a model on a benchmark: `python eval.py score BENCH --help`."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import eval as evaluation
from benchmarks.common import MAX_NEW_TOKENS, ask_all, read_predictions
from benchmarks.dpg import run_dpg
from benchmarks.fid import run_fid
from benchmarks.geneval import run_geneval
from benchmarks.judge import Judge
from benchmarks.mmbench import judge_mmbench, read_mmbench
from benchmarks.mme import judge_mme, read_mme
from benchmarks.mmmu import judge_mmmu, read_mmmu
from benchmarks.mmvet import judge_mmvet, read_mmvet
from benchmarks.mmvp import judge_mmvp, read_mmvp
from benchmarks.pope import judge_pope, read_pope
from parts.processes import rank
from parts.settings import InputError, lines_to, opt, write_json

ANSWERED = {"mmmu": (read_mmmu, judge_mmmu), "mmbench": (read_mmbench, judge_mmbench), "mmvp": (read_mmvp, judge_mmvp),
            "mmvet": (read_mmvet, judge_mmvet), "pope": (read_pope, judge_pope), "mme": (read_mme, judge_mme)}
DRAWN = {"geneval": run_geneval, "dpg": run_dpg, "fid": run_fid}
# Ways to score, the default first: "aia" is what the paper's evaluation programs do.
WAYS = {"mmmu": ("aia", "official"), "mmbench": ("aia", "vlmevalkit"), "mmvp": ("aia", "official"),
        "mmvet": ("official",), "pope": ("aia",), "mme": ("aia", "official"), "geneval": ("official",),
        "dpg": ("official", "ulmevalkit"), "fid": ("pytorch", "clean", "world")}


@dataclass(frozen=True)
class Score(evaluation.Loaded):
    """Score a model on a benchmark."""

    POSITIONAL = ("bench",)
    bench: str = opt("", "benchmark", tuple(WAYS))
    data: str = opt("", "folder of the benchmark as it is distributed; mmbench, geneval: or its file; fid: folder of "
                    "pictures, or an .npz with mu and sigma")
    out: str = opt("", "folder of answers, submission files, scores.json")
    preds: str = opt("", "score this and run no model: predictions.jsonl; geneval, dpg, fid: a folder of pictures")
    variant: str = opt("", "way to score, empty: the first of "
                       + "; ".join(f"{name}: {', '.join(ways)}" for name, ways in WAYS.items() if len(ways) > 1))
    judge: str = opt("none", "JSONL of recorded replies of a judge; none: what needs one is null")
    judge_export: str = opt("", "write the requests that have no reply yet to this file, and stop")
    judge_prompt: str = opt("", "file with the official judge prompt (mmbench with a judge, mmvet)")
    force: bool = opt(False, "take a judge prompt or labels (pope) that are not the official ones")
    prompt_style: str = opt("aia", "how questions are put to Janus-Pro: aia or vlmevalkit", tuple(MAX_NEW_TOKENS))
    gen_roles: str = opt("tags", "role words of Janus-Pro's drawing prompts: <|User|>, or User", ("tags", "plain"))
    guidance: float = opt(0.0, "classifier-free guidance of drawings; 0: the model's own")
    pictures: int = opt(4, "for each prompt (geneval, dpg)")
    runs: int = opt(1, "gradings by the judge (mmvet)")
    features: str = opt("", "fid: .npz with features (n, d) in place of --preds")
    batch: int = opt(1, "questions asked together")
    n: int = opt(60, "fid --variant world: pictures for each skill")
    seed: int = opt(0, "draws questions, prompts and codes")


def refuse_flags(settings):
    """Flags that do not go together, before anything is read or written."""
    bench, variant, world = settings.bench, settings.variant, settings.variant == "world"
    given = settings.preds or (bench == "fid" and settings.features)
    for wrong, message in (
            (variant not in WAYS[bench], f"--variant {variant!r}: {bench} knows {', '.join(WAYS[bench])}"),
            (not settings.out, f"score {bench} needs --out, a folder for what it writes"),
            (not settings.data and not world, f"score {bench} needs --data, the benchmark as it is distributed"),
            (bench == "fid" and not world and not given, "score fid needs --preds or --features beside --data"),
            (not settings.checkpoint and (world or not given),
             "give --checkpoint FOLDER to run a model, or --preds to score what one has said or drawn"),
            (settings.prompt_style != "aia" and bench == "mmvet",
             "--prompt-style vlmevalkit: its system text for MM-Vet is not known here; use aia"),
            (bench == "dpg" and settings.pictures not in (1, 4), "--pictures: dpg takes 4, as a grid, or 1"),
            (min(settings.pictures, settings.batch, settings.runs) < 1, "--pictures, --batch and --runs start at 1")):
        if wrong:
            raise InputError(message)


def score_answers(settings, judge):
    """Read the questions, have them answered unless they are, score what is on disk."""
    read, judged = ANSWERED[settings.bench]
    items = read(settings.data, settings)
    for name, times in Counter(item.id for item in items).items():
        if times > 1:
            raise InputError(f"{settings.data}: id {name!r} comes {times} times: download it again")
    if not items:
        raise InputError(f"{settings.data} holds no questions: download it again")
    if not settings.preds:
        ask_all(settings, items)
    if rank():
        return None
    file = settings.preds or Path(settings.out) / "predictions.jsonl"
    scores = judged(settings, items, read_predictions(file, items), judge)
    return scores and scores | {"questions": len(items)}


def score(settings):
    """Scores of one benchmark, printed and stored."""
    settings, judge = replace(settings, variant=settings.variant or WAYS[settings.bench][0]), None
    refuse_flags(settings)
    recorded = "" if settings.judge == "none" else settings.judge
    if recorded or settings.judge_export:
        judge = Judge(recorded, settings.judge_export)
    try:
        Path(settings.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {settings.out} cannot be made ({error.strerror}): give a folder") from error
    scores = DRAWN.get(settings.bench, score_answers)(settings, judge)
    if judge and judge.wanted:
        lines_to(settings.judge_export, [json.dumps({"key": key, "request": request, "replies": []}, ensure_ascii=False)
                                         for key, request in judge.wanted.items()])
        print(f"{settings.judge_export}: {len(judge.wanted)} requests; fill in their replies"
              + f", {settings.runs} each," * (settings.runs > 1) + " and give it as --judge")
        return {"benchmark": settings.bench, "requests": len(judge.wanted)}
    if scores is None:                                                          # another process of torchrun tells it
        return {}
    scores = {"benchmark": settings.bench, "variant": settings.variant, **scores}
    write_json(scores, Path(settings.out) / "scores.json")
    print_benchmark(scores)
    return {key: value for key, value in scores.items() if not isinstance(value, dict | list)}


def print_benchmark(scores):
    """The number first, then what it is made of."""
    def listed(values):
        return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in values.items())

    plain = {key: value for key, value in scores.items() if not isinstance(value, dict | list) and value is not None}
    print(f"{plain.pop('benchmark')} ({plain.pop('variant')}): " + "no score, " * (scores["score"] is None)
          + listed(plain))
    for name, value in scores.items():
        if isinstance(value, dict):
            print(f"  {name}: {listed(value)}")
