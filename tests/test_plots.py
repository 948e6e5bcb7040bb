"""Claims about the look of figures (parts/plots.py)."""

import pytest
from matplotlib.text import Annotation, Text
from PIL import Image

import parts.plots
from parts.plots import WHOSE, WITHOUT, canvas, check_figure, plot_curves, plot_samples, save_figure
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


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws curves and returns the panel, with the labels of its legend."""
    kept = []
    monkeypatch.setattr(parts.plots, "save_figure", lambda *how: kept.append(how) or save_figure(*how))

    def draw(result):
        plot_curves(result, tmp_path / "curves.png")
        figure, (panel,), _ = kept.pop()
        return panel, [text.get_text() for text in figure.legends[0].get_texts()]
    return draw


def arrows(panel):
    """[(layer and offset, from, to), ...] of a panel."""
    found = (one for one in panel.texts if isinstance(one, Annotation))
    return [(one.xy[0], one.xyann[1], one.xy[1]) for one in found]


def row(*curve, **more):
    return {"intensity": list(curve), "std": [0.1] * len(curve), **more}


def test_arrows_lead_from_before_to_after_in_every_layer_of_both_tasks(drawn):
    """In one panel, the control without one; where hardly anything moves an arrow would be no more than its head."""
    gen = {"target": [0.4, 0.2], "before": row(0.1, 0.3), "control": row(0.15, 0.3), "after": row(0.35, 0.25)}
    und = {"target": [0.1, 0.3], "before": row(0.3, 0.2), "after": row(0.2, 0.201)}
    panel, labels = drawn({"gen": gen, "und": und})
    found = arrows(panel)
    assert [(begin, end) for _, begin, end in found] == [(0.1, 0.35), (0.3, 0.25), (0.3, 0.2)]
    assert [round(x) for x, *_ in found] == [0, 1, 0] and found[0][0] < 0 < found[2][0]
    assert labels == ["generation", "understanding", "before AIA", "same steps, without AIA", "with AIA", "target"]
    curves = [list(line.get_ydata()) for line in panel.get_lines()]
    for rows in (gen, und):
        assert all(curve in curves for curve in (rows["target"], rows["before"]["intensity"]))


@pytest.mark.parametrize("arm, label", [("after", WITHOUT), ("public", "the model")])
def test_a_single_model_and_one_task_are_drawn(arm, label, drawn):
    """Without weights from before there is no arrow; a task without samples has no target either, nor a name in the
    legend. Nor do two such tasks stop the command."""
    one = row(0.5, 0.6) | ({"label": label} if arm == "after" else {})
    panel, labels = drawn({"gen": {"target": [0.4, 0.4], arm: None}, "und": {"target": [0.1, 0.3], arm: one}})
    assert arrows(panel) == [] and labels == ["understanding", label, "target"]
    assert [0.4, 0.4] not in [list(line.get_ydata()) for line in panel.get_lines()]
    drawn({task: {"target": [0.1], arm: None} for task in ("gen", "und")})


def test_the_tasks_can_be_told_apart_without_colour(drawn):
    """On grey paper: targets, curves and entries of the legend have another marker, and curves another line."""
    rows = {"target": [0.1], "before": row(0.2), "after": row(0.3)}
    panel, _ = drawn({"gen": rows, "und": rows})
    look = {"o": [], "s": []}
    for line in panel.get_lines():
        if line.get_color() != "black":             # else it stands for both
            look[line.get_marker()].append(line)
    circles, squares = ({line.get_color() for line in lines} for lines in look.values())
    assert len(circles) == len(squares) == 1 and circles != squares
    assert [len(lines) for lines in look.values()] == [4, 4]
    assert {line.get_linestyle() for line in look["o"]} == {"None", "-"}
    assert {line.get_linestyle() for line in look["s"]} == {"None", "--"}


@pytest.mark.parametrize("layers, run", [(4, "janus-pro-7b, seed 0"), (32, "a folder of a long name " * 2 + "at all")])
def test_legend_and_caption_stand_outside_the_data(layers, run, drawn):
    """Also with the longest labels, and the caption ends within the picture, in a third line if need be."""
    rows = {name: row(*[0.3] * layers, samples=100, uniform=0.12) for name in ("before", "control", "after")}
    rows = {"target": [0.4] * layers} | rows
    und = rows | {"after": row(*[0.2] * layers, samples=37, uniform=0.6)}
    panel, _ = drawn({"gen": rows, "und": und, "run": run})
    figure = panel.figure
    caption, = (text for text in panel.findobj(Text) if text.get_text().startswith(WHOSE))
    inside, whole = panel.get_window_extent(), figure.bbox
    legend, title = figure.legends[0].get_window_extent(), caption.get_window_extent()
    assert 0 <= legend.y0 and legend.y1 < inside.y0 and inside.y1 < title.y0
    assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and title.x1 <= whole.x1
    told = " ".join(panel.get_title("left").splitlines()[1:])
    assert told == (f"{run}; samples of each task: 100 and 37; "
                    "if spread evenly over the visible tokens: 0.12 and 0.60")


def test_the_caption_leaves_out_what_an_older_file_does_not_know(drawn):
    """Neither the run, nor samples, nor the share of even attention; what both tasks have alike is told once."""
    rows = {"target": [0.4], "after": row(0.3)}
    panel, _ = drawn({"gen": rows, "und": rows})
    assert panel.get_title("left").endswith("(understanding)\n")
    known = {"target": [0.4], "after": row(0.3, samples=5, uniform=0.5)}
    panel, _ = drawn({"gen": rows, "und": known})
    assert panel.get_title("left").endswith("\nsamples of each task: 5; if spread evenly over the visible tokens: 0.50")


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
