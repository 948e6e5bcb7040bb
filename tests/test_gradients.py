"""Claims about lab/gradients.py: whose gradients they are, which weights they share, and in which order runs appear."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from made import SMALL, batch_of, both_models, tiny
from made_folders import opened
from made_runs import refused
from PIL import Image

import aia
import model
from formats.checkpoints import save_checkpoint, tensors_of
from lab import gradients
from parts.settings import read_json, write_json

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


def two_batches(m, task):
    """Two micro-batches with different numbers of label tokens: in the second, one of two samples has none."""
    batch = batch_of(m.config, task)
    labels = batch.labels.clone()
    labels[0] = -100
    return [batch, replace(batch, labels=labels, targets=None)]


def both_gradients(m):
    return {task: gradients.gradient_of(m, two_batches(m, task)) for task in aia.TASKS}


def changed(run, folder, manifest=(), **settings):
    """A copy of a run folder with other settings, and more in the manifest of its checkpoint."""
    shutil.copytree(run, folder)
    write_json(read_json(folder / "settings.json") | settings, folder / "settings.json")
    file = folder / "checkpoints/0-0000000/manifest.json"
    write_json(read_json(file) | dict(manifest), file)
    return folder


def kept_rows(folder, out, *more):
    """What the command writes about one run."""
    gradients.main([str(folder), "--n", "2", "--device", "cpu", "--out", str(out), *map(str, more)])
    rows, = json.loads(out.read_text())["runs"].values()
    return rows


@both_models
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_has_cosine_1_with_itself_and_minus_1_with_its_negative(name, sign):
    """In every group that it reaches: each is a cosine of its own, and lengths do not count."""
    m = tiny(name, **SMALL)
    found = gradients.gradient_of(m, two_batches(m, "und"))
    row = gradients.agreement(m, {"gen": {p: 3 * sign * value for p, value in found.items()}, "und": found})["cosine"]
    flat = torch.tensor([x for value in row.values() for x in (value if isinstance(value, list) else [value])])
    assert len(flat) == 2 * len(gradients.KINDS) + 4
    assert flat.tolist() == pytest.approx([sign] * len(flat), abs=1e-6)


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_gradients_are_those_of_the_mean_loss_per_label_token(name, task):
    """Written out with all logits, over both micro-batches at once, and differentiated by autograd."""
    m = tiny(name, **SMALL).double()
    batches, total, tokens = two_batches(m, task), 0.0, 0
    for batch in batches:
        logits = m.head(task)(m.lm(m.embed(batch), task=task)[0])
        total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        tokens += int((batch.labels[:, 1:] != -100).sum())
    expected = torch.autograd.grad(total / tokens, [*m.parameters()], allow_unused=True)
    found = gradients.gradient_of(m, batches)
    for p, value in zip(m.parameters(), expected, strict=True):
        assert (p in found) == (value is not None)
        if value is not None:
            torch.testing.assert_close(found[p], value, rtol=1e-6, atol=1e-6 * value.abs().max().item())


def test_the_cosine_of_a_layer_is_that_of_its_own_weights():
    """Computed here by name; `all` is that of everything in decoder, embedding and head."""
    m = tiny("tiny-emu3", **SMALL)
    found = both_gradients(m)
    row = gradients.agreement(m, found)["cosine"]
    own = dict(m.lm.named_parameters(prefix="lm")) | dict(m.lm_head.named_parameters(prefix="lm_head"))

    def by_name(*parts):
        sides = [torch.cat([found[task][p].flatten() for name, p in own.items() if name.startswith(parts)])
                 for task in aia.TASKS]
        return pytest.approx(torch.cosine_similarity(*sides, dim=0).item(), abs=1e-6)
    assert row["layers"] == by_name("lm.layers")
    assert row["all"] == by_name("lm") and row["embedding"] == by_name("lm.embed") and row["head"] == by_name("lm_head")
    for i in range(2):
        assert row["attention.key"][i] == by_name(f"lm.layers.{i}.self_attn.k_proj")
        assert row["mlp"][i] == by_name(f"lm.layers.{i}.mlp")
        assert row["norms"][i] == by_name(f"lm.layers.{i}.input_layernorm", f"lm.layers.{i}.post_attention")


def test_a_weight_of_one_task_has_no_cosine():
    """The upper layers of a fork, and in Janus-Pro the head of words: each has a length for its task, and none of
    them counts in `all`."""
    m = tiny("tiny-unifork", **SMALL, fork_layer=1)
    found = both_gradients(m)
    row = gradients.agreement(m, found)
    for kind in gradients.KINDS:
        below, above = row["cosine"][kind]
        assert above is None and -1 <= below <= 1
        assert all(row["norm"][task][kind][1] > 0 for task in aia.TASKS)
    shared = [*m.lm.embed_tokens.parameters(), *m.lm.layers[0].parameters(), *m.lm_head.parameters()]
    for task in aia.TASKS:
        length = torch.cat([found[task][p].flatten() for p in shared]).norm().item()
        assert row["norm"][task]["all"] == pytest.approx(length)
    m = tiny("tiny-janus", **SMALL)
    row = gradients.agreement(m, both_gradients(m))
    assert row["cosine"]["head"] is row["norm"]["gen"]["head"] is None and row["norm"]["und"]["head"] > 0


def test_weights_and_their_gradients_stay_as_they_were():
    """What an optimizer is about to use is not touched."""
    m = tiny("tiny-emu3", **SMALL)
    for p in list(m.parameters())[::2]:
        p.grad = torch.ones_like(p)
    weights, held = [p.clone() for p in m.parameters()], [p.grad for p in m.parameters()]
    gradients.gradient_of(m, two_batches(m, "gen"))
    for p, weight, grad in zip(m.parameters(), weights, held, strict=True):
        assert torch.equal(p, weight) and p.grad is grad and (grad is None or bool((grad == 1).all()))


def test_checkpoints_come_in_the_order_of_training(tmp_path):
    """Phases first, then steps; those of one task alone do not count. RUN/before is what the first phase
    with or without AIA starts from, unless that checkpoint itself was kept, and RUN/control what the latter ends
    with."""
    for name in ("checkpoints/10-0000000", "checkpoints/2-0000300", "checkpoints/3-0000002", "before", "control"):
        (tmp_path / name).mkdir(parents=True)
    both = aia.TASKS
    lines = [{"phase": phase, "name": name, "step": step} | dict.fromkeys(tasks, {}) for phase, name, step, tasks in [
        (0, "tokenizer", 90, ()), (1, "answer", 50, ["und"]), (2, "joint", 300, both), (2, "joint", 400, both),
        (3, "control", 7, both), (4, "tune", 7, both)]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gradients.kept_weights(tmp_path)
    assert [(phase, step, steps, folder.name) for phase, step, steps, folder in found] == [
        (2, 300, 300, "2-0000300"), (3, 0, 400, "before"), (3, 2, 402, "3-0000002"), (4, 0, 407, "control"),
        (10, 0, 414, "10-0000000")]
    (tmp_path / "checkpoints/3-0000000").mkdir()
    assert gradients.kept_weights(tmp_path)[1][3].name == "3-0000000"


def test_each_row_is_of_the_weights_of_its_checkpoint(runs, tmp_path):
    """They are read into one model, so an earlier one must not be left there."""
    folder = changed(runs["tiny-emu3"], tmp_path / "run")
    m, _ = opened(folder)
    first, = kept_rows(folder, tmp_path / "first.json")
    for p in m.lm.parameters():
        p.data *= 1.1
    manifest = read_json(folder / "checkpoints/0-0000000/manifest.json")
    save_checkpoint(tensors_of(m), manifest, folder / "checkpoints/1-0000000").result()
    again, second = kept_rows(folder, tmp_path / "both.json", "--figure", tmp_path / "both.png")
    assert again == first and second["phase"] == 1 and second["cosine"] != first["cosine"]
    assert Image.open(tmp_path / "both.png").size[0] > 1000
    shutil.rmtree(folder / "checkpoints/0-0000000")
    assert kept_rows(folder, tmp_path / "second.json") == [second]


def test_seeds_of_one_row_are_drawn_as_one():
    """Nine runs would be nine maps; runs of the same name in two folders stay apart."""
    runs = {"a/x-seed1": [1], "a/x-seed22": [2], "b/x-seed1": [3], "a/seed-y": [4]}
    assert gradients.seeds_together(runs) == {"a/x": [[1], [2]], "b/x": [[3]], "a/seed-y": [[4]]}


@pytest.mark.parametrize("rank", [0, 2])
def test_only_what_training_moves_has_a_gradient(rank, runs, tmp_path):
    """With LoRA that is what it adds to the decoder; without, decoder, embedding and head: what only one task of
    Janus-Pro uses would be computed in vain."""
    folder = changed(runs["tiny-janus"], tmp_path / "run")
    m = model.from_config(replace(opened(folder)[0].config, lora_rank=rank))
    shutil.rmtree(folder / "checkpoints/0-0000000")
    save_checkpoint(tensors_of(m), {"config": asdict(m.config), "dtype": "float32"},
                    folder / "checkpoints/0-0000000").result()
    m, _, _ = gradients.model_and_world(str(folder), "cpu")
    for name, p in m.named_parameters():
        assert p.requires_grad == (name.startswith("lm") and (not rank or "lora_" in name))


def test_aia_does_not_enter_the_gradients(runs, tmp_path):
    """A run that trains with a large lambda is measured by next-token prediction, as one without."""
    lambdas = {"lambdas": {"gen": 50.0, "und": 50.0}}
    strong = changed(runs["tiny-emu3"], tmp_path / "strong", lambdas, aia_weight="50")
    plain = changed(runs["tiny-emu3"], tmp_path / "plain", aia_weight="off")
    assert kept_rows(strong, tmp_path / "strong.json") == kept_rows(plain, tmp_path / "plain.json")


def test_what_cannot_be_measured_is_refused_in_one_line(runs, tmp_path, capsys):
    """A run without checkpoints, one that never saw the world, no run at all, and a figure without a folder."""
    empty, own = tmp_path / "empty", changed(runs["tiny-emu3"], tmp_path / "own", data=["train.jsonl"])
    shutil.copytree(runs["tiny-emu3"], empty, ignore=shutil.ignore_patterns("checkpoints"))
    (empty / "checkpoints").mkdir()
    out = ("--device", "cpu", "--out", tmp_path / "out.json")
    assert "holds no checkpoint" in refused(capsys, empty, *out, main=gradients.main)
    assert "never saw the built-in world" in refused(capsys, own, *out, main=gradients.main)
    assert "needs run folders" in refused(capsys, *out, main=gradients.main)
    figure = ("--figure", tmp_path / "nowhere/figure.png")
    assert refused(capsys, own, *out, *figure, main=gradients.main).startswith("error: --figure")
    assert not (tmp_path / "out.json").exists()
