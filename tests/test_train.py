"""Claims about training: one step, lambda, phases, resuming, failures, the command line (train.py)."""

import contextlib
import copy
import faulthandler
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from made import NAMES, both_models, fresh
from made_runs import command, refused
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import aia
import data
import eval as evaluation
import formats.weights
import lab.alignment
import model
import parts.world
import train
from formats.checkpoints import (
    Writer,
    checkpoint_folders,
    from_manifest,
    newest_checkpoint,
    read_manifest,
    read_tensors,
    save_checkpoint,
    tensor_names,
    tensors_of,
)
from formats.datasets import FileSource
from formats.records import RECORD_TASKS
from parts.lock import held
from parts.pictures import to_tensor
from parts.processes import processes, rank
from parts.settings import InputError, write_json
from parts.text import Text
from parts.vision import fill_codebook
from parts.world import SHAPES, World

ROOT = Path(__file__).parent.parent
MIXED = {"tiny-mixed-janus": (1, 1, 2), "tiny-mixed-codes": (1, 1, 2), "tiny-mixed-fork": (1, 1, 2)}       # ratios
SMALL = {name: replace(model.PRESETS[name], layers=2, width=64, ffn=64, heads=2, kv_heads=1, vit_width=32, vit_ffn=32,
                       vit_layers=1) for name in (*NAMES, *MIXED)}
SMALL["tiny-unifork"] = replace(SMALL["tiny-emu3"], layers=4, fork_layer=2)
SMALL["tiny-mixed-fork"] = replace(SMALL["tiny-mixed-fork"], layers=4)
each_mixed = pytest.mark.parametrize("name", MIXED)
TRAIN_TOKENIZER = data.train_tokenizer


@pytest.fixture(scope="module", autouse=True)
def texts(tmp_path_factory):
    """Tokenizers made once; while this module runs, the tiny presets are smaller and take these tokenizers."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for name, config in SMALL.items():
        made[name] = data.train_tokenizer(folder / f"{name}.json", config, mixed=name in MIXED)

    def ready_made(file, config, world=None, mixed=False):
        name = {"emu3": "tiny-mixed-fork", "janus": "tiny-mixed-janus"} if mixed else {}
        return Text(shutil.copy(made[name.get(config.kind, f"tiny-{config.kind}")].file, file), config.kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "train_tokenizer", ready_made)
        for name, config in SMALL.items():
            patch.setitem(model.PRESETS, name, config)
        yield made


def progress(m, text, phase, **changes):
    """A phase at its first step."""
    run = SimpleNamespace(m=m, phases=[phase], source=data.WorldSource(World(0), 16, 0), targets=TARGETS, device="cpu",
                          preparer=data.Preparer(m, text), config=settings("none", **changes), sharded=lambda: False,
                          autocast=contextlib.nullcontext)
    return train.Progress(run, 0, None)


@pytest.fixture
def unscored(monkeypatch):
    """Runs end without the final evaluation; train.train then returns the run."""
    monkeypatch.setattr(train, "finish", lambda run: run)


def schedule(m, text, batch_size=8, micro_batch=64, drop=0.0, ratio=(1, 1)):
    return data.Schedule(data.WorldSource(World(0), 16, 0), data.Preparer(m, text), 0, batch_size, ratio,
                         micro_batch, drop)


TARGETS = {task: aia.targets(2, task) for task in aia.TASKS}
OFF = aia.LAMBDAS["off"]


def targets_of(m):
    return {task: aia.targets(m.config.layers, task) for task in aia.TASKS}


def gradients(m, batches, weights):
    """{parameter: gradient} and metrics of one step."""
    m.zero_grad()
    metrics = train.metrics_of(train.accumulate(m, batches, targets_of(m), weights))
    return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}, metrics


def aia_gradients(m, batch):
    """L_AIA of one batch, and its gradients."""
    m.zero_grad()
    loss = aia.loss(m(batch).intensity, *TARGETS[batch.task], batch.aia_valid)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}


def exact(m, batches):
    """A copy of a model in float64, and the same batches for it."""
    return copy.deepcopy(m).double(), [b.each(lambda x: x.double() if x.is_floating_point() else x) for b in batches]


def same_gradients(found, expected, share=1e-9):
    """Each differs by at most a small share of the largest gradient."""
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=share * largest)


def equal(one, other):
    """Are two dicts of tensors equal, bit for bit?"""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------
@both_models
def test_micro_batches_change_memory_not_the_gradient(name, texts):
    """Sums are divided by the counts of the whole step, so 1 x 8 = 2 x 4 = 4 x 2, also with dropped prompts. In
    float64, where another order of the sums is far below any other difference."""
    start, results = fresh(name, embed_std=0.1), []         # scores that differ, as those of a trained model do
    for micro_batch in (8, 4, 2):
        batches = schedule(start, texts[name], 16, micro_batch, drop=0.3).step(0)
        assert len(batches) == 2 * 8 // micro_batch
        results.append(gradients(*exact(start, batches), {"gen": 20.0, "und": 30.0}))
    assert 0 < sum(int((~batch.aia_valid).sum()) for batch in batches) < 8
    (expected, metrics), *others = results
    for gradient, again in others:
        same_gradients(gradient, expected)
        for task in aia.TASKS:
            torch.testing.assert_close(again[task], metrics[task], rtol=1e-5, atol=0)       # float32 sums


@each_mixed
def test_micro_batches_of_conversations_change_memory_not_the_gradient(name, texts):
    """They are samples of both tasks, and each task is divided by what the whole step has of it."""
    start, results = fresh(name, embed_std=0.1), []
    for micro_batch in (8, 3):
        batches = schedule(start, texts[name], 16, micro_batch, 0.3, MIXED[name]).step(0)
        assert [batch.task for batch in batches] == (
            ["gen", "und", "mixed"] if micro_batch == 8 else ["gen"] * 2 + ["und"] * 2 + ["mixed"] * 3)
        results.append(gradients(*exact(start, batches), {"gen": 20.0, "und": 30.0}))
    (expected, metrics), (gradient, again) = results
    same_gradients(gradient, expected)
    for task in aia.TASKS:
        torch.testing.assert_close(again[task], metrics[task], rtol=1e-5, atol=0)           # float32 sums


@each_mixed
def test_a_step_of_all_sorts_is_one_sum_for_each_task(name, texts):
    """Whatever a sample is, its codes, words and intensities join those of the same task: a mean over label tokens, and
    one over valid samples, written out sample by sample."""
    start = fresh(name, embed_std=0.1)
    m, batches = exact(start, schedule(start, texts[name], 16, 3, 0.3, MIXED[name]).step(0))
    gradient, metrics = gradients(m, batches, {"gen": 20.0, "und": 30.0})
    m.zero_grad()
    for i, (task, weight) in enumerate({"gen": 20.0, "und": 30.0}.items()):
        losses, tokens, pulls = [], 0, []
        for batch in batches:
            if batch.task not in (task, "mixed"):
                continue
            out, mixed = m(batch), batch.task == "mixed"
            labels, valid, intensity = ((x[i] if mixed else x) for x in (batch.labels, batch.aia_valid, out.intensity))
            losses.append(out.ntp[i] if mixed else out.ntp)
            tokens += int((labels[:, 1:] != -100).sum())
            pulls += [aia.loss(row[None], *targets_of(m)[task], torch.ones(1).bool()) for row in intensity[valid]]
        ntp, pull = sum(losses) / tokens, sum(pulls) / len(pulls)
        (ntp + weight * pull).backward()
        assert metrics[task]["ntp"] == pytest.approx(ntp.item(), rel=1e-5)
        assert metrics[task]["aia"] == pytest.approx(pull.item(), rel=1e-5)
    same_gradients(gradient, {key: p.grad for key, p in m.named_parameters() if p.grad is not None})


@each_mixed
def test_conversations_without_aia_are_plain_next_token_prediction_bit_for_bit(name, texts):
    """With weight 0, and where nothing is measured: codes by the head of codes, words by that of words, no more."""
    m = fresh(name, attention="explicit")
    batches = schedule(m, texts[name], 8, 2, 0.3, MIXED[name]).step(0)
    total = train.counts(batches)
    m.zero_grad()
    for batch in batches:
        out, loss = m(batch, intensity=False), 0.0
        for i, task in enumerate(aia.TASKS if batch.task == "mixed" else [batch.task]):
            loss = loss + (out.ntp[i] if batch.task == "mixed" else out.ntp) / total[task][0]
        loss.backward()
    plain = {key: p.grad.clone() for key, p in m.named_parameters() if p.grad is not None}
    assert equal(gradients(m, batches, OFF)[0], plain) and equal(gradients(m, batches, None)[0], plain)


@both_models
def test_the_aia_gradient_is_lambda_times_the_mean_over_valid_samples(name, texts):
    """Those of the task in the whole step, not its batch size, nor those of a micro-batch, nor its label tokens; with
    the task's own target and lambda. It is what is left when the next-token gradient is taken away."""
    start = fresh(name, embed_std=0.1)
    m, batches = exact(start, schedule(start, texts[name], 12, 2, drop=0.5).step(0))
    lambdas = {"gen": 20.0, "und": 30.0}
    valid = {task: sum(int(b.aia_valid.sum()) for b in batches if b.task == task) for task in aia.TASKS}
    assert 0 < valid["gen"] < valid["und"] == 6
    (both, metrics), (plain, _) = (gradients(m, batches, given) for given in (lambdas, None))
    m.zero_grad()
    for task in aia.TASKS:
        mean = sum(aia.loss(m(b).intensity, *TARGETS[task], b.aia_valid, reduction="sum")
                   for b in batches if b.task == task) / valid[task]
        (lambdas[task] * mean).backward()
        assert metrics[task]["aia"] == pytest.approx(mean.item(), rel=1e-5)
    pull = {key: p.grad for key, p in m.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all(f"lm.layers.{i}.self_attn.q_proj.weight" in pull for i in range(2))
    same_gradients({key: both[key] - plain[key] for key in pull}, pull, 1e-6)


@both_models
def test_weight_zero_is_plain_training_bit_for_bit(name, texts):
    """0 times the AIA gradient adds exactly nothing, so the control may be logged without touching it."""
    m = fresh(name, attention="explicit")
    batches = schedule(m, texts[name], micro_batch=2, drop=0.3).step(0)
    measured, metrics = gradients(m, batches, OFF)
    assert all(metrics[task]["aia"] > 0 and metrics[task]["intensity"].min() > 0 for task in aia.TASKS)
    total = train.counts(batches)
    m.zero_grad()
    for batch in batches:
        (m(batch, intensity=False).ntp / total[batch.task][0]).backward()
    assert equal(measured, {name: p.grad for name, p in m.named_parameters() if p.grad is not None})


@both_models
def test_dropped_prompts_add_exactly_nothing_to_aia(name, texts):
    """They show no text to attend to: loss and gradient are zero, whatever their tokens are."""
    m = fresh(name)
    batch, mixed = (schedule(m, texts[name], 16, drop=drop).step(0)[0] for drop in (1.0, 0.5))
    plain, (found, metrics) = gradients(m, [batch], OFF)[0], gradients(m, [batch], {"gen": 300.0})
    assert metrics["gen"]["aia"] is None and equal(found, plain)            # nothing was measured
    assert all((g == 0).all() for g in aia_gradients(m, batch)[1].values())
    assert 0 < mixed.aia_valid.sum() < 8
    loss, found = aia_gradients(m, mixed)
    other = torch.where(mixed.aia_valid[:, None] | (mixed.tokens >= model.TINY_TEXT), mixed.tokens, 7)
    other[~mixed.aia_valid, 0] = 7                              # another BOS, and other text for size and template
    loss_other, found_other = aia_gradients(m, replace(mixed, tokens=other))
    assert loss == loss_other > 0 and equal(found, found_other)


@both_models
def test_one_batch_is_overfit_on_both_tasks(name, texts):
    """Labels, masks, heads and shifts fit together: two pictures and conversations are learned, then said again."""
    m = fresh(name, width=128, ffn=256)
    plan, losses = schedule(m, texts[name], 4), []
    fill_codebook(m.vq, torch.stack([to_tensor(p) for p in plan.source.pictures]))      # codes that differ
    optimizer = train.make_optimizer(m, train.Phase("joint", 150, 4, 3e-3, 1, ("vq",), weight_decay=0.0))
    while len(losses) < 150 and (not losses or any(losses[-1][task] > 0.02 * losses[0][task] for task in aia.TASKS)):
        losses.append({task: row["ntp"] for task, row in
                       train.metrics_of(train.accumulate(m, plan.step(0), TARGETS, OFF)).items()})
        optimizer.step()
        optimizer.zero_grad()
    for task in aia.TASKS:
        assert losses[0][task] > 3 and losses[-1][task] <= 0.02 * losses[0][task], (losses[0], losses[-1])
    right = []                                      # of 16 codes of a drawing; a loss of 2 % leaves a tenth at most
    for i in range(2):
        drawn, asked = (plan.record(task, i)[0] for task in aia.TASKS)
        (question, expected), *_ = asked.turns
        assert evaluation.answer(m, texts[name], [(asked.pictures[0], question)]) == [expected]
        codes, = plan.preparer.codes(drawn.pictures)
        assert len(codes.unique()) > 5                              # of 16: not one code everywhere
        prompt = [i for ids, _ in plan.preparer.template.prompt(drawn.turns[0][0], m.config.grid) for i in ids]
        logits = m.image_logits(torch.tensor([prompt]), codes[None])
        right.append((logits.argmax(-1) == codes.flatten()).float().mean())
    assert sum(right) / 2 > 0.8


def distance(m, batch):
    """Mean distance of a batch's intensities to their targets."""
    with torch.no_grad():
        return (m(batch).intensity - TARGETS[batch.task][0]).abs().mean()


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_aia_moves_the_intensity_towards_its_target(name, task, texts):
    """Every layer's attention carries gradient: with a large weight the distance falls, and more than without."""
    start = fresh(name)
    batch, = [b for b in schedule(start, texts[name]).step(0) if b.task == task]
    ends = {}
    for weight in (0.0, 300.0):
        m = copy.deepcopy(start)
        optimizer = train.make_optimizer(m, train.Phase("tune", 20, 4, 3e-3, 1, ("vq",), aia=True, weight_decay=0.0))
        for _ in range(20):
            train.accumulate(m, [batch], TARGETS, {task: weight})
            optimizer.step()
            optimizer.zero_grad()
        ends[weight] = distance(m, batch)
    assert ends[300.0] < 0.5 * distance(start, batch) and ends[300.0] < 0.5 * ends[0.0]


# ---------------------------------------------------------------------------------------------------------------------
# lambda and learning rate
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, ratio", [*((name, (1, 1)) for name in NAMES), *MIXED.items(),
                                         ("tiny-mixed-fork", (0, 0, 1))])
def test_calibration_gives_the_ratio_on_its_batches(name, ratio, texts):
    """lambda = NTP / (rho AIA) with means over the batches that it measured, of all sorts of samples together; nothing
    is updated meanwhile."""
    m = fresh(name)
    weights, plan = copy.deepcopy(m.state_dict()), schedule(m, texts[name], drop=0.3, ratio=ratio)
    config = train.TrainConfig(preset=name, calibration=3, rho=7.0)
    found = train.calibrate(m, plan, targets_of(m), config, torch.enable_grad)
    assert equal(m.state_dict(), weights) and all(p.grad is None for p in m.parameters())
    rows = [gradients(m, plan.step(step), OFF)[1] for step in range(3)]
    for task in aia.TASKS:
        ntp, pull = (sum(row[task][key] for row in rows) for key in ("ntp", "aia"))
        assert ntp / (found[task] * pull) == pytest.approx(7.0, rel=1e-6)
    assert train.calibrate(m, plan, TARGETS, replace(config, aia_weight="5,10"), None) == {"gen": 5.0, "und": 10.0}


@pytest.mark.parametrize("ratio", [(2, 1), (1, 3)])
def test_drawn_steps_have_one_task_by_the_odds_of_the_ratio_and_the_seed(ratio, texts):
    """As the released code trains: at 2:1 two of three steps draw; which ones they are is another matter for each seed.
    lambda is measured on batches of both tasks all the same."""
    m, phase = fresh("tiny-emu3"), train.Phase("tune", 400, 4, 1e-3, 1, ("vq",), aia=True)
    found = []
    for seed in (1, 2):
        now = progress(m, texts["tiny-emu3"], phase, mix="drawn", ratio="{}:{}".format(*ratio), seed=seed)
        assert all(weight > 0 for weight in now.lambdas.values())
        steps = [now.schedule.groups(step) for step in range(400)]
        assert all(len(groups) == 1 and len(groups[0][1]) == 4 for groups in steps)
        found.append([task for (task, _), in steps])
        assert found[-1].count("gen") / 400 == pytest.approx(ratio[0] / sum(ratio), abs=0.075)      # three deviations
        assert {len({*found[-1][i:i + 20]}) for i in range(0, 400, 20)} == {2}
    assert found[0] != found[1]


def test_no_two_orders_of_samples_are_alike(texts):
    """Neither those of two seeds nor those of two phases of one seed, but for the arms. A phase's own ratio counts more
    than that of the run, and the share of dropped prompts is the model's."""
    m, text = fresh("tiny-emu3"), texts["tiny-emu3"]
    plan = [phase for phase in train.plan(settings("none", arms="both")) if not phase.pictures]
    seeds = {(seed, phase.name): progress(m, text, replace(phase, aia=False), seed=seed).schedule.seed
             for seed in range(4) for phase in plan}
    assert len({*seeds.values()}) == 4 * 3 and all(seeds[seed, "control"] == seeds[seed, "tune"] for seed in range(4))
    schedules = [progress(m, text, replace(phase, aia=False), ratio="2:3").schedule for phase in plan]
    assert [schedule.ratio for schedule in schedules] == [(0, 1, 0)] + [(2, 3, 0)] * 3
    assert {schedule.drop for schedule in schedules} == {data.DROP["emu3"]}


@pytest.mark.parametrize("preset, given, batches", [("tiny-janus", 0, 10), ("emu3-8b", 0, 100), ("emu3-8b", 7, 7)])
def test_lambda_is_measured_on_as_many_batches_as_the_preset_needs(preset, given, batches):
    """Ten for a tiny model, a hundred for a large one; or as many as are asked for."""
    config, plan = train.TrainConfig(preset=preset, calibration=given), SimpleNamespace(step=lambda _: [], ratio=(1, 1))
    with pytest.raises(InputError, match=f" {batches} batches hold no sample"):
        train.calibrate(fresh("tiny-emu3"), plan, TARGETS, config, contextlib.nullcontext)


def test_rates_are_those_since_the_last_report(texts, monkeypatch):
    """A slow start, or a pause, must not hide how fast it is now. Padding is what is no token."""
    clock, log = [100.0], []
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: clock[0]))
    now = progress(fresh("tiny-emu3"), texts["tiny-emu3"], train.Phase("joint", 20, 4, 1e-3, 1, ("vq",)))
    now.run.log, now.run.elapsed = log.append, lambda: clock[0]
    for step, later in ((4, 10.0), (9, 5.0)):
        batches = now.batches()
        clock[0] += later
        train.report_step(now, step, {}, 1.0)
        real, padded = sum(sum(batch.lengths) for batch in batches), sum(batch.tokens.numel() for batch in batches)
        assert log[-1]["samples_per_second"] == pytest.approx(5 * 4 / later)
        assert log[-1]["tokens_per_second"] == pytest.approx(real / later)
        assert 0 < log[-1]["padding"] == pytest.approx(1 - real / padded) and log[-1]["waiting"] == 0
        assert log[-1]["lr"] == train.learning_rate(step, now.phase)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    """Linear to the peak, then half a cosine to a hundredth of it, reached one step after the last."""
    phase = train.Phase("tune", 110, 8, 2.0, 10)
    rates = [train.learning_rate(step, phase) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)]) and rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.01 + 0.99 / 2)) and rates[110] == pytest.approx(0.02)
    assert rates[35] == pytest.approx(2.0 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_lambda_fades_over_phases():
    """It stays where nothing is said; else it falls linearly to zero, maybe from a phase before or into the next."""
    lambdas = {"gen": 4.0, "und": 2.0}
    phases = [train.Phase("tune", 40, 8, 1e-3, 10, aia=True, fade=fade) for fade in ((), (30, 50), (-10, 10))]
    plain, joint, tune = ([train.lambdas_at(step, phase, lambdas) for step in range(40)] for phase in phases)
    assert plain == [lambdas] * 40
    assert [joint[step]["gen"] for step in (0, 30, 35, 39)] == pytest.approx([4, 4, 3, 2.2])
    assert [tune[step]["und"] for step in (0, 5, 9, 10, 39)] == pytest.approx([1, 0.5, 0.1, 0, 0])


def test_a_step_takes_and_logs_the_lambda_of_its_own(texts, monkeypatch):
    """A run that said one weight and used another could not be repeated."""
    phase = train.Phase("joint", 4, 4, 1e-3, 1, ("vq",), aia=True, fade=(0, 4))
    now = progress(fresh("tiny-emu3"), texts["tiny-emu3"], phase, aia_weight="8,4")
    used, log, accumulate = [], [], train.accumulate
    monkeypatch.setattr(train, "accumulate", lambda net, batches, targets, lambdas, **named: used.append(lambdas)
                        or accumulate(net, batches, targets, lambdas, **named))
    now.run.log, now.run.elapsed = log.append, lambda: 0.0
    for step in range(4):
        train.report_step(now, step, *train.take_step(now, step))
    assert used == [{"gen": 8.0 - 2 * step, "und": 4.0 - step} for step in range(4)]
    assert [{task: entry[task]["lambda"] for task in aia.TASKS} for entry in log] == used


def test_the_optimizer_takes_what_the_phase_says():
    """Weight decay pulls matrices only; a frozen parameter is in no group, every other one in one."""
    m = fresh("tiny-janus")
    optimizer = train.make_optimizer(m, train.Phase("tune", 9, 8, 0.3, 1, ("vq", "vision"), betas=(0.5, 0.6), eps=1e-3,
                                                    weight_decay=0.7))
    trained = {name: p for name, p in m.named_parameters() if name.split(".")[0] not in ("vq", "vision")}
    for group, decay, vectors in zip(optimizer.param_groups, (0.7, 0.0), (False, True), strict=True):
        assert {*map(id, group["params"])} == {id(p) for p in trained.values() if (p.ndim == 1) == vectors}
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.5, 0.6), 1e-3, decay)
    assert {name for name, p in m.named_parameters() if p.requires_grad} == trained.keys()


def test_a_step_is_taken_at_its_own_rate(texts):
    """Up in the first steps and down in the later ones."""
    phase = train.Phase("joint", 6, 4, 1e-3, 3, ("vq",))
    now = progress(fresh("tiny-emu3"), texts["tiny-emu3"], phase)
    for step in range(6):
        train.take_step(now, step)
        assert [group["lr"] for group in now.optimizer.param_groups] == [train.learning_rate(step, phase)] * 2


def test_flags_of_the_language_model_leave_the_picture_tokenizer_alone():
    """At another rate its codebook collapses. Steps are those of every phase, a tenth of them at most warms up."""
    plain, given, short = (train.plan(train.TrainConfig(**changes)) for changes in (
        {}, {"lr": 0.5, "batch_size": 7, "weight_decay": 0.0}, {"steps": 40}))
    assert given[0] == plain[0] and plain[0].pictures
    assert given[1:] == [replace(phase, lr=0.5, batch_size=7, weight_decay=0.0) for phase in plain[1:]]
    assert short == [replace(phase, steps=40, warmup=4) for phase in plain]


@pytest.mark.parametrize("text, expected", [
    ("rho", None), ("off", (0.0, 0.0)), ("paper", (40.0, 40.0)), ("released", (5.0, 10.0)), ("3.5", (3.5, 3.5)),
    ("2,7", (2.0, 7.0)), ("0", (0.0, 0.0)),
])
def test_weights_are_a_name_one_number_or_two(text, expected):
    """Two numbers stand for generation and understanding; rho asks for calibration."""
    assert train.fixed_lambdas(text) == (expected and {"gen": expected[0], "und": expected[1]})


@pytest.mark.parametrize("text", ["", "five", "-1", "1,-1", "1,2,3", "1,", "nan", "inf"])
def test_unusable_weights_are_refused(text):
    """A weight is finite and not negative; the message names the flag."""
    with pytest.raises(InputError, match="--aia-weight"):
        train.fixed_lambdas(text)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------
def settings(folder, name="tiny-emu3", **changes):
    return train.TrainConfig(**{"preset": name, "steps": 10, "batch_size": 4, "pool": 16, "calibration": 1,
                                "log_every": 1, "device": "cpu", "out": str(folder)} | changes)


@pytest.fixture(scope="module", params=[("tiny-emu3", "aia"), ("tiny-janus", "both")], ids=["emu3", "janus, both arms"])
def whole(request, tmp_path_factory):
    """An uninterrupted run: its settings, and for each of its phases the weights that its first step found and those
    that its last one left, and of every step the micro-batches, the settings of the optimizer's groups, and the norm of
    the gradient before and after clipping."""
    phases, run_phase, accumulate, updating = {}, train.run_phase, train.accumulate, train.updating

    def watched(run, index, manifest):
        now = phases[run.phases[index]] = SimpleNamespace(start=None, batches=[], groups=[], norms=[])
        run_phase(run, index, manifest)
        now.end = copy.deepcopy(run.m.state_dict())

    def accumulated(net, batches, targets, lambdas, backward=True, *rest, **named):
        if backward:                                # calibration only measures
            [*phases.values()][-1].batches.append(batches)
        return accumulate(net, batches, targets, lambdas, backward, *rest, **named)

    @contextlib.contextmanager
    def moving(m, optimizer, clip):
        now = [*phases.values()][-1]
        now.start = now.start or copy.deepcopy(m.state_dict())
        now.groups += [{key: value for key, value in group.items() if key != "params"}
                       for group in optimizer.param_groups]
        with updating(m, optimizer, clip) as norm:
            clipped = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]).norm()
            now.norms.append((float(norm), float(clipped)))
            yield norm
    config = settings(tmp_path_factory.mktemp("runs") / "whole", request.param[0], arms=request.param[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda run: run)
        patch.setattr(train, "run_phase", watched)
        patch.setattr(train, "accumulate", accumulated)
        patch.setattr(train, "updating", moving)
        train.train(config)
    return config, phases


def test_frozen_parts_do_not_move(whole):
    """The picture tokenizer learns alone and then stands still, SigLIP from phase 3 on; reading uses no
    part that only draws; everything else moves."""
    config, phases = whole
    everything = {name for name, _ in model.build(config.preset).named_children()}
    drawing = {name for name in everything if name.startswith("gen_")}
    for phase, now in phases.items():
        still = {*phase.frozen} | (drawing if phase.name == "answer" else set())
        moved = {key.split(".")[0] for key, x in now.end.items() if not torch.equal(x, now.start[key])}
        assert moved == ({"vq"} if phase.name == "tokenizer" else everything - still), phase.name
    assert "vq" in phase.frozen and ("vision" in phase.frozen or config.preset == "tiny-emu3")


def test_a_phase_without_aia_is_a_plain_next_token_run_bit_for_bit(whole):
    """The same loop written out without a line of AIA: neither the phases before tuning nor the control have met it."""
    config, phases = whole
    plain = [phase for phase in phases if phase.name in ("answer", "joint", "control")]
    assert len(plain) == (3 if config.arms == "both" else 2)
    for phase in plain:
        m, now = model.build(config.preset).train(), phases[phase]
        m.load_state_dict(now.start)
        for name, p in m.named_parameters():
            p.requires_grad_(name.split(".")[0] not in phase.frozen)
        weights = [p for p in m.parameters() if p.requires_grad]
        matrices, vectors = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for step, batches in enumerate(now.batches):
            for batch in batches:
                tokens = sum((other.labels != -100).sum() for other in batches if other.task == batch.task)
                (m(batch, intensity=False).ntp / tokens).backward()
            torch.nn.utils.clip_grad_norm_([p for p in weights if p.grad is not None], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, phase)
            optimizer.step()
            optimizer.zero_grad()
        assert step == 9 and equal(m.state_dict(), now.end), phase.name


def test_both_arms_meet_the_same_samples_from_the_same_weights(whole):
    """Only AIA may differ between them: token for token, with their words and dropped prompts. Other phases of the same
    seed meet others."""
    config, phases = whole
    found = {phase.name: [(b.task, b.origins, b.tokens.tolist(), b.aia_valid.tolist()) for step in now.batches
                          for b in step] for phase, now in phases.items() if not phase.pictures}
    *others, last = found
    assert {name for name in others if found[name] == found[last]} == ({"control"} if config.arms == "both" else set())
    start = {phase.name: now.start for phase, now in phases.items()}
    for name in ("tune", "control") if config.arms == "both" else ("tune",):
        assert equal(start[name], stored(Path(config.out) / "before"))
    for name in others:                             # nor do they repeat themselves
        assert len({str(sample) for sample in found[name]}) == len(found[name])


def test_every_step_moves_by_the_plan(whole):
    """The rate of this step and not of the next, the plan's values for matrices, no decay of vectors, and a gradient
    that is no longer than the plan allows; so for the picture tokenizer as for the language model."""
    config, phases = whole
    for phase, now in phases.items():
        assert len(now.groups) == 2 * phase.steps == 20
        for i, group in enumerate(now.groups):
            expected = {"lr": train.learning_rate(i // 2, phase), "betas": phase.betas, "eps": phase.eps,
                        "weight_decay": phase.weight_decay if i % 2 == 0 else 0.0}
            assert {key: group[key] for key in expected} == expected
        for norm, clipped in now.norms:
            assert clipped == pytest.approx(min(norm, phase.clip), rel=1e-4)
    assert any(norm > phase.clip for phase, now in phases.items() for norm, _ in now.norms)


def test_unifork_trains_each_branch_alone_at_the_end(tmp_path, unscored, monkeypatch):
    """Generation's branch begins as a copy of what has learned to read; the first phase of both tasks moves embedding
    and head, the last ones a branch each, and nothing else. Four steps and two more are six."""
    moved, forked, run_stage, fork = {}, [], train.run_phase, model.fork

    def watched(run, index, state):
        before = copy.deepcopy(run.m.state_dict())
        run_stage(run, index, state)
        if run.phases[index].name == "align":
            before |= {name: before[model.unforked(name, run.m.config)] for name in before if "gen_" in name}
        moved[run.phases[index].name] = {name for name, x in run.m.state_dict().items()
                                         if not torch.equal(x, before[name])}

    def pressed(now, step, *rest):
        if (now.phase.name, step) == ("branch-gen", 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return report(now, step, *rest)
    monkeypatch.setattr(model, "fork", lambda m: forked.append(m) or fork(m))
    monkeypatch.setattr(train, "run_phase", watched)
    report, given = train.report_step, {"name": "tiny-unifork", "steps": 6}
    train.train(settings(tmp_path / "whole", **given))
    branches = {"gen": ("lm.gen_layers.", "lm.gen_norm."), "und": ("lm.layers.2.", "lm.layers.3.", "lm.norm.")}
    names = model.build("tiny-unifork").state_dict()
    for task, own in branches.items():
        assert moved[f"branch-{task}"] == {name for name in names if name.startswith(own)}
    assert moved["align"] == {"lm.embed_tokens.weight", "lm_head.weight"}
    assert moved["joint"] == {name for name in names if not name.startswith("vq.")}
    assert not any("gen_" in name for name in moved["answer"]) and len(forked) == 3       # built, at align, and above
    with monkeypatch.context() as patch, pytest.raises(train.Stop):
        patch.setattr(train, "report_step", pressed)
        train.train(settings(tmp_path / "parts", **given))
    train.train(settings(tmp_path / "parts", **given, resume=True))
    one, two = (stored(newest_checkpoint(tmp_path / name)[0]) for name in ("whole", "parts"))
    assert equal(one, two)


def test_a_run_folder_in_use_is_left_alone(tmp_path, capsys):
    """The same job twice would mix its log and remove the checkpoints of the first: refused before anything is read."""
    with held(tmp_path / "run"):
        line = refused(capsys, "--out", tmp_path / "run", "--resume", "--steps", 1)
    assert line.startswith(f"error: {tmp_path}/run is in use by process {os.getpid()}")
    assert not (tmp_path / "run").exists()


def stored(place):
    """{name: tensor} of the weights in a checkpoint folder."""
    names = [name for name in tensor_names(place) if name.startswith("model.")]
    reader = {name: read for file in place.glob("*.safetensors") for name, read in load_file(file).items()}
    return {name.removeprefix("model."): reader[name] for name in names}


def same_run(one, other):
    """Equal weights in every checkpoint, and equal logs but for times and memory."""
    def log(folder):
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items()
                 if not re.search("second|memory|waiting", key)} for line in lines]
    names = {path.parent.name for path in Path(one).glob("*/manifest.json")}
    assert names == {path.parent.name for path in Path(other).glob("*/manifest.json")} >= {"before"}
    for folder in (*names, newest_checkpoint(Path(one))[0].relative_to(one)):
        assert equal(stored(Path(one) / folder), stored(Path(other) / folder)), folder
    assert log(one) == log(other)


def test_five_steps_resume_five_steps_equal_ten(whole, tmp_path, unscored, monkeypatch):
    """Weights, optimizer and lambda are stored, order and words follow from seed and step: neither Ctrl-C nor a queue
    that ends the job (SIGTERM, SLURM's USR1) changes a bit."""
    (config, _), report = whole, train.report_step
    again = replace(config, out=str(tmp_path / "parts"))
    for index in range(len(train.plan(config))):
        def pressed(now, step, *rest, stop=(index, 4)):
            if (now.index, step) == stop:
                os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[now.index % 3])
            return report(now, step, *rest)
        monkeypatch.setattr(train, "report_step", pressed)
        with pytest.raises(train.Stop):
            train.train(replace(again, resume=index > 0))
        state = newest_checkpoint(tmp_path / "parts")[1]
        assert (state["phase"], state["step"]) == (index, 5)
    train.train(replace(again, resume=True))
    same_run(config.out, again.out)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)               # of training, those before a resume included


@pytest.mark.parametrize("name, seed", [("tiny-mixed-fork", 0), ("tiny-mixed-codes", 1)])
def test_a_run_on_conversations_stops_and_goes_on_the_same(name, seed, tmp_path, unscored, monkeypatch):
    """In the middle of joint training, and of tuning with AIA: their order and words follow from seed and step too."""
    given = {"name": name, "steps": 4, "batch_size": 8, "ratio": "1:1:2", "seed": seed}
    seen, accumulate, report = [], train.accumulate, train.report_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate", lambda net, batches, *rest, **named: seen.append(
            [batch.task for batch in batches]) or accumulate(net, batches, *rest, **named))
        train.train(settings(tmp_path / "whole", **given))
    assert seen == [["und"]] * 4 + [["gen", "und", "mixed"]] * (4 + 1 + 4)                  # one batch calibrates
    for index in (2, 3):
        def pressed(now, step, *rest, stop=(index, 1)):
            if (now.index, step) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return report(now, step, *rest)
        monkeypatch.setattr(train, "report_step", pressed)
        with pytest.raises(train.Stop):
            train.train(settings(tmp_path / "parts", **given, resume=index > 2))
        assert newest_checkpoint(tmp_path / "parts")[1]["step"] == 2
    train.train(settings(tmp_path / "parts", **given, resume=True))
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_between_stages_goes_on_the_same(whole, tmp_path, unscored, monkeypatch):
    """What a phase starts from is in the folder, so it does not matter that the process before it is gone."""
    (config, _), save = whole, train.Run.save
    again = replace(config, out=str(tmp_path / "parts"))
    for index in range(1, len(train.plan(config))):
        def killed(run, phase, step, *rest, stop=index):
            save(run, phase, step, *rest)
            if (phase, step) == (stop, 0):
                run.saver.finish()
                raise MemoryError("killed")
        monkeypatch.setattr(train.Run, "save", killed)
        with pytest.raises(MemoryError):
            train.train(replace(again, resume=index > 1))
    train.train(replace(again, resume=True))
    same_run(config.out, again.out)


def test_a_killed_job_leaves_a_log_that_is_trimmed(tmp_path):
    """Reports behind the checkpoint are taken again, and a line that was cut short is no line."""
    lines = [json.dumps({"phase": phase, "step": step}) for phase in (0, 1) for step in (1, 2, 3)]
    (tmp_path / "log").write_text("\n".join(lines) + '\n{"phase": 1, "st')
    formats.checkpoints.trim_log(tmp_path / "log", 1, 2)
    assert (tmp_path / "log").read_text().splitlines() == lines[:5]


def test_everything_random_follows_the_seed(tmp_path, unscored, monkeypatch):
    """Fresh weights, pictures and the batches of the picture tokenizer: the same again with the same seed, others with
    another."""
    given, step, runs = [], train.tokenizer_step, []
    monkeypatch.setattr(train, "tokenizer_step", lambda *now: given.append(now[2:]) or step(*now))
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        config = settings(tmp_path / name, seed=seed, steps=2)
        runs.append(train.train(config, train.plan(config)[:1]))
    assert [(step, seed) for step, _, seed in given] == [(0, 3), (1, 3), (0, 3), (1, 3), (0, 4), (1, 4)]
    one, again, other = (run.m.state_dict() for run in runs)
    assert equal(one, again)
    assert not any(torch.equal(one[name], other[name]) for name, p in runs[0].m.lm.named_parameters("lm") if p.ndim > 1)
    for run, seed in zip(runs, (3, 3, 4), strict=True):
        assert (run.source.pictures == data.WorldSource(World(seed), 16, seed).pictures).all()


@pytest.fixture(scope="module")
def at_once(texts, tmp_path_factory):
    """The folder of a small run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "at once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda run: run)
        train.train(settings(folder))
    return folder


def test_a_full_disk_leaves_the_previous_checkpoint(at_once, tmp_path, unscored, monkeypatch):
    """A checkpoint is written under a second name and then renamed; a failed one is told, and the run goes on later."""
    def full(writer, plan, planner):
        if "0000006" in str(writer.folder):
            raise OSError(28, "No space left on device")
        return write(writer, plan, planner)
    write = Writer.write_data
    config = settings(tmp_path, save_every=3)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left.*make room.*--resume"):
        patch.setattr(Writer, "write_data", full)
        train.train(config)
    assert newest_checkpoint(tmp_path)[1]["step"] == 3
    train.train(replace(config, resume=True))
    same_run(tmp_path, at_once)


@pytest.mark.parametrize("spoil", ["changed", "missing", pytest.param("cut", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_put_aside(spoil, at_once, tmp_path, unscored, monkeypatch, capsys):
    """Every file has a checksum: the run goes back to the checkpoint before it, to the same end."""
    config = settings(tmp_path, save_every=3, arms="aia")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train.Run, "save", killed_at(1, 9))
        train.train(config)
    place = tmp_path / "checkpoints/1-0000006"
    file, = place.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    if spoil != "missing":
        file.write_bytes(content if spoil == "changed" else content[:-100])
    train.train(replace(config, resume=True))
    assert re.search("1-0000006 is damaged .*safetensors is missing or not what.*earlier", capsys.readouterr().err)
    assert Path(f"{place}.damaged").exists()
    same_run(tmp_path, at_once)


def killed_at(phase, step):
    """A Run.save that dies before it writes this checkpoint; those before it are on disk."""
    save = train.Run.save

    def dies(run, *now):
        if now[:2] == (phase, step):
            run.saver.finish()
            raise MemoryError("killed")
        save(run, *now)
    return dies


def test_only_the_last_checkpoints_are_kept(tmp_path, unscored):
    """Those of large models fill a disk."""
    train.train(settings(tmp_path, save_every=2, keep=3))
    assert {place.name for place in (tmp_path / "checkpoints").iterdir()} == {"3-0000006", "3-0000008", "4-0000000"}


@pytest.mark.parametrize("phase, function, call, saved", [
    ("tokenizer", "tokenizer_step", 3, "no checkpoint yet"),
    ("joint", "accumulate", 7, "last good checkpoint {}/checkpoints/2-0000000")])
def test_a_broken_number_stops_before_it_is_stored(phase, function, call, saved, tmp_path, unscored, monkeypatch):
    """One infinite weight makes the loss NaN: the message names phase, step, records and the last good checkpoint, be
    it one that is still being written."""
    step, calls, finish = getattr(train, function), [], Writer.finish
    monkeypatch.setattr(Writer, "finish", lambda *key, **given: time.sleep(1) or finish(*key, **given))

    def breaks(m, *rest, **named):
        calls.append(1)
        if len(calls) == call:
            [p for p in m.parameters() if p.requires_grad][-1].data.fill_(math.inf)
        return step(m, *rest, **named)
    monkeypatch.setattr(train, function, breaks)
    records = "world picture [0-9]+, world picture" if phase == "joint" else "tokenizer pictures"
    with pytest.raises(InputError, match=f"phase {phase}, step 3: .*not finite.*{records}.*{saved.format(tmp_path)}"):
        train.train(settings(tmp_path, steps=4, save_every=100))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert len(calls) == call
    places = checkpoint_folders(tmp_path)
    assert [place.name for place in places] == (["1-0000000", "2-0000000"] if phase == "joint" else [])
    assert all(x.isfinite().all() for place in places for x in stored(place).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_no_weight(value, texts, monkeypatch):
    """The losses of such a step may look well: an overflow in the backward pass shows in the norm alone."""
    m, step = fresh("tiny-emu3"), train.accumulate
    now = progress(m, texts["tiny-emu3"], train.Phase("tune", 3, 4, 1e-3, 1, ("vq",)))
    now.run.folder, now.run.saver = ROOT / "none", SimpleNamespace(finish=lambda: None)

    def overflows(*given, **named):
        sums = step(*given, **named)
        m.lm.norm.weight.grad[0] = value
        return sums
    monkeypatch.setattr(train, "accumulate", overflows)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(InputError, match=f"step 1: loss or gradient is not finite .norm {value}.; records: world"):
        train.take_step(now, 0)
    assert equal(m.state_dict(), before) and not now.optimizer.state


@pytest.mark.parametrize("row", [{"ntp": math.nan, "aia": None}, {"ntp": 1.0, "aia": math.inf}, {"l1": math.nan}])
def test_a_loss_that_is_not_finite_is_no_good_step(row, tmp_path):
    """Any one of them, whatever the norm says, as lambda 0 hides a broken AIA loss from it."""
    run = SimpleNamespace(folder=tmp_path, saver=SimpleNamespace(finish=lambda: None))
    phase = train.Phase("tune", 3, 4, 1e-3, 1)
    train.check_finite(1.0, {"gen": {"ntp": 1.0, "aia": None}, "und": {"l1": 0.5}}, phase, 0, [], run)
    with pytest.raises(InputError, match="not finite"):
        train.check_finite(1.0, {"gen": {"ntp": 1.0, "aia": 0.5}, "und": row}, phase, 0, [], run)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words, message", [
    (["--bogus", "1"], "unrecognized arguments: --bogus"), (["--preset", "gpt"], "--preset: invalid choice: 'gpt'"),
    (["--step", "5"], "unrecognized arguments: --step"), (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--preset", "emu3-8b"], "needs --init FOLDER"), (["--init", "nowhere"], "nowhere does not exist: give"),
    (["--data", "none.jsonl"], "data set none.jsonl cannot be read"), (["--ratio", "0:0"], "--ratio '0:0'.*GEN:UND"),
    (["--aia-weight", "lots"], "--aia-weight 'lots'"), (["--aia-targets", "S4"], "32 layers, this model has"),
    (["--aia-targets", "none.json"], "none.json cannot be read"), (["--device", "toaster"], "--device toaster"),
    (["--keep", "0"], "--keep 0: give at least 1"), (["--lora-rank", "8"], "--lora-rank 8 needs --init FOLDER"),
    (["--lora-rank", "8", "--init", "x", "--pure-bf16"], "--pure-bf16: give --dtype bfloat16"),
    (["--lr", "nan"], "--lr nan: give at least 0"), (["--weight-decay", "-0.5"], "--weight-decay -0.5: give"),
    (["--rho", "inf"], "--rho inf"), (["--seed", str(2**64)], "--seed 18446744073709551616"),
    (["--data", "x=1/0"], "share above 0"), (["--device", "meta"], "--device meta is not available"),
    (["--arms", "both", "--aia-weight", "off"], "--arms both compares"), (["--encoded", "codes"], "leave it out"),
    (["--pure-bf16", "--dtype", "float32"], "leave out one of them"), (["--fork-layer", "1"], "needs --init FOLDER")])
def test_bad_settings_are_refused_with_one_line(words, message, tmp_path, capsys):
    """The line names cause and remedy, and nothing has been written: the corrected command runs at once."""
    small = () if "--data" in words else ("--pool", 8)
    assert re.search(message, refused(capsys, *small, "--out", tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, value", [("--seed", -1), ("--pool", 1), ("--micro-batch", 0), ("--log-every", 0),
                                         ("--save-every", 0), ("--rho", 0), ("--batch-size", -4), ("--eval-n", 0)])
def test_numbers_that_cannot_work_are_refused(flag, value, tmp_path, capsys, monkeypatch):
    """A division by zero after an hour helps nobody: the range of a setting is checked before the first step."""
    monkeypatch.setattr(train, "finish", lambda run: {})
    given = ["--steps", 1, "--pool", 8, "--batch-size", 4, "--calibration", 1, "--out", tmp_path / "run", flag, value]
    assert flag in refused(capsys, *given)


@pytest.mark.parametrize("words, reason", [
    (["--rho", 3, "--aia-weight", "paper"], "--rho 3.0 has no effect, as --aia-weight gives lambda"),
    (["--calibration", 3, "--preset", "tiny-unifork"], "--calibration 3 has no effect, as there is no AIA"),
    (["--rho", 3, "--aia-weight", "off"], "there is no AIA to weigh"),
    (["--aia-weight", 3, "--preset", "tiny-unifork"], "--aia-weight 3 has no effect, as no phase has AIA"),
    (["--val-every", 3], "there is no --val"),
    (["--shapes", 6, "--data", "a.jsonl"], "--shapes 6 has no effect, as --data"),
    (["--cell", 8, "--preset", "small-emu3", "--data", "a.jsonl"], "--cell 8 has no effect, as --data"),
    (["--on-bad-record", "skip"], "world has no files"), (["--vision-tokenizer", "x"], "it belongs to --init")])
def test_a_setting_without_effect_is_refused(words, reason, tmp_path, capsys):
    """Who sets it expects a difference. What a preset sets by itself is no mistake of the user's."""
    assert reason in refused(capsys, "--out", tmp_path / "run", *words)
    config = train.settings_from(["--preset", "small-emu3", "--data", "a.jsonl"])
    train.check_effects(config, train.plan(config))


def test_a_collapsed_picture_tokenizer_is_told(tmp_path, unscored, capsys, monkeypatch):
    """One code for every picture: losses fall to nothing, and only the drawings would show that they mean nothing."""
    step = train.tokenizer_step

    def collapsed(m, *rest):
        return {"tokenizer": step(m, *rest)["tokenizer"] | {"codes": 1}}
    monkeypatch.setattr(train, "tokenizer_step", collapsed)
    train.train(settings(tmp_path, steps=2))
    printed = capsys.readouterr().out
    assert "codes 1 (collapsed)" in printed and "warning: the picture tokenizer has collapsed to one code" in printed


def test_the_folder_of_a_run_is_protected(whole, tmp_path, capsys):
    """A run is never overwritten, nor continued with other settings, another preset or a damaged checkpoint."""
    config, _ = whole
    flags = [word for key in ("preset", "steps", "batch_size", "pool", "calibration", "arms")
             for word in ("--" + key.replace("_", "-"), getattr(config, key))]
    assert re.search("not empty.*--resume.*--out", refused(capsys, *flags, "--out", config.out))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("not a run")
    assert "is not the folder of a run: choose another --out" in refused(
        capsys, "--out", tmp_path / "letters", "--resume")
    assert re.search("started with --lr 0.0, not 0.5", refused(capsys, *flags, "--out", config.out, "--resume",
                                                               "--lr", 0.5))
    other, = {*NAMES} - {config.preset}
    assert re.search(f"started with --preset {config.preset}", refused(capsys, *flags, "--out", config.out, "--resume",
                                                                       "--preset", other))
    shutil.copytree(config.out, tmp_path / "cut")
    for file in tmp_path.glob("cut/checkpoints/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(SystemExit):
        command(*flags, "--out", tmp_path / "cut", "--resume")
    *damaged, last = capsys.readouterr().err.strip().splitlines()
    assert len(damaged) == 2 and "holds no checkpoint that can be read" in last


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A stopped run exits with 130, as a shell expects, after its checkpoint is whole."""
    words = [sys.executable, "train.py", "--steps", "9999", "--pool", "8", "--log-every", "1", "--out", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search("stopped and saved; .*same command and --resume$", out.strip())
    assert newest_checkpoint(tmp_path)[1]["step"] > 0


def result_of(out):
    """The object in the last line of a measuring command."""
    return json.loads(out.strip().splitlines()[-1].removeprefix("result "))


OWN_STEPS = ("--steps", 2, "--batch-size", 8, "--calibration", 1)
TWO_STEPS = (*OWN_STEPS, "--pool", 32, "--eval-n", 2)


@both_models
def test_a_short_run_leaves_its_results(name, tmp_path, capsys):
    """From nothing to scores in one command: the last line is one object, for scripts to read. Whoever opens the folder
    measures the same."""
    command("--preset", name, *TWO_STEPS, "--out", tmp_path / "run")
    result = result_of(capsys.readouterr().out)
    m = formats.weights.load(tmp_path / "run")
    found = evaluation.score_both(m, Text(m.tokenizer_file, m.config.kind), World(0), 2)[0]
    found |= evaluation.score_tokenizer(m, World(0), 8)
    assert {key: result[key] for key in ("und", "gen", "reader", "psnr")} == pytest.approx(
        {key: found[key] for key in ("und", "gen", "reader", "psnr")})
    assert json.loads((tmp_path / "run/result.json").read_text()).items() >= result.items()
    assert 0 < result["seconds"] < 100 and 0.1 < result["rss_gb"] < 100
    for file in ("checkpoints/4-0000000/manifest.json", "curves.png", "samples.png", "settings.json"):
        assert (tmp_path / "run" / file).stat().st_size > 0
    assert json.loads((tmp_path / "run/curves.json").read_text())["run"] == f"{name}, seed 0"
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(entry["name"], entry["step"]) for entry in log] == [("tokenizer", 2), ("answer", 2), ("joint", 2),
                                                                 ("tune", 2)]
    for row in (log[-1][task] for task in aia.TASKS):
        assert row["lambda"] > 0 and len(row["intensity"]) == SMALL[name].layers
        assert row["ntp"] == pytest.approx(row["ratio"] * row["lambda"] * row["aia"])


@pytest.mark.parametrize("preset, flags, expected", [
    ("small-emu3", [], (6, 6, 3, 16, 32_000)), ("small-emu3", ["--cell", "8"], (6, 6, 3, 8, 32_000)),
    ("small-emu3", ["--objects", "2", "--pool", "50"], (6, 6, 2, 16, 50)), ("tiny-emu3", [], (4, 4, 2, 8, 8_000))])
def test_a_presets_world_is_its_default_and_flags_come_first(preset, flags, expected, monkeypatch):
    """`--preset small-emu3` alone is a whole run, in a world that fits it; other presets know nothing of that."""
    met = []
    monkeypatch.setattr(train, "train", lambda config, phases: met.append(config))
    command("--preset", preset, *flags)
    assert tuple(getattr(met[0], name) for name in ("shapes", "colours", "objects", "cell", "pool")) == expected
    phases = train.plan(met[0])
    assert [phase.name for phase in phases] == ["tokenizer", "answer", "joint", "tune"] and phases[-1].aia


def test_a_larger_preset_runs_from_nothing_to_scores_in_its_own_world(tmp_path, monkeypatch, capsys):
    """Its words, picture codes and prompts of three objects fit together; here with fewer and narrower layers."""
    monkeypatch.setitem(model.PRESETS, "small-emu3", replace(
        model.SMALL_EMU3, layers=2, width=64, ffn=64, heads=2, kv_heads=1, head_dim=32, vq_width=32))
    monkeypatch.setattr(data, "train_tokenizer", TRAIN_TOKENIZER)
    command("--preset", "small-emu3", *TWO_STEPS, "--eval-n", 1, "--out", tmp_path / "run")
    result, folder = result_of(capsys.readouterr().out), tmp_path / "run"
    assert all(0 <= result[key] <= 1 for key in ("und", "gen", "reader")) and math.isfinite(result["psnr"])
    assert "three objects" in json.loads((folder / "scores.json").read_text())["gen_by_skill"]
    assert json.loads((folder / "settings.json").read_text())["cell"] == 16
    m = formats.weights.load(folder)
    text = Text(m.tokenizer_file, "emu3")
    drawn, = evaluation.draw(m, text, ["a red circle above a blue square"])
    assert drawn.shape == (3, 32, 32) and m.config.grid == (4, 4) and text.core.get_vocab_size() == m.config.vocab


@pytest.mark.parametrize("flags, remedy", [
    (["--cell", "16"], "draws pictures of 16 x 16 pixels, .* have 32 x 32: give --cell 8"),
    (["--preset", "small-emu3", "--cell", "8"], "draws pictures of 32 x 32 pixels, .* have 16 x 16: give --cell 16"),
    (["--preset", "tiny-janus"], "20 x 20 pixels, .* have 16 x 16: give --data with pictures of your own")])
def test_a_world_of_another_picture_size_is_refused(flags, remedy, tmp_path, monkeypatch, capsys):
    """Scores read the pictures that a model draws cell by cell; nothing is written before that is known to work."""
    monkeypatch.setitem(model.PRESETS, "tiny-janus", replace(SMALL["tiny-janus"], image_size=20))
    assert re.search(remedy, refused(capsys, *flags, "--pool", 50, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def own(tmp_path):
    """A user's own pictures: an export of the built-in world."""
    data.main(["export", str(tmp_path / "own"), "--n", "8"])
    return tmp_path / "own/train.jsonl"


@both_models
def test_own_pictures_end_in_losses_instead_of_scores(name, own, tmp_path, capsys):
    """Nobody knows what is on them, so und, gen and reader are null and the losses on --val, of the final weights and
    over all of its records, take their place."""
    val = own.with_name("val.jsonl")
    val.write_text("".join(line + "\n" for line in own.read_text().splitlines()[4:]))
    command("--preset", name, *OWN_STEPS, "--data", own, "--val", val, "--out", tmp_path / "run")
    result = result_of(capsys.readouterr().out)
    assert result["und"] is result["gen"] is result["reader"] is None
    m, source = formats.weights.load(tmp_path / "run"), FileSource(val, SMALL[name].kind)
    preparer = data.Preparer(m, Text(m.tokenizer_file, SMALL[name].kind))
    batches = [preparer.batch([source.record(task, i) for i in range(source.count(task))]) for task in aia.TASKS]
    assert [len(batch.tokens) for batch in batches] == [2, 2]
    for task, row in train.metrics_of(train.accumulate(m, batches, TARGETS, OFF, backward=False)).items():
        assert row["ntp"] == pytest.approx(result[f"val_ntp_{task}"], rel=1e-4)
        assert row["aia"] == pytest.approx(result[f"aia_{task}"], rel=1e-3)
    assert (tmp_path / "run/curves.png").exists() and not (tmp_path / "run/samples.png").exists()


def test_conversations_alone_end_in_losses_of_both_tasks(tmp_path, capsys):
    """Each has drawings and words of its own, so it takes the place of both where --val holds nothing else."""
    data.main(["export", str(tmp_path / "talk"), "--n", "18", "--mixed"])
    talk = tmp_path / "talk/train.jsonl"
    talk.write_text("".join(line + "\n" for line in talk.read_text().splitlines()[2::3]))     # every third is one
    command("--preset", "tiny-mixed-codes", *OWN_STEPS, "--ratio", "0:0:1", "--data", talk, "--out", tmp_path / "run")
    result = result_of(capsys.readouterr().out)
    m, source = formats.weights.load(tmp_path / "run"), FileSource(talk, "janus")
    preparer = data.Preparer(m, Text(m.tokenizer_file, "janus"))
    batch = preparer.batch([source.record("mixed", i) for i in range(source.count("mixed"))])
    for task, row in train.metrics_of(train.accumulate(m, [batch], TARGETS, OFF, backward=False)).items():
        assert row["ntp"] == pytest.approx(result[f"val_ntp_{task}"], rel=1e-4)
        assert row["aia"] == pytest.approx(result[f"aia_{task}"], rel=1e-3)


@pytest.mark.parametrize("ratio, told", [("1:1", 1), ("1:1:1", 0)])
def test_mixed_records_without_a_share_are_told(ratio, told, tmp_path, capsys):
    """By default they have none, so whoever brings some would train without them and not know."""
    data.main(["export", str(tmp_path / "own"), "--n", "3", "--mixed"])
    config = settings(tmp_path / "run", data=(str(tmp_path / "own/train.jsonl"),), ratio=ratio)
    train.Run.open_data(SimpleNamespace(config=config, kind="emu3", manifest=None))
    assert capsys.readouterr().out.count(f"mixed records have no share in --ratio {ratio}") == told


@pytest.mark.parametrize("line, what", [(1, "long caption"), (2, "broken picture")])
def test_a_bad_record_is_named_or_skipped_in_every_stage(line, what, own, tmp_path, capsys):
    """Wherever it shows, in the tokenizer or the final losses, or in training alone, it is left out and listed once."""
    val = own.with_name("val.jsonl")
    val.write_text("".join(line + "\n" for line in own.read_text().splitlines()[4:]))
    held = ("--val", val) if what == "long caption" else ()
    if what == "broken picture":                                # its header is good, its pixels end too soon
        picture = own.parent / "pictures/00001.png"
        picture.write_bytes(picture.read_bytes()[:-60])
    else:
        first, *others = own.read_text().splitlines()
        record = json.loads(first)
        record["conversations"][0]["value"] *= 200
        own.write_text("\n".join([json.dumps(record), *others]))
    assert f"{own}:{line}: " in refused(capsys, *OWN_STEPS, "--data", own, "--out", tmp_path / "stops")
    command(*OWN_STEPS, "--data", own, *held, "--out", tmp_path / "run", "--on-bad-record", "skip")
    out = capsys.readouterr().out
    assert f"1 bad record was left out:\n  {own}: 1\n  {own}:{line}: " in out and result_of(out)["val_ntp_und"] > 0
    assert out.count(f"{own}:{line}: ") == 1


def test_fine_tuning_starts_from_another_run(whole, tmp_path, unscored):
    """--init skips to phase 3, with both arms if asked: the same start and samples, so the same first losses; from then
    on AIA makes the difference. The vocabulary is that of the other run."""
    config, _ = whole
    run = train.train(settings(tmp_path, config.preset, init=config.out, arms="both", steps=2))
    start, before, control = (stored(path) for path in (newest_checkpoint(Path(config.out))[0],
                                                        tmp_path / "before", tmp_path / "control"))
    assert equal(before, start) and not equal(control, start) and not equal(control, run.m.state_dict())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["name"], row["step"]) for row in rows] == [("control", 1), ("control", 2), ("tune", 1), ("tune", 2)]
    for task in aia.TASKS:
        first, second, first_with, second_with = ((row[task]["ntp"], row[task]["aia"]) for row in rows)
        assert first == first_with and second != second_with
        assert [row[task]["lambda"] > 0 for row in rows] == [False, False, True, True]
    lambdas = {task: rows[-1][task]["lambda"] for task in aia.TASKS}
    assert newest_checkpoint(tmp_path)[1]["lambdas"] == lambdas                 # by which curves are labelled
    assert run.text.file.read_bytes() == (Path(config.out) / "tokenizer.json").read_bytes()


def test_encoded_pictures_train_the_same_model(whole, own, tmp_path, unscored, capsys):
    """--encoded saves work and changes nothing: the same weights, bit for bit."""
    config, _ = whole
    janus = "janus" in config.preset
    data.main(["encode", str(tmp_path / "codes"), "--data", str(own), "--init", config.out, *["--features"] * janus])
    given = {"init": config.out, "data": (str(own),), "steps": 2}
    plain = train.train(settings(tmp_path / "plain", config.preset, **given))
    stored = train.train(settings(tmp_path / "stored", config.preset, **given, encoded=str(tmp_path / "codes")))
    assert equal(plain.m.state_dict(), stored.m.state_dict())
    assert {key.split("/")[0] for key in stored.preparer.encoded.parts} == {"codes", *["features"] * janus}
    flags = ("--preset", config.preset, "--data", own, "--encoded", tmp_path / "codes", "--out", tmp_path / "refused")
    assert "--encoded needs --init" in refused(capsys, *flags)


def test_another_models_run_is_no_start(whole, tmp_path, capsys):
    """Emu3 cannot go on as Janus-Pro; it is refused before the new folder exists."""
    config, _ = whole
    other, = {*NAMES} - {config.preset}
    refusal = refused(capsys, "--preset", other, "--init", config.out, "--out", tmp_path / "run")
    assert "choose the preset that fits" in refusal
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, remedy", [
    (["--preset", "tiny-wide"], "give --preset tiny-"), (["--seed", "1"], "the world of --seed 0 .*give --seed 0"),
    (["--shapes", "6"], "give --shapes 4"), (["--fork-layer", "2"], "the model has 2 layers")])
def test_what_does_not_fit_the_start_is_refused(flags, remedy, whole, tmp_path, capsys):
    """Another size would get the plan of another model, another world holds out what these weights have met."""
    config, _ = whole
    if config.preset == "tiny-janus" and "tiny-wide" in flags:
        flags = ["--preset", "janus-pro-1b"]
    assert re.search(remedy, refused(capsys, "--preset", config.preset, "--init", config.out, "--out", tmp_path / "run",
                                     *flags))
    assert not (tmp_path / "run").exists()


def test_a_missing_task_is_told_before_anything_is_trained(own, tmp_path, unscored, capsys):
    """And the remedy that is printed works, also where UniFork has a phase for that task alone."""
    lines = own.read_text().splitlines()
    own.write_text("\n".join(line for line in lines if '"value": "<image>"' in line))
    assert "--ratio 1:0" in refused(capsys, *OWN_STEPS, "--data", own, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    plan = train.plan(settings(tmp_path, "tiny-unifork", data=(str(own),), ratio="1:0"))
    assert [phase.name for phase in plan] == ["tokenizer", "align", "joint", "branch-gen"]
    train.train(settings(tmp_path / "run", data=(str(own),), ratio="1:0", steps=1))


def test_a_run_goes_on_with_its_data_wherever_they_lie(own, tmp_path, unscored, capsys):
    """What a data set is shows in its records, not in its path: the same records go on, however their path is spelled;
    as many others do not. The refusal of other steps names the way to train longer."""
    given = settings(tmp_path / "run", data=(str(own),), steps=2)
    train.train(given)
    assert f"{own}: 1 file, 4 records to draw, 4 to answer" in capsys.readouterr().out
    moved = tmp_path / "elsewhere"
    own.parent.rename(moved)
    for name in ("train.jsonl", "../elsewhere/train.jsonl"):
        train.train(replace(given, data=(str(moved / name),), resume=True))
    with pytest.raises(InputError, match=f"--steps 2, not 3: .* in another folder: --init {tmp_path}/run --out"):
        train.train(replace(given, data=(str(moved / "train.jsonl"),), steps=3, resume=True))
    lines = (moved / "train.jsonl").read_text().splitlines()
    (moved / "other.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(InputError, match="was started with other records than these 8: resume"):
        train.train(replace(given, data=(str(moved / "other.jsonl"),), resume=True))
    manifest, = [file for file in (tmp_path / "run").glob("checkpoints/*/manifest.json")][-1:]
    write_json(json.loads(manifest.read_text()) | {"records": {"gen": 4, "und": 4}}, manifest)      # of an older run
    train.train(replace(given, data=(str(moved / "train.jsonl"),), resume=True))


def test_lambda_is_not_guessed_where_nothing_was_measured(whole, tmp_path):
    """A batch without a sample that AIA can use would give lambda 0: a whole training without AIA, unnoticed."""
    config, _ = whole
    with pytest.raises(InputError, match="task gen cannot be calibrated.*larger --calibration"):
        train.train(settings(tmp_path, config.preset, init=config.out, ratio="1:50"))


def test_attention_can_be_chosen_for_a_loaded_run(whole, tmp_path, unscored):
    """--attention is a way to compute, not a property of the weights: it is honoured with --init too."""
    config, _ = whole
    run = train.train(settings(tmp_path, config.preset, init=config.out, steps=1, attention="explicit"))
    assert all(layer.self_attn.attend is model.attend_explicit for layer in run.m.lm.layers)


def test_ctrl_c_at_the_end_is_no_traceback(monkeypatch, tmp_path, capsys):
    """Pressed while scores are computed, nothing is lost: the checkpoint is there, the message says how to go on."""
    def pressed(run):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "finish", pressed)
    with pytest.raises(SystemExit) as stop:
        command(*TWO_STEPS, "--out", tmp_path / "run")
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/4-0000000/manifest.json").exists()


def test_a_run_of_drawing_alone_never_reads():
    """--ratio 1:0 asks for no questions at all, so the part that learns reading first is left out too."""
    def parts(**changes):
        return [phase.name for phase in train.plan(train.TrainConfig(**changes))]
    assert parts(ratio="1:0") == parts(data="own.jsonl") == ["tokenizer", "joint", "tune"]
    assert parts() == parts(ratio="0:1") == ["tokenizer", "answer", "joint", "tune"]


def test_a_step_without_a_usable_record_has_no_numbers():
    """Where bad records are skipped, all of a step may be: it changes nothing, and the run goes on."""
    m = fresh("tiny-emu3")
    sums = train.accumulate(m, [], TARGETS, {"gen": 1.0, "und": 1.0})
    assert train.metrics_of(sums) == {} and train.metrics_of(sums, torch.tensor(2.5)) == ({}, 2.5)


@both_models
def test_plain_training_measures_no_attention(name, texts):
    """Without lambda a step is next-token prediction alone: the same loss and gradient as with lambda 0."""
    m = fresh(name)
    batches = schedule(m, texts[name]).step(0)
    found = {}
    for how, weights in (("plain", None), ("zero", dict.fromkeys(aia.TASKS, 0.0))):
        m.zero_grad()
        sums = train.accumulate(m, batches, {task: aia.targets(2, task) for task in aia.TASKS}, weights)
        metrics = train.metrics_of(sums)
        found[how] = {task: row["ntp"] for task, row in metrics.items()}, m.lm.layers[0].self_attn.q_proj.weight.grad
    assert found["plain"][0] == pytest.approx(found["zero"][0])
    torch.testing.assert_close(found["plain"][1], found["zero"][1])
    assert "aia" not in train.metrics_of(train.accumulate(m, batches[:1], {}, None))[batches[0].task]


def test_a_run_of_before_a_setting_was_there_keeps_its_default(tmp_path):
    """Its stored settings lack the name: resumed with another value, it would change its world half way."""
    stored = {name: value for name, value in json.loads(json.dumps(asdict(settings(tmp_path)))).items()
              if name not in ("shapes", "cell", "data")}
    train.check_settings(stored, settings(tmp_path), tmp_path)
    for other, message in (({"shapes": 5}, "--shapes 4, not 5"), ({"cell": 16}, "--cell 8, not 16")):
        with pytest.raises(InputError, match=message):
            train.check_settings(stored, settings(tmp_path, **other), tmp_path)


# Where a run computes, what it costs and how often it reports: all else makes its numbers.
MAY_CHANGE = {"resume", "out", "device", "parallel", "offload", "attention", "compile", "checkpoint_activations",
              "micro_batch", "encoded", "on_bad_record", "log_every", "save_every", "val_every", "keep", "eval_n"}
FILES = {"data", "val", "init", "vision_tokenizer"}             # may move, see check_settings


@pytest.mark.parametrize("name", [field.name for field in fields(train.TrainConfig)])
def test_a_resumed_run_keeps_every_setting_that_makes_its_numbers(name, tmp_path):
    """With another lambda, seed or rate half way, its numbers are those of neither setting."""
    config = settings(tmp_path)
    given, stored = getattr(config, name), json.loads(json.dumps(asdict(config)))
    other = {bool: not given, tuple: ("other",), str: "other"}.get(type(given), given != 3 and 3)
    changed = replace(config, **{name: other})
    if name in MAY_CHANGE:
        return train.check_settings(stored, changed, tmp_path)
    with pytest.raises(InputError, match=f"was started with --{name.replace('_', '-')} "):
        train.check_settings(stored, changed, tmp_path)
    if name in FILES:
        train.check_settings(stored | {name: "elsewhere"}, changed, tmp_path)


def test_a_harder_world_reaches_training_and_what_reads_the_run(tmp_path, monkeypatch):
    """Its size is a setting of the run: whatever opens the folder draws and asks in the same world."""
    met, words, make = [], [], World

    def watched(*key, **size):
        met.append((size["shapes"], size["colours"], size["objects"], size["cell"]) if size else None)
        return make(*key, **size)
    ready = data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", lambda *given: words.append(given[2].shapes) or ready(*given))
    monkeypatch.setattr(parts.world, "World", watched)
    run = tmp_path / "run"
    larger = replace(model.PRESETS["tiny-emu3"], image_size=32, min_pixels=32 * 32, max_pixels=32 * 32)
    monkeypatch.setitem(model.PRESETS, "tiny-emu3", larger)
    train.train(settings(run, shapes=5, colours=6, objects=3, cell=16, steps=2, eval_n=2))
    scores = json.loads((run / "scores.json").read_text())
    assert "three objects" in scores["gen_by_skill"] and words == [SHAPES[:5]]
    for words in (["curves", "--n", "4"], ["score", "--n", "2", "--out", tmp_path / "s"],
                  ["score", "fid", "--variant", "world", "--n", "2", "--out", tmp_path / "f"]):
        evaluation.main([*map(str, words), "--checkpoint", str(run)])
    lab.alignment.main(["--n", "40", "--checkpoint", str(run)])
    data.main(["export", str(tmp_path / "drawn"), "--n", "8", "--shapes", "5", "--colours", "6", "--objects", "3",
               "--cell", "16"])
    assert len(met) >= 7 and {*met} == {(5, 6, 3, 16)}
    with pytest.raises(InputError, match="--shapes 9"):
        train.main(["--shapes", "9", "--data", "own.jsonl", "--init", str(run), "--out", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()


def test_branches_need_a_fork_where_they_begin(texts, tmp_path):
    """UniFork's last phases on a model that shares its layers would move nothing."""
    m = fresh("tiny-emu3", layers=4)
    m.tokenizer_file = texts["tiny-emu3"].file
    formats.weights.save(m, tmp_path / "public")
    shutil.copy(m.tokenizer_file, tmp_path / "public/tokenizer.json")
    with pytest.raises(InputError, match="--fork-layer 2"):
        train.train(settings(tmp_path / "run", "tiny-unifork", init=str(tmp_path / "public")))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------
def lora_run(config, folder, **changes):
    """A run with LoRA that begins from the run of `whole`, with its arms."""
    return train.train(settings(folder, config.preset, **{"init": config.out, "arms": config.arms, "lora_rank": 4,
                                                          "lr": 1e-2} | changes))


def test_lora_begins_as_its_base_and_moves_alone(whole, tmp_path, unscored, capsys):
    """B is zero, so the first logits are the base's bit for bit; R (in + out) parameters of each projection move, all
    of them, and nothing else."""
    config, _ = whole
    run, ids = lora_run(config, tmp_path, steps=3), torch.randint(model.TINY_TEXT, (2, 9))
    load = formats.weights.load
    base, before, after = load(config.out), load(tmp_path / "before"), load(tmp_path)
    assert torch.equal(before.logits(ids), base.logits(ids)) and not torch.equal(after.logits(ids), base.logits(ids))
    start, end = before.state_dict(), after.state_dict()
    moved = {name for name, x in end.items() if not torch.equal(x, start[name])}
    assert moved == {name for name in end if "lora_" in name} == end.keys() - base.state_dict().keys()
    c, layer = SMALL[config.preset], base.lm.layers[0]
    projections = [p for p in layer.parameters() if p.ndim == 2]
    count = c.layers * sum(4 * sum(p.shape) for p in projections)
    assert len(projections) == 7 and sum(end[name].numel() for name in moved) == count
    assert f" {count:,} of " in capsys.readouterr().out and len(run.phases) == (1 if config.arms == "aia" else 2)


def test_a_merged_lora_run_is_a_plain_model(whole, tmp_path, unscored, capsys):
    """W + (alpha / R) B A is one matrix: the saved folder opens here and in transformers with the logits of the trained
    model. Such a folder can be a start again, the run itself cannot."""
    hf, (config, _) = pytest.importorskip("transformers"), whole
    lora_run(config, tmp_path / "run", steps=3)
    trained, ids = formats.weights.load(tmp_path / "run"), torch.randint(5, 400, (2, 12))
    formats.weights.save(trained, tmp_path / "out")
    plain = formats.weights.load(tmp_path / "out")
    theirs = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert plain.config.lora_rank == 0
    assert plain.state_dict().keys() == formats.weights.load(config.out).state_dict().keys()
    with torch.no_grad():
        for logits in (plain.logits(ids), theirs(input_ids=ids).logits):
            torch.testing.assert_close(logits, trained.logits(ids), rtol=0, atol=1e-5)
        assert (plain.logits(ids) - formats.weights.load(config.out).logits(ids)).abs().max() > 0.01
    again = lora_run(config, tmp_path / "again", init=str(tmp_path / "out"), steps=1, dtype="bfloat16").m
    assert {p.dtype for name, p in again.lm.named_parameters() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in again.lm.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    words = ("--preset", config.preset, "--init", tmp_path / "run", "--out", tmp_path / "no", "--lora-rank")
    for size in (0, 4):
        capsys.readouterr()
        assert "was trained with LoRA: write it as a plain model" in refused(capsys, *words, size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_stops_and_goes_on_the_same(dtype, whole, tmp_path, unscored, monkeypatch):
    """Its checkpoints hold base and additions, each in its type, so five steps and five more are ten."""
    (config, _), report = whole, train.report_step
    lora_run(config, tmp_path / "whole", dtype=dtype)

    def pressed(now, step, *rest):
        if (now.index, step) == (len(now.run.phases) - 1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return report(now, step, *rest)
    with monkeypatch.context() as patch, pytest.raises(train.Stop):
        patch.setattr(train, "report_step", pressed)
        lora_run(config, tmp_path / "parts", dtype=dtype)
    assert newest_checkpoint(tmp_path / "parts")[1]["step"] == 5
    lora_run(config, tmp_path / "parts", dtype=dtype, resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")


@both_models
def test_aia_reaches_both_factors_of_lora(name, texts):
    """At first only B has a gradient, as A is multiplied by zero; once B moved, AIA turns the queries through A too."""
    m = fresh(name, lora_rank=4)
    batch = schedule(m, texts[name]).step(0)[0]
    a, b = ([f"lm.layers.{i}.self_attn.q_proj.lora_{part}" for i in range(2)] for part in "ab")
    found = aia_gradients(m, batch)[1]
    assert all(found[key].abs().max() > 0 for key in b) and all((found[key] == 0).all() for key in a)
    with torch.no_grad():
        for key in b:
            m.get_parameter(key).normal_()
    found = aia_gradients(m, batch)[1]
    assert all(found[key].abs().max() > 0 for key in a + b)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
# (processes, model, how they share the weights, processes that hold one copy, LoRA); Janus-Pro has modules of one task
LAYOUTS = [(4, "tiny-janus", "ddp", 0, 0), (4, "tiny-janus", "fsdp", 0, 0), (4, "tiny-janus", "hsdp", 2, 0),
           (2, "tiny-janus", "ddp", 0, 0), (2, "tiny-janus", "fsdp", 0, 0), (2, "tiny-emu3", "fsdp", 0, 0),
           (2, "tiny-janus", "fsdp", 0, 4), (2, "tiny-emu3", "ddp", 0, 4), (2, "tiny-unifork", "fsdp", 0, 0),
           (2, "tiny-unifork", "ddp", 0, 0), (4, "tiny-mixed-codes", "fsdp", 0, 0),
           (2, "tiny-mixed-janus", "ddp", 0, 0), (2, "tiny-mixed-fork", "fsdp", 0, 0)]


def gathered(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def shared_out(name, config, node=None):
    """A small model as one of several processes trains it: itself, what is called, its optimizer."""
    torch.manual_seed(0)
    small = replace(SMALL[name], embed_std=0.1, lora_rank=config.lora_rank)     # gradients of order 1
    m = model.from_config(replace(small, checkpoint_activations=config.checkpoint_activations)).train()
    frozen = ("vq", "vision") if config.dtype == "bfloat16" else ("vq",)
    net, phase = m, train.Phase("joint", 20, 7, 1e-4, 1, frozen)
    train.freeze(m, phase)
    if processes() > 1 and config.parallel != "ddp":
        train.shard_model(m, config, phase.frozen, "cpu", node)
    elif processes() > 1:
        net = train.replicated(m)
    return m, net, train.make_optimizer(m, phase)


def twenty_steps(m, net, optimizer, text, ratio=(1, 1)):
    """Losses and AIA of ten steps of 7 samples and ten of one task each, the gradients of the first, and the weights
    at the end; all whole."""
    def plan(mix):
        return data.Schedule(data.WorldSource(World(0), 16, 0), data.Preparer(m, text), 0, 7, ratio, 2, 0.3,
                             rank=rank(), processes=processes(), mix=mix)
    both, drawn, losses, first = plan("both"), plan("drawn"), [], None
    targets = targets_of(m)
    for step in range(20):
        sums = train.accumulate(net, (both if step < 10 else drawn).step(step), targets, {"gen": 20.0, "und": 30.0})
        metrics = train.metrics_of(sums)
        losses.append([metrics.get(task, {}).get(key) or 0.0 for task in aia.TASKS for key in ("ntp", "aia")])
        first = first or {name: gathered(p.grad) for name, p in m.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses), first, {name: gathered(p) for name, p in m.named_parameters()}


def one_of_several(rank, world, files, folder):
    """A process of torchrun, for all layouts of `world` processes. Four leave a checkpoint, which two read."""
    faulthandler.enable()                           # an abort says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    for n, name, parallel, node, lora in LAYOUTS:
        if n == world:
            config = train.TrainConfig(parallel=parallel, lora_rank=lora,
                                       checkpoint_activations=name == "tiny-emu3")
            m, net, optimizer = shared_out(name, config, node)
            text = Text(Path(files[name]), model.PRESETS[name].kind)
            found = twenty_steps(m, net, optimizer, text, MIXED.get(name, (1, 1)))
            if rank == 0:
                torch.save(found, f"{folder}/{world}-{name}-{parallel}-{lora}.pt")
        if (n, world, name, parallel) == (4, 4, "tiny-janus", "fsdp"):
            save_checkpoint(tensors_of(m, optimizer), {"config": vars(m.config), "dtype": "float32"},
                            Path(folder) / "four", group=dist.new_group(backend="gloo")).result()
    if world == 2:
        half = train.TrainConfig(parallel="fsdp", dtype="bfloat16")
        m, net, optimizer = shared_out("tiny-janus", half)
        text = Text(Path(files["tiny-janus"]), "janus")
        found = twenty_steps(m, net, optimizer, text)
        batch, _ = data.Schedule(data.WorldSource(World(0), 16, 0), data.Preparer(m, text), 0, 8, (1, 1), 4,
                                 rank=rank, processes=2).step(0)
        train.accumulate(net, [batch], TARGETS, OFF)
        once = {name: gathered(p.grad) for name, p in m.lm.layers.named_parameters()}

        def shard(m):
            train.shard_model(m, train.TrainConfig(parallel="fsdp"), {"vq", "vision"}, "cpu")
        opened = formats.weights.load(Path(folder) / "public", torch.float32, shard=shard)
        mine = {name: p.to_local().numel() / p.numel() for name, p in opened.named_parameters()
                if isinstance(p, DTensor)}
        opened = {name: gathered(x) for name, x in opened.state_dict().items()}
        if rank == 0:
            torch.save((found, opened, mine, once), f"{folder}/more.pth")
        place, (m, _, optimizer) = Path(folder) / "four", shared_out("tiny-janus", train.TrainConfig(parallel="fsdp"))
        tensors = tensors_of(m, optimizer, tensor_names(place))
        read_tensors(tensors, place)
        tensors = {name: gathered(tensor) for name, tensor in tensors_of(m, optimizer).items()}
        if rank == 0:
            torch.save(tensors, f"{folder}/two.pth")
    dist.barrier()
    # DistributedDataParallel keeps its group alive. Where a thread of gloo lets go of a tensor while the interpreter
    # shuts down, the process is aborted (github.com/pytorch/pytorch/pull/179291): there is no shutdown here.
    os._exit(0)


def public(texts):
    m = fresh("tiny-janus")
    m.tokenizer_file = texts["tiny-janus"].file
    return m


@pytest.fixture(scope="module")
def layouts(texts, tmp_path_factory):
    """The folder in which several processes have left what 20 steps give; both workers of pytest -n 2 share one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    try:
        folder.mkdir()
    except FileExistsError:                         # the other worker is at it
        for _ in range(3000):
            time.sleep(0.1)
            if (folder / "done").exists():
                return folder
        raise
    files = {name: str(text.file) for name, text in texts.items()}
    formats.weights.save(public(texts), folder / "public")
    for world in (4, 2):
        torch.multiprocessing.spawn(one_of_several, (world, files, str(folder)), nprocs=world)
    (folder / "done").touch()
    return folder


@pytest.mark.parametrize("world, name, parallel, node, lora", LAYOUTS)
def test_results_do_not_depend_on_the_layout(world, name, parallel, node, lora, layouts, texts):
    """One process, or two, or four, however they share the weights: 7 samples a step leave some of four processes
    without one, and a module of one task is used in half of the passes. Ranks that part company would give wrong
    gradients without any error."""
    m, *rest = shared_out(name, train.TrainConfig(lora_rank=lora))
    moving, start = "lm.layers.0.self_attn.o_proj.lora_b" if lora else "lm.norm.weight", copy.deepcopy(m.state_dict())
    losses, first, last = twenty_steps(m, *rest, texts[name], MIXED.get(name, (1, 1)))
    losses_here, first_here, last_here = torch.load(layouts / f"{world}-{name}-{parallel}-{lora}.pt")
    same_gradients(first_here, first, 1e-5)
    torch.testing.assert_close(losses_here, losses, rtol=1e-4, atol=0)
    assert (start[moving] - last[moving]).abs().max() > 1e-3 and (losses[10:, [0, 2]] == 0).any(0).all()
    for key, weight in last.items():
        if key.endswith("qkv.bias"):                # the true gradient of key biases is zero: AdamW steps on rounding
            last_here[key][32:64] = weight[32:64]
        assert (last_here[key] - weight).norm() <= 0.01 * (weight - start[key]).norm(), key


def test_a_checkpoint_of_four_processes_is_read_by_two_and_by_one(layouts):
    """Shards are cut anew on reading, moments of the optimizer too: not a bit changes."""
    two, last = torch.load(layouts / "two.pth"), torch.load(layouts / "4-tiny-janus-fsdp-0.pt")[2]
    assert {name.split(".")[1] for name in two if name.startswith("optimizer")} == {"exp_avg", "exp_avg_sq", "step"}
    assert two.keys() == tensor_names(layouts / "four")
    one = from_manifest(read_manifest(layouts / "four"), layouts / "four", {}).state_dict()
    for name, weight in last.items():
        assert torch.equal(two[f"model.{name}"], weight) and torch.equal(one[name], weight), name
    name = "optimizer.exp_avg.lm.norm.weight"
    file, = (layouts / "four").glob("shard-00001-*")
    part = load_file(file)[name]                    # a quarter
    assert part.abs().max() > 0 and torch.equal(two[name].chunk(4)[0], part)
    assert two["optimizer.step.lm.norm.weight"] == 20 > two["optimizer.step.gen_embed.weight"] >= 10


def test_public_weights_are_read_by_several_processes_each_its_part(layouts, texts):
    """The model is built without memory, then each tensor read, cut and let go: nobody ever holds a whole model."""
    _, opened, mine, _ = torch.load(layouts / "more.pth")
    assert equal(opened, public(texts).state_dict())
    assert {name.split(".")[0] for name in mine} == {"lm", "lm_head", "aligner", "gen_embed", "gen_aligner", "gen_head"}
    assert all(share == 0.5 for share in mine.values())


def test_sharded_bfloat16_keeps_float32_weights(layouts):
    """Layers compute in half precision; weights, the sums of gradients over processes and AdamW stay exact: the mean of
    two gradients that are bfloat16 has a digit more, and a sum of passes too."""
    (losses, first, last), _, _, once = torch.load(layouts / "more.pth")
    exact, first_exact, _ = torch.load(layouts / "2-tiny-janus-fsdp-0.pt")
    assert all(x.dtype == torch.float32 for x in [*first.values(), *last.values()])
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=0.02, atol=2e-3)
    for name in once:
        key = f"lm.layers.{name}"
        for x in (once[name], first[key], last[key]):
            assert (x - x.bfloat16().float()).abs().max() > 0, name             # not rounded
        assert (first[key] - first_exact[key]).norm() < 0.1 * first_exact[key].norm(), name


def test_pure_bfloat16_holds_everything_in_half(tmp_path, unscored):
    """As the released code trains: weights, moments and checkpoint in bfloat16, but for the picture tokenizer."""
    run = train.train(settings(tmp_path, "tiny-janus", pure_bf16=True, steps=2))
    tensors = {name: x for name, x in stored(newest_checkpoint(tmp_path)[0]).items() if x.is_floating_point()}
    assert {name.split(".")[0] == "vq": x.dtype for name, x in tensors.items()} == {True: torch.float32,
                                                                                    False: torch.bfloat16}
    assert formats.weights.load(tmp_path).lm.norm.weight.dtype == run.m.lm.norm.weight.dtype == torch.bfloat16


def test_recipes_are_settings_that_flags_replace(tmp_path, capsys, monkeypatch):
    """--recipe names what is known of the paper's training; any flag beside it still counts."""
    given = []
    monkeypatch.setattr(train, "train", lambda config, phases: given.append(config))
    command("--recipe", "janus-post", "--init", "x")
    command("--recipe", "emu3-sft", "--init", "x", "--micro-batch", 2, "--steps", 7)
    janus, emu3 = given
    assert (janus.preset, janus.parallel, janus.mix, janus.pure_bf16) == ("janus-pro-7b", "hsdp", "drawn", True)
    assert (emu3.preset, train.plan(emu3)[0].clip, emu3.micro_batch) == ("emu3-8b", 5.0, 2)
    (tune,), (short,) = train.plan(janus), train.plan(emu3)
    assert (tune.lr, tune.eps, tune.weight_decay, tune.frozen) == (2e-5, 1e-6, 0.05, ("vq", "vision"))
    assert train.learning_rate(tune.steps, tune) == pytest.approx(1e-6) and tune.warmup == 1172
    assert (short.steps, short.weight_decay) == (7, 0.1) and train.learning_rate(7, short) == pytest.approx(1e-6)
    monkeypatch.undo()
    assert "needs --init" in refused(capsys, "--recipe", "emu3-sft", "--out", tmp_path / "run")


def test_held_out_losses_come_every_so_often(own, tmp_path, unscored, capsys):
    """On the same records each time and without touching the training: what is learnt by heart shows."""
    flags = {"data": (str(own),), "val": str(own), "log_every": 5}
    train.train(settings(tmp_path / "watched", **flags, val_every=4))
    train.train(settings(tmp_path / "alone", data=(str(own),), log_every=5))
    log = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").read_text().splitlines()]
    rows = [entry for entry in log if "val" in entry]
    assert [entry["step"] for entry in rows] == [4, 8] * 2 and all(entry["val"]["und"]["ntp"] > 0 for entry in rows)
    assert [json.loads(line).get("grad_norm") for line in (tmp_path / "alone/metrics.jsonl").read_text().splitlines()] \
        == [entry["grad_norm"] for entry in log if "val" not in entry]
    assert re.search(r"first loss gen \d.* \(chance: 6.3", capsys.readouterr().out)


@both_models
def test_no_prompt_of_held_out_records_is_dropped(name, texts, monkeypatch):
    """Losses are those of whole samples, the same each time: 32 of each sort where there are so many."""
    monkeypatch.setattr(data, "DROP", dict.fromkeys(data.DROP, 1.0))
    config = train.TrainConfig(preset=name, micro_batch=16)
    run = SimpleNamespace(val=data.WorldSource(World(0), 40, 0), config=config, bad=[],
                          preparer=data.Preparer(fresh(name), texts[name]))
    batches = train.held_batches(run)
    assert [(batch.task, len(batch.tokens)) for batch in batches] == [(task, 16) for task in RECORD_TASKS for _ in "12"]
    assert all(batch.aia_valid.all() for batch in batches[:4])
    assert all((batch.labels[1] != -100).any(1).all() for batch in batches[4:])         # dropped: codes only


def test_a_bad_held_out_record_is_told_at_the_start(own, tmp_path, unscored):
    """Not at the end of a long run; and the remedy that is printed may be added to --resume."""
    bad = own.with_name("bad.jsonl")
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    lines[1]["conversations"][0]["value"] += " very long" * 2000
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"data": (str(own),), "val": str(bad), "steps": 2}
    with pytest.raises(InputError, match="bad.jsonl:2: .*--on-bad-record skip"):
        train.train(settings(tmp_path / "run", **flags))
    run = train.train(settings(tmp_path / "run", **flags, resume=True, on_bad_record="skip"))
    assert len(run.bad) == 1 and "bad.jsonl:2" in run.bad[0]


def test_a_signal_in_the_last_moment_stops_too(tmp_path, unscored, monkeypatch):
    """The evaluation that follows may take longer than a job has left."""
    save = train.Run.save

    def signalled(run, phase, *rest):
        save(run, phase, *rest)
        if phase == len(run.phases):
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train.Run, "save", signalled)
    with pytest.raises(train.Stop):
        train.train(settings(tmp_path, steps=1))
    assert checkpoint_folders(tmp_path)[-1].name == "4-0000000"


def torchrun(*flags):
    """Two processes of train.py on a small plan, as a user starts them."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
             "--steps", "6", "--pool", "16", "--batch-size", "8", "--eval-n", "1", "--calibration", "1",
             "--save-every", "2", "--log-every", "1", *flags]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(process):
    """Numbers of the processes that it has started."""
    return [*map(int, subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split())]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_killed_at_any_moment_lose_nothing(kills, tmp_path):
    """kill -9 of either process, while training or saving, then the same command: the same log and weights as if
    nothing had happened."""
    rng, folder, log = random.Random(kills), tmp_path / "killed", tmp_path / "killed/metrics.jsonl"
    flags = ("--parallel", "fsdp", "--out", str(folder), "--resume")
    for lines in range(2, 20, 18 // kills) if kills < 18 else sorted(rng.choices(range(20), k=kills)):
        with torchrun(*flags) as process:
            while process.poll() is None and (len(ranks := children(process)) < 2 or not log.exists()
                                              or log.read_text().count("\n") < lines):
                time.sleep(0.05)
            time.sleep(rng.random())
            assert process.poll() is None and len(ranks) == 2, process.communicate()[0]
            os.kill(rng.choice(ranks), signal.SIGKILL)
            process.communicate(timeout=60)
        assert process.returncode not in (0, None)
    for words in (flags, ("--parallel", "fsdp", "--out", str(tmp_path / "whole"))):
        with torchrun(*words) as process:
            out = process.communicate(timeout=200)[0]
        assert process.returncode == 0 and result_of(out)["val_ntp_gen"] > 0, out
    same_run(folder, tmp_path / "whole")


def test_with_ddp_one_process_writes_and_all_read(tmp_path):
    """Every process holds the whole model: one file a checkpoint, its checksum taken while it was written; the other
    process waits for "before", from which the second arm begins."""
    with torchrun("--out", str(tmp_path / "run"), "--arms", "both") as process:
        out = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and result_of(out)["val_ntp_gen"] > 0, out
    places = [*checkpoint_folders(tmp_path / "run"), tmp_path / "run/before", tmp_path / "run/control"]
    for place in places:
        assert len(read_manifest(place)["files"]) == 1
        assert {file.name for file in place.iterdir()} == {*read_manifest(place)["files"], "manifest.json"}
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("*.sum")] and len(places) == 4


@pytest.mark.slow
def test_lora_on_public_weights_begins_the_same_for_every_layout(texts, tmp_path, unscored):
    """Their files know nothing of LoRA: each process makes the same additions and keeps its part. Sharding takes a
    frozen base in bfloat16 beside additions in float32, and a checkpoint of two processes is continued by one."""
    m = fresh("tiny-emu3")
    m.tokenizer_file = shutil.copy(texts["tiny-emu3"].file, tmp_path / "tokenizer.json")
    formats.weights.save(m, tmp_path / "public")
    given = {"init": str(tmp_path / "public"), "lora_rank": 4, "dtype": "bfloat16", "lr": 1e-2}
    flags = [str(word) for key, value in given.items() for word in ("--" + key.replace("_", "-"), value)]
    with torchrun(*flags, "--parallel", "fsdp", "--out", str(tmp_path / "two")) as process:
        out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    one = train.train(settings(tmp_path / "one", steps=6, batch_size=8, **given))
    starts = [formats.weights.load(tmp_path / name / "before").state_dict() for name in ("one", "two")]
    assert equal(*starts)
    a, b = (formats.weights.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert {name for name in a if not torch.equal(a[name], starts[0][name])} == {name for name in a if "lora_" in name}
    for name in a:                                  # sums in another order, rounded to bfloat16
        assert a[name].dtype == b[name].dtype and (a[name] - b[name]).float().norm() <= 0.1 * a[name].float().norm()
    again = shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(again / "checkpoints/1-0000000")
    assert train.train(settings(again, steps=6, batch_size=8, eval_n=1, resume=True, **given)).m.config == one.m.config
