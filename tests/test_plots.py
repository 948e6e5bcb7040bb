"""Claims about the look of figures (parts/plots.py)."""

import pytest
from PIL import Image

from parts.plots import canvas, save_figure
from parts.settings import InputError


def test_a_figure_names_each_label_once_and_is_written_whole(tmp_path):
    """One legend for all panels, three panels in two rows; a folder that is missing is refused in one line."""
    figure, panels = canvas(["a", "b", "c"], "height")
    for panel in panels:
        panel.plot([0, 1], [0, 1], label="the same")
    save_figure(figure, panels, tmp_path / "a.png")
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["the same"] and len(figure.axes) == 3
    width, height = Image.open(tmp_path / "a.png").size
    assert (width, height) == (9 * 150, round(7.3 * 150)) and len([*tmp_path.iterdir()]) == 1
    with pytest.raises(InputError, match="cannot be written"):
        save_figure(figure, panels, tmp_path / "no/a.png")
