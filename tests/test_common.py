"""Claims about what the benchmarks share (benchmarks/common.py). Asking and drawing: see test_score.py."""

import pytest
from made_benchmarks import png
from PIL import Image

from benchmarks.common import Item, mmbench_letter, rgb

DOOR = {"A": "Open", "B": "Closed"}


@pytest.mark.parametrize("pred, letter", [
    ("Open", "A"), ("open", "open"), ("(a)", "(a)"), ("Because", "B"), ("", ""), (" \n", ""), ("b", "b"),
    ("It is Closed", "B"), ("Ajar", "A")])
def test_mmbench_letter_leaves_what_it_cannot_read(pred, letter):
    """Unlike MMMU's rule it never guesses: the text stays and scores as wrong."""
    assert mmbench_letter(pred, DOOR) == letter


def test_transparency_is_white_for_mmmu_and_dropped_elsewhere(tmp_path):
    """AIA's reader of MMMU pastes on white, the others just convert to RGB; a palette may be transparent too."""
    half = Item("1", "", png((255, 0, 0, 128), "RGBA"), {})
    assert rgb(half, "mmmu")[0, 0].tolist() == [255, 127, 127]
    assert rgb(half, "mmbench")[0, 0].tolist() == [255, 0, 0]
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert rgb(Item("1", "", tmp_path / "p.png", {}), "mmmu").min() == 255
