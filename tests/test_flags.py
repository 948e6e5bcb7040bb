"""Every flag of train.py is seen in what a run does within a few steps, or refused."""

import json
from dataclasses import dataclass, fields

import pytest
import torch
from made_runs import command, refused

import aia
import data
import eval as evaluation
import model
import train

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
SHORT = "--steps 2 --batch-size 4 --device cpu "
WORLD = "--pool 8 --eval-n 1 "
SORTS = {"tuned": WORLD + "--init {run} --calibration 2", "fresh": WORLD + "--calibration 2",
         "uncalibrated": WORLD + "--init {run}", "janus": WORLD + "--init {janus} --preset tiny-janus",
         "own": "--init {run} --calibration 2 --data {data}", "holed": "--init {run} --data {data} --val {holed}"}
CLOCKS = {"seconds", "samples_per_second", "tokens_per_second", "waiting", "memory_gb"}


@dataclass(frozen=True)
class Flag:
    """A flag with another value than usual, in a run of some sort, and which traces of it change; or the refusal."""

    words: str
    seen: str = ""
    of: str = "tuned"                               # one of SORTS
    also: str = ""                                  # given with and without the flag
    refused: str = ""


FLAGS = {
    "preset": Flag("tiny-janus", "weights", "fresh"), "recipe": Flag("janus-post", "optimizer", "janus"),
    "data": Flag("{other}", "batches", "own"), "init": Flag("{run}", "weights values", "fresh"),
    "out": Flag("{new}", "place"), "resume": Flag("", "batches"), "seed": Flag("1", "batches", "fresh"),
    "steps": Flag("1", "log"), "batch_size": Flag("3", "batches"),
    "aia_weight": Flag("off", "lambda", "uncalibrated"), "rho": Flag("5", "lambda"),
    "calibration": Flag("1", "lambda"), "aia_targets": Flag("{targets}", "aia"),
    "aia_variant": Flag("no-huber", "aia"), "arms": Flag("both", "log"), "lr": Flag("0.5", "optimizer"),
    "weight_decay": Flag("0.7", "optimizer"), "micro_batch": Flag("1", "batches"), "ratio": Flag("1:1:2", "batches"),
    "mix": Flag("drawn", "batches"), "lora_rank": Flag("2", "weights"), "fork_layer": Flag("1", "weights"),
    "vision_tokenizer": Flag("{run}", refused="has no effect, as it belongs to --init with public weights"),
    "image_size": Flag("24", "batches", "own"), "attention": Flag("explicit", "told"),
    "val": Flag("{other}", "val", "own"), "val_every": Flag("1", "log", "own", "--val {data}"),
    "encoded": Flag("{encoded}", "encoded", "own"), "on_bad_record": Flag("skip", "bad", "holed"),
    "shapes": Flag("5", "batches", "fresh"), "colours": Flag("5", "batches", "fresh"),
    "objects": Flag("3", "batches", "fresh", "--shapes 5 --colours 5"),
    "cell": Flag("16", refused="give --cell 8", of="fresh"), "pool": Flag("4", "batches"),
    "eval_n": Flag("2", "asked"), "device": Flag("meta", refused="is not available here"),
    "dtype": Flag("bfloat16", "autocast told"), "pure_bf16": Flag("", "weights told"),
    "checkpoint_activations": Flag("", "recomputed"), "compile": Flag("", "compiled"),
    "parallel": Flag("fsdp", refused="takes torchrun"), "offload": Flag("", refused="needs torchrun"),
    "log_every": Flag("1", "log"), "save_every": Flag("1", "folder"),
    "keep": Flag("1", "folder", also="--save-every 1 --steps 3"),
}


def test_the_table_has_every_flag():
    """A new flag needs a line here."""
    assert {f.name for f in fields(train.TrainConfig)} == set(FLAGS)
    assert all(flag.seen or flag.refused for flag in FLAGS.values())


@pytest.fixture(scope="module")
def places(runs, tmp_path_factory):
    """Names in the table -> folders and files."""
    root = tmp_path_factory.mktemp("flags")
    found = {"run": runs["tiny-emu3"], "data": root / "world/train.jsonl", "encoded": root / "encoded",
             "holed": root / "world/holed.jsonl", "other": root / "other/train.jsonl", "janus": runs["tiny-janus"],
             "new": root / "new",
             "targets": root / "targets.json"}
    for name, seed in (("data", "0"), ("other", "1")):
        data.main(["export", str(found[name].parent), "--n", "8", "--seed", seed])
    data.main(["encode", str(found["encoded"]), "--data", str(found["data"]), "--init", str(found["run"])])
    lines = found["data"].read_text().splitlines()
    picture = json.loads(lines[0])["image"]         # one record has no picture, one more words than the model takes
    lines += [json.dumps({"image": name, "prompt": words}) for name, words in (
        ("none.png", "a red circle"), (picture, "a red circle " * 200))]
    found["holed"].write_text("\n".join(lines) + "\n")
    found["targets"].write_text(json.dumps(dict.fromkeys(aia.TASKS, [[0, 0.1, 0.9]])))
    return found


def traces(argv, out):
    """What a run does, without its scores: {name of a trace: its value}; {} if it is refused."""
    seen = {"batches": [], "optimizer": [], "autocast": [], "encoded": [], "recomputed": 0, "compiled": 0, "asked": []}
    accumulate, make, forward, recompute = train.accumulate, train.make_optimizer, model.Layer.forward, model.checkpoint

    def spied(net, batches, *args, **options):
        seen["batches"].append([(batch.task, batch.tokens.tolist()) for batch in batches])
        return accumulate(net, batches, *args, **options)

    def made(m, phase):
        optimizer = make(m, phase)
        seen["optimizer"].append(optimizer)
        seen["weights"] = sorted((name, p.dtype, tuple(p.shape), p.requires_grad) for name, p in m.named_parameters())
        seen["values"] = [p.double().abs().sum().item() for p in m.parameters()]
        return optimizer

    def passed(layer, *inputs):
        seen["autocast"].append(torch.is_autocast_enabled("cpu"))
        return forward(layer, *inputs)

    def counted(*args, **options):
        seen["recomputed"] += 1
        return recompute(*args, **options)

    def finish(run):
        if run.world:
            train.score_arm(run, "before", run.m)
        seen.update(bad=len(run.bad) + len(run.val.bad), encoded=run.preparer.encoded is not None, val=run.val.paths)

    def scored(m, text, world, n, seed):
        seen["asked"] = n, seed
        return {}, None
    told = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, spy in (
                (train, "accumulate", spied), (train, "make_optimizer", made), (model.Layer, "forward", passed),
                (model, "checkpoint", counted), (train, "finish", finish), (evaluation, "score_both", scored),
                (model.Layer, "compile", lambda layer: seen.update(compiled=seen["compiled"] + 1)),
                (train, "print", lambda *words, **_: told.append(" ".join(map(str, words))))):
            patch.setattr(owner, name, spy, raising=name != "print")
        try:
            command(*argv, "--out", out)
        except SystemExit:
            return {}
    seen["optimizer"] = [[{key: value for key, value in group.items() if key != "params"}
                          for group in optimizer.param_groups] for optimizer in seen["optimizer"]]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen["log"] = [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]
    for name in ("lambda", "aia"):
        seen[name] = [row[task][name] for row in rows for task in ("gen", "und") if task in row]
    seen["place"] = out
    seen["folder"] = sorted(path.relative_to(out).as_posix() for path in out.glob("checkpoints/*"))
    seen["told"] = [line for line in told if line.startswith(("device", "attention"))]
    return seen


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """usual(words): the traces of a run with these flags, made once."""
    known = {}

    def get(words):
        key = " ".join(words)
        if key not in known:
            known[key] = traces(words, tmp_path_factory.mktemp("usual") / "run")
        return known[key]
    return get


def filled(words, places):
    return words.format(**places).split()


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_seen_in_a_run_or_refused(name, places, usual, tmp_path, capsys):
    """A setting that nothing reads would be believed all the same."""
    flag = FLAGS[name]
    common = filled(f"{SHORT} {SORTS[flag.of]} {flag.also}", places)
    changed = [*common, f"--{name.replace('_', '-')}", *filled(flag.words, places)]
    if flag.refused:
        assert flag.refused in refused(capsys, *changed, "--out", tmp_path / "refused")
        return
    out = places["new"] if name == "out" else tmp_path / "run"
    if name == "resume":
        traces(common, out)
    after = traces(common if name == "out" else changed, out)
    before = usual(common) or {"bad": "refused"}
    assert [trace for trace in flag.seen.split() if before[trace] == after[trace]] == []
    assert name != "on_bad_record" or after["bad"] == 2


def test_pictures_encoded_at_another_size_are_refused(places, tmp_path, capsys):
    """Their codes are other codes; encoded at the size of training, they are its batches."""
    words = filled(SHORT + SORTS["own"] + f" --image-size 24 --encoded {tmp_path / 'codes'}", places)
    data.main(["encode", str(tmp_path / "codes"), "--data", str(places["data"]), "--init", str(places["run"]),
               "--image-size", "24"])
    assert traces(words, tmp_path / "run")["encoded"]
    refused(capsys, *words, "--image-size", 16, "--out", tmp_path / "other")


@pytest.mark.parametrize("sort", [sort for sort in SORTS if sort != "holed"])
def test_the_same_flags_leave_the_same_traces(sort, places, usual, tmp_path):
    """Otherwise the differences above would mean nothing."""
    words = filled(SHORT + SORTS[sort], places)
    assert traces(words, tmp_path / "run") | {"place": 0} == usual(words) | {"place": 0} != {"place": 0}
