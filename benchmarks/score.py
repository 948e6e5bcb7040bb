"""The command that scores a model on a benchmark, or answers and pictures that exist already.

It asks the model (or draws), stores what comes, scores what is on disk, and writes scores.json.
    python eval.py score pope --data POPE --checkpoint RUN --out scores/pope
    python eval.py score pope --data POPE --preds answers.jsonl --out scores/pope      # only scores
    python eval.py score pope --help
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import eval as evaluation
from benchmarks.common import MAX_NEW_TOKENS, ask_all, lines_to, read_predictions
from benchmarks.dpg import run_dpg
from benchmarks.fid import run_fid
from benchmarks.geneval import run_geneval
from benchmarks.judge import PROMPTS, Judge, judge_prompt
from benchmarks.mmbench import mmbench_result, read_mmbench
from benchmarks.mme import mme_result, read_mme
from benchmarks.mmmu import mmmu_result, read_mmmu
from benchmarks.mmvet import mmvet_result, read_mmvet
from benchmarks.mmvp import mmvp_result, read_mmvp
from benchmarks.pope import pope_result, read_pope
from parts.processes import rank
from parts.settings import InputError, at_least, opt, read_json, write_json

ANSWERED = {"mmmu": (read_mmmu, mmmu_result), "mmbench": (read_mmbench, mmbench_result),
            "mmvp": (read_mmvp, mmvp_result), "mmvet": (read_mmvet, mmvet_result), "pope": (read_pope, pope_result),
            "mme": (read_mme, mme_result)}
DRAWN_BY_PROMPT = {"geneval": run_geneval, "dpg": run_dpg, "fid": run_fid}
# The default first. "aia" does what the AIA paper's evaluation programs do.
BENCH_VARIANTS = {
    "mmmu": ("aia", "official"), "mmbench": ("aia", "vlmevalkit"), "mmvp": ("aia", "official"), "mmvet": ("official",),
    "pope": ("aia",), "mme": ("aia", "official"), "geneval": ("official",), "dpg": ("official", "ulmevalkit"),
    "fid": ("pytorch", "clean", "world")}
JUDGED = {("mmbench", "aia"), ("mmbench", "vlmevalkit"), ("mmvp", "official"), ("mmvet", "official"),
          ("geneval", "official"), ("dpg", "official"), ("dpg", "ulmevalkit")}


@dataclass(frozen=True)
class Score(evaluation.Loaded):
    """Score a model on a benchmark."""

    POSITIONAL = ("bench",)
    bench: str = opt("", "benchmark", tuple(BENCH_VARIANTS))
    data: str = opt("", "folder of the benchmark as it is distributed; mmbench, geneval, dpg's .tsv: or the file; fid: "
                    "folder of pictures, or an .npz with mu and sigma")
    out: str = opt("", "folder for answers or pictures, submission files, and scores.json")
    preds: str = opt("", "score these and run no model: predictions.jsonl; geneval, dpg, fid: a folder of pictures")
    variant: str = opt("", "way to score; empty: the first of " + "; ".join(
        f"{name}: {', '.join(ways)}" for name, ways in BENCH_VARIANTS.items() if len(ways) > 1))
    judge: str = opt("none", "JSON-lines file with recorded replies of a judge; none: scores that need one are null")
    judge_export: str = opt("", "write the requests without a reply to this file, and stop")
    judge_prompt: str = opt("", "file with the official judge prompt (mmbench with a judge, mmvet)")
    force: bool = opt(False, "accept a judge prompt, or labels (pope), other than the official ones")
    prompt_style: str = opt("aia", "how Janus-Pro is asked: aia or vlmevalkit", tuple(MAX_NEW_TOKENS))
    gen_roles: str = opt("tags", "role words of Janus-Pro's drawing prompts: <|User|>, or User", ("tags", "plain"))
    guidance: float = opt(0.0, "classifier-free guidance of drawings; 0: the model's own")
    pictures: int = opt(4, "pictures for each prompt (geneval, dpg)")
    runs: int = opt(1, "gradings by the judge (mmvet)")
    features: str = opt("", "fid: .npz with features (n, d), instead of --preds")
    batch: int = opt(1, "questions asked at once")
    n: int = opt(60, "fid --variant world: pictures for each skill")
    seed: int = opt(0, "random seed of the questions, prompts and codes")


def refuse_flags(settings):
    """Refuse flags that do not go together, before anything is read or written."""
    at_least(settings, {"pictures": 1, "batch": 1, "runs": 1, "n": 1, "seed": 0, "guidance": 0})
    bench, variant = settings.bench, settings.variant
    world = variant == "world"
    given = settings.preds or (bench == "fid" and settings.features)
    for wrong, message in (
            (variant not in BENCH_VARIANTS[bench],
             f"--variant {variant!r} does not exist for {bench}: use one of {', '.join(BENCH_VARIANTS[bench])}"),
            (not settings.out, f"score {bench} needs --out, a folder for its results"),
            (not settings.data and not world, f"score {bench} needs --data, the benchmark as it is distributed"),
            (bench == "fid" and not world and not given, "score fid needs --preds or --features besides --data"),
            (not settings.checkpoint and (world or not given),
             "give --checkpoint FOLDER to run a model, or --preds to score existing answers or pictures"),
            (settings.prompt_style != "aia" and bench == "mmvet",
             "--prompt-style vlmevalkit has a system text of its own for MM-Vet, which is not available here: use aia"),
            (bench == "dpg" and settings.pictures not in (1, 4),
             f"--pictures {settings.pictures}: dpg takes 4, as a grid, or 1"),
            (not world and not Path(settings.data).exists(),
             f"--data {settings.data} does not exist: give the benchmark as it is distributed"),
            (settings.preds and not Path(settings.preds).exists(),
             f"--preds {settings.preds} does not exist: give a file of answers, or a folder of pictures"),
            ((settings.judge_export or settings.judge != "none") and (bench, variant) not in JUDGED,
             f"{bench} --variant {variant} asks no judge: leave out --judge and --judge-export")):
        if wrong:
            raise InputError(message)


def make_out(settings):
    """Make the output folder. Refuse one with results of another benchmark: files of both would lie there as one."""
    out = Path(settings.out)
    for name, field in (("settings.json", "bench"), ("scores.json", "benchmark")):
        if not (out / name).exists():
            continue
        owner = read_json(out / name).get(field, "something else")
        if owner != settings.bench:
            raise InputError(f"--out {out} holds results of {owner} ({name}): give {settings.bench} its own folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be created ({error.strerror}): give a folder") from error


def score_answers(settings, judge):
    """Read the questions, ask the model unless answers are given, and score what is on disk."""
    read, result = ANSWERED[settings.bench]
    file, items = read(settings.data, settings)
    for name, times in Counter(item.id for item in items).items():
        if times > 1:
            raise InputError(f"{settings.data}: id {name!r} occurs {times} times: download it again")
    if not items:
        raise InputError(f"{settings.data} holds no questions: download it again")
    if not settings.preds:
        ask_all(settings, items, file.name)
    if rank():
        return None
    preds = settings.preds or Path(settings.out) / "predictions.jsonl"
    scores = result(settings, items, read_predictions(preds, items), judge)
    if scores is None:                          # requests to the judge are open
        return None
    return scores | {"questions": len(items), "data": file.name}


def print_benchmark(scores):
    """The score first, then its parts."""
    def listed(values):
        return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in values.items())

    plain = {key: value for key, value in scores.items() if not isinstance(value, dict | list) and value is not None}
    title = f"{plain.pop('benchmark')} ({plain.pop('variant')})"
    if scores["score"] is None:
        print(f"{title}: no score, {listed(plain)}")
    else:
        print(f"{title}: {listed(plain)}")
    for name, value in scores.items():
        if isinstance(value, dict):
            print(f"  {name}: {listed(value)}")


def export_requests(settings, judge):
    """Write the requests that have no reply yet."""
    rows = [{"key": key, "request": request, "replies": []} for key, request in judge.wanted.items()]
    lines_to(settings.judge_export, [json.dumps(row, ensure_ascii=False) for row in rows])
    each = f", {settings.runs} each," if settings.runs > 1 else ""
    print(f"{settings.judge_export}: {len(rows)} requests; fill in their replies{each} and pass the file as --judge")


def score(settings):
    """Print and store the scores of one benchmark. Returns its plain numbers; empty on other processes of torchrun."""
    settings = replace(settings, variant=settings.variant or BENCH_VARIANTS[settings.bench][0])
    refuse_flags(settings)
    recorded = "" if settings.judge == "none" else settings.judge
    judge = Judge(recorded, settings.judge_export) if recorded or settings.judge_export else None
    if judge and settings.bench in PROMPTS:
        judge_prompt(settings)                      # a bad one is refused now, not after all questions have been asked
    make_out(settings)
    scores = DRAWN_BY_PROMPT.get(settings.bench, score_answers)(settings, judge)
    if judge and judge.wanted:
        export_requests(settings, judge)
        return {"benchmark": settings.bench, "requests": len(judge.wanted)}
    if scores is None:
        return {}
    scores = {"benchmark": settings.bench, "variant": settings.variant, **scores}
    write_json(scores, Path(settings.out) / "scores.json")
    print_benchmark(scores)
    return {key: value for key, value in scores.items() if not isinstance(value, dict | list)}
