"""Claims about the look of figures (parts/plots.py)."""

import pytest
from PIL import Image

from parts.plots import canvas, check_figure, plot_samples, save_figure
from parts.settings import InputError
from parts.world import Thing, draw_scenes


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


def test_a_name_that_no_figure_can_have_is_refused_beforehand(tmp_path):
    """Matplotlib would refuse the ending after hours of work. Endings that it knows stay free, and none means PNG."""
    for name in ("a.txt", "a.json"):
        with pytest.raises(InputError, match=f"{name} cannot be written: give a file that ends in .png"):
            check_figure(str(tmp_path / name))
    for name in ("a.png", "a.PNG", "a.pdf", "a"):
        check_figure(str(tmp_path / name))
    check_figure("")


def test_a_sheet_of_samples_has_a_row_for_each_sort(tmp_path):
    """Pictures, or what was said in their place; rows may have fewer panels than the widest."""
    picture = draw_scenes([(Thing("circle", "red", 0),)])[0]
    drawn = [("a red circle", picture, "", True), ("a blue square", picture, "", False)]
    said = [("is it red?", None, "yes", True)]
    sizes = []
    for rows in ([("drawn", drawn)], [("drawn", drawn), ("a story", said)]):
        plot_samples(rows, tmp_path / "s.png")
        sizes.append(Image.open(tmp_path / "s.png").size)
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] == pytest.approx(2 * sizes[0][1], abs=1)
