"""Claims about means and ranges of runs (lab/summary.py)."""

import json

import pytest

from lab.summary import main
from parts.settings import InputError, write_json


def made_up_run(folder, preset, seed, und):
    """A finished run with a score and a curve."""
    folder.mkdir()
    curve = {"target": [0.5, 0.5], "after": {"intensity": [0.5 + und / 10, 0.5]}, "before": None}
    write_json({"und": und, "gen": None, "preset": preset, "seed": seed, "seconds": 60 + seed,
                "machine": {"cores": 2}}, folder / "result.json")
    write_json({"weights": "checksum", "und_by_topic": {"count": und / 2}, "story": [und, 1.0]}, folder / "scores.json")
    write_json({"gen": curve, "und": curve}, folder / "curves.json")
    write_json({"preset": preset, "seed": seed, "steps": 0}, folder / "settings.json")
    return str(folder)


def test_runs_are_put_together_by_preset(tmp_path, capsys):
    """Mean and range of all numbers, nested ones too; what is no number, or no measurement, is left out."""
    runs = [made_up_run(tmp_path / f"{preset}{seed}", preset, seed, und) for preset, seed, und in (
        ("tiny-emu3", 0, 0.8), ("tiny-emu3", 3, 0.9), ("tiny-janus", 0, 0.5))]
    main([*runs, "--out", str(tmp_path / "laptop.json")])
    content = json.loads((tmp_path / "laptop.json").read_text())
    row = content["runs"]["tiny-emu3"]
    assert (row["seeds"], row["n"], content["machines"]) == ([0, 3], 2, [{"cores": 2}])
    assert row["und"] == pytest.approx({"mean": 0.85, "low": 0.8, "high": 0.9})
    assert row["und_by_topic"]["count"]["mean"] == pytest.approx(0.425)
    assert row["story"]["0"]["high"] == 0.9 and row["distance"]["gen"]["after"]["low"] == pytest.approx(0.04)
    assert {"seed", "gen", "machine", "weights", "preset"}.isdisjoint(row)
    assert "tiny-janus, seeds 0: und 0.50 (0.50 to 0.50)" in capsys.readouterr().out


def test_a_seed_counts_once_and_runs_are_finished(tmp_path):
    """A copy would count twice, and a run under way has no scores."""
    runs = [made_up_run(tmp_path / name, "tiny-emu3", 0, 0.8) for name in ("one", "copy")]
    with pytest.raises(InputError, match=f"^{runs[1]} is a second run of tiny-emu3 with seed 0"):
        main([*runs, "--out", str(tmp_path / "laptop.json")])
    with pytest.raises(InputError, match="no result.json: give the folder of a finished run"):
        main([str(tmp_path)])
    with pytest.raises(InputError, match="summary needs run folders"):
        main([])
    write_json({}, tmp_path / "one/result.json")
    with pytest.raises(InputError, match="one: result.json, .* is damaged .*train it again"):
        main([runs[0]])


def test_runs_of_other_settings_and_odd_numbers_are_refused(tmp_path):
    """Two steps beside two thousand are no mean over seeds; and nothing is written that was not understood."""
    out = tmp_path / "laptop.json"
    runs = [made_up_run(tmp_path / str(seed), "tiny-emu3", seed, 0.8) for seed in (0, 1)]
    write_json({"preset": "tiny-emu3", "seed": 1, "steps": 2}, tmp_path / "1/settings.json")
    with pytest.raises(InputError, match=f"^{runs[1]} differs from the runs before it in --steps"):
        main([*runs, "--out", str(out)])
    result = json.loads((tmp_path / "0/result.json").read_text())
    write_json(result | {"und": [0.8, 0.9]}, tmp_path / "0/result.json")
    curves = json.loads((tmp_path / "0/curves.json").read_text())
    with pytest.raises(InputError, match="is damaged"):
        main([runs[0], "--out", str(out)])
    curves["gen"]["after"]["intensity"] = []
    write_json(curves, tmp_path / "0/curves.json")
    with pytest.raises(InputError, match="is damaged"):
        main([runs[0], "--out", str(out)])
    assert not out.exists()
