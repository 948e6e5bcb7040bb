"""Claims about FID: the distance, resizing, networks, stored numbers, the built-in world (benchmarks/fid.py)."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_benchmarks import command, made_run, png, stored, written
from made_data import all_held_out, combination_of
from PIL import Image

import benchmarks.fid
import eval as evaluation
from benchmarks.fid import fid_distance, fid_network, fid_pixels, fid_stats
from parts.pictures import to_picture
from parts.settings import InputError
from parts.world import SKILLS, World


def test_fid_equals_the_official_packages():
    """The three worked examples, with covariances that commute, that do not, and from features."""
    assert fid_distance((0, 0), np.diag((1, 4)), (1, 2), np.diag((4, 1))) == pytest.approx(7)
    found = fid_distance((1, 2), [[2, 0.5], [0.5, 1]], (0, 1), [[1, -0.3], [-0.3, 2]])
    assert found == pytest.approx(2.575425893, abs=1e-8)
    one = fid_stats([(0, 0), (2, 0), (0, 2), (2, 2)])
    other = fid_stats(np.array([(1, 1), (3, 1), (1, 5)], np.float32))
    np.testing.assert_allclose(one[1], [[1.3333, 0], [0, 1.3333]], atol=5e-5)
    np.testing.assert_allclose(other[1], [[1.3333, -1.3333], [-1.3333, 5.3333]], atol=5e-5)
    assert other[0].dtype == other[1].dtype == np.float64
    assert fid_distance(*one, *other) == pytest.approx(3.797387792, abs=1e-8)


def test_fid_of_equal_sets_is_zero_even_when_they_are_few():
    """Three pictures of five features have a singular covariance; with one feature it is a number, not a matrix."""
    few = fid_stats(np.random.default_rng(0).normal(size=(3, 5)))
    assert fid_distance(*few, *few) == pytest.approx(0, abs=1e-6)
    assert fid_distance(0, 1, 3, 4) == pytest.approx(9 + 1 + 4 - 2 * 2)
    assert fid_stats([[1], [3]])[1].tolist() == [[2]]


def test_fid_refuses_shapes_that_do_not_match():
    """Features of different networks cannot be compared, and one picture has no covariance."""
    with pytest.raises(InputError, match="use one network"):
        fid_distance((0, 0), np.eye(2), 0, 1)
    with pytest.raises(InputError, match="two or more pictures"):
        fid_stats([[1, 2]])


def test_fid_variants_resize_differently(tmp_path):
    """A step and fine stripes: plain bilinear interpolation skips stripes, clean-fid's bicubic filter averages them,
    overshoots beside the step, is clipped to 0..255, and does not round."""
    step, stripes = np.zeros((2, 598, 598, 3), np.uint8)
    step[:, 299:] = 255
    stripes[:, ::4] = 255
    for name, array in (("step", step[297:301, 297:301]), ("stripes", stripes)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", array)
    plain, clean = (fid_pixels(tmp_path / "step.png", mode) for mode in ("pytorch", "clean"))
    assert plain.shape == clean.shape == (3, 299, 299)
    assert plain.dtype == clean.dtype == torch.float32
    assert [plain.min(), plain.max(), clean.min(), clean.max()] == pytest.approx([-1, 1, 0, 255])
    assert plain[0, 0, 149] == pytest.approx(0, abs=1e-6)
    assert (clean % 1 != 0).sum() > 1000
    assert torch.equal(clean, fid_pixels(tmp_path / "step.npy", "clean"))
    plain, clean = (fid_pixels(tmp_path / "stripes.png", mode)[0, 9, 9:11] for mode in ("pytorch", "clean"))
    assert (plain[0] - plain[1]).abs() == pytest.approx(1)
    assert (clean[0] - clean[1]).abs() < 120


@pytest.mark.parametrize("mode, n", [("pytorch", 3), ("clean", 4)])
def test_fid_compares_folders_and_stored_numbers(mode, n, tmp_path, monkeypatch, capsys):
    """A made-up network of two features gives a distance known in closed form; "clean" also searches subfolders."""
    scale, shift = (127.5, 127.5) if mode == "pytorch" else (1, 0)              # from [-1, 1] back to [0, 255]
    monkeypatch.setattr(benchmarks.fid, "fid_network", lambda *_: lambda pixels: pixels[:, :2, 0, 0] * scale + shift)
    points = np.array([(0, 0), (200, 0), (0, 200), (200, 200)])
    others = np.array([(100, 100), (101, 150)])
    for i, (red, green) in enumerate(points.tolist()):
        written(tmp_path / ("data/sub" if i == 3 else "data") / f"{i}.png", png((red, green, 7)))
    for i, (red, green) in enumerate(others.tolist()):
        written(tmp_path / f"other/{i}.png", png((red, green, 7)))
    one, other = fid_stats(points[:n]), fid_stats(others)
    found = command("fid", tmp_path, "--preds", tmp_path / "other", "--variant", mode)
    assert found["score"] == pytest.approx(fid_distance(*one, *other), rel=1e-4)
    assert found["variant"] == mode
    assert "fewer than features" in capsys.readouterr().out
    stored(tmp_path, mu=one[0], sigma=one[1])
    np.savez(tmp_path / "other.npz", features=others)
    again = command("fid", tmp_path, "--data", tmp_path / "F.npz", "--features", tmp_path / "other.npz")
    assert again["score"] == pytest.approx(found["score"], rel=1e-4)


def test_fid_asks_each_package_for_the_right_network(monkeypatch):
    """pytorch-fid's network takes pictures that are resized and scaled already; clean-fid's takes 0..255."""
    calls = []

    class InceptionV3(torch.nn.Module):
        def forward(self, pixels):
            return [pixels.mean((2, 3), keepdim=True)]

    def inception(**options):
        calls.append(options)
        return InceptionV3()

    def extractor(mode, device, **options):
        calls.append((mode, options))
        return lambda pixels: pixels.mean((2, 3))

    packages = {"pytorch_fid.inception": SimpleNamespace(InceptionV3=inception),
                "cleanfid.features": SimpleNamespace(build_feature_extractor=extractor)}
    for name, content in packages.items():
        monkeypatch.setitem(sys.modules, name.split(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, content)
    for mode in ("pytorch", "clean"):
        assert fid_network(mode, "cpu")(torch.full((2, 3, 4, 4), 9.0)).tolist() == [[9.0] * 3] * 2
    assert calls == [{"resize_input": False, "normalize_input": False}, ("clean", {"use_dataparallel": False})]


def test_fid_of_the_world_uses_the_runs_own_tokenizer(tmp_path, monkeypatch):
    """Drawings of an untrained model are far from held-out scenes, and the same seed gives the same number."""
    run, compared, drawn = made_run("emu3", tmp_path / "run"), [], []
    features, draw = benchmarks.fid.tokenizer_features, evaluation.draw
    monkeypatch.setattr(benchmarks.fid, "tokenizer_features", lambda m, pixels: compared.append(pixels) or features(
        m, pixels))
    monkeypatch.setattr(evaluation, "draw", lambda *key: drawn.append(key[2]) or draw(*key))
    found, again = (command("fid", tmp_path, "--variant", "world", "--checkpoint", run, "--n", 2) for _ in range(2))
    assert found == again
    assert found["score"] > 0
    assert found["pictures"] == 2 * len(SKILLS)
    assert all_held_out([*map(to_picture, compared[0])], World(0))
    assert {combination_of(prompt) for prompt in drawn[0]} <= World(0).held_out
