"""Claims about measurements on a GPU: they run, say what went wrong, and go on where they stopped (lab/gpu.py)."""

import json

import pytest
import torch

import model
from lab.gpu import NO_TIME, PARTS, Gpu, Meter, filled, measure_parts, tried
from parts.settings import InputError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Everything, on tiny models."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    result = measure_parts(Gpu(out=str(out), tiny=True))
    content = json.loads(out.read_text())
    assert result["complete"] == list(PARTS) and result["rows"] == len(content["rows"])
    return out, content


def of(content, part, **wanted):
    return [row for row in content["rows"] if row["part"] == part and all(row[key] == x for key, x in wanted.items())]


def test_every_part_runs_to_its_end(rows):
    """Each row says on what it was measured; none failed; times are above zero."""
    _, content = rows
    assert {row["part"] for row in content["rows"]} == {*PARTS}
    assert all({"date", "gpu", "torch"} <= row.keys() and "failed" not in row for row in content["rows"])
    assert content["machine"]["torch"] == torch.__version__ and content["tiny"]
    for part, times in {"attention": ("forward_ms", "both_ms"), "small": ("seconds",), "large": ("seconds",)}.items():
        assert all(row[name] > 0 for row in of(content, part) for name in times)


def test_parity_is_asked_of_every_body_in_both_precisions(rows):
    """On a CPU float32 agrees to 1e-5 and bfloat16 to a hundredth; codes are those of the CPU."""
    _, content = rows
    found = [row for row in of(content, "parity") if "attention" in row]
    assert {row["attention"] for row in found} == {"explicit", "fused", "lse"} and len(found) == 9
    for row in found:
        close = 1e-5 if row["dtype"] == "torch.float32" else 1e-2
        assert max(row[name] for name in ("out", "mass", "dq", "dk", "dv")) < close
    assert [row["codes_changed"] for row in of(content, "parity") if "latents" in row] == [0.0, 0.0]


def test_plain_steps_and_both_ways_of_aia_are_measured_at_equal_sizes(rows):
    """A ratio needs the same samples, tokens and task on both of its sides."""
    _, content = rows
    for part in ("small", "large"):
        def sizes(variant, part=part):
            return {tuple(row[key] for key in ("preset", "manner", "samples", "tokens", "task", "recompute"))
                    for row in of(content, part, variant=variant, compiled=False)}
        assert sizes("plain") <= sizes("aia") and sizes("lse") <= sizes("aia") and sizes("released") <= sizes("aia")
        assert len(sizes("plain")) > 1


def test_memory_is_set_beside_our_own_prediction(rows):
    """For each step with AIA that was neither compiled nor under autocast."""
    _, content = rows
    measured = [row for part in ("small", "large") for row in of(content, part, variant="aia", compiled=False)
                if row["manner"] != "autocast"]
    assert len(of(content, "predicted")) == len(measured) > 4
    assert all(row["predicted_gb"] > 0 for row in of(content, "predicted"))


def test_a_checkpoint_is_read_back_as_it_was(rows):
    """After a further step has changed the weights and moments."""
    _, content = rows
    assert of(content, "saving")[-1]["same"]


def test_complete_parts_are_left_out_and_a_part_cut_short_is_begun_anew(rows, tmp_path, monkeypatch):
    """An error in the middle keeps the rows so far; the next run does that part from its start, and only that."""
    source, content = rows
    out, calls = tmp_path / "gpu.json", []
    content = content | {"complete": [part for part in PARTS if part != "parity"]}
    out.write_text(json.dumps(content))

    def parity(bench):
        calls.append("parity")
        yield {"number": 1}
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield {"number": 2}
    monkeypatch.setitem(PARTS, "parity", parity)
    with pytest.raises(KeyboardInterrupt):
        measure_parts(Gpu(out=str(out), tiny=True))
    now = json.loads(out.read_text())
    assert [row["number"] for row in of(now, "parity")] == [1] and "parity" not in now["complete"]
    measure_parts(Gpu(out=str(out), tiny=True))
    now = json.loads(out.read_text())
    assert [row["number"] for row in of(now, "parity")] == [1, 2] and set(now["complete"]) == {*PARTS}
    assert of(now, "small") == of(content, "small") and len(calls) == 2
    measure_parts(Gpu(out=str(out), tiny=True))
    assert len(calls) == 2
    measure_parts(Gpu(("parity",), out=str(out), tiny=True))
    assert len(calls) == 3


def test_what_cannot_be_measured_is_a_row_that_says_so():
    """Out of memory in one case is no end of a part."""
    def too_large(bench):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")
    bench = Meter(Gpu(tiny=True, device="cpu"))
    assert tried(bench, too_large) == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"}


@pytest.mark.parametrize("part", ["large", "saving"])
def test_a_part_that_ran_out_of_time_is_not_complete(part, tmp_path):
    """Its rows say so, and the next run does it again."""
    out = tmp_path / "gpu.json"
    measure_parts(Gpu((part,), out=str(out), tiny=True, seconds=0.0))
    content = json.loads(out.read_text())
    assert content["complete"] == [] and {row["failed"] for row in content["rows"]} == {NO_TIME}


@pytest.mark.parametrize("settings, message", [
    ({"tiny": False, "device": "cpu"}, "no GPU here: --tiny"),
    ({"parts": ("smal",)}, "no part smal: use some of machine"),
    ({"tiny": False, "parts": ("predicted",)}, "rows of --tiny: give another --out")])
def test_what_does_not_fit_is_refused(rows, settings, message):
    """One line with the remedy, and the file stays as it is."""
    out, _ = rows
    before = out.read_bytes()
    with pytest.raises(InputError, match=message):
        measure_parts(Gpu(**{"out": str(out), "tiny": True, "parts": ("machine",)} | settings))
    assert out.read_bytes() == before


def test_models_to_measure_have_the_types_of_training():
    """With LoRA a base in bfloat16, additions and picture tokenizer in float32; nothing is left empty."""
    m = filled("tiny-emu3", "cpu", torch.bfloat16, lora_rank=2)
    kinds = {name: p.dtype for name, p in m.named_parameters()}
    assert all(kinds[name] == model.held_type(name, torch.bfloat16) for name in kinds)
    assert all(p.isfinite().all() for p in m.parameters()) and m.lm.norm.weight.eq(1).all()
