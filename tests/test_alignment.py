"""Claims about the alignment of text and picture (lab/alignment.py)."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from made import both_models
from made_data import all_held_out
from made_folders import RED, command, opened
from PIL import Image

import aia
import data
from lab.alignment import Alignment, different_pairs, mutual_neighbours, pair_batch, pooled
from parts.world import World, draw_scenes


def test_alike_spaces_have_all_neighbours_in_common():
    """Turning or scaling a space moves no neighbour; independent spaces share k of n - 1 by chance; a loop agrees."""
    a, b = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (5, 20):
        assert mutual_neighbours(a, 3 * a @ torch.linalg.qr(b[:16])[0], k).min() == 1
        assert mutual_neighbours(a, b, k).mean().item() == pytest.approx(k / 299, rel=0.25)
    a, b = a[:12], a[:12] + b[:12]
    near = [[set(sorted((j for j in range(12) if j != i), key=lambda j: -torch.cosine_similarity(x[i], x[j], 0))[:4])
             for i in range(12)] for x in (a, b)]
    expected = [len(one & other) / 4 for one, other in zip(*near, strict=True)]
    assert mutual_neighbours(a, b, 4).tolist() == pytest.approx(expected) and 0 < np.mean(expected) < 1


@both_models
@pytest.mark.parametrize("task", aia.TASKS)
def test_only_the_captions_words_and_the_picture_are_pooled(name, task, runs):
    """Decoded, the chosen tokens are the caption and nothing else; the others are codes, or what stands for them. Their
    states are averaged over those tokens, and the modality that comes first knows nothing of the other."""
    m, text = opened(runs[name])
    captions, preparer = ["a red", "0", "0 is not x", "x", "00", "red.", "a\n\nb:", "漢 dog"], data.Preparer(m, text)
    pairs = [*zip(draw_scenes([(replace(RED, cell=i % 4),) for i in range(8)]), captions, strict=True)]
    batch, *masks = pair_batch(preparer, pairs, task)
    for b, (words, image) in enumerate(zip(*masks, strict=True)):
        said = text.core.decode(batch.tokens[b, words].tolist(), skip_special_tokens=False)
        assert said.strip() == captions[b] and len(said) - len(captions[b]) <= (name == "tiny-janus")
        codes = preparer.codes([pairs[b][0]])[0].flatten() + m.ids.get("visual", 0)
        shown = codes.tolist() if name == "tiny-emu3" else [m.ids["placeholder"]] * (16 if task == "gen" else 4)
        assert batch.tokens[b, image].tolist() == shown
        assert (words.nonzero().min() > image.nonzero().max()) == (task == "und")
    with torch.inference_mode():
        states = m(batch, intensity=False, hidden=True).hidden
    sides = pooled(m, preparer, pairs, task)
    other = pooled(m, preparer, list(zip([pairs[1][0]] * 8, captions, strict=True)) if task == "gen" else
                   [(picture, "a dog") for picture, _ in pairs], task)
    for side, mask in zip(sides, masks, strict=True):
        torch.testing.assert_close(side[:, 3], torch.stack([x[3, mask[3]].mean(0) for x in states]))
    first = int(task == "und")
    torch.testing.assert_close(sides[first], other[first])
    assert not torch.allclose(sides[1 - first], other[1 - first], atol=1e-3)


def test_alignment_is_written_with_its_controls(runs, tmp_path):
    """A score for the embedding and each layer with 95 % bars of a mean over held-out pairs; the same seed gives the
    same."""
    for name in ("one.png", "two.png"):
        command("alignment", "--checkpoint", runs["tiny-emu3"], "--n", 40, "--out", tmp_path / name)
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert first == again and Image.open(tmp_path / "one.png").size[0] > 1000
    m, text = opened(runs["tiny-emu3"])
    pairs = different_pairs(Alignment(n=40), "emu3", {"seed": 0})
    assert len({picture.tobytes() for picture, _ in pairs}) == len({caption for _, caption in pairs}) == 40
    assert all_held_out([picture for picture, _ in pairs], World(0))
    for task in aia.TASKS:
        words, image = pooled(m, data.Preparer(m, text), pairs, task)
        for k in (5, 10, 20):
            rows = {name: row[str(k)] for name, row in first[task].items()}
            each = torch.stack([mutual_neighbours(a, b, k) for a, b in zip(words, image, strict=True)])
            assert rows["score"] == pytest.approx(each.mean(1).tolist()) and len(each) == 3
            assert rows["shuffled"] == pytest.approx([k / 39] * 3, abs=0.12) and first["chance"][str(k)] == k / 39
            assert np.mean(rows["shuffled"]) < np.mean(rows["score"])
            low, high = np.array(rows["low"]), np.array(rows["high"])
            assert high - low == pytest.approx((2 * 1.96 * each.std(1) / 40 ** 0.5).numpy(), rel=0.2)
            assert (low + high) / 2 == pytest.approx(rows["score"], abs=0.02)
