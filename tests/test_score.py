"""Claims about the score command: whole benchmarks, resumed and shared, and refusals (benchmarks/score.py)."""

import functools
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from made_benchmarks import (
    DPG_FIRST,
    FILES,
    GENEVAL,
    answers,
    command,
    dpg_files,
    edit,
    geneval_files,
    made_run,
    mmbench_files,
    mmvp_files,
    png,
    refused,
    refused_files,
    stored,
    written,
)
from PIL import Image

import benchmarks.common
import data
import eval as evaluation
import model
from benchmarks.common import LETTER_ONLY, MAX_NEW_TOKENS, Item, ask_group
from benchmarks.mme import MME_SUFFIX
from benchmarks.score import Score

MMVP_LINE = {"question": "Is it open, or not?\nA. Open\nB. Closed\n" + LETTER_ONLY, "answer": "A",
             "gt_answers": "A", "data_id": "3"}


@pytest.mark.parametrize("bench, expected, file, line", [
    ("mmmu", {"score": 60.0}, "results.txt", "Overall-Science: num=3, acc=0.667"),
    ("mmmu --variant official", {"score": 60.0}, "prediction.json", ' "validation_Music_1": "B"'),
    ("mmbench", {"score": 50.0, "vanilla": 100.0}, "results.xlsx", None),
    ("mmbench --variant vlmevalkit", {"score": 50.0, "vanilla": 100.0}, "results.xlsx", None),
    ("mmvp", {"score": 50.0, "rows": 62.5}, "results.jsonl", json.dumps(MMVP_LINE)),
    ("mmvp --variant official", {"score": None, "reason": "the official variant of MMVP needs --judge FILE"}, "", None),
    ("mmvet", {"score": None}, "results.json", ' "v1_0": " v1_0\\n",'),
    ("pope", {"score": pytest.approx(200 / 3)}, "results.json", '  "text_orig": "No",'),
    ("pope --force", {"score": pytest.approx(200 / 3)}, "results.txt", "random: TP 2"),
    ("mme", {"score": pytest.approx(1825), "cognition": 800}, "mme/color.txt",
     f"1.jpg\tIs it? Please answer yes or no.{MME_SUFFIX}\tNo\tThe answer is no"),
    ("mme --variant official", {"total": pytest.approx(2625), "skipped": 0}, "mme/OCR.txt", None)])
def test_given_answers_are_scored_and_written_for_submission(bench, expected, file, line, tmp_path, capsys):
    """From files in the official layout each benchmark gives the numbers of its worked example, printed and stored."""
    bench, *flags = bench.split()
    given = FILES[bench](tmp_path / "data")
    if "--force" in flags:                              # labels of another version are paired by position, no warning
        edit(tmp_path / "data/coco/coco_pope_random.json", "0.png", "1.png")
    preds = answers(tmp_path / "said.jsonl", dict(reversed(given.items())))                # in any order
    found = command(bench, tmp_path, "--preds", preds, *flags)
    printed = capsys.readouterr().out
    assert {key: found[key] for key in expected} == expected
    assert found["questions"] == len(given)
    assert ("no score" if found["score"] is None else f"score {found['score']:.4g}") in printed
    assert (tmp_path / "out" / file).exists()
    assert not [*(tmp_path / "out").rglob("*.part")]
    assert line is None or line in (tmp_path / "out" / file).read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Asking a model
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A run folder for each kind."""
    return {kind: made_run(kind, tmp_path_factory.mktemp(kind)) for kind in ("emu3", "janus")}


@pytest.fixture
def alone(monkeypatch):
    """Answers have six tokens, and no process waits for others -> shared(work): run work() as the second of two
    processes, then as the first."""
    def shared(work):
        for rank in "10":
            with monkeypatch.context() as process:
                process.setenv("RANK", rank)
                process.setenv("WORLD_SIZE", "2")
                work()

    monkeypatch.setitem(MAX_NEW_TOKENS, "aia", 6)
    monkeypatch.setattr(benchmarks.common, "all_done", lambda: None)
    return shared


@pytest.mark.parametrize("bench, kind, batch", [("mmvp", "emu3", 3), ("mmbench", "janus", 1), ("mmmu", "janus", 5)])
def test_raw_answers_are_stored_in_order_resumed_and_shared(bench, kind, batch, run_of, alone, tmp_path, monkeypatch):
    """Greedy answers depend on nothing else, so a run killed in mid-line and two processes give the same file."""
    names = [*FILES[bench](tmp_path / "data")]
    flags = ("--checkpoint", run_of[kind], "--batch", batch)
    scores = command(bench, tmp_path, *flags)
    file = tmp_path / "out/predictions.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == names
    assert all(row["response"] and row["prompt"] for row in rows)
    assert command(bench, tmp_path, "--preds", file) == scores

    file.unlink()
    odd = json.dumps({"id": []}) + "\n" + json.dumps({"id": names[0]}) + "\n"
    written(tmp_path / "out/answers-0.jsonl", odd + lines[3] + lines[2][:-9])
    written(tmp_path / "out/answers-1.jsonl", lines[1])
    asked = []

    def counted(settings, preparer, items):
        asked.extend(item.id for item in items)
        return ask_group(settings, preparer, items)

    monkeypatch.setattr(benchmarks.common, "ask_group", counted)
    assert command(bench, tmp_path, *flags) == scores
    assert file.read_text() == whole
    assert sorted(asked) == sorted({*names} - {names[3], names[1]})

    file.unlink()
    asked.clear()
    alone(lambda: command(bench, tmp_path, *flags))
    assert file.read_text() == whole
    assert not [*file.parent.glob("answers*")]
    assert asked == names[1::2] + names[0::2]


@pytest.mark.parametrize("kind, bench, how, before, after, longest", [
    ("emu3", "mmvet", {}, "You are a helpful assistant. USER: ", " . ASSISTANT:", 512),
    ("janus", "mme", {"variant": "aia"}, model.JANUS_PRO_7B.system + "\n\n<|User|>: ", "\n\n<|Assistant|>:", 1),
    ("janus", "mme", {"variant": "official"}, model.JANUS_PRO_7B.system + "\n\n<|User|>: ", "\n\n<|Assistant|>:", 512),
    ("janus", "mmbench", {"prompt_style": "vlmevalkit"}, "User: ", "\n\nAssistant:", 2048)])
def test_questions_are_wrapped_for_each_model(kind, bench, how, before, after, longest, run_of):
    """Emu3 takes the prompt unchanged and adds a period; Janus-Pro's template strips the end. For MME, AIA keeps the
    first token of an answer."""
    m, text, _ = evaluation.load_run(Score(checkpoint=str(run_of[kind])))
    preparer = data.Preparer(m, text, training=False)
    preparer.template.system = model.JANUS_PRO_7B.system                       # the tiny models have none
    if how.get("prompt_style"):
        preparer.template.plain()
    calls = []

    def silent(ids, pixels, mask, max_new_tokens):
        calls.append((ids, pixels, max_new_tokens))
        return torch.full((len(ids), 1), text.ids["eos"])

    m.generate_text = silent
    prompt = "<image 1>: a\n b "
    own_break = "\n" if how.get("prompt_style") else ""                        # VLMEvalKit's prompts begin with one
    item = Item("1", own_break + prompt, png(size=(16, 16)), {})
    assert ask_group(Score(bench=bench, **how), preparer, [item]) == [""]
    assert not preparer.known
    (ids, pixels, tokens), = calls
    ids = ids[0].tolist()
    shown = functools.partial(text.core.decode, skip_special_tokens=False)
    first, last = ids.index(text.ids["boi"]), ids.index(text.ids["eoi"])
    picture_break = "\n" if kind == "janus" else ""
    assert ids[0] == text.ids["bos"]
    assert shown(ids[1:first]) == before
    assert shown(ids[last + 1:]) == picture_break + "<image 1>: a\n b" + after
    assert (pixels is None) == (kind == "emu3")
    assert tokens == longest


@pytest.mark.parametrize("bench, kind, flags", [
    ("geneval", "janus", ["--gen-roles", "plain", "--guidance", "2.5"]), ("dpg", "emu3", [])])
def test_drawings_lie_in_the_official_folders_and_repeat(bench, kind, flags, run_of, alone, tmp_path, monkeypatch):
    """Each prompt has its own seed, so a resumed run and two processes draw the same pictures: four of a prompt, guided
    and with the role words that the flags say."""
    make = geneval_files if bench == "geneval" else dpg_files
    make(tmp_path / "data")
    home = tmp_path / "out/images"
    seeds, hows = [], set()
    draw = evaluation.draw

    def counted(m, text, prompts, seed, guidance=None, *, roles="tags"):
        seeds.append(seed)
        hows.add((len(prompts), guidance, roles))
        return draw(m, text, prompts, seed, guidance, roles=roles)

    def pictures():
        return {str(file.relative_to(home)): file.read_bytes() for file in sorted(home.rglob("*.png"))}

    monkeypatch.setattr(evaluation, "draw", counted)
    work = functools.partial(command, bench, tmp_path, "--checkpoint", run_of[kind], "--seed", 5, *flags)
    assert work()["score"] is None
    first = pictures()
    if bench == "dpg":
        assert [*first] == ["a.png", "b.png"]
        assert Image.open(home / "a.png").size == (32, 32)
    else:
        assert [*first] == [f"{i:05d}/samples/{j:05d}.png" for i in range(3) for j in range(4)]
        assert json.loads((home / "00001/metadata.jsonl").read_text()) == GENEVAL[1]
    assert seeds == [*range(5, 5 + len(seeds))] and hows == {(4, 2.5, "plain") if flags else (4, None, "tags")}
    assert [*json.loads((tmp_path / "out/seeds.json").read_text()).values()] == seeds
    (home / min(first)).unlink()
    work()
    assert pictures() == first
    shutil.rmtree(home)
    alone(work)
    assert pictures() == first


def test_a_folder_holds_answers_of_one_kind(run_of, alone, tmp_path, capsys):
    """Other settings, weights or questions are refused, a missing picture before any question; a model that does not
    match the flags leaves the folder free."""
    mmvp_files(tmp_path / "data")
    emu3, janus = (("mmvp", tmp_path, "--checkpoint", run_of[kind]) for kind in ("emu3", "janus"))
    line = refused(capsys, *emu3, "--prompt-style", "vlmevalkit")
    assert "--prompt-style vlmevalkit changes the role words of Janus-Pro" in line
    picture = tmp_path / "data/MMVP Images/8.jpg"
    picture.rename(tmp_path / "8.jpg")
    assert re.search("question 8: picture .*8.jpg is missing: give --data", refused(capsys, *janus))
    picture.write_text("no picture")
    assert re.search("question 8: picture .*8.jpg cannot be opened", refused(capsys, *janus))
    shutil.copy(tmp_path / "8.jpg", picture)
    command(*janus)
    assert re.search("out holds results with checkpoint '.*: give another --out", refused(capsys, *emu3))
    weights = next(run_of["janus"].rglob("*.safetensors"))
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))          # as if trained again
    assert re.search("out holds results with weights '.*: give another --out", refused(capsys, *janus))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    command(*janus)
    edit(tmp_path / "data/Questions.csv", "Is it", "Was it")
    assert re.search(r"out holds results with questions '8 \(SHA-256", refused(capsys, *janus))
    edit(tmp_path / "data/Questions.csv", "Was it", "Is it")
    edit(tmp_path / "out/settings.json", "Questions.csv", "Other.csv")
    assert re.search("out holds results with data 'Other.csv', but it is now 'Questions.csv'", refused(capsys, *janus))
    edit(tmp_path / "out/settings.json", ' "data": "Other.csv",\n', "")        # of before the name was stored
    command(*janus)
    geneval_files(tmp_path / "data")
    flags = ("--checkpoint", run_of["emu3"], "--gen-roles", "plain", "--out", tmp_path / "drawn")
    assert "--gen-roles plain changes the role words" in refused(capsys, "geneval", tmp_path, *flags)


@pytest.mark.parametrize("file, owner", [("scores.json", {"benchmark": "pope"}), ("settings.json", {"bench": "pope"}),
                                         ("settings.json", {"preset": "tiny-emu3"})])
def test_a_folder_holds_results_of_one_benchmark(file, owner, tmp_path, capsys):
    """MM-Vet and POPE both write a results.json: nobody could tell later whose it is. A run folder is refused too."""
    preds = answers(tmp_path / "said.jsonl", mmvp_files(tmp_path / "data"))
    written(tmp_path / "out" / file, json.dumps(owner))
    before = sorted((tmp_path / "out").iterdir())
    line = refused(capsys, "mmvp", tmp_path, "--preds", preds)
    other = "pope" if "pope" in owner.values() else "something else"
    assert line.endswith(f"out holds results of {other} ({file}): give mmvp its own folder")
    assert sorted((tmp_path / "out").iterdir()) == before
    written(tmp_path / "out" / file, json.dumps({"benchmark": "mmvp", "bench": "mmvp"}))
    assert command("mmvp", tmp_path, "--preds", preds)["score"] == 50


@pytest.mark.parametrize("bench, change, message", [
    ("mme", lambda f: edit(f / "data/eval_tool/Your_Results/OCR.txt", "\n0.jpg", " 0.jpg"),
     r"OCR.txt has 5 lines, but needs two for each picture"),
    ("mme", lambda f: written(f / "data/eval_tool/Your_Results/OCR.txt"), r"OCR.txt has 0 lines"),
    ("mmmu", lambda f: written(f / "data/answer_dict_val.json", "{}"), r"json has no answer to validation_Art_1"),
    ("mmvet --judge J", lambda f: written(f / "J"), r"a judge of mmvet needs --judge-prompt")])
def test_what_scoring_needs_is_checked_before_asking(bench, change, message, run_of, tmp_path, capsys, monkeypatch):
    """Answering thousands of questions takes hours."""
    bench, *flags = bench.split()
    FILES[bench](tmp_path / "data")
    change(tmp_path)
    flags = [tmp_path / flag if flag == "J" else flag for flag in flags]
    monkeypatch.setattr(benchmarks.common, "ask_group", None)
    assert re.search(message, refused(capsys, bench, tmp_path, "--checkpoint", run_of["janus"], *flags))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bench, change, message", [
    ("mmvp", lambda f: edit(f / "said.jsonl", '{"id": "3"', '{"id: "3"'), r"said.jsonl line 3: not JSON"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '{"id": "3", ', "{"), r"said.jsonl line 3: 'id' is missing"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '"id": "3"', '"id": "2"'), r"said.jsonl line 3: id '2' comes twice"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '"id": "3"', '"id": "9"'), r"line 3: id '9' is not in this data set"),
    ("mmvp", lambda f: edit(f / "said.jsonl", '"Open"', "null"), r"said.jsonl line 3: the response is not a string"),
    ("mmvp", lambda f: answers(f / "said.jsonl", {"1": "A"}), r"1 answers for 8 questions, none for id '2'"),
    ("mmvp", lambda f: (f / "said.jsonl").unlink(), r"--preds .*said.jsonl does not exist: give"),
    ("mmvp", lambda f: edit(f / "data/Questions.csv", ",(b)", ",(c)"), r"Questions.csv record 2 needs an Index"),
    ("mmvp", lambda f: edit(f / "data/Questions.csv", "(b)\n3", "(b)\n1"), r"data: id '1' occurs 2 times"),
    ("mmvp", lambda f: edit(f / "data/Questions.csv", "Correct Answer", "Answer"), r"record 1 has no 'Correct Answer'"),
    ("mmvp", lambda f: shutil.rmtree(f / "data"), r"--data .*data does not exist: give the bench"),
    ("mmvp --data J", lambda f: None, r"--data .*J is a file: give the folder of the benchmark"),
    ("mmvp --data I", lambda f: (f / "I").mkdir(), r"I holds no Questions.csv: give --data the benchmark"),
    ("mmvet", lambda f: edit(f / "data/mm-vet.json", '"answer"', '"reply"'), r"mm-vet.json, v1_0 has no 'answer'"),
    ("mmvet", lambda f: edit(f / "data/mm-vet.json", '"0?"', "null"), r"mm-vet.json, v1_0: 'question' is not a text"),
    ("mme", lambda f: edit(f / "data/eval_tool/Your_Results/OCR.txt", "\tNo", ""), r"OCR.txt line 2 needs a picture"),
    ("mmmu", lambda f: written(f / "data/Art/validation-00000-of-00001.parquet", "PAR1"), r"Art/.*cannot be read"),
    ("mmmu", lambda f: written(f / "data/answer_dict_val.json", "{}"), r"json has no answer to validation_Art_1"),
    ("mmmu", lambda f: shutil.move(f / "data/Art", f / "data/Design"), r"validation_Art_1, .*of another subject"),
    ("mmbench", lambda f: mmbench_files(f / "data", **dict.fromkeys("ABCD", "")), r"record 1 has no options A, B"),
    ("mmbench", lambda f: mmbench_files(f / "data", index="x"), r"record 1: index or image cannot be read"),
    ("mmbench", lambda f: mmbench_files(f / "data", image="77"), r"record 1: index or image cannot be read \('77'\)"),
    ("pope", lambda f: edit(f / "data/coco/coco_pope_random.json", "0.png", "1.png"),
     r"coco_pope_random.json does not belong to llava_pope_test.jsonl: 6 .* 6 .*line 1 is about another.*e3e3926"),
    ("pope", lambda f: written(f / "data/coco/coco_pope_random.json", [{"image": "0.png", "label": "no"}]),
     r"1 labels for 6 questions; take the labels"),
    ("pope", lambda f: edit(f / "data/llava_pope_test.jsonl", '"0.png"', "0"), r"jsonl line 1: 'image' is not a text"),
    ("pope", lambda f: edit(f / "data/coco/coco_pope_random.json", '"yes"', "true"), r"line 1: 'label' is not a text"),
    ("pope", lambda f: edit(f / "data/llava_pope_test.jsonl", "random", "other"), r"category 'other' is not one of"),
    ("mmvp --variant aia2", lambda f: None, r"--variant 'aia2' does not exist for mmvp: use one of aia, official"),
    ("mmvet --prompt-style vlmevalkit", lambda f: None, r"--prompt-style vlmevalkit has a system text of its own"),
    ("mmvp --batch 0", lambda f: None, r"--batch 0: give at least 1"),
    ("mmvp --runs 0", lambda f: None, r"--runs 0: give at least 1"),
    ("geneval --pictures -1", lambda f: None, r"--pictures -1: give at least 1"),
    ("geneval --seed -1", lambda f: None, r"--seed -1: give at least 0"),
    ("geneval --guidance nan", lambda f: None, r"--guidance nan: give at least 0"),
    ("fid --variant world --checkpoint I --n 0", lambda f: None, r"--n 0: give at least 1"),
    ("mmvp", lambda f: written(f / "out"), r"--out .*out cannot be created"),
    ("geneval", lambda f: geneval_files(f / "data"), r"said.jsonl holds no NUMBER/samples"),
    ("geneval --preds I", lambda f: geneval_files(f / "data") or written(f / "I/00001/metadata.jsonl", "{}"),
     r"00001/metadata.jsonl is not line 1, from 0, of evaluation_metadata.jsonl: give --data"),
    ("dpg", lambda f: dpg_files(f / "data"), r"said.jsonl holds no pictures"),
    ("dpg", lambda f: written(f / "data/dpg_bench.csv",
                              ",".join(DPG_FIRST) + "\n" + ",".join(map(json.dumps, DPG_FIRST.values()))),
     r"dpg_bench.csv holds no questions that count"),
    ("dpg --variant ulmevalkit", lambda f: dpg_files(f / "data", "ulmevalkit") or edit(
        f / "data/DPG_Bench.tsv", '""a1?""', "5"), r"tsv record 1: 'question_natural_language' is not a text"),
    ("fid", lambda f: (f / "data/1.png").unlink(), r"data holds 1 pictures: FID needs"),
    ("fid --data F.npz", lambda f: written(f / "F.npz", "PK"), r"F.npz cannot be read"),
    ("fid --data F.npz", lambda f: stored(f, mu=np.zeros(2)), r"F.npz holds mu: store mu and sigma, or features"),
    ("fid --data F.npz", lambda f: stored(f, mu=np.zeros(2), sigma=np.eye(3)), r"mu \(2,\) and sigma .*do not match"),
    ("fid --data F.npz", lambda f: stored(f, features=np.full((2, 3), np.nan)), r"are not finite"),
    ("fid --data F.npz", lambda f: stored(f, features=np.array(["a", "b"])), r"F.npz cannot be read \(could not conv"),
    ("fid --data F.npz", lambda f: stored(f), r"F.npz holds nothing: store mu and sigma"),
    ("fid --data F.npz", lambda f: written(f / "F.npz"), r"F.npz cannot be read \(No data left in file\)"),
    ("fid --data F.npz", lambda f: np.save(open(f / "F.npz", "wb"), np.eye(2)), r"F.npz cannot be read"),
    ("geneval", lambda f: geneval_files(f / "data") or written(f / "data/evaluation_metadata.jsonl"),
     r"evaluation_metadata.jsonl holds no prompts: download it again"),
    ("fid --data F.npz", lambda f: stored(f, features=np.zeros((1, 3))), r"two or more pictures")])
def test_bad_files_are_refused_in_one_line(bench, change, message, tmp_path, capsys):
    """The line names place and remedy, the status is 2, and nothing that looks like a result is left behind."""
    assert re.search(message, refused_files(bench, change, tmp_path, capsys))


@pytest.mark.parametrize("bench, package, pip", [
    ("mmmu", "pyarrow", "pyarrow"), ("mmbench", "openpyxl", "openpyxl"), ("fid", "pytorch_fid", "pytorch-fid"),
    ("fid --variant clean", "cleanfid", "clean-fid")])
def test_a_missing_package_is_named_with_its_command(bench, package, pip, tmp_path, capsys, monkeypatch):
    """Optional packages are imported only where they are needed, so the command can name the missing one."""
    bench, *flags = bench.split()
    given = FILES[bench](tmp_path / "data")
    preds = tmp_path / "data" if bench == "fid" else answers(tmp_path / "said.jsonl", given)
    for name in (package, package + ".parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(capsys, bench, tmp_path, "--preds", preds, *flags).endswith(f"pip install {pip}")
