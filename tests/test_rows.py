"""Claims about the rows of the study (lab/rows.py)."""

from dataclasses import replace

import pytest

import train
from lab.rows import OFF, ROWS, needs
from parts.world import world_of


def test_every_row_of_the_study_is_a_run():
    """Its flags are settings, it begins from a row, and both arms of a comparison begin from the same weights."""
    for name, row in ROWS.items():
        config = train.TrainConfig(**row.flags | ({"aia_targets": ""} if "aia_targets" in row.flags else {}))
        train.plan(replace(config, init="folder" if row.start else ""))
        world_of({"seed": 0, "shapes": config.shapes, "colours": config.colours, "objects": config.objects})
        assert {*needs(name), row.baseline} - {""} <= {*ROWS}
        if name.endswith("+aia"):
            start, plain = row.start or name, ROWS[row.baseline]
            assert row.baseline == name.removesuffix("+aia") and start in (plain.start, f"{row.baseline}/before")
            assert row.flags | OFF == plain.flags
    assert needs("tuned+aia") == ["janus"]
    assert needs("experts-curves") == ["expert-gen", "expert-und", "aia"]


def test_early_rows_differ_in_aia_alone():
    """They begin where the unified model of their seed has learned to answer, with its steps and samples; lambda is
    that of its final weights."""
    rows = {name: ROWS[name] for name in ROWS if name.startswith("early")}
    *_, joint, tune = ROWS["narrow"].phases
    assert len(rows) == 8 and ROWS["narrow"].phases[1].end == "answered"
    for name, row in rows.items():
        found = [replace(phase, aia=plain.aia, fade=(), start=plain.start)
                 for phase, plain in zip(row.phases, (joint, tune), strict=True)]
        assert found == [joint, tune] and all(phase.aia for phase in row.phases)
        assert (row.start, row.baseline) == ("narrow/answered", "narrow")
        assert {*row.flags} - {*ROWS["narrow"].flags} <= {"aia_variant", "fork_layer"}
        assert (row.lambdas == "narrow") == (name != "early-fork") == ("aia_weight" not in row.flags)
        assert bool(row.phases[0].fade) == name.endswith("fading")
    assert needs("early-experts") == ["narrow-gen", "narrow-und", "narrow"] and needs("early-exchanged") == ["narrow"]


def test_what_fades_is_gone_at_the_end_of_tuning():
    """From the last third of both phases together on, without a step at their border."""
    first, second = ROWS["early-fading"].phases
    shares = [train.lambdas_at(step, phase, {"gen": 1.0})["gen"] for phase in (first, second)
              for step in range(phase.steps)]
    n = len(shares)
    assert shares.index(next(share for share in shares if share < 1)) == pytest.approx(n * 2 / 3, abs=2)
    falls = [a - b for a, b in zip(shares, shares[1:], strict=False) if a < 1]
    assert max(falls) == pytest.approx(min(falls)) and shares[-1] == pytest.approx(falls[0])
