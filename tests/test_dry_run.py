"""Claims about the dry run of a cluster that is not there (lab/dry_run.py)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_runs import command, refused

import aia
import data
import lab.speed
import model
import train
from lab.dry_run import DRY, DryRun, rehearse
from lab.speed import resident
from parts.settings import InputError

# Its sizes can be cut into 16 parts without rest.
PREDICTED = replace(model.TINY_EMU3, layers=2, width=256, ffn=704, heads=4, kv_heads=2, head_dim=64, vocab=2048,
                    context=4096)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """What a dry run of four processes stores: result, {(attention, recompute): row}."""
    file = tmp_path_factory.mktemp("predicted") / "four.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny-emu3", PREDICTED)
        command("--world", 4, "--tokens", 1024, "--out", file, main=lab.dry_run.main)
    stored = json.loads(file.read_text())
    return stored["result"], {(row["attention"], row["recompute"]): row for row in stored["rows"]}


def rehearsed(world, attention, recompute, **changes):
    """One row of a dry run."""
    dist.init_process_group("fake", rank=0, world_size=world)
    try:
        return rehearse(DryRun(**DRY | changes), attention, recompute)
    finally:
        dist.destroy_process_group()


def sizes_of(c):
    """Weights of one layer, of the loss head, and of all layers with embedding, head and last norm."""
    layer = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.width * c.ffn
    return layer, c.width * c.vocab, c.layers * (layer + 2 * c.width) + 2 * c.width * c.vocab + c.width


def test_a_dry_run_counts_every_parameter(predicted):
    """A process holds its part of weights, gradients and moments, in float32; the picture tokenizer, which stands
    still, is whole everywhere."""
    result, rows = predicted
    with torch.device("meta"):
        numel, moving = sum(p.numel() for p in model.from_config(PREDICTED).parameters()), sizes_of(PREDICTED)[2]
    for row in rows.values():
        assert result["parameters"] == row["all"] == numel and row["moving"] == moving
        assert row["parameters"] == row["gradients"] == moving and row["optimizer"] == 2 * moving       # 4 bytes / 4
        assert row["frozen"] >= 4 * (numel - moving)
        assert row["peak"] > row["activations"] + row["parameters"] + row["optimizer"] + row["frozen"]


def test_a_dry_run_needs_no_weights():
    """It is for models that nobody has downloaded yet."""
    train.check_numbers(DryRun(preset="emu3-8b", world=64))
    with pytest.raises(InputError, match="needs --init"):
        train.plan(train.TrainConfig(preset="emu3-8b"))


def test_more_processes_hold_less_each(predicted, monkeypatch):
    """Sixteen hold a quarter of what four hold, but need as much for activations."""
    monkeypatch.setitem(model.PRESETS, "tiny-emu3", PREDICTED)
    four, sixteen = predicted[1]["fused", True], rehearsed(16, "fused", True, tokens=1024)
    for kind in ("parameters", "gradients", "optimizer"):
        assert four[kind] == 4 * sixteen[kind]
    assert four["frozen"] == sixteen["frozen"] and four["flop"] == sixteen["flop"] and four["peak"] > sixteen["peak"]
    assert sixteen["activations"] == pytest.approx(four["activations"], rel=0.05)


def test_a_dry_run_sends_what_the_formula_of_fsdp_says(predicted):
    """bfloat16 weights come twice, those of the root once (it stays whole); float32 gradients leave once; in a ring of
    four, three quarters of everything are others'."""
    layer, head, everything = sizes_of(PREDICTED)
    expected = {"all-gather": 0.75 * 2 * (2 * everything - 2 * head - PREDICTED.width),
                "reduce-scatter": 0.75 * 4 * everything}
    for row in predicted[1].values():
        assert {name: row["sent"][name] for name in expected} == expected and row["sent"]["all-reduce"] < 1000
    assert predicted[0]["comm_gib"] == pytest.approx(sum(expected.values()) / 2**30, rel=1e-3)


def test_a_dry_run_counts_the_products_of_matrices(predicted):
    """Forward and two backward; once more the scores of the kernel's backward pass, and each layer but its last product
    where layers are recomputed. The kernel skips half of the scores."""
    (result, rows), c, tokens = predicted, PREDICTED, 1024
    layer, head, _ = (2 * tokens * n for n in sizes_of(c))
    attention = 2 * c.heads * (c.head_dim + 8) * tokens**2                      # of a layer: half of Q K^T and of A V
    expected = {False: c.layers * (3 * layer + 3.5 * attention) + 3 * head}
    expected[True] = expected[False] + c.layers * (layer - 2 * tokens * c.width * c.ffn + attention)
    for recompute, flop in expected.items():
        assert rows["fused", recompute]["flop"] == pytest.approx(flop, rel=2e-3)
    assert result["pflop"] == pytest.approx(4 * expected[True] / 1e15, rel=2e-3)
    assert result["days"] == pytest.approx(12e6 / 4 * expected[True] / (989e12 * 0.4) / 86_400, rel=2e-3)


def test_a_dry_run_knows_what_costs_memory(predicted):
    """Maps cost more than none, layers that are kept more than those that are recomputed."""
    needs = {way: row["activations"] for way, row in predicted[1].items()}
    for way in (True, False):
        assert needs["explicit", way] > 1.3 * needs["fused", way]
    for way in ("fused", "explicit"):
        assert needs[way, False] > 1.3 * needs[way, True]
    assert predicted[0]["peak_gib_explicit"] > predicted[0]["peak_gib"] == predicted[1]["fused", True]["peak"] / 2**30


WAYS = (("fused", False, 3072), ("explicit", True, 2048))                       # attention, recompute, tokens


def peaks():
    """Runs in a process of its own: GB that steps of real numbers take above weights and moments."""
    for attention, recompute, tokens in WAYS:
        m = model.from_config(replace(PREDICTED, attention=attention, checkpoint_activations=recompute)).train()
        train.freeze(m, train.TUNE)
        optimizer, targets = train.make_optimizer(m, train.TUNE), {"gen": aia.targets(PREDICTED.layers, "gen")}
        for length in (16, tokens):                 # the first makes the moments
            condition = torch.arange(length)[None] < length // 3
            batch = data.Batch("gen", condition.long(), condition.long(), condition, ~condition, torch.ones(1).bool())
            Path("/proc/self/clear_refs").write_text("5")                       # the peak is now
            before = resident("VmRSS")
            train.accumulate(m, [batch], targets, {"gen": 1.0})
            torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield resident("VmHWM") - before


def test_a_dry_run_predicts_what_is_measured(monkeypatch):
    """The same accounting against the memory of real steps, in float32 on a CPU: within a tenth."""
    monkeypatch.setitem(model.PRESETS, "tiny-emu3", PREDICTED)
    script = f"sys.path.append({str(Path(__file__).parent)!r}); import test_dry_run; "
    measured = lab.speed.fresh(f"{script}print(*test_dry_run.peaks())", 1)
    for (attention, recompute, tokens), gb in zip(WAYS, measured, strict=True):
        row = rehearsed(1, attention, recompute, tokens=tokens, dtype="float32")
        above = (row["peak"] - row["parameters"] - row["optimizer"] - row["frozen"]) / 1e9
        assert gb > 0.1 and above == pytest.approx(gb, rel=0.1), (attention, above, gb)


def test_one_process_keeps_its_weights_as_they_are(monkeypatch):
    """As in training it shares nothing: no layer is gathered; what layers keep is half as wide in bfloat16."""
    monkeypatch.setitem(model.PRESETS, "tiny-emu3", PREDICTED)
    monkeypatch.setattr(train, "shard_model", lambda *args: pytest.fail("one process was sharded"))
    wide, half = (rehearsed(1, "fused", True, tokens=1024, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert wide["parameters"] == half["parameters"] and half["activations"] < 0.75 * wide["activations"]


@pytest.mark.parametrize("words, message", [
    (["--data", "x.jsonl"], "leave out --data"), (["--init", "x"], "leave out --init"),
    (["--image-size", 512], "leave out --image-size"), (["--attention", "lse"], "leave out --attention, as it tries"),
    (["--parallel", "ddp"], "leave out --parallel ddp"), (["--tokens", 9000], "tiny-emu3 takes 3 to 256"),
    (["--parallel", "hsdp", "--node", 3], "--node 3 does not divide 4"), (["--tflops", 0], "--tflops 0")])
def test_a_dry_run_refuses_what_it_cannot_predict(words, message, capsys):
    """One line, and no process group is left behind."""
    assert message in refused(capsys, "--world", 4, *words, main=lab.dry_run.main) and not dist.is_initialized()


def test_a_dry_run_of_janus_pro_on_two_nodes():
    """hsdp also sums gradients over copies: in a ring of two each sends its whole part. Modules that a task does not
    use have no gradient; a second micro-batch is summed as the first is."""
    given = {"preset": "tiny-janus", "parallel": "hsdp", "node": 2, "tokens": 256}
    once, row = (rehearsed(4, "fused", True, **given, **more) for more in ({}, {"batch_size": 8}))
    assert row["samples"] == 8 and 0 < row["gradients"] < row["parameters"]
    assert once["sent"]["all-reduce"] == pytest.approx(row["gradients"], rel=0.01)
    assert row["flop"] == 2 * once["flop"] and row["peak"] >= once["peak"]
    assert row["sent"]["reduce-scatter"] == 2 * once["sent"]["reduce-scatter"]
